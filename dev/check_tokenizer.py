"""How steady a tokeniser's units are: when a recording is cut, batched, read in windows, or computed in half precision.

    python dev/check_tokenizer.py --tokenizer my_codebook.safetensors --input my_speech
    python dev/check_tokenizer.py --tokenizer my_codebook.safetensors --input my_speech --window_seconds 20 --minutes 30
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import json
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE
from slam.kmeans import draw
from slam.tokenizer import HubertFrames, SpeechTokenizer, assign, windows
from slam.units import dedup


@dataclass
class CheckConfig:
    """Check how many frames keep their unit if a recording is cut, batched, windowed or in half precision."""
    input: str = ""  # folder of audio files, or any other input of prepare_units.py
    tokenizer: str = "embedded"  # codebook file
    minutes: float = 10.0  # audio to check, drawn at random
    dtype: str = "auto"  # of the encoder; compared with float32 if it is another
    window_seconds: float = 0.0  # length of HuBERT's windows; 0: the encoder's own
    hop_seconds: float = 0.0  # distance between windows; 0: 5/6 of window_seconds
    seed: int = 0  # of the draw

    def problems(self) -> list[str]:
        wrong = not 0 <= self.hop_seconds <= self.window_seconds or self.minutes <= 0
        return ["minutes is positive, and 0 <= hop_seconds <= window_seconds"] if wrong else []


def crop_agreement(tokenizer: SpeechTokenizer, waves: list[np.ndarray], rng: np.random.Generator, n: int = 20) -> float:
    """Share of frames that keep their unit when 10 s are cut out of 30 s of the joined waves; `n` random cuts."""
    spf, frames = tokenizer.encoder.samples_per_frame, round(10 * tokenizer.encoder.rate_hz)
    joined, equal = np.concatenate(waves), []
    for start in rng.integers(0, max(1, len(joined) - 30 * SAMPLE_RATE), n):
        whole = joined[start:start + 30 * SAMPLE_RATE]
        offset = int(rng.integers(0, max(1, len(whole) // spf - frames)))
        a, b = tokenizer.label([whole, whole[offset * spf:(offset + frames) * spf]])
        m = min(len(a) - offset, len(b))
        equal.append((a[offset:offset + m] == b[:m]).float().mean().item())
    return float(np.mean(equal))


def check(cfg: CheckConfig) -> None:
    """Print the agreements as one JSON line; HuBERT's windows are also compared with one pass over four minutes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = SpeechTokenizer.load(cfg.tokenizer, device, cfg.dtype).base
    encoder, rng = tokenizer.encoder, np.random.default_rng(cfg.seed)
    if cfg.window_seconds and not isinstance(encoder, HubertFrames):
        raise SystemExit("--window_seconds: Whisper's windows are part of its tokeniser")
    if cfg.window_seconds:
        encoder.window = round(cfg.window_seconds * encoder.rate_hz)
        encoder.hop = round((cfg.hop_seconds or cfg.window_seconds * 5 / 6) * encoder.rate_hz)
    waves = draw(cfg.input, cfg.minutes * 60, 60.0, rng)
    frames = [tokenizer.frames([wave])[0] for wave in tqdm(waves, disable=None, desc="alone")]
    alone = np.concatenate(frames)
    report = {"tokenizer": cfg.tokenizer, "encoder": f"{tokenizer.fingerprint}", "dtype": str(encoder.dtype)[6:],
              "hours": round(sum(map(len, waves)) / SAMPLE_RATE / 3600, 3),
              "units_per_second": encoder.rate_hz * sum(len(dedup(f)[0]) for f in frames) / len(alone),
              "crop_agreement": crop_agreement(tokenizer, waves, rng, max(5, round(2 * cfg.minutes))),
              "batch_agreement": float(np.mean(alone == np.concatenate(tokenizer.frames(waves))))}
    if encoder.dtype != torch.float32:
        exact = SpeechTokenizer.load(cfg.tokenizer, device, "float32").base
        report["float32_agreement"] = float(np.mean(alone == np.concatenate([exact.frames([w])[0] for w in waves])))
    if isinstance(encoder, HubertFrames):  # Whisper cannot hear a long recording in one pass
        whole = np.concatenate(waves)[:240 * SAMPLE_RATE]
        windowed = tokenizer.frames([whole])[0]
        equal = windowed == assign(tokenizer.features([whole])[0], tokenizer.centroids).cpu().numpy()
        kept = [last - first for _, first, last in windows([whole], encoder) if last]
        at_seam = np.zeros(len(windowed), bool)
        for seam in np.cumsum(kept):
            at_seam[max(0, seam - round(encoder.rate_hz)):seam + round(encoder.rate_hz)] = True
        report |= {"window_seconds": encoder.window / encoder.rate_hz, "hop_seconds": encoder.hop / encoder.rate_hz,
                   "seams": len(kept)}
        report |= {"window_agreement_at_seams": float(equal[at_seam].mean()),
                   "window_agreement_elsewhere": float(equal[~at_seam].mean())} if kept else {}
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}))


if __name__ == "__main__":
    check(load_config(CheckConfig, sys.argv[1:], __doc__))
