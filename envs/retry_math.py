"""turnrl/RetryMath-v0: one small problem, up to five answers, and only "Incorrect." in between.

Description: a problem with one right answer. After a wrong answer the same fixed sentence follows,
    whatever was wrong (unary feedback): nothing is learned but that this answer is not it.
Action: text with exactly one `<answer>NUMBER</answer>`; around it anything, inside it an optional
    sign and 1 to 6 ASCII digits. Any other text is malformed.
Observation: first `Problem: (7 * 8) mod 5 = ?`; then `Incorrect. Please think again.` or, after a
    malformed action, `No answer found. Write <answer>number</answer>.`; at the end `Correct.`
Starting state: a level out of `levels`, then numbers:
    1  `(7 * 8) mod 5 = ?`              m 3..9, a and b 2..9            candidates 0..m-1
    2  `3 * x + 4 = 19. x = ?`          a 2..5, x 1..9, b 0..9          candidates 1..9
    3  `(3 * x + 4) mod 7 = 5. x = ?`   m 5 or 7, a 1..m-1, b, x 0..m-1 candidates 0..m-1
    4  `7 + 8 = ?`                      a and b 1..20                   candidates 2..40
    5  `9 - 4 = ?`                      a 5..30, b 1..a                 candidates 0..29
    6  `twelve apples = ?`              1..20 of twelve things          candidates 1..20
Rewards: 1 for the right answer, 0 for a wrong one, minus `format_penalty` for a malformed action.
Episode end: terminated by the right answer (success) or after `max_answers` actions.
Instances: split by the problem's text (crc32 modulo 5): a fifth is for seeds at or above 2**30.
"""

import re
import zlib

from envs.text_env import EVALUATION_SEEDS, TextEnv

CANDIDATES = {"2": (1, 9), "4": (2, 40), "5": (0, 29), "6": (1, 20)}  # others: 0 to m - 1
FIRST_RIGHT = {"6": 0.3}  # how often the scripted player's first answer is right; others: 0.75
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
           "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
           "nineteen", "twenty")
THINGS = ("apples", "boxes", "cats", "doors", "eggs", "flags", "gates", "hats", "jars", "keys",
          "lamps", "maps")
ANSWER = re.compile(r".*<answer>\s*([+-]?[0-9]{1,6})\s*</answer>.*", flags=re.ASCII | re.DOTALL)
TRY_AGAIN, NO_ANSWER = ("Incorrect. Please think again.",
                        "No answer found. Write <answer>number</answer>.")


def parse_answer(text: str) -> str | None:
    """The number inside the only answer tags, as `str(int(..))` writes it, or None."""
    match = ANSWER.fullmatch(text)
    alone = text.count("<answer>") == text.count("</answer>") == 1
    return str(int(match[1])) if match and alone else None


