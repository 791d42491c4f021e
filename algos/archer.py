"""ArCHer: a critic learns what whole answers are worth, the policy learns from the critic.

Paper: Zhou, Zanette, Pan, Levine and Kumar, "ArCHer: Training Language Model Agents via
Hierarchical Multi-Turn RL", arXiv 2402.19446v1, its abstract and first page; the rest from notes
and from the authors' code, YifeiZhou02/ArCHer at 7c771a7 [code].

    Eq. 1  y_j = r + (1 - done) discount Vbar_j(s')                                       [code]
    Eq. 2  u_j = Qbar_j(s, a~)                  a~ a fresh answer of the current policy   [code]
    Eq. 3  loss = sum w_Q sum_j (Q_j(s, a) - y_j)^2 + sum w_V sum_j (V_j(s) - u_j)^2      [code]
    Eq. 4  after every critic step: target <- (1 - tau) target + tau critic               [code]
    Eq. 5  A = min_j Q_j(s, a~) - min_j V_j(s), minus its mean over the step (D6)         [code]
    Eq. 6  objective = mean over drawn turns of A sum_t log pi(a~_t | s, a~_<t)           [code]

    s    the tokens before a turn    a  the answer that was given    r, done  what came of it
    s'   the tokens before the next turn     j  one of num_critics heads (the last axis, J)
    bar  of the target critic, a slow copy; without it: the critic itself    tau  target_rate

What is learned where. A step draws B turns from a buffer of all past episodes, with replacement.
    Q       at all n turns of a drawn turn's episode, each with w_Q = 1 / (n B), towards y. It does
            not matter who gave the answer: its reward and the state after it are known.
    V       at the drawn turn only, with w_V = 1 / B, towards u. V is the value of the current
            policy, about which the old answer says nothing: the policy answers the state again.
    policy  on fresh answers to newly drawn states. The tokens of an answer share its A.

Changed from seeupo.py
    - a buffer of old episodes, of which the policy sees only the states
    - a critic of answers and its slow copy, many critic steps per policy step
    - no ratios and no clipping, because every answer is the current policy's own

Deviations and choices
    D1  Eq. 1 goes on after a time limit, not after a full context (code: --no-bootstrap-truncated).
    D2  One causal pass over an episode. V reads the hidden state of a state's last token, Q that
        and the mean hidden state of the answer (code: a row per turn, two passes).
    D3  The end-of-turn token is trained (code: it is cut away).
    D4  Each network is clipped to its own gradient norm (code: one norm for both).
    D5  The critic starts as a copy of the policy's first two layers (code: a RoBERTa).
    D6  The mean of A over a policy step is subtracted: it is noise of the critic. In the code it
        stays: --no-centre-advantages.
    D7  Sizes are smaller, see the flags. The evaluation samples (code: greedy).

    python algos/archer.py        about 3.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from envs.episodes import Episode, Turn
from policies import Policy, load_policy, parse_args, twin
from rollouts import Decoder, collect_groups, make_envs, sample_answers
from run_folder import Run
from utils import (
    DRAW, RunArgs, all_reduce_sum, collate, gather_list, micro_batches, optimizer_step,
    over_processes, random_stream, rank, stop, token_logprobs, world_size,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/TwentyQuestions-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 64  # environment seeds per iteration
    group_size: int = 1  # episodes that start from the same seed (none are compared here)
    max_turns: int = 20  # turns after which an episode is truncated, K
    max_turn_tokens: int = 12  # tokens the policy may sample in one turn
    learning_rate: float = 5e-5  # of AdamW, constant
    num_iterations: int = 20  # iterations of: collect episodes, update
    tiny_steps: ClassVar[int] = 150  # of the warm start, where the tiny model is trained
    warm_start_learning_rate: float = 2e-3  # highest learning rate of these steps
    tiny_init_std: float = 0.1  # standard deviation of the tiny model's first weights
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    value_target: Literal["fresh", "monte_carlo"] = "fresh"  # Eq. 1, 2 (the paper's) or returns
    discount: float = 0.95  # per turn, Eq. 1
    num_critics: int = 2  # heads J; the paper's are 2
    target_rate: float = 0.5  # tau of Eq. 4 (code: 0.1)
    critic_learning_rate: float = 1e-3  # of the critic's AdamW
    critic_steps: int = 10  # optimizer steps of the critic per iteration (code: 50)
    critic_batch_turns: int = 32  # turns drawn for a critic step, B (code: 256)
    actor_steps: int = 3  # optimizer steps of the policy per iteration
    actor_batch_turns: int = 128  # turns drawn for a policy step, B (code: 256)
    actor_warm_up: int | None = None  # of the critic alone; default: 2 K / (tau critic_steps)
    replay_turns: int = 100000  # turns in the buffer; the oldest episodes are dropped
    bootstrap_truncated: bool = True  # a time limit does not end the return, D1
    centre_advantages: bool = True  # subtract their mean over the policy step, D6
    may_be_zero: ClassVar[set[str]] = RunArgs.may_be_zero | {"actor_warm_up"}
    chat_defaults: ClassVar = RunArgs.chat_defaults | {"num_prompts": 64,
                                                       "critic_learning_rate": 1e-4}


# === 3. Advantages ===============================================================================
@torch.no_grad()
def turn_returns(turn_rewards: Tensor, turn_mask: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards of this and all later turns.

    turn_rewards (E, K), turn_mask (E, K) -> (E, K), 0 after the end

    >>> turn_returns(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[True, True, True]]), 0.5)
    tensor([[1.2500, 2.5000, 1.0000]])
    """
    returns = torch.where(turn_mask, turn_rewards, 0.0)
    for k in reversed(range(returns.shape[1] - 1)):
        returns[:, k] += discount * returns[:, k + 1]
    return returns


