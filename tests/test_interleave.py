"""slam/interleave.py: mixed rows as a pure function of (seed, epoch, utterance), and training on them."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, run, start

from config import load_config
from model import UnitLM
from slam.interleave import (
    INTERLEAVED,
    SPEECH,
    TEXT,
    Mixed,
    MixedRows,
    TextTokenizer,
    Vocabulary,
    chunk_spans,
    interleave,
    poisson_spans,
)
from slam.packing import Loader, collate
from slam.units import IGNORE, Fingerprint, UnitReader, UnitWriter
from train import Config, build

PLAIN = Fingerprint("x", 3, 25.0, 20, True, "ab")
FINGERPRINT = Fingerprint("x", 3, 25.0, 20, True, "ab", "text", 30, "cd")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8)
VOCABULARY = Vocabulary(FINGERPRINT)  # 22 <speech>, 23 <text>, text token t is 24 + t


def test_vocabulary():
    assert (VOCABULARY.speech, VOCABULARY.text, VOCABULARY.first_text, FINGERPRINT.vocab_size) == (22, 23, 24, 54)


def test_interleave_by_hand():
    units, text = np.array([5, 6, 7]), np.array([9, 8, 7, 6])
    words = np.array([[0, 0], [1, 2], [3, 2]])  # the second word has no unit of its own
    for spoken, expected in (([0, 0, 1], [1, 23, 33, 32, 31, 22, 9, 1]), ([1, 1, 1], [1, 22, 7, 8, 9, 1]),
                             ([0, 0, 0], [1, 23, 33, 32, 31, 30, 1]), ([1, 0, 0], [1, 22, 7, 8, 23, 32, 31, 30, 1]),
                             ([1, 0, 1], [1, 22, 7, 8, 23, 32, 31, 22, 9, 1])):
        assert interleave(units, text, words, np.array(spoken, bool), VOCABULARY).tolist() == expected


def test_spans():
    rng = np.random.default_rng(0)
    shares = [poisson_spans(200, rng, 0.3).mean() for _ in range(200)]
    assert min(shares) >= 0.3 and np.mean(shares) < 0.35  # a span ends above the share, by half of its length or so
    assert all(0 < poisson_spans(n, rng, 0.3).sum() <= n for n in range(1, 20))
    padded = np.pad([poisson_spans(200, rng, 0.3) for _ in range(500)], ((0, 0), (1, 1)))
    begins, ends = (np.flatnonzero(np.diff(padded.astype(int)) == sign) for sign in (1, -1))
    assert 9.4 < np.mean(ends - begins) < 10.1  # SlamKit's function: 9.75; spans that may merge: 12.1
    spoken = np.concatenate([[False], chunk_spans(2000, rng), [False]]).astype(int)
    lengths = np.flatnonzero(np.diff(spoken) == -1) - np.flatnonzero(np.diff(spoken) == 1)
    assert lengths[1:-1].min() >= 5 and lengths.max() <= 15


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Eighty utterances of 3 to 40 words; of 1 to 3 text tokens and 0 to 6 units a word."""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(1)
    with UnitWriter(folder, FINGERPRINT, durations=True, shard_tokens=3000) as writer:
        for i in range(80):
            n = int(rng.integers(3, 40))
            text, units = (np.cumsum([0, *x]) for x in (rng.integers(1, 4, n), rng.integers(0, 7, n)))
            units[-1] = max(units[-1], 1)
            tokens = rng.integers(0, 20, units[-1])
            writer.add(f"u{i}", tokens, np.ones_like(tokens), text_tokens=rng.integers(0, 30, text[-1]),
                       words=np.stack([text[:-1], np.minimum(units[:-1], units[-1])], 1))
    return UnitReader(folder)


