"""Evaluate unit LMs: validation loss, spoken pair benchmarks, GenPPL and auto-BLEU of spoken continuations.

In:  one or several checkpoints, unit files, benchmarks as downloaded or manifests of pairs (slam/benchmarks.py).
Out: results.json in each run's folder (its other metrics stay), pairs_NAME.jsonl (each pair's scores), and one table.

    python eval.py config/demo_eval.py --checkpoint out/demo/lm,out/demo/dpo
    python eval.py --checkpoint out/slam --benchmark sblimp --path sLM21-dataset --val out/units/val
    python eval.py --resynth_from out/demo/data/tstorycloze        # what tokeniser and vocoder lose; needs no model

Two minutes on two CPU cores for the demo's sets.
"""
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from config import load_config
from model import UnitLM
from slam import checkpoint as folders
from slam.benchmarks import READERS, SIDES, Benchmark, read_benchmark, read_manifest, tokenize_pairs
from slam.device import pick_device
from slam.metrics import auto_bleu, pair_accuracy, score_pairs, standard_error, word_error_rate  # noqa: F401
from slam.scoring import ngram_loss, ngram_nlls, ngrams, pair_nlls, validation_loss
from slam.units import UnitReader, require_same, vocab_size, write_atomic


@dataclass
class Config:
    """Evaluate checkpoints."""
    checkpoint: tuple[str, ...] = ()  # run folders, checkpoint folders or hub ids, in one table; empty: the newest run
    train: tuple[str, ...] = ()  # unit files for unigram and bigram models, which are scored beside the LM
    val: tuple[str, ...] = ()  # unit files for the validation loss
    benchmark: tuple[Literal[*READERS], ...] = ()  # pairs to score
    path: tuple[str, ...] = ()  # folders of the downloads: one for each of `benchmark`, or one for all
    split: str = "dev"  # of sblimp and swuggy
    max_left_out: float = 0.01  # share of a benchmark's pairs that may be missing
    manifest: tuple[str, ...] = ()  # other pairs: manifests, or folders with a manifest.jsonl
    write_manifest: str = ""  # write the benchmark's pairs to this file and stop
    score: Literal["mean", "sum"] = "mean"  # of the negative log-likelihoods of an utterance's tokens
    score_eos: bool = True  # score an utterance's EOS too
    score_prompt: bool = True  # score the prefix that the two utterances of a pair share too
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"  # of the model in pairs and validation loss; the
    # log-softmax is fp32 (in SlamKit all is fp32, or bfloat16 with `model=slam`). auto: bfloat16 where it is fast
    text_judge: str = ""  # text LM that scores the transcripts of pairs, as a ceiling
    generate_from: str = ""  # manifest or benchmark whose positives are the prompts of GenPPL and auto-BLEU, or any
    # folder of speech
    n_generate: int = 1000  # prompts, at most: the first of the set
    n_seeds: int = 1  # continuations of each prompt, with seeds `seed`, `seed` + 1, …
    resynth_from: str = ""  # manifest, whose positives are re-synthesised and transcribed, or any folder of speech;
    # nothing else is done
    prompt_seconds: float = 3.0  # length of a prompt: the beginning of the wav
    new_units: int = 150  # units to generate
    temperature: float = 0.8  # of the generation
    top_k: int = 25  # of the generation
    repetition_penalty: float = 1.1  # of the generation
    allow_eos: bool = True  # an EOS ends a continuation; false forbids it, for encoders that hear a cut as an ending
    tokenizer: str = ""  # codebook file; empty: the one of the first checkpoint's units; for resynth_from `embedded`
    vocoder: str = ""  # vocoder file, .safetensors or .pt; empty: one for these units
    asr: str = "embedded:whisper-tiny.en"  # Whisper that transcribes the continuations, and finds where endings begin
    judge: str = "embedded:smollm2-135m"  # text LM whose perplexity of the transcripts is GenPPL
    keep_audio: bool = False  # keep the generated wavs beside results.json
    context: int = 1024  # tokens in a row of the validation set and of pairs
    batch: int = 16  # sequences in a forward pass
    compile: bool = True  # torch.compile the sampling on a GPU, if there are at least four full batches
    seed: int = 0  # of the generation

    def problems(self) -> list[str]:
        found = []
        if not (self.val or self.benchmark or self.manifest or self.generate_from or self.resynth_from):
            found.append("nothing to do: set val, benchmark, manifest, generate_from or resynth_from")
        if len(self.path) not in (len(self.benchmark), min(1, len(self.benchmark))):
            found.append(f"path: {len(self.path)} given for {len(self.benchmark)} benchmarks; give one for each, or "
                         f"one for all")
        if self.write_manifest and len(self.benchmark) != 1:
            found.append("write_manifest: give exactly one benchmark")
        if self.write_manifest and Path(self.write_manifest).exists():
            found.append(f"write_manifest: {self.write_manifest} exists; name another file")
        if min(self.n_seeds, self.batch, self.n_generate, self.context, self.new_units) < 1 or self.prompt_seconds <= 0:
            found.append("n_seeds, batch, n_generate, context and new_units must be at least 1, prompt_seconds above 0")
        if min(self.temperature, self.top_k) < 0 or self.repetition_penalty <= 0:
            found.append("temperature and top_k must not be negative, repetition_penalty is positive")
        return found


