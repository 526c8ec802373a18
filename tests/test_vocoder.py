"""vocoder.py: units aloud, and understood; the published layout; training."""
import json
import math
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch

from slam import embedded
from slam.mel import cepstral_distance, log_mel, mel_cepstral_distance, png, spectrogram
from slam.metrics import word_error_rate
from slam.speech import transcribe
from slam.tokenizer import SpeechTokenizer
from slam.train_vocoder import SpectralLoss
from slam.units import Fingerprint
from slam.vocoder import EMBEDDED_VOCODER, HifiGan, Vocoder, Vocos

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
    spoken = vocoder.synthesize_batch(*zip(*encoded))
    heard = transcribe(waves + spoken, "embedded:whisper-tiny.en")
    pairs = [word_error_rate(a, b) for a, b in zip(heard[:len(waves)], heard[len(waves):])]
    assert sum(e for e, _ in pairs) / sum(n for _, n in pairs) <= 0.08, heard


# ---------------------------------------------------------------- kinds of vocoders

CONFIG = {"num_embeddings": 500, "embedding_dim": 16, "model_in_dim": 16, "upsample_rates": [5, 4, 4, 4, 2],
          "upsample_kernel_sizes": [11, 8, 8, 8, 4], "upsample_initial_channel": 64, "resblock_kernel_sizes": [3, 7],
          "resblock_dilation_sizes": [[1, 3, 5], [1, 3]], "sampling_rate": 16_000, "code_hop_size": 640,
          "multispkr": None, "f0": None,
          "dur_predictor_params": {"encoder_embed_dim": 16, "var_pred_hidden_dim": 16, "var_pred_kernel_size": 3,
                                   "var_pred_dropout": 0.5}}
VARIANTS = {"durations": {}, "speakers": {"multispkr": "from-code", "num_speakers": 7, "model_in_dim": 32},
            "speakers and styles": {"multispkr": True, "num_speakers": 7, "multistyle": True, "num_styles": 3,
                                    "model_in_dim": 48},
            "no durations": {"dur_predictor_params": None}}


def write_published(folder, **changes):
    """A random unit HiFi-GAN in the published layout: weight-normed convolutions, all under `generator`."""
    config, generator = CONFIG | changes, torch.Generator().manual_seed(0)
    speaker = config.get("num_speakers", 200)
    names = HifiGan(config, Fingerprint("x", 1, 25.0, 500, True, ""), speaker=speaker - 1 if speaker < 200 else 0)
    state = {}
    for name, p in names.state_dict().items():
        x = torch.randn(p.shape, generator=generator)
        if name.startswith(("conv_", "ups", "resblocks")) and name.endswith(".weight"):
            state[f"{name}_v"] = x
            # of a size that keeps the signal's
            state[f"{name}_g"] = (0.5 + torch.rand(len(p), *[1] * (p.dim() - 1), generator=generator)) * (
                1.6 if name.startswith("ups") else 1)
        else:
            state[name] = x * (1 if "dict" in name or "spkr" in name or "style" in name else 0.2)
    if config["dur_predictor_params"]:
        state |= {"dur_predictor.ln2.weight": torch.ones(16), "dur_predictor.ln2.bias": torch.zeros(16),
                  "dur_predictor.conv2.0.bias": torch.ones(16),
                  "dur_predictor.proj.weight": 0.3 * torch.rand(1, 16, generator=generator),
                  "dur_predictor.proj.bias": torch.tensor([1.3])}
    folder.mkdir(exist_ok=True)
    torch.save({"generator": state}, folder / "vocoder.pt")
    (folder / "vocoder_config.json").write_text(json.dumps(config))
    return str(folder / "vocoder.pt"), state


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_layout(variant, tmp_path):
    """Loaded weights give what transformers' modules of the same architecture give; batched as alone, as streamed."""
    from transformers import SeamlessM4TConfig
    from transformers.models.seamless_m4t import modeling_seamless_m4t as seamless
    name, state = write_published(tmp_path, **VARIANTS[variant])
    config, speakers = CONFIG | VARIANTS[variant], "speakers" in variant
    ours = Vocoder.load(name, speaker=5 if speakers else 0)
    assert (ours.fingerprint.encoder, ours.fingerprint.n_units) == ("slprl/mhubert-base-25hz", 500)

    theirs = seamless.SeamlessM4THifiGan(SeamlessM4TConfig(
        unit_embed_dim=config["model_in_dim"], lang_embed_dim=0, spkr_embed_dim=0, leaky_relu_slope=0.1,
        **{k: config[k] for k in ("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel",
                                  "resblock_kernel_sizes", "resblock_dilation_sizes")})).eval()
    plain = {k: v for k, v in state.items() if not k.endswith(("_g", "_v"))}
    plain |= {k[:-2]: torch._weight_norm(v, state[f"{k[:-2]}_g"], 0) for k, v in state.items() if k.endswith("_v")}
    theirs.load_state_dict({k.replace("ups.", "upsampler."): v for k, v in plain.items()
                            if k.startswith(("conv_", "ups", "resblocks"))})
    rng = np.random.default_rng(0)
    units = rng.integers(0, 500, 40)
    durations = rng.integers(1, 4, 40)
    x = plain["dict.weight"][np.repeat(units, durations)]
    for table, index in (("spkr", 5), ("style", 0)):
        if f"{table}.weight" in plain:
            x = torch.cat([x, plain[f"{table}.weight"][index].expand(len(x), -1)], 1)
    with torch.inference_mode():
        expected = theirs(x.T[None])[0].numpy()
    wave, rate = ours.synthesize(units, durations)
    assert rate == 16_000 and len(wave) == durations.sum() * 640 and 0.02 < np.abs(wave).mean() < 0.9
    np.testing.assert_allclose(wave, expected, atol=1e-5)
    if variant == "no durations":
        with pytest.raises(ValueError, match="no duration predictor"):
            ours.synthesize(units)
        return
    predictor = seamless.SeamlessM4TVariancePredictor(SeamlessM4TConfig(unit_embed_dim=16)).eval()
    predictor.load_state_dict({k.removeprefix("dur_predictor.").replace(".0.", "."): v for k, v in plain.items()
                               if k.startswith("dur_predictor")})
    with torch.inference_mode():
        log = predictor(plain["dict.weight"][units][None])[0]
    expected = (log.exp() - 1).round().clamp(min=1).long().numpy()
    assert (ours.predict_durations(units) == expected).all() and 1 < expected.mean() < 20
    check_batch_and_stream(ours)


