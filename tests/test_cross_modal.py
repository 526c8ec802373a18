"""slam/cross_modal.py: losses of each kind, four directions, answers in text; preference tuning of a mixed model."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_interleave import FINGERPRINT, PLAIN, SHAPE, VOCABULARY, reader  # noqa: F401
from test_scoring import logp_alone

from dpo import Config, completion_logps, prefix_pair
from model import ModelConfig, UnitLM
from slam.benchmarks import read_manifest, tokenize_pairs
from slam.cross_modal import (
    answer_in_text,
    cut_prompt,
    directions,
    losses_by_kind,
    split_at_last_sentence,
    tokenize_parts,
)
from slam.interleave import INTERLEAVED, Mixed, TextTokenizer
from slam.scoring import PrefixPair, pair_nlls
from slam.speech import continue_units
from slam.tokenizer import SpeechTokenizer
from slam.units import read_pairs, to_tokens, write_pairs


def test_losses_by_kind_by_hand(reader):  # noqa: F811
    torch.manual_seed(0)
    mixed = Mixed(reader, (0.3, 0.2, 0.5), seed=3)
    lm = UnitLM(ModelConfig(vocab_size=FINGERPRINT.vocab_size, **SHAPE)).eval()
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
    decode = TextTokenizer("embedded:smollm2-135m").tokenizer.decode
    assert fingerprint.vocab_size == 24 + 49152
    texts, parts = [("It rained. He ran.", "It rained. He sang.")], [[[2, 3], [4, 5], [6]]]
    found = directions(texts, parts, fingerprint)
    a, b = found["speech_to_text"][0]
    assert a[:5] == b[:5] == [1, 22, 4, 5, 23] and a[-1] == b[-1] == 1
    assert [decode([t - 24 for t in x[5:-1]]) for x in (a, b)] == [" He ran.", " He sang."]
    a, b = found["text_to_speech"][0]
    assert a[:2] == b[:2] == [1, 23] and a[-4:] == [22, 6, 7, 1] and b[-3:] == [22, 8, 1]
    assert decode([t - 24 for t in a[2:-4]]) == decode([t - 24 for t in b[2:-3]]) == "It rained."
    assert [decode([t - 24 for t in x[1:-1]]) for x in found["text_to_text"][0]] == ["It rained. He ran.",
                                                                                   "It rained. He sang."]
    assert list(directions(texts, [], fingerprint)) == ["text_to_text"]
    without = directions(texts, parts, fingerprint, eos=False)
    assert all(x + [1] == y for name in found for x, y in zip(without[name][0], found[name][0]))


def test_the_prompt_is_spoken_whole_and_the_endings_alone(stories, voice):
    """Encoders look ahead, so that units of two sides part within the prompt, where their waves are still the same."""
    benchmark, tokenizer = read_manifest(stories / "tstorycloze"), SpeechTokenizer.load("embedded")
    texts = [(p["positive_text"], p["negative_text"]) for p in benchmark.pairs]
    parts = tokenize_parts(tokenizer, benchmark, texts, "none is needed")
    assert len(parts) == len(texts) and parts == tokenize_parts(tokenizer, benchmark, texts, "none is needed")
    for (prompt, *endings), pair, sides in zip(parts, texts, tokenize_pairs(tokenizer, benchmark)):
        given, *rest = split_at_last_sentence(*pair)
        for side, ending, text in zip(sides, endings, rest):
            assert abs(len(prompt) + len(ending) - len(side) + 2) < 0.05 * len(side)
            assert 0.5 < (len(prompt) / len(ending)) / (len(given) / len(text)) < 2  # as long as they are written
    assert any(len(PrefixPair.of(*sides)[0]) < 0.9 * len(prompt) for (prompt, *_), sides in zip(
        parts, tokenize_pairs(tokenizer, benchmark)))
    single = [("He runs.", "He run.")] * len(texts)
    assert tokenize_parts(tokenizer, benchmark, single, "none is needed") == []
    # Sides that were spoken as a whole share no sample: Whisper finds the first word of the endings.
    said = [voice(x) for x in ("The rabbit found a golden apple.", "He ate it at once.", "The boat sank.")]
    given, a, b = (x[slice(*np.flatnonzero(np.abs(x) > 0.02)[[0, -1]])] for x in said)  # without silence around them
    pair = [np.concatenate([given, a]), 0.9 * np.concatenate([given, b])]
    texts = "The rabbit found a golden apple. He ate it at once.", "The rabbit found a golden apple. The boat sank."
    prompt, *endings = cut_prompt(*pair, texts, "embedded:whisper-tiny.en")
    assert abs(len(prompt) - len(given)) < 0.3 * 16_000
    assert all(abs(len(x) - len(y)) < 0.3 * 16_000 for x, y in zip(endings, (a, b)))


def test_answers_are_text():
    fingerprint = TextTokenizer("embedded:smollm2-135m").fingerprint(PLAIN)
    torch.manual_seed(0)
    lm = UnitLM(ModelConfig(vocab_size=24 + 49152, first_text_token=24, **SHAPE)).eval()
    answers = answer_in_text(lm, [[3, 4], [5]], fingerprint, 8, seed=0, top_k=50)
    assert len(answers) == 2 and all(isinstance(x, str) and x for x in answers)
    assert answers == answer_in_text(lm, [[3, 4], [5]], fingerprint, 8, seed=0, top_k=50)


@pytest.fixture(scope="module")
def mixed(stories, tmp_path_factory):
    """A run on a mix of the four held-out stories, of 500 units and SmolLM2's 49,152 text tokens."""
    out = tmp_path_factory.mktemp("mixed")
    run("-m", "slam.alignment", f"--units={stories}/units/val", f"--audio={stories}/audio", "--suffix=.flac",
        "--text_lm=embedded:smollm2-135m", f"--out={out}/words")
    run("train.py", f"--train={out}/words", f"--val={out}/words", "--mix=1,1,1", f"--shape={json.dumps(SHAPE)}",
        "--context=512", "--micro_batch=1", "--batch_tokens=512", "--steps=10", "--lr=1e-2", "--dtype=float32",
        f"--out={out}/lm")
    return out / "lm"


