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

from algos import archer
from algos.archer import (
    Args, TurnCritic, actor_objective, answer_advantages, answer_rows, critic_batches, critic_quality, critic_update,
    fresh_answers, main, q_targets, same_state_advantages, squared_errors, transitions, turn_values, update,
)
from benchmarks.oracle import Oracle
from conftest import KeepGradient
from envs.episodes import Episode, Turn
from envs.maze import Maze
from envs.twenty_questions import TwentyQuestions
from policies import Policy, load_policy, make_tiny
from rollouts import collect_groups, make_envs, sample_tokens
from utils import micro_batches, rank_correlation

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
    """A critic of games in which an observation (0) and an answer are one token each: a state is a number of turns."""

    device = CPU

    def __init__(self, states: int, answers: int, heads: int):
        super().__init__()
        self.q = torch.nn.Parameter(torch.zeros(states + 1, answers, heads))  # a row more for the state after the last turn,
        self.v = torch.nn.Parameter(torch.zeros(states + 1, heads))  # which counts nothing

    def forward(self, batch):
        state = (batch["starts"] - 1) // 2
        answer = batch["tokens"].gather(1, batch["starts"].clamp(max=batch["tokens"].shape[1] - 1)[:, None])[:, 0]
        return self.q[state, answer], self.v[state]


def game(answers, rewards) -> list[dict]:
    """The turns of one that ended by its own rule."""
    states = [[x for a in answers[:k] for x in (0, a)] + [0] for k in range(len(answers) + 1)]
    returns = [sum(0.95**n * r for n, r in enumerate(rewards[k:])) for k in range(len(answers))]
    return [{"state": states[k], "answer": [a], "next_state": states[k + 1], "reward": rewards[k],
             "done": k == len(answers) - 1, "return_to_go": returns[k], "turn": k} for k, a in enumerate(answers)]


