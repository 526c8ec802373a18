"""Judge unit LMs: validation loss, spoken pair benchmarks, GenPPL and auto-BLEU of spoken continuations.

In:  one or several checkpoints, unit files, folders of benchmark wavs with a manifest.jsonl (synth_stories.py).
Out: results.json in each run's folder (other metrics in it stay) and one table of all of them.

    python eval.py config/demo_eval.py --checkpoint out/demo/lm,out/demo/dpo
    python eval.py --checkpoint out/slam --pairs out/bench/tstorycloze --val out/units/val
    python eval.py --resynth_from out/demo/data/tstorycloze        # how well tokeniser and vocoder keep words; no model

Two minutes on two CPU cores for the demo's sets; no disk to speak of.
"""
import functools
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from audio import SAMPLE_RATE, load_audio, resample
from config import load_config
from embedded import resolve, sha256
from model import IGNORE, UnitLM, cross_entropy, find_checkpoint
from speech_tokenizer import SpeechTokenizer, find_codebook
from train import Packed, autocast, checkpoint_fingerprint, merge_results, pick_device, validation_loss
from units import EOS, PAD, UnitReader, require_same, to_tokens, to_units, vocab_size
from vocoder import Vocoder, mel_cepstral_distance, vocoder_for


@dataclass
class Config:
    """Evaluate checkpoints."""
    checkpoint: tuple[str, ...] = ("out/slam",)  # run folders, checkpoint folders or hub ids; several make one table
    train: tuple[str, ...] = ()  # unit files; with them the unigram and bigram models are scored beside the LM
    val: tuple[str, ...] = ()  # unit files for the validation loss
    pairs: tuple[str, ...] = ()  # folders with a manifest.jsonl of wav pairs; the folder's name names the metric
    generate_from: str = ""  # such a folder whose positive wavs' beginnings are continued for GenPPL and auto-BLEU
    n_generate: int = 1000  # continuations, at most
    resynth_from: str = ""  # such a folder whose positive wavs are re-synthesised and transcribed; nothing else
    prompt_seconds: float = 3.0  # beginning of a wav that is the prompt
    new_units: int = 150  # units to generate
    temperature: float = 0.8  # of the generation
    top_k: int = 25  # of the generation
    repetition_penalty: float = 1.1  # of the generation
    may_end: bool = True  # an EOS ends a continuation; else none is drawn, for encoders that hear a cut as an ending
    tokenizer: str = ""  # codebook file; empty: that of the (first) checkpoint's units, embedded or below out/
    vocoder: str = ""  # vocoder file, .safetensors or .pt; empty: one that speaks them
    asr: str = "embedded:whisper-tiny.en"  # Whisper that transcribes the continuations
    judge: str = "embedded:smollm2-135m"  # text LM whose perplexity of the transcripts is GenPPL
    keep_audio: bool = False  # keep the generated wavs beside results.json
    context: int = 1024  # tokens in a row of validation set and pairs
    batch: int = 16  # sequences in a forward pass
    compile: bool = True  # torch.compile of the sampling, on a GPU and where there are several full batches
    seed: int = 0  # of the generation

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = []
        if not (self.val or self.pairs or self.generate_from or self.resynth_from):
            found.append("nothing to do: set val, pairs, generate_from or resynth_from")
        if not self.checkpoint:
            found.append("checkpoint: name at least one")
        return found


# ---------------------------------------------------------------- n-gram models: what a loss means

def ngram_losses(train: list[np.ndarray], val: list[np.ndarray], n_tokens: int) -> tuple[float, float]:
    """Cross-entropy in nats per target of unigram and bigram models, Witten-Bell smoothed lest they be straw men.

    Sequences are tokens `1 units 1`; targets are all but BOS, as for the LM.
    """
    pairs = np.zeros((n_tokens, n_tokens))
    for x in train:
        np.add.at(pairs, (x[:-1].astype(int), x[1:].astype(int)), 1)
    counts = pairs.sum(0)
    unigram = (counts + 1) / (counts + 1).sum()
    kinds = (pairs > 0).sum(1, keepdims=True)  # continuations seen after each token
    bigram = (pairs + kinds * unigram) / np.maximum(pairs.sum(1, keepdims=True) + kinds, 1)
    bigram[kinds[:, 0] == 0] = unigram
    before = np.concatenate([x[:-1] for x in val]).astype(int)
    after = np.concatenate([x[1:] for x in val]).astype(int)
    return float(-np.log(unigram[after]).mean()), float(-np.log(bigram[before, after]).mean())


