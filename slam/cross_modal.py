"""Evaluation of a model of speech and text: losses of each kind of token, pairs in four directions, text answers."""
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from slam.alignment import word_times
from slam.audio import SAMPLE_RATE, check_wave, load_audio
from slam.benchmarks import SIDES, Benchmark, disk_cache, units_cache
from slam.device import autocast
from slam.embedded import file_digest
from slam.interleave import KINDS, Mixed, TextTokenizer, Vocabulary
from slam.packing import Packed, collate, cut, on_device
from slam.units import BOS, EOS, OFFSET, PAD, Fingerprint, sha256_of, to_tokens


@torch.inference_mode()
def losses_by_kind(lm: torch.nn.Module, corpus: Mixed, context: int, dtype: str) -> dict[str, dict]:
    """Loss (nats per token) and accuracy (%) of units and of text, in utterances of each kind.

    {"val_loss_speech": {"value": 1.9, "n": 5210}, "val_accuracy_speech": ..., "val_loss_text": ..., and, of interleaved
    utterances, "val_loss_interleaved_speech", "val_loss_interleaved_text"}. EOS and the markers are left out.
    """
    found, vocabulary = {}, corpus.vocabulary
    for kind, name in enumerate(KINDS):
        view, sums = corpus.view(kind), torch.zeros(2, 3, dtype=torch.float64)
        for row in Packed(cut(view.lengths, context), context, None):
            tokens, targets, positions, mask = on_device(collate(view, [row], context), lm.device, dtype)
            with autocast(lm.device, dtype):  # row by row, as the logits of a large vocabulary are large
                logits = lm(tokens, positions=positions, mask=mask)[0][0].float()
            targets = targets[0]
            nll = F.cross_entropy(logits, targets, reduction="none")
            hit = logits.argmax(-1) == targets
            for i, of in enumerate(((targets > EOS) & (targets < vocabulary.speech), targets >= vocabulary.first_text)):
                sums[i] += torch.stack([nll[of].sum(), hit[of].sum(), of.sum()]).double().cpu()
        for modality, (nll, hits, n) in zip(KINDS, sums.tolist()):
            if n:
                key = name if name == modality else f"{name}_{modality}"
                found |= {f"val_loss_{key}": {"value": nll / n, "n": int(n)},
                          f"val_accuracy_{key}": {"value": 100 * hits / n, "n": int(n)}}
    return found


def split_at_last_sentence(a: str, b: str) -> tuple[str, str, str]:
    """The sentences that two texts begin with in common, and what follows in each.

    split_at_last_sentence("It rained. He ran.", "It rained. He sang.") -> ("It rained.", "He ran.", "He sang.")
    """
    common = os.path.commonprefix([a, b])
    ends = [m.end() for m in re.finditer(r"[.!?][\"']?(?=\s)", common + b[len(common):len(common) + 1])]
    at = ends[-1] if ends else 0
    return a[:at], a[at:].strip(), b[at:].strip()


def cut_prompt(a: np.ndarray, b: np.ndarray, texts: tuple[str, str], asr: str) -> tuple[np.ndarray, ...]:
    """Waves of a pair (T,) at 16 kHz -> its prompt and the two endings.

    Cut where the waves diverge. If that is within their first second, since a TTS spoke each side as a whole, cut where
    Whisper finds the first word after the sentences that their texts share.
    """
    n = min(len(a), len(b))
    cuts = [np.append(a[:n] != b[:n], True).argmax()] * 2
    if cuts[0] < SAMPLE_RATE:
        n_words = len(split_at_last_sentence(*texts)[0].split())
        cuts = [round(times[n_words] * SAMPLE_RATE) for times in word_times([a, b], list(texts), asr)]
    return a[:cuts[0]], a[cuts[0]:], b[cuts[1]:]


