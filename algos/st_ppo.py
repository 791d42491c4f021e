"""ST-PPO: one clipped ratio per turn, and gradients divided by what the clipping took from them.

Paper: "ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training",
arXiv 2511.20718v1 (v2 has another title). Its abstracts, three public reviews that quote equations
7 and 8, and two summaries (equation 4, lemma 4.2) were read; the body and the code were not
available. A reconstruction.

    Eq. 1  w_t = exp(l_t)                            l_t = log pi(token t) - log pi_old(token t)
    Eq. 2  w_k = exp(mean of l_t over the tokens of turn k), the same for all of them          [4]
    Eq. 3  J = mean min(w A_t, clip(w, 1 - epsilon, 1 + epsilon) A_t)
    Eq. 4  token t binds if A_t > 0 and w > 1 + epsilon, or A_t < 0 and w < 1 - epsilon
    Eq. 5  C = gradient of the mean of w A_t over the tokens that bind, 0 for the others
    Eq. 6  grad J = (gradient of the mean of w A_t) - C
    Eq. 7  step along s grad J, s = 1 / max(1, |C|)   (s_ppo, st_ppo)      [7 to 9 divide by |C|]
    Eq. 8  A_t = R_t + discount V_{t+} - V_t + discount gae_lambda A_{t+}, then whitened
    Eq. 9  L_critic = 1/2 mean_t max((V - V_target)^2, (clip(V, V_old +- 0.5) - V_target)^2)

    --variant      ppo: Eq. 1     turn_ppo: Eq. 2     s_ppo: Eq. 1 and 7     st_ppo: Eq. 2 and 7

    l  log_ratio (B, T)    w  exp(pooled_log_ratio)    V  values (B, T)    C  clip_bias    s  scale
    R_t  the turn's reward on its last token, else 0    V_target  A + V before whitening
    t+   the next sampled token: observations are skipped     |C|  Euclidean, over all parameters
    [n]  equation of the paper, as quoted

Changed from ufo.py (--advantage gae)
    - an environment's own rewards, each at the last token of its turn
    - the ratio may be that of a turn, and the gradient is scaled (Eq. 2, 7)
    - batches may be used many times and late: --num-epochs, --num-minibatches, --staleness

Deviations and choices
    D1  Eq. 7 where |C| < 1, or nothing binds: open in the sources. --clip-bias-scale triggered
        (1 / |C| if a token binds), literal (1 / (|C| + 1e-8)), relative (1 - clip_bias_share).
    D2  Adam largely undoes a constant factor on the gradient, and --max-grad-norm any factor
        where s |grad J| is still above it: --scale-target step multiplies the step instead.
    D3  Eq. 2 is the geometric mean; --turn-ratio has the other readings.
    D4  A time limit ends the task by default (V = 0 after it); --bootstrap-truncated adds the
        critic's value of going on. No KL and no entropy term.
    D5  The mean in Eq. 3 is over the tokens of an episode, then over episodes, in all variants
        (--aggregation token_mean: over tokens, as in public PPO code).
    D6  --target-kl ends the passes over a batch early. Off by default.

    python algos/st_ppo.py        about 1.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch._functorch.config
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from policies import load_policy
from run_folder import Run
from utils import (
    DRAW, Policy, RunArgs, all_gather, all_reduce_sum, collate, collect_groups, evaluate, make_envs,
    micro_batches, optimizer_step, random_stream, rank, select_rows, stop, token_logprobs,
    turn_table, world_size,
)

Variant = Literal["ppo", "turn_ppo", "s_ppo", "st_ppo"]
TurnRatio = Literal["geometric", "arithmetic", "product", "geometric_stop_gradient"]
Scale = Literal["at_most_one", "triggered", "literal", "relative"]


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ToolDesk-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 64  # environment seeds per iteration
    group_size: int = 1  # episodes that start from the same seed (none are compared here)
    learning_rate: float = 1e-3  # of AdamW, constant
    num_iterations: int = 30  # iterations of: collect episodes, update
    max_turn_tokens: int = 6  # tokens the policy may sample in one turn
    warm_start_steps: int = 400  # behaviour cloning steps of the tiny model before training
    warm_start_learning_rate: float = 2e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.1  # standard deviation of the tiny model's first weights
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    variant: Variant = "st_ppo"  # turn ratio (Eq. 2) if it has a t, scaled (Eq. 7) if it has an s
    turn_ratio: TurnRatio = "geometric"  # Eq. 2 of turn_ppo and st_ppo, or another pooling
    clip_epsilon: float = 0.2  # clipping of the ratio to both sides, Eq. 3
    clip_bias_scale: Scale = "at_most_one"  # how s is made from the norm of C, Eq. 7 and D1
    scale_target: Literal["gradient", "step"] = "gradient"  # what s multiplies, D2
    aggregation: Literal["sequence_mean", "sequence_sum", "token_mean"] = "sequence_mean"  # Eq. 3
    discount: float = 1.0  # per sampled token, Eq. 8
    gae_lambda: float = 1.0  # weight of later residuals, lambda in Eq. 8
    bootstrap_truncated: bool = False  # add the value of going on where a time limit cut
    critic_learning_rate: float = 1e-3  # of the critic's AdamW
    num_epochs: int = 1  # passes over a batch, each in new random minibatches
    num_minibatches: int = 2  # optimizer steps per pass
    target_kl: float | None = None  # no further pass over a batch above this approx_kl; default off
    staleness: int = 0  # train on the batch of so many iterations ago


VALUE_CLIP = 0.5  # in Eq. 9
SUMS = ("loss", "value_loss", "entropy", "clip_fraction", "out_of_range", "approx_kl_k1",
        "approx_kl", "ratio", "ratio_squared", "turns", "clip_fraction_turn")  # over an update


# === 3. Advantages ===============================================================================
@torch.no_grad()
def place_turn_rewards(turn_rewards: Tensor, turn_id: Tensor) -> Tensor:
    """R_t: the reward of every turn on its last sampled token. Eq. 8

    turn_rewards (B, K), turn_id (B, T) -> (B, T), 0 where turn_id is -1. A sampled token gets the
    rewards of all turns from its own up to that of the next one, so that a last column, for what
    comes after the last turn, lands on the last sampled token.
    """
    mask, width = turn_id >= 0, turn_rewards.shape[1]
    later = torch.where(mask, turn_id, width).flip(1).cummin(1).values.flip(1)  # (B, T)
    following = torch.nn.functional.pad(later[:, 1:], (0, 1), value=width)  # next token's turn
    totals = torch.nn.functional.pad(turn_rewards.cumsum(1), (1, 0))  # (B, K + 1)
    rewards = totals.gather(1, following) - totals.gather(1, turn_id.clamp(min=0))
    return torch.where(mask, rewards, 0.0)


@torch.no_grad()
def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0,
                   gae_lambda: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the sampled tokens only, and what V should be. Eq. 8

    rewards, values (B, T), mask (B, T) bool -> two (B, T), 0 off the mask
    """
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantages[:, t] = torch.where(here, delta + discount * gae_lambda * next_advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)  # what was not sampled is skipped
        next_advantage = torch.where(here, advantages[:, t], next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


@torch.no_grad()
def whiten(advantages: Tensor) -> Tensor:
    """Mean 0 and (unbiased) variance 1 over all sampled tokens of the batch. After Eq. 8

    advantages (N,) of the sampled tokens -> (N,); a single one becomes 0
    """
    centred = advantages - advantages.mean()
    variance = advantages.var(correction=1) if len(advantages) > 1 else torch.ones(())
    return centred / (variance + 1e-8).sqrt()


# === 4. Loss =====================================================================================
def pooled_log_ratio(log_ratio: Tensor, turn_id: Tensor, pooling: str) -> Tensor:
    """The logarithm of the ratio w that every token is weighted with. Eq. 1, 2

    log_ratio, turn_id (B, T) -> (B, T), 0 where turn_id is -1. token: its own; geometric,
    arithmetic: mean over its turn of l, or of exp(l); product: sum of l; geometric_stop_gradient:
    the value of geometric with the gradient of token.
    """
    log_ratio = torch.where(turn_id >= 0, log_ratio, 0.0).clamp(-20, 20)
    if pooling == "token":
        return log_ratio
    if pooling == "geometric_stop_gradient":
        geometric = pooled_log_ratio(log_ratio, turn_id, "geometric").detach()
        return geometric + log_ratio - log_ratio.detach()
    index = turn_id + 1  # column 0 takes what was not sampled
    zeros = log_ratio.new_zeros(len(index), int(index.max()) + 1)  # (B, K + 1)
    terms = log_ratio.exp() if pooling == "arithmetic" else log_ratio
    pooled = zeros.scatter_add(1, index, terms)
    if pooling != "product":
        pooled = pooled / zeros.scatter_add(1, index, torch.ones_like(terms)).clamp(min=1)
    pooled = pooled.gather(1, index).log() if pooling == "arithmetic" else pooled.gather(1, index)
    return torch.where(turn_id >= 0, pooled.clamp(-20, 20), 0.0)


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
                      dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate of every token, to be maximised. Eq. 3

    log_ratio (B, T) = new - old log-probs, advantages (B, T) -> (B, T)
    """
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    return objective


@torch.no_grad()
def binding_clip(log_ratio: Tensor, advantages: Tensor, clip_low: float,
                 clip_high: float) -> Tensor:
    """Where the clipping stops the gradient; never where the advantage is 0. Eq. 4

    log_ratio, advantages (B, T) -> (B, T) bool
    """
    return ((advantages > 0) & (log_ratio > np.log1p(clip_high))) | (
        (advantages < 0) & (log_ratio < np.log1p(-clip_low)))


@torch.no_grad()
def loss_weights(turn_id: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """Weight of every token in Eq. 3, and what the weighted sum is divided by.

    turn_id (B, T), a row per episode -> (B, T), (). token_mean: all tokens alike; sequence_mean:
    mean over a row's tokens, then over rows; sequence_sum: sum over a row's, mean over rows
    """
    mask = turn_id >= 0
    if aggregation == "token_mean":
        return mask.float(), mask.sum()
    tokens = mask.sum(1, keepdim=True).clamp(min=1) if aggregation == "sequence_mean" else 1
    return mask / tokens, mask.any(1).sum()


def surrogate_and_clip_bias(log_ratio: Tensor, advantages: Tensor, weights: Tensor,
                            clip_epsilon: float) -> tuple[Tensor, Tensor]:
    """J, and the scalar whose gradient is the clip bias C. Eq. 3, 5

    log_ratio (pooled), advantages, weights (B, T) -> two scalars; Eq. 6 holds for their gradients
    """
    binding = binding_clip(log_ratio, advantages, clip_epsilon, clip_epsilon)
    objective = clipped_objective(log_ratio, advantages, clip_epsilon, clip_epsilon)
    removed = torch.where(binding, log_ratio.clamp(-20, 20).exp() * advantages, 0.0)
    return (weights * objective).sum(), (weights * removed).sum()


def clip_bias_scale(clip_bias_norm: float, full_gradient_norm: float, any_binding: bool,
                    mode: str = "at_most_one") -> float:
    """The factor s of an optimizer step, from the norms of C and of grad J + C. Eq. 7, D1"""
    if mode == "literal":
        return 1 / (clip_bias_norm + 1e-8)
    if not any_binding or clip_bias_norm == 0:
        return 1.0
    return {"at_most_one": 1 / max(1.0, clip_bias_norm), "triggered": 1 / clip_bias_norm,
            "relative": full_gradient_norm / (full_gradient_norm + clip_bias_norm)}[mode]


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor,
               value_clip: float = VALUE_CLIP) -> Tensor:
    """Half the squared error, the larger of clipped and unclipped values. Eq. 9

    values, old_values, returns, weights (B, T) -> scalar; weights sum to 1 over the step
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (weights * errors).sum()


# === 5. The critic, the queue and the metrics ====================================================
class Critic(torch.nn.Module):
    """A copy of the policy's network with a number instead of token scores at its end."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy, self.trunk = policy, copy.deepcopy(policy.model.base_model)
        self.head = torch.nn.Linear(policy.model.config.hidden_size, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight), torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The value (B, T) before every sampled token, from what stands before it; 0 elsewhere."""
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.policy.bf16):
            hidden = self.trunk(batch["tokens"], use_cache=False).last_hidden_state  # (B, T, D)
        before = self.head(hidden[:, :-1].float())[:, :, 0]  # (B, T - 1), not rounded to bf16
        values = torch.nn.functional.pad(before, (1, 0))
        return torch.where(batch["turn_id"] >= 0, values, 0.0)


