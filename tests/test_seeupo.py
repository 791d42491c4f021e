"""The mathematics of SeeUPO against hand-worked numbers, exact expectations and slow loops."""

import copy
import functools
import itertools
import math
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from algos import seeupo
from algos.seeupo import (
    Args, aggregation_weights, binding_clip, clipped_objective, group_relative_advantages,
    kl_policy_ref_k3, main, multiply_weights, pooled_log_ratio, rows_of_turns, scale_by_batch, task_reward,
    turn_factor, turn_loss, turn_order, update,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from policies import make_tiny
from run_folder import Run
from utils import DRAW, Policy, RunArgs, batch_logprobs, collate, random_stream

CPU, RNG = torch.device("cpu"), np.random.default_rng(0)


def double(values):
    return torch.tensor(values, dtype=torch.double)


def relative(groups, scale="none"):
    """Groups as lists -> advantages as one tensor, not yet scaled by the batch."""
    scores = double([score for group in groups for score in group])
    group_id = torch.tensor([g for g, group in enumerate(groups) for _ in group])
    return group_relative_advantages(scores, group_id, scale)


# --- Eq. 1, 2: rewards and advantages ------------------------------------------------------------


@pytest.mark.parametrize("mapping,rewards,expected", [
    ("plain", [1, 0.75, 0.5, 0.5], [0.3125, 0.0625, -0.1875, -0.1875]),
    ("official", [1.5, 0.375, 0.25, 0.25], [0.90625, -0.21875, -0.34375, -0.34375])])
def test_only_a_full_score_is_above_the_mean_once_mapped(mapping, rewards, expected):
    got = task_reward(torch.tensor([1, 0.75, 0.5, 0.5]), torch.zeros(4).bool(), mapping)
    assert got.tolist() == rewards
    assert relative([got.tolist()]).tolist() == pytest.approx(expected)


def test_garbage_is_worth_less_than_nothing_but_not_when_plain():
    scores, garbage = torch.tensor([1.0, 0.5, 0.99]), torch.tensor([True, True, False])
    assert task_reward(scores, garbage).tolist() == pytest.approx([-1, -1, 0.495])
    assert task_reward(scores, garbage, "plain").tolist() == scores.tolist()


THREE = [[1, 0, 0, 0], [1, 1, 1, 0], [0.5] * 4]


@pytest.mark.parametrize("scale,large,small", [
    ("none", 0.75, 0.25), ("batch_std", 2.03101, 0.677003), ("group_std", 1.499997, 0.499999)])
def test_advantages_by_hand(scale, large, small):
    centred = relative(THREE, "group_std" if scale == "group_std" else "none")
    for clamp in (None, 3.0):
        got = scale_by_batch(centred, scale, clamp).tolist()
        assert got == pytest.approx([large] + [-small] * 3 + [small] * 3 + [-large] + [0] * 4, abs=1e-5)
    assert got[8:] == [0.0] * 4


def test_the_std_of_the_batch_keeps_how_much_a_group_differs_and_that_of_the_group_loses_it():
    groups = [[1.5, 0, 0, 0], [0.5, 0.4, 0.4, 0.4]]
    batch = scale_by_batch(relative(groups))
    assert (batch[0].item(), batch[4].item()) == pytest.approx((2.286213, 0.152414), abs=1e-5)
    group = scale_by_batch(relative(groups, "group_std"), "group_std")
    assert (group[0].item(), group[4].item()) == pytest.approx((1.499998, 1.49997), abs=1e-5)


def test_the_clamp_comes_after_the_scale_and_no_spread_is_not_divided_by():
    advantages = relative([[7] + [0] * 7, [0] * 8])
    assert scale_by_batch(advantages)[0].item() == pytest.approx(3.622844, abs=1e-5)
    assert scale_by_batch(advantages, clamp=3.0)[0].item() == 3.0
    assert scale_by_batch(-advantages, clamp=3.0)[0].item() == -3.0
    assert scale_by_batch(double([1e-7, -1e-7])).tolist() == [1e-7, -1e-7]
    assert scale_by_batch(torch.zeros(4)).tolist() == [0.0] * 4
    assert scale_by_batch(torch.tensor([2.0])).tolist() == [2.0]


def test_a_group_of_equals_stays_at_exactly_zero_next_to_groups_of_any_size():
    """The mean over the batch of rounded numbers is not exactly 0."""
    for scores in ([0.1, 0.2, 0.7], [0.3, 0.1, 0.1], [1 / 3, 1 / 6, 1.5]):
        values = torch.tensor(scores + [0.7, 0.7, 0.7 + 1e-7])
        got = scale_by_batch(group_relative_advantages(values, torch.arange(6) // 3, "none"))
        assert got[3:].tolist() == [0.0] * 3 and (got[:3] != 0).all()


@pytest.mark.parametrize("size,expected", [(2, 0.105), (4, 0.1575)])
def test_the_expected_gradient_of_one_turn_by_enumeration(size, expected):
    """Bernoulli(.3), reward = action: true gradient .21, of which (G - 1) / G remains."""
    logit, total = double(math.log(3 / 7)).requires_grad_(), 0.0
    for actions in itertools.product([0.0, 1.0], repeat=size):
        chosen = double(actions)
        logprobs = torch.nn.functional.logsigmoid(torch.where(chosen == 1, logit, -logit))[:, None]
        loss, _ = loss_of(logprobs, logprobs.detach(), relative([actions]),
                          torch.zeros(size, 1, dtype=torch.long))
        probability = 0.3 ** sum(actions) * 0.7 ** (size - sum(actions))
        total -= probability * torch.autograd.grad(loss, logit)[0].item()
    assert total == pytest.approx(expected, abs=1e-6)


# --- Eq. 3, 5: factors and weights ---------------------------------------------------------------


def weights_along(advantages, steps, factor_clip=None):
    """What every step trains with, and what is left; steps: a factor, None without the turn."""
    advantages, running, used = double(advantages), torch.ones(len(advantages)).double(), []
    for factors in steps:
        used.append((advantages * running).tolist())
        rows = torch.tensor([e for e, factor in enumerate(factors) if factor is not None])
        factor = double([factor for factor in factors if factor is not None])
        running = multiply_weights(running, factor, rows, factor_clip)
    return [*used, (advantages * running).tolist()]


def test_the_factor_is_the_ratio_of_the_turn_only():
    log_ratio = torch.tensor([[9.0, 0.2, -0.1, 0.3, 5.0], [0.1, 0.2, 0.3, 0.1, 0.1]])
    turn_id = torch.tensor([[-1, 1, 1, 1, 2], [0, 0, -1, 0, 2]])
    assert turn_factor(log_ratio, turn_id, 1, "geometric").tolist() == [pytest.approx(1.1426308), 1.0]
    assert turn_factor(log_ratio, turn_id, 1, "product").tolist() == [pytest.approx(1.4918247), 1.0]
    padded = torch.tensor([[0, 0], [-1, -1]])
    got = turn_factor(torch.tensor([[0.1, 0.2], [0.3, 0.1]]), padded, 0, "geometric").tolist()
    assert got == [pytest.approx(1.161834), 1.0]
    extreme = turn_factor(torch.tensor([[99.0], [-99.0]]), torch.zeros(2, 1).long(), 0, "product")
    assert extreme.log().tolist() == pytest.approx([20, -20])


@pytest.mark.parametrize("order,factors,expected", [
    ("reverse", [1.1, 0.9, 1.05], [0.5, 0.55, 0.495]),
    ("natural", [1.05, 0.9, 1.1], [0.5, 0.525, 0.4725]),
    ("2, 3, 1", [0.9, 1.1, 1.05], [0.5, 0.45, 0.495])])
def test_a_turn_is_trained_with_the_ratios_of_the_turns_before_it_only(order, factors, expected):
    """Not with its own, .55, .495, .51975; what is left in the end is the same in every order."""
    got = [row[0] for row in weights_along([0.5], [[factor] for factor in factors])]
    assert got == pytest.approx([*expected, 0.51975]), order


@pytest.mark.parametrize("advantage,factors,clip,expected", [
    (0.5, [1.3, 1.1], None, [0.5, 0.65, 0.715]), (0.5, [1.3, 1.1], 0.2, [0.5, 0.6, 0.6]),
    (-0.5, [0.7, 1.1], None, [-0.5, -0.35, -0.385]), (-0.5, [0.7, 1.1], 0.2, [-0.5, -0.4, -0.44]),
    (1.0, [0.7, 0.7], 0.2, [1.0, 0.8, 0.8]), (1.0, [1.3, 0.7], 0.2, [1.0, 1.2, 0.96])])
def test_the_released_code_bounds_the_factor_and_the_product(advantage, factors, clip, expected):
    got = [row[0] for row in weights_along([advantage], [[factor] for factor in factors], clip)]
    assert got == pytest.approx(expected)


def test_an_episode_without_the_turn_keeps_its_weight():
    got = weights_along([1.0, -1.0], [[1.1, None], [0.9, 0.8], [1.05, 1.2]])
    for row, expected in zip(got, ([1, -1], [1.1, -1], [0.99, -0.8], [1.0395, -0.96]), strict=True):
        assert row == pytest.approx(expected)


def test_factors_find_their_episode_whatever_the_order_of_the_rows():
    """Positional: [.55, .9, -1]."""
    running = multiply_weights(torch.ones(3), torch.tensor([1.0, 1.1, 0.9]), torch.tensor([2, 0, 1]))
    advantages = torch.tensor([1.0, -1.0, 0.5])
    assert (advantages * running).tolist() == pytest.approx([1.1, -0.9, 0.5])
    assert (advantages * running)[[2, 0, 1]].tolist() == pytest.approx([0.5, 1.1, -0.9])


def test_weights_carry_no_gradient_and_nothing_is_changed_in_place():
    log_ratio = torch.tensor([[0.1]], requires_grad=True)
    factor = turn_factor(log_ratio, torch.tensor([[0]]), 0, "geometric")
    running = torch.ones(2)
    got = multiply_weights(running, log_ratio[0].exp(), torch.tensor([1]))
    assert not factor.requires_grad and not got.requires_grad and running.tolist() == [1, 1]


def test_the_orders():
    assert turn_order(3, "reverse", RNG) == [[2], [1], [0]]
    assert turn_order(3, "natural", RNG) == [[0], [1], [2]]
    assert turn_order(3, "together", RNG) == [[0, 1, 2]]
    drawn = {str(turn_order(3, "random", RNG)) for _ in range(100)}
    assert drawn == {str([[t] for t in x]) for x in itertools.permutations(range(3))}


# --- Eq. 4: the objective ------------------------------------------------------------------------


def loss_of(logprobs, old, weights, turn_id, pooling="geometric", kl_coefficient=0.0, ref=None):
    """turn_loss of rows with the weights M (B,), clip .2."""
    tokens = aggregation_weights(turn_id, torch.arange(len(turn_id)), "turn_mean")
    batch = {"old_logprobs": old, "ref_logprobs": old if ref is None else ref, "turn_id": turn_id,
             "advantages": weights[:, None].expand_as(old), "weights": tokens / tokens.sum()}
    return turn_loss(batch, logprobs, pooling, 0.2, kl_coefficient)


def slow_objective(logprobs, old, ref, weights, turn_id, pooling, clip=0.2, kl_coefficient=0.0):
    """Eq. 3 and 4 over a dictionary of the turns; the metrics beside it."""
    turns = {}
    for row, t in (turn_id >= 0).nonzero().tolist():
        turns.setdefault((row, int(turn_id[row, t])), []).append(t)
    terms, clipped, drift, kl, approx = [], [], [], [], []
    for (row, _), where in turns.items():
        new, before = logprobs[row, where], old[row, where]
        ratios = {"geometric": [(new - before).mean().exp()], "product": [(new - before).sum().exp()],
                  "token": list((new - before).exp())}[pooling]
        weight = weights[row]
        inside = [min(max(r, 1 - clip), 1 + clip) for r in ratios]
        kl.append(sum((ref[row, t] - logprobs[row, t]).exp() - (ref[row, t] - logprobs[row, t]) - 1
                      for t in where) / len(where))
        terms.append(sum(min(r * weight, c * weight) for r, c in zip(ratios, inside, strict=True))
                     / len(ratios) - kl_coefficient * kl[-1])
        clipped.append(np.mean([bool(c * weight < r * weight) for r, c in zip(ratios, inside, strict=True)]))
        drift.append(np.mean([abs(r.item() - 1) for r in ratios]))
        approx.append((((new - before).exp() - 1 - (new - before)).sum() / len(where)).item())
    mean = sum(terms) / len(terms)
    return mean, {"loss": -mean.item(), "approx_kl": np.mean(approx), "clip_fraction": np.mean(clipped),
                  "ratio_drift": np.mean(drift), "kl_policy_ref_k3": sum(kl).item() / len(kl)}


def test_clipping_stops_the_gradient_in_the_two_right_quadrants_only():
    ratios, weights = double([1.3, 0.7, 1.3, 0.7]), double([0.55, 0.55, -0.55, -0.55])
    log_ratio = ratios.log()[:, None].requires_grad_()
    value = clipped_objective(log_ratio, weights[:, None], 0.2, 0.2)
    value.sum().backward()
    assert value[:, 0].tolist() == pytest.approx([0.66, 0.385, -0.715, -0.44])
    assert log_ratio.grad[:, 0].tolist() == pytest.approx([0, 0.385, -0.715, 0])
    binds = binding_clip(log_ratio, weights[:, None], 0.2, 0.2)[:, 0]
    assert binds.tolist() == [True, False, False, True]


@pytest.mark.parametrize("pooling,ratio,gradient", [
    ("geometric", 1.0512711, 0.192733), ("product", 1.1618342, 0.639009)])
def test_the_gradient_of_a_turn_is_shared_by_its_tokens(pooling, ratio, gradient):
    log_ratio = double([[0.1, -0.05, 0.1]]).requires_grad_()
    turn_id = torch.zeros(1, 3, dtype=torch.long)
    loss, stats = loss_of(log_ratio, torch.zeros(1, 3), double([0.55]), turn_id, pooling)
    loss.backward()
    assert -loss.item() == pytest.approx(0.55 * ratio) and stats["clip_fraction"] == 0
    assert (-log_ratio.grad).tolist()[0] == pytest.approx([gradient] * 3, abs=1e-6)


def test_every_token_has_the_pooled_ratio_of_its_turn_and_others_have_none():
    log_ratio, turn_id = torch.tensor([[0.1, 0.3, 9.0, 0.5]]), torch.tensor([[0, 0, -1, 1]])
    for pooling, first in (("token", [0.1, 0.3]), ("geometric", [0.2, 0.2]), ("product", [0.4, 0.4]),
                           ("arithmetic", [0.204992, 0.204992]), ("geometric_stop_gradient", [0.2, 0.2])):
        got = pooled_log_ratio(log_ratio, turn_id, pooling)[0].tolist()
        assert got == pytest.approx([*first, 0, 0.5], abs=1e-6), pooling


def test_an_episode_without_the_turn_is_not_in_the_mean():
    """Objectives .5 and -.2: .15, not .1."""
    turn_id = torch.tensor([[1, 1], [1, -1], [-1, -1]])
    loss, stats = loss_of(torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([0.5, -0.2, 7.0]), turn_id)
    assert -loss.item() == pytest.approx(0.15) == -stats["loss"].item()


@pytest.mark.parametrize("pooling", ["geometric", "product", "token"])
def test_the_objective_against_a_dictionary_loop(pooling):
    torch.manual_seed(0)
    for turn_id in (torch.randint(-1, 3, (7, 6)), torch.randint(-1, 1, (7, 6))):
        old, ref = torch.randn(2, 7, 6).double()
        weights = torch.randn(7).double()
        logprobs = (old + 0.3 * torch.randn(7, 6)).requires_grad_()
        loss, stats = loss_of(logprobs, old, weights, turn_id, pooling, 0.3, ref)
        expected, metrics = slow_objective(logprobs, old, ref, weights, turn_id, pooling, 0.2, 0.3)
        assert {k: v.item() for k, v in stats.items()} == pytest.approx(metrics, abs=1e-6)
        assert -loss.item() == pytest.approx(expected.item(), abs=1e-6) and metrics["clip_fraction"] > 0
        gradients = [torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (-loss, expected)]
        assert torch.allclose(*gradients, atol=1e-6)


def test_the_kl_term_pulls_towards_the_reference():
    logprobs, ref = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.5, -1.0]])
    turn_id, zero = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1)
    assert kl_policy_ref_k3(logprobs, ref)[0].tolist() == pytest.approx([0.106531, 0.718282], abs=1e-5)
    loss, _ = loss_of(logprobs, logprobs.detach(), zero, turn_id, kl_coefficient=0.1, ref=ref)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (0.106531 + 0.718282) / 2, abs=1e-6)
    assert logprobs.grad[0, 0] > 0 > logprobs.grad[0, 1], "a step down the loss"