@torch.no_grad()
def q_targets(rewards: Tensor, done: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """What Q should be: the reward plus what the same head's V expects of the next state. Eq. 1

    rewards (..), done (..) bool, next_values (.., J) -> (.., J)

    >>> done = torch.tensor([False, True])  # nothing counts after the end
    >>> q_targets(torch.tensor([-1.0, -1.0]), done, torch.tensor([[-4.0, -2.0], [9.0, 9.0]]), 0.5)
    tensor([[-3., -2.],
            [-1., -1.]])
    """
    return rewards[..., None] + torch.where(done[..., None], 0.0, discount * next_values)


@torch.no_grad()
def answer_advantages(q: Tensor, v: Tensor) -> Tensor:
    """How much better an answer is than the average one, before update() centres it. Eq. 5

    q, v (.., J) -> (..)

    >>> answer_advantages(torch.tensor([[-3.0, -4.0]]), torch.tensor([[-6.0, -5.0]]))
    tensor([2.])
    """
    return q.amin(-1) - v.amin(-1)


# === 4. Loss =====================================================================================
def squared_errors(values: Tensor, targets: Tensor) -> Tensor:
    """The squared errors of a turn's values, summed over the heads. Eq. 3

    values (.., J), targets of that shape or one that broadcasts -> (..)

    >>> squared_errors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([13.])
    """
    return ((targets - values) ** 2).sum(-1)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, online: torch.nn.Module, rate: float):
    """Move every parameter of the target towards the online network, in place. Eq. 4

    >>> slow, fast = (torch.nn.ParameterList([torch.tensor([x])]) for x in (0.0, 2.0))
    >>> polyak_update(slow, fast, 0.25)
    >>> slow[0].data
    tensor([0.5000])
    """
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)


def actor_objective(logprobs: Tensor, advantages: Tensor, turn_id: Tensor, count: int) -> Tensor:
    """The log-probability of every answer, not divided by its length, times its advantage. Eq. 6

    logprobs, turn_id (B, T), advantages (B,), the whole step's count of answers -> scalar

    >>> turn_id = torch.tensor([[0, 0], [0, -1]])  # two tokens, and one: (2 * -3 - 1 * -1) / 2
    >>> logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -9.0]])
    >>> actor_objective(logprobs, torch.tensor([2.0, -1.0]), turn_id, 2)
    tensor(-2.5000)
    """
    of_answers = torch.where(turn_id >= 0, logprobs, 0.0).sum(1)  # (B,) log pi(a~ | s)
    return (advantages * of_answers).sum() / count


