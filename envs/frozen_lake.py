"""turnrl/FrozenLake-v0: cross a random frozen lake to the goal without falling into a hole.

Description: gymnasium's FrozenLake-v1 on a new random map each episode, played in words.
Action: left, down, right or up. A move off the board stays in place and costs a turn. Any other
    text plays `left`, costs `format_penalty` and is answered by a line of feedback.
Observation: the map, rows from top to bottom: P player, O hole, G goal, _ ice.
Starting state: the player is top left, the goal bottom right; a path always exists.
Rewards: 1 on reaching the goal, else 0; minus `format_penalty` for an unreadable action.
Episode end: terminated at the goal (success) or in a hole; truncated after `max_turns` turns.
Instances: a map is held out if crc32 of its rows is divisible by 5. Seeds from 2**30 on draw
    held-out maps, lower seeds the others, so no evaluation map is ever met in training.
"""

import zlib
from collections import deque

from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from envs.text_env import EVALUATION_SEEDS, TextEnv, parse_action

ACTIONS = ("left", "down", "right", "up")  # the engine's order, 0..3
EXAMPLE = """
Example: Player position: (0, 3), Holes: (0, 2), Goal: (3, 0). Your answer: right"""
RULES = """You cross a frozen lake, seen from above. Reach the goal without stepping into a hole.
The map shows P for you, O for a hole, G for the goal and _ for safe ice.
Each turn, move one cell: left, down, right or up. """


class FrozenLake(TextEnv):
    action_pattern, action_help = "|".join(ACTIONS), "Say left, down, right or up."
    evaluation_kwargs = {"format_penalty": 0.0}
    held_out = False

    def __init__(self, size: int = 4, frozen_share: float = 0.8, slippery: bool = False,
                 max_turns: int = 8, format_penalty: float = 1.0, coordinates: bool = False,
                 author_text: bool = False, tagged: bool = False, render_mode: str | None = None):
        super().__init__(render_mode)
        self.size, self.frozen_share, self.slippery = size, frozen_share, slippery
        self.max_turns, self.format_penalty = max_turns, format_penalty
        self.coordinates, self.author_text, self.tagged = coordinates, author_text, tagged
        self.instructions = RULES + ("Write your move inside <action> and </action>." if tagged
                                     else "Answer with that one word only." + EXAMPLE)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.last_seed = seed
        if seed is not None:  # without a seed the split stays what it was
            self.held_out = seed >= EVALUATION_SEEDS
        for _ in range(10000):
            map_seed = int(self.np_random.integers(2**31))
            desc = generate_random_map(self.size, self.frozen_share, seed=map_seed)
            if (zlib.crc32("\n".join(desc).encode()) % 5 == 0) == self.held_out:
                self.start(desc)
                return self.observation(), self.info()
        split = "evaluation" if self.held_out else "training"
        raise ValueError(f"no map of size {self.size} with {self.frozen_share:.0%} ice belongs to "
                         f"the {split} split")

    def start(self, desc: list[str]):
        """Begin an episode on the map `desc` (rows of S, F, H, G)."""
        self.engine = FrozenLakeEnv(desc=desc, is_slippery=self.slippery)
        self.desc, self.turn, self.ended = list(desc), 0, False
        self.state, _ = self.engine.reset(seed=int(self.np_random.integers(2**31)))

    def step(self, action: str):
        self.check_running()
        text = action if self.tagged else self.read(action)
        word = parse_action(text, ACTIONS, self.tagged)
        invalid = word is None
        self.state, reward, terminated, _, _ = self.engine.step(ACTIONS.index(word or "left"))
        self.turn += 1
        truncated = self.turn >= self.max_turns and not terminated
        self.ended = terminated or truncated
        reward = float(reward)
        info = self.info(success=reward == 1.0, invalid_action=invalid)
        form = "" if self.tagged else self.help()
        feedback = f"Unknown action, so you moved left.{form}\n" if invalid else ""
        reward -= self.format_penalty * invalid
        return feedback + self.observation(), reward, terminated, truncated, info

    def info(self, success: bool = False, invalid_action: bool = False) -> dict:
        return {"success": success, "invalid_action": invalid_action, "seed": self.last_seed,
                "legal_actions": list(ACTIONS)}

    def observation(self) -> str:
        cells = "".join(self.desc).translate(str.maketrans("SFH", "__O"))
        cells = cells[: self.state] + "P" + cells[self.state + 1 :]
        rows = [cells[i : i + self.size] for i in range(0, self.size**2, self.size)]
        author_text = self.author_text or self.chat
        if not (author_text or self.coordinates):
            return "\n".join(rows)
        if author_text:
            rows = ["P player, O hole, G goal, _ ice", *(" ".join(row) for row in rows)]
        holes = [i for i, cell in enumerate("".join(self.desc)) if cell == "H"]
        return "\n".join([*rows, f"Player position: {self.position(self.state)}",
                          "Holes: " + (", ".join(map(self.position, holes)) or "none"),
                          f"Goal: {self.position(self.size**2 - 1)}"])

    def position(self, state: int) -> str:
        """(x, y) with (0, 0) bottom left."""
        return f"({state % self.size}, {self.size - 1 - state // self.size})"

    def render(self) -> str:
        return self.observation()

    def demonstrate(self, rng, noise: float = 0.4) -> str:
        """The first step of a shortest safe path, or with probability `noise` any word."""
        word = ACTIONS[rng.integers(4)] if rng.random() < noise else self.shortest_path(rng)[0]
        return f"<action>{word}</action>" if self.tagged else word

    def shortest_path(self, rng) -> list[str]:
        """The words of a shortest path to the goal, from the player's cell."""
        frozen, size = "".join(self.desc), self.size
        queue, paths = deque([self.state]), {self.state: []}
        while queue:
            here = queue.popleft()
            if frozen[here] == "G":
                return paths[here]
            row, column = divmod(here, size)
            for index in rng.permutation(4):  # so that equally short paths are equally likely
                dx, dy = ((-1, 0), (0, 1), (1, 0), (0, -1))[index]
                x, y = column + dx, row + dy
                there = y * size + x
                on_board = 0 <= x < size and 0 <= y < size
                if on_board and frozen[there] != "H" and there not in paths:
                    paths[there] = [*paths[here], ACTIONS[index]]
                    queue.append(there)
        raise AssertionError("the generator guarantees a path")
