"""Trees and entropy masks against hand-worked numbers, slow loops and full recomputations."""

import csv
import math

import numpy as np
import pytest
import torch

import algos.tree_grpo as script
import rollouts
from algos.tree_grpo import (
    Args, entropy_threshold, first_copies, fork_episode, fork_points, grow_trees, main, number_nodes,
    policy_loss, tree_advantages, tree_metrics, update,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from rollouts import make_envs
from utils import collate, micro_batches, token_logprobs
from words import Words


def advantages_of(trees, advantage="both"):  # trees of one prompt, each with the scores of its leaves
    scores = torch.tensor([float(score) for tree in trees for score in tree])
    tree_id = torch.tensor([number for number, tree in enumerate(trees) for _ in tree])
    return tree_advantages(scores, tree_id, torch.zeros_like(tree_id), advantage).tolist()


@pytest.mark.parametrize("trees,intra,inter", [
    ([[1, 0, 0], [1, 1, 0]], [1.1547, -0.5773, -0.5773, 0.5773, 0.5773, -1.1547],
     [0.9129, -0.9129, -0.9129, 0.9129, 0.9129, -0.9129]),
    ([[1, 1, 1], [0, 0, 0]], [0.0] * 6, [0.9129] * 3 + [-0.9129] * 3),
    ([[1, 0], [0, 0]], [0.7071, -0.7071, 0, 0], [1.5, -0.5, -0.5, -0.5]),
    ([[1, 0, 0]], [1.1547, -0.5773, -0.5773], [1.1547, -0.5773, -0.5773]),
    ([[1], [0], [0], [0]], [0.0] * 4, [1.5, -0.5, -0.5, -0.5]),  # trees of one leaf: GRPO
    ([[1], [0, 1, 0]], [0, -0.5773, 1.1547, -0.5773], [0.8660, -0.8660, 0.8660, -0.8660]),
    ([[1, 0.2, 0.2], [0.8, 0.1, 0]], [1.1547, -0.5773, -0.5773, 1.1471, -0.4588, -0.6882],
     [1.4970, -0.4450, -0.4450, 1.0115, -0.6878, -0.9306])])
def test_advantages_by_hand(trees, intra, inter):
    assert advantages_of(trees, "intra") == pytest.approx(intra, abs=2e-4)
    assert advantages_of(trees, "inter") == pytest.approx(inter, abs=2e-4)
    assert advantages_of(trees) == pytest.approx([a + b for a, b in zip(intra, inter, strict=True)], abs=4e-4)


# --- Eq. 5: which tokens are kept ----------------------------------------------------------------

def test_the_threshold_by_hand():
    values = torch.arange(1, 11) / 10  # rho 0.2: the 0.8 quantile lies at 0.82
    assert entropy_threshold(values, 0.2) == pytest.approx(0.82)
    assert entropy_threshold(values, 0.0) == pytest.approx(1.0), "the largest always stays"
    assert entropy_threshold(values, 1.0) == entropy_threshold(values[:0], 0.2) == -math.inf
    assert entropy_threshold(torch.full((5,), 0.5), 0.2) == 0.5, "ties are all kept"


@pytest.fixture
def kept(tiny_policy, monkeypatch):  # what an update keeps of tokens with these entropies, behind an observation
    def run(nodes, entropies, **flags):
        nodes, entropies = (torch.nn.functional.pad(torch.tensor(x), (1, 0), value=-1) for x in (nodes, entropies))
        batch = {"tokens": nodes + 5, "turn_id": nodes, "node_id": nodes, "old_logprobs": 0.0 * nodes,
                 "advantages": 0.0 * nodes, "lengths": torch.full((len(nodes),), nodes.shape[1])}
        monkeypatch.setattr(script, "batch_logprobs", lambda *args: (None, entropies))
        monkeypatch.setattr(script, "policy_loss", lambda rows, *args: (
            seen.append(rows["kept_weights"]), policy_loss(rows, *args))[1])
        seen = []
        update(tiny_policy, KeepGradient(tiny_policy), batch, Args(**flags))
        return (seen[0][:, 1:] > 0).int().tolist()
    return run


@pytest.mark.parametrize("rho,expected", [(0.4, [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
                                          (0.1, [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])])
def test_the_threshold_counts_a_shared_token_once_and_keeps_all_its_copies(kept, rho, expected):
    """Seven distinct entropies: tau is 0.64 or 0.87. With copies in the pool, 0.84 would drop the 0.8."""
    nodes = [[0, 0, 1, 1, -1], [0, 0, 2, 2, 2]]
    entropies = [[0.9, 0.85, 0.3, 0.2, 7.0], [0.9, 0.85, 0.8, 0.05, 0.4]]
    assert kept(nodes, entropies, keep_top_entropy=rho) == expected
    inverted = [[int(n >= 0) - x for n, x in zip(*rows, strict=True)] for rows in zip(nodes, expected, strict=True)]
    assert kept(nodes, entropies, keep_top_entropy=rho, invert_entropy_mask=True) == inverted


def test_a_copy_that_rounding_puts_below_the_threshold_stays_with_its_twin(kept):
    """tau is 0.5. Of other tokens, one 1e-5 below it is dropped; one 5e-7 below it counts as equal."""
    for off, stays in ((1e-5, 0), (5e-7, 1)):
        entropies = [[0.5, 0.9, 0.1], [0.5 - 0.01, 0.5 - off, 0.2]]  # bf16 rounds copies that far apart
        assert kept([[0, 1, 1], [0, 2, 2]], entropies, keep_top_entropy=0.25) == [[1, 1, 0], [1, stays, 0]]


# --- Eq. 6: the loss -----------------------------------------------------------------------------

def loss_of(logprobs, old, advantages, kept, weights, clip=(0.2, 0.28), entropy=0.0):
    batch = {"old_logprobs": old, "advantages": advantages, "kept_weights": kept, "weights": weights}
    return policy_loss(batch, logprobs, entropy + torch.zeros_like(logprobs), *clip)


@pytest.mark.parametrize("ratio,advantage,term,slope", [
    (1.5, 1, 1.28, 0), (0.5, 1, 0.5, 0.5), (1.5, -1, -1.5, -1.5), (0.5, -1, -0.8, 0),
    (1.25, 1, 1.25, 1.25), (0.75, -1, -0.8, 0), (1.25, -2, -2.5, -2.5), (0.75, 2, 1.5, 1.5), (1.0, 3, 3, 3)])
def test_the_four_quadrants_of_clipping(ratio, advantage, term, slope):
    """Clip 0.2 below, 0.28 above. The first token is kept, the second, where clipping binds, is not."""
    logprobs = torch.tensor([[ratio, 1.5]]).log().requires_grad_()
    advantages, kept, weights = torch.tensor([[advantage, 1.0], [0.5, 0.0], [0.25, 0.75]])[:, None]
    loss, parts = loss_of(logprobs, torch.zeros(1, 2), advantages, kept, weights)
    loss.backward()
    assert loss.item() == parts["loss"].item() == pytest.approx(-0.5 * term)
    assert logprobs.grad[0].tolist() == pytest.approx([-0.5 * slope, 0])
    assert parts["clip_fraction"].item() == 0.75 + 0.25 * (slope == 0)


def test_the_loss_is_a_mean_over_kept_tokens_and_the_other_columns_are_means_over_all():
    """Losses 1 -2 0.5 3 -1, the second and fourth are kept: 0.5 (of all five it would be 0.3)."""
    ratio = torch.tensor([[1.0, 2, 1, 1, 1]])
    advantages = -torch.tensor([[1, -2, 0.5, 3, -1]]) / ratio
    kept, weights = torch.tensor([[0, 0.5, 0, 0.5, 0]]), torch.full((1, 5), 0.2)
    entropy = torch.tensor([[0.05, 1.3, 0.01, 0.9, 0.2]])
    loss, parts = loss_of(ratio.log(), torch.zeros(1, 5), advantages, kept, weights, (9, 9), entropy)
    assert loss.item() == pytest.approx(0.5)
    assert parts["entropy"].item() == pytest.approx(2.46 / 5) and not entropy.requires_grad
    assert parts["approx_kl"].item() == pytest.approx((2 - 1 - math.log(2)) / 5), "k3, from samples of old"


def test_the_gradient_of_the_loss_equals_finite_differences():
    torch.manual_seed(0)
    old, kept, weights = torch.randn(2, 5).double(), *torch.rand(2, 2, 5).double()
    signs = torch.tensor([[1.0], [-1.0]]).double()
    start = (old + 0.3 * torch.randn(2, 5).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda logprobs: loss_of(logprobs, old, signs, kept, weights)[0], start)


def test_a_ratio_beyond_all_bounds_stays_finite():
    logprobs, one = torch.tensor([[200.0]], requires_grad=True), torch.ones(1, 1)
    loss_of(logprobs, 0 * one, -one, one, one)[0].backward()
    assert logprobs.grad.isfinite().all()


# --- Eq. 1: trees --------------------------------------------------------------------------------

def episode_of(*turns):
    return Episode(0, "", list(turns), terminated=True)


def test_every_turn_is_a_fork_point_once():
    """A chain of three turns: the root, after n1, after n2, never after the answer."""
    n1, n2, answer, b2, b3 = (Turn(str(i), "") for i in range(5))
    chain = episode_of(n1, n2, answer)
    assert fork_points([chain]) == [(0, 0), (0, 1), (0, 2)]
    assert fork_points([chain, episode_of(n1, b2, b3)]) == [(0, 0), (0, 1), (0, 2), (1, 2)]
    assert fork_points([chain, episode_of(b2)]) == [(0, 0), (0, 1), (0, 2)]
    assert fork_points([chain, episode_of(Turn("0", ""), n2)])[-1] == (1, 1), "equal turns are still two turns"
    for length in range(1, 6):  # new turns of a fork: half a chain and half a turn
        points = fork_points([episode_of(*(Turn("", "") for _ in range(length)))])
        assert np.mean([length - k for _, k in points]) == (length + 1) / 2


def words(**flags):
    return Args(**{"num_prompts": 3, "group_size": 2, "forks": 4, "max_turns": 5, "env_id": "tests/Words-v0"} | flags)


@pytest.fixture
def grown(tiny_policy):
    """Trees of an untrained policy: 3 prompts of 2 trees of 1 + 4 leaves."""
    tiny_policy.max_turn_tokens = 4
    return tiny_policy, grow_trees(tiny_policy, make_envs(words()), words(), 0)


def test_a_tree_is_a_chain_and_branches_that_share_its_turns(grown):
    _, trees = grown
    assert [len(tree) for tree in trees] == [1 + 4] * 6, "M (N + 1) leaves of every prompt"
    assert [tree[0].seed for tree in trees[::2]] == [tree[0].seed for tree in trees[1::2]]
    depths = []
    for tree in trees:
        for leaf in tree:
            assert leaf.seed == tree[0].seed and leaf.turns[0].observation == f"start {leaf.seed}"
            assert leaf.terminated or (leaf.truncated and len(leaf.turns) == 5), "all turns of the prefix count"
            assert leaf.info["heard"] == [turn.action for turn in leaf.turns], "its own environment"
            assert [int(t.observation.split()[0]) for t in leaf.turns[1:]] == list(range(1, len(leaf.turns)))
            shared = [any(turn is t for t in tree[0].turns) for turn in leaf.turns]
            assert shared == sorted(shared, reverse=True), "a prefix of the chain, then new turns"
            depths.append(sum(shared) - len(tree[0].turns))
    assert depths[::5] == [0] * 6 and max(depths[i] for i in range(30) if i % 5) < 0 and len(set(depths)) > 3


def long_chain(policy):
    policy.max_turn_tokens = 4
    trees = grow_trees(policy, make_envs(words(num_prompts=16)), words(num_prompts=16, forks=0), 3)
    return next(leaf for [leaf] in trees if len(leaf.turns) > 3)


@pytest.mark.parametrize("k", range(4))
def test_forks_of_one_turn_start_where_its_prefix_ended_and_are_independent(tiny_policy, k):
    chain = long_chain(tiny_policy)
    (env, branch), (other, _) = (fork_episode(chain, k, words()) for _ in range(2))
    heard = [turn.action for turn in chain.turns[:k]]
    assert branch.info == (chain.turns[k - 1].info if k else chain.start_info)
    assert branch.start_info == chain.start_info and branch.seed == chain.seed and not branch.done
    assert branch.observation == chain.turns[k].observation and branch.turns is not chain.turns
    assert all(a is b for a, b in zip(branch.turns, chain.turns[:k], strict=True))
    first = env.step("one")[0]
    assert env.unwrapped.heard == [*heard, "one"] and other.unwrapped.heard == heard
    assert first.split()[1] == other.step("two")[0].split()[1], "siblings meet the same chance"


@pytest.mark.parametrize("changed", range(4))
def test_a_fork_compares_every_observation_up_to_its_turn(tiny_policy, changed, capsys):
    chain = long_chain(tiny_policy)
    chain.turns[changed].observation += " or so"
    for k in range(changed):
        fork_episode(chain, k, words())
    for k in range(changed, 4):
        pytest.raises(SystemExit, fork_episode, chain, k, words())
        assert f"seed {chain.seed} came out differently before turn {changed}\n" in capsys.readouterr().err


@pytest.mark.parametrize("entry,value", [(0, "other"), (2, True), (3, True)])  # observation, terminated, truncated
def test_an_environment_that_does_not_repeat_itself_gets_one_line(tiny_policy, monkeypatch, capsys, entry, value):
    chain, step = long_chain(tiny_policy), Words.step
    monkeypatch.setattr(Words, "step", lambda self, action: tuple(
        value if i == entry else x for i, x in enumerate(step(self, action))))
    with pytest.raises(SystemExit) as end:
        fork_episode(chain, 1, words())
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "--env-id tests/Words-v0: it does not repeat itself" in line


def test_forks_are_drawn_uniformly_over_the_turns(tiny_policy, monkeypatch):
    """10,000 forks of chains of three turns: a third each within 3 sigma."""
    ks, chain = [], episode_of(*(Turn("", "") for _ in range(3)))
    monkeypatch.setattr(script, "collect_groups", lambda *args: [chain] * 100)
    monkeypatch.setattr(script, "rollout", lambda *args: [])
    monkeypatch.setattr(script, "fork_episode", lambda episode, k, args: (ks.append(k), episode))
    grow_trees(tiny_policy, [], words(forks=100), 0)
    assert np.bincount(ks) / 10000 == pytest.approx(1 / 3, abs=3 * math.sqrt(2 / 9 / 10000)) and len(ks) == 10000


def test_every_chain_and_every_branch_draws_its_own_numbers(tiny_policy, monkeypatch):
    states, original = [], script.rollout
    for module in (script, rollouts):
        monkeypatch.setattr(module, "rollout", lambda policy, envs, episodes, rngs, *args: (
            states.extend(rng.bit_generator.state["state"]["state"] for rng in rngs),
            original(policy, envs, episodes, rngs, *args))[1])
    for iteration in range(3):
        grow_trees(tiny_policy, make_envs(words()), words(), iteration)
    assert len(states) == len(set(states)) == 3 * (6 + 6 * 4)


def test_a_second_process_grows_the_trees_that_follow(grown, monkeypatch):
    policy, trees = grown
    for module in (script, rollouts):
        monkeypatch.setattr(module, "rank", lambda: 1)
    half = grow_trees(policy, make_envs(words(), 3), words(), 0)
    assert [leaf.transcript() for t in half for leaf in t] == [leaf.transcript() for t in trees[3:] for leaf in t]


def test_branches_end_where_the_context_is_full_and_a_chain_without_turns_has_none(tiny_policy):
    args = words(num_prompts=16)
    tiny_policy.context_length = 60
    prompts = [len(tree[0].turns[0].prompt_ids) for tree in grow_trees(tiny_policy, make_envs(args), args, 0)]
    tiny_policy.context_length = min(prompts) + 8  # one turn, if any
    trees = grow_trees(tiny_policy, make_envs(args), args, 0)
    assert {(len(tree), bool(tree[0].turns)) for tree in trees} == {(1, False), (5, True)}
    assert all(leaf.overflowed and len(leaf.row()) <= min(prompts) + 8 for tree in trees for leaf in tree[1:])


def test_the_metrics_of_trees_by_hand():
    """Three prompts, four trees, one leaf with an advantage. Turns of 2 and of 12 tokens are shared."""
    a, b, c, d, e, f, g, h, i, j, k, last = (Turn("", "", token_ids=[0] * n) for n in range(1, 13))
    d.reward = e.reward = g.reward = 0.5
    trees = [[episode_of(b, a), episode_of(b, c)], [episode_of(d), episode_of(e)],
             [episode_of(f, g), episode_of(h)], [episode_of(last, i, j), episode_of(last, k)]]
    credit = torch.tensor([0, 0, 0, 0, -0.7, 0, 0, 0])[:, None] * torch.tensor([0.0, 1, 0])
    assert tree_metrics(trees, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), credit) == pytest.approx({
        "groups_without_signal": 2 / 3, "trees_without_signal": 0.75, "leaves_per_1000_tokens": 1000 * 8 / 78,
        "row_tokens_per_sampled": 92 / 78})


@pytest.mark.parametrize("high,low,silent", [
    (sum([0.4, 30.3, 20.2, 10.1]), sum([10.1, 20.2, 30.3, 0.4]), 1), (6.1e7 + 4, 6.1e7, 1), (1000.0001, 1000.0, 1),
    (1000.5, 1000.0, 0), (-1000.0, -1000.5, 0), (0.001, 0.0, 0), (1 + 1.97e-6, 1.0, 1), (1 + 2.03e-6, 1.0, 0)])
def test_a_tree_teaches_something_where_its_leaves_differ_by_more_than_rounding(high, low, silent):
    """As the advantages have it."""
    leaves, zeros = [Episode(0, "", [Turn("", "", reward=x)]) for x in (high, low)], torch.zeros(2).long()
    credit = tree_advantages(torch.tensor([high, low], dtype=torch.double), zeros, zeros)[:, None]
    got = tree_metrics([leaves], zeros, credit)
    assert got["trees_without_signal"] == got["groups_without_signal"] == silent


# --- the update ----------------------------------------------------------------------------------

@pytest.fixture
def batch(grown):
    """Rows of the trees with an irregular advantage for every leaf."""
    policy, trees = grown
    episodes = [leaf for tree in trees for leaf in tree]
    batch = collate(episodes, policy.device, 9 * torch.arange(1.0, 31)[:, None].sin().expand(30, 6))
    return policy, batch | {"node_id": number_nodes(episodes, batch)}


@pytest.fixture
def off_policy(batch):
    """As if another policy had sampled: ratios from 0.4 to 2.5."""
    noise = 0.4 * torch.randn(batch[1]["tokens"].shape, generator=torch.Generator().manual_seed(1))
    return batch[0], batch[1] | {"old_logprobs": batch[1]["old_logprobs"] + noise}


def run_update(policy, batch, **flags):
    keeper = KeepGradient(policy)
    args = Args(max_grad_norm=1e9, **({"keep_top_entropy": 0.2} | flags))
    return update(policy, keeper, dict(batch), args), keeper.gradient


def gradient_of(policy, loss):
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return gradient


@pytest.mark.parametrize("flags", [{}, {"keep_top_entropy": 1.0}, {"invert_entropy_mask": True}])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_update_equals_a_loop_over_tokens(off_policy, parts, flags):
    """Gradient and every logged column, for several micro-batches."""
    policy, batch = off_policy
    flags = {"keep_top_entropy": 0.2, "clip_high": 0.3, "temperature": 1.2} | flags
    limit = next(n for n in range(4000, 0, -1) if len(list(micro_batches(batch, n))) == parts)
    metrics, gradient = run_update(policy, batch, micro_batch_tokens=limit, **flags)

    logprobs, entropies = token_logprobs(policy, batch, 1.2)
    sampled, share = (batch["turn_id"] >= 0).nonzero().tolist(), flags["keep_top_entropy"]
    # shared tokens stand in the same columns
    distinct = {(int(batch["node_id"][row, t]), t): entropies[row, t].item() for row, t in sampled}
    tau = np.quantile(list(distinct.values()), 1 - share) if share < 1 else -math.inf
    objective, table = 0.0, []
    for row, t in sampled:
        keep = (entropies[row, t].item() >= tau - 1e-6) != ("invert_entropy_mask" in flags)
        ratio, advantage = (logprobs[row, t] - batch["old_logprobs"][row, t]).exp(), batch["advantages"][row, t]
        stopped = ratio.item() > 1.3 if advantage > 0 else ratio.item() < 0.8
        if keep:
            objective = objective + ((1.3 if advantage > 0 else 0.8) if stopped else ratio) * advantage
        r, h = ratio.item(), entropies[row, t].item()
        table.append((keep, keep * h, h, stopped, r - 1 - math.log(r)))
    expected = dict(zip(("kept_share", "entropy_kept", "entropy", "clip_fraction", "approx_kl"),
                        np.mean(table, 0), strict=True))
    expected["entropy_kept"] /= expected["kept_share"]
    loss = -objective / sum(line[0] for line in table)
    slow = gradient_of(policy, loss)
    expected |= {"loss": loss.item(), "entropy_threshold": tau, "grad_norm": slow.norm().item()}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.allclose(gradient, slow, rtol=1e-3, atol=1e-6) and slow.norm() > 1e-3
    assert 0.05 < metrics["clip_fraction"] < 0.6 and metrics["approx_kl"] > 0.01


def test_a_shared_token_gets_the_sum_of_the_advantages_of_its_leaves(batch):
    policy, batch = batch
    logprobs, _ = token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch["old_logprobs"]).abs().max() < 1e-4, "a full recompute: inherited and new tokens alike"
    total, nodes = 0.0, batch["node_id"]  # a loop over what was really sampled; the mean counts copies
    for row, t in (first_copies(nodes) == torch.arange(30)[:, None]).logical_and(nodes >= 0).nonzero().tolist():
        total = total + batch["advantages"][nodes[:, t] == nodes[row, t], t].sum() * logprobs[row, t]
    slow = gradient_of(policy, -total / (nodes >= 0).sum())
    assert torch.allclose(run_update(policy, batch, keep_top_entropy=1.0)[1], slow, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changed", ["order", "outside", "padding"])
def test_layout_does_not_matter(off_policy, changed):
    """Another order of rows, other numbers where nothing was sampled, wider rows."""
    policy, batch = off_policy
    order, outside = torch.randperm(30), batch["turn_id"] < 0
    fill = {"turn_id": -1, "node_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    other = {"order": {name: x[order] for name, x in batch.items()},
             "outside": batch | {x: torch.where(outside, 9.0, batch[x]) for x in ("old_logprobs", "advantages")},
             "padding": {name: torch.nn.functional.pad(x, (0, 6), value=fill[name]) if name in fill else x
                         for name, x in batch.items()} | {"lengths": batch["lengths"] + 6}}[changed]
    one, two = run_update(policy, batch), run_update(policy, other)
    assert two[0] == pytest.approx(one[0], rel=1e-4, abs=1e-6)
    assert torch.allclose(two[1], one[1], rtol=1e-3, atol=1e-6)


def test_entropy_is_that_of_the_current_policy_at_the_sampling_temperature(batch):
    policy, batch = batch
    before, hot = (run_update(policy, batch, temperature=t)[0]["entropy_threshold"] for t in (1.0, 2.0))
    policy.model.load_state_dict({name: 1.5 * x for name, x in policy.model.state_dict().items()})
    assert run_update(policy, batch)[0]["entropy_threshold"] < before - 1e-3 < hot - 2e-3


def test_a_process_without_rows_still_takes_the_step(tiny_policy):
    empty = collate([], tiny_policy.device, torch.zeros(0, 1))
    metrics, gradient = run_update(tiny_policy, empty | {"node_id": empty["turn_id"]})
    assert gradient.norm() == metrics["grad_norm"] == 0.0


# --- whole runs ----------------------------------------------------------------------------------

def quick(tmp_path, **flags):
    return words(**{"warm_start_steps": 20, "num_iterations": 2, "eval_episodes": 8, "eval_every": 2, "forks": 2,
                    "print_samples": 0, "max_turn_tokens": 4, "run_dir": str(tmp_path)} | flags)


@pytest.mark.parametrize("advantage,terms", [("both", (0, 1)), ("intra", (0,)), ("inter", (1,))])
def test_a_run_credits_every_token_by_its_tree_and_its_prompt(tmp_path, monkeypatch, advantage, terms):
    grown, batches = [], []
    monkeypatch.setattr(script, "grow_trees", lambda *args: grown.append(grow_trees(*args)) or grown[-1])
    monkeypatch.setattr(script, "update", lambda *args: batches.append(dict(args[2])) or update(*args))
    main(quick(tmp_path, advantage=advantage, num_iterations=1, num_minibatches=3))
    [trees], expected = grown, ([], [], [])  # of three prompts, one in a minibatch
    for number, tree in enumerate(trees):
        for leaf in tree:
            scores = [[x.total_reward for x in leaves] for leaves in (tree, sum(trees[number // 2 * 2:][:2], []))]
            expected[number // 2].append((leaf, sum(
                (leaf.total_reward - np.mean(scores[i])) / (np.std(scores[i], ddof=1) + 1e-6) for i in terms)))
    for batch, pairs in zip(batches, [x for x in expected if any(credit for _, credit in x)], strict=True):
        leaves, credit = zip(*pairs, strict=True)
        nodes, numbers = torch.full_like(batch["turn_id"], -1), {}
        for row, leaf in enumerate(leaves):
            for k, turn in enumerate(leaf.turns):
                nodes[row, batch["turn_id"][row] == k] = numbers.setdefault(id(turn), len(numbers))
        assert torch.equal(batch["node_id"], nodes) and max(map(abs, credit)) > 0.5
        assert torch.allclose(batch["advantages"], torch.tensor(credit).float()[:, None] * (nodes >= 0), atol=1e-4)


@pytest.mark.parametrize("flags,leaves", [
    ({}, 3 * 2 * 3), ({"chains": True}, 3 * 4), ({"group_size": 6, "forks": 0}, 3 * 6)])
def test_an_arm_has_its_leaves_and_counts_shared_turns_once(tmp_path, monkeypatch, flags, leaves):
    drawn, original = [], Episode.answer
    monkeypatch.setattr(Episode, "answer", lambda self, env, turn: (
        drawn.append(len(turn.token_ids)), original(self, env, turn)))
    monkeypatch.setattr("run_folder.evaluate", lambda *args: ({"success": 0.0, "return": 0.0}, []))
    summary = main(quick(tmp_path, **flags))
    drawn = [n for n in drawn if n]  # demonstrations have no tokens
    assert summary["generated_tokens"] == sum(drawn) > 0 and summary["environment_steps"] == len(drawn)
    _, *rows = csv.DictReader(next(tmp_path.glob("*/metrics.csv")).read_text().splitlines())
    for row, tokens in zip(rows, np.diff([0, *(int(row["generated_tokens"]) for row in rows)]), strict=True):
        assert float(row["leaves_per_1000_tokens"]) == pytest.approx(1000 * leaves / tokens)
        assert (float(row["row_tokens_per_sampled"]) > 1) == (not flags)


@pytest.mark.parametrize("flags,needle", [
    ({"keep_top_entropy": 1.5}, "--keep-top-entropy"), ({"group_size": 1, "forks": 0}, "--forks"),
    ({"keep_top_entropy": 1.0, "invert_entropy_mask": True}, "--keep-top-entropy"), ({"forks": -1}, "--forks")])
def test_bad_flags_get_one_line(flags, needle, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(quick(tmp_path, **flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and needle in lines[0]
