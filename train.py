"""Pre-train a unit LM: a text LM's body (TWIST), packed rows of units, one GPU, one day.

In:  unit files (prepare_units.py, synth_stories.py) and the name of a text LM.
Out: a run folder:  checkpoint/ (a Hugging Face folder + slam.json + trainer.pt) · log.jsonl · results.json

    python train.py config/slam.py                   # the paper's recipe: a day on a 24 GB GPU, 9 GB of disk
    python train.py config/slam.py config/gpu_8gb.py # the same run on a smaller card
    python train.py config/demo_train.py             # minutes on two CPU cores
    torchrun --nproc_per_node=2 train.py config/slam_scaled.py

SIGTERM, ctrl-C and a closed terminal save and exit after the step; `--resume` goes on from there, bit-equal on a CPU.
torchrun gives its processes 30 s to do so; a run that is killed has its last saved checkpoint.
"""
import math
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from config import load_config
from model import ModelConfig, UnitLM
from slam.checkpoint import checkpoint_fingerprint, fetch
from slam.costs import explain_out_of_memory, flops_per_token, peak_flops
from slam.device import autocast, compiled, join_ranks, leave_ranks, n_graphs, pick_device, sum_gradients, world_size
from slam.interleave import Mixed, MixedRows
from slam.optim import make_optimizer, schedule, update
from slam.packing import Loader, Rows, on_device
from slam.run import Run, run_problems
from slam.scoring import validation_loss
from slam.units import UnitReader, require_same


@dataclass
class Config:
    """Pre-train a unit LM. The defaults are the paper's (table 4)."""
    out: str = "out/slam"  # run folder
    train: tuple[str, ...] = ()  # unit files or folders of them, mixed by size; a source named twice counts twice
    val: tuple[str, ...] = ()  # the same, for the validation loss
    mix: tuple[float, ...] = ()  # shares of the tokens in speech-only, text-only and interleaved utterances, such as
    # the paper's 1 1 1 (slam/interleave.py); the unit files then have words. Empty: speech only
    spans: Literal["poisson", "chunks"] = "poisson"  # which words of an interleaved utterance are spoken
    spoken_share: float = 0.3  # share of these words, with spans = poisson
    base: str = "Qwen/Qwen2.5-0.5B"  # text LM that gives shape and weights: hub id, folder or embedded:NAME
    init: Literal["first_rows", "random", "none", "keep_text", "keep_text_random"] = "first_rows"  # unit embeddings:
    # the text embedding's first rows, new ones N(0, 0.02), or `none`: keep only the shape and train from scratch. With
    # a mix the text's embeddings stay; the units' are drawn with their mean and spread (keep_text), or from N(0, 0.02)
    n_layers: int | None = None  # number of the base's first layers to keep; none: all
    shape: dict = field(default_factory=dict)  # fields of ModelConfig (others as in Qwen2.5-0.5B): train this shape
    # from scratch; base, init and n_layers are then ignored
    rope_theta: float | None = 10000.0  # base of the rotary position embedding; none: the text LM's, to keep its text
    context: int = 1024  # tokens in a row
    micro_batch: int = 8  # rows in a forward pass, as many as fit into memory; the result does not depend on it
    batch_tokens: int = 131_072  # tokens in an optimiser step, on all GPUs together; accumulates rows to reach it
    steps: int | None = None  # length of the run, by whichever of these is set: optimiser steps,
    tokens: float | None = None  # target tokens,
    time_budget_hours: float | None = None  # or hours of training (compiling, saving and evaluating not counted)
    optimizer: Literal["adamw", "ademamix", "muon"] = "adamw"  # slam/optim.py says what they are
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 5e-5  # floor of the cosine and wsd schedules
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "constant"] = "cosine"  # of the learning rate
    warmup: float = 0.01  # share of the run in which the learning rate rises linearly
    beta1: float = 0.9  # AdamW, AdEMAMix
    beta2: float = 0.999  # AdamW, AdEMAMix
    eps: float = 1e-8  # AdamW, AdEMAMix
    weight_decay: float = 0.0  # on matrices only
    beta3: float = 0.9999  # AdEMAMix, the slow mean
    alpha: float = 5.0  # AdEMAMix, weight of the slow mean in the step
    alpha_warmup: int = 0  # AdEMAMix, steps over which beta3 and alpha rise; in the paper, the length of the run
    muon_momentum: float = 0.95  # Muon
    grad_clip: float = 0.5  # largest gradient norm
    dtype: Literal["auto", "bfloat16", "float32", "pure_bfloat16"] = "auto"  # of the computation; weights and optimiser
    # are fp32, except with pure_bfloat16. auto: bfloat16 where the hardware multiplies it fast
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work
    compile: bool | None = None  # torch.compile; none: on a GPU. A CPU needs a C++ compiler and half a minute for it
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside log.jsonl; each must be installed
    log_every: int = 10  # steps
    eval_every: int = 1000  # steps
    save_every: int = 500  # steps
    seed: int = 0  # of the initialisation and the data order
    resume: bool = False  # go on with the run in `out`, if there is one
    overwrite: bool = False  # remove the run in `out` and start anew

    def problems(self) -> list[str]:
        found = run_problems(self)
        if not (self.train and self.val):
            found.append("train and val: name at least one unit file or folder each")
        if self.mix and (len(self.mix) != 3 or min(self.mix) < 0 or not sum(self.mix)):
            found.append(f"mix {self.mix}: three shares, of speech, text and interleaved, not negative")
        if bool(self.mix) != self.init.startswith("keep_text") and not self.shape:
            found.append(f"init {self.init}: keep_text and keep_text_random are for a mix, the others for speech alone")
        if unknown := sorted(self.shape.keys() - ModelConfig.__dataclass_fields__.keys()):
            found.append(f"shape: no such field {unknown[0]}; there are {', '.join(ModelConfig.__dataclass_fields__)}")
        if not 0 <= self.spoken_share <= 1:
            found.append(f"spoken_share {self.spoken_share}: a share of the words, between 0 and 1")
        if self.micro_batch < 1 or self.context < 1:
            found.append("micro_batch and context must be at least 1")
        elif self.batch_tokens % (rows := self.context * self.micro_batch * world_size()) or self.batch_tokens < 1:
            found.append(f"batch_tokens {self.batch_tokens}: not a multiple of context x micro_batch x GPUs = {rows}")
        return found


