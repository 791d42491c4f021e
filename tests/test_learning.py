"""Every script learns: a few iterations after a short warm start, one seed. All seeds: results/*_curves.csv."""

import importlib

import pytest

from conftest import ROOT

SHORT = {"tiny_init_std": 0.1, "warm_start_learning_rate": 2e-3, "warm_start_steps": 150}
SEARCH = SHORT | {"env_id": "turnrl/SearchQA-v0", "max_turn_tokens": 8}  # the cheapest warm start
EXPECTED = {  # script: (iterations, other flags, least rise of success: about a third of what was seen)
    "ms_grpo": (10, SEARCH | {"history_turns": None}, 0.035),
    "gigpo": (10, SEARCH | {"history_turns": None}, 0.03),
    "ufo": (6, SHORT, 0.025),
    "turn_budget": (6, SHORT | {"cap": "none", "max_turns": 2, "context_limit": 40,
                                "env_kwargs": '{"min_hops": 1, "max_hops": 2, "max_turns": 2}'}, 0.08),
    "igpo": (8, SEARCH, 0.025), "tree_grpo": (8, SEARCH, 0.04), "st_ppo": (20, SEARCH | {"learning_rate": 3e-4}, 0.08),
    "seeupo": (20, SEARCH | {"learning_rate": 3e-4}, 0.045),
    "archer": (8, {"actor_warm_up": 4}, 0.12)}


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPECTED)
def test_it_learns(tmp_path, script):
    module, (iterations, flags, margin) = importlib.import_module(f"algos.{script}"), EXPECTED[script]
    summary = module.main(module.Args(run_dir=str(tmp_path), num_iterations=iterations, eval_every=iterations,
                                      print_samples=0, **flags))
    assert summary["success_end"] >= summary["success_start"] + margin, summary


def test_no_script_is_left_out():
    assert set(EXPECTED) == {path.stem for path in (ROOT / "algos").glob("*.py")}
