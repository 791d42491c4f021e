"""Turn budget: how much may an agent think in one turn, when its context is short?

A hypothesis from the literature, not a published algorithm: no paper we know of tests a cap on the
thought of a single turn. The ideas: ASearcher (arXiv 2508.07976, bounded generation per call),
SFR-DeepResearch (2509.06283, old thoughts dropped), s1 (2501.19393, thoughts closed by force),
"More with Less" (2510.16786v2, turn limits), TAB (2604.05164, budgets per turn).

    Eq. 1  rounds = floor((C - P - F) / (b + a + o))      that fit if thoughts stay in the context
    Eq. 2  rounds = floor((C - P - F - b) / (a + o))      that fit if old thoughts are dropped
    Eq. 3  b_k = max(0, min(thought_cap, C - used - reserve, pot left))      allowance of turn k
    Eq. 4  a thought still open after b_k tokens is closed by force; what is put in is not trained
    Eq. 5  fixed limit = floor(75th percentile of the turns of unrestricted episodes)
           dynamic     = floor(50th percentile), once extended to the 75th when it is hit
    Eq. 6  R = sum_k r_k + option             option: --reward-option, by default 0
    Eq. 7  A_k = A / (turns of the episode)   --divide-by-turns
    Eq. 8  A = (R - mean_group R) / (std_group R + 1e-6)      of every turn and sampled token
    Eq. 9  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) - kl KL + c entropy

    C  context_limit     P  tokens before the first observation     F  final_reserve
    b, a, o  tokens of a thought, an action, an observation         w  exp(log_ratio)
    reserve  F and the tokens of the end-of-thought mark and of an action

Changed from ms_grpo.py
    - a turn is a thought, an end-of-thought mark and an action; the thought has an allowance
    - the context is short: an episode that does not fit any more is truncated
    - every episode is trained on; the update is plain GRPO

Choices
    C1  --cap none: a thought may fill the context, which ends the episode. context, episode, turn:
        it is closed when the context, all of K * thought_cap, or thought_cap is used up.
    C2  --drop-thoughts shows earlier turns without their thoughts: every turn is a row of its own.
    C3  The mark is the environment's `end_of_thought`, or </think>.
    C4  Turn limits come from a pilot with the start policy, all episodes counted, failures too.

    python algos/turn_budget.py        about 3 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from policies import load_policy
from run_folder import Run
from utils import (
    Policy, RunArgs, all_gather, all_reduce_sum, collate, collect_groups, evaluate,
    expand_to_tokens, make_envs, micro_batches, optimizer_step, rank, stop, token_logprobs,
    turn_table, world_size,
)


# === 2. Args =====================================================================================
RewardOption = Literal["none", "window", "overrun", "hinge", "target", "target_max", "turns"]


@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ThinkSearch-v0"  # an environment in which a turn may hold a thought
    max_turns: int = 4  # turns after which an episode is truncated, K
    max_turn_tokens: int = 4  # tokens of the action that follows a thought, a
    learning_rate: float = 1.5e-4  # of AdamW, constant
    num_iterations: int = 60  # iterations of: collect episodes, update
    warm_start_steps: int = 500  # behaviour cloning steps of the tiny model before training

    # Algorithm specific arguments
    cap: Literal["none", "context", "episode", "turn"] = "turn"  # what closes a thought, Eq. 3
    thought_cap: int = 8  # tokens of a thought, Eq. 3; an episode's pot is this times max_turns
    context_limit: int = 80  # tokens of the whole context, C
    final_reserve: int = 0  # tokens of it that no thought may use, F
    drop_thoughts: bool = False  # show earlier turns without their thoughts
    turn_limit: Literal["none", "fixed", "dynamic"] = "none"  # Eq. 5
    start_percentile: float = 50.0  # first limit of --turn-limit dynamic
    end_percentile: float = 75.0  # limit of --turn-limit fixed, and of dynamic when extended
    reminder: bool = False  # every observation ends with the turns left
    reward_option: RewardOption = "none"  # what a length earns, Eq. 6
    coefficient: float = 0.01  # of the reward option
    target_tokens: int = 16  # of a thought (window: most, overrun: free), else of an episode
    divide_by_turns: bool = False  # share an episode's advantage out over its turns, Eq. 7
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 9
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 9
    kl_coefficient: float = 0.0  # weight of KL(policy || start policy), estimator k3, in Eq. 9
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 9
    num_epochs: int = 1  # passes over the episodes, in the same minibatches
    num_minibatches: int = 2  # optimizer steps per pass


PILOT = 2**40  # the iteration number of the pilot episodes' random streams


# === 3. Advantages ===============================================================================
@torch.no_grad()
def soft_window_penalty(thought_lengths: Tensor, turn_mask: Tensor, maximum: float,
                        buffer: float) -> Tensor:
    """DAPO's overlong penalty of every thought, averaged over the turns played. For Eq. 6

    thought_lengths (E, K), turn_mask (E, K) -> (E,) in [-1, 0]: 0 up to maximum - buffer tokens,
    then linear, -1 from maximum on
    """
    per_turn = ((maximum - buffer - thought_lengths) / buffer).clamp(-1, 0)
    return torch.where(turn_mask, per_turn, 0.0).sum(1) / turn_mask.sum(1).clamp(min=1)


@torch.no_grad()
def overrun_penalty(thought_lengths: Tensor, turn_mask: Tensor, cap: float,
                    coefficient: float) -> Tensor:
    """What every thought is over the cap, in units of the cap, summed over turns. For Eq. 6

    thought_lengths (E, K), turn_mask (E, K) -> (E,) <= 0
    """
    over = torch.where(turn_mask, (thought_lengths - cap).clamp(min=0) / cap, 0.0)
    return -coefficient * over.sum(1)


@torch.no_grad()
def total_budget_reward(correct: Tensor, total_tokens: Tensor, budget: float,
                        coefficient: float) -> Tensor:
    """The reward minus what an episode sampled over its budget (TAB). For Eq. 6; (E,) -> (E,)"""
    return correct - coefficient * (total_tokens - budget).clamp(min=0)


@torch.no_grad()
def target_length_reward(correct: Tensor, used: Tensor, target: float, coefficient: float,
                         form: str = "exact") -> Tensor:
    """L1's reward for keeping to a length. For Eq. 6; (E,) -> (E,)

    exact: minus the distance from the target; max: times a factor from 1 (short) to 0 (long)
    """
    if form == "exact":
        return correct - coefficient * (used - target).abs()
    return correct * ((-coefficient * (used - target)).clamp(-1, 1) + 1) / 2


@torch.no_grad()
def turn_count_penalty(num_turns: Tensor, threshold: float, max_turns: float) -> Tensor:
    """0 below the threshold, then linear to -1 at max_turns. For Eq. 6; (E,) -> (E,)"""
    return ((threshold - num_turns) / max(max_turns - threshold, 1)).clamp(max=0)


@torch.no_grad()
def score_episodes(returns: Tensor, thought_lengths: Tensor, total_tokens: Tensor,
                   turn_mask: Tensor, args: Args) -> Tensor:
    """The episode's return and its reward option. Eq. 6

    returns, total_tokens (E,), thought_lengths, turn_mask (E, K) -> (E,)
    """
    coefficient, target, option = args.coefficient, args.target_tokens, args.reward_option
    if option == "window":
        return returns + coefficient * soft_window_penalty(
            thought_lengths, turn_mask, target, target / 2)
    if option == "overrun":
        return returns + overrun_penalty(thought_lengths, turn_mask, target, coefficient)
    if option == "hinge":
        return total_budget_reward(returns, total_tokens, target, coefficient)
    if option.startswith("target"):
        form = "exact" if option == "target" else "max"
        return target_length_reward(returns, total_tokens, target, coefficient, form)
    if option == "turns":
        return returns + coefficient * turn_count_penalty(
            turn_mask.sum(1), args.max_turns / 2, args.max_turns)
    return returns


@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, scale: str = "group_std",
                              degrees_of_freedom: int = 1, epsilon: float = 1e-6) -> Tensor:
    """Scores relative to the mean (and in units of the std) of their group. Eq. 8

    scores (N,), group_id (N,) -> (N,); exactly 0 in a group of one or of scores equal to 1e-6
    """
    assert scores.shape == group_id.shape and scale in ("group_std", "none")
    advantages = torch.zeros_like(scores)
    for group in group_id.unique():
        members = group_id == group
        values = scores[members]
        if len(values) > 1 and values.max() - values.min() > 1e-6:  # sums of floats may differ
            centred = values - values.mean()
            std = values.std(correction=degrees_of_freedom)
            advantages[members] = centred / (std + epsilon) if scale == "group_std" else centred
    return advantages


@torch.no_grad()
def divide_by_turn_count(advantages: Tensor, turn_mask: Tensor) -> Tensor:
    """An episode's advantage shared out evenly over its turns. Eq. 7

    advantages (E,), turn_mask (E, K) -> (E, K), 0 after the end
    """
    shares = advantages / turn_mask.sum(1).clamp(min=1)
    return torch.where(turn_mask, shares[:, None], 0.0)


# === 4. Loss =====================================================================================
def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
                      dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate of every token, to be maximised. Eq. 9

    log_ratio (B, T) = new - old log-probs, advantages (B, T) -> (B, T)
    """
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    return objective


