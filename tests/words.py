"""A game in which any text is an action: an untrained policy plays long, different episodes."""

import os

import gymnasium as gym

from envs.text_env import TextEnv


class Words(TextEnv):
    """Chance is in step(), from the environment's own generator; info tells what it has heard."""

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


gym.register("tests/Words-v0", entry_point=Words)
gym.register("tests/FailsOnOneRank-v0", entry_point=FailsOnOneRank)
