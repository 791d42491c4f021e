"""The mathematics of ST-PPO (arXiv 2511.20718) against hand-worked numbers, slow loops and whole runs."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector

import policies
import utils
import words  # registers the game
from algos import st_ppo
from algos.st_ppo import (
    Args, Critic, gae_advantages, gradient_scale, place_turn_rewards, surrogate_and_clip_bias,
    turn_log_ratio, update, value_loss, whiten,
)
from conftest import CHATML, KeepGradient, byte_tokenizer, random_model
from envs.episodes import Episode, Turn
from policies import Policy, load_policy
from run_folder import Run
from utils import collate, micro_batches, select_rows, token_numbers


def table(*rows):
    return torch.tensor(np.array(rows), dtype=torch.double)


def slope(value, *inputs):
    return torch.autograd.grad(value, *inputs, retain_graph=True)[0]


def surrogate(log_ratio, advantages, turn_id, of_turns=False, low=0.2, high=0.2):
    """J, the scalar whose gradient is C, and what binds; the mean is over an episode's tokens, then over episodes."""
    counts = (turn_id >= 0).sum(1).tolist()
    share = torch.tensor([[1 / count / sum(n > 0 for n in counts) if count else 0.0] for count in counts])
    pooled = turn_log_ratio(log_ratio, turn_id) if of_turns else log_ratio
    return surrogate_and_clip_bias(pooled, advantages, share * (turn_id >= 0), low, high)


# --- Eq. 1 to 4 by hand --------------------------------------------------------------------------
# Turn 0 of three sampled tokens, two observation tokens, turn 1 of two
TURN_ID = torch.tensor([[0, 0, 0, -1, -1, 1, 1]])
RATIO, ADVANTAGES = table([1.2, 0.9, 1.1, 7, 0.1, 1.5, 1.4]), table([1, -0.5, 0.5, 9, -9, 2, -1])


def test_the_ratio_of_a_turn_is_the_geometric_mean_of_its_tokens():
    """Rejected: product 1.188, 2.1; arithmetic mean 1.0667, 1.45; mean over the whole row 1.2006."""
    got = turn_log_ratio(RATIO.log(), TURN_ID).exp()[0]
    assert got.tolist() == pytest.approx([1.0591045] * 3 + [1, 1] + [1.4491377] * 2, abs=1e-6)


@pytest.mark.parametrize("of_turns,objective", [(False, 0.46), (True, 0.4019934)])
def test_the_clipped_objective_by_hand(of_turns, objective):
    """The first ratio is on the edge and does not bind; the last is out of range, but its advantage is negative."""
    got, _, binding = surrogate(RATIO.log(), ADVANTAGES, TURN_ID, of_turns)
    assert got.item() == pytest.approx(objective, abs=1e-6) and binding[TURN_ID >= 0].tolist() == [0, 0, 0, 1, 0]


def test_an_advantage_of_zero_never_binds_and_the_clip_has_two_sides():
    ratio, advantages, turn_id = table([0.5] * 3 + [1.5] * 3), table([1, 0, -1, 1, 0, -1]), torch.arange(6)[None]
    for low, high, expected, total in ((0.2, 0.2, [0, 0, 1, 1, 0, 0], 0.5 - 0.8 + 1.2 - 1.5),
                                       (0.6, 0.2, [0, 0, 0, 1, 0, 0], 0.5 - 0.5 + 1.2 - 1.5),
                                       (0.2, 0.6, [0, 0, 1, 0, 0, 0], 0.5 - 0.8 + 1.5 - 1.5)):
        objective, _, binding = surrogate(ratio.log(), advantages, turn_id, low=low, high=high)
        assert binding.tolist() == [expected] and objective.item() == pytest.approx(total / 6)
    huge, _, _ = surrogate(table([300.0]), table([-1.0]), torch.tensor([[0]]))
    assert huge.item() == pytest.approx(-math.exp(20)), "log-ratios are held within 20"


