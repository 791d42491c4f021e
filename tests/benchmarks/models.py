"""Which causal language models of transformers can be trained here, and how exact their rollouts are.

Every model is made from a random configuration with weights that are large enough for mistakes of its attention to
show, and saved to a folder, which --model would name. The trial is harder than the self-check that every run begins
with: eight episodes of one to six turns, observations of 3 to 150 tokens, the whole history in one row or a new row
each turn; then every sampled token's log-prob is compared with passes over its row alone and beside others.

    python tests/benchmarks/models.py [names ..]          (writes results/models.csv; names: those rows only)
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = map(str, (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]))

import gymnasium as gym
import torch
import transformers

import policies
from conftest import CHATML, ROOT, byte_tokenizer
from envs.episodes import Episode
from policies import Policy
from rollouts import rollout
from utils import RunArgs, batch_logprobs, collate, random_stream, select_rows, token_logprobs

LIMIT = 1e-2  # nats, as in the self-check
GIVEN_CONTEXT = 2000  # where the config says none
COMMON = {  # those that a config knows; ABSENT takes one out
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1}
ABSENT = object()
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
          "head_dim": ABSENT, "num_key_value_heads": 4}
WINDOW = {"sliding_window": 40}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
         "mamba_expand": 2}
SIGLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}


def rope(rope_type: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **more}}


LONGROPE = {"original_max_position_embeddings": 300, **rope(
    "longrope", short_factor=[1] * 4, long_factor=[1 + 3 * i for i in range(4)])}
MODELS: dict[str, dict[str, dict]] = {  # kind of layers: name, which begins with the model_type: its configuration
    "full attention": {
        "llama": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "phi": {}, "phi3": {}, "stablelm": {}, "gpt_neox": {},
        "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4}, "falcon (rotary)": {"alibi": False},
        "granite": {}, "olmo": {}, "olmo2": {}, "cohere": {"logit_scale": 1.0}, "glm": {}, "glm4": {}, "smollm3": {},
        "ernie4_5": {}, "seed_oss": {}, "hunyuan_v1_dense": {}, "apertus": {}, "arcee": {}, "nemotron": {},
        "persimmon": {}, "helium": {}, "diffllama": {}, "bitnet": {}, "exaone": {}, "internlm3": {}, "nanochat": {},
        "ministral3": {}, "starcoder2": {}, "doge": {}, "gpt_neox_japanese": {}, "jais2": {}, "hyperclovax": {},
        "hrm_text": {}, "minicpm3": {"dim_model_base": 32, **LATENT}, "youtu": LATENT},
    "full attention, stretched positions": {
        "llama (llama3)": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                               original_max_position_embeddings=256),
        "llama (yarn)": rope("yarn", factor=4.0, original_max_position_embeddings=512),
        "llama (linear)": rope("linear", factor=4.0),
        "llama (dynamic)": {**rope("dynamic", factor=4.0), "max_position_embeddings": 400},
        "phi3 (longrope)": LONGROPE},
    "absolute positions": {
        "gpt2": {}, "gpt_bigcode": {}, "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64}, "biogpt": {},
        "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        "ctrl": {"dff": 64}, "openai-gpt": {}, "bert (decoder)": {"is_decoder": True},
        "roberta (decoder)": {"is_decoder": True}},
    "alibi": {
        "bloom": {}, "falcon (alibi)": {"alibi": True},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048}},
    "sliding window": {
        "mistral": WINDOW, "ministral": WINDOW, "qwen2 (window)": {"use_sliding_window": True, **MIXED},
        "qwen3 (window)": {"use_sliding_window": True, **MIXED}, "gemma2": WINDOW, "gemma3_text": MIXED,
        "phi3 (window)": WINDOW, "starcoder2 (window)": WINDOW, "olmo3": MIXED,
        "cohere2": {"logit_scale": 1.0, **MIXED}, "exaone4": MIXED,
        "granite_swa": WINDOW, "vaultgemma": WINDOW, "cwm": {**MIXED, "eos_token_id": 2},
        "modernbert-decoder": {"local_attention": 40, "eos_token_id": 2},
        "gemma4_text": {**MIXED, "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8,
                        "num_kv_shared_layers": 0, "global_head_dim": 8},
        "gemma4_text (shared keys)": {
            **WINDOW, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
            "global_head_dim": 8},
        "gemma3n_text": {**MIXED, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 8,
                         "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8,
                         "activation_sparsity_pattern": [0.0, 0.0]},
        "gpt_neo (local)": {"num_layers": 2, "num_heads": 4, "window_size": 40,
                            "attention_types": [[["global", "local"], 1]]}},
    "mixture of experts": {
        "mixtral": {}, "mixtral (router logits)": {"output_router_logits": True}, "qwen2_moe": {}, "qwen3_moe": {},
        "phimoe": {}, "olmoe": {}, "granitemoe": {}, "granitemoeshared": {"shared_intermediate_size": 32},
        "deepseek_v2": LATENT, "deepseek_v3": LATENT, "glm4_moe": {}, "glm4_moe_lite": LATENT,
        "dots1": {"n_shared_experts": 1, "num_key_value_heads": 2}, "ernie4_5_moe": {}, "hunyuan_v1_moe": {},
        "minimax_m2": {}, "flex_olmo": {}, "jetmoe": {}, "solar_open": {}, "aria_text": {}, "hy_v3": {},
        "sarvam_moe": {},
        "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048,
                 "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                 "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}}},
    "mixture of experts, sliding window": {
        "mixtral (window)": WINDOW, "gpt_oss": MIXED, "afmoe": MIXED, "exaone_moe": MIXED, "mellum": MIXED,
        "granitemoe_swa": WINDOW,
        "cohere2_moe": {"logit_scale": 1.0, **MIXED}, "mimo_v2_flash": MIXED, "laguna": MIXED,
        "llama4_text": {"attention_chunk_size": 40, "layer_types": ["chunked_attention", "full_attention"],
                        "intermediate_size_mlp": 64, "num_hidden_layers": 2}},
    "mixture of experts, indexed attention": {  # with few index heads many scores are 0: ties
        "deepseek_v32": {**LATENT, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 40},
        "glm_moe_dsa": {**LATENT, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 40}},
    "recurrent": {
        "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8},
        "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16, "expand": 2},
        "rwkv": {"attention_hidden_size": 32}, "xlstm": {"num_heads": 4, "head_dim": ABSENT}},
    "recurrent and attention": {
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        "falcon_h1": MAMBA | {"mamba_d_ssm": 64}, "bamba": MAMBA | {"attn_layer_indices": [1]},
        "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 40,
                            "conv1d_width": 4},
        "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2,
                  "mamba_d_state": 8, "mamba_dt_rank": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
                  "head_dim": ABSENT},
        "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8,
                   "mamba_d_state": 8, "chunk_size": 16, "head_dim": ABSENT, "num_key_value_heads": 4},
        "olmo_hybrid": LINEAR, "qwen3_5_text": LINEAR,
        "lfm3": {"layer_types": ["conv", "full_attention"]}},
    "recurrent, attention and experts": {
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                  "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
        "kimi_linear": {**LATENT, "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8,
                        "linear_num_heads": 4},
        "qwen3_next": LINEAR, "qwen3_5_moe_text": LINEAR,
        "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_num_heads": 8,
                       "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16}},
    "also reads images": {
        "gemma3": {"text_config": COMMON | MIXED, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
        "llama4": {"text_config": COMMON | {"attention_chunk_size": 40, "intermediate_size_mlp": 64,
                                            "layer_types": ["chunked_attention", "full_attention"]},
                   "vision_config": SIGLIP | {"vision_output_dim": 32, "projector_input_dim": 32,
                                              "projector_output_dim": 32}}},
    "decoder of a translator": {
        "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
                 "encoder_layers": 2, "encoder_attention_heads": 4}},
    "no causal mask": {"bert": {}, "roberta": {}, "electra": {}},
}
ALL = [name for models in MODELS.values() for name in models]


def config_of(name: str):
    """The configuration of a row of the table."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name.split()[0]]
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    [more] = [models[name] for models in MODELS.values() if name in models]
    common = {} if "text_config" in more else {key: x for key, x in COMMON.items() if key in known}
    config = {key: x for key, x in (common | more).items() if x is not ABSENT}
    return config_class(**config)


