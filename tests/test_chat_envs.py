"""Environments as a chat model meets them: actions inside other text, feedback that names the format, readable maps."""

import doctest

import numpy as np
import pytest

from envs import make_env, text_env
from rollouts import make_envs
from utils import RunArgs

SAID = {  # id: what a chat model may write -> what the game hears
    "turnrl/FrozenLake-v0": {"I will go **Right**, then down.": "right", "Down!": "down", "upwards": None},
    "turnrl/Snake-v0": {"Move: LEFT\n(to the apple)": "left", "leftover": None},
    "turnrl/SearchQA-v0": {"Let me search \"mia\" Boss first": "search Mia boss", "Search Mia boss.": "search Mia boss",
                           "answer: Mia": None, "The answer Kim is right": "answer Kim"},
    "turnrl/ToolDesk-v0": {"First, Login 59.": "login 59", "I'd like to list the orders": "list", "> `find chair`": "find chair",
                           "loginn": None},
    "turnrl/GuessNumber-v0": {"My guess is 512!": "512", "Guess: 7, or 8": "7", "a 1234567": None},
    "turnrl/RetryMath-v0": {"7 * 8 = 56, so 1": "<answer>1</answer>", "<answer>3</answer> of 5": "<answer>3</answer>", "one": None},
    "turnrl/TwentyQuestions-v0": {"OK: Is the object  ALIVE? Is the object a dog?": "is the object alive?", "Is it alive?": None},
    "turnrl/Maze-v0": {"Go Down, then left.": "down", "leftmost": None},
    "Taxi-v4": {"go South": "south", "southern": None}}


def game(env_id: str, chat: bool, seed: int = 4):
    env = make_env(env_id, chat=chat)
    observation, _ = env.reset(seed=seed)
    return env, observation


@pytest.mark.parametrize("env_id,text,action", [(i, text, action) for i, texts in SAID.items() for text, action in texts.items()])
def test_the_first_action_in_an_answer_is_played_for_a_chat_model_only(env_id, text, action):
    strict, free = game(env_id, False)[0], game(env_id, True)[0]
    assert strict.step(text)[4]["invalid_action"] or "<answer>" in text
    observation, *rest, info = free.step(text)
    if action is None:
        assert info["invalid_action"]
        return
    told, *expected, other = game(env_id, True)[0].step(action)
    assert (observation, rest, info) == (told, expected, other) and not info["invalid_action"]


@pytest.mark.parametrize("env_id,form", [
    ("turnrl/FrozenLake-v0", "Say left, down, right or up."), ("turnrl/Maze-v0", "Say left, right, up or down."), ("turnrl/Snake-v0", "Say up, down, left or right."),
    ("turnrl/SearchQA-v0", "Write search NAME RELATION, or answer NAME."), ("turnrl/ToolDesk-v0", "find ITEM"),
    ("turnrl/GuessNumber-v0", "Write one number from 1 to 1024."), ("turnrl/RetryMath-v0", "Write <answer>number</answer>."),
    ("turnrl/TwentyQuestions-v0", "Ask like this: Is the object a football?"), ("Taxi-v4", "Say south,")])
def test_an_unreadable_answer_is_told_the_format(env_id, form):
    env, _ = game(env_id, True)
    observation, _, terminated, truncated, info = env.step("??")
    assert form in observation and info["invalid_action"] and not terminated and not truncated


def test_a_model_that_must_use_tags_is_not_told_to_say_a_bare_word():
    for env_id in ("turnrl/FrozenLake-v0", "turnrl/Snake-v0"):
        env = make_env(env_id, chat=True, tagged=True)
        env.reset(seed=1)
        assert "Say" not in env.step("right")[0]


def test_a_search_goes_on_after_an_unreadable_answer_until_its_last_turn():
    env, ends = game("turnrl/SearchQA-v0", True)[0], []
    turns = env.unwrapped.extra_turns + len(env.unwrapped.hops)
    ends = [env.step("??")[2:4] for _ in range(turns)]
    assert ends == [(False, False)] * (turns - 1) + [(False, True)]
    strict = game("turnrl/SearchQA-v0", False)[0]
    for _ in range(turns - 1):
        strict.step("search Mia boss")
    assert strict.step("??")[2:4] == (True, False)


def test_a_chat_model_reads_maps_with_their_positions():
    assert "Player position: (0, 3)" in game("turnrl/FrozenLake-v0", True)[1]
    assert "Position" not in game("turnrl/FrozenLake-v0", False)[1] and "Board: 5 x 5" in game("turnrl/Snake-v0", True)[1]


@pytest.mark.parametrize("env_id", SAID)
def test_the_scripted_player_is_understood_and_every_rule_has_an_example(env_id):
    env = game(env_id, True)[0]
    player = getattr(env.unwrapped, "demonstrate", None)
    assert player is None or not env.step(player(np.random.default_rng(5)))[4]["invalid_action"] or env_id == "turnrl/RetryMath-v0"
    assert "xample" in env.unwrapped.instructions or "exactly like" in env.unwrapped.instructions


def test_the_model_decides_and_the_flag_comes_first(tmp_path, chat_folder, tiny_policy):
    def chat(**flags):
        return make_envs(RunArgs(**flags), 1)[0].unwrapped.chat
    tiny_policy.save(tmp_path / "tiny")
    assert not chat() and not chat(model=str(tmp_path / "tiny")) and chat(model=chat_folder) and chat(model="owner/name")
    assert not chat(model=chat_folder, env_kwargs='{"chat": false}') and chat(env_kwargs='{"chat": true}')


def test_docstrings():
    assert doctest.testmod(text_env).attempted >= 3 and doctest.testmod(text_env).failed == 0
