"""Nothing here or in any test downloads anything: models are made from random configurations."""

import copy
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of every test process and of what it starts
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import policies
from envs.episodes import start_episodes
from policies import Policy, make_tiny
from run_folder import Run
from utils import RunArgs, random_stream

PLOT = Run.plot

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokenizer(template: str, specials: list[str], end: str):
    """One token a byte, plus special tokens; padding is the end token, as in many checkpoints."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, eos_token=end, pad_token=end)


def random_model(kind: str, vocab_size: int):
    """A model of two layers: plain, with a sliding window of 40 tokens, or with a recurrent layer before attention."""
    torch.manual_seed(0)
    more = {"llama": {"head_dim": 16}, "qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 40},
            "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}}[kind]
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        initializer_range=0.3, eos_token_id=None, **more)  # wide enough that attention mistakes show in the logits
    return transformers.AutoModelForCausalLM.from_config(config)


def random_policy(kind: str = "qwen3") -> Policy:
    """A random model with a ChatML template and pad == end-of-turn."""
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    return Policy(random_model(kind, len(tokenizer)), tokenizer, "cpu", "Play well.")


class KeepGradient:
    """An optimizer that keeps the gradients instead of stepping."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def step(self):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in self.policy.model.parameters()])

    def zero_grad(self):
        self.policy.model.zero_grad()


def streams(count: int, first: int = 0) -> list[np.random.Generator]:
    return [random_stream(99, first + i) for i in range(count)]


class Script:
    """Stands in for the model: row r's n-th sampled token is script[r][n], never anything else."""

    def __init__(self, policy, script):
        self.policy, self.script, self.sampled = policy, script, [0] * len(script)

    def __call__(self, logits, temperature, uniforms):
        tokens = torch.tensor([line[min(n, len(line) - 1)]
                               for line, n in zip(self.script, self.sampled, strict=True)])
        self.sampled = [n + 1 for n in self.sampled]
        return tokens, torch.full((len(tokens),), -0.5)


@pytest.fixture
def chat_policy() -> Policy:
    return random_policy()


@pytest.fixture
def chat_folder(tmp_path) -> str:
    random_policy("llama").save(tmp_path / "chat")
    return str(tmp_path / "chat")


@pytest.fixture(scope="session")
def made_tiny():
    return make_tiny(RunArgs(), ["left", "down", "right", "up"] * 9)


@pytest.fixture
def tiny_policy(made_tiny) -> Policy:
    """The tiny model before its warm start."""
    model, tokenizer = made_tiny
    return Policy(copy.deepcopy(model), tokenizer, "cpu")


@pytest.fixture(autouse=True)
def cheaper_runs(request, monkeypatch):
    """Runs inside of a test process draw no picture (PLOT does) and imitate fewer demonstrations, which are played again
    by every run; subprocesses and the slow tests do all of it."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(policies, "NUM_DEMONSTRATIONS", 128)
        monkeypatch.setattr(Run, "plot", lambda self, evals: None)


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """Warm starts of the tests go to a folder of their own, shared by all tests of a session, in all its processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["TURNRL_CACHE"] = str(folder / "cache")


@pytest.fixture
def started():
    """Environments and their episodes, reset: started("turnrl/Snake-v0", [1, 2])."""
    from envs import make_env

    def start(env_id: str, seeds: list[int], **kwargs):
        envs = [make_env(env_id, **kwargs) for _ in seeds]
        return envs, start_episodes(envs, seeds)
    return start
