"""The mathematics of UFO (arXiv 2507.14295) against hand-worked numbers, slow loops and whole runs."""

import copy
import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import policies
from algos import ufo
from algos.ufo import (
    Args, allow_answers, answer_table, count_answers, decayed_success, group_relative_advantages, repetition_penalty,
    retry_metrics, update,
)
from conftest import KeepGradient, streams
from envs import make_env
from envs.episodes import Episode, Turn, start_episodes
from rollouts import collect_groups, episode_metrics, rollout
from run_folder import Run
from utils import collate, micro_batches, token_logprobs

INF = math.inf
FIVE = ["1", "2", "3", "4", "5"]


def played(answers, policy=None, question="question", gold="9"):
    """The episode in which these were the answers (None: malformed); with the tokens of a policy, if one is given."""
    episode = Episode(0, question, info={"success": False})
    for answer in answers:
        turn = Turn(episode.observation, str(answer), info={
            "submitted": answer, "success": answer == gold, "in_range": answer in [*FIVE, gold]})
        if policy:
            turn.prompt_ids, turn.starts_row = policy.prompt(episode)
            turn.token_ids = [*policy.encode(turn.action), policy.end_id]
            turn.logprobs = [-1.0] * len(turn.token_ids)
        episode.turns.append(turn)
        episode.observation, episode.info = "again", turn.info
    episode.terminated = True
    return episode


def random_answers(rng, max_turns=5, gold="9"):
    """Answers up to the right one or the last allowed one; some are malformed, many are repeated."""
    drawn = [None if n == 0 else str(n) for n in rng.choice([0, 1, 1, 1, 2, 3, 9], size=max_turns).tolist()]
    return drawn[:drawn.index(gold) + 1] if gold in drawn else drawn


def score_parts(answers, args, gold="9"):
    """Decay, repetition and format part of the score of one episode, counted one by one."""
    valid = [a for a in answers if a is not None]
    wrong = sum(a != gold for a in valid)
    repeats = sum(a in valid[:i] for i, a in enumerate(valid))
    worth = args.decay_base**wrong
    repetition = args.repetition_penalty * repeats / len(valid) if valid else 0.0
    return worth * (gold in valid), repetition, args.format_penalty * answers.count(None)


# --- Eq. 1, 2: what answers are worth ------------------------------------------------------------


@pytest.mark.parametrize("base,worth", [
    (0.5, [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]), (0.8, [1, 0.8, 0.64, 0.512, 0.4096]), (1.0, [1] * 6)])
def test_the_decay_counts_wrong_answers_from_zero(base, worth):
    """The ablation of the paper counts from one, where a right first answer is worth a half."""
    attempt = torch.arange(1.0, len(worth) + 1)
    got = decayed_success(torch.ones(len(worth), dtype=torch.bool), attempt, base)
    assert got.tolist() == pytest.approx(worth, abs=1e-6)
    nothing = decayed_success(torch.zeros(7, dtype=torch.bool), torch.arange(7.0), base)
    assert nothing.tolist() == [0.0] * 7, "unsolved, also without any answer"


def test_the_penalty_is_the_share_of_answers_that_repeat():
    """A figure of the paper prints the coefficient times (1 - D) / N: five different answers would not cost 0."""
    num_answers, num_distinct = torch.tensor([[5.0, 4, 0, 1, 5, 3], [5, 1, 0, 1, 3, 2]])
    got = repetition_penalty(num_answers, num_distinct, 0.3)
    assert got.tolist() == pytest.approx([0, 0.225, 0, 0, 0.12, 0.1])


def test_answers_that_differ_in_case_and_blanks_are_one():
    got = count_answers([["Two  Words", "twowords", " two\nwords "], [None, "x", "X", None, "y"], [None], []])
    assert [x.tolist() for x in got] == [[3, 3, 0, 0], [1, 2, 0, 0], [0, 2, 1, 0]]
    assert all(x.dtype == torch.float for x in got)