# ---------------------------------------------------------------- pairs
def read_benchmarks(cfg: Config) -> list[Benchmark]:
    """Read all benchmarks and manifests of the settings, and print a summary of each."""
    paths = cfg.path if len(cfg.path) == len(cfg.benchmark) else cfg.path * len(cfg.benchmark)
    found = [read_benchmark(name, path, cfg.split, cfg.max_left_out) for name, path in zip(cfg.benchmark, paths)]
    found += [read_manifest(path) for path in cfg.manifest]
    for benchmark in found:
        print(benchmark.summary())
    if twice := [name for name, n in Counter(b.name for b in found).items() if n > 1]:
        raise SystemExit(f"two sets of pairs have the name {twice[0]}; results are kept by name")
    return found


def baseline_scores(cfg: Config, benchmark: Benchmark, utterances: list[tuple],
                    grams: dict[str, np.ndarray]) -> dict[str, dict]:
    """{metric: result} of the n-gram models on a benchmark's units, and of the text judge on its transcripts."""
    found = {}
    for name, logp in grams.items():
        nll = np.array([ngram_nlls(logp, pair, cfg.score, cfg.score_prompt) for pair in utterances])
        found[f"{benchmark.name}_{name}"] = score_pairs(nll, benchmark.pairs) | {"settings": {"train": cfg.train}}
    texts = [pair.get(f"{side}_text") or None for pair in benchmark.pairs for side in SIDES]
    if cfg.text_judge and not all(texts):
        print(f"{benchmark.name}: not scored by the text judge, as {texts.count(None)} transcripts are missing")
    elif cfg.text_judge:
        from slam.speech import continuation_scores
        nll = -np.array(continuation_scores([""] * len(texts), texts, cfg.text_judge), float).reshape(-1, 2)
        found[f"{benchmark.name}_text_lm"] = score_pairs(nll, benchmark.pairs) | {"judge": cfg.text_judge}
    return found


# ---------------------------------------------------------------- generated speech
def recordings(name: str, benchmarks: tuple = ()) -> list[Path]:
    """Positives of a benchmark or manifest, or a folder's audio files if it has no manifest; SystemExit if none."""
    from slam.audio import is_audio, walk
    named = next((b for b in benchmarks if b.name == name), None)
    alone = not named and Path(name).is_dir() and not Path(name, "manifest.jsonl").exists()
    found = [Path(f) for f in walk(name) if is_audio(f)] if alone else []
    return found or [Path(pair["positive"]) for pair in (named or read_manifest(name)).pairs]


