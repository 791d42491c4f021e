"""docs/exercises.md: every patch applies, breaks the test that the page names, and the page tells what was measured."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.exercises import EXERCISES, SEED, copy_of_the_tree, patch
from conftest import ROOT
from results import report

PAGE = (ROOT / "docs/exercises.md").read_text()
SECTIONS = {f"{int(number):02d}": text for number, text in re.findall(
    r"^## Exercise (\d+): (.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)}
TESTS = {exercise: re.findall(r"`(tests/test_\w+\.py::test_\w+)`", text) for exercise, text in SECTIONS.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_of_the_tree(str(tmp_path_factory.mktemp("exercises")))


def pytest_in(tree: Path, *tests: str) -> subprocess.CompletedProcess:
    clean = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}  # not a worker of this session
    with tempfile.TemporaryDirectory() as folder:  # no bytecode: a patched file may look as old as the other one
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/base", *tests],
            cwd=tree, env=clean | {"COLUMNS": "500", "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True)


def test_without_a_patch_the_named_tests_pass(tree):
    result = pytest_in(tree, *(test for tests in TESTS.values() for test in tests))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_patch_applies_and_is_caught_by_an_assertion_of_the_named_test(exercise, tree):
    [test] = TESTS[exercise]
    patch(tree, exercise)
    try:
        result = pytest_in(tree, test)
    finally:
        patch(tree, exercise, "-R")
    assert result.returncode == 1 and " error" not in result.stdout.splitlines()[-1], result.stdout
    assert re.search(rf"^FAILED {re.escape(test)}(\[.*\])? - (assert|AssertionError)", result.stdout, re.MULTILINE), result.stdout


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