def test_preference_tuning(mixed, stories, tmp_path):
    """On pairs of units: losses and reference by hand, margins rise, and text and both tokenisers are still there."""
    for name in ("pairs_train.jsonl", "pairs_val.jsonl"):  # a few, short ones: a row of logits has 49,656 columns
        fingerprint, found = read_pairs(stories / name)
        write_pairs(tmp_path / name, fingerprint, [p | {"prompt": p["prompt"][-30:]} for p in found[:3]])
    run("dpo.py", f"--checkpoint={mixed}", f"--pairs={tmp_path}/pairs_train.jsonl", "--steps=8", "--batch_pairs=3",
        "--micro_batch=2", "--lr=5e-3", "--warmup=0.1", "--log_every=1", "--n_samples=0", "--dtype=float32",
        f"--out={tmp_path}/dpo")
    folders = [mixed / "checkpoint", tmp_path / "dpo" / "checkpoint"]
    theirs, ours = ([json.loads((f / name).read_text()) for f in folders] for name in ("config.json", "slam.json"))
    assert theirs[0] == theirs[1] and theirs[0]["first_text_token"] == 504
    assert ours[0]["fingerprint"] == ours[1]["fingerprint"] and ours[1]["fingerprint"]["text_vocab"] == 49_152
    before, after = (UnitLM.from_pretrained(str(f)).eval().requires_grad_(False) for f in folders)

    # log-probabilities are over units and text: token by token, by dpo.py, and by what eval.py scores with
    pairs = {s: [prefix_pair(x, 1024) for x in read_pairs(tmp_path / f"pairs_{s}.jsonl")[1]] for s in ("train", "val")}
    cfg, logps = Config(dtype="float32"), {}
    for split, lm in itertools.product(pairs, (before, after)):
        logps[split, lm] = completion_logps(lm, pairs[split], cfg, "x")
        alone = [[logp_alone(lm, p.prefix, side) for side in (p.first, p.second)] for p in pairs[split]]
        torch.testing.assert_close(logps[split, lm], torch.tensor(alone), atol=1e-2, rtol=1e-4)
        nll = pair_nlls(lm, [(p.prefix + p.first, p.prefix + p.second) for p in pairs[split]], 1024, "sum")
        torch.testing.assert_close(logps[split, lm].double().diff(dim=1), -torch.tensor(nll).diff(dim=1), atol=1e-2,
                                   rtol=1e-4)
    for split in pairs:
        saved, = tmp_path.glob(f"pairs_{split}.jsonl.reference-*.npy")
        torch.testing.assert_close(torch.from_numpy(np.load(saved)), logps[split, before], atol=1e-2, rtol=1e-4)
    h = {s: -(logps[s, after] - logps[s, before]).diff(dim=1)[:, 0] for s in pairs}
    records = [json.loads(x) for x in (tmp_path / "dpo" / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records if "loss" in r][0] == pytest.approx(math.log(2), abs=1e-3)
    assert records[-1]["val_dpo_loss"] == pytest.approx(-F.logsigmoid(0.1 * h["val"]).mean().item(), abs=1e-3)
    assert (h["train"] > 0).all(), h

    # with tied embeddings the softmax moves the rows of text tokens too, and AdamW no further than the learning rate
    moved = (after.model.embed_tokens.weight - before.model.embed_tokens.weight).detach().abs()
    assert 0 < moved[504:].mean() and moved.max() < 8 * 5e-3 * 1.1
    print(f"units {moved[2:502].mean():.1e}, markers {moved[502:504].mean():.1e}, text {moved[504:].mean():.1e}")

    trained = json.loads((mixed / "results.json").read_text())
    run("eval.py", f"--checkpoint={mixed},{tmp_path}/dpo", f"--manifest={stories}/tstorycloze",
        f"--val={mixed.parent}/words", "--context=512")
    results = [json.loads((folder / "results.json").read_text()) for folder in (mixed, tmp_path / "dpo")]
    names = ["tstorycloze", *(f"tstorycloze_{x}" for x in ("speech_to_text", "text_to_speech", "text_to_text"))]
    assert all(r[x]["n"] == 4 for r in results for x in names)
    losses = [name for name in trained if name.startswith("val_") and not name.endswith("before_training")]
    assert len(losses) == 9 and all(results[0][x]["value"] == pytest.approx(trained[x]["value"]) for x in losses)
    print(f"loss of text before and after: {', '.join(str(r['val_loss_text']['value']) for r in results)}")
    assert results[1]["val_loss_text"]["value"] != results[0]["val_loss_text"]["value"]


def test_a_mixed_model_continues_speech_in_units(mixed, stories, tmp_path):
    """Neither text nor markers, which it would draw, come from what sample.py, GenPPL and `dpo.py pairs` call."""
    lm = UnitLM.from_pretrained(str(mixed / "checkpoint")).eval()
    prompt, how = [3, 17, 400], dict(temperature=3.0, top_k=0)
    drawn = lm.generate([to_tokens(prompt)[:-1]] * 4, 50, generator=torch.Generator().manual_seed(0), **how)
    assert sum(t >= 502 for row in drawn for t in row) > 50
    assert all(0 <= u < 500 for row in continue_units(lm, [prompt] * 4, 50, 4, 0, "", **how) for u in row)
    run("dpo.py", "pairs", f"--checkpoint={mixed}", f"--prompts={stories}/pairs_val.jsonl", f"--out={tmp_path}/own",
        "--n_prompts=1", "--n=2", "--n_val=0", "--new_units=30", "--temperature=3", "--top_k=0", "--min_gap=0",
        "--min_words=0", "--max_auto_bleu=2", check=False)  # whether Whisper hears words in them is left open
    made = [json.loads(x) for x in (tmp_path / "own" / "candidates.jsonl").read_text().splitlines()[1:]]
    units = [u for x in made for c in x["candidates"] for u in c["units"]]
    assert len(made) == 1 and len(units) > 10 and max(units) < 500
