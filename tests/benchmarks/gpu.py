"""How fast a model of half a billion random parameters decodes and trains, against what the GPU could do.

    python tests/benchmarks/gpu.py [--batches 1 16 64 256] [--csv results/gpu.csv]

decode: rows of 256 tokens go on by 64, sampled as in a rollout (autocast to bf16 around all of it). The limit is
memory: every step reads all weights (bf16) and the cached keys and values.
train: forward, backward and optimizer step on rows of 512 tokens, 64 of them sampled, with and without
--gradient-checkpointing. The limit is 6 operations per weight and token (of the output layer: per sampled token) at the rate of a
large bf16 product.
Bandwidth and rate are measured in the same run. On a CPU: --device cpu --layers 2 --width 64 --vocabulary 512.
"""

import csv
import dataclasses
import sys
import time
from pathlib import Path

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from envs.episodes import Turn
from policies import Policy, load_policy, make_tiny
from rollouts import Decoder, sample_answers
from utils import RunArgs, micro_batches, optimizer_step, token_logprobs

PROMPT, ANSWER, ROW = 256, 64, 512


@dataclasses.dataclass
class Options:
    device: str = "cuda"  # torch device
    batches: tuple[int, ...] = (1, 16, 64, 256)  # rows that are decoded together
    micro_batch_tokens: tuple[int, ...] = (4096, 16384)  # tokens per forward pass of a training step
    layers: int = 24  # these four make a model of the size of Qwen2.5-0.5B
    width: int = 896
    vocabulary: int = 151936
    repeats: int = 5  # measurements, of which the median counts
    folder: str = "runs/gpu-model"  # where the random model is kept
    csv: str | None = None  # file the rows are written to


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


def make_model(options: Options) -> str:
    """The random model and a tokenizer with a chat template, as a folder."""
    folder = Path(options.folder) / f"{options.layers}-{options.width}-{options.vocabulary}"
    if not folder.exists():
        _, tokenizer = make_tiny(RunArgs(), ["word"] * 9)
        heads = max(2, options.width // 64)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=options.vocabulary, hidden_size=options.width, num_attention_heads=heads,
            intermediate_size=options.width * 38 // 7 // 2 * 2, num_hidden_layers=options.layers, num_key_value_heads=2,
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


def main(options: Options):
    device, folder, rows = torch.device(options.device), make_model(options), []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    bandwidth, rate = limits(device, options.repeats)
    print(f"{name}: {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.1f} TFLOP/s in bf16, torch {torch.__version__}")

    def report(what: str, size: int, tokens_per_second: float, limit: float):
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        rows.append({"device": name, "torch": torch.__version__, "what": what, "size": size,
                     "tokens_per_second": round(tokens_per_second), "limit": round(limit),
                     "share_of_limit": round(tokens_per_second / limit, 3), "peak_gib": round(peak, 2)})
        print(f"{what:28s} {size:6d}  {tokens_per_second:10.0f} tokens/s  {tokens_per_second / limit:6.1%} of "
              f"{limit:.0f}  peak {peak:.1f} GiB", flush=True)

    for checkpointing in (False, True):
        policy = load_policy(RunArgs(model=folder, device=options.device, gradient_checkpointing=checkpointing))
        count = sum(p.numel() for p in policy.model.parameters())
        head = policy.model.lm_head.weight.numel()  # works where a token was sampled only
        optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-6, weight_decay=0)
        for tokens in options.micro_batch_tokens:
            if device.type == "cuda":
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
            used = seconds(step, device, options.repeats)
            report("train, checkpointing" if checkpointing else "train", tokens,
                   batch["tokens"].numel() / used, rate / 6 / (count - head * (1 - ANSWER / ROW)))
        del step, policy, optimizer
    print(f"{count / 1e6:.0f} million parameters")

    policy = load_policy(RunArgs(model=folder, device=options.device))
    config, count = policy.model.config, sum(p.numel() for p in policy.model.parameters())
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * (
        config.hidden_size // config.num_attention_heads)  # bytes of keys and values
    for batch in options.batches:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = sorted(decode(policy, batch) for _ in range(options.repeats + 2))
        read = 2 * count + batch * (PROMPT + ANSWER / 2) * per_token
        report("decode", batch, batch * ANSWER / times[options.repeats // 2], batch * bandwidth / read)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
