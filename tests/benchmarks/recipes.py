"""Three recipes of docs/recipes.md against the scripts that they patch.

    python tests/benchmarks/recipes.py [recipe ..]        about 40 minutes on a CPU core

Two arms, the plain script and a patched copy of it, have the same flags, seeds and warm starts; runs come one
after the other, one thread each. Fixed beforehand: what is compared is success at the end, patched minus plain.
A run that is finished in runs/recipes is not made again: delete its folder when its flags change. Writes
results/recipes.csv and prints the differences.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from benchmarks.exercises import copy_of_the_tree
from results import judge

SEEDS = (1, 2, 3, 4, 5)
STRONG = "--warm-start-learning-rate 2e-3 --tiny-init-std 0.1"  # of short warm starts
RECIPES = {  # script, flags, the column that shows the recipe at work, what changes in the evaluations that count
    "simpletir": (
        "ms_grpo", "--env-id turnrl/ToolDesk-v0 --max-turn-tokens 6 --history-turns None --sampling all"
        f" --learning-rate 1e-3 --num-iterations 20 --warm-start-steps 250 {STRONG}", "void_episodes", ""),
    "mini_o3": (
        "ms_grpo", """--env-kwargs '{"slippery": true, "frozen_share": 0.9, "max_turns": 60}' --max-turns 12"""
        " --sampling all --clip-high 0.3 --learning-rate 1e-3 --num-iterations 30"
        f" --warm-start-steps 300 {STRONG}", "train_truncated", "--max-turns 60"),
    "turn_ppo": (
        "st_ppo", "--variant ppo --gae-lambda 0.95 --num-iterations 40", "train_tokens_per_turn", ""),
}


def trees(recipe: str, folder: str) -> dict[str, Path]:
    """A copy of the tree for every arm."""
    arms = {arm: copy_of_the_tree(f"{folder}/{recipe}/{arm}") for arm in ("plain", "patched")}
    subprocess.run(["git", "apply", f"docs/recipes/{recipe}.patch"], cwd=arms["patched"], check=True,
                   env=os.environ | {"GIT_CEILING_DIRECTORIES": folder})
    return arms


def run(tree: Path, script: str, flags: list[str], folder: Path) -> Path:
    """The finished run in a folder. It is made now if there is none."""
    if not list(folder.glob("*/summary.json")):
        print("===", folder, flush=True)
        subprocess.run(
            [sys.executable, f"algos/{script}.py", *flags, "--run-dir", folder, "--print-samples", "0"], cwd=tree,
            check=True, env={"TURNRL_CACHE": str(ROOT / "runs/recipes/cache")} | os.environ | {"OMP_NUM_THREADS": "1"})
    [summary] = folder.glob("*/summary.json")
    return summary.parent


def summary(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())


def both_arms(recipe: str, seed: int, arms: dict[str, Path], folder: Path) -> list[dict]:
    """A row of the table for every arm."""
    script, words, column, changes = RECIPES[recipe]
    flags, rows = [*shlex.split(words), "--seed", str(seed)], []

    def evaluation(tree: Path, of: Path) -> dict[str, float]:
        """The last one of a run, or if something changes another one of its checkpoint."""
        if changes:
            more = [*shlex.split(changes), "--eval-only", "--warm-start-steps", "0", "--model", str(of / "checkpoint")]
            of = run(tree, script, [*flags, *more], of.parent / "evaluation")
        return summary(of)

    start = run(arms["plain"], script, [*flags, "--warm-start-only"], folder / f"start-{seed}")
    before = evaluation(arms["plain"], start)
    for arm, tree in arms.items():
        trained = run(tree, script, flags, folder / f"{arm}-{seed}")
        after = evaluation(tree, trained)
        with open(trained / "metrics.csv", newline="") as file:
            seen = [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
        rows.append({
            "recipe": recipe, "arm": arm, "seed": seed,
            **{f"{name}_{when}": f"{of[f'{name}_end']:.4f}"
               for name in ("success", "return") for when, of in (("start", before), ("end", after))},
            "column": column, "column_mean": f"{sum(seen) / len(seen):.4f}" if seen else "",
            "generated_tokens": summary(trained)["generated_tokens"], "seconds": summary(trained)["seconds"]})
    return rows


def write(table: Path, new: list[dict]):
    """Puts rows into a table, in place of those of the same runs."""
    def key(row: dict) -> tuple:
        return row["recipe"], int(row["seed"]), row["arm"]
    with open(table, newline="") as file:
        rows = {key(row): row for row in [*csv.DictReader(file), *new]}
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]))
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for recipe in sys.argv[1:] or RECIPES:
            arms, differences = trees(recipe, folder), []
            for seed in SEEDS:
                rows = both_arms(recipe, seed, arms, ROOT / "runs/recipes" / recipe)
                write(ROOT / "results/recipes.csv", rows)
                ends = {row["arm"]: float(row["success_end"]) for row in rows}
                differences.append(ends["patched"] - ends["plain"])
            low, high = judge.interval(differences)
            print(f"{recipe}: patched minus plain {sum(differences) / len(SEEDS):+.3f} [{low:+.3f}, {high:+.3f}]")
