"""UFO: answer, be told only "try again", answer again; the reward decays and repeats cost.

Paper: "A Simple 'Try Again' Can Elicit Multi-Turn LLM Reasoning", arXiv 2507.14295v2. An episode is
one problem with up to K answers; the feedback is unary, one fixed sentence after a wrong answer.

    Eq. 1  decay = base**n if solved else 0     n wrong answers before the right one           [9]
    Eq. 2  repeat = coefficient (1 - D / N)     D distinct answers out of N                    [10]
    Eq. 3  R = decay - repeat - format_penalty * malformed turns                               [11]
    Eq. 4  A = (R - mean_group R) / (std_group R + 1e-6)      --advantage group, for every turn
    Eq. 5  r_u = R at the episode's last token, minus kl_in_reward (log pi_old - log pi_ref)
    Eq. 6  A_u = r_u + V_{u+} - V_u + A_{u+}    --advantage gae (discount and lambda 1), then
                                                whitened over the batch; V_target = A + V
    Eq. 7  J = mean_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) - kl KL + c entropy  [8]
    Eq. 8  L_critic = 1/2 mean_t max((V - V_target)^2, (clip(V, V_old +- 0.5) - V_target)^2)

    R  scores (E,)      D, N  num_distinct, num_answers (E,)      w  exp(log_ratio)
    V  values (B, T)    u+    the next sampled token              [n] equation of the paper

Changed from ms_grpo.py
    - an episode is one row: what was tried is in the context
    - the score is made from the answers (Eq. 1-3), not from the environment's rewards
    - every episode is trained on; --advantage gae adds a critic, the paper's way

Deviations and choices
    D1  --advantage group by default: no second network (paper and code: PPO with GAE). With it
        kl_in_reward lowers R by the sum over the episode; --group-baseline turn compares a turn
        with those other episodes that came as far.
    D2  A malformed turn uses up an answer, an episode with one still pays for repeats (code: it
        does not, which pays malformed turns; --no-penalise-unfinished).
    D3  One answer per turn (code: several guesses). The reward is not shown (--feedback).
    D4  All groups are kept (--keep-groups; code: the quarter with the largest spread).
    D5  Two optimizer steps per batch; one without any signal is skipped.
    D6  n counts from 0: a right first answer earns 1 (the paper's ablation counts from 1).
    D7  No KL by default (code: --kl-in-reward 0.001).

    python algos/ufo.py        about 2 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, start_episodes
from policies import load_policy
from run_folder import Run
from utils import (
    Policy, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate, collect_groups, evaluate,
    expand_to_tokens, make_envs, micro_batches, optimizer_step, rank, select_rows, stop,
    token_logprobs, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/RetryMath-v0"  # info["submitted"], arguments max_answers, feedback
    max_turns: int = 5  # answers an episode may use in training, K
    max_turn_tokens: int = 9  # tokens the policy may sample in one turn
    learning_rate: float = 2e-4  # of AdamW, constant
    num_iterations: int = 60  # iterations of: collect episodes, update
    warm_start_steps: int = 500  # behaviour cloning steps of the tiny model before training
    eval_temperature: float = 0.5  # sampling temperature of the evaluation

    # Algorithm specific arguments
    advantage: Literal["group", "gae"] = "group"  # Eq. 4, or a critic and Eq. 5, 6
    group_baseline: Literal["episode", "turn"] = "episode"  # mean of all, or of those as far on
    decay: Literal["exponential", "linear", "constant"] = "exponential"  # Eq. 1; linear 1 - n / 5
    decay_base: float = 0.5  # of the exponential decay, Eq. 1
    repetition_penalty: float = 0.5  # coefficient in Eq. 2
    penalise_unfinished: bool = True  # Eq. 2 also for episodes with malformed turns
    format_penalty: float = 0.1  # per malformed turn, Eq. 3
    feedback: Literal["unary", "unary-reward", "blank"] = "unary"  # what follows a wrong answer
    keep_groups: float = 1.0  # share of the groups trained on, those of largest spread of R
    eval_turns: int = 5  # answers an episode may use in evaluation and demonstrations
    kl_in_reward: float = 0.0  # weight of the k1 estimate of KL(policy || start policy), Eq. 5
    kl_coefficient: float = 0.0  # weight of the same KL, estimator k3, in Eq. 7
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 7
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 7
    clip_high: float = 0.28  # clipping of the probability ratio from above, Eq. 7
    critic_learning_rate: float = 2e-3  # of the critic's AdamW, with --advantage gae
    num_epochs: int = 1  # passes over the episodes, in the same minibatches
    num_minibatches: int = 2  # optimizer steps per pass


VALUE_CLIP = 0.5  # in Eq. 8


# === 3. Advantages ===============================================================================
def count_answers(answers: list[list[str | None]]) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, distinct answers and malformed turns (None) of every episode. Eq. 2, 3

    Answers are the same if they differ in case and blanks only. -> three (E,) float
    """
    valid = [["".join(a.split()).lower() for a in episode if a is not None] for episode in answers]
    return (torch.tensor([len(episode) for episode in valid]).float(),
            torch.tensor([len(set(episode)) for episode in valid]).float(),
            torch.tensor([episode.count(None) for episode in answers]).float())


