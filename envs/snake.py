"""turnrl/Snake-v0: eat apples, do not hit a wall or a snake, while a second snake moves at random.

Description: the competitive snake game of Dilkes et al. (arXiv 2508.10839), rules engine our own.
Action: up, down, left or right; the whole board moves at once. Any other text plays `up`, costs
    `format_penalty` and is answered by a line of feedback.
Observation: rows from top to bottom: 1 own head, 2 enemy head, T any body, A apple, _ empty.
Starting state: snakes of length 1 and the apples, all on different random cells.
Rewards: `apple_reward` per apple, `death_reward` once on dying, `step_reward` every turn; minus
    `format_penalty` for an unreadable action. In evaluation the last two are 0.
Episode end: terminated when the own snake dies or no opponent is left (if there were any);
    truncated after `max_turns` turns. success = alive at the end.
Instances: layouts repeat in under 1 % of seeds; training and evaluation seeds are disjoint.
"""

import numpy as np

from envs.text_env import TextEnv, parse_action

MOVES = {"up": (0, 1), "down": (0, -1), "left": (-1, 0), "right": (1, 0)}
RULES = """You are a snake on a board, seen from above. Eat apples; do not hit a wall or any snake.
The board shows 1 for your head, 2 for an enemy head, T for a body, A for an apple and _ for empty.
Each turn, move one cell: up, down, left or right. """


