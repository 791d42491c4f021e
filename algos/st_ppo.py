"""ST-PPO: PPO with one ratio per turn, and a gradient divided by the norm of what clipping removed.

Paper: "ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training",
arXiv 2511.20718v1. Its body and code were not available: this is a reconstruction from its
abstract, reviews and summaries. [n] is equation n of the paper, as these quote it.

    Eq. 1  w_t = exp(l_t)                                                        (ppo, s_ppo)
    Eq. 2  w_t = exp(mean of l over the tokens of t's turn)            [4]       (turn_ppo, st_ppo)
    Eq. 3  J = mean_t min(w_t A_t, clip(w_t, 1 - clip_low, 1 + clip_high) A_t)
    Eq. 4  token t binds if A_t > 0 and w_t > 1 + clip_high, or A_t < 0 and w_t < 1 - clip_low
    Eq. 5  C = grad mean_t (w_t A_t if token t binds, else 0)          the clip bias
    Eq. 6  grad J = grad mean_t (w_t A_t) - C     a binding token's own term is flat, not its turn's
    Eq. 7  a step on s grad J, s = 1 / max(1, |C|)  [7 to 9: 1 / |C|]  (s_ppo, st_ppo; else s = 1)
    Eq. 8  A_t = R_t + discount V_next - V_t + discount gae_lambda A_next, whitened once per batch
    Eq. 9  L_critic = 1/2 mean_t max((V - V_target)^2, (clip(V, V_old +- 0.5) - V_target)^2)

    t  a sampled token; next: the next one of the episode, in the same turn or a later one, else 0
    l  log_ratio (B, T), log pi - log pi_old     pi_old  the policy that sampled, however long ago
    R  a turn's reward on its last token, else 0     V  value of all tokens before t (B, T)
    V_old  V before the first pass, also in Eq. 8    V_target  A + V_old (returns), A not whitened

Changed from igpo.py (a row is a whole episode, B = E; with --history-turns it is a turn)
    - a critic; advantages per token; one ratio per turn; scaled gradients; many passes, old batches

Deviations and choices
    D1  --scale at_most_one is Eq. 7, triggered the paper's 1 / |C|. Where no token binds, s = 1:
        nearly always with the default flags.
    D2  Adam and max_grad_norm may undo s. --scale step puts the default's s on the learning rate;
        --sgd does without Adam.
    D3  A time limit ends the task: V_next = 0 after it. There is no KL and no entropy term.
    D4  mean_t, in a minibatch: over the tokens of a row, then over rows; in Eq. 9 over all.

    python algos/st_ppo.py        about 1.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from policies import Policy, load_policy, parse_args, twin
from rollouts import collect_groups, make_envs
from run_folder import Run
from utils import (
    DRAW, RunArgs, all_gather, all_reduce_sum, collate, join_rows, micro_batches, optimizer_step,
    over_processes, random_stream, rank, select_rows, stop, token_logprobs, token_numbers,
    turn_table, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ToolDesk-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 64  # environment seeds per iteration
    group_size: int = 1  # episodes that start from the same seed (none are compared here)
    learning_rate: float = 1e-3  # of AdamW, constant
    num_iterations: int = 30  # iterations of: collect episodes, update
    max_turn_tokens: int = 6  # tokens the policy may sample in one turn
    tiny_steps: ClassVar[int] = 400  # of the warm start, where the tiny model is trained
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    variant: Literal["ppo", "turn_ppo", "s_ppo", "st_ppo"] = "st_ppo"  # in brackets: Eq. 1, 2, 7
    # s of s_ppo and st_ppo, Eq. 7: triggered is the paper's (D1); step: on the learning rate (D2)
    scale: Literal["at_most_one", "triggered", "step"] = "at_most_one"
    sgd: bool = False  # plain SGD instead of AdamW for the policy, so that Adam cannot undo s (D2)
    clip_low: float = 0.2  # clipping of the ratio from below, Eq. 3
    clip_high: float = 0.2  # clipping of the ratio from above, Eq. 3
    discount: float = 1.0  # per sampled token, Eq. 8
    gae_lambda: float = 1.0  # weight of later residuals, lambda in Eq. 8
    critic_learning_rate: float = 1e-3  # of the critic's AdamW
    num_epochs: int = 1  # passes over a batch, each in new random minibatches
    num_minibatches: int = 2  # optimizer steps per pass
    target_kl: float | None = None  # no further pass if the last minibatch had a larger approx_kl
    staleness: int = 0  # train on the batch of so many iterations ago
    history_turns: int | None = None  # earlier turns the policy sees; None: all, as one growing row
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"staleness", "history_turns"}
    chat_defaults: ClassVar = RunArgs.chat_defaults | {"num_prompts": 64,
                                                       "critic_learning_rate": 5e-5}


# === 3. Advantages ===============================================================================
@torch.no_grad()
def place_turn_rewards(turn_rewards: Tensor, turn_id: Tensor) -> Tensor:
    """R_t: the reward of every turn on its last sampled token, 0 on all others. Eq. 8

    turn_rewards (B, K), turn_id (B, T) -> (B, T); the tokens of a turn stand next to each other

    >>> place_turn_rewards(torch.tensor([[1.0, 5.0]]), torch.tensor([[-1, 0, 0, -1, 1]]))
    tensor([[0., 0., 1., 0., 5.]])
    """
    following = torch.nn.functional.pad(turn_id[:, 1:], (0, 1), value=-1)  # the next token's turn
    last = (turn_id >= 0) & (turn_id != following)
    return torch.where(last, turn_rewards.float().gather(1, turn_id.clamp(min=0)), 0.0)


@torch.no_grad()
def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, discount: float,
                   gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates A over the sampled tokens, and the targets A + V. Eq. 8

    rewards, values (B, T), mask (B, T) bool -> two (B, T), 0 off the mask

    >>> mask = torch.tensor([[True, False, True]])  # 1 - 0.25, then 0.25 - 0.5 + 0.5 * 0.75
    >>> gae_advantages(torch.tensor([[0, 0, 1.0]]), torch.tensor([[0.5, 9, 0.25]]), mask, 1, 0.5)[0]
    tensor([[0.1250, 0.0000, 0.7500]])
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
def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and variance 1 over the sampled tokens of all processes. After Eq. 8

    advantages (B, T), mask (B, T) bool -> (B, T), 0 off the mask

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))  # variance 2
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    pool = all_gather(advantages[mask])
    variance = pool.var() if len(pool) > 1 else torch.ones(())
    return torch.where(mask, (advantages - pool.mean()) / (variance + 1e-8).sqrt(), 0.0)


# === 4. Loss =====================================================================================
def turn_log_ratio(log_ratio: Tensor, turn_id: Tensor) -> Tensor:
    """The mean log-ratio of a token's turn; its gradient reaches all tokens of the turn. Eq. 2

    log_ratio, turn_id (B, T) -> (B, T), 0 where turn_id is -1

    >>> turn_log_ratio(torch.tensor([[0.1, 0.3, 0.0, 0.4]]), torch.tensor([[0, 0, -1, 1]]))
    tensor([[0.2000, 0.2000, 0.0000, 0.4000]])
    """
    index = turn_id + 1  # column 0 takes what was not sampled
    zeros = log_ratio.new_zeros(len(index), int(index.max()) + 1)  # (B, K + 1)
    means = zeros.scatter_reduce(1, index, log_ratio, "mean", include_self=False)
    return torch.where(turn_id >= 0, means.gather(1, index), 0.0)


def surrogate_and_clip_bias(log_ratio: Tensor, advantages: Tensor, weights: Tensor, clip_low: float,
                            clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """J, a scalar whose gradient is the clip bias C, and which tokens bind. Eq. 3, 4, 5

    log_ratio (of turns in turn_ppo, st_ppo), advantages, weights (B, T) -> (), (), (B, T) bool

    >>> log_ratio, advantages = torch.tensor([[1.5, 1.5]]).log(), torch.tensor([[1.0, -1.0]])
    >>> surrogate_and_clip_bias(log_ratio, advantages, torch.ones(1, 2), 0.2, 0.2)  # 1.2 - 1.5, 1.5
    (tensor(-0.3000), tensor(1.5000), tensor([[ True, False]]))
    """
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    binding = clipped * advantages < ratio * advantages
    objective = torch.where(binding, clipped * advantages, ratio * advantages)
    removed = torch.where(binding, ratio * advantages, 0.0)
    return (weights * objective).sum(), (weights * removed).sum(), binding


def gradient_scale(bias_norm: float, scale: str) -> float:
    """The factor s of a step, from |C|. Eq. 7, D1

    >>> [gradient_scale(norm, "at_most_one") for norm in (0.25, 4.0)]
    [1.0, 0.25]
    >>> [gradient_scale(norm, "triggered") for norm in (0.0, 0.25, 4.0)]
    [1.0, 4.0, 0.25]
    """
    if bias_norm == 0:
        return 1.0
    return 1 / bias_norm if scale == "triggered" else 1 / max(1.0, bias_norm)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Half the squared error of the critic: the larger of clipped and unclipped. Eq. 9

    values, old_values, returns, weights (B, T) -> scalar; weights sum to 1 over the step

    >>> one = torch.ones(1, 1)  # a value that went from 0 to 1 counts as 0.5; its target is 2
    >>> value_loss(one, 0 * one, 2 * one, one)
    tensor(1.1250)
    """
    clipped = old_values + (values - old_values).clamp(-0.5, 0.5)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (weights * errors).sum()


