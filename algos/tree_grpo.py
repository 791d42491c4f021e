"""Tree-GRPO with the 80/20 entropy mask: fork episodes, train on the tokens that decide.

Papers: "Tree Search for LLM Agent Reinforcement Learning", arXiv 2509.21240v3 [T], and "Beyond the
80/20 Rule: High-Entropy Minority Tokens Drive Effective RL for LLM Reasoning", arXiv 2506.01939v2
[M]. Joining them is ours: --keep-top-entropy 1 is Tree-GRPO alone, --forks 0 the mask alone.

Every prompt starts M chains, the trees. In each of L rounds, N turns of every tree are drawn and
played on again from there: a branch shares the turns before it and costs only the new ones.

    Eq. 1  leaves G = M (L N + 1); a fork of a chain of D turns samples (D + 1) / 2 on average  [T]
    Eq. 2  z_i = (R_i - mean R) / (std R + 1e-6)                                          [T code]
    Eq. 3  A_i = z_i over the leaves of its tree + z_i over all leaves of its prompt      [T 6, 7]
    Eq. 4  H_t = - sum_v p_v log p_v     entropy of the current policy at token t, nats       [M 1]
    Eq. 5  keep_t = 1 if H_t >= tau      tau: the 1 - rho quantile of H over sampled tokens [M 6]
    Eq. 6  J = 1/#kept sum_t keep_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A)
               + mean_t (c H_t - kl KL_t)                                                     [M 6]

    M  group_size    N  forks    L  rounds    rho  keep_top_entropy    tau  entropy_threshold
    A  tree_advantages (E,)      node_id (B, T)  the turn that sampled a token, over all rows; -1
    w  exp(log_ratio)            owned (B, T)    the first row that holds the token

Changed from igpo.py
    - the episodes of a group are the leaves of M trees that share turns
    - one advantage per episode again, but from two comparisons: in the tree and in the group
    - only tokens of high entropy enter the policy term of the loss
    - mean over tokens instead of over rows; unbiased std

Deviations and choices
    D1  A leaf alone in its tree or group gets 0 from it (official code, --singleton raw: its
        score).
    D2  A prefix shared by c leaves stands in c rows: its weight is the sum of their advantages
        (official code), or with --prefix-credit mean their mean.
    D3  tau comes from the tokens of the whole minibatch, a shared token counted once, and ties are
        kept: copies of one token never disagree. (Official code: per micro-batch, ties by index.)
    D4  A branch recomputes its prefix in one forward pass instead of copying the cache. A copied
        environment brings its generator along: siblings meet the same chance.
    D5  --chains plays M (1 + L N / 2) independent chains instead, the budget by [T]'s formula; the
        trees of short episodes cost somewhat more (Eq. 1), so compare at equal tokens.
    D6  No KL and no entropy bonus, as [M] ([T]: 0.001 each); mean over tokens as the official code
        (paper [T]: over rows); clip 0.2 on both sides ([M]: 0.28 above); dual clip off (code: 3).
    D7  rho = 0.5 by default ([M]: 0.2): a turn has four tokens here, and the fifth of highest
        entropy leaves out the word that decides between searching and answering.

    python algos/tree_grpo.py        about 2.5 minutes on 2 CPU cores
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
from envs.episodes import Episode
from policies import load_policy
from run_folder import Run
from utils import (
    DRAW, SAMPLE, Policy, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate,
    collect_groups, evaluate, expand_to_tokens, make_envs, micro_batches, optimizer_step,
    random_stream, rank, refresh_logprobs, rollout, stop, token_logprobs, turn_table, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/SearchQA-v0"  # gymnasium id; module:Id-v0 imports the module first
    learning_rate: float = 5e-4  # of AdamW, constant
    num_prompts: int = 24  # environment seeds (groups of trees) per iteration
    group_size: int = 2  # trees per prompt, M in Eq. 1 (a group has more leaves than that)

    # Algorithm specific arguments
    forks: int = 2  # branches added to every tree in a round, N in Eq. 1; 0 leaves chains
    rounds: int = 1  # rounds of forking, L in Eq. 1
    fork: Literal["deepcopy", "replay"] = "deepcopy"  # copy the environment, or repeat its actions
    chains: bool = False  # control: independent chains of about the tokens of the trees
    advantage: Literal["both", "intra", "inter"] = "both"  # intra: in the tree, inter: in the group
    singleton: Literal["zero", "raw"] = "zero"  # z of a leaf alone in its tree: 0, or its score
    prefix_credit: Literal["sum", "mean"] = "sum"  # credit of a turn shared by several leaves
    keep_top_entropy: float = 0.5  # share of tokens in the loss, rho in Eq. 5; 1.0 keeps all
    entropy_rule: Literal["quantile", "top_k"] = "quantile"  # tau: interpolated, or the k-th value
    invert_entropy_mask: bool = False  # control: train on the tokens that Eq. 5 drops
    mask_denominator: Literal["kept", "all"] = "kept"  # tokens that Eq. 6 divides by (token_mean)
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"  # Eq. 6
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 6
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 6
    dual_clip: float | None = None  # bound on the ratio where A < 0 (official: 3); default off
    kl_coefficient: float = 0.0  # weight of KL(policy || start policy), estimator k3, in Eq. 6
    entropy_coefficient: float = 0.0  # weight of the entropy bonus on all tokens, c in Eq. 6
    num_epochs: int = 1  # passes over the episodes, in the same minibatches
    num_minibatches: int = 2  # optimizer steps per pass


# === 3. Advantages ===============================================================================
@torch.no_grad()
def group_relative_advantages(scores: Tensor, group_id: Tensor, scale: str = "group_std",
                              degrees_of_freedom: int = 1, epsilon: float = 1e-6) -> Tensor:
    """Scores relative to the mean (and in units of the std) of their group

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
def tree_advantages(scores: Tensor, tree_id: Tensor, group_id: Tensor, advantage: str = "both",
                    singleton: str = "zero") -> Tensor:
    """Scores relative to the tree plus scores relative to the whole group. Eq. 2, 3

    scores (E,), tree_id (E,) different in every group, group_id (E,) -> (E,)
    """
    assert advantage in ("both", "intra", "inter") and singleton in ("zero", "raw")
    total = torch.zeros_like(scores)
    for part, ids in (("intra", tree_id), ("inter", group_id)):
        if advantage in (part, "both"):
            relative = group_relative_advantages(scores, ids)
            alone = ids.bincount()[ids] == 1
            total += torch.where(alone, scores, relative) if singleton == "raw" else relative
    return total