def test_with_one_answer_the_score_is_success_whatever_decay_and_penalty():
    """So --max-turns 1 is GRPO on single questions."""
    one, solved = torch.ones(2), torch.tensor([True, False])
    for base in (0.3, 0.7, 1.0):
        assert decayed_success(solved, one, base).tolist() == [1, 0]
    assert repetition_penalty(one, one, 9.0).tolist() == [0, 0]


def test_what_was_wrong_and_in_which_order_does_not_matter():
    rng = np.random.default_rng(0)
    for _ in range(100):
        answers = random_answers(rng)
        end = len(answers) - (answers[-1] == "9")
        order = [*rng.permutation(np.array(answers[:end], dtype=object)), *answers[end:]]
        renamed = [a if a in (None, "9") else f"answer {a}" for a in answers]
        table = answer_table([played(a) for a in (answers, order, renamed)])
        assert table[0].tolist() == table[1].tolist() and table[0, :5].tolist() == table[2, :5].tolist()


# --- Eq. 4: the group ----------------------------------------------------------------------------


def test_the_expected_gradient_is_the_true_one_up_to_a_constant():
    """Enumerated: right with .3 at once (R 1), else with .4 on the retry (R .5), else R -.25; groups of three.

    Before the division by the std the expected gradient is (G - 1) / G of the true one on both turns.
    """
    p, q = 0.3, 0.4
    outcomes = [  # probability, R, d log-prob / d logit of either turn
        (p, 1.0, (1 - p, 0.0)), ((1 - p) * q, 0.5, (-p, 1 - q)), ((1 - p) * (1 - q), -0.25, (-p, -q))]
    true = sum(chance * score * np.array(slope) for chance, score, slope in outcomes)
    assert true == pytest.approx([0.1995, 0.126])
    expected = np.zeros(2)
    for group in itertools.product(outcomes, repeat=3):
        scores = torch.tensor([score for _, score, _ in group])
        unscaled = group_relative_advantages(scores, torch.zeros(3)).double() * (scores.std() + 1e-6)
        chance = math.prod(chance for chance, *_ in group)
        for advantage, (*_, slope) in zip(unscaled.tolist(), group, strict=True):
            expected += chance / 3 * advantage * np.array(slope)
    assert expected == pytest.approx(true * 2 / 3, abs=1e-6)


# --- the metrics of the answers ------------------------------------------------------------------


def test_the_metrics_of_seven_episodes_by_hand():
    episodes = [played(answers) for answers in (
        ["4"] * 5, FIVE, ["2", "2", "9"], ["9"], ["a", "b", "a", "b", "9"], [None, *["4"] * 4], [None] * 5)]
    expected = {f"success_at_{k + 1}": x / 7 for k, x in enumerate([1, 1, 2, 2, 3])} | {
        "average_turns": 29 / 7, "distinct_ratio": (1 / 5 + 1 + 2 / 3 + 3 / 5 + 1 / 4) / 5, "identical_failure": 2 / 3,
        "malformed_rate": 6 / 29, "in_range": 19 / 23}
    assert retry_metrics(answer_table(episodes), 5) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("answers,turns", [(["9"], 1), (["4"], 5), ([None], 5), ([], 5)])
def test_metrics_of_episodes_that_are_all_alike_are_finite(answers, turns):
    """An episode that was cut short counts as five turns: it is a failure."""
    got = retry_metrics(answer_table([played(answers)] * 3), 5)
    assert got["average_turns"] == turns and all(map(math.isfinite, got.values()))
    assert got["success_at_1"] == got["success_at_5"] == (turns == 1)


def test_an_environment_need_not_know_what_is_in_range():
    episode = played(["4"])
    del episode.turns[0].info["in_range"]
    assert answer_table([episode, played([])]).tolist() == [[INF, 1, 1, 1, 0, 0], [INF, 0, 0, 0, 0, 0]]


# --- the update ----------------------------------------------------------------------------------


