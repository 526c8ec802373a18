"""Mel spectra of waves, to train a vocoder, to measure re-synthesis (`eval.py --resynth_from`), and as pictures."""
import functools
import math
import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slam.audio import SAMPLE_RATE


@functools.cache
def mel_filters(n_fft: int, n_mels: int, sample_rate: int, device: torch.device) -> Tensor:
    """Slaney's triangular mel filters, (n_mels, n_fft // 2 + 1), from 0 Hz to half the sample rate."""
    from transformers.audio_utils import mel_filter_bank
    bank = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney")
    return torch.tensor(bank.T, dtype=torch.float32, device=device)


def magnitudes(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """Waves (..., T) -> magnitudes of the STFT (..., n_fft // 2 + 1, T // hop + 1), Hann window."""
    window = torch.hann_window(n_fft, device=wave.device)
    return torch.stft(wave, n_fft, hop, window=window, return_complex=True).abs()


def log_mel(wave: Tensor, sample_rate: int = SAMPLE_RATE, n_mels: int = 80) -> Tensor:
    """Wave (T,) -> natural log of mel magnitudes (frames, n_mels), one frame every 10 ms."""
    n_fft = 2 ** round(math.log2(sample_rate * 0.064))
    wave = F.pad(wave, (0, max(0, n_fft - len(wave))))
    mel = mel_filters(n_fft, n_mels, sample_rate, wave.device) @ magnitudes(wave, n_fft, sample_rate // 100)
    return mel.clamp(min=1e-4).log().T


def mel_cepstral_distance(a: np.ndarray, b: np.ndarray, sample_rate: int = SAMPLE_RATE) -> float:
    """Mean mel-cepstral distance in dB of two waves (T,) compared frame by frame (Kubichek 1993), without warping.

    The longer wave is truncated. Two stories in the embedded voice are 9.5 dB apart; one shifted by 20 ms, 3.3 dB.
    """
    n = min(len(a), len(b))
    mel_a, mel_b = (log_mel(torch.from_numpy(x[:n]).float(), sample_rate) for x in (a, b))
    return cepstral_distance(mel_a, mel_b).mean().item()


def cepstral_distance(mel_a: Tensor, mel_b: Tensor) -> Tensor:
    """Log-mels (frames, n_mels) -> distance in dB (frames,) of cepstral coefficients 1 to 13; 0, loudness, is left out.

    10 / ln 10 * sqrt(2 * sum of squared differences), with log |H| = c_0 + sum c_m cos(m w): a ripple of 1 is 6.14 dB.
    """
    n_mels = mel_a.shape[1]
    angles = math.pi * torch.arange(1, 14)[:, None] * (torch.arange(n_mels) + 0.5) / n_mels
    return 10 / math.log(10) * math.sqrt(2) * ((mel_a - mel_b) @ (2 / n_mels * angles.cos()).T).norm(dim=1)


def spectrogram(wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Wave (T,) -> log-mel spectrogram (80, frames) uint8, low frequencies at the bottom; 0 to 255 is 80 dB."""
    mel = log_mel(torch.from_numpy(np.asarray(wave, dtype=np.float32)), sample_rate).numpy().T[::-1]
    return (255 * np.clip(1 + (mel - max(0.0, mel.max())) / 9.2, 0, 1)).round().astype(np.uint8)


def png(levels: np.ndarray) -> bytes:
    """Levels (height, width) uint8 -> a PNG file, coloured from black through violet and orange to white."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stops = np.array([[4, 4, 18], [72, 18, 100], [188, 54, 84], [249, 142, 60], [252, 253, 220]])
    palette = np.stack([np.interp(np.arange(256), np.linspace(0, 255, 5), c) for c in stops.T], 1).round()
    rows = np.pad(levels, ((0, 0), (1, 0)))  # each row begins with the number of its filter, 0 for none
    header = struct.pack(">2I5B", *levels.shape[::-1], 8, 3, 0, 0, 0)  # 8 bits a pixel, into a palette
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR", b"PLTE", b"IDAT", b"IEND"), (
        header, palette.astype(np.uint8).tobytes(), zlib.compress(rows.tobytes(), 9), b"")))
