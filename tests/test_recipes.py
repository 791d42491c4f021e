"""Recipes: every patch of docs/recipes applies, runs, and calculates what its paper says; the page shows it as it is.

The numbers are worked by hand; a run of two iterations in a small game, with the flags of the page, is compared with slow loops.
`python tests/test_recipes.py` copies the patches into the page.
"""

import csv
import dataclasses
import difflib
import doctest
import importlib.util
import itertools
import math
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro

from benchmarks import recipes as benchmark
from conftest import ROOT
from envs.text_env import TextEnv
from rollouts import collect_groups
from utils import RunArgs

PAGE = ROOT / "docs/recipes.md"
PATCHES = {path.stem: path.read_text() for path in sorted((ROOT / "docs/recipes").glob("*.patch"))}
SCRIPT = {name: re.search(r"^--- a/algos/(\w+)\.py$", text, re.MULTILINE)[1] for name, text in PATCHES.items()}
BLOCK = r"(git apply docs/recipes/{}\.patch\npython algos/(\w+)\.py([^\n]*)\n```\n\n)```diff\n(.*?)```\n"


# --- the patches and the page ------------------------------------------------------------------------
def a_copy(name: str, folder: Path) -> Path:
    """The script of a recipe, before its patch."""
    path = folder / f"algos/{SCRIPT[name]}.py"
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / f"algos/{SCRIPT[name]}.py", path)
    return path


def git_apply(name: str, folder: Path, *flags: str):
    subprocess.run(["git", "apply", *flags, str(ROOT / f"docs/recipes/{name}.patch")], cwd=folder, check=True,
                   env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)})


@cache
def load(path: Path):
    """A patched script as a module, with nothing left behind on the path that is searched for modules."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parents[1].name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The module of a recipe by its name."""
    folder = tmp_path_factory.mktemp("recipes")

    @cache
    def patched(name):
        path = a_copy(name, folder / name)
        git_apply(name, folder / name)
        return load(path)
    return patched


def changed_lines(text: str) -> int:
    """Added and removed lines."""
    return sum(line[:1] in ("+", "-") and line[:4] not in ("+++ ", "--- ") for line in text.splitlines())


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_small_and_goes_on_and_off(name, tmp_path):
    assert changed_lines(PATCHES[name]) <= 40
    assert len(re.findall("^diff --git", PATCHES[name], re.MULTILINE)) == 1, "of one script"
    path = a_copy(name, tmp_path / "git")
    before = path.read_text()
    git_apply(name, tmp_path / "git")
    after = path.read_text()
    py_compile.compile(str(path), doraise=True)
    assert after != before and max(map(len, after.splitlines())) <= 100
    git_apply(name, tmp_path / "git", "-R")
    assert path.read_text() == before
    if shutil.which("patch"):
        path = a_copy(name, tmp_path / "patch")
        subprocess.run(["patch", "-p1", "--fuzz=0", "-s", "-i", str(ROOT / f"docs/recipes/{name}.patch")],
                       cwd=tmp_path / "patch", check=True)
        assert path.read_text() == after and len(list(path.parent.iterdir())) == 1, "no rejects, no leftovers"


