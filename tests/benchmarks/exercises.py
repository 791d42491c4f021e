"""The exercises of docs/exercises.md: the same command and seed with and without the patch.

    python tests/benchmarks/exercises.py [exercise ..]        about 25 minutes on a CPU core

One after the other, one thread each, in a copy of the tree. The run without the patch comes first, so that
its warm start is in the cache when the other one begins. Writes results/exercises.csv: the mean of a column
over the iterations, of eval columns the last value.
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
EXERCISES = {  # command, columns
    "01": ("algos/ms_grpo.py --num-iterations 20 --num-minibatches 8 --learning-rate 1e-3",
           "eval_success clip_fraction approx_kl entropy"),
    "02": ("algos/igpo.py --num-iterations 20", "approx_kl entropy clip_fraction eval_success"),
    "03": ("algos/st_ppo.py --num-iterations 15", "explained_variance value_loss eval_success"),
    "04": ("algos/ms_grpo.py --num-iterations 20", "groups_without_signal entropy train_success eval_success"),
    "05": ("algos/archer.py --max-turns 10 --num-iterations 8 --actor-warm-up 8 --eval-episodes 16",
           "q v critic_loss explained_variance"),
    "06": ("algos/st_ppo.py --num-iterations 15", "explained_variance value_loss eval_success"),
    "07": ("algos/igpo.py --num-iterations 20 --micro-batch-tokens 512", "entropy grad_norm eval_success"),
    "08": ("algos/ms_grpo.py --num-iterations 20 --kl-coefficient 0.3", "kl_policy_ref_k3 entropy grad_norm eval_success"),
    "09": ("algos/gigpo.py --num-iterations 20 --warm-start-steps 250",
           "train_tokens_per_turn train_invalid_actions approx_kl eval_success"),
    "10": ("algos/gigpo.py --num-iterations 20 --temperature 0.7 --num-minibatches 1",
           "approx_kl clip_fraction entropy eval_success"),
}


def copy_of_the_tree(folder: str) -> Path:
    """What the scripts, their tests and the patches need, in a new folder."""
    ignore = shutil.ignore_patterns(".git", "runs", "figures", "__pycache__", ".*_cache", ".venv")
    return Path(shutil.copytree(ROOT, Path(folder) / "tree", ignore=ignore))


def patch(tree: Path, exercise: str, *flags: str):
    subprocess.run(["git", "apply", *flags, f"docs/exercises/{exercise}.patch"], cwd=tree, check=True)


def run(tree: Path, command: str, cache: str) -> list[dict[str, str]]:
    """The rows of its metrics.csv."""
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run([sys.executable, *command.split(), "--seed", str(SEED), "--run-dir", runs, "--print-samples", "0"],
                       cwd=tree, check=True, env={"TURNRL_CACHE": cache} | os.environ | {"OMP_NUM_THREADS": "1"})
        [path] = Path(runs).glob("*/metrics.csv")
        return list(csv.DictReader(open(path)))


def value(rows: list[dict[str, str]], column: str) -> str:
    numbers = [float(row[column]) for row in rows if row.get(column)]
    return f"{numbers[-1] if column.startswith('eval_') else sum(numbers) / len(numbers):.3g}"


if __name__ == "__main__":
    table = ROOT / "results/exercises.csv"
    rows = list(csv.DictReader(open(table))) if table.exists() else []
    unpatched = {}  # exercises may share a command
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(folder)
        for exercise in sys.argv[1:] or EXERCISES:
            command, columns = EXERCISES[exercise]
            if command not in unpatched:
                unpatched[command] = run(tree, command, f"{folder}/cache")
            patch(tree, exercise)
            patched = run(tree, command, f"{folder}/cache")
            patch(tree, exercise, "-R")
            rows = [row for row in rows if row["exercise"] != exercise] + [
                {"exercise": exercise, "column": column, "without": value(unpatched[command], column),
                 "with": value(patched, column), "iterations": patched[-1]["iteration"], "seed": SEED}
                for column in columns.split()]
            with open(table, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[-1]))
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda row: row["exercise"]))
