"""SeeUPO: update turn by turn, the last turn first, each against the already improved rest.

Paper: Hu, Fu, Chen, Liu and Ding, "SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees",
arXiv 2602.06554v1. Section 4 and the abstract were read in full, the rest in part; code: branch
seeupo of modelscope/AgentEvolver at e59dea41.

    Eq. 1  R_e = 1 + s / 2 if s >= 1, else s / 2; -1 for garbage   s: the episode's return [code]
    Eq. 2  A_e = R_e - mean_group R, divided by the std of A over the batch                 [5, 9]
    Eq. 3  r_e = exp(mean over the tokens of turn t of log pi(token) - log pi_k(token))     [6]
    Eq. 4  J_t = mean over the episodes with a turn t of
                 min(r_e M_e, clip(r_e, 1 - clip_low, 1 + clip_high) M_e) - kl KL           [6]
    Eq. 5  M_e = A_e for the first turn updated; after the step on turn t, M_e is multiplied by
                 r_e of that turn under the new parameters                                  [7, 8]

    R_e  task_reward    A_e  scaled_advantages    r_e  turn_log_ratio    M_e  credit (E, K)
    pi_k  the policy that collected: old_logprobs, for all turns    e, t  episode, turn
    [n]  equation of the paper    [code]  released code

In reverse order this is backward induction: an early turn is judged by what the later ones have
become. In exact arithmetic, with a policy of its own for every turn, it reaches the global optimum.
The theorem does not cover step sizes, shared parameters and sampling.

Changed from st_ppo.py
    - there is no critic: the group's mean is the baseline, and all turns of an episode share A
    - every optimizer step is on one turn: on the rows that have it, which are cut after it
    - the turns updated before change the weight of an episode, Eq. 5

Deviations and choices
    D1  The released code differs from the paper, and --released follows it (default: the paper).
        It takes old_logprobs again before every turn, so r_e is 1 and the clip never binds. It
        clamps r_e in Eq. 5 and M_e / A_e to 0.8 .. 1.2, and A_e to -3 .. 3.
    D2  Eq. 3 takes the mean over a turn's tokens, as the released code does. Eq. 5 would be exact
        with their sum, which is noisier.
    D3  Controls: --no-sequential-weights keeps M = A. --order together takes all turns in one step,
        with the ratio per turn (as in GSPO) or, with --ratio token, per token (as in GRPO); the
        loss is a mean over turns in both.
    D4  An episode without turn t keeps its M and is not in the mean of Eq. 4. In the released code
        its padding is in the mean. A turn whose episodes all have A = 0 is skipped.
    D5  s is the summed reward of any environment. Eq. 1 is made for s from 0 to 1; its bonus for
        a full score favours risk, and --plain-rewards leaves R = s.
    D6  Episodes are sampled at temperature 1 (code: 0.9).

    python algos/seeupo.py        about 1.5 minutes on 2 CPU cores
"""

# === 1. Imports ==================================================================================
import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a waiting thread of torch soon goes to sleep
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils.py and envs/ are
from policies import Policy, load_policy, parse_args, twin
from rollouts import collect_groups, groups_without_signal, make_envs
from run_folder import Run
from utils import (
    DRAW, RunArgs, all_gather, all_reduce_sum, batch_logprobs, collate, expand_to_tokens,
    micro_batches, optimizer_step, over_processes, random_stream, rank, select_rows, stop,
    token_logprobs,
)