def test_files_with_words(reader, tmp_path):
    assert len(reader.shards) > 1 and reader.fingerprint == FINGERPRINT and not list(reader.shards[0].problems())
    for i in range(len(reader)):
        text, words = reader.words(i)
        assert words[0].tolist() == [0, 0] and words[-1, 0] < len(text) and words[-1, 1] <= len(reader.units(i))
    with UnitWriter(tmp_path, PLAIN) as writer:
        writer.add("a", [1, 2], None)
    plain = UnitReader(tmp_path)
    assert plain.shards[0].header["fingerprint"] == {k: v for k, v in FINGERPRINT.to_dict().items() if k[:5] != "text_"}
    UnitReader(tmp_path, reader.shards[0].path)  # their units are the same
    for there in (plain, UnitReader(reader.shards[0].path, tmp_path)):
        with pytest.raises(SystemExit, match="has no words"):
            Mixed(there, (1, 1, 1), 0)
    with pytest.raises(SystemExit, match="with words and without"):
        UnitWriter(tmp_path, FINGERPRINT)
    with pytest.raises(SystemExit, match=f"{tmp_path}: no tokenizer of a text LM there"):
        TextTokenizer(str(tmp_path))


@pytest.mark.parametrize("spans", ["poisson", "chunks"])
def test_every_form_holds_the_whole_utterance(reader, spans):
    mixed = Mixed(reader, (0.3, 0.2, 0.5), seed=3, spans=spans)
    for i in range(len(reader)):
        text, words = reader.words(i)
        assert (mixed.form(i, SPEECH, 0) == reader.tokens(i)).all()
        assert mixed.form(i, TEXT, 0).tolist() == [1, *(text + 24), 1]
        x = mixed.form(i, INTERLEAVED, 0)
        spoken = poisson_spans(len(words), np.random.default_rng((3, 0, i, 1)), 0.3) if spans == "poisson" else \
            chunk_spans(len(words), np.random.default_rng((3, 0, i, 1)))
        bounds = np.concatenate([words, [[len(text), len(reader.units(i))]]])
        expected = []  # word by word: each is there once, as text or as units
        for w, said in enumerate(spoken):
            if w == 0 or said != spoken[w - 1]:
                expected.append(22 if said else 23)
            content, column = (reader.units(i) + 2, 1) if said else (text + 24, 0)
            expected += content[bounds[w, column]:bounds[w + 1, column]].tolist()
        assert x.tolist() == [1, *expected, 1]


def test_shares_of_tokens(reader):
    mixed = Mixed(reader, (0.25, 0.2, 0.55), seed=3)
    counts = np.zeros(3)
    for number in range(40 * len(reader)):
        epoch, i = divmod(number, len(reader))
        kind = mixed.kinds(epoch)[i]
        assert (mixed.tokens(number) == mixed.form(i, kind, epoch)).all()
        counts[kind] += len(mixed.tokens(number))
    assert np.abs(counts / counts.sum() - [0.25, 0.2, 0.55]).max() < 0.03
    forms = {tuple(mixed.form(5, INTERLEAVED, epoch)) for epoch in range(20)}
    assert len(forms) > 5  # made anew every epoch


def test_rows_are_a_pure_function_of_the_step_and_hold_every_token_once(reader):
    mixed = Mixed(reader, (0.3, 0.2, 0.5), seed=3)
    rows = MixedRows(mixed, context=64, rows_per_step=4, seed=7)
    steps = [rows.step(s) for s in range(60)]
    assert rows.epochs[-1][0] >= 2
    again = MixedRows(mixed, 64, 4, 7)
    assert [x.tolist() for x in again.step(50)[0]] == [x.tolist() for x in steps[50][0]]
    assert [x.tolist() for x in again.step(49)[0]] == [x.tolist() for x in steps[49][0]]  # a step back
    few = MixedRows(mixed, 4096, 12, 7)  # several epochs a step; a step is made again once the next one is
    before = [few.step(0), few.step(1)]
    assert [x.tolist() for x in few.step(0)[0]] == [x.tolist() for x in before[0][0]]
    halves = [MixedRows(mixed, 64, 4, 7, rank, 2).step(9) for rank in range(2)]
    assert [h[1] for h in halves] == [steps[9][1]] * 2
    assert sorted(str(r) for h in halves for r in h[0]) == sorted(map(str, steps[9][0]))
    chunks = np.concatenate([row for s in steps for row in s[0]])
    first = chunks[chunks[:, 0] < len(reader)]
    assert first[:, 2].sum() == sum(len(mixed.tokens(i)) - 1 for i in range(len(reader)))
    x, y, positions = collate(mixed, steps[3][0], 64)
    for number, at, length in steps[3][0][0][:1].tolist():
        tokens = mixed.tokens(number)[at:at + length + 1]
        assert x[0, :length].tolist() == tokens[:-1].tolist() and y[0, :length].tolist() == tokens[1:].tolist()
    loader = Loader(mixed, MixedRows(mixed, 64, 4, 7), 2, torch.device("cpu"))
    batches, n = loader.step(3)
    assert n == steps[3][1] == sum(int((b[1] != IGNORE).sum()) for b in batches)


