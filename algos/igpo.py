"""IGPO: a turn is rewarded by how much it raised the policy's own belief in the right answer.

Paper: "Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn
Search Agents", arXiv 2510.14967v2. Before every turn the policy is asked, by teacher forcing, how
likely it thinks the known right answer is. Equations are numbered here; the source follows.

    Eq. 1  l = mean_j log pi(a_j | context, "answer", a_<j)     mean over the answer's tokens  [3]
    Eq. 2  b_k = l, or exp(l)               belief before turn k, k = 0 .. K - 1      [3; v1, code]
    Eq. 3  g_k = b_{k+1} - b_k              information gain; the last turn has none            [4]
    Eq. 4  separate: z-score the gains of a group, and its outcomes apart from them             [5]
           joint: z-score both together                                             [v1, appendix]
    Eq. 5  r_k = z(g_k) before the last turn, z(outcome) on the last turn                       [5]
    Eq. 6  R_k = sum_{j >= k} gamma^(j - k) r_j      advantage of every token of turn k         [6]
    Eq. 7  J = mean_e 1/|o_e| sum_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A)
               - kl KL + c entropy                                                              [7]

    b  beliefs (E, K)          g  information_gain (E, K)        r  turn_rewards (E, K)
    R  turn_returns (E, K)     w  exp(log_ratio)                 |o_e|  sampled tokens of episode e
    [n]  equation of the paper

Changed from ms_grpo.py
    - an episode is one row with its whole history: the belief needs what was found out so far
    - the advantage is per turn, and dense: gains need no success in the group
    - every episode is trained on, none is drawn

Deviations and choices
    D1  Outcome: the environment's summed rewards (paper: word F1, malformed output negative).
    D2  The answer stands in the form the environment names as its `answer_template`, "answer Ada".
    D3  Values of a group equal within 1e-6 get exactly 0; otherwise z divides by std + 1e-6
        (official code: by sqrt(var + 1e-8) + 1e-6, which damps tiny gains instead).
    D4  --probe packed asks for all beliefs of an episode in one row; separate: a row per belief.
    D5  Baselines: --reward-source outcome is GRPO; --advantage gigpo (arXiv 2505.10978v3, use its
        --gamma 0.95) compares steps with the other steps of the group that saw the same.
    D6  No KL (paper: 0.001); entropy coefficient 0.001 and dual clip from the official code, the
        latter off. Two optimizer steps per batch (paper: one); one without any signal is skipped.

    python algos/igpo.py        about 2 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import sys
import time
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
    Policy, RunArgs, all_gather, all_reduce_sum, collate, collect_groups, evaluate,
    expand_to_tokens, make_envs, micro_batches, optimizer_step, rank, stop, token_logprobs,
    turn_table, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/SearchQA-v0"  # an environment whose info holds the right "answer"
    learning_rate: float = 5e-4  # of AdamW, constant

    # Algorithm specific arguments
    reward_source: Literal["both", "outcome", "information_gain"] = "both"  # parts of r in Eq. 5
    belief: Literal["log_prob", "prob"] = "log_prob"  # b in Eq. 2: of paper v2, or of v1
    normalization: Literal["separate", "joint"] = "separate"  # of gains and outcomes, Eq. 4
    degrees_of_freedom: int = 0  # of the std in Eq. 4: 0 population, 1 unbiased
    gamma: float = 1.0  # discount of later turns in Eq. 6
    curriculum: bool = False  # with joint: gains weigh 1 to 0.5 over the run, outcomes 0.5 to 1
    probe: Literal["packed", "separate"] = "packed"  # all beliefs of an episode in one row, or not
    advantage: Literal["igpo", "gigpo"] = "igpo"  # Eq. 6; gigpo has no other flag than --gamma
    aggregation: Literal["sequence_mean", "sequence_sum", "token_mean"] = "sequence_mean"  # Eq. 7
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 7
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 7
    dual_clip: float | None = None  # bound on the ratio where A < 0 (official: 3); default off
    kl_coefficient: float = 0.0  # weight of KL(policy || start policy), estimator k3, in Eq. 7
    entropy_coefficient: float = 0.001  # weight of the entropy bonus, c in Eq. 7
    num_epochs: int = 1  # passes over the episodes, in the same minibatches
    num_minibatches: int = 2  # optimizer steps per pass


# === 3. Advantages ===============================================================================
@torch.no_grad()
def belief(gold_logprobs: Tensor, gold_mask: Tensor, kind: str = "log_prob") -> Tensor:
    """Mean log-prob of the answer's tokens, or its exponential. Eq. 1, 2

    gold_logprobs (N, L), gold_mask (N, L) bool with a true entry in every row -> (N,)
    """
    assert gold_mask.any(1).all() and kind in ("log_prob", "prob")
    mean = torch.where(gold_mask, gold_logprobs, 0.0).sum(1) / gold_mask.sum(1)
    return mean.exp() if kind == "prob" else mean


@torch.no_grad()
def information_gain(beliefs: Tensor, turn_mask: Tensor) -> Tensor:
    """How much every turn but the last raised the belief. Eq. 3

    beliefs (E, K), turn_mask (E, K) bool -> (E, K), 0 on the last turn and after the end
    """
    gains = torch.zeros_like(beliefs)
    gains[:, :-1] = torch.where(turn_mask[:, 1:], beliefs[:, 1:] - beliefs[:, :-1], 0.0)
    return gains


@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, scale: str = "group_std",
                              degrees_of_freedom: int = 1, epsilon: float = 1e-6) -> Tensor:
    """Scores relative to the mean (and in units of the std) of their group: the z in Eq. 4

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


