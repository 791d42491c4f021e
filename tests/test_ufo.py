"""The mathematics of UFO (arXiv 2507.14295) against hand-worked numbers, slow loops and whole runs."""

import copy
import csv
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import policies
from algos import ufo
from algos.ms_grpo import group_relative_advantages
from algos.ufo import (
    Args, Critic, answer_table, batch_values, clipped_objective, count_answers, decayed_success, episode_scores,
    gae_advantages, group_advantages, kl_policy_ref_k3, policy_loss, repetition_penalty, retry_metrics,
    select_groups, token_rewards, update, value_loss, whiten,
)
from conftest import KeepGradient
from envs import make_env
from envs.episodes import Episode, Turn, start_episodes
from envs.retry_math import RetryMath
from run_folder import Run
from utils import collate, collect_groups, random_stream, rollout, token_logprobs

INF = math.inf
FIVE = ["1", "2", "3", "4", "5"]


def played(answers, gold="9", candidates=FIVE + ["9"]):
    """The episode in which these were the answers (None: malformed), as an environment tells it."""
    turns = [Turn("", str(a), info={"submitted": a, "success": a == gold, "in_range": a in candidates})
             for a in answers]
    return Episode(0, "", turns, info=turns[-1].info if turns else {"success": False})


def scores_of(episodes, schedule="exponential", base=0.5, coefficient=0.5, format_penalty=0.1, penalise=True):
    """Eq. 1 to 3 put together as the script does."""
    right, _, answers, distinct, malformed, _ = answer_table(episodes).T
    solved = right.isfinite()
    return episode_scores(decayed_success(solved, answers, schedule, base),
                          repetition_penalty(answers, distinct, coefficient), malformed,
                          solved | (malformed == 0), format_penalty, penalise)


# --- Eq. 1: decay --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule,worth", [
    ("exponential", [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]), ("linear", [1, 0.8, 0.6, 0.4, 0.2, 0]),
    ("constant", [1, 1, 1, 1, 1, 1])])
def test_what_a_right_answer_is_worth_by_attempt(schedule, worth):
    attempt = torch.arange(1.0, 7.0)
    got = decayed_success(torch.ones(6, dtype=torch.bool), attempt, schedule)
    assert got.tolist() == pytest.approx(worth, abs=1e-6)
    nothing = decayed_success(torch.zeros(7, dtype=torch.bool), torch.arange(7.0), schedule)
    assert nothing.tolist() == [0.0] * 7, "unsolved, also without any answer"


def test_the_decay_counts_from_zero_and_has_a_base():
    """The ablation of the paper counts from one: [.5 .25 .125 .0625 .03125]."""
    solved, attempt = torch.ones(5, dtype=torch.bool), torch.arange(1.0, 6.0)
    got = decayed_success(solved, attempt)
    assert got[0] == 1.0 and not torch.allclose(got, 0.5**attempt)
    assert decayed_success(solved, attempt, base=0.8).tolist() == pytest.approx([0.8**n for n in range(5)])
    assert decayed_success(solved[:1], torch.tensor([9.0]), "linear").item() == 0.0, "never below 0"


# --- Eq. 2, 3: answers and scores ----------------------------------------------------------------
SCORES = {  # answers: R, R if unfinished episodes are not penalised, right on turn, N, D
    "a": (["4"] * 5, -0.4, -0.4, INF, 5, 1), "b": (FIVE, 0, 0, INF, 5, 5),
    "c": ([" 2", "2 ", "9"], 0.083333, 0.083333, 3, 3, 2), "d": (["9"], 1, 1, 1, 1, 1),
    "e": ([*FIVE[:4], "9"], 0.0625, 0.0625, 5, 5, 5), "f": ([None, "9"], 0.9, 0.9, 2, 1, 1),
    "g": ([None, *["4"] * 4], -0.475, -0.1, INF, 4, 1),
    "h": (["A", "b", "a", "B ", "9"], -0.1375, -0.1375, 5, 5, 3),
    "i": ([None] * 5, -0.5, -0.5, INF, 0, 0), "j": (["4", None, "4", "4", "4"], -0.475, -0.1, INF, 4, 1),
    "k": ([None, None, "9"], 0.8, 0.8, 3, 1, 1)}


def test_scores_by_hand():
    episodes = [played(answers) for answers, *_ in SCORES.values()]
    _, score, unpenalised, right, valid, distinct = zip(*SCORES.values(), strict=True)
    assert scores_of(episodes).tolist() == pytest.approx(score, abs=1e-6)
    assert scores_of(episodes, penalise=False).tolist() == pytest.approx(unpenalised, abs=1e-6)
    table = answer_table(episodes).T.tolist()
    assert table[0] == list(right) and table[2] == list(valid) and table[3] == list(distinct)
    assert table[1] == [len(e.turns) for e in episodes]
    assert table[4] == [sum(t.info["submitted"] is None for t in e.turns) for e in episodes]
    assert table[5] == [sum(t.info["in_range"] for t in e.turns) for e in episodes]


def test_five_different_answers_cost_nothing():
    """A figure of the paper prints the coefficient times (1 - D) / N, which would be 0.4 here."""
    assert scores_of([played(FIVE)]).item() == 0.0
    assert repetition_penalty(torch.tensor([5.0, 4.0, 0.0, 1.0]), torch.tensor([5.0, 1.0, 0.0, 1.0]), 0.2).tolist() \
        == pytest.approx([0.0, 0.15, 0.0, 0.0])


def test_answers_that_differ_in_case_and_blanks_are_one():
    got = count_answers([["Two  Words", "twowords", " two\nwords "], [None, "x", "X", None, "y"], [None], []])
    assert [x.tolist() for x in got] == [[3, 3, 0, 0], [1, 2, 0, 0], [0, 2, 1, 0]]
    assert all(x.dtype == torch.float for x in got)


def test_each_part_of_the_score_can_be_switched_off():
    episodes = [played(answers) for answers, *_ in SCORES.values()]
    success = torch.tensor([float(e.success) for e in episodes])
    malformed = torch.tensor([float(sum(t.info["submitted"] is None for t in e.turns)) for e in episodes])
    plain = scores_of(episodes, "constant", coefficient=0.0)
    assert torch.allclose(plain, success - 0.1 * malformed)
    assert torch.equal(scores_of(episodes, "constant", coefficient=0.0, format_penalty=0.0), success)


def test_what_was_wrong_and_in_which_order_does_not_matter():
    rng = np.random.default_rng(0)
    for _ in range(200):
        wrong = [None if x == 7 else str(x) for x in rng.integers(8, size=rng.integers(1, 6))]
        answers = wrong[:4] + ["9"] if rng.random() < 0.5 else wrong
        renamed = [a if a in (None, "9") else f"answer {a}" for a in answers]
        last = answers[-1:] if answers[-1] == "9" else []
        order = [*rng.permutation(np.array(answers[:len(answers) - len(last)], dtype=object)), *last]
        one, two, three = scores_of([played(answers), played(renamed), played(order)]).tolist()
        assert one == two == three
        if None not in answers:
            assert -0.5 * (1 - 1 / len(answers)) - 1e-6 <= one <= 1


