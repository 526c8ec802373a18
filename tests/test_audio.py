"""slam/audio.py: any audio from any input; each kind of unusable file gets its own reason."""
import io
import os
import tarfile

import numpy as np
import pytest
import soundfile

from slam.audio import (
    SAMPLE_RATE,
    check_wave,
    load_audio,
    read_blocks,
    read_input,
    resample,
    resample_blocks,
    split_at_silences,
    walk,
)


def tone(rate: int, hz: float = 440.0, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 44_101])
def test_resampling_a_stream_is_resampling_the_whole(rate):
    x = np.random.default_rng(0).standard_normal(3 * rate + 17).astype(np.float32)
    cuts = np.sort(np.random.default_rng(1).integers(0, len(x), 7))
    for blocks in (np.split(x, cuts), np.split(x, range(1000, len(x), 1000)), [x], [x[:50], x[50:]]):
        joined = np.concatenate(list(resample_blocks(blocks, rate, SAMPLE_RATE)))
        np.testing.assert_allclose(joined, resample(x, rate, SAMPLE_RATE), atol=1e-5)


def test_resampling_neither_dulls_nor_aliases():
    def level(x, hz):  # dB of what is left at this frequency
        x = x[2000:-2000] * np.hanning(len(x) - 4000)
        at = np.exp(-2j * np.pi * hz * np.arange(len(x)) / SAMPLE_RATE)
        return 20 * np.log10(np.abs(x @ at) / np.hanning(len(x)).sum() * 2 / 0.5 + 1e-12)

    for rate in (22_050, 44_100, 48_000):
        assert abs(level(resample(tone(rate, 3000), rate, SAMPLE_RATE), 3000)) < 0.1
        assert level(resample(tone(rate, 10_000), rate, SAMPLE_RATE), 6000) < -40


@pytest.mark.parametrize("suffix, subtype, rate, channels", [
    ("wav", "PCM_U8", 8_000, 1), ("wav", "PCM_16", 11_025, 2), ("wav", "PCM_24", 22_050, 3),
    ("wav", "PCM_32", 44_100, 4), ("wav", "FLOAT", 48_000, 5), ("wav", "DOUBLE", 96_000, 6), ("wav", "ULAW", 8_000, 1),
    ("flac", "PCM_16", 44_100, 2),
    ("flac", "PCM_24", 96_000, 6), ("ogg", "VORBIS", 48_000, 2), ("ogg", "OPUS", 48_000, 1),
    ("mp3", "MPEG_LAYER_III", 44_100, 2), ("aiff", "PCM_16", 22_050, 1), ("au", "PCM_16", 16_000, 2)])
