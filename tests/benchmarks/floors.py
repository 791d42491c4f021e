"""What random play earns in the games of the claims: the floor that a start must be above.

    python tests/benchmarks/floors.py            about a minute

The player knows how an action is written and nothing else: it draws one uniformly, without looking
at the observation, as often as the game lets it. It plays held-out instances with the settings of an
evaluation. Writes results/floors.csv.
"""

import csv
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import envs  # noqa: F401  registers the games
from envs.text_env import EVALUATION_SEEDS
from envs.tool_desk import DONE, ITEMS, NUMBERS

EPISODES = 4000


def move(env, rng) -> str:
    return str(rng.choice(["up", "down", "left", "right"]))


def number(env, rng) -> str:
    low, high = env.candidates if env.level == "6" else (0, 9)  # those of levels 1 to 3
    return f"<answer>{rng.integers(low, high + 1)}</answer>"


def page(env, rng) -> str:
    return f"sum so go {rng.integers(5)}"


def search_or_answer(env, rng) -> str:
    if rng.random() < 0.5:
        return f"search {rng.choice(env.names)} {rng.choice(env.relations)}"
    return " ".join(["answer", *rng.choice(env.names, size=len(env.paths))])


def command(env, rng) -> str:
    verb = rng.choice(["login", "list", "find", "confirm", "finish", *DONE])
    if verb == "find":
        return f"find {rng.choice(ITEMS)}"
    return verb if verb in ("list", "confirm", "finish") else f"{verb} {rng.choice(NUMBERS)}"


def question(env, rng) -> str:
    return str(rng.choice([*env.questions, *env.guesses]))


def lose(env, rng) -> str:
    """The worst play. Random play earns more than the start of these runs, on purpose: a start that
    is as good in the last round has no reason to leave."""
    return "right" if env.round == env.rounds else "stay"


GAMES = {  # name: environment, settings, what it does
    "lake": ("turnrl/FrozenLake-v0", {}, move),
    "large lake": ("turnrl/FrozenLake-v0", {"size": 6, "max_turns": 16}, move),
    "snake": ("turnrl/Snake-v0", {"max_turns": 20}, move),
    "retry, 1 answer": ("turnrl/RetryMath-v0", {"levels": "123", "max_answers": 1}, number),
    "retry, 5 answers": ("turnrl/RetryMath-v0", {"levels": "123"}, number),
    "words, 1 answer": ("turnrl/RetryMath-v0", {"max_answers": 1}, number),
    "words, 5 answers": ("turnrl/RetryMath-v0", {}, number),
    "think": ("turnrl/ThinkSearch-v0", {}, page),
    "turns": ("turnrl/ThinkSearch-v0", {"regime": "turns"}, page),
    "search": ("turnrl/SearchQA-v0", {}, search_or_answer),
    "three people": ("turnrl/SearchQA-v0", {"regime": "parts"}, search_or_answer),
    "desk": ("turnrl/ToolDesk-v0", {}, command),
    "objects": ("turnrl/TwentyQuestions-v0", {}, question),
    "maze": ("turnrl/Maze-v0", {}, move),
    "trust": ("turnrl/Trust-v0", {"rounds": 3}, lose),
}


def play(env: gym.Env, action, seed: int) -> tuple[bool, float]:
    """Success and return of one episode."""
    rng = np.random.default_rng(seed)
    env.reset(seed=EVALUATION_SEEDS + seed)
    total, ended = 0.0, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(action(env, rng))
        total, ended = total + float(reward), terminated or truncated
    return bool(info["success"]), total


def main():
    with open(ROOT / "results/floors.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["game", "success", "return", "episodes"])
        for name, (env_id, settings, action) in GAMES.items():
            env = gym.make(env_id, disable_env_checker=True).unwrapped
            env = type(env)(**settings, **env.evaluation_kwargs)
            played = [play(env, action, seed) for seed in range(EPISODES)]
            row = [name, *(f"{np.mean(column):.4f}" for column in zip(*played, strict=True)), EPISODES]
            print(*row)
            writer.writerow(row)


if __name__ == "__main__":
    main()
