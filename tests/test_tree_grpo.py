"""Trees and entropy masks against hand-worked numbers, slow loops and whole recomputations."""

import copy
import math
import types

import numpy as np
import pytest
import torch

from algos.ms_grpo import group_relative_advantages as grpo
from algos.tree_grpo import (
    Args, Recorder, clipped_objective, entropy_threshold, expected_budget, fork_episode,
    fork_points, grow_trees, kl_policy_ref_k3, loss_weights, main, number_nodes, owned_tokens, owner_rows,
    policy_loss, prefix_weights, tree_advantages, update,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn, start_episodes
from envs.search_qa import SearchQA
from utils import collate, make_envs, token_entropy, token_logprobs
from words import Words


def close(got, expected):
    assert got.tolist() == pytest.approx(expected, abs=2e-4)


def advantages_of(trees, group=None, **options):
    """Scores of the leaves, tree by tree, all of one prompt unless `group` numbers the trees."""
    scores = torch.tensor([float(score) for tree in trees for score in tree])
    tree_id = torch.tensor([number for number, tree in enumerate(trees) for _ in tree])
    group_id = torch.zeros_like(tree_id) if group is None else torch.tensor(group)[tree_id]
    return tree_advantages(scores, tree_id, group_id, **options)


# --- Eq. 2, 3: advantages ------------------------------------------------------------------------


@pytest.mark.parametrize("trees,intra,inter", [
    ([[1, 0, 0], [1, 1, 0]], [1.1547, -0.5773, -0.5773, 0.5773, 0.5773, -1.1547],
     [0.9129, -0.9129, -0.9129, 0.9129, 0.9129, -0.9129]),
    ([[1, 1, 1], [0, 0, 0]], [0.0] * 6, [0.9129] * 3 + [-0.9129] * 3),
    ([[1, 0], [0, 0]], [0.7071, -0.7071, 0, 0], [1.5, -0.5, -0.5, -0.5]),
    ([[1, 0, 0]], [1.1547, -0.5773, -0.5773], [1.1547, -0.5773, -0.5773])])
def test_advantages_by_hand(trees, intra, inter):
    close(advantages_of(trees, advantage="intra"), intra)
    close(advantages_of(trees, advantage="inter"), inter)
    close(advantages_of(trees), [a + b for a, b in zip(intra, inter, strict=True)])


def test_shaped_rewards_by_hand():
    trees = [[1, 0.2, 0.2], [0.8, 0.1, 0]]
    close(advantages_of(trees), [2.6518, -1.0224, -1.0224, 2.1586, -1.1467, -1.6189])
    scores, tree = torch.tensor([1, 0.2, 0.2, 0.8, 0.1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    twice = grpo(grpo(scores, torch.zeros(6).long()), tree)
    assert torch.allclose(twice, advantages_of(trees, advantage="intra"), atol=1e-4), (
        "z by prompt and then by tree is no new estimator")


@pytest.mark.parametrize("singleton,expected", [
    ("zero", [1.5, -0.5, -0.5, -0.5]), ("raw", [2.5, -0.5, -0.5, -0.5])])
def test_trees_of_one_leaf_are_grpo(singleton, expected):
    close(advantages_of([[1], [0], [0], [0]], singleton=singleton), expected)
    assert torch.equal(advantages_of([[1], [0], [0], [0]]),
                       grpo(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4).long()))
    mixed = advantages_of([[1], [0, 1, 0]], advantage="intra", singleton=singleton).tolist()
    assert mixed[0] == (1.0 if singleton == "raw" else 0.0)
    assert mixed[1:] == pytest.approx([-0.5773, 1.1547, -0.5773], abs=1e-4)


def test_one_tree_by_hand():
    """Leaves A (via n1, n2) 1, B (fork at n1) 0, C (fork at the root) 0: net weights of the nodes."""
    a, b, c = advantages_of([[1, 0, 0]], advantage="intra").tolist()
    assert (a + b, a, c) == pytest.approx((0.5773, 1.1547, -0.5773), abs=1e-4)
    prefix = advantages_of([[1, 0], [0, 0]], advantage="intra")[:2].sum().item()
    assert prefix == pytest.approx(0.0, abs=1e-5), "a prefix of both leaves gets nothing from intra"
    assert advantages_of([[1, 0], [0, 0]], advantage="inter")[:2].sum().item() == pytest.approx(1.0, abs=1e-4)


def test_advantages_against_a_loop_and_their_invariances():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tree, scores = np.sort(rng.integers(6, size=18)), rng.normal(size=18).astype(np.float32)
        group = tree // 2
        expected = np.zeros(18)
        for ids in (tree, group):
            for e in range(18):
                members = scores[ids == ids[e]]
                if len(members) > 1:
                    expected[e] += (scores[e] - members.mean()) / (members.std(ddof=1) + 1e-6)
        tensors = [torch.tensor(x) for x in (scores, tree, group)]
        got = tree_advantages(*tensors)
        assert got.numpy() == pytest.approx(expected, abs=1e-4)
        order = torch.tensor(rng.permutation(18))
        assert torch.allclose(tree_advantages(*(x[order] for x in tensors)), got[order], atol=1e-5)
        renamed = torch.tensor(rng.permutation(6))[tensors[1]]
        assert torch.allclose(tree_advantages(tensors[0], renamed, tensors[2]), got, atol=1e-5)
        intra = tree_advantages(*tensors, advantage="intra")
        for t in set(tree):
            assert intra[tree == t].sum().item() == pytest.approx(0, abs=1e-4)


# --- shared prefixes -----------------------------------------------------------------------------
# row A [o n0 n0 o n1 n1], row B [o n0 n0 o n2 n2 n2]: the two tokens of n0 are one sample
NODES = torch.tensor([[-1, 0, 0, -1, 1, 1, -1], [-1, 0, 0, -1, 2, 2, 2]])


def test_a_shared_token_is_owned_once():
    assert owned_tokens(NODES).int().tolist() == [[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert owned_tokens(NODES).sum() == 7 and (NODES >= 0).sum() == 9
    assert prefix_weights(NODES).tolist() == [[0, 0.5, 0.5, 0, 1, 1, 0], [0, 0.5, 0.5, 0, 1, 1, 1]]
    leaf = torch.tensor([[1.2], [-0.4]])  # net weight of a token of n0: .8 summed, .4 averaged
    assert leaf.expand(2, 7)[:, 1].sum().item() == pytest.approx(0.8)
    assert (leaf * prefix_weights(NODES))[:, 1].sum().item() == pytest.approx(0.4)
    assert owner_rows(NODES).tolist() == [[0] * 7, [1, 0, 0, 1, 1, 1, 1]]
    nothing = torch.full((2, 3), -1)
    assert not owned_tokens(nothing).any() and not prefix_weights(nothing).any()


def test_owned_tokens_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        nodes = torch.tensor(rng.integers(-1, 5, size=(6, 1)).repeat(3, 1))
        nodes = torch.cat([nodes, torch.tensor(rng.integers(-1, 9, size=(6, 1)))], 1)
        seen, owned = {}, np.zeros(nodes.shape, dtype=bool)
        for row in range(6):
            for t in range(4):
                n = int(nodes[row, t])
                owned[row, t] = n >= 0 and seen.setdefault(n, row) == row
        assert (owned_tokens(nodes).numpy() == owned).all()


def test_averaged_prefixes_change_nothing_without_sharing():
    nodes = torch.tensor([[0, 0, -1, 1], [2, -1, 3, 3]])
    assert torch.equal(prefix_weights(nodes), (nodes >= 0).float())


# --- Eq. 4, 5: entropy and its threshold ---------------------------------------------------------


@pytest.mark.parametrize("logits,temperature,entropy", [
    ([0.0, 0], 1, 0.693147), ([1.0, 1, 1, 1], 1, 1.386294), ([2.0, 0], 1, 0.365334),
    ([2.0, 0], 2, 0.582203), ([math.log(0.7), math.log(0.2), math.log(0.1)], 1, 0.801819),
    ([0.0, 0, -math.inf], 1, 0.693147)])
def test_entropy_by_hand(logits, temperature, entropy):
    assert token_entropy(torch.tensor(logits) / temperature).item() == pytest.approx(entropy, abs=1e-5)


def test_threshold_by_hand():
    values = torch.arange(1, 11) / 10  # rho .2: quantile .8 lies at .82, the 2nd largest is .9
    assert entropy_threshold(values, 0.2) == pytest.approx(0.82)
    assert entropy_threshold(values, 0.2, "top_k") == pytest.approx(0.9)
    assert entropy_threshold(values, 1.0) == -math.inf and entropy_threshold(values[:0], 0.2) == -math.inf
    for rule in ("quantile", "top_k"):
        assert entropy_threshold(values, 0.0, rule) == pytest.approx(1.0), "the largest stays"


def test_the_two_rules_keep_the_same_number_unless_it_is_not_whole():
    def kept(n, rho, rule):
        values = torch.rand(n, generator=torch.Generator().manual_seed(n))
        return int((values >= entropy_threshold(values, rho, rule) - 1e-6).sum())
    for n in range(1, 16):
        assert kept(n, 0.2, "quantile") == kept(n, 0.2, "top_k") == math.ceil(0.2 * n)
    assert [(kept(n, 0.3, "top_k"), kept(n, 0.3, "quantile")) for n in (4, 7, 14)] == [
        (2, 1), (3, 2), (5, 4)]
    assert entropy_threshold(torch.full((5,), 0.5), 0.2) == pytest.approx(0.5), "ties are all kept"


def test_the_pool_is_the_whole_minibatch():
    rows = torch.tensor([[1, 0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5]])
    tau = entropy_threshold(rows.flatten(), 0.2)
    assert (rows >= tau - 1e-6).int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    alone = [(row >= entropy_threshold(row, 0.2) - 1e-6).int().tolist() for row in rows]
    assert alone == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], "what per-row thresholds would keep"


@pytest.mark.parametrize("rho,tau,keep", [
    (0.4, 0.36, [[1, 0, 0, 0, 0], [1, 0, 1, 0, 1]]), (0.1, 0.84, [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])])
def test_copies_of_a_token_stay_or_go_together(rho, tau, keep):
    """The rows of above, sampled tokens only; a pool with copies would drop one of the two."""
    entropies = torch.tensor([[0.9, 0.1, 0.3, 0.2, -1], [0.9, 0.1, 0.8, 0.05, 0.4]])
    nodes = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 2, 2, 2]])
    threshold = entropy_threshold(entropies[owned_tokens(nodes)], rho)
    assert threshold == pytest.approx(tau, abs=1e-6)
    got = ((nodes >= 0) & (entropies >= threshold - 1e-6)).int()
    assert got.tolist() == keep
    if rho == 0.1:  # leaf advantages +1 and -1: the shared token must get nothing
        assert (got * torch.tensor([[1.0], [-1.0]]))[:, 0].sum() == 0


