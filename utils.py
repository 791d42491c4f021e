"""Everything the scripts share that is not an algorithm.

Axes, the same in every file: E episodes, K turns, B rows of tokens, T tokens, G group size,
V vocabulary. turn_id (B, T) says which turn sampled a token and is -1 on every token the policy
did not sample (observations, chat markup, forced tokens, padding): mask = turn_id >= 0.

1 Flags     2 Processes and random streams     3 Batches and log-probs     4 Updates
(playing episodes: rollouts.py; the policy: policies.py; run folders and logs: run_folder.py)
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from envs.episodes import Episode, Turn

if TYPE_CHECKING:
    from policies import Policy


# === 1. Flags ====================================================================================
@dataclasses.dataclass
class RunArgs:
    """The flags that all scripts share."""

    seed: int = 1  # seed of everything random in the run: model, instances, sampling
    env_id: str = "turnrl/FrozenLake-v0"  # gymnasium id; module:Id-v0 imports the module first
    env_kwargs: str = "{}"  # arguments of the environment as JSON, e.g. '{"max_turns": 15}'
    model: str = "tiny"  # tiny, or a folder or hub id of a chat model (with defaults of its own)
    template_kwargs: str = "{}"  # of its chat template as JSON, e.g. '{"enable_thinking": false}'
    lora_rank: int | None = None  # train adapters of this rank (needs peft), not all weights
    context_length: int | None = None  # most tokens of a row; default: what the model's config says
    device: str = "cpu"  # torch device: cpu, cuda, cuda:1
    num_iterations: int = 60  # iterations of: collect episodes, update
    max_generated_tokens: int | None = None  # stop after the iteration that reaches so many
    num_prompts: int = 16  # environment seeds (groups) per iteration
    group_size: int = 8  # episodes that start from the same seed, G
    max_turns: int = 8  # turns after which an episode is truncated, K
    max_turn_tokens: int = 8  # tokens the policy may sample in one turn
    temperature: float = 1.0  # sampling temperature of the training episodes
    learning_rate: float = 3e-4  # of AdamW, constant
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    micro_batch_tokens: int = 4096  # tokens per forward pass of an update: memory, not results
    warm_start_steps: int | None = None  # of imitation before training; with a chat model 0
    warm_start_episodes: int | None = None  # of the player that is imitated; default: 2048
    warm_start_learning_rate: float = 2e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.1  # standard deviation of the tiny model's first weights
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
    tiny_steps: ClassVar[int] = 300  # of the warm start, where the tiny model is trained


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


# === 3. Batches and log-probs ====================================================================
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


def join_rows(x: Tensor, episode_id: Tensor) -> Tensor:
    """The rows of an episode, one after the other, as one row, padded with -1.

    x (B, T), episode_id (B,) -> (E, longest)

    >>> join_rows(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([0, 0, 1]))
    tensor([[ 1,  2,  3,  4],
            [ 5,  6, -1, -1]])
    """
    rows = [x[episode_id == episode].flatten() for episode in episode_id.unique()]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


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
def token_numbers(call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], count: int,
                  batch: dict[str, Tensor], args: RunArgs) -> Tensor:
    """The `count` (B, T) that call(rows) gives, of a batch of any size, without gradient."""
    values = torch.zeros(count, *batch["tokens"].shape, device=batch["tokens"].device)
    numbered = batch | {"row": torch.arange(len(batch["tokens"]), device=values.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):  # in another order of rows
        here = torch.stack(call(part))
        values[:, part["row"], : here.shape[2]] = here
    return values


def batch_logprobs(policy: Policy, batch: dict[str, Tensor],
                   args: RunArgs) -> tuple[Tensor, Tensor]:
    """token_logprobs of a batch of any size, without gradient: two (B, T)."""
    return token_numbers(lambda rows: token_logprobs(policy, rows, args.temperature), 2,
                         batch, args).unbind()


def token_entropy(logits: Tensor) -> Tensor:
    """logits (.., V), -inf allowed -> entropy (..) in nats, differentiable.

    >>> token_entropy(torch.tensor([0.0, 0.0, -math.inf]))  # two equal choices: ln 2
    tensor(0.6931)
    """
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)


# === 4. Updates ==================================================================================
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


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's correlation: that of the ranks; equal numbers share the mean of their ranks.

    x, y (N,) -> -1 to 1; NaN if all of one are the same

    >>> x, y = torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    >>> round(rank_correlation(x, y), 4)  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)
    0.9487
    """
    centred = []
    for values in (x, y):
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
        centred.append(ranks - ranks.mean())
    one, other = centred
    return ((one * other).sum() / (one.norm() * other.norm())).item()


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
