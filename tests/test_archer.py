"""The mathematics of ArCHer against hand-worked numbers, fixed points and slow loops."""

import copy
import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from algos import archer
from algos.archer import (
    Args, ReplayBuffer, TurnCritic, actor_objective, best_episodes, critic_update, fresh_answers, main, one_turn,
    pad_rows, polyak_update, q_targets, rows_of, squared_errors, token_baseline_loss, turn_returns, turn_values,
    update, utterance_advantages,
)
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from envs.twenty_questions import TwentyQuestions
from policies import load_policy, make_tiny
from utils import Policy, sample_tokens, token_logprobs

CPU = torch.device("cpu")


def double(values):
    return torch.tensor(values, dtype=torch.double)


# --- Eq. 1-3: the critic's targets and loss ------------------------------------------------------
REWARDS, DONE = double([-1, -1, 0]), torch.tensor([False, False, True])
NEXT = double([[-3, -3.4], [-2, -1.5], [5, 7]])  # Vbar of both heads
Q, TARGET_Q = double([[-3.5, -4], [-3, -2], [-0.5, -0.2]]), double([[-3.6, -3.9], [-2.2, -2.6], [-0.3, -0.1]])
V = double([[-3, -4], [-2.5, -2], [0, -0.4]])


def test_every_head_has_its_own_target_and_the_end_has_none():
    y = q_targets(REWARDS, DONE, NEXT, 0.95)
    assert y.tolist() == [pytest.approx(row) for row in ([-3.85, -4.23], [-2.9, -2.425], [0, 0])]  # min: -4.23, -2.9
    NOTHING = torch.where(DONE[:, None], math.nan, NEXT)
    assert torch.equal(q_targets(REWARDS, DONE, NOTHING, 0.95), y), "what follows the end does not matter"


def test_the_critic_s_loss_by_hand():
    q = Q.clone().requires_grad_()
    errors = squared_errors(q, q_targets(REWARDS, DONE, NEXT, 0.95)) + squared_errors(V, TARGET_Q)
    assert errors.shape == (3,) and errors.mean().item() == pytest.approx(0.5520083333)
    errors.mean().backward()
    assert q.grad[:, 0].tolist() == pytest.approx([0.233333, -0.066667, -0.333333], abs=1e-6)
    y = q_targets(REWARDS, DONE, NEXT, 0.95)
    for head, of_q, of_v in ((0, 0.1275, 0.18), (1, 0.091175, 0.1533333)):
        assert squared_errors(Q[:, head:][:, :1], y[:, head:][:, :1]).mean() == pytest.approx(of_q)
        assert squared_errors(V[:, head:][:, :1], TARGET_Q[:, head:][:, :1]).mean() == pytest.approx(of_v)


def test_the_expectile_weighs_a_value_that_is_too_low_more():
    difference = double([[-0.6, 0.1], [0.3, -0.6], [-0.3, 0.3]])
    zero = torch.zeros_like(difference)
    assert squared_errors(zero, difference, 0.9).mean() == pytest.approx(0.084)
    assert squared_errors(zero[:, :1], difference[:, :1], 0.5).mean() == pytest.approx(0.09)
    assert squared_errors(zero[:, :1], difference[:, :1]).mean() == pytest.approx(0.18), "without: not halved"


def test_the_target_moves_by_its_rate_after_every_step():
    online, target = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(target.weight)
    online.weight.data = torch.tensor([[1.0, -2.0]])
    for expected in ([0.1, -0.2], [0.19, -0.38], [0.271, -0.542]):
        polyak_update(target, online, 0.1)
        assert target.weight[0].tolist() == pytest.approx(expected)
    torch.nn.init.zeros_(target.weight)
    for value, expected in ((1.0, 0.1), (2.0, 0.29), (4.0, 0.661)):
        online.weight.data.fill_(value)
        polyak_update(target, online, 0.1)
        assert target.weight[0].tolist() == pytest.approx([expected] * 2)
    polyak_update(target, online, 1.0)
    assert torch.equal(target.weight, online.weight) and target.weight.grad is None


class Table(torch.nn.Module):
    """Q and V of a few situations, as parameters."""

    def __init__(self, *shapes, start=0.0):
        super().__init__()
        self.q, self.v = (torch.nn.Parameter(torch.full(shape, start).double()) for shape in shapes)


def chain(turns: int, rate: float):
    """A chain of turns that cost 1 each; Q and V are set to their targets, then the target moves."""
    online, target = Table((turns, 1), (turns, 1)), Table((turns, 1), (turns, 1))
    done = torch.arange(turns) == turns - 1
    while True:
        following = torch.cat([target.v[1:], torch.zeros(1, 1)])
        q, v = q_targets(-torch.ones(turns).double(), done, following, 0.95), target.q.detach().clone()
        online.q.data, online.v.data = q, v
        polyak_update(target, online, rate)
        yield q[:, 0].tolist(), v[:, 0].tolist()