def tokenize_parts(tokenizer, benchmark: Benchmark, texts: list[tuple[str, str]], asr: str) -> list[list[list[int]]]:
    """Units of the parts of each pair that `cut_prompt` gives, encoded separately; cached like `tokenize_pairs`.

    Separately, since encoders look ahead: the units of two whole sides diverge long before the prompt ends. Returns []
    unless every pair's texts are shared sentences and two endings.
    """
    def encode(part: list[int]) -> list[list[list[int]]]:
        waves = []
        try:
            for i in part:
                waves += cut_prompt(*(load_audio(benchmark.pairs[i][side]) for side in SIDES), texts[i], asr)
                for wave in waves[-3:]:
                    check_wave(wave, f"prompt or ending of {benchmark.pairs[i]['id']}")
        except ValueError as e:
            raise SystemExit(f"{benchmark.source}: {e}") from None
        units = [units.tolist() for units, _ in tokenizer.encode_batch(waves)]
        return [units[i:i + 3] for i in range(0, len(units), 3)]

    if n := sum(not all(split_at_last_sentence(*pair)) for pair in texts):
        print(f"{benchmark.name}: not scored from speech to text and back, as the texts of {n} pairs share no sentence")
        return []
    keys = [sha256_of(asr, pair, *(file_digest(Path(files[side])) for side in SIDES))
            for files, pair in zip(benchmark.pairs, texts)]
    return disk_cache(units_cache(tokenizer, f"{benchmark.name}-parts"), keys, encode)


def directions(texts: list[tuple[str, str]], parts: list[list[list[int]]], fingerprint: Fingerprint,
               eos: bool = True) -> dict[str, list]:
    """A benchmark's pairs in all directions but speech to speech, {name: [(tokens, tokens)]}.

    texts: the two transcripts of each pair. parts: units of its prompt and its two endings; empty: text alone. A text
    prompt is the sentences that both transcripts share. eos: an EOS follows each ending.
    "speech_to_text": `1 <speech> units of the prompt <text> its ending 1`.
    """
    vocabulary, tokenizer, end = Vocabulary(fingerprint), TextTokenizer(fingerprint.text_lm), [EOS] * eos

    def written(text: str, follows: bool = False) -> list[int]:
        return [t + vocabulary.first_text for t in tokenizer.words(text, follows)[0].tolist()]

    found = {"text_to_text": [tuple([BOS, *written(text), *end] for text in pair) for pair in texts]}
    for pair, spoken in zip(texts, parts):
        prompt, *endings = (to_tokens(units)[1:-1] for units in spoken)
        given, *rest = split_at_last_sentence(*pair)
        found.setdefault("speech_to_text", []).append(tuple(
            [BOS, vocabulary.speech, *prompt, vocabulary.text, *written(text, True), *end] for text in rest))
        found.setdefault("text_to_speech", []).append(tuple(
            [BOS, vocabulary.text, *written(given), vocabulary.speech, *ending, *end] for ending in endings))
    return found


# ---------------------------------------------------------------- answers
def answer_in_text(lm: torch.nn.Module, prompts: list[list[int]], fingerprint: Fingerprint, max_new_tokens: int,
                   seed: int, **sampling) -> list[str]:
    """Spoken prompts (units) continued in text by a mixed model, which reads `1 <speech> units <text>`."""
    vocabulary, generator = Vocabulary(fingerprint), torch.Generator(lm.device).manual_seed(seed)
    text = TextTokenizer(fingerprint.text_lm).tokenizer
    ends = EOS, *(vocabulary.first_text + token for token in text.all_special_ids)
    rows = [[BOS, vocabulary.speech, *to_tokens(prompt)[1:-1], vocabulary.text] for prompt in prompts]
    new = lm.generate(rows, max_new_tokens, stop=ends, forbid=(PAD, slice(OFFSET, vocabulary.first_text)),
                      generator=generator, **sampling)
    return [text.decode([t - vocabulary.first_text for t in row]).strip() for row in new]
