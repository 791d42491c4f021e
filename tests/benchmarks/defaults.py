"""Every script as README's quick start runs it: python algos/x.py, warm start included.

    python tests/benchmarks/defaults.py [script ..]        about 25 minutes on 2 CPU cores

One after the other, each with an empty cache and all cores. Writes results/defaults.csv: success and
return at both ends of the run, seconds of the whole process, and its peak memory.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("ms_grpo", "gigpo", "ufo", "turn_budget", "igpo", "tree_grpo", "st_ppo", "seeupo", "archer")

table = ROOT / "results/defaults.csv"
rows = {row["script"]: row for row in csv.DictReader(open(table))} if table.exists() else {}
for script in sys.argv[1:] or SCRIPTS:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, ROOT / f"algos/{script}.py", "--run-dir", folder],
                                   env=os.environ | {"TURNRL_CACHE": f"{folder}/cache"})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"{script} failed")
        [run] = Path(folder).glob("*/summary.json")
        summary = json.loads(run.read_text())
        record = json.loads((run.parent / "args.json").read_text())
    rows[script] = {
        "script": script, "seed": record["args"]["seed"], "cores": os.cpu_count(),
        **{f"{name}_{end}": f"{summary[f'{name}_{end}']:.3f}"
           for name in ("success", "return") for end in ("start", "end")},
        "seconds": f"{seconds:.0f}", "peak_mebibytes": usage.ru_maxrss // 1024,
        "commit": record["versions"]["commit"][:10]}
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[script]))
        writer.writeheader()
        writer.writerows(rows[name] for name in SCRIPTS if name in rows)
