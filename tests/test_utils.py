"""Tokens, rollouts, batches and log-probs: what every script relies on."""

import copy
import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from conftest import Script, byte_tokenizer, random_model, random_policy, streams
from envs.episodes import Episode, Turn, start_episodes
from policies import Policy
from rollouts import (
    Decoder, GrowingLayer, collect_groups, episode_metrics, evaluate, groups_without_signal,
    make_envs, rollout, sample_answers, sample_tokens,
)
from utils import (
    RunArgs, batch_logprobs, collate, expand_to_tokens, micro_batches, minibatches, over_processes,
    random_stream, select_rows, token_entropy, token_logprobs, turn_table,
)

LAKE, WORDS = "turnrl/FrozenLake-v0", "words:tests/Words-v0"
CPU = torch.device("cpu")
MODELS = ["llama", "qwen3", "mistral", "lfm2"]  # mistral: a sliding window; lfm2: a recurrent layer


def ragged(episode, used):
    """A cap that differs by seed and turn."""
    return 1 + (episode.seed + 2 * len(episode.turns)) % 5


def forced_twice(episode, used, token_ids):
    """Puts tokens into the rows of seed 3: at the start of every turn, and three after its third token."""
    return ([80] if not token_ids else [81] * 3 if len(token_ids) == 3 else []) if episode.seed == 3 else []


def play(policy, started, env_id=LAKE, seeds=(1, 1, 2, 3, 4), history_turns=None, cap=ragged, force=None, max_turns=6):
    envs, episodes = started(env_id, list(seeds))
    policy.history_turns = history_turns
    policy.turn_cap = cap if callable(cap) else lambda episode, used: cap
    policy.force = force or Policy.force.__get__(policy)
    return rollout(policy, envs, episodes, streams(len(envs)), max_turns, temperature=1.3)


def largest_error(policy, episodes):
    batch = collate(episodes, policy.device)
    logprobs, _ = batch_logprobs(policy, batch, RunArgs(temperature=1.3))
    return (logprobs - batch["old_logprobs"]).abs().max().item()


# --- exact log-probs -------------------------------------------------------------------------------


