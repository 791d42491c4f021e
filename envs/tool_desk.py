"""turnrl/ToolDesk-v0: a small order desk worked by commands whose order matters.

Description: log in, list the orders, find the one that is meant, act on it, confirm, finish. The
    request names an item; its number must be found; every action needs a confirmation.
Action: `login N`, `list`, `find ITEM`, `refund N`, `ship N`, `cancel N`, `confirm` or `finish`;
    case, blanks and one final dot do not matter. Any other text gets `unknown command.`.
Observation: first `pin 59: ship the chair.`; then the reply to the last command. Every command but
    login and finish needs a login, find and the verbs also a list; every action but confirm drops
    what waits for confirmation.
Starting state: a pin, `num_orders` paid orders (number and item), `num_requests` of them to be
    refunded, shipped or cancelled, the first request first. All chance is in `reset`.
Rewards: 0, and at the end the score: the share of checks passed (logged in; for every request found
    and done; closed after a login and without having done anything else).
Episode end: terminated by `finish`, truncated after `max_turns`; success is a score of 1.
Instances: split by seed; two seeds seldom give the same orders.
"""

from envs.text_env import TextEnv

NUMBERS = range(10, 100)  # of pins and orders
ITEMS = ("lamp", "sofa", "desk", "chair", "shelf", "rug", "clock", "mirror")
DONE = {"refund": "refunded", "ship": "shipped", "cancel": "cancelled"}
RULES = """You work at an order desk. Do what the first message asks, with one command per turn:
login N: log in with the pin of the first message
list: show the numbers of all orders
find ITEM: show the number and status of the order of an item
refund N, ship N, cancel N: prepare an action on order N
confirm: carry out the action just prepared
finish: end the work, when all is done
Example: pin 12: ship the rug. Your commands, one per turn: login 12, list, find rug, ship 34 (the
number that find told), confirm, finish"""


