"""Preference pairs from data sets: SWAG's text, SpokenSwag's audio, SlamKit's units -> pair files.

    python synth_stories.py config/spoken_swag.py --swag train.csv      # calls make_swag_pairs

A reader yields pairs {"id", "prompt_text", "chosen_text", "rejected_text", ...}; a string says why a row is skipped.
"""
import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from slam.audio import load_audio, parquet_rows
from slam.benchmarks import disk_cache
from slam.device import pick_device
from slam.metrics import auto_bleu
from slam.slamkit import slamkit_tokenizer, slamkit_units
from slam.tokenizer import SpeechTokenizer
from slam.tts import TTS, speakers, spoken
from slam.units import sha256_of, write_pairs

SIDES = ("prompt", "chosen", "rejected")


# ---------------------------------------------------------------- readers
def read_swag(path: str, seed: int, voices: tuple[str, ...]) -> Iterator[dict | str]:
    """Gold rows of SWAG's original CSV: prompt is sent1, chosen sent2 with the right ending, rejected with a wrong one.

    Wrong ending and voice ("speaker") are drawn by (seed, row). SystemExit if the file is not such a CSV.
    """
    columns = ["sent1", "sent2", "gold-source", "ending0", "ending1", "ending2", "ending3", "label"]
    number = -1
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = csv.DictReader(f, strict=True)
            if missing := [c for c in columns if c not in (rows.fieldnames or ())]:
                raise SystemExit(f"{path}: no column {', '.join(missing)}; it wants SWAG's train.csv or val.csv")
            for number, row in enumerate(rows):
                prompt, start, source, *endings, label = (" ".join((row[c] or "").split()) for c in columns)
                if source != "gold":
                    yield "not gold"
                elif not (prompt and start and all(endings)) or label not in ("0", "1", "2", "3") or None in row:
                    yield "malformed"
                else:
                    rng = np.random.default_rng((seed, number))
                    right = endings.pop(int(label))
                    wrong = endings[rng.integers(3)]
                    yield "with a wrong ending that is the right one" if wrong == right else {
                        "id": f"swag{number:06d}", "speaker": str(rng.choice(voices)), "prompt_text": prompt,
                        "chosen_text": f"{start} {right}", "rejected_text": f"{start} {wrong}"}
    except OSError as e:
        raise SystemExit(f"--swag={path}: not readable ({e.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as e:
        raise SystemExit(f"{path}: row {number + 3}: not CSV ({e})") from None


def parquet_files(input: str) -> list[tuple[Path, str]]:
    """Parquet files of a folder, or one file, each with its name inside the folder: default/train/0000."""
    if not Path(input).is_dir():
        return [(Path(input), Path(input).stem)]
    return [(p, p.relative_to(input).with_suffix("").as_posix()) for p in sorted(Path(input).rglob("*.parquet"))]


def rows_of(path: Path, columns: list[str], optional: tuple[str, ...] = ()) -> Iterator[dict]:
    """`parquet_rows`, with SystemExit if the file is damaged."""
    try:
        yield from parquet_rows(path, columns, optional)
    except (OSError, ValueError) as e:
        raise SystemExit(f"{path}: not a whole parquet file ({str(e).splitlines()[0]})") from None


def read_spoken_swag(input: str) -> Iterator[dict]:
    """Texts of Hugging Face's slprl/SpokenSwag, a folder of its parquet files or one of them.

    "split" is val for a file with val, test or dev in its name or folder. The set's own "auto_bleu2" is handed on.
    """
    for path, name in parquet_files(input):
        split = "val" if re.search(r"\b(val|test|dev)", name) else "train"
        rows = rows_of(path, [f"{side}_text" for side in SIDES], optional=("speaker", "auto_bleu2"))
        for number, row in enumerate(rows):
            yield {"id": f"{name}/{number:07d}", "split": split} | row


def read_slamkit_pairs(path: str, n_units: int) -> Iterator[dict]:
    """SlamKit's preference features, JSON lines {"prompt": {"units", "duration"}, "chosen": …, "rejected": …}.

    Texts are kept where they are given. The units may be inside "audio_repr", as SlamKit's documentation has them.
    """
    number = 0
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                row = json.loads(line)
                yield {"id": f"{Path(path).stem}/{number - 1:07d}"} | {
                    side: slamkit_units(row[side], n_units)[0].tolist() for side in SIDES} | {
                    key: row[key] for side in SIDES if (key := f"{side}_text") in row}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"{path}: line {number}: not a pair with units ({e!r}), as SlamKit's "
                         f"preference_alignment_feature_extractor writes them") from None


def usable(rows: Iterable[dict | str], max_auto_bleu: float) -> tuple[list[dict], Counter]:
    """Pairs that do not repeat themselves, and the number of rows skipped by reason.

    A pair stays if its "auto_bleu2", or without one the bigram auto-BLEU of "prompt chosen", is below `max_auto_bleu`.
    """
    pairs, skipped = [], Counter()
    for row in rows:
        if isinstance(row, str):
            skipped[row] += 1
            continue
        value = row.pop("auto_bleu2", None)
        if value is None:
            value = auto_bleu(f"{row.get('prompt_text', '')} {row.get('chosen_text', '')}")
        if value < max_auto_bleu:
            pairs.append(row)
        else:
            skipped["repetitive"] += 1
    return pairs, skipped


