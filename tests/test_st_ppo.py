"""The mathematics of ST-PPO (arXiv 2511.20718) against hand-worked numbers, slow loops and whole runs."""

import copy
import csv
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import policies
import utils
import words  # noqa: F401 (registers the game)
from algos import st_ppo
from algos.st_ppo import (
    Args, BatchQueue, Critic, after_truncation, batch_values, binding_clip, clip_bias_scale, clipped_objective,
    gae_advantages, loss_weights, place_turn_rewards, pooled_log_ratio, ratio_sums, surrogate_and_clip_bias,
    update, value_loss, whiten,
)
from conftest import CHATML, KeepGradient, byte_tokenizer, random_model
from envs.episodes import Episode, Turn
from run_folder import Run
from utils import Policy, collate, select_rows, token_logprobs

KINDS = ("token", "geometric", "arithmetic", "product", "geometric_stop_gradient")


def table(*rows):
    return torch.tensor(np.array(rows), dtype=torch.double)


def surrogate(log_ratio, advantages, turn_id, kind="token", aggregation="sequence_mean", epsilon=0.2):
    """J and the scalar whose gradient is C, put together as the script does."""
    weights, count = loss_weights(turn_id, aggregation)
    pooled = pooled_log_ratio(log_ratio, turn_id, kind)
    return surrogate_and_clip_bias(pooled, advantages, weights / count, epsilon)


def slope(value, *inputs):
    return torch.autograd.grad(value, *inputs, retain_graph=True)[0]


# --- Eq. 1 to 5 by hand --------------------------------------------------------------------------
# Turn 0 of three sampled tokens, two observation tokens, turn 1 of two
TURN_ID = torch.tensor([[0, 0, 0, -1, -1, 1, 1]])
RATIO, ADVANTAGES = table([1.2, 0.9, 1.1, 7, 0.1, 1.5, 1.4]), table([1, -0.5, 0.5, 9, -9, 2, -1])
SAMPLED = TURN_ID[0] >= 0


@pytest.mark.parametrize("kind,first,second", [
    ("geometric", 1.0591045, 1.4491377), ("product", 1.188, 2.1), ("arithmetic", 1.0666667, 1.45),
    ("geometric_stop_gradient", 1.0591045, 1.4491377)])
def test_the_ratio_of_a_turn_by_hand(kind, first, second):
    """The mean over the whole row would be 1.2006243."""
    got = pooled_log_ratio(RATIO.log(), TURN_ID, kind).exp()[0]
    assert got.tolist() == pytest.approx([first] * 3 + [1, 1] + [second] * 2, abs=1e-6)
    assert torch.equal(pooled_log_ratio(RATIO.log(), TURN_ID, "token")[0], RATIO.log()[0] * SAMPLED)
    if kind != "product":  # every token twice
        twice = pooled_log_ratio(RATIO.log().repeat_interleave(2, 1), TURN_ID.repeat_interleave(2, 1), kind)
        assert torch.allclose(twice[0, ::2].exp(), got)


def test_log_ratios_are_held_within_twenty():
    far, turn_id = table([300.0, -300, -300, 1]), torch.tensor([[0, 1, 1, 2]])
    assert pooled_log_ratio(far, turn_id, "token").tolist() == [[20, -20, -20, 1]]
    assert pooled_log_ratio(far, turn_id, "product").tolist() == [[20, -20, -20, 1]]
    long = table([90.0] * 40, [90.0] * 40)  # the product over such a turn is no number
    parts = surrogate(long, long.sign() * table([1.0], [-1.0]), torch.zeros(2, 40, dtype=torch.long), "product")
    assert [x.item() for x in parts] == pytest.approx([(1.2 - math.exp(20)) / 2, math.exp(20) / 2])


@pytest.mark.parametrize("kind,terms,objective,binding", [
    ("token", [1.2, -0.45, 0.55, 2.4, -1.4], 0.46, [0, 0, 0, 1, 0]),
    ("geometric", [1.0591045, -0.5295523, 0.5295523, 2.4, -1.4491377], 0.4019934, [0, 0, 0, 1, 0]),
    ("product", None, 0.2976, None), ("arithmetic", None, 0.4033333, None)])
def test_the_clipped_objective_by_hand(kind, terms, objective, binding):
    """In double precision: the first ratio is on the edge of the clip, and does not bind."""
    pooled = pooled_log_ratio(RATIO.log(), TURN_ID, kind)
    if terms:
        assert clipped_objective(pooled, ADVANTAGES, 0.2, 0.2)[0, SAMPLED].tolist() == pytest.approx(terms, abs=1e-6)
        got = binding_clip(pooled, ADVANTAGES, 0.2, 0.2)
        assert got[0, SAMPLED].tolist() == binding
    assert surrogate(RATIO.log(), ADVANTAGES, TURN_ID, kind)[0].item() == pytest.approx(objective, abs=1e-6)


def test_out_of_range_is_not_clipped():
    """The mean ratio of turn 1 is out of range, one of its two tokens binds."""
    for kind, out_of_range, ratio in (("token", 2, 6.1), ("geometric", 2, 6.0755889)):
        pooled = pooled_log_ratio(RATIO.log(), TURN_ID, kind)
        got = ratio_sums(RATIO.log(), pooled, ADVANTAGES, TURN_ID, (TURN_ID >= 0).double(), 0.2)
        assert got["out_of_range"] == out_of_range and got["clip_fraction"] == 1 == got["clip_fraction_turn"]
        assert got["turns"] == 2 and got["ratio"].item() == pytest.approx(ratio, abs=1e-6)