def test_both_targets_come_from_the_slow_copy():
    steps = list(itertools.islice(chain(3, 0.1), 5))
    for n, q, v in ((3, [-1.0095, -1.0095, -1], [-0.19] * 3),
                    (5, [-1.049775, -1.049685, -1], [-0.347415, -0.347415, -0.3439])):
        assert steps[n - 1][0] == pytest.approx(q) and steps[n - 1][1] == pytest.approx(v)


@pytest.mark.parametrize("rate,expected", [(1.0, 38), (0.2, 190), (0.1, 382)])
def test_how_long_the_critic_needs_to_know_the_start(rate, expected):
    """The default warm-up, 2 K / rate steps, is enough for 20 turns."""
    true = -sum(0.95**k for k in range(20))
    steps = next(n for n, (_, v) in enumerate(chain(20, rate), 1) if abs(v[0] - true) < 0.05 * abs(true))
    assert steps == expected <= 2 * 20 / rate


def test_the_coin_game_s_fixed_point():
    """A hidden bit; ask, or guess 0 or 1; every turn but the right guess costs 1, two turns, and after the
    first the bit is known. Exact expectations under the uniform policy, two heads from other starts."""
    online, target = Table((2, 3, 2), (2, 2)), Table((2, 3, 2), (2, 2))
    torch.nn.init.normal_(online.q, generator=torch.Generator().manual_seed(0))
    target.load_state_dict(online.state_dict())
    # (situation 0: unknown, 1: known), action (ask, right or 0, wrong or 1), reward, done, share
    rows = [(0, 0, -1, False, 1.0), (0, 1, 0, True, 0.5), (0, 1, -1, False, 0.5), (0, 2, 0, True, 0.5),
            (0, 2, -1, False, 0.5), (1, 0, -1, True, 1.0), (1, 1, 0, True, 1.0), (1, 2, -1, True, 1.0)]
    at, action, rewards, done, share = (torch.tensor(x) for x in zip(*rows, strict=True))
    optimizer = torch.optim.SGD(online.parameters(), lr=0.5)
    for _ in range(400):
        y = q_targets(rewards.double(), done, target.v[torch.ones(8).long()], 0.95)
        errors = squared_errors(online.q[at, action], y)
        values = squared_errors(online.v, target.q.detach().mean(1))
        ((share * errors).sum() + values.sum()).backward()
        optimizer.step(), optimizer.zero_grad()
        polyak_update(target, online, 0.1)
    for head in range(2):
        assert online.v[:, head].tolist() == pytest.approx([-1.0888889, -0.6666667], abs=1e-6)
        assert online.q[0, :, head].tolist() == pytest.approx([-1.6333333, -0.8166667, -0.8166667], abs=1e-6)
    advantages = utterance_advantages(online.q.reshape(6, 2), online.v.repeat_interleave(3, 0))
    assert advantages.tolist() == pytest.approx(
        [-0.5444444, 0.2722222, 0.2722222, -1 / 3, 2 / 3, -1 / 3], abs=1e-6)
    logits = torch.zeros(1, 3, dtype=torch.double, requires_grad=True)
    logprobs = logits.log_softmax(1)[0][:, None]  # three answers of one token
    actor_objective(logprobs, advantages[:3, None], torch.zeros(3, 1).long(), torch.full((3,), 1 / 3).double()).backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.1814815, 0.0907407, 0.0907407], abs=1e-6)


# --- Eq. 5-10: advantages and what the policy is trained on --------------------------------------


def test_the_lower_head_of_both_is_taken_apart():
    y = utterance_advantages(Q, V)  # mean: -.25, -.25, -.15; one minimum: -.5, -.5, -.5
    assert y.tolist() == pytest.approx([0, -0.5, -0.1])
    assert torch.allclose(utterance_advantages(Q + 3, V + 3), y), "a constant of both does not matter"
    assert torch.equal(utterance_advantages(Q.flip(1), V), y) and torch.equal(utterance_advantages(Q, V.flip(1)), y)
    assert utterance_advantages(Q[:, :1], V[:, :1]).tolist() == pytest.approx([-0.5, -0.5, -0.5]), "one critic"


LOGPROBS = double([[-0.5, -1, -0.25], [-2, -0.1, -9]])
TURN_ID = torch.tensor([[0, 0, 0], [0, 0, -1]])
HALF = double([0.5, 0.5])


