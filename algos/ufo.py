"""UFO: answer, be told only "try again", answer again; the reward decays and repeats cost.

Paper: "A Simple 'Try Again' Can Elicit Multi-Turn LLM Reasoning", arXiv 2507.14295v2 [paper], and
its repository [code]. An episode is one problem with up to K answers. The feedback is unary: after
a wrong answer the policy reads one fixed sentence, which says no more than "wrong".

    Eq. 1  decay = base**n if solved, else 0      n wrong answers before the right one   [paper 9]
    Eq. 2  repeat = coefficient (1 - D / N)       D distinct answers out of N           [paper 10]
    Eq. 3  R = decay - repeat - format_penalty * malformed turns                        [paper 11]
    Eq. 4  A = (R - mean_group R) / (std_group R + 1e-6)      for every turn                [ours]
    Eq. 5  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + c entropy   [paper 8]

    R  scores (E,)      D, N  num_distinct, num_answers (E,)      w_t  ratio      t  token

Changed from ms_grpo.py
    - an episode is one row: the policy sees what it has tried
    - the score is made from the answers (Eq. 1-3), not from the environment's rewards
    - every episode is trained on, none is drawn

Deviations and choices
    D1  Eq. 4 compares an episode with its group. The paper's runs use PPO with a critic and GAE
        instead (discount and lambda 1): for a critic see st_ppo.py.
    D2  There is no KL term, and every group is trained on. The code has a KL of weight 0.001 in its
        reward, and trains on the quarter of the groups whose scores differ most.
    D3  A malformed turn uses up an answer, and the other answers of its episode still pay for
        repeats. In the code they do not, so that a malformed turn can raise the score.
    D4  A turn has one answer, and the policy is not shown its reward. The code takes up to five
        answers per turn and shows the reward.
    D5  n counts from 0: a right first answer earns 1. So does the code; the paper's ablation counts
        from 1.
    D6  Two optimizer steps per iteration (code: four). A step without any signal is skipped.

    python algos/ufo.py        about 1 minute on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, start_episodes
from policies import Policy, load_policy, parse_args
from rollouts import collect_groups, evaluate, groups_without_signal, make_envs
from run_folder import Run
from utils import (
    RunArgs, all_gather, all_reduce_sum, collate, micro_batches, minibatches, optimizer_step,
    over_processes, stop, token_logprobs, turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/RetryMath-v0"  # info["submitted"], an argument max_answers
    max_turns: int = 5  # answers an episode may use in training, K
    max_turn_tokens: int = 9  # tokens the policy may sample in one turn
    learning_rate: float = 3e-4  # of AdamW, constant
    eval_temperature: float = 0.5  # sampling temperature of the evaluation

    # Algorithm specific arguments
    decay_base: float = 0.5  # base of the decay, Eq. 1; 1: no decay
    repetition_penalty: float = 0.5  # coefficient in Eq. 2
    format_penalty: float = 0.1  # for every malformed turn, Eq. 3
    eval_max_turns: int = 5  # answers an episode may use in evaluation and demonstrations
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 5
    clip_high: float = 0.28  # clipping of the probability ratio from above, Eq. 5
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 5
    num_minibatches: int = 2  # optimizer steps per iteration


# === 3. Advantages ===============================================================================
def count_answers(answers: list[list[str | None]]) -> tuple[Tensor, Tensor, Tensor]:
    """The number of answers, distinct answers and malformed turns. Eq. 2, 3

    answers: of every episode, None for a malformed turn -> three (E,) float. Answers that differ
    only in case and blanks are the same.

    >>> count_answers([["7", "7", None, "9"], ["Blue", " blue"]])
    (tensor([3., 2.]), tensor([2., 1.]), tensor([1., 0.]))
    """
    valid = [["".join(a.split()).lower() for a in episode if a is not None] for episode in answers]
    return (torch.tensor([len(episode) for episode in valid]).float(),
            torch.tensor([len(set(episode)) for episode in valid]).float(),
            torch.tensor([episode.count(None) for episode in answers]).float())


@torch.no_grad()
def decayed_success(solved: Tensor, num_answers: Tensor, base: float) -> Tensor:
    """What solving is worth after n = num_answers - 1 wrong answers. Eq. 1

    solved (E,) bool, num_answers (E,) -> (E,) in [0, 1], 0 if not solved

    >>> solved = torch.tensor([True, True, False])
    >>> decayed_success(solved, torch.tensor([1.0, 3.0, 5.0]), 0.5)  # 0.5**0, 0.5**2, not solved
    tensor([1.0000, 0.2500, 0.0000])
    """
    return torch.where(solved, base ** (num_answers - 1), 0.0)


@torch.no_grad()
def repetition_penalty(num_answers: Tensor, num_distinct: Tensor, coefficient: float) -> Tensor:
    """The share of the answers that repeat an earlier one, times the coefficient. Eq. 2

    num_answers (E,), num_distinct (E,) -> (E,) >= 0, 0 without any answer

    >>> num_answers, num_distinct = torch.tensor([5.0, 5.0, 0.0]), torch.tensor([5.0, 1.0, 0.0])
    >>> repetition_penalty(num_answers, num_distinct, 0.5)  # 0.5 (1 - 1/5) in the second
    tensor([0.0000, 0.4000, 0.0000])
    """
    return coefficient * (num_answers - num_distinct) / num_answers.clamp(min=1)


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


# === 5. The answers ==============================================================================
def allow_answers(args: Args, count: int) -> Args:
    """The same flags for episodes of up to count answers: the environment is told the number."""
    kwargs = json.loads(args.env_kwargs) | {"max_answers": count}
    return dataclasses.replace(args, max_turns=count, env_kwargs=json.dumps(kwargs))


def answer_table(episodes: list[Episode]) -> Tensor:
    """What the scores and retry_metrics need to know of every episode.

    -> (E, 6) in double: turn of the right answer (from 1; inf if there is none), number of turns,
    of answers, of distinct answers, of malformed turns, of answers that are candidates
    """
    answers = [[turn.info.get("submitted") for turn in e.turns] for e in episodes]
    answers = [[None if text is None else str(text) for text in row] for row in answers]
    num_turns = [len(e.turns) for e in episodes]
    right = [n if e.success else float("inf") for n, e in zip(num_turns, episodes, strict=True)]
    in_range = [sum(turn.info.get("in_range", False) for turn in e.turns) for e in episodes]
    columns = [torch.tensor(x).float() for x in (right, num_turns, in_range)]
    return torch.stack([*columns[:2], *count_answers(answers), columns[2]], dim=1).double()


@torch.no_grad()
def retry_metrics(table: Tensor, max_turns: int) -> dict[str, float]:
    """The share of episodes solved within k turns, and what the answers were like.

    table (E, 6) of answer_table. average_turns counts a failure as max_turns. distinct_ratio is the
    mean D / N of episodes with several answers; identical_failure is the share of the failures
    among them in which all answers were the same.
    """
    right, num_turns, num_answers, num_distinct, num_malformed, in_range = table.T
    several = num_answers >= 2
    failures = several & ~right.isfinite()
    within = {f"success_at_{k}": (right <= k).double().mean() for k in range(1, max_turns + 1)}
    return {name: value.item() for name, value in within.items()} | {
        "average_turns": right.clamp(max=max_turns).mean().item(),
        "distinct_ratio": ((num_distinct / num_answers.clamp(min=1))[several].sum()
                           / several.sum().clamp(min=1)).item(),
        "identical_failure": ((num_distinct == 1)[failures].sum()
                              / failures.sum().clamp(min=1)).item(),
        "malformed_rate": (num_malformed.sum() / num_turns.sum().clamp(min=1)).item(),
        "in_range": (in_range.sum() / num_answers.sum().clamp(min=1)).item()}


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
    with Run(args, "ufo") as run:
        if "submitted" not in start_episodes(run.eval_envs[:1], [0])[0].start_info:
            stop(f"--env-id {args.env_id}: UFO needs to know what was answered, and the "
                 "environment has no info['submitted']")
        if "max_answers" in json.loads(args.env_kwargs):
            stop("--env-kwargs: --max-turns and --eval-max-turns set max_answers")
        training, playing = (allow_answers(args, n) for n in (args.max_turns, args.eval_max_turns))
        envs, policy = make_envs(training), load_policy(playing)
        run.eval_envs = make_envs(playing, len(run.eval_envs), evaluation=True)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)

        def evaluation():
            metrics, played = evaluate(policy, run.eval_envs, playing)
            table = all_gather(answer_table(played))
            return metrics | retry_metrics(table, args.eval_max_turns), played

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, training, iteration)

            # 2. score: from the answers, not from the environment's rewards
            table = answer_table(episodes).to(policy.device)  # (E, 6)
            first_right, _, num_answers, num_distinct, num_malformed, _ = table.T
            decayed = decayed_success(first_right.isfinite(), num_answers, args.decay_base)
            penalty = repetition_penalty(num_answers, num_distinct, args.repetition_penalty)
            scores = decayed - penalty - args.format_penalty * num_malformed  # Eq. 3

            # 3. advantages (E, K)
            _, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            advantages = group_relative_advantages(scores, group_id)  # (E,)
            credit = torch.where(turn_mask, advantages[:, None], 0.0)

            # 4. update
            updates, batch = [], None
            for chosen in minibatches(group_id, credit, args.num_minibatches):
                batch = collate([episodes[i] for i in chosen], policy.device, credit[chosen])
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            retries = retry_metrics(all_gather(table), args.max_turns)
            run.log(iteration, episodes, updates, batch,
                    groups_without_signal=groups_without_signal(credit, args.group_size),
                    score=all_gather(scores).mean().item(),
                    repetition_part=all_gather(penalty).mean().item(),
                    **{f"train_{name}": value for name, value in retries.items()})
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
