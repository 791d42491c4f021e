"""Every number in README and docs comes from results/*.csv."""

import csv
import dataclasses
import doctest
import re
import shlex

import numpy as np
import pytest
import transformers
import tyro

from algos import ms_grpo
from benchmarks import pretrained
from conftest import ROOT
from results import claims, judge, report


def block(page: str, name: str) -> str:
    return (ROOT / page).read_text().split(f"<!-- table: {name} -->\n")[1].split("\n<!-- end -->")[0]


@pytest.mark.parametrize("algo", list(report.CLAIMS))
def test_the_tables_of_the_docs_are_those_of_the_csv(algo):
    rows = report.read(ROOT / f"results/{algo}.csv")
    for claim, arms in ((name, it.arms) for name, it in report.CLAIMS[algo].items()):
        assert block(f"docs/{algo}.md", claim) == report.claim_table(algo, claim)
        if claim in report.detailed(algo):
            assert block(f"docs/{algo}.md", f"{claim} in detail") == report.detail_table(algo, claim)
        seeds = [sorted(row["seed"] for row in rows if row["arm"] == arm) for arm in arms]
        assert min(map(len, seeds)) >= 5 and all(set(s) <= set(max(seeds, key=len)) for s in seeds), "paired seeds"
        assert not report.CLAIMS[algo][claim].says or set(seeds[0]) <= set(seeds[1]), "of the primary comparison"


def test_the_results_of_all_scripts_are_those_of_the_csv():
    assert block("docs/results.md", "results") == report.results_table()
    assert block("docs/results.md", "cross") == report.cross_table()
    assert block("docs/results.md", "cross differences") == report.cross_differences()
    assert block("docs/results.md", "verdicts") == report.verdicts_table()
    assert block("docs/results.md", "rule") == report.rule_table()
    assert block("docs/igpo.md", "gains") == report.gains_table()
    assert block("docs/gpu.md", "busy") == report.busy_table()
    assert block("docs/models.md", "models") == report.models_table()
    assert block("docs/recipes.md", "recipes") == report.recipes_table()
    assert block("docs/archer.md", "oracle") == report.oracle_table()
    assert block("docs/ufo.md", "retry") == report.retry_table()
    assert block("docs/seeupo.md", "turns") == report.turns_table()
    assert block("docs/gpu.md", "memory") == report.memory_table()
    assert block("docs/gpu.md", "computed memory") == report.computed_memory_table()
    assert block("docs/pretrained.md", "pretrained") == report.pretrained_table()
    assert block("docs/pretrained.md", "speed") == report.chat_speed_table()
    assert block("docs/pretrained.md", "starts") == report.starts_table()
    assert block("docs/pretrained.md", "passed") == report.passed_table()
    assert block("docs/pretrained.md", "plateau") == report.plateau_table()
    assert block("docs/st_ppo.md", "collapse") == report.collapse_table("st_ppo", report.COLLAPSES)
    assert block("docs/archer.md", "levels") == report.levels_table("archer", report.LEVEL_ARMS)


def test_the_readme_tells_the_default_runs_as_they_were_measured():
    assert block("README.md", "first run") == report.first_run()
    assert block("README.md", "algorithms") == report.algorithms_table()
    assert block("README.md", "headline") == report.headline()
    runs = report.default_runs()
    assert set(runs) == set(report.CLAIMS) == set(report.ALGORITHMS) == {algo for algo, *_ in report.DEFAULT_ARMS}
    for algo, row in runs.items():
        unit = "minute" if row["minutes"] == "1" else "minutes"
        minutes = f"python algos/{algo}.py        about {row['minutes']} {unit} on {row['cores']} CPU cores"
        assert minutes in (ROOT / f"algos/{algo}.py").read_text(), algo


def test_a_default_run_by_hand(monkeypatch):
    """284 seconds are 9.5 half minutes: 4.5 minutes when rounded to even."""
    row = {"script": "a", "seconds": "284", "cores": "2", "success_start": "0.126", "success_end": "0.5"}
    monkeypatch.setattr(report, "read", lambda path: [row])
    run = report.default_runs()["a"]
    assert (run["minutes"], run["success_start"], run["success_end"]) == ("4.5", "0.13", "0.50")


