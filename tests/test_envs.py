"""Rules, seeds and splits of the environments."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from conftest import ROOT
from envs import known_ids, make_env
from envs.episodes import demonstrations
from envs.frozen_lake import FrozenLake
from envs.guess_number import GuessNumber, parse_number
from envs.maze import Maze
from envs.retry_math import RetryMath
from envs.search_qa import REGIMES, SearchQA
from envs.snake import Snake
from envs.text_env import CHARSET, EVALUATION_SEEDS, parse_action
from envs.think_search import ThinkSearch
from envs.tool_desk import ToolDesk
from envs.toy_text import ToyText
from envs.trust import Trust
from envs.twenty_questions import GuessMyCity, TwentyQuestions

GUESSING = (TwentyQuestions, GuessMyCity)  # a rule ends them, and there is one first text
RULED = (*GUESSING, Trust)  # no limit of turns cuts them
VARIANTS = [
    lambda: FrozenLake(), lambda: FrozenLake(size=6, max_turns=15, slippery=True),
    lambda: FrozenLake(author_text=True, tagged=True), lambda: FrozenLake(coordinates=True),
    lambda: Snake(), lambda: Snake(opponents=0), lambda: Snake(width=4, height=7, opponents=3),
    lambda: Snake(author_text=True, tagged=True),
    lambda: SearchQA(format_penalty=1.0, extra_turns=1),
    lambda: SearchQA("hopeless", num_relations=8, format_penalty=1.0, extra_turns=1, premature=0.0),
    lambda: RetryMath(format_penalty=1.0), lambda: ThinkSearch(format_penalty=1.0),
    lambda: RetryMath("123456", 3, "unary-reward", show_answers_left=True, format_penalty=1.0),
    lambda: ThinkSearch("turns", max_turns=5, format_penalty=1.0),
    lambda: SearchQA("parts", format_penalty=1.0, extra_turns=1),
    lambda: GuessNumber(format_penalty=1.0), lambda: GuessNumber(64, 6, format_penalty=1.0),
    lambda: Maze(max_turns=12, format_penalty=1.0), lambda: Maze("lake", max_turns=20, format_penalty=1.0),
    lambda: Trust(format_penalty=1.0), lambda: Trust(rounds=4, format_penalty=1.0),
    lambda: ToolDesk(), lambda: ToolDesk(num_orders=5, num_requests=2),
    lambda: TwentyQuestions(), lambda: TwentyQuestions(20), lambda: GuessMyCity(),
    *[lambda game=game: ToyText(game) for game in known_ids() if not game.startswith("turnrl/")]]


def scripted(env, rng, noise):
    """The next action of the scripted player; some have their own, fixed noise."""
    own = type(env) in (RetryMath, ThinkSearch, ToolDesk, *RULED)
    return env.demonstrate(rng) if own else env.demonstrate(rng, noise=noise)


def play(env, seed, rng, noise=0.5):
    """A whole episode of the scripted player: observations, rewards, end flags, last info."""
    observation, info = env.reset(seed=seed)
    observations, rewards, end = [observation], [], (False, False)
    while not any(end):
        observation, reward, *end, info = env.step(scripted(env, rng, noise))
        observations.append(observation)
        rewards.append(reward)
    return observations, rewards, end, info


@pytest.mark.parametrize("make", VARIANTS)
def test_gymnasium_accepts_the_environment(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(), skip_render_check=True)


@pytest.mark.parametrize("make", VARIANTS)
def test_long_noisy_play_stays_inside_the_spaces_and_ends(make):
    env, rng, ends = make(), np.random.default_rng(0), set()
    for seed in range(60):
        observations, rewards, end, info = play(env, seed, rng)
        assert all(observation in env.observation_space for observation in observations)
        assert all(type(reward) is float and np.isfinite(reward) for reward in rewards)
        assert len(rewards) <= getattr(env, "max_turns", 20 if type(env) in GUESSING else 11) and list(end).count(True) == 1
        assert type(info["success"]) is bool and info.get("legal_actions", ["any"])
        ends.add(tuple(end))
    if type(env) in RULED:
        assert ends == {(True, False)}
    elif type(env) not in (ToyText, RetryMath) and getattr(env, "look", 1) > 0:
        assert ends == {(True, False), (False, True)}, "both ends must occur"


@pytest.mark.parametrize("make", VARIANTS)
def test_any_text_is_an_action_and_costs_the_penalty(make):
    env, rng = make(), np.random.default_rng(0)
    letters = sorted(CHARSET) + list("é█\x00\u2028😀")
    texts = ["", " ", "\n", "go left", "<action>", "</action>up<action>", "left right", "LEFT UP"]
    texts += ["".join(rng.choice(letters, size=rng.integers(30))) for _ in range(200)]
    texts = [text for text in texts if type(env) is not GuessNumber or parse_number(text) is None]
    env.reset(seed=0)
    for text in texts:
        observation, reward, terminated, truncated, info = env.step(text)
        assert info["invalid_action"]
        assert observation in env.observation_space
        if terminated or truncated:
            env.reset(seed=1)
    env.reset(seed=2)
    free = make()
    free.format_penalty = 0.0
    free.reset(seed=2)
    penalty = 0.0 if type(env) in (ToolDesk, *GUESSING) else 1.0  # which know none
    assert env.step("?")[1] == pytest.approx(free.step("?")[1] - penalty)


@pytest.mark.parametrize("make", VARIANTS)
def test_a_seed_determines_the_episode_and_no_step_is_taken_before_the_reset_or_after_the_end(make):
    first, second, starts = make(), make(), set()
    with pytest.raises(gym.error.ResetNeeded):
        first.step("left")
    for seed in range(10):
        one = play(first, seed, np.random.default_rng(seed))
        with pytest.raises(gym.error.ResetNeeded):
            first.step("left")
        assert one == play(second, seed, np.random.default_rng(seed))
        assert one == play(first, seed, np.random.default_rng(seed)), "a second reset repeats it"
        starts.add(one[0][0])
    assert len(starts) > 5 or type(first) in (ToyText, GuessNumber, *RULED), "another seed gives another instance"


@pytest.mark.parametrize("make", VARIANTS)
def test_a_deep_copy_is_a_fork(make):
    """Both go on in the same way, and what one is told does not reach the other, nor its generator."""
    env, rng, apart = make(), np.random.default_rng(0), 0
    for seed in range(9):
        env.reset(seed=seed)
        if any(env.step(scripted(env, rng, 0.0))[2:4]):
            continue
        fork, third = copy.deepcopy(env), copy.deepcopy(env)
        word = env.demonstrate(np.random.default_rng(seed))
        if not any(third.step("?")[2:4]):
            third.step("??")
        assert env.step(word) == fork.step(word)
        assert env.reset() == fork.reset(), "the next instance too"
        apart += 1
    assert apart > 2 or getattr(env, "max_turns", 9) == 1


@pytest.mark.parametrize("make,wrong,message", [
    (FrozenLake, {"frozen_share": 1.0}, "belongs to"), (Snake, {"width": 2, "height": 2}, "do not fit"),
    (SearchQA, {"regime": "harder"}, "sparse"), (SearchQA, {"min_hops": 5, "max_hops": 3}, "hops"),
    (SearchQA, {"num_entities": 40}, "at most 32"), (SearchQA, {"parts": 12}, "do not fit"), (SearchQA, {"num_relations": 9}, "1 to 8"),
    (GuessNumber, {"high": 7}, "high"), (GuessNumber, {"max_turns": 0}, "max_turns"), (GuessNumber, {"noise": 1.5}, "noise"),
    (Trust, {"rounds": 1}, "at least 2"),
    (Maze, {"layout": "spiral"}, "double_t, lake"), (Maze, {"max_turns": 0}, "at least 1"), (Maze, {"noise": 2.0}, "noise 2.0"),
    *[(RetryMath, wrong, next(iter(wrong))) for wrong in (
        {"levels": ""}, {"levels": "7"}, {"levels": "1 2"}, {"feedback": "loud"}, {"feedback": ""}, {"max_answers": 0})],
    *[(ThinkSearch, wrong, "regime|hops in .* turns") for wrong in (
        {"regime": "actions"}, {"min_hops": 0}, {"min_hops": 5}, {"max_hops": 3}, {"max_turns": 3}, {"regime": "turns", "max_turns": 2})],
    (ToolDesk, {"num_requests": 0}, "1 <= requests <= orders <= 8"), (ToolDesk, {"num_requests": 4}, "num_requests 4, num_orders 3"),
    (ToolDesk, {"num_orders": 9}, "num_orders 9"), (ToolDesk, {"num_orders": 0}, "num_orders 0"),
    (ToolDesk, {"noise": -0.1}, "noise -0.1: 0 to 1"), (ToolDesk, {"noise": 1.1}, "0 to 1"), (ToolDesk, {"max_turns": 0}, "at least 1"),
    (TwentyQuestions, {"objects": 12}, "objects"), (TwentyQuestions, {"question_share": 1.5}, "share"),
    (TwentyQuestions, {"informed_share": -0.1}, "share")])
def test_settings_that_cannot_be_are_named_in_one_line(make, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        env = make(**wrong)
        for seed in (0, EVALUATION_SEEDS):  # what shows in an instance only, and is no endless loop
            env.reset(seed=seed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("env_id", known_ids())
def test_evaluation_switches_training_penalties_off(env_id):
    training, evaluation = make_env(env_id).unwrapped, make_env(env_id, evaluation=True).unwrapped
    names = [name for name in ("step_reward", "format_penalty") if hasattr(training, name)]
    assert all(getattr(evaluation, name) == 0 for name in names) and set(names) == set(getattr(training, "evaluation_kwargs", {}))
    assert any(getattr(training, name) for name in names) or type(training) in (SearchQA, ThinkSearch, ToolDesk, *GUESSING)


@pytest.mark.parametrize("make,best", [
    (FrozenLake, 6), (lambda: ToyText("CliffWalking-v1"), 13), (lambda: ToyText("Taxi-v4"), None)])
def test_the_scripted_player_without_noise_always_succeeds(make, best):
    env, rng = make(), np.random.default_rng(0)
    for seed in range(30):
        _, rewards, _, info = play(env, seed, rng, noise=0.0)
        assert info["success"] and best in (None, len(rewards))


def test_the_example_of_the_page_is_an_environment():
    """The code of docs/envs.md, as it stands there."""
    code = (ROOT / "docs/envs.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec("\n".join(line.removeprefix("   ") for line in code.splitlines()), names)
    check_env(names["Game"](), skip_render_check=True)
    episodes = demonstrations(names["Game"](), list(range(60)), 5, np.random.default_rng(0))
    assert {len(e.turns) for e in episodes} == {1} and 10 < sum(e.success for e in episodes) < 30


def test_parse_action_accepts_exactly_a_legal_word():
    words = ("left", "up")
    plain = {" Left\n": "left", "UP": "up"} | dict.fromkeys(
        ["", "left up", "go left", "left.", "lef", "<action>left</action>", "down"])
    assert {text: parse_action(text, words) for text in plain} == plain
    tagged = {"<think>up?</think><action> Left </action>": "left", "<action>left": None,
              "left": None, "<action>up</action><action>left</action>": "up",
              "<action>go up</action>": None}
    assert {text: parse_action(text, words, tagged=True) for text in tagged} == tagged


# --- Frozen Lake ---------------------------------------------------------------------------------
def lake(rows, **kwargs):
    env = FrozenLake(**kwargs)
    env.reset(seed=0)
    env.start(rows)
    return env


def test_frozen_lake_rules_step_by_step():
    rows = ["SFFF", "FHFH", "FFFH", "HFFG"]
    env = lake(rows, max_turns=6)  # the goal on the last turn is one end
    states, results = [], []
    for word in ["down", "down", "right", "right", "down", "right"]:
        results.append(env.step(word)[1:4])
        states.append(env.state)
    assert states == [4, 8, 9, 10, 14, 15]
    assert results == [(0.0, False, False)] * 5 + [(1.0, True, False)]

    env = lake(rows)
    env.step("down")
    *result, info = env.step("right")
    assert result[1:] == [0.0, True, False] and env.state == 5 and not info["success"]

    env = lake(rows)
    ends = [env.step("left")[2:4] for _ in range(8)]
    assert env.state == 0 and ends == [(False, False)] * 7 + [(False, True)]

    env = lake(rows)
    observation, reward, _, _, info = env.step("jump")
    assert (env.state, reward, info["invalid_action"]) == (0, -1.0, True)
    assert observation.endswith("P___\n_O_O\n___O\nO__G")


def test_frozen_lake_texts():
    rows = ["SFFF", "HHFF", "FHHF", "HFFG"]
    assert lake(rows).observation() == "P___\nOO__\n_OO_\nO__G"
    assert lake(rows, coordinates=True).observation().splitlines()[4:] == [
        "Player position: (0, 3)",
        "Holes: (0, 2), (1, 2), (1, 1), (2, 1), (0, 0)", "Goal: (3, 0)"]
    author = lake(rows, author_text=True).observation().splitlines()
    assert author[0] == "P player, O hole, G goal, _ ice" and author[1] == "P _ _ _"


def test_no_held_out_map_is_met_in_training_and_a_reset_without_a_seed_stays_on_its_side():
    env = FrozenLake()

    def maps(seeds):
        found = set()
        for seed in seeds:
            env.reset(seed=seed)
            found.add("".join(env.desc))
        return found
    held_out, training = maps([*range(EVALUATION_SEEDS, EVALUATION_SEEDS + 256), *[None] * 50]), maps([*range(2000), *[None] * 300])
    assert len(training) > 400 and len(held_out) > 80 and not training & held_out


# --- SearchQA ------------------------------------------------------------------------------------
def search():
    """Ada -friend-> Ben -boss-> Cleo is the chain, (Ada, boss) -> Dan a false trail; 2 hops, 5 turns."""
    env = SearchQA("easy")
    env.reset(seed=0)
    env.start([["Ada", "Ben", "Cleo"]], [["friend", "boss"]],
              {("Ada", "friend"): "Ben", ("Ben", "boss"): "Cleo", ("Ada", "boss"): "Dan"})
    return env


def test_search_rules_step_by_step():
    env = search()
    assert env.question == "question Ada friend boss"
    for action, *expected in [
            ("search Ada boss", "result Dan", "wrong", 0), ("search Eva doctor", "result none", "wrong", 0),
            ("search Ada friend", "result Ben", "hop", 1), ("search Ben boss", "result Cleo", "hop", 2)]:
        observation, reward, terminated, truncated, info = env.step(action)
        assert [observation, info["kind"], info["known"]] == expected
        assert not (reward or terminated or truncated or info["success"])
    assert info["answer"] == "Cleo" and env.step(" answer Cleo\n")[1:4] == (1.0, True, False)


@pytest.mark.parametrize("actions,reward,ends,kinds", [
    (["search Ada friend"] * 5, 0, (False, True), ["hop"] + ["repeat"] * 4),
    (["search Ben boss", "search Ada friend", "search Ben boss", "answer Cleo"], 1, (True, False),
     ["lucky", "hop", "hop", "answer"]),
    (["answer Dan"], 0, (True, False), ["answer"]), (["search Ada"], 0, (True, False), ["malformed"]),
    (["Answer Cleo"], 0, (True, False), ["malformed"]), (["answer Cleo Cleo"], 0, (True, False), ["malformed"]),
    (["search Ada coach"], 0, (True, False), ["malformed"]), (["answer Fay"], 0, (True, False), ["malformed"])])
def test_search_ends_and_kinds(actions, reward, ends, kinds):
    env, seen = search(), []
    for action in actions:
        _, got, terminated, truncated, info = env.step(action)
        seen.append(info["kind"])
    assert (seen, got, (terminated, truncated)) == (kinds, reward, ends)
    assert info["success"] == (reward == 1) and info["invalid_action"] == (kinds[-1] == "malformed")


@pytest.mark.parametrize("regime", REGIMES)
def test_one_fact_tells_each_answer_the_chain_leads_to_it_and_false_trails_are_as_frequent_as_stated(regime):
    env, trails = SearchQA(regime), []
    for seed in range(100):
        question, _ = env.reset(seed=seed)
        people = [name for path in env.paths for name in path]
        hops = len(people) - len(env.paths)
        assert len(set(people)) == len(people) and env.min_hops <= len(env.routes[0]) <= env.max_hops
        values = list(env.facts.values())
        assert all(values.count(name) == 1 for path in env.paths for name in path[1:])
        assert all(path[0] not in values for path in env.paths)
        assert question == env.question and question.count(" and ") == len(env.paths) - 1
        observations, rewards, end, info = play(env, seed, np.random.default_rng(seed), noise=0.0)
        assert rewards == [0.0] * hops + [1.0] and info["success"]
        assert all(env.names.index(value) >= 0 and key[0] != value for key, value in env.facts.items())
        trails.append((len(env.facts) - hops) / (24 * 4 - hops))
    assert np.mean(trails) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("regime,success,turns", [
    ("middle", 0.403, 2.75), ("sparse", 0.241, 2.74), ("hopeless", 0.149, 2.93),
    ("easy", 0.594, 2.26), ("parts", 0.563, 4.03)])
def test_the_scripted_searcher_is_as_noisy_as_stated(regime, success, turns):
    """The first three against an older implementation; `parts` has two different kinds of noise."""
    episodes = demonstrations(SearchQA(regime), range(1500), 20, np.random.default_rng(0))
    assert np.mean([e.success for e in episodes]) == pytest.approx(success, abs=0.035)
    assert np.mean([len(e.turns) for e in episodes]) == pytest.approx(turns, abs=0.1)


# --- Snake ---------------------------------------------------------------------------------------
# own cells (head first), enemy cells, apples, own move, enemy move -> reward, own, enemy alive
@pytest.mark.parametrize("own,enemy,apples,move,enemy_move,reward,after,enemy_alive", [
    ([(2, 2)], [(0, 0)], [(2, 3)], "up", "right", 0.99, [(2, 3), (2, 2)], True),
    ([(0, 2)], [(4, 4)], [], "left", "left", -2.01, None, True),  # wall
    ([(2, 3), (2, 2)], [(0, 0)], [], "down", "right", -2.01, None, True),  # reversal
    ([(2, 2)], [(0, 0)], [], "down", "right", -0.01, [(2, 1)], True),  # length 1 may reverse
    ([(1, 1), (1, 2), (2, 2), (2, 1)], [(4, 4)], [], "right", "left", -2.01, None, True),  # tail
    ([(1, 1)], [(3, 1)], [], "right", "left", -2.01, None, False),  # head on head
    ([(1, 1)], [(3, 1)], [(2, 1)], "right", "left", -2.01, None, False),  # ... on an apple
    ([(1, 1)], [(2, 1)], [], "right", "left", -2.01, None, False),  # swap
    ([(1, 1)], [(2, 1)], [], "right", "up", -2.01, None, True),  # cell about to be left
    ([(1, 1)], [(2, 2), (2, 1)], [], "right", "up", -2.01, None, True),
    ([(1, 1)], [(4, 4)], [], "right", "right", -0.01, [(2, 1)], False)])  # the enemy dies
def test_snake_rules(own, enemy, apples, move, enemy_move, reward, after, enemy_alive):
    env = Snake()
    env.reset(seed=0)
    env.start([list(own), list(enemy)], apples)
    env.opponent_move = lambda body: enemy_move
    _, got, terminated, truncated, info = env.step(move)
    assert got == pytest.approx(reward)
    assert env.snakes.get(0) == after
    assert (1 in env.snakes) == enemy_alive
    assert terminated == (after is None or not enemy_alive) and not truncated
    assert info["success"] == (terminated and after is not None)
    if after is None and apples:
        assert env.apples == apples, "no apple is eaten by a snake that dies"


def test_snake_cells_all_differ_and_eaten_apples_come_back():
    env, rng = Snake(width=4, height=6, apples=5, opponents=2), np.random.default_rng(0)
    for seed in range(200):
        env.reset(seed=seed)
        ended = False
        while not ended:
            cells = [cell for body in env.snakes.values() for cell in body] + env.apples
            assert len(set(cells)) == len(cells) and len(env.apples) == 5
            ended = any(env.step(env.demonstrate(rng))[2:4])


def test_snake_opponent_avoids_walls_and_its_body_and_draws_once_a_step():
    env = Snake()
    env.reset(seed=0)
    assert {env.opponent_move([(0, 0)]) for _ in range(50)} == {"up", "right"}
    assert {env.opponent_move([(0, 0), (0, 1)]) for _ in range(50)} == {"right"}
    assert {env.opponent_move([(0, 0), (0, 1), (1, 1), (1, 0)]) for _ in range(50)} == {"right"}
    once = copy.deepcopy(env.opponent_rng)
    once.random()
    env.opponent_move([(2, 2)])
    assert env.opponent_rng.random() == once.random()


def test_snake_texts():
    env = Snake(width=4, height=3)
    env.reset(seed=0)
    env.start([[(1, 1), (1, 0)], [(3, 2)]], [(0, 0)])
    assert env.observation() == "___2\n_1__\nAT__"
    env.author_text = True
    assert env.observation().splitlines()[0] == "Board: 4 x 3"
    assert env.observation().splitlines()[-3:] == ["_ _ _ 2", "_ 1 _ _", "A T _ _"]


# --- toy_text and make_env -----------------------------------------------------------------------
@pytest.mark.parametrize("game,start", [
    ("FrozenLake-v1", "[S]FFF\nFHFH\nFFFH\nHFFG"), ("CliffWalking-v1", "o  o  o"),
    ("Taxi-v4", "Stops: Red (row 0, column 0)"), ("Blackjack-v1", "Your hand: ")])
def test_toy_text_plays_the_engine_s_own_game_in_english(game, start):
    """The same words, played on gymnasium's environment by index: same rewards, same ends."""
    ours, engine, rng = ToyText(game), gym.make(game).unwrapped, np.random.default_rng(0)
    assert ours.reset(seed=0)[0].startswith(start) and all(word in ours.instructions for word in ours.words)
    for seed in range(10):
        ours.reset(seed=seed)
        engine.reset(seed=seed)
        ended = False
        while not ended:
            word = ours.demonstrate(rng, noise=0.2)
            _, reward, terminated, truncated, _ = ours.step(word)
            _, expected, end, _, _ = engine.step(ours.words.index(word))
            assert (reward, terminated) == (float(expected), end)
            ended = terminated or truncated