def test_the_text_keeps_its_positions():
    """By the rotary base of the text LM, SmolLM2's here, not that of the unit LMs."""
    for name in ("slam_interleaved", "demo_interleaved"):
        cfg = load_config(Config, [f"{ROOT}/config/{name}.py", "--n_layers=1"])
        assert cfg.rope_theta is None
    assert build(cfg, 504 + 49_152).config.rope_theta == 100_000


def test_views(reader):
    mixed = Mixed(reader, (0.3, 0.2, 0.5), seed=3)
    assert mixed.view(TEXT).lengths.tolist() == [len(reader.words(i)[0]) + 2 for i in range(len(reader))]
    for view in (mixed.view(kind) for kind in (SPEECH, TEXT, INTERLEAVED)):
        assert view.lengths.tolist() == [len(view.tokens(i)) for i in range(len(reader))]


def test_training_on_a_mix(reader, tmp_path):
    """Every kind is learnt; a run that was stopped goes on bit-equal, into the next epoch."""
    folder = reader.shards[0].path.parent
    args = [f"--train={folder}", f"--val={folder}", "--mix=0.3,0.2,0.5", f"--shape={json.dumps(SHAPE)}", "--context=64",
            "--micro_batch=4", "--batch_tokens=1024", "--dtype=float32", "--lr=1e-2", "--log_every=10"]
    run("train.py", *args, "--steps=40", f"--out={tmp_path}/whole")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    for kind in ("speech", "text", "interleaved_speech", "interleaved_text"):
        assert results[f"val_loss_{kind}"]["value"] < results[f"val_loss_{kind}_before_training"]["value"] - 0.2
    checkpoint = UnitLM.from_pretrained(f"{tmp_path}/whole/checkpoint")
    assert checkpoint.config.vocab_size == FINGERPRINT.vocab_size
    assert checkpoint.config.first_text_token == VOCABULARY.first_text
    log = tmp_path / "halves" / "log.jsonl"
    killed = start("train.py", *args, "--steps=40", f"--out={tmp_path}/halves", "--save_every=15")
    killed.until(lambda: log.exists() and '"step": 20' in log.read_text())
    killed.kill()
    killed.wait(60)
    run("train.py", *args, "--steps=40", f"--out={tmp_path}/halves", "--save_every=15", "--resume")
    again = UnitLM.from_pretrained(f"{tmp_path}/halves/checkpoint").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in checkpoint.state_dict().items())
    slam = json.loads((tmp_path / "whole" / "checkpoint" / "slam.json").read_text())
    assert slam["fingerprint"] == FINGERPRINT.to_dict()
    assert "keep_text and keep_text_random are for a mix" in refused(
        "train.py", f"--train={folder}", f"--val={folder}", "--mix=1,1,1")
    assert "three shares" in refused("train.py", f"--train={folder}", f"--val={folder}", "--mix=1,1",
                                     "--init=keep_text")
    assert "between 0 and 1" in refused("train.py", *args, "--spoken_share=30")
    assert "its text tokens are not those of" in refused(
        "train.py", f"--train={folder}", f"--val={folder}", "--mix=1,1,1", "--init=keep_text", f"--out={tmp_path}/x",
        "--steps=1", "--base=embedded:smollm2-135m")
