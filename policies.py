"""The policy that --model names: a chat model from a folder or hub, or the tiny model made here.

The tiny model has 0.23 million parameters and a tokenizer of its own. A warm start imitates the
environment's scripted player (behaviour cloning); warm-started models are cached on disk.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import torch.distributed as dist
import tqdm
import transformers
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from chat_format import TINY_TEMPLATE, ChatFormat, is_tiny
from envs.episodes import Episode, Turn, attribute, checked_text, demonstrations
from envs.text_env import EVALUATION_SEEDS
from rollouts import make_envs, rollout
from utils import (
    DEMONSTRATE, RunArgs, all_reduce_sum, collate, micro_batches, optimizer_step, quiet,
    random_stream, rank, reason, stop, token_entropy, token_logprobs, world_size,
)

transformers.utils.logging.disable_progress_bar()


# === 1. The policy ===============================================================================
MOST_LOGITS = 2**25  # that exist at a time in an update: 128 MiB in fp32


def context_length(config) -> int | None:
    """How many tokens a row may have, if the config says it: tokens (or None).

    Rotary factors that switch at some length (longrope, dynamic) would give one token different
    log-probabilities in rows of different lengths: the switch is the limit.

    >>> rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1] * 16,
    ...         "long_factor": [4] * 16, "original_max_position_embeddings": 300}
    >>> context_length(transformers.Phi3Config(
    ...     hidden_size=64, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope,
    ...     original_max_position_embeddings=300))
    300
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # or by layer type
    limits = [part.get("original_max_position_embeddings") for part in each
              if part.get("rope_type") in ("longrope", "dynamic")]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


