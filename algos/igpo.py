"""IGPO: a turn is rewarded by how much it raised the policy's own belief in the right answer.

Paper: "Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn
Search Agents", arXiv 2510.14967v2. In training the right answer is known. Before every turn we let
the policy read this answer and take its probability. Source in brackets: equation of the paper.

    Eq. 1  l = mean_j log pi(a_j | context, "answer", a_<j)     mean over the answer's tokens  [3]
    Eq. 2  b_k = l, or exp(l)               belief before turn k, k = 0 .. K - 1    [3, or v1, code]
    Eq. 3  g_k = b_{k+1} - b_k              information gain; the last turn has none            [4]
    Eq. 4  z(g), z(outcome): z-scores of all gains of a group, and of its outcomes              [5]
    Eq. 5  r_k = z(g_k) before the last turn, z(outcome) on the last turn                       [5]
    Eq. 6  R_k = sum_{j >= k} discount^(j - k) r_j      advantage of every token of turn k      [6]
    Eq. 7  J = mean_e 1/|o_e| sum_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A)
               + c entropy                                                                      [7]

    b  beliefs (E, K)          g  information_gain (E, K)        r  turn_rewards (E, K)
    R  turn_returns (E, K)     w  ratio                          |o_e|  sampled tokens of episode e
    z  group_relative_advantages     e, k, t  episode, turn, token     a_j  a token of the answer

Changed from ms_grpo.py
    - an episode is one row with its whole history: the belief depends on what was found so far
    - every turn has its own advantage; gains differ even in a group without any success
    - every episode is trained on, none is drawn; the mean is over tokens, then over episodes

Deviations and choices
    D1  The outcome is the sum of the environment's rewards. Paper: F1 of the words, and a negative
        number for malformed output (official code: -2).
    D2  The answer is written in the form that the environment names as its `answer_template`, for
        example "answer Ada". Official code: a last thought, then the answer in tags.
    D3  z divides by std + 1e-6, with the std of the population; z is 0 where all values are equal.
        Official code: sqrt(var + 1e-8) + 1e-6. The paper does not say which std.
    D4  Eq. 7 takes the mean over the tokens of an episode, as in the paper. Official code: the sum.
    D5  No KL term (paper: weight 0.001) and no dual clip (official code: 3).
    D6  Two optimizer steps per batch (paper: one). A step without any signal is skipped.
    D7  --reward-source outcome is GRPO; it and information_gain are the paper's ablations.

    python algos/igpo.py        about 0.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn, attribute, start_episodes
from policies import Policy, load_policy, parse_args
from rollouts import collect_groups, groups_without_signal, make_envs
from run_folder import Run
from utils import (
    RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate, micro_batches, minibatches,
    optimizer_step, over_processes, stop, token_logprobs, turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/SearchQA-v0"  # an environment whose info holds the right "answer"
    learning_rate: float = 5e-4  # of AdamW, constant

    # Algorithm specific arguments
    reward_source: Literal["both", "outcome", "information_gain"] = "both"  # r, Eq. 5 (paper: both)
    belief: Literal["log_prob", "prob"] = "log_prob"  # b, Eq. 2 (paper: log_prob; its v1: prob)
    joint: bool = False  # one z-score for gains and outcomes together, Eq. 4 (paper: no; its v1)
    discount: float = 1.0  # of later turns in Eq. 6 (paper: 1)
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 7
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 7
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 7
    num_minibatches: int = 2  # optimizer steps per iteration


# === 3. Advantages ===============================================================================
@torch.no_grad()
def information_gain(beliefs: Tensor, turn_mask: Tensor) -> Tensor:
    """How much every turn but the last raised the belief. Eq. 3

    beliefs (E, K), turn_mask (E, K) bool -> (E, K), 0 on the last turn and after the end

    >>> played = torch.tensor([[True, True, True], [True, True, False]])
    >>> information_gain(torch.tensor([[-3.0, -4.0, -1.0], [-3.0, -2.0, 0.0]]), played)
    tensor([[-1.,  3.,  0.],
            [ 1.,  0.,  0.]])
    """
    gains = torch.zeros_like(beliefs)
    gains[:, :-1] = torch.where(turn_mask[:, 1:], beliefs[:, 1:] - beliefs[:, :-1], 0.0)
    return gains


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


@torch.no_grad()
def turn_rewards(gains: Tensor, outcomes: Tensor, turn_mask: Tensor, group_id: Tensor,
                 reward_source: str = "both", joint: bool = False) -> Tensor:
    """The reward of every turn: the z-score of its gain, on the last turn of the outcome. Eq. 4, 5

    gains (E, K), outcomes (E,), turn_mask (E, K), group_id (E,) -> (E, K), 0 after the end. The
    part that reward_source leaves out becomes 0 after the z-scores were taken. joint: gains and
    outcomes share one z-score, as in version 1 of the paper.

    >>> gains = torch.tensor([[3.0, 0.0], [1.0, 0.0]])  # A: 3, then a wrong answer; B: 1, right
    >>> turn_rewards(gains, torch.tensor([0.0, 1.0]), torch.ones(2, 2).bool(), torch.zeros(2))
    tensor([[ 1.0000, -1.0000],
            [-1.0000,  1.0000]])
    """
    last = turn_mask.clone()
    last[:, :-1] &= ~turn_mask[:, 1:]  # (E, K) the last turn of every episode
    raw = torch.where(last, outcomes[:, None], gains)
    pool = group_id[:, None] * 2 + (last & (not joint))  # gains are one pool, outcomes another
    rewards = torch.zeros_like(raw)
    rewards[turn_mask] = group_relative_advantages(raw[turn_mask], pool[turn_mask], correction=0)
    kept = {"both": turn_mask, "outcome": last, "information_gain": turn_mask & ~last}
    return torch.where(kept[reward_source], rewards, 0.0)


@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns. Eq. 6

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end

    >>> turn_returns(torch.tensor([[1.0, -1.0, 2.0]]), torch.ones(1, 3).bool(), discount=0.5)
    tensor([[1., 0., 2.]])
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += discount * returns[:, k + 1]
    return returns


# === 4. Loss =====================================================================================
def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float, entropy_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 7, and weighted means for the log.

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


# === 5. The belief ===============================================================================
def wrap_answer(policy: Policy, template: str, answer: str) -> tuple[list[int], set[int]]:
    """The tokens of the answer in its template, and the positions of those around the answer.

    The text is encoded as a whole, as the policy would write it: "answer" + " Ada", where the name
    has its space. Only the tokens of the name count in Eq. 1.
    """
    start = template.index("{answer}")
    ids, spans = policy.spell(template.replace("{answer}", answer))
    outside = {position for position, (first, last) in enumerate(spans)
               if last <= start or first >= start + len(answer)}
    if len(outside) == len(ids):
        stop(f"the right answer {answer!r} of the environment has no tokens: no belief in it")
    return ids, outside


def beliefs_before_turns(policy: Policy, episodes: list[Episode], template: str,
                         args: Args) -> Tensor:
    """The belief in the right answer before every turn played, episode by episode. Eq. 1, 2

    -> (N,) in double, N turns in all. A row for every turn: its context, then the answer as if the
    policy had given it there. The policy that sampled is asked, at the temperature of the sampling.
    """
    rows: dict[tuple, Episode] = {}  # equal ones once, so that equal beliefs are not rounded apart
    keys = []
    for episode in episodes:
        answer = episode.start_info.get("answer")
        if not isinstance(answer, str | int | float):
            stop(f"--env-id {args.env_id}, seed {episode.seed}: info['answer'] is {answer!r}")
        ids, outside = wrap_answer(policy, template, str(answer))
        context = []
        for turn in episode.turns:
            context = context + turn.prompt_ids
            said = Turn("", "", context, True, ids, [0.0] * len(ids), forced=outside)
            keys.append((*context, -1, *ids))
            rows.setdefault(keys[-1], Episode(episode.seed, "", [said]))
            context = context + turn.token_ids
    batch = collate(list(rows.values()), policy.device)
    logprobs, _ = batch_logprobs(policy, batch, args)  # (rows, T), 0 outside of the answer
    means = logprobs.double().sum(1) / (batch["turn_id"] >= 0).sum(1)
    number = {key: n for n, key in enumerate(rows)}
    means = means[[number[key] for key in keys]]  # (N,)
    return means.exp() if args.belief == "prob" else means


def belief_metrics(beliefs: Tensor, gains: Tensor, outcomes: Tensor, turn_mask: Tensor,
                   group_size: int) -> dict[str, float]:
    """Columns of the log: means over the episodes, groups and gains of all processes."""
    last = turn_mask.sum(1, keepdim=True).clamp(min=1) - 1
    table = all_gather(torch.stack([beliefs[:, 0], beliefs.gather(1, last)[:, 0], outcomes], 1))
    groups, gains = table[:, 2].view(-1, group_size), all_gather(gains[:, :-1][turn_mask[:, 1:]])
    equal = torch.isclose(groups.amin(1), groups.amax(1), 1e-6, 1e-6)
    return {"groups_of_equal_outcome": equal.double().mean().item(),
            "belief_start": table[:, 0].nanmean().item(),
            "belief_end": table[:, 1].nanmean().item(),
            "gain_mean": gains.sum().item() / max(len(gains), 1)}


# === 6. Update ===================================================================================
def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    mask = batch["turn_id"] >= 0
    batch["weights"] = mask / mask.sum(1, keepdim=True).clamp(min=1)  # mean over tokens of a row
    batch["weights"] /= all_reduce_sum(mask.any(1).sum()).clamp(min=1)  # .. and over episodes
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
    with Run(args, "igpo") as run:
        [env] = make_envs(args, 1)
        if "answer" not in start_episodes([env], [0])[0].start_info:
            stop(f"--env-id {args.env_id}: IGPO needs to know the right answer, and the "
                 "reset of the environment has none in info['answer']")
        template = attribute(env, "answer_template", "")  # how the policy would write the answer
        if "{answer}" not in str(template):
            stop(f"--env-id {args.env_id}: IGPO asks for the belief in a text such as 'answer "
                 f"{{answer}}'; its answer_template is {template!r}")
        envs, policy = make_envs(args), load_policy(args)
        if policy.thinks:
            stop(f"--model {args.model}: its prompt opens a thought, in which no answer is heard; "
                 "--template-kwargs may turn thinking off")
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)

        for iteration in run.iterations(policy, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score: what the episode earned, and how the belief in the answer went
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
            outcomes = rewards.sum(1)  # (E,)
            beliefs = torch.full_like(rewards, torch.nan)  # (E, K), nan where no turn was played
            beliefs[turn_mask] = beliefs_before_turns(policy, episodes, template, args)
            gains = information_gain(beliefs, turn_mask)

            # 3. advantages (E, K)
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            credit = turn_rewards(gains, outcomes, turn_mask, group_id, args.reward_source,
                                  args.joint)
            credit = turn_returns(credit, turn_mask, args.discount)

            # 4. update
            updates, batch = [], None
            for chosen in minibatches(group_id, credit, args.num_minibatches):
                batch = collate([episodes[i] for i in chosen], policy.device, credit[chosen])
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            run.log(iteration, episodes, updates, batch,
                    groups_without_signal=groups_without_signal(credit, args.group_size),
                    **belief_metrics(beliefs, gains, outcomes, turn_mask, args.group_size))
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
