"""bench.py: both sides run and are counted alike; the memory that it counts is the memory there is.

Who is faster is not asked here: that needs a machine with nothing else to do.
"""
import json

import numpy as np
import pytest
import torch
from conftest import run
from test_train import SHAPE, tiny

from dev.bench import (
    BenchDpo,
    BenchTrain,
    our_dpo,
    our_training,
    peer_batch,
    peer_dpo,
    peer_model,
    peer_scores,
    peer_training,
)
from slam.packing import collate, cut
from slam.scoring import pair_nlls
from slam.units import UnitReader, to_tokens
from train import build


def case(*args) -> list[dict]:
    return [json.loads(line) for line in run("dev/bench.py", *args).stdout.splitlines()]


def ratio_is_right(x: dict) -> bool:
    """Within what rounding to 0.1 allows; on a slow machine that is much of a few pairs/s."""
    return (x["ours"] - 0.05) / (x["peer"] + 0.05) - 0.01 < x["ratio"] < (x["ours"] + 0.05) / (x["peer"] - 0.05) + 0.01


def test_the_peer_computes_the_same_model(corpus):
    """Trained on the same few utterances, with one learning rate, both sides end at the same weights."""
    cfg = BenchTrain(train=(str(corpus / "val"),), val=("x",), shape=SHAPE, context=64, micro_batch=1, batch_tokens=64,
                     peer_micro_batch=1, lr=1e-3, dtype="float32", seed=0)
    reader, device = UnitReader(corpus / "val"), torch.device("cpu")
    reader.lengths, reader.n_tokens = reader.lengths[:1], int(reader.lengths[0])  # one utterance: one chunk, one row
    torch.manual_seed(0)
    lm = build(cfg, 22)
    peer, before = peer_training(cfg, reader, lm, device), [p.clone() for p in lm.parameters()]
    ours = our_training(cfg, reader, lm, device)
    assert ours() == reader.n_tokens - 1
    assert peer() == (reader.n_tokens - 1) * round(64 / (reader.n_tokens - 1))  # as often as fits our step
    hf = peer.__closure__[[*peer.__code__.co_freevars].index("hf")].cell_contents
    theirs = dict(hf.named_parameters())
    for (name, p), old in zip(lm.named_parameters(), before):
        torch.testing.assert_close(p, theirs[name], atol=2e-5, rtol=1e-3)
        assert not torch.equal(p, old)


def test_the_peer_padded_or_packed_has_our_loss(corpus):
    """On chunks with a border inside an utterance: transformers' loss of the peer's batch, and ours of a full row."""
    reader, lm = UnitReader(corpus / "val"), tiny().eval()
    chunks = cut(reader.lengths[:6], 24)
    assert (chunks[:, 1] > 0).any() and len({*chunks[:, 2]}) > 2
    n, hf = int(chunks[:, 2].sum()), peer_model(lm).eval()
    tokens, targets, positions = collate(reader, [chunks], n)
    ours = lm(tokens, targets, positions)[1].item()
    padded, packed = (peer_batch(reader, chunks, packed) for packed in (False, True))
    assert padded["input_ids"].shape == (len(chunks), 25) and packed["input_ids"].shape == (1, n + len(chunks))
    for batch in (padded, packed):
        assert (batch["labels"][:, 1:] != -100).sum() == n
        assert hf(**batch, use_cache=False, num_items_in_batch=n).loss.item() == pytest.approx(ours, rel=1e-5)


def test_the_peer_in_dpo_computes_the_same_step():
    from test_dpo import some_pairs
    cfg, pairs = BenchDpo(context=64, batch_pairs=8, micro_batch=2, lr=1e-2, dtype="float32"), some_pairs(12)
    lm = tiny()
    ours, peer = our_dpo(cfg, lm, pairs, first_epoch=True), peer_dpo(cfg, lm, pairs)
    weights = []
    for step, name in ((ours, "lm"), (peer, "policy")):
        assert step() == 8
        model = step.__closure__[[*step.__code__.co_freevars].index(name)].cell_contents
        weights.append(dict(model.named_parameters()))
    for name, p in weights[0].items():
        assert not torch.equal(p, lm.get_parameter(name))
        torch.testing.assert_close(p, weights[1][name], atol=2e-4, rtol=1e-3)


def test_dpo_reports_its_case(runs, stories):
    found, = case("dpo", f"--checkpoint={runs}/lm", f"--pairs={stories}/pairs_train.jsonl", "--batch_pairs=2",
                  "--rounds=1", "--trl=false")
    assert found["unit"] == "pairs/s" and ratio_is_right(found)
    assert found["ours_gb"] > 0 and found["peer_gb"] > 0


