"""Records of play: turns, episodes, and the scripted demonstrations of an environment."""

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Mapping

import gymnasium as gym
import numpy as np


@dataclasses.dataclass
class Turn:
    """One observation and the policy's answer to it."""

    observation: str
    action: str
    prompt_ids: list[int] = dataclasses.field(default_factory=list)  # fed before the answer
    starts_row: bool = True  # prompt_ids is a whole context, not a continuation of the last turn
    token_ids: list[int] = dataclasses.field(default_factory=list)  # sampled, end_id included
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of token_ids, when sampled
    forced: set[int] = dataclasses.field(default_factory=set)  # positions put in, not sampled
    reward: float = 0.0
    info: dict = dataclasses.field(default_factory=dict)  # what the environment answered
    gap: float = math.nan  # by how much rollouts.refresh_logprobs changed logprobs, in total

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - len(self.forced)


@dataclasses.dataclass
class Episode:
    """Turns from one reset; `observation` is what the policy has to answer next."""

    seed: int
    observation: str
    turns: list[Turn] = dataclasses.field(default_factory=list)
    start_info: dict = dataclasses.field(default_factory=dict)  # of the reset
    info: dict = dataclasses.field(default_factory=dict)  # of the last reset or step
    terminated: bool = False
    truncated: bool = False
    overflowed: bool = False  # truncated because the context is full

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated

    @property
    def success(self) -> bool:
        return bool(self.info.get("success", False))

    @property
    def total_reward(self) -> float:
        return sum((turn.reward for turn in self.turns), 0.0)

    def row(self) -> list[int]:
        """The tokens of the current row: every prompt and answer since it was started."""
        ids: list[int] = []
        for turn in self.turns:
            ids = ([] if turn.starts_row else ids) + turn.prompt_ids + turn.token_ids
        return ids

    def answer(self, env: gym.Env, turn: Turn):
        """Let the environment react to `turn`, and append it."""
        with blaming(env, self):
            observation, reward, terminated, truncated, info = fields(
                env.step(turn.action), "observation", "reward", "terminated", "truncated", "info")
            array = np.asarray(reward)
            if array.size != 1 or array.dtype.kind not in "biuf" or not abs(array) < 1e30:
                raise ValueError(f"reward {reward!r} is not a finite number (below 1e30)")
            turn.reward, turn.info = float(array.item()), checked_info(info)
            self.terminated = yes_or_no("terminated", terminated)
            self.truncated = yes_or_no("truncated", truncated) and not self.terminated
            self.observation, self.info = checked_text("observation", observation), turn.info
        self.turns.append(turn)

    def transcript(self) -> str:
        """The episode as a person reads it."""
        lines = []
        for turn in self.turns:
            lines += ["    " + line for line in turn.observation.splitlines()]
            lines += [f"  > {turn.action}    (reward {turn.reward:+.2f})"]
        lines += ["    " + line for line in self.observation.splitlines()]
        end = "success" if self.success else "terminated" if self.terminated else "truncated"
        return "\n".join([*lines, f"  = {end}, return {self.total_reward:.2f}"])


class EnvironmentFault(Exception):
    """An environment raised or broke the interface; carries the episode up to there."""

    def __init__(self, episode: Episode, env: gym.Env, error: Exception):
        lines = str(error).strip().splitlines() or ["(no message)"]
        super().__init__(f"environment {type(env.unwrapped).__name__}, seed {episode.seed}, "
                         f"turn {len(episode.turns)}: {type(error).__name__}: {lines[0][:500]}")
        self.episode = episode


@contextlib.contextmanager
def blaming(env: gym.Env, episode: Episode):
    """Around everything an environment does, and the reading of what it returns."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in (130, 143):  # it was a signal
            raise
        raise EnvironmentFault(episode, env, error) from error


def attribute(env: gym.Env, name: str, default=None):
    """What an environment or a wrapper around it defines."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else default


def fields(answer, *names: str):
    """What reset() or step() returned, if it has the parts that it must have."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(names):
        raise TypeError(f"expected ({', '.join(names)}), got {answer!r}")
    return answer


def checked_text(name: str, value) -> str:
    """A string that can be encoded: a lone surrogate becomes U+FFFD."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is not a string: {value!r}")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def yes_or_no(name: str, value) -> bool:
    """Also of an array of one; None is no. Text cannot be judged: is "False" a yes?"""
    array = np.asarray(value)
    if array.size != 1 or array.item() not in (0, 1, None):
        raise TypeError(f"{name} is neither yes nor no: {value!r}")
    return bool(array.item())


def checked_info(info) -> dict:
    """A copy of what an environment tells; None tells nothing."""
    if not isinstance(info, Mapping | None):
        raise TypeError(f"info is not a dict: {info!r}")
    info = {name: checked_text(name, x) if isinstance(x, str) else x
            for name, x in (info or {}).items()}
    flags = info.keys() & {"success", "invalid_action"}
    return info | {name: yes_or_no(name, info[name]) for name in flags}


warn_once = functools.cache(warnings.warn)


def start_episodes(envs: list[gym.Env], seeds: list[int]) -> list[Episode]:
    """Reset every environment with its seed."""
    episodes, first = [], {}
    for env, seed in zip(envs, seeds, strict=True):
        episodes.append(episode := Episode(int(seed), observation=""))
        with blaming(env, episode):
            observation, info = fields(env.reset(seed=int(seed)), "observation", "info")
            episode.observation = checked_text("observation", observation)
            episode.info = checked_info(info)
        episode.start_info, start = episode.info, first.setdefault(seed, episode.observation)
        if start != episode.observation and os.environ.get("RANK", "0") == "0":
            warn_once(f"environment {type(env.unwrapped).__name__} starts differently from the "
                      "same seed: groups then compare episodes of different tasks")
    return episodes


def demonstrations(env: gym.Env, seeds: list[int], max_turns: int, rng) -> list[Episode]:
    """Episodes of the environment's scripted player, or else of random legal actions."""
    episodes = []
    for seed in seeds:
        [episode] = start_episodes([env], [seed])
        while not episode.done and len(episode.turns) < max_turns:
            player = attribute(env, "demonstrate")
            if player is None and "legal_actions" not in episode.info:
                raise NotImplementedError("it has neither demonstrate() nor info['legal_actions'] "
                                          "to warm-start the tiny model")
            with blaming(env, episode):
                action = player(rng) if player else str(rng.choice(episode.info["legal_actions"]))
                action = checked_text("the demonstrated action", action)
            episode.answer(env, Turn(episode.observation, action))
        episodes.append(episode)
    return episodes
