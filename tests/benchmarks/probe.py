"""How fast are the beliefs of IGPO: one packed row per episode, against a row per belief.

    python tests/benchmarks/probe.py [--threads 1] [--episodes 64] [--repeats 5]

Episodes of the scripted player of SearchQA with ever more hops; seconds are the median of the repeats.
Writes results/probe.csv.
"""

import csv
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from algos.igpo import Args, probe_beliefs
from envs import make_env
from envs.episodes import Turn, start_episodes
from policies import make_tiny
from utils import Policy, random_stream


@dataclasses.dataclass
class Options:
    threads: int = 1  # CPU threads
    episodes: int = 64  # episodes probed at once
    repeats: int = 5  # measurements, of which the median counts


def main(options: Options):
    torch.set_num_threads(options.threads)
    rows = []
    for hops in (1, 3, 7, 11):
        env = make_env("turnrl/SearchQA-v0", min_hops=hops, max_hops=hops)
        words = [*env.unwrapped.names, *env.unwrapped.relations, "search", "answer", "result"]
        policy = Policy(*make_tiny(Args(), [f" {word}" for word in words] * 9), "cpu")
        episodes = []
        for seed in range(options.episodes):
            [episode] = start_episodes([env], [seed])
            while not episode.done:
                action = env.unwrapped.demonstrate(random_stream(seed), noise=0.0)
                prompt = policy.prompt(episode, None)
                ids = [*policy.encode(action), policy.end_id]
                episode.answer(env, Turn(episode.observation, action, *prompt, ids, [0.0] * len(ids)))
            episodes.append(episode)
        seconds, beliefs = {"packed": [], "separate": []}, {}
        for _ in range(options.repeats + 1):
            for probe in seconds:
                args = Args(probe=probe)
                start = time.perf_counter()
                beliefs[probe] = probe_beliefs(policy, episodes, "answer {answer}", args)
                seconds[probe].append(time.perf_counter() - start)
        packed, separate = (statistics.median(seconds[probe][1:]) for probe in seconds)
        rows.append({"turns": hops + 1, "tokens": len(episodes[0].row()), "packed_seconds": packed,
                     "separate_seconds": separate, "speed_up": separate / packed,
                     "largest_difference": (beliefs["packed"] - beliefs["separate"]).abs().max().item()})
        print(" ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    with open(ROOT / "results/probe.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
