"""bench.py: both sides run and are counted alike; the memory that it counts is the memory there is."""
import json

import pytest
import torch
from conftest import run
from test_train import SHAPE

from bench import BenchTrain, our_training, peer_training
from train import build
from units import UnitReader


def case(*args) -> list[dict]:
    return [json.loads(line) for line in run("bench.py", *args).stdout.splitlines()]


def test_the_peer_computes_the_same_model(corpus):
    """Trained on the same few utterances, with one learning rate, both sides end at the same weights."""
    cfg = BenchTrain(train=(str(corpus / "val"),), val=("x",), shape=SHAPE, context=64, micro_batch=1, batch_tokens=64,
                     lr=1e-3, dtype="float32", seed=0)
    reader, device = UnitReader(corpus / "val"), torch.device("cpu")
    reader.lengths, reader.n_tokens = reader.lengths[:1], int(reader.lengths[0])  # one utterance: one chunk, one row
    torch.manual_seed(0)
    lm = build(cfg, 20)
    peer, before = peer_training(cfg, reader, lm, device), [p.clone() for p in lm.parameters()]
    ours = our_training(cfg, reader, lm, device)
    assert ours() == peer() == reader.n_tokens - 1
    hf = peer.__closure__[[*peer.__code__.co_freevars].index("hf")].cell_contents
    theirs = dict(hf.named_parameters())
    for (name, p), old in zip(lm.named_parameters(), before):
        torch.testing.assert_close(p, theirs[name], atol=2e-5, rtol=1e-3)
        assert not torch.equal(p, old)


def test_training_and_generation_report_their_cases(corpus):
    shape = f"--shape={json.dumps(SHAPE)}"
    found, = case("train", f"--train={corpus / 'train'}", f"--val={corpus / 'val'}", shape, "--context=64",
                  "--micro_batch=2", "--batch_tokens=256", "--rounds=2", "--dtype=float32")
    assert found["case"] == "train" and found["ratio"] == pytest.approx(found["ours"] / found["peer"], abs=0.01)
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
                  "--checkpointing", "--dtype=pure_bfloat16")
    assert saved["weights_and_gradients_gb"] == pytest.approx(4 * n / 1e9, abs=0.01)
    assert 0 < saved["activations_gb_per_row"] < plain["activations_gb_per_row"]