@torch.no_grad()
def decayed_success(solved: Tensor, num_answers: Tensor, schedule: str = "exponential",
                    base: float = 0.5) -> Tensor:
    """What solving is worth after num_answers - 1 wrong answers. Eq. 1

    solved (E,) bool, num_answers (E,) -> (E,) in [0, 1]; 0 if not solved
    """
    wrong = num_answers - 1
    worth = {"exponential": base**wrong, "linear": (1 - 0.2 * wrong).clamp(min=0),
             "constant": torch.ones_like(wrong)}[schedule]
    return torch.where(solved, worth, 0.0)


@torch.no_grad()
def repetition_penalty(num_answers: Tensor, num_distinct: Tensor, coefficient: float) -> Tensor:
    """The share of answers that only repeated an earlier one, times the coefficient. Eq. 2

    num_answers (E,), num_distinct (E,) -> (E,) >= 0; 0 without any answer
    """
    return coefficient * (num_answers - num_distinct) / num_answers.clamp(min=1)


@torch.no_grad()
def episode_scores(decayed: Tensor, penalty: Tensor, num_malformed: Tensor, finished: Tensor,
                   format_penalty: float, penalise_unfinished: bool = True) -> Tensor:
    """Decayed success minus the penalties. Eq. 3

    All (E,) -> (E,) <= 1. finished: solved, or every turn was an answer; else the official code
    forgets the repetition penalty (penalise_unfinished False).
    """
    penalty = penalty if penalise_unfinished else torch.where(finished, penalty, 0.0)
    return decayed - penalty - format_penalty * num_malformed


@torch.no_grad()
def group_advantages(scores: Tensor, group_id: Tensor, num_turns: Tensor, max_turns: int,
                     baseline: str = "episode", epsilon: float = 1e-6) -> Tensor:
    """Scores relative to their group, in units of its std, for every turn played. Eq. 4

    scores, group_id, num_turns (E,) -> (E, max_turns), 0 after the end. Baseline "episode": the
    group's mean; "turn": on turn k the mean of the others that have a turn k, 0 if none has.
    """
    played = torch.arange(max_turns, device=scores.device) < num_turns[:, None]  # (E, K)
    advantages = torch.zeros(played.shape, device=scores.device)
    for group in group_id.unique():
        members = group_id == group
        values, here = scores[members], played[members]  # (G,), (G, K)
        if len(values) < 2 or values.max() - values.min() <= 1e-6:  # sums of floats may differ
            continue
        means = values.mean()
        if baseline == "turn":
            others = here.sum(0) - 1  # (K,) peers of an episode that has this turn
            means = ((values[:, None] * here).sum(0) - values[:, None]) / others.clamp(min=1)
            here = here & (others > 0)
        centred = torch.where(here, values[:, None] - means, 0.0)
        advantages[members] = centred / (values.std(correction=1) + epsilon)
    return advantages


