"""RetryMath: every problem has one answer, feedback says no more than wrong; numbers worked by hand."""

import re
import zlib
from collections import Counter

import numpy as np
import pytest

from envs.retry_math import NO_ANSWER, TRY_AGAIN, RetryMath, parse_answer
from envs.text_env import EVALUATION_SEEDS


def say(number) -> str:
    return f"<answer>{number}</answer>"


def posed(answer=3, candidates=(0, 6), **kwargs) -> RetryMath:
    """An environment whose problem has this answer."""
    env = RetryMath(**kwargs)
    env.reset(seed=0)
    env.start("a problem", answer, "1", candidates)
    return env


# --- the answer ----------------------------------------------------------------------------------
@pytest.mark.parametrize("text,number", [
    ("<answer>12</answer>", "12"), ("<answer> 012 </answer>", "12"), ("so <answer>+7</answer>", "7"),
    ("<answer>-0</answer>", "0"), ("<answer>-30</answer> I think\nso", "-30"), ("a\n<answer>\n5\n</answer>", "5"),
    ("</ answer> <answer>999999</answer><ANSWER>", "999999")])
def test_an_answer_is_read_from_its_tags(text, number):
    assert parse_answer(text) == number


@pytest.mark.parametrize("text", [
    "12", "<answer></answer>", "<answer> </answer>", "<answer>12", "12</answer>", "</answer>12<answer>",
    say(1) + say(2), say(1) + "<answer>", say(1) + "</answer>", "<answer>" + say(1), say("1||2"), say("1 2"),
    say("3.0"), say("6*7"), say(1234567), say("9" * 5000), say("\u0663"), say("\u00b2"), say("\uff13"), say("\u00a05"),
    say("--5"), say("- 5"), say("1_0"), say("0x1"), say("1e3"),
    "<Answer>5</Answer>", "<answer >5</answer>", ""])
def test_anything_else_is_malformed(text):
    assert parse_answer(text) is None
    env = posed()
    observation, reward, terminated, truncated, info = env.step(text)
    assert (observation, reward, terminated, truncated) == (NO_ANSWER, -0.1, False, False)
    assert info["submitted"] is None and info["invalid_action"] and not info["success"] and not info["in_range"]


# --- rewards and endings -------------------------------------------------------------------------
def test_the_right_answer_ends_the_episode():
    env = posed()
    observation, reward, terminated, truncated, info = env.step("I say " + say("+03 "))
    assert (observation, reward, terminated, truncated) == ("Correct.", 1.0, True, False)
    assert info == {"success": True, "submitted": "3", "answer": "3", "level": 1, "invalid_action": False,
                    "in_range": True}


@pytest.mark.parametrize("max_answers", [1, 2, 5])
def test_the_last_answer_ends_the_episode_also_if_malformed(max_answers):
    for last, feedback, reward in ((say(9), TRY_AGAIN, 0.0), ("?", NO_ANSWER, -0.1), (say(3), "Correct.", 1.0)):
        env = posed(max_answers=max_answers)
        for n in range(max_answers - 1):
            assert env.step("?" if n % 2 else say(n))[2:4] == (False, False)
        observation, got, terminated, truncated, info = env.step(last)
        assert (observation, got, terminated, truncated) == (feedback, reward, True, False)
        assert info["success"] == (reward == 1)


def test_information_about_the_range_is_about_the_problem():
    env = posed(answer=3, candidates=(1, 9), max_answers=9)
    told = [env.step(say(n))[4]["in_range"] for n in (0, 1, 9, 10, -1)]
    assert told == [False, True, True, False, False]


# --- feedback ------------------------------------------------------------------------------------
@pytest.mark.parametrize("feedback,text", [
    ("unary", TRY_AGAIN), ("blank", ""), ("unary-reward", f"Reward: 0.0\n{TRY_AGAIN}")])
def test_feedback_is_the_same_whatever_was_wrong(feedback, text):
    for level in "123456":
        env = RetryMath(levels=level, max_answers=50, feedback=feedback)
        env.reset(seed=3)
        wrong = [n for n in range(-3, 43) if n != env.answer]
        assert {env.step(say(n))[0] for n in wrong + wrong[:2]} == {text}


def test_feedback_says_whether_the_answer_could_be_read():
    assert [posed(feedback="blank").step(x)[0] for x in ("?", say(3))] == [NO_ANSWER, "Correct."]
    assert [posed(feedback="unary-reward").step(x)[0] for x in ("?", say(3))] == [
        f"Reward: -0.1\n{NO_ANSWER}", "Reward: 1.0\nCorrect."]


def test_the_first_observation_is_the_problem_whatever_the_number_of_answers():
    for seed in range(30):
        first = {RetryMath(max_answers=n, feedback=f).reset(seed=seed)[0] for n in (1, 5, 10) for f in ("unary", "blank")}
        assert len(first) == 1 and first.pop().startswith("Problem: ")
    _, info = RetryMath().reset(seed=1)
    assert info["submitted"] is None and not (info["success"] or info["invalid_action"] or info["in_range"])