# === 2. Args =====================================================================================
@dataclasses.dataclass
class Args(RunArgs):
    env_id: str = "turnrl/ToolDesk-v0"  # gymnasium id; module:Id-v0 imports the module first
    num_prompts: int = 8  # environment seeds (groups) per iteration
    learning_rate: float = 1e-4  # of AdamW, constant
    num_iterations: int = 30  # iterations of: collect episodes, update
    max_turn_tokens: int = 6  # tokens the policy may sample in one turn
    tiny_steps: ClassVar[int] = 400  # of the warm start, where the tiny model is trained
    eval_every: int = 5  # iterations between evaluations on held-out seeds

    # Algorithm specific arguments
    order: Literal["reverse", "natural", "random", "together"] = "reverse"  # paper's: reverse
    sequential_weights: bool = True  # the paper's Eq. 5; no: M stays A
    ratio: Literal["turn", "token"] = "turn"  # the paper's Eq. 3, or a control
    released: bool = False  # follow the released code where it differs from the paper, D1
    clip_low: float = 0.2  # clipping of the ratio from below, Eq. 4
    clip_high: float = 0.2  # clipping of the ratio from above, Eq. 4
    kl_coefficient: float = 0.002  # weight of KL(policy || start policy), estimator k3, in Eq. 4
    steps_per_turn: int = 1  # optimizer steps on the rows of a turn (of all, with --order together)
    adam_beta1: float = 0.9  # of AdamW; 0: no step carries on the gradient of another turn
    plain_rewards: bool = False  # R is the return s, not Eq. 1


# === 3. Advantages ===============================================================================
@torch.no_grad()
def task_reward(score: Tensor, garbage: Tensor) -> Tensor:
    """What an episode's score is worth: a full score (to 1e-6) counts extra. Eq. 1

    score (E,) in [0, 1], garbage (E,) bool -> (E,)

    >>> task_reward(torch.tensor([1.0, 0.5, 0.5]), torch.tensor([False, False, True]))
    tensor([ 1.5000,  0.2500, -1.0000])
    """
    return torch.where(garbage, -1.0, torch.where(score >= 1 - 1e-6, 1 + 0.5 * score, 0.5 * score))


@torch.no_grad()
def scaled_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards relative to their group's mean, divided by the std of the batch. Eq. 2

    rewards (E,) of all processes, groups are neighbours -> (E,); exactly 0 in a group of rewards
    within 1e-6 (1 + |max|).

    >>> rewards = torch.tensor([1.5, 0.0, 0.0, 1.25, 0.75, 0.25, 0.5, 0.5, 0.5])
    >>> scaled_advantages(rewards, group_size=3)  # means 0.5, 0.75, 0.5; std of what is left 0.5
    tensor([ 2., -1., -1.,  1.,  0., -1.,  0.,  0.,  0.])
    """
    groups = rewards.view(-1, group_size)
    equal = torch.isclose(groups, groups.amax(1, keepdim=True), 1e-6, 1e-6).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, groups - groups.mean(1, keepdim=True))
    std = centred.std()
    return (centred / std if std > 0 else centred).flatten()


def turn_order(num_turns: int, order: str, rng: np.random.Generator) -> list[list[int]]:
    """Which turns every optimizer step trains: one turn, or all of them.

    >>> turn_order(3, "reverse", np.random.default_rng(1))
    [[2], [1], [0]]
    """
    turns = list(range(num_turns))
    return {"reverse": [[t] for t in reversed(turns)], "natural": [[t] for t in turns],
            "random": [[t] for t in rng.permutation(turns).tolist()], "together": [turns]}[order]


@torch.no_grad()
def multiply_weights(running: Tensor, log_ratio: Tensor, episode_id: Tensor,
                     bound: float | None = None) -> Tensor:
    """Multiply M / A by the ratio of the turn that was just updated. Eq. 5

    running (E,) is M / A, log_ratio (B,) that of the turn, episode_id (B,) -> (E,). An episode
    without a row keeps its value. The ratio and the result stay within 1 +- bound.

    >>> log_ratio, episode_id = torch.tensor([0.5, 1.5]).log(), torch.tensor([2, 0])
    >>> multiply_weights(torch.tensor([1.0, 2.0, 3.0]), log_ratio, episode_id)
    tensor([1.5000, 2.0000, 1.5000])
    """
    low, high = (0.0, float("inf")) if bound is None else (1 - bound, 1 + bound)
    factor = log_ratio.clamp(-20, 20).exp().clamp(low, high)
    return running.index_copy(0, episode_id, running[episode_id] * factor).clamp(low, high)


# === 4. Loss =====================================================================================
def turn_log_ratio(log_ratio: Tensor, turn_id: Tensor) -> Tensor:
    """The mean log-ratio of a token's turn; its gradient reaches all tokens of the turn. Eq. 3

    log_ratio, turn_id (B, T) -> (B, T), 0 where turn_id is -1

    >>> turn_log_ratio(torch.tensor([[0.1, 0.3, 0.0, 0.4]]), torch.tensor([[0, 0, -1, 1]]))
    tensor([[0.2000, 0.2000, 0.0000, 0.4000]])
    """
    index = turn_id + 1  # column 0 takes what was not sampled
    zeros = log_ratio.new_zeros(len(index), int(index.max()) + 1)  # (B, K + 1)
    means = zeros.scatter_reduce(1, index, log_ratio, "mean", include_self=False)
    return torch.where(turn_id >= 0, means.gather(1, index), 0.0)


def kl_policy_ref_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from the policy's own samples, >= 0 for every token.

    logprobs, ref_logprobs (B, T) -> (B, T). Its gradient is that of KL(reference || policy).

    >>> kl_policy_ref_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # 1/2 - ln 1/2 - 1
    tensor([0.1931])
    """
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    return difference.exp() - difference - 1


