"""The speech tokeniser: speech -> encoder -> k-means -> dedup (-> BPE) -> units.

    tokenizer = SpeechTokenizer.load("embedded")
    units, durations = tokenizer.encode(wave, 16_000)   # (N,) int64 each; the durations sum to the frames

`prepare_units.py fit` and `convert` make its codebook; prepare_units.py runs it over a corpus.
"""
import hashlib
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from slam.audio import SAMPLE_RATE, check_wave, resample
from slam.device import put
from slam.embedded import resolve
from slam.units import Fingerprint, dedup, find_speaking, write_atomic

EMBEDDED_TOKENIZER = Path(__file__).parent.parent / "assets" / "codebook.safetensors"
# The k-means of mHuBERT-25hz and its sha256 (textlesslib's list of checkpoints has it).
PUBLISHED_KMEANS = ("mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin",
                    "03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad")


# ---------------------------------------------------------------- encoders
class WhisperFrames:
    """Whisper's encoder as a 25 Hz frame extractor: log-mel -> `layer` blocks -> pairs of frames averaged.

    Audio is not padded to 30 s. The windows in which longer audio is read are part of the tokeniser's definition.
    """
    rate_hz, samples_per_frame = 25.0, 640
    window, hop = 750, 500  # frames
    position_dependent = True  # so a codebook holds the mean feature at each position of the window

    def __init__(self, name: str, layer: int, device: torch.device, dtype: torch.dtype):
        from transformers import WhisperFeatureExtractor, WhisperModel
        folder = resolve(name)
        self.encoder = WhisperModel.from_pretrained(folder, dtype=dtype).encoder.eval().to(device)
        filters = WhisperFeatureExtractor.from_pretrained(folder).mel_filters  # (201, 80)
        self.mel_filters = torch.tensor(filters, dtype=torch.float32, device=device)
        self.hann = torch.hann_window(400, device=device)
        self.layer, self.device, self.dtype = layer, device, dtype
        self.dim = self.encoder.config.d_model

    def n_frames(self, n_samples: int) -> int:
        """Number of frames in `n_samples` at 16 kHz."""
        return n_samples // self.samples_per_frame

    def log_mel(self, wave: Tensor) -> Tensor:
        """(T,) at 16 kHz -> Whisper's log-mel (80, T // 160)."""
        power = torch.stft(wave, 400, 160, window=self.hann, return_complex=True)[:, :-1].abs() ** 2
        log = (self.mel_filters.T @ power).clamp(min=1e-10).log10()
        return (torch.maximum(log, log.max() - 8) + 4) / 4

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray]) -> list[Tensor]:
        """Waves (T,) at 16 kHz, none longer than a window -> features (T // 640, dim); padding is masked."""
        mels = [self.log_mel(put(torch.from_numpy(wave[:len(wave) // 640 * 640]), self.device)).T for wave in waves]
        lengths, e = [len(mel) for mel in mels], self.encoder
        x = F.gelu(e.conv1(pad_sequence(mels, batch_first=True).mT.to(self.dtype)))
        x = x * inside(lengths, self.device)[:, None]  # zeros past each wave's end, as conv2 pads a wave alone
        x = F.gelu(e.conv2(x)).transpose(1, 2)
        x = x + e.embed_positions.weight[:x.shape[1]]
        x = run_layers(e.layers[:self.layer], x, [n // 2 for n in lengths], self.device)
        x = (x[:, 0::2] + x[:, 1::2]).float() / 2
        return [row[:n // 4] for row, n in zip(x, lengths)]


class OwnGroupNorm(nn.Module):
    """HuBERT's first normalisation (each channel over time), over each wave's own `lengths` and not its padding."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm, self.lengths = norm, []

    def forward(self, x: Tensor) -> Tensor:
        for row, n in zip(x, self.lengths, strict=True):
            row[:, :n] = self.norm(row[None, :, :n])[0]
        return x


class HubertFrames:
    """HuBERT as a frame extractor: `hidden_states[layer]` of the wave, padded by 40 samples on each side.

    A batch's padding is kept out of attention, first normalisation and positional convolution (before the last,
    mHuBERT-25hz has a batch norm that makes padding nonzero), so features do not depend on the other waves' lengths.
    """
    position_dependent = False  # HuBERT's positions are relative

    def __init__(self, name: str, layer: int, device: torch.device, dtype: torch.dtype):
        from transformers import HubertModel
        self.model = HubertModel.from_pretrained(resolve(name), dtype=dtype).eval().to(device)
        config, first = self.model.config, self.model.feature_extractor.conv_layers[0]
        self.norm = None
        if config.feat_extract_norm == "group":
            self.norm = first.layer_norm = OwnGroupNorm(first.layer_norm)
        if norm := getattr(self.model.encoder.pos_conv_embed, "batch_norm", None):
            norm.register_forward_hook(lambda _, __, x: x * self.inside.mT)
        self.samples_per_frame = math.prod(config.conv_stride)
        self.rate_hz, self.dim = SAMPLE_RATE / self.samples_per_frame, config.hidden_size
        self.window, self.hop = round(60 * self.rate_hz), round(50 * self.rate_hz)
        self.layer, self.device, self.dtype = layer, device, dtype

    def n_frames(self, n_samples: int, n_convolutions: int | None = None) -> int:
        """Number of frames in `n_samples` at 16 kHz, after the first `n_convolutions` or all."""
        n, config = n_samples + 80, self.model.config
        for kernel, stride in list(zip(config.conv_kernel, config.conv_stride))[:n_convolutions]:
            n = (n - kernel) // stride + 1
        return n

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray]) -> list[Tensor]:
        """Waves (T,) at 16 kHz -> features (frames, dim)."""
        lengths, e = [self.n_frames(len(w)) for w in waves], self.model.encoder
        x = F.pad(pad_sequence([torch.from_numpy(w) for w in waves], batch_first=True), (40, 40))
        if self.norm:
            self.norm.lengths = [self.n_frames(len(w), 1) for w in waves]
        x = self.model.feature_extractor(put(x, self.device).to(self.dtype)).transpose(1, 2)
        self.inside = inside(lengths, self.device)[..., None]  # (B, T, 1)
        x = self.model.feature_projection(x) * self.inside
        x = x + e.pos_conv_embed(x)
        if not self.model.config.do_stable_layer_norm:
            x = e.layer_norm(x)
        x = run_layers(e.layers[:self.layer], x, lengths, self.device)
        return [row[:n] for row, n in zip(x.float(), lengths)]


def inside(lengths: list[int], device: torch.device) -> Tensor:
    """bool (B, T), False at padding: inside([1, 3]) -> [[True, False, False], [True, True, True]]"""
    return put(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], device)


def run_layers(layers: Iterable[nn.Module], x: Tensor, lengths: list[int], device: torch.device) -> Tensor:
    """Transformer layers on a padded batch x (B, T, D), with no attention to padding."""
    mask = None
    if min(lengths) < max(lengths):
        mask = torch.where(inside(lengths, device), 0.0, -torch.inf)[:, None, None, :].to(x.dtype)
    for layer in layers:
        x = layer(x, attention_mask=mask)
    return x


def load_encoder(name: str, layer: int, device: str = "cpu", dtype: str = "auto") -> WhisperFrames | HubertFrames:
    """The frame extractor for a Whisper or HuBERT model (hub id, folder, embedded:NAME), chosen by its config.json.

    dtype: auto is float16 on a GPU and float32 on a CPU. SystemExit if there is no such model or layer.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # the stages show bars of their own
    try:
        config = AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as e:
        raise SystemExit(f"{name}: no speech encoder there ({str(e).splitlines()[0]})") from None
    kinds = {"whisper": WhisperFrames, "hubert": HubertFrames}
    if config.model_type not in kinds:
        raise SystemExit(f"{name}: a {config.model_type!r} model; speech encoders here are {' and '.join(kinds)}")
    if not 0 <= layer <= config.num_hidden_layers:
        raise SystemExit(f"{name}: no layer {layer}; it has {config.num_hidden_layers}")
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    if dtype == "float32":
        torch.backends.cudnn.allow_tf32 = False  # TF32 rounds the convolutions to ten bits
    return kinds[config.model_type](name, layer, torch.device(device), getattr(torch, dtype))


def windows(blocks: Iterable[np.ndarray], encoder) -> Iterator[tuple[np.ndarray, int, int | None]]:
    """Cut a stream at 16 kHz into windows (wave, first, last); frames first to last (None: the end) of each are kept.

    Audio longer than `encoder.window` frames gives overlapping windows, `encoder.hop` frames apart, of which the middle
    is kept; the last window ends where the audio does.
    """
    spf, size, hop = encoder.samples_per_frame, encoder.window, encoder.hop
    margin = (size - hop) // 2
    held, start = np.zeros(0, np.float32), 0  # the samples that may still be needed begin at frame `start`
    begin = kept = 0  # where the next window begins; frames kept so far
    for block in blocks:
        held = np.concatenate([held, block])
        while start * spf + len(held) >= (begin + size + 1) * spf:  # more than a window is left
            held, start = held[(begin - start) * spf:], begin
            last = begin + hop + margin
            yield held[:size * spf], kept - begin, last - begin
            begin, kept = begin + hop, last
    if begin:
        begin = start + len(held) // spf - size
    yield held[(begin - start) * spf:], kept - begin, None


def assign(x: Tensor, centroids: Tensor, chunk: int = 1 << 16) -> Tensor:
    """Index (N,) of the nearest centroid (K, D) of each row of x (N, D); -1 for a row that is not finite."""
    half_norm = centroids.square().sum(1) / 2
    nearest = [(half_norm - part @ centroids.T).min(1) for part in x.split(chunk)]
    return torch.cat([torch.where(distance.isfinite(), index, -1) for distance, index in nearest])


# ---------------------------------------------------------------- tokeniser
class Bpe:
    """Pieces of several units: sentencepiece's byte-pair encoding (Sennrich et al. 2016), each unit a character.

    encode([7, 2, 7, 2], [3, 1, 1, 2]) -> [510, 510], [4, 3] if piece 510 is "7 2"
    """
    FIRST = 0x4E00  # unit 0: the first of 20,000 ideographs without a gap, blanks or case

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor
        self.model, self.processor = model, SentencePieceProcessor(model_proto=model)
        self.n_pieces = self.processor.vocab_size() - 1  # all but <unk>
        self.expansions = [[ord(c) - self.FIRST for c in self.processor.id_to_piece(i + 1)]
                           for i in range(self.n_pieces)]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Bpe | None":
        """The BPE in a codebook's tensors, or None."""
        return cls(tensors["bpe"].numpy().tobytes()) if "bpe" in tensors else None

    @classmethod
    def train(cls, utterances: Iterator[np.ndarray], n_units: int, n_pieces: int) -> "Bpe":
        """Fit on utterances of units (T,). SystemExit if they are too few for `n_pieces`."""
        from sentencepiece import SentencePieceTrainer
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                # The first line holds all units, so that none is unknown.
                sentence_iterator=map(cls.to_text, chain([range(n_units)], utterances)), model_writer=model,
                model_type="bpe", vocab_size=n_pieces + 1, character_coverage=1.0,
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False,
                max_sentence_length=1 << 24, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, minloglevel=2)
        except RuntimeError as e:
            raise SystemExit(f"n_pieces={n_pieces}, with the {n_units} units: sentencepiece refuses ({e})") from None
        return cls(model.getvalue())

    @classmethod
    def to_text(cls, units: Iterable[int]) -> str:
        """One character per unit."""
        return "".join(chr(cls.FIRST + int(u)) for u in units)

    def encode(self, units: np.ndarray, durations: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Units (T,) and their durations -> pieces (N,) and theirs; N <= T."""
        pieces = np.array(self.processor.encode(self.to_text(units)), dtype=np.int64) - 1
        ends = np.cumsum([len(self.expansions[p]) for p in pieces])
        return pieces, durations if durations is None else np.add.reduceat(durations, np.append(0, ends[:-1]))

    def decode(self, pieces: Iterable[int]) -> list[int]:
        """Pieces (N,) -> units (T,)."""
        return [unit for p in pieces for unit in self.expansions[p]]


class SpeechTokenizer:
    """Encoder + k-means + dedup (+ BPE), defined by a codebook file (see "codebook files" below)."""

    def __init__(self, encoder, tensors: dict[str, Tensor], meta: dict):
        self.encoder, self.tensors, self.meta = encoder, tensors, meta
        self.fingerprint, self.base_fingerprint = codebook_fingerprints(tensors, meta)
        self.bpe, self.published = Bpe.of(tensors), meta.get("source_sha256") == PUBLISHED_KMEANS[1]
        self.centroids = tensors["centroids"].float().to(encoder.device)
        mean = tensors.get("position_mean")
        self.position_mean = None if mean is None else mean.float().to(encoder.device)
        self.batch_seconds = 30.0 if encoder.device.type == "cpu" else 240.0  # of audio in a batch, by default

    @classmethod
    def load(cls, name: str = "embedded", device: str = "cpu", dtype: str = "auto") -> "SpeechTokenizer":
        """Load a codebook file, or `embedded`. SystemExit if it is no codebook, or does not fit its encoder."""
        tensors, meta = read_codebook(name)
        encoder = load_encoder(meta["encoder"], int(meta["layer"]), device, dtype)
        rate_hz, dim = float(meta["unit_rate_hz"]), tensors["centroids"].shape[1]
        if (rate_hz, dim) != (encoder.rate_hz, encoder.dim):
            raise SystemExit(f"{name}: {rate_hz:g} Hz and {dim} dimensions, but {meta['encoder']} gives "
                             f"{encoder.rate_hz:g} Hz and {encoder.dim}")
        return cls(encoder, tensors, meta)

    @property
    def base(self) -> "SpeechTokenizer":
        """This tokeniser without BPE; vocoders speak its units."""
        return SpeechTokenizer(self.encoder, {k: x for k, x in self.tensors.items() if k != "bpe"}, self.meta)

    def to_units(self, tokens: list[int]) -> list[int]:
        """Units or pieces -> units."""
        return self.bpe.decode(tokens) if self.bpe else tokens

    def features(self, waves: list[np.ndarray]) -> list[Tensor]:
        """Waves (T,) at 16 kHz -> the vectors (frames, dim) that k-means sees: features minus the position mean."""
        mean = self.position_mean
        return [x if mean is None else x - mean[:len(x)] for x in self.encoder(waves)]

    @torch.inference_mode()
    def label(self, waves: list[np.ndarray], batch_seconds: float = 0.0) -> list[Tensor]:
        """Waves (T,) at 16 kHz, none longer than a window -> one unit per frame; similar lengths share a batch."""
        order, labels = sorted(range(len(waves)), key=lambda i: -len(waves[i])), {}
        while order:
            n = max(1, int((batch_seconds or self.batch_seconds) * SAMPLE_RATE / len(waves[order[0]])))
            batch, order = order[:n], order[n:]
            x = self.features([waves[i] for i in batch])
            labels |= zip(batch, assign(torch.cat(x), self.centroids).split([len(rows) for rows in x]))
        return [labels[i] for i in range(len(waves))]

    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves (T,) at 16 kHz, of any length -> one unit per frame, before dedup. ValueError as `check_wave`."""
        for wave in waves:
            check_wave(wave)
        pieces = [list(windows([wave], self.encoder)) for wave in waves]
        labels = iter(self.label([wave for found in pieces for wave, _, _ in found]))
        return [torch.cat([next(labels)[first:last] for _, first, last in found]).cpu().numpy() for found in pieces]

    def finish(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One unit per frame -> (units, durations), or with BPE (pieces, durations). ValueError if one is -1."""
        if frames.min() < 0:
            raise ValueError(f"{self.meta['encoder']} gives features that are not finite in {self.encoder.dtype}")
        units, durations = dedup(frames)
        return self.bpe.encode(units, durations) if self.bpe else (units, durations)

    def encode_batch(self, waves: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Waves (T,) at 16 kHz -> (units, durations) of each, whatever else is in the batch."""
        return [self.finish(frames) for frames in self.frames(waves)]

    def encode(self, wave: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Mono float wave (T,) -> units (N,), durations (N,) in frames. ValueError if it is silent, NaN or too short.

        encode(two seconds of speech, 16_000) -> [413, 77, 20, …], [2, 1, 1, …] with durations summing to 50
        """
        return self.encode_batch([resample(np.asarray(wave, dtype=np.float32), sample_rate, SAMPLE_RATE)])[0]


# ---------------------------------------------------------------- codebook files
# A safetensors file: centroids (n_units, dim), position_mean (window, dim) if the encoder's features depend on the
# position in the window, bpe (bytes of a sentencepiece model) if there is BPE. Metadata: encoder, layer, unit_rate_hz.
def read_codebook(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a codebook file, or of `embedded`. SystemExit if it is missing or not a codebook."""
    path = EMBEDDED_TOKENIZER if name == "embedded" else Path(name)
    if not path.is_file():
        raise SystemExit(f"{path}: no such codebook; `python prepare_units.py fit` makes one, `convert` another")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()} if "encoder" in meta else {}  # not a model's weights
        codebook_fingerprints(tensors, meta)
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as e:  # RuntimeError: sentencepiece
        raise SystemExit(f"{path}: not a codebook ({e}); `python prepare_units.py fit` makes one") from None
    return tensors, meta


def write_codebook(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write a codebook file."""
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    write_atomic(path, save(tensors, {k: str(v) for k, v in meta.items()}))


def find_codebook(fingerprint: Fingerprint, folder: str = "out") -> str:
    """The codebook whose tokeniser has this fingerprint: `embedded`, or a file below a folder. SystemExit if none."""
    def read(path: Path) -> Fingerprint:
        tensors, meta = read_codebook(str(path))
        found, _ = codebook_fingerprints(tensors, meta)
        # SlamKit's checkpoints record no codebook; theirs is the published one.
        theirs = not fingerprint.codebook_sha256 and meta.get("source_sha256") == PUBLISHED_KMEANS[1]
        return replace(found, codebook_sha256="") if theirs else found

    found = find_speaking(fingerprint, EMBEDDED_TOKENIZER, folder, read)
    if not found:
        raise SystemExit(f"no codebook below {folder}/ is of {fingerprint}; name it with --tokenizer"
                         + ", or fetch it: python prepare_units.py convert" * fingerprint.encoder.startswith("slprl/"))
    return found


def codebook_fingerprints(tensors: dict[str, Tensor], meta: dict) -> tuple[Fingerprint, Fingerprint]:
    """Fingerprints of a codebook's tokeniser and of its units; they differ only if there is BPE.

    The sha256 is of the tensors and not of the file, as libraries may write the same header in different ways.
    """
    def fingerprint(names: set[str], n: int) -> Fingerprint:
        sha = hashlib.sha256()
        for name in sorted(names):
            x = tensors[name].cpu().contiguous().numpy()
            sha.update(f"{name} {x.dtype} {x.shape}\n".encode() + x.tobytes())
        return Fingerprint(meta["encoder"], int(meta["layer"]), float(meta["unit_rate_hz"]), n, "bpe" not in names,
                           sha.hexdigest())

    base, bpe = fingerprint(tensors.keys() & {"centroids", "position_mean"}, len(tensors["centroids"])), Bpe.of(tensors)
    return fingerprint(tensors.keys(), bpe.n_pieces) if bpe else base, base
