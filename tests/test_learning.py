"""Every script learns: its default run, cut short, one seed. All seeds: results/*_curves.csv."""

import importlib

import pytest

from conftest import ROOT
from results import report

MARGINS = {  # script: (arm of results/<script>.csv with the default flags, least rise of success)
    "ms_grpo": ("lake_aaw", 0.15), "ufo": ("retry_turns5", 0.15),
    "turn_budget": ("think_turn", 0.05), "igpo": ("middle_both", 0.15),
    "tree_grpo": ("tree_top50", 0.15)}
ITERATIONS = 20


@pytest.mark.slow
@pytest.mark.parametrize("script", MARGINS)
def test_it_learns(tmp_path, script):
    module, (_, margin) = importlib.import_module(f"algos.{script}"), MARGINS[script]
    summary = module.main(module.Args(run_dir=str(tmp_path), num_iterations=ITERATIONS,
                                      eval_every=ITERATIONS, print_samples=0))
    assert summary["success_end"] >= summary["success_start"] + margin, summary


def test_every_script_is_expected_to_learn_less_than_it_did():
    """The margins are below what every published seed reached after as many iterations."""
    assert set(MARGINS) == {path.stem for path in (ROOT / "algos").glob("*.py")}
    for script, (arm, margin) in MARGINS.items():
        curves = [row for row in report.read(ROOT / f"results/{script}_curves.csv")
                  if row["arm"] == arm]
        for seed in {row["seed"] for row in curves}:
            at = {int(row["iteration"]): float(row["success"])
                  for row in curves if row["seed"] == seed}
            assert at[ITERATIONS] - at[0] > margin, (script, seed)
