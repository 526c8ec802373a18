"""prepare_units.py: audio in, units out, whatever the audio."""
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused, run

from prepare_units import (EMBEDDED_TOKENIZER, HubertFrames, SpeechTokenizer, WhisperFrames, assign, check_wave,
                           kmeans, load_audio, load_encoder, resample)
from units import UnitReader

TEXT = "The little bear lived in a big forest. One day, he found a shiny key under a tree."


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load("embedded")


@pytest.fixture(scope="module")
def wave(voice):
    return voice(TEXT)


def test_log_mel_is_whispers(tokenizer, wave):
    from transformers import WhisperFeatureExtractor

    from embedded import resolve
    extractor = WhisperFeatureExtractor.from_pretrained(resolve("embedded:whisper-tiny.en"))
    x = wave[:len(wave) // 640 * 640]
    theirs = extractor(x, sampling_rate=16_000, padding="do_not_pad", return_tensors="np").input_features[0]
    ours = tokenizer.encoder.log_mel(torch.from_numpy(x)).numpy()
    assert np.abs(ours - theirs).max() < 1e-3


def test_features_are_whispers_hidden_states(tokenizer, voice):
    """On a full 30 s window transformers' own encoder gives the same features."""
    from transformers import WhisperModel

    from embedded import resolve
    wave = np.tile(voice(TEXT), 8)[:30 * 16_000]
    mel = tokenizer.encoder.log_mel(torch.from_numpy(wave))
    model = WhisperModel.from_pretrained(resolve("embedded:whisper-tiny.en")).encoder.eval()
    with torch.no_grad():
        x = model(mel[None], output_hidden_states=True).hidden_states[3][0]
    theirs = (x[0::2] + x[1::2]) / 2
    ours, positions = tokenizer.encoder([wave])[0]
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert positions.tolist() == list(range(750))


def test_units_and_durations(tokenizer, wave):
    units, durations = tokenizer.encode(wave, 16_000)
    assert durations.sum() == len(wave) // 640 and durations.min() >= 1
    assert (np.diff(units) != 0).all() and units.max() < 500
    assert 12 < len(units) / (len(wave) / 16_000) < 25
    assert len(set(units.tolist())) > 30


def test_units_do_not_depend_on_the_batch(tokenizer, voice):
    waves = [voice(t) for t in ("Hi.", TEXT, "The dog is sleeping in the garden.", TEXT * 4, "No, said Tom.")]
    together = tokenizer.frames(waves)
    alone = [tokenizer.frames([w])[0] for w in waves]
    equal = np.concatenate([a == b for a, b in zip(together, alone)])
    assert equal.mean() >= 0.999  # what is left is rounding, where a frame lies between two centroids


def test_windows_of_long_audio_cover_every_frame_once(tokenizer, wave):
    for n in (1, 750, 751, 1249, 1250, 1251, 5000):
        spans = tokenizer.encoder.spans(n)
        assert [f for _, _, a, b in spans for f in range(a, b)] == list(range(n))
        assert all(0 <= start <= a < b <= end <= n and end - start <= 750 for start, end, a, b in spans)
    long = np.tile(wave, 10)
    assert len(tokenizer.frames([long])[0]) == len(long) // 640


def test_quiet_resampled_and_stereo_audio_sound_the_same(tokenizer, wave, tmp_path):
    reference = tokenizer.frames([wave])[0]
    for rate, channels, agreement in ((44_100, 1, 0.9), (48_000, 2, 0.9), (16_000, 2, 0.95), (8_000, 1, 0.2)):
        path = tmp_path / f"{rate}_{channels}.wav"
        soundfile.write(path, np.stack([resample(wave, 16_000, rate)] * channels, 1), rate)
        frames = tokenizer.frames([load_audio(path)])[0]
        n = min(len(frames), len(reference))
        assert abs(len(frames) - len(reference)) <= 1
        assert (frames[:n] == reference[:n]).mean() > agreement, (rate, channels)


@pytest.fixture(scope="module")
def bad_audio(tmp_path_factory, wave):
    """Files that hold nothing to hear: name -> what the error must say."""
    folder = tmp_path_factory.mktemp("bad")
    soundfile.write(folder / "whole.wav", wave, 16_000)
    (folder / "truncated.wav").write_bytes((folder / "whole.wav").read_bytes()[:-5000])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio")
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", wave[5000:5300], 16_000)
    soundfile.write(folder / "none.wav", np.zeros(0), 16_000)
    return folder, {"truncated": "truncated", "empty": "empty file", "text": "not readable as audio",
                    "silent": "silent", "nan": "NaN", "short": "at least 40 ms", "none": "at least 40 ms"}


def test_bad_audio_is_told_apart(bad_audio):
    folder, reasons = bad_audio
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as e:
            load_audio(folder / f"{name}.wav")
        assert f"{name}.wav" in str(e.value)
    with pytest.raises(ValueError, match="no such audio file"):
        load_audio(folder / "missing.wav")
    with pytest.raises(ValueError, match="NaN"):
        check_wave(np.full(16_000, np.nan, dtype=np.float32))


def test_a_folder_with_bad_files(bad_audio, tmp_path):
    """What is good is tokenised, what is bad is named and counted, and a second run has nothing to do."""
    folder, reasons = bad_audio
    command = ["prepare_units.py", "config/units_embedded.py", f"--input={folder}", f"--out={tmp_path}/u",
               "--durations"]
    done = run(*command)
    assert f"{len(reasons)} skipped" in done.stdout
    assert all(f"{name}.wav" in done.stderr for name in reasons)
    reader = UnitReader(tmp_path / "u")
    assert reader.ids() == ["whole.wav"] and reader.durations(0).sum() == round(reader.hours * 3600 * 25)
    again = run(*command)
    assert "0 files" in again.stdout and "1 were there already" in again.stdout
    assert UnitReader(tmp_path / "u").ids() == ["whole.wav"]


def test_refusals(tmp_path):
    assert "no such folder" in refused("prepare_units.py", "--input=nowhere")
    assert "no audio files" in refused("prepare_units.py", f"--input={tmp_path}")
    (tmp_path / "book.safetensors").write_bytes(pickle.dumps({"not": "a codebook"}))
    with pytest.raises(SystemExit, match="not a codebook"):
        SpeechTokenizer.load(str(tmp_path / "book.safetensors"))
    with pytest.raises(SystemExit, match="speech encoders here are"):
        load_encoder("embedded:smollm2-135m", 3)
    with pytest.raises(SystemExit, match="no layer 9"):
        load_encoder("embedded:whisper-tiny.en", 9)


def test_kmeans_finds_blobs():
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 5, generator=g) * 20
    x = (centres[:, None] + torch.randn(8, 100, 5, generator=g)).flatten(0, 1)
    centroids, inertia = kmeans(x, 8, 30, torch.Generator().manual_seed(1))
    assert torch.cdist(centres, centroids).min(1).values.max() < 0.5
    assert inertia == pytest.approx(5, rel=0.1)
    labels = assign(x, centroids, chunk=77)
    assert torch.equal(labels, torch.cdist(x, centroids).argmin(1))
    assert sorted(Counter(labels.tolist()).values()) == [100] * 8