def kl_policy_ref_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from the policy's own samples, >= 0 per token.

    logprobs (B, T), ref_logprobs (B, T) -> (B, T). Its gradient is that of KL(reference || policy).
    """
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    return d.exp() - d - 1


def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float, dual_clip: float | None, entropy_coefficient: float,
                kl_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 9, and sums for the log; batch["weights"] are already divided.

    logprobs (B, T), entropy (B, T); batch: old_logprobs, ref_logprobs, advantages, weights (B, T)
    """
    advantages, weights = batch["advantages"], batch["weights"]  # (B, T)
    log_ratio = logprobs - batch["old_logprobs"]
    objective = clipped_objective(log_ratio, advantages, clip_low, clip_high, dual_clip)
    kl = kl_policy_ref_k3(logprobs, batch["ref_logprobs"])
    objective = objective + entropy_coefficient * entropy - kl_coefficient * kl
    loss = -(weights * objective).sum()
    with torch.no_grad():
        binding = ((advantages > 0) & (log_ratio > np.log1p(clip_high))) | (
            (advantages < 0) & (log_ratio < np.log1p(-clip_low)))
        approx_kl = log_ratio.exp() - 1 - log_ratio  # KL(old || new), k3 from samples of old
        parts = {"loss": -objective, "entropy": entropy, "clip_fraction": binding.float(),
                 "approx_kl": approx_kl, "kl_policy_ref_k3": kl}
        return loss, {name: (weights * values).sum() for name, values in parts.items()}


