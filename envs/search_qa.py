"""turnrl/SearchQA-v0: answer a question about people by searching one fact after another.

Description: every episode draws its own facts (person, relation) -> person. The question names a
    person and H relations to follow; nothing can be known without searching.
Action: `search NAME RELATION` or `answer NAME`, case sensitive. Any other text ends the episode.
Observation: first `question NAME RELATION .. RELATION`; after a search `result NAME` or
    `result none`; after the end an empty line, or feedback if the action was unreadable.
Starting state: a chain of H + 1 different people, and distractor facts that never name one of them:
    exactly one fact has the answer as its value.
Rewards: 1 for the right answer, else 0; minus `format_penalty` for an unreadable action.
Episode end: terminated by an answer (success if right) or an unreadable action; truncated after
    H + `extra_turns` searches. All chance is in `reset`: `step` is deterministic.
Instances: split by seed; two seeds practically never give the same facts.
"""

from envs.text_env import TextEnv

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo",
         "Mia", "Nils", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will",
         "Xena", "Yara", "Zoe", "Amir", "Bela", "Carl", "Dora", "Emil", "Fay")
RELATIONS = ("boss", "friend", "teacher", "doctor", "neighbor", "cousin", "coach", "tenant")
REGIMES = {  # fewest and most hops; noise of the demonstrator: premature, wrong, guess
    "easy": (2, 3, 0.25, 0.25, False), "middle": (3, 3, 0.3, 0.3, False),
    "sparse": (4, 4, 0.3, 0.3, False), "middle_guess": (3, 3, 0.3, 0.3, True),
    "sparse_guess": (4, 4, 0.3, 0.3, True)}
RULES = """You answer questions about people by searching facts, one relation at a time.
"question Ada boss friend" asks: who is the friend of the boss of Ada?
Each turn, write one line: "search NAME RELATION" finds one fact, such as search Ada boss;
"answer NAME" gives your answer and ends the game. Write nothing else."""


class SearchQA(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    answer_template = "answer {answer}"  # how the policy would write an answer
    instructions = RULES

    def __init__(self, regime: str = "easy", min_hops: int | None = None,
                 max_hops: int | None = None, premature: float | None = None,
                 wrong: float | None = None, guess: bool | None = None, num_entities: int = 24,
                 num_relations: int = 4, distractor_rate: float = 0.25, extra_turns: int = 3,
                 format_penalty: float = 0.0, render_mode: str | None = None):
        super().__init__(render_mode)
        if regime not in REGIMES:
            raise ValueError(f"regime {regime!r}: choose from {', '.join(REGIMES)}")
        given = (min_hops, max_hops, premature, wrong, guess)
        self.min_hops, self.max_hops, self.premature, self.wrong, self.guess = (
            preset if value is None else value
            for value, preset in zip(given, REGIMES[regime], strict=True))
        if not 1 <= self.min_hops <= self.max_hops < num_entities <= len(NAMES):
            raise ValueError(f"{self.min_hops} to {self.max_hops} hops do not fit {num_entities} "
                             f"entities (at most {len(NAMES)})")
        if not 1 <= num_relations <= len(RELATIONS):
            raise ValueError(f"num_relations {num_relations}: 1 to {len(RELATIONS)}")
        self.names, self.relations = NAMES[:num_entities], RELATIONS[:num_relations]
        self.distractor_rate, self.extra_turns = distractor_rate, extra_turns
        self.format_penalty = format_penalty
        self.legal_actions = (*(f"search {n} {r}" for n in self.names for r in self.relations),
                              *(f"answer {n}" for n in self.names))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        rng, names = self.np_random, self.names
        hops = int(rng.integers(self.min_hops, self.max_hops + 1))
        path = [names[i] for i in rng.choice(len(names), size=hops + 1, replace=False)]
        route = [self.relations[i] for i in rng.integers(len(self.relations), size=hops)]
        facts = dict(zip(zip(path, route, strict=False), path[1:], strict=True))
        for key in ((name, relation) for name in names for relation in self.relations):
            if key not in facts and rng.random() < self.distractor_rate:
                values = [name for name in names if name not in path and name != key[0]]
                if values:
                    facts[key] = values[rng.integers(len(values))]
        self.start(path, route, facts)
        return self.question, self.info("question")

    def start(self, path: list[str], route: list[str], facts: dict[tuple[str, str], str]):
        """Begin an episode: `route` leads from path[0] to path[-1], `facts` is all there is."""
        self.path, self.route, self.facts = list(path), list(route), dict(facts)
        self.question = " ".join(["question", path[0], *route])
        self.known, self.turn, self.last, self.ended = 0, 0, None, False

    def step(self, action: str):
        self.check_running()
        self.turn += 1
        if action.strip() not in self.legal_actions:
            self.ended = True
            return "Unknown action.", -self.format_penalty, True, False, self.info("malformed")
        verb, name, *rest = action.split()
        if verb == "answer":
            self.ended, success = True, name == self.path[-1]
            return "", float(success), True, False, self.info("answer", success)
        key, self.last = (name, rest[0]), self.facts.get((name, rest[0]))
        chain = list(zip(self.path, self.route, strict=False))
        kind = "wrong"
        if key in chain:
            hop = chain.index(key)
            kind = "hop" if hop == self.known else "repeat" if hop < self.known else "lucky"
            self.known += kind == "hop"
        self.ended = self.turn >= len(self.route) + self.extra_turns
        return f"result {self.last or 'none'}", 0.0, False, self.ended, self.info(kind)

    def info(self, kind: str, success: bool = False) -> dict:
        return {"success": success, "invalid_action": kind == "malformed", "kind": kind,
                "answer": self.path[-1], "path": list(self.path), "hops": len(self.route),
                "known": self.known, "legal_actions": list(self.legal_actions)}

    def render(self) -> str:
        return self.question

    def demonstrate(self, rng, noise: float | None = None) -> str:
        """The next search of the chain, then the answer; made worse by two kinds of noise.

        With probability `premature` it answers with the last result, or else, with probability
        `wrong`, it searches anything. `noise` replaces both.
        """
        premature, wrong = (self.premature, self.wrong) if noise is None else (noise, noise)
        if rng.random() < premature:
            known = None if self.guess else self.last
            return f"answer {known or self.names[rng.integers(len(self.names))]}"
        if self.known == len(self.route):
            return f"answer {self.path[-1]}"
        name, relation = self.path[self.known], self.route[self.known]
        if rng.random() < wrong:
            name = self.names[rng.integers(len(self.names))]
            relation = self.relations[rng.integers(len(self.relations))]
        return f"search {name} {relation}"