def test_the_tokens_of_an_answer_are_summed():
    credit = double([[0.5], [-0.4]])
    assert -actor_objective(LOGPROBS, credit, TURN_ID, HALF).item() == pytest.approx(0.0175)  # mean: -.0641667
    broken = torch.where(TURN_ID < 0, -math.inf, LOGPROBS)
    assert -actor_objective(broken, credit, TURN_ID, HALF).item() == pytest.approx(0.0175)


def test_the_gradient_of_one_token():
    logits = double([[0.2, -0.1, 0.4]]).requires_grad_()
    loss = -actor_objective(logits.log_softmax(1)[:, 2:], double([[-0.7]]), torch.zeros(1, 1).long(), double([1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.6201575)
    assert logits.grad[0].tolist() == pytest.approx([-0.236309, -0.175062, 0.411371], abs=1e-6)


def test_only_the_fresh_answer_with_its_end_is_trained():
    logprobs = double([[0, -9, -9, -9, 0, 0, -0.1, -0.2, -0.3, -0.4]])
    turn_id = torch.tensor([[-1] * 6 + [3] * 4])
    assert -actor_objective(logprobs, double([[2.0]]), turn_id, double([1.0])).item() == pytest.approx(2.0)


def test_a_token_s_baseline_by_hand():
    baseline = double([[0.1, 0.2, 0.4], [-0.3, 0, 0.9]]).requires_grad_()
    advantages = double([0.5, -0.4])
    mask = TURN_ID >= 0
    loss = token_baseline_loss(baseline, advantages, mask / mask.sum())
    assert loss.item() == pytest.approx(0.086)  # with the padding: .0716667
    credit = advantages[:, None] - baseline.detach()
    assert -actor_objective(LOGPROBS, credit, TURN_ID, HALF).item() == pytest.approx(0.1425)
    loss.backward()
    assert baseline.grad[1, 2] == 0 and baseline.grad[0, 0].item() == pytest.approx(2 * (0.1 - 0.5) / 5)


def test_advantage_weights_by_hand():
    credit = double([0.5, -0.4]).exp()[:, None]
    assert credit[:, 0].tolist() == pytest.approx([1.648721, 0.670320], abs=1e-6)
    assert -actor_objective(LOGPROBS, credit, TURN_ID, HALF).item() == pytest.approx(2.1464672)


@pytest.mark.parametrize("rewards,expected", [
    ([-1, -1, -1, 0], [-2.8525, -1.95, -1, 0]), ([-1, 0, 2], [0.805, 1.9, 2])])
def test_returns_to_go(rewards, expected):
    padded, mask = torch.tensor([[*rewards, 7.0]]), torch.tensor([[True] * len(rewards) + [False]])
    assert turn_returns(padded, mask, 0.95)[0].tolist() == pytest.approx([*expected, 0])


def test_the_best_episodes_are_those_above_a_quantile():
    returns = torch.tensor([-20.0, -20, -17, -12, -9, -20, -15, -4, -4, -20])
    assert best_episodes(returns, 0.9).tolist() == [x == -4 for x in returns.tolist()]
    assert best_episodes(torch.full((10,), -20.0), 0.9).all(), "equal ones are all kept"
    assert best_episodes(returns, 0.0).all()


# --- the buffer of turns -------------------------------------------------------------------------
GAMES = {  # answer of the game: what is asked; a dog is found, a pen is not, a ring is cut by a cap
    "dog": ["Is the object soft?", "Is the object a dog?"],
    "pen": ["Is the object big?", "Is the object a dog?", "What?"], "ring": ["Is the object a"]}


def played(policy: Policy) -> list[Episode]:
    """The games above, token by token as a policy would have sampled them."""
    episodes = []
    for answer, actions in GAMES.items():
        env = TwentyQuestions(20)
        observation, info = env.reset(seed=0, options={"answer": answer})
        episode = Episode(0, observation, info=info)
        for action in actions:
            ids, starts_row = policy.prompt(episode, None)
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
def rows(policy) -> list[dict]:
    return rows_of(policy, played(policy))


def texts(policy, row) -> list[tuple[str, str]]:
    """State (from the last answer on) and answer of every turn."""
    ends = [0, *row["ends"]]
    return [tuple(policy.tokenizer.decode(row["tokens"][a:b]) for a, b in ((before, start), (start, end)))
            for before, start, end in zip(ends, row["starts"], row["ends"], strict=False)]


U, A, E = "<|user|>", "<|assistant|>", "<|end|>"
FIRST, NO, WHAT = f"{U}Questions:{A}", f"{U}No.{A}", f"{U}Invalid question.{A}"


def test_an_episode_is_a_row_of_states_and_answers(policy, rows):
    dog = f"Is the object a dog?{E}"
    assert [texts(policy, row) for row in rows] == [
        [(FIRST, f"Is the object soft?{E}"), (f"{U}Yes.{A}", dog)],
        [(FIRST, f"Is the object big?{E}"), (NO, dog), (NO, f"What?{E}"), (WHAT, "")],
        [(FIRST, "Is the object a"), (f"{E}{WHAT}", "")]], "the state after a cut has an empty answer"
    assert [row["rewards"] for row in rows] == [[-1, 0], [-1, -1, -1, 0], [-1, 0]]
    assert [row["turns"] for row in rows] == [2, 3, 1]
    assert all(len(row["tokens"]) == row["ends"][-1] for row in rows)


@pytest.mark.parametrize("flags,overflowed,goes_on", [
    ({}, False, True), ({"bootstrap_truncated": False}, False, False), ({}, True, False)])
def test_what_ends_the_bootstrap(policy, flags, overflowed, goes_on):
    """A limit of time goes on unless told otherwise; a full context has no next prompt."""
    episodes = played(policy)
    episodes[1].overflowed = overflowed
    row = rows_of(policy, episodes)[1]
    assert (len(row["ends"]) == 4) != overflowed and row["turns"] == 3
    assert pad_rows([row], Args(**flags), CPU)["done"][0, :3].tolist() == [False, False, not goes_on]


def test_a_batch_by_hand(policy, rows):
    batch = pad_rows(rows, Args(), CPU)
    assert batch["played"].tolist() == [[True, True, False, False], [True] * 3 + [False], [True] + [False] * 3]
    assert batch["done"].tolist() == [[False, True, False, False], [False] * 4, [False] * 4]
    assert batch["rewards"].tolist() == [[-1, 0, 0, 0], [-1, -1, -1, 0], [-1, 0, 0, 0]]
    assert batch["returns"][:, :3].tolist() == [[-1, 0, 0], pytest.approx([-2.8525, -1.95, -1]), [-1, 0, 0]]
    for i, row in enumerate(rows):
        assert batch["lengths"][i] == len(row["tokens"])
        assert batch["tokens"][i, : len(row["tokens"])].tolist() == row["tokens"]
        assert batch["starts"][i, : len(row["starts"])].tolist() == row["starts"]
        for k in range(4):
            marked = batch["tokens"][i][batch["turn_id"][i] == k].tolist()
            assert marked == (row["tokens"][row["starts"][k] : row["ends"][k]] if k < row["turns"] else [])


def test_one_turn_is_its_state_and_its_answer(policy, rows):
    row = one_turn(rows[1], 1)
    assert row["tokens"] == rows[1]["tokens"][: rows[1]["ends"][1]]
    batch = pad_rows([row, one_turn(rows[0], 1)], Args(), CPU)
    assert batch["turn_id"].unique().tolist() == [-1, 0] and batch["starts"].shape == (2, 1)
    assert policy.tokenizer.decode(batch["tokens"][0][batch["turn_id"][0] == 0]) == f"Is the object a dog?{E}"


def test_an_episode_without_a_turn_is_left_out(policy):
    assert rows_of(policy, [Episode(0, "too long", overflowed=True)]) == []


def test_the_oldest_episodes_make_room(rows):
    buffer = ReplayBuffer()
    for _ in range(3):
        buffer.push(rows, 8)  # 2, 3 and 1 turns
    assert buffer == [rows[2], *rows] and sum(row["turns"] for row in buffer) == 7
    buffer.push(rows[1:2], 2)
    assert buffer == [rows[1]], "the newest episode stays"
    other = ReplayBuffer()
    other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    assert other == buffer and type(buffer.state_dict()["rows"]) is list


# --- the critic ----------------------------------------------------------------------------------
@pytest.fixture
def critic(policy) -> TurnCritic:
    torch.manual_seed(0)
    return TurnCritic(policy, num_critics=2, num_layers=2)


def test_what_the_heads_read(rows, critic):
    """V: the last token of the state; Q: that and the mean over the answer's tokens, turn by turn."""
    q, v = critic(pad_rows(rows, Args(), CPU))
    for i, row in enumerate(rows):
        for k in range(row["turns"]):
            tokens = torch.tensor([row["tokens"][: row["ends"][k]]])  # nothing of what follows
            hidden, start = critic.trunk(tokens, use_cache=False).last_hidden_state[0], row["starts"][k]
            answer = sum(hidden[start:]) / len(hidden[start:])
            for j in range(2):
                expected = critic.q_heads[j](torch.cat([hidden[start - 1], answer]))
                assert torch.allclose(q[i, k, j], expected, atol=1e-5)
                assert torch.allclose(v[i, k, j], critic.v_heads[j](hidden[start - 1]), atol=1e-5)
    assert v[0].std(0).min() > 1e-3 and (v[:, :1, 0] - v[:, :1, 1]).abs().min() > 1e-4, "states and heads differ"


def test_v_is_blind_to_the_answer_and_q_is_not(rows, critic):
    batch = pad_rows(rows[1:2], Args(), CPU)
    q, v = critic(batch)
    for place, same_v in ((batch["starts"][0, 1], True), (batch["starts"][0, 1] - 1, False)):
        other = batch | {"tokens": batch["tokens"].clone()}
        other["tokens"][0, place] += 1
        changed_q, changed_v = critic(other)
        assert torch.equal(changed_v[0, 1], v[0, 1]) == same_v
        assert not torch.allclose(changed_q[0, 1], q[0, 1], atol=1e-4)
        assert torch.equal(changed_q[0, 0], q[0, 0]), "earlier turns do not see it"
        assert not torch.allclose(changed_v[0, 2], v[0, 2], atol=1e-4), "later ones do"


def test_the_state_after_a_cut_has_a_value(policy, rows, critic):
    """The same tokens as the state of a turn that is played."""
    _, v = critic(pad_rows(rows[1:2], Args(), CPU))
    tokens = torch.tensor([rows[1]["tokens"]])
    assert torch.allclose(v[0, 3, 0], critic.v_heads[0](critic.trunk(tokens).last_hidden_state[0, -1]), atol=1e-5)


def test_the_critic_does_not_see_padding_or_other_rows(rows, critic):
    whole = turn_values(critic, pad_rows(rows, Args(), CPU), Args())
    for split in (Args(micro_batch_tokens=1), Args(micro_batch_tokens=60)):
        for a, b in zip(turn_values(critic, pad_rows(rows, Args(), CPU), split), whole, strict=True):
            for i, row in enumerate(rows):
                assert torch.allclose(a[i, : row["turns"]], b[i, : row["turns"]], atol=1e-5)
    for i, row in enumerate(rows):
        for a, b in zip(critic(pad_rows([row], Args(), CPU)), whole, strict=True):
            assert torch.allclose(a[0, : row["turns"]], b[i, : row["turns"]], atol=1e-5)


def test_a_short_row_beside_many_turns_is_valued_alike(critic):
    """A part of short rows has fewer token columns than the batch has turns."""
    short = {"tokens": [9, 8], "starts": [1], "ends": [2], "rewards": [-1.0], "turns": 1}
    long = {"tokens": [*range(5, 25)], "starts": [*range(1, 20, 2)], "ends": [*range(2, 21, 2)], "rewards": [-1.0] * 10,
            "turns": 10}
    together, apart = (turn_values(critic, pad_rows([long, short], Args(), CPU), Args(micro_batch_tokens=n))
                       for n in (10**6, 1))
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-5) and torch.allclose(a[1, 0], b[1, 0], atol=1e-5)


def test_how_good_the_critic_is(policy, rows, critic):
    """V minus the return of the six turns, and one minus the ratio of the variances."""
    v = critic(pad_rows(rows, Args(), CPU))[1].mean(2)
    values = torch.stack([v[i, k] for i, row in enumerate(rows) for k in range(row["turns"])])
    returns = torch.tensor([-1, 0, -2.8525, -1.95, -1, -1])
    quality = archer.critic_quality(critic, rows, Args())
    assert quality["value_gap"] == pytest.approx((values - returns).mean().item(), abs=1e-5)
    expected = 1 - (returns - values).var() / returns.var()
    assert quality["explained_variance"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_critic_has_its_own_parameters(policy, critic):
    ours = {p.data_ptr() for p in critic.parameters()}
    assert not ours & {p.data_ptr() for p in policy.model.parameters()}
    assert len(critic.trunk.layers) == 2 and len(policy.model.model.layers) == 4
    q, v = critic({"tokens": torch.tensor([[4, 5, 6]]), "turn_id": torch.tensor([[-1, 0, -1]]),
                   "starts": torch.tensor([[1]])})
    (q.sum() + v.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in critic.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters())


# --- fresh answers -------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [10**6, 30])
def test_fresh_answers_are_those_of_a_rollout_from_the_same_state(policy, rows, tokens):
    """The same uniform numbers give the same tokens, whatever the other rows are."""
    turns = [(rows[1], 2), (rows[0], 0), (rows[1], 1), (rows[2], 0), (rows[1], 2)]
    uniforms = torch.tensor(np.random.default_rng(0).random((5, 9)))
    fresh = fresh_answers(policy, turns, uniforms, Args(max_turn_tokens=9, micro_batch_tokens=tokens))
    ended = set()
    for i, (row, k) in enumerate(turns):
        state, answer = row["tokens"][: row["starts"][k]], []
        for u in uniforms[i]:
            logits = policy.forward(torch.tensor([state + answer]))[0, -1:]
            answer.append(sample_tokens(logits, 1.0, u[None])[0].item())
            if answer[-1] == policy.end_id:
                break
        ended.add(answer[-1] == policy.end_id)
        length = len(state + answer)
        assert fresh["lengths"][i] == length and fresh["tokens"][i, :length].tolist() == state + answer
        assert (fresh["turn_id"][i] >= 0).nonzero()[:, 0].tolist() == list(range(len(state), length))
        assert fresh["starts"][i].tolist() == [len(state)]
    assert rows[1]["tokens"] == rows_of(policy, played(policy))[1]["tokens"], "the buffer is as it was"


def test_an_answer_ends_with_its_end_token_or_at_the_cap(policy, rows, monkeypatch):
    """Tokens given by hand: one answer of two tokens, one that is cut."""
    script = iter([[7, 8], [policy.end_id, 9], [7, 9]])
    monkeypatch.setattr(archer, "sample_tokens", lambda *args: (torch.tensor(next(script)), None))
    fresh = fresh_answers(policy, [(rows[0], 0), (rows[0], 0)], torch.rand(2, 3), Args(max_turn_tokens=3))
    assert [fresh["tokens"][i][fresh["turn_id"][i] == 0].tolist() for i in range(2)] == [
        [7, policy.end_id], [8, 9, 9]]


# --- updates -------------------------------------------------------------------------------------
def drawn(policy, rows, args):
    """Three episodes drawn by one turn each, and fresh answers to those states."""
    turns = [(rows[0], 1), (rows[1], 2), (rows[2], 0)]
    batch = pad_rows([row for row, _ in turns], args, CPU) | {"chosen": torch.tensor([k for _, k in turns])}
    uniforms = torch.tensor(np.random.default_rng(1).random((3, args.max_turn_tokens)))
    return turns, batch, fresh_answers(policy, turns, uniforms, args)


@pytest.mark.parametrize("tokens", [10**6, 60])
@pytest.mark.parametrize("value_target", ["fresh", "monte_carlo", "expectile"])
def test_the_critic_s_update(policy, rows, critic, value_target, tokens):
    """Against loops over turns: targets of the slow copy, V at the drawn turn if its answer is fresh."""
    args = Args(critic_batch_turns=3, target_rate=0.1, value_target=value_target, micro_batch_tokens=tokens)
    target = TurnCritic(policy, 2, 2)
    turns, batch, fresh = drawn(policy, rows, args)
    before, slow = copy.deepcopy(critic), copy.deepcopy(target)
    metrics = critic_update(critic, target, torch.optim.SGD(critic.parameters(), 0.1), batch,
                            fresh if value_target == "fresh" else None, args)
    q, v = before(pad_rows(rows, args, CPU))
    with torch.no_grad():
        slow_q, slow_v = slow(pad_rows(rows, args, CPU))
        fresh_q = slow(fresh)[0][:, 0]
    loss = torch.zeros(())
    for i, (row, chosen) in enumerate(turns):
        for k in range(row["turns"]):
            reward, share = row["rewards"][k], 1 / row["turns"] / 3
            ends = i == 0 and k == 1  # the dog is found; the other two were cut and go on
            y, u, weight = reward + (0 if ends else 0.95 * slow_v[i, k + 1]), slow_q[i, k], 1.0
            if value_target == "monte_carlo":
                y = u = sum(0.95**n * r for n, r in enumerate(row["rewards"][k : row["turns"]]))
            if value_target == "expectile":
                weight = torch.where(u > v[i, k], 0.9, 0.1)
            loss = loss + share * ((q[i, k] - y) ** 2).sum()
            if value_target != "fresh":
                loss = loss + share * (weight * (v[i, k] - u) ** 2).sum()
        if value_target == "fresh":
            loss = loss + ((v[i, chosen] - fresh_q[i]) ** 2).sum() / 3
    assert metrics["critic_loss"] == pytest.approx(loss.item(), rel=1e-4)
    gradient = torch.autograd.grad(loss, list(before.parameters()))
    norm = torch.stack([g.norm() for g in gradient]).norm()
    assert metrics["critic_grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    moves = zip(before.parameters(), critic.parameters(), gradient, strict=True)
    assert all(torch.allclose(new, old - 0.1 * g / max(norm, 1), atol=1e-5) for old, new, g in moves)
    mixed = zip(slow.parameters(), critic.parameters(), target.parameters(), strict=True)
    assert all(torch.allclose(now, 0.9 * old + 0.1 * new, atol=1e-6) for old, new, now in mixed)


def single(rows) -> dict[str, torch.Tensor]:
    """The six turns of the games as a row each."""
    return pad_rows([one_turn(row, k) for row in rows for k in range(row["turns"])], Args(), CPU)


@pytest.mark.parametrize("tokens", [10**6, 40])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("actor_loss", ["policy_gradient", "advantage_weighted", "filtered_clone"])
def test_the_policy_s_gradient(policy, rows, actor_loss, centre, tokens):
    """Against one forward pass per turn: mean over turns of credit times the sum of its tokens. Only the
    policy gradient is centred: weights exp(beta A) are positive, and cloning has none."""
    args = Args(actor_batch_turns=6, actor_loss=actor_loss, micro_batch_tokens=tokens, inverse_temperature=2.0,
                max_grad_norm=1e9, centre_advantages=centre)
    batch = single(rows) | {"advantages": torch.tensor([0.5, -1.0, 0.2, 0.0, -0.3, 1.0])}
    keep = KeepGradient(policy)
    metrics = update(policy, None, keep, None, dict(batch), args)
    offset = batch["advantages"].mean() if centre else 0.0
    credit = {"policy_gradient": batch["advantages"] - offset, "filtered_clone": torch.ones(6),
              "advantage_weighted": (2 * batch["advantages"]).exp()}[actor_loss]
    total = torch.zeros(())
    for i in range(6):
        end, last = int(batch["starts"][i, 0]), int(batch["lengths"][i])
        row = batch["tokens"][i, :last]
        logprobs = policy.forward(row[None])[0].log_softmax(1)
        total = total - credit[i] / 6 * sum(logprobs[t - 1, row[t]] for t in range(end, last))
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert metrics["advantage_mean"] == pytest.approx(0.4 / 6)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.model.parameters()))])
    assert torch.allclose(keep.gradient, expected, atol=1e-4 * expected.abs().max())
    policy.model.zero_grad()


