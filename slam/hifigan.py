"""The unit HiFi-GAN that was published with TWIST, for inference.

    python sample.py --prompt hello.wav --checkpoint slprl/slam                    # downloads it
    python sample.py --prompt hello.wav --checkpoint slprl/slam --vocoder NAME.pt
"""
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slam.download import published
from slam.units import Fingerprint, published_fingerprint
from slam.vocoder import Vocoder

# The vocoder of mHuBERT-25hz's 500 units, its config, and their sha256 (textlesslib's list of checkpoints has them).
PUBLISHED = {
    "hifigan_lj_mhubert_base_25hz.pt": "d88224e95c501e2cd59a6e4014753169cfe060fb7ade3cc0da03c809fef73b79",
    "hifigan_lj_mhubert_base_25hz_config.json": "116dc39be4970cd393e562acd0a0ec70a86aaba7e9ca469b8b836cb3fe46afc7"}


class ResBlock(nn.Module):
    """HiFi-GAN's residual block: pairs of a dilated and a plain convolution; (B, C, T) -> (B, C, T)."""

    def __init__(self, width: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding="same") for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding="same") for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class DurationPredictor(nn.Module):
    """FastSpeech 2's variance predictor (Ren et al. 2021) without its dropout: (B, N, D) -> log(frames + 1) (B, N)."""

    def __init__(self, inputs: int, width: int, kernel: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(inputs, width, kernel, padding="same"), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv1d(width, width, kernel, padding="same"), nn.ReLU())
        self.ln1, self.ln2, self.proj = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = norm(conv(x.transpose(1, 2)).transpose(1, 2))
        return self.proj(x)[..., 0]


class HifiGan(Vocoder):
    """The unit HiFi-GAN that came with TWIST (Kong et al. 2020, Polyak et al. 2021, Hassid et al. 2023).

    Parameter names and config fields are those of the published files, with weight norm folded into the weights.
    ValueError for a config that needs more than units, a speaker it does not have, or no duration predictor.
    """

    def __init__(self, config: dict, fingerprint: Fingerprint, speaker: int = 0):
        super().__init__()
        c, width = config, config["upsample_initial_channel"]
        rates, kernels = c["upsample_rates"], c["upsample_kernel_sizes"]
        if c.get("f0") or c.get("f0_quant_num_bin") or c.get("multispkr") and c.get("embedder_params"):
            raise ValueError("it needs a pitch curve or a speaker's embedding, which units do not have")
        if not c.get("dur_predictor_params"):
            raise ValueError("it has no duration predictor")
        self.fingerprint, self.speaker, self.rates = fingerprint, speaker, rates
        self.sample_rate, self.hop = c["sampling_rate"], math.prod(rates)
        self.dict = nn.Embedding(c["num_embeddings"], c["embedding_dim"])
        # Speaker and style (always the first) are concatenated to every frame.
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
        p = c["dur_predictor_params"]
        kernel = p["var_pred_kernel_size"]
        self.dur_predictor = DurationPredictor(p["encoder_embed_dim"], p["var_pred_hidden_dim"], kernel)
        self.duration_context = 2 * (kernel // 2)
        reach, rate = 3.0, 1  # in frames; steps per frame
        for k, r in zip(kernels, rates):
            reach, rate = reach + k / r / rate, rate * r
            reach += max(kernel // 2 * sum(d + 1 for d in dilations) for kernel, dilations in shapes) / rate
        self.context = math.ceil(reach + 3 / rate)

    def waves(self, frames: Tensor) -> Tensor:
        x = self.dict(frames)
        for index, table in ((self.speaker, self.spkr), (0, self.style)):
            if table:
                x = torch.cat([x, table.weight[index].expand(*x.shape[:2], -1)], -1)
        x = self.conv_pre(x.transpose(1, 2))
        n = len(self.resblocks) // len(self.ups)
        for i, (up, rate) in enumerate(zip(self.ups, self.rates)):
            x = up(F.leaky_relu(x, 0.1))[..., :x.shape[2] * rate]  # odd kernels make one more
            x = sum(block(x) for block in self.resblocks[i * n:i * n + n]) / n
        return self.conv_post(F.leaky_relu(x)).tanh()[:, 0].float()  # the last slope is 0.01, as published

    def frame_counts(self, units: Tensor) -> Tensor:
        return (self.dur_predictor(self.dict(units)).float().exp() - 1).round().clamp(min=1).long()

    @classmethod
    def read(cls, name: str, speaker: int = 0) -> "HifiGan":
        """Read `published`, or NAME.pt with NAME_config.json or config.json beside it. SystemExit if it is not one."""
        path = Path(name)
        config_path = path.with_name(f"{path.stem}_config.json")
        if name == "published":
            path, config_path = (published(file, sha256) for file, sha256 in PUBLISHED.items())
        elif not config_path.is_file():
            config_path = path.with_name("config.json")
        try:
            config = json.loads(config_path.read_text())
            rate_hz = config["sampling_rate"] / math.prod(config["upsample_rates"])  # code_hop_size may be stale
            fingerprint = replace(published_fingerprint(config["num_embeddings"] + 2), unit_rate_hz=rate_hz)
            if "fingerprint" in config:  # not in the published files, whose units are mHuBERT's
                fingerprint = Fingerprint(**config["fingerprint"])
            vocoder = cls(config, fingerprint, speaker)
            state = torch.load(path, map_location="cpu", weights_only=True)["generator"]
            for key in [k.removesuffix("_v") for k in state if k.endswith(".weight_v")]:
                v, g = state.pop(f"{key}_v"), state.pop(f"{key}_g")  # weight norm (Salimans & Kingma 2016)
                state[key] = v * (g / v.flatten(1).norm(dim=1).view_as(g))
            vocoder.load_state_dict(state)
        except Exception as e:  # a damaged or foreign file fails in many ways
            raise SystemExit(f"{path}: not a unit HiFi-GAN with {config_path.name} "
                             f"({type(e).__name__}: {str(e).partition(chr(10))[0]})") from None
        return vocoder