def test_an_advantage_of_zero_never_binds_and_the_clip_has_two_sides():
    ratio, advantages = table([0.5, 0.5, 0.5, 1.5, 1.5, 1.5]), table([1.0, 0, -1, 1, 0, -1])
    assert binding_clip(ratio.log(), advantages, 0.2, 0.2).tolist() == [[0, 0, 1, 1, 0, 0]]
    assert not binding_clip(table(np.log1p([0.2, -0.2])), table([1.0, -1]), 0.2, 0.2).any(), "on the edge"
    assert binding_clip(ratio.log(), advantages, 0.6, 0.2).tolist() == [[0, 0, 0, 1, 0, 0]]
    assert binding_clip(ratio.log(), advantages, 0.2, 0.6).tolist() == [[0, 0, 1, 0, 0, 0]]
    assert clipped_objective(ratio.log(), advantages, 0.3, 0.2).tolist() == [pytest.approx([0.5, 0, -0.7, 1.2, 0, -1.5])]


def test_episodes_of_different_length_by_hand():
    """A second episode of one token, ratio 1, advantage -1, and a third without any."""
    pad = torch.nn.functional.pad
    log_ratio, advantages = (torch.cat([x, pad(table([y]), (0, 6), value=3.0), 0 * x + 4]) for x, y in (
        (RATIO.log(), 0.0), (ADVANTAGES, -1.0)))
    turn_id = torch.cat([TURN_ID, pad(torch.tensor([[0]]), (0, 6), value=-1), -torch.ones_like(TURN_ID)])
    for kind, mean, token_mean in (("token", -0.27, 0.2166667), ("geometric", -0.2990033, 0.1683278)):
        for aggregation, expected in (("sequence_mean", mean), ("token_mean", token_mean),
                                      ("sequence_sum", 3 * token_mean)):
            got = surrogate(log_ratio, advantages, turn_id, kind, aggregation)[0]
            assert got.item() == pytest.approx(expected, abs=1e-6), (kind, aggregation)


@pytest.mark.parametrize("kind,slopes", [
    ("geometric", [0.068761] * 3 + [0.099499] * 2), ("token", [0.21, -0.095, 0.11, 0.36, -0.22]),
    ("geometric_stop_gradient", [0.206284, -0.103142, 0.103142, 0.397995, -0.198997]),
    ("product", [0.21945] * 3 + [0.198] * 2), ("arithmetic", [0.07, 0.063333, 0.073333, 0.09, 0.11])])
def test_the_gradient_of_a_turn_is_shared_by_its_tokens(kind, slopes):
    """Nothing binds. The mean over the whole row would give .081335 to all."""
    log_ratio = table([1.05, 0.95, 1.10, 3, 3, 0.9, 1.1]).log().requires_grad_()
    got = slope(surrogate(log_ratio, ADVANTAGES, TURN_ID, kind)[0], log_ratio)[0]
    assert got[SAMPLED].tolist() == pytest.approx(slopes, abs=1e-6) and not got[~SAMPLED].any()


# --- Eq. 5 to 7: the clip bias -------------------------------------------------------------------


def softmax_case(theta, actions, advantages, turn_id, kind):
    """grad J and C of a policy of three actions that collected with equal probabilities."""
    theta = torch.tensor(theta, dtype=torch.double, requires_grad=True)
    log_ratio = theta.log_softmax(0)[actions] + math.log(3)
    objective, removed = surrogate(log_ratio, torch.tensor(advantages, dtype=torch.double), turn_id, kind)
    return slope(objective, theta), slope(removed, theta), removed.item()


def test_the_clip_bias_of_token_ratios_by_hand():
    """Five episodes of one token. The sign of the first action flips."""
    gradient, bias, scalar = softmax_case(
        [0.4, 0, -0.4], torch.tensor([[0], [0], [1], [2], [2]]), [[1.0], [-1], [0.5], [-2], [1]],
        torch.zeros(5, 1, dtype=torch.long), "token")
    assert gradient.tolist() == pytest.approx([-0.254286, 0.114164, 0.140121], abs=1e-6)
    assert bias.tolist() == pytest.approx([0.269532, -0.009072, -0.260460], abs=1e-6)
    assert (gradient + bias).tolist() == pytest.approx([0.015247, 0.105092, -0.120339], abs=1e-6)
    norm, full = bias.norm().item(), (gradient + bias).norm().item()
    assert norm == pytest.approx(0.3749259, abs=1e-6) and scalar == pytest.approx(0.0286865, abs=1e-6)
    triggered = clip_bias_scale(norm, full, True, "triggered") * gradient
    assert triggered.tolist() == pytest.approx([-0.678229, 0.304498, 0.373731], abs=1e-5)
    assert clip_bias_scale(norm, full, True) == 1 and triggered.norm().item() == pytest.approx(0.8320988, abs=1e-5)
    assert clip_bias_scale(norm, full, True, "relative") == pytest.approx(0.2997535, abs=1e-5)


def test_the_clip_bias_of_turn_ratios_by_hand():
    """One episode, two turns of two tokens; the last token does not bind."""
    gradient, bias, _ = softmax_case([0.5, 0, -0.5], torch.tensor([[0, 0, 2, 2]]), [[1, 0.5, -2, 0.3]],
                                     torch.tensor([[0, 0, 1, 1]]), "geometric")
    assert gradient.tolist() == pytest.approx([-0.021233, -0.012879, 0.034112], abs=1e-6)
    assert bias.tolist() == pytest.approx([0.422757, -0.089180, -0.333576], abs=1e-6)
    assert bias.norm().item() == pytest.approx(0.5458475, abs=1e-6)


@pytest.mark.parametrize("mode,scales", [
    ("at_most_one", (1, 1, 0.4)), ("triggered", (1, 2.667194, 0.4)), ("literal", (1e8, 2.667194, 0.4)),
    ("relative", (1, 0.727312, 0.285714))])
