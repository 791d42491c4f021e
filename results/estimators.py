"""Which gradient does a credit rule follow, when the policy decides how many turns there are?

    python results/estimators.py        results/estimators.csv, its figure, the tables of its page

Seven games are so small that every batch of eight episodes can be listed. A rule, which is a
function of one of the scripts, credits the turns of each batch. The sum over all batches, each with
its probability, is the exact expected gradient of the rule. It is compared with the gradient of the
expected return. The policy has one logit per decision, so a gradient has as many numbers.

Every turn is one token. The step is the first one on fresh episodes, so all ratios are 1 and
nothing is clipped. A batch is one group. Critics are exact. There is no entropy bonus and no KL.
"""

import csv
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from algos import archer, gigpo, igpo, ms_grpo, seeupo, st_ppo, tree_grpo, turn_budget, ufo
from results import report

EPISODES = 8  # of a batch; Tree-GRPO: two trees of three leaves


# === 1. Games ====================================================================================
class Node(NamedTuple):
    """A place where the policy answers 1 with probability `chance`, and 0 otherwise.

    decision: number of the logit that decides here; None: only the answer 1 exists. outcomes:
    answer -> list of (probability, reward, gain of belief, next node or None at the end).
    """

    seen: str
    decision: int | None
    chance: float
    outcomes: dict[int, list[tuple[float, float, float, "Node | None"]]]


def ask(pay: float) -> Node:
    """Answer now, or ask first: the answer is right by chance, asking pays `pay` +- 0.3."""
    coin = [(0.5, 1.0, 0.0, None), (0.5, 0.0, 0.0, None)]
    told = Node("told", None, 1.0, {1: coin})
    return Node("question", 0, 0.5, {
        0: coin, 1: [(0.5, pay + x, pay + x, told) for x in (0.3, -0.3)]})


def ask_for_help() -> Node:
    """Answer now, and be right half of the time, or ask first, and be right in nine of ten."""
    told = Node("told", None, 1.0, {1: [(0.9, 1.0, 0.0, None), (0.1, 0.0, 0.0, None)]})
    return Node("question", 0, 0.5, {
        0: [(0.5, 1.0, 0.0, None), (0.5, 0.0, 0.0, None)],
        1: [(0.5, 0.0, 0.4 + x, told) for x in (0.1, -0.1)]})


def two_questions() -> Node:
    """Up to two questions: the first pays 1 +- 0.1, the second 0.5 +- 0.1; the answer is right."""
    answer = [(1.0, 1.0, 0.0, None)]
    told = Node("told twice", None, 1.0, {1: answer})
    again = Node("told once", 1, 0.5, {
        0: answer, 1: [(0.5, 0.5 + x, 0.5 + x, told) for x in (0.1, -0.1)]})
    return Node("question", 0, 0.5, {
        0: answer, 1: [(0.5, 1 + x, 1 + x, again) for x in (0.1, -0.1)]})


def two_ways() -> Node:
    """A short and a long way to the same task: one turn, or three, before the answer."""
    task = {1: [(1.0, 1.0, 0.0, None)], 0: [(1.0, 0.0, 0.0, None)]}
    long = Node("task after the long way", 2, 0.5, task)
    for step in ("walk 2", "walk 1"):
        long = Node(step, None, 1.0, {1: [(1.0, 0.0, 0.0, long)]})
    short = Node("task after the short way", 1, 0.5, task)
    return Node("crossing", 0, 0.5, {0: [(1.0, 0.0, 0.0, short)], 1: [(1.0, 0.0, 0.0, long)]})


def noise_first() -> Node:
    """A turn that earns 1 or -1 whatever is answered, then the turn that decides."""
    task = Node("task", 1, 0.5, {1: [(1.0, 1.0, 0.0, None)], 0: [(1.0, 0.0, 0.0, None)]})
    noise = [(0.5, x, 0.0, task) for x in (1.0, -1.0)]
    return Node("noise", 0, 0.5, {0: noise, 1: noise})


