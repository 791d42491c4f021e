"""The policy that --model names: a chat model from a folder or hub, or the tiny model made here.

The tiny model has 0.23 million parameters and a tokenizer of its own. It is warm-started by
imitating the environment's scripted player (behaviour cloning), and cached on disk.
"""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
from pathlib import Path

import gymnasium as gym
import torch
import torch.distributed as dist
import tqdm
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from envs.episodes import Episode, Turn, demonstrations
from envs.text_env import EVALUATION_SEEDS
from utils import (
    DEMONSTRATE, RunArgs, collate, make_envs, micro_batches, optimizer_step, quiet, random_stream,
    rank, reason, select_rows, stop, token_logprobs, world_size,
)

transformers.utils.logging.disable_progress_bar()


class Policy:
    """A causal language model, its tokenizer, and how its chat template writes a conversation.

    A conversation in tokens is: head, observation, tail, ANSWER, end_id, between, observation,
    tail, ANSWER, ... where only ANSWER and (normally) end_id are sampled. It is append-only:
    what was sampled is never decoded and encoded again.

    history_turns None keeps the whole history in one growing row; n starts a new row each turn that
    shows the last n turns before the current observation.
    """

    history_turns: int | None = None
    max_turn_tokens = 8

    def __init__(self, model, tokenizer, device: str, instructions: str = "", bf16: bool = False):
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, torch.device(device)
        self.bf16, self.checkpointed = bf16, []  # bf16: autocast; the weights stay fp32
        self.context_length = model.config.max_position_embeddings
        layers = transformers.DynamicCache(config=model.config).layers
        flags = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in flags else "past_key_values"  # transformers < 5.24
        self.windowed = any(type(layer) is not DynamicLayer for layer in layers)  # sliding windows

        def render(*messages: tuple[str, str]) -> str:
            chat = [{"role": role, "content": content} for role, content in messages]
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

        question, answer = "QUESTION_MARK", "ANSWER_MARK"
        system = [("system", instructions)] if instructions else []
        try:
            first = render(*system, ("user", question))
        except Exception:  # a template without a system role: the rules open the first message
            first = render(("user", f"{instructions}\n\n{question}"))
        dialogue = render(("user", question), ("assistant", answer), ("user", question))
        head, _, tail = first.rpartition(question)
        between = dialogue.partition(answer)[2].partition(question)[0]
        self.head, self.tail, between = (tokenizer(text, add_special_tokens=False)["input_ids"]
                                         for text in (head, tail, between))
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        if not between or between[0] not in special:
            raise ValueError("its chat template does not end an answer with a special token")
        self.end_id, self.between = between[0], between[1:]

    def encode(self, text: str) -> list[int]:
        """The tokens of outside text, which cannot contain a special token."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **options)["input_ids"]

    def prompt(self, episode: Episode) -> tuple[list[int], bool]:
        """The tokens to feed before the next turn, and whether they start a new row."""
        observation, turns = self.encode(episode.observation) + self.tail, episode.turns
        if turns and self.history_turns is None:
            return self.close(turns[-1]) + observation, False
        ids = list(self.head)
        for turn in turns[-self.history_turns:] if self.history_turns else []:
            ids += self.encode(turn.observation) + self.tail
            ids += self.remember(turn) + self.close(turn)
        return ids + observation, True

    def remember(self, turn: Turn) -> list[int]:
        """What a later row shows of an earlier answer: all of it."""
        return turn.token_ids

    def close(self, turn: Turn) -> list[int]:
        """What lies between an answer and the next observation; a turn cut by its cap is ended."""
        return [self.end_id] * (turn.token_ids[-1] != self.end_id) + self.between

    def turn_cap(self, episode: Episode, used: int) -> int:
        """How many tokens the next turn may have, after `used` tokens of context."""
        return self.max_turn_tokens

    def force(self, episode: Episode, used: int, token_ids: list[int]) -> list[int]:
        """What to put in, unsampled, after these tokens of the turn."""
        return []

    def action(self, token_ids: list[int]) -> str:
        """What an answer says to the environment."""
        ids = token_ids[:-1] if token_ids[-1:] == [self.end_id] else token_ids
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def autocast(self):
        """The precision of the passes: bf16, or fp32 throughout."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def forward(self, tokens: Tensor, cache: transformers.Cache | None = None, **kwargs) -> Tensor:
        """The logits (B, T or fewer, V), in fp32."""
        self.model.eval()
        for layer in self.checkpointed:  # what is recomputed cannot fill a cache
            layer.training = cache is None
        if cache is not None:
            kwargs[self.cache_name] = cache
        with self.autocast():
            return self.model(tokens, use_cache=cache is not None, **kwargs).logits.float()

    def save(self, folder: Path):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_policy(args: RunArgs, history_turns: int | None = None, env: gym.Env | None = None,
                kind: type[Policy] = Policy) -> Policy:
    """The policy that `--model` names, as it is before any reinforcement learning.

    The tiny model's demonstrations are played in env, by default a new environment.
    """
    tiny, folder, env = args.model == "tiny", args.model, env or make_envs(args, 1)[0]
    if not tiny and not Path(folder).is_dir() and (folder.count("/") != 1 or folder[0] in "./~"):
        stop(f"--model {folder}: no such folder, and not a hub id (owner/name) either")
    if tiny:
        folder = tiny_folder(args, env, history_turns)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        policy = kind(model, tokenizer, args.device,
                        "" if tokenizer.chat_template == TINY_TEMPLATE
                        else getattr(env.unwrapped, "instructions", ""),
                        bf16=args.device.startswith("cuda") and not tiny)
        if args.gradient_checkpointing:
            checkpoint = getattr(model, "activation_checkpointing_enable",  # its name since 5.2x
                                 model.gradient_checkpointing_enable)
            checkpoint({"use_reentrant": False})
    except Exception as error:  # transformers, safetensors and jinja each have their own
        stop(f"--model {args.model} cannot be loaded: {reason(error)}")
    if args.gradient_checkpointing:
        with contextlib.suppress(AttributeError):  # made for models whose embedding is not trained
            model.disable_input_require_grads()
        policy.checkpointed = [m for m in model.modules()
                               if isinstance(m, GradientCheckpointingLayer)]
        for layer in policy.checkpointed:  # its parts stay in eval mode; no dropout wakes up
            layer.training = True
            vars(layer).update({name: 0.0 for name in vars(layer) if "dropout" in name})
    policy.history_turns, policy.max_turn_tokens = history_turns, args.max_turn_tokens
    return policy


