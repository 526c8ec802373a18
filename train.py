"""Pre-train a unit LM: a text LM's body (TWIST), packed rows of units, one GPU, one day.

In:  unit files (prepare_units.py, synth_stories.py) and the name of a text LM.
Out: a run folder:  checkpoint/ (a Hugging Face folder + slam.json + trainer.pt) · log.jsonl · results.json · loss.png

    python train.py config/slam.py                   # the paper's recipe: a day on a 24 GB GPU, 9 GB of disk
    python train.py config/slam.py config/gpu_8gb.py # the same run on a smaller card
    python train.py config/demo_train.py             # minutes on two CPU cores
    torchrun --nproc_per_node=2 train.py config/slam_scaled.py

SIGTERM and ctrl-C save and exit after the step; `--resume` goes on bit by bit as if nothing had happened (on a CPU).
torchrun gives its processes 30 s to do so; killed instead, a run has its last saved checkpoint.
"""
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import load_config, save_config
from model import IGNORE, SLAMKIT, ModelConfig, UnitLM, fetch, recover
from optim import make_optimizer, schedule, update
from units import PAD, Fingerprint, UnitReader, published_fingerprint, require_same, vocab_size


@dataclass
class Config:
    """Pre-train a unit LM. The defaults are the paper's (table 4)."""
    out: str = "out/slam"  # run folder
    train: tuple[str, ...] = ()  # unit files or folders of them, mixed by size,
    weights: tuple[float, ...] = ()  # or by these shares, one for each of `train`
    val: tuple[str, ...] = ()  # the same, for the validation loss
    base: str = "Qwen/Qwen2.5-0.5B"  # text LM that gives shape and weights: hub id, folder or embedded:NAME
    init: Literal["first_rows", "random", "none"] = "first_rows"  # unit embeddings: the text embedding's first rows,
    # new ones N(0, 0.02), or `none`: keep only the shape and train from scratch
    n_layers: int | None = None  # keep only the first so many layers of the base
    shape: dict = field(default_factory=dict)  # fields of ModelConfig; builds a new model from scratch, without a base
    rope_theta: float = 10000.0  # base of the rotary position embedding
    context: int = 1024  # tokens in a row
    micro_batch: int = 8  # rows in a forward pass, as many as fit into memory; the result does not depend on it
    batch_tokens: int = 131_072  # tokens in an optimiser step, on all GPUs together: so many rows are accumulated
    steps: int | None = None  # length of the run, by whichever of these is set: optimiser steps,
    tokens: float | None = None  # target tokens,
    time_budget_hours: float | None = None  # or hours of training (compiling, saving and evaluating not counted)
    optimizer: Literal["adamw", "ademamix", "adalomo", "muon"] = "adamw"  # optim.py says what they are
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 5e-5  # floor of the cosine and wsd schedules
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "constant"] = "cosine"  # of the learning rate
    warmup: float = 0.01  # share of the run in which the learning rate rises linearly
    beta1: float = 0.9  # AdamW, AdEMAMix
    beta2: float = 0.999  # AdamW, AdEMAMix
    eps: float = 1e-8  # AdamW, AdEMAMix
    weight_decay: float = 0.0  # on matrices only
    beta3: float = 0.9999  # AdEMAMix, the slow mean
    alpha: float = 5.0  # AdEMAMix, the slow mean's part in the step
    alpha_warmup: int = 0  # AdEMAMix, steps in which beta3 and alpha rise; the paper: those of the whole run
    muon_momentum: float = 0.95  # Muon
    clip: float = 0.5  # largest gradient norm
    dtype: Literal["auto", "bfloat16", "float32", "pure_bfloat16"] = "auto"  # of the computation; weights and optimiser
    # are fp32, but for pure_bfloat16. auto: bfloat16 where the hardware multiplies it fast
    checkpointing: bool = False  # keep less for the backward pass and compute it again: less memory, a third more work
    compile: bool | None = None  # torch.compile; none: on a GPU. A CPU needs a C++ compiler and half a minute for it
    loggers: tuple[str, ...] = ()  # beside log.jsonl: tensorboard, wandb; each must be installed
    log_every: int = 10  # steps
    eval_every: int = 1000  # steps
    save_every: int = 500  # steps
    seed: int = 0  # of the initialisation and the data order
    resume: bool = False  # go on with the run in `out`, if there is one
    overwrite: bool = False  # remove the run in `out` and start anew

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = run_problems(self)
        if not (self.train and self.val):
            found.append("train and val: name at least one unit file or folder each")
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) <= 0):
            found.append(f"weights: {len(self.weights)} for {len(self.train)} of train; give each a positive one")
        if self.micro_batch < 1 or self.context < 1:
            found.append("micro_batch and context must be at least 1")
        elif self.batch_tokens < 1 or self.batch_tokens % (self.context * self.micro_batch):
            found.append(f"batch_tokens {self.batch_tokens} must be a multiple of context x micro_batch = "
                         f"{self.context * self.micro_batch}")
        for name in self.loggers:
            if name not in ("tensorboard", "wandb"):
                found.append(f"loggers: {name!r} is none; known are tensorboard and wandb")
            elif importlib.util.find_spec(name) is None:
                found.append(f"loggers: {name} is not installed; pip install {name}")
        return found


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


