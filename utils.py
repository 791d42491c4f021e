"""Everything the scripts share that is not an algorithm.

Axes, the same in every file: E episodes, K turns, B rows of tokens, T tokens, G group size,
V vocabulary. turn_id (B, T) says which turn sampled a token and is -1 on every token the policy
did not sample (observations, chat markup, forced tokens, padding): mask = turn_id >= 0.

1 Flags     2 Processes and random streams     3 Policies     4 Rollouts     5 Batches and log-probs
6 Updates     7 Evaluation     (loading models: policies.py; run folders and logs: run_folder.py)
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from envs import known_ids, make_env
from envs.episodes import Episode, Turn, start_episodes
from envs.text_env import EVALUATION_SEEDS


# === 1. Flags ====================================================================================
@dataclasses.dataclass
class RunArgs:
    """The flags that all scripts share."""

    seed: int = 1  # seed of everything random in the run: model, instances, sampling
    env_id: str = "turnrl/FrozenLake-v0"  # gymnasium id; module:Id-v0 imports the module first
    env_kwargs: str = "{}"  # arguments of the environment as JSON, e.g. '{"max_turns": 15}'
    model: str = "tiny"  # tiny (made and warm-started here), or a folder or hub id of a chat model
    device: str = "cpu"  # torch device: cpu, cuda, cuda:1
    num_iterations: int = 100  # iterations of: collect episodes, update
    max_generated_tokens: int | None = None  # stop after the iteration that reaches so many
    num_prompts: int = 16  # environment seeds (groups) per iteration
    group_size: int = 8  # episodes that start from the same seed, G
    max_turns: int = 8  # turns after which an episode is truncated, K
    max_turn_tokens: int = 8  # tokens the policy may sample in one turn
    temperature: float = 1.0  # sampling temperature of the training episodes
    learning_rate: float = 3e-4  # of AdamW, constant
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    micro_batch_tokens: int = 16384  # tokens per forward pass of an update: memory, not results
    warm_start_steps: int = 600  # behaviour cloning steps of the tiny model before training
    warm_start_learning_rate: float = 1e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.02  # standard deviation of the tiny model's first weights
    eval_every: int = 10  # iterations between evaluations on held-out seeds
    eval_episodes: int = 256  # held-out seeds per evaluation, one episode each
    eval_temperature: float = 1.0  # sampling temperature of the evaluation
    eval_only: bool = False  # evaluate the start policy (or the --resume checkpoint) and stop
    save_every: int = 50  # iterations between checkpoints (the last one is always saved)
    run_dir: str = "runs"  # parent of the run folder <env>__<algo>__<seed>__<time>
    resume: str | None = None  # run folder to continue, with the flags it was made with
    track: Literal["none", "tensorboard", "wandb"] = "none"  # where metrics go besides metrics.csv
    compile: bool = False  # torch.compile the update and, as CUDA graphs, the decoding
    gradient_checkpointing: bool = False  # compute layers twice in an update: less memory
    print_samples: int = 1  # transcripts printed at both ends of training; 0: no samples.html


def stop(message: str):
    """End the program because of what the user gave it: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """The first line of an error, for one clear line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# === 2. Processes and random streams =============================================================
# Every random number comes from a stream named by integers: (run seed, purpose, iteration, index).
# No generator lives across iterations, so a resumed run, a run on two processes and a run with
# another batch order draw the same numbers. (numpy ignores a 0 at the end of a key: where one key
# may begin another, number from 1.)
DEMONSTRATE, PROMPTS, SAMPLE, EVALUATE, DRAW = range(5)


def random_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def quiet() -> bool:  # whether progress bars are off
    return rank() > 0 or not sys.stderr.isatty()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor := tensor.clone())
    return tensor


def gather_list(items: list) -> list:
    """The items of all processes, in rank order."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, concatenated along axis 0 in rank order; lengths may differ."""
    if world_size() == 1:
        return tensor
    return torch.cat(gather_list([tensor.cpu()])).to(tensor.device)


