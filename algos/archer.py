"""ArCHer: a critic learns what whole answers are worth, the policy learns from the critic.

Paper: Zhou, Zanette, Pan, Levine and Kumar, "ArCHer: Training Language Model Agents via
Hierarchical Multi-Turn RL", arXiv 2402.19446v1, its abstract and first page; the rest from notes
and from the authors' code, YifeiZhou02/ArCHer at 7c771a7 [code].

    Eq. 1  y_j = r + (1 - done) discount Vbar_j(s')                                       [code]
    Eq. 2  u_j = Qbar_j(s, a~)                  a~ an answer of the current policy        [code]
    Eq. 3  loss = mean over drawn turns of sum_j (Q_j(s, a) - y_j)^2 + (V_j(s) - u_j)^2   [code]
    Eq. 4  after every critic step: target <- (1 - tau) target + tau critic               [code]
    Eq. 5  A = min_j Q_j(s, a~) - min_j V_j(s), minus its mean over the step (D6)         [code]
    Eq. 6  objective = mean over drawn turns of A sum_t log pi(a~_t | s, a~_<t)           [code]

    s    the tokens before a turn    a  the answer that was given    r, done  what came of it
    s'   the tokens before the next turn     j  one of num_critics heads (the last axis, J)
    bar  of the target critic, a slow copy; without it: the critic itself    tau  target_rate

What is learned where.
    Q       from any turn of the past: its reward and the next state are known, whoever answered.
    V       is that of the current policy, of which an old answer says nothing. In a turn just
            played a~ = a; to older states the policy answers again, once per iteration (D7).
    policy  on fresh answers to newly drawn states. The tokens of an answer share its A.

Changed from seeupo.py
    - a buffer of old turns, of which the policy sees only the states
    - a critic of answers and its slow copy, many critic steps per policy step
    - no ratios and no clipping, because every answer is the current policy's own

Deviations and choices
    D1  Eq. 1 goes on after a time limit, not after a full context (code: --no-bootstrap-truncated).
    D2  One causal pass: V reads the last hidden state of s, Q that and the mean of a's (code: two).
    D3  The end-of-turn token is trained (code: it is cut away).
    D4  Each network is clipped to its own gradient norm (code: one norm for both).
    D5  The critic starts as a copy of the policy's first two layers (code: a RoBERTa).
    D6  The mean of A over a policy step is subtracted: it is noise of the critic (code: it stays).
    D7  A critic step draws from the turns just played and fresh_turns of the buffer. Their fresh
        answers serve all steps: the policy rests (code: the buffer, an answer for every draw).
    D8  Sizes are smaller, see the flags. The evaluation samples (code: greedy).

    python algos/archer.py        about 1 minute on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from policies import Policy, load_policy, parse_args, twin
from rollouts import Decoder, collect_groups, make_envs, sample_answers
from run_folder import Run
from utils import (
    DRAW, RunArgs, all_reduce_sum, collate, gather_list, micro_batches, optimizer_step,
    over_processes, random_stream, rank, rank_correlation, select_rows, stop, token_logprobs,
    world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/Maze-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 16  # environment seeds per iteration
    group_size: int = 1  # episodes that start from the same seed (none are compared here)
    max_turns: int = 30  # turns after which an episode is truncated, K
    max_turn_tokens: int = 2  # tokens the policy may sample in one turn
    learning_rate: float = 3e-4  # of AdamW, constant
    num_iterations: int = 30  # iterations of: collect episodes, update
    tiny_steps: ClassVar[int] = 200  # of the warm start, where the tiny model is trained
    eval_every: int = 3  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    history_turns: int | None = 0  # earlier turns the policy sees; None: all, as one growing row
    value_target: Literal["fresh", "monte_carlo"] = "fresh"  # Eq. 1, 2 (the paper's) or returns
    discount: float = 0.95  # per turn, Eq. 1
    num_critics: int = 2  # heads J; the paper's are 2
    target_rate: float = 0.1  # tau of Eq. 4
    critic_learning_rate: float = 1e-3  # of the critic's AdamW
    critic_steps: int = 40  # optimizer steps of the critic per iteration (code: 50)
    critic_batch_turns: int = 64  # turns drawn for a critic step (code: 256)
    fresh_turns: int = 512  # turns of the buffer that get a fresh answer for the critic, D7
    actor_steps: int = 3  # optimizer steps of the policy per iteration
    actor_batch_turns: int = 256  # turns drawn for a policy step
    actor_warm_up: int = 5  # iterations of the critic alone (code: 10 or 20 of far more)
    replay_turns: int = 100000  # turns in the buffer; the oldest are dropped
    bootstrap_truncated: bool = True  # a time limit does not end the return, D1
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"actor_warm_up", "history_turns"}
    chat_defaults: ClassVar = RunArgs.chat_defaults | {"critic_learning_rate": 1e-4}


# === 3. Advantages ===============================================================================
@torch.no_grad()
def q_targets(rewards: Tensor, done: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """What Q should be: the reward plus what the same head's V expects of the next state. Eq. 1

    rewards (..), done (..) bool, next_values (.., J) -> (.., J)

    >>> done = torch.tensor([False, True])  # nothing counts after the end
    >>> q_targets(torch.tensor([-1.0, -1.0]), done, torch.tensor([[-4.0, -2.0], [9.0, 9.0]]), 0.5)
    tensor([[-3., -2.],
            [-1., -1.]])
    """
    return rewards[..., None] + torch.where(done[..., None], 0.0, discount * next_values)


@torch.no_grad()
def answer_advantages(q: Tensor, v: Tensor) -> Tensor:
    """How much better an answer is than the average one, before update() centres it. Eq. 5

    q, v (.., J) -> (..)

    >>> answer_advantages(torch.tensor([[-3.0, -4.0]]), torch.tensor([[-6.0, -5.0]]))
    tensor([2.])
    """
    return q.amin(-1) - v.amin(-1)


# === 4. Loss =====================================================================================
def squared_errors(values: Tensor, targets: Tensor) -> Tensor:
    """The squared errors of a turn's values, summed over the heads. Eq. 3

    values (.., J), targets of that shape or one that broadcasts -> (..)

    >>> squared_errors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([13.])
    """
    return ((targets - values) ** 2).sum(-1)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, online: torch.nn.Module, rate: float):
    """Move every parameter of the target towards the online network, in place. Eq. 4

    >>> slow, fast = (torch.nn.ParameterList([torch.tensor([x])]) for x in (0.0, 2.0))
    >>> polyak_update(slow, fast, 0.25)
    >>> slow[0].data
    tensor([0.5000])
    """
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)


def actor_objective(logprobs: Tensor, advantages: Tensor, turn_id: Tensor, count: int) -> Tensor:
    """The log-probability of every answer, not divided by its length, times its advantage. Eq. 6

    logprobs, turn_id (B, T), advantages (B,), the whole step's count of answers -> scalar

    >>> turn_id = torch.tensor([[0, 0], [0, -1]])  # two tokens, and one: (2 * -3 - 1 * -1) / 2
    >>> logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -9.0]])
    >>> actor_objective(logprobs, torch.tensor([2.0, -1.0]), turn_id, 2)
    tensor(-2.5000)
    """
    of_answers = torch.where(turn_id >= 0, logprobs, 0.0).sum(1)  # (B,) log pi(a~ | s)
    return (advantages * of_answers).sum() / count


# === 5. The critic, the buffer and fresh answers =================================================
class TurnCritic(torch.nn.Module):
    """A copy of the policy's first layers with J heads for Q and J for V."""

    def __init__(self, policy: Policy, num_critics: int, num_layers: int = 2):
        super().__init__()
        self.trunk = twin(policy.model.base_model)
        self.trunk.layers = self.trunk.layers[:num_layers]
        self.device, self.bf16 = policy.device, policy.bf16
        size = policy.model.get_output_embeddings().in_features  # D, what the trunk gives out

        def heads(width: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(torch.nn.Sequential(
                torch.nn.Linear(width, size), torch.nn.ReLU(), torch.nn.Linear(size, size),
                torch.nn.ReLU(), torch.nn.Linear(size, 1)) for _ in range(num_critics))

        self.q_heads, self.v_heads = heads(2 * size), heads(size)
        self.to(policy.device)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Q(s, a) and V(s) of every row, each (B, J); Q means nothing without an answer."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk(batch["tokens"], use_cache=False).last_hidden_state.float()
        row = torch.arange(len(hidden), device=self.device)
        state = hidden[row, batch["starts"] - 1]  # (B, D), the state's last token
        inside = (batch["turn_id"] >= 0).float()[:, :, None]  # (B, T, 1)
        answer = (inside * hidden).sum(1) / inside.sum(1).clamp(min=1)  # (B, D), the mean
        q = [head(torch.cat([state, answer], 1)) for head in self.q_heads]
        return torch.cat(q, 1), torch.cat([head(state) for head in self.v_heads], 1)


@torch.no_grad()
def turn_values(critic: TurnCritic, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor]:
    """Q(s, a) and V(s) of a batch of any size, without gradient: two (B, J)."""
    values = torch.zeros(2, len(batch["starts"]), args.num_critics, device=critic.device)
    numbered = batch | {"row": torch.arange(len(batch["starts"]), device=critic.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[:, part["row"]] = torch.stack(critic(part))
    return values[0], values[1]


def transitions(policy: Policy, episode: Episode, args: Args) -> list[dict]:
    """The turns of an episode, as dicts, which a checkpoint can hold.

    state, answer, next_state: tokens, of a state all that the policy saw; reward; done: whether the
    return ends here; return_to_go: discounted, with all later rewards; turn: its number
    """
    row, states = [], []
    for turn in episode.turns:
        states.append(([] if turn.starts_row else row) + turn.prompt_ids)
        row = states[-1] + turn.token_ids
    ended = episode.terminated or episode.overflowed or not args.bootstrap_truncated
    prompt, starts_row = ([], False) if ended else policy.prompt(episode)
    states.append(([] if starts_row else row) + prompt)  # nobody answers it
    found, to_go = [], 0.0
    for k, turn in reversed([*enumerate(episode.turns)]):
        to_go = turn.reward + args.discount * to_go
        found.append({"state": states[k], "answer": turn.token_ids, "next_state": states[k + 1],
                      "reward": turn.reward, "done": ended and not found, "return_to_go": to_go,
                      "turn": k})
    return found[::-1]


def answer_rows(turns: list[Turn], device: torch.device) -> dict[str, Tensor]:
    """A row for every state and the answer to it, if there is one: turn_id is 0 there."""
    batch = collate([Episode(0, "", [turn]) for turn in turns], device)
    return batch | {"starts": batch["lengths"] - (batch["turn_id"] >= 0).sum(1)}


def share(count: int) -> slice:
    """Which of `count` things are this process's."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def fresh_answers(policy: Policy, states: list[list[int]], rng: np.random.Generator,
                  args: Args) -> list[Turn]:
    """The policy, as it is now, answers this process's share of the states."""
    uniforms = torch.tensor(rng.random((len(states), args.max_turn_tokens)))[share(len(states))]
    answers = [Turn("", "", prompt_ids=state) for state in states[share(len(states))]]
    lengths = torch.tensor([len(turn.prompt_ids) for turn in answers])
    for part in micro_batches({"lengths": lengths, "index": torch.arange(len(lengths))},
                              args.micro_batch_tokens):
        turns = [answers[i] for i in part["index"].tolist()]
        sample_answers(Decoder(policy, len(turns)), [list(turn.prompt_ids) for turn in turns],
                       turns, [args.max_turn_tokens] * len(turns), uniforms[part["index"]],
                       args.temperature)
    return answers


def critic_batches(turns: list[dict], answers: list[list[int]],
                   device: torch.device) -> dict[str, dict[str, Tensor]]:
    """What the critic learns from: three batches with a row per turn.

    played: s, a; current: s, an answer of the current policy; following: s'
    """
    def rows(states: list[list[int]], answers: list[list[int]]) -> dict[str, Tensor]:
        return answer_rows([Turn("", "", state, True, answer, [0.0] * len(answer))
                            for state, answer in zip(states, answers, strict=True)], device)

    column = {name: [turn[name] for turn in turns] for name in turns[0]}
    played = rows(column["state"], column["answer"]) | {
        name: torch.tensor(column[name], device=device)
        for name in ("reward", "done", "return_to_go")}
    return {"played": played, "current": rows(column["state"], answers),
            "following": rows(column["next_state"], [[]] * len(turns))}


def same_state_advantages(returns: Tensor, state_id: Tensor) -> Tensor:
    """Returns minus their mean over all turns with the same state; NaN where there is no other.

    returns, state_id (N,) -> (N,)

    >>> same_state_advantages(torch.tensor([-3.0, -5.0, -2.0]), torch.tensor([0, 0, 1]))
    tensor([ 1., -1., nan])
    """
    counts = torch.bincount(state_id)
    means = torch.bincount(state_id, returns).to(returns) / counts
    return torch.where(counts[state_id] > 1, returns - means[state_id], math.nan)


def critic_quality(critic: TurnCritic, turns: list[dict], args: Args) -> dict[str, float]:
    """What the critic knows of new episodes: what turns return, and which answers return more.

    Of the first half of --max-turns: what later turns return, a time limit soon cuts.
    """
    turns = [turn for turn in turns if 2 * turn["turn"] < args.max_turns]
    played = critic_batches(turns, [turn["answer"] for turn in turns], critic.device)["played"]
    q, v = turn_values(critic, played, args)  # (N, J)
    returns, number = played["return_to_go"], {}
    state_id = [number.setdefault(tuple(turn["state"]), len(number)) for turn in turns]
    better = same_state_advantages(returns, torch.tensor(state_id, device=critic.device))
    compared = ~better.isnan()
    error, goal = (x.var(correction=0) for x in (returns - v.amin(1), returns))
    return {"explained_variance": (1 - error / goal).item() if goal > 1e-4 else 0.0,
            "rank_correlation": rank_correlation(answer_advantages(q, v)[compared],
                                                 better[compared])}


# === 6. Update ===================================================================================
def critic_update(critic: TurnCritic, target: TurnCritic, optimizer: torch.optim.Optimizer,
                  batches: dict[str, dict[str, Tensor]], args: Args) -> dict[str, float]:
    """One optimizer step of the critic on drawn turns, and one step of its target."""
    played = batches["played"]
    played["row"] = torch.arange(len(played["tokens"]), device=critic.device)
    if args.value_target == "fresh":
        _, next_v = turn_values(target, batches["following"], args)  # (B, J)
        y = q_targets(played["reward"], played["done"], next_v, args.discount)
        u, _ = turn_values(target, batches["current"], args)  # (B, J), Eq. 2
    else:
        y = u = played["return_to_go"][:, None]
    sums = dict.fromkeys(("critic_loss", "q", "v"), torch.zeros(()))
    for rows in micro_batches(played, args.micro_batch_tokens):
        q, v = critic(rows)
        errors = squared_errors(q, y[rows["row"]]) + squared_errors(v, u[rows["row"]])  # (B,) Eq. 3
        parts = {"critic_loss": errors.sum(), "q": q.mean(1).sum(), "v": v.mean(1).sum()}
        parts = {name: x / args.critic_batch_turns for name, x in parts.items()}
        parts["critic_loss"].backward()
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(critic, optimizer, args.max_grad_norm)
    polyak_update(target, critic, args.target_rate)
    return over_processes(sums) | {"critic_grad_norm": norm}


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step on fresh answers and their batch["advantages"] (B,), centred here."""
    count, tokens = args.actor_batch_turns, all_reduce_sum((batch["turn_id"] >= 0).sum())
    mean = all_reduce_sum(batch["advantages"].sum()) / count
    batch["advantages"] = batch["advantages"] - mean
    sums = dict.fromkeys(("loss", "entropy", "advantage_square"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        loss = -actor_objective(logprobs, rows["advantages"], rows["turn_id"], count)
        loss.backward()
        parts = {"loss": loss, "entropy": entropy.sum() / tokens,
                 "advantage_square": (rows["advantages"] ** 2).sum() / count}
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"advantage_mean": mean.item(), "grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if not 0 < args.target_rate <= 1 or args.discount > 1:
        stop("--target-rate (not 0), --discount: shares, at most 1")
    with Run(args, "archer") as run:
        envs, policy = make_envs(args), load_policy(args, args.history_turns)
        if not hasattr(policy.model.base_model, "layers"):
            stop(f"--model {args.model}: its layers are not where ArCHer looks for its critic's")
        torch.manual_seed(args.seed)  # of the heads
        critic = TurnCritic(policy, args.num_critics)
        target = twin(critic)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate,
                                             weight_decay=0)
        buffer: list[dict] = []  # the oldest turn first

        for iteration in run.iterations(
                policy, optimizer=optimizer, critic=critic, critic_optimizer=critic_optimizer,
                target=target, buffer=buffer):
            # 1. collect num_prompts groups of group_size episodes for the buffer
            episodes = collect_groups(policy, envs, args, iteration)
            new = gather_list([turn for e in episodes for turn in transitions(policy, e, args)])
            quality = critic_quality(critic, new, args)  # it has not learned from them yet
            buffer += new
            del buffer[: -args.replay_turns]

            # 2. update of the critic, from turns just played and turns answered again
            rng, critic_updates, fresh = random_stream(args.seed, DRAW, iteration), [], []
            old = [buffer[i] for i in rng.integers(len(buffer), size=args.fresh_turns)]
            answers = [turn["answer"] for turn in new + old]
            if args.value_target == "fresh":
                fresh = fresh_answers(policy, [turn["state"] for turn in old], rng, args)
                answers[len(new) :] = gather_list([turn.token_ids for turn in fresh])
            batches = critic_batches(new + old, answers, policy.device)
            for _ in range(args.critic_steps):
                chosen = rng.integers(len(answers), size=args.critic_batch_turns)
                chosen = chosen[share(len(chosen))]
                drawn = {name: select_rows(rows, chosen) for name, rows in batches.items()}
                critic_updates.append(critic_update(critic, target, critic_optimizer, drawn, args))

            # 3. advantages (B,), 4. update of the policy
            updates, batch = [], None
            for _ in range(args.actor_steps if iteration >= args.actor_warm_up else 0):
                chosen = rng.integers(len(buffer), size=args.actor_batch_turns)
                states = [buffer[i]["state"] for i in chosen]
                fresh += (turns := fresh_answers(policy, states, rng, args))
                batch = answer_rows(turns, policy.device)
                batch["advantages"] = answer_advantages(*turn_values(critic, batch, args))
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            fresh_tokens = sum(gather_list([len(turn.token_ids) for turn in fresh]))
            run.totals["generated_tokens"] += fresh_tokens  # they cost what those of episodes do
            run.log(iteration, episodes, updates, batch, buffer_turns=len(buffer),
                    fresh_tokens=fresh_tokens, critic_steps=len(critic_updates), **quality,
                    **{name: np.mean([u[name] for u in critic_updates])
                       for name in critic_updates[0]})
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