# ---------------------------------------------------------------- the model, a step, an evaluation
def build(cfg: Config, n_tokens: int, first_text: int = 0) -> UnitLM:
    """A new model: TWIST from `base`, or from scratch by `shape`. SystemExit if the shape is impossible."""
    try:
        if cfg.shape:
            return UnitLM(ModelConfig(**{"vocab_size": n_tokens, "first_text_token": first_text, "rope_theta":
                                         cfg.rope_theta or 1e4, "max_position_embeddings": cfg.context} | cfg.shape))
        return UnitLM.twist(cfg.base, n_tokens, cfg.init, cfg.n_layers, cfg.rope_theta, cfg.context)
    except ValueError as e:
        raise SystemExit(str(e)) from None


def accumulate(forward, micro_batches: list[tuple], n_targets: int, device: torch.device, dtype: str) -> Tensor:
    """Forward and backward passes of a step; returns this rank's part of the loss, (), without waiting for the GPU.

    The loss is the mean over the `n_targets` targets of all ranks' micro-batches, so it does not depend on how a step
    is divided into these. micro_batches: [(tokens, targets, positions)], each (B, T) int64. forward: the model,
    compiled or not.
    """
    total = torch.zeros((), device=device)
    for micro_batch in micro_batches:
        with autocast(device, dtype):
            loss = forward(*on_device(micro_batch, device, dtype), reduction="sum")[1] / n_targets
        loss.backward()
        total += loss.detach()
    return total


def evaluate(lm: UnitLM, val: UnitReader | Mixed, cfg: Config, run: Run, world: int) -> None:
    """Log the validation loss, and with a mix the loss and accuracy of each kind of token; also to results.json."""
    lm.eval()
    speech = val.reader if cfg.mix else val
    loss, n = validation_loss(lm, speech, cfg.context, cfg.micro_batch, cfg.dtype, run.rank, world)
    found = {"val_loss": {"value": loss, "n": n}}
    if cfg.mix:
        from slam.cross_modal import losses_by_kind
        found |= losses_by_kind(lm, val, cfg.context, cfg.dtype)
    lm.train()
    values = {name: x["value"] for name, x in found.items()}
    line = " | ".join(f"{name.removeprefix('val_').replace('_', ' ')} {x:.4g}" for name, x in list(values.items())[1:])
    run.results({name if run.step else f"{name}_before_training": x | {"step": run.step} for name, x in found.items()})
    run.log(f"val loss {loss:.4f} | ppl {math.exp(loss):.2f}{line and ' | '}{line}", **values)  # last: marks it as done


