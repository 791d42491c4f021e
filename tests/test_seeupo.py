"""The mathematics of SeeUPO against hand-worked numbers, exact expectations and slow loops."""

import copy
import csv
import functools
import itertools
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from algos import seeupo
from algos.seeupo import (
    Args, main, multiply_weights, rows_of_turns, scaled_advantages, turn_loss, turn_order, update,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from policies import Policy, make_tiny
from run_folder import Run
from utils import DRAW, RunArgs, collate, micro_batches, random_stream


def double(values):
    return torch.tensor(values, dtype=torch.double)


# --- Eq. 1, 2: rewards and advantages ------------------------------------------------------------
@pytest.mark.parametrize("groups,first,others,most,last", [
    ([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0], 2.03101, -0.677003, 0.677003, -2.03101),
    # how much the scores of a group differ is not lost, as it would be with the std of the group
    ([1.5, 0, 0, 0, 0.5, 0.5, 0.5, 0.4], 2.286213, -0.762071, 0.050805, -0.152414)])
def test_advantages_by_hand(groups, first, others, most, last):
    got = scaled_advantages(double(groups), 4).tolist()
    assert got[:8] == pytest.approx([first] + [others] * 3 + [most] * 3 + [last], abs=1e-5)
    assert got[8:] == [0.0] * (len(groups) - 8)


def test_a_group_of_equals_stays_at_exactly_zero():
    """The mean of rounded numbers is not exact, and there is nothing to divide by."""
    for scores in ([0.1, 0.2, 0.7], [0.3, 0.1, 0.1], [1 / 3, 1 / 6, 1.5]):
        got = scaled_advantages(torch.tensor(scores + [0.7, 0.7, 0.7 + 1e-7]), 3)
        assert got[3:].tolist() == [0.0] * 3 and (got[:3] != 0).all()
    assert scaled_advantages(torch.tensor([0.7] * 6), 3).tolist() == [0.0] * 6


def test_the_smallest_difference_in_a_batch_is_scaled_as_any_other():
    """One of 64 pairs differs, by 4e-6: it is +- 2e-6, over the std sqrt(2 / 127) 2e-6 of the batch."""
    got = scaled_advantages(double([4e-6] + [0.0] * 127), 2).tolist()
    assert got == pytest.approx([math.sqrt(63.5), -math.sqrt(63.5)] + [0.0] * 126)


@pytest.mark.parametrize("size,expected", [(2, 0.148492), (4, 0.297275)])
def test_the_expected_gradient_of_one_turn_by_enumeration(size, expected):
    """Bernoulli(.3), reward = action. A group with k ones has the std s = sqrt(k (G - k) / (G (G - 1))) and the step s (G - 1) / G;
    for two episodes .42 sqrt(1 / 2) / 2, for four .4872 / 2 * 3 / 4 + .2646 sqrt(1 / 3) * 3 / 4."""
    logit, total = double(math.log(3 / 7)).requires_grad_(), 0.0
    for actions in itertools.product([0.0, 1.0], repeat=size):
        chosen = double(actions)
        logprobs = torch.nn.functional.logsigmoid(torch.where(chosen == 1, logit, -logit))[:, None]
        loss, _ = loss_of_one_token_turns(logprobs, logprobs.detach(), scaled_advantages(chosen, size))
        probability = 0.3 ** sum(actions) * 0.7 ** (size - sum(actions))
        total -= probability * torch.autograd.grad(loss, logit)[0].item()
    assert total == pytest.approx(expected, abs=1e-6)


# --- Eq. 5: weights and the order of the turns ---------------------------------------------------
@pytest.mark.parametrize("advantage,ratios,bound,expected", [
    (0.5, [1.1, 0.9, 1.05], None, [0.5, 0.55, 0.495, 0.51975]),  # in reverse, turns 1, 2, 3: 1.05, .9, 1.1
    (0.5, [1.05, 0.9, 1.1], None, [0.5, 0.525, 0.4725, 0.51975]),  # natural
    (0.5, [0.9, 1.1, 1.05], None, [0.5, 0.45, 0.495, 0.51975]),  # turns 2, 3, 1
    (-1.0, [None, 0.8, 1.2], None, [-1.0, -1.0, -0.8, -0.96]),  # the episode has no third turn
    (-0.5, [0.7, 1.1], None, [-0.5, -0.35, -0.385]), (-0.5, [0.7, 1.1], 0.2, [-0.5, -0.4, -0.44]),
    (0.5, [1.3, 1.1], 0.2, [0.5, 0.6, 0.6]), (1.0, [0.7, 0.7], 0.2, [1.0, 0.8, 0.8]),
    (1.0, [1.3, 0.7], 0.2, [1.0, 1.2, 0.96]),  # the ratio is bounded, and the product is
    (1.0, [1e-43], None, [1.0, math.exp(-20)]), (1.0, [1e43], None, [1.0, math.exp(20)])])
def test_a_turn_is_trained_with_the_ratios_of_the_turns_before_it_and_not_with_its_own(
        advantage, ratios, bound, expected):
    running, used = torch.ones(2).double(), []
    for ratio in ratios:
        used.append(advantage * running[0].item())
        rows = torch.tensor([1] if ratio is None else [1, 0])  # beside it an episode of ratio 1
        log_ratio = double([1.0] if ratio is None else [1.0, ratio]).log().requires_grad_()
        running = multiply_weights(running, log_ratio, rows, bound)
    assert [*used, advantage * running[0].item()] == pytest.approx(expected)
    assert running[1] == 1 and not running.requires_grad


def test_the_orders():
    assert [turn_order(3, x, RNG) for x in ("natural", "together")] == [[[0], [1], [2]], [[0, 1, 2]]]
    drawn = {str(turn_order(3, "random", RNG)) for _ in range(100)}
    assert drawn == {str([[t] for t in x]) for x in itertools.permutations(range(3))}


# --- Eq. 3, 4: the objective ---------------------------------------------------------------------
def loss_of_one_token_turns(logprobs, old, credit):
    """turn_loss of rows with one token, (B, 1), and the weights M = credit (B,)."""
    batch = {"old_logprobs": old, "ref_logprobs": old, "turn_id": torch.zeros(old.shape, dtype=torch.long),
             "advantages": credit[:, None], "weights": torch.full(old.shape, 1 / len(old))}
    return turn_loss(batch, logprobs, True, 0.2, 0.2, 0.0)


def slow_objective(logprobs, entropy, ref, rows, args):
    """Eq. 3 and 4, turn by turn and token by token; the metrics beside it."""
    old, credit, turns, terms, metrics = rows["old_logprobs"], rows["advantages"][:, 0], {}, [], []
    for row, t in (rows["turn_id"] >= 0).nonzero().tolist():
        turns.setdefault((row, int(rows["turn_id"][row, t])), []).append((row, t))
    for (row, _), tokens in turns.items():
        drift = torch.stack([logprobs[at] - old[at] for at in tokens])
        ratios = [drift.mean().exp()] if args.ratio == "turn" else list(drift.exp())
        pairs = [(r * credit[row], min(max(r, 1 - args.clip_low), 1 + args.clip_high) * credit[row]) for r in ratios]
        kl = sum((ref[at] - logprobs[at]).exp() - (ref[at] - logprobs[at]) - 1 for at in tokens) / len(tokens)
        terms.append(sum(min(pair) for pair in pairs) / len(pairs) - args.kl_coefficient * kl)
        metrics.append({
            "loss": -terms[-1].item(), "kl_policy_ref_k3": kl.item(),
            "approx_kl": np.mean([math.exp(x) - 1 - x for x in drift.tolist()]),
            "clip_fraction": np.mean([bool(bounded < free) for free, bounded in pairs]),
            "ratio_drift": np.mean([abs(r.item() - 1) for r in ratios]),
            "entropy": np.mean([entropy[at].item() for at in tokens])})
    return sum(terms) / len(terms), {name: np.mean([m[name] for m in metrics]) for name in metrics[0]}


def test_clipping_stops_the_gradient_in_the_two_right_quadrants_only():
    log_ratio = double([1.3, 0.7, 1.3, 0.7]).log()[:, None].requires_grad_()
    loss, parts = loss_of_one_token_turns(log_ratio, torch.zeros(4, 1).double(), double([0.55, 0.55, -0.55, -0.55]))
    loss.backward()
    assert -loss.item() == pytest.approx((0.66 + 0.385 - 0.715 - 0.44) / 4)
    assert (-4 * log_ratio.grad[:, 0]).tolist() == pytest.approx([0, 0.385, -0.715, 0])
    assert parts["clip_fraction"].item() == 0.5


def test_the_two_logged_kls_are_exact_in_expectation_and_have_the_right_direction():
    """Every action of a turn of one token is a row, weighted by the distribution that it was sampled from."""
    old, new, ref = double([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]).log()[:, :, None]
    for name, sampler, other in (("approx_kl", old, new), ("kl_policy_ref_k3", new, ref)):
        batch = {"old_logprobs": old, "ref_logprobs": ref, "advantages": torch.zeros(3, 1).double(),
                 "turn_id": torch.zeros(3, 1, dtype=torch.long), "weights": sampler.exp()}
        exact = (sampler.exp() * (sampler - other)).sum().item()
        assert turn_loss(batch, new, True, 0.2, 0.2, 0.0)[1][name].item() == pytest.approx(exact)


# --- the two-turn game, by exact enumeration -----------------------------------------------------
# turn 1   L .5                R .5
# turn 2   l .5     r .5       l .8     r .2        J = .35, and what reverse induction finds: 1
# reward   .5       .5         0        1
REWARD, OUTCOMES = double([0.5, 0.5, 0, 1]), torch.tensor([[0, 1]] * 4)
START, RNG = (double([0.5, 0.5]), double([[0.5, 0.5], [0.8, 0.2]])), np.random.default_rng(0)


def outcome_logprobs(first, second):
    """Tables of log-probs (2,) and (2, 2) -> those of every outcome's two turns, (4, 2)."""
    return torch.stack([first.repeat_interleave(2), second.flatten()], 1)


def game_iteration(policy, order, respond):
    """One pass over the two turns with the script's functions; respond(p, gradient of log p) -> p."""
    policy = list(policy)
    old = outcome_logprobs(*(x.clamp(min=1e-30).log() for x in policy))
    p = old.sum(1).exp()
    advantages, running = REWARD - p @ REWARD, torch.ones(4).double()
    for [turn] in turn_order(2, order, RNG):
        tables = [x.clamp(min=1e-30).log().requires_grad_() for x in policy]
        rows = rows_of_turns({
            "turn_id": OUTCOMES, "lengths": torch.full((4,), 2), "old_logprobs": old, "ref_logprobs": old,
            "logprobs": outcome_logprobs(*tables), "advantages": (advantages * running)[:, None].expand(4, 2)}, [turn])
        rows["weights"] = p[:, None] * (rows["turn_id"] == turn)
        loss, _ = turn_loss(rows, rows["logprobs"], True, 0.2, 0.2, 0.0)
        policy[turn] = respond(policy[turn], -torch.autograd.grad(loss, tables[turn])[0])
        new = outcome_logprobs(*(x.clamp(min=1e-30).log() for x in policy))
        running = multiply_weights(running, (new - old)[:, turn], torch.arange(4))
    return policy


STEPS = {"best response": torch.ones_like, "bounded": lambda p: torch.minimum(1.2 * p, 1 - 0.8 * (1 - p)),
         "no support left": lambda p: (1.2 * p).clamp(max=1)}


@pytest.mark.parametrize("step,order,expected", [  # the values after 1, 5, 6, 8, 10, 20, 40 iterations
    ("best response", "reverse", [1.0] * 7), ("best response", "natural", [0.5] * 7),
    ("bounded", "reverse", [0.396, 0.4996, 0.5191, 0.5686, 0.6366, 0.9489, 0.9994]),
    ("bounded", "natural", [0.396, 0.4996, 0.5127, 0.5457, 0.5911, 0.9271, 0.9991]),
    ("no support left", "reverse", [0.396, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])])
def test_only_reverse_order_reaches_the_optimum_at_once_and_small_steps_reach_it_in_both(step, order, expected):
    def respond(p, gradient):  # step(p) for the action of the larger value, where there is one
        value = gradient / p.clamp(min=1e-30)
        gain = value - value.flip(-1)  # over the other action
        taken = torch.where(gain > 0, STEPS[step](p), 1 - STEPS[step](p.flip(-1)))
        return torch.where(gain.abs() < 1e-6, p, taken)
    policy, values = START, []
    for _ in range(40):
        policy = game_iteration(policy, order, respond)
        values.append((outcome_logprobs(*policy).prod(1) @ REWARD).item())
    assert [values[i - 1] for i in (1, 5, 6, 8, 10, 20, 40)] == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("tokens,bound,expected", [(1, None, 0.65), (2, None, 0.2906888), (2, 0.2, -0.068)])
def test_only_the_ratio_of_the_whole_turn_is_exact_and_the_bounds_turn_a_sign(tokens, bound, expected):
    """Turn 2 after R has the ratios 0 and 5 in all; what R is worth at turn 1. 2 tokens: the mean of Eq. 3."""
    log_ratio = double([-99, math.log(5)]) / tokens
    running = multiply_weights(torch.ones(2).double(), log_ratio, torch.arange(2), bound)
    got = (double([0.8, 0.2]) * (double([0, 1]) - 0.35) * running).sum()
    assert got.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rate,second,first", [
    (1.0, [0.773169, 0.226831], [0.068292, -0.068292]), (10.0, [0.446776, 0.553224], [-0.013306, 0.013306])])