def chain(turns: int, rate: float):
    """A chain of turns that cost 1 each; every step sets Q and V to their targets, then the target moves."""
    critic, target = Table(turns, 1, 1), Table(turns, 1, 1)
    drawn = game([0] * turns, [-1.0] * turns)
    args = Args(num_critics=1, critic_batch_turns=turns, target_rate=rate, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(critic.parameters(), turns / 2)  # loss: (q - y)^2 / turns
    while True:
        critic_update(critic, target, optimizer, critic_batches(drawn, [[0]] * turns, CPU), args)
        yield critic.q[:turns, 0, 0].tolist(), critic.v[:turns, 0].tolist()


def test_both_targets_come_from_the_slow_copy():
    """With V of the critic itself Q is -1.095 after 3 steps, with its Q V is -1."""
    steps = list(itertools.islice(chain(3, 0.1), 5))
    for n, q, v in ((3, [-1.0095, -1.0095, -1], [-0.19] * 3),
                    (5, [-1.049775, -1.049685, -1], [-0.347415, -0.347415, -0.3439])):
        assert steps[n - 1] == (pytest.approx(q, abs=1e-5), pytest.approx(v, abs=1e-5))


@pytest.mark.parametrize("rate,expected", [(1.0, 38), (0.2, 190)])
def test_how_many_steps_it_takes_to_know_the_start_of_20_turns(rate, expected):
    """The page says 1.9 K / tau."""
    true = -sum(0.95**k for k in range(20))
    steps = next(n for n, (_, v) in enumerate(chain(20, rate), 1) if abs(v[0] - true) < 0.05 * abs(true))
    assert steps == expected == pytest.approx(1.9 * 20 / rate)


@pytest.mark.parametrize("asked", [1, 5])
def test_v_is_that_of_the_current_policy_whoever_played(asked):
    """A hidden bit: ask (0) or guess it (1, 2). Every turn but the right guess costs 1; two turns, and after the
    first the bit is known (1 is right). The buffer asks first as often as told, the policy is uniform."""
    second = [[0, -1.0], [1, 0.0], [2, -1.0]]
    games = [game([0, a], [-1.0, r]) for a, r in second] * asked
    for guess in (1, 2):  # right or wrong equally often
        games += [game([guess], [0.0])] * 3 + [game([guess, a], [-1.0, r]) for a, r in second]
    drawn = [turn for turns in games for turn in turns for _ in range(3)]
    answers = [[0], [1], [2]] * (len(drawn) // 3)  # each state three times: the exact expectation
    critic, target = Table(2, 3, 2), Table(2, 3, 2)
    torch.nn.init.normal_(critic.q, generator=torch.Generator().manual_seed(0))
    args = Args(critic_batch_turns=len(drawn), target_rate=0.5, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(critic.parameters(), 0.8)
    for _ in range(70):
        critic_update(critic, target, optimizer, critic_batches(drawn, answers, CPU), args)
    for head in range(2):
        assert critic.v[:2, head].tolist() == pytest.approx([-1.0888889, -0.6666667], abs=1e-4)
        assert critic.q[0, :, head].tolist() == pytest.approx([-1.6333333, -0.8166667, -0.8166667], abs=1e-4)
    advantages = answer_advantages(critic.q[:2].reshape(6, 2), critic.v[:2].repeat_interleave(3, 0))
    assert advantages.tolist() == pytest.approx([-0.5444444, 0.2722222, 0.2722222, -1 / 3, 2 / 3, -1 / 3], abs=1e-4)
    logits = torch.zeros(1, 3, requires_grad=True)
    actor_objective(logits.log_softmax(1).T, advantages[:3], torch.zeros(3, 1).long(), 3).backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.1814815, 0.0907407, 0.0907407], abs=1e-4)


# --- what the critic knows of new episodes ---------------------------------------------------------
def test_returns_are_compared_with_those_of_the_same_state_by_hand():
    """State 0: -3, -5 and -10, mean -6. State 1 was seen once. State 2: -2 twice."""
    returns, state_id = double([-3, -1, -5, -2, -10, -2]), torch.tensor([0, 1, 0, 2, 0, 2])
    better = same_state_advantages(returns, state_id)
    assert better.isnan().tolist() == [False, True] + [False] * 4
    assert better[~better.isnan()].tolist() == pytest.approx([3, 1, 0, -4, 0])


@pytest.mark.parametrize("x,y,expected", [
    ([1, 2, 3, 4], [-8, -4, 0, 100], 1.0), ([1, 2, 3, 4], [9, 3, 2, 1], -1.0),  # only the order counts
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # without ties: 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 24 / 120
    ([0, 0, 1, 1], [1, 2, 3, 4], 4 / math.sqrt(4 * 5)),  # ranks 1.5, 1.5, 3.5, 3.5 and 1, 2, 3, 4
    ([7, 7, 7], [1, 2, 3], math.nan), ([], [], math.nan)])
def test_the_rank_correlation_by_hand(x, y, expected):
    assert rank_correlation(double(x), double(y)) == pytest.approx(expected, nan_ok=True)
    assert rank_correlation(double(y), double(x)) == pytest.approx(expected, nan_ok=True)


def test_the_rank_correlation_against_counting():
    """A rank is how many numbers are smaller, and half of the equal ones."""
    stream = rng(0)
    for _ in range(20):
        pair = stream.integers(6, size=(2, 15)).astype(float)  # many ties
        ranks = [[sum(b < a for b in row) + sum(b == a for b in row) / 2 for a in row] for row in pair]
        assert rank_correlation(*map(double, pair)) == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_the_quality_of_the_critic_by_hand(monkeypatch):
    """Two games of at most 4 turns. Their first halves have the turns 0 and 1:
      state          [0]   [0 5 0]   [0]   [0 5 0]
      return to go   -2    -1        -4    -5          mean -3, squares 1 4 1 4
      V              -3    -1        -3    -4          of the smaller head
      return - V      1     0        -1    -1          mean -1/4, variance 3/4 - 1/16 = 11/16, of the returns 10/4
      Q              -2    -1        -5    -7
      A               1     0        -2    -3          ranks 4 3 2 1
      return - state  1     2        -1    -2          ranks 3 4 2 1: 1 - 6 (1 + 1) / (4 * 15) = 0.8
    """
    turns = [{"state": state, "answer": [5], "next_state": [0, 0], "reward": -1.0, "done": False, "return_to_go": to_go, "turn": k}
             for state, to_go, k in (([0], -2.0, 0), ([0, 5, 0], -1.0, 1), ([0], -100.0, 2), ([0], -4.0, 0), ([0, 5, 0], -5.0, 1),
                                     ([0, 5, 0], 100.0, 3))]
    q, v = (torch.tensor([[x, x + more] for x, more in zip(row, (9, 1, 5, 3), strict=True)])
            for row in ([-2.0, -1, -5, -7], [-3.0, -1, -3, -4]))

    def values(critic, batch, args):
        assert batch["return_to_go"].tolist() == [-2, -1, -4, -5] and batch["turn_id"].tolist()[1] == [-1, -1, -1, 0]
        return q, v.flip(1)  # of V the other head is smaller

    monkeypatch.setattr(archer, "turn_values", values)
    quality = critic_quality(Table(1, 1, 1), turns, Args(max_turns=4))
    assert quality == {"explained_variance": pytest.approx(1 - 11 / 40), "rank_correlation": pytest.approx(0.8)}
    monkeypatch.setattr(archer, "turn_values", lambda *_: (q[:1], v[:1]))
    quality = critic_quality(Table(1, 1, 1), turns[:1], Args(max_turns=4))  # nothing to explain or to compare
    assert quality == {"explained_variance": 0.0, "rank_correlation": pytest.approx(math.nan, nan_ok=True)}


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
def turns(policy) -> list[dict]:
    """dog 0, dog 1, ring 0, pen 0, pen 1, pen 2"""
    return [turn for episode in played(policy) for turn in transitions(policy, episode, Args())]


FIRST, YES, NO, WHAT = (f"<|user|>{x}<|assistant|>" for x in ("Questions:", "Yes.", "No.", "Invalid question."))
SOFT, DOG, BIG, END = "Is the object soft?<|end|>", "Is the object a dog?<|end|>", "Is the object big?<|end|>", "<|end|>"


def test_a_turn_holds_all_that_the_policy_saw_before_and_after_it(policy, turns):
    """With the whole history, in which an answer that the cap has cut is closed."""
    expected = [(FIRST, SOFT, YES), (FIRST + SOFT + YES, DOG, ""), (FIRST, "Is the object a", END + WHAT),
                (FIRST, BIG, NO), (FIRST + BIG + NO, DOG, NO), (FIRST + BIG + NO + DOG + NO, f"What?{END}", WHAT)]
    for turn, (state, answer, reply) in zip(turns, expected, strict=True):
        ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (state, answer, state + answer + reply)]
        assert [turn["state"], turn["answer"], turn["next_state"]] == ids
    assert [turn["reward"] for turn in turns] == [-1, 0, -1, -1, -1, -1]
    assert [turn["turn"] for turn in turns] == [0, 1, 0, 0, 1, 2]
    assert [turn["done"] for turn in turns] == [False, True] + [False] * 4, "the dog is found, the others were cut"
    assert [turn["return_to_go"] for turn in turns] == pytest.approx([-1, 0, -1, -2.8525, -1.95, -1])


