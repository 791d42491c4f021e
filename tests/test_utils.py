"""Tokens, rollouts, batches and log-probs: what every script relies on."""

import copy
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
import transformers

from conftest import Script, byte_tokenizer, random_model, streams
from envs.episodes import Episode, Turn, start_episodes
from policies import load_policy
from utils import (
    Decoder, GrowingLayer, Policy, RunArgs, StaticDecoder, batch_logprobs, collate, collect_groups, evaluate,
    expand_to_tokens, make_envs, micro_batches, random_stream, rollout, sample_tokens, select_rows, token_entropy,
    token_logprobs, turn_table,
)

LAKE = "turnrl/FrozenLake-v0"


def play(policy, started, env_id=LAKE, seeds=(1, 1, 2, 3, 4), history_turns=None, **options):
    ragged = lambda episode, used: 1 + (episode.seed + 2 * len(episode.turns)) % 5  # noqa: E731
    options = {"max_turns": 6, "max_turn_tokens": ragged, "temperature": 1.3} | options
    envs, episodes = started(env_id, list(seeds))
    rngs = streams(len(envs))
    return rollout(policy, envs, episodes, rngs, history_turns=history_turns, **options)


# --- exact log-probs -----------------------------------------------------------------------------


@pytest.mark.parametrize("history_turns", [None, 0, 1, 2])
@pytest.mark.parametrize("env_id", [LAKE, "turnrl/Snake-v0", "Taxi-v4"])
def test_rollout_logprobs_equal_a_full_recompute(chat_policy, started, env_id, history_turns):
    """Ragged rows: several lengths of prompt and answer, episodes that end early."""
    episodes = play(chat_policy, started, env_id, history_turns=history_turns)
    assert len({len(turn.token_ids) for e in episodes for turn in e.turns}) > 1
    batch = collate(episodes, chat_policy.device)
    logprobs, entropy = token_logprobs(chat_policy, batch, temperature=1.3)
    assert (logprobs - batch["old_logprobs"]).abs().max() <= 1e-4
    mask = batch["turn_id"] >= 0
    assert (logprobs[mask] < 0).all() and (entropy[mask] > 0).all()
    assert (logprobs[~mask] == 0).all() and (entropy[~mask] == 0).all()
    other, _ = token_logprobs(chat_policy, batch, temperature=1.0)
    assert (other - batch["old_logprobs"]).abs().max() > 1e-2, "the temperature must matter"


def test_token_logprobs_against_a_loop_of_single_rows(chat_policy, started):
    """One row at a time, no padding, every position: the shift and the columns are right."""
    batch = collate(play(chat_policy, started, history_turns=0), chat_policy.device)
    logprobs, entropy = token_logprobs(chat_policy, batch, temperature=0.7)
    for row in range(len(batch["tokens"])):
        ids = batch["tokens"][row, : batch["lengths"][row]]
        with torch.no_grad():
            logits = chat_policy.model(ids[None]).logits[0].double() / 0.7
        for t in range(1, len(ids)):
            sampled = batch["turn_id"][row, t] >= 0
            p = torch.softmax(logits[t - 1], -1)
            expected = p[ids[t]].log().item() if sampled else 0.0
            assert logprobs[row, t].item() == pytest.approx(expected, abs=1e-4)
            expected = -(p * p.log()).sum().item() if sampled else 0.0
            assert entropy[row, t].item() == pytest.approx(expected, abs=1e-4)


def test_what_an_episode_samples_does_not_depend_on_the_batch(chat_policy, started):
    together = play(chat_policy, started, seeds=[1, 2, 3])
    envs, [alone] = started(LAKE, [3])
    rollout(chat_policy, envs, [alone], streams(1, first=2), max_turns=6, temperature=1.3,
            max_turn_tokens=lambda episode, used: 1 + (episode.seed + 2 * len(episode.turns)) % 5)
    assert [turn.token_ids for turn in alone.turns] == [t.token_ids for t in together[2].turns]


