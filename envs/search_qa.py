"""turnrl/SearchQA-v0: answer a question about people by searching one fact after another.

Description: every episode draws its own facts (person, relation) -> person. A question has `parts`
    parts; each names a person and H relations to follow. Nothing can be known without searching.
Action: `search NAME RELATION`, or `answer NAME` with a name for every part; case sensitive. Any
    other text ends the episode.
Observation: first `question NAME RELATION .. RELATION`, parts joined by `and`; after a search
    `result NAME` or `result none`; after the end an empty line, or feedback if the action was
    unreadable.
Starting state: for every part a chain of H + 1 people, all different, and distractor facts that
    never name one of them: exactly one fact has the answer to a part as its value.
Rewards: 1 for the right answer to all parts, else 0; minus `format_penalty` for an unreadable text.
Episode end: terminated by an answer (success if right) or an unreadable action; truncated after
    all hops + `extra_turns` searches. All chance is in `reset`: `step` is deterministic.
Instances: split by seed; two seeds practically never give the same facts.
"""

from envs.text_env import TextEnv

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo",
         "Mia", "Nils", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will",
         "Xena", "Yara", "Zoe", "Amir", "Bela", "Carl", "Dora", "Emil", "Fay")
RELATIONS = ("boss", "friend", "teacher", "doctor", "neighbor", "cousin", "coach", "tenant")
REGIMES = {  # parts, fewest and most hops of a part; noise of the demonstrator: premature, wrong
    "easy": (1, 1, 2, 0.25, 0.25), "middle": (1, 2, 3, 0.25, 0.25), "sparse": (1, 3, 3, 0.3, 0.3),
    "hopeless": (1, 4, 4, 0.3, 0.3), "parts": (3, 1, 1, 0.1, 0.3)}
RULES = """You answer questions about people by searching facts, one relation at a time.
"question Ada boss friend" asks: who is the friend of the boss of Ada? Parts are joined by "and".
Each turn, write one line: "search NAME RELATION" finds one fact, such as search Ada boss;
"answer NAME", with one name for every part, gives your answer and ends the game.
Example: question Ada boss friend
search Ada boss
result Hugo
search Hugo friend
result Nils
answer Nils"""


