"""What holds for every script: its layout, its flags, and the worked examples of its equations."""

import ast
import dataclasses
import doctest
import importlib
import re
import shlex
import subprocess
from functools import cache

import pytest
import tyro

from conftest import ROOT
from utils import RunArgs

SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
SIZES = {  # flags that no arm needs to set: sizes, rates and constants of the method
    "episodes_per_update", "kl_coefficient", "clip_low", "clip_high", "entropy_coefficient", "num_minibatches",
    "decay_base", "format_penalty", "eval_max_turns", "thought_cap", "discount", "gae_lambda",
    "critic_learning_rate", "target_rate", "critic_steps", "critic_batch_turns", "fresh_turns", "actor_steps",
    "actor_batch_turns", "actor_warm_up", "history_turns"}
INTENDED_DIFFERENCES = {  # function: why it differs between scripts
    "main": "the loop is the algorithm",
    "update": "what the loss is divided by, the KL, the entropy mask, the scaled gradient",
    "policy_loss": "tree_grpo weighs kept tokens and all tokens apart",
}


def functions(script: str) -> dict[str, ast.FunctionDef]:
    """The top-level functions of a script."""
    tree = ast.parse((ROOT / f"algos/{script}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def code(function: ast.FunctionDef) -> str:
    """A function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return "\n".join(ast.unparse(x) for x in (*function.decorator_list, function.args, *body))


@cache
def arms() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(claims, arm, script, flags) of every published arm: what run_all.sh would start."""
    listed = subprocess.run(["./run_all.sh", "--list"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    words = [shlex.split(line) for line in listed.splitlines()]
    return [(claims, arm, re.fullmatch(r"algos/(\w+)\.py", path)[1], tuple(flags))
            for claims, arm, _, path, *flags in words]


def parse(script: str, flags: tuple[str, ...]) -> RunArgs:
    return tyro.cli(importlib.import_module(f"algos.{script}").Args, args=flags)


def test_every_script_has_a_default_arm_and_no_arm_is_listed_twice():
    names = [(claims, arm) for claims, arm, _, _ in arms()]
    assert len(names) == len(set(names)) > 100
    for script in SCRIPTS:
        assert any(s == script and parse(s, flags) == parse(s, ()) for _, _, s, flags in arms())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_set_by_an_arm_or_is_a_size(script):
    args = importlib.import_module(f"algos.{script}").Args()
    own = {field.name for field in dataclasses.fields(args)} - {f.name for f in dataclasses.fields(RunArgs)}
    changed = {name for _, _, s, flags in arms() if s == script for name in own
               if getattr(parse(s, flags), name) != getattr(args, name)}
    assert own - changed <= SIZES, f"{script}: no arm of run_all.sh sets {own - changed - SIZES}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_choice_of_a_flag_is_used_by_an_arm(script):
    module = importlib.import_module(f"algos.{script}")
    for name, hint in vars(module.Args).get("__annotations__", {}).items():
        choices = getattr(hint, "__args__", ())
        if "Literal" in str(hint):
            used = {getattr(parse(s, flags), name) for _, _, s, flags in arms() if s == script}
            assert set(choices) == used, f"{script} {name}: {set(choices) - used} in no arm"


@pytest.mark.parametrize("name", [*(f"algos.{script}" for script in SCRIPTS), "utils"])
def test_worked_examples(name):
    """Every function of numbers that names an equation has an example in its docstring, and it comes out right."""
    module = importlib.import_module(name)
    found = doctest.testmod(module)
    assert found.failed == 0
    if name == "utils":
        assert found.attempted > 0
        return
    missing = [function for function, node in functions(name.removeprefix("algos.")).items()
               if re.search(r"\bEq\. \d", ast.get_docstring(node) or "")
               and not {"policy", "episodes"} & {argument.arg for argument in node.args.args}
               and ">>>" not in ast.get_docstring(node)]
    assert not missing, f"{name}: no worked example in {missing}"


def test_functions_of_the_same_name_are_the_same():
    first: dict[str, tuple[str, str]] = {}
    for script in SCRIPTS:
        for name, node in functions(script).items():
            if name not in INTENDED_DIFFERENCES:
                where, known = first.setdefault(name, (script, code(node)))
                assert code(node) == known, f"{name} differs between {where} and {script}"


def test_policy_loss_is_the_same_but_for_the_stated_script():
    losses = {script: code(functions(script)["policy_loss"]) for script in SCRIPTS
              if "policy_loss" in functions(script) and script != "tree_grpo"}
    assert len(losses) >= 4
    assert len(set(losses.values())) == 1, losses.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_order(script):
    banners = [line for line in (ROOT / f"algos/{script}.py").read_text().splitlines()
               if line.startswith("# === ")]
    titles = ["1. Imports", "2. Args", "3. Advantages", "4. Loss", "5. ", "6. Update", "7. Main"]
    titles = [t for t in titles if t != "5. " or any("5. " in banner for banner in banners)]
    assert len(banners) == len(titles)
    assert all(f"# === {title}" in banner for title, banner in zip(titles, banners, strict=True))
    assert all(len(banner) == 99 for banner in banners)


@pytest.mark.parametrize("script", [*SCRIPTS, "utils", "rollouts"])
def test_sizes(script):
    """A reader has half an hour: lines of a script, of a function, of main."""
    path = ROOT / (f"algos/{script}.py" if script in SCRIPTS else f"{script}.py")
    most = {"utils": 320, "rollouts": 300, "ms_grpo": 230, "archer": 410}.get(script, 330)
    assert len(path.read_text().splitlines()) <= most
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (80 if node.name == "main" else 60), f"{path.name}: {node.name} has {lines} lines"
