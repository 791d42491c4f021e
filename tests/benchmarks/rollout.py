"""Multi-turn rollout against `model.generate` from scratch every turn.

Same untrained model, same environment, same number of sampled tokens (no end of turn, so that every
turn has exactly --tokens of them). The two are timed in turn, A B A B, and compared by medians.

What limits the ratio: from scratch, turn k reads k observations instead of one, so with n turns at most
(n + 1) / 2 times the prompt tokens; the sampled tokens cost both sides the same. What keeps the time per
token flat: attention to the history, which grows with it, must be small beside the rest of the model,
that is, tokens of history below about six times the width.

    python tests/benchmarks/rollout.py [--threads 2] [--width 256] [--observation 12]
        [--tokens 2] [--episodes 64] [--csv results/rollout.csv]
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from envs.episodes import Turn, start_episodes
from envs.text_env import TextEnv
from policies import Policy, make_tiny
from rollouts import rollout
from utils import RunArgs, random_stream

parser = argparse.ArgumentParser()
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--episodes", type=int, default=64)
parser.add_argument("--tokens", type=int, default=2)
parser.add_argument("--observation", type=int, default=12)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--csv", help="append the rows to this file, e.g. results/rollout.csv")
options = parser.parse_args()
EPISODES, TOKENS, REPEATS = options.episodes, options.tokens, options.repeats


class Echo(TextEnv):
    """Says the same words every turn, whatever it is told, for a fixed number of turns."""

    def __init__(self, turns):
        super().__init__()
        self.turns, self.text = turns, " word" * options.observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return self.text, {}

    def step(self, action):
        self.turn += 1
        return self.text, 0.0, False, self.turn == self.turns, {}


@torch.no_grad()
def generate_from_scratch(policy, envs, episodes, turns):
    """What one writes first: render the history, call generate, step, repeat."""
    for _ in range(turns):
        prompts = [policy.prompt(e) for e in episodes]
        rows = [e.row() + ids for e, (ids, _) in zip(episodes, prompts, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = policy.model.generate(ids, attention_mask=mask, do_sample=True, top_k=0,
                                    max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
        for episode, env, sampled, (ids, first) in zip(episodes, envs, out[:, width:].tolist(),
                                                       prompts, strict=True):
            turn = Turn(episode.observation, policy.tokenizer.decode(sampled), ids, first, sampled)
            episode.answer(env, turn)


def main():
    torch.set_num_threads(options.threads)
    _, tokenizer = make_tiny(RunArgs(), [" word"] * 9)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=3 * options.width,
        num_hidden_layers=4, num_attention_heads=options.width // 32, max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=3))
    policy = Policy(model, tokenizer, "cpu")
    policy.max_turn_tokens = TOKENS
    assert len(policy.encode(Echo(1).text)) == options.observation
    never = torch.tensor([policy.end_id])
    policy.model.eval().lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, never, -1e9))
    print(f"{EPISODES} episodes, {options.observation} + {TOKENS} tokens a turn (observed + sampled), "
          f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.2f} million parameters, "
          f"{torch.get_num_threads()} threads, median of {REPEATS}")
    print("turns  tokens  rollout tokens/s  generate tokens/s  ratio  rollout us/token")
    per_token, rows = {}, []
    for turns in (2, 6, 16):
        seconds = {"rollout": [], "generate": []}
        for _ in range(REPEATS + 1):
            for name, times in seconds.items():
                envs = [Echo(turns) for _ in range(EPISODES)]
                episodes = start_episodes(envs, list(range(EPISODES)))
                rngs = [random_stream(i) for i in range(EPISODES)]
                start = time.perf_counter()
                if name == "rollout":
                    rollout(policy, envs, episodes, rngs, max_turns=turns, temperature=1.0)
                else:
                    generate_from_scratch(policy, envs, episodes, turns)
                times.append(time.perf_counter() - start)
                tokens = sum(len(turn.token_ids) for e in episodes for turn in e.turns)
                assert tokens == EPISODES * TOKENS * turns
        ours, theirs = (statistics.median(times[1:]) for times in seconds.values())  # first: warm-up
        per_token[turns] = ours / tokens
        print(f"{turns:5d}  {tokens:6d}  {tokens / ours:16.0f}  {tokens / theirs:17.0f}  "
              f"{theirs / ours:5.2f}  {1e6 * ours / tokens:16.1f}")
        rows.append({"width": options.width, "threads": options.threads, "episodes": EPISODES,
                     "observed": options.observation, "sampled": TOKENS, "turns": turns,
                     "rollout_tokens_per_second": round(tokens / ours),
                     "generate_tokens_per_second": round(tokens / theirs),
                     "ratio": round(theirs / ours, 2)})
    print(f"seconds per token, 16 turns against 2 turns: {per_token[16] / per_token[2]:.2f}")
    if options.csv:
        new = not Path(options.csv).exists()
        with open(options.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
