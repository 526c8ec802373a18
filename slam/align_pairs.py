"""slam.align_pairs."""
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model import UnitLM
from slam.checkpoint import (
    checkpoint_fingerprint,
    find_checkpoint,
    newest_checkpoint,
    newest_pairs,
    sha256_of,
    weights_sha256,
)
from slam.device import pick_device
from slam.metrics import auto_bleu
from slam.speech import continuation_scores, continue_units, speak, transcribe
from slam.tokenizer import SpeechTokenizer, find_codebook
from slam.units import Fingerprint, UnitReader, read_pairs, require_same, write_pairs
from slam.vocoder import vocoder_for


# ---------------------------------------------------------------- on-policy pairs
@dataclass
class PairsConfig:
    """Make preference pairs of a model's own continuations (AlignSLM, Lin et al. 2024, arXiv 2411.01834)."""
    out: str = "out/align"  # folder: pairs_train.jsonl, pairs_val.jsonl, candidates.jsonl; a killed run goes on in it
    checkpoint: str = ""  # model that continues; empty: the newest pre-trained under out/
    prompts: str = ""  # pair file whose prompts are continued, or unit files whose utterances' beginnings are; empty:
    # the newest pairs_train.jsonl under out/ of the checkpoint's units
    n_prompts: int = 10_000  # prompts, at most, drawn by the seed
    n_val: int = 200  # pairs that are held out
    prompt_units: int = 60  # of an utterance's beginning; 3 s
    n: int = 8  # continuations of each prompt
    new_units: int = 100  # of a continuation; 5 s
    temperature: float = 1.0  # of the continuations
    top_k: int = 50  # draw from the k most likely units
    repetition_penalty: float = 1.0  # of the continuations
    allow_eos: bool = True  # an EOS ends a continuation
    asr: str = "embedded:whisper-tiny.en"  # Whisper that transcribes them
    judge: str = "embedded:smollm2-135m"  # text LM whose mean log-probability per token, given the prompt's text, ranks
    max_auto_bleu: float = 0.1  # what repeats bigrams as often as this is never chosen,
    min_words: int = 4  # nor what has fewer words
    min_gap: float = 0.5  # nats per text token between chosen and rejected; closer ones give no pair
    tokenizer: str = ""  # codebook file; empty: that of the checkpoint's units
    vocoder: str = ""  # vocoder file; empty: one that speaks them
    batch: int = 8  # prompts continued together
    seed: int = 0  # of prompts and continuations
    overwrite: bool = False  # start anew instead of going on

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = [] if self.n >= 2 else ["n: a pair needs at least 2 continuations"]
        return found if min(self.batch, self.new_units, self.prompt_units, self.n_prompts) >= 1 else [
            *found, "batch, new_units, prompt_units and n_prompts must be at least 1"]


def choose(candidates: list[dict], cfg: PairsConfig) -> tuple[dict, dict] | None:
    """The best and the worst of {"text", "score", "auto_bleu"}; None if nothing may be chosen or they are too close.

    score: mean log-probability per text token; None, with which a candidate is out, for one without words.
    """
    heard = [c for c in candidates if c["score"] is not None]
    fine = [c for c in heard if c["auto_bleu"] < cfg.max_auto_bleu and len(c["text"].split()) >= cfg.min_words]
    if not fine:
        return None
    best, worst = max(fine, key=lambda c: c["score"]), min(heard, key=lambda c: c["score"])
    return (best, worst) if best is not worst and best["score"] - worst["score"] >= cfg.min_gap else None


def read_prompts(cfg: PairsConfig, fingerprint: Fingerprint) -> list[dict]:
    """Prompts {"id", "prompt" (units)} and, where it is known, "prompt_text"; at most n_prompts, drawn by the seed."""
    if cfg.prompts.endswith(".jsonl"):
        theirs, pairs = read_pairs(cfg.prompts)
        found = [{k: p[k] for k in ("id", "prompt", "prompt_text") if k in p} for p in pairs]
    else:
        reader = UnitReader(cfg.prompts)
        theirs, ids = reader.fingerprint, reader.ids()
        found = [{"id": ids[i], "prompt": reader.units(i)[:cfg.prompt_units].tolist()}
                 for i in np.flatnonzero(reader.lengths - 2 >= cfg.prompt_units)]
    require_same(fingerprint, cfg.checkpoint, theirs, cfg.prompts)
    order = np.random.default_rng(cfg.seed).permutation(len(found))[:cfg.n_prompts]
    return [found[i] for i in order]