# --- Eq. 5 to 7: the clip bias -------------------------------------------------------------------
@pytest.mark.parametrize("theta,actions,advantages,turn_id,gradient,bias,scales", [
    ([0.4, 0, -0.4], [[0], [0], [1], [2], [2]], [[1.0], [-1], [0.5], [-2], [1]], None,
     [-0.254286, 0.114164, 0.140121], [0.269532, -0.009072, -0.260460], (1, 2.667194)),
    ([0.5, 0, -0.5], [[0, 0, 2, 2]], [[1, 0.5, -2, 0.3]], [[0, 0, 1, 1]],
     [-0.021233, -0.012879, 0.034112], [0.422757, -0.089180, -0.333576], (1, 1.832016))])
def test_the_clip_bias_by_hand(theta, actions, advantages, turn_id, gradient, bias, scales):
    """A policy of three actions that collected with equal probabilities: five episodes of a token, then two turns."""
    theta, turn_ids = torch.tensor(theta, dtype=torch.double, requires_grad=True), torch.tensor(turn_id or [[0]] * 5)
    log_ratio = theta.log_softmax(0)[torch.tensor(actions)] + math.log(3)
    objective, removed, _ = surrogate(log_ratio, table(*advantages), turn_ids, of_turns=turn_id is not None)
    got, c = slope(objective, theta), slope(removed, theta)
    assert got.tolist() == pytest.approx(gradient, abs=1e-6) and c.tolist() == pytest.approx(bias, abs=1e-6)
    for scale, expected in zip(("at_most_one", "triggered"), scales, strict=True):
        assert gradient_scale(c.norm().item(), scale) == pytest.approx(expected, rel=1e-5)


def test_a_long_clip_bias_shortens_the_step_and_none_leaves_it_alone():
    for scale in ("at_most_one", "step", "triggered"):
        assert gradient_scale(2.5, scale) == pytest.approx(0.4) and gradient_scale(0.0, scale) == 1


def slow_surrogate(log_ratio, batch, of_turns, low=0.2, high=0.2):
    """J, the part of it that binds, unclipped, all of it unclipped, and what binds: a loop over episodes and tokens."""
    totals, bound, turn_id = [log_ratio.sum() * 0.0] * 3, [], batch["turn_id"]
    sampled = [[t for t, k in enumerate(ids) if k >= 0] for ids in turn_id.tolist()]
    for b, tokens in enumerate(sampled):
        for t in tokens:
            turn = [log_ratio[b, u] for u in tokens if turn_id[b, u] == turn_id[b, t]]
            w, a = torch.exp(sum(turn) / len(turn) if of_turns else log_ratio[b, t]), batch["advantages"][b, t]
            binds = bool((a > 0 and w > 1 + high) or (a < 0 and w < 1 - low))
            edge = 1 + high if a > 0 else 1 - low
            parts = (edge * a if binds else w * a, w * a if binds else 0.0, w * a)
            share = 1 / len(tokens) / sum(map(bool, sampled))
            totals = [total + share * part for total, part in zip(totals, parts, strict=True)]
            bound += [(b, t)] if binds else []
    return *totals, bound


ROWS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, 2], [0, 0, 0, 0, -1, -1, 1, 1, -1], [-1, 1, -1, -1, 3, 3, 3, 3, 4],
                     [0, -1, -1, -1, -1, -1, -1, -1, -1], [-1] * 9])  # turns may lack tokens, as may an episode


