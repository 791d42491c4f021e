"""Everything the scripts share that is not an algorithm.

Axes, the same in every file: E episodes, K turns, B rows of tokens, T tokens, G group size,
V vocabulary. turn_id (B, T) says which turn sampled a token and is -1 on every token the policy
did not sample (observations, chat markup, forced tokens, padding): mask = turn_id >= 0.

1 Flags     2 Processes and random streams     3 Rollouts     4 Batches and log-probs
5 Updates     6 Evaluation     (the policy: policies.py; run folders and logs: run_folder.py)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from chat_format import is_tiny
from envs import known_ids, make_env
from envs.episodes import Episode, Turn, start_episodes
from envs.text_env import EVALUATION_SEEDS

if TYPE_CHECKING:
    from policies import Policy


# === 1. Flags ====================================================================================
@dataclasses.dataclass
class RunArgs:
    """The flags that all scripts share."""

    seed: int = 1  # seed of everything random in the run: model, instances, sampling
    env_id: str = "turnrl/FrozenLake-v0"  # gymnasium id; module:Id-v0 imports the module first
    env_kwargs: str = "{}"  # arguments of the environment as JSON, e.g. '{"max_turns": 15}'
    model: str = "tiny"  # or a folder or hub id of a chat model (its defaults: --model X --help)
    template_kwargs: str = "{}"  # of its chat template as JSON, e.g. '{"enable_thinking": false}'
    context_length: int | None = None  # most tokens of a row; default: what the model's config says
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
    micro_batch_tokens: int = 4096  # tokens per forward pass of an update: memory, not results
    warm_start_steps: int | None = None  # of behaviour cloning before training; a chat model: 0
    warm_start_learning_rate: float = 1e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.02  # standard deviation of the tiny model's first weights
    eval_every: int = 10  # iterations between evaluations on held-out seeds
    eval_episodes: int = 256  # held-out seeds per evaluation, one episode each
    eval_temperature: float = 1.0  # sampling temperature of the evaluation
    eval_only: bool = False  # evaluate the start policy (or the --resume checkpoint) and stop
    warm_start_only: bool = False  # evaluate it, save it as the run folder's checkpoint and stop
    save_every: int = 50  # iterations between checkpoints (the last one is always saved)
    run_dir: str = "runs"  # parent of the run folder <env>__<algo>__<seed>__<time>
    resume: str | None = None  # run folder to continue, with the flags it was made with
    track: Literal["none", "tensorboard", "wandb"] = "none"  # where metrics go besides metrics.csv
    gradient_checkpointing: bool = False  # compute layers twice in an update: less memory
    print_samples: int = 1  # transcripts printed at both ends of training; 0: no samples.html
    may_be_zero: ClassVar[set[str]] = {"seed", "warm_start_steps", "print_samples"}  # others: >= 1
    chat_defaults: ClassVar = {"learning_rate": 1e-5, "num_prompts": 8, "max_turn_tokens": 24,
                               "eval_episodes": 64, "warm_start_learning_rate": 1e-4}
    tiny_steps: ClassVar[int] = 600  # of the warm start, where the tiny model is trained


def stop(message: str):
    """End the program because of what the user gave it: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:400]


# === 2. Processes and random streams =============================================================
# Every random number comes from a stream named by integers: (run seed, purpose, iteration, index).
# So a resumed run, a run on two processes and one with another batch order draw the same numbers.
# (numpy ignores a 0 at the end of a key: where one key may begin another, number from 1.)
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


