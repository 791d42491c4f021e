"""A chat model as --model: its warm start, the cache of that, its defaults; trained from a saved random folder."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import policies
from algos import igpo, ms_grpo, turn_budget
from policies import load_policy, parse_args
from rollouts import make_envs
from test_cli import SCRIPTS, only_run, quick, rows_of, weights

YES = {"env_id": "words:tests/YesOrNo-v0", "env_kwargs": "{}", "max_turn_tokens": 5, "warm_start_learning_rate": 5e-3}


def warm(tmp_path, model: str, **flags):
    return quick(tmp_path, **YES | {"model": model, "warm_start_steps": 3} | flags)


def count_warm_starts(monkeypatch) -> list:
    made, warm_start = [], policies.warm_start
    monkeypatch.setattr(policies, "warm_start", lambda *x: made.append(x) or warm_start(*x))
    return made


def test_only_the_demonstrated_actions_are_imitated(tmp_path, chat_folder, monkeypatch):
    """Every trained token belongs to an action or is the end after it; prompts begin with the rules."""
    batches, score = [], policies.token_logprobs
    monkeypatch.setattr(policies, "token_logprobs", lambda policy, batch, **x: batches.append(batch) or score(policy, batch, **x))
    policy = load_policy(warm(tmp_path, chat_folder, warm_start_steps=2))
    batches = [batch for batch in batches if len(batch["tokens"]) == policies.WARM_START_ROWS_PRETRAINED]
    assert len(batches) == 2
    for batch in batches:
        for tokens, turn_id in zip(batch["tokens"], batch["turn_id"], strict=True):
            trained = policy.tokenizer.decode(tokens[turn_id >= 0])
            assert set(trained.split(policy.tokenizer.decode([policy.end_id]))) <= {"yes", "no", ""} and trained
    assert policy.head.ids


@pytest.mark.parametrize("model, steps, shown, played", [
    ("tiny", 2, None, 128), ("tiny", 2, 7, 7), ("chat", 2, None, 32), ("chat", 2, 7, 7), ("chat", 9, None, 128)])
def test_so_many_episodes_are_imitated(model, steps, shown, played, tmp_path):
    """A chat model has 16 rows in a step and is shown no more than it reads. 128: conftest.py's default."""
    args = quick(tmp_path, **YES, model=model, warm_start_steps=steps, warm_start_episodes=shown)
    assert len(policies.play_demonstrations(args, make_envs(args, 1)[0])) == played


def test_a_warm_start_is_made_once_for_a_model_a_game_and_its_settings(tmp_path, chat_folder, monkeypatch, capsys):
    made = count_warm_starts(monkeypatch)
    first = load_policy(warm(tmp_path, chat_folder))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("warm start: 3 steps of 16 rows, loss ") and "nats a token" in line
    second = load_policy(warm(tmp_path, chat_folder))
    assert len(made) == 1 and all(torch.equal(x, y) for x, y in zip(
        first.model.state_dict().values(), second.model.state_dict().values(), strict=True))
    for changes in ({"warm_start_steps": 2}, {"warm_start_learning_rate": 1e-3}, {"seed": 2}):
        load_policy(warm(tmp_path, chat_folder, **changes))
    load_policy(warm(tmp_path, chat_folder), history_turns=0)
    assert len(made) == 5
    with torch.no_grad():  # the same folder name, other weights
        first.model.lm_head.weight[0, 0] += 1
    first.save(Path(chat_folder))
    load_policy(warm(tmp_path, chat_folder))
    assert len(made) == 6
    load_policy(warm(tmp_path, chat_folder, warm_start_steps=0))
    assert len(made) == 6


def test_the_warm_start_shows_what_the_policy_will_see(tmp_path, chat_folder, monkeypatch):
    """The rules of the game, the arguments of the template, the context."""
    made = []
    monkeypatch.setattr(policies, "warm_start", lambda policy, *more: made.append(policy))
    policy = load_policy(warm(tmp_path, chat_folder, env_id="turnrl/FrozenLake-v0", template_kwargs='{"mode": 1}', context_length=900))
    [plain] = made
    assert "hole" in plain.tokenizer.decode(plain.head.ids) and plain.head == policy.head
    assert (plain.template_kwargs, plain.context_length, plain.history_turns) == ({"mode": 1}, 900, None)


