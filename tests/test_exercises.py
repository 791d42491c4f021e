"""docs/exercises.md: every patch applies, breaks the test that the page names, and the page tells what was measured."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.exercises import EXERCISES, SEED, copy_of_the_tree, patch
from conftest import ROOT
from results import report

PAGE = (ROOT / "docs/exercises.md").read_text()
SECTIONS = {f"{int(number):02d}": text for number, text in re.findall(
    r"^## Exercise (\d+): (.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)}
TESTS = {exercise: re.findall(r"`(tests/test_\w+\.py::test_\w+)`", text) for exercise, text in SECTIONS.items()}


# a process that has imported the large packages, and for every line forks one that runs pytest
FORKS = """
import os, sys
import gymnasium, pytest, torch, transformers.models.llama.modeling_llama, transformers.models.auto, tyro
for line in sys.stdin:
    log, *arguments = line.split()
    if not (child := os.fork()):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_of_the_tree(str(tmp_path_factory.mktemp("exercises")))


@pytest.fixture(scope="module")
def pytest_in_tree(tree):
    """Runs tests in the copy: pytest_in_tree(name, ..) -> exit code, what pytest printed."""
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}  # not a worker of this session
    env |= {"COLUMNS": "500", "PYTHONDONTWRITEBYTECODE": "1"}  # a patched file may look as old as the other one
    options = f"-n0 -x -q -p no:cacheprovider --basetemp={tree.parent}/tests"
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=tree, env=env, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        def run(*tests: str) -> tuple[int, str]:
            print(f"{tree.parent}/log", options, *tests, file=process.stdin, flush=True)
            return int(process.stdout.readline()), (tree.parent / "log").read_text()
        yield run
        process.stdin.close()


def test_without_a_patch_the_named_tests_pass(pytest_in_tree):
    code, log = pytest_in_tree(*(test for tests in TESTS.values() for test in tests))
    assert code == 0, log


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_patch_applies_and_is_caught_by_an_assertion_of_the_named_test(exercise, tree, pytest_in_tree):
    [test] = TESTS[exercise]
    patch(tree, exercise)
    try:
        code, log = pytest_in_tree(test)
    finally:
        patch(tree, exercise, "-R")
    assert code == 1, log
    assert re.search(rf"^FAILED {re.escape(test)}(\[.*\])? - (assert|AssertionError)", log, re.MULTILINE), log


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_patch_is_small_and_does_not_explain_itself(exercise):
    lines = (ROOT / f"docs/exercises/{exercise}.patch").read_text().splitlines()
    old, new = ([line[1:] for line in lines if line.startswith(sign) and not line.startswith(sign * 3)] for sign in "-+")
    assert 1 <= max(len(old), len(new)) <= 6 and all(len(line) <= 100 for line in new)
    known = " ".join(old)
    assert all(comment in known for line in new for comment in line.split("#")[1:]), "no new comment"
    [path] = {line.split()[1][2:] for line in lines if line.startswith(("---", "+++"))}
    assert (ROOT / path).exists()


def test_every_patch_has_a_section_with_its_command_its_columns_and_a_folded_solution():
    assert list(EXERCISES) == list(SECTIONS) == sorted(path.stem for path in (ROOT / "docs/exercises").glob("*.patch"))
    for exercise, (command, columns) in EXERCISES.items():
        task, solution = SECTIONS[exercise].split("<details><summary>Solution</summary>\n\n")
        assert f"python {command} --seed {SEED}\n" in task and "?" in task and "::test_" not in task
        assert solution.rstrip().endswith("</details>") and all(f"`{name}`" in task for name in columns.split())


def test_the_page_tells_what_was_measured():
    rows = report.read(ROOT / "results/exercises.csv")
    assert [(row["exercise"], row["column"]) for row in rows] == [
        (exercise, column) for exercise, (_, columns) in EXERCISES.items() for column in columns.split()]
    assert PAGE.split("<!-- table: exercises -->\n")[1].split("\n<!-- end -->")[0] == report.exercises_table()
    for exercise, text in SECTIONS.items():  # every measured number of a solution is one of its rows
        told = set(re.findall(r"(?<![\w.])-?\d+\.\d+(?:e-\d+)?", text.split("How it shows")[1].split("\n\n")[0]))
        measured = {row[name] for row in rows if row["exercise"] == exercise for name in ("without", "with")}
        assert told <= measured, (exercise, told - measured)
