"""Turn budgets against hand-worked numbers, slow loops, scripted minds and whole recomputations."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
import transformers

from algos.turn_budget import (
    Args, BudgetPolicy, TurnLimit, budget_metrics, forced_tokens, main, thought_allowance, thought_end, turn_limits,
    update,
)
from conftest import CHATML, KeepGradient, byte_tokenizer, random_model, streams
from envs.episodes import Episode, Turn, demonstrations, start_episodes
from envs.text_env import TextEnv
from envs.think_search import ThinkSearch
from policies import make_tiny
from utils import (
    RunArgs, collate, collect_groups, evaluate, micro_batches, refresh_logprobs, rollout, token_logprobs,
)
from words import Words

CPU = torch.device("cpu")
CAPS = ("none", "episode", "turn")
END = 1


# --- Eq. 1: allowances ---------------------------------------------------------------------------


@pytest.mark.parametrize("cap,thoughts,room,allowance", [
    ("none", 0, 50, None), ("none", 99, -3, None), ("turn", 99, 50, 8), ("turn", 0, 7, 7), ("turn", 0, 0, 0),
    ("turn", 0, -5, 0), ("episode", 0, 50, 32), ("episode", 27, 50, 5), ("episode", 27, 3, 3), ("episode", 32, 50, 0),
    ("episode", 35, 50, 0), ("episode", 0, -5, 0)])
def test_allowances_by_hand(cap, thoughts, room, allowance):
    assert thought_allowance(Args(cap=cap, thought_cap=8, max_turns=4), thoughts, room) == allowance


@pytest.mark.parametrize("cap,granted,closed", [
    ("turn", [10, 8, 10], 2), ("episode", [12, 8, 10], 1), ("none", [12, 8, 20], 0)])
def test_wanted_and_granted_thoughts_by_hand(cap, granted, closed):
    """A thought of n tokens ends itself with the n-th; token by token, as it is played."""
    got, forced = [], 0
    for wanted in (12, 8, 20):
        allowance = thought_allowance(Args(cap=cap, thought_cap=10, max_turns=3), sum(got), 1000)
        ids, put = drive([10] * (wanted - 1) + [99, 7, END], allowance, 3, [99])
        end = thought_end(ids, [99])
        got.append(sum(not p for p in put[:end]))
        forced += any(put[:end])
    assert (got, forced) == (granted, closed)


# --- Eq. 2: what is appended ---------------------------------------------------------------------


def drive(tokens, allowance, action_cap, mark):
    """Sample `tokens` one by one until the turn ends: the answer, and which of its tokens were appended."""
    ids = forced_tokens([], allowance, action_cap, mark, END)
    put, tokens = [1] * len(ids), list(tokens)
    while tokens and ids[-1:] != [END]:
        ids = [*ids, tokens.pop(0)]
        new = forced_tokens(ids, allowance, action_cap, mark, END)
        ids, put = ids + new, put + [0] + [1] * len(new)
    return ids, put


ONE, TWO = [99], [90, 99]


@pytest.mark.parametrize("tokens,allowance,mark,answer,put", [
    # still open after 5 tokens
    ([11, 12, 13, 14, 15, 7, END], 5, TWO, [11, 12, 13, 14, 15, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    ([11, 12, 13, 14, 15, 7, END], 5, ONE, [11, 12, 13, 14, 15, 99, 7, END], [0] * 5 + [1, 0, 0]),
    # ends itself: early, and with the last token allowed
    ([11, 12, 99, 7, END], 5, ONE, [11, 12, 99, 7, END], [0] * 5),
    ([11, 12, 90, 99, 7, END], 5, TWO, [11, 12, 90, 99, 7, END], [0] * 6),
    ([11, 12, 13, 14, 99, 7, END], 5, ONE, [11, 12, 13, 14, 99, 7, END], [0] * 7),
    ([11, 12, 13, 90, 99, 7, END], 5, TWO, [11, 12, 13, 90, 99, 7, END], [0] * 7),
    # no token may be thought
    ([7, END], 0, ONE, [99, 7, END], [1, 0, 0]), ([7, END], 0, TWO, [90, 99, 7, END], [1, 1, 0, 0]),
    # half a mark is no mark: at the cap, reversed, and one token too late
    ([11, 12, 13, 14, 90, 7, END], 5, TWO, [11, 12, 13, 14, 90, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    ([99, 90, 11, 90, 90, 7, END], 5, TWO, [99, 90, 11, 90, 90, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    # an end of turn inside a thought, early and as the last token allowed
    ([11, END], 5, ONE, [11, END], [0, 0]), ([11, 12, 13, 14, END], 5, TWO, [11, 12, 13, 14, END], [0] * 5),
    ([END], 1, ONE, [END], [0]),
    # an action that does not end: 3 tokens; the third may be the end itself
    ([99, 6, 7, 8, 9], 5, ONE, [99, 6, 7, 8, END], [0, 0, 0, 0, 1]),
    ([99, 6, 7, END], 5, ONE, [99, 6, 7, END], [0] * 4), ([99, END], 5, ONE, [99, END], [0, 0]),
    ([90, 99, 90, 99, 99, 5], 5, TWO, [90, 99, 90, 99, 99, END], [0] * 5 + [1]),
    ([11, 12, 6, 7, 8, 9], 2, TWO, [11, 12, 90, 99, 6, 7, 8, END], [0, 0, 1, 1, 0, 0, 0, 1]),
    ([6, 7, 8, 9], 0, TWO, [90, 99, 6, 7, 8, END], [1, 1, 0, 0, 0, 1]),
    # no allowance: only the action is limited
    ([11] * 30, None, ONE, [11] * 30, [0] * 30),
    ([11] * 30 + [99, 6, 7, 8, 9], None, ONE, [11] * 30 + [99, 6, 7, 8, END], [0] * 34 + [1])])
def test_appended_tokens_by_hand(tokens, allowance, mark, answer, put):
    assert drive(tokens, allowance, 3, mark) == (answer, put)


def test_the_end_of_a_thought_is_its_first_whole_mark_or_the_end_of_the_answer():
    assert [thought_end([5, 90, 99, 7, 90, 99], mark) for mark in (TWO, ONE, [7], [99, 90])] == [3, 3, 4, 6]
    assert thought_end([], ONE) == 0 and thought_end([90], TWO) == 1 and thought_end([90, 99], TWO) == 2


# --- Eq. 3: turn limits --------------------------------------------------------------------------


@pytest.mark.parametrize("counts,start,end,fixed,dynamic", [
    ([10, 20, 30, 40, 50, 60, 70, 80], 50, 75, 62, (45, 62)),  # percentiles 45 and 62.5
    ([80, 70, 60, 50, 40, 30, 20, 10], 25, 100, 80, (27, 80)), ([7], 50, 75, 7, (7, 7)),
    ([0, 0, 1], 50, 50, 1, (1, 1)), ([1, 1, 2, 2], 50, 75, 2, (1, 2)),
    ([10, 20, 30], 90, 50, 20, (20, 20))])  # never beyond the limit of the extension
def test_turn_limits_by_hand(counts, start, end, fixed, dynamic):
    flags = {"start_percentile": start, "end_percentile": end}
    assert turn_limits(counts, Args(turn_limit="fixed", **flags)) == (fixed, fixed)
    assert turn_limits(counts, Args(turn_limit="dynamic", **flags)) == dynamic


class Needs(TextEnv):
    """Solved by the turn number `seed`, whatever is done."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn, self.need = 0, seed
        return "go", {"success": False}

    def step(self, action):
        self.turn += 1
        done = self.turn == self.need
        return "done" if done else "on", float(done), done, self.turn == 100, {"success": done}


