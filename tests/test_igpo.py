"""The mathematics of IGPO against hand-worked numbers, slow loops and a forward pass per belief."""

import copy
import csv
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers

import words
from algos import igpo
from algos.igpo import (
    Args, belief_metrics, beliefs_before_turns, information_gain, main, turn_returns, turn_rewards, update, wrap_answer,
)
from conftest import CHATML, KeepGradient, byte_tokenizer, random_model, streams
from envs.episodes import Turn, start_episodes
from policies import Policy, make_tiny
from rollouts import collect_groups, make_envs, rollout
from utils import collate, micro_batches, token_logprobs, turn_table

CPU = torch.device("cpu")


def table(rows):
    """Ragged lists as a padded (E, K) tensor and its mask; the padding must not count."""
    width = max(map(len, rows))
    values = torch.tensor([row + [math.nan] * (width - len(row)) for row in rows])
    return values, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def close(got, expected):
    """Compare (E, K) with ragged lists, 0 after the end."""
    for row, values in zip(got.tolist(), expected, strict=True):
        assert row == pytest.approx(list(values) + [0.0] * (len(row) - len(values)), abs=2e-4), got


def advantages_of(gains, outcomes, discount=1.0, source="both"):
    """The advantages of a group from the gains of all turns but the last of every episode."""
    gains, mask = table([[*row, math.nan] for row in gains])
    rewards = turn_rewards(gains, torch.tensor(outcomes), mask, torch.zeros(len(gains)), source)
    return turn_returns(rewards, mask, discount)


def paper_advantages(beliefs, outcomes, group, discount, source="both", joint=False):
    """Equations 4 to 6 of the paper as loops over episodes and turns; joint: with the one pool of its version 1."""
    def z(x, pool):
        return (x - np.mean(pool)) / (np.std(pool) + 1e-6) if np.ptp(pool) > 1e-6 else 0.0
    advantages = []
    for e in range(len(beliefs)):
        members = [i for i in range(len(beliefs)) if group[i] == group[e]]
        gains = [beliefs[i][k + 1] - beliefs[i][k] for i in members for k in range(len(beliefs[i]) - 1)]
        ends = [outcomes[i] for i in members]
        if joint:
            gains = ends = gains + ends
        rewards = [0.0 if source == "outcome" else z(after - before, gains)
                   for before, after in itertools.pairwise(beliefs[e])]
        rewards.append(0.0 if source == "information_gain" else z(outcomes[e], ends))
        advantages.append([sum(discount ** (j - k) * rewards[j] for j in range(k, len(rewards)))
                           for k in range(len(rewards))])
    return advantages


# --- Eq. 3-6: gains, rewards, returns ------------------------------------------------------------


@pytest.mark.parametrize("gains,outcomes,discount,expected", [
    ([[0.3, -0.1], [0.1]], [1.0, 0], 1.0, [[1.0, -0.2247, 1.0], [-1.0, -1]]),
    ([[0.3, -0.1], [0.1]], [1.0, 0], 0.5, [[0.8624, -0.7247, 1], [-0.5, -1]]),
    ([[0.3, -0.1], [0.1]], [1.0, 0], 0.0, [[1.2247, -1.2247, 1.0], [0.0, -1]]),  # std of the population
    ([[0.4], [-0.2]], [0.0, 0], 1.0, [[1.0, 0.0], [-1.0, 0.0]]),  # equal outcomes still give a signal
    ([[0.4], []], [1.0, 0], 0.5, [[0.5, 1.0], [-1.0]])])  # a reward of 0 does not merge two turns
def test_advantages_by_hand(gains, outcomes, discount, expected):
    close(advantages_of(gains, outcomes, discount), expected)


def test_a_right_first_search_may_lower_the_belief_and_discounting_punishes_it():
    """A finds the answer in three hops, B answers at once, C makes one useless search."""
    beliefs, mask = table([[-3.2, -7.2, -7.0, -0.2], [-3.2], [-3.2, -3.0]])
    rewards = turn_rewards(information_gain(beliefs, mask), torch.tensor([1.0, 0, 0]), mask, torch.zeros(3))
    close(rewards, [[-1.2418, -0.1552, 1.5523, 1.4142], [-0.7071], [-0.1552, -0.7071]])
    close(turn_returns(rewards, mask, 1.0), [[1.5694, 2.8113, 2.9665, 1.4142], [-0.7071], [-0.8623, -0.7071]])
    close(turn_returns(rewards, mask, 0.5), [[-0.7546, 0.9745, 2.2594, 1.4142], [-0.7071], [-0.5088, -0.7071]])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("source", ["both", "outcome", "information_gain"])
