"""What the order of turn updates does where it can be computed exactly: results/turns.csv.

    python tests/benchmarks/turns.py

A game of 2 or 3 turns. On every turn the player may leave for 0.5 or go on; on the last turn the right action pays
1, the other 0. At first it goes on with probability 0.5 and would do the right thing at the end with 0.2. Every turn has its own
table of logits, all episodes are enumerated and weighted by their probability, so the only difference between
the rows is the order of the updates, the weights M of algos/seeupo.py, and how far a step goes: to the best
response at once, or one gradient step on the logits.
"""

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos.seeupo import multiply_weights, turn_loss, turn_order

BATCHES = (1, 5, 10, 20, 40)


def outcomes(turns: int) -> tuple[Tensor, Tensor, Tensor]:
    """All episodes: actions (E, K), 1 is go on (last turn: the right action); turn_id; returns (E,)."""
    actions, returns = [], []
    for k in range(turns - 1):  # leaves on turn k
        actions.append([1] * k + [0] + [-1] * (turns - 1 - k))
        returns.append(0.5)
    for last in (0, 1):
        actions.append([1] * (turns - 1) + [last])
        returns.append(float(last))
    table = torch.tensor(actions)
    turn_id = torch.where(table >= 0, torch.arange(turns), -1)
    return table, turn_id, torch.tensor(returns, dtype=torch.double)


def logprobs_of(logits: Tensor, actions: Tensor) -> Tensor:
    """logits (K, 2), actions (E, K) -> (E, K), 0 where no action was taken."""
    chosen = torch.log_softmax(logits, 1).expand(len(actions), -1, -1).gather(
        2, actions.clamp(min=0)[:, :, None])[:, :, 0]
    return torch.where(actions >= 0, chosen, 0.0)


def value(logits: Tensor, actions: Tensor, returns: Tensor) -> float:
    return (logprobs_of(logits, actions).sum(1).exp() * returns).sum().item()


def play(turns: int, order: str, weighted: bool, rule: str, batches: int) -> list[float]:
    """The exact value after every batch; one update per turn and batch."""
    actions, turn_id, returns = outcomes(turns)
    logits = torch.log(torch.tensor([[0.5, 0.5]] * (turns - 1) + [[0.8, 0.2]], dtype=torch.double))
    values, rng = [], np.random.default_rng(0)
    for _ in range(batches):
        old = logprobs_of(logits, actions)
        probability = old.sum(1).exp()  # (E,)
        advantages, running = returns - (probability * returns).sum(), torch.ones_like(returns)
        for [turn] in turn_order(turns, order, rng):
            here, weights = turn_id[:, turn] == turn, advantages * running
            if rule == "best response":
                played = [probability[here & (actions[:, turn] == a)].sum() for a in (0, 1)]
                gains = [(probability * weights)[here & (actions[:, turn] == a)].sum() / played[a]
                         for a in (0, 1) if played[a] > 1e-12]  # never played: not known
                if len(gains) == 2 and abs(gains[0] - gains[1]) > 1e-12:
                    best = int(gains[1] > gains[0])
                    logits[turn] = torch.tensor([0.0, -60.0] if best == 0 else [-60.0, 0.0])
            else:
                leaf = logits.clone().requires_grad_()
                marked = torch.where(torch.arange(turns) == turn, turn_id, -1)  # this turn only
                batch = {"old_logprobs": old, "ref_logprobs": old, "turn_id": marked,
                         "advantages": weights[:, None].expand_as(old),
                         "weights": probability[:, None] * (marked >= 0)}
                loss, _ = turn_loss(batch, logprobs_of(leaf, actions), True, 0.2, 0.2, 0.0)
                loss.backward()
                logits = logits - float(rule.split()[-1]) * leaf.grad
            if weighted:
                log_ratio = (logprobs_of(logits, actions) - old)[:, turn]  # an action is one token
                running = multiply_weights(running, log_ratio[here], here.nonzero()[:, 0])
        values.append(value(logits, actions, returns))
    return values


if __name__ == "__main__":
    rules = ["best response", "gradient step 1", "gradient step 10"]
    with open(Path(__file__).resolve().parents[2] / "results/turns.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["turns", "rule", "order", "weights", *(f"value_{n}" for n in BATCHES)])
        for turns, rule, order, weighted in itertools.product(
                (2, 3), rules, ("reverse", "natural", "random"), (True, False)):
            values = play(turns, order, weighted, rule, max(BATCHES))
            row = [turns, rule, order, "yes" if weighted else "no",
                   *(f"{values[n - 1]:.3f}" for n in BATCHES)]
            table.writerow(row)
            print(*row)
