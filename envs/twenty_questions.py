"""turnrl/TwentyQuestions-v0 and turnrl/GuessMyCity-v0: find out what is meant by asking.

Description: something is drawn from a list that never changes. A question about it is answered; a
    guess that is right ends the game. Good questions leave few candidates, guesses test one.
Action: in TwentyQuestions `Is the object X?` with X an attribute (ATTRIBUTES), or the guess `Is the
    object a NAME?` (always "a"); in GuessMyCity a question of CITY_QUESTIONS or `Is it NAME?`. Case
    and blanks do not matter; any other text gets `Invalid question.` and counts as a question.
Observation: `Questions:`, then the reply to the last question: `Yes.`, `No.` or a word.
Starting state: one of `objects` things (10 or 20) or of 16 cities, uniformly. All chance is in
    `reset`, so one episode per thing evaluates a greedy player exactly.
Rewards: -1 for every question but the right guess, 0 for that: the return is minus the number of
    questions before it, and -20 without it. Ideal play has -2.8 (10 objects), -3.9 (20) and
    -1.6875 (cities) in the mean: `ideal_return`.
Episode end: terminated by the right guess (success) or after 20 questions, which is a rule of the
    game and not a limit of time; never truncated.
Instances: every seed draws from the same list, training and held-out ones alike; what is to be
    learned is the list.
"""

import functools

from envs.text_env import TextEnv

OBJECTS = ["football", "dog", "banana", "truck", "pants", "computer", "piano", "chair", "pen",
           "scissors",  # up to here 10
           "apple", "fish", "cart", "ring", "lamp", "guitar", "table", "book", "knife", "phone"]
ATTRIBUTES = {  # words of the question -> objects whose answer is yes
    "soft": "football dog banana pants", "metal": "truck computer scissors ring knife phone",
    "small": "football banana pen scissors apple ring knife phone", "big": "truck piano table",
    "used in an office": "computer chair pen scissors lamp book phone",
    "used in a kitchen": "banana chair apple table knife", "on wheels": "truck cart",
    "alive": "dog fish", "edible": "banana apple fish", "electric": "computer lamp phone"}
CITY_QUESTIONS = ("Which continent is it on?", "Is it on the coast?", "Is it a capital city?",
                  "What language do people speak there?")
CITIES = {  # name: answers to the four questions
    "paris": "europe no yes french", "marseille": "europe yes no french",
    "rome": "europe no yes italian", "milan": "europe no no italian",
    "madrid": "europe no yes spanish", "barcelona": "europe yes no spanish",
    "lisbon": "europe yes yes portuguese", "tokyo": "asia yes yes japanese",
    "osaka": "asia yes no japanese", "beijing": "asia no yes chinese",
    "shanghai": "asia yes no chinese", "cairo": "africa no yes arabic",
    "casablanca": "africa yes no arabic", "lima": "america yes yes spanish",
    "rio": "america yes no portuguese", "montreal": "america no no french"}
MAX_QUESTIONS = 20


