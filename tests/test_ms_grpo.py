"""The mathematics of MS-GRPO against hand-worked numbers, slow loops and exact expectations."""

import itertools
import math

import numpy as np
import pytest
import torch

from algos.ms_grpo import (
    Args, absolute_advantage_weights, aggregation_weights, clipped_objective, draw_episodes,
    episode_returns, group_relative_advantages, kl_policy_ref_k3, main, policy_loss,
    sum_over_turns, turn_advantages, update,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from utils import collate, collect_groups, expand_to_tokens, make_envs, token_logprobs

CPU = torch.device("cpu")


def table(rows):
    """Ragged lists as a padded (E, K) tensor and its mask."""
    width = max(map(len, rows))
    values = torch.tensor([row + [99.0] * (width - len(row)) for row in rows])  # 99: must not count
    return values, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def relative(scores, group=None, **options):
    scores = torch.as_tensor(scores)
    group = torch.zeros(len(scores), dtype=torch.long) if group is None else torch.tensor(group)
    return group_relative_advantages(scores, group, epsilon=0.0, **options)


# --- Eq. 1-3: advantages -------------------------------------------------------------------------
# Four episodes of one group, of 4, 3, 2 and 5 turns:
#   rewards  0 1 0 1      | 0 1 -1      | 0 -1        | 1 0 1 0 1
#   return   2            | 0           | -1          | 3             mean 1, variance 10/3 (ddof 1)
#   A        .547723 x4   | -.547723 x3 | -1.095445x2 | 1.095445 x5
M1 = [[0.0, 1, 0, 1], [0.0, 1, -1], [0.0, -1], [1.0, 0, 1, 0, 1]]


@pytest.mark.parametrize("ddof,expected", [
    (1, [0.547723, -0.547723, -1.095445, 1.095445]),
    (0, [0.632456, -0.632456, -1.264911, 1.264911])])
def test_every_turn_gets_the_relative_return_of_its_episode(ddof, expected):
    rewards, mask = table(M1)
    returns = episode_returns(rewards, mask)
    assert returns.tolist() == [2, 0, -1, 3]
    assert relative(returns.tolist(), degrees_of_freedom=ddof).tolist() == pytest.approx(
        expected, abs=1e-5)
    credit = turn_advantages(rewards, mask, torch.zeros(4, dtype=torch.long), "episode",
                             "group_std", ddof)
    for row, length, advantage in zip(credit.tolist(), [4, 3, 2, 5], expected, strict=True):
        assert row == pytest.approx([advantage] * length + [0.0] * (5 - length), abs=1e-5)


def test_the_controls_credit_turns_and_not_episodes():
    """Normalised over all 14 turns: what the paper's method must not do."""
    rewards, mask = table(M1)
    groups = torch.zeros(4, dtype=torch.long)
    step = turn_advantages(rewards, mask, groups, "step", "group_std", 1)
    assert step[0, :4].tolist() == pytest.approx([-0.393398, 0.983495, -0.393398, 0.983495], abs=1e-5)
    to_go = turn_advantages(rewards, mask, groups, "return_to_go", "none", 1)
    values = [2.0, 2, 1, 1, 0, 0, -1, -1, -1, 3, 2, 2, 1, 1]
    expected = np.array(values) - np.mean(values)
    assert to_go[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert (step[~mask] == 0).all() and (to_go[~mask] == 0).all()


def test_penalties_are_part_of_the_return():
    """Returns [1, 1 - 1, 0, 0 - 1] after a penalty of 1 in episodes 2 and 4."""
    assert relative([1.0, 0, 0, -1], degrees_of_freedom=0).tolist() == pytest.approx(
        [1.414214, 0, 0, -1.414214], abs=1e-5)
    assert relative([1.0, 0, 0, -1]).tolist() == pytest.approx([1.224745, 0, 0, -1.224745], abs=1e-5)


def test_group_advantages_against_a_loop_from_the_paper():
    rng = np.random.default_rng(0)
    for _ in range(20):
        group = rng.integers(4, size=17)
        scores = rng.normal(size=17).astype(np.float32)
        for ddof in (0, 1):
            expected = np.zeros(17)
            for e in range(17):
                members = [scores[i] for i in range(17) if group[i] == group[e]]
                if len(members) > 1:
                    mean = sum(members) / len(members)
                    variance = sum((x - mean) ** 2 for x in members) / (len(members) - ddof)
                    expected[e] = (scores[e] - mean) / (math.sqrt(variance) + 1e-6)
            got = group_relative_advantages(torch.tensor(scores), torch.tensor(group),
                                            degrees_of_freedom=ddof)
            assert got.numpy() == pytest.approx(expected, abs=1e-4)


def test_a_group_of_one_or_of_equals_gets_exactly_zero():
    assert relative([5.0]).tolist() == [0.0]
    assert relative([0.1] * 7).tolist() == [0.0] * 7
    one_apple = [sum([1.0 - 0.01] + [-0.01] * 7), sum([-0.01] * 7 + [1.0 - 0.01])]
    assert relative(torch.tensor(one_apple) + torch.tensor([0.0, 6e-8])).tolist() == [0.0, 0.0]
    assert relative([0.1, 0.1, 5.0, 1.0, 0.0], [0, 0, 1, 2, 2], scale="none").tolist() == [
        0, 0, 0, 0.5, -0.5]


def test_advantages_are_invariant_where_they_should_be():
    rng = np.random.default_rng(1)
    scores, group = rng.normal(size=12).tolist(), [0, 1, 2] * 4
    base = relative(scores, group)
    for g in range(3):
        assert base[g::3].sum().item() == pytest.approx(0, abs=1e-5)
    shifted = [s + 10 * g for s, g in zip(scores, group, strict=True)]
    assert torch.allclose(relative(shifted, group), base, atol=1e-4)
    order = rng.permutation(12)
    permuted = relative([scores[i] for i in order], [group[i] for i in order])
    assert torch.allclose(permuted, base[torch.tensor(order)], atol=1e-6)
    rewards, mask = table([row[::-1] for row in M1])
    assert episode_returns(rewards, mask).tolist() == [2, 0, -1, 3], "reward order does not matter"


def test_one_turn_episodes_are_plain_grpo():
    rewards, mask = table([[1.0], [0.0], [0.0], [1.0]])
    for credit in ("episode", "return_to_go", "step"):
        got = turn_advantages(rewards, mask, torch.zeros(4, dtype=torch.long), credit, "group_std", 1)
        assert got[:, 0].tolist() == pytest.approx([0.866025, -0.866025, -0.866025, 0.866025], abs=1e-5)


# --- Eq. 5: the draw -----------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_absolute_advantage_weights_by_hand(ddof):
    advantages = relative([2.0, 0, -1, 3], degrees_of_freedom=ddof)
    for power, expected in ((1, [1 / 6, 1 / 6, 1 / 3, 1 / 3]), (2, [0.1, 0.1, 0.4, 0.4]),
                            (0, [0.25] * 4)):
        assert absolute_advantage_weights(advantages, power).tolist() == pytest.approx(expected)


def test_a_uniform_draw_also_leaves_out_what_carries_no_signal():
    advantages = torch.tensor([0.0, 1.0, -2.0, 0.0])
    assert absolute_advantage_weights(advantages, power=0.0).tolist() == [0.0, 0.5, 0.5, 0.0]


def test_weights_across_groups_depend_on_the_scale():
    scores, group = [2.0, 0, -1, 3, 0.2, 0, 0.2, 0], [0] * 4 + [1] * 4
    with_std = absolute_advantage_weights(relative(scores, group))
    assert with_std.tolist() == pytest.approx(
        [0.081139, 0.081139, 0.162278, 0.162278] + [0.128292] * 4, abs=1e-5)
    without = absolute_advantage_weights(relative(scores, group, scale="none"))
    assert without.tolist() == pytest.approx([0.15625, 0.15625, 0.3125, 0.3125] + [0.015625] * 4)


@pytest.mark.parametrize("returns,first,push", [
    ([1.0, 0, 0, 0], 0.5, 0.5), ([0.0, 1, 1, 1], 0.5, -0.5), ([1.0] + [0.0] * 7, 0.5, None)])
def test_the_draw_pushes_towards_the_rarer_outcome(returns, first, push):
    advantages = relative(returns)
    weights = absolute_advantage_weights(advantages)
    rest = [0.5 / (len(returns) - 1)] * (len(returns) - 1)
    assert weights.tolist() == pytest.approx([first] + rest)
    if push is not None:
        assert (weights * advantages).sum().item() == pytest.approx(push, abs=1e-5)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6), "a uniform draw does not push"


def test_without_signal_there_is_nothing_to_draw():
    weights = absolute_advantage_weights(relative([1.0] * 4))
    assert weights.tolist() == [0.0] * 4
    for replacement in (True, False):
        assert len(draw_episodes(weights, 3, replacement, np.random.default_rng(0))) == 0


def test_draws_have_the_stated_frequencies():
    """With replacement 6 draws expect [1, 1, 2, 2]; 2 without include [11, 11, 19, 19] / 30."""
    weights = torch.tensor([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    rng, n = np.random.default_rng(0), 20000
    counts = sum(np.bincount(draw_episodes(weights, 6, True, rng), minlength=4) for _ in range(n)) / n
    assert counts == pytest.approx([1, 1, 2, 2], abs=0.04)
    counts = sum(np.bincount(draw_episodes(weights, 2, False, rng), minlength=4) for _ in range(n)) / n
    assert counts == pytest.approx([11 / 30, 11 / 30, 19 / 30, 19 / 30], abs=0.015)


def test_a_draw_without_replacement_stops_at_the_last_episode_with_weight():
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7])
    for seed in range(20):
        drawn = draw_episodes(weights, 4, False, np.random.default_rng(seed))
        assert sorted(drawn) == [1, 3]
        assert set(draw_episodes(weights, 9, True, np.random.default_rng(seed))) <= {1, 3}


# --- Eq. 4: the loss -----------------------------------------------------------------------------
# token:      episode 0, turn 0    turn 1 | episode 1, turn 0         clip 0.2
# ratio          1.0    1.5       0.5    |   1.1    0.7    1.0
# A               +1     +1        +1    |    -1     -1     -1
# term           1.0    1.2       0.5    |  -1.1   -0.8   -1.0
M3_RATIO = torch.tensor([[1.0, 1.5, 0.5], [1.1, 0.7, 1.0]])
M3_TURN = torch.tensor([[0, 0, 1], [0, 0, 0]])
M3_ADVANTAGE = torch.tensor([[1.0], [-1.0]]).expand(2, 3)


def loss_of(logprobs, old, advantages, turn_id, episode_id, aggregation="token_mean", **options):
    options = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coefficient": 0.0,
               "kl_coefficient": 0.0} | options
    weights = aggregation_weights(turn_id, episode_id, aggregation)
    batch = {"old_logprobs": old, "ref_logprobs": options.pop("ref", old), "advantages": advantages,
             "weights": weights / weights.sum()}
    entropy = options.pop("entropy", torch.zeros_like(logprobs))
    return policy_loss(batch, logprobs, entropy, **options)


