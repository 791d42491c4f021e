"""Turn budgets against hand-worked numbers, slow loops, scripted minds and whole recomputations."""

import copy
import csv
import functools
import math

import numpy as np
import pytest
import torch

from algos import turn_budget
from algos.turn_budget import (
    Args, BudgetPolicy, TurnLimit, budget_metrics, forced_tokens, main, thought_allowance, turn_limits, update,
)
from conftest import CHATML, KeepGradient, byte_tokenizer, random_model, streams
from envs.episodes import Episode, Turn, demonstrations, start_episodes
from envs.text_env import TextEnv
from envs.think_search import ThinkSearch
from policies import make_tiny
from rollouts import refresh_logprobs, rollout
from utils import RunArgs, collate, micro_batches, token_logprobs
from words import Words

CPU = torch.device("cpu")
END = 1


# --- Eq. 1: allowances ---------------------------------------------------------------------------
@pytest.mark.parametrize("cap,thoughts,room,allowance", [
    ("none", 99, -3, None), ("turn", 99, 50, 8), ("turn", 0, 7, 7), ("turn", 0, -5, 0), ("episode", 0, 50, 32),
    ("episode", 27, 50, 5), ("episode", 27, 3, 3), ("episode", 35, 50, 0), ("episode", 0, -5, 0)])
def test_allowances_by_hand(cap, thoughts, room, allowance):
    assert thought_allowance(Args(cap=cap, thought_cap=8, max_turns=4), thoughts, room) == allowance


# --- Eq. 2: what is appended ---------------------------------------------------------------------
def drive(tokens, allowance, action_cap, mark):
    """Sample `tokens` one by one until the turn ends: the answer, and which of its tokens were appended."""
    ids = forced_tokens([], allowance, action_cap, mark, [END, 98])
    put, tokens = [1] * len(ids), list(tokens)
    while tokens and ids[-1:] != [END]:
        ids = [*ids, tokens.pop(0)]
        new = forced_tokens(ids, allowance, action_cap, mark, [END, 98])
        ids, put = ids + new, put + [0] + [1] * len(new)
    return ids, put


ONE, TWO = [99], [90, 99]


@pytest.mark.parametrize("tokens,allowance,mark,answer,put", [
    # still open after 5 tokens; half a mark and a reversed mark are no mark
    ([99, 90, 13, 14, 90, 7, END], 5, TWO, [99, 90, 13, 14, 90, 90, 99, 7, END], [0] * 5 + [1, 1, 0, 0]),
    # ends itself: early, and with the last token allowed
    ([11, 12, 90, 99, 7, END], 5, TWO, [11, 12, 90, 99, 7, END], [0] * 6),
    ([11, 12, 13, 14, 99, 7, END], 5, ONE, [11, 12, 13, 14, 99, 7, END], [0] * 7),
    ([11, 12, 13, 90, 99, 7, END], 5, TWO, [11, 12, 13, 90, 99, 7, END], [0] * 7),
    # no token may be thought
    ([7, END], 0, TWO, [90, 99, 7, END], [1, 1, 0, 0]),
    # an end of turn inside a thought, early and as the last token allowed
    ([11, END], 5, ONE, [11, END], [0, 0]), ([11, 12, 13, 14, END], 5, TWO, [11, 12, 13, 14, END], [0] * 5),
    # an action has 3 tokens; the third may be the end itself; a second mark is part of it
    ([99, 6, 7, 8, 9], 5, ONE, [99, 6, 7, 8, END], [0, 0, 0, 0, 1]),
    ([99, 6, 7, END], 5, ONE, [99, 6, 7, END], [0] * 4),
    ([90, 99, 90, 99, 99, 5], 5, TWO, [90, 99, 90, 99, 99, END], [0] * 5 + [1]),
    ([11, 12, 6, 7, 8, 9], 2, TWO, [11, 12, 90, 99, 6, 7, 8, END], [0, 0, 1, 1, 0, 0, 0, 1]),
    # no allowance: only the action is limited
    ([11] * 30 + [99, 6, 7, 8, 9], None, ONE, [11] * 30 + [99, 6, 7, 8, END], [0] * 34 + [1])])