class GuessingGame(TextEnv):
    """A game over `table`: thing -> {question: reply}; `guess_form` makes a guess of a thing."""

    table: dict[str, dict[str, str]]
    guess_form: str
    refused: dict[str, str] = {}  # questions that get the same reply whatever is meant

    def __init__(self, question_share: float = 0.5, informed_share: float = 0.25,
                 render_mode: str | None = None):
        """The scripted player asks with probability question_share, else it guesses: with
        probability informed_share something that fits all replies, else anything."""
        super().__init__(render_mode)
        if not (0 <= question_share <= 1 and 0 <= informed_share <= 1):
            raise ValueError(f"question_share {question_share}, informed_share {informed_share}: "
                             "0 to 1")
        self.question_share, self.informed_share = question_share, informed_share
        self.questions = list(next(iter(self.table.values())))
        self.answer_template = self.guess_form.format("{answer}")
        self.guesses = {self.guess_form.format(thing): thing for thing in self.table}
        texts = [*self.questions, *self.guesses, *self.refused]
        self.known = {text.lower(): text for text in texts}
        self.action_help = f"Ask like this: {self.guess_form.format(next(iter(self.table)))}"

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.answer = list(self.table)[self.np_random.integers(len(self.table))]
        self.answer = (options or {}).get("answer", self.answer)
        if self.answer not in self.table:
            raise ValueError(f"answer {self.answer}: none of {', '.join(self.table)}")
        self.candidates = list(self.table)  # what fits all replies, for the scripted player
        self.asked, self.ended = 0, False
        return "Questions:", self.info(False, False)

    def step(self, action: str):
        self.check_running()
        self.asked += 1
        text = self.known.get(self.read(action))
        reply = self.reply(text, self.answer) if text else "Invalid question." + self.help()
        if text is not None:
            self.candidates = [c for c in self.candidates if self.reply(text, c) == reply]
        success = self.guesses.get(text) == self.answer
        self.ended = success or self.asked >= MAX_QUESTIONS
        return reply, 0.0 if success else -1.0, self.ended, False, self.info(success, text is None)

    def read(self, text: str) -> str:
        """In small letters, with single blanks; of a chat model the first question it holds."""
        text = " ".join(text.lower().split())
        held = [question for question in self.known if question in text]
        return min(held, key=text.index, default=text) if self.chat else text

    def reply(self, text: str, thing: str) -> str:
        """What a question or guess gets if `thing` is meant."""
        if text in self.guesses:
            return "Yes." if self.guesses[text] == thing else "No."
        return self.refused.get(text) or self.table[thing][text]

    def info(self, success: bool, invalid: bool) -> dict:
        return {"success": success, "invalid_action": invalid, "answer": self.answer,
                "legal_actions": [*self.questions, *self.guesses]}

    def render(self) -> str:
        return f"{self.answer}, {self.asked} asked"

    def demonstrate(self, rng) -> str:
        """Some question, or some guess, now and then one that may be right."""
        if rng.random() < self.question_share:
            return str(rng.choice(self.questions))
        informed = rng.random() < self.informed_share
        return self.guess_form.format(rng.choice(self.candidates if informed else list(self.table)))


class TwentyQuestions(GuessingGame):
    guess_form = "Is the object a {}?"

    def __init__(self, objects: int = 10, **kwargs):
        if objects not in (10, 20):
            raise ValueError(f"objects {objects}: 10 or 20")
        self.table = {name: {f"Is the object {words}?": "Yes." if name in yes.split() else "No."
                             for words, yes in ATTRIBUTES.items()} for name in OBJECTS[:objects]}
        self.instructions = (f"Find out which object is meant: {', '.join(self.table)}. You have "
                             f"{MAX_QUESTIONS} questions. Ask one per turn, exactly like: "
                             f"{' '.join(self.table[OBJECTS[0]])} Is the object a dog?")
        super().__init__(**kwargs)


class GuessMyCity(GuessingGame):
    guess_form = "Is it {}?"
    refused = {"What is the name of the city?": "I can't answer that question."}
    table = {city: {question: f"{word.capitalize() if word in ('yes', 'no') else word}."
                    for question, word in zip(CITY_QUESTIONS, words.split(), strict=True)}
             for city, words in CITIES.items()}
    instructions = (f"Find out which city is meant: {', '.join(CITIES)}. You have {MAX_QUESTIONS} "
                    f"questions. Ask one per turn, exactly like: {' '.join(CITY_QUESTIONS)} Is it "
                    "paris?")


def ideal_return(table: dict[str, dict[str, str]], discount: float = 1.0) -> float:
    """The mean (discounted) return of the best player who knows the table, by going through the
    sets of candidates: a question splits a set, a guess ends the game or takes one thing away."""
    questions = list(next(iter(table.values())))
    replies = max(2, *(len({row[q] for row in table.values()}) for q in questions))

    @functools.cache
    def bound(size: int, parts: int = 1) -> float:
        """No `parts` sets of `size` things together cost less, times size: best possible splits."""
        if size <= parts:
            return 0.0
        if parts > 1:
            return min(bound(n) + bound(size - n, parts - 1) for n in range(1, size))
        guess = size - 1 + discount * bound(size - 1)
        return min(guess, size + discount * bound(size, min(replies, size)))

    @functools.cache
    def cost(candidates: frozenset[str]) -> float:
        size, best = len(candidates), float("inf")
        if size == 1:
            return 0.0
        for question in questions:
            parts: dict[str, set[str]] = {}
            for thing in candidates:
                parts.setdefault(table[thing][question], set()).add(thing)
            if len(parts) > 1:
                best = min(best, 1 + discount * sum(len(part) / size * cost(frozenset(part))
                                                    for part in parts.values()))
        if (size - 1 + discount * bound(size - 1)) / size < best:
            best = min(best, *((size - 1) / size * (1 + discount * cost(candidates - {thing}))
                               for thing in candidates))
        return best

    return -cost(frozenset(table))
