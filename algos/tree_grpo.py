"""Tree-GRPO with the 80/20 entropy mask: fork episodes, train on the tokens that decide.

Papers: "Tree Search for LLM Agent Reinforcement Learning", arXiv 2509.21240v3 [T], and "Beyond the
80/20 Rule: High-Entropy Minority Tokens Drive Effective RL for LLM Reasoning", arXiv 2506.01939v2
[M]. Joining them is our idea. --keep-top-entropy 1 is Tree-GRPO alone, --forks 0 the mask alone.

Every prompt starts M episodes, called chains. Each chain grows into a tree: N of its turns are
drawn, and the episode is played again from each of them to a new end. Such a branch shares the
turns before the drawn one and costs only the new turns. A leaf is an episode of a tree.

    Eq. 1  leaves G = M (N + 1); a fork of a chain of D turns samples (D + 1) / 2 on average    [T]
    Eq. 2  z_i = (R_i - mean R) / (std R + 1e-6)                                          [T code]
    Eq. 3  A_i = z_i over the leaves of its tree + z_i over all leaves of its prompt      [T 6, 7]
    Eq. 4  H_t = - sum_v p_v log p_v     entropy of the current policy at token t, nats       [M 1]
    Eq. 5  keep_t = 1 if H_t >= tau      tau: the 1 - rho quantile of H over sampled tokens [M 6]
    Eq. 6  J = 1/#kept sum_t keep_t min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A)      [M 6]

    M  group_size    N  forks    rho  keep_top_entropy    A  tree_advantages (E,)    w  ratio
    H  entropies (B, T)    tau  entropy_threshold
    node_id (B, T)  number of the turn that sampled a token, over all rows; -1 where none did

Changed from igpo.py
    - the episodes of a group are the leaves of M trees that share turns
    - one advantage per episode again, but from two comparisons: in the tree and in the group
    - only tokens of high entropy enter the loss; mean over tokens instead of over rows

Deviations and choices
    D1  A leaf that is alone in its tree or group gets 0 from it (official code: its own score).
    D2  Tokens that c leaves share stand in c rows, so they get the sum of the c advantages. The
        official code does the same; the paper does not say.
    D3  tau is computed from all tokens of a minibatch, and a shared token counts once. All tokens
        that reach tau are kept (official code: a fixed number per micro-batch).
    D4  A fork resets the environment with the same seed and repeats the actions; the policy reads
        the shared turns again in one forward pass. There is one round of forks (paper: L rounds).
    D5  --chains is a control: M (1 + N / 2) independent chains, which cost the same by [T]'s
        formula. Trees of short episodes cost somewhat more (Eq. 1): compare at equal tokens.
    D6  No KL and no entropy bonus, as in [M] ([T]: 0.001 each). Mean over tokens ([T]: over rows).
        Clip 0.2 on both sides ([M]: 0.28 above), no dual clip (code: 3). Two minibatches ([T]: 8).
    D7  rho = 0.5 by default ([M]: 0.2). A turn has four tokens here. The 20 % of highest entropy
        leave out the word that decides between searching and answering.

    python algos/tree_grpo.py        about 1 minute on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import gymnasium as gym
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn, start_episodes
from policies import Policy, load_policy, parse_args
from rollouts import collect_groups, make_envs, refresh_logprobs, rollout
from run_folder import Run
from utils import (
    DRAW, SAMPLE, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate, expand_to_tokens,
    micro_batches, minibatches, optimizer_step, over_processes, random_stream, rank, stop,
    token_logprobs, turn_table,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/SearchQA-v0"  # gymnasium id; module:Id-v0 imports the module first
    learning_rate: float = 5e-4  # of AdamW, constant
    num_prompts: int = 24  # environment seeds (groups of trees) per iteration
    group_size: int = 2  # trees per prompt, M in Eq. 1 (a group has more leaves than that)

    # Algorithm specific arguments
    forks: int = 2  # branches added to every tree, N in Eq. 1; with 0 a tree is its chain
    chains: bool = False  # control: independent chains that cost about as much as the trees
    advantage: Literal["both", "intra", "inter"] = "both"  # terms of Eq. 3; both: the paper's
    keep_top_entropy: float = 0.5  # share of tokens in the loss, rho in Eq. 5; 1.0 keeps all
    invert_entropy_mask: bool = False  # control: train on the tokens that Eq. 5 drops
    clip_low: float = 0.2  # clipping of the probability ratio from below, Eq. 6
    clip_high: float = 0.2  # clipping of the probability ratio from above, Eq. 6
    num_minibatches: int = 2  # optimizer steps per iteration
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"forks"}


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
def tree_advantages(scores: Tensor, tree_id: Tensor, group_id: Tensor,
                    advantage: str = "both") -> Tensor:
    """Scores relative to the tree plus scores relative to the whole group. Eq. 3

    scores (E,), tree_id (E,), group_id (E,) -> (E,). No two groups use the same tree_id.

    >>> scores, trees = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    >>> tree_advantages(scores, trees, torch.zeros(4))  # 0.7071 in its tree + 1.5 in its group
    tensor([ 2.2071, -1.2071, -0.5000, -0.5000])
    """
    intra = group_relative_advantages(scores, tree_id)
    inter = group_relative_advantages(scores, group_id)
    return {"both": intra + inter, "intra": intra, "inter": inter}[advantage]


@torch.no_grad()
def first_copies(node_id: Tensor) -> Tensor:
    """Finds the row of every token's first copy: the first one that holds its node.

    node_id (B, T) -> (B, T) rows; the own row of a token that was not sampled

    >>> first_copies(torch.tensor([[-1, 0, 1], [-1, 0, 2]])).tolist()  # two leaves share node 0
    [[0, 0, 0], [1, 0, 1]]
    """
    rows = torch.arange(len(node_id), device=node_id.device)[:, None].expand_as(node_id)
    first = rows.new_full((int(node_id.max()) + 2 if len(node_id) else 1,), len(node_id))
    first.scatter_reduce_(0, (node_id + 1).flatten(), rows.flatten(), "amin")
    return torch.where(node_id >= 0, first[node_id + 1], rows)


@torch.no_grad()
def entropy_threshold(entropies: Tensor, keep_top_entropy: float) -> float:
    """The entropy that the given share of the tokens reaches, tau. Eq. 5

    entropies (N,) of distinct sampled tokens -> a number, -inf if all are kept

    >>> entropy_threshold(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 0.5)  # keeps 2, 3 and 4
    2.0
    """
    if keep_top_entropy == 1 or not len(entropies):
        return -float("inf")
    return entropies.quantile(1 - keep_top_entropy).item()


# === 4. Loss =====================================================================================
def policy_loss(batch: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, clip_low: float,
                clip_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 6, and weighted means for the log.

    logprobs, entropy (B, T); batch: old_logprobs, advantages, weights of all sampled tokens and
    kept_weights of those that Eq. 5 keeps (B, T), which sum to 1 each. The loss is a mean over the
    kept tokens, the other numbers are means over all.

    >>> batch = {"old_logprobs": torch.zeros(1, 2), "advantages": torch.ones(1, 2),
    ...          "weights": torch.tensor([[0.5, 0.5]]), "kept_weights": torch.tensor([[1.0, 0.0]])}
    >>> policy_loss(batch, torch.tensor([[1.5, 9.0]]).log(), torch.zeros(1, 2), 0.2, 0.2)[0]
    tensor(-1.2000)
    """
    advantages, weights = batch["advantages"], batch["weights"]  # (B, T)
    log_ratio = logprobs - batch["old_logprobs"]
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -(batch["kept_weights"] * objective).sum()
    with torch.no_grad():
        binding = clipped * advantages < ratio * advantages  # where clipping stops the gradient
        approx_kl = log_ratio.exp() - 1 - log_ratio  # KL(old || new), k3 from samples of old
        parts = {"entropy": entropy, "clip_fraction": binding, "approx_kl": approx_kl}
    return loss, {"loss": loss} | {name: (weights * x).sum() for name, x in parts.items()}


