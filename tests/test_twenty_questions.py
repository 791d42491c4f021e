"""TwentyQuestions and GuessMyCity: replies, rewards, the scripted player, the value of ideal play."""

import functools

import numpy as np
import pytest

from envs.episodes import demonstrations
from envs.twenty_questions import GuessMyCity, TwentyQuestions, ideal_return

GAMES = [lambda: TwentyQuestions(10), lambda: TwentyQuestions(20), lambda: GuessMyCity()]


def start(env, answer, *actions):
    """A game about `answer` after these actions."""
    env.reset(seed=0, options={"answer": answer})
    for action in actions:
        env.step(action)
    return env


def replies(env, answer, *actions) -> list[str]:
    start(env, answer)
    return [env.step(action)[0] for action in actions]


ALL = ["soft", "metal", "small", "big", "used in an office", "used in a kitchen", "on wheels", "alive",
       "edible", "electric"]
YES = {  # written from the words of the game, object by object, not attribute by attribute
    "football": "soft small", "dog": "soft alive", "banana": "soft small used-in-a-kitchen edible",
    "truck": "metal big on-wheels", "pants": "soft", "computer": "metal used-in-an-office electric",
    "piano": "big", "chair": "used-in-an-office used-in-a-kitchen", "pen": "small used-in-an-office",
    "scissors": "metal small used-in-an-office", "apple": "small used-in-a-kitchen edible",
    "fish": "alive edible", "cart": "on-wheels", "ring": "metal small", "guitar": "",
    "lamp": "used-in-an-office electric", "table": "big used-in-a-kitchen", "book": "used-in-an-office",
    "knife": "metal small used-in-a-kitchen", "phone": "metal small used-in-an-office electric"}


@pytest.mark.parametrize("name", YES)
def test_every_attribute_of_every_object(name):
    yes = [words.replace("-", " ") for words in YES[name].split()]
    said = replies(TwentyQuestions(20), name, *(f"Is the object {words}?" for words in ALL))
    assert said == ["Yes." if words in yes else "No." for words in ALL]


@pytest.mark.parametrize("city, said", [
    ("paris", ["europe.", "No.", "Yes.", "french."]), ("rio", ["america.", "Yes.", "No.", "portuguese."]),
    ("tokyo", ["asia.", "Yes.", "Yes.", "japanese."]), ("cairo", ["africa.", "No.", "Yes.", "arabic."]),
    ("montreal", ["america.", "No.", "No.", "french."])])
def test_a_city_is_asked_about(city, said):
    questions = ["Which continent is it on?", "Is it on the coast?", "Is it a capital city?",
                 "What language do people speak there?", "What is the name of the city?"]
    assert replies(GuessMyCity(), city, *questions) == [*said, "I can't answer that question."]


@pytest.mark.parametrize("make,answer,text", [
    *[(TwentyQuestions, "dog", text) for text in (
        "Is the object a dog cat?", "Is the object an apple?", "Is the object dog?", "Is the object a dog", "a dog?",
        "", "yes", "Is the object a cat?", "Is the object a soft?", "Is it soft?", "Is it paris?")],
    *[(GuessMyCity, "paris", text) for text in (
        "Is it Paris, Rome?", "Is it paris or rome?", "paris", "Is it a paris?")]])
def test_what_is_no_question_is_invalid_and_counts(make, answer, text):
    env = start(make(), answer)
    *result, info = env.step(text)
    assert result == ["Invalid question.", -1.0, False, False] and info["invalid_action"] and env.asked == 1
    assert env.candidates == list(env.table), "nothing was learned"


@pytest.mark.parametrize("text", ["is the object a DOG?", "  Is  the object\na dog? "])
def test_case_and_blanks_do_not_matter(text):
    reply, reward, terminated, truncated, info = start(TwentyQuestions(), "dog").step(text)
    assert (reply, reward, terminated, truncated, info["success"]) == ("Yes.", 0.0, True, False, True)


@pytest.mark.parametrize("before,guess,reward,ended", [
    (0, "pen", 0.0, True), (19, "pen", 0.0, True), (18, "dog", -1.0, False), (19, "dog", -1.0, True)])
def test_the_return_is_minus_the_questions_before_the_right_guess_and_twenty_end_the_game(before, guess, reward, ended):
    env = start(TwentyQuestions(), "pen")
    assert [env.step("Is the object a dog?")[1:4] for _ in range(before)] == [(-1.0, False, False)] * before
    *result, info = env.step(f"Is the object a {guess}?")
    assert result[1:] == [reward, ended, False] and info["success"] == (guess == "pen")


