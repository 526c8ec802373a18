"""slam/cross_modal.py: losses of each kind, four directions, answers in text."""
import numpy as np
import pytest
import torch
from test_interleave import PLAIN, SHAPE, VOCABULARY, reader  # noqa: F401

from model import ModelConfig, UnitLM
from slam.cross_modal import answer_in_text, directions, losses_by_kind, split_at_last_sentence
from slam.interleave import INTERLEAVED, Mixed, TextTokenizer, Vocabulary


def test_losses_by_kind_by_hand(reader):  # noqa: F811
    torch.manual_seed(0)
    mixed = Mixed(reader, (0.3, 0.2, 0.5), seed=3)
    lm = UnitLM(ModelConfig(vocab_size=VOCABULARY.size, **SHAPE)).eval()
    found = losses_by_kind(lm, mixed, 64, "float32")
    assert set(found) == {f"val_{what}_{kind}" for what in ("loss", "accuracy") for kind in
                          ("speech", "text", "interleaved_speech", "interleaved_text")}
    nlls, hits = [], []
    with torch.no_grad():
        for i in range(len(reader)):
            x = torch.from_numpy(mixed.form(i, INTERLEAVED, 0))
            for at in range(0, len(x) - 1, 64):  # chunks of the context
                inputs, targets = x[at:at + 64][:len(x) - 1 - at], x[at + 1:at + 65]
                logp = lm(inputs[None])[0][0].log_softmax(-1)
                text = targets >= VOCABULARY.first_text
                nlls += -logp[torch.arange(len(targets)), targets][text]
                hits += (logp.argmax(-1) == targets)[text]
    assert found["val_loss_interleaved_text"]["value"] == pytest.approx(float(np.mean(nlls)), rel=1e-5)
    assert found["val_accuracy_interleaved_text"] == {"value": pytest.approx(100 * float(np.mean(hits))),
                                                      "n": len(nlls)}


def test_the_sentences_that_two_texts_share():
    for a, b, expected in (("It rained. He ran.", "It rained. He sang.", ("It rained.", "He ran.", "He sang.")),
                           ('"Go!" he said. A', '"Go!" he said. B', ('"Go!" he said.', "A", "B")),
                           ("One. Two.", "One.  Two!", ("One.", "Two.", "Two!")),
                           ("A b.", "A c.", ("", "A b.", "A c."))):
        assert split_at_last_sentence(a, b) == expected


def test_four_directions():
    """By SmolLM2's tokenizer: prompts and endings, each in units and in text."""
    fingerprint = TextTokenizer("embedded:smollm2-135m").fingerprint(PLAIN)
    v, decode = Vocabulary(fingerprint), TextTokenizer("embedded:smollm2-135m").tokenizer.decode
    assert v.size == 24 + 49152
    texts = [("It rained. He ran.", "It rained. He sang.")]
    found = directions(texts, [([1, 4, 5, 6, 7, 1], [1, 4, 5, 8, 1])], fingerprint)
    a, b = found["speech_to_text"][0]
    assert a[:5] == b[:5] == [1, 22, 4, 5, 23] and a[-1] == b[-1] == 1
    assert [decode([t - 24 for t in x[5:-1]]) for x in (a, b)] == [" He ran.", " He sang."]
    a, b = found["text_to_speech"][0]
    assert a[:2] == b[:2] == [1, 23] and a[-4:] == [22, 6, 7, 1] and b[-3:] == [22, 8, 1]
    assert decode([t - 24 for t in a[2:-4]]) == decode([t - 24 for t in b[2:-3]]) == "It rained."
    assert [decode([t - 24 for t in x[1:-1]]) for x in found["text_to_text"][0]] == ["It rained. He ran.",
                                                                                   "It rained. He sang."]


def test_answers_are_text():
    fingerprint = TextTokenizer("embedded:smollm2-135m").fingerprint(PLAIN)
    torch.manual_seed(0)
    lm = UnitLM(ModelConfig(vocab_size=24 + 49152, first_text_token=24, **SHAPE)).eval()
    answers = answer_in_text(lm, [[3, 4], [5]], fingerprint, 8, seed=0, top_k=50)
    assert len(answers) == 2 and all(isinstance(x, str) and x for x in answers)
    assert answers == answer_in_text(lm, [[3, 4], [5]], fingerprint, 8, seed=0, top_k=50)


def test_pairs_of_single_sentences_and_without_eos():
    fingerprint = TextTokenizer("embedded:smollm2-135m").fingerprint(PLAIN)
    single = directions([("He runs.", "He run.")], [([1, 4, 1], [1, 5, 1])], fingerprint)
    assert list(single) == ["text_to_text"]
    cut = directions([("It rained. He ran.", "It rained. He sang.")], [([1, 4, 5], [1, 4, 6])], fingerprint)
    assert len(cut) == 3 and all(x[-1] != 1 for pairs in cut.values() for pair in pairs for x in pair)
