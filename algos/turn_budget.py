"""Turn budget: how much may an agent think in one turn, when its context is short?

A hypothesis from the literature; no paper we know of tests a cap on the thought of a single turn.
The parts: ASearcher (arXiv 2508.07976, bounded generation), SFR-DeepResearch (2509.06283, dropped
thoughts), s1 (2501.19393, thoughts closed early), More with Less (2510.16786v2, turn limits).

An answer is a thought, a mark that ends the thought, and an action. When a thought has used up its
allowance, the script appends the mark; the policy then goes on with the action.

    Eq. 1  b_k = max(0, min(limit, C - used - reserve))               allowance of turn k, in tokens
           limit = thought_cap (--cap turn), or K thought_cap - thoughts so far (--cap episode)
    Eq. 2  a thought that is open after b_k tokens is closed; appended tokens are not trained
    Eq. 3  fixed limit   = floor(75th percentile of the turns of unrestricted episodes)
           dynamic limit = floor(50th percentile); when it is hit, extended once to the 75th
    Eq. 4  A_k = (R - mean_group R) / (std_group R + 1e-6)    R = sum_k (r_k - p [thought > cap])
    Eq. 5  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + c entropy

    C  context_limit     used  tokens in the context     reserve  tokens of the mark and an action
    w_t  ratio           K  max_turns                    k, t  turn, token    p  overrun_penalty

Changed from ms_grpo.py
    - thoughts; a short context: an episode is truncated when its next turn does not fit
    - every episode is trained on; the update is plain GRPO

Choices
    C1  --cap none: a thought may fill the context; this ends the episode, without an action.
    C2  --drop-thoughts hides the thoughts of earlier turns: every turn becomes a row of its own.
    C3  Turn limits come from a pilot's episodes; the warm start imitates first limits of any size.

    python algos/turn_budget.py        about 1 minute on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn, attribute
from policies import Policy, load_policy, parse_args
from rollouts import collect_groups, evaluate, groups_without_signal, make_envs
from run_folder import Run
from utils import (
    RunArgs, all_reduce_sum, collate, gather_list, micro_batches, minibatches, optimizer_step,
    over_processes, stop, token_logprobs, turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ThinkSearch-v0"  # an environment in which a turn may hold a thought
    max_turns: int = 4  # turns after which an episode is truncated, K
    max_turn_tokens: int = 4  # tokens of the action that follows a thought
    num_iterations: int = 40  # iterations of: collect episodes, update
    tiny_steps: ClassVar[int] = 200  # of the warm start, where the tiny model is trained

    # Algorithm specific arguments
    cap: Literal["none", "episode", "turn"] = "turn"  # on each thought, or on their sum, Eq. 1
    thought_cap: int = 8  # tokens sampled for a thought; --cap episode: K times this for all
    context_limit: int = 112  # tokens of the whole context, C in Eq. 1
    overrun_penalty: float = 0.0  # for a thought longer than thought_cap, or closed there, Eq. 4
    drop_thoughts: bool = False  # show earlier turns without their thoughts
    turn_limit: Literal["none", "fixed", "dynamic"] = "none"  # from percentiles of a pilot, Eq. 3
    reminder: bool = False  # every observation ends with the number of turns left
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 5
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 5
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 5
    num_minibatches: int = 2  # optimizer steps per iteration
    chat_defaults: ClassVar = RunArgs.chat_defaults | {"thought_cap": 64, "context_limit": 2000}


# === 3. Advantages ===============================================================================
@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, correction: int = 1) -> Tensor:
    """Scores relative to the mean of their group, in units of its std. Eq. 4

    scores (N,), group_id (N,) -> (N,); 0 in a group of one or of scores within 1e-6 (1 + |max|)

    >>> group_relative_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660])
    """
    advantages = torch.zeros_like(scores)
    for group in group_id.unique():
        members = group_id == group
        values = scores[members]
        if not torch.allclose(values, values.max(), 1e-6, 1e-6):  # sums of floats are rounded
            std = values.std(correction=correction)
            advantages[members] = (values - values.mean()) / (std + 1e-6)
    return advantages


# === 4. Loss =====================================================================================
def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float, entropy_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 5, and weighted means for the log.

    logprobs, entropy (B, T); batch: old_logprobs, advantages, weights (B, T), which sum to 1

    >>> one = torch.ones(1, 1)  # a token that became 1.5 times as likely counts as 1.2 times
    >>> batch = {"old_logprobs": 0 * one, "advantages": one, "weights": one}
    >>> policy_loss(batch, torch.tensor([[1.5]]).log(), 0 * one, 0.2, 0.2, 0.0)[0]
    tensor(-1.2000)
    """
    advantages, weights = batch["advantages"], batch["weights"]  # (B, T)
    log_ratio = logprobs - batch["old_logprobs"]
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    objective = objective + entropy_coefficient * entropy
    with torch.no_grad():
        binding = clipped * advantages < ratio * advantages  # where clipping stops the gradient
        parts = {"loss": -objective, "entropy": entropy, "clip_fraction": binding,
                 "approx_kl": log_ratio.exp() - 1 - log_ratio}  # KL(old || new), k3 from old
    return -(weights * objective).sum(), {name: (weights * x).sum() for name, x in parts.items()}