class RetryMath(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    instructions = ("Solve the problem. Reply with <answer>number</answer>. If it is wrong you are "
                    "asked again.\nExample: (7 * 8) mod 5 = ? Your answer: <answer>1</answer>")
    answer_template = "<answer>{answer}</answer>"

    def __init__(self, levels: str = "16", max_answers: int = 5, feedback: str = "unary",
                 show_answers_left: bool = False, format_penalty: float = 0.1,
                 render_mode: str | None = None):
        super().__init__(render_mode)
        levels = str(levels)
        if not levels or set(levels) - set("123456"):
            raise ValueError(f"levels {levels!r}: digits out of 123456")
        if feedback not in ("unary", "unary-reward", "blank"):
            raise ValueError(f"feedback {feedback!r}: choose from unary, unary-reward, blank")
        if max_answers < 1:
            raise ValueError(f"max_answers {max_answers}: at least 1")
        self.levels, self.max_answers, self.feedback = levels, max_answers, feedback
        self.show_answers_left, self.format_penalty = show_answers_left, format_penalty
        self.held_out = False  # until a seed says so

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.held_out = seed >= EVALUATION_SEEDS
        level = self.levels[self.np_random.integers(len(self.levels))]
        while True:
            text, answer, candidates = self.draw(level)
            if (zlib.crc32(text.encode()) % 5 == 0) == self.held_out:
                break
        self.start(text, answer, level, candidates)
        return self.remind(f"Problem: {text}"), self.info(None)

    def start(self, text: str, answer: int, level: str, candidates: tuple[int, int]):
        """Begin an episode with this problem."""
        self.text, self.answer, self.level, self.candidates = text, answer, level, candidates
        self.answers: list[str | None] = []
        self.ended = False

    def draw(self, level: str) -> tuple[str, int, tuple[int, int]]:
        """A problem's text, its right answer, and its lowest and highest candidate."""
        def pick(low, high):
            return int(self.np_random.integers(low, high + 1))
        if level == "1":
            m, a, b = pick(3, 9), pick(2, 9), pick(2, 9)
            return f"({a} * {b}) mod {m} = ?", a * b % m, (0, m - 1)
        if level == "2":
            a, x, b = pick(2, 5), pick(1, 9), pick(0, 9)
            return f"{a} * x + {b} = {a * x + b}. x = ?", x, CANDIDATES[level]
        if level == "3":
            m = (5, 7)[pick(0, 1)]
            a, b, x = pick(1, m - 1), pick(0, m - 1), pick(0, m - 1)
            return f"({a} * x + {b}) mod {m} = {(a * x + b) % m}. x = ?", x, (0, m - 1)
        if level == "4":
            a, b = pick(1, 20), pick(1, 20)
            return f"{a} + {b} = ?", a + b, CANDIDATES[level]
        if level == "5":
            a = pick(5, 30)
            b = pick(1, a)
            return f"{a} - {b} = ?", a - b, CANDIDATES[level]
        x, thing = pick(1, len(NUMBERS)), THINGS[pick(0, len(THINGS) - 1)]
        return f"{NUMBERS[x - 1]} {thing} = ?", x, CANDIDATES[level]

    def step(self, action: str):
        self.check_running()
        submitted = parse_answer(self.read(action))
        self.answers.append(submitted)
        success = submitted == str(self.answer)
        self.ended = success or len(self.answers) >= self.max_answers
        text = "Correct." if success else NO_ANSWER if submitted is None else TRY_AGAIN
        reward = float(success) if submitted is not None else 0.0 - self.format_penalty
        if text == TRY_AGAIN and self.feedback == "blank":
            text = ""
        if self.feedback == "unary-reward":
            text = f"Reward: {reward}\n{text}"
        return self.remind(text), reward, self.ended, False, self.info(submitted)

    def read(self, text: str) -> str:
        """Of a chat model also a number without tags: the last one."""
        numbers = re.findall(r"-?[0-9]{1,6}", text, flags=re.ASCII)
        bare = self.chat and numbers and "<answer>" not in text
        return f"<answer>{numbers[-1]}</answer>" if bare else text

    def remind(self, text: str) -> str:
        if self.show_answers_left and not self.ended:
            return f"{text}\nAnswers left: {self.max_answers - len(self.answers)}"
        return text

    def info(self, submitted: str | None) -> dict:
        low, high = self.candidates
        return {"success": submitted == str(self.answer), "submitted": submitted,
                "answer": str(self.answer), "level": int(self.level),
                "invalid_action": submitted is None and len(self.answers) > 0,
                "in_range": submitted is not None and low <= int(submitted) <= high}

    def render(self) -> str:
        return self.text

    def demonstrate(self, rng, malformed: float = 0.03, first_right: float | None = None,
                    repeat: float = 0.9, retry_right: float = 0.3) -> str:
        """An answer of a player that mostly knows, and mostly repeats itself when told it is wrong.

        Malformed with probability `malformed`; else the last answer again with `repeat`; else right
        with `first_right` (None: as FIRST_RIGHT says), or `retry_right` once it has answered; else
        a wrong one within 3 of it. So an imitator can read number words, but samples badly.
        """
        if first_right is None:
            first_right = FIRST_RIGHT.get(self.level, 0.75)
        given = [answer for answer in self.answers if answer is not None]
        low, high = self.candidates
        if rng.random() < malformed:
            return ("<answer></answer>", "? ?", str(rng.integers(low, high + 1)))[rng.integers(3)]
        if given and rng.random() < repeat:
            return f"<answer>{given[-1]}</answer>"
        answer = self.answer
        if rng.random() >= (retry_right if given else first_right):
            near = [x for x in range(low, high + 1) if 0 < abs(x - answer) <= 3]
            answer = near[rng.integers(len(near))]
        return f"<answer>{answer}</answer>"