def test_an_episode_without_a_turn_is_a_failure_that_costs_nothing():
    assert answer_table([played([])]).tolist() == [[INF, 0, 0, 0, 0, 0]]
    assert scores_of([played([])]).item() == 0.0


def test_an_environment_need_not_know_what_is_in_range():
    episode = played(["4", "9"])
    for turn in episode.turns:
        del turn.info["in_range"]
    assert answer_table([episode]).tolist() == [[2, 2, 2, 2, 0, 0]]


# --- what is logged ------------------------------------------------------------------------------


def test_success_within_k_turns_by_hand():
    """Right on turn 1, 3, never, 2, 5."""
    table = torch.zeros(5, 6)
    table[:, 0], table[:, 1] = torch.tensor([1, 3, INF, 2, 5]), torch.tensor([1.0, 3, 5, 2, 5])
    got = retry_metrics(table, 5)
    within = [got[f"success_at_{k}"] for k in range(1, 6)]
    assert within == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.8], abs=1e-6)
    assert got["average_turns"] == pytest.approx(3.2)
    conditional = [got[f"conditional_success_{k}"] for k in range(2, 6)]
    assert conditional == pytest.approx([0.25, 0.333333, 0, 0.5], abs=1e-6)
    for k in range(1, 6):
        assert 1 - 0.8 * np.prod([1 - c for c in conditional[:k - 1]]) == pytest.approx(within[k - 1])


def test_the_answers_of_seven_episodes_by_hand():
    episodes = [played(answers) for answers in (
        ["4"] * 5, FIVE, ["2", "2", "9"], ["9"], ["a", "b", "a", "b", "9"], [None, *["4"] * 4], [None] * 5)]
    got = retry_metrics(answer_table(episodes), 5)
    expected = {f"success_at_{k + 1}": x / 7 for k, x in enumerate([1, 1, 2, 2, 3])} | {
        "average_turns": 29 / 7, "distinct_ratio": 0.543333, "identical_failure": 2 / 3,
        "malformed_rate": 6 / 29, "in_range": 19 / 23}
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(got) - set(expected) == {f"conditional_success_{k}" for k in range(2, 6)}


def test_metrics_of_episodes_that_are_all_alike_are_finite():
    for answers in (["9"], [None], ["4"], []):
        got = retry_metrics(answer_table([played(answers)] * 3), 2)
        assert all(map(math.isfinite, got.values())) and "success_at_3" not in got
    assert retry_metrics(answer_table([played(["9"])]), 5)["average_turns"] == 1
    assert retry_metrics(answer_table([played(["4"])]), 5)["average_turns"] == 5, "cut short: a failure"


# --- Eq. 4: advantages of a group ----------------------------------------------------------------


def close(got, expected):
    """Compare (E, K) with ragged lists, 0 after the end."""
    for row, values in zip(got.tolist(), expected, strict=True):
        assert row == pytest.approx(values + [0.0] * (len(row) - len(values)), abs=5e-6), got


def relative(scores, turns, baseline="episode", group=None, max_turns=5):
    group = [0] * len(scores) if group is None else group
    return group_advantages(torch.tensor(scores), torch.tensor(group), torch.tensor(turns), max_turns, baseline)


R, TURNS = [1, 0.083333333, -0.4, 0], [1, 3, 5, 5]
EPISODE = [[1.401406], [-0.147887] * 3, [-0.964787] * 5, [-0.288732] * 5]
TURN = [[1.868541], [-0.197183, 0.478872, 0.478872], [-1.286383, -0.746478, -0.746478, -0.676055, -0.676055],
        [-0.384976, 0.267605, 0.267605, 0.676055, 0.676055]]


def test_both_baselines_by_hand():
    """The std is the unbiased one; the other would give 1.618204 for the first."""
    close(relative(R, TURNS), EPISODE)
    close(relative(R, TURNS, "turn"), TURN)


def test_both_baselines_by_hand_with_two_groups_interleaved():
    scores = [x for pair in zip(R, [1, 1, 1, 0.9], strict=True) for x in pair]
    turns = [x for pair in zip(TURNS, [1, 1, 1, 2], strict=True) for x in pair]
    for baseline, first, second in (("episode", EPISODE, [[0.49999], [0.49999], [0.49999], [-1.49997] * 2]),
                                    ("turn", TURN, [[0.666653], [0.666653], [0.666653], [-1.99996, 0.0]])):
        got = relative(scores, turns, baseline, [3, 1] * 4)
        close(got[::2], first)
        close(got[1::2], second)  # its last turn has no peer


def test_with_one_turn_the_episode_baseline_is_grpo():
    scores = [1.0, 0.0, 0.0, -0.1]
    got = relative(scores, [1] * 4, max_turns=1)
    close(got, [[1.493792], [-0.433682], [-0.433682], [-0.626429]])
    close(relative(scores, [1] * 4, "turn", max_turns=1), [[1.991723], [-0.578242], [-0.578242], [-0.835239]])
    scores, group = torch.randn(12), torch.arange(12) % 3
    got = group_advantages(scores, group, torch.ones(12), 1)
    assert torch.allclose(got[:, 0], group_relative_advantages(scores, group))


def test_a_group_without_spread_gives_nothing_in_either_baseline():
    for baseline in ("episode", "turn"):
        scores = [0.3, 0.3 + 3e-8, 0.3, 7.0]  # sums of floats differ in the last digit
        assert not relative(scores, [1, 3, 2, 2], baseline, [0, 0, 0, 1]).any()


@pytest.mark.parametrize("baseline", ["episode", "turn"])
def test_group_advantages_against_a_loop(baseline):
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, turns, group = rng.normal(size=12), rng.integers(0, 5, size=12), rng.integers(3, size=12)
        expected = []
        for i in range(12):
            members = [j for j in range(12) if group[j] == group[i]]
            row = [0.0] * turns[i]
            for k in range(turns[i]):
                peers = [j for j in members if j != i and turns[j] > k]
                pool = members if baseline == "episode" else peers
                if pool and len(members) > 1:
                    row[k] = (scores[i] - np.mean(scores[pool])) / (np.std(scores[members], ddof=1) + 1e-6)
            expected.append(row)
        args = torch.tensor(scores).float(), torch.tensor(group), torch.tensor(turns)
        close(group_advantages(*args, 5, baseline), expected)
        shifted = args[0] + torch.tensor([5.0, -2.0, 0.5])[args[1]]
        assert torch.allclose(group_advantages(shifted, *args[1:], 5, baseline),
                              group_advantages(*args, 5, baseline), atol=1e-4), "a constant per group"
        order = torch.randperm(12)
        assert torch.allclose(group_advantages(*(x[order] for x in args), 5, baseline),
                              group_advantages(*args, 5, baseline)[order], atol=1e-6), "the order"