@torch.no_grad()
def select_groups(scores: Tensor, group_id: Tensor, keep_fraction: float) -> Tensor:
    """Keep the groups with the largest spread of scores (ties: the lower id), at least one.

    scores (E,), group_id (E,) -> (E,) bool: int(keep_fraction * groups) groups
    """
    groups = group_id.unique()  # ascending
    spread = torch.stack([scores[group_id == group].std(correction=1) for group in groups])
    count = max(1, int(keep_fraction * len(groups)))
    return torch.isin(group_id, groups[spread.argsort(descending=True, stable=True)[:count]])


@torch.no_grad()
def token_rewards(scores: Tensor, turn_id: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor,
                  kl_coefficient: float) -> Tensor:
    """The score on the last sampled token of every row, minus the KL estimate on each. Eq. 5

    scores (B,), turn_id, old_logprobs, ref_logprobs (B, T) -> (B, T), 0 where turn_id is -1
    """
    mask = turn_id >= 0
    rewards = torch.where(mask, -kl_coefficient * (old_logprobs - ref_logprobs), 0.0)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # no sampled token after it
    return rewards + last * scores[:, None]


@torch.no_grad()
def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0,
                   gae_lambda: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the sampled tokens only, and what V should be. Eq. 6

    rewards, values (B, T), mask (B, T) bool -> two (B, T), 0 off the mask
    """
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantages[:, t] = torch.where(here, delta + discount * gae_lambda * next_advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)  # what was not sampled is skipped
        next_advantage = torch.where(here, advantages[:, t], next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


@torch.no_grad()
def whiten(advantages: Tensor) -> Tensor:
    """Mean 0 and (unbiased) variance 1 over all sampled tokens of the batch. After Eq. 6

    advantages (N,) of the sampled tokens -> (N,); a single one becomes 0
    """
    centred = advantages - advantages.mean()
    variance = advantages.var(correction=1) if len(advantages) > 1 else torch.ones(())
    return centred / (variance + 1e-8).sqrt()


# === 4. Loss =====================================================================================
def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
                      dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate of every token, to be maximised. Eq. 7

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
    """Minus the objective of Eq. 7, and sums for the log; batch["weights"] are already divided.

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


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor,
               value_clip: float = VALUE_CLIP) -> Tensor:
    """Half the squared error, the larger of clipped and unclipped values. Eq. 8

    values, old_values, returns, weights (B, T) -> scalar; weights sum to 1 over the step
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (weights * errors).sum()


# === 5. The critic and the metrics ===============================================================
class Critic(torch.nn.Module):
    """A copy of the policy's network with a number instead of token scores at its end."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy, self.trunk = policy, copy.deepcopy(policy.model.base_model)
        self.head = torch.nn.Linear(policy.model.config.hidden_size, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight), torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The value (B, T) before every sampled token, from what stands before it; 0 elsewhere."""
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.policy.bf16):
            hidden = self.trunk(batch["tokens"], use_cache=False).last_hidden_state  # (B, T, D)
        before = self.head(hidden[:, :-1].float())[:, :, 0]  # (B, T - 1), not rounded to bf16
        values = torch.nn.functional.pad(before, (1, 0))
        return torch.where(batch["turn_id"] >= 0, values, 0.0)


@torch.no_grad()
def batch_values(critic: Critic, batch: dict[str, Tensor], args: Args) -> Tensor:
    """The critic's values of a batch of any size, without gradient: (B, T)."""
    values = torch.zeros_like(batch["old_logprobs"])
    numbered = batch | {"row": torch.arange(len(values), device=values.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[part["row"], : part["tokens"].shape[1]] = critic(part)
    return values


def answer_table(episodes: list[Episode]) -> Tensor:
    """What retry_metrics needs of every episode.

    -> (E, 6): turn of the right answer (from 1; inf if never), turns, valid answers, distinct
    ones, malformed turns, valid answers that are candidates of the problem
    """
    answers = [[turn.info["submitted"] for turn in e.turns] for e in episodes]
    num_turns = [len(e.turns) for e in episodes]
    right = [n if e.success else float("inf") for n, e in zip(num_turns, episodes, strict=True)]
    in_range = [sum(turn.info.get("in_range", False) for turn in e.turns) for e in episodes]
    columns = [torch.tensor(x).float() for x in (right, num_turns, in_range)]
    return torch.stack([*columns[:2], *count_answers(answers), columns[2]], dim=1)


@torch.no_grad()
def retry_metrics(table: Tensor, max_turns: int) -> dict[str, float]:
    """Success within k turns, and what the answers were like.

    table (E, 6) of answer_table. average_turns counts a failure as max_turns;
    conditional_success_k: of those unsolved after k - 1 turns, the share solved on turn k;
    identical_failure: of the failures with several answers, the share that never changed it.
    """
    right, num_turns, num_answers, num_distinct, num_malformed, in_range = table.double().T
    within = [(right <= k).double().mean().item() for k in range(max_turns + 1)]
    turns, several = range(1, max_turns + 1), num_answers >= 2
    failures = several & ~right.isfinite()
    return {f"success_at_{k}": within[k] for k in turns} | {
        f"conditional_success_{k}": (within[k] - within[k - 1]) / max(1 - within[k - 1], 1e-12)
        for k in turns[1:]} | {
        "average_turns": right.clamp(max=max_turns).mean().item(),
        "distinct_ratio": ((num_distinct / num_answers.clamp(min=1))[several].sum()
                           / several.sum().clamp(min=1)).item(),
        "identical_failure": ((num_distinct == 1)[failures].sum()
                              / failures.sum().clamp(min=1)).item(),
        "malformed_rate": (num_malformed.sum() / num_turns.sum().clamp(min=1)).item(),
        "in_range": (in_range.sum() / num_answers.sum().clamp(min=1)).item()}


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, critic: Critic | None,
           optimizer: torch.optim.Optimizer, critic_optimizer: torch.optim.Optimizer | None,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch, and one of the critic if there is one."""
    mask = batch["turn_id"] >= 0
    batch["weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)  # the only normalisation
    sums = torch.zeros(6, device=policy.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        with torch.no_grad():
            rows["ref_logprobs"] = (logprobs if reference is None
                                    else token_logprobs(reference, rows, args.temperature)[0])
        loss, stats = policy_loss(rows, logprobs, entropy, args.clip_low, args.clip_high, None,
                                  args.entropy_coefficient, args.kl_coefficient)
        loss.backward()
        error = torch.zeros_like(loss)
        if critic is not None:
            error = value_loss(critic(rows), rows["values"], rows["returns"], rows["weights"])
            error.backward()
        sums += torch.stack([*stats.values(), error.detach()])
    names = ("loss", "entropy", "clip_fraction", "approx_kl", "kl_policy_ref_k3", "value_loss")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    if critic is not None:
        optimizer_step(critic, critic_optimizer, args.max_grad_norm)
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    with Run(args, "ufo") as run:
        if "submitted" not in start_episodes(run.eval_envs[:1], [0])[0].start_info:
            stop(f"--env-id {args.env_id}: UFO needs to know what was answered, and the "
                 "environment has no info['submitted']")
        if {"max_answers", "feedback"} & json.loads(args.env_kwargs).keys():
            stop("--env-kwargs: --max-turns, --eval-turns set max_answers, --feedback feedback")
        # the environment is told how many answers it allows, in training and in evaluation
        training, playing = (dataclasses.replace(args, max_turns=answers, env_kwargs=json.dumps(
            json.loads(args.env_kwargs) | {"max_answers": answers, "feedback": args.feedback}))
            for answers in (args.max_turns, args.eval_turns))
        num_episodes = args.num_prompts * args.group_size  # E over all processes
        envs = make_envs(training, num_episodes // world_size())
        run.eval_envs = make_envs(playing, len(run.eval_envs), evaluation=True)
        policy = load_policy(playing)
        reference = copy.deepcopy(policy) if args.kl_coefficient or args.kl_in_reward else None
        critic = Critic(policy) if args.advantage == "gae" else None
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        state = {"optimizer": optimizer}
        if critic is not None:
            state |= {"critic": critic, "critic_optimizer": torch.optim.AdamW(
                critic.parameters(), args.critic_learning_rate, weight_decay=0)}
        run.restore(policy, **state)

        def evaluation():
            metrics, played = evaluate(policy, run.eval_envs, playing)
            table = all_gather(answer_table(played))
            return metrics | retry_metrics(table, args.eval_turns), played

        for iteration in run.iterations(policy, evaluation, **state):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, training, iteration)

            # 2. score: from the answers, not from the environment's rewards
            table = answer_table(episodes).to(policy.device)  # (E, 6)
            first_right, num_turns, num_answers, num_distinct, num_malformed, _ = table.T
            solved = first_right.isfinite()
            decayed = decayed_success(solved, num_answers, args.decay, args.decay_base)
            penalty = repetition_penalty(num_answers, num_distinct, args.repetition_penalty)
            scores = episode_scores(decayed, penalty, num_malformed, solved | (num_malformed == 0),
                                    args.format_penalty, args.penalise_unfinished)

            # 3. advantages (B, T)
            batch = collate(episodes, policy.device)
            mask, episode_id = batch["turn_id"] >= 0, batch["episode_id"]
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            group = group_id + rank() * len(episodes) // args.group_size  # (E,), over all
            ref_logprobs = batch["old_logprobs"]
            if args.kl_in_reward:
                ref_logprobs, _ = batch_logprobs(reference, batch, args)
            rewards = token_rewards(scores[episode_id], batch["turn_id"], batch["old_logprobs"],
                                    ref_logprobs, args.kl_in_reward)
            if critic is None:
                totals = torch.zeros_like(scores).index_add(0, episode_id, rewards.sum(1))
                credit = group_advantages(totals, group_id, num_turns, args.max_turns,
                                          args.group_baseline)  # (E, K)
                batch["advantages"] = expand_to_tokens(credit, batch["turn_id"], episode_id)
            else:
                batch["values"] = batch_values(critic, batch, args)
                advantages, batch["returns"] = gae_advantages(rewards, batch["values"], mask)
                shares = all_gather(mask.sum()[None]).tolist()
                white = whiten(all_gather(advantages[mask])).split(shares)[rank()]
                batch["advantages"] = advantages.masked_scatter(mask, white)
            everyone = all_gather(torch.stack([group.float(), scores], dim=1))
            kept = select_groups(everyone[:, 1], everyone[:, 0], args.keep_groups)
            kept = kept.split(len(episodes))[rank()]  # (E,)

            # 4. update; the groups of all processes are dealt out to the minibatches
            updates = []
            for part in list(range(args.num_minibatches)) * args.num_epochs:
                here = (group % args.num_minibatches == part) & kept
                rows = select_rows(batch, here[episode_id].nonzero()[:, 0])
                if not all_reduce_sum(rows["advantages"].abs().sum()):
                    continue  # nothing to learn from
                updates.append(update(policy, reference, critic, optimizer,
                                      state.get("critic_optimizer"), rows, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            everyone = all_gather(torch.cat([table, torch.stack(
                [scores, decayed, penalty], dim=1)], dim=1))
            spread = everyone[:, 6].view(-1, args.group_size)
            silent = spread.amax(1) - spread.amin(1) <= 1e-6
            metrics = {f"train_{name}": value for name, value in
                       retry_metrics(everyone[:, :6], args.max_turns).items()}
            metrics |= {"score": everyone[:, 6].mean().item(),
                        "decay_part": everyone[:, 7].mean().item(),
                        "repetition_part": everyone[:, 8].mean().item(),
                        "groups_without_signal": silent.double().mean().item()}
            if critic is not None:
                error = all_gather((batch["returns"] - batch["values"])[mask]).var()
                total = all_gather(batch["returns"][mask]).var()
                metrics["explained_variance"] = (1 - error / total).item() if total > 1e-4 else 0.0
            run.log(iteration, episodes, metrics, updates, batch if updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
