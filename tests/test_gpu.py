"""What needs a CUDA device: `pytest -m gpu`. Without one these tests are skipped."""

import numpy as np
import pytest
import torch

from algos import ms_grpo
from conftest import CHATML, byte_tokenizer, random_model
from utils import Policy, collate, random_stream, rollout, token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("bf16,tolerance", [(False, 1e-3), (True, 0.3)])
def test_rollout_logprobs_equal_a_recompute_on_the_gpu(started, bf16, tolerance):
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    policy = Policy(random_model("qwen3", len(tokenizer)), tokenizer, "cuda", bf16=bf16)
    torch.set_float32_matmul_precision("highest")
    envs, episodes = started("turnrl/FrozenLake-v0", [1, 2, 3, 4])
    rollout(policy, envs, episodes, [random_stream(i) for i in range(4)], max_turns=4,
            max_turn_tokens=6, temperature=1.0)
    batch = collate(episodes, policy.device)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy, batch, 1.0)
    assert (logprobs - batch["old_logprobs"]).abs().max() < tolerance
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_ms_grpo_trains_on_the_gpu(tmp_path, chat_folder, model):
    summary = ms_grpo.main(ms_grpo.Args(
        device="cuda", model="tiny" if model == "tiny" else chat_folder, num_prompts=2,
        group_size=4, num_iterations=2, warm_start_steps=20, eval_episodes=8, max_turn_tokens=4,
        kl_coefficient=0.1, print_samples=0, run_dir=str(tmp_path)))
    assert summary["iterations"] == 2 and np.isfinite(summary["return_end"])