@pytest.mark.parametrize("bootstrap,overflowed", [(False, False), (True, True)])
def test_a_time_limit_ends_the_return_if_told_and_a_full_context_does(policy, bootstrap, overflowed):
    episode = played(policy)[2]
    episode.overflowed = overflowed
    turns = transitions(policy, episode, Args(bootstrap_truncated=bootstrap))
    assert [turn["done"] for turn in turns] == [False, False, True]
    assert turns[2]["next_state"] == episode.row() and turns[1]["next_state"] == turns[2]["state"]


def test_without_a_history_a_state_is_the_last_observation(policy, monkeypatch):
    monkeypatch.setattr(policy, "history_turns", 0)
    turns = transitions(policy, played(policy)[2], Args())
    states = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (FIRST, NO, NO, WHAT)]
    assert [turn["state"] for turn in turns] == states[:3] and [turn["next_state"] for turn in turns] == states[1:]


def test_the_batches_of_the_critic_by_hand():
    turns = [*game([5, 6], [-1.0, 2.0]), {**game([7], [-3.0])[0], "answer": [7, 8]}]
    batches = critic_batches(turns, [[9], [4, 4], []], CPU)
    tokens = {"played": [[0, 5, 0, 0], [0, 5, 0, 6], [0, 7, 8, 0]], "current": [[0, 9, 0, 0, 0], [0, 5, 0, 4, 4], [0, 0, 0, 0, 0]],
              "following": [[0, 5, 0, 0, 0], [0, 5, 0, 6, 0], [0, 7, 0, 0, 0]]}
    turn_id = {"played": [[-1, 0, -1, -1], [-1, -1, -1, 0], [-1, 0, 0, -1]], "following": [[-1] * 5] * 3,
               "current": [[-1, 0, -1, -1, -1], [-1, -1, -1, 0, 0], [-1] * 5]}
    starts = {"played": [1, 3, 1], "current": [1, 3, 1], "following": [3, 5, 3]}
    lengths = {"played": [2, 4, 3], "current": [2, 5, 1], "following": [3, 5, 3]}
    for name, batch in batches.items():
        for column, expected in (("tokens", tokens), ("turn_id", turn_id), ("starts", starts), ("lengths", lengths)):
            assert batch[column].tolist() == expected[name], (name, column)
    assert batches["played"]["reward"].tolist() == [-1, 2, -3] and batches["played"]["done"].tolist() == [False, True, True]
    assert batches["played"]["return_to_go"].tolist() == pytest.approx([0.9, 2, -3])