@pytest.mark.parametrize("aggregation,objective", [
    ("token_mean", -0.033333), ("turn_mean", 0.211111), ("episode_mean", -0.083333)])
def test_the_objective_by_hand(aggregation, objective):
    log_ratio = M3_RATIO.log()
    terms = clipped_objective(log_ratio, M3_ADVANTAGE, 0.2, 0.2)
    assert terms.flatten().tolist() == pytest.approx([1.0, 1.2, 0.5, -1.1, -0.8, -1.0], abs=1e-6)
    loss, stats = loss_of(log_ratio, torch.zeros(2, 3), M3_ADVANTAGE, M3_TURN, torch.tensor([0, 1]),
                          aggregation)
    assert loss.item() == pytest.approx(-objective, abs=1e-5) == stats["loss"].item()


def test_clipping_stops_the_gradient_in_the_two_right_quadrants_only():
    """(ratio, A): value and gradient with respect to the log-ratio; clip 0.2 / 0.28."""
    cases = {(1.25, 1.0): (1.25, 1.25), (1.4, 1.0): (1.28, 0.0), (0.7, 1.0): (0.7, 0.7),
             (0.7, -1.0): (-0.8, 0.0), (1.4, -1.0): (-1.4, -1.4), (0.9, -1.0): (-0.9, -0.9)}
    for (ratio, advantage), expected in cases.items():
        log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
        value = clipped_objective(log_ratio, torch.tensor([[advantage]]), 0.2, 0.28)
        value.sum().backward()
        assert (value.item(), log_ratio.grad.item()) == pytest.approx(expected, abs=1e-5)


