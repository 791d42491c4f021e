"""What is claimed, which arms of run_all.sh answer it, and what the tables of the pages show.

judge.py has the rule, report.py makes the tables and figures.
"""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

MOMENTS = {"tokens": "at equal tokens", "end": "at the end", "area": "over the run",
           "start": "before training"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """Arms that are compared in one game.

    The first arm minus the second, at `at`, is the primary comparison: it decides on `says`.
    Everything else in the claim's table is secondary. Without `says` nothing is decided.
    """

    title: str  # of the panel of the figure
    game: str  # row of results/floors.csv
    arms: tuple[str, ...]
    says: str = ""  # the claim of the paper that the primary comparison decides on
    metric: str = "success"
    at: str = "tokens"  # one of MOMENTS; "start" of arms that differ in how they are played
    best: float = 1.0  # the metric of perfect play
    floor_is: str = "random play"  # whose metric results/floors.csv has
    baseline: str = ""  # the arm that has to learn; empty: the second
    learns: str = ""  # the metric in which it has to; empty: `metric`
    margin: float = 0.0  # how much worse the first arm may be: for a claim that nothing is lost
    # of each: what shows that the addition is at work; its value, from means of columns; the least
    mechanisms: tuple[tuple[str, Callable, float], ...] = ()


def of(arm: str, column: str) -> Callable:
    """The mean of a column of results/<algo>.csv over an arm's seeds."""
    return lambda mean: mean(arm, column)


def weights_outside(arm: str, first: bool = False) -> tuple[str, Callable, float]:
    """SeeUPO's order acts through M: what the turns already updated make of an advantage."""
    moment, prefix = (", first iteration", "first_") if first else ("", "")
    return (f"episodes trained with a weight M / A outside 0.8 .. 1.2{moment}:",
            of(arm, f"{prefix}weights_outside"), 0.2)


def scaled_steps(stress: str) -> tuple[str, Callable, float]:
    """ST-PPO: its own rule scales some of the steps."""
    return "steps that are scaled", of(f"{stress}_st_ppo", "scaled_steps"), 0.1


THOUGHTS = ("think_turn", "think_none", "think_penalty", "think_turn_penalty", "think_episode",
            "think_none_drop")
LIMITS = ("limit_dynamic", "limit_none", "limit_fixed")
turns_taken_away = (
    "turns by which the limit is below the game's", lambda mean: (
        mean("limit_none", "turn_limit_last") - mean("limit_dynamic", "turn_limit_last")), 1)


def gain_of_a_hop(regime: str, belief: str) -> Callable:
    """IGPO's mean gain of a search that finds the next person (results/gains.csv)."""
    with open(Path(__file__).parent / "gains.csv", newline="") as file:
        [row] = [row for row in csv.DictReader(file)
                 if (row["regime"], row["belief"], row["turn"])
                 == (regime, belief, "hop before the last")]
    return lambda mean: float(row["mean_gain"])


ALGORITHMS = {  # algo: name, arXiv ids, idea, what gets an advantage, game of the default run
    "ms_grpo": ("MS-GRPO", "2508.10839v1", "every turn gets the episode's return, compared with "
                "its group; episodes are drawn by abs(advantage)", "episode", "frozen lake"),
    "gigpo": ("GiGPO", "2505.10978v3", "a turn is also compared with the turns of its group that "
              "saw the same observation", "turn", "frozen lake"),
    "ufo": ("UFO", "2507.14295v2", "answer, be told only \"try again\", answer again; the reward "
            "decays and repeats cost", "episode", "number words, modular maths"),
    "turn_budget": ("turn budget", "", "each turn may think only so long in a short context; a "
                    "hypothesis, not a paper", "episode", "sums on pages"),
    "igpo": ("IGPO", "2510.14967v2", "a turn is rewarded by how much it raised the model's belief "
             "in the right answer", "turn", "search questions"),
    "tree_grpo": ("Tree-GRPO, entropy mask", "2509.21240v3 2506.01939v2", "fork episodes at their "
                  "turns, compare the leaves; train on uncertain tokens", "leaf",
                  "search questions"),
    "st_ppo": ("ST-PPO, PPO", "2511.20718v1", "one ratio per turn; gradients scaled by what "
               "clipping took from them", "token, from a critic", "order desk"),
    "seeupo": ("SeeUPO", "2602.06554v1", "one update per turn, the last turn first",
               "episode, times later turns' ratios", "order desk"),
    "archer": ("ArCHer", "2402.19446v1", "a critic of whole turns learns from a replay buffer",
               "turn, from a critic", "maze")}
CLAIMS = {  # algo: name of the table: claim
    "ms_grpo": {
        "A": Claim(
            "Snake: which episodes are trained on", "snake", ("snake_aaw", "snake_uniform"),
            says="drawing episodes by abs(advantage) beats drawing them evenly, where returns are "
                 "graded", metric="return", best=2.91,
            mechanisms=(("abs(advantage) of what is drawn is larger by", lambda mean: (
                mean("snake_aaw", "drawn_size") - mean("snake_uniform", "drawn_size")), 0.1),)),
        "B": Claim(
            "lakes of 6x6: what a turn is credited with", "large lake",
            ("large_episode", "large_step", "large_return_to_go"),
            says="the episode's return is a better credit than the step's own reward, where pay "
                 "comes late, on large lakes", baseline="large_return_to_go"),
        "C": Claim(
            "tool desk: what a turn is credited with", "desk",
            ("desk_episode", "desk_step", "desk_return_to_go"),
            says="the episode's return is a better credit than the step's own reward, where pay "
                 "comes late, on the tool desk", baseline="desk_return_to_go"),
        "KL": Claim("Frozen Lake: held to the start policy", "lake", ("lake_aaw", "lake_kl"))},
    "gigpo": {
        "A": Claim(
            "Frozen Lake: what a turn is compared with", "lake",
            ("lake_gigpo", "lake_episode", "lake_no_anchors", "lake_mean"),
            says="comparing turns that saw the same helps on small lakes", at="end",
            mechanisms=(("turns with a partner", of("lake_gigpo", "anchored_turns"), 0.2),)),
        "B": Claim(
            "lakes of 6x6", "large lake", ("large_gigpo", "large_episode", "large_no_anchors"),
            says="comparing turns that saw the same helps on large lakes", at="end",
            mechanisms=(("turns with a partner", of("large_gigpo", "anchored_turns"), 0.2),)),
        "C": Claim(
            "tool desk", "desk", ("desk_gigpo", "desk_episode", "desk_no_anchors"),
            says="comparing turns that saw the same helps on the tool desk", at="end",
            mechanisms=(("turns with a partner", of("desk_gigpo", "anchored_turns"), 0.2),))},
    "ufo": {
        "A": Claim(
            "within five answers", "words, 5 answers", ("words_turns5", "words_turns1"),
            says="training with five answers beats training with one, at answering five times"),
        "B": Claim(
            "at the first answer", "words, 1 answer", ("words_turns5", "words_turns1"),
            metric="success_at_1", margin=0.03,
            says="training with five answers costs the first answer nothing (at most 0.03)"),
        "C": Claim("penalty and decay", "words, 5 answers",
                   ("words_turns5", "words_no_penalty", "words_constant"))},
    "turn_budget": {
        "A": Claim(
            "what closes a thought, before training", "think", THOUGHTS, at="start",
            says="closing every thought that is too long makes the start policy solve more"),
        "B": Claim(
            "what closes a thought", "think", THOUGHTS,
            says="training and playing with a cap on every thought beats both without one"),
        "C": Claim(
            "turn limits, before training", "turns", LIMITS, at="start", margin=0.05,
            says="a limit on the turns that is extended on demand costs the start policy "
                 "little (at most 0.05)", mechanisms=(turns_taken_away,)),
        "D": Claim(
            "turn limits", "turns", LIMITS, margin=0.05,
            says="a limit on the turns that is extended on demand costs little (at most 0.05) "
                 "after training with it", mechanisms=(turns_taken_away,))},
    "igpo": {
        "A": Claim(
            "three people asked for at once", "three people",
            ("parts_prob", "parts_outcome", "parts_gain", "parts_log_prob", "parts_joint"),
            says="gain and outcome beat the outcome alone, where success is rare at first",
            mechanisms=(("mean gain of a right search before the last",
                         gain_of_a_hop("parts", "prob"), 0),))},
    "tree_grpo": {
        "A": Claim(
            "trees or chains (all tokens)", "search",
            ("tree_all", "tree_chains4", "tree_chains6", "tree_intra", "tree_inter"),
            says="trees beat chains",
            mechanisms=(("trees whose leaves differ",
                       lambda mean: 1 - mean("tree_all", "trees_without_signal"), 0.2),)),
        "B": Claim(
            "share of tokens kept (trees)", "search",
            ("tree_top20", "tree_all", "tree_top50", "tree_bottom80"),
            says="the fifth of the tokens with the highest entropy does better than all",
            mechanisms=(("tokens kept of an answer",
                       lambda mean: (mean("tree_top20", "kept_share")
                                     * mean("tree_top20", "generated_tokens")
                                     / mean("tree_top20", "environment_steps")), 2),))},
    "st_ppo": {
        "A": Claim("2 steps per batch", "desk", ("desk_st_ppo", "desk_ppo")),
        "B": Claim(
            "32 steps, each arm's own rate", "desk",
            ("fresh_st_ppo", "fresh_ppo", "fresh_s_ppo", "fresh_turn_ppo"),
            says="turn-level ratios and the clip-bias correction beat PPO on fresh batches, each "
                 "with the rate chosen for it", mechanisms=(scaled_steps("fresh"),)),
        "C": Claim(
            "32 steps, batches 4 (late2: 2) iterations old", "desk",
            ("late_st_ppo", "late_ppo", "late_s_ppo", "late_turn_ppo", "late2_st_ppo", "late2_ppo"),
            says="turn-level ratios and the clip-bias correction beat PPO on batches of four "
                 "iterations ago, each with the rate chosen for it",
            mechanisms=(scaled_steps("late"),)),
        "D": Claim(
            "32 steps, the rate for 2", "desk",
            ("hot_st_ppo", "hot_ppo", "hot_s_ppo", "hot_turn_ppo"),
            says="turn-level ratios and the clip-bias correction prevent the collapse of PPO at "
                 "a rate that is too high", baseline="desk_ppo",
            mechanisms=(("success that PPO loses by so many steps", lambda mean: (
                mean("desk_ppo", "success_end") - mean("hot_ppo", "success_end")), 0.2),
                scaled_steps("hot"))),
        "E": Claim("32 steps, the rate for 2: cures", "desk",
                   ("hot_ppo", "hot_s_ppo", "hot_s_triggered", "hot_s_step", "hot_target_kl")),
        "F": Claim("32 steps of SGD", "desk", ("sgd_s_ppo", "sgd_ppo"))},
    "seeupo": {
        "A": Claim(
            "Trust, long steps: the order", "trust",
            ("trust_reverse", "trust_natural", "trust_random", "trust_unweighted",
             "trust_gspo_8", "trust_gspo_24"),
            says="updating the last turn first beats the natural order, in a game made for it "
                 "with long steps", metric="return", at="end",
            floor_is="the worst play", mechanisms=(weights_outside("trust_reverse", first=True),)),
        "B": Claim(
            "Trust, long steps without momentum", "trust",
            ("trust0_reverse", "trust0_natural", "trust0_random", "trust0_gspo_8",
             "trust0_gspo_24"),
            says="updating the last turn first beats the natural order, in a game made for it "
                 "with long steps without momentum", metric="return", at="end",
            floor_is="the worst play", mechanisms=(weights_outside("trust0_reverse", first=True),)),
        "C": Claim(
            "Trust, the paper's clip", "trust",
            ("clip_reverse", "clip_natural", "clip_random", "clip_unweighted", "clip_released",
             "clip_gspo_4", "clip_gspo_12"),
            says="updating the last turn first beats the natural order, in a game made for it "
                 "with the paper's clip", metric="return", at="end",
            floor_is="the worst play", mechanisms=(weights_outside("clip_reverse", first=True),)),
        "D": Claim(
            "tool desk: as many optimizer steps", "desk",
            ("desk_reverse", "desk_gspo_8", "desk_grpo_8"),
            says="an update per turn beats GSPO with as many optimizer steps, on the tool desk",
            mechanisms=(weights_outside("desk_reverse"),)),
        "E": Claim(
            "tool desk: every token used once", "desk",
            ("desk_reverse", "desk_gspo_1", "desk_grpo_1"),
            says="an update per turn beats GSPO when each uses a token once, on the tool desk",
            mechanisms=(weights_outside("desk_reverse"),)),
        "F": Claim(
            "questions: as many optimizer steps", "search",
            ("question_reverse", "question_gspo_6", "question_grpo_6"),
            says="an update per turn beats GSPO with as many optimizer steps, on questions",
            mechanisms=(weights_outside("question_reverse"),)),
        "G": Claim(
            "questions: every token used once", "search",
            ("question_reverse", "question_gspo_1", "question_grpo_1"),
            says="an update per turn beats GSPO when each uses a token once, on questions",
            mechanisms=(weights_outside("question_reverse"),))},
    "archer": {
        "A": Claim(
            "480 episodes: other scripts", "maze",
            ("maze_archer", "maze_ppo", "maze_grpo", "maze_default"),
            metric="return", at="area", best=-6.84,
            says="ArCHer needs fewer episodes than PPO: it returns more, on average over as many",
            mechanisms=(("variance of new returns that the critic explains",
                         of("maze_archer", "explained_variance"), 0.2),)),
        "B": Claim(
            "480 episodes: the critic", "maze",
            ("maze_default", "maze_monte_carlo", "maze_one_critic", "maze_small_buffer",
             "maze_ended"),
            metric="return", at="area", best=-6.84)},
}
DEFAULT_ARMS = [  # rows of the first table of docs/results.md: algo, arm, game
    ("ms_grpo", "lake_aaw", "Frozen Lake (default)"), ("ms_grpo", "snake_aaw", "Snake, 20 turns"),
    ("gigpo", "lake_gigpo", "Frozen Lake (default)"),
    ("ufo", "words_turns5", "number words, modular maths (default)"),
    ("turn_budget", "think_turn", "think search (default)"),
    ("igpo", "middle_both", "search, 2 to 3 hops (default)"),
    ("tree_grpo", "tree_top50", "search, 2 to 3 hops (default)"),
    ("st_ppo", "desk_st_ppo", "tool desk (default)"),
    ("seeupo", "desk_reverse", "tool desk (default)"),
    ("archer", "maze_default", "maze (default)")]
PAIRS = {  # algo: arms that are compared besides, the claim's way
    "archer": [("maze_default", "maze_ppo")],
    "tree_grpo": [("tree_all", f"tree_{share}") for share in ("top50", "bottom80")],
    "turn_budget": [("think_none", f"think_{other}")
                    for other in ("penalty", "turn_penalty", "none_drop")],
    "st_ppo": [(f"{stress}_{one}", f"{stress}_{other}") for stress in ("fresh", "late", "hot")
               for one, other in (("turn_ppo", "ppo"), ("s_ppo", "ppo"))]
    + [("late2_st_ppo", "late2_ppo"), ("hot_s_step", "hot_s_ppo")]}
DIAGNOSTICS = {  # algo: columns of metrics.csv, one row per iteration -> results/<algo>_drift.csv
    "st_ppo": ["train_success", "clip_fraction", "clip_bias_norm", "clip_bias_norm_max",
               "gradient_scale", "approx_kl", "entropy"]}
CROSS = {  # the cross table: game -> heading; its arms are <game>_<algo>
    "lake": "Frozen Lake", "search": "search", "desk": "tool desk"}
LEVELS = (-20, -16, -12, -9)  # returns that ArCHer's table of episodes asks for
EPISODES = 16  # in every iteration of these runs
LEVEL_ARMS = [*CLAIMS["archer"]["A"].arms, *CLAIMS["archer"]["B"].arms[1:]]
COLLAPSES = [  # arms of ST-PPO whose collapses are counted
    "desk_ppo", "desk_st_ppo", "fresh_ppo", "fresh_turn_ppo", "fresh_s_ppo", "fresh_st_ppo",
    "late_ppo", "late_turn_ppo", "late_s_ppo", "late_st_ppo", "late2_ppo", "late2_st_ppo",
    "hot_ppo", "hot_turn_ppo", "hot_s_ppo", "hot_st_ppo", "hot_s_triggered", "hot_s_step",
    "hot_target_kl", "sgd_ppo", "sgd_s_ppo"]
CURVES = {  # algo: columns of metrics.csv that are also compared at equal tokens -> heading
    "ufo": {"eval_success_at_1": "success at turn 1", "eval_success": "within 5 turns",
            "eval_distinct_ratio": "distinct answers",
            "eval_identical_failure": "failures that never changed the answer",
            "eval_average_turns": "turns", "eval_in_range": "answers in range"},
    "turn_budget": {"eval_success": "success", "eval_rounds_completed": "right hops",
                    "eval_thought_tokens": "thought tokens per turn",
                    "eval_tokens_per_success": "tokens per solved episode",
                    "eval_forced_closes": "thoughts closed by the cap",
                    "eval_overflowed": "context full",
                    "eval_thought_share": "context that is thought",
                    "eval_history_cost": "history cost"},
}
EXTRA = {  # algo: column of metrics.csv -> (mean over the run, at its end, or, for first_COLUMN, in
    # its first iteration; heading in the tables)
    "ms_grpo": {"drawn_advantage": ("mean", None), "drawn_size": ("mean", None),
                "groups_without_signal": ("mean", None)},
    "gigpo": {"anchored_turns": ("mean", "turns with a partner"),
              "groups_without_signal": ("mean", "groups without signal"),
              "entropy": ("end", "entropy at the end")},
    "ufo": {"groups_without_signal": ("mean", "groups without signal"),
            "entropy": ("end", None), "repetition_part": ("end", None)},
    "turn_budget": {"groups_without_signal": ("mean", "groups without signal"),
                    "entropy": ("end", None), "turn_limit_first": ("end", None),
                    "turn_limit_last": ("end", None)},
    "igpo": {"groups_of_equal_outcome": ("mean", "groups of equal outcome"),
             "groups_without_signal": ("mean", "groups without signal"),
             "eval_turns": ("end", "turns at the end"), "eval_truncated": ("end", None)},
    "tree_grpo": {"leaves_per_1000_tokens": ("mean", "leaves per 1000 tokens"),
                  "row_tokens_per_sampled": ("mean", "row tokens per sampled"),
                  "groups_without_signal": ("mean", "groups without signal"),
                  "trees_without_signal": ("mean", "trees without signal"),
                  "kept_share": ("mean", "kept"), "entropy": ("end", "entropy at the end"),
                  "entropy_kept": ("mean", None), "clip_fraction": ("mean", None)},
    "st_ppo": {"clip_fraction": ("mean", "clip fraction"),
               "clip_bias_norm": ("mean", "norm of C"),
               "scaled_steps": ("mean", "scaled steps"), "gradient_scale": ("mean", None),
               "approx_kl": ("mean", "approx. KL"), "entropy": ("end", "entropy at the end"),
               "explained_variance": ("mean", None), "grad_clipped": ("mean", None)},
    "seeupo": {"weights_outside": ("mean", "M / A outside 0.8 .. 1.2"),
               "first_weights_outside": ("first", "in the first iteration"),
               "ratio_drift": ("mean", "ratio drift"),
               "first_ratio_drift": ("first", "in the first iteration"),
               "clip_fraction": ("mean", "clip fraction"),
               "approx_kl": ("mean", "approx. KL"), "entropy": ("end", "entropy at the end"),
               "groups_without_signal": ("mean", None)},
    "archer": {"explained_variance": ("mean", "explained variance"),
               "rank_correlation": ("mean", "rank correlation"),
               "eval_invalid_actions": ("end", None),
               "fresh_tokens": ("mean", "fresh tokens per iteration"),
               "entropy": ("end", "entropy at the end"), "critic_loss": ("end", None),
               "advantage_mean": ("end", None), "advantage_square": ("end", None)},
}
IMITATIONS = {  # what MS-GRPO starts from on easy search: steps, how often the player answers too
    # early, and the runs of tests/benchmarks/pretrained.py
    "40 steps, a player who answers too early in a quarter of the turns":
        ("40", "0.25", ["equal_ms_grpo", "long_ms_grpo"]),
    "80 steps, the same player": ("80", "0.25", ["search_ms_grpo"]),
    "40 steps, a player who answers too early in a tenth": ("40", "0.1", ["patient_ms_grpo"]),
    "80 steps, that player": ("80", "0.1", ["headline_ms_grpo"])}
