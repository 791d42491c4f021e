"""ArCHer: an utterance-level critic learned from a replay buffer, tokens trained by REINFORCE.

Paper: Zhou, Zanette, Pan, Levine and Kumar, "ArCHer: Training Language Model Agents via
Hierarchical Multi-Turn RL", arXiv 2402.19446v1, its abstract and first page; the rest from notes
and code: YifeiZhou02/ArCHer at 7c771a7, offline andreazanette/OfflineArcher at 56d3b72.

    Eq. 1  y_j = r + (1 - done) discount Vbar_j(s')                                       [code]
    Eq. 2  u_j = Qbar_j(s, a~)                  a~ a fresh answer of the current policy   [code]
    Eq. 3  critic loss = mean over turns of sum_j (Q_j(s, a) - y_j)^2 + (V_j(s) - u_j)^2  [code]
    Eq. 4  after every critic step: target <- (1 - tau) target + tau critic               [code]
    Eq. 5  A = min_j Q_j(s, a~) - min_j V_j(s)                                            [code]
    Eq. 6  J = mean over turns of A sum_t log pi(a~_t)                                    [code]
    Eq. 7  with --token-baseline: A - b_t for A, b_t fitted to A by squared error  [paper 5; code]
    Eq. 8  --value-target expectile: u_j = Qbar_j(s, a), error^2 times tau' or 1 - tau'   [code]
    Eq. 9  --actor-loss advantage_weighted: exp(beta A) instead of A, buffered answers    [code]
    Eq. 10 --actor-loss filtered_clone: 1 instead of A, answers of the best episodes      [code]

    s    the tokens before a turn    a  its answer; both from turns of all past policies, the buffer
    j    twin heads, last axis (J)   s' the tokens before the next turn
    bar  the target critic           tau, tau', beta  target_rate, expectile, inverse_temperature

To the critic a turn is one action: Q and V of whole utterances, learned by temporal differences
from turns of all past policies. The policy is trained on fresh answers to old states, never
off-policy; all tokens of an answer share its advantage.

Changed from seeupo.py
    - a buffer of turns, of which only the states matter to the policy
    - a critic of utterances and its slow copy, many critic steps per policy step
    - no ratios and no clipping: every answer is the current policy's own

Deviations and choices
    D1  A turn the time limit cut goes on in Eq. 1 (code: it ends): --no-bootstrap-truncated.
    D2  One causal pass over an episode gives V of its states, from their last tokens, and Q, from
        the mean over an answer's tokens too (code: state and answer are encoded apart). So a critic
        step takes all turns of whole episodes; V learns at one of them, where an answer is fresh.
    D3  The end-of-turn token is trained (code: it is cut away).
    D4  Each network is clipped to its own gradient norm (code: one norm for both).
    D5  The critic starts as a copy of the policy's first layers (code: a RoBERTa).
    D6  The mean of A over a policy step, noise of the critic, is taken off (code: it stays):
        --no-centre-advantages.

    python algos/archer.py        about 4 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode
from policies import load_policy
from run_folder import Run
from utils import (
    DRAW, Policy, RunArgs, all_reduce_sum, collect_groups, evaluate, gather_list, make_envs,
    micro_batches, optimizer_step, random_stream, rank, reason, sample_tokens, stop, token_logprobs,
    world_size,
)

ActorLoss = Literal["policy_gradient", "advantage_weighted", "filtered_clone"]


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
    actor_loss: ActorLoss = "policy_gradient"  # Eq. 6, 9 or 10; the last one needs no critic
    value_target: Literal["fresh", "expectile", "monte_carlo"] = "fresh"  # Eq. 2, 8, or returns
    discount: float = 0.95  # per turn, Eq. 1
    num_critics: int = 2  # heads J; 2 are the twins of Eq. 5
    critic_layers: int = 2  # layers of the policy that the critic is a copy of
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
    token_baseline: bool = False  # Eq. 7: a third network, its learning rate is the critic's
    expectile: float = 0.9  # tau' of Eq. 8
    inverse_temperature: float = 1.0  # beta of Eq. 9
    keep_quantile: float = 0.9  # Eq. 10: episodes whose return is this quantile or more
    offline: str | None = None  # run folder of this script, to train on its buffer and play nothing


# === 3. Advantages ===============================================================================
@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns.

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += gamma * returns[:, k + 1]
    return returns


@torch.no_grad()
def q_targets(rewards: Tensor, done: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """What Q should be, every head from its own V. Eq. 1

    rewards (..), done (..) bool, next_values (.., J) -> (.., J)
    """
    return rewards[..., None] + torch.where(done[..., None], 0.0, discount * next_values)


@torch.no_grad()
def utterance_advantages(q: Tensor, v: Tensor) -> Tensor:
    """How much better an answer is than the policy's average one, pessimistic in both. Eq. 5

    q, v (.., J) -> (..)
    """
    return q.amin(-1) - v.amin(-1)


@torch.no_grad()
def best_episodes(returns: Tensor, quantile: float) -> Tensor:
    """Which episodes have a return of at least that quantile of all. Eq. 10

    returns (E,) -> (E,) bool; all of them if all are equal
    """
    return returns >= returns.quantile(quantile)


# === 4. Loss =====================================================================================
def squared_errors(values: Tensor, targets: Tensor, expectile: float | None = None) -> Tensor:
    """The squared errors of a turn's values, summed over the heads. Eq. 3, 8

    values, targets (.., J) -> (..)
    """
    error = targets - values
    weight = 1.0 if expectile is None else torch.where(error > 0, expectile, 1 - expectile)
    return (weight * error**2).sum(-1)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, online: torch.nn.Module, rate: float):
    """Move every parameter of the target towards the online network, in place. Eq. 4"""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)


def actor_objective(logprobs: Tensor, credit: Tensor, turn_id: Tensor, weights: Tensor) -> Tensor:
    """J: the log-probability of every answer, times its credit. Eq. 6, 7, 9, 10

    logprobs, credit, turn_id (B, T), weights (B,) -> scalar; weights sum to 1 over the step, the
    sum over an answer's tokens is not divided by their number
    """
    return (weights[:, None] * torch.where(turn_id >= 0, credit * logprobs, 0.0)).sum()


def token_baseline_loss(baseline: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of the tokens' baselines from their answer's advantage. Eq. 7

    baseline, weights (B, T), advantages (B,) -> scalar; weights sum to 1 over the step
    """
    return (weights * (advantages[:, None] - baseline) ** 2).sum()