# --- the two-turn bandit, by exact enumeration ---------------------------------------------------
# turn 1   L .5                R .5
# turn 2   l .5     r .5       l .8     r .2        J = .35, and what reverse induction finds: 1
# reward   .5       .5         0        1
REWARD, OUTCOMES = double([0.5, 0.5, 0, 1]), torch.tensor([[0, 1]] * 4)
START = double([0.5, 0.5]), double([[0.5, 0.5], [0.8, 0.2]])


def outcome_logprobs(first, second):
    """pi1 (2,), pi2 (2, 2) as log-probs -> of every outcome's two turns, (4, 2)."""
    return torch.stack([first.repeat_interleave(2), second.flatten()], 1)


def bandit_gradient(tables, old, weights, turn):
    """The gradient of the expected objective of a turn with respect to the log-prob tables."""
    tables = [x.clone().requires_grad_() for x in tables]
    batch = {"turn_id": OUTCOMES, "lengths": torch.full((4,), 2), "old_logprobs": old,
             "ref_logprobs": old, "logprobs": outcome_logprobs(*tables),
             "advantages": weights[:, None].expand(4, 2), "p": old.sum(1).exp()}
    rows = rows_of_turns(batch, [turn])
    rows["weights"] = rows["p"][:, None] * (rows["turn_id"] == turn)
    loss, _ = turn_loss(rows, rows["logprobs"], "geometric", 0.2, 0.0)
    return [-x for x in torch.autograd.grad(loss, tables, materialize_grads=True)]