@pytest.fixture
def batch(tiny_policy):
    """Eight episodes of which the policy has moved on: some tokens are clipped, advantages are of either sign."""
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(3)
    batch = collate([played(random_answers(rng), tiny_policy, f"question {n}") for n in range(8)], tiny_policy.device)
    mask, noise = batch["turn_id"] >= 0, torch.randn(2, *batch["tokens"].shape, generator=generator)
    logprobs, _ = token_logprobs(tiny_policy, batch, 1.3)
    return batch | {"old_logprobs": torch.where(mask, logprobs.detach() + 0.4 * noise[0], 0.0),
                    "advantages": torch.where(mask, noise[1], 0.0)}


ARGS = Args(temperature=1.3, clip_low=0.1, clip_high=0.3, entropy_coefficient=0.05, max_grad_norm=1e9)


def updated(policy, batch, args=ARGS):
    """What an update reports, and its gradient."""
    keeper = KeepGradient(policy)
    return update(policy, keeper, dict(batch), args), keeper.gradient


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_update_is_what_a_loop_over_sampled_tokens_gives(tiny_policy, batch, count):
    size = next(n for n in range(1, 10**5) if len(list(micro_batches(batch, n))) == count)
    args = dataclasses.replace(ARGS, micro_batch_tokens=size)
    metrics, gradient = updated(tiny_policy, batch, args)
    logprobs, entropies = token_logprobs(tiny_policy, batch, 1.3)
    tokens = (batch["turn_id"] >= 0).nonzero().tolist()
    objective, entropy, clipped, divergence = 0.0, 0.0, 0, 0.0
    for b, t in tokens:
        ratio, advantage = logprobs[b, t].exp() / batch["old_logprobs"][b, t].exp(), batch["advantages"][b, t]
        limit = 1.3 if advantage > 0 else 0.9
        stopped = bool(advantage * (ratio - limit) > 0)
        objective = objective + (limit if stopped else ratio) * advantage + 0.05 * entropies[b, t]
        clipped += stopped
        entropy += entropies[b, t].item()
        divergence += ratio.item() - 1 - math.log(ratio.item())
    (-objective / len(tokens)).backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_policy.model.parameters()])
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    assert metrics == pytest.approx({
        "loss": -objective.item() / len(tokens), "entropy": entropy / len(tokens),
        "clip_fraction": clipped / len(tokens), "approx_kl": divergence / len(tokens),
        "grad_norm": expected.norm().item()}, rel=1e-4)
    assert 0 < clipped < len(tokens) and divergence > 0


def test_the_layout_of_a_batch_does_not_matter(tiny_policy, batch):
    """Padding, the order of rows, what stands on tokens that were not sampled."""
    order, outside, fill = torch.randperm(8), batch["turn_id"] < 0, {"turn_id": -1, "tokens": 7}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill.get(k, 5.0)) if x.dim() > 1 else x
              for k, x in batch.items()}
    metrics, gradient = updated(tiny_policy, batch)
    for other in ({k: x[order] for k, x in batch.items()}, padded | {"lengths": batch["lengths"] + 6},
                  batch | {k: torch.where(outside, 9.0, batch[k]) for k in ("old_logprobs", "advantages")}):
        also, same = updated(tiny_policy, other)
        assert also == pytest.approx(metrics, rel=1e-4) and torch.allclose(same, gradient, rtol=1e-3, atol=2e-6)


def test_every_token_counts_the_same_not_every_episode(tiny_policy):
    """Two answers of advantage 1 and a single one of advantage -1, all of two tokens: the loss is -1/3 at ratio 1."""
    batch = collate([played(["1", "2"], tiny_policy), played(["3"], tiny_policy)], tiny_policy.device,
                    torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    batch["old_logprobs"] = token_logprobs(tiny_policy, batch, 1.0)[0].detach()
    metrics, _ = updated(tiny_policy, batch, Args(entropy_coefficient=0.0))
    assert (batch["turn_id"] >= 0).sum(1).tolist() == [4, 2]
    assert metrics["loss"] == pytest.approx(-1 / 3, abs=1e-6)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] == pytest.approx(0, abs=1e-6)


