"""A run alone and beside another busy program, for several ways in which torch's threads may wait.

    python tests/benchmarks/busy.py        about 4 minutes on 2 CPU cores

Writes results/busy.csv: seconds of six iterations of ms_grpo.py, the smallest of two runs.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},  # the scripts' default
            "spinning, the default of libgomp": {"GOMP_SPINCOUNT": "300000"},
            "OMP_WAIT_POLICY=passive": {"GOMP_SPINCOUNT": "0"}}
COMMAND = [sys.executable, ROOT / "algos/ms_grpo.py", "--num-iterations", "6", "--eval-every", "6", "--eval-episodes",
           "64", "--warm-start-steps", "100", "--print-samples", "0"]


def seconds(settings: dict[str, str], cache: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*COMMAND, "--run-dir", folder], check=True, capture_output=True,
                       env=os.environ | settings | {"TURNRL_CACHE": cache})
        [summary] = Path(folder).glob("*/summary.json")
        return json.loads(summary.read_text())["seconds"]


with tempfile.TemporaryDirectory() as cache:
    seconds({}, cache)  # the warm start
    rows = []
    for name, settings in SETTINGS.items():
        alone = min(seconds(settings, cache) for _ in range(2))
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            beside = min(seconds(settings, cache) for _ in range(2))
        finally:
            other.kill()
        rows.append({"waiting threads": name, "cores": os.cpu_count(), "alone": alone, "beside a busy program": beside,
                     "ratio": f"{beside / alone:.2f}"})
        print(rows[-1])
with open(ROOT / "results/busy.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
