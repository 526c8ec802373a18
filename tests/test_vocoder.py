"""slam/vocoder.py: units aloud, and understood; a vocoder found by its fingerprint."""
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from slam import embedded
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
    spoken = vocoder.synthesize_batch(*zip(*encoded))
    heard = transcribe(waves + spoken, "embedded:whisper-tiny.en")
    pairs = [word_error_rate(a, b) for a, b in zip(heard[:len(waves)], heard[len(waves):])]
    assert sum(e for e, _ in pairs) / sum(n for _, n in pairs) <= 0.08, heard


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
        assert sum(len(piece) > 0 for piece in pieces) > 1 or len(row) < 60
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
                   meta | {"source_sha256": PUBLISHED_KMEANS[1] + 52 * "0" + PUBLISHED_KMEANS[2]})
    assert find_codebook(published, here) == str(tmp_path / "m.safetensors")
    assert EMBEDDED_VOCODER.is_file()


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
<<<<<<< HEAD


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


# ---------------------------------------------------------------- training

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
    soundfile.write(tmp_path / "audio" / "long.flac", np.concatenate([voice(text) for text in HELD_OUT]), 16_000)
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


def test_discriminators_can_tell():
    """Trained on noise against tones, they tell these apart."""
    from slam.train_vocoder import adversarial_loss, discriminator_loss
    torch.manual_seed(0)
    discs = discriminators(4)
    real, ours = torch.sin(torch.arange(3000) * torch.rand(2, 1)), torch.randn(2, 3000)
    optimizer = torch.optim.AdamW(discs.parameters(), 5e-3)
    before = discriminator_loss(discs, real, ours).item()
    for _ in range(12):
        optimizer.zero_grad()
        discriminator_loss(discs, real, ours).backward()
        optimizer.step()
    assert discriminator_loss(discs, real, ours).item() < 0.6 * before
    ours.requires_grad_()
    adversarial_loss(discs, real, ours).backward()
    assert ours.grad.abs().sum() > 0
    with torch.no_grad():
        assert adversarial_loss(discs, real, ours) > adversarial_loss(discs, real, real)


def test_training_learns_resumes_and_saves(stories, tmp_path):
    """The documented command on a few stories: from audio to a vocoder file that loads, and what can be looked at.

    Stopped and resumed it makes the very file that it would have made.
    """
    units = tmp_path / "units"
    run("prepare_units.py", f"--input={stories / 'audio'}", f"--out={units}", "--durations")
    flags = [f"--units={units}", f"--audio={stories / 'audio'}", "--width=32", "--blocks=1", "--batch=2",
             "--val_every=3", "--log_every=4", "--adversarial", "--disc_width=2", "--adversarial_from=0.3",
             "--ema=0.9", "--lr=1e-2"]

    def command(out, *more):
        return ["-m", "slam.train_vocoder", *flags, f"--out={tmp_path / out}", "--steps=24", "--save_every=8", *more]

    def log(out):
        return [json.loads(x) for x in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    run(*command("whole"))
    steps, saves = [x for x in log("whole") if "spectral" in x], [x for x in log("whole") if "val_clipped_share" in x]
    assert [x["step"] for x in steps] == [4, 8, 12, 16, 20, 24] and [x["step"] for x in saves] == [8, 16, 24]
    # A log line averages over a few crops, which differ in loudness; the validation set below is always the same.
    assert min(x["spectral"] for x in steps) < steps[0]["spectral"] and "adversarial" not in steps[0]
    assert {"adversarial", "discriminators"} <= steps[-1].keys()
    for metric in ("val_mel_cepstral_distance_db", "val_duration_loss"):
        assert saves[-1][metric] < saves[0][metric]
    samples = tmp_path / "whole" / "samples"
    assert (samples / "0_step000024.png").read_bytes()[:4] == b"\x89PNG"
    assert soundfile.info(samples / "0_step000024.wav").frames == soundfile.info(samples / "0_original.wav").frames

    process, written = start(*command("killed")), tmp_path / "killed" / "log.jsonl"
    process.until(lambda: written.exists() and "val_clipped_share" in written.read_text())
    process.kill()
    process.end()
    with open(tmp_path / "killed" / "log.jsonl", "a") as f:
        f.write('{"step": 9, "spec')  # in the middle of a line
    assert "resuming" in run(*command("killed", "--resume")).stdout
    assert [x["step"] for x in log("killed")] == [x["step"] for x in log("whole")]
    whole, resumed = (Vocoder.load(f"{tmp_path}/{out}/vocoder.safetensors").state_dict() for out in ("whole", "killed"))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())

    assert "--resume" in refused(*command("whole"))
    assert "finished already" in run(*command("whole", "--resume")).stdout
    assert "width was 32" in refused(*command("whole", "--resume", "--width=64"))
    assert "expected 64 and 1" in refused(*command("x", "--width=64", f"--init={tmp_path}/whole/vocoder.safetensors"))
    # Audio of other recordings is not taken for theirs.
    other = tmp_path / "other"
    other.mkdir()
    for path in (stories / "audio").glob("*.flac"):
        soundfile.write(other / path.name, np.random.default_rng(0).standard_normal(9000) * 0.1, 16_000)
    assert "too little" in refused(*command("y", f"--audio={other}"))
=======
>>>>>>> h-speak