def rare(success: float = 0.02) -> Node:
    """Two turns must both be right; the belief is the probability of success so far."""
    p = math.sqrt(success)
    near = Node("near", 1, p, {1: [(1.0, 1.0, 0.0, None)], 0: [(1.0, 0.0, 0.0, None)]})
    lost = Node("lost", None, 1.0, {1: [(1.0, 0.0, 0.0, None)]})
    return Node("start", 0, p, {1: [(1.0, 0.0, p - success, near)],
                                0: [(1.0, 0.0, -success, lost)]})


GAMES = {"asking pays": ask(1.0), "asking costs": ask(-1.0), "asking helps": ask_for_help(),
         "two questions": two_questions(), "two ways": two_ways(), "noise first": noise_first(),
         "rare success": rare()}
PRICE_IS_GAIN = {"asking pays", "asking costs", "two questions"}  # what IGPO gets of the price


# === 2. Episodes and batches =====================================================================
class Turn(NamedTuple):
    node: Node
    answer: int
    reward: float
    gain: float


def all_episodes(node: Node, first: tuple[Turn, ...] = ()) -> Iterator[tuple[float, tuple]]:
    """Every way to play on from a node: its probability, and all turns, with those of `first`.

    >>> [p for p, _ in all_episodes(ask(1.0))]  # answer: right, wrong; ask: 1.3 or 0.7 and either
    [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    """
    for answer, outcomes in node.outcomes.items():
        chance = node.chance if answer else 1 - node.chance
        for probability, reward, gain, following in outcomes:
            turns = (*first, Turn(node, answer, reward, gain))
            if following is None:
                yield chance * probability, turns
                continue
            for rest, whole in all_episodes(following, turns):
                yield chance * probability * rest, whole


def answer_value(node: Node, answer: int, discount: float) -> float:
    """Q: the expected discounted return of an answer.

    >>> answer_value(ask(1.0), 1, 0.5)  # 1, and half of the coin's 0.5
    1.25
    """
    return sum(probability * (reward + discount * node_value(following, discount))
               for probability, reward, _, following in node.outcomes[answer])


def node_value(node: Node | None, discount: float) -> float:
    """V: the expected discounted return from a node on, 0 after the end."""
    return 0.0 if node is None else sum(
        (node.chance if answer else 1 - node.chance) * answer_value(node, answer, discount)
        for answer in node.outcomes)


class Episodes:
    """All U episodes of a game as tensors (U, K), 0 after the end; score is (U, K, P)."""

    def __init__(self, name: str):
        self.price_is_gain = name in PRICE_IS_GAIN
        self.probability, self.turns = zip(*all_episodes(GAMES[name]), strict=True)
        self.probability = torch.tensor(self.probability, dtype=torch.double)  # (U,)
        self.mask = self.table(lambda turn: 1.0) > 0
        self.rewards = self.table(lambda turn: turn.reward)
        self.gains = self.table(lambda turn: turn.gain)
        names = list(dict.fromkeys(turn.node.seen for turns in self.turns for turn in turns))
        self.seen = self.table(lambda turn: names.index(turn.node.seen)).long()
        logits = 1 + max(turn.node.decision or 0 for turns in self.turns for turn in turns)
        self.score = torch.stack([self.table(  # d log pi(answer) / d logit
            lambda turn, i=i: turn.answer - turn.node.chance if turn.node.decision == i else 0.0)
            for i in range(logits)], -1)

    def table(self, value: Callable[[Turn], float]) -> Tensor:
        table = torch.zeros(len(self.turns), max(map(len, self.turns)), dtype=torch.double)
        for row, turns in zip(table, self.turns, strict=True):
            row[: len(turns)] = torch.tensor([value(turn) for turn in turns], dtype=row.dtype)
        return table

    def true_gradient(self) -> Tensor:
        """The gradient of the expected return: sum over episodes of P(episode) R score. (P,)"""
        weight = self.probability * self.rewards.sum(1)
        return (weight[:, None] * self.score.sum(1)).sum(0)


