"""ArCHer: an utterance-level critic learned from a replay buffer, tokens trained by REINFORCE.

Paper: Zhou, Zanette, Pan, Levine and Kumar, "ArCHer: Training Language Model Agents via
Hierarchical Multi-Turn RL", arXiv 2402.19446v1, its abstract and first page; the rest from notes
and code: YifeiZhou02/ArCHer at 7c771a7, offline andreazanette/OfflineArcher at 56d3b72.

    Eq. 1  y_j = r + (1 - done) discount Vbar_j(s')                                       [code]
    Eq. 2  u_j = Qbar_j(s, a~)                  a~ a fresh answer of the current policy   [code]
    Eq. 3  critic loss = mean over turns of sum_j (Q_j(s, a) - y_j)^2 + (V_j(s) - u_j)^2  [code]
    Eq. 4  after every critic step: target <- (1 - tau) target + tau critic               [code]
    Eq. 5  A = min_j Q_j(s, a~) - min_j V_j(s)                                            [code]
    Eq. 6  J = mean over turns of A sum_t log pi(a~_t)                                    [code]
    Eq. 7  with --token-baseline: A - b_t instead of A, b_t fitted to A by squared error  [code]
    Eq. 8  --value-target expectile: u_j = Qbar_j(s, a), error^2 times tau' or 1 - tau'   [code]
    Eq. 9  --actor-loss advantage_weighted: exp(beta A) instead of A, buffered answers    [code]
    Eq. 10 --actor-loss filtered_clone: 1 instead of A, answers of the best episodes      [code]

    s    the tokens before a turn    a  its answer (E turns of all past policies, the buffer)
    j    twin heads, last axis (J)   s' the tokens before the next turn
    bar  the target critic           tau, tau', beta  target_rate, expectile, inverse_temperature

To the critic a turn is one action: Q and V of whole utterances, learned by temporal differences
from turns of all past policies. The policy is trained on fresh answers to old states, never
off-policy; all tokens of an answer share its advantage.

Changed from seeupo.py
    - a buffer of turns, of which only the states matter to the policy
    - a critic of utterances and its slow copy, many critic steps per policy step
    - no ratios and no clipping: every answer is the current policy's own

Deviations and choices
    D1  A turn the time limit cut goes on in Eq. 1 (code: it ends): --no-bootstrap-truncated.
    D2  One causal pass gives V(s), from its last token, and Q(s, a), from the mean over the
        answer's tokens too (code: the answer is encoded apart from the state).
    D3  The end-of-turn token is trained (code: it is cut away).
    D4  Each network is clipped to its own gradient norm (code: one norm for both).
    D5  The critic starts as a copy of the policy's first layers (code: a RoBERTa).
    D6  The mean of A over a policy step, noise of the critic, is taken off (code: it stays):
        --no-centre-advantages.

    python algos/archer.py        about 5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from run_folder import Run
from utils import (
    DRAW, Decoder, Policy, RunArgs, all_reduce_sum, collate, collect_groups, evaluate,
    gather_list, load_policy, make_envs, micro_batches, optimizer_step, random_stream, rank, reason,
    sample_tokens, select_rows, stop, token_logprobs, turn_table, world_size,
)

ActorLoss = Literal["policy_gradient", "advantage_weighted", "filtered_clone"]


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/TwentyQuestions-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 32  # environment seeds per iteration
    group_size: int = 1  # episodes that start from the same seed (none are compared here)
    max_turns: int = 20  # turns after which an episode is truncated, K
    max_turn_tokens: int = 12  # tokens the policy may sample in one turn
    learning_rate: float = 5e-5  # of AdamW, constant
    num_iterations: int = 24  # iterations of: collect episodes, update
    warm_start_steps: int = 150  # behaviour cloning steps of the tiny model before training
    warm_start_learning_rate: float = 2e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.1  # standard deviation of the tiny model's first weights
    eval_every: int = 6  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    actor_loss: ActorLoss = "policy_gradient"  # Eq. 6, 9 or 10; the last one needs no critic
    value_target: Literal["fresh", "expectile", "monte_carlo"] = "fresh"  # Eq. 2, 8, or returns
    discount: float = 0.95  # per turn, Eq. 1
    num_critics: int = 2  # heads J; 2 are the twins of Eq. 5
    critic_layers: int = 2  # layers of the policy that the critic is a copy of
    target_rate: float = 0.5  # tau of Eq. 4
    critic_learning_rate: float = 1e-3  # of the critic's AdamW
    critic_steps: int = 10  # optimizer steps of the critic per iteration
    critic_batch_turns: int = 64  # turns per critic step
    actor_steps: int = 3  # optimizer steps of the policy per iteration
    actor_batch_turns: int = 128  # turns per policy step
    actor_warm_up: int | None = None  # iterations without policy steps; default 2 K / tau steps
    replay_turns: int = 100000  # size of the buffer, the oldest turns are dropped
    bootstrap_truncated: bool = True  # a time limit does not end the return of Eq. 1
    centre_advantages: bool = True  # take their mean over the policy step off, D6
    token_baseline: bool = False  # Eq. 7: a third network, its learning rate is the critic's
    expectile: float = 0.9  # tau' of Eq. 8
    inverse_temperature: float = 1.0  # beta of Eq. 9
    keep_quantile: float = 0.9  # Eq. 10: episodes whose return is this quantile or more
    offline: str | None = None  # run folder of this script, to train on its buffer and play nothing


# === 3. Advantages ===============================================================================
@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns.

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += gamma * returns[:, k + 1]
    return returns


@torch.no_grad()
def q_targets(rewards: Tensor, done: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """What Q should be, every head from its own V. Eq. 1

    rewards (N,), done (N,) bool, next_values (N, J) -> (N, J)
    """
    return rewards[:, None] + torch.where(done[:, None], 0.0, discount * next_values)


@torch.no_grad()
def utterance_advantages(q: Tensor, v: Tensor) -> Tensor:
    """How much better an answer is than the policy's average one, pessimistic in both. Eq. 5

    q, v (N, J) -> (N,)
    """
    return q.amin(-1) - v.amin(-1)


@torch.no_grad()
def best_turns(episode_return: Tensor, last: Tensor, quantile: float) -> Tensor:
    """The turns of the episodes whose return is at least that quantile of all episodes'. Eq. 10

    episode_return (N,) of every turn's episode, last (N,) bool, its last turn -> (N,) bool
    """
    return episode_return >= episode_return[last].quantile(quantile)


# === 4. Loss =====================================================================================
def critic_errors(q: Tensor, q_target: Tensor, v: Tensor, v_target: Tensor,
                  expectile: float | None = None) -> Tensor:
    """The squared errors of a turn, summed over the heads. Eq. 3, 8

    q, q_target, v, v_target (N, J) -> (N,)
    """
    error = v_target - v
    weight = 1.0 if expectile is None else torch.where(error > 0, expectile, 1 - expectile)
    return ((q_target - q) ** 2 + weight * error**2).sum(-1)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, online: torch.nn.Module, rate: float):
    """Move every parameter of the target towards the online network, in place. Eq. 4"""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)


def actor_objective(logprobs: Tensor, credit: Tensor, turn_id: Tensor, weights: Tensor) -> Tensor:
    """J: the log-probability of every answer, times its credit. Eq. 6, 7, 9, 10

    logprobs, credit, turn_id (B, T), weights (B,) -> scalar; weights sum to 1 over the step, the
    sum over an answer's tokens is not divided by their number
    """
    return (weights[:, None] * torch.where(turn_id >= 0, credit * logprobs, 0.0)).sum()


def token_baseline_loss(baseline: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of the tokens' baselines from their answer's advantage. Eq. 7

    baseline, weights (B, T), advantages (B,) -> scalar; weights sum to 1 over the step
    """
    return (weights * (advantages[:, None] - baseline) ** 2).sum()


