"""Turn budgets against hand-worked numbers, slow loops, scripted minds and whole recomputations."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
import transformers

from algos.turn_budget import (
    PILOT, Args, Budget, TurnLimit, clipped_objective, divide_by_turn_count, forced_tokens,
    group_relative_advantages, kl_policy_ref_k3, main, overrun_penalty, percentile_limit, policy_loss,
    rounds_that_fit, score_episodes, soft_window_penalty, target_length_reward, thought_allowance,
    thought_end, total_budget_reward, turn_count_penalty, turn_limit_step, update,
)
from conftest import CHATML, KeepGradient, byte_tokenizer, random_model
from envs.episodes import Episode, Turn, demonstrations, start_episodes
from envs.text_env import TextEnv
from envs.think_search import ThinkSearch
from policies import make_tiny
from utils import (
    Policy, RunArgs, collate, collect_groups, evaluate, expand_to_tokens, random_stream, refresh_logprobs, rollout,
    token_logprobs,
)
from words import Words

CAPS = ("none", "context", "episode", "turn")
END = 1


def tensor(*values):
    return torch.tensor(values, dtype=torch.float)


# --- Eq. 1, 2: rounds ----------------------------------------------------------------------------


@pytest.mark.parametrize("context,prompt,reserve,thought,action,observation,kept,rounds", [
    (100, 10, 10, 60, 5, 15, True, 1), (100, 10, 10, 20, 5, 15, True, 2), (100, 10, 10, 5, 5, 15, True, 3),
    (100, 10, 10, 5, 5, 15, False, 3), (112, 8, 4, 9, 5, 4, True, 5), (112, 8, 4, 4, 5, 4, True, 7),
    (112, 8, 4, 9, 5, 4, False, 10), (100, 10, 10, 20, 5, 15, False, 3), (100, 10, 10, 60, 5, 15, False, 1),
    (20, 10, 15, 5, 5, 5, True, 0), (20, 10, 5, 6, 5, 5, False, 0)])
def test_rounds_by_hand(context, prompt, reserve, thought, action, observation, kept, rounds):
    assert rounds_that_fit(context, prompt, reserve, thought, action, observation, kept) == rounds


@pytest.mark.parametrize("turns,context", [(2, 3548), (4, 5548)])
def test_rounds_agree_with_the_sizing_of_search_r1(turns, context):
    """2048 + 500 (turns - 1) + 500 turns: answers and pages of 500, but no room for the last answer."""
    assert 2048 + 500 * (turns - 1) + 500 * turns == context
    assert rounds_that_fit(context + 500, 2048, 0, 0, 500, 500, True) == turns
    assert rounds_that_fit(context + 499, 2048, 0, 0, 500, 500, True) == turns - 1


def test_rounds_never_grow_with_the_thought():
    for kept in (True, False):
        rounds = [rounds_that_fit(112, 8, 4, b, 5, 4, kept) for b in range(120)]
        assert rounds == sorted(rounds, reverse=True) and rounds[0] == 11 and rounds[-1] == 0
    assert all(rounds_that_fit(112, 8, 4, b, 5, 4, False) >= rounds_that_fit(112, 8, 4, b, 5, 4, True)
               for b in range(101))


# --- Eq. 3: allowances ---------------------------------------------------------------------------


@pytest.mark.parametrize("terms,allowance", [
    ((None, None, 50, 9, None), None), ((8, None, 50, 9, None), 8), ((None, 80, 50, 9, None), 21),
    ((None, None, 50, 9, 5), 5), ((8, 80, 50, 9, 5), 5), ((8, 80, 68, 9, 5), 3), ((8, 80, 71, 9, None), 0),
    ((8, 80, 75, 9, 5), 0), ((None, 80, 200, 9, None), 0), ((8, None, 0, 0, -3), 0), ((0, None, 0, 0, 4), 0)])
def test_allowances_by_hand(terms, allowance):
    assert thought_allowance(*terms) == allowance


@pytest.mark.parametrize("cap,pot,granted,forced", [
    (10, None, [10, 8, 10], 2), (None, 30, [12, 8, 10], 1), (None, None, [12, 8, 20], 0)])
def test_wanted_and_granted_thoughts_by_hand(cap, pot, granted, forced):
    """A thought of n tokens ends itself with the n-th; token by token, as it is played."""
    got, closed = [], 0
    for wanted in (12, 8, 20):
        allowance = thought_allowance(cap, None, 0, 0, pot)
        ids, put = drive([10] * (wanted - 1) + [99, 7, END], allowance, 3, [99])
        end = thought_end(ids, [99])
        got.append(sum(not p for p in put[:end]))
        closed += any(put[:end])
        pot = None if pot is None else pot - got[-1]
    assert (got, closed) == (granted, forced)


# --- Eq. 4: what is put in -----------------------------------------------------------------------


def drive(tokens, allowance, action_cap, mark):
    """Sample `tokens` one by one until the turn ends: the turn, and which tokens were put in."""
    ids = forced_tokens([], allowance, action_cap, mark, END)
    put, tokens = [1] * len(ids), list(tokens)
    while tokens and ids[-1:] != [END]:
        ids = [*ids, tokens.pop(0)]
        new = forced_tokens(ids, allowance, action_cap, mark, END)
        ids, put = ids + new, put + [0] + [1] * len(new)
    return ids, put


ONE, TWO = [99], [90, 99]


@pytest.mark.parametrize("tokens,allowance,mark,turn,put", [
    # still open after 5 tokens
    ([11, 12, 13, 14, 15, 7, END], 5, TWO, [11, 12, 13, 14, 15, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    ([11, 12, 13, 14, 15, 7, END], 5, ONE, [11, 12, 13, 14, 15, 99, 7, END], [0] * 5 + [1, 0, 0]),
    # ends itself: early, and with the last token allowed
    ([11, 12, 99, 7, END], 5, ONE, [11, 12, 99, 7, END], [0] * 5),
    ([11, 12, 90, 99, 7, END], 5, TWO, [11, 12, 90, 99, 7, END], [0] * 6),
    ([11, 12, 13, 14, 99, 7, END], 5, ONE, [11, 12, 13, 14, 99, 7, END], [0] * 7),
    ([11, 12, 13, 90, 99, 7, END], 5, TWO, [11, 12, 13, 90, 99, 7, END], [0] * 7),
    # nothing may be thought
    ([7, END], 0, ONE, [99, 7, END], [1, 0, 0]), ([7, END], 0, TWO, [90, 99, 7, END], [1, 1, 0, 0]),
    # half a mark is no mark: at the cap, reversed, and one token too late
    ([11, 12, 13, 14, 90, 7, END], 5, TWO, [11, 12, 13, 14, 90, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    ([99, 90, 11, 90, 90, 7, END], 5, TWO, [99, 90, 11, 90, 90, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    ([11, 12, 99, 14, 15, 7, END], 5, TWO, [11, 12, 99, 14, 15, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    # an end of turn inside a thought, early and as the last token allowed
    ([11, END], 5, ONE, [11, END], [0, 0]), ([11, 12, 13, 14, END], 5, TWO, [11, 12, 13, 14, END], [0] * 5),
    ([END], 1, ONE, [END], [0]),
    # an action that does not end: 3 tokens; the third may be the end itself
    ([99, 6, 7, 8, 9], 5, ONE, [99, 6, 7, 8, END], [0, 0, 0, 0, 1]),
    ([99, 6, 7, END], 5, ONE, [99, 6, 7, END], [0] * 4), ([99, END], 5, ONE, [99, END], [0, 0]),
    ([90, 99, 90, 99, 99, 5], 5, TWO, [90, 99, 90, 99, 99, END], [0] * 5 + [1]),
    ([11, 12, 6, 7, 8, 9], 2, TWO, [11, 12, 90, 99, 6, 7, 8, END], [0, 0, 1, 1, 0, 0, 0, 1]),
    ([6, 7, 8, 9], 0, TWO, [90, 99, 6, 7, 8, END], [1, 1, 0, 0, 0, 1]),
    # no allowance: only the action is limited
    ([11] * 30, None, ONE, [11] * 30, [0] * 30),
    ([11] * 30 + [99, 6, 7, 8, 9], None, ONE, [11] * 30 + [99, 6, 7, 8, END], [0] * 34 + [1])])
def test_forced_tokens_by_hand(tokens, allowance, mark, turn, put):
    assert drive(tokens, allowance, 3, mark) == (turn, put)


def test_the_end_of_a_thought_is_its_first_whole_mark():
    assert [thought_end([5, 90, 99, 7, 90, 99], mark) for mark in (TWO, ONE, [7], [99, 90])] == [3, 3, 4, None]
    assert thought_end([], ONE) is None and thought_end([90], TWO) is None and thought_end([90, 99], TWO) == 2


# --- Eq. 6: what a length earns ------------------------------------------------------------------
LENGTHS, PLAYED = tensor([12, 8, 20]), torch.ones(1, 3, dtype=torch.bool)


def test_penalties_of_thoughts_by_hand():
    assert 1 + overrun_penalty(LENGTHS, PLAYED, 10, 0.1).item() == pytest.approx(0.88)
    per_turn = [soft_window_penalty(LENGTHS[:, k : k + 1], PLAYED[:, :1], 10, 4).item() for k in range(3)]
    assert per_turn == pytest.approx([-1, -0.5, -1])
    assert soft_window_penalty(LENGTHS, PLAYED, 10, 4).item() == pytest.approx(-0.833333, abs=1e-6)
    edges = tensor([0, 6, 7, 10, 99])
    assert [soft_window_penalty(x.view(1, 1), PLAYED[:, :1], 10, 4).item() for x in edges[0]] == pytest.approx(
        [0, 0, -0.25, -1, -1])


def test_penalties_are_means_and_sums_over_turns_played():
    """One turn and three turns of the same length; numbers after the end do not count."""
    lengths, played = tensor([9, 50, 50], [9, 9, 9]), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    assert soft_window_penalty(lengths, played, 10, 4).tolist() == pytest.approx([-0.75, -0.75])
    assert overrun_penalty(lengths, played, 6, 0.1).tolist() == pytest.approx([-0.05, -0.15])
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert soft_window_penalty(LENGTHS, nothing, 10, 4).item() == overrun_penalty(LENGTHS, nothing, 6, 1).item() == 0


def test_rewards_for_totals_by_hand():
    """The hinge of TAB, the two forms of L1."""
    got = total_budget_reward(tensor(1, 1, 0), tensor(4800, 5600, 5600), 5000, 0.001)
    assert got.tolist() == pytest.approx([1, 0.4, -0.6])
    target = {form: target_length_reward(tensor(1, 0, 1, 1, 1), tensor(1500, 1500, 500, 9000, 0), 1000, 3e-4, form)
              .tolist() for form in ("exact", "max")}
    assert target["exact"] == pytest.approx([0.85, -0.15, 0.85, -1.4, 0.7])
    assert target["max"] == pytest.approx([0.425, 0, 0.575, 0, 0.65])
    assert target_length_reward(tensor(1), tensor(0), 1000, 1.0, "max").item() == 1.0, "at most a factor 1"


def test_turn_count_penalty_by_hand():
    got = turn_count_penalty(torch.tensor([1, 2, 3, 4, 5, 6]), 3, 6)
    assert got.tolist() == pytest.approx([0, 0, 0, -1 / 3, -2 / 3, -1])


@pytest.mark.parametrize("option,scores", [
    ("none", [1.0, 0.5]),
    ("window", [1 - 0.1 * (0.25 + 1 + 0) / 3, 0.5 - 0.1 * 1]),  # free up to 4 tokens, -1 from 8 on
    ("overrun", [1 - 0.1 * 2 / 8, 0.5 - 0.1 * 1]),
    ("hinge", [1 - 0.1 * 13, 0.5 - 0.1 * 10]),
    ("target", [1 - 0.1 * 13, 0.5 - 0.1 * 10]),
    ("target_max", [1 * (1 - 1) / 2, 0.5 * (1 - 1) / 2]),
    ("turns", [1 - 0.1 * (3 - 2) / 2, 0.5])])
def test_every_reward_option_by_hand(option, scores):
    """Thoughts of 5, 10, 2 tokens and of 16; 21 and 18 tokens sampled; 3 and 1 turns of 4."""
    lengths, played = tensor([5, 10, 2], [16, 0, 0]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    args = Args(reward_option=option, coefficient=0.1, target_tokens=8, max_turns=4)
    got = score_episodes(tensor(1, 0.5), lengths, tensor(21, 18), played, args)
    assert got.tolist() == pytest.approx(scores, abs=1e-6)
    if option != "target_max":
        free = Args(reward_option=option, coefficient=0.0, target_tokens=8, max_turns=4)
        assert score_episodes(tensor(1, 0.5), lengths, tensor(21, 18), played, free).tolist() == [1, 0.5]


@pytest.mark.parametrize("option,used,score", [
    ("target", 6, 0.98), ("hinge", 6, 1.0), ("target_max", 6, 0.51), ("target", 9, 0.99), ("hinge", 9, 0.99),
    ("target_max", 9, 0.495)])
def test_short_of_the_target_and_over_it(option, used, score):
    args = Args(reward_option=option, coefficient=0.01, target_tokens=8)
    got = score_episodes(tensor(1), tensor([2]), tensor(used), PLAYED[:, :1], args)
    assert got.tolist() == pytest.approx([score])


# --- Eq. 7, 8: advantages ------------------------------------------------------------------------


def test_advantages_divided_by_turns_by_hand():
    """Returns 1 and 0, 2 and 4 turns, std over n."""
    relative = group_relative_advantages(tensor(1, 0), torch.zeros(2).long(), degrees_of_freedom=0)
    played = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    got = divide_by_turn_count(relative, played)
    assert torch.allclose(got, tensor([0.5, 0.5, 0, 0], [-0.25] * 4), atol=2e-6)
    assert divide_by_turn_count(tensor(1.0), torch.zeros(1, 3).bool()).tolist() == [[0, 0, 0]]


def test_equal_turn_counts_are_only_rescaled():
    relative, played = torch.randn(6), torch.ones(6, 3, dtype=torch.bool)
    assert torch.allclose(divide_by_turn_count(relative, played) * 3, relative[:, None].expand(6, 3))


def test_group_advantages_by_hand():
    scores, group = tensor(1, 0, 0, 1, 2, 2, 5), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    centred = group_relative_advantages(scores, group, scale="none")
    assert centred.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0]
    got = group_relative_advantages(scores, group)
    assert got.tolist() == pytest.approx([0.866025, -0.866025, -0.866025, 0.866025, 0, 0, 0], abs=1e-5)


# --- Eq. 5: turn limits --------------------------------------------------------------------------
COUNTS = [10, 20, 30, 40, 50, 60, 70, 80]


def test_percentile_limits_by_hand():
    assert np.percentile(COUNTS, [25, 50, 75]).tolist() == [27.5, 45, 62.5]
    assert [percentile_limit(COUNTS, p) for p in (0, 25, 50, 75, 100)] == [10, 27, 45, 62, 80]
    assert percentile_limit(COUNTS[::-1], 75) == 62 and percentile_limit([7], 50) == 7
    assert percentile_limit([0, 0, 1], 50) == 1 and percentile_limit([1, 1, 2, 2], 50) == 1


class Needs(TextEnv):
    """Solved by the turn number `seed`, whatever is done."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn, self.need = 0, seed
        return "go", {"success": False}

    def step(self, action):
        self.turn += 1
        done = self.turn == self.need
        return "" if done else "on", float(done), done, False, {"success": done}


