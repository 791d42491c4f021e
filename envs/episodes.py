"""Records of play: turns, episodes, and the scripted demonstrations of an environment."""

import dataclasses
import math

import gymnasium as gym


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
        try:
            observation, reward, terminated, truncated, info = env.step(turn.action)
            if not isinstance(observation, str):
                raise TypeError(f"observation {observation!r} is not a string")
            if not math.isfinite(reward):
                raise ValueError(f"reward {reward} is not finite")
        except Exception as error:
            raise EnvironmentFault(self, env, error) from error
        turn.reward, turn.info = float(reward), dict(info)
        self.turns.append(turn)
        self.observation, self.info = observation, turn.info
        self.terminated, self.truncated = bool(terminated), bool(truncated and not terminated)

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
        super().__init__(f"environment {type(env.unwrapped).__name__}, seed {episode.seed}, "
                         f"turn {len(episode.turns)}: {type(error).__name__}: {error}")
        self.episode = episode


def start_episodes(envs: list[gym.Env], seeds: list[int]) -> list[Episode]:
    """Reset every environment with its seed."""
    episodes = []
    for env, seed in zip(envs, seeds, strict=True):
        episodes.append(Episode(int(seed), observation=""))
        try:
            observation, info = env.reset(seed=int(seed))
            if not isinstance(observation, str):
                raise TypeError(f"first observation {observation!r} is not a string")
        except Exception as error:
            raise EnvironmentFault(episodes[-1], env, error) from error
        episodes[-1].observation = observation
        episodes[-1].start_info = episodes[-1].info = dict(info)
    return episodes


def demonstrations(env: gym.Env, seeds: list[int], max_turns: int, rng) -> list[Episode]:
    """Episodes of the environment's scripted player, or else of random legal actions."""
    episodes = []
    for seed in seeds:
        [episode] = start_episodes([env], [seed])
        while not episode.done and len(episode.turns) < max_turns:
            if hasattr(env.unwrapped, "demonstrate"):
                action = env.unwrapped.demonstrate(rng)
            elif "legal_actions" in episode.info:
                action = str(rng.choice(episode.info["legal_actions"]))
            else:
                raise NotImplementedError("it has neither demonstrate() nor info['legal_actions'] "
                                          "to warm-start the tiny model")
            episode.answer(env, Turn(episode.observation, action))
        episodes.append(episode)
    return episodes
