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
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from config import load_config
from model import ModelConfig, UnitLM
from slam.device import (
    autocast,
    compiled,
    flops_per_token,
    join_ranks,
    n_graphs,
    over_ranks,
    peak_flops,
    pick_device,
    sum_gradients,
)
from slam.optim import make_optimizer, schedule, update
from slam.packing import Loader, Rows
from slam.run import Run, plot, run_problems
from slam.scoring import validation_loss
from slam.units import UnitReader, require_same, vocab_size


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
    optimizer: Literal["adamw", "ademamix", "adalomo", "muon"] = "adamw"  # slam/optim.py says what they are
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
    grad_clip: float = 0.5  # largest gradient norm
    dtype: Literal["auto", "bfloat16", "float32", "pure_bfloat16"] = "auto"  # of the computation; weights and optimiser
    # are fp32, but for pure_bfloat16. auto: bfloat16 where the hardware multiplies it fast
    activation_checkpointing: bool = False  # keep less for the backward pass and compute it again: less memory, a third more work
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
    lm.set_activation_checkpointing(cfg.activation_checkpointing)
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
        norm = update(lm, optimizer, lr, cfg.grad_clip)
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
