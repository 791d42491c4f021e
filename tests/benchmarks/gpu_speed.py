"""How fast a model of half a billion random parameters decodes and trains, against what the GPU could do.

The stage `speed` of gpu.py.

decode: rows of 256 tokens go on by 64, sampled as in a rollout (autocast to bf16 around all of it). The limit is
memory: every step reads all weights (bf16) and the cached keys and values.
train: forward, backward and optimizer step on rows of 512 tokens, 64 of them sampled, with and without
--gradient-checkpointing. The limit is 6 operations per weight and token (of the output layer: per sampled token) at the rate of a
large bf16 product.
Bandwidth and rate are measured in the same run.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from envs.episodes import Turn
from policies import Policy, load_policy, make_tiny
from rollouts import Decoder, sample_answers
from utils import RunArgs, micro_batches, optimizer_step, token_logprobs

PROMPT, ANSWER, ROW = 256, 64, 512


@dataclasses.dataclass
class Sizes:
    batches: tuple[int, ...] = (1, 16, 64, 256)  # rows that are decoded together
    micro_batch_tokens: tuple[int, ...] = (4096, 16384)  # tokens per forward pass of a training step
    layers: int = 24  # these three make a model of the size of Qwen2.5-0.5B
    width: int = 896
    vocabulary: int = 151936
    repeats: int = 5  # measurements, of which the median counts


def seconds(call, device: torch.device, repeats: int) -> float:
    """The median time of a call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def limits(device: torch.device, repeats: int) -> tuple[float, float]:
    """Bytes per second of a large copy, operations per second of a large bf16 product."""
    size = 2**30 if device.type == "cuda" else 2**24
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * size / seconds(lambda: y.copy_(x), device, repeats)
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return bandwidth, 2 * n**3 / seconds(lambda: a @ a, device, repeats)


def make_model(sizes: Sizes, parent: Path) -> str:
    """The random model and a tokenizer with a chat template, as a folder."""
    folder = parent / f"random-{sizes.layers}-{sizes.width}-{sizes.vocabulary}"
    if not folder.exists():
        _, tokenizer = make_tiny(RunArgs(), ["word"] * 9)
        heads = max(2, sizes.width // 64)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_attention_heads=heads,
            intermediate_size=sizes.width * 38 // 7 // 2 * 2, num_hidden_layers=sizes.layers, num_key_value_heads=2,
            max_position_embeddings=32768, tie_word_embeddings=True))
        Policy(model, tokenizer, "cpu").save(folder)
    return str(folder)


class Timed(Decoder):
    """Notes when the logits after the prompts are there."""

    start = None

    def feed(self, rows, active=None):
        logits = super().feed(rows, active)
        if self.start is None:
            logits.sum().item()  # waits for the GPU
            self.start = time.perf_counter()
        return logits


@torch.no_grad()
def decode(policy: Policy, batch: int):
    """Answers of ANSWER tokens to prompts of PROMPT tokens; the seconds of the answers only."""
    policy.end_ids = []  # no answer ends early
    decoder, uniforms = Timed(policy, batch), torch.rand(batch, ANSWER + 1, dtype=torch.double)
    rows, turns = [[7] * PROMPT for _ in range(batch)], [Turn("", "") for _ in range(batch)]
    sample_answers(decoder, rows, turns, [ANSWER + 1] * batch, uniforms, 1.0)
    return time.perf_counter() - decoder.start


def measure(sizes: Sizes, device: torch.device, parent: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """What was measured and its numbers, one after the other."""
    folder, cuda = make_model(sizes, parent), device.type == "cuda"
    bandwidth, rate = limits(device, sizes.repeats)
    yield "limits", {"gigabytes_per_second": bandwidth / 1e9, "bf16_teraflops": rate / 1e12}

    def speed(tokens_per_second: float, limit: float) -> dict[str, float]:
        peak = {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if cuda else {}
        return {"tokens_per_second": tokens_per_second, "limit": limit,
                "share_of_limit": tokens_per_second / limit} | peak

    for checkpointing in (False, True):
        policy = load_policy(RunArgs(model=folder, device=str(device), gradient_checkpointing=checkpointing))
        count = sum(p.numel() for p in policy.model.parameters())
        head = policy.model.lm_head.weight.numel()  # works where a token was sampled only
        optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-6, weight_decay=0)
        for tokens in sizes.micro_batch_tokens:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            turn_id = torch.full((2 * tokens // ROW, ROW), -1, device=device)
            turn_id[:, -ANSWER:] = 0
            batch = {"tokens": torch.full_like(turn_id, 7), "turn_id": turn_id,
                     "lengths": torch.full((len(turn_id),), ROW, device=device)}

            def step(batch=batch, tokens=tokens, policy=policy, optimizer=optimizer):
                for part in micro_batches(batch, tokens):
                    logprobs, entropy = token_logprobs(policy, part, 1.0)
                    (logprobs.mean() + 0.01 * entropy.mean()).backward()
                optimizer_step(policy.model, optimizer, 1.0)
            used = seconds(step, device, sizes.repeats)
            yield f"train {tokens}" + " checkpointing" * checkpointing, speed(
                batch["tokens"].numel() / used, rate / 6 / (count - head * (1 - ANSWER / ROW)))
        del step, policy, optimizer

    policy = load_policy(RunArgs(model=folder, device=str(device)))
    config, count = policy.model.config, sum(p.numel() for p in policy.model.parameters())
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * (
        config.hidden_size // config.num_attention_heads)  # bytes of keys and values
    for batch in sizes.batches:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        times = sorted([decode(policy, batch) for _ in range(sizes.repeats + 2)][2:])  # two do not count
        read = 2 * count + batch * (PROMPT + ANSWER / 2) * per_token
        yield f"decode {batch}", speed(
            batch * ANSWER / times[sizes.repeats // 2], batch * bandwidth / read)
