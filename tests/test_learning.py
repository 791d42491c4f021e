"""Every script learns: its default run, cut short, one seed. All seeds: results/*_curves.csv."""

import importlib

import pytest

from conftest import ROOT
from results import report

EXPECTED = {  # script: (its default arm in results/<script>.csv, iterations, least rise of success)
    "ms_grpo": ("lake_aaw", 20, 0.15), "ufo": ("retry_turns5", 20, 0.12),
    "turn_budget": ("think_turn", 40, 0.04), "igpo": ("middle_both", 20, 0.15),
    "tree_grpo": ("tree_top50", 20, 0.15)}


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPECTED)
def test_it_learns(tmp_path, script):
    module, (_, iterations, margin) = importlib.import_module(f"algos.{script}"), EXPECTED[script]
    summary = module.main(module.Args(run_dir=str(tmp_path), num_iterations=iterations,
                                      eval_every=iterations, print_samples=0))
    assert summary["success_end"] >= summary["success_start"] + margin, summary


def test_every_script_is_expected_to_learn_less_than_it_did():
    """The margins are below what every published seed reached after as many iterations."""
    assert set(EXPECTED) == {path.stem for path in (ROOT / "algos").glob("*.py")}
    for script, (arm, iterations, margin) in EXPECTED.items():
        curves = [row for row in report.read(ROOT / f"results/{script}_curves.csv")
                  if row["arm"] == arm]
        for seed in {row["seed"] for row in curves}:
            at = {int(row["iteration"]): float(row["success"])
                  for row in curves if row["seed"] == seed}
            assert at[iterations] - at[0] > margin, (script, seed)
