"""Three recipes of docs/recipes.md against the scripts that they change, five seeds each.

    python tests/benchmarks/recipes.py [recipe ..]        about an hour on 2 CPU cores

Both arms of a seed have the same warm start, made with eight turns, and as many iterations. Afterwards
both are evaluated once more with eight turns, which matters for mini_o3: its episodes had three. A run
that is in the table is not made again. Writes results/recipes.csv.
"""

import concurrent.futures
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from benchmarks.exercises import copy_of_the_tree

SEEDS, TABLE = range(1, 6), ROOT / "results/recipes.csv"
GRPO = "--sampling all --history-turns None --tiny-init-std 0.1 --warm-start-learning-rate 2e-3"
REGIMES = {  # recipe: script, flags of the warm start, further flags of the training, column that is logged
    "simpletir": ("ms_grpo", f"--env-id turnrl/ToolDesk-v0 --max-turn-tokens 6 {GRPO} --warm-start-steps 250",
                  "--num-iterations 40 --learning-rate 3e-4", "void_episodes"),
    "mini_o3": ("ms_grpo", f"--env-id turnrl/SearchQA-v0 {GRPO} --warm-start-steps 300",
                "--num-iterations 60 --learning-rate 3e-4 --max-turns 3", "train_truncated"),
    "turn_ppo": ("st_ppo", "--variant ppo --gae-lambda 0.95 --discount 0.95", "", "explained_variance"),
}
COLUMNS = ["recipe", "arm", "seed", "success_start", "success_end", "success_eight_turns", "logged", "grad_norm_max"]


def run(tree: Path, script: str, seed: int, flags: str) -> tuple[list[dict[str, str]], Path]:
    """The rows of its metrics.csv, and its checkpoint."""
    folder = tempfile.mkdtemp(dir=tree.parent)
    subprocess.run([sys.executable, f"algos/{script}.py", *flags.split(), "--seed", str(seed), "--run-dir", folder,
                    "--print-samples", "0", "--eval-every", "1000"], cwd=tree, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1", "TURNRL_CACHE": f"{tree.parent}/cache"})
    [path] = Path(folder).glob("*/metrics.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file)), path.parent / "checkpoint"


def measure(trees: dict[str, Path], recipe: str, seed: int) -> list[dict]:
    script, game, training, logged = REGIMES[recipe]
    _, start = run(trees["plain"], script, seed, f"{game} --warm-start-only")
    rows = []
    for arm, tree in (("plain", trees["plain"]), ("patched", trees[recipe])):
        metrics, end = run(tree, script, seed, f"{game} --model {start} --warm-start-steps 0 {training}")
        [later], _ = run(tree, script, seed, f"{game} --model {end} --warm-start-steps 0 --eval-only")
        numbers = {name: [float(row[name]) for row in metrics if row.get(name)] for name in (logged, "grad_norm", "eval_success")}
        rows.append({"recipe": recipe, "arm": arm, "seed": seed, "success_start": numbers["eval_success"][0],
                     "success_end": numbers["eval_success"][-1], "success_eight_turns": float(later["eval_success"]),
                     "logged": sum(numbers[logged]) / len(numbers[logged]) if numbers[logged] else "",
                     "grad_norm_max": max(numbers["grad_norm"])})
    return rows


if __name__ == "__main__":
    done = list(csv.DictReader(open(TABLE))) if TABLE.exists() else []
    known = {(row["recipe"], int(row["seed"])) for row in done}
    wanted = [(recipe, seed) for recipe in sys.argv[1:] or REGIMES for seed in SEEDS if (recipe, seed) not in known]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        trees = {"plain": copy_of_the_tree(folder)}
        for recipe in {recipe for recipe, _ in wanted}:
            trees[recipe] = copy_of_the_tree(f"{folder}/{recipe}")
            subprocess.run(["git", "apply", f"docs/recipes/{recipe}.patch"], cwd=trees[recipe], check=True)
        for rows in pool.map(lambda key: measure(trees, *key), wanted):
            print(*rows, sep="\n", flush=True)
            done += rows
            with open(TABLE, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()} for row in done)