# === 5. Critics, the buffer and fresh answers ====================================================
class TurnCritic(torch.nn.Module):
    """A copy of the policy's first layers with J heads for Q and J for V. One causal pass over a
    row that holds a state, an answer and what follows reads V(s), Q(s, a) and V(s')."""

    def __init__(self, policy: Policy, num_critics: int, num_layers: int):
        super().__init__()
        self.trunk = copy.deepcopy(policy.model.base_model)
        self.trunk.layers = self.trunk.layers[:num_layers]
        self.device, self.bf16 = policy.device, policy.bf16

        def heads(width: int, hidden: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(torch.nn.Sequential(
                torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden),
                torch.nn.ReLU(), torch.nn.Linear(hidden, 1)) for _ in range(num_critics))

        size = policy.model.config.hidden_size
        self.q_heads, self.v_heads = heads(2 * size, size), heads(size, size)
        self.to(policy.device)

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """(N, T, D), entry t from the tokens up to and including t."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.trunk(batch["tokens"], use_cache=False).last_hidden_state.float()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Q(s, a), V(s) and V(s'), each (N, J)."""
        hidden, rows = self.hidden(batch), torch.arange(len(batch["tokens"]), device=self.device)
        state, after = (hidden[rows, batch[name] - 1] for name in ("state_end", "lengths"))
        mask = (batch["turn_id"] >= 0).float()  # (N, T)
        answer = torch.einsum("nt,ntd->nd", mask / mask.sum(1, keepdim=True), hidden)  # (N, D)
        q = [head(torch.cat([state, answer], 1)) for head in self.q_heads]
        v, next_v = ([head(x) for head in self.v_heads] for x in (state, after))
        return torch.cat(q, 1), torch.cat(v, 1), torch.cat(next_v, 1)

    def token_values(self, batch: dict[str, Tensor]) -> Tensor:
        """The first V (B, T) before every token of an answer; 0 elsewhere."""
        before = self.v_heads[0](self.hidden(batch)[:, :-1])[:, :, 0]  # (B, T - 1)
        values = torch.nn.functional.pad(before, (1, 0))
        return torch.where(batch["turn_id"] >= 0, values, 0.0)


