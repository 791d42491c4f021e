"""The pages' rules, and scripted walkers: some thought is needed, too much starves later turns."""

import itertools

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
    low, high, turns, look = REGIMES[regime]
    env, hops = ThinkSearch(regime), []
    assert (env.min_hops, env.max_hops, env.max_turns, env.look) == (low, high, turns, look)
    for seed in range(60):
        observation, info = env.reset(seed=seed)
        words = observation.split()
        hops.append(int(words[1]))
        assert words[0] == "hops" and words[2] == "page" and words[3:] == [str(d) for d in env.pages[0]]
        assert info == {"success": False, "invalid_action": False, "kind": "page", "right_hops": 0,
                        "hops": hops[-1]}
        assert len(env.pages) == hops[-1] and observation in env.observation_space
        digits = np.array(env.pages + env.strange)
        assert digits.shape[1] == 3 and digits.min() >= 0 and digits.max() <= 4
    assert set(hops) == set(range(low, high + 1))


def test_digits_are_uniform():
    """60,000 digits: each of the five within 5 sigma of a fifth."""
    env, digits = ThinkSearch(), []
    for seed in range(2500):
        env.reset(seed=seed)
        digits += sum(env.pages + env.strange, [])
    frequency = np.bincount(digits, minlength=5) / len(digits)
    assert len(digits) == 2500 * 24 and np.abs(frequency - 0.2).max() < 5 * (0.16 / 60000) ** 0.5


def test_settings_override_the_regime():
    env = ThinkSearch("turns", min_hops=1, max_hops=1, max_turns=1, look=0.0)
    assert (env.min_hops, env.max_hops, env.max_turns, env.look) == (1, 1, 1, 0.0)
    env.reset(seed=0)
    assert env.step("x so look")[3] and env.render() == env.page()


