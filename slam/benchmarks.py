"""Spoken benchmarks as they are downloaded: each becomes a list of pairs of audio files, a manifest, and their units.

    python eval.py --benchmark sblimp --path sLM21-dataset --checkpoint out/slam
    python eval.py --benchmark sblimp --path sLM21-dataset --write_manifest sblimp.jsonl      # only list the pairs

A manifest has one JSON pair a line; its paths are absolute or relative to its folder. Optional fields: `type`,
`subtype`, `part`, `frequency`, `voice` (each value gets a result of its own), `item` (pairs of one item in several
voices are not independent), `positive_text` and `negative_text` (for a text LM as ceiling).
"""
import contextlib
import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from slam.embedded import cache_dir, file_digest
from slam.units import sha256_of, to_tokens, write_atomic

SIDES = ("positive", "negative")
SALMON_PARTS = ("bg_alignment", "bg_all_consistency", "bg_domain_consistency", "gender_consistency", "rir_consistency",
                "sentiment_alignment", "sentiment_consistency", "speaker_consistency")
AUDIO = (".wav", ".flac", ".ogg", ".mp3")


@dataclass
class Benchmark:
    """The pairs of a benchmark."""
    name: str
    source: str  # the folder or file that they were read from
    split: str = ""
    downloaded: bool = True  # False for a manifest, which may bear a benchmark's name
    pairs: list[dict] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> pairs

    def summary(self) -> str:
        """`sblimp, dev: 25,200 pairs of sLM21-dataset/syntactic/dev; left out: 2 whose file is missing (3 aan, …)`"""
        out = "; ".join(f"{len(ids)} {reason} ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
                        for reason, ids in self.left_out.items())
        return (f"{self.name}{f', {self.split}' if self.split else ''}: {len(self.pairs):,} pairs of {self.source}; "
                f"left out: {out or 'none'}")

    def add(self, label: str, pair: dict, files: dict[str, Path | None]) -> None:
        """Add a pair with its two files, or leave it out if one is missing."""
        if all(files.values()):
            self.pairs.append(pair | {side: str(file.resolve()) for side, file in files.items()})
        else:
            self.left_out["whose file is missing"].append(label)

    def write(self, path: str | Path) -> None:
        """Write the pairs as a manifest."""
        write_atomic(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in self.pairs))


def contents(folder: Path) -> str:
    """What is in a folder, for error messages."""
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return f"it holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "it is empty"


def read_slm21(name: str, path: str, split: str) -> Benchmark:
    """ZeroSpeech's sLM21-dataset: {lexical,syntactic}/{dev,test}/gold.csv and the wavs it names.

    A pair is a correct and an incorrect row of the same key: (id, voice, type, subtype) for sBLIMP, whose ids recur
    across subtypes; (id, voice) for sWUGGY.
    """
    task, keys, text = {"sblimp": ("syntactic", ("type", "subtype", "id", "voice"), "transcription"),
                        "swuggy": ("lexical", ("id", "voice"), "word")}[name]
    places = [Path(path) / task / split, Path(path) / split, Path(path)]
    folder = next((p for p in places if (p / "gold.csv").is_file()), None)
    if folder is None:
        raise SystemExit(f"{path}: no {task}/{split}/gold.csv below it; {contents(Path(path))}; expected the folder "
                         f"sLM21-dataset (its archive of 2021 has no answers for the test split)")
    rows_of = defaultdict(list)
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
            rows_of[tuple(row[k] for k in keys)].append(row)
    found = Benchmark(name, str(folder), split)
    for key, rows in rows_of.items():
        label = " ".join(key)
        right, wrong = ([r for r in rows if r["correct"].strip() in marks]
                        for marks in (("1", "1.0", "True"), ("0", "0.0", "False")))
        if max(len(right), len(wrong)) > 1:
            raise SystemExit(f"{folder}/gold.csv: {label}: {len(right)} correct and {len(wrong)} incorrect rows; which "
                             f"are a pair can't be told")
        if not (right and wrong):
            found.left_out["without a counterpart"].append(label)
            continue
        pair = {"id": "_".join(key), "item": "_".join(x for k, x in zip(keys, key) if k != "voice")}
        pair |= {k: right[0][k] for k in ("voice", "type", "subtype") if right[0].get(k)}
        if "frequency" in right[0]:  # how often the word occurs in LibriSpeech
            pair["frequency"] = ("out of" if right[0]["frequency"] in ("oov", "0", "0.0") else "in") + " vocabulary"
        files = {}
        for side, row in zip(SIDES, right + wrong):
            candidates = [folder / (row["filename"] + end) for end in ("", *AUDIO)]  # the name may lack its extension
            files[side] = next((p for p in candidates if p.is_file()), None)
            pair |= {f"{side}_text": row[text]} if row.get(text) else {}
        found.add(label, pair, files)
    return found


