"""Every script learns: a published run, cut short, one seed. All seeds: results/*_curves.csv."""

import importlib

import pytest

from conftest import ROOT
from results import report

ITERATIONS = 10
EXPECTED = {  # script: (an arm in results/<script>.csv, its flags, least rise of success)
    "ms_grpo": ("lake_aaw", {}, 0.08), "ufo": ("retry_turns5", {}, 0.05),
    "turn_budget": ("think_none", {"cap": "none"}, 0.15),
    "igpo": ("middle_both", {}, 0.15), "tree_grpo": ("tree_top50", {}, 0.04)}


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPECTED)
def test_it_learns(tmp_path, script):
    module, (_, flags, margin) = importlib.import_module(f"algos.{script}"), EXPECTED[script]
    summary = module.main(module.Args(run_dir=str(tmp_path), num_iterations=ITERATIONS,
                                      eval_every=ITERATIONS, print_samples=0, **flags))
    assert summary["success_end"] >= summary["success_start"] + margin, summary


def test_every_script_is_expected_to_learn_less_than_it_did():
    """The margins are below what every published seed reached after as many iterations."""
    assert set(EXPECTED) == {path.stem for path in (ROOT / "algos").glob("*.py")}
    for script, (arm, _, margin) in EXPECTED.items():
        curves = [row for row in report.read(ROOT / f"results/{script}_curves.csv")
                  if row["arm"] == arm]
        for seed in {row["seed"] for row in curves}:
            at = {int(row["iteration"]): float(row["success"])
                  for row in curves if row["seed"] == seed}
            assert at[ITERATIONS] - at[0] > margin, (script, seed)