def test_gradients_are_those_of_the_expected_reward_after_the_later_step(rate, second, first):
    seen = []
    def respond(p, gradient):
        seen.append(gradient - p * gradient.sum(-1, keepdim=True))  # of the logits
        return (p.log() + rate * seen[-1]).softmax(-1)
    policy = game_iteration(START, "reverse", respond)
    assert seen[0].flatten().tolist() == pytest.approx([0, 0, -0.08, 0.08], abs=1e-6)
    assert policy[1][1].tolist() == pytest.approx(second, abs=1e-6)
    assert seen[1].tolist() == pytest.approx(first, abs=1e-6)  # without M .075, -.075
    logits = START[0].log().requires_grad_()
    truth = outcome_logprobs(logits.softmax(-1), policy[1]).prod(1) @ REWARD
    assert torch.autograd.grad(truth, logits)[0].tolist() == pytest.approx(first, abs=1e-6)


# --- rows of a turn and one update ---------------------------------------------------------------
TURNS_PLAYED = (3, 1, 2, 2, 2, 3, 1, 3, 2)  # three groups of three
SCORES = (1, 0.4, 0, 0.7, 0.7, 0.7, 0.5, None, 1)  # None: garbage with a full score
POLICY = Policy(*make_tiny(RunArgs(tiny_init_std=0.1), ["left right"]), "cpu")


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
    for count, score in zip(played, scores, strict=True):
        turns = [Turn("", "", rng.integers(4, 200, rng.integers(2, 5)).tolist(), k == 0,
                      rng.integers(4, 200, rng.integers(1, 4)).tolist()) for k in range(count)]
        turns[-1].reward = 1.5 if score is None else score + 0.5
        turns[0].reward -= 0.5  # the score is the sum over the turns
        episodes.append(Episode(0, "", turns, info={"garbage": score is None}))
        for turn, logprobs in zip(turns, slow_logprobs(policy, episodes[-1])[0], strict=True):
            turn.logprobs = logprobs.tolist()
    return episodes


