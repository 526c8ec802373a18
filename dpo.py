"""Direct preference optimisation of a unit LM on pairs of continuations (Rafailov et al. 2023), standalone.

In:  a checkpoint of train.py and pair files (synth_stories.py, or `pairs` below).
Out: a run folder like train.py's: checkpoint/ · log.jsonl · results.json

    python dpo.py                                    # the paper's recipe, on the newest pre-trained run under out/
    python dpo.py config/slam_dpo.py                 # the same by name: half an hour on a 24 GB GPU, 9 GB of disk
    python dpo.py config/demo_dpo.py                 # a minute on two CPU cores
    python dpo.py pairs config/align_pairs.py        # pairs of the model's own continuations, the better over the worse

The reference is the starting checkpoint; its log-probabilities are computed once and kept beside the pairs, so only one
model is in memory. A pair is laid out as eval.PrefixPair: the prompt, the chosen completion, and the rejected one, which sees
the same prompt. So the prompt is computed once, and rows are filled with several pairs.
"""
import os
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
from slam.checkpoint import (
    checkpoint_fingerprint,
    find_checkpoint,
    newest_checkpoint,
    newest_pairs,
    sha256_of,
    weights_sha256,
)
from slam.device import compiled, pick_device, put
from slam.metrics import auto_bleu
from slam.optim import make_optimizer, schedule, update
from slam.packing import Epochs
from slam.run import Run, run_problems
from slam.scoring import PrefixPair, pack, pair_logps, row_logps
from slam.speech import continue_units, load_asr, speak, transcribe
from slam.tokenizer import SpeechTokenizer, find_codebook
from slam.units import Fingerprint, read_pairs, require_same, to_tokens, to_units
from slam.vocoder import vocoder_for


@dataclass
class Config:
    """Tune a unit LM on preference pairs. The defaults are the paper's (table 5)."""
    out: str = ""  # run folder; empty: the checkpoint's with _dpo at its end
    checkpoint: str = ""  # model to start from, which is also the reference; empty: the newest pre-trained under out/
    pairs: str = ""  # pair file to train on; empty: the newest pairs_train.jsonl under out/ of the checkpoint's units
    val_pairs: str = ""  # held-out pair file; empty: pairs_val.jsonl beside `pairs`
    beta: float = 0.1  # strength of the pull towards the reference
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's, or IPO's
    label_smoothing: float = 0.0  # share of pairs assumed to be labelled the wrong way round
    length_normalized: bool = False  # log-probabilities per token rather than summed; wants a beta of about 5
    nll_weight: float = 0.0  # of the chosen completion's negative log-likelihood per token, added to the loss
    context: int = 1024  # tokens in a row, of one pair or several; longer prompts lose their beginning
    batch_pairs: int = 64  # pairs in an optimiser step (the paper: micro-batch 4 x accumulation 16)
    micro_batch: int = 4  # rows in a forward pass, as many as fit into memory; the result does not depend on it
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
    activation_checkpointing: bool = False  # keep less for the backward pass and compute it again: less memory, a third more work
    compile: bool | None = None  # torch.compile; none: on a GPU
    log_every: int = 10  # steps
    eval_every: int = 200  # steps: validation pairs, and what the continuations of their prompts say
    n_samples: int = 16  # such continuations, whose transcripts' auto-BLEU tells of repetition; 0: none
    save_every: int = 200  # steps
    seed: int = 0  # of the order of the pairs and the samples
    resume: bool = False  # go on with the run in `out`, if there is one
    overwrite: bool = False  # remove the run in `out` and start anew

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        wrong = [] if self.beta > 0 and 0 <= self.label_smoothing < 0.5 and self.nll_weight >= 0 else [
            "beta must be positive, label_smoothing in [0, 0.5), nll_weight not negative"]
        if self.batch_pairs < 1 or self.micro_batch < 1:
            wrong.append("batch_pairs and micro_batch must be at least 1")
        return run_problems(self) + wrong