@torch.no_grad()
def owner_rows(node_id: Tensor) -> Tensor:
    """The first row that holds a token: the token's owner; its own row where nothing was sampled.

    node_id (B, T), -1 on tokens that were not sampled -> (B, T). Copies stand in equal columns.
    """
    mask = node_id >= 0
    rows = torch.arange(len(node_id), device=node_id.device)[:, None].expand_as(node_id)
    if not mask.any():
        return rows
    first = rows.new_full((int(node_id.max()) + 1,), len(node_id))
    first.scatter_reduce_(0, node_id[mask], rows[mask], "amin")
    return torch.where(mask, first[node_id.clamp(min=0)], rows)


@torch.no_grad()
def owned_tokens(node_id: Tensor) -> Tensor:
    """Which sampled tokens are not copies: those in the first row that holds their node.

    node_id (B, T) -> (B, T) bool
    """
    rows = torch.arange(len(node_id), device=node_id.device)
    return (node_id >= 0) & (owner_rows(node_id) == rows[:, None])


@torch.no_grad()
def prefix_weights(node_id: Tensor) -> Tensor:
    """One over the number of rows that hold a token, 0 where nothing was sampled.

    node_id (B, T) -> (B, T)
    """
    mask, owned = node_id >= 0, owned_tokens(node_id)
    weights = torch.zeros(node_id.shape, device=node_id.device)
    copies, once = node_id[mask].bincount(), node_id[owned].bincount()  # tokens in all rows, in one
    weights[mask] = (once / copies)[node_id[mask]]
    return weights