# --- Eq. 6: the loss -----------------------------------------------------------------------------


def loss_of(logprobs, old, advantages, kept, weights=None, clip=(0.2, 0.2), **options):
    options = {"dual_clip": None, "entropy_coefficient": 0.0, "kl_coefficient": 0.0} | options
    batch = {"old_logprobs": old, "ref_logprobs": options.pop("ref", old), "kept_weights": kept,
             "advantages": advantages, "weights": kept if weights is None else weights}
    entropy = options.pop("entropy", torch.zeros_like(logprobs))
    return policy_loss(batch, logprobs, entropy, *clip, **options)


@pytest.mark.parametrize("clip,terms,objective", [
    ((0.2, 0.28), [1.28, 0.5, -1.5, -0.8], -0.11), ((0.2, 0.2), [1.2, 0.5, -1.5, -0.8], -0.15)])
def test_the_masked_surrogate_by_hand(clip, terms, objective):
    log_ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    advantages, keep = torch.tensor([[1.0, 1, -1, -1]]), torch.tensor([[1.0, 0, 1, 0]])
    assert clipped_objective(log_ratio, advantages, *clip).tolist()[0] == pytest.approx(terms)
    loss, _ = loss_of(log_ratio, torch.zeros(1, 4), advantages, keep / 2, clip=clip)
    assert loss.item() == pytest.approx(-objective, abs=1e-6)


