"""benchmarks.py: downloads in exactly their layouts, with real speech in them, and what is wrong with some."""
import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
from conftest import refused, run

from slam.audio import load_audio
from slam.benchmarks import SALMON_PARTS, Benchmark, read_benchmark, read_manifest, tokenize_pairs, units_cache
from slam.embedded import cache_dir
from slam.tokenizer import SpeechTokenizer, read_codebook, write_codebook
from slam.units import Fingerprint, to_tokens


@pytest.fixture(scope="module")
def wavs(stories):
    return sorted((stories / "sblimp").glob("*.wav"))


def write_csv(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def slm21(wavs, tmp_path):
    """sLM21-dataset: ids recur across subtypes, three voices, names with and without extension."""
    root, audio = tmp_path / "sLM21-dataset", iter(wavs * 10)

    def rows(task: str, items: list[dict]) -> list[dict]:
        folder, out = root / task / "dev", []
        folder.mkdir(parents=True)
        for i, item in enumerate(items):
            for correct in (0, 1):
                name = f"{task}_{i}_{correct}"
                shutil.copy(next(audio), folder / f"{name}.wav")
                out.append({"filename": name + (".wav" if i % 2 else "")} | item | {"correct": correct})
        return out

    syntactic = [{"id": i, "voice": v, "type": t, "subtype": s, "transcription": f"{t} {s} {i}"} for i in (1, 2)
                 for v in "ABC" for t, s in (("agreement", "distractor"), ("agreement", "irregular"), ("island", "wh"))]
    write_csv(root / "syntactic" / "dev" / "gold.csv", rows("syntactic", syntactic))
    lexical = [{"id": i, "voice": v, "frequency": f, "word": f"w{i}", "phones": "a b", "length": 3} for i, f in (
        (1, "0"), (2, "4")) for v in "AB"]
    write_csv(root / "lexical" / "dev" / "gold.csv", rows("lexical", lexical))
    return root


def test_sblimp_as_downloaded(slm21):
    found = read_benchmark("sblimp", str(slm21))
    assert len(found.pairs) == 18 and not found.left_out and found.split == "dev"
    assert len({p["id"] for p in found.pairs}) == 18 and len({p["item"] for p in found.pairs}) == 6
    for pair in found.pairs:
        stems = [pair[side].rsplit("/", 1)[1].rsplit("_", 1) for side in ("positive", "negative")]
        assert stems[0][0] == stems[1][0] and (stems[0][1], stems[1][1]) == ("1.wav", "0.wav")
        assert pair["positive_text"] == f"{pair['type']} {pair['subtype']} {pair['item'].split('_')[2]}"
    assert read_benchmark("sblimp", str(slm21 / "syntactic" / "dev")).pairs == found.pairs
    assert "sblimp, dev: 18 pairs of" in found.summary() and "left out: none" in found.summary()


def test_swuggy_as_downloaded(slm21):
    found = read_benchmark("swuggy", str(slm21))
    assert len(found.pairs) == 4 and {p["frequency"] for p in found.pairs} == {"in vocabulary", "out of vocabulary"}
    assert {p["item"] for p in found.pairs} == {"1", "2"} and found.pairs[0]["positive_text"] == "w1"


def test_slm21_with_something_wrong(slm21, tmp_path):
    def refusal(name="sblimp", path=slm21, **how):
        with pytest.raises(SystemExit) as e:
            read_benchmark(name, str(path), **how)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "no syntactic/test/gold.csv below it; it holds lexical/, syntactic/" in refusal(split="test")
    assert "there is no such folder" in refusal(path=tmp_path / "nowhere")
    assert "no column subtype, type; it has filename, id, voice" in refusal(path=slm21 / "lexical" / "dev")
    folder = slm21 / "syntactic" / "dev"
    (folder / "syntactic_3_1.wav").unlink()
    assert "17 pairs" in refusal() and "1 whose file is missing" in refusal() and "download whole" in refusal()
    assert read_benchmark("sblimp", str(slm21), max_left_out=0.1).left_out.keys() == {"whose file is missing"}
    rows = list(csv.DictReader(open(folder / "gold.csv")))
    write_csv(folder / "gold.csv", rows[1:])
    assert "1 without a counterpart (agreement distractor 1 A)" in refusal()
    write_csv(folder / "gold.csv", [*rows, rows[5]])
    assert "2 correct and 1 incorrect rows; which are a pair can't be told" in refusal()


def storycloze(folder, wavs, numbers) -> str:
    folder.mkdir()
    for i, n in enumerate(numbers):
        shutil.copy(wavs[i], folder / f"{n}_{'abcde'[i % 5]}.wav")
        (folder / f"{n}_{'abcde'[i % 5]}.txt").write_text(f"Story {n}.\n")
    return str(folder)


@pytest.mark.parametrize("numbers", [range(12), range(1, 13), range(100, 112)])
def test_storycloze_as_downloaded(wavs, tmp_path, numbers):
    found = read_benchmark("tstorycloze", storycloze(tmp_path / "tSC", wavs, numbers))
    assert [(p["positive_text"], p["negative_text"]) for p in found.pairs] == [
        (f"Story {n}.", f"Story {n + 1}.") for n in numbers[::2]]  # 2 before 10: by number, not by name


def test_storycloze_with_something_wrong(wavs, tmp_path):
    def refusal(path):
        with pytest.raises(SystemExit) as e:
            read_benchmark("sstorycloze", path)
        return str(e.value)

    folder = tmp_path / "gap"
    path = storycloze(folder, wavs, [n for n in range(12) if n != 5])
    assert "5 pairs" in refusal(path) and "1 whose file is missing (4 and 5)" in refusal(path)
    pairs = read_benchmark("sstorycloze", path, max_left_out=0.2).pairs
    assert [p["id"] for p in pairs] == ["0", "2", "6", "8", "10"]  # no other pair is shifted
    shutil.copy(wavs[0], folder / "7_again.wav")
    assert "7_again.wav and 7_b.wav have the same number" in refusal(path)
    path = storycloze(tmp_path / "shifted", wavs, range(1, 11))  # 0 and 11 are missing, which the numbers don't tell
    for text in Path(path).glob("*.txt"):
        text.write_text(f"Story {int(text.name.split('_')[0]) // 2} goes on")
    assert "2 and 3 would be a pair" in refusal(path)
    assert "3 are missing: which two are a pair can't be told" in refusal(storycloze(tmp_path / "few", wavs, [4, 5, 9]))
    assert "no audio files N_….wav in it; it is empty" in refusal(str((tmp_path / "none").mkdir() or tmp_path / "none"))
    (tmp_path / "other").mkdir()
    shutil.copy(wavs[0], tmp_path / "other" / "story.wav")
    assert "does not begin with a number" in refusal(str(tmp_path / "other"))


def test_salmon_as_downloaded(wavs, tmp_path):
    def fill(part: str) -> None:
        (tmp_path / part).mkdir()
        for i in range(3):
            shutil.copy(wavs[2 * i], tmp_path / part / f"sample_{i}_0.wav")
            shutil.copy(wavs[2 * i + 1], tmp_path / part / f"sample_{i}_1.wav")

    fill(SALMON_PARTS[0])
    one = read_benchmark("salmon", str(tmp_path / SALMON_PARTS[0]))
    assert len(one.pairs) == 3 and not one.left_out
    with pytest.raises(SystemExit, match=f"no {', '.join(SALMON_PARTS[1:])} in it; it holds {SALMON_PARTS[0]}/"):
        read_benchmark("salmon", str(tmp_path))
    for part in SALMON_PARTS[1:]:
        fill(part)
    found = read_benchmark("salmon", str(tmp_path))
    assert len(found.pairs) == 24 and {p["part"] for p in found.pairs} == set(SALMON_PARTS)
    assert all(p["positive"].endswith("_0.wav") and p["negative"].endswith("_1.wav") for p in found.pairs)
    shutil.copy(wavs[0], tmp_path / SALMON_PARTS[0] / "sample_1_2.wav")
    with pytest.raises(SystemExit, match="3 files of index 1"):
        read_benchmark("salmon", str(tmp_path), max_left_out=0.5)


def test_a_manifest_written_read_and_scored(slm21, runs, tmp_path):
    """The same pairs by a download and by its manifest; results by subset; units from the cache the second time."""
    manifest = tmp_path / "sblimp.jsonl"
    said = run("eval.py", "--benchmark=sblimp", f"--path={slm21}", f"--write_manifest={manifest}").stdout
    assert "18 pairs" in said
    assert read_manifest(str(manifest)).pairs == read_benchmark("sblimp", str(slm21)).pairs
    model = tmp_path / "lm"
    shutil.copytree(runs / "lm", model)
    (model / "results.json").write_text('{"mine": {"value": 1}}')
    run("eval.py", "--benchmark=sblimp", f"--path={slm21}", f"--checkpoint={model}")
    results = json.loads((model / "results.json").read_text())
    first = results["sblimp"]
    assert results["mine"] == {"value": 1} and first["n"] == 18 and first["items"] == 6 and len(first["interval"]) == 2
    assert first["by"]["type"].keys() == {"agreement", "island"} and first["by"]["voice"].keys() == set("ABC")
    assert first["settings"]["score"] == "mean" and len(first["made"]["weights"]) == 16
    kept = {p: p.stat().st_size for p in (cache_dir() / "units").iterdir()}
    run("eval.py", f"--manifest={manifest}", f"--checkpoint={model}", "--score=sum")
    assert {p: p.stat().st_size for p in (cache_dir() / "units").iterdir()} == kept  # nothing was tokenised again
    results = json.loads((model / "results.json").read_text())
    assert results["sblimp"]["settings"]["score"] == "sum" and results["sblimp"]["n"] == 18


def test_a_manifest_in_this_folder_of_files_whose_names_are_not_utf8(tmp_path, monkeypatch):
    pair = {"id": "0"} | {side: str(tmp_path / os.fsdecode(name)) for side, name in (("positive", b"caf\xe9.wav"),
                                                                                    ("negative", b"b.wav"))}
    for side in ("positive", "negative"):
        Path(pair[side]).touch()
    Benchmark("x", "here", pairs=[pair]).write(str(tmp_path / "manifest.jsonl"))
    monkeypatch.chdir(tmp_path)
    found = [read_manifest(x) for x in (".", "manifest.jsonl")]
    assert [x.name for x in found] == [tmp_path.name] * 2 and found[0].pairs == [pair]


def test_bad_manifests(stories, tmp_path):
    def refusal(text: str) -> str:
        (tmp_path / "manifest.jsonl").write_text(text)
        with pytest.raises(SystemExit) as e:
            read_manifest(str(tmp_path))
        return str(e.value)

    with pytest.raises(SystemExit, match='no manifest .* with lines like {"positive": "a.wav", "negative": "b.wav"}'):
        read_manifest(str(tmp_path))
    assert "a.wav is missing" in refusal('{"positive": "a.wav", "negative": "b.wav"}\n')
    assert ":1: not a pair" in refusal('{"positive": 3}\n')
    assert ":1: not a pair" in refusal('{"positve": "a.wav", "negative": "b.wav"}\n')
    assert "no pairs in it" in refusal("")
    assert "2 given for 1 benchmark" in refused("eval.py", "--benchmark=sblimp", "--path=a,b")
    assert "expected" in refused("eval.py", "--benchmark=sblmp", "--path=a")


def test_units_are_remembered_by_all_that_decides_them(voice, tmp_path, monkeypatch):
    """Another layer with the same k-means, or another number format, never gets the units of the first."""
    tensors, meta = read_codebook("embedded")
    write_codebook(tmp_path / "layer2.safetensors", tensors, meta | {"layer": 2})
    tokenizers = [SpeechTokenizer.load("embedded"), SpeechTokenizer.load(str(tmp_path / "layer2.safetensors")),
                  SpeechTokenizer.load("embedded", dtype="bfloat16")]
    assert len({t.fingerprint.codebook_sha256 for t in tokenizers}) == 1
    monkeypatch.setenv("SLAM_CACHE", str(tmp_path / "cache"))
    paths = [str(tmp_path / f"{side}.wav") for side in ("a", "b")]
    for path, text in zip(paths, ("The dog is near the tree. It sleeps.", "The dog are near the tree.")):
        soundfile.write(path, voice(text), 16_000)
    benchmark = Benchmark("x", "here", pairs=[{"id": "0", "positive": paths[0], "negative": paths[1]}])
    seen = []
    for _ in range(2):  # the second time out of the cache
        for tokenizer in tokenizers:
            found = tokenize_pairs(tokenizer, benchmark)
            assert found == [tuple(to_tokens(tokenizer.encode(load_audio(p), 16_000)[0]) for p in paths)]
            seen.append(found)
    assert seen[0] != seen[1] and seen[0] != seen[2] and seen[:3] == seen[3:]
    assert len(list((tmp_path / "cache" / "units").iterdir())) == 3
    # Everything in the fingerprint, and the device's kind.
    names, tokenizer = {units_cache(tokenizers[0], "x")}, tokenizers[0]
    for field, value in Fingerprint("e", 1, 50.0, 7, False, "f").to_dict().items():
        tokenizer.fingerprint = replace(tokenizer.fingerprint, **{field: value})
        names.add(units_cache(tokenizer, "x"))
    for device in ("cuda", "cuda:1"):  # the same kind
        tokenizer.encoder.device = device
        names.add(units_cache(tokenizer, "x"))
    assert len(names) == 8