# === 5. Trees ====================================================================================
def fork_episode(episode: Episode, k: int, args: Args) -> tuple[gym.Env, Episode]:
    """Makes an environment and an episode that stand where turn k of `episode` was played.

    The environment repeats the actions before turn k; the episode shares the turns before it.
    """
    [env] = make_envs(args, 1)
    [branch] = start_episodes([env], [episode.seed])
    for number, turn in enumerate(episode.turns[: k + 1]):
        if branch.done or branch.observation != turn.observation:
            stop(f"--env-id {args.env_id}: it does not repeat itself: seed {episode.seed} came out "
                 f"differently before turn {number}")
        if number < k:
            branch.answer(env, Turn(turn.observation, turn.action))
    branch.turns = episode.turns[:k]
    return env, branch


def fork_points(episodes: list[Episode]) -> list[tuple[int, int]]:
    """Lists every (leaf, k) of a tree such that turn k of the leaf can be played again.

    These are k = 0, the root, and the position after every turn that did not end its episode. A
    position that several leaves share is listed once.
    """
    points: dict[int | None, tuple[int, int]] = {}
    for leaf, episode in enumerate(episodes):
        for k in range(len(episode.turns)):
            node = id(episode.turns[k - 1]) if k else None  # branches share the Turn objects
            points.setdefault(node, (leaf, k))
    return list(points.values())


def grow_trees(policy: Policy, envs: list[gym.Env], args: Args,
               iteration: int) -> list[list[Episode]]:
    """Plays this process's trees, each a list of leaves; the M of a prompt are neighbours. Eq. 1"""
    trees = [[chain] for chain in collect_groups(policy, envs, args, iteration)]
    branches, rngs = [], []
    for number, tree in enumerate(trees, start=rank() * len(trees)):
        points = fork_points(tree)  # empty if no turn was played
        draw = random_stream(args.seed, DRAW, iteration, number, 1)
        for i in range(args.forks if points else 0):
            leaf, k = points[draw.integers(len(points))]  # with replacement
            branches.append((tree, *fork_episode(tree[leaf], k, args)))
            rngs.append(random_stream(args.seed, SAMPLE, iteration, number, 1, i))
    played = rollout(policy, [env for _, env, _ in branches], [e for _, _, e in branches], rngs,
                     args.max_turns, args.temperature)
    refresh_logprobs(policy, played, args)
    for tree, _, episode in branches:
        tree.append(episode)
    return trees


