"""Spoken benchmarks as they are downloaded, each as a list of pairs of audio files: a manifest.

In:  the folder of a download: sLM21-dataset (sBLIMP, sWUGGY), SpokenStoryCloze's or SALMon's; or a manifest.
Out: pairs {"id", "positive", "negative"} with whatever else is known of them, and what was left out and why.

    python eval.py --benchmark sblimp --path sLM21-dataset --checkpoint out/slam
    python eval.py --benchmark sblimp --path sLM21-dataset --write_manifest sblimp.jsonl      # only look

A manifest is JSON lines of such pairs, its paths absolute or relative to its folder. Fields with a meaning: `type`,
`subtype`, `part`, `frequency` (results are also given for each of their values), `voice` and `item` (pairs of one item
in several voices are not independent), `positive_text` and `negative_text` (a text LM judges them beside).
"""
import contextlib
import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from slam.audio import load_audio
from slam.embedded import cache_dir, sha256
from slam.tokenizer import SpeechTokenizer
from slam.units import to_tokens

SUBSETS = ("type", "subtype", "part", "frequency")  # fields whose values have a result of their own


SALMON_PARTS = ("bg_alignment", "bg_all_consistency", "bg_domain_consistency", "gender_consistency", "rir_consistency",
                "sentiment_alignment", "sentiment_consistency", "speaker_consistency")


AUDIO = (".wav", ".flac", ".ogg", ".mp3")


@dataclass
class Benchmark:
    """Pairs of a benchmark."""
    name: str
    source: str  # the folder or file they were read from
    split: str = ""
    downloaded: bool = True  # or a manifest, whose name may be a benchmark's
    pairs: list[dict] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> which pairs

    def summary(self) -> str:
        """`sblimp, dev: 25,200 pairs of sLM21-dataset/syntactic/dev; left out: 2 whose file is missing (3 aan, …)`"""
        out = "; ".join(f"{len(ids)} {reason} ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
                        for reason, ids in self.left_out.items())
        return (f"{self.name}{f', {self.split}' if self.split else ''}: {len(self.pairs):,} pairs of {self.source}; "
                f"left out: {out or 'none'}")

    def write(self, path: str | Path) -> None:
        """As a manifest."""
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in self.pairs)
        Path(path).write_text(text, encoding="utf-8")


def look_into(folder: Path) -> str:
    """What is in a folder, in a few words."""
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return f"it holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "it is empty"


def find_audio(folder: Path, name: str) -> Path | None:
    """A file of a folder by its name, which may lack its extension."""
    return next((p for p in (folder / name, *(folder / f"{name}{end}" for end in AUDIO)) if p.is_file()), None)