def through(need, limits, reminder=False):
    """(solved, turns, extended) of an episode, and all its observations."""
    env = TurnLimit(Needs(), 99, reminder)
    env.limits = limits
    episodes = start_episodes([env], [need])
    while not episodes[0].done:
        episodes[0].answer(env, Turn(episodes[0].observation, "word"))
    [e] = episodes
    assert e.terminated == e.success != e.truncated and e.total_reward == e.success
    return (e.success, len(e.turns), env.limit > limits[0]), [t.observation for t in e.turns] + [e.observation]


@pytest.mark.parametrize("need,fixed,dynamic", [
    (44, (True, 44, False), (True, 44, False)), (46, (True, 46, False), (True, 46, True)),
    (62, (True, 62, False), (True, 62, True)), (63, (False, 62, False), (False, 62, True))])
def test_limits_over_whole_episodes_by_hand(need, fixed, dynamic):
    assert through(need, (62, 62))[0] == fixed and through(need, (45, 62))[0] == dynamic


def test_what_is_solved_in_the_last_turn_allowed_is_solved():
    assert through(45, (45, 45))[0] == (True, 45, False) and through(62, (45, 62))[0][:2] == (True, 62)


def test_a_limit_beyond_that_of_the_environment_changes_nothing():
    assert through(200, (150, 150))[0] == (False, 100, False)


def test_reminders_by_hand():
    """The turns left; an extension shows when it is granted."""
    seen = through(9, (3, 5), reminder=True)[1]
    assert seen == ["go left 3", "on left 2", "on left 1", "on left 2", "on left 1", "on left 0"]
    assert through(2, (5, 5), reminder=True)[1] == ["go left 5", "on left 4", "done left 3"]
    assert through(2, (5, 5))[1] == ["go", "on", "done"]


def test_a_second_reset_starts_a_new_count():
    env = TurnLimit(Needs(), 9, True)
    env.limits = (2, 3)
    for _ in range(2):
        assert env.reset(seed=9)[0] == "go left 2"
        assert [env.step("word")[3] for _ in range(3)] == [False, False, True]


# --- the update and what it reports --------------------------------------------------------------


def hand_made_batch(policy):
    """Four rows of 7 to 10 tokens; some sampled, with old log-probs that differ from the new ones."""
    torch.manual_seed(5)
    lengths, width = torch.tensor([9, 7, 10, 8]), 10
    real = torch.arange(width) < lengths[:, None]
    batch = {"tokens": torch.randint(4, len(policy.tokenizer), (4, width)) * real, "lengths": lengths,
             "turn_id": torch.where(real & (torch.rand(4, width) < 0.6), 0, -1), "episode_id": torch.arange(4)}
    batch["turn_id"][:, 0] = -1
    logprobs, _ = token_logprobs(policy, batch, 0.8)
    moved = logprobs.detach() + torch.randn(4, width) * 0.4
    sampled = batch["turn_id"] >= 0
    junk = torch.full((4, width), 3.0)  # not sampled: must not count
    return batch | {"old_logprobs": torch.where(sampled, moved, -junk),
                    "advantages": torch.where(sampled, torch.randn(4, width), junk)}


