"""What a GPU does: its tests, every script on it, tokens per second, and a chat model that learns.

    python tests/benchmarks/gpu.py [stage ..]        all stages, or some of:

    tests     pytest -m gpu
    scripts   every script with its default tiny model: success before and after, minutes
    speed     decoding and training of a model of half a billion weights, by gpu_speed.py
    chat      SmolLM2-135M after a short imitation, on three games: success before and after, minutes to the target

Every stage adds rows to results/gpu.csv as soon as it has them, in place of earlier ones of the same device.
Runs are kept in runs/gpu: one that is finished is not made again, and one that was stopped goes on.
--minutes is the limit of a run, its earlier parts included: after that it ends its iteration and stops (exit_code 143).
Without a GPU, --device cpu --quick tries all of it in tiny sizes.
"""

import concurrent.futures
import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_speed
from exercises import copy_of_the_tree

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"guess_number": 0.85, "frozen_lake": 0.9}  # success that a chat model should reach
GAMES = {
    "frozen_lake": ["--env-id", "turnrl/FrozenLake-v0", "--max-turn-tokens", "8"],  # without slipping
    "guess_number": ["--env-id", "turnrl/GuessNumber-v0", "--max-turns", "10", "--max-turn-tokens", "8",
                     "--warm-start-steps", "200"],  # 1 to 1024, ten guesses
    "search": ["--env-id", "turnrl/SearchQA-v0", "--env-kwargs", '{"regime": "easy"}', "--max-turn-tokens", "16"]}
CHAT = ["--warm-start-steps", "100", "--num-iterations", "200", "--num-prompts", "64", "--num-minibatches", "4",
        "--learning-rate", "2e-5", "--micro-batch-tokens", "8192", "--eval-every", "5", "--eval-episodes", "256",
        "--save-every", "10"]
GRPO = ["--history-turns", "None", "--sampling", "all"]  # a growing row, no draw
ALGORITHMS = {"ms_grpo": GRPO, "gigpo": ["--history-turns", "None"], "igpo": [],
       "st_ppo": ["--num-prompts", "512"],  # it compares nobody: groups of one
       "tis": GRPO}  # ms_grpo with the patch of docs/recipes/tis.patch
QUICK = ["--warm-start-steps", "2", "--num-iterations", "1", "--num-prompts", "4", "--group-size", "2",
         "--eval-episodes", "4", "--eval-every", "1", "--max-turns", "3", "--print-samples", "0"]
TINY = gpu_speed.Sizes(batches=(1, 4), micro_batch_tokens=(1024,), layers=2, width=64, vocabulary=512, repeats=1)


@dataclasses.dataclass
class Options:
    stages: tyro.conf.Positional[tuple[Literal["tests", "scripts", "speed", "chat"], ...]] = (
        "tests", "scripts", "speed", "chat")
    device: str = "cuda"  # torch device
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the stage chat: a folder or hub id
    only: tuple[str, ...] = ()  # runs of scripts and chat whose names begin like that
    minutes: float = 10.0  # limit of a run
    together: int = 1  # runs at the same time; they share the device, so each takes longer
    quick: bool = False  # tiny sizes
    sizes: gpu_speed.Sizes = dataclasses.field(default_factory=gpu_speed.Sizes)  # of the stage speed
    folder: str = "runs/gpu"  # of the runs and the random model
    csv: str = "results/gpu.csv"
    commit: str = ""  # of the code, where git cannot tell


