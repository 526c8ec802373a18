"""slam/tokenizer.py: a recording has the same units whatever is in its batch, and wherever its windows are cut."""
import math
import pickle

import numpy as np
import pytest
import soundfile
import torch

from prepare_units import Config, extract
from slam.audio import load_audio, resample
from slam.tokenizer import (
    EMBEDDED_TOKENIZER,
    Bpe,
    HubertFrames,
    SpeechTokenizer,
    WhisperFrames,
    assign,
    codebook_fingerprints,
    load_encoder,
    read_codebook,
    windows,
    write_codebook,
)

TEXT = "The little bear lived in a big forest. One day, he found a shiny key under a tree."


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load("embedded")


@pytest.fixture(scope="module")
def wave(voice):
    return voice(TEXT)


def test_log_mel_is_whispers(tokenizer, wave):
    from transformers import WhisperFeatureExtractor

    from slam.embedded import resolve
    extractor = WhisperFeatureExtractor.from_pretrained(resolve("embedded:whisper-tiny.en"))
    x = wave[:len(wave) // 640 * 640]
    theirs = extractor(x, sampling_rate=16_000, padding="do_not_pad", return_tensors="np").input_features[0]
    ours = tokenizer.encoder.log_mel(torch.from_numpy(x)).numpy()
    assert np.abs(ours - theirs).max() < 1e-3


def test_features_are_whispers_hidden_states(tokenizer, voice):
    """On a full 30 s window transformers' own encoder gives the same features."""
    from transformers import WhisperModel

    from slam.embedded import resolve
    wave = np.tile(voice(TEXT), 8)[:30 * 16_000]
    mel = tokenizer.encoder.log_mel(torch.from_numpy(wave))
    model = WhisperModel.from_pretrained(resolve("embedded:whisper-tiny.en")).encoder.eval()
    with torch.no_grad():
        x = model(mel[None], output_hidden_states=True).hidden_states[3][0]
    theirs = (x[0::2] + x[1::2]) / 2
    ours = tokenizer.encoder([wave])[0]
    assert ours.shape == (750, 384)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


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


class Frames:
    """The numbers that `windows` needs of an encoder."""
    samples_per_frame, window, hop = 10, 30, 20


def test_windows_cover_every_frame_once():
    rng = np.random.default_rng(0)
    for n in (0, 5, 10, 300, 305, 309, 310, 499, 500, 509, 510, 511, 700, 2000, 12_345):
        x = np.arange(n, dtype=np.float32)
        for blocks in ([x], np.split(x, range(7, n, 7)), np.split(x, np.sort(rng.integers(0, n + 1, 5)))):
            found, end = [], None
            for wave, first, last in windows(blocks, Frames):
                assert end is None and (last is None or last <= 30) and len(wave) < 310
                start = int(wave[0]) // 10 if len(wave) else 0
                np.testing.assert_array_equal(wave, x[start * 10:start * 10 + len(wave)])
                end = "no more after the last one" if last is None else None
                found += list(range(start + first, start + (len(wave) // 10 if last is None else last)))
                if n > 310:  # five frames of context on both sides, but at the ends
                    assert (first >= 5 or start == 0) and (last is None or last <= 25)
            assert found == list(range(n // 10)) and end


def test_long_audio_is_tokenised_in_its_windows(tokenizer, wave):
    long = np.tile(wave, 10)
    frames = tokenizer.frames([long])[0]
    assert len(long) > 33 * 16_000 and len(frames) == len(long) // 640
    window = tokenizer.frames([long[:750 * 640]])[0]
    np.testing.assert_array_equal(frames[:600], window[:600])


def test_quiet_resampled_and_stereo_audio_sound_the_same(tokenizer, wave, tmp_path):
    reference = tokenizer.frames([wave])[0]
    for rate, channels, agreement in ((44_100, 1, 0.9), (48_000, 2, 0.9), (16_000, 2, 0.95), (8_000, 1, 0.2)):
        path = tmp_path / f"{rate}_{channels}.wav"
        soundfile.write(path, np.stack([resample(wave, 16_000, rate)] * channels, 1), rate)
        frames = tokenizer.frames([load_audio(path)])[0]
        n = min(len(frames), len(reference))
        assert abs(len(frames) - len(reference)) <= 1
        assert (frames[:n] == reference[:n]).mean() > agreement, (rate, channels)


def test_features_that_are_not_finite(wave, tmp_path):
    """They are no units, alone an error, and in a corpus skipped and counted."""
    x, centroids = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 1.0], [0.0, 2.0]]), torch.eye(2)
    assert assign(x, centroids).tolist() == [0, -1, -1, 1]
    overflows = SpeechTokenizer.load("embedded")
    overflows.encoder.encoder.conv1.weight.data *= 1e38
    with pytest.raises(ValueError, match="whisper-tiny.en gives features that are not finite in torch.float32"):
        overflows.encode(wave, 16_000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    with pytest.raises(SystemExit, match="1 of 1 can't be used.*not finite"):
        extract(Config(input=str(tmp_path / "a.wav"), out=str(tmp_path / "units")), overflows)


def test_half_precision_is_near(tokenizer, wave):
    exact = tokenizer.frames([wave])[0]
    half = SpeechTokenizer.load("embedded", dtype="float16").frames([wave])[0]
    assert (exact == half).mean() > 0.97


def hubert(folder, norm="group", stable=False, batch_norm=False):
    """A small HuBERT with mHuBERT-25hz's strides, randomly initialised, saved as a folder."""
    from transformers import HubertConfig, HubertModel
    torch.manual_seed(0)
    config = HubertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                          conv_dim=(16,) * 7, conv_stride=(5, 2, 2, 2, 2, 2, 4), num_conv_pos_embeddings=16,
                          num_conv_pos_embedding_groups=2, feat_extract_norm=norm, do_stable_layer_norm=stable,
                          conv_bias=norm == "layer", conv_pos_batch_norm=batch_norm)
    model = HubertModel(config).eval()
    if batch_norm:
        norm = model.encoder.pos_conv_embed.batch_norm
        for x in (norm.running_mean, norm.bias.data):
            x.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("norm, stable, batch_norm, layer", [
    ("group", False, True, 3), ("layer", True, False, 2), ("group", False, False, 4)])
def test_hubert_type_encoders(tmp_path, wave, voice, norm, stable, batch_norm, layer):
    """The full path of a hub encoder: loaded by name; the features of transformers' model, alone and in a batch."""
    model = hubert(tmp_path / "hubert", norm, stable, batch_norm)
    encoder = load_encoder(str(tmp_path / "hubert"), layer)
    assert isinstance(encoder, HubertFrames) and encoder.rate_hz == 25.0
    waves = [wave, voice("Hi."), wave[:20_000], np.tile(wave, 2), wave[3000:3640]]
    alone = [encoder([w])[0] for w in waves]
    for w, x in zip(waves, alone):
        with torch.no_grad():
            padded = torch.nn.functional.pad(torch.from_numpy(w), (40, 40))[None]
            expected = model(padded, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(x, expected, atol=2e-5, rtol=1e-4)
        assert abs(len(x) - len(w) / 640) <= 1 and len(x) == encoder.n_frames(len(w))
    for x, together in zip(alone, encoder(waves)):
        torch.testing.assert_close(x, together, atol=2e-5, rtol=1e-4)


def test_hubert_units_do_not_depend_on_the_batch(tmp_path, voice):
    """With 50 centroids among its own features: what differs are frames as near to one centroid as to another."""
    hubert(tmp_path / "hubert")
    encoder = load_encoder(str(tmp_path / "hubert"), 3)
    waves = [voice(t) for t in ("Hi.", TEXT, "The dog is sleeping in the garden.", TEXT * 3, "No, said Tom.")]
    x = torch.cat([encoder([w])[0] for w in waves])
    tensors = {"centroids": x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:50]].clone()}
    meta = {"encoder": str(tmp_path / "hubert"), "layer": 3, "unit_rate_hz": 25.0}
    write_codebook(tmp_path / "book.safetensors", tensors, meta)
    tokenizer = SpeechTokenizer.load(str(tmp_path / "book.safetensors"))
    together, alone = tokenizer.frames(waves), [tokenizer.frames([w])[0] for w in waves]
    assert np.concatenate([a == b for a, b in zip(together, alone)]).mean() >= 0.999
    assert len(set(np.concatenate(alone).tolist())) > 25


def test_codebooks(tmp_path):
    """The fingerprint is of what a codebook holds, not of how its file is laid out; a wrong one is refused."""
    tensors, meta = read_codebook("embedded")
    shas = {codebook_fingerprints(tensors, meta)[0].codebook_sha256}
    for order in (meta, dict(reversed(meta.items())), meta | {"more": "of it"}):
        write_codebook(tmp_path / "book.safetensors", tensors, order)
        shas.add(codebook_fingerprints(*read_codebook(str(tmp_path / "book.safetensors")))[0].codebook_sha256)
    assert len(shas) == 1
    changed = tensors | {"position_mean": tensors["position_mean"] + 1}
    assert codebook_fingerprints(changed, meta)[0].codebook_sha256 not in shas
    write_codebook(tmp_path / "book.safetensors", {"centroids": torch.zeros(10, 7)}, meta)
    with pytest.raises(SystemExit, match="7 dimensions"):
        SpeechTokenizer.load(str(tmp_path / "book.safetensors"))
    (tmp_path / "book.safetensors").write_bytes(pickle.dumps({"not": "a codebook"}))
    with pytest.raises(SystemExit, match="not a codebook"):
        SpeechTokenizer.load(str(tmp_path / "book.safetensors"))
    with pytest.raises(SystemExit, match="no such codebook"):
        SpeechTokenizer.load(str(tmp_path / "none.safetensors"))
    with pytest.raises(SystemExit, match="speech encoders here are"):
        load_encoder("embedded:smollm2-135m", 3)
    with pytest.raises(SystemExit, match="no layer 9"):
        load_encoder("embedded:whisper-tiny.en", 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: no speech encoder there"):
        load_encoder(str(tmp_path / "empty"), 3)


def test_bpe_is_lossless():
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 40, rng.integers(2, 6)) for _ in range(30)]  # a language of thirty words

    def utterance():
        x = np.concatenate([words[i] for i in rng.integers(0, 30, 40)])
        return x[np.flatnonzero(np.diff(x, prepend=-1))]

    said = [utterance() for _ in range(200)]
    bpe = Bpe.train(iter(said), 50, 120)
    assert bpe.n_pieces == 120
    for units in [*said[:20], np.arange(50), np.array([49])]:  # units never heard in training too
        durations = rng.integers(1, 9, len(units))
        pieces, lasting = bpe.encode(units, durations)
        assert bpe.decode(pieces) == units.tolist() and lasting.sum() == durations.sum()
        assert len(pieces) == len(lasting) and pieces.min() >= 0 and pieces.max() < 120
        ends = np.cumsum([len(bpe.expansions[p]) for p in pieces])
        assert lasting.tolist() == [int(d.sum()) for d in np.split(durations, ends[:-1])]
    assert sum(map(len, said)) > 1.8 * sum(len(bpe.encode(u, None)[0]) for u in said)
    with pytest.raises(SystemExit, match="n_pieces=30"):
        Bpe.train(iter(said), 50, 30)


def test_the_shipped_codebook(tokenizer):
    assert EMBEDDED_TOKENIZER.stat().st_size < 2e6
    assert isinstance(tokenizer.encoder, WhisperFrames) and tokenizer.fingerprint.unit_rate_hz == 25
    assert tokenizer.centroids.shape == (500, 384) and tokenizer.position_mean.shape == (750, 384)