def test_what_the_mean_is_divided_by():
    """Losses 1 -2 .5 3 -1, entropies .05 1.3 .01 .9 .2, rho .4: kept .5, of all .2, unmasked .3."""
    values = torch.tensor([[1, -2, 0.5, 3, -1]])
    entropies = torch.tensor([[0.05, 1.3, 0.01, 0.9, 0.2]])
    keep = entropies >= entropy_threshold(entropies.flatten(), 0.4) - 1e-6
    assert keep.tolist() == [[False, True, False, True, False]]
    for kept, expected in ((keep / keep.sum(), 0.5), (keep / 5, 0.2), (torch.ones(1, 5) / 5, 0.3)):
        loss, _ = loss_of(torch.zeros(1, 5), torch.zeros(1, 5), -values, kept)
        assert loss.item() == pytest.approx(expected)


def test_kl_and_entropy_bonus_go_over_all_tokens():
    keep, every = torch.tensor([[1.0, 0]]), torch.tensor([[0.5, 0.5]])
    logprobs, ref = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.0]])
    entropy = torch.tensor([[0.0, 0.8]])
    loss, stats = loss_of(logprobs, logprobs, torch.zeros(1, 2), keep, every, ref=ref, entropy=entropy,
                          kl_coefficient=1.0, entropy_coefficient=0.1)
    assert kl_policy_ref_k3(logprobs, ref)[0, 0].item() == pytest.approx(0.106531, abs=1e-6)
    assert loss.item() == pytest.approx(0.106531 / 2 - 0.1 * 0.4, abs=1e-6)
    assert stats["entropy"].item() == pytest.approx(0.4)