def check_batch_and_stream(vocoder, n_units=500):
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, n_units, n) for n in (30, 90, 1, 55)]
    alone = [vocoder.synthesize(row)[0] for row in rows]
    for a, b in zip(alone, vocoder.synthesize_batch(rows), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for wave, row in zip(alone, rows):
        ends = [*np.cumsum(rng.integers(0, 12, 200)), len(row)]
        pieces = list(vocoder.stream(row[a:b] for a, b in zip([0, *ends], ends)))
        np.testing.assert_allclose(np.concatenate(pieces), wave, atol=1e-4)
        assert len(pieces) > 1 or len(row) < 60
    assert list(vocoder.stream([])) == []


@pytest.mark.parametrize("rate_hz", [12.5, 25.0, 50.0])
def test_ours_batched_alone_and_streamed(rate_hz):
    torch.manual_seed(0)
    ours = Vocos(Fingerprint("x", 1, rate_hz, 20, True, ""), width=32, blocks=2).eval()
    for p in ours.parameters():  # what starts at zero would hide what leaks
        p.data += 0.1 * torch.randn_like(p)
    assert len(ours.synthesize([3, 4], [2, 5])[0]) == 7 * 16_000 / rate_hz
    check_batch_and_stream(ours, 20)


def test_shipped_one_streams(vocoder):
    check_batch_and_stream(vocoder)


def test_refusals(tmp_path):
    def refuses(name, match, **kwargs):
        with pytest.raises(SystemExit, match=match):
            Vocoder.load(str(name), **kwargs)

    refuses("nowhere.safetensors", "no such vocoder")
    (tmp_path / "v.safetensors").write_bytes(b"nothing")
    refuses(tmp_path / "v.safetensors", "not a vocoder")
    with pytest.raises(ValueError, match="multiple"):
        Vocos(Fingerprint("x", 1, 30.0, 20, True, ""))
    name, state = write_published(tmp_path / "p", **VARIANTS["speakers"])
    refuses(name, "speakers 0 to 6", speaker=7)
    folder = tmp_path / "p"
    config = json.loads((folder / "vocoder_config.json").read_text())
    for change, match in (({"f0": True}, "pitch"), ({"num_embeddings": 100}, "not a unit HiFi-GAN"),
                          ({"upsample_rates": None}, "not a unit")):
        (folder / "vocoder_config.json").write_text(json.dumps(config | change))
        refuses(name, match)
    (folder / "vocoder_config.json").unlink()
    refuses(name, "config.json beside it")
    (folder / "config.json").write_text(json.dumps(config))
    Vocoder.load(name)
    # What has a published name must be the published file, and no pickle runs code.
    (folder / "vocoder.pt").rename(folder / "hifigan_lj_mhubert_base_25hz.pt")
    refuses(folder / "hifigan_lj_mhubert_base_25hz.pt", "d88224e9…3b79")

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "was_run"), "w")

    with open(folder / "vocoder.pt", "wb") as f:
        pickle.dump({"generator": Bomb()}, f)
    refuses(name, "not a unit HiFi-GAN")
    torch.save({"generator": Bomb()}, folder / "vocoder.pt")
    refuses(name, "not a unit HiFi-GAN")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("stale", [False, True])
