"""A pretrained chat model, trained by the scripts on two CPU cores.

    python tests/benchmarks/pretrained.py FOLDER            the runs of RUNS, one after the other
    python tests/benchmarks/pretrained.py FOLDER name ..    only runs whose name begins like that
    python tests/benchmarks/pretrained.py FOLDER --starts   before and after 10 and 30 steps of imitation

FOLDER holds the model, such as SmolLM2-135M-Instruct. A run that is finished is not made again, and
one that was stopped goes on from its last checkpoint. Writes results/pretrained.csv, its curves and a
transcript of both ends, or with --starts results/chat_starts.csv (about 40 minutes).
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GAMES = {  # what is played, and how long an answer may be
    "search": ["--env-id", "turnrl/SearchQA-v0", "--env-kwargs", '{"regime": "easy"}',
               "--max-turn-tokens", "16"],
    "guess_number": ["--env-id", "turnrl/GuessNumber-v0", "--env-kwargs", '{"high": 64}',
                     "--max-turns", "6", "--max-turn-tokens", "8"],
    "retry_maths": ["--env-id", "turnrl/RetryMath-v0", "--env-kwargs", '{"levels": "123"}',
                    "--max-turns", "5", "--max-turn-tokens", "24"],
    "sums": ["--env-id", "turnrl/RetryMath-v0", "--env-kwargs", '{"levels": "45"}',
             "--max-turns", "5", "--max-turn-tokens", "24"],
    "think_search": ["--env-id", "turnrl/ThinkSearch-v0", "--env-kwargs", '{"max_passes": 4}',
                     "--max-turn-tokens", "48"],
    "twenty_questions": ["--env-id", "turnrl/TwentyQuestions-v0", "--max-turns", "20",
                         "--max-turn-tokens", "16"],
    "snake": ["--env-id", "turnrl/Snake-v0", "--max-turn-tokens", "8"],
    "tool_desk": ["--env-id", "turnrl/ToolDesk-v0", "--max-turn-tokens", "12"],
    "frozen_lake": ["--env-id", "turnrl/FrozenLake-v0", "--max-turn-tokens", "8"],
}
GRPO = ["--history-turns", "None", "--sampling", "all"]  # of ms_grpo.py: a growing row, no draw
SEARCH = ["--warm-start-steps", "80", "--num-iterations", "22", "--eval-every", "8",
          "--learning-rate", "2e-5"]
PATIENT = ["--env-kwargs", '{"regime": "easy", "premature": 0.1}']  # its player seldom guesses
HEADLINE = [*PATIENT, "--warm-start-steps", "80", "--num-iterations", "20", "--eval-every", "5",
            "--learning-rate", "2e-5"]
SHORT = ["--warm-start-steps", "40", "--num-iterations", "28", "--eval-every", "7",
         "--learning-rate", "2e-5"]  # half of the imitation
EQUAL = ["--warm-start-steps", "40", "--num-iterations", "60", "--max-generated-tokens", "11000",
         "--eval-every", "4", "--learning-rate", "2e-5"]  # from a worse start, at equal tokens
OTHER = ["--num-iterations", "8", "--eval-every", "4", "--learning-rate", "2e-5"]
NUMBER = ["--warm-start-steps", "30", *OTHER]
RUNS = {  # name: script, game, flags, seeds
    "headline_ms_grpo": ("ms_grpo", "search", [*GRPO, *HEADLINE], (6, 7, 8)),
    "patient_ms_grpo": ("ms_grpo", "search", [*GRPO, *HEADLINE, "--warm-start-steps", "40"], (5,)),
    "search_ms_grpo": ("ms_grpo", "search", [*GRPO, *SEARCH], (1, 2, 3)),
    "long_ms_grpo": ("ms_grpo", "search", [*GRPO, *SHORT], (4,)),
    "equal_ms_grpo": ("ms_grpo", "search", [*GRPO, *EQUAL], (1, 2, 3)),
    "equal_igpo": ("igpo", "search", [*EQUAL, "--belief", "prob"], (1, 2, 3)),
    "equal_tree_grpo": ("tree_grpo", "search", [*EQUAL, "--keep-top-entropy", "1.0"], (1, 2, 3)),
    "equal_gigpo": ("gigpo", "search", [*EQUAL, "--history-turns", "None"], (1, 2, 3)),
    "undiscounted_gigpo": ("gigpo", "search", [*EQUAL, "--history-turns", "None", "--discount", "1"],
                           (1,)),  # does its discount hold it at short episodes?
    "number_ms_grpo": ("ms_grpo", "guess_number", [*GRPO, *NUMBER], (1,)),
    "number_gigpo": ("gigpo", "guess_number", ["--history-turns", "None", *NUMBER], (1,)),
    "number_igpo": ("igpo", "guess_number", NUMBER, (1,)),
    "number_tree_grpo": ("tree_grpo", "guess_number", [  # an iteration has half as many tokens
        *NUMBER, "--num-iterations", "16"], (1,)),
    "number_st_ppo": ("st_ppo", "guess_number", NUMBER, (1,)),
    "maths_ufo": ("ufo", "retry_maths", ["--warm-start-steps", "30", *OTHER], (1,)),
    "sums_ufo": ("ufo", "sums", ["--warm-start-steps", "30", *OTHER], (1,)),
    "search_st_ppo": ("st_ppo", "search", ["--warm-start-steps", "40", *OTHER], (1,)),
    "search_seeupo": ("seeupo", "search", ["--warm-start-steps", "40", *OTHER], (1,)),
    "number_seeupo": ("seeupo", "guess_number", ["--warm-start-steps", "30", *OTHER], (1,)),
    "number_turn_budget": ("turn_budget", "guess_number", ["--warm-start-steps", "30", *OTHER], (1,)),
    "search_turn_budget": ("turn_budget", "search", ["--warm-start-steps", "40", *OTHER], (1,)),
    "number_archer": ("archer", "guess_number", [  # its batches are drawn from a buffer
        "--history-turns", "None", *NUMBER, "--num-prompts", "64", "--num-iterations", "9",
        "--actor-warm-up", "4"], (1,)),
    "search_lora": ("ms_grpo", "search", [*GRPO, *SEARCH[:-1], "2e-4", "--lora-rank", "16"], (1,)),
}


def train(script: str, folder: Path, flags: list[str]) -> Path:
    """The run folder of a script in `folder`: finished, continued or new."""
    more = ["--run-dir", str(folder)]
    for run in folder.glob("*__*"):
        if (run / "summary.json").exists():
            return run
        if (run / "checkpoint").exists():
            more = ["--resume", str(run)]
    print(f"=== {folder.name}", flush=True)
    subprocess.run([sys.executable, ROOT / f"algos/{script}.py", *flags, *more], check=True)
    return next(run for run in folder.glob("*__*") if (run / "summary.json").exists())


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def starts(model: str, runs: Path):
    rows = []
    for game, flags in GAMES.items():
        for steps in (0, 10, 30):
            run = train("ms_grpo", runs / f"start_{game}-{steps}", [
                "--model", model, *flags, "--history-turns", "None", "--warm-start-steps",
                str(steps), "--eval-only", "--seed", "1"])  # the imitation of RUNS is used again
            [end] = read(run / "metrics.csv")
            rows.append({"game": game, "steps": steps, "episodes": 64,
                         "legal": f"{1 - float(end['eval_invalid_actions']):.3f}",
                         "success": f"{float(end['eval_success']):.3f}",
                         "return": f"{float(end['eval_return']):.3f}"})
            write(ROOT / "results/chat_starts.csv", rows)


def runs(model: str, folder: Path, names: list[str]):
    tables: dict[str, list] = {"pretrained": [], "pretrained_curves": [], "pretrained_samples": []}
    for name, (script, game, flags, seeds) in RUNS.items():
        for seed in seeds if name.startswith(tuple(names) or "") else ():
            run = train(script, folder / f"{name}-{seed}", [
                "--model", model, *GAMES[game], *flags, "--seed", str(seed)])
            key = {"run": name, "seed": seed}
            summary, record = (json.loads((run / file).read_text())
                               for file in ("summary.json", "args.json"))
            metrics = read(run / "metrics.csv")
            evals = [row for row in metrics if row["eval_success"]]
            silent = [float(row["groups_without_signal"]) for row in metrics[1:11]
                      if "groups_without_signal" in row]  # a critic compares nobody
            tables["pretrained"].append({
                **key, "script": script, "game": game,
                "warm_start_steps": record["args"]["warm_start_steps"], **summary,
                "unreadable_start": evals[0]["eval_invalid_actions"],
                "unreadable_end": evals[-1]["eval_invalid_actions"],
                "silent_groups": sum(silent) / len(silent) if silent else "",  # first ten iterations
                "cores": os.environ.get("OMP_NUM_THREADS", os.cpu_count()), "commit": record["versions"]["commit"][:10]})
            tables["pretrained_curves"] += [
                {**key, **{column: row[column] or 0 for column in (
                    "iteration", "generated_tokens", "seconds", "eval_success", "eval_return",
                    "eval_turns", "eval_invalid_actions")},
                 **{column: row.get(column, "") for column in (  # of UFO alone
                    "eval_success_at_1", "eval_distinct_ratio")}} for row in evals]
            samples = [json.loads(line) for line in open(run / "samples.jsonl")]
            ends = {evals[0]["iteration"], evals[-1]["iteration"]}
            tables["pretrained_samples"] += [
                {**key, "iteration": e["iteration"], "held_out_seed": e["seed"],
                 "success": e["success"], "turns": json.dumps(e["turns"]),
                 "last_observation": e["last_observation"]}
                for e in samples if str(e["iteration"]) in ends]
            for table, rows in tables.items():
                path = ROOT / f"results/{table}.csv"
                new = {(row["run"], str(row["seed"])) for row in rows}
                old = [row for row in (read(path) if path.exists() else [])
                       if (row["run"], row["seed"]) not in new]
                write(path, old + rows)


if __name__ == "__main__":
    model, *names = sys.argv[1:]
    if names == ["--starts"]:
        starts(model, ROOT / "runs/pretrained")
    else:
        runs(model, ROOT / "runs/pretrained", names)
