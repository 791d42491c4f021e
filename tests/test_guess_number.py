"""GuessNumber: what is said after a guess, the end, the split of the numbers, the scripted player."""

import numpy as np
import pytest

from envs.guess_number import GuessNumber, parse_number
from envs.text_env import EVALUATION_SEEDS


@pytest.mark.parametrize("text,number", [("7", 7), (" 0012\n", 12), ("999999", 999999), ("0", 0)])
def test_a_number_is_the_whole_text(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", " ", "7.", "-7", "+7", "7 8", "1000000", "seven", "7.0", "٣", "²", "Guess: 7", "1_0", "0x7"])
def test_anything_else_is_unreadable(text):
    assert parse_number(text) is None
    env = GuessNumber()
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(text)
    assert (observation, reward, terminated, truncated) == ("Write one number from 1 to 1024.", -0.1, False, False)
    assert info["invalid_action"] and not info["success"] and info["left"] == 1024


def test_a_game_by_hand():
    env = GuessNumber(high=100, max_turns=5)
    assert env.reset(seed=0)[0] == "Guess a number from 1 to 100."
    env.start(37)
    said = [("50", "lower", 49), ("25", "higher", 24), ("60", "lower", 24), ("0", "higher", 24)]
    for guess, text, left in said:
        observation, reward, *end, info = env.step(guess)
        assert (observation, reward, end, info["left"]) == (text, 0.0, [False, False], left)
        assert info == {"success": False, "answer": "37", "invalid_action": False, "left": left}
    assert env.step("37")[:4] == ("Correct.", 1.0, True, False)
    env.start(37)
    ends = [env.step(guess)[2:4] for guess in ("1", "2", "x", "3", "38")]
    assert ends == [(False, False)] * 4 + [(False, True)]


def test_the_numbers_of_the_splits_are_different_and_are_all():
    env, met = GuessNumber(high=64), {False: set(), True: set()}
    for held_out in met:
        for seed in range(400):
            env.reset(seed=seed + EVALUATION_SEEDS * held_out)
            met[held_out].add(env.number)
    assert not met[False] & met[True] and met[False] | met[True] == set(range(1, 65)) and len(met[True]) == 10


def test_halving_finds_every_number_and_noise_misses_some():
    env, rng = GuessNumber(), np.random.default_rng(0)
    env.reset(seed=0)
    for number in range(1, 1024):
        env.start(number)
        while not env.ended:
            info = env.step(env.demonstrate(rng, noise=0.0))[4]
        assert info["success"]
    wins = 0
    for seed in range(400):
        env.reset(seed=seed)
        while not env.ended:
            info = env.step(env.demonstrate(rng))[4]
        wins += info["success"]
    assert 0.2 < wins / 400 < 0.4