@pytest.mark.parametrize("seeds", [5, 10])
def test_without_an_effect_the_rule_errs_in_about_5_percent(seeds):
    """Over all of `verdict`, with differences that are not normal either: uniform, and of a few runs that collapse."""
    rng = np.random.default_rng(1)
    draws = {"normal": rng.standard_normal, "uniform": rng.random,
             "coarse": lambda shape: rng.integers(0, 9, shape) / 8.0}
    for name, draw in draws.items():
        differences = draw((4000, seeds)) - draw((4000, seeds))
        wrong = np.mean([judge.verdict(row) != "inconclusive" for row in differences])
        assert 0.03 < wrong < 0.07, (name, wrong)
    assert judge.false_positives(10, collapse=0.2) < 0.07


def test_the_quantile_of_t_is_that_of_the_tables():
    for freedom, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)):
        assert judge.t_quantile(freedom) == pytest.approx(value, abs=5e-4)


def test_one_seed_decides_nothing():
    assert judge.interval([0.3]) == (-np.inf, np.inf) and judge.verdict([0.3]) == "inconclusive"


def test_a_failed_check_decides_before_the_interval():
    clear = np.array([0.2, 0.21, 0.22])
    fine, failed = judge.Check("a", True), judge.Check("b", False)
    assert judge.verdict(clear, [fine]) == "supported" and judge.verdict(-clear, [fine]) == "refuted"
    assert judge.verdict(clear, [fine, failed]) == "not testable here"


@pytest.mark.parametrize("start, end, passed", [
    ([0.2, 0.22], [0.6, 0.61], [True, True]), ([0.06, 0.06], [0.6, 0.61], [False, True]),  # floor 0.04, 0.03 of 0.96 above
    ([0.07, 0.07], [0.6, 0.61], [True, True]), ([0.91, 0.91], [0.95, 0.951], [False, True]),
    ([0.2, 0.22], [0.2, 0.6], [True, False]), ([0.6, 0.61], [0.2, 0.22], [True, False])])
def test_the_checks_of_a_regime(start, end, passed):
    assert [check.passed for check in judge.regime(np.array(start), np.subtract(end, start), 0.04, 1.0)] == passed


def test_a_claim_judged_by_hand(monkeypatch):
    """Differences 0.1, 0.2, 0.3 at the end; the baseline gains 0.5; the mechanism is seen in a column."""
    rows = [{"arm": arm, "seed": seed, "success_start": "0.1", "success_end": end, "success_area": "0.3",
             "generated_tokens": "1000", "optimizer_steps": "4", "seconds": "9", "drift": drift}
            for arm, ends, drift in (("new", ("0.7", "0.8", "0.9"), "0.4"), ("old", ("0.6", "0.6", "0.6"), "0"))
            for seed, end in zip("123", ends, strict=True)]
    curves = [{"arm": "new", "seed": "1", "generated_tokens": "", "success": "0.1"}]
    floors = [{"game": "toy", "success": "0.01", "return": "-5"}]
    monkeypatch.setattr(report, "read", lambda path: {"toy": rows, "toy_curves": curves, "floors": floors}[path.stem])
    drift = ("drift", lambda mean: mean("new", "drift"), 0.5)
    for mechanism, outcome in (((), "inconclusive"), ((drift,), "not testable here")):
        claim = claims.Claim("t", "toy", ("new", "old"), says="new is better", at="end", mechanisms=mechanism)
        monkeypatch.setattr(report, "CLAIMS", {"toy": {"A": claim}})
        differences, checks, found = report.judged("toy", "A")
        assert differences == pytest.approx([0.1, 0.2, 0.3]) and found == outcome
        assert [check.passed for check in checks] == [True, True] + [False] * len(mechanism)
    text = report.claim_table("toy", "A")
    assert "+0.200 [-0.048, +0.448], 3 seeds, provisional: **not testable here**" in text
    assert "**failed**: drift 0.4, needed 0.5" in text and "- `new` minus `old` (3 seeds): over the run +0.000" in text