# --- real episodes -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_answers", [1, 3])
def test_what_follows_the_last_answer_is_in_no_row(tiny_policy, max_answers):
    """Episode n gets the right answer on turn n, by force: some end solved, some unsolved at the last answer."""
    envs = [make_env("turnrl/RetryMath-v0", max_answers=max_answers) for _ in range(6)]
    episodes = start_episodes(envs, [5] * 6)
    gold, plan = int(episodes[0].start_info["answer"]), {id(e): n for n, e in enumerate(episodes)}

    def force(episode, used, ids):
        wrong = plan[id(episode)] != len(episode.turns)
        return [] if ids else tiny_policy.encode(f"<answer>{gold + wrong}</answer>")
    tiny_policy.force, tiny_policy.max_turn_tokens = force, 22
    rollout(tiny_policy, envs, episodes, streams(6), max_turns=9, temperature=1.0)
    right, num_turns, *_ = answer_table(episodes).T.tolist()
    assert right == [n + 1 if n < max_answers else INF for n in range(6)]
    assert num_turns == [min(n + 1, max_answers) for n in range(6)]
    assert all(e.terminated and not e.truncated for e in episodes)
    batch = collate(episodes, tiny_policy.device)
    for number, episode in enumerate(episodes):
        assert episode.observation == ("Correct." if episode.success else "Incorrect. Please think again.")
        ids = batch["tokens"][number, :batch["lengths"][number]].tolist()
        assert ids == episode.row() and ids[-len(episode.turns[-1].token_ids):] == episode.turns[-1].token_ids


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 3, "warm_start_steps": 5, "num_iterations": 2, "eval_episodes": 4,
         "max_turn_tokens": 3, "print_samples": 0}


@pytest.fixture
def spy(monkeypatch):
    """What a run did; play(policy, envs, args, iteration) is what collects its episodes."""
    seen = SimpleNamespace(iterations=[], evaluations=[], play=collect_groups)
    real_update, real_evaluate = ufo.update, ufo.evaluate

    def collect(policy, envs, args, iteration):
        episodes = seen.play(policy, envs, args, iteration)
        seen.iterations.append(SimpleNamespace(envs=envs, episodes=episodes, updates=[]))
        return episodes

    def updating(policy, optimizer, batch, args):
        seen.iterations[-1].updates.append({name: x.clone() for name, x in batch.items()})
        return real_update(policy, optimizer, batch, args)

    def evaluating(policy, envs, args):
        metrics, episodes = real_evaluate(policy, envs, args)
        weights = copy.deepcopy(policy.model.state_dict())
        seen.evaluations.append(SimpleNamespace(envs=envs, args=args, episodes=episodes, weights=weights))
        return metrics, episodes
    for name, call in (("collect_groups", collect), ("update", updating), ("evaluate", evaluating)):
        monkeypatch.setattr(ufo, name, call)
    monkeypatch.setattr(policies, "NUM_DEMONSTRATIONS", 128)  # a quicker warm start
    monkeypatch.setattr(policies, "WARM_START_ROWS", 16)
    monkeypatch.setattr(Run, "plot", lambda *_: None)
    return seen


