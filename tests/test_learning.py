"""Every script learns: ten iterations after a short warm start, one seed. All seeds: results/*_curves.csv."""

import importlib

import pytest

from conftest import ROOT

SHORT = {"tiny_init_std": 0.1, "warm_start_learning_rate": 2e-3, "warm_start_steps": 150}
EXPECTED = {  # script: (flags, least rise of success: about a third of what was seen)
    "ms_grpo": (SHORT, 0.06), "ufo": (SHORT, 0.04), "turn_budget": (SHORT | {"cap": "none"}, 0.05),
    "igpo": (SHORT, 0.04), "tree_grpo": (SHORT, 0.05), "st_ppo": ({}, 0.08), "seeupo": ({}, 0.1),
    "archer": ({"max_turns": 3, "learning_rate": 1e-4}, 0.03)}


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPECTED)
def test_it_learns(tmp_path, script):
    module, (flags, margin) = importlib.import_module(f"algos.{script}"), EXPECTED[script]
    summary = module.main(module.Args(run_dir=str(tmp_path), num_iterations=10, eval_every=10,
                                      print_samples=0, **flags))
    assert summary["success_end"] >= summary["success_start"] + margin, summary


def test_no_script_is_left_out():
    assert set(EXPECTED) == {path.stem for path in (ROOT / "algos").glob("*.py")}