# === 5. The budget ===============================================================================
def rounds_that_fit(context_limit: float, prompt: float, reserve: float, thought: float,
                    action: float, observation: float, thoughts_kept: bool) -> int:
    """How many turns a context holds, all numbers in tokens. Eq. 1, 2; never negative"""
    room, turn = context_limit - prompt - reserve, action + observation
    rounds = room / (thought + turn) if thoughts_kept else (room - thought) / turn
    return max(0, math.floor(rounds))


def thought_allowance(thought_cap: int | None, context_limit: int | None, used: int, reserve: int,
                      pot_left: int | None) -> int | None:
    """Tokens that the thought of this turn may have, its end included. Eq. 3

    A term that is None is absent; None if all are. Never negative.
    """
    context_left = None if context_limit is None else context_limit - used - reserve
    terms = [term for term in (thought_cap, context_left, pot_left) if term is not None]
    return max(0, min(terms)) if terms else None


def thought_end(token_ids: list[int], mark: list[int]) -> int | None:
    """How many tokens a thought has, the mark that ends it included; None while it is open."""
    for end in range(len(mark), len(token_ids) + 1):
        if token_ids[end - len(mark) : end] == mark:
            return end
    return None


def forced_tokens(token_ids: list[int], allowance: int | None, action_cap: int, mark: list[int],
                  end_id: int) -> list[int]:
    """What is put in after these tokens of a turn: the mark, the end of the turn, or nothing. Eq. 4

    The mark where a thought of `allowance` tokens is still open; the end of the turn where an
    action has action_cap tokens. A mark sampled as the last token allowed is no forced one.
    """
    end = thought_end(token_ids, mark)
    if end is None:
        over = allowance is not None and len(token_ids) >= allowance
        return list(mark) if over and token_ids[-1:] != [end_id] else []
    return [end_id] if len(token_ids) - end >= action_cap and token_ids[-1] != end_id else []


def percentile_limit(turn_counts: list[int], percentile: float) -> int:
    """A percentile (linear interpolation) of turn counts, rounded down; at least 1. Eq. 5"""
    return max(1, math.floor(np.percentile(turn_counts, percentile)))


def turn_limit_step(turn: int, limit: int, extended_limit: int,
                    extensions_left: int) -> tuple[int, int, bool]:
    """After `turn` turns: the limit, the extensions left, and whether to stop. Eq. 5

    The extension is granted only when the limit is hit.
    """
    if turn >= limit and extensions_left and extended_limit > limit:
        limit, extensions_left = extended_limit, extensions_left - 1
    return limit, extensions_left, turn >= limit


