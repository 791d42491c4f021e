"""Runs scripts one after the other, with the flags of a JSON file; test_cli.py starts it on two processes."""

import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import policies

policies.NUM_DEMONSTRATIONS = 128  # as conftest.py has it
dist.destroy_process_group = lambda: None  # one group for all scripts: they find it initialized
for script, flags in json.loads(Path(sys.argv[1]).read_text()).items():
    module = importlib.import_module(f"algos.{script}")
    module.main(module.Args(**flags))