# ---------------------------------------------------------------- pairs

class Fork(NamedTuple):
    """Two sequences of tokens with the same beginning, in one row that has it once."""
    prefix: list[int]  # at least one token
    first: list[int]  # what follows it; so does
    second: list[int]  # this

    @classmethod
    def of(cls, a: list[int], b: list[int]) -> "Fork":
        """Of two utterances: Fork.of([1, 7, 8, 1], [1, 7, 9, 1]) -> [1, 7], [8, 1], [9, 1]"""
        n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        return cls(a[:n], a[n:], b[n:])

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Targets in prefix, first and second."""
        return len(self.prefix) - 1, len(self.first), len(self.second)

    @property
    def n_inputs(self) -> int:
        return sum(self.lengths)

    def row(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Inputs, targets, positions, and which part each target is of (0 prefix, 1 first, 2 second).

        Positions fall back where the second continuation begins, so that it sees the prefix and not the first
        (`UnitLM.forward`). The prefix's last token stands there again, as it predicts the first token of both.
        """
        p, a, b = map(len, self)
        inputs = [*self.prefix, *self.first[:-1]][:p + a - 1] + [self.prefix[-1], *self.second[:-1]][:b]
        return (inputs, self.prefix[1:] + self.first + self.second, [*range(p + a - 1), *range(p - 1, p + b - 1)],
                [0] * (p - 1) + [1] * a + [2] * b)


def pack(forks: list[Fork], context: int) -> list[np.ndarray]:
    """Rows of forks, by number, nearly full (train.Packed)."""
    pieces = np.array([(i, 0, fork.n_inputs) for i, fork in enumerate(forks)])
    return [row[:, 0] for row in Packed(pieces, context, None)]


def fork_logps(forward: Callable, rows: list[list[Fork]], width: int, device: torch.device, dtype: str) -> Tensor:
    """Log-probabilities (n, 3) of n forks' prefixes, BOS aside, and of each of the two continuations given these.

    Summed over tokens, in fp32. width: the rows are padded on the right to so many tokens; 0: to the longest.
    """
    if device.type == "cpu" and not width:  # one row, which needs no padding
        rows = [[fork for row in rows for fork in row]]
    parts = [[fork.row() for fork in row] for row in rows]
    width = width or max(sum(len(x[0]) for x in row) for row in parts)
    inputs, targets, positions, sums = (torch.full((len(rows), width), fill) for fill in (PAD, IGNORE, 0, 0))
    n = 0
    for b, row in enumerate(parts):
        at = 0
        for ours in row:
            span = slice(at, at := at + len(ours[0]))
            for tensor, values in zip((inputs, targets, positions, sums), ours):
                tensor[b, span] = torch.tensor(values)
            sums[b, span] += 3 * n
            n += 1
    inputs, targets, positions, sums = (put(x, device) for x in (inputs, targets, positions, sums))
    with autocast(device, dtype):
        loss = forward(inputs, targets, positions, reduction="none")[1]
    return -loss.new_zeros(3 * n).index_add(0, sums.flatten(), loss.flatten()).view(n, 3)


