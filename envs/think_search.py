"""turnrl/ThinkSearch-v0: follow a chain of pages; which is next is a sum best done in writing.

Description: each page shows three digits from 0 to 4; their sum modulo 5 is the next page. A small
    model that writes down partial sums gets it right, one that answers at once guesses. Doing the
    sum again helps nobody, and in a context of fixed length later pages do not fit any more.
Action: a thought, the word `so`, and a command: `sum 3 2 4 so go 4`. What stands before the first
    ` so ` is free. The commands are `go X` with X from 0 to 4 and, where it is allowed, `look` (the
    same page again). Any other text is unreadable: the same page again, and the turn is spent.
Observation: first `hops 4 page 3 4 2`, then `page 0 1 1`; after an unreadable action with
    `unknown` in front; at the end an empty line.
Starting state: H hops and the digits of all pages. All chance is in `reset`.
Rewards: 1 for the last right hop, else 0; minus `format_penalty` for an unreadable action.
Episode end: terminated by the last right hop (success). A wrong hop is not told: other pages
    follow until the episode is truncated after `max_turns`.
Instances: split by seed; two seeds seldom give the same pages (125 to the power of H).
"""

from envs.text_env import TextEnv

REGIMES = {  # fewest and most hops, turns; how often the scripted player looks again, and slips
    "thoughts": (4, 4, 4, 0.0, 0.0), "turns": (2, 3, 8, 0.3, 0.05)}
MODULUS, DIGITS = 5, 3


class ThinkSearch(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    end_of_thought = " so"
    instructions = """You follow a chain of pages. Every page shows three digits; their sum
modulo 5 is the next page. Each turn, write your thoughts (short: space is limited), the word "so"
and where you go. For "page 3 4 2", the partial sums are 3 2 4: sum 3 2 4 so go 4"""

    def __init__(self, regime: str = "thoughts", min_hops: int | None = None,
                 max_hops: int | None = None, max_turns: int | None = None,
                 look: float | None = None, slip: float | None = None, max_passes: int = 10,
                 format_penalty: float = 0.0, render_mode: str | None = None):
        super().__init__(render_mode)
        if regime not in REGIMES:
            raise ValueError(f"regime {regime!r}: choose from {', '.join(REGIMES)}")
        self.min_hops, self.max_hops, self.max_turns, self.look, self.slip = (
            preset if value is None else value for value, preset in zip(
                (min_hops, max_hops, max_turns, look, slip), REGIMES[regime], strict=True))
        if not 1 <= self.min_hops <= self.max_hops <= self.max_turns:
            raise ValueError(f"{self.min_hops} to {self.max_hops} hops in {self.max_turns} turns")
        self.max_passes, self.format_penalty = max_passes, format_penalty

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        hops = int(self.np_random.integers(self.min_hops, self.max_hops + 1))
        pages = self.np_random.integers(MODULUS, size=(hops + self.max_turns, DIGITS)).tolist()
        self.start(pages[:hops], pages[hops:])
        return f"hops {hops} {self.page()}", self.info("page")

    def start(self, pages: list[list[int]], strange: list[list[int]]):
        """Begin an episode: `pages` are those of the chain, `strange` those after a wrong hop."""
        self.pages, self.strange = pages, strange
        self.turn, self.right, self.wrong, self.ended = 0, 0, 0, False

    def digits(self) -> list[int]:
        return self.strange[self.wrong - 1] if self.wrong else self.pages[self.right]

    def page(self) -> str:
        return "page " + " ".join(map(str, self.digits()))

    def step(self, action: str):
        self.check_running()
        self.turn += 1
        words, kind = action.partition(f"{self.end_of_thought} ")[2].split(), "unreadable"
        if words == ["look"] and self.look > 0:
            kind = "look"
        elif len(words) == 2 and words[0] == "go" and words[1] in [str(x) for x in range(MODULUS)]:
            right = int(words[1]) == sum(self.digits()) % MODULUS and not self.wrong
            kind = "hop" if right else "wrong"
            self.right += right
            self.wrong += not right
        success = self.right == len(self.pages)
        truncated = self.turn >= self.max_turns and not success
        self.ended = success or truncated
        text = "" if self.ended else "unknown " * (kind == "unreadable") + self.page()
        reward = float(success) - self.format_penalty * (kind == "unreadable")
        return text, reward, success, truncated, self.info(kind)

    def info(self, kind: str) -> dict:
        return {"success": self.right == len(self.pages), "invalid_action": kind == "unreadable",
                "kind": kind, "right_hops": self.right, "hops": len(self.pages)}

    def render(self) -> str:
        return self.page()

    def demonstrate(self, rng) -> str:
        """The partial sums, 1 to `max_passes` times, then the hop they say (or a useless look)."""
        total, thought = 0, ["sum"]
        for digit in self.digits():
            total = (total + digit) % MODULUS
            thought.append(str(total))
        if self.slip and rng.random() < self.slip:  # in the last sum
            thought[-1] = str(total := (total + int(rng.integers(1, MODULUS))) % MODULUS)
        command = "look" if rng.random() < self.look else f"go {total}"
        thought *= int(rng.integers(1, self.max_passes + 1))
        return " ".join([*thought, self.end_of_thought.strip(), command])