def test_the_token_baseline_is_taken_off_and_learns_apart(policy, rows):
    """It sees the tokens before its own; the policy's loss does not reach it."""
    args = Args(actor_batch_turns=6, token_baseline=True, centre_advantages=False, max_grad_norm=1e9)
    batch = single(rows) | {"advantages": torch.tensor([0.5, -1.0, 0.2, 0.0, -0.3, 1.0])}
    torch.manual_seed(0)
    baseline = TurnCritic(policy, 1, 2)
    torch.nn.init.normal_(baseline.v_heads[0][4].weight)
    keep, keep_baseline = KeepGradient(policy), KeepGradient(Policy.__new__(Policy))
    keep_baseline.policy.model = baseline
    metrics = update(policy, baseline, keep, keep_baseline, dict(batch), args)
    values, mask = baseline.token_values(batch), batch["turn_id"] >= 0
    loss = torch.where(mask, (batch["advantages"][:, None] - values) ** 2, 0.0).sum() / mask.sum()
    assert metrics["baseline_loss"] == pytest.approx(loss.item(), rel=1e-4)
    gradient = torch.autograd.grad(loss, list(baseline.parameters()), allow_unused=True, materialize_grads=True)
    expected = torch.cat([g.flatten() for g in gradient])
    assert torch.allclose(keep_baseline.gradient, expected, atol=1e-4 * expected.abs().max())
    logprobs, _ = token_logprobs(policy, batch, 1.0)
    total = -((batch["advantages"][:, None] - values.detach()) * logprobs * mask).sum() / 6
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.model.parameters()))])
    assert torch.allclose(keep.gradient, expected, atol=1e-4 * expected.abs().max())
    t = int(batch["starts"][4, 0]) + 1
    other = batch | {"tokens": batch["tokens"].clone()}
    other["tokens"][4, t] += 1
    changed = (baseline.token_values(other) - values)[4].abs() > 1e-6
    assert not changed[: t + 1].any() and changed[t + 1 : int(batch["lengths"][4])].any()
    policy.model.zero_grad()


