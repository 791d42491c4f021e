"""Turn budget: how much may an agent think in one turn, when its context is short?

A hypothesis from the literature, not a published algorithm: no paper we know of tests a cap on the
thought of a single turn. The ideas: ASearcher (arXiv 2508.07976, bounded generation per call),
SFR-DeepResearch (2509.06283, old thoughts dropped), s1 (2501.19393, thoughts closed by force),
"More with Less" (2510.16786v2, turn limits), TAB (2604.05164, budgets per turn).

    Eq. 1  b_k = max(0, min(thought_cap, C - used - reserve, pot left))      allowance of turn k
    Eq. 2  a thought still open after b_k tokens is closed by force; what is put in is not trained
    Eq. 3  fixed limit = floor(75th percentile of the turns of unrestricted episodes)
           dynamic     = floor(50th percentile), once extended to the 75th when it is hit
    Eq. 4  A_k = (R - mean_group R) / (std_group R + 1e-6)    R = sum_k r_k, for every turn
    Eq. 5  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + c entropy

    C  context_limit     reserve  the tokens of the end-of-thought mark and of an action
    w  ratio             pot      K thought_cap, for all turns together (--cap episode)

Changed from ms_grpo.py
    - a turn is a thought, an end-of-thought mark and an action; the thought has an allowance
    - the context is short: an episode that does not fit any more is truncated
    - every episode is trained on; the update is plain GRPO

Choices
    C1  --cap none: a thought may fill the context, which ends the episode. context, episode, turn:
        it is closed when the context, all of K thought_cap, or thought_cap is used up.
    C2  --drop-thoughts shows earlier turns without their thoughts: every turn is a row of its own.
    C3  The mark is the environment's `end_of_thought`, or </think>.
    C4  Turn limits come from a pilot with the start policy, all episodes counted, failures too.

    python algos/turn_budget.py        about 3 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads sleep, they do not spin
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from policies import Policy, load_policy
from run_folder import Run
from utils import (
    RunArgs, all_gather, all_reduce_sum, collate, collect_groups, evaluate, groups_without_signal,
    make_envs, micro_batches, minibatches, optimizer_step, over_processes, stop, token_logprobs,
    turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ThinkSearch-v0"  # an environment in which a turn may hold a thought
    max_turns: int = 4  # turns after which an episode is truncated, K
    max_turn_tokens: int = 4  # tokens of the action that follows a thought
    learning_rate: float = 1.5e-4  # of AdamW, constant
    num_iterations: int = 60  # iterations of: collect episodes, update
    warm_start_steps: int = 500  # behaviour cloning steps of the tiny model before training

    # Algorithm specific arguments
    cap: Literal["none", "context", "episode", "turn"] = "turn"  # what closes a thought, Eq. 1
    thought_cap: int = 8  # tokens of a thought, Eq. 1; an episode's pot is this times max_turns
    context_limit: int = 80  # tokens of the whole context, C
    drop_thoughts: bool = False  # show earlier turns without their thoughts
    turn_limit: Literal["none", "fixed", "dynamic"] = "none"  # Eq. 3
    start_percentile: float = 50.0  # first limit of --turn-limit dynamic
    end_percentile: float = 75.0  # limit of --turn-limit fixed, and of dynamic when extended
    reminder: bool = False  # every observation ends with the turns left
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 5
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 5
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 5
    num_minibatches: int = 2  # optimizer steps per iteration


PILOT = 2**40  # the iteration number of the pilot episodes' random streams


# === 3. Advantages ===============================================================================
@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, correction: int = 1) -> Tensor:
    """Scores relative to the mean of their group, in units of its std. Eq. 4

    scores (N,), group_id (N,) -> (N,); exactly 0 in a group of one or of scores equal to 1e-6

    >>> group_relative_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660])
    """
    advantages = torch.zeros_like(scores)
    for group in group_id.unique():
        members = group_id == group
        values = scores[members]
        if len(values) > 1 and values.max() - values.min() > 1e-6:  # sums of floats may differ
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
def thought_end(token_ids: list[int], mark: list[int]) -> int | None:
    """How many tokens a thought has, the mark that ends it included; None while it is open."""
    for end in range(len(mark), len(token_ids) + 1):
        if token_ids[end - len(mark) : end] == mark:
            return end
    return None


def forced_tokens(token_ids: list[int], allowance: int | None, action_cap: int, mark: list[int],
                  end_id: int) -> list[int]:
    """What is put in after these tokens of a turn: the mark, the end of the turn, or nothing. Eq. 2

    The mark where a thought of `allowance` tokens is still open; the end of the turn where an
    action has action_cap tokens. A mark sampled as the last token allowed is no forced one.
    """
    end = thought_end(token_ids, mark)
    if end is None:
        over = allowance is not None and len(token_ids) >= allowance
        return list(mark) if over and token_ids[-1:] != [end_id] else []
    return [end_id] if len(token_ids) - end >= action_cap and token_ids[-1] != end_id else []


class BudgetPolicy(Policy):
    """A policy whose thoughts are counted, closed and, later, perhaps forgotten."""

    def set_budget(self, args: Args, mark: str):
        self.args, self.mark = args, self.encode(mark)
        self.context_length = min(self.context_length, args.context_limit)
        self.history_turns = args.max_turns if args.drop_thoughts else None

    def allowance(self, episode: Episode, used: int) -> int | None:
        """Tokens that the thought of this turn may have, its end included; None: any. Eq. 1"""
        if self.args.cap == "none":
            return None
        left = self.context_length - used - len(self.mark) - self.args.max_turn_tokens
        if self.args.cap == "turn":
            left = min(left, self.args.thought_cap)
        elif self.args.cap == "episode":
            pot = self.args.thought_cap * self.args.max_turns
            left = min(left, pot - sum(self.thought_length(turn) for turn in episode.turns))
        return max(0, left)

    def turn_cap(self, episode: Episode, used: int) -> int:
        allowance = self.allowance(episode, used)
        if allowance is None:  # whatever the context still holds, if the last turn left anything
            full = any(len(turn.prompt_ids + turn.token_ids) >= self.context_length
                       for turn in episode.turns[-1:])  # though its thought may be dropped now
            return 0 if full else self.context_length - used
        return allowance + len(self.mark) + self.args.max_turn_tokens

    def force(self, episode: Episode, used: int, token_ids: list[int]) -> list[int]:
        put_in = forced_tokens(token_ids, self.allowance(episode, used), self.args.max_turn_tokens,
                               self.mark, self.end_id)
        room = self.turn_cap(episode, used) - len(token_ids)
        return put_in if len(put_in) <= room else []  # without room the turn is over anyway

    def remember(self, turn: Turn) -> list[int]:
        if not self.args.drop_thoughts:
            return turn.token_ids
        end = thought_end(turn.token_ids, self.mark) or len(turn.token_ids)
        return turn.token_ids[end:] or turn.token_ids[-1:] * (turn.token_ids[-1] == self.end_id)

    def thought_length(self, turn: Turn) -> int:
        """Sampled tokens of the thought, its end included if it was sampled."""
        end = thought_end(turn.token_ids, self.mark) or len(turn.token_ids)
        return end - sum(position < end for position in turn.forced)


class TurnLimit(gym.Wrapper):
    """Ends an episode at a limit, which may be extended once, and says how many turns are left."""

    def __init__(self, env: gym.Env, limit: int, reminder: bool):
        super().__init__(env)
        self.limits, self.reminder = (limit, limit), reminder  # the first one, the extended one

    def reset(self, **kwargs):
        self.turn, self.limit = 0, self.limits[0]
        observation, info = self.env.reset(**kwargs)
        return self.remind(observation), info

    def step(self, action: str):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.turn += 1
        if not terminated:
            if self.turn >= self.limit:  # the extension is granted only when the limit is hit
                self.limit = max(self.limits)
            truncated = truncated or self.turn >= self.limit
        if not terminated and not truncated:
            observation = self.remind(observation)
        return observation, reward, terminated, truncated, info

    def remind(self, observation: str) -> str:
        return f"{observation} left {self.limit - self.turn}" if self.reminder else observation


def budget_metrics(policy: BudgetPolicy, episodes: list[Episode]) -> dict[str, float]:
    """How the budget was used, over the episodes of all processes."""
    turns, rows = [], []  # numbers per turn and per episode
    for e in episodes:
        thoughts = [policy.thought_length(turn) for turn in e.turns]
        for turn, thought in zip(e.turns, thoughts, strict=True):
            end = thought_end(turn.token_ids, policy.mark) or 0
            turns.append([thought, any(position < end for position in turn.forced)])
        shown = thoughts[-1:] if policy.history_turns else thoughts
        rows.append([e.success, sum(turn.num_sampled for turn in e.turns),
                     len(e.turns) * (len(e.turns) + 1) / 2, sum(shown) / max(len(e.row()), 1),
                     e.info.get("right_hops", 0) / e.info.get("hops", 1)])
    turns, rows = (all_gather(torch.tensor(x, dtype=torch.double).reshape(-1, n))
                   for x, n in ((turns, 2), (rows, 5)))
    if not len(turns):
        stop(f"no prompt leaves room to answer in a context of {policy.context_length}")
    success, tokens, history, share, done = rows.mean(0).tolist()
    return {"thought_tokens": turns[:, 0].mean().item(), "forced_closes": turns[:, 1].mean().item(),
            "rounds_completed": done, "thought_share": share, "history_cost": history,
            "tokens_per_success": tokens / max(success, 1 / len(rows))}


def pilot_limits(policy: BudgetPolicy, envs: list[gym.Env], args: Args) -> tuple[int, int]:
    """First and extended turn limit, from episodes of the start policy. Eq. 3"""
    pilot = collect_groups(policy, envs, args, PILOT)
    counts = all_gather(torch.tensor([len(e.turns) for e in pilot])).tolist()
    start, end = (max(1, math.floor(np.percentile(counts, percentile)))
                  for percentile in (args.start_percentile, args.end_percentile))
    return min(start, end) if args.turn_limit == "dynamic" else end, end


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
    if max(args.start_percentile, args.end_percentile) > 100:
        stop("--start-percentile and --end-percentile are at most 100")
    with Run(args, "turn_budget") as run:
        envs, run.eval_envs = ([TurnLimit(env, args.max_turns, args.reminder) for env in some]
                               for some in (make_envs(args), run.eval_envs))
        policy = load_policy(args, env=envs[0], kind=BudgetPolicy)
        policy.set_budget(args, getattr(envs[0].unwrapped, "end_of_thought", "</think>"))
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        if args.turn_limit != "none":
            limits = pilot_limits(policy, envs, args)
            for env in envs + run.eval_envs:
                env.limits = limits

        def evaluation():
            metrics, played = evaluate(policy, run.eval_envs, args)
            return metrics | budget_metrics(policy, played), played

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)

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
            budget = budget_metrics(policy, episodes)
            run.log(iteration, episodes, updates, batch,
                    groups_without_signal=groups_without_signal(credit, args.group_size),
                    turn_limit_first=envs[0].limits[0], turn_limit_last=envs[0].limits[1],
                    **{f"train_{name}": value for name, value in budget.items()})
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