@pytest.mark.parametrize("of_turns", [False, True])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_the_gradient_and_the_clip_bias_are_the_unclipped_gradient(seed, of_turns):
    """Lemma 4.2 of the paper. Without a clip C is 0."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio, advantages = torch.randn(2, *ROWS.shape, generator=generator, dtype=torch.double)
    log_ratio = (0.6 * log_ratio).requires_grad_()
    objective, removed, binding = surrogate(log_ratio, advantages, ROWS, of_turns)
    slow, bias, full, bound = slow_surrogate(log_ratio, {"advantages": advantages, "turn_id": ROWS}, of_turns)
    assert objective.item() == pytest.approx(slow.item(), abs=1e-6)
    assert removed.item() == pytest.approx(bias.item(), abs=1e-6)
    gradient, c = slope(objective, log_ratio), slope(removed, log_ratio)
    assert c.norm() > 1e-3 and torch.allclose(c, slope(bias, log_ratio), atol=1e-6)
    assert torch.allclose(gradient + c, slope(full, log_ratio), atol=1e-6)
    assert (binding & (ROWS >= 0)).nonzero().tolist() == [list(x) for x in sorted(bound)]
    plain, removed, binding = surrogate(log_ratio, advantages, ROWS, of_turns, high=1e9, low=1.0)
    assert plain.item() == pytest.approx(full.item(), abs=1e-6)
    assert removed.item() == 0 and not slope(removed, log_ratio).any() and not binding.any()


# --- Eq. 8, 9: advantages and the critic's loss --------------------------------------------------
@pytest.mark.parametrize("discount,gae_lambda,expected,returns", [
    (1.0, 1.0, [0.5, 0.6, 0.7, 0.8], [1, 1, 1, 1]),
    (0.9, 0.8, [0.00279, 0.19832, 0.456, 0.8], [0.50279, 0.59832, 0.756, 1])])
def test_advantages_step_over_observations(discount, gae_lambda, expected, returns):
    """Rejected: starting again at an observation gives -.5, -.4 for the first turn; discounting over it .175849."""
    turn_id, values = torch.tensor([[0, 0, -1, -1, 1, 1]]), table([0.5, 0.4, 0.9, 0.8, 0.3, 0.2])
    rewards, mask = place_turn_rewards(table([0.0, 1]), turn_id), turn_id >= 0
    advantages, goal = gae_advantages(rewards, values, mask, discount, gae_lambda)
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-5) and not advantages[~mask].any()
    assert goal[mask].tolist() == pytest.approx(returns, abs=1e-5) and not goal[~mask].any()
    again = gae_advantages(rewards, torch.where(mask, values, 77.0), mask, discount, gae_lambda)
    assert torch.equal(again[0], advantages) and torch.equal(again[1], goal)


def test_advantages_are_whitened_over_all_processes(monkeypatch):
    """Equal ones become 0. Mean 3 and variance 8 of 1, 3, 7 and, on the other process, 1."""
    for advantages in ([5.0], [0.3] * 3):
        assert not whiten(torch.tensor([advantages]), torch.ones(1, len(advantages), dtype=torch.bool)).any()
    monkeypatch.setattr(st_ppo, "all_gather", lambda x: torch.cat([x, torch.tensor([1.0])]))
    white = whiten(torch.tensor([[1.0, 3.0, 7.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert white[0].tolist() == pytest.approx([x / math.sqrt(8) for x in (-2, 0, 4)], abs=1e-6)


def test_a_turn_is_rewarded_at_its_last_sampled_token():
    """Also a turn that follows at once, a turn worth nothing, and a row without a sampled token."""
    turn_id = torch.tensor([[-1, 0, 0, -1, 1, 2], [0, -1, -1, 1, 1, -1], [-1] * 6])
    rewards = torch.tensor([[1.0, 2, 4], [8, 0, 5], [1, 1, 1]])
    assert place_turn_rewards(rewards, turn_id).tolist() == [[0, 0, 1, 0, 2, 4], [8, 0, 0, 0, 0, 0], [0] * 6]
    assert place_turn_rewards(rewards.double(), turn_id).dtype == torch.float32, "of tokens, as what the critic gives"


def test_the_loss_of_the_critic_by_hand():
    """From .1 towards a return of 3: beyond .6 the clipped error is the larger one, and constant."""
    for value, error, gradient in ((0.5, 2.5, -2.5), (1.0, 2.4, 0.0), (2.5, 2.4, 0.0), (-0.9, 3.9, -3.9)):
        values = table([value, 5.0]).requires_grad_()
        loss = value_loss(values, table([0.1, 1]), table([3.0, 9]), table([1.0, 0]))
        assert [loss.item(), *slope(loss, values)[0].tolist()] == pytest.approx([error**2 / 2, gradient, 0])


# --- the critic and the update -------------------------------------------------------------------
# per episode and turn: tokens of the prompt, sampled tokens (0: one token that was not sampled)
SHAPES = [[(5, 3), (4, 2)], [(6, 1)], [(4, 2), (3, 0), (5, 4)], [(3, 4), (2, 1), (2, 3)], [(7, 2)]]
MICRO_BATCHES = {10**6: 1, 45: 2, 20: 4}  # --micro-batch-tokens: how many parts that makes of them


@pytest.fixture
def policy():
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    return Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu")


def slow_logprobs(policy, batch, temperature=1.0):
    """Log-probs of the sampled tokens and entropies, two (B, T): one row at a time, without its padding."""
    logprobs, entropy = torch.zeros(batch["tokens"].shape), torch.zeros(batch["tokens"].shape)
    for b, length in enumerate(batch["lengths"].tolist()):
        ids = batch["tokens"][b, :length]
        after = (policy.model(ids[None]).logits[0] / temperature).log_softmax(-1)
        for t in (batch["turn_id"][b] >= 0).nonzero()[:, 0].tolist():
            logprobs[b, t], entropy[b, t] = after[t - 1, ids[t]], -(after[t - 1].exp() * after[t - 1]).sum()
    return logprobs, entropy


def batch_of(policy, shapes, noise=0.4, scale=1.0):
    """Random conversations, advantages, values and returns; old log-probs of another policy."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    episodes = [Episode(0, "so") for _ in shapes]
    for episode, shape in zip(episodes, shapes, strict=True):
        for k, (prompt, sampled) in enumerate(shape):
            ids = rng.integers(200, size=prompt + max(sampled, 1)).tolist()
            episode.turns.append(Turn("hm", "", ids[:prompt], k == 0, ids[prompt:], [0.0] * len(ids[prompt:]),
                                      forced=set() if sampled else {0}))
    batch = collate(episodes, policy.device)
    mask, shape = batch["turn_id"] >= 0, batch["tokens"].shape
    for name in ("noise", "advantages", "old_values", "returns"):
        batch[name] = torch.where(mask, torch.randn(shape, generator=generator), 0.0)
    with torch.no_grad():
        batch["old_logprobs"] = utils.token_logprobs(policy, batch, 1.0)[0] + noise * batch.pop("noise")
    batch["advantages"] *= scale
    return batch


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


