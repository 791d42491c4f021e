"""Trust: the game of tests/benchmarks/turns.py in words."""

import numpy as np
import pytest
import torch

from benchmarks.turns import logprobs_of, outcomes, value
from envs import make_env
from envs.trust import Trust


def play(env: Trust, words: list[str]) -> list[tuple]:
    env.reset(seed=0)
    return [env.step(word)[:4] for word in words]


def test_a_game_by_hand():
    env = Trust(rounds=3)
    assert env.reset(seed=5)[0] == "round 1 of 3: leave or stay"
    on, last = ("round 2 of 3: leave or stay", 0.0, False, False), ("round 3 of 3: left or right", 0.0, False, False)
    assert play(env, ["leave"]) == [("", 0.5, True, False)]
    assert play(env, ["stay", "leave"]) == [on, ("", 0.5, True, False)]
    assert play(env, ["stay", "stay", "left"]) == [on, last, ("", 1.0, True, False)]
    assert play(env, ["stay", "stay", " Right\n"]) == [on, last, ("", 0.0, True, False)]
    assert play(env, ["left"]) == [("Unknown action.", -0.1, True, False)], "not offered in this round"
    assert play(env, ["stay", "stay", "stay"])[-1] == ("Unknown action.", -0.1, True, False)
    env.reset(seed=0)
    assert not env.step("leave")[4]["success"]
    env.reset(seed=0)
    env.step("stay")
    env.step("stay")
    assert env.step("left")[4] == {"success": True, "invalid_action": False, "legal_actions": ["left", "right"]}


@pytest.mark.parametrize("rounds", [2, 3])
def test_it_is_the_exact_game(rounds):
    """Every outcome that the table lists earns in words what it lists, and the scripted player earns the table's value."""
    actions, _, returns = outcomes(rounds)
    env, total = Trust(rounds), 0.0
    for row, expected in zip(actions.tolist(), returns.tolist(), strict=True):
        words = [("leave", "stay")[a] for a in row[:-1] if a >= 0] + [("right", "left")[a] for a in row[-1:] if a >= 0]
        assert sum(step[1] for step in play(env, words)) == expected
    logits = torch.log(torch.tensor([[0.5, 0.5]] * (rounds - 1) + [[0.8, 0.2]], dtype=torch.double))
    exact, rng, games = value(logits, actions, returns), np.random.default_rng(0), 4000
    assert exact == pytest.approx({2: 0.35, 3: 0.425}[rounds])
    for _ in range(games):
        env.reset(seed=0)
        while not env.ended:
            total += env.step(env.demonstrate(rng))[1]
    assert total / games == pytest.approx(exact, abs=0.025)
    assert logprobs_of(logits, actions).sum(1).exp().sum() == pytest.approx(1.0)


def test_a_chat_model_is_offered_the_words_of_the_round():
    env = make_env("turnrl/Trust-v0", chat=True)
    env.reset(seed=0)
    assert "Say leave or stay." in env.step("hm")[0]
    env.reset(seed=0)
    env.step("I stay, of course.")
    assert env.step("So: **Left**!")[1] == 1.0
