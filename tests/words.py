"""Games for tests, made the way somebody else would make them: named words:tests/Words-v0."""

import builtins
import itertools
import os
import threading
import types

import gymnasium as gym
import numpy as np

from envs.text_env import TextEnv


class Words(TextEnv):
    """Any text is an action: an untrained policy plays long, different episodes.

    Chance is in step(), from the environment's own generator; info tells what it has heard.
    """

    answer_template = "{answer}"

    def __init__(self, max_turns=6, max_answers=6, **kwargs):
        super().__init__(**kwargs)
        self.max_turns = max_turns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.heard, self.ended = [], False
        return f"start {seed}", {"answer": "left", "heard": [], "submitted": None}

    def step(self, action):
        self.check_running()
        self.heard.append(action)
        number = int(self.np_random.integers(1000))
        self.ended = number % 5 == 0
        truncated = len(self.heard) >= self.max_turns and not self.ended
        letters = "".join(c for c in action if c.isascii() and c.isalnum())
        info = {"answer": "left", "heard": list(self.heard),
                "submitted": str(len(action) % 2)}
        reward = float((number + len(action)) % 2)
        return f"{len(self.heard)} {number} {letters}", reward, self.ended, truncated, info

    def demonstrate(self, rng):
        return "left"


class AnyOrder(Words):
    """Pays the same rewards in every episode, in an order that goes on from episode to episode."""

    orders = itertools.cycle(itertools.permutations([1000.1, -1000.3, 0.1, 0.2]))

    def reset(self, **kwargs):
        self.rewards = list(next(self.orders))
        return super().reset(**kwargs)

    def step(self, action):
        observation, _, _, _, info = super().step(action)
        self.ended = len(self.heard) == 4
        return observation, self.rewards[len(self.heard) - 1], self.ended, False, info


class FailsOnOneRank(Words):
    """Another one that goes wrong on the second process, and there only when a policy plays."""

    demonstrated = False

    def demonstrate(self, rng):
        self.demonstrated = True
        return "left"

    def step(self, action):
        if os.environ.get("RANK") == "1" and not self.demonstrated:
            raise RuntimeError("out of apples")
        self.demonstrated = False
        return super().step(action)


class YesOrNo(gym.Env):
    """Nothing of this package in it; random legal actions serve as demonstrations."""

    observation_space = action_space = gym.spaces.Text(50, min_length=0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "say yes or no", {"legal_actions": ["yes", "no"]}

    def step(self, action):
        return "thanks", float(action == "yes"), True, False, {"success": action == "yes"}


def turn(observation="next", reward=0.5, terminated=False, truncated=False, info=None):
    return observation, reward, terminated, truncated, {} if info is None else info


class Faulty(TextEnv):
    """Three turns. What is named by `fault` comes out of reset() or of the second turn, or is raised there; `error` is
    raised by the constructor. In `fine` is what may look wrong and works."""

    resets = {
        "reset": (7, {}), "reset-text": "start", "reset-two-characters": "no", "reset-info": ("start", [1, 2]),
        "reset-raise": KeyError("apples\nand pears")}
    steps = {
        "raise": RuntimeError("out of apples\nand pears"), "empty": RuntimeError(), "nan": turn(reward=float("nan")),
        "reward-text": turn(reward="1.0"), "none": turn(observation=None), "old": ("next", 0.5, False, {}), "five": "12345",
        "several": turn(terminated=np.array([True, False])), "truncated-text": turn(truncated="False"),
        "success-text": turn(info={"success": "False"}), "invalid-text": turn(info={"invalid_action": "no"}),
        "success-several": turn(info={"success": np.array([True, True])}), "info-list": turn(info=[1, 2])}
    fine_steps = {
        "none-info": (*turn()[:4], None), "success-none": turn(info={"success": None, "invalid_action": None}),
        "success-array": turn(info={"success": np.array([1]), "invalid_action": np.bool_(True)}),
        "array": turn(terminated=np.array([True]), truncated=np.array([False]), reward=np.array([0.5])),
        "numpy": turn(np.str_("next"), np.float32(0.5), np.bool_(True)), "surrogate": turn("odd \ud800, good \ud83d\ude00"),
        "lock": turn(info={"lock": threading.Lock(), "open": lambda: 0}), "proxy": turn(info=types.MappingProxyType({"a": 1})),
        "surrogate-info": turn(info={"answer": "\ud800"})}
    fine_resets = {"reset-none-info": ("start", None), "reset-surrogate": ("\udfff start", {"answer": "a \ud800"})}
    actions = {"demonstrated-number": 3, "demonstrated-raise": LookupError("no idea"), "demonstrated-surrogate": "a \ud800"}

    def __init__(self, fault="", error="", **kwargs):
        super().__init__(**kwargs)
        self.fault = fault
        if error:
            raise getattr(builtins, error)("no apples\nand no pears")

    def give(self, tables, usual):
        answer = next((table[self.fault] for table in tables if self.fault in table), usual)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return self.give([self.resets, self.fine_resets], ("start", {}))

    def step(self, action):
        self.turn += 1
        usual = turn(terminated=self.turn == 3)
        return self.give([self.steps, self.fine_steps], usual) if self.turn == 2 else usual


class Demonstrated(Faulty):
    """One with a scripted player, who may be what goes wrong."""

    def demonstrate(self, rng):
        return self.give([self.actions], "left")


class Restless(Demonstrated):
    """Ignores its seed."""

    resets_so_far = itertools.count()

    def reset(self, *, seed=None, options=None):
        return f"start {next(self.resets_so_far)}", super().reset()[1]


class Blocks(Demonstrated):
    """Shows what an ASCII console cannot."""

    def step(self, action):
        return "\u2588\u2588 \u00e9 \U0001f600", *super().step(action)[1:]


gym.register("tests/Words-v0", entry_point=Words)
gym.register("tests/AnyOrder-v0", entry_point=AnyOrder)
gym.register("tests/FailsOnOneRank-v0", entry_point=FailsOnOneRank)
gym.register("tests/YesOrNo-v0", entry_point=YesOrNo)
gym.register("tests/Faulty-v0", entry_point=Faulty)
gym.register("tests/Demonstrated-v0", entry_point=Demonstrated)
gym.register("tests/Restless-v0", entry_point=Restless)
gym.register("tests/Blocks-v0", entry_point=Blocks)