def put(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@torch.inference_mode()
def score_forks(lm: UnitLM, forks: list[Fork], context: int, dtype: str, desc: str) -> Tensor:
    """`fork_logps` of all forks, on the CPU, in rows of `context` tokens; as many rows at once as fit into memory."""
    rows, out = pack(forks, max(context, *(fork.n_inputs for fork in forks))), torch.zeros(len(forks), 3)
    batch, at = 64 if lm.device.type == "cuda" else 4, 0
    with tqdm(total=len(forks), disable=None, desc=desc, unit="pair", leave=False) as bar:
        while at < len(rows):
            part = rows[at:at + batch]
            try:
                logps = fork_logps(lm, [[forks[i] for i in row] for row in part], 0, lm.device, dtype)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise SystemExit(f"{desc}: a row of {context} tokens does not fit into the GPU's memory") from None
                batch //= 2
                continue
            out[np.concatenate(part)] = logps.cpu()
            bar.update(sum(map(len, part)))
            at += batch
    return out


def mean_nlls(lm: UnitLM, pairs: list[tuple[list[int], list[int]]], context: int) -> np.ndarray:
    """Mean negative log-likelihood (nats, fp32) of both utterances `1 units 1` of each pair, (n, 2)."""
    forks = [Fork.of(*pair) for pair in pairs]
    prefix, *ends = score_forks(lm, forks, context, "float32", "scoring").double().T
    return torch.stack([-(prefix + end) for end in ends], 1).numpy() / [[len(a) - 1, len(b) - 1] for a, b in pairs]


def pair_accuracy(positive: np.ndarray, negative: np.ndarray) -> dict:
    """Share (%) of pairs whose positive has the lower mean NLL, a tie counting half, with its standard error.

    pair_accuracy([1.0, 2.0], [1.5, 2.0]) -> {"value": 75.0, "se": 25.0, "n": 2}
    """
    correct = np.where(positive == negative, 0.5, positive < negative)
    n = len(correct)
    se = correct.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return {"value": 100 * correct.mean(), "se": 100 * se, "n": n}


def read_manifest(folder: str) -> list[dict]:
    """Pairs of a benchmark folder. SystemExit naming what is missing."""
    path = Path(folder) / "manifest.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no manifest; synth_stories.py writes benchmark folders with one")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            pair = json.loads(line)
            missing = [pair[side] for side in ("positive", "negative") if not (Path(folder) / pair[side]).is_file()]
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"{path}:{number}: not a pair with positive and negative ({e!r})") from None
        if missing:
            raise SystemExit(f"{path}:{number}: {missing[0]} is missing; copy the folder whole")
        pairs.append(pair)
    return pairs


def tokenize_wavs(tokenizer: SpeechTokenizer, folder: Path, names: list[str]) -> list[list[int]]:
    """Wavs of a benchmark folder -> utterances `1 units 1`; kept beside them by (sha256 of the file, tokeniser).

    SystemExit naming a file that holds no usable audio.
    """
    cache = folder / f"units_{tokenizer.fingerprint.codebook_sha256[:12]}.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    keys = [sha256(folder / name) for name in names]
    for name, key in zip(tqdm(names, disable=None, desc=folder.name, unit="wav"), keys):
        try:
            known[key] = known.get(key) or tokenizer.encode(load_audio(folder / name), SAMPLE_RATE)[0].tolist()
        except ValueError as e:
            raise SystemExit(str(e)) from None
    cache.with_suffix(".part").write_text(json.dumps(known))
    cache.with_suffix(".part").replace(cache)
    return [to_tokens(known[key]) for key in keys]


def score_pairs(lm: UnitLM, pairs: list[dict], utterances: list[list[int]], context: int) -> dict:
    """Accuracy over all pairs and, where the manifest has types, of each; utterances: positives, then negatives."""
    nll = mean_nlls(lm, list(zip(utterances[:len(pairs)], utterances[len(pairs):])), context)
    result = pair_accuracy(*nll.T)
    types = [p.get("type") for p in pairs]
    if any(types):
        result["by_type"] = {t: pair_accuracy(*nll[[i for i, u in enumerate(types) if u == t]].T)
                             for t in sorted(set(types))}
    return result


# ---------------------------------------------------------------- generated speech

