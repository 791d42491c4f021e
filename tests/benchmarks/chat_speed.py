"""What bf16 and reading the rules once save, for a chat model on a CPU.

    python tests/benchmarks/chat_speed.py FOLDER        about 5 minutes on 2 CPU cores with SmolLM2-135M

32 demonstrations of easy search questions. "update": forward and backward pass of one optimizer step
on all of them. "rollout": 32 episodes of two turns. The faster of two, in seconds; each setting
comes once per round, so that a busy moment does not hit one setting only. Writes results/chat_speed.csv.
"""

import csv
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from algos import ms_grpo
from policies import load_policy, play_demonstrations, spell_out
from rollouts import collect_groups, make_envs
from utils import collate, micro_batches, token_logprobs

args = ms_grpo.Args(
    model=sys.argv[1], env_id="turnrl/SearchQA-v0", env_kwargs='{"regime": "easy"}',
    **ms_grpo.Args.chat_defaults | {"max_turn_tokens": 16, "num_prompts": 4}, max_turns=2, warm_start_steps=2)
[env] = make_envs(args, 1)
episodes = play_demonstrations(args, env)
args.warm_start_steps = 0
policy, envs = load_policy(args, None, env), make_envs(args)
batch = collate(spell_out(policy, episodes), policy.device)


def update():
    for rows in micro_batches(batch, args.micro_batch_tokens):
        token_logprobs(policy, rows, 1.0)[0].sum().backward()
    policy.model.zero_grad()


def rollout():
    collect_groups(policy, envs, args, 0)


best: dict[tuple, float] = {}
for _ in range(2):
    for bf16 in (False, True):
        for once in (False, True):
            policy.bf16, policy.worth_sharing = bf16, 64 if once else 10**9
            for work in (update, rollout):
                start = time.perf_counter()
                work()
                key = (work.__name__, "bf16" if bf16 else "fp32", "yes" if once else "no")
                best[key] = min(best.get(key, 1e9), time.perf_counter() - start)
rows = [{"work": work, "precision": precision, "rules_read_once": once, "seconds": f"{x:.1f}",
         "rows": len(batch["tokens"]), "shared_tokens": policy.shared(batch["tokens"]),
         "tokens": int(batch["lengths"].sum()), "threads": torch.get_num_threads()}
        for (work, precision, once), x in sorted(best.items())]
with open(ROOT / "results/chat_speed.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