def turn_loss(batch: dict[str, Tensor], logprobs: Tensor, of_turns: bool, clip_low: float,
              clip_high: float, kl_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the objective of Eq. 4, and weighted means for the log.

    logprobs (B, T); batch: old_logprobs, ref_logprobs, advantages (M on every token), turn_id,
    weights (B, T), which sum to 1; of_turns: the ratio is that of the turn, else of the token

    >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)  # a turn of two tokens with M = 1
    >>> batch = {"old_logprobs": zero, "ref_logprobs": zero, "turn_id": zero.long(),
    ...          "advantages": one, "weights": one / 2}
    >>> turn_loss(batch, torch.tensor([[1.0, 2.25]]).log(), True, 0.2, 0.2, 0.0)[0]  # min(1.5, 1.2)
    tensor(-1.2000)
    """
    advantages, weights = batch["advantages"], batch["weights"]  # (B, T)
    log_ratio = torch.where(batch["turn_id"] >= 0, logprobs - batch["old_logprobs"], 0.0)
    pooled = turn_log_ratio(log_ratio, batch["turn_id"]) if of_turns else log_ratio
    ratio = pooled.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    kl = kl_policy_ref_k3(logprobs, batch["ref_logprobs"])
    objective = torch.minimum(ratio * advantages, clipped * advantages) - kl_coefficient * kl
    with torch.no_grad():
        parts = {"loss": -objective, "approx_kl": log_ratio.exp() - 1 - log_ratio,
                 "clip_fraction": clipped * advantages < ratio * advantages,
                 "ratio_drift": (ratio - 1).abs(), "kl_policy_ref_k3": kl}
    return -(weights * objective).sum(), {name: (weights * x).sum() for name, x in parts.items()}


# === 5. Rows of a turn ===========================================================================
def rows_of_turns(batch: dict[str, Tensor], turns: list[int]) -> dict[str, Tensor]:
    """Keep the rows that have one of these turns and cut them after it.

    turn_id becomes -1 on the tokens of other turns, so that they are not trained.
    """
    here = torch.isin(batch["turn_id"], torch.tensor(turns, device=batch["turn_id"].device))
    positions = torch.arange(here.shape[1], device=here.device)
    marked = batch | {"turn_id": torch.where(here, batch["turn_id"], -1),
                      "lengths": torch.where(here, positions + 1, 0).amax(1)}
    return select_rows(marked, here.any(1).nonzero()[:, 0])


# === 6. Update ===================================================================================
def update(policy: Policy, reference: Policy, optimizer: torch.optim.Optimizer,
           batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One optimizer step on the rows of one turn, or of all turns; reference: the start policy."""
    mask, index = batch["turn_id"] >= 0, batch["turn_id"] + 1
    tokens = torch.zeros(len(mask), int(index.max()) + 1 if len(mask) else 1, device=mask.device)
    tokens = tokens.scatter_add(1, index, mask.float()).gather(1, index).clamp(min=1)  # of the turn
    batch["weights"] = mask / tokens / all_reduce_sum((mask / tokens).sum())  # mean over turns
    sums = dict.fromkeys(("loss", "approx_kl", "clip_fraction", "ratio_drift", "kl_policy_ref_k3",
                          "entropy"), torch.zeros(()))
    for rows in micro_batches(batch, args.micro_batch_tokens):
        logprobs, entropy = token_logprobs(policy, rows, args.temperature)
        with torch.no_grad():
            rows["ref_logprobs"], _ = token_logprobs(reference, rows, args.temperature)
        loss, parts = turn_loss(rows, logprobs, args.ratio == "turn", args.clip_low, args.clip_high,
                                args.kl_coefficient)
        loss.backward()
        parts["entropy"] = (rows["weights"] * entropy).sum()
        sums |= {name: sums[name] + x.detach() for name, x in parts.items()}
    norm = optimizer_step(policy.model, optimizer, args.max_grad_norm)
    return over_processes(sums) | {"grad_norm": norm}


