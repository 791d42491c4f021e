"""results/estimators.py: its sums over all batches against random play, finite differences and numbers worked by hand."""

import collections
import math

import numpy as np
import pytest
import torch

from algos import gigpo, igpo, ms_grpo, tree_grpo
from conftest import ROOT
from results import estimators, report
from results.estimators import GAMES, MEANS, RULES, Batches, Episodes, Node

BATCHES = 1000  # of a random play


@pytest.fixture(scope="module")
def games():
    return {name: Episodes(name) for name in GAMES}


def play(node: Node | None, rng, turns: tuple = ()) -> tuple:
    """The (observation, answer, reward) of one random episode from a node on."""
    while node is not None:
        answer = int(rng.random() < node.chance)
        outcomes = node.outcomes[answer]
        probability, reward, _, following = outcomes[rng.choice(len(outcomes), p=[o[0] for o in outcomes])]
        turns, node = (*turns, (node.seen, answer, reward)), following
    return turns


def play_tree(start: Node, rng) -> list[tuple]:
    """A chain, and forks at turns of it that are equally likely: the actions before are repeated."""
    chain = play(start, rng)
    nodes = {start.seen: start}
    while True:
        more = {o[3].seen: o[3] for node in nodes.values() for os in node.outcomes.values() for o in os if o[3]}
        if more.keys() <= nodes.keys():
            break
        nodes |= more
    forks = [int(rng.integers(len(chain))) for _ in range(tree_grpo.Args().forks)]
    return [chain, *(play(nodes[chain[k][0]], rng, chain[:k]) for k in forks)]


