"""From run folders to results/*.csv, and from those to the tables and figures of README and docs.

    python results/report.py [runs/claims]

Every run below the folder becomes a row of results/<algo>.csv (its arm and seed are in the folder's
name) and its evaluations rows of results/<algo>_curves.csv, in place of older rows of that arm and
seed; all other rows stay. Tables and figures are made from the CSV files only (credit.png: from a
made-up episode, see credit.py).
"""

import collections
import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from results import credit, judge
from results.claims import (ALGORITHMS, CLAIMS, COLLAPSES, CROSS, CURVES, DEFAULT_ARMS,
                            DIAGNOSTICS, EPISODES, EXTRA, IMITATIONS, LEVEL_ARMS, LEVELS, MOMENTS,
                            PAIRS)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def other_metrics(algo: str) -> list[str]:
    """What the claims of an algorithm look at besides success and return."""
    named = {name for it in CLAIMS.get(algo, {}).values() for name in (it.metric, it.learns)}
    return sorted(named - {"success", "return", ""})


def collect(folder: Path, algo: str):
    """Put finished runs into results/<algo>.csv and <algo>_curves.csv."""
    rows, curves, drift = [], [], []
    for summary in sorted(folder.glob(f"{algo}/*/*/summary.json")):
        arm, seed = summary.parents[1].name.rsplit("-", 1)
        if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
            raise SystemExit(f"{summary.parents[1]} holds two runs: delete one")
        metrics = read(summary.parent / "metrics.csv")
        evals = [row for row in metrics if row["eval_success"]]
        for row in evals:
            curves.append({"arm": arm, "seed": seed, "iteration": row["iteration"],
                           "generated_tokens": row["generated_tokens"] or 0,
                           "seconds": row["seconds"],
                           "success": row["eval_success"], "return": row["eval_return"],
                           **{name: row[f"eval_{name}"] for name in other_metrics(algo)},
                           **{name: row[name] for name in CURVES.get(algo, ())}})
        drift += [{"arm": arm, "seed": seed, "iteration": row["iteration"],
                   **{name: row[name] for name in DIAGNOSTICS[algo]}}
                  for row in metrics[1:] if algo in DIAGNOSTICS and row["optimizer_steps"] != "0"]
        areas = {f"{name}_area": np.mean([float(row[f"eval_{name}"]) for row in evals])
                 for name in ("success", "return")}
        for name in other_metrics(algo):
            values = [float(row[f"eval_{name}"]) for row in evals]
            areas |= {f"{name}_start": values[0], f"{name}_end": values[-1],
                      f"{name}_area": np.mean(values)}
        extra = {}
        for name, (when, _) in EXTRA.get(algo, {}).items():
            column_name = name.removeprefix("first_")
            values = [float(row[column_name]) for row in metrics[1:] if row.get(column_name)]
            last = values[-1:] if name.startswith("eval_") else values[-10:]
            chosen = {"mean": values, "first": values[:1], "end": last}[when]
            extra[name] = np.mean(chosen) if chosen else ""
        record = json.loads((summary.parent / "args.json").read_text())
        rows.append({"arm": arm, "seed": seed, **json.loads(summary.read_text()), **areas,
                     "optimizer_steps": sum(int(row["optimizer_steps"]) for row in metrics[1:]),
                     **extra, "commit": record["versions"]["commit"][:10]})
        if algo == "cross":  # two evaluations are no curve
            rows[-1]["learning_rate"] = record["args"]["learning_rate"]
    for name, table in ((algo, rows), (f"{algo}_curves", curves), (f"{algo}_drift", drift)):
        if table and name != "cross_curves":
            path, new = ROOT / f"results/{name}.csv", {(row["arm"], row["seed"]) for row in table}
            old = [row for row in (read(path) if path.exists() else [])
                   if (row["arm"], row["seed"]) not in new]
            table = [{name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
                     for row in table]
            table = sorted(old + table, key=lambda row: (row["arm"], int(row["seed"])))
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)))
                writer.writeheader()
                writer.writerows(table)


def is_collapsed(success: np.ndarray) -> bool:
    """Whether the last three evaluations of a run are, in the mean, less than half of the best
    three in a row, or more than 0.1 below the first evaluation."""
    means = np.convolve(success, np.ones(3) / 3, "valid")
    return bool(means[-1] < 0.5 * means.max() or means[-1] < success[0] - 0.1)