def test_the_loss_gradient_equals_finite_differences():
    torch.manual_seed(0)
    old, ref = torch.randn(2, 2, 5).double()
    kept, every = torch.rand(2, 2, 5).double()

    def loss(logprobs):
        return loss_of(logprobs, old, torch.ones(2, 1).double() * torch.tensor([[1.0], [-1.0]]), kept,
                       every, (0.2, 0.28), ref=ref, kl_coefficient=0.3, dual_clip=3.0,
                       entropy=-logprobs, entropy_coefficient=0.1)[0]
    assert torch.autograd.gradcheck(loss, (old + 0.3 * torch.randn(2, 5).double()).requires_grad_())


# --- trees ---------------------------------------------------------------------------------------


def test_budget_by_hand():
    for turns, fork in ((1, 1), (2, 1.5), (3, 2), (4, 2.5), (5, 3)):
        leaves, chains = expected_budget(1, 1, 1, turns)
        assert leaves == 2 and chains * turns == pytest.approx(turns + fork)
    for setting, leaves, chains in [((1, 2, 1), 3, 2), ((2, 2, 1), 6, 4), ((4, 2, 1), 12, 8),
                                    ((2, 6, 1), 14, 8), ((8, 2, 1), 24, 16), ((6, 3, 1), 24, 15),
                                    ((4, 5, 1), 24, 14), ((1, 5, 1), 6, 3.5)]:
        assert expected_budget(*setting) == (leaves, chains)
    assert expected_budget(4, 0, 1, 5) == expected_budget(4, 2, 0, 5) == (4, 4)


def episode_of(*turns):
    return Episode(0, "", list(turns), terminated=True)


def test_every_boundary_is_a_fork_point_once():
    """A chain of three turns: root, n1, n2, never the answer. A branch at n1 adds only its own."""
    n1, n2, answer, b2, b3 = (Turn(str(i), "") for i in range(5))
    chain = episode_of(n1, n2, answer)
    assert fork_points([chain]) == [(0, 0), (0, 1), (0, 2)]
    assert fork_points([chain, episode_of(n1, b2, b3)]) == [(0, 0), (0, 1), (0, 2), (1, 2)]
    assert fork_points([chain, episode_of(b2)]) == [(0, 0), (0, 1), (0, 2)]
    equal = episode_of(copy.copy(n1), n2)
    assert (1, 1) in fork_points([episode_of(n1), equal]), "equal turns are still two nodes"


@pytest.fixture
def grown(tiny_policy):
    """Trees of an untrained policy; 3 prompts x 2 trees x (1 + 2 * 2) leaves."""
    args = Args(num_prompts=3, group_size=2, forks=2, rounds=2, max_turn_tokens=4,
                env_id="tests/Words-v0")
    envs = [Recorder(env, True) for env in make_envs(args, 6)]
    return tiny_policy, args, envs, grow_trees(tiny_policy, envs, args, 0)


