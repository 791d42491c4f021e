"""What several scripts copy, tested once: test_scripts.py sees to it that the copies are equal.

Advantages, the clipped loss, the KL estimate, returns and updates against slow loops, expectations, finite differences.
"""

import csv
import importlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from algos import gigpo, igpo, ms_grpo, seeupo, tree_grpo, turn_budget, ufo
from algos.ms_grpo import group_relative_advantages, kl_policy_ref_k3, policy_loss
from conftest import KeepGradient, streams
from envs.episodes import Episode, Turn, start_episodes
from policies import Policy
from rollouts import make_envs, rollout
from utils import collate, micro_batches, turn_table

# --- advantages relative to a group ----------------------------------------------------------------
def relative(scores, group=None, correction=1):
    group = torch.zeros(len(scores), dtype=torch.long) if group is None else torch.tensor(group)
    return group_relative_advantages(torch.tensor(scores), group, correction)


@pytest.mark.parametrize("correction,expected", [
    (1, [0.547723, -0.547723, -1.095445, 1.095445]), (0, [0.632456, -0.632456, -1.264911, 1.264911])])
def test_advantages_by_hand(correction, expected):
    """Scores 2, 0, -1, 3: mean 1, squares 1, 1, 4, 4, variance 10/3 or 10/4."""
    assert relative([2.0, 0, -1, 3], correction=correction).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("correction", [0, 1])