# === 5. Critics, the buffer and fresh answers ====================================================
class TurnCritic(torch.nn.Module):
    """A copy of the policy's first layers with J heads for Q and J for V."""

    def __init__(self, policy: Policy, num_critics: int, num_layers: int):
        super().__init__()
        self.trunk = copy.deepcopy(policy.model.base_model)
        self.trunk.layers = self.trunk.layers[:num_layers]
        self.device, self.bf16 = policy.device, policy.bf16

        def heads(width: int, hidden: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(torch.nn.Sequential(
                torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden),
                torch.nn.ReLU(), torch.nn.Linear(hidden, 1)) for _ in range(num_critics))

        size = policy.model.config.hidden_size
        self.q_heads, self.v_heads = heads(2 * size, size), heads(size, size)
        self.to(policy.device)

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, D), entry t from the tokens up to and including t."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.trunk(batch["tokens"], use_cache=False).last_hidden_state.float()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Q(s, a) and V(s) of every turn, each (B, K, J), from one causal pass."""
        hidden, starts = self.hidden(batch), batch["starts"]
        state = hidden.gather(1, (starts - 1)[:, :, None].expand(-1, -1, hidden.shape[2]))
        turn = torch.arange(starts.shape[1], device=self.device)
        inside = (batch["turn_id"][:, None] == turn[:, None]).float()  # (B, K, T)
        answer = inside @ hidden / inside.sum(2, keepdim=True).clamp(min=1)  # (B, K, D), its mean
        q = [head(torch.cat([state, answer], 2)) for head in self.q_heads]
        return torch.cat(q, 2), torch.cat([head(state) for head in self.v_heads], 2)

    def token_values(self, batch: dict[str, Tensor]) -> Tensor:
        """The first V (B, T) before every token of an answer; 0 elsewhere."""
        before = self.v_heads[0](self.hidden(batch)[:, :-1])[:, :, 0]  # (B, T - 1)
        values = torch.nn.functional.pad(before, (1, 0))
        return torch.where(batch["turn_id"] >= 0, values, 0.0)