def test_a_tree_is_what_it_says(grown):
    """Leaves per tree, one first observation per group, prefixes shared as objects, own endings."""
    _, args, _, trees = grown
    assert [len(tree) for tree in trees] == [5] * 6
    depths = []
    for number, tree in enumerate(trees):
        first = trees[number // 2 * 2][0]
        for leaf in tree:
            assert leaf.seed == first.seed and leaf.turns[0].observation == first.turns[0].observation
            assert leaf.done and len(leaf.turns) <= 6
            assert leaf.info["heard"] == [turn.action for turn in leaf.turns], "its own environment"
            assert [t.observation.split()[0] for t in leaf.turns[1:]] == [
                str(k) for k in range(1, len(leaf.turns))], "the turn counter goes on"
        for leaf in tree[1:]:
            others = [t for other in tree if other is not leaf for t in other.turns]
            shared = [any(turn is t for t in others) for turn in leaf.turns]
            depths.append(sum(shared))
    assert len(set(depths)) > 1
    assert len({trees[i][0].seed for i in (0, 2, 4)}) == 3


def test_a_branch_starts_where_its_prefix_ended_and_siblings_differ(tiny_policy):
    args = Args(max_turn_tokens=4, env_id="tests/Words-v0", env_kwargs="{}")
    envs = [Recorder(env, True) for env in make_envs(args, 1)]
    [[chain]] = grow_trees(tiny_policy, envs, Args(**{**vars(args), "num_prompts": 1, "group_size": 1,
                                                      "forks": 0}), 3)
    before = [turn.observation for turn in chain.turns] + [chain.observation]
    k = len(chain.turns) - 1
    branches = [fork_episode(envs[0], chain, k, args) for _ in range(2)]
    for env, branch in branches:
        assert branch.info == (chain.turns[k - 1].info if k else chain.start_info)
        assert branch.turns == chain.turns[:k] and branch.observation == chain.turns[k].observation
        assert branch.turns is not chain.turns and not branch.done
        assert env.unwrapped.heard == [turn.action for turn in chain.turns[:k]]
        assert len(env.snapshots) == k
    first = branches[0][0].step("one")
    assert branches[1][0].unwrapped.heard == [turn.action for turn in chain.turns[:k]], "independent"
    assert first[0].split()[1] == branches[1][0].step("two")[0].split()[1], "same noise for siblings"
    again = fork_episode(envs[0], chain, k, args)[0]
    assert again.unwrapped.heard == [turn.action for turn in chain.turns[:k]], "snapshots are kept"
    assert [turn.observation for turn in chain.turns] + [chain.observation] == before


def test_copied_and_replayed_forks_give_the_same_trees(tiny_policy):
    texts = []
    for fork in ("deepcopy", "replay"):
        args = Args(num_prompts=2, group_size=2, rounds=2, fork=fork, max_turn_tokens=4,
                    env_id="tests/Words-v0", env_kwargs="{}")
        envs = [Recorder(env, fork == "deepcopy") for env in make_envs(args, 4)]
        trees = grow_trees(tiny_policy, envs, args, 0)
        texts.append([leaf.transcript() for tree in trees for leaf in tree])
    assert texts[0] == texts[1] and len(set(texts[0])) > 5


def test_what_cannot_be_copied_is_replayed_and_what_cannot_be_replayed_is_named(
        tiny_policy, monkeypatch, capsys):
    def no_copy(self, memo):
        raise TypeError("cannot pickle 'generator' object")
    monkeypatch.setattr(Words, "__deepcopy__", no_copy, raising=False)
    args = Args(num_prompts=2, group_size=2, max_turn_tokens=4, env_id="tests/Words-v0",
                env_kwargs="{}")
    envs = [Recorder(env, True) for env in make_envs(args, 4)]
    assert [len(tree) for tree in grow_trees(tiny_policy, envs, args, 0)] == [3] * 4
    assert all(snapshot is None for env in envs for snapshot in env.snapshots)
    numbers, original = iter(range(10**6)), Words.step

    def forgetful(self, action):
        observation, *rest = original(self, action)
        return f"{next(numbers)}", *rest

    def impatient(self, action):  # the same texts, but an end where there was none
        calls = next(numbers)
        return "word", 0.0, calls % 2 == 1, False, {}
    for step in (forgetful, impatient):
        monkeypatch.setattr(Words, "step", step)
        with pytest.raises(SystemExit) as end:
            for iteration in range(20):
                grow_trees(tiny_policy, envs, args, iteration)
        assert end.value.code == 2 and "neither copied nor repeated" in capsys.readouterr().err


def test_a_replay_compares_every_observation_and_not_only_the_last(tiny_policy, capsys):
    args = Args(num_prompts=16, group_size=1, forks=0, max_turn_tokens=4, env_id="tests/Words-v0")
    envs = [Recorder(env, False) for env in make_envs(args, 16)]
    leaves = [leaf for [leaf] in grow_trees(tiny_policy, envs, args, 3)]
    [env, leaf] = next(pair for pair in zip(envs, leaves, strict=True) if len(pair[1].turns) > 2)
    assert fork_episode(env, leaf, 2, args)[1].observation == leaf.turns[2].observation
    leaf.turns[1].observation += " or so"
    with pytest.raises(SystemExit):
        fork_episode(env, leaf, 2, args)
    assert "neither copied nor repeated" in capsys.readouterr().err


def test_branches_can_be_copied_as_long_as_a_round_follows(tiny_policy, monkeypatch):
    """A game that cannot be repeated: every fork, also of a branch, must come from a copy."""
    numbers, original = iter(range(10**6)), Words.step
    monkeypatch.setattr(Words, "step", lambda self, action: (
        f"{next(numbers)}", *original(self, action)[1:]))
    args = Args(num_prompts=3, group_size=2, rounds=3, max_turn_tokens=4, env_id="tests/Words-v0")
    envs = [Recorder(env, True) for env in make_envs(args, 6)]
    assert [len(tree) for tree in grow_trees(tiny_policy, envs, args, 0)] == [7] * 6


def test_forks_are_drawn_uniformly_over_the_boundaries(tiny_policy, monkeypatch):
    """10,000 forks of chains of three turns: a third each within 3 sigma."""
    counts = np.zeros(3)
    chain = episode_of(*(Turn(str(k), "") for k in range(3)))
    monkeypatch.setattr("algos.tree_grpo.collect_groups", lambda *args: [chain] * 100)
    monkeypatch.setattr("algos.tree_grpo.rollout", lambda *args, **kwargs: None)

    def count(env, episode, k, args):
        counts[k] += 1
        return types.SimpleNamespace(copies=True), episode
    monkeypatch.setattr("algos.tree_grpo.fork_episode", count)
    args = Args(num_prompts=50, group_size=2, forks=100)
    grow_trees(tiny_policy, [None] * 100, args, 0)
    assert counts.sum() == 10000
    assert np.abs(counts / 10000 - 1 / 3).max() < 3 * math.sqrt(2 / 9 / 10000)


def test_every_branch_draws_its_own_numbers(tiny_policy, monkeypatch):
    """Over trees, forks, rounds and iterations; and none repeats a chain's."""
    first = []
    chain = episode_of(Turn("", ""))

    def play(policy, envs, episodes, rngs, **kwargs):
        first.extend(rng.random() for rng in rngs)
        return episodes
    monkeypatch.setattr("utils.rollout", play)
    monkeypatch.setattr("utils.start_episodes", lambda envs, seeds: [chain] * len(envs))
    monkeypatch.setattr("algos.tree_grpo.rollout", play)
    monkeypatch.setattr("algos.tree_grpo.fork_episode", lambda env, episode, k, args: (
        types.SimpleNamespace(copies=True), episode))
    args = Args(num_prompts=3, group_size=2, forks=3, rounds=2)
    for iteration in range(3):
        grow_trees(tiny_policy, [None] * 6, args, iteration)
    assert len(first) == len(set(first)) == 3 * (6 + 6 * 3 * 2)


def test_log_probs_of_forked_rows_equal_a_full_recompute(grown):
    """Inherited and new tokens alike: the ratio of the first step is 1 everywhere."""
    policy, _, _, trees = grown
    batch = collate([leaf for tree in trees for leaf in tree], policy.device)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch["old_logprobs"]).abs().max() < 1e-4