def test_a_value_knows_what_stands_before_its_token_and_nothing_else(policy):
    batch, critic, row = batch_of(policy, SHAPES), Awake(policy), 3
    assert not Critic(policy)(batch).any(), "it starts at zero"
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
        [got] = token_numbers(lambda rows: (critic(rows),), 1, batch, Args(micro_batch_tokens=tokens))
        assert torch.allclose(got, values, atol=1e-5) and not got.requires_grad


def test_values_are_not_rounded_to_bf16(policy):
    """The network computes in bf16, its last layer in fp32: -13 has steps of 0.06 in bf16."""
    policy.bf16 = True
    critic = Awake(policy)
    values = critic({"tokens": torch.arange(40, 60)[None], "turn_id": torch.zeros(1, 20, dtype=torch.long)})[0, 1:]
    assert values.dtype == torch.float32 and (values != values.bfloat16().float()).all()


@pytest.mark.parametrize("tokens", MICRO_BATCHES)
@pytest.mark.parametrize("flags,scale", [
    ({"variant": "ppo"}, 1), ({"variant": "turn_ppo", "temperature": 1.3, "clip_high": 0.3}, 1),
    ({"variant": "s_ppo"}, 100), ({"variant": "st_ppo"}, 100), ({"variant": "st_ppo", "clip_low": 0.05}, 1e-3),
    ({"variant": "st_ppo", "scale": "triggered"}, 1e-3),
    ({"variant": "s_ppo", "scale": "step"}, 100), ({"variant": "turn_ppo", "scale": "step"}, 100)])