def bandit_iteration(policy, order, respond, seen=None):
    """One pass over the two turns with the script's functions; respond(p, gradient) -> p."""
    policy = list(policy)
    old = outcome_logprobs(*(x.clamp(min=1e-30).log() for x in policy))
    p = old.sum(1).exp()
    advantages, running = REWARD - p @ REWARD, torch.ones(4).double()
    for [turn] in turn_order(2, order, RNG):
        tables = [x.clamp(min=1e-30).log() for x in policy]
        gradient = bandit_gradient(tables, old, advantages * running, turn)[turn]
        if seen is not None:
            seen.append((turn, p @ (advantages * running), gradient))
        policy[turn] = respond(policy[turn], gradient)
        new = outcome_logprobs(*(x.clamp(min=1e-30).log() for x in policy))
        factor = turn_factor(new - old, OUTCOMES, turn, "geometric")
        running = multiply_weights(running, factor, torch.arange(4))
    return policy


def value(policy):
    return (outcome_logprobs(*policy).prod(1) @ REWARD).item()


def towards_the_best(step):
    """The response that gives step(p) to the action of the larger value, where there is one."""
    def respond(p, gradient):
        values = gradient / p.clamp(min=1e-30)  # ratio 1: weighted advantage times context weight
        new = p.clone()
        for index in itertools.product(*map(range, p.shape[:-1])):
            if (values[index].max() - values[index].min()) > 1e-6:
                best = values[index].argmax()
                new[index][best] = step(p[index][best])
                new[index][1 - best] = 1 - new[index][best]
        return new
    return respond