def test_appended_tokens_by_hand(tokens, allowance, mark, answer, put):
    assert drive(tokens, allowance, 3, mark) == (answer, put)


# --- Eq. 3: turn limits --------------------------------------------------------------------------
@pytest.mark.parametrize("counts,median,quartile", [
    ([80, 70, 60, 50, 40, 30, 20, 10], 45, 62),  # percentiles 45 and 62.5
    ([1, 1, 2, 2], 1, 2), ([3, 3, 3], 3, 3)])
def test_turn_limits_by_hand(counts, median, quartile):
    assert turn_limits(counts, Args(turn_limit="fixed")) == (quartile, quartile)
    assert turn_limits(counts, Args(turn_limit="dynamic")) == (median, quartile)


class Needs(TextEnv):
    """Solved by the turn number `seed`, whatever is done; 100 turns at most."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn, self.need = 0, seed
        return "go", {"success": False}

    def step(self, action):
        self.turn += 1
        done = self.turn == self.need
        return "done" if done else "on", float(done), done, self.turn == 100, {"success": done}


def through(env, need, limits):
    """(solved, turns) of an episode, and its observations."""
    env.limits = limits
    [e] = start_episodes([env], [need])
    while not e.done:
        e.answer(env, Turn(e.observation, "word"))
    assert e.terminated == e.success != e.truncated and e.total_reward == e.success
    return (e.success, len(e.turns)), [turn.observation for turn in e.turns] + [e.observation]


@pytest.mark.parametrize("limits,outcomes", [
    ((45, 45), {44: (True, 44), 45: (True, 45), 46: (False, 45)}),
    ((45, 62), {44: (True, 44), 46: (True, 46), 62: (True, 62), 63: (False, 62), 90: (False, 62)}),
    ((150, 150), {99: (True, 99), 120: (False, 100)})])
def test_limits_over_whole_episodes_by_hand(limits, outcomes):
    assert {need: through(TurnLimit(Needs(), (99, 99), False), need, limits)[0] for need in outcomes} == outcomes


def test_reminders_say_the_turns_left_and_an_extension_shows_when_it_is_granted():
    env = TurnLimit(Needs(), (99, 99), reminder=True)
    for _ in range(2):  # a second reset starts a new count
        assert through(env, 9, (2, 4))[1] == ["go left 2", "on left 1", "on left 2", "on left 1", "on left 0"]
    assert through(env, 2, (5, 5))[1] == ["go left 5", "on left 4", "done left 3"]
    assert through(TurnLimit(Needs(), (99, 99), reminder=False), 2, (5, 5))[1] == ["go", "on", "done"]


def test_a_warm_start_reads_limits_of_every_size_and_is_never_cut_short():
    """A first limit of 0: one from 1 to 8, the same for the same seed, extended to 8 when it is hit."""
    firsts = []
    for seed in [*range(1, 800), 1]:
        (solved, turns), told = through(TurnLimit(Needs(), (8, 8), reminder=True), seed, (0, 8))
        left = [int(text.split()[-1]) for text in told]
        firsts.append(left[0])
        later = [8 - turn if turn >= left[0] else left[0] - turn for turn in range(turns + 1)]
        assert left == later and (solved, turns) == (seed <= 8, min(seed, 8))
    counts = np.bincount(firsts[:-1], minlength=9)
    assert counts[0] == 0 and len(counts) == 9 and firsts[-1] == firsts[0]
    assert np.abs(counts[1:] / 799 - 1 / 8).max() < 5 * (7 / 64 / 799) ** 0.5


# --- the update and what it reports --------------------------------------------------------------
@pytest.mark.parametrize("max_tokens,parts", [(40, 1), (20, 2), (10, 4)])
def test_an_update_follows_and_reports_means_over_the_sampled_tokens(tiny_policy, max_tokens, parts):
    """Token by token from the logits, for any number of micro-batches; the gradient of the same slow loss.

    Four rows of 7 to 10 tokens, old log-probs that differ from the new ones; 3 where nothing was sampled.
    """
    generator, lengths, shape, rows = torch.Generator().manual_seed(5), torch.tensor([9, 7, 10, 8]), (4, 10), []
    tokens = torch.randint(4, len(tiny_policy.tokenizer), shape, generator=generator)
    sampled = (torch.rand(shape, generator=generator) < 0.6) & (torch.arange(10) < lengths[:, None])
    sampled[:, 0] = False
    batch = {"tokens": tokens, "lengths": lengths, "turn_id": torch.where(sampled, 0, -1)}
    moved = token_logprobs(tiny_policy, batch, 0.8)[0].detach() + 0.4 * torch.randn(shape, generator=generator)
    batch |= {"old_logprobs": torch.where(sampled, moved, -3.0),
              "advantages": torch.where(sampled, torch.randn(shape, generator=generator), 3.0)}
    for b, t in (batch["turn_id"] >= 0).nonzero().tolist():
        logits = tiny_policy.forward(batch["tokens"][b : b + 1, :t])[0, -1].double() / 0.8
        p = logits.exp() / logits.exp().sum()
        ratio = p[batch["tokens"][b, t]] / math.exp(batch["old_logprobs"][b, t])
        advantage, entropy = batch["advantages"][b, t].item(), -sum(p * p.log())
        stopped = (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.9)
        surrogate = advantage * ((1.3 if ratio > 1.3 else 0.9) if stopped else ratio)
        rows.append((-surrogate - 0.5 * entropy, entropy, float(stopped), ratio - 1 - ratio.log()))
    loss, entropy, clipped, kl = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    loss.backward()
    slow = torch.cat([p.grad.flatten() for p in tiny_policy.model.parameters()])
    tiny_policy.model.zero_grad()
    args = Args(temperature=0.8, clip_low=0.1, clip_high=0.3, entropy_coefficient=0.5, micro_batch_tokens=max_tokens,
                max_grad_norm=1e9)
    assert len(list(micro_batches(batch, max_tokens))) == parts and 0 < clipped < 1 and kl > 0.01
    metrics = update(tiny_policy, keeper := KeepGradient(tiny_policy), batch, args)
    assert metrics == pytest.approx({"loss": loss.item(), "entropy": entropy.item(), "clip_fraction": clipped,
                                     "approx_kl": kl.item(), "grad_norm": slow.norm().item()}, rel=1e-4)
    assert torch.allclose(keeper.gradient, slow, rtol=1e-3, atol=1e-6)


# --- games of policies that think ----------------------------------------------------------------
@pytest.fixture(scope="module")
def searcher():
    """An untrained model, and a tokenizer that knows the words of ThinkSearch (one token each)."""
    played = demonstrations(ThinkSearch("turns", max_turns=12), list(range(60)), 12, np.random.default_rng(0))
    texts = [text for e in played for turn in e.turns for text in (turn.observation, turn.action)]
    return make_tiny(RunArgs(), texts)


def budget_policy(parts, lean=0.0, **flags):
    """Marks and ends of turn are likely to the degree of `lean`, in decoding and in the update alike."""
    flags = {"max_turns": 6, "max_turn_tokens": 3, "thought_cap": 5, "context_limit": 100} | flags
    policy, args = BudgetPolicy(*parts, "cpu"), Args(**flags)
    policy.max_turn_tokens = args.max_turn_tokens
    policy.set_budget(args, " so")
    likely = torch.zeros(len(policy.tokenizer), policy.model.config.vocab_size)  # [token, next token]
    likely[:, [policy.mark[0], policy.end_id]] = lean
    likely[policy.mark[:-1], policy.mark[1:]] = 2 * lean
    forward, policy.whole = policy.forward, True
    policy.forward = lambda tokens, logits_to_keep=0, **more: forward(
        tokens, logits_to_keep=logits_to_keep, **more) + likely[tokens[:, -logits_to_keep:]]
    return policy


def play(policy, envs, seeds):
    rngs = [streams(1, first=seed)[0] for seed in seeds]
    return rollout(policy, envs, start_episodes(envs, seeds), rngs, policy.args.max_turns, 1.0)


class Game:
    """Episodes of one setting, played once and read by many tests."""

    def __init__(self, policy, envs):
        self.policy, self.args, self.episodes = policy, policy.args, play(policy, envs, list(range(len(envs))))
        self.reserve = len(policy.mark) + self.args.max_turn_tokens  # what must follow a thought
        self.turns = [(e, k, turn) for e in self.episodes for k, turn in enumerate(e.turns)]

    def context(self, episode, k):
        """The tokens before the answer of turn k."""
        turn = episode.turns[k]
        return ([] if turn.starts_row else Episode(0, "", episode.turns[:k]).row()) + turn.prompt_ids

    def allowance(self, episode, k):
        """Eq. 1, written out for each cap."""
        room = max(0, self.args.context_limit - len(self.context(episode, k)) - self.reserve)
        if self.args.cap == "turn":
            return min(room, self.args.thought_cap)
        spent = sum(len(self.split(turn)[0]) for turn in episode.turns[:k])
        pot = max(0, self.args.max_turns * self.args.thought_cap - spent)
        return None if self.args.cap == "none" else min(room, pot)

    def split(self, turn):
        """The sampled tokens of the thought (with a mark that it chose), and what follows it."""
        mark, ids = self.policy.mark, turn.token_ids
        end = min((n for n in range(len(ids) + 1) if ids[:n][-len(mark):] == mark), default=len(ids))
        return [token for n, token in enumerate(ids[:end]) if n not in turn.forced], ids[end:]


@pytest.fixture(scope="module", params=[
    ("words", "none", False), ("words", "none", True), ("words", "episode", False), ("words", "episode", True),
    ("words", "turn", False), ("words", "turn", True), ("bytes", "turn", False), ("bytes", "turn", True)])
def game(request, searcher):
    """Words: one token a mark. Bytes: three tokens a mark, a chat template, pages to be found."""
    kind, cap, drop = request.param
    flags = {"cap": cap, "drop_thoughts": drop}
    if kind == "words":
        policy = budget_policy(searcher, 3.6, max_turns=8, thought_cap=2 if cap == "episode" else 6, **flags)
        return Game(policy, [Words(max_turns=9) for _ in range(7)])
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    parts = random_model("llama", len(tokenizer)), tokenizer
    policy = budget_policy(parts, 6.0, max_turns=12, context_limit=250, **flags)
    return Game(policy, [ThinkSearch("turns", max_turns=12) for _ in range(8)])


def test_an_answer_is_a_thought_a_mark_and_an_action(game):
    """What is appended and when an answer is over, with allowances recomputed from the context."""
    mark, end, cap, kinds = game.policy.mark, game.policy.end_id, game.args.max_turn_tokens, set()
    for episode, k, turn in game.turns:
        left, allowance = game.args.context_limit - len(game.context(episode, k)), game.allowance(episode, k)
        room = left if allowance is None else allowance + game.reserve
        (thought, rest), ids = game.split(turn), turn.token_ids
        start = len(ids) - len(rest)  # of the action
        action = [token for n, token in enumerate(rest, start) if n not in turn.forced]
        closed = len(thought) == allowance and thought[-len(mark):] != mark and thought[-1:] != [end]
        cut = len(action) == cap and action[-1] != end and start + cap < room
        assert turn.forced == {*range(len(thought), start), *[len(ids) - 1] * cut}
        assert start == len(thought) + len(mark) * closed and rest == action + [end] * cut
        assert ids.index(end) == len(ids) - 1 if end in ids else len(ids) == room, "it goes on until then"
        assert len(ids) <= room <= left and bool(action) >= closed and len(action) <= cap
        assert len(thought) <= (left if allowance is None else allowance)
        assert game.policy.thought_length(turn) == len(thought)
        kinds |= {"open" if not rest else "closed" if closed else "ended", "cut" if cut else "whole"}
    assert kinds == {"open", "ended", "cut", "whole"} | ({"closed"} if game.args.cap != "none" else set())


def test_what_was_sampled_is_trained_with_its_log_prob_and_nothing_else(game, monkeypatch):
    """Log-probs against a full recompute: without the thoughts that were dropped, and after appended tokens."""
    batch = collate(game.episodes, CPU)
    mask = batch["turn_id"] >= 0
    sampled = [(token, k) for _, k, turn in game.turns for n, token in enumerate(turn.token_ids)
               if n not in turn.forced]
    assert list(zip(batch["tokens"][mask].tolist(), batch["turn_id"][mask].tolist(), strict=True)) == sampled
    assert len(mask) == (len(game.turns) if game.args.drop_thoughts else sum(bool(e.turns) for e in game.episodes))
    with torch.no_grad():
        logprobs, _ = token_logprobs(game.policy, batch, 1.0)
        assert torch.allclose(logprobs, batch["old_logprobs"], atol=1e-4) and (logprobs[mask] < 0).all()
        monkeypatch.setattr(game.policy, "bf16", True)  # then they are computed again
        refresh_logprobs(game.policy, episodes := copy.deepcopy(game.episodes), game.args)
        fresh = collate(episodes, CPU)["old_logprobs"]
        assert torch.allclose(fresh, token_logprobs(game.policy, batch, 1.0)[0], atol=1e-5)
    assert (fresh - logprobs).abs().max() > 1e-4, "bf16 is another number"


def test_a_later_turn_sees_actions_and_only_without_dropping_thoughts(game):
    """Every prompt written out; the marks and thoughts of earlier turns are gone, or all there."""
    policy, shorter = game.policy, 0
    for episode, k, turn in game.turns:
        expected, opening = list(policy.head.ids), policy.head.text
        for old in episode.turns[:k]:
            shown = game.split(old)[1] if game.args.drop_thoughts else old.token_ids
            expected += policy.encode(opening + old.observation) + policy.tail + shown
            expected += [policy.end_id] * (shown[-1:] != [policy.end_id]) + policy.between.ids
            opening = policy.between.text
            shorter += len(old.token_ids) > len(shown)
        assert game.context(episode, k) == expected + policy.encode(opening + turn.observation) + policy.tail
        assert turn.starts_row == (k == 0 or game.args.drop_thoughts)
    assert (shorter > 10) == game.args.drop_thoughts


def test_an_episode_for_which_no_action_fits_is_truncated_and_counted(game):
    args, policy, least = game.args, game.policy, 1 if game.args.cap == "none" else game.reserve
    for episode in game.episodes:
        ids, starts_row = policy.prompt(episode)
        used = len(ids) + (0 if starts_row else len(episode.row()))
        filled = args.cap == "none" and len(episode.row()) == args.context_limit
        going_on = episode.terminated < (len(episode.turns) < min(args.max_turns, 9))
        assert episode.done and episode.overflowed == (going_on and (filled or args.context_limit - used < least))
    assert args.drop_thoughts or any(e.overflowed for e in game.episodes)


# --- limits of the settings ----------------------------------------------------------------------
@pytest.mark.parametrize("passes,flags,hops,turns", [
    (0, {"cap": "turn"}, 0, 4), (2, {"cap": "none"}, 4, 4), (3, {"cap": "none"}, 3, 4),
    (4, {"cap": "turn", "thought_cap": 8}, 4, 4), (4, {"cap": "turn", "thought_cap": 2}, 0, 4),
    (4, {"cap": "episode", "thought_cap": 8}, 2, 4), (4, {"thought_cap": 3, "drop_thoughts": True}, 4, 4),
    (4, {"cap": "none", "drop_thoughts": True}, 4, 4), (99, {"cap": "none"}, 0, 1),
    (99, {"cap": "none", "drop_thoughts": True}, 0, 1), (99, {"thought_cap": 99}, 1, 1),
    (99, {"thought_cap": 99, "drop_thoughts": True}, 4, 4),
    *[(passes, {"cap": "none", "drop_thoughts": drop, "context_limit": enough - short}, 4 - short, 4)
      for passes, drop, enough in ((1, False, 57), (2, False, 73), (3, False, 89), (4, True, 54)) for short in (0, 1)]])
def test_how_many_of_four_hops_a_context_allows(searcher, monkeypatch, passes, flags, hops, turns):
    """The partial sums are written `passes` times; with less than two of them a wrong page is named.

    Counted by hand, a word is a token: messages have 8, 6, 6, 6, an answer has 4 + 4 per pass (the last end is not
    needed); the context has 80. A pot of 32 is spent after two turns. A thought that is closed before it fills the
    context and is then dropped makes room again: 4 passes need 8 + 20, then 17 + 20, 26 + 20 and 35 + 20.
    """
    def next_token(text):
        page, _, answer = text.rpartition("<|user|>")[2].partition("<|assistant|>")
        a, b, c = (int(digit) for digit in page.split()[-3:])
        thought, mark, said = answer.partition(" so")
        known, total = len(thought.split()) > 2, (a + b + c) % 5
        words = [*["sum", str(a), str((a + b) % 5), str(total)] * passes, "so"]
        if mark:
            words = ["go", str(total if known else (total + 1) % 5)]
        word = [*words, None][len(said.split() if mark else thought.split())]
        return policy.end_id if word is None else policy.encode(" " * (answer > "" or word == "so") + word)[0]

    def feed(decoder, rows, active=None):
        logits = torch.zeros(len(rows), len(policy.tokenizer))
        for n in range(len(rows)) if active is None else active:
            logits[n, next_token(policy.tokenizer.decode(rows[n]))] = 1000.0
        return logits
    monkeypatch.setattr("rollouts.Decoder.feed", feed)
    policy = budget_policy(searcher, **{"context_limit": 80, "max_turns": 4} | flags)
    played = play(policy, [ThinkSearch() for _ in range(5)], list(range(5)))
    assert [(e.info["right_hops"], len(e.turns)) for e in played] == [(hops, turns)] * 5
    assert max(len(e.row()) for e in played) <= policy.context_length
    assert [e.overflowed for e in played] == [turns < 4] * 5


# --- what a run reports --------------------------------------------------------------------------
def hand_made(policy, drop):
    """Two episodes: answers closed by an appended mark, cut, without a mark, and whole ones."""
    so, end, encode = policy.encode(" so"), [policy.end_id], policy.encode

    def turn(observation, ids, forced, first):
        prompt = policy.head.ids * first + policy.between.ids * (not first) + encode(observation) + policy.tail
        return Turn(observation, "", prompt, first or drop, ids, [0.0] * len(ids), forced)
    one = [turn("hops 2 page 1 1 1", encode("sum 1 2") + so + encode(" go 3") + end, {3}, True),
           turn("page 0 1 1", encode("sum 0 1 2") + so + encode(" go 2") + end, {7}, False)]
    two = [turn("hops 4 page 3 4 2", so + encode(" 4") + end, {0}, True),
           turn("page 3 4 2", encode("sum 3") + end, set(), False),
           turn("page 3 4 2", so + encode(" go 4") + end, set(), False)]
    return [Episode(0, "", one, info={"success": True, "right_hops": 2, "hops": 2}, terminated=True),
            Episode(1, "", two, info={"right_hops": 1, "hops": 4}, truncated=True)]


def test_what_a_run_reports_by_hand(searcher):
    """Thoughts 3, 5 | 0, 3, 1, of which the first and third were closed; 22 tokens; rows of 29 and 30 tokens."""
    assert budget_policy(searcher, context_limit=5000).context_length == 1024, "that of the model"
    policy = budget_policy(searcher)
    episodes = hand_made(policy, False)
    assert budget_metrics(policy, episodes) == pytest.approx({
        "thought_tokens": 2.4, "forced_closes": 0.4, "rounds_completed": 0.625,
        "thought_share": (8 / 29 + 4 / 30) / 2, "history_cost": 4.5, "tokens_per_success": 22.0})
    assert budget_metrics(policy, episodes[1:])["tokens_per_success"] == 9
    policy = budget_policy(searcher, drop_thoughts=True)
    assert budget_metrics(policy, hand_made(policy, True))["thought_share"] == pytest.approx((5 / 14 + 1 / 10) / 2)
    assert set(budget_metrics(policy, [Episode(0, "", truncated=True)]).values()) == {0}, "none was played"


QUICK = {"num_prompts": 4, "group_size": 3, "warm_start_steps": 5, "num_iterations": 1, "eval_episodes": 4,
         "eval_every": 1, "print_samples": 0, "learning_rate": 1e-3, "env_id": "tests/Words-v0", "max_turns": 6,
         "context_limit": 200, "thought_cap": 6}


@pytest.fixture
def calls(monkeypatch):
    """(arguments, result) of every call that main makes of these functions."""
    seen = {name: [] for name in ("load_policy", "collect_groups", "evaluate", "update")}

    def spy(name, original, *given, **named):
        seen[name].append(((*given, *named.values()), original(*given, **named)))
        return seen[name][-1][1]
    for name in seen:
        monkeypatch.setattr(turn_budget, name, functools.partial(spy, name, getattr(turn_budget, name)))
    return seen


def table(folder):
    """metrics.csv as numbers, without the seconds."""
    [path] = folder.glob("*/metrics.csv")
    rows = csv.DictReader(path.read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in rows]


@pytest.mark.parametrize("drop", [False, True])
def test_a_run_trains_on_and_logs_what_a_slow_loop_says(tmp_path, calls, monkeypatch, drop):
    """Advantage and minibatch of every sampled token; any text is an action and may pay. The mark is the game's."""
    if drop:
        monkeypatch.setattr(Words, "end_of_thought", " so", raising=False)
    main(Args(**QUICK, run_dir=str(tmp_path), drop_thoughts=drop))
    [((policy, *_), episodes)] = calls["collect_groups"]
    batches = [batch for (_, _, batch, _), _ in calls["update"]]
    returns = np.array([sum(turn.reward for turn in e.turns) for e in episodes]).reshape(4, 3)
    spread = returns.std(axis=1, ddof=1, keepdims=True)
    advantages = ((returns - returns.mean(axis=1, keepdims=True)) / (spread + 1e-6)).flatten()
    for part, batch in enumerate(batches):
        expected = [advantages[i] for i, e in enumerate(episodes) if i // 3 % 2 == part
                    for turn in e.turns for _ in range(turn.num_sampled)]
        mask = batch["turn_id"] >= 0
        assert batch["advantages"][mask].tolist() == pytest.approx(expected, abs=1e-4) and any(expected)
    rows, turns = table(tmp_path), [turn for e in episodes for turn in e.turns]
    assert sum(len(batch["tokens"]) for batch in batches) == (len(turns) if drop else 12)
    assert rows[1]["generated_tokens"] == sum(turn.num_sampled for turn in turns)
    assert rows[1]["groups_without_signal"] == (spread == 0).mean()
    for name, played in (("train", episodes), ("eval", calls["evaluate"][1][1][1])):
        turns = [turn for e in played for turn in e.turns]
        closed = [policy.tokenizer.decode(turn.token_ids[6 : max(turn.forced) + 1])
                  for turn in turns if len(turn.forced) > 1]  # a mark is several bytes here
        assert all(text.startswith(" so" if drop else "</think>") for text in closed)
        assert rows[1][f"{name}_forced_closes"] == pytest.approx(len(closed) / len(turns)) and closed
        cost = np.mean([sum(range(len(e.turns) + 1)) for e in played])
        assert rows[1][f"{name}_history_cost"] == pytest.approx(cost)