# ---------------------------------------------------------------- pair files
def stored_waves(input: str, pairs: list[dict]) -> Iterator[list[np.ndarray]]:
    """Waves [prompt, chosen, rejected] (T,) at 16 kHz of each pair, in the files' order; [] if one can't be read."""
    ids = {p["id"] for p in pairs}
    for path, name in parquet_files(input):
        if any(id.startswith(f"{name}/") for id in ids):
            for number, row in enumerate(rows_of(path, list(SIDES))):
                if f"{name}/{number:07d}" in ids:
                    try:
                        waves = [load_audio(io.BytesIO((row[side] or {}).get("bytes") or b"")) for side in SIDES]
                    except ValueError:
                        waves = []
                    yield waves


def tokenize_pairs(pairs: list[dict], path: Path, tokenizer: SpeechTokenizer, say: Callable) -> int:
    """Write a pair file; returns how many pairs are left out because a side has no sound.

    say(pairs) yields the waves of prompt, chosen and rejected. Units go to PATH.kept as they come, so a killed run
    continues with the next pair.
    """
    def encode(todo: list[int]) -> Iterator[list[list[int]] | None]:
        for waves in say([pairs[i] for i in todo]):
            try:
                yield [units.tolist() for units, _ in tokenizer.encode_batch(waves)]
            except ValueError:  # one of them has no sound
                yield None

    kept = path.with_name(path.name + ".kept")
    made_by = tokenizer.fingerprint.to_dict(), str(tokenizer.encoder.dtype)  # so that no other units are reused
    found = disk_cache(kept, [sha256_of(*made_by, pair) for pair in pairs], encode, len(pairs) or 1)
    whole = [pair | dict(zip(SIDES, units)) for pair, units in zip(pairs, found) if units and all(units)]
    write_pairs(path, tokenizer.fingerprint, whole)
    kept.unlink()
    return len(pairs) - len(whole)


def make_swag_pairs(cfg) -> None:
    """Write pairs_val.jsonl, `n_val` rows drawn by the seed, and pairs_train.jsonl, at most `n_pairs` of the others.

    cfg: of synth_stories.py. If the data set has a validation split, `n_val` are drawn from that. SystemExit if there
    are too few rows.
    """
    kind, voices = Path(cfg.swag).suffix, cfg.voices or TTS[cfg.tts][1]
    stored, tokenizer = kind == ".parquet" or Path(cfg.swag).is_dir(), None
    if kind == ".jsonl":
        fingerprint = slamkit_tokenizer(cfg.swag, cfg.tokenizer)
        rows = read_slamkit_pairs(cfg.swag, fingerprint.n_units)
    else:
        tokenizer = SpeechTokenizer.load(cfg.tokenizer, pick_device().type)
        rows = read_spoken_swag(cfg.swag) if stored else read_swag(cfg.swag, cfg.seed, voices)
    pairs, skipped = usable(rows, cfg.max_auto_bleu)

    splits = [p.pop("split", "") for p in pairs]
    order = np.random.default_rng(cfg.seed).permutation(len(pairs))
    own = "val" in splits and "train" in splits
    val = [i for i in order if not own or splits[i] == "val"][:cfg.n_val]
    train = [i for i in order if splits[i] == "train"] if own else order[len(val):]
    if len(val) < cfg.n_val or not len(train):
        raise SystemExit(f"{cfg.swag}: {len(pairs)} usable rows ({dict(skipped)}); more than n_val, {cfg.n_val}, are "
                         f"needed")

    def say(part: list[dict]) -> Iterator[list[np.ndarray]]:
        if stored:
            return stored_waves(cfg.swag, part)
        texts = {f"{p['id']} {side}": [p[f"{side}_text"]] for p in part for side in SIDES}
        speaker = {f"{p['id']} {side}": p["speaker"] for p in part for side in SIDES}
        waves = (wave for _, (wave,) in spoken(cfg, pool, texts, "speaking pairs", speaker, strict=False))
        return zip(waves, waves, waves)  # three in a row are a pair

    with speakers(cfg.tts, cfg.workers) if tokenizer and not stored else contextlib.nullcontext() as pool:
        for split, part in (("val", val), ("train", train[:cfg.n_pairs])):
            path, part, silent = Path(cfg.out) / f"pairs_{split}.jsonl", [pairs[i] for i in sorted(part)], 0
            if path.exists():
                print(f"{path}: is there already")
                continue
            if tokenizer:
                silent = tokenize_pairs(part, path, tokenizer, say)
            else:
                write_pairs(path, fingerprint, part)
            print(f"{path}: {len(part) - silent:,} pairs; {silent} gave no sound")
    print(f"{cfg.swag}: {len(pairs) + skipped.total():,} rows, of which were skipped: "
          + (", ".join(f"{n:,} {why}" for why, n in skipped.items()) or "none"))