def test_an_update_and_its_metrics_are_what_loops_over_episodes_turns_and_tokens_give(flags, scale, tokens, policy):
    batch, critic, args = batch_of(policy, SHAPES, scale=scale), Awake(policy), Args(**flags)
    got = step(policy, critic, batch, **flags, micro_batch_tokens=tokens)
    assert len(list(micro_batches(batch, tokens))) == MICRO_BATCHES[tokens]
    logprobs, entropy = slow_logprobs(policy, batch, args.temperature)
    log_ratio, of_turns = logprobs - batch["old_logprobs"], args.variant in ("turn_ppo", "st_ppo")
    *terms, bound = slow_surrogate(log_ratio, batch, of_turns, args.clip_low, args.clip_high)
    parameters = list(policy.model.parameters())
    gradient, c = (torch.cat([x.flatten() for x in torch.autograd.grad(term, parameters, retain_graph=True)])
                   for term in terms[:2])
    n = c.norm().item()
    assert (n > 1) == (scale > 1e-3) and n > 0
    s = 1 / n if args.scale == "triggered" else 1 / max(1, n)
    s = s if args.variant in ("s_ppo", "st_ppo") else 1.0
    factor, rate = (1, s) if args.scale == "step" else (s, 1)
    size = factor * gradient.abs().max().item()
    assert torch.allclose(got.gradient, -factor * gradient, rtol=1e-3, atol=1e-4 * size)
    assert got.rate == pytest.approx(rate * args.learning_rate, rel=1e-3)

    mask = batch["turn_id"] >= 0
    error = value_loss(critic(batch), batch["old_values"], batch["returns"], mask / mask.sum())
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(error, list(critic.parameters()))])
    assert torch.allclose(got.critic, expected, rtol=1e-3, atol=1e-5)
    ell = log_ratio[mask]  # of the sampled tokens
    expected = {"loss": -terms[0], "value_loss": error, "entropy": entropy[mask].mean(),
                "clip_fraction": len(bound) / len(ell), "approx_kl": (ell.exp() - 1 - ell).mean(),
                "clip_bias_norm": n, "gradient_scale": s, "scaled_steps": float(s != 1),
                "grad_norm": factor * gradient.norm(), "grad_clipped": 0}
    expected = {name: torch.as_tensor(x).item() for name, x in expected.items()}
    assert got.metrics == pytest.approx(expected, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("variant", ["s_ppo", "st_ppo"])
def test_the_layout_of_a_batch_does_not_matter(variant, policy):
    """Order of rows, padding, and whatever stands where nothing was sampled."""
    batch, critic = batch_of(policy, SHAPES, scale=30.0), Awake(policy)
    base = step(policy, critic, batch, variant=variant)
    assert base.metrics["gradient_scale"] < 0.9
    alike(base, step(policy, critic, select_rows(batch, [3, 1, 0, 4, 2]), variant=variant))
    fill = {"turn_id": -1, "tokens": 7}
    wide = {name: torch.nn.functional.pad(x, (0, 6), value=fill.get(name, 5.0)) for name, x in batch.items()
            if x.dim() > 1}
    alike(base, step(policy, critic, wide | {"lengths": batch["lengths"] + 6}, variant=variant))
    names, sampled = ("old_logprobs", "advantages", "old_values", "returns"), batch["turn_id"] >= 0
    changed = {name: torch.where(sampled, batch[name], 9.0) for name in names}
    alike(base, step(policy, critic, batch | changed, variant=variant))


def test_two_processes_with_the_same_rows_take_the_step_of_one_with_every_row_twice(policy, monkeypatch):
    batch, flags = batch_of(policy, SHAPES, scale=30.0), {"variant": "s_ppo", "micro_batch_tokens": 40}
    whole = step(policy, Awake(policy), select_rows(batch, [0, 1, 2, 3, 4] * 2), **flags)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for module in (st_ppo, utils):
        monkeypatch.setattr(module, "all_reduce_sum", lambda x: 2 * x)
    alike(whole, step(policy, Awake(policy), batch, **flags))


def test_a_step_without_rows_has_no_gradient(policy):
    empty = collate([], policy.device) | {k: torch.zeros(0, 1) for k in ("advantages", "old_values", "returns")}
    got = step(policy, Awake(policy), empty)
    assert not got.gradient.any() and not got.critic.any() and all(math.isfinite(x) for x in got.metrics.values())


def test_while_nothing_binds_the_scaled_step_is_the_plain_one_bit_for_bit(policy):
    """With the parameters that sampled."""
    batch, critic = batch_of(policy, SHAPES, noise=0.0), Awake(policy)
    for plain, scaled in (("ppo", "s_ppo"), ("turn_ppo", "st_ppo")):
        base = step(policy, critic, batch, variant=plain)
        assert base.metrics["clip_bias_norm"] == base.metrics["clip_fraction"] == base.metrics["approx_kl"] == 0
        for scale in ("at_most_one", "triggered", "step"):
            got = step(policy, critic, batch, variant=scaled, scale=scale)
            assert torch.equal(got.gradient, base.gradient) and torch.equal(got.critic, base.critic)
            assert got.rate == base.rate == Args().learning_rate and got.metrics == base.metrics


def test_turns_of_one_token_have_token_ratios(policy):
    batch = batch_of(policy, [[(4, 1), (3, 1), (3, 1)], [(5, 1)], [(2, 1), (3, 1)]], scale=30.0)
    critic = Awake(policy)
    for token, turn in (("ppo", "turn_ppo"), ("s_ppo", "st_ppo")):
        alike(step(policy, critic, batch, variant=token), step(policy, critic, batch, variant=turn))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_gradient_is_scaled_before_it_is_clipped(factor, policy):
    batch, critic = batch_of(policy, SHAPES, scale=100.0), Awake(policy)
    base = step(policy, critic, batch, variant="s_ppo")
    limit = factor * base.metrics["grad_norm"]  # of the norm after scaling
    got = step(policy, critic, batch, variant="s_ppo", max_grad_norm=limit)
    assert got.gradient.norm().item() == pytest.approx(min(limit, base.metrics["grad_norm"]), rel=1e-4)
    assert got.metrics == base.metrics | {"grad_clipped": factor < 1}


def test_a_scaled_learning_rate_is_that_of_one_step_only(policy):
    """Two steps of AdamW: the second, in which nothing binds, has the whole learning rate again."""
    args, critic = Args(variant="s_ppo", scale="step"), Awake(policy)
    optimizers = [torch.optim.AdamW(x.parameters(), 1.0) for x in (policy.model, critic)]
    scale = update(policy, critic, *optimizers, batch_of(policy, SHAPES, scale=100.0), args)["gradient_scale"]
    assert scale < 0.9 and optimizers[0].param_groups[0]["lr"] == pytest.approx(scale * args.learning_rate)
    update(policy, critic, *optimizers, batch_of(policy, SHAPES, noise=0.0), args)
    assert optimizers[0].param_groups[0]["lr"] == args.learning_rate and optimizers[1].param_groups[0]["lr"] == 1.0


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"env_id": "tests/Words-v0", "num_prompts": 6, "warm_start_steps": 3, "num_iterations": 2, "max_turns": 3,
         "max_turn_tokens": 3, "learning_rate": 0.01, "print_samples": 0, "eval_episodes": 2, "eval_every": 9}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(policies, "NUM_DEMONSTRATIONS", 16)
    monkeypatch.setattr(Run, "plot", lambda *_: None)