class Snake(TextEnv):
    action_pattern, action_help = "|".join(MOVES), "Say up, down, left or right."
    evaluation_kwargs = {"format_penalty": 0.0, "step_reward": 0.0}

    def __init__(self, width: int = 5, height: int = 5, apples: int = 3, opponents: int = 1,
                 max_turns: int = 8, apple_reward: float = 1.0, death_reward: float = -2.0,
                 step_reward: float = -0.01, format_penalty: float = 1.0, author_text: bool = False,
                 tagged: bool = False, render_mode: str | None = None):
        super().__init__(render_mode)
        if apples + opponents + 1 > width * height:
            raise ValueError(f"{apples} apples and {opponents + 1} snakes do not fit on "
                             f"{width} x {height} cells")
        self.width, self.height, self.max_turns = width, height, max_turns
        self.num_apples, self.num_opponents = apples, opponents
        self.apple_reward, self.death_reward = apple_reward, death_reward
        self.step_reward, self.format_penalty = step_reward, format_penalty
        self.author_text, self.tagged = author_text, tagged
        self.instructions = RULES + ("Write your move inside <action> and </action>." if tagged
                                     else "Answer with that one word only.\nExample: your head "
                                     "at (2, 2), an apple at (2, 4). Your answer: up")

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.last_seed = seed
        # layout and opponents have a stream each, so that one never shifts the other
        streams = np.random.SeedSequence(int(self.np_random.integers(2**31))).spawn(2)
        self.layout_rng, self.opponent_rng = map(np.random.default_rng, streams)
        cells = [(x, y) for x in range(self.width) for y in range(self.height)]
        order = [cells[i] for i in self.layout_rng.permutation(len(cells))]
        count = 1 + self.num_opponents
        self.start([[cell] for cell in order[:count]], order[count : count + self.num_apples])
        return self.observation(), self.info()

    def start(self, snakes: list[list[tuple]], apples: list[tuple]):
        """Begin an episode with these bodies (head first, own snake first) and apples."""
        self.snakes = dict(enumerate(snakes))  # 0 is the own snake; dead snakes are removed
        self.apples, self.turn, self.ended = list(apples), 0, False

    def step(self, action: str):
        self.check_running()
        text = action if self.tagged else self.read(action)
        word = parse_action(text, tuple(MOVES), self.tagged)
        invalid = word is None
        moves = {i: self.opponent_move(body) for i, body in self.snakes.items() if i > 0}
        eaten = self.move({0: word or "up", **moves})
        self.turn += 1
        alive = 0 in self.snakes
        won = self.num_opponents > 0 and len(self.snakes) == 1
        terminated = not alive or won
        truncated = self.turn >= self.max_turns and not terminated
        self.ended = terminated or truncated
        reward = self.apple_reward * eaten + self.step_reward + self.death_reward * (not alive)
        reward -= self.format_penalty * invalid
        info = self.info(success=alive and self.ended, invalid_action=invalid)
        form = "" if self.tagged else self.help()
        feedback = f"Unknown action, so you moved up.{form}\n" if invalid else ""
        return feedback + self.observation(), reward, terminated, truncated, info

    def move(self, moves: dict[int, str]) -> int:
        """Move every snake at once; return how many apples the own snake ate (0 or 1)."""
        old_cells = {cell for body in self.snakes.values() for cell in body}
        heads = {i: tuple(np.add(body[0], MOVES[moves[i]]).tolist())
                 for i, body in self.snakes.items()}
        dead = {i for i, head in heads.items()
                if not self.on_board(head) or head in old_cells  # also a tail about to leave
                or list(heads.values()).count(head) > 1}
        eaters = []
        for i, head in heads.items():
            if i in dead:
                del self.snakes[i]
            elif head in self.apples:
                self.apples.remove(head)
                self.snakes[i].insert(0, head)
                eaters.append(i)
            else:
                self.snakes[i] = [head, *self.snakes[i][:-1]]
        for _ in eaters:  # every eaten apple comes back on a free cell, if there is one
            if free := self.free_cells():
                self.apples.append(free[self.layout_rng.integers(len(free))])
        return int(0 in eaters)

    def opponent_move(self, body: list[tuple]) -> str:
        """Uniform over the moves that avoid walls and the own body; one random number a step."""
        blocked = body[:-1] if len(body) > 2 else body
        safe = [word for word, step in MOVES.items()
                if self.on_board(cell := tuple(np.add(body[0], step).tolist()))
                and cell not in blocked]
        choices = safe or list(MOVES)
        return choices[int(self.opponent_rng.random() * len(choices))]

    def on_board(self, cell: tuple) -> bool:
        return 0 <= cell[0] < self.width and 0 <= cell[1] < self.height

    def free_cells(self) -> list[tuple]:
        taken = {cell for body in self.snakes.values() for cell in body} | set(self.apples)
        return [(x, y) for x in range(self.width) for y in range(self.height)
                if (x, y) not in taken]

    def info(self, success: bool = False, invalid_action: bool = False) -> dict:
        return {"success": success, "invalid_action": invalid_action, "seed": self.last_seed,
                "legal_actions": list(MOVES)}

    def observation(self) -> str:
        signs = dict.fromkeys(self.apples, "A")
        for i, body in self.snakes.items():
            signs |= dict.fromkeys(body[1:], "T") | {body[0]: "1" if i == 0 else "2"}
        rows = [[signs.get((x, y), "_") for x in range(self.width)]
                for y in reversed(range(self.height))]
        if not (self.author_text or self.chat):
            return "\n".join(map("".join, rows))
        lines = [f"Board: {self.width} x {self.height}",
                 f"Apples (worth {self.apple_reward:g}): {self.apples}"]
        lines += [f"{'You' if i == 0 else 'Enemy'}: head {body[0]}, body {body[1:]}"
                  for i, body in sorted(self.snakes.items(), reverse=True)]
        lines += ["1 you, 2 enemy, T body, A apple, _ empty"]
        return "\n".join([*lines, *map(" ".join, rows)])

    def render(self) -> str:
        return self.observation()

    def demonstrate(self, rng, noise: float = 0.3) -> str:
        """Towards the nearest apple along a safe cell, or with probability `noise` any word."""
        words = [list(MOVES)[i] for i in rng.permutation(4)]
        word = words[0] if rng.random() < noise else self.greedy_move(words)
        return f"<action>{word}</action>" if self.tagged else word

    def greedy_move(self, words: list[str]) -> str:
        """The first of `words` that leads closest to an apple without dying, if any does."""
        cells = {cell for body in self.snakes.values() for cell in body}
        targets = {word: tuple(np.add(self.snakes[0][0], MOVES[word]).tolist()) for word in words}
        safe = [w for w in words if self.on_board(targets[w]) and targets[w] not in cells]
        return min(safe or words, key=lambda word: min(
            (abs(x - targets[word][0]) + abs(y - targets[word][1]) for x, y in self.apples),
            default=0))
