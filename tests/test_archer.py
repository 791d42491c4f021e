"""ArCHer against hand-worked numbers, exact games and slow loops over turns."""

import copy
import csv
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from algos import archer
from algos.archer import (
    Args, Trajectory, TurnCritic, actor_objective, answer_advantages, collate_turns, critic_update, draw_turns,
    fresh_answers, main, q_targets, squared_errors, trajectory, turn_values, update,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from envs.twenty_questions import TwentyQuestions
from policies import Policy, load_policy, make_tiny
from rollouts import sample_tokens
from utils import micro_batches

CPU = torch.device("cpu")
WHOLE = 10**6  # tokens: all rows are one micro-batch
double, rng = functools.partial(torch.tensor, dtype=torch.double), np.random.default_rng

# --- Eq. 1-6 by hand -----------------------------------------------------------------------------
Q, V = double([[-3.5, -4], [-3, -2], [-0.5, -0.2]]), double([[-3, -4], [-2.5, -2], [0, -0.4]])


def test_targets_and_loss_of_the_critic_by_hand():
    """Every head has its own target; what follows the end does not count."""
    next_v, done = double([[-3, -3.4], [-2, -1.5], [math.nan] * 2]), torch.tensor([False, False, True])
    y = q_targets(double([-1, -1, 0]), done, next_v, 0.95)  # with a minimum over the heads: -4.23, -2.9
    assert y.tolist() == [pytest.approx(row) for row in ([-3.85, -4.23], [-2.9, -2.425], [0, 0])]
    errors = squared_errors(Q, y) + squared_errors(V, double([[-3.6, -3.9], [-2.2, -2.6], [-0.3, -0.1]]))
    assert errors.shape == (3,) and errors.mean().item() == pytest.approx(0.1275 + 0.091175 + 0.18 + 0.1533333)


def test_the_minimum_over_heads_is_taken_of_q_and_of_v_apart():
    a = answer_advantages(Q, V)  # with means: -.25, -.25, -.15; with one minimum of q - v: -.5, -.5, -.5
    assert a.tolist() == pytest.approx([0, -0.5, -0.1])


@pytest.mark.parametrize("logprobs,turn_id,advantages,loss", [
    ([[-0.5, -1, -0.25], [-2, -0.1, -math.inf]], [[0, 0, 0], [0, 0, -1]], [0.5, -0.4], 0.0175),  # mean: -.0641667
    # three tokens of an earlier answer, four fresh ones; without the end of the turn: 1.2, with all: 56
    ([[0, -9, -9, -9, 0, 0, -0.1, -0.2, -0.3, -0.4]], [[-1] * 6 + [3] * 4], [2.0], 2.0)])
def test_the_log_probs_of_a_fresh_answer_are_summed_not_averaged(logprobs, turn_id, advantages, loss):
    objective = actor_objective(double(logprobs), double(advantages), torch.tensor(turn_id), len(advantages))
    assert -objective.item() == pytest.approx(loss)


# --- exact games: the real critic update on tables of Q and V -------------------------------------
class Table(torch.nn.Module):
    """A critic of games in which an observation and an answer are one token each."""

    device = CPU

    def __init__(self, states: int, answers: int, heads: int):
        super().__init__()
        self.q = torch.nn.Parameter(torch.zeros(states, answers, heads))
        self.v = torch.nn.Parameter(torch.zeros(states, heads))

    def forward(self, batch):
        state = (batch["starts"] - 1) // 2
        answer = batch["tokens"].gather(1, batch["starts"].clamp(max=batch["tokens"].shape[1] - 1))
        return self.q[state, answer], self.v[state]


def game(answers, rewards) -> Trajectory:
    """One that ended by its own rule."""
    n = len(answers)
    return Trajectory(n, [x for a in answers for x in (0, a)], [x for k in range(n) for x in (-1, k)],
                      [2 * k + 1 for k in range(n)], rewards, [k == n - 1 for k in range(n)])


def fresh_tokens(drawn, answers):
    """Fresh answers of one token to the states of drawn turns."""
    rows = [torch.tensor([*row.tokens[: row.starts[k]], a]) for (row, k), a in zip(drawn, answers, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    return {"tokens": pad_sequence(rows, True), "starts": lengths[:, None] - 1, "lengths": lengths}


def chain(turns: int, rate: float):
    """A chain of turns that cost 1 each; every step sets Q and V to their targets, then the target moves."""
    critic, target = Table(turns, 1, 1), Table(turns, 1, 1)
    drawn = [(game([0] * turns, [-1.0] * turns), k) for k in range(turns)]
    args = Args(num_critics=1, critic_batch_turns=turns, target_rate=rate, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(critic.parameters(), turns / 2)  # loss: (q - y)^2 / turns
    while True:
        critic_update(critic, target, optimizer, fresh_tokens(drawn, [0] * turns), collate_turns(drawn, CPU), args)
        yield critic.q[:, 0, 0].tolist(), critic.v[:, 0].tolist()


def test_both_targets_come_from_the_slow_copy():
    """With V of the critic itself Q is -1.095 after 3 steps, with its Q V is -1."""
    steps = list(itertools.islice(chain(3, 0.1), 5))
    for n, q, v in ((3, [-1.0095, -1.0095, -1], [-0.19] * 3),
                    (5, [-1.049775, -1.049685, -1], [-0.347415, -0.347415, -0.3439])):
        assert steps[n - 1] == (pytest.approx(q, abs=1e-5), pytest.approx(v, abs=1e-5))


@pytest.mark.parametrize("rate,expected", [(1.0, 38), (0.2, 190)])
def test_the_default_warm_up_is_enough_to_know_the_start_of_20_turns(rate, expected):
    true = -sum(0.95**k for k in range(20))
    steps = next(n for n, (_, v) in enumerate(chain(20, rate), 1) if abs(v[0] - true) < 0.05 * abs(true))
    assert steps == expected <= 2 * 20 / rate


@pytest.mark.parametrize("asked", [1, 5])
def test_v_is_that_of_the_current_policy_whoever_played(asked):
    """A hidden bit: ask (0) or guess it (1, 2). Every turn but the right guess costs 1; two turns, and after the
    first the bit is known (1 is right). The buffer asks first as often as told, the policy is uniform."""
    second = [[0, -1.0], [1, 0.0], [2, -1.0]]
    rows = [game([0, a], [-1.0, r]) for a, r in second] * asked
    for guess in (1, 2):  # right or wrong equally often
        rows += [game([guess], [0.0])] * 3 + [game([guess, a], [-1.0, r]) for a, r in second]
    drawn = [(row, k) for row in rows for k in range(row.num_turns) for _ in range(3)]
    answers = fresh_tokens(drawn, [0, 1, 2] * (len(drawn) // 3))  # each state three times: the exact expectation
    critic, target = Table(2, 3, 2), Table(2, 3, 2)
    torch.nn.init.normal_(critic.q, generator=torch.Generator().manual_seed(0))
    args = Args(critic_batch_turns=len(drawn), target_rate=0.5, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(critic.parameters(), 0.8)
    for _ in range(70):
        critic_update(critic, target, optimizer, answers, collate_turns(drawn, CPU), args)
    for head in range(2):
        assert critic.v[:, head].tolist() == pytest.approx([-1.0888889, -0.6666667], abs=1e-4)
        assert critic.q[0, :, head].tolist() == pytest.approx([-1.6333333, -0.8166667, -0.8166667], abs=1e-4)
    advantages = answer_advantages(critic.q.reshape(6, 2), critic.v.repeat_interleave(3, 0))
    assert advantages.tolist() == pytest.approx([-0.5444444, 0.2722222, 0.2722222, -1 / 3, 2 / 3, -1 / 3], abs=1e-4)
    logits = torch.zeros(1, 3, requires_grad=True)
    actor_objective(logits.log_softmax(1).T, advantages[:3], torch.zeros(3, 1).long(), 3).backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.1814815, 0.0907407, 0.0907407], abs=1e-4)


# --- the buffer of turns -------------------------------------------------------------------------
def played(policy: Policy) -> list[Episode]:
    """Three games: a dog is found, a pen is not, and over a ring the cap cuts the answer."""
    episodes = []
    for answer, actions in (("dog", ["Is the object soft?", "Is the object a dog?"]), ("ring", ["Is the object a"]),
                            ("pen", ["Is the object big?", "Is the object a dog?", "What?"])):
        env = TwentyQuestions(20)
        observation, info = env.reset(seed=0, options={"answer": answer})
        episode = Episode(0, observation, info=info)
        for action in actions:
            ids, starts_row = policy.prompt(episode)
            tokens = policy.encode(action) + [policy.end_id] * (answer != "ring")
            episode.answer(env, Turn(episode.observation, action, ids, starts_row, tokens, [0.0] * len(tokens)))
        episode.truncated = not episode.terminated
        episodes.append(episode)
    return episodes


@pytest.fixture(scope="module")
def policy() -> Policy:
    words = [*TwentyQuestions().known.values(), "Questions:", "Yes.", "No.", "Invalid question."]
    return Policy(*make_tiny(Args(tiny_init_std=0.3), words * 9), "cpu")


@pytest.fixture
def rows(policy) -> list[Trajectory]:
    dog, ring, pen = (trajectory(policy, episode, Args()) for episode in played(policy))
    return [dog, pen, ring]


@pytest.fixture
def drawn(rows) -> list[tuple[Trajectory, int]]:
    return [(rows[0], 1), (rows[1], 2), (rows[2], 0)]


def test_a_trajectory_alternates_states_and_answers(policy, rows):
    first, yes, no, what = (f"<|user|>{x}<|assistant|>" for x in ("Questions:", "Yes.", "No.", "Invalid question."))
    dog, end = "Is the object a dog?<|end|>", "<|end|>"
    expected = [[first, f"Is the object soft?{end}", yes, dog],
                [first, f"Is the object big?{end}", no, dog, no, f"What?{end}", what],  # after a cut: no answer
                [first, "Is the object a", f"{end}{what}"]]
    for row, parts in zip(rows, expected, strict=True):
        ids = [policy.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        assert row.tokens == sum(ids, [])
        assert row.turn_id == [n // 2 if n % 2 else -1 for n, part in enumerate(ids) for _ in part]
        assert row.starts == [sum(map(len, ids[: n + 1])) for n in range(0, len(ids), 2)]
    assert [row.rewards for row in rows] == [[-1, 0], [-1, -1, -1, 0], [-1, 0]]
    assert [row.num_turns for row in rows] == [2, 3, 1]
    assert [row.done for row in rows] == [[False, True], [False] * 4, [False] * 2]


@pytest.mark.parametrize("bootstrap,overflowed", [(False, False), (True, True)])
def test_a_time_limit_ends_the_return_if_told_and_a_full_context_does(policy, bootstrap, overflowed):
    episode = played(policy)[2]
    episode.overflowed = overflowed
    row = trajectory(policy, episode, Args(bootstrap_truncated=bootstrap))
    assert row.done == [False, False, True] and len(row.starts) == 3 and len(row.tokens) == len(episode.row())


def test_a_batch_of_drawn_turns_by_hand(drawn):
    batch = collate_turns(drawn, CPU)
    assert batch["played"].tolist() == [[True, True, False, False], [True] * 3 + [False], [True] + [False] * 3]
    assert batch["done"].tolist() == [[False, True, False, False], [False] * 4, [False] * 4]
    assert batch["drawn"].tolist() == [[False, True, False, False], [False, False, True, False], [True] + [False] * 3]
    assert batch["rewards"].tolist() == [[-1, 0, 0, 0], [-1, -1, -1, 0], [-1, 0, 0, 0]]
    for i, (row, _) in enumerate(drawn):
        length = batch["lengths"][i].item()
        assert batch["tokens"][i, :length].tolist() == row.tokens
        assert batch["turn_id"][i].tolist() == row.turn_id + [-1] * (batch["turn_id"].shape[1] - length)
        assert batch["starts"][i, : len(row.starts)].tolist() == row.starts


def test_turns_are_drawn_evenly_with_replacement():
    counts = np.bincount(draw_turns(list(range(5)), 50000, rng(0)))
    assert len(counts) == 5 and abs(counts / 50000 - 0.2).max() < 0.01


# --- the critic ----------------------------------------------------------------------------------
@pytest.fixture
def critic(policy) -> TurnCritic:
    torch.manual_seed(0)
    return TurnCritic(policy, num_critics=2)


def test_v_reads_the_end_of_a_state_and_q_also_the_mean_of_the_answer(drawn, critic):
    q, v = critic(collate_turns(drawn, CPU))
    for i, (row, _) in enumerate(drawn):
        for k in range(len(row.starts)):
            end = row.starts[k] + row.turn_id.count(k)
            tokens, start = torch.tensor([row.tokens[:end]]), row.starts[k]  # nothing of what follows
            hidden = critic.trunk(tokens, use_cache=False).last_hidden_state[0]
            for j in range(2):
                assert torch.allclose(v[i, k, j], critic.v_heads[j](hidden[start - 1]), atol=1e-5)
                if k < row.num_turns:
                    both = torch.cat([hidden[start - 1], sum(hidden[start:]) / (end - start)])
                    assert torch.allclose(q[i, k, j], critic.q_heads[j](both), atol=1e-5)
    assert v[0].std(0).min() > 1e-3 and (v[:, :1, 0] - v[:, :1, 1]).abs().min() > 1e-4, "states and heads differ"


def test_v_is_blind_to_the_answer_and_q_is_not(drawn, critic):
    batch = collate_turns(drawn[1:2], CPU)
    (q, v), changed = critic(batch), batch | {"tokens": batch["tokens"].clone()}
    changed["tokens"][0, batch["starts"][0, 1]] += 1  # the first token of answer 1
    other_q, other_v = critic(changed)
    assert torch.equal(other_v[0, :2], v[0, :2]) and torch.equal(other_q[0, 0], q[0, 0])
    assert not torch.allclose(other_q[0, 1], q[0, 1], atol=1e-4), "its own value"
    assert not torch.allclose(other_v[0, 2], v[0, 2], atol=1e-4), "later states contain it"


@pytest.mark.parametrize("tokens", [1, 60])
def test_the_critic_does_not_see_padding_or_other_rows(rows, critic, tokens):
    """Short rows have fewer token columns than the batch has turns."""
    long, short = game(list(range(5, 15)), [0.0] * 10), game([8], [-1.0])
    batch = collate_turns([(row, 0) for row in (*rows, long, short)], CPU)
    for a, b in zip(turn_values(critic, batch, Args(micro_batch_tokens=tokens)), critic(batch), strict=True):
        assert torch.allclose(a[batch["played"]], b[batch["played"]], atol=1e-5)


def test_the_critic_has_its_own_parameters_and_trains_them_all(policy, critic, drawn):
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.model.parameters()}
    assert len(critic.trunk.layers) == 2 and len(policy.model.model.layers) == 4
    q, v = critic(collate_turns(drawn, CPU))
    (q.sum() + v.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())
    assert all(p.grad is None for p in policy.model.parameters())


# --- fresh answers -------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [WHOLE, 30])
def test_fresh_answers_are_sampled_token_by_token_from_the_state(policy, rows, tokens, monkeypatch):
    """Against a full pass per token; some answers end, others are cut by the cap. The buffer stays as it was."""
    before, ended = copy.deepcopy(rows), set()
    turns = [(rows[1], 2), (rows[0], 0), (rows[1], 1), (rows[2], 0), (rows[1], 2)]
    args = Args(max_turn_tokens=9, micro_batch_tokens=tokens, temperature=0.8)
    third = fresh_answers(policy, turns, rng(0), args)["tokens"][1, rows[0].starts[0] + 2]
    monkeypatch.setattr(policy, "end_ids", {third.item()})  # an answer of three tokens
    batch = fresh_answers(policy, turns, rng(0), args)
    uniforms = torch.tensor(rng(0).random((5, 9)))
    for i, (row, k) in enumerate(turns):
        state, answer = row.tokens[: row.starts[k]], []
        for u in uniforms[i]:
            logits = policy.forward(torch.tensor([state + answer]))[0, -1:]
            answer.append(sample_tokens(logits, 0.8, u[None])[0].item())
            if answer[-1] in policy.end_ids:
                break
        ended.add(answer[-1] in policy.end_ids)
        length = len(state + answer)
        assert batch["lengths"][i] == length and batch["tokens"][i, :length].tolist() == state + answer
        assert batch["starts"][i].tolist() == [len(state)]
        assert (batch["turn_id"][i] == 0).nonzero()[:, 0].tolist() == list(range(len(state), length))
    assert ended == {True, False} and rows == before


def test_two_processes_draw_and_answer_what_one_would(policy, rows, monkeypatch):
    turns = [(row, k) for row in rows for k in range(row.num_turns)]

    def answers():
        stream = rng(0)
        batch = fresh_answers(policy, draw_turns(turns, 6, stream), stream, Args(max_turn_tokens=5))
        return [tokens[:n].tolist() for tokens, n in zip(batch["tokens"], batch["lengths"], strict=True)]

    alone = answers()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert answers() == alone[rank::2]


# --- updates -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [WHOLE, 60, 30])
@pytest.mark.parametrize("value_target", ["fresh", "monte_carlo"])
def test_the_critic_step_against_loops_over_turns(policy, drawn, critic, value_target, tokens):
    """Targets of the slow copy; V at the drawn turn if its answer is fresh, else at all turns as Q is."""
    args = Args(critic_batch_turns=3, target_rate=0.1, value_target=value_target, micro_batch_tokens=tokens)
    target, batch = TurnCritic(policy, 2), collate_turns(drawn, CPU)
    answers = fresh_answers(policy, drawn, rng(1), args)
    before, slow = copy.deepcopy(critic), copy.deepcopy(target)
    metrics = critic_update(critic, target, torch.optim.SGD(critic.parameters(), 0.1),
                            answers if value_target == "fresh" else None, batch, args)
    q, v = before(collate_turns(drawn, CPU))
    with torch.no_grad():
        slow_v, fresh_q = slow(collate_turns(drawn, CPU))[1], slow(answers)[0][:, 0]
    loss, mean_q, mean_v = torch.zeros(()), 0.0, 0.0
    for i, (row, chosen) in enumerate(drawn):
        for k in range(row.num_turns):
            share = 1 / row.num_turns / 3
            returned = sum(0.95**n * r for n, r in enumerate(row.rewards[k : row.num_turns]))
            ends = i == 0 and k == 1  # the dog is found; the other two were cut and go on
            expected = row.rewards[k] + (0 if ends else 0.95 * slow_v[i, k + 1])
            y = expected if value_target == "fresh" else returned
            loss = loss + share * ((q[i, k] - y) ** 2).sum()
            if value_target == "monte_carlo":
                loss = loss + share * ((v[i, k] - returned) ** 2).sum()
            elif k == chosen:
                loss = loss + ((v[i, k] - fresh_q[i]) ** 2).sum() / 3
            mean_q, mean_v = mean_q + share * q[i, k].mean().item(), mean_v + share * v[i, k].mean().item()
    gradient = torch.autograd.grad(loss, list(before.parameters()))
    norm = torch.stack([g.norm() for g in gradient]).norm().item()
    assert metrics == {"critic_loss": pytest.approx(loss.item(), rel=1e-4), "q": pytest.approx(mean_q, rel=1e-4),
                       "v": pytest.approx(mean_v, rel=1e-4), "critic_grad_norm": pytest.approx(norm, rel=1e-3)}
    networks = zip(*(net.parameters() for net in (before, critic, slow, target)), strict=True)
    for (old, new, was, now), g in zip(networks, gradient, strict=True):
        assert torch.allclose(new, old - 0.1 * g / max(norm, 1), atol=1e-5)
        assert torch.allclose(now, 0.9 * was + 0.1 * new, atol=1e-6)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("tokens,parts", [(WHOLE, 1), (100, 2), (40, 4)])
def test_the_policy_step_against_a_pass_per_answer(policy, rows, centre, tokens, parts):
    """The mean over answers of advantage times summed log-probs, at the sampling temperature; and what is logged."""
    args = Args(actor_batch_turns=6, micro_batch_tokens=tokens, max_grad_norm=1e9, centre_advantages=centre,
                temperature=0.7, max_turn_tokens=9)
    batch = fresh_answers(policy, [(row, k) for row in rows for k in range(row.num_turns)], rng(1), args)
    assert len(list(micro_batches(batch, tokens))) == parts
    batch["advantages"] = torch.tensor([0.5, -1.0, 0.2, 0.0, -0.3, 1.0])
    credit = batch["advantages"] - (0.4 / 6 if centre else 0.0)
    keep = KeepGradient(policy)
    metrics = update(policy, keep, dict(batch), args)
    total, entropies = torch.zeros(()), []
    for i in range(6):
        start, end = int(batch["starts"][i, 0]), int(batch["lengths"][i])
        row = batch["tokens"][i, :end]
        logprobs = (policy.forward(row[None])[0] / 0.7).log_softmax(1)
        total = total - credit[i] / 6 * sum(logprobs[t - 1, row[t]] for t in range(start, end))
        entropies += [-(logprobs[t - 1].exp() * logprobs[t - 1]).sum().item() for t in range(start, end)]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.model.parameters()))])
    assert torch.allclose(keep.gradient, expected, atol=1e-4 * expected.abs().max())
    assert metrics == {name: pytest.approx(value, rel=1e-4) for name, value in {
        "loss": total.item(), "entropy": np.mean(entropies), "advantage_square": (credit**2).mean().item(),
        "advantage_mean": 0.4 / 6, "grad_norm": expected.norm().item()}.items()}


# --- whole runs ----------------------------------------------------------------------------------
def short(tmp_path, **flags) -> Args:
    flags = {"num_prompts": 4, "num_iterations": 2, "warm_start_steps": 5, "eval_episodes": 8, "eval_every": 2,
             "critic_steps": 3, "critic_batch_turns": 8, "actor_steps": 2, "actor_batch_turns": 8, "max_turns": 5,
             "print_samples": 0, "env_id": "words:tests/Words-v0", "actor_warm_up": 0, "max_turn_tokens": 4} | flags
    return Args(run_dir=str(tmp_path), **flags)


def finished(args: Args):
    """The run's rows of metrics, its trained weights and its trainer state."""
    main(args)
    [folder] = Path(args.run_dir).iterdir()
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
    return rows, load_file(folder / "checkpoint/model.safetensors"), torch.load(folder / "checkpoint/trainer_state.pt")


@pytest.mark.parametrize("flags,steps", [
    ({"actor_warm_up": 2}, [0, 0]), ({"actor_warm_up": 1, "value_target": "monte_carlo"}, [0, 2]),
    ({"actor_warm_up": None, "num_iterations": 3, "max_turns": 3, "target_rate": 0.9, "critic_steps": 4}, [0, 0, 2])])
def test_the_policy_rests_until_the_warm_up_is_over(tmp_path, flags, steps):
    """By default 2 K / (tau critic steps) iterations, here 1.67. Returns as targets need no fresh answers."""
    args = short(tmp_path, **flags)
    start = {name: x.clone() for name, x in load_policy(args).model.state_dict().items()}
    rows, weights, _ = finished(args)
    assert [row["optimizer_steps"] for row in rows[1:]] == steps
    assert all(torch.equal(x, start[name]) for name, x in weights.items()) == (not any(steps))
    assert [row["fresh_tokens"] > 0 for row in rows[1:]] == [args.value_target == "fresh" or n > 0 for n in steps]


def test_the_target_of_a_run_is_a_network_of_its_own(tmp_path):
    state = finished(short(tmp_path))[2]
    assert not any(torch.equal(x, state["target"][name]) for name, x in state["critic"].items())


def test_fresh_answers_are_made_again_for_every_step_and_counted(tmp_path, monkeypatch):
    """By the policy as it is then, to other states; their tokens are logged, and the mean of the critic's metrics."""
    seen, states, tokens, parts = [], [], [], []

    def watched(policy, drawn, stream, args):
        seen.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]).sum().item())
        states.append([row.tokens[: row.starts[k]] for row, k in drawn])
        batch = fresh_answers(policy, drawn, stream, args)
        tokens.append((batch["lengths"] - batch["starts"][:, 0]).sum().item())
        return batch

    monkeypatch.setattr(archer, "fresh_answers", watched)
    monkeypatch.setattr(archer, "critic_update", lambda *x: parts.append(critic_update(*x)) or parts[-1])
    [_, row], _, _ = finished(short(tmp_path, actor_steps=3, num_iterations=1, eval_every=1, learning_rate=1e-2))
    assert len(seen) == 3 + 3 and len(set(seen[:4])) == 1 and len(set(seen[3:])) == 3
    assert all(a != b for a, b in itertools.combinations(states, 2))
    played_tokens = row["train_tokens_per_turn"] * row["environment_steps"]
    assert row["fresh_tokens"] == sum(tokens) and row["generated_tokens"] == pytest.approx(sum(tokens) + played_tokens)
    assert all(row[name] == pytest.approx(np.mean([part[name] for part in parts])) for name in parts[0])
    assert row["critic_steps"] == 3


@pytest.mark.parametrize("size", [9, 1])
def test_the_oldest_episodes_make_room_and_the_newest_stays(tmp_path, size):
    """While the policy rests every run plays the same."""
    rows, _, state = finished(short(tmp_path / "all", actor_warm_up=9))
    everything = state["buffer"]
    turns = [row["num_turns"] for row in everything]
    assert rows[2]["buffer_turns"] == sum(turns) == rows[2]["environment_steps"] > 9
    rows, _, state = finished(short(tmp_path / "some", actor_warm_up=9, replay_turns=size))
    kept = max([1] + [n for n in range(len(turns)) if sum(turns[-n:]) <= size and n])
    assert state["buffer"] == everything[-kept:] and rows[2]["buffer_turns"] == sum(turns[-kept:])


@pytest.mark.parametrize("flags,named", [
    ({"discount": 1.5}, "--discount"), ({"target_rate": 1.5}, "--target-rate"), ({"target_rate": 0.0}, "--target-rate"),
    ({"critic_batch_turns": 7}, "multiples of 2"), ({"actor_batch_turns": 7}, "multiples of 2")])
def test_settings_without_a_meaning_are_one_line(flags, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        main(short(tmp_path, **flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error