class Policy(ChatFormat):
    """A causal language model that speaks the format of its chat template.

    history_turns None keeps the whole history in one growing row; n starts a new row each turn that
    shows the last n turns before the current observation.

    A model whose results would be wrong raises ValueError with the reason.
    """

    history_turns: int | None = None
    max_turn_tokens = 8
    worth_sharing = 64  # tokens that all rows begin with; fewer are not worth a pass of their own
    warned = False  # of an observation that is too long
    adapters = None  # with --lora-rank: a peft.PeftModel around the model
    whole = False  # whether its output layer cannot be run apart from what stands before it

    def __init__(self, model, tokenizer, device: str, instructions: str = "", bf16: bool = False,
                 template_kwargs: dict | None = None):
        self.model, self.device = model.to(device), torch.device(device)
        self.bf16, self.checkpointed = bf16, []  # bf16: autocast; the weights stay fp32
        declared = set()
        for config in (model.generation_config, model.config.get_text_config()):
            ends = getattr(config, "eos_token_id", None)
            declared |= set(ends if isinstance(ends, list) else [ends])
        self.template_kwargs = template_kwargs or {}
        super().__init__(tokenizer, instructions, declared, self.template_kwargs)
        self.read_model()

    def read_model(self):
        """Its context, its cache and its other peculiarities."""
        self.context_length = context_length(self.model.config)
        flags = inspect.signature(self.model.forward).parameters
        known = ("cache", "past_key_values", "cache_params")  # depends on model and version
        names = [name for name in known if name in flags]
        if not names:
            raise ValueError("its forward pass takes no cache: it would forget what it has read")
        self.cache_name = names[0]
        self.options = {"output_router_logits": False} if "output_router_logits" in flags else {}
        layers = transformers.DynamicCache(config=self.model.config).layers
        self.windowed = any(type(layer) is not DynamicLayer for layer in layers)  # sliding windows
        self.attends = any(isinstance(layer, DynamicLayer) for layer in layers)
        for module in self.model.modules():  # passes over many tokens would heed this limit of a
            if hasattr(module, "time_step_limit"):  # state space model; steps of one token do not
                module.time_step_limit = (0.0, float("inf"))
        self.vocab_size = self.model.get_output_embeddings().weight.shape[0]
        self.whole = not self.splits()
        embedded = self.model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > embedded:
            raise ValueError(f"its tokenizer has {len(self.tokenizer)} tokens, but its embedding "
                             f"only {embedded}")
        for name, x in self.model.named_parameters():
            if not x.isfinite().all():
                raise ValueError(f"its weight {name} is not finite")

    def limit_context(self, length: int | None):
        """Set --context-length, if given; it may not exceed what the model can do."""
        most = self.context_length
        if most is None and length is None:
            raise ValueError("its config does not say how long a context may be: give "
                             "--context-length")
        if most is not None and length is not None and length > most:
            raise ValueError(f"--context-length {length} is more than its context of {most}")
        self.context_length = length or most

    def prompt(self, episode: Episode) -> tuple[list[int], bool]:
        """The tokens to feed before the next turn, and whether they start a new row."""
        turns = episode.turns
        if turns and self.history_turns is None:
            return self.close(turns[-1]) + self.show(self.between, episode.observation), False
        ids, opening = [], self.head
        for turn in turns[-self.history_turns:] if self.history_turns else []:
            ids += self.show(opening, turn.observation) + self.remember(turn) + self.close(turn)
            opening = self.between
        return ids + self.show(opening, episode.observation), True

    def check_room(self, env: gym.Env, episodes: list[Episode]):
        """Warn once if a first observation left no room for an answer; stop if all of them did."""
        played = all_reduce_sum(torch.tensor(sum(len(e.turns) for e in episodes)))
        unread = next((e for e in episodes if not e.turns), None)
        if unread is None or (played and self.warned):
            return
        self.warned, tokens = True, len(self.prompt(unread)[0])
        line = (f"environment {type(env.unwrapped).__name__}, seed {unread.seed}: with its first "
                f"observation of {len(unread.observation)} characters the prompt has {tokens} "
                f"tokens; too much to answer in a context of {self.context_length} tokens")
        if not played:
            stop(line)
        print(f"warning: {line}; such episodes count as failures", file=sys.stderr)

    def remember(self, turn: Turn) -> list[int]:
        """What a later row shows of an earlier answer: all of it."""
        return turn.token_ids

    def close(self, turn: Turn) -> list[int]:
        """The end of an answer that was cut by its cap.

        Where one token ends an answer and begins the next message (GLM), no other end does.
        """
        begins = not self.between.ids and self.head.ids[-1:] == [self.end_id]
        ends = [self.end_id] if begins else self.end_ids
        return [self.end_id] * (turn.token_ids[-1] not in ends)

    def turn_cap(self, episode: Episode, used: int) -> int:
        """How many tokens the next turn may have, after `used` tokens of context."""
        return self.max_turn_tokens

    def force(self, episode: Episode, used: int, token_ids: list[int]) -> list[int]:
        """What to put in, unsampled, after these tokens of the turn."""
        return []

    @torch.no_grad()
    def splits(self) -> bool:
        """Whether the trunk and the output layer, one after the other, do what the model does."""
        tokens = torch.tensor([[0, 1]], device=self.device)
        try:
            output = self.trunk(tokens)
            apart = self.logits(output, output.last_hidden_state)
        except Exception:  # each model has its own, and a reason to fail is told by the self-check
            return False
        together = self.forward(tokens)
        return apart.shape == together.shape and torch.allclose(apart, together, atol=1e-4)

    def autocast(self):
        """The precision of the passes: bf16, or fp32 throughout."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def forward(self, tokens: Tensor, cache: transformers.Cache | None = None, **kwargs) -> Tensor:
        """The logits (B, T or fewer, V), in fp32."""
        self.model.eval()
        for layer in self.checkpointed:  # what is recomputed cannot fill a cache
            layer.training = cache is None
        kwargs |= self.options
        if cache is not None:
            kwargs[self.cache_name] = cache
            if not self.attends:  # recurrent layers only: they take the mask of the new tokens
                kwargs["attention_mask"] = kwargs["attention_mask"][:, -tokens.shape[1] :]
        with self.autocast():
            return self.model(tokens, use_cache=cache is not None, **kwargs).logits.float()

    def trunk(self, tokens: Tensor) -> transformers.utils.ModelOutput:
        """What the layers before the output layer make of rows of tokens (B, T).

        What all rows begin with, such as the rules of the game, is read once. Its gradient is the
        sum over the rows, as if each had read it.
        """
        if self.whole:
            return transformers.modeling_outputs.BaseModelOutput(self.forward(tokens))
        caught = []
        hook = self.model.get_decoder().register_forward_hook(
            lambda module, args, output: caught.append(output))
        try:
            with self.autocast():  # around both passes: it keeps the weights that it has rounded
                cache, shared = None, self.shared(tokens)
                if shared:
                    cache = transformers.DynamicCache(config=self.model.config)
                    self.forward(tokens[:1, :shared], cache, logits_to_keep=1)
                    cache.batch_repeat_interleave(len(tokens))
                self.forward(tokens[:, shared:], cache, logits_to_keep=1)
        finally:
            hook.remove()
        parts = [x.last_hidden_state.expand(len(tokens), -1, -1) for x in caught]
        caught[-1].last_hidden_state = torch.cat(parts, dim=1)
        return caught[-1]

    def shared(self, tokens: Tensor) -> int:
        """How many tokens at the beginning of all rows (B, T) are read once; 0: not worth it."""
        if self.windowed or self.checkpointed or len(tokens) < 2:
            return 0
        equal = (tokens[:, :-1] == tokens[:1, :-1]).all(0)
        length = int(equal.cumprod(0).sum())
        return length if length >= self.worth_sharing else 0

    def logits(self, output: transformers.utils.ModelOutput, hidden: Tensor) -> Tensor:
        """The logits (B, N, V) of some of the trunk's last hidden states (B, N, D), in fp32.

        The model's own forward pass makes them, because some models scale or cap their logits. In
        it, the trunk only hands on the given states.
        """
        if self.whole:
            return hidden
        trunk, some = self.model.get_decoder(), copy.copy(output)
        some.last_hidden_state = hidden
        trunk.forward = lambda *args, **kwargs: some
        try:
            return self.forward(torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device))
        finally:
            del trunk.forward

    def score_next(self, tokens: Tensor, following: Tensor,
                   temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob of tokens[t + 1] and entropy wherever following (B, T - 1) is true: two (N,).

        There are at most MOST_LOGITS logits at a time: the backward pass makes them once more.
        """
        output = self.trunk(tokens)
        hidden = output.last_hidden_state[:, :-1][following]  # (N, D)

        def score(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(output, hidden[None])[0] / temperature  # (n, V)
            chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            return chosen, token_entropy(logits)

        size = max(1, MOST_LOGITS // self.vocab_size)
        parts = list(zip(hidden.split(size), tokens[:, 1:][following].split(size), strict=True))
        again = len(parts) > 1 and torch.is_grad_enabled()
        scores = [checkpoint(score, *part, use_reentrant=False) if again else score(*part)
                  for part in parts]
        chosen, entropy = zip(*scores, strict=True)
        return torch.cat(chosen), torch.cat(entropy)

    def save(self, folder: Path):
        """The tokenizer and the weights: those of the adapters (--lora-rank), or all."""
        (self.adapters or self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path):
        """The weights of a folder that save() wrote."""
        if self.adapters:
            import peft
            peft.set_peft_model_state_dict(self.adapters, peft.load_peft_weights(folder, "cpu"))
        else:
            model = type(self.model).from_pretrained(folder, dtype=torch.float32)
            self.model.load_state_dict(model.state_dict())


def twin(part: Any) -> Any:
    """A copy of a policy or a network. It shares the weights that are not trained (--lora-rank)."""
    network = part.model if isinstance(part, Policy) else part
    return copy.deepcopy(part, {id(p): p for p in network.parameters() if not p.requires_grad})


# === 2. Loading a model, and a check of it =======================================================
def parse_args(kind: type[RunArgs], description: str) -> RunArgs:
    """The flags of the command line; a chat model as --model has kind.chat_defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?", default="tiny")
    parser.add_argument("--lora-rank", nargs="?")
    flags = parser.parse_known_args()[0]
    model = flags.model or "tiny"
    changes = {} if is_tiny(model) else dict(kind.chat_defaults)
    if changes and flags.lora_rank:  # adapters take ten times the rate of all weights
        changes |= {name: 10 * value for name, value in changes.items() if "learning_rate" in name}
    steps = kind.tiny_steps if model == "tiny" else 0
    return tyro.cli(kind, description=description, default=kind(
        **changes, warm_start_steps=steps))


def load_policy(args: RunArgs, history_turns: int | None = None, env: gym.Env | None = None,
                kind: type[Policy] = Policy) -> Policy:
    """The policy that `--model` names, as it is before any reinforcement learning.

    The tiny model's demonstrations are played in env, by default a new environment.
    """
    tiny, folder, env = args.model == "tiny", args.model, env or make_envs(args, 1)[0]
    if not tiny and not Path(folder).is_dir() and (folder.count("/") != 1 or folder[0] in "./~"):
        stop(f"--model {folder}: no such folder, and not a hub id (owner/name) either")
    if args.lora_rank and not importlib.util.find_spec("peft"):
        stop("--lora-rank needs peft: pip install peft")
    if tiny:
        folder = tiny_folder(args, env, history_turns)
    try:
        rules = checked_text("instructions", attribute(env, "instructions") or "")
    except Exception as error:
        stop(f"--env-id {args.env_id}: {reason(error)}")
    try:
        template_kwargs = json.loads(args.template_kwargs)
    except ValueError:
        template_kwargs = None
    if not isinstance(template_kwargs, dict):
        stop(f"--template-kwargs {args.template_kwargs}: this is not a JSON object")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = load_weights(folder)
        rules = "" if tokenizer.chat_template == TINY_TEMPLATE else rules  # it has not read them
        policy = kind(model, tokenizer, args.device, rules, template_kwargs=template_kwargs)
        policy.limit_context(args.context_length)
        if not tiny:
            self_check(policy)
        policy.bf16 = not tiny and fast_bf16(args.device)
        if args.lora_rank:
            policy.adapters = add_adapters(model, args.lora_rank, args.seed)
        if args.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable",  # its name since 5.2x
                             model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
    except Exception as error:  # transformers, safetensors and jinja each have their own
        stop(f"--model {args.model} cannot be used: {reason(error)}")
    if args.gradient_checkpointing:
        with contextlib.suppress(AttributeError):  # made for models whose embedding is not trained
            model.disable_input_require_grads()
        policy.checkpointed = [m for m in model.modules()
                               if isinstance(m, GradientCheckpointingLayer)]
        for layer in policy.checkpointed:  # its parts stay in eval mode; no dropout wakes up
            layer.training = True
            vars(layer).update({name: 0.0 for name in vars(layer) if "dropout" in name})
    policy.history_turns, policy.max_turn_tokens = history_turns, args.max_turn_tokens
    if not tiny and cloning_steps(args):
        imitate(policy, args, env, rules)
    return policy


@contextlib.contextmanager
def peft_without_warnings() -> Iterator[Any]:
    """The package, whose warnings are about names in transformers and not for the user."""
    import peft
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield peft


def load_weights(folder: str):
    """A model in fp32; adapters, which a run with --lora-rank saves, are added to their base."""
    adapters = Path(folder) / "adapter_config.json"
    if adapters.is_file():
        base = load_weights(json.loads(adapters.read_text())["base_model_name_or_path"])
        with peft_without_warnings() as peft:
            model = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
        model.requires_grad_(True)
    else:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its folder lacks {len(missing)} weights, such as {missing[0]}")
    model.name_or_path = str(Path(folder).resolve()) if Path(folder).is_dir() else folder
    return model


def add_adapters(model, rank: int, seed: int) -> Any:
    """Freeze all weights. Beside each linear layer but the last, train a product of two matrices.

    W x becomes W x + 2 B (A x) with A (rank, inputs) and B (outputs, rank), which begins at 0.
    LoRA: Hu et al., arXiv 2106.09685v2, Section 4.1, with alpha = 2 rank.
    """
    torch.manual_seed(seed)
    with peft_without_warnings() as peft:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return peft.get_peft_model(model, config)  # which changes the model itself


def fast_bf16(device: str) -> bool:
    """Whether passes in bf16 are worth it: on CUDA, and on a CPU with instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.startswith("cuda") or supported()


class Rehearsal(gym.Env):
    """Says the same for some turns, whatever it hears."""

    def __init__(self, text: str, turns: int):
        self.text, self.turns = text, turns

    def step(self, action: str):
        self.turns -= 1
        return self.text, 0.0, self.turns == 0, False, {}


def largest_difference(policy: Policy) -> float:
    """How far log-probs of a rollout and of full passes over its rows are apart, at most, in nats.

    Three episodes of unlike lengths, of which one ends before the others. The rows are passed one
    by one and together: neither a cache nor a neighbour may change a log-prob.
    """
    texts = ("Go.", "Which way? " * 6, "3 14 15 " * 2)
    envs = [Rehearsal(text, turns) for text, turns in zip(texts, (2, 1, 3), strict=True)]
    episodes = [Episode(0, text) for text in texts]
    try:
        rollout(policy, envs, episodes, [random_stream(i) for i in range(3)], 3, temperature=1.0)
    except Exception as error:  # every model has its own
        raise ValueError(f"its forward pass fails in a rollout: {reason(error)}") from error
    if not all(episode.turns for episode in episodes):
        raise ValueError(f"a context of {policy.context_length} tokens is too short to try it")
    differences = []
    for some in (episodes, *([episode] for episode in episodes)):
        batch = collate(some, policy.device)
        with torch.no_grad():
            logprobs, _ = token_logprobs(policy, batch, temperature=1.0)
        differences.append((logprobs - batch["old_logprobs"]).abs().max())
    return torch.stack(differences).max().item()  # nan if one is


def self_check(policy: Policy):
    """Refuse a model whose rollouts do not give the log-probs that training would compute.

    A model that is only exact without holes in its cache is treated as one with sliding windows.
    """
    start, precision = time.perf_counter(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    plain = Policy(policy.model, policy.tokenizer, policy.device,  # of no special kind, in fp32
                   template_kwargs=policy.template_kwargs)
    plain.max_turn_tokens, plain.context_length = 4, policy.context_length
    plain.worth_sharing = 1  # the head of the template
    difference, how = largest_difference(plain), ""
    if not difference < 1e-2 and not plain.windowed:  # perhaps it cannot live with holes
        plain.windowed = policy.windowed = True
        difference, how = largest_difference(plain), " if every prompt is read from its start"
    torch.set_float32_matmul_precision(precision)
    if not difference < 1e-2:
        raise ValueError(f"log-probs of its rollouts are off by {difference:.2g} nats: its "
                         "answers depend on the rows beside them, or on tokens that come later")
    if rank() == 0:
        print(f"{policy.model.config.model_type}: context of {policy.context_length} tokens; "
              f"rollouts and full passes agree to {difference:.0e} nats{how} "
              f"({time.perf_counter() - start:.1f} s)")


# === 3. The tiny model and its warm start ========================================================
# words and numbers may become one token; any other character is a token (cells of a map)
TINY_PIECES = r" ?[A-Z]?[a-z]+| ?[0-9]+|\s|."
TINY_CONTEXT = 1024
NUM_DEMONSTRATIONS, WARM_START_ROWS, WARM_START_TOKENS = 2048, 64, 4096
WARM_START_ROWS_PRETRAINED = 16  # in a step


def play_demonstrations(args: RunArgs, env: gym.Env) -> list[Episode]:
    """The episodes of the scripted player that a warm start imitates."""
    rng = random_stream(args.seed, DEMONSTRATE)
    count = args.warm_start_episodes or NUM_DEMONSTRATIONS
    if args.model != "tiny":  # whose tokenizer is made of them
        count = min(count, cloning_steps(args) * rows_per_step(args))
    seeds = rng.integers(EVALUATION_SEEDS, size=count).tolist()
    episodes = []
    try:
        for seed in tqdm.tqdm(seeds, "demonstrations", disable=quiet(), leave=False):
            episodes += (played := demonstrations(env, [seed], args.max_turns, rng))
            if args.model == "tiny":
                check_lengths(played, args.env_id)
    except NotImplementedError as error:
        other = "--warm-start-steps 0" if args.model != "tiny" else "--model <folder or hub id>"
        stop(f"--env-id {args.env_id}: {error}; give {other}")
    return episodes


def cloning_steps(args: RunArgs) -> int:
    default = args.tiny_steps if args.model == "tiny" else 0
    return default if args.warm_start_steps is None else args.warm_start_steps


def rows_per_step(args: RunArgs) -> int:
    return WARM_START_ROWS if args.model == "tiny" else WARM_START_ROWS_PRETRAINED


def cached_folder(args: RunArgs, episodes: list[Episode], determined_by: list,
                  make: Callable[[], Policy]) -> Path:
    """The folder of a warm-started model, made if the cache does not have it.

    Its name has a hash of what determines it, the demonstrations included.
    """
    texts = [[(turn.observation, turn.action) for turn in e.turns] for e in episodes]
    determined_by = [texts, args.seed, torch.device(args.device).type, cloning_steps(args),
                     args.max_grad_norm, args.warm_start_learning_rate, *determined_by,
                     inspect.getsource(warm_start), inspect.getsource(spell_out),
                     torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("TURNRL_CACHE", "~/.cache/turnrl")).expanduser()
    folder = cache / f"{args.env_id.rpartition('/')[2]}-{key}"
    if rank() == 0 and not folder.exists():
        policy = make()
        warm_start(policy, episodes, args)
        temporary = cache / f"{folder.name}.{os.getpid()}"
        try:
            policy.save(temporary)
        except Exception as error:  # safetensors has its own
            shutil.rmtree(temporary, ignore_errors=True)
            stop(f"the warm start cannot be written to {cache}: {reason(error)} (TURNRL_CACHE "
                 "names another folder)")
        with contextlib.suppress(OSError):  # another run may have put the same folder there
            temporary.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    if world_size() > 1:
        dist.barrier()
    return folder


def tiny_folder(args: RunArgs, env: gym.Env, history_turns: int | None) -> Path:
    """A tokenizer and model of 0.23 million parameters, trained to imitate demonstrations."""
    episodes = play_demonstrations(args, env)
    texts = [text for e in episodes for turn in e.turns for text in (turn.observation, turn.action)]

    def make() -> Policy:
        policy = Policy(*make_tiny(args, texts), args.device)
        policy.history_turns = history_turns
        return policy

    return cached_folder(args, episodes, [
        history_turns, WARM_START_ROWS, args.tiny_init_std, TINY_TEMPLATE, TINY_PIECES,
        TINY_CONTEXT, inspect.getsource(make_tiny)], make)


def imitate(policy: Policy, args: RunArgs, env: gym.Env, rules: str):
    """The warm start of a pretrained model, in place: it learns how its answers should look."""
    plain = Policy(policy.model, policy.tokenizer, policy.device, rules, policy.bf16,
                   policy.template_kwargs)  # of no special kind
    plain.history_turns, plain.checkpointed = policy.history_turns, policy.checkpointed
    plain.adapters = policy.adapters
    plain.context_length, plain.windowed = policy.context_length, policy.windowed
    episodes, weights = play_demonstrations(args, env), hashlib.sha256()
    for x in policy.model.state_dict().values():
        weights.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    folder = cached_folder(args, episodes, [
        plain.history_turns, WARM_START_ROWS_PRETRAINED, plain.bf16, weights.hexdigest(),
        plain.tokenizer.backend_tokenizer.to_str(), plain.tokenizer.chat_template, plain.head,
        plain.template_kwargs, args.lora_rank], lambda: plain)
    policy.load(folder)


def check_lengths(episodes: list[Episode], env_id: str):
    """Stop at a demonstration that is shown more than the tiny model can read."""
    for episode, k, turn in ((e, k, turn) for e in episodes for k, turn in enumerate(e.turns)):
        tokens = len(re.findall(TINY_PIECES, turn.observation))  # at least
        if tokens > TINY_CONTEXT:
            stop(f"--env-id {env_id}, seed {episode.seed}, turn {k}: an observation of "
                 f"{len(turn.observation)} characters has at least {tokens} tokens; the tiny "
                 f"model's context has {TINY_CONTEXT}")


def make_tiny(args: RunArgs, texts: list[str]):
    """An untrained model and a byte-level tokenizer whose merges are the words of `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    core = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(TINY_PIECES), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    lengths = itertools.accumulate(map(len, texts))
    sample = [text for text, length in zip(texts, lengths, strict=True) if length <= 2**22]
    core.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=512, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>",
        chat_template=TINY_TEMPLATE)
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=TINY_CONTEXT,
        initializer_range=args.tiny_init_std,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=3)
    return transformers.LlamaForCausalLM(config), tokenizer


def spell_out(policy: Policy, episodes: list[Episode]) -> list[Episode]:
    """Demonstrations as if the policy had sampled them: an episode for each of their rows."""
    rows: list[Episode] = []
    for episode in episodes:
        turns, episode.turns = episode.turns, []
        for turn in turns:  # replay, so that every prompt is built from the turns before it
            episode.observation = turn.observation
            turn.prompt_ids, turn.starts_row = policy.prompt(episode)
            turn.token_ids = [*policy.spell(turn.action)[0], policy.end_id]
            turn.logprobs = [0.0] * len(turn.token_ids)
            episode.turns.append(turn)
            if turn.starts_row:
                rows.append(Episode(episode.seed, ""))
            rows[-1].turns.append(turn)
    return rows


def warm_start(policy: Policy, episodes: list[Episode], args: RunArgs):
    """Behaviour cloning: raise the log-probability of the demonstrated actions, and of no other."""
    start, losses, rows = time.perf_counter(), [], spell_out(policy, episodes)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0)
    rng = random_stream(args.seed, DEMONSTRATE, 1)
    steps = cloning_steps(args)
    progress = tqdm.trange(steps, desc="warm start", disable=quiet())
    for step in progress:
        done = step / steps  # the learning rate goes up, then down to 0
        rate = args.warm_start_learning_rate * min(10 * done, 1) * (1 - done)
        optimizer.param_groups[0]["lr"] = rate
        drawn = rng.integers(len(rows), size=rows_per_step(args))
        batch = collate([rows[i] for i in drawn], policy.device)
        wide = batch["tokens"].numel() > WARM_START_TOKENS  # then like lengths go together
        loss, count = 0.0, (batch["turn_id"] >= 0).sum()
        for part in micro_batches(batch, WARM_START_TOKENS) if wide else [batch]:
            logprobs, _ = token_logprobs(policy, part, temperature=1.0)
            part_loss = -logprobs.sum() / count
            part_loss.backward()
            loss += part_loss.item()
        optimizer_step(policy.model, optimizer, args.max_grad_norm, processes=1)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        losses.append(loss)
    if args.model != "tiny" and losses:
        print(f"warm start: {len(losses)} steps of {rows_per_step(args)} rows, loss "
              f"{losses[0]:.2f} -> {losses[-1]:.2f} nats a token "
              f"({time.perf_counter() - start:.0f} s)")