# === 5. The budget ===============================================================================
def thought_allowance(args: Args, thoughts: int, room: int) -> int | None:
    """How many tokens the next thought may have, its mark included; None: any number. Eq. 1

    thoughts: tokens of the episode's thoughts so far; room: C - used - reserve

    >>> [thought_allowance(Args(cap=cap), 21, room=30) for cap in ("none", "episode", "turn")]
    [None, 11, 8]
    """
    if args.cap == "none":
        return None
    pot = args.max_turns * args.thought_cap - thoughts  # in the example 4 * 8 - 21
    return max(0, min(args.thought_cap if args.cap == "turn" else pot, room))


def thought_end(token_ids: list[int], mark: list[int]) -> int:
    """How many tokens of an answer are its thought, the mark included; all if there is no mark."""
    for end in range(len(mark), len(token_ids) + 1):
        if token_ids[end - len(mark) : end] == mark:
            return end
    return len(token_ids)


def forced_tokens(token_ids: list[int], allowance: int | None, action_cap: int, mark: list[int],
                  end_ids: list[int]) -> list[int]:
    """The tokens to append to an unfinished answer, often none. Eq. 2

    The mark follows an open thought of `allowance` tokens, the end an action of action_cap tokens.

    >>> [forced_tokens(ids, 3, 2, [90], [1]) for ids in ([5, 6, 7], [5, 6, 90], [5, 90, 8, 9])]
    [[90], [], [1]]
    """
    end = thought_end(token_ids, mark)
    if token_ids and token_ids[-1] in end_ids:
        return []
    if token_ids[end - len(mark) : end] == mark:
        return end_ids[:1] if len(token_ids) - end >= action_cap else []
    return list(mark) if allowance is not None and end >= allowance else []


class BudgetPolicy(Policy):
    """A policy whose thoughts have an allowance and may be dropped from later contexts."""

    def set_budget(self, args: Args, mark: str):
        self.args, self.mark = args, self.tokens_of(mark)
        self.context_length = min(self.context_length, args.context_limit)
        self.history_turns = args.max_turns if args.drop_thoughts else None
        self.reserve = len(self.mark) + args.max_turn_tokens

    def allowance(self, episode: Episode, used: int) -> int | None:
        """The allowance of the next thought, after `used` tokens of context. Eq. 1"""
        thoughts = sum(self.thought_length(turn) for turn in episode.turns)
        return thought_allowance(self.args, thoughts, self.context_length - used - self.reserve)

    def turn_cap(self, episode: Episode, used: int) -> int:
        allowance = self.allowance(episode, used)
        if allowance is not None:
            return allowance + self.reserve
        full = len(episode.row()) >= self.context_length  # C1, even if the thought is dropped now
        return 0 if full else self.context_length - used

    def force(self, episode: Episode, used: int, token_ids: list[int]) -> list[int]:
        forced = forced_tokens(token_ids, self.allowance(episode, used), self.max_turn_tokens,
                               self.mark, self.end_ids)
        room = self.turn_cap(episode, used) - len(token_ids)
        return forced if len(forced) <= room else []  # without room the turn is over anyway

    def remember(self, turn: Turn) -> list[int]:
        """The action, with --drop-thoughts; only the end of the turn if there is no action."""
        action = turn.token_ids[thought_end(turn.token_ids, self.mark) :]
        return action or [end for end in turn.token_ids[-1:] if end in self.end_ids]

    def reward(self, turn: Turn) -> float:
        """A turn's reward, less the penalty of a thought that is, with its mark, too long. Eq. 4"""
        overrun = thought_end(turn.token_ids, self.mark) > self.args.thought_cap
        return turn.reward - self.args.overrun_penalty * overrun

    def thought_length(self, turn: Turn) -> int:
        """How many tokens of a thought were sampled; an appended mark does not count."""
        end = thought_end(turn.token_ids, self.mark)
        return end - sum(position < end for position in turn.forced)