def test_a_game_without_demonstrations_says_what_to_do(tmp_path, chat_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_policy(warm(tmp_path, chat_folder, env_id="words:tests/Faulty-v0"))
    assert capsys.readouterr().err.endswith("give --warm-start-steps 0\n")


def test_a_warm_start_alone_is_saved_as_a_model_and_may_be_trained_later(tmp_path, chat_folder, monkeypatch):
    flags = {"warm_start_steps": 40, "num_iterations": 1, "warm_start_only": True, "learning_rate": 1e-3, "group_size": 8}
    summary = ms_grpo.main(warm(tmp_path, chat_folder, **flags))
    folder = only_run(tmp_path)
    assert summary["iterations"] == 0 and [row["iteration"] for row in rows_of(folder)] == ["0"]
    imitated = load_policy(warm(tmp_path, chat_folder, **flags))
    saved = load_policy(warm(tmp_path, str(folder / "checkpoint"), warm_start_steps=0))
    assert all(torch.equal(x, y) for x, y in zip(
        imitated.model.state_dict().values(), saved.model.state_dict().values(), strict=True))
    before = weights(folder)
    ms_grpo.main(warm(tmp_path, chat_folder, resume=str(folder), **flags | {"warm_start_only": False}))
    assert rows_of(folder)[-1]["iteration"] == "1"
    assert any(not torch.equal(before[name], x) for name, x in weights(folder).items())


def test_a_start_without_readable_answers_is_warned_of(tmp_path, chat_folder, capsys):
    ms_grpo.main(quick(tmp_path, model=chat_folder, warm_start_steps=0, num_iterations=1))
    assert "100% of the answers are unreadable, so little can be learned (--warm-start-steps 20 first" in capsys.readouterr().err


def test_a_chat_model_has_other_defaults_and_flags_come_first(tmp_path, chat_folder, monkeypatch, tiny_policy):
    def parsed(*flags, script=ms_grpo):
        monkeypatch.setattr(sys, "argv", ["ms_grpo.py", *flags])
        return parse_args(script.Args, "")
    assert parsed() == parsed("--model", "tiny") == ms_grpo.Args(warm_start_steps=300)
    assert policies.cloning_steps(ms_grpo.Args()) == 300 and policies.cloning_steps(ms_grpo.Args(model="a/b")) == 0
    chat = parsed("--model", chat_folder)
    changed = {f.name: getattr(chat, f.name) for f in dataclasses.fields(chat)
               if getattr(chat, f.name) != getattr(ms_grpo.Args(), f.name)}
    assert changed == ms_grpo.Args.chat_defaults | {"model": chat_folder, "warm_start_steps": 0}
    assert parsed(f"--model={chat_folder}", "--learning-rate", "3e-4").learning_rate == 3e-4
    assert parsed("--learning-rate", "3e-4", "--model", "owner/name").learning_rate == 3e-4
    assert parsed("--model", "owner/name", script=igpo).learning_rate == 1e-5
    tiny_policy.save(tmp_path / "tiny")
    assert parsed("--model", str(tmp_path / "tiny")) == ms_grpo.Args(model=str(tmp_path / "tiny"), warm_start_steps=0)
    assert parsed("--model", chat_folder, script=turn_budget).context_limit > turn_budget.Args().context_limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_a_chat_model_from_a_warm_start(tmp_path, chat_folder, script):
    game = {"env_id": "words:tests/Words-v0", "env_kwargs": "{}", "model": chat_folder, "num_iterations": 1, "warm_start_steps": 2,
            "max_turn_tokens": 4, "eval_every": 1}
    flags = {"context_limit": 400} if script == "turn_budget" else {}
    module = __import__(f"algos.{script}", fromlist=["main"])
    module.main(quick(tmp_path, script, **game | flags))
    folder = only_run(tmp_path)
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 1
    assert (folder / "checkpoint/chat_template.jinja").read_text() == (Path(chat_folder) / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_a_random_chat_folder_learns_to_answer_and_then_to_be_right(tmp_path, chat_folder):
    """Its warm start makes most answers legal; reinforcement makes them right."""
    flags = {"warm_start_steps": 60, "num_iterations": 12, "num_prompts": 8, "group_size": 8, "learning_rate": 3e-3,
             "eval_episodes": 64, "eval_every": 12}
    summary = ms_grpo.main(warm(tmp_path, chat_folder, **flags))
    first, last = (rows_of(only_run(tmp_path))[i] for i in (0, -1))
    assert float(first["eval_invalid_actions"]) < 0.2
    assert summary["success_end"] > summary["success_start"] + 0.2 and float(last["eval_invalid_actions"]) < 0.1