@torch.no_grad()
def entropy_threshold(pool: Tensor, keep_top_entropy: float, rule: str = "quantile") -> float:
    """The entropy from which on a token is kept. Eq. 5

    pool (N,) entropies of all sampled tokens, each once. quantile: interpolated between values;
    top_k: the k-th largest, k = ceil(keep_top_entropy N). 1.0 keeps all, 0.0 the largest.
    """
    if keep_top_entropy >= 1 or not len(pool):
        return -float("inf")
    if rule == "quantile":
        return pool.quantile(1 - keep_top_entropy).item()
    k = max(1, int(keep_top_entropy * len(pool) + 0.9999))  # as the official code rounds up
    return pool.topk(k).values[-1].item()


# === 4. Loss =====================================================================================
def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
                      dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate of every token, to be maximised. Eq. 6

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
    """Weight of every token in Eq. 6, and what the weighted sum is divided by.

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
    """Minus the objective of Eq. 6, and sums for the log; the weights are already divided.

    logprobs (B, T), entropy (B, T); batch: old_logprobs, ref_logprobs, advantages, weights of all
    tokens, kept_weights of the tokens that Eq. 5 keeps (B, T)
    """
    advantages, weights, kept = batch["advantages"], batch["weights"], batch["kept_weights"]
    log_ratio = logprobs - batch["old_logprobs"]  # (B, T)
    objective = clipped_objective(log_ratio, advantages, clip_low, clip_high, dual_clip)
    kl = kl_policy_ref_k3(logprobs, batch["ref_logprobs"])
    extra = entropy_coefficient * entropy - kl_coefficient * kl
    loss = -(kept * objective).sum() - (weights * extra).sum()
    with torch.no_grad():
        binding = ((advantages > 0) & (log_ratio > np.log1p(clip_high))) | (
            (advantages < 0) & (log_ratio < np.log1p(-clip_low)))
        approx_kl = log_ratio.exp() - 1 - log_ratio  # KL(old || new), k3 from samples of old
        parts = {"entropy": entropy, "clip_fraction": binding.float(), "approx_kl": approx_kl,
                 "kl_policy_ref_k3": kl}
        sums = {name: (weights * values).sum() for name, values in parts.items()}
        return loss, {"loss": loss.detach()} | sums


# === 5. Trees ====================================================================================
def expected_budget(trees: int, forks: int, rounds: int,
                    turns: float = math.inf) -> tuple[int, float]:
    """Leaves of a prompt, and how many chains of so many turns cost as much. Eq. 1

    Exact for one round; for long chains the paper's M (1 + L N / 2).
    """
    branches = trees * forks * rounds
    return trees + branches, trees + branches * (1 + 1 / turns) / 2


class Recorder(gym.Wrapper):
    """Keeps a copy of the environment from before every step; None if it cannot be copied."""

    def __init__(self, env: gym.Env, copies: bool, snapshots: list[gym.Env | None] | None = None):
        super().__init__(env)
        self.copies, self.snapshots = copies, snapshots or []

    def reset(self, **kwargs):
        self.snapshots = []
        return self.env.reset(**kwargs)

    def step(self, action: str):
        try:
            self.snapshots.append(copy.deepcopy(self.env) if self.copies else None)
        except Exception:  # it holds a generator, a socket, a lock ..
            self.snapshots.append(None)
        return self.env.step(action)


def fork_episode(env: Recorder, episode: Episode, k: int, args: Args) -> tuple[Recorder, Episode]:
    """The situation before turn k of an episode, in an environment of its own."""
    turns = episode.turns[:k]
    info = turns[-1].info if k else episode.start_info
    branch = Episode(episode.seed, episode.turns[k].observation, turns, episode.start_info, info)
    if env.snapshots[k] is not None:
        return Recorder(copy.deepcopy(env.snapshots[k]), env.copies, env.snapshots[:k]), branch
    again, ended = Recorder(make_envs(args, 1)[0], copies=False), False
    observation, _ = again.reset(seed=episode.seed)
    for turn in turns:  # repeat the actions; everything must come out as before
        if not (ended := ended or observation != turn.observation):
            observation, _, terminated, truncated, _ = again.step(turn.action)
            ended = terminated or truncated
    if ended or observation != branch.observation:
        stop(f"--env-id {args.env_id}: an episode can be neither copied nor repeated: seed "
             f"{episode.seed} came out differently before turn {k}")
    return again, branch


def fork_points(episodes: list[Episode]) -> list[tuple[int, int]]:
    """All (leaf, k) of a tree where turn k may be played anew, a shared turn only once.

    The root (k = 0) and every turn that did not end an episode.
    """
    points: dict[int | None, tuple[int, int]] = {}
    for leaf, episode in enumerate(episodes):
        for k in range(len(episode.turns)):
            node = id(episode.turns[k - 1]) if k else None  # branches share the Turn objects
            points.setdefault(node, (leaf, k))
    return list(points.values())


def grow_trees(policy: Policy, envs: list[Recorder], args: Args,
               iteration: int) -> list[list[Episode]]:
    """This process's trees, each a list of leaves; the M trees of a prompt are neighbours. Eq. 1"""
    chains = collect_groups(policy, envs, args, iteration)
    trees = [[pair] for pair in zip(envs, chains, strict=True)]  # leaves with their environments
    for round_ in range(1, args.rounds + 1):
        branches, rngs = [], []
        for number, tree in enumerate(trees, start=rank() * len(trees)):
            points = fork_points([episode for _, episode in tree])  # none if no turn was played
            draw = random_stream(args.seed, DRAW, iteration, number, round_)
            for i in range(args.forks if points else 0):
                leaf, k = points[draw.integers(len(points))]  # with replacement
                env, branch = fork_episode(*tree[leaf], k, args)
                env.copies = env.copies and round_ < args.rounds  # is it going to be forked?
                branches.append((tree, env, branch))
                rngs.append(random_stream(args.seed, SAMPLE, iteration, number, round_, i))
        rollout(policy, [env for _, env, _ in branches], [e for _, _, e in branches], rngs,
                max_turns=args.max_turns, max_turn_tokens=args.max_turn_tokens,
                temperature=args.temperature)
        refresh_logprobs(policy, [e for _, _, e in branches], args)
        for tree, env, episode in branches:  # only now: branches of one round never fork each other
            tree.append((env, episode))
    return [[episode for _, episode in tree] for tree in trees]