# === 5. The critic ===============================================================================
class Critic(torch.nn.Module):
    """A copy of the policy's network, with weights of its own, that ends in one number, first 0."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy, self.trunk = policy, twin(policy.model.base_model)
        width = policy.model.get_output_embeddings().in_features  # D, what the trunk gives out
        self.head = torch.nn.Linear(width, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Entry t: the value of tokens[< t], (B, T), 0 where t was not sampled; fp32 head."""
        with self.policy.autocast():
            hidden = self.trunk(batch["tokens"], use_cache=False).last_hidden_state  # (B, T, D)
        values = torch.nn.functional.pad(self.head(hidden[:, :-1].float())[:, :, 0], (1, 0))
        return torch.where(batch["turn_id"] >= 0, values, 0.0)


# === 6. Update ===================================================================================
def update(policy: Policy, critic: Critic, optimizer: torch.optim.Optimizer,
           critic_optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step of the policy, Eq. 7, and one of the critic, also to max_grad_norm."""
    mask, of_turns = batch["turn_id"] >= 0, args.variant in ("turn_ppo", "st_ppo")
    batch["token_weights"] = mask / all_reduce_sum(mask.sum()).clamp(min=1)  # mean over all: Eq. 9
    batch["weights"] = mask / mask.sum(1, keepdim=True).clamp(min=1)  # mean over tokens of a row,
    batch["weights"] /= all_reduce_sum(mask.any(1).sum()).clamp(min=1)  # then over rows: Eq. 3, 5
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    gradient, clip_bias = torch.zeros(2, sum(p.numel() for p in parameters), device=policy.device)
    sums = dict.fromkeys(("loss", "value_loss", "entropy", "clip_fraction", "approx_kl"), 0.0)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        log_ratio = torch.where(rows["turn_id"] >= 0, logprobs - rows["old_logprobs"], 0.0)
        pooled = turn_log_ratio(log_ratio, rows["turn_id"]) if of_turns else log_ratio
        objective, removed, binding = surrogate_and_clip_bias(
            pooled, rows["advantages"], rows["weights"], args.clip_low, args.clip_high)
        if binding.any():  # otherwise C is 0
            parts = torch.autograd.grad(removed, parameters, retain_graph=True)  # C, Eq. 5
            clip_bias += torch.cat([x.flatten() for x in parts])
        parts = torch.autograd.grad(objective, parameters)  # grad J, Eq. 3
        gradient += torch.cat([x.flatten() for x in parts])
        error = value_loss(critic(rows), rows["old_values"], rows["returns"], rows["token_weights"])
        error.backward()
        means = {"entropy": entropy, "clip_fraction": binding,  # over all tokens, as in Eq. 9
                 "approx_kl": log_ratio.exp() - 1 - log_ratio}  # KL(old || new), k3 from old
        means = {name: (rows["token_weights"] * x).sum() for name, x in means.items()}
        means |= {"loss": -objective, "value_loss": error}
        sums = {name: sums[name] + means[name].detach() for name in sums}
    gradient, clip_bias = all_reduce_sum(gradient), all_reduce_sum(clip_bias)  # before their norms
    scaled, on_step = args.variant in ("s_ppo", "st_ppo"), args.scale == "step"
    bias_norm = clip_bias.norm().item()
    scale = gradient_scale(bias_norm, args.scale) if scaled else 1.0  # s, Eq. 7
    optimizer.param_groups[0]["lr"] = args.learning_rate * (scale if on_step else 1)
    gradient *= -1 if on_step else -scale  # minus: the optimizer minimizes
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)  # the sum over all processes already: processes=1 below
    optimizer_step(critic, critic_optimizer, args.max_grad_norm)
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm, processes=1)
    return over_processes(sums) | {
        "clip_bias_norm": bias_norm, "gradient_scale": scale, "scaled_steps": float(scale != 1),
        "grad_norm": norm, "grad_clipped": float(norm > args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.num_minibatches > args.num_prompts * args.group_size:
        stop(f"--num-prompts {args.num_prompts} makes too few episodes for --num-minibatches")
    if args.staleness and world_size() > 1:
        stop("--staleness needs a single process: a checkpoint holds one queue of batches")
    with Run(args, "st_ppo") as run:
        envs, policy = make_envs(args), load_policy(args, args.history_turns)
        critic, queue = Critic(policy), []  # batches not yet trained on, the oldest first
        kind = torch.optim.SGD if args.sgd else torch.optim.AdamW
        optimizer = kind(policy.model.parameters(), args.learning_rate, weight_decay=0)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate,
                                             weight_decay=0)

        for iteration in run.iterations(policy, optimizer=optimizer, critic=critic,
                                        critic_optimizer=critic_optimizer, queue=queue):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)

            # 2. score; a batch waits --staleness iterations (no turn played: no row, so episode_id)
            rewards, _ = turn_table(episodes, lambda turn: turn.reward, policy.device)  # (E, K)
            batch = collate(episodes, policy.device)
            batch["rewards"] = place_turn_rewards(rewards[batch["episode_id"]], batch["turn_id"])
            queue.append(batch)
            if len(queue) <= args.staleness:
                run.log(iteration, episodes, [], None)
                continue
            batch = {name: x.to(policy.device) for name, x in queue.pop(0).items()}
            mask = batch["turn_id"] >= 0

            # 3. V_old and A (B, T): once per batch, with the critic of now
            [batch["old_values"]] = token_numbers(lambda rows: (critic(rows),), 1, batch, args)
            rewards, values, turn_id = (join_rows(batch[name], batch["episode_id"])
                                        for name in ("rewards", "old_values", "turn_id"))
            sampled = turn_id >= 0
            found = gae_advantages(rewards, values, sampled, args.discount, args.gae_lambda)
            advantages, batch["returns"] = (
                torch.zeros_like(batch["rewards"]).masked_scatter(mask, x[sampled]) for x in found)
            batch["advantages"] = whiten(advantages, mask)

            # 4. update; in every pass a new permutation deals the episodes out to minibatches
            updates = []
            for epoch in range(args.num_epochs):
                order = random_stream(args.seed, DRAW, iteration, epoch).permutation(
                    args.num_prompts * args.group_size).reshape(world_size(), -1)[rank()]
                part = torch.tensor(order % args.num_minibatches, device=policy.device)  # (E,)
                for minibatch in range(args.num_minibatches):
                    rows = select_rows(batch, part[batch["episode_id"]] == minibatch)
                    updates.append(update(policy, critic, optimizer, critic_optimizer, rows, args))
                if args.target_kl is not None and updates[-1]["approx_kl"] > args.target_kl:
                    break

            # 5. log (evaluation and checkpoints: run.iterations)
            error, goal = (all_gather(x[mask]).var() for x in (advantages, batch["returns"]))
            explained = (1 - error / goal).item() if goal > 1e-4 else 0.0
            run.log(iteration, episodes, updates, batch, explained_variance=explained,
                    clip_bias_norm_max=max(u["clip_bias_norm"] for u in updates))
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
