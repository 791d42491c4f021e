"""ToolDesk: every reply, what each command changes, and what the score counts; worked by hand."""

from collections import Counter

import numpy as np
import pytest

from envs import make_env
from envs.episodes import demonstrations
from envs.tool_desk import ITEMS, ToolDesk

ORDERS = {63: "mirror", 15: "chair", 43: "rug"}
ONE, TWO = [("ship", 15)], [("cancel", 15), ("refund", 43)]
IN = ["login 59", "list"]
WHOLE = [*IN, "find chair", "ship 15", "confirm", "finish"]
WHOLE_TWO = [*IN, "find chair", "cancel 15", "confirm", "find rug", "refund 43", "confirm", "finish"]


def desk(*actions, requests=ONE, orders=ORDERS, **kwargs) -> ToolDesk:
    """A desk with these orders after these actions."""
    env = ToolDesk(num_requests=len(requests), **kwargs)
    env.reset(seed=0, options={"pin": 59, "orders": orders, "requests": requests})
    say(env, *actions)
    return env


def say(env, *actions) -> list[str]:
    return [env.step(action)[0] for action in actions]


def last(*actions, **kwargs):
    """What the last of these actions brings: reward, terminated, truncated, info."""
    return desk(*actions[:-1], **kwargs).step(actions[-1])[1:]


def passed(info) -> str:
    return " ".join(name for name, value in info["checks"].items() if value)


def test_the_transcript_with_the_eighth_action_as_the_last_one_allowed():
    env = desk()
    assert env.render() == env.request == "pin 59: ship the chair."
    replies = ["please log in first.", "logged in.", "please list first.", "orders 63 15 43.", "the chair is 15, paid.",
               "ship 15? say confirm.", "15 shipped."]
    for action, reply in zip(["list", "login 59", "find chair", *WHOLE[1:5]], replies, strict=True):
        observation, reward, terminated, truncated, info = env.step(action)
        assert (observation, reward, terminated, truncated) == (reply, 0.0, False, False)
        assert not info["success"] and not info["invalid_action"]
    assert info["score"] == 0.75 and passed(info) == "logged_in found_0 done_0"
    observation, reward, terminated, truncated, info = env.step("finish")
    assert (observation, reward, terminated, truncated) == ("bye.", 1.0, True, False)
    assert info["success"] is True and info["score"] == 1 and not info["garbage"]


@pytest.mark.parametrize("before,action,reply", [
    ([], "finish", "bye."), (IN, "finish", "bye."),
    ([], "login 59", "logged in."), ([], "login 63", "wrong pin."), (IN, "login 59", "logged in."), (IN, "login 5", "wrong pin."),
    *[([], action, "please log in first.") for action in ("list", "confirm", "find chair", "find cat", "ship 15", "ship 99")],
    (["login 15"], "list", "please log in first."), (["list", "login 59"], "ship 15", "please list first."),
    (["login 59", "login 60"], "list", "orders 63 15 43."), (["login 59"], "confirm", "nothing to confirm."),
    *[(["login 59"], action, "please list first.") for action in ("find chair", "find cat", "cancel 43", "ship 99")],
    (IN, "list", "orders 63 15 43."), (IN, "confirm", "nothing to confirm."),
    (IN, "find mirror", "the mirror is 63, paid."), (IN, "find rug", "the rug is 43, paid."),
    (IN, "find lamp", "no such item."), (IN, "find 15", "no such item."), (IN, "find list", "no such item."),
    (IN, "refund 15", "refund 15? say confirm."), (IN, "cancel 63", "cancel 63? say confirm."), (IN, "ship 43", "ship 43? say confirm."),
    (IN, "ship 16", "no such order."), (IN, "cancel 59", "no such order."), (IN, "refund 0", "no such order."),
    ([*IN, "refund 15"], "confirm", "15 refunded."), ([*IN, "cancel 63"], "confirm", "63 cancelled."),
    ([*IN, "ship 43"], "confirm", "43 shipped."), ([*IN, "ship 43", "confirm"], "confirm", "nothing to confirm."),
    ([*IN, "ship 43", "ship 15"], "confirm", "15 shipped."), ([*IN, "ship 15", "cancel 15"], "confirm", "15 cancelled."),
    ([*IN, "refund 15", "confirm"], "ship 15", "15 is already refunded."), ([*IN, "cancel 63", "confirm"], "cancel 63", "63 is already cancelled."),
    ([*IN, "ship 15", "confirm"], "find chair", "the chair is 15, shipped."), ([*IN, "ship 15", "confirm"], "ship 43", "ship 43? say confirm.")])