@pytest.mark.parametrize("history_turns", [None, 0])
def test_a_fork_goes_on_from_its_prefix(chat_policy, started, history_turns):
    """Fork every episode after its second turn: the prefix stays, log-probs stay exact."""
    envs, episodes = started(LAKE, [1, 2, 3, 4])
    options = {"max_turn_tokens": 5, "temperature": 1.3, "history_turns": history_turns}
    rngs = streams(4)
    rollout(chat_policy, envs, episodes, rngs, max_turns=2, **options)
    forks, copies = copy.deepcopy(episodes), copy.deepcopy(envs)
    forks = [fork for fork in forks if not fork.terminated]
    copies = [env for env, e in zip(copies, episodes, strict=True) if not e.terminated]
    assert len(forks) >= 2
    for fork in forks:
        fork.truncated = False
    rollout(chat_policy, copies, forks, streams(len(forks), first=50), max_turns=5, **options)
    assert any(len(fork.turns) > 3 for fork in forks)
    for fork, original in zip(forks, [e for e in episodes if not e.terminated], strict=True):
        assert fork.turns[:2] == original.turns[:2]
    batch = collate(forks, chat_policy.device)
    logprobs, _ = token_logprobs(chat_policy, batch, temperature=1.3)
    assert (logprobs - batch["old_logprobs"]).abs().max() <= 1e-4


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