@pytest.mark.parametrize("history_turns", [None, 0, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_rollout_logprobs_equal_a_full_recompute(kind, started, history_turns):
    """Ragged rows: several lengths of prompt and answer, episodes that end early; with and without forced tokens."""
    policy = random_policy(kind)
    for force in (None, forced_twice):
        episodes = play(policy, started, WORDS, history_turns=history_turns, force=force)
        turns = [turn for episode in episodes for turn in episode.turns]
        assert len({len(turn.token_ids) for turn in turns}) > 2 and len({len(e.turns) for e in episodes}) > 1
        assert any(turn.forced for turn in turns) == (force is not None)
        assert largest_error(policy, episodes) <= 1e-4
    if kind == "mistral" and history_turns is None:
        policy.windowed = False  # a cache that is not restarted gets it wrong
        assert largest_error(policy, play(policy, started, WORDS, force=forced_twice)) > 1e-3


@pytest.mark.parametrize("env_id", [LAKE, "turnrl/Snake-v0", "Taxi-v4"])
def test_rollout_logprobs_are_exact_in_other_environments(chat_policy, started, env_id):
    assert largest_error(chat_policy, play(chat_policy, started, env_id)) <= 1e-4


def test_token_logprobs_equal_a_loop_over_single_rows(chat_policy, started):
    """One row at a time, no padding, every position: the shift and the columns are right; the temperature matters."""
    batch = collate(play(chat_policy, started, history_turns=0), CPU)
    logprobs, entropy = token_logprobs(chat_policy, batch, temperature=0.7)
    for row in range(0, len(batch["tokens"]), 5):
        ids = batch["tokens"][row, : batch["lengths"][row]]
        with torch.no_grad():
            logits = chat_policy.model(ids[None]).logits[0].double() / 0.7
        for t in range(1, len(ids)):
            p = torch.softmax(logits[t - 1], -1)
            expected = [p[ids[t]].log().item(), -(p * p.log()).sum().item()] if batch["turn_id"][row, t] >= 0 else [0, 0]
            assert [logprobs[row, t].item(), entropy[row, t].item()] == pytest.approx(expected, abs=1e-4)
    assert (logprobs[batch["turn_id"] < 0] == 0).all() and (entropy[batch["turn_id"] < 0] == 0).all()


@pytest.mark.parametrize("kind", MODELS)
def test_the_decoder_gives_the_logits_of_a_full_pass_and_feeds_only_what_is_new(kind, monkeypatch):
    """As in a rollout: eight turns begin with several tokens in every row and go on by single ones, while fewer and fewer
    rows are active; in every third turn one row gets two at once, and twice a row is dropped."""
    policy, rng, widths = random_policy(kind), np.random.default_rng(0), []
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids, **more: widths.append(ids.shape[1]) or forward(ids, **more))
    rows = [rng.integers(200, size=n).tolist() for n in (3, 30, 1, 12)]
    decoder, active = Decoder(policy, len(rows)), []
    for turn, step in itertools.product(range(8), range(4)):
        if turn in (3, 6) and step == 0:
            decoder.keep([n for n in range(len(rows)) if n != 1])
            del rows[1]
        active = list(range(len(rows))) if step == 0 else [n for n in active if rng.random() < 0.8] or active[:1]
        for n in active:
            count = rng.integers(2, 6) if step == 0 else 2 if turn % 3 == 0 and step == 2 and n == active[-1] else 1
            rows[n] = rows[n] + rng.integers(200, size=count).tolist()
        most = max(len(rows[n]) - decoder.fed[n] for n in active)
        with torch.no_grad():
            logits = decoder.feed(rows, active)
            for n in active:
                assert (logits[n] - policy.model(torch.tensor([rows[n]])).logits[0, -1]).abs().max() < 1e-4
        assert widths[-1] == most or (policy.windowed and most > 1 and widths[-1] == max(map(len, rows)))
    assert (max(widths[1:]) > 40) == policy.windowed == (kind in ("mistral", "lfm2"))


@pytest.mark.parametrize("kind,shared", [("llama", 20), ("qwen3", 20), ("llama", 15), ("mistral", 20)])
def test_what_all_rows_begin_with_is_read_once(kind, shared, monkeypatch):
    """The first pass reads it in one row, the second the rest of all rows. Not if it is short or the model
    has a window. A row that is nothing else keeps its last token for the second pass; a row may be read on later."""
    policy, rng, shapes = random_policy(kind), np.random.default_rng(0), []
    forward, policy.worth_sharing = policy.forward, 16
    monkeypatch.setattr(policy, "forward", lambda ids, **more: shapes.append(tuple(ids.shape)) or forward(ids, **more))

    def feed(decoder, rows, active):
        with torch.no_grad():
            logits = decoder.feed(rows, active)
            for n in active:
                assert (logits[n] - policy.model(torch.tensor([rows[n]])).logits[0, -1]).abs().max() < 1e-4

    first = rng.integers(200, size=shared + 1).tolist()
    rows, decoder = [first, [*first, 3, 4, 5], [*first, 7]], Decoder(policy, 3)
    feed(decoder, rows, [0, 1, 2])
    once = kind != "mistral" and shared >= 16
    assert shapes == ([(1, shared), (3, 4)] if once else [(3, shared + 4)])
    decoder.keep([0, 2])
    rows = [[*rows[0], 9], [*rows[2], 8, 8]]
    feed(decoder, rows, [0, 1])  # the cache goes on from there, with a row less
    decoder = Decoder(policy, 3)
    feed(decoder, [first, [*first, 4], [*first, 5, 6]], [0, 2])
    feed(decoder, [[*first, 8], [*first, 4], [*first, 5, 6, 7]], [0, 1, 2])


@pytest.mark.parametrize("kind,least,once", [
    ("llama", 20, True), ("qwen3", 20, True), ("llama", 21, False), ("mistral", 20, False),
    ("llama checkpointed", 20, False)])
def test_an_update_reads_once_what_all_rows_begin_with(kind, least, once, monkeypatch):
    """Log-probs, entropies and gradients are those of rows that are read one by one. The answers begin
    alike, too (two sampled tokens of the 20); the third row is nothing else but its last token."""
    policy, rng, shapes = random_policy(kind.split()[0]), np.random.default_rng(0), []
    policy.worth_sharing, policy.checkpointed = least, policy.model.model.layers if "checkpointed" in kind else []
    first, ends = rng.integers(1, 200, size=20).tolist(), ([3, 4, 5, 6], [7, 8], [9])
    batch = collate([Episode(0, "", [Turn("", "", first[:18], True, first[18:] + end, [0.0] * (2 + len(end)))])
                     for end in ends], policy.device)

    def passes(batches):
        policy.model.zero_grad()
        found = []
        for part in batches:
            logprobs, entropy = token_logprobs(policy, part, 0.7)
            (logprobs * (1 + part["turn_id"]) + entropy.square()).sum().backward()
            found += [(a[m], b[m]) for a, b, m in zip(logprobs, entropy, part["turn_id"] >= 0, strict=True)]
        return found, [p.grad.clone() for p in policy.model.parameters()]

    alone, alone_grads = passes([select_rows(batch, [n]) for n in range(3)])
    forward = policy.model.forward
    monkeypatch.setattr(policy.model, "forward",
                        lambda ids, **more: shapes.append(tuple(ids.shape)) or forward(ids, **more))
    together, grads = passes([batch])
    assert shapes == [*([(1, 20), (3, 4)] if once else [(3, 24)]), (1, 13)]  # at last the 13 sampled tokens' logits
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(alone_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_model_knows(chat_policy, name):
    """transformers 5.24 renamed it and warns of the old name; a model that takes neither would forget the history."""
    model, caches = chat_policy.model, []
    real, real_name = model.forward, chat_policy.cache_name

    def forward(input_ids, past_key_values=None, cache=None, **kwargs):
        caches.append(past_key_values if name == "past_key_values" else cache)
        return real(input_ids, **{real_name: caches[-1]}, **kwargs)

    keep = [p for p in inspect.signature(forward).parameters.values()
            if p.name in ("input_ids", "kwargs", name)]
    forward.__signature__ = inspect.Signature(keep)
    model.forward = forward
    decoder = Decoder(Policy(model, chat_policy.tokenizer, "cpu"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.feed([[70, 71]])
        logits = decoder.feed([[70, 71, 72]])
    assert [cache for cache in caches if cache is not None] == [decoder.cache] * 2
    torch.testing.assert_close(logits, chat_policy.forward(torch.tensor([[70, 71, 72]]))[:, -1])


def test_keys_and_values_may_have_different_widths():
    layer, pieces = GrowingLayer(), []
    for length in (3, 1, 1, 5, 1):
        pieces.append((torch.randn(2, 1, length, 4), torch.randn(2, 1, length, 6)))
        for got, expected in zip(layer.update(*pieces[-1]), zip(*pieces, strict=True), strict=True):
            assert torch.equal(got, torch.cat(expected, 2))


def test_what_an_episode_samples_does_not_depend_on_the_batch(chat_policy, started):
    together = play(chat_policy, started, seeds=[1, 2, 3])
    envs, [alone] = started(LAKE, [3])
    rollout(chat_policy, envs, [alone], streams(1, first=2), max_turns=6, temperature=1.3)
    assert [turn.token_ids for turn in alone.turns] == [t.token_ids for t in together[2].turns]


@pytest.mark.parametrize("history_turns", [None, 0])
def test_a_fork_goes_on_from_its_prefix(chat_policy, started, history_turns):
    """Fork every episode after its second turn: the prefix stays, log-probs stay exact."""
    envs, episodes = started(LAKE, [1, 2, 3, 4])
    chat_policy.history_turns, chat_policy.max_turn_tokens = history_turns, 5
    rollout(chat_policy, envs, episodes, streams(4), max_turns=2, temperature=1.3)
    cut = [n for n, e in enumerate(episodes) if not e.terminated]
    forks, copies = (copy.deepcopy([x[n] for n in cut]) for x in (episodes, envs))
    for fork in forks:
        fork.truncated = False
    rollout(chat_policy, copies, forks, streams(len(forks), first=50), max_turns=5, temperature=1.3)
    assert len(forks) >= 2 and any(len(fork.turns) > 3 for fork in forks)
    assert all(fork.turns[:2] == episodes[n].turns[:2] for fork, n in zip(forks, cut, strict=True))
    assert largest_error(chat_policy, forks) <= 1e-4


def test_sampling_is_from_the_whole_untruncated_distribution():
    """103 tokens, 20,000 draws: each frequency within 5 sigma; a top-k of 50 would leave zeros."""
    logits = torch.linspace(-1, 1, 103)[None].expand(20000, -1)
    uniforms = torch.tensor(np.random.default_rng(0).random(20000))
    tokens, logprobs = sample_tokens(logits, 0.8, uniforms)
    p = torch.softmax(logits[0] / 0.8, -1)
    frequency = torch.bincount(tokens, minlength=103) / 20000
    assert ((frequency - p).abs() < 5 * (p / 20000).sqrt()).all() and frequency.min() > 0
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)


def test_sampling_never_takes_a_token_of_probability_zero():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(4, -1)
    tokens, _ = sample_tokens(logits, 1.0, torch.tensor([0.0, 0.49, 0.51, 1 - 2**-53], dtype=torch.double))
    assert tokens.tolist() == [3, 3, 1, 1]


@pytest.mark.parametrize("history_turns", [None, 0])
def test_in_bf16_the_old_logprobs_are_those_of_the_training_pass(chat_policy, history_turns):
    """Ratio exactly 1 before the first step, although decoding rounds differently; forced tokens keep their 0."""
    chat_policy.bf16, chat_policy.history_turns, chat_policy.max_turn_tokens = True, history_turns, 4
    chat_policy.force = lambda episode, used, ids: [80] if len(ids) == 1 else []
    args = RunArgs(num_prompts=3, group_size=2, max_turns=3)
    episodes = collect_groups(chat_policy, make_envs(args, 6), args, 0)
    batch = collate(episodes, CPU)
    logprobs, _ = token_logprobs(chat_policy, batch, args.temperature)
    assert torch.allclose(logprobs, batch["old_logprobs"], atol=1e-5) and any(t.forced for e in episodes for t in e.turns)
    assert all(p.dtype == torch.float32 for p in chat_policy.model.parameters())


# --- which tokens are trained ----------------------------------------------------------------------


def test_the_mask_covers_exactly_the_sampled_tokens(tiny_policy, started, monkeypatch):
    """One row, two turns of an always-left policy; the second is cut by its cap of 2.

    tokens:  <|user|> P _ .. G <|assistant|> left <|end|> <|user|> P _ .. G <|assistant|> left left
    turn_id:    -1   -1    -1       -1        0     0       -1    -1     -1      -1         1    1
    and the next prompt begins with the <|end|> that was not sampled (mask 0).
    """
    [left] = tiny_policy.encode("left")
    end = tiny_policy.end_id
    monkeypatch.setattr("rollouts.sample_tokens", Script(tiny_policy, [[left, end, left, left]]))
    [episode] = play(tiny_policy, started, seeds=[1], max_turns=3, cap=2)
    batch = collate([episode], CPU)
    observation = tiny_policy.encode(episode.turns[0].observation)
    feedback = tiny_policy.encode(episode.turns[2].observation)
    prompt = [1, *observation, 2]
    assert batch["tokens"][0].tolist() == [
        *prompt, left, end, *prompt, left, left, end, 1, *feedback, 2, left, left]
    n = len(prompt)
    assert batch["turn_id"][0].tolist() == [
        *[-1] * n, 0, 0, *[-1] * n, 1, 1, *[-1] * (len(feedback) + 3), 2, 2]
    assert [turn.action for turn in episode.turns] == ["left", "leftleft", "leftleft"]
    assert episode.turns[2].observation.startswith("Unknown action")


def test_forced_tokens_stand_in_the_answer_and_are_not_trained(chat_policy, monkeypatch):
    """Three rows that sample 9 for ever: forced from the start, forced to end, and cut by the cap.

    row 0: prompt 5 6, put in 70, sampled 9, put in 71 72, sampled 9 (the cap counts all five)
    """
    monkeypatch.setattr("rollouts.sample_tokens", Script(chat_policy, [[9], [9], [9]]))
    rows, turns, end = [[5, 6], [5], [5, 6, 7]], [Turn("", "", [5, 6]), Turn("", "", [5]), Turn("", "", [5, 6, 7])], chat_policy.end_id
    forces = [lambda ids: {0: [70], 2: [71, 72]}.get(len(ids), []), lambda ids: [end] if ids == [9, 9] else [], lambda ids: []]
    sample_answers(Decoder(chat_policy, 3), rows, turns, [5, 7, 4], torch.zeros(3, 7), 1.0, forces)
    assert [turn.token_ids for turn in turns] == [[70, 9, 71, 72, 9], [9, 9, end], [9] * 4]
    assert [turn.forced for turn in turns] == [{0, 2, 3}, {2}, set()] and [turn.num_sampled for turn in turns] == [2, 2, 4]
    assert turns[0].logprobs == [0.0, -0.5, 0.0, 0.0, -0.5] and rows[0] == [5, 6, 70, 9, 71, 72, 9]
    batch = collate([Episode(0, "", [turn]) for turn in turns], CPU)
    assert batch["turn_id"].tolist() == [[-1, -1, -1, 0, -1, -1, 0], [-1, 0, 0, -1, -1, -1, -1], [-1, -1, -1, 0, 0, 0, 0]]


def test_a_sampled_end_of_turn_is_trained_even_if_padding_is_the_same_token(chat_policy, started, monkeypatch):
    end = chat_policy.end_id
    assert chat_policy.tokenizer.pad_token_id == end
    monkeypatch.setattr("rollouts.sample_tokens", Script(chat_policy, [[9, end], [end, 9], [9, 9]]))
    episodes = play(chat_policy, started, seeds=[1, 2, 3], cap=2, max_turns=1)
    assert [e.turns[0].token_ids for e in episodes] == [[9, end], [end], [9, 9]]
    batch = collate(episodes, CPU)
    is_end = (batch["tokens"] == end) & (batch["turn_id"] >= 0)
    assert is_end.sum(1).tolist() == [1, 1, 0]
    logprobs, _ = token_logprobs(chat_policy, batch, 1.3)
    logprobs[is_end].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in chat_policy.model.parameters())


def test_outside_text_cannot_contain_a_special_token(chat_policy, tiny_policy):
    for policy, text in ((chat_policy, "a<|im_end|>b<|im_start|>"), (tiny_policy, "<|end|>left")):
        ids = policy.encode(text)
        assert not set(ids) & set(policy.tokenizer.all_special_ids)
        assert policy.tokenizer.decode(ids) == text


def test_the_tiny_tokenizer_keeps_every_text(tiny_policy):
    for text in ("P___\nOO_G", "left", " two  spaces", "tab\tand é 😀 \x00", "", "<|pad|>"):
        assert tiny_policy.tokenizer.decode(tiny_policy.encode(text)) == text
    assert [len(tiny_policy.encode(word)) for word in ("left", "down", "right", "up")] == [1] * 4
    assert len(tiny_policy.encode("P_O\nG__")) == 7, "one token a cell"


def test_the_history_of_the_tiny_model_is_what_its_template_renders(tiny_policy, started):
    envs, [episode] = started(LAKE, [5])
    chat = []
    for word in ("left", "jump", "up"):
        chat.append({"role": "user", "content": episode.observation})
        ids, starts_row = tiny_policy.prompt(episode)
        turn = Turn(episode.observation, word, ids, starts_row, [*tiny_policy.encode(word), tiny_policy.end_id])
        rendered = tiny_policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tiny_policy.tokenizer.decode(([] if starts_row else episode.row()) + ids) == rendered
        chat.append({"role": "assistant", "content": word})
        episode.answer(envs[0], turn)


def test_windows_show_the_last_turns_only(tiny_policy, started):
    turns = play(tiny_policy, started, seeds=[1], history_turns=1, max_turns=4, cap=8)[0].turns
    assert all(turn.starts_row for turn in turns) and len(turns) > 2
    text = tiny_policy.tokenizer.decode(turns[2].prompt_ids)
    assert text.startswith("<|user|>" + turns[1].observation + "<|assistant|>" + turns[1].action)
    assert text.endswith("<|end|><|user|>" + turns[2].observation + "<|assistant|>")
    assert text.count("<|user|>") == 2


def test_a_template_that_ends_an_answer_with_ordinary_text_is_refused():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(template, ["<s>"], "<s>")
    with pytest.raises(ValueError, match="does not end an answer"):
        Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu")


# --- rollouts --------------------------------------------------------------------------------------


def test_caps_may_differ_by_turn_and_play_stops_at_the_first_end(chat_policy, started):
    """Rows that ended earlier than others are neither played on nor paid again."""
    cap = lambda episode, used: 2 + 3 * len(episode.turns)  # noqa: E731
    episodes = play(chat_policy, started, max_turns=3, seeds=range(12), cap=cap)
    for episode in episodes:
        assert len(episode.turns) <= 3 and episode.terminated != episode.truncated
        assert all(turn.reward <= 0 for turn in episode.turns[:-1])
        for k, turn in enumerate(episode.turns):
            assert 1 <= len(turn.token_ids) <= 2 + 3 * k
            assert len(turn.token_ids) == 2 + 3 * k or turn.token_ids[-1] == chat_policy.end_id
    assert max(len(t.token_ids) for e in episodes for t in e.turns[1:]) > 2


def test_a_full_context_truncates_the_episode_and_play_goes_on(tiny_policy, started):
    tiny_policy.context_length = 90
    episodes = play(tiny_policy, started, seeds=range(6), max_turns=50, cap=4, env_id="turnrl/Snake-v0")
    cut = [e for e in episodes if e.overflowed]
    assert cut and all(e.truncated and not e.terminated and e.turns for e in cut)
    assert all(len(e.row()) <= 90 for e in episodes)
    tiny_policy.context_length = 10
    episodes = play(tiny_policy, started, seeds=[0, 1], cap=4)
    assert all(e.overflowed and not e.turns for e in episodes)
    assert collate(episodes, CPU)["tokens"].shape == (0, 1)
    table, mask = turn_table(episodes, lambda turn: turn.reward, CPU)
    assert table.shape == (2, 1) and not mask.any() and isinstance(episodes[0].total_reward, float)


def test_the_turn_limit_is_no_full_context(tiny_policy, started):
    """After one turn the context has no room for another, but nobody asks for one."""
    envs, episodes = started(LAKE, [1])
    tiny_policy.context_length, tiny_policy.max_turn_tokens = len(tiny_policy.prompt(episodes[0])[0]) + 3, 3
    rollout(tiny_policy, envs, episodes, streams(1), max_turns=1, temperature=1.0)
    assert episodes[0].truncated and not episodes[0].overflowed and len(episodes[0].turns) == 1


def test_members_of_a_group_start_alike_and_groups_do_not(tiny_policy):
    tiny_policy.max_turn_tokens, args = 2, RunArgs(num_prompts=6, group_size=4, max_turns=2)
    episodes = collect_groups(tiny_policy, make_envs(args, 24), args, iteration=3)
    first = [e.turns[0].observation for e in episodes]
    groups = [set(first[i : i + 4]) for i in range(0, 24, 4)]
    assert all(len(group) == 1 for group in groups) and len(set().union(*groups)) > 3
    assert len({tuple(t.token_ids) for e in episodes[:4] for t in e.turns}) > 1, "but play differs"
    again = collect_groups(tiny_policy, make_envs(args, 24), args, iteration=3)
    other = collect_groups(tiny_policy, make_envs(args, 24), args, iteration=4)
    assert again == episodes and [e.seed for e in other] != [e.seed for e in episodes]


def test_training_and_evaluation_seeds_are_disjoint(tiny_policy):
    tiny_policy.max_turn_tokens = 1
    args = RunArgs(num_prompts=30, group_size=1, max_turns=1, eval_episodes=40)
    envs = make_envs(args, 30)
    trained = {e.seed for i in range(6) for e in collect_groups(tiny_policy, envs, args, i)}
    _, episodes = evaluate(tiny_policy, make_envs(args, 16, evaluation=True), args)
    evaluated = [e.seed for e in episodes]
    assert max(trained) < 2**30 <= min(evaluated)
    assert len(trained) > 150 and evaluated == [2**30 + i for i in range(40)]


def test_start_episodes_resets_each_environment_with_its_seed():
    one, two, three = start_episodes(make_envs(RunArgs(), 3), [7, 7, 8])
    assert one.observation == two.observation and one.seed == 7 and three.seed == 8


@pytest.mark.parametrize("terminated,truncated", [(True, True), (True, False), (False, True)])
def test_an_end_and_a_time_limit_in_one_step_are_one_termination(terminated, truncated):
    """gymnasium's TimeLimit may report both: a value must then not be bootstrapped."""
    env = make_envs(RunArgs(), 1)[0]
    env.step = lambda action: ("end", 1.0, terminated, truncated, {"success": True})
    [episode] = start_episodes([env], [0])
    episode.answer(env, Turn("start", "go"))
    assert (episode.terminated, episode.truncated) == (terminated, not terminated)
    assert episode.done and episode.total_reward == 1.0 and episode.success


# --- batches ---------------------------------------------------------------------------------------


def toy_episode(*turns) -> Episode:
    """turns: (prompt, answer, starts_row)"""
    return Episode(0, "", [Turn("", "", list(p), starts, list(a), [-0.1] * len(a), reward=float(k))
                           for k, (p, a, starts) in enumerate(turns, start=1)])


def test_collate_by_hand():
    """Episode 0 keeps its history (one row), episode 1 starts a row each turn.

    row 0: 5 5 | 7 7 | 6 | 8      row 1: 5 | 9      row 2: 5 5 5 | 9
    """
    episodes = [toy_episode(([5, 5], [7, 7], True), ([6], [8], False)),
                toy_episode(([5], [9], True), ([5, 5, 5], [9], True))]
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    batch = collate(episodes, CPU, values)
    assert batch["tokens"].tolist() == [[5, 5, 7, 7, 6, 8], [5, 9, 0, 0, 0, 0], [5, 5, 5, 9, 0, 0]]
    assert batch["turn_id"].tolist() == [[-1, -1, 0, 0, -1, 1], [-1, 0, -1, -1, -1, -1],
                                         [-1, -1, -1, 1, -1, -1]]
    assert batch["old_logprobs"].ne(0).tolist() == (batch["turn_id"] >= 0).tolist()
    assert batch["episode_id"].tolist() == [0, 1, 1] and batch["lengths"].tolist() == [6, 2, 4]
    assert batch["advantages"].tolist() == [[0, 0, 1, 1, 0, 2], [0, 3, 0, 0, 0, 0], [0, 0, 0, 4, 0, 0]]
    assert torch.equal(expand_to_tokens(values, batch["turn_id"], batch["episode_id"]), batch["advantages"])
    assert "advantages" not in collate(episodes, CPU)


def test_turn_table_pads_with_zero_and_knows_turns_of_zero_reward():
    episodes = [toy_episode(([5], [7], True), ([5], [7], True)), toy_episode(([5], [7], True))]
    episodes[0].turns[0].reward = 0.0
    table, mask = turn_table(episodes, lambda turn: turn.reward, CPU)
    assert table.tolist() == [[0, 2], [1, 0]] and mask.tolist() == [[True, True], [True, False]]
    episodes[0].turns[1].reward = 0.1  # per turn it is 0.1 in double, per token in single precision
    table, _ = turn_table(episodes, lambda turn: turn.reward, CPU)
    tokens = collate(episodes, CPU, table)["advantages"]
    assert table[0, 1].item() == 0.1 and tokens.dtype == torch.float32 and tokens.max(1)[0].tolist() == pytest.approx([0, 0.1, 1])


def test_parts_of_a_batch_lose_only_padding_and_have_the_same_logprobs(chat_policy, started):
    batch = collate(play(chat_policy, started, history_turns=0), CPU)
    shortest = int(batch["lengths"].argmin())
    assert select_rows(batch, [shortest])["tokens"].shape[1] == batch["lengths"][shortest] < batch["tokens"].shape[1]
    batch["number"], whole = torch.arange(len(batch["tokens"])), token_logprobs(chat_policy, batch, 1.0)
    for tokens in (1, 200, 10**6):
        parts = list(micro_batches(batch, tokens))
        assert sorted(n for part in parts for n in part["number"].tolist()) == batch["number"].tolist()
        assert all(part["tokens"].numel() <= tokens or len(part["tokens"]) == 1 for part in parts)
        for part, values in zip(batch_logprobs(chat_policy, batch, RunArgs(micro_batch_tokens=tokens)), whole, strict=True):
            assert torch.allclose(part, values, atol=1e-5) and not part.requires_grad  # log-probs, entropies


def test_minibatches_are_whole_groups_and_those_without_signal_are_left_out():
    """Seven groups of two dealt out to three minibatches: groups 0 3 6, 1 4, 2 5; all of 1 and 4 is silent."""
    group, credit = torch.arange(14) // 2, torch.ones(14, 2)
    credit[[2, 3, 8, 9]] = 0.0
    assert [part.tolist() for part in minibatches(group, credit, 3)] == [[0, 1, 6, 7, 12, 13], [4, 5, 10, 11]]
    assert groups_without_signal(credit, 2) == pytest.approx(2 / 7)
    credit[2], credit[3] = torch.tensor([0.0, 0.5]), torch.tensor([0.0, -0.5])  # they add up to 0
    assert len(list(minibatches(group, credit, 3))) == 3 and groups_without_signal(credit, 2) == pytest.approx(1 / 7)


# --- statistics ------------------------------------------------------------------------------------


def test_episode_metrics_are_means_over_episodes_or_turns():
    one, two = toy_episode(([5], [7, 7], True), ([5], [7], True)), toy_episode(([5], [7, 7, 7, 7], True))
    one.info, two.truncated, two.turns[0].info, two.turns[0].forced = {"success": True}, True, {"invalid_action": True}, {0}
    assert episode_metrics([one, two]) == pytest.approx({
        "success": 1 / 2, "return": (3 + 1) / 2, "turns": 3 / 2, "truncated": 1 / 2, "overflowed": 0,
        "tokens_per_turn": (2 + 1 + 3) / 3, "invalid_actions": 1 / 3})
    assert "tokens_per_turn" not in episode_metrics([Episode(0, "")]), "no mean of nothing"
    assert over_processes({"a": torch.tensor(2.0), "b": torch.tensor(0.5)}) == {"a": 2.0, "b": 0.5}


def test_token_entropy_by_hand():
    for logits, value, slopes in (([1.0, 0.0, -1.0], 0.832396, [-0.282587, 0.140770, 0.141817]),
                                  ([1.0, 0.0, -math.inf], 0.582203, [-0.196612, 0.196612, 0.0])):
        logits = torch.tensor(logits, requires_grad=True)
        entropy = token_entropy(logits)
        entropy.backward()
        assert entropy.item() == pytest.approx(value, abs=1e-5)
        assert logits.grad.tolist() == pytest.approx(slopes, abs=1e-5)


def test_streams_differ_by_every_part_of_their_name_and_repeat():
    draws = {key: random_stream(*key).random() for key in [(1, 0), (1, 1), (2, 0), (1, 0, 0, 1)]}
    assert len(set(draws.values())) == 4 and random_stream(1, 0).random() == draws[1, 0]