class ToolDesk(TextEnv):
    instructions = RULES
    action_pattern = r"login \d+|list|find \w+|(refund|ship|cancel) \d+|confirm|finish"
    action_help = ("write login N, list, find ITEM, refund N, ship N, cancel N, confirm or finish.")

    def __init__(self, num_orders: int = 3, num_requests: int = 1, max_turns: int | None = None,
                 noise: float = 0.3, render_mode: str | None = None):
        super().__init__(render_mode)
        if not 1 <= num_requests <= num_orders <= len(ITEMS):
            raise ValueError(f"num_requests {num_requests}, num_orders {num_orders}: 1 <= requests "
                             f"<= orders <= {len(ITEMS)}")
        if not 0 <= noise <= 1 or (max_turns is not None and max_turns < 1):
            raise ValueError(f"noise {noise}: 0 to 1; max_turns {max_turns}: at least 1")
        self.num_orders, self.num_requests, self.noise = num_orders, num_requests, noise
        self.max_turns = 4 + 4 * num_requests if max_turns is None else max_turns

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        rng = self.np_random
        pin, *ids = rng.choice(NUMBERS, size=1 + self.num_orders, replace=False).tolist()
        items = [ITEMS[i] for i in rng.choice(len(ITEMS), size=self.num_orders, replace=False)]
        targets = rng.choice(self.num_orders, size=self.num_requests, replace=False)
        requests = [(list(DONE)[rng.integers(3)], ids[i]) for i in targets]
        orders = dict(zip(ids, items, strict=True))
        self.start(**({"pin": pin, "orders": orders, "requests": requests} | (options or {})))
        return self.request, self.info(False)

    def start(self, pin: int, orders: dict[int, str], requests: list[tuple[str, int]]):
        """Begin an episode: orders are number -> item, requests (verb, number) in their order."""
        self.pin, self.orders, self.requests = pin, dict(orders), [tuple(x) for x in requests]
        self.status = dict.fromkeys(orders, "paid")
        self.request = f"pin {pin}: " + ", then ".join(
            f"{verb} the {orders[number]}" for verb, number in requests) + "."
        self.open = list(self.requests)  # those not done yet
        self.logged_in = self.listed = self.closed = self.wrong = self.ended = False
        self.any_readable = self.repeated = False
        self.found: set[int] = set()
        self.pending: tuple[str, int] | None = None
        self.actions: list[str] = []

    def step(self, action: str):
        self.check_running()
        words = self.read(action).lower().split()
        self.actions.append(" ".join(words).removesuffix(".").rstrip())
        reply = self.reply(*self.actions[-1].split(" "))
        if not reply.endswith("say confirm."):
            self.pending = None
        self.any_readable |= reply != "unknown command."
        self.repeated |= len(self.actions) > 2 and len(set(self.actions[-3:])) == 1
        truncated = not self.closed and len(self.actions) >= self.max_turns
        self.ended = self.closed or truncated
        info = self.info(reply == "unknown command.")
        reply += self.help() * info["invalid_action"]
        return reply, info["score"] if self.ended else 0.0, self.closed, truncated, info

    def reply(self, verb: str, *words: str) -> str:
        """What the desk answers to a command, which it carries out."""
        known = len(words) == 1 and words[0].isascii() and words[0].isdigit()
        number = int(words[0].lstrip("0")[:9] or 0) if known else -1
        if verb == "finish" and not words:
            self.closed = True
            return "bye."
        if verb == "login" and number >= 0:
            self.logged_in |= number == self.pin
            return "logged in." if number == self.pin else "wrong pin."
        acting, finding = verb in DONE and number >= 0, verb == "find" and len(words) == 1
        if not (acting or finding or (verb in ("list", "confirm") and not words)):
            return "unknown command."
        if not self.logged_in:
            return "please log in first."
        if verb == "list":
            self.listed = True
            return f"orders {' '.join(map(str, self.orders))}."
        if verb == "confirm":
            return self.carry_out(self.pending) if self.pending else "nothing to confirm."
        if not self.listed:
            return "please list first."
        if finding:
            for number, item in self.orders.items():
                if item == words[0]:
                    self.found.add(number)
                    return f"the {item} is {number}, {self.status[number]}."
            return "no such item."
        if number not in self.orders:
            return "no such order."
        if self.status[number] != "paid":
            return f"{number} is already {self.status[number]}."
        if number in [target for _, target in self.open[1:]]:
            return "refused, do the first request first."
        self.pending = (verb, number)
        return f"{verb} {number}? say confirm."

    def carry_out(self, request: tuple[str, int]) -> str:
        verb, number = request
        self.status[number] = DONE[verb]
        self.wrong |= request not in self.open
        self.open = [other for other in self.open if other != request]
        return f"{number} {DONE[verb]}."

    def info(self, unreadable: bool) -> dict:
        checks = {"logged_in": self.logged_in}
        for i, request in enumerate(self.requests):
            checks[f"found_{i}"] = request[1] in self.found
            checks[f"done_{i}"] = request not in self.open
        checks["closed"] = self.closed and self.logged_in and not self.wrong
        score = sum(checks.values()) / len(checks)
        legal = ["finish", "list", "confirm", f"login {self.pin}"]
        legal += [f"find {item}" for item in self.orders.values()]
        legal += [f"{verb} {n}" for verb in DONE for n in self.orders if self.listed]
        return {"success": score == 1, "score": score, "checks": checks,
                "invalid_action": unreadable, "garbage": self.repeated or not self.any_readable,
                "answer": str(self.requests[0][1]), "legal_actions": legal}

    def render(self) -> str:
        return self.request

    def demonstrate(self, rng) -> str:
        """The next command of somebody who knows how, or with probability `noise` of anybody."""
        if rng.random() < self.noise:
            options = ["finish", "list", "confirm", f"find {rng.choice(ITEMS)}"]
            if self.listed:
                options += [f"{verb} {rng.choice(list(self.orders))}"
                            for verb in (rng.choice(list(DONE)), self.requests[0][0])]
            else:
                options += [f"login {rng.choice(NUMBERS)}"]
            return options[rng.integers(len(options))]
        if not self.logged_in:
            return f"login {self.pin}"
        if not self.listed:
            return "list"
        if not self.open:
            return "finish"
        verb, number = self.open[0]
        if number not in self.found:
            return f"find {self.orders[number]}"
        if self.status[number] != "paid":
            return "finish"
        return "confirm" if self.pending == (verb, number) else f"{verb} {number}"