class SearchQA(TextEnv):
    evaluation_kwargs = {"format_penalty": 0.0}
    answer_template = "answer {answer}"  # how the policy would write an answer
    instructions = RULES
    action_help = "Write search NAME RELATION, or answer NAME."

    def __init__(self, regime: str = "middle", parts: int | None = None,
                 min_hops: int | None = None, max_hops: int | None = None,
                 premature: float | None = None, wrong: float | None = None,
                 num_entities: int = 24, num_relations: int = 4, distractor_rate: float = 0.25,
                 extra_turns: int = 3, format_penalty: float = 0.0, render_mode: str | None = None):
        super().__init__(render_mode)
        if regime not in REGIMES:
            raise ValueError(f"regime {regime!r}: choose from {', '.join(REGIMES)}")
        given = (parts, min_hops, max_hops, premature, wrong)
        self.num_parts, self.min_hops, self.max_hops, self.premature, self.wrong = (
            preset if value is None else value
            for value, preset in zip(given, REGIMES[regime], strict=True))
        if not (0 < self.min_hops <= self.max_hops and self.num_parts > 0
                and self.num_parts * (self.max_hops + 1) <= num_entities <= len(NAMES)):
            raise ValueError(f"{self.num_parts} parts of {self.min_hops} to {self.max_hops} hops "
                             f"do not fit {num_entities} entities (at most {len(NAMES)})")
        if not 1 <= num_relations <= len(RELATIONS):
            raise ValueError(f"num_relations {num_relations}: 1 to {len(RELATIONS)}")
        self.names, self.relations = NAMES[:num_entities], RELATIONS[:num_relations]
        self.distractor_rate, self.extra_turns = distractor_rate, extra_turns
        self.format_penalty = format_penalty

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        rng, names = self.np_random, self.names
        hops = int(rng.integers(self.min_hops, self.max_hops + 1))
        people = [names[i] for i in rng.choice(
            len(names), size=(hops + 1) * self.num_parts, replace=False)]
        paths = [people[i : i + hops + 1] for i in range(0, len(people), hops + 1)]
        routes = [[self.relations[i] for i in rng.integers(len(self.relations), size=hops)]
                  for _ in paths]
        facts = {(name, relation): value for path, route in zip(paths, routes, strict=True)
                 for name, relation, value in zip(path, route, path[1:], strict=False)}
        for key in [(name, relation) for name in names for relation in self.relations]:
            if key not in facts and rng.random() < self.distractor_rate:
                values = [name for name in names if name not in people and name != key[0]]
                if values:
                    facts[key] = values[rng.integers(len(values))]
        self.start(paths, routes, facts)
        return self.question, self.info("question")

    def start(self, paths: list[list[str]], routes: list[list[str]],
              facts: dict[tuple[str, str], str]):
        """Begin an episode: routes[i] leads along paths[i] to its end, `facts` is all there is."""
        self.paths, self.routes, self.facts = list(paths), list(routes), dict(facts)
        self.hops = [(name, relation) for path, route in zip(paths, routes, strict=True)
                     for name, relation in zip(path, route, strict=False)]  # in the order asked
        self.question = "question " + " and ".join(
            " ".join([path[0], *route]) for path, route in zip(paths, routes, strict=True))
        self.action_pattern = r"search \w+ \w+|answer" + r" \w+" * len(paths)
        self.known, self.turn, self.last, self.ended = 0, 0, None, False

    def step(self, action: str):
        self.check_running()
        self.turn += 1
        verb, *words = self.read(action).split() or [""]
        searching = (verb == "search" and len(words) == 2 and words[0] in self.names
                     and words[1] in self.relations)
        answering = (verb == "answer" and len(words) == len(self.paths)
                     and all(word in self.names for word in words))
        if not searching and not answering:
            late = self.turn >= len(self.hops) + self.extra_turns
            self.ended = late or not self.chat  # a chat model may go on, until the last turn
            return (f"Unknown action.{self.help()}", 0.0 - self.format_penalty, not self.chat,
                    self.chat and late, self.info("malformed"))
        if answering:
            self.ended, success = True, words == [path[-1] for path in self.paths]
            return "", float(success), True, False, self.info("answer", success)
        key = (words[0], words[1])
        result = self.last = self.facts.get(key)
        kind = "wrong"
        if key in self.hops:
            hop = self.hops.index(key)
            kind = "hop" if hop == self.known else "repeat" if hop < self.known else "lucky"
            self.known += kind == "hop"
            if kind == "hop" and result in (path[-1] for path in self.paths):
                self.last = None  # the next part begins
        self.ended = self.turn >= len(self.hops) + self.extra_turns
        return f"result {result or 'none'}", 0.0, False, self.ended, self.info(kind)

    def read(self, text: str) -> str:
        """Names begin with a capital letter, as in the question."""
        names = {name.lower(): name for name in self.names}
        words = super().read(text).split()
        return " ".join(names.get(word, word) for word in words) if self.chat else text

    def info(self, kind: str, success: bool = False) -> dict:
        return {"success": success, "invalid_action": kind == "malformed", "kind": kind,
                "answer": " ".join(path[-1] for path in self.paths), "known": self.known,
                "hops": len(self.hops), "paths": [list(path) for path in self.paths]}

    def render(self) -> str:
        return self.question

    def demonstrate(self, rng, noise: float | None = None) -> str:
        """The next search, part after part, then the answer; made worse by two kinds of noise.

        With probability `premature` it answers: finished parts rightly, the current one by the
        last result, others by anyone. Else, with probability `wrong`, it searches anything.
        """
        premature, wrong = (self.premature, self.wrong) if noise is None else (noise, noise)
        if self.known == len(self.hops) or rng.random() < premature:
            words, last, before = ["answer"], self.last, 0
            for path in self.paths:
                before += len(path) - 1  # hops until this part is known
                guess = self.names[rng.integers(len(self.names))]
                words.append(path[-1] if self.known >= before else last or guess)
                last = last if self.known >= before else None  # the result is about one part
            return " ".join(words)
        name, relation = self.hops[self.known]
        if rng.random() < wrong:
            name = self.names[rng.integers(len(self.names))]
            relation = self.relations[rng.integers(len(self.relations))]
        return f"search {name} {relation}"
