"""turnrl/GuessNumber-v0: find a number, told only whether it is higher or lower than the guess.

Description: the number is one of 1 to `high`. Halving the range finds each of 1023 in ten guesses.
Action: a number and nothing else, with blanks around it or not. Any other text is unreadable.
Observation: first `Guess a number from 1 to 1024.`; then `higher` or `lower`, as seen from the
    guess; after an unreadable action `Write one number from 1 to 1024.`; at the end `Correct.`
Starting state: the number, uniform among those of the split.
Rewards: 1 for the number, else 0, minus `format_penalty` for an unreadable action.
Episode end: terminated by the number (success), truncated after `max_turns` guesses.
Instances: split by the number (crc32 of its digits modulo 5): a fifth is for seeds at or above
    2**30, and is never the number of a training episode.
"""

import re
import zlib

from envs.text_env import EVALUATION_SEEDS, TextEnv


def parse_number(text: str) -> int | None:
    """The number that is the whole text, or None; at most six ASCII digits."""
    text = text.strip()
    return int(text) if re.fullmatch("[0-9]{1,6}", text, flags=re.ASCII) else None


class GuessNumber(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    answer_template = "{answer}"
    action_pattern = "[0-9]{1,6}"

    def __init__(self, high: int = 1024, max_turns: int = 10, noise: float = 0.3,
                 format_penalty: float = 0.1, render_mode: str | None = None):
        super().__init__(render_mode)
        if not 8 <= high <= 999999 or max_turns < 1 or not 0 <= noise <= 1:
            raise ValueError(f"high {high}: 8 to 999999; max_turns {max_turns}: at least 1; noise "
                             f"{noise}: 0 to 1")
        self.high, self.max_turns, self.noise = high, max_turns, noise
        self.format_penalty, self.held_out = format_penalty, False
        self.numbers = {split: [n for n in range(1, high + 1)
                                if (zlib.crc32(str(n).encode()) % 5 == 0) == split]
                        for split in (False, True)}
        self.instructions = (
            f"Find a number from 1 to {high} in at most {max_turns} guesses. Write one number per "
            "turn and nothing else. You are told whether the number is higher or lower.\nExample: "
            f"{high // 2}; you are told lower; {high // 4}; you are told higher; {high * 3 // 8}")

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.held_out = seed >= EVALUATION_SEEDS
        numbers = self.numbers[self.held_out]
        self.start(numbers[self.np_random.integers(len(numbers))])
        return f"Guess a number from 1 to {self.high}.", self.info(None)

    def start(self, number: int):
        """Begin an episode with this number."""
        self.number, self.guesses, self.ended = number, 0, False
        self.lowest, self.highest = 1, self.high  # what the answers so far leave

    def step(self, action: str):
        self.check_running()
        guess = parse_number(self.read(action))
        self.guesses += 1
        success = guess == self.number
        truncated = self.guesses >= self.max_turns and not success
        self.ended = success or truncated
        if guess is None:
            text = f"Write one number from 1 to {self.high}."
        elif success:
            text = "Correct."
        elif guess < self.number:
            text, self.lowest = "higher", max(self.lowest, guess + 1)
        else:
            text, self.highest = "lower", min(self.highest, guess - 1)
        reward = float(success) if guess is not None else 0.0 - self.format_penalty
        return text, reward, success, truncated, self.info(guess)

    def info(self, guess: int | None) -> dict:
        """`left` is how many numbers the answers so far leave."""
        return {"success": guess == self.number, "answer": str(self.number),
                "invalid_action": guess is None and self.guesses > 0,
                "left": self.highest - self.lowest + 1}

    def render(self) -> str:
        return f"{self.lowest} to {self.highest}"

    def demonstrate(self, rng, noise: float | None = None) -> str:
        """The middle of what is left, or with probability `noise` any number from 1 to `high`."""
        if rng.random() < (self.noise if noise is None else noise):
            return str(rng.integers(1, self.high + 1))
        return str((self.lowest + self.highest) // 2)