@pytest.mark.parametrize("max_tokens,parts", [(40, 1), (20, 2), (10, 4)])
def test_the_update_reports_means_over_the_sampled_tokens(tiny_policy, max_tokens, parts):
    """Token by token from the logits, in double precision; however many micro-batches there are."""
    batch, rows = hand_made_batch(tiny_policy), []
    for b, tokens in enumerate(batch["tokens"]):
        with torch.no_grad():
            logits = tiny_policy.forward(tokens[None])[0].double() / 0.8
        for t in range(1, len(tokens)):
            if batch["turn_id"][b, t] < 0:
                continue
            p = (logits[t - 1] - logits[t - 1].max()).exp()
            p = p / p.sum()
            old, advantage = batch["old_logprobs"][b, t].item(), batch["advantages"][b, t].item()
            ratio = p[tokens[t]].item() / math.exp(old)
            entropy = -sum(x * math.log(x) for x in p.tolist())
            near = min(max(ratio, 0.9), 1.3)
            surrogate = min(ratio * advantage, near * advantage)
            stopped = (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.9)
            rows.append((-surrogate - 0.5 * entropy, entropy, stopped, ratio - 1 - math.log(ratio)))
    loss, entropy, clipped, kl = np.mean(rows, axis=0)
    args = Args(temperature=0.8, clip_low=0.1, clip_high=0.3, entropy_coefficient=0.5, micro_batch_tokens=max_tokens)
    assert len(list(micro_batches(batch, max_tokens))) == parts and 0 < clipped < 1 and kl > 0.01
    metrics = update(tiny_policy, keeper := KeepGradient(tiny_policy), batch, args)
    assert metrics == pytest.approx({"loss": loss, "entropy": entropy, "clip_fraction": clipped, "approx_kl": kl,
                                     "grad_norm": metrics["grad_norm"]}, abs=1e-5)
    assert min(1, metrics["grad_norm"]) == pytest.approx(keeper.gradient.norm().item(), rel=1e-4)


# --- games of policies that think ----------------------------------------------------------------


def lean(policy, strength):
    """Marks and ends of turn become likely, in decoding and in the update alike."""
    table = torch.zeros(len(policy.tokenizer), policy.model.config.vocab_size)
    table[:, [policy.mark[0], policy.end_id]] = strength
    for a, b in zip(policy.mark, policy.mark[1:], strict=False):
        table[a, b] = 2 * strength + 2
    forward = policy.forward

    def leaning(tokens, **kwargs):
        keep = kwargs["logits_to_keep"]
        last = tokens[:, -1:] if isinstance(keep, int) else tokens[:, keep]
        return forward(tokens, **kwargs) + table[last]
    policy.forward = leaning
    return policy


@pytest.fixture(scope="module")
def searcher():
    """A tokenizer that knows the words of ThinkSearch (one token each), and an untrained model."""
    played = demonstrations(ThinkSearch("turns", max_turns=12), list(range(60)), 12, np.random.default_rng(0))
    texts = [text for e in played for turn in e.turns for text in (turn.observation, turn.action)]
    return make_tiny(RunArgs(), texts)


def budget_policy(parts, instructions="", **flags):
    flags = {"max_turns": 6, "max_turn_tokens": 3, "thought_cap": 5, "context_limit": 100} | flags
    policy, args = BudgetPolicy(*parts, "cpu", instructions), Args(**flags)
    policy.max_turn_tokens = args.max_turn_tokens
    policy.set_budget(args, " so")
    return policy


def play(policy, envs, seeds, rngs=None):
    return rollout(policy, envs, start_episodes(envs, seeds), rngs or streams(len(envs)), policy.args.max_turns, 1.0)


class Game:
    """Episodes of one setting, played once and read by many tests."""

    def __init__(self, policy, envs):
        self.policy, self.envs, self.args = policy, envs, policy.args
        self.episodes = play(policy, envs, list(range(len(envs))))
        self.reserve = len(policy.mark) + self.args.max_turn_tokens  # what must follow a thought
        self.turns = [(e, k, turn) for e in self.episodes for k, turn in enumerate(e.turns)]

    def context(self, episode, k):
        """The tokens before the answer of turn k."""
        turn = episode.turns[k]
        return ([] if turn.starts_row else Episode(0, "", episode.turns[:k]).row()) + turn.prompt_ids

    def allowance(self, episode, k, used):
        """Eq. 1, written out for each cap."""
        room = max(0, self.args.context_limit - used - self.reserve)
        if self.args.cap == "turn":
            return min(room, self.args.thought_cap)
        spent = sum(len(self.split(turn)[0]) for turn in episode.turns[:k])
        pot = max(0, self.args.max_turns * self.args.thought_cap - spent)
        return None if self.args.cap == "none" else min(room, pot)

    def split(self, turn):
        """The sampled tokens of the thought (with a mark that it chose), and what follows it."""
        mark, ids = self.policy.mark, turn.token_ids
        ends = [n for n in range(len(ids) + 1) if ids[:n][-len(mark):] == mark]
        end = ends[0] if ends else len(ids)
        return [token for n, token in enumerate(ids[:end]) if n not in turn.forced], ids[end:]