def test_the_hop_is_the_upsampling(stale, tmp_path, capsys):
    """`code_hop_size` may be missing, or wrong and warned of: neither changes what is spoken."""
    name, _ = write_published(tmp_path)
    right = Vocoder.load(name)
    path = tmp_path / "vocoder_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"code_hop_size": 320} if stale else
                               {k: v for k, v in config.items() if k != "code_hop_size"}))
    assert not capsys.readouterr().err
    vocoder = Vocoder.load(name)
    assert (vocoder.hop, vocoder.fingerprint) == (640, right.fingerprint) and right.fingerprint.unit_rate_hz == 25
    np.testing.assert_array_equal(*(v.synthesize([3, 49, 7], [2, 1, 4])[0] for v in (vocoder, right)))
    said = capsys.readouterr().err
    assert f"{path}: code_hop_size is 320, but" in said and "640" in said if stale else not said


def test_what_is_fetched_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "thing.bin"
    source.write_bytes(b"0123456789")
    sha = embedded.sha256(source)
    with pytest.raises(SystemExit, match="is ffff…ff"):
        embedded.download(source.as_uri(), "ffff", "ff")
    assert not [*(tmp_path / "cache" / "published").iterdir()]
    path = embedded.download(source.as_uri(), sha[:8], sha[-4:])
    assert path.read_bytes() == b"0123456789" and tmp_path / "cache" in path.parents
    source.unlink()
    assert embedded.download(source.as_uri(), sha[:8], sha[-4:]) == path  # not fetched again
    path.write_bytes(b"altered")
    with pytest.raises(SystemExit, match="fetch it again"):
        embedded.download(source.as_uri(), sha[:8], sha[-4:])
    path.unlink()
    with pytest.raises(SystemExit, match="can't be fetched"):
        embedded.download(source.as_uri(), sha[:8], sha[-4:])


# ---------------------------------------------------------------- measures and pictures

def test_spectral_loss_and_distance(voice):
    wave = voice("The dog is sleeping.")
    x, loss = torch.from_numpy(wave)[None], SpectralLoss()
    assert loss(x, x) < 1e-6 and loss(-x, x) < 1e-6  # the phase does not matter
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    values = [loss(x + level * noise, x).item() for level in (0.001, 0.01, 0.1)]
    assert 0 < values[0] < values[1] < values[2]
    assert mel_cepstral_distance(wave, wave) == 0 and mel_cepstral_distance(wave, -wave[:-100]) < 1e-3
    noisy = [mel_cepstral_distance(wave, wave + level * noise[0].numpy()) for level in (0.001, 0.01, 0.1)]
    assert 0 < noisy[0] < noisy[1] < noisy[2]
    # In closed form: a ripple of one neper, and a change of loudness, which does not count.
    mel = torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
    ripple = torch.cos(3 * math.pi * (torch.arange(80) + 0.5) / 80)
    torch.testing.assert_close(cepstral_distance(mel + ripple, mel), torch.full((5,), 10 / math.log(10) * 2 ** 0.5))
    assert cepstral_distance(mel + 2, mel).abs().max() < 1e-4
    assert len(log_mel(torch.zeros(320))) > 0  # shorter than a window
    # Brute force: one frame's log-mels by hand.
    n = np.fft.rfft(np.hanning(1025)[:-1] * np.pad(wave, 512, mode="reflect")[1600:2624])
    from slam.mel import mel_filters
    by_hand = np.log(np.maximum(mel_filters(1024, 80).numpy() @ np.abs(n), 1e-4))
    np.testing.assert_allclose(log_mel(torch.from_numpy(wave))[10], by_hand, atol=2e-3)


def test_a_picture_is_a_png(voice):
    levels = spectrogram(voice("The dog is sleeping."))
    assert levels.shape[0] == 80 and levels.dtype == np.uint8 and levels.max() == 255 and levels.std() > 30
    assert levels[40:].mean() > levels[:40].mean()  # speech has more of low tones, which are below
    assert spectrogram(np.zeros(16_000)).max() == 0
    image = png(levels)
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", image[16:24]) == levels.shape[::-1]
    at, found = 8, {}
    while at < len(image):  # every chunk's length and checksum
        n, kind = struct.unpack(">I4s", image[at:at + 8])
        found[kind] = body = image[at + 8:at + 8 + n]
        assert zlib.crc32(kind + body) == struct.unpack(">I", image[at + 8 + n:at + 12 + n])[0]
        at += 12 + n
    rows = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(80, -1)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:] == levels).all() and len(found[b"PLTE"]) == 3 * 256