def through_steps(need, limits):
    """Whether it is solved, the turns, the extensions used; with turn_limit_step alone."""
    (limit, last), left, turn = limits, 1, 0
    while True:
        turn += 1
        if turn == need:
            return True, turn, 1 - left
        limit, left, over = turn_limit_step(turn, limit, last, left)
        if over:
            return False, turn, 1 - left


def through_wrapper(need, limits, reminder=False):
    """The same through the environment; also every observation."""
    env = TurnLimit(Needs(), *limits, reminder)
    seen, turn, end, info = [env.reset(seed=need)[0]], 0, False, {}
    while not end:
        observation, reward, terminated, truncated, info = env.step("word")
        seen.append(observation)
        assert reward == float(terminated) and not (terminated and truncated)
        assert info["success"] == terminated and info["at_limit"] == truncated
        turn, end = turn + 1, terminated or truncated
    return (info["success"], turn, int(info["extended"])), seen


@pytest.mark.parametrize("need,fixed,dynamic", [
    (45, (True, 45, 0), (True, 45, 0)), (46, (True, 46, 0), (True, 46, 1)), (62, (True, 62, 0), (True, 62, 1)),
    (63, (False, 62, 0), (False, 62, 1)), (90, (False, 62, 0), (False, 62, 1)), (44, (True, 44, 0), (True, 44, 0))])