# === 5. The critic, the buffer and fresh answers =================================================
class TurnCritic(torch.nn.Module):
    """A copy of the policy's first layers with J heads for Q and J for V."""

    def __init__(self, policy: Policy, num_critics: int, num_layers: int = 2):
        super().__init__()
        self.trunk = twin(policy.model.base_model)
        self.trunk.layers = self.trunk.layers[:num_layers]
        self.device, self.bf16 = policy.device, policy.bf16
        size = policy.model.get_output_embeddings().in_features  # D, what the trunk gives out

        def heads(width: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(torch.nn.Sequential(
                torch.nn.Linear(width, size), torch.nn.ReLU(), torch.nn.Linear(size, size),
                torch.nn.ReLU(), torch.nn.Linear(size, 1)) for _ in range(num_critics))

        self.q_heads, self.v_heads = heads(2 * size), heads(size)
        self.to(policy.device)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Q(s, a) and V(s) of every state, each (B, K, J); Q means nothing without an answer."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk(batch["tokens"], use_cache=False).last_hidden_state.float()
        row = torch.arange(len(hidden), device=self.device)[:, None]
        state = hidden[row, batch["starts"] - 1]  # (B, K, D), a state's last token; padding: any
        turn = torch.arange(state.shape[1], device=self.device)[:, None]
        inside = (batch["turn_id"][:, None] == turn).float()  # (B, K, T)
        answer = inside @ hidden / inside.sum(2, keepdim=True).clamp(min=1)  # (B, K, D), mean
        q = [head(torch.cat([state, answer], 2)) for head in self.q_heads]
        return torch.cat(q, 2), torch.cat([head(state) for head in self.v_heads], 2)


@torch.no_grad()
def turn_values(critic: TurnCritic, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor]:
    """Q(s, a) and V(s) of all rows, two (B, K, J), no gradient; a part may lack padded columns."""
    values = torch.zeros(2, *batch["starts"].shape, args.num_critics, device=critic.device)
    numbered = batch | {"row": torch.arange(len(batch["starts"]), device=critic.device)}
    for part in micro_batches(numbered, args.micro_batch_tokens):
        values[:, part["row"], : part["starts"].shape[1]] = torch.stack(critic(part))
    return values[0], values[1]


@dataclasses.dataclass
class Trajectory:
    """An episode as the critic reads it: a row of tokens, and a list entry for every state.

    State k is tokens[: starts[k]], all that was said before answer k. An episode that a time limit
    cut has one more state at its end, which nobody answered: the s' of its last turn in Eq. 1.
    """

    num_turns: int  # answers
    tokens: list[int]  # observation 0, answer 0, observation 1, answer 1, ...
    turn_id: list[int]  # k on the tokens of answer k, -1 on those of observations
    starts: list[int]  # where answer k starts
    rewards: list[float]  # what it earned
    done: list[bool]  # whether the return ends with it


def trajectory(policy: Policy, episode: Episode, args: Args) -> Trajectory:
    """An episode of at least one turn, for the buffer."""
    row, unanswered = Trajectory(len(episode.turns), [], [], [], [], []), []
    if args.bootstrap_truncated and not (episode.terminated or episode.overflowed):
        unanswered = [Turn("", "", prompt_ids=policy.prompt(episode)[0])]
    for k, turn in enumerate(episode.turns + unanswered):
        row.starts.append(len(row.tokens) + len(turn.prompt_ids))
        row.tokens += turn.prompt_ids + turn.token_ids
        row.turn_id += [-1] * len(turn.prompt_ids) + [k] * len(turn.token_ids)
        row.rewards.append(turn.reward)
        row.done.append(k == row.num_turns - 1 and not unanswered)
    return row


def draw_turns(turns: list[tuple], count: int, rng: np.random.Generator) -> list[tuple]:
    """This process's share of `count` turns, each an episode and the number of its turn."""
    return [turns[i] for i in rng.integers(len(turns), size=count)[rank() :: world_size()]]


def collate_turns(drawn: list[tuple[Trajectory, int]], device: torch.device) -> dict[str, Tensor]:
    """A row per draw, its whole episode: (B, T) and (B, K), K the most states of an episode."""
    batch = {name: pad_sequence([torch.tensor(getattr(row, name)) for row, _ in drawn],
                                batch_first=True, padding_value=padding)
             for name, padding in (("tokens", 0), ("turn_id", -1), ("starts", 1), ("rewards", 0),
                                   ("done", False))}
    turn = torch.arange(batch["starts"].shape[1])  # (K,)
    batch["played"] = turn < torch.tensor([[row.num_turns] for row, _ in drawn])  # (B, K)
    batch["drawn"] = turn == torch.tensor([[k] for _, k in drawn])  # (B, K), one in every row
    batch["lengths"] = torch.tensor([len(row.tokens) for row, _ in drawn])
    return {name: x.to(device) for name, x in batch.items()}


def fresh_answers(policy: Policy, drawn: list[tuple[Trajectory, int]], rng: np.random.Generator,
                  args: Args) -> dict[str, Tensor]:
    """The policy, as it is now, answers N states (utils 3): rows of state and answer, turn_id 0."""
    answers = [Turn("", "", prompt_ids=row.tokens[: row.starts[k]]) for row, k in drawn]
    starts = torch.tensor([len(turn.prompt_ids) for turn in answers])
    uniforms = torch.tensor(rng.random((len(drawn) * world_size(), args.max_turn_tokens)))
    uniforms = uniforms[rank() :: world_size()]  # (N, max_turn_tokens)
    for part in micro_batches({"lengths": starts, "index": torch.arange(len(starts))},
                              args.micro_batch_tokens):
        turns = [answers[i] for i in part["index"].tolist()]
        sample_answers(Decoder(policy, len(turns)), [list(turn.prompt_ids) for turn in turns],
                       turns, [args.max_turn_tokens] * len(turns), uniforms[part["index"]],
                       args.temperature)
    batch = collate([Episode(0, "", [turn]) for turn in answers], policy.device)
    return batch | {"starts": starts[:, None].to(policy.device)}


# === 6. Update ===================================================================================
def critic_update(critic: TurnCritic, target: TurnCritic, optimizer: torch.optim.Optimizer,
                  fresh: dict[str, Tensor] | None, batch: dict[str, Tensor],
                  args: Args) -> dict[str, float]:
    """One optimizer step of the critic on B drawn turns, and one step of its target.

    batch: the drawn turns in their episodes; fresh: the policy's answers now, to the same states
    """
    # an episode of n turns is drawn n times as often as one of a single turn: weight 1 / n
    share = batch["played"] / batch["played"].sum(1, keepdim=True)  # (B, K)
    batch["q_weights"] = share / args.critic_batch_turns
    if args.value_target == "fresh":
        _, v = turn_values(target, batch, args)  # (B, K, J), V of every state s
        next_v = v.roll(-1, 1)  # V(s'); a turn without an s' in its row is done or has weight 0
        batch["q_target"] = q_targets(batch["rewards"], batch["done"], next_v, args.discount)
        batch["v_target"], _ = turn_values(target, fresh, args)  # (B, 1, J), Eq. 2
        batch["v_weights"] = batch["drawn"] / args.critic_batch_turns
    else:
        returns = turn_returns(batch["rewards"], batch["played"], args.discount)[:, :, None]
        batch |= {"q_target": returns, "v_target": returns, "v_weights": batch["q_weights"]}
    sums = dict.fromkeys(("critic_loss", "q", "v"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        q, v = critic(rows)
        loss = (rows["q_weights"] * squared_errors(q, rows["q_target"])  # Eq. 3
                + rows["v_weights"] * squared_errors(v, rows["v_target"])).sum()
        loss.backward()
        parts = {"critic_loss": loss, "q": (rows["q_weights"] * q.mean(2)).sum(),
                 "v": (rows["q_weights"] * v.mean(2)).sum()}
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(critic, optimizer, args.max_grad_norm)
    polyak_update(target, critic, args.target_rate)
    return over_processes(sums) | {"critic_grad_norm": norm}


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
           args: Args) -> dict[str, float]:
    """One optimizer step on N fresh answers and their batch["advantages"] (N,), centred here."""
    count, tokens = args.actor_batch_turns, all_reduce_sum((batch["turn_id"] >= 0).sum())
    mean = all_reduce_sum(batch["advantages"].sum()) / count
    if args.centre_advantages:
        batch["advantages"] = batch["advantages"] - mean
    sums = dict.fromkeys(("loss", "entropy", "advantage_square"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        loss = -actor_objective(logprobs, rows["advantages"], rows["turn_id"], count)
        loss.backward()
        parts = {"loss": loss, "entropy": entropy.sum() / tokens,
                 "advantage_square": (rows["advantages"] ** 2).sum() / count}
        sums = {name: sums[name] + parts[name].detach() for name in sums}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"advantage_mean": mean.item(), "grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if not 0 < args.target_rate <= 1 or args.discount > 1:
        stop("--target-rate (not 0), --discount: shares, at most 1")
    if args.critic_batch_turns % world_size() or args.actor_batch_turns % world_size():
        stop(f"--critic-batch-turns and --actor-batch-turns must be multiples of {world_size()}")
    with Run(args, "archer") as run:
        envs, policy = make_envs(args), load_policy(args)
        if not hasattr(policy.model.base_model, "layers"):
            stop(f"--model {args.model}: its layers are not where ArCHer looks for its critic's")
        torch.manual_seed(args.seed)  # of the heads
        critic = TurnCritic(policy, args.num_critics)
        target = twin(critic)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate,
                                             weight_decay=0)
        buffer: list[dict] = []  # the oldest first; as dicts, which a checkpoint can hold
        warm_up = args.actor_warm_up
        if warm_up is None:  # 2 K / tau target steps: so long until V of turn 0 knows of the end
            warm_up = math.ceil(2 * args.max_turns / (args.target_rate * args.critic_steps))

        for iteration in run.iterations(
                policy, optimizer=optimizer, critic=critic, critic_optimizer=critic_optimizer,
                target=target, buffer=buffer):
            # 1. collect num_prompts groups of group_size episodes for the buffer
            episodes = collect_groups(policy, envs, args, iteration)
            buffer += gather_list([vars(trajectory(policy, e, args)) for e in episodes if e.turns])
            rows = [Trajectory(**row) for row in buffer]
            turns = [(row, k) for row in rows for k in range(row.num_turns)]
            while len(turns) > args.replay_turns and len(rows) > 1:  # drop the oldest episode
                turns = turns[rows.pop(0).num_turns:]
                del buffer[0]

            # 2. update of the critic
            critic_updates, fresh, fresh_tokens = [], None, 0
            for step in range(args.critic_steps):
                rng = random_stream(args.seed, DRAW, iteration, 1 + step)
                drawn = draw_turns(turns, args.critic_batch_turns, rng)
                if args.value_target == "fresh":
                    fresh = fresh_answers(policy, drawn, rng, args)
                    fresh_tokens += (fresh["turn_id"] >= 0).sum().item()
                critic_updates.append(critic_update(critic, target, critic_optimizer, fresh,
                                                    collate_turns(drawn, policy.device), args))

            # 3. advantages (N,), 4. update of the policy
            updates, batch = [], None
            for step in range(args.actor_steps if iteration >= warm_up else 0):
                rng = random_stream(args.seed, DRAW, iteration, 1 + args.critic_steps + step)
                drawn = draw_turns(turns, args.actor_batch_turns, rng)
                batch = fresh_answers(policy, drawn, rng, args)
                fresh_tokens += (batch["turn_id"] >= 0).sum().item()
                q, v = turn_values(critic, batch, args)  # (N, 1, J)
                batch["advantages"] = answer_advantages(q, v)[:, 0]
                updates.append(update(policy, optimizer, batch, args))

            # 5. log (evaluation and checkpoints: run.iterations)
            fresh_tokens = all_reduce_sum(torch.tensor(fresh_tokens)).item()
            run.totals["generated_tokens"] += fresh_tokens  # they cost what those of episodes do
            run.log(iteration, episodes, updates, batch, buffer_turns=len(turns),
                    fresh_tokens=fresh_tokens, critic_steps=len(critic_updates),
                    **{name: np.mean([u[name] for u in critic_updates])
                       for name in critic_updates[0]})
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
