"""Judge unit LMs: validation loss, spoken pair benchmarks, GenPPL and auto-BLEU of spoken continuations.

In:  one or several checkpoints, unit files, benchmarks as downloaded or manifests of pairs (benchmarks.py).
Out: results.json in each run's folder (other metrics in it stay) and one table of all of them.

    python eval.py config/demo_eval.py --checkpoint out/demo/lm,out/demo/dpo
    python eval.py --checkpoint out/slam --benchmark sblimp --path sLM21-dataset --val out/units/val
    python eval.py plot --run out/slam --run out/slam_dpo          # results and losses over compute, as in the paper
    python eval.py --resynth_from out/demo/data/tstorycloze        # how well tokeniser and vocoder keep words; no model

Two minutes on two CPU cores for the demo's sets; no disk to speak of.
"""
import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import soundfile
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from audio import SAMPLE_RATE, load_audio, resample
from benchmarks import SUBSETS, Benchmark, read_benchmark, read_manifest
from config import load_config
from embedded import cache_dir, resolve, sha256
from figures import PlotConfig, __doc__ as figures_help, plot
from model import IGNORE, UnitLM, cross_entropy, find_checkpoint, weights_sha256
from speech_tokenizer import SpeechTokenizer, find_codebook
from train import (Packed, autocast, checkpoint_fingerprint, git_commit, merge_results, pick_device,
                   validation_loss)
from units import EOS, PAD, UnitReader, require_same, to_tokens, to_units, vocab_size
from vocoder import Vocoder, mel_cepstral_distance, vocoder_for


@dataclass
class Config:
    """Evaluate checkpoints."""
    checkpoint: tuple[str, ...] = ("out/slam",)  # run folders, checkpoint folders or hub ids; several make one table
    train: tuple[str, ...] = ()  # unit files; with them the unigram and bigram models are scored beside the LM
    val: tuple[str, ...] = ()  # unit files for the validation loss
    benchmark: tuple[Literal["sblimp", "swuggy", "sstorycloze", "tstorycloze", "salmon"], ...] = ()  # pairs to score,
    path: tuple[str, ...] = ()  # each as it was downloaded, in such a folder: one for each of `benchmark`, or for all
    split: str = "dev"  # of sblimp and swuggy
    max_left_out: float = 0.01  # share of a benchmark's pairs that may be left out
    manifest: tuple[str, ...] = ()  # other pairs: manifests (benchmarks.py), or folders with a manifest.jsonl
    write_manifest: str = ""  # write the benchmark's pairs to this file, and nothing else
    score: Literal["mean", "sum"] = "mean"  # of the negative log-likelihoods of an utterance's tokens
    score_eos: bool = True  # whether its end is one of them,
    score_prompt: bool = True  # and whether what both of a pair begin with is
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"  # of the model in pairs and validation loss; the
    # log-softmax is fp32 (SlamKit: all is fp32, or with its `model=slam` bfloat16). auto: bfloat16 where it is fast
    text_judge: str = ""  # text LM that scores the transcripts of pairs, where there are any, as an upper bound
    generate_from: str = ""  # one of these, a manifest or a benchmark's name, whose positives' beginnings are continued
    # for GenPPL and auto-BLEU
    n_generate: int = 1000  # prompts, at most: the first by name
    n_seeds: int = 1  # continuations of each, by seeds that follow `seed`
    resynth_from: str = ""  # manifest whose positives are re-synthesised and transcribed; nothing else
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
    suffix: str = ""  # added to the names of all metrics, to have them beside those of other settings

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = []
        if not (self.val or self.benchmark or self.manifest or self.generate_from or self.resynth_from):
            found.append("nothing to do: set val, benchmark, manifest, generate_from or resynth_from")
        if len(self.path) not in (len(self.benchmark), min(1, len(self.benchmark))):
            found.append(f"path: {len(self.path)} for {len(self.benchmark)} of benchmark; one for each, or one for all")
        if self.write_manifest and len(self.benchmark) != 1:
            found.append("write_manifest: of one benchmark")
        if min(self.n_seeds, self.batch, self.n_generate, self.context) < 1:
            found.append("n_seeds, batch, n_generate and context must be at least 1")
        if not self.checkpoint:
            found.append("checkpoint: name at least one")
        return found


