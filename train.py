"""Pre-train a unit LM: a text LM's body (TWIST), packed rows of units, one GPU, one day.

In:  unit files (prepare_units.py, synth_stories.py) and the name of a text LM.
Out: a run folder:  checkpoint/ (a Hugging Face folder + slam.json + trainer.pt) · log.jsonl · results.json

    python train.py config/slam.py                   # the paper's recipe: a day on a 24 GB GPU, 9 GB of disk
    python train.py config/demo_train.py             # minutes on two CPU cores

SIGTERM and ctrl-C save and exit; `--resume` goes on bit by bit as if nothing had happened (on a CPU).
"""
import bisect
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Iterator, Literal

import numpy as np
import torch
from torch import Tensor

from config import load_config, save_config
from model import IGNORE, ModelConfig, UnitLM, fetch, recover
from units import PAD, Fingerprint, UnitReader, require_same, vocab_size


@dataclass
class Config:
    """Pre-train a unit LM. The defaults are the paper's (table 4)."""
    out: str = "out/slam"  # run folder
    train: tuple[str, ...] = ()  # unit files or folders of them, mixed by size
    val: tuple[str, ...] = ()  # the same, for the validation loss
    base: str = "Qwen/Qwen2.5-0.5B"  # text LM that gives shape and weights: hub id, folder or embedded:NAME
    init: Literal["first_rows", "random", "none"] = "first_rows"  # unit embeddings: the text embedding's first rows,
    # new ones N(0, 0.02), or `none`: keep only the shape and train from scratch
    n_layers: int | None = None  # keep only the first so many layers of the base
    shape: dict = field(default_factory=dict)  # fields of ModelConfig; builds a new model from scratch, without a base
    rope_theta: float = 10000.0  # base of the rotary position embedding
    context: int = 1024  # tokens in a row
    micro_batch: int = 8  # rows in a forward pass
    accumulation: int = 16  # forward passes in an optimiser step
    steps: int | None = None  # length of the run, by whichever of these is set: optimiser steps,
    tokens: float | None = None  # target tokens,
    time_budget_hours: float | None = None  # or hours of training (compiling, saving and evaluating not counted)
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 5e-5  # floor of the cosine and wsd schedules
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "constant"] = "cosine"  # of the learning rate
    warmup: float = 0.01  # share of the run in which the learning rate rises linearly
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.0  # AdamW; on matrices only
    clip: float = 0.5  # largest gradient norm
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; weights and optimiser are fp32.
    # auto: bfloat16 where the hardware multiplies it fast
    compile: bool = True  # torch.compile, on a GPU
    log_every: int = 10  # steps
    eval_every: int = 1000  # steps
    save_every: int = 500  # steps
    seed: int = 0  # of the initialisation and the data order
    resume: bool = False  # go on with the run in `out`, if there is one
    overwrite: bool = False  # remove the run in `out` and start anew

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        named = self.train and self.val
        return run_problems(self) + ([] if named else ["train and val: name at least one unit file or folder each"])


def run_problems(cfg) -> list[str]:
    """What can be wrong with the settings that every `Run` has."""
    found = []
    if sum(x is not None for x in (cfg.steps, cfg.tokens, cfg.time_budget_hours)) != 1:
        found.append("set exactly one of steps, tokens, time_budget_hours (the others to none)")
    if cfg.resume and cfg.overwrite:
        found.append("resume and overwrite exclude each other")
    return found


# ---------------------------------------------------------------- data: (seed, step, rank) -> rows

@dataclass(frozen=True)
class Piece:
    """Part of an utterance: reader's utterance number, first input token, number of input tokens."""
    utterance: int
    start: int
    length: int


def cut(lengths: np.ndarray, context: int) -> list[Piece]:
    """Utterances as pieces of at most `context` inputs, so that every token but BOS is a target exactly once.

    An utterance of n tokens has n - 1 inputs and n - 1 targets: cut([5], 3) -> [(0, 0, 3), (0, 3, 1)]
    """
    return [Piece(i, start, min(context, n - 1 - start))
            for i, n in enumerate(lengths.tolist()) for start in range(0, n - 1, context)]


