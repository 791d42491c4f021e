"""ArCHer in the maze with exact values instead of a critic: what does the critic cost?

    python tests/benchmarks/oracle.py [--seeds 5]        about 40 seconds a run on a CPU core

Two arms, each with the flags and seeds of maze_archer: `exact` begins at once, `exact_rested` waits for as many
iterations as the critic's warm-up takes. The values are those of the policy as it is, from a linear system over all
cells, and as in Eq. 1 of archer.py a time limit does not end the return. Writes results/oracle.csv, a row per evaluation.
"""

import csv
import dataclasses
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from algos import archer
from envs.episodes import Episode, Turn
from envs.maze import STEPS, Maze
from policies import Policy
from utils import batch_logprobs

ARMS = {"exact": 0, "exact_rested": archer.Args.actor_warm_up}  # iterations before the policy moves


class Oracle:
    """Q and V of a policy that sees the last observation only, in every state of the maze.

    A state is a cell, and whether the last answer was unreadable, because the observation says so.
    """

    def __init__(self, policy: Policy, env: Maze, args: archer.Args):
        self.policy, self.env, self.args, self.states = policy, env, args, []
        self.words = [tuple(policy.tokenizer.encode(word, add_special_tokens=False)) + (policy.end_ids[0],)
                      for word in STEPS]
        self.cells = [cell for cell in env.distance if cell != env.goal]
        for unreadable in (False, True):
            for cell in self.cells:
                env.start(cell)
                observation = env.step("?")[0] if unreadable else env.observation()
                self.states.append(tuple(policy.prompt(Episode(0, observation))[0]))

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Q (states, words + 1), the last column of any other answer, and V (states)."""
        rows = [Turn("", "", list(state), True, list(word), [0.0] * len(word))
                for state in self.states for word in self.words]
        logprobs, _ = batch_logprobs(self.policy, archer.answer_rows(rows, self.policy.device), self.args)
        chance = logprobs.double().sum(1).exp().view(len(self.states), -1).cpu().numpy()
        chance = np.concatenate([chance, 1 - chance.sum(1, keepdims=True)], 1)
        n = len(self.states)
        reward, following = np.full((n, len(self.words) + 1), -1.0), np.zeros((n, len(self.words) + 1, n))
        reward[:, -1] -= self.env.format_penalty
        for i in range(n):
            place = i % len(self.cells)
            following[i, -1, len(self.cells) + place] = 1
            self.env.start(self.cells[place])
            for j, word in enumerate(STEPS):
                there = self.env.neighbour(word)
                if there == self.env.goal:
                    reward[i, j] = 0
                else:
                    following[i, j, self.cells.index(there)] = 1
        discounted = self.args.discount * following  # V = sum_a p (r + discount V'), solved for V
        v = np.linalg.solve(np.eye(n) - (chance[:, :, None] * discounted).sum(1), (chance * reward).sum(1))
        return reward + discounted @ v, v

    def turn_values(self, critic: torch.nn.Module, batch: dict, args: archer.Args) -> tuple:
        """In place of archer.turn_values: of every row, for all heads the same."""
        q, v = self.values()
        found = []
        for tokens, turn_id, start in zip(batch["tokens"].tolist(), batch["turn_id"].tolist(),
                                          batch["starts"].tolist(), strict=True):
            answer = tuple(token for token, turn in zip(tokens, turn_id, strict=True) if turn >= 0)
            i = self.states.index(tuple(tokens[:start]))
            j = self.words.index(answer) if answer in self.words else -1
            found.append([q[i, j], v[i]])
        both = torch.tensor(found, dtype=torch.float32, device=self.policy.device).T
        return tuple(x[:, None].expand(-1, args.num_critics) for x in both)


def run(seed: int, warm_up: int, folder: str, **flags) -> list[dict[str, str]]:
    """The rows of its metrics.csv."""
    args, oracles = archer.Args(
        seed=seed, learning_rate=1e-3, actor_warm_up=warm_up, critic_steps=1, value_target="monte_carlo",
        run_dir=folder, print_samples=0, **flags), []  # the critic still learns a little, but nobody asks it
    load = archer.load_policy

    def load_policy(*given):
        policy = load(*given)
        oracles.append(Oracle(policy, Maze(), args))
        return policy
    with mock.patch.object(archer, "load_policy", load_policy), mock.patch.object(
            archer, "turn_values", lambda *given: oracles[0].turn_values(*given)):
        archer.main(args)
    [path] = Path(folder).glob("*/metrics.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@dataclasses.dataclass
class Options:
    seeds: int = 5  # 1 to so many


def main(options: Options):
    torch.set_num_threads(1)
    rows = []
    for seed in range(1, options.seeds + 1):
        for arm, warm_up in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                metrics = run(seed, warm_up, folder)
            rows += [{"arm": arm, "seed": seed, "iteration": row["iteration"], "success": row["eval_success"],
                      "return": row["eval_return"]} for row in metrics if row["eval_return"]]
            with open(ROOT / "results/oracle.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