def test_the_scale_by_hand(mode, scales):
    for norm, expected in zip((0.0, 0.3749259, 2.5), scales, strict=True):
        assert clip_bias_scale(norm, 1.0, norm > 0, mode) == pytest.approx(expected, rel=1e-5)
        assert clip_bias_scale(norm, 1.0, False, mode) == (1 if mode != "literal" else pytest.approx(expected, rel=1e-5))
    assert clip_bias_scale(0.0, 0.0, True, mode) == scales[0], "what binds may cancel"


def slow_surrogate(log_ratio, advantages, turn_id, kind, epsilon=0.2, aggregation="sequence_mean"):
    """J, the part of it that binds (unclipped) and all of it unclipped: loops over episodes, turns, tokens."""
    rows = [[torch.nonzero(ids == k)[:, 0].tolist() for k in range(int(ids.max()) + 1)] for ids in turn_id]
    rows = [(b, [turn for turn in turns if turn]) for b, turns in enumerate(rows) if any(turns)]
    tokens = sum(len(turn) for _, turns in rows for turn in turns)
    totals, bound = [log_ratio.sum() * 0.0] * 3, []
    for b, turns in rows:
        length = sum(map(len, turns))
        share = {"sequence_mean": 1 / length / len(rows), "sequence_sum": 1 / len(rows),
                 "token_mean": 1 / tokens}[aggregation]
        for turn in turns:
            mine = [log_ratio[b, t] for t in turn]
            geometric = torch.exp(sum(mine) / len(mine))
            for t in turn:
                w = {"token": log_ratio[b, t].exp(), "geometric": geometric, "product": torch.exp(sum(mine)),
                     "arithmetic": sum(x.exp() for x in mine) / len(mine), "geometric_stop_gradient":
                     geometric.detach() * (log_ratio[b, t] - log_ratio[b, t].detach()).exp()}[kind]
                a = advantages[b, t]
                binds = bool((a > 0 and w > 1 + epsilon) or (a < 0 and w < 1 - epsilon))
                edge = 1 + epsilon if a > 0 else 1 - epsilon
                parts = (edge * a if binds else w * a, w * a if binds else 0.0, w * a)
                totals = [total + share * part for total, part in zip(totals, parts, strict=True)]
                bound += [(b, t)] if binds else []
    return *totals, bound


def random_rows(seed):
    """Six episodes of up to four turns with observations, a turn without a token, an empty episode."""
    generator = torch.Generator().manual_seed(seed)
    turn_id = torch.full((6, 17), -1)
    for b in range(5):
        t = 1
        for k in range(1 + (b + seed) % 4):
            width = int(torch.randint(0 if k else 1, 4, (), generator=generator))
            turn_id[b, t:t + width] = k
            t += width + 1
    log_ratio, advantages = torch.randn(2, 6, 17, generator=generator, dtype=torch.double)
    return (0.6 * log_ratio).requires_grad_(), advantages, turn_id


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_and_the_clip_bias_are_the_unclipped_gradient(kind):
    for seed, aggregation in itertools.product((0, 2, 3), ("sequence_mean", "sequence_sum", "token_mean")):
        log_ratio, advantages, turn_id = random_rows(seed)
        objective, removed = surrogate(log_ratio, advantages, turn_id, kind, aggregation)
        slow, bias, full, bound = slow_surrogate(log_ratio, advantages, turn_id, kind, 0.2, aggregation)
        gradient, c = slope(objective, log_ratio), slope(removed, log_ratio)
        assert objective.item() == pytest.approx(slow.item(), abs=1e-6) and c.norm() > 1e-3
        assert removed.item() == pytest.approx(bias.item(), abs=1e-6)
        assert torch.allclose(gradient, slope(slow, log_ratio), atol=1e-6)
        assert torch.allclose(c, slope(bias, log_ratio), atol=1e-6)
        assert torch.allclose(gradient + c, slope(full, log_ratio), atol=1e-6), "lemma 4.2"
        pooled = pooled_log_ratio(log_ratio, turn_id, kind)
        assert binding_clip(pooled, advantages, 0.2, 0.2)[turn_id >= 0].sum() == len(bound)
        order = torch.randperm(6)
        wide = [torch.nn.functional.pad(x, (0, 4), value=v)[order] for x, v in (
            (log_ratio, 3.0), (advantages, -5.0), (turn_id, -1))]
        for one, other in zip(surrogate(*wide, kind, aggregation), (objective, removed), strict=True):
            assert torch.allclose(slope(one, log_ratio), slope(other, log_ratio), atol=1e-7), "layout"


@pytest.mark.filterwarnings("ignore:invalid value")
def test_without_a_clip_there_is_no_bias():
    log_ratio, advantages, turn_id = random_rows(0)
    for kind in KINDS:
        objective, removed = surrogate(log_ratio, advantages, turn_id, kind, epsilon=1e9)
        full = slow_surrogate(log_ratio, advantages, turn_id, kind)[2]
        assert objective.item() == pytest.approx(full.item(), abs=1e-6)
        assert removed.item() == 0 and not slope(removed, log_ratio).any()


# --- Eq. 8, 9: advantages and the critic's loss --------------------------------------------------
GAE_ID, VALUES = torch.tensor([[0, 0, -1, -1, 1, 1]]), table([0.5, 0.4, 0.9, 0.8, 0.3, 0.2])


@pytest.mark.parametrize("discount,gae_lambda,final,expected,returns", [
    (1.0, 1.0, None, [0.5, 0.6, 0.7, 0.8], [1, 1, 1, 1]),
    (0.9, 0.8, None, [0.00279, 0.19832, 0.456, 0.8], [0.50279, 0.59832, 0.756, 1]),
    (0.9, 0.8, 0.5, [0.170752, 0.4316, 0.78, 1.25], None), (1.0, 1.0, 0.5, [1, 1.1, 1.2, 1.3], None)])