# --- the scripted player -------------------------------------------------------------------------
def test_the_scripted_player_names_the_right_page_and_thinks_one_to_four_times():
    """1,200 turns: each number of passes within 5 sigma of a quarter."""
    env, rng, passes = ThinkSearch(), np.random.default_rng(0), []
    for episode in demonstrations(env, list(range(300)), 4, rng):
        assert episode.success and len(episode.turns) == 4 and episode.total_reward == 1.0
        for turn in episode.turns:
            a, b, c = (int(digit) for digit in turn.observation.split()[-3:])
            once = f"sum {a} {(a + b) % 5} {(a + b + c) % 5}"
            thought, _, command = turn.action.partition(" so ")
            passes.append(len(thought.split()) // 4)
            assert thought == " ".join([once] * passes[-1]) and command == f"go {(a + b + c) % 5}"
    counts = np.bincount(passes, minlength=5)
    assert counts[0] == 0 and len(counts) == 5 and counts.sum() == 1200
    assert np.abs(counts[1:] / 1200 - 0.25).max() < 5 * (0.1875 / 1200) ** 0.5
    single = demonstrations(ThinkSearch(max_passes=1), list(range(20)), 4, rng)
    assert all(len(turn.action.split()) == 7 for episode in single for turn in episode.turns)


def test_the_scripted_player_looks_in_three_turns_of_ten():
    """Each look costs a turn; what it names is right all the same. 5 sigma."""
    episodes = demonstrations(ThinkSearch("turns", max_turns=16), list(range(300)), 16, np.random.default_rng(1))
    said = [turn.info["kind"] for episode in episodes for turn in episode.turns]
    assert set(said) == {"hop", "look"}
    assert abs(said.count("look") / len(said) - 0.3) < 5 * (0.21 / len(said)) ** 0.5
    assert np.mean([episode.success for episode in episodes]) > 0.99
    never = demonstrations(ThinkSearch("turns", look=0.0), list(range(50)), 12, np.random.default_rng(1))
    assert all(len(e.turns) == e.start_info["hops"] and e.success for e in never)


# --- walkers in a context of fixed length --------------------------------------------------------
# One word is one token. A message has two more (who speaks, whose turn it is); an answer is a
# thought, "so", "go", X and its end. The walker can do one addition per word that it writes, the X
# included: with two partial sums on paper it is right, with fewer it guesses.


def walk(passes, guesses, context=80, cap=None, force=True, drop=False, seed=0):
    """An episode with `passes` passes per thought: (success, right hops, turns, words of context)."""
    env, guesses, shown = ThinkSearch(), iter(guesses), 0
    observation, info = env.reset(seed=seed)
    end, turns, used, fullest = False, 0, 0, 0
    while not end:
        used = shown + 2 + len(observation.split())
        if used + 4 > context:  # no answer fits
            break
        a, b, c = env.digits()
        thought = ["sum", str(a), str((a + b) % 5), str((a + b + c) % 5)] * passes
        room = context - used - 4
        if len(thought) > room and not force:
            break  # it fills the context before it has said anything
        thought = thought[: min(room, len(thought) if cap is None else cap)]
        sums = max([len(part.split()) for part in " ".join(thought).split("sum")], default=0)
        guess = next(guesses, 0)
        answer = (a + b + c) % 5 if sums >= 2 else guess
        fullest = max(fullest, used + len(thought) + 4)
        shown = used + (3 if drop else len(thought) + 4)  # "go", X and the end stay in any case
        observation, _, terminated, truncated, info = env.step(" ".join([*thought, " so go", str(answer)]))
        turns, end = turns + 1, terminated or truncated
    return info["success"], info["right_hops"], turns, fullest


def success_rate(passes, **options) -> float:
    """Over all 5^4 ways to guess four times: no sampling error."""
    every = [walk(passes, guesses, **options)[0] for guesses in itertools.product(range(5), repeat=4)]
    return sum(every) / 625


def test_a_pass_is_needed_and_four_do_not_fit():
    """Worked by hand, 80 words: the first message has 8, the others 6, an answer 4 + 4 per pass.

    one pass:     8 + 8 = 16, 22 + 8 = 30, 36 + 8 = 44, 50 + 8 = 58
    two passes:   8 + 12 = 20, 26 + 12 = 38, 44 + 12 = 56, 62 + 12 = 74
    three passes: 8 + 16 = 24, 30 + 16 = 46, 52 + 16 = 68, 74 + 16 = 90: two words of thought at most
    four passes:  8 + 20 = 28, 34 + 20 = 54, 60 + 20 = 80, and the fourth message does not fit
    """
    assert walk(1, []) == (True, 4, 4, 58) and walk(2, []) == (True, 4, 4, 74)
    assert walk(3, [], force=False) == (False, 3, 3, 68) and walk(3, [])[2:] == (4, 80)
    assert walk(4, []) == walk(4, [], force=False) == (False, 3, 3, 80)
    rates = {passes: success_rate(passes) for passes in range(5)}
    assert rates == {0: 1 / 625, 1: 1.0, 2: 1.0, 3: 1 / 5, 4: 0.0}
    assert success_rate(3, force=False) == 0.0, "without a close by force not even a guess"


@pytest.mark.parametrize("cap,rate", [(0, 1 / 625), (1, 1 / 625), (2, 1 / 625), (3, 1.0), (4, 1.0), (6, 1.0),
                                      (8, 1.0), (9, 1.0), (11, 1.0), (12, 1 / 5), (13, 0.0), (16, 0.0)])
def test_a_cap_helps_a_walker_that_thinks_too_much_unless_it_cuts_the_only_pass(cap, rate):
    """Where the fourth message ends, of 80 words: cap 9: 65; 11: 71, 5 words of thought are left;
    12: 74, 2 are left; 13: 77, no answer fits.
    """
    assert success_rate(4, cap=cap) == rate


def test_dropped_thoughts_leave_room_for_every_turn():
    """Four passes: 8 + 20 = 28; 8 + 3 + 6 = 17 + 20 = 37, 26 + 20 = 46, 35 + 20 = 55."""
    assert walk(4, [], drop=True) == (True, 4, 4, 55)
    assert success_rate(4, drop=True) == 1.0 and success_rate(0, drop=True) == 1 / 625
    assert [walk(4, [], drop=True, force=False, context=c)[1] for c in (55, 54, 45, 36, 27)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("passes,enough", [(1, 58), (2, 74), (3, 90), (4, 106)])
def test_how_long_a_context_must_be(passes, enough):
    for context in (enough, enough - 1):
        assert walk(passes, [], context=context, force=False)[0] == (context == enough)