# ---------------------------------------------------------------- n-gram models: what a loss means

def ngrams(train: list[np.ndarray], n_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of unigram and bigram models, (V, V) each: token before, token.

    Sequences are tokens `1 units 1`; targets are all but BOS, as for the LM. Witten-Bell smoothed, lest they be straw
    men.
    """
    pairs = np.zeros((n_tokens, n_tokens))
    for x in train:
        np.add.at(pairs, (x[:-1].astype(int), x[1:].astype(int)), 1)
    counts = pairs.sum(0)
    unigram = (counts + 1) / (counts + 1).sum()
    kinds = (pairs > 0).sum(1, keepdims=True)  # continuations seen after each token
    bigram = (pairs + kinds * unigram) / np.maximum(pairs.sum(1, keepdims=True) + kinds, 1)
    bigram[kinds[:, 0] == 0] = unigram
    return {"unigram": np.log(np.broadcast_to(unigram, pairs.shape)), "bigram": np.log(bigram)}


def ngram_loss(logp: np.ndarray, val: list[np.ndarray]) -> float:
    """Cross-entropy in nats per target of one of `ngrams`."""
    before, after = (np.concatenate(x).astype(int) for x in ([t[:-1] for t in val], [t[1:] for t in val]))
    return float(-logp[before, after].mean())


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
    """`fork_logps` of all forks, on the CPU, in rows of `context` tokens; as many rows at once as fit into memory.

    A longer fork has a row of its own. NaN for a row that does not even fit by itself.
    """
    short, long = ([i for i, fork in enumerate(forks) if (fork.n_inputs > context) == x] for x in (False, True))
    rows = [np.array(short)[row] for row in pack([forks[i] for i in short], context)] if short else []
    n_short, out = len(rows), torch.zeros(len(forks), 3)
    rows += [np.array([i]) for i in long]
    batch, at = 64 if lm.device.type == "cuda" else 4, 0
    with tqdm(total=len(forks), disable=None, desc=desc, unit="pair", leave=False) as bar:
        while at < len(rows):
            part = rows[at:min(at + batch, n_short) if at < n_short else at + 1]
            try:
                logps = fork_logps(lm, [[forks[i] for i in row] for row in part], 0, lm.device, dtype)
            except (torch.OutOfMemoryError, MemoryError):
                if len(part) > 1:
                    batch = len(part) // 2
                    continue
                logps = torch.full((len(part[0]), 3), torch.nan)
            out[np.concatenate(part)] = logps.cpu()
            bar.update(sum(map(len, part)))
            at += len(part)
    return out


def pair_nlls(lm: UnitLM, pairs: list[tuple[list[int], list[int]]], context: int, score: str = "mean",
              score_prompt: bool = True, dtype: str = "float32") -> np.ndarray:
    """Negative log-likelihood (nats) of both utterances of each pair, (n, 2): per token, or their sum.

    score_prompt: with the beginning that they share, or without. NaN where a pair did not fit into memory.
    """
    forks = [Fork.of(*pair) for pair in pairs]
    logps = score_forks(lm, forks, context, dtype, "scoring").double().numpy()
    lengths = np.array([fork.lengths for fork in forks])
    nll = -logps[:, 1:] - score_prompt * logps[:, :1]
    return nll / np.maximum(lengths[:, 1:] + score_prompt * lengths[:, :1], 1) if score == "mean" else nll


def ngram_nlls(logp: np.ndarray, pair: tuple[list[int], list[int]], score: str, score_prompt: bool) -> list[float]:
    """`pair_nlls` of one pair by one of `ngrams`."""
    start = 0 if score_prompt else Fork.of(*pair).lengths[0]
    nlls = [-logp[x[:-1], x[1:]][start:] for x in pair]
    return [nll.sum() / max(1, len(nll)) if score == "mean" else nll.sum() for nll in nlls]


def pair_accuracy(positive: np.ndarray, negative: np.ndarray, items: list[str] | None = None) -> dict:
    """Share (%) of pairs whose positive has the lower NLL, a tie counting half, with its standard error.

    items: what each pair is about; pairs of one item (in several voices) are not independent: the standard error is
    then that of the items' means, weighted by their pairs, and a 95 % bootstrap interval over items is given, too.
    Pairs that have no NLL are left out and counted.
    pair_accuracy([1.0, 2.0], [1.5, 2.0]) -> {"value": 75.0, "se": 25.0, "n": 2, "ties": 1}
    """
    known = np.isfinite(positive) & np.isfinite(negative)
    correct = np.where(positive == negative, 0.5, positive < negative)[known]
    n = len(correct)
    if not n:
        return {"value": math.nan, "se": math.nan, "n": 0, "ties": 0, "failed": int((~known).sum())}
    result = {"value": 100 * correct.mean(), "se": 100 * correct.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
              "n": n, "ties": int((positive == negative)[known].sum())}
    if not known.all():
        result["failed"] = int((~known).sum())
    _, item = np.unique(np.array(items or range(len(known)))[known], return_inverse=True)
    if (n_items := item.max() + 1) < n:
        sums, sizes = np.bincount(item, correct), np.bincount(item)
        draws = np.random.default_rng(0).multinomial(n_items, np.full(n_items, 1 / n_items), 1000)
        means = 100 * (draws @ sums) / (draws @ sizes)
        if n_items == 1:
            return result | {"se": math.nan, "items": 1}
        se = means.std() * math.sqrt(n_items / (n_items - 1))
        result |= {"se": se, "interval": np.percentile(means, (2.5, 97.5)).tolist(), "items": int(n_items)}
    return result


def score_pairs(nll: np.ndarray, pairs: list[dict]) -> dict:
    """`pair_accuracy` of NLLs (n, 2) over all pairs (micro, as SlamKit), and "by" each subset of the manifest's fields.

    macro: mean over items of the mean over an item's voices, as ZeroSpeech has it.
    """
    items = [p.get("item") or p["id"] for p in pairs]
    result, by = pair_accuracy(*nll.T, items), {}
    for name in (*SUBSETS, "voice"):
        values = [p.get(name) for p in pairs]
        if any(values):
            by[name] = {v: pair_accuracy(*nll[rows := [i for i, u in enumerate(values) if u == v]].T,
                                         [items[i] for i in rows]) for v in sorted(set(filter(None, values)))}
    if by:
        groups = defaultdict(list)
        for i in np.flatnonzero(np.isfinite(nll).all(1)):
            groups[items[i]].append(0.5 if nll[i, 0] == nll[i, 1] else float(nll[i, 0] < nll[i, 1]))
        means = [100 * np.mean(x) for x in groups.values()]
        result["macro"] = float(np.mean(means)) if means else None
        result["macro_se"] = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
        result["by"] = by
    return result


def remembered(name: str, keys: list[str], compute: Callable[[list[int]], list], batch: int = 64) -> list:
    """Values of keys out of a file of the cache; those not in it are computed, by their numbers, and kept."""
    path, known = cache_dir() / f"{name}.jsonl", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # cut short by a kill
            known |= json.loads(line)
    todo = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    with open(path, "a") as f, tqdm(total=len(todo), disable=None, desc=path.stem) as bar:
        for at in range(0, len(todo), batch):
            part = todo[at:at + batch]
            new = dict(zip((keys[i] for i in part), compute(part)))
            known |= new
            f.write("\n" + json.dumps(new) + "\n")
            f.flush()
            bar.update(len(part))
    return [known[key] for key in keys]


def units_cache(tokenizer: SpeechTokenizer, benchmark: str) -> str:
    """`remembered`'s name for a benchmark's units: of all that decides them but the files themselves."""
    encoder = tokenizer.encoder
    made = json.dumps([tokenizer.fingerprint.to_dict(), str(encoder.dtype), torch.device(encoder.device).type])
    return f"units/{benchmark}-{hashlib.sha256(made.encode()).hexdigest()[:16]}"


def tokenize_pairs(tokenizer: SpeechTokenizer, benchmark: Benchmark) -> list[tuple[list[int], list[int]]]:
    """Both files of each pair -> utterances `1 units 1`; remembered by sha256 of the file, in `units_cache`.

    SystemExit naming a file that holds no usable audio. Says so if the files' sample rates differ.
    """
    paths, rates = [p[side] for side in ("positive", "negative") for p in benchmark.pairs], Counter()
    for path in paths:
        with contextlib.suppress(soundfile.SoundFileError):  # which is said where it is read
            rates[soundfile.info(path).samplerate] += 1

    def encode(part: list[int]) -> list[list[int]]:
        try:
            waves = [load_audio(paths[i]) for i in part]
        except ValueError as e:
            raise SystemExit(str(e)) from None
        return [units.tolist() for units, _ in tokenizer.encode_batch(waves)]

    units = remembered(units_cache(tokenizer, benchmark.name), [sha256(Path(path)) for path in paths], encode)
    if len(rates) > 1:
        print(f"{benchmark.name}: files of different sample rates ("
              + ", ".join(f"{n:,} of {rate:,} Hz" for rate, n in rates.most_common()) + "); all resampled to 16 kHz")
    utterances = list(map(to_tokens, units))
    return list(zip(utterances[:len(benchmark.pairs)], utterances[len(benchmark.pairs):]))


def text_nlls(texts: list[str], judge: str) -> np.ndarray:
    """Mean negative log-likelihood per token of each text by a text LM, after BOS; remembered by (text, judge)."""
    def score(part: list[int]) -> list[float | None]:
        return continuation_scores([""] * len(part), [texts[i] for i in part], judge)

    folder = resolve(judge)  # of a hub's model the name must do
    version = f"-{weights_sha256(folder)[:16]}" if Path(folder).is_dir() else ""
    found = remembered(f"texts/{re.sub(r'[^A-Za-z0-9.-]+', '-', judge)}{version}",
                       [hashlib.sha256(t.encode()).hexdigest() for t in texts], score)
    return np.array([np.nan if x is None else -x for x in found])


# ---------------------------------------------------------------- generated speech

@functools.cache
def load_asr(asr: str) -> tuple:
    """Whisper by name, once per process: model, feature extractor, tokenizer."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)  # of what Whisper does
    folder = resolve(asr)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(pick_device())
    return model, WhisperFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def transcribe(waves: list[np.ndarray], asr: str, batch: int = 8, strip: bool = True) -> list[str]:
    """Whisper's transcripts of waves (T,) at 16 kHz, of at most 30 s each (longer ones are cut); greedy.

    strip: without the space that Whisper begins with. A wave of no samples says nothing.
    """
    model, extractor, tokenizer = load_asr(asr)
    texts, sound = [""] * len(waves), [i for i, w in enumerate(waves) if len(w)]
    for at in tqdm(range(0, len(sound), batch), disable=None, desc="transcribing", leave=False):
        part = sound[at:at + batch]
        x = extractor([waves[i][:30 * SAMPLE_RATE] for i in part], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        x = x.input_features.to(model.device)
        tokens = model.generate(x, attention_mask=torch.ones(x.shape[::2], device=x.device), max_length=200)
        for i, text in zip(part, tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            texts[i] = text.strip() if strip else text
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


# The Penn Treebank's rules as in NLTK 3.9.1, the release of SlamKit's time (since 3.9.3 it splits dashes, too). Applied
# in order; each puts spaces around what is a word of its own.
TREEBANK = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"[«“‘„]|``?", r" \g<0> "),  # opening quotes; the Treebank's are `` and ''
    (r'^"', " `` "),
    (r"""([ ([{<])("|'')""", r"\1 `` "),
    (r"(?i)'(?!re|ve|ll|[mtsdn])(\w)\b", r"' \1"),
    (r"""([^.])\.([])}>"'»”’ ]*)\s*$""", r"\1 . \2 "),  # the text's last full stop; others stay with their words
    (r"([:,])(\D|$)", r" \1 \2"),
    (r"\.{2,}|[;@#$%&?!]", r" \g<0> "),
    (r"([^'])' ", r"\1 ' "),
    (r"[][(){}<>*»”’]|--", r" \g<0> "),
    (r"""''|\"""", " '' "),
    (r"\A|\Z|\s+", " "),  # the rules below look for spaces
    (r"([^' ])('[sSmMdD]?) ", r"\1 \2 "),
    (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "),
    (r"(?i)\b(can(?=not)|d(?='ye)|gim(?=me)|gon(?=na)|got(?=ta)|lem(?=me)|more(?='n)|wan(?=na\s))"
     r"(not|'ye|me|na|ta|'n)\b", r" \1 \2 "),
    (r"(?i) ('t)(is)\b", r" \1 \2 "), (r"(?i) ('t)(was)\b", r" \1 \2 "))]


def words(text: str) -> list[str]:
    """Word tokens of NLTK's `NLTKWordTokenizer`, with which SlamKit counts n-grams; case is kept.

    words("A girl. She didn't, he said.") -> ["A", "girl.", "She", "did", "n't", ",", "he", "said", "."]
    """
    for pattern, replacement in TREEBANK:
        text = pattern.sub(replacement, text)
    return text.split()


def auto_bleu(text: str, n: int = 2, overlapping: bool = True) -> float:
    """Share of a text's n-gram positions whose n-gram stands elsewhere in it too (SlamKit's auto-BLEU); 0 if too short.

    overlapping: whether elsewhere may be a place that shares words with the first; not so in GSLM's auto-BLEU.
    auto_bleu("a b a b") -> 2/3: "a b" twice, "b a" once; auto_bleu("ha ha ha", overlapping=False) -> 0
    """
    tokens, places = words(text), defaultdict(list)
    for i in range(len(tokens) - n + 1):
        places[tuple(tokens[i:i + n])].append(i)
    distance = 1 if overlapping else n  # positions are in order, so the first and the last are farthest from any
    again = sum(max(i - at[0], at[-1] - i) >= distance for at in places.values() for i in at)
    return again / max(1, len(tokens) - n + 1)


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
def text_losses(texts: list[str], judge: str) -> list[float | None]:
    """Mean NLL (nats) per token of each text but its first, by a text LM; None for a text of fewer than two.

    Tokenised as SlamKit does: with the special tokens that the LM's tokenizer adds by itself. So after Llama's BOS all
    of the text is scored; SmolLM2's adds none, and the text's first token is only context.
    """
    model, tokenizer = load_judge(judge)
    losses = []
    for text in tqdm(texts, disable=None, desc="judging", leave=False):
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        losses.append(model(ids, labels=ids).loss.item() if ids.shape[1] >= 2 else None)
    return losses


@torch.inference_mode()
def continuation_scores(prompts: list[str], texts: list[str], judge: str, batch: int = 16) -> list[float | None]:
    """Mean log-probability (nats) per token of each text given its prompt's text; None for a text without tokens."""
    model, tokenizer = load_judge(judge)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # Qwen's has none
    known = [tokenizer(p).input_ids or [bos] for p in prompts]
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

    may_end: an EOS ends a continuation, which then has fewer than `new_units` units; else none is drawn.
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


def generative_metrics(lm: UnitLM, cfg: Config, tokenizer: SpeechTokenizer, vocoder: Vocoder, paths: list[Path],
                       out: Path) -> dict:
    """GenPPL and auto-BLEU of spoken continuations, on prompt + continuation (as published) and on the continuation.

    What was said is kept in generated.jsonl, and for any judge to score in judge_prompts.jsonl.
    """
    prompts = []
    for path in tqdm(paths, disable=None, desc="prompts", leave=False):
        try:
            wave = load_audio(path)[:round(cfg.prompt_seconds * SAMPLE_RATE)]
            prompts.append(tokenizer.encode(wave, SAMPLE_RATE)[0].tolist())
        except ValueError as e:
            raise SystemExit(f"{path}: its beginning is no prompt: {e}") from None
    said = []
    for seed in range(cfg.seed, cfg.seed + cfg.n_seeds):
        new = continue_units(lm, prompts, cfg.new_units, cfg.batch, seed, "continuing", temperature=cfg.temperature,
                             top_k=cfg.top_k, repetition_penalty=cfg.repetition_penalty, may_end=cfg.may_end,
                             compile=cfg.compile and lm.device.type == "cuda" and len(prompts) >= 4 * cfg.batch)
        whole = speak([p + c for p, c in zip(prompts, new)], tokenizer, vocoder)
        # Whisper's leading space stays: SlamKit's judge reads it, and " Once" is another token than "Once".
        texts, alone = (transcribe(waves, cfg.asr, strip=False) for waves in (whole, speak(new, tokenizer, vocoder)))
        said += [{"seed": seed, "prompt": path.name, "text": text, "continuation_text": a, "units": units}
                 for path, text, a, units in zip(paths, texts, alone, new)]
        for path, wave in zip(paths, whole) if cfg.keep_audio else ():
            soundfile.write(out / f"generated{cfg.suffix}_{path.stem}_{seed}.wav", wave, SAMPLE_RATE)
    for name, lines in (("generated", said), ("judge_prompts", [
            {"id": f"{x['prompt']} {x['seed']}", "prompt": JUDGE.format(
                text=x["text"].strip(), continuation_text=x["continuation_text"].strip())} for x in said])):
        (out / f"{name}{cfg.suffix}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    settings = {k: v for k, v in asdict(cfg).items() if k in (
        "generate_from", "n_generate", "batch", "tokenizer", "vocoder", "prompt_seconds", "new_units", "temperature",
        "top_k", "repetition_penalty", "may_end", "asr", "judge", "seed", "n_seeds")}
    ppl, alone = (perplexity([x[key] for x in said], cfg) for key in ("text", "continuation_text"))
    bleu = {kind: np.array([100 * auto_bleu(x["text"], overlapping=kind == "value") for x in said])
            for kind in ("value", "non_overlapping")}
    seeds = bleu["value"].reshape(cfg.n_seeds, -1).mean(1)
    return {"gen_ppl": ppl | {"continuation_only": alone["value"], "settings": settings}
            | {f"continuation_{k}": alone[k] for k in ("se", "empty", "seeds") if k in alone},
            "auto_bleu": {kind: float(x.mean()) for kind, x in bleu.items()}
            | {"se": standard_error(bleu["value"], cfg.n_seeds), "n": len(said),
               "settings": settings} | ({"seeds": seeds.tolist()} if cfg.n_seeds > 1 else {})}