def pack(pieces: list[Piece], context: int, rng: np.random.Generator | None, group: int = 4096) -> list[list[Piece]]:
    """Rows of whole pieces, nearly full: best-fit decreasing in groups drawn at random, then shuffled.

    (Ding et al. 2024, "Fewer truncations improve language modeling".) rng None: in order, for evaluation.
    """
    order = rng.permutation(len(pieces)) if rng else np.arange(len(pieces))
    rows = []
    for at in range(0, len(order), group):
        members = sorted((pieces[i] for i in order[at:at + group]), key=lambda p: -p.length)
        room, opened = [], []  # rows of this group: (free tokens, row), sorted, so that bisect finds the tightest
        for piece in members:
            j = bisect.bisect_left(room, (piece.length, -1))
            free, row = room.pop(j) if j < len(room) else (context, len(opened))
            if row == len(opened):
                opened.append([])
            opened[row].append(piece)
            bisect.insort(room, (free - piece.length, row))
        rows += opened
    if rng:
        rng.shuffle(rows)
    return rows


def collate(reader: UnitReader, rows: list[list[Piece]], context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of pieces -> tokens, targets, positions (B, context) int64; positions restart with every piece."""
    tokens = np.full((len(rows), context), PAD, dtype=np.int64)
    targets = np.full((len(rows), context), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), context), dtype=np.int64)  # padding: utterances of one token, attending to itself
    for b, row in enumerate(rows):
        at = 0
        for piece in row:
            x = reader.tokens(piece.utterance)[piece.start:piece.start + piece.length + 1]
            span = slice(at, at + piece.length)
            tokens[b, span], targets[b, span], positions[b, span] = x[:-1], x[1:], np.arange(piece.length)
            at += piece.length
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions)


class Epochs:
    """0..n-1 in a new order every epoch, for ever: `epochs[i]` is a pure function of (seed, i)."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch, self.order = n, seed, -1, None

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return int(self.order[i])


class Rows:
    """The rows of a training run: `rows.step(s)` is a pure function of (seed, s, rank); an epoch sees every token once.

    Rows are packed once, since nothing is seen across utterances, and drawn in a new order every epoch.
    """

    def __init__(self, reader: UnitReader, context: int, rows_per_step: int, seed: int, rank: int = 0, world: int = 1):
        self.rows_per_step, self.rank, self.world = rows_per_step, rank, world
        self.rows = pack(cut(reader.lengths, context), context, np.random.default_rng(seed))
        self.order = Epochs(len(self.rows), seed)

    def row(self, index: int) -> list[Piece]:
        """Row `index` of the endless sequence of epochs."""
        return self.rows[self.order[index]]

    def step(self, step: int) -> list[list[Piece]]:
        """This rank's rows of an optimiser step."""
        first = step * self.rows_per_step
        return [self.row(i) for i in range(first + self.rank, first + self.rows_per_step, self.world)]


# ---------------------------------------------------------------- schedule and optimiser

def schedule(kind: str, p: float, warmup: float, floor: float) -> float:
    """Learning rate / peak at progress p in [0, 1]; `warmup` is a share of the run, `floor` = min_lr / lr.

    cosine: floor + (1 - floor) (1 + cos pi q) / 2 with q the progress after the warm-up (transformers'
    cosine_with_min_lr). inverse_sqrt: sqrt(warmup / p). wsd: flat, then linear to the floor in the last fifth.
    """
    if p < warmup:
        return p / warmup
    if kind == "constant":
        return 1.0
    if kind == "inverse_sqrt":
        return math.sqrt(max(warmup, 1e-4) / max(p, 1e-4))
    if kind == "wsd":
        return 1 - (1 - floor) * max(0.0, min(p, 1.0) - 0.8) / 0.2
    q = min(1.0, (p - warmup) / (1 - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * q)) / 2


def make_optimizer(lm: UnitLM, cfg) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices only. `cfg` has lr, beta1, beta2, eps, weight_decay."""
    groups = [{"params": [p for p in lm.parameters() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in lm.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def update(lm: UnitLM, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> Tensor:
    """Clip the gradients, take a step at this learning rate, forget the gradients; their norm before clipping, ()."""
    norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------- hardware

# Dense bf16 peaks in TFLOP/s, from NVIDIA's data sheets.
PEAK_TFLOPS = {"A5000": 111, "A6000": 155, "RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100": 989, "H200": 989}


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, dtype: str):
    """Context of mixed precision: bfloat16 matrix products over fp32 weights, or nothing for float32."""
    if dtype == "auto":
        fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def flops_per_token(config: ModelConfig, n_params: int, context: int) -> float:
    """6 N + 12 L d T (Chowdhery et al. 2022, appendix B): forward and backward, with attention."""
    return 6 * n_params + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context


def peak_flops(device: torch.device) -> float | None:
    """Peak of a known GPU, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((t * 1e12 for known, t in PEAK_TFLOPS.items() if known in name), None)


# ---------------------------------------------------------------- a run: its folder, its clock, its log

class Run:
    """What train.py and dpo.py share: the run's folder, its progress, log, checkpoints and signals.

    `step` counts optimiser steps, `tokens` the targets seen, `seconds` the training time; all survive a resume.
    """
    MAY_CHANGE = {"steps", "tokens", "time_budget_hours", "lr", "min_lr", "clip", "log_every", "eval_every",
                  "save_every", "compile", "resume", "overwrite"}  # between a run and its resumption

    def __init__(self, cfg, stage: str):
        self.cfg, self.stage, self.out = cfg, stage, Path(cfg.out)
        self.checkpoint = self.out / "checkpoint"
        self.step, self.tokens, self.seconds, self.trainer = 0, 0, 0.0, None
        self.stopping = False
        recover(self.checkpoint)
        if (self.checkpoint / "slam.json").exists() and not cfg.overwrite:
            if not cfg.resume:
                raise SystemExit(f"{self.out} holds a run already; --resume goes on with it, --overwrite starts anew")
            self._load()
        if cfg.overwrite and self.out.exists() and any(self.out.iterdir()) and not (self.out / "log.jsonl").exists():
            raise SystemExit(f"{self.out} exists and is not a run's folder, so --overwrite leaves it alone; choose "
                             f"another --out")

    def open(self) -> None:
        """Begin: everything is loaded and fits, so from here on the folder is written to and signals mean `save`."""
        if self.cfg.overwrite:
            shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True, exist_ok=True)
        save_config(self.cfg, self.out / "config.json")
        # Records after the checkpoint describe steps that will be taken again; a kill may have cut the last one short.
        log = self.out / "log.jsonl"
        whole = log.read_text().split("\n")[:-1] if log.exists() and self.step else []
        log.write_text("".join(x + "\n" for x in whole if json.loads(x)["step"] <= self.step))
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, signum, frame) -> None:
        if self.stopping:  # asked twice: stop now
            raise SystemExit(128 + signum)
        self.stopping = 128 + signum
        print(f"{signal.Signals(signum).name}: saving after this step", file=sys.stderr)

    def _load(self) -> None:
        slam = json.loads((self.checkpoint / "slam.json").read_text())
        now = json.loads(json.dumps(asdict(self.cfg)))
        changed = [f"{k} was {v!r}, now {now.get(k)!r}" for k, v in slam["config"].items()
                   if k not in self.MAY_CHANGE and now.get(k) != v]
        if changed:
            raise SystemExit(f"{self.out}: cannot resume with other settings: {'; '.join(changed)}")
        self.step, self.tokens, self.seconds = slam["step"], slam["tokens"], slam["seconds"]
        self.trainer = torch.load(self.checkpoint / "trainer.pt", weights_only=True)
        print(f"resuming {self.out} at step {self.step}" if self.progress() < 1 else f"{self.out} is finished already")

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
        print(f"step {self.step:05d}/{self.length()} | {line}", flush=True)
        record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)} | record
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

    def clock(self) -> str:
        """`0.16B tok | 3.21h/24h | eta 5.4h`"""
        p, hours = max(self.progress(), 1e-9), self.seconds / 3600
        total = hours / p
        unit, scale = ("h", 1) if total >= 1 else ("min", 60)
        count = f"{self.tokens / 1e9:.2f}B" if self.tokens >= 1e8 else f"{self.tokens / 1e6:.2f}M"
        return f"{count} tok | {hours * scale:.2f}{unit}/{total * scale:.1f}{unit} | " \
               f"eta {max(0.0, total - hours) * scale:.1f}{unit}"

    def check_finite(self, loss: float, norm: float) -> None:
        """SystemExit on a loss or gradient that is not finite; the last good checkpoint stays as it is."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SystemExit(f"step {self.step}: loss {loss}, gradient norm {norm}: stopped. {self.checkpoint} holds "
                             f"the last good step; lower lr (now {self.cfg.lr:g}) or look at the data before --resume")

    def save(self, lm: UnitLM, optimizer: torch.optim.Optimizer, fingerprint: Fingerprint, pending: list) -> None:
        """Write the checkpoint folder: model, slam.json (where it comes from), trainer.pt (how to go on).

        pending: what has been measured since the last log line; the next one averages over it, resumed or not.
        """
        slam = {"stage": self.stage, "fingerprint": fingerprint.to_dict(), "step": self.step, "tokens": self.tokens,
                "seconds": self.seconds, "finished": self.progress() >= 1, "config": asdict(self.cfg),
                "model": asdict(lm.config), "git": git_commit(), "torch": torch.__version__}
        trainer = {"optimizer": optimizer.state_dict(), "pending": [x.cpu() for x in pending]}
        lm.save_pretrained(self.checkpoint, slam, trainer)

    def finish(self, *what) -> None:
        """The last `save`; if a signal asked for it, the process ends here with the signal's exit code."""
        self.save(*what)
        if self.stopping:
            print(f"stopped at step {self.step}; --resume goes on", file=sys.stderr)
            raise SystemExit(self.stopping)


