"""ArCHer: a critic of whole turns learned from a replay buffer, tokens trained by REINFORCE.

Paper: Zhou, Zanette, Pan, Levine and Kumar, "ArCHer: Training Language Model Agents via
Hierarchical Multi-Turn RL", arXiv 2402.19446v1, its abstract and first page; the rest from notes
and code: YifeiZhou02/ArCHer at 7c771a7.

    Eq. 1  y_j = r + (1 - done) discount Vbar_j(s')                                       [code]
    Eq. 2  u_j = Qbar_j(s, a~)                  a~ a fresh answer of the current policy   [code]
    Eq. 3  critic loss = mean over turns of sum_j (Q_j(s, a) - y_j)^2 + (V_j(s) - u_j)^2  [code]
    Eq. 4  after every critic step: target <- (1 - tau) target + tau critic               [code]
    Eq. 5  A = min_j Q_j(s, a~) - min_j V_j(s)                                            [code]
    Eq. 6  J = mean over turns of A sum_t log pi(a~_t)                                    [code]

    s    the tokens before a turn    a  its answer; both from turns of all past policies, the buffer
    j    twin heads, last axis (J)   s' the tokens before the next turn
    bar  the target critic           tau  target_rate

To the critic a turn is one action: Q and V of whole answers, learned by temporal differences from
turns of all past policies. The policy is trained on fresh answers to old states, never off-policy;
all tokens of an answer share its advantage.

Changed from seeupo.py
    - a buffer of turns, of which only the states matter to the policy
    - a critic of answers and its slow copy, many critic steps per policy step
    - no ratios and no clipping: every answer is the current policy's own

Deviations and choices
    D1  A turn the time limit cut goes on in Eq. 1 (code: it ends): --no-bootstrap-truncated.
    D2  One causal pass over an episode gives V of its states, from their last tokens, and Q, from
        the mean over an answer's tokens too (code: state and answer are encoded apart). So a critic
        step takes all turns of whole episodes; V learns at one of them, where an answer is fresh.
    D3  The end-of-turn token is trained (code: it is cut away).
    D4  Each network is clipped to its own gradient norm (code: one norm for both).
    D5  The critic starts as a copy of the policy's first two layers (code: a RoBERTa).
    D6  The mean of A over a policy step, noise of the critic, is taken off (code: it stays):
        --no-centre-advantages.

    python algos/archer.py        about 4 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads sleep, they do not spin
import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from policies import Policy, load_policy
from run_folder import Run
from utils import (
    DRAW, Decoder, RunArgs, all_reduce_sum, collect_groups, gather_list, make_envs, micro_batches,
    optimizer_step, over_processes, random_stream, rank, sample_answers, stop, token_logprobs,
    world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/TwentyQuestions-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 64  # environment seeds per iteration
    group_size: int = 1  # episodes that start from the same seed (none are compared here)
    max_turns: int = 20  # turns after which an episode is truncated, K
    max_turn_tokens: int = 12  # tokens the policy may sample in one turn
    learning_rate: float = 5e-5  # of AdamW, constant
    num_iterations: int = 20  # iterations of: collect episodes, update
    warm_start_steps: int = 150  # behaviour cloning steps of the tiny model before training
    warm_start_learning_rate: float = 2e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.1  # standard deviation of the tiny model's first weights
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    value_target: Literal["fresh", "monte_carlo"] = "fresh"  # Eq. 1 and 2, or returns (a control)
    discount: float = 0.95  # per turn, Eq. 1
    num_critics: int = 2  # heads J; 2 are the twins of Eq. 5
    target_rate: float = 0.5  # tau of Eq. 4
    critic_learning_rate: float = 1e-3  # of the critic's AdamW
    critic_steps: int = 10  # optimizer steps of the critic per iteration
    critic_batch_turns: int = 32  # turns per critic step; Q learns at all turns of their episodes
    actor_steps: int = 3  # optimizer steps of the policy per iteration
    actor_batch_turns: int = 128  # turns per policy step
    actor_warm_up: int | None = None  # iterations before the first; default: 2 K / tau critic steps
    replay_turns: int = 100000  # size of the buffer, the oldest turns are dropped
    bootstrap_truncated: bool = True  # a time limit does not end the return of Eq. 1
    centre_advantages: bool = True  # take their mean over the policy step off, D6
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"actor_warm_up"}


CRITIC_LAYERS = 2  # D5


# === 3. Advantages ===============================================================================
@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns.

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += discount * returns[:, k + 1]
    return returns


@torch.no_grad()
def q_targets(rewards: Tensor, done: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """What Q should be, every head from its own V. Eq. 1

    rewards (..), done (..) bool, next_values (.., J) -> (.., J)
    """
    return rewards[..., None] + torch.where(done[..., None], 0.0, discount * next_values)


@torch.no_grad()
def answer_advantages(q: Tensor, v: Tensor) -> Tensor:
    """How much better an answer is than the policy's average one, pessimistic in both. Eq. 5

    q, v (.., J) -> (..)
    """
    return q.amin(-1) - v.amin(-1)


# === 4. Loss =====================================================================================
def squared_errors(values: Tensor, targets: Tensor) -> Tensor:
    """The squared errors of a turn's values, summed over the heads. Eq. 3; (.., J) -> (..)"""
    return ((targets - values) ** 2).sum(-1)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, online: torch.nn.Module, rate: float):
    """Move every parameter of the target towards the online network, in place. Eq. 4"""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)


