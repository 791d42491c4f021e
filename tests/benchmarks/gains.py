"""What IGPO's belief says about searches: the mean raw gain of every kind of turn.

    python tests/benchmarks/gains.py [--seeds 3] [--episodes 512]

The start policy (warm start only) of the arms middle_* and parts_* plays SearchQA; a turn is a hop
that finds the next person, the last hop, which finds the answer, or a search that finds nothing new.
Writes results/gains.csv.
"""

import collections
import csv
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from algos.igpo import Args, beliefs_before_turns, information_gain
from policies import load_policy
from rollouts import collect_groups, make_envs
from utils import turn_table

REGIMES = {  # name: settings of the environment, steps and episodes of the warm start
    "middle": ({}, None, None),
    "parts": ({"regime": "parts", "wrong": 0.2, "premature": 0.2}, 550, 8192)}


@dataclasses.dataclass
class Options:
    seeds: int = 3  # warm starts
    episodes: int = 512  # episodes of each


def main(options: Options):
    torch.set_num_threads(1)
    gains = collections.defaultdict(list)
    for regime, (settings, steps, shown) in REGIMES.items():
        for seed in range(1, options.seeds + 1):
            args = Args(seed=seed, env_kwargs=json.dumps(settings), warm_start_steps=steps,
                        warm_start_episodes=shown, group_size=1, num_prompts=options.episodes)
            policy = load_policy(args)
            episodes = collect_groups(policy, make_envs(args, options.episodes), args, 0)
            table, mask = turn_table(episodes, lambda turn: 0.0, policy.device)
            for args.belief in ("log_prob", "prob"):
                beliefs = torch.zeros_like(table)
                beliefs[mask] = beliefs_before_turns(policy, episodes, "answer {answer}", args)
                for episode, row in zip(episodes, information_gain(beliefs, mask).tolist(), strict=True):
                    for turn, gain in zip(episode.turns[:-1], row, strict=False):
                        last = turn.info["known"] == turn.info["hops"]
                        kind = {"hop": "last hop" if last else "hop before the last"}.get(
                            turn.info["kind"], "other search")
                        gains[regime, args.belief, kind].append(gain)
    with open(ROOT / "results/gains.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["regime", "belief", "turn", "turns", "mean_gain", "std"])
        for key in sorted(gains):
            row = [*key, len(gains[key]), f"{statistics.mean(gains[key]):.3f}",
                   f"{statistics.stdev(gains[key]):.3f}"]
            print(*row)
            writer.writerow(row)


if __name__ == "__main__":
    main(tyro.cli(Options))