def find_checkpoint(name: str) -> str:
    """A run folder -> its checkpoint folder; a checkpoint folder or hub id -> itself."""
    inner = Path(name) / "checkpoint"
    return str(inner) if inner.is_dir() or inner.with_name("checkpoint.old").is_dir() else name


def checkpoint_fingerprint(name: str) -> Fingerprint:
    """Fingerprint of the units that a checkpoint speaks. SystemExit if it is not a whole unit LM's."""
    path = fetch(name) / "slam.json"
    if not path.is_file():
        raise SystemExit(f"{path}: missing; {name} is not a whole checkpoint of train.py or dpo.py")
    return Fingerprint.of(json.loads(path.read_text())["fingerprint"])


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

def batches(reader: UnitReader, rows: list, context: int, size: int, device: torch.device) -> Iterator[tuple]:
    """Rows -> (tokens, targets, positions) of `size` rows each, on the device."""
    for at in range(0, len(rows), size):
        batch = collate(reader, rows[at:at + size], context)
        if device.type == "cuda":
            batch = [x.pin_memory().to(device, non_blocking=True) for x in batch]
        yield batch


@torch.inference_mode()
def validation_loss(lm: UnitLM, reader: UnitReader, context: int, micro_batch: int, dtype: str) -> tuple[float, int]:
    """Mean cross-entropy in nats per target over a whole corpus, and the number of targets."""
    rows, total, n = pack(cut(reader.lengths, context), context, None), 0.0, 0
    for tokens, targets, positions in batches(reader, rows, context, micro_batch, lm.device):
        with autocast(lm.device, dtype):
            total += lm(tokens, targets, positions, reduction="sum")[1].item()
        n += int((targets != IGNORE).sum())
    return total / n, n