def test_limits_over_whole_episodes_by_hand(need, fixed, dynamic):
    assert through_steps(need, (62, 62)) == fixed and through_steps(need, (45, 62)) == dynamic
    assert through_wrapper(need, (62, 62))[0] == fixed
    assert through_wrapper(need, (45, 62))[0] == dynamic


def test_a_limit_is_extended_once_and_only_when_hit():
    assert turn_limit_step(44, 45, 62, 1) == (45, 1, False)
    assert turn_limit_step(45, 45, 62, 1) == (62, 0, False)
    assert turn_limit_step(45, 45, 62, 0) == (45, 0, True)
    assert turn_limit_step(62, 62, 62, 1) == (62, 1, True), "an extension by nothing is none"
    assert turn_limit_step(45, 45, 62, 2) == (62, 1, False)


def test_reminders_by_hand():
    """The turns left; the extension shows when it is granted, and the end has no reminder."""
    _, seen = through_wrapper(9, (3, 5), reminder=True)
    assert seen == ["go left 3", "on left 2", "on left 1", "on left 2", "on left 1", "on"]
    assert through_wrapper(9, (5, 5), reminder=True)[1] == ["go left 5", *(f"on left {n}" for n in (4, 3, 2, 1)), "on"]
    assert through_wrapper(2, (5, 5), reminder=True)[1] == ["go left 5", "on left 4", ""]
    assert through_wrapper(2, (5, 5))[1] == ["go", "on", ""]
    _, seen = through_wrapper(90, (45, 62), reminder=True)
    assert (seen[0], seen[44], seen[45], seen[61], seen[62]) == (
        "go left 45", "on left 1", "on left 17", "on left 1", "on")


def test_a_second_reset_starts_a_new_count():
    env = TurnLimit(Needs(), 2, 3, True)
    for _ in range(2):
        assert env.reset(seed=9)[0] == "go left 2"
        ends = [env.step("word")[3] for _ in range(3)]
        assert ends == [False, False, True]


# --- Eq. 9: the loss -----------------------------------------------------------------------------


def test_the_surrogate_by_hand():
    log_ratio = tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log()
    advantages, weights = tensor([1, 1, -1, -1, 2]), torch.full((1, 5), 0.2)
    terms = [1.2, 0.5, -1.5, -0.8, 2.2]
    assert clipped_objective(log_ratio, advantages, 0.2, 0.2)[0].tolist() == pytest.approx(terms)
    batch = {"old_logprobs": torch.zeros(1, 5), "ref_logprobs": log_ratio + 0.5, "advantages": advantages,
             "weights": weights}
    loss, stats = policy_loss(batch, log_ratio, torch.full((1, 5), 0.7), 0.2, 0.2, None, 0.01, 0.1)
    k3 = math.exp(0.5) - 1.5
    assert kl_policy_ref_k3(tensor(-1), tensor(-0.5)).item() == pytest.approx(k3, abs=1e-6)
    assert loss.item() == pytest.approx(-sum(terms) / 5 - 0.01 * 0.7 + 0.1 * k3, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 5) and stats["entropy"].item() == pytest.approx(0.7)


# --- games of policies that think ----------------------------------------------------------------


def lean(policy, mark, strength, *more):
    """Marks and ends of turn become likely, in decoding and in the update alike."""
    table = torch.zeros(len(policy.tokenizer), policy.model.config.vocab_size)
    table[:, [mark[0], policy.end_id, *more]] = strength
    for a, b in zip(mark, mark[1:], strict=False):
        table[a, b] = 2 * strength + 2
    forward = policy.forward

    def leaning(tokens, **kwargs):
        keep = kwargs["logits_to_keep"]
        last = tokens[:, -1:] if isinstance(keep, int) else tokens[:, keep]
        return forward(tokens, **kwargs) + table[last]
    policy.forward = leaning
    return policy


@pytest.fixture(scope="module")
def searcher_parts():
    """A tokenizer that knows the words of ThinkSearch (one token each), and an untrained model."""
    played = demonstrations(ThinkSearch("turns", max_turns=12), list(range(60)), 12, np.random.default_rng(0))
    texts = [text for e in played for turn in e.turns for text in (turn.observation, turn.action)]
    return make_tiny(RunArgs(), texts)


@pytest.fixture
def searcher(searcher_parts):
    return Policy(*searcher_parts, "cpu")


def budget_for(policy, mark=" so", **flags):
    flags = {"max_turns": 6, "max_turn_tokens": 3, "thought_cap": 5, "context_limit": 100} | flags
    args = Args(**flags)
    return Budget(policy, args, mark), args


def streams(count, first=0):
    return [random_stream(99, first + i) for i in range(count)]


def play(policy, budget, args, envs, seeds, rngs=None):
    return rollout(policy, envs, start_episodes(envs, seeds), rngs or streams(len(envs)), force=budget.force,
                   max_turns=args.max_turns, max_turn_tokens=budget.max_turn_tokens,
                   temperature=args.temperature, history_turns=budget.history_turns)