def test_exact_best_responses_reach_the_optimum_in_reverse_and_stay_at_a_half_naturally():
    respond = towards_the_best(lambda p: 1.0)
    assert value(START) == pytest.approx(0.35)
    for order, expected in (("reverse", 1.0), ("natural", 0.5)):
        policy = START
        for _ in range(5):
            policy = bandit_iteration(policy, order, respond)
            assert value(policy) == pytest.approx(expected, abs=1e-6), order
    assert policy[1][1].tolist() == [0.8, 0.2], "turn 2 at R has weight 0: a fixed point"


def test_the_first_turn_sees_what_the_second_has_become():
    seen = []
    bandit_iteration(START, "reverse", towards_the_best(lambda p: 1.0), seen)
    (second, before, _), (first, after, gradient) = seen
    assert (second, first) == (1, 0)
    assert before == pytest.approx(0, abs=1e-6) and after == pytest.approx(0.4, abs=1e-6)
    assert (gradient / 0.5).tolist() == pytest.approx([0.15, 0.65], abs=1e-6)  # without M .15, -.15


@pytest.mark.parametrize("order,expected", [
    ("reverse", [0.396, 0.4996, 0.5191, 0.5686, 0.6366, 0.9489, 0.9994]),
    ("natural", [0.396, 0.4996, 0.5127, 0.5457, 0.5911, 0.9271, 0.9991])])
