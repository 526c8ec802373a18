"""Units to speech: our own vocoder and its training, and the published unit HiFi-GAN.

In:  unit files with durations (prepare_units.py --durations) and the audio they came from.
Out: a run folder: vocoder.safetensors, which carries the fingerprint of the units that it speaks, log.jsonl, and
     samples/ to listen to and to look at.

    python -m slam.train_vocoder config/vocoder_embedded.py     # 45 minutes on two CPU cores for assets/'s
    python -m slam.train_vocoder config/vocoder_gpu.py --units out/my_units --audio my_speech --out out/my_vocoder

Ours is of the Vocos kind (Siuzdak 2023): ConvNeXt blocks that end in magnitudes and phases, 100 frames a second, and an
inverse STFT. Nothing is computed at the sample rate, so it speaks many times faster than real time on a laptop; and as
the inverse STFT knows what a wave is, spectral losses alone teach it to be understood, where there is no GPU for
discriminators.
"""
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from slam.audio import SAMPLE_RATE
from slam.embedded import TWIST_URL, check_sha256, download
from slam.units import Fingerprint, find_speaking, published_fingerprint, require_same, same_units

EMBEDDED_VOCODER = Path(__file__).parent.parent / "assets" / "vocoder.safetensors"


# The vocoder of mHuBERT-25hz's 500 units and its config; of their sha256 the first and last digits are known.
PUBLISHED = {"hifigan_lj_mhubert_base_25hz.pt": ("d88224e9", "3b79"),
             "hifigan_lj_mhubert_base_25hz_config.json": ("116dc39b", "6afc7")}


