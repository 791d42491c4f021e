"""Games for tests, made the way somebody else would make them: named words:tests/Words-v0."""

import itertools
import os

import gymnasium as gym

from envs.text_env import TextEnv


class Words(TextEnv):
    """Any text is an action: an untrained policy plays long, different episodes.

    Chance is in step(), from the environment's own generator; info tells what it has heard.
    """

    def __init__(self, max_turns=6, max_answers=6, feedback="unary", **kwargs):
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


class Faulty(TextEnv):
    """Goes wrong in reset() or on its second turn, in the way it is told to."""

    def __init__(self, fault="", **kwargs):
        super().__init__(**kwargs)
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return (7 if self.fault == "reset" else "start"), {}

    def step(self, action):
        self.turn += 1
        if self.turn == 2 and self.fault == "raise":
            raise RuntimeError("out of apples")
        reward = float("nan") if self.turn == 2 and self.fault == "nan" else 0.5
        return None if self.turn == 2 and self.fault == "none" else "next", reward, self.turn == 3, False, {}


gym.register("tests/Words-v0", entry_point=Words)
gym.register("tests/AnyOrder-v0", entry_point=AnyOrder)
gym.register("tests/FailsOnOneRank-v0", entry_point=FailsOnOneRank)
gym.register("tests/YesOrNo-v0", entry_point=YesOrNo)
gym.register("tests/Faulty-v0", entry_point=Faulty)