@pytest.mark.skipif(not shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"), reason="no ruff")
def test_ruff_finds_nothing_in_the_patched_scripts(recipe):
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    paths = [recipe(name).__file__ for name in PATCHES]
    found = subprocess.run([ruff, "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), *paths], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", PATCHES)
def test_worked_examples_and_flags_of_a_patched_script(name, recipe):
    """Its own flags are all read; a flag that a patch makes useless has to go."""
    module = recipe(name)
    assert doctest.testmod(module).failed == 0
    own = {field.name for field in dataclasses.fields(module.Args)} - {field.name for field in dataclasses.fields(RunArgs)}
    dead = {flag for flag in own if not re.search(rf"\bargs\.{flag}\b", Path(module.__file__).read_text())}
    assert not dead


def test_the_page_shows_every_patch_as_it_is_and_readme_names_the_page():
    page = PAGE.read_text()
    for name, text in PATCHES.items():
        [(_, script, _, shown)] = re.findall(BLOCK.format(name), page, re.DOTALL)
        assert shown == text and script == SCRIPT[name], f"{name}: python tests/test_recipes.py"
        section = page.partition(f'<a id="{name}"></a>')[2].partition("```")[0]
        paper = re.search(r"arXiv \[(\d{4}\.\d{5})", section)  # truncated importance sampling has none
        assert (paper[1] if paper else "truncated IS") in "\n".join(re.findall("^[+].*", text, re.MULTILINE)), "the diff names its paper"
    assert len(re.findall("```diff", page)) == len(PATCHES) >= 12
    assert "(docs/recipes.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", benchmark.RECIPES)
def test_the_benchmark_patches_one_arm_and_its_flags_are_known(name, recipe, tmp_path):
    script, flags, _, changes = benchmark.RECIPES[name]
    arms = benchmark.trees(name, str(tmp_path))
    texts = {arm: {path.relative_to(tree): path.read_text() for path in tree.rglob("*.py")} for arm, tree in arms.items()}
    changed = [str(path) for path, text in texts["plain"].items() if texts["patched"][path] != text]
    assert changed == [f"algos/{script}.py"] == [f"algos/{SCRIPT[name]}.py"]
    assert texts["plain"][Path(changed[0])] == (ROOT / changed[0]).read_text()
    assert texts["patched"][Path(changed[0])] == Path(recipe(name).__file__).read_text()
    tyro.cli(recipe(name).Args, args=shlex.split(f"{flags} {changes}"))


# --- a small game ------------------------------------------------------------------------------------
class Game(TextEnv):
    """Any text is an action; its length says what it earns, whether it can be read and whether it ends the game."""

    answer_template = "{answer}"
    hops = [("Ada", "boss"), ("Ben", "friend")]

    def __init__(self, max_answers=4, quiet=False, **kwargs):
        super().__init__(**kwargs)
        self.max_turns, self.quiet = max_answers, quiet

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.heard, self.pays = [], not (self.quiet and seed % 2)
        return f"start {seed}", {"answer": "left", "submitted": None}

    def step(self, action):
        self.heard.append(action)
        n = len(action)
        info = {"answer": "left", "submitted": str(n % 2), "invalid_action": n % 4 == 3}
        return (f"{len(self.heard)} {''.join(c for c in action if c.isascii() and c.isalnum())}", n % 3 / 2 * self.pays, n % 5 == 1,
                len(self.heard) >= self.max_turns and n % 5 != 1, info)

    def demonstrate(self, rng):
        return ["left", "down", "away", "back"][len(self.heard) % 4]


gym.register("tests/Recipes-v0", entry_point=Game)
TINY = {"env_id": "tests/Recipes-v0", "num_iterations": 2, "num_prompts": 4, "group_size": 4, "warm_start_steps": 2, "eval_episodes": 2,
        "max_turns": 4, "max_turn_tokens": 4, "print_samples": 1, "learning_rate": 3e-3}
MORE = {"dapo": {"env_kwargs": '{"quiet": true}'}, "turn_ppo": {"group_size": 1, "num_prompts": 16}, "collabllm": {"group_size": 2}}


class Run:
    """Two iterations with the flags of the page; calls[f] has the arguments and the result of every call of a function f."""

    def __init__(self, name, module, patch, tmp_path, functions, **flags):
        [(_, _, words, _)] = re.findall(BLOCK.format(name), PAGE.read_text(), re.DOTALL)
        args = tyro.cli(module.Args, args=shlex.split(words))
        self.args = dataclasses.replace(args, run_dir=str(tmp_path), **(TINY | MORE.get(name, {}) | flags))
        self.calls = {function: [] for function in functions}
        for function in functions:
            patch.setattr(module, function, self.spy(function, getattr(module, function)))
        module.main(self.args)
        [path] = tmp_path.glob("*/metrics.csv")
        self.rows = list(csv.DictReader(open(path)))

    def spy(self, name, function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            self.calls[name].append((args, result))
            return result
        return called

    def groups(self, function="collect_groups"):
        """Every group that was played."""
        size = self.args.group_size
        return [episodes[i : i + size] for _, episodes in self.calls[function] for i in range(0, len(episodes), size)]

    def given(self):
        """Every (episode, its row of credit) that an update was given."""
        calls = [args for args, _ in self.calls["collate"] if len(args) == 3]  # others are IGPO's beliefs
        return [pair for episodes, _, credit in calls for pair in zip(episodes, credit.tolist(), strict=True)]


def relative(values):
    """(x - mean) / (std + 1e-6) with the unbiased std, or 0 for equal ones."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) <= 1e-6:
        return [0.0] * len(values)
    return ((values - values.mean()) / (values.std(ddof=1) + 1e-6)).tolist()


def returns_of(episodes):
    return [sum(turn.reward for turn in e.turns) for e in episodes]


def episode_credit(run, keeps, groups=None):
    """An update gets exactly the episodes that `keeps` lets pass and that differ from their group, all of which counts in A."""
    expected = {id(e): a for group in groups or run.groups() for e, a in zip(group, relative(returns_of(group)), strict=True) if a and keeps(e)}
    given = run.given()
    assert {id(e) for e, _ in given} == expected.keys() and len(given) == len(expected) > 0
    for e, credit in given:
        assert credit[: len(e.turns)] == pytest.approx([expected[id(e)]] * len(e.turns), abs=1e-5)


# --- one check per recipe ----------------------------------------------------------------------------
CHECKS = {}


def check(*functions, **flags):
    """Names the functions whose calls a check wants to see."""
    def named(function):
        CHECKS[function.__name__] = function, functions, flags
        return function
    return named


@check("collect_groups", "collate")
def simpletir(run):
    def void(e):
        return any(len(turn.action) % 4 == 3 for turn in e.turns)
    episodes = [e for group in run.groups() for e in group]
    assert 0 < sum(map(void, episodes)) < len(episodes)
    episode_credit(run, lambda e: not void(e))
    shares = [np.mean([void(e) for e in episodes[i : i + 16]]) for i in (0, 16)]
    assert [float(row["void_episodes"]) for row in run.rows[1:]] == pytest.approx(shares)


@check("collect_groups", "collate")
def mini_o3(run):
    episodes = [e for group in run.groups() for e in group]
    assert 0 < sum(len(e.turns) == 4 and not e.terminated for e in episodes) < len(episodes)
    episode_credit(run, lambda e: e.terminated)


@check("collect_groups", "collate", num_prompts=8)
def starpo_s(run):
    """Two of eight groups in each of two iterations."""
    kept = [group for i in (0, 8) for group in sorted(run.groups()[i : i + 8], key=lambda group: -np.std(returns_of(group)))[:2]]
    episode_credit(run, lambda e: True, kept)
    assert [float(row["groups_without_signal"]) for row in run.rows[1:]] == [0.75, 0.75]


@check("collect_groups", "collate")
def dapo(run):
    """Half of the seeds pay nothing: groups are collected until four pay, and all that was sampled counts as sampled."""
    calls, kept, groups, silent = run.calls["collect_groups"], [], run.groups(), []
    numbers = [iteration for (_, _, _, iteration), _ in calls]
    assert len(set(numbers)) == len(numbers) > 2 and numbers[0] == 0 and len({g[0].seed for g in groups}) == len(groups)
    for iteration in (0, 1):
        mine = [g for i, g in enumerate(groups) if numbers[i // 4] % run.args.num_iterations == iteration]
        signal = [g for g in mine if any(relative(returns_of(g)))]
        assert len(mine) % 4 == 0 and len(signal) >= 4 > len([g for g in mine[:-4] if any(relative(returns_of(g)))]), "and no further"
        kept += signal[:4]
        silent.append(1 - len(signal) / len(mine))
    episode_credit(run, lambda e: True, kept)
    assert [float(row["groups_without_signal"]) for row in run.rows[1:]] == pytest.approx(silent) and max(silent) > 0
    assert int(run.rows[-1]["generated_tokens"]) == sum(len(t.token_ids) for g in groups for e in g for t in e.turns)
    assert run.args.clip_high == 0.28 and run.args.clip_low == 0.2 and run.args.sampling == "all"


def nested(run):
    """Weights by a loop over rows."""
    for (_, _, _, batch, _), _ in run.calls["update"]:
        mask, owner = batch["turn_id"] >= 0, batch["episode_id"].tolist()
        for row, weights in enumerate(batch["weights"]):
            share = 1 / mask[row].sum().item() / owner.count(owner[row]) / len(set(owner))
            assert weights.tolist() == pytest.approx([share * x for x in mask[row].tolist()], abs=1e-7)
        assert len(set(owner)) < len(owner)


@check("collect_groups", "collate", "update")
def flow_grpo(run):
    episode_credit(run, lambda e: True)
    nested(run)


@check("collect_groups", "collate", "update", "load_policy")
def m_grpo(run):
    """The prompt of turn k has k old answers, k placeholders and one observation, the current one."""
    episode_credit(run, lambda e: True)
    nested(run)
    [(_, policy)] = run.calls["load_policy"]
    later = [(e, k) for group in run.groups() for e in group for k in range(1, len(e.turns))]
    assert len(later) > 20
    for e, k in later:
        prompt, text = e.turns[k].prompt_ids, policy.tokenizer.decode(e.turns[k].prompt_ids)
        assert text.count("(old)") == k and f"start {e.seed}" not in text and e.turns[k].observation in text
        for turn in e.turns[:k]:
            assert any(prompt[i : i + len(turn.token_ids)] == turn.token_ids for i in range(len(prompt)))


@check("collect_groups", "turn_rewards", "collate", outcome_weight=0.5)
def mt_grpo(run):
    """A turn's gain among the same turns of its group, plus the outcome, which has its weight before the last turn."""
    expected = {}
    for (_, episodes), ((gains, outcomes, mask, group, _, weight), _) in zip(run.calls["collect_groups"], run.calls["turn_rewards"], strict=True):
        lengths = mask.sum(1).tolist()
        table = np.zeros(mask.shape)
        for g in range(4):
            members = [e for e in range(16) if group[e] == g]
            for e, a in zip(members, relative(outcomes[members]), strict=True):
                table[e, : lengths[e]] += [weight * a] * (lengths[e] - 1) + [a]
            for k in range(mask.shape[1]):
                early = [e for e in members if lengths[e] > k + 1]
                for e, a in zip(early, relative([gains[e, k].item() for e in early]), strict=True):
                    table[e, k] += a
        assert weight == 0.5 and np.abs(table).max() > 1 and outcomes.tolist() == returns_of(episodes)
        expected |= zip(map(id, episodes), table.tolist(), strict=True)
    for e, credit in run.given():
        assert credit == pytest.approx(expected[id(e)], abs=1e-4)
    assert len(run.given()) == 32


@check("update", "value_loss")
def turn_ppo(run):
    """Once more, turn by turn, from the rewards and the values at the turns' first tokens; the critic learns there and only there."""
    weights = [weights for (_, _, _, weights), _ in run.calls["value_loss"]]
    first = sum(batch["turn_weights"].count_nonzero() for (_, _, _, _, batch, _), _ in run.calls["update"])
    assert sum(x.count_nonzero() for x in weights) == first and sum(x.sum().item() for x in weights) == pytest.approx(4)
    steps = [batch for (_, _, _, _, batch, _), _ in run.calls["update"]]
    for pair in (steps[:2], steps[2:]):
        raw, found = [], []
        for batch in pair:
            turns = torch.zeros_like(batch["turn_weights"])
            for row, ids in enumerate(batch["turn_id"].tolist()):
                places = [[t for t, k in enumerate(ids) if k == number] for number in range(max(ids) + 1)]
                value, advantage = 0.0, 0.0
                for where in reversed(places):
                    here = batch["old_values"][row, where[0]].item()
                    advantage += batch["rewards"][row, where].sum().item() + value - here
                    value = here
                    assert batch["returns"][row, where[0]].item() == pytest.approx(advantage + here, abs=1e-5)
                    assert len(set(batch["advantages"][row, where].tolist())) == 1
                    assert (batch["returns"][row, where[1:]] == 0).all()
                    raw.append(advantage)
                    found.append(batch["advantages"][row, where[0]].item())
                    turns[row, where[0]] = 1
            assert torch.allclose(batch["turn_weights"], turns / turns.sum())
        assert found == pytest.approx(((np.array(raw) - np.mean(raw)) / np.std(raw, ddof=1)).tolist(), abs=1e-4)
        assert len(raw) > 20 and np.std(raw) > 0.1


@check("collect_steps", "collate", "update")
def srl(run):
    """Game's player says another word at every turn, and an observation says which turn it is."""
    depths = set()
    for group in run.groups("collect_steps"):
        assert len({(e.seed, e.turns[0].observation) for e in group}) == 1 and {len(e.turns) for e in group} == {1}
        seen = group[0].turns[0].observation
        k = 0 if seen.startswith("start") else int(seen.split()[0])
        depths.add(k)
        for [turn] in (e.turns for e in group):
            ratio = difflib.SequenceMatcher(None, turn.action, ["left", "down", "away", "back"][k]).ratio()
            assert turn.reward == pytest.approx(-1 if len(turn.action) % 4 == 3 else ratio)
    assert len(depths) > 2
    episode_credit(run, lambda e: True, run.groups("collect_steps"))


def fake_score(call, gold):
    """Stands in for call_score, which is 0 for the random texts of an untrained model."""
    return (7 * len(call) + 3 * len(gold)) % 11 / 11 + 0.001 * len(call)


def best_total(scores, used=()):
    """Calls one by one: matched to any free gold call, or to none."""
    if not scores:
        return 0.0
    free = [j for j in range(len(scores[0])) if j not in used]
    return max([best_total(scores[1:], used), *(scores[0][j] + best_total(scores[1:], (*used, j)) for j in free)])


@check("collect_groups", "matched_rewards", "collate")
def match_tir(run):
    """Rewards of the calls by exhaustive matching, then both advantages by loops; discount 0.9."""
    expected = {}
    found = iter(run.calls["matched_rewards"])
    for group in run.groups():
        rewards = []
        for e in group:
            (scores, num_gold), result = next(found)
            assert scores == [[fake_score(turn.action, f"search {a} {b}") for a, b in Game.hops] for turn in e.turns[:-1]] and num_gold == 2
            assert sum(result) == pytest.approx(best_total(scores))
            rewards.append([*result, sum(turn.reward for turn in e.turns)])
        sums = [[sum(0.9**j * x for j, x in enumerate(row[k:])) for k in range(len(row))] for row in rewards]
        whole = relative([sum(row) for row in rewards])
        for n, e in enumerate(group):
            expected[id(e)] = []
            for k in range(len(e.turns)):
                same = [m for m in range(len(group)) if len(sums[m]) > k]
                expected[id(e)].append(whole[n] + relative([sums[m][k] for m in same])[same.index(n)])
    for e, credit in run.given():
        assert credit[: len(e.turns)] == pytest.approx(expected[id(e)], abs=1e-4)
    assert len(run.given()) >= 24


@check("improved_answers", "update")
def rise(run):
    """Every turn but the last has a row: what stood before it, then the best later answer, the only one that is trained."""
    count = 0
    for ((episodes, _), _), ((_, _, batch, _), _) in zip(run.calls["improved_answers"], run.calls["update"], strict=True):
        expected = []
        for e, k in [(episode, k) for episode in episodes for k in range(len(episode.turns) - 1)]:
            later = e.turns[k + 1 :]
            best = next(turn for turn in later if turn.reward == max(x.reward for x in later))
            context = [t for turn in e.turns[:k] for t in turn.prompt_ids + turn.token_ids] + e.turns[k].prompt_ids
            expected.append((context, best.token_ids, math.exp(best.reward / 0.4)))
        assert len(batch["tokens"]) == len(expected)
        for row, (context, answer, weight) in enumerate(expected):
            width = len(context) + len(answer)
            assert batch["tokens"][row, : batch["lengths"][row]].tolist() == context + answer
            assert (batch["turn_id"][row] >= 0).nonzero()[:, 0].tolist() == list(range(len(context), width))
            assert batch["advantages"][row, len(context) : width].tolist() == pytest.approx([weight] * len(answer), rel=1e-5)
            assert batch["weights"][row].sum().item() == pytest.approx(1 / len(expected))
        count += len(expected)
    assert count > 30


@check("grow_trees", "continue_again", "collate", "update")
def collabllm(run):
    """Three answers to one turn of every chain, three continuations of each; nothing else is trained."""
    expected, sampled = {}, {}
    for (_, trees), ((_, leaves, turn, _, _), (returns, played)) in zip(run.calls["grow_trees"], run.calls["continue_again"], strict=True):
        assert [e for tree in trees for e in tree] == leaves and returns.shape == (24, 3)
        sampled |= {id(t): len(t.token_ids) for e in leaves + played for t in e.turns}
        for i in range(0, 24, 3):
            k, values = turn[i], []
            for leaf, row in zip(leaves[i : i + 3], returns[i : i + 3].tolist(), strict=True):
                assert all(a is b for a, b in zip(leaf.turns[:k], leaves[i].turns[:k], strict=True)) and leaf.seed == leaves[i].seed
                assert sum(leaf.turns[k] is other.turns[k] for other in leaves[i : i + 3]) == 1, "answers of their own"
                mine = [leaf, *(e for e in played if len(e.turns) > k and e.turns[k] is leaf.turns[k])]
                ended = len(leaf.turns) == k + 1
                assert len(mine) == (1 if ended else 3)
                assert sorted(returns_of(mine) * (3 if ended else 1)) == pytest.approx(sorted(row))
                values.append(np.mean(row))
            for leaf, a in zip(leaves[i : i + 3], relative(values), strict=True):
                expected[id(leaf)] = [a * (n == k) for n in range(len(leaf.turns))]
    for e, credit in run.given():
        assert credit[: len(e.turns)] == pytest.approx(expected[id(e)], abs=1e-5)
    for (_, _, batch, _), _ in run.calls["update"]:
        assert torch.equal(batch["kept_weights"] > 0, batch["advantages"] != 0)
    assert len({k for row in expected.values() for k, a in enumerate(row) if a}) > 1, "turns of several depths"
    assert int(run.rows[-1]["generated_tokens"]) == sum(sampled.values())


@check("sample_groups", "collate", "update")
def tis(run):
    """Another sampler than the trainer (see test below): old log-probs of the trainer before any step, and the weight in the advantage."""
    assert len(run.calls["update"]) == 4
    for ((episodes, _, credit), _), ((_, _, _, batch, _), _) in zip(run.calls["collate"], run.calls["update"], strict=True):
        mask = batch["turn_id"] >= 0
        true = [x for e in episodes for t in e.turns for x in t.info["true"]]
        assert batch["old_logprobs"][mask].tolist() == pytest.approx(true, abs=1e-4)
        off = [x for e in episodes for t in e.turns for x in t.logprobs]
        a = [credit[n, k].item() for n, e in enumerate(episodes) for k, t in enumerate(e.turns) for _ in t.token_ids]
        weights = [min(math.exp(x - y), 2) for x, y in zip(true, off, strict=True)]
        assert batch["advantages"][mask].tolist() == pytest.approx([w * x for w, x in zip(weights, a, strict=True)], abs=1e-3)
        assert max(weights) == 2 and min(weights) < 0.7 and any(1 < w < 2 for w in weights)


def another_sampler(rollout):
    """Its log-probs are off by 0.4, -0.5 and -1, in turn: weights 0.67, 1.65 and 2.72, which is cut to 2."""
    def played(*args):
        episodes = rollout(*args)
        off = itertools.cycle([0.4, -0.5, -1.0])
        for turn in (t for e in episodes for t in e.turns):
            turn.info["true"], turn.logprobs = turn.logprobs, [x + next(off) for x in turn.logprobs]
        return episodes
    return played


@pytest.mark.parametrize("name", PATCHES)
def test_two_iterations_with_the_flags_of_the_page(name, recipe, tmp_path, monkeypatch):
    module = recipe(name)
    if name == "match_tir":
        monkeypatch.setattr(module, "call_score", fake_score)
    if name == "tis":
        monkeypatch.setattr(module, "rollout", another_sampler(module.rollout))
    function, functions, flags = CHECKS[name]
    run = Run(name, module, monkeypatch, tmp_path, functions, **flags)
    assert [row["iteration"] for row in run.rows] == ["0", "1", "2"]
    assert all(math.isfinite(float(row["loss"])) and float(row["grad_norm"]) > 0 for row in run.rows[1:]), "something was learned"
    function(run)


# --- formulas, by hand -------------------------------------------------------------------------------
def grpo(module, returns):
    return module.group_relative_advantages(torch.tensor(returns, dtype=torch.double), torch.zeros(len(returns)))


def test_simpletir_masks_the_episode_after_the_statistics(recipe):
    """Returns 1 1 0 0, the last one void: mean 1/2, std 0.57735. Without it beforehand: 0.577350 twice and -1.154699."""
    module = recipe("simpletir")
    void = torch.tensor([[False, False], [False, False], [False, False], [True, False]])
    masked = module.without_void_turns(grpo(module, [1.0, 1, 0, 0]), void)
    assert masked.tolist() == pytest.approx([0.866024, 0.866024, -0.866024, 0], abs=2e-6)
    drawn = module.draw_episodes(masked, "all", 9, np.random.default_rng(0))
    assert sorted(drawn) == [0, 1, 2] and masked[drawn].mean().item() == pytest.approx(0.866024 / 3, abs=2e-6), "divided by three"


def test_mini_o3_keeps_cut_episodes_in_the_statistics_and_out_of_the_denominator(recipe):
    """Returns 1 0 0 0, the last two cut: A 1.5 and -0.5 (std 1/2); the mean of what remains is 1/2, over all four 1/4."""
    module = recipe("mini_o3")
    masked = module.without_cut_episodes(grpo(module, [1.0, 0, 0, 0]), torch.tensor([False, False, True, True]))
    assert masked.tolist() == pytest.approx([1.499997, -0.499999, 0, 0], abs=2e-6)
    drawn = module.draw_episodes(masked, "all", 9, np.random.default_rng(0))
    assert sorted(drawn) == [0, 1] and masked[drawn].mean().item() == pytest.approx(0.5, abs=1e-5)


def test_starpo_s_goes_by_the_standard_deviation(recipe):
    """Std 0.577, 0.55, 0, 0.5: by range the second would be first, by mean the third."""
    returns = torch.tensor([1.0, 1, 0, 0, 1.1, 0, 0, 0, 5, 5, 5, 5, 1, 0, 1, 1])
    for share, kept in ((0.25, [0]), (0.5, [0, 1]), (0.75, [0, 1, 3]), (0.1, [0]), (1.0, [0, 1, 2, 3])):
        got = recipe("starpo_s").uncertain_groups(returns, 4, share)
        assert got.nonzero()[:, 0].tolist() == [4 * g + i for g in kept for i in range(4)]


def test_dapo_takes_the_first_groups_that_differ_and_clips_higher_above(recipe):
    module = recipe("dapo")
    advantages = torch.tensor([0.0, 0, 1, -1, 0, 0, 2, -2, 3, -3])
    assert module.first_groups_with_signal(advantages, 2, 2).tolist() == [0, 0, 1, -1, 0, 0, 2, -2, 0, 0]
    assert module.first_groups_with_signal(advantages, 2, 9).tolist() == advantages.tolist()
    args, one = module.Args(), torch.ones(1, 1)
    for ratio, a, objective in ((1.25, 1.0, 1.25), (1.4, 1.0, 1.28), (0.7, -1.0, -0.8), (1.4, -1.0, -1.4)):
        batch = {"old_logprobs": 0 * one, "advantages": a * one, "weights": one}
        loss, _ = module.policy_loss(batch, (ratio * one).log(), 0 * one, args.clip_low, args.clip_high, args.entropy_coefficient)
        assert loss.item() == pytest.approx(-objective)


def test_dapo_gives_up_after_some_rounds(recipe, tmp_path, monkeypatch):
    """One move across a lake never pays, so no group of any round has a signal."""
    run = Run("dapo", recipe("dapo"), monkeypatch, tmp_path, ["collect_groups"], env_id="turnrl/FrozenLake-v0", max_turns=1,
              env_kwargs='{"format_penalty": 0.0}', num_iterations=1, max_rounds=3)
    assert len(run.calls["collect_groups"]) == 3 and run.rows[1]["optimizer_steps"] == "0" and run.rows[1]["groups_without_signal"] == "1.0"


@pytest.mark.parametrize("name", ["flow_grpo", "m_grpo"])
def test_a_mean_over_tokens_then_turns_then_episodes(name, recipe):
    """Per token 1 and 3, then 2 (A = 1); 4 (A = -1). Nested (2 + 2) / 2 - 4 = -2, halved: loss 1. Flat (1 + 3 + 2 - 4) / 4: loss -1/2."""
    turn_id = torch.tensor([[-1, 0, 0], [-1, -1, 1], [-1, 0, -1]])
    values = torch.tensor([[9.0, 1, 3], [9, 9, 2], [9, -4, 9]])
    weights = recipe(name).nested_weights(turn_id, torch.tensor([0, 0, 1]))
    assert weights.tolist() == [[0, 0.25, 0.25], [0, 0, 0.5], [0, 1, 0]]
    assert -(weights * values).sum().item() / 2 == 1.0


def test_flow_grpo_compares_episodes_and_not_turns(recipe):
    """Returns 1 0 0, of 1, 2, 3 turns. Over the six turns as the authors' code has it: 2.041236 and -0.408247."""
    module = recipe("flow_grpo")
    played = torch.arange(3) < torch.tensor([[1], [2], [3]])
    credit = module.turn_advantages(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]), played, torch.zeros(3), "episode")
    assert credit[played].tolist() == pytest.approx([1.154699] + [-0.577349] * 5, abs=2e-6)


