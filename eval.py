"""Judge unit LMs: validation loss, spoken pair benchmarks, GenPPL and auto-BLEU of spoken continuations.

In:  one or several checkpoints, unit files, benchmarks as downloaded or manifests of pairs (slam/benchmarks.py).
Out: results.json in each run's folder (other metrics in it stay) and one table of all of them.

    python eval.py config/demo_eval.py --checkpoint out/demo/lm,out/demo/dpo
    python eval.py --checkpoint out/slam --benchmark sblimp --path sLM21-dataset --val out/units/val
    python dev/plot.py --run out/slam --run out/slam_dpo          # results and losses over compute, as in the paper
    python eval.py --resynth_from out/demo/data/tstorycloze        # how well tokeniser and vocoder keep words; no model

Two minutes on two CPU cores for the demo's sets; no disk to speak of.
"""
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
import transformers
from tqdm import tqdm

from config import load_config
from model import UnitLM
from slam.audio import SAMPLE_RATE, load_audio, resample
from slam.benchmarks import Benchmark, read_benchmark, read_manifest, tokenize_pairs
from slam.checkpoint import checkpoint_fingerprint, find_checkpoint, weights_sha256
from slam.device import pick_device
from slam.mel import mel_cepstral_distance
from slam.metrics import auto_bleu, score_pairs, standard_error, word_error_rate
from slam.run import git_commit, merge_results
from slam.scoring import ngram_loss, ngram_nlls, ngrams, pair_nlls, validation_loss
from slam.speech import continue_units, speak, text_losses, text_nlls, transcribe
from slam.tokenizer import SpeechTokenizer, find_codebook
from slam.units import UnitReader, require_same, vocab_size
from slam.vocoder import Vocoder, vocoder_for


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
    manifest: tuple[str, ...] = ()  # other pairs: manifests (slam/benchmarks.py), or folders with a manifest.jsonl
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
    allow_eos: bool = True  # an EOS ends a continuation; else none is drawn, for encoders that hear a cut as an ending
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
                             top_k=cfg.top_k, repetition_penalty=cfg.repetition_penalty, allow_eos=cfg.allow_eos,
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
        "top_k", "repetition_penalty", "allow_eos", "asr", "judge", "seed", "n_seeds")}
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


def baseline_scores(cfg: Config, benchmark: Benchmark, utterances: list[tuple], grams: dict[str, np.ndarray]) -> dict[str, dict]:
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
        baselines |= baseline_scores(cfg, b, utterances[b.name], grams)

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
    main(load_config(Config, sys.argv[1:], __doc__))
