"""What a user meets: flags, run folders, resume, signals, bad input, several processes."""

import ast
import csv
import dataclasses
import html
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import tqdm
import tyro

import policies
import run_folder
import utils
from algos import ms_grpo
from conftest import PLOT, ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
QUICK = {"num_prompts": 2, "group_size": 2, "warm_start_steps": 5, "num_iterations": 2,
         "eval_episodes": 4, "eval_every": 1, "save_every": 1, "print_samples": 0,
         "env_kwargs": '{"size": 3}', "max_turns": 4}
WORDS = {"env_id": "words:tests/Words-v0", "env_kwargs": "{}"}
NOT_ALL_HAVE = {"kl_coefficient", "entropy_coefficient"}
FEW_STEPS = {"archer": {"critic_steps": 2, "critic_batch_turns": 8, "fresh_turns": 8, "actor_steps": 2, "actor_batch_turns": 8, "actor_warm_up": 1,
                        "max_turn_tokens": 4}}


def quick(tmp_path, script="ms_grpo", **flags):
    module = importlib.import_module(f"algos.{script}")
    if script != "ms_grpo":
        flags = {"env_kwargs": "{}"} | flags
    flags = {name: value for name, value in flags.items() if hasattr(module.Args, name) or name not in NOT_ALL_HAVE}
    return module.Args(**(QUICK | FEW_STEPS.get(script, {}) | {"run_dir": str(tmp_path / "runs")} | flags))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(*flags, script="ms_grpo", **options):
    return [sys.executable, str(ROOT / f"algos/{script}.py"), *flags,
            *(x for k, v in options.items() for x in ("--" + k.replace("_", "-"), str(v)))]


def only_run(tmp_path) -> Path:
    [folder] = (tmp_path / "runs").iterdir()
    return folder


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file
    return load_file(folder / "checkpoint" / "model.safetensors")


def rows_of(folder: Path) -> list[dict]:
    return list(csv.DictReader(open(folder / "metrics.csv")))


