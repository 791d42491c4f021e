"""What users bring misbehaves: environments, consoles, trackers and disks."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import policies
import run_folder
from algos import ms_grpo
from conftest import random_policy
from envs import episodes as records
from envs import make_env
from envs.episodes import Episode, EnvironmentFault, Turn, blaming, demonstrations, start_episodes
from test_cli import QUICK, WORDS, command, fails, only_run, quick, rows_of, same_weights
from words import Faulty


def play(fault, seed=5):
    env = make_env("words:tests/Faulty-v0", fault=fault)
    [episode] = start_episodes([env], [seed])
    while not episode.done:
        episode.answer(env, Turn(episode.observation, "x"))
    return episode


def game(name, **kwargs):
    return {"env_id": f"words:tests/{name}-v0", "env_kwargs": json.dumps(kwargs)}


# --- environments --------------------------------------------------------------------------------
NEEDLES = {
    "reset": "observation is not a string: 7", "reset-text": "(observation, info), got 'start'",
    "reset-two-characters": "(observation, info), got 'no'", "reset-info": "info is not a dict: [1, 2]",
    "reset-raise": "KeyError: 'apples", "raise": "RuntimeError: out of apples", "empty": "RuntimeError: (no message)",
    "nan": "reward nan is not a finite number", "reward-text": "reward '1.0' is not a finite number",
    "none": "observation is not a string: None", "old": "truncated, info), got ('next', 0.5, False, {})",
    "five": "truncated, info), got '12345'", "several": "terminated is neither yes nor no: array([ True, False])",
    "truncated-text": "truncated is neither yes nor no: 'False'", "success-text": "success is neither yes nor no: 'False'",
    "invalid-text": "invalid_action is neither yes nor no: 'no'", "success-several": "success is neither yes nor no: array",
    "info-list": "info is not a dict: [1, 2]"}


@pytest.mark.parametrize("fault", [*Faulty.resets, *Faulty.steps])
def test_a_fault_is_told_in_one_line_with_its_place_and_the_episode_so_far(fault):
    with pytest.raises(EnvironmentFault) as caught:
        play(fault)
    turns = 0 if fault in Faulty.resets else 1
    line = str(caught.value)
    assert line.startswith(f"environment Faulty, seed 5, turn {turns}: ") and NEEDLES[fault] in line
    assert len(line.splitlines()) == 1 and ("pears" not in line or fault == "reset-raise")
    assert len(caught.value.episode.turns) == turns and caught.value.episode.total_reward == 0.5 * turns


def test_the_line_of_a_fault_is_short():
    error = TypeError(f"not a string: {'x' * 10**6}")
    env = make_env("words:tests/Faulty-v0")
    [episode] = start_episodes([env], [1])
    assert "not a string: xxx" in str(EnvironmentFault(episode, env, error)) and len(str(EnvironmentFault(episode, env, error))) < 700


@pytest.mark.parametrize("name", [*Faulty.fine_resets, *Faulty.fine_steps])
def test_what_only_looks_wrong_works(name):
    episode = play(name)
    assert episode.terminated and len(episode.turns) == (2 if name in ("array", "numpy") else 3)
    assert episode.total_reward == 0.5 * len(episode.turns) and all(type(t.reward) is float for t in episode.turns)
    second = episode.turns[1].info
    assert second.get("success", False) is (name == "success-array") is second.get("invalid_action", False)
    shown = [t.observation for t in episode.turns] + [episode.observation]
    assert all(type(x) is str and x.encode() is not None for x in (*shown, episode.start_info.get("answer", ""), second.get("answer", "")))
    assert (name != "surrogate" or shown[2] == "odd \ufffd, good \U0001f600") and ("lock" in second) == (name == "lock")


@pytest.mark.parametrize("name", ["success-none", "success-array", "surrogate", "lock", "reset-surrogate", "reset-none-info"])
def test_a_run_with_it_works_too_and_its_samples_can_be_read(tmp_path, capsys, name):
    ms_grpo.main(quick(tmp_path, print_samples=1, **game("Demonstrated", fault=name)))
    lines = [json.loads(line) for line in open(only_run(tmp_path) / "samples.jsonl")]
    shown = {"surrogate": "odd \ufffd, good \U0001f600", "reset-surrogate": "\ufffd start"}.get(name, "start")
    assert len(lines) == 12 and f"    {shown}\n" in capsys.readouterr().out
    assert any(shown in (turn[0], episode["last_observation"]) for episode in lines for turn in episode["turns"])


@pytest.mark.parametrize("fault,needle", [
    ("demonstrated-number", "the demonstrated action is not a string: 3"), ("demonstrated-raise", "LookupError: no idea"),
    ("success-text", "success is neither yes nor no"), ("reset-two-characters", "got 'no'")])
def test_a_fault_during_the_warm_start_is_told_in_the_same_way(tmp_path, capsys, fault, needle):
    turn = {"s": 1, "r": 0, "d": 0}[fault[0]]
    fails(capsys, "environment Demonstrated, seed ", f", turn {turn}: ", needle, args=quick(tmp_path, **game("Demonstrated", fault=fault)))
    [line] = open(only_run(tmp_path) / "samples.jsonl")
    assert json.loads(line)["iteration"] == "fault" and len(json.loads(line)["turns"]) == turn


def test_a_demonstrated_surrogate_is_replaced_and_legal_actions_are_judged_too():
    env = make_env("words:tests/Demonstrated-v0", fault="demonstrated-surrogate")
    [episode] = demonstrations(env, [1], 3, np.random.default_rng(0))
    assert episode.turns[0].action == "a \ufffd"
    env = make_env("words:tests/YesOrNo-v0")
    env.unwrapped.reset = lambda seed, options=None: ("say", {"legal_actions": []})
    with pytest.raises(EnvironmentFault, match="YesOrNo, seed 1, turn 0: ValueError"):
        demonstrations(env, [1], 3, np.random.default_rng(0))


@pytest.mark.parametrize("error", ["RuntimeError", "FileNotFoundError", "KeyError", "OSError", "AttributeError", "ImportError"])
def test_a_constructor_that_raises_gets_one_line(tmp_path, capsys, error):
    fails(capsys, "--env-id words:tests/Faulty-v0", f": {error}: ", "no apples", args=quick(tmp_path, **game("Faulty", error=error)))
    assert not (tmp_path / "runs").exists()


def test_a_group_whose_members_start_differently_is_warned_of_once(tmp_path):
    for name, expected in (("Restless", 1), ("Words", 0)):
        records.warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ms_grpo.main(quick(tmp_path, num_iterations=3, group_size=4, **game(name)))
        said = [str(w.message) for w in caught if "same seed" in str(w.message)]
        assert len(said) == expected and all("environment Restless" in text and "different tasks" in text for text in said)


# --- consoles ------------------------------------------------------------------------------------
def test_an_ascii_console_shows_question_marks(tmp_path):
    flags = QUICK | {"print_samples": 2, "max_turns": 1, "warm_start_steps": 1, "run_dir": tmp_path / "runs"} | game("Blocks")
    run = subprocess.run(command(**flags), capture_output=True, timeout=300,
                         env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parent)})
    assert run.returncode == 0, run.stderr
    assert b"    ?? ? ?\n" in run.stdout and b"success 0.000 -> 0.000" in run.stdout and not run.stderr
    assert "\\u2588" in (only_run(tmp_path) / "samples.jsonl").read_text()


def test_no_console_at_all_is_fine(tmp_path, monkeypatch):
    for stream in (None, types.SimpleNamespace(write=lambda text: None, flush=lambda: None)):
        monkeypatch.setattr(sys, "stdout", stream)
        run_folder.Run(quick(tmp_path), "ms_grpo")


# --- trackers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("when", ["start", "add_scalar", "close", "wandb"])
def test_a_tracker_that_raises_is_dropped_with_one_warning(tmp_path, capsys, monkeypatch, when):
    calls = []

    def called(name):
        calls.append(name)
        if name == when and calls.count(name) == (5 if name == "add_scalar" else 1):
            raise OSError(28, "No space left on device")
    writer = types.SimpleNamespace(add_scalar=lambda *args: called("add_scalar"), close=lambda: called("close"))
    tensorboard = types.SimpleNamespace(SummaryWriter=lambda folder: called("start") or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: called("wandb")))
    ms_grpo.main(quick(tmp_path, track="wandb" if when == "wandb" else "tensorboard"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "unreadable" not in line]
    assert len(lines) == 1 and lines[0].startswith("warning: --track") and "No space left" in lines[0]
    assert len(rows_of(only_run(tmp_path))) == 3 and (only_run(tmp_path) / "summary.json").exists()
    expected = {"start": ["start"], "wandb": ["wandb"], "add_scalar": ["start", *["add_scalar"] * 5]}
    assert calls == expected[when] if when in expected else calls.count("close") == 1


# --- disks ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def files_of_at_most(size):
    """The operating system refuses to let a file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {"print_samples": 1, "learning_rate": 3e-3, "warm_start_steps": 60, "warm_start_learning_rate": 1e-3,
        "tiny_init_std": 0.02} | WORDS  # a start that is not sure, so that there is something to learn and to show


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "NUM_DEMONSTRATIONS", 128)
        ms_grpo.main(quick(path, **FULL))
    return only_run(path)


