"""When a difference between two arms counts: the rule behind every verdict in docs/.

Two arms are run with the same seeds. Their differences, seed by seed, give a paired t interval.
Every claim names one comparison as the primary one, before its runs are made, with 10 seeds. All
other comparisons of a claim are secondary. A claim has one of four outcomes:

supported, refuted   the 95 % interval of the primary difference lies above or below 0
inconclusive         the interval contains 0
not testable here    the regime cannot answer, whatever the interval says: a check failed

The checks: the start is above what random play earns and below what is possible, the baseline
learns, and, where it can be measured, what the algorithm adds is at work. report.py prints them
beside the result.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SEEDS = 10  # of a primary comparison; with fewer a verdict is called provisional


class Check(NamedTuple):
    words: str  # what was looked at, with the numbers
    passed: bool

    def __str__(self) -> str:
        return self.words if self.passed else f"**failed**: {self.words}"


@functools.cache
def t_quantile(freedom: int, share: float = 0.975) -> float:
    """The value below which `share` (above 0.5) of Student's t distribution lies.

    >>> round(t_quantile(4), 3), round(t_quantile(9), 3)
    (2.776, 2.262)
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    angles = np.linspace(0, math.pi / 2, 200_001)  # t = sqrt(freedom) tan(angle): a finite range
    density = scale / math.sqrt(math.pi) * np.cos(angles) ** (freedom - 1)
    below = 0.5 + np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angles)))
    return math.sqrt(freedom) * math.tan(np.interp(share, below, angles))


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, one per seed (Student's t).

    A single seed says nothing: its interval is endless.

    >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3])]  # 0.2 +- 4.303 * 0.1 / sqrt(3)
    [-0.048, 0.448]
    """
    if len(differences) < 2:
        return -math.inf, math.inf
    half = t_quantile(len(differences) - 1) * np.std(differences, ddof=1) / len(differences) ** 0.5
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def verdict(differences: Sequence[float], checks: Sequence[Check] = ()) -> str:
    """One of the four outcomes.

    >>> verdict([0.1, 0.2, 0.3]), verdict([0.2, 0.2, 0.3]), verdict([-0.2, -0.2, -0.3])
    ('inconclusive', 'supported', 'refuted')
    >>> verdict([0.2, 0.2, 0.3], [Check("the baseline learns", False)])
    'not testable here'
    """
    if not all(check.passed for check in checks):
        return "not testable here"
    low, high = interval(differences)
    return "supported" if low > 0 else "refuted" if high < 0 else "inconclusive"


def regime(start: np.ndarray, gains: np.ndarray, floor: float, best: float,
           baseline: str = "the baseline", floor_is: str = "random play") -> list[Check]:
    """Whether a regime leaves room, and whether its baseline learns.

    Args:
        start: the metric of every seed before training.
        gains: what every seed of the baseline gained in training.
        floor, best: what random play earns, and perfect play; floor_is: another play than random.
        baseline: its name.

    The start must lie above the floor by 3 % of the way to the best and leave 10 % of it to learn.
    The baseline learns if the 95 % interval of its gain lies above 0.

    >>> for check in regime(np.array([0.2, 0.2]), np.array([0.4, 0.41]), 0.04, 1.0):
    ...     print(check)
    the start 0.20 must lie between random play 0.04 and the best 1.00
    the baseline must gain: [+0.34, +0.47]
    >>> for check in regime(np.array([0.05, 0.04]), np.array([0.5, 0.1]), 0.04, 1.0, "`ppo`"):
    ...     print(check)
    **failed**: the start 0.04 must lie between random play 0.04 and the best 1.00
    **failed**: `ppo` must gain: [-2.24, +2.84]
    """
    mean, room = float(np.mean(start)), best - floor
    low, high = interval(gains)
    return [Check(f"the start {mean:.2f} must lie between {floor_is} {floor:.2f} and the best "
                  f"{best:.2f}", floor + 0.03 * room <= mean <= best - 0.1 * room),
            Check(f"{baseline} must gain: [{low:+.2f}, {high:+.2f}]", low > 0)]


def acts(mechanism: str, seen: float, least: float) -> Check:
    """Whether what an algorithm adds is at work at all.

    >>> str(acts("ratio drift", 0.008, 0.2))
    '**failed**: ratio drift 0.008, needed 0.2'
    """
    return Check(f"{mechanism} {seen:.2g}, needed {least:g}", seen >= least)


def false_positives(seeds: int, collapse: float = 0.0, trials: int = 20_000) -> float:
    """Share of comparisons without any effect that the rule calls supported or refuted, simulated.

    Both arms draw from one distribution: around 0.7, or with probability `collapse` around 0.2.

    >>> 0.045 < false_positives(10) < 0.055
    True
    """
    rng = np.random.default_rng(0)
    runs = np.where(rng.random((2, trials, seeds)) < collapse, 0.2, 0.7)
    runs = runs + 0.05 * rng.standard_normal(runs.shape)
    differences = runs[0] - runs[1]
    half = t_quantile(seeds - 1) * differences.std(1, ddof=1) / seeds**0.5
    return float((abs(differences.mean(1)) > half).mean())


def power(effect: float, seeds: int, trials: int = 20_000) -> float:
    """Share of comparisons that are called supported when the true mean difference is `effect`
    standard deviations of the differences, simulated.

    >>> round(power(1.0, 10), 1), round(power(0.5, 10), 1)
    (0.8, 0.3)
    """
    rng = np.random.default_rng(0)
    differences = effect + rng.standard_normal((trials, seeds))
    half = t_quantile(seeds - 1) * differences.std(1, ddof=1) / seeds**0.5
    return float((differences.mean(1) > half).mean())