@explain_out_of_memory
def main(cfg: Config) -> None:
    # ------------------------------------------------ hardware
    rank, world = join_ranks()
    device, sys.stdout = pick_device(), None if rank else sys.stdout  # the first process speaks for all
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")

    # ------------------------------------------------ data, and the run's folder
    reader, val = UnitReader(*cfg.train), UnitReader(*cfg.val)
    require_same(reader.fingerprint, cfg.train[0], val.fingerprint, cfg.val[0])
    run = Run(cfg, "train", rank, reads=(*cfg.train, *cfg.val, cfg.base))  # --resume: at the step of its checkpoint
    run.starts_from(train=reader.digest(), val=val.digest())  # a resumed run needs the same data
    if run.resumed and run.progress() >= 1 and run.evaluated():
        return
    order = cfg.context, cfg.batch_tokens // cfg.context, cfg.seed, rank, world
    if cfg.mix:  # speech and text in one stream
        corpus, val = (Mixed(x, cfg.mix, cfg.seed, cfg.spans, cfg.spoken_share) for x in (reader, val))
        if not (run.resumed or cfg.shape):
            corpus.require_text_of(cfg.base)
        fingerprint, rows = reader.fingerprint, MixedRows(corpus, *order)
    else:
        corpus, fingerprint, rows = reader, reader.fingerprint.speech(), Rows(reader.lengths, *order)
        if not (run.resumed or cfg.shape) and cfg.init == "first_rows" and (fetch(cfg.base) / "slam.json").is_file():
            require_same(checkpoint_fingerprint(cfg.base), cfg.base, fingerprint, cfg.train[0])  # it has units already
    loader = Loader(corpus, rows, cfg.micro_batch, device)

    # ------------------------------------------------ model
    lm = UnitLM.from_pretrained(str(run.checkpoint)) if run.resumed else build(
        cfg, fingerprint.vocab_size, corpus.vocabulary.first_text if cfg.mix else 0)
    lm.to(device).train()
    for p in lm.parameters() if cfg.dtype == "pure_bfloat16" else ():
        p.data = p.data.bfloat16()  # parameters only: lm.to would also round Pythia's rotary frequencies
    lm.set_activation_checkpointing(cfg.activation_checkpointing)
    forward = compiled(lm, cfg.compile)

    # ------------------------------------------------ optimiser
    optimizer = make_optimizer(lm, cfg)
    losses: list[Tensor] = []  # this rank's part, of the steps since the last log line
    norm = torch.zeros(())  # of the last step's gradient
    if run.resumed:
        losses = [x.to(device) / world for x in run.restore(optimizer)]

    # ------------------------------------------------ before the first step
    run.open()
    needed, palm, peak = flops_per_token(lm, rows.keys()), flops_per_token(lm, cfg.context), peak_flops(device)
    start = "from scratch" if cfg.shape else f"{cfg.base}, init {cfg.init}"
    print(f"{lm.n_params() / 1e6:.1f}M parameters ({start}), {len(reader):,} utterances, {reader.n_tokens:,} tokens, "
          f"rows {100 * rows.fill():.1f} % full, on {world} x {device.type}")
    if forward is not lm and run.progress() < 1:
        with run.pause():  # compile before the clock runs
            accumulate(forward, loader.step(run.step)[0][:1], 1, device, cfg.dtype)
            lm.zero_grad()
    graphs, first, logged_at = n_graphs(), run.step, (run.seconds, run.tokens)

    # ------------------------------------------------ loop
    while run.progress() < 1 and not run.stopping:
        if run.step % cfg.eval_every == 0 and (run.step > first or not run.evaluated()):
            with run.pause():
                evaluate(lm, val, cfg, run, world)
        # the batch: [(tokens, targets, positions)], packed rows of utterances; a pure function of seed, step and rank
        micro_batches, n_targets = loader.step(run.step)
        # forward and backward passes, then a step at the learning rate for this share of the run
        losses.append(accumulate(forward, micro_batches, n_targets, device, cfg.dtype))
        lr = cfg.lr * schedule(cfg.schedule, run.progress(), cfg.warmup, cfg.min_lr / cfg.lr)
        if world > 1:
            sum_gradients(lm)
        norm = update(lm, optimizer, lr, cfg.grad_clip)
        run.step, run.tokens = run.step + 1, run.tokens + n_targets
        run.tick()
        if run.step % cfg.log_every == 0 or run.progress() >= 1:
            mean = torch.stack(run.gather(losses, norm)).mean(0)  # waits for the GPU
            run.tick()
            rate = (run.tokens - logged_at[1]) / max(run.seconds - logged_at[0], 1e-9)
            record = {"loss": mean.item(), "lr": lr, "gnorm": norm.item(), "tokens_per_second": rate}
            line = f"loss {record['loss']:.4f} | lr {lr:.1e} | gnorm {record['gnorm']:.2f} | {rate:,.0f} tok/s"
            if device.type == "cuda":
                record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if peak:  # known GPUs
                record["mfu_needed"], record["mfu"] = (rate * flops / peak / world for flops in (needed, palm))
                line += f" | mfu {100 * record['mfu_needed']:.1f}% (PaLM's formula: {100 * record['mfu']:.1f}%)"
            run.log(f"{line} | {run.clock()}", **record)
            losses, logged_at = [], (run.seconds, run.tokens)
        if run.step % cfg.save_every == 0 and run.progress() < 1:
            with run.pause():
                run.save(lm, optimizer, fingerprint, run.gather(losses, norm))

    # ------------------------------------------------ the end
    with run.pause():
        run.finish(lm, optimizer, fingerprint, run.gather(losses, norm))
        evaluate(lm, val, cfg, run, world)
    print(f"{run.checkpoint}: {run.step} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} min of training, "
          f"{n_graphs() - graphs} recompilations")
    leave_ranks()


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