# === 7. Main =====================================================================================
def main(args: Args) -> dict[str, float]:
    if args.group_size < 2:
        stop("--group-size 1: an advantage relative to the group needs at least 2 episodes")
    if args.ratio == "token" and args.order != "together":
        stop("--ratio token needs --order together: a turn's weight is one number")
    if args.adam_beta1 >= 1:
        stop(f"--adam-beta1 must be below 1, got {args.adam_beta1}")
    with Run(args, "seeupo") as run:
        envs, policy = make_envs(args), load_policy(args)
        optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate,
                                      (args.adam_beta1, 0.999), weight_decay=0)
        reference, bound = twin(policy), 0.2 if args.released else None

        for iteration in run.iterations(policy, optimizer=optimizer):
            # 1. collect num_prompts groups of group_size episodes
            episodes = collect_groups(policy, envs, args, iteration)
            batch = collate(episodes, policy.device)

            # 2. score
            scored = [(e.total_reward, bool(e.info.get("garbage"))) for e in episodes]
            scored = all_gather(torch.tensor(scored, dtype=torch.double)).to(policy.device)
            scores, garbage = scored.T
            rewards = scores if args.plain_rewards else task_reward(scores, garbage.bool())

            # 3. advantages (E,)
            advantages = scaled_advantages(rewards, args.group_size)
            if args.released:
                advantages = advantages.clamp(-3, 3)
            advantages = advantages.split(len(episodes))[rank()]  # of this process

            # 4. update: one step per turn, and the weights for the next one
            updates, running = [], torch.ones_like(advantages)  # (E,) M / A
            lengths = all_gather(torch.tensor([len(e.turns) for e in episodes]))
            m_over_a = advantages.new_ones(len(episodes), int(lengths.max()))  # (E, K), as trained
            rng = random_stream(args.seed, DRAW, iteration)
            for turns in turn_order(m_over_a.shape[1], args.order, rng):
                rows = rows_of_turns(batch, turns)
                m_over_a[rows["episode_id"][:, None], turns] = running[rows["episode_id"], None]
                credit = advantages[:, None] * m_over_a  # (E, K) M
                rows["advantages"] = expand_to_tokens(credit, rows["turn_id"], rows["episode_id"])
                if not all_reduce_sum(rows["advantages"].abs().sum()):
                    continue  # nothing to learn from
                if args.released:
                    rows["old_logprobs"], _ = batch_logprobs(policy, rows, args)
                for _ in range(args.steps_per_turn):
                    updates.append(update(policy, reference, optimizer, rows, args))
                if args.sequential_weights and args.order != "together":
                    logprobs, _ = batch_logprobs(policy, rows, args)
                    mask = rows["turn_id"] >= 0
                    log_ratio = torch.where(mask, logprobs - rows["old_logprobs"], 0.0)
                    running = multiply_weights(running, log_ratio.sum(1) / mask.sum(1),
                                               rows["episode_id"], bound)

            # 5. log (evaluation and checkpoints: run.iterations)
            batch["advantages"] = expand_to_tokens(credit, batch["turn_id"], batch["episode_id"])
            outside = all_gather(((m_over_a < 0.8) | (m_over_a > 1.2)).any(1))
            run.log(iteration, episodes, updates, batch if updates else None,
                    groups_without_signal=groups_without_signal(advantages, args.group_size),
                    task_reward=rewards.mean().item(),
                    weights_outside=outside.double().mean().item())
        return run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
