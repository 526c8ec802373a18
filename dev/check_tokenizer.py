"""How steady a tokeniser's units are: python dev/check_tokenizer.py --tokenizer my_codebook.safetensors --input my_speech."""
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
from slam.kmeans import crop_agreement, draw
from slam.tokenizer import HubertFrames, SpeechTokenizer, assign, windows
from slam.units import dedup


@dataclass
class CheckConfig:
    """How steady a tokeniser's units are: when a recording is cut, batched, windowed, or computed in half precision."""
    input: str = ""  # folder of audio files, or any other input of prepare_units.py
    tokenizer: str = "embedded"  # codebook file
    minutes: float = 10.0  # audio to look at, drawn at random
    dtype: str = "auto"  # of the encoder, compared with float32 where it is another
    window_seconds: float = 0.0  # try windows of this length in place of the encoder's own,
    hop_seconds: float = 0.0  # and this far apart
    seed: int = 0  # of the draw

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        wrong = not 0 <= self.hop_seconds <= self.window_seconds or self.minutes <= 0
        return ["minutes is positive, and 0 <= hop_seconds <= window_seconds"] if wrong else []


def check(cfg: CheckConfig) -> None:
    """Print, as one JSON line, the shares of frames that keep their unit whatever is done to the recording."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = SpeechTokenizer.load(cfg.tokenizer, device, cfg.dtype).base
    encoder, rng = tokenizer.encoder, np.random.default_rng(cfg.seed)
    if cfg.window_seconds and not isinstance(encoder, HubertFrames):
        raise SystemExit("--window_seconds: Whisper's windows are part of its tokeniser")
    if cfg.window_seconds:
        encoder.window = round(cfg.window_seconds * encoder.rate_hz)
        encoder.hop = round((cfg.hop_seconds or cfg.window_seconds * 5 / 6) * encoder.rate_hz)
    waves = draw(cfg.input, cfg.minutes * 60, 60.0, rng)
    alone = [tokenizer.frames([wave])[0] for wave in tqdm(waves, disable=None, desc="alone")]
    report = {"tokenizer": cfg.tokenizer, "encoder": f"{tokenizer.fingerprint}", "dtype": str(encoder.dtype)[6:],
              "hours": round(sum(map(len, waves)) / SAMPLE_RATE / 3600, 3),
              "units_per_second": encoder.rate_hz * sum(len(dedup(f)[0]) for f in alone) / sum(map(len, alone)),
              "crop_agreement": crop_agreement(tokenizer, waves, rng, max(5, round(2 * cfg.minutes))),
              "batch_agreement": float(np.mean(np.concatenate(alone) == np.concatenate(tokenizer.frames(waves))))}
    if encoder.dtype != torch.float32:
        exact = SpeechTokenizer.load(cfg.tokenizer, device, "float32").base
        report["float32_agreement"] = float(np.mean(np.concatenate(alone) == np.concatenate(
            [exact.frames([wave])[0] for wave in waves])))
    if isinstance(encoder, HubertFrames):  # it can read a recording whole
        whole = np.concatenate(waves)[:round(240 * SAMPLE_RATE)]
        read = tokenizer.frames([whole])[0]
        kept = [last - first for _, first, last in windows([whole], encoder) if last]
        at_seam = np.zeros(len(read), bool)
        for seam in np.cumsum(kept):
            at_seam[max(0, seam - round(encoder.rate_hz)):seam + round(encoder.rate_hz)] = True
        equal = read == assign(tokenizer.features([whole])[0], tokenizer.centroids).cpu().numpy()
        report |= {"window_seconds": encoder.window / encoder.rate_hz, "hop_seconds": encoder.hop / encoder.rate_hz,
                   "seams": len(kept)}
        report |= {"window_agreement_at_seams": float(equal[at_seam].mean()),
                   "window_agreement_elsewhere": float(equal[~at_seam].mean())} if kept else {}
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}))


if __name__ == "__main__":
    check(load_config(CheckConfig, sys.argv[1:], __doc__))
