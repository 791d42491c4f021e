"""The mathematics of IGPO against hand-worked numbers, slow loops and separate forward passes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from algos.igpo import (
    Args, belief, curriculum_weights, gigpo_advantages, group_relative_advantages, information_gain, kl_policy_ref_k3,
    loss_weights, main, normalize_rewards, packed_probe, policy_loss, probe_beliefs, turn_returns,
    update, wrap_answer,
)
from algos.ms_grpo import group_relative_advantages as grpo
from conftest import KeepGradient
from envs.episodes import demonstrations
import words  # noqa: F401 (registers tests/Words-v0)
from policies import make_tiny
from utils import (
    Policy, collate, collect_groups, expand_to_tokens, make_envs, random_stream, rollout, start_episodes,
    token_logprobs, turn_table,
)


def table(rows, fill=99.0):
    """Ragged lists as a padded (E, K) tensor and its mask; the padding must not count."""
    width = max(map(len, rows))
    values = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    return values, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def close(got, expected):
    """Compare (E, K) with ragged lists, 0 after the end."""
    got = got.tolist()
    for row, values in zip(got, expected, strict=True):
        assert row == pytest.approx(values + [0.0] * (len(row) - len(values)), abs=2e-4), got


def rewards_of(gains, outcomes, group=None, **options):
    """Gains of all turns but the last, as ragged lists -> the normalised turn rewards, the mask."""
    values, mask = table([row + [99.0] for row in gains])
    group = torch.zeros(len(gains), dtype=torch.long) if group is None else torch.tensor(group)
    return normalize_rewards(values, torch.tensor(outcomes), mask, group, **options), mask


def advantages_of(gains, outcomes, gamma=1.0, group=None, **options):
    return turn_returns(*rewards_of(gains, outcomes, group, **options), gamma)


# --- Eq. 1-3: belief and gain --------------------------------------------------------------------
# answer of two tokens before turns 0, 1, 2:   -2 -1 | -1 -.6 | -.2 -.2      (wrapper tokens: 50)
GOLD = torch.tensor([[50.0, -2, -1], [50.0, -1, -0.6], [50.0, -0.2, -0.2]])
GOLD_MASK = torch.tensor([[False, True, True]]).expand(3, 3)


@pytest.mark.parametrize("kind,beliefs,gains", [
    ("log_prob", [-1.5, -0.8, -0.2], [0.7, 0.6]),
    ("prob", [0.223130, 0.449329, 0.818731], [0.226199, 0.369402])])
def test_belief_is_the_mean_over_the_answer_and_gain_its_growth(kind, beliefs, gains):
    got = belief(GOLD, GOLD_MASK, kind)
    assert got.tolist() == pytest.approx(beliefs, abs=1e-5)
    table_, mask = table([got.tolist(), [-3.0]])
    close(information_gain(table_, mask), [gains, []])
    assert sum(gains) == pytest.approx(beliefs[-1] - beliefs[0], abs=1e-5), "gains telescope"


def test_answers_of_different_length_share_a_table():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.tensor([[-1.0, -3.0, math.nan], [-1.0, -2.0, -6.0]])
    assert belief(values, mask).tolist() == [-2.0, -3.0]
    with pytest.raises(AssertionError):
        belief(values, torch.tensor([[True, True, True], [False, False, False]]))


# --- Eq. 4-6: normalised rewards and returns -----------------------------------------------------
# group of two: A gains .3, -.1, outcome 1;  B gain .1, outcome 0
A_B, OUTCOMES = [[0.3, -0.1], [0.1]], [1.0, 0.0]


@pytest.mark.parametrize("options,rewards,returns,halved", [
    ({}, [[1.2247, -1.2247, 1.0], [0.0, -1]], [[1.0, -0.2247, 1.0], [-1.0, -1]],
     [[0.8624, -0.7247, 1], [-0.5, -1]]),
    ({"degrees_of_freedom": 1}, [[1.0, -1, 0.7071], [0.0, -0.7071]],
     [[0.7071, -0.2929, 0.7071], [-0.7071, -0.7071]],
     [[0.6768, -0.6464, 0.7071], [-0.3536, -0.7071]]),
    ({"normalization": "joint"}, [[0.1018, -0.9162, 1.8832], [-0.4072, -0.6617]],
     [[1.0689, 0.9671, 1.8832], [-1.0689, -0.6617]],
     [[0.1145, 0.0254, 1.8832], [-0.7380, -0.6617]])])
def test_rewards_and_returns_by_hand(options, rewards, returns, halved):
    close(rewards_of(A_B, OUTCOMES, **options)[0], rewards)
    close(advantages_of(A_B, OUTCOMES, 1.0, **options), returns)
    close(advantages_of(A_B, OUTCOMES, 0.5, **options), halved)
    close(advantages_of(A_B, OUTCOMES, 0.0, **options), rewards)


def test_the_first_public_code_computed_something_else():
    """No z-score, a baseline per token position: [.55 .45 .5] for A."""
    assert not np.allclose(advantages_of(A_B, OUTCOMES)[0].tolist(), [0.55, 0.45, 0.5], atol=0.1)


def test_equal_outcomes_still_give_a_signal():
    close(advantages_of([[0.4], [-0.2]], [0.0, 0.0]), [[1.0, 0.0], [-1.0, 0.0]])


def test_a_reward_of_zero_is_a_reward():
    """One gain in the group becomes 0; its turn must not merge with the next one."""
    close(advantages_of([[0.4], []], [1.0, 0.0], gamma=0.5), [[0.5, 1.0], [-1.0]])
    close(advantages_of([[0.4], []], [1.0, 0.0], gamma=1.0), [[1.0, 1.0], [-1.0]])


def test_a_correct_first_search_may_lower_the_belief():
    """Episodes: found in three hops; answered at once; one wrong search. gamma .5 punishes A."""
    beliefs, mask = table([[-3.2, -7.2, -7.0, -0.2], [-3.2], [-3.2, -3.0]])
    gains, group = information_gain(beliefs, mask), torch.zeros(3, dtype=torch.long)
    rewards = normalize_rewards(gains, torch.tensor([1.0, 0, 0]), mask, group)
    close(rewards, [[-1.2418, -0.1552, 1.5523, 1.4142], [-0.7071], [-0.1552, -0.7071]])
    close(turn_returns(rewards, mask, 1.0),
          [[1.5694, 2.8113, 2.9665, 1.4142], [-0.7071], [-0.8623, -0.7071]])
    halved = turn_returns(rewards, mask, 0.5)
    close(halved, [[-0.7546, 0.9745, 2.2594, 1.4142], [-0.7071], [-0.5088, -0.7071]])
    assert halved[0, 0] < halved[2, 0]


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_advantages_against_a_loop_from_the_paper(normalization):
    rng = np.random.default_rng(0)
    for _ in range(10):
        lengths, group = rng.integers(1, 6, size=12), rng.integers(3, size=12)
        beliefs = [rng.normal(size=n).astype(np.float32) for n in lengths]
        outcomes = rng.integers(2, size=12).astype(np.float32)
        expected = []
        for e in range(12):
            members = [i for i in range(12) if group[i] == group[e]]
            pool_gain = [b[k + 1] - b[k] for i in members for b in [beliefs[i]] for k in range(len(b) - 1)]
            pool_outcome = [outcomes[i] for i in members]
            if normalization == "joint":
                pool_gain = pool_outcome = pool_gain + pool_outcome

            def z(x, pool):
                return (x - np.mean(pool)) / (np.std(pool) + 1e-6) if len(pool) > 1 else 0.0
            raw = [z(beliefs[e][k + 1] - beliefs[e][k], pool_gain) for k in range(lengths[e] - 1)]
            raw.append(z(outcomes[e], pool_outcome))
            expected.append([sum(0.9 ** (j - k) * raw[j] for j in range(k, len(raw)))
                             for k in range(len(raw))])
        values, mask = table([b.tolist() for b in beliefs])
        rewards = normalize_rewards(information_gain(values, mask), torch.tensor(outcomes), mask,
                                    torch.tensor(group), normalization)
        close(turn_returns(rewards, mask, 0.9), expected)


def test_only_the_outcome_is_grpo_and_only_the_gain_has_no_outcome():
    gains, outcomes, group = [[0.3, -0.1], [0.1], [], [0.2]], [1.0, 0, 0, 1], [0, 0, 1, 1]
    relative = grpo(torch.tensor(outcomes), torch.tensor(group), degrees_of_freedom=0).tolist()
    got = advantages_of(gains, outcomes, group=group, reward_source="outcome")
    close(got, [[a] * (len(g) + 1) for a, g in zip(relative, gains, strict=True)])
    both, _ = rewards_of(gains, outcomes, group=group)
    gain, mask = rewards_of(gains, outcomes, group=group, reward_source="information_gain")
    outcome, _ = rewards_of(gains, outcomes, group=group, reward_source="outcome")
    assert torch.equal(gain + outcome, both) and ((gain != 0) & (outcome != 0)).sum() == 0
    assert (gain[~mask] == 0).all()


def test_one_turn_episodes_are_plain_grpo():
    for options in ({}, {"degrees_of_freedom": 1}):
        got = advantages_of([[], [], [], []], [1.0, 0, 0, 0], **options)[:, 0]
        expected = grpo(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4).long(),
                        degrees_of_freedom=options.get("degrees_of_freedom", 0))
        assert torch.equal(got, expected)


def test_invariances():
    rng = np.random.default_rng(1)
    lengths, group = rng.integers(1, 5, size=9), [0, 1, 2] * 3
    beliefs = [rng.normal(size=n).tolist() for n in lengths]
    outcomes = torch.tensor(rng.integers(2, size=9), dtype=torch.float)

    def advantages(beliefs, outcomes, group, pad=0, scale=1.0, **options):
        values, mask = table([*beliefs, [0.0] * (max(lengths) + pad)])
        values, mask = values[:-1], mask[:-1]
        rewards = normalize_rewards(scale * information_gain(values, mask), outcomes, mask,
                                    torch.tensor(group), **options)
        return turn_returns(rewards, mask, 0.9)
    base = advantages(beliefs, outcomes, group)
    order = rng.permutation(9)
    permuted = advantages([beliefs[i] for i in order], outcomes[order], [group[i] for i in order])
    assert torch.allclose(permuted, base[order], atol=1e-5)
    assert torch.allclose(advantages(beliefs, outcomes, group, pad=3)[:, : base.shape[1]], base)
    shifted = [[b + i for b in row] for i, row in enumerate(beliefs)]
    assert torch.allclose(advantages(shifted, outcomes, group), base, atol=1e-4)
    assert torch.allclose(advantages(beliefs, outcomes, group, scale=7.0), base, atol=1e-4)
    joint = [advantages(beliefs, outcomes, group, scale=s, normalization="joint") for s in (1.0, 7.0)]
    assert not torch.allclose(*joint, atol=0.1)
    alone = [i for i in range(9) if group[i] == 1]
    assert torch.allclose(advantages([beliefs[i] for i in alone], outcomes[alone], [0] * 3)[:, :4],
                          base[alone][:, : max(lengths[alone])], atol=1e-5), "groups never mix"


@pytest.mark.parametrize("done,outcome_weight,gain_weight", [(0.25, 0.625, 0.875)])
def test_the_curriculum_does_nothing_unless_normalised_jointly(done, outcome_weight, gain_weight):
    assert curriculum_weights(done) == (gain_weight, outcome_weight)
    weighted = [[gain_weight * g for g in row] for row in A_B], [outcome_weight * o for o in OUTCOMES]
    assert torch.allclose(advantages_of(*weighted), advantages_of(A_B, OUTCOMES), atol=1e-4)
    joint = advantages_of(*weighted, normalization="joint")
    assert not torch.allclose(joint, advantages_of(A_B, OUTCOMES, normalization="joint"), atol=1e-2)


def test_credit_goes_to_sampled_tokens_only():
    turn_id = torch.tensor([[0, 0, -1, 1, 1, -1, 2, 2]])
    got = expand_to_tokens(torch.tensor([[1.0, -0.2247, 1.0]]), turn_id, torch.tensor([0]))
    assert got.tolist()[0] == pytest.approx([1, 1, 0, -0.2247, -0.2247, 0, 1, 1])


# --- GiGPO ---------------------------------------------------------------------------------------
# a: s0 s1 s2, rewards 0 0 10;   b: s0 s1 s1, rewards 0 0 0;   c: s0 s2, rewards 0 10
GIGPO = [[0.0, 0, 10], [0.0, 0, 0], [0.0, 10]]
ANCHORS = [["s0", "s1", "s2"], ["s0", "s1", "s1"], ["s0", "s2"]]


@pytest.mark.parametrize("options,expected", [
    ({"scale": "none"}, [6.1833, 9.6667, 3.3333, -12.8417, -9.8333, -9.8333, 6.6583, 3.3333]),
    ({}, [1.1098, 1.7320, 0.5774, -2.3083, -1.7321, -1.7321, 1.1985, 0.5774])])
def test_gigpo_by_hand(options, expected):
    rewards, mask = table(GIGPO)
    got = gigpo_advantages(rewards, mask, torch.zeros(3, dtype=torch.long), ANCHORS, **options)
    assert got[mask].tolist() == pytest.approx(expected, abs=2e-4) and got[2, 2] == 0


def test_gigpo_without_std_is_a_scaled_leave_one_out():
    got = group_relative_advantages(torch.tensor([10.0, 0, 0, 10]), torch.zeros(4).long(), "none")
    assert got.tolist() == [5, -5, -5, 5] == [0.75 * x for x in (20 / 3, -20 / 3, -20 / 3, 20 / 3)]
    std = group_relative_advantages(torch.tensor([10.0, 0, 0, 10]), torch.zeros(4).long())
    assert std.tolist() == pytest.approx([0.8660, -0.8660, -0.8660, 0.8660], abs=1e-4)
    rewards, mask = table([[7.0]])
    assert gigpo_advantages(rewards, mask, torch.zeros(1).long(), [["s"]]).tolist() == [[0.0]]


def test_gigpo_never_compares_steps_of_different_groups():
    rewards, mask = table([[0.0, 1], [0.0, 0], [0.0, 0], [0.0, 0]])
    got = gigpo_advantages(rewards, mask, torch.tensor([0, 0, 1, 1]), [["s", "t"]] * 4)
    assert (got[:2] != 0).all() and (got[2:] == 0).all()


# --- Eq. 7: the loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation,objective", [
    ("sequence_mean", 0.0), ("token_mean", 0.5), ("sequence_sum", 1.0)])
def test_the_three_means_by_hand(aggregation, objective):
    """Ratio 1; A = +1 on the three tokens of row 1, -1 on the one token of row 2."""
    turn_id = torch.tensor([[0, 1, 1, -1], [-1, 0, -1, -1]])
    weights, count = loss_weights(turn_id, aggregation)
    batch = {"old_logprobs": torch.zeros(2, 4), "ref_logprobs": torch.zeros(2, 4),
             "advantages": torch.tensor([[1.0], [-1.0]]).expand(2, 4), "weights": weights / count}
    loss, stats = policy_loss(batch, torch.zeros(2, 4), torch.zeros(2, 4), 0.2, 0.2, None, 0.0, 0.0)
    assert loss.item() == pytest.approx(-objective) == stats["loss"].item()
    nothing, count = loss_weights(torch.full((2, 3), -1), aggregation)
    assert not nothing.any() and count == 0


def test_the_loss_gradient_equals_finite_differences():
    torch.manual_seed(0)
    turn_id = torch.tensor([[-1, 0, 0, -1, 1], [-1, 0, 0, 0, -1]])
    old, ref = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    weights, count = loss_weights(turn_id, "sequence_mean")
    batch = {"old_logprobs": old, "ref_logprobs": ref, "weights": weights / count,
             "advantages": torch.randn(2, 5).double()}

    def loss(logprobs):
        return policy_loss(batch, logprobs, -logprobs, 0.2, 0.28, 3.0, 0.1, 0.3)[0]
    assert torch.autograd.gradcheck(loss, (old + 0.3 * torch.randn(2, 5).double()).requires_grad_())


def test_k3_by_hand():
    got = kl_policy_ref_k3(torch.tensor([-1.0, -100.0]), torch.tensor([-1.5, -1.0]))
    assert got[0].item() == pytest.approx(0.106531, abs=1e-6) and got.isfinite().all()


# --- the belief probe ----------------------------------------------------------------------------


def test_the_packed_row_drawn_out():
    """Context 5 6 7 8, boundaries 2 and 4, answer 90 91: who sees whom, and the positions.

             5 6 7 8 | 90 91 | 90 91      position
        90   x x     | x     |            2        first copy: as if the row ended after 5 6
        91   x x     | x  x  |            3
        90   x x x x |       | x          4
        91   x x x x |       | x  x       5
    """
    ids, attention, positions = packed_probe([5, 6, 7, 8], [2, 4], [90, 91])
    assert ids.tolist() == [5, 6, 7, 8, 90, 91, 90, 91]
    assert positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 5]
    assert torch.equal(attention[:4, :4], torch.ones(4, 4).tril().bool())
    assert not attention[:4, 4:].any()
    assert attention[4:].int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0],
                                            [1, 1, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 1, 1]]


@pytest.fixture
def played(chat_policy):
    """Demonstrated episodes of different length, as the policy would have written them."""
    args = Args(env_kwargs='{"regime": "parts"}', num_prompts=2, group_size=4)
    env = make_envs(args, 1)[0]
    episodes = demonstrations(env, range(8), 8, np.random.default_rng(0))
    for episode in episodes:
        turns, episode.turns = episode.turns, []
        for turn in turns:
            episode.observation = turn.observation
            turn.prompt_ids, turn.starts_row = chat_policy.prompt(episode, None)
            turn.token_ids = [*chat_policy.encode(turn.action), chat_policy.end_id]
            turn.logprobs = [0.0] * len(turn.token_ids)
            episode.turns.append(turn)
    assert len({len(e.turns) for e in episodes}) > 2
    return chat_policy, episodes, args


def slow_belief(policy, context, ids, gold, temperature):
    """One forward pass per belief, no masks, no padding."""
    logits = policy.model(torch.tensor([context + ids])).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    values = [logprobs[len(context) + j - 1, token].item()
              for j, (token, is_gold) in enumerate(zip(ids, gold, strict=True)) if is_gold]
    return sum(values) / len(values)


@pytest.mark.parametrize("temperature,micro_batch_tokens", [(1.0, 16384), (0.7, 600)])
def test_packed_and_separate_beliefs_equal_one_forward_each(played, temperature, micro_batch_tokens):
    policy, episodes, args = played
    args.temperature, args.micro_batch_tokens = temperature, micro_batch_tokens
    expected = []
    with torch.no_grad():
        for episode in episodes:
            ids, gold = wrap_answer(policy, "answer {answer}", episode.info["answer"])
            context = []
            for turn in episode.turns:
                context = context + turn.prompt_ids
                expected.append(slow_belief(policy, context, ids, gold, temperature))
                context = context + turn.token_ids
    for args.probe in ("packed", "separate"):
        got = probe_beliefs(policy, episodes, "answer {answer}", args)
        assert not got.requires_grad and got.tolist() == pytest.approx(expected, abs=1e-5)
    args.belief = "prob"
    got = probe_beliefs(policy, episodes, "answer {answer}", args)
    assert got.tolist() == pytest.approx(np.exp(expected).tolist(), abs=1e-5)
    template = "{answer}"  # nothing before the answer: its first token follows the boundary
    args.probe, args.belief = "packed", "log_prob"
    ids, gold = wrap_answer(policy, template, episodes[0].info["answer"])
    with torch.no_grad():
        first = slow_belief(policy, episodes[0].turns[0].prompt_ids, ids, gold, temperature)
    assert all(gold) and probe_beliefs(policy, episodes, template, args)[0].item() == pytest.approx(
        first, abs=1e-5)


def test_the_probe_leaves_no_trace(played):
    policy, episodes, args = played
    before = json.dumps([e.info for e in episodes]), [list(e.row()) for e in episodes]
    weights = [p.clone() for p in policy.model.parameters()]
    probe_beliefs(policy, episodes, "answer {answer}", args)
    assert before == (json.dumps([e.info for e in episodes]), [list(e.row()) for e in episodes])
    assert all(torch.equal(*pair) for pair in zip(weights, policy.model.parameters(), strict=True))
    assert all(p.grad is None for p in policy.model.parameters())


def test_the_answer_is_written_as_the_policy_would_write_it(chat_policy):
    """Whole words as tokens: " Ada" with its space is one token, and the only one that counts."""
    texts = [f"answer {name} {other}" for name in ("Ada", "Ben") for other in ("Cleo", "Dan")] * 9
    tiny = Policy(*make_tiny(Args(), texts), "cpu")
    ids, gold = wrap_answer(tiny, "answer {answer}", "Ada")
    assert ids == tiny.encode("answer Ada") and gold == [False, True]
    ids, gold = wrap_answer(tiny, "answer {answer}", "Ada Dan")
    assert ids == tiny.encode("answer Ada Dan") and gold == [False, True, True]
    ids, gold = wrap_answer(chat_policy, "<answer>{answer}</answer>", "Ada")
    assert chat_policy.tokenizer.decode([i for i, g in zip(ids, gold, strict=True) if g]) == "Ada"
    assert chat_policy.tokenizer.decode(ids) == "<answer>Ada</answer>"


def test_nothing_but_the_game_stands_in_the_context(tiny_policy):
    args = Args(num_prompts=2, group_size=2, max_turn_tokens=4)
    for episode in collect_groups(tiny_policy, make_envs(args, 4), args, 0):
        text = tiny_policy.tokenizer.decode(episode.row())
        for turn in episode.turns:
            text = text.replace(turn.observation, "", 1).replace(turn.action, "", 1)
        assert set(text) <= set("<|user|><|assistant|><|end|>"), text


def test_every_way_to_end_has_as_many_beliefs_as_turns(tiny_policy):
    """Answered, malformed, truncated by the environment and by --max-turns."""
    args = Args(max_turns=4)
    envs = make_envs(args, 4)
    episodes = start_episodes(envs, [5] * 4)
    for number, (env, episode) in enumerate(zip(envs, episodes, strict=True)):
        script = [["answer Ada"], ["search Ada boss", "?"], ["search Ada boss"] * 9,
                  ["search Ada boss"] * 2][number]
        turns = iter(script)
        while not episode.done and (action := next(turns, None)):
            turn = demonstration_turn(tiny_policy, episode, action)
            episode.answer(env, turn)
    rollout(tiny_policy, envs[3:], episodes[3:], [random_stream(1)], max_turns=2, max_turn_tokens=4,
            temperature=1.0)
    assert [e.truncated for e in episodes] == [False, False, True, True]
    beliefs = probe_beliefs(tiny_policy, episodes, "answer {answer}", args)
    assert len(beliefs) == sum(len(e.turns) for e in episodes) and beliefs.isfinite().all()


def demonstration_turn(policy, episode, action):
    from envs.episodes import Turn
    ids = [*policy.encode(action), policy.end_id]
    return Turn(episode.observation, action, *policy.prompt(episode, None), token_ids=ids,
                logprobs=[0.0] * len(ids))


def test_an_episode_that_fills_the_context_has_a_belief_for_every_turn(tiny_policy):
    args = Args(num_prompts=4, group_size=2, max_turn_tokens=4, env_id="tests/Words-v0")
    tiny_policy.context_length = 30
    episodes = collect_groups(tiny_policy, make_envs(args, 8), args, 0)
    assert any(e.overflowed for e in episodes)
    rewards, mask = turn_table(episodes, lambda turn: turn.reward, tiny_policy.device)
    beliefs = torch.zeros_like(rewards)
    beliefs[mask] = probe_beliefs(tiny_policy, episodes, "{answer}", args)
    gains = information_gain(beliefs, mask)
    group = torch.arange(8) // 2
    got = turn_returns(normalize_rewards(gains, rewards.sum(1), mask, group), mask, 1.0)
    assert got.isfinite().all() and (got[~mask] == 0).all() and got.any()


def test_the_probe_needs_the_answer_of_the_reset_only(played):
    policy, episodes, args = played
    expected = probe_beliefs(policy, episodes, "answer {answer}", args)
    for episode in episodes:
        episode.info = {}
        for turn in episode.turns:
            turn.info = {}
    assert torch.equal(probe_beliefs(policy, episodes, "answer {answer}", args), expected)


def test_attention_that_cannot_take_the_mask_is_named(tmp_path, capsys, chat_folder):
    config = Path(chat_folder) / "config.json"
    record = json.loads(config.read_text()) | {"attn_implementation": "eager"}
    config.write_text(json.dumps(record))
    flags = QUICK | {"num_iterations": 1, "eval_episodes": 2, "max_turn_tokens": 3, "max_turns": 2}
    with pytest.raises(SystemExit) as end:
        main(Args(**flags, run_dir=str(tmp_path), model=chat_folder))
    assert end.value.code == 2 and "--probe separate" in capsys.readouterr().err
    assert main(Args(**flags, run_dir=str(tmp_path), model=chat_folder, probe="separate"))


# --- the update ----------------------------------------------------------------------------------


def run_update(policy, batch, **options):
    keeper = KeepGradient(policy)
    return update(policy, None, keeper, dict(batch), Args(max_grad_norm=1e9, **options)), keeper.gradient


@pytest.fixture
def batch(tiny_policy):
    args = Args(num_prompts=4, group_size=2, max_turn_tokens=4, env_id="tests/Words-v0")
    episodes = collect_groups(tiny_policy, make_envs(args, 8), args, 0)
    batch = collate(episodes, tiny_policy.device)
    torch.manual_seed(0)
    batch["advantages"] = expand_to_tokens(torch.randn(8, 6), batch["turn_id"], batch["episode_id"])
    return batch


@pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum", "token_mean"])
def test_layout_does_not_matter_and_the_gradient_is_that_of_a_loop(tiny_policy, batch, aggregation):
    """Micro-batches, padding, the order of rows, what stands on tokens that were not sampled."""
    base = run_update(tiny_policy, batch, aggregation=aggregation)

    def same(other):
        assert base[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
        assert torch.allclose(base[1], other[1], rtol=1e-3, atol=1e-6)
    same(run_update(tiny_policy, batch, aggregation=aggregation, micro_batch_tokens=1))
    fill = {"turn_id": -1, "tokens": 7, "old_logprobs": -3.0, "advantages": 5.0}
    padded = {k: torch.nn.functional.pad(x, (0, 6), value=fill[k]) if x.dim() > 1 else x
              for k, x in batch.items()} | {"lengths": batch["lengths"] + 6}
    same(run_update(tiny_policy, padded, aggregation=aggregation))
    order = torch.randperm(8)
    same(run_update(tiny_policy, {k: x[order] for k, x in batch.items()}, aggregation=aggregation))
    outside = batch["turn_id"] < 0
    changed = {name: torch.where(outside, 123.0, batch[name]) for name in ("old_logprobs", "advantages")}
    same(run_update(tiny_policy, batch | changed, aggregation=aggregation))
    objective, tokens = 0.0, (batch["turn_id"] >= 0).sum()
    logprobs, entropy = token_logprobs(tiny_policy, batch, 1.0)
    for row in range(8):  # ratio 1: the plain policy gradient
        mine = (batch["turn_id"][row] >= 0).nonzero()[:, 0]
        terms = sum(batch["advantages"][row, t] * logprobs[row, t] + 0.001 * entropy[row, t] for t in mine)
        objective = objective + terms / {"sequence_mean": 8 * len(mine), "sequence_sum": 8,
                                         "token_mean": tokens}[aggregation]
    tiny_policy.model.zero_grad()
    (-objective).backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_policy.model.parameters()])
    assert torch.allclose(base[1], expected, rtol=1e-3, atol=1e-6)


def test_a_rank_without_rows_still_takes_the_step(tiny_policy):
    empty = collate([], torch.device("cpu")) | {"advantages": torch.zeros(0, 1)}
    metrics, gradient = run_update(tiny_policy, empty)
    assert gradient.norm() == 0.0 and metrics["grad_norm"] == 0.0


# --- whole runs ----------------------------------------------------------------------------------
QUICK = {"num_prompts": 2, "group_size": 4, "warm_start_steps": 20, "num_iterations": 2,
         "eval_episodes": 8, "eval_every": 1, "print_samples": 0}


@pytest.mark.parametrize("flags", [
    {"reward_source": "outcome", "aggregation": "token_mean"},
    {"reward_source": "information_gain", "probe": "separate", "belief": "prob"},
    {"normalization": "joint", "curriculum": True, "gamma": 0.9, "aggregation": "sequence_sum"},
    {"advantage": "gigpo", "gamma": 0.95, "env_kwargs": '{"regime": "hopeless"}'},
    {"kl_coefficient": 0.1, "dual_clip": 3.0, "num_epochs": 2, "num_minibatches": 1}])
def test_every_arm_runs(flags, tmp_path):
    summary = main(Args(**QUICK, run_dir=str(tmp_path), **flags))
    assert summary["iterations"] == 2 and 0 <= summary["success_end"] <= 1


def test_an_environment_without_an_answer_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(Args(**QUICK, run_dir=str(tmp_path), env_id="turnrl/FrozenLake-v0"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "info['answer']" in lines[0]


def test_beliefs_follow_the_weights_and_carry_no_gradient(played):
    policy, episodes, args = played
    before = probe_beliefs(policy, episodes, "answer {answer}", args)
    with torch.no_grad():
        for p in policy.model.parameters():
            p += 0.1 * torch.randn_like(p)
    after = probe_beliefs(policy, episodes, "answer {answer}", args)
    assert not torch.allclose(before, after, atol=1e-3)
    batch = collate(episodes, policy.device)
    logprobs, _ = token_logprobs(policy, batch, 1.0)
    assert logprobs.requires_grad, "only the probe is without gradient"
