"""Playing episodes: sampling answers turn by turn, groups of training episodes, evaluation.

Axes as in utils.py: E episodes, K turns, B rows of tokens, T tokens, V vocabulary.

1 Rollouts     2 Evaluation
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from chat_format import is_tiny
from envs import known_ids, make_env
from envs.episodes import Episode, Turn, start_episodes
from envs.text_env import EVALUATION_SEEDS
from utils import (
    EVALUATE, PROMPTS, SAMPLE, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate,
    random_stream, rank, reason, stop, world_size,
)

if TYPE_CHECKING:
    from policies import Policy


# === 1. Rollouts =================================================================================
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
        self.read_shared(rows)
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

    def read_shared(self, rows: list[list[int]]):
        """Read once what all rows begin with, such as the rules of the game, and copy the cache."""
        if self.mask.shape[1] or len(rows) < 2 or self.policy.windowed:  # which wants no holes
            return
        shared = os.path.commonprefix([row[:-1] for row in rows])  # it takes lists, too
        if len(shared) < self.policy.worth_sharing:
            return
        ids = torch.tensor([shared], device=self.mask.device)
        ones = torch.ones_like(ids)
        self.policy.forward(ids, attention_mask=ones, position_ids=ones.cumsum(1) - 1,
                            cache=self.cache, logits_to_keep=1)
        self.cache.batch_repeat_interleave(len(rows))
        self.mask, self.fed = ones.expand(len(rows), -1), [len(shared)] * len(rows)

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
        kwargs = {"chat": not is_tiny(args.model), **json.loads(args.env_kwargs)}
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
            new = [0.0 if position in turn.forced else next(sampled)
                   for position in range(len(turn.token_ids))]
            if math.isnan(turn.gap):  # leaves of a tree share turns: the first time counts
                turn.gap = sum(abs(x - y) for x, y in zip(new, turn.logprobs, strict=True))
            turn.logprobs = new


# === 2. Evaluation ===============================================================================
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