def test_mt_grpo_adds_two_comparisons(recipe):
    """Turn rewards .4 .1 .4 .1 and outcomes 1 1 0 0: 0.8660 each, so 1.7320, 0, 0, -1.7320 before the last turn."""
    gains, outcomes = torch.tensor([[0.4, 0], [0.1, 0], [0.4, 0], [0.1, 0]]), torch.tensor([1.0, 1, 0, 0])
    turn_rewards, played = recipe("mt_grpo").turn_rewards, torch.ones(4, 2).bool()
    got = turn_rewards(gains, outcomes, played, torch.zeros(4))
    assert got[:, 0].tolist() == pytest.approx([1.7320, 0, 0, -1.7320], abs=1e-4)
    assert got[:, 1].tolist() == pytest.approx([0.8660, 0.8660, -0.8660, -0.8660], abs=1e-4)
    half = turn_rewards(gains, outcomes, played, torch.zeros(4), "both", 0.5)
    assert half[:, 0].tolist() == pytest.approx([1.2990, -0.4330, 0.4330, -1.2990], abs=1e-4) and torch.equal(half[:, 1], got[:, 1])
    only = turn_rewards(gains, outcomes, played, torch.zeros(4), "information_gain")
    assert only[:, 0].tolist() == pytest.approx([0.8660, -0.8660, 0.8660, -0.8660], abs=1e-4) and (only[:, 1] == 0).all()


