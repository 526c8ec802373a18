"""Preference pairs of a model's own continuations (AlignSLM, Lin et al. 2024), and samples while dpo.py trains.

In:  a checkpoint, and prompts from a pair file or the beginnings of utterances in unit files.
Out: pairs_train.jsonl · pairs_val.jsonl · candidates.jsonl (all continuations with transcripts and scores)

    python dpo.py pairs config/align_pairs.py
    python dpo.py pairs --prompts=out/units/val --n_prompts=100 --n_val=10 --out=out/own_pairs

The model continues each prompt several times, Whisper transcribes the continuations, a text LM scores the transcripts.
The best one that does not repeat itself is chosen, the worst one is rejected.
"""
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import UnitLM
from slam import checkpoint as folders
from slam.device import pick_device
from slam.metrics import auto_bleu
from slam.speech import continuation_scores, continue_units, load_asr, speak, transcribe
from slam.tokenizer import SpeechTokenizer, find_codebook
from slam.units import Fingerprint, UnitReader, read_pairs, require_same, sha256_of, to_units, write_atomic, write_pairs
from slam.vocoder import vocoder_for


@dataclass
class PairsConfig:
    """Make preference pairs of a model's own continuations (AlignSLM, Lin et al. 2024, arXiv 2411.01834)."""
    out: str = "out/align"  # folder of the three files; a killed run continues in it
    checkpoint: str = ""  # model that continues the prompts; empty: the newest pre-trained one under out/
    prompts: str = ""  # pair file with the prompts, or unit files whose utterances' beginnings are prompts; empty:
    # the newest pairs_train.jsonl under out/ of the checkpoint's units
    n_prompts: int = 10_000  # prompts at most, drawn by the seed
    n_val: int = 200  # pairs to hold out
    prompt_units: int = 60  # length of a prompt from unit files; 3 s
    n: int = 8  # continuations of each prompt
    new_units: int = 100  # longest continuation; 5 s
    temperature: float = 1.0  # of the sampling
    top_k: int = 50  # sample from the k most likely units
    repetition_penalty: float = 1.0  # of the sampling
    allow_eos: bool = True  # an EOS ends a continuation; false: none is drawn
    asr: str = "embedded:whisper-tiny.en"  # Whisper that transcribes them
    judge: str = "embedded:smollm2-135m"  # text LM that scores: mean log-probability per token, given the prompt's text
    max_auto_bleu: float = 0.1  # a continuation with this auto-BLEU or more is never chosen,
    min_words: int = 4  # nor is one with fewer words
    min_gap: float = 0.5  # smallest difference of the scores in a pair, in nats per text token
    tokenizer: str = ""  # codebook file; empty: that of the checkpoint's units
    vocoder: str = ""  # vocoder file; empty: one that speaks them
    batch: int = 8  # prompts continued together
    seed: int = 0  # of prompts and continuations
    overwrite: bool = False  # start anew instead of continuing

    def problems(self) -> list[str]:
        found = [] if self.n >= 2 else ["n: a pair needs at least 2 continuations"]
        if min(self.batch, self.new_units, self.prompt_units, self.n_prompts) < 1:
            found.append("batch, new_units, prompt_units and n_prompts must be at least 1")
        if min(self.n_val, self.temperature, self.top_k, self.seed) < 0 or self.repetition_penalty <= 0:
            found.append("n_val, temperature, top_k, seed must not be negative, repetition_penalty is positive")
        return found


def choose(candidates: list[dict], cfg: PairsConfig) -> tuple[dict, dict] | None:
    """The best and the worst of candidates {"text", "score", "auto_bleu"}; None if there is no such pair.

    Scores -2, -3, -4, of which the first repeats itself, give (-3, -4). A score of None (no words) is left out.
    """
    heard = [c for c in candidates if c["score"] is not None]
    fine = [c for c in heard if c["auto_bleu"] < cfg.max_auto_bleu and len(c["text"].split()) >= cfg.min_words]
    if not fine:
        return None
    best, worst = max(fine, key=lambda c: c["score"]), min(heard, key=lambda c: c["score"])
    return (best, worst) if best is not worst and best["score"] - worst["score"] >= cfg.min_gap else None


def read_prompts(cfg: PairsConfig, fingerprint: Fingerprint) -> list[dict]:
    """Prompts {"id", "prompt" (units), "prompt_text" if known}, at most `n_prompts`, in an order drawn by the seed."""
    if cfg.prompts.endswith(".jsonl"):
        theirs, pairs = read_pairs(cfg.prompts)
        found = [{k: p[k] for k in ("id", "prompt", "prompt_text") if k in p} for p in pairs]
    else:
        reader = UnitReader(cfg.prompts)
        theirs, ids = reader.fingerprint, reader.ids()
        found = [{"id": ids[i], "prompt": reader.units(i)[:cfg.prompt_units].tolist()}
                 for i in np.flatnonzero(reader.lengths - 2 >= cfg.prompt_units)]
    require_same(fingerprint, cfg.checkpoint, theirs, cfg.prompts)
    return [found[i] for i in np.random.default_rng(cfg.seed).permutation(len(found))[:cfg.n_prompts]]


