"""Direct preference optimisation of a unit LM on pairs of continuations (Rafailov et al. 2023), standalone.

In:  a checkpoint of train.py and pair files (synth_stories.py).
Out: a run folder like train.py's: checkpoint/ · log.jsonl · results.json · reference.pt

    python dpo.py                                    # after config/slam.py: half an hour on a 24 GB GPU, 9 GB of disk
    python dpo.py config/demo_dpo.py                 # a minute on two CPU cores

The reference is the starting checkpoint; its log-probabilities are computed once, so only one model is in memory.
"""
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import load_config
from model import IGNORE, UnitLM, fetch, find_checkpoint
from optim import make_optimizer, schedule, update
from train import Epochs, Run, autocast, checkpoint_fingerprint, pick_device, run_problems
from units import PAD, read_pairs, require_same, to_tokens


@dataclass
class Config:
    """Tune a unit LM on preference pairs. The defaults are the paper's (table 5)."""
    out: str = "out/slam_dpo"  # run folder
    checkpoint: str = "out/slam"  # model to start from, which is also the reference: a run or checkpoint folder
    pairs: str = "out/spoken_swag/pairs_train.jsonl"  # pair file to train on
    val_pairs: str = "out/spoken_swag/pairs_val.jsonl"  # held-out pair file
    beta: float = 0.1  # strength of the pull towards the reference
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's, or IPO's
    label_smoothing: float = 0.0  # share of pairs assumed to be labelled the wrong way round
    length_normalized: bool = False  # log-probabilities per token rather than summed; wants a beta of about 5
    nll_weight: float = 0.0  # of the chosen completion's negative log-likelihood per token, added to the loss
    context: int = 1024  # tokens of prompt and completion; longer prompts lose their beginning
    micro_batch: int = 4  # pairs in a forward pass
    accumulation: int = 16  # forward passes in an optimiser step
    steps: int | None = None  # length of the run, by whichever of these is set: optimiser steps,
    tokens: float | None = None  # completion tokens,
    time_budget_hours: float | None = 0.5  # or hours of training
    lr: float = 5e-5  # peak learning rate
    min_lr: float = 0.0  # floor of the cosine and wsd schedules
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "constant"] = "inverse_sqrt"  # of the learning rate
    warmup: float = 0.01  # share of the run in which the learning rate rises linearly
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.0  # AdamW
    clip: float = 0.5  # largest gradient norm
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation
    log_every: int = 10  # steps
    save_every: int = 200  # steps
    seed: int = 0  # of the order of the pairs
    resume: bool = False  # go on with the run in `out`, if there is one
    overwrite: bool = False  # remove the run in `out` and start anew

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        wrong = [] if self.beta > 0 and 0 <= self.label_smoothing < 0.5 and self.nll_weight >= 0 else [
            "beta must be positive, label_smoothing in [0, 0.5), nll_weight not negative"]
        return run_problems(self) + wrong

    def losses(self, policy: Tensor, reference: Tensor, sequences: list[tuple[list[int], int]]) -> tuple[Tensor, ...]:
        """`dpo_loss` with these settings, of log-probabilities (2, B), chosen and rejected, and their sequences."""
        lengths = torch.tensor([n for _, n in sequences], device=policy.device).view(2, -1)
        return dpo_loss(*policy, *reference, self.beta, self.label_smoothing, self.loss, lengths,
                        self.length_normalized, self.nll_weight)


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


def sequence(prompt: list[int], completion: list[int], context: int) -> tuple[list[int], int]:
    """Units -> tokens `1 prompt completion 1` and how many of them, at the end, are the completion and its EOS.

    A unit that prompt and completion share at the joint stands once, as dedup would leave it.
    sequence([5, 6], [6, 9], 1024) -> [1, 7, 8, 11, 1], 2
    """
    if completion[0] == prompt[-1] and len(completion) > 1:
        completion = completion[1:]
    room = context - len(completion) - 2
    if room < 1:
        raise SystemExit(f"a completion of {len(completion)} units leaves no room for a prompt in context {context}")
    return to_tokens([*prompt[-room:], *completion]), len(completion) + 1


def completion_logp(lm: UnitLM, sequences: list[tuple[list[int], int]], dtype: str) -> Tensor:
    """Summed log-probability (B,) of each sequence's completion and EOS given its prompt; padded on the right."""
    length = max(len(tokens) for tokens, _ in sequences)
    x = torch.full((len(sequences), length), PAD)
    targets = torch.full((len(sequences), length - 1), IGNORE)
    for row, (tokens, n) in enumerate(sequences):
        x[row, :len(tokens)] = torch.tensor(tokens)
        targets[row, len(tokens) - 1 - n:len(tokens) - 1] = torch.tensor(tokens[-n:])
    x, targets = x.to(lm.device), targets.to(lm.device)
    with autocast(lm.device, dtype):
        return -lm(x[:, :-1], targets, reduction="none")[1].sum(1)


def pair_sequences(pairs: list[dict], context: int) -> list[tuple[list[int], int]]:
    """Chosen sequences, then rejected ones."""
    return [sequence(p["prompt"], p[side], context) for side in ("chosen", "rejected") for p in pairs]


@torch.inference_mode()
def all_logps(lm: UnitLM, pairs: list[dict], cfg: Config, desc: str, batch: int = 32) -> Tensor:
    """Log-probabilities (n_pairs, 2) of chosen and rejected, in batches of like length."""
    sequences = pair_sequences(pairs, cfg.context)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    out = torch.zeros(len(sequences))
    for at in tqdm(range(0, len(order), batch), disable=None, desc=desc, leave=False):
        part = order[at:at + batch]
        out[part] = completion_logp(lm, [sequences[i] for i in part], cfg.dtype).float().cpu()
    return out.view(2, -1).T.contiguous()