@pytest.mark.parametrize("name,size,at", [
    ("metrics.csv", 100, 1), ("samples.jsonl", None, 1), ("samples.html", None, 1), ("checkpoint", 100_000, 1),
    ("checkpoint", 1_200_000, 1), ("checkpoint", 100_000, 0)], ids=["metrics", "samples", "page", "model", "state", "first"])
def test_a_write_that_fails_ends_the_run_in_one_line_and_undoes_what_it_began(
        tmp_path, capsys, monkeypatch, whole, name, size, at):
    """In the last iteration, or in the first one, before there is a checkpoint."""
    log, stack, before = run_folder.Run.log, contextlib.ExitStack(), {}

    def log_on_a_full_disk(self, iteration, *rest, **metrics):
        if iteration == at:
            before.update((path.name, path.read_bytes()) for path in self.folder.rglob("*") if path.is_file())
            stack.enter_context(files_of_at_most(size or len(before[name]) + 10))
        log(self, iteration, *rest, **metrics)
    monkeypatch.setattr(run_folder.Run, "log", log_on_a_full_disk)
    flags = FULL | {"print_samples": int(name != "samples.jsonl")}  # the page is larger and would be what fails
    with stack:
        fails(capsys, f"/{name} cannot be written: ", "File too large",
              "last checkpoint: iteration 1, --resume" if at else "last checkpoint: none", args=quick(tmp_path, **flags))
    folder = only_run(tmp_path)
    assert not list(folder.glob("*.new")) and not list(folder.glob("*.old"))
    if name != "checkpoint":
        assert (folder / name).read_bytes() == before[name]
    assert (folder / "checkpoint").exists() == bool(at)
    assert all(json.loads(line) for line in open(folder / "samples.jsonl"))
    if at:
        monkeypatch.setattr(run_folder.Run, "log", log)
        assert torch.load(folder / "checkpoint/trainer_state.pt", weights_only=True)["iteration"] == 1
        again = quick(tmp_path, resume=str(folder), **flags)
        if name == "metrics.csv":
            with files_of_at_most(100):
                fails(capsys, "last checkpoint: iteration 1, --resume", args=again)
        ms_grpo.main(again)
        same_weights(whole, folder)
        assert [row["iteration"] for row in rows_of(folder)] == ["0", "1", "2"]
        assert name != "samples.html" or (folder / name).read_text().count("<title>") == 1