class Benchmark:
    def __init__(self, options: Options):
        self.options, self.folder, self.device = options, Path(options.folder), torch.device(options.device)
        for folder in (self.folder, Path(options.csv).parent):
            folder.mkdir(parents=True, exist_ok=True)
        cuda = self.device.type == "cuda"
        if cuda and not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device (--device cpu --quick tries the stages without one)")
        commit = options.commit or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()[:10]
        self.where = {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu", "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": commit}

    def record(self, stage: str, name: str, values: dict[str, float]):
        """Write the numbers of one thing that was measured, in place of its earlier ones on this device."""
        print(f"{stage} {name}: " + ", ".join(f"{metric} {x:.4g}" for metric, x in values.items()), flush=True)
        path, key = Path(self.options.csv), (stage, name, self.where["device"])
        rows = [row for row in (read(path) if path.exists() else [])
                if (row["stage"], row["name"], row["device"]) != key]
        rows += [{"stage": stage, "name": name, "metric": metric, "value": f"{x:.6g}"} | self.where
                 for metric, x in values.items()]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["stage", "name", "metric", "value", *self.where])
            writer.writeheader()
            writer.writerows(rows)

    def tests(self):
        report = self.folder.resolve() / "tests.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-n0", "-m", "gpu", "--tb=short", f"--junitxml={report}",
                        "tests/test_gpu.py"], cwd=ROOT)
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            outcomes = {part.tag for part in case}  # none if it passed
            self.record("tests", case.get("name"), {
                "passed": not outcomes & {"failure", "error", "skipped"}, "skipped": "skipped" in outcomes,
                "seconds": float(case.get("time"))})

    def scripts(self):
        flags = ["--device", self.options.device, *(QUICK if self.options.quick else [])]
        scripts = sorted((ROOT / "algos").glob("*.py"))
        self.play("scripts", {path.stem: (path, flags) for path in scripts})

    def speed(self):
        sizes = TINY if self.options.quick else self.options.sizes
        for name, values in gpu_speed.measure(sizes, self.device, self.folder):
            self.record("speed", name, values)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # it is not in use by the stage chat

    def chat(self):
        quick, model, runs = self.options.quick, self.options.model, {}
        if quick and model == Options.model:
            model = gpu_speed.make_model(TINY, self.folder)
        with tempfile.TemporaryDirectory() as temporary:
            tree = copy_of_the_tree(temporary)
            subprocess.run(["git", "apply", "docs/recipes/tis.patch"], cwd=tree, check=True)
            for algo, own in ALGORITHMS.items():
                path = tree / "algos/ms_grpo.py" if algo == "tis" else ROOT / f"algos/{algo}.py"
                for game in ["guess_number"] if quick else GAMES:
                    runs[f"{game}_{algo}"] = (path, ["--model", model, "--device", self.options.device, *CHAT,
                                                     *GAMES[game], *own, *(QUICK if quick else [])])
            runs.pop("frozen_lake_igpo", None)  # the lake has no answer to believe in
            self.play("chat", runs)

    def play(self, stage: str, runs: dict[str, tuple[Path, list[str]]]):
        """Make some runs, --together at a time: name -> script and flags."""
        pool = concurrent.futures.ThreadPoolExecutor(self.options.together)
        parts = {pool.submit(self.run, self.folder / stage / name, *run): name
                 for name, run in runs.items() if name.startswith(self.options.only or "")}
        try:
            for part in concurrent.futures.as_completed(parts):
                name, made = parts[part], part.result()
                target = next((x for game, x in TARGETS.items() if name.startswith(game)), None)
                if made:
                    self.record(stage, name, made | reached(self.folder / stage / name, target))
                else:
                    print(f"{stage} {name}: finished, or its minutes are over", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def run(self, folder: Path, script: Path, flags: list[str]) -> dict[str, float]:
        """Begin the run in this folder, or go on with it, until its end or its limit; {} if that was reached before."""
        cuda, peak, more = self.device.type == "cuda", 0, ["--run-dir", folder]
        used, limit = 0.0, 60 * self.options.minutes
        for run in folder.glob("*/checkpoint"):
            more, used = ["--resume", run.parent], float(read(run.parent / "metrics.csv")[-1]["seconds"])
        if used > limit or any(folder.glob("*/summary.json")):
            return {}
        threads = str(max(1, (os.cpu_count() or 1) // self.options.together))
        env = {"TURNRL_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": threads} | os.environ
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a") as log:
            process = subprocess.Popen([sys.executable, script, *flags, *more], stdout=log, stderr=log, env=env)
            end = time.monotonic() + limit - used
            while process.poll() is None:
                if time.monotonic() > end:  # it finishes its iteration and writes a checkpoint
                    process.terminate()
                    end = float("inf")
                if cuda:
                    free, total = torch.cuda.mem_get_info(self.device)
                    peak = max(peak, total - free)
                time.sleep(0.2)
        if process.returncode not in (0, 143, -15):  # finished; stopped in training or before it
            print(f"{folder.name} failed:", *(folder / "log.txt").read_text().splitlines()[-5:], sep="\n")
        used_by_all = {"gib_in_use": peak / 2**30} if cuda else {}  # on the device
        return {"exit_code": process.returncode, "together": self.options.together} | used_by_all


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def reached(folder: Path, target: float | None) -> dict[str, float]:
    """What the run of this folder has come to."""
    runs = sorted(folder.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not runs:
        return {}
    rows = read(runs[-1])
    evals = [(float(row["eval_success"]), float(row["seconds"]) / 60) for row in rows if row.get("eval_success")]
    last, there = rows[-1], [minutes for success, minutes in evals if target and success >= target]
    values = {"success_start": evals[0][0], "success_end": evals[-1][0], "iterations": float(last["iteration"]),
              "minutes": float(last["seconds"]) / 60,
              "tokens_per_second": float(last["generated_tokens"]) / float(last["seconds"])}
    values |= {"minutes_to_target": there[0]} if there else {}
    for column in ("sampling_gap", "importance"):  # of bf16; of the recipe tis
        numbers = [float(row[column]) for row in rows if row.get(column)]
        values |= {column: sum(numbers) / len(numbers), f"{column}_last": numbers[-1]} if numbers else {}
    return values


if __name__ == "__main__":
    benchmark = Benchmark(tyro.cli(Options, description=__doc__))
    for stage in benchmark.options.stages:
        getattr(benchmark, stage)()