def test_the_expected_gradient_by_enumeration():
    """Right with .3 at once (R 1), else with .4 on the retry (R .5), else R -.25; groups of three.

    Without the division by the std the episode baseline has (G - 1) / G of the true gradient on
    every turn, the turn baseline all of it times the probability that a peer has that turn.
    """
    p, q = 0.3, 0.4
    outcomes = [  # probability, R, turns, d log-prob / d logit of either turn
        (p, 1.0, 1, (1 - p, 0.0)), ((1 - p) * q, 0.5, 2, (-p, 1 - q)), ((1 - p) * (1 - q), -0.25, 2, (-p, -q))]
    true = np.sum([pr * score * np.array(grad) for pr, score, _, grad in outcomes], axis=0)
    assert true == pytest.approx([0.1995, 0.126])
    expected = {"episode": np.zeros(2), "turn": np.zeros(2)}
    for group in itertools.product(outcomes, repeat=3):
        chance = np.prod([pr for pr, *_ in group])
        scores, turns = [score for _, score, *_ in group], [n for *_, n, _ in group]
        for baseline, gradient in expected.items():
            unscaled = relative(scores, turns, baseline, max_turns=2).double().numpy() * (np.std(scores, ddof=1) + 1e-6)
            gradient += chance / 3 * sum(row * np.array(grad) for row, (*_, grad) in zip(unscaled, group, strict=True))
    assert expected["episode"] == pytest.approx(true * 2 / 3, abs=1e-6)
    assert expected["turn"] == pytest.approx(true * [1, 1 - p**2], abs=1e-6)
    assert expected["turn"] == pytest.approx([0.1995, 0.11466], abs=1e-6)


def test_the_groups_of_largest_spread_are_kept():
    groups = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0.5, 0, 0, 0], [1, -0.4, 0.25, 0],
              [0.25, 0.25, 0.5, 0.5], [0, 0, 0, -0.1], [1, 1, 1, 0]]
    spread = torch.tensor(groups).std(dim=1)
    assert spread.tolist() == pytest.approx([0, 0.57735, 0, 0.25, 0.589315, 0.144338, 0.05, 0.5], abs=1e-6)
    scores, group = torch.tensor(groups).flatten().float(), torch.arange(8).repeat_interleave(4)
    for share, expected in ((0.25, {1, 4}), (0.1, {4}), (0.0, {4}), (0.49, {1, 4, 7}), (0.875, {0, 1, 3, 4, 5, 6, 7}),
                            (1.0, set(range(8))), (3.0, set(range(8)))):
        order = torch.randperm(32)
        kept = select_groups(scores[order], group[order], share)
        assert set(group[order][kept].tolist()) == expected and kept.sum() == 4 * len(expected), share
    assert select_groups(torch.tensor([3.0, 1, 1, 3]), torch.tensor([7, 2, 7, 2]), 0.5).tolist() == [0, 1, 0, 1], "a tie"
    pair, four = [0.0, 0.9], [0.0, 0, 1, 1]  # the biased std would prefer the four
    kept = select_groups(torch.tensor(four + pair), torch.tensor([0] * 4 + [1] * 2), 0.5)
    assert kept.tolist() == [False] * 4 + [True] * 2


# --- Eq. 5, 6: advantages of a critic ------------------------------------------------------------
MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
VALUES = torch.tensor([[0.2, 0.4, 0, 0.5], [0.1, 0, 0.3, 0.2]])
OLD = torch.tensor([[-1.0, -2, -9, -1], [-0.5, -9, -1, -2]])
REF = torch.tensor([[-1.5, -1, -9, -1], [-0.5, -9, -3, -2]])
REWARDS = [[-0.05, 0.1, 0, 0.5], [0, 0, -0.2, -0.4]]


def rewards_of(beta=0.1):
    return token_rewards(torch.tensor([0.5, -0.4]), torch.where(MASK, 3, -1), OLD, REF, beta)


def test_generalised_advantages_by_hand():
    rewards = rewards_of()
    assert torch.allclose(rewards, torch.tensor(REWARDS), atol=1e-6)
    assert rewards.sum(1).tolist() == pytest.approx([0.55, -0.6]), "what enters Eq. 4"
    advantages, returns = gae_advantages(rewards, VALUES, MASK)
    assert torch.allclose(advantages, torch.tensor([[0.35, 0.2, 0, 0], [-0.7, 0, -0.9, -0.6]]), atol=1e-6)
    assert torch.allclose(returns, torch.tensor([[0.55, 0.6, 0, 0.5], [-0.6, 0, -0.6, -0.4]]), atol=1e-6)
    sampled = advantages[MASK]
    assert sampled.mean().item() == pytest.approx(-0.275) and sampled.var().item() == pytest.approx(0.27375)
    assert whiten(sampled).tolist() == pytest.approx(
        [1.194546, 0.907855, 0.525600, -0.812291, -1.194546, -0.621164], abs=1e-5)


def test_discounting_steps_over_what_was_not_sampled():
    """Stepping over every column, V zeroed there, gives .12728 for the first token."""
    advantages, returns = gae_advantages(rewards_of(), VALUES, MASK, 0.9, 0.8)
    expected = torch.tensor([[0.218, 0.15, 0, 0], [-0.37144, 0, -0.752, -0.6]])
    assert torch.allclose(advantages, expected, atol=1e-6)
    assert torch.allclose(returns, torch.where(MASK, expected + VALUES, 0.0), atol=1e-6)


def test_generalised_advantages_against_a_loop():
    rng = np.random.default_rng(2)
    for discount, lam in ((1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.7, 1.0)):
        rewards, values, mask = rng.normal(size=(6, 11)), rng.normal(size=(6, 11)), rng.random((6, 11)) < 0.6
        mask[0], mask[1] = False, True
        expected = np.zeros((6, 11))
        for row in range(6):
            [sampled] = np.nonzero(mask[row])  # the row without its other tokens
            following, later = 0.0, 0.0
            for t in reversed(sampled):
                later = rewards[row, t] + discount * following - values[row, t] + discount * lam * later
                expected[row, t], following = later, values[row, t]
        args = [torch.tensor(x) for x in (rewards, values, mask)]
        advantages, returns = gae_advantages(*args, discount, lam)
        assert np.allclose(advantages, expected)
        assert np.allclose(returns, np.where(mask, expected + values, 0.0))
        wide = [torch.nn.functional.pad(x, (2, 5), value=fill) for x, fill in zip(args, (9.0, 9.0, False), strict=True)]
        assert torch.equal(gae_advantages(*wide, discount, lam)[0][:, 2:-5], advantages), "padding"
        order = torch.randperm(6)
        assert torch.equal(gae_advantages(*(x[order] for x in args), discount, lam)[1], returns[order])


