"""Direct preference optimisation (Rafailov et al. 2023) of a unit LM on pairs of continuations.

In:  a checkpoint of train.py and pair files (synth_stories.py, or `pairs` below).
Out: a run folder like train.py's: checkpoint/ · log.jsonl · results.json

    python dpo.py                                    # the paper's half hour, on the newest pre-trained run under out/
    python dpo.py config/demo_dpo.py                 # a minute on two CPU cores
    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py
    python dpo.py pairs config/align_pairs.py        # make pairs of the model's own continuations

The reference is the starting checkpoint. Its log-probabilities are saved beside the pairs: one model is in memory.
"""
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import load_config
from model import UnitLM
from slam import checkpoint as folders
from slam.costs import explain_out_of_memory
from slam.device import compiled, join_ranks, leave_ranks, over_ranks, pick_device, put, sum_gradients, world_size
from slam.optim import make_optimizer, schedule, update
from slam.packing import Epochs
from slam.run import Run, run_problems
from slam.scoring import PrefixPair, pack, pair_logps, row_logps
from slam.units import Fingerprint, read_pairs, require_same, sha256_of, to_tokens, write_atomic


@dataclass
class Config:
    """Tune a unit LM on preference pairs. The defaults are the paper's (table 5)."""
    out: str = ""  # run folder; empty: the checkpoint's, with _dpo at its end
    checkpoint: str = ""  # model to tune, also the reference; empty: the newest pre-trained one under out/
    pairs: str = ""  # pair file to train on; empty: the newest pairs_train.jsonl under out/ of the checkpoint's units
    val_pairs: str = ""  # held-out pair file; empty: pairs_val.jsonl beside `pairs`
    beta: float = 0.1  # strength of the pull towards the reference
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's or IPO's
    label_smoothing: float = 0.0  # share of pairs assumed to be labelled the wrong way round
    length_normalized: bool = False  # log-probabilities per token instead of sums; needs a beta of about 5
    nll_weight: float = 0.0  # weight of the chosen completion's negative log-likelihood per token in the loss
    context: int = 1024  # tokens in a row of one or several pairs; longer prompts lose their beginning
    batch_pairs: int = 64  # pairs in an optimiser step, on all GPUs together (the paper: micro-batch 4 x 16)
    micro_batch: int = 4  # rows in a forward pass: 12.3 GB with 4, 18.9 with 8; the result does not depend on it
    steps: int | None = 813  # length of the run, by whichever of these is set: optimiser steps,
    tokens: float | None = None  # completion tokens,
    time_budget_hours: float | None = None  # or hours of training
    lr: float = 5e-5  # peak learning rate
    min_lr: float = 0.0  # floor of the cosine and wsd schedules
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "constant"] = "inverse_sqrt"  # of the learning rate
    warmup: float = 100 / 813  # share of the run in which the learning rate rises linearly
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.0  # AdamW
    grad_clip: float = 0.5  # largest gradient norm
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; weights and optimiser are fp32
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work
    compile: bool | None = None  # torch.compile; none: on a GPU
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside log.jsonl; each must be installed
    log_every: int = 10  # steps
    eval_every: int = 200  # steps between evaluations on the validation pairs
    n_samples: int = 16  # validation prompts continued and transcribed at each evaluation, to see repetition; 0: none
    save_every: int = 200  # steps
    seed: int = 0  # of the order of the pairs and the samples
    resume: bool = False  # go on with the run in `out`, if there is one
    overwrite: bool = False  # remove the run in `out` and start anew

    def problems(self) -> list[str]:
        found = run_problems(self)
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5 or min(self.nll_weight, self.n_samples) < 0:
            found.append("beta must be positive, label_smoothing in [0, 0.5), nll_weight and n_samples not negative")
        if self.batch_pairs % world_size() or min(self.batch_pairs, self.micro_batch, self.context) < 1:
            found.append(f"batch_pairs must be a multiple of the GPUs, {world_size()}; micro_batch, context: 1 or more")
        return found


