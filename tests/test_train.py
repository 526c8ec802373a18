"""train.py: packing, order, schedule, accumulation, resume."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import N_UNITS, ROOT, refused, run

from model import IGNORE, ModelConfig, UnitLM
from train import Config, Rows, autocast, collate, cut, make_optimizer, pack, schedule, train_step, validation_loss
from units import UnitReader, UnitWriter

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8)


def tiny(seed=0) -> UnitLM:
    torch.manual_seed(seed)
    return UnitLM(ModelConfig(vocab_size=N_UNITS + 2, **SHAPE))


def flags(corpus, out, **more) -> list[str]:
    settings = dict(out=out, train=corpus / "train", val=corpus / "val", shape=json.dumps(SHAPE), context=64,
                    micro_batch=2, accumulation=2, steps=12, log_every=1, save_every=4, eval_every=6, lr=1e-2,
                    dtype="float32")
    return [f"--{k}={v}" for k, v in (settings | more).items()]


def test_every_token_but_bos_is_a_target_once(corpus):
    reader = UnitReader(corpus / "train")
    rows = pack(cut(reader.lengths, 32), 32, np.random.default_rng(0))
    tokens, targets, positions = collate(reader, rows, 32)
    seen = Counter(targets[targets != IGNORE].tolist())
    expected = Counter(t for i in range(len(reader)) for t in reader.tokens(i)[1:].tolist())
    assert seen == expected and seen[1] == len(reader)  # 1: EOS, once an utterance
    # what is predicted is what comes next, and an utterance's start is never predicted
    inner = (targets[:, :-1] != IGNORE) & (positions[:, 1:] > 0)
    assert torch.equal(targets[:, :-1][inner], tokens[:, 1:][inner])
    fill = (targets != IGNORE).float().mean()
    assert fill > 0.95
    assert positions.max() < 32 and all(len(r) and sum(p.length for p in r) <= 32 for r in rows)


def test_order_is_a_pure_function_of_seed_step_and_rank(corpus):
    reader = UnitReader(corpus / "train")
    a, b = Rows(reader, 64, 8, seed=3), Rows(reader, 64, 8, seed=3)
    assert [b.step(s) for s in (70, 5, 30)] == [a.step(s) for s in (70, 5, 30)]
    assert Rows(reader, 64, 8, seed=4).step(0) != a.step(0)
    halves = [Rows(reader, 64, 8, 3, rank, 2).step(30) for rank in (0, 1)]
    assert [row for two in zip(*halves) for row in two] == a.step(30)
    n = len(a.rows)
    epoch = [tuple(a.row(i)) for i in range(n, 2 * n)]
    assert sorted(epoch, key=str) == sorted(map(tuple, a.rows), key=str)
    assert epoch != [tuple(a.row(i)) for i in range(n)]


def test_schedule_equals_transformers():
    from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_inverse_sqrt_schedule
    total, warm = 200, 20
    for kind, make, more in (
            ("cosine", get_cosine_with_min_lr_schedule_with_warmup, {"num_training_steps": total, "min_lr_rate": 0.05}),
            ("inverse_sqrt", get_inverse_sqrt_schedule, {})):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = make(optimizer, warm, **more)
        for step in range(total):
            assert schedule(kind, step / total, warm / total, 0.05) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
            optimizer.step()
            theirs.step()
    assert schedule("wsd", 0.5, 0.1, 0.05) == 1 and schedule("wsd", 1.0, 0.1, 0.05) == pytest.approx(0.05)


def test_accumulation_and_packing_change_nothing(corpus):
    """The same utterances in other rows and micro-batches give the same loss and the same step."""
    reader = UnitReader(corpus / "train")
    pieces = cut(reader.lengths, 64)[:24]
    results = []
    alone = [[p] for p in pieces]
    for micro_batch, rows in ((8, pack(pieces, 64, None)), (1, alone), (3, alone[::-1])):
        lm = tiny()
        cfg = Config(context=64, micro_batch=micro_batch, dtype="float32", clip=1e9, lr=1e-3)
        optimizer = make_optimizer(lm, cfg)
        loss, norm, n = train_step(lm, lm, optimizer, reader, rows, cfg, 1e-3)
        results.append((loss.item(), norm.item(), n))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4)


def test_validation_loss_by_hand(corpus):
    reader, lm = UnitReader(corpus / "val"), tiny().eval()
    loss, n = validation_loss(lm, reader, 64, 4, "float32")
    total = 0.0
    with torch.no_grad():
        for i in range(len(reader)):
            x = torch.from_numpy(reader.tokens(i).astype(np.int64))[None]
            total += lm(x[:, :-1], x[:, 1:], reduction="sum")[1].item()
    assert n == reader.n_tokens - len(reader)
    assert loss == pytest.approx(total / n, rel=1e-5)


def test_bf16_autocast_keeps_fp32_weights(corpus):
    lm = tiny()
    with autocast(torch.device("cpu"), "bfloat16"):
        logits, _ = lm(torch.ones(1, 4, dtype=torch.long))
    assert logits.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in lm.parameters())


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    run("train.py", *flags(corpus, out))
    return out


def losses(out) -> list[tuple]:
    records = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def test_it_learns_and_leaves_a_record(whole_run):
    results = json.loads((whole_run / "results.json").read_text())
    assert results["val_loss"]["value"] < results["val_loss_before_training"]["value"] - 0.1
    slam = json.loads((whole_run / "checkpoint" / "slam.json").read_text())
    assert slam["finished"] and slam["step"] == 12 and slam["fingerprint"]["n_units"] == N_UNITS
    assert [s for s, _ in losses(whole_run)] == list(range(1, 13))
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(whole_run / "checkpoint")
    x = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(theirs.eval()(x).logits, UnitLM.from_pretrained(str(whole_run / "checkpoint"))(x)[0],
                               atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_is_bit_equal(corpus, whole_run, tmp_path, sig):
    """Killed somewhere after the first checkpoint, then resumed: same losses, same weights, nothing lost or twice."""
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "train.py", *flags(corpus, out)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 00005"):
            os.kill(process.pid, sig)
            break
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if sig == signal.SIGKILL else 128 + signal.SIGTERM)
    done = run("train.py", *flags(corpus, out), "--resume")
    assert "resuming" in done.stdout
    assert losses(out) == losses(whole_run)
    weights = [(o / "checkpoint" / "model.safetensors").read_bytes() for o in (out, whole_run)]
    assert weights[0] == weights[1]


def test_time_budget_ends_the_run_with_a_whole_schedule(corpus, tmp_path):
    out, started = tmp_path / "timed", time.time()
    arguments = [f for f in flags(corpus, out) if not f.startswith("--steps")]
    run("train.py", *arguments, f"--time_budget_hours={3 / 3600}")
    records = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    lrs = [r["lr"] for r in records if "lr" in r]
    assert 3 <= records[-1]["seconds"] < 6 and time.time() - started < 60
    assert lrs[-1] < 0.1 * max(lrs) == pytest.approx(0.1e-2, rel=0.2)


def test_divergence_stops_and_keeps_the_good_checkpoint(corpus, tmp_path):
    out = tmp_path / "diverging"
    run("train.py", *flags(corpus, out, steps=4))
    before = (out / "checkpoint" / "model.safetensors").read_bytes()
    state = torch.load(out / "checkpoint" / "trainer.pt", weights_only=True)
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].fill_(math.nan)
    torch.save(state, out / "checkpoint" / "trainer.pt")
    error = refused("train.py", *flags(corpus, out, steps=8), "--resume")
    assert "step 6: loss nan" in error and str(out) in error
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == before


def test_refusals(corpus, whole_run, fingerprint, tmp_path):
    assert "--resume" in refused("train.py", *flags(corpus, whole_run))
    assert "context was 64, now 32" in refused("train.py", *flags(corpus, whole_run, context=32), "--resume")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert "not a run's folder" in refused("train.py", *flags(corpus, tmp_path / "mine"), "--overwrite")
    assert (tmp_path / "mine" / "precious.txt").exists()
    assert "exactly one of" in refused("train.py", *flags(corpus, tmp_path / "x"), "--tokens=1e6")
    assert "no such folder" in refused("train.py", *flags(corpus, tmp_path / "x", shape="{}"), "--base=out/nowhere")
    with UnitWriter(tmp_path / "other", replace(fingerprint, layer=2)) as writer:
        writer.add("x", np.arange(9), np.ones(9))
    error = refused("train.py", *flags(corpus, tmp_path / "x", val=tmp_path / "other"))
    assert "layer 2" in error and "layer 3" in error and str(tmp_path / "other") in error
    assert not (tmp_path / "x").exists()
