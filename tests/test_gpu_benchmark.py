"""tests/benchmarks/gpu.py in tiny sizes on the CPU: every stage writes its rows."""

import csv
import importlib
import os
import subprocess
import sys

import pytest
import tyro

from benchmarks import gpu
from conftest import ROOT

COLUMNS = ["stage", "name", "metric", "value", "device", "torch", "transformers", "commit"]


def benchmark(tmp_path, **options) -> gpu.Benchmark:
    return gpu.Benchmark(gpu.Options(
        device="cpu", folder=str(tmp_path / "runs"), csv=str(tmp_path / "gpu.csv"), commit="abc", **options))


def test_what_is_measured_again_takes_the_place_of_its_old_numbers(tmp_path):
    bench = benchmark(tmp_path)
    bench.record("speed", "decode 1", {"tokens_per_second": 1.0, "limit": 2.0, "peak_gib": 3.0})
    bench.record("speed", "decode 4", {"limit": 3.0})
    bench.record("speed", "decode 1", {"tokens_per_second": 1234567.0, "limit": 0.25})
    bench.where |= {"device": "another"}
    bench.record("speed", "decode 1", {"limit": 9.0})
    rows = gpu.read(tmp_path / "gpu.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["name"], row["metric"], row["value"], row["device"]) for row in rows] == [
        ("decode 4", "limit", "3", "cpu"), ("decode 1", "tokens_per_second", "1.23457e+06", "cpu"),
        ("decode 1", "limit", "0.25", "cpu"), ("decode 1", "limit", "9", "another")]
    assert {row["commit"] for row in rows} == {"abc"}


def test_what_a_run_has_come_to(tmp_path):
    """Evaluated at 0, 2 and 6 minutes and stopped after 9; the target of 0.85 was there after 2."""
    rows = [("0", "0.1", "0", "0", ""), ("1", "", "40", "60", "0.01"), ("2", "0.9", "80", "120", "0.03"),
            ("3", "0.8", "120", "360", "0.02"), ("4", "", "160", "540", "0.04")]
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("iteration", "eval_success", "generated_tokens", "seconds", "sampling_gap"), *rows])
    values = {"success_start": 0.1, "success_end": 0.8, "iterations": 4, "minutes": 9,
              "tokens_per_second": pytest.approx(160 / 540), "sampling_gap": pytest.approx(0.025), "sampling_gap_last": 0.04}
    assert gpu.reached(tmp_path, 0.95) == gpu.reached(tmp_path, None) == values
    assert gpu.reached(tmp_path, 0.85) == values | {"minutes_to_target": 2}
    assert gpu.reached(tmp_path / "nothing", 0.85) == {}


def test_every_run_of_the_stage_chat_has_flags_that_its_script_knows(tmp_path, monkeypatch):
    bench, runs = benchmark(tmp_path), {}
    monkeypatch.setattr(bench, "play", lambda stage, some: runs.update(some))
    bench.chat()
    assert len(runs) == 3 * 5 - 1 and gpu.TARGETS.keys() < gpu.GAMES.keys() and "frozen_lake_igpo" not in runs
    for path, flags in runs.values():
        args = tyro.cli(importlib.import_module(f"algos.{path.stem}").Args, args=flags)
        assert args.num_prompts * args.group_size == 512 and args.warm_start_steps >= 100


def test_only_what_was_made_now_is_written(tmp_path, monkeypatch, capsys):
    """With the versions of now; and --only chooses by how a name begins."""
    bench = benchmark(tmp_path, only=("a", "c"), together=2)
    monkeypatch.setattr(bench, "run", lambda folder, script, flags: {"exit_code": 1} if folder.name == "ab" else {})
    bench.play("scripts", dict.fromkeys(("ab", "bc", "ca"), (None, [])))
    assert [(row["name"], row["metric"]) for row in gpu.read(tmp_path / "gpu.csv")] == [("ab", "exit_code")]
    assert "scripts ca: finished, or its minutes are over" in capsys.readouterr().out.splitlines()


SCRIPT = """
import pathlib, signal, sys, time
where = pathlib.Path(sys.argv[-1])
run = where if "--resume" in sys.argv else where / "run"
(run / "checkpoint").mkdir(parents=True, exist_ok=True)
(run / "metrics.csv").write_text("seconds\\n6\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(0 if "--resume" in sys.argv else 60)
(run / "summary.json").write_text("{}")
"""


def test_a_run_is_stopped_at_its_limit_and_goes_on_with_a_longer_one(tmp_path):
    """A script that says it needed 6 seconds before it was stopped: a limit of 5 is over, one of 9 is not."""
    (tmp_path / "script.py").write_text(SCRIPT)
    bench, run = benchmark(tmp_path), (tmp_path / "run", tmp_path / "script.py", [])
    for seconds, exit_code in ((5, 143), (5, None), (9, 0), (9, None)):
        bench.options.minutes = seconds / 60
        assert bench.run(*run) == ({} if exit_code is None else {"exit_code": exit_code, "together": 1})
    (tmp_path / "script.py").write_text("raise SystemExit('what is wrong')")
    assert bench.run(tmp_path / "other", *run[1:])["exit_code"] == 1
    assert bench.run(tmp_path / "other", *run[1:])["exit_code"] == 1, "it is tried again"


@pytest.mark.slow
@pytest.mark.parametrize("stage,only,names", [
    ("tests", (), ["test_beliefs_on_the_gpu_equal_those_on_the_cpu"]), ("scripts", ("st",), ["st_ppo"]),
    ("speed", (), ["limits", "train 1024", "train 1024 checkpointing", "decode 1", "decode 4"]),
    ("chat", (), [f"guess_number_{algo}" for algo in ("ms_grpo", "gigpo", "igpo", "st_ppo", "tis")])])
def test_a_stage_in_tiny_sizes_on_the_cpu(tmp_path, stage, only, names):
    command = [sys.executable, ROOT / "tests/benchmarks/gpu.py", stage, "--device", "cpu", "--quick", "--together", "2",
               "--folder", tmp_path / "runs", "--csv", tmp_path / "gpu.csv", *(("--only", *only) if only else ())]
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}  # it may start pytest
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = gpu.read(tmp_path / "gpu.csv")
    assert list(rows[0]) == COLUMNS and {(row["stage"], row["device"]) for row in rows} == {(stage, "cpu")}
    found = {row["name"] for row in rows}
    assert found >= set(names) if stage == "tests" else found == set(names), done.stdout
    values = {(row["name"], row["metric"]): float(row["value"]) for row in rows}
    if stage in ("scripts", "chat"):
        assert all(values[name, "exit_code"] == 0 and values[name, "iterations"] == 1 for name in names), done.stdout
        assert all(0 <= values[name, f"success_{end}"] <= 1 for name in names for end in ("start", "end"))
    if stage == "speed":
        assert all(values[name, "tokens_per_second"] > 0 for name in names[1:])
    if stage == "tests":
        assert all(values[name, "skipped"] + values[name, "passed"] <= 1 for name in found)