def test_the_answers_left_are_shown_if_asked_for():
    env = RetryMath(max_answers=3, show_answers_left=True)
    text, _ = env.reset(seed=1)
    assert text == RetryMath().reset(seed=1)[0] + "\nAnswers left: 3"
    assert env.step(say(-1))[0] == TRY_AGAIN + "\nAnswers left: 2"
    assert env.step("?")[0] == NO_ANSWER + "\nAnswers left: 1" and env.step(say(-1))[0] == TRY_AGAIN


# --- problems ------------------------------------------------------------------------------------
class Every:
    """In place of a generator: goes through all that could be drawn, with its probability."""

    def __init__(self):
        self.path = []  # of [choice, number of choices]

    def integers(self, low, high=None):
        low, high = (0, low) if high is None else (low, high)
        if self.depth == len(self.path):
            self.path.append([0, high - low])
        choice, count = self.path[self.depth]
        assert count == high - low
        self.depth += 1
        return low + choice

    def outcomes(self, draw):
        while True:
            self.depth = 0
            yield draw(), 1 / np.prod([count for _, count in self.path])
            while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


def problems(level):
    """text -> [its right answer and candidates, its probability], over both sides of the split."""
    env, found = RetryMath(levels=level), {}
    env.np_random = Every()
    for (text, *solution), chance in env.np_random.outcomes(lambda: env.draw(level)):
        assert found.setdefault(text, [solution, 0])[0] == solution
        found[text][1] += chance
    return found


@pytest.fixture(scope="module")
def all_problems():
    return {level: problems(level) for level in "123456"}


def held_out(text):
    return zlib.crc32(text.encode()) % 5 == 0


