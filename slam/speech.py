"""slam.speech."""
import functools
import hashlib
import logging
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from slam.attention import cross_entropy
from slam.audio import SAMPLE_RATE, resample
from slam.benchmarks import disk_cache
from slam.checkpoint import weights_sha256
from slam.device import autocast, pick_device
from slam.embedded import resolve
from slam.tokenizer import SpeechTokenizer
from slam.units import EOS, IGNORE, PAD, to_tokens, to_units
from slam.vocoder import Vocoder


def text_nlls(texts: list[str], judge: str) -> np.ndarray:
    """Mean negative log-likelihood per token of each text by a text LM, after BOS; remembered by (text, judge)."""
    def score(part: list[int]) -> list[float | None]:
        return continuation_scores([""] * len(part), [texts[i] for i in part], judge)

    folder = resolve(judge)  # of a hub's model the name must do
    version = f"-{weights_sha256(folder)[:16]}" if Path(folder).is_dir() else ""
    found = disk_cache(f"texts/{re.sub(r'[^A-Za-z0-9.-]+', '-', judge)}{version}",
                       [hashlib.sha256(t.encode()).hexdigest() for t in texts], score)
    return np.array([np.nan if x is None else -x for x in found])


# ---------------------------------------------------------------- generated speech
@functools.cache
def load_asr(asr: str) -> tuple:
    """Whisper by name, once per process: model, feature extractor, tokenizer."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)  # of what Whisper does
    folder = resolve(asr)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(pick_device())
    return model, WhisperFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def transcribe(waves: list[np.ndarray], asr: str, batch: int = 8, strip: bool = True) -> list[str]:
    """Whisper's transcripts of waves (T,) at 16 kHz, of at most 30 s each (longer ones are cut); greedy.

    strip: without the space that Whisper begins with. A wave of no samples says nothing.
    """
    model, extractor, tokenizer = load_asr(asr)
    texts, sound = [""] * len(waves), [i for i, w in enumerate(waves) if len(w)]
    for at in tqdm(range(0, len(sound), batch), disable=None, desc="transcribing", leave=False):
        part = sound[at:at + batch]
        x = extractor([waves[i][:30 * SAMPLE_RATE] for i in part], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        x = x.input_features.to(model.device)
        tokens = model.generate(x, attention_mask=torch.ones(x.shape[::2], device=x.device), max_length=200)
        for i, text in zip(part, tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            texts[i] = text.strip() if strip else text
    return texts


def speak(rows: list[list[int]], tokenizer: SpeechTokenizer, vocoder: Vocoder, batch: int = 16) -> list[np.ndarray]:
    """Tokens of a tokeniser -> waves (T,) at 16 kHz, like lengths together; silence of no length for no tokens."""
    units = [tokenizer.to_units(row) for row in rows]
    order = sorted((i for i, u in enumerate(units) if u), key=lambda i: len(units[i]))
    waves = [np.zeros(0, np.float32)] * len(rows)
    for at in tqdm(range(0, len(order), batch), disable=None, desc="vocoding", leave=False):
        part = order[at:at + batch]
        for i, wave in zip(part, vocoder.synthesize_batch([units[i] for i in part])):
            waves[i] = resample(wave, vocoder.sample_rate, SAMPLE_RATE)
    return waves


@functools.cache
def load_judge(judge: str) -> tuple:
    """A text LM by name, once per process: model, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    folder = resolve(judge)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(pick_device())
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def text_losses(texts: list[str], judge: str) -> list[float | None]:
    """Mean NLL (nats) per token of each text but its first, by a text LM; None for a text of fewer than two.

    Tokenised as SlamKit does: with the special tokens that the LM's tokenizer adds by itself. So after Llama's BOS all
    of the text is scored; SmolLM2's adds none, and the text's first token is only context.
    """
    model, tokenizer = load_judge(judge)
    losses = []
    for text in tqdm(texts, disable=None, desc="judging", leave=False):
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        losses.append(model(ids, labels=ids).loss.item() if ids.shape[1] >= 2 else None)
    return losses


@torch.inference_mode()
def continuation_scores(prompts: list[str], texts: list[str], judge: str, batch: int = 16) -> list[float | None]:
    """Mean log-probability (nats) per token of each text given its prompt's text; None for a text without tokens."""
    model, tokenizer = load_judge(judge)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # Qwen's has none
    known = [tokenizer(p).input_ids or [bos] for p in prompts]
    new = [tokenizer(f" {t}", add_special_tokens=False).input_ids if t else [] for t in texts]
    both = [a + b for a, b in zip(known, new)]
    scores, order = [None] * len(texts), sorted((i for i, x in enumerate(new) if x), key=lambda i: len(both[i]))
    for at in tqdm(range(0, len(order), batch), disable=None, desc="judging", leave=False):
        part = order[at:at + batch]
        ids = torch.zeros(len(part), len(both[part[-1]]), dtype=torch.long)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for row, i in enumerate(part):
            n = len(both[i])
            ids[row, :n], mask[row, :n], targets[row, len(known[i]):n] = torch.tensor(both[i]), 1, torch.tensor(new[i])
        ids, mask, targets = (x.to(model.device) for x in (ids, mask, targets[:, 1:]))
        loss = cross_entropy(model(ids, attention_mask=mask).logits[:, :-1], targets, "none").sum(1)
        for i, value in zip(part, (loss / (targets != IGNORE).sum(1)).tolist()):
            scores[i] = -value
    return scores


def continue_units(lm: torch.nn.Module, prompts: list[list[int]], new_units: int, batch: int, seed: int, desc: str,
                   allow_eos: bool = True, compile: bool = False, **sampling) -> list[list[int]]:
    """Units -> sampled continuations (units), batched; prompts of like length share a batch.

    allow_eos: an EOS ends a continuation, which then has fewer than `new_units` units; else none is drawn.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list = [None] * len(prompts)
    generator = torch.Generator(lm.device).manual_seed(seed)
    bar = tqdm(total=len(prompts), disable=None, desc=desc, unit="prompt")
    for at in range(0, len(order), batch):
        part = order[at:at + batch]
        with autocast(lm.device, "bfloat16" if lm.device.type == "cuda" else "float32"):
            new = lm.generate([to_tokens(prompts[i])[:-1] for i in part], new_units, generator=generator,
                              forbid=(PAD,) if allow_eos else (PAD, EOS), stop=(EOS,),
                              compile=compile and len(part) == batch, **sampling)
        for i, tokens in zip(part, new):
            out[i] = to_units(tokens)
        bar.update(len(part))
    bar.close()
    return out