def number_nodes(episodes: list[Episode], batch: dict[str, Tensor]) -> Tensor:
    """node_id (B, T): the number of the turn that sampled a token, -1 where none did."""
    numbers: dict[int, int] = {}  # from 1, since expand_to_tokens puts 0 where nothing was sampled
    nodes, _ = turn_table(episodes, lambda turn: numbers.setdefault(id(turn), len(numbers)) + 1,
                          batch["tokens"].device)
    return expand_to_tokens(nodes, batch["turn_id"], batch["episode_id"]).long() - 1


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    mask, owned = batch["turn_id"] >= 0, owned_tokens(batch["node_id"])  # (B, T)
    _, entropies = batch_logprobs(policy, batch, args)  # of the current policy, no gradient
    entropies = entropies.gather(0, owner_rows(batch["node_id"]))  # equal in all copies of a token
    threshold = entropy_threshold(all_gather(entropies[owned]), args.keep_top_entropy,
                                  args.entropy_rule)
    # 1e-6: equal entropies that were rounded differently are kept together
    keep = mask & ((entropies >= threshold - 1e-6) ^ args.invert_entropy_mask)
    weights, count = loss_weights(batch["turn_id"], args.aggregation)
    batch["weights"] = weights / all_reduce_sum(count).clamp(min=1)
    if args.prefix_credit == "mean":
        weights = weights * prefix_weights(batch["node_id"])
    if args.aggregation == "token_mean":
        count = (weights * keep if args.mask_denominator == "kept" else weights).sum()
    batch["kept_weights"] = weights * keep / all_reduce_sum(count).clamp(min=1)
    drop = mask & ~keep
    kept, kept_entropy, dropped, dropped_entropy = all_reduce_sum(torch.stack([
        x.sum().double() for x in (keep, entropies * keep, drop, entropies * drop)])).tolist()
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
    metrics |= {"entropy_threshold": threshold, "kept_share": kept / max(kept + dropped, 1),
                "entropy_kept": kept_entropy / max(kept, 1),
                "entropy_dropped": dropped_entropy / max(dropped, 1)}
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.keep_top_entropy > 1:
        stop(f"--keep-top-entropy {args.keep_top_entropy}: a share of the tokens, at most 1")
    if args.keep_top_entropy == 1 and args.invert_entropy_mask:
        stop("--invert-entropy-mask with --keep-top-entropy 1 would train on nothing")
    if args.group_size * (1 + args.rounds * args.forks) < 2:
        stop("--group-size 1 --forks 0: an advantage relative to the group needs 2 episodes")
    with Run(args, "tree_grpo") as run:
        if args.chains:  # as many as long trees cost
            _, chains = expected_budget(args.group_size, args.forks, args.rounds)
            args = dataclasses.replace(args, group_size=round(chains), forks=0)
        num_trees = args.num_prompts * args.group_size  # over all processes
        envs = [Recorder(env, copies=args.fork == "deepcopy" and args.forks > 0)
                for env in make_envs(args, num_trees // world_size())]
        policy = load_policy(args)
        reference = copy.deepcopy(policy) if args.kl_coefficient else None
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        run.restore(policy, optimizer=optimizer)

        def evaluation():
            return evaluate(policy, run.eval_envs, args)

        for iteration in run.iterations(policy, evaluation, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size trees
            trees = grow_trees(policy, envs, args, iteration)
            episodes = [episode for tree in trees for episode in tree]

            # 2. score: what the leaves earned
            scores = torch.tensor([e.total_reward for e in episodes], device=policy.device)  # (E,)
            tree_id = torch.tensor([number for number, tree in enumerate(trees) for _ in tree],
                                   device=policy.device)
            group_id = tree_id // args.group_size

            # 3. advantages
            advantages = tree_advantages(scores, tree_id, group_id, args.advantage, args.singleton)

            # 4. update; the groups of all processes are dealt out to the minibatches
            updates = []
            group = group_id + rank() * len(trees) // args.group_size  # (E,), over all
            for part in list(range(args.num_minibatches)) * args.num_epochs:
                here = (group % args.num_minibatches == part).nonzero()[:, 0]
                if not all_reduce_sum(advantages[here].abs().sum()):
                    continue  # nothing to learn from
                chosen = [episodes[i] for i in here]
                batch = collate(chosen, policy.device)
                batch["advantages"] = torch.where(
                    batch["turn_id"] >= 0, advantages[here][batch["episode_id"], None], 0.0)
                batch["node_id"] = number_nodes(chosen, batch)
                updates.append(update(policy, reference, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            spread = all_gather(torch.tensor([
                max(e.total_reward for e in tree) - min(e.total_reward for e in tree)
                for tree in trees]))  # (trees,) of all processes
            signal = torch.zeros(len(trees) // args.group_size, device=policy.device)
            signal = all_gather(signal.scatter_reduce(0, group_id, advantages.abs(), "amax"))
            turns = [turn for e in episodes for turn in e.turns]
            nodes = {id(turn): turn for turn in turns}.values()
            leaves, in_rows, sampled = all_reduce_sum(torch.tensor([
                len(episodes), sum(len(turn.token_ids) for turn in turns),
                sum(len(turn.token_ids) for turn in nodes)])).tolist()
            metrics = {
                "groups_without_signal": (signal == 0).double().mean().item(),
                "trees_without_signal": (spread <= 1e-6).double().mean().item(),
                "leaves_per_1000_tokens": 1000 * leaves / max(sampled, 1),
                "row_tokens_per_sampled": in_rows / max(sampled, 1)}
            run.log(iteration, episodes, metrics, updates, batch if updates else None)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