def solutions(text):
    """The answers that fit, and the candidates, from the text alone."""
    if m := re.fullmatch(r"\((\d) \* (\d)\) mod (\d) = \?", text):
        a, b, mod = map(int, m.groups())
        assert 2 <= a <= 9 and 2 <= b <= 9 and 3 <= mod <= 9
        return [x for x in range(mod) if (a * b - x) % mod == 0], (0, mod - 1)
    if m := re.fullmatch(r"(\d) \* x \+ (\d) = (\d+)\. x = \?", text):
        a, b, c = map(int, m.groups())
        return [x for x in range(1, 10) if a * x + b == c], (1, 9)
    if m := re.fullmatch(r"\((\d) \* x \+ (\d)\) mod (\d) = (\d)\. x = \?", text):
        a, b, mod, c = map(int, m.groups())
        assert mod in (5, 7) and c < mod
        return [x for x in range(mod) if (a * x + b - c) % mod == 0], (0, mod - 1)
    if m := re.fullmatch(r"([a-z]+) [a-z]+s = \?", text):
        words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
                 "eleven": 11, "twelve": 12, "twenty": 20} | dict(zip(
                     ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"), range(13, 20), strict=True))
        return [words[m[1]]], (1, 20)
    a, sign, b = re.fullmatch(r"(\d+) ([+-]) (\d+) = \?", text).groups()
    if sign == "+":
        return [x for x in range(2, 41) if x == int(a) + int(b)], (2, 40)
    return [x for x in range(30) if x + int(b) == int(a)], (0, 29)


def test_every_problem_has_exactly_one_solution(all_problems):
    for level, found in all_problems.items():
        for text, ((answer, candidates), _) in found.items():
            assert solutions(text) == ([answer], candidates), (level, text)
    counts = {level: (len(found), sum(map(held_out, found))) for level, found in all_problems.items()}
    assert counts == {"1": (448, 95), "2": (360, 73), "3": (394, 86), "4": (400, 77), "5": (455, 104), "6": (240, 48)}


def test_the_sides_of_the_split_share_no_problem_and_levels_are_equally_likely():
    env, texts = RetryMath(levels="123456"), {}
    for first in (0, EVALUATION_SEEDS):
        levels, texts[first] = Counter(), set()
        for seed in range(first, first + 5000):
            text, info = env.reset(seed=seed)
            levels[info["level"]] += 1
            texts[first].add(text)
            problem = text.removeprefix("Problem: ")
            assert solutions(problem)[0] == [int(info["answer"])]
            assert held_out(problem) == (first > 0)
        assert all(abs(levels[level] / 5000 - 1 / 6) < 0.03 for level in range(1, 7))
    assert not texts[0] & texts[EVALUATION_SEEDS]
    assert RetryMath().reset(seed=EVALUATION_SEEDS - 1)[0] not in texts[EVALUATION_SEEDS]


def test_later_problems_stay_on_the_side_of_the_seed_and_levels_are_the_chosen_ones():
    for seed in (7, EVALUATION_SEEDS + 7):
        env = RetryMath()
        env.reset(seed=seed)
        later = [env.reset()[0].removeprefix("Problem: ") for _ in range(40)]
        assert len(set(later)) > 20
        assert set(map(held_out, later)) == {seed >= EVALUATION_SEEDS}
    assert {RetryMath(levels="4").reset(seed=s)[1]["level"] for s in range(20)} == {4}
    assert {RetryMath().reset(seed=s)[1]["level"] for s in range(20)} == {1, 6}


# --- scripted players ----------------------------------------------------------------------------
def test_guessing_without_repeats_on_held_out_problems(all_problems):
    """At once, and within five answers; the averages weigh problems as they are drawn."""
    solved = {}
    for level, found in all_problems.items():
        rows = [(high - low + 1, chance) for text, ((_, (low, high)), chance) in found.items() if held_out(text)]
        sizes, chances = np.array(rows).T
        solved[level] = [np.average(np.minimum(k / sizes, 1), weights=chances) for k in (1, 5)]
    assert [five for _, five in solved.values()] == pytest.approx(
        [0.817084, 0.555556, 0.829118, 0.128205, 0.166667, 0.25], abs=1e-6)
    assert np.mean([solved[level] for level in "123"], axis=0) == pytest.approx([0.153217, 0.733919], abs=1e-6)


def demonstrated(env, rng, **kwargs):
    """Play to the end; the texts, and the numbers read from them."""
    env.start("a problem", env.answer, "1", env.candidates)
    texts = []
    while not env.ended:
        texts.append(env.demonstrate(rng, **kwargs))
        env.step(texts[-1])
    return texts, list(env.answers)


def test_the_scripted_player_mostly_repeats_itself():
    """20,000 episodes, right answer 3 of 0..6: within .015 of the exact values."""
    env, rng = posed(), np.random.default_rng(0)
    episodes = [demonstrated(env, rng, malformed=0.0)[1] for _ in range(20_000)]
    solved = [e[-1] == "3" for e in episodes]
    within = [np.mean([s and len(e) <= k for s, e in zip(solved, episodes, strict=True)]) for k in range(1, 6)]
    assert within == pytest.approx([0.75, 0.7575, 0.764775, 0.771832, 0.778677], abs=0.015)
    assert np.mean([len(e) for e in episodes]) == pytest.approx(1.955893, abs=0.03)
    failed = [e for e, s in zip(episodes, solved, strict=True) if not s]
    assert np.mean([len(set(e)) == 1 for e in failed]) == pytest.approx(0.780292, abs=0.015)
    first = Counter(e[0] for e in failed)
    assert set(first) == set("012456") and max(first.values()) < 1.2 * min(first.values()), "uniform over wrong ones"


def test_the_scripted_player_is_sometimes_malformed():
    """Each of the three forms with probability .01; the first answer is right with .97 * .75."""
    env, rng = posed(max_answers=1), np.random.default_rng(1)
    texts = Counter(demonstrated(env, rng)[0][0] for _ in range(10_000))
    forms = {"<answer></answer>": 0, "? ?": 0, "number": 0}
    for text, n in texts.items():
        if parse_answer(text) is None:
            assert text in forms or 0 <= int(text) <= 6, text
            forms[text if text in forms else "number"] += n
    assert all(abs(n / 10_000 - 0.01) < 0.004 for n in forms.values()), forms
    assert texts[say(3)] / 10_000 == pytest.approx(0.97 * 0.75, abs=0.015)


def test_before_a_readable_answer_the_scripted_player_knows_as_much_as_at_first():
    env, rng = posed(), np.random.default_rng(2)

    def share_right(*before, **kwargs):
        env.answers = list(before)
        return np.mean([env.demonstrate(rng, malformed=0.0, **kwargs) == say(3) for _ in range(3000)])
    assert share_right(None, None) == pytest.approx(0.75, abs=0.03)
    assert share_right("0", None, repeat=0.0) == pytest.approx(0.3, abs=0.03)
    assert share_right("0", repeat=0.0, retry_right=1.0) == share_right(first_right=1.0) == 1
    env.answers = ["6", "0", None]
    assert {env.demonstrate(rng, malformed=0.0, repeat=1.0) for _ in range(20)} == {say(0)}, "the last readable one"


def test_the_scripted_player_reads_number_words_and_answers_badly():
    rng = np.random.default_rng(4)
    for level, share in (("6", 0.3), ("1", 0.75)):
        env = RetryMath(levels=level, max_answers=1)
        right = [env.step(env.demonstrate(rng, malformed=0.0))[4]["success"] for seed in range(4000) if env.reset(seed=seed)]
        assert np.mean(right) == pytest.approx(share, abs=0.03)


def test_the_scripted_player_errs_within_three_and_inside_the_range():
    rng = np.random.default_rng(3)
    for answer, candidates, near in ((2, (2, 40), {3, 4, 5}), (29, (0, 29), {26, 27, 28}), (20, (2, 40), {17, 18, 19, 21, 22, 23})):
        env = posed(answer, candidates)
        wrong = {env.demonstrate(rng, malformed=0.0, first_right=0.0) for _ in range(200)}
        assert wrong == set(map(say, near))