def number_nodes(episodes: list[Episode], batch: dict[str, Tensor]) -> Tensor:
    """Numbers the turns: node_id (B, T) says which one sampled a token, and is -1 elsewhere."""
    numbers: dict[int, int] = {}  # from 1, since expand_to_tokens puts 0 where nothing was sampled
    nodes, _ = turn_table(episodes, lambda turn: numbers.setdefault(id(turn), len(numbers)) + 1,
                          batch["tokens"].device)
    return expand_to_tokens(nodes, batch["turn_id"], batch["episode_id"]).long() - 1


def tree_metrics(trees: list[list[Episode]], group_id: Tensor, credit: Tensor) -> dict[str, float]:
    """Measures what the trees cost and which of them teach something, over all processes."""
    scores = [torch.tensor([e.total_reward for e in tree], dtype=torch.double) for tree in trees]
    equal = all_gather(torch.tensor([torch.allclose(x, x.max(), 1e-6, 1e-6) for x in scores]))
    signal = credit.new_zeros(int(group_id.max()) + 1)
    signal = all_gather(signal.scatter_reduce(0, group_id, credit.abs().amax(1), "amax"))
    turns = [turn for tree in trees for episode in tree for turn in episode.turns]
    nodes = {id(turn): turn for turn in turns}.values()
    leaves, in_rows, sampled = all_reduce_sum(torch.tensor([
        len(group_id), sum(turn.num_sampled for turn in turns),
        sum(turn.num_sampled for turn in nodes)])).tolist()
    return {"groups_without_signal": (signal == 0).double().mean().item(),
            "trees_without_signal": equal.double().mean().item(),
            "leaves_per_1000_tokens": 1000 * leaves / max(sampled, 1),
            "row_tokens_per_sampled": in_rows / max(sampled, 1)}


# === 6. Update ===================================================================================
def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step on one minibatch."""
    mask = batch["turn_id"] >= 0
    _, entropies = batch_logprobs(policy, batch, args)  # of the current policy, no gradient
    first, own = first_copies(batch["node_id"]), torch.arange(len(mask), device=mask.device)
    entropies = entropies.gather(0, first)  # copies are rounded differently, above all in bf16
    distinct = entropies[mask & (first == own[:, None])]
    threshold = entropy_threshold(all_gather(distinct), args.keep_top_entropy)
    # 1e-6: so are equal entropies, which are all kept
    keep = mask & ((entropies >= threshold - 1e-6) ^ args.invert_entropy_mask)
    batch["weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)
    batch["kept_weights"] = keep / all_reduce_sum(keep.sum()).clamp(min=1)  # mean over kept tokens
    sums = dict.fromkeys(("loss", "entropy", "clip_fraction", "approx_kl"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        loss, parts = policy_loss(rows, logprobs, entropy, args.clip_low, args.clip_high)
        loss.backward()
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    kept = over_processes({"kept_share": (batch["weights"] * keep).sum(),
                           "entropy_kept": (batch["kept_weights"] * entropies).sum()})
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | kept | {"entropy_threshold": threshold, "grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.keep_top_entropy > 1 or args.keep_top_entropy == 1 and args.invert_entropy_mask:
        stop("--keep-top-entropy: a share of the tokens, at most 1; inverted, less than 1")
    if args.group_size * (1 + args.forks) < 2:
        stop("--group-size 1 --forks 0: an advantage relative to the group needs 2 episodes")
    with Run(args, "tree_grpo") as run:
        if args.chains:  # as many as long trees cost
            chains = round(args.group_size * (1 + args.forks / 2))
            args = dataclasses.replace(args, group_size=chains, forks=0)
        envs, policy = make_envs(args), load_policy(args)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)

        for iteration in run.iterations(policy, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size trees
            trees = grow_trees(policy, envs, args, iteration)
            episodes = [episode for tree in trees for episode in tree]

            # 2. score: what the leaves earned
            rewards, turn_mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
            sizes = torch.tensor([len(tree) for tree in trees], device=policy.device)
            tree_id = torch.arange(len(trees), device=policy.device).repeat_interleave(sizes)
            group_id = tree_id // args.group_size  # (E,)

            # 3. advantages (E, K)
            advantages = tree_advantages(rewards.sum(1), tree_id, group_id, args.advantage)
            credit = torch.where(turn_mask, advantages[:, None], 0.0)

            # 4. update
            updates, batch = [], None
            for chosen in minibatches(group_id, credit, args.num_minibatches):
                leaves = [episodes[i] for i in chosen]
                batch = collate(leaves, policy.device, credit[chosen])
                batch["node_id"] = number_nodes(leaves, batch)
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            run.log(iteration, episodes, updates, batch, **tree_metrics(trees, group_id, credit))
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