def test_without_values_and_kl_every_sampled_token_has_the_score_as_its_advantage():
    advantages, returns = gae_advantages(rewards_of(0.0), torch.zeros(2, 4), MASK)
    expected = torch.where(MASK, torch.tensor([[0.5], [-0.4]]), 0.0)
    assert torch.equal(advantages, expected) and torch.equal(returns, expected)


def test_the_score_stands_on_the_last_sampled_token_of_any_row():
    turn_id = torch.tensor([[-1, 0, 0, -1, 1], [0, -1, -1, 1, -1], [0, -1, -1, -1, -1], [-1] * 5])
    scores, zeros = torch.tensor([1.0, 2.0, -3.0, 4.0]), torch.zeros(4, 5)
    got = token_rewards(scores, turn_id, zeros, zeros, 0.1)
    assert got.tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 2, 0], [-3, 0, 0, 0, 0], [0] * 5]
    wide = torch.nn.functional.pad(turn_id, (0, 3), value=-1)
    other = torch.where(wide >= 0, 0.0, torch.randn(4, 8))
    assert torch.equal(token_rewards(scores, wide, other, 0 * other, 0.1)[:, :5], got)
    assert not token_rewards(scores, wide, other, 0 * other, 0.1)[:, 5:].any(), "log-probs of no sampled token"


def test_whitened_advantages_have_mean_zero_and_variance_one():
    white = whiten(torch.randn(50) * 3 + 7)
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.var().item() == pytest.approx(1)
    assert whiten(torch.tensor([5.0])).tolist() == [0.0] and whiten(torch.full((3,), 0.3)).tolist() == [0.0] * 3
    assert not whiten(torch.zeros(0)).numel()


# --- Eq. 7, 8: losses ----------------------------------------------------------------------------


def loss_of(log_ratio, advantages, weights, entropy=0.0, ref=None, clip=(0.2, 0.28), c=0.0, beta=0.0):
    """Rows of numbers -> the loss, its parts and what the log-ratio needs for a gradient."""
    log_ratio = torch.as_tensor(log_ratio).clone().requires_grad_()
    old = torch.full_like(log_ratio, -1.5)
    batch = {"old_logprobs": old, "ref_logprobs": old if ref is None else old + ref,
             "advantages": torch.as_tensor(advantages), "weights": torch.as_tensor(weights)}
    loss, parts = policy_loss(batch, old + log_ratio, torch.full_like(old, entropy), *clip, None, c, beta)
    return loss, parts, log_ratio


def test_the_clipped_loss_by_hand():
    ratio, advantages = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]]), torch.tensor([[1.0, -1, 1, -1, 2]])
    terms = clipped_objective(ratio.log(), advantages, 0.2, 0.28)
    assert terms[0, :4].tolist() == pytest.approx([1.28, -1.5, 0.5, -0.8])
    loss, parts, _ = loss_of(ratio.log(), advantages, [[0.25] * 4 + [0.0]])
    assert loss.item() == pytest.approx(0.13, abs=1e-6) and parts["loss"].item() == pytest.approx(0.13, abs=1e-6)
    assert parts["clip_fraction"].item() == 0.5 and parts["entropy"].item() == 0
    expected = np.mean([r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5)])
    assert parts["approx_kl"].item() == pytest.approx(expected, abs=1e-6)


def test_clipping_stops_the_gradient_where_the_step_went_too_far():
    for advantage, slopes in ((1.0, {0.5: -1, 1.0: -1, 1.25: -1, 1.5: 0}), (-1.0, {0.5: 0, 1.0: 1, 1.25: 1, 1.5: 1})):
        for ratio, slope in slopes.items():
            loss, _, log_ratio = loss_of([[math.log(ratio)]], [[advantage]], [[1.0]])
            loss.backward()
            assert log_ratio.grad.item() / ratio == pytest.approx(slope, abs=1e-6), (advantage, ratio)


def test_entropy_and_distance_to_the_start_enter_with_their_own_weights():
    loss, parts, _ = loss_of([[0.0, 0.0]], [[0.0, 0.0]], [[0.5, 0.5]], entropy=2.0, ref=0.3, c=0.1, beta=0.7)
    kl = math.exp(0.3) - 0.3 - 1
    assert kl_policy_ref_k3(torch.tensor([-1.0]), torch.tensor([-0.7])).item() == pytest.approx(kl, abs=1e-6)
    assert loss.item() == pytest.approx(-0.1 * 2.0 + 0.7 * kl, abs=1e-6)
    assert parts["entropy"].item() == pytest.approx(2.0) and parts["kl_policy_ref_k3"].item() == pytest.approx(kl, abs=1e-6)


def test_every_token_counts_the_same_not_every_episode():
    """Episodes of one and three tokens, advantages 1 and -1: the mean over episodes would be 0."""
    advantages, mask = torch.tensor([[1.0, 0, 0], [-1, -1, -1]]), torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    assert loss_of(torch.zeros(2, 3), advantages, mask / 4)[0].item() == pytest.approx(0.5)


def test_the_loss_of_the_critic_by_hand():
    values = torch.tensor([[0.2, 0.9, 5.0]], requires_grad=True)
    old, returns = torch.tensor([[0.1, 0.1, 0.0]]), torch.tensor([[1.0, 0.0, 9.0]])
    loss = value_loss(values, old, returns, torch.tensor([[0.5, 0.5, 0.0]]))
    assert loss.item() == pytest.approx(0.3625, abs=1e-6)
    loss.backward()
    assert values.grad[0].tolist() == pytest.approx([-0.4, 0.45, 0.0], abs=1e-6)


def test_the_critic_gains_nothing_by_moving_further_than_the_clip():
    """From .1 towards a return of 3: beyond .6 the clipped error is the larger one, and constant."""
    for value, error, slope in ((0.5, 2.5, -2.5), (1.0, 2.4, 0.0), (2.5, 2.4, 0.0), (-0.9, 3.9, -3.9)):
        values = torch.tensor([[value]], requires_grad=True)
        loss = value_loss(values, torch.tensor([[0.1]]), torch.tensor([[3.0]]), torch.ones(1, 1))
        loss.backward()
        assert loss.item() == pytest.approx(error**2 / 2, abs=1e-5), value
        assert values.grad.item() == pytest.approx(slope, abs=1e-5), value
    assert value_loss(values, values, values + 2, torch.ones(1, 1), value_clip=0.1).item() == pytest.approx(2.0)


# --- rows, critic, update ------------------------------------------------------------------------