def test_turn_ppo_has_one_value_and_one_advantage_per_turn(recipe):
    """Rewards 1 and 5, values 1/2 and 1/4 (7 stands where none may be read), lambda 1/2: 5 - 1/4 = 4.75, then 1 + 1/4 - 1/2 + 4.75 / 2."""
    module = recipe("turn_ppo")
    turn_id, values = torch.tensor([[-1, 0, 0, -1, 1, 1]]), torch.tensor([[7, 0.5, 7, 7, 0.25, 7]])
    first = module.first_tokens(turn_id)
    assert first.nonzero()[:, 1].tolist() == [1, 4]
    advantages, returns = module.gae_advantages(module.place_turn_rewards(torch.tensor([[1.0, 5.0]]), turn_id), values, first, 1.0, 0.5)
    assert module.spread_over_turns(advantages, turn_id).tolist() == [[0, 3.125, 3.125, 0, 4.75, 4.75]]
    assert returns.tolist() == [[0, 3.625, 0, 0, 5, 0]]


def test_srl_rewards_what_two_texts_share(recipe):
    """8 of 9 characters each; 3 of 4; 1 of 4 in the right order; with the rewards .8 .6 -1 .9 the mean is .325 and the std .892095."""
    module = recipe("srl")
    assert module.step_reward("x = 2 + 3", "x = 2 + 4", False) == pytest.approx(16 / 18)
    assert module.step_reward("abcd", "bcde", False) == 0.75 and module.step_reward("left", "left", False) == 1.0
    assert module.step_reward("abcd", "dcba", False) == 0.25 and module.step_reward("left", "left", True) == -1.0
    assert module.step_reward("x" + "ab" * 150, "ab" * 150 + "y", False) == pytest.approx(600 / 602), "also of long texts"
    assert grpo(module, [0.8, 0.6, -1, 0.9]).tolist() == pytest.approx([0.532454, 0.308263, -1.485267, 0.644550], abs=3e-6)
    assert grpo(module, [0.8] * 4).tolist() == [0.0] * 4