def test_dual_clip_bounds_only_negative_advantages():
    for (ratio, advantage), expected in {(4.0, -1.0): (-3.0, 0.0), (4.0, 1.0): (1.28, 0.0),
                                         (2.0, -1.0): (-2.0, -2.0)}.items():
        log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
        value = clipped_objective(log_ratio, torch.tensor([[advantage]]), 0.2, 0.28, dual_clip=3.0)
        value.sum().backward()
        assert (value.item(), log_ratio.grad.item()) == pytest.approx(expected, abs=1e-5)


def test_clip_fraction_counts_binding_tokens():
    """Five ratios, of which only 1.5 with A = 2 binds (1.4 with A = -1 does not)."""
    ratio = torch.tensor([[1.2, 0.9, 1.1, 1.5, 1.4]], dtype=torch.double)  # 1.2 is the edge
    advantages = torch.tensor([[1.0, -0.5, 0.5, 2.0, -1.0]])
    loss, stats = loss_of(ratio.log(), torch.zeros(1, 5), advantages,
                          torch.zeros(1, 5, dtype=torch.long), torch.tensor([0]))
    assert loss.item() == pytest.approx(-0.46, abs=1e-5)
    assert stats["clip_fraction"].item() == pytest.approx(0.2)


def test_the_loss_gradient_equals_finite_differences():
    torch.manual_seed(0)
    turn_id = torch.tensor([[-1, 0, 0, -1, 1], [-1, 0, 0, 0, -1]])
    old, ref = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    advantages = torch.where(turn_id >= 0, torch.randn(2, 1).double(), 0.0)

    def loss(logprobs):
        return loss_of(logprobs, old, advantages, turn_id, torch.tensor([0, 1]), "turn_mean",
                       ref=ref, kl_coefficient=0.3, dual_clip=3.0)[0]

    logprobs = (old + 0.3 * torch.randn(2, 5).double()).requires_grad_()
    assert torch.autograd.gradcheck(loss, logprobs)