def collapse_table(algo: str, arms: list[str]) -> str:
    """Best and last success of every arm, how many seeds collapsed, and what the updates were."""
    curves, drift = (read(ROOT / f"results/{algo}_{name}.csv") for name in ("curves", "drift"))
    heads = {"clip_fraction": "clip fraction", "clip_bias_norm": "norm of C",
             "clip_bias_norm_max": "its maximum", "gradient_scale": "scale s",
             "approx_kl": "approx. KL", "entropy": "entropy"}
    lines = ["| arm | collapsed | best 3 evaluations | last 3 | " + " | ".join(heads.values())
             + " |", "|---" * (4 + len(heads)) + "|"]
    for arm in arms:
        seeds = sorted({row["seed"] for row in curves if row["arm"] == arm}, key=int)
        runs = [np.array([float(row["success"]) for row in curves
                          if row["arm"] == arm and row["seed"] == seed]) for seed in seeds]
        best = [np.convolve(run, np.ones(3) / 3, "valid").max() for run in runs]
        of_arm = [row for row in drift if row["arm"] == arm]
        cells = [f"`{arm}`", f"{sum(map(is_collapsed, runs))} of {len(runs)}",
                 f"{np.mean(best):.2f}", f"{np.mean([run[-3:].mean() for run in runs]):.2f}"]
        for name in heads:
            values = [float(row[name]) for row in of_arm]
            cells.append(f"{np.max(values) if name.endswith('max') else np.mean(values):.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drift_figure(algo: str, arms: list[str]):
    """What the updates did over the iterations, mean over the seeds."""
    drift = read(ROOT / f"results/{algo}_drift.csv")
    heads = {"train_success": "training success", "clip_fraction": "clip fraction",
             "clip_bias_norm": "norm of the clip bias C", "entropy": "entropy, nats"}
    figure = Figure((4 * len(heads), 3.4), layout="constrained")
    for axis, (name, head) in zip(figure.subplots(1, len(heads)), heads.items(), strict=True):
        for color, arm in enumerate(arms):
            of_arm = [row for row in drift if row["arm"] == arm]
            iterations = sorted({int(row["iteration"]) for row in of_arm})
            values = np.array([[float(row[name]) for row in of_arm if int(row["iteration"]) == i]
                               for i in iterations])
            axis.plot(iterations, values, f"C{color}", linewidth=0.5, alpha=0.4)
            axis.plot(iterations, values.mean(1), f"C{color}", label=arm.split("_", 1)[1])
        axis.set(title=head, xlabel="iteration")
        if name == "clip_bias_norm":
            axis.set_yscale("symlog", linthresh=0.1)
    axis.legend(title="mean (thin: each seed)", fontsize=8, title_fontsize=8)
    figure.savefig(ROOT / f"docs/figures/{algo}_drift.png", dpi=120)


def column(rows: list[dict[str, str]], arm: str, name: str) -> np.ndarray:
    """The values of an arm, in the order of its seeds; nan where its script has no such column."""
    of_arm = sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["seed"]))
    return np.array([float(row[name] or "nan") for row in of_arm])


def at_tokens(curves: list[dict[str, str]], arm: str, metric: str, tokens: float) -> np.ndarray:
    """The metric of every seed of an arm after so many generated tokens, between evaluations."""
    values = []
    for seed in sorted({row["seed"] for row in curves if row["arm"] == arm}, key=int):
        points = [row for row in curves if row["arm"] == arm and row["seed"] == seed]
        values.append(np.interp(tokens, [float(row["generated_tokens"]) for row in points],
                                [float(row[metric]) for row in points]))
    return np.array(values)


def read_claim(algo: str, claim: str):
    """Runs and curves of an algorithm, and a metric: arm -> moment -> value of every seed."""
    metric, arms = CLAIMS[algo][claim].metric, CLAIMS[algo][claim].arms
    rows, curves = read(ROOT / f"results/{algo}.csv"), read(ROOT / f"results/{algo}_curves.csv")
    values = {arm: {name: column(rows, arm, f"{metric}_{name}")
                    for name in ("start", "end", "area")} for arm in arms}
    return rows, curves, values


def difference(algo: str, claim: str, first: str, second: str, moment: str) -> np.ndarray | None:
    """The metric of one arm minus that of another, of every seed that both have; None if it was not
    recorded.

    moment: start, end, area (mean over the run), or tokens: when the shorter of the two runs ends.
    """
    rows, curves, _ = read_claim(algo, claim)
    metric = CLAIMS[algo][claim].metric
    seeds = set.intersection(*({row["seed"] for row in rows if row["arm"] == arm}
                               for arm in (first, second)))
    rows, curves = ([row for row in some if row["seed"] in seeds] for some in (rows, curves))
    if moment != "tokens":
        one, other = (column(rows, arm, f"{metric}_{moment}") for arm in (first, second))
        return one - other
    if not all(row["generated_tokens"] for row in curves if row["arm"] in (first, second)):
        return None
    tokens = equal_tokens(rows, (first, second))
    one, other = (at_tokens(curves, arm, metric, tokens) for arm in (first, second))
    return one - other


def equal_tokens(rows: list[dict], arms: Sequence[str]) -> float:
    """Generated tokens of the shortest run of these arms."""
    return min(column(rows, arm, "generated_tokens").min() for arm in arms)


def judged(algo: str, claim: str) -> tuple[np.ndarray, list[judge.Check], str]:
    """The primary comparison of a claim: paired differences, checks, outcome."""
    it = CLAIMS[algo][claim]
    rows, _, values = read_claim(algo, claim)
    [floor] = [row for row in read(ROOT / "results/floors.csv") if row["game"] == it.game]
    baseline, learns = it.baseline or it.arms[1], it.learns or it.metric
    start, end = (column(rows, baseline, f"{learns}_{name}") for name in ("start", "end"))
    least = float(floor.get(it.metric, floor["success"]))
    checks = judge.regime(values[it.arms[0]]["start"], end - start, least, it.best,
                          f"`{baseline}`" + f", {it.learns}," * bool(it.learns), it.floor_is)
    for words, value, least in it.mechanisms:
        checks.append(judge.acts(words, value(lambda *name: column(rows, *name).mean()), least))
    differences = difference(algo, claim, *it.arms[:2], it.at)
    return differences, checks, judge.verdict(differences + it.margin, checks)


def of_seeds(differences: np.ndarray) -> str:
    return f"{len(differences)} seeds" + ", provisional" * (len(differences) < judge.SEEDS)


