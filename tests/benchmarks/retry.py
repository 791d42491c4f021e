"""What trained retry policies would solve without feedback: reference rows for docs/ufo.md.

    python tests/benchmarks/retry.py [runs/claims]

Takes the last checkpoints of the arms words_turns5 and words_turns1 of run_all.sh and asks every held-out
problem N times for one answer, without any feedback. From those samples: right at once, right among k
independent ones (Pass@k, the unbiased estimate 1 - C(n - c, k) / C(n, k)), and right among the first k
different ones (repeated answers rejected). Writes results/retry.csv with one row per arm and seed, and
rows for the scripted player and for guessing candidates without repeating one.
"""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from algos.ufo import Args
from envs.episodes import demonstrations, start_episodes
from envs.text_env import EVALUATION_SEEDS
from policies import load_policy
from rollouts import make_envs, rollout
from utils import random_stream

PROBLEMS, SAMPLES, ANSWERS, BENCHMARK = 256, 32, 5, 99


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def trained(folder: Path) -> dict[str, float]:
    args = Args(**json.loads((folder / "args.json").read_text())["args"])
    policy = load_policy(dataclasses.replace(args, model=str(folder / "checkpoint"), warm_start_steps=0))
    envs = make_envs(args, PROBLEMS, evaluation=True)
    submitted = [[] for _ in range(PROBLEMS)]
    for sample in range(SAMPLES):
        started = start_episodes(envs, [EVALUATION_SEEDS + i for i in range(PROBLEMS)])
        streams = [random_stream(args.seed, BENCHMARK, sample, i) for i in range(PROBLEMS)]
        episodes = rollout(policy, envs, started, streams, 1, args.eval_temperature)
        for answers, episode in zip(submitted, episodes, strict=True):
            answers.append(episode.info["submitted"])
    gold = [episode.info["answer"] for episode in episodes]
    right = [answers.count(answer) for answers, answer in zip(submitted, gold, strict=True)]
    different = [list(dict.fromkeys(a for a in answers if a is not None))[:ANSWERS]
                 for answers in submitted]
    return {"at_once": np.mean([n / SAMPLES for n in right]),
            "independent_5": np.mean([pass_at_k(SAMPLES, n, ANSWERS) for n in right]),
            "different_5": np.mean([a in d for a, d in zip(gold, different, strict=True)])}


def scripted() -> list[dict]:
    """The demonstrator, and guessing without repetition (exact, from the number of candidates)."""
    [env] = make_envs(Args(), 1)
    seeds = [EVALUATION_SEEDS + i for i in range(2048)]
    episodes = demonstrations(env, seeds, ANSWERS, random_stream(1, BENCHMARK))
    at_once, within = (np.mean([e.success and len(e.turns) <= k for e in episodes])
                       for k in (1, ANSWERS))
    sizes = []
    for seed in seeds:
        env.reset(seed=seed)
        low, high = env.unwrapped.candidates
        sizes.append(high - low + 1)
    return [{"arm": "scripted player", "at_once": at_once, "with_feedback_5": within},
            {"arm": "guessing", "at_once": np.mean([1 / n for n in sizes]),
             "different_5": np.mean([min(1, ANSWERS / n) for n in sizes])}]


if __name__ == "__main__":
    runs, rows = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs/claims"), scripted()
    for summary in sorted(runs.glob("ufo/words_turns[15]-*/*/summary.json")):
        arm, seed = summary.parents[1].name.rsplit("-", 1)
        rows.append({"arm": arm, "seed": seed, **trained(summary.parent),
                     "with_feedback_5": json.loads(summary.read_text())["success_end"]})
        print(rows[-1])
    with open(ROOT / "results/retry.csv", "w", newline="") as file:
        names = ["arm", "seed", "at_once", "independent_5", "different_5", "with_feedback_5"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({name: f"{x:.4f}" if isinstance(x, float) else x
                          for name, x in row.items()} for row in rows)