# === 3. Rollouts =================================================================================
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
    """A KV cache over ragged rows. A row is fed only those tokens that the cache does not hold yet.

    Rows that get fewer tokens are padded on the left. The padding stays in the cache as a hole:
    the attention mask hides it and positions count real tokens only, so the logits are exact.
    """

    def __init__(self, policy: Policy, rows: int):
        self.policy = policy
        self.clear(rows)

    def clear(self, rows: int):
        self.cache = transformers.DynamicCache(config=self.policy.model.config)
        self.cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer
                             for layer in self.cache.layers]
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=self.policy.device)  # (B, width)
        self.fed = [0] * rows  # how many tokens of every row the cache holds

    def feed(self, rows: list[list[int]], active: list[int] | None = None) -> Tensor:
        """Feed what is new in the active rows (default: all); logits (B, V) of the token after it.

        The logits of a row that is not active mean nothing.
        """
        active = list(range(len(rows))) if active is None else active
        # a sliding window counts holes as tokens, and a recurrent layer goes on by one token only
        if self.policy.windowed and any(len(rows[n]) - self.fed[n] != 1 for n in active):
            self.clear(len(rows))
            active = list(range(len(rows)))
        new: list[list[int]] = [[] for _ in rows]
        for n in active:
            new[n], self.fed[n] = rows[n][self.fed[n]:], len(rows[n])
        width = max(map(len, new))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in new])
        chunk = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in new])
        self.mask = torch.cat([self.mask, chunk.to(self.mask.device)], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        return self.policy.forward(ids.to(self.mask.device), attention_mask=self.mask,
                                   position_ids=positions, cache=self.cache,
                                   logits_to_keep=1)[:, -1]

    def keep(self, rows: list[int]):
        """Drop all other rows, in place."""
        if self.policy.windowed:  # feed starts it again anyway; recurrent layers cannot select
            self.clear(len(rows))
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.fed = self.mask[index], [self.fed[n] for n in rows]


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


@torch.no_grad()
def sample_answers(decoder: Decoder, rows: list[list[int]], turns: list[Turn], caps: list[int],
                   uniforms: Tensor, temperature: float,
                   forces: list[Callable[[list[int]], list[int]]] | None = None):
    """Let the policy answer every row, in lock-step. Rows and turns grow by the tokens.

    caps: the most tokens of each answer; uniforms (B, largest cap) in [0, 1); forces: for each row
    a function that says which unsampled tokens must follow the answer so far
    """
    def put_in(n: int):
        turn, ids = turns[n], forces[n](turns[n].token_ids) if forces else []
        turn.forced.update(range(len(turn.token_ids), len(turn.token_ids) + len(ids)))
        turn.token_ids += ids
        turn.logprobs += [0.0] * len(ids)
        rows[n] += ids

    active = list(range(len(rows)))
    for n in active:
        put_in(n)
    with decoder.policy.autocast():  # around all tokens: it keeps the weights that it has rounded
        for step in range(max(caps)):
            logits = decoder.feed(rows, active if step else None)  # (B, V)
            drawn = sample_tokens(logits, temperature, uniforms[:, step])
            tokens, logprobs = (x.tolist() for x in drawn)
            for n in active:
                turns[n].token_ids.append(tokens[n])
                turns[n].logprobs.append(logprobs[n])
                rows[n].append(tokens[n])
                put_in(n)
            active = [n for n in active if turns[n].token_ids[-1] not in decoder.policy.end_ids
                      and len(turns[n].token_ids) < caps[n]]
            if not active:  # rows that are done wait behind holes
                return


@torch.no_grad()
def rollout(policy: Policy, envs: list[gym.Env], episodes: list[Episode],
            rngs: list[np.random.Generator], max_turns: int, temperature: float) -> list[Episode]:
    """Play every episode on to its end, in lock-step, and return the same list.

    An episode may already have turns (a fork): it goes on from there. Each draws from its own
    generator, so what it samples does not depend on the other rows. What a turn is shown, how long
    it may be and what is put into it is up to the policy (prompt, turn_cap, force).
    """
    live, decoder = list(range(len(episodes))), None
    rows, turns, caps = [episode.row() for episode in episodes], {}, {}
    while True:
        # 1. the next prompts; an episode whose next turn does not fit into the context is truncated
        for i, episode in ((i, episodes[i]) for i in live if not episodes[i].done):
            prompt, starts_row = policy.prompt(episode)
            rows[i] = ([] if starts_row else rows[i]) + prompt
            turns[i] = Turn(episode.observation, "", prompt, starts_row)
            caps[i] = policy.turn_cap(episode, len(rows[i]))
            full = caps[i] < 1 or len(rows[i]) + caps[i] > policy.context_length
            episode.truncated = full or len(episode.turns) >= max_turns
            episode.overflowed = full and len(episode.turns) < max_turns
        going = [n for n, i in enumerate(live) if not episodes[i].done]
        if not going:
            return episodes
        # 2. a new cache, or the one that holds the history
        if decoder is None or policy.history_turns is not None:
            decoder = Decoder(policy, len(going))
        elif len(going) < len(live):
            decoder.keep(going)
        live = [live[n] for n in going]
        # 3. the policy answers
        cap = max(caps[i] for i in live)
        forces = [functools.partial(policy.force, episodes[i], len(rows[i])) for i in live]
        uniforms = torch.tensor(np.stack([
            np.pad(rngs[i].random(caps[i]), (0, cap - caps[i])) for i in live]))  # (B, cap)
        sample_answers(decoder, [rows[i] for i in live], [turns[i] for i in live],
                       [caps[i] for i in live], uniforms, temperature, forces)
        # 4. the environments react
        for i in live:
            turns[i].action = policy.action(turns[i].token_ids)
            episodes[i].answer(envs[i], turns[i])


def make_envs(args: RunArgs, count: int | None = None, evaluation: bool = False) -> list[gym.Env]:
    """Environments as the flags say, by default one for every training episode of this process."""
    count = args.num_prompts * args.group_size // world_size() if count is None else count
    try:
        kwargs = {"chat": not is_tiny(args.model)} | json.loads(args.env_kwargs)
        return [make_env(args.env_id, evaluation, **kwargs) for _ in range(count)]
    except (Exception, SystemExit) as error:  # a constructor may raise anything
        unknown = isinstance(error, (gym.error.UnregisteredEnv, ModuleNotFoundError))
        stop(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: {type(error).__name__}: "
             + reason(error) + f" Known: {', '.join(known_ids())}" * unknown)


def collect_groups(policy: Policy, envs: list[gym.Env], args: RunArgs,
                   iteration: int) -> list[Episode]:
    """This process's share of num_prompts groups; the G episodes of a group are neighbours."""
    seeds = random_stream(args.seed, PROMPTS, iteration).integers(
        EVALUATION_SEEDS, size=args.num_prompts).repeat(args.group_size)
    share = range(rank() * len(envs), (rank() + 1) * len(envs))
    episodes = rollout(policy, envs, start_episodes(envs, [seeds[i] for i in share]),
                       [random_stream(args.seed, SAMPLE, iteration, i) for i in share],
                       args.max_turns, args.temperature)
    policy.check_room(envs[0], episodes)
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


# === 4. Batches and log-probs ====================================================================
# A batch is a dict of tensors with one row per entry: tokens, turn_id, old_logprobs (B, T),
# episode_id, lengths (B,), and whatever an algorithm adds. Rows are padded on the right: a causal
# model never looks there, so no attention mask is needed.
def collate(episodes: list[Episode], device: torch.device,
            credit: Tensor | None = None) -> dict[str, Tensor]:
    """Episodes to padded rows; episode_id is the position in `episodes`.

    credit (E, K): what every turn is credited with becomes "advantages" (B, T).
    """
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
    batch = {"tokens": pad("tokens", 0, torch.long), "turn_id": pad("turn_id", -1, torch.long),
             "old_logprobs": pad("logprobs", 0.0, torch.float), "episode_id": ids,
             "lengths": torch.tensor(lengths, dtype=torch.long, device=device)}
    if credit is not None:
        batch["advantages"] = expand_to_tokens(credit, batch["turn_id"], ids)
    return batch


def turn_table(episodes: list[Episode], value: Callable[[Turn], float],
               device: torch.device) -> tuple[Tensor, Tensor]:
    """A number per turn, (E, K) in double, 0 after the end; the mask (E, K) of turns played."""
    width = max((len(e.turns) for e in episodes), default=1) or 1
    rows = [[float(value(t)) for t in e.turns] + [0.0] * (width - len(e.turns)) for e in episodes]
    played = torch.tensor([len(e.turns) for e in episodes], device=device)
    mask = torch.arange(width, device=device) < played[:, None]
    return torch.tensor(rows, dtype=torch.double, device=device).reshape(-1, width), mask


def expand_to_tokens(turn_values: Tensor, turn_id: Tensor, episode_id: Tensor) -> Tensor:
    """turn_values (E, K), turn_id (B, T), episode_id (B,) -> fp32 (B, T), 0 where turn_id is -1.

    >>> turn_id = torch.tensor([[-1, 0, 0, -1, 1]])  # two observations, an answer after each
    >>> expand_to_tokens(torch.tensor([[0.5, -2.0]]), turn_id, torch.tensor([0]))
    tensor([[ 0.0000,  0.5000,  0.5000,  0.0000, -2.0000]])
    """
    values = turn_values.float()[episode_id].gather(1, turn_id.clamp(min=0))  # (B, T)
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
    tokens, following = batch["tokens"], batch["turn_id"][:, 1:] >= 0  # (B, T), (B, T - 1)
    zeros = torch.zeros(following.shape, device=tokens.device)
    return tuple(torch.nn.functional.pad(zeros.masked_scatter(following, x), (1, 0))
                 for x in policy.score_next(tokens, following, temperature))


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
    """logits (.., V), -inf allowed -> entropy (..) in nats, differentiable.

    >>> token_entropy(torch.tensor([0.0, 0.0, -math.inf]))  # two equal choices: ln 2
    tensor(0.6931)
    """
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)