def curriculum_weights(done: float) -> tuple[float, float]:
    """Weights of gains and of outcomes before Eq. 4, by the share of the run done. Official code"""
    return 1 - done / 2, 0.5 + done / 2


@torch.no_grad()
def normalize_rewards(gains: Tensor, outcomes: Tensor, turn_mask: Tensor, group_id: Tensor,
                      normalization: str = "separate", degrees_of_freedom: int = 0,
                      reward_source: str = "both") -> Tensor:
    """The reward of every turn: normalised gain, on the last turn normalised outcome. Eq. 4, 5

    gains (E, K), outcomes (E,), turn_mask (E, K), group_id (E,) -> (E, K), 0 after the end. A part
    left out by reward_source is set to 0 after the normalisation.
    """
    assert normalization in ("separate", "joint")
    last = turn_mask.clone()
    last[:, :-1] &= ~turn_mask[:, 1:]  # (E, K) the last turn of every episode
    raw = torch.where(last, outcomes[:, None], gains)
    # two pools a group, gains and outcomes, or a joint one: (E, K) or (E, 1)
    pool = group_id[:, None] * 2 + (last if normalization == "separate" else 0)
    rewards = torch.zeros_like(gains)
    rewards[turn_mask] = group_relative_advantages(
        raw[turn_mask], pool.expand_as(raw)[turn_mask], degrees_of_freedom=degrees_of_freedom)
    kept = {"both": turn_mask, "outcome": last, "information_gain": turn_mask & ~last}
    return torch.where(kept[reward_source], rewards, 0.0)


@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns. Eq. 6

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += gamma * returns[:, k + 1]
    return returns


@torch.no_grad()
def gigpo_advantages(turn_rewards: Tensor, turn_mask: Tensor, group_id: Tensor,
                     anchors: list[list[str]], gamma: float = 0.95,
                     scale: str = "group_std") -> Tensor:
    """Episode advantage plus that of the step among steps with the same observation. GiGPO

    turn_rewards (E, K), turn_mask (E, K), group_id (E,), anchors: the observation before every turn
    -> (E, K), 0 after the end
    """
    rewards = torch.where(turn_mask, turn_rewards, 0.0)
    groups = group_id[:, None].expand_as(rewards)[turn_mask]  # of every turn played
    episode = group_relative_advantages(rewards.sum(1), group_id, scale)[:, None]
    advantages = torch.where(turn_mask, episode, 0.0)
    keys = list(zip(groups.tolist(), [a for row in anchors for a in row], strict=True))
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    anchor_id = torch.tensor([number[key] for key in keys], device=rewards.device)
    returns = turn_returns(rewards, turn_mask, gamma)[turn_mask]
    advantages[turn_mask] += group_relative_advantages(returns, anchor_id, scale)
    return advantages


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