def test_the_baseline_gains_from_its_own_start_and_a_pair_is_read_where_its_shorter_run_ends(monkeypatch):
    """`old` starts at 0.5 and ends there: no gain, though `new` starts at 0.1. `brief` ends at 10 tokens, the pair at 100."""
    starts, ends, tokens = {"new": 0.1, "old": 0.5, "brief": 0.1}, {"new": 0.9, "old": 0.5, "brief": 0.1}, {"new": 200, "old": 100, "brief": 10}
    rows = [{"arm": arm, "seed": seed, "success_start": str(starts[arm]), "success_end": str(ends[arm] + 0.001 * int(seed)),
             "success_area": "0.3", "generated_tokens": str(tokens[arm])} for arm in starts for seed in "123"]
    curves = [{"arm": arm, "seed": seed, "generated_tokens": str(n), "success": str(y)} for arm in starts for seed in "123"
              for n, y in ((0, starts[arm]), (tokens[arm], ends[arm]))]
    floors = [{"game": "toy", "success": "0.01"}]
    monkeypatch.setattr(report, "read", lambda path: {"toy": rows, "toy_curves": curves, "floors": floors}[path.stem])
    claim = claims.Claim("t", "toy", ("new", "old", "brief"), says="new is better", baseline="old")
    monkeypatch.setattr(report, "CLAIMS", {"toy": {"A": claim}})
    differences, checks, _ = report.judged("toy", "A")
    assert differences == pytest.approx([0.0] * 3), "at 100 tokens new is half way, at 0.5"
    assert [check.passed for check in checks] == [True, False], "measured from the start of new, old would gain 0.4"
    assert report.difference("toy", "A", "new", "brief", "tokens") == pytest.approx([0.04] * 3)


def test_a_claim_that_nothing_is_lost_by_hand(monkeypatch):
    """Success at turn 1 before training: -0.01, -0.02, -0.03, interval -0.045 .. 0.005. Allowed is a loss of 0.03, 0.05 or nothing.
    The baseline has to learn in another metric, in which it gains."""
    rows = [{"arm": arm, "seed": seed, "first_start": str(start), "first_end": "0.3", "first_area": "0.3", "success_start": "0.2",
             "success_end": str(0.6 + 0.01 * int(seed)), "generated_tokens": "9", "optimizer_steps": "4", "seconds": "9"}
            for arm, starts in (("new", (0.29, 0.28, 0.27)), ("old", (0.3, 0.3, 0.3))) for seed, start in zip("123", starts, strict=True)]
    curves = [{"arm": row["arm"], "seed": row["seed"], "generated_tokens": "0", "first": row["first_start"]} for row in rows]
    floors = [{"game": "toy", "success": "0.1", "return": "-5"}]  # of a game with one turn
    monkeypatch.setattr(report, "read", lambda path: {"toy": rows, "toy_curves": curves, "floors": floors}[path.stem])
    for margin, outcome in ((0.05, "supported"), (0.03, "inconclusive"), (0.0, "inconclusive"), (-0.01, "refuted")):
        claim = claims.Claim("t", "toy", ("new", "old"), says="nothing is lost", metric="first", at="start", learns="success", margin=margin)
        monkeypatch.setattr(report, "CLAIMS", {"toy": {"A": claim}})
        differences, checks, found = report.judged("toy", "A")
        assert differences == pytest.approx([-0.01, -0.02, -0.03]) and found == outcome, margin
    assert [str(check) for check in checks] == ["the start 0.28 must lie between random play 0.10 and the best 1.00",
                                                "`old`, success, must gain: [+0.40, +0.44]"]
    text = report.claim_table("toy", "A")
    assert "before training -0.020 [-0.045, +0.005] (margin -0.01), 3 seeds, provisional: **refuted**" in text
    assert "at the end" not in text.split("Primary")[1], "nothing else is compared"