def slow_turn(sampled, allowance, room, args, mark, end):
    """The same turn in phases: thought, mark, action; (tokens, positions appended).

    A turn that has used up its room is over without an end: the next prompt brings one.
    """
    thought, action, rest, put = [], [], list(sampled), set()
    while rest and thought[-len(mark):] != mark and thought[-1:] != [end] and len(thought) != allowance:
        thought.append(rest.pop(0))
    if thought[-len(mark):] != mark:
        if thought[-1:] == [end] or len(thought) != allowance:
            assert not rest
            return thought, put
        put = {len(thought) + n for n in range(len(mark))}
        thought = thought + mark
    while rest and action[-1:] != [end] and len(action) < args.max_turn_tokens:
        action.append(rest.pop(0))
    assert not rest and action
    if len(action) == args.max_turn_tokens and action[-1] != end and len(thought + action) < room:
        action.append(end)
        put.add(len(thought) + len(action) - 1)
    return thought + action, put


KINDS = [("words", cap, drop) for cap in CAPS for drop in (False, True)] + [("bytes", "turn", False),
                                                                            ("bytes", "turn", True)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{p[1]}-{'dropped' if p[2] else 'kept'}")
def game(request, searcher):
    """Words: one token a mark. Bytes: three tokens a mark, a chat template, pages to be found."""
    kind, cap, drop = request.param
    if kind == "words":
        policy = budget_policy(searcher, cap=cap, drop_thoughts=drop, max_turns=8, thought_cap=2 if cap == "episode" else 6)
        return Game(lean(policy, 3.6), [Words(max_turns=9) for _ in range(7)])
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    policy = budget_policy((random_model("llama", len(tokenizer)), tokenizer), "Play well.", cap=cap,
                           drop_thoughts=drop, max_turns=12, context_limit=260)
    return Game(lean(policy, 5.0), [ThinkSearch("turns", max_turns=12) for _ in range(8)])


def test_an_answer_is_a_thought_a_mark_and_an_action(game):
    """Against the same answer made in phases, with allowances recomputed from the context."""
    kinds = set()
    for episode, k, turn in game.turns:
        used = len(game.context(episode, k))
        allowance = game.allowance(episode, k, used)
        room = game.args.context_limit - used if allowance is None else allowance + game.reserve
        sampled = [token for n, token in enumerate(turn.token_ids) if n not in turn.forced]
        assert (turn.token_ids, turn.forced) == slow_turn(
            sampled, allowance, room, game.args, game.policy.mark, game.policy.end_id)
        thought, rest = game.split(turn)
        assert turn.num_sampled == len(sampled) and game.policy.thought_length(turn) == len(thought)
        assert used + len(turn.token_ids) <= game.args.context_limit
        kinds |= {"open" if not rest else "closed" if len(thought) in turn.forced else "ended",
                  "cut" if len(turn.token_ids) - 1 in turn.forced else "whole"}
    assert kinds == {"open", "ended", "cut", "whole"} | ({"closed"} if game.args.cap != "none" else set())


def test_the_mask_is_what_was_sampled(game):
    batch = collate(game.episodes, CPU)
    mask = batch["turn_id"] >= 0
    assert torch.equal(mask, batch["old_logprobs"] != 0.0), "what was appended has no log-prob"
    assert len(batch["tokens"]) == (len(game.turns) if game.args.drop_thoughts else
                                    sum(bool(e.turns) for e in game.episodes))
    sampled = [(token, k) for _, k, turn in game.turns for n, token in enumerate(turn.token_ids)
               if n not in turn.forced]
    assert list(zip(batch["tokens"][mask].tolist(), batch["turn_id"][mask].tolist(), strict=True)) == sampled


def test_log_probs_equal_a_full_recompute(game):
    """Also of turns whose context lacks the thoughts of earlier turns, and after appended tokens."""
    batch = collate(game.episodes, CPU)
    with torch.no_grad():
        logprobs, _ = token_logprobs(game.policy, batch, 1.0)
    assert (logprobs - batch["old_logprobs"]).abs().max() < 1e-4


def run_update(policy, episodes, **options):
    """What an update reports, and its gradient; with random credit for every turn."""
    credit = torch.randn(len(episodes), 12, generator=torch.Generator().manual_seed(0))
    batch, keeper = collate(episodes, CPU, credit), KeepGradient(policy)
    return update(policy, keeper, batch, Args(max_grad_norm=1e9, **options)), keeper.gradient, batch


def test_what_is_appended_is_not_trained(game):
    """Other log-probs there: the same loss and gradient; elsewhere: another gradient."""
    metrics, gradient, _ = run_update(game.policy, game.episodes)
    changed = copy.deepcopy(game.episodes)
    turns = [turn for episode in changed for turn in episode.turns]
    for turn in turns:
        turn.logprobs = [-7.0 if n in turn.forced else x for n, x in enumerate(turn.logprobs)]
    got, other, _ = run_update(game.policy, changed)
    assert sum(len(turn.forced) for turn in turns) > 5
    assert got == metrics and torch.equal(other, gradient) and gradient.norm() > 1e-3
    turns[0].logprobs = [x if n in turns[0].forced else x - 0.1 for n, x in enumerate(turns[0].logprobs)]
    assert not torch.allclose(run_update(game.policy, changed)[1], gradient)


def test_the_first_step_is_plain_policy_gradient_over_all_sampled_tokens(game):
    """A mean over tokens of A log p and the entropy bonus, however the rows are split."""
    metrics, gradient, batch = run_update(game.policy, game.episodes, entropy_coefficient=0.01, micro_batch_tokens=300)
    logprobs, entropy = token_logprobs(game.policy, batch, 1.0)
    mask = batch["old_logprobs"] != 0
    (-(batch["advantages"] * logprobs + 0.01 * entropy)[mask].mean()).backward()
    plain = torch.cat([p.grad.flatten() for p in game.policy.model.parameters()])
    game.policy.model.zero_grad()
    assert torch.allclose(gradient, plain, rtol=1e-3, atol=1e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-5) and metrics["clip_fraction"] == 0


def test_a_later_turn_sees_actions_and_only_without_dropping_thoughts(game):
    """Every prompt written out; the marks and thoughts of earlier turns are gone, or all there."""
    policy, shorter = game.policy, 0
    for episode, k, turn in game.turns:
        expected = list(policy.head)
        for old in episode.turns[:k]:
            shown = game.split(old)[1] if game.args.drop_thoughts else old.token_ids
            expected += policy.encode(old.observation) + policy.tail + shown
            if shown[-1:] != [policy.end_id]:
                expected += [policy.end_id]
            expected += policy.between
            shorter += len(old.token_ids) > len(shown)
        assert game.context(episode, k) == expected + policy.encode(turn.observation) + policy.tail
        assert turn.starts_row == (k == 0 or game.args.drop_thoughts)
    assert (shorter > 10) == game.args.drop_thoughts


def test_an_episode_does_not_depend_on_its_company(game):
    for company in ([2], [4, 2]):
        rngs = [streams(1, first=i)[0] for i in company]
        again = play(game.policy, [game.envs[i] for i in company], company, rngs)
        for i, episode in zip(company, again, strict=True):
            assert game.episodes[i].overflowed == episode.overflowed
            for one, two in zip(game.episodes[i].turns, episode.turns, strict=True):
                assert (one.token_ids, one.forced, one.prompt_ids) == (two.token_ids, two.forced, two.prompt_ids)
                assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


def test_an_episode_for_which_no_action_fits_is_truncated_and_counted(game):
    args, policy, least = game.args, game.policy, 1 if game.args.cap == "none" else game.reserve
    for episode in game.episodes:
        ids, starts_row = policy.prompt(episode)
        used = len(ids) + (0 if starts_row else len(episode.row()))
        filled = args.cap == "none" and len(episode.row()) == args.context_limit
        full = args.context_limit - used < least or filled
        assert episode.done and not (episode.terminated and episode.truncated)
        out_of_turns = len(episode.turns) == min(args.max_turns, 9)
        assert episode.overflowed == (full and not episode.terminated and not out_of_turns)
    assert args.drop_thoughts or any(e.overflowed for e in game.episodes)


def test_refreshed_log_probs_skip_what_was_appended(game, monkeypatch):
    episodes = copy.deepcopy(game.episodes)
    monkeypatch.setattr(game.policy, "bf16", True)
    refresh_logprobs(game.policy, episodes, game.args)
    batch = collate(game.episodes, CPU)
    with torch.no_grad():
        logprobs, _ = token_logprobs(game.policy, batch, 1.0)
    fresh = collate(episodes, CPU)["old_logprobs"]
    assert torch.allclose(fresh, logprobs, atol=1e-5)
    assert (fresh - batch["old_logprobs"]).abs().max() > 1e-4, "bf16 is another number"


# --- limits of the settings ----------------------------------------------------------------------


def turns_of(searcher, seeds=range(6), limits=None, reminder=False, **flags):
    """The episodes under some flags, and what is sampled in every turn."""
    policy = lean(budget_policy(searcher, **flags), 3.6)
    envs = [TurnLimit(Words(max_turns=9), 9, reminder) for _ in seeds]
    for env in envs:
        env.limits = limits or env.limits
    episodes = play(policy, envs, list(seeds))
    return episodes, [[(t.token_ids, t.forced, t.prompt_ids, t.logprobs) for t in e.turns] for e in episodes]


@pytest.mark.parametrize("drop", [False, True])
def test_a_cap_that_is_never_reached_is_no_cap(searcher, drop):
    flags = {"context_limit": 600, "drop_thoughts": drop, "max_turns": 4}
    episodes, free = turns_of(searcher, cap="none", **flags)
    assert not any(e.overflowed for e in episodes) and max(len(ids) for e in free for ids, *_ in e) > 8
    for cap in ("turn", "episode"):
        assert turns_of(searcher, cap=cap, thought_cap=10**6, **flags)[1] == free
    assert turns_of(searcher, cap="turn", **flags)[1] != free


def test_in_an_episode_of_one_turn_the_pot_is_the_cap_and_there_is_nothing_to_drop(searcher):
    alike = [turns_of(searcher, cap=cap, drop_thoughts=drop, max_turns=1, seeds=range(12))[1]
             for cap in ("turn", "episode") for drop in (False, True)]
    assert alike.count(alike[0]) == 4 and any(forced for e in alike[0] for _, forced, *_ in e)


def test_an_extension_that_nobody_sees_is_the_longer_limit(searcher):
    """The same episodes without a reminder; with one the policy reads another text."""
    flags = {"context_limit": 600, "max_turns": 9}
    fixed, dynamic = (turns_of(searcher, limits=limits, **flags)[1] for limits in ((5, 5), (2, 5)))
    assert fixed == dynamic and max(map(len, fixed)) == 5
    seen = [turns_of(searcher, limits=(first, 5), reminder=True, **flags)[1] for first in (2, 5)]
    assert seen[0] != seen[1] != fixed


@pytest.mark.parametrize("cap,drop", [(cap, drop) for cap in CAPS for drop in (False, True)])
def test_a_turn_that_never_ends_stays_inside_the_context(searcher, monkeypatch, cap, drop):
    """Nothing but "page", 8 tokens of prompt: 40 - 8 - 1 (mark) - 3 (action) are thought, and the episode is over.

    Without a cap a thought fills the context; its episode is over even if that thought would be dropped.
    """
    policy = budget_policy(searcher, cap=cap, context_limit=40, thought_cap=100, max_turns=3, drop_thoughts=drop)
    [word] = policy.encode("page")
    monkeypatch.setattr("utils.sample_tokens", lambda logits, temperature, uniforms: (
        torch.full((len(logits),), word), torch.full((len(logits),), -0.5)))
    [episode] = play(policy, [ThinkSearch(max_hops=3, min_hops=3, max_turns=5)], [0])
    first = episode.turns[0]
    assert len(first.prompt_ids) == 8 and len(first.prompt_ids + first.token_ids) == 40
    assert policy.thought_length(first) == (32 if cap == "none" else 28) and episode.overflowed
    assert len(episode.turns) == (2 if drop and cap != "none" else 1), "a dropped thought makes room for another turn"


def test_the_context_is_that_of_the_flag_or_of_the_model(searcher):
    assert [budget_policy(searcher, context_limit=limit).context_length for limit in (5000, 70)] == [1024, 70]


# --- a scripted mind in the place of the model ---------------------------------------------------


class Mind:
    """Stands in for the decoder: thinks `passes` times, and needs two partial sums to be right.

    Reads the last page and its own answer so far; without two sums it names any page.
    """

    passes = 1

    def __init__(self, policy, rows):
        self.policy = policy

    def keep(self, rows):
        pass

    def feed(self, rows, active=None):
        logits = torch.full((len(rows), len(self.policy.tokenizer)), -math.inf)
        for n in range(len(rows)) if active is None else active:
            logits[n, self.next(self.policy.tokenizer.decode(rows[n]))] = 0.0
        logits[logits.isinf().all(1)] = 0.0  # rows that are done
        return logits

    def next(self, text):
        page, _, answer = text.rpartition("<|user|>")[2].partition("<|assistant|>")
        a, b, c = (int(digit) for digit in page.split()[-3:])
        thought, mark, said = answer.partition(" so")
        once = ["sum", str(a), str((a + b) % 5), str((a + b + c) % 5)]
        wanted, written = once * self.passes, thought.split()
        assert written == wanted[: len(written)]
        if not mark:
            word = wanted[len(written)] if len(written) < len(wanted) else "so"
            return self.policy.encode(" " * (bool(written) or word == "so") + word)
        choices = [once[3]] if len(written) > 2 else [str(x) for x in range(5)]
        words = [["go"], choices, ["<end>"]][len(said.split())]
        return [self.policy.end_id if w == "<end>" else self.policy.encode(f" {w}")[0] for w in words]


def minds(searcher, monkeypatch, passes, context=80, episodes=40, **flags):
    """Success and right hops, means over episodes; the episodes; and what is reported of them."""
    monkeypatch.setattr("utils.Decoder", Mind)
    monkeypatch.setattr(Mind, "passes", passes)
    policy = budget_policy(searcher, context_limit=context, max_turns=4, **flags)
    played = play(policy, [ThinkSearch() for _ in range(episodes)], list(range(episodes)))
    hops = np.mean([e.info["right_hops"] for e in played])
    return np.mean([e.success for e in played]), hops, played, budget_metrics(policy, played)


@pytest.mark.parametrize("passes,flags,success,hops", [
    (0, {"cap": "turn"}, 0, 0.25), (1, {"cap": "none"}, 1, 4), (2, {"cap": "none"}, 1, 4),
    (3, {"cap": "none"}, 0, 3), (4, {"cap": "none"}, 0, 3),
    (4, {"cap": "turn", "thought_cap": 8}, 1, 4), (4, {"cap": "turn", "thought_cap": 2}, 0, 0.25),
    (4, {"cap": "episode", "thought_cap": 8}, 0.04, 2.24), (4, {"cap": "none", "drop_thoughts": True}, 1, 4),
    (4, {"cap": "turn", "thought_cap": 3, "drop_thoughts": True}, 1, 4)])
def test_who_finishes_in_a_context_of_80(searcher, monkeypatch, passes, flags, success, hops):
    """The same sums as with words counted by hand: a word is a token. 40 episodes, 4 sigma.

    Guesses at every hop: .2 + .04 + .008 + .0016 right hops. A pot of 32 is spent after two turns.
    """
    got, right, *_ = minds(searcher, monkeypatch, passes, **flags)
    exact = hops in (3, 4)
    assert got == success if exact else abs(got - success) < 4 * (0.16 / 40) ** 0.5
    assert right == hops if exact else abs(right - hops) < 4 * (0.4 / 40) ** 0.5


@pytest.mark.parametrize("passes,enough", [(1, 57), (2, 73), (3, 89), (4, 105)])
def test_the_context_that_a_mind_needs(searcher, monkeypatch, passes, enough):
    """One less than counted by hand with the end of the last answer, which need not be said."""
    assert minds(searcher, monkeypatch, passes, enough - 1, episodes=3, cap="none")[0] == 0
    success, _, played, metrics = minds(searcher, monkeypatch, passes, enough, episodes=3, cap="none")
    assert success == 1 and [len(e.row()) for e in played] == [enough] * 3
    assert metrics["thought_tokens"] == 4 * passes + 1 and metrics["forced_closes"] == 0


# --- what a run reports --------------------------------------------------------------------------


def hand_made(policy, drop):
    """Two episodes: answers closed by an appended mark, cut, without a mark, and whole ones."""
    so, end, encode = policy.encode(" so"), [policy.end_id], policy.encode

    def turn(observation, ids, forced, first):
        prompt = policy.head * first + policy.between * (not first) + encode(observation) + policy.tail
        return Turn(observation, "", prompt, first or drop, ids, [0.0] * len(ids), forced)
    one = [turn("hops 2 page 1 1 1", encode("sum 1 2") + so + encode(" go 3") + end, {3}, True),
           turn("page 0 1 1", encode("sum 0 1 2") + so + encode(" go 2") + end, {7}, False)]
    two = [turn("hops 4 page 3 4 2", so + encode(" 4") + end, {0}, True),
           turn("page 3 4 2", encode("sum 3") + end, set(), False),
           turn("page 3 4 2", so + encode(" go 4") + end, set(), False)]
    return [Episode(0, "", one, info={"success": True, "right_hops": 2, "hops": 2}, terminated=True),
            Episode(1, "", two, info={"right_hops": 1, "hops": 4}, truncated=True)]


def test_lengths_and_what_is_remembered_by_hand(searcher):
    policy = budget_policy(searcher, drop_thoughts=True)
    turns = [turn for e in hand_made(policy, True) for turn in e.turns]
    assert [policy.thought_length(turn) for turn in turns] == [3, 5, 0, 3, 1]
    assert [turn.num_sampled for turn in turns] == [6, 7, 2, 3, 4]
    shown = [policy.tokenizer.decode(policy.remember(turn)) for turn in turns]
    assert shown == [" go 3<|end|>", " go 2<|end|>", " 4<|end|>", "<|end|>", " go 4<|end|>"]
    assert all(budget_policy(searcher).remember(turn) == turn.token_ids for turn in turns)
    so = policy.encode(" so")
    for ids, left in ((policy.encode("sum 3"), []), (so, []), (so + [policy.end_id], [policy.end_id])):
        assert policy.remember(Turn("", "", token_ids=ids)) == left


def test_what_a_run_reports_by_hand(searcher):
    """Thoughts 3, 5 | 0, 3, 1, of which the first and third were closed; 22 tokens; rows of 29 and 30 tokens."""
    policy = budget_policy(searcher)
    episodes = hand_made(policy, False)
    assert budget_metrics(policy, episodes) == pytest.approx({
        "thought_tokens": 2.4, "forced_closes": 0.4, "rounds_completed": 0.625,
        "thought_share": (8 / 29 + 4 / 30) / 2, "history_cost": 4.5, "tokens_per_success": 22.0})
    policy = budget_policy(searcher, drop_thoughts=True)
    assert budget_metrics(policy, hand_made(policy, True))["thought_share"] == pytest.approx((5 / 14 + 1 / 10) / 2)
    failed = budget_metrics(policy, episodes[1:])
    assert failed["tokens_per_success"] == 9 and failed["rounds_completed"] == 0.25
    cost = [budget_metrics(policy, [Episode(0, "", episodes[0].turns[:1] * n)])["history_cost"] for n in (40, 80)]
    assert cost == [820, 3240]
    unplayed = budget_metrics(policy, [Episode(0, "", truncated=True, overflowed=True)])
    assert set(unplayed.values()) == {0}


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 2, "warm_start_steps": 5, "num_iterations": 2, "eval_episodes": 4,
         "eval_every": 1, "print_samples": 0, "learning_rate": 1e-3}