# ---------------------------------------------------------------- the loss
def dpo_loss(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, reference_chosen_logp: Tensor,
             reference_rejected_logp: Tensor, beta: float = 0.1, label_smoothing: float = 0.0, loss: str = "sigmoid",
             lengths: Tensor | None = None, length_normalized: bool = False,
             nll_weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """A preference loss, from summed log-probabilities, each (B,).

    With h, the log-ratio of policy and reference of the chosen completion less that of the rejected one,
    loss: `sigmoid`, -log sigmoid(beta h), is DPO (Rafailov et al. 2023, eq. 7); `ipo`, (h - 1 / (2 beta))^2, is IPO
        (Azar et al. 2023, eq. 17).
    label_smoothing: the share of pairs taken to be labelled the wrong way round (Mitchell 2023); their loss is of -h.
    lengths: (2, B), tokens of the chosen and the rejected completions, which the next two need.
    length_normalized: log-probabilities are per token, in h and in the rewards (Lambert et al. 2024).
    nll_weight: of the chosen completion's negative log-likelihood per token, which is added (Pang et al. 2024).

    Returns the mean loss () and the implicit rewards beta log(policy / reference) of chosen and rejected, (B,) each.
    """
    nll = -policy_chosen_logp / lengths[0] if nll_weight else 0.0
    chosen, rejected = policy_chosen_logp - reference_chosen_logp, policy_rejected_logp - reference_rejected_logp
    if length_normalized:
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]

    def of(h: Tensor) -> Tensor:
        return -F.logsigmoid(beta * h) if loss == "sigmoid" else (h - 1 / (2 * beta)).square()

    h = chosen - rejected
    total = (1 - label_smoothing) * of(h) + label_smoothing * of(-h) + nll_weight * nll
    return total.mean(), beta * chosen.detach(), beta * rejected.detach()