def test_the_table_of_replies(before, action, reply):
    env = desk(*before)
    assert say(env, action) == [reply] and not env.info(False)["garbage"]


@pytest.mark.parametrize("before,action,reply", [
    (IN, "refund 43", "refused, do the first request first."), (IN, "ship 43", "refused, do the first request first."),
    ([*IN, "refund 43"], "confirm", "nothing to confirm."), (IN, "cancel 63", "cancel 63? say confirm."), (IN, "ship 44", "no such order."),
    (IN, "ship 15", "ship 15? say confirm."), ([*IN, "cancel 15"], "refund 43", "refused, do the first request first."),
    ([*IN, "ship 15", "confirm"], "refund 43", "refused, do the first request first."),
    ([*IN, "cancel 15", "confirm"], "refund 43", "refund 43? say confirm."), ([*IN, "cancel 15", "confirm"], "ship 43", "ship 43? say confirm."),
    ([*IN, "cancel 15", "confirm", "ship 43", "confirm"], "refund 43", "43 is already shipped.")])
def test_a_later_request_waits_for_the_earlier_ones(before, action, reply):
    assert say(desk(*before, requests=TWO), action) == [reply]
    three = desk(*IN, requests=[("ship", 63), ("ship", 15), ("cancel", 43)])
    assert three.request == "pin 59: ship the mirror, then ship the chair, then cancel the rug." and three.max_turns == 16
    for both in (["cancel 43", "ship 63", "confirm"], ["cancel 43", "ship 15", "confirm"]):
        assert say(three, *both)[0] == "refused, do the first request first."
    assert say(three, "cancel 43") == ["cancel 43? say confirm."]


@pytest.mark.parametrize("action", ["", "nonsense", "list", "login 59", "login 60", "find chair", "find cat", "ship 99", "cancel", "ship 63"])
def test_every_action_but_confirm_drops_what_waits(action):
    """The last but one: an order that is already done."""
    env = desk(*IN, "cancel 63", "confirm", "ship 15", action, "confirm", max_turns=20)
    assert env.status == {63: "cancelled", 15: "paid", 43: "paid"} and env.pending is None
    assert set(desk(*IN, "cancel 15", "refund 43", "confirm", requests=TWO).status.values()) == {"paid"}


@pytest.mark.parametrize("action,same_as", [
    ("  LOGIN \t 59\n", "login 59"), ("Login 59.", "login 59"), ("login 059", "login 59"), ("login 59 .", "login 59"), ("finish.", "finish"),
    ("list.", "list"), ("CONFIRM", "confirm"), ("find Chair.", "find chair"), ("find  unheard-of", "find lamp"), ("Ship\n15.", "ship 15"),
    ("ship 000", "ship 99"), ("ship " + "9" * 5000, "ship 99"), ("login " + "0" * 7 + "5999", "login 1"), ("login 59" + "0" * 5000, "login 1")])
def test_case_blanks_and_one_final_dot_do_not_matter(action, same_as):
    for before in ([], IN, [*IN, "ship 15"]):
        assert desk(*before).step(action) == desk(*before).step(same_as)


@pytest.mark.parametrize("action", [
    "", " ", ".", "list..", ". list", "list all", "finish now", "confirm 15", "confirm ship 15", "login", "login 59 59", "login -59", "login 5 9",
    "login +59", "login 59.0", "login five", "login ５９", "login ²", "find", "find the chair", "ship", "ship chair", "ship 15 43", "15", "15 ship",
    "shipped 15", "return 15", "list;", "please list", "find chair, ship 15", "l ist", "finish\x00", "ship\u00a0"])
