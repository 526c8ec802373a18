"""slam/vocoder.py: units aloud, and understood; a vocoder found by its fingerprint."""
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from slam.metrics import word_error_rate
from slam.speech import transcribe
from slam.tokenizer import (
    EMBEDDED_TOKENIZER,
    PUBLISHED_KMEANS,
    SpeechTokenizer,
    codebook_fingerprints,
    find_codebook,
    read_codebook,
    write_codebook,
)
from slam.units import Fingerprint, published_fingerprint
from slam.vocoder import EMBEDDED_VOCODER, Vocoder, Vocos, find_vocoder

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


# ---------------------------------------------------------------- the shipped one

def test_shipped_vocoder_speaks_the_shipped_units(vocoder, tokenizer):
    assert vocoder.fingerprint == tokenizer.fingerprint
    assert EMBEDDED_VOCODER.stat().st_size < 12e6


def test_length_and_range(vocoder, tokenizer, voice):
    units, durations = tokenizer.encode(voice(HELD_OUT[3]), 16_000)
    wave, rate = vocoder.synthesize(units, durations)
    assert rate == 16_000 and wave.dtype == np.float32
    assert len(wave) == durations.sum() * rate / 25 and 0.05 < np.abs(wave).max() <= 1
    assert (np.abs(wave) >= 1).mean() < 1e-4
    predicted = vocoder.predict_durations(units)
    assert len(vocoder.synthesize(units)[0]) == predicted.sum() * rate / 25
    assert 0.7 < predicted.sum() / durations.sum() < 1.3
    for bad in ([], [500], [-1]):
        with pytest.raises(ValueError, match="units must be"):
            vocoder.synthesize(bad)


def test_resynthesis_is_understood(vocoder, tokenizer, voice):
    """Word error rate of Whisper on re-synthesised against original speech, on sentences of no corpus: at most 0.08."""
    waves = [voice(text) for text in HELD_OUT]
    encoded = [tokenizer.encode(w, 16_000) for w in waves]
    spoken = [vocoder.synthesize(*x)[0] for x in encoded]
    heard = transcribe(waves + spoken, "embedded:whisper-tiny.en")
    pairs = [word_error_rate(a, b) for a, b in zip(heard[:len(waves)], heard[len(waves):])]
    assert sum(e for e, _ in pairs) / sum(n for _, n in pairs) <= 0.08, heard


def check_stream(vocoder, n_units=500):
    rng = np.random.default_rng(1)
    for n in (30, 90, 1, 55):
        row = rng.integers(0, n_units, n)
        wave, _ = vocoder.synthesize(row)
        ends = [*np.cumsum(rng.integers(0, 12, 200)), len(row)]
        pieces = list(vocoder.stream(row[a:b] for a, b in zip([0, *ends], ends)))
        np.testing.assert_allclose(np.concatenate(pieces), wave, atol=1e-4)
        assert sum(len(piece) > 0 for piece in pieces) > 1 or len(row) < 60
    assert list(vocoder.stream([])) == []


@pytest.mark.parametrize("rate_hz", [12.5, 25.0, 50.0])
def test_ours_streamed(rate_hz):
    torch.manual_seed(0)
    ours = Vocos(Fingerprint("x", 1, rate_hz, 20, True, ""), width=32, blocks=2).eval()
    for p in ours.parameters():  # what starts at zero would hide what leaks
        p.data += 0.1 * torch.randn_like(p)
    assert len(ours.synthesize([3, 4], [2, 5])[0]) == 7 * 16_000 / rate_hz
    check_stream(ours, 20)


def test_shipped_one_streams(vocoder):
    check_stream(vocoder)


def test_refusals(tmp_path):
    def refuses(name, match, **kwargs):
        with pytest.raises(SystemExit, match=match):
            Vocoder.load(str(name), **kwargs)

    refuses("nowhere.safetensors", "no such vocoder")
    (tmp_path / "v.safetensors").write_bytes(b"nothing")
    refuses(tmp_path / "v.safetensors", "not a vocoder")
    with pytest.raises(ValueError, match="multiple"):
        Vocos(Fingerprint("x", 1, 30.0, 20, True, ""))


def test_codebook_and_vocoder_are_found_by_fingerprint(tmp_path):
    shipped = Vocoder.load("embedded").fingerprint
    here = str(tmp_path)
    assert (find_codebook(shipped, here), find_vocoder(shipped, folder=here)) == ("embedded", "embedded")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    shutil.copy(EMBEDDED_TOKENIZER, tmp_path / "copy.safetensors")
    meta = {"encoder": "some/encoder", "layer": 3, "unit_rate_hz": 25.0}
    for name in ("x", "y"):
        centroids = torch.full((7, 4), float(ord(name)))
        write_codebook(tmp_path / "deep" / f"{name}.safetensors", {"centroids": centroids}, meta)
    path = str(tmp_path / "deep" / "y.safetensors")
    other, _ = codebook_fingerprints(*read_codebook(path))
    assert find_codebook(other, str(tmp_path)) == path
    with pytest.raises(SystemExit, match="no vocoder below"):
        find_vocoder(other, folder=here)
    Vocos(other, 16, 1).save(tmp_path / "deep" / "v.safetensors")
    assert find_vocoder(other, folder=here) == str(tmp_path / "deep" / "v.safetensors")
    with pytest.raises(SystemExit, match="no codebook below"):
        find_codebook(Fingerprint("some/encoder", 3, 25.0, 8, True, "f"), str(tmp_path))
    published = published_fingerprint(502)
    assert find_vocoder(published, folder=here) == "published"
    fitted = replace(published, codebook_sha256="f" * 64)  # by somebody: other units of the same encoder
    with pytest.raises(SystemExit, match="no vocoder below"):
        find_vocoder(fitted, folder=here)
    assert find_vocoder(fitted, published=True, folder=here) == "published"
    with pytest.raises(SystemExit, match="prepare_units.py convert"):
        find_codebook(published, str(tmp_path))
    meta = {"encoder": published.encoder, "layer": 11, "unit_rate_hz": 25.0}
    write_codebook(tmp_path / "fitted.safetensors", {"centroids": torch.zeros(500, 4)}, meta)
    with pytest.raises(SystemExit, match="no codebook below"):
        find_codebook(published, here)
    write_codebook(tmp_path / "m.safetensors", {"centroids": torch.zeros(500, 4)},
                   meta | {"source_sha256": PUBLISHED_KMEANS[1]})
    assert find_codebook(published, here) == str(tmp_path / "m.safetensors")
    assert EMBEDDED_VOCODER.is_file()