def test_with_bounded_steps_both_orders_get_there(order, expected):
    policy, values = START, []
    for _ in range(40):
        policy = bandit_iteration(policy, order, towards_the_best(
            lambda p: min(1.2 * p, 1 - 0.8 * (1 - p))))
        values.append(value(policy))
    assert [values[i - 1] for i in (1, 5, 6, 8, 10, 20, 40)] == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("order", ["reverse", "natural"])
def test_without_support_no_order_helps(order):
    policy = START
    for iteration in range(12):
        policy = bandit_iteration(policy, order, towards_the_best(lambda p: min(1.0, 1.2 * p)))
        assert (policy[0][0].item() == 1) == (iteration >= 3)
    assert value(policy) == pytest.approx(0.5)


@pytest.mark.parametrize("pooling,clip,expected", [
    ("product", None, 0.65), ("geometric", None, 0.2906888), ("geometric", 0.2, -0.068)])
def test_only_the_product_is_exact_and_the_bounds_turn_a_sign(pooling, clip, expected):
    """Turn 2 after R: two tokens, ratios 0 and 5 in all; what R is worth at turn 1."""
    log_ratio = double([[-99, -99], [math.log(5) / 2] * 2])
    factor = turn_factor(log_ratio, torch.ones(2, 2, dtype=torch.long), 1, pooling)
    running = multiply_weights(torch.ones(2).double(), factor, torch.arange(2), clip)
    got = (double([0.8, 0.2]) * (double([0, 1]) - 0.35) * running).sum()
    assert got.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rate,second,first", [
    (1.0, [0.773169, 0.226831], [0.068292, -0.068292]),
    (10.0, [0.446776, 0.553224], [-0.013306, 0.013306])])
def test_gradients_are_those_of_the_expected_reward_after_the_later_step(rate, second, first):
    seen = []
    def respond(p, gradient):
        logits = gradient - p * gradient.sum(-1, keepdim=True)  # through the softmax
        seen.append(logits)
        return (p.log() + rate * logits).softmax(-1)
    policy = bandit_iteration(START, "reverse", respond)
    assert seen[0].flatten().tolist() == pytest.approx([0, 0, -0.08, 0.08], abs=1e-6)
    assert policy[1][1].tolist() == pytest.approx(second, abs=1e-6)
    assert seen[1].tolist() == pytest.approx(first, abs=1e-6)  # without M .075, -.075
    logits = START[0].log().requires_grad_()
    truth = outcome_logprobs(logits.softmax(-1), policy[1]).prod(1) @ REWARD
    assert torch.autograd.grad(truth, logits)[0].tolist() == pytest.approx(first, abs=1e-6)


# --- rows of a turn and one update ---------------------------------------------------------------
TURNS_PLAYED = [3, 1, 2, 2, 2, 3, 1, 3, 2]  # three groups of three
SCORES, GARBAGE = [1, 0.4, 0, 0.7, 0.7, 0.7, 0.5, 1, 1], 7  # the seventh is its group's mean
REWARDS = {"official": [1.5, 0.2, 0, 0.35, 0.35, 0.35, 0.25, -1, 1.5], "plain": SCORES}


def new_policy() -> Policy:
    return Policy(*make_tiny(RunArgs(tiny_init_std=0.1), ["left right"]), "cpu")