def generative_metrics(lm: UnitLM, cfg: Config, tokenizer, vocoder, paths: list[Path], out: Path) -> dict:
    """GenPPL and auto-BLEU of spoken continuations of the wavs at `paths`: {metric: result}.

    Both are of the transcript of prompt and continuation (as published); GenPPL also of the continuation alone.
    Writes generated.jsonl (units and transcripts) to `out`.
    """
    import soundfile

    from slam.audio import SAMPLE_RATE, load_audio
    from slam.speech import continue_units, free_memory, speak, transcribe
    prompts = []
    for path in tqdm(paths, disable=None, desc="prompts", leave=False):
        try:
            wave = load_audio(path)[:round(cfg.prompt_seconds * SAMPLE_RATE)]
            prompts.append(tokenizer.encode(wave, SAMPLE_RATE)[0].tolist())
        except ValueError as e:
            raise SystemExit(f"{path}: its first {cfg.prompt_seconds:g} s can't be used as a prompt: {e}") from None
    for old in out.glob("generated_*.wav"):
        old.unlink()
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
        for i, wave in enumerate(whole) if cfg.keep_audio else ():  # numbered, as names may repeat
            soundfile.write(out / f"generated_{i:03d}_{paths[i].stem}_{seed}.wav", wave, SAMPLE_RATE)
    (out / "generated.jsonl").write_text("".join(json.dumps(x) + "\n" for x in said))
    lm.cpu().__dict__.pop("static", None)  # done with it and its compiled copy: 8 GB do not hold the judge beside them
    free_memory()

    settings = {k: getattr(cfg, k) for k in (
        "generate_from", "n_generate", "batch", "tokenizer", "vocoder", "prompt_seconds", "new_units", "temperature",
        "top_k", "repetition_penalty", "allow_eos", "asr", "judge", "seed", "n_seeds")}
    ppl, alone = (perplexity([x[key] for x in said], cfg) for key in ("text", "continuation_text"))
    ppl |= {"continuation_only": alone["value"]} | {
        f"continuation_{k}": alone[k] for k in ("se", "empty", "seeds") if k in alone}
    free_memory()
    scores = np.array([100 * auto_bleu(x["text"]) for x in said])
    bleu = {"value": float(scores.mean()), "se": standard_error(scores, cfg.n_seeds), "n": len(said)}
    bleu |= {"seeds": scores.reshape(cfg.n_seeds, -1).mean(1).tolist()} if cfg.n_seeds > 1 else {}
    return {"gen_ppl": ppl | {"settings": settings}, "auto_bleu": bleu | {"settings": settings}}


def perplexity(texts: list[str], cfg: Config) -> dict:
    """exp of the mean over texts of their mean NLL per token, with its standard error (delta method).

    texts: of all prompts, seed after seed. Texts of fewer than two tokens are left out and counted as empty.
    """
    from slam.speech import text_losses
    losses = np.array(text_losses(texts, cfg.judge), float)  # None becomes nan

    def ppl(x: np.ndarray) -> float | None:
        return math.exp(np.nanmean(x)) if np.isfinite(x).any() else None

    value, se = ppl(losses), standard_error(losses, cfg.n_seeds)
    result = {"value": value, "se": None if se is None else value * se, "n": int(np.isfinite(losses).sum()),
              "empty": int(np.isnan(losses).sum())}
    return result | ({"seeds": [ppl(x) for x in losses.reshape(cfg.n_seeds, -1)]} if cfg.n_seeds > 1 else {})