def test_advantages_step_over_observations_by_hand(discount, gae_lambda, final, expected, returns):
    """Zeroing at an observation gives -.5, -.4 for the first turn; discounting over it .175849."""
    turn_rewards = table([0.0, 1] + ([] if final is None else [discount * final]))
    rewards, mask = place_turn_rewards(turn_rewards, GAE_ID), GAE_ID >= 0
    advantages, goal = gae_advantages(rewards, VALUES, mask, discount, gae_lambda)
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-5) and not advantages[~mask].any()
    assert returns is None or goal[mask].tolist() == pytest.approx(returns, abs=1e-5)
    changed = torch.where(mask, VALUES, 77.0)
    assert torch.equal(gae_advantages(rewards, changed, mask, discount, gae_lambda)[0], advantages) and not goal[~mask].any()
    if returns and discount < 1:
        assert whiten(advantages[mask]).tolist() == pytest.approx([-1.04866, -0.481436, 0.266083, 1.264014], abs=1e-5)


def test_equal_advantages_are_whitened_to_zero():
    assert whiten(torch.tensor([5.0])).tolist() == [0.0] and whiten(torch.full((3,), 0.3)).tolist() == [0.0] * 3


def test_a_turn_is_rewarded_at_its_last_sampled_token():
    """Row 1: turn 1 sampled nothing, turn 2 is worth nothing; row 2: the last turn sampled nothing."""
    turn_id = torch.tensor([[-1, 0, 0, -1, 1, 2], [0, -1, -1, 2, 2, -1], [0, 0, -1, 1, 1, -1], [-1] * 6])
    rewards = table([1, 2, 4], [1, 2, 0], [0, 8, 5], [1, 1, 1])
    expected = [[0, 0, 1, 0, 2, 4], [3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 13, 0], [0] * 6]
    assert place_turn_rewards(rewards, turn_id).tolist() == expected
    wide = place_turn_rewards(torch.nn.functional.pad(rewards, (0, 2)), torch.nn.functional.pad(turn_id, (0, 2), value=-1))
    assert wide[:, :6].tolist() == expected and not wide[:, 6:].any()


def test_the_loss_of_the_critic_by_hand():
    """From .1 towards a return of 3: beyond .6 the clipped error is the larger one, and constant."""
    for value, error, gradient in ((0.5, 2.5, -2.5), (1.0, 2.4, 0.0), (2.5, 2.4, 0.0), (-0.9, 3.9, -3.9)):
        values = table([value, 5.0]).requires_grad_()
        loss = value_loss(values, table([0.1, 1]), table([3.0, 9]), table([1.0, 0]))
        assert loss.item() == pytest.approx(error**2 / 2) and slope(loss, values)[0].tolist() == pytest.approx([gradient, 0])


# --- the critic and the update -------------------------------------------------------------------
# per episode and turn: tokens of the prompt, sampled tokens (0: one token that was put in)
SHAPES = [[(5, 3), (4, 2)], [(6, 1)], [(4, 2), (3, 0), (5, 4)], [(3, 4), (2, 1), (2, 3)], [(7, 2)]]


def small_policy():
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    return Policy(random_model("llama", len(tokenizer), 128), tokenizer, "cpu")


def conversation(shape, rng):
    turns = []
    for k, (prompt, sampled) in enumerate(shape):
        ids = rng.integers(200, size=prompt + max(sampled, 1)).tolist()
        turns.append(Turn("hm", "", ids[:prompt], k == 0, ids[prompt:], [0.0] * max(sampled, 1),
                          forced=set() if sampled else {0}))
    return Episode(0, "so", turns)


@pytest.fixture
def policy():
    return small_policy()


def batch_of(policy, shapes, noise=0.4, scale=1.0):
    """Random conversations, advantages, values and returns; old log-probs of another policy."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batch = collate([conversation(shape, rng) for shape in shapes], policy.device)
    mask, shape = batch["turn_id"] >= 0, batch["tokens"].shape
    for name in ("noise", "advantages", "values", "returns"):
        batch[name] = torch.where(mask, torch.randn(shape, generator=generator), 0.0)
    with torch.no_grad():
        batch["old_logprobs"] = token_logprobs(policy, batch, 1.0)[0] + noise * batch.pop("noise")
    batch["advantages"] *= scale
    return batch


@pytest.fixture
def batch(policy):
    return batch_of(policy, SHAPES)


class Awake(Critic):
    """A critic whose last layer does not start at zero."""

    def __init__(self, policy):
        super().__init__(policy)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            torch.nn.init.normal_(self.head.weight)


def step(policy, critic, batch, **flags):
    """Metrics, gradients of policy and critic, and the policy's learning rate of one update."""
    keepers = KeepGradient(policy), KeepGradient(SimpleNamespace(model=critic))
    keepers[0].param_groups, keepers[1].param_groups = [{"lr": 0.5}], [{"lr": 0.25}]
    metrics = update(policy, critic, *keepers, dict(batch), Args(**({"max_grad_norm": 1e9} | flags)))
    assert keepers[1].param_groups == [{"lr": 0.25}]
    return SimpleNamespace(metrics=metrics, gradient=keepers[0].gradient, critic=keepers[1].gradient,
                           rate=keepers[0].param_groups[0]["lr"])


def alike(one, other):
    assert one.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-6) and one.rate == pytest.approx(other.rate)
    assert torch.allclose(one.gradient, other.gradient, rtol=1e-3, atol=1e-5)
    assert torch.allclose(one.critic, other.critic, rtol=1e-3, atol=1e-5)