JUDGE = """A speech model was given the first seconds of a recorded story and went on speaking. Below is what a speech \
recogniser heard: first the whole recording, then only what the model added. Rate how sensibly, grammatically and \
fluently the model went on, from 1 (no sense at all) to 5 (as a person would). Answer with the number alone.

The whole recording: {text}
What the model added: {continuation_text}"""


def standard_error(values: np.ndarray, n_seeds: int) -> float | None:
    """Of the mean of values of all prompts, seed after seed: over prompts, whose continuations are not independent."""
    by_prompt = values.reshape(n_seeds, -1)
    known = ~np.isnan(by_prompt)
    means = (np.nansum(by_prompt, 0) / np.maximum(known.sum(0), 1))[known.any(0)]
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def perplexity(texts: list[str], cfg: Config) -> dict:
    """exp of the mean over texts of their mean token NLL, its standard error, of how many, how many were empty; and of
    each seed, if there are several."""
    losses = text_losses(texts, cfg.judge)
    known = [x for x in losses if x is not None]
    value = math.exp(np.mean(known)) if known else None
    se = standard_error(np.array([np.nan if x is None else x for x in losses]), cfg.n_seeds)
    se = value * se if se is not None else None
    by_seed = [[x for x in part if x is not None] for part in np.array_split(np.array(losses, object), cfg.n_seeds)]
    return {"value": value, "se": se, "n": len(known), "empty": len(losses) - len(known)} | (
        {"seeds": [math.exp(np.mean(x)) if x else None for x in by_seed]} if cfg.n_seeds > 1 else {})