def make_pairs(cfg: PairsConfig) -> None:
    """Continue, hear, score and choose; candidates.jsonl keeps every continuation, its transcript and its score."""
    checkpoint = cfg.checkpoint or newest_checkpoint("out", "train")
    cfg = replace(cfg, checkpoint=checkpoint, prompts=cfg.prompts or newest_pairs(checkpoint))
    start, device, out = find_checkpoint(checkpoint), pick_device(), Path(cfg.out)
    fingerprint = checkpoint_fingerprint(start)
    tokenizer = SpeechTokenizer.load(cfg.tokenizer or find_codebook(fingerprint), device.type)
    require_same(fingerprint, checkpoint, tokenizer.fingerprint, "tokenizer")
    vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
    prompts = read_prompts(cfg, fingerprint)
    # What decides the candidates; how one is chosen may change.
    settings = {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "overwrite", "n_val", "max_auto_bleu", "min_words", "min_gap")}
    settings |= {"weights": weights_sha256(start), "drawn": sha256_of(prompts)}
    path, header = out / "candidates.jsonl", json.dumps(settings)
    if not path.exists() and any(out.glob("pairs_*.jsonl")):
        raise SystemExit(f"{out} holds pairs that `dpo.py pairs` has not made; choose another --out")
    lines = [] if cfg.overwrite or not path.exists() else path.read_text().split("\n")[:-1]  # one may be cut
    if lines and json.loads(lines[0]) != settings:
        changed = [f"{k} was {json.loads(lines[0]).get(k)!r}, now {v!r}" for k, v in settings.items()
                   if json.loads(lines[0]).get(k) != v]
        raise SystemExit(f"{path} was made with other settings ({'; '.join(changed)}); choose another --out, or "
                         f"--overwrite")
    n_done = len(lines[1:]) // cfg.batch  # batches are drawn together, so a part of one is of no use
    n_done += len(lines) - 1 == len(prompts) and len(prompts) % cfg.batch > 0
    lines = [header, *lines[1:][:n_done * cfg.batch]]
    out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text("".join(line + "\n" for line in lines))
    os.replace(path.with_suffix(".part"), path)
    lm = UnitLM.from_pretrained(start).eval().to(device)
    with open(path, "a") as f, tqdm(total=len(prompts), initial=len(lines) - 1, disable=None, unit="prompt") as bar:
        for number in range(n_done, -(-len(prompts) // cfg.batch)):
            part = prompts[number * cfg.batch:][:cfg.batch]
            f.write("".join(json.dumps(x) + "\n" for x in continuations(cfg, lm, tokenizer, vocoder, part, number)))
            f.flush()
            bar.update(len(part))
    pairs = []
    for line in path.read_text().splitlines()[1:]:
        found = json.loads(line)
        candidates = [{"ended": has_ended(c["units"], cfg)} | c for c in found.pop("candidates")]  # older ones lack it
        if chosen := choose(candidates, cfg):
            pairs.append(found | {f"{side}{end}": c[key] for side, c in zip(("chosen", "rejected"), chosen) for end, key
                                  in (("", "units"), ("_ended", "ended"), ("_text", "text"), ("_score", "score"))})
    if len(pairs) <= cfg.n_val:
        raise SystemExit(f"{len(pairs)} pairs from {len(prompts)} prompts, and n_val, {cfg.n_val}, are to be held out; "
                         f"more prompts, a smaller min_gap or a larger max_auto_bleu give more; {path} is kept")
    for name, part in (("val", pairs[:cfg.n_val]), ("train", pairs[cfg.n_val:])):
        write_pairs(out / f"pairs_{name}.jsonl", tokenizer.fingerprint, part)
    gap = np.mean([p["chosen_score"] - p["rejected_score"] for p in pairs])
    print(f"{out}: {len(pairs):,} pairs from {len(prompts):,} prompts, {gap:.2f} nats per text token apart; "
          f"{len(prompts) - len(pairs):,} prompts gave none")


def has_ended(units: list[int], cfg: PairsConfig) -> bool:
    """Whether an EOS ended a continuation; else it was cut off at `new_units` (`UnitLM.generate`)."""
    return len(units) < cfg.new_units


def continuations(cfg: PairsConfig, lm: UnitLM, tokenizer: SpeechTokenizer, vocoder, prompts: list[dict],
                  number: int) -> list[dict]:
    """Batch `number` of prompts with their "candidates": {"units", "ended", "text", "score", "auto_bleu"} each."""
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
    found = [{"units": u, "ended": has_ended(u, cfg), "text": t, "score": s, "auto_bleu": auto_bleu(t)}
             for u, t, s in zip(new, texts, scores)]
    return [p | {"candidates": found[i * cfg.n:][:cfg.n]} for i, p in enumerate(prompts)]