def continuations(cfg: PairsConfig, lm: UnitLM, tokenizer: SpeechTokenizer, vocoder, prompts: list[dict],
                  number: int) -> list[dict]:
    """Batch `number` of prompts, each with "prompt_text" and "candidates" {"units", "text", "score", "auto_bleu"}."""
    units = [p["prompt"] for p in prompts for _ in range(cfg.n)]
    seed = int(np.random.default_rng((cfg.seed, number)).integers(2**31))
    new = continue_units(lm, units, cfg.new_units, len(units), seed, "", allow_eos=cfg.allow_eos,
                         temperature=cfg.temperature, top_k=cfg.top_k, repetition_penalty=cfg.repetition_penalty)
    unheard = [p for p in prompts if "prompt_text" not in p]
    texts = transcribe(speak([p["prompt"] for p in unheard] + new, tokenizer, vocoder), cfg.asr)
    for p, text in zip(unheard, texts):
        p["prompt_text"] = text
    texts = texts[len(unheard):]
    scores = continuation_scores([p["prompt_text"] for p in prompts for _ in range(cfg.n)], texts, cfg.judge)
    found = [{"units": u, "text": t, "score": s, "auto_bleu": auto_bleu(t)} for u, t, s in zip(new, texts, scores)]
    return [p | {"candidates": found[i * cfg.n:][:cfg.n]} for i, p in enumerate(prompts)]


def make_pairs(cfg: PairsConfig) -> None:
    """Write the three files. SystemExit if `out` holds other pairs or candidates, or if there are too few pairs."""
    # ------------------------------------------------------------ settings
    checkpoint = cfg.checkpoint or folders.newest_checkpoint("out", "train")
    cfg = replace(cfg, checkpoint=checkpoint, prompts=cfg.prompts or folders.newest_pairs(checkpoint))
    fingerprint, device, out = folders.checkpoint_fingerprint(checkpoint), pick_device(), Path(cfg.out)
    tokenizer = SpeechTokenizer.load(cfg.tokenizer or find_codebook(fingerprint), device.type)
    require_same(fingerprint, checkpoint, tokenizer.fingerprint, "tokenizer")
    vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
    prompts = read_prompts(cfg, fingerprint)

    # ------------------------------------------------------------ what an earlier run left, in whole batches
    settings = {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "overwrite", "n_val", "max_auto_bleu", "min_words", "min_gap")}  # these only choose among candidates
    settings |= {"weights": folders.weights_sha256(checkpoint), "drawn": sha256_of(prompts)}
    path = out / "candidates.jsonl"
    if not path.exists() and any(out.glob("pairs_*.jsonl")):
        raise SystemExit(f"{out} holds pairs that `dpo.py pairs` has not made; choose another --out")
    lines = path.read_text().split("\n")[:-1] if path.exists() and not cfg.overwrite else []  # the last may be cut
    old, done = json.loads(lines[0]) if lines else settings, lines[1:]
    if changed := [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in settings.items() if old.get(k) != v]:
        raise SystemExit(f"{path} was made with other settings ({'; '.join(changed)}); choose another --out, or "
                         f"--overwrite")
    if len(done) < len(prompts):
        done = done[:len(done) // cfg.batch * cfg.batch]
    write_atomic(path, "".join(f"{line}\n" for line in [json.dumps(settings), *done]))

    # ------------------------------------------------------------ candidates
    lm = UnitLM.from_pretrained(checkpoint).eval().to(device)
    with open(path, "a") as f:
        for at in tqdm(range(len(done), len(prompts), cfg.batch), disable=None, unit="batch"):
            batch = continuations(cfg, lm, tokenizer, vocoder, prompts[at:at + cfg.batch], at // cfg.batch)
            f.write("".join(json.dumps(x) + "\n" for x in batch))
            f.flush()

    # ------------------------------------------------------------ pairs
    pairs = []
    for line in path.read_text().splitlines()[1:]:
        pair = json.loads(line)
        if chosen := choose(pair.pop("candidates"), cfg):
            for side, c in zip(("chosen", "rejected"), chosen):  # one of new_units was cut off, a shorter one ended
                pair |= {side: c["units"], f"{side}_ended": len(c["units"]) < cfg.new_units,
                         f"{side}_text": c["text"], f"{side}_score": c["score"]}
            pairs.append(pair)
    if len(pairs) <= cfg.n_val:
        raise SystemExit(f"{len(pairs)} pairs from {len(prompts)} prompts, but {cfg.n_val} (n_val) are to be held out; "
                         f"more prompts, a smaller min_gap or a larger max_auto_bleu give more; {path} is kept")
    for name, part in (("val", pairs[:cfg.n_val]), ("train", pairs[cfg.n_val:])):
        write_pairs(out / f"pairs_{name}.jsonl", tokenizer.fingerprint, part)
    gap = np.mean([p["chosen_score"] - p["rejected_score"] for p in pairs])
    print(f"{out}: {len(pairs):,} pairs from {len(prompts):,} prompts, {gap:.2f} nats per text token apart; "
          f"{len(prompts) - len(pairs):,} prompts gave none")


# ---------------------------------------------------------------- samples while training
def hear_samples(lm: torch.nn.Module, prompts: list[list[int]], fingerprint: Fingerprint, seed: int,
                 asr: str = "embedded:whisper-tiny.en") -> dict:
    """Continue prompts (tokens) -> {"samples": transcripts with the prompt, "sample_auto_bleu": their mean in %}.

    100 units (5 s) each, sampled as in eval.py but without a repetition penalty, which would hide repetition. Prints
    why and returns {} if there is no tokeniser, vocoder or Whisper for these units.
    """
    try:
        tokenizer = SpeechTokenizer.load(find_codebook(fingerprint), pick_device().type)
        vocoder, _ = vocoder_for(tokenizer, "")
        load_asr(asr)
    except SystemExit as e:
        print(f"no samples: {e}", file=sys.stderr)
        return {}
    units = [to_units(prompt) for prompt in prompts]
    new = continue_units(lm, units, 100, 16, seed, "samples", temperature=0.8, top_k=25)
    texts = transcribe(speak([u + x for u, x in zip(units, new)], tokenizer, vocoder), asr)
    return {"samples": texts, "sample_auto_bleu": 100 * float(np.mean([auto_bleu(text) for text in texts]))}