# --- whole runs ----------------------------------------------------------------------------------
def short(tmp_path, **flags) -> Args:
    flags = {"num_prompts": 4, "num_iterations": 2, "warm_start_steps": 5, "eval_episodes": 8, "eval_every": 2,
             "critic_steps": 3, "critic_batch_turns": 8, "actor_steps": 2, "actor_batch_turns": 8, "max_turns": 5,
             "print_samples": 0, "env_id": "words:tests/Words-v0", "actor_warm_up": 0, "max_turn_tokens": 4} | flags
    return Args(run_dir=str(tmp_path), **flags)


def finished(args: Args):
    """The run's folder, its metrics and its trained weights."""
    main(args)
    [folder] = Path(args.run_dir).iterdir()
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return folder, rows, load_file(folder / "checkpoint" / "model.safetensors")


def test_the_policy_rests_until_the_warm_up_is_over(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(archer, "polyak_update", lambda *args: calls.append(polyak_update(*args)))
    args = short(tmp_path, actor_warm_up=2)
    start = {name: x.clone() for name, x in load_policy(args).model.state_dict().items()}
    _, rows, weights = finished(args)
    assert all(torch.equal(x, start[name]) for name, x in weights.items())
    assert len(calls) == 2 * 3 and [row["optimizer_steps"] for row in rows[1:]] == ["0", "0"]
    _, rows, weights = finished(short(tmp_path / "moved", actor_warm_up=1))
    assert [row["optimizer_steps"] for row in rows[1:]] == ["0", "2"]
    assert any(not torch.equal(x, start[name]) for name, x in weights.items())


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_target_of_a_run_is_a_network_of_its_own_that_follows(tmp_path, rate):
    """With a rate of 1 it has caught up after every step, with less it has not."""
    folder, _, _ = finished(short(tmp_path, target_rate=rate))
    state = torch.load(folder / "checkpoint/trainer_state.pt", weights_only=True)
    same = [torch.equal(x, state["target"][name]) for name, x in state["critic"].items()]
    assert all(same) if rate == 1 else not any(same)


def test_the_default_warm_up_is_long_enough_for_the_start_to_be_known(tmp_path):
    args = short(tmp_path, actor_warm_up=None, num_iterations=3, max_turns=3, target_rate=0.9, critic_steps=4)
    _, rows, _ = finished(args)  # 2 * 3 turns / (0.9 * 4 steps) = 1.67 iterations
    assert [row["optimizer_steps"] for row in rows[1:]] == ["0", "0", "2"]


def test_fresh_answers_are_made_again_for_every_step(tmp_path, monkeypatch):
    """By the policy as it is then, to other states and with other numbers."""
    seen, numbers, states = [], [], []

    def watched(policy, turns, uniforms, args):
        seen.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]).sum().item())
        numbers.append(uniforms[0].sum().item()), states.append([row["tokens"][: row["starts"][k]] for row, k in turns])
        return fresh_answers(policy, turns, uniforms, args)

    monkeypatch.setattr(archer, "fresh_answers", watched)
    finished(short(tmp_path, actor_steps=3, num_iterations=1, learning_rate=1e-2))
    assert len(seen) == 3 + 3 and len(set(seen[:4])) == 1 and len(set(seen[3:])) == 3
    assert len(set(numbers)) == 6 and all(a != b for a, b in itertools.combinations(states, 2))