def test_advantages_equal_a_loop_from_the_paper(source, joint):
    rng = np.random.default_rng(0)
    for _ in range(10):
        group = rng.integers(3, size=12)
        beliefs = [rng.normal(size=n).tolist() for n in rng.integers(1, 6, size=12)]
        outcomes = rng.integers(2, size=12).astype(np.float32)
        values, mask = table(beliefs)
        rewards = turn_rewards(information_gain(values, mask), torch.tensor(outcomes), mask,
                               torch.tensor(group), source, joint)
        close(turn_returns(rewards, mask, 0.9), paper_advantages(beliefs, outcomes, group, 0.9, source, joint))


def test_one_z_score_for_both_parts_by_hand():
    """Gains 3, 1 and outcomes 0, 0: their mean is 1, their std sqrt(1.5). Going on paid both episodes, and both are told so."""
    gains, mask = table([[3.0, math.nan], [1.0, math.nan]])
    close(turn_rewards(gains, torch.zeros(2), mask, torch.zeros(2), joint=True),
          [[1.63299, -0.81650], [0.0, -0.81650]])


@pytest.mark.parametrize("gains,source", [
    ([[0.3, -0.1], [0.1], [], [0.2]], "outcome"),  # the flag
    ([[0.2, 0.2], [0.2], [], [0.2]], "both"),  # all turns teach the same
    ([[], [], [], []], "both")])  # one turn each
