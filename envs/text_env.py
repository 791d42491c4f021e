"""What every text environment of this package has in common."""

import re
import string

import gymnasium as gym

CHARSET = frozenset(string.printable)  # letters, digits, punctuation, space and newline
EVALUATION_SEEDS = 2**30  # reset(seed) below: a training instance; at or above: a held-out instance


def parse_action(text: str, legal_words: tuple[str, ...], tagged: bool = False) -> str | None:
    """The legal word that `text` says, or None.

    The whole text, or with `tagged` what stands inside the first <action>..</action>, is stripped
    and lower-cased and must then equal a legal word: "go left" is not "left".
    """
    if tagged:
        match = re.search(r"<action>(.*?)</action>", text, flags=re.DOTALL)
        text = match.group(1) if match else ""
    word = text.strip().lower()
    return word if word in legal_words else None


class TextEnv(gym.Env):
    """A gymnasium environment whose observations and actions are text.

    Beyond gymnasium: `instructions` are the rules for a pretrained model (its system message),
    `demonstrate(rng)`, if there is one, is the next action of a noisy scripted player (for the warm
    start), and `evaluation_kwargs` are the constructor arguments that differ in an evaluation.

    `chat` says that a pretrained model plays: an action may stand inside other text, as
    `action_pattern` describes it, and an unreadable answer is told the format, `action_help`. The
    tiny model has learned the exact words and gets no such help.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}
    instructions = ""
    chat = False
    action_pattern = action_help = ""
    evaluation_kwargs: dict = {}
    # of the class, so that a copy of the environment need not copy them
    observation_space = gym.spaces.Text(2000, min_length=0, charset=CHARSET)
    action_space = gym.spaces.Text(2000, min_length=0, charset=CHARSET)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.ended = True

    def read(self, text: str) -> str:
        """The first part of a chat model's answer that looks like an action, else all of it.

        >>> env = TextEnv()
        >>> env.chat, env.action_pattern = True, "left|right"
        >>> env.read('I go **Left**, then right.')
        'left'
        """
        if not (self.chat and self.action_pattern):
            return text
        found = re.search(rf"\b({self.action_pattern})\b", re.sub("[\"'`*]", "", text).lower())
        return found[0] if found else text

    def help(self) -> str:
        return f" {self.action_help}" if self.chat else ""

    def check_running(self):
        if self.ended:
            raise gym.error.ResetNeeded("the episode has ended: call reset() before step()")