def read_slm21(name: str, path: str, split: str) -> Benchmark:
    """ZeroSpeech's sLM21-dataset: {lexical,syntactic}/{dev,test}/gold.csv beside the wavs that it names.

    Pairs are the two rows, one correct and one not, of the same item in the same voice: for sBLIMP of the same (id,
    voice, type, subtype), as ids recur across subtypes; for sWUGGY of the same (voice, id).
    """
    task = {"sblimp": "syntactic", "swuggy": "lexical"}[name]
    keys = {"sblimp": ("type", "subtype", "id", "voice"), "swuggy": ("id", "voice")}[name]
    places = [Path(path) / task / split, Path(path) / split, Path(path)]
    folder = next((p for p in places if (p / "gold.csv").is_file()), None)
    if folder is None:
        raise SystemExit(f"{path}: no {task}/{split}/gold.csv below it; {look_into(Path(path))}; expected the folder "
                         f"sLM21-dataset (ZeroSpeech's test split comes without its answers)")
    text = {"sblimp": "transcription", "swuggy": "word"}[name]
    groups = defaultdict(list)
    with open(folder / "gold.csv", newline="", encoding="utf-8", errors="replace") as f:
        rows = csv.DictReader(f)
        wanted = {"filename", "correct", *keys}
        if missing := wanted - set(rows.fieldnames or ()):
            raise SystemExit(f"{folder}/gold.csv: no column {', '.join(sorted(missing))}; it has "
                             f"{', '.join(rows.fieldnames or ())}; a {task} gold.csv is expected")
        for row in rows:
            if None in row or any(row[k] is None for k in wanted):
                raise SystemExit(f"{folder}/gold.csv: line {rows.line_num} has not as many fields as the first; is the "
                                 f"download whole?")
            groups[tuple(row[k] for k in keys)].append(row)
    found = Benchmark(name, str(folder), split)
    for key, rows in groups.items():
        label = " ".join(key)
        sides = {side: [r for r in rows if (r["correct"] or "").strip() in ok]
                 for side, ok in (("positive", ("1", "1.0", "True")), ("negative", ("0", "0.0", "False")))}
        if max(map(len, sides.values())) > 1:
            raise SystemExit(f"{folder}/gold.csv: {label}: {len(sides['positive'])} correct and "
                             f"{len(sides['negative'])} incorrect rows; which are a pair can't be told")
        if not all(sides.values()):
            found.left_out["without a counterpart"].append(label)
            continue
        files = {side: find_audio(folder, r["filename"]) for side, (r,) in sides.items()}
        if not all(files.values()):
            found.left_out["whose file is missing"].append(label)
            continue
        (one,) = sides["positive"]
        pair = {"id": "_".join(key), "item": "_".join(x for k, x in zip(keys, key) if k != "voice")}
        pair |= {k: one[k] for k in ("voice", "type", "subtype") if one.get(k)}
        if "frequency" in one:
            unknown = one["frequency"] in ("oov", "0", "0.0")  # how often LibriSpeech has the word
            pair["frequency"] = "out of vocabulary" if unknown else "in vocabulary"
        pair |= {f"{side}_text": r[text] for side, (r,) in sides.items() if r.get(text)}
        found.pairs.append(pair | {side: str(file.resolve()) for side, file in files.items()})
    return found


def read_storycloze(name: str, path: str, split: str) -> Benchmark:
    """SpokenStoryCloze: a flat folder of `N_….wav`, the story and then the other ending by rising N, .txt beside.

    Which two are a pair follows from N, so that a missing file costs a pair and shifts no other.
    """
    folder, numbers = Path(path), {}
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in AUDIO) if folder.is_dir() else []
    for file in files:
        number = re.match(r"(\d+)_", file.name)
        if not number:
            raise SystemExit(f"{file}: its name does not begin with a number and _, as SpokenStoryCloze's do; "
                             f"{look_into(folder)}")
        if (n := int(number[1])) in numbers:
            raise SystemExit(f"{folder}: {numbers[n].name} and {file.name} have the same number, so their order, and "
                             f"which is right, can't be told; download it again")
        numbers[n] = file
    if not numbers:
        raise SystemExit(f"{path}: no audio files N_….wav in it; {look_into(folder)}; expected the unpacked "
                         f"SpokenStoryCloze, sSC or tSC")
    first, last = min(numbers), max(numbers)
    whole = len(numbers) == last - first + 1 and len(numbers) % 2 == 0
    if not (whole or first == 0 or first == 1 and last % 2 == 0):
        raise SystemExit(f"{folder}: its numbers are from {first} to {last} and {last - first + 1 - len(numbers)} are "
                         f"missing: which two are a pair can't be told; download it again")
    found = Benchmark(name, path)
    for n in range(first, last + 1, 2):
        both = {side: numbers.get(i) for side, i in (("positive", n), ("negative", n + 1))}
        if not all(both.values()):
            found.left_out["whose file is missing"].append(f"{n} and {n + 1}")
            continue
        texts = {f"{side}_text": file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()
                 for side, file in both.items() if file.with_suffix(".txt").is_file()}
        found.pairs.append({"id": f"{n}"} | (texts if len(texts) == 2 else {})
                           | {side: str(file.resolve()) for side, file in both.items()})
    opening = {n: file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").split()[:4]
               for n, file in numbers.items() if file.with_suffix(".txt").is_file()}
    alike = {n for n in opening if opening[n] == opening.get(n + 1)}  # the two of a pair tell the same story
    if sum((n - first) % 2 for n in alike) > len(alike) / 2:
        raise SystemExit(f"{folder}: by their texts, {first + 1} and {first + 2} would be a pair and {first} and "
                         f"{first + 1} none, so a file is missing at the beginning; download it again")
    return found