# --- the critic ----------------------------------------------------------------------------------
@pytest.fixture
def critic(policy) -> TurnCritic:
    torch.manual_seed(0)
    return TurnCritic(policy, num_critics=2)


def rows_of(turns: list[dict]) -> dict[str, torch.Tensor]:
    return critic_batches(turns, [turn["answer"] for turn in turns], CPU)["played"]


def test_v_reads_the_end_of_a_state_and_q_also_the_mean_of_the_answer(turns, critic):
    q, v = critic(rows_of(turns))
    for i, turn in enumerate(turns):
        start, end = len(turn["state"]), len(turn["state"] + turn["answer"])
        hidden = critic.trunk(torch.tensor([turn["state"] + turn["answer"]]), use_cache=False).last_hidden_state[0]
        both = torch.cat([hidden[start - 1], sum(hidden[start:]) / (end - start)])
        for j in range(2):
            assert torch.allclose(v[i, j], critic.v_heads[j](hidden[start - 1]), atol=1e-5)
            assert torch.allclose(q[i, j], critic.q_heads[j](both), atol=1e-5)
    assert v.std(0).min() > 1e-3 and (v[:, 0] - v[:, 1]).abs().min() > 1e-4, "states and heads differ"


def test_v_is_blind_to_the_answer_and_q_is_not(turns, critic):
    changed = [{**turn, "answer": [turn["answer"][0] + 1, *turn["answer"][1:]]} for turn in turns]
    (q, v), (other_q, other_v) = critic(rows_of(turns)), critic(rows_of(changed))
    assert torch.allclose(other_v, v, atol=1e-6) and (other_q - q).abs().min() > 1e-4


@pytest.mark.parametrize("tokens", [1, 60])
def test_the_critic_does_not_see_padding_or_other_rows(turns, critic, tokens):
    """A state without an answer is a row, too."""
    batch = critic_batches(turns, [turn["answer"] for turn in turns[:4]] + [[]] * 2, CPU)["current"]
    values = turn_values(critic, batch, Args(micro_batch_tokens=tokens))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, critic(batch), strict=True))
    assert values[0].shape == (6, 2) and values[0].std(0).min() > 1e-3


def test_the_critic_has_its_own_parameters_and_trains_them_all(policy, critic, turns):
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.model.parameters()}
    assert len(critic.trunk.layers) == 2 and len(policy.model.model.layers) == 4
    q, v = critic(rows_of(turns))
    (q.sum() + v.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())
    assert all(p.grad is None for p in policy.model.parameters())


