"""GiGPO: a turn is also compared with the other turns of its group that saw the same observation.

Paper: Feng, Xue, Liu and An, "Group-in-Group Policy Optimization for LLM Agent Training",
arXiv 2505.10978v3. All episodes of a group start from the same state, so some of them come to the
same state again: an anchor. What was done there is compared like answers to one question. Source in
brackets: equation of the paper.

    Eq. 1  R_e = sum_k r_{e,k}                          return of episode e
    Eq. 2  A_E(e) = (R_e - mean R) / F                  over the episodes of the group           [3]
    Eq. 3  R_{e,k} = sum_{j >= k} discount^(j - k) r_{e,j}                                       [5]
    Eq. 4  A_S(e,k) = (R_{e,k} - mean) / F              over the turns of the group with the same
                                                        observation: the anchor group         [6, 7]
    Eq. 5  A_{e,k} = A_E(e) + step_weight A_S(e,k)      for every token of the turn              [8]
    Eq. 6  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + c entropy           [9]

    R_e  rewards.sum(1)     R_{e,k}  turn_returns     A_E, A_S  relative_scores     F  1, or the std
    A_{e,k}  anchored_advantages     w_t  ratio     e, k, t  episode, turn, token

Changed from ms_grpo.py
    - every turn has its own advantage; its group is that of its observation
    - every episode is trained on, none is drawn
    - F = 1 is a choice; the controls of ms_grpo.py are not here

Deviations and choices
    D1  The anchor is the text of the observation, compared exactly. Official code: also by
        similarity (difflib), which is off by default.
    D2  A_E takes the mean over episodes, as in the paper. Official code, by default in earlier
        versions: over turns, so that long episodes count more.
    D3  No KL term (paper: weight 0.01). Penalties for unreadable actions are part of the rewards.
    D4  --anchors none is a control: all turns of a group are compared with each other.
    D5  Ratio and mean per token, as in the official code (paper: per action). The entropy bonus is
        ours.
    D6  Earlier turns are not shown by default (paper: the last two).

    python algos/gigpo.py        about 0.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode
from policies import Policy, load_policy, parse_args
from rollouts import collect_groups, groups_without_signal, make_envs
from run_folder import Run
from utils import (
    RunArgs, all_gather, all_reduce_sum, collate, micro_batches, minibatches, optimizer_step,
    over_processes, stop, token_logprobs, turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    num_iterations: int = 15  # iterations of: collect episodes, update
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    step_weight: float = 1.0  # of A_S in Eq. 5 (paper: 1; 0 is episode credit alone)
    anchors: Literal["observation", "none"] = "observation"  # of Eq. 4; none: any turn of the group
    scale: Literal["std", "none"] = "std"  # F of Eq. 2 and 4 (paper: std, or none, which is F = 1)
    discount: float = 0.95  # of later rewards in Eq. 3 (paper: 0.95)
    history_turns: int | None = 0  # earlier turns the policy sees; None: all, as one growing row
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 6
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 6
    entropy_coefficient: float = 0.01  # weight of the entropy bonus, c in Eq. 6
    num_minibatches: int = 2  # optimizer steps per iteration
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"history_turns"}


# === 3. Advantages ===============================================================================
@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns. Eq. 3

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end

    >>> turn_returns(torch.tensor([[1.0, -1.0, 2.0]]), torch.ones(1, 3).bool(), discount=0.5)
    tensor([[1., 0., 2.]])
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += discount * returns[:, k + 1]
    return returns


@torch.no_grad()
def relative_scores(scores: Tensor, group_id: Tensor, scale: str) -> Tensor:
    """Scores relative to the mean of their group; std: in units of its std. Eq. 2, 4

    scores (N,), group_id (N,) -> (N,); 0 in a group of one or of scores within 1e-6 (1 + |max|)

    >>> relative_scores(torch.tensor([3.0, 1.0, 5.0]), torch.tensor([0, 0, 1]), "none")
    tensor([ 1., -1.,  0.])
    """
    relative = torch.zeros_like(scores)
    for group in group_id.unique():
        members = group_id == group
        values = scores[members]
        if not torch.allclose(values, values.max(), 1e-6, 1e-6):  # sums of floats are rounded
            std = values.std() + 1e-6 if scale == "std" else 1.0
            relative[members] = (values - values.mean()) / std
    return relative


def anchor_groups(episodes: list[Episode], group_size: int, anchors: str) -> Tensor:
    """The anchor group of every turn played, episode by episode: (N,) integers.

    Turns are in one group if their episodes are and they saw the same observation; with anchors
    none, if their episodes are.
    """
    keys = [(number // group_size, turn.observation if anchors == "observation" else "")
            for number, episode in enumerate(episodes) for turn in episode.turns]
    first = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([first[key] for key in keys], dtype=torch.long)


@torch.no_grad()
def anchored_advantages(rewards: Tensor, turn_mask: Tensor, group_id: Tensor, anchor_id: Tensor,
                        discount: float, step_weight: float, scale: str) -> Tensor:
    """What every turn is credited with: its episode's and its own relative return. Eq. 5

    rewards (E, K), 0 after the end, turn_mask (E, K), group_id (E,), anchor_id (N,) of the turns
    played -> (E, K), 0 after the end

    >>> rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # both see X; then one sees Y, one sees Z
    >>> args = (torch.ones(2, 2).bool(), torch.zeros(2), torch.tensor([0, 1, 0, 2]))
    >>> anchored_advantages(rewards, *args, discount=0.5, step_weight=1.0, scale="none")
    tensor([[ 0.7500,  0.5000],
            [-0.7500, -0.5000]])
    """
    episode = relative_scores(rewards.sum(1), group_id, scale)  # (E,) A_E
    advantages = torch.where(turn_mask, episode[:, None], 0.0)
    returns = turn_returns(rewards, turn_mask, discount)
    advantages[turn_mask] += step_weight * relative_scores(returns[turn_mask], anchor_id, scale)
    return advantages


# === 4. Loss =====================================================================================
def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float, entropy_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 6, and weighted means for the log.

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
        sums |= {name: sums[name] + x.detach() for name, x in parts.items()}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    with Run(args, "gigpo") as run:
        envs, policy = make_envs(args), load_policy(args, args.history_turns)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)

        for iteration in run.iterations(policy, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)

            # 3. advantages (E, K)
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            anchor_id = anchor_groups(episodes, args.group_size, args.anchors).to(policy.device)
            credit = anchored_advantages(rewards, turn_mask, group_id, anchor_id, args.discount,
                                         args.step_weight, args.scale)

            # 4. update
            updates, batch = [], None
            for chosen in minibatches(group_id, credit, args.num_minibatches):
                batch = collate([episodes[i] for i in chosen], policy.device, credit[chosen])
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            partners = all_gather(torch.bincount(anchor_id)[anchor_id] > 1)  # (N,)
            run.log(iteration, episodes, updates, batch,
                    groups_without_signal=groups_without_signal(credit, args.group_size),
                    anchored_turns=partners.double().mean().item())
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