def resynthesis(cfg: Config) -> dict:
    """What tokeniser and vocoder lose on the positives of a manifest or a folder's recordings, the first 30 s of each.

    Word error rate between Whisper's transcripts of re-synthesised and original speech, with original and with
    predicted durations; with original durations also mel-cepstral distance (dB) and share of clipped samples.
    """
    from slam.audio import SAMPLE_RATE, load_audio, resample
    from slam.mel import mel_cepstral_distance
    from slam.speech import speak, transcribe
    from slam.tokenizer import SpeechTokenizer
    from slam.vocoder import vocoder_for
    tokenizer = SpeechTokenizer.load(cfg.tokenizer or "embedded", pick_device().type).base
    vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
    try:
        waves = [load_audio(file)[:30 * SAMPLE_RATE] for file in recordings(cfg.resynth_from)]
        encoded = [tokenizer.encode(w, SAMPLE_RATE) for w in tqdm(waves, disable=None, desc="units")]
    except ValueError as e:
        raise SystemExit(f"--resynth_from={cfg.resynth_from}: {e}") from None
    spoken = [vocoder.synthesize(*x)[0] for x in encoded]
    again = [resample(wave, vocoder.sample_rate, SAMPLE_RATE) for wave in spoken]
    predicted = speak([units.tolist() for units, _ in encoded], tokenizer, vocoder)
    heard, errors = transcribe(waves, cfg.asr), {}
    for name, those in (("original_durations", again), ("predicted_durations", predicted)):
        counts = [word_error_rate(a, b) for a, b in zip(heard, transcribe(those, cfg.asr))]
        n_errors, n_words = map(sum, zip(*counts))
        errors[name] = round(n_errors / max(1, n_words), 4)
    distances = [mel_cepstral_distance(a, b) for a, b in zip(waves, again)]
    return {"resynthesis_word_error_rate": errors, "mel_cepstral_distance_db": round(float(np.mean(distances)), 2),
            "clipped_share": float((np.abs(np.concatenate(spoken)) >= 1).mean()), "files": len(waves),
            "words": n_words, "hours": round(sum(map(len, waves)) / SAMPLE_RATE / 3600, 3), "asr": cfg.asr}