# --- fresh answers -------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [WHOLE, 30])
def test_fresh_answers_are_sampled_token_by_token_from_the_state(policy, turns, tokens, monkeypatch):
    """Against a full pass per token; some answers end, others are cut by the cap. The buffer stays as it was."""
    before, ended = copy.deepcopy(turns), set()
    states = [turns[i]["state"] for i in (5, 0, 4, 2, 5)]
    args = Args(max_turn_tokens=9, micro_batch_tokens=tokens, temperature=0.8)
    third = fresh_answers(policy, states, rng(0), args)[1].token_ids[2]
    monkeypatch.setattr(policy, "end_ids", {third})  # an answer of three tokens
    answers = fresh_answers(policy, states, rng(0), args)
    uniforms = torch.tensor(rng(0).random((5, 9)))
    for state, turn, row in zip(states, answers, uniforms, strict=True):
        answer = []
        for u in row:
            logits = policy.forward(torch.tensor([state + answer]))[0, -1:]
            answer.append(sample_tokens(logits, 0.8, u[None])[0].item())
            if answer[-1] in policy.end_ids:
                break
        ended.add(answer[-1] in policy.end_ids)
        assert turn.prompt_ids == state and turn.token_ids == answer
    assert ended == {True, False} and turns == before


@pytest.mark.parametrize("count", [6, 5, 1])
def test_two_processes_answer_what_one_would(policy, turns, count, monkeypatch):
    """Each a part of the states; one after the other they are all, in the same order."""
    def answers():
        states = [turn["state"] for turn in turns[:count]]
        return [turn.prompt_ids + turn.token_ids for turn in fresh_answers(policy, states, rng(0), Args(max_turn_tokens=5))]

    alone, parts = answers(), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(answers())
    assert parts[0] + parts[1] == alone and len(alone) == count and len(parts[0]) == count // 2


# --- updates -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [WHOLE, 60, 30])
@pytest.mark.parametrize("value_target", ["fresh", "monte_carlo"])
def test_the_critic_step_against_loops_over_turns(policy, turns, critic, value_target, tokens):
    """Q and V learn at every turn, from targets of the slow copy: V from an answer of the current policy."""
    args = Args(critic_batch_turns=6, target_rate=0.1, value_target=value_target, micro_batch_tokens=tokens)
    target = TurnCritic(policy, 2)
    answers = [turn.token_ids for turn in fresh_answers(policy, [turn["state"] for turn in turns], rng(1), args)]
    answers[0] = turns[0]["answer"]  # as of a turn that was just played
    before, slow = copy.deepcopy(critic), copy.deepcopy(target)
    metrics = critic_update(critic, target, torch.optim.SGD(critic.parameters(), 0.1), critic_batches(turns, answers, CPU), args)

    def values(network, state, answer):
        [q], [v] = network(answer_rows([Turn("", "", state, True, answer, [0.0] * len(answer))], CPU))
        return q, v

    loss, mean_q, mean_v = torch.zeros(()), 0.0, 0.0
    ends, later = [1, 2, 5], [2, 1, 1, 3, 2, 1]  # the last turns; how many rewards a return has
    for i, (turn, fresh) in enumerate(zip(turns, answers, strict=True)):
        q, v = values(before, turn["state"], turn["answer"])
        with torch.no_grad():
            if value_target == "fresh":
                y = turn["reward"] + (0 if i == 1 else 0.95 * values(slow, turn["next_state"], [])[1])
                u = values(slow, turn["state"], fresh)[0]
            else:
                y = u = sum(0.95**n * turns[i + n]["reward"] for n in range(later[i]))
        assert turn["done"] == (i == 1) and (later[i] == 1) == (i in ends)
        loss = loss + ((q - y) ** 2).sum() / 6 + ((v - u) ** 2).sum() / 6
        mean_q, mean_v = mean_q + q.mean().item() / 6, mean_v + v.mean().item() / 6
    gradient = torch.autograd.grad(loss, list(before.parameters()))
    norm = torch.stack([g.norm() for g in gradient]).norm().item()
    assert metrics == {"critic_loss": pytest.approx(loss.item(), rel=1e-4), "q": pytest.approx(mean_q, rel=1e-4),
                       "v": pytest.approx(mean_v, rel=1e-4), "critic_grad_norm": pytest.approx(norm, rel=1e-3)}
    networks = zip(*(net.parameters() for net in (before, critic, slow, target)), strict=True)
    for (old, new, was, now), g in zip(networks, gradient, strict=True):
        assert torch.allclose(new, old - 0.1 * g / max(norm, 1), atol=1e-5)
        assert torch.allclose(now, 0.9 * was + 0.1 * new, atol=1e-6)