def test_a_value_knows_what_stands_before_its_token_and_nothing_else(policy, batch):
    assert not Critic(policy)(batch).any(), "it starts at zero"
    critic, row = Awake(policy), 3
    values = critic(batch)
    sampled = (batch["turn_id"][row] >= 0).nonzero()[:, 0].tolist()
    assert not values[batch["turn_id"] < 0].any() and (values[row, sampled] != 0).all()
    for t in (sampled[0], sampled[3], sampled[-1]):
        changed = dict(batch, tokens=batch["tokens"].clone())
        changed["tokens"][row, t:] = (batch["tokens"][row, t:] + 1) % 200
        assert torch.allclose(critic(changed)[row, :t + 1], values[row, :t + 1], atol=1e-5)
        changed["tokens"][row, :t] = (batch["tokens"][row, :t] + 1) % 200
        assert abs(critic(changed)[row, t] - values[row, t]) > 1e-3
    for tokens in (1, 40, 10**6):
        got = batch_values(critic, batch, Args(micro_batch_tokens=tokens))
        assert torch.allclose(got, values, atol=1e-5) and not got.requires_grad


def test_the_loss_of_the_critic_reaches_all_of_it_and_nothing_of_the_policy(policy, batch):
    critic, mask = Awake(policy), batch["turn_id"] >= 0
    value_loss(critic(batch), batch["values"], batch["returns"], mask / mask.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters()) and len(list(critic.parameters())) > 10
    assert all(p.grad is None for p in policy.model.parameters())


def test_only_a_truncated_episode_has_a_value_after_its_end(policy):
    """It is read behind the prompt of the next turn, which may not fit into the context."""
    rng = np.random.default_rng(0)
    episodes = [conversation(shape, rng) for shape in SHAPES[:3]] + [Episode(0, "first"), conversation([(110, 9)], rng)]
    for i in (1, 2, 3, 4):
        episodes[i].truncated = True
    episodes[0].terminated, critic = True, Awake(policy)
    values = batch_values(critic, collate(after_truncation(policy, episodes), policy.device), Args()).sum(1)
    assert values[0] == 0 and len(values) == 5
    for i in (1, 2, 3, 4):
        ids = (episodes[i].row() + policy.prompt(episodes[i], None)[0])[:127]
        hidden = critic.trunk(torch.tensor([ids])).last_hidden_state[0, -1]
        assert values[i].item() == pytest.approx(critic.head(hidden).item(), abs=1e-4)
    assert len(ids) == 127


@pytest.mark.parametrize("flags,scale", [
    ({"variant": "ppo"}, 1), ({"variant": "turn_ppo", "temperature": 1.3, "aggregation": "token_mean"}, 1),
    ({"variant": "s_ppo"}, 100), ({"variant": "st_ppo"}, 100), ({"variant": "st_ppo", "clip_epsilon": 0.05}, 1e-3),
    ({"variant": "st_ppo", "turn_ratio": "arithmetic", "clip_bias_scale": "triggered"}, 1e-3),
    ({"variant": "s_ppo", "turn_ratio": "product", "clip_bias_scale": "relative", "aggregation": "sequence_sum"}, 1),
    ({"variant": "turn_ppo", "turn_ratio": "geometric_stop_gradient"}, 1), ({"variant": "s_ppo", "clip_bias_scale": "literal"}, 1)])