TURNS = QUICK | {"env_id": "tests/Words-v0", "env_kwargs": '{"max_turns": 12}', "max_turns": 12, "thought_cap": 3,
                 "context_limit": 320, "num_prompts": 4, "eval_episodes": 8, "warm_start_steps": 1}


@pytest.fixture
def few(monkeypatch):
    """A start policy that has seen 64 demonstrations."""
    monkeypatch.setattr("policies.NUM_DEMONSTRATIONS", 64)


def table(folder):
    """metrics.csv as numbers, without the seconds."""
    [path] = folder.glob("*/metrics.csv")
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(file)]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    return rows


@pytest.mark.parametrize("flags", [
    {"cap": "none", "context_limit": 60}, {"cap": "episode"}, {"thought_cap": 4, "drop_thoughts": True},
    {"thought_cap": 4, "turn_limit": "dynamic", "reminder": True, "max_turns": 12, "context_limit": 320,
     "warm_start_steps": 1, "env_kwargs": '{"regime": "turns", "max_turns": 12}'}])
def test_every_arm_runs_and_uses_the_mark_of_the_game(flags, tmp_path, few):
    main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    rows, capped = table(tmp_path), flags.get("cap") != "none"
    assert len(rows) == 3 and (rows[1]["train_forced_closes"] > 0) == capped
    assert all((row["eval_forced_closes"] > 0) == capped for row in rows)
    [samples] = tmp_path.glob("*/samples.jsonl")
    said = samples.read_text()
    assert "</think>" not in said and (" so" in said or not capped)