@functools.cache
def load_asr(asr: str) -> tuple:
    """Whisper by name, once per process: model, feature extractor, tokenizer."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    folder = resolve(asr)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(pick_device())
    return model, WhisperFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def transcribe(waves: list[np.ndarray], asr: str, batch: int = 8) -> list[str]:
    """Whisper's transcripts of waves (T,) at 16 kHz, of at most 30 s each (longer ones are cut); greedy.

    A wave of no samples says nothing.
    """
    model, extractor, tokenizer = load_asr(asr)
    texts, sound = [""] * len(waves), [i for i, w in enumerate(waves) if len(w)]
    for at in tqdm(range(0, len(sound), batch), disable=None, desc="transcribing", leave=False):
        part = sound[at:at + batch]
        x = extractor([waves[i][:30 * SAMPLE_RATE] for i in part], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        x = x.input_features.to(model.device)
        tokens = model.generate(x, attention_mask=torch.ones(x.shape[::2], device=x.device), max_length=200)
        for i, text in zip(part, tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            texts[i] = text.strip()
    return texts


def speak(rows: list[list[int]], tokenizer: SpeechTokenizer, vocoder: Vocoder, batch: int = 16) -> list[np.ndarray]:
    """Tokens of a tokeniser -> waves (T,) at 16 kHz, like lengths together; silence of no length for no tokens."""
    units = [tokenizer.to_units(row) for row in rows]
    order = sorted((i for i, u in enumerate(units) if u), key=lambda i: len(units[i]))
    waves = [np.zeros(0, np.float32)] * len(rows)
    for at in tqdm(range(0, len(order), batch), disable=None, desc="vocoding", leave=False):
        part = order[at:at + batch]
        for i, wave in zip(part, vocoder.synthesize_batch([units[i] for i in part])):
            waves[i] = resample(wave, vocoder.sample_rate, SAMPLE_RATE)
    return waves


def words(text: str) -> list[str]:
    """Word tokens as NLTK cuts them, near enough: words with their apostrophes, numbers, and punctuation marks."""
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)


def auto_bleu(text: str, n: int = 2) -> float:
    """Share of a text's n-gram positions whose n-gram stands elsewhere in it too (SlamKit's auto-BLEU); 0 if too short.

    auto_bleu("a b a b", 2) -> 2/3: "a b" twice, "b a" once
    """
    tokens = words(text)
    grams = list(zip(*(tokens[i:] for i in range(n))))
    counts = {g: grams.count(g) for g in set(grams)}
    return sum(c for c in counts.values() if c > 1) / len(grams) if grams else 0.0


def word_error_rate(reference: str, heard: str) -> tuple[int, int]:
    """(edit distance in words, words of the reference), case and punctuation aside."""
    a, b = (re.findall(r"[\w']+", t.lower()) for t in (reference, heard))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1], len(a)


@functools.cache
def load_judge(judge: str) -> tuple:
    """A text LM by name, once per process: model, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    folder = resolve(judge)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(pick_device())
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def text_perplexity(texts: list[str], judge: str) -> tuple[float, int]:
    """exp of the mean over texts of the mean token NLL (GenPPL, SlamKit's definition), and how many texts were empty.

    Texts of fewer than two tokens have no NLL; they are counted as empty and left out.
    """
    model, tokenizer = load_judge(judge)
    losses = []
    for text in tqdm(texts, disable=None, desc="judging", leave=False):
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        if ids.shape[1] >= 2:
            losses.append(model(ids, labels=ids).loss.item())
    return math.exp(np.mean(losses)) if losses else math.nan, len(texts) - len(losses)


@torch.inference_mode()
def continuation_scores(prompts: list[str], texts: list[str], judge: str, batch: int = 16) -> list[float | None]:
    """Mean log-probability (nats) per token of each text given its prompt's text; None for a text without tokens."""
    model, tokenizer = load_judge(judge)
    known = [tokenizer(p).input_ids or [tokenizer.bos_token_id] for p in prompts]
    new = [tokenizer(f" {t}", add_special_tokens=False).input_ids if t else [] for t in texts]
    both = [a + b for a, b in zip(known, new)]
    scores, order = [None] * len(texts), sorted((i for i, x in enumerate(new) if x), key=lambda i: len(both[i]))
    for at in tqdm(range(0, len(order), batch), disable=None, desc="judging", leave=False):
        part = order[at:at + batch]
        ids = torch.zeros(len(part), len(both[part[-1]]), dtype=torch.long)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for row, i in enumerate(part):
            n = len(both[i])
            ids[row, :n], mask[row, :n], targets[row, len(known[i]):n] = torch.tensor(both[i]), 1, torch.tensor(new[i])
        ids, mask, targets = (x.to(model.device) for x in (ids, mask, targets[:, 1:]))
        loss = cross_entropy(model(ids, attention_mask=mask).logits[:, :-1], targets, "none").sum(1)
        for i, value in zip(part, (loss / (targets != IGNORE).sum(1)).tolist()):
            scores[i] = -value
    return scores