def test_match_tir_scores_a_call(recipe):
    """f 1 9 for f 1 2 3: (1 + 2/3 + 1) / 5; another tool 0; the same call 1, with parameters or without."""
    score = recipe("match_tir").call_score
    assert score("f 1 9", "f 1 2 3") == pytest.approx(0.533333, abs=1e-6)
    assert score("f 1 2 3", "f 1") == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert score("g 1 2", "f 1 2") == score("", "f 1") == 0 and score("search Ada boss", "search Ada boss") == score("list", "list") == 1


def test_match_tir_matches_for_the_largest_sum_not_greedily(recipe):
    """Greedy takes 0.9 first and is left with 0.1."""
    match = recipe("match_tir").matched_rewards
    assert match([[0.9, 0.8], [0.85, 0.1]], 2) == [0.8, 0.85]
    assert match([[0.5], [0.7], [0.7]], 1) == [0, 0.7, 0], "a gold call is found once"
    assert match([[0.2, 0.6, 0.3]], 3) == [0.6] and match([], 2) == [] and match([[], []], 0) == [0, 0]


def test_match_tir_adds_the_advantage_of_the_episode_and_of_the_turn(recipe):
    """Rewards 1 0 1 and 0 1, discount 0.9: returns 1.81 .9 1 and .9 1. The third turn has nobody to be compared with."""
    played = torch.tensor([[True, True, True], [True, True, False]])
    got = recipe("match_tir").dual_advantages(torch.tensor([[1.0, 0, 1], [0, 1, 0]]).double(), played, torch.zeros(2), 0.9)
    assert got.flatten().tolist() == pytest.approx([1.414211, 0.000009, 0.707106, -1.414211, -0.000009, 0], abs=2e-6)