def train_step(forward, lm: UnitLM, optimizer, reader: UnitReader, rows: list, cfg, lr: float) -> tuple:
    """One optimiser step: (loss, gradient norm) as tensors, number of targets. Loss is the mean over all targets."""
    micro = list(batches(reader, rows, cfg.context, cfg.micro_batch, lm.device))
    n = sum(int((targets != IGNORE).sum()) for _, targets, _ in micro)
    total = torch.zeros((), device=lm.device)
    for tokens, targets, positions in micro:
        with autocast(lm.device, cfg.dtype):
            loss = forward(tokens, targets, positions, reduction="sum")[1] / n
        loss.backward()
        total += loss.detach()
    return total, update(lm, optimizer, lr, cfg.clip), n


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
    device = pick_device()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    reader, val = UnitReader(*cfg.train), UnitReader(*cfg.val)
    require_same(reader.fingerprint, cfg.train[0], val.fingerprint, cfg.val[0])
    run = Run(cfg, "train")
    if run.trainer and run.progress() >= 1:
        return
    rows = Rows(reader, cfg.context, cfg.micro_batch * cfg.accumulation, cfg.seed)
    lm = UnitLM.from_pretrained(str(run.checkpoint)) if run.trainer else build(cfg, reader.fingerprint.n_units)
    lm.to(device).train()
    optimizer = make_optimizer(lm, cfg)
    losses: list[Tensor] = []  # of the steps since the last log line
    if run.trainer:
        optimizer.load_state_dict(run.trainer["optimizer"])
        losses = [x.to(device) for x in run.trainer["pending"]]
    run.open()
    forward = torch.compile(lm) if cfg.compile and device.type == "cuda" else lm
    n_params, peak = lm.n_params(), peak_flops(device)
    flops = flops_per_token(lm.config, n_params, cfg.context)
    fill = sum(p.length for row in rows.rows for p in row) / (len(rows.rows) * cfg.context)
    print(f"{n_params / 1e6:.1f}M parameters ({cfg.shape and 'from scratch' or f'{cfg.base}, init {cfg.init}'}), "
          f"{len(reader):,} utterances, {reader.n_tokens:,} tokens, rows {100 * fill:.1f} % full, on {device.type}")

    def evaluate() -> None:
        lm.eval()
        loss, n = validation_loss(lm, val, cfg.context, cfg.micro_batch, cfg.dtype)
        lm.train()
        run.log(f"val loss {loss:.4f} | ppl {math.exp(loss):.2f}", val_loss=loss)
        name = "val_loss" if run.step else "val_loss_before_training"
        merge_results(run.out / "results.json", {name: {"value": loss, "n": n, "step": run.step}})

    if not run.step:
        evaluate()
    since, tokens_then = run.seconds, run.tokens
    while run.progress() < 1 and not run.stopping:
        started = time.perf_counter()
        lr = cfg.lr * schedule(cfg.schedule, run.progress(), cfg.warmup, cfg.min_lr / cfg.lr)
        loss, norm, n = train_step(forward, lm, optimizer, reader, rows.step(run.step), cfg, lr)
        losses.append(loss)
        run.step, run.tokens = run.step + 1, run.tokens + n
        # The only host sync of the loop; a time budget or the end needs the clock of the device, not of the queue.
        logging = run.step % cfg.log_every == 0 or cfg.time_budget_hours or run.step == 1
        if logging:
            run.check_finite(torch.stack(losses).mean().item(), norm.item())
        run.seconds += time.perf_counter() - started
        if run.step % cfg.log_every == 0 or run.progress() >= 1:
            mean = torch.stack(losses).mean().item()
            run.check_finite(mean, norm.item())
            rate = (run.tokens - tokens_then) / max(run.seconds - since, 1e-9)
            mfu = f"{100 * rate * flops / peak:.1f}%" if peak else "n/a"
            run.log(f"loss {mean:.4f} | lr {lr:.1e} | gnorm {norm.item():.2f} | {rate:,.0f} tok/s | mfu {mfu} | "
                    f"{run.clock()}", loss=mean, lr=lr, gnorm=norm.item(), tokens_per_second=rate)
            losses, since, tokens_then = [], run.seconds, run.tokens
        if run.step % cfg.save_every == 0 and run.progress() < 1:
            run.check_finite(loss.item(), norm.item())
            run.save(lm, optimizer, reader.fingerprint, losses)
        if run.step % cfg.eval_every == 0 and run.progress() < 1:
            evaluate()
    run.finish(lm, optimizer, reader.fingerprint, losses)
    evaluate()
    print(f"{run.checkpoint}: {run.step} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} min of training")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