def test_without_gains_that_differ_igpo_is_grpo(gains, source):
    """Outcomes 1 0 0 0: mean .25, std of the population sqrt(3) / 4."""
    got = advantages_of(gains, [1.0, 0, 0, 0], source=source)
    grpo = [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    close(got, [[a] * (len(row) + 1) for a, row in zip(grpo, gains, strict=True)])


def test_invariances():
    rng = np.random.default_rng(1)
    group, outcomes = np.array([0, 1, 2] * 3), rng.integers(2, size=9).astype(np.float32)
    beliefs = [rng.normal(size=n).tolist() for n in rng.integers(1, 5, size=9)]

    def same(order, beliefs=beliefs, scale=1.0, pad=0):
        values, mask = table([*(beliefs[i] for i in order), [0.0] * (4 + pad)])
        gains, mask = scale * information_gain(values, mask)[:-1], mask[:-1]
        rewards = turn_rewards(gains, torch.tensor(outcomes[order]), mask, torch.tensor(group[order]))
        close(turn_returns(rewards, mask, 0.9), [base[i] for i in order])
    base = paper_advantages(beliefs, outcomes, group, 0.9)
    same(range(9), pad=3)
    same(range(9), [[b + i for b in row] for i, row in enumerate(beliefs)])  # only gains count
    same(range(9), scale=7.0)
    same(rng.permutation(9))
    same([1, 4, 7])  # a group alone


# --- Eq. 1, 2: the belief ------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen3", "mistral", "mixtral", "starcoder2", "phi3"])
def policy(request):
    """A random chat model with a token for every byte; a window is not in config.layer_types."""
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    if request.param in ("llama", "qwen3"):
        return Policy(random_model(request.param, len(tokenizer)), tokenizer, "cpu")
    torch.manual_seed(0)
    more = {"mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2}}.get(request.param, {})
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, sliding_window=8, pad_token_id=None, **more)
    assert not getattr(config, "layer_types", None)
    return Policy(transformers.AutoModelForCausalLM.from_config(config), tokenizer, "cpu")


def say(policy, env, episode, text):
    """Let the policy have written this text."""
    ids = [*policy.encode(text), policy.end_id]
    episode.answer(env, Turn(episode.observation, text, *policy.prompt(episode), ids, [0.0] * len(ids)))


@pytest.fixture
def episodes(policy):
    """Demonstrations of different length; an answer has three names."""
    [env], rng = make_envs(Args(env_kwargs='{"regime": "parts"}'), 1), np.random.default_rng(0)
    episodes = []
    for seed in range(6):
        episodes += start_episodes([env], [seed])
        while not episodes[-1].done:
            say(policy, env, episodes[-1], env.unwrapped.demonstrate(rng))
    assert len({len(e.turns) for e in episodes}) > 2
    return episodes


@torch.no_grad()
def slow_beliefs(policy, episode, before="", after="", temperature=1.0):
    """A forward pass per turn, of its context and the answer alone. Around the answer a character is a token."""
    answer = episode.start_info["answer"]
    ids = policy.encode(before + answer + after)
    own = range(len(before), len(ids) - len(after))
    beliefs, context = [], []
    for turn in episode.turns:
        context = context + turn.prompt_ids
        logits = policy.model(torch.tensor([context + ids])).logits[0] / temperature
        logprobs = [logits[len(context) + j - 1].log_softmax(-1)[ids[j]].item() for j in own]
        beliefs.append(sum(logprobs) / len(logprobs))
        context = context + turn.token_ids
    return beliefs


@pytest.mark.parametrize("before,after,temperature,tokens", [
    ("answer ", "", 1.0, 16384), ("<answer>", "</answer>", 0.7, 600), ("", "", 1.3, 1)])
def test_a_belief_is_that_of_a_forward_pass_of_its_own(policy, episodes, before, after, temperature, tokens):
    expected = [b for e in episodes for b in slow_beliefs(policy, e, before, after, temperature)]
    for belief, values in (("log_prob", expected), ("prob", np.exp(expected).tolist())):
        args = Args(belief=belief, temperature=temperature, micro_batch_tokens=tokens)
        got = beliefs_before_turns(policy, episodes, before + "{answer}" + after, args)
        assert got.tolist() == pytest.approx(values, abs=2e-5)
    if policy.windowed:  # the test would see it if the window were lost
        policy.model.config.sliding_window = None
        unlimited = [b for e in episodes for b in slow_beliefs(policy, e, before, after, temperature)]
        assert np.abs(np.subtract(unlimited, expected)).max() > 0.1


def test_the_answer_is_written_as_the_policy_would_write_it(policy, capsys):
    """Whole words as tokens: " Ada" with its space is one token, and the only one that counts."""
    tiny = Policy(*make_tiny(Args(), [f"answer {name} Dan" for name in ("Ada", "Ben")] * 9), "cpu")
    assert wrap_answer(tiny, "answer {answer}", "Ada") == (tiny.encode("answer Ada"), {0})
    assert wrap_answer(tiny, "answer {answer}", "Ada Dan") == (tiny.encode("answer Ada Dan"), {0})
    assert wrap_answer(tiny, "{answer} Dan", "Ada") == (tiny.encode("Ada Dan"), {len(tiny.encode("Ada"))})
    ids, outside = wrap_answer(policy, "<answer>{answer}</answer>", "Ada")
    assert policy.tokenizer.decode(ids) == "<answer>Ada</answer>"
    assert policy.tokenizer.decode([x for n, x in enumerate(ids) if n not in outside]) == "Ada"
    with pytest.raises(SystemExit):
        wrap_answer(policy, "answer {answer}", "")
    assert "has no tokens" in capsys.readouterr().err


def test_asking_leaves_no_trace_and_needs_the_answer_of_the_reset_only(policy, episodes):
    before = copy.deepcopy(episodes)
    got = beliefs_before_turns(policy, episodes, "answer {answer}", Args())
    assert episodes == before and not got.requires_grad
    for record in (*episodes, *(turn for e in episodes for turn in e.turns)):
        record.info, record.observation = {}, ""
    assert torch.equal(beliefs_before_turns(policy, episodes, "answer {answer}", Args()), got)


def test_every_way_to_end_has_as_many_beliefs_as_turns(tiny_policy):
    """Answered, malformed, truncated by the environment, by --max-turns, by the context, before any turn."""
    envs, search = make_envs(Args(), 6), "search Ada boss"
    episodes = start_episodes(envs, [5] * 6)
    for n, script in enumerate([["answer Ada"], [search, "?"], [search] * 9, [search] * 2, [search]]):
        for text in script:
            if not episodes[n].done:
                say(tiny_policy, envs[n], episodes[n], text)
    rollout(tiny_policy, envs[3:4], episodes[3:4], streams(1), 2, 1.0)
    tiny_policy.context_length = len(episodes[4].row()) + 1
    rollout(tiny_policy, envs[4:5], episodes[4:5], streams(1), 9, 1.0)
    assert [e.truncated for e in episodes] == [False, False, True, True, True, False] and episodes[4].overflowed
    rewards, mask = turn_table(episodes, lambda turn: turn.reward, CPU)
    beliefs = torch.full_like(rewards, math.nan)
    beliefs[mask] = beliefs_before_turns(tiny_policy, episodes, "answer {answer}", Args())
    credit = turn_rewards(information_gain(beliefs, mask), rewards.sum(1), mask, torch.zeros(6))
    assert beliefs[mask].isfinite().all() and credit.isfinite().all() and (credit[~mask] == 0).all()
    assert len(beliefs_before_turns(tiny_policy, episodes[5:], "answer {answer}", Args())) == 0


def test_the_columns_of_the_belief_by_hand():
    """Groups of two; an episode without a turn has no belief, and nothing follows the last turn."""
    beliefs, mask = table([[-3.0, -4.0, -1.0], [-2.0], [-3.0, -2.5], []])
    got = belief_metrics(beliefs, information_gain(beliefs, mask), torch.tensor([1.0, 0, 0, 0]), mask, 2)
    assert got == pytest.approx({"groups_of_equal_outcome": 0.5, "belief_start": (-3 - 2 - 3) / 3,
                                 "belief_end": (-1 - 2 - 2.5) / 3, "gain_mean": (-1 + 3 + 0.5) / 3})
    outcomes = torch.tensor([6.1e7 + 4, 6.1e7, 1000.5, 1000.0, 1e-3, 0.0], dtype=torch.double)
    beliefs, mask = table([[-3.0]] * 6)
    assert belief_metrics(beliefs, 0 * beliefs, outcomes, mask, 2)["groups_of_equal_outcome"] == pytest.approx(1 / 3)
    beliefs, mask = table([[-3.0], [-2.0]])
    assert belief_metrics(beliefs, 0 * beliefs, torch.zeros(2), mask, 2)["gain_mean"] == 0.0


# --- Eq. 7: the update ---------------------------------------------------------------------------


@pytest.fixture
def batch(tiny_policy):
    """Episodes of different length that another policy has sampled: ratios from about 0.4 to 2.5."""
    args = Args(num_prompts=4, group_size=2, max_turn_tokens=4, env_id="tests/Words-v0")
    torch.manual_seed(0)
    batch = collate(collect_groups(tiny_policy, make_envs(args), args, 0), CPU, torch.randn(8, 6))
    batch["old_logprobs"] += 0.4 * torch.randn_like(batch["old_logprobs"])
    return batch


def run_update(policy, batch, **options):
    keeper = KeepGradient(policy)
    args = Args(max_grad_norm=1e9, clip_low=0.2, clip_high=0.3, entropy_coefficient=0.1, **options)
    return update(policy, keeper, dict(batch), args), keeper.gradient


def slow_update(policy, batch, temperature):
    """The columns and the gradient of Eq. 7: a mean over the tokens of each row, then over rows."""
    columns = {"loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0}
    for tokens, turn_id, old, advantages in zip(
            *(batch[name] for name in ("tokens", "turn_id", "old_logprobs", "advantages")), strict=True):
        sampled = (turn_id >= 0).nonzero()[:, 0].tolist()
        logprobs = (policy.model(tokens[None]).logits[0] / temperature).log_softmax(-1)
        for t in sampled:
            distribution, share = logprobs[t - 1], 1 / len(sampled) / len(batch["tokens"])
            ratio, entropy = (distribution[tokens[t]] - old[t]).exp(), -(distribution.exp() * distribution).sum()
            outside, limit = (ratio > 1.3, 1.3) if advantages[t] > 0 else (ratio < 0.8, 0.8)
            columns["loss"] += -share * ((limit if outside else ratio) * advantages[t] + 0.1 * entropy)
            columns["entropy"] += share * entropy.item()
            columns["clip_fraction"] += share * outside.item()
            columns["approx_kl"] += share * (ratio - 1 - ratio.log()).item()
    gradients = torch.autograd.grad(columns["loss"], list(policy.model.parameters()))
    gradient = torch.cat([x.flatten() for x in gradients])
    return columns | {"loss": columns["loss"].item(), "grad_norm": gradient.norm().item()}, gradient


@pytest.mark.parametrize("parts,micro_batch_tokens,temperature", [(1, 16384, 1.0), (2, 800, 1.0), (4, 275, 0.7)])
def test_columns_and_gradient_equal_a_slow_loop(tiny_policy, batch, parts, micro_batch_tokens, temperature):
    assert len(list(micro_batches(batch, micro_batch_tokens))) == parts
    columns, gradient = run_update(tiny_policy, batch, temperature=temperature, micro_batch_tokens=micro_batch_tokens)
    expected, slow_gradient = slow_update(tiny_policy, batch, temperature)
    assert columns == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0.1 < columns["clip_fraction"] < 0.9 and columns["approx_kl"] > 0.01
    assert torch.allclose(gradient, slow_gradient, rtol=1e-3, atol=1e-6)


def test_padding_order_and_tokens_that_were_not_sampled_do_not_matter(tiny_policy, batch):
    base = run_update(tiny_policy, batch)

    def same(other):
        columns, gradient = run_update(tiny_policy, other)
        assert base[0] == pytest.approx(columns, rel=1e-4, abs=1e-6)
        assert torch.allclose(base[1], gradient, rtol=1e-3, atol=1e-6)
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    same({k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x + 6 * (k == "lengths")
          for k, x in batch.items()})
    same({k: x.flip(0) for k, x in batch.items()})
    same(batch | {k: torch.where(batch["turn_id"] < 0, 123.0, batch[k]) for k in ("old_logprobs", "advantages")})


def test_a_rank_without_rows_still_takes_the_step(tiny_policy):
    columns, gradient = run_update(tiny_policy, collate([], CPU, torch.zeros(0, 1)))
    assert gradient.norm() == 0.0 and columns["grad_norm"] == 0.0


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 6, "group_size": 2, "max_turns": 4, "warm_start_steps": 5, "num_iterations": 2,
         "eval_episodes": 4, "eval_every": 2, "print_samples": 0}


@pytest.mark.parametrize("source,belief,discount", [
    ("both", "log_prob", 1.0), ("both", "prob", 0.9), ("outcome", "log_prob", 0.9), ("information_gain", "prob", 1.0)])
def test_a_run_credits_and_logs_what_the_paper_says(source, belief, discount, tmp_path, monkeypatch):
    """From the sampled episodes on, everything again by slow loops: beliefs, advantages, columns."""
    asked, trained = [], []

    def asking(policy, episodes, template, args):
        batch = collate(episodes, CPU)  # the policy that is asked has sampled them
        assert torch.allclose(token_logprobs(policy, batch, 1.0)[0], batch["old_logprobs"], atol=1e-4)
        beliefs = [slow_beliefs(policy, e, "(", ")") for e in episodes]
        asked.append((episodes, [np.exp(x).tolist() if belief == "prob" else x for x in beliefs]))
        trained.append({})
        return beliefs_before_turns(policy, episodes, template, args)

    def training(policy, optimizer, batch, args):
        for tokens, length, turn_id, advantages in zip(
                *(batch[x].tolist() for x in ("tokens", "lengths", "turn_id", "advantages")), strict=True):
            trained[-1][tuple(tokens[:length])] = dict(zip(turn_id, advantages, strict=True))
        return update(policy, optimizer, batch, args)
    monkeypatch.setattr(words.Words, "answer_template", "({answer})", raising=False)
    monkeypatch.setattr(igpo, "beliefs_before_turns", asking)
    monkeypatch.setattr(igpo, "update", training)
    main(Args(**QUICK, run_dir=str(tmp_path), env_id="tests/Words-v0", reward_source=source, belief=belief,
              discount=discount))
    rows = list(csv.DictReader(open(*tmp_path.glob("*/metrics.csv"))))[1:]
    for (episodes, beliefs), by_row, row in zip(asked, trained, rows, strict=True):
        outcomes, group = [e.total_reward for e in episodes], [i // 2 for i in range(12)]
        advantages = paper_advantages(beliefs, outcomes, group, discount, source)
        for episode, expected in zip(episodes, advantages, strict=True):
            got = by_row.get(tuple(episode.row()), {-1: 0.0} | dict.fromkeys(range(len(expected)), 0.0))
            assert got == pytest.approx({-1: 0.0} | dict(enumerate(expected)), abs=2e-3)
        groups = [range(g, g + 2) for g in range(0, 12, 2)]
        expected = {
            "belief_start": np.mean([x[0] for x in beliefs]), "belief_end": np.mean([x[-1] for x in beliefs]),
            "gain_mean": np.concatenate([np.diff(x) for x in beliefs]).mean(),
            "groups_of_equal_outcome": np.mean([len({outcomes[i] for i in g}) == 1 for g in groups]),
            "groups_without_signal": np.mean([not any(any(advantages[i]) for i in g) for g in groups])}
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=1e-4)


def test_an_environment_without_an_answer_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(Args(**QUICK, run_dir=str(tmp_path), env_id="turnrl/FrozenLake-v0"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "info['answer']" in lines[0]


def test_equal_contexts_have_equal_beliefs_whatever_batch_they_are_in(policy, episodes):
    """Seven times the same two turns, in micro-batches of two rows: rounding would tell them apart, a z-score enlarge it."""
    copies = [copy.deepcopy(episodes[0]) for _ in range(7)] + episodes[1:]
    beliefs = beliefs_before_turns(policy, copies, "answer {answer}", Args(micro_batch_tokens=300))
    count = len(episodes[0].turns)
    table = beliefs[: 7 * count].view(7, count)
    assert (table == table[0]).all() and len(set(beliefs.tolist())) > count


@pytest.mark.parametrize("answer", [None, ["Ada"], {}])
def test_an_answer_that_is_no_text_is_refused(policy, episodes, answer, capsys):
    episodes[2].start_info["answer"] = answer
    with pytest.raises(SystemExit, match="2"):
        beliefs_before_turns(policy, episodes, "{answer}", Args())
    assert f"seed 2: info['answer'] is {answer!r}" in capsys.readouterr().err
    del episodes[2].start_info["answer"]
    with pytest.raises(SystemExit, match="2"):
        beliefs_before_turns(policy, episodes, "{answer}", Args())


def test_a_thought_that_the_prompt_opens_and_a_template_without_the_answer_are_refused(tmp_path, capsys, monkeypatch):
    template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    tokenizer = byte_tokenizer(template, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu").save(tmp_path / "chat")
    args = Args(model=str(tmp_path / "chat"), run_dir=str(tmp_path), eval_episodes=2)
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert "its prompt opens a thought" in capsys.readouterr().err
    for template in ("answer", ""):
        monkeypatch.setattr("envs.search_qa.SearchQA.answer_template", template)
        with pytest.raises(SystemExit, match="2"):
            main(args)
        assert f"its answer_template is {template!r}" in capsys.readouterr().err


def test_every_environment_with_an_answer_names_how_it_is_written_or_is_refused(tmp_path, capsys):
    """A text that the policy never writes has no belief that means anything: the desk asks for commands, not answers."""
    for env_id, template in (("TwentyQuestions", "Is the object a dog?"), ("GuessMyCity", "Is it paris?")):
        env = gym.make(f"turnrl/{env_id}-v0").unwrapped
        env.reset(seed=0, options={"answer": template.split()[-1].rstrip("?")})
        assert env.step(env.answer_template.replace("{answer}", env.answer))[2], "it is the guess that ends the game"
        assert env.answer_template.replace("{answer}", env.answer) == template
    with pytest.raises(SystemExit, match="2"):
        main(Args(env_id="turnrl/ToolDesk-v0", run_dir=str(tmp_path)))
    assert "turnrl/ToolDesk-v0: IGPO asks for the belief in a text" in capsys.readouterr().err