# ---------------------------------------------------------------- data: (seed, step, rank) -> rows

def cut(lengths: np.ndarray, context: int) -> np.ndarray:
    """Utterances of so many tokens as pieces (n, 3): utterance, first input, number of inputs, at most `context`.

    An utterance of n tokens has n - 1 inputs, and as targets each token but BOS once: cut([5], 3) -> [[0, 0, 3],
    [0, 3, 1]]
    """
    inputs = np.asarray(lengths) - 1
    n_pieces = -(-inputs // context)
    utterance = np.repeat(np.arange(len(inputs)), n_pieces)
    start = (np.arange(len(utterance)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * context
    return np.stack([utterance, start, np.minimum(context, inputs[utterance] - start)], 1)


class Packed:
    """Pieces in rows of at most `context` inputs, nearly full: best-fit decreasing in groups drawn at random.

    (Ding et al. 2024, "Fewer truncations improve language modeling".) rng None: groups in order, for evaluation.
    `packed[r]` -> the pieces (n, 3) of row r.
    """

    def __init__(self, pieces: np.ndarray, context: int, rng: np.random.Generator | None, group: int = 4096):
        order = rng.permutation(len(pieces)) if rng else np.arange(len(pieces))
        row_of, n = np.empty(len(pieces), dtype=np.int64), 0
        for at in range(0, len(order), group):
            members = order[at:at + group]
            members = members[np.argsort(-pieces[members, 2], kind="stable")]
            rows_with, rooms = [[] for _ in range(context + 1)], 0  # rows by free room; bit f of rooms: there are some
            row = []
            for length in pieces[members, 2].tolist():
                fitting = rooms >> length
                if fitting:
                    room = length + (fitting & -fitting).bit_length() - 1  # the tightest
                    row.append(rows_with[room].pop())
                    rooms ^= (not rows_with[room]) << room
                else:
                    room, n = context, n + 1
                    row.append(n - 1)
                rows_with[room - length].append(row[-1])
                rooms |= (room > length) << room - length
            row_of[members] = row
        self.pieces = pieces[np.argsort(row_of, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n))])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.pieces[self.starts[row]:self.starts[row + 1]]


def collate(reader: UnitReader, rows: list[np.ndarray], context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of pieces -> tokens, targets, positions (B, context) int64; positions restart with every piece."""
    tokens = np.full((len(rows), context), PAD, dtype=np.int64)
    targets = np.full((len(rows), context), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), context), dtype=np.int64)  # padding: utterances of one token, attending to itself
    for b, row in enumerate(rows):
        at = 0
        for utterance, start, length in row.tolist():
            x, span = reader.tokens(utterance)[start:start + length + 1], slice(at, at + length)
            tokens[b, span], targets[b, span], positions[b, span] = x[:-1], x[1:], np.arange(length)
            at += length
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions)


class Epochs:
    """0..n-1 in a new order every epoch, for ever: `epochs[i]` is a pure function of (seed, i)."""

    def __init__(self, n: int, *seed: int):
        self.n, self.seed, self.epoch, self.order = n, seed, -1, None

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((*self.seed, epoch)).permutation(self.n)
        return int(self.order[i])


class Rows:
    """The rows of a training run: `rows.step(s)` is a pure function of (seed, s, rank); an epoch sees every token once.

    Rows are packed once, since nothing is seen across utterances, and drawn in a new order every epoch. sizes: number
    of utterances of each source. With weights each source has its own rows and epochs, and of every BLOCK rows it gets
    its share; without, they are one.
    """
    BLOCK = 1000

    def __init__(self, lengths: np.ndarray, context: int, rows_per_step: int, seed: int, rank: int = 0, world: int = 1,
                 sizes: list[int] = (), weights: tuple[float, ...] = ()):
        self.context, self.rows_per_step, self.rank, self.world = context, rows_per_step, rank, world
        pieces, ends = cut(lengths, context), np.cumsum(sizes if weights else [len(lengths)])
        source = np.searchsorted(ends, pieces[:, 0], side="right")
        self.sources = [Packed(pieces[source == k], context, np.random.default_rng((seed, k)))
                        for k in range(len(ends))]
        self.orders = [Epochs(len(rows), seed, k) for k, rows in enumerate(self.sources)]
        shares = np.cumsum(weights or [1]) / sum(weights or [1])
        self.counts = np.diff(np.round(shares * self.BLOCK).astype(int), prepend=0)  # of each source's rows in a block
        if 0 in self.counts:
            raise SystemExit(f"weights: a share below 1/{self.BLOCK} would give no rows at all")
        self.seed, self.block, self.turns = seed, -1, np.zeros((self.BLOCK, 2), dtype=np.int64)

    def row(self, index: int) -> np.ndarray:
        """Row `index` of the endless sequence: its pieces (n, 3)."""
        block, at = divmod(index, self.BLOCK)
        if block != self.block:  # whose turn it is at each place of the block, and which of its rows it gives
            turns = [(k, block * n + i) for k, n in enumerate(self.counts.tolist()) for i in range(n)]
            order = np.argsort(np.random.default_rng((self.seed, 2**31, block)).permutation(
                np.repeat(np.arange(len(self.counts)), self.counts)), kind="stable")  # a source's rows stay in order
            self.block, self.turns[order] = block, turns
        k, i = self.turns[at].tolist()
        return self.sources[k][self.orders[k][i]]

    def step(self, step: int) -> tuple[list[np.ndarray], int]:
        """This rank's rows of an optimiser step, and the number of targets of all ranks' rows."""
        first = step * self.rows_per_step
        rows = [self.row(i) for i in range(first, first + self.rows_per_step)]
        return rows[self.rank::self.world], sum(int(row[:, 2].sum()) for row in rows)

    def fill(self) -> float:
        """Share of the places in the rows that hold a token."""
        rows = sum(map(len, self.sources))
        return sum(int(x.pieces[:, 2].sum()) for x in self.sources) / (rows * self.context)


class Loader:
    """The micro-batches of a step, made in a thread while the step before is being computed."""

    def __init__(self, reader: UnitReader, rows: Rows, micro_batch: int, device: torch.device):
        self.reader, self.rows, self.micro_batch, self.device = reader, rows, micro_batch, device
        self.thread, self.next = ThreadPoolExecutor(1), {}

    def _make(self, step: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
        self.reader.check()
        rows, n_targets = self.rows.step(step)
        return [batch(self.reader, rows[at:at + self.micro_batch], self.rows.context, self.device)
                for at in range(0, len(rows), self.micro_batch)], n_targets

    def step(self, step: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
        """[(tokens, targets, positions)], each (micro_batch, context), in pinned memory; targets on all ranks."""
        made = self.next.pop(step, None) or self.thread.submit(self._make, step)
        self.next = {step + 1: self.thread.submit(self._make, step + 1)}
        return made.result()


def batch(reader: UnitReader, rows: list[np.ndarray], context: int, device: torch.device) -> tuple[Tensor, ...]:
    """`collate`, in memory from which a copy to the GPU needs no waiting."""
    tensors = collate(reader, rows, context)
    return tuple(x.pin_memory() for x in tensors) if device.type == "cuda" else tensors


# ---------------------------------------------------------------- hardware

# Dense bf16 peaks in TFLOP/s, from NVIDIA's data sheets.
PEAK_TFLOPS = {"A5000": 111, "A6000": 155, "RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100": 989, "H200": 989}


def pick_device() -> torch.device:
    """The GPU if there is one; under torchrun, this process's."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else \
        torch.device("cpu")


def join_ranks() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless started by torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # gloo for the few numbers that the CPU needs, so that they cost no wait for the GPU
        if torch.cuda.is_available():
            torch.cuda.set_device(pick_device())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(hours=1))
    return int(os.environ.get("RANK", 0)), world


def over_ranks(values: list[float], op=dist.ReduceOp.SUM) -> list[float]:
    """The sum (or other reduction) of each value over all processes."""
    if not dist.is_initialized():
        return values
    x = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(x, op)
    return x.tolist()


def fast_bfloat16(cpu: dict) -> bool:
    """Whether a CPU with these `torch.cpu.get_capabilities()` multiplies bfloat16 matrices faster than fp32 ones.

    On x86 with AMX, or with AMD's AVX-512 BF16. Intel's AVX-512 BF16 without AMX, which virtual machines may hide, is
    half as fast as fp32, and torch calls every CPU with AVX-512 able, if need be by emulation.
    """
    if cpu.get("architecture") == "x86_64":
        return cpu["amx_bf16"] or cpu["avx512_bf16"] and "Intel" not in cpu["cpu_name"]
    onednn = torch.backends.mkldnn.is_available()  # not in every build for Macs
    return onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: torch.device, dtype: str):
    """Context of mixed precision: bfloat16 matrix products over fp32 weights, or nothing for the other dtypes."""
    if dtype == "auto":
        fast = device.type == "cuda" or fast_bfloat16(torch.cpu.get_capabilities())
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def flops_per_token(lm: UnitLM, context: int) -> float:
    """6 N + 12 L d T (Chowdhery et al. 2022, appendix B): forward and backward, with attention."""
    return 6 * lm.n_params() + 12 * lm.config.num_hidden_layers * lm.config.hidden_size * context