def test_an_update_is_what_loops_over_episodes_turns_and_tokens_give(flags, scale, policy):
    batch, critic, args = batch_of(policy, SHAPES, scale=scale), Awake(policy), Args(**flags)
    got, other = step(policy, critic, batch, **flags), step(policy, critic, batch, scale_target="step", **flags)
    kind = args.turn_ratio if args.variant in ("turn_ppo", "st_ppo") else "token"
    logprobs, entropy = token_logprobs(policy, batch, args.temperature)
    log_ratio = logprobs - batch["old_logprobs"]
    *terms, bound = slow_surrogate(log_ratio, batch["advantages"], batch["turn_id"], kind, args.clip_epsilon, args.aggregation)
    parameters = list(policy.model.parameters())
    gradient, c, full = (torch.cat([x.flatten() for x in torch.autograd.grad(term, parameters, retain_graph=True)])
                         for term in terms)
    n, norm = c.norm().item(), full.norm().item()
    s = {"at_most_one": 1 / max(1, n), "triggered": 1 / n, "literal": 1 / (n + 1e-8), "relative": 1 / (1 + n / norm)}
    s = s[args.clip_bias_scale] if args.variant in ("s_ppo", "st_ppo") else 1.0
    assert (n > 1) == (scale > 1e-3) and n > 0
    size = gradient.abs().max().item()
    assert torch.allclose(got.gradient, -s * gradient, rtol=1e-3, atol=1e-4 * s * size) and got.rate == args.learning_rate
    assert torch.allclose(other.gradient, -gradient, rtol=1e-3, atol=1e-4 * size)
    assert other.rate == pytest.approx(s * args.learning_rate, rel=1e-3)
    assert got.metrics["grad_norm"] == pytest.approx(s * gradient.norm().item(), rel=1e-3)
    mask, values = batch["turn_id"] >= 0, critic(batch)
    near = torch.minimum(torch.maximum(values, batch["values"] - 0.5), batch["values"] + 0.5)
    errors = torch.maximum((values - batch["returns"]) ** 2, (near - batch["returns"]) ** 2)
    error = errors[mask].mean() / 2
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(error, list(critic.parameters()))])
    assert torch.allclose(got.critic, expected, rtol=1e-3, atol=1e-5) and torch.equal(got.critic, other.critic)
    w, ell = pooled_log_ratio(log_ratio, batch["turn_id"], kind).exp()[mask], log_ratio[mask]
    expected = {"loss": -terms[0], "value_loss": error, "clip_fraction": len(bound) / len(ell), "clip_bias_norm": n,
                "clip_fraction_turn": len({(b, int(batch["turn_id"][b, t])) for b, t in bound}) / 9,
                "out_of_range": ((w > 1 + args.clip_epsilon) | (w < 1 - args.clip_epsilon)).float().mean(),
                "approx_kl_k1": -ell.mean(), "approx_kl": (ell.exp() - 1 - ell).mean(), "full_gradient_norm": norm,
                "effective_sample_size": w.sum()**2 / len(w) / (w**2).sum(), "entropy": entropy[mask].mean(),
                "log_ratio_max": ell.abs().max(), "clip_bias_share": n / (n + norm), "gradient_scale": s,
                "scaled_steps": float(s != 1), "grad_norm": s * gradient.norm(), "grad_clipped": 0}
    assert got.metrics == pytest.approx({name: torch.as_tensor(x).item() for name, x in expected.items()}, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("flags", [{"variant": "s_ppo"}, {"variant": "st_ppo", "aggregation": "token_mean"}])
def test_the_layout_of_a_batch_does_not_matter(flags, policy):
    """Micro-batches (the norm is that of the summed C), padding, order, what was not sampled."""
    batch, critic = batch_of(policy, SHAPES, scale=30.0), Awake(policy)
    base = step(policy, critic, batch, **flags)
    assert base.metrics["gradient_scale"] < 0.9
    for tokens in (1, 25, 40):
        alike(base, step(policy, critic, batch, **flags, micro_batch_tokens=tokens))
    alike(base, step(policy, critic, select_rows(batch, torch.tensor([3, 1, 0, 4, 2])), **flags))
    fill = {"turn_id": -1, "tokens": 7}
    wide = {k: torch.nn.functional.pad(x, (0, 6), value=fill.get(k, 5.0)) if x.dim() > 1 else x for k, x in batch.items()}
    alike(base, step(policy, critic, wide | {"lengths": batch["lengths"] + 6}, **flags))
    outside = batch["turn_id"] < 0
    changed = {k: torch.where(outside, 9.0, batch[k]) for k in ("old_logprobs", "advantages", "values", "returns")}
    alike(base, step(policy, critic, batch | changed, **flags))


@pytest.mark.parametrize("shares", [([0, 3], [1, 2, 4]), ([0, 1, 2, 3, 4], [])])
def test_two_processes_take_the_step_of_one(shares, policy, monkeypatch):
    """Also when one of them has no row. The processes are threads here."""
    batch = batch_of(policy, SHAPES, scale=30.0)
    flags = {"variant": "s_ppo", "micro_batch_tokens": 40}
    whole, barrier, slots, here = step(policy, Awake(policy), batch, **flags), threading.Barrier(2), {}, threading.local()

    def of_both(x):
        slots[here.rank] = x
        barrier.wait(120)
        both = slots[0], slots[1]
        barrier.wait(120)
        return both

    def process(rank):
        here.rank = rank
        return step(*pairs[rank], select_rows(batch, torch.tensor(shares[rank], dtype=torch.long)), **flags)
    pairs = [(mine, Awake(mine)) for mine in (copy.deepcopy(policy) for _ in shares)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for module in (st_ppo, utils):
        monkeypatch.setattr(module, "all_reduce_sum", lambda x: sum(of_both(x)))
    monkeypatch.setattr(st_ppo, "all_gather", lambda x: torch.cat(of_both(x)))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(process, range(2)))
    for result in results:
        alike(whole, result)


def test_a_step_without_rows_or_without_sampled_tokens_changes_nothing(policy):
    empty = collate([], policy.device) | {k: torch.zeros(0, 1) for k in ("advantages", "values", "returns")}
    for nothing in (empty, batch_of(policy, [[(4, 0)]])):
        got = step(policy, Awake(policy), nothing)
        assert not got.gradient.any() and not got.critic.any() and all(math.isfinite(x) for x in got.metrics.values())


def test_while_nothing_binds_the_scaled_step_is_the_plain_one_bit_for_bit(policy):
    """At the parameters that sampled: no NaN, no 1e8 (but for the literal reading)."""
    batch, critic = batch_of(policy, SHAPES, noise=0.0), Awake(policy)
    for plain, scaled in (("ppo", "s_ppo"), ("turn_ppo", "st_ppo")):
        base = step(policy, critic, batch, variant=plain)
        assert base.metrics["clip_bias_norm"] == base.metrics["clip_fraction"] == base.metrics["log_ratio_max"] == 0
        for mode, target in itertools.product(("at_most_one", "triggered", "relative"), ("gradient", "step")):
            got = step(policy, critic, batch, variant=scaled, clip_bias_scale=mode, scale_target=target)
            assert torch.equal(got.gradient, base.gradient) and torch.equal(got.critic, base.critic)
            assert got.rate == base.rate == Args().learning_rate and got.metrics == base.metrics
        literal = step(policy, critic, batch, variant=scaled, clip_bias_scale="literal").metrics
        assert literal["gradient_scale"] == pytest.approx(1e8) and literal["scaled_steps"] == 1


def test_turns_of_one_token_have_token_ratios_and_one_turn_is_gspo(policy):
    batch = batch_of(policy, [[(4, 1), (3, 1), (3, 1)], [(5, 1)], [(2, 1), (3, 1)]], scale=30.0)
    critic = Awake(policy)
    for token, turn in (("ppo", "turn_ppo"), ("s_ppo", "st_ppo")):
        alike(step(policy, critic, batch, variant=token), step(policy, critic, batch, variant=turn))
    batch = batch_of(policy, [[(4, 5)], [(2, 1)], [(3, 3)]])
    batch["advantages"] = torch.where(batch["turn_id"] >= 0, torch.tensor([[1.0], [-0.5], [-2]]), 0.0)
    got, total = step(policy, critic, batch, variant="turn_ppo", clip_epsilon=0.1), 0.0
    log_ratio = token_logprobs(policy, batch, 1.0)[0] - batch["old_logprobs"]
    for row, advantage in zip(log_ratio, (1.0, -0.5, -2.0), strict=True):
        ratio = (row.sum() / (row != 0).sum()).exp()
        total = total + torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage) / 3
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(total, list(policy.model.parameters()))])
    assert got.metrics["loss"] == pytest.approx(-total.item(), abs=1e-6)
    assert torch.allclose(got.gradient, -expected, rtol=1e-3, atol=1e-5)


