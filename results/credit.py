"""One episode, all algorithms: what each credits every sampled token with.

    python results/credit.py        draws docs/figures/credit.png

The episode is fixed: four turns of a search, the second one useless, the answer right. It has three
siblings from the same start. What an algorithm needs besides (beliefs, values, ratios, entropies)
is fixed below; the advantages are computed by the scripts' own functions with their default flags.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from algos import archer, gigpo, igpo, ms_grpo, seeupo, st_ppo, tree_grpo, turn_budget, ufo
from utils import expand_to_tokens, random_stream

CELLS = [  # text and turn, -1: an observation
    ("question\nMia friend\nboss", -1), ("search", 0), ("Mia", 0), ("friend", 0), ("end", 0),
    ("result\nRosa", -1), ("search", 1), ("Cleo", 1), ("doctor", 1), ("end", 1),
    ("result\nIda", -1), ("search", 2), ("Rosa", 2), ("boss", 2), ("end", 2),
    ("result\nKim", -1), ("answer", 3), ("Kim", 3), ("end", 3)]
TURN_ID = torch.tensor([[turn for _, turn in CELLS]])  # (1, T): the shown episode is row 0
MASK = TURN_ID >= 0
NUM_TURNS = torch.tensor([4, 2, 3, 3])  # of the four siblings, E = 4; two of them answer rightly
TURN_MASK = torch.arange(4) < NUM_TURNS[:, None]  # (E, K)
SCORES = torch.tensor([1.0, 0.0, 0.0, 1.0])
GROUP = torch.zeros(4, dtype=torch.long)


def of_tokens(values: list[float]) -> Tensor:
    """A number for every sampled token of the shown episode -> (1, T), 0 elsewhere."""
    return torch.zeros(TURN_ID.shape).masked_scatter(MASK, torch.tensor(values))


def credit_of_all() -> dict[str, tuple[Tensor, str]]:
    """Algorithm -> advantages (T,) of the shown episode, nan where nothing is trained; a remark."""
    first, found = torch.zeros(1, dtype=torch.long), {}

    def add(name: str, credit: Tensor, remark: str, trained: Tensor = MASK):
        tokens = expand_to_tokens(credit, TURN_ID, first) if credit.shape[1] == 4 else credit
        found[name] = torch.where(trained, tokens, torch.nan)[0], remark

    last = TURN_MASK & (torch.arange(4) == NUM_TURNS[:, None] - 1)
    rewards = torch.where(last, SCORES[:, None], 0.0)  # (E, K)
    args = ms_grpo.Args()
    credit = ms_grpo.turn_advantages(rewards, TURN_MASK, GROUP, args.credit)
    add("MS-GRPO", credit, "all turns: better than the siblings")

    args = gigpo.Args()  # anchors: all saw the question; three saw "Rosa", two of them "Ida"
    anchor = torch.tensor([0, 1, 2, 3, 0, 4, 0, 1, 2, 0, 1, 5])
    credit = gigpo.anchored_advantages(rewards, TURN_MASK, GROUP, anchor, args.discount,
                                       args.step_weight, args.scale)
    add("GiGPO", credit, "and with turns that saw the same; turn 3 saw what no other did")

    args = ufo.Args()  # every turn counts as one more answer
    decayed = ufo.decayed_success(SCORES > 0, NUM_TURNS.float(), args.decay_base)
    relative = ufo.group_relative_advantages(decayed, GROUP)
    add("UFO", torch.where(TURN_MASK, relative[:, None], 0.0),
        "a late success is worth less: 1/8, a sibling 1/4")

    relative = turn_budget.group_relative_advantages(SCORES, GROUP)
    forced = torch.tensor([turn == 1 and text == "end" for text, turn in CELLS])
    add("turn budget", torch.where(TURN_MASK, relative[:, None], 0.0),
        "the end of turn 1 came from the cap: not trained", MASK & ~forced)

    args = igpo.Args()
    beliefs = torch.tensor([[-3.0, -1.5, -1.6, -0.2], [-3.0, -1.5, 0, 0], [-3.0, -3.1, -2.9, 0],
                            [-3.0, -1.5, -0.2, 0]])  # log-probability of the right answer
    gains = igpo.information_gain(beliefs, TURN_MASK)
    turn_rewards = igpo.turn_rewards(gains, SCORES, TURN_MASK, GROUP, args.reward_source)
    add("IGPO", igpo.turn_returns(turn_rewards, TURN_MASK, args.discount),
        "belief rose by 1.5, -0.1, 1.4; later turns add up")

    args = tree_grpo.Args()
    entropies = of_tokens([1.2, 0.9, 0.1, 0.05, 0.8, 1.4, 1.3, 0.1,
                           0.6, 0.2, 0.1, 0.02, 0.5, 0.3, 0.01])
    threshold = tree_grpo.entropy_threshold(entropies[MASK], args.keep_top_entropy)
    tree_id = torch.tensor([0, 0, 1, 1])
    leaves = tree_grpo.tree_advantages(SCORES, tree_id, GROUP, args.advantage)
    add("Tree-GRPO", torch.where(TURN_MASK, leaves[:, None], 0.0),
        "in the tree and in the group; unsure tokens only", MASK & (entropies >= threshold))

    args = st_ppo.Args()
    values = of_tokens([0.35, 0.4, 0.45, 0.5, 0.6, 0.45, 0.4, 0.4,
                        0.4, 0.55, 0.6, 0.65, 0.8, 0.95, 0.97])
    rows = [(TURN_ID, values)]  # the siblings have four tokens a turn, of one value
    for turn_values in ([0.35, 0.5], [0.35, 0.3, 0.25], [0.35, 0.6, 0.9]):
        turns, value = torch.arange(len(turn_values)), torch.tensor(turn_values)
        rows.append((turns.repeat_interleave(4)[None], value.repeat_interleave(4)[None]))
    found_by_row = []
    for (turn_id, value), paid in zip(rows, rewards, strict=True):
        token_rewards = st_ppo.place_turn_rewards(paid[None], turn_id)
        advantages, _ = st_ppo.gae_advantages(token_rewards, value, turn_id >= 0, args.discount,
                                              args.gae_lambda)
        found_by_row.append(advantages[turn_id >= 0])
    pool = torch.cat(found_by_row)[None]  # (1, N) of all sampled tokens, the shown episode's first
    white = st_ppo.whiten(pool, torch.ones_like(pool, dtype=torch.bool))[0, : len(found_by_row[0])]
    add("ST-PPO", of_tokens(white.tolist()), "outcome minus the critic's expectation, whitened")

    args = seeupo.Args()
    worth = seeupo.task_reward(SCORES, torch.zeros(4, dtype=torch.bool))
    advantages = seeupo.scaled_advantages(worth, len(SCORES))
    log_ratio = torch.tensor([0.0, -0.1, 0.05, 0.1])  # of the shown episode's turns
    running, credit = torch.ones(4), torch.zeros(4, 4)
    for [turn] in seeupo.turn_order(4, args.order, random_stream()):
        credit[:, turn] = advantages * running
        running = seeupo.multiply_weights(running, log_ratio[turn, None], first)
    add("SeeUPO", credit, "times the ratios of later turns: 1.11, 1.05, 0.90")

    q = torch.tensor([[0.55, 0.6], [0.5, 0.4], [0.85, 0.9], [1.0, 0.95]])  # (K, J)
    v = torch.tensor([[0.5, 0.45], [0.6, 0.55], [0.55, 0.5], [0.9, 0.85]])
    answers = archer.answer_advantages(q, v)
    add("ArCHer", (answers - answers.mean())[None],  # centred: this episode is the whole step
        "min Q - min V of every answer")
    return found


def draw(path: Path):
    rows = credit_of_all()
    widths = [2.0 if turn < 0 else 1.25 for _, turn in CELLS]
    left = [sum(widths[:t]) for t in range(len(CELLS) + 1)]
    turns = {turn: [t for t, (_, other) in enumerate(CELLS) if other == turn] for turn in range(4)}
    figure = Figure((14, 5.2), layout="constrained")
    axis = figure.subplots()

    def box(start: int, stop: int, row: int, color, text: str, hatch: str | None = None):
        width = left[stop] - left[start]
        axis.add_patch(Rectangle((left[start], row + 0.06), width, 0.88, facecolor=color,
                                 edgecolor="0.6", linewidth=0.6, hatch=hatch))
        axis.text(left[start] + width / 2, row + 0.5, text, ha="center", va="center", fontsize=8.5)

    for t, (text, turn) in enumerate(CELLS):
        axis.text((left[t] + left[t + 1]) / 2, -0.5, text, ha="center", va="center", fontsize=9,
                  color="black" if turn >= 0 else "0.45")
    for turn, tokens in turns.items():
        axis.text((left[tokens[0]] + left[tokens[-1] + 1]) / 2, -1.2, f"turn {turn}", ha="center")
    for number, (name, (credit, remark)) in enumerate(rows.items()):
        axis.text(-0.3, number + 0.5, name, ha="right", va="center", fontsize=11)
        axis.text(left[-1] + 0.3, number + 0.5, remark, va="center", fontsize=9, color="0.3")
        largest = credit.nan_to_num().abs().max().item()
        for t, (_, turn) in enumerate(CELLS):
            if turn < 0:
                box(t, t + 1, number, "0.93", "")
        for tokens in turns.values():
            values = [credit[t].item() for t in tokens]
            for t, value in zip(tokens, values, strict=True):
                if value != value:
                    box(t, t + 1, number, "white", "", hatch="////")
                    continue
                share = value / largest
                color = (1 - 0.68 * max(share, 0), 1 - 0.42 * abs(share), 1 + 0.75 * min(share, 0))
                box(t, t + 1, number, color, "0" if abs(value) < 5e-3 else f"{value:+.2f}")
    axis.set(xlim=(-0.1, left[-1] + 0.1), ylim=(len(rows), -1.7))
    axis.axis("off")
    figure.suptitle("One episode with a right answer: the advantage of every sampled token. Blue: "
                    "more of it, orange: less (strongest: the row's largest); grey: observations; "
                    "hatched: not trained", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(ROOT / "docs/figures/credit.png")