def test_anything_else_is_unreadable(action):
    for before in ([], ["login 59"], IN):
        env = desk(*before)
        observation, reward, terminated, truncated, info = env.step(action)
        assert (observation, reward, terminated, truncated) == ("unknown command.", 0.0, False, False)
        assert info["invalid_action"] and info["garbage"] == (before == [])
    assert env.logged_in and env.listed and not env.step("list")[4]["invalid_action"]


@pytest.mark.parametrize("requests,actions,score,checks", [
    (ONE, ["finish"], 0, ""), (ONE, ["login 60", "finish"], 0, ""), (ONE, ["login 59", "finish"], 1 / 2, "logged_in closed"),
    (ONE, [*IN, "find rug", "finish"], 1 / 2, "logged_in closed"), (ONE, [*IN, "find chair", "finish"], 3 / 4, "logged_in found_0 closed"),
    (ONE, [*IN, "ship 15", "confirm", "finish"], 3 / 4, "logged_in done_0 closed"), (ONE, [*IN, "ship 15", "finish"], 1 / 2, "logged_in closed"),
    (ONE, [*IN, "ship 63", "confirm", "finish"], 1 / 4, "logged_in"), (ONE, [*IN, "cancel 15", "confirm", "finish"], 1 / 4, "logged_in"),
    (ONE, [*WHOLE[:5], "refund 43", "confirm", "finish"], 3 / 4, "logged_in found_0 done_0"),
    (ONE, [*IN, "ship 63", "confirm", *WHOLE[2:]], 3 / 4, "logged_in found_0 done_0"), (ONE, WHOLE, 1, "logged_in found_0 done_0 closed"),
    (TWO, ["login 59", "finish"], 1 / 3, "logged_in closed"), (TWO, [*IN, "find rug", "finish"], 1 / 2, "logged_in found_1 closed"),
    (TWO, [*IN, "cancel 15", "confirm", "finish"], 1 / 2, "logged_in done_0 closed"), (TWO, [*IN, "refund 63", "confirm", "finish"], 1 / 6, "logged_in"),
    (TWO, [*IN, "cancel 43", "confirm", "finish"], 1 / 3, "logged_in closed"),
    (TWO, [*WHOLE_TWO[:5], "finish"], 2 / 3, "logged_in found_0 done_0 closed"), (TWO, ["finish"], 0, ""),
    (TWO, [*WHOLE_TWO[:5], "refund 43", "confirm", "finish"], 5 / 6, "logged_in found_0 done_0 done_1 closed"),
    (TWO, WHOLE_TWO, 1, "logged_in found_0 done_0 found_1 done_1 closed")])
def test_the_score_counts_what_was_done(requests, actions, score, checks):
    reward, terminated, truncated, info = last(*actions, requests=requests)
    assert reward == info["score"] == pytest.approx(score) and passed(info) == checks and (terminated, truncated) == (True, False)
    assert info["success"] is (score == 1) and list(info["checks"])[::len(info["checks"]) - 1] == ["logged_in", "closed"]
    assert all(type(value) is bool for value in info["checks"].values()) and not info["garbage"]


def test_after_the_last_turn_the_score_counts_as_it_stands():
    assert ToolDesk().max_turns == 8 and ToolDesk(num_requests=2).max_turns == 12 and ToolDesk().noise == 0.3
    idle = [*WHOLE[:5], "list", "confirm"]
    reward, terminated, truncated, info = last(*idle, "list")
    assert (reward, terminated, truncated) == (0.75, False, True) and not info["success"] and not info["checks"]["closed"]
    assert last(*idle)[:3] == (0.0, False, False) and last(*WHOLE, max_turns=6)[:3] == (1.0, True, False)
    assert last(*WHOLE[:5], max_turns=5)[:3] == (0.75, False, True)
    for action in ("list", "nonsense"):
        assert last(*[action] * 8)[:3] == last(*[action] * 12, requests=TWO)[:3] == (0.0, False, True)


