"""slam.run."""
import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from config import save_config
from slam.checkpoint import recover
from slam.device import over_ranks
from slam.units import Fingerprint


def run_problems(cfg) -> list[str]:
    """What can be wrong with the settings that every `Run` has."""
    found = []
    if sum(x is not None for x in (cfg.steps, cfg.tokens, cfg.time_budget_hours)) != 1:
        found.append("set exactly one of steps, tokens, time_budget_hours (the others to none)")
    if min(cfg.lr, cfg.log_every, cfg.eval_every, cfg.save_every) <= 0:
        found.append("lr, log_every, eval_every and save_every must be positive")
    if not 0 <= cfg.warmup < 1:
        found.append(f"warmup {cfg.warmup} is a share of the run: at least 0 and below 1")
    if cfg.schedule == "inverse_sqrt" and cfg.warmup == 0:
        found.append("warmup 0: inverse_sqrt falls as sqrt(warmup / progress) and needs one above 0 (the paper's DPO: "
                     "100 / 813); or take another schedule")
    if cfg.resume and cfg.overwrite:
        found.append("resume and overwrite exclude each other")
    return found


# ---------------------------------------------------------------- a run: its folder, its clock, its log
class Run:
    """What train.py and dpo.py share: the run's folder, its progress, log, checkpoints and signals.

    `step` counts optimiser steps, `tokens` the targets seen, `seconds` the training time; all survive a resume.
    """
    MAY_CHANGE = {"out", "steps", "tokens", "time_budget_hours", "lr", "min_lr", "grad_clip", "log_every", "eval_every",
                  "save_every", "loggers", "micro_batch", "activation_checkpointing", "compile", "n_samples", "resume",
                  "overwrite"}  # resuming

    def __init__(self, cfg, stage: str, rank: int = 0):
        self.cfg, self.stage, self.out, self.rank = cfg, stage, Path(cfg.out), rank
        self.checkpoint = self.out / "checkpoint"
        self.step, self.tokens, self.seconds, self.trainer = 0, 0, 0.0, None
        self.inputs: dict[str, str] = {}  # digests of what a stage starts from, where a path does not tell
        self.own_seconds, self.asked_to_stop, self.stopping = 0.0, 0, 0  # what `agree` makes seconds and stopping of
        if not rank:
            recover(self.checkpoint)
        over_ranks([0.0])  # nobody looks before that
        if (self.checkpoint / "slam.json").exists() and not cfg.overwrite:
            if not cfg.resume:
                raise SystemExit(f"{self.out} holds a run already; --resume goes on with it, --overwrite starts anew")
            self._load()
        if cfg.overwrite and self.out.exists() and any(self.out.iterdir()) and not (self.out / "log.jsonl").exists():
            raise SystemExit(f"{self.out} exists and is not a run's folder, so --overwrite leaves it alone; choose "
                             f"another --out")

    def open(self) -> None:
        """Begin: everything is loaded and fits, so from here on the folder is written to and signals mean `save`."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self.started = time.perf_counter()
        self.loggers: list[Callable[[dict, int], None]] = []
        over_ranks([0.0])  # everybody has looked at the folder
        if self.rank:
            return
        with self.writing():
            if self.cfg.overwrite:
                shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir(parents=True, exist_ok=True)
            save_config(self.cfg, self.out / "config.json")
            # Records after the checkpoint describe steps that will be taken again; a kill may have cut the last one.
            log = self.out / "log.jsonl"
            whole = log.read_text().split("\n")[:-1] if log.exists() and self.step else []
            part = log.with_suffix(".part")
            part.write_text("".join(x + "\n" for x in whole if json.loads(x)["step"] <= self.step))
            part.replace(log)
        self.loggers = [make_logger(name, self) for name in getattr(self.cfg, "loggers", ())]

    def _stop(self, signum, frame) -> None:
        if self.asked_to_stop:  # twice: stop now
            raise SystemExit(128 + signum)
        self.asked_to_stop = 128 + signum
        print(f"{signal.Signals(signum).name}: saving after this step", file=sys.stderr)

    def _load(self) -> None:
        slam = json.loads((self.checkpoint / "slam.json").read_text())
        now = json.loads(json.dumps(asdict(self.cfg)))
        changed = [f"{k} was {v!r}, now {now.get(k)!r}" for k, v in slam["config"].items()
                   if k not in self.MAY_CHANGE and now.get(k) != v]
        if changed:
            raise SystemExit(f"{self.out}: cannot resume with other settings: {'; '.join(changed)}")
        self.step, self.tokens, self.seconds = slam["step"], slam["tokens"], slam["seconds"]
        self.own_seconds, self.inputs = self.seconds, slam.get("inputs", {})
        self.trainer = torch.load(self.checkpoint / "trainer.pt", weights_only=True, map_location="cpu")
        if not self.rank:
            print(f"resuming {self.out} at step {self.step}" if self.progress() < 1 else
                  f"{self.out} is finished already")

    def starts_from(self, **digests: str) -> None:
        """Record digests of what the run is made from. SystemExit if it is resumed and one has changed.

        Checkpoints of older code have none, and resume unchecked.
        """
        if changed := [k for k, v in digests.items() if self.inputs.get(k, v) != v]:
            raise SystemExit(f"{self.out}: cannot resume, as these are not what they were: {', '.join(changed)}; put "
                             f"them back, or choose another --out")
        self.inputs = digests

    def tick(self) -> None:
        """Count the time since the last call as training time, on this rank's clock; `agree` makes it count."""
        now = time.perf_counter()
        self.own_seconds, self.started = self.own_seconds + now - self.started, now

    @contextmanager
    def pause(self):
        """What is done inside is not training time: compiling, evaluating, saving."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still in the GPU's queue is training
        self.tick()
        yield
        self.started = time.perf_counter()

    def agree(self) -> None:
        """Set the clock and a signal's request to stop, the same on all ranks; decisions are made by these alone."""
        self.seconds, stopping = over_ranks([self.own_seconds, self.asked_to_stop], dist.ReduceOp.MAX)
        self.own_seconds, self.stopping = self.seconds, int(stopping)

    @contextmanager
    def writing(self):
        """What is done inside may find the disk full: SystemExit with what to do."""
        try:
            yield
        except OSError as e:
            raise SystemExit(f"step {self.step}: {e}: stopped. {self._kept()}; make room, then --resume") from None

    def _kept(self) -> str:
        return f"{self.checkpoint} is as it was last saved" if self.checkpoint.exists() else "Nothing was saved yet"

    def progress(self) -> float:
        """Share of the run that is done, by steps, tokens or hours, whichever is set."""
        cfg = self.cfg
        ways = (self.step, cfg.steps), (self.tokens, cfg.tokens), (self.seconds / 3600, cfg.time_budget_hours)
        done, whole = next((d, w) for d, w in ways if w is not None)
        return done / whole if whole else 1.0

    def length(self) -> str:
        """Steps of the whole run: as set, or as it looks by now."""
        if self.cfg.steps is not None:
            return f"{self.cfg.steps:05d}"
        return f"~{round(self.step / self.progress()):05d}" if self.step else "?"

    def log(self, line: str, **record) -> None:
        """Print a line for a person and append the same record to log.jsonl for a program."""
        if self.rank:
            return
        print(f"step {self.step:05d}/{self.length()} | {line}", flush=True)
        for logger in self.loggers:
            logger(record, self.step)
        record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)} | record
        with self.writing(), open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

    def results(self, results: dict) -> None:
        """Merge into the run's results.json."""
        if not self.rank:
            with self.writing():
                merge_results(self.out / "results.json", results)

    def evaluated(self, metric: str = "val_loss") -> bool:
        """Whether results.json has the metric of this very step."""
        path = self.out / "results.json"
        return path.exists() and json.loads(path.read_text()).get(metric, {}).get("step") == self.step

    def clock(self) -> str:
        """`0.16B tok | 3.21h/24h | eta 5.4h`"""
        p, hours = max(self.progress(), 1e-9), self.seconds / 3600
        total = hours / p
        unit, scale = ("h", 1) if total >= 1 else ("min", 60)
        count = f"{self.tokens / 1e9:.2f}B" if self.tokens >= 1e8 else f"{self.tokens / 1e6:.2f}M"
        return f"{count} tok | {hours * scale:.2f}{unit}/{total * scale:.1f}{unit} | " \
               f"eta {max(0.0, total - hours) * scale:.1f}{unit}"

    def check_finite(self, losses: list[float], norm: float) -> None:
        """SystemExit on a loss or gradient that is not finite, naming the first such step; `losses`: up to this one.

        The last good checkpoint stays as it is.
        """
        bad = next((i for i, x in enumerate(losses) if not math.isfinite(x)), None)
        if bad is not None or not math.isfinite(norm):
            bad = len(losses) - 1 if bad is None else bad
            step = self.step - len(losses) + 1 + bad
            raise SystemExit(f"step {step}: loss {losses[bad]}, and gradient norm {norm} at step {self.step}: stopped. "
                             f"{self._kept()}; lower lr (now {self.cfg.lr:g}) or look at the data before --resume")

    def save(self, lm: torch.nn.Module, optimizer, fingerprint: Fingerprint, pending: list) -> None:
        """Write the checkpoint folder: model, slam.json (where it comes from), trainer.pt (how to go on).

        pending: what has been measured since the last log line; the next one averages over it, resumed or not.
        """
        if self.rank:
            return
        slam = {"stage": self.stage, "fingerprint": fingerprint.to_dict(), "step": self.step, "tokens": self.tokens,
                "seconds": self.seconds, "finished": self.progress() >= 1, "config": asdict(self.cfg),
                "inputs": self.inputs, "model": lm.hf_config(), "git": git_commit(), "torch": torch.__version__}
        trainer = {"optimizer": optimizer.state_dict(), "pending": [x.cpu() for x in pending]}
        with self.writing():
            lm.save_pretrained(self.checkpoint, slam, trainer)

    def finish(self, *what) -> None:
        """The last `save`; if a signal asked for it, the process ends here with the signal's exit code."""
        self.save(*what)
        if self.stopping:
            if not self.rank:
                print(f"stopped at step {self.step}; --resume goes on", file=sys.stderr)
            raise SystemExit(self.stopping)


