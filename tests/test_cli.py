"""What a user meets: flags, run folders, resume, signals, bad input, several processes."""

import ast
import csv
import dataclasses
import html.parser
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import tqdm
import tyro

import policies
import run_folder
import utils
from algos import archer, ms_grpo
from conftest import ROOT
from envs.episodes import EnvironmentFault
from envs.text_env import TextEnv
from utils import RunArgs

SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
QUICK = {"num_prompts": 2, "group_size": 2, "warm_start_steps": 5, "num_iterations": 2,
         "eval_episodes": 4, "eval_every": 1, "save_every": 1, "print_samples": 0,
         "env_kwargs": '{"size": 3}', "max_turns": 4}
NOT_ALL_HAVE = {"kl_coefficient", "entropy_coefficient"}
FEW_STEPS = {"archer": {"critic_steps": 2, "critic_batch_turns": 8, "actor_batch_turns": 8, "actor_warm_up": 1}}


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
def test_every_flag_is_documented_in_help(script, capsys):
    args = importlib.import_module(f"algos.{script}").Args
    with pytest.raises(SystemExit) as end:
        tyro.cli(args, args=["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    source = (ROOT / f"algos/{script}.py").read_text() + (ROOT / "utils.py").read_text()
    for field in dataclasses.fields(args):
        assert "--" + field.name.replace("_", "-") in text, field.name
        comment = next(line.split("  # ")[1] for line in source.splitlines()
                       if line.startswith(f"    {field.name}: ") and "  # " in line)
        assert " ".join(comment.split()[:2]) in " ".join(text.replace("│", " ").split()), field.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_used(script):
    """Every field is read as an attribute of an `args` somewhere in the script or in utils."""
    args, used = importlib.import_module(f"algos.{script}").Args, set()
    for path in ("utils.py", "policies.py", "run_folder.py", f"algos/{script}.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                used.add(node.attr)
    assert {field.name for field in dataclasses.fields(args)} - used == set()


def test_help_and_a_short_run_from_a_clean_checkout(tmp_path):
    """Only what a student would copy: the script, utils.py, policies.py, run_folder.py and envs/."""
    for name in ("utils.py", "policies.py", "run_folder.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("envs", "algos"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = [sys.executable, str(tmp_path / "algos/ms_grpo.py")]
    text = subprocess.run([*script, "--help"], capture_output=True, text=True, cwd="/")
    assert text.returncode == 0 and "--aaw-power" in text.stdout
    assert "Eq. 5  p_e = |A_e|^power" in text.stdout, "the equations that the flags name"
    flags = command(**(QUICK | {"print_samples": 1, "warm_start_steps": 60, "run_dir": tmp_path / "runs"}))[2:]
    run = subprocess.run([*script, *flags], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert "after 0 iterations, held-out seed" in run.stdout and "after 2 iter" in run.stdout
    assert {path.name for path in only_run(tmp_path).iterdir()} == {
        "args.json", "metrics.csv", "samples.jsonl", "samples.html", "checkpoint", "summary.json", "curve.png"}


def test_a_run_folder_holds_what_happened(tmp_path):
    summary = ms_grpo.main(quick(tmp_path, seed=3))
    folder = only_run(tmp_path)
    assert folder.name.startswith("FrozenLake-v0__ms_grpo__3__")
    record = json.loads((folder / "args.json").read_text())
    assert record["args"] == dataclasses.asdict(quick(tmp_path, seed=3))
    assert record["versions"]["torch"] == torch.__version__
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    assert all(row["eval_success"] for row in rows) and rows[0]["train_success"] == ""
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["success_end"] == float(rows[2]["eval_success"])
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert len(samples) == 12 and samples[0]["seed"] == 2**30 and len(samples[0]["turns"][0]) == 3


class Page(html.parser.HTMLParser):
    """The sampled tokens of samples.html, each with its numbers, and the text of every row."""

    def __init__(self, path):
        super().__init__()
        self.sampled, self.rows, self.tags = [], [], []
        self.feed(path.read_bytes().decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "pre":
            self.rows.append("")
        if tag == "i":
            numbers = dict(attrs)["title"].split(", ")
            self.sampled.append({k: float(v) for k, v in (n.split(" ") for n in numbers)})

    def handle_endtag(self, tag):
        if tag in self.tags:
            while self.tags.pop() != tag:
                pass

    def handle_data(self, data):
        if self.rows and self.tags[-1] in ("s", "i"):
            self.rows[-1] += data


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_of_a_run_shows_credit_ratio_and_entropy_of_every_sampled_token(tmp_path, script, monkeypatch):
    """Made from what the update was given, in the first iteration and in the last one, and of no consequence."""
    module, given = importlib.import_module(f"algos.{script}"), []
    original = run_folder.Run.write_page

    def spy(self, iteration, batch):
        given.append((iteration, batch, self.policy))
        original(self, iteration, batch)
    monkeypatch.setattr(run_folder.Run, "write_page", spy)
    flags = {"env_id": "words:tests/Words-v0", "env_kwargs": "{}", "num_iterations": 3, "learning_rate": 1e-2}
    module.main(quick(tmp_path / "with", script, print_samples=1, **flags))
    module.main(quick(tmp_path / "without", script, **flags))
    one, two = only_run(tmp_path / "with"), only_run(tmp_path / "without")
    assert not (two / "samples.html").exists()
    assert all(torch.equal(w, weights(two)[name]) for name, w in weights(one).items())
    page, expected, texts = Page(one / "samples.html"), [], []
    first, last = (iteration for iteration, _, _ in given)
    assert first in (1, 2) and last == 3, "the first iteration that had anything to learn from"
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
    assert [x["advantage"] for x in page.sampled] == pytest.approx(expected, abs=6e-4) and any(expected)
    assert page.rows == texts
    assert all(x["entropy"] > 0 for x in page.sampled)
    ratios = [x.get("ratio", 1.0) for x in page.sampled]
    assert script == "archer" or len({round(x, 2) for x in ratios}) > 3, "the update has moved them"


def test_a_process_whose_share_of_the_minibatch_is_empty_shows_nothing(tmp_path, tiny_policy):
    run = run_folder.Run(quick(tmp_path, print_samples=1), "ms_grpo")
    run.policy, run.shown, run.progress = tiny_policy, False, tqdm.tqdm(disable=True)
    run.log(0, [], {}, [], utils.collate([], tiny_policy.device) | {"advantages": torch.zeros(0, 1)})
    assert not (run.folder / "samples.html").exists() and not run.shown


def test_the_same_seed_gives_the_same_transcripts_and_another_does_not(tmp_path):
    texts = []
    for number, seed in enumerate([1, 1, 2]):
        ms_grpo.main(quick(tmp_path / str(number), seed=seed))
        texts.append((only_run(tmp_path / str(number)) / "samples.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_eval_only_changes_nothing(tmp_path):
    summary = ms_grpo.main(quick(tmp_path, eval_only=True))
    assert summary["iterations"] == 0 and not (only_run(tmp_path) / "checkpoint").exists()


def test_evaluating_a_checkpoint_leaves_its_folder_alone(tmp_path):
    ms_grpo.main(quick(tmp_path, num_iterations=3, save_every=2))
    folder = only_run(tmp_path)
    rows = (folder / "metrics.csv").read_text().splitlines()
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True)) | {"eval_success": "0.77"}
    (folder / "metrics.csv").write_text("\n".join([rows[0], ",".join(first.values()), *rows[2:], ""]))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    summary = ms_grpo.main(quick(tmp_path, num_iterations=3, save_every=2, resume=str(folder),
                                 eval_only=True, eval_temperature=0.5, eval_episodes=6))
    assert summary["iterations"] == 3
    assert summary["success_start"] == summary["success_end"] != 0.77, "the first evaluation had another temperature"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_evaluation_that_a_signal_skipped_is_made_up_for(tmp_path):
    ms_grpo.main(quick(tmp_path))
    folder = only_run(tmp_path)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    for name in [name for name in rows[-1] if name.startswith("eval_")]:
        rows[-1][name] = ""
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert ms_grpo.main(quick(tmp_path, resume=str(folder)))["iterations"] == 2
    assert list(csv.DictReader(open(folder / "metrics.csv")))[-1]["eval_success"] != ""


def test_a_chat_model_from_a_folder_trains(tmp_path, chat_folder):
    summary = ms_grpo.main(quick(tmp_path, model=chat_folder, max_turn_tokens=3))
    assert summary["iterations"] == 2 and summary["generated_tokens"] > 0


def test_compile_is_used_in_updates_and_changes_nothing(tmp_path, monkeypatch):
    """With the eager backend, which needs no compiler."""
    calls, original = [], torch.compile

    def compile_and_count(model, **options):
        calls.append(options)
        return original(model, backend="eager", dynamic=options["dynamic"])
    monkeypatch.setattr(torch, "compile", compile_and_count)
    for name, flag in (("plain", False), ("compiled", True)):
        ms_grpo.main(quick(tmp_path / name, compile=flag, kl_coefficient=0.1))
    assert calls == [{"dynamic": True}, {"dynamic": False, "mode": "reduce-overhead"}]
    for name, weight in weights(only_run(tmp_path / "plain")).items():
        assert torch.allclose(weight, weights(only_run(tmp_path / "compiled"))[name], atol=1e-6)


def test_training_curve_can_be_sent_to_tensorboard_or_says_what_is_missing(tmp_path, capsys):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        fails(capsys, "--track", "pip install tensorboard", args=quick(tmp_path, track="tensorboard"))
    else:
        ms_grpo.main(quick(tmp_path, track="tensorboard"))
        assert list(only_run(tmp_path).glob("events*"))


# --- resume, kills and signals -------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, script):
    main = importlib.import_module(f"algos.{script}").main
    flags = {"kl_coefficient": 0.1, "temperature": 1.2, "env_id": "words:tests/Words-v0",
             "env_kwargs": "{}"}
    main(quick(tmp_path / "whole", script, num_iterations=4, **flags))
    main(quick(tmp_path / "halves", script, num_iterations=2, **flags))
    half = only_run(tmp_path / "halves")
    main(quick(tmp_path / "halves", script, num_iterations=4, resume=str(half), **flags))
    whole = only_run(tmp_path / "whole")
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(half)[name]), name
    one, two = (list(csv.DictReader(open(f / "metrics.csv"))) for f in (whole, half))
    for row in (*one, *two):
        row.pop("seconds"), row.pop("probe_share", None)
    assert one == two and len(one) == 5
    assert any(float(row.get("grad_norm") or 0) > 0 for row in one), "something was learned"


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    ms_grpo.main(quick(tmp_path, num_iterations=3, save_every=2))
    folder = only_run(tmp_path)
    ms_grpo.main(quick(tmp_path, num_iterations=4, save_every=2, resume=str(folder)))
    rows = [row["iteration"] for row in csv.DictReader(open(folder / "metrics.csv"))]
    assert rows == ["0", "1", "2", "3", "4"]


def test_a_run_ends_with_the_iteration_that_reaches_its_tokens_and_can_go_on(tmp_path):
    words = {"env_id": "words:tests/Words-v0", "env_kwargs": "{}"}
    whole = ms_grpo.main(quick(tmp_path / "whole", num_iterations=4, **words))
    tokens = [int(row["generated_tokens"]) for row in csv.DictReader(open(only_run(tmp_path / "whole") / "metrics.csv"))]
    flags = words | {"num_iterations": 9, "eval_every": 9, "save_every": 9}
    summary = ms_grpo.main(quick(tmp_path, max_generated_tokens=tokens[1] + 1, print_samples=1, **flags))
    folder = only_run(tmp_path)
    assert summary["iterations"] == 2 and summary["generated_tokens"] == tokens[2]
    assert [row["eval_success"] != "" for row in csv.DictReader(open(folder / "metrics.csv"))] == [True, False, True]
    assert "<h3>iteration 2</h3>" in (folder / "samples.html").read_text()
    again = quick(tmp_path, resume=str(folder), max_generated_tokens=tokens[2], **flags)
    assert ms_grpo.main(again)["iterations"] == 2
    assert ms_grpo.main(dataclasses.replace(again, max_generated_tokens=tokens[3] + 1))["iterations"] == 4
    assert whole["generated_tokens"] == tokens[4]
    for name, weight in weights(only_run(tmp_path / "whole")).items():
        assert torch.equal(weight, weights(folder)[name]), name


def test_a_kill_during_a_checkpoint_leaves_a_readable_one(tmp_path):
    """Kill -9 at twelve random moments of a process that does nothing but save."""
    ms_grpo.main(quick(tmp_path))
    folder = only_run(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import policies, run_folder, torch
from algos.ms_grpo import Args
args = Args(**{dict(QUICK, run_dir=str(tmp_path / 'runs'), resume=str(folder))!r})
run = run_folder.Run(args, "ms_grpo")
policy = policies.load_policy(args, 0)
optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
run.restore(policy, optimizer=optimizer)
print("ready", flush=True)
while True:
    run.save(policy, optimizer=optimizer)
"""
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n", "the checkpoint of the last kill is readable"
        time.sleep(0.05 + 0.037 * attempt)
        process.kill()
        process.wait()
    ms_grpo.main(quick(tmp_path, num_iterations=3, resume=str(folder)))


def test_a_kill_between_the_two_renames_is_recovered(tmp_path):
    ms_grpo.main(quick(tmp_path))
    folder = only_run(tmp_path)
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    ms_grpo.main(quick(tmp_path, num_iterations=3, resume=str(folder)))
    assert (folder / "checkpoint").exists() and not (folder / "checkpoint.old").exists()


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_signal_writes_a_checkpoint_first(tmp_path, number, processes):
    flags = QUICK | {"run_dir": tmp_path / "runs", "num_iterations": 10**6, "save_every": 10**6,
                     "eval_every": 10**6}
    launcher = [sys.executable, *(TORCHRUN if processes == 2 else [])]
    process = subprocess.Popen([*launcher, *command(**flags)[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    rows, deadline = "", time.time() + 120
    while "\n2," not in rows and time.time() < deadline and process.poll() is None:
        time.sleep(0.2)
        files = list((tmp_path / "runs").glob("*/metrics.csv"))
        rows = files[0].read_text() if files else ""
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number or (processes == 2 and process.returncode), errors  # torchrun has its own
    assert errors.count(b"--resume") == 1, errors
    state = torch.load(only_run(tmp_path) / "checkpoint/trainer_state.pt", weights_only=True)
    assert state["iteration"] >= 2


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
            ({"num_prompts": 0}, ["--num-prompts", "0"]),
            ({"max_turns": -1}, ["--max-turns"]),
            ({"temperature": 0.0}, ["--temperature", "positive"]),
            ({"temperature": float("nan")}, ["--temperature", "nan"]),
            ({"eval_temperature": -1.0}, ["--eval-temperature"]),
            ({"learning_rate": float("inf")}, ["--learning-rate", "inf"]),
            ({"learning_rate": 0.0}, ["--learning-rate"]),
            ({"clip_low": -0.1}, ["--clip-low"])]:
        if needles:
            fails(capsys, *needles, args=quick(tmp_path, **flags))
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("metrics.csv"))


def test_a_wrong_word_on_the_command_line_exits_with_2():
    run = subprocess.run(command("--sampling", "best"), capture_output=True, text=True)
    assert run.returncode == 2 and "--sampling" in run.stderr


def test_a_context_without_room_for_a_prompt_gets_one_line(tmp_path, capsys, chat_folder):
    config = Path(chat_folder) / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 2048',
                                                 '"max_position_embeddings": 8'))
    fails(capsys, "context of 8 tokens", args=quick(tmp_path, model=chat_folder))


def test_a_broken_model_folder_gets_one_line(tmp_path, chat_folder, capsys):
    args = quick(tmp_path, model=chat_folder)
    (Path(chat_folder) / "model.safetensors").write_bytes(b"cut short")
    fails(capsys, "--model", "cannot be loaded", args=args)
    shutil.rmtree(chat_folder)
    Path(chat_folder).mkdir()
    fails(capsys, "--model", "cannot be loaded", args=args)


def test_a_broken_resume_folder_gets_one_line(tmp_path, capsys):
    fails(capsys, "nowhere", args=quick(tmp_path, resume=str(tmp_path / "nowhere")))
    ms_grpo.main(quick(tmp_path))
    folder = only_run(tmp_path)

    def again(**flags):
        return quick(tmp_path, resume=str(folder), **({"num_iterations": 3} | flags))
    fails(capsys, "other settings", "seed 1 (now 2)", args=again(seed=2))
    state = folder / "checkpoint/trainer_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    fails(capsys, "checkpoint cannot be read", args=again())
    state.unlink()
    fails(capsys, "checkpoint cannot be read", args=again())
    (folder / "args.json").write_text("{")
    fails(capsys, "args.json", args=again())


class Faulty(TextEnv):
    """A third-party environment that goes wrong on its second turn, in the way it is told to."""

    def __init__(self, fault="", **kwargs):
        super().__init__(**kwargs)
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return (7 if self.fault == "reset" else "start"), {"legal_actions": ["go"]}

    def demonstrate(self, rng):
        return "go"

    def step(self, action):
        self.turn += 1
        if self.turn == 2 and self.fault == "raise":
            raise RuntimeError("out of apples")
        reward = float("nan") if self.turn == 2 and self.fault == "nan" else 0.5
        observation = None if self.turn == 2 and self.fault == "none" else "next"
        return observation, reward, self.turn == 3, False, {"legal_actions": ["go"]}


gym.register("tests/Faulty-v0", entry_point=Faulty)


@pytest.mark.parametrize("fault,needles", [
    ("raise", ["turn 1", "out of apples"]), ("nan", ["turn 1", "reward nan"]),
    ("none", ["turn 1", "not a string"]), ("reset", ["turn 0", "not a string"])])
def test_a_faulty_environment_is_named_and_its_transcript_kept(
        tmp_path, capsys, monkeypatch, fault, needles):
    monkeypatch.setattr(policies, "demonstrations", lambda env, seeds, max_turns, rng: [])
    monkeypatch.setattr(policies, "warm_start", lambda *args: None)
    args = quick(tmp_path, env_id="tests/Faulty-v0", env_kwargs=json.dumps({"fault": fault}))
    fails(capsys, "Faulty", f"seed {2**30}", *needles, args=args)
    [line] = open(only_run(tmp_path) / "samples.jsonl")
    assert len(json.loads(line)["turns"]) == (0 if fault == "reset" else 1)


def test_an_environment_of_someone_else_trains(tmp_path):
    """Registered elsewhere, named module:Id-v0; random legal actions serve as demonstrations."""
    (tmp_path / "their_game.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.spaces import Text\n"
        "class Game(gym.Env):\n"
        "    observation_space = action_space = Text(50, min_length=0)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return 'say yes or no', {'legal_actions': ['yes', 'no']}\n"
        "    def step(self, action):\n"
        "        return 'thanks', float(action == 'yes'), True, False, {'success': action == 'yes'}\n"
        "gym.register('theirs/Game-v0', entry_point=Game)\n")
    flags = QUICK | {"env_id": "their_game:theirs/Game-v0", "env_kwargs": "{}", "num_iterations": 30,
                     "warm_start_steps": 30, "run_dir": tmp_path / "runs", "eval_episodes": 64,
                     "num_prompts": 8, "group_size": 8, "learning_rate": 3e-3}
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command(**flags), capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["success_end"] > max(0.8, summary["success_start"])


def test_an_environment_that_cannot_warm_start_the_tiny_model_says_so(tmp_path, capsys, monkeypatch):
    def nothing(*args):
        raise NotImplementedError("it has neither demonstrate() nor info['legal_actions']")
    monkeypatch.setattr(policies, "demonstrations", nothing)
    fails(capsys, "--model", "neither demonstrate()", args=quick(tmp_path))


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


@pytest.mark.parametrize("flags", [{"target_rate": 0.0}, {"target_rate": 1.5}, {"discount": 1.1}])
def test_a_share_above_1_or_a_critic_that_never_follows_is_refused(tmp_path, capsys, flags):
    fails(capsys, "shares, at most 1", call=lambda: archer.main(quick(tmp_path, "archer", **flags)))


def test_a_fault_outside_the_environment_is_not_swallowed(tmp_path):
    run = run_folder.Run(quick(tmp_path), "ms_grpo")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert issubclass(EnvironmentFault, Exception) and RunArgs().seed == 1


# --- several processes ---------------------------------------------------------------------------


def torchrun(*command):
    """A finished command on two processes, one thread each."""
    return subprocess.run(
        [sys.executable, *TORCHRUN, *map(str, command)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")})


def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path):
    run = torchrun(*command(**QUICK | {"env_id": "words:tests/FailsOnOneRank-v0", "env_kwargs": "{}",
                                       "run_dir": tmp_path / "runs"})[1:])
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
        for name, weight in weights(one).items():
            assert torch.allclose(weight, weights(two)[name], atol=1e-5), (script, name)
        rows = [list(csv.DictReader(open(folder / "metrics.csv"))) for folder in (one, two)]
        assert any(float(row.get("grad_norm") or 0) > 0 for row in rows[0]), f"{script} learned something"
        for first, second in zip(*rows, strict=True):
            for name in first.keys() - {"seconds", "probe_share"}:
                if first[name]:
                    assert float(first[name]) == pytest.approx(float(second[name]), abs=1e-4), (script, name)
