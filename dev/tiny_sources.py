"""What synth_stories.py has made, laid out as runs/slam.sh's downloads: python dev/tiny_sources.py MADE SOURCES.json

Out: beside SOURCES.json, archives like LibriSpeech's, Libri-Light's, ZeroSpeech's and StoryCloze's, and a CSV like
SWAG's, with file:// URLs, in SOURCES.json as runs/corpora.py reads it.
"""
import csv
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from slam.embedded import file_digest  # noqa: E402


def main(made: Path, sources: Path) -> None:
    folder = (sources.parent / "served").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}

    def add(name: str, path: Path, **fields) -> None:
        found[name] = {"url": path.as_uri(), "gb": path.stat().st_size / 1e9, "size": path.stat().st_size} | fields

    # speech: a few stories each
    stories = sorted((made / "audio").glob("*.flac"))
    parts = {"librispeech_dev/dev-clean": 2, "librispeech_dev/dev-other": 1, "librispeech/train-clean-100": 2,
             "stinystories/part": 2, "libri_light/medium": len(stories)}
    for name, n in parts.items():
        mine, stories = stories[:n], stories[n:]
        stem, packed = name.rpartition("/")[2], "librispeech" in name
        path = folder / (f"{stem}.tar.gz" if packed else f"{stem}.tar")
        with tarfile.open(path, "w:gz" if packed else "w", format=tarfile.GNU_FORMAT) as tar:
            for i, file in enumerate(mine):
                tar.add(file, f"LibriSpeech/{stem}/{i}/1/{i}-1-0000.flac" if packed else f"{stem}/{i}/book/{file.name}")
        whole = {"digest": f"md5:{file_digest(path, 'md5')}"} if packed else {"pieces": 1 + ("medium" in name)}
        add(name, path, hours=0.01 * len(mine), **whole)

    # benchmarks
    pairs = [json.loads(line) for line in (made / "sblimp" / "manifest.jsonl").read_text().splitlines()]
    gold = io.StringIO()
    rows = csv.writer(gold)
    rows.writerow(["filename", "id", "voice", "type", "subtype", "transcription", "correct"])
    with zipfile.ZipFile(folder / "sLM21.zip", "w") as z:
        for i, pair in enumerate(pairs):
            for side, correct in (("positive", 1), ("negative", 0)):
                z.write(made / "sblimp" / pair[side], f"sLM21/syntactic/dev/{i}_{correct}.wav")
                rows.writerow([f"{i}_{correct}", i, "hibari", pair.get("type", "all"), pair.get("subtype", ""),
                               pair.get(f"{side}_text", ""), correct])
        z.writestr("sLM21/syntactic/dev/gold.csv", gold.getvalue())
    add("bench/sLM21-dataset/syntactic/dev", folder / "sLM21.zip", unpack="syntactic/dev/")
    pairs = [json.loads(line) for line in (made / "tstorycloze" / "manifest.jsonl").read_text().splitlines()]
    for name in ("sSC", "tSC"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as z:
            for i, pair in enumerate(pairs):
                for j, side in enumerate(("positive", "negative")):
                    z.write(made / "tstorycloze" / pair[side], f"{name}/{2 * i + j}_story.wav")
                    z.writestr(f"{name}/{2 * i + j}_story.txt", pair[f"{side}_text"])
        add(f"bench/{name}", folder / f"{name}.zip", unpack="*")

    # preference pairs: a story's own fifth sentence against other stories'
    texts = [json.loads(line)["sentences"] for line in (made / "stories.jsonl").read_text().splitlines()]
    with open(folder / "train.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source",
                       *(f"ending{i}" for i in range(4)), "label"])
        for i, story in enumerate(texts):
            others = [texts[(i + j) % len(texts)][4] for j in (1, 2, 3)]
            rows.writerow([i, i, "", story[1], "Then", "gold", story[4], *others, 0])
    add("pairs/spoken_swag", folder / "train.csv")
    sources.write_text(json.dumps(found, indent=1))
    print(f"{sources}: {len(found)} sources")


if __name__ == "__main__":
    if len(sys.argv) < 3 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
