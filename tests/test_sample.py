"""sample.py: prompts continued aloud, or spoken again; --play and --stdout are in test_stream.py."""
import html
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
from conftest import refused, run

import sample
from config import load_config


@pytest.fixture(scope="module")
def prompts(voice, tmp_path_factory):
    """A folder of two prompts: one in stereo at 44.1 kHz, one of twelve seconds."""
    from scipy.signal import resample_poly
    folder = tmp_path_factory.mktemp("prompts")
    fox = voice("Once upon a time, there was a little fox.")
    soundfile.write(folder / "fox.flac", np.stack([resample_poly(fox, 441, 160)] * 2, 1) * 0.9, 44_100)
    soundfile.write(folder / "long.wav", np.tile(voice("The dog went home."), 10)[:12 * 16_000], 16_000)
    return folder


def go(*args) -> None:
    """`python sample.py ARGS` without the seconds that imports take."""
    sample.main(load_config(sample.Config, list(map(str, args))))


def refusal(*args) -> str:
    with pytest.raises(SystemExit) as e:
        go(*args)
    return str(e.value)


def records(folder) -> list[dict]:
    return json.loads((folder / "samples.json").read_text())["samples"]


def test_prompts_are_continued_by_checkpoints(runs, prompts, tmp_path):
    """A folder of prompts, continued twice by two checkpoints; all of it is on the page."""
    out = tmp_path / "s"
    said = run("sample.py", "--prompt", prompts, "--checkpoint", runs / "lm", "--checkpoint", runs / "dpo", "--n=2",
               "--continuation_seconds=2", "--prompt_seconds=3", f"--out={out}", process=True).stdout
    found = records(out)
    assert len(found) == 8 and "long.wav: 12.0 s long; its last 3 s are used" in said
    assert [r["checkpoint"] for r in found] == [f"{runs}/lm"] * 4 + [f"{runs}/dpo"] * 4
    first, second = found[:2]
    assert first["units"] != second["units"] and first["prompt_units"] == second["prompt_units"]
    assert first["prompt_units"] == found[4]["prompt_units"] and "fox" in first["prompt_text"]
    for r in found:
        whole, rate = soundfile.read(r["whole"])
        alone, _ = soundfile.read(r["continuation"])
        assert rate == 16_000 and len(alone) / rate == pytest.approx(2, abs=0.13) and len(alone) <= 2 * rate
        assert (whole[-len(alone):] == alone).all()
        assert len(whole) - len(alone) == round(r["continuation_starts"] * rate) > rate
    assert {p.name for p in out.glob("*.wav")} == {
        f"{i:02d}_{name}_{k}_{label}_{kind}.wav" for i, name in enumerate(("fox", "long")) for k in (0, 1)
        for label in ("lm", "dpo") for kind in ("whole", "continuation")}
    assert "overwrite" in refusal(f"--checkpoint={runs}/lm", f"--out={out}")
    text = (out / "listen.html").read_text()
    assert text.count("<audio") == 10 and all(html.escape(r[k]) in text for r in found
                                              for k in ("prompt_text", "continuation_text"))


def test_no_prompt_a_seed_and_greedy(runs, tmp_path):
    """Unconditional, the same with the same seed, another with another."""
    how = ["--continuation_seconds=1.5", "--transcribe=false", f"--checkpoint={runs}/lm"]
    for name, *more in (("a", "--n=2"), ("b", "--n=2"), ("c", "--n=2", "--seed=1"), ("d", "--temperature=0", "--n=2")):
        go(*how, f"--out={tmp_path}/{name}", *more)
    a, b, c, d = ([r["units"] for r in records(tmp_path / name)] for name in "abcd")
    assert a == b != c and a[0] != a[1] and d[0] == d[1]
    first = records(tmp_path / "a")[0]
    assert first["prompt_units"] == [] and first["continuation_starts"] == 0 and "prompt_text" not in first
    assert soundfile.read(first["whole"])[0].tolist() == soundfile.read(first["continuation"])[0].tolist()
    assert "unprompted" in first["whole"] and "unprompted" in (tmp_path / "a" / "listen.html").read_text()