def peak_flops(device: torch.device) -> float | None:
    """Peak of a known GPU, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((t * 1e12 for known, t in PEAK_TFLOPS.items() if known in name), None)


# ---------------------------------------------------------------- a run: its folder, its clock, its log

class Run:
    """What train.py and dpo.py share: the run's folder, its progress, log, checkpoints and signals.

    `step` counts optimiser steps, `tokens` the targets seen, `seconds` the training time; all survive a resume.
    """
    MAY_CHANGE = {"out", "steps", "tokens", "time_budget_hours", "lr", "min_lr", "clip", "log_every", "eval_every",
                  "save_every", "loggers", "micro_batch", "checkpointing", "compile", "n_samples", "resume",
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

    def save(self, lm: UnitLM, optimizer, fingerprint: Fingerprint, pending: list) -> None:
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


def checkpoint_fingerprint(name: str) -> Fingerprint:
    """Fingerprint of the units that a checkpoint speaks. SystemExit if it is not a whole unit LM's.

    SlamKit's checkpoints do not name their tokeniser: they are taken to speak the published one's units.
    """
    folder = fetch(name)
    if (folder / "slam.json").is_file():
        return Fingerprint.of(json.loads((folder / "slam.json").read_text())["fingerprint"])
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if config.get("model_type") == SLAMKIT:
        return published_fingerprint(config["vocab_size"])
    raise SystemExit(f"{folder / 'slam.json'}: missing; {name} is no whole checkpoint of train.py, dpo.py or SlamKit")


def newest_checkpoint(root: str = "out", stage: str = "") -> str:
    """The run folder below `root` with the newest finished checkpoint, of that stage. SystemExit if there is none."""
    found = []
    for path in Path(root).rglob("checkpoint/slam.json"):
        slam = json.loads(path.read_text())
        if slam.get("finished") and stage in ("", slam.get("stage")):
            found.append((path.stat().st_mtime, str(path.parent.parent)))
    if not found:
        raise SystemExit(f"no finished {stage + ' ' if stage else ''}checkpoint under {root}/; train one (bash "
                         f"runs/demo.sh) or name one with --checkpoint")
    return max(found)[1]


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


# ---------------------------------------------------------------- the loop

@torch.inference_mode()
def validation_loss(lm: UnitLM, reader: UnitReader, context: int, micro_batch: int, dtype: str, rank: int = 0,
                    world: int = 1) -> tuple[float, int]:
    """Mean cross-entropy in nats per target over a whole corpus, and the number of targets; shared out over ranks."""
    reader.check()
    packed, total, n = Packed(cut(reader.lengths, context), context, None), 0.0, 0
    rows = list(packed)[rank::world]
    for at in range(0, len(rows), micro_batch):
        tokens, targets, positions = batch(reader, rows[at:at + micro_batch], context, lm.device)
        n += int((targets != IGNORE).sum())
        with autocast(lm.device, dtype):
            total += lm(*(x.to(lm.device, non_blocking=True) for x in (tokens, targets, positions)),
                        reduction="sum")[1].item()
    total, n = over_ranks([total, n])
    return total / n, int(n)


def accumulate(forward, micro: list[tuple], n_targets: int, device: torch.device, dtype: str) -> Tensor:
    """Forward and backward passes of a step, without a host sync; this rank's part of the loss, ().

    The loss is the mean over all targets of all ranks' micro-batches, whatever these are. `forward`: the model,
    compiled or not.
    """
    total = torch.zeros((), device=device)
    for tensors in micro:
        tokens, targets, positions = (x.to(device, non_blocking=True) for x in tensors)
        with autocast(device, dtype):
            loss = forward(tokens, targets, positions, reduction="sum")[1] / n_targets
        loss.backward()
        total += loss.detach()
    return total


def sum_gradients(lm: UnitLM) -> None:
    """Add up the ranks' gradients. The loss is divided by all ranks' targets already.

    Once a step, after all micro-batches: of a step's seconds the exchange is a few hundredths, and without
    DistributedDataParallel's hooks the compiled model stays one graph.
    """
    for p in lm.parameters():
        dist.all_reduce(p.grad)


def compiled(lm: UnitLM, wanted: bool | None) -> Callable:
    """The model's forward, compiled if `wanted`, or, if that is None, on a GPU."""
    return torch.compile(lm) if (lm.device.type == "cuda" if wanted is None else wanted) else lm