@torch.no_grad()
def loss_weights(turn_id: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """Weight of every token in Eq. 7, and what the weighted sum is divided by.

    turn_id (B, T), a row per episode -> (B, T), (). token_mean: all tokens alike; sequence_mean:
    mean over a row's tokens, then over rows; sequence_sum: sum over a row's, mean over rows
    """
    mask = turn_id >= 0
    if aggregation == "token_mean":
        return mask.float(), mask.sum()
    tokens = mask.sum(1, keepdim=True).clamp(min=1) if aggregation == "sequence_mean" else 1
    return mask / tokens, mask.any(1).sum()


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


# === 5. The belief probe =========================================================================
def wrap_answer(policy: Policy, template: str, answer: str) -> tuple[list[int], list[bool]]:
    """The tokens of the answer in its template, and which of them are the answer's own.

    The text is encoded as one piece, as the policy would write it: " Ada" and not " " + "Ada".
    """
    start = template.index("{answer}")
    text = template.replace("{answer}", answer)
    encoded = policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                               return_offsets_mapping=True)
    gold = [last > start and first < start + len(answer)
            for first, last in encoded["offset_mapping"]]
    return encoded["input_ids"], gold


def packed_probe(context: list[int], boundaries: list[int],
                 wrapped: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One row that holds an episode and, for every boundary, a copy of the wrapped answer.

    -> ids (N,), attention (N, N) bool, positions (N,). Copy k sees the context before boundary k
    and itself, and continues its positions. Context 5 6 7 8, boundaries 2 and 4, answer 90 91:

                5 6 7 8  90 91  90 91      sees
        90 91   x x      x  x              as if the row ended after 5 6
        90 91   x x x x         x  x       as if it ended after 7 8
    """
    n, size = len(context), len(wrapped)
    ids = torch.tensor(context + wrapped * len(boundaries))
    attention = torch.ones(len(ids), len(ids)).tril().bool()
    positions = torch.arange(len(ids))
    for k, boundary in enumerate(boundaries):
        copy_k = slice(n + k * size, n + (k + 1) * size)
        attention[copy_k, boundary : copy_k.start] = False
        positions[copy_k] = boundary + torch.arange(size)
    return ids, attention, positions


@torch.no_grad()
def answer_logprobs(policy: Policy, contexts: list[list[int]], boundaries: list[list[int]],
                    wrapped: list[list[int]], args: Args) -> list[Tensor]:
    """Log-probs of the wrapped answer's tokens after each boundary: a (K_e, L_e) for every context.

    From the policy and at the temperature that sampled the episodes.
    """
    results = []
    lengths = [len(c) + len(b) * len(w)
               for c, b, w in zip(contexts, boundaries, wrapped, strict=True)]
    rows = max(1, args.micro_batch_tokens // max(lengths))
    for first in range(0, len(contexts), rows):
        part = range(first, min(first + rows, len(contexts)))
        width = max(lengths[e] for e in part)
        tokens, positions = torch.zeros(2, len(part), width, dtype=torch.long)
        attention = torch.eye(width).bool().repeat(len(part), 1, 1)  # padding sees itself
        answers, befores = [], []  # columns of the answer's tokens and of what predicts them
        for row, e in enumerate(part):
            n = lengths[e]
            tokens[row, :n], attention[row, :n, :n], positions[row, :n] = packed_probe(
                contexts[e], boundaries[e], wrapped[e])
            answers.append(torch.arange(len(contexts[e]), n).view(len(boundaries[e]), -1))
            befores.append(answers[-1] - 1)
            # an answer's first token is predicted by the last token before its boundary
            befores[-1][:, 0] = torch.tensor(boundaries[e]) - 1
        columns = torch.cat([x.flatten() for x in befores]).unique()  # logits only where needed
        tokens, columns = tokens.to(policy.device), columns.to(policy.device)
        masks = {} if args.probe == "separate" else {  # one boundary a row: plain causal attention
            "attention_mask": attention[:, None].to(policy.device),
            "position_ids": positions.to(policy.device)}
        logits = policy.forward(tokens, logits_to_keep=columns, **masks)
        logprobs = (logits / args.temperature).log_softmax(-1)
        for row, (answer, before) in enumerate(zip(answers, befores, strict=True)):
            column = torch.searchsorted(columns, before.to(columns))  # where in the logits
            results.append(logprobs[row, column, tokens[row, answer.to(columns)]])
    return results


def probe_beliefs(policy: Policy, episodes: list[Episode], template: str, args: Args) -> Tensor:
    """The belief in the right answer before every turn played, episode by episode. Eq. 1, 2"""
    contexts, boundaries, wrapped, golds = [], [], [], []
    for episode in episodes:
        ids, gold = wrap_answer(policy, template, str(episode.start_info["answer"]))
        context, ends = [], []  # boundary k: the length of the context before turn k
        for turn in episode.turns:
            context = context + turn.prompt_ids
            ends.append(len(context))
            context = context + turn.token_ids
        # packed: one row for all turns; separate: for every turn a row that ends before it
        for part in ([ends] if args.probe == "packed" and ends else [[end] for end in ends]):
            contexts.append(context[: part[-1]])
            boundaries.append(part)
            wrapped.append(ids)
            golds.append(torch.tensor(gold, device=policy.device))
    if not contexts:  # no episode of this process has a turn
        return torch.zeros(0, device=policy.device)
    logprobs = answer_logprobs(policy, contexts, boundaries, wrapped, args)
    return torch.cat([belief(values, gold.expand_as(values), args.belief)
                      for values, gold in zip(logprobs, golds, strict=True)])


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    weights, count = loss_weights(batch["turn_id"], args.aggregation)
    batch["weights"] = weights / all_reduce_sum(count).clamp(min=1)  # the only normalisation
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
    if args.curriculum and args.normalization == "separate":
        stop("--curriculum weighs gains against outcomes: it needs --normalization joint (Eq. 4)")
    with Run(args, "igpo") as run:
        num_episodes = args.num_prompts * args.group_size  # E over all processes
        envs = make_envs(args, num_episodes // world_size())
        if "answer" not in start_episodes(envs[:1], [0])[0].start_info:
            stop(f"--env-id {args.env_id}: IGPO needs to know the right answer, and the "
                 "reset of the environment has none in info['answer']")
        template = getattr(envs[0].unwrapped, "answer_template", "{answer}")
        policy = load_policy(args)
        config = policy.model.config
        windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if args.probe == "packed" and (config._attn_implementation != "sdpa" or windows):
            stop(f"--model {args.model}: its attention cannot take the mask of --probe packed, "
                 "say --probe separate")
        reference = copy.deepcopy(policy) if args.kl_coefficient else None
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        run.restore(policy, optimizer=optimizer)

        def evaluation():
            return evaluate(policy, run.eval_envs, args)

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            start = time.perf_counter()
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score: what the episode earned, and how the belief in the answer went
            probe_start = time.perf_counter()
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
            beliefs = torch.full_like(rewards, torch.nan)  # (E, K), nan where no turn was played
            beliefs[turn_mask] = probe_beliefs(policy, episodes, template, args)
            probe_seconds = time.perf_counter() - probe_start

            # 3. advantages
            group_id = torch.arange(len(episodes), device=policy.device) // args.group_size
            gains, outcomes = information_gain(beliefs, turn_mask), rewards.sum(1)
            if args.advantage == "gigpo":
                anchors = [[turn.observation for turn in e.turns] for e in episodes]
                advantages = gigpo_advantages(rewards, turn_mask, group_id, anchors, args.gamma)
            else:
                weights = (1.0, 1.0)  # of gains and outcomes
                if args.curriculum:
                    weights = curriculum_weights(iteration / args.num_iterations)
                turn_rewards = normalize_rewards(
                    weights[0] * gains, weights[1] * outcomes, turn_mask, group_id,
                    args.normalization, args.degrees_of_freedom, args.reward_source)
                advantages = turn_returns(turn_rewards, turn_mask, args.gamma)  # (E, K)

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
            probe_share = probe_seconds / (time.perf_counter() - start)
            ends = turn_mask.sum(1, keepdim=True).clamp(min=1) - 1  # (E, 1) the last turn
            table = all_gather(torch.stack([
                beliefs[:, 0], beliefs.gather(1, ends)[:, 0], outcomes,
                advantages.abs().amax(1)], dim=1))  # (E, 4) of all processes
            groups = table.view(-1, args.group_size, 4)  # (groups, G, 4)
            equal = groups[:, :, 2].amax(1) - groups[:, :, 2].amin(1) <= 1e-6
            silent = groups[:, :, 3].amax(1) == 0
            every_gain = all_gather(gains[:, :-1][turn_mask[:, 1:]])
            metrics = {
                "groups_without_signal": silent.double().mean().item(),
                "groups_of_equal_outcome": equal.double().mean().item(),
                "belief_start": table[:, 0].nanmean().item(),
                "belief_end": table[:, 1].nanmean().item(),
                "gain_mean": every_gain.sum().item() / max(len(every_gain), 1),
                "gain_min": min(every_gain.tolist(), default=0.0),
                "gain_max": max(every_gain.tolist(), default=0.0),
                "probe_share": probe_share}
            run.log(iteration, episodes, metrics, updates, batch if updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
