"""MS-GRPO: every turn of an episode is credited with the whole episode's group-relative return.

Paper: Dilkes, Yazdanpanah and Stein, "Reinforced Language Models for Sequential Decision Making",
arXiv 2508.10839v1. Its abstract and the first author's public repositories were read; the body and
the training code were not available. This is a reconstruction; the sources are marked below.

The policy is memoryless: each turn is answered from the current observation alone, so an episode
of K turns is K training rows. The G episodes of a group start from the same environment seed.

    Eq. 1  R_e = sum_k r_{e,k}                        undiscounted, penalties included   [paper]
    Eq. 2  A_e = (R_e - mean_group R) / (std_group R + 1e-6)                       [author code]
    Eq. 3  A_{e,k,t} = A_e                            for every turn and sampled token   [paper]
    Eq. 4  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) - kl KL + c entropy
                                                                                   [author code]
    Eq. 5  p_e = |A_e|^power / sum_e' |A_e'|^power    absolute-advantage-weighted drawing: M of E
                                   episodes are drawn for the update  [name: paper, formula: ours]

    R_e  episode_returns          A_e  group_relative_advantages     p_e  absolute_advantage_weights
    w_t  exp(log_ratio)           M    episodes_per_update           e, k, t  episode, turn, token

Deviations and choices
    D1  Eq. 5: power 1, M = E / 2, with replacement, no importance correction. The paper names the
        idea only (--aaw-power, --episodes-per-update, --replacement).
    D2  Episodes of advantage 0 (so all of a group of equal returns) are never drawn, in any arm.
    D3  Minibatches are made of drawn episodes, not of shuffled turns, so that they do not depend on
        the number of processes.
    D4  --credit return_to_go and step are controls, not the paper's method; --history-turns n shows
        n earlier turns. Both are off.
    D5  Entropy coefficient 0.01 (author code: 0.001), dual clip off (author code: 3).

    python algos/ms_grpo.py        about 2.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from policies import load_policy
from run_folder import Run
from utils import (
    DRAW, Policy, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate, collect_groups,
    evaluate, expand_to_tokens, make_envs, micro_batches, optimizer_step, random_stream, rank, stop,
    token_logprobs, turn_table, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    # Algorithm specific arguments
    sampling: Literal["aaw", "uniform", "all"] = "aaw"  # draw by |A| (Eq. 5), evenly, or all
    aaw_power: float = 1.0  # exponent of |A| in Eq. 5; 0 is uniform
    episodes_per_update: int | None = None  # M in Eq. 5; default: half of the episodes collected
    replacement: bool = True  # draw with replacement (Eq. 5)
    scale: Literal["group_std", "none"] = "group_std"  # divide by the group's std (Eq. 2) or not
    degrees_of_freedom: int = 1  # of that std: 1 unbiased, 0 population
    credit: Literal["episode", "return_to_go", "step"] = "episode"  # of a turn: Eq. 3, or a control
    aggregation: Literal["token_mean", "turn_mean", "episode_mean"] = "token_mean"  # mean in Eq. 4
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 4
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 4
    dual_clip: float | None = None  # bound on the ratio where A < 0 (author code: 3); default off
    kl_coefficient: float = 0.0  # weight of KL(policy || start policy), estimator k3, in Eq. 4
    kl_in_reward: float = 0.0  # weight of the k1 estimate of that KL, subtracted from the rewards
    entropy_coefficient: float = 0.01  # weight of the entropy bonus, c in Eq. 4
    history_turns: int | None = 0  # earlier turns the policy sees; None: all, as one growing row
    num_epochs: int = 1  # passes over the drawn episodes, in the same minibatches
    num_minibatches: int = 2  # optimizer steps per pass


# === 3. Advantages ===============================================================================
@torch.no_grad()
def episode_returns(turn_rewards: Tensor, turn_mask: Tensor) -> Tensor:
    """Undiscounted return of every episode; rewards after its end do not count. Eq. 1

    turn_rewards (E, K), turn_mask (E, K) bool -> (E,)
    """
    return torch.where(turn_mask, turn_rewards, 0.0).sum(1)


@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, scale: str = "group_std",
                              degrees_of_freedom: int = 1, epsilon: float = 1e-6) -> Tensor:
    """Scores relative to the mean (and in units of the std) of their group. Eq. 2

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
def turn_advantages(turn_rewards: Tensor, turn_mask: Tensor, group_id: Tensor, credit: str,
                    scale: str, degrees_of_freedom: int) -> Tensor:
    """What every turn is credited with: its episode's advantage, Eq. 3, or a control.

    turn_rewards (E, K), turn_mask (E, K), group_id (E,) -> (E, K), 0 after the end. The controls
    return_to_go and step compare a turn's value with all turns of its group.
    """
    if credit == "episode":
        returns = episode_returns(turn_rewards, turn_mask)
        relative = group_relative_advantages(returns, group_id, scale, degrees_of_freedom)
        return torch.where(turn_mask, relative[:, None], 0.0)
    rewards = torch.where(turn_mask, turn_rewards, 0.0)  # (E, K)
    values = rewards.flip(1).cumsum(1).flip(1) if credit == "return_to_go" else rewards
    groups = group_id[:, None].expand_as(rewards)
    advantages = torch.zeros_like(rewards)
    advantages[turn_mask] = group_relative_advantages(
        values[turn_mask], groups[turn_mask], scale, degrees_of_freedom)
    return advantages