@pytest.mark.parametrize("make", GAMES)
def test_everything_is_drawn_equally_often_and_named_in_info(make):
    env = make()
    drawn = [env.reset(seed=seed)[1]["answer"] for seed in range(4000)]
    counts = np.array([drawn.count(thing) for thing in env.table])
    expected = 4000 / len(env.table)
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi squared, at most 19 degrees
    assert env.reset(seed=3) == ("Questions:", env.info(False, False))


def test_legal_actions_are_all_that_is_not_invalid():
    for env, number in ((TwentyQuestions(), 20), (TwentyQuestions(20), 30), (GuessMyCity(), 20)):
        _, info = env.reset(seed=1)
        assert len(set(info["legal_actions"])) == number
        for action in info["legal_actions"]:
            env.reset(seed=1)
            assert not env.step(action)[4]["invalid_action"]


@pytest.mark.parametrize("make, mean", [(GAMES[0], -8.786702), (GAMES[1], -12.13), (GAMES[2], -8.900283)])
def test_the_scripted_player_returns_what_was_computed(make, mean):
    episodes = demonstrations(make(), list(range(1500)), 99, np.random.default_rng(0))
    returns = np.array([e.total_reward for e in episodes])
    assert returns.mean() == pytest.approx(mean, abs=4 * returns.std() / 1500**0.5)


@pytest.mark.parametrize("make, mean, success", [
    (GAMES[0], -12.188767, 0.641514), (GAMES[1], -14.279151, 0.492385), (GAMES[2], -12.188767, 0.641514)])
def test_a_player_of_random_commands_returns_what_was_computed(make, mean, success):
    env, rng, ends = make(), np.random.default_rng(0), []
    for seed in range(1500):
        _, info = env.reset(seed=seed)
        total, terminated = 0.0, False
        while not terminated:
            _, reward, terminated, _, info = env.step(rng.choice(info["legal_actions"]))
            total += reward
        ends.append((total, info["success"]))
    returns, successes = np.array(ends).T
    assert returns.mean() == pytest.approx(mean, abs=4 * returns.std() / 1500**0.5)
    assert successes.mean() == pytest.approx(success, abs=0.05)


def test_the_scripted_player_may_guess_what_fits_all_replies():
    env = TwentyQuestions(20, question_share=0.0, informed_share=1.0)
    start(env, "phone", "Is the object electric?", "Is the object used in an office?", "nonsense")
    rng = np.random.default_rng(0)
    assert {env.demonstrate(rng) for _ in range(50)} == {
        f"Is the object a {name}?" for name in ("computer", "lamp", "phone")}
    env.step("Is the object a lamp?")
    assert {env.demonstrate(rng) for _ in range(50)} == {
        "Is the object a computer?", "Is the object a phone?"}
    blind = start(TwentyQuestions(20, question_share=0.0, informed_share=0.0), "phone", "Is the object electric?")
    assert len({blind.demonstrate(rng) for _ in range(400)}) == 20
    asking = start(TwentyQuestions(20, question_share=1.0), "phone")
    assert {asking.demonstrate(rng) for _ in range(400)} == set(asking.questions)


@pytest.mark.parametrize("make, discount, value", [
    (GAMES[0], 1.0, -2.8), (GAMES[1], 1.0, -3.9), (GAMES[2], 1.0, -1.6875),
    (GAMES[0], 0.95, -2.6537125), (GAMES[1], 0.95, -3.598185), (GAMES[2], 0.95, -1.6471875)])
def test_the_value_of_ideal_play(make, discount, value):
    assert ideal_return(make().table, discount) == pytest.approx(value, abs=1e-6)


def slow_value(table, discount, asked=()):
    """The best value by trying every sequence of different commands, for the things that fit."""

    @functools.cache
    def value(things: frozenset[str]) -> float:
        best = -np.inf
        for question in next(iter(table.values())):
            groups = [frozenset(t for t in things if table[t][question] == reply)
                      for reply in {table[t][question] for t in things}]
            if len(groups) > 1:
                best = max(best, sum(len(g) / len(things) * (-1 + discount * value(g)) for g in groups))
        for thing in things:
            rest = things - {thing}
            best = max(best, len(rest) / len(things) * (-1 + discount * value(rest)) if rest else 0.0)
        return best

    return value(frozenset(table))


@pytest.mark.parametrize("seed", range(15))
def test_leaving_out_hopeless_guesses_changes_nothing(seed):
    """Tables of up to 9 things, some of them alike, with two or three replies."""
    rng = np.random.default_rng(seed)
    things, questions, kinds = rng.integers(1, 10), rng.integers(1, 5), rng.integers(2, 4)
    table = {f"t{i}": {f"q{j}": str(rng.integers(kinds)) for j in range(questions)} for i in range(things)}
    for discount in (1.0, 0.9):
        assert ideal_return(table, discount) == pytest.approx(slow_value(table, discount))
