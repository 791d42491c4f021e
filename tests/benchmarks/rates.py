"""Arms of run_all.sh at three learning rates each, on seeds that no table reports.

    python tests/benchmarks/rates.py CLAIMS "PATTERN" [RATE ..]          such as: rates.py tree_grpo "tree_*"

CLAIMS and PATTERN as SCRIPTS and ARMS of run_all.sh; without RATE: 1e-4, 3e-4 and 1e-3. One run after
the other, one thread each. A run that is finished is not made again. Adds its rows to results/rates.csv: success and return at both ends and as
the mean over the evaluations.
"""

import csv
import fnmatch
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RATES, SEEDS = ("1e-4", "3e-4", "1e-3"), (11, 12)
TABLE = ROOT / "results/rates.csv"


def results(folder: Path, command: list[str]) -> dict[str, str]:
    """What came out of the run of this command, finished or made now."""
    if not list(folder.glob("*/summary.json")):
        subprocess.run([sys.executable, *command, "--run-dir", folder, "--print-samples", "0"], cwd=ROOT,
                       check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    [path] = folder.glob("*/summary.json")
    with open(path.parent / "metrics.csv", newline="") as file:
        evaluations = [row for row in csv.DictReader(file) if row["eval_success"]]
    numbers = {f"{what}_mean": statistics.mean(float(row[f"eval_{what}"]) for row in evaluations)
               for what in ("success", "return")} | json.loads(path.read_text())
    return {f"{what}_{when}": f"{numbers[f'{what}_{when}']:.3f}"
            for what in ("success", "return") for when in ("start", "end", "mean")}


if __name__ == "__main__":
    claims, pattern, *rates = sys.argv[1:]
    rows = list(csv.DictReader(open(TABLE))) if TABLE.exists() else []
    arms = subprocess.run(["./run_all.sh", "--list"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name, arm, _, *command in map(shlex.split, arms.stdout.splitlines()):
        if name != claims or not fnmatch.fnmatch(arm, pattern):
            continue
        for rate in rates or RATES:
            for seed in SEEDS:
                row = {"claims": claims, "arm": arm, "learning_rate": rate, "seed": str(seed), **results(
                    ROOT / f"runs/rates/{claims}/{arm}-{rate}-{seed}",
                    [*command, "--learning-rate", rate, "--seed", str(seed)])}  # the last rate counts
                print(*row.values(), flush=True)
                rows = [old for old in rows if [*old.values()][:4] != [*row.values()][:4]] + [row]
                with open(TABLE, "w", newline="") as file:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                    writer.writerows(sorted(rows, key=lambda row: [*row.values()][:2]))