def test_the_table_at_equal_tokens_by_hand(monkeypatch):
    """After 100 tokens new is half way. old has no seed 3: the differences are those of the seeds 1 and 2, -0.075 and -0.275."""
    ends = {"new": {"1": 0.4, "2": 0.2, "3": 0.9}, "old": {"1": 0.4, "2": 0.5}}
    rows = [{"arm": arm, "seed": seed, "generated_tokens": {"new": "200", "old": "100"}[arm]} for arm in ends for seed in ends[arm]]
    curves = [{"arm": arm, "seed": seed, "generated_tokens": tokens, "success": success} for arm in ends for seed in ends[arm]
              for tokens, success in (("0", "0.25"), ({"new": "200", "old": "100"}[arm], str(ends[arm][seed])))]
    monkeypatch.setattr(report, "read", lambda path: curves if path.stem.endswith("curves") else rows)
    monkeypatch.setattr(report, "CLAIMS", {"toy": {"A": claims.Claim("t", "toy", ("new", "old"))}})
    monkeypatch.setattr(report, "CURVES", {"toy": {"success": "success"}})
    assert report.detail_table("toy", "A").splitlines() == [
        "| after 0k tokens | success |", "|---|---|", "| start policy | 0.25 ± 0 |", "| `new` | 0.375 ± 0.18 |",
        "| `old` | 0.45 ± 0.071 |", "| `new` minus `old` | [-1.45, +1.1] |"]  # -0.175 +- 12.706 * 0.1
    start = claims.Claim("t", "toy", ("new", "old"), at="start")
    monkeypatch.setattr(report, "CLAIMS", {"toy": {"A": start, "B": claims.Claim("t", "toy", ("new", "old")), "C": start}})
    assert report.detailed("toy") == ["A", "B"]
    assert report.detail_table("toy", "A").splitlines() == [
        "| before training | success |", "|---|---|", "| `new` | 0.25 ± 0 |", "| `old` | 0.25 ± 0 |",
        "| `new` minus `old` | [+0, +0] |"]


def test_every_claim_has_a_floor_and_arms_that_were_run():
    games = {row["game"] for row in report.read(ROOT / "results/floors.csv")}
    for algo, mine in report.CLAIMS.items():
        runs = {row["arm"] for row in report.read(ROOT / f"results/{algo}.csv")}
        for claim in mine.values():
            assert claim.game in games and {*claim.arms, claim.baseline or claim.arms[0]} <= runs


@pytest.mark.parametrize("success, collapsed", [
    ([0.2, 0.5, 0.6, 0.7, 0.6, 0.5, 0.1], False),  # last three 0.4, best three 0.63
    ([0.2, 0.5, 0.6, 0.7, 0.6, 0.2, 0.1], True),  # 0.3
    ([0.4, 0.4, 0.4, 0.3, 0.31, 0.31, 0.31], False),  # 0.09 below the start
    ([0.4, 0.4, 0.3, 0.3, 0.3, 0.2, 0.3], True), ([0.0, 0.0, 0.0, 0.0], False)])
def test_what_a_collapse_is(success, collapsed):
    assert report.is_collapsed(np.array(success)) == collapsed


@pytest.mark.parametrize("moment, expected", [("end", [0.2, 0.5]), ("tokens", [0.0, 0.2])])
def test_arms_are_compared_on_the_seeds_that_both_have(moment, expected, monkeypatch):
    """b has no seed 2. The shortest run of the seeds 1 and 3 has 100 tokens, when a is half way; that of seed 2 has 10."""
    ends = {("a", "1"): (0.6, 200), ("a", "2"): (1.0, 10), ("a", "3"): (0.8, 200), ("b", "1"): (0.4, 100), ("b", "3"): (0.3, 100)}
    rows = [{"arm": arm, "seed": seed, "success_end": str(end), "generated_tokens": str(tokens), **dict.fromkeys(("success_start", "success_area"), "0.2")}
            for (arm, seed), (end, tokens) in ends.items()]
    curves = [{"arm": row["arm"], "seed": row["seed"], "generated_tokens": tokens, "success": success} for row in rows
              for tokens, success in (("0", "0.2"), (row["generated_tokens"], row["success_end"]))]
    monkeypatch.setattr(report, "read", lambda path: curves if path.stem.endswith("curves") else rows)
    monkeypatch.setattr(report, "CLAIMS", {"toy": {"A": claims.Claim("t", "toy", ("a", "b"))}})
    assert report.difference("toy", "A", "a", "b", moment) == pytest.approx(expected)


