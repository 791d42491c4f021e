"""Models that people bring: the trial of tests/benchmarks/models.py for one of every kind, and what is refused."""

import doctest
import math

import pytest
import torch

import policies
from benchmarks.models import ALL, MODELS, build, judge, trial
from conftest import CHATML, ROOT, byte_tokenizer
from policies import Policy, load_policy, self_check
from results import report
from utils import RunArgs, token_logprobs


def policy_of(name: str, context: int | None = None) -> Policy:
    policy = Policy(build(name), byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"), "cpu")
    policy.limit_context(context)
    return policy


@pytest.mark.parametrize("name,verdict", [
    ("llama", "exact"), ("gpt2", "exact"), ("bloom", "exact"), ("phi3 (longrope)", "exact"),
    ("mixtral (router logits)", "exact"), ("mistral", "exact, slower"), ("lfm2", "exact, slower"),
    ("mamba", "exact, slower")])
def test_the_trial_of_a_kind_of_model(name, verdict):
    """Ragged rows with holes, a window, a recurrent layer before attention and alone, absolute positions, a context
    that the user gives, rotary factors that switch, logits of routers."""
    row = judge(name)
    assert (row["verdict"], row["self_check"], row["gradient"]) == (verdict, verdict, "finite"), row
    assert float(row["difference"]) <= 1e-4 and float(row["influence"]) > 0.1


@pytest.mark.parametrize("name,whole", [
    ("llama", False), ("gemma2", False), ("cohere", False), ("falcon_h1", False), ("opt", False), ("bart", False),
    ("mixtral (router logits)", False), ("mamba", False), ("modernbert-decoder", True), ("gemma4_text (shared keys)", None)])
def test_logits_in_parts_give_the_numbers_and_gradients_of_all_at_once(name, whole, monkeypatch):
    """Models that cap or scale their logits, with a trunk inside another, or that cannot be taken apart."""
    policy = policy_of(name, 2000)
    rows, width = 3, 40
    generator = torch.Generator().manual_seed(0)
    tokens, turn_id = (torch.randint(low, high, (rows, width), generator=generator) for low, high in ((3, 250), (-1, 2)))
    up, sizes, found = torch.linspace(-1, 1, width), [], []
    logits = policy.model(tokens, use_cache=False, **policy.options).logits[:, :-1] / 0.7  # plainly
    log_softmax, mask = logits.log_softmax(-1), turn_id[:, 1:] >= 0
    plain = log_softmax.gather(2, tokens[:, 1:, None])[..., 0] * mask
    entropy = -(log_softmax.exp() * log_softmax).sum(-1) * mask
    in_parts = policy.logits
    monkeypatch.setattr(policy, "logits", lambda *x: sizes.append(in_parts(*x)) or sizes[-1])
    monkeypatch.setattr(policies, "MOST_LOGITS", 7 * policy.vocab_size)
    parts = token_logprobs(policy, {"tokens": tokens, "turn_id": turn_id}, 0.7)
    for values in ((plain, entropy), [x[:, 1:] for x in parts]):
        policy.model.zero_grad()
        (values[0] * up[1:] + values[1]).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    assert whole in (policy.whole, None), "None: it depends on the version of transformers"
    assert policy.vocab_size == logits.shape[2]
    assert max(x.shape[1] for x in sizes) == 7 and len(sizes) >= 2 * (int(mask.sum()) // 7), "and again in the backward pass"
    assert torch.allclose(parts[0][:, 1:], plain, atol=1e-4) and torch.allclose(parts[1][:, 1:], entropy, atol=1e-4)
    assert not parts[0][:, 0].any() and not parts[1][:, 0].any()
    assert torch.allclose(*found, atol=1e-4 * found[0].abs().max().item()) and found[0].abs().max() > 0.1


def test_the_trial_finds_what_is_wrong():
    """Rows that go beyond the switch of longrope; a window behind holes."""
    policy = policy_of("phi3 (longrope)")
    assert policy.context_length == 300
    tokens = torch.arange(301)[None] % 200
    within, at_the_limit, beyond = (policy.forward(tokens[:, :n])[:, :299] for n in (299, 300, 301))
    assert torch.allclose(within, at_the_limit, atol=1e-4) and not torch.allclose(within, beyond, atol=1e-1)
    policy.context_length = 2000
    assert trial(policy)[0] > 1e-2
    policy = policy_of("mistral")
    policy.windowed = False
    assert trial(policy)[0] > 1e-2


@pytest.mark.parametrize("name", ["mamba2", "zamba2"])
def test_steps_of_a_state_space_model_are_those_of_a_long_pass(name):
    """transformers limits the time steps of a long pass only: 0.2 and 0.3 would change nearly all of them."""
    tokens, model = torch.arange(60, 100)[None], build(name)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.2, 0.3)
    limited = model.eval()(tokens).logits
    policy = Policy(model, byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"), "cpu")
    policy.limit_context(2000)
    assert (policy.forward(tokens) - limited).abs().max() > 0.1
    difference = policies.largest_difference(policy)
    assert difference < 1e-4


def refusal(capsys, folder, **flags) -> str:
    with pytest.raises(SystemExit):
        load_policy(RunArgs(model=str(folder), **flags))
    [line] = capsys.readouterr().err.strip().splitlines()
    return line.partition("cannot be used: ")[2]


@pytest.mark.parametrize("name,reason", [
    ("rwkv", "its forward pass takes no cache: it would forget what it has read"),
    ("bloom", "its config does not say how long a context may be: give --context-length")])
def test_what_is_refused_gets_one_line(name, reason, tmp_path, capsys):
    build(name).save_pretrained(tmp_path)
    byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>").save_pretrained(tmp_path)
    assert refusal(capsys, tmp_path) == reason


@pytest.mark.parametrize("name,reason", [
    ("xlstm", "its forward pass fails in a rollout: 'DynamicCache' object has no attribute"),  # a cache of its own
    ("bert", "log-probs of its rollouts are off by .* nats")])  # it looks at later tokens
def test_the_self_check_refuses_with_a_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        self_check(policy_of(name, 2000))


@pytest.mark.parametrize("bad", [{0}, {1}, {3}, set(range(9))])
def test_log_probs_that_are_not_a_number_are_refused(chat_policy, monkeypatch, bad):
    """In any of the four passes of a check."""
    score, passes = policies.token_logprobs, []

    def broken(*args, **kwargs):
        passes.append(score(*args, **kwargs)[0])
        return passes[-1] * (math.nan if len(passes) - 1 in bad else 1), None
    monkeypatch.setattr(policies, "token_logprobs", broken)
    assert math.isnan(policies.largest_difference(chat_policy)) and len(passes) == 4
    if len(bad) > 4:
        with pytest.raises(ValueError, match="off by nan nats"):
            self_check(chat_policy)


def test_worked_examples():
    assert doctest.testmod(policies).failed == 0


def test_the_table_is_of_these_models():
    """Every row was tried. One slips through the self-check: its attention reads the best 40 tokens, and rounding
    decides which is the 40th."""
    rows = report.read(ROOT / "results/models.csv")
    assert [row["model"] for row in rows] == ALL and len({row["model_type"] for row in rows}) >= 55
    assert [row["model"] for row in rows if row["agree"] == "no"] == ["glm_moe_dsa"]
    for row in rows:
        assert row["layers"] in MODELS and (row["verdict"] == "off") == (row["agree"] == "no"), row
        if row["verdict"] == "off":
            continue
        if row["verdict"] == "refused":
            assert row["reason"], row
        else:
            assert float(row["difference"]) < 1e-3 and row["gradient"] == "finite", row
            assert float(row["influence"]) > 0.1, "a model whose attention does not matter proves nothing"


def test_a_model_that_cannot_live_with_holes_reads_every_prompt_from_its_start(capsys):
    """MPT counts holes as tokens; nothing in its config says so, the self-check finds it out."""
    policy = policy_of("mpt", 2000)
    assert not policy.windowed and policies.largest_difference(policy) > 1e-2
    self_check(policy)
    assert policy.windowed and "if every prompt is read from its start" in capsys.readouterr().out
    assert policies.largest_difference(policy) < 1e-4
