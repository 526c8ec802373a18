"""Align words with units, to train on speech and text in one stream (slam/interleave.py).

In:  unit files with durations (prepare_units.py --durations), the audio that they came from, a text LM's tokenizer.
Out: unit files that also hold each utterance's text tokens and, for each word, its first text token and first unit.

    python -m slam.alignment config/align_demo.py
    python -m slam.alignment --units out/my_units --audio my_speech --out out/my_words --text_lm Qwen/Qwen2.5-0.5B

An utterance's text is the one in its unit file, else its transcript beside the audio (LibriSpeech's .trans.txt, or a
.txt of its name), else what Whisper hears. A killed run continues when it is started again.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE, load_audio
from slam.interleave import TextTokenizer
from slam.speech import load_asr, transcribe
from slam.units import UnitReader, UnitWriter

FRAMES_PER_SECOND = 50  # of Whisper's encoder
WINDOW_SECONDS = 30  # that Whisper hears
MAX_TOKENS = 440  # of text that its decoder reads


@dataclass
class Config:
    """Find the words of spoken utterances in their units."""
    units: str = ""  # unit files with durations
    audio: str = ""  # folder that the units' ids are relative to
    out: str = "out/words"  # folder to write; an interrupted run resumes in it
    text_lm: str = "Qwen/Qwen2.5-0.5B"  # its tokenizer makes the text tokens: hub id, folder or embedded:NAME
    asr: str = "embedded:whisper-tiny.en"  # Whisper that aligns, and transcribes where there is no text
    suffix: str = ""  # of the audio files, where the ids have none: .flac for the stories of synth_stories.py
    batch: int = 8  # utterances aligned together
    max_skipped: float = 0.05  # share of utterances that may have no alignment; more stop the run with an error

    def problems(self) -> list[str]:
        found = [f"{name}: name a folder" for name in ("units", "audio") if not getattr(self, name)]
        return found + ["batch: at least 1"] * (self.batch < 1)


# ---------------------------------------------------------------- word times
def monotone_path(cost: np.ndarray) -> np.ndarray:
    """Dynamic time warping: the first frame (N,) of each token, on the cheapest monotone path through cost (N, T).

    The path begins at (0, 0), ends at (N - 1, T - 1), and steps by one token, one frame, or both.
    monotone_path([[0, 0, 1, 1], [1, 1, 0, 0]]) -> [0, 2]
    """
    N, T = cost.shape
    total = np.empty((N, T))
    total[0] = cost[0].cumsum()
    for i in range(1, N):
        # total[j] = cost[j] + min(above[j - 1], above[j], total[j - 1]), the last by a running minimum
        above = np.minimum(total[i - 1], np.concatenate([[np.inf], total[i - 1, :-1]]))
        summed = cost[i].cumsum()
        total[i] = summed + np.minimum.accumulate(above - np.concatenate([[0], summed[:-1]]))
    first, i, j = np.zeros(N, dtype=np.int64), N - 1, T - 1
    while i > 0:
        both = total[i - 1, j - 1] if j else np.inf
        left = total[i, j - 1] if j else np.inf
        best = min(both, left, total[i - 1, j])
        if best == left:
            j -= 1
            continue
        first[i] = j
        i, j = i - 1, j - (best == both)
    return first


@torch.inference_mode()
def word_times(waves: list[np.ndarray], texts: list[str], asr: str) -> list[list[float]]:
    """Where each word of the texts (split at spaces) begins, in seconds, in waves (T,) of at most 30 s at 16 kHz.

    Whisper's decoder reads the known text; the cross-attention heads that follow the audio show which frames each token
    attends to, and dynamic time warping turns this into a path (as in openai/whisper, timing.py).
    word_times([wave of "Hi there."], ["Hi there."], "embedded:whisper-tiny.en") -> [[0.0, 0.38]]
    """
    model, extractor, tokenizer = load_asr(asr)
    config = model.generation_config
    if not getattr(config, "alignment_heads", None):
        raise SystemExit(f"{asr}: does not say which heads follow the audio (alignment_heads); take one of OpenAI's")
    task = [config.lang_to_id["<|en|>"], config.task_to_id["transcribe"]] if config.is_multilingual else []
    start = [config.decoder_start_token_id, *task, config.no_timestamps_token_id]  # read before a text
    words = [whisper_words(text, asr) for text in texts]
    rows = [[*start, *(t for word in row for t in word), tokenizer.eos_token_id] for row in words]
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.eos_token_id)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    x = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features.to(model.device)
    encoded = model.model.encoder(x)  # separately: with fast attention, whose 1500 x 1500 weights a head are not kept
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the other implementations do not return their attention
    attention = model(encoder_outputs=encoded, decoder_input_ids=tokens.to(model.device),
                      output_attentions=True).cross_attentions
    model.set_attn_implementation(fast)
    attention = torch.stack([attention[i][:, j] for i, j in config.alignment_heads], 1).float()  # (B, heads, N, frames)
    found = []
    for b, (wave, row) in enumerate(zip(waves, words)):
        n_frames = min(attention.shape[-1], -(-len(wave) * FRAMES_PER_SECOND // SAMPLE_RATE))
        # Row i attends while it predicts token i + 1, so we take the rows from the last of `start` to the text's last.
        first = monotone_path(token_costs(attention[b, :, len(start) - 1:len(rows[b]) - 1, :n_frames]).cpu().numpy())
        begins = np.cumsum([0, *map(len, row[:-1])]) if row else []
        found.append([float(first[i]) / FRAMES_PER_SECOND for i in begins])
    return found


def whisper_words(text: str, asr: str) -> list[list[int]]:
    """Whisper's tokens of each word of a text."""
    return [load_asr(asr)[2](f" {word}", add_special_tokens=False).input_ids for word in text.split()]