def test_a_failure_that_only_its_library_knows_is_told_and_undone_as_well(tmp_path, capsys):
    """tokenizers raise a bare Exception."""
    run = run_folder.Run(quick(tmp_path), "ms_grpo")
    policy, run.rows = random_policy("llama"), [{"iteration": 3}]
    run.save(policy)
    good = {path.name: path.read_bytes() for path in (run.folder / "checkpoint").iterdir()}

    def cut_short(folder):
        policy.model.save_pretrained(folder)
        raise Exception("No space left on device (os error 28)\nmore")
    policy.save = cut_short
    fails(capsys, "checkpoint cannot be written: No space left on device (os error 28) more (last checkpoint: iteration 3",
          call=lambda: run.save(policy))
    assert {path.name: path.read_bytes() for path in (run.folder / "checkpoint").iterdir()} == good
    assert {path.name for path in run.folder.iterdir()} == {"args.json", "checkpoint"}


def test_a_run_folder_that_cannot_be_made_gets_one_line(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    fails(capsys, "args.json cannot be written", "Not a directory", "last checkpoint: none", args=quick(tmp_path))


def test_an_environment_that_leaves_the_program_is_named_and_a_signal_is_none_of_its_faults():
    for code, kind in ((0, EnvironmentFault), (None, EnvironmentFault), (130, SystemExit), (143, SystemExit)):
        with pytest.raises(kind), blaming(Faulty(), Episode(1, "")):
            raise SystemExit(code)


@pytest.mark.parametrize("reward", [1e308, -1e30, float("inf"), float("nan")])
def test_rewards_whose_sums_could_overflow_are_faults(reward):
    env = Faulty()
    env.step = lambda action: ("next", reward, False, False, {})
    with pytest.raises(EnvironmentFault, match="is not a finite number"):
        Episode(1, "").answer(env, Turn("", ""))


def test_other_devices_are_refused(tmp_path, capsys):
    fails(capsys, "--device meta: cpu or cuda", args=quick(tmp_path, device="meta"))
