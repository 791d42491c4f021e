"""SeeUPO: update turn by turn, the last turn first, each against the already improved rest.

Paper: Hu, Fu, Chen, Liu and Ding, "SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees",
arXiv 2602.06554v1. Section 4 and the abstract were read in full, the rest in part; code: branch
seeupo of modelscope/AgentEvolver at e59dea41.

    Eq. 1  R_e = 1 + s / 2 if s >= 1, else s / 2; -1 for garbage   s: the episode's return [code]
    Eq. 2  A_e = R_e - mean_group R, divided by the std of A over the batch                 [5, 9]
    Eq. 3  r_e = exp(mean over the tokens of turn t of log pi(token) - log pi_k(token))     [6]
    Eq. 4  J_t = mean over the episodes with a turn t of
                 min(r_e M_e, clip(r_e, 1 - epsilon, 1 + epsilon) M_e) - kl KL              [6]
    Eq. 5  M_e = A_e for the first turn updated; after the step on turn t, M_e is multiplied by
                 r_e of that turn under the new parameters                                  [7, 8]

    pi_k  the policy that collected: old_logprobs, for all turns    M  weights of the episodes (E,)
    t     a turn here    r  exp(pooled_log_ratio), w in st_ppo.py    [n]  equation of the paper

An iteration takes one optimizer step per turn, in --order: reverse is backward induction, an early
turn is judged by what the later ones have become. In exact arithmetic, with a policy of its own for
every turn, that reaches the global optimum; the step sizes, the shared parameters and the sampling
here are outside of the theorem.

Changed from st_ppo.py
    - no critic: the group's mean is the baseline, every token of an episode has the same A
    - one optimizer step per turn, on the rows that have it, cut after it
    - the weights M of Eq. 5

Deviations and choices
    D1  The released code differs from the paper: old log-probs are taken again before every turn
        (--ratio-base before_turn), so that the clip never binds; the factor and the product are
        clamped to 1 +- 0.2 (--factor-clip 0.2); A is clamped (--advantage-clamp 3).
    D2  --ratio-pooling geometric as released; Eq. 5 is exact with product only.
    D3  Controls. --order together: all turns in one step, with GSPO's ratio per turn, or with
        --ratio-pooling token GRPO's; the mean is over turns in both. --no-sequential-weights:
        M = A for all turns.
    D4  An episode without the turn has the factor 1 and is not in the mean (code: its padding
        is). A turn whose episodes all have A = 0 is skipped.
    D5  s is the summed reward of any environment, made for 0 to 1; --reward-mapping plain: R = s.

    python algos/seeupo.py        about 2.5 minutes on 2 CPU cores
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
    evaluate, expand_to_tokens, make_envs, micro_batches, optimizer_step, random_stream, rank,
    select_rows, stop, token_logprobs, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ToolDesk-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 8  # environment seeds (groups) per iteration
    learning_rate: float = 1e-4  # of AdamW, constant
    num_iterations: int = 30  # iterations of: collect episodes, update
    max_turn_tokens: int = 6  # tokens the policy may sample in one turn
    warm_start_steps: int = 400  # behaviour cloning steps of the tiny model before training
    warm_start_learning_rate: float = 2e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.1  # standard deviation of the tiny model's first weights
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    order: Literal["reverse", "natural", "random", "together"] = "reverse"  # of the turns' updates
    sequential_weights: bool = True  # multiply M by the ratios of the turns updated, Eq. 5
    ratio_base: Literal["iteration_start", "before_turn"] = "iteration_start"  # Eq. 3, 5
    ratio_pooling: Literal["geometric", "product", "token"] = "geometric"  # mean, sum, none
    factor_clip: float | None = None  # bound factor and product to 1 +- this (code: 0.2)
    advantage_scale: Literal["batch_std", "none", "group_std"] = "batch_std"  # divisor in Eq. 2
    advantage_clamp: float | None = None  # bound A to +- this (code: 3)
    reward_mapping: Literal["official", "plain"] = "official"  # R of Eq. 1, or s itself
    clip_epsilon: float = 0.2  # clipping of the ratio to both sides, Eq. 4
    kl_coefficient: float = 0.002  # weight of KL(policy || start policy), estimator k3, in Eq. 4
    steps_per_turn: int = 1  # optimizer steps on the rows of a turn (of all, with --order together)


# === 3. Advantages ===============================================================================
@torch.no_grad()
def task_reward(score: Tensor, garbage: Tensor, mapping: str = "official") -> Tensor:
    """What an episode's score is worth. Eq. 1

    score (E,) in [0, 1], garbage (E,) bool -> (E,); plain: the score itself, garbage or not
    """
    if mapping == "plain":
        return score
    return torch.where(garbage, -1.0, torch.where(score >= 1, 1 + 0.5 * score, 0.5 * score))


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
def scale_by_batch(advantages: Tensor, scale: str = "batch_std",
                   clamp: float | None = None) -> Tensor:
    """Divide by the (unbiased) std over the batch unless that is 0, then clamp. Eq. 2

    advantages (E,), of all processes, mean 0 in every group -> (E,); scale other than batch_std:
    only clamp
    """
    std = advantages.std(correction=1) if len(advantages) > 1 else torch.zeros(())
    if scale == "batch_std" and std > 1e-6:
        advantages = advantages / std  # minus a rounded mean, an exact 0 would not stay one
    return advantages if clamp is None else advantages.clamp(-clamp, clamp)


def turn_order(num_turns: int, order: str, rng: np.random.Generator) -> list[list[int]]:
    """The turns of every optimizer step: one each, or all in one."""
    turns = list(range(num_turns))
    return {"reverse": [[t] for t in reversed(turns)], "natural": [[t] for t in turns],
            "random": [[t] for t in rng.permutation(turns).tolist()], "together": [turns]}[order]


@torch.no_grad()
def turn_factor(log_ratio: Tensor, turn_id: Tensor, turn: int, pooling: str) -> Tensor:
    """The ratio of one turn of every row. Eq. 3

    log_ratio, turn_id (B, T) -> (B,), exactly 1 for a row without that turn
    """
    here = turn_id == turn
    total = torch.where(here, log_ratio.clamp(-20, 20), 0.0).sum(1)
    total = total if pooling == "product" else total / here.sum(1).clamp(min=1)
    return total.clamp(-20, 20).exp()


@torch.no_grad()
def multiply_weights(running: Tensor, factor: Tensor, episode_id: Tensor,
                     factor_clip: float | None = None) -> Tensor:
    """M / A after one more turn. Eq. 5

    running (E,), factor (B,), episode_id (B,) -> (E,); episodes without a row keep theirs
    """
    if factor_clip is not None:
        factor = factor.clamp(1 - factor_clip, 1 + factor_clip)
    running = running.index_copy(0, episode_id, running[episode_id] * factor)
    return running if factor_clip is None else running.clamp(1 - factor_clip, 1 + factor_clip)


# === 4. Loss =====================================================================================
def pooled_log_ratio(log_ratio: Tensor, turn_id: Tensor, pooling: str) -> Tensor:
    """The logarithm of the ratio r that every token is weighted with. Eq. 3

    log_ratio, turn_id (B, T) -> (B, T), 0 where turn_id is -1. token: its own; geometric,
    arithmetic: mean over its turn of l, or of exp(l); product: sum of l; geometric_stop_gradient:
    the value of geometric with the gradient of token.
    """
    log_ratio = torch.where(turn_id >= 0, log_ratio, 0.0).clamp(-20, 20)
    if pooling == "token":
        return log_ratio
    if pooling == "geometric_stop_gradient":
        geometric = pooled_log_ratio(log_ratio, turn_id, "geometric").detach()
        return geometric + log_ratio - log_ratio.detach()
    index = turn_id + 1  # column 0 takes what was not sampled
    zeros = log_ratio.new_zeros(len(index), int(index.max()) + 1)  # (B, K + 1)
    terms = log_ratio.exp() if pooling == "arithmetic" else log_ratio
    pooled = zeros.scatter_add(1, index, terms)
    if pooling != "product":
        pooled = pooled / zeros.scatter_add(1, index, torch.ones_like(terms)).clamp(min=1)
    pooled = pooled.gather(1, index).log() if pooling == "arithmetic" else pooled.gather(1, index)
    return torch.where(turn_id >= 0, pooled.clamp(-20, 20), 0.0)


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


@torch.no_grad()
def binding_clip(log_ratio: Tensor, advantages: Tensor, clip_low: float,
                 clip_high: float) -> Tensor:
    """Where the clipping stops the gradient; never where the advantage is 0. Eq. 4

    log_ratio, advantages (B, T) -> (B, T) bool
    """
    return ((advantages > 0) & (log_ratio > np.log1p(clip_high))) | (
        (advantages < 0) & (log_ratio < np.log1p(-clip_low)))


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


def turn_loss(batch: dict[str, Tensor], logprobs: Tensor, pooling: str, clip_epsilon: float,
              kl_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 4, and sums for the log; batch["weights"] sum to 1 over the step.

    logprobs (B, T); batch: old_logprobs, ref_logprobs, advantages (M on every token), turn_id,
    weights (B, T)
    """
    advantages, weights = batch["advantages"], batch["weights"]  # (B, T)
    log_ratio = torch.where(batch["turn_id"] >= 0, logprobs - batch["old_logprobs"], 0.0)
    pooled = pooled_log_ratio(log_ratio, batch["turn_id"], pooling)
    objective = clipped_objective(pooled, advantages, clip_epsilon, clip_epsilon)
    kl = kl_policy_ref_k3(logprobs, batch["ref_logprobs"])
    objective = objective - kl_coefficient * kl
    loss = -(weights * objective).sum()
    with torch.no_grad():
        parts = {"loss": -objective, "approx_kl": log_ratio.exp() - 1 - log_ratio,
                 "clip_fraction": binding_clip(pooled, advantages, clip_epsilon, clip_epsilon),
                 "ratio_drift": (pooled.exp() - 1).abs(), "kl_policy_ref_k3": kl}
        return loss, {name: (weights * values).sum() for name, values in parts.items()}


