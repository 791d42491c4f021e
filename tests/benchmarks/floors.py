"""What blind guessing earns in the games of the claims: the floor that a start must be above.

    python tests/benchmarks/floors.py            about a minute

The player writes readable actions, drawn uniformly and with repeats, and looks at nothing. It plays
held-out instances with the settings of an evaluation. Writes results/floors.csv.
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

EPISODES = 4000


def among_legal_actions(env, info, rng) -> str:
    return str(rng.choice(info["legal_actions"]))


def any_move(env, info, rng) -> str:
    return str(rng.choice(["up", "down", "left", "right"]))


def any_number(env, info, rng) -> str:
    low, high = env.candidates
    return f"<answer>{rng.integers(low, high + 1)}</answer>"


def any_page(env, info, rng) -> str:
    return f"sum so go {rng.integers(5)}"


def any_name(env, info, rng) -> str:
    return " ".join(["answer", *rng.choice(env.names, size=len(env.paths))])


def any_thing(env, info, rng) -> str:
    return env.guess_form.format(rng.choice(list(env.table)))


GAMES = {  # name: environment, settings, what it does
    "lake": ("turnrl/FrozenLake-v0", {}, any_move),
    "large lake": ("turnrl/FrozenLake-v0", {"size": 6, "max_turns": 16}, any_move),
    "snake": ("turnrl/Snake-v0", {}, any_move),
    "retry, 1 answer": ("turnrl/RetryMath-v0", {"max_answers": 1}, any_number),
    "retry, 5 answers": ("turnrl/RetryMath-v0", {}, any_number),
    "think": ("turnrl/ThinkSearch-v0", {}, any_page),
    "turns": ("turnrl/ThinkSearch-v0", {"regime": "turns"}, any_page),
    "search": ("turnrl/SearchQA-v0", {}, any_name),
    "parts": ("turnrl/SearchQA-v0", {"regime": "parts"}, any_name),
    "desk": ("turnrl/ToolDesk-v0", {}, among_legal_actions),
    "objects": ("turnrl/TwentyQuestions-v0", {}, any_thing),
}


def play(env: gym.Env, guess, seed: int) -> tuple[bool, float]:
    """Success and return of one episode."""
    rng = np.random.default_rng(seed)
    _, info = env.reset(seed=EVALUATION_SEEDS + seed)
    total, ended = 0.0, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(guess(env, info, rng))
        total, ended = total + float(reward), terminated or truncated
    return bool(info["success"]), total


def main():
    with open(ROOT / "results/floors.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["game", "success", "return", "episodes"])
        for name, (env_id, settings, guess) in GAMES.items():
            env = gym.make(env_id, disable_env_checker=True).unwrapped
            env = type(env)(**settings, **env.evaluation_kwargs)
            played = [play(env, guess, seed) for seed in range(EPISODES)]
            row = [name, *(f"{np.mean(column):.4f}" for column in zip(*played, strict=True)), EPISODES]
            print(*row)
            writer.writerow(row)


if __name__ == "__main__":
    main()