def test_a_branch_whose_context_is_full_is_a_leaf_that_ends_there(tiny_policy):
    args = Args(num_prompts=2, group_size=2, max_turn_tokens=4, env_id="tests/Words-v0")
    envs = [Recorder(env, True) for env in make_envs(args, 4)]
    tiny_policy.context_length = 30
    trees = grow_trees(tiny_policy, envs, args, 0)
    leaves = [leaf for tree in trees for leaf in tree]
    assert len(leaves) == 12 and any(leaf.overflowed for leaf in leaves)
    assert all(leaf.done and len(leaf.row()) <= 30 for leaf in leaves)
    batch = collate(leaves, tiny_policy.device)
    assert owned_tokens(number_nodes(leaves, batch)).any()


def test_nodes_number_the_turns(grown):
    policy, _, _, trees = grown
    episodes = [leaf for tree in trees for leaf in tree]
    batch = collate(episodes, policy.device)
    nodes = number_nodes(episodes, batch)
    assert torch.equal(nodes >= 0, batch["turn_id"] >= 0)
    distinct = {id(turn): turn for e in episodes for turn in e.turns}.values()
    assert nodes.unique().numel() - 1 == len(distinct) < sum(len(e.turns) for e in episodes)
    assert owned_tokens(nodes).sum() == sum(len(turn.token_ids) for turn in distinct)
    for node in nodes.unique()[1:]:
        rows = (nodes == node).any(1).nonzero()[:, 0]
        assert len({tuple(batch["tokens"][row][nodes[row] == node].tolist()) for row in rows}) == 1


def test_search_forks_exactly():
    """A fork of the real environment goes on like the original."""
    env = Recorder(SearchQA("sparse"), True)
    [episode] = start_episodes([env], [7])
    rng = np.random.default_rng(0)
    while not episode.done:
        episode.answer(env, Turn(episode.observation, env.unwrapped.demonstrate(rng, noise=0.0)))
    assert episode.success and len(episode.turns) == 4
    for k in range(4):
        fork, branch = fork_episode(env, episode, k, Args())
        for turn in episode.turns[k:]:
            assert not branch.done
            branch.answer(fork, Turn(branch.observation, turn.action))
        assert branch.transcript() == episode.transcript() and branch.success