def actor_objective(logprobs: Tensor, advantages: Tensor, turn_id: Tensor,
                    num_turns: int) -> Tensor:
    """J: the log-probability of every answer, times its advantage. Eq. 6

    logprobs, turn_id (B, T), advantages (B,), num_turns of the whole step -> scalar; the sum over
    an answer's tokens is not divided by their number
    """
    weights = torch.full_like(advantages, 1 / num_turns)
    return (weights[:, None] * torch.where(turn_id >= 0, advantages[:, None] * logprobs, 0.0)).sum()


# === 5. The critic, the buffer and fresh answers =================================================
class TurnCritic(torch.nn.Module):
    """A copy of the policy's first layers with J heads for Q and J for V."""

    def __init__(self, policy: Policy, num_critics: int):
        super().__init__()
        self.trunk = copy.deepcopy(policy.model.base_model)
        self.trunk.layers = self.trunk.layers[:CRITIC_LAYERS]
        self.device, self.bf16 = policy.device, policy.bf16

        def heads(width: int, hidden: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(torch.nn.Sequential(
                torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden),
                torch.nn.ReLU(), torch.nn.Linear(hidden, 1)) for _ in range(num_critics))

        size = policy.model.config.hidden_size
        self.q_heads, self.v_heads = heads(2 * size, size), heads(size, size)
        self.to(policy.device)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Q(s, a) and V(s) of every turn, each (B, K, J), from one causal pass."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk(batch["tokens"], use_cache=False).last_hidden_state.float()
        before = (batch["starts"] - 1).clamp(min=0)  # (B, K) the last token of every state
        state = hidden.gather(1, before[:, :, None].expand(-1, -1, hidden.shape[2]))  # (B, K, D)
        turn = torch.arange(before.shape[1], device=self.device)
        inside = (batch["turn_id"][:, None] == turn[:, None]).float()  # (B, K, T)
        answer = inside @ hidden / inside.sum(2, keepdim=True).clamp(min=1)  # (B, K, D), its mean
        q = [head(torch.cat([state, answer], 2)) for head in self.q_heads]
        return torch.cat(q, 2), torch.cat([head(state) for head in self.v_heads], 2)