def demonstrated(policy, envs, args, iteration, malformed=0.15):
    """In place of collect_groups: what a weak scripted player answers, with the policy's log-probs."""
    rng = np.random.default_rng([args.seed, iteration])
    seeds = rng.integers(2**30, size=args.num_prompts).repeat(args.group_size)
    episodes = start_episodes(envs, seeds.tolist())
    for env, episode in zip(envs, episodes, strict=True):
        while not episode.done:
            action = env.unwrapped.demonstrate(rng, malformed, first_right=0.3, repeat=0.4)
            ids = [*policy.encode(action), policy.end_id]
            episode.answer(env, Turn(episode.observation, action, *policy.prompt(episode, None),
                                     token_ids=ids, logprobs=[0.0] * len(ids)))
    batch = collate(episodes, policy.device)
    with torch.no_grad():
        logprobs = iter(token_logprobs(policy, batch, args.temperature)[0][batch["turn_id"] >= 0].tolist())
    for turn in (turn for e in episodes for turn in e.turns):
        turn.logprobs = [next(logprobs) for _ in turn.token_ids]
    return episodes


@pytest.fixture
def rows(tiny_policy):
    """A policy, eight episodes and their batch."""
    args = Args(num_prompts=2, group_size=4)
    episodes = demonstrated(tiny_policy, [make_env(args.env_id) for _ in range(8)], args, 0)
    return tiny_policy, episodes, collate(episodes, tiny_policy.device)


def awake(policy):
    """A critic whose last layer is no longer zero."""
    critic = Critic(policy)
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.head.weight)
    return critic


def test_the_critic_starts_at_zero_and_is_not_the_policy(rows):
    policy, _, batch = rows
    assert not Critic(policy)(batch).any()
    mine = {id(p) for p in Critic(policy).parameters()}
    assert not mine & {id(p) for p in policy.model.parameters()}


def test_a_value_knows_what_stands_before_its_token_and_nothing_else(rows):
    policy, _, batch = rows
    critic = awake(policy)
    values, row = critic(batch), int(batch["lengths"].argmax())
    sampled = (batch["turn_id"][row] >= 0).nonzero()[:, 0].tolist()
    assert len(sampled) > 4 and (values[row, sampled] != 0).all()
    for u in (sampled[0], sampled[3], sampled[-1]):
        changed = dict(batch, tokens=batch["tokens"].clone())
        changed["tokens"][row, u:] = (batch["tokens"][row, u:] + 1) % 50
        assert torch.allclose(critic(changed)[row, :u + 1], values[row, :u + 1], atol=1e-5), "u or later"
        changed["tokens"] = batch["tokens"].clone()
        observed = max(t for t in range(u) if batch["turn_id"][row, t] < 0)
        changed["tokens"][row, observed] = (batch["tokens"][row, observed] + 1) % 50
        assert abs(critic(changed)[row, u] - values[row, u]) > 1e-3, "the observation before it"
    first = values[row, sampled[0]]
    hidden = critic.trunk(batch["tokens"][row:row + 1, :sampled[0]]).last_hidden_state[0, -1]
    assert first.item() == pytest.approx(critic.head(hidden).item(), abs=1e-5)


def test_values_are_zero_where_nothing_was_sampled_and_padding_does_not_matter(rows):
    policy, _, batch = rows
    critic = awake(policy)
    values = critic(batch)
    assert not values[batch["turn_id"] < 0].any()
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": 0.0}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x for k, x in batch.items()}
    assert torch.allclose(critic(padded)[:, :-6], values, atol=1e-5)
    for tokens in (1, 120, 10**6):
        got = batch_values(critic, batch, Args(micro_batch_tokens=tokens))
        assert torch.allclose(got, values, atol=1e-5) and not got.requires_grad


def test_the_loss_of_the_critic_reaches_all_of_it(rows):
    policy, _, batch = rows
    critic, mask = awake(policy), batch["turn_id"] >= 0
    value_loss(critic(batch), torch.zeros(mask.shape), torch.ones(mask.shape), mask / mask.sum()).backward()
    for name, p in critic.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in policy.model.parameters())


def test_an_observation_is_not_trained_but_read(rows):
    """With the loss mask as attention mask the ratio would still start at 1."""
    policy, _, batch = rows
    row = int(batch["lengths"].argmax())
    second = int((batch["turn_id"][row] == 1).nonzero()[0])
    assert batch["turn_id"][row, second - 2] == -1
    changed = dict(batch, tokens=batch["tokens"].clone())
    changed["tokens"][row, second - 2] = 40
    before, after = (token_logprobs(policy, x, 1.0)[0] for x in (batch, changed))
    assert abs(after[row, second] - before[row, second]) > 1e-4
    assert not before[batch["turn_id"] < 0].any()


def gradients(policy, critic, batch, args, reference=None):
    """The metrics of one update, and the gradients of policy and critic."""
    keeper, other = KeepGradient(policy), None
    if critic is not None:
        other = KeepGradient(SimpleNamespace(model=critic))
    metrics = update(policy, reference, critic, keeper, other, dict(batch), dataclasses.replace(args, max_grad_norm=1e9))
    return metrics, keeper.gradient, None if critic is None else other.gradient


@pytest.fixture
def batch(rows):
    policy, _, batch = rows
    mask, shape = batch["turn_id"] >= 0, batch["tokens"].shape
    generator = torch.Generator().manual_seed(3)
    for name in ("advantages", "values", "returns"):
        batch[name] = torch.where(mask, torch.randn(shape, generator=generator), 0.0)
    batch["old_logprobs"] = batch["old_logprobs"] + torch.where(mask, torch.randn(shape, generator=generator) * 0.4, 0.0)
    return batch