def test_advantages_equal_a_loop_over_members(correction):
    rng = np.random.default_rng(0)
    for _ in range(20):
        group, scores = rng.integers(4, size=17), rng.normal(size=17).astype(np.float32)
        expected = []
        for e in range(17):
            members = [float(scores[i]) for i in range(17) if group[i] == group[e]]
            mean = sum(members) / len(members)
            spread = sum((x - mean) ** 2 for x in members)
            expected.append((scores[e] - mean) / (math.sqrt(spread / (len(members) - correction)) + 1e-6)
                            if len(members) > 1 else 0.0)
        assert relative(scores, group, correction).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_group_of_one_or_of_equal_scores_gets_exactly_zero():
    assert relative([5.0]).tolist() == [0.0]
    assert relative([0.1] * 7).tolist() == [0.0] * 7
    rounded = [sum([1.0 - 0.01] + [-0.01] * 7), sum([-0.01] * 7 + [1.0 - 0.01]) + 6e-8]
    assert relative(rounded).tolist() == [0.0, 0.0], "sums of the same rewards in another order"
    assert relative([0.1, 0.1, 5.0, 1.0, 0.0], [0, 0, 1, 2, 2]).tolist() == pytest.approx(
        [0, 0, 0, math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5)


def test_advantages_ignore_other_groups_and_the_order_and_a_shift():
    rng = np.random.default_rng(1)
    scores, group, order = rng.normal(size=12).tolist(), [0, 1, 2] * 4, rng.permutation(12)
    base = relative(scores, group)
    shifted = [s + 10 * g for s, g in zip(scores, group, strict=True)]
    assert torch.allclose(relative(shifted, group), base, atol=1e-4)
    permuted = relative([scores[i] for i in order], [group[i] for i in order])
    assert torch.allclose(permuted, base[torch.tensor(order)], atol=1e-6)
    assert all(abs(base[g::3].sum()) < 1e-5 for g in range(3))


@pytest.mark.parametrize("size", [2, 4])
def test_the_expected_gradient_points_at_success(size):
    """Bernoulli(0.3) bandit that pays its action, all 2^G groups by their probability.

    d/dlogit log p(a) = a - 0.3. A group of s successes adds up to s (G - s) / G, over its std sqrt(s (G - s) / (G (G-1)))
    and over G members: sqrt(s (G - s) (G - 1) / G) / G.
    """
    logit = torch.tensor(math.log(0.3 / 0.7), requires_grad=True)
    total, expected = 0.0, 0.0
    for actions in itertools.product([0, 1], repeat=size):
        s, chance = sum(actions), 0.3 ** sum(actions) * 0.7 ** (size - sum(actions))
        chosen = torch.tensor(actions, dtype=torch.float)[:, None]
        logprobs = torch.where(chosen == 1, logit.sigmoid().log(), (1 - logit.sigmoid()).log())
        advantages = group_relative_advantages(chosen[:, 0], torch.zeros(size))[:, None]
        batch = {"old_logprobs": logprobs.detach(), "advantages": advantages, "weights": torch.full((size, 1), 1 / size)}
        loss, _ = policy_loss(batch, logprobs, torch.zeros(size, 1), 0.2, 0.2, 0.0)
        total -= chance * torch.autograd.grad(loss, logit)[0].item()
        expected += chance * math.sqrt(s * (size - s) * (size - 1) / size) / size
    assert total == pytest.approx(expected, abs=1e-5) and expected > 0.1


# --- equal returns whose rewards came in another order -----------------------------------------------
CPU = torch.device("cpu")


ADVANTAGES = {  # what each script makes of the rewards (E, K) of one group
    "ms_grpo": lambda rewards, mask, group: ms_grpo.turn_advantages(rewards, mask, group, "episode"),
    "ufo": lambda rewards, mask, group: ufo.group_relative_advantages(rewards.sum(1), group),
    "turn_budget": lambda rewards, mask, group: turn_budget.group_relative_advantages(rewards.sum(1), group),
    **{f"gigpo {scale}": lambda rewards, mask, group, scale=scale: gigpo.anchored_advantages(
        rewards, mask, group, torch.arange(mask.sum()), 0.95, 1.0, scale) for scale in ("std", "none")},
    "igpo": lambda rewards, mask, group: igpo.turn_returns(igpo.turn_rewards(
        torch.zeros_like(rewards), rewards.sum(1), mask, group, "outcome"), mask, 1.0),
    "tree_grpo": lambda rewards, mask, group: tree_grpo.tree_advantages(rewards.sum(1), torch.arange(len(rewards)) // 2, group),
    "seeupo": lambda rewards, mask, group: seeupo.scaled_advantages(
        seeupo.task_reward(rewards.sum(1), torch.zeros(len(rewards)).bool()), len(rewards))}


def advantages_of(script, rows):
    """The advantages of the first turns of one group of episodes that earned these rewards."""
    episodes = [Episode(0, "", [Turn("", "", reward=r) for r in row]) for row in rows]
    rewards, mask = turn_table(episodes, lambda turn: turn.reward, CPU)
    got = ADVANTAGES[script](rewards, mask, torch.zeros(len(rows), dtype=torch.long))
    return (got if got.dim() == 1 else got[:, 0]).tolist()


@pytest.mark.parametrize("rewards", [
    [10.1, 20.2, 30.3, 0.4], [1000.1, -1000.3, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, -0.7, 0.4]], ids=str)
@pytest.mark.parametrize("script", ADVANTAGES)
def test_rewards_in_another_order_give_the_same_return(script, rewards):
    """In single precision returns of the first are 61 or 61.0000038, of the second 0.09996 to 0.10000. The third is a full
    score, which adds up to 0.9999999999999999 in some orders, the last is 0 or 1e-16: no relative tolerance covers that."""
    orders = [list(order) for order in itertools.permutations(rewards)]
    assert len({sum(order) for order in orders}) > 1 and advantages_of(script, orders) == [0.0] * 24


@pytest.mark.parametrize("script", ADVANTAGES)
def test_returns_that_an_environment_added_up_in_single_precision_are_equal(script):
    """It pays what its score has grown by; the score is about 6e7, where floats are 4 apart."""
    def paid(order):
        scores = np.cumsum(np.array([0.0, *order], dtype=np.float32), dtype=np.float32).astype(float)
        return np.diff(scores).tolist()
    rows = [paid(order) for order in itertools.permutations([10123456.7, 20234567.8, 30345678.9, 456789.1])]
    returns = {sum(row) for row in rows}
    assert max(returns) - min(returns) >= 4 and advantages_of(script, rows) == [0.0] * 24


@pytest.mark.parametrize("high,low", [(0.001, 0.0), (1000.5, 1000.0), (-1000.0, -1000.5), (2e-5, 0.0)])
@pytest.mark.parametrize("script", ADVANTAGES)
def test_small_real_differences_survive(script, high, low):
    """Two returns: half of their difference over a std that is 1 / sqrt(2) of it, or of the population 1 / 2."""
    half, std = (high - low) / 2, (high - low) / math.sqrt(2) + 1e-6
    expected = {"igpo": half / (half + 1e-6), "tree_grpo": 2 * half / std, "gigpo none": half, "seeupo": math.sqrt(0.5)}.get(script, half / std)
    assert advantages_of(script, [[high], [low]]) == pytest.approx([expected, -expected], rel=1e-6)
    assert advantages_of(script, [[low, high - low], [low, 0.0]]) == pytest.approx([expected, -expected], rel=1e-6)


WHOLE_RUNS = {
    "ms_grpo": {}, "gigpo": {"step_weight": 0.0}, "turn_budget": {"context_limit": 1000}, "igpo": {"reward_source": "outcome"}, "tree_grpo": {"forks": 0},
    "seeupo": {}}


@pytest.mark.parametrize("script", WHOLE_RUNS)
def test_a_run_has_nothing_to_learn_from_equal_returns(script, tmp_path):
    """The game pays the same four rewards in an order that changes from episode to episode."""
    module = importlib.import_module(f"algos.{script}")
    module.main(module.Args(
        env_id="words:tests/AnyOrder-v0", num_prompts=3, group_size=4, max_turns=4, max_turn_tokens=3, warm_start_steps=2,
        num_iterations=1, eval_episodes=1, print_samples=0, run_dir=str(tmp_path), **WHOLE_RUNS[script]))
    [path] = tmp_path.glob("*/metrics.csv")
    row = list(csv.DictReader(open(path)))[-1]
    assert float(row["train_turns"]) == 4 and float(row["train_return"]) == pytest.approx(0.1)
    assert float(row["optimizer_steps"]) == 0 and float(row["groups_without_signal"]) == 1
    assert script != "igpo" or float(row["groups_of_equal_outcome"]) == 1
    assert script != "seeupo" or float(row["task_reward"]) == pytest.approx(0.05, rel=1e-9), "in double"


# --- the clipped loss ------------------------------------------------------------------------------
def one_token(ratio, advantage, clip_low=0.2, clip_high=0.28):
    """Objective, its slope in the log-prob, and whether clipping binds, of one token."""
    logprob = torch.tensor([[math.log(ratio) - 1.3]], dtype=torch.double, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.double)
    batch = {"old_logprobs": -1.3 * one, "advantages": advantage * one, "weights": one}
    loss, parts = policy_loss(batch, logprob, 0 * one, clip_low, clip_high, 0.0)
    [slope] = torch.autograd.grad(loss, logprob)
    return -loss.item(), -slope.item(), parts["clip_fraction"].item()


@pytest.mark.parametrize("ratio,advantage,objective,slope", [
    (1.25, 1.0, 1.25, 1.25), (1.4, 1.0, 1.28, 0.0), (0.7, 1.0, 0.7, 0.7), (0.9, 2.0, 1.8, 1.8),
    (1.4, -1.0, -1.4, -1.4), (1.25, -2.0, -2.5, -2.5), (0.7, -1.0, -0.8, 0.0), (0.9, -1.0, -0.9, -0.9),
    (1.4, 0.0, 0.0, 0.0)])
def test_clipping_stops_the_gradient_in_the_two_right_quadrants_only(ratio, advantage, objective, slope):
    """Clip range 0.8 to 1.28: A > 0 stops above it, A < 0 below it. The slope is also a finite difference."""
    value, gradient, bound = one_token(ratio, advantage)
    assert (value, gradient) == pytest.approx((objective, slope), abs=1e-9)
    up, down = (one_token(ratio * math.exp(step), advantage)[0] for step in (1e-6, -1e-6))
    assert (up - down) / 2e-6 == pytest.approx(slope, abs=1e-5)
    assert bound == (slope == 0 and advantage != 0)


def random_batch(rows=5, width=7):
    """log-probs, entropies and a batch in double precision, with tokens outside the mask."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, width, generator=rng) < 0.6
    normal = lambda: torch.randn(rows, width, generator=rng, dtype=torch.double)  # noqa: E731
    weights = torch.where(mask, normal().exp(), 0.0)
    batch = {"old_logprobs": normal() - 3, "advantages": normal(), "weights": weights / weights.sum()}
    return batch["old_logprobs"] + 0.4 * normal(), normal().exp(), batch


def test_the_loss_and_every_logged_part_equal_a_loop_over_tokens():
    logprobs, entropy, batch = random_batch()
    expected = dict.fromkeys(("loss", "entropy", "clip_fraction", "approx_kl"), 0.0)
    for row, t in itertools.product(range(5), range(7)):
        weight, a = batch["weights"][row, t].item(), batch["advantages"][row, t].item()
        x = logprobs[row, t].item() - batch["old_logprobs"][row, t].item()
        stopped = (a > 0 and math.exp(x) > 1.3) or (a < 0 and math.exp(x) < 0.9)
        objective = ((1.3 if a > 0 else 0.9) if stopped else math.exp(x)) * a + 0.07 * entropy[row, t].item()
        for name, value in (("loss", -objective), ("entropy", entropy[row, t].item()), ("clip_fraction", stopped),
                            ("approx_kl", math.exp(x) - 1 - x)):
            expected[name] += weight * value
    loss, parts = policy_loss(batch, logprobs, entropy, 0.1, 0.3, 0.07)
    assert {name: x.item() for name, x in parts.items()} == pytest.approx(expected, abs=1e-12)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-12)
    assert 0.05 < expected["clip_fraction"] < 0.9, "tokens of both kinds"


def test_the_gradient_of_the_loss_equals_finite_differences():
    logprobs, entropy, batch = random_batch()
    loss = lambda *x: policy_loss(batch, *x, 0.1, 0.3, 0.07)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


def softmaxes():
    return torch.tensor([0.5, 0.3, 0.2], dtype=torch.double), torch.tensor([0.25, 0.25, 0.5], dtype=torch.double)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def test_approx_kl_has_the_expectation_kl_of_old_and_new():
    """All three tokens by the old probabilities, since the old policy sampled: KL(old || new), not the other one."""
    old, new = softmaxes()
    batch = {"old_logprobs": old.log()[None], "advantages": torch.zeros(1, 3), "weights": old[None]}
    parts = policy_loss(batch, new.log()[None], torch.zeros(1, 3), 0.2, 0.2, 0.0)[1]
    assert parts["approx_kl"].item() == pytest.approx(kl(old, new), abs=1e-9)
    assert abs(kl(old, new) - kl(new, old)) > 0.01
    for token in range(3):  # no single one is below 0
        batch["weights"] = torch.eye(3)[token][None]
        assert policy_loss(batch, new.log()[None], torch.zeros(1, 3), 0.2, 0.2, 0.0)[1]["approx_kl"] > 0


def test_ratios_out_of_all_bounds_give_finite_gradients():
    logprobs = torch.tensor([[0.0, -200.0]], requires_grad=True)
    batch = {"old_logprobs": torch.tensor([[-200.0, 0.0]]), "advantages": -torch.ones(1, 2), "weights": torch.ones(1, 2) / 2}
    loss, _ = policy_loss(batch, logprobs, torch.zeros(1, 2), 0.2, 0.2, 0.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()


# --- KL to a reference -----------------------------------------------------------------------------
def test_k3_has_the_value_of_one_kl_and_the_gradient_of_the_other():
    """Expected over the policy's tokens: KL(p || ref); the samples being given, d/dlogits of it is p - ref."""
    p, ref = softmaxes()
    logits = p.log().requires_grad_()
    values = kl_policy_ref_k3(logits.log_softmax(-1), ref.log())
    (p * values).sum().backward()
    assert (p * values).sum().item() == pytest.approx(kl(p, ref), abs=1e-9) and (values > 0).all()
    assert logits.grad.tolist() == pytest.approx((p - ref).tolist(), abs=1e-9)
    moved = ref.log().requires_grad_()
    assert kl_policy_ref_k3(moved, ref.log()).abs().max() == 0.0
    assert torch.autograd.grad(kl_policy_ref_k3(moved, ref.log()).sum(), moved)[0].abs().max() == 0.0


# --- returns to go -----------------------------------------------------------------------------------
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_returns_equal_a_double_loop_and_are_zero_after_the_end(discount):
    rng = np.random.default_rng(0)
    rewards, lengths = torch.tensor(rng.normal(size=(6, 5)), dtype=torch.float), [5, 4, 3, 2, 1, 5]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    returns = igpo.turn_returns(rewards, mask, discount)  # what stands after the end must not count
    for e, k in itertools.product(range(6), range(5)):
        expected = sum(discount ** (j - k) * rewards[e, j].item() for j in range(k, lengths[e]))
        assert returns[e, k].item() == pytest.approx(expected, abs=1e-5)


# --- updates -----------------------------------------------------------------------------------------
UPDATES = {
    "ms_grpo": lambda policy, *rest: ms_grpo.update(policy, None, *rest),
    "ufo": ufo.update, "gigpo": gigpo.update, "igpo": igpo.update, "turn_budget": turn_budget.update}


@pytest.fixture(scope="module")
def batch(made_tiny):
    """Eight ragged episodes; ratios on both sides of the clip range, an advantage that differs by turn."""
    policy, envs = Policy(*made_tiny, "cpu"), make_envs(ms_grpo.Args(), 8)
    episodes = start_episodes(envs, list(range(8)))
    for limit, episode, env, rng in zip([1, 2, 3, 4, 4, 4, 4, 4], episodes, envs, streams(8), strict=True):
        rollout(policy, [env], [episode], [rng], limit, 1.0)
    torch.manual_seed(1)
    batch = collate(episodes, policy.device, torch.randn(8, 4))
    assert len(batch["lengths"].unique()) > 3
    noise = torch.where(batch["turn_id"] >= 0, 0.4 * torch.randn(batch["tokens"].shape), 0.0)
    return batch | {"old_logprobs": batch["old_logprobs"] + noise}


def run_update(script, policy, batch, micro_batch_tokens=16384):
    keeper = KeepGradient(policy)
    args = SimpleNamespace(temperature=1.0, clip_low=0.1, clip_high=0.3, entropy_coefficient=0.07, max_grad_norm=1e9,
                           kl_coefficient=0.0, micro_batch_tokens=micro_batch_tokens)
    return UPDATES[script](policy, keeper, dict(batch), args), keeper.gradient


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
    assert torch.allclose(one[1], other[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("script", UPDATES)
def test_an_update_equals_a_loop_over_single_tokens(script, tiny_policy, batch):
    """What it returns and the gradient: means over all sampled tokens, in IGPO first over those of a row."""
    sampled = [(b, t) for b, t in (batch["turn_id"] >= 0).nonzero().tolist()]
    rows = [b for b, _ in sampled]
    loss, sums = 0.0, dict.fromkeys(("entropy", "clip_fraction", "approx_kl"), 0.0)
    for b in range(len(batch["tokens"])):
        logprobs = tiny_policy.model(batch["tokens"][b, : batch["lengths"][b]][None]).logits[0].log_softmax(-1)
        for t in (t for row, t in sampled if row == b):
            weight = 1 / rows.count(b) / len(set(rows)) if script == "igpo" else 1 / len(rows)
            entropy = -(logprobs[t - 1].exp() * logprobs[t - 1]).sum()
            x, a = logprobs[t - 1, batch["tokens"][b, t]] - batch["old_logprobs"][b, t], batch["advantages"][b, t]
            stopped = bool((a > 0 and x.exp() > 1.3) or (a < 0 and x.exp() < 0.9))
            objective = (1.3 if a > 0 else 0.9) * a if stopped else x.exp() * a
            loss = loss - weight * (objective + 0.07 * entropy)
            for name, value in (("entropy", entropy), ("clip_fraction", stopped), ("approx_kl", x.exp() - 1 - x)):
                sums[name] += weight * float(torch.as_tensor(value).detach())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in tiny_policy.model.parameters()])
    tiny_policy.model.zero_grad()
    metrics, got = run_update(script, tiny_policy, batch)
    expected = sums | {"loss": loss.item(), "grad_norm": gradient.norm().item()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert torch.allclose(got, gradient, rtol=1e-3, atol=1e-5) and gradient.norm() > 1e-3
    assert 0.1 < sums["clip_fraction"] < 0.9


@pytest.mark.parametrize("script", UPDATES)
def test_an_update_does_not_depend_on_micro_batches_padding_or_the_order_of_rows(script, tiny_policy, batch):
    base = run_update(script, tiny_policy, batch)
    limits = {len(list(micro_batches(batch, tokens))): tokens for tokens in range(1, 2000, 9)}
    for parts in (1, 2, 4):
        same(base, run_update(script, tiny_policy, batch, limits[parts]))
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x for k, x in batch.items()}
    same(base, run_update(script, tiny_policy, padded | {"lengths": padded["lengths"] + 6}))
    order = torch.tensor([3, 0, 7, 5, 1, 6, 4, 2])
    same(base, run_update(script, tiny_policy, {name: x[order] for name, x in batch.items()}))
    outside = batch["turn_id"] < 0  # tokens that were not sampled do not matter
    changed = {name: torch.where(outside, 123.0, batch[name]) for name in ("old_logprobs", "advantages")}
    same(base, run_update(script, tiny_policy, batch | changed))


@pytest.mark.parametrize("script", UPDATES)
def test_a_process_without_rows_still_takes_the_step(script, tiny_policy):
    """The others wait for it in the sum of the gradients."""
    metrics, gradient = run_update(script, tiny_policy, collate([], tiny_policy.device, torch.zeros(0, 1)))
    assert gradient.norm() == 0.0 and set(metrics.values()) == {0.0}