# === 3. Policies =================================================================================
class Policy:
    """A causal language model, its tokenizer, and how its chat template writes a conversation.

    A conversation in tokens is: head, observation, tail, ANSWER, end_id, between, observation,
    tail, ANSWER, ... where only ANSWER and (normally) end_id are sampled. It is append-only:
    what was sampled is never decoded and encoded again.
    """

    def __init__(self, model, tokenizer, device: str, instructions: str = "", bf16: bool = False):
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, torch.device(device)
        self.bf16, self.checkpointed = bf16, []  # bf16: autocast; the weights stay fp32
        self.player = None  # the model that decodes
        # --compile: whether to; the model that computes updates; the one that decodes one token
        self.compiles, self.compiled, self.decode = False, None, None
        self.static_caches: dict[tuple[int, int], transformers.StaticCache] = {}
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

    def prompt(self, episode: Episode, history_turns: int | None) -> tuple[list[int], bool]:
        """The tokens to feed before the next turn, and whether they start a new row.

        history_turns None keeps the whole history in one growing row; n starts a new row each
        turn that shows the last n turns before the current observation.
        """
        observation, turns = self.encode(episode.observation) + self.tail, episode.turns
        if turns and history_turns is None:
            return self.close(turns[-1]) + observation, False
        ids = list(self.head)
        for turn in turns[-history_turns:] if history_turns else []:
            ids += self.encode(turn.observation) + self.tail
            ids += self.remember(turn) + self.close(turn)
        return ids + observation, True

    def remember(self, turn: Turn) -> list[int]:
        """What a later row shows of an earlier answer: all of it."""
        return turn.token_ids

    def close(self, turn: Turn) -> list[int]:
        """What lies between an answer and the next observation; a turn cut by its cap is ended."""
        return [self.end_id] * (turn.token_ids[-1] != self.end_id) + self.between

    def forward(self, tokens: Tensor, cache: transformers.Cache | None = None, **kwargs) -> Tensor:
        """The logits (B, T or fewer, V), in fp32; with a cache, of the model that decodes."""
        decoding, model = cache is not None, self.model if self.compiled is None else self.compiled
        for layer in self.checkpointed:  # what is recomputed cannot fill a cache
            layer.training = not decoding
        if decoding:
            kwargs[self.cache_name], model = cache, self.player
            if self.decode is not None and tokens.shape[1] == 1:  # prompts have too many lengths
                model = self.decode
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return model(tokens, use_cache=decoding, **kwargs).logits.float()

    def static_cache(self, rows: int, length: int) -> transformers.StaticCache:
        """An empty cache, always the same one for a size: a CUDA graph knows its address."""
        if (rows, length) not in self.static_caches:
            self.static_caches[rows, length] = transformers.StaticCache(
                config=self.model.config, max_cache_len=length)
        self.static_caches[rows, length].reset()
        return self.static_caches[rows, length]

    @torch.no_grad()
    def decoder(self, rows: int, most_rows: int) -> "Decoder | StaticDecoder":
        """An empty cache for so many rows, for the policy as it is now.

        It ends earlier decoders, which would go on with the new weights (and, static, in the same
        cache). most_rows: as many as any decoder of this rollout will have.
        """
        if self.player is None:
            self.player = copy.deepcopy(self.model) if self.bf16 else self.model
            for weight in self.player.parameters() if self.bf16 else ():  # buffers stay fp32
                weight.data = weight.data.to(torch.bfloat16)
            if self.compiles and not self.windowed:
                self.decode = torch.compile(self.player, dynamic=False, mode="reduce-overhead")
        if self.player is not self.model:
            for old, new in zip(self.player.parameters(), self.model.parameters(), strict=True):
                old.copy_(new)
        self.player.eval()
        return Decoder(self, rows) if self.decode is None else StaticDecoder(self, rows, most_rows)

    def save(self, folder: Path):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


# === 4. Rollouts =================================================================================
class GrowingLayer(DynamicLayer):
    """A cache layer with room to grow: a new token is written, what is there is not copied."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        # after a selection the keys are elsewhere
        at_home = old > 0 and self.keys.data_ptr() == self.room[0].data_ptr()
        if not at_home or self.room[0].shape[2] < new:
            room = [x.new_empty(*x.shape[:2], 2 * new, x.shape[3])
                    for x in (key_states, value_states)]  # their widths may differ
            if old > 0:
                room[0][:, :, :old], room[1][:, :, :old] = self.keys, self.values
            self.room = room
        self.room[0][:, :, old:new], self.room[1][:, :, old:new] = key_states, value_states
        self.keys, self.values = (x[:, :, :new] for x in self.room)
        return self.keys, self.values


class Decoder:
    """A KV cache over ragged rows: every row is fed its own number of tokens.

    Rows that get fewer tokens are padded on the left. The padding stays in the cache as a hole:
    the attention mask hides it and positions count real tokens only, so the logits are exact.
    """

    def __init__(self, policy: Policy, rows: int):
        self.policy, self.cache = policy, transformers.DynamicCache(config=policy.model.config)
        self.cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer
                             for layer in self.cache.layers]
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=policy.device)  # (B, width)

    def feed(self, pending: list[list[int]]) -> Tensor:
        """Append tokens to every row; the logits (B, V) of the token that follows."""
        width = max(map(len, pending))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in pending])
        chunk = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in pending])
        self.mask = torch.cat([self.mask, chunk.to(self.mask.device)], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        return self.policy.forward(ids.to(self.mask.device), attention_mask=self.mask,
                                   position_ids=positions, cache=self.cache,
                                   logits_to_keep=1)[:, -1]

    def keep(self, rows: list[int]):
        """Drop all other rows, in place."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


