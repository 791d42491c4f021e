"""Maze: the two layouts, steps and walls, what play returns (computed exactly), the scripted player."""

import numpy as np
import pytest

from conftest import ROOT
from envs import make_env
from envs.maze import STEPS, Maze
from envs.text_env import EVALUATION_SEEDS


def expected(env: Maze, noise: float, turns: int, late: float = 0.0) -> dict[tuple[int, int], float]:
    """The mean return of the scripted player from every start, by a recursion over the steps that are left; late: what
    is paid when time is up."""
    value = dict.fromkeys(env.distance, late)
    for _ in range(turns):
        new = {env.goal: 0.0}
        for place in env.distance:
            if place == env.goal:
                continue
            new[place], nearer = 0.0, []
            for dy, dx in STEPS.values():
                there = (place[0] + dy, place[1] + dx)
                there = there if there in env.distance else place
                worth = 0.0 if there == env.goal else -1 + value[there]
                new[place] += noise / 4 * worth
                nearer += [worth] if env.distance[there] < env.distance[place] else []
            new[place] += (1 - noise) * np.mean(nearer)
        value = new
    return {place: worth for place, worth in value.items() if place != env.goal}


def test_the_layouts_hold_what_their_sources_say():
    double_t = Maze()
    assert len(double_t.cells) == 26 and double_t.goal == (8, 6) and max(double_t.distance.values()) == 12
    lake = Maze("lake")
    assert lake.rows[0] == " " * 8 and lake.rows[2] == "   #    " and lake.goal == (7, 7) and max(lake.distance.values()) == 14
    assert len(lake.cells) == 64 - 10 == len(lake.distance)
    with pytest.raises(ValueError, match="double_t, lake"):
        Maze("spiral")


@pytest.mark.parametrize("noise,turns,late,mean,corner,near", [
    (0.0, 50, 0.0, -6.84, -11.0, 0.0),  # ideal play: the maximum of LMRL-Gym's table
    (1.0, 100, -1.0, -85.892745, -98.368753, -24.020710)])  # its random player, who pays 1 more when time is up
def test_expected_returns_are_those_that_are_known(noise, turns, late, mean, corner, near):
    value = expected(Maze(), noise, turns, late)
    assert np.mean(list(value.values())) == pytest.approx(mean, abs=1e-6)
    assert value[1, 1] == pytest.approx(corner, abs=1e-6) and value[7, 6] == pytest.approx(near, abs=1e-6)


@pytest.mark.parametrize("layout", ["double_t", "lake"])
def test_the_scripted_player_earns_what_the_recursion_says(layout):
    env, rng, returns, far = Maze(layout), np.random.default_rng(0), [], []
    for seed in range(1500):
        env.reset(seed=seed)
        distance, total = env.distance[env.place], 0.0
        while not env.ended:
            _, reward, success, *_ = env.step(env.demonstrate(rng))
            total += reward
        returns.append(total)
        far += [success] if distance >= 8 else []
    value = expected(env, env.noise, env.max_turns)
    error = np.std(returns) / len(returns) ** 0.5
    assert abs(np.mean(returns) - np.mean(list(value.values()))) < 4 * error < 2
    assert 0.1 < np.mean(far) < 0.25, "few episodes join a far start and the goal"


def test_a_walk_by_hand():
    env = Maze()
    env.reset(seed=0)
    env.start((4, 3))
    assert env.observation() == "at 4 3"
    walk = [("left", "at 4 3", -1.0), (" Down\n", "at 5 3", -1.0), ("walk on", "Unknown action.\nat 5 3", -4.0),
            ("right", "at 5 4", -1.0), ("right", "at 5 5", -1.0), ("right", "at 5 6", -1.0), ("down", "at 6 6", -1.0),
            ("up", "at 5 6", -1.0), ("down", "at 6 6", -1.0), ("down", "at 7 6", -1.0)]
    for word, text, reward in walk:
        observation, got, *end, info = env.step(word)
        assert (observation, got, end) == (text, reward, [False, False]) and not info["success"]
        assert info["invalid_action"] == (word == "walk on")
    observation, reward, *end, info = env.step("down")
    assert (observation, reward, end) == ("at 8 6", 0.0, [True, False])
    assert info["success"] and info["distance"] == 0


def test_a_chat_model_is_also_told_the_goal_and_the_walls():
    env = make_env("turnrl/Maze-v0", chat=True)
    env.reset(seed=0)
    env.unwrapped.start((4, 3))
    said = [env.step(word)[0] for word in ("left", "Go **down**.", "right", "right", "right", "down")]
    assert said == [f"goal 8 6, you {place}, walls {walls}" for place, walls in (
        ("4 3", "left right"), ("5 3", "left down"), ("5 4", "up down"), ("5 5", "up down"), ("5 6", "up"), ("6 6", "left right"))]
    env.unwrapped.start((5, 6))
    assert env.step("??")[0] == "Unknown action. Say left, right, up or down.\ngoal 8 6, you 5 6, walls up"


def test_time_is_up_after_the_last_turn_but_not_on_the_goal():
    env = Maze(max_turns=2)
    env.reset(seed=0)
    env.start((1, 1))
    assert env.step("left")[2:4] == (False, False) and env.step("left")[2:4] == (False, True)
    env.start((6, 6))
    assert env.step("down")[2:4] == (False, False) and env.step("down")[1:4] == (0.0, True, False)


def test_all_starts_but_the_goal_are_drawn_evenly_in_both_splits():
    env = Maze()
    for first in (0, EVALUATION_SEEDS):
        starts = []
        for seed in range(500):
            env.reset(seed=first + seed)
            starts.append(env.place)
        counts = {place: starts.count(place) for place in starts}
        assert set(counts) == set(env.distance) - {env.goal} and max(counts.values()) < 45


def test_without_noise_the_scripted_player_takes_a_shortest_way():
    env, rng = Maze("lake"), np.random.default_rng(0)
    env.reset(seed=0)
    for place, distance in env.distance.items():
        if distance:
            env.start(place)
            while not env.ended:
                env.step(env.demonstrate(rng, noise=0.0))
            assert env.turn == distance and env.place == env.goal


@pytest.mark.parametrize("layout,ideal,player,random", [("double_t", -6.84, -24.0, -28.0), ("lake", -6.94, -24.4, -28.0)])
def test_the_page_of_the_environments_says_what_play_earns(layout, ideal, player, random):
    env = Maze(layout)
    for noise, mean in ((0.0, ideal), (env.noise, player), (1.0, random)):
        assert np.mean(list(expected(env, noise, env.max_turns).values())) == pytest.approx(mean, abs=0.05)
        assert f"{mean}" in (ROOT / "docs/envs.md").read_text().split("## turnrl/Maze-v0")[1].split("\n## ")[0]