def slow_logprobs(policy, episode, temperature=0.8):
    """One forward pass of the whole episode: a tensor of log-probs per turn, and of entropies."""
    ids, at, values, entropies = episode.row(), 0, [], []
    logprobs = (policy.model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    for turn in episode.turns:
        at += len(turn.prompt_ids)
        rows = logprobs[at - 1 : at - 1 + len(turn.token_ids)]
        values.append(rows.gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(1))
        at += len(turn.token_ids)
    return values, entropies


def random_episodes(policy, seed, played=TURNS_PLAYED, scores=SCORES):
    """Episodes of random tokens, with the log-probs under the policy and a score at the end."""
    rng, episodes = np.random.default_rng(seed), []
    for number, (count, score) in enumerate(zip(played, scores, strict=True)):
        turns = [Turn("", "", rng.integers(4, 200, rng.integers(2, 5)).tolist(), k == 0,
                      rng.integers(4, 200, rng.integers(1, 4)).tolist()) for k in range(count)]
        turns[-1].reward = score
        episodes.append(Episode(0, "", turns, info={"garbage": number == GARBAGE}))
        with torch.no_grad():
            for turn, logprobs in zip(turns, slow_logprobs(policy, episodes[-1])[0], strict=True):
                turn.logprobs = logprobs.tolist()
    return episodes


@pytest.fixture(scope="module")
def played():
    policy = new_policy()
    return policy, random_episodes(policy, 0)


def test_rows_cut_after_the_turn_have_the_same_log_probs(played):
    policy, episodes = played
    batch = collate(episodes, CPU)
    for turns in ([2], [1], [0], [0, 1, 2]):
        rows = rows_of_turns(batch, turns)
        here = [e for e, count in enumerate(TURNS_PLAYED) if count > turns[0]]
        assert rows["episode_id"].tolist() == here
        assert set(rows["turn_id"].unique().tolist()) == {-1, *turns}
        got, _ = batch_logprobs(policy, rows, Args(temperature=0.8))
        for row, e in enumerate(here):
            logprobs = torch.cat([x for k, x in enumerate(slow_logprobs(policy, episodes[e])[0]) if k in turns])
            assert torch.allclose(got[row][rows["turn_id"][row] >= 0], logprobs, atol=1e-5)
            last = (rows["turn_id"][row] >= 0).nonzero().max().item()
            assert rows["lengths"][row] == last + 1
        assert rows["tokens"].shape[1] == rows["lengths"].max()
    assert batch["turn_id"].amax() == 2 and not rows_of_turns(batch, [3])["lengths"].numel()


def run_update(policy, batch, reference=None, **options):
    keeper, args = KeepGradient(policy), Args(max_grad_norm=1e9, temperature=0.8, **options)
    return update(policy, reference, keeper, dict(batch), args), keeper.gradient


@pytest.fixture(scope="module")
def stale(played):
    """Rows of the middle turn under weights M, old log-probs that make the clip bind, a reference."""
    policy, episodes = played
    torch.manual_seed(9)
    batch = collate(episodes, CPU)
    batch["old_logprobs"] = batch["old_logprobs"] + torch.randn_like(batch["old_logprobs"])
    batch["advantages"] = torch.randn(9)[:, None].expand(batch["tokens"].shape)
    reference = copy.deepcopy(policy)
    for p in reference.model.parameters():
        p.data += 0.03 * torch.randn_like(p)
    return batch, reference


@pytest.mark.parametrize("turns,options", [
    ([1], {}), ([0], {"ratio_pooling": "product", "clip_epsilon": 0.1}), ([0, 1, 2], {"ratio_pooling": "token"})])
def test_the_update_against_one_forward_pass_per_episode(played, stale, turns, options):
    (policy, episodes), (batch, reference) = played, stale
    rows = rows_of_turns(batch, turns)
    metrics, gradient = run_update(policy, rows, reference, kl_coefficient=0.5, **options)
    logprobs, ref, entropies = [], [], []
    for row, e in enumerate(rows["episode_id"].tolist()):
        places = rows["turn_id"][row]
        values, entropy = (torch.cat([x for k, x in enumerate(part) if k in turns])
                           for part in slow_logprobs(policy, episodes[e]))
        with torch.no_grad():
            other = torch.cat([x for k, x in enumerate(slow_logprobs(reference, episodes[e])[0]) if k in turns])
        logprobs.append(torch.zeros(places.shape).masked_scatter(places >= 0, values))
        ref.append(torch.zeros(places.shape).masked_scatter(places >= 0, other))
        entropies += [part.mean().item() for part in entropy.split(
            [(places == t).sum().item() for t in turns]) if len(part)]
    objective, expected = slow_objective(
        torch.stack(logprobs), rows["old_logprobs"], torch.stack(ref), rows["advantages"][:, 0],
        rows["turn_id"], options.get("ratio_pooling", "geometric"), options.get("clip_epsilon", 0.2), 0.5)
    gradients = torch.autograd.grad(-objective, list(policy.model.parameters()))
    truth = torch.cat([x.flatten() for x in gradients])
    assert torch.allclose(gradient, truth, rtol=1e-3, atol=1e-6) and 0 < expected["clip_fraction"] < 1
    expected |= {"entropy": np.mean(entropies), "grad_norm": truth.norm().item()}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5) and expected["kl_policy_ref_k3"] > 0.01


@pytest.mark.parametrize("turn", [0, 2])
def test_the_update_does_not_depend_on_layout(played, stale, turn):
    """Micro-batches, padding, the order of rows, what stands on tokens that were not sampled."""
    policy, (batch, reference) = played[0], stale
    base = run_update(policy, rows_of_turns(batch, [turn]), reference)

    def same(batch, **options):
        got = run_update(policy, rows_of_turns(batch, [turn]), reference, **options)
        assert base[0] == pytest.approx(got[0], rel=1e-4, abs=1e-6)
        assert torch.allclose(base[1], got[1], rtol=1e-3, atol=1e-6)
    assert base[1].norm() > 1e-3
    same(batch, micro_batch_tokens=1)
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    same({k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x
          for k, x in batch.items()})
    order = torch.randperm(9)
    same({k: x[order] for k, x in batch.items()})
    outside = batch["turn_id"] != turn
    same(batch | {k: torch.where(outside, 123.0, batch[k]) for k in ("old_logprobs", "advantages")})


def test_a_rank_without_rows_still_takes_the_step(played, stale):
    rows = rows_of_turns(stale[0], [3])
    metrics, gradient = run_update(played[0], rows, stale[1])
    assert gradient.norm() == 0.0 and metrics["grad_norm"] == 0.0 == metrics["loss"]


# --- whole iterations ----------------------------------------------------------------------------


