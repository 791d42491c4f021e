"""What needs a CUDA device: `pytest -m gpu`. Without one these tests are skipped."""

import csv
import importlib

import numpy as np
import pytest
import torch

from algos import igpo
from conftest import ROOT, random_policy, streams
from policies import Policy
from rollouts import collect_groups, make_envs, rollout
from utils import collate, token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("kind,bf16,tolerance", [
    ("qwen3", False, 1e-3), ("qwen3", True, 0.3), ("mistral", False, 1e-3), ("lfm2", False, 1e-3)])
def test_rollout_logprobs_equal_a_recompute_on_the_gpu(started, kind, bf16, tolerance):
    plain = random_policy(kind)
    policy = Policy(plain.model, plain.tokenizer, "cuda", bf16=bf16)
    policy.max_turn_tokens = 6
    torch.set_float32_matmul_precision("highest")
    envs, episodes = started("turnrl/FrozenLake-v0", [1, 2, 3, 4])
    rollout(policy, envs, episodes, streams(4), max_turns=4, temperature=1.0)
    batch = collate(episodes, policy.device)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch["old_logprobs"]).abs().max() < tolerance
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


@pytest.mark.parametrize("model", ["tiny", "folder"])
@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
def test_every_script_trains_on_the_gpu(tmp_path, chat_folder, script, model):
    module = importlib.import_module(f"algos.{script}")
    some = {name: value for name, value in {
        "kl_coefficient": 0.1, "actor_warm_up": 1, "context_limit": 1024}.items() if hasattr(module.Args, name)}
    summary = module.main(module.Args(
        device="cuda", model="tiny" if model == "tiny" else chat_folder, num_prompts=2,
        group_size=4, num_iterations=2, warm_start_steps=20, eval_episodes=8, max_turn_tokens=4,
        print_samples=1, run_dir=str(tmp_path), **some))
    assert summary["iterations"] == 2 and np.isfinite(summary["return_end"])
    [table] = tmp_path.glob("*/metrics.csv")
    gaps = [row.get("sampling_gap") for row in csv.DictReader(open(table))][1:]
    assert all(0 < float(gap) < 1 for gap in gaps) if model == "folder" else gaps == [None, None]


def test_beliefs_on_the_gpu_equal_those_on_the_cpu(tiny_policy):
    args = igpo.Args(num_prompts=4, group_size=2, max_turn_tokens=4)
    episodes = collect_groups(tiny_policy, make_envs(args, 8), args, 0)
    expected = igpo.beliefs_before_turns(tiny_policy, episodes, "answer {answer}", args)
    torch.set_float32_matmul_precision("highest")
    policy = Policy(tiny_policy.model, tiny_policy.tokenizer, "cuda")
    got = igpo.beliefs_before_turns(policy, episodes, "answer {answer}", args).cpu()
    assert torch.allclose(got, expected, atol=1e-3)