# --- decoding with --compile ---------------------------------------------------------------------


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
    decoder = Policy(model, chat_policy.tokenizer, "cpu").decoder(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.feed([[70, 71]])
        logits = decoder.feed([[72]])
    assert caches[0] is decoder.cache
    torch.testing.assert_close(logits, chat_policy.forward(torch.tensor([[70, 71, 72]]))[:, -1])


@pytest.mark.parametrize("bf16,tolerance", [(False, 1e-4), (True, 0.15)])
def test_the_static_cache_gives_the_logits_of_the_growing_one(chat_policy, monkeypatch, bf16, tolerance):
    """30 ragged feeds of up to 5 tokens, dropped rows, a cache of 8 columns that has to be made anew."""
    monkeypatch.setattr("utils.MIN_STATIC_CACHE", 8)
    policy = Policy(chat_policy.model, chat_policy.tokenizer, "cpu", bf16=bf16)
    made, original = [], Policy.static_cache
    monkeypatch.setattr(Policy, "static_cache", lambda *size: made.append(size[1:]) or original(*size))
    growing, rng, rows = policy.decoder(5, 5), np.random.default_rng(0), 5
    policy.decode = policy.player
    static = policy.decoder(5, 5)
    assert type(growing) is Decoder and type(static) is StaticDecoder
    with torch.no_grad():
        for step in range(30):
            if step in (7, 19):
                kept = [row for row in range(rows) if row != 1]
                growing.keep(kept), static.keep(kept)
                rows -= 1
            counts = rng.integers(step == 0, 6 if step % 3 == 0 else 2, size=rows)
            counts[rng.integers(rows)] += 1
            pending = [rng.integers(200, size=n).tolist() for n in counts]
            one, two = growing.feed(pending), static.feed(pending)
            fed = torch.tensor(counts) > 0  # what a row without a new token says is not looked at
            assert (one - two)[fed].abs().max() < tolerance and one.shape == two.shape
    cached = policy.static_caches[8, 16].layers[0]
    assert cached.keys.dtype == cached.values.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert len(made) > 3 and made[0] == (8, 16) and {size[0] for size in made} == {8}


@pytest.mark.parametrize("window", [8192, 40])
def test_a_model_with_a_sliding_window(window, monkeypatch, tmp_path, chat_policy, started):
    """It is compiled in updates only (a static cache of a window counts in Python numbers: every token would be
    another graph), and the holes of a ragged history must not count as tokens of the window."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    config = transformers.MistralConfig(
        vocab_size=len(chat_policy.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=window, initializer_range=0.3)
    Policy(transformers.MistralForCausalLM(config), chat_policy.tokenizer, "cpu").save(tmp_path)
    policy = load_policy(RunArgs(model=str(tmp_path), compile=True))
    forced = {"max_turn_tokens": 12, "force": lambda e, used, ids: [80] * 5 if e.seed == 3 and len(ids) == 2 else []}
    for options in ({}, forced):  # tokens put into one row leave holes in the others
        batch = collate(play(policy, started, **options), policy.device)
        logprobs, _ = token_logprobs(policy, batch, temperature=1.3)
        assert (logprobs - batch["old_logprobs"]).abs().max() <= 1e-4 and batch["lengths"].max() > 80
    assert calls == [{"dynamic": True}] and policy.decode is None and not policy.static_caches


def test_keys_and_values_may_have_different_widths():
    layer, pieces = GrowingLayer(), []
    for length in (3, 1, 1, 5, 1):
        pieces.append((torch.randn(2, 1, length, 4), torch.randn(2, 1, length, 6)))
        for got, expected in zip(layer.update(*pieces[-1]), zip(*pieces, strict=True), strict=True):
            assert torch.equal(got, torch.cat(expected, 2))


def test_the_turn_limit_is_no_full_context(tiny_policy, started):
    """After one turn the context has no room for another, but nobody asks for one."""
    envs, episodes = started(LAKE, [1])
    tiny_policy.context_length = len(tiny_policy.prompt(episodes[0], None)[0]) + 3
    rollout(tiny_policy, envs, episodes, streams(1), max_turns=1, max_turn_tokens=3, temperature=1.0)
    assert episodes[0].truncated and not episodes[0].overflowed and len(episodes[0].turns) == 1


def test_a_process_whose_prompts_do_not_fit_has_empty_tables_of_the_usual_types():
    """Then the other processes, which have turns, gather tensors of the same number of bytes."""
    episodes = [Episode(0, "too long", overflowed=True)]
    table = turn_table(episodes, lambda turn: turn.reward, torch.device("cpu"))
    assert table[0].shape == (1, 1) and not table[1].any() and isinstance(episodes[0].total_reward, float)
    assert collate(episodes, torch.device("cpu"))["tokens"].shape == (0, 1)


def test_a_bf16_player_follows_the_fp32_weights(chat_policy):
    """Every new decoder plays what the optimizer has made of the weights; buffers (of positions) stay fp32."""
    policy = Policy(chat_policy.model, chat_policy.tokenizer, "cpu", bf16=True)
    first = policy.decoder(1, 1).feed([[5, 6, 7]])
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(0.5)
    second = policy.decoder(1, 1).feed([[5, 6, 7]])
    assert (first - second).abs().max() > 0.1
    assert all(torch.equal(p, w.to(torch.bfloat16)) and w.dtype == torch.float32
               for p, w in zip(policy.player.parameters(), policy.model.parameters(), strict=True))
    assert all(x.dtype != torch.bfloat16 for x in policy.player.buffers())


@pytest.mark.parametrize("history_turns", [None, 0])
def test_a_compiled_rollout_is_the_same_rollout(chat_policy, started, history_turns):
    """With the model in place of its compiled decode step."""
    plain = play(chat_policy, started, seeds=range(6), history_turns=history_turns)
    calls, chat_policy.player = [], chat_policy.model
    chat_policy.decode = lambda tokens, **options: calls.append(tokens.shape) or chat_policy.model(tokens, **options)
    chat_policy.compiled = chat_policy.model
    again = play(chat_policy, started, seeds=range(6), history_turns=history_turns)
    batch = collate(again, chat_policy.device)
    logprobs, _ = token_logprobs(chat_policy, batch, temperature=1.3)
    assert (logprobs - batch["old_logprobs"]).abs().max() < 1e-4
    same = [[t.token_ids for t in one.turns] == [t.token_ids for t in two.turns]
            for one, two in zip(plain, again, strict=True)]
    assert sum(same) >= 5, "rounding may move a draw over the border between two tokens, seldom"
    assert set(calls) == {(8, 1)}, "one shape, however many rows are left"


# --- which tokens are trained --------------------------------------------------------------------


def test_the_mask_covers_exactly_the_sampled_tokens(tiny_policy, started, monkeypatch):
    """One row, two turns of an always-left policy; the second is cut by its cap of 2.

    tokens:  <|user|> P _ .. G <|assistant|> left <|end|> <|user|> P _ .. G <|assistant|> left left
    turn_id:    -1   -1    -1       -1        0     0       -1    -1     -1      -1         1    1
    and the next prompt begins with the <|end|> that was not sampled (mask 0).
    """
    [left] = tiny_policy.encode("left")
    end = tiny_policy.end_id
    monkeypatch.setattr("utils.sample_tokens", Script(tiny_policy, [[left, end, left, left]]))
    [episode] = play(tiny_policy, started, seeds=[1], max_turns=3, max_turn_tokens=2)
    batch = collate([episode], tiny_policy.device)
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


def test_a_sampled_end_of_turn_is_trained_even_if_padding_is_the_same_token(
        chat_policy, started, monkeypatch):
    end = chat_policy.end_id
    assert chat_policy.tokenizer.pad_token_id == end
    monkeypatch.setattr("utils.sample_tokens", Script(chat_policy, [[9, end], [end, 9], [9, 9]]))
    episodes = play(chat_policy, started, seeds=[1, 2, 3], max_turn_tokens=2, max_turns=1)
    assert [e.turns[0].token_ids for e in episodes] == [[9, end], [end], [9, 9]]
    batch = collate(episodes, chat_policy.device)
    is_end = (batch["tokens"] == end) & (batch["turn_id"] >= 0)
    assert is_end.sum(1).tolist() == [1, 1, 0]
    logprobs, _ = token_logprobs(chat_policy, batch, 1.3)
    chat_policy.model.zero_grad()
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


@pytest.mark.parametrize("tiny", [True, False])
def test_append_only_history_is_what_the_template_renders(tiny, tiny_policy, chat_policy, started):
    policy = tiny_policy if tiny else chat_policy
    envs, [episode] = started(LAKE, [5])
    chat = [] if tiny else [{"role": "system", "content": "Play well."}]
    for word in ("left", "jump", "up"):
        chat.append({"role": "user", "content": episode.observation})
        ids, starts_row = policy.prompt(episode, None)
        answer = [*policy.encode(word), policy.end_id]
        turn = Turn(episode.observation, word, ids, starts_row, answer)
        rendered = policy.tokenizer.apply_chat_template(chat, tokenize=False,
                                                        add_generation_prompt=True)
        row = ([] if starts_row else episode.row()) + ids
        assert policy.tokenizer.decode(row) == rendered
        chat.append({"role": "assistant", "content": word})
        episode.answer(envs[0], turn)


def test_windows_show_the_last_turns_only(tiny_policy, started):
    episodes = play(tiny_policy, started, seeds=[1], history_turns=1, max_turns=4)
    turns = episodes[0].turns
    assert all(turn.starts_row for turn in turns) and len(turns) > 2
    text = tiny_policy.tokenizer.decode(turns[2].prompt_ids)
    assert text.startswith("<|user|>" + turns[1].observation + "<|assistant|>" + turns[1].action)
    assert text.endswith("<|end|><|user|>" + turns[2].observation + "<|assistant|>")
    assert text.count("<|user|>") == 2


def test_a_template_without_a_system_role_gets_the_rules_in_the_first_message():
    template = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
                "{% endif %}{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}")
    tokenizer = byte_tokenizer(template, ["<s>", "</s>"], "</s>")
    policy = Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu", "The rules.")
    ids, _ = policy.prompt(Episode(0, "Go!"), None)
    assert tokenizer.decode(ids) == "<s>user:The rules.\n\nGo!</s><s>assistant:"


def test_a_template_that_ends_an_answer_with_ordinary_text_is_refused():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(template, ["<s>"], "<s>")
    with pytest.raises(ValueError, match="does not end an answer"):
        Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu")


# --- rollouts ------------------------------------------------------------------------------------


def test_caps_may_differ_by_turn_and_limits_are_respected(chat_policy, started):
    episodes = play(chat_policy, started, max_turns=3, seeds=range(8),
                    max_turn_tokens=lambda episode, used: 2 + 3 * len(episode.turns))
    for episode in episodes:
        assert len(episode.turns) <= 3 and episode.done
        for k, turn in enumerate(episode.turns):
            assert 1 <= len(turn.token_ids) <= 2 + 3 * k
            if len(turn.token_ids) < 2 + 3 * k:
                assert turn.token_ids[-1] == chat_policy.end_id
    assert max(len(t.token_ids) for e in episodes for t in e.turns[1:]) > 2


def test_no_turn_and_no_reward_after_the_first_end(chat_policy, started):
    """Rows that ended earlier than others are neither played on nor paid again."""
    episodes = play(chat_policy, started, seeds=range(12), max_turns=8)
    for episode in episodes:
        rewards = [turn.reward for turn in episode.turns]
        assert episode.terminated != episode.truncated
        assert all(reward <= 0 for reward in rewards[:-1])
        batch = collate([episode], chat_policy.device)
        assert batch["turn_id"].max() + 1 == len(rewards)


def test_a_full_context_truncates_the_episode_and_play_goes_on(tiny_policy, started):
    tiny_policy.context_length = 90
    episodes = play(tiny_policy, started, seeds=range(6), max_turns=50, max_turn_tokens=4,
                    env_id="turnrl/Snake-v0")
    cut = [e for e in episodes if e.overflowed]
    assert cut and all(e.truncated and not e.terminated and e.turns for e in cut)
    assert all(len(e.row()) <= 90 for e in episodes)
    tiny_policy.context_length = 10
    episodes = play(tiny_policy, started, seeds=[0, 1])
    assert all(e.overflowed and not e.turns for e in episodes)
    assert collate(episodes, tiny_policy.device)["tokens"].shape == (0, 1)


def test_members_of_a_group_start_alike_and_groups_do_not(tiny_policy):
    args = RunArgs(num_prompts=6, group_size=4, max_turns=2, max_turn_tokens=2)
    episodes = collect_groups(tiny_policy, make_envs(args, 24), args, iteration=3)
    first = [e.turns[0].observation for e in episodes]
    groups = [set(first[i : i + 4]) for i in range(0, 24, 4)]
    assert all(len(group) == 1 for group in groups) and len(set().union(*groups)) > 3
    assert len({tuple(t.token_ids) for e in episodes[:4] for t in e.turns}) > 1, "but play differs"
    again = collect_groups(tiny_policy, make_envs(args, 24), args, iteration=3)
    other = collect_groups(tiny_policy, make_envs(args, 24), args, iteration=4)
    assert again == episodes and [e.seed for e in other] != [e.seed for e in episodes]


def test_training_and_evaluation_seeds_are_disjoint(tiny_policy):
    args = RunArgs(num_prompts=8, group_size=2, max_turns=1, max_turn_tokens=1, eval_episodes=40)
    trained = {e.seed for i in range(20)
               for e in collect_groups(tiny_policy, make_envs(args, 16), args, i)}
    _, episodes = evaluate(tiny_policy, make_envs(args, 16, evaluation=True), args)
    evaluated = [e.seed for e in episodes]
    assert max(trained) < 2**30 <= min(evaluated)
    assert len(trained) > 150 and evaluated == [2**30 + i for i in range(40)]


# --- batches -------------------------------------------------------------------------------------


def toy_episode(*turns) -> Episode:
    """turns: (prompt, answer, starts_row)"""
    return Episode(0, "", [Turn("", "", list(p), starts, list(a), [-0.1] * len(a), reward=float(k))
                           for k, (p, a, starts) in enumerate(turns, start=1)])


def test_collate_by_hand():
    """Episode 0 keeps its history (one row), episode 1 starts a row each turn.

    row 0: 5 5 | 7 7 | 6 | 8      row 1: 5 | 9      row 2: 5 5 5 | 9
    """
    batch = collate([toy_episode(([5, 5], [7, 7], True), ([6], [8], False)),
                     toy_episode(([5], [9], True), ([5, 5, 5], [9], True))], torch.device("cpu"))
    assert batch["tokens"].tolist() == [[5, 5, 7, 7, 6, 8], [5, 9, 0, 0, 0, 0], [5, 5, 5, 9, 0, 0]]
    assert batch["turn_id"].tolist() == [[-1, -1, 0, 0, -1, 1], [-1, 0, -1, -1, -1, -1],
                                         [-1, -1, -1, 1, -1, -1]]
    assert batch["episode_id"].tolist() == [0, 1, 1] and batch["lengths"].tolist() == [6, 2, 4]
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tokens = expand_to_tokens(values, batch["turn_id"], batch["episode_id"])
    assert tokens.tolist() == [[0, 0, 1, 1, 0, 2], [0, 3, 0, 0, 0, 0], [0, 0, 0, 4, 0, 0]]


def test_turn_table_pads_with_zero_and_knows_turns_of_zero_reward():
    episodes = [toy_episode(([5], [7], True), ([5], [7], True)), toy_episode(([5], [7], True))]
    episodes[0].turns[0].reward = 0.0
    table, mask = turn_table(episodes, lambda turn: turn.reward, torch.device("cpu"))
    assert table.tolist() == [[0, 2], [1, 0]] and mask.tolist() == [[True, True], [True, False]]


def test_selected_rows_lose_only_padding(chat_policy, started):
    batch = collate(play(chat_policy, started, history_turns=None), chat_policy.device)
    shortest = int(batch["lengths"].argmin())
    part = select_rows(batch, [shortest])
    assert part["tokens"].shape[1] == batch["lengths"][shortest] < batch["tokens"].shape[1]
    whole, _ = token_logprobs(chat_policy, batch, 1.0)
    alone, _ = token_logprobs(chat_policy, part, 1.0)
    assert torch.allclose(whole[shortest, : alone.shape[1]], alone[0], atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 60, 10**6])
def test_micro_batches_hold_every_row_once(chat_policy, started, max_tokens):
    batch = collate(play(chat_policy, started, history_turns=0), chat_policy.device)
    batch["number"] = torch.arange(len(batch["tokens"]))
    parts = list(micro_batches(batch, max_tokens))
    assert sorted(n for part in parts for n in part["number"].tolist()) == list(
        range(len(batch["tokens"])))
    assert all(part["tokens"].numel() <= max_tokens or len(part["tokens"]) == 1 for part in parts)


# --- statistics ----------------------------------------------------------------------------------


def test_token_entropy_by_hand():
    logits = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    entropy = token_entropy(logits)
    entropy.backward()
    assert entropy.item() == pytest.approx(0.832396, abs=1e-5)
    assert logits.grad.tolist() == pytest.approx([-0.282587, 0.140770, 0.141817], abs=1e-5)
    assert token_entropy(logits / 2).item() == pytest.approx(1.020191, abs=1e-5)
    assert token_entropy(torch.zeros(3)).item() == pytest.approx(1.098612, abs=1e-5)
    forbidden = torch.tensor([1.0, 0.0, -math.inf], requires_grad=True)
    entropy = token_entropy(forbidden)
    entropy.backward()
    assert entropy.item() == pytest.approx(0.582203, abs=1e-5)
    assert torch.isfinite(forbidden.grad).all()


def test_streams_differ_by_every_part_of_their_name_and_repeat():
    draws = {key: random_stream(*key).random() for key in [(1, 0), (1, 1), (2, 0), (1, 0, 0, 1)]}
    assert len(set(draws.values())) == 4 and random_stream(1, 0).random() == draws[1, 0]


def test_start_episodes_resets_each_environment_with_its_seed():
    envs = make_envs(RunArgs(), 3)
    one, two, three = start_episodes(envs, [7, 7, 8])
    assert one.observation == two.observation and one.seed == 7 and three.seed == 8


def test_batch_logprobs_equals_one_pass_whatever_the_parts(chat_policy, started):
    batch = collate(play(chat_policy, started, history_turns=0), chat_policy.device)
    whole = token_logprobs(chat_policy, batch, 1.0)
    for tokens in (1, 200, 10**6):
        parts = batch_logprobs(chat_policy, batch, RunArgs(micro_batch_tokens=tokens))
        for part, values in zip(parts, whole, strict=True):  # log-probs, entropies
            assert torch.allclose(part, values, atol=1e-5) and not part.requires_grad


@pytest.mark.parametrize("history_turns", [None, 0])
def test_in_bf16_the_old_logprobs_are_those_of_the_training_pass(chat_policy, history_turns):
    """Ratio exactly 1 before the first step, although decoding rounds differently."""
    chat_policy.bf16 = True
    args = RunArgs(num_prompts=3, group_size=2, max_turns=3, max_turn_tokens=4)
    episodes = collect_groups(chat_policy, make_envs(args, 6), args, 0, history_turns)
    batch = collate(episodes, chat_policy.device)
    logprobs, _ = token_logprobs(chat_policy, batch, args.temperature)
    assert torch.allclose(logprobs, batch["old_logprobs"], atol=1e-5)
    assert all(p.dtype == torch.float32 for p in chat_policy.model.parameters())


@pytest.mark.parametrize("terminated,truncated", [(True, True), (True, False), (False, True)])
def test_an_end_and_a_time_limit_in_one_step_are_one_termination(terminated, truncated):
    """gymnasium's TimeLimit may report both: a value must then not be bootstrapped."""
    env = make_envs(RunArgs(), 1)[0]
    env.step = lambda action: ("end", 1.0, terminated, truncated, {"success": True})
    [episode] = start_episodes([env], [0])
    episode.answer(env, Turn("start", "go"))
    assert (episode.terminated, episode.truncated) == (terminated, not terminated)
    assert episode.done and episode.total_reward == 1.0 and episode.success
