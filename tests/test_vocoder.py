"""vocoder.py: units aloud, and understood."""
import numpy as np
import pytest
import torch
from conftest import refused, run

from eval import transcribe, word_error_rate
from speech_tokenizer import SpeechTokenizer
from vocoder import EMBEDDED_VOCODER, HOP, Spectra, Vocoder

HELD_OUT = [
    "Once upon a time, there was a clever duck who lived near a wide river. One day, the duck found a golden ring.",
    "Peter and his sister went to the market to buy bread and milk. It was raining, so they took a big umbrella.",
    "The old man sat on a chair in front of his house. He told the children a story about a ship and a storm.",
    "My mother has a white horse. Every morning she gives it water and a handful of fresh grass.",
]


@pytest.fixture(scope="module")
def vocoder():
    return Vocoder.load("embedded")


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load("embedded")


def test_shipped_vocoder_speaks_the_shipped_units(vocoder, tokenizer):
    assert vocoder.fingerprint == tokenizer.fingerprint
    assert EMBEDDED_VOCODER.stat().st_size < 12e6


def test_length_and_range(vocoder, tokenizer, voice):
    units, durations = tokenizer.encode(voice(HELD_OUT[3]), 16_000)
    wave, rate = vocoder.synthesize(units, durations)
    assert rate == 16_000 and wave.dtype == np.float32
    assert len(wave) == durations.sum() * rate / 25 and np.abs(wave).max() <= 1
    assert np.abs(wave).max() > 0.05
    again, _ = vocoder.synthesize(units, durations)
    assert (wave == again).all()
    predicted = vocoder.predict_durations(units)
    assert len(vocoder.synthesize(units)[0]) == predicted.sum() * rate / 25
    assert 0.7 < predicted.sum() / durations.sum() < 1.3
    for bad in ([], [500], [-1]):
        with pytest.raises(ValueError, match="units must be"):
            vocoder.synthesize(bad)


def test_resynthesis_is_understood(vocoder, tokenizer, voice):
    """Word error rate of Whisper on re-synthesised against original speech, on sentences of no corpus: at most 0.08."""
    waves = [voice(text) for text in HELD_OUT]
    spoken = [vocoder.synthesize(*tokenizer.encode(w, 16_000))[0] for w in waves]
    heard = transcribe(waves + spoken, "embedded:whisper-tiny.en")
    pairs = [word_error_rate(a, b) for a, b in zip(heard[:len(waves)], heard[len(waves):])]
    assert sum(e for e, _ in pairs) / sum(n for _, n in pairs) <= 0.08, heard


def test_griffin_lim_inverts_log_mel(voice):
    spectra, wave = Spectra(), torch.from_numpy(voice("The dog is sleeping."))
    mel = spectra.log_mel(wave)
    assert mel.shape == (len(wave) // HOP, 80)
    rebuilt = spectra.log_mel(spectra.griffin_lim(mel))
    assert (rebuilt - mel).abs().mean() < 0.35


def test_training_learns_resumes_and_saves(stories, tmp_path):
    """The documented command on a few stories: from audio to a vocoder file that loads."""
    units, out = tmp_path / "units", tmp_path / "vocoder"
    run("prepare_units.py", f"--input={stories / 'audio'}", f"--out={units}", "--durations")
    flags = [f"--units={units}", f"--audio={stories / 'audio'}", f"--out={out}", "--width=32", "--blocks=1",
             "--batch=4", "--val_every=3", "--save_every=20", "--ema=0.9"]
    run("vocoder.py", "train", *flags, "--minutes=0.05")
    first = Vocoder.load(str(out / "vocoder.safetensors"))
    assert first.width == 32
    done = run("vocoder.py", "train", *flags, "--minutes=0.15", "--resume")
    assert "resuming" in done.stdout
    import json
    log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] > log[0]["step"] and log[-1]["val_mel_l1"] < log[0]["val_mel_l1"]
    assert "--resume" in refused("vocoder.py", "train", *flags)


def test_refusals(tmp_path):
    with pytest.raises(SystemExit, match="no such vocoder"):
        Vocoder.load("nowhere.safetensors")
    (tmp_path / "v.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="not a vocoder"):
        Vocoder.load(str(tmp_path / "v.safetensors"))