class TurnLimit(gym.Wrapper):
    """Ends an episode at a limit, which may be extended once, and says how many turns are left."""

    def __init__(self, env: gym.Env, limit: int, extended_limit: int, reminder: bool):
        super().__init__(env)
        self.limits, self.reminder = (limit, extended_limit), reminder

    def reset(self, **kwargs):
        self.turn, self.limit, self.extensions_left = 0, self.limits[0], 1
        observation, info = self.env.reset(**kwargs)
        return self.remind(observation), info

    def step(self, action: str):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.turn, over = self.turn + 1, False
        if not terminated:
            self.limit, self.extensions_left, over = turn_limit_step(
                self.turn, self.limit, self.limits[1], self.extensions_left)
        truncated = truncated or over
        info = info | {"extended": self.extensions_left == 0, "at_limit": over}
        if not terminated and not truncated:
            observation = self.remind(observation)
        return observation, reward, terminated, truncated, info

    def remind(self, observation: str) -> str:
        return f"{observation} left {self.limit - self.turn}" if self.reminder else observation


class Budget:
    """The allowances of a run, in the form that rollouts ask for."""

    def __init__(self, policy: Policy, args: Args, mark_text: str):
        self.policy, self.args, self.mark = policy, args, policy.encode(mark_text)
        self.history_turns = args.max_turns if args.drop_thoughts else None
        policy.context_length = min(policy.context_length, args.context_limit)
        if args.drop_thoughts:
            policy.remember = self.without_thought

    def allowance(self, episode: Episode, used: int) -> int | None:
        args, pot = self.args, None
        if args.cap == "none":
            return None
        if args.cap == "episode":
            pot = args.thought_cap * args.max_turns - sum(
                self.thought_length(turn) for turn in episode.turns)
        reserve = len(self.mark) + args.max_turn_tokens + args.final_reserve
        return thought_allowance(args.thought_cap if args.cap == "turn" else None,
                                 self.policy.context_length, used, reserve, pot)

    def max_turn_tokens(self, episode: Episode, used: int) -> int:
        allowance = self.allowance(episode, used)
        if allowance is None:  # whatever the context still holds, if the last turn left anything
            full = any(len(turn.prompt_ids + turn.token_ids) >= self.policy.context_length
                       for turn in episode.turns[-1:])  # though its thought may be dropped now
            return 0 if full else self.policy.context_length - used
        return allowance + len(self.mark) + self.args.max_turn_tokens

    def force(self, episode: Episode, used: int, token_ids: list[int]) -> list[int]:
        put_in = forced_tokens(token_ids, self.allowance(episode, used),
                               self.args.max_turn_tokens, self.mark, self.policy.end_id)
        room = self.max_turn_tokens(episode, used) - len(token_ids)
        return put_in if len(put_in) <= room else []  # without room the turn is over anyway

    def thought_length(self, turn: Turn) -> int:
        """Sampled tokens of the thought, its end included if it was sampled."""
        end = thought_end(turn.token_ids, self.mark) or len(turn.token_ids)
        return end - sum(position < end for position in turn.forced)

    def without_thought(self, turn: Turn) -> list[int]:
        end = thought_end(turn.token_ids, self.mark) or len(turn.token_ids)
        return turn.token_ids[end:] or turn.token_ids[-1:] * (
            turn.token_ids[-1] == self.policy.end_id)

    def metrics(self, episodes: list[Episode]) -> dict[str, float]:
        """How the budget was used, over the episodes of all processes."""
        turns, rows = [], []  # a row of numbers per turn and per episode
        for e in episodes:
            marks = [thought_end(turn.token_ids, self.mark) or 0 for turn in e.turns]
            thoughts = [self.thought_length(turn) for turn in e.turns]
            for turn, mark, thought in zip(e.turns, marks, thoughts, strict=True):
                closed = any(position < mark for position in turn.forced)
                invalid = bool(turn.info.get("invalid_action", False))
                observation = len(self.policy.encode(turn.observation))
                turns.append([thought, turn.num_sampled - thought, observation, closed, invalid,
                              closed and invalid])
            context = e.row()
            shown = thoughts[-1:] if self.args.drop_thoughts else thoughts
            rows.append([e.success, sum(turn.num_sampled for turn in e.turns), len(e.turns),
                         len(e.turns) * (len(e.turns) + 1) / 2,
                         sum(shown) / max(len(context), 1),
                         e.info.get("right_hops", 0) / e.info.get("hops", 1),
                         e.info.get("at_limit", False), e.info.get("extended", False)])
        turns, rows = (all_gather(torch.tensor(x, dtype=torch.double).reshape(-1, n))
                       for x, n in ((turns, 6), (rows, 8)))
        if not len(turns):
            stop(f"no prompt leaves room to answer in a context of {self.policy.context_length}")
        thought, action, observation, closed, invalid, closed_invalid = turns.mean(0).tolist()
        success, tokens, _, history, share, done, at_limit, extended = rows.mean(0).tolist()
        markup = len(self.policy.tail) + len(self.policy.between)
        return {
            "thought_tokens": thought, "thought_tokens_p90": turns[:, 0].quantile(0.9).item(),
            "forced_closes": closed, "invalid_after_forced": closed_invalid / max(closed, 1e-12),
            "rounds": (len(turns) / len(rows)) * (1 - invalid), "rounds_completed": done,
            "thought_share": share, "history_cost": history, "at_limit": at_limit,
            "extended": extended, "tokens_per_success": tokens / max(success, 1 / len(rows)),
            "rounds_that_fit": rounds_that_fit(
                self.policy.context_length, len(self.policy.head), self.args.final_reserve, thought,
                action, observation + markup, not self.args.drop_thoughts)}


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    mask = batch["turn_id"] >= 0
    batch["weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)  # the only normalisation
    sums = torch.zeros(5, device=policy.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        with torch.no_grad():
            rows["ref_logprobs"] = (logprobs if reference is None
                                    else token_logprobs(reference, rows, args.temperature)[0])
        loss, stats = policy_loss(rows, logprobs, entropy, args.clip_low, args.clip_high, None,
                                  args.entropy_coefficient, args.kl_coefficient)
        loss.backward()
        sums += torch.stack(list(stats.values()))
    names = ("loss", "entropy", "clip_fraction", "approx_kl", "kl_policy_ref_k3")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    if max(args.start_percentile, args.end_percentile) > 100:
        stop("--start-percentile and --end-percentile are at most 100")
    with Run(args, "turn_budget") as run:
        num_episodes = args.num_prompts * args.group_size  # E over all processes

        def limited(envs: list[gym.Env]) -> list[gym.Env]:
            return [TurnLimit(env, args.max_turns, args.max_turns, args.reminder) for env in envs]
        envs = limited(make_envs(args, num_episodes // world_size()))
        run.eval_envs = limited(run.eval_envs)
        policy = load_policy(args, env=envs[0])
        reference = copy.deepcopy(policy) if args.kl_coefficient else None
        budget = Budget(policy, args, getattr(envs[0].unwrapped, "end_of_thought", "</think>"))
        options = {"history_turns": budget.history_turns, "force": budget.force,
                   "max_turn_tokens": budget.max_turn_tokens}
        if args.turn_limit != "none":  # a pilot with the start policy sets the limits, Eq. 5
            pilot = collect_groups(policy, envs, args, PILOT, **options)
            counts = all_gather(torch.tensor([len(e.turns) for e in pilot])).tolist()
            last = percentile_limit(counts, args.end_percentile)
            first = last
            if args.turn_limit == "dynamic":
                first = min(last, percentile_limit(counts, args.start_percentile))
            for env in envs + run.eval_envs:
                env.limits = (first, last)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        run.restore(policy, optimizer=optimizer)

        def evaluation():
            metrics, played = evaluate(policy, run.eval_envs, args, **options)
            return metrics | budget.metrics(played), played

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration, **options)

            # 2. score: what the episode earned, and what its length earns
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
            lengths, _ = turn_table(episodes, budget.thought_length, policy.device)
            sampled, _ = turn_table(episodes, lambda turn: turn.num_sampled, policy.device)
            scores = score_episodes(rewards.sum(1), lengths, sampled.sum(1), turn_mask, args)

            # 3. advantages
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            relative = group_relative_advantages(scores, group_id)  # (E,)
            advantages = torch.where(turn_mask, relative[:, None], 0.0)  # (E, K)
            if args.divide_by_turns:
                advantages = divide_by_turn_count(relative, turn_mask)

            # 4. update; the groups of all processes are dealt out to the minibatches
            updates = []
            group = group_id + rank() * len(episodes) // args.group_size  # (E,), over all
            for part in list(range(args.num_minibatches)) * args.num_epochs:
                here = (group % args.num_minibatches == part).nonzero()[:, 0]
                if not all_reduce_sum(advantages[here].abs().sum()):
                    continue  # nothing to learn from
                batch = collate([episodes[i] for i in here], policy.device)
                batch["advantages"] = expand_to_tokens(
                    advantages[here], batch["turn_id"], batch["episode_id"])
                updates.append(update(policy, reference, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            signal = all_gather(relative).view(-1, args.group_size).abs().amax(1) > 0
            metrics = {f"train_{name}": value for name, value in budget.metrics(episodes).items()}
            metrics |= {"score": all_gather(scores).mean().item(),
                        "turn_limit_first": envs[0].limits[0], "turn_limit_last": envs[0].limits[1],
                        "groups_without_signal": 1 - signal.double().mean().item()}
            run.log(iteration, episodes, metrics, updates, batch if updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