@torch.no_grad()
def batch_values(critic: Critic, batch: dict[str, Tensor], args: Args) -> Tensor:
    """The critic's values of a batch of any size, without gradient: (B, T)."""
    values = torch.zeros_like(batch["old_logprobs"])
    numbered = batch | {"row": torch.arange(len(values), device=values.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[part["row"], : part["tokens"].shape[1]] = critic(part)
    return values


def after_truncation(policy: Policy, episodes: list[Episode]) -> list[Episode]:
    """For every episode a row that ends in one made-up token after the prompt of its next turn.

    The critic's value there is what going on is worth. An episode that no time limit cut gets
    the token alone: its value is 0.
    """
    rows = []
    for e in episodes:
        goes_on = e.truncated and not e.overflowed  # a full context has no next prompt
        ids = e.row() + policy.prompt(e, None)[0] if goes_on else []
        turn = Turn("", "", prompt_ids=ids[: policy.context_length - 1],
                    token_ids=[policy.end_id], logprobs=[0.0])
        rows.append(Episode(e.seed, "", turns=[turn]))
    return rows


class BatchQueue:
    """The batches not yet trained on, oldest first; part of the checkpoint."""

    def __init__(self, device: torch.device):
        self.batches: list[dict[str, dict[str, Tensor]]] = []
        self.device = device

    def state_dict(self) -> dict:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict):  # which was read to the CPU
        self.batches = [{name: {key: x.to(self.device) for key, x in part.items()}
                         for name, part in waiting.items()} for waiting in state["batches"]]


@torch.no_grad()
def ratio_sums(log_ratio: Tensor, pooled: Tensor, advantages: Tensor, turn_id: Tensor,
               weights: Tensor, clip_epsilon: float) -> dict[str, Tensor]:
    """What is logged about the ratios: token means as weighted sums; numbers of turns.

    log_ratio (of the tokens), pooled (log w), advantages, turn_id, weights (B, T) -> name: ()
    """
    binding = binding_clip(pooled, advantages, clip_epsilon, clip_epsilon)
    turns = torch.zeros(2, len(turn_id), int(turn_id.max()) + 2, device=turn_id.device)
    turns = turns.scatter_reduce(2, (turn_id + 1).expand(2, -1, -1),
                                 torch.stack([turn_id >= 0, binding]).float(), "amax").sum((1, 2))
    out_of_range = (pooled > np.log1p(clip_epsilon)) | (pooled < np.log1p(-clip_epsilon))
    means = {"clip_fraction": binding, "out_of_range": out_of_range, "approx_kl_k1": -log_ratio,
             "approx_kl": log_ratio.exp() - 1 - log_ratio, "ratio": pooled.exp(),
             "ratio_squared": (2 * pooled).exp()}
    return {name: (weights * values).sum() for name, values in means.items()} | {
        "turns": turns[0], "clip_fraction_turn": turns[1]}


# === 6. Update ===================================================================================
def update(policy: Policy, critic: Critic, optimizer: torch.optim.Optimizer,
           critic_optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step of the policy and one of the critic on one minibatch."""
    mask = batch["turn_id"] >= 0
    weights, count = loss_weights(batch["turn_id"], args.aggregation)
    batch["weights"] = weights / all_reduce_sum(count).clamp(min=1)  # the only normalisation
    batch["value_weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)
    pooling = args.turn_ratio if args.variant in ("turn_ppo", "st_ppo") else "token"
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    gradient, clip_bias = torch.zeros(2, sum(p.numel() for p in parameters), device=policy.device)
    sums, largest = torch.zeros(len(SUMS), device=policy.device), 0.0
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        log_ratio = torch.where(rows["turn_id"] >= 0, logprobs - rows["old_logprobs"], 0.0)
        pooled = pooled_log_ratio(log_ratio, rows["turn_id"], pooling)
        objective, removed = surrogate_and_clip_bias(pooled, rows["advantages"], rows["weights"],
                                                     args.clip_epsilon)
        stats = ratio_sums(log_ratio, pooled, rows["advantages"], rows["turn_id"],
                           rows["value_weights"], args.clip_epsilon)
        if stats["clip_fraction"] > 0:  # else C is 0
            parts = torch.autograd.grad(removed, parameters, retain_graph=True)
            clip_bias += torch.cat([x.flatten() for x in parts])
        gradient += torch.cat([x.flatten() for x in torch.autograd.grad(objective, parameters)])
        error = value_loss(critic(rows), rows["values"], rows["returns"], rows["value_weights"])
        error.backward()
        stats |= {"loss": -objective.detach(), "value_loss": error.detach(),
                  "entropy": (rows["value_weights"] * entropy).sum().detach()}
        sums += torch.stack([stats[name] for name in SUMS])
        largest = max(largest, log_ratio.abs().max().item())
    largest = all_gather(torch.tensor([largest])).max().item()
    metrics = dict(zip(SUMS, all_reduce_sum(sums).tolist(), strict=True))
    gradient, clip_bias = all_reduce_sum(gradient), all_reduce_sum(clip_bias)  # norms do not add up
    bias_norm, full_norm = clip_bias.norm().item(), (gradient + clip_bias).norm().item()
    scale = 1.0
    if args.variant in ("s_ppo", "st_ppo"):
        scale = clip_bias_scale(bias_norm, full_norm, metrics["clip_fraction"] > 0,
                                args.clip_bias_scale)
    optimizer.param_groups[0]["lr"] = args.learning_rate * (
        scale if args.scale_target == "step" else 1)
    gradient *= -(scale if args.scale_target == "gradient" else 1)
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    optimizer_step(critic, critic_optimizer, args.max_grad_norm)
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm, processes=1)
    metrics["clip_fraction_turn"] /= max(metrics.pop("turns"), 1)
    squared = max(metrics.pop("ratio_squared"), 1e-12)
    return metrics | {
        "effective_sample_size": metrics.pop("ratio") ** 2 / squared, "log_ratio_max": largest,
        "clip_bias_norm": bias_norm, "full_gradient_norm": full_norm,
        "clip_bias_share": bias_norm / max(bias_norm + full_norm, 1e-12),
        "gradient_scale": scale, "scaled_steps": float(scale != 1), "grad_norm": norm,
        "grad_clipped": float(norm > args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.staleness and world_size() > 1:
        stop("--staleness needs a single process: a checkpoint holds one queue of batches")
    if args.scale_target == "step" and args.clip_bias_scale in ("triggered", "literal"):
        stop(f"--clip-bias-scale {args.clip_bias_scale} has no upper bound: a learning rate "
             "(--scale-target step) cannot be multiplied by it")
    with Run(args, "st_ppo") as run:
        num_episodes = args.num_prompts * args.group_size  # E over all processes
        if args.num_minibatches > num_episodes:
            stop(f"--num-minibatches {args.num_minibatches}: there are {num_episodes} episodes")
        envs = make_envs(args, num_episodes // world_size())
        policy = load_policy(args)
        if args.compile:  # its graphs are walked back twice, for C and for J
            torch._functorch.config.donated_buffer = False
        critic = Critic(policy)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate,
                                             weight_decay=0)
        queue = BatchQueue(policy.device)
        state = {"optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer,
                 "queue": queue}
        run.restore(policy, **state)

        def evaluation():
            return evaluate(policy, run.eval_envs, args)

        for iteration in run.iterations(policy, evaluation, **state):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score: the environment's rewards; what was collected waits for its turn
            rewards, _ = turn_table(episodes, lambda turn: turn.reward, policy.device)  # (E, K)
            batch = collate(episodes, policy.device)
            batch["turn_rewards"] = rewards[batch["episode_id"]]  # (B, K)
            queue.batches.append({"batch": batch})
            if args.bootstrap_truncated:
                queue.batches[-1]["after"] = collate(after_truncation(policy, episodes),
                                                     policy.device)
            if len(queue.batches) <= args.staleness:
                run.log(iteration, episodes, {}, [])
                continue
            oldest = queue.batches.pop(0)
            batch = oldest["batch"]
            mask, episode_id = batch["turn_id"] >= 0, batch["episode_id"]

            # 3. advantages (B, T)
            turn_rewards = batch.pop("turn_rewards")
            batch["values"] = batch_values(critic, batch, args)
            if args.bootstrap_truncated:  # one more column, for after the last turn
                final_values = batch_values(critic, oldest["after"], args).sum(1)[episode_id]
                turn_rewards = torch.cat([turn_rewards, args.discount * final_values[:, None]], 1)
            rewards = place_turn_rewards(turn_rewards, batch["turn_id"])
            advantages, batch["returns"] = gae_advantages(rewards, batch["values"], mask,
                                                          args.discount, args.gae_lambda)
            raw, returns = all_gather(advantages[mask]), all_gather(batch["returns"][mask])
            shares = all_gather(mask.sum()[None]).tolist()
            white = whiten(raw).split(shares)[rank()]
            batch["advantages"] = advantages.masked_scatter(mask, white)

            # 4. update; an episode is never split
            updates = []
            for epoch in range(args.num_epochs):
                numbers = random_stream(args.seed, DRAW, iteration, epoch).permutation(
                    num_episodes).reshape(world_size(), -1)[rank()]  # (E,) in a random order
                part = torch.tensor(numbers % args.num_minibatches, device=policy.device)
                for minibatch in range(args.num_minibatches):
                    rows = select_rows(batch, (part[episode_id] == minibatch).nonzero()[:, 0])
                    updates.append(update(policy, critic, optimizer, critic_optimizer, rows, args))
                if args.target_kl is not None and updates[-1]["approx_kl"] > args.target_kl:
                    break

            # 5. log (evaluation and checkpoints: run.iterations)
            metrics = {"clip_bias_norm_max": max(u["clip_bias_norm"] for u in updates),
                       "log_ratio_max": max(u["log_ratio_max"] for u in updates),
                       "first_log_ratio_max": updates[0]["log_ratio_max"],
                       "advantage_mean": raw.mean().item(), "advantage_std": raw.std().item(),
                       "return_std": returns.std().item(),
                       "explained_variance": (1 - raw.var() / returns.var()).item()
                       if returns.var() > 1e-4 else 0.0}
            run.log(iteration, episodes, metrics, updates, batch)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