def test_the_cross_table_by_hand(monkeypatch):
    """Means and deviations of two seeds; a dash where a script has no arm in this game."""
    rows = [{"arm": arm, "seed": seed, "success_start": "0.1", "success_end": end, "generated_tokens": tokens}
            for arm, seed, end, tokens in [("lake_ms_grpo", "3", "0.2", "80400"), ("lake_ms_grpo", "4", "0.4", "81600"),
                                           ("desk_ms_grpo", "3", "0.5", "30000"), ("desk_ms_grpo", "4", "0.5", "30000"),
                                           ("desk_igpo", "3", "1", "33000"), ("desk_igpo", "4", "0.9", "33000")]]
    monkeypatch.setattr(report, "read", lambda path: rows)
    monkeypatch.setattr(report, "CROSS", {"lake": "Frozen Lake", "desk": "tool desk"})
    lines = report.cross_table().splitlines()
    assert lines[0] == "| success at the end | Frozen Lake | tool desk |"
    assert lines[2] == "| generated tokens | 81k | 32k |"
    assert lines[3] == "| warm start | 0.10 ± 0.00 | 0.10 ± 0.00 |"
    assert "| `ms_grpo` | 0.30 ± 0.14 | 0.50 ± 0.00 |" in lines and "| `igpo` | – | 0.95 ± 0.07 |" in lines
    assert len(lines) == 6, "a script without any arm has no row"
    assert report.cross_differences().splitlines() == [  # 0.5 and 0.4: 0.45 +- 12.706 * 0.0707 / sqrt(2)
        "| minus `ms_grpo` | Frozen Lake | tool desk |", "|---|---|---|", "| `igpo` | – | +0.45 [-0.19, +1.09] |"]


def test_the_table_of_models_by_hand(monkeypatch):
    """One row per verdict and kind of layers; refused ones by their reason, whatever the number in it."""
    rows = [dict(zip(("model", "model_type", "layers", "verdict", "difference", "agree", "reason"), line, strict=True))
            for line in [("a", "a", "plain", "exact", "3e-06", "yes", ""),
                         ("d", "d", "plain", "refused", "", "", "no cache: x"),
                         ("e", "e", "odd", "refused", "2e+00", "no", "is off by 7 nats: y"),
                         ("b (x)", "b", "plain", "exact", "2e-05", "yes", ""),
                         ("f", "f", "plain", "refused", "1e+01", "yes", "is off by 0.8 nats: y"),
                         ("b", "b", "plain", "exact, slower", "1e-06", "yes", ""),
                         ("g", "g", "odd", "off", "5e-02", "no", "not seen")]]
    monkeypatch.setattr(report, "read", lambda path: rows)
    assert report.models_table().splitlines()[2:] == [
        "| exact | plain | a, b (x) | 2e-05 |", "| exact, slower | plain | b | 1e-06 |",
        "| off: not seen | odd | g | 5e-02 |", "| refused: no cache | plain | d |  |",
        "| refused: is off | odd; plain | e, f | 1e+01 |",
        "", "7 configurations of 6 architectures. The self-check gave the verdict of the trial for 4 of the 6 that could "
        "be tried."]


def test_the_examples_of_the_tables():
    for module, least in ((report, 3), (judge, 9)):
        found = doctest.testmod(module)
        assert found.attempted >= least and not found.failed


def test_the_table_of_chat_models_by_hand(monkeypatch):
    """Two seeds of one run, one of another: means, ranges, and minutes of 60 seconds."""
    def row(run, seed, end, seconds):
        return {"run": run, "seed": seed, "script": "igpo", "game": "tool_desk", "warm_start_steps": "10", "success_start": "0.25",
                "success_end": end, "unreadable_start": "0.5", "unreadable_end": "0", "silent_groups": "0.25", "seconds": seconds}
    monkeypatch.setattr(report, "read", lambda path: [row("a", "1", "0.5", "60"), row("b", "1", "1", "90"), row("a", "2", "0.75", "180"),
                                                       row("c", "1", "1", "6") | {"silent_groups": ""}])
    assert report.pretrained_table().splitlines()[2:] == [
        "| `a` | igpo | tool desk | 10 | 2 | 0.25 (0.25 to 0.25) | 0.62 (0.50 to 0.75) | 0.50 (0.50 to 0.50) | 0.00 (0.00 to 0.00) "
        "| 0.25 (0.25 to 0.25) | 2.0 (1.0 to 3.0) |",
        "| `b` | igpo | tool desk | 10 | 1 | 0.25 | 1.00 | 0.50 | 0.00 | 0.25 | 1.5 |",
        "| `c` | igpo | tool desk | 10 | 1 | 0.25 | 1.00 | 0.50 | 0.00 |  | 0.1 |"], "a script without groups has no silent ones"