def same_weights(one: Path, two: Path, tolerance: float = 0.0):
    for name, weight in weights(one).items():
        assert (weight - weights(two)[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two iterations with seed 3, whose folder no test may change, its summary and its picture."""
    path = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "NUM_DEMONSTRATIONS", 128)
        summary = ms_grpo.main(quick(path, seed=3))
    return only_run(path), summary


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of it, to be resumed with again(folder)."""
    return Path(shutil.copytree(finished[0], tmp_path / "runs" / finished[0].name))


def again(folder, **flags):
    return quick(folder.parents[1], **{"seed": 3, "resume": str(folder)} | flags)


def fails(capsys, *needles, call=None, args=None):
    """`call` ends with exit code 2 and one line on stderr that holds all needles."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call() if call else ms_grpo.main(args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(needle in lines[0] for needle in needles), lines


# --- flags ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_somewhere_and_explained_in_help(script, capsys):
    module, used = importlib.import_module(f"algos.{script}"), set()
    with pytest.raises(SystemExit) as end:
        tyro.cli(module.Args, args=["--help"], description=module.__doc__)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert end.value.code == 0 and "Eq. 1" in text, "the equations that the flags name"
    sources = [(ROOT / path).read_text() for path in (f"algos/{script}.py", "utils.py", "rollouts.py", "policies.py", "run_folder.py")]
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
            used.add(node.attr)
    lines = "\n".join(sources).splitlines()
    for field in dataclasses.fields(module.Args):  # a comment stands behind the flag or above it
        comment = next((line if "  # " in line else above).split("  # ")[1] for above, line in pairwise(lines)
                       if line.startswith(f"    {field.name}: ") and "  # " in line + above)
        assert "--" + field.name.replace("_", "-") in text and " ".join(comment.split()[:2]) in text, field.name
        assert field.name in used


def test_a_short_run_from_a_clean_checkout(tmp_path):
    """Only what a student would copy: the script, the files beside algos/, and envs/."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("envs", "algos"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = command(**(QUICK | {"print_samples": 1, "warm_start_steps": 60, "run_dir": tmp_path / "runs"}))[2:]
    run = subprocess.run([sys.executable, str(tmp_path / "algos/ms_grpo.py"), *flags], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert "after 0 iterations, held-out seed" in run.stdout and "after 2 iter" in run.stdout
    assert {path.name for path in only_run(tmp_path).iterdir()} == {
        "args.json", "metrics.csv", "samples.jsonl", "samples.html", "checkpoint", "summary.json", "curve.png"}


def test_a_run_folder_holds_what_happened(tmp_path, finished):
    folder, summary = finished
    assert folder.name.startswith("FrozenLake-v0__ms_grpo__3__") and (folder / "curve.png").exists()
    record = json.loads((folder / "args.json").read_text())
    assert record["args"] == dataclasses.asdict(quick(tmp_path, seed=3)) | {"run_dir": str(folder.parent)}
    assert record["versions"]["torch"] == torch.__version__
    rows = rows_of(folder)
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    assert all(row["eval_success"] for row in rows) and rows[0]["train_success"] == ""
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["success_end"] == float(rows[2]["eval_success"])
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert len(samples) == 12 and samples[0]["seed"] == 2**30 and len(samples[0]["turns"][0]) == 3


def check_page(path: Path, given: list):
    """It shows the rows that the updates were given, those with an advantage first, at most eight."""
    page, expected, texts = path.read_bytes().decode(), [], []
    for _, batch, policy in given:
        silent = [not row.any() for row in batch["advantages"]]
        for row in sorted(range(len(silent)), key=silent.__getitem__)[:8]:
            sampled = (batch["turn_id"][row] >= 0).nonzero()[:, 0].tolist()
            credit = batch["advantages"][row]
            expected += [credit[t].item() if credit.dim() else credit.item() for t in sampled]
            ids, pieces = batch["tokens"][row, : batch["lengths"][row]].tolist(), []
            for t, token in enumerate(ids):  # a sampled token alone, others together
                if t in sampled or t == 0 or t - 1 in sampled:
                    pieces.append([])
                pieces[-1].append(token)
            texts.append("".join(policy.tokenizer.decode(piece) for piece in pieces))
    shown = [html.unescape(re.sub("<sup>.*?</sup>|<.*?>", "", row)) for row in re.findall("<pre>(.*?)</pre>", page, re.DOTALL)]
    assert shown == texts
    numbers = [dict(n.split(" ") for n in title.split(", ")) for title in re.findall('<i [^>]*title="(.*?)"', page)]
    assert [float(x["advantage"]) for x in numbers] == pytest.approx(expected, abs=6e-4) and any(expected)
    assert all(float(x["entropy"]) > 0 for x in numbers)
    assert len({x.get("ratio") for x in numbers}) > 3 or "old_logprobs" not in given[0][1], "the update has moved them"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit_and_a_page_of_samples_changes_nothing(
        tmp_path, script, monkeypatch):
    """The uninterrupted one also shows credit, ratio and entropy of tokens, in its first iteration and in the last."""
    main, given, write_page = importlib.import_module(f"algos.{script}").main, [], run_folder.Run.write_page

    def spy(self, iteration, batch):
        given.append((iteration, batch, self.policy))
        write_page(self, iteration, batch)
    monkeypatch.setattr(run_folder.Run, "write_page", spy)
    flags = WORDS | {"kl_coefficient": 0.1, "temperature": 1.2, "learning_rate": 3e-3}
    main(quick(tmp_path / "whole", script, num_iterations=4, print_samples=1, **flags))
    main(quick(tmp_path / "halves", script, num_iterations=2, **flags))
    whole, half = only_run(tmp_path / "whole"), only_run(tmp_path / "halves")
    main(quick(tmp_path / "halves", script, num_iterations=4, resume=str(half), **flags))
    same_weights(whole, half)
    one, two = rows_of(whole), rows_of(half)
    for row in (*one, *two):
        row.pop("seconds")
    assert one == two and len(one) == 5
    assert (whole / "samples.jsonl").read_text() == (half / "samples.jsonl").read_text()
    assert any(float(row.get("grad_norm") or 0) > 0 for row in one), "something was learned"
    first, last = (iteration for iteration, _, _ in given)
    taught = next(int(row["iteration"]) for row in one if float(row.get("grad_norm") or 0) > 0)
    assert first == taught and last == 4, "the first iteration that had anything to learn from"
    assert all("old_logprobs" in batch for _, batch, _ in given), "for the ratios"
    check_page(whole / "samples.html", given)
    assert not (half / "samples.html").exists()


def opened(tmp_path, policy, **flags):
    run = run_folder.Run(quick(tmp_path, **flags), "ms_grpo")
    run.policy, run.shown, run.progress = policy, False, tqdm.tqdm(disable=True)
    return run


def test_a_process_whose_share_of_the_minibatch_is_empty_shows_nothing(tmp_path, tiny_policy):
    run = opened(tmp_path, tiny_policy, print_samples=1)
    run.log(0, [], [], utils.collate([], tiny_policy.device) | {"advantages": torch.zeros(0, 1)})
    assert not (run.folder / "samples.html").exists() and not run.shown


def test_a_row_of_the_log_has_the_means_of_its_updates_and_an_empty_cell_for_a_mean_of_nothing(tmp_path, tiny_policy):
    run = opened(tmp_path, tiny_policy)
    run.log(0, [], [{"loss": 1.0, "kl": 4.0}, {"loss": 2.0, "kl": 0.0}], None, share=math.nan, kl=7.0)
    run.log(1, [], [], None, share=0.5)
    one, two = rows_of(run.folder)
    assert (one["loss"], one["kl"], one["optimizer_steps"], one["share"]) == ("1.5", "7.0", "2", "")
    assert (two["loss"], two["kl"], two["optimizer_steps"], two["share"]) == ("", "", "0", "0.5")


def test_evaluating_changes_nothing_and_leaves_the_folder_of_a_checkpoint_alone(tmp_path, folder):
    summary = ms_grpo.main(quick(tmp_path / "new", eval_only=True))
    assert summary["iterations"] == 0 and not (only_run(tmp_path / "new") / "checkpoint").exists()
    table = (folder / "metrics.csv").read_text().replace(f"\n0,{rows_of(folder)[0]['eval_success']},", "\n0,0.77,")
    (folder / "metrics.csv").write_text(table)
    assert rows_of(folder)[0]["eval_success"] == "0.77"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    summary = ms_grpo.main(again(folder, eval_only=True, eval_temperature=0.5, eval_episodes=6))
    assert summary["iterations"] == 2
    assert summary["success_start"] == summary["success_end"] != 0.77, "the first evaluation had another temperature"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_training_curve_can_be_sent_to_tensorboard_or_says_what_is_missing(tmp_path, capsys):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        fails(capsys, "--track", "pip install tensorboard", args=quick(tmp_path, track="tensorboard"))
    else:
        ms_grpo.main(quick(tmp_path, track="tensorboard"))
        assert list(only_run(tmp_path).glob("events*"))


# --- resume, kills and signals -------------------------------------------------------------------
def test_a_run_ends_with_the_iteration_that_reaches_its_tokens_and_can_go_on(tmp_path):
    whole = ms_grpo.main(quick(tmp_path / "whole", num_iterations=4, **WORDS))
    tokens = [int(row["generated_tokens"]) for row in rows_of(only_run(tmp_path / "whole"))]
    flags = WORDS | {"num_iterations": 9, "eval_every": 9, "save_every": 9}
    summary = ms_grpo.main(quick(tmp_path, max_generated_tokens=tokens[1] + 1, print_samples=1, **flags))
    folder = only_run(tmp_path)
    assert summary["iterations"] == 2 and summary["generated_tokens"] == tokens[2]
    assert [row["eval_success"] != "" for row in rows_of(folder)] == [True, False, True]
    assert "<h3>iteration 2</h3>" in (folder / "samples.html").read_text()
    again = quick(tmp_path, resume=str(folder), max_generated_tokens=tokens[2], **flags)
    assert ms_grpo.main(again)["iterations"] == 2
    assert ms_grpo.main(dataclasses.replace(again, max_generated_tokens=tokens[3] + 1))["iterations"] == 4
    assert whole["generated_tokens"] == tokens[4]
    same_weights(only_run(tmp_path / "whole"), folder)


def test_a_kill_during_a_checkpoint_leaves_a_readable_one(folder):
    """Kill -9 at eight moments of a process that does nothing but save."""
    args = again(folder, num_iterations=3)
    policy = policies.load_policy(args, 0)
    optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
    for attempt in range(8):
        run = run_folder.Run(args, "ms_grpo")
        run.restore(policy, optimizer=optimizer)
        child = os.fork()
        while child == 0:
            run.save(policy, optimizer=optimizer)
        time.sleep(0.05 + 0.037 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ms_grpo.main(args)["iterations"] == 3


def test_a_kill_between_the_two_renames_is_recovered_and_what_came_after_the_checkpoint_is_forgotten(folder):
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    with open(folder / "metrics.csv", "a") as file:
        file.write(",".join(["3", *list(rows_of(folder)[2].values())[1:]]) + "\n")
    ms_grpo.main(again(folder, num_iterations=3))
    assert [row["iteration"] for row in rows_of(folder)] == ["0", "1", "2", "3"]
    assert (folder / "checkpoint").exists() and not (folder / "checkpoint.old").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_writes_a_checkpoint_first_unless_it_comes_twice(tmp_path, monkeypatch, capsys, number, times):
    log = run_folder.Run.log

    def log_and_signal(self, iteration, *rest, **metrics):
        log(self, iteration, *rest, **metrics)
        for _ in range(times if iteration == 1 else 0):
            os.kill(os.getpid(), number)
    monkeypatch.setattr(run_folder.Run, "log", log_and_signal)
    monkeypatch.setattr(run_folder.Run, "plot", PLOT)  # at last, from rows that were read again
    args = quick(tmp_path, num_iterations=10**6, save_every=10**6, eval_every=10**6)
    with pytest.raises(SystemExit) as end:
        ms_grpo.main(args)
    folder = only_run(tmp_path)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err.count(f"--resume {folder}") == (times == 1) == (folder / "checkpoint").exists()
    assert rows_of(folder)[-1]["iteration"] == "2" and rows_of(folder)[-1]["eval_success"] == ""
    if times == 1:  # the evaluation that was skipped is made up for
        assert ms_grpo.main(dataclasses.replace(args, resume=str(folder), num_iterations=2))["iterations"] == 2
        assert rows_of(folder)[-1]["eval_success"] != "" and (folder / "curve.png").exists()


def test_a_signal_to_two_processes_writes_a_checkpoint_first(tmp_path):
    flags = QUICK | {"run_dir": tmp_path / "runs", "num_iterations": 10**6, "save_every": 10**6, "eval_every": 10**6}
    process = subprocess.Popen([sys.executable, *TORCHRUN, *command(**flags)[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    rows, deadline = "", time.time() + 120
    while "\n2," not in rows and time.time() < deadline and process.poll() is None:
        time.sleep(0.2)
        files = list((tmp_path / "runs").glob("*/metrics.csv"))
        rows = files[0].read_text() if files else ""
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and errors.count(b"--resume") == 1, errors  # torchrun has exit codes of its own
    assert torch.load(only_run(tmp_path) / "checkpoint/trainer_state.pt", weights_only=True)["iteration"] >= 2


# --- bad input -----------------------------------------------------------------------------------
def test_bad_flags_get_one_line(tmp_path, capsys):
    for flags, needles in [
            ({"env_id": "turnrl/FrozenLak-v0"}, ["turnrl/FrozenLak-v0", "turnrl/FrozenLake-v0"]),
            ({"env_id": "nowhere:Game-v0"}, ["No module named 'nowhere'", "turnrl/Snake-v0"]),
            ({"env_id": "MountainCar-v0", "env_kwargs": "{}"}, ["MountainCar-v0", "speak text"]),
            ({"env_kwargs": '{"sise": 3}'}, ["--env-kwargs", "sise"]),
            ({"env_kwargs": "size=3"}, ["--env-kwargs", "size=3"]),
            ({"env_kwargs": "[3]"}, ["--env-kwargs", "[3]"]),
            ({"model": "./missing"}, ["./missing", "no such folder"]),
            ({"model": "missing"}, ["missing", "no such folder"]),
            ({"device": "cuda"}, ["cuda"] if not torch.cuda.is_available() else []),
            ({"device": "toaster"}, ["--device toaster"]),
            ({"group_size": 1}, ["--group-size"]),
            ({"history_turns": -1}, ["--history-turns must be at least 0"]),
            ({"temperature": 0.0}, ["--temperature", "positive"]),
            ({"temperature": float("nan")}, ["--temperature", "nan"]),
            ({"eval_temperature": float("inf")}, ["--eval-temperature", "inf"]),
            ({"clip_low": -0.1}, ["--clip-low"])]:
        if needles:
            fails(capsys, *needles, args=quick(tmp_path, **flags))
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("metrics.csv"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_zero_is_allowed_for_the_flags_that_a_script_names_and_for_no_other_whole_number(script, tmp_path, capsys):
    default = quick(tmp_path, script)
    for name, value in dataclasses.asdict(default).items():
        args = dataclasses.replace(default, **{name: 0})
        if name in default.may_be_zero:
            run_folder.check_args(args)
        elif type(value) is int:
            fails(capsys, f"--{name.replace('_', '-')} must be at least 1", call=lambda args=args: run_folder.check_args(args))
    assert default.may_be_zero <= set(dataclasses.asdict(default))


def test_a_model_folder_that_is_of_no_use_gets_one_line(tmp_path, capsys, chat_folder):
    args, config = quick(tmp_path, model=chat_folder), Path(chat_folder) / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 8'))
    fails(capsys, "context of 8 tokens", args=args)
    (Path(chat_folder) / "model.safetensors").write_bytes(b"cut short")
    fails(capsys, "--model", "cannot be used", args=args)
    config.unlink()
    fails(capsys, "--model", "cannot be used", args=args)


def test_a_broken_resume_folder_gets_one_line(tmp_path, capsys, folder):
    fails(capsys, "nowhere", args=quick(tmp_path, resume=str(tmp_path / "nowhere")))
    fails(capsys, "other settings", "seed 3 (now 2)", args=again(folder, seed=2))
    state = folder / "checkpoint/trainer_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    fails(capsys, "checkpoint cannot be read", args=again(folder))
    (folder / "args.json").write_text("{")
    fails(capsys, "args.json", args=again(folder))


@pytest.mark.parametrize("fault,needles", [
    ("raise", ["turn 1", "out of apples"]), ("nan", ["turn 1", "reward nan"]),
    ("none", ["turn 1", "not a string"]), ("reset", ["turn 0", "not a string"])])
def test_a_faulty_environment_is_named_and_its_transcript_kept(
        tmp_path, capsys, monkeypatch, fault, needles):
    monkeypatch.setattr(policies, "demonstrations", lambda env, seeds, max_turns, rng: [])
    monkeypatch.setattr(policies, "warm_start", lambda *args: None)
    args = quick(tmp_path, env_id="words:tests/Faulty-v0", env_kwargs=json.dumps({"fault": fault}))
    fails(capsys, "Faulty", f"seed {2**30}", *needles, args=args)
    [line] = open(only_run(tmp_path) / "samples.jsonl")
    assert len(json.loads(line)["turns"]) == (0 if fault == "reset" else 1)


def test_an_environment_of_someone_else_trains_if_it_can_be_demonstrated(tmp_path, capsys):
    summary = ms_grpo.main(quick(
        tmp_path, env_id="words:tests/YesOrNo-v0", env_kwargs="{}", num_iterations=10, warm_start_steps=40, tiny_init_std=0.1, warm_start_learning_rate=3e-3,
        eval_episodes=64, eval_every=10, num_prompts=8, group_size=8, learning_rate=3e-3))
    assert summary["success_end"] > max(0.8, summary["success_start"])
    fails(capsys, "--model", "neither demonstrate()", args=quick(tmp_path, env_id="words:tests/Faulty-v0", env_kwargs="{}"))


def test_a_non_finite_gradient_stops_before_the_step(capsys):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.clone() for p in model.parameters()]
    (model(torch.ones(2)) * float("nan")).sum().backward()
    fails(capsys, "gradient norm is nan", call=lambda: utils.optimizer_step(model, optimizer, 1.0))
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_folder_without_git_trains_too(tmp_path, monkeypatch):
    def nothing(*args, **kwargs):
        raise FileNotFoundError("git")
    monkeypatch.setattr(subprocess, "run", nothing)
    run = run_folder.Run(quick(tmp_path), "ms_grpo")
    assert json.loads((run.folder / "args.json").read_text())["versions"]["commit"] == ""


def test_a_tiny_checkpoint_given_as_model_gets_the_prompts_it_knows(tmp_path):
    """Its warm start has seen no rules; a chat model reads them first."""
    args = quick(tmp_path, env_id="turnrl/ToolDesk-v0", env_kwargs="{}")
    policy = policies.load_policy(args)
    policy.save(tmp_path / "tiny")
    again = policies.load_policy(dataclasses.replace(args, model=str(tmp_path / "tiny")))
    assert (again.head, again.tail) == (policy.head, policy.tail)


# --- several processes ---------------------------------------------------------------------------
def torchrun(*command):
    """A finished command on two processes, one thread each."""
    return subprocess.run(
        [sys.executable, *TORCHRUN, *map(str, command)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")})


def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path):
    run = torchrun(*command(**QUICK | WORDS | {"env_id": "words:tests/FailsOnOneRank-v0", "run_dir": tmp_path / "runs"})[1:])
    assert run.returncode != 0 and "error: environment FailsOnOneRank, seed" in run.stderr
    assert "out of apples" in run.stderr and not (only_run(tmp_path) / "summary.json").exists()
    [line] = open(only_run(tmp_path) / "samples.jsonl")
    assert json.loads(line)["iteration"] == "fault"


def test_two_processes_give_the_parameters_of_one(tmp_path):
    """Same episodes, same draws, same steps; sums of floats in another order: 1e-5. Every script, in one launch."""
    flags = {script: vars(quick(
        tmp_path / script / "two", script, num_prompts=4, group_size=4, num_iterations=3, warm_start_steps=60,
        entropy_coefficient=0.01, **({"env_id": "words:tests/Words-v0"} if script != "ms_grpo" else {})))
        for script in SCRIPTS}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    for script in SCRIPTS:
        module = importlib.import_module(f"algos.{script}")
        module.main(module.Args(**flags[script] | {"run_dir": str(tmp_path / script / "one/runs")}))
    run = torchrun(ROOT / "tests/every_script.py", tmp_path / "flags.json")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("success") == 5 * len(SCRIPTS), "one process speaks: 4 evaluations and a summary"
    for script in SCRIPTS:
        one, two = only_run(tmp_path / script / "one"), only_run(tmp_path / script / "two")
        same_weights(one, two, tolerance=1e-5)
        rows = [rows_of(one), rows_of(two)]
        assert any(float(row.get("grad_norm") or 0) > 0 for row in rows[0]), f"{script} learned something"
        for first, second in zip(*rows, strict=True):
            for name in first.keys() - {"seconds"}:
                if first[name]:
                    assert float(first[name]) == pytest.approx(float(second[name]), abs=1e-4), (script, name)