# ---------------------------------------------------------------- what speaks units
def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (T,) int64 -> (B, T) with zeros behind them, and the mask (B, T) of what is theirs."""
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


class Vocoder(nn.Module):
    """What speaks units: `Vocoder.load("embedded").synthesize([413, 77, 20]) -> (wave, 16000)`.

    A kind of vocoder (`Vocos`, `HifiGan`) has these fields and the first two methods; the rest follows.
    """
    fingerprint: Fingerprint  # of the units
    sample_rate: int
    hop: int  # samples of a frame, that is of one unit of duration 1
    context: int  # how many frames away a frame can still be heard
    duration_context: int  # how many units away a unit can still change a predicted duration

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Units per frame (B, T) int64, mask (B, T) bool (None: all are) -> waves (B, T * hop), float32."""
        raise NotImplementedError

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        """Units (B, N) int64, mask (B, N) bool (None: all are) -> predicted frames of each (B, N) int64, at least 1."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check(self, units: Iterable[int]) -> Tensor:
        """Units as a tensor (N,) on the device. ValueError if there are none, or some are out of range."""
        units = np.asarray(units, dtype=np.int64)
        if not len(units) or units.min() < 0 or units.max() >= self.fingerprint.n_units:
            raise ValueError(f"units must be a non-empty list of numbers from 0 to {self.fingerprint.n_units - 1}")
        return torch.from_numpy(units).to(self.device)

    @torch.inference_mode()
    def predict_durations(self, units: list[int]) -> np.ndarray:
        """Units (N,) -> frames of each (N,), at least 1."""
        return self.frame_counts(self.check(units)[None], None)[0].cpu().numpy()

    @torch.inference_mode()
    def synthesize_batch(self, batch: list[list[int]], durations: list | None = None) -> list[np.ndarray]:
        """Several times units (N,), and durations (N,) in frames (None: predicted) -> waves (T,) float32 in [-1, 1].

        Each wave is what it would be by itself, of sum(durations) * hop samples. ValueError as in `check`.
        """
        rows = [self.check(units) for units in batch]
        if durations is None:
            units, mask = pad(rows)
            counts = [c[:len(row)] for c, row in zip(self.frame_counts(units, None if mask.all() else mask), rows)]
        else:
            counts = [torch.as_tensor(np.asarray(d, dtype=np.int64)).to(self.device) for d in durations]
        frames, mask = pad([row.repeat_interleave(c) for row, c in zip(rows, counts)])
        waves = self.waves(frames, None if mask.all() else mask).clamp(-1, 1).cpu().numpy()
        return [wave[:n * self.hop] for wave, n in zip(waves, mask.sum(1).tolist())]

    def synthesize(self, units: list[int], durations: list[int] | None = None) -> tuple[np.ndarray, int]:
        """Units (N,), durations (N,) in frames (None: predicted) -> wave (T,) float32 in [-1, 1], sample rate."""
        return self.synthesize_batch([units], None if durations is None else [durations])[0], self.sample_rate

    @torch.inference_mode()
    def stream(self, parts: Iterable[list[int]]) -> Iterator[np.ndarray]:
        """Units, a part at a time -> pieces of the wave that `synthesize` makes of all, each as soon as it is settled.

        A piece comes when the units after it, `context` frames and `duration_context` units, are there.
        """
        units, counts, said = [], torch.zeros(0, dtype=torch.int64, device=self.device), 0
        for part in chain(parts, [None]):  # None: there is no more to come
            units += [] if part is None else list(part)
            if not units:
                continue
            row = self.check(units)
            start = max(0, len(counts) - self.duration_context)
            fresh = self.frame_counts(row[None, start:], None)[0]
            settled = len(units) - (0 if part is None else self.duration_context)
            counts = torch.cat([counts, fresh[len(counts) - start:max(0, settled - start)]])
            frames = row[:len(counts)].repeat_interleave(counts)
            ready = len(frames) - (0 if part is None else self.context)
            if ready > said:
                first = max(0, said - self.context)
                wave = self.waves(frames[None, first:], None)[0, (said - first) * self.hop:(ready - first) * self.hop]
                yield wave.clamp(-1, 1).cpu().numpy()
                said = ready

    @classmethod
    def load(cls, name: str = "embedded", speaker: int = 0) -> "Vocoder":
        """Load `embedded`, `published`, a .safetensors of ours, or a unit HiFi-GAN (.pt with its config beside it).

        speaker: of a HiFi-GAN with several. `published` is fetched into the cache. SystemExit if it is missing, altered
        or not a vocoder.
        """
        if name == "published":
            path, _ = (download(TWIST_URL + file, *sha256) for file, sha256 in PUBLISHED.items())
        else:
            path = EMBEDDED_VOCODER if name == "embedded" else Path(name)
        if not path.is_file():
            raise SystemExit(f"{path}: no such vocoder; `python -m slam.train_vocoder` makes one")
        vocoder = HifiGan.read(path, speaker) if path.suffix == ".pt" else Vocos.read(path)
        return vocoder.eval()


def find_vocoder(fingerprint: Fingerprint, published: bool = False, folder: str = "out") -> str:
    """The vocoder of these units: `embedded`, a file below a folder, or `published`. SystemExit if there is none.

    published: the units are known to be of the published codebook.
    """
    def read(path: Path) -> Fingerprint:
        with safe_open(path, "pt") as f:
            return Fingerprint.of(json.loads(f.metadata()["fingerprint"]))

    found = find_speaking(fingerprint, EMBEDDED_VOCODER, folder, "duration_units.weight", read)
    known = published or not fingerprint.codebook_sha256
    if not found and known and same_units(fingerprint, published_fingerprint(502)):
        return "published"
    if not found:
        raise SystemExit(f"no vocoder below {folder}/ speaks {fingerprint}; `python -m slam.train_vocoder` makes one, and "
                         f"--vocoder names one that is elsewhere")
    return found


def vocoder_for(tokenizer, name: str, speaker: int = 0, durations: bool = False) -> tuple[Vocoder, str]:
    """A vocoder for a SpeechTokenizer's units, on its device, and the vocoder's name; an empty `name`: one is found.

    durations: they will be known, so that it need not predict any. SystemExit if it does not fit.
    """
    fingerprint = tokenizer.base_fingerprint
    name = name or find_vocoder(fingerprint, tokenizer.published)
    vocoder = Vocoder.load(name, speaker).to(tokenizer.encoder.device)
    require_same(fingerprint, "tokenizer", vocoder.fingerprint, f"vocoder {name}")
    try:
        durations or vocoder.predict_durations([0])
    except ValueError as e:
        raise SystemExit(f"{name}: {e}") from None
    return vocoder, name


# ---------------------------------------------------------------- ours
HOP, N_FFT = 160, 640  # 100 frames a second, four of which overlap


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class Block(nn.Module):
    """ConvNeXt block over time (Liu et al. 2022): depthwise convolution, norm, MLP, residual; (B, T, C), masked."""
    REACH = 3  # frames to either side

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 2 * self.REACH + 1, padding=self.REACH, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.conv(masked(x, mask).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(y))))


class Vocos(Vocoder):
    """Units -> magnitudes and phases -> inverse STFT; a duration predictor beside it."""
    sample_rate = SAMPLE_RATE

    def __init__(self, fingerprint: Fingerprint, width: int = 256, blocks: int = 5):
        super().__init__()
        self.fingerprint, self.width, self.blocks = fingerprint, width, blocks
        self.hop = round(SAMPLE_RATE / fingerprint.unit_rate_hz)
        self.upsampling = self.hop // HOP
        if self.hop % HOP:
            raise ValueError(f"units at {fingerprint.unit_rate_hz:g} Hz; {SAMPLE_RATE // HOP} must be a multiple of it")
        self.units = nn.Embedding(fingerprint.n_units, width)
        self.low = nn.ModuleList(Block(width) for _ in range(blocks))
        self.spread = nn.Linear(width, self.upsampling * width)
        self.high = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, N_FFT + 2))
        self.duration_units = nn.Embedding(fingerprint.n_units, width)
        self.duration_blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.duration = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.register_buffer("window", torch.hann_window(N_FFT) / 2, persistent=False)  # four of them add up to one
        self.context = blocks * Block.REACH + -(-(blocks * Block.REACH + N_FFT // HOP) // self.upsampling)
        self.duration_context = 2 * Block.REACH

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        mask, x = mask if mask is None else mask[..., None], self.units(frames)
        for block in self.low:
            x = block(x, mask)
        x = self.spread(x).unflatten(-1, (self.upsampling, self.width)).flatten(1, 2)
        mask = mask if mask is None else mask.repeat_interleave(self.upsampling, 1)
        for block in self.high:
            x = block(x, mask)
        magnitude, phase = self.head(x).float().chunk(2, -1)
        magnitude = magnitude.clamp(max=7.0).exp()
        return self.inverse_stft(torch.polar(magnitude if mask is None else magnitude * mask, phase))

    def inverse_stft(self, spectrum: Tensor) -> Tensor:
        """(B, T, N_FFT // 2 + 1) complex -> (B, T * HOP): windowed frames, each about its own HOP samples, added up.

        torch.istft divides by the sum of the windows that are there, so that its edges depend on the padding.
        """
        B, T, _ = spectrum.shape
        parts = (torch.fft.irfft(spectrum, N_FFT) * self.window).unflatten(-1, (N_FFT // HOP, HOP))
        wave = parts.new_zeros(B, T + N_FFT // HOP - 1, HOP)
        for i in range(N_FFT // HOP):
            wave[:, i:i + T] += parts[:, :, i]
        before = (N_FFT - HOP) // 2
        return wave.flatten(1)[:, before:before + T * HOP]

    def log_durations(self, units: Tensor, mask: Tensor | None) -> Tensor:
        """Units (B, N), mask (B, N) -> log frames of each (B, N)."""
        x = self.duration_units(units)
        for block in self.duration_blocks:
            x = block(x, mask if mask is None else mask[..., None])
        return self.duration(x)[..., 0]

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        return self.log_durations(units, mask).float().exp().round().clamp(min=1).long()

    @classmethod
    def read(cls, path: Path) -> "Vocos":
        """From a file that `save` wrote. SystemExit if it is none."""
        try:
            with safe_open(path, "pt") as f:
                meta = {k: json.loads(v) for k, v in f.metadata().items()}
                state = {k: f.get_tensor(k).float() for k in f.keys()}
            vocoder = cls(Fingerprint.of(meta["fingerprint"]), meta["width"], meta["blocks"])
            vocoder.load_state_dict(state)
        except Exception as e:  # a file can be wrong in many ways
            raise SystemExit(f"{path}: not a vocoder file ({str(e).splitlines()[0]})") from None
        return vocoder

    def save(self, path: Path, **report) -> None:
        """Write weights (fp16), shape, fingerprint and `report` as one safetensors file."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        meta = {"fingerprint": self.fingerprint.to_dict(), "width": self.width, "blocks": self.blocks} | report
        path.with_suffix(".part").write_bytes(save(state, {k: json.dumps(v) for k, v in meta.items()}))
        os.replace(path.with_suffix(".part"), path)


# ---------------------------------------------------------------- the published one
def fold_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """weight_g, weight_v -> weight = g v / |v|, a norm per entry of the first dimension (Salimans & Kingma 2016)."""
    folded = {k: v for k, v in state.items() if not k.endswith((".weight_g", ".weight_v"))}
    for name in (k.removesuffix("_v") for k in state if k.endswith(".weight_v")):
        g, v = state[f"{name}_g"].float(), state[f"{name}_v"].float()
        folded[name] = v * (g / v.flatten(1).norm(dim=1).view_as(g))
    return folded


class ResBlock(nn.Module):
    """HiFi-GAN's residual block: pairs of a dilated and a plain convolution; (B, C, T)."""

    def __init__(self, width: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=(kernel - 1) * d // 2)
                                    for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for first, second in zip(self.convs1, self.convs2):
            y = masked(first(F.leaky_relu(x, 0.1)), mask)
            x = x + masked(second(F.leaky_relu(y, 0.1)), mask)
        return x


class DurationPredictor(nn.Module):
    """FastSpeech 2's variance predictor, without its dropout: (B, N, D) -> log(frames + 1), (B, N)."""

    def __init__(self, encoder_embed_dim: int, var_pred_hidden_dim: int, var_pred_kernel_size: int, **_):
        super().__init__()
        width, kernel = var_pred_hidden_dim, var_pred_kernel_size
        self.conv1 = nn.Sequential(nn.Conv1d(encoder_embed_dim, width, kernel, padding=(kernel - 1) // 2), nn.ReLU())
        self.ln1 = nn.LayerNorm(width)
        self.conv2 = nn.Sequential(nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2), nn.ReLU())
        self.ln2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = norm(conv(masked(x, mask).transpose(1, 2)).transpose(1, 2))
        return self.proj(x)[..., 0]


class HifiGan(Vocoder):
    """The unit HiFi-GAN that came with TWIST, for inference (Kong et al. 2020, Polyak et al. 2021, Hassid et al. 2023).

    Names and config fields are those of the published files, whose weight norm is folded into the weights.
    """

    def __init__(self, config: dict, fingerprint: Fingerprint, speaker: int = 0):
        super().__init__()
        c, width = config, config["upsample_initial_channel"]
        rates, kernels = c["upsample_rates"], c["upsample_kernel_sizes"]
        if c.get("f0") or c.get("f0_quant_num_bin") or c.get("multispkr") and c.get("embedder_params"):
            raise ValueError("it wants a pitch curve or a speaker's embedding, which units do not have")
        self.fingerprint, self.speaker, self.rates = fingerprint, speaker, rates
        self.sample_rate, self.hop = c["sampling_rate"], math.prod(rates)
        self.dict = nn.Embedding(c["num_embeddings"], c["embedding_dim"])
        # Further embeddings, each beside every frame: which speaker, and which style, the first.
        self.spkr = nn.Embedding(c.get("num_speakers") or 200, c["embedding_dim"]) if c.get("multispkr") else None
        self.style = nn.Embedding(c.get("num_styles") or 100, c["embedding_dim"]) if c.get("multistyle") else None
        if self.spkr and not 0 <= speaker < self.spkr.num_embeddings:
            raise ValueError(f"speaker {speaker}; it has speakers 0 to {self.spkr.num_embeddings - 1}")
        self.conv_pre = nn.Conv1d(c["model_in_dim"], width, 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(width >> i, width >> i + 1, k, r, padding=(k - r) // 2)
                                 for i, (k, r) in enumerate(zip(kernels, rates)))
        shapes = list(zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"]))
        self.resblocks = nn.ModuleList(ResBlock(width >> i + 1, *shape) for i in range(len(rates)) for shape in shapes)
        self.conv_post = nn.Conv1d(width >> len(rates), 1, 7, padding=3)
        predictor = c.get("dur_predictor_params")
        self.dur_predictor = DurationPredictor(**predictor) if predictor else None
        self.duration_context = 2 * (predictor["var_pred_kernel_size"] // 2) if predictor else 0
        reach, rate = 3.0, 1  # in frames; steps per frame
        for k, r in zip(kernels, rates):
            reach, rate = reach + k / r / rate, rate * r
            reach += max(kernel // 2 * sum(d + 1 for d in dilations) for kernel, dilations in shapes) / rate
        self.context = math.ceil(reach + 3 / rate)

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        mask, x = mask if mask is None else mask[:, None], self.dict(frames)
        for index, table in ((self.speaker, self.spkr), (0, self.style)):
            if table:
                x = torch.cat([x, table.weight[index].expand(*x.shape[:2], -1)], -1)
        x = masked(self.conv_pre(masked(x.transpose(1, 2), mask)), mask)
        n = len(self.resblocks) // len(self.ups)
        for i, (up, rate) in enumerate(zip(self.ups, self.rates)):
            mask, n_steps = mask if mask is None else mask.repeat_interleave(rate, 2), x.shape[2] * rate
            x = masked(up(F.leaky_relu(x, 0.1))[..., :n_steps], mask)  # a kernel may make it one longer
            x = sum(block(x, mask) for block in self.resblocks[i * n:i * n + n]) / n
        return self.conv_post(F.leaky_relu(x)).tanh()[:, 0].float()  # the last slope is 0.01, as published

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        if not self.dur_predictor:
            raise ValueError("this vocoder has no duration predictor; give the durations")
        log = self.dur_predictor(self.dict(units), mask if mask is None else mask[..., None])
        return (log.float().exp() - 1).round().clamp(min=1).long()

    @classmethod
    def read(cls, path: Path, speaker: int = 0) -> "HifiGan":
        """From NAME.pt and NAME_config.json, or config.json, beside it. SystemExit if these are not whole."""
        beside = [path.with_name(f"{path.stem}_config.json"), path.with_name("config.json")]
        config_path = next((p for p in beside if p.is_file()), None)
        if not config_path:
            raise SystemExit(f"{path}: no {beside[0].name} or config.json beside it")
        for p in (path, config_path):
            if p.name in PUBLISHED:
                check_sha256(p, *PUBLISHED[p.name])
        try:
            config = json.loads(config_path.read_text())
            # `code_hop_size` may be missing or stale: nothing that speaks with these files needs it.
            hop = math.prod(config["upsample_rates"])
            if config.get("code_hop_size", hop) != hop:
                print(f"{config_path}: code_hop_size is {config['code_hop_size']}, but upsample_rates make frames of "
                      f"{hop} samples; {hop} is used", file=sys.stderr)
            # Whose units it speaks its files do not say; "fingerprint" in the config is for those who do.
            fingerprint = Fingerprint.of(config["fingerprint"]) if "fingerprint" in config else replace(
                published_fingerprint(config["num_embeddings"] + 2),
                unit_rate_hz=config["sampling_rate"] / hop)
            vocoder = cls(config, fingerprint, speaker)
            state = torch.load(path, map_location="cpu", weights_only=True)["generator"]
            vocoder.load_state_dict(fold_weight_norm(state))
        except Exception as e:  # a pickle can be damaged in many ways
            raise SystemExit(f"{path}: not a unit HiFi-GAN with {config_path.name} "
                             f"({type(e).__name__}: {str(e).splitlines()[0]})") from None
        return vocoder