def test_the_scale_is_on_the_gradient_before_it_is_clipped(policy):
    batch = batch_of(policy, SHAPES, scale=100.0)
    base = step(policy, Awake(policy), batch, variant="ppo")
    got = step(policy, Awake(policy), batch, variant="s_ppo")
    s = got.metrics["gradient_scale"]
    assert torch.allclose(got.gradient, s * base.gradient, rtol=1e-4, atol=1e-6)
    for factor in (0.5, 2.0):  # of the norm after scaling
        limit = factor * got.metrics["grad_norm"]
        clipped = step(policy, Awake(policy), batch, variant="s_ppo", max_grad_norm=limit)
        assert clipped.metrics["grad_norm"] == got.metrics["grad_norm"]
        assert clipped.gradient.norm().item() == pytest.approx(min(limit, got.metrics["grad_norm"]), rel=1e-4)
        assert clipped.metrics["grad_clipped"] == (factor < 1)


def test_a_scaled_learning_rate_is_that_of_one_step_only(policy):
    """Two steps of AdamW: the second, in which nothing binds, has the whole learning rate again."""
    binding, args = batch_of(policy, SHAPES, scale=100.0), Args(variant="s_ppo", scale_target="step")
    critic = Awake(policy)
    optimizers = [torch.optim.AdamW(x.parameters(), 1.0) for x in (policy.model, critic)]
    scale = update(policy, critic, *optimizers, dict(binding), args)["gradient_scale"]
    assert scale < 0.9 and optimizers[0].param_groups[0]["lr"] == pytest.approx(scale * args.learning_rate)
    update(policy, critic, *optimizers, batch_of(policy, SHAPES, noise=0.0), args)
    assert optimizers[0].param_groups[0]["lr"] == args.learning_rate and optimizers[1].param_groups[0]["lr"] == 1.0


def test_waiting_batches_come_back_to_the_device():
    queue = BatchQueue(torch.device("meta"))
    queue.load_state_dict({"batches": [{"batch": {"tokens": torch.zeros(1)}}]})
    assert queue.batches[0]["batch"]["tokens"].device.type == "meta"


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"env_id": "tests/Words-v0", "num_prompts": 6, "warm_start_steps": 3, "num_iterations": 2, "max_turns": 3,
         "max_turn_tokens": 3, "learning_rate": 0.01, "print_samples": 0, "eval_episodes": 2, "eval_every": 9}


@pytest.fixture
def spy(monkeypatch):
    """What a run did: per iteration its episodes, the critic it began with and its updates."""
    seen = SimpleNamespace(iterations=[], policy=None, empty=[])
    real = SimpleNamespace(collect=st_ppo.collect_groups, update=update, load=st_ppo.load_policy)

    def collect(policy, envs, args, iteration):
        episodes, seen.policy = real.collect(policy, envs, args, iteration), policy
        for e in seen.empty:  # its first prompt did not fit into the context
            episodes[e] = Episode(e, "first", truncated=True, overflowed=True)
        seen.iterations.append(SimpleNamespace(episodes=copy.deepcopy(episodes), updates=[], critic=None, live=None))
        return episodes

    def updating(policy, critic, optimizer, critic_optimizer, batch, args):
        now = seen.iterations[-1]
        now.critic = now.critic or copy.deepcopy(critic)
        now.updates.append({k: x.clone() for k, x in batch.items()})
        rates = [(o.param_groups[0]["lr"], o.param_groups[0]["weight_decay"], len(o.param_groups[0]["params"]))
                 for o in (optimizer, critic_optimizer)]
        assert rates[1] == (args.critic_learning_rate, 0, len(list(critic.parameters())))
        assert rates[0][1:] == (0, len(list(policy.model.parameters())))
        return real.update(policy, critic, optimizer, critic_optimizer, batch, args)
    for name, call in (("collect_groups", collect), ("update", updating), ("Critic", Awake),
                       ("evaluate", lambda *_: ({"success": 0.0, "return": 0.0}, []))):
        monkeypatch.setattr(st_ppo, name, call)
    monkeypatch.setattr(policies, "NUM_DEMONSTRATIONS", 16)
    monkeypatch.setattr(policies, "WARM_START_ROWS", 4)
    monkeypatch.setattr(Run, "plot", lambda *_: None)
    return seen