def test_fit_makes_a_tokeniser(stories, tmp_path):
    """The documented command, on a few stories; the codebook it writes tokenises."""
    book = tmp_path / "book.safetensors"
    done = run("prepare_units.py", "fit", "config/fit_embedded.py", f"--input={stories / 'audio'}",
               f"--codebook={book}", "--n_units=40", "--iterations=5")
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 0.5 < report["crop_agreement"] <= 1 and report["n_units"] == 40
    mine = SpeechTokenizer.load(str(book))
    assert mine.fingerprint.n_units == 40
    assert mine.fingerprint != SpeechTokenizer.load("embedded").fingerprint
    assert "overwrite" in refused("prepare_units.py", "fit", f"--input={stories / 'audio'}", f"--codebook={book}")


def test_hubert_type_encoders(tmp_path, wave):
    """A small HuBERT, randomly initialised, saved as a folder and loaded by name: the full path of a hub encoder."""
    from transformers import HubertConfig, HubertModel
    torch.manual_seed(0)
    config = HubertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                          conv_dim=(16,) * 7, conv_stride=(5, 2, 2, 2, 2, 2, 4), num_conv_pos_embeddings=16,
                          num_conv_pos_embedding_groups=2)
    model = HubertModel(config).eval()
    model.save_pretrained(tmp_path / "hubert")
    encoder = load_encoder(str(tmp_path / "hubert"), 2)
    assert isinstance(encoder, HubertFrames) and encoder.rate_hz == 25.0
    x, positions = encoder([wave])[0]
    with torch.no_grad():
        padded = torch.nn.functional.pad(torch.from_numpy(wave), (40, 40))[None]
        expected = model(padded, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert positions is None and abs(len(x) - len(wave) / 640) <= 1


def test_the_shipped_codebook(tokenizer):
    assert EMBEDDED_TOKENIZER.stat().st_size < 2e6
    assert isinstance(tokenizer.encoder, WhisperFrames) and tokenizer.fingerprint.unit_rate_hz == 25
    assert tokenizer.centroids.shape == (500, 384) and tokenizer.position_mean.shape == (750, 384)
