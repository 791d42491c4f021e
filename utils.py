"""Everything the scripts share that is not an algorithm.

Axes, the same in every file: E episodes, K turns, B rows of tokens, T tokens, G group size,
V vocabulary. turn_id (B, T) says which turn sampled a token and is -1 on every token the policy
did not sample (observations, chat markup, forced tokens, padding): mask = turn_id >= 0.

 1 Flags          RunArgs, stop                    5 Batches      collate, token_logprobs, ...
 2 Processes      ranks and random streams         6 Updates      micro_batches, optimizer_step
 3 Policies       Policy, load_policy              7 Evaluation   evaluate, transcript
 4 Rollouts       Turn, Episode, Decoder, rollout  8 Run folders  Run: log, checkpoint, resume
"""

import contextlib
import copy
import csv
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tqdm
import transformers
from torch import Tensor

from envs import known_ids, make_env

transformers.utils.logging.disable_progress_bar()

# === 1. Flags ====================================================================================


@dataclasses.dataclass
class RunArgs:
    """The flags that all scripts share."""

    seed: int = 1
    """seed of everything random in the run: model, training instances, sampling"""
    env_id: str = "turnrl/FrozenLake-v0"
    """gymnasium id of a text environment; "module:Id-v0" imports the module first"""
    env_kwargs: str = "{}"
    """arguments of the environment as JSON, e.g. '{"size": 6, "max_turns": 15}'"""
    model: str = "tiny"
    """"tiny" (made and warm-started here), or a folder or hub id of a chat model"""
    device: str = "cpu"
    """torch device: cpu, cuda, cuda:1"""
    num_iterations: int = 100
    """iterations of: collect episodes, update"""
    num_prompts: int = 8
    """environment seeds (groups) per iteration"""
    group_size: int = 8
    """episodes that start from the same seed, G"""
    max_turns: int = 8
    """turns after which an episode is truncated, K"""
    max_turn_tokens: int = 8
    """tokens the policy may sample in one turn"""
    temperature: float = 1.0
    """sampling temperature of the training episodes"""
    learning_rate: float = 1e-3
    """AdamW learning rate, constant"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    micro_batch_tokens: int = 16384
    """tokens per forward pass of the update; changes memory and speed, not the result"""
    warm_start_steps: int = 100
    """behaviour cloning steps of the tiny model before training"""
    eval_every: int = 10
    """iterations between evaluations on held-out seeds"""
    eval_episodes: int = 256
    """held-out seeds per evaluation, one episode each"""
    eval_temperature: float = 1.0
    """sampling temperature of the evaluation"""
    eval_only: bool = False
    """evaluate the start policy (or the --resume checkpoint) and stop"""
    save_every: int = 50
    """iterations between checkpoints (the last iteration is always saved)"""
    run_dir: str = "runs"
    """parent of the run folder <env>__<algo>__<seed>__<time>"""
    resume: str | None = None
    """run folder to continue, with the flags it was made with"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """where to send the metrics besides metrics.csv"""
    compile: bool = False
    """torch.compile the training forward (needs a C++ compiler on CPU)"""
    print_samples: int = 1
    """transcripts printed before and after training"""


MAY_CHANGE_ON_RESUME = {"resume", "num_iterations", "eval_only", "save_every", "run_dir", "track",
                        "compile", "print_samples", "micro_batch_tokens", "device"}


MAY_BE_ZERO = {"seed", "warm_start_steps", "print_samples", "degrees_of_freedom", "history_turns"}


def stop(message: str):
    """End the program because of what the user gave it: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: RunArgs):
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if type(value) is int and value < (0 if field.name in MAY_BE_ZERO else 1):
            stop(f"{flag} must be {'0 or more' if field.name in MAY_BE_ZERO else 'positive'}, "
                 f"got {value}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            stop(f"{flag} must be finite and not negative, got {value}")
        if field.name.endswith(("temperature", "learning_rate", "grad_norm")) and not value > 0:
            stop(f"{flag} must be positive, got {value}")
    try:
        if not isinstance(json.loads(args.env_kwargs), dict):
            raise ValueError
    except ValueError:
        stop(f"--env-kwargs must be a JSON object such as '{{\"size\": 6}}', got {args.env_kwargs}")
    if args.num_prompts % world_size():
        stop(f"--num-prompts {args.num_prompts} cannot be split over {world_size()} processes")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        stop(f"--device {args.device}: this machine has no CUDA device")
    try:
        torch.device(args.device)
    except RuntimeError as error:
        stop(f"--device {args.device}: {str(error).splitlines()[0]}")


# === 2. Processes and random streams =============================================================
# Every random number comes from a stream named by integers: (run seed, purpose, iteration, index).
# No generator lives across iterations, so a resumed run, a run on two processes and a run with
# another batch order draw the same numbers.
DEMONSTRATE, PROMPTS, SAMPLE, EVALUATE, DRAW = range(5)
EVALUATION_SEEDS = 2**30  # environment seeds below are for training, the others for evaluation


def random_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device: str):
    """Join the other processes when launched by torchrun; a single process needs nothing."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size()))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes (equal shapes), concatenated along axis 0 in rank order."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


# === 3. Policies =================================================================================
TINY_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m.content + '<|assistant|>' }}{% endif %}{% endfor %}")
NUM_DEMONSTRATIONS, WARM_START_ROWS, WARM_START_LEARNING_RATE = 512, 128, 2e-3


class Policy:
    """A causal language model, its tokenizer, and how its chat template writes a conversation.

    A conversation in tokens is: head, observation, tail, ANSWER, end_id, between, observation,
    tail, ANSWER, ... where only ANSWER and (normally) end_id are sampled. History is append-only:
    what was sampled is never decoded and encoded again.
    """

    def __init__(self, model, tokenizer, device: str, instructions: str = "", bf16: bool = False):
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, torch.device(device)
        self.bf16 = bf16  # autocast; the weights stay fp32
        self.forward = model.__call__
        self.context_length = model.config.max_position_embeddings

        def render(*messages: tuple[str, str]) -> str:
            messages = [{"role": role, "content": content} for role, content in messages]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        question, answer = "QUESTION_MARK", "ANSWER_MARK"
        system = [("system", instructions)] if instructions else []
        try:
            first = render(*system, ("user", question))
        except Exception:  # templates without a system role: the rules open the first message
            first = render(("user", f"{instructions}\n\n{question}"))
        dialogue = render(("user", question), ("assistant", answer), ("user", question))
        head, _, tail = first.rpartition(question)
        between = dialogue.partition(answer)[2].partition(question)[0]
        self.head, self.tail, between = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (head, tail, between))
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        if not between or between[0] not in special:
            raise ValueError("its chat template does not end an answer with a special token")
        self.end_id, self.between = between[0], between[1:]

    def encode(self, text: str) -> list[int]:
        """The tokens of outside text, which cannot contain a special token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def prompt(self, episode: "Episode", history_turns: int | None) -> tuple[list[int], bool]:
        """The tokens to feed before the next turn, and whether they start a new row.

        history_turns None keeps the whole history in one growing row; n starts a new row each
        turn that shows the last n turns before the current observation.
        """
        observation, turns = self.encode(episode.observation), episode.turns
        if turns and history_turns is None:
            return self.close(turns[-1]) + observation + self.tail, False
        ids = list(self.head)
        for turn in turns[len(turns) - history_turns :] if history_turns else []:
            ids += self.encode(turn.observation) + self.tail + turn.token_ids + self.close(turn)
        return ids + observation + self.tail, True

    def close(self, turn: "Turn") -> list[int]:
        """From the last sampled token to the next observation; a turn cut by its cap is ended."""
        cut = turn.token_ids[-1] != self.end_id
        return [self.end_id] * cut + self.between

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def save(self, folder: Path):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_policy(args: RunArgs, history_turns: int | None = None) -> Policy:
    """The policy that `--model` names, before any reinforcement learning."""
    env = make_envs(args, 1)[0].unwrapped
    if args.model == "tiny":
        demonstrations = play_demonstrations(args, env)
        instructions, folder = "", tiny_folder(args, demonstrations, history_turns)
    else:
        instructions, folder = getattr(env, "instructions", ""), args.model
        if not Path(folder).is_dir() and (folder.count("/") != 1 or folder[0] in "./~"):
            stop(f"--model {folder}: there is no such folder, and it is not a hub id (owner/name)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        bf16 = args.device.startswith("cuda") and args.model != "tiny"
        policy = Policy(model, tokenizer, args.device, instructions, bf16)
    except (OSError, ValueError, TypeError, KeyError) as error:
        stop(f"--model {args.model} cannot be loaded: {str(error).strip().splitlines()[0]}")
    if args.compile:
        policy.forward = torch.compile(model.__call__, dynamic=True)
    return policy


def play_demonstrations(args: RunArgs, env: gym.Env) -> list["Episode"]:
    """Episodes of the environment's scripted player (or of random legal actions), as text."""
    rng = random_stream(args.seed, DEMONSTRATE)
    episodes = []
    for _ in range(NUM_DEMONSTRATIONS):
        [episode] = start_episodes([env], [int(rng.integers(EVALUATION_SEEDS))])
        while not episode.done and len(episode.turns) < args.max_turns:
            if hasattr(env, "demonstrate"):
                action = env.demonstrate(rng)
            elif "legal_actions" in episode.info:
                action = str(rng.choice(episode.info["legal_actions"]))
            else:
                stop(f"{args.env_id} has neither demonstrate() nor info['legal_actions'], so the "
                     "tiny model cannot be warm-started; give --model <folder or hub id>")
            episode.play(env, Turn(episode.observation, action))
        episodes.append(episode)
    return episodes


def tiny_folder(args: RunArgs, demonstrations: list["Episode"], history_turns: int | None) -> Path:
    """Train the tiny tokenizer and model on demonstrations; cached by what determines them."""
    texts = [[(turn.observation, turn.action) for turn in e.turns] for e in demonstrations]
    determined_by = json.dumps([
        texts, history_turns, args.seed, args.warm_start_steps, TINY_TEMPLATE, WARM_START_ROWS,
        WARM_START_LEARNING_RATE, torch.__version__, transformers.__version__])
    key = hashlib.sha256(determined_by.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("TURNRL_CACHE", "~/.cache/turnrl")).expanduser()
    folder = cache / f"{args.env_id.split('/')[-1].split(':')[-1]}-{key}"
    if rank() == 0 and not folder.exists():
        policy = make_tiny_policy(args, texts)
        warm_start(policy, demonstrations, args, history_turns)
        temporary = cache / f"{folder.name}.{os.getpid()}"
        policy.save(temporary)
        with contextlib.suppress(OSError):  # another run has just put the same folder there
            temporary.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    if world_size() > 1:
        dist.barrier()
    return folder


def make_tiny_policy(args: RunArgs, texts: list[list[tuple[str, str]]]) -> Policy:
    """An untrained model of 0.25 million parameters with a tokenizer for these texts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # words and numbers become tokens, everything else stays one token a character (map cells)
    pieces = pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+| ?[0-9]+|\s|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, show_progress=False, special_tokens=[AddedToken(t) for t in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((t for e in texts for pair in e for t in pair), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        chat_template=TINY_TEMPLATE)
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=3)
    return Policy(transformers.LlamaForCausalLM(config), tokenizer, args.device)


def warm_start(policy: Policy, demonstrations: list["Episode"], args: RunArgs,
               history_turns: int | None):
    """Behaviour cloning: maximise the log-probability of the demonstrated actions."""
    for episode in demonstrations:
        turns, episode.turns = episode.turns, []
        for turn in turns:
            episode.observation = turn.observation
            turn.prompt_ids, turn.starts_row = policy.prompt(episode, history_turns)
            turn.token_ids = [*policy.encode(turn.action), policy.end_id]
            turn.logprobs = [0.0] * len(turn.token_ids)
            episode.turns.append(turn)
    batch = collate(demonstrations, policy.device)
    rng = random_stream(args.seed, DEMONSTRATE, 1)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0)
    progress = tqdm.trange(args.warm_start_steps, desc="warm start", disable=quiet())
    for step in progress:
        remaining = 1 - step / args.warm_start_steps
        optimizer.param_groups[0]["lr"] = WARM_START_LEARNING_RATE * remaining
        rows = select_rows(batch, rng.integers(len(batch["tokens"]), size=WARM_START_ROWS))
        logprobs, _ = token_logprobs(policy, rows, temperature=1.0)
        loss = -masked_mean(logprobs, rows["turn_id"] >= 0)
        loss.backward()
        optimizer_step(policy.model, optimizer, args.max_grad_norm)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


# === 4. Rollouts =================================================================================


@dataclasses.dataclass
class Turn:
    """One observation and the policy's answer to it."""

    observation: str
    action: str
    prompt_ids: list[int] = dataclasses.field(default_factory=list)  # fed before the answer
    token_ids: list[int] = dataclasses.field(default_factory=list)  # sampled, end_id included
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of token_ids, when sampled
    starts_row: bool = True  # prompt_ids is a whole context, not a continuation of the last turn
    reward: float = 0.0
    info: dict = dataclasses.field(default_factory=dict)  # what the environment answered


@dataclasses.dataclass
class Episode:
    """Turns from one reset; `observation` is what the policy has to answer next."""

    seed: int
    observation: str
    info: dict = dataclasses.field(default_factory=dict)
    turns: list[Turn] = dataclasses.field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    overflowed: bool = False  # truncated because the context is full

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated

    @property
    def total_reward(self) -> float:
        return sum(turn.reward for turn in self.turns)

    @property
    def success(self) -> bool:
        return bool(self.turns and self.turns[-1].info.get("success", False))

    def row(self) -> list[int]:
        """The tokens of the current row: every prompt and answer since it was started."""
        ids: list[int] = []
        for turn in self.turns:
            ids = ([] if turn.starts_row else ids) + turn.prompt_ids + turn.token_ids
        return ids

    def play(self, env: gym.Env, turn: Turn):
        """Let the environment answer `turn` and append it."""
        where = f"environment {type(env.unwrapped).__name__}, seed {self.seed}, turn {len(self.turns)}"
        try:
            observation, reward, terminated, truncated, info = env.step(turn.action)
        except Exception as error:
            raise EnvironmentFault(f"{where}: {error!r} from step({turn.action!r})", self) from error
        if not isinstance(observation, str):
            raise EnvironmentFault(f"{where}: observation is {observation!r}, not a string", self)
        if not math.isfinite(reward):
            raise EnvironmentFault(f"{where}: reward is {reward}", self)
        turn.reward, turn.info = float(reward), dict(info)
        self.turns.append(turn)
        self.observation, self.info = observation, turn.info
        self.terminated, self.truncated = bool(terminated), bool(truncated and not terminated)


class EnvironmentFault(Exception):
    """An environment broke the rules; carries the episode up to there."""

    def __init__(self, message: str, episode: Episode):
        super().__init__(message)
        self.episode = episode


class Decoder:
    """A KV cache over ragged rows: every row is fed its own number of tokens.

    Rows that get fewer tokens are padded on the left. The padding stays in the cache as a hole:
    the attention mask hides it and positions count real tokens only, so the logits are exact.
    """

    def __init__(self, policy: Policy, rows: int):
        self.policy, self.cache = policy, transformers.DynamicCache(config=policy.model.config)
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=policy.device)  # (B, width)

    def feed(self, pending: list[list[int]]) -> Tensor:
        """Append tokens to every row; the logits (B, V) of the token that follows."""
        width = max(map(len, pending))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in pending])
        chunk = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in pending])
        self.mask = torch.cat([self.mask, chunk.to(self.mask.device)], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        with self.policy.autocast():
            out = self.policy.model(
                ids.to(self.mask.device), attention_mask=self.mask, position_ids=positions,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def keep(self, rows: list[int]):
        """Drop all other rows, in place."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, V), uniforms (B,) in [0, 1) -> sampled tokens (B,) and their log-probs (B,).

    Inverse of the cumulative distribution, no truncation: the log-probs are those of the very
    distribution that was sampled from.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (B, V)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)  # (B, 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def make_envs(args: RunArgs, count: int, evaluation: bool = False) -> list[gym.Env]:
    try:
        kwargs = json.loads(args.env_kwargs)
        return [make_env(args.env_id, evaluation, **kwargs) for _ in range(count)]
    except (gym.error.UnregisteredEnv, ModuleNotFoundError):
        stop(f"--env-id {args.env_id}: no such environment; known ids: {', '.join(known_ids())}, "
             "or module:Id-v0")
    except (gym.error.Error, ValueError, TypeError) as error:
        stop(f"--env-id {args.env_id}: {str(error).splitlines()[0]}")


def start_episodes(envs: list[gym.Env], seeds: list[int]) -> list[Episode]:
    episodes = []
    for env, seed in zip(envs, seeds, strict=True):
        observation, info = env.reset(seed=seed)
        episode = Episode(seed, observation, dict(info))
        if not isinstance(observation, str):
            raise EnvironmentFault(f"environment {type(env.unwrapped).__name__}, seed {seed}: first "
                                   f"observation is {observation!r}, not a string", episode)
        episodes.append(episode)
    return episodes


@torch.no_grad()
def rollout(policy: Policy, envs: list[gym.Env], episodes: list[Episode],
            rngs: list[np.random.Generator], *, max_turns: int,
            max_turn_tokens: int | Callable[[Episode], int], temperature: float,
            history_turns: int | None = None) -> list[Episode]:
    """Play every episode on to its end, in lock-step, and return the same list.

    An episode may already have turns (a fork): it goes on from there. Each draws from its own
    generator, so what it samples does not depend on the other rows. max_turn_tokens may be a
    function of the episode (a budget). history_turns as in Policy.prompt.
    """
    policy.model.eval()
    live, decoder = list(range(len(episodes))), None
    while True:
        # 1. next prompts; an episode whose next turn does not fit into the context is truncated
        prompts, caps = {}, {}
        for i in live:
            if not episodes[i].done and len(episodes[i].turns) >= max_turns:
                episodes[i].truncated = True
            if not episodes[i].done:
                ids, starts_row = prompts[i] = policy.prompt(episodes[i], history_turns)
                caps[i] = max_turn_tokens(episodes[i]) if callable(max_turn_tokens) else max_turn_tokens
                used = 0 if starts_row else len(episodes[i].row())
                if used + len(ids) + caps[i] > policy.context_length:
                    episodes[i].truncated = episodes[i].overflowed = True
        rows = [row for row, i in enumerate(live) if not episodes[i].done]
        if not rows:
            return episodes
        # 2. feed them: to the cache that holds the history, or to a new one
        if decoder is None or history_turns is not None:
            decoder = Decoder(policy, len(rows))
            live = [live[row] for row in rows]
            pending = [prompts[i][0] if prompts[i][1] else episodes[i].row() + prompts[i][0]
                       for i in live]
        else:
            if len(rows) < len(live):
                decoder.keep(rows)
                live = [live[row] for row in rows]
            pending = [episodes[i].turns[-1].token_ids[-1:] + prompts[i][0] for i in live]
        logits = decoder.feed(pending)  # (B, V)
        # 3. sample until every row has ended its turn; ended rows wait behind holes
        cap = max(caps[i] for i in live)
        uniforms = torch.tensor(np.stack([
            np.pad(rngs[i].random(caps[i]), (0, cap - caps[i])) for i in live]))  # (B, cap)
        token_ids: list[list[int]] = [[] for _ in live]
        logprobs: list[list[float]] = [[] for _ in live]
        active = set(range(len(live)))
        for step in range(cap):
            tokens, chosen = (x.tolist() for x in sample_tokens(logits, temperature, uniforms[:, step]))
            for row in sorted(active):
                token_ids[row].append(tokens[row])
                logprobs[row].append(chosen[row])
                if tokens[row] == policy.end_id or len(token_ids[row]) == caps[live[row]]:
                    active.remove(row)
            if not active:
                break
            logits = decoder.feed([token_ids[row][-1:] if row in active else []
                                   for row in range(len(live))])
        # 4. the environments answer
        for row, i in enumerate(live):
            ids, starts_row = prompts[i]
            text = token_ids[row][:-1] if token_ids[row][-1] == policy.end_id else token_ids[row]
            episodes[i].play(envs[i], Turn(episodes[i].observation, policy.decode(text), ids,
                                           token_ids[row], logprobs[row], starts_row))


def collect_groups(policy: Policy, envs: list[gym.Env], args: RunArgs, iteration: int,
                   history_turns: int | None = None) -> list[Episode]:
    """This process's share of num_prompts groups; the G episodes of a group are neighbours."""
    seeds = random_stream(args.seed, PROMPTS, iteration).integers(
        EVALUATION_SEEDS, size=args.num_prompts).repeat(args.group_size)
    first = rank() * len(envs)
    share = range(first, first + len(envs))
    episodes = start_episodes(envs, [int(seeds[i]) for i in share])
    rngs = [random_stream(args.seed, SAMPLE, iteration, i) for i in share]
    return rollout(policy, envs, episodes, rngs, max_turns=args.max_turns,
                   max_turn_tokens=args.max_turn_tokens, temperature=args.temperature,
                   history_turns=history_turns)


# === 5. Batches ==================================================================================
# A batch is a dict of tensors with one row per entry: tokens, turn_id, old_logprobs (B, T),
# episode_id, lengths (B,), and whatever an algorithm adds. Rows are padded on the right: a causal
# model never looks there, so no attention mask is needed.


def collate(episodes: list[Episode], device: torch.device) -> dict[str, Tensor]:
    """Episodes to padded rows; episode_id is the position in `episodes`."""
    rows: list[dict[str, list]] = []
    for episode_id, episode in enumerate(episodes):
        for k, turn in enumerate(episode.turns):
            if turn.starts_row:
                rows.append({"episode_id": episode_id, "tokens": [], "turn_id": [], "logprobs": []})
            prompt, row = len(turn.prompt_ids), rows[-1]
            row["tokens"] += turn.prompt_ids + turn.token_ids
            row["turn_id"] += [-1] * prompt + [k] * len(turn.token_ids)
            row["logprobs"] += [0.0] * prompt + turn.logprobs
            assert len(row["tokens"]) == len(row["turn_id"]) == len(row["logprobs"])
    lengths = [len(row["tokens"]) for row in rows]
    width = max(lengths, default=1)

    def pad(name: str, value: float, dtype: torch.dtype) -> Tensor:
        padded = [row[name] + [value] * (width - len(row[name])) for row in rows]
        return torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)

    return {"tokens": pad("tokens", 0, torch.long), "turn_id": pad("turn_id", -1, torch.long),
            "old_logprobs": pad("logprobs", 0.0, torch.float),
            "episode_id": torch.tensor([row["episode_id"] for row in rows], dtype=torch.long,
                                       device=device),
            "lengths": torch.tensor(lengths, dtype=torch.long, device=device)}


def turn_table(episodes: list[Episode], value: Callable[[Turn], float],
               device: torch.device) -> tuple[Tensor, Tensor]:
    """A number per turn as (E, K), 0 after the end, and the mask (E, K) of the turns played."""
    width = max([len(e.turns) for e in episodes], default=0)
    table = torch.zeros(len(episodes), width, device=device)
    mask = torch.zeros(len(episodes), width, dtype=torch.bool, device=device)
    for e, episode in enumerate(episodes):
        table[e, : len(episode.turns)] = torch.tensor([float(value(t)) for t in episode.turns])
        mask[e, : len(episode.turns)] = True
    return table, mask


def expand_to_tokens(turn_values: Tensor, turn_id: Tensor, episode_id: Tensor) -> Tensor:
    """turn_values (E, K), turn_id (B, T), episode_id (B,) -> (B, T), 0 where turn_id is -1."""
    values = turn_values[episode_id].gather(1, turn_id.clamp(min=0))  # (B, T)
    return torch.where(turn_id >= 0, values, 0.0)


def select_rows(batch: dict[str, Tensor], rows) -> dict[str, Tensor]:
    """Some rows of a batch, without the columns that only longer rows need."""
    index = torch.as_tensor(rows, device=batch["lengths"].device)
    width = int(batch["lengths"][index].max())
    return {name: x[index][:, :width] if x.dim() > 1 else x[index] for name, x in batch.items()}


def token_logprobs(policy: Policy, batch: dict[str, Tensor],
                   temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of every sampled token and entropy where it was sampled: two (B, T), else 0.

    The next-token shift lives here only: entry t belongs to tokens[t], given tokens[< t].
    """
    tokens, mask = batch["tokens"], batch["turn_id"] >= 0  # (B, T)
    columns = mask[:, 1:].any(0).nonzero()[:, 0]  # (C,) positions whose next token was sampled
    with policy.autocast():
        logits = policy.forward(tokens, logits_to_keep=columns, use_cache=False).logits
    logits = logits.float() / temperature  # (B, C, V)
    chosen = logits.gather(2, tokens[:, columns + 1, None])[:, :, 0]  # (B, C)
    logprobs = torch.zeros(tokens.shape, device=logits.device).index_copy(
        1, columns + 1, chosen - logits.logsumexp(-1))
    entropy = torch.zeros_like(logprobs).index_copy(1, columns + 1, token_entropy(logits))
    return torch.where(mask, logprobs, 0.0), torch.where(mask, entropy, 0.0)


def token_entropy(logits: Tensor) -> Tensor:
    """logits (.., V), -inf allowed -> entropy (..) in nats, differentiable."""
    logits = logits - logits.logsumexp(-1, keepdim=True)
    return -(logits.exp() * logits.masked_fill(logits == -math.inf, 0.0)).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where mask is true; 0 for an empty mask. A NaN outside the mask does not matter."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


# === 6. Updates ==================================================================================


def micro_batches(batch: dict[str, Tensor], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Split the rows so that each part has at most max_tokens tokens, padding included."""
    order = batch["lengths"].argsort().tolist()  # rows of like length together: little padding
    part: list[int] = []
    for row in order:
        if part and (len(part) + 1) * int(batch["lengths"][row]) > max_tokens:
            yield select_rows(batch, part)
            part = []
        part.append(row)
    if part:
        yield select_rows(batch, part)


def optimizer_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                   max_grad_norm: float) -> float:
    """Sum gradients over processes, clip, step, clear; the gradient norm before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world_size() > 1:
        flat = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(part.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):
        stop(f"the gradient norm is {norm}; stopped before the optimizer step, the last checkpoint "
             "is unharmed (try a smaller --learning-rate)")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# === 7. Evaluation ===============================================================================


def episode_metrics(episodes: list[Episode]) -> dict[str, float]:
    """Means over the episodes of all processes (every process must hold equally many)."""
    turns = [turn for episode in episodes for turn in episode.turns]
    sums = torch.tensor([
        len(episodes), sum(e.success for e in episodes), sum(e.total_reward for e in episodes),
        len(turns), sum(len(t.token_ids) for t in turns), sum(e.truncated for e in episodes),
        sum(e.overflowed for e in episodes),
        sum(t.info.get("invalid_action", False) for t in turns)], dtype=torch.double)
    n, success, total, turns, tokens, truncated, overflowed, invalid = all_reduce_sum(sums).tolist()
    return {"success": success / n, "return": total / n, "turns": turns / n,
            "tokens_per_turn": tokens / max(turns, 1), "truncated": truncated / n,
            "overflowed": overflowed / n, "invalid_actions": invalid / max(turns, 1)}


def evaluate(policy: Policy, envs: list[gym.Env], args: RunArgs,
             history_turns: int | None = None) -> tuple[dict[str, float], list[Episode]]:
    """One episode on each held-out seed, sampled at the evaluation temperature."""
    episodes: list[Episode] = []
    for first in range(0, args.eval_episodes, len(envs)):
        index = range(first, min(first + len(envs), args.eval_episodes))
        group = start_episodes(envs[: len(index)], [EVALUATION_SEEDS + i for i in index])
        rngs = [random_stream(args.seed, EVALUATE, i) for i in index]
        episodes += rollout(policy, envs[: len(index)], group, rngs, max_turns=args.max_turns,
                            max_turn_tokens=args.max_turn_tokens,
                            temperature=args.eval_temperature, history_turns=history_turns)
    return episode_metrics(episodes), episodes


def transcript(episode: Episode) -> str:
    """An episode as a person reads it."""
    lines = []
    for turn in episode.turns:
        lines += ["    " + line for line in turn.observation.splitlines()]
        lines += [f"  > {turn.action}    (reward {turn.reward:+.2f})"]
    lines += ["    " + line for line in episode.observation.splitlines()]
    end = "success" if episode.success else "terminated" if episode.terminated else "truncated"
    return "\n".join([*lines, f"  = {end}, return {episode.total_reward:.2f}"])


def quiet() -> bool:
    """Whether progress bars are off: not a terminal, or not the first process."""
    return rank() > 0 or not sys.stderr.isatty()


# === 8. Run folders ==============================================================================


class Run:
    """A run folder and what goes into it; `with Run(args, "ms_grpo") as run:` guards a run.

    args.json, metrics.csv (a row per iteration), evals.csv (a row per evaluation), samples.jsonl,
    checkpoint/ (a transformers folder + trainer_state.pt), summary.json, curve.png.
    """

    def __init__(self, args: RunArgs, algo: str):
        check_args(args)
        start_processes(args.device)
        torch.set_float32_matmul_precision("high")
        self.args, self.start, self.signal, self.training, self.tracker = args, 0, 0, False, None
        self.tables: dict[str, list[dict]] = {"metrics": [], "evals": []}
        self.totals = {"generated_tokens": 0, "environment_steps": 0}
        self.clock = time.perf_counter()  # moved back on resume by the seconds spent before
        env = args.env_id.split(":")[-1].split("/")[-1]
        name = f"{env}__{algo}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or Path(args.run_dir) / name)
        if args.resume:
            self.check_resume(algo)
        self.eval_envs = make_envs(args, min(args.eval_episodes, 256), evaluation=True)
        if rank() == 0 and not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                 capture_output=True, text=True)
            versions = {"python": platform.python_version(), "torch": torch.__version__,
                        "transformers": transformers.__version__, "gymnasium": gym.__version__,
                        "commit": git.stdout.strip() or None}
            record = {"algo": algo, "args": dataclasses.asdict(args), "versions": versions}
            (self.folder / "args.json").write_text(json.dumps(record, indent=1))
        try:
            if args.track == "tensorboard" and rank() == 0:
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(self.folder)
                self.tracker = lambda row, step: [writer.add_scalar(*x, step) for x in row.items()]
            elif args.track == "wandb" and rank() == 0:
                import wandb
                wandb.init(project="turnrl", name=name, config=dataclasses.asdict(args))
                self.tracker = lambda row, step: wandb.log(row, step=step)
        except ImportError:
            stop(f"--track {args.track} needs a package: pip install {args.track}")

    def check_resume(self, algo: str):
        try:
            record = json.loads((self.folder / "args.json").read_text())
            saved = record["args"]
        except (OSError, ValueError, KeyError):
            stop(f"--resume {self.folder}: no run folder with a readable args.json")
        if record["algo"] != algo:
            stop(f"--resume {self.folder}: is a run of {record['algo']}, not of {algo}")
        other = [f"--{name.replace('_', '-')} {saved.get(name)}" for name, value
                 in dataclasses.asdict(self.args).items()
                 if name not in MAY_CHANGE_ON_RESUME and saved.get(name) != value]
        if other:
            stop(f"--resume {self.folder}: was made with other flags, repeat them: {' '.join(other)}")

    def __enter__(self) -> "Run":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, frame):
        if not self.training or self.signal:  # nothing to save, or asked twice
            raise SystemExit(128 + number)
        self.signal = number
        print("stopping after this iteration (again: at once)", file=sys.stderr)

    def __exit__(self, kind, error, traceback):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                          else signal.SIG_DFL)
        if isinstance(error, EnvironmentFault):
            self.write_samples("fault", [error.episode])
            stop(f"{error} (transcript in {self.folder / 'samples.jsonl'})")
        if kind is None and world_size() > 1:
            dist.barrier()  # gloo aborts if a process leaves while others still talk
            dist.destroy_process_group()

    def restore(self, policy: Policy, **state):
        """With --resume: load the checkpoint into the policy and into state (objects by name)."""
        if not self.args.resume:
            return
        folders = [self.folder / "checkpoint", self.folder / "checkpoint.old"]
        folder = next((f for f in folders if (f / "trainer_state.pt").exists()), folders[0])
        try:
            saved = torch.load(folder / "trainer_state.pt", map_location=policy.device,
                               weights_only=True)
            weights = type(policy.model).from_pretrained(folder, dtype=torch.float32).state_dict()
            policy.model.load_state_dict(weights)
            for name, target in state.items():
                target.load_state_dict(saved[name])
            for table in self.tables:
                with open(self.folder / f"{table}.csv", newline="") as file:
                    self.tables[table] = [row for row in csv.DictReader(file)
                                          if int(row["iteration"]) <= saved["iteration"]]
        except Exception as error:  # torch, safetensors and pickle each have their own
            stop(f"--resume {self.folder}: its checkpoint cannot be read "
                 f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
        self.start, self.totals = saved["iteration"], saved["totals"]
        self.clock -= saved["seconds"]

    def save(self, iteration: int, policy: Policy, **state):
        """Write a checkpoint under another name, then rename: a kill leaves one readable."""
        if rank() > 0:
            return
        new, current, old = (self.folder / f"checkpoint{end}" for end in (".new", "", ".old"))
        shutil.rmtree(new, ignore_errors=True)
        policy.save(new)
        torch.save({"iteration": iteration, "totals": self.totals,
                    "seconds": time.perf_counter() - self.clock,
                    **{name: x.state_dict() for name, x in state.items()}}, new / "trainer_state.pt")
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def iterations(self, policy: Policy, evaluation: Callable, **state) -> Iterator[int]:
        """The iteration numbers; around them evaluates, saves, shows progress, obeys signals.

        evaluation() returns (metrics, episodes); state are the objects a checkpoint must hold.
        """
        args = self.args
        if not any(int(row["iteration"]) == self.start for row in self.tables["evals"]):
            self.log_evaluation(self.start, *evaluation())
        self.training = True
        steps = range(self.start, self.start if args.eval_only else args.num_iterations)
        self.progress = tqdm.tqdm(steps, desc="train", initial=self.start, disable=quiet(),
                                  total=args.num_iterations)
        for iteration in self.progress:
            yield iteration
            done, last = iteration + 1, iteration + 1 == args.num_iterations
            if (done % args.eval_every == 0 or last) and not self.signal:
                self.log_evaluation(done, *evaluation())
            if done % args.save_every == 0 or last or self.signal:
                self.save(done, policy, **state)
            if self.signal:
                print(f"stopped; continue with --resume {self.folder}", file=sys.stderr)
                raise SystemExit(128 + self.signal)

    def log(self, iteration: int, episodes: list[Episode], metrics: dict[str, float]):
        """A row of metrics.csv: what the training episodes were like and what the update did."""
        train = episode_metrics(episodes)
        count = len(episodes) * world_size()
        turns = round(train["turns"] * count)
        self.totals["environment_steps"] += turns
        self.totals["generated_tokens"] += round(train["tokens_per_turn"] * turns)
        row = {"iteration": iteration + 1, **{f"train_{k}": v for k, v in train.items()}, **metrics}
        self.write("metrics", row)
        speed = self.totals["generated_tokens"] / (time.perf_counter() - self.clock)
        self.progress.set_postfix(
            {"success": f"{train['success']:.2f}", "return": f"{train['return']:.2f}",
             "kl": f"{metrics.get('approx_kl', 0.0):.4f}", "tokens/s": f"{speed:.0f}"}, refresh=False)

    def log_evaluation(self, iteration: int, metrics: dict[str, float], episodes: list[Episode]):
        self.write("evals", {"iteration": iteration, **metrics})
        if rank() > 0:
            return
        self.write_samples(iteration, episodes[:8])
        first, last = iteration == self.start, iteration == self.args.num_iterations
        if self.args.print_samples and (first or last):
            when = "before training" if iteration == 0 else f"after {iteration} iterations"
            for episode in episodes[: self.args.print_samples]:
                tqdm.tqdm.write(f"\n{when}, held-out seed {episode.seed}:\n{transcript(episode)}\n")
        tqdm.tqdm.write(f"iteration {iteration:4d}  success {metrics['success']:.3f}  return "
                        f"{metrics['return']:+.3f}  {time.perf_counter() - self.clock:.0f} s")

    def write(self, table: str, row: dict[str, float]):
        """Add a row to a csv file, which is replaced as a whole."""
        row |= {**self.totals, "seconds": round(time.perf_counter() - self.clock, 2)}
        rows = self.tables[table]
        rows.append(row)
        if rank() > 0:
            return
        path = self.folder / f"{table}.csv"
        with open(path.with_suffix(".new"), "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for r in rows for k in r)))
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".new").replace(path)
        if self.tracker:
            self.tracker({f"{table}/{k}": v for k, v in row.items()}, int(row["iteration"]))

    def write_samples(self, iteration, episodes: list[Episode]):
        with open(self.folder / "samples.jsonl", "a") as file:
            for e in episodes:
                turns = [[t.observation, t.action, t.reward] for t in e.turns]
                file.write(json.dumps({"iteration": iteration, "seed": e.seed, "success": e.success,
                                       "turns": turns, "last_observation": e.observation}) + "\n")

    def finish(self) -> dict[str, float]:
        """Write summary.json and curve.png; the summary."""
        first, last = self.tables["evals"][0], self.tables["evals"][-1]
        summary = {f"{name}_{when}": float(row[name]) for when, row in (("start", first), ("end", last))
                   for name in ("success", "return")}
        summary |= {"iterations": int(last["iteration"]), **self.totals,
                    "seconds": round(time.perf_counter() - self.clock, 1)}
        if rank() == 0:
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
            self.plot()
            print(f"success {summary['success_start']:.3f} -> {summary['success_end']:.3f}, return "
                  f"{summary['return_start']:.3f} -> {summary['return_end']:.3f} in "
                  f"{summary['seconds']:.0f} s; see {self.folder}")
        return summary

    def plot(self):
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for axis, name in zip(axes, ("success", "return"), strict=True):
            for table, column, style in (("metrics", f"train_{name}", "C7-"), ("evals", name, "C0o-")):
                points = [(int(r["iteration"]), float(r[column])) for r in self.tables[table]]
                label = "training episodes" if table == "metrics" else "held-out seeds"
                axis.plot(*zip(*points, strict=True), style, label=label) if points else None
            axis.set(xlabel="iteration", ylabel=name)
        axes[0].set_ylim(-0.02, 1.02)
        axes[0].legend()
        figure.suptitle(self.folder.name, fontsize=9)
        figure.savefig(self.folder / "curve.png", dpi=120)
        plt.close(figure)