MIN_STATIC_CACHE = 256  # columns


class StaticDecoder:
    """A Decoder for --compile: everything keeps its shape, so that one token is one CUDA graph.

    The number of rows is a power of 2. Dropped rows stay behind and get holes. When the cache is
    full (of holes, mostly), all tokens are fed once more, into one with room for as many again.
    """

    def __init__(self, policy: Policy, rows: int, most_rows: int):
        self.policy, self.rows = policy, list(range(rows))
        self.history: list[list[int]] = [[] for _ in range(2 ** (most_rows - 1).bit_length())]
        self.mask, self.width = torch.zeros(len(self.history), 0, dtype=torch.long), 0

    def feed(self, pending: list[list[int]]) -> Tensor:
        """Append tokens to every row; the logits (B, V) of the token that follows."""
        new: list[list[int]] = [[] for _ in self.history]
        for row, ids in zip(self.rows, pending, strict=True):
            new[row] = ids
            self.history[row] = self.history[row] + ids
        if self.width + max(map(len, new)) > self.mask.shape[1]:
            new, self.width = [ids or [0] for ids in self.history], 0  # no row without a token
            length = max(MIN_STATIC_CACHE, 2 ** (2 * max(map(len, new)) - 1).bit_length())
            self.cache = self.policy.static_cache(len(new), length)
            self.mask = torch.zeros(len(new), length, dtype=torch.long, device=self.policy.device)
        width = max(map(len, new))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in new])
        chunk = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in new])
        self.mask[:, self.width : self.width + width] = chunk.to(self.mask.device)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, self.width : self.width + width]
        self.width += width
        logits = self.policy.forward(ids.to(self.mask.device), attention_mask=self.mask,
                                     position_ids=positions, cache=self.cache, logits_to_keep=1)
        return logits[self.rows, -1]

    def keep(self, rows: list[int]):
        """Drop all other rows, in place."""
        self.rows = [self.rows[row] for row in rows]
        self.history = [ids if row in self.rows else [] for row, ids in enumerate(self.history)]


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, V), uniforms (B,) in [0, 1) -> sampled tokens (B,) and their log-probs (B,).

    Inverse of the cumulative distribution, without truncation: the log-probs are those of the very
    distribution that was sampled from.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)  # (B, V)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = (1 - uniforms.to(cumulative))[:, None] * cumulative[:, -1:]  # > 0 and <= the sum
    tokens = torch.searchsorted(cumulative, threshold)  # (B, 1), never of probability 0
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def make_envs(args: RunArgs, count: int, evaluation: bool = False) -> list[gym.Env]:
    try:
        kwargs = json.loads(args.env_kwargs)
        return [make_env(args.env_id, evaluation, **kwargs) for _ in range(count)]
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        stop(f"--env-id {args.env_id}: {reason(error)} Known: {', '.join(known_ids())}")
    except (gym.error.Error, ValueError, TypeError) as error:
        stop(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: {reason(error)}")


@torch.no_grad()
def rollout(policy: Policy, envs: list[gym.Env], episodes: list[Episode],
            rngs: list[np.random.Generator], *, max_turns: int,
            max_turn_tokens: int | Callable[[Episode, int], int], temperature: float,
            history_turns: int | None = None,
            force: Callable[[Episode, int, list[int]], list[int]] | None = None) -> list[Episode]:
    """Play every episode on to its end, in lock-step, and return the same list.

    An episode may already have turns (a fork): it goes on from there. Each draws from its own
    generator, so what it samples does not depend on the other rows. history_turns is that of
    Policy.prompt. Budgets, with the number of tokens before the turn: max_turn_tokens(episode,
    used), and force(episode, used, token_ids), the tokens to put in, unsampled, after those of the
    turn so far.
    """
    live, decoder = list(range(len(episodes))), None
    prompts, used, caps, unfed = {}, {}, {}, {}
    while True:
        # 1. the next prompts; an episode whose next turn does not fit into the context is truncated
        for episode, i in ((episodes[i], i) for i in live if not episodes[i].done):
            prompts[i] = ids, starts_row = policy.prompt(episode, history_turns)
            used[i] = len(ids) + (0 if starts_row else len(episode.row()))
            caps[i] = (max_turn_tokens(episode, used[i]) if callable(max_turn_tokens)
                       else max_turn_tokens)
            full = caps[i] < 1 or used[i] + caps[i] > policy.context_length
            episode.truncated = full or len(episode.turns) >= max_turns
            episode.overflowed = full and len(episode.turns) < max_turns
        rows = [row for row, i in enumerate(live) if not episodes[i].done]
        if not rows:
            return episodes
        dropped, live = len(live) - len(rows), [live[row] for row in rows]
        # 2. feed them: to the cache that holds the history, or to a new one (also for a model with
        # a sliding window, which would count the holes of a cache as tokens)
        if decoder is None or history_turns is not None or policy.windowed:
            decoder = policy.decoder(len(live), len(episodes))
            pending = [prompts[i][0] if prompts[i][1] else episodes[i].row() + prompts[i][0]
                       for i in live]
        else:
            if dropped:
                decoder.keep(rows)
            pending = [unfed[i] + prompts[i][0] for i in live]
        token_ids = [force(episodes[i], used[i], []) if force else [] for i in live]
        forced = [set(range(len(ids))) for ids in token_ids]
        logprobs = [[0.0] * len(ids) for ids in token_ids]
        logits = decoder.feed([a + b for a, b in zip(pending, token_ids, strict=True)])  # (B, V)
        # 3. sample until every row has ended its turn; rows that are done wait behind holes
        cap = max(caps[i] for i in live)
        uniforms = torch.tensor(np.stack([
            np.pad(rngs[i].random(caps[i]), (0, cap - caps[i])) for i in live]))  # (B, cap)
        active = list(range(len(live)))
        for step in range(cap):
            drawn = sample_tokens(logits, temperature, uniforms[:, step])
            tokens, chosen = (x.tolist() for x in drawn)
            for row in active:
                ids, i = token_ids[row], live[row]
                ids.append(tokens[row])
                put_in = force(episodes[i], used[i], ids) if force else []
                forced[row].update(range(len(ids), len(ids) + len(put_in)))
                ids += put_in
                logprobs[row] += [chosen[row]] + [0.0] * len(put_in)
                unfed[i] = [tokens[row], *put_in]
            active = [row for row in active if token_ids[row][-1] != policy.end_id
                      and len(token_ids[row]) < caps[live[row]]]
            if not active:
                break
            fed = [unfed[i] if row in active else [] for row, i in enumerate(live)]
            if policy.windowed and len({len(fed[row]) for row in active}) > 1:  # again: no holes
                decoder = policy.decoder(len(live), len(episodes))
                fed = [a + b for a, b in zip(pending, token_ids, strict=True)]
            logits = decoder.feed(fed)
        # 4. the environments answer
        for row, i in enumerate(live):
            ids = token_ids[row][:-1] if token_ids[row][-1] == policy.end_id else token_ids[row]
            text = policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            episodes[i].answer(envs[i], Turn(
                episodes[i].observation, text, *prompts[i], token_ids=token_ids[row],
                logprobs=logprobs[row], forced=forced[row]))


def collect_groups(policy: Policy, envs: list[gym.Env], args: RunArgs, iteration: int,
                   history_turns: int | None = None, **budget) -> list[Episode]:
    """This process's share of num_prompts groups; the G episodes of a group are neighbours.

    budget: max_turn_tokens and force of rollout.
    """
    seeds = random_stream(args.seed, PROMPTS, iteration).integers(
        EVALUATION_SEEDS, size=args.num_prompts).repeat(args.group_size)
    share = range(rank() * len(envs), (rank() + 1) * len(envs))
    episodes = rollout(policy, envs, start_episodes(envs, [seeds[i] for i in share]),
                       [random_stream(args.seed, SAMPLE, iteration, i) for i in share],
                       max_turns=args.max_turns, temperature=args.temperature,
                       history_turns=history_turns,
                       **{"max_turn_tokens": args.max_turn_tokens, **budget})
    if not all_reduce_sum(torch.tensor(sum(len(e.turns) for e in episodes))):
        stop(f"no prompt leaves room to answer in the model's context of {policy.context_length} "
             "tokens")
    refresh_logprobs(policy, episodes, args)
    return episodes


def refresh_logprobs(policy: Policy, episodes: list[Episode], args: RunArgs):
    """In bf16 decoding rounds differently from the update's pass: take the log-probs of that."""
    if policy.bf16:
        batch, turns = collate(episodes, policy.device), [t for e in episodes for t in e.turns]
        logprobs, _ = batch_logprobs(policy, batch, args)
        sampled = iter(logprobs[batch["turn_id"] >= 0].tolist())
        for turn in turns:
            turn.logprobs = [0.0 if position in turn.forced else next(sampled)
                             for position in range(len(turn.token_ids))]


# === 5. Batches and log-probs ====================================================================
# A batch is a dict of tensors with one row per entry: tokens, turn_id, old_logprobs (B, T),
# episode_id, lengths (B,), and whatever an algorithm adds. Rows are padded on the right: a causal
# model never looks there, so no attention mask is needed.
def collate(episodes: list[Episode], device: torch.device) -> dict[str, Tensor]:
    """Episodes to padded rows; episode_id is the position in `episodes`."""
    rows: list[dict[str, Any]] = []
    for episode_id, episode in enumerate(episodes):
        for k, turn in enumerate(episode.turns):
            if turn.starts_row:
                rows.append({"episode_id": episode_id, "tokens": [], "turn_id": [], "logprobs": []})
            rows[-1]["tokens"] += turn.prompt_ids + turn.token_ids
            rows[-1]["turn_id"] += [-1] * len(turn.prompt_ids) + [
                -1 if position in turn.forced else k for position in range(len(turn.token_ids))]
            rows[-1]["logprobs"] += [0.0] * len(turn.prompt_ids) + turn.logprobs
            assert len(rows[-1]["tokens"]) == len(rows[-1]["turn_id"]) == len(rows[-1]["logprobs"])
    lengths = [len(row["tokens"]) for row in rows]
    width = max(lengths, default=1)

    def pad(name: str, value: float, dtype: torch.dtype) -> Tensor:
        padded = [row[name] + [value] * (width - len(row[name])) for row in rows]
        return torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)

    ids = torch.tensor([row["episode_id"] for row in rows], dtype=torch.long, device=device)
    return {"tokens": pad("tokens", 0, torch.long), "turn_id": pad("turn_id", -1, torch.long),
            "old_logprobs": pad("logprobs", 0.0, torch.float), "episode_id": ids,
            "lengths": torch.tensor(lengths, dtype=torch.long, device=device)}


