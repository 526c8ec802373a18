"""What is scored and asked of a model of speech and text: losses of each kind, pairs in four directions, answers."""
import os
import re

import torch
import torch.nn.functional as F

from slam.device import autocast
from slam.interleave import KINDS, Mixed, TextTokenizer, View, Vocabulary
from slam.packing import Packed, batch, cut, on_device
from slam.scoring import PrefixPair
from slam.units import BOS, EOS, OFFSET, PAD, Fingerprint, to_tokens


@torch.inference_mode()
def losses_by_kind(lm: torch.nn.Module, corpus: Mixed, context: int, dtype: str) -> dict[str, dict]:
    """Loss (nats per token) and accuracy (%) of units and of text, in utterances of each kind.

    {"val_loss_speech": {"value": 1.9, "n": 5210}, "val_accuracy_speech": ..., "val_loss_text": ..., and, of interleaved
    utterances, "val_loss_interleaved_speech", "val_loss_interleaved_text"}. EOS and the markers are left out.
    """
    found, vocabulary = {}, corpus.vocabulary
    for kind, name in enumerate(KINDS):
        view, sums = View(corpus, kind), torch.zeros(2, 3, dtype=torch.float64)
        for row in Packed(cut(view.lengths, context), context, None):
            tokens, targets, positions, mask = on_device(batch(view, [row], context, lm.device), lm.device, dtype)
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


def directions(texts: list[tuple[str, str]], utterances: list[tuple], fingerprint: Fingerprint) -> dict[str, list]:
    """A benchmark's pairs in four directions, {name: [(tokens, tokens)]}: what is given, and what is to be judged.

    texts: the two transcripts of each pair. utterances: their tokens (`1 units 1`). In speech the part that both share
    is given; in text the sentences that they share; pairs of single sentences share none, and are scored as text
    alone. "speech_to_text": `1 <speech> units <text> its ending 1`.
    """
    vocabulary, tokenizer = Vocabulary(fingerprint), TextTokenizer(fingerprint.text_lm)

    def tokens(text: str, follows: bool = False) -> list[int]:
        return [t + vocabulary.first_text for t in tokenizer.words(text, follows)[0].tolist()]

    end = [EOS] * bool(utterances and utterances[0][0][-1] == EOS)  # eval.py --score_eos=false took it off
    found = {"text_to_text": [tuple([BOS, *tokens(text), *end] for text in pair) for pair in texts]}
    if not any(split_at_last_sentence(*pair)[0] for pair in texts):
        return found
    found |= {"speech_to_text": [], "text_to_speech": []}
    for (a, b), (x, y) in zip(texts, utterances):
        given, *endings = split_at_last_sentence(a, b)
        units, *rest = PrefixPair.of(x, y)
        found["speech_to_text"].append(tuple(
            [BOS, vocabulary.speech, *units[1:], vocabulary.text, *tokens(ending, True), *end] for ending in endings))
        found["text_to_speech"].append(tuple(
            [BOS, vocabulary.text, *tokens(given), vocabulary.speech, *ending] for ending in rest))
    return found


# ---------------------------------------------------------------- answers
def answer_in_text(lm: torch.nn.Module, prompts: list[list[int]], fingerprint: Fingerprint, max_new_tokens: int,
                   seed: int, **sampling) -> list[str]:
    """Spoken prompts (units) continued in text by a mixed model: `1 <speech> units <text>`, and on to EOS."""
    vocabulary, generator = Vocabulary(fingerprint), torch.Generator(lm.device).manual_seed(seed)
    rows = [[BOS, vocabulary.speech, *to_tokens(prompt)[1:-1], vocabulary.text] for prompt in prompts]
    new = lm.generate(rows, max_new_tokens, stop=(EOS,), forbid=(PAD, slice(OFFSET, vocabulary.first_text)),
                      generator=generator, **sampling)
    decode = TextTokenizer(fingerprint.text_lm).tokenizer.decode
    return [decode([t - vocabulary.first_text for t in row]).strip() for row in new]
