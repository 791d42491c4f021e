"""GiGPO: returns by hand, a slow loop from the paper, limits in which it is another rule, a run's credit."""

import itertools
import statistics

import numpy as np
import pytest
import torch

from algos import gigpo, ms_grpo
from algos.gigpo import Args, anchor_groups, anchored_advantages, main, relative_scores
from envs.episodes import Episode, Turn
from envs.frozen_lake import FrozenLake

SETTINGS = [(discount, weight, scale) for discount in (1.0, 0.9, 0.0) for weight in (0.0, 1.0, 0.4) for scale in ("std", "none")]


def table(rows, value=0.0):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.double)


def setting(rewards, observations, group_size):
    """rewards and observations: a list per episode -> the arguments of anchored_advantages."""
    episodes = [Episode(0, "", [Turn(text, "") for text in row]) for row in observations]
    mask = table([[1.0] * len(row) for row in rewards]) > 0
    return (table(rewards), mask, torch.arange(len(rewards)) // group_size,
            anchor_groups(episodes, group_size, "observation"))


def slow(rewards, observations, group_size, discount, weight, scale):
    """Eq. 1 to 5 episode by episode, as the paper writes them: a list per episode."""
    def relative(x, others):
        if len(others) < 2 or max(others) - min(others) <= 1e-6:
            return 0.0
        return (x - statistics.mean(others)) / (statistics.stdev(others) + 1e-6 if scale == "std" else 1.0)

    def to_go(e, k):
        return sum(discount ** (j - k) * rewards[e][j] for j in range(k, len(rewards[e])))

    advantages = []
    for e, row in enumerate(rewards):
        group = range(e // group_size * group_size, e // group_size * group_size + group_size)
        episode = relative(sum(row), [sum(rewards[i]) for i in group])
        advantages.append([])
        for k in range(len(row)):
            anchor = [to_go(i, j) for i in group for j in range(len(rewards[i]))
                      if observations[i][j] == observations[e][k]]
            advantages[-1].append(episode + weight * relative(to_go(e, k), anchor))
    return advantages


THREE = ([[0, 0, 10], [0, 0, 0], [0, 10]], [["s0", "s1", "s2"], ["s0", "s1", "s1"], ["s0", "s2"]])


@pytest.mark.parametrize("scale,expected", [
    ("none", [[6.1833, 9.6667, 3.3333], [-12.8417, -9.8333, -9.8333], [6.6583, 3.3333]]),
    ("std", [[1.1098, 1.7320, 0.5774], [-2.3083, -1.7321, -1.7321], [1.1985, 0.5774]])])
def test_three_episodes_by_hand(scale, expected):
    """Returns 9.025 9.5 10 | 0 0 0 | 9.5 10. s0: 9.025, 0, 9.5. s1: 9.5, 0, 0. s2: 10, 10, which teaches nothing."""
    advantages = anchored_advantages(*setting(*THREE, 3), discount=0.95, step_weight=1.0, scale=scale)
    assert advantages.numpy() == pytest.approx(table(expected).numpy(), abs=1e-4)


def random_groups(rng, groups=3, size=4):
    lengths = rng.integers(1, 7, groups * size)
    rewards = [rng.choice([0.0, 0.0, 1.0, -0.5, 0.3], n).tolist() for n in lengths]
    return rewards, [rng.choice(list("abcde"), n).tolist() for n in lengths], size


@pytest.mark.parametrize("discount,weight,scale", SETTINGS)
def test_random_groups_equal_a_slow_loop(discount, weight, scale):
    rng = np.random.default_rng(0)
    for _ in range(10):
        rewards, observations, size = random_groups(rng)
        found = anchored_advantages(*setting(rewards, observations, size), discount, weight, scale)
        expected = slow(rewards, observations, size, discount, weight, scale)
        assert found.numpy() == pytest.approx(table(expected).numpy(), abs=1e-9)


def test_without_step_weight_it_is_ms_grpo_and_without_anchors_its_return_to_go():
    """One anchor group for all turns of a group: MS-GRPO's control, with episode credit on top."""
    rewards, mask, group, anchor = setting(*random_groups(np.random.default_rng(1))[:2], 4)
    episode = ms_grpo.turn_advantages(rewards, mask, group, "episode")
    assert torch.equal(anchored_advantages(rewards, mask, group, anchor, 0.95, 0.0, "std"), episode)
    everyone = group[:, None].expand_as(mask)[mask]
    found = anchored_advantages(rewards, mask, group, everyone, 1.0, 1.0, "std")
    assert torch.allclose(found, episode + ms_grpo.turn_advantages(rewards, mask, group, "return_to_go"), atol=1e-12)
    lonely = torch.arange(len(anchor))
    assert torch.equal(anchored_advantages(rewards, mask, group, lonely, 0.95, 1.0, "std"), episode), "no turn has a partner"


def test_the_order_of_episodes_and_of_groups_does_not_matter():
    rewards, observations, size = random_groups(np.random.default_rng(2))
    whole = anchored_advantages(*setting(rewards, observations, size), 0.95, 1.0, "std")
    order = [11, 8, 10, 9, 2, 3, 0, 1, 4, 6, 5, 7]
    moved = anchored_advantages(*setting([rewards[i] for i in order], [observations[i] for i in order], size), 0.95, 1.0, "std")
    assert torch.allclose(moved, whole[order], atol=1e-12)
    alone = anchored_advantages(*setting(rewards[4:8], observations[4:8], size), 0.95, 1.0, "std")
    assert torch.allclose(alone, whole[4:8, : alone.shape[1]], atol=1e-12), "a group knows nothing of the others"


def test_relative_scores_of_equals_and_of_one_are_zero():
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    for scale in ("std", "none"):
        scores = torch.tensor([61.0, 61.0000000001, 61.0, 5.0, 0.0, 0.001], dtype=torch.double)
        relative = relative_scores(scores, group, scale)
        assert relative[:4].abs().max() == 0 and relative[4] == -relative[5] != 0


def test_anchors_are_observations_of_one_group():
    episodes = [Episode(0, "", [Turn(text, "") for text in row]) for row in (["a", "b"], ["b", "a", "a"], ["a"], ["b"])]
    assert anchor_groups(episodes, 2, "observation").tolist() == [0, 1, 1, 0, 0, 2, 3]
    assert anchor_groups(episodes, 2, "none").tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_two_episodes_that_part_at_the_second_turn():
    """Only one reaches the goal. Both saw start and fork, so these turns differ by A_E (0.5) and A_S (0.5); the last turn is alone."""
    rewards, observations = [[0, 0, 1], [0, 0]], [["start", "fork", "goal side"], ["start", "fork"]]
    found = anchored_advantages(*setting(rewards, observations, 2), 1.0, 1.0, "none")
    assert found.tolist() == [[1.0, 1.0, 0.5], [-1.0, -1.0, 0.0]]


@pytest.mark.parametrize("flags", [{}, {"anchors": "none", "scale": "none", "discount": 1.0}, {"history_turns": None}, {"num_minibatches": 2}])
def test_a_run_credits_and_logs_what_the_paper_says(flags, tmp_path, monkeypatch):
    """Every token of the updates carries the slow loop's advantage; the share of turns with a partner is counted."""
    seen, batches, logged = [], [], []
    collect, step = gigpo.collect_groups, gigpo.update
    monkeypatch.setattr(gigpo, "collect_groups", lambda *x: seen.append(collect(*x)) or seen[-1])
    monkeypatch.setattr(gigpo, "update", lambda policy, optimizer, batch, args: batches.append(batch) or step(
        policy, optimizer, batch, args))
    log = gigpo.Run.log
    monkeypatch.setattr(gigpo.Run, "log", lambda self, *x, **metrics: logged.append(metrics) or log(self, *x, **metrics))
    args = Args(**{"run_dir": str(tmp_path), "num_iterations": 1, "num_prompts": 3, "group_size": 4, "num_minibatches": 1,
                   "eval_episodes": 2, "warm_start_steps": 60, "print_samples": 0, "env_kwargs": '{"size": 3}'} | flags)
    main(args)
    [episodes] = seen
    names = [[turn.observation if args.anchors == "observation" else "" for turn in e.turns] for e in episodes]
    rewards = [[turn.reward for turn in e.turns] for e in episodes]
    expected = slow(rewards, names, 4, args.discount, args.step_weight, args.scale)
    parts = [[i for i in range(12) if i // 4 % args.num_minibatches == part] for part in range(args.num_minibatches)]
    assert len(batches) == len(parts), "each has something to learn from"
    for batch, part in zip(batches, parts, strict=True):
        values = [x for i in part for k, x in enumerate(expected[i]) for _ in range(episodes[i].turns[k].num_sampled)]
        assert batch["advantages"][batch["turn_id"] >= 0].tolist() == pytest.approx(values, abs=1e-5) and any(values)
    pairs = [(i // 4, name) for i, row in enumerate(names) for name in row]
    assert logged[0]["anchored_turns"] == pytest.approx(np.mean([pairs.count(pair) > 1 for pair in pairs]))


@pytest.mark.parametrize("size,turns,random,blind", [(4, 8, 0.007, 0.53), (6, 16, 0.001, 0.18)])
def test_what_players_without_eyes_solve(size, turns, random, blind):
    """The floors that docs/gigpo.md and docs/envs.md name: random moves, and the best walk of fixed moves to the goal."""
    env, rng, wins, maps = FrozenLake(size=size, max_turns=turns), np.random.default_rng(0), 0, []
    for seed in range(3000):
        env.reset(seed=2**30 + seed)
        maps.append(np.array([list(row) for row in env.desc]) == "H")
        while not env.ended:
            wins += env.step(("left", "down", "right", "up")[rng.integers(4)])[4]["success"]
    steps = 2 * (size - 1)
    walks = [np.cumsum([[int(i in downs), int(i not in downs)] for i in range(steps)], 0).T
             for downs in itertools.combinations(range(steps), size - 1)]
    holes = np.array(maps)
    solved = max(1 - holes[:, rows, columns].any(1).mean() for rows, columns in walks)
    assert abs(wins / 3000 - random) < 0.003 and abs(solved - blind) < 0.02


def test_on_frozen_lake_the_observation_is_the_state():
    """The same map is read again after a move against the wall: an anchor within one episode."""
    env = FrozenLake(size=4)
    first, _ = env.reset(seed=3)
    assert env.step("up")[0] == first != env.step("right")[0]