def turn_table(episodes: list[Episode], value: Callable[[Turn], float],
               device: torch.device) -> tuple[Tensor, Tensor]:
    """A number per turn as (E, K), 0 after the end, and the mask (E, K) of the turns played."""
    width = max((len(e.turns) for e in episodes), default=1) or 1
    rows = [[float(value(t)) for t in e.turns] + [0.0] * (width - len(e.turns)) for e in episodes]
    played = torch.tensor([len(e.turns) for e in episodes], device=device)
    mask = torch.arange(width, device=device) < played[:, None]
    return torch.tensor(rows, device=device).reshape(len(episodes), width), mask


def expand_to_tokens(turn_values: Tensor, turn_id: Tensor, episode_id: Tensor) -> Tensor:
    """turn_values (E, K), turn_id (B, T), episode_id (B,) -> (B, T), 0 where turn_id is -1."""
    values = turn_values[episode_id].gather(1, turn_id.clamp(min=0))  # (B, T)
    return torch.where(turn_id >= 0, values, 0.0)


def select_rows(batch: dict[str, Tensor], rows) -> dict[str, Tensor]:
    """Some rows of a batch, without the columns that only longer rows need."""
    index = torch.as_tensor(rows, device=batch["lengths"].device)
    width = max([1, *batch["lengths"][index].tolist()])
    return {name: x[index][:, :width] if x.dim() > 1 else x[index] for name, x in batch.items()}