@pytest.fixture
def spy(monkeypatch):
    """Of every iteration of a run: its episodes, the minibatches of its updates and what these reported."""
    seen, collect_groups = [], st_ppo.collect_groups

    def collect(*args):
        seen.append(SimpleNamespace(episodes=collect_groups(*args), updates=[], reports=[]))
        seen[-1].episodes[1] = Episode(0, "first", truncated=True, overflowed=True)  # it did not fit into the context
        return seen[-1].episodes

    def updating(policy, critic, optimizer, critic_optimizer, batch, args):
        now = seen[-1]
        if not now.updates:
            assert torch.allclose(critic(batch), batch["old_values"], atol=1e-5), "of the critic of now"
        assert critic_optimizer.param_groups[0]["lr"] == args.critic_learning_rate
        now.updates.append(dict(batch))
        now.reports.append(update(policy, critic, optimizer, critic_optimizer, batch, args))
        return now.reports[-1]
    for name, call in (("collect_groups", collect), ("update", updating), ("Critic", Awake)):
        monkeypatch.setattr(st_ppo, name, call)
    return seen


def run(tmp_path, **flags):
    """The rows of metrics.csv of a run, and its run folder."""
    st_ppo.main(Args(**(QUICK | {"run_dir": str(tmp_path)} | flags)))
    [folder] = Path(tmp_path).iterdir()
    with open(folder / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)], folder


