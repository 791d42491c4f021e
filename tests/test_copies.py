"""What two scripts have in common is the same code: a reader may skip it the second time."""

import ast

import pytest

from conftest import ROOT

SCRIPTS = sorted((ROOT / "algos").glob("*.py"))
INTENDED_DIFFERENCES = {  # function: why it differs between scripts
    "main": "the loop is the algorithm",
    "update": "what the loss is divided by, the entropy mask, the scaled gradient",
    "policy_loss": "tree_grpo weighs kept tokens and all tokens apart",
}


def functions(path) -> dict[str, str]:
    """The code of every top-level function without its docstring."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node) or node.name in ("main",), f"{path.name}: {node.name}"
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found[node.name] = "\n".join(ast.unparse(x) for x in (*node.decorator_list, node.args, *body))
    return found


def test_functions_of_the_same_name_are_the_same():
    first: dict[str, tuple[str, str]] = {}
    for path in SCRIPTS:
        for name, code in functions(path).items():
            if name not in INTENDED_DIFFERENCES:
                where, known = first.setdefault(name, (path.name, code))
                assert code == known, f"{name} differs between {where} and {path.name}"


def test_policy_loss_is_the_same_but_for_the_stated_script():
    losses = {path.stem: code for path in SCRIPTS if path.stem != "tree_grpo"
              for name, code in functions(path).items() if name == "policy_loss"}
    assert len(losses) >= 4
    assert len(set(losses.values())) == 1, losses.keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_sections_stand_in_order(path):
    banners = [line for line in path.read_text().splitlines() if line.startswith("# === ")]
    titles = ["1. Imports", "2. Args", "3. Advantages", "4. Loss", "5. ", "6. Update", "7. Main"]
    titles = [t for t in titles if t != "5. " or any("5. " in banner for banner in banners)]
    assert len(banners) == len(titles)
    assert all(f"# === {title}" in banner for title, banner in zip(titles, banners, strict=True))
    assert all(len(banner) == 99 for banner in banners)