# --- the update ----------------------------------------------------------------------------------


@pytest.fixture
def batch(grown):
    policy, _, _, trees = grown
    episodes = [leaf for tree in trees for leaf in tree]
    batch = collate(episodes, policy.device)
    batch["node_id"] = number_nodes(episodes, batch)
    torch.manual_seed(0)
    leaf = torch.randn(len(episodes))
    batch["advantages"] = torch.where(batch["turn_id"] >= 0, leaf[:, None], 0.0)
    return policy, batch


def run_update(policy, batch, **options):
    keeper = KeepGradient(policy)
    args = Args(max_grad_norm=1e9, **({"keep_top_entropy": 0.2} | options))
    return update(policy, None, keeper, dict(batch), args), keeper.gradient


def same(one, other, **tolerance):
    tolerance = {"rtol": 1e-3, "atol": 1e-6} | tolerance
    assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
    assert torch.allclose(one[1], other[1], **tolerance)


def test_averaged_prefixes_divide_by_what_they_weigh(batch):
    """All tokens kept, weights 1 / copies: kept and all are the same mean over distinct tokens."""
    policy, batch = batch
    both = [run_update(policy, batch, prefix_credit="mean", keep_top_entropy=1.0, mask_denominator=d)
            for d in ("kept", "all")]
    same(*both)


@pytest.mark.parametrize("options", [
    {}, {"keep_top_entropy": 1.0}, {"prefix_credit": "mean", "entropy_rule": "top_k"},
    {"aggregation": "sequence_mean", "mask_denominator": "all"}])
def test_layout_does_not_matter(batch, options):
    """Micro-batches, padding and the order of rows change neither mask, metrics nor gradient."""
    policy, batch = batch
    base = run_update(policy, batch, **options)
    assert base[1].norm() > 1e-4
    same(base, run_update(policy, batch, micro_batch_tokens=1, **options))
    fill = {"turn_id": -1, "node_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x
              for k, x in batch.items()} | {"lengths": batch["lengths"] + 6}
    same(base, run_update(policy, padded, **options))
    order = torch.randperm(len(batch["tokens"]))
    same(base, run_update(policy, {k: x[order] for k, x in batch.items()}, **options))
    outside = batch["turn_id"] < 0
    changed = {name: torch.where(outside, 123.0, batch[name]) for name in ("old_logprobs", "advantages")}
    same(base, run_update(policy, batch | changed, **options))


def test_the_gradient_is_that_of_a_loop_over_kept_tokens(batch):
    """Per node: the sum (or mean) of its leaves' advantages, kept tokens by their entropy."""
    policy, batch = batch
    nodes, owned = batch["node_id"], owned_tokens(batch["node_id"])
    for credit in ("sum", "mean"):
        metrics, gradient = run_update(policy, batch, prefix_credit=credit)
        logprobs, entropy = token_logprobs(policy, batch, 1.0)
        tau = np.quantile(entropy[owned].detach().numpy(), 0.8)
        total, count = 0.0, 0.0
        for row, t in owned.nonzero().tolist():
            if entropy[row, t] >= tau - 1e-6:
                leaves = batch["advantages"][(nodes == nodes[row, t]).any(1)].amax(1) + \
                    batch["advantages"][(nodes == nodes[row, t]).any(1)].amin(1)  # the one nonzero value
                weight = leaves.sum() if credit == "sum" else leaves.mean()
                total = total + weight * logprobs[row, t]
                count += len(leaves) if credit == "sum" else 1
        policy.model.zero_grad()
        (-total / count).backward()
        expected = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6), credit
        assert metrics["entropy_kept"] > metrics["entropy_dropped"]
        policy.model.zero_grad()


def test_copies_agree_even_where_micro_batches_round_differently(batch, monkeypatch):
    policy, batch = batch
    import algos.tree_grpo as script
    original, torch_rng = script.batch_logprobs, torch.Generator().manual_seed(0)

    def noisy(*args):
        logprobs, entropies = original(*args)
        return logprobs, entropies + 1e-3 * torch.rand(entropies.shape, generator=torch_rng)
    seen = []

    def watch(rows, *args):
        seen.append((rows["kept_weights"] > 0, rows["node_id"]))
        return policy_loss(rows, *args)
    monkeypatch.setattr(script, "batch_logprobs", noisy)
    monkeypatch.setattr(script, "policy_loss", watch)
    run_update(policy, batch)
    [(kept, nodes)] = seen
    owner = owner_rows(nodes)
    assert torch.equal(kept, kept.gather(0, owner)) and (owner != torch.arange(len(nodes))[:, None]).any()