class Game:
    """Episodes of one setting, played once and read by many tests."""

    def __init__(self, policy, envs, mark=" so", **flags):
        self.policy, self.envs = policy, envs
        self.budget, self.args = budget_for(policy, mark, **flags)
        self.episodes = play(policy, self.budget, self.args, envs, list(range(len(envs))))
        self.reserve = len(self.budget.mark) + self.args.max_turn_tokens  # what must follow a thought
        self.turns = [(e, k, turn) for e in self.episodes for k, turn in enumerate(e.turns)]

    def context(self, episode, k):
        """The tokens before the answer of turn k."""
        return Episode(0, "", episode.turns[:k]).row() * (not episode.turns[k].starts_row) + (
            episode.turns[k].prompt_ids)

    def allowance(self, episode, k, used):
        """Eq. 3, written out for each cap."""
        args, room = self.args, self.args.context_limit - used - self.args.final_reserve
        room = max(0, room - self.reserve)
        if args.cap == "none":
            return None
        if args.cap == "context":
            return room
        if args.cap == "turn":
            return min(room, args.thought_cap)
        spent = sum(len(self.split(turn)[0]) for turn in episode.turns[:k])
        return min(room, max(0, args.max_turns * args.thought_cap - spent))

    def split(self, turn):
        """The sampled tokens of the thought (with an end that it chose), and what follows it."""
        mark, ids = self.budget.mark, turn.token_ids
        ends = [n for n in range(len(ids) + 1) if ids[:n][-len(mark):] == mark]
        end = ends[0] if ends else len(ids)
        return [token for n, token in enumerate(ids[:end]) if n not in turn.forced], ids[end:]


def slow_turn(sampled, allowance, room, args, mark, end):
    """The same turn in phases: thought, mark, action; (tokens, positions put in).

    A turn that has used up its room is over without an end: the next prompt brings one.
    """
    thought, action, rest = [], [], list(sampled)
    while rest and thought[-len(mark):] != mark and thought[-1:] != [end] and len(thought) != allowance:
        thought.append(rest.pop(0))
    put = set()
    if thought[-len(mark):] != mark:
        if thought[-1:] == [end] or len(thought) != allowance:
            assert not rest
            return thought, put
        put = {len(thought) + n for n in range(len(mark))}
        thought = thought + mark
    while rest and action[-1:] != [end] and len(action) < args.max_turn_tokens:
        action.append(rest.pop(0))
    assert not rest
    if len(action) == args.max_turn_tokens and action[-1] != end and len(thought + action) < room:
        action.append(end)
        put.add(len(thought) + len(action) - 1)
    return thought + action, put


KINDS = [(kind, cap, drop) for kind in ("words", "bytes") for cap in CAPS for drop in (False, True)
         if kind == "words" or cap == "turn"]


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{p[1]}-{'dropped' if p[2] else 'kept'}")
def game(request, searcher_parts):
    """Words: one token a mark. Bytes: three tokens a mark, a chat template, pages to be found."""
    kind, cap, drop = request.param
    if kind == "words":
        policy = lean(Policy(*searcher_parts, "cpu"), Policy(*searcher_parts, "cpu").encode(" so"), 3.6)
        return Game(policy, [Words(max_turns=9) for _ in range(7)], cap=cap, drop_thoughts=drop, max_turns=8,
                    context_limit=100, thought_cap=2 if cap == "episode" else 6)
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    policy = Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu", "Play well.")
    lean(policy, policy.encode(" so"), 5.0)
    return Game(policy, [ThinkSearch("turns", max_turns=12) for _ in range(8)], cap=cap, drop_thoughts=drop, max_turns=12,
                context_limit=260, thought_cap=5, final_reserve=2)


def test_a_turn_is_a_thought_a_mark_and_an_action(game):
    """Against the same turn made in phases, with allowances recomputed from the context."""
    kinds = set()
    for episode, k, turn in game.turns:
        used = len(game.context(episode, k))
        allowance = game.allowance(episode, k, used)
        room = game.args.context_limit - used if allowance is None else allowance + game.reserve
        sampled = [token for n, token in enumerate(turn.token_ids) if n not in turn.forced]
        assert (turn.token_ids, turn.forced) == slow_turn(
            sampled, allowance, room, game.args, game.budget.mark, game.policy.end_id)
        thought, rest = game.split(turn)
        assert turn.num_sampled == len(sampled) and game.budget.thought_length(turn) == len(thought)
        kinds |= {("closed", 0 < len(thought) == allowance and bool(rest) and len(thought) in turn.forced),
                  ("ended", len(thought) not in turn.forced and bool(rest)), ("open", not rest),
                  ("cut", len(turn.token_ids) - 1 in turn.forced)}
    wanted = {("ended", True), ("open", True), ("cut", True)}
    assert kinds >= wanted | ({("closed", True)} if game.args.cap in ("turn", "episode") else set()), kinds


def test_no_thought_is_longer_than_its_allowance_and_no_action_than_its_cap(game):
    closed = 0
    for episode, k, turn in game.turns:
        used, (thought, rest) = len(game.context(episode, k)), game.split(turn)
        if game.args.cap == "turn":
            assert len(thought) <= game.args.thought_cap
        if game.args.cap == "none":
            assert len(thought) <= game.args.context_limit - used
        else:
            room = game.args.context_limit - used - game.reserve
            assert len(thought) <= max(0, room - game.args.final_reserve)
        start = len(turn.token_ids) - len(rest)
        action = [n for n in range(start, len(turn.token_ids)) if n not in turn.forced]
        assert len(action) <= game.args.max_turn_tokens
        if start - 1 in turn.forced:
            closed += 1
            assert len(action) >= 1, "something is sampled after a close by force"
    if game.args.cap == "episode":
        spent = [sum(len(game.split(turn)[0]) for turn in e.turns) for e in game.episodes]
        assert max(spent) <= game.args.max_turns * game.args.thought_cap
    assert closed == 0 if game.args.cap == "none" else closed > 0 or game.args.cap == "context"


def test_the_context_is_never_longer_than_its_limit(game):
    assert max(len(game.context(e, k)) + len(turn.token_ids) for e, k, turn in game.turns
               ) <= game.args.context_limit


def test_the_mask_is_what_was_sampled(game):
    batch = collate(game.episodes, torch.device("cpu"))
    mask = batch["turn_id"] >= 0
    assert mask.sum() == sum(turn.num_sampled for _, _, turn in game.turns)
    assert torch.equal(mask, batch["old_logprobs"] != 0.0), "what was put in has no log-prob"
    assert all(len(turn.logprobs) == len(turn.token_ids) for _, _, turn in game.turns)
    assert len(batch["tokens"]) == (len(game.turns) if game.args.drop_thoughts else
                                    sum(bool(e.turns) for e in game.episodes))
    sampled = [token for _, _, turn in game.turns for n, token in enumerate(turn.token_ids) if n not in turn.forced]
    turn_id = [k for _, k, turn in game.turns for n in range(turn.num_sampled)]
    assert batch["tokens"][mask].tolist() == sampled and batch["turn_id"][mask].tolist() == turn_id


def test_log_probs_equal_a_full_recompute(game):
    """Also of turns whose context lacks the thoughts of earlier turns, and after tokens put in."""
    batch = collate(game.episodes, torch.device("cpu"))
    with torch.no_grad():
        logprobs, _ = token_logprobs(game.policy, batch, game.args.temperature)
    assert (logprobs - batch["old_logprobs"]).abs().max() < 1e-4


def run_update(policy, batch, **options):
    keeper = KeepGradient(policy)
    args = Args(max_grad_norm=1e9, **options)
    return update(policy, None, keeper, dict(batch), args), keeper.gradient