TINY_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m.content + '<|assistant|>' }}{% endif %}{% endfor %}")
NUM_DEMONSTRATIONS, WARM_START_ROWS, WARM_START_TOKENS = 2048, 64, 4096


def tiny_folder(args: RunArgs, env: gym.Env, history_turns: int | None) -> Path:
    """A tokenizer and model of 0.23 million parameters, trained to imitate demonstrations.

    The folder is cached under a hash of what determines it, the demonstrations included.
    """
    rng = random_stream(args.seed, DEMONSTRATE)
    seeds = rng.integers(EVALUATION_SEEDS, size=NUM_DEMONSTRATIONS).tolist()
    try:
        episodes = demonstrations(env, seeds, args.max_turns, rng)
    except NotImplementedError as error:
        stop(f"--env-id {args.env_id}: {error}; give --model <folder or hub id>")
    texts = [[(turn.observation, turn.action) for turn in e.turns] for e in episodes]
    determined_by = [texts, history_turns, args.seed, torch.device(args.device).type,
                     args.warm_start_steps, args.max_grad_norm, WARM_START_ROWS,
                     args.warm_start_learning_rate, args.tiny_init_std,
                     TINY_TEMPLATE, inspect.getsource(make_tiny), inspect.getsource(warm_start),
                     torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("TURNRL_CACHE", "~/.cache/turnrl")).expanduser()
    folder = cache / f"{args.env_id.rpartition('/')[2]}-{key}"
    if rank() == 0 and not folder.exists():
        policy = Policy(*make_tiny(args, [text for e in texts for pair in e for text in pair]),
                        args.device)
        policy.history_turns = history_turns
        warm_start(policy, episodes, args)
        policy.save(temporary := cache / f"{folder.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # another run may have put the same folder there
            temporary.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    if world_size() > 1:
        dist.barrier()
    return folder


def make_tiny(args: RunArgs, texts: list[str]):
    """An untrained model and a byte-level tokenizer whose merges are the words of `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    core = Tokenizer(models.BPE())
    # words and numbers may become one token; any other character is a token (cells of a map)
    pieces = pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+| ?[0-9]+|\s|."), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>",
        chat_template=TINY_TEMPLATE)
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        initializer_range=args.tiny_init_std,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=3)
    return transformers.LlamaForCausalLM(config), tokenizer


def warm_start(policy: Policy, episodes: list[Episode], args: RunArgs):
    """Behaviour cloning: raise the log-probability of the demonstrated actions."""
    for episode in episodes:
        turns, episode.turns = episode.turns, []
        for turn in turns:  # replay, so that every prompt is built from the turns before it
            episode.observation = turn.observation
            turn.prompt_ids, turn.starts_row = policy.prompt(episode)
            turn.token_ids = [*policy.encode(turn.action), policy.end_id]
            turn.logprobs = [0.0] * len(turn.token_ids)
            episode.turns.append(turn)
    batch = collate(episodes, policy.device)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0)
    rng = random_stream(args.seed, DEMONSTRATE, 1)
    progress = tqdm.trange(args.warm_start_steps, desc="warm start", disable=quiet())
    for step in progress:
        done = step / args.warm_start_steps  # the learning rate goes up, then down to 0
        rate = args.warm_start_learning_rate * min(10 * done, 1) * (1 - done)
        optimizer.param_groups[0]["lr"] = rate
        rows = select_rows(batch, rng.integers(len(batch["tokens"]), size=WARM_START_ROWS))
        wide = rows["tokens"].numel() > WARM_START_TOKENS  # then like lengths go together
        loss, count = 0.0, (rows["turn_id"] >= 0).sum()
        for part in micro_batches(rows, WARM_START_TOKENS) if wide else [rows]:
            logprobs, _ = token_logprobs(policy, part, temperature=1.0)
            part_loss = -logprobs.sum() / count
            part_loss.backward()
            loss += part_loss.item()
        optimizer_step(policy.model, optimizer, args.max_grad_norm, processes=1)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