def test_an_overrun_costs_by_hand(searcher):
    """Thoughts 3, 5 | 0, 3, 1 with a cap of 3: the first was closed there, the second is longer; each costs 0.25."""
    policy = budget_policy(searcher, thought_cap=3, overrun_penalty=0.25)
    rewards = [[policy.reward(turn) - turn.reward for turn in e.turns] for e in hand_made(policy, False)]
    assert rewards == [[-0.25, -0.25], [0, 0, 0]]


def test_a_run_is_trained_on_what_is_left_after_overruns(tmp_path, calls):
    flags = QUICK | {"cap": "none", "thought_cap": 3, "overrun_penalty": 0.5}
    main(Args(**flags, run_dir=str(tmp_path)))
    [((policy, *_), episodes)] = calls["collect_groups"]
    late = [sum(policy.thought_length(turn) > 3 for turn in e.turns) for e in episodes]
    assert len(set(late)) > 1
    returns = [sum(turn.reward for turn in e.turns) - 0.5 * n for e, n in zip(episodes, late, strict=True)]
    returns = np.array(returns).reshape(4, 3)
    spread = returns.std(axis=1, ddof=1, keepdims=True)
    advantages = ((returns - returns.mean(axis=1, keepdims=True)) / (spread + 1e-6)).flatten()
    for part, batch in enumerate(batch for (_, _, batch, _), _ in calls["update"]):
        expected = [advantages[i] for i, e in enumerate(episodes) if i // 3 % 2 == part
                    for turn in e.turns for _ in range(turn.num_sampled)]
        assert batch["advantages"][batch["turn_id"] >= 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_turn_limits_come_from_a_pilot_and_stay(tmp_path, calls):
    """Of all its episodes, failures too; the same in evaluations and on resume. Every prompt tells the limit."""
    flags = QUICK | {"env_kwargs": '{"max_turns": 12}', "max_turns": 12, "context_limit": 320, "thought_cap": 3,
                     "turn_limit": "dynamic", "reminder": True}
    main(Args(**flags, run_dir=str(tmp_path)))
    [folder] = tmp_path.glob("*")
    main(Args(**(flags | {"num_iterations": 2}), run_dir=str(tmp_path), resume=str(folder)))
    assert [iteration for (*_, iteration), _ in calls["collect_groups"]] == [2**40, 0, 2**40, 1]
    pilot, one, _, two = (played for _, played in calls["collect_groups"])
    assert {e.turns[0].observation.split(" ", 2)[2] for e in pilot} == {"left 12"}
    first, last = (int(np.percentile([len(e.turns) for e in pilot], percentile)) for percentile in (50, 75))
    assert first < last < 12 and len(calls["evaluate"]) == 3
    teacher = calls["load_policy"][0][0][1]
    assert {teacher.reset(seed=seed)[0].split()[-1] for seed in range(200)} == {str(n) for n in range(1, 13)}
    for episode in one + two + [e for _, (_, played) in calls["evaluate"] for e in played]:
        assert episode.turns[0].observation.endswith(f" left {first}")
        assert len(episode.turns) <= last and episode.truncated == (not episode.terminated)
    assert [(r["turn_limit_first"], r["turn_limit_last"]) for r in table(tmp_path)[1:]] == [(first, last)] * 2


@pytest.mark.parametrize("tokens,warned", [(40, True), (200, False)])
def test_a_context_in_which_most_episodes_do_not_fit_is_warned_of(tokens, warned, tmp_path, capsys):
    flags = {"env_id": "turnrl/ThinkSearch-v0", "context_limit": tokens, "max_turns": 4, "eval_only": True}
    main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    assert ("100% of the episodes end because the context is full" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("flags,needle", [
    ({"group_size": 1}, "--group-size"), ({"context_limit": 8}, "too much to answer in a context of 8 tokens")])
def test_bad_flags_get_one_line(flags, needle, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(Args(**(QUICK | flags), run_dir=str(tmp_path)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and needle in lines[0]