def test_rise_weighs_the_cross_entropy(recipe):
    """CE 1 and 2 (of two tokens each), rewards 1 and 0: (12.182494 + 2) / 2."""
    batch = {"advantages": torch.tensor([[0.0, 12.182494, 12.182494], [0, 1, 1]]), "weights": torch.tensor([[0, 0.25, 0.25], [0, 0.25, 0.25]])}
    loss = recipe("rise").imitation_loss(batch, torch.tensor([[0.0, -0.5, -1.5], [0, -1, -3]]))
    assert loss.item() == pytest.approx(7.091247, abs=1e-5)


def test_collabllm_averages_over_continuations(recipe):
    """Returns 1.68, .42, 1.5 are worth 1.2; 1.2 and 0 differ by 1.2 = 2 half-widths: +-0.7071, at turns 1 and 0."""
    returns = torch.tensor([[1.68, 0.42, 1.5], [0, 0, 0]]).double()
    played, tree = torch.tensor([[True, True, True], [True, False, False]]), torch.zeros(2)
    got = recipe("collabllm").turn_credit(returns, torch.tensor([1, 0]), played, tree, tree, "intra")
    assert got.flatten().tolist() == pytest.approx([0, 0.707106, 0, -0.707106, 0, 0], abs=2e-6)
    same = torch.tensor([[3.0, 0, 0], [1, 1, 1]]).double()
    assert (recipe("collabllm").turn_credit(same, torch.tensor([1, 0]), played, tree, tree, "intra") == 0).all(), "not the best one"