def test_prompts_that_are_no_speech(runs, voice, tmp_path, capsys):
    rng, t = np.random.default_rng(0), np.arange(3 * 16_000) / 16_000
    cases = {"white": 0.1 * rng.standard_normal(len(t)), "faint": 1e-3 * rng.standard_normal(len(t)),
             "hum": 0.2 * np.sin(2 * np.pi * 50 * t), "silent": np.zeros(len(t)),
             "speech": voice("Good morning, my dear old friend.")}
    for name, wave in cases.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
    how = ["--continuation_seconds=0.5", "--transcribe=false", f"--checkpoint={runs}/lm"]
    files = [f"--prompt={tmp_path}/{name}.wav" for name in ("white", "faint", "hum", "speech")]
    go(*how, *files, f"--out={tmp_path}/s")
    assert re.findall(r"(\w+)\.wav: hardly any speech", capsys.readouterr().err) == ["white", "faint", "hum"]
    assert len(records(tmp_path / "s")) == 4
    silent = refusal(*how, f"--prompt={tmp_path}/silent.wav")
    assert "silent" in silent and "without --prompt" in silent
    soundfile.write(tmp_path / "short.wav", cases["speech"][:500], 16_000)
    assert "at least 40 ms" in refusal(*how, f"--prompt={tmp_path}/short.wav")
    faded = np.concatenate([cases["speech"], np.zeros(32_000)])  # what is used of it is silent
    soundfile.write(tmp_path / "faded.wav", faded, 16_000)
    assert "faded.wav, its last 2 s: silent" in refusal(*how, f"--prompt={tmp_path}/faded.wav", "--prompt_seconds=2")
    go(*how, f"--prompt={tmp_path}/faded.wav", "--prompt_seconds=inf", f"--out={tmp_path}/whole")
    assert "continuation_seconds (finite)" in refusal(*how[1:], "--continuation_seconds=inf")
    (tmp_path / "none").mkdir()
    assert "no audio files in this folder" in refusal(*how, f"--prompt={tmp_path}/none")


def test_bad_prompts_and_checkpoints(runs, prompts, tmp_path):
    assert "no such audio file" in refused("sample.py", "--prompt=nowhere.wav", f"--checkpoint={runs}/lm")
    assert "top_p lies in (0, 1]" in refusal("--top_p=0")
    good, half = f"--prompt={prompts}/fox.flac", tmp_path / "half"
    shutil.copytree(runs / "lm" / "checkpoint", half)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    assert str(half) in refusal(good, f"--checkpoint={half}", f"--out={tmp_path}/s")
    (half / "slam.json").unlink()
    assert "slam.json" in refusal(good, f"--checkpoint={half}", f"--out={tmp_path}/s")


def test_a_prompt_is_said_again_from_its_units(voice, tmp_path):
    wave = voice("Once upon a time, there was a little fox. He lived in a forest.")
    soundfile.write(tmp_path / "p.wav", wave, 16_000)
    done = run("sample.py", f"--prompt={tmp_path}/p.wav", "--resynth", f"--out={tmp_path}/s")
    again, rate = soundfile.read(tmp_path / "s" / "00_p_resynth.wav")
    assert abs(len(again) / rate - len(wave) / 16_000) < 0.1
    record, = records(tmp_path / "s")
    assert "little fox" in record["prompt_text"] and "little fox" in record["resynth_text"]
    assert sum(record["durations"]) == len(wave) // 640 and "units per second" in done.stdout
    assert (tmp_path / "s" / "listen.html").read_text().count("<audio") == 2


# ---------------------------------------------------------------- what goes with a checkpoint

def test_it_speaks_before_anything_is_trained(prompts, tmp_path, monkeypatch, capsys):
    """In a folder without out/: by the model that comes with the code."""
    monkeypatch.chdir(tmp_path)
    go(f"--prompt={prompts}/fox.flac", "--continuation_seconds=2")
    assert "no trained model under out/: embedded:slam-mini speaks" in capsys.readouterr().err
    found, = records(tmp_path / "out" / "samples")
    assert found["checkpoint"] == "embedded:slam-mini" and len(found["units"]) > 20
    assert found["whole"].endswith("00_fox_0_whole.wav") and found["continuation_text"]
    assert sample.labels(["embedded:slam-mini", "out/demo/lm"]) == ["slam-mini", "lm"]


def test_newest_finished_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished checkpoint under out/"):
        sample.newest_checkpoint()
    assert sample.newest_checkpoint(otherwise="embedded:slam-mini") == "embedded:slam-mini"
    for i, (name, finished) in enumerate((("a", True), ("b/c", True), ("d", False))):
        folder = tmp_path / "out" / name / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "slam.json").write_text(json.dumps({"finished": finished}))
        os.utime(folder / "slam.json", (i, i))
    assert sample.newest_checkpoint() == sample.newest_checkpoint(otherwise="embedded:slam-mini") == "out/b/c"
    assert [str(sample.make_folder("")) for _ in range(2)] == ["out/samples", "out/samples_2"]
    assert sample.make_folder("a/b") == sample.make_folder("a/b")
    (tmp_path / "file").touch()
    for taken in ("file", "file/below"):
        with pytest.raises(SystemExit, match=f"{taken}: can't be made a folder"):
            sample.make_folder(taken)


def test_labels_of_checkpoints_differ():
    assert sample.labels(["out/demo/lm", "out/demo/dpo/checkpoint"]) == ["lm", "dpo"]
    assert sample.labels(["out/a/lm", "out/b/lm", "slprl/slam"]) == ["lm_1", "lm_2", "slam_3"]