# === 5. Rows of a turn ===========================================================================
def rows_of_turns(batch: dict[str, Tensor], turns: list[int]) -> dict[str, Tensor]:
    """The rows that have one of the turns, cut after it, with the other turns' tokens unmarked."""
    here = torch.isin(batch["turn_id"], torch.tensor(turns, device=batch["turn_id"].device))
    positions = torch.arange(here.shape[1], device=here.device)
    marked = batch | {"turn_id": torch.where(here, batch["turn_id"], -1),
                      "lengths": torch.where(here, positions + 1, 0).amax(1)}
    return select_rows(marked, here.any(1).nonzero()[:, 0])


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on the rows of one turn (or of all)."""
    weights = aggregation_weights(batch["turn_id"], batch["episode_id"], "turn_mean")
    batch["weights"] = weights / all_reduce_sum(weights.sum())  # the only normalisation
    sums = torch.zeros(6, device=policy.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        with torch.no_grad():
            rows["ref_logprobs"] = (logprobs if reference is None
                                    else token_logprobs(reference, rows, args.temperature)[0])
        loss, stats = turn_loss(rows, logprobs, args.ratio_pooling, args.clip_epsilon,
                                args.kl_coefficient)
        loss.backward()
        sums += torch.stack([*stats.values(), (rows["weights"] * entropy).sum().detach()])
    names = ("loss", "approx_kl", "clip_fraction", "ratio_drift", "kl_policy_ref_k3", "entropy")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    if args.ratio_pooling == "token" and args.order != "together":
        stop("--ratio-pooling token needs --order together: a turn's weight is one number")
    with Run(args, "seeupo") as run:
        num_episodes = args.num_prompts * args.group_size  # E over all processes
        envs = make_envs(args, num_episodes // world_size())
        policy = load_policy(args)
        reference = copy.deepcopy(policy) if args.kl_coefficient else None
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        run.restore(policy, optimizer=optimizer)

        def evaluation():
            return evaluate(policy, run.eval_envs, args)

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)
            batch = collate(episodes, policy.device)

            # 2. score
            scores = all_gather(torch.tensor([e.total_reward for e in episodes],
                                             device=policy.device))
            garbage = all_gather(torch.tensor([bool(e.info.get("garbage")) for e in episodes],
                                              device=policy.device))
            rewards = task_reward(scores, garbage, args.reward_mapping)

            # 3. advantages (E,)
            group_id = torch.arange(num_episodes, device=policy.device) // args.group_size
            scale = "group_std" if args.advantage_scale == "group_std" else "none"
            advantages = scale_by_batch(group_relative_advantages(rewards, group_id, scale),
                                        args.advantage_scale, args.advantage_clamp)
            silent = (advantages.view(-1, args.group_size) == 0).all(1)
            advantages = advantages.split(len(episodes))[rank()]  # of this process

            # 4. update: one step per turn, and the weights for the next one
            updates, running = [], torch.ones_like(advantages)  # (E,) M / A
            turns_here = torch.tensor([max(len(e.turns) for e in episodes)])
            longest = all_gather(turns_here).amax().item()
            credit = torch.zeros(len(episodes), longest, device=policy.device)  # (E, K) M
            rng = random_stream(args.seed, DRAW, iteration)
            for turns in turn_order(longest, args.order, rng):
                rows = rows_of_turns(batch, turns)
                credit[:, turns] = (advantages * running)[:, None]
                rows["advantages"] = expand_to_tokens(credit, rows["turn_id"], rows["episode_id"])
                if not all_reduce_sum(rows["advantages"].abs().sum()):
                    continue  # nothing to learn from
                if args.ratio_base == "before_turn":
                    rows["old_logprobs"], _ = batch_logprobs(policy, rows, args)
                for _ in range(args.steps_per_turn):
                    updates.append(update(policy, reference, optimizer, rows, args))
                if args.sequential_weights and args.order != "together":
                    logprobs, _ = batch_logprobs(policy, rows, args)
                    factor = turn_factor(logprobs - rows["old_logprobs"], rows["turn_id"],
                                         turns[0], args.ratio_pooling)
                    running = multiply_weights(running, factor, rows["episode_id"],
                                               args.factor_clip)

            # 5. log (evaluation and checkpoints: run.iterations)
            batch["advantages"] = expand_to_tokens(credit, batch["turn_id"], batch["episode_id"])
            everyone = all_gather(running)
            metrics = {"groups_without_signal": silent.double().mean().item(),
                       "task_reward": rewards.mean().item(),
                       "garbage": garbage.double().mean().item(),
                       "weight_mean": everyone.mean().item(), "weight_min": everyone.min().item(),
                       "weight_max": everyone.max().item(), "weights_outside":
                       ((everyone < 0.8) | (everyone > 1.2)).double().mean().item()}
            run.log(iteration, episodes, metrics, updates, batch if updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
