"""slam.train_vocoder: its data, and a run from audio to a vocoder file."""
import json
import signal

import numpy as np
import pytest
import soundfile
import torch
from conftest import run, start

import prepare_units
from config import load_config
from slam.audio import load_audio
from slam.train_vocoder import Config, crops, load_corpus, main
from slam.units import UnitReader
from slam.vocoder import Vocoder

STORY = [
    "Once upon a time, there was a clever duck who lived near a wide river. One day, the duck found a golden ring.",
    "Peter and his sister went to the market to buy bread and milk. It was raining, so they took a big umbrella.",
    "The old man sat on a chair in front of his house. He told the children a story about a ship and a storm.",
    "My mother has a white horse. Every morning she gives it water and a handful of fresh grass.",
]


def test_crops_are_aligned():
    """A crop's samples are those of its units, also of an utterance shorter than the crop."""
    rng, items = np.random.default_rng(0), []
    for n in (50, 3):
        units, durations = rng.permutation(100)[:n], rng.integers(1, 4, n)
        items.append((units, durations, np.repeat(np.repeat(units, durations), 640).astype(np.int16)))
    for _ in range(5):
        x, waves = crops(items, 20, 640, rng)
        assert x.shape == (2, 20) and waves.shape == (2, 20 * 640)
        assert (x.repeat_interleave(640, 1) == (waves * 32767).round()).all()


def test_utterances_cut_out_of_a_recording(voice, tmp_path, capsys):
    """Each has its own part of the audio; what has none is counted, and archives are named as the reason."""
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "long.flac", np.concatenate([voice(text) for text in STORY]), 16_000)
    soundfile.write(tmp_path / "audio" / "short.flac", voice("Good morning."), 16_000)
    prepare_units.main(load_config(prepare_units.Config, [
        f"--input={tmp_path}/audio", f"--out={tmp_path}/units", "--durations", "--max_utterance_seconds=8"]))
    reader, wave = UnitReader(tmp_path / "units"), load_audio(tmp_path / "audio" / "long.flac")
    cfg = Config(units=str(tmp_path / "units"), audio=str(tmp_path / "audio"))
    corpus = load_corpus(cfg, reader)
    assert len(corpus) == len(reader) >= 4 and " 0 skipped" in capsys.readouterr().out
    for id, (units, durations, part) in zip(reader.ids(), corpus):
        if id.startswith("long"):
            at = round(float(id.rpartition("@")[2]) * 16_000)
            assert len(part) == durations.sum() * 640
            assert abs(wave[at:at + len(part)] - part[:len(wave) - at] / 32767).max() < 1e-3
    (tmp_path / "audio" / "long.flac").unlink()
    with pytest.raises(SystemExit, match="in archives must be unpacked"):
        load_corpus(cfg, reader)


@pytest.fixture
def signals():
    """A run within this process takes the signals; they are given back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_training_learns_resumes_and_saves(stories, tmp_path, signals, capsys):
    """The documented command on a few stories: from audio to a vocoder file that loads, and what can be looked at.

    Killed and resumed it makes the very file that it would have made.
    """
    units = tmp_path / "units"
    run("prepare_units.py", f"--input={stories / 'audio'}", f"--out={units}", "--durations")
    flags = [f"--units={units}", f"--audio={stories / 'audio'}", "--width=32", "--blocks=1", "--batch=2",
             "--val_every=3", "--log_every=4", "--ema=0.9", "--lr=1e-2", "--steps=24", "--save_every=8"]

    def train(out, *more) -> str:
        """Train within this process; what it printed."""
        capsys.readouterr()
        main(load_config(Config, [*flags, f"--out={tmp_path / out}", *more]))
        return capsys.readouterr().out

    def refuses(problem, *arguments) -> None:
        with pytest.raises(SystemExit, match=problem):
            train(*arguments)

    def log(out):
        return [json.loads(x) for x in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    train("whole")
    steps, saves = [x for x in log("whole") if "spectral" in x], [x for x in log("whole") if "val_clipped_share" in x]
    assert [x["step"] for x in steps] == [4, 8, 12, 16, 20, 24] and [x["step"] for x in saves] == [8, 16, 24]
    for metric in ("val_mel_cepstral_distance_db", "val_duration_loss"):
        assert saves[-1][metric] < saves[0][metric]
    samples, made = tmp_path / "whole" / "samples", tmp_path / "whole" / "vocoder.safetensors"
    assert (samples / "0_step000024.png").read_bytes()[:4] == b"\x89PNG"
    assert soundfile.info(samples / "0_step000024.wav").frames == soundfile.info(samples / "0_original.wav").frames

    # Killed once results.json has the first evaluation: without it a resumed run evaluates, and logs that, again.
    process = start("-m", "slam.train_vocoder", *flags, f"--out={tmp_path / 'killed'}")
    process.until((tmp_path / "killed" / "results.json").exists)
    process.kill()
    process.end()
    with open(tmp_path / "killed" / "log.jsonl", "a") as f:
        f.write('{"step": 9, "spec')  # in the middle of a line
    assert "resuming" in train("killed", "--resume")
    assert [x["step"] for x in log("killed")] == [x["step"] for x in log("whole")]
    whole, resumed = (Vocoder.load(f"{tmp_path}/{out}/vocoder.safetensors").state_dict() for out in ("whole", "killed"))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())

    refuses("--resume", "whole")
    assert "finished already" in train("whole", "--resume")
    refuses("width was 32", "whole", "--resume", "--width=64")
    refuses("seed is negative", "x", "--seed=-1")
    refuses("expected 64 and 1", "x", "--width=64", f"--init={made}")
    # A vocoder without the run's state is not overwritten; a new run starts from it.
    old = tmp_path / "old"
    old.mkdir()
    made.rename(old / "vocoder.safetensors")
    refuses(f"a vocoder.safetensors but no state/.*--init {old}/vocoder", "old", "--resume")
    train("new", f"--init={old}/vocoder.safetensors", "--steps=1")
    # Audio of other recordings is not taken for theirs.
    other = tmp_path / "other"
    other.mkdir()
    for path in (stories / "audio").glob("*.flac"):
        soundfile.write(other / path.name, np.random.default_rng(0).standard_normal(9000) * 0.1, 16_000)
    refuses("too little", "y", f"--audio={other}")