def with_advantages(episodes):
    batch = collate(episodes, torch.device("cpu"))
    turns = torch.randn(len(episodes), 12, generator=torch.Generator().manual_seed(0))
    return batch | {"advantages": expand_to_tokens(turns, batch["turn_id"], batch["episode_id"])}


def test_what_is_put_in_is_not_trained(game):
    """Other log-probs there: the same loss and gradient; elsewhere: another gradient."""
    metrics, gradient = run_update(game.policy, with_advantages(game.episodes))
    changed = copy.deepcopy(game.episodes)
    count = 0
    for episode in changed:
        for turn in episode.turns:
            turn.logprobs = [-7.0 if n in turn.forced else x for n, x in enumerate(turn.logprobs)]
            count += len(turn.forced)
    got, other = run_update(game.policy, with_advantages(changed))
    assert count > 5 and got == metrics and torch.equal(other, gradient) and gradient.norm() > 1e-3
    turn = changed[0].turns[0]
    turn.logprobs = [x if n in turn.forced else x - 0.1 for n, x in enumerate(turn.logprobs)]
    assert not torch.allclose(run_update(game.policy, with_advantages(changed))[1], gradient)


def test_the_first_step_is_plain_policy_gradient_over_all_sampled_tokens(game):
    """A mean over tokens of A log p and the entropy bonus, however the rows are split."""
    batch = with_advantages(game.episodes)
    logprobs, entropy = token_logprobs(game.policy, batch, 1.0)
    mask = torch.zeros_like(logprobs, dtype=torch.bool)
    mask[batch["old_logprobs"] != 0] = True
    game.policy.model.zero_grad()
    (-(batch["advantages"] * logprobs + 0.01 * entropy)[mask].mean()).backward()
    plain = torch.cat([p.grad.flatten() for p in game.policy.model.parameters()])
    game.policy.model.zero_grad()
    metrics, gradient = run_update(game.policy, batch, entropy_coefficient=0.01, micro_batch_tokens=300)
    assert torch.allclose(gradient, plain, rtol=1e-3, atol=1e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-5) and metrics["clip_fraction"] == 0
    assert metrics["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-3)


def test_the_environment_hears_the_decoded_turn(game):
    for env, episode in zip(game.envs, game.episodes, strict=True):
        for turn in episode.turns:
            ids = turn.token_ids[:-1] if turn.token_ids[-1] == game.policy.end_id else turn.token_ids
            assert turn.action == game.policy.tokenizer.decode(ids)
        if isinstance(env, Words):
            assert episode.info["heard"] == [turn.action for turn in episode.turns]


def test_a_later_turn_sees_actions_and_only_without_dropping_thoughts(game):
    """Every prompt written out; the marks and thoughts of earlier turns are gone, or all there."""
    policy, many = game.policy, 0
    for episode, k, turn in game.turns:
        expected = list(policy.head)
        for old in episode.turns[:k]:
            _, action = game.split(old)
            shown = action if game.args.drop_thoughts else old.token_ids
            if game.args.drop_thoughts and not action and old.token_ids[-1] == policy.end_id:
                shown = [policy.end_id]
            expected += policy.encode(old.observation) + policy.tail + shown
            expected += [policy.end_id] * (shown[-1:] != [policy.end_id]) + policy.between
            many += len(old.token_ids) > len(shown)
        assert game.context(episode, k) == expected + policy.encode(turn.observation) + policy.tail
        assert turn.starts_row == (k == 0 or game.args.drop_thoughts)
    assert (many > 10) == game.args.drop_thoughts


def test_an_episode_does_not_depend_on_its_company(game):
    for company in ([2], [4, 2]):
        envs = [game.envs[i] for i in company]
        rngs = [streams(1, first=i)[0] for i in company]
        again = play(game.policy, game.budget, game.args, envs, company, rngs)
        for i, episode in zip(company, again, strict=True):
            old = game.episodes[i]
            assert len(old.turns) == len(episode.turns) and old.overflowed == episode.overflowed
            for one, two in zip(old.turns, episode.turns, strict=True):
                assert (one.token_ids, one.forced, one.prompt_ids) == (two.token_ids, two.forced, two.prompt_ids)
                assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


def test_an_episode_for_which_no_action_fits_is_truncated_and_counted(game):
    args, policy, least = game.args, game.policy, 1 if game.args.cap == "none" else game.reserve
    for episode in game.episodes:
        ids, starts_row = policy.prompt(episode, game.budget.history_turns)
        used = len(ids) + (0 if starts_row else len(episode.row()))
        full = args.context_limit - used < least
        assert episode.done and not (episode.terminated and episode.truncated)
        assert episode.overflowed <= episode.truncated
        if not episode.terminated and len(episode.turns) < min(args.max_turns, 9):
            assert episode.overflowed and full
        elif episode.overflowed:
            assert full
    if not args.drop_thoughts:
        assert any(e.overflowed for e in game.episodes)


def test_refreshed_log_probs_skip_what_was_put_in(game, monkeypatch):
    episodes, args = copy.deepcopy(game.episodes), game.args
    refresh_logprobs(game.policy, episodes, args)
    assert episodes == game.episodes, "nothing to do in fp32"
    monkeypatch.setattr(game.policy, "bf16", True)
    refresh_logprobs(game.policy, episodes, args)
    with torch.no_grad():
        batch = collate(game.episodes, torch.device("cpu"))
        logprobs, _ = token_logprobs(game.policy, batch, args.temperature)
    fresh = collate(episodes, torch.device("cpu"))
    assert torch.allclose(fresh["old_logprobs"], logprobs, atol=1e-5)
    for (_, _, old), new in zip(game.turns, (t for e in episodes for t in e.turns), strict=True):
        assert len(new.logprobs) == len(new.token_ids) == len(old.logprobs)
        assert all((x == 0.0) == (n in new.forced) for n, x in enumerate(new.logprobs))
    assert (fresh["old_logprobs"] - batch["old_logprobs"]).abs().max() > 1e-4, "bf16 is another number"


def test_the_context_is_that_of_the_flag_or_of_the_model(searcher):
    assert budget_for(searcher, context_limit=5000)[0].policy.context_length == 1024
    assert budget_for(searcher, context_limit=70)[0].policy.context_length == 70


# --- limits of the settings ----------------------------------------------------------------------


def turns_of(policy, env=Words, seeds=range(6), limits=None, **flags):
    """What is sampled in every turn under some flags."""
    budget, args = budget_for(policy, **flags)
    envs = [env(max_turns=9) for _ in seeds]
    if limits:
        envs = [TurnLimit(e, *limits) for e in envs]
    episodes = play(policy, budget, args, envs, list(seeds))
    policy.context_length = 1024
    if "remember" in vars(policy):
        del policy.remember
    return episodes, [[(t.token_ids, t.forced, t.prompt_ids, t.logprobs) for t in e.turns] for e in episodes]


@pytest.fixture
def leaning(searcher):
    return lean(searcher, searcher.encode(" so"), 3.6)


@pytest.mark.parametrize("drop", [False, True])
def test_a_cap_that_is_never_reached_is_no_cap(leaning, drop):
    flags = {"context_limit": 600, "drop_thoughts": drop, "max_turns": 4}
    episodes, free = turns_of(leaning, cap="none", **flags)
    assert not any(e.overflowed for e in episodes) and max(len(ids) for e in free for ids, *_ in e) > 8
    for cap, size in (("context", 5), ("turn", 10**6), ("episode", 10**6)):
        assert turns_of(leaning, cap=cap, thought_cap=size, **flags)[1] == free
    assert turns_of(leaning, cap="turn", thought_cap=5, **flags)[1] != free


def test_in_an_episode_of_one_turn_the_pot_is_the_cap_and_there_is_nothing_to_drop(leaning):
    alike = [turns_of(leaning, cap=cap, drop_thoughts=drop, max_turns=1, seeds=range(12))[1]
             for cap in ("turn", "episode") for drop in (False, True)]
    assert alike.count(alike[0]) == 4 and any(forced for e in alike[0] for _, forced, *_ in e)


def test_an_extension_that_nobody_sees_is_the_longer_limit(leaning):
    """The same episodes without a reminder; with one the policy reads another text."""
    flags = {"context_limit": 600, "max_turns": 9, "env": Words}
    fixed = turns_of(leaning, limits=(5, 5, False), **flags)
    dynamic = turns_of(leaning, limits=(2, 5, False), **flags)
    assert fixed[1] == dynamic[1] and max(map(len, fixed[1])) == 5
    assert any(e.info["extended"] for e in dynamic[0]) and not any(e.info["extended"] for e in fixed[0])
    seen = [turns_of(leaning, limits=(first, 5, True), **flags)[1] for first in (2, 5)]
    assert seen[0] != seen[1] != fixed[1]


@pytest.mark.parametrize("reserve", [0, 7])
@pytest.mark.parametrize("cap", CAPS)
def test_a_turn_that_never_ends_stays_inside_the_context(searcher, monkeypatch, cap, reserve):
    """Nothing but "page", 8 tokens of prompt: 40 - 8 - 1 (mark) - 3 (action) - reserve are thought."""
    [word] = searcher.encode("page")

    def stubborn(logits, temperature, uniforms):
        return torch.full((len(logits),), word), torch.full((len(logits),), -0.5)
    monkeypatch.setattr("utils.sample_tokens", stubborn)
    budget, args = budget_for(searcher, cap=cap, context_limit=40, thought_cap=100, max_turns=3, final_reserve=reserve)
    envs = [ThinkSearch(max_hops=3, min_hops=3, max_turns=5), Words(max_turns=9)]
    episode, longer = play(searcher, budget, args, envs, [0, 123456789])
    assert episode.overflowed and len(episode.turns) == 1
    [turn] = episode.turns
    assert len(longer.turns[0].prompt_ids) > 12 and len(longer.turns) == 1 and len(longer.row()) == len(episode.row())
    assert len(turn.prompt_ids) == 8 and len(episode.row()) == 40 - reserve * (cap != "none")
    assert budget.thought_length(turn) == (32 if cap == "none" else 28 - reserve)


@pytest.mark.parametrize("drop", [False, True])
def test_a_thought_that_fills_the_context_ends_the_episode(searcher, monkeypatch, drop):
    [word] = searcher.encode("page")
    monkeypatch.setattr("utils.sample_tokens", lambda logits, temperature, uniforms: (
        torch.full((len(logits),), word), torch.full((len(logits),), -0.5)))
    budget, args = budget_for(searcher, cap="none", context_limit=60, max_turns=3, drop_thoughts=drop)
    [episode] = play(searcher, budget, args, [ThinkSearch(max_hops=3, min_hops=3, max_turns=5)], [0])
    assert len(episode.turns) == 1 and len(episode.row()) == 60 and episode.overflowed


# --- a scripted mind in the place of the model ---------------------------------------------------


class Mind:
    """Stands in for the decoder: thinks `passes` times, and needs two partial sums to be right.

    Reads the last page and its own answer so far; without two sums it names any page.
    """

    passes = 1

    def __init__(self, policy, rows):
        self.policy, self.rows = policy, [[] for _ in range(rows)]

    def keep(self, rows):
        self.rows = [self.rows[row] for row in rows]

    def feed(self, pending):
        self.rows = [row + ids for row, ids in zip(self.rows, pending, strict=True)]
        logits = torch.full((len(self.rows), len(self.policy.tokenizer)), -math.inf)
        for row, ids in enumerate(self.rows):
            logits[row, self.next(self.policy.tokenizer.decode(ids))] = 0.0
        return logits

    def next(self, text):
        page, _, answer = text.rpartition("<|user|>")[2].partition("<|assistant|>")
        a, b, c = (int(digit) for digit in page.split()[-3:])
        thought, mark, said = answer.partition(" so")
        once = ["sum", str(a), str((a + b) % 5), str((a + b + c) % 5)]
        wanted, written = once * self.passes, thought.split()
        assert written == wanted[: len(written)]
        if not mark:
            word = wanted[len(written)] if len(written) < len(wanted) else "so"
            return self.policy.encode(" " * (bool(written) or word == "so") + word)
        known = len(written) > 2
        choices = [once[3]] if known else [str(x) for x in range(5)]
        words = [["go"], choices, ["<end>"]][len(said.split())]
        return [self.policy.end_id if w == "<end>" else self.policy.encode(f" {w}")[0] for w in words]


def minds(searcher, monkeypatch, passes, context=80, episodes=40, **flags):
    """Success, right hops and turns, means over episodes."""
    monkeypatch.setattr("utils.Decoder", Mind)
    monkeypatch.setattr(Mind, "passes", passes)
    budget, args = budget_for(searcher, context_limit=context, max_turns=4, **flags)
    played = play(searcher, budget, args, [ThinkSearch() for _ in range(episodes)], list(range(episodes)))
    searcher.context_length = 1024
    return (np.mean([e.success for e in played]), np.mean([e.info["right_hops"] for e in played]),
            np.mean([len(e.turns) for e in played]), played, budget)


@pytest.mark.parametrize("passes,flags,success,hops", [
    (0, {"cap": "turn"}, 0, 0.25), (1, {"cap": "none"}, 1, 4), (2, {"cap": "none"}, 1, 4),
    (3, {"cap": "none"}, 0, 3), (3, {"cap": "context"}, 0.2, 3.2), (4, {"cap": "none"}, 0, 3),
    (4, {"cap": "turn", "thought_cap": 8}, 1, 4), (4, {"cap": "turn", "thought_cap": 2}, 0, 0.25),
    (4, {"cap": "episode", "thought_cap": 8}, 0.04, 2.24), (4, {"cap": "none", "drop_thoughts": True}, 1, 4),
    (4, {"cap": "turn", "thought_cap": 3, "drop_thoughts": True}, 1, 4)])
def test_who_finishes_in_a_context_of_80(searcher, monkeypatch, passes, flags, success, hops):
    """The same sums as with words counted by hand: a word is a token. 40 episodes, 4 sigma.

    Guesses at every hop: .2 + .04 + .008 + .0016 right hops. A pot of 32 is spent after two turns.
    """
    got, right, *_ = minds(searcher, monkeypatch, passes, **flags)
    exact = success in (0, 1)
    assert got == success if exact and passes else abs(got - success) < 4 * (0.16 / 40) ** 0.5
    assert right == hops if exact and passes and hops > 1 else abs(right - hops) < 4 * (0.4 / 40) ** 0.5


@pytest.mark.parametrize("passes,enough", [(1, 57), (2, 73), (3, 89), (4, 105)])
def test_the_context_that_a_mind_needs(searcher, monkeypatch, passes, enough):
    """One less than counted by hand with the end of the last answer, which need not be said."""
    for context in (enough, enough - 1):
        got = minds(searcher, monkeypatch, passes, context, episodes=3, cap="none")
        assert got[0] == (context == enough)
    *_, played, budget = minds(searcher, monkeypatch, passes, enough, episodes=3, cap="none")
    assert [len(e.row()) for e in played] == [enough] * 3
    metrics = budget.metrics(played)
    assert metrics["thought_tokens"] == 4 * passes + 1 and metrics["forced_closes"] == 0


# --- what a run reports --------------------------------------------------------------------------


def hand_made(policy, drop=False):
    """Two episodes: answers closed by force, cut, without a mark, and whole ones."""
    so, end, encode = policy.encode(" so"), [policy.end_id], policy.encode

    def turn(observation, ids, forced, first, invalid=False):
        prompt = policy.head * first + policy.between * (not first) + encode(observation) + policy.tail
        return Turn(observation, "", prompt, first or drop, ids, [0.0] * len(ids), forced,
                    info={"invalid_action": invalid})
    one = [turn("hops 2 page 1 1 1", encode("sum 1 2") + so + encode(" go 3") + end, {3}, True),
           turn("page 0 1 1", encode("sum 0 1 2") + so + encode(" go 2") + end, {7}, False)]
    two = [turn("hops 4 page 3 4 2", so + encode(" 4") + end, {0}, True, invalid=True),
           turn("page 3 4 2", encode("sum 3") + end, set(), False, invalid=True),
           turn("page 3 4 2", so + encode(" go 4") + end, set(), False)]
    return [Episode(0, "", one, info={"success": True, "right_hops": 2, "hops": 2}, terminated=True),
            Episode(1, "", two, info={"right_hops": 1, "hops": 4, "at_limit": True, "extended": True},
                    truncated=True)]


def test_lengths_and_what_is_remembered_by_hand(searcher):
    budget, _ = budget_for(searcher)
    turns = [turn for e in hand_made(searcher) for turn in e.turns]
    assert [budget.thought_length(turn) for turn in turns] == [3, 5, 0, 3, 1]
    assert [turn.num_sampled for turn in turns] == [6, 7, 2, 3, 4]
    shown = [searcher.tokenizer.decode(budget.without_thought(turn)) for turn in turns]
    assert shown == [" go 3<|end|>", " go 2<|end|>", " 4<|end|>", "<|end|>", " go 4<|end|>"]
    so = searcher.encode(" so")
    for ids, left in ((searcher.encode("sum 3"), []), (so, []), (so + [searcher.end_id], [searcher.end_id])):
        assert budget.without_thought(Turn("", "", token_ids=ids)) == left


def test_what_a_run_reports_by_hand(searcher):
    budget, _ = budget_for(searcher, final_reserve=10)
    got = budget.metrics(hand_made(searcher))
    assert got == pytest.approx({
        "thought_tokens": 2.4, "thought_tokens_p90": 4.2, "forced_closes": 0.4, "invalid_after_forced": 0.5,
        "rounds": 1.5, "rounds_completed": 0.625, "thought_share": (8 / 29 + 4 / 30) / 2, "history_cost": 4.5,
        "at_limit": 0.5, "extended": 0.5, "tokens_per_success": 22.0,
        "rounds_that_fit": 7})  # (100 - 1 - 10) / (2.4 + 2 + 4.8 + 2) = 7.9
    budget, _ = budget_for(searcher, final_reserve=10, drop_thoughts=True)
    got = budget.metrics(hand_made(searcher, drop=True))
    assert got["thought_share"] == pytest.approx((5 / 14 + 1 / 10) / 2)
    assert got["rounds_that_fit"] == 9, "(89 - 2.4) / 8.8 = 9.8"
    failed = hand_made(searcher)[1:]
    assert budget.metrics(failed)["tokens_per_success"] == 9 and budget.metrics(failed)["rounds_completed"] == 0.25


def test_history_cost_by_hand(searcher):
    budget, _ = budget_for(searcher)
    turn = hand_made(searcher)[0].turns[0]
    cost = [budget.metrics([Episode(0, "", [turn] * n, terminated=True)])["history_cost"] for n in (40, 80)]
    assert cost == [820, 3240] and cost[1] / cost[0] == pytest.approx(3.951219, abs=1e-6)


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 2, "warm_start_steps": 5, "num_iterations": 2, "eval_episodes": 4,
         "eval_every": 1, "print_samples": 0, "learning_rate": 1e-3}
