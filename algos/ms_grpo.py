"""MS-GRPO: every turn of an episode is credited with the whole episode's group-relative return.

Paper: Dilkes, Yazdanpanah and Stein, "Reinforced Language Models for Sequential Decision Making",
arXiv 2508.10839v1. A reconstruction from its abstract [paper] and the first author's public
repositories [code]: the body and the training code were not available.

The policy is memoryless: each turn is answered from the current observation alone, so an episode
of K turns is K training rows. The G episodes of a group start from the same environment seed.

    Eq. 1  R_e = sum_k r_{e,k}                undiscounted, penalties included            [paper]
    Eq. 2  A_e = (R_e - mean_group R) / (std_group R + 1e-6)                               [code]
    Eq. 3  A_{e,k,t} = A_e                    for every turn and sampled token            [paper]
    Eq. 4  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + c H - kl KL   [code]
    Eq. 5  p_e = |A_e| / sum_e' |A_e'|        M of E episodes are drawn    [paper; formula: ours]

    R_e  rewards.sum(1)     A_e  group_relative_advantages     p_e  draw_episodes
    w_t  ratio     H  entropy     M  episodes_per_update     e, k, t  episode, turn, token

Deviations and choices
    D1  Eq. 5: M = E / 2, with replacement, no importance correction. The paper names the idea only.
    D2  Episodes of advantage 0 (so all of a group of equal returns) are never drawn, in any arm.
    D3  Minibatches are made of drawn episodes, not of shuffled turns.
    D4  --credit return_to_go and step are controls, not the paper's method.
    D5  Entropy coefficient 0.01 (code: 0.001), no dual clip (code: 3). KL is off, as in the code.

    python algos/ms_grpo.py        about 1 minute on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from policies import Policy, load_policy, parse_args, twin
from rollouts import collect_groups, groups_without_signal, make_envs
from run_folder import Run
from utils import (
    DRAW, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate, micro_batches,
    optimizer_step, over_processes, random_stream, rank, stop, token_logprobs, turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    # Algorithm specific arguments
    sampling: Literal["aaw", "uniform", "all"] = "aaw"  # draw by |A| (Eq. 5), evenly, or all
    episodes_per_update: int | None = None  # M in Eq. 5; default: half of the episodes collected
    credit: Literal["episode", "return_to_go", "step"] = "episode"  # of a turn: Eq. 3, or a control
    history_turns: int | None = 0  # earlier turns the policy sees; None: all, as one growing row
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 4
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 4
    entropy_coefficient: float = 0.01  # weight of the entropy bonus, c in Eq. 4
    kl_coefficient: float = 0.0  # weight of KL(policy || start policy), kl in Eq. 4
    num_minibatches: int = 2  # optimizer steps per iteration
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"history_turns"}


# === 3. Advantages ===============================================================================
@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, correction: int = 1) -> Tensor:
    """Scores relative to the mean of their group, in units of its std. Eq. 2

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


@torch.no_grad()
def turn_advantages(rewards: Tensor, turn_mask: Tensor, group_id: Tensor, credit: str) -> Tensor:
    """What every turn is credited with: its episode's advantage, Eq. 3, or a control.

    rewards (E, K), 0 after the end, turn_mask (E, K), group_id (E,) -> (E, K), 0 after the end. The
    controls compare a turn's return to go, or its own reward, with all turns of its group.

    >>> played = torch.tensor([[True, True], [True, False]])
    >>> turn_advantages(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), played, torch.zeros(2), "episode")
    tensor([[ 0.7071,  0.7071],
            [-0.7071,  0.0000]])
    """
    if credit == "episode":
        advantages = group_relative_advantages(rewards.sum(1), group_id)  # (E,)
        return torch.where(turn_mask, advantages[:, None], 0.0)
    values = rewards.flip(1).cumsum(1).flip(1) if credit == "return_to_go" else rewards
    group_of_turn = group_id[:, None].expand_as(rewards)
    advantages = torch.zeros_like(rewards)
    advantages[turn_mask] = group_relative_advantages(values[turn_mask], group_of_turn[turn_mask])
    return advantages


def draw_episodes(advantages: Tensor, sampling: str, count: int,
                  rng: np.random.Generator) -> np.ndarray:
    """The episodes to train on, drawn in proportion to |advantage|. Eq. 5

    advantages (E,) -> (count,) int, without those of advantage 0; all: each of the others once

    >>> draw_episodes(torch.tensor([0.0, 0.5, -1.5]), "aaw", 8, np.random.default_rng(1))
    array([2, 2, 1, 2, 2, 2, 2, 2])
    """
    weights = advantages.abs().double().cpu().numpy()
    if sampling != "aaw":
        weights = (weights > 0).astype(float)
    if not weights.any():
        return np.zeros(0, dtype=int)
    once = sampling == "all"
    count = np.count_nonzero(weights) if once else count
    return rng.choice(len(weights), count, replace=not once, p=weights / weights.sum())


# === 4. Loss =====================================================================================
def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float, entropy_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 4, and weighted means for the log.

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


def kl_policy_ref_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from the policy's own samples, >= 0 for every token.

    logprobs, ref_logprobs (B, T) -> (B, T). Its gradient is that of KL(reference || policy).

    >>> kl_policy_ref_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # 1/2 - ln 1/2 - 1
    tensor([0.1931])
    """
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    return difference.exp() - difference - 1


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch; reference: the start policy, if there is a KL term."""
    mask = batch["turn_id"] >= 0
    batch["weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)  # mean over sampled tokens
    sums = dict.fromkeys(("loss", "entropy", "clip_fraction", "approx_kl", "kl_policy_ref_k3"),
                         torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        loss, parts = policy_loss(rows, logprobs, entropy, args.clip_low, args.clip_high,
                                  args.entropy_coefficient)
        if reference is not None:
            ref_logprobs, _ = batch_logprobs(reference, rows, args)
            kl = (rows["weights"] * kl_policy_ref_k3(logprobs, ref_logprobs)).sum()
            loss = loss + args.kl_coefficient * kl
            parts |= {"loss": loss, "kl_policy_ref_k3": kl}
        loss.backward()
        sums |= {name: sums[name] + x.detach() for name, x in parts.items()}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    with Run(args, "ms_grpo") as run:
        envs, policy = make_envs(args), load_policy(args, args.history_turns)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        reference = twin(policy) if args.kl_coefficient else None
        num_drawn = args.episodes_per_update or args.num_prompts * args.group_size // 2

        for iteration in run.iterations(policy, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)

            # 3. advantages (E, K); the draw goes by the episode's own, whatever --credit
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            credit = turn_advantages(rewards, turn_mask, group_id, args.credit)
            advantages = all_gather(group_relative_advantages(rewards.sum(1), group_id))
            drawn = draw_episodes(advantages, args.sampling, num_drawn,
                                  random_stream(args.seed, DRAW, iteration))

            # 4. update; an episode that was drawn twice is in the batch twice
            updates, batch = [], None
            parts = min(args.num_minibatches, len(drawn))
            for minibatch in np.array_split(drawn, parts) if parts else []:
                here = minibatch[minibatch // len(episodes) == rank()] % len(episodes)
                batch = collate([episodes[i] for i in here], policy.device, credit[here])
                updates.append(update(policy, reference, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            run.log(iteration, episodes, updates, batch,
                    groups_without_signal=groups_without_signal(advantages, args.group_size),
                    drawn_advantage=advantages[drawn].mean().item(),
                    drawn_size=advantages[drawn].abs().mean().item())
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
