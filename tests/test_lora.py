"""--lora-rank: adapters beside frozen weights, through peft, which is an optional package."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from algos import archer, ms_grpo, st_ppo
from conftest import random_policy
from envs.episodes import Episode, Turn
from policies import Policy, add_adapters, largest_difference, load_policy, twin
from test_cli import SCRIPTS, fails, only_run, quick
from utils import collate, optimizer_step, token_logprobs

YES = {"env_id": "words:tests/YesOrNo-v0", "env_kwargs": "{}", "max_turn_tokens": 5, "warm_start_learning_rate": 5e-3}
with_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")


def adapted(rank: int = 3, kind: str = "qwen3", random: bool = True) -> Policy:
    """A random model with adapters, random ones unless they are as at the start."""
    policy = random_policy(kind)
    policy.adapters = add_adapters(policy.model, rank, seed=1)
    for name, x in policy.model.named_parameters():
        if random and "lora_B" in name:
            torch.nn.init.normal_(x, std=0.3)
    return policy


def a_batch(policy: Policy) -> dict:
    return collate([Episode(0, "", [Turn("", "", list(range(20, 60)), True, [*range(9), n], [0.0] * 10)])
                    for n in range(3)], policy.device)


@with_peft
def test_adapters_change_nothing_at_first_and_then_add_twice_the_product_of_their_matrices():
    plain, policy = random_policy(), adapted(random=False)
    batch = a_batch(policy)
    for a, b in zip(token_logprobs(plain, batch, 1.0), token_logprobs(policy, batch, 1.0), strict=True):
        assert torch.equal(a, b)
    trained = {name: x for name, x in policy.model.named_parameters() if x.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # not the output layer
    layer, x = adapted().model.model.layers[1].mlp.down_proj, torch.randn(2, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (3, 64), (32, 3)
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 2 * x @ a.T @ b.T)


@with_peft
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_rollouts_with_adapters_give_the_log_probs_of_full_passes(kind):
    policy = adapted(kind=kind)
    policy.max_turn_tokens, policy.worth_sharing = 4, 1
    assert largest_difference(policy) < 1e-4


@with_peft
def test_an_optimizer_step_moves_the_adapters_only():
    policy = adapted()
    before = {name: x.clone() for name, x in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-2, weight_decay=0)
    token_logprobs(policy, a_batch(policy), 1.0)[0].sum().backward()
    optimizer_step(policy.model, optimizer, 1.0)
    for name, x in policy.model.named_parameters():
        assert torch.equal(x, before[name]) == (not x.requires_grad), name
        assert x.requires_grad or x.grad is None  # no memory for it


@with_peft
def test_checkpointing_gives_the_adapters_the_same_gradients(tmp_path, chat_folder):
    def gradients(**flags) -> list[torch.Tensor]:
        policy = load_policy(quick(tmp_path, **YES | {"model": chat_folder, "warm_start_steps": 0, "lora_rank": 2} | flags))
        policy.bf16, counted = False, []
        for layer in policy.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: counted.append(1))
        token_logprobs(policy, a_batch(policy), 1.0)[0].sum().backward()
        assert len(counted) == (4 if flags else 2)  # two layers, twice with checkpointing
        return [p.grad for p in policy.model.parameters() if p.requires_grad]

    plain, twice = gradients(), gradients(gradient_checkpointing=True)
    assert any(g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@with_peft
def test_adapters_are_saved_alone_loaded_again_and_merged_as_a_model(tmp_path):
    """As --model, a folder of adapters is its base with the product added. That may get adapters of its own."""
    random_policy("llama").save(tmp_path / "base")

    def load(name: str, **flags) -> Policy:
        return load_policy(quick(tmp_path, **YES | {"model": str(tmp_path / name), "warm_start_steps": 0} | flags))

    def scores(policy: Policy) -> torch.Tensor:
        policy.bf16 = False
        with torch.no_grad():
            return token_logprobs(policy, a_batch(policy), 1.0)[0]

    def shake(policy: Policy):
        with torch.no_grad():
            for name, x in policy.model.named_parameters():
                if "lora_B" in name:
                    x.normal_(std=0.1)
        return policy

    first = shake(load("base", lora_rank=2))
    first.save(tmp_path / "first")
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = load("base", lora_rank=2)
    assert not torch.equal(scores(again), scores(first))
    again.load(tmp_path / "first")
    assert torch.equal(scores(again), scores(first))
    merged = load("first")
    assert all(x.requires_grad for x in merged.model.parameters())
    torch.testing.assert_close(scores(merged), scores(first), rtol=0, atol=1e-4)
    second = shake(load("first", lora_rank=3))
    second.save(tmp_path / "second")
    torch.testing.assert_close(scores(load("second")), scores(second), rtol=0, atol=1e-4)


@with_peft
@pytest.mark.parametrize("seed", [1, 2])
def test_adapters_begin_as_the_seed_says(seed):
    a, b = (random_policy(), random_policy())
    add_adapters(a.model, 2, 1)
    torch.rand(3)
    add_adapters(b.model, 2, seed)
    [x, y] = [next(p for name, p in m.model.named_parameters() if "lora_A" in name) for m in (a, b)]
    assert torch.equal(x, y) == (seed == 1)


@with_peft
def test_a_twin_shares_the_frozen_weights_and_owns_the_others():
    """So a reference or a critic costs no second base. Without adapters it is an ordinary copy."""
    policy = adapted()
    for copy in (twin(policy), twin(policy.model.base_model)):
        parts = zip(getattr(copy, "model", copy).parameters(), policy.model.parameters(), strict=False)
        for x, y in parts if isinstance(copy, Policy) else zip(copy.parameters(), policy.model.base_model.parameters(), strict=True):
            assert (x is y) == (not y.requires_grad) and torch.equal(x, y)
    plain = random_policy()
    assert all(x is not y for x, y in zip(twin(plain).model.parameters(), plain.model.parameters(), strict=True))
    critic, turns = st_ppo.Critic(policy), archer.TurnCritic(policy, 2)
    for network in (critic, turns, twin(turns)):
        names = [name for name, x in network.named_parameters() if x.requires_grad]
        assert names and all("lora_" in name or "head" in name for name in names)
    own = sum(x.requires_grad for x in policy.model.base_model.parameters())
    assert sum(x.requires_grad for x in critic.parameters()) == own + 2
    for target, online in zip(twin(turns).parameters(), turns.parameters(), strict=True):
        assert (target is online) == (not online.requires_grad)


@with_peft
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_adapters_and_resumes_with_them(tmp_path, chat_folder, script):
    """In two halves, bit for bit, from a warm start of the adapters. The critic and the reference are there, too."""
    game = {"env_id": "words:tests/Words-v0", "env_kwargs": "{}", "model": chat_folder, "num_iterations": 2, "warm_start_steps": 2,
            "max_turn_tokens": 4, "eval_every": 1, "lora_rank": 2, "learning_rate": 1e-2}
    game |= {"context_limit": 400} if script == "turn_budget" else {"kl_coefficient": 0.1}
    module = importlib.import_module(f"algos.{script}")

    def run(name: str, **flags) -> Path:
        args = quick(tmp_path / name, script, **{k: x for k, x in (game | flags).items() if hasattr(module.Args, k)})
        module.main(args)
        return only_run(tmp_path / name)

    whole = run("whole")
    half = run("half", num_iterations=1)
    module.main(quick(tmp_path / "half", script, **{k: x for k, x in game.items() if hasattr(module.Args, k)}, resume=str(half)))
    one, two = ((folder / "checkpoint/adapter_model.safetensors").read_bytes() for folder in (whole, half))
    assert one == two
    base = json.loads((whole / "checkpoint/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(Path(chat_folder).resolve())
    start = load_policy(quick(tmp_path, script, **{k: x for k, x in game.items() if hasattr(module.Args, k)}))
    end = load_policy(quick(tmp_path, script, model=chat_folder, env_id=game["env_id"], env_kwargs="{}", lora_rank=2))
    end.load(whole / "checkpoint")
    moved = [not torch.equal(x, y) for x, y in zip(start.model.parameters(), end.model.parameters(), strict=True)]
    assert any(moved) and not any(m for m, x in zip(moved, end.model.parameters(), strict=True) if not x.requires_grad)


def test_without_peft_there_is_one_line(tmp_path, chat_folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(capsys, "--lora-rank needs peft: pip install peft",
          call=lambda: load_policy(quick(tmp_path, **YES | {"model": chat_folder, "lora_rank": 2})))
    fails(capsys, "--lora-rank must be at least 1", call=lambda: ms_grpo.main(quick(tmp_path, lora_rank=0)))