def test_keeping_all_is_no_mask_and_dividing_by_all_is_a_smaller_step(batch):
    policy, batch = batch
    policy_all = run_update(policy, batch, keep_top_entropy=1.0)
    assert policy_all[0]["kept_share"] == 1.0
    weights, count = loss_weights(batch["turn_id"], "token_mean")
    logprobs, _ = token_logprobs(policy, batch, 1.0)
    policy.model.zero_grad()
    (-(weights / count * batch["advantages"] * logprobs).sum()).backward()
    plain = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert torch.allclose(policy_all[1], plain, rtol=1e-3, atol=1e-7)
    policy.model.zero_grad()
    kept, every = (run_update(policy, batch, mask_denominator=d) for d in ("kept", "all"))
    share = kept[0]["kept_share"]
    assert torch.allclose(every[1], share * kept[1], rtol=1e-3, atol=1e-7) and 0.1 < share < 0.3
    inverted = run_update(policy, batch, invert_entropy_mask=True)
    assert inverted[0]["kept_share"] == pytest.approx(1 - share)
    whole = share * kept[1] + (1 - share) * inverted[1]
    assert torch.allclose(whole, policy_all[1], rtol=1e-3, atol=1e-6), "the two parts make the whole"


def test_entropy_is_that_of_the_current_policy_at_the_sampling_temperature(batch):
    policy, batch = batch
    one = run_update(policy, batch)[0]["entropy_threshold"]
    assert run_update(policy, batch, temperature=2.0)[0]["entropy_threshold"] > one + 1e-3
    with torch.no_grad():
        for p in policy.model.parameters():
            p *= 1.5
    assert run_update(policy, batch)[0]["entropy_threshold"] != pytest.approx(one, abs=1e-3)


def test_a_rank_without_rows_still_takes_the_step(tiny_policy):
    empty = collate([], torch.device("cpu"))
    empty |= {"advantages": torch.zeros(0, 1), "node_id": empty["turn_id"]}
    metrics, gradient = run_update(tiny_policy, empty)
    assert gradient.norm() == 0.0 and metrics["grad_norm"] == 0.0


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 2, "warm_start_steps": 20, "num_iterations": 2,
         "eval_episodes": 8, "eval_every": 1, "print_samples": 0}


@pytest.mark.parametrize("flags", [
    {"chains": True, "keep_top_entropy": 1.0}, {"group_size": 4, "forks": 0, "num_epochs": 2},
    {"rounds": 2, "fork": "replay", "prefix_credit": "mean", "entropy_rule": "top_k"},
    {"advantage": "intra", "singleton": "raw", "invert_entropy_mask": True, "dual_clip": 3.0},
    {"group_size": 1, "kl_coefficient": 0.1, "entropy_coefficient": 0.01},
    {"env_id": "turnrl/FrozenLake-v0", "aggregation": "sequence_sum", "mask_denominator": "all"}])
def test_every_arm_runs(flags, tmp_path):
    summary = main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    assert summary["iterations"] == 2 and 0 <= summary["success_end"] <= 1


def test_sampled_tokens_are_counted_once(tmp_path, monkeypatch):
    """generated_tokens and environment_steps of a run are what the policy really sampled."""
    drawn, original = [0, 0], Episode.answer

    def count(self, env, turn):
        drawn[0] += len(turn.token_ids)
        drawn[1] += len(turn.token_ids) > 0  # not the demonstrations
        original(self, env, turn)
    monkeypatch.setattr(Episode, "answer", count)
    monkeypatch.setattr("algos.tree_grpo.evaluate", lambda *args: ({"success": 0.0, "return": 0.0}, []))
    summary = main(Args(**QUICK, run_dir=str(tmp_path), env_id="tests/Words-v0"))
    assert [summary["generated_tokens"], summary["environment_steps"]] == drawn and drawn[0] > 0


@pytest.mark.parametrize("flags,needle", [
    ({"keep_top_entropy": 1.5}, "--keep-top-entropy"),
    ({"keep_top_entropy": 1.0, "invert_entropy_mask": True}, "train on nothing"), ({"group_size": 1, "forks": 0}, "--forks"),
    ({"forks": -1}, "--forks")])
def test_bad_flags_get_one_line(flags, needle, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and needle in lines[0]
