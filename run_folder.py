"""The run folder of a script: flags, log, evaluation, checkpoints, resume, signals, curve.

Nothing here is needed to understand an algorithm: a script iterates over run.iterations, calls
run.log in every iteration and run.finish at the end.
"""

import contextlib
import csv
import dataclasses
import html
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tqdm
import transformers

from envs.episodes import EnvironmentFault, Episode
from chat_format import Opening
from policies import Policy
from rollouts import episode_metrics, evaluate, make_envs
from utils import (
    RunArgs, all_gather, all_reduce_sum, batch_logprobs, quiet, rank, reason, select_rows, stop,
    world_size,
)

MAY_CHANGE_ON_RESUME = {"resume", "num_iterations", "max_generated_tokens", "eval_only",
                        "warm_start_only",
                        "save_every", "run_dir", "track", "print_samples",
                        "micro_batch_tokens", "gradient_checkpointing", "device"}


def check_args(args: RunArgs):
    for name, value in dataclasses.asdict(args).items():
        flag, least = "--" + name.replace("_", "-"), 0 if name in args.may_be_zero else 1
        if type(value) is int and value < least:
            stop(f"{flag} must be at least {least}, got {value}")
        above_zero = name.endswith(("temperature", "learning_rate", "grad_norm", "std"))
        low = type(value) is float and (value < 0 or (value == 0 and above_zero))
        if low or (type(value) is float and not math.isfinite(value)):
            stop(f"{flag} must be finite and {'positive' if above_zero else '>= 0'}, got {value}")
    if args.num_prompts % world_size():
        stop(f"--num-prompts {args.num_prompts} cannot be split over {world_size()} processes")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        stop(f"--device {args.device}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        stop(f"--device {args.device}: cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        stop(f"--device {args.device}: there is no CUDA device")
    if world_size() > 1 and device.index is not None:
        stop(f"--device {args.device}: with several processes say cuda, each takes its own device")


PAGE = """<!doctype html><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.9 ui-monospace, monospace; margin: 2em auto; max-width: 72em; color: #222 }}
pre {{ font: inherit; white-space: pre-wrap; border-left: 3px solid #ccc; padding-left: 1em }}
s {{ color: #888; text-decoration: none }} sup {{ color: #888 }} label {{ margin-right: 2em }}
i {{ font-style: normal; border-bottom: 1px solid #aaa; padding: 2px 0 }}
body:has(#advantage:checked) i {{ background: var(--advantage) }}
body:has(#ratio:checked) i {{ background: var(--ratio) }}
body:has(#entropy:checked) i {{ background: var(--entropy) }}
header {{ position: sticky; top: 0; background: white }}
</style>
<header><b>{name}</b><br>colour of the sampled tokens:
<label><input type="radio" name="by" id="advantage" checked> advantage</label>
<label><input type="radio" name="by" id="ratio"> probability after the update / before</label>
<label><input type="radio" name="by" id="entropy"> entropy</label>
<br>blue: above 0 (ratio: above 1), orange: below; grey text was not sampled; point at a token for
its numbers</header>
"""


def colored_rows(tokenizer, batch: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> str:
    """Rows of tokens as HTML. values: for every name of a colour a (B, T), of which 0 is white."""
    lines, largest = [], {name: x.abs().max().clamp(min=1e-6) for name, x in values.items()}
    lines.append("strongest colour: " + ", ".join(
        f"ratio {x.exp():.3g} or {(-x).exp():.3g}" if name == "ratio" else f"{name} {x:.3g}"
        for name, x in largest.items()))
    for row, length in enumerate(batch["lengths"].tolist()):
        parts, turn, ids = [], batch["turn_id"][row].tolist(), batch["tokens"][row].tolist()
        outside: list[int] = []  # tokens not sampled, since the last sampled one
        for t in range(length + 1):
            if outside and (t == length or turn[t] >= 0):
                parts.append(f"<s>{html.escape(tokenizer.decode(outside))}</s>")
                outside = []
            if t == length:
                break
            if turn[t] < 0:
                outside.append(ids[t])
                continue
            if t == 0 or turn[t - 1] != turn[t]:
                parts.append(f"<sup>turn {turn[t]} </sup>")
            colors, numbers = [], []
            for name, x in values.items():
                value = x[row, t].item()
                rgb = "70,130,220" if value > 0 else "240,140,40"
                colors.append(f"--{name}:rgba({rgb},{abs(value) / largest[name]:.2f})")
                shown = math.exp(value) if name == "ratio" else value
                numbers.append(f"{name} {shown:.3f}")
            parts.append(f'<i style="{";".join(colors)}" title="{", ".join(numbers)}">'
                         f"{html.escape(tokenizer.decode([ids[t]]))}</i>")
        lines.append(f"<pre>{''.join(parts)}</pre>")
    return "\n".join(lines)


class Run:
    """A run folder and what goes into it; `with Run(args, "ms_grpo") as run:` guards a run.

    args.json, metrics.csv (a row per iteration), samples.jsonl, samples.html (rows of the first and
    the last update), checkpoint/ (a transformers folder with trainer_state.pt), summary.json,
    curve.png.
    """

    def __init__(self, args: RunArgs, algo: str):
        with contextlib.suppress(AttributeError):  # no console, or one of a notebook
            sys.stdout.reconfigure(errors="replace")  # what it cannot show
        check_args(args)
        if world_size() > 1 and not dist.is_initialized():  # launched by torchrun
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
            torch.set_num_threads(max(1, (os.cpu_count() or 1)
                                      // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))))
        torch.set_float32_matmul_precision("high")
        self.args, self.training, self.writer = args, False, None
        self.start = self.signal = self.saved = 0  # saved: the iteration of the last checkpoint
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        self.totals = {"generated_tokens": 0, "environment_steps": 0}
        self.clock = time.perf_counter()  # on resume moved back by the seconds spent before
        stamp = [time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() // 10**6 % 1000:03d}"]
        if world_size() > 1:
            dist.broadcast_object_list(stamp)
        name = f"{args.env_id.rpartition('/')[2]}__{algo}__{args.seed}__{stamp[0]}"
        self.folder = Path(args.resume or Path(args.run_dir) / name)
        self.writes = rank() == 0 and not (args.resume and args.eval_only)
        if args.resume:
            self.check_resume(algo)
        self.eval_envs = make_envs(args, min(args.eval_episodes, 256), evaluation=True)
        if rank() == 0 and not args.resume:
            commit = ""
            with contextlib.suppress(OSError):  # no git here
                commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                        capture_output=True, text=True).stdout.strip()
            versions = {"python": platform.python_version(), "torch": torch.__version__,
                        "transformers": transformers.__version__, "gymnasium": gym.__version__,
                        "commit": commit}
            record = {"algo": algo, "args": dataclasses.asdict(args), "versions": versions}
            with self.writing("args.json") as new:
                self.folder.mkdir(parents=True, exist_ok=True)
                new.write_text(json.dumps(record, indent=1))
            print(f"run folder: {self.folder}")
        if args.track != "none" and rank() == 0:
            with self.tracking():
                if args.track == "wandb":
                    import wandb
                    wandb.init(project="turnrl", name=name, config=dataclasses.asdict(args),
                               sync_tensorboard=True)
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(str(self.folder))

    @contextlib.contextmanager
    def tracking(self):
        """Around what the tracker does: one that fails is dropped, and training goes on."""
        try:
            yield
        except ImportError as error:
            stop(f"--track {self.args.track}: {error} (pip install tensorboard {self.args.track})")
        except Exception as error:  # no network, a full disk
            print(f"warning: --track {self.args.track} is dropped: {error!r}", file=sys.stderr)
            self.writer = None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """To write `name` as a whole, in the path given, or to add to it: all, or stop the run."""
        path, new = self.folder / name, self.folder / f"{name}.new"
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        try:
            yield new
            if new.exists():
                new.replace(path)
        except Exception as error:  # OSError; torch, safetensors and tokenizers have their own
            shutil.rmtree(new, ignore_errors=True)  # if it is a folder
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
                os.truncate(path, size)
            why = error.__context__ if isinstance(error.__context__, OSError) else error
            last = f"iteration {self.saved}, --resume {self.folder}" if self.saved else "none"
            stop(f"{path} cannot be written: {reason(why)} (last checkpoint: {last})")

    def check_resume(self, algo: str):
        try:
            record = json.loads((self.folder / "args.json").read_text())
            saved, now = {"algo": record["algo"], **record["args"]}, {"algo": algo}
        except (OSError, ValueError, KeyError):
            stop(f"--resume {self.folder}: no run folder with a readable args.json")
        now |= dataclasses.asdict(self.args)
        free = {"eval_episodes", "eval_temperature"} if self.args.eval_only else set()
        other = [f"{name} {saved.get(name)} (now {value})" for name, value in now.items()
                 if name not in MAY_CHANGE_ON_RESUME | free and saved.get(name) != value]
        if other:
            stop(f"--resume {self.folder} was made with other settings: {', '.join(other)}")

    def __enter__(self) -> "Run":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, frame):
        if not self.training or self.signal:  # nothing to save yet, or asked twice
            raise SystemExit(128 + number)
        self.signal = number
        print("stopping after this iteration (again: at once)", file=sys.stderr)

    def __exit__(self, kind, error, traceback):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with self.tracking():
            if self.writer:
                self.writer.close()
        if isinstance(error, EnvironmentFault):
            self.write_samples("fault", [error.episode])
            stop(f"{error} (the episode is in {self.folder / 'samples.jsonl'})")
        if kind is None and world_size() > 1:
            dist.barrier()  # gloo aborts if a process leaves while others still talk
            dist.destroy_process_group()

    def restore(self, policy: Policy, **state):
        """With --resume: load the checkpoint into the policy and into `state` (objects by name)."""
        if not self.args.resume:
            return
        folder = self.folder / "checkpoint"
        if not folder.exists():  # killed between the two renames of save()
            folder = self.folder / "checkpoint.old"
        try:
            saved = torch.load(folder / "trainer_state.pt", "cpu", weights_only=True)
            policy.load(folder)
            policy.head = Opening(*saved["head"])  # its template may print today's date
            for name, target in state.items():
                if isinstance(target, list):
                    target[:] = saved[name]
                else:
                    target.load_state_dict(saved[name])
            with open(self.folder / "metrics.csv", newline="") as file:
                self.rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)
                             if int(row["iteration"]) <= saved["iteration"]]
        except Exception as error:  # torch, safetensors and pickle each have their own
            stop(f"--resume {self.folder}: its checkpoint cannot be read ({type(error).__name__})")
        self.start = self.saved = saved["iteration"]
        self.totals, self.clock = saved["totals"], self.clock - saved["seconds"]

    def save(self, policy: Policy, **state):
        """Write a checkpoint under another name, then rename it: a kill leaves a readable one."""
        current, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        kept = {"iteration": int(self.rows[-1]["iteration"]), "totals": self.totals,
                "seconds": time.perf_counter() - self.clock, "head": list(policy.head)}
        kept |= {name: x if isinstance(x, list) else x.state_dict() for name, x in state.items()}
        shutil.rmtree(self.folder / "checkpoint.new", ignore_errors=True)
        with self.writing("checkpoint") as new:
            policy.save(new)
            with open(new / "trainer_state.pt", "wb") as file:  # unlike torch's, it says what fails
                torch.save(kept, file)
            if current.exists():
                shutil.rmtree(old, ignore_errors=True)
                current.rename(old)
        shutil.rmtree(old, ignore_errors=True)
        self.saved = int(self.rows[-1]["iteration"])

    def iterations(self, policy: Policy, evaluation: Callable | None = None,
                   **state) -> Iterator[int]:
        """The iteration numbers; around them resumes, evaluates, saves, shows progress.

        `state`: what a checkpoint must hold; evaluation() -> (metrics, episodes), if not the usual.
        """
        self.restore(policy, **state)
        evaluation = evaluation or (lambda: evaluate(policy, self.eval_envs, self.args))
        args, self.training, self.policy, self.shown = self.args, True, policy, False
        if not self.rows:
            self.rows.append({"iteration": 0})
        due = self.start % args.eval_every == 0 or self.is_last(self.start)
        if args.eval_only or (due and "eval_success" not in self.rows[-1]):
            self.evaluated(*evaluation())
        if args.warm_start_only and rank() == 0:
            self.save(policy, **state)
        stay = args.eval_only or args.warm_start_only or self.is_last(self.start)
        steps = range(self.start, self.start if stay else args.num_iterations)
        self.progress = tqdm.tqdm(steps, "train", args.num_iterations, initial=self.start,
                                  disable=quiet())
        for iteration in self.progress:
            yield iteration
            stopping = int(all_gather(torch.tensor([self.signal])).max())  # one decision for all
            done, last = iteration + 1, self.is_last(iteration + 1)
            if (done % args.eval_every == 0 or last) and not stopping:
                self.evaluated(*evaluation())
            if (done % args.save_every == 0 or last or stopping) and rank() == 0:
                self.save(policy, **state)
            if stopping:
                if world_size() > 1:
                    dist.barrier()  # a rank that leaves first would have the others killed
                if rank() == 0:
                    print(f"stopped; continue with --resume {self.folder}", file=sys.stderr)
                raise SystemExit(128 + stopping)
            if last:
                self.progress.close()
                return

    def is_last(self, done: int) -> bool:
        """Whether the run ends after so many iterations."""
        limit = self.args.max_generated_tokens or math.inf
        return done == self.args.num_iterations or self.totals["generated_tokens"] >= limit

    def log(self, iteration: int, episodes: list[Episode], updates: list[dict[str, float]],
            batch: dict[str, torch.Tensor] | None, **metrics: float):
        """Start the row of an iteration: what the episodes were like and what the update did.

        updates: what each of its optimizer steps reports, of which the mean is logged (if metrics
        has nothing else); batch: what they learned from, with its advantages (B, T) or (B,).
        """
        means = {name: np.mean([u[name] for u in updates]) for name in (updates or [{}])[0]}
        metrics = {"optimizer_steps": len(updates)} | means | metrics
        train = episode_metrics(episodes)
        turns = {id(turn): turn for e in episodes for turn in e.turns}.values()  # shared ones once
        steps, sampled, gap = all_reduce_sum(torch.tensor([
            len(turns), sum(turn.num_sampled for turn in turns), sum(turn.gap for turn in turns)],
            dtype=torch.double)).tolist()
        self.totals["environment_steps"] += int(steps)
        self.totals["generated_tokens"] += int(sampled)
        metrics["sampling_gap"] = gap / sampled if sampled else math.nan  # nan in fp32: no cell
        self.rows.append({"iteration": iteration + 1})
        self.write({f"train_{name}": value for name, value in train.items()} | metrics)
        speed = self.totals["generated_tokens"] / (time.perf_counter() - self.clock)
        self.progress.set_postfix_str(
            f"success {train.get('success', math.nan):.2f}, return "
            f"{train.get('return', math.nan):.2f}, {speed:.0f} tokens/s", refresh=False)

        wanted = self.writes and self.args.print_samples and batch is not None
        if wanted and len(batch["tokens"]) and (not self.shown or self.is_last(iteration + 1)):
            self.write_page(iteration + 1, batch)

    def write_page(self, iteration: int, batch: dict[str, torch.Tensor]):
        """Add eight rows of a batch to samples.html, those with an advantage first."""
        names = {"tokens", "turn_id", "lengths", "advantages", "old_logprobs"} & batch.keys()
        silent = batch["advantages"].reshape(len(batch["tokens"]), -1).abs().amax(1) == 0
        rows = select_rows({name: batch[name] for name in names},
                           silent.long().argsort(stable=True)[:8])
        mask, advantages = rows["turn_id"] >= 0, rows["advantages"]
        logprobs, entropy = batch_logprobs(self.policy, rows, self.args)
        values = {"advantage": advantages if advantages.dim() == 2 else advantages[:, None] * mask}
        if "old_logprobs" in rows:
            values["ratio"] = torch.where(mask, logprobs - rows["old_logprobs"], 0.0)  # its log
        body = colored_rows(self.policy.tokenizer, rows, values | {"entropy": entropy})
        page = self.folder / "samples.html"
        with self.writing("samples.html"), open(page, "a", encoding="utf-8") as file:
            head = "" if file.tell() else PAGE.format(name=self.folder.name)
            file.write(f"{head}<h3>iteration {iteration}</h3>\n{body}\n")
        self.shown = True

    def evaluated(self, metrics: dict[str, float], episodes: list[Episode]):
        """Add an evaluation to the row of the iteration."""
        self.write({f"eval_{name}": value for name, value in metrics.items()})
        iteration = int(self.rows[-1]["iteration"])
        self.write_samples(iteration, episodes[:8])
        if rank() == 0:
            ends = iteration == self.start or self.is_last(iteration)
            shown = self.args.print_samples * ends
            for episode in episodes[:shown]:
                tqdm.tqdm.write(f"\nafter {iteration} iterations, held-out seed {episode.seed}:\n"
                                f"{episode.transcript()}\n")
            tqdm.tqdm.write(f"iteration {iteration:4d}  success {metrics['success']:.3f}  return "
                            f"{metrics['return']:+.3f}  {self.rows[-1]['seconds']:.0f} s")
            full, unreadable = (metrics.get(x, 0.0) for x in ("overflowed", "invalid_actions"))
            if iteration == 0 and full > 0.5:
                print(f"warning: {full:.0%} of the episodes end because the context is full",
                      file=sys.stderr)
            if iteration == 0 and unreadable > 0.5:
                steps = 2 * (self.args.warm_start_steps or 10)
                print(f"warning: {unreadable:.0%} of the answers are unreadable, so little can be "
                      f"learned (--warm-start-steps {steps} first imitates a scripted player)",
                      file=sys.stderr)

    def write(self, metrics: dict[str, float]):
        """Add to the current row (no means of nothing); metrics.csv is replaced as a whole."""
        metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
        self.rows[-1] |= metrics | self.totals | {
            "seconds": round(time.perf_counter() - self.clock, 2)}
        if self.writes:
            with self.writing("metrics.csv") as new, open(new, "w", newline="") as file:
                table = csv.DictWriter(file, list(dict.fromkeys(k for r in self.rows for k in r)))
                table.writeheader()
                table.writerows(self.rows)
        with self.tracking():
            for name, value in metrics.items() if self.writer else ():
                self.writer.add_scalar(name, value, int(self.rows[-1]["iteration"]))

    def write_samples(self, iteration: int | str, episodes: list[Episode]):
        if not self.writes and iteration != "fault":
            return
        with self.writing("samples.jsonl"), open(self.folder / "samples.jsonl", "a") as file:
            for e in episodes:
                record = {"iteration": iteration, "seed": e.seed, "success": e.success,
                          "return": e.total_reward, "last_observation": e.observation,
                          "turns": [[t.observation, t.action, t.reward] for t in e.turns]}
                file.write(json.dumps(record) + "\n")

    def finish(self) -> dict[str, float]:
        """Write summary.json and curve.png; the summary."""
        evals = [row for row in self.rows if "eval_success" in row]
        if self.args.eval_only:  # earlier ones may have had another temperature
            evals = evals[-1:]
        summary = {f"{name}_{when}": float(row[f"eval_{name}"]) for name in ("success", "return")
                   for when, row in (("start", evals[0]), ("end", evals[-1]))}
        summary |= {"iterations": int(evals[-1]["iteration"]), **self.totals,
                    "seconds": round(time.perf_counter() - self.clock, 1)}
        if self.writes:
            with self.writing("summary.json") as new:
                new.write_text(json.dumps(summary, indent=1))
            self.plot(evals)
        if rank() == 0:
            print("success {success_start:.3f} -> {success_end:.3f}, return {return_start:.3f} -> "
                  "{return_end:.3f}, {seconds:.0f} s: ".format(**summary) + str(self.folder))
        return summary

    def plot(self, evals: list[dict[str, Any]]):
        from matplotlib.figure import Figure
        figure = Figure((9, 3.2), layout="constrained")
        for axis, name in zip(figure.subplots(1, 2), ("success", "return"), strict=True):
            for rows, kind, style in ((self.rows[1:], "train", "C7-"), (evals, "eval", "C0o-")):
                axis.plot([int(row["iteration"]) for row in rows],
                          [float(row.get(f"{kind}_{name}", "nan")) for row in rows],
                          style, label=kind)
            axis.set(xlabel="iteration", ylabel=name)
        axis.legend()
        figure.suptitle(self.folder.name, fontsize=9)
        with self.writing("curve.png") as new:
            figure.savefig(new, format="png", dpi=120)