def test_formats(tmp_path, suffix, subtype, rate, channels):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.stack([tone(rate)] * channels, 1), rate, subtype=subtype)
    wave = load_audio(path)
    assert wave.dtype == np.float32 and abs(len(wave) - SAMPLE_RATE) < 0.15 * SAMPLE_RATE  # mp3 pads
    spectrum = np.abs(np.fft.rfft(wave[2000:14_000]))
    assert abs(spectrum.argmax() * SAMPLE_RATE / 12_000 - 440) < 5
    assert np.sqrt(np.square(wave[2000:14_000]).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    if suffix in ("wav", "flac", "aiff", "au"):
        assert len(wave) == SAMPLE_RATE


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.stack([tone(16_000), -0.5 * tone(16_000)], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "x.wav"), 0.25 * tone(16_000), atol=1e-6)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of unusable files, {name: what must be said of it}, and three that are good."""
    folder = tmp_path_factory.mktemp("bad") / "in"
    (folder / "sub").mkdir(parents=True)
    good = folder / "good.wav"
    soundfile.write(good, tone(16_000), 16_000)
    soundfile.write(folder / "sub" / "good.wav", tone(16_000, 300), 16_000)
    soundfile.write(folder / "-a b\nü.wav", tone(16_000, 500), 16_000)
    for name, content in {"empty": b"", "text": b"this is not audio", "truncated": good.read_bytes()[:-5000],
                          "header": good.read_bytes()[:44], "half_header": good.read_bytes()[:20],
                          "rate": good.read_bytes()[:24] + b"\xff\xff\xff\x7f" + good.read_bytes()[28:]}.items():
        (folder / f"{name}.wav").write_bytes(content)
    soundfile.write(folder / "whole.flac", np.random.default_rng(0).uniform(-1, 1, 16_000), 16_000)
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:-9000])
    (folder / "whole.flac").unlink()
    for name, x, subtype in (("silent", np.zeros(16_000), "PCM_16"), ("nan", np.full(16_000, np.nan), "FLOAT"),
                             ("inf", np.append(tone(16_000), np.inf), "FLOAT"),
                             ("one", tone(16_000)[100:101], "PCM_16"),
                             ("short", tone(16_000)[:600], "PCM_16"), ("none", np.zeros(0), "PCM_16")):
        soundfile.write(folder / f"{name}.wav", x, 16_000, subtype=subtype)
    os.symlink("nowhere.wav", folder / "link.wav")
    return folder, {"empty.wav": "empty file", "text.wav": "not readable as audio", "truncated.wav": "truncated",
                    "header.wav": "truncated|at least 40 ms", "half_header.wav": "not readable as audio",
                    "rate.wav": "sample rate", "cut.flac": "not readable|truncated", "silent.wav": "silent",
                    "nan.wav": "NaN", "inf.wav": "infinite", "one.wav": "at least 40 ms", "short.wav": "at least 40 ms",
                    "none.wav": "at least 40 ms", "link.wav": "broken symlink"}


def test_bad_audio_is_told_apart(bad):
    folder, reasons = bad
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as e:
            load_audio(folder / name)
        assert name in str(e.value)
    with pytest.raises(ValueError, match="no such audio file"):
        load_audio(folder / "missing.wav")
    with pytest.raises(ValueError, match="NaN"):
        check_wave(np.full(16_000, np.nan, dtype=np.float32))


def test_splitting_at_silences():
    rng = np.random.default_rng(0)
    speech, pause = rng.uniform(-0.5, 0.5, 40_000).astype(np.float32), np.zeros(8_000, np.float32)
    x = np.concatenate([np.concatenate([speech, pause])] * 20)  # 2.5 s of noise, 0.5 s of silence
    blocks = np.split(x, range(30_000, len(x), 30_000))
    found = [(start, np.concatenate(list(parts))) for start, parts in split_at_silences(blocks, 10.0)]
    np.testing.assert_array_equal(np.concatenate([u for _, u in found]), x)
    assert [start for start, _ in found] == np.cumsum([0] + [len(u) for _, u in found[:-1]]).tolist()
    assert all(len(u) <= 10 * SAMPLE_RATE for _, u in found) and len(found) > 1
    for start, _ in found[1:]:
        assert 42_000 <= start % 48_000 <= 46_000  # in the middle of a pause
    (start, parts), = split_at_silences(iter(blocks), 0)
    assert start == 0 and len(np.concatenate(list(parts))) == len(x)


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    """LibriSpeech as it is on disk, in small: flac files, and a .trans.txt per chapter, which is no audio."""
    root = tmp_path_factory.mktemp("libri")
    for speaker, chapter in (("84", "1"), ("84", "2"), ("174", "1")):
        folder = root / "LibriSpeech" / "dev-clean" / speaker / chapter
        folder.mkdir(parents=True)
        for i in range(2):
            soundfile.write(folder / f"{speaker}-{chapter}-{i:04d}.flac", tone(16_000, 200 + 50 * i), 16_000)
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(
            "".join(f"{speaker}-{chapter}-{i:04d} SAID BY {speaker} {i}\n" for i in range(2)))
    (root / "LibriSpeech" / "README.TXT").write_text("about")
    return root


def pack(folder, path):
    with tarfile.open(path, {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")) as tar:
        tar.add(folder, arcname=os.path.basename(folder))
    return path


def read(path, **kwargs) -> dict:
    """{id: samples or problem}"""
    found = {}
    for item in read_input(str(path), **kwargs)[1]:
        assert item.id not in found
        try:
            found[item.id] = item.problem or sum(map(len, read_blocks(item.source, item.id)))
        except ValueError as e:
            found[item.id] = str(e)
    return found


def test_folders_archives_and_lists_are_one(librispeech, tmp_path):
    folder = read(librispeech / "LibriSpeech")
    assert len(folder) == 6 and folder["dev-clean/84/2/84-2-0001.flac"] == 16_000
    assert read_input(str(librispeech))[0] == 6
    for name in ("x.tar", "x.tar.gz"):
        archive = read(pack(librispeech / "LibriSpeech", tmp_path / name))
        assert archive == {f"LibriSpeech/{k}": v for k, v in folder.items()}
    both = read(tmp_path)  # a folder of archives
    assert both.keys() == {f"{name}/LibriSpeech/{k}" for k in folder for name in ("x.tar", "x.tar.gz")}
    paths = [os.path.relpath(librispeech / "LibriSpeech" / k, tmp_path) for k in folder] + ["nowhere.wav"]
    (tmp_path / "files.txt").write_text("\n".join(paths) + "\n")
    listed = read(tmp_path / "files.txt")
    assert "no such audio file" in listed.pop("nowhere.wav")
    assert list(listed.values()) == list(folder.values())
    one = librispeech / "LibriSpeech" / "dev-clean" / "84" / "1" / "84-1-0000.flac"
    assert read(one) == {"84-1-0000.flac": 16_000}


@pytest.mark.parametrize("name, damage", [("x.tar", "cut"), ("x.tar", "header"), ("x.tar.gz", "cut"),
                                          ("x.tar.gz", "garbage"), ("x.tar.xz", "cut"), ("x.tar.xz", "garbage")])
def test_damaged_archives(librispeech, tmp_path, name, damage):
    """What came before the damage is good; that something is lost is said."""
    path = pack(librispeech / "LibriSpeech", tmp_path / name)
    whole, content = read(path), bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:len(content) * 6 // 10]
    elif damage == "header":
        with tarfile.open(path) as tar:
            content[tar.getmembers()[8].offset + 20] ^= 1
    else:
        content[len(content) // 2] ^= 255
    path.write_bytes(content)
    items = list(read_input(str(path))[1])
    assert [item.fatal for item in items] == [False] * (len(items) - 1) + [True]
    assert "can't be read to its end" in items[-1].problem
    good = {k: v for k, v in read(path).items() if not isinstance(v, str)}
    assert len(good) <= len(whole) and all(whole[k] == v for k, v in good.items())
    assert good or name != "x.tar"


def test_what_is_no_archive_and_links_in_one(librispeech, tmp_path):
    (tmp_path / "y.tar").write_bytes(b"not an archive at all" * 100)
    assert "can't be read to its end" in read(tmp_path / "y.tar")[str(tmp_path / "y.tar")]
    (tmp_path / "d").mkdir()
    soundfile.write(tmp_path / "d" / "a.wav", tone(16_000), 16_000)
    os.link(tmp_path / "d" / "a.wav", tmp_path / "d" / "b.wav")
    os.symlink("a.wav", tmp_path / "d" / "c.wav")
    found = read(pack(tmp_path / "d", tmp_path / "z.tar"))
    assert sorted(str(v) for v in found.values()) == ["16000"] + ["a link inside the archive"] * 2


def test_parts_share_an_input(librispeech, tmp_path):
    """Every recording is in one part; whole archives go to a part where there are enough of them."""
    for input in (librispeech, pack(librispeech / "LibriSpeech", tmp_path / "x.tar")):
        parts = [set(read(input, part=(i, 3))) for i in range(3)]
        assert sum(map(len, parts)) == 6 and set.union(*parts) == set(read(input))
    for i in range(5):
        os.link(tmp_path / "x.tar", tmp_path / f"x{i}.tar")
    parts = [set(read(tmp_path, part=(i, 3))) for i in range(3)]
    assert sum(map(len, parts)) == 36 and set.union(*parts) == set(read(tmp_path))
    assert sum(map(len, ({id.partition("/")[0] for id in part} for part in parts))) == 6


def test_parquet(librispeech, tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    content = io.BytesIO()
    soundfile.write(content, tone(22_050), 22_050, format="WAV")
    rows = [{"audio": {"bytes": content.getvalue(), "path": "a.wav"}, "text": "one"},
            {"audio": {"bytes": None, "path": "b.wav"}, "text": "two"},
            {"audio": {"bytes": content.getvalue()[:-3000], "path": None}, "text": "three"},
            {"audio": None, "text": "four"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    items = list(read_input(str(tmp_path / "x.parquet"))[1])
    assert [i.id for i in items] == ["x.parquet/0000000_a.wav", "x.parquet/0000001_b.wav", "x.parquet/0000002",
                                     "x.parquet/0000003"]
    assert [bool(i.problem) for i in items] == [False, True, False, True]
    assert sum(map(len, read_blocks(items[0].source, "a"))) == 16_000
    with pytest.raises(ValueError, match="truncated"):
        list(read_blocks(items[2].source, "c"))
    with pytest.raises(SystemExit, match=r"no column sound \(--audio_column\); it has audio, text"):
        list(read_input(str(tmp_path / "x.parquet"), audio_column="sound")[1])
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:300])
    rows = [{"audio": b"RIFF", "text": "one"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "z.parquet")
    with pytest.raises(SystemExit, match="column 'audio' does not hold audio.*--audio_column"):
        list(read_input(str(tmp_path / "z.parquet"))[1])
    assert "can't be read to its end" in read(tmp_path / "y.parquet")[str(tmp_path / "y.parquet")]


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "data" / "a" / "x.wav", tone(16_000), 16_000)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "data", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    assert walk(tmp_path / "in") == [str(tmp_path / "in" / "linked" / "a" / "x.wav")]


def test_refusals(tmp_path):
    for path, reason in ((tmp_path / "none", "no such folder"), (tmp_path, "no audio files")):
        with pytest.raises(SystemExit, match=reason):
            read_input(str(path))
    (tmp_path / "long.txt").write_text("no path, but a text " * 50 + "\nx.raw\n")
    (tmp_path / "x.raw").write_bytes(b"0" * 100)
    assert all("not readable" in heard or "no such" in heard for heard in read(tmp_path / "long.txt").values())
    (tmp_path / "x.doc").write_text("?")
    with pytest.raises(SystemExit, match="no audio files here.*no archives.*not a list"):
        read_input(str(tmp_path / "x.doc"))


@pytest.mark.parametrize("kind, subtype", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16"),
                                           ("MP3", "MPEG_LAYER_III")])
def test_damage_is_never_a_traceback(kind, subtype, capfd):
    """Bytes cut, changed or added at random: read, or refused with a reason, and nothing printed by a callback."""
    whole, rng, refused = io.BytesIO(), np.random.default_rng(0), 0
    soundfile.write(whole, 0.3 * rng.standard_normal(8000), 16_000, format=kind, subtype=subtype)
    for i in range(80):
        content = bytearray(whole.getvalue())
        if i % 4 == 0:
            content = content[:rng.integers(len(content))]
        for _ in range((0, 3, 20, 1)[i % 4]):
            content[rng.integers(min(len(content), 100 if i % 4 == 1 else len(content)))] = rng.integers(256)
        try:
            assert sum(map(len, read_blocks(io.BytesIO(content), "x"))) < 20 * 16_000
        except ValueError as e:
            assert str(e).startswith("x: ")
            refused += 1
    assert refused > 5 and "Traceback" not in capfd.readouterr().err