@pytest.fixture(scope="module")
def played():
    """A policy and its episodes; their batch with weights M and old log-probs that make the clip bind; a reference."""
    episodes, reference = random_episodes(POLICY, 0), copy.deepcopy(POLICY)
    torch.manual_seed(9)
    batch = collate(episodes, POLICY.device)
    batch["old_logprobs"] += torch.randn_like(batch["old_logprobs"])
    batch["advantages"] = torch.randn(9)[:, None].expand(batch["tokens"].shape)
    for p in reference.model.parameters():
        p.data += 0.03 * torch.randn_like(p)
    return POLICY, episodes, batch, reference


def on_tokens(places, values, turns):
    """Values of every turn of an episode -> one tensor over the places of its row."""
    sampled = torch.cat([values[t] for t in turns if t < len(values)])
    return torch.zeros(places.shape).masked_scatter(places >= 0, sampled)


@pytest.mark.parametrize("turns", [[2], [1], [0], [0, 1, 2]])
def test_rows_are_those_that_have_the_turn_cut_after_it(played, turns):
    batch = played[2]
    rows = rows_of_turns(batch, turns)
    assert rows["episode_id"].tolist() == [e for e, count in enumerate(TURNS_PLAYED) if count > turns[0]]
    assert set(rows["turn_id"].unique().tolist()) == {-1, *turns} and batch["turn_id"].amax() == 2
    assert rows["lengths"].tolist() == [(x >= 0).nonzero().max() + 1 for x in rows["turn_id"]]


