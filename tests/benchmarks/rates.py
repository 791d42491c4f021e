"""Arms of run_all.sh at three learning rates each, on seeds that no table reports.

    python tests/benchmarks/rates.py CLAIMS "PATTERN"          such as: rates.py tree_grpo "tree_*"

CLAIMS and PATTERN as SCRIPTS and ARMS of run_all.sh. One run after the other, one thread each. A run that
is finished is not made again. Adds its rows to results/rates.csv and prints the mean of every rate.
"""

import collections
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


def summary(folder: Path, command: list[str]) -> dict:
    """What the run of this command, finished or made now, wrote at its end."""
    if not list(folder.glob("*/summary.json")):
        subprocess.run([sys.executable, *command, "--run-dir", folder, "--print-samples", "0"], cwd=ROOT,
                       check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    [path] = folder.glob("*/summary.json")
    return json.loads(path.read_text())


if __name__ == "__main__":
    claims, pattern = sys.argv[1:]
    rows = list(csv.DictReader(open(TABLE))) if TABLE.exists() else []
    arms = subprocess.run(["./run_all.sh", "--list"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name, arm, _, *command in map(shlex.split, arms.stdout.splitlines()):
        if name != claims or not fnmatch.fnmatch(arm, pattern):
            continue
        ends = collections.defaultdict(list)
        for rate in RATES:
            for seed in SEEDS:
                end = summary(ROOT / f"runs/rates/{claims}/{arm}-{rate}-{seed}", [
                    *command, "--learning-rate", rate, "--seed", str(seed)])  # the last one counts
                row = {"claims": claims, "arm": arm, "learning_rate": rate, "seed": str(seed), **{
                    f"{what}_{when}": f"{end[f'{what}_{when}']:.3f}"
                    for what in ("success", "return") for when in ("start", "end")}}
                ends[rate].append(end["success_end"])
                rows = [old for old in rows if [*old.values()][:4] != [*row.values()][:4]] + [row]
                with open(TABLE, "w", newline="") as file:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                    writer.writerows(sorted(rows, key=lambda row: [*row.values()][:2]))
        print(arm, {rate: round(statistics.mean(x), 3) for rate, x in ends.items()}, flush=True)
