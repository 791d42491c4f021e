"""The pages' rules and the scripted player. How many hops a context allows: test_turn_budget.py."""

import gymnasium as gym
import numpy as np
import pytest

from envs.episodes import demonstrations
from envs.think_search import REGIMES, ThinkSearch

PAGES = [[3, 4, 2], [0, 1, 1], [4, 4, 4], [0, 0, 0]]  # sums modulo 5: 4 2 2 0
STRANGE = [[1, 0, 0], [2, 2, 2], [3, 3, 3], [0, 4, 4], [1, 2, 3], [4, 3, 2]]  # 1 1 4 3 1 4


def think(pages=PAGES, **kwargs) -> ThinkSearch:
    env = ThinkSearch(**kwargs)
    env.reset(seed=0)
    env.start(pages, STRANGE)
    return env


def kinds(env, *actions):
    """(kind, right hops) of every action; the last one must not have been refused."""
    infos = [env.step(action)[4] for action in actions]
    return [(info["kind"], info["right_hops"]) for info in infos]


# --- rules ---------------------------------------------------------------------------------------
def test_the_whole_chain_step_by_step():
    env = think(format_penalty=0.5)
    assert env.step(" so go 4") == ("page 0 1 1", 0.0, False, False, {
        "success": False, "invalid_action": False, "kind": "hop", "right_hops": 1, "hops": 4})
    assert env.step("sum 0 1 2 so go 2")[0] == "page 4 4 4"
    assert env.step("anything at all so go 2")[0] == "page 0 0 0"
    assert env.step("1 + 1 = 2 so go 0") == ("", 1.0, True, False, {
        "success": True, "invalid_action": False, "kind": "hop", "right_hops": 4, "hops": 4})
    with pytest.raises(gym.error.ResetNeeded):
        env.step(" so go 0")


def test_a_wrong_hop_is_not_told_and_cannot_be_made_good():
    env = think(max_turns=6)
    assert kinds(env, " so go 4") == [("hop", 1)]
    observation, reward, terminated, truncated, info = env.step(" so go 3")
    assert (observation, reward, terminated, truncated) == ("page 1 0 0", 0.0, False, False)
    assert (info["kind"], info["right_hops"], info["invalid_action"]) == ("wrong", 1, False)
    for page, right in (("page 2 2 2", 1), ("page 3 3 3", 1), ("page 0 4 4", 4)):
        assert env.step(f" so go {right}")[0] == page, "the right sum of a strange page leads on"
    assert env.render() == "page 0 4 4"
    observation, reward, terminated, truncated, info = env.step(" so go 3")
    assert (observation, reward, terminated, truncated) == ("", 0.0, False, True)
    assert (info["kind"], info["right_hops"], info["success"]) == ("wrong", 1, False)


def test_every_turn_may_be_a_wrong_hop():
    """As many strange pages as turns, all of them shown but the last."""
    env = ThinkSearch("turns", max_turns=12)
    env.reset(seed=3)
    wrong, strange = (sum(env.pages[0]) + 1) % 5, list(env.strange)
    assert len(strange) == 12
    shown = [env.step(f" so go {wrong}")[0] for _ in range(12)]
    assert shown == ["page " + " ".join(map(str, page)) for page in strange[:11]] + [""]
    assert env.ended


@pytest.mark.parametrize("action", [
    "", "so", "go 4", "so go 4", "sum 3 2 4", "sum 3 2 4 so", "sum so4 go 4", "x so  ", "x so go",
    "x so go 5", "x so go -1", "x so go 04", "x so go four", "x so go 4 4", "x so go 4.", "x so look 4",
    "x so look so go 4", "x SO go 4", "x so GO 4", "x so go ４", "x also go 4", "x so go 4 so go 4"])
def test_an_unreadable_action_costs_a_turn_and_the_penalty_and_shows_the_same_page(action):
    env = think(max_turns=6, look=0.3, format_penalty=0.25)
    assert env.step(action) == ("unknown page 3 4 2", -0.25, False, False, {
        "success": False, "invalid_action": True, "kind": "unreadable", "right_hops": 0, "hops": 4})
    assert kinds(env, " so go 4") == [("hop", 1)] and env.turn == 2
    assert env.step(action)[0] == "unknown page 0 1 1"
    last = think(max_turns=4, look=0.3, format_penalty=0.25)
    last.turn = 3
    assert last.step(action)[:4] == ("", -0.25, False, True)


@pytest.mark.parametrize("action", [" so go 4", "sum 3 2 4 so go 4", "x so  go   4 ", "x so \tgo\n4", "\n so go 4"])
def test_what_stands_before_the_first_so_is_free(action):
    assert kinds(think(), action) == [("hop", 1)]


def test_looking_is_a_turn_and_nothing_else():
    env = think(max_turns=6, look=0.3, format_penalty=0.25)
    assert env.step("x so look") == ("page 3 4 2", 0.0, False, False, {
        "success": False, "invalid_action": False, "kind": "look", "right_hops": 0, "hops": 4})
    rest = [" so go 4", " so look", " so go 2", " so look", " so go 2"]
    assert kinds(env, *rest) == [("hop", 1), ("look", 1), ("hop", 2), ("look", 2), ("hop", 3)]
    assert env.ended and env.turn == 6
    assert kinds(think(), "x so look") == [("unreadable", 0)], "only where it is allowed"