def run(tmp_path, **flags):
    """The rows of metrics.csv of a run."""
    st_ppo.main(Args(**(QUICK | {"run_dir": str(tmp_path)} | flags)))
    folder = max(Path(tmp_path).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with open(folder / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def slow_advantages(episode, critic, args):
    """Eq. 8 of one episode: advantages and returns of its sampled tokens, in plain Python."""
    going_on = args.bootstrap_truncated and episode.truncated and not episode.overflowed
    ids = episode.row() + (critic.policy.prompt(episode, None)[0] if going_on else []) or [0]  # never empty
    with torch.no_grad():
        before = critic.head(critic.trunk(torch.tensor([ids])).last_hidden_state)[0, :, 0].tolist()
    position, rewards, values = 0, [], []
    for turn in episode.turns:
        position += len(turn.prompt_ids)
        rewards += [0.0] * (len(turn.token_ids) - 1) + [turn.reward]
        values += [before[position + i - 1] for i in range(len(turn.token_ids))]
        position += len(turn.token_ids)
    advantages, following, later = [], before[-1] if going_on else 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        later = reward + args.discount * following - value + args.discount * args.gae_lambda * later
        advantages.insert(0, later)
        following = value
    return np.array(advantages), np.array(advantages) + values


@pytest.mark.parametrize("flags", [
    {"variant": "turn_ppo", "micro_batch_tokens": 60},
    {"bootstrap_truncated": True, "discount": 0.9, "gae_lambda": 0.8, "num_epochs": 2, "num_minibatches": 3,
     "critic_learning_rate": 0.02, "staleness": 1, "num_iterations": 3, "num_prompts": 3, "group_size": 2}])
def test_the_advantages_of_a_run_against_a_loop(flags, tmp_path, spy):
    """Also: the batch is as old as asked for, whitened once, and episodes are never split or left out."""
    spy.empty = [1] if "bootstrap_truncated" in flags else []
    logged, args = run(tmp_path, **flags)[1:], Args(**(QUICK | flags))
    kinds = {(e.terminated, e.truncated) for iteration in spy.iterations for e in iteration.episodes}
    assert kinds == {(True, False), (False, True)}
    assert any(turn.reward == 0 for e in spy.iterations[0].episodes for turn in e.turns)
    for number, (iteration, row) in enumerate(zip(spy.iterations, logged, strict=True)):
        if number < args.staleness:
            assert not iteration.updates and row["optimizer_steps"] == 0
            continue
        episodes = spy.iterations[number - args.staleness].episodes
        parts = [slow_advantages(e, iteration.critic, args) for e in episodes]
        raw, goal = (np.concatenate(x) for x in zip(*parts, strict=True))
        steps = args.num_epochs * args.num_minibatches
        assert len(iteration.updates) == row["optimizer_steps"] == steps
        deals = []
        for epoch in range(args.num_epochs):
            deal = iteration.updates[epoch * args.num_minibatches:][:args.num_minibatches]
            deals.append([sorted(part["episode_id"].tolist()) for part in deal])
            assert sorted(sum(deals[-1], [])) == [e for e in range(6) if e not in spy.empty]
            assert max(map(len, deals[-1])) == 6 // args.num_minibatches
        assert len(set(map(str, deals))) == len(deals), "new minibatches in every pass"
        for part, (i, e) in ((p, pair) for p in iteration.updates for pair in enumerate(p["episode_id"].tolist())):
            mask = part["turn_id"][i] >= 0
            assert part["tokens"][i, :part["lengths"][i]].tolist() == episodes[e].row()
            white = (parts[e][0] - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
            assert part["advantages"][i][mask].tolist() == pytest.approx(white.tolist(), abs=1e-3)
            assert part["returns"][i][mask].tolist() == pytest.approx(parts[e][1].tolist(), abs=1e-3)
            old = [x for turn in episodes[e].turns for x in turn.logprobs]
            assert part["old_logprobs"][i][mask].tolist() == pytest.approx(old), "of the policy that sampled"
            assert not part["advantages"][i][~mask].any()
        assert row["advantage_mean"] == pytest.approx(raw.mean(), abs=1e-3)
        assert row["advantage_std"] == pytest.approx(raw.std(ddof=1), abs=1e-3)
        assert row["return_std"] == pytest.approx(goal.std(ddof=1), abs=1e-3)
        assert row["explained_variance"] == pytest.approx(1 - raw.var(ddof=1) / goal.var(ddof=1), rel=1e-2)
        assert (row["first_log_ratio_max"] > 1e-3) == (number > args.staleness > 0)
        assert row["log_ratio_max"] > 0 <= row["clip_bias_norm"] <= row["clip_bias_norm_max"]


def test_a_resumed_run_equals_an_uninterrupted_one_with_a_batch_waiting(tmp_path, spy):
    flags = {"staleness": 1, "bootstrap_truncated": True, "num_iterations": 3, "eval_every": 1}
    whole = run(tmp_path / "whole", **flags)
    weights = copy.deepcopy(spy.policy.model.state_dict())
    run(tmp_path / "half", **flags | {"num_iterations": 2})
    [folder] = (tmp_path / "half").iterdir()
    half = run(tmp_path / "half", **flags, resume=str(folder))
    assert all(torch.equal(p, weights[name]) for name, p in spy.policy.model.state_dict().items())
    assert [row | {"seconds": 0} for row in whole] == [row | {"seconds": 0} for row in half] and len(whole) == 4


def test_a_large_kl_ends_the_passes_over_a_batch(tmp_path, spy, monkeypatch):
    """Looked at after each pass of two minibatches: the last one's counts."""
    for target, passes in ((0.25, 2), (0.35, 3), (None, 4)):
        kl = iter([0.9, 0.1, 0.2, 0.3, 0.3, 0.4, 9, 9])
        monkeypatch.setattr(st_ppo, "update", lambda *_, kl=kl: {
            "approx_kl": next(kl), "clip_bias_norm": 0.0, "log_ratio_max": 0.0})
        rows = run(tmp_path, num_epochs=4, target_kl=target, num_iterations=1)
        assert rows[1]["optimizer_steps"] == 2 * passes


@pytest.mark.parametrize("flags,processes,needle", [
    ({"num_minibatches": 7}, 1, "--num-minibatches 7"), ({"staleness": 1}, 2, "--staleness")])
def test_what_cannot_be_trained_ends_with_one_clear_line(flags, processes, needle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as end:
        run(tmp_path, **flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and needle in lines[0], lines


def test_values_are_not_rounded_to_bf16():
    """The network computes in bf16, its last layer in fp32: -13 has steps of 0.06 in bf16."""
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    critic = st_ppo.Critic(Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu", bf16=True))
    torch.nn.init.normal_(critic.head.weight)
    values = critic({"tokens": torch.arange(40, 60)[None], "turn_id": torch.zeros(1, 20, dtype=torch.long)})[0, 1:]
    assert values.dtype == torch.float32 and (values != values.bfloat16().float()).all()