def test_aggregation_against_a_loop():
    rng = np.random.default_rng(0)
    turn_id = torch.tensor(rng.integers(-1, 3, size=(6, 9)))
    episode_id, values = torch.tensor([0, 0, 1, 2, 2, 3]), torch.randn(6, 9)
    per_turn = {}
    for row, t in itertools.product(range(6), range(9)):
        if turn_id[row, t] >= 0:
            key = (int(episode_id[row]), int(turn_id[row, t]))
            per_turn.setdefault(key, []).append(values[row, t].item())
    turn_means = {key: np.mean(x) for key, x in per_turn.items()}
    episodes = {e for e, _ in per_turn}
    expected = {"token_mean": np.mean([x for xs in per_turn.values() for x in xs]),
                "turn_mean": np.mean(list(turn_means.values())),
                "episode_mean": np.mean([np.mean([m for (e, _), m in turn_means.items() if e == i])
                                         for i in episodes])}
    for aggregation, value in expected.items():
        weights = aggregation_weights(turn_id, episode_id, aggregation)
        assert (weights[turn_id < 0] == 0).all()
        assert ((weights * values).sum() / weights.sum()).item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "turn_mean", "episode_mean"])
def test_an_episode_drawn_twice_counts_as_two_episodes(aggregation):
    episodes = [Episode(0, "", [Turn("", "", [5], True, [7] * n, [-0.1] * n)]) for n in (2, 3)]
    episodes[0].turns.append(Turn("", "", [5], True, [7], [-0.1]))
    copied = [episodes[0], Episode(0, "", list(episodes[0].turns)), episodes[1]]
    weights = [aggregation_weights(b["turn_id"], b["episode_id"], aggregation)
               for b in (collate([episodes[0], episodes[0], episodes[1]], CPU), collate(copied, CPU))]
    assert torch.equal(*weights)
    assert weights[0].sum().item() == pytest.approx(
        {"token_mean": 9, "turn_mean": 5, "episode_mean": 3}[aggregation])