def read_salmon(name: str, path: str, split: str) -> Benchmark:
    """SALMon: a folder for each part, `x_INDEX….wav` in it; of the two files of an index the first by name is right."""
    root, found = Path(path), Benchmark(name, path)
    parts = [root] if root.name in SALMON_PARTS else [root / p for p in SALMON_PARTS if (root / p).is_dir()]
    if not parts:
        raise SystemExit(f"{path}: none of SALMon's parts ({', '.join(SALMON_PARTS)}) is in it; {look_into(root)}")
    for absent in sorted(set(SALMON_PARTS) - {p.name for p in parts}) if root.name not in SALMON_PARTS else ():
        found.left_out["a whole part, which is not there"].append(absent)
    for folder in parts:
        groups = defaultdict(list)
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in AUDIO):
            index = re.match(r"[^_]+_(\d+)", file.stem)
            if not index:
                raise SystemExit(f"{file}: no number after the first _ of its name, as SALMon's have")
            groups[int(index[1])].append(file)
        for index, files in sorted(groups.items()):
            if len(files) > 2:
                raise SystemExit(f"{folder}: {len(files)} files of index {index}: which are a pair can't be told")
            if len(files) < 2:
                found.left_out["whose file is missing"].append(f"{folder.name} {index}")
                continue
            both = {side: str(file.resolve()) for side, file in zip(("positive", "negative"), files)}
            found.pairs.append({"id": f"{folder.name}_{index}", "part": folder.name} | both)
    return found


READERS = {"sblimp": read_slm21, "swuggy": read_slm21, "sstorycloze": read_storycloze, "tstorycloze": read_storycloze,
           "salmon": read_salmon}


def read_benchmark(name: str, path: str, split: str = "dev", max_left_out: float = 0.01) -> Benchmark:
    """The pairs of a download. SystemExit if it is another, holds none, or lacks more of them than `max_left_out`."""
    found = READERS[name](name, path, split)
    parts = len({p.get("part") for p in found.pairs})
    missing = sum(len(ids) * (len(found.pairs) // max(1, parts) if "whole part" in why else 1)
                  for why, ids in found.left_out.items())
    if not found.pairs or missing > max_left_out * (missing + len(found.pairs)):
        raise SystemExit(f"{found.summary()}: is the download whole? max_left_out, now {max_left_out:g}, allows for "
                         f"more")
    return found


def read_manifest(path: str) -> Benchmark:
    """A manifest, or a folder with a manifest.jsonl. SystemExit naming file and line of what is wrong."""
    file = Path(path) / "manifest.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SystemExit(f"{file}: no manifest; synth_stories.py writes folders with one, --write_manifest one of a "
                         f"benchmark")
    found = Benchmark(file.parent.name if file.name == "manifest.jsonl" else file.stem, path, downloaded=False)
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{file}: not a manifest ({e})") from None
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            pair = {k: v if v is None else str(v) for k, v in ({"id": number} | json.loads(line)).items()}
            for side in ("positive", "negative"):
                pair[side] = str(file.parent / pair[side])
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"{file}:{number}: not a pair with positive and negative ({e!r})") from None
        if missing := [pair[side] for side in ("positive", "negative") if not Path(pair[side]).is_file()]:
            raise SystemExit(f"{file}:{number}: {missing[0]} is missing; copy the folder whole")
        found.pairs.append(pair)
    if not found.pairs:
        raise SystemExit(f"{file}: no pairs in it")
    return found


def disk_cache(name: str, keys: list[str], compute: Callable[[list[int]], list], batch: int = 64) -> list:
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

    units = disk_cache(units_cache(tokenizer, benchmark.name), [sha256(Path(path)) for path in paths], encode)
    if len(rates) > 1:
        print(f"{benchmark.name}: files of different sample rates ("
              + ", ".join(f"{n:,} of {rate:,} Hz" for rate, n in rates.most_common()) + "); all resampled to 16 kHz")
    utterances = list(map(to_tokens, units))
    return list(zip(utterances[:len(benchmark.pairs)], utterances[len(benchmark.pairs):]))