@torch.no_grad()
def absolute_advantage_weights(advantages: Tensor, power: float = 1.0) -> Tensor:
    """Probability of drawing each episode. Eq. 5; with power 0 uniform over nonzero advantages

    advantages (E,) -> (E,) summing to 1, or all 0 if every advantage is 0 (nothing to learn from)
    """
    weights = torch.where(advantages != 0, advantages.abs() ** power, 0.0).double()
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def draw_episodes(weights: Tensor, count: int, replacement: bool,
                  generator: np.random.Generator) -> np.ndarray:
    """Draw episode indices by weight; never one of weight 0. Eq. 5

    weights (E,) -> (count,) int; without replacement at most as many as have a weight
    """
    p = weights.cpu().numpy()
    if not p.any():
        return np.zeros(0, dtype=int)
    count = count if replacement else min(count, np.count_nonzero(p))
    return generator.choice(len(p), size=count, replace=replacement, p=p / p.sum())


@torch.no_grad()
def sum_over_turns(values: Tensor, turn_id: Tensor, episode_id: Tensor, shape: tuple) -> Tensor:
    """The sum of a token's values over every turn, for a KL penalty inside the rewards.

    values (B, T), turn_id (B, T), episode_id (B,), shape (E, K) -> (E, K)
    """
    mask = turn_id >= 0
    episode = episode_id[:, None].expand_as(turn_id)
    sums = torch.zeros(shape, device=values.device)
    return sums.index_put((episode[mask], turn_id[mask]), values[mask], accumulate=True)


# === 4. Loss =====================================================================================
def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
                      dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate of every token, to be maximised. Eq. 4

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