# --- KL ------------------------------------------------------------------------------------------


def test_k3_has_the_value_of_one_kl_and_the_gradient_of_the_other():
    """p = [.5 .3 .2], reference [.4 .4 .2]: exact expectation over p of estimator and gradient."""
    assert kl_policy_ref_k3(torch.tensor(-1.0), torch.tensor(-1.2)).item() == pytest.approx(
        0.018731, abs=1e-5)
    p, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    logits = p.log().requires_grad_()
    k3 = kl_policy_ref_k3(torch.log_softmax(logits, -1), ref.log())
    (p * k3).sum().backward()  # the loss treats the samples, hence p, as given
    assert (p * k3).sum().item() == pytest.approx(0.025267, abs=1e-5)  # KL(p || ref)
    assert logits.grad.tolist() == pytest.approx([0.1, -0.1, 0.0], abs=1e-5)  # of KL(ref || p)
    assert (k3 >= 0).all()


def test_kl_in_the_reward_is_summed_over_the_tokens_of_a_turn():
    turn_id = torch.tensor([[-1, 0, 0, -1, 1], [-1, 1, -1, -1, -1]])
    values = torch.tensor([[9.0, 1, 2, 9, 4], [9.0, 8, 9, 9, 9]])
    sums = sum_over_turns(values, turn_id, torch.tensor([0, 1]), (2, 3))
    assert sums.tolist() == [[3, 4, 0], [0, 8, 0]]


# --- the estimator as a whole --------------------------------------------------------------------


@pytest.mark.parametrize("size,expected", [(2, 0.105), (4, 0.1575)])
def test_the_expected_gradient_by_enumeration(size, expected):
    """Bernoulli(0.3) bandit with reward = action: the true gradient of the success probability is
    0.3 * 0.7 = 0.21; the group mean includes the episode itself and keeps (G - 1) / G of it."""
    logit = torch.tensor(math.log(0.3 / 0.7), requires_grad=True)
    total = 0.0
    for actions in itertools.product([0, 1], repeat=size):
        probability = 0.3 ** sum(actions) * 0.7 ** (size - sum(actions))
        chosen = torch.tensor(actions, dtype=torch.float)[:, None]
        logprobs = torch.where(chosen == 1, logit.sigmoid().log(), (1 - logit.sigmoid()).log())
        advantages = group_relative_advantages(
            chosen[:, 0], torch.zeros(size, dtype=torch.long), scale="none")[:, None]
        loss, _ = loss_of(logprobs, logprobs.detach(), advantages,
                          torch.zeros(size, 1, dtype=torch.long), torch.arange(size))
        total += probability * -torch.autograd.grad(loss, logit)[0].item()
    assert total == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def training_batch(tiny_policy):
    """Drawn episodes of a real rollout; an advantage that differs from turn to turn."""
    args = Args(num_prompts=4, group_size=4, max_turns=4, max_turn_tokens=3)
    episodes = collect_groups(tiny_policy, make_envs(args, 16), args, 0, history_turns=0)
    torch.manual_seed(1)
    credit = torch.randn(16, 4)
    drawn = [0, 3, 3, 9, 14]
    batch = collate([episodes[i] for i in drawn], CPU)
    batch["advantages"] = expand_to_tokens(credit[drawn], batch["turn_id"], batch["episode_id"])
    assert len(batch["lengths"].unique()) > 1 and batch["advantages"].unique().numel() > 9
    return batch