@pytest.fixture
def recorded(few, monkeypatch):
    """What a run collects, evaluates and trains on: [(iteration, limits, episodes)], [(limits, episodes)], batches."""
    collected, evaluated, batches = [], [], []

    def collect(policy, envs, args, iteration):
        limits = [env.limits for env in envs]
        assert limits.count(limits[0]) == len(envs)
        collected.append((iteration, limits[0], collect_groups(policy, envs, args, iteration)))
        return collected[-1][2]

    def evaluation(policy, envs, args):
        metrics, episodes = evaluate(policy, envs, args)
        evaluated.append((envs[0].limits, episodes))
        return metrics, episodes

    def train(policy, optimizer, batch, args):
        batches.append(dict(batch))
        return update(policy, optimizer, batch, args)
    monkeypatch.setattr("algos.turn_budget.collect_groups", collect)
    monkeypatch.setattr("algos.turn_budget.evaluate", evaluation)
    monkeypatch.setattr("algos.turn_budget.update", train)
    return collected, evaluated, batches


@pytest.mark.parametrize("drop", [False, True])
def test_a_run_trains_on_and_logs_what_a_slow_loop_says(tmp_path, recorded, drop):
    """Advantage and minibatch of every sampled token; any text is an action and may pay."""
    collected, evaluated, batches = recorded
    flags = QUICK | {"env_id": "tests/Words-v0", "num_prompts": 4, "group_size": 3, "max_turns": 6,
                     "context_limit": 200, "thought_cap": 6, "num_iterations": 1}
    main(Args(**flags, run_dir=str(tmp_path), drop_thoughts=drop))
    [(iteration, limits, episodes)] = collected
    assert iteration == 0 and limits == (6, 6) and len(batches) == 2
    silent = 0
    for part, batch in enumerate(batches):
        expected = []
        for group in (part, part + 2):
            members = episodes[3 * group : 3 * group + 3]
            returns = [sum(turn.reward for turn in e.turns) for e in members]
            spread = np.std(returns, ddof=1)
            silent += spread == 0
            for e, score in zip(members, returns, strict=True):
                advantage = (score - np.mean(returns)) / spread if spread else 0.0
                expected += [advantage] * sum(turn.num_sampled for turn in e.turns)
        mask = batch["turn_id"] >= 0
        assert batch["advantages"][mask].tolist() == pytest.approx(expected, abs=1e-4) and any(expected)
        assert (batch["advantages"][~mask] == 0).all()
    rows, turns = table(tmp_path), [turn for e in episodes for turn in e.turns]
    assert sum(len(batch["tokens"]) for batch in batches) == (len(turns) if drop else 12)
    assert rows[1]["generated_tokens"] == sum(turn.num_sampled for turn in turns)
    assert rows[1]["optimizer_steps"] == 2 and rows[1]["groups_without_signal"] == silent / 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(next(tmp_path.glob("*/checkpoint")))
    mark = len(tokenizer("</think>", add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert mark > 1
    for name, row, played in (("train", rows[1], episodes), ("eval", rows[0], evaluated[0][1]),
                              ("eval", rows[1], evaluated[1][1])):
        closed = [min(turn.forced, default=-1) for e in played for turn in e.turns if len(turn.forced) >= mark]
        count = sum(len(e.turns) for e in played)
        assert row[f"{name}_forced_closes"] == pytest.approx(len(closed) / count) and set(closed) == {6}
        assert row[f"{name}_history_cost"] == pytest.approx(
            np.mean([sum(range(len(e.turns) + 1)) for e in played]))


@pytest.mark.parametrize("kind,start,end", [("fixed", 20, 60), ("dynamic", 20, 60)])
def test_turn_limits_come_from_a_pilot_and_stay(tmp_path, recorded, kind, start, end):
    """Of all its episodes, failures too; the same in evaluations and on resume."""
    collected, evaluated, _ = recorded
    flags = TURNS | {"turn_limit": kind, "start_percentile": float(start), "end_percentile": float(end),
                     "reminder": True}
    main(Args(**flags, run_dir=str(tmp_path)))
    (number, limits, pilot), *rest = collected
    assert limits == (12, 12) and [n for n, *_ in rest] == [0, 1] and number > 10**9, "random numbers of its own"
    assert {e.turns[0].observation.split(" ", 2)[2] for e in pilot} == {"left 12"}
    counts = [len(e.turns) for e in pilot]
    last = int(np.percentile(counts, end))
    first = int(np.percentile(counts, start)) if kind == "dynamic" else last
    assert len(counts) == 8 and last < 12 and (first < last) == (kind == "dynamic")
    assert {limits for _, limits, _ in rest} == {limits for limits, _ in evaluated} == {(first, last)}
    assert len(evaluated) == 3
    for episode in [e for *_, played in rest for e in played] + [e for _, played in evaluated for e in played]:
        assert episode.turns[0].observation.endswith(f" left {first}")
        assert len(episode.turns) <= last and episode.truncated == (not episode.terminated)
    rows = table(tmp_path)
    assert {(r["turn_limit_first"], r["turn_limit_last"]) for r in rows[1:]} == {(first, last)}
    [folder] = tmp_path.glob("*")
    main(Args(**(flags | {"num_iterations": 3}), run_dir=str(tmp_path), resume=str(folder)))
    again = table(tmp_path)
    assert again[:3] == rows and (again[3]["turn_limit_first"], again[3]["turn_limit_last"]) == (first, last)


@pytest.mark.parametrize("flags,needle", [
    ({"group_size": 1}, "--group-size"), ({"context_limit": 8}, "no prompt leaves room"),
    ({"thought_cap": 0}, "--thought-cap"), ({"context_limit": 0}, "--context-limit"),
    ({"end_percentile": 101.0}, "--end-percentile"), ({"start_percentile": 101.0}, "--start-percentile")])
def test_bad_flags_get_one_line(flags, needle, tmp_path, capsys, few):
    with pytest.raises(SystemExit) as end:
        main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and needle in lines[0]
