"""Continue, speak, transcribe and judge: what evaluation, sampling and on-policy pairs do with a unit LM's units.

    units = continue_units(lm, [[5, 71, 3]], new_units=100, batch=16, seed=0, desc="continuing", top_k=25)
    waves = speak(units, tokenizer, vocoder)                      # 16 kHz
    texts = transcribe(waves, "embedded:whisper-tiny.en")
    losses = text_losses(texts, "embedded:smollm2-135m")          # nats per token; GenPPL is exp of their mean
"""
import functools
import logging

import numpy as np
import torch
from tqdm import tqdm

from slam.audio import SAMPLE_RATE, resample
from slam.device import autocast, pick_device
from slam.embedded import resolve
from slam.units import EOS, PAD, to_tokens, to_units


def by_length(sizes: list[int], batch: int, desc: str):
    """Yield lists of at most `batch` indices of the non-zero sizes, similar sizes together, under a progress bar."""
    order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: sizes[i])
    with tqdm(total=len(order), disable=None, desc=desc, leave=False) as bar:
        for at in range(0, len(order), batch):
            yield order[at:at + batch]
            bar.update(len(order[at:at + batch]))


def continue_units(lm: torch.nn.Module, prompts: list[list[int]], new_units: int, batch: int, seed: int, desc: str,
                   allow_eos: bool = True, compile: bool = False, **sampling) -> list[list[int]]:
    """Sample a continuation of each prompt; units in, units out.

    allow_eos: an EOS ends a continuation, which then has fewer than `new_units` units; False forbids EOS.
    A model of speech and text continues in speech.
    """
    out: list = [None] * len(prompts)
    first_text = getattr(lm.config, "first_text_token", 0)  # before it come the two markers (slam/interleave.py)
    forbid = [PAD] + [EOS] * (not allow_eos) + [slice(first_text - 2, None)] * bool(first_text)
    generator = torch.Generator(lm.device).manual_seed(seed)
    for part in by_length([len(p) + 1 for p in prompts], batch, desc):
        with autocast(lm.device, "auto" if lm.device.type == "cuda" else "float32"):
            new = lm.generate([to_tokens(prompts[i])[:-1] for i in part], new_units, generator=generator,
                              forbid=tuple(forbid), stop=(EOS,),
                              compile=compile and len(part) == batch, **sampling)
        for i, tokens in zip(part, new):
            out[i] = to_units(tokens)
    return out


def speak(rows: list[list[int]], tokenizer, vocoder) -> list[np.ndarray]:
    """A tokeniser's units or pieces -> waves (T,) at 16 kHz; an empty row gives an empty wave."""
    return [resample(*vocoder.synthesize(tokenizer.to_units(row)), SAMPLE_RATE) if row else np.zeros(0, np.float32)
            for row in tqdm(rows, disable=None, desc="vocoding", leave=False)]


@functools.cache
def load_asr(asr: str) -> tuple:
    """Whisper by name, once per process: model, feature extractor, tokenizer."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration
    logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)  # its hints about Whisper's settings
    return load(WhisperForConditionalGeneration, asr, WhisperFeatureExtractor, AutoTokenizer)


@functools.cache
def load_judge(judge: str) -> tuple:
    """A text LM by name, once per process: model, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return load(AutoModelForCausalLM, judge, AutoTokenizer)


def free_memory() -> None:
    """Forget Whisper and the judge where they fill a GPU's memory: 8 GB do not hold both beside a unit LM."""
    if torch.cuda.is_available():
        load_asr.cache_clear()
        load_judge.cache_clear()


def load(Model: type, name: str, *others: type) -> tuple:
    """A model of transformers in fp32, and its tokenizer or feature extractor. SystemExit if they can't be loaded."""
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    folder = resolve(name)
    try:
        model = Model.from_pretrained(folder, dtype=torch.float32).eval().to(pick_device())
        return model, *(Other.from_pretrained(folder) for Other in others)
    except (OSError, ValueError) as e:
        raise SystemExit(f"{name}: can't be loaded as {Model.__name__}: {' '.join(str(e).split())}") from None


def transcribe(waves: list[np.ndarray], asr: str, batch: int = 16, strip: bool = True) -> list[str]:
    """Whisper's greedy transcripts of waves (T,) at 16 kHz, of which the first 30 s are heard; "" for an empty wave.

    batch: waves transcribed together, few enough for 8 GB cards. strip: remove Whisper's leading space.
    """
    model, extractor, tokenizer = load_asr(asr)
    texts = [""] * len(waves)
    for part in by_length(list(map(len, waves)), batch, "transcribing"):
        x = extractor([waves[i][:30 * SAMPLE_RATE] for i in part], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        x = x.input_features.to(model.device)
        tokens = model.generate(x, attention_mask=torch.ones(x.shape[::2], device=x.device), max_length=200)
        for i, text in zip(part, tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            texts[i] = text.strip() if strip else text
    return texts


@torch.inference_mode()
def mean_nlls(known: list[list[int]], new: list[list[int]], model, batch: int = 16) -> list[float | None]:
    """Mean negative log-likelihood (nats) per token of text tokens `new` given `known`; None where there are none.

    mean_nlls([[7, 8]], [[9]], model) -> [-log p(9 | 7, 8)]
    """
    losses = [None] * len(new)
    for part in by_length([len(a + b) if a and b else 0 for a, b in zip(known, new)], batch, "judging"):
        rows = [known[i] + new[i] for i in part]
        ids = torch.zeros(len(part), max(map(len, rows)), dtype=torch.long)
        mask, scored = torch.zeros(2, *ids.shape, dtype=torch.bool)
        for row, (i, tokens) in enumerate(zip(part, rows)):
            ids[row, :len(tokens)] = torch.tensor(tokens)
            mask[row, :len(tokens)], scored[row, len(known[i]):len(tokens)] = True, True
        ids, mask, scored = (x.to(model.device) for x in (ids, mask, scored[:, 1:]))
        logits = model(ids, attention_mask=mask.long()).logits
        nll = torch.stack([torch.nn.functional.cross_entropy(row[:-1].float(), tokens[1:], reduction="none")
                           for row, tokens in zip(logits, ids)])  # all rows at once need three times the memory
        for i, loss in zip(part, ((nll * scored).sum(1) / scored.sum(1)).tolist()):
            losses[i] = loss
    return losses


def text_losses(texts: list[str], judge: str) -> list[float | None]:
    """Mean NLL (nats) of each text's tokens after the first, by a text LM; None for a text of fewer than two tokens.

    The tokenizer's own special tokens are kept, as in SlamKit: after Llama's BOS the whole text is scored. SmolLM2 has
    no BOS, so a text's first token is only context.
    """
    model, tokenizer = load_judge(judge)
    tokens = [tokenizer(text).input_ids for text in texts]
    return mean_nlls([x[:1] for x in tokens], [x[1:] for x in tokens], model)


def continuation_scores(prompts: list[str], texts: list[str], judge: str) -> list[float | None]:
    """Mean log-probability (nats) per token of each text given its prompt's text; None for an empty text."""
    model, tokenizer = load_judge(judge)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # Qwen has no BOS
    known = [tokenizer(prompt).input_ids or [bos] for prompt in prompts]
    new = [tokenizer(f" {text}", add_special_tokens=False).input_ids if text else [] for text in texts]
    return [None if x is None else -x for x in mean_nlls(known, new, model)]