@torch.no_grad()
def turn_values(critic: TurnCritic, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor]:
    """Q(s, a) and V(s) of any number of rows, without gradient: two (B, K, J)."""
    values = torch.zeros(2, *batch["starts"].shape, args.num_critics, device=critic.device)
    numbered = batch | {"row": torch.arange(len(batch["starts"]), device=critic.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[:, part["row"], : part["starts"].shape[1]] = torch.stack(critic(part))
    return values[0], values[1]


def rows_of(policy: Policy, episodes: list[Episode]) -> list[dict]:
    """Every episode as a row of tokens, with where its answers start and end. One that a time limit
    cut has another state at its end, and an empty answer."""
    rows = []
    for e in [e for e in episodes if e.turns]:
        turns = [(turn.prompt_ids, turn.token_ids, float(turn.reward)) for turn in e.turns]
        if not (e.terminated or e.overflowed):
            turns.append((policy.prompt(e, None)[0], [], 0.0))
        row = {"tokens": [], "starts": [], "ends": [], "rewards": [], "turns": len(e.turns)}
        for state, answer, reward in turns:
            row["starts"].append(len(row["tokens"]) + len(state))
            row["ends"].append(row["starts"][-1] + len(answer))
            row["rewards"].append(reward)
            row["tokens"] += state + answer
        rows.append(row)
    return rows


def one_turn(row: dict, k: int) -> dict:
    """A row of turn k alone: its state and its answer."""
    return {"tokens": row["tokens"][: row["ends"][k]], "starts": [row["starts"][k]],
            "ends": [row["ends"][k]], "rewards": [row["rewards"][k]], "turns": 1}


def pad_rows(rows: list[dict], args: Args, device: torch.device) -> dict[str, Tensor]:
    """A batch (B, T) with what is known of every turn (B, K); turn_id marks the answers."""
    tokens, starts, ends, rewards = (torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding)
        for name, padding in (("tokens", 0), ("starts", 1), ("ends", 0), ("rewards", 0.0)))
    turn, at = torch.arange(starts.shape[1]), torch.arange(tokens.shape[1])
    inside = (at >= starts[:, :, None]) & (at < ends[:, :, None])  # (B, K, T)
    played = ends > starts
    # the turn that ended the episode; -1: a time limit cut it, and one more state follows
    last = [row["turns"] - 1 if len(row["ends"]) == row["turns"] or not args.bootstrap_truncated
            else -1 for row in rows]
    batch = {"tokens": tokens, "turn_id": (inside * (turn + 1)[:, None]).sum(1) - 1,
             "lengths": torch.tensor([len(row["tokens"]) for row in rows]), "starts": starts,
             "played": played, "rewards": rewards, "done": turn == torch.tensor(last)[:, None],
             "returns": turn_returns(rewards, played, args.discount)}
    return {name: x.to(device) for name, x in batch.items()}


class ReplayBuffer(list):
    """The episodes of all past policies as rows, the oldest first; part of the checkpoint."""

    def push(self, rows: list[dict], capacity: int):
        """Append episodes, and drop the oldest ones whose turns are beyond the capacity."""
        self[:] = self + rows
        turns = np.cumsum([row["turns"] for row in reversed(self)])  # from the newest on
        self[:] = self[-max(1, int((turns <= capacity).sum())):]

    def state_dict(self) -> dict:
        return {"rows": list(self)}

    def load_state_dict(self, state: dict):
        self[:] = state["rows"]


def critic_quality(critic: TurnCritic, rows: list[dict], args: Args) -> dict[str, float]:
    """How V compares with the returns of episodes: its bias, and what it explains of them."""
    batch = pad_rows(rows, args, critic.device)
    values = turn_values(critic, batch, args)[1].mean(2)[batch["played"]]
    returns = batch["returns"][batch["played"]]
    unexplained = (returns - values).var() / returns.var().clamp(min=1e-8)
    return {"value_gap": (values - returns).mean().item(),
            "explained_variance": 1 - unexplained.item()}


def saved_buffer(run_folder: str, policy: Policy) -> dict:
    """The state of the buffer that a run left, if its tokens are those of this policy."""
    try:
        folder = Path(run_folder) / "checkpoint"
        saved = torch.load(folder / "trainer_state.pt", "cpu", weights_only=True)["buffer"]
        words = AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # torch and pickle each have their own
        stop(f"--offline {run_folder}: no checkpoint of this script ({reason(error)})")
    if words != policy.tokenizer.get_vocab():
        stop(f"--offline {run_folder} has other tokens: other --model, --env-id, --seed?")
    return saved


@torch.no_grad()
def fresh_answers(policy: Policy, turns: list[tuple[dict, int]], uniforms: Tensor,
                  args: Args) -> dict[str, Tensor]:
    """Answers of the policy as it is now to the states of turns; uniforms (N, max_turn_tokens)."""
    rows = [one_turn(row, k) | {"tokens": row["tokens"][: row["starts"][k]]} for row, k in turns]
    lengths = torch.tensor([len(row["tokens"]) for row in rows])
    for part in micro_batches({"lengths": lengths, "row": torch.arange(len(rows))},
                              args.micro_batch_tokens):
        here, number = [rows[i] for i in part["row"].tolist()], uniforms[part["row"]]
        decoder, unfed = policy.decoder(len(here), len(rows)), [row["tokens"] for row in here]
        for step in range(args.max_turn_tokens):
            tokens, _ = sample_tokens(decoder.feed(unfed), args.temperature, number[:, step])
            unfed = []
            for row, token in zip(here, tokens.tolist(), strict=True):
                ended = step > 0 and row["tokens"][-1] == policy.end_id
                row["tokens"] = row["tokens"] + [token] * (not ended)
                unfed.append([] if ended or token == policy.end_id else [token])
            if not any(unfed):
                break
    return pad_rows([row | {"ends": [len(row["tokens"])]} for row in rows], args, policy.device)


# === 6. Update ===================================================================================
def critic_update(critic: TurnCritic, target: TurnCritic, optimizer: torch.optim.Optimizer,
                  batch: dict[str, Tensor], fresh: dict[str, Tensor] | None,
                  args: Args) -> dict[str, float]:
    """One optimizer step of the critic on whole episodes, one step of its target. Eq. 1-4

    batch: episodes drawn by their turns batch["chosen"] (B,); fresh: answers to those states
    """
    played = batch["played"].float()  # (B, K)
    batch["weights"] = played / played.sum(1, keepdim=True) / args.critic_batch_turns
    q, v = turn_values(target, batch, args)  # (B, K, J)
    following = torch.nn.functional.pad(v[:, 1:], (0, 0, 0, 1))
    batch["q_target"] = q_targets(batch["rewards"], batch["done"], following, args.discount)
    batch["v_target"], batch["v_weights"] = q, batch["weights"]
    if args.value_target == "monte_carlo":
        batch["q_target"] = batch["v_target"] = batch["returns"][:, :, None].expand_as(q)
    if fresh is not None:  # V learns where the answer is fresh, Q at all turns of the episode
        here = torch.arange(q.shape[1], device=critic.device) == batch["chosen"][:, None]
        batch["v_weights"] = here / args.critic_batch_turns
        batch["v_target"] = turn_values(target, fresh, args)[0].expand_as(q)
    expectile = args.expectile if args.value_target == "expectile" else None
    sums = torch.zeros(4, device=critic.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        q, v = critic(rows)
        loss = (rows["weights"] * squared_errors(q, rows["q_target"])
                + rows["v_weights"] * squared_errors(v, rows["v_target"], expectile)).sum()
        loss.backward()
        parts = (q.mean(2), v.mean(2), q.amax(2) - q.amin(2))
        sums += torch.stack([loss, *((rows["weights"] * x).sum() for x in parts)]).detach()
    names = ("critic_loss", "q", "v", "q_disagreement")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    metrics["critic_grad_norm"] = optimizer_step(critic, optimizer, args.max_grad_norm)
    polyak_update(target, critic, args.target_rate)
    return metrics


def update(policy: Policy, baseline: TurnCritic | None, optimizer: torch.optim.Optimizer,
           baseline_optimizer: torch.optim.Optimizer | None, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step of the policy; batch["advantages"] (N,)"""
    tokens = all_reduce_sum((batch["turn_id"] >= 0).sum())
    mean = all_reduce_sum(batch["advantages"].sum()) / args.actor_batch_turns
    if args.centre_advantages and args.actor_loss == "policy_gradient":
        batch["advantages"] = batch["advantages"] - mean
    sums = torch.zeros(4, device=policy.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        advantages, mask = rows["advantages"], rows["turn_id"] >= 0
        credit = {"policy_gradient": advantages, "filtered_clone": torch.ones_like(advantages),
                  "advantage_weighted": (args.inverse_temperature * advantages).exp(),
                  }[args.actor_loss][:, None]  # (B, 1)
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        baseline_loss = torch.zeros((), device=policy.device)
        if baseline is not None:
            values = baseline.token_values(rows)  # (B, T)
            baseline_loss = token_baseline_loss(values, advantages, mask / tokens)
            baseline_loss.backward()
            credit = credit - values.detach()
        weights = torch.full_like(advantages, 1 / args.actor_batch_turns)
        loss = -actor_objective(logprobs, credit, rows["turn_id"], weights)
        loss.backward()
        parts = (loss, baseline_loss, entropy.sum() / tokens, weights @ advantages**2)
        sums += torch.stack([x.detach() for x in parts])
    names = ("loss", "baseline_loss", "entropy", "advantage_square")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    metrics["advantage_mean"] = mean.item()
    if baseline is not None:
        optimizer_step(baseline, baseline_optimizer, args.max_grad_norm)
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    cloning = args.actor_loss == "filtered_clone"
    if (not 0 < args.target_rate <= 1 or args.discount > 1 or args.expectile >= 1
            or args.keep_quantile > 1):
        stop("--target-rate (not 0), --discount, --expectile, --keep-quantile: shares, at most 1")
    if args.token_baseline and args.actor_loss != "policy_gradient":
        stop("--token-baseline needs --actor-loss policy_gradient")
    if args.critic_batch_turns % world_size() or args.actor_batch_turns % world_size():
        stop(f"--critic-batch-turns and --actor-batch-turns must be multiples of {world_size()}")
    with Run(args, "archer") as run:
        envs = make_envs(args, args.num_prompts * args.group_size // world_size())
        policy, buffer = load_policy(args), ReplayBuffer()
        if not hasattr(policy.model.base_model, "layers"):
            stop(f"--model {args.model}: its layers are not where ArCHer looks for its critic's")
        torch.manual_seed(args.seed)  # of the heads
        critic = TurnCritic(policy, args.num_critics, args.critic_layers)
        target, baseline, baseline_optimizer = copy.deepcopy(critic), None, None

        def adam(network: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(network.parameters(), rate, weight_decay=0)

        optimizer = adam(policy.model, args.learning_rate)
        critic_optimizer = adam(critic, args.critic_learning_rate)
        state = {"optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer,
                 "target": target, "buffer": buffer}
        if args.token_baseline:
            baseline = TurnCritic(policy, 1, args.critic_layers)
            baseline_optimizer = adam(baseline, args.critic_learning_rate)
            state |= {"baseline": baseline, "baseline_optimizer": baseline_optimizer}
        if args.offline is not None:
            buffer.load_state_dict(saved_buffer(args.offline, policy))
        run.restore(policy, **state)
        warm_up = args.actor_warm_up
        if warm_up is None:  # what the critic needs to know the start of an episode
            warm_up = 0 if cloning else math.ceil(
                2 * args.max_turns / (args.target_rate * args.critic_steps))

        def evaluation():
            return evaluate(policy, run.eval_envs, args)

        def draw(turns: list, count: int, *key: int) -> tuple[list, Tensor]:
            """This process's share of some turns, and random numbers for new answers."""
            rng, mine = random_stream(args.seed, DRAW, *key), slice(rank(), None, world_size())
            drawn = [turns[i] for i in rng.integers(len(turns), size=count)[mine]]
            return drawn, torch.tensor(rng.random((count, args.max_turn_tokens))[mine])

        for iteration in run.iterations(policy, evaluation, **state):
            # 1. collect num_prompts groups of group_size episodes for the buffer
            episodes = []
            if args.offline is None:
                episodes = collect_groups(policy, envs, args, iteration)
            buffer.push(gather_list(rows_of(policy, episodes)), args.replay_turns)
            turns = [(row, k) for row in buffer for k in range(row["turns"])]
            updates, actor_updates, fresh_tokens = [], [], 0

            # 2. critic
            metrics = {} if cloning else critic_quality(
                critic, buffer[-args.num_prompts * args.group_size:], args)
            for step in range(0 if cloning else args.critic_steps):
                drawn, uniforms = draw(turns, args.critic_batch_turns, iteration, 1 + step)
                batch, fresh = pad_rows([row for row, _ in drawn], args, policy.device), None
                batch["chosen"] = torch.tensor([k for _, k in drawn], device=policy.device)
                if args.value_target == "fresh":
                    fresh = fresh_answers(policy, drawn, uniforms, args)
                    fresh_tokens += (fresh["turn_id"] >= 0).sum().item()
                updates.append(critic_update(critic, target, critic_optimizer, batch, fresh, args))

            # 3. advantages (N,), 4. update of the policy
            if cloning:
                returns = torch.tensor([sum(row["rewards"]) for row in buffer])
                kept = best_episodes(returns, args.keep_quantile).tolist()
                turns = [(row, k) for row, keep in zip(buffer, kept, strict=True) if keep
                         for k in range(row["turns"])]
            for step in range(args.actor_steps if iteration >= warm_up else 0):
                drawn, uniforms = draw(turns, args.actor_batch_turns, iteration,
                                       1 + args.critic_steps + step)
                batch = pad_rows([one_turn(*turn) for turn in drawn], args, policy.device)
                if args.actor_loss == "policy_gradient":
                    batch = fresh_answers(policy, drawn, uniforms, args)
                    fresh_tokens += (batch["turn_id"] >= 0).sum().item()
                batch["advantages"] = torch.zeros(len(drawn), device=policy.device)
                if not cloning:
                    q, v = turn_values(critic, batch, args)
                    batch["advantages"] = utterance_advantages(q, v)[:, 0]
                actor_updates.append(update(policy, baseline, optimizer, baseline_optimizer, batch,
                                            args))

            # 5. log (evaluation and checkpoints: run.iterations)
            fresh_tokens = all_reduce_sum(torch.tensor(fresh_tokens)).item()
            run.totals["generated_tokens"] += fresh_tokens  # they cost what those of episodes do
            buffer_turns = sum(row["turns"] for row in buffer)
            metrics |= {"buffer_turns": buffer_turns, "trained_share": len(turns) / buffer_turns,
                        "fresh_tokens": fresh_tokens, "critic_steps": len(updates)}
            if updates:
                metrics |= {name: np.mean([u[name] for u in updates]) for name in updates[0]}
            run.log(iteration, episodes, metrics, actor_updates, batch if actor_updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