@functools.cache
def recorded(scores=tuple(SCORES), played=tuple(TURNS_PLAYED), silent_turn=None, **flags):
    """Two iterations of main on random episodes: every update's batch, weights before and after."""
    run = SimpleNamespace(steps=[], logs=[], episodes=[], start=new_policy())
    start, log = {k: v.clone() for k, v in run.start.model.state_dict().items()}, Run.log

    def collect(policy, envs, args, iteration):
        run.policy, run.args = policy, args
        run.episodes.append(random_episodes(policy, iteration, played, scores))
        for turn in (e.turns[silent_turn] for e in run.episodes[-1] if silent_turn is not None):
            turn.forced = set(range(len(turn.token_ids)))
        return run.episodes[-1]

    def record(policy, reference, optimizer, batch, args):
        if reference is not None:
            assert all(torch.equal(x, start[k]) for k, x in reference.model.state_dict().items())
        assert (reference is None) == (args.kl_coefficient == 0) and optimizer.defaults["weight_decay"] == 0
        step = SimpleNamespace(batch=dict(batch), before=copy.deepcopy(policy.model.state_dict()),
                               iteration=len(run.episodes) - 1, turns=batch["turn_id"].unique().tolist()[1:])
        step.metrics = update(policy, reference, optimizer, batch, args)
        step.after = copy.deepcopy(policy.model.state_dict())
        run.steps.append(step)
        return step.metrics

    def keep(self, iteration, episodes, metrics, updates, batch):
        log(self, iteration, episodes, metrics, updates, batch)
        run.logs.append(dict(self.rows[-1]))

    settings = {"num_prompts": len(scores) // 3, "group_size": 3, "num_iterations": 2, "temperature": 0.8,
                "learning_rate": 3e-4, "eval_episodes": 1, "print_samples": 0, "save_every": 9} | flags
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, stand_in in {"collect_groups": collect, "update": record, "load_policy": lambda args: run.start,
                               "evaluate": lambda *_: ({"success": 0.0, "return": 0.0}, [])}.items():
            patch.setattr(seeupo, name, stand_in)
        for name, stand_in in {"log": keep, "plot": lambda *_: 0, "save": lambda *_, **__: 0}.items():
            patch.setattr(Run, name, stand_in)
        main(Args(run_dir=folder, **settings))
    return run