@pytest.mark.parametrize("actions,garbage", [
    (["?"], True), (["?", "x", ""], True), (["?", "finish"], False), (["list", "list"], False), (["list", "list", "LIST."], True),
    (["list", "list", "login 59", "list"], False), (["list", "?", "list", "list"], False), (["list", "?", "?", "?"], True),
    (["list", "list", "list", "login 59", "finish"], True), (["login 1", "login 2", "login 3"], False), (["list"] * 8, True)])
def test_garbage_is_nothing_readable_or_three_times_the_same(actions, garbage):
    for requests in (ONE, TWO):
        assert last(*actions, requests=requests)[3]["garbage"] is garbage


def test_a_reset_draws_different_numbers_items_and_targets():
    env, pins, items, verbs, places = ToolDesk(num_requests=2), set(), set(), Counter(), Counter()
    for seed in range(1500):
        text, info = env.reset(seed=seed)
        (first, a), (second, b) = env.requests
        numbers = [env.pin, *env.orders]
        assert len({*numbers}) == 4 and a != b and len({*env.orders.values()}) == 3
        assert text == f"pin {env.pin}: {first} the {env.orders[a]}, then {second} the {env.orders[b]}."
        assert set(env.status.values()) == {"paid"} and info["answer"] == str(a)
        assert passed(info) == "" and info["score"] == 0 and not info["success"] and not info["invalid_action"]
        pins.add(env.pin)
        items.update(env.orders.values())
        verbs[first, second] += 1
        places[list(env.orders).index(a), list(env.orders).index(b)] += 1
    assert items == {"lamp", "sofa", "desk", "chair", "shelf", "rug", "clock", "mirror"}
    assert pins == set(range(10, 100)) and len(verbs) == 9 and len(places) == 6
    assert all(abs(n - 1500 / 9) < 5 * (1500 * 8 / 81) ** 0.5 for n in verbs.values())
    assert all(abs(n - 1500 / 6) < 5 * (1500 * 5 / 36) ** 0.5 for n in places.values())


def test_options_replace_what_is_drawn():
    env = ToolDesk()
    drawn = env.reset(seed=3)[0]
    assert env.reset(seed=3, options={"pin": 7})[0] == f"pin 7{drawn[6:]}"
    given = dict(ORDERS)
    text, info = env.reset(options={"pin": 40, "orders": given, "requests": [["cancel", 15], ["refund", 43]]})
    assert text == "pin 40: cancel the chair, then refund the rug." and info["answer"] == "15"
    env.reset(options={"pin": 40, "orders": given, "requests": ONE})
    assert given == ORDERS and env.info(False)["score"] == 0 and say(env, "list", "login 40", "ship 15") == [
        "please log in first.", "logged in.", "please list first."]
    assert env.reset(seed=3) == make_env("turnrl/ToolDesk-v0").reset(seed=3) and env.request == drawn


def test_legal_actions_are_readable_and_name_orders_once_they_are_listed():
    start = ["finish", "list", "confirm", "login 59", "find mirror", "find chair", "find rug"]
    legal = {before: desk(*IN[:before]).info(False)["legal_actions"] for before in range(3)}
    assert legal[0] == legal[1] == start
    assert legal[2] == start + [f"{verb} {number}" for verb in ("refund", "ship", "cancel") for number in (63, 15, 43)]
    assert not any(last(*IN, action)[3]["invalid_action"] for action in legal[2])


def test_the_plan_without_noise():
    rng = np.random.default_rng(0)
    for requests, whole in ((ONE, WHOLE), (TWO, WHOLE_TWO)):
        for turn, action in enumerate(whole):
            assert desk(*whole[:turn], requests=requests, noise=0.0).demonstrate(rng) == action
        for episode in demonstrations(ToolDesk(num_requests=len(requests), noise=0.0), range(50), 99, rng):
            assert episode.success and len(episode.turns) == len(whole)


@pytest.mark.parametrize("actions,plan", [
    (["list"], "login 59"), (["login 60"], "login 59"), ([*IN, "find rug"], "find chair"), ([*IN, "ship 15"], "find chair"), (["login 59", "find chair"], "list"),
    ([*IN, "find chair", "ship 63"], "ship 15"), ([*IN, "find chair", "cancel 15"], "ship 15"), ([*IN, "find chair", "ship 15", "list"], "ship 15"),
    ([*IN, "ship 63", "confirm"], "find chair"), ([*IN, "cancel 15", "confirm"], "find chair"), ([*IN, "cancel 15", "confirm", "find chair"], "finish")])