def run_update(policy, batch, reference, **options):
    keeper, args = KeepGradient(policy), Args(max_grad_norm=1e9, temperature=0.8, kl_coefficient=0.5, **options)
    return update(policy, reference, keeper, dict(batch), args), keeper.gradient, args


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("turns,options", [
    ([1], {}), ([0], {"clip_low": 0.1, "clip_high": 0.3}), ([0, 1, 2], {}), ([0, 1, 2], {"ratio": "token"})])
def test_the_update_against_one_forward_pass_per_episode(played, turns, options, parts):
    policy, episodes, batch, reference = played
    rows = rows_of_turns(batch, turns)
    size = next(n for n in range(16384) if len(list(micro_batches(rows, n))) == parts)
    metrics, gradient, args = run_update(policy, rows, reference, micro_batch_tokens=size, **options)
    logprobs, entropy, ref = [], [], []
    for places, e in zip(rows["turn_id"], rows["episode_id"].tolist(), strict=True):
        for part, values in zip((logprobs, entropy), slow_logprobs(policy, episodes[e]), strict=True):
            part.append(on_tokens(places, values, turns))
        ref.append(on_tokens(places, slow_logprobs(reference, episodes[e])[0], turns).detach())
    objective, expected = slow_objective(*map(torch.stack, (logprobs, entropy, ref)), rows, args)
    truth = torch.cat([x.flatten() for x in torch.autograd.grad(-objective, list(policy.model.parameters()))])
    assert torch.allclose(gradient, truth, rtol=1e-3, atol=1e-6) and 0 < expected["clip_fraction"] < 1
    assert metrics == pytest.approx(expected | {"grad_norm": truth.norm().item()}, rel=1e-4, abs=1e-5)
    assert min(expected[name] for name in ("kl_policy_ref_k3", "approx_kl", "entropy", "ratio_drift")) > 0.01