# === 5. Updates ==================================================================================
def minibatches(group_id: Tensor, credit: Tensor, count: int) -> Iterator[Tensor]:
    """This process's episodes of every minibatch that has something to learn from.

    group_id (E,), credit (E, K). The groups of all processes are dealt out in turn.
    """
    number = group_id + rank() * (int(group_id.max()) + 1)
    for part in range(count):
        chosen = (number % count == part).nonzero()[:, 0]
        if all_reduce_sum(credit[chosen].abs().sum()):
            yield chosen


def over_processes(sums: dict[str, Tensor]) -> dict[str, float]:
    """Numbers to log, summed over all processes."""
    totals = all_reduce_sum(torch.tensor([float(x) for x in sums.values()]))
    return dict(zip(sums, totals.tolist(), strict=True))


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


# === 6. Evaluation ===============================================================================
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


def groups_without_signal(credit: Tensor, group_size: int) -> float:
    """The share of the groups, of all processes, in which every advantage is 0; credit (E, K)."""
    silent = credit.reshape(len(credit) // group_size, -1).abs().amax(1) == 0
    return all_gather(silent).double().mean().item()


def evaluate(policy: Policy, envs: list[gym.Env],
             args: RunArgs) -> tuple[dict[str, float], list[Episode]]:
    """One episode on each held-out seed, sampled at the evaluation temperature.

    The processes share the seeds: metrics of all, episodes of this one.
    """
    episodes: list[Episode] = []
    share = range(args.eval_episodes)[rank() :: world_size()]
    for first in range(0, len(share), len(envs)):
        index = share[first : first + len(envs)]
        started = start_episodes(envs[: len(index)], [EVALUATION_SEEDS + i for i in index])
        episodes += rollout(policy, envs, started,
                            [random_stream(args.seed, EVALUATE, i) for i in index],
                            args.max_turns, args.eval_temperature)
    policy.check_room(envs[0], episodes)
    return episode_metrics(episodes), episodes