@pytest.mark.parametrize("tokens,parts", [(WHOLE, 1), (100, 2), (40, 4)])
def test_the_policy_step_against_a_pass_per_answer(policy, turns, tokens, parts):
    """The mean over answers of centred advantage times summed log-probs, at the sampling temperature; and what is logged."""
    args = Args(actor_batch_turns=6, micro_batch_tokens=tokens, max_grad_norm=1e9, temperature=0.7, max_turn_tokens=9)
    batch = answer_rows(fresh_answers(policy, [turn["state"] for turn in turns], rng(1), args), CPU)
    assert len(list(micro_batches(batch, tokens))) == parts
    batch["advantages"] = torch.tensor([0.5, -1.0, 0.2, 0.0, -0.3, 1.0])
    credit = batch["advantages"] - 0.4 / 6
    keep = KeepGradient(policy)
    metrics = update(policy, keep, dict(batch), args)
    total, entropies = torch.zeros(()), []
    for i in range(6):
        start, end = int(batch["starts"][i]), int(batch["lengths"][i])
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
             "critic_steps": 3, "critic_batch_turns": 8, "fresh_turns": 6, "actor_steps": 2, "actor_batch_turns": 8,
             "max_turns": 5, "print_samples": 0, "env_id": "words:tests/Words-v0", "actor_warm_up": 0, "max_turn_tokens": 4,
             "history_turns": None} | flags
    return Args(run_dir=str(tmp_path), **flags)


def finished(args: Args):
    """The run's rows of metrics, its trained weights and its trainer state."""
    main(args)
    [folder] = Path(args.run_dir).iterdir()
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
    return rows, load_file(folder / "checkpoint/model.safetensors"), torch.load(folder / "checkpoint/trainer_state.pt")


@pytest.mark.parametrize("flags,steps", [
    ({"actor_warm_up": 2}, [0, 0]), ({"actor_warm_up": 1, "value_target": "monte_carlo"}, [0, 2])])
def test_the_policy_rests_until_the_warm_up_is_over(tmp_path, flags, steps):
    """Returns as targets need no fresh answers."""
    args = short(tmp_path, **flags)
    start = {name: x.clone() for name, x in load_policy(args).model.state_dict().items()}
    rows, weights, _ = finished(args)
    assert [row["optimizer_steps"] for row in rows[1:]] == steps
    assert all(torch.equal(x, start[name]) for name, x in weights.items()) == (not any(steps))
    assert [row["fresh_tokens"] > 0 for row in rows[1:]] == [args.value_target == "fresh" or n > 0 for n in steps]


def test_the_target_of_a_run_is_a_network_of_its_own(tmp_path):
    state = finished(short(tmp_path))[2]
    assert not any(torch.equal(x, state["target"][name]) for name, x in state["critic"].items())


@pytest.fixture
def calls(monkeypatch) -> list:
    """What the functions of a run are given and give back: (name, arguments, result), and the policy's weights then."""
    made = []

    def watch(name):
        function = getattr(archer, name)

        def watched(*arguments):
            weight = sum(p.detach().double().sum().item() for p in arguments[0].model.parameters()) if name == "fresh_answers" else None
            result = function(*arguments)
            made.append((name, arguments, copy.deepcopy(result), weight))
            return result
        monkeypatch.setattr(archer, name, watched)

    for name in ("transitions", "critic_quality", "fresh_answers", "critic_batches", "critic_update", "update"):
        watch(name)
    return made