def reference_logps(lm: UnitLM, pairs: dict[str, list[dict]], cfg: Config, run: Run) -> dict[str, Tensor]:
    """The starting checkpoint's log-probabilities of every pair file, computed once and kept in the run's folder."""
    path = run.out / "reference.pt"
    start = find_checkpoint(cfg.checkpoint)
    digest = hashlib.sha256((fetch(start) / "model.safetensors").read_bytes())
    for file in (cfg.pairs, cfg.val_pairs):
        digest.update(Path(file).read_bytes())
    key = f"{digest.hexdigest()} {cfg.context} {cfg.dtype} {lm.device.type}"
    if path.exists():
        stored = torch.load(path, weights_only=True)
        if stored["key"] == key:
            return stored["logps"]
    if run.step:  # the weights in hand are no longer the reference
        lm = UnitLM.from_pretrained(start).to(lm.device)
    logps = {name: all_logps(lm.eval(), p, cfg, f"reference {name}") for name, p in pairs.items()}
    torch.save({"key": key, "logps": logps}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return logps


def main(cfg: Config) -> None:
    device = pick_device()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    start = find_checkpoint(cfg.checkpoint)
    fingerprint = checkpoint_fingerprint(start)
    pairs = {}
    for name, path in (("train", cfg.pairs), ("val", cfg.val_pairs)):
        theirs, pairs[name] = read_pairs(path)
        require_same(fingerprint, cfg.checkpoint, theirs, path)
        fingerprint = fingerprint if fingerprint.codebook_sha256 else theirs  # SlamKit's do not record it
        if not pairs[name]:
            raise SystemExit(f"{path}: no pairs in it")
    run = Run(cfg, "dpo")
    if run.trainer and run.progress() >= 1:
        return
    lm = UnitLM.from_pretrained(str(run.checkpoint) if run.trainer else start).to(device)
    optimizer = make_optimizer(lm, cfg)
    seen: list[Tensor] = []  # since the last log line: loss, margin, accuracy, chosen and rejected log-probability
    if run.trainer:
        optimizer.load_state_dict(run.trainer["optimizer"])
        seen = [x.to(device) for x in run.trainer["pending"]]
    run.open()
    reference = reference_logps(lm, pairs, cfg, run)
    print(f"{lm.n_params() / 1e6:.1f}M parameters from {cfg.checkpoint}, {len(pairs['train']):,} pairs, on {device}")

    def evaluate() -> None:
        logps = all_logps(lm.eval(), pairs["val"], cfg, "validation")
        loss, chosen, rejected = cfg.losses(logps.T, reference["val"].T, pair_sequences(pairs["val"], cfg.context))
        correct = (logps[:, 0] > logps[:, 1]).float().mean().item()
        record = {"val_dpo_loss": loss.item(), "val_margin": (chosen - rejected).mean().item(),
                  "val_reward_accuracy": (chosen > rejected).float().mean().item(), "val_chosen_preferred": correct}
        run.log(" | ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in record.items()), **record)
        run.results({k: {"value": v, "n": len(logps), "step": run.step} for k, v in record.items()})

    def save(how: Callable) -> None:
        if seen:  # else the log line has just checked
            run.check_finite([torch.stack(seen)[:, 0].mean().item()], norm.item())
        how(lm, optimizer, fingerprint, seen)

    order, size = Epochs(len(pairs["train"]), cfg.seed), cfg.micro_batch * cfg.accumulation
    if not run.step:
        with run.pause():
            evaluate()
    lm.train()
    while run.progress() < 1 and not run.stopping:
        lr = cfg.lr * schedule(cfg.schedule, run.progress(), cfg.warmup, cfg.min_lr / cfg.lr)
        indices = [order[run.step * size + i] for i in range(size)]
        for at in range(0, size, cfg.micro_batch):
            part = indices[at:at + cfg.micro_batch]
            sequences = pair_sequences([pairs["train"][i] for i in part], cfg.context)
            logps = completion_logp(lm, sequences, cfg.dtype).view(2, -1)
            loss, chosen, rejected = cfg.losses(logps, reference["train"][part].T.to(device), sequences)
            (loss / cfg.accumulation).backward()
            seen.append(torch.stack([loss.detach(), (chosen - rejected).mean(), (chosen > rejected).float().mean(),
                                     *logps.detach().mean(1)]))
            run.tokens += sum(n for _, n in sequences)
        norm = update(lm, optimizer, lr, cfg.clip)
        run.step += 1
        run.tick()
        run.agree()
        if run.step % cfg.log_every == 0 or run.progress() >= 1:  # the only host sync
            loss, margin, accuracy, chosen, rejected = torch.stack(seen).mean(0).tolist()
            run.check_finite([loss], norm.item())
            run.tick()
            run.agree()
            run.log(f"loss {loss:.4f} | margin {margin:.3f} | acc {accuracy:.3f} | logp {chosen:.1f} / {rejected:.1f} "
                    f"| lr {lr:.1e} | gnorm {norm.item():.2f} | {run.clock()}", loss=loss, margin=margin,
                    accuracy=accuracy, chosen_logp=chosen, rejected_logp=rejected, lr=lr, gnorm=norm.item())
            seen = []
        if run.step % cfg.save_every == 0 and run.progress() < 1:
            with run.pause():
                save(run.save)
    save(run.finish)
    evaluate()
    print(f"{run.checkpoint}: {run.step} steps, {run.seconds / 60:.1f} min of training")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