def run(tmp_path, **flags):
    """A run and the rows of its metrics.csv."""
    summary = ufo.main(Args(**(QUICK | {"run_dir": str(tmp_path)} | flags)))
    folder = max(Path(tmp_path).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with open(folder / "metrics.csv") as file:
        return summary, [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def play_answers(lists):
    """Episodes with these answers: a list of them for every iteration."""
    return lambda policy, envs, args, iteration: [
        played(answers, policy, f"question {n}") for n, answers in enumerate(lists[iteration])]


def credits(iteration):
    """(update, episode, advantage) of every row that was trained on, which has the same on all its sampled tokens."""
    number = {tuple(e.row()): n for n, e in enumerate(iteration.episodes)}
    for step, batch in enumerate(iteration.updates):
        for tokens, turn_id, advantages, length in zip(
                *(batch[name] for name in ("tokens", "turn_id", "advantages", "lengths")), strict=True):
            [value] = advantages[turn_id >= 0].unique().tolist()
            assert not advantages[turn_id < 0].any()
            yield step, number[tuple(tokens[:length].tolist())], value


SCORES = {  # answers of which 9 is right: R
    "a": (["4"] * 5, -0.4), "b": (FIVE, 0), "c": ([" 2", "2 ", "9"], 1 / 12), "d": (["9"], 1),
    "e": ([*FIVE[:4], "9"], 0.0625), "f": ([None, "9"], 0.9), "g": ([None, *["4"] * 4], -0.475),
    "h": (["A", "b", "a", "B ", "9"], -0.1375), "i": ([None] * 5, -0.5),
    "j": (["4", None, "4", "4", "4"], -0.475), "k": ([None, None, "9"], 0.8)}


def test_scores_and_advantages_by_hand(tmp_path, spy):
    """A malformed turn costs .1, does not count as a wrong answer, and does not save the penalty for repeats (g, j)."""
    answers, expected = zip(*SCORES.values(), strict=True)
    spy.play = play_answers([answers])
    _, logged = run(tmp_path, num_prompts=1, group_size=11, num_iterations=1, num_minibatches=1)
    assert logged[1]["score"] == pytest.approx(np.mean(expected), abs=1e-12)
    got = {n: value for _, n, value in credits(spy.iterations[0])}
    relative = (expected - np.mean(expected)) / np.std(expected, ddof=1)
    assert [got[n] for n in range(11)] == pytest.approx(relative, abs=1e-4)


@pytest.mark.parametrize("flags", [
    {}, {"decay_base": 0.9, "repetition_penalty": 0.3, "format_penalty": 0.2, "num_prompts": 3},
    {"decay_base": 1.0, "repetition_penalty": 0.0, "num_minibatches": 1},
    {"decay_base": 0.7, "max_turns": 3, "num_prompts": 3, "num_minibatches": 3}])
def test_a_run_credits_and_logs_what_a_loop_over_its_episodes_gives(flags, tmp_path, spy):
    """All episodes of a group are in the same update, every episode is trained on once."""
    args, rng = Args(**(QUICK | flags)), np.random.default_rng(5)
    rounds = [[random_answers(rng, args.max_turns) for _ in range(3 * args.num_prompts)] for _ in range(2)]
    spy.play = play_answers(rounds)
    _, logged = run(tmp_path, **flags)
    for answers, iteration, row in zip(rounds, spy.iterations, logged[1:], strict=True):
        parts = np.array([score_parts(a, args) for a in answers])
        scores = (parts @ [1, -1, -1]).reshape(-1, 3)
        centred, spread = scores - scores.mean(1, keepdims=True), scores.std(1, ddof=1, keepdims=True)
        credit = {n: value for _, n, value in credits(iteration)}
        assert [credit[n] for n in range(len(answers))] == pytest.approx((centred / spread).flatten(), abs=1e-4)
        assert sorted((step, n // 3) for step, n, _ in credits(iteration)) == sorted(
            (group % args.num_minibatches, group) for group in range(args.num_prompts) for _ in range(3))
        assert row["optimizer_steps"] == len(iteration.updates) == args.num_minibatches
        assert row["score"] == pytest.approx(scores.mean(), abs=1e-5)
        assert row["repetition_part"] == pytest.approx(parts[:, 1].mean(), abs=1e-5)
        assert row["groups_without_signal"] == 0
        for k in range(1, args.max_turns + 1):
            assert row[f"train_success_at_{k}"] == pytest.approx(np.mean(["9" in a[:k] for a in answers]))
        assert row["train_malformed_rate"] == pytest.approx(np.mean([x is None for a in answers for x in a]))
        assert row["train_average_turns"] == pytest.approx(np.mean([len(a) for a in answers]))


def test_groups_of_equal_scores_are_logged_and_teach_nothing(tmp_path, spy):
    spy.play = play_answers([[[None] * 5] * 3 + [["9"], ["1", "9"], ["9"]], [FIVE, ["4"], ["3", "2"]] * 2])
    _, logged = run(tmp_path)
    assert [row["optimizer_steps"] for row in logged[1:]] == [1, 0]
    assert [row["groups_without_signal"] for row in logged[1:]] == [0.5, 1]
    assert {n for _, n, _ in credits(spy.iterations[0])} == {3, 4, 5}
    assert logged[1]["score"] == pytest.approx((3 * -0.5 + 1 + 0.5 + 1) / 6) and logged[2]["score"] == 0


def test_evaluation_reports_its_own_episodes(tmp_path, spy, monkeypatch):
    tested = [played(answers) for answers in (["4"] * 5, FIVE, ["2", "2", "9"], ["9"])]
    monkeypatch.setattr(ufo, "evaluate", lambda *_: (episode_metrics(tested), tested))
    _, logged = run(tmp_path, max_turns=2, num_iterations=1)
    for row in logged:
        assert [row[f"eval_success_at_{k}"] for k in range(1, 6)] == [0.25, 0.25, 0.5, 0.5, 0.5]
        assert row["eval_average_turns"] == 3.5 and row["eval_identical_failure"] == 0.5
        assert row["eval_distinct_ratio"] == pytest.approx((0.2 + 1 + 2 / 3) / 3)


def test_one_turn_in_training_is_still_five_in_evaluation(tmp_path, spy):
    """Both arms of the comparison start from the same policy, with the same problems."""
    for max_turns in (1, 3):
        _, logged = run(tmp_path, max_turns=max_turns, num_iterations=1, eval_temperature=1.5)
        trained, tested = spy.iterations[-1], spy.evaluations[-1]
        for envs, answers in ((trained.envs, max_turns), (tested.envs, 5)):
            assert {env.unwrapped.max_answers for env in envs} == {answers}
        assert {env.unwrapped.format_penalty for env in tested.envs} == {0.0}, "training penalties are off"
        assert max(len(e.turns) for e in trained.episodes) == max_turns and logged[0]["eval_turns"] > 3
        assert all(e.terminated and not e.truncated for e in trained.episodes)
        assert tested.args.max_turns == 5 and tested.args.eval_temperature == 1.5
        assert "eval_success_at_5" in logged[0] and f"train_success_at_{max_turns + 1}" not in logged[1]
    first, second = spy.evaluations[0].weights, spy.evaluations[2].weights  # before training
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, three = ([e.turns[0].observation for e in i.episodes] for i in spy.iterations)
    assert one == three


def test_the_flags_reach_the_environments_of_training_and_evaluation(tmp_path, spy):
    args = Args(env_kwargs='{"levels": "45", "feedback": "blank"}')
    told = allow_answers(args, 2)
    assert json.loads(told.env_kwargs) == {"levels": "45", "feedback": "blank", "max_answers": 2}
    assert dataclasses.replace(told, env_kwargs=args.env_kwargs, max_turns=5) == args, "nothing else changes"
    _, logged = run(tmp_path, env_kwargs=args.env_kwargs, num_iterations=1, eval_max_turns=2)
    trained, tested = spy.iterations[0], spy.evaluations[-1]
    for env in (*trained.envs, *tested.envs):
        assert env.unwrapped.levels == "45" and env.unwrapped.feedback == "blank"
    assert [max(len(e.turns) for e in x.episodes) for x in (trained, tested)] == [5, 2]
    assert "eval_success_at_2" in logged[0] and "eval_success_at_3" not in logged[0]


@pytest.mark.parametrize("flags,needle", [
    ({"env_id": "turnrl/FrozenLake-v0"}, "FrozenLake-v0: UFO needs to know what was answered"),
    ({"env_kwargs": '{"max_answers": 3}'}, "--eval-max-turns set max_answers"),
    ({"group_size": 1}, "--group-size 1")])
def test_what_cannot_be_trained_ends_with_one_clear_line(flags, needle, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, **flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and needle in lines[0], lines


def test_answers_may_be_numbers_or_missing():
    """info["submitted"] of somebody else's environment: 7 and "7" are one answer, none is none."""
    turns = [Turn("", "", info=info) for info in ({"submitted": 7}, {"submitted": "7"}, {}, {"submitted": None})]
    assert answer_table([Episode(0, "", turns)])[0, 2:5].tolist() == [2, 1, 2]  # answers, distinct, malformed