def token_costs(attention: Tensor) -> Tensor:
    """Attention (heads, N, T) of tokens to frames -> costs (N, T) for `monotone_path`, low where attention is high."""
    attention = attention / attention.sum(-1, keepdim=True)  # over the frames that hold speech
    deviation, mean = torch.std_mean(attention, dim=-2, keepdim=True, unbiased=False)
    normal = (attention - mean) / (deviation + 1e-9)
    if normal.shape[-1] > 3:  # the median of 7 frames, 140 ms
        normal = F.pad(normal, (3, 3), mode="reflect").unfold(-1, 7, 1).median(-1).values
    return -normal.mean(0)


# ---------------------------------------------------------------- a corpus
def transcript(audio: Path, id: str) -> str | None:
    """The text beside a recording: its line in LibriSpeech's .trans.txt, or the .txt file of its name."""
    path = audio / id
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8").strip()
    for listed in path.parent.glob("*.trans.txt"):
        for line in listed.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            if name == path.stem:
                return text.strip().lower()
    return None


def first_units(times: list[float], durations: np.ndarray, rate: float) -> np.ndarray:
    """The unit that begins nearest to each time (s), in order; 0 for the first. durations: (T,) in frames at `rate`.

    first_units([0.1, 0.5], [5, 5, 5], 25.0) -> [0, 2]
    """
    begins = np.concatenate([[0], np.cumsum(durations)[:-1]]) / rate
    nearest = np.abs(begins[None] - np.asarray(times)[:, None]).argmin(1)
    nearest[0] = 0
    return np.maximum.accumulate(nearest)


def main(cfg: Config) -> None:
    # ---- the units, and what is done already
    reader, text_tokenizer = UnitReader(cfg.units), TextTokenizer(cfg.text_lm)
    if reader.durations(0) is None:
        raise SystemExit(f"{cfg.units}: has no durations; make it with prepare_units.py --durations")
    fingerprint = text_tokenizer.fingerprint(reader.fingerprint)
    writer = UnitWriter(cfg.out, fingerprint, cfg.units, durations=True, shard_tokens=100_000)
    todo = [(i, record) for i, record in enumerate(reader.records()) if record["id"] not in writer.done]
    rate, skipped = reader.fingerprint.unit_rate_hz, {}

    # ---- batches: text, times, units
    with writer, tqdm(total=len(reader), initial=len(reader) - len(todo), disable=None, desc="aligning") as bar:
        for at in range(0, len(todo), cfg.batch):
            batch = []
            for i, record in todo[at:at + cfg.batch]:
                id = record["id"]
                try:
                    wave = load_audio(Path(cfg.audio) / f"{id}{cfg.suffix}")
                    text = record.get("text") or transcript(Path(cfg.audio), id)
                    if len(wave) > WINDOW_SECONDS * SAMPLE_RATE:
                        raise ValueError(f"{len(wave) / SAMPLE_RATE:.1f} s; Whisper aligns {WINDOW_SECONDS} s at most")
                    batch.append((i, id, wave, text))
                except ValueError as e:  # also of a transcript that is not UTF-8
                    skipped[id] = str(e)
            heard = iter(transcribe([wave for *_, wave, text in batch if not text], cfg.asr))
            texts = [text or next(heard) for *_, text in batch]
            for (_, id, *_), text in zip(batch, texts):
                if not 0 < (n := sum(map(len, whisper_words(text, cfg.asr)))) <= MAX_TOKENS:
                    skipped[id] = f"{n} tokens of text, and Whisper aligns 1 to {MAX_TOKENS}; is it this recording's?"
            batch = [(*x[:3], text) for x, text in zip(batch, texts) if x[1] not in skipped]
            times = word_times([x[2] for x in batch], [x[3] for x in batch], cfg.asr) if batch else []
            for (i, id, _, text), begins in zip(batch, times):
                units, durations = reader.units(i), reader.durations(i)
                tokens, first_tokens = text_tokenizer.words(text)
                words = np.stack([first_tokens, first_units(begins, durations, rate)], 1)
                writer.add(id, units, durations, text_tokens=tokens, words=words, text=text)
            bar.update(len(todo[at:at + cfg.batch]))
    for id, why in skipped.items():
        print(f"skipped {id}: {why}", file=sys.stderr)
    print(f"{cfg.out}: words of {len(writer.done)} of {len(reader)} utterances; {len(skipped)} skipped")
    if len(skipped) > cfg.max_skipped * len(reader):
        raise SystemExit(f"more than {100 * cfg.max_skipped:g} % were skipped (--max_skipped); "
                         f"is {cfg.audio} the audio of {cfg.units}?")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
