"""slam/hifigan.py: the published layout against transformers' modules of the same architecture."""
import json
import pickle

import numpy as np
import pytest
import torch
from test_vocoder import check_stream

from slam.hifigan import HifiGan
from slam.units import Fingerprint
from slam.vocoder import Vocoder

CONFIG = {"num_embeddings": 500, "embedding_dim": 16, "model_in_dim": 16, "upsample_rates": [5, 4, 4, 4, 2],
          "upsample_kernel_sizes": [11, 8, 8, 8, 4], "upsample_initial_channel": 64, "resblock_kernel_sizes": [3, 7],
          "resblock_dilation_sizes": [[1, 3, 5], [1, 3]], "sampling_rate": 16_000, "code_hop_size": 640,
          "multispkr": None, "f0": None,
          "dur_predictor_params": {"encoder_embed_dim": 16, "var_pred_hidden_dim": 16, "var_pred_kernel_size": 3,
                                   "var_pred_dropout": 0.5}}
VARIANTS = {"durations": {}, "speakers": {"multispkr": "from-code", "num_speakers": 7, "model_in_dim": 32},
            "speakers and styles": {"multispkr": True, "num_speakers": 7, "multistyle": True, "num_styles": 3,
                                    "model_in_dim": 48}}


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
    """Loaded weights give what transformers' modules of the same architecture give, whole and streamed."""
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
    predictor = seamless.SeamlessM4TVariancePredictor(SeamlessM4TConfig(unit_embed_dim=16)).eval()
    predictor.load_state_dict({k.removeprefix("dur_predictor.").replace(".0.", "."): v for k, v in plain.items()
                               if k.startswith("dur_predictor")})
    with torch.inference_mode():
        log = predictor(plain["dict.weight"][units][None])[0]
    expected = (log.exp() - 1).round().clamp(min=1).long().numpy()
    assert (ours.predict_durations(units) == expected).all() and 1 < expected.mean() < 20
    check_stream(ours)


def test_the_hop_is_the_upsampling(tmp_path):
    """`code_hop_size` may be missing, or stale: neither changes what is spoken."""
    name, _ = write_published(tmp_path)
    right = Vocoder.load(name)
    path = tmp_path / "vocoder_config.json"
    config = json.loads(path.read_text())
    for changed in (config | {"code_hop_size": 320}, {k: v for k, v in config.items() if k != "code_hop_size"}):
        path.write_text(json.dumps(changed))
        vocoder = Vocoder.load(name)
        assert (vocoder.hop, vocoder.fingerprint) == (640, right.fingerprint) and right.fingerprint.unit_rate_hz == 25
        np.testing.assert_array_equal(*(v.synthesize([3, 49, 7], [2, 1, 4])[0] for v in (vocoder, right)))


def test_refusals(tmp_path):
    def refuses(match, **kwargs):
        with pytest.raises(SystemExit, match=match):
            Vocoder.load(name, **kwargs)

    name, _ = write_published(tmp_path / "p", **VARIANTS["speakers"])
    refuses("speakers 0 to 6", speaker=7)
    folder = tmp_path / "p"
    config = json.loads((folder / "vocoder_config.json").read_text())
    for change, match in (({"f0": True}, "pitch"), ({"dur_predictor_params": None}, "no duration pred"),
                          ({"num_embeddings": 100}, "not a unit HiFi-GAN"),
                          ({"upsample_rates": None}, "not a unit")):
        (folder / "vocoder_config.json").write_text(json.dumps(config | change))
        refuses(match)
    (folder / "vocoder_config.json").unlink()
    refuses("config.json")
    (folder / "config.json").write_text(json.dumps(config))
    Vocoder.load(name)

    class Bomb:  # no pickle runs code
        def __reduce__(self):
            return open, (str(tmp_path / "was_run"), "w")

    with open(folder / "vocoder.pt", "wb") as f:
        pickle.dump({"generator": Bomb()}, f)
    refuses("not a unit HiFi-GAN")
    torch.save({"generator": Bomb()}, folder / "vocoder.pt")
    refuses("not a unit HiFi-GAN")
    assert not (tmp_path / "was_run").exists()
    (folder / "vocoder.pt").write_bytes(b"")
    refuses("not a unit HiFi-GAN")
