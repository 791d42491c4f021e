"""sampling_gap: how far the log-probs of decoding are from those that the update starts from, in bf16."""

import contextlib
import dataclasses
import importlib
import math
from types import SimpleNamespace

import pytest
import torch

import policies
import rollouts
from algos import ms_grpo
from envs.episodes import Episode, Turn
from rollouts import collect_groups, make_envs, refresh_logprobs
from test_cli import only_run, opened, quick, rows_of
from utils import batch_logprobs, collate


def two_turns() -> Episode:
    """Two sampled tokens, then three of which the middle one was put in."""
    return Episode(0, "", [Turn("", "", [1, 2], True, [3, 4], [-1.0, -2.0]),
                           Turn("", "", [5], False, [6, 7, 8], [-0.5, 0.0, -0.25], forced={1})])


@pytest.fixture
def fresh(monkeypatch):
    """Log-probs that the update's pass would give to the row of two_turns()."""
    values = torch.tensor([[0, 0, -1.5, -1.75, 0, -0.375, 0, -0.25]])
    monkeypatch.setattr(rollouts, "batch_logprobs", lambda policy, batch, args: (
        values.expand(len(batch["tokens"]), -1), None))
    return values


def test_by_hand(fresh):
    """|-1.5 + 1| + |-1.75 + 2| = 0.75, and |-0.375 + 0.5| + 0 = 0.125; a second time changes nothing."""
    policy, episode = SimpleNamespace(bf16=True, device=torch.device("cpu")), two_turns()
    for _ in range(2):
        refresh_logprobs(policy, [episode], None)
        assert [turn.gap for turn in episode.turns] == [0.75, 0.125]
        assert [turn.logprobs for turn in episode.turns] == [[-1.5, -1.75], [-0.375, 0.0, -0.25]]
    policy.bf16, episode = False, two_turns()
    refresh_logprobs(policy, [episode], None)
    assert all(math.isnan(turn.gap) for turn in episode.turns) and episode.turns[0].logprobs == [-1.0, -2.0]


def test_the_log_has_the_mean_over_sampled_tokens_and_in_fp32_no_column(tmp_path, tiny_policy, fresh):
    """(0.75 + 0.125) / 4; an episode that shares its first turn adds its own second turn: (0.75 + 0.25) / 6."""
    one, other = two_turns(), two_turns()
    other.turns[0] = one.turns[0]
    run = opened(tmp_path / "bf16", tiny_policy)
    refresh_logprobs(SimpleNamespace(bf16=True, device=torch.device("cpu")), [one, other], None)
    run.log(0, [one], [], None)
    run.log(1, [one, other], [], None)
    run.log(2, [], [], None)
    rows = rows_of(run.folder)
    assert [row["sampling_gap"] for row in rows] == [str(0.875 / 4), str(1 / 6), ""]
    assert [row["generated_tokens"] for row in rows] == ["4", "10", "10"], "whole numbers"
    run = opened(tmp_path / "fp32", tiny_policy)
    run.log(0, [two_turns()], [], None)
    assert "sampling_gap" not in rows_of(run.folder)[0]


@pytest.mark.parametrize("bf16", [True, False])
def test_the_gap_of_a_tiny_policy(tiny_policy, monkeypatch, bf16):
    """Compared with a pass of its own over the same rows; rounding to bf16 is seen, fp32 agrees to 1e-5."""
    args = ms_grpo.Args(num_prompts=4, group_size=2, max_turn_tokens=4)
    tiny_policy.max_turn_tokens, tiny_policy.bf16 = 4, True  # so that both numbers are there
    if not bf16:
        monkeypatch.setattr(tiny_policy, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(rollouts, "refresh_logprobs", lambda *_: None)
    episodes = collect_groups(tiny_policy, make_envs(args), args, 0)
    batch = collate(episodes, tiny_policy.device)
    mask = batch["turn_id"] >= 0
    gap = (batch_logprobs(tiny_policy, batch, args)[0] - batch["old_logprobs"])[mask].abs().double()
    refresh_logprobs(tiny_policy, episodes, args)
    got = sum(turn.gap for e in episodes for turn in e.turns) / mask.sum().item()
    assert got == pytest.approx(gap.mean().item(), rel=1e-4, abs=1e-9) and mask.sum() > 50
    assert 1e-4 < got < 0.1 if bf16 else got < 1e-5


@pytest.mark.parametrize("script", ["ms_grpo", "tree_grpo"])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_of_a_chat_model_logs_it_in_bf16(tmp_path, chat_folder, monkeypatch, script, bf16):
    monkeypatch.setattr(policies, "fast_bf16", lambda device: bf16)
    module = importlib.import_module(f"algos.{script}")
    module.main(dataclasses.replace(quick(tmp_path, script), model=chat_folder, warm_start_steps=0))
    rows = rows_of(only_run(tmp_path))
    assert "sampling_gap" in rows[0] if bf16 else "sampling_gap" not in rows[0]
    assert all(0 < float(row["sampling_gap"]) < 1 for row in rows[1:] if bf16) and len(rows) > 1
