"""turnrl/Maze-v0: walk to the goal of a maze that is never shown; every step costs.

Description: a maze of cells, rows from top to bottom, columns from left to right, both from 0. Its
    layout is always the same, so an agent can learn it; a single episode seldom tells the way.
Action: left, right, up or down. A step into a wall stays in place. Any other text stays in place
    too, costs `format_penalty` more and is answered by a line of feedback.
Observation: `at 1 3`, the player's row and column; for a chat model also the goal and the walls
    around: `goal 8 6, you 1 3, walls left up`.
Starting state: any cell but the goal, all equally likely.
Rewards: 0 for the step onto the goal, -1 for any other; minus `format_penalty` for an unreadable
    action. So the return is minus the number of steps before the last one, or -`max_turns`.
Episode end: terminated on the goal (success), truncated after `max_turns` steps.
Instances: the seed draws the start. There are 25 (double_t) or 53 (lake): training and evaluation
    share them.
Source: double_t is the maze of LMRL-Gym (arXiv 2311.18232v1), told in fewer words; lake is
    gymnasium's 8x8 Frozen Lake with walls for holes.
"""

from collections import deque

from gymnasium.envs.toy_text.frozen_lake import MAPS

from envs.text_env import TextEnv, parse_action

STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
LAYOUTS = {  # rows; # is a wall, G the goal
    "double_t": ("#############",
                 "#     #     #",
                 "### ##### ###",
                 "### ##### ###",
                 "### ##### ###",
                 "###       ###",
                 "###### ######",
                 "###### ######",
                 "######G######",
                 "#############"),
    "lake": tuple(row.translate(str.maketrans("SFH", "  #")) for row in MAPS["8x8"])}
RULES = """You walk through a maze that you cannot see. You are told the row and column of the goal,
yours, and where there are walls around you. Rows count from the top, columns from the left.
Each turn, take one step: left, right, up or down. Answer with that one word only.
Example: goal 8 6, you 4 3, walls left right. Your answer: down"""


class Maze(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    instructions = RULES
    action_pattern, action_help = "|".join(STEPS), "Say left, right, up or down."

    def __init__(self, layout: str = "double_t", max_turns: int = 30, noise: float = 0.8,
                 format_penalty: float = 3.0, render_mode: str | None = None):
        super().__init__(render_mode)
        if layout not in LAYOUTS or max_turns < 1 or not 0 <= noise <= 1:
            raise ValueError(f"layout {layout!r}: one of {', '.join(LAYOUTS)}; max_turns "
                             f"{max_turns}: at least 1; noise {noise}: 0 to 1")
        self.max_turns, self.noise, self.format_penalty = max_turns, noise, format_penalty
        self.rows = LAYOUTS[layout]
        self.cells = {(row, column): cell for row, line in enumerate(self.rows)
                      for column, cell in enumerate(line) if cell != "#"}
        [self.goal] = [place for place, cell in self.cells.items() if cell == "G"]
        self.distance = self.distances()

    def distances(self) -> dict[tuple[int, int], int]:
        """How many steps the goal is away from every cell."""
        found, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            row, column = here = queue.popleft()
            for dy, dx in STEPS.values():
                there = (row - dy, column - dx)
                if there in self.cells and there not in found:
                    found[there] = found[here] + 1
                    queue.append(there)
        return found

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        starts = [place for place in self.distance if place != self.goal]
        self.start(starts[self.np_random.integers(len(starts))])
        return self.observation(), self.info()

    def start(self, place: tuple[int, int]):
        """Begin an episode in this cell, (row, column)."""
        self.place, self.turn, self.ended = place, 0, False

    def neighbour(self, word: str) -> tuple[int, int]:
        """Where a step leads."""
        there = tuple(x + d for x, d in zip(self.place, STEPS[word], strict=True))
        return there if there in self.cells else self.place

    def step(self, action: str):
        self.check_running()
        word = parse_action(self.read(action), tuple(STEPS))
        if word is not None:
            self.place = self.neighbour(word)
        self.turn += 1
        success = self.place == self.goal
        truncated = self.turn >= self.max_turns and not success
        self.ended = success or truncated
        reward = float(success) - 1 - self.format_penalty * (word is None)
        feedback = f"Unknown action.{self.help()}\n" if word is None else ""
        return (feedback + self.observation(), reward, success, truncated,
                self.info(success, word is None))

    def info(self, success: bool = False, invalid_action: bool = False) -> dict:
        """`distance`: steps from here to the goal."""
        return {"success": success, "invalid_action": invalid_action,
                "legal_actions": list(STEPS), "distance": self.distance[self.place]}

    def observation(self) -> str:
        row, column = self.place
        if not self.chat:
            return f"at {row} {column}"
        walls = [word for word in STEPS if self.neighbour(word) == self.place]
        goal = f"goal {self.goal[0]} {self.goal[1]}"
        return f"{goal}, you {row} {column}, walls {' '.join(walls) or 'none'}"

    def render(self) -> str:
        row, column = self.place
        lines = list(self.rows)
        lines[row] = lines[row][:column] + "P" + lines[row][column + 1 :]
        return "\n".join(lines)

    def demonstrate(self, rng, noise: float | None = None) -> str:
        """A step of a shortest way, or with probability `noise` any word."""
        words = list(STEPS)
        if rng.random() >= (self.noise if noise is None else noise):
            words = [word for word in words
                     if self.distance[self.neighbour(word)] < self.distance[self.place]]
        return words[rng.integers(len(words))]