def resynthesis_error(cfg: Config, tokenizer: SpeechTokenizer, vocoder: Vocoder) -> dict:
    """How much of speech its units keep: word error rate of the ASR on re-synthesised against original speech, with
    original and predicted durations; and with the former, mel-cepstral distance and the share of clipped samples."""
    waves = [load_audio(p["positive"])[:30 * SAMPLE_RATE] for p in read_manifest(cfg.resynth_from).pairs]
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
        if result is None or result["value"] is None:
            return "-"
        se = result.get("se")
        return f"{result['value']:.2f}" + (f" ± {se:.1f}" if se is not None else "")

    lines = [["", *rows]] + [[m, *(cell(r.get(m)) for r in rows.values())] for m in metrics]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in lines)


def natural(path: Path) -> list:
    """Sort key of a path by the numbers in its name: 2 before 10."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", path.name)]


def read_benchmarks(cfg: Config) -> list[Benchmark]:
    """All sets of pairs that are asked for, each with a line on what is in it."""
    paths = cfg.path if len(cfg.path) == len(cfg.benchmark) else cfg.path * len(cfg.benchmark)
    found = [read_benchmark(name, path, cfg.split, cfg.max_left_out) for name, path in zip(cfg.benchmark, paths)]
    found += [read_manifest(path) for path in cfg.manifest]
    for benchmark in found:
        print(benchmark.summary())
    if twice := [name for name, n in Counter(b.name for b in found).items() if n > 1]:
        raise SystemExit(f"two sets of pairs with the name {twice[0]}; results are kept by name")
    return found


def floors(cfg: Config, benchmark: Benchmark, utterances: list[tuple], grams: dict[str, np.ndarray]) -> dict[str, dict]:
    """What n-gram models of the units score on a benchmark, and a text LM on its transcripts: {metric: result}."""
    found = {}
    for name, logp in grams.items():
        nll = np.array([ngram_nlls(logp, pair, cfg.score, cfg.score_prompt) for pair in utterances])
        found[f"{benchmark.name}_{name}"] = score_pairs(nll, benchmark.pairs)
    texts = [[p.get(f"{side}_text") for side in ("positive", "negative")] for p in benchmark.pairs]
    if cfg.text_judge and all(map(all, texts)):
        nll = text_nlls([t for both in texts for t in both], cfg.text_judge).reshape(-1, 2)
        found[f"{benchmark.name}_text_lm"] = score_pairs(nll, benchmark.pairs) | {"judge": cfg.text_judge}
    return found


def main(cfg: Config) -> None:
    device = pick_device()
    if cfg.resynth_from:
        tokenizer = SpeechTokenizer.load(cfg.tokenizer or "embedded", device.type).base
        vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
        print(json.dumps(resynthesis_error(cfg, tokenizer, vocoder)))
        return
    benchmarks = read_benchmarks(cfg)
    if cfg.write_manifest:
        try:
            benchmarks[0].write(cfg.write_manifest)
        except OSError as e:
            raise SystemExit(f"--write_manifest={cfg.write_manifest}: {e.strerror}") from None
        return
    checkpoints = {name: find_checkpoint(name) for name in cfg.checkpoint}
    fingerprints = {name: checkpoint_fingerprint(folder) for name, folder in checkpoints.items()}
    tokenizer = vocoder = None
    if benchmarks or cfg.generate_from:
        tokenizer_name = cfg.tokenizer or find_codebook(next(iter(fingerprints.values())))
        tokenizer = SpeechTokenizer.load(tokenizer_name, device.type)
    if cfg.generate_from:
        vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
        source = next((b for b in benchmarks if b.name == cfg.generate_from), None) or read_manifest(cfg.generate_from)
        prompts = sorted((Path(p["positive"]) for p in source.pairs), key=natural)[:cfg.n_generate]
    val = UnitReader(*cfg.val) if cfg.val else None
    for name, fingerprint in fingerprints.items():
        if tokenizer:
            require_same(fingerprint, name, tokenizer.fingerprint, f"tokenizer {tokenizer_name}")
        if val:
            require_same(fingerprint, name, val.fingerprint, cfg.val[0])

    grams, baselines = {}, {}
    if cfg.train:
        train = UnitReader(*cfg.train)
        require_same(train.fingerprint, cfg.train[0], next(iter(fingerprints.values())), cfg.checkpoint[0])
        grams = ngrams([train.tokens(i) for i in range(len(train))], vocab_size(train.fingerprint.n_units))
    for name, logp in grams.items() if val else ():
        baselines[f"{name}_loss"] = {"value": ngram_loss(logp, [val.tokens(i) for i in range(len(val))]),
                                     "n": val.n_tokens - len(val)}
    utterances = {b.name: tokenize_pairs(tokenizer, b) for b in benchmarks}
    if not cfg.score_eos:
        utterances = {name: [(a[:-1], b[:-1]) for a, b in pairs] for name, pairs in utterances.items()}
    for b in benchmarks:
        baselines |= floors(cfg, b, utterances[b.name], grams)

    rows = {}
    for name, folder in checkpoints.items():
        lm = UnitLM.from_pretrained(folder).eval().to(device)
        results = dict(baselines)
        if val:
            loss, n = validation_loss(lm, val, cfg.context, cfg.batch, cfg.dtype)
            results["val_loss"] = {"value": loss, "n": n, "settings": {"val": cfg.val, "dtype": cfg.dtype}}
            results["val_ppl"] = {"value": math.exp(loss), "n": n}
            if val.hours:  # the same for all vocabularies, as units or pieces per second are not
                results["val_bits_per_second"] = {"value": loss * n / math.log(2) / (3600 * val.hours), "n": n}
        how = {k: getattr(cfg, k) for k in ("score", "score_eos", "score_prompt", "dtype")}
        for b in benchmarks:
            nll = pair_nlls(lm, utterances[b.name], cfg.context, cfg.score, cfg.score_prompt, cfg.dtype)
            results[b.name] = score_pairs(nll, b.pairs) | {"settings": how | {
                "source": b.source, "split": b.split, "downloaded": b.downloaded}}
        where = Path(folder).parent if Path(folder).name == "checkpoint" else Path(folder)
        if not where.is_dir():  # a hub id
            where = Path("out") / folder.replace("/", "--")
            where.mkdir(parents=True, exist_ok=True)
        made = {"weights": weights_sha256(folder)[:16], "torch": torch.__version__,
                "transformers": transformers.__version__, "git": git_commit()}

        def keep(found: dict) -> dict:
            """Results under their final names, which are written down before what follows may fail."""
            found = {metric + cfg.suffix: result | {"made": made} for metric, result in found.items()}
            merge_results(where / "results.json", found)
            return found

        rows[name] = keep(results)
        if cfg.generate_from:
            rows[name] |= keep(generative_metrics(lm, cfg, tokenizer, vocoder, prompts, where))
        del lm  # before the next one is loaded
    print(table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["plot"]:
        plot(load_config(PlotConfig, sys.argv[2:], figures_help))
    else:
        main(load_config(Config, sys.argv[1:], __doc__))