def test_the_last_right_hop_on_the_last_turn_is_a_termination():
    env = think(max_turns=5)
    assert kinds(env, "?", " so go 4", " so go 2", " so go 2") == [
        ("unreadable", 0), ("hop", 1), ("hop", 2), ("hop", 3)]
    assert env.step(" so go 0")[1:4] == (1.0, True, False)
    env = think(max_turns=5)
    kinds(env, "?", "?", " so go 4", " so go 2")
    assert env.step(" so go 2")[1:4] == (0.0, False, True), "one turn short"


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_and_what_a_reset_shows(regime):
    """Digits are uniform: each of the five within 5 sigma of a fifth."""
    low, high, turns, look, slip = REGIMES[regime]
    env, hops, digits = ThinkSearch(regime), [], []
    assert (env.min_hops, env.max_hops, env.max_turns, env.look, env.slip) == (low, high, turns, look, slip)
    own = ThinkSearch(regime, min_hops=1, max_hops=1, max_turns=1, look=0.0, slip=0.5)
    assert (own.min_hops, own.max_hops, own.max_turns, own.look, own.slip) == (1, 1, 1, 0.0, 0.5)
    for seed in range(1500):
        observation, info = env.reset(seed=seed)
        hops.append(len(env.pages))
        assert observation == f"hops {hops[-1]} page " + " ".join(map(str, env.pages[0]))
        assert info == {"success": False, "invalid_action": False, "kind": "page", "right_hops": 0, "hops": hops[-1]}
        assert {len(page) for page in env.pages + env.strange} == {3} and observation in env.observation_space
        digits += sum(env.pages + env.strange, [])
    frequency = np.bincount(digits) / len(digits)
    assert len(frequency) == 5 and np.abs(frequency - 0.2).max() < 5 * (0.16 / len(digits)) ** 0.5
    assert set(hops) == set(range(low, high + 1))


# --- the scripted player -------------------------------------------------------------------------
def test_the_scripted_player_names_the_right_page_and_thinks_one_to_ten_times():
    """1,200 turns: each number of passes within 5 sigma of a tenth."""
    env, rng, passes = ThinkSearch(), np.random.default_rng(0), []
    for episode in demonstrations(env, list(range(300)), 4, rng):
        assert episode.success and len(episode.turns) == 4 and episode.total_reward == 1.0
        for turn in episode.turns:
            a, b, c = (int(digit) for digit in turn.observation.split()[-3:])
            once = f"sum {a} {(a + b) % 5} {(a + b + c) % 5}"
            thought, _, command = turn.action.partition(" so ")
            passes.append(len(thought.split()) // 4)
            assert thought == " ".join([once] * passes[-1]) and command == f"go {(a + b + c) % 5}"
    counts = np.bincount(passes, minlength=11)
    assert counts[0] == 0 and len(counts) == 11 and counts.sum() == 1200
    assert np.abs(counts[1:] / 1200 - 0.1).max() < 5 * (0.09 / 1200) ** 0.5
    single = demonstrations(ThinkSearch(max_passes=1), list(range(20)), 4, rng)
    assert all(len(turn.action.split()) == 7 for episode in single for turn in episode.turns)


def test_the_scripted_player_looks_in_three_turns_of_ten():
    """Each look costs a turn; what it names is right all the same. 5 sigma."""
    env = ThinkSearch("turns", max_turns=16, slip=0.0)
    episodes = demonstrations(env, list(range(300)), 16, np.random.default_rng(1))
    said = [turn.info["kind"] for episode in episodes for turn in episode.turns]
    assert set(said) == {"hop", "look"}
    assert abs(said.count("look") / len(said) - 0.3) < 5 * (0.21 / len(said)) ** 0.5
    assert np.mean([episode.success for episode in episodes]) > 0.99
    never = demonstrations(ThinkSearch("turns", look=0.0, slip=0.0), list(range(50)), 12, np.random.default_rng(1))
    assert all(len(e.turns) == e.start_info["hops"] and e.success for e in never)


def test_the_scripted_player_slips_in_the_last_sum_of_every_twentieth_hop():
    """It goes where its thought says, to each of the four wrong pages alike. 5 sigma."""
    off = []
    for regime, slip, share in (("turns", None, 0.05), ("turns", 0.5, 0.5), ("thoughts", None, 0.0)):
        env = ThinkSearch(regime, look=0.0, slip=slip)
        played = demonstrations(env, list(range(1500)), 4, np.random.default_rng(2))
        slips = 0
        for turn in (turn for e in played for turn in e.turns):
            a, b, c = (int(digit) for digit in turn.observation.split()[-3:])
            thought, _, command = turn.action.partition(" so ")
            first, said = thought.split()[:4], int(command.split()[1])
            assert first == ["sum", str(a), str((a + b) % 5), str(said)] and thought.split()[-4:] == first
            off += [(said - a - b - c) % 5] * (said != (a + b + c) % 5)
            slips += said != (a + b + c) % 5
        count = sum(len(e.turns) for e in played)
        assert abs(slips / count - share) <= 5 * (share * (1 - share) / count) ** 0.5
    played = demonstrations(ThinkSearch("turns"), list(range(1500)), 8, np.random.default_rng(2))
    assert abs(np.mean([e.success for e in played]) - 0.87) < 0.03, "docs/envs.md"
    counts = np.bincount(off, minlength=5)
    assert counts[0] == 0 and np.abs(counts[1:] / len(off) - 0.25).max() < 5 * (0.1875 / len(off)) ** 0.5