def test_the_command_for_a_chat_model_is_the_run_that_was_measured(monkeypatch):
    """README and the page show one command, whose flags are those of the run; minutes are rounded, seeds in the order of the table."""
    for page in ("README.md", "docs/pretrained.md"):
        [command] = re.findall(r"^python (algos/ms_grpo\.py --model Hugging.*?)\n```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        words = shlex.split(command.replace("\\\n", " "))
        script, game, flags, _ = pretrained.RUNS["headline_ms_grpo"]
        shown, ran = (tyro.cli(ms_grpo.Args, args=list(some)) for some in (words[3:], [*pretrained.GAMES[game], *flags]))
        assert words[0] == f"algos/{script}.py" and shown == dataclasses.replace(ran, seed=6)
    rows = [{"run": run, "success_start": start, "success_end": end, "seconds": seconds, "cores": "2", "seed": end[0]}
            for run, start, end, seconds in (("headline_ms_grpo", "0.25", "1", "840"), ("other", "0", "0", "1"), ("headline_ms_grpo", "0.5", "0.875", "1199"))]
    monkeypatch.setattr(report, "read", lambda path: rows)
    assert report.headline() == (
        "It takes 14 to 20 minutes on 2 CPU cores. With seeds 1, 0, success on held-out questions rose from\n0.25, 0.50 after the imitation to "
        "1.00, 0.88 ([docs/pretrained.md](docs/pretrained.md)).")


def test_the_tables_of_imitation_and_of_speed_by_hand(monkeypatch):
    """0.75 is not above 0.75; of a tuning run the last evaluation counts, and only with the published learning rate."""
    def tuned(rate, seed, success, steps="40"):
        return {"imitation_steps": steps, "premature": "0.25", "seed": seed, "learning_rate": rate, "success": success}
    speed = [{"work": work, "precision": "bf16", "rules_read_once": once, "seconds": seconds, "rows": "2", "tokens": "9", "shared_tokens": "3", "threads": "1"}
             for work, once, seconds in (("rollout", "no", "4.0"), ("update", "no", "3.0"), ("rollout", "yes", "2.0"), ("update", "yes", "1.0"))]
    files = {"pretrained": [{"run": run, "success_end": end} for run, end in (("a", "0.9"), ("b", "0.75"), ("c", "1"))],
             "pretrained_tuning": [tuned("2e-05", "11", "0.2"), tuned("5e-05", "11", "0.99"), tuned("2e-05", "11", "0.8"), tuned("2e-05", "12", "0.5", "80")],
             "chat_speed": speed}
    monkeypatch.setattr(report, "read", lambda path: files[path.stem])
    monkeypatch.setattr(report, "IMITATIONS", {"short": ("40", "0.25", ["a", "b"]), "none": ("0", "0.25", ["c"])})
    assert report.passed_table().splitlines()[2:] == ["| short | 2 of 3 | 0.75, 0.90 | 0.80 | `a`, `b` |", "| none | 1 of 1 | 1.00 |  | `c` |"]
    assert report.chat_speed_table().splitlines()[2:4] == ["| bf16 | no | 3.0 | 4.0 |", "| bf16 | yes | 1.0 | 2.0 |"]


def test_the_table_of_starts_by_hand(monkeypatch):
    """A game without a row for some steps has an empty cell."""
    rows = [{"game": game, "steps": steps, "legal": legal, "success": success} for game, steps, legal, success in (
        ("tool_desk", "0", "0.250", "0.000"), ("tool_desk", "10", "1.000", "0.375"), ("snake", "10", "0.500", "0.125"))]
    monkeypatch.setattr(report, "read", lambda path: rows)
    assert report.starts_table().splitlines() == [
        "| game | legal, 0 steps | legal, 10 steps | success, 0 steps | success, 10 steps |", "|---|---|---|---|---|",
        "| tool desk | 0.25 | 1.00 | 0.00 | 0.38 |", "| snake |  | 0.50 |  | 0.12 |"]


def test_the_table_of_recipes_by_hand(monkeypatch):
    """Differences 0.1, 0.2, 0.3; the seeds are in another order in one arm; the plain script does not have the column."""
    ends = {"plain": {"1": "0.4", "2": "0.4", "3": "0.4"}, "patched": {"3": "0.7", "1": "0.5", "2": "0.6"}}
    rows = [{"recipe": "r", "arm": arm, "seed": seed, "success_start": "0.2", "success_end": end, "return_end": f"-{end}", "column": "void",
             "column_mean": "0.25" if arm == "patched" else "", "generated_tokens": "1000", "seconds": "9.6"}
            for arm, mine in ends.items() for seed, end in mine.items()]
    monkeypatch.setattr(report, "read", lambda path: rows)
    assert report.recipes_table().splitlines()[2:] == [
        "| `r` | plain | 3 | 0.200 | 0.400 ± 0.000 |  | -0.400 |  | 1000 | 10 |",
        "| `r` | patched | 3 | 0.200 | 0.600 ± 0.100 | +0.200 [-0.048, +0.448] | -0.600 | `void` 0.25 | 1000 | 10 |"]


def test_the_table_of_exact_values_by_hand(monkeypatch):
    """Two seeds, evaluations at -8 and -4 (mean -6) and so on: means 2 and 3 above, 2.5 with 12.7 * 0.5 to both sides."""
    curves = {"maze_archer": {"1": (-8, -4), "2": (-8, -6), "3": (0, 0)}, "other": {"1": (0, 0)}}
    exact = {"exact": {"1": (-6, -2), "2": (-6, -2)}}
    tables = {name: [{"arm": arm, "seed": seed, "return": str(x)} for arm, mine in table.items()
                     for seed, points in mine.items() for x in points]
              for name, table in (("archer_curves", curves), ("oracle", exact))}
    monkeypatch.setattr(report, "read", lambda path: tables[path.stem])
    assert report.oracle_table().splitlines()[2:] == [
        "| `maze_archer` | 2 | -5.000 ± 1.414 | -6.500 ± 0.707 |  |",
        "| `exact` | 2 | -2.000 ± 0.000 | -4.000 ± 0.000 | +2.500 [-3.853, +8.853] |"]


def test_the_comparison_at_equal_tokens_by_hand(monkeypatch):
    """Between evaluations at 0, 8 and 16 thousand tokens; differences at the end -0.3 and -0.4: mean -0.35, 12.7 * 0.05 to both sides."""
    rows = [{"run": run, "seed": seed, "generated_tokens": str(tokens), "eval_success": str(success)}
            for run, seed, curve in (("equal_a", "1", (0.2, 0.4, 1.2)), ("equal_a", "2", (0.4, 0.6, 1.4)), ("other", "1", (0, 0, 0)),
                                     ("equal_b", "1", (0.2, 0.4, 0.4)), ("equal_b", "2", (0.4, 0.5, 0.5)))
            for tokens, success in zip((0, 8000, 16000), curve, strict=True)]
    monkeypatch.setattr(report, "read", lambda path: rows)
    assert report.plateau_table().splitlines()[2:] == [
        "| `equal_a` | 0.30 | 0.40 | 0.50 | 0.80 | 0.70, 0.90 |  |",
        "| `equal_b` | 0.30 | 0.38 | 0.45 | 0.45 | 0.40, 0.50 | -0.35 [-0.99, +0.29] |", "", "Seeds 1, 2."]


def test_computed_memory_counts_the_adapters_that_peft_makes():
    peft = pytest.importorskip("peft")
    config = transformers.Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=64)
    model = peft.get_peft_model(transformers.Qwen2ForCausalLM(config), peft.LoraConfig(r=3, target_modules="all-linear"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.computed_memory(0, 32, 16, 48, 2, rank=3)[0]
    trained, size = report.computed_memory(1e9, 32, 16, 48, 2, rank=None)
    assert trained == 1e9 and 22e9 < size < 24e9


def run_of(*returns, seed="1", arm="a"):
    """Points of a curve every second iteration, 10 seconds and 1000 tokens apart."""
    return [{"arm": arm, "seed": seed, "iteration": str(2 * i), "return": str(x), "seconds": str(30 + 10 * i),
             "generated_tokens": str(1000 * i)} for i, x in enumerate(returns)]


def test_a_level_counts_when_the_next_evaluation_keeps_it():
    points = run_of(-12, -9, -11, -9.5, -9, -8)
    assert report.episodes_to(points, -10) == [6 * 16, 3000, 30]  # at -9 it was lost again
    assert report.episodes_to(points, -11) == [2 * 16, 1000, 10]
    assert report.episodes_to(points, -8) is None and report.episodes_to(points, -7) is None


def test_the_table_of_levels_by_hand(monkeypatch):
    """Two seeds: one reaches -12 after 96 episodes, one never; 16 and 8 of 20 on the way from -26.84 to -6.84."""
    curves = run_of(-26.84, -11, -14.84, -12, -10.84) + run_of(-26.84, -19, -18.84, seed="2")
    monkeypatch.setattr(report, "read", lambda path: curves)
    row = report.levels_table("archer", ["a"]).splitlines()[2].split(" | ")
    assert row[1:5] == ["32 episodes, 1k tokens, 10 s (2 of 2)", "32 episodes, 1k tokens, 10 s (1 of 2)",
                        "96 episodes, 3k tokens, 30 s (1 of 2)", "never"]
    assert row[5:] == ["8.00 ± 5.66", "0.60 ± 0.28 |"]


def test_collecting_runs_by_hand(tmp_path, monkeypatch):
    """Two evaluations 0.2 and 0.6: area 0.4; two optimizer steps an iteration."""
    folder = tmp_path / "runs/toy/arm_a-7/run"
    folder.mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (folder / "summary.json").write_text('{"success_start": 0.2, "success_end": 0.6}')
    (folder / "args.json").write_text('{"versions": {"commit": "0123456789abcdef"}}')
    (folder / "metrics.csv").write_text(
        "iteration,eval_success,eval_return,optimizer_steps,drawn_advantage,groups_without_signal,"
        "generated_tokens,seconds,eval_first\n0,0.2,-1,,,,,9,0.1\n1,,,2,0.5,0.25,70,11,\n2,0.6,1,2,,0.75,100,14,0.3\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setitem(report.CLAIMS, "toy", {"A": claims.Claim("t", "toy", ("arm_a", "arm_b"), metric="first", learns="success")})
    monkeypatch.setitem(report.EXTRA, "toy", {"drawn_advantage": ("mean", None), "groups_without_signal": ("mean", None), "first_groups_without_signal": ("first", None), "critic_loss": ("mean", None)})
    (tmp_path / "results/toy.csv").write_text("arm,seed,success_end\narm_a,7,0.1\narm_a,10,0.3\narm_b,7,0.4\n")
    report.collect(tmp_path / "runs", "toy")
    row, *others = csv.DictReader(open(tmp_path / "results/toy.csv"))
    assert [(other["arm"], other["seed"], other["success_end"]) for other in others] == [
        ("arm_a", "10", "0.3"), ("arm_b", "7", "0.4")], "runs that are not there leave their rows as they are"
    assert row == {"arm": "arm_a", "seed": "7", "success_start": "0.2", "success_end": "0.6",
                   "success_area": "0.4", "return_area": "0", "optimizer_steps": "4",
                   "first_start": "0.1", "first_end": "0.3", "first_area": "0.2",
                   "drawn_advantage": "0.5", "groups_without_signal": "0.5", "first_groups_without_signal": "0.25",
                   "critic_loss": "", "commit": "0123456789"}, "what the script does not log is blank"
    assert report.column([row], "arm_a", "return_area") == 0 and np.isnan(report.column([row], "arm_a", "critic_loss"))
    curves = list(csv.DictReader(open(tmp_path / "results/toy_curves.csv")))
    assert [(c["iteration"], c["success"], c["first"]) for c in curves] == [("0", "0.2", "0.1"), ("2", "0.6", "0.3")]
    assert report.at_tokens(curves, "arm_a", "success", 75) == pytest.approx([0.5])
    assert report.at_tokens(curves, "arm_a", "success", 500) == pytest.approx([0.6])


PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_the_pages_lead_somewhere(page):
    """The file is there, and in it a heading of that name or an anchor."""
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", (ROOT / page).read_text())
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            text = target.read_text()
            headings = [re.sub(r"[^a-z0-9 _-]", "", line.lstrip("# ").lower()).replace(" ", "-")
                        for line in text.splitlines() if line.startswith("#")]
            assert anchor in headings or f'<a id="{anchor}">' in text, (path, anchor)
    assert page != "README.md" or len(links) > 20, "links are found"
