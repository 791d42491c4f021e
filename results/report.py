"""From run folders to results/*.csv, and from those to the tables and figures of README and docs.

    python results/report.py [runs/claims]

Every run below the folder becomes a row of results/<algo>.csv (its arm and seed are in the folder's
name) and its evaluations rows of results/<algo>_curves.csv. Without run folders the CSV files stay
as they are; tables and figures are made from the CSV files only.
"""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = {  # algo: claim -> (metric, title, arms; the first is compared with each of the others)
    "ms_grpo": {
        "C1": ("success", "Frozen Lake: which episodes are trained on",
               ["lake_aaw", "lake_uniform", "lake_all"]),
        "C2": ("return", "Snake: what a turn is credited with",
               ["snake_episode", "snake_return_to_go", "snake_step"])},
}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def collect(folder: Path, algo: str):
    """Write results/<algo>.csv and <algo>_curves.csv from finished runs, if there are any."""
    rows, curves = [], []
    for summary in sorted(folder.glob(f"{algo}/*/*/summary.json")):
        arm, seed = summary.parents[1].name.rsplit("-", 1)
        metrics = read(summary.parent / "metrics.csv")
        evals = [row for row in metrics if row["eval_success"]]
        for row in evals:
            curves.append({"arm": arm, "seed": seed, "iteration": row["iteration"],
                           "success": row["eval_success"], "return": row["eval_return"]})
        areas = {f"{name}_area": np.mean([float(row[f"eval_{name}"]) for row in evals])
                 for name in ("success", "return")}
        drawn, silent = ([float(row[name] or 0) for row in metrics[1:]]
                         for name in ("drawn_advantage", "groups_without_signal"))
        versions = json.loads((summary.parent / "args.json").read_text())["versions"]
        rows.append({"arm": arm, "seed": seed, **json.loads(summary.read_text()), **areas,
                     "optimizer_steps": sum(int(row["optimizer_steps"]) for row in metrics[1:]),
                     "drawn_advantage": np.mean(drawn), "groups_without_signal": np.mean(silent),
                     "commit": versions["commit"][:10]})
    for name, table in ((algo, rows), (f"{algo}_curves", curves)):
        if table:
            with open(ROOT / f"results/{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]))
                writer.writeheader()
                writer.writerows({name: f"{x:.6g}" if isinstance(x, float) else x
                                  for name, x in row.items()} for row in table)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by resampling seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (10000, len(differences))).mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def verdict(low: float, high: float) -> str:
    return "supported" if low > 0 else "refuted" if high < 0 else "inconclusive"


def column(rows: list[dict[str, str]], arm: str, name: str) -> np.ndarray:
    """The values of an arm, in the order of its seeds."""
    of_arm = sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["seed"]))
    return np.array([float(row[name]) for row in of_arm])


def claim_table(rows: list[dict[str, str]], metric: str, arms: list[str]) -> str:
    lines = [f"| arm | seeds | {metric} at start | at the end | mean over the run | end minus "
             f"{arms[0]}: mean [95 %] | optimizer steps | generated tokens | seconds |",
             "|---|---|---|---|---|---|---|---|---|"]
    for arm in arms:
        start, end, area = (column(rows, arm, f"{metric}_{x}") for x in ("start", "end", "area"))
        against = "" if arm == arms[0] else "{:+.3f} [{:+.3f}, {:+.3f}]".format(
            *(lambda d: (d.mean(), *bootstrap(d)))(end - column(rows, arms[0], f"{metric}_end")))
        cells = [f"`{arm}`", str(len(end)), *(f"{x.mean():.3f} ± {x.std(ddof=1):.3f}"
                                              for x in (start, end, area)), against]
        cells += [f"{column(rows, arm, name).mean():.0f}"
                  for name in ("optimizer_steps", "generated_tokens", "seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    for arm in arms[1:]:
        parts = []
        for name, words in (("end", "at the end"), ("area", "over the run")):
            low, high = bootstrap(column(rows, arms[0], f"{metric}_{name}")
                                  - column(rows, arm, f"{metric}_{name}"))
            parts.append(f"{words} [{low:+.3f}, {high:+.3f}], {verdict(low, high)}")
        lines.append(f"\n`{arms[0]}` minus `{arm}`: " + "; ".join(parts) + ".")
    return "\n".join(lines)


def claim_figure(curves: list[dict[str, str]], algo: str):
    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots(1, len(CLAIMS[algo]), squeeze=False)[0]
    for axis, (metric, title, arms) in zip(axes, CLAIMS[algo].values(), strict=True):
        for color, arm in enumerate(arms):
            of_arm = [row for row in curves if row["arm"] == arm]
            iterations = sorted({int(row["iteration"]) for row in of_arm})
            values = np.array([[float(row[metric]) for row in of_arm
                                if int(row["iteration"]) == i] for i in iterations])
            mean, std = values.mean(1), values.std(1, ddof=1)
            axis.plot(iterations, mean, f"C{color}o-", markersize=3, label=arm.split("_", 1)[1])
            axis.fill_between(iterations, mean - std, mean + std, color=f"C{color}", alpha=0.15)
        axis.set(title=title, xlabel="iteration", ylabel=f"held-out {metric}")
        axis.legend(title="mean ± std over seeds", fontsize=8, title_fontsize=8)
    figure.savefig(ROOT / f"docs/figures/{algo}.png", dpi=120)


def replace_block(path: Path, name: str, text: str):
    """Put `text` between the comment lines `table: name` and `end` of a page."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{path} has no block for the table {name}")
    path.write_text(pattern.sub(lambda match: match[1] + text + "\n" + match[2], page))


def readme_table() -> str:
    lines = ["| script | environment | seeds | success: start | end | return: start | end "
             "| seconds |", "|---|---|---|---|---|---|---|---|"]
    for algo, arm, environment in [("ms_grpo", "lake_aaw", "Frozen Lake (default)"),
                                   ("ms_grpo", "snake_episode", "Snake")]:
        rows = read(ROOT / f"results/{algo}.csv")
        cells = [f"[`{algo}`](docs/{algo}.md)", environment, str(len(column(rows, arm, "seed")))]
        for name in ("success_start", "success_end", "return_start", "return_end"):
            values = column(rows, arm, name)
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}")
        cells.append(f"{column(rows, arm, 'seconds').mean():.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs/claims")
    for algo, claims in CLAIMS.items():
        collect(runs, algo)
        rows = read(ROOT / f"results/{algo}.csv")
        for claim, (metric, _, arms) in claims.items():
            replace_block(ROOT / f"docs/{algo}.md", claim, claim_table(rows, metric, arms))
        claim_figure(read(ROOT / f"results/{algo}_curves.csv"), algo)
    replace_block(ROOT / "README.md", "results", readme_table())