@pytest.mark.parametrize("turn", [0, 2])
def test_the_update_does_not_depend_on_padding_row_order_or_what_stands_outside_the_turn(played, turn):
    policy, _, batch, reference = played
    base = run_update(policy, rows_of_turns(batch, [turn]), reference)
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x for k, x in batch.items()}
    shuffled = {k: x[torch.tensor([4, 8, 0, 7, 2, 6, 1, 3, 5])] for k, x in batch.items()}
    outside = batch["turn_id"] != turn
    changed = batch | {k: torch.where(outside, -123.0, batch[k]) for k in ("old_logprobs", "advantages")}
    for same in (padded, shuffled, changed):
        metrics, gradient, _ = run_update(policy, rows_of_turns(same, [turn]), reference)
        assert base[0] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert torch.allclose(base[1], gradient, rtol=1e-3, atol=1e-6)


def test_a_process_without_rows_still_takes_the_step(played):
    policy, _, batch, reference = played
    metrics, gradient, _ = run_update(policy, rows_of_turns(batch, [3]), reference)
    assert gradient.norm() == 0.0 and metrics["grad_norm"] == 0.0 == metrics["loss"]


# --- whole iterations ----------------------------------------------------------------------------
@functools.cache
def recorded(scores=SCORES, played=TURNS_PLAYED, group_size=3, **flags):
    """Two iterations of main on random episodes: its log, every update's batch, the policy before and after."""
    run = SimpleNamespace(steps=[], episodes=[], start=copy.deepcopy(POLICY))

    def collect(policy, envs, args, iteration):
        run.args = args
        run.episodes.append(random_episodes(policy, iteration, played, scores))
        return run.episodes[-1]

    def record(policy, reference, optimizer, batch, args):
        assert torch.equal(*(parameters_to_vector(x.model.parameters()) for x in (reference, POLICY)))
        assert optimizer.defaults["weight_decay"] == 0 and optimizer.defaults["betas"] == (args.adam_beta1, 0.999)
        turns, before = batch["turn_id"].unique().tolist()[1:], copy.deepcopy(policy)
        step = SimpleNamespace(batch=dict(batch), turns=turns, before=before)
        run.steps.append(step)
        step.metrics, step.after = update(policy, reference, optimizer, batch, args), copy.deepcopy(policy)
        return step.metrics

    settings = {"num_prompts": len(scores) // group_size, "group_size": group_size, "num_iterations": 2, "max_turns": 1,
                "temperature": 0.8, "learning_rate": 3e-3, "eval_episodes": 1, "print_samples": 0} | flags
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(seeupo, "collect_groups", collect)
        patch.setattr(seeupo, "update", record)
        patch.setattr(seeupo, "load_policy", lambda args: run.start)
        patch.setattr(Run, "plot", lambda *_: None)
        main(Args(run_dir=folder, **settings))
        [table] = Path(folder).glob("*/metrics.csv")
        run.logs = [*csv.DictReader(table.open())][1:]
    return run