@torch.no_grad()
def turn_values(critic: TurnCritic, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor]:
    """Q(s, a) and V(s) of any number of rows, without gradient: two (B, K, J)."""
    values = torch.zeros(2, *batch["starts"].shape, args.num_critics, device=critic.device)
    numbered = batch | {"row": torch.arange(len(batch["starts"]), device=critic.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[:, part["row"], : part["starts"].shape[1]] = torch.stack(critic(part))
    return values[0], values[1]


@dataclasses.dataclass
class Trajectory:
    """An episode as the critic reads it.

    Turn k answers the state tokens[: starts[k]] with tokens[starts[k] : ends[k]] and earns
    rewards[k]. An episode that a time limit cut has one more state at its end, with an empty
    answer: what Eq. 1 bootstraps from.
    """

    tokens: list[int]
    starts: list[int]
    ends: list[int]
    rewards: list[float]

    @property
    def num_turns(self) -> int:
        return sum(end > start for start, end in zip(self.starts, self.ends, strict=True))

    def turn(self, k: int) -> "Trajectory":
        """Its turn k alone."""
        return Trajectory(self.tokens[: self.ends[k]], [self.starts[k]], [self.ends[k]],
                          [self.rewards[k]])


def trajectory(policy: Policy, episode: Episode, args: Args) -> Trajectory:
    turns = [(turn.prompt_ids, turn.token_ids, turn.reward) for turn in episode.turns]
    if args.bootstrap_truncated and not (episode.terminated or episode.overflowed):
        turns.append((policy.prompt(episode)[0], [], 0.0))
    row = Trajectory([], [], [], [])
    for state, answer, reward in turns:
        row.tokens += state + answer
        row.starts.append(len(row.tokens) - len(answer))
        row.ends.append(len(row.tokens))
        row.rewards.append(reward)
    return row


def collate_turns(rows: list[Trajectory], args: Args, device: torch.device) -> dict[str, Tensor]:
    """A batch (B, T) with what is known of every turn (B, K); turn_id marks the answers."""
    tokens, starts, ends, rewards = (
        pad_sequence([torch.tensor(getattr(row, name)) for row in rows], batch_first=True)
        for name in ("tokens", "starts", "ends", "rewards"))
    played = ends > starts
    goes_on = torch.nn.functional.pad(starts[:, 1:] > 0, (0, 1))  # another state follows the turn
    turn, at = torch.arange(starts.shape[1]), torch.arange(tokens.shape[1])
    inside = (at >= starts[:, :, None]) & (at < ends[:, :, None])  # (B, K, T)
    batch = {"tokens": tokens, "turn_id": (inside * (turn + 1)[:, None]).sum(1) - 1,
             "lengths": torch.tensor([len(row.tokens) for row in rows]), "starts": starts,
             "played": played, "rewards": rewards, "done": played & ~goes_on,
             "returns": turn_returns(rewards, played, args.discount)}
    return {name: x.to(device) for name, x in batch.items()}


def fresh_answers(policy: Policy, turns: list[Trajectory], uniforms: Tensor,
                  args: Args) -> dict[str, Tensor]:
    """Answers of the policy as it is now to the states of turns; uniforms (N, max_turn_tokens)."""
    rows, answers = [turn.tokens[: turn.starts[0]] for turn in turns], [Turn("", "") for _ in turns]
    lengths = torch.tensor([len(row) for row in rows])
    for part in micro_batches({"lengths": lengths, "row": torch.arange(len(rows))},
                              args.micro_batch_tokens):
        here = part["row"].tolist()
        sample_answers(Decoder(policy, len(here)), [rows[i] for i in here],
                       [answers[i] for i in here], [args.max_turn_tokens] * len(here),
                       uniforms[here], args.temperature)
    answered = [Trajectory(row, turn.starts, [len(row)], turn.rewards)
                for row, turn in zip(rows, turns, strict=True)]
    return collate_turns(answered, args, policy.device)


# === 6. Update ===================================================================================
def critic_update(critic: TurnCritic, target: TurnCritic, optimizer: torch.optim.Optimizer,
                  batch: dict[str, Tensor], fresh: dict[str, Tensor],
                  args: Args) -> dict[str, float]:
    """One optimizer step of the critic on whole episodes, one step of its target. Eq. 1-4

    batch: episodes drawn by their turns batch["chosen"] (B,); fresh: answers to those states
    """
    played = batch["played"].float()  # (B, K)
    batch["weights"] = played / played.sum(1, keepdim=True) / args.critic_batch_turns
    if args.value_target == "fresh":  # V learns where the answer is fresh, Q at all turns
        _, v = turn_values(target, batch, args)  # (B, K, J)
        following = torch.nn.functional.pad(v[:, 1:], (0, 0, 0, 1))
        batch["q_target"] = q_targets(batch["rewards"], batch["done"], following, args.discount)
        batch["v_target"] = turn_values(target, fresh, args)[0].expand_as(v)
        here = torch.arange(v.shape[1], device=critic.device) == batch["chosen"][:, None]
        batch["v_weights"] = here / args.critic_batch_turns
    else:
        batch["q_target"] = batch["returns"][:, :, None].expand(-1, -1, args.num_critics)
        batch["v_target"], batch["v_weights"] = batch["q_target"], batch["weights"]
    sums = dict.fromkeys(("critic_loss", "q", "v"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        q, v = critic(rows)
        loss = (rows["weights"] * squared_errors(q, rows["q_target"])
                + rows["v_weights"] * squared_errors(v, rows["v_target"])).sum()
        loss.backward()
        parts = {"critic_loss": loss, "q": (rows["weights"] * q.mean(2)).sum(),
                 "v": (rows["weights"] * v.mean(2)).sum()}
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(critic, optimizer, args.max_grad_norm)
    polyak_update(target, critic, args.target_rate)
    return over_processes(sums) | {"critic_grad_norm": norm}


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step of the policy; batch["advantages"] (N,)"""
    tokens = all_reduce_sum((batch["turn_id"] >= 0).sum())
    mean = all_reduce_sum(batch["advantages"].sum()) / args.actor_batch_turns
    if args.centre_advantages:
        batch["advantages"] = batch["advantages"] - mean
    sums = dict.fromkeys(("loss", "entropy", "advantage_square"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        loss = -actor_objective(logprobs, rows["advantages"], rows["turn_id"],
                                args.actor_batch_turns)
        loss.backward()
        parts = {"loss": loss, "entropy": entropy.sum() / tokens,
                 "advantage_square": (rows["advantages"] ** 2).sum() / args.actor_batch_turns}
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"advantage_mean": mean.item(), "grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if not 0 < args.target_rate <= 1 or args.discount > 1:
        stop("--target-rate (not 0), --discount: shares, at most 1")
    if args.critic_batch_turns % world_size() or args.actor_batch_turns % world_size():
        stop(f"--critic-batch-turns and --actor-batch-turns must be multiples of {world_size()}")
    with Run(args, "archer") as run:
        envs, policy = make_envs(args), load_policy(args)
        if not hasattr(policy.model.base_model, "layers"):
            stop(f"--model {args.model}: its layers are not where ArCHer looks for its critic's")
        torch.manual_seed(args.seed)  # of the heads
        critic = TurnCritic(policy, args.num_critics)
        target = copy.deepcopy(critic)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate,
                                             weight_decay=0)
        buffer: list[dict] = []  # trajectories of all past policies, the oldest first
        warm_up = args.actor_warm_up
        if warm_up is None:  # what the critic needs to know the start of an episode
            warm_up = math.ceil(2 * args.max_turns / (args.target_rate * args.critic_steps))

        def draw(turns: list, count: int, *key: int) -> tuple[list, Tensor]:
            """This process's share of some turns, and random numbers for new answers."""
            rng, mine = random_stream(args.seed, DRAW, *key), slice(rank(), None, world_size())
            drawn = [turns[i] for i in rng.integers(len(turns), size=count)[mine]]
            return drawn, torch.tensor(rng.random((count, args.max_turn_tokens))[mine])

        for iteration in run.iterations(
                policy, optimizer=optimizer, critic=critic, critic_optimizer=critic_optimizer,
                target=target, buffer=buffer):
            # 1. collect num_prompts groups of group_size episodes for the buffer
            episodes = collect_groups(policy, envs, args, iteration)
            buffer += gather_list([vars(trajectory(policy, e, args)) for e in episodes if e.turns])
            rows = [Trajectory(**row) for row in buffer]
            turns = [(row, k) for row in rows for k in range(row.num_turns)]
            while len(turns) > args.replay_turns and len(rows) > 1:
                turns = turns[rows.pop(0).num_turns:]
                del buffer[0]

            # 2. update of the critic
            critic_updates, fresh_tokens = [], 0
            for step in range(args.critic_steps):
                drawn, uniforms = draw(turns, args.critic_batch_turns, iteration, 1 + step)
                batch = collate_turns([row for row, _ in drawn], args, policy.device)
                batch["chosen"] = torch.tensor([k for _, k in drawn], device=policy.device)
                fresh = {}
                if args.value_target == "fresh":
                    fresh = fresh_answers(policy, [row.turn(k) for row, k in drawn], uniforms, args)
                    fresh_tokens += (fresh["turn_id"] >= 0).sum().item()
                critic_updates.append(critic_update(critic, target, critic_optimizer, batch, fresh,
                                                    args))

            # 3. advantages (N,), 4. update of the policy
            updates, batch = [], None
            for step in range(args.actor_steps if iteration >= warm_up else 0):
                drawn, uniforms = draw(turns, args.actor_batch_turns, iteration,
                                       1 + args.critic_steps + step)
                batch = fresh_answers(policy, [row.turn(k) for row, k in drawn], uniforms, args)
                fresh_tokens += (batch["turn_id"] >= 0).sum().item()
                batch["advantages"] = answer_advantages(*turn_values(critic, batch, args))[:, 0]
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            fresh_tokens = all_reduce_sum(torch.tensor(fresh_tokens)).item()
            run.totals["generated_tokens"] += fresh_tokens  # they cost what those of episodes do
            run.log(iteration, episodes, updates, batch, buffer_turns=len(turns),
                    fresh_tokens=fresh_tokens, critic_steps=len(critic_updates),
                    **{name: np.mean([u[name] for u in critic_updates])
                       for name in critic_updates[0]})
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
