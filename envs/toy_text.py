"""turnrl/ToyText-v0: gymnasium's FrozenLake, CliffWalking, Taxi and Blackjack in words.

Description: an adapter. `--env-id Taxi-v4` (or any other id of gymnasium's toy_text family) plays
    the game through it; the rules, rewards and episode ends are gymnasium's.
Action: one of the game's words, see GAMES. Any other text leaves the game as it is, costs a turn
    and `format_penalty`, and is answered by a line of feedback.
Observation: the map for the grid games, a sentence for Taxi and Blackjack.
Episode end: the game's own; truncated after `max_turns` turns. success = reward above 0 at the end
    (Cliff walking: the goal is reached, which alone ends that game).
Instances: these games draw little or nothing from the seed, so training and evaluation share
    instances: use them to try an algorithm, not to measure generalisation.
"""

import re
from functools import cached_property

import gymnasium as gym
import numpy as np

from envs.text_env import TextEnv, parse_action

GAMES = {  # class name: (action words in the engine's order, rules)
    "FrozenLakeEnv": (("left", "down", "right", "up"),
                      "Reach the goal G from the start S; F is ice, H a hole. [ ] marks you. "
                      "The ice may be slippery."),
    "CliffWalkingEnv": (("up", "right", "down", "left"),
                        "Walk to the target T without stepping on the cliff C. x marks you."),
    "TaxiEnv": (("south", "north", "east", "west", "pickup", "dropoff"),
                "Drive the taxi to the passenger, pick up, drive to the destination, drop off."),
    "BlackjackEnv": (("stick", "hit"),
                     "Get a hand closer to 21 than the dealer's without going over."),
}
TAXI_STOPS = "Red (row 0, column 0), Green (0, 4), Yellow (4, 0), Blue (4, 3)"


class ToyText(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}

    def __init__(self, game: str = "FrozenLake-v1", max_turns: int = 50,
                 format_penalty: float = 1.0, render_mode: str | None = None, **game_kwargs):
        super().__init__(render_mode)
        engine = gym.make(game, disable_env_checker=True, **game_kwargs).unwrapped
        if type(engine).__name__ not in GAMES:
            raise ValueError(f"{game} is not one of gymnasium's toy_text games")
        if not isinstance(engine, gym.envs.toy_text.BlackjackEnv):
            engine.render_mode = "ansi"  # Blackjack has no text rendering
        self.engine, self.max_turns, self.format_penalty = engine, max_turns, format_penalty
        self.words, rules = GAMES[type(engine).__name__]
        self.instructions = (f"{rules} Answer with one word only: {', '.join(self.words)}.\n"
                             f"Example: {self.words[-1]}")
        self.action_pattern = "|".join(self.words)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.state, _ = self.engine.reset(seed=seed)
        self.turn, self.ended = 0, False
        return self.describe(), self.info(seed=seed)

    def step(self, action: str):
        self.check_running()
        word = parse_action(self.read(action), self.words)
        invalid, reward, terminated = word is None, 0.0, False
        if not invalid:
            self.state, reward, terminated, _, _ = self.engine.step(self.words.index(word))
        self.turn += 1
        truncated = self.turn >= self.max_turns and not terminated
        self.ended = terminated or truncated
        goal = isinstance(self.engine, gym.envs.toy_text.CliffWalkingEnv) or reward > 0
        info = self.info(success=terminated and bool(goal), invalid_action=invalid)
        feedback = f"Unknown action. Say {', '.join(self.words)}.\n" if invalid else ""
        reward = float(reward) - self.format_penalty * invalid
        return feedback + self.describe(), reward, bool(terminated), truncated, info

    def info(self, success: bool = False, invalid_action: bool = False, **extra) -> dict:
        return {"success": success, "invalid_action": invalid_action,
                "legal_actions": list(self.words), **extra}

    def describe(self) -> str:
        if isinstance(self.engine, gym.envs.toy_text.BlackjackEnv):
            total, dealer, usable_ace = self.state
            ace = "with" if usable_ace else "without"
            return f"Your hand: {total}, {ace} a usable ace. The dealer shows {dealer}."
        if isinstance(self.engine, gym.envs.toy_text.TaxiEnv):
            row, column, passenger, destination = map(int, self.engine.decode(self.state))
            stops = ("Red", "Green", "Yellow", "Blue", "the taxi")
            return (f"Stops: {TAXI_STOPS}. Taxi at row {row}, column {column}. Passenger in "
                    f"{stops[passenger]}, wants to go to {stops[destination]}.")
        # the renderer marks the player's cell by a colour; keep the mark, drop the colour
        text = re.sub(r"\x1b\[\d+m(.)\x1b\[0m", r"[\1]", self.engine.render())
        lines = [line.strip() for line in text.splitlines()]
        return "\n".join(line for line in lines if line and not line.startswith("("))

    def render(self) -> str:
        return self.describe()

    @cached_property
    def best_actions(self) -> np.ndarray:
        """The optimal action of every state, by value iteration on the game's transition table."""
        table = self.engine.P  # table[state][action] = [(probability, next state, reward, end)]
        values, discount = np.zeros(len(table)), 0.99
        for _ in range(300):
            action_values = np.array([[sum(p * (r + discount * values[s] * (not end))
                                           for p, s, r, end in table[state][action])
                                       for action in range(len(self.words))]
                                      for state in range(len(table))])
            if np.abs(action_values.max(1) - values).max() < 1e-6:
                break
            values = action_values.max(1)
        return action_values.argmax(1)

    def demonstrate(self, rng, noise: float = 0.3) -> str:
        """The optimal action (Blackjack: stick from 17 on), or with probability `noise` any."""
        if rng.random() < noise:
            return self.words[rng.integers(len(self.words))]
        if isinstance(self.engine, gym.envs.toy_text.BlackjackEnv):
            return "stick" if self.state[0] >= 17 else "hit"
        return self.words[self.best_actions[int(self.state)]]