def slow_gradient(b: Batches, credit: torch.Tensor, mean: str, rng, drawn: bool) -> np.ndarray:
    """(N, P), batch by batch, turn by turn."""
    mask, score, groups, values = b.mask.numpy(), b.score.numpy(), b.group.numpy(), credit.numpy()
    found = []
    for batch in range(1 + groups.max()):
        members = np.flatnonzero(groups == batch).tolist()
        if drawn:
            members = [members[i] for i in ms_grpo.draw_episodes(credit[members, 0], "aaw", len(members) // 2, rng)]
        turns = [(e, k) for e in members for k in range(mask.shape[1]) if mask[e, k]]
        at_turn, total = collections.Counter(k for _, k in turns), np.zeros(score.shape[2])
        for e, k in turns:
            weight = {"tokens": 1 / len(turns), "rows": 1 / mask[e].sum() / len(members),
                      "episodes": 1 / len(members), "turns": 1 / at_turn[k]}[mean]
            total += weight * values[e, k] * score[e, k]
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize("game", ["asking pays", "two ways"])
@pytest.mark.parametrize("name", RULES)
def test_the_sum_over_all_batches_is_the_mean_of_random_play(games, name, game):
    """Expected gradient and variance, for the mean over the loss that the script takes."""
    rule, start, rng = RULES[name], GAMES[game], np.random.default_rng(3)
    number = {tuple((t.node.seen, t.answer, t.reward) for t in turns): i for i, turns in enumerate(games[game].turns)}
    args = tree_grpo.Args()
    units = [[play_tree(start, rng) if rule.trees else [play(start, rng)]
              for _ in range(args.group_size if rule.trees else 8)] for _ in range(BATCHES)]
    index = torch.tensor([number[turns] for batch in units for unit in batch for turns in unit])
    size = len(index) // BATCHES
    rows = torch.arange(len(index))
    b = Batches(games[game], index, rows // size, rows // (1 + args.forks))
    gradients = slow_gradient(b, rule.credit(b), rule.mean, rng, rule.drawn)
    expected, variance = {mean: rest for mean, *rest in estimators.moments(games[game], rule)}[rule.mean]
    error = gradients.std(0) / math.sqrt(BATCHES)
    assert (np.abs(gradients.mean(0) - expected.numpy()) < 4.5 * error + 1e-9).all()
    squares = ((gradients - expected.numpy()) ** 2).sum(1) * size
    assert abs(squares.mean() - variance) < 4.5 * squares.std() / math.sqrt(BATCHES) + 1e-9


def shifted(node: Node, decision: int, step: float) -> Node:
    """The game with one logit moved."""
    chance = node.chance
    if node.decision == decision:
        chance = 1 / (1 + math.exp(-(math.log(chance / (1 - chance)) + step)))
    return Node(node.seen, node.decision, chance, {
        answer: [(p, reward, gain, following and shifted(following, decision, step))
                 for p, reward, gain, following in outcomes] for answer, outcomes in node.outcomes.items()})


@pytest.mark.parametrize("name", GAMES)
def test_the_true_gradient_is_a_finite_difference_of_the_expected_return(games, name):
    step = 1e-5
    for decision, found in enumerate(games[name].true_gradient().tolist()):
        high, low = (estimators.node_value(shifted(GAMES[name], decision, x), 1.0) for x in (step, -step))
        assert found == pytest.approx((high - low) / (2 * step), abs=1e-8)


def test_true_gradients_by_hand(games):
    p = math.sqrt(0.02)
    expected = {"asking pays": [0.25], "asking costs": [-0.25], "asking helps": [0.1], "two questions": [0.3125, 0.0625], "two ways": [0, 0.125, 0.125], "noise first": [0, 0.25],
                "rare success": [p * (1 - p) * p, p * p * (1 - p)]}
    for name, values in expected.items():
        assert games[name].true_gradient().tolist() == pytest.approx(values, abs=1e-12)
        assert games[name].probability.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", GAMES)
def test_all_batches_together_have_probability_one(games, name):
    for rule in (RULES["UFO"], RULES["Tree-GRPO"]):
        b, probability = estimators.make_batches(games[name], rule)
        assert probability.sum().item() == pytest.approx(1)
        assert len(b.rows) == len(probability) * (6 if rule.trees else 8)


def test_a_right_answer_that_is_rare_by_hand(games):
    """One success in eight: probability 8 p (1-p)^7, advantages 7/8 and -1/8 over their std. The score of its two turns is 1 - p."""
    rows = {mean: gradient for mean, gradient, _ in estimators.moments(games["rare success"], RULES["MS-GRPO, sampling all"])}
    p, expected = math.sqrt(0.02), torch.zeros(2, dtype=torch.double)
    for right in range(1, 8):
        chance = math.comb(8, right) * 0.02**right * 0.98 ** (8 - right)
        std = math.sqrt(right * (8 - right) / 8 / 7) + 1e-6
        # expected score of a failure: the scores of all episodes have mean 0
        win = torch.tensor([1 - p, 1 - p], dtype=torch.double)
        lose = -0.02 / 0.98 * win
        expected += chance * (right * (1 - right / 8) * win + (8 - right) * (-right / 8) * lose) / std / 8
    assert rows["episodes"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert rows["tokens"].tolist() == pytest.approx((expected / 2).tolist(), rel=1e-6)  # two turns each


def test_with_normal_gains_separate_z_scores_are_blind_and_one_z_score_is_not():
    """Going on pays N(1, 0.3), the outcome is a coin, groups of 8; mean over episodes. True: 0.25."""
    torch.manual_seed(0)
    groups = 4000
    asks = torch.rand(8 * groups) < 0.5
    gains = torch.stack([torch.where(asks, 1 + 0.3 * torch.randn(8 * groups), 0.0), torch.zeros(8 * groups)], 1).double()
    mask = torch.stack([torch.ones_like(asks), asks], 1)
    outcomes = (torch.rand(8 * groups) < 0.5).double()
    group = torch.arange(8 * groups) // 8
    last = torch.stack([~asks, asks], 1)
    rewards = torch.where(last, outcomes[:, None], gains)
    of_turn = group[:, None].expand_as(mask)
    centred = torch.zeros_like(rewards)
    centred[mask] = gigpo.relative_scores(igpo.turn_returns(rewards, mask, 1.0)[mask], of_turn[mask], "none")
    credits = {"separate": igpo.turn_returns(igpo.turn_rewards(gains, outcomes, mask, group), mask, 1.0),
               "joint": igpo.turn_returns(ms_grpo.turn_advantages(rewards, mask, group, "step"), mask, 1.0), "centred": centred}
    towards = {name: (credit[:, 0] * (asks.double() - 0.5)).mean().item() for name, credit in credits.items()}
    assert towards == pytest.approx({"separate": 0.0, "joint": 0.148, "centred": 0.235}, abs=0.012)


def test_the_file_is_what_the_functions_give(games):
    """Every row of two games; the others take longer."""
    rows = report.read(ROOT / "results/estimators.csv")
    assert {(row["game"], row["rule"]) for row in rows} == {(game, rule) for game in GAMES for rule in RULES}
    for game in ("rare success", "two ways"):
        for name, rule in RULES.items():
            of_rule = {row["mean"]: row for row in rows if (row["game"], row["rule"]) == (game, name)}
            found = list(estimators.moments(games[game], rule))
            assert [mean for mean, *_ in found] == list(of_rule)
            for mean, gradient, variance in found:
                numbers = [float(of_rule[mean][f"gradient_{i}"]) for i in range(len(gradient))]
                assert numbers == pytest.approx(gradient.tolist(), rel=1e-4, abs=1e-8)
                assert float(of_rule[mean]["variance_per_episode"]) == pytest.approx(variance, rel=1e-4, abs=1e-8)
                true = games[game].true_gradient()
                assert int(of_rule[mean]["in_the_script"]) == (mean == rule.mean)
                if gradient.norm() > 1e-9:
                    cosine = torch.nn.functional.cosine_similarity(gradient, true, dim=0).item()
                    assert float(of_rule[mean]["cosine"]) == pytest.approx(cosine, rel=1e-4)
                    assert float(of_rule[mean]["length_ratio"]) == pytest.approx((gradient.norm() / true.norm()).item(), rel=1e-4)
                    episodes = variance / (gradient**2).sum().item()
                    assert float(of_rule[mean]["episodes_for_signal"]) == pytest.approx(episodes, rel=1e-4)


def test_the_page_is_made_from_the_file():
    rows, page = report.read(ROOT / "results/estimators.csv"), (ROOT / "docs/estimators.md").read_text()
    for name in ("asking", "others", "means"):
        text = getattr(estimators, f"{name}_table")(rows)
        assert f"<!-- table: {name} -->\n{text}\n<!-- end -->" in page


def test_the_table_names_what_a_rule_learns():
    """Rules that see the price of asking follow it, UFO never asks, IGPO cannot tell."""
    lines = [line.split(" | ") for line in estimators.asking_table(report.read(ROOT / "results/estimators.csv")).splitlines()]
    learns = {cells[0].strip("| "): (cells[2], cells[4], cells[6].strip("| ")) for cells in lines[2:]}
    assert learns["UFO"] == ("stop asking",) * 3 and learns["IGPO"] == ("neither", "neither", "ask")
    for rule in ("*the expected return*", "MS-GRPO", "GiGPO", "Tree-GRPO", "ST-PPO", "SeeUPO", "ArCHer", "turn budget", "IGPO, price also a reward"):
        assert learns[rule] == ("ask", "stop asking", "ask")


def test_what_the_text_of_the_page_says():
    """Its numbers that stand outside the tables."""
    rows = {(row["game"], row["rule"]): row for row in report.read(ROOT / "results/estimators.csv") if row["in_the_script"] == "1"}
    said = {("two questions", "IGPO", "gradient_1"): (-0.052, 3), ("two questions", "gains and outcome, one z-score", "cosine"): (-0.85, 2),
            ("rare success", "IGPO", "cosine"): (0.80, 2), ("rare success", "IGPO", "episodes_for_signal"): (5, 0),
            ("rare success", "ST-PPO", "episodes_for_signal"): (10, 0), ("rare success", "ArCHer", "episodes_for_signal"): (21, 0),
            ("noise first", "MS-GRPO, sampling all", "episodes_for_signal"): (11, 0),
            ("noise first", "MS-GRPO, all, credit return_to_go", "episodes_for_signal"): (6, 0)}
    for (game, rule, column), (value, digits) in said.items():
        assert round(float(rows[game, rule][column]), digits) == value, (game, rule)
    for rule in RULES:  # "centred" is right in all games with questions
        if rule == "gains and outcome, centred":
            assert all(float(rows[game, rule]["cosine"]) > 0.99 for game in ("asking pays", "asking costs", "asking helps", "two questions"))
    assert {rule for rule in RULES if 45 < float(rows["rare success", rule]["episodes_for_signal"]) < 60} >= {"UFO", "IGPO, outcome", "SeeUPO"}


def test_every_script_has_a_rule_with_the_mean_of_its_loss():
    assert {rule.script for rule in RULES.values()} - {""} == set(report.ALGORITHMS)
    assert {rule.mean for rule in RULES.values()} <= set(MEANS)