def read_storycloze(name: str, path: str, split: str) -> Benchmark:
    """SpokenStoryCloze: a flat folder of `N_….wav`, in order of N a story, then its wrong version; texts in N_….txt."""
    folder, numbers = Path(path), {}
    for file in sorted(p for p in folder.glob("*") if p.suffix.lower() in AUDIO):
        number = re.match(r"(\d+)_", file.name)
        if not number:
            raise SystemExit(f"{file}: its name does not begin with a number and _, as SpokenStoryCloze's do; "
                             f"{contents(folder)}")
        if (n := int(number[1])) in numbers:
            raise SystemExit(f"{folder}: {numbers[n].name} and {file.name} have the same number, so their order, and "
                             f"which is right, can't be told; download it again")
        numbers[n] = file
    if not numbers:
        raise SystemExit(f"{path}: no audio files N_….wav in it; {contents(folder)}; expected the unpacked "
                         f"SpokenStoryCloze, sSC or tSC")
    first, last = min(numbers), max(numbers)
    whole = len(numbers) == last - first + 1 and len(numbers) % 2 == 0
    if not (whole or first == 0 or first == 1 and last % 2 == 0):
        raise SystemExit(f"{folder}: its numbers are from {first} to {last} and {last - first + 1 - len(numbers)} are "
                         f"missing: which two are a pair can't be told; download it again")
    texts = {n: file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()
             for n, file in numbers.items() if file.with_suffix(".txt").is_file()}
    alike = {n for n in texts if n + 1 in texts and texts[n].split()[:4] == texts[n + 1].split()[:4]}
    if sum((n - first) % 2 for n in alike) > len(alike) / 2:  # the two of a pair begin with the same words
        raise SystemExit(f"{folder}: by their texts, {first + 1} and {first + 2} would be a pair and {first} and "
                         f"{first + 1} none, so a file is missing at the beginning; download it again")
    found = Benchmark(name, path)
    for n in range(first, last + 1, 2):
        both = {f"{side}_text": texts[i] for side, i in zip(SIDES, (n, n + 1)) if i in texts}
        found.add(f"{n} and {n + 1}", {"id": f"{n}"} | (both if len(both) == 2 else {}),
                  {side: numbers.get(i) for side, i in zip(SIDES, (n, n + 1))})
    return found


def read_salmon(name: str, path: str, split: str) -> Benchmark:
    """SALMon: a folder for each part with `x_INDEX….wav`; of an index's two files the first by name is the positive."""
    root, found = Path(path), Benchmark(name, path)
    parts = [root] if root.name in SALMON_PARTS else [root / part for part in SALMON_PARTS]
    if absent := [part.name for part in parts if not part.is_dir()]:
        raise SystemExit(f"{path}: no {', '.join(absent)} in it; {contents(root)}; expected all of SALMon's parts, or "
                         f"the folder of one")
    for folder in parts:
        files_of = defaultdict(list)
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in AUDIO):
            index = re.match(r"[^_]+_(\d+)", file.stem)
            if not index:
                raise SystemExit(f"{file}: no number after the first _ of its name, as SALMon's have")
            files_of[int(index[1])].append(file)
        for index, files in sorted(files_of.items()):
            if len(files) > 2:
                raise SystemExit(f"{folder}: {len(files)} files of index {index}: which are a pair can't be told")
            found.add(f"{folder.name} {index}", {"id": f"{folder.name}_{index}", "part": folder.name},
                      dict(zip(SIDES, [*files, None])))
    return found


