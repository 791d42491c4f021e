"""Peak memory of an update of a chat model: all weights or adapters, with and without checkpointing.

    python tests/benchmarks/memory.py FOLDER        about 8 minutes on 2 CPU cores with SmolLM2-135M

FOLDER holds the model. Every setting is a process of its own that loads it and makes two optimizer
steps of ms_grpo.py, each on eight rows of 1,024 random tokens, half of them sampled. Writes
results/memory.csv: the peak of the whole process.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS, TOKENS, STEPS, RANK = 8, 1024, 2, 16


def child(folder: str, adapters: bool, checkpointing: bool):
    sys.path.insert(0, str(ROOT))
    import torch

    from algos import ms_grpo
    from envs.episodes import Episode, Turn
    from policies import load_policy
    from utils import collate

    args = ms_grpo.Args(model=folder, warm_start_steps=0, lora_rank=RANK if adapters else None,
                        gradient_checkpointing=checkpointing)
    policy = load_policy(args)
    optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-6, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(policy.vocab_size, (ROWS, TOKENS), generator=generator).tolist()
    half = TOKENS // 2  # the other half is sampled
    episodes = [Episode(0, "", [Turn("", "", row[:half], True, row[half:], [0.0] * half)])
                for row in ids]
    for _ in range(STEPS):
        batch = collate(episodes, policy.device, torch.ones(ROWS, 1))
        ms_grpo.update(policy, None, optimizer, batch, args)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    print("measured", sum(p.numel() for p in policy.model.parameters()), trained)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        child(sys.argv[1], "adapters" in sys.argv, "checkpointing" in sys.argv)
        raise SystemExit
    rows = []
    for adapters in (False, True):
        for checkpointing in (False, True):
            flags = ["adapters"] * adapters + ["checkpointing"] * checkpointing
            process = subprocess.Popen([sys.executable, __file__, sys.argv[1], *flags, "child"],
                                       stdout=subprocess.PIPE, text=True)
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{flags} failed")
            _, parameters, trained = out.splitlines()[-1].split()
            rows.append({
                "parameters": parameters, "trained": trained, "rank": RANK if adapters else "",
                "checkpointing": "yes" if checkpointing else "no",
                "micro_batch_tokens": 4096, "peak_mebibytes": usage.ru_maxrss // 1024})
            print(rows[-1], flush=True)
    with open(ROOT / "results/memory.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
