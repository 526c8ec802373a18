"""slam.pair_data."""
import contextlib
import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from slam.audio import check_wave, load_audio, read_parquet
from slam.metrics import auto_bleu
from slam.slamkit import slamkit_units
from slam.tts import TTS

SIDES = ("prompt", "chosen", "rejected")


def read_swag(path: str, cfg) -> tuple[list[dict], Counter]:
    """SWAG's original CSV -> texts of preference pairs, as SpokenSwag has them, and the rows skipped, by reason.

    Of gold rows, prompt is sent1, chosen sent2 with the right ending, rejected sent2 with a wrong one drawn by (seed,
    row). A pair stays if the bigram auto-BLEU of "prompt chosen" is below `max_auto_bleu`. SystemExit if it is no such
    file.
    """
    columns = ["sent1", "sent2", "gold-source", "ending0", "ending1", "ending2", "ending3", "label"]
    pairs, skipped = [], Counter()
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = csv.DictReader(f, strict=True)
            if missing := [c for c in columns if c not in (rows.fieldnames or ())]:
                raise SystemExit(f"{path}: no column {', '.join(missing)}; it wants SWAG's full train.csv or val.csv")
            for number, row in enumerate(rows):
                prompt, start, source, *endings, label = (" ".join((row[c] or "").split()) for c in columns)
                if source != "gold":
                    skipped["not gold"] += 1
                    continue
                if not (prompt and start and all(endings)) or label not in ("0", "1", "2", "3") or None in row:
                    skipped["malformed"] += 1
                    continue
                rng = np.random.default_rng((cfg.seed, number))
                right, (*wrong,) = endings[int(label)], (e for i, e in enumerate(endings) if i != int(label))
                chosen, rejected = f"{start} {right}", f"{start} {wrong[rng.integers(3)]}"
                if chosen == rejected:
                    skipped["with a wrong ending that is the right one"] += 1
                    continue
                if auto_bleu(f"{prompt} {chosen}") >= cfg.max_auto_bleu:
                    skipped["repetitive"] += 1
                    continue
                voice = str(rng.choice(cfg.voices or TTS[cfg.tts][1]))
                pairs.append({"id": f"swag{number:06d}", "speaker": voice, "prompt_text": prompt, "chosen_text": chosen,
                              "rejected_text": rejected})
    except OSError as e:
        raise SystemExit(f"--swag={path}: not readable ({e.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as e:
        raise SystemExit(f"{path}: row {len(pairs) + skipped.total() + 2}: not CSV ({e})") from None
    return pairs, skipped


def read_spoken_swag(input: str, cfg) -> tuple[list[dict], Counter]:
    """Hugging Face's slprl/SpokenSwag, a folder of its parquet files or one: texts of pairs, and the rows skipped.

    A pair's "split" is that of its file's name or folder. It stays if its `auto_bleu2`, or where it has none that of
    "prompt chosen", is below `max_auto_bleu`. SystemExit if it is no such file, or pyarrow is not there.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SystemExit(f"{input}: reading parquet needs pyarrow: pip install pyarrow") from None
    pairs, skipped = [], Counter()
    for path, name in parquet_files(input):
        try:
            names = parquet.read_schema(path).names
            if missing := {x for side in SIDES for x in (side, f"{side}_text")} - set(names):
                raise SystemExit(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(names)}")
            columns = [f"{side}_text" for side in SIDES] + [x for x in ("speaker", "auto_bleu2") if x in names]
            rows = parquet.read_table(path, columns=columns).to_pylist()
        except (OSError, ValueError) as e:  # pyarrow's own are of these
            raise SystemExit(f"{path}: not a whole parquet file ({str(e).splitlines()[0]})") from None
        split = "val" if re.search(r"\b(val|test|dev)", name) else "train"
        for number, row in enumerate(rows):
            value = row.pop("auto_bleu2", None)
            if value is None:
                value = auto_bleu(f"{row['prompt_text']} {row['chosen_text']}")
            if value >= cfg.max_auto_bleu:
                skipped["repetitive"] += 1
            else:
                pairs.append({"id": f"{name}/{number:07d}", "split": split} | row)
    return pairs, skipped


def parquet_files(input: str) -> list[tuple[Path, str]]:
    """Parquet files of a folder, or one, each with what it is called there: default/train/0000."""
    if not Path(input).is_dir():
        return [(Path(input), Path(input).stem)]
    return [(p, p.relative_to(input).with_suffix("").as_posix()) for p in sorted(Path(input).rglob("*.parquet"))]


def read_slamkit_pairs(path: str, cfg, n_units: int) -> tuple[list[dict], Counter]:
    """SlamKit's preference features, JSON lines of prompt, chosen and rejected with their units: pairs, rows skipped.

    {"prompt": {"units", "duration"}, "chosen": …, "rejected": …, "prompt_text", …}; also with "audio_repr" around the
    units, as its documentation has it.
    """
    pairs, skipped = [], Counter()
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f):
                row = json.loads(line)
                texts = {k: row[k] for side in SIDES if (k := f"{side}_text") in row}
                if auto_bleu(f"{texts.get('prompt_text', '')} {texts.get('chosen_text', '')}") >= cfg.max_auto_bleu:
                    skipped["repetitive"] += 1
                    continue
                units = {side: slamkit_units(row[side], n_units)[0].tolist() for side in SIDES}
                pairs.append({"id": f"{Path(path).stem}/{number:07d}"} | units | texts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"{path}: line {len(pairs) + skipped.total() + 1}: not a pair with units ({e!r}), as "
                         f"SlamKit's preference_alignment_feature_extractor writes them") from None
    return pairs, skipped


def stored_waves(files: list[tuple[Path, str]], wanted: dict[str, dict]):
    """Yield (id and side, [wave]) of parquet files' rows; a wave of no samples for one that can't be read."""
    for path, name in files:
        prefix = f"{name}/"
        columns = [read_parquet(str(path), prefix, False, side, lambda id: id[:len(prefix) + 7] in wanted)
                   for side in SIDES]
        for items in zip(*columns):
            for side, item in zip(SIDES, items):
                if item.fatal:
                    raise SystemExit(f"{path}: {item.problem}")
                with contextlib.suppress(ValueError):
                    yield f"{item.id[:len(prefix) + 7]} {side}", [load_audio(item.source, item.id)]
                    continue
                yield f"{item.id[:len(prefix) + 7]} {side}", [np.zeros(0, np.float32)]


def is_sound(wave: np.ndarray) -> bool:
    with contextlib.suppress(ValueError):
        check_wave(wave)
        return True
    return False