def continue_units(lm: UnitLM, prompts: list[list[int]], new_units: int, batch: int, seed: int, desc: str,
                   may_end: bool = True, compile: bool = False, **sampling) -> list[list[int]]:
    """Units -> sampled continuations (units), batched; prompts of like length share a batch.

    may_end: an EOS ends a continuation; else none is drawn, and all have `new_units` units.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list = [None] * len(prompts)
    generator = torch.Generator(lm.device).manual_seed(seed)
    bar = tqdm(total=len(prompts), disable=None, desc=desc, unit="prompt")
    for at in range(0, len(order), batch):
        part = order[at:at + batch]
        with autocast(lm.device, "bfloat16" if lm.device.type == "cuda" else "float32"):
            new = lm.generate([to_tokens(prompts[i])[:-1] for i in part], new_units, generator=generator,
                              forbid=(PAD,) if may_end else (PAD, EOS), stop=(EOS,),
                              compile=compile and len(part) == batch, **sampling)
        for i, tokens in zip(part, new):
            out[i] = to_units(tokens)
        bar.update(len(part))
    bar.close()
    return out


def generative_metrics(lm: UnitLM, cfg: Config, tokenizer: SpeechTokenizer, vocoder: Vocoder, out: Path) -> dict:
    """GenPPL and auto-BLEU of spoken continuations, on prompt + continuation (as published) and on the continuation."""
    paths = sorted(Path(cfg.generate_from) / p["positive"] for p in read_manifest(cfg.generate_from))[:cfg.n_generate]
    prompts = [tokenizer.encode(load_audio(p)[:round(cfg.prompt_seconds * SAMPLE_RATE)], SAMPLE_RATE)[0].tolist()
               for p in paths]
    new = continue_units(lm, prompts, cfg.new_units, cfg.batch, cfg.seed, "continuing", temperature=cfg.temperature,
                         top_k=cfg.top_k, repetition_penalty=cfg.repetition_penalty, may_end=cfg.may_end,
                         compile=cfg.compile and lm.device.type == "cuda" and len(prompts) >= 4 * cfg.batch)
    whole = speak([p + c for p, c in zip(prompts, new)], tokenizer, vocoder)
    texts, texts_alone = transcribe(whole, cfg.asr), transcribe(speak(new, tokenizer, vocoder), cfg.asr)
    ppl, empty = text_perplexity(texts, cfg.judge)
    ppl_alone, empty_alone = text_perplexity(texts_alone, cfg.judge)
    bleu = [100 * auto_bleu(t) for t in texts]
    settings = {k: v for k, v in asdict(cfg).items() if k in (
        "generate_from", "prompt_seconds", "new_units", "temperature", "top_k", "repetition_penalty", "may_end", "asr",
        "judge", "seed")}
    (out / "generated.jsonl").write_text("".join(
        json.dumps({"prompt": p.name, "text": t, "continuation_text": a}) + "\n"
        for p, t, a in zip(paths, texts, texts_alone)))
    if cfg.keep_audio:
        for path, wave in zip(paths, whole):
            soundfile.write(out / f"generated_{path.stem}.wav", wave, SAMPLE_RATE)
    return {"gen_ppl": {"value": ppl, "n": len(texts) - empty, "empty": empty,
                        "continuation_only": None if math.isnan(ppl_alone) else ppl_alone,
                        "continuation_empty": empty_alone, "settings": settings},
            "auto_bleu": {"value": float(np.mean(bleu)), "se": float(np.std(bleu, ddof=1) / math.sqrt(len(bleu))),
                          "n": len(bleu), "settings": settings}}


def resynthesis_error(cfg: Config, tokenizer: SpeechTokenizer, vocoder: Vocoder) -> dict:
    """How much of speech its units keep: word error rate of the ASR on re-synthesised against original speech, with
    original and predicted durations; and with the former, mel-cepstral distance and the share of clipped samples."""
    waves = [load_audio(Path(cfg.resynth_from) / p["positive"])[:30 * SAMPLE_RATE]
             for p in read_manifest(cfg.resynth_from)]
    if not waves:
        raise SystemExit(f"{cfg.resynth_from}: its manifest is empty")
    encoded = [tokenizer.encode(w, SAMPLE_RATE) for w in tqdm(waves, disable=None, desc="units")]
    units, durations = zip(*encoded)
    vocoder.synthesize(*encoded[0])  # the first call is slower
    started = time.perf_counter()
    spoken = [vocoder.synthesize(*x)[0] for x in encoded]
    seconds = time.perf_counter() - started
    again = [resample(wave, vocoder.sample_rate, SAMPLE_RATE) for wave in spoken]
    predicted = [resample(*vocoder.synthesize(u), SAMPLE_RATE) for u in units]
    heard, errors = transcribe(waves, cfg.asr), {}
    for name, those in (("original_durations", again), ("predicted_durations", predicted)):
        pairs = [word_error_rate(a, b) for a, b in zip(heard, transcribe(those, cfg.asr))]
        errors[name] = round(sum(e for e, _ in pairs) / max(1, sum(n for _, n in pairs)), 4)
    n_samples = sum(map(len, spoken))
    return {"resynthesis_word_error_rate": errors, "mel_cepstral_distance_db": round(float(np.mean(
                [mel_cepstral_distance(a, b) for a, b in zip(waves, again)])), 2),
            "clipped_share": sum(int((np.abs(w) >= 1).sum()) for w in spoken) / n_samples,
            "times_real_time": round(n_samples / vocoder.sample_rate / seconds, 1), "files": len(waves),
            "words": sum(n for _, n in pairs), "hours": round(sum(map(len, waves)) / SAMPLE_RATE / 3600, 3),
            "asr": cfg.asr}


# ---------------------------------------------------------------- all together

def table(rows: dict[str, dict]) -> str:
    """Results of several checkpoints as a text table, one line per metric."""
    metrics = list(dict.fromkeys(m for r in rows.values() for m in r))

    def cell(result):
        if result is None:
            return "-"
        se = result.get("se")
        return f"{result['value']:.2f}" + (f" ± {se:.1f}" if se is not None else "")

    lines = [["", *rows]] + [[m, *(cell(r.get(m)) for r in rows.values())] for m in metrics]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in lines)


def main(cfg: Config) -> None:
    device = pick_device()
    if cfg.resynth_from:
        tokenizer = SpeechTokenizer.load(cfg.tokenizer or "embedded", device.type).base
        vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
        print(json.dumps(resynthesis_error(cfg, tokenizer, vocoder)))
        return
    checkpoints = {name: find_checkpoint(name) for name in cfg.checkpoint}
    fingerprints = {name: checkpoint_fingerprint(folder) for name, folder in checkpoints.items()}
    tokenizer = vocoder = None
    if cfg.pairs or cfg.generate_from:
        tokenizer_name = cfg.tokenizer or find_codebook(next(iter(fingerprints.values())))
        tokenizer = SpeechTokenizer.load(tokenizer_name, device.type)
    if cfg.generate_from:
        vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
    val = UnitReader(*cfg.val) if cfg.val else None
    for name, fingerprint in fingerprints.items():
        if tokenizer:
            require_same(fingerprint, name, tokenizer.fingerprint, f"tokenizer {tokenizer_name}")
        if val:
            require_same(fingerprint, name, val.fingerprint, cfg.val[0])

    baselines = {}
    if cfg.train and val:
        train = UnitReader(*cfg.train)
        require_same(train.fingerprint, cfg.train[0], val.fingerprint, cfg.val[0])
        losses = ngram_losses(*([r.tokens(i) for i in range(len(r))] for r in (train, val)),
                              vocab_size(val.fingerprint.n_units))
        baselines = {f"{name}_loss": {"value": loss, "n": val.n_tokens - len(val)}
                     for name, loss in zip(("unigram", "bigram"), losses)}
    benchmarks = {}
    for folder in cfg.pairs:
        pairs = read_manifest(folder)
        names = [p[side] for side in ("positive", "negative") for p in pairs]
        benchmarks[Path(folder).name] = pairs, tokenize_wavs(tokenizer, Path(folder), names)

    rows = {}
    for name, folder in checkpoints.items():
        lm = UnitLM.from_pretrained(folder).eval().to(device)
        results = dict(baselines)
        if val:
            loss, n = validation_loss(lm, val, cfg.context, cfg.batch, "float32")
            results["val_loss"] = {"value": loss, "n": n}
            results["val_ppl"] = {"value": math.exp(loss), "n": n}
            if val.hours:  # the same for all vocabularies, as units or pieces per second are not
                results["val_bits_per_second"] = {"value": loss * n / math.log(2) / (3600 * val.hours), "n": n}
        for benchmark, (pairs, utterances) in benchmarks.items():
            results[benchmark] = score_pairs(lm, pairs, utterances, cfg.context)
        where = Path(folder).parent if Path(folder).name == "checkpoint" else Path(folder)
        if not where.is_dir():  # a hub id
            where = Path("out") / folder.replace("/", "--")
            where.mkdir(parents=True, exist_ok=True)
        if cfg.generate_from:
            results |= generative_metrics(lm, cfg, tokenizer, vocoder, where)
        merge_results(where / "results.json", results)
        rows[name] = results
    print(table(rows))


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