def n_graphs() -> int:
    """Graphs that torch.compile has made so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported before something is compiled, which takes seconds
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def build(cfg: Config, n_units: int) -> UnitLM:
    """The model to start from: TWIST from `base`, or from scratch by `shape`."""
    if cfg.shape:
        return UnitLM(ModelConfig(**{"vocab_size": vocab_size(n_units), "rope_theta": cfg.rope_theta,
                                     "max_position_embeddings": cfg.context} | cfg.shape))
    try:
        return UnitLM.twist(cfg.base, vocab_size(n_units), cfg.init, cfg.n_layers, cfg.rope_theta, cfg.context)
    except ValueError as e:  # a shape that the base does not have
        raise SystemExit(str(e)) from None


def main(cfg: Config) -> None:
    (rank, world), device = join_ranks(), pick_device()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    if cfg.batch_tokens % (cfg.context * cfg.micro_batch * world):
        raise SystemExit(f"batch_tokens {cfg.batch_tokens} must be a multiple of context x micro_batch x {world} GPUs "
                         f"= {cfg.context * cfg.micro_batch * world}")
    reader, val = UnitReader(*cfg.train), UnitReader(*cfg.val)
    require_same(reader.fingerprint, cfg.train[0], val.fingerprint, cfg.val[0])
    run = Run(cfg, "train", rank)
    run.starts_from(train=reader.digest(), val=val.digest())  # another corpus would give other rows
    if run.trainer and run.progress() >= 1 and run.evaluated():
        return
    rows = Rows(reader.lengths, cfg.context, cfg.batch_tokens // cfg.context, cfg.seed, rank, world,
                reader.sizes, cfg.weights)
    lm = UnitLM.from_pretrained(str(run.checkpoint)) if run.trainer else build(cfg, reader.fingerprint.n_units)
    lm.to(device, torch.bfloat16 if cfg.dtype == "pure_bfloat16" else torch.float32).train()
    lm.set_checkpointing(cfg.checkpointing)
    optimizer = make_optimizer(lm, cfg)
    losses: list[Tensor] = []  # of the steps since the last log line, this rank's part
    if run.trainer:
        optimizer.load_state_dict(run.trainer["optimizer"])
        losses = [x.to(device) / world for x in run.trainer["pending"]]
        run.trainer = None  # the memory
    run.open()
    forward = compiled(lm, cfg.compile)
    loader = Loader(reader, rows, cfg.micro_batch, device)
    flops, peak = flops_per_token(lm, cfg.context), peak_flops(device)
    if not rank:
        start = "from scratch" if cfg.shape else f"{cfg.base}, init {cfg.init}"
        print(f"{lm.n_params() / 1e6:.1f}M parameters ({start}), {len(reader):,} utterances, {reader.n_tokens:,} tokens"
              f", rows {100 * rows.fill():.1f} % full, on {world} x {device.type}")
        if cfg.time_budget_hours:
            print(f"{cfg.time_budget_hours:g} h of training; compiling, evaluating and saving are not counted")

    def evaluate() -> None:
        lm.eval()
        loss, n = validation_loss(lm, val, cfg.context, cfg.micro_batch, cfg.dtype, rank, world)
        lm.train()
        run.log(f"val loss {loss:.4f} | ppl {math.exp(loss):.2f}", val_loss=loss)
        name = "val_loss" if run.step else "val_loss_before_training"
        run.results({name: {"value": loss, "n": n, "step": run.step}})

    def measured() -> list[float]:
        """The losses since the last log line, over all ranks: the only host sync of the loop."""
        found = over_ranks(torch.stack(losses).tolist()) if losses else []
        run.check_finite(found, norm.item())
        return found

    def save(how: Callable) -> None:
        how(lm, optimizer, reader.fingerprint, list(map(torch.tensor, measured())))

    with run.pause():
        if not run.step or run.step % cfg.eval_every == 0 and run.progress() < 1 and not run.evaluated():
            evaluate()  # also what a kill after the last save prevented
        if forward is not lm and run.progress() < 1:  # compile before the clock runs
            accumulate(forward, loader.step(run.step)[0][:1], 1, device, cfg.dtype)
            optimizer.zero_grad(set_to_none=True)
    graphs = n_graphs()
    norm, since, tokens_then = torch.zeros(()), run.seconds, run.tokens
    while run.progress() < 1 and not run.stopping:
        lr = cfg.lr * schedule(cfg.schedule, run.progress(), cfg.warmup, cfg.min_lr / cfg.lr)
        micro, n = loader.step(run.step)
        losses.append(accumulate(forward, micro, n, device, cfg.dtype))
        if world > 1:
            sum_gradients(lm)
        norm = update(lm, optimizer, lr, cfg.clip)
        run.step, run.tokens = run.step + 1, run.tokens + n
        run.tick()
        run.agree()
        if run.step % cfg.log_every == 0 or run.progress() >= 1:
            found = measured()
            run.tick()
            run.agree()
            mean, rate = sum(found) / len(found), (run.tokens - tokens_then) / max(run.seconds - since, 1e-9)
            mfu = rate * flops / peak / world if peak else None
            memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
            run.log(f"loss {mean:.4f} | lr {lr:.1e} | gnorm {norm.item():.2f} | {rate:,.0f} tok/s | mfu "
                    f"{f'{100 * mfu:.1f}%' if mfu else 'n/a'} | {run.clock()}", loss=mean, lr=lr, gnorm=norm.item(),
                    tokens_per_second=rate, **{"mfu": mfu} if mfu else {}, **{"memory_gb": memory} if memory else {})
            losses, since, tokens_then = [], run.seconds, run.tokens
        if run.step % cfg.save_every == 0 and run.progress() < 1:
            with run.pause():
                save(run.save)
        if run.step % cfg.eval_every == 0 and run.progress() < 1:
            with run.pause():
                evaluate()
    with run.pause():
        save(run.finish)
        evaluate()
    if not rank:
        with run.writing():
            plot(run.out)
        memory = f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
        print(f"{run.checkpoint}: {run.step} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} min of training, "
              f"{n_graphs() - graphs} recompilations{memory}")
    if world > 1:
        over_ranks([0.0])  # nobody hangs up while another still talks
        dist.destroy_process_group()


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
