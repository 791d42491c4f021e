"""Text environments for multi-turn agents; importing this package registers their ids."""

import importlib

import gymnasium as gym

from envs.episodes import attribute
from envs.text_env import TextEnv

gym.register("turnrl/FrozenLake-v0", entry_point="envs.frozen_lake:FrozenLake")
gym.register("turnrl/GuessMyCity-v0", entry_point="envs.twenty_questions:GuessMyCity")
gym.register("turnrl/GuessNumber-v0", entry_point="envs.guess_number:GuessNumber")
gym.register("turnrl/Maze-v0", entry_point="envs.maze:Maze")
gym.register("turnrl/RetryMath-v0", entry_point="envs.retry_math:RetryMath")
gym.register("turnrl/SearchQA-v0", entry_point="envs.search_qa:SearchQA")
gym.register("turnrl/Snake-v0", entry_point="envs.snake:Snake")
gym.register("turnrl/ThinkSearch-v0", entry_point="envs.think_search:ThinkSearch")
gym.register("turnrl/ToolDesk-v0", entry_point="envs.tool_desk:ToolDesk")
gym.register("turnrl/ToyText-v0", entry_point="envs.toy_text:ToyText")
gym.register("turnrl/Trust-v0", entry_point="envs.trust:Trust")
gym.register("turnrl/TwentyQuestions-v0", entry_point="envs.twenty_questions:TwentyQuestions")


def make_env(env_id: str, evaluation: bool = False, chat: bool = False, **kwargs) -> gym.Env:
    """Make a text environment from any gymnasium id ("turnrl/Snake-v0", "Taxi-v4", "module:Id-v0").

    `evaluation` adds the environment's own `evaluation_kwargs` (training penalties off), `chat`
    makes one of this package easier for a pretrained model (see TextEnv). A game of
    gymnasium's toy_text family is wrapped into text; another environment that does not speak text
    raises ValueError, a wrong id gymnasium.error.Error, a wrong keyword TypeError.
    """
    module, _, env_id = env_id.rpartition(":")
    if module:
        importlib.import_module(module)  # registers its ids
    if is_toy_text(gym.spec(env_id)):
        env_id, kwargs = "turnrl/ToyText-v0", {"game": env_id, **kwargs}
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    if evaluation and (changes := attribute(env, "evaluation_kwargs")):
        env = gym.make(env_id, disable_env_checker=True, **{**kwargs, **changes})
    if not all(isinstance(s, gym.spaces.Text) for s in (env.observation_space, env.action_space)):
        raise ValueError(f"{env_id} does not speak text: its spaces are {env.observation_space} "
                         f"and {env.action_space}, not spaces.Text")
    if isinstance(env.unwrapped, TextEnv):
        env.unwrapped.chat = chat
    return env


def is_toy_text(spec: gym.envs.registration.EnvSpec) -> bool:
    return str(spec.entry_point).startswith("gymnasium.envs.toy_text")


def known_ids() -> list[str]:
    """The ids of this package and of the toy_text games it can wrap."""
    ours = [i for i in gym.registry if i.startswith("turnrl/") and i != "turnrl/ToyText-v0"]
    return sorted(ours) + sorted(i for i, spec in gym.registry.items() if is_toy_text(spec))