TURNS = QUICK | {"env_id": "tests/Words-v0", "env_kwargs": '{"max_turns": 12}', "max_turns": 12, "thought_cap": 3,
                 "context_limit": 320, "num_prompts": 4, "eval_episodes": 8, "warm_start_steps": 1}


@pytest.fixture
def few(monkeypatch):
    """A start policy that has seen 64 demonstrations."""
    monkeypatch.setattr("policies.NUM_DEMONSTRATIONS", 64)


def table(folder):
    """metrics.csv as numbers, without the seconds."""
    [path] = folder.glob("*/metrics.csv")
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(file)]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    return rows


@pytest.mark.parametrize("flags", [
    {"cap": "none", "reward_option": "hinge", "context_limit": 60}, {"cap": "context", "drop_thoughts": True},
    {"cap": "episode", "final_reserve": 3, "num_epochs": 2}, {"cap": "turn", "kl_coefficient": 0.1},
    {"cap": "turn", "thought_cap": 4, "drop_thoughts": True, "divide_by_turns": True, "reward_option": "window"},
    {"cap": "turn", "thought_cap": 4, "turn_limit": "dynamic", "reminder": True, "max_turns": 12, "context_limit": 320,
     "warm_start_steps": 1, "env_kwargs": '{"regime": "turns", "max_turns": 12}'}])