# ---------------------------------------------------------------- all together
def table(rows: dict[str, dict]) -> str:
    """{checkpoint: {metric: result}} as a text table with a line per metric."""
    def cell(result: dict | None) -> str:
        if result is None or result["value"] is None:
            return "-"
        se = result.get("se")
        return f"{result['value']:.2f}" + (f" ± {se:.1f}" if se is not None else "")

    metrics = dict.fromkeys(m for r in rows.values() for m in r)
    lines = [["", *rows]] + [[m, *(cell(r.get(m)) for r in rows.values())] for m in metrics]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def main(cfg: Config) -> None:
    if cfg.resynth_from:
        print(json.dumps(resynthesis(cfg)))
        return

    # pairs
    benchmarks = read_benchmarks(cfg)
    if cfg.write_manifest:
        return benchmarks[0].write(cfg.write_manifest)

    # units: all checkpoints, the tokeniser and the unit files must have the same fingerprint
    device = pick_device()
    checkpoints = cfg.checkpoint or (folders.newest_checkpoint(),)
    fingerprints = {name: folders.checkpoint_fingerprint(name) for name in checkpoints}
    val = UnitReader(*cfg.val) if cfg.val else None
    train = UnitReader(*cfg.train) if cfg.train else None
    known = {paths[0]: reader.fingerprint for paths, reader in ((cfg.val, val), (cfg.train, train)) if reader}
    if benchmarks or cfg.generate_from:
        from slam.tokenizer import SpeechTokenizer, find_codebook
        codebook = cfg.tokenizer or find_codebook(next(iter(fingerprints.values())))
        tokenizer = SpeechTokenizer.load(codebook, device.type)
        known[f"tokenizer {codebook}"] = tokenizer.fingerprint
    for name, fingerprint in fingerprints.items():
        for where, other in known.items():
            require_same(fingerprint, name, other, where)
    if cfg.generate_from:
        from slam.vocoder import vocoder_for
        vocoder, _ = vocoder_for(tokenizer, cfg.vocoder)
        prompts = recordings(cfg.generate_from, benchmarks)[:cfg.n_generate]
    for name in filter(None, [cfg.text_judge] * bool(benchmarks) + [cfg.asr, cfg.judge] * bool(cfg.generate_from)):
        folders.fetch(name)  # before the scoring, which takes hours: the hub may want an account
    end = None if cfg.score_eos else -1
    utterances = {b.name: [(x[:end], y[:end]) for x, y in tokenize_pairs(tokenizer, b)] for b in benchmarks}

    # baselines
    grams, baselines = {}, {}
    if train:
        grams = ngrams([train.tokens(i) for i in range(len(train))], vocab_size(train.fingerprint.n_units))
    for name, logp in grams.items() if val else ():
        baselines[f"{name}_loss"] = {"value": ngram_loss(logp, [val.tokens(i) for i in range(len(val))]),
                                     "n": val.n_tokens - len(val), "settings": {"train": cfg.train, "val": cfg.val}}
    for b in benchmarks:
        baselines |= baseline_scores(cfg, b, utterances[b.name], grams)

    # one checkpoint after the other
    rows = {}
    for name in fingerprints:
        lm, out = UnitLM.from_pretrained(name).eval().to(device), folders.run_folder(name)
        out.mkdir(parents=True, exist_ok=True)
        made = {"weights": folders.weights_sha256(name)[:16], "torch": torch.__version__,
                "transformers": version("transformers"), "git": folders.git_commit()}
        results = dict(baselines)
        if val:
            loss, n = validation_loss(lm, val, cfg.context, cfg.batch, cfg.dtype)
            of = {"n": n, "settings": {"val": cfg.val, "dtype": cfg.dtype, "context": cfg.context}}
            results |= {"val_loss": {"value": loss} | of, "val_ppl": {"value": math.exp(loss)} | of}
            if val.hours:  # comparable between vocabularies, unlike the loss per token
                results["val_bits_per_second"] = {"value": loss * n / math.log(2) / (3600 * val.hours)} | of
            if fingerprints[name].text_lm and val.fingerprint.text_lm:
                from slam.cross_modal import losses_by_kind
                from slam.interleave import Mixed
                results |= losses_by_kind(lm, Mixed(val, (1, 1, 1), 0), cfg.context, cfg.dtype)
        for b in benchmarks:
            nll = pair_nlls(lm, utterances[b.name], cfg.context, cfg.score, cfg.score_prompt, cfg.dtype)
            settings = {k: getattr(cfg, k) for k in ("score", "score_eos", "score_prompt", "dtype")}
            settings |= {"source": b.source, "split": b.split, "downloaded": b.downloaded}
            results[b.name] = score_pairs(nll, b.pairs) | {"settings": settings}
            scores = [json.dumps({"id": pair["id"], "nll": both}) + "\n" for pair, both in zip(b.pairs, nll.tolist())]
            write_atomic(out / f"pairs_{b.name}.jsonl", "".join(scores))
            texts = [tuple(pair.get(f"{side}_text", "") for side in SIDES) for pair in b.pairs]
            if fingerprints[name].text_lm and not all(map(all, texts)):
                print(f"{b.name}: scored in speech only, as {sum(not all(x) for x in texts)} pairs lack transcripts")
            elif fingerprints[name].text_lm:  # a model of speech and text
                from slam.cross_modal import directions, tokenize_parts
                parts = tokenize_parts(tokenizer, b, texts, cfg.asr)
                for direction, pairs in directions(texts, parts, fingerprints[name], cfg.score_eos).items():
                    nll = pair_nlls(lm, pairs, cfg.context, cfg.score, cfg.score_prompt, cfg.dtype)
                    results[f"{b.name}_{direction}"] = score_pairs(nll, b.pairs) | {"settings": settings}
        rows[name] = {metric: result | {"made": made} for metric, result in results.items()}
        folders.merge_results(out / "results.json", rows[name])  # before generation, which takes longer and may fail
        if cfg.generate_from:
            results = generative_metrics(lm, cfg, tokenizer, vocoder, prompts, out)
            rows[name] |= {metric: result | {"made": made} for metric, result in results.items()}
            folders.merge_results(out / "results.json", rows[name])
        del lm  # before the next one is loaded
    print(table(rows))
    print("written to", *(folders.run_folder(name) / "results.json" for name in rows))


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