def losses(cfg: Config, policy: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`dpo_loss` with these settings, of log-probabilities and lengths, (B, 2) each: chosen, rejected."""
    return dpo_loss(*policy.T, *reference.T, cfg.beta, cfg.label_smoothing, cfg.loss, lengths.T, cfg.length_normalized,
                    cfg.nll_weight)


def preferred(a: Tensor, b: Tensor) -> Tensor:
    """Share of pairs of which `a` is the larger, a tie counting half, ()."""
    return (1 + (a - b).sign()).mean() / 2


# ---------------------------------------------------------------- pairs, and what the reference thinks of them
def prefix_pair(pair: dict, context: int) -> PrefixPair | None:
    """A pair file's units as `1 prompt`, `chosen 1`, `rejected 1`; None if the completions leave the row no prompt.

    A completion that was cut off (`units.write_pairs`) has no EOS: the model did not end there. A unit that prompt and
    completion share at the joint stands once, as dedup would leave it (SlamKit keeps both). A long prompt loses its
    beginning, the same for both completions; a completion is never cut.
    """
    prompt, completions = pair["prompt"], []
    for side in ("chosen", "rejected"):
        units = pair[side]
        tokens = to_tokens(units[1:] if units[0] == prompt[-1] and len(units) > 1 else units)[1:]
        completions.append(tokens if pair.get(f"{side}_ended", True) else tokens[:-1])
    room = context - sum(map(len, completions))
    return PrefixPair(to_tokens(prompt[-room:])[:-1], *completions) if room > 0 else None


def load_pairs(path: str, context: int) -> tuple[Fingerprint, list[PrefixPair]]:
    """Fingerprint and pairs of a file, in tokens; pairs too long for a row are left out, and counted."""
    fingerprint, found = read_pairs(path)
    pairs = [pair for x in found if (pair := prefix_pair(x, context))]
    if len(pairs) < len(found):
        print(f"{path}: {len(found) - len(pairs)} of {len(found)} pairs left out, as their completions fill a row of "
              f"{context} tokens")
    if not pairs:
        raise SystemExit(f"{path}: no pairs in it" if not found else f"{path}: no pair fits; raise context")
    return fingerprint, pairs


def completion_logps(lm: UnitLM, pairs: list[PrefixPair], cfg: Config, desc: str) -> Tensor:
    """Log-probabilities (n, 2) of all pairs' completions given their prompts; on the CPU.

    SystemExit if one is not a number, be it that its row did not fit into memory.
    """
    logps = pair_logps(lm.eval(), pairs, cfg.context, cfg.dtype, desc)[:, 1:]
    if n := int((~logps.isfinite()).any(1).sum()):
        raise SystemExit(f"{desc}: {n} of {len(pairs)} pairs have no log-probability: not enough memory for a row of "
                         f"{cfg.context} tokens, or a model that has diverged")
    return logps


def reference_logps(start: str, lm: UnitLM | None, path: str, pairs: list[PrefixPair], cfg: Config, digest: str) -> Tensor:
    """The starting checkpoint's `completion_logps` of a pair file: computed once, and kept beside it.

    lm: that checkpoint, if it is at hand; digest: sha256 of its weights.
    """
    kept = Path(f"{path}.reference-{sha256_of(digest, pairs, cfg.dtype, pick_device().type)[:16]}.npy")
    if kept.exists():
        return torch.from_numpy(np.load(kept))
    lm = UnitLM.from_pretrained(start).to(pick_device()) if lm is None else lm
    logps = completion_logps(lm, pairs, cfg, f"reference, {Path(path).name}")
    try:
        with open(f"{kept}.{os.getpid()}", "wb") as f:
            np.save(f, logps.numpy())
        os.replace(f.name, kept)
    except OSError as e:
        print(f"{kept}: not kept ({e.strerror}); the next run computes it again", file=sys.stderr)
    return logps


# ---------------------------------------------------------------- a step
class Data(NamedTuple):
    """Pairs, the lengths of their completions (n, 2), and the reference's log-probabilities of these (n, 2)."""
    pairs: list[PrefixPair]
    lengths: Tensor
    reference: Tensor

    @classmethod
    def of(cls, pairs: list[PrefixPair], reference: Tensor, device: torch.device) -> "Data":
        return cls(pairs, torch.tensor([pair.lengths[1:] for pair in pairs], device=device), reference.to(device))


def step_rows(ids: list[int], pairs: list[PrefixPair], cfg: Config, width: int) -> list[list[int]]:
    """A step's pairs in rows. Compiled code, of fixed width, wants whole micro-batches: the last rows may be empty."""
    rows = [[ids[i] for i in row] for row in pack([pairs[i] for i in ids], cfg.context)]
    return rows + [[]] * (-len(rows) % cfg.micro_batch if width else 0)


def backward(forward: Callable, data: Data, rows: list[list[int]], cfg: Config, width: int) -> Tensor:
    """Forward and backward passes of a step's rows of pairs, without a host sync; the step's STATISTICS.

    The loss is the mean over the step's pairs, however they are divided into micro-batches.
    """
    device, total = data.reference.device, 0.0
    for at in range(0, len(rows), cfg.micro_batch):
        part = rows[at:at + cfg.micro_batch]
        logps = row_logps(forward, [[data.pairs[i] for i in row] for row in part], width, device, cfg.dtype)[:, 1:]
        ids = put(torch.tensor([i for row in part for i in row]), device)
        lengths = data.lengths[ids]
        loss, chosen, rejected = losses(cfg, logps, data.reference[ids], lengths)
        share = len(ids) / cfg.batch_pairs
        (share * loss).backward()
        total += share * torch.stack([loss.detach(), (chosen - rejected).mean(), preferred(chosen, rejected),
                                      *logps.detach().mean(0), *lengths.float().mean(0)])
    return total


# ---------------------------------------------------------------- the loop
STATISTICS = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_length", "rejected_length")


def complete(cfg: Config) -> Config:
    """Fill in what was left empty, and say what it is. SystemExit if there is nothing to start from."""
    checkpoint = cfg.checkpoint or newest_checkpoint("out", "train")
    pairs = cfg.pairs or newest_pairs(checkpoint)
    run = checkpoint.rstrip("/").removesuffix("/checkpoint")
    out = cfg.out or f"{run if Path(run).is_dir() else 'out/' + run.replace('/', '--')}_dpo"
    full = replace(cfg, checkpoint=checkpoint, pairs=pairs, out=out,
                   val_pairs=cfg.val_pairs or str(Path(pairs).with_name("pairs_val.jsonl")))
    said = [f"{k} {getattr(full, k)}" for k in ("checkpoint", "pairs", "out") if not getattr(cfg, k)]
    if said:
        how = "" if replace(Config(), **{k: getattr(cfg, k) for k in ("out", "checkpoint", "pairs", "val_pairs",
                                                                      "resume", "overwrite")}) != cfg else \
            "the paper's recipe (table 5, config/slam_dpo.py): "
        print(f"{how}{', '.join(said)}")
    return full


def main(cfg: Config) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("dpo.py trains on one GPU: start it without torchrun")
    cfg, device = complete(cfg), pick_device()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    start = find_checkpoint(cfg.checkpoint)
    for path in (start, cfg.pairs, cfg.val_pairs):
        if Path(path).resolve().is_relative_to(Path(cfg.out).resolve()):
            raise SystemExit(f"{path} lies in the run's own folder, {cfg.out}; choose another --out")
    fingerprint, pairs = checkpoint_fingerprint(start), {}
    for name, path in (("train", cfg.pairs), ("val", cfg.val_pairs)):
        theirs, pairs[name] = load_pairs(path, cfg.context)
        require_same(fingerprint, cfg.checkpoint, theirs, path)
        fingerprint = fingerprint if fingerprint.codebook_sha256 else theirs  # SlamKit's do not record it
    run = Run(cfg, "dpo")
    digest = weights_sha256(start)
    run.starts_from(checkpoint=digest, **{name: sha256_of(x) for name, x in pairs.items()})
    if run.trainer and run.progress() >= 1 and run.evaluated("val_dpo_loss"):
        return
    lm = UnitLM.from_pretrained(str(run.checkpoint) if run.trainer else start).to(device)
    lm.set_activation_checkpointing(cfg.activation_checkpointing)
    optimizer = make_optimizer(lm, cfg)
    seen: list[Tensor] = []  # of the steps since the last log line: what STATISTICS names
    if run.trainer:
        optimizer.load_state_dict(run.trainer["optimizer"])
        seen = [x.to(device) for x in run.trainer["pending"]]
        run.trainer = None  # the memory
    listen = listener(cfg, fingerprint)
    train, val = (Data.of(pairs[name], reference_logps(start, None if run.step else lm, path, pairs[name], cfg, digest),
                          where) for name, path, where in (("train", cfg.pairs, device), ("val", cfg.val_pairs, "cpu")))
    run.open()
    print(f"{lm.n_params() / 1e6:.1f}M parameters from {cfg.checkpoint}, {len(train.pairs):,} pairs of on average "
          f"{np.mean([pair.n_inputs for pair in train.pairs]):.0f} tokens, on {device}")

    def evaluate() -> None:
        logps = completion_logps(lm, val.pairs, cfg, "validation")
        loss, chosen, rejected = losses(cfg, logps, val.reference, val.lengths)
        record = {"val_dpo_loss": loss.item(), "val_margin": (chosen - rejected).mean().item(),
                  "val_reward_accuracy": preferred(chosen, rejected).item(),
                  "val_chosen_preferred": preferred(*logps.T).item()}
        texts = listen(lm, [pair.prefix for pair in val.pairs[:cfg.n_samples]]) if listen else []
        results = {k: {"value": v, "n": len(logps), "step": run.step} for k, v in record.items()}
        if texts:
            record["sample_auto_bleu"] = 100 * float(np.mean([auto_bleu(text) for text in texts]))
        run.log(" | ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in record.items()), **record, samples=texts)
        run.results(results)
        lm.train()

    def save(how: Callable) -> None:
        if seen:  # else the log line has just checked
            run.check_finite([torch.stack(seen)[:, 0].mean().item()], norm.item())
        how(lm, optimizer, fingerprint, seen)

    forward, order, norm = compiled(lm, cfg.compile), Epochs(len(train.pairs), cfg.seed), torch.zeros(())
    width = cfg.context if forward is not lm else 0  # compiled code wants one shape

    def batch(step: int) -> list[list[int]]:
        """Rows of pairs of an optimiser step: a pure function of (seed, step)."""
        return step_rows([order[step * cfg.batch_pairs + i] for i in range(cfg.batch_pairs)], train.pairs, cfg, width)

    lm.train()
    with run.pause():
        if not run.step or run.step % cfg.eval_every == 0 and run.progress() < 1 and not run.evaluated("val_dpo_loss"):
            evaluate()  # also what a kill after the last save prevented
        if forward is not lm and run.progress() < 1:  # compile before the clock runs
            backward(forward, train, batch(run.step)[:cfg.micro_batch], cfg, width)
            optimizer.zero_grad(set_to_none=True)
    while run.progress() < 1 and not run.stopping:
        lr = cfg.lr * schedule(cfg.schedule, run.progress(), cfg.warmup, cfg.min_lr / cfg.lr)
        rows = batch(run.step)
        seen.append(backward(forward, train, rows, cfg, width))
        norm = update(lm, optimizer, lr, cfg.grad_clip)
        run.step += 1
        run.tokens += sum(sum(train.pairs[i].lengths[1:]) for row in rows for i in row)
        run.tick()
        run.agree()
        if run.step % cfg.log_every == 0 or run.progress() >= 1:  # the only host sync
            mean = dict(zip(STATISTICS, torch.stack(seen).mean(0).tolist()))
            run.check_finite([mean["loss"]], norm.item())
            run.tick()
            run.agree()
            run.log(f"loss {mean['loss']:.4f} | margin {mean['margin']:.3f} | acc {mean['accuracy']:.3f} | logp "
                    f"{mean['chosen_logp']:.1f} / {mean['rejected_logp']:.1f} | length {mean['chosen_length']:.1f} / "
                    f"{mean['rejected_length']:.1f} | lr {lr:.1e} | gnorm {norm.item():.2f} | {run.clock()}", **mean,
                    lr=lr, gnorm=norm.item())
            seen = []
        if run.step % cfg.save_every == 0 and run.progress() < 1:
            with run.pause():
                save(run.save)
        if run.step % cfg.eval_every == 0 and run.progress() < 1:
            with run.pause():
                evaluate()
    with run.pause():
        save(run.finish)
        evaluate()
    print(f"{run.checkpoint}: {run.step} steps, {run.seconds / 60:.1f} min of training")


ASR = "embedded:whisper-tiny.en"  # that listens to samples while training


def listener(cfg: Config, fingerprint: Fingerprint) -> Callable | None:
    """A function of a model and prompts in tokens: what the ASR hears in the prompts with their continuations.

    5 s, drawn as eval.py does but with no repetition penalty, which would hide what it is to show. None, and why, if
    there is nothing that speaks these units.
    """
    if not cfg.n_samples:
        return None
    try:
        tokenizer = SpeechTokenizer.load(find_codebook(fingerprint), pick_device().type)
        vocoder, _ = vocoder_for(tokenizer, "")
        load_asr(ASR)
    except SystemExit as e:
        print(f"no samples are taken while training: {e}", file=sys.stderr)
        return None

    def listen(lm: UnitLM, prompts: list[list[int]]) -> list[str]:
        units = [to_units(prompt) for prompt in prompts]
        new = continue_units(lm, units, 100, 16, cfg.seed, "samples", temperature=0.8, top_k=25)
        return transcribe(speak([u + x for u, x in zip(units, new)], tokenizer, vocoder), ASR)

    return listen


if __name__ == "__main__":
    if sys.argv[1:2] == ["pairs"]:
        from slam.align_pairs import PairsConfig, make_pairs
        make_pairs(load_config(PairsConfig, sys.argv[2:], __doc__))
    else:
        main(load_config(Config, sys.argv[1:], __doc__))
