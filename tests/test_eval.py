"""eval.py: metrics against brute force."""
import json
import math
import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch

from eval import Config, perplexity, table
from slam.audio import load_audio
from slam.benchmarks import Benchmark, tokenize_pairs, units_cache
from slam.embedded import resolve
from slam.metrics import auto_bleu, pair_accuracy, score_pairs, word_error_rate, words
from slam.run import merge_results
from slam.speech import load_judge, text_losses, text_nlls, transcribe
from slam.tokenizer import SpeechTokenizer, read_codebook, write_codebook
from slam.units import Fingerprint, to_tokens


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


def test_text_judge():
    good, bad = text_nlls(["The dog is sleeping near the tree.", "Dog the sleeping near is tree the."],
                          "embedded:smollm2-135m")
    assert good < bad - 1


def test_auto_bleu():
    assert auto_bleu("a b a b", 2) == pytest.approx(2 / 3)
    assert auto_bleu("ha ha ha", 2) == 1.0
    assert auto_bleu("one two three", 2) == 0.0 and auto_bleu("", 2) == 0.0 and auto_bleu("one", 2) == 0.0
    text = "the cat saw the dog and the cat saw the bird ."
    grams = list(zip(text.split(), text.split()[1:]))
    assert auto_bleu(text, 2) == pytest.approx(sum(grams.count(g) > 1 for g in grams) / len(grams))
    # GSLM's: elsewhere is where no word is shared.
    assert auto_bleu("ha ha ha", overlapping=False) == 0 and auto_bleu("ha ha ha ha", overlapping=False) == 2 / 3
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.choice(list("abc"), 12).tolist()
        grams = list(zip(tokens, tokens[1:]))
        expected = np.mean([any(g == h and abs(i - j) >= 2 for j, h in enumerate(grams)) for i, g in enumerate(grams)])
        assert auto_bleu(" ".join(tokens), overlapping=False) == pytest.approx(expected)
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


def test_perplexity_counts_empty_texts():
    fluent, other = "Once upon a time, there was a little girl who lived in a small house.", "He ran. He sat down."
    cfg = Config(val=("x",), judge="embedded:smollm2-135m")
    alone = perplexity([fluent], cfg)
    assert alone["value"] < 20 and alone["empty"] == 0 and alone["se"] is None
    with_empty = perplexity([fluent, "", " "], cfg)
    assert with_empty["value"] == pytest.approx(alone["value"]) and with_empty["empty"] == 2
    assert perplexity([""], cfg)["value"] is None
    model, tokenizer = load_judge(cfg.judge)
    losses = []
    for text in (fluent, other):
        ids = torch.tensor([tokenizer(text).input_ids])
        logp = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
        losses.append(-logp.mean().item())
    both = perplexity([fluent, other], replace(cfg, n_seeds=2))
    assert both["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert both["seeds"] == pytest.approx([math.exp(x) for x in losses], rel=1e-3)


def test_what_the_judge_reads(voice):
    """Transcripts with Whisper's leading space, as transformers' pipeline, which is SlamKit's ASR, gives them."""
    from transformers import WhisperTokenizer, pipeline
    asr, judge = "embedded:whisper-tiny.en", "embedded:smollm2-135m"
    waves = [voice("Once upon a time there was a little girl."), voice("The dog is here. It barks at me.")]
    texts = transcribe([*waves, np.zeros(0, np.float32)], asr, strip=False)
    heard = pipeline("automatic-speech-recognition", resolve(asr), device="cpu",
                     tokenizer=WhisperTokenizer.from_pretrained(resolve(asr)))
    theirs = [heard({"raw": w, "sampling_rate": 16_000}, generate_kwargs={"num_beams": 1})["text"] for w in waves]
    assert texts == [*theirs, ""] and all(t.startswith(" ") for t in theirs)
    assert transcribe(waves, asr) == [t.strip() for t in theirs]
    # The judge's tokenizer adds what it adds by itself, and the batch is padded.
    model, tokenizer = load_judge(judge)
    batch = tokenizer(theirs, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logp = model(**batch).logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.attention_mask[:, 1:]
    expected = (-(logp * mask).sum(1) / mask.sum(1)).tolist()
    found = text_losses(texts, judge)
    assert found[:2] == pytest.approx(expected, rel=1e-4) and found[2] is None
    assert text_losses([theirs[0].strip()], judge)[0] != pytest.approx(expected[0], rel=1e-3)


def test_units_are_remembered_by_all_that_decides_them(voice, tmp_path, monkeypatch):
    """Another layer with the same k-means, or another number format, never gets the units of the first."""
    tensors, meta = read_codebook("embedded")
    write_codebook(tmp_path / "layer2.safetensors", tensors, meta | {"layer": 2})
    tokenizers = [SpeechTokenizer.load("embedded"), SpeechTokenizer.load(str(tmp_path / "layer2.safetensors")),
                  SpeechTokenizer.load("embedded", dtype="bfloat16")]
    assert len({t.fingerprint.codebook_sha256 for t in tokenizers}) == 1
    monkeypatch.setenv("SLAM_CACHE", str(tmp_path / "cache"))
    paths = [str(tmp_path / f"{side}.wav") for side in ("a", "b")]
    for path, text in zip(paths, ("The dog is near the tree. It sleeps.", "The dog are near the tree.")):
        soundfile.write(path, voice(text), 16_000)
    benchmark = Benchmark("x", "here", pairs=[{"id": "0", "positive": paths[0], "negative": paths[1]}])
    seen = []
    for _ in range(2):  # the second time out of the cache
        for tokenizer in tokenizers:
            found = tokenize_pairs(tokenizer, benchmark)
            assert found == [tuple(to_tokens(tokenizer.encode(load_audio(p), 16_000)[0]) for p in paths)]
            seen.append(found)
    assert seen[0] != seen[1] and seen[0] != seen[2] and seen[:3] == seen[3:]
    assert len(list((tmp_path / "cache" / "units").iterdir())) == 3
    # Everything in the fingerprint, and the device's kind.
    names, tokenizer = {units_cache(tokenizers[0], "x")}, tokenizers[0]
    for field, value in Fingerprint("e", 1, 50.0, 7, False, "f").to_dict().items():
        tokenizer.fingerprint = replace(tokenizer.fingerprint, **{field: value})
        names.add(units_cache(tokenizer, "x"))
    for device in ("cuda", "cuda:1"):  # the same kind
        tokenizer.encoder.device = device
        names.add(units_cache(tokenizer, "x"))
    assert len(names) == 8


def test_results_merge(tmp_path):
    merge_results(tmp_path / "results.json", {"a": {"value": 1}, "b": {"value": 2}})
    merge_results(tmp_path / "results.json", {"b": {"value": 3}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"value": 1}, "b": {"value": 3}}


def test_table():
    text = table({"x": {"val_loss": {"value": 1.234}, "tsc": {"value": 78.0, "se": 0.91}}, "y": {"tsc": {"value": 5}}})
    assert "val_loss" in text and "78.00 ± 0.9" in text and text.splitlines()[1].split() == ["val_loss", "1.23", "-"]