def claim_table(algo: str, claim: str) -> str:
    """The table of a claim, its verdict with the checks, and all other comparisons."""
    it = CLAIMS[algo][claim]
    arms = it.arms
    rows, _, values = read_claim(algo, claim)
    heads = {"start": f"{it.metric.replace('_', ' ')} at start"}
    extra, totals = {}, ()
    if it.at != "start":
        heads |= {"end": "at the end", "area": "mean over the run"}
        extra = {name: head for name, (_, head) in EXTRA.get(algo, {}).items() if head}
        totals = ("optimizer_steps", "generated_tokens", "seconds")
    names = ["arm", "seeds", *heads.values(), *extra.values(),
             *(name.replace("_", " ") for name in totals)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for arm in arms:
        cells = [f"`{arm}`", str(len(values[arm]["end"])),
                 *(f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in map(values[arm].get, heads)),
                 *("" if np.isnan(x) else f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.3f}"
                   for x in (column(rows, arm, name).mean() for name in extra))]
        cells += [f"{column(rows, arm, name).mean():.0f}" for name in totals]
        lines.append("| " + " | ".join(cells) + " |")
    if it.says:
        differences, checks, outcome = judged(algo, claim)
        low, high = judge.interval(differences)
        lines.append(
            f"\nPrimary: {it.says}. `{arms[0]}` minus `{arms[1]}` {MOMENTS[it.at]} "
            f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
            + f" (margin {it.margin:g})" * bool(it.margin) + f", {of_seeds(differences)}: "
            f"**{outcome}**. Checks: " + "; ".join(map(str, checks)) + ".")
    lines.append(f"\n{'Secondary differences' if it.says else 'Differences'} [95 % interval]:\n")
    pairs = [(arms[0], arm) for arm in arms[1:]]
    pairs += [pair for pair in PAIRS.get(algo, []) if set(pair) <= set(arms) - {arms[0]}]
    for first, second in pairs:
        parts = []
        for moment, words in MOMENTS.items():
            if (moment == "start") != (it.at == "start"):
                continue
            differences = difference(algo, claim, first, second, moment)
            primary = it.says and (first, second) == arms[:2] and moment == it.at
            if differences is None or primary:
                continue
            if it.at == "start" and not differences.any():  # these arms play alike before training
                continue
            low, high = judge.interval(differences)
            count = len(differences)
            parts.append(f"{words} {differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        if parts:
            lines.append(f"- `{first}` minus `{second}` ({count} seeds): " + "; ".join(parts))
    return "\n".join(lines)


def verdicts_table() -> str:
    """Every claim with its primary comparison, its checks and its outcome."""
    heads = ["algorithm", "claim", "outcome", "primary comparison [95 %]", "seeds", "checks"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for algo, claims in CLAIMS.items():
        for name, it in claims.items():
            if it.says:
                differences, checks, outcome = judged(algo, name)
                low, high = judge.interval(differences)
                lines.append("| " + " | ".join([
                    ALGORITHMS[algo][0], f"{it.says} ([{name}]({algo}.md#{name.lower()}))",
                    f"**{outcome}**",
                    f"`{it.arms[0]}` minus `{it.arms[1]}`, {it.metric.replace('_', ' ')} "
                    f"{MOMENTS[it.at]}: {differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
                    + f", margin {it.margin:g}" * bool(it.margin),
                    of_seeds(differences), "; ".join(map(str, checks))]) + " |")
    return "\n".join(lines)


def rule_table() -> str:
    """How often the rule errs without an effect and finds one, simulated (judge.py)."""
    effects = (0.5, 1.0, 1.5, 2.0)
    lines = ["| seeds | errs without an effect | errs if also every fifth run collapses | "
             + " | ".join(f"finds an effect of {effect:g}" for effect in effects) + " |",
             "|---" * (3 + len(effects)) + "|"]
    for seeds in (5, 10):
        cells = [judge.false_positives(seeds), judge.false_positives(seeds, collapse=0.2),
                 *(judge.power(effect, seeds) for effect in effects)]
        lines.append("| " + " | ".join([str(seeds), *(f"{x:.0%}" for x in cells)]) + " |")
    return "\n".join(lines)


def episodes_to(points: list[dict[str, str]], level: float) -> list[float] | None:
    """Episodes, generated tokens and seconds after which a run's return first reached a level and
    kept it at the next evaluation; without its start (the warm start). None: never."""
    reached = [float(row["return"]) >= level for row in points]
    for row, now, later in zip(points, reached, reached[1:], strict=False):
        if now and later:
            return [EPISODES * int(row["iteration"]), float(row["generated_tokens"]),
                    float(row["seconds"]) - float(points[0]["seconds"])]
    return None


def levels_table(algo: str, arms: list[str]) -> str:
    """What every arm needed for every level, and how far it stayed from ideal play."""
    curves, ideal = read(ROOT / f"results/{algo}_curves.csv"), CLAIMS[algo]["A"].best
    lines = ["| arm | " + " | ".join(f"return {level}" for level in LEVELS)
             + f" | return at the end, below ideal play ({ideal:.2f}) | of the way there |",
             "|---" * (len(LEVELS) + 3) + "|"]
    for arm in arms:
        seeds = sorted({row["seed"] for row in curves if row["arm"] == arm}, key=int)
        runs = [[row for row in curves if row["arm"] == arm and row["seed"] == s] for s in seeds]
        cells = [f"`{arm}`"]
        for level in LEVELS:
            found = [x for x in (episodes_to(run, level) for run in runs) if x]
            episodes, tokens, seconds = np.mean(found, axis=0) if found else (0, 0, 0)
            needed = f"{episodes:.0f} episodes, {tokens / 1000:.0f}k tokens, {seconds:.0f} s"
            cells.append(f"{needed} ({len(found)} of {len(runs)})" if found else "never")
        start, end = (np.array([float(run[i]["return"]) for run in runs]) for i in (0, -1))
        way = (end - start) / (ideal - start)
        cells += [f"{(ideal - end).mean():.2f} ± {(ideal - end).std(ddof=1):.2f}",
                  f"{way.mean():.2f} ± {way.std(ddof=1):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def detailed(algo: str) -> list[str]:
    """The claims with a table of everything in CURVES: of the same arms at the same moment one."""
    found = {}
    for claim, it in CLAIMS[algo].items():
        found.setdefault((it.arms, it.at == "start"), claim)
    return list(found.values()) if algo in CURVES else []


def detail_table(algo: str, claim: str) -> str:
    """Everything in CURVES after as many generated tokens as the shortest run of the claim has, or
    before training."""
    it = CLAIMS[algo][claim]
    arms = it.arms
    rows, curves = read(ROOT / f"results/{algo}.csv"), read(ROOT / f"results/{algo}_curves.csv")
    tokens = 0 if it.at == "start" else equal_tokens(rows, arms)
    when = f"after {tokens / 1000:.0f}k tokens" if tokens else MOMENTS["start"]
    lines = [f"| {when} | " + " | ".join(CURVES[algo].values()) + " |",
             "|---" * (len(CURVES[algo]) + 1) + "|"]
    at = {arm: [at_tokens(curves, arm, name, tokens) for name in CURVES[algo]] for arm in arms}
    start = [at_tokens(curves, arms[0], name, 0) for name in CURVES[algo]]
    shown = {"start policy": start} if tokens else {}
    for label, values in (shown | {f"`{arm}`": at[arm] for arm in arms}).items():
        cells = [f"{x.mean():.3g} ± {x.std(ddof=1):.2g}" for x in values]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for arm in arms[1:]:
        seeds = {row["seed"] for row in rows if row["arm"] == arm}  # those that both arms have
        seeds &= {row["seed"] for row in rows if row["arm"] == arms[0]}
        shared = [row for row in curves if row["seed"] in seeds]
        intervals = [judge.interval(at_tokens(shared, arms[0], name, tokens)
                                    - at_tokens(shared, arm, name, tokens))
                     for name in CURVES[algo]]
        lines.append(f"| `{arms[0]}` minus `{arm}` | " + " | ".join(
            f"[{low:+.3g}, {high:+.3g}]" for low, high in intervals) + " |")
    return "\n".join(lines)


def claim_figure(curves: list[dict[str, str]], algo: str):
    claims = [it for it in CLAIMS[algo].values() if it.at != "start"]
    panels = len(claims)
    rows = math.ceil(panels / 3)
    columns = math.ceil(panels / rows)
    figure = Figure((5 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.axis("off")
    for axis, claim in zip(axes, claims, strict=False):
        alike = len({arm.split("_")[0] for arm in claim.arms}) == 1  # in the first part of the name
        for color, arm in enumerate(claim.arms):
            of_arm = [row for row in curves if row["arm"] == arm]
            runs = []  # of every seed: x and y of its evaluations
            for seed in sorted({row["seed"] for row in of_arm}, key=int):
                of_seed = [row for row in of_arm if row["seed"] == seed]
                x = [float(row["generated_tokens"]) / 1000 if algo in CURVES  # arms differ in
                     else int(row["iteration"]) for row in of_seed]  # tokens per iteration
                runs.append((x, [float(row[claim.metric]) for row in of_seed]))
                axis.plot(*runs[-1], f"C{color}", linewidth=0.6, alpha=0.5)
            grid = np.linspace(0, min(x[-1] for x, _ in runs), min(len(x) for x, _ in runs))
            axis.plot(grid, np.mean([np.interp(grid, *run) for run in runs], 0), f"C{color}o-",
                      markersize=3, label=arm.split("_", 1)[1] if alike else arm)
        axis.set(title=claim.title, ylabel=f"held-out {claim.metric.replace('_', ' ')}",
                 xlabel="generated tokens, thousands" if algo in CURVES else "iteration")
        if claim.metric.startswith("success"):
            axis.set_ylim(0, 1)
        axis.legend(title="mean (thin: each seed)", fontsize=8, title_fontsize=8)
    figure.savefig(ROOT / f"docs/figures/{algo}.png", dpi=120)


def replace_block(path: Path, name: str, text: str):
    """Put `text` between the comment lines `table: name` and `end` of a page."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{path} has no block for the table {name}")
    path.write_text(pattern.sub(lambda match: match[1] + text + "\n" + match[2], page))


def default_runs() -> dict[str, dict[str, str]]:
    """results/defaults.csv, made by tests/benchmarks/defaults.py: python algos/x.py, by script."""
    rows = {row["script"]: row for row in read(ROOT / "results/defaults.csv")}
    return {name: row | {"minutes": f"{round(int(row['seconds']) / 30) / 2:g}",
                         **{f"success_{end}": f"{float(row[f'success_{end}']):.2f}"
                            for end in ("start", "end")}} for name, row in rows.items()}


def first_run() -> str:
    """What README says of its second command."""
    run = default_runs()["ms_grpo"]
    unit = "minute" if run["minutes"] == "1" else "minutes"
    return ("It takes about {minutes} {unit} on {cores} CPU cores. Success on maps that were not "
            "used in training\nrises from {success_start} to {success_end}.").format(
                **run, unit=unit)


def algorithms_table() -> str:
    """README's table of the scripts."""
    lines = ["| algorithm | idea | credit per | script, page | default run: game, success, minutes "
             "|", "|---|---|---|---|---|"]
    runs = default_runs()
    for algo, (name, papers, idea, credit_per, game) in ALGORITHMS.items():
        length = len((ROOT / f"algos/{algo}.py").read_text().splitlines())
        links = ", ".join(f"[{x}](https://arxiv.org/abs/{x})" for x in papers.split())
        lines.append(
            f"| {name} {f'({links})' if links else ''} | {idea} | {credit_per} | "
            f"[`{algo}.py`](algos/{algo}.py) ({length} lines), [page](docs/{algo}.md) | {game}, "
            "{success_start} → {success_end}, {minutes} |".format(**runs[algo]))
    return "\n".join(lines)


def results_table() -> str:
    lines = ["| script | environment | seeds | success: start | end | return: start | end "
             "| minutes |", "|---|---|---|---|---|---|---|---|"]
    for algo, arm, environment in DEFAULT_ARMS:
        rows = read(ROOT / f"results/{algo}.csv")
        cells = [f"[`{algo}`]({algo}.md)", environment, str(len(column(rows, arm, "seed")))]
        for name in ("success_start", "success_end", "return_start", "return_end"):
            values = column(rows, arm, name)
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}")
        cells.append(f"{column(rows, arm, 'seconds').mean() / 60:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cross_table() -> str:
    """Success at the end of several scripts in the same games; results/cross.csv."""
    rows = read(ROOT / "results/cross.csv")
    found = {environment: {row["arm"].removeprefix(f"{environment}_"): row["arm"] for row in rows
                           if row["arm"].startswith(f"{environment}_")} for environment in CROSS}
    found = {environment: arms for environment, arms in found.items() if arms}
    lines = ["| success at the end | " + " | ".join(CROSS[x] for x in found) + " |",
             "|---" * (1 + len(found)) + "|"]

    def cell(environment: str, algo: str, name: str) -> str:
        if algo not in found[environment]:
            return "–"
        values = column(rows, found[environment][algo], name)
        return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"

    tokens = [np.mean([float(row["generated_tokens"]) for row in rows
                       if row["arm"] in arms.values()]) for arms in found.values()]
    lines.append("| generated tokens | " + " | ".join(f"{x / 1000:.0f}k" for x in tokens) + " |")
    played = [algo for algo in CLAIMS if any(algo in arms for arms in found.values())]
    for label, algo, name in [("warm start", "ms_grpo", "success_start"),
                              *((f"`{algo}`", algo, "success_end") for algo in played)]:
        lines.append(f"| {label} | " + " | ".join(cell(x, algo, name) for x in found) + " |")
    return "\n".join(lines)


def cross_differences() -> str:
    """Success at the end of every script minus that of plain GRPO, seed by seed."""
    rows = read(ROOT / "results/cross.csv")
    ends = {(row["arm"], row["seed"]): float(row["success_end"]) for row in rows}
    lines = ["| minus `ms_grpo` | " + " | ".join(CROSS.values()) + " |",
             "|---" * (1 + len(CROSS)) + "|"]
    for algo in [algo for algo in CLAIMS if algo != "ms_grpo"]:
        cells = []
        for game in CROSS:
            differences = [end - ends[f"{game}_ms_grpo", seed]
                           for (arm, seed), end in ends.items() if arm == f"{game}_{algo}"]
            low, high = judge.interval(differences) if differences else (0, 0)
            cells.append(f"{np.mean(differences):+.2f} [{low:+.2f}, {high:+.2f}]"
                         if differences else "–")
        if set(cells) != {"–"}:
            lines.append(f"| `{algo}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains_table() -> str:
    """results/gains.csv, made by tests/benchmarks/gains.py: mean gain by kind of turn."""
    rows = read(ROOT / "results/gains.csv")
    lines = ["| turn | regime | turns seen | mean gain, log-probability | mean gain, probability |",
             "|---|---|---|---|---|"]
    for row in rows:
        if row["belief"] == "log_prob":
            [prob] = [other for other in rows if other["belief"] == "prob" and all(
                other[name] == row[name] for name in ("regime", "turn"))]
            cells = [row["turn"], row["regime"], row["turns"],
                     *(f"{x['mean_gain']} ± {x['std']}" for x in (row, prob))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def retry_table() -> str:
    """results/retry.csv, made by tests/benchmarks/retry.py: what is solved without feedback."""
    rows = read(ROOT / "results/retry.csv")
    columns = {"at_once": "at once", "independent_5": "among 5 independent answers",
               "different_5": "among 5 different answers",
               "with_feedback_5": "in 5 turns with feedback"}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for name in columns:
            values = [float(row[name]) for row in rows if row["arm"] == arm and row[name]]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def turns_table() -> str:
    """results/turns.csv, made by tests/benchmarks/turns.py: exact values by order of updates."""
    rows = read(ROOT / "results/turns.csv")
    columns = [name for name in rows[0] if name.startswith("value_")]
    lines = ["| turns | a step goes | order | weights M | "
             + " | ".join(f"after {name[6:]}" for name in columns) + " |",
             "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        cells = [row[name] for name in ("turns", "rule", "order", "weights", *columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trust_figure():
    """The game of three turns: exact values (results/turns.csv) beside returns of trained policies.
    """
    figure = Figure((12, 3.6), layout="constrained")
    *exact, trained = figure.subplots(1, 3, sharey=True)
    orders, games = ("reverse", "natural", "random"), read(ROOT / "results/turns.csv")
    curves = read(ROOT / "results/seeupo_curves.csv")
    for color, order in enumerate(orders):
        for axis, rule in zip(exact, ("best response", "gradient step 10"), strict=True):
            [row] = [row for row in games if (row["turns"], row["rule"], row["order"],
                                              row["weights"]) == ("3", rule, order, "yes")]
            values = {int(name[6:]): float(x) for name, x in row.items() if name[:6] == "value_"}
            line = "o--" if order == "random" else "o-"  # it may lie on another
            axis.plot(values.keys(), values.values(), f"C{color}{line}", label=order)
            axis.set(title=f"exact: {rule}", xlabel="batch")
        returns = collections.defaultdict(dict)  # seed -> iteration -> return
        for row in curves:
            if row["arm"] == f"trust0_{order}":
                returns[row["seed"]][int(row["iteration"])] = float(row["return"])
        for values in returns.values():
            trained.plot(values.keys(), values.values(), f"C{color}", linewidth=0.6, alpha=0.6)
        trained.plot(values.keys(), np.mean([list(x.values()) for x in returns.values()], 0),
                     f"C{color}o-")
    trained.set(title="trained (claim B): mean, thin each seed", xlabel="iteration")
    exact[0].set(ylabel="value of the policy", ylim=(0, 1.03))
    exact[0].legend(title="order of updates", fontsize=8, title_fontsize=8)
    figure.savefig(ROOT / "docs/figures/seeupo_trust.png", dpi=120)


def busy_table() -> str:
    """results/busy.csv, made by tests/benchmarks/busy.py: a run beside another busy program."""
    rows = read(ROOT / "results/busy.csv")
    return "\n".join(["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|",
                      *("| " + " | ".join(row.values()) + " |" for row in rows)])


def exercises_table() -> str:
    """results/exercises.csv, made by tests/benchmarks/exercises.py: runs with and without a bug."""
    rows = read(ROOT / "results/exercises.csv")
    return "\n".join(["| exercise | column | without the patch | with it | iterations | seed |",
                      "|---" * 6 + "|", *("| " + " | ".join(row.values()) + " |" for row in rows)])


def oracle_table() -> str:
    """results/oracle.csv beside the runs of maze_archer with the same seeds."""
    rows = read(ROOT / "results/oracle.csv")
    seeds = sorted({row["seed"] for row in rows}, key=int)
    rows = [row for row in read(ROOT / "results/archer_curves.csv")
            if row["arm"] == "maze_archer" and row["seed"] in seeds] + rows
    lines = ["| arm | seeds | return at the end | mean over the run | "
             "above `maze_archer` over the run [95 %] |", "|---" * 5 + "|"]
    first = None  # the means of maze_archer
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = np.array([[float(row["return"]) for row in rows
                          if (row["arm"], row["seed"]) == (arm, seed)] for seed in seeds])
        end, means, against = runs[:, -1], runs.mean(1), ""  # (seeds, evaluations)
        if first is None:
            first = means
        else:
            low, high = judge.interval(means - first)
            against = f"{(means - first).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append("| " + " | ".join([
            f"`{arm}`", str(len(seeds)), f"{end.mean():.3f} ± {end.std(ddof=1):.3f}",
            f"{means.mean():.3f} ± {means.std(ddof=1):.3f}", against]) + " |")
    return "\n".join(lines)


def recipes_table() -> str:
    """results/recipes.csv, made by tests/benchmarks/recipes.py: a row per recipe and arm."""
    rows = read(ROOT / "results/recipes.csv")
    lines = ["| recipe | arm | seeds | success, start | end | patched minus plain [95 %] | "
             "return, end | what shows that it acts, mean | tokens | seconds |",
             "|---" * 10 + "|"]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for arm in ("plain", "patched"):
            mine = [row for row in rows if row["recipe"] == recipe]
            start, end, returns, tokens, seconds = (column(mine, arm, name) for name in (
                "success_start", "success_end", "return_end", "generated_tokens", "seconds"))
            differences = end - column(mine, "plain", "success_end")
            low, high = judge.interval(differences)
            against = f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
            seen = [row["column_mean"] for row in mine if row["arm"] == arm and row["column_mean"]]
            acts = f"`{mine[0]['column']}` {np.mean([float(x) for x in seen]):.2f}" if seen else ""
            lines.append("| " + " | ".join([
                f"`{recipe}`", arm, str(len(end)), f"{start.mean():.3f}",
                f"{end.mean():.3f} ± {end.std(ddof=1):.3f}", against if arm == "patched" else "",
                f"{returns.mean():.3f}", acts, f"{tokens.mean():.0f}",
                f"{seconds.mean():.0f}"]) + " |")
    return "\n".join(lines)


def models_table() -> str:
    """results/models.csv, made by tests/benchmarks/models.py: a row per verdict and layers.

    Refused models are put together by what they were told.
    """
    rows, groups = read(ROOT / "results/models.csv"), {}
    for row in rows:
        told = re.sub(r"off by \S+ nats", "off", row["reason"]).partition(":")[0]
        kind = told or row["layers"]
        groups.setdefault((row["verdict"], kind), []).append(row)
    lines = ["| verdict | layers | models | largest difference, nats |", "|---|---|---|---|"]
    for verdict in ("exact", "exact, slower", "off", "refused"):
        for (of, kind), group in groups.items():
            if of == verdict:
                largest = max((float(x["difference"]) for x in group if x["difference"]),
                              default=None)
                layers = "; ".join(dict.fromkeys(x["layers"] for x in group))
                cells = [f"{of}: {kind}" if group[0]["reason"] else of, layers,
                         ", ".join(x["model"] for x in group),
                         "" if largest is None else f"{largest:.0e}"]
                lines.append("| " + " | ".join(cells) + " |")
    tried = [row for row in rows if row["agree"]]
    same = sum(row["agree"] == "yes" for row in tried)
    types = len({row["model_type"] for row in rows})
    lines.append(f"\n{len(rows)} configurations of {types} architectures. The self-check gave the "
                 f"verdict of the trial for {same} of the {len(tried)} that could be tried.")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 2) -> str:
    """One number, or the mean of several and their range.

    >>> spread([0.5]), spread([0.5, 0.7, 0.6])
    ('0.50', '0.60 (0.50 to 0.70)')
    """
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return mean if len(values) < 2 else f"{mean} ({low} to {high})"


def pretrained_table() -> str:
    """results/pretrained.csv, made by tests/benchmarks/pretrained.py: a row per script and game."""
    rows = read(ROOT / "results/pretrained.csv")
    lines = ["| run | script | game | imitation steps | seeds | success, start | end | "
             "unreadable, start | end | silent groups | minutes |", "|---" * 11 + "|"]
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]

        def cell(name: str, mine=mine) -> str:
            return spread([float(row[name]) for row in mine]) if mine[0][name] else ""
        minutes = spread([float(row["seconds"]) / 60 for row in mine], 1)
        lines.append("| " + " | ".join([
            f"`{run}`", mine[0]["script"], mine[0]["game"].replace("_", " "),
            mine[0]["warm_start_steps"], str(len(mine)), cell("success_start"),
            cell("success_end"), cell("unreadable_start"), cell("unreadable_end"),
            cell("silent_groups"), minutes]) + " |")
    return "\n".join(lines)


def headline() -> str:
    """What README says of its command for a chat model."""
    rows = [row for row in read(ROOT / "results/pretrained.csv")
            if row["run"] == "headline_ms_grpo"]
    start, end = (", ".join(f"{float(row[f'success_{x}']):.2f}" for row in rows)
                  for x in ("start", "end"))
    minutes = sorted(round(float(row["seconds"]) / 60) for row in rows)
    seeds = ", ".join(row["seed"] for row in rows)
    return (f"It takes {minutes[0]} to {minutes[-1]} minutes on {rows[0]['cores']} CPU cores. "
            f"With seeds {seeds}, success on held-out questions rose from\n{start} after the "
            f"imitation to {end} ([docs/pretrained.md](docs/pretrained.md)).")


def starts_table() -> str:
    """results/chat_starts.csv: legal answers and success before and after imitation."""
    rows = read(ROOT / "results/chat_starts.csv")
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    lines = ["| game | " + " | ".join(f"{name}, {n} steps" for name in ("legal", "success")
                                      for n in steps) + " |", "|---" * (1 + 2 * len(steps)) + "|"]
    for game in dict.fromkeys(row["game"] for row in rows):
        cells = {row["steps"]: row for row in rows if row["game"] == game}
        lines.append(f"| {game.replace('_', ' ')} | " + " | ".join(
            f"{float(cells[n][name]):.2f}" if n in cells else ""
            for name in ("legal", "success") for n in steps) + " |")
    return "\n".join(lines)


def passed_table() -> str:
    """Of how many seeds MS-GRPO ended above 0.75 on easy search, by its imitation."""
    rows = read(ROOT / "results/pretrained.csv")
    tuned = {(row["imitation_steps"], row["premature"], row["seed"]): float(row["success"])
             for row in read(ROOT / "results/pretrained_tuning.csv")  # the last of each stays
             if row["learning_rate"] == "2e-05"}
    lines = ["| imitation | ended above 0.75 | each seed | tuning seeds (shorter runs) | runs |",
             "|---" * 5 + "|"]
    for imitation, (steps, premature, runs) in IMITATIONS.items():
        ends = sorted(float(row["success_end"]) for row in rows if row["run"] in runs)
        tried = [end for key, end in tuned.items() if key[:2] == (steps, premature)]
        lines.append("| " + " | ".join([
            imitation, f"{sum(x > 0.75 for x in ends + tried)} of {len(ends + tried)}",
            *(", ".join(f"{x:.2f}" for x in some) for some in (ends, tried)),
            ", ".join(f"`{run}`" for run in runs)]) + " |")
    return "\n".join(lines)


def plateau_table() -> str:
    """results/pretrained_curves.csv: success of the runs equal_* after equally many tokens."""
    rows = [{**row, "arm": row["run"], "success": row["eval_success"]}
            for row in read(ROOT / "results/pretrained_curves.csv")
            if row["run"].startswith("equal_")]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    seeds = sorted({row["seed"] for row in rows}, key=int)
    moments = (0, 4000, 8000, 11000)
    lines = ["| run | " + " | ".join(f"after {tokens:,} tokens" for tokens in moments)
             + f" | each seed after {moments[-1]:,} | minus `{runs[0]}` [95 %] |",
             "|---" * (3 + len(moments)) + "|"]
    ends = {run: at_tokens(rows, run, "success", moments[-1]) for run in runs}
    for run in runs:
        cells = [f"{at_tokens(rows, run, 'success', tokens).mean():.2f}" for tokens in moments]
        cells.append(", ".join(f"{x:.2f}" for x in ends[run]))
        differences = ends[run] - ends[runs[0]]
        low, high = judge.interval(differences)
        against = f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        cells.append("" if run == runs[0] else against)
        lines.append("| " + " | ".join([f"`{run}`", *cells]) + " |")
    lines.append(f"\nSeeds {', '.join(seeds)}.")
    return "\n".join(lines)


def chat_speed_table() -> str:
    """results/chat_speed.csv, made by tests/benchmarks/chat_speed.py."""
    rows = read(ROOT / "results/chat_speed.csv")
    lines = ["| precision | rules read once | update, seconds | rollout, seconds |",
             "|---" * 4 + "|"]
    for key in dict.fromkeys((row["precision"], row["rules_read_once"]) for row in rows):
        times = {row["work"]: row["seconds"] for row in rows
                 if (row["precision"], row["rules_read_once"]) == key}
        lines.append(f"| {key[0]} | {key[1]} | {times['update']} | {times['rollout']} |")
    lines.append("\nUpdate: {rows} rows of {tokens} tokens in all, of which {shared_tokens} are "
                 "the same in every row. {threads} threads.".format(**rows[0]))
    return "\n".join(lines)


def pretrained_figure(path: Path):
    """Success of every seed of every run, a panel per game: over the time of those that had two
    cores, over the tokens of those that had one beside other work."""
    rows = read(ROOT / "results/pretrained_curves.csv")
    panels: dict[tuple[str, str], list[str]] = {}
    summaries = read(ROOT / "results/pretrained.csv")
    for game, cores, run in dict.fromkeys(
            (row["game"], row["cores"], row["run"]) for row in summaries):
        panels.setdefault((game, cores), []).append(run)
    width = -(-len(panels) // 2)
    figure = Figure((4.2 * width, 6.8), layout="constrained")
    axes = list(np.ravel(figure.subplots(2, width)))
    for axis, ((game, cores), runs) in zip(axes, panels.items(), strict=False):
        for color, run in enumerate(runs):
            mine = [row for row in rows if row["run"] == run]
            for n, seed in enumerate(dict.fromkeys(row["seed"] for row in mine)):
                points = [row for row in mine if row["seed"] == seed]
                x = [float(row["generated_tokens"]) / 1000 if cores == "1"
                     else float(row["seconds"]) / 60 for row in points]
                axis.plot(x, [float(row["eval_success"]) for row in points], f"C{color}.-",
                          label="" if n else run)
        axis.set(title=game.replace("_", " "), ylabel="success", xlim=(0, None), ylim=(0, 1.03),
                 xlabel="generated tokens, thousands" if cores == "1" else "minutes on two cores")
        axis.legend(fontsize=7, ncols=2)
    for axis in axes[len(panels):]:
        axis.remove()
    figure.savefig(path, dpi=120)


def memory_table() -> str:
    """results/memory.csv, made by tests/benchmarks/memory.py."""
    lines = ["| what is trained | million weights | --gradient-checkpointing | peak, GB |",
             "|---" * 4 + "|"]
    for row in read(ROOT / "results/memory.csv"):
        what = f"adapters of rank {row['rank']}" if row["rank"] else "all weights"
        lines.append(f"| {what} | {int(row['trained']) / 1e6:.1f} | {row['checkpointing']} | "
                     f"{int(row['peak_mebibytes']) * 2**20 / 1e9:.1f} |")
    return "\n".join(lines)


QWEN = {  # Qwen2.5-..-Instruct: weights, width, width of keys and values, of the MLP, layers
    "0.5B": (494e6, 896, 128, 4864, 24), "1.5B": (1544e6, 1536, 256, 8960, 28),
    "7B": (7616e6, 3584, 512, 18944, 28)}


def computed_memory(weights: float, width: int, keys: int, mlp: int, layers: int,
                    rank: int | None) -> tuple[float, float]:
    """Million trained weights and GB of one update of 4,096 tokens, with checkpointing.

    22 bytes a trained weight: fp32 weight, gradient, two moments and working copy of AdamW, a bf16
    copy for the passes. 6 bytes a frozen weight. Activations: what enters each layer in fp32, the
    parts of one layer, 0.8 GB of logits. An adapter beside a layer from n to m has rank (n + m).

    >>> trained, size = computed_memory(494e6, 896, 128, 4864, 24, rank=16)
    >>> round(trained / 1e6, 1), round(size / 1e9, 1)  # 3.2 of weights, 1.5 of the rest
    (8.8, 4.6)
    """
    shapes = [(width, width), (width, keys), (width, keys), (width, width),  # q, k, v, o
              (width, mlp), (width, mlp), (mlp, width)]
    trained = rank * layers * sum(n + m for n, m in shapes) if rank else weights
    kept = 6 * weights + 22 * trained if rank else 22 * weights
    activations = 4096 * (4 * width * layers + 4 * 10 * width + 2 * 4 * mlp)
    return trained, kept + activations + 0.8e9


def computed_memory_table() -> str:
    """One update of 4,096 tokens on one GPU, computed."""
    lines = ["| model | all weights, GB | adapters of rank 16, million weights | GB |",
             "|---" * 4 + "|"]
    for name, shape in QWEN.items():
        trained, small = computed_memory(*shape, rank=16)
        large = computed_memory(*shape, rank=None)[1]
        lines.append(f"| {name} | {large / 1e9:.0f} | {trained / 1e6:.1f} | {small / 1e9:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs/claims")
    for algo, claims in CLAIMS.items():
        collect(runs, algo)
        for claim in claims:
            page = ROOT / f"docs/{algo}.md"
            replace_block(page, claim, claim_table(algo, claim))
            if claim in detailed(algo):
                replace_block(page, f"{claim} in detail", detail_table(algo, claim))
        claim_figure(read(ROOT / f"results/{algo}_curves.csv"), algo)
    replace_block(ROOT / "docs/st_ppo.md", "collapse", collapse_table("st_ppo", COLLAPSES))
    drift_figure("st_ppo", CLAIMS["st_ppo"]["D"].arms)
    replace_block(ROOT / "docs/archer.md", "levels", levels_table("archer", LEVEL_ARMS))
    replace_block(ROOT / "docs/igpo.md", "gains", gains_table())
    replace_block(ROOT / "docs/ufo.md", "retry", retry_table())
    replace_block(ROOT / "docs/seeupo.md", "turns", turns_table())
    trust_figure()
    replace_block(ROOT / "docs/gpu.md", "busy", busy_table())
    replace_block(ROOT / "docs/models.md", "models", models_table())
    replace_block(ROOT / "docs/exercises.md", "exercises", exercises_table())
    replace_block(ROOT / "docs/recipes.md", "recipes", recipes_table())
    replace_block(ROOT / "docs/archer.md", "oracle", oracle_table())
    replace_block(ROOT / "docs/pretrained.md", "pretrained", pretrained_table())
    replace_block(ROOT / "docs/pretrained.md", "passed", passed_table())
    replace_block(ROOT / "docs/pretrained.md", "speed", chat_speed_table())
    replace_block(ROOT / "docs/pretrained.md", "starts", starts_table())
    replace_block(ROOT / "docs/pretrained.md", "plateau", plateau_table())
    replace_block(ROOT / "docs/gpu.md", "memory", memory_table())
    replace_block(ROOT / "docs/gpu.md", "computed memory", computed_memory_table())
    pretrained_figure(ROOT / "docs/figures/pretrained.png")
    credit.draw(ROOT / "docs/figures/credit.png")
    collect(runs, "cross")
    replace_block(ROOT / "README.md", "first run", first_run())
    replace_block(ROOT / "README.md", "headline", headline())
    replace_block(ROOT / "README.md", "algorithms", algorithms_table())
    replace_block(ROOT / "docs/results.md", "results", results_table())
    replace_block(ROOT / "docs/results.md", "cross", cross_table())
    replace_block(ROOT / "docs/results.md", "cross differences", cross_differences())
    replace_block(ROOT / "docs/results.md", "verdicts", verdicts_table())
    replace_block(ROOT / "docs/results.md", "rule", rule_table())