# ---------------------------------------------------------------- the loss
def dpo_loss(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, reference_chosen_logp: Tensor,
             reference_rejected_logp: Tensor, beta: float = 0.1, label_smoothing: float = 0.0, loss: str = "sigmoid",
             lengths: Tensor | None = None, length_normalized: bool = False,
             nll_weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """A preference loss from summed log-probabilities (B,) of completions.

    loss: with h = log(policy / reference) of the chosen completion minus that of the rejected one,
        `sigmoid` is DPO's -log sigmoid(beta h) (Rafailov et al. 2023, eq. 7),
        `ipo` is IPO's (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17).
    label_smoothing: share of pairs assumed to be labelled the wrong way round; their loss takes -h (Mitchell 2023).
    lengths: (2, B), tokens of the chosen and the rejected completions; the next two need them.
    length_normalized: divide the log-ratios by the lengths, in h and in the rewards (Lambert et al. 2024).
    nll_weight: weight of the chosen completion's negative log-likelihood per token, added (Pang et al. 2024).

    Returns the mean loss () and the implicit rewards beta log(policy / reference) of chosen and rejected, (B,) each.
    """
    chosen, rejected = policy_chosen_logp - reference_chosen_logp, policy_rejected_logp - reference_rejected_logp
    if length_normalized:
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    h = torch.stack([chosen - rejected, rejected - chosen])
    right, wrong = {"sigmoid": -F.logsigmoid(beta * h), "ipo": (h - 1 / (2 * beta)).square()}[loss]
    nll = -policy_chosen_logp / lengths[0] if nll_weight else 0.0
    total = (1 - label_smoothing) * right + label_smoothing * wrong + nll_weight * nll
    return total.mean(), beta * chosen.detach(), beta * rejected.detach()


STATISTICS = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_length", "rejected_length")


def loss_and_statistics(cfg: Config, logps: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`dpo_loss` () and the mean STATISTICS (7,), from log-probabilities and lengths (B, 2) of chosen and rejected."""
    loss, chosen, rejected = dpo_loss(*logps.T, *reference.T, beta=cfg.beta, label_smoothing=cfg.label_smoothing,
                                      loss=cfg.loss, lengths=lengths.T, length_normalized=cfg.length_normalized,
                                      nll_weight=cfg.nll_weight)
    margin = chosen - rejected
    return loss, torch.stack([loss.detach(), margin.mean(), (1 + margin.sign()).mean() / 2,  # a tie counts half
                              *logps.detach().mean(0), *lengths.float().mean(0)])


# ---------------------------------------------------------------- pairs and their log-probabilities by the reference
def prefix_pair(pair: dict, context: int, dedup: bool = True) -> PrefixPair | None:
    """Units of a pair -> tokens `1 prompt`, `chosen 1`, `rejected 1`; None if they leave no room for a prompt.

    A completion that was cut off gets no EOS. With dedup, a unit that ends the prompt and begins the completion is kept
    once (SlamKit keeps both). A long prompt loses its beginning, the same for both completions.
    prefix_pair({"prompt": [5, 6], "chosen": [6, 9], "rejected": [4]}, 1024) -> [1, 7, 8], [11, 1], [6, 1]
    """
    prompt, completions = pair["prompt"], []
    for side in ("chosen", "rejected"):
        units = pair[side]
        tokens = to_tokens(units[1:] if dedup and units[0] == prompt[-1] and len(units) > 1 else units)[1:]
        completions.append(tokens if pair.get(f"{side}_ended", True) else tokens[:-1])
    room = context - sum(map(len, completions))
    return PrefixPair(to_tokens(prompt[-room:])[:-1], *completions) if room > 0 else None


def load_pairs(path: str, context: int) -> tuple[Fingerprint, list[PrefixPair]]:
    """Fingerprint and pairs of a pair file, in tokens; prints how many are too long. SystemExit if none is left."""
    fingerprint, found = read_pairs(path)
    pairs = [pair for x in found if (pair := prefix_pair(x, context, fingerprint.dedup))]
    if n := len(found) - len(pairs):
        print(f"{path}: {n} of {len(found)} pairs left out: their completions fill a row of {context} tokens")
    if not pairs:
        raise SystemExit(f"{path}: no pairs in it" if not found else f"{path}: no pair fits; raise context")
    return fingerprint, pairs


def completion_logps(lm: UnitLM, pairs: list[PrefixPair], cfg: Config, desc: str, ranks=(0, 1)) -> Tensor:
    """Log-probabilities (n, 2) of both completions, on the CPU; the ranks divide the work. SystemExit if one is NaN."""
    logps, mine = torch.zeros(len(pairs), 2), slice(ranks[0], None, ranks[1])
    logps[mine] = pair_logps(lm.eval(), pairs[mine], cfg.context, cfg.dtype, desc)[:, 1:]
    logps = torch.tensor(over_ranks(logps.flatten().tolist())).view(-1, 2)
    if n := int((~logps.isfinite()).any(1).sum()):
        raise SystemExit(f"{desc}: {n} of {len(pairs)} pairs have no log-probability: not enough memory for a row of "
                         f"{cfg.context} tokens, or a model that has diverged")
    return logps


def reference_logps(start: str, weights: str, path: str, pairs: list[PrefixPair], cfg: Config, ranks=(0, 1)) -> Tensor:
    """`completion_logps` of the checkpoint `start` (its sha256: `weights`), cached in a file beside the pair file."""
    saved = Path(f"{path}.reference-{sha256_of(weights, pairs, cfg.dtype, pick_device().type)[:16]}.npy")
    if over_ranks([saved.exists()]) == [ranks[1]]:  # all see it, so that none waits for the others below
        return torch.from_numpy(np.load(saved))
    lm, content = UnitLM.from_pretrained(start).to(pick_device()), io.BytesIO()
    logps = completion_logps(lm, pairs, cfg, f"reference, {Path(path).name}", ranks)
    np.save(content, logps.numpy())
    try:
        if not ranks[0]:
            write_atomic(saved, content.getvalue())
    except OSError as e:
        print(f"{saved}: not saved ({e.strerror}); the next run computes it again", file=sys.stderr)
    return logps


# ---------------------------------------------------------------- a step
class Data(NamedTuple):
    """Pairs, the lengths (n, 2) of their completions, and the reference's log-probabilities (n, 2) of these."""
    pairs: list[PrefixPair]
    lengths: Tensor
    reference: Tensor

    @classmethod
    def of(cls, pairs: list[PrefixPair], reference: Tensor, device: torch.device) -> "Data":
        return cls(pairs, torch.tensor([pair.lengths[1:] for pair in pairs], device=device), reference.to(device))


def step_rows(ids: list[int], pairs: list[PrefixPair], cfg: Config, width: int) -> list[list[int]]:
    """A step's pairs packed in rows. With a fixed width (compiled code) empty rows fill the last micro-batch."""
    rows = [[ids[i] for i in row] for row in pack([pairs[i] for i in ids], cfg.context)]
    return rows + [[]] * (-len(rows) % cfg.micro_batch if width else 0)


def backward(forward: Callable, data: Data, rows: list[list[int]], cfg: Config, width: int) -> Tensor:
    """Forward and backward passes of this rank's rows; returns its part of the STATISTICS (7,); no wait for the GPU.

    The loss is the mean over the pairs of all ranks, however they are divided into micro-batches.
    """
    device, total = data.reference.device, 0.0
    for at in range(0, len(rows), cfg.micro_batch):
        micro = rows[at:at + cfg.micro_batch]
        ids = put(torch.tensor([i for row in micro for i in row]), device)
        logps = row_logps(forward, [[data.pairs[i] for i in row] for row in micro], width, device, cfg.dtype)[:, 1:]
        loss, statistics = loss_and_statistics(cfg, logps, data.reference[ids], data.lengths[ids])
        share = len(ids) / cfg.batch_pairs
        (share * loss).backward()
        total += share * statistics
    return total


# ---------------------------------------------------------------- the run
def evaluate(run: Run, lm: UnitLM, val: Data, cfg: Config, fingerprint: Fingerprint, world: int) -> None:
    """Log loss, margin and accuracies on held-out pairs, and transcripts of continuations of their prompts."""
    logps = completion_logps(lm, val.pairs, cfg, "validation", (run.rank, world))
    loss, margin, accuracy, *_ = loss_and_statistics(cfg, logps, val.reference, val.lengths)[1].tolist()
    found = {"val_dpo_loss": loss, "val_margin": margin, "val_reward_accuracy": accuracy,
             "val_chosen_preferred": (1 + (logps[:, 0] - logps[:, 1]).sign()).mean().item() / 2}
    samples = {}
    if cfg.n_samples and not run.rank:  # imported here: tokeniser, vocoder and Whisper are needed for nothing else
        from slam.align_pairs import hear_samples
        samples = hear_samples(lm, [pair.prefix for pair in val.pairs[:cfg.n_samples]], fingerprint, cfg.seed)
    run.results({k: {"value": v, "n": len(val.pairs), "step": run.step} for k, v in found.items()})
    run.log(" | ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found.items()), **found, **samples)
    lm.train()


def complete(cfg: Config) -> Config:
    """Fill in the paths that were left empty, and print them. SystemExit if there is nothing to start from."""
    checkpoint = cfg.checkpoint or folders.newest_checkpoint("out", "train")
    pairs = cfg.pairs or folders.newest_pairs(checkpoint)
    full = replace(cfg, checkpoint=checkpoint, pairs=pairs, out=cfg.out or f"{folders.run_folder(checkpoint)}_dpo",
                   val_pairs=cfg.val_pairs or str(Path(pairs).with_name("pairs_val.jsonl")))
    if full != cfg:
        print(", ".join(f"{name} {getattr(full, name)}" for name in ("checkpoint", "pairs", "val_pairs", "out")))
    return full


@explain_out_of_memory
def main(cfg: Config) -> None:
    # ------------------------------------------------------------ hardware and settings
    ranks = rank, world = join_ranks()
    device, sys.stdout = pick_device(), None if rank else sys.stdout  # the first process speaks for all
    torch.set_float32_matmul_precision("high")
    cfg = complete(cfg)

    # ------------------------------------------------------------ data: pairs, and the reference's log-probabilities
    fingerprint, pairs = folders.checkpoint_fingerprint(cfg.checkpoint), {}
    for name, path in (("train", cfg.pairs), ("val", cfg.val_pairs)):
        theirs, pairs[name] = load_pairs(path, cfg.context)
        require_same(fingerprint, cfg.checkpoint, theirs, path)
        fingerprint = fingerprint if fingerprint.codebook_sha256 else theirs  # SlamKit's checkpoints do not record it
    run = Run(cfg, "dpo", rank, reads=(cfg.checkpoint, cfg.pairs, cfg.val_pairs))
    weights = folders.weights_sha256(cfg.checkpoint)
    run.starts_from(checkpoint=weights, **{name: sha256_of(found) for name, found in pairs.items()})
    if run.resumed and run.progress() >= 1 and run.evaluated("val_dpo_loss"):
        return
    train, val = (Data.of(pairs[name], reference_logps(cfg.checkpoint, weights, path, pairs[name], cfg, ranks), where)
                  for name, path, where in (("train", cfg.pairs, device), ("val", cfg.val_pairs, torch.device("cpu"))))
    order = Epochs(len(train.pairs), cfg.seed)  # the order of the pairs is a pure function of the seed

    # ------------------------------------------------------------ model
    lm = UnitLM.from_pretrained(str(run.checkpoint) if run.resumed else cfg.checkpoint).to(device).train()
    lm.set_activation_checkpointing(cfg.activation_checkpointing)
    forward = compiled(lm, cfg.compile)
    width = 0 if forward is lm else cfg.context  # compiled code has one shape

    # ------------------------------------------------------------ optimiser
    optimizer = make_optimizer(lm, cfg)
    statistics, norm = [], torch.zeros(())  # this rank's, of the steps since the last log line; the last gradient's
    if run.resumed:
        statistics = [x.to(device) / world for x in run.restore(optimizer)]

    # ------------------------------------------------------------ loop
    run.open()
    print(f"{lm.n_params() / 1e6:.1f}M parameters, {len(train.pairs):,} pairs, on {world} x {device.type}")
    if forward is not lm and run.progress() < 1:
        with run.pause():  # compile before the clock runs
            backward(forward, train, step_rows([0], train.pairs, cfg, width), cfg, width)
            lm.zero_grad()
    first = run.step
    while run.progress() < 1 and not run.stopping:
        if run.step % cfg.eval_every == 0 and (run.step > first or not run.evaluated("val_dpo_loss")):
            with run.pause():
                evaluate(run, lm, val, cfg, fingerprint, world)
        # The pairs of this step and of this rank; forward, loss and backward of each micro-batch; the update.
        ids = [order[run.step * cfg.batch_pairs + i] for i in range(cfg.batch_pairs)]
        rows = step_rows(ids[rank::world], train.pairs, cfg, width)
        statistics.append(backward(forward, train, rows, cfg, width))
        lr = cfg.lr * schedule(cfg.schedule, run.progress(), cfg.warmup, cfg.min_lr / cfg.lr)
        if world > 1:
            sum_gradients(lm)
        norm = update(lm, optimizer, lr, cfg.grad_clip)
        run.step, run.tokens = run.step + 1, run.tokens + sum(sum(train.pairs[i].lengths[1:]) for i in ids)
        run.tick()
        if run.step % cfg.log_every == 0 or run.progress() >= 1:
            mean = torch.stack(run.gather(statistics, norm)).mean(0)  # waits for the GPU
            run.tick()
            found = dict(zip(STATISTICS, mean.tolist())) | {"lr": lr, "gnorm": norm.item()}
            line = " | ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in found.items())
            run.log(f"{line} | {run.clock()}", **found)
            statistics = []
        if run.step % cfg.save_every == 0 and run.progress() < 1:
            with run.pause():
                run.save(lm, optimizer, fingerprint, run.gather(statistics, norm))
    with run.pause():
        run.finish(lm, optimizer, fingerprint, run.gather(statistics, norm))  # after a signal, the process ends here
        evaluate(run, lm, val, cfg, fingerprint, world)
    print(f"{run.checkpoint}: {run.step} steps, {run.seconds / 60:.1f} min of training")
    leave_ranks()


if __name__ == "__main__":
    if sys.argv[1:2] == ["pairs"]:
        from slam.align_pairs import PairsConfig, make_pairs
        make_pairs(load_config(PairsConfig, sys.argv[2:], __doc__))
    else:
        main(load_config(Config, sys.argv[1:], __doc__))
