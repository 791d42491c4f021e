"""The picture of credit in README: its numbers, worked by hand from the toy episode of results/credit.py."""

import math
import statistics

import pytest

from results import credit, report


@pytest.fixture(scope="module")
def rows():
    """Algorithm -> its numbers on the 4 + 4 + 4 + 3 sampled tokens, None where none is trained."""
    return {name: [None if math.isnan(x) else x for x, (_, turn) in zip(values.tolist(), credit.CELLS, strict=True)
                   if turn >= 0] for name, (values, _) in credit.credit_of_all().items()}


def turns(*values):
    return pytest.approx([v for v, count in zip(values, (4, 4, 4, 3), strict=True) for _ in range(count)], abs=1e-4)


def test_all_are_there_and_observations_have_no_credit():
    found = credit.credit_of_all()
    assert len(found) == len(report.ALGORITHMS)
    for values, remark in found.values():
        assert remark and all(math.isnan(values[t]) for t, (_, turn) in enumerate(credit.CELLS) if turn < 0)


def test_group_comparisons(rows):
    """Scores 1, 0, 0, 1: mean 1/2, std 1/sqrt(3). UFO: 1/8, 0, 0, 1/4: mean 3/32, std sqrt(33/2304)."""
    one = 0.5 * math.sqrt(3)
    assert rows["MS-GRPO"] == turns(*[one] * 4)
    mean, scores = 3 / 32, (1 / 8, 0, 0, 1 / 4)
    std = math.sqrt(sum((x - mean) ** 2 for x in scores) / 3)
    assert rows["UFO"] == turns(*[(1 / 8 - mean) / std] * 4)
    budget = rows["turn budget"]
    assert budget[7] is None and [x for x in budget if x is not None] == pytest.approx([one] * 14, abs=1e-4)


def test_gigpo_adds_the_comparison_with_turns_that_saw_the_same(rows):
    """Returns to go 0.857375 0.9025 0.95 1 | 0 0 | 0 0 0 | 0.9025 0.95 1. All saw the question, three "Rosa", two "Ida"."""
    same = [[0.857375, 0, 0, 0.9025], [0.9025, 0, 0.95], [0.95, 0]]
    steps = [(x[0] - statistics.mean(x)) / statistics.stdev(x) for x in same]
    one = 0.5 * math.sqrt(3)
    assert rows["GiGPO"] == turns(*[one + x for x in steps], one)


def test_igpo_adds_up_standardised_gains(rows):
    """Gains 1.5, -0.1, 1.4; 1.5; -0.1, 0.2; 1.5, 1.3: population mean and std over these eight; outcome +1."""
    gains = [1.5, -0.1, 1.4, 1.5, -0.1, 0.2, 1.5, 1.3]
    mean = sum(gains) / 8
    std = math.sqrt(sum((x - mean) ** 2 for x in gains) / 8)
    z = [(x - mean) / std for x in gains[:3]]
    assert rows["IGPO"] == turns(z[0] + z[1] + z[2] + 1, z[1] + z[2] + 1, z[2] + 1, 1)


def test_trees_add_both_comparisons_and_keep_half_of_the_tokens(rows):
    """In its tree (1, 0): 1/2 over sqrt(1/2); in the group sqrt(3)/2; the median of 15 entropies is kept."""
    kept = [x for x in rows["Tree-GRPO"] if x is not None]
    assert kept == pytest.approx([math.sqrt(0.5) + math.sqrt(0.75)] * 8, abs=1e-4)
    assert [x is None for x in rows["Tree-GRPO"]] == [False] * 2 + [True] * 2 + [False] * 3 + [True] + [
        False] + [True] * 3 + [False] * 2 + [True]


def test_ppo_is_the_outcome_minus_the_value_whitened_over_all_siblings(rows):
    mine = [1 - v for v in (0.35, 0.4, 0.45, 0.5, 0.6, 0.45, 0.4, 0.4, 0.4, 0.55, 0.6, 0.65, 0.8, 0.95, 0.97)]
    others = [r - v for r, values in ((0, (0.35, 0.5)), (0, (0.35, 0.3, 0.25)), (1, (0.35, 0.6, 0.9)))
              for v in values for _ in range(4)]
    pool = mine + others
    mean = sum(pool) / len(pool)
    std = math.sqrt(sum((x - mean) ** 2 for x in pool) / (len(pool) - 1))
    assert rows["ST-PPO"] == pytest.approx([(x - mean) / std for x in mine], abs=1e-4)


def test_seeupo_multiplies_later_ratios_and_archer_subtracts_minima(rows):
    """SeeUPO: worth 1.5 or 0, centred 0.75, over std 0.75 * 2 / sqrt(3); log-ratios of turns 3, 2, 1: 0.1, 0.05, -0.1.
    ArCHer: min Q - min V = 0.10, -0.15, 0.35, 0.10, their mean 0.10."""
    one = math.sqrt(0.75)
    assert rows["SeeUPO"] == turns(one * math.exp(0.05), one * math.exp(0.15), one * math.exp(0.1), one)
    assert rows["ArCHer"] == turns(0.0, -0.25, 0.25, 0.0)