@torch.no_grad()
def aggregation_weights(turn_id: Tensor, episode_id: Tensor, aggregation: str) -> Tensor:
    """Weight of every token in the mean of Eq. 4, not yet divided by the sum of all weights.

    turn_id (B, T), episode_id (B,) -> (B, T); 0 where turn_id is -1. token_mean: 1; turn_mean:
    1 / tokens of the turn; episode_mean: 1 / (tokens of the turn * turns of the episode)
    """
    mask = turn_id >= 0
    if aggregation == "token_mean" or not mask.any():
        return mask.float()
    turns = int(turn_id.max()) + 1
    turn_key = episode_id[:, None] * turns + turn_id  # (B, T), a number for every turn played
    keys, inverse, tokens = turn_key[mask].unique(return_inverse=True, return_counts=True)
    weights = 1.0 / tokens  # (turns played,)
    if aggregation == "episode_mean":
        _, episode, played = (keys // turns).unique(return_inverse=True, return_counts=True)
        weights = weights / played[episode]
    return torch.zeros(turn_id.shape, device=turn_id.device).masked_scatter(mask, weights[inverse])


def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float, dual_clip: float | None, entropy_coefficient: float,
                kl_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 4, and sums for the log; batch["weights"] sum to 1 over the step.

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


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    weights = aggregation_weights(batch["turn_id"], batch["episode_id"], args.aggregation)
    batch["weights"] = weights / all_reduce_sum(weights.sum())  # the only normalisation
    sums = torch.zeros(5, device=policy.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        with torch.no_grad():
            rows["ref_logprobs"] = (logprobs if reference is None
                                    else token_logprobs(reference, rows, args.temperature)[0])
        loss, stats = policy_loss(rows, logprobs, entropy, args.clip_low, args.clip_high,
                                  args.dual_clip, args.entropy_coefficient, args.kl_coefficient)
        loss.backward()
        sums += torch.stack(list(stats.values()))
    names = ("loss", "entropy", "clip_fraction", "approx_kl", "kl_policy_ref_k3")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    with Run(args, "ms_grpo") as run:
        num_episodes = args.num_prompts * args.group_size  # E over all processes
        envs = make_envs(args, num_episodes // world_size())
        policy = load_policy(args, args.history_turns)
        reference = copy.deepcopy(policy) if args.kl_coefficient or args.kl_in_reward else None
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        run.restore(policy, optimizer=optimizer)

        def evaluation():
            return evaluate(policy, run.eval_envs, args, args.history_turns)

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration, args.history_turns)

            # 2. score
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
            if args.kl_in_reward:
                batch = collate(episodes, policy.device)
                ref_logprobs, _ = batch_logprobs(reference, batch, args)
                kl = batch["old_logprobs"] - ref_logprobs  # (B, T), estimator k1
                rewards -= args.kl_in_reward * sum_over_turns(kl, batch["turn_id"],
                                                              batch["episode_id"], rewards.shape)

            # 3. advantages; the draw goes by the episode's own, whatever --credit
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            credit = turn_advantages(rewards, turn_mask, group_id, args.credit, args.scale,
                                     args.degrees_of_freedom)  # (E, K)
            advantages = all_gather(group_relative_advantages(
                episode_returns(rewards, turn_mask), group_id, args.scale, args.degrees_of_freedom))
            weights = absolute_advantage_weights(
                advantages, args.aaw_power if args.sampling == "aaw" else 0.0)
            count, replacement = args.episodes_per_update or num_episodes // 2, args.replacement
            if args.sampling == "all":
                count, replacement = num_episodes, False
            generator = random_stream(args.seed, DRAW, iteration)
            drawn = draw_episodes(weights, count, replacement, generator)  # (M,) over all processes

            # 4. update; an iteration without any signal is skipped
            updates = []
            parts = min(args.num_minibatches, len(drawn))
            for minibatch in np.array_split(drawn, parts) * args.num_epochs if parts else []:
                here = minibatch[minibatch // len(episodes) == rank()] % len(episodes)
                # an episode drawn twice stands in the batch twice, as two episodes
                batch = collate([episodes[i] for i in here], policy.device)
                batch["advantages"] = expand_to_tokens(
                    credit[torch.as_tensor(here)], batch["turn_id"], batch["episode_id"])
                updates.append(update(policy, reference, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            signal = (weights.view(-1, args.group_size) > 0).any(1).double()
            metrics = {"groups_without_signal": 1 - signal.mean().item()}
            if updates:
                drawn_advantages = advantages[torch.as_tensor(drawn)]
                metrics |= {"effective_episodes": 1 / (weights**2).sum().item() / num_episodes,
                            "drawn_advantage": drawn_advantages.mean().item(),
                            "drawn_positive": (drawn_advantages > 0).double().mean().item()}
            run.log(iteration, episodes, metrics, updates, batch if updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
