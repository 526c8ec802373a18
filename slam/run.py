"""A training run: its folder, its clock, its log and its checkpoints, for train.py, dpo.py and slam.train_vocoder.

The folder holds config.json, log.jsonl, results.json and checkpoint/ (weights, slam.json, trainer.pt).
"""
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch

from config import save_config
from slam.checkpoint import git_commit, merge_results, recover
from slam.device import dist, over_ranks
from slam.units import Fingerprint, empty_folder, write_atomic

# Settings that a resumed run may change.
MAY_CHANGE = {"out", "steps", "tokens", "time_budget_hours", "minutes", "lr", "min_lr", "grad_clip",
              "log_every", "eval_every", "save_every", "loggers", "micro_batch", "activation_checkpointing", "compile",
              "n_samples", "audio", "resume", "overwrite"}


def run_problems(cfg) -> list[str]:
    """What is wrong with the settings that train.py and dpo.py share."""
    found = []
    length = {k: v for k in ("steps", "tokens", "time_budget_hours") if (v := getattr(cfg, k)) is not None}
    if len(length) != 1:
        found.append(f"set exactly one of steps, tokens, time_budget_hours, and the others to none; set are {length}")
    if min(cfg.steps or 0, cfg.tokens or 0, cfg.time_budget_hours or 0, cfg.seed, cfg.weight_decay, cfg.eps) < 0:
        found.append("steps, tokens, time_budget_hours, seed, weight_decay and eps must not be negative")
    if min(cfg.lr, cfg.grad_clip, cfg.log_every, cfg.eval_every, cfg.save_every) <= 0:
        found.append("lr, grad_clip (inf: no clipping), log_every, eval_every and save_every must be positive")
    if not all(0 <= x < 1 for x in (cfg.warmup, cfg.beta1, cfg.beta2)):
        found.append("warmup, a share of the run, beta1 and beta2 must be at least 0 and below 1")
    if cfg.min_lr < 0 or cfg.schedule not in ("inverse_sqrt", "constant") and 0 < cfg.lr < cfg.min_lr:
        found.append(f"min_lr {cfg.min_lr:g}: between 0 and lr, {cfg.lr:g}")
    if cfg.schedule == "inverse_sqrt" and cfg.warmup == 0:
        found.append("warmup 0: inverse_sqrt falls as sqrt(warmup / progress) and needs one above 0 (SlamKit's DPO: "
                     "100 / 813); or take another schedule")
    if cfg.resume and cfg.overwrite:
        found.append("resume and overwrite exclude each other")
    return found + [f"loggers: {name} is not installed; pip install {name}" for name in cfg.loggers
                    if importlib.util.find_spec(name) is None]