def slow_advantages(episode, values, args):
    """Eq. 8 of one episode, in plain Python; values: of its sampled tokens."""
    rewards = [x for turn in episode.turns for x in [0.0] * (len(turn.token_ids) - 1) + [turn.reward]]
    advantages, following, later = [], 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        later = reward + args.discount * following - value + args.discount * args.gae_lambda * later
        advantages.insert(0, later)
        following = value
    return np.array(advantages)


@pytest.mark.parametrize("flags", [
    {"variant": "turn_ppo", "micro_batch_tokens": 60},
    {"discount": 0.9, "gae_lambda": 0.8, "num_epochs": 2, "num_minibatches": 3, "critic_learning_rate": 0.02,
     "staleness": 1, "num_iterations": 3, "num_prompts": 2, "group_size": 3},
    {"variant": "ppo", "history_turns": 0, "discount": 0.9, "gae_lambda": 0.8},  # a row for every turn
    {"history_turns": 1, "staleness": 1}])
def test_what_a_run_trains_on_against_a_loop(flags, tmp_path, spy):
    """The batch is as old as asked for and whitened once; no episode is split or left out, also if it has many rows."""
    args, logged = Args(**(QUICK | flags)), run(tmp_path, **flags)[0][1:]
    for number, (now, row) in enumerate(zip(spy, logged, strict=True)):
        if number < args.staleness:
            assert not now.updates and row["optimizer_steps"] == 0 and "loss" not in row
            continue
        assert len(now.updates) == row["optimizer_steps"] == args.num_epochs * args.num_minibatches
        ids = [sorted({*part["episode_id"].tolist()}) for part in now.updates]
        deals = [ids[n:n + args.num_minibatches] for n in range(0, len(ids), args.num_minibatches)]
        assert all(sorted(sum(deal, [])) == [0, 2, 3, 4, 5] for deal in deals), "all but the empty one"
        assert max(map(len, ids)) == 6 // args.num_minibatches
        assert len(set(map(str, deals))) == len(deals), "new minibatches in every pass"

        episodes = spy[number - args.staleness].episodes
        parts = [(part, number, part["episode_id"] == number) for part in now.updates[:args.num_minibatches]
                 for number in part["episode_id"].unique().tolist()]
        values, returns, white, old = ([part[name][rows][part["turn_id"][rows] >= 0].tolist() for part, _, rows in parts]
                                       for name in ("old_values", "returns", "advantages", "old_logprobs"))
        mine = [episodes[number] for _, number, _ in parts]
        raw = [slow_advantages(episode, v, args) for episode, v in zip(mine, values, strict=True)]
        everything, goal = np.concatenate(raw), np.concatenate(raw) + np.concatenate(values)
        assert np.concatenate(returns) == pytest.approx(goal, abs=1e-4)
        expected = (everything - everything.mean()) / np.sqrt(everything.var(ddof=1) + 1e-8)
        assert np.concatenate(white) == pytest.approx(expected, abs=1e-4)
        assert old == [pytest.approx([x for turn in e.turns for x in turn.logprobs]) for e in mine], "when sampled"
        for (part, _, rows), episode in zip(parts, mine, strict=True):
            tokens = [ids[:n].tolist() for ids, n in zip(part["tokens"][rows], part["lengths"][rows], strict=True)]
            assert sum(tokens, []) == [x for turn in episode.turns for x in turn.prompt_ids + turn.token_ids]
            assert len(tokens) == (1 if args.history_turns is None else len(episode.turns))
        assert row["explained_variance"] == pytest.approx(1 - everything.var() / goal.var(), rel=1e-2)
        assert row["clip_bias_norm_max"] == max(report["clip_bias_norm"] for report in now.reports)
        assert (now.reports[0]["approx_kl"] > 1e-6) == (number > args.staleness > 0), "of the first step"


