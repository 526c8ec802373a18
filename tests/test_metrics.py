"""slam/metrics.py: against brute force and against NLTK."""
import math
import random
from itertools import islice

import numpy as np
import pytest

from slam.metrics import auto_bleu, pair_accuracy, score_pairs, word_error_rate, words


def test_pair_accuracy():
    assert pair_accuracy(np.array([1.0, 2.0]), np.array([1.5, 2.0])) == {"value": 75.0, "se": 25.0, "n": 2, "ties": 1}
    a = np.random.default_rng(0).normal(size=(2, 1000))
    result = pair_accuracy(*a)
    p = sum(x < y for x, y in a.T) / 1000
    assert result["value"] == pytest.approx(100 * p)
    assert result["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 999))


def test_accuracy_of_pairs_that_are_not_independent():
    """One item in four voices: the error is that of the items, not of their copies."""
    rng = np.random.default_rng(0)
    item, gap = np.repeat(np.arange(50), 4), np.repeat(rng.normal(0.3, 1, 50), 4)
    alone = pair_accuracy(np.zeros(50), gap[::4])
    copies = pair_accuracy(np.zeros(200), gap, [str(i) for i in item])
    assert copies["value"] == alone["value"] and copies["n"] == 200 and copies["items"] == 50
    assert copies["se"] == pytest.approx(alone["se"], rel=0.1)
    assert copies["interval"] == pytest.approx([copies["value"] + 1.96 * x * copies["se"] for x in (-1, 1)], abs=2)
    failed = pair_accuracy(np.array([1.0, np.nan, 2.0]), np.array([2.0, 1.0, 1.0]))
    assert failed["value"] == 50 and failed["n"] == 2 and failed["failed"] == 1


def test_results_of_a_benchmark():
    """Micro over pairs; macro as ZeroSpeech: voices, then items."""
    right = {("x", "1"): (1, 1, 1, 0), ("x", "2"): (0, 0), ("y", "3"): (1,)}
    pairs = [{"id": f"{item}{v}", "item": item, "type": t, "voice": f"v{v}"} for (t, item), all_ in right.items()
             for v, _ in enumerate(all_)]
    nll = np.array([[1.0, 2.0] if x else [2.0, 1.0] for all_ in right.values() for x in all_])
    result = score_pairs(nll, pairs)
    assert result["value"] == pytest.approx(100 * 4 / 7) and result["n"] == 7 and result["ties"] == 0
    assert result["macro"] == pytest.approx(100 * np.mean([3 / 4, 0, 1]))
    assert {t: (r["value"], r["n"]) for t, r in result["by"]["type"].items()} == {"x": (50, 6), "y": (100, 1)}
    assert result["by"]["voice"]["v1"]["n"] == 2
    assert "by" not in score_pairs(nll[:2], [{"id": "a"}, {"id": "b"}])
    assert "items" not in score_pairs(nll[:2], [{"id": "a", "type": "x"}, {"id": "a", "type": "y"}])  # only `item` ties


def test_auto_bleu():
    assert auto_bleu("a b a b", 2) == pytest.approx(2 / 3)
    assert auto_bleu("ha ha ha", 2) == 1.0
    assert auto_bleu("one two three", 2) == 0.0 and auto_bleu("", 2) == 0.0 and auto_bleu("one", 2) == 0.0
    text = "the cat saw the dog and the cat saw the bird ."
    grams = list(zip(text.split(), text.split()[1:]))
    assert auto_bleu(text, 2) == pytest.approx(sum(grams.count(g) > 1 for g in grams) / len(grams))
    stories = "Once upon a time there was a girl. She liked to play. She saw a dog. The dog ran. She ran."
    assert auto_bleu(stories) == 0  # "girl." and "play." are words; only the last full stop is one of its own


@pytest.mark.parametrize("text, expected", {
    "Don't stop, he said.": "Do|n't|stop|,|he|said|.",
    "A girl. She CAN'T, I'm... sure": "A|girl.|She|CA|N'T|,|I|'m|...|sure",
    '"Well," he said (to 3 dogs), "it costs $3.88 at 10:30!"': "``|Well|,|''|he|said|(|to|3|dogs|)|,|``|it|costs|$|"
                                                             "3.88|at|10:30|!|''",
    "I cannot; we're gonna, I wanna go. 'Tis the dogs' “end.”  \n":
        "I|can|not|;|we|'re|gon|na|,|I|wan|na|go.|'T|is|the|dogs|'|“|end|.|”",
    "naïve 日本 -- 5% *yes*": "naïve|日本|--|5|%|*|yes|*",
    "Mr. U.S. went..": "Mr.|U.S.|went|..",
    "": "", " \n\t": "", ".": ".", "'": "'"}.items())
def test_words_are_nltks(text, expected):
    assert "|".join(words(text)) == expected


def test_words_and_auto_bleu_by_nltk():
    """3,000 texts, of which a third are no language at all; auto-BLEU as SlamKit defines it, over NLTK's words."""
    tokenize = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer().tokenize
    rng = random.Random(0)
    marks = "' \" '' `` ` . .. ... , : ; ? ! ( ) [ ] { } < > -- - * # $ % & @ “ ” ‘ ’ « » „ …".split()
    texts = "don't CAN'T cannot gonna wanna gotta gimme lemme d'ye more'n 'tis 'Twas he's I'm they'd we'll We'LL " \
        "you've dogs' 'n' n't girl A the 3.88 3,36 10:30 \u0663 été 日本 \u0130 _ U.S. Mr. x 'x".split()
    pieces = marks + texts + [" "] * 30 + ["\n", "\t", "\u00a0", "  "]
    for i in range(3000):
        spoken = (rng.choice(texts) + rng.choice([" ", " ", " ", ", ", ". ", "! ", ' "', '" ']) for _ in range(30))
        text = "".join(islice(spoken, rng.randint(0, 30)) if i % 3 else rng.choices(pieces, k=rng.randint(0, 14)))
        assert words(text) == tokenize(text), repr(text)
        grams = [" ".join(pair) for pair in zip(tokenize(text), tokenize(text)[1:])]
        assert auto_bleu(text) == pytest.approx(sum(grams.count(g) > 1 for g in grams) / max(1, len(grams)))


def test_word_error_rate():
    assert word_error_rate("The cat sat.", "the cat sat") == (0, 3)
    assert word_error_rate("the cat sat", "the hat") == (2, 3)
    assert word_error_rate("the cat", "") == (2, 2)
