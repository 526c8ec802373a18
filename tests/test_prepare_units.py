"""prepare_units.py: whole corpora, killed or shared; verify; BPE."""
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, TORCHRUN, refused, run, start
from test_audio import bad, librispeech, pack, tone  # noqa: F401

from config import load_config
from prepare_units import Config, main, verify
from slam.tokenizer import SpeechTokenizer
from slam.units import UnitReader, UnitWriter


def said(folder) -> dict[str, list[int]]:
    reader = UnitReader(folder)
    return {id: reader.units(i).tolist() for i, id in enumerate(reader.ids())}


def shards(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def recordings(stories, tmp_path_factory):
    """Thirty recordings of 1 to 20 seconds, in folders, and one of two minutes."""
    folder = tmp_path_factory.mktemp("recordings")
    waves = [soundfile.read(p, dtype="float32")[0] for p in sorted((stories / "audio").glob("*.flac"))]
    rng = np.random.default_rng(0)
    for i in range(30):
        wave = waves[i % len(waves)]
        start = int(rng.integers(0, len(wave) - 16_000))
        path = folder / "abc"[i % 3] / f"{i:02d}.flac"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave[start:start + int(rng.integers(16_000, 320_000))], 16_000)
    soundfile.write(folder / "b" / "long.flac", np.concatenate(waves * 3)[:120 * 16_000], 16_000)
    whole = (folder / "b" / "long.flac").read_bytes()  # bad ones, of which some is heard before that is known
    for name in ("a/05_cut.flac", "b/00_cut.flac", "c/20_cut.flac"):
        (folder / name).write_bytes(whole[:len(whole) * 3 // 4])
    soundfile.write(folder / "c" / "00_silent.flac", np.zeros(100 * 16_000), 16_000)
    return folder


BAD = {"a/05_cut.flac", "b/00_cut.flac", "c/20_cut.flac", "c/00_silent.flac"}


# Groups of 32 s, shards of about one.
SMALL = ["--batch_seconds=4", "--shard_tokens=500", "--durations", "--max_bad_share=0.2"]


@pytest.fixture(scope="module")
def whole(recordings, tmp_path_factory):
    """The units of all recordings, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "units"
    run("prepare_units.py", f"--input={recordings}", f"--out={out}", *SMALL, process=True)
    return out


def test_a_corpus_has_the_units_that_its_files_have_alone(recordings, whole):
    tokenizer, reader = SpeechTokenizer.load("embedded"), UnitReader(whole)
    ids = reader.ids()
    assert ids == sorted({str(p.relative_to(recordings)) for p in recordings.rglob("*.flac")} - BAD)
    report = json.loads((whole / "report.json").read_text())
    assert report["utterances"] == len(ids) == 31 and len(reader.shards) > 4
    assert {s["id"] for s in report["skipped"]} == BAD
    equal, n = 0, 0
    for i, id in enumerate(ids):
        wave = soundfile.read(recordings / id, dtype="float32")[0]
        frames = np.repeat(reader.units(i), reader.durations(i))
        alone = tokenizer.frames([wave])[0]
        assert len(frames) == len(alone) == len(wave) // 640
        equal, n = equal + (frames == alone).sum(), n + len(alone)
    assert equal / n >= 0.999


def test_killed_and_resumed_loses_nothing_and_has_nothing_twice(recordings, whole, tmp_path):
    """kill -9 as soon as three shards are there, and half a shard under its temporary name."""
    out = tmp_path / "units"
    command = ["prepare_units.py", f"--input={recordings}", f"--out={out}", *SMALL]
    process = start(*command)
    process.until(lambda: len(shards(out)) >= 3)
    process.kill()
    assert process.end().returncode == -signal.SIGKILL
    kept = shards(out)
    assert len(kept) < len(shards(whole))
    assert "not finished" in str(pytest.raises(SystemExit, verify, [out]).value)
    (out / "00099.safetensors.0.part").write_bytes(b"half a shard")
    again = run(*command).stdout
    assert f"{len(UnitReader(*[out / name for name in kept]))} were there already; 4 skipped" in again
    assert shards(out).items() > kept.items() and sorted(UnitReader(out).ids()) == sorted(UnitReader(whole).ids())
    assert {s["id"] for s in json.loads((out / "report.json").read_text())["skipped"]} == BAD
    verify([out])
    finished = shards(out)
    assert "31 were there already; 4 skipped" in run(*command).stdout and shards(out) == finished


def test_parts_make_a_whole(recordings, whole, tmp_path, capsys):
    """Three processes without coordination, one of them started twice; then two, which find nothing new."""
    out = tmp_path / "units"
    cfg = Config(input=str(recordings), out=str(out), batch_seconds=4, shard_tokens=500, durations=True,
                 max_bad_share=0.5)
    main(replace(cfg, shard="1/3"))
    main(replace(cfg, shard="3/3"))
    with pytest.raises(SystemExit, match="part002of003 is not finished"):
        verify([out])
    main(replace(cfg, shard="2/3"))
    main(replace(cfg, shard="2/3"))
    verify([out])
    assert "31 utterances" in capsys.readouterr().out
    one, parts = said(whole), said(out)
    assert parts.keys() == one.keys() and len(UnitReader(out)) == 31
    assert sum(len(set(a) ^ set(b)) for a, b in zip(map(one.get, sorted(one)), map(parts.get, sorted(one)))) < 10
    assert all(any(p.startswith(f"part{i:03d}of003") for p in shards(out)) for i in (1, 2, 3))
    main(replace(cfg, shard="2/2"))
    with pytest.raises(SystemExit, match="is not finished"):  # there may be new files, which the first of two will find
        verify([out])
    main(replace(cfg, shard="1/2"))
    assert len(UnitReader(out)) == 31
    verify([out])
    with pytest.raises(SystemExit, match="so none may empty it"):
        main(replace(cfg, shard="1/3", overwrite=True))
    with pytest.raises(SystemExit, match="so none may empty it"):
        main(replace(cfg, shard="1/3", overwrite=True, out=f"{tmp_path}/new"))


def test_torchrun_shares_the_work(recordings, whole, tmp_path):
    """Too many bad recordings in one part stop that part, when the other is done."""
    done = run(*TORCHRUN, "prepare_units.py", f"--input={recordings / 'a'}", f"--out={tmp_path}/u", "--shard=1/1",
               "--max_bad_share=0", check=False)
    assert done.returncode and "can't be used, more than --max_bad_share=0" in done.stderr
    names = sorted(p.name for p in (tmp_path / "u").glob("*.safetensors"))
    assert names == ["part001of002-00000.safetensors", "part002of002-00000.safetensors"]
    assert sorted(said(tmp_path / "u")) == sorted({p.name for p in (recordings / "a").glob("*")} - {"05_cut.flac"})
    complete = [json.loads(p.read_text())["complete"] for p in (tmp_path / "u").glob("part*report.json")]
    assert sorted(complete) == [False, True]


def test_archives(librispeech, tmp_path):  # noqa: F811
    """A tar.gz as downloaded gives what its folder gives."""
    archive = pack(librispeech / "LibriSpeech", tmp_path / "dev-clean.tar.gz")
    cfg = Config(input=str(librispeech), out=f"{tmp_path}/a")
    main(cfg)
    main(replace(cfg, input=str(archive), out=f"{tmp_path}/b"))
    assert said(tmp_path / "a") == said(tmp_path / "b")
    assert len(said(tmp_path / "b")) == 6


def test_long_recordings_are_cut_at_silences(recordings, tmp_path, capsys):
    """In utterances of at most 12 s; a silent one is left out, and so is all of a recording that is damaged."""
    (tmp_path / "in").mkdir()
    for name in ("long.flac", "00_cut.flac"):
        shutil.copy(recordings / "b" / name, tmp_path / "in" / name)
    speech, rate = soundfile.read(tmp_path / "in" / "long.flac", frames=12 * 16_000)
    soundfile.write(tmp_path / "in" / "pause.flac", np.concatenate([speech, np.zeros(20 * 16_000)]), rate)
    cfg = Config(input=f"{tmp_path}/in", out=f"{tmp_path}/u", max_utterance_seconds=12, durations=True,
                 max_bad_share=0.1)  # one of them, 00_cut; parts of a recording that are silent do not count
    main(cfg)
    reader = UnitReader(tmp_path / "u")
    long = [id for id in reader.ids() if id.startswith("long.flac@")]
    starts = [float(id.partition("@")[2]) for id in long]
    assert starts[0] == 0 and starts == sorted(starts) and 10 <= len(long) <= 20
    assert max(reader.durations(i).sum() for i in range(len(reader))) <= 12 * 25
    assert {id.partition("@")[0] for id in reader.ids()} == {"long.flac", "pause.flac"}
    skipped = {s["id"]: s["reason"] for s in json.loads((tmp_path / "u" / "report.json").read_text())["skipped"]}
    assert "00_cut.flac" in skipped and len(skipped) > 1
    assert all("silent" in reason for id, reason in skipped.items() if id.startswith("pause.flac@"))
    main(cfg)
    assert len(UnitReader(tmp_path / "u")) == len(reader) and "; 1 skipped" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit, match="max_utterance_seconds 12.*now 0"):
        main(replace(cfg, max_utterance_seconds=0.0))
    shutil.copy(recordings / "b" / "long.flac", tmp_path / "in" / "00_cut.flac")  # mended
    main(cfg)
    ids = UnitReader(tmp_path / "u").ids()
    assert [id for id in ids if id.startswith("00_cut")] == [id.replace("long", "00_cut") for id in long]


def test_bad_files_are_skipped_listed_and_counted(bad, tmp_path, capsys):  # noqa: F811
    folder, reasons = bad
    cfg = Config(input=str(folder), out=f"{tmp_path}/u", max_bad_share=1)
    main(cfg)
    out, err = capsys.readouterr()
    assert "3 utterances" in out and f"{len(reasons)} skipped (listed in" in out
    assert sorted(UnitReader(tmp_path / "u").ids()) == ["-a b\nü.wav", "good.wav", "sub/good.wav"]
    report = json.loads((tmp_path / "u" / "report.json").read_text())
    assert {s["id"] for s in report["skipped"]} == reasons.keys() and all(name in err for name in reasons)
    main(cfg)
    assert "0 utterances" in (out := capsys.readouterr().out) and "3 were there already" in out
    verify([tmp_path / "u"])


def test_too_many_bad_files_stop_the_run(bad, tmp_path):  # noqa: F811
    folder, reasons = bad
    error = refused("prepare_units.py", f"--input={folder}", f"--out={tmp_path}/u")
    assert f"{len(reasons)} of {len(reasons) + 3} can't be used" in error and "--max_bad_share=0.01" in error
    assert len(UnitReader(tmp_path / "u")) == 3
    with pytest.raises(SystemExit, match="not finished"):
        verify([tmp_path / "u"])
    main(Config(input=str(folder), out=f"{tmp_path}/u", max_bad_share=0.9))
    verify([tmp_path / "u"])


def test_mended_files_are_tried_again(recordings, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("long.flac", "00_cut.flac"):
        shutil.copy(recordings / "b" / name, tmp_path / "in" / name)
    cfg = Config(input=str(tmp_path / "in"), out=f"{tmp_path}/u")
    with pytest.raises(SystemExit, match="1 of 2 can't be used"):
        main(cfg)
    with pytest.raises(SystemExit, match="1 of 2 can't be used"):
        main(cfg)
    shutil.copy(recordings / "b" / "long.flac", tmp_path / "in" / "00_cut.flac")
    main(cfg)
    assert UnitReader(tmp_path / "u").ids() == ["long.flac", "00_cut.flac"]
    main(cfg)
    assert json.loads((tmp_path / "u" / "report.json").read_text())["skipped"] == []
    verify([tmp_path / "u"])


def test_a_damaged_archive_is_an_error_however_much_was_good(librispeech, tmp_path):  # noqa: F811
    archive = pack(librispeech / "LibriSpeech", tmp_path / "x.tar")
    archive.write_bytes(archive.read_bytes()[:archive.stat().st_size * 6 // 10])
    cfg = Config(input=str(archive), out=f"{tmp_path}/u", max_bad_share=0.9)
    with pytest.raises(SystemExit, match="can't be read to its end"):
        main(cfg)
    with pytest.raises(SystemExit, match="is not finished"):
        verify([tmp_path / "u"])
    main(replace(cfg, max_bad_share=1.0))
    verify([tmp_path / "u"])


def test_names_that_are_not_utf8(tmp_path):
    name = b"\xff\xfe.wav"
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "x.wav", tone(16_000), 16_000)
    os.rename(tmp_path / "in" / "x.wav", os.fsencode(tmp_path / "in") + b"/" + name)
    Path(tmp_path / "in" / os.fsdecode(b"empty\xff.wav")).touch()
    main(Config(input=str(tmp_path / "in"), out=f"{tmp_path}/u", max_bad_share=1))
    assert [os.fsencode(id) for id in UnitReader(tmp_path / "u").ids()] == [name]
    verify([f"{tmp_path}/u"])


def test_memory_does_not_grow_with_the_length(recordings, tmp_path):
    """Peak of numpy's and Python's memory over recordings of 4 and of 10 minutes, whose samples differ by 23 MB.

    Not resident memory: what the allocators of threads keep grows for some minutes, and differs from run to run.
    """
    code = ("import sys, tracemalloc; from prepare_units import main, Config; from transformers import WhisperModel\n"
            "for wav in sys.argv[1:]:\n"  # imports before: tracemalloc makes them slow
            "    tracemalloc.start(); main(Config(input=wav, out=wav[:-4], batch_seconds=5))\n"
            "    print('peak', tracemalloc.get_traced_memory()[1]); tracemalloc.stop()")
    wave, rate = soundfile.read(recordings / "b" / "long.flac", dtype="float32")
    for n in (2, 5):
        soundfile.write(tmp_path / f"{n}.wav", np.tile(wave, n), rate)
    said = run("-c", code, tmp_path / "2.wav", tmp_path / "5.wav").stdout
    short, long = (int(line.split()[1]) / 1e6 for line in said.splitlines() if line.startswith("peak"))
    assert long - short < 8, (short, long)


def test_refusals(tmp_path, recordings, corpus):
    def message(work, *args) -> str:
        return str(pytest.raises(SystemExit, work, *args).value)

    assert "no such folder" in refused("prepare_units.py", "--input=nowhere")
    assert "give a folder of audio files" in message(main, Config())
    assert "no audio files" in message(main, Config(input=str(tmp_path)))
    wrong = message(load_config, Config, ["--shard=0/3", "--dtype=int8", "--max_utterance_seconds=0.1", "--workers=-1"])
    for word in ("'0/3' is not a part", "int8", "at least 1", "not negative"):
        assert word in wrong
    (tmp_path / "empty.txt").write_text("")
    for out in (corpus / "train", tmp_path / "empty.txt"):
        with pytest.raises(SystemExit, match="made by something else"):
            main(Config(input=str(recordings), out=str(out)))
    with pytest.raises(SystemExit, match="no recordings in it"):
        main(Config(input=f"{tmp_path}/empty.txt", out=f"{tmp_path}/u"))
    shutil.copy(ROOT / "assets" / "codebook.safetensors", tmp_path / "codebook.safetensors")
    with pytest.raises(SystemExit, match="codebook.safetensors: not a whole unit file"):
        verify([tmp_path])
    with pytest.raises(SystemExit, match="imported by one process"):
        (tmp_path / "x.jsonl").write_text("")
        main(Config(input=f"{tmp_path}/x.jsonl", out=f"{tmp_path}/u", shard="1/2"))


def test_verify_finds_what_is_wrong(fingerprint, tmp_path, capsys):
    def corpus(name, **kwargs):
        with UnitWriter(tmp_path / name, fingerprint, shard_tokens=12, durations=True, **kwargs) as writer:
            for i in range(6):
                writer.add(f"{name}{i}", np.array([1, 2, 3, i]), np.array([1, 2, 3, 1]))
        return tmp_path / name

    def wrong(*folders):
        return str(pytest.raises(SystemExit, verify, list(map(str, folders))).value)

    def poke(path, at, value):
        content = bytearray(path.read_bytes())
        content[at:at + len(value)] = value
        path.write_bytes(content)

    good = corpus("good")
    verify([str(good)])
    out = capsys.readouterr().out
    assert "6 utterances" in out and "36 tokens" in out and "14.29 units per second" in out and out.endswith("whole\n")
    shutil.copytree(good, tmp_path / "again")
    assert "6 utterances are there more than once, the first 'good0'" in wrong(good, tmp_path / "again")
    (tmp_path / "again" / "00001.safetensors").unlink()
    assert "00001.safetensors is missing" in wrong(tmp_path / "again")
    for name, tensor, value, reason in (
            ("range", "tokens", b"\x63\0", "token 99"), ("special", "tokens", b"\0\0", "1 units 1"),
            ("time", "durations", b"\x63\0", "durations"), ("rise", "offsets", b"\1", "rise")):
        path = sorted(corpus(name).glob("*"))[0]
        header = json.loads(path.read_bytes()[8:8 + int.from_bytes(path.read_bytes()[:8], "little")])
        at = 8 + int.from_bytes(path.read_bytes()[:8], "little") + header[tensor]["data_offsets"][0]
        poke(path, at + (8 if tensor == "offsets" else 2), value)
        assert reason in wrong(tmp_path / name) and "00000.safetensors" in wrong(tmp_path / name)
    path = sorted(corpus("cut").glob("*"))[0]
    path.write_bytes(path.read_bytes()[:-5])
    assert "not a whole unit file" in wrong(tmp_path / "cut")
    assert "no unit files" in wrong(tmp_path)
    assert "usage" in refused("prepare_units.py", "verify")


def test_bpe_of_a_corpus(whole, tmp_path, capsys):
    """The tokeniser that the command writes gives, from audio, what the command made of the unit files."""
    done = run("prepare_units.py", "bpe", f"--units={whole}", f"--out={tmp_path}/bpe", "--n_pieces=600")
    report = json.loads(done.stdout.splitlines()[-1])
    pieces, units = UnitReader(tmp_path / "bpe" / "units"), UnitReader(whole)
    assert report["units_per_token"] == pytest.approx(report["units"] / report["tokens"], abs=1e-3) and \
        report["units_per_token"] > 1.05
    assert pieces.fingerprint.n_units == 600 and units.fingerprint.dedup and not pieces.fingerprint.dedup
    assert pieces.hours == pytest.approx(units.hours)
    tokenizer = SpeechTokenizer.load(f"{tmp_path}/bpe/tokenizer.safetensors")
    assert tokenizer.fingerprint == pieces.fingerprint and tokenizer.base_fingerprint == units.fingerprint
    for i in range(len(units)):
        assert tokenizer.to_units(pieces.units(i)) == units.units(i).tolist()
        assert pieces.durations(i).sum() == units.durations(i).sum()
    assert list(pieces.records()) == list(units.records())
    verify([str(tmp_path / "bpe" / "units")])
    assert "overwrite" in refused("prepare_units.py", "bpe", f"--units={whole}", f"--out={tmp_path}/bpe")
    assert "is among the units to read" in refused("prepare_units.py", "bpe", f"--units={whole}",
                                                   f"--out={whole.parent}", "--overwrite")
    with pytest.raises(SystemExit, match="different tokenisers"):
        UnitReader(tmp_path / "bpe" / "units", whole)