def test_the_peer_in_scoring_computes_the_same(runs):
    from conftest import markov
    lm = tiny().eval()
    pairs = [tuple(map(to_tokens, markov(2, np.random.default_rng(i)))) for i in range(9)]
    theirs = [peer_scores(peer_model(lm), side) for side in zip(*pairs)]
    assert np.array(theirs).T == pytest.approx(pair_nlls(lm, pairs, 64), rel=1e-4)


def test_scoring_reports_its_cases(runs, stories):
    pytest.importorskip("sklearn")
    found = case("eval", f"--checkpoint={runs}/lm", f"--manifest={stories}/tstorycloze", "--pairs=2", "--rounds=1")
    assert [x["case"] for x in found] == ["eval from units", "eval from audio", "eval from audio, again"]
    assert all(x["ours"] > 0 and x["peer"] > 0 and x["pairs"] == 2 for x in found)
    assert all(map(ratio_is_right, found))


def test_training_and_generation_report_their_cases(corpus):
    shape = f"--shape={json.dumps(SHAPE)}"
    found, = case("train", f"--train={corpus / 'train'}", f"--val={corpus / 'val'}", shape, "--context=64",
                  "--micro_batch=2", "--batch_tokens=256", "--rounds=2", "--dtype=float32")
    assert found["case"] == "train" and ratio_is_right(found)
    small = f"--shape={json.dumps(SHAPE | {'vocab_size': 60})}"
    found = case("generate", small, "--batches=1,3", "--prompt_units=5", "--max_new_tokens=8", "--rounds=1")
    assert [x["batch"] for x in found] == [1, 3] and all(x["ours"] > 0 and x["peer"] > 0 for x in found)


def test_memory_is_counted():
    """Against arithmetic, for a shape whose weights outweigh the rest."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 40_000}
    plain, = case("memory", f"--shape={json.dumps(shape)}", "--context=64", "--micro_batch=2", "--batch_tokens=128")
    n = plain["parameters"]
    assert plain["weights_and_gradients_gb"] == pytest.approx(8 * n / 1e9, abs=0.01)
    assert plain["optimizer_gb"] == pytest.approx(8 * n / 1e9, abs=0.01)
    saved, = case("memory", f"--shape={json.dumps(shape)}", "--context=64", "--micro_batch=2", "--batch_tokens=128",
                  "--activation_checkpointing", "--dtype=pure_bfloat16")
    assert saved["weights_and_gradients_gb"] == pytest.approx(4 * n / 1e9, abs=0.01)
    assert 0 < saved["activations_gb_per_row"] < plain["activations_gb_per_row"]


def test_units_are_the_peers(stories, tmp_path):
    """From one file at a time both sides get the same units; in a padded batch the peer does not."""
    pytest.importorskip("sklearn")
    from test_tokenizer import hubert

    from dev.bench import peer_units
    from slam.audio import load_audio
    from slam.tokenizer import SpeechTokenizer, load_encoder, write_codebook
    hubert(tmp_path / "hubert")
    paths = sorted((stories / "audio").glob("*.flac"))[:3]
    features = load_encoder(str(tmp_path / "hubert"), 3)([load_audio(paths[0])])[0]
    write_codebook(tmp_path / "book.safetensors", {"centroids": features[::5][:50].clone()},
                   {"encoder": tmp_path / "hubert", "layer": 3, "unit_rate_hz": 25.0})
    tokenizer = SpeechTokenizer.load(f"{tmp_path}/book.safetensors")
    ours = [tokenizer.encode(load_audio(p), 16_000)[0].tolist() for p in paths]
    for path, units in zip(paths, ours):
        assert peer_units(tokenizer, [path], tmp_path / "peer.jsonl")() == pytest.approx(len(load_audio(path)) / 16_000)
        assert json.loads((tmp_path / "peer.jsonl").read_text())["units"] == units
    peer_units(tokenizer, paths, tmp_path / "peer.jsonl")()
    together = [json.loads(line)["units"] for line in (tmp_path / "peer.jsonl").read_text().splitlines()]
    assert sorted(together) != sorted(ours)


def test_speech_to_units_reports_its_case(stories):
    pytest.importorskip("sklearn")
    found, = case("units", f"--input={stories / 'audio'}", "--files=3", "--rounds=1", "--hour=false")
    assert found["unit"] == "x real time" and found["ours"] > 0 and found["files"] == 3
    assert found["stages"].keys() == {"decode", "encode", "assign", "write"}


def test_units_to_speech_reports_its_case():
    found = case("vocoder", "--seconds=2,0.5", "--rounds=1")
    assert [x["seconds"] for x in found] == [2, 0.5] and all(x["ours"] > 0 and x["peer"] > 0 for x in found)
    assert found[0]["parameters"]["peer"] > 10e6  # HiFi-GAN V1 has 14M