@pytest.mark.parametrize("history_turns", [None, 0])
def test_an_iteration_by_hand(tmp_path, calls, history_turns):
    """The critic's turns are those just played, whose answers are the policy's own, and some of the buffer, whose states
    the policy answers again: once, before it moves. Then it answers other states before each of its steps."""
    rows, _, state = finished(short(tmp_path, learning_rate=1e-2, eval_every=1, history_turns=history_turns))
    order = [*["transitions"] * 4, "critic_batches", "critic_quality", "fresh_answers", "critic_batches", *["critic_update"] * 3,
             *["fresh_answers", "update"] * 2]
    assert [name for name, *_ in calls] == order * 2, "the quality (with batches of its own) before the critic learns"
    buffer, moved = [], []
    for row, part in zip(rows[1:], (calls[:15], calls[15:]), strict=True):
        arguments, results = ([call[n] for call in part] for n in (1, 2))
        new = sum(results[:4], [])
        buffer += new
        assert arguments[5][1] == new and all(row.get(name, math.nan) == pytest.approx(x, nan_ok=True) for name, x in results[5].items())
        turns, answers, _ = arguments[7]
        old = turns[len(new):]
        assert turns[: len(new)] == new and len(old) == 6 and all(turn in buffer for turn in old)
        assert arguments[6][1] == [turn["state"] for turn in old]
        assert answers == [turn["answer"] for turn in new] + [turn.token_ids for turn in results[6]], "the fresh ones of now"
        both = [(turn["state"] + turn["answer"], turn["state"] + answer) for turn, answer in zip(turns, answers, strict=True)]
        for given in arguments[8:11]:
            played, current = (given[3][name] for name in ("played", "current"))
            assert len(played["tokens"]) == len(current["tokens"]) == 8
            for i in range(8):
                assert tuple(batch["tokens"][i, : batch["lengths"][i]].tolist() for batch in (played, current)) in both
        assert all(row[name] == pytest.approx(np.mean([result[name] for result in results[8:11]])) for name in results[8])
        first, second = arguments[11][1], arguments[13][1]
        assert first != second and all(len(states) == 8 for states in (first, second))
        assert all(states in [turn["state"] for turn in buffer] for states in first + second)
        if buffer != new:  # some were just played, some are older
            assert {turn in new for turn in old} == {True, False}
            assert {state in [turn["state"] for turn in new] for state in first + second} == {True, False}
        assert row["fresh_tokens"] == sum(len(turn.token_ids) for n in (6, 11, 13) for turn in results[n])
        assert row["critic_steps"] == 3 and row["buffer_turns"] == len(buffer)
        moved += [part[n][3] for n in (6, 11, 13)]
    assert [a != b for a, b in itertools.pairwise(moved)] == [False, True, True, False, True], "by the policy as it is then"
    assert state["buffer"] == buffer
    played = sum(len(turn["answer"]) for turn in buffer)
    assert rows[2]["generated_tokens"] == sum(row["fresh_tokens"] for row in rows[1:]) + played


@pytest.mark.parametrize("size", [9, 1])
def test_the_oldest_turns_make_room(tmp_path, size):
    """While the policy rests every run plays the same."""
    rows, _, state = finished(short(tmp_path / "all", actor_warm_up=9))
    everything = state["buffer"]
    assert rows[2]["buffer_turns"] == len(everything) == rows[2]["environment_steps"] > 9
    rows, _, state = finished(short(tmp_path / "some", actor_warm_up=9, replay_turns=size))
    assert state["buffer"] == everything[-size:] and rows[2]["buffer_turns"] == size


@pytest.mark.parametrize("flags,named", [
    ({"discount": 1.5}, "--discount"), ({"target_rate": 1.5}, "--target-rate"), ({"target_rate": 0.0}, "--target-rate")])
def test_settings_without_a_meaning_are_one_line(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(short(tmp_path, **flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error


# --- tests/benchmarks/oracle.py ------------------------------------------------------------------
def test_exact_values_are_the_mean_of_many_returns():
    """Of a policy that knows little, so that many answers are unreadable; 100 turns later a return is discounted to 0.6 %."""
    args = Args(max_turns=120, num_prompts=100, warm_start_steps=40, env_kwargs='{"max_turns": 120}')
    policy = load_policy(args, 0)
    oracle = Oracle(policy, Maze(), args)
    (q, v), returns = oracle.values(), {}
    for episode in collect_groups(policy, make_envs(args), args, 0):
        first = {tuple(turn["state"]): turn["return_to_go"]
                 for turn in reversed(transitions(policy, episode, args)[:20])}
        for state, value in first.items():
            returns.setdefault(state, []).append(value)
    off = [(np.mean(x) - v[oracle.states.index(state)]) / (np.std(x) / len(x) ** 0.5)
           for state, x in returns.items() if len(x) > 9]
    assert len(off) > 10 and np.sqrt(np.mean(np.square(off))) < 1.5
    assert (q.min(1) <= v).all() and (v <= q.max(1)).all(), "V is a mean of Q"