def test_a_saved_buffer_is_trained_on_without_playing(tmp_path, capsys):
    folder, rows, _ = finished(short(tmp_path / "online", actor_warm_up=2))
    turns = rows[-1]["buffer_turns"]
    for number, flags in enumerate(({"value_target": "expectile", "actor_loss": "advantage_weighted"},
                                    {"actor_loss": "filtered_clone"}, {})):
        args = short(tmp_path / str(number), offline=str(folder), **flags)
        start = load_policy(args).model.state_dict()
        _, rows, weights = finished(args)
        assert rows[-1]["environment_steps"] == "0" and "train_success" not in rows[-1]
        assert {row["buffer_turns"] for row in rows[1:]} == {turns}
        assert any(not torch.equal(x, start[name]) for name, x in weights.items())
        assert (rows[-1]["critic_steps"] == "0") == (flags.get("actor_loss") == "filtered_clone")
    with pytest.raises(SystemExit):
        main(short(tmp_path / "other", offline=str(folder), env_id="turnrl/GuessMyCity-v0"))
    assert f"--offline {folder} has other tokens" in capsys.readouterr().err


def test_cloning_draws_from_the_best_episodes_only(tmp_path):
    words = {"actor_loss": "filtered_clone", "num_prompts": 16}
    _, rows, _ = finished(short(tmp_path, keep_quantile=0.5, **words))  # whatever is said, returns differ
    assert 0 < float(rows[-1]["trained_share"]) < 1
    _, rows, _ = finished(short(tmp_path / "all", keep_quantile=0.0, **words))
    assert float(rows[-1]["trained_share"]) == 1


@pytest.mark.parametrize("flags,named", [
    ({"discount": 1.5}, "--discount"), ({"offline": "nowhere"}, "--offline nowhere"),
    ({"offline": ""}, "--offline : no checkpoint"),
    ({"token_baseline": True, "actor_loss": "filtered_clone"}, "--token-baseline")])
def test_settings_without_a_meaning_are_one_line(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(short(tmp_path, **flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error