def run_update(policy, batch, **options):
    keeper = KeepGradient(policy)
    args = Args(max_grad_norm=1e9, entropy_coefficient=0.01, **options)
    return update(policy, None, keeper, dict(batch), args), keeper.gradient


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
    assert torch.allclose(one[1], other[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "turn_mean", "episode_mean"])
def test_metrics_and_gradient_do_not_depend_on_layout(tiny_policy, training_batch, aggregation):
    """The number of micro-batches, padding columns and the order of rows change nothing."""
    base = run_update(tiny_policy, training_batch, aggregation=aggregation)
    assert base[1].norm() > 1e-3
    for tokens in (1, 100):
        same(base, run_update(tiny_policy, training_batch, aggregation=aggregation,
                              micro_batch_tokens=tokens))
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x
              for k, x in training_batch.items()}
    padded["lengths"] = padded["lengths"] + 6
    same(base, run_update(tiny_policy, padded, aggregation=aggregation))
    order = torch.randperm(len(training_batch["tokens"]))
    same(base, run_update(tiny_policy, {k: x[order] for k, x in training_batch.items()},
                          aggregation=aggregation))


def test_tokens_that_were_not_sampled_do_not_matter(tiny_policy, training_batch):
    base = run_update(tiny_policy, training_batch)
    outside = training_batch["turn_id"] < 0
    changed = dict(training_batch)
    for name in ("old_logprobs", "advantages"):
        changed[name] = torch.where(outside, 123.0, training_batch[name])
    same(base, run_update(tiny_policy, changed))
    changed["advantages"] = torch.where(outside, 123.0, 2 * training_batch["advantages"])
    assert not torch.allclose(run_update(tiny_policy, changed)[1], base[1], atol=1e-6)


def test_the_first_step_is_on_policy(tiny_policy, training_batch):
    """Ratio 1: nothing clips, no KL, and the loss is minus the mean advantage (and entropy)."""
    metrics, _ = run_update(tiny_policy, training_batch)
    logprobs, _ = token_logprobs(tiny_policy, training_batch, temperature=1.0)
    assert (logprobs - training_batch["old_logprobs"]).abs().max() <= 1e-5
    assert metrics["clip_fraction"] == 0.0 and abs(metrics["approx_kl"]) < 1e-9
    mask = training_batch["turn_id"] >= 0
    expected = -training_batch["advantages"][mask].mean().item() - 0.01 * metrics["entropy"]
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "turn_mean", "episode_mean"])
def test_a_rank_without_rows_still_takes_the_step(tiny_policy, aggregation):
    batch = collate([], CPU) | {"advantages": torch.zeros(0, 1)}
    metrics, gradient = run_update(tiny_policy, batch, aggregation=aggregation)
    assert gradient.norm() == 0.0 and metrics["grad_norm"] == 0.0


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 4, "warm_start_steps": 20, "num_iterations": 2,
         "eval_episodes": 8, "eval_every": 1, "print_samples": 0}


@pytest.mark.parametrize("flags", [
    {"sampling": "all", "aggregation": "episode_mean", "scale": "none", "num_epochs": 2},
    {"sampling": "uniform", "replacement": False, "credit": "step", "episodes_per_update": 3},
    {"kl_coefficient": 0.1, "kl_in_reward": 0.1, "dual_clip": 3.0, "history_turns": 2},
    {"aggregation": "turn_mean", "num_minibatches": 8, "episodes_per_update": 3},
    {"env_id": "turnrl/Snake-v0", "credit": "return_to_go", "aggregation": "turn_mean"},
    {"env_id": "Taxi-v4", "max_turns": 3}])
def test_every_arm_runs(flags, tmp_path):
    summary = main(Args(**QUICK, run_dir=str(tmp_path), **flags))
    assert summary["iterations"] == 2 and 0 <= summary["success_end"] <= 1
    assert summary["generated_tokens"] >= summary["environment_steps"] > 0