READERS = {"sblimp": read_slm21, "swuggy": read_slm21, "sstorycloze": read_storycloze, "tstorycloze": read_storycloze,
           "salmon": read_salmon}


def read_benchmark(name: str, path: str, split: str = "dev", max_left_out: float = 0.01) -> Benchmark:
    """The pairs of a download. SystemExit if it is another one, or lacks more than `max_left_out` of its pairs."""
    found = READERS[name](name, path, split)
    missing = sum(map(len, found.left_out.values()))
    if not found.pairs or missing > max_left_out * (missing + len(found.pairs)):
        raise SystemExit(f"{found.summary()}: is the download whole? To accept more left out, raise max_left_out, "
                         f"now {max_left_out:g}")
    return found


def read_manifest(path: str) -> Benchmark:
    """A manifest, or a folder with a manifest.jsonl. SystemExit naming file and line of what is wrong."""
    file = Path(path) / "manifest.jsonl" if Path(path).is_dir() else Path(path)
    name = file.parent.resolve().name if file.name == "manifest.jsonl" else file.stem
    found = Benchmark(name, path, downloaded=False)
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n").split("\n")
    except OSError as e:
        raise SystemExit(f'{file}: no manifest ({e.strerror}), with lines like {{"positive": "a.wav", "negative": '
                         f'"b.wav"}}; synth_stories.py and --write_manifest write some') from None
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            pair = {k: v if v is None else str(v) for k, v in ({"id": number} | json.loads(line)).items()}
            pair |= {side: str(file.parent / pair[side]) for side in SIDES}
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"{file}:{number}: not a pair with positive and negative ({e!r})") from None
        if missing := [pair[side] for side in SIDES if not Path(pair[side]).is_file()]:
            raise SystemExit(f"{file}:{number}: {missing[0]} is missing; copy the folder whole")
        found.pairs.append(pair)
    if not found.pairs:
        raise SystemExit(f"{file}: no pairs in it")
    return found


# ---------------------------------------------------------------- units of a benchmark
def disk_cache(path: Path, keys: list[str], compute: Callable[[list[int]], Iterable], batch: int = 64) -> list:
    """The values of `keys`: read from the file `path` if they are there, else computed by `compute(indices)`.

    compute: gets at most `batch` indices at once. Each value is written as it comes, so a killed run can continue.
    """
    known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a kill may have cut a line
            known |= json.loads(line)
    todo = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    with open(path, "a") as f, tqdm(total=len(todo), disable=None, desc=path.stem) as bar:
        for at in range(0, len(todo), batch):
            part = todo[at:at + batch]
            for i, value in zip(part, compute(part), strict=True):
                known[keys[i]] = value
                f.write("\n" + json.dumps({keys[i]: value}) + "\n")
                f.flush()
                bar.update()
    return [known[key] for key in keys]


def units_cache(tokenizer, benchmark: str) -> Path:
    """File with the units of a benchmark's audio: by fingerprint, dtype and device type, which all change units."""
    kind = str(tokenizer.encoder.device).split(":")[0]
    made_by = sha256_of(tokenizer.fingerprint.to_dict(), str(tokenizer.encoder.dtype), kind)
    return cache_dir() / "units" / f"{benchmark}-{made_by[:16]}.jsonl"


def tokenize_pairs(tokenizer, benchmark: Benchmark) -> list[tuple[list[int], list[int]]]:
    """Both files of each pair as utterances `1 units 1`, cached on disk by the file's sha256.

    SystemExit naming a file that holds no usable audio.
    """
    from slam.audio import load_audio
    paths = [pair[side] for side in SIDES for pair in benchmark.pairs]

    def encode(part: list[int]) -> list[list[int]]:
        try:
            waves = [load_audio(paths[i]) for i in part]
        except ValueError as e:
            raise SystemExit(str(e)) from None
        return [units.tolist() for units, _ in tokenizer.encode_batch(waves)]

    units = disk_cache(units_cache(tokenizer, benchmark.name), [file_digest(Path(path)) for path in paths], encode)
    utterances = list(map(to_tokens, units))
    return list(zip(utterances[:len(benchmark.pairs)], utterances[len(benchmark.pairs):]))