def token_logprobs(policy: Policy, batch: dict[str, Tensor],
                   temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of every sampled token and entropy where it was sampled: two (B, T), else 0.

    The next-token shift lives here only: entry t belongs to tokens[t], given tokens[< t].
    """
    tokens, mask = batch["tokens"], batch["turn_id"] >= 0  # (B, T)
    columns = mask[:, 1:].any(0).nonzero()[:, 0]  # (C,) positions whose next token was sampled
    logits = policy.forward(tokens, logits_to_keep=columns) / temperature
    chosen = logits.gather(2, tokens[:, columns + 1, None])[:, :, 0] - logits.logsumexp(-1)
    entropy, zeros = token_entropy(logits), torch.zeros(tokens.shape, device=logits.device)
    chosen, entropy = (zeros.index_copy(1, columns + 1, x) for x in (chosen, entropy))  # (B, T)
    return torch.where(mask, chosen, 0.0), torch.where(mask, entropy, 0.0)


@torch.no_grad()
def batch_logprobs(policy: Policy, batch: dict[str, Tensor],
                   args: RunArgs) -> tuple[Tensor, Tensor]:
    """token_logprobs of a batch of any size, without gradient: two (B, T)."""
    values = torch.zeros(2, *batch["tokens"].shape, device=policy.device)
    numbered = batch | {"row": torch.arange(len(batch["tokens"]), device=policy.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        here = torch.stack(token_logprobs(policy, part, args.temperature))
        values[:, part["row"], : here.shape[2]] = here
    return values[0], values[1]


def token_entropy(logits: Tensor) -> Tensor:
    """logits (.., V), -inf allowed -> entropy (..) in nats, differentiable."""
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)


# === 6. Updates ==================================================================================
def micro_batches(batch: dict[str, Tensor], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Split the rows, like lengths together, into parts of at most max_tokens padded tokens."""
    part: list[int] = []
    for row in batch["lengths"].argsort(stable=True).tolist():
        if part and (len(part) + 1) * int(batch["lengths"][row]) > max_tokens:
            yield select_rows(batch, part)
            part = []
        part.append(row)
    if part:
        yield select_rows(batch, part)


def optimizer_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float,
                   processes: int | None = None) -> float:
    """Sum gradients over processes, clip, step, clear; the gradient norm before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if (processes or world_size()) > 1:
        flat = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(part.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):
        stop(f"the gradient norm is {norm}: stopped before the optimizer step, the last checkpoint "
             "is unharmed (try a smaller --learning-rate)")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# === 7. Evaluation ===============================================================================
def episode_metrics(episodes: list[Episode]) -> dict[str, float]:
    """Means over the episodes, or turns, of all processes, if there are any."""
    turns = [turn for episode in episodes for turn in episode.turns]
    values = {
        "success": [e.success for e in episodes], "return": [e.total_reward for e in episodes],
        "turns": [len(e.turns) for e in episodes], "truncated": [e.truncated for e in episodes],
        "overflowed": [e.overflowed for e in episodes],
        "tokens_per_turn": [turn.num_sampled for turn in turns],
        "invalid_actions": [turn.info.get("invalid_action", False) for turn in turns]}
    sums = torch.tensor([[sum(x), len(x)] for x in values.values()], dtype=torch.double)
    return {name: total / count for name, (total, count) in zip(
        values, all_reduce_sum(sums).tolist(), strict=True) if count}


def evaluate(policy: Policy, envs: list[gym.Env], args: RunArgs,
             history_turns: int | None = None,
             **budget) -> tuple[dict[str, float], list[Episode]]:
    """One episode on each held-out seed, sampled at the evaluation temperature.

    The processes share the seeds: metrics of all, episodes of this one. budget: see collect_groups.
    """
    episodes: list[Episode] = []
    share = range(args.eval_episodes)[rank() :: world_size()]
    for first in range(0, len(share), len(envs)):
        index = share[first : first + len(envs)]
        started = start_episodes(envs[: len(index)], [EVALUATION_SEEDS + i for i in index])
        episodes += rollout(policy, envs, started,
                            [random_stream(args.seed, EVALUATE, i) for i in index],
                            max_turns=args.max_turns, temperature=args.eval_temperature,
                            history_turns=history_turns,
                            **{"max_turn_tokens": args.max_turn_tokens, **budget})
    return episode_metrics(episodes), episodes
