"""slam/mel.py: spectra, distances and pictures of waves."""
import math
import struct
import zlib

import numpy as np
import torch

from slam.mel import cepstral_distance, log_mel, mel_cepstral_distance, mel_filters, png, spectrogram
from slam.train_vocoder import spectral_loss


def test_spectral_loss_and_distance(voice):
    wave = voice("The dog is sleeping.")
    x, loss = torch.from_numpy(wave)[None], spectral_loss
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
    by_hand = np.log(np.maximum(mel_filters(1024, 80, 16_000, torch.device("cpu")).numpy() @ np.abs(n), 1e-4))
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