def test_a_run_moves_every_weight_of_both_networks(tmp_path):
    """The critic's last layer starts at 0: unless it moves, the layers below it get no gradient either."""
    _, folder = run(tmp_path)
    policy = load_policy(Args(**QUICK))
    start = Critic(policy).state_dict() | policy.model.state_dict()
    end = torch.load(folder / "checkpoint/trainer_state.pt", weights_only=True)["critic"]
    end |= load_file(folder / "checkpoint/model.safetensors")
    unmoved = [name for name, x in end.items() if torch.equal(x, start[name])]
    assert not unmoved and "head.weight" in end and len(end) > 50


@pytest.mark.parametrize("flags,factor", [({"variant": "ppo"}, 1), ({"variant": "s_ppo"}, 0.5), ({"variant": "s_ppo", "scale": "step"}, 0.5)])
def test_sgd_takes_a_step_as_long_as_the_scaled_gradient_times_the_rate(flags, factor, tmp_path, monkeypatch):
    """The only step of a run, in which s is 0.5. AdamW would go as far with s as without."""
    seen = []

    def updating(policy, *others):
        before = parameters_to_vector(policy.model.parameters()).clone()
        seen.append(update(policy, *others) | {"moved": (parameters_to_vector(policy.model.parameters()) - before).norm().item()})
        return {name: x for name, x in seen[-1].items() if name != "moved"}
    monkeypatch.setattr(st_ppo, "update", updating)
    monkeypatch.setattr(st_ppo, "gradient_scale", lambda *_: 0.5)
    run(tmp_path, sgd=True, num_iterations=1, num_minibatches=1, learning_rate=0.1, max_grad_norm=1e9, **flags)
    [step] = seen
    length = step["grad_norm"] * (factor if "scale" in flags else 1)  # grad_norm is that of s times the gradient
    assert step["gradient_scale"] == factor and step["grad_norm"] > 1e-3
    assert step["moved"] == pytest.approx(0.1 * length, rel=1e-3)


def test_returns_that_do_not_differ_are_explained_by_nothing(tmp_path, spy, monkeypatch):
    monkeypatch.setattr(words.Words, "step", lambda self, action: ("so", 0.0, True, False, {}))
    [_, row], _ = run(tmp_path, num_iterations=1)
    assert row["explained_variance"] == 0 and row["value_loss"] > 0


def test_a_resumed_run_equals_an_uninterrupted_one_with_a_batch_waiting(tmp_path):
    flags = {"staleness": 1, "num_iterations": 3, "eval_every": 1}
    whole, folder = run(tmp_path / "whole", **flags)
    _, other = run(tmp_path / "half", **flags | {"num_iterations": 2})
    half, _ = run(tmp_path / "half", **flags, resume=str(other))
    assert [row | {"seconds": 0} for row in whole] == [row | {"seconds": 0} for row in half] and len(whole) == 4
    weights, again = (load_file(x / "checkpoint/model.safetensors") for x in (folder, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("target,passes", [(0.25, 2), (0.3, 3), (None, 4)])
def test_a_large_kl_ends_the_passes_over_a_batch(target, passes, tmp_path, spy, monkeypatch):
    """Looked at after each pass of two minibatches: the last one's counts, and has to be above."""
    kl = iter([0.9, 0.1, 0.2, 0.3, 0.3, 0.4, 9, 9])
    monkeypatch.setattr(st_ppo, "update", lambda *_: {"approx_kl": next(kl), "clip_bias_norm": 0.0})
    rows, _ = run(tmp_path, num_epochs=4, target_kl=target, num_iterations=1)
    assert rows[1]["optimizer_steps"] == 2 * passes


@pytest.mark.parametrize("flags,processes", [({"num_minibatches": 7}, 1), ({"staleness": 1}, 2)])
def test_what_cannot_be_trained_ends_with_one_clear_line(flags, processes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit, match="2"):
        st_ppo.main(Args(**QUICK | {"run_dir": str(tmp_path)} | flags))
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all("--" + name.replace("_", "-") in line for name in flags)
    assert not list(tmp_path.iterdir()), "before a run folder is made"