@torch.no_grad()
def turn_values(critic: TurnCritic, batch: dict[str, Tensor],
                args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Q(s, a), V(s) and V(s') of any number of rows, without gradient: three (N, J)."""
    values = torch.zeros(3, len(batch["tokens"]), args.num_critics, device=critic.device)
    numbered = batch | {"row": torch.arange(values.shape[1], device=critic.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[:, part["row"]] = torch.stack(critic(part))
    return tuple(values)


def turns_of(policy: Policy, episodes: list[Episode], args: Args) -> list[dict]:
    """Every turn as a row of tokens: its state, its answer, and up to the next answer."""
    rewards, mask = turn_table(episodes, lambda turn: turn.reward, policy.device)
    returns, turns = turn_returns(rewards, mask, args.discount).tolist(), []
    for e, episode in enumerate(episodes):
        state: list[int] = []
        for k, turn in enumerate(episode.turns):
            last = turn is episode.turns[-1]
            done = last and (episode.terminated or episode.overflowed
                             or not args.bootstrap_truncated)
            after = policy.prompt(episode, None)[0] if last else episode.turns[k + 1].prompt_ids
            state = state + turn.prompt_ids
            answered = state + turn.token_ids
            turns.append({"tokens": answered + ([] if done else after), "state_end": len(state),
                          "answer_end": len(answered), "done": done, "reward": float(turn.reward),
                          "return": returns[e][k], "last": last,
                          "episode_return": float(episode.total_reward)})
            state = answered
    return turns


class ReplayBuffer(list):
    """The turns of all past policies, the oldest first; part of the checkpoint."""

    def push(self, turns: list[dict], capacity: int):
        """Append turns, and drop the oldest ones beyond the capacity."""
        self[:] = (self + turns)[-capacity:]

    def draw(self, index: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """The turns with these numbers as a padded batch; turn_id marks their answers."""
        turns = [self[i] for i in index]
        batch = {name: torch.tensor([turn[name] for turn in turns])
                 for name in turns[0] if name != "tokens"}
        rows = [torch.tensor(turn["tokens"]) for turn in turns]
        batch |= {"tokens": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                  "lengths": torch.tensor([len(row) for row in rows])}
        at = torch.arange(batch["tokens"].shape[1])
        answer = (at >= batch["state_end"][:, None]) & (at < batch["answer_end"][:, None])
        batch["turn_id"] = torch.where(answer, 0, -1)
        return {name: x.to(device) for name, x in batch.items()}

    def state_dict(self) -> dict:
        return {"turns": list(self)}

    def load_state_dict(self, state: dict):
        self[:] = state["turns"]


@torch.no_grad()
def fresh_answers(policy: Policy, turns: dict[str, Tensor], uniforms: Tensor,
                  args: Args) -> dict[str, Tensor]:
    """The same states with answers of the policy as it is now; uniforms (N, max_turn_tokens)."""
    policy.model.eval()
    answers: list[list[int]] = [[] for _ in uniforms]
    ends = turns["state_end"]
    states = [row[:end] for row, end in zip(turns["tokens"].tolist(), ends.tolist(), strict=True)]
    numbered = {"lengths": ends, "row": torch.arange(len(ends)).to(ends)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        rows = part["row"].tolist()
        decoder, unfed = Decoder(policy, len(rows)), [states[row] for row in rows]
        for step in range(args.max_turn_tokens):
            tokens, _ = sample_tokens(decoder.feed(unfed), args.temperature, uniforms[rows, step])
            for row, token in zip(rows, tokens.tolist(), strict=True):
                answers[row] += [] if answers[row][-1:] == [policy.end_id] else [token]
            unfed = [[] if answers[row][-1] == policy.end_id else answers[row][-1:] for row in rows]
            if not any(unfed):
                break
    batch = collate([Episode(0, "", [Turn("", "", state, True, answer, [0.0] * len(answer))])
                     for state, answer in zip(states, answers, strict=True)], policy.device)
    return batch | {"state_end": ends}


# === 6. Update ===================================================================================
def critic_update(critic: TurnCritic, target: TurnCritic, optimizer: torch.optim.Optimizer,
                  turns: dict[str, Tensor], fresh: dict[str, Tensor] | None,
                  args: Args) -> dict[str, float]:
    """One optimizer step of the critic on turns of the buffer, one step of its target. Eq. 1-4"""
    if args.value_target == "monte_carlo":
        returns = turns["return"][:, None].expand(-1, args.num_critics)
        turns["q_target"] = turns["v_target"] = returns
    else:
        own_q, _, next_values = turn_values(target, turns, args)
        turns["q_target"] = q_targets(turns["reward"], turns["done"], next_values, args.discount)
        turns["v_target"] = own_q if fresh is None else turn_values(target, fresh, args)[0]
    expectile = args.expectile if args.value_target == "expectile" else None
    sums = torch.zeros(4, device=critic.device)
    for rows in micro_batches(turns, args.micro_batch_tokens):
        q, v, _ = critic(rows)
        errors = critic_errors(q, rows["q_target"], v, rows["v_target"], expectile)
        (errors.sum() / args.critic_batch_turns).backward()
        parts = (errors, q.mean(1), v.mean(1), q.amax(1) - q.amin(1))
        sums += torch.stack([x.detach().sum() / args.critic_batch_turns for x in parts])
    names = ("critic_loss", "q", "v", "q_disagreement")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    metrics["critic_grad_norm"] = optimizer_step(critic, optimizer, args.max_grad_norm)
    polyak_update(target, critic, args.target_rate)
    return metrics


def update(policy: Policy, baseline: TurnCritic | None, optimizer: torch.optim.Optimizer,
           baseline_optimizer: torch.optim.Optimizer | None, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step of the policy; batch["advantages"] (N,)"""
    tokens = all_reduce_sum((batch["turn_id"] >= 0).sum())
    mean = all_reduce_sum(batch["advantages"].sum()) / args.actor_batch_turns
    if args.centre_advantages and args.actor_loss == "policy_gradient":
        batch["advantages"] = batch["advantages"] - mean
    sums = torch.zeros(4, device=policy.device)
    for rows in micro_batches(batch, args.micro_batch_tokens):
        advantages, mask = rows["advantages"], rows["turn_id"] >= 0
        credit = {"policy_gradient": advantages, "filtered_clone": torch.ones_like(advantages),
                  "advantage_weighted": (args.inverse_temperature * advantages).exp(),
                  }[args.actor_loss][:, None]  # (B, 1)
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        baseline_loss = torch.zeros((), device=policy.device)
        if baseline is not None:
            values = baseline.token_values(rows)  # (B, T)
            baseline_loss = token_baseline_loss(values, advantages, mask / tokens)
            baseline_loss.backward()
            credit = credit - values.detach()
        weights = torch.full_like(advantages, 1 / args.actor_batch_turns)
        loss = -actor_objective(logprobs, credit, rows["turn_id"], weights)
        loss.backward()
        parts = (loss, baseline_loss, entropy.sum() / tokens, weights @ advantages**2)
        sums += torch.stack([x.detach() for x in parts])
    names = ("loss", "baseline_loss", "entropy", "advantage_square")
    metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
    metrics["advantage_mean"] = mean.item()
    if baseline is not None:
        optimizer_step(baseline, baseline_optimizer, args.max_grad_norm)
    return metrics | {"grad_norm": optimizer_step(policy.model, optimizer, args.max_grad_norm)}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    cloning = args.actor_loss == "filtered_clone"
    if args.target_rate > 1 or args.discount > 1 or args.expectile >= 1 or args.keep_quantile > 1:
        stop("--target-rate, --discount, --expectile and --keep-quantile are shares, at most 1")
    if args.token_baseline and args.actor_loss != "policy_gradient":
        stop("--token-baseline needs --actor-loss policy_gradient")
    if args.critic_batch_turns % world_size() or args.actor_batch_turns % world_size():
        stop(f"--critic-batch-turns and --actor-batch-turns must be multiples of {world_size()}")
    with Run(args, "archer") as run:
        envs = make_envs(args, args.num_prompts * args.group_size // world_size())
        policy, buffer = load_policy(args), ReplayBuffer()
        torch.manual_seed(args.seed)  # of the heads
        critic = TurnCritic(policy, args.num_critics, args.critic_layers)
        target, baseline, baseline_optimizer = copy.deepcopy(critic), None, None

        def adam(network: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(network.parameters(), rate, weight_decay=0)

        optimizer = adam(policy.model, args.learning_rate)
        critic_optimizer = adam(critic, args.critic_learning_rate)
        state = {"optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer,
                 "target": target, "buffer": buffer}
        if args.token_baseline:
            baseline = TurnCritic(policy, 1, args.critic_layers)
            baseline_optimizer = adam(baseline, args.critic_learning_rate)
            state |= {"baseline": baseline, "baseline_optimizer": baseline_optimizer}
        if args.offline:
            try:
                folder = Path(args.offline) / "checkpoint"
                saved = torch.load(folder / "trainer_state.pt", weights_only=True)["buffer"]
                words = AutoTokenizer.from_pretrained(folder).get_vocab()
            except Exception as error:  # torch and pickle each have their own
                stop(f"--offline {args.offline}: no checkpoint of this script ({reason(error)})")
            if words != policy.tokenizer.get_vocab():
                stop(f"--offline {args.offline} has other tokens: other --model, --env-id, --seed?")
            buffer.load_state_dict(saved)
        run.restore(policy, **state)
        warm_up = args.actor_warm_up
        if warm_up is None:  # what the critic needs to know the start of an episode
            warm_up = 0 if cloning else math.ceil(
                2 * args.max_turns / (args.target_rate * args.critic_steps))

        def evaluation():
            return evaluate(policy, run.eval_envs, args)

        def draw(pool: np.ndarray, count: int, *key: int) -> tuple[dict[str, Tensor], Tensor]:
            """This process's share of some turns, and random numbers for new answers."""
            rng, mine = random_stream(args.seed, DRAW, *key), slice(rank(), None, world_size())
            index, uniforms = rng.choice(pool, count), rng.random((count, args.max_turn_tokens))
            return (buffer.draw(index[mine], policy.device),
                    torch.tensor(uniforms[mine], device=policy.device))

        for iteration in run.iterations(policy, evaluation, **state):
            # 1. collect num_prompts groups of group_size episodes; their turns go to the buffer
            episodes = [] if args.offline else collect_groups(policy, envs, args, iteration)
            buffer.push(gather_list(turns_of(policy, episodes, args)), args.replay_turns)
            pool, updates, actor_updates, fresh_tokens = np.arange(len(buffer)), [], [], 0

            # 2. critic; its fresh answers are made at once, for the policy stands still meanwhile
            if not cloning:
                newest = buffer.draw(pool[-args.critic_batch_turns:], policy.device)
                error = newest["return"] - turn_values(critic, newest, args)[1].mean(1)
                turns, uniforms = draw(pool, args.critic_steps * args.critic_batch_turns, iteration)
                fresh = None
                if args.value_target == "fresh":
                    fresh = fresh_answers(policy, turns, uniforms, args)
                    fresh_tokens += (fresh["turn_id"] >= 0).sum()
                for rows in torch.arange(len(turns["done"])).chunk(args.critic_steps):
                    updates.append(critic_update(
                        critic, target, critic_optimizer, select_rows(turns, rows),
                        fresh and select_rows(fresh, rows), args))

            # 3. advantages (N,), 4. update of the policy
            if cloning:
                returns, last = (torch.tensor([turn[name] for turn in buffer])
                                 for name in ("episode_return", "last"))
                pool = pool[best_turns(returns, last, args.keep_quantile).numpy()]
            for step in range(args.actor_steps if iteration >= warm_up else 0):
                turns, uniforms = draw(pool, args.actor_batch_turns, iteration, 1 + step)
                if args.actor_loss == "policy_gradient":
                    turns = fresh_answers(policy, turns, uniforms, args)
                    fresh_tokens += (turns["turn_id"] >= 0).sum()
                turns["advantages"] = (turns["reward"] * 0 if cloning else
                                       utterance_advantages(*turn_values(critic, turns, args)[:2]))
                actor_updates.append(update(policy, baseline, optimizer, baseline_optimizer, turns,
                                            args))

            # 5. log (evaluation and checkpoints: run.iterations)
            fresh_tokens = all_reduce_sum(torch.as_tensor(fresh_tokens)).item()
            run.totals["generated_tokens"] += fresh_tokens  # they cost what those of episodes do
            metrics = {"buffer_turns": len(buffer), "trained_share": len(pool) / len(buffer),
                       "fresh_tokens": fresh_tokens, "critic_steps": len(updates),
                       "optimizer_steps": len(actor_updates)}
            if updates:
                metrics |= {"value_gap": -error.mean().item(), "explained_variance":
                            (1 - error.var() / newest["return"].var().clamp(min=1e-8)).item()}
            for steps in (updates, actor_updates):
                for name in steps[0] if steps else ():
                    metrics[name] = np.mean([u[name] for u in steps])
            run.log(iteration, episodes, metrics)
        return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