class Batches:
    """Batches of episodes, side by side: E rows. All tables are (E, K), score is (E, K, P)."""

    def __init__(self, game: Episodes, rows: Tensor, group: Tensor, tree: Tensor):
        self.game = game
        self.rows = rows  # (E,) which episode of the game stands there
        self.group = group  # (E,) which batch it is in
        self.tree = tree  # (E,) which tree; of no meaning for rules without trees
        self.mask, self.rewards, self.gains, self.seen, self.score = (
            x[rows] for x in (game.mask, game.rewards, game.gains, game.seen, game.score))
        self.last = self.mask & ~torch.nn.functional.pad(self.mask[:, 1:], (0, 1))

    def table(self, value: Callable[[Turn], float]) -> Tensor:
        return self.game.table(value)[self.rows]


def multisets(probability: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every batch of `size` independent draws, in any order: (N, size) draws, (N,) probability.

    >>> multisets(torch.tensor([0.25, 0.75]), 2)
    (tensor([[0, 0],
            [0, 1],
            [1, 1]]), tensor([0.0625, 0.3750, 0.5625]))
    """
    units = range(len(probability))
    draws = torch.tensor(list(itertools.combinations_with_replacement(units, size)))
    orders = [math.factorial(size) / math.prod(map(math.factorial, Counter(draw).values()))
              for draw in draws.tolist()]
    return draws, probability[draws].prod(1) * torch.tensor(orders).to(probability)


def all_trees(game: Episodes, forks: int) -> tuple[Tensor, Tensor]:
    """Every tree: its leaves (U, 1 + forks), sorted, and its probability (U,).

    A fork plays a turn of the first leaf again, each turn being equally likely, and goes on.
    """
    number = {turns: i for i, turns in enumerate(map(key, game.turns))}
    trees = Counter()
    for chain, (probability, turns) in enumerate(zip(game.probability.tolist(), game.turns,
                                                     strict=True)):
        branch = Counter()
        for k, turn in enumerate(turns):
            for chance, played in all_episodes(turn.node, turns[:k]):
                branch[number[key(played)]] += chance / len(turns)
        for leaves in itertools.product(branch, repeat=forks):
            chance = math.prod(branch[leaf] for leaf in leaves)
            trees[tuple(sorted((chain, *leaves)))] += probability * chance
    return torch.tensor(list(trees)), torch.tensor(list(trees.values()), dtype=torch.double)


def key(turns: tuple[Turn, ...]) -> tuple:
    return tuple((turn.node.seen, turn.answer, turn.reward) for turn in turns)


def make_batches(game: Episodes, rule: "Rule") -> tuple[Batches, Tensor]:
    """Every batch of a rule, and its probability (N,)."""
    if rule.trees:
        leaves, probability = all_trees(game, tree_grpo.Args().forks)
        draws, probability = multisets(probability, tree_grpo.Args().group_size)
        index = leaves[draws]  # (N, trees, leaves)
    else:
        draws, probability = multisets(game.probability, EPISODES)
        index = draws[:, :, None]
    number = torch.arange(index.shape[0] * index.shape[1]).view(index.shape[:2])
    tree = number[:, :, None].expand_as(index)
    group = tree // index.shape[1]
    return Batches(game, index.flatten(), group.flatten(), tree.flatten()), probability


# === 3. Rules ====================================================================================
class Rule(NamedTuple):
    script: str
    credit: Callable[[Batches], Tensor]  # -> (E, K)
    mean: str  # over what the script takes the mean of its loss: a key of MEANS
    trees: bool = False
    drawn: bool = False  # MS-GRPO's draw of half of the episodes


def of_episodes(advantages: Tensor, b: Batches) -> Tensor:
    return torch.where(b.mask, advantages[:, None], 0.0)


def gigpo_credit(b: Batches, scale: str) -> Tensor:
    args = gigpo.Args()
    anchor = (b.group[:, None] * (1 + b.game.seen.max()) + b.seen)[b.mask]
    return gigpo.anchored_advantages(b.rewards, b.mask, b.group, anchor, args.discount,
                                     args.step_weight, scale)


def ufo_credit(b: Batches) -> Tensor:
    """Every turn is an answer that differs from those before; the last one is right or not."""
    args, right = ufo.Args(), b.rewards[b.last] > 0
    scores = ufo.decayed_success(right, b.mask.sum(1).double(), args.decay_base)
    return of_episodes(ufo.group_relative_advantages(scores, b.group), b)


def outcome_scores(b: Batches) -> Tensor:
    """What is left of the rewards of an episode when gains of belief stand for the price. (E,)"""
    return b.rewards.sum(1) - b.gains.sum(1) * b.game.price_is_gain


def igpo_credit(b: Batches, source: str, price_is_reward: bool = False) -> Tensor:
    beliefs = b.gains.cumsum(1) - b.gains  # before every turn
    gains = igpo.information_gain(beliefs, b.mask)
    scores = b.rewards.sum(1) if price_is_reward else outcome_scores(b)
    rewards = igpo.turn_rewards(gains, scores, b.mask, b.group, source)
    return igpo.turn_returns(rewards, b.mask, igpo.Args().discount)


def gains_and_outcome(b: Batches) -> Tensor:
    return torch.where(b.last, outcome_scores(b)[:, None], b.gains)


def joint_credit(b: Batches) -> Tensor:
    """Not in a script: gains and outcomes in one z-score, then added up."""
    rewards = ms_grpo.turn_advantages(gains_and_outcome(b), b.mask, b.group, "step")
    return igpo.turn_returns(rewards, b.mask, 1.0)


def centred_credit(b: Batches) -> Tensor:
    """Not in a script: gains and outcome added up, minus the mean of all turns of the batch."""
    returns = igpo.turn_returns(gains_and_outcome(b), b.mask, 1.0)
    group, centred = b.group[:, None].expand_as(b.mask), torch.zeros_like(returns)
    centred[b.mask] = gigpo.relative_scores(returns[b.mask], group[b.mask], "none")
    return centred


def st_ppo_credit(b: Batches) -> Tensor:
    args = st_ppo.Args()
    values = b.table(lambda turn: node_value(turn.node, args.discount))
    turn_id = torch.where(b.mask, torch.arange(b.mask.shape[1]), -1)  # one token a turn
    rewards = st_ppo.place_turn_rewards(b.rewards, turn_id).double()
    credit, _ = st_ppo.gae_advantages(rewards, values, b.mask, args.discount, args.gae_lambda)
    size = len(b.group) // (1 + int(b.group.max()))
    return torch.cat([st_ppo.whiten(part, mask)
                      for part, mask in zip(credit.split(size), b.mask.split(size), strict=True)])


def seeupo_credit(b: Batches) -> Tensor:
    """The first step on every turn: no later turn has a ratio yet.

    It wants a score between 0 and 1: the returns of the game are shifted and scaled.
    """
    low, high = b.game.rewards.sum(1).min(), b.game.rewards.sum(1).max()
    score = (b.rewards.sum(1) - low) / (high - low)
    rewards = seeupo.task_reward(score, torch.zeros(len(b.group), dtype=torch.bool))
    size = len(b.group) // (1 + int(b.group.max()))
    return of_episodes(torch.cat([seeupo.scaled_advantages(part, size)
                                  for part in rewards.split(size)]), b)


def archer_credit(b: Batches) -> Tensor:
    discount = archer.Args().discount
    q = b.table(lambda turn: answer_value(turn.node, turn.answer, discount))
    v = b.table(lambda turn: node_value(turn.node, discount))
    advantages = torch.where(b.mask, archer.answer_advantages(q[..., None], v[..., None]), 0.0)
    total, count = (torch.zeros(1 + int(b.group.max()), dtype=torch.double).index_add(0, b.group, x)
                    for x in (advantages.sum(1), b.mask.sum(1).double()))
    return torch.where(b.mask, advantages - (total / count)[b.group, None], 0.0)  # as update() does


def ms_grpo_credit(b: Batches, credit: str) -> Tensor:
    return ms_grpo.turn_advantages(b.rewards, b.mask, b.group, credit)


RULES = {
    "MS-GRPO": Rule("ms_grpo", lambda b: ms_grpo_credit(b, "episode"), "tokens", drawn=True),
    "MS-GRPO, sampling all": Rule("ms_grpo", lambda b: ms_grpo_credit(b, "episode"), "tokens"),
    "MS-GRPO, all, credit return_to_go": Rule(
        "ms_grpo", lambda b: ms_grpo_credit(b, "return_to_go"), "tokens"),
    "MS-GRPO, all, credit step": Rule("ms_grpo", lambda b: ms_grpo_credit(b, "step"), "tokens"),
    "GiGPO": Rule("gigpo", lambda b: gigpo_credit(b, "std"), "tokens"),
    "GiGPO, scale none": Rule("gigpo", lambda b: gigpo_credit(b, "none"), "tokens"),
    "UFO": Rule("ufo", ufo_credit, "tokens"),
    "turn budget": Rule("turn_budget", lambda b: of_episodes(
        turn_budget.group_relative_advantages(b.rewards.sum(1), b.group), b), "tokens"),
    "IGPO": Rule("igpo", lambda b: igpo_credit(b, "both"), "rows"),
    "IGPO, price also a reward": Rule("igpo", lambda b: igpo_credit(b, "both", True), "rows"),
    "IGPO, outcome": Rule("igpo", lambda b: igpo_credit(b, "outcome"), "rows"),
    "IGPO, information_gain": Rule("igpo", lambda b: igpo_credit(b, "information_gain"), "rows"),
    "Tree-GRPO": Rule("tree_grpo", lambda b: of_episodes(tree_grpo.tree_advantages(
        b.rewards.sum(1), b.tree, b.group, "both"), b), "tokens", trees=True),
    "Tree-GRPO, intra": Rule("tree_grpo", lambda b: of_episodes(tree_grpo.tree_advantages(
        b.rewards.sum(1), b.tree, b.group, "intra"), b), "tokens", trees=True),
    "Tree-GRPO, inter": Rule("tree_grpo", lambda b: of_episodes(tree_grpo.tree_advantages(
        b.rewards.sum(1), b.tree, b.group, "inter"), b), "tokens", trees=True),
    "ST-PPO": Rule("st_ppo", st_ppo_credit, "rows"),
    "SeeUPO": Rule("seeupo", seeupo_credit, "turns"),
    "ArCHer": Rule("archer", archer_credit, "tokens"),
    "gains and outcome, one z-score": Rule("", joint_credit, "rows"),
    "gains and outcome, centred": Rule("", centred_credit, "rows"),
}


ASKING = ("asking pays", "asking costs", "asking helps")  # the games with one logit
MEANS = {"episodes": "episodes", "tokens": "all tokens", "rows": "rows, then episodes",
         "turns": "each turn on its own"}


# === 4. Gradients ================================================================================
def weights(b: Batches, mean: str) -> Tensor:
    """The weight of every turn in the loss of its batch (E, K).

    tokens: mean over all turns of the batch; rows: over the turns of an episode, then over
    episodes; turns: a step for every turn k, a mean over the episodes that have it; episodes: the
    sum over an episode's turns, then the mean over episodes, as in the policy gradient theorem.
    """
    mask, batches = b.mask.double(), 1 + int(b.group.max())
    count = torch.zeros(batches, mask.shape[1], dtype=torch.double).index_add(0, b.group, mask)
    size = len(b.group) // batches
    if mean == "turns":
        return mask / count.clamp(min=1)[b.group]
    if mean == "tokens":
        return mask / count.sum(1)[b.group, None]
    return mask / size if mean == "episodes" else mask / mask.sum(1, keepdim=True) / size


def batch_gradients(b: Batches, credit: Tensor, mean: str) -> Tensor:
    """What every batch makes of its credit: (N, P)."""
    found = ((weights(b, mean) * credit)[..., None] * b.score).sum(1)  # (E, P)
    return torch.zeros(1 + int(b.group.max()), found.shape[1], dtype=torch.double).index_add(
        0, b.group, found)


def drawn_gradients(b: Batches, credit: Tensor, mean: str) -> tuple[Tensor, Tensor]:
    """With MS-GRPO's draw: (N, D, P) for every draw of half of the episodes, (N, D) probability.

    An episode is drawn with probability |A| / sum |A| (Eq. 5 of ms_grpo.py), with replacement.
    Where all advantages are 0 nothing is drawn, and the gradient is 0.
    """
    size = EPISODES // 2
    advantage = credit[:, 0].view(-1, EPISODES).abs()  # the same on all turns of an episode
    share = advantage / advantage.sum(1, keepdim=True).clamp(min=1e-12)
    draws, orders = multisets(torch.ones(EPISODES, dtype=torch.double), size)  # (D, size)
    rows = torch.arange(len(credit)).view(-1, EPISODES)[:, draws]  # (N, D, size)
    mask = b.mask[rows].double()  # (N, D, size, K)
    if mean == "tokens":
        weight = mask / mask.sum((2, 3), keepdim=True)
    else:
        weight = mask / size / (mask.sum(3, keepdim=True) if mean == "rows" else 1)
    found = ((weight * credit[rows])[..., None] * b.score[rows]).sum((2, 3))
    return found, share[:, draws].prod(2) * orders


def moments(game: Episodes, rule: Rule) -> Iterator[tuple[str, Tensor, float]]:
    """For the keys of MEANS: the expected gradient (P,), and its variance per episode.

    The variance is that of a batch's gradient, summed over the P numbers, times the episodes of a
    batch. A rule that divides by a std is no mean over episodes, so this is a unit of noise only.
    """
    b, probability = make_batches(game, rule)
    credit = rule.credit(b)
    for mean in MEANS:
        if rule.drawn and mean == "turns":
            continue  # no script with a draw takes it
        gradients, weight = batch_gradients(b, credit, mean), probability
        if rule.drawn:
            gradients, shares = drawn_gradients(b, credit, mean)
            gradients, weight = gradients.flatten(0, 1), (probability[:, None] * shares).flatten()
        expected = (weight[:, None] * gradients).sum(0)
        square = (weight * gradients.square().sum(1)).sum() - expected.square().sum()
        yield mean, expected, square.item() * (len(b.rows) // len(probability))


def compute() -> list[dict[str, str]]:
    """A row for every game, rule and mean of the loss."""
    rows = []
    for name in GAMES:
        game = Episodes(name)
        true = game.true_gradient()
        for rule_name, rule in RULES.items():
            for mean, gradient, variance in moments(game, rule):
                length = gradient.norm().item()
                follows = length > 1e-9  # else there is no direction
                cosine = (gradient @ true).item() / (length * true.norm().item()) if follows else ""
                numbers = dict.fromkeys(("gradient_0", "gradient_1", "gradient_2"), "")
                numbers |= {f"gradient_{i}": x if abs(x) > 1e-9 else 0.0
                            for i, x in enumerate(gradient.tolist())}
                rows.append({
                    "game": name, "rule": rule_name, "mean": mean,
                    "in_the_script": int(mean == rule.mean), **numbers, "cosine": cosine,
                    "length_ratio": length / true.norm().item() if follows else 0.0,
                    "variance_per_episode": variance,
                    "episodes_for_signal": variance / length**2 if follows else ""})
    return [{name: f"{x:.5g}" if isinstance(x, float) else str(x) for name, x in row.items()}
            for row in rows]


# === 5. Tables and the figure ====================================================================
def as_in_the_script(rows: list[dict[str, str]], game: str) -> dict[str, dict[str, str]]:
    """rule -> row, with the mean over the loss that the script takes."""
    return {row["rule"]: row for row in rows if row["game"] == game and row["in_the_script"] == "1"}


def asking_table(rows: list[dict[str, str]]) -> str:
    """The gradient towards asking, and what a rule learns by it."""
    lines = ["| rule | " + " | ".join(f"{game}: gradient | so it learns to" for game in ASKING)
             + " |", "|---" * (1 + 2 * len(ASKING)) + "|"]

    def add(rule: str, gradients: list[float]):
        words = ["ask" if x > 1e-3 else "stop asking" if x < -1e-3 else "neither"
                 for x in gradients]
        cells = [f"{x:+.3f} | {word}" if word != "neither" else f"0 | {word}"
                 for x, word in zip(gradients, words, strict=True)]
        lines.append("| " + " | ".join([rule, *cells]) + " |")

    add("*the expected return*", [Episodes(game).true_gradient().item() for game in ASKING])
    found = [as_in_the_script(rows, game) for game in ASKING]
    for rule in RULES:
        add(rule, [float(of_game[rule]["gradient_0"]) for of_game in found])
    return "\n".join(lines)


def others_table(rows: list[dict[str, str]]) -> str:
    """Direction, length and noise in the other games."""
    games = {game: as_in_the_script(rows, game) for game in GAMES if game not in ASKING}
    heads = [f"{game}: cosine, length | variance, episodes" for game in games]
    lines = ["| " + " | ".join(["rule", *heads]) + " |", "|---" * (1 + 2 * len(games)) + "|"]
    for rule in RULES:
        cells = [rule]
        for of_game in games.values():
            cosine, length, variance, episodes = (of_game[rule][name] for name in (
                "cosine", "length_ratio", "variance_per_episode", "episodes_for_signal"))
            cells.append(f"{float(cosine):.2f}, {float(length):.2f}" if cosine else "no gradient")
            cells.append(f"{float(variance):.3f}, {float(episodes):.3g}" if episodes else
                         f"{float(variance):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means_table(rows: list[dict[str, str]]) -> str:
    """The game of two ways under every mean of the loss."""
    names = ["take the long way", "right after the short way", "right after the long way"]
    lines = ["| rule | mean over | " + " | ".join(names) + " | cosine |", "|---" * 6 + "|"]
    for row in rows:
        if row["game"] == "two ways" and row["rule"] in ("MS-GRPO, sampling all", "ST-PPO", "UFO"):
            mark = " (its script's)" if row["in_the_script"] == "1" else ""
            numbers = [float(row[f"gradient_{i}"]) for i in range(3)]
            cells = [row["rule"], MEANS[row["mean"]] + mark,
                     *(f"{x:+.3f}" if x else "0" for x in numbers), f"{float(row['cosine']):.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path):
    """A panel per game, with the number that tells the rules apart there."""
    figure = Figure((17, 6), layout="constrained")
    shown = [game for game in GAMES if game != "two questions"]
    axes = dict(zip(shown, figure.subplots(1, len(shown), sharey=True), strict=True))
    for game, axis in axes.items():
        of_game = as_in_the_script(rows, game)
        axis.set_title(game)
        if game in ASKING:
            for y, name in enumerate(RULES):
                value = float(of_game[name]["gradient_0"])
                axis.barh(y, value, color="C0" if RULES[name].script else "0.6")
                if abs(value) < 1e-3:
                    axis.plot(0, y, "x", color="C3")
            axis.set_xlabel("gradient towards asking\n(cross: none)")
            axis.axvline(0, color="k", linewidth=0.5)
            axis.axvline(Episodes(game).true_gradient().item(), color="k", linestyle="--",
                         linewidth=1)
        elif game == "two ways":
            for y, row in enumerate(of_game.values()):
                numbers = torch.tensor([float(row[f"gradient_{i}"]) for i in range(3)])
                for i, number in enumerate(numbers if numbers.any() else ()):
                    axis.plot(number / numbers.norm(), y, "osD"[i], color=f"C{i + 1}")
            for true in (0, 0.5**0.5):
                axis.axvline(true, color="k", linewidth=1, linestyle="--")
            axis.set_xlabel("gradient, scaled to length 1\ncircle: towards the long way\n"
                            "right after: square short, diamond long", fontsize=9)
        else:
            for y, name in enumerate(RULES):
                if text := of_game[name]["episodes_for_signal"]:
                    axis.barh(y, float(text), color="C0" if RULES[name].script else "0.6")
                else:
                    axis.text(0.06, y, "no gradient", va="center", fontsize=8)
            axis.set_xlabel("episodes until signal = noise")
            axis.set_xscale("log")
            axis.set_xlim(left=0.05)
    axes["asking pays"].set_yticks(range(len(RULES)), RULES, fontsize=9)
    axes["asking pays"].invert_yaxis()
    figure.suptitle("dashed: gradient of the expected return; grey: not in a script", fontsize=10)
    figure.savefig(path, dpi=110)


def pages(rows: list[dict[str, str]]):
    page = ROOT / "docs/estimators.md"
    report.replace_block(page, "asking", asking_table(rows))
    report.replace_block(page, "others", others_table(rows))
    report.replace_block(page, "means", means_table(rows))
    draw(rows, ROOT / "docs/figures/estimators.png")


if __name__ == "__main__":
    rows = compute()
    with open(ROOT / "results/estimators.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pages(rows)