def slow_advantages(rewards, scale, clamp):
    """Eq. 2, episode by episode."""
    advantages = []
    for e, reward in enumerate(rewards):
        group = rewards[e // 3 * 3 : e // 3 * 3 + 3]
        advantage = reward - sum(group) / 3
        advantages.append(advantage / (np.std(group, ddof=1) + 1e-6) if scale == "group_std" else advantage)
    std = np.std(advantages, ddof=1) if scale == "batch_std" else 1.0
    clamp = clamp or math.inf
    return [max(-clamp, min(clamp, a / std)) for a in advantages]


def slow_ratios(run, state, base, episodes, turn):
    """Eq. 3 of every episode that has the turn, as a dictionary; base: the log-probs, as state."""
    run.policy.model.load_state_dict(state)
    ratios = {}
    for e, episode in enumerate(episodes):
        if len(episode.turns) > turn:
            with torch.no_grad():
                difference = slow_logprobs(run.policy, episode)[0][turn] - base[e]
            pooled = difference.sum() if run.args.ratio_pooling == "product" else difference.mean()
            ratios[e] = pooled.exp().item()
    return ratios


@pytest.mark.parametrize("flags", [
    {}, {"order": "natural", "ratio_pooling": "product"}, {"order": "random", "kl_coefficient": 0.0},
    {"ratio_base": "before_turn"}, {"factor_clip": 0.05, "advantage_clamp": 1.5}, {"steps_per_turn": 2},
    {"sequential_weights": False, "reward_mapping": "plain"}, {"advantage_scale": "none"},
    {"order": "natural", "ratio_base": "before_turn", "advantage_scale": "group_std"}])
def test_every_step_is_trained_with_the_weights_of_a_dictionary_loop(flags):
    run, counts = recorded(**flags), range(9)
    args, steps, used = run.args, list(run.steps), 0.0
    advantages = slow_advantages(REWARDS[args.reward_mapping], args.advantage_scale, args.advantage_clamp)
    for iteration, episodes in enumerate(run.episodes):
        running, mine, drifts = dict.fromkeys(counts, 1.0), [s for s in steps if s.iteration == iteration], []
        order = [step.turns for step in mine[:: args.steps_per_turn]]
        assert sorted(order) == [[0], [1], [2]] and (args.order == "random" or order == (
            [[2], [1], [0]] if args.order == "reverse" else [[0], [1], [2]]))
        for position, [turn] in enumerate(order):
            those = mine[position * args.steps_per_turn :][: args.steps_per_turn]
            run.policy.model.load_state_dict(those[0].before)
            base = {e: torch.tensor(episode.turns[turn].logprobs) if args.ratio_base == "iteration_start"
                    else slow_logprobs(run.policy, episode)[0][turn].detach()
                    for e, episode in enumerate(episodes) if len(episode.turns) > turn}
            for step in those:
                assert step.turns == [turn] and step.batch["episode_id"].tolist() == list(base)
                assert not step.batch["advantages"].requires_grad
                for row, e in enumerate(base):
                    here = step.batch["turn_id"][row] == turn
                    assert torch.allclose(step.batch["old_logprobs"][row][here], base[e], atol=1e-5)
                    assert step.batch["advantages"][row].tolist() == pytest.approx(
                        [advantages[e] * running[e] * sampled for sampled in here.tolist()], abs=1e-4)
                ratios = slow_ratios(run, step.before, base, episodes, turn)
                drifts.append(np.mean([abs(ratio - 1) for ratio in ratios.values()]))
                assert step.metrics["ratio_drift"] == pytest.approx(drifts[-1], abs=1e-4)
            bound = args.factor_clip or math.inf
            for e, ratio in slow_ratios(run, those[-1].after, base, episodes, turn).items():
                if args.sequential_weights:
                    running[e] *= min(max(ratio, 1 - bound), 1 + bound)
                    running[e] = min(max(running[e], 1 - bound), 1 + bound)
        values, log = np.array(list(running.values())), run.logs[iteration]
        used = max(used, abs(values - 1).max())
        drifted = all(drift > 1e-3 for drift in drifts[1:])
        assert drifts[0] < 1e-5 and drifted == (args.ratio_base == "iteration_start" or args.steps_per_turn > 1)
        assert drifted or max(drifts) < 1e-5, "nothing has moved since before the turn"
        assert log["optimizer_steps"] == len(mine) == 3 * args.steps_per_turn
        assert log["groups_without_signal"] == pytest.approx(1 / 3) and log["garbage"] == pytest.approx(1 / 9)
        assert log["task_reward"] == pytest.approx(np.mean(REWARDS[args.reward_mapping]))
        outside = np.mean((values < 0.8) | (values > 1.2))
        assert [log[f"weight{x}"] for x in ("_mean", "_min", "_max", "s_outside")] == pytest.approx(
            [values.mean(), values.min(), values.max(), outside], abs=1e-4)
        assert log["loss"] == pytest.approx(np.mean([step.metrics["loss"] for step in mine]))
    assert (used > 0.04) == args.sequential_weights


def test_a_random_order_is_drawn_for_every_iteration_from_the_run_s_own_stream():
    for seed in (1, 2):
        drawn = [turn_order(3, "random", random_stream(seed, DRAW, iteration)) for iteration in range(2)]
        assert [step.turns for step in recorded(order="random", seed=seed).steps] == drawn[0] + drawn[1]
        assert drawn[0] != drawn[1]


def test_reverse_starts_with_the_long_episodes_only():
    assert recorded().steps[0].batch["episode_id"].tolist() == [0, 5, 7]
    assert recorded().steps[2].batch["episode_id"].tolist() == list(range(9))


@pytest.mark.parametrize("pooling", ["geometric", "token"])
def test_together_all_turns_take_one_step_with_plain_advantages(pooling):
    run = recorded(order="together", ratio_pooling=pooling, steps_per_turn=2)
    advantages = torch.tensor(slow_advantages(REWARDS["official"], "batch_std", None))
    assert [step.turns for step in run.steps] == [[0, 1, 2]] * 4
    assert [log["optimizer_steps"] for log in run.logs] == [2, 2]
    for step in run.steps:
        expected = advantages[:, None].float() * (step.batch["turn_id"] >= 0)
        assert torch.allclose(step.batch["advantages"], expected, atol=1e-5)
    assert run.logs[0]["weight_min"] == run.logs[0]["weight_max"] == 1


@pytest.mark.parametrize("order", ["reverse", "natural", "random"])
def test_without_a_step_all_weights_are_the_advantages(order):
    run = recorded(order=order, learning_rate=1e-12)
    assert all(abs(log[f"weight_{x}"] - 1) < 1e-5 for log in run.logs for x in ("min", "max"))
    assert all(step.metrics["ratio_drift"] < 1e-5 for step in run.steps)


def test_with_one_turn_every_order_is_gspo_with_a_centred_advantage():
    scores = (1, 0.4, 0, 0.7, 0.1, 0.6)
    runs = [recorded(scores, (1,) * 6, order=order, advantage_scale="none", kl_coefficient=0.0, steps_per_turn=2)
            for order in ("reverse", "natural", "random", "together")]
    for run in runs[1:]:
        assert all(torch.equal(x, runs[0].steps[-1].after[k]) for k, x in run.steps[-1].after.items())
    mapped = [s / 2 + (s == 1) for s in scores]
    advantages = [r - sum(mapped[e // 3 * 3 :][:3]) / 3 for e, r in enumerate(mapped)]
    for step in runs[0].steps:
        ratios = slow_ratios(runs[0], step.before, {e: torch.tensor(x.turns[0].logprobs) for e, x in enumerate(
            runs[0].episodes[step.iteration])}, runs[0].episodes[step.iteration], 0)
        gspo = np.mean([min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios.values(), advantages, strict=True)])
        assert step.metrics["loss"] == pytest.approx(-gspo, abs=1e-5)


def test_nothing_to_learn_from_is_no_step_and_neither_is_a_turn_without_a_sampled_token():
    run = recorded((0.7,) * 6, (2, 1, 2, 3, 1, 1))
    assert not run.steps and run.logs[0]["groups_without_signal"] == 1
    assert run.logs[0]["optimizer_steps"] == 0 and run.logs[0]["weight_mean"] == 1
    run = recorded((1, 0, 0), (3, 3, 3), silent_turn=1)
    assert [step.turns for step in run.steps] == [[2], [0]] * 2
    assert run.logs[0]["optimizer_steps"] == 2


@pytest.mark.parametrize("flags,named", [
    ({"group_size": 1}, "--group-size 1"), ({"ratio_pooling": "token"}, "--order together")])
def test_settings_without_a_meaning_are_one_line(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(Args(run_dir=str(tmp_path), **flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0]
    assert not list(tmp_path.iterdir())


def test_the_released_settings_play_the_desk(tmp_path):
    summary = main(Args(num_prompts=2, group_size=4, warm_start_steps=5, num_iterations=1, max_turns=4, eval_episodes=4,
                        print_samples=0, run_dir=str(tmp_path), ratio_base="before_turn", factor_clip=0.2,
                        advantage_clamp=3.0))
    assert summary["iterations"] == 1 and 0 <= summary["success_end"] <= 1