class Run:
    """`step` counts optimiser steps, `tokens` the targets seen, `seconds` the training time; all survive a resume.

    resumed: whether it goes on from a checkpoint. stopping: the exit code that a signal asks for, else 0. reads: paths
    that the run needs. SystemExit if one of these is in the run's folder, if the folder is not a run's, if it holds a
    run and neither resume nor overwrite is set, or if settings have changed.
    """

    def __init__(self, cfg, stage: str, rank: int = 0, folder: str = "checkpoint", reads: Iterable[str] = ()):
        self.cfg, self.stage, self.out, self.rank = cfg, stage, Path(cfg.out), rank
        self.checkpoint, self.log_file = self.out / folder, self.out / "log.jsonl"
        self.step, self.tokens, self.seconds, self.resumed, self.finished = 0, 0, 0.0, False, None
        self.inputs: dict[str, str] = {}
        self.asked_to_stop = self.stopping = 0  # a signal came to this process; all processes know of it
        for path in reads:
            if path and Path(path).resolve().is_relative_to(self.out.resolve()):  # --overwrite would remove it
                raise SystemExit(f"{path} lies in the run's own folder, {self.out}; choose another --out")
        if not rank:
            recover(self.checkpoint)
        over_ranks([0.0])  # a barrier: the other ranks read the folder after it is mended
        saved = (self.checkpoint / "slam.json").exists()
        if not (saved or self.log_file.exists()) and (self.out.is_file() or any(self.out.glob("*"))):
            raise SystemExit(f"{self.out} exists and is not a run's folder; choose another --out")
        if not cfg.overwrite and (saved or any(record["step"] for record in self._records())):
            if not cfg.resume:
                raise SystemExit(f"{self.out} holds a run already; --resume goes on with it, --overwrite starts anew")
            if saved:
                self._load()
            else:
                print(f"{self.out}: nothing was saved yet, so it starts anew")

    def _load(self) -> None:
        slam = json.loads((self.checkpoint / "slam.json").read_text())
        now, default = (json.loads(json.dumps(asdict(x))) for x in (self.cfg, type(self.cfg)(out=self.cfg.out)))
        changed = [f"{k} was {v!r}, now {now.get(k)!r}" for k, v in (default | slam["config"]).items()
                   if k not in MAY_CHANGE and (k in now or v) and now.get(k) != v]  # an empty setting may be gone
        if changed:
            raise SystemExit(f"{self.out}: cannot resume with other settings: {'; '.join(changed)}")
        self.step, self.tokens, self.seconds, self.resumed = slam["step"], slam["tokens"], slam["seconds"], True
        self.inputs, self.finished = slam.get("inputs", {}), self.step if slam.get("finished") else None
        print(f"resuming {self.out} at step {self.step}" if self.progress() < 1 else f"{self.out} is finished already")

    def restore(self, optimizer) -> list[torch.Tensor]:
        """Load the optimiser's state of the last `save`; returns that save's `pending`. SystemExit if it is missing."""
        path = self.checkpoint / "trainer.pt"
        if not path.exists():
            raise SystemExit(f"{path} is missing: this run can't go on; its model can be evaluated, or used as --base")
        trainer = torch.load(path, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(trainer["optimizer"])
        return trainer["pending"]

    def starts_from(self, **digests: str) -> None:
        """Record digests of the data. SystemExit if a resumed run had others; checkpoints of older code have none."""
        if changed := [k for k, v in digests.items() if self.inputs.get(k, v) != v]:
            raise SystemExit(f"{self.out}: cannot resume, as this data has changed: {', '.join(changed)}; restore it, "
                             f"or choose another --out")
        self.inputs = digests

    def open(self) -> None:
        """Begin to write to the folder, to count time, and to save at a signal. Call it when everything is loaded."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)
        over_ranks([0.0])  # every process has looked at the folder
        self.started, self.loggers = time.perf_counter(), []
        if self.rank:
            return
        with self.writing():
            if self.cfg.overwrite:
                empty_folder(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            # Records after the checkpoint are dropped: their steps will run again. The log is first: it marks a run.
            kept = [record for record in self._records() if self.resumed and record["step"] <= self.step]
            write_atomic(self.log_file, "".join(json.dumps(record) + "\n" for record in kept))
            save_config(replace(self.cfg, resume=False, overwrite=False), self.out / "config.json")
        self.loggers = [make_logger(name, self) for name in getattr(self.cfg, "loggers", ())]

    @contextmanager
    def writing(self):
        """Around writes to the disk, which may be full: SystemExit that says what to do."""
        try:
            yield
        except OSError as e:
            raise SystemExit(f"step {self.step}: {e}: stopped. {self._kept()}; make room, then --resume") from None

    def _kept(self) -> str:
        return f"{self.checkpoint} is as it was last saved" if self.checkpoint.exists() else "Nothing was saved yet"

    def _stop(self, signum, frame) -> None:
        if self.asked_to_stop and signum == signal.SIGINT:  # ctrl-C again: stop now. torchrun sends SIGTERM, too
            raise SystemExit(128 + signum)
        self.asked_to_stop = 128 + signum
        if signum == signal.SIGHUP:  # the terminal is gone, and printing to it would raise
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print(f"{signal.Signals(signum).name}: saving after this step", file=sys.stderr)

    def tick(self) -> None:
        """Count the time since the last call as training time, and notice signals; the same on all ranks."""
        seconds = self.seconds + time.perf_counter() - self.started
        self.seconds, stopping = over_ranks([seconds, self.asked_to_stop], dist.ReduceOp.MAX)
        self.started, self.stopping = time.perf_counter(), int(stopping)

    @contextmanager
    def pause(self):
        """The time inside is not training time: compiling, evaluating, saving."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still in the GPU's queue is training
        counted = time.perf_counter() - self.started  # added at the next tick: progress stays the same within a step
        yield
        over_ranks([0.0])  # else the wait for the first process, which saves and listens, would count as training
        self.started = time.perf_counter() - counted

    def progress(self) -> float:
        """Share of the run that is done, by steps, tokens or hours, whichever is set."""
        cfg = self.cfg
        ways = (self.step, cfg.steps), (self.tokens, cfg.tokens), (self.seconds / 3600, cfg.time_budget_hours)
        done, whole = next((d, w) for d, w in ways if w is not None)
        return done / whole if whole else 1.0

    def clock(self) -> str:
        """`160.25M tok | 37.1 % in 3:12:36, eta 5:26:32`"""
        done = min(1.0, max(self.progress(), 1e-6))
        seconds, left = (timedelta(seconds=round(x)) for x in (self.seconds, self.seconds / done - self.seconds))
        return f"{self.tokens / 1e6:,.2f}M tok | {100 * done:.1f} % in {seconds}, eta {left}"

    def log(self, line: str, **record) -> None:
        """Print a line for people, and append the record to log.jsonl and to the other loggers."""
        if self.rank:
            return
        with suppress(OSError):  # the terminal may be gone; the log has it too
            print(f"step {self.step:05d} | {line}", flush=True)
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}  # loggers have no place for texts
        for logger in self.loggers:
            logger(numbers, self.step)
        record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)} | record
        with self.writing(), open(self.log_file, "a") as f:
            f.write(json.dumps(record) + "\n")

    def results(self, results: dict) -> None:
        """Merge {metric: {value, n, step}} into the run's results.json."""
        if not self.rank:
            with self.writing():
                merge_results(self.out / "results.json", results)

    def _records(self) -> list[dict]:
        """The records of log.jsonl; a kill may have cut the last one, which has no newline then."""
        return [json.loads(x) for x in self.log_file.read_text().split("\n")[:-1]] if self.log_file.exists() else []

    def evaluated(self, metric: str = "val_loss") -> bool:
        """Whether a resumed run's log has this step's metric. (A new run's is empty, or still that of an older run.)"""
        return self.resumed and any(record["step"] == self.step and metric in record for record in self._records())

    def gather(self, measured: list[torch.Tensor], norm: torch.Tensor) -> list[torch.Tensor]:
        """What was measured in each step since the last log line, () or (k,), loss first: summed over ranks, on CPU.

        Waits for the GPU. SystemExit naming the first step whose loss is not finite, or this one if its gradient norm
        is not; the last checkpoint stays as it is.
        """
        x = torch.stack(measured).cpu() if measured else torch.zeros(0)
        x = torch.tensor(over_ranks(x.flatten().tolist())).view(x.shape)
        values = [(self.step - len(x) + 1 + i, "loss", step.flatten()[0].item()) for i, step in enumerate(x)]
        for step, name, value in [*values, (self.step, "gradient norm", norm.item())]:
            if not math.isfinite(value):
                raise SystemExit(f"step {step}: {name} {value}: stopped. {self._kept()}; lower lr (now "
                                 f"{self.cfg.lr:g}) or look at the data before --resume")
        return [*x]

    def save(self, lm, optimizer, fingerprint: Fingerprint, pending: list) -> None:
        """Swap in a new checkpoint folder: weights, slam.json (where they come from), trainer.pt (how to go on).

        lm: has save_pretrained(folder, slam, trainer). pending: what was measured since the last log line; the next one
        averages over it, resumed or not.
        """
        if self.rank:
            return
        slam = {"stage": self.stage, "fingerprint": fingerprint.to_dict(), "step": self.step, "tokens": self.tokens,
                "seconds": self.seconds, "finished": self.progress() >= 1, "config": asdict(self.cfg),
                "inputs": self.inputs, "git": git_commit(), "torch": torch.__version__}
        trainer = {"optimizer": optimizer.state_dict(), "pending": [torch.as_tensor(x).cpu() for x in pending]}
        with self.writing():
            lm.save_pretrained(self.checkpoint, slam, trainer)

    def finish(self, *what) -> None:
        """The last `save`, unless the run was finished before. If a signal asked to stop, exit with its code."""
        if self.step != self.finished:
            self.save(*what)
        self.exit_if_stopping()

    def exit_if_stopping(self) -> None:
        if self.stopping:
            over_ranks([0.0])  # torchrun ends all processes once one has ended: the first must have saved
            if not self.rank:
                print(f"stopped at step {self.step}; --resume goes on", file=sys.stderr)
            raise SystemExit(self.stopping)


# ---------------------------------------------------------------- other loggers
def make_logger(name: str, run: Run):
    """A function of (record, step) that hands a log record on to TensorBoard or Weights & Biases."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run.out / "tensorboard", purge_step=run.step + 1, flush_secs=10)
        return lambda record, step: [writer.add_scalar(k, v, step) for k, v in record.items()]
    import wandb
    id_file = run.out / "wandb_id"
    if not (run.step and id_file.exists()):
        write_atomic(id_file, wandb.util.generate_id())
    wandb.init(project="slam", name=str(run.out), id=id_file.read_text(), resume="allow", dir=run.out,
               config=asdict(run.cfg))
    return lambda record, step: wandb.log(record, step=step)