def test_every_arm_runs(flags, tmp_path, few):
    summary = main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    assert summary["iterations"] == 2 and 0 <= summary["success_end"] <= 1
    rows = table(tmp_path)
    limits = [(row["turn_limit_first"], row["turn_limit_last"]) for row in rows[1:]]
    assert len(rows) == 3 and limits[0] == limits[1] and limits[0][0] <= limits[0][1] <= flags.get("max_turns", 4)
    assert ("turn_limit" in flags) or limits[0] == (4, 4)
    assert (rows[1]["train_forced_closes"] == 0) == (flags["cap"] == "none")
    assert all((row["eval_forced_closes"] == 0) == (flags["cap"] == "none") for row in rows)
    assert all(row["train_thought_tokens"] <= flags.get("thought_cap", 99) for row in rows[1:])
    [samples] = tmp_path.glob("*/samples.jsonl")
    said = samples.read_text()
    assert "</think>" not in said and (" so" in said or flags["cap"] == "none"), "the mark is that of the game"


@pytest.fixture
def recorded(few, monkeypatch):
    """What runs collect, evaluate and train on: lists of (iteration, episodes), episodes, batches."""
    collected, evaluated, batches = [], [], []

    def collect(policy, envs, args, iteration, **options):
        limits = [env.limits for env in envs]
        assert limits.count(limits[0]) == len(envs)
        collected.append((iteration, limits[0], collect_groups(policy, envs, args, iteration, **options)))
        return collected[-1][2]

    def evaluation(policy, envs, args, **options):
        metrics, episodes = evaluate(policy, envs, args, **options)
        evaluated.append((envs[0].limits, episodes))
        return metrics, episodes

    def train(policy, reference, optimizer, batch, args):
        batches.append(dict(batch))
        return update(policy, reference, optimizer, batch, args)
    monkeypatch.setattr("algos.turn_budget.collect_groups", collect)
    monkeypatch.setattr("algos.turn_budget.evaluate", evaluation)
    monkeypatch.setattr("algos.turn_budget.update", train)
    return collected, evaluated, batches


