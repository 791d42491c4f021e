"""turnrl/Trust-v0: take something for sure, or trust that your own last move will be right.

Description: the smallest game in which the order of updates matters. Staying is worth it only for
    a player who is good at the last round, and only a player who stays can become good at it.
Action: `leave` or `stay`; in the last round `left` or `right`. Any other text ends the game with
    nothing and costs `format_penalty`.
Observation: `round 1 of 3: leave or stay`, the last one `round 3 of 3: left or right`; after the
    end an empty line, or feedback if the action was unreadable.
Starting state: round 1. Nothing is random: all instances are the same.
Rewards: 0.5 for leaving, 1 for `left` in the last round, 0 for `right`.
Episode end: terminated by leaving or by the last round; success if the last move was right.
Instances: one. This is a game to look at an algorithm with, not at generalisation.

With 3 rounds the scripted player, who stays with probability 0.5 and is right with 0.2, earns
0.5 * 0.5 + 0.25 * 0.5 + 0.25 * 0.2 = 0.425. tests/benchmarks/turns.py computes the game exactly.
"""

from envs.text_env import TextEnv, parse_action

CHOICES, LAST_CHOICES = ("leave", "stay"), ("left", "right")
SAFE = 0.5  # what leaving pays
TRUST, SKILL = 0.5, 0.2  # how often the scripted player stays, and is right in the last round
RULES = """You play a game of a few rounds. In every round but the last, leave with a sure reward,
or stay. In the last round one of two words wins everything; find out which.
Answer with one word only, one of the two that you are offered.
Example: round 1 of 3: leave or stay. Your answer: stay"""


class Trust(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    instructions = RULES

    def __init__(self, rounds: int = 2, format_penalty: float = 0.1,
                 render_mode: str | None = None):
        super().__init__(render_mode)
        if rounds < 2:
            raise ValueError(f"rounds {rounds}: at least 2")
        self.rounds, self.format_penalty = rounds, format_penalty

    @property
    def words(self) -> tuple[str, str]:
        """What the round offers."""
        return LAST_CHOICES if self.round == self.rounds else CHOICES

    @property
    def action_pattern(self) -> str:
        return "|".join(self.words)

    @property
    def action_help(self) -> str:
        return f"Say {' or '.join(self.words)}."

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.round, self.ended = 1, False
        return self.observation(), self.info()

    def step(self, action: str):
        self.check_running()
        word = parse_action(self.read(action), self.words)
        success = word == "left"
        if word == "stay":
            self.round += 1
            return self.observation(), 0.0, False, False, self.info()
        self.ended = True
        reward = float(success) + SAFE * (word == "leave")
        reward -= self.format_penalty * (word is None)
        feedback = f"Unknown action.{self.help()}" if word is None else ""
        return feedback, reward, True, False, self.info(success, word is None)

    def info(self, success: bool = False, invalid_action: bool = False) -> dict:
        return {"success": success, "invalid_action": invalid_action,
                "legal_actions": list(self.words)}

    def observation(self) -> str:
        return f"round {self.round} of {self.rounds}: {' or '.join(self.words)}"

    def render(self) -> str:
        return self.observation()

    def demonstrate(self, rng) -> str:
        """Stays with probability TRUST; in the last round it is right with SKILL."""
        if self.round == self.rounds:
            return "left" if rng.random() < SKILL else "right"
        return "stay" if rng.random() < TRUST else "leave"