def turn_limits(turn_counts: list[int], args: Args) -> tuple[int, int]:
    """The turn limit when an episode starts, and the limit after an extension. Eq. 3

    turn_counts: the turns of every unrestricted episode, at least 1 each

    >>> turn_limits([2, 3, 4, 8, 9], Args(turn_limit="dynamic"))
    (4, 8)
    """
    start, end = np.percentile(turn_counts, [50, 75]).astype(int).tolist()
    return (start, end) if args.turn_limit == "dynamic" else (end, end)


class TurnLimit(gym.Wrapper):
    """Truncates an episode at its limit, extends the limit once, and says the turns left."""

    def __init__(self, env: gym.Env, limits: tuple[int, int], reminder: bool):
        super().__init__(env)
        self.limits, self.reminder = limits, reminder  # the first (0: drawn) and the extended one

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.turn, self.limit = 0, self.limits[0] or self.np_random.integers(1, self.limits[1] + 1)
        return self.remind(observation), info

    def step(self, action: str):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.turn += 1
        if self.turn >= self.limit:  # the extension comes only now
            self.limit = self.limits[1]
        truncated = truncated or self.turn >= self.limit
        return self.remind(observation), reward, terminated, truncated, info

    def remind(self, observation: str) -> str:
        return f"{observation} left {self.limit - self.turn}" if self.reminder else observation


def budget_metrics(policy: BudgetPolicy, episodes: list[Episode]) -> dict[str, float]:
    """How the budget was used: means over the turns, or episodes, of all processes."""
    turns, rows = [], []
    for e in episodes:
        thoughts = [policy.thought_length(turn) for turn in e.turns]
        turns += [(thought, thought < thought_end(turn.token_ids, policy.mark))
                  for thought, turn in zip(thoughts, e.turns, strict=True)]
        shown = thoughts[-1:] if policy.args.drop_thoughts else thoughts
        rows.append((e.success, sum(turn.num_sampled for turn in e.turns),
                     len(e.turns) * (len(e.turns) + 1) / 2, sum(shown) / max(len(e.row()), 1),
                     e.info.get("right_hops", 0) / e.info.get("hops", 1)))
    turns, rows = gather_list(turns) or [(0, 0)], gather_list(rows)
    thought, closed = np.mean(turns, axis=0)
    success, tokens, history, share, done = np.mean(rows, axis=0)
    return {"thought_tokens": thought, "forced_closes": closed, "rounds_completed": done,
            "thought_share": share, "history_cost": history,
            "tokens_per_success": tokens / max(success, 1 / len(rows))}


# === 6. Update ===================================================================================
def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    mask = batch["turn_id"] >= 0
    batch["weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)  # mean over sampled tokens
    sums = dict.fromkeys(("loss", "entropy", "clip_fraction", "approx_kl"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        loss, parts = policy_loss(rows, logprobs, entropy, args.clip_low, args.clip_high,
                                  args.entropy_coefficient)
        loss.backward()
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    with Run(args, "turn_budget") as run:
        full = (args.max_turns, args.max_turns)
        envs = [TurnLimit(env, full, args.reminder) for env in make_envs(args)]
        run.eval_envs = [TurnLimit(env, full, args.reminder) for env in run.eval_envs]
        teacher = TurnLimit(make_envs(args, 1)[0], (0, args.max_turns), args.reminder)  # C3
        policy = load_policy(args, env=teacher, kind=BudgetPolicy)
        policy.set_budget(args, attribute(teacher, "end_of_thought", "</think>"))
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        if args.turn_limit != "none":
            pilot = collect_groups(policy, envs, args, iteration=2**40)  # own random numbers
            counts = gather_list([len(e.turns) for e in pilot])
            for env in envs + run.eval_envs:
                env.limits = turn_limits(counts, args)

        def evaluation():
            metrics, played = evaluate(policy, run.eval_envs, args)
            return metrics | budget_metrics(policy, played), played

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score
            rewards, turn_mask = turn_table(episodes, policy.reward, policy.device)

            # 3. advantages (E, K)
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            advantages = group_relative_advantages(rewards.sum(1), group_id)  # (E,)
            credit = torch.where(turn_mask, advantages[:, None], 0.0)

            # 4. update
            updates, batch = [], None
            for chosen in minibatches(group_id, credit, args.num_minibatches):
                batch = collate([episodes[i] for i in chosen], policy.device, credit[chosen])
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            run.log(iteration, episodes, updates, batch,
                    groups_without_signal=groups_without_signal(credit, args.group_size),
                    turn_limit_first=envs[0].limits[0], turn_limit_last=envs[0].limits[1],
                    **{f"train_{name}": x for name, x in budget_metrics(policy, episodes).items()})
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