def test_tis_weighs_by_the_trainer_over_the_sampler_up_to_a_cap(recipe):
    trainer, sampler = torch.tensor([[0.3, 0.9, 0.1]]).log(), torch.tensor([[0.2, 0.1, 0.4]]).log()
    weight = recipe("tis").truncated_importance(trainer, sampler, 2.0)
    assert weight.tolist() == [pytest.approx([1.5, 2.0, 0.25])]


def test_tis_leaves_the_logprobs_of_the_sampler_in_bf16(recipe, tiny_policy):
    """collect_groups would replace them."""
    module = recipe("tis")
    args = dataclasses.replace(module.Args(), **TINY)
    tiny_policy.bf16, tiny_policy.history_turns, tiny_policy.max_turn_tokens = True, 0, 4
    episodes = module.sample_groups(tiny_policy, module.make_envs(args), args, 0)
    batch = module.collate(episodes, tiny_policy.device)
    gap = (module.batch_logprobs(tiny_policy, batch, args)[0] - batch["old_logprobs"]).abs().max()
    others = collect_groups(tiny_policy, module.make_envs(args), args, 0)
    assert [e.transcript() for e in episodes] == [e.transcript() for e in others], "and samples the same"
    assert gap > 0


def fill_page():
    """Copies the patches into the page."""
    page = PAGE.read_text()
    for name, text in PATCHES.items():
        page = re.sub(BLOCK.format(name), lambda found, text=text: f"{found[1]}```diff\n{text}```\n", page, flags=re.DOTALL)
    PAGE.write_text(page)


if __name__ == "__main__":
    fill_page()