def slow_scores(episode, so, option):
    """Eq. 6 with a coefficient of .1 and a target of 4 tokens, turn by turn."""
    lengths = []
    for turn in episode.turns:
        end = thought_end(turn.token_ids, so)
        ids = range(len(turn.token_ids) if end is None else end)
        lengths.append(sum(n not in turn.forced for n in ids))
    total, count = sum(turn.num_sampled for turn in episode.turns), len(episode.turns)
    reward = sum(turn.reward for turn in episode.turns)
    if option == "overrun":
        return reward - 0.1 * sum(max(0, n - 4) / 4 for n in lengths)
    if option == "window":
        return reward - 0.1 * sum(min(1, max(0, (n - 2) / 2)) for n in lengths) / count
    if option == "turns":
        return reward - 0.1 * max(0, (count - 3) / 3)
    return reward - 0.1 * abs(total - 4) if option == "target" else reward


@pytest.mark.parametrize("option,divide,drop,epochs,kl", [
    ("none", False, False, 1, 0.1), ("overrun", True, True, 2, 0.0), ("window", False, True, 1, 0.0),
    ("turns", True, False, 1, 0.0), ("target", False, False, 1, 0.0)])
def test_a_run_trains_on_what_a_slow_loop_says(tmp_path, recorded, option, divide, drop, epochs, kl):
    """Score, advantage and minibatch of every sampled token; any text is an action and may pay."""
    collected, _, batches = recorded
    flags = QUICK | {"env_id": "tests/Words-v0", "num_prompts": 4, "group_size": 3, "max_turns": 6,
                     "context_limit": 200, "thought_cap": 6, "num_iterations": 1}
    main(Args(**flags, run_dir=str(tmp_path), reward_option=option, divide_by_turns=divide, drop_thoughts=drop,
              coefficient=0.1, target_tokens=4, num_epochs=epochs, kl_coefficient=kl))
    [(iteration, limits, episodes)] = collected
    assert iteration == 0 and limits == (6, 6) and len(batches) == 2 * epochs
    tokenizer = transformers.AutoTokenizer.from_pretrained(next(tmp_path.glob("*/checkpoint")))
    so = tokenizer("</think>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(so) > 1
    tokens, counts, silent = {}, [], 0
    for part in (0, 1):
        rows = []
        for group in (g for g in range(4) if g % 2 == part):
            members = episodes[3 * group : 3 * group + 3]
            scores = [slow_scores(e, so, option) for e in members]
            spread = np.std(scores, ddof=1)
            silent += spread < 1e-6
            for e, score in zip(members, scores, strict=True):
                advantage = (score - np.mean(scores)) / (spread + 1e-6) if spread > 1e-6 else 0.0
                advantage /= len(e.turns) if divide else 1
                for turn in e.turns:
                    rows += [advantage] * turn.num_sampled
        for batch in batches[part::2]:
            mask = batch["turn_id"] >= 0
            assert batch["advantages"][mask].tolist() == pytest.approx(rows, abs=1e-4) and any(rows)
            assert (batch["advantages"][~mask] == 0).all()
        counts.append(len(batches[part]["tokens"]))
        tokens[part] = len(rows)
    assert sum(counts) == (sum(len(e.turns) for e in episodes) if drop else 12)
    [_, row] = table(tmp_path)
    assert row["generated_tokens"] == sum(tokens.values()) == sum(t.num_sampled for e in episodes for t in e.turns)
    assert row["score"] == pytest.approx(np.mean([slow_scores(e, so, option) for e in episodes]), abs=1e-4)
    assert row["train_tokens_per_turn"] == pytest.approx(np.mean([t.num_sampled for e in episodes for t in e.turns]))
    assert row["optimizer_steps"] == 2 * epochs and row["groups_without_signal"] == silent / 4
    assert (row["kl_policy_ref_k3"] > 1e-7) == (kl > 0) and abs(row["loss"]) < 5


@pytest.mark.parametrize("kind,start,end", [("fixed", 20, 60), ("dynamic", 20, 60), ("dynamic", 90, 40)])
def test_turn_limits_come_from_a_pilot_and_stay(tmp_path, recorded, kind, start, end):
    """Of all its episodes, failures too; the same in evaluations, in a second run and on resume."""
    collected, evaluated, _ = recorded
    flags = TURNS | {"turn_limit": kind, "start_percentile": float(start), "end_percentile": float(end),
                     "reminder": True}
    main(Args(**flags, run_dir=str(tmp_path / "one")))
    (number, limits, pilot), *rest = collected
    assert (number, limits) == (PILOT, (12, 12)) and [n for n, *_ in rest] == [0, 1]
    assert {e.turns[0].observation.split(" ", 2)[2] for e in pilot} == {"left 12"}
    counts = [len(e.turns) for e in pilot]
    last = int(np.percentile(counts, end))
    first = min(last, int(np.percentile(counts, start))) if kind == "dynamic" else last
    assert len(counts) == 8 and last < 12 and (first < last) == (start < end and kind == "dynamic")
    assert {limits for _, limits, _ in rest} == {limits for limits, _ in evaluated} == {(first, last)}
    assert len(evaluated) == 3
    for episodes in [e for *_, e in rest] + [e for _, e in evaluated]:
        assert max(len(e.turns) for e in episodes) <= last
        for e in episodes:
            assert e.turns[0].observation.endswith(f" left {first}")
            assert e.info["at_limit"] == (len(e.turns) == last and not e.terminated)
    rows = table(tmp_path / "one")
    assert {(r["turn_limit_first"], r["turn_limit_last"]) for r in rows[1:]} == {(first, last)}
    if first < last:
        main(Args(**flags, run_dir=str(tmp_path / "two")))
        assert table(tmp_path / "two") == rows
        [folder] = (tmp_path / "two").glob("*")
        main(Args(**(flags | {"num_iterations": 3}), run_dir=str(tmp_path / "two"), resume=str(folder)))
        again = table(tmp_path / "two")
        assert again[:3] == rows and (again[3]["turn_limit_first"], again[3]["turn_limit_last"]) == (first, last)


def test_equal_percentiles_make_a_dynamic_limit_a_fixed_one(tmp_path, few):
    flags = TURNS | {"num_iterations": 1, "start_percentile": 50.0, "end_percentile": 50.0}
    for kind in ("fixed", "dynamic"):
        main(Args(**flags, turn_limit=kind, run_dir=str(tmp_path / kind)))
    rows = table(tmp_path / "fixed")
    assert rows == table(tmp_path / "dynamic") and rows[1]["train_at_limit"] > 0


def test_an_option_that_weighs_nothing_is_none(tmp_path, few):
    for option, coefficient in (("none", 1.0), ("hinge", 0.0)):
        main(Args(**(QUICK | {"num_iterations": 1}), reward_option=option, coefficient=coefficient,
                  run_dir=str(tmp_path / option)))
    assert table(tmp_path / "none") == table(tmp_path / "hinge")


@pytest.mark.parametrize("flags,needle", [
    ({"group_size": 1}, "--group-size"), ({"context_limit": 8}, "no prompt leaves room"),
    ({"thought_cap": 0}, "--thought-cap"), ({"context_limit": 0}, "--context-limit")])
def test_bad_flags_get_one_line(flags, needle, tmp_path, capsys, few):
    with pytest.raises(SystemExit) as end:
        main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and needle in lines[0]