def slow_advantages(scores, group_size=3, bound=math.inf, plain=False):
    """Eq. 1 and 2, episode by episode; the mean reward beside them. plain: without Eq. 1."""
    rewards = [-1 if s is None else s / 2 + (s == 1) for s in scores]
    rewards, advantages = [1 if s is None else s for s in scores] if plain else rewards, []
    for e, reward in enumerate(rewards):
        group = rewards[e // group_size * group_size :][:group_size]
        advantages.append(reward - np.mean(group))
    std = np.std(advantages, ddof=1)
    return [max(-bound, min(bound, a / std)) for a in advantages], np.mean(rewards)


def slow_ratios(policy, old, episodes, turn):
    """Eq. 3 of the episodes that have the turn; old: its log-probs, by episode."""
    return {e: (slow_logprobs(policy, episodes[e])[0][turn] - x).mean().exp().item() for e, x in old.items()}


ONE_WINS = {"scores": (1,) + (0,) * 11, "played": (3, 1, 2, 2, 2, 3) * 2, "group_size": 6, "released": True}
ONE_LOSES = ONE_WINS | {"scores": (0,) + (1,) * 11, "order": "natural"}


@pytest.mark.parametrize("flags", [
    {}, {"order": "natural"}, {"order": "random", "seed": 2},
    {"steps_per_turn": 2, "adam_beta1": 0.0}, {"plain_rewards": True}, {"sequential_weights": False}, ONE_WINS, ONE_LOSES], ids=str)
def test_every_step_is_trained_with_the_weights_of_a_slow_loop_and_the_log_says_so(flags):
    run, scores = recorded(**flags), flags.get("scores", SCORES)
    args, steps, released = run.args, iter(run.steps), run.args.released
    low, high, bound = (0.8, 1.2, 3) if released else (0, math.inf, math.inf)
    advantages, reward = slow_advantages(scores, args.group_size, bound, args.plain_rewards)
    assert not released or max(map(abs, advantages)) == 3
    for iteration, (episodes, log) in enumerate(zip(run.episodes, run.logs, strict=True)):
        running, used, mine = [1.0] * len(scores), np.ones((len(scores), 3)), []
        for [turn] in turn_order(3, args.order, random_stream(args.seed, DRAW, iteration)):
            those = [next(steps) for _ in range(args.steps_per_turn)]
            old = {e: slow_logprobs(those[0].before, x)[0][turn].detach() if released
                   else torch.tensor(x.turns[turn].logprobs) for e, x in enumerate(episodes) if len(x.turns) > turn}
            for step in those:
                assert step.turns == [turn] and step.batch["episode_id"].tolist() == list(old)
                mask = step.batch["turn_id"] == turn
                assert torch.allclose(step.batch["old_logprobs"][mask], torch.cat(list(old.values())), atol=1e-5)
                credit = torch.tensor([advantages[e] * running[e] for e in old])
                assert torch.allclose(step.batch["advantages"], credit[:, None].float() * mask, rtol=1e-3, atol=1e-4)
                drift = np.mean([abs(ratio - 1) for ratio in slow_ratios(step.before, old, episodes, turn).values()])
                assert drift > 0.01 if mine and not released else drift < 1e-5, "pi_k, or the policy before the turn"
                mine.append(step)
            used[list(old), turn] = [running[e] for e in old]
            for e, ratio in slow_ratios(those[-1].after, old, episodes, turn).items():
                if args.sequential_weights:
                    running[e] = min(max(running[e] * min(max(ratio, low), high), low), high)
        outside = np.mean([any(x < 0.8 or x > 1.2 for x in row) for row in used])
        assert (outside > 0) == (args.sequential_weights and not released)
        assert not released or {0.8, 1.2} & set(running), "the bounds bind"
        expected = {name: np.mean([step.metrics[name] for step in mine]) for name in mine[0].metrics} | {
            "optimizer_steps": len(mine), "task_reward": reward,
            "weights_outside": outside, "groups_without_signal": 0.5 if released else 1 / 3}
        assert {name: float(log[name]) for name in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ratio", ["turn", "token"])
def test_together_all_turns_take_one_step_with_plain_advantages(ratio):
    run = recorded(order="together", ratio=ratio, steps_per_turn=2)
    advantages, _ = slow_advantages(SCORES)
    assert [step.turns for step in run.steps] == [[0, 1, 2]] * 4
    for step in run.steps:
        expected = torch.tensor(advantages)[:, None].float() * (step.batch["turn_id"] >= 0)
        assert torch.allclose(step.batch["advantages"], expected, atol=1e-5)
    assert float(run.logs[0]["weights_outside"]) == 0


def test_with_one_turn_every_order_is_gspo():
    flags = {"played": (1,) * 6, "scores": (1, 0.4, 0, 0.7, 0.1, 0.6), "steps_per_turn": 2}
    runs = (recorded(order=order, **flags) for order in ("together", "reverse", "natural"))
    gspo, reverse, natural = (parameters_to_vector(run.steps[-1].after.model.parameters()) for run in runs)
    assert torch.equal(gspo, reverse) and torch.equal(gspo, natural)


def test_a_turn_with_nothing_to_learn_from_is_no_step():
    run = recorded((1, 0, 0, 0.7, 0.7, 0.7), (1, 1, 1, 3, 3, 3))
    assert [step.turns for step in run.steps] == [[0]] * 2
    run = recorded((0.7,) * 6, (2, 1, 2, 3, 1, 1))
    assert not run.steps and run.logs[0]["optimizer_steps"] == "0"
    assert float(run.logs[0]["groups_without_signal"]) == 1 and float(run.logs[0]["weights_outside"]) == 0


@pytest.mark.parametrize("flags,named", [
    ({"group_size": 1}, "--group-size 1"), ({"ratio": "token"}, "--order together"), ({"adam_beta1": 1.0}, "--adam-beta1")])
def test_settings_without_a_meaning_are_one_line(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(Args(run_dir=str(tmp_path), **flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0]
    assert not list(tmp_path.iterdir())
