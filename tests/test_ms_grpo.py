"""MS-GRPO: credit of turns, the draw of episodes, the KL term and the wiring of main, against numbers by hand and loops."""

import csv
import json

import numpy as np
import pytest
import torch

from algos import ms_grpo
from algos.ms_grpo import Args, draw_episodes, turn_advantages, update
from conftest import KeepGradient
from policies import Policy, load_policy
from rollouts import collect_groups, make_envs
from utils import DRAW, batch_logprobs, collate, random_stream, token_logprobs

WORDS = {"env_id": "words:tests/Words-v0", "warm_start_steps": 5, "max_turns": 4, "max_turn_tokens": 3}


def padded(rows):
    """Ragged rewards as (E, K), 0 after the end, and the mask."""
    width = max(map(len, rows))
    return (torch.tensor([row + [0.0] * (width - len(row)) for row in rows]),
            torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]))


def relative(values):
    """(x - mean) / (std + 1e-6) with the unbiased std, or 0 for equal ones: written once more, in numpy."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) <= 1e-6:
        return np.zeros(len(values))
    return (values - values.mean()) / (values.std(ddof=1) + 1e-6)


# --- Eq. 1-3: what a turn is credited with ---------------------------------------------------------
# Four episodes of one group, of 4, 3, 2 and 5 turns:
#   rewards  0 1 0 1      | 0 1 -1      | 0 -1        | 1 0 1 0 1
#   return   2            | 0           | -1          | 3             mean 1, variance 10/3
#   A        .547723 x4   | -.547723 x3 | -1.095445x2 | 1.095445 x5
M1 = [[0.0, 1, 0, 1], [0.0, 1, -1], [0.0, -1], [1.0, 0, 1, 0, 1]]


def test_every_turn_gets_the_relative_return_of_its_episode():
    rewards, mask = padded(M1)
    credit = turn_advantages(rewards, mask, torch.zeros(4), "episode")
    for row, length, a in zip(credit.tolist(), [4, 3, 2, 5], [0.547723, -0.547723, -1.095445, 1.095445], strict=True):
        assert row == pytest.approx([a] * length + [0.0] * (5 - length), abs=1e-5)
    backwards, mask = padded([row[::-1] for row in M1])
    assert torch.equal(turn_advantages(backwards, mask, torch.zeros(4), "episode"), credit), "whenever it was paid"


def test_penalties_are_part_of_the_return():
    """Returns 1, 1 - 1, 0, 0 - 1 after a penalty of 1 in episodes 2 and 4."""
    rewards, mask = padded([[0.0, 1.0], [-1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    credit = turn_advantages(rewards, mask, torch.zeros(4), "episode")
    assert credit[:, 1].tolist() == pytest.approx([1.224745, 0, 0, -1.224745], abs=1e-5)


@pytest.mark.parametrize("credit", ["step", "return_to_go"])
def test_the_controls_compare_a_turn_with_all_turns_of_its_group(credit):
    """Two groups: M1, and one of a single turn each; against a loop over turns."""
    rewards, mask = padded([*M1, [2.0], [3.0]])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    got = turn_advantages(rewards, mask, group, credit)
    rows = [*M1, [2.0], [3.0]]
    values = [row if credit == "step" else [sum(row[k:]) for k in range(len(row))] for row in rows]
    for first, last in ((0, 4), (4, 6)):
        expected = relative([x for row in values[first:last] for x in row]).tolist()
        assert got[first:last][mask[first:last]].tolist() == pytest.approx(expected, abs=1e-5)
    assert (got[~mask] == 0).all()


def test_one_turn_episodes_are_plain_grpo():
    rewards, mask = padded([[1.0], [0.0], [0.0], [1.0]])
    for credit in ("episode", "return_to_go", "step"):
        got = turn_advantages(rewards, mask, torch.zeros(4), credit)
        assert got[:, 0].tolist() == pytest.approx([0.866025, -0.866025, -0.866025, 0.866025], abs=1e-5)


# --- Eq. 5: the draw -------------------------------------------------------------------------------


def share(advantages, sampling, count=60_000):
    drawn = draw_episodes(torch.tensor(advantages), sampling, count, np.random.default_rng(0))
    assert len(drawn) == count
    return np.bincount(drawn, minlength=len(advantages)) / count


def test_episodes_are_drawn_in_proportion_to_their_absolute_advantage():
    assert share([0.5, -0.5, -1.0, 1.0], "aaw") == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3], abs=0.01)
    two_groups = [*relative([2.0, 0, -1, 3]), *relative([0.2, 0, 0.2, 0])]
    assert share(two_groups, "aaw") == pytest.approx([0.081139, 0.081139, 0.162278, 0.162278] + [0.128292] * 4, abs=0.006)


@pytest.mark.parametrize("returns,push", [([1.0, 0, 0, 0], 0.5), ([0.0, 1, 1, 1], -0.5)])
def test_the_draw_pushes_towards_the_rarer_outcome_and_an_even_one_does_not(returns, push):
    """The odd one out has |A| 1.5, the others 0.5 each: it is half of the draws, and its sign wins."""
    advantages = relative(returns)
    assert share(advantages, "aaw") == pytest.approx([1 / 2] + [1 / 6] * 3, abs=0.01)
    assert share(advantages, "aaw") @ advantages == pytest.approx(push, abs=0.02)
    assert share(advantages, "uniform") @ advantages == pytest.approx(0, abs=0.02)


def test_what_carries_no_signal_is_never_drawn_in_any_arm():
    advantages = [0.0, 1.0, -2.0, 0.0]
    assert share(advantages, "uniform") == pytest.approx([0, 0.5, 0.5, 0], abs=0.01)
    assert share(advantages, "aaw") == pytest.approx([0, 1 / 3, 2 / 3, 0], abs=0.01)
    for seed in range(9):
        drawn = draw_episodes(torch.tensor(advantages), "all", 7, np.random.default_rng(seed))
        assert sorted(drawn) == [1, 2], "each of the others once, whatever the count"
    for sampling in ("aaw", "uniform", "all"):
        assert len(draw_episodes(torch.zeros(4), sampling, 3, np.random.default_rng(0))) == 0


# --- Eq. 4: the update -----------------------------------------------------------------------------


@pytest.fixture
def batch(tiny_policy):
    """Memoryless rows of eight episodes, two of them drawn twice."""
    args = Args(num_prompts=2, group_size=4, max_turns=4, max_turn_tokens=3)
    tiny_policy.history_turns, tiny_policy.max_turn_tokens = 0, 3
    episodes = collect_groups(tiny_policy, make_envs(args), args, 0)
    torch.manual_seed(1)
    drawn = torch.tensor([0, 3, 3, 5, 6, 6])
    batch = collate([episodes[i] for i in drawn], tiny_policy.device, torch.randn(8, 4)[drawn])
    assert len(batch["tokens"]) > 6 and len(batch["lengths"].unique()) > 1
    return batch


def run_update(policy, batch, reference=None, **flags):
    keeper = KeepGradient(policy)
    return update(policy, reference, keeper, dict(batch), Args(max_grad_norm=1e9, **flags)), keeper.gradient


def test_the_first_step_is_on_policy(tiny_policy, batch):
    """Ratio 1: nothing clips, no KL, and the loss is minus the mean advantage minus the entropy bonus."""
    metrics, _ = run_update(tiny_policy, batch)
    logprobs, _ = token_logprobs(tiny_policy, batch, temperature=1.0)
    assert (logprobs - batch["old_logprobs"]).abs().max() <= 1e-5
    assert metrics["clip_fraction"] == metrics["kl_policy_ref_k3"] == 0.0 and abs(metrics["approx_kl"]) < 1e-9
    mean = batch["advantages"][batch["turn_id"] >= 0].mean().item()
    assert metrics["loss"] == pytest.approx(-mean - 0.01 * metrics["entropy"], abs=1e-5)


def test_a_reference_equal_to_the_policy_changes_nothing(tiny_policy, batch):
    metrics, gradient = run_update(tiny_policy, batch)
    with_kl, same_gradient = run_update(tiny_policy, batch, reference=tiny_policy, kl_coefficient=0.5)
    assert with_kl["kl_policy_ref_k3"] == pytest.approx(0, abs=1e-9) and with_kl == pytest.approx(metrics, abs=1e-6)
    assert torch.allclose(same_gradient, gradient, atol=1e-7)


@pytest.mark.parametrize("micro_batch_tokens", [1, 150, 16384])
def test_another_reference_adds_the_mean_kl_and_its_gradient(tiny_policy, batch, micro_batch_tokens):
    """Per token ref/p - log(ref/p) - 1, from full passes over single rows; its gradient is (1 - ref/p) grad log p."""
    torch.manual_seed(5)
    reference = Policy(type(tiny_policy.model)(tiny_policy.model.config), tiny_policy.tokenizer, "cpu")
    terms, surrogate = [], 0.0
    for row, length in enumerate(batch["lengths"].tolist()):
        ids = batch["tokens"][row, :length]
        mine, other = (p.model(ids[None]).logits[0].log_softmax(-1) for p in (tiny_policy, reference))
        for t in range(1, length):
            if batch["turn_id"][row, t] >= 0:
                x = (other[t - 1, ids[t]] - mine[t - 1, ids[t]]).detach()
                terms.append((x.exp() - x - 1).item())
                surrogate = surrogate + (1 - x.exp()) * mine[t - 1, ids[t]]
    (surrogate / len(terms)).backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_policy.model.parameters()])
    tiny_policy.model.zero_grad()
    without, gradient = run_update(tiny_policy, batch)
    metrics, with_kl = run_update(tiny_policy, batch, reference, kl_coefficient=0.5, micro_batch_tokens=micro_batch_tokens)
    assert metrics["kl_policy_ref_k3"] == pytest.approx(np.mean(terms), abs=1e-5) and np.mean(terms) > 1e-3
    assert metrics["loss"] == pytest.approx(without["loss"] + 0.5 * np.mean(terms), abs=1e-5)
    assert torch.allclose(with_kl - gradient, 0.5 * expected, rtol=1e-3, atol=1e-5) and expected.norm() > 1e-3


# --- whole runs ------------------------------------------------------------------------------------


def rows_of(folder):
    [path] = folder.glob("*/metrics.csv")
    return list(csv.DictReader(open(path)))


def run(tmp_path, **flags):
    flags = {"num_prompts": 4, "group_size": 3, "num_iterations": 1, "eval_episodes": 2, "print_samples": 0,
             "run_dir": str(tmp_path)} | flags
    args = Args(**WORDS | flags)
    return args, ms_grpo.main(args)


@pytest.mark.parametrize("flags,history_turns", [
    ({}, 0), ({"sampling": "uniform", "credit": "step", "num_minibatches": 1, "num_prompts": 2}, None),
    ({"sampling": "all", "credit": "return_to_go"}, 2), ({"episodes_per_update": 3, "num_minibatches": 8}, 0)])
def test_what_the_updates_are_given_and_the_log_says_is_drawn_by_the_advantage_of_the_episode(
        tmp_path, monkeypatch, flags, history_turns):
    """Collected once more with the start policy, scored and drawn by hand."""
    given = []
    monkeypatch.setattr(ms_grpo, "update", lambda policy, reference, optimizer, batch, args: given.append(batch) or {})
    args, _ = run(tmp_path, history_turns=history_turns, **flags)
    policy, size = load_policy(args, history_turns), args.group_size
    episodes = collect_groups(policy, make_envs(args), args, 0)
    rewards = [[turn.reward for turn in e.turns] for e in episodes]
    advantages = np.concatenate([relative([sum(r) for r in rewards[i : i + size]])
                                 for i in range(0, len(rewards), size)])
    weights = np.abs(advantages) if args.sampling == "aaw" else (advantages != 0).astype(float)
    every = args.sampling == "all"
    count = int((weights > 0).sum()) if every else args.episodes_per_update or len(episodes) // 2
    drawn = random_stream(args.seed, DRAW, 0).choice(len(episodes), count, replace=not every, p=weights / weights.sum())
    group = torch.arange(len(episodes)) // size
    credit = turn_advantages(*padded(rewards), group, args.credit)
    expected = [collate([episodes[i] for i in part], policy.device, credit[part])
                for part in np.array_split(drawn, min(args.num_minibatches, count))]
    assert len(given) == len(expected) and all(given[i][name].shape == x.shape and torch.allclose(given[i][name], x, atol=1e-6)
                                               for i, batch in enumerate(expected) for name, x in batch.items())
    last = rows_of(tmp_path)[-1]
    assert float(last["drawn_advantage"]) == pytest.approx(advantages[drawn].mean(), abs=1e-5)
    assert float(last["drawn_size"]) == pytest.approx(abs(advantages[drawn]).mean(), abs=1e-5)
    silent = [not advantages[i : i + size].any() for i in range(0, len(advantages), size)]
    assert float(last["groups_without_signal"]) == np.mean(silent) and float(last["optimizer_steps"]) == len(given)


def test_without_signal_there_is_no_update_and_the_cells_are_empty(tmp_path):
    run(tmp_path, env_id="turnrl/FrozenLake-v0", max_turns=1, env_kwargs='{"format_penalty": 0.0}')
    last = rows_of(tmp_path)[-1]
    assert float(last["optimizer_steps"]) == 0 and float(last["groups_without_signal"]) == 1
    assert not last.get("drawn_advantage") and not last.get("drawn_size") and not last.get("loss")


def test_the_kl_is_to_the_start_policy_also_after_a_resume(tmp_path):
    """With one step per iteration a reference that is the resumed policy itself would give 0 at once."""
    flags = {"kl_coefficient": 0.1, "num_minibatches": 1, "learning_rate": 3e-3, "num_prompts": 8}
    args, _ = run(tmp_path, num_iterations=2, **flags)
    [folder] = tmp_path.iterdir()
    run(tmp_path, num_iterations=3, resume=str(folder), **flags)
    before, now, then = (float(row["kl_policy_ref_k3"]) for row in rows_of(tmp_path)[1:])
    assert abs(before) < 1e-6 < 1e-3 < min(now, then)
    # the last one once more by hand, from the policies at both ends of the second iteration
    assert json.loads((folder / "args.json").read_text())["args"]["kl_coefficient"] == 0.1
    start = load_policy(args, 0)
    batch = collate(collect_groups(start, make_envs(args), args, 0), start.device)
    ended = Policy(type(start.model).from_pretrained(folder / "checkpoint"), start.tokenizer, "cpu")
    assert (batch_logprobs(ended, batch, args)[0] - batch["old_logprobs"]).abs().max() > 1e-2, "it has moved"


@pytest.mark.parametrize("flags", [
    {"env_id": "turnrl/Snake-v0", "credit": "return_to_go", "history_turns": None}, {"env_id": "Taxi-v4", "max_turns": 2}])
def test_it_trains_in_other_environments(flags, tmp_path):
    _, summary = run(tmp_path, **flags)
    assert summary["iterations"] == 1 and summary["generated_tokens"] >= summary["environment_steps"] > 0