def build(name: str):
    """A random model whose attention matters: most weights are drawn anew where they began small."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1 and x.std() < 0.1:
                x.normal_(0.0, 0.3)
    return model


class Talk(gym.Env):
    """Says some texts, whatever it hears, then ends."""

    def __init__(self, texts: list[str]):
        self.texts = list(texts)

    def step(self, action: str):
        text, *self.texts = [*self.texts, ""]
        return text, 0.0, len(self.texts) == 1, False, {}


LENGTHS = [[3], [150, 3], [20, 90, 3], [3, 3, 120, 40], [60, 5, 30, 3, 100], [10, 150, 3, 70, 3, 33],
           [128, 17, 64, 9, 11, 25], [5, 4]]  # of the observations of each episode, in tokens


def play(policy: Policy, history_turns: int | None) -> list[Episode]:
    """Eight ragged episodes; answers have up to 1 + (number + 2 turns) % 6 tokens."""
    rng = random_stream(7)
    texts = [["".join(map(chr, rng.integers(97, 123, size=n))) for n in each] for each in LENGTHS]
    episodes = [Episode(number, text[0]) for number, text in enumerate(texts)]
    envs = [Talk([*text[1:], ""]) for text in texts]
    policy.history_turns = history_turns
    policy.turn_cap = lambda episode, used: 1 + (episode.seed + 2 * len(episode.turns)) % 6
    return rollout(policy, envs, episodes, [random_stream(8, n) for n in range(len(texts))], 6, temperature=1.0)


def passes(policy: Policy, batch: dict) -> list:
    """The log-probs of a batch, row by row and in micro-batches of several sizes: tensors (B, T)."""
    width, alone = batch["tokens"].shape[1], []
    for row in range(len(batch["tokens"])):
        one = batch_logprobs(policy, select_rows(batch, [row]), RunArgs())[0]
        alone.append(torch.nn.functional.pad(one, (0, width - one.shape[1])))
    sizes = (3 * width, 10**6)
    return [torch.cat(alone), *(batch_logprobs(policy, batch, RunArgs(micro_batch_tokens=n))[0] for n in sizes)]


def trial(policy: Policy) -> tuple[float, float]:
    """The largest difference between the log-probs of rollouts and of passes over their rows, and how much the
    log-probs of tokens depend on what an episode was shown before (the median over tokens), both in nats."""
    largest, moved = 0.0, []
    for history_turns in (None, 0, 1):
        batch = collate(play(policy, history_turns), policy.device)
        for logprobs in passes(policy, batch):
            largest = max(largest, (logprobs - batch["old_logprobs"]).abs().max().nan_to_num(1e9).item())
        sampled = batch["turn_id"] >= 0
        letters = (batch["tokens"] >= 97 - 33) & (batch["tokens"] < 123 - 33) & ~sampled
        other = batch | {"tokens": torch.where(letters, (batch["tokens"] + 7 - 64) % 26 + 64, batch["tokens"])}
        change = (batch_logprobs(policy, other, RunArgs())[0] - batch["old_logprobs"]).abs()
        moved.append(change[sampled])
    return largest, torch.cat(moved).median().item()


def gradient_is_finite(policy: Policy) -> bool:
    """Whether training would get a gradient that can be used."""
    token_logprobs(policy, collate(play(policy, None), policy.device), temperature=1.0)[0].sum().backward()
    gradients = [x.grad for x in policy.model.parameters() if x.grad is not None]
    policy.model.zero_grad()
    return all(x.isfinite().all() for x in gradients) and any(x.abs().sum() > 0 for x in gradients)


def judge(name: str) -> dict[str, str]:
    """A row of the table: what a user would be told who brings this model, and what the trial finds.

    verdict: exact; exact, slower (if every prompt is read from its start); refused; or off: by the trial only.
    """
    printed, said = io.StringIO(), io.StringIO()
    row = dict.fromkeys(("model", "model_type", "layers", "context", "verdict", "difference", "self_check",
                         "self_difference", "agree", "influence", "gradient", "logits", "reason"), "")
    row |= {"model": name, "model_type": name.split()[0], "verdict": "refused", "self_check": "refused",
            "layers": next(kind for kind, models in MODELS.items() if name in models)}
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(printed):
        model = build(name)
        given = None if policies.context_length(model.config) else GIVEN_CONTEXT
        row["context"] = "given" if given else "config"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            with mock.patch("policies.self_check", lambda policy: None):
                policy = policies.load_policy(RunArgs(model=folder, context_length=given), env=Talk([]))
        except SystemExit:
            row["reason"] = printed.getvalue().strip().splitlines()[-1].partition("cannot be used: ")[2]
            return row
        slow, policy.bf16 = policy.windowed, False
        row["logits"] = "all at once" if policy.whole else "in parts"
        try:
            with contextlib.redirect_stdout(said):
                policies.self_check(policy)
            row["self_check"] = "exact, slower" if policy.windowed else "exact"
        except ValueError as error:
            row["reason"] = str(error)
        found = re.search(r"(?:agree to|off by) (\S+) nats", said.getvalue() + row["reason"])
        if not found:  # the model fails
            return row
        policy.windowed = slow
        difference, influence = trial(policy)
        if not difference < LIMIT and not slow:
            policy.windowed = True
            difference, influence = trial(policy)
        if difference < LIMIT:
            row["verdict"] = "exact, slower" if policy.windowed else "exact"
        elif row["self_check"] != "refused":
            row |= {"verdict": "off", "reason": "the self-check does not see it"}
        row |= {"difference": f"{difference:.0e}", "influence": f"{influence:.2f}", "self_difference": found[1],
                "agree": "yes" if row["verdict"] == row["self_check"] else "no",
                "gradient": "finite" if gradient_is_finite(policy) else "not finite"}
    return row


def main(names: list[str]):
    rows, path = [], ROOT / "results/models.csv"
    start = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(judge, name) for name in names or ALL]
        for future in futures:
            rows.append(future.result())
            print(f"{time.perf_counter() - start:4.0f} s", *(x for x in rows[-1].values() if x), sep=" | ", flush=True)
    if names and path.exists():
        with open(path, newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["model"] not in names]
    rows.sort(key=lambda row: ALL.index(row["model"]))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