def make_logger(name: str, run: Run) -> Callable[[dict, int], None]:
    """A function of (record, step) that hands a log record on to TensorBoard or Weights & Biases."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run.out / "tensorboard", purge_step=run.step + 1, flush_secs=10)
        return lambda record, step: [writer.add_scalar(k, v, step) for k, v in record.items()]
    wandb, name_file = importlib.import_module("wandb"), run.out / "wandb_id"
    if not name_file.exists():
        name_file.write_text(wandb.util.generate_id())
    wandb.init(project="slam", name=str(run.out), id=name_file.read_text(), resume="allow", dir=run.out,
               config=asdict(run.cfg))
    return lambda record, step: wandb.log(record, step=step)


def plot(out: Path) -> None:
    """Draw log.jsonl's losses over the tokens seen as loss.png, if matplotlib is installed."""
    try:
        plt = importlib.import_module("matplotlib.figure")
    except ImportError:
        return
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    later = sorted(r["loss"] for r in records if "loss" in r)
    if not later:
        return
    figure = plt.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens (millions)", ylabel="loss (nats per token)", title=str(out))
    for key, style in ("loss", {"lw": 1}), ("val_loss", {"marker": "o", "ms": 4}):
        points = [(r["tokens"] / 1e6, r[key]) for r in records if key in r]
        axes.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[key], **style)
    axes.set_ylim(later[0] - 0.1, later[int(0.95 * (len(later) - 1))] + 0.3)  # the first steps would squeeze the rest
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)


def git_commit() -> str | None:
    """Commit of the code, `+` if the working tree differs from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return commit.stdout.strip() or None


def merge_results(path: Path, results: dict) -> None:
    """Merge {metric: {...}} into a results.json; other metrics stay."""
    old = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(old | results, indent=2) + "\n")
    temporary.replace(path)