def test_the_plan_after_a_slip(actions, plan):
    assert desk(*actions, noise=0.0).demonstrate(np.random.default_rng(0)) == plan


@pytest.mark.parametrize("actions", [[], ["login 59"], IN, [*IN, "find rug"], [*IN, "ship 15"], [*IN, "cancel 43", "confirm"]])
def test_the_scripted_player_knows_no_number_before_it_has_found_it(actions):
    """The chair's and the mirror's numbers are swapped: nobody can tell before `find`."""
    swapped = {63: "chair", 15: "mirror", 43: "rug"}
    for noise in (0.0, 1.0):
        envs = [desk(*actions, orders=orders, requests=[("ship", number)], noise=noise)
                for orders, number in ((ORDERS, 15), (swapped, 63))]
        for seed in range(30):
            one, two = (env.demonstrate(np.random.default_rng(seed)) for env in envs)
            assert one == two


@pytest.mark.parametrize("actions,noise,shares", [
    ([], 1.0, {"finish": 1 / 5, "list": 1 / 5, "confirm": 1 / 5, "find": 1 / 5, "login": 1 / 5}), (["login 59"], 1.0, {"login": 1 / 5}),
    (IN, 1.0, {"finish": 1 / 6, "list": 1 / 6, "confirm": 1 / 6, "find": 1 / 6, "cancel": 4 / 18, "ship": 1 / 18, "refund": 1 / 18}),
    (IN, 1.0, {f"find {item}": 1 / 48 for item in ITEMS} | {f"cancel {n}": 2 / 27 for n in ORDERS} | {f"ship {n}": 1 / 54 for n in ORDERS}),
    ([], 0.25, {"login 59": 0.75 + 0.25 / 450}), ([*IN, "find chair"], 0.5, {"cancel 15": 1 / 2 + 1 / 27})])
def test_noise_is_uniform_over_kinds_of_commands(actions, noise, shares):
    """3,000 draws, every share within 5 sigma."""
    env, rng = desk(*actions, noise=noise, requests=TWO), np.random.default_rng(0)
    said = [env.demonstrate(rng) for _ in range(3000)]
    count = Counter(said) | Counter(text.split()[0] for text in said)
    assert all(abs(count[text] / 3000 - p) < 5 * (p * (1 - p) / 3000) ** 0.5 for text, p in shares.items())
    pins = {text for text in said if text.startswith("login")}
    assert pins == (set() if "list" in actions else {f"login {number}" for number in range(10, 100)}) or noise < 1


@pytest.mark.parametrize("requests,noise,success,score,turns,garbage,official", [
    (1, 0.25, 0.577, 0.803, 6.20, 0.003, 0.975), (1, 0.3, 0.476, 0.753, 6.14, 0.005, 0.846), (2, 0.3, 0.351, 0.696, 8.55, 0.007, 0.688)])
def test_the_scripted_player_is_as_noisy_as_stated(requests, noise, success, score, turns, garbage, official):
    """Against an older implementation, which played 20,000 episodes; 2,000 here, 4 sigma."""
    episodes = demonstrations(ToolDesk(num_requests=requests, noise=noise), range(2000), 99, np.random.default_rng(0))
    scores, bad = np.array([e.total_reward for e in episodes]), np.array([e.info["garbage"] for e in episodes])
    assert set((scores * (2 + 2 * requests)).round(9)) <= set(range(7))
    assert np.mean([e.success for e in episodes]) == pytest.approx(success, abs=0.045)
    assert scores.mean() == pytest.approx(score, abs=0.025) and bad.mean() == pytest.approx(garbage, abs=0.008)
    assert np.mean([len(e.turns) for e in episodes]) == pytest.approx(turns, abs=0.2)
    assert np.where(bad, -1, np.where(scores == 1, 1.5, scores / 2)).mean() == pytest.approx(official, abs=0.06)