def test_an_update_is_what_a_loop_over_tokens_gives(rows, batch):
    """Clipping binds, the policy is not the reference, the temperature is not 1."""
    policy, critic = rows[0], awake(rows[0])
    args = Args(temperature=1.3, clip_low=0.1, clip_high=0.3, entropy_coefficient=0.05, kl_coefficient=0.4)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for p in reference.model.parameters():
            p += 0.02 * torch.randn_like(p)
    metrics, gradient, critic_gradient = gradients(policy, critic, batch, args, reference)
    logprobs, entropy = token_logprobs(policy, batch, 1.3)
    ref, values = token_logprobs(reference, batch, 1.3)[0].detach(), critic(batch)
    objective, error, clipped, terms = 0.0, 0.0, 0, (batch["turn_id"] >= 0).nonzero().tolist()
    for b, t in terms:
        ratio, advantage = (logprobs[b, t] - batch["old_logprobs"][b, t]).exp(), batch["advantages"][b, t]
        d = ref[b, t] - logprobs[b, t]
        objective = objective + (torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
                                 + 0.05 * entropy[b, t] - 0.4 * (d.exp() - d - 1)) / len(terms)
        clipped += bool((advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.9))
        old, goal = batch["values"][b, t], batch["returns"][b, t]
        near = values[b, t].clamp(old - 0.5, old + 0.5)
        error = error + torch.maximum((values[b, t] - goal) ** 2, (near - goal) ** 2) / len(terms) / 2
    (-objective).backward()
    error.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    expected = torch.cat([p.grad.flatten() for p in critic.parameters()])
    assert torch.allclose(critic_gradient, expected, rtol=1e-3, atol=1e-5)
    assert metrics["loss"] == pytest.approx(-objective.item(), rel=1e-4)
    assert metrics["value_loss"] == pytest.approx(error.item(), rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(clipped / len(terms)) and 0 < clipped < len(terms)
    assert metrics["kl_policy_ref_k3"] > 0


def test_the_layout_of_a_batch_does_not_matter(rows, batch):
    """Micro-batches, padding, the order of rows, what stands on tokens that were not sampled."""
    policy, critic, args = rows[0], awake(rows[0]), Args(kl_coefficient=0.1)
    base = gradients(policy, critic, batch, args)

    def same(other):
        assert base[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
        assert all(torch.allclose(one, two, rtol=1e-3, atol=2e-6) for one, two in zip(base[1:], other[1:], strict=True))
    same(gradients(policy, critic, batch, dataclasses.replace(args, micro_batch_tokens=1)))
    order = torch.randperm(8)
    same(gradients(policy, critic, {k: x[order] for k, x in batch.items()}, args))
    fill = {"turn_id": -1, "tokens": 7}
    same(gradients(policy, critic, {
        k: torch.nn.functional.pad(x, (0, 6), value=fill.get(k, 5.0)) if x.dim() > 1 else x
        for k, x in batch.items()} | {"lengths": batch["lengths"] + 6}, args))
    outside = batch["turn_id"] < 0
    changed = {k: torch.where(outside, 9.0, batch[k]) for k in ("old_logprobs", "advantages", "values", "returns")}
    same(gradients(policy, critic, batch | changed, args))


def test_a_policy_alone_is_updated_as_with_a_critic(rows, batch):
    policy = rows[0]
    alone, both = gradients(policy, None, batch, Args()), gradients(policy, awake(policy), batch, Args())
    assert torch.equal(alone[1], both[1]) and alone[0]["value_loss"] == 0 < both[0]["value_loss"]
    assert alone[0]["kl_policy_ref_k3"] == 0 and alone[0]["grad_norm"] == both[0]["grad_norm"]


def test_a_process_without_rows_still_takes_the_step(tiny_policy):
    empty = collate([], torch.device("cpu")) | {k: torch.zeros(0, 1) for k in ("advantages", "values", "returns")}
    metrics, gradient, critic_gradient = gradients(tiny_policy, Critic(tiny_policy), empty, Args())
    assert gradient.norm() == critic_gradient.norm() == metrics["grad_norm"] == metrics["value_loss"] == 0


def rebuilt(policy, episode):
    """The tokens of a conversation that ends with the last answer."""
    ids = list(policy.head)
    for k, turn in enumerate(episode.turns):
        ids += (policy.close(episode.turns[k - 1]) if k else []) + policy.encode(turn.observation) + policy.tail
        ids += turn.token_ids
    return ids


@pytest.mark.parametrize("max_answers", [1, 3])
def test_what_follows_the_last_answer_is_in_no_row(tiny_policy, max_answers):
    """Sampled after a forced answer, so that some are right; an answer may also end in forced tokens."""
    envs = [make_env("turnrl/RetryMath-v0", max_answers=max_answers) for _ in range(6)]
    episodes = start_episodes(envs, [5] * 6)
    gold = {id(e): env.unwrapped.answer for e, env in zip(episodes, envs, strict=True)}
    plan = {id(e): n for n, e in enumerate(episodes)}

    def force(episode, used, ids):
        right = plan[id(episode)] == len(episode.turns)
        return [] if ids else tiny_policy.encode(f"<answer>{gold[id(episode)] + (not right)}</answer>")
    rollout(tiny_policy, envs, episodes, [random_stream(i) for i in range(6)], max_turns=9, max_turn_tokens=22,
            temperature=1.0, force=force)
    assert [e.success for e in episodes] == [n < max_answers for n in range(6)]
    assert all(e.terminated and not e.truncated for e in episodes)
    batch = collate(episodes, tiny_policy.device)
    for number, episode in enumerate(episodes):
        assert episode.observation == ("Correct." if episode.success else "Incorrect. Please think again.")
        ids = batch["tokens"][number, :batch["lengths"][number]].tolist()
        assert ids == episode.row() == rebuilt(tiny_policy, episode)
        for k, turn in enumerate(episode.turns):
            mine = batch["tokens"][number][batch["turn_id"][number] == k].tolist()
            assert mine == [t for i, t in enumerate(turn.token_ids) if i not in turn.forced]


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 3, "warm_start_steps": 5, "num_iterations": 2, "eval_episodes": 4,
         "max_turn_tokens": 3, "print_samples": 0}


class Mute(RetryMath):
    """Tells success, not what was submitted."""

    def info(self, submitted):
        info = super().info(submitted)
        del info["submitted"]
        return info


gym.register("tests/Mute-v0", entry_point=Mute)


@pytest.fixture
def spy(monkeypatch):
    """What a run did: per iteration its environments, episodes and the rows of every update."""
    seen = SimpleNamespace(iterations=[], evaluations=[], policy=None, start=None, play=demonstrated)
    real_update, real_load, real_evaluate = ufo.update, ufo.load_policy, ufo.evaluate

    def collect(policy, envs, args, iteration):
        episodes = seen.play(policy, envs, args, iteration)
        seen.iterations.append(SimpleNamespace(envs=envs, episodes=copy.deepcopy(episodes), updates=[]))
        return episodes

    def updating(policy, reference, critic, optimizer, critic_optimizer, batch, args):
        record = {k: x.clone() for k, x in batch.items()} | {"live": critic and critic(batch).detach()}
        seen.iterations[-1].updates.append(record)
        return real_update(policy, reference, critic, optimizer, critic_optimizer, batch, args)

    def load(args):
        seen.policy = real_load(args)
        seen.start = copy.deepcopy(seen.policy)
        return seen.policy

    def evaluating(policy, envs, args):
        metrics, episodes = real_evaluate(policy, envs, args)
        seen.evaluations.append(SimpleNamespace(envs=envs, args=args, episodes=episodes))
        return metrics, episodes
    for name, call in (("collect_groups", collect), ("update", updating), ("load_policy", load), ("evaluate", evaluating)):
        monkeypatch.setattr(ufo, name, call)
    monkeypatch.setattr(policies, "NUM_DEMONSTRATIONS", 128)  # a quicker warm start
    monkeypatch.setattr(policies, "WARM_START_ROWS", 16)
    monkeypatch.setattr(Run, "plot", lambda *_: None)
    return seen


def run(tmp_path, **flags):
    """A run and the rows of its metrics.csv."""
    summary = ufo.main(Args(**(QUICK | {"run_dir": str(tmp_path)} | flags)))
    folder = max(Path(tmp_path).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with open(folder / "metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return summary, rows


def score_parts(episode, args):
    """Decay, repetition and format part of one episode, in plain Python."""
    answers = [turn.info["submitted"] for turn in episode.turns]
    valid, malformed = [a for a in answers if a is not None], answers.count(None)
    wrong = len(valid) - 1
    decay = {"exponential": args.decay_base**wrong, "linear": max(0, 1 - 0.2 * wrong), "constant": 1}[args.decay]
    repeat = args.repetition_penalty * (1 - len(set(valid)) / len(valid)) if valid else 0.0
    charged = args.penalise_unfinished or episode.success or not malformed
    return decay * episode.success, repeat, charged * repeat, args.format_penalty * malformed


def scores(episodes, args):
    return [decay - charged - form for decay, _, charged, form in (score_parts(e, args) for e in episodes)]


def expected_kept(episodes, args):
    """The positions of the episodes of the groups that are trained on."""
    all_scores, size = scores(episodes, args), args.group_size
    groups = [all_scores[i:i + size] for i in range(0, len(all_scores), size)]
    order = sorted(range(len(groups)), key=lambda g: -round(float(np.std(groups[g], ddof=1)), 6))
    chosen = order[:max(1, int(args.keep_groups * len(groups)))]
    return {i for i in range(len(episodes)) if i // size in chosen}


def kl_of_tokens(seen, iteration, args):
    """log pi_old - log pi_start of the sampled tokens of every episode."""
    batch = collate(iteration.episodes, torch.device("cpu"))
    with torch.no_grad():
        ref = token_logprobs(seen.start, batch, args.temperature)[0]
    mask = batch["turn_id"] >= 0
    return [(batch["old_logprobs"][i] - ref[i])[mask[i]].double().numpy() for i in range(len(mask))]


def credit_of(e, k, totals, episodes, args):
    """Eq. 4 for turn k of episode e."""
    first = e // args.group_size * args.group_size
    members = range(first, first + args.group_size)
    pool = [j for j in members if j != e and len(episodes[j].turns) > k] if args.group_baseline == "turn" else members
    spread = np.std([totals[j] for j in members], ddof=1)
    return (totals[e] - np.mean([totals[j] for j in pool])) / (spread + 1e-6) if pool and spread > 1e-6 else 0.0


@pytest.mark.parametrize("flags", [
    {}, {"group_baseline": "turn", "kl_in_reward": 0.2, "keep_groups": 0.5, "num_prompts": 4, "temperature": 1.2},
    {"decay": "linear", "repetition_penalty": 0.3, "format_penalty": 0.2, "penalise_unfinished": False,
     "num_epochs": 2, "num_minibatches": 3, "num_prompts": 3},
    {"decay_base": 0.7, "max_turns": 3, "num_minibatches": 1}])
def test_group_advantages_of_a_run_against_a_loop(flags, tmp_path, spy):
    """Also: whole groups are dealt out to the minibatches, dropped and silent ones to none."""
    flags = {"learning_rate": 0.01} | flags
    args, (_, logged) = Args(**(QUICK | flags)), run(tmp_path, **flags)
    for number, iteration in enumerate(spy.iterations):
        episodes, kl = iteration.episodes, kl_of_tokens(spy, iteration, args)
        assert (max(abs(x).max() for x in kl) > 1e-3) == (number > 0)
        totals = [s - args.kl_in_reward * x.sum() for s, x in zip(scores(episodes, args), kl, strict=True)]
        times = dict.fromkeys(range(len(episodes)), 0)
        for batch in iteration.updates:
            assert len(set((batch["episode_id"] // args.group_size % args.num_minibatches).tolist())) == 1
            for row, e in enumerate(batch["episode_id"].tolist()):
                times[e] += 1
                for k in range(len(episodes[e].turns)):
                    got = batch["advantages"][row][batch["turn_id"][row] == k].tolist()
                    value = credit_of(e, k, totals, episodes, args)
                    assert got and got == pytest.approx([value] * len(got), abs=1e-3), (e, k)
            assert not batch["advantages"][batch["turn_id"] < 0].any()
        trained = {e for e in expected_kept(episodes, args) if any(  # its minibatch has some signal
            abs(credit_of(j, 0, totals, episodes, args)) > 0 for j in expected_kept(episodes, args)
            if (j // args.group_size - e // args.group_size) % args.num_minibatches == 0)}
        assert times == {e: args.num_epochs * (e in trained) for e in times}
        parts = {e // args.group_size % args.num_minibatches for e in trained}
        assert len(iteration.updates) == args.num_epochs * len(parts) == logged[number + 1]["optimizer_steps"]


@pytest.mark.parametrize("flags", [
    {}, {"kl_in_reward": 0.2}, {"keep_groups": 0.5, "num_prompts": 4, "num_iterations": 1}])
def test_gae_advantages_of_a_run_against_a_loop(flags, tmp_path, spy):
    """Discount and lambda 1: the rewards to come minus the value, whitened over all episodes, kept or not."""
    flags = {"advantage": "gae", "learning_rate": 0.01, "num_minibatches": 1} | flags
    args, (_, logged) = Args(**(QUICK | flags)), run(tmp_path, **flags)
    for number, iteration in enumerate(spy.iterations):
        [batch], kl = iteration.updates, kl_of_tokens(spy, iteration, args)
        assert set(batch["episode_id"].tolist()) == expected_kept(iteration.episodes, args)
        mask, rows_ = batch["turn_id"] >= 0, dict(zip(batch["episode_id"].tolist(), itertools.count(), strict=False))
        to_come = [s - args.kl_in_reward * np.cumsum(x[::-1])[::-1]
                   for s, x in zip(scores(iteration.episodes, args), kl, strict=True)]
        assert (number > 0) == bool(batch["values"].any()), "zero before the first step"
        assert torch.allclose(batch["values"], batch["live"], atol=1e-5), "the critic before the step"
        values = [batch["values"][rows_[e]][mask[rows_[e]]].numpy() if e in rows_ else 0.0 for e in range(len(kl))]
        raw = [x - v for x, v in zip(to_come, values, strict=True)]
        every, goal = np.concatenate(raw), np.concatenate(to_come)
        for e, row in rows_.items():
            white = (raw[e] - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
            assert batch["advantages"][row][mask[row]].tolist() == pytest.approx(white.tolist(), abs=2e-3)
            assert batch["returns"][row][mask[row]].tolist() == pytest.approx(to_come[e].tolist(), abs=1e-4)
        assert not batch["advantages"][~mask].any() and logged[number + 1]["value_loss"] > 0
        assert logged[number + 1]["explained_variance"] == pytest.approx(
            1 - every.var(ddof=1) / goal.var(ddof=1), abs=2e-3)


def test_the_critic_has_its_own_learning_rate(tmp_path, spy):
    for rate in (1e-9, 1e-2):
        run(tmp_path, advantage="gae", critic_learning_rate=rate, num_minibatches=1)
        assert (spy.iterations[-1].updates[0]["values"].abs().max() > 1e-3) == (rate == 1e-2)


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_a_run_logs_finite_numbers_that_agree_with_its_episodes(advantage, tmp_path, spy):
    summary, logged = run(tmp_path, advantage=advantage, penalise_unfinished=False, num_prompts=3, keep_groups=0.3)
    args = Args(**QUICK, penalise_unfinished=False)
    assert summary["iterations"] == 2 and len(logged) == 3
    assert all(math.isfinite(x) for row in logged for x in row.values())
    assert ("explained_variance" in logged[1]) == (advantage == "gae")
    for row, iteration in zip(logged[1:], spy.iterations, strict=True):
        episodes = iteration.episodes
        parts = np.array([score_parts(e, args) for e in episodes])
        assert row["score"] == pytest.approx(np.mean(scores(episodes, args)), abs=1e-5)
        assert row["decay_part"] == pytest.approx(parts[:, 0].mean(), abs=1e-5)
        assert row["repetition_part"] == pytest.approx(parts[:, 1].mean(), abs=1e-5)
        spread = np.ptp(np.reshape(scores(episodes, args), (3, 3)), axis=1)
        assert row["groups_without_signal"] == pytest.approx(np.mean(spread < 1e-6))
        for k in range(1, 6):
            solved = np.mean([e.success and len(e.turns) <= k for e in episodes])
            assert row[f"train_success_at_{k}"] == pytest.approx(solved)
        assert row["train_success"] == row["train_success_at_5"]
    for row, tested in zip((logged[0], logged[2]), spy.evaluations, strict=True):
        assert row["eval_average_turns"] == pytest.approx(np.mean([len(e.turns) for e in tested.episodes]))
    sampled = sum(t.num_sampled for i in spy.iterations for e in i.episodes for t in e.turns)
    assert summary["generated_tokens"] == sampled, "episodes that are not trained on cost as much"


def test_a_quarter_of_two_groups_is_one_group(tmp_path, spy):
    flags = {"keep_groups": 0.25, "group_size": 4, "num_iterations": 1}
    _, logged = run(tmp_path, **flags)
    [iteration] = spy.iterations
    [batch] = iteration.updates
    kept = expected_kept(iteration.episodes, Args(**(QUICK | flags)))
    assert set(batch["episode_id"].tolist()) == kept and len(kept) == 4 and logged[1]["optimizer_steps"] == 1


def test_one_turn_in_training_is_still_five_in_evaluation(tmp_path, spy):
    """Both arms of the comparison start from the same policy, with the same problems."""
    spy.play, starts = collect_groups, []
    for max_turns in (1, 3):
        _, logged = run(tmp_path, max_turns=max_turns, num_iterations=1, eval_temperature=1.5)
        starts.append(spy.start.model.state_dict())
        trained, tested = spy.iterations[-1], spy.evaluations[-1]
        for envs, answers in ((trained.envs, max_turns), (tested.envs, 5)):
            assert {env.unwrapped.max_answers for env in envs} == {answers}
        assert {env.unwrapped.format_penalty for env in tested.envs} == {0.0}, "training penalties are off"
        assert max(len(e.turns) for e in trained.episodes) == max_turns and logged[0]["eval_turns"] > 3
        assert all(len(e.turns) == 5 or e.success for e in tested.episodes)
        assert all(e.terminated and not e.truncated for e in trained.episodes)
        assert tested.args.max_turns == 5 and tested.args.eval_temperature == 1.5
        assert "eval_success_at_5" in logged[0] and f"train_success_at_{max_turns + 1}" not in logged[1]
        for episode in trained.episodes:
            assert episode.row() == rebuilt(spy.start, episode), "the last observation is in no row"
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    one, three = ([e.turns[0].observation for e in i.episodes] for i in spy.iterations)
    assert one == three


def test_evaluation_may_have_another_number_of_answers(tmp_path, spy):
    _, logged = run(tmp_path, eval_turns=2, num_iterations=1)
    assert max(len(e.turns) for e in spy.evaluations[-1].episodes) == 2
    assert max(len(e.turns) for e in spy.iterations[-1].episodes) == 5
    assert "eval_success_at_2" in logged[0] and "eval_success_at_3" not in logged[0]


def test_feedback_and_arguments_reach_the_environments_of_training_and_evaluation(tmp_path, spy):
    run(tmp_path, feedback="blank", env_kwargs='{"levels": "45"}', num_iterations=1)
    trained, tested = spy.iterations[0], spy.evaluations[-1]
    for env in (*trained.envs, *tested.envs):
        assert env.unwrapped.levels == "45" and env.unwrapped.feedback == "blank" and env.unwrapped.max_answers == 5
    seen = {t.observation for e in trained.episodes + tested.episodes for t in e.turns[1:]}
    assert "" in seen and all("Incorrect" not in text for text in seen)


def test_with_a_critic_a_resumed_run_equals_an_uninterrupted_one(tmp_path, spy):
    flags = {"advantage": "gae", "kl_in_reward": 0.1, "kl_coefficient": 0.1, "num_epochs": 2, "eval_every": 1}
    _, whole = run(tmp_path / "whole", **flags)
    weights = copy.deepcopy(spy.policy.model.state_dict())
    run(tmp_path / "half", **flags, num_iterations=1)
    [folder] = (tmp_path / "half").iterdir()
    _, half = run(tmp_path / "half", **flags, resume=str(folder))
    assert all(torch.equal(p, weights[name]) for name, p in spy.policy.model.state_dict().items())
    assert [row | {"seconds": 0} for row in whole] == [row | {"seconds": 0} for row in half] and len(whole) == 3


def test_equal_scores_are_no_signal(tmp_path, spy):
    spy.play = functools.partial(demonstrated, malformed=1.0)
    _, logged = run(tmp_path, num_iterations=1)
    assert logged[1]["optimizer_steps"] == 0 and logged[1]["groups_without_signal"] == 1
    assert logged[1]["score"] == pytest.approx(-0.5) and not spy.iterations[0].updates


@pytest.mark.parametrize("flags,needle", [
    ({"env_id": "turnrl/FrozenLake-v0"}, "turnrl/FrozenLake-v0"),
    ({"env_id": "tests/Mute-v0"}, "info['submitted']"), ({"env_kwargs": '{"max_answers": 3}'}, "--eval-turns set max_answers"),
    ({"group_size": 1}, "--group-size 1")])
def test_what_cannot_be_trained_ends_with_one_clear_line(flags, needle, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, **flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and needle in lines[0], lines
