"""train.py: accumulation, learning, resume, refusals."""
import functools
import importlib.util
import json
import math
import random
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import N_UNITS, TORCHRUN, refused, run, start

from model import ModelConfig, UnitLM
from slam.optim import make_optimizer, schedule, update
from slam.packing import Packed, collate, cut
from slam.scoring import validation_loss
from slam.units import UnitReader, UnitWriter
from train import Config, accumulate

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8)


def tiny(seed=0) -> UnitLM:
    torch.manual_seed(seed)
    return UnitLM(ModelConfig(vocab_size=N_UNITS + 2, **SHAPE))


def flags(corpus, out, **more) -> list[str]:
    settings = dict(out=out, train=corpus / "train", val=corpus / "val", shape=json.dumps(SHAPE), context=64,
                    micro_batch=2, batch_tokens=256, steps=12, log_every=3, save_every=4, eval_every=6, lr=1e-2,
                    dtype="float32")
    return [f"--{k}={v}" for k, v in (settings | more).items()]


def test_accumulation_and_packing_change_nothing(corpus):
    """The same utterances in other rows and micro-batches give the same loss, gradients and step."""
    reader = UnitReader(corpus / "train")
    chunks = cut(reader.lengths, 64)[:24]
    alone, results = [p[None] for p in chunks], []
    for micro_batch, rows in ((24, alone), (1, alone), (3, alone[::-1]), (8, list(Packed(chunks, 64, None)))):
        lm, cfg = tiny(), Config(lr=1e-3)
        micro = [collate(reader, rows[at:at + micro_batch], 64) for at in range(0, len(rows), micro_batch)]
        loss = accumulate(lm, micro, int(chunks[:, 2].sum()), lm.device, "float32")
        gradients = [p.grad.clone() for p in lm.parameters()]
        norm = update(lm, make_optimizer(lm, cfg), 1e-3, 1e9)
        results.append((loss.item(), norm.item(), gradients))
    assert results[0][0] == pytest.approx(math.log(N_UNITS + 2), abs=0.2)
    for loss, norm, gradients in results[1:]:
        assert (loss, norm) == pytest.approx(results[0][:2], rel=1e-5)
        for a, b in zip(gradients, results[0][2]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


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
    assert [s for s, _ in losses(whole_run)] == [3, 6, 9, 12]
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(whole_run / "checkpoint")
    x = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(theirs.eval()(x).logits, UnitLM.from_pretrained(str(whole_run / "checkpoint"))(x)[0],
                               atol=1e-4, rtol=1e-4)


def weights(out) -> bytes:
    return (out / "checkpoint" / "model.safetensors").read_bytes()


ENDLESS = dict(steps=10**6, schedule="constant", warmup=0, log_every=1, save_every=2, eval_every=10**6)


def ends_as_if_never_stopped(corpus, out, settings) -> None:
    """Resumed to a few steps past its checkpoint, it has the losses and weights of a run of as many steps in one go."""
    slam, whole = json.loads((out / "checkpoint" / "slam.json").read_text()), out.with_name("whole")
    settings = settings | {"steps": slam["step"] + 5}
    assert "resuming" in run("train.py", *flags(corpus, out, **settings), "--resume").stdout
    run("train.py", *flags(corpus, whole, **settings))
    assert losses(out) == losses(whole) and weights(out) == weights(whole)
    assert len(losses(out)) == math.ceil(settings["steps"] / settings["log_every"])


def test_sigterm_saves_and_a_resumed_run_is_bit_equal(corpus, tmp_path):
    """The run is too long to end by itself, however late the signal comes."""
    out, settings = tmp_path / "stopped", ENDLESS | {"save_every": 10**6, "log_every": 3}
    process = start("train.py", *flags(corpus, out, **settings))
    process.until("step 00003")
    process.terminate()
    done = process.end()
    assert done.returncode == 128 + signal.SIGTERM and b"stopped at step" in done.stderr
    ends_as_if_never_stopped(corpus, out, settings)


def test_killed_again_and_again_it_is_bit_equal(corpus, tmp_path):
    """kill -9 before the first step, after some steps, and while a checkpoint is written: the same losses and weights.

    The run is too long to end by itself, however late the kills come.
    """
    out, rng = tmp_path / "killed", random.Random(0)
    new = out / "checkpoint.new"
    for moment in ((out / "config.json").exists, rng.randint(1, 30), new.exists, rng.randint(1, 9)):
        process = start("train.py", *flags(corpus, out, **ENDLESS), "--resume")
        process.until((lambda: process.said()[0].count(b"step ") >= moment) if isinstance(moment, int) else moment)
        process.kill()
        assert process.end().returncode == -signal.SIGKILL
    ends_as_if_never_stopped(corpus, out, ENDLESS)


def test_a_kill_in_the_last_evaluation_loses_nothing(corpus, whole_run, tmp_path):
    """The checkpoint of a finished run without its results: --resume evaluates, and trains no more."""
    shutil.copytree(whole_run, tmp_path / "x")
    log = (tmp_path / "x" / "log.jsonl").read_text().splitlines(keepends=True)
    assert "val_loss" in json.loads(log[-1])
    (tmp_path / "x" / "log.jsonl").write_text("".join(log[:-1]))
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    (tmp_path / "x" / "results.json").write_text(json.dumps({"val_loss_before_training": {"value": 3.0}}))
    run("train.py", *flags(corpus, tmp_path / "x"), "--resume")
    assert json.loads((tmp_path / "x" / "results.json").read_text())["val_loss"] == results["val_loss"]
    assert weights(tmp_path / "x") == weights(whole_run) and (tmp_path / "x" / "log.jsonl").read_text() == "".join(log)


def test_a_finished_run_stays_as_it_is(corpus, whole_run, tmp_path):
    """Also after eval.py has replaced its val_loss; and without trainer.pt, which takes most of the room."""
    out = tmp_path / "x"
    shutil.copytree(whole_run, out)
    (out / "checkpoint" / "trainer.pt").unlink()
    run("eval.py", f"--checkpoint={out}", f"--val={corpus / 'val'}", "--context=64")
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    assert "made" in json.loads((out / "results.json").read_text())["val_loss"]
    assert "is finished already" in run("train.py", *flags(corpus, out), "--resume").stdout
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))} == before
    assert "trainer.pt is missing" in refused("train.py", *flags(corpus, out, steps=14), "--resume")


def test_two_processes_do_what_one_does(corpus, whole_run, tmp_path):
    """torchrun with two ranks: the same losses; its checkpoint is resumed by one process, and by two."""
    out, other = tmp_path / "two", tmp_path / "one"
    torchrun = *TORCHRUN, "train.py"
    run(*torchrun, *flags(corpus, out, steps=6, schedule="constant", warmup=0))
    shutil.copytree(out, other)
    more = flags(corpus, out, steps=12, schedule="constant", warmup=0)
    run(*torchrun, *more, "--resume")
    run("train.py", *more, f"--out={other}", "--resume")
    run("train.py", *more, f"--out={tmp_path / 'whole'}")
    expected = losses(tmp_path / "whole")
    for found in (losses(out), losses(other)):
        assert [s for s, _ in found] == [3, 6, 9, 12]
        assert [x for _, x in found] == pytest.approx([x for _, x in expected], rel=1e-4)
    timed = [x for x in flags(corpus, tmp_path / "timed", log_every=1, save_every=5) if not x.startswith("--steps")]
    run(*torchrun, *timed, f"--time_budget_hours={1 / 3600}")  # each has a clock of its own; both must stop at once
    assert json.loads((tmp_path / "timed" / "checkpoint" / "slam.json").read_text())["finished"]
    two, one = (json.loads((o / "results.json").read_text())["val_loss"] for o in (out, tmp_path / "whole"))
    assert two["n"] == one["n"] and two["value"] == pytest.approx(one["value"], rel=1e-4)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path):
    out = tmp_path / "full"
    run("train.py", *flags(corpus, out, steps=4))
    before = weights(out)
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes
    done = run("train.py", *flags(corpus, out, steps=8), "--resume", check=False, preexec_fn=limited)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be written" in done.stderr and "make room" in done.stderr
    assert weights(out) == before and [p.name for p in out.iterdir() if "checkpoint" in p.name] == ["checkpoint"]
    run("train.py", *flags(corpus, out, steps=8), "--resume")
    assert [s for s, _ in losses(out)] == [3, 4, 6, 8]  # a run that ends logs


def test_a_vanished_data_file_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    process = start("train.py", *flags(tmp_path / "data", tmp_path / "x", steps=100_000))
    process.until("step 00006")
    (tmp_path / "data" / "train" / "00000.safetensors").unlink()
    done = process.end()
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"00000.safetensors: gone while in use" in done.stderr
    UnitLM.from_pretrained(str(tmp_path / "x" / "checkpoint"))


def test_extra_loggers(corpus, tmp_path):
    out = tmp_path / "logged"
    if importlib.util.find_spec("tensorboard") is None:
        assert "tensorboard is not installed" in refused("train.py", *flags(corpus, out), "--loggers=tensorboard")
    else:
        run("train.py", *flags(corpus, out, steps=3), "--loggers=tensorboard")
        assert list((out / "tensorboard").iterdir())
    assert "expected" in refused("train.py", *flags(corpus, out), "--loggers=tensorbord")


@pytest.mark.parametrize("optimizer, more", [("muon", {}), ("ademamix", {}), ("adamw", {"dtype": "pure_bfloat16"})])
def test_other_optimisers_and_pure_bf16(corpus, tmp_path, optimizer, more):
    """They learn; stopped half-way, by saving and loading all they remember, they give the same weights."""
    from train import main
    cfg = Config(out=str(tmp_path / "x"), train=(str(corpus / "train"),), val=(str(corpus / "val"),), shape=SHAPE,
                 context=64, micro_batch=4, batch_tokens=256, steps=8, optimizer=optimizer, warmup=0.0, eval_every=99,
                 schedule="constant", **{"lr": 1e-2, "dtype": "float32"} | more)
    main(cfg)
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    assert results["val_loss"]["value"] < results["val_loss_before_training"]["value"]
    half = replace(cfg, out=str(tmp_path / "y"))
    main(replace(half, steps=4))
    main(replace(half, resume=True))
    assert weights(tmp_path / "y") == weights(tmp_path / "x")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_time_budget_ends_the_run_with_a_whole_schedule(corpus, tmp_path):
    """Stopped on the way and resumed: the time before it counts, and the schedule follows it to its end."""
    out = tmp_path / "timed"
    arguments = [f for f in flags(corpus, out, log_every=1) if not f.startswith("--steps")]
    process = start("train.py", *arguments, "--time_budget_hours=10")
    process.until("step 00010")
    process.terminate()
    process.end()
    stopped = json.loads((out / "checkpoint" / "slam.json").read_text())["seconds"]
    budget = 4 * stopped + 1  # however slow the machine, a fourth of it at most is over
    run("train.py", *arguments, f"--time_budget_hours={budget / 3600}", "--resume")
    records = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    times, lrs = zip(*((r["seconds"], r["lr"]) for r in records if "lr" in r))
    assert list(times) == sorted(times) and min(abs(t - stopped) for t in times) < 1e-3
    assert times[-2] < budget + 1e-3 and budget <= times[-1] + 1e-3  # logged to the millisecond
    for before, lr in zip(times, lrs[1:]):
        progress = before / (36_000 if before < stopped - 1e-3 else budget)
        assert lr == pytest.approx(1e-2 * schedule("cosine", progress, Config.warmup, Config.min_lr / 1e-2), abs=5e-4)


def test_another_corpus_is_not_resumed(corpus, tmp_path):
    """A shard more gives other rows in another order; a checkpoint that does not say what it saw goes on."""
    data, out = tmp_path / "data", tmp_path / "x"
    shutil.copytree(corpus, data)
    whole = flags(data, out, steps=4)
    run("train.py", *whole)
    before = weights(out)
    shards = {split: sorted((data / split).iterdir()) for split in ("train", "val")}
    for changed, (more, to) in {"train": (shards["val"][0], data / "train" / "00099.safetensors"),
                                "val": (shards["train"][0], data / "val" / "00099.safetensors")}.items():
        shutil.copy(more, to)
        assert f"has changed: {changed};" in refused("train.py", *flags(data, out, steps=8), "--resume")
        to.unlink()
    shards["train"][0].replace(data / "kept")  # one less
    assert "has changed: train;" in refused("train.py", *flags(data, out, steps=8), "--resume")
    assert weights(out) == before
    slam = out / "checkpoint" / "slam.json"
    old = json.loads(slam.read_text())
    assert set(old.pop("inputs")) == {"train", "val"}
    slam.write_text(json.dumps(old))
    run("train.py", *flags(data, out, steps=6), "--resume")
    (data / "kept").replace(shards["train"][0])  # from there on it is checked again
    assert "train;" in refused("train.py", *flags(data, out, steps=8), "--resume")


def test_divergence_stops_and_keeps_the_good_checkpoint(corpus, tmp_path):
    out = tmp_path / "diverging"
    run("train.py", *flags(corpus, out, steps=4))
    before = (out / "checkpoint" / "model.safetensors").read_bytes()
    state = torch.load(out / "checkpoint" / "trainer.pt", weights_only=True)
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].fill_(math.nan)
    torch.save(state, out / "checkpoint" / "trainer.pt")
    error = refused("train.py", *flags(corpus, out, steps=8, log_every=3), "--resume")
    assert "step 6: loss nan" in error and str(out) in error
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == before


def test_too_little_memory_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path, monkeypatch):
    """The GPU's error comes in the sixth step; with a smaller micro-batch the run goes on from its checkpoint."""
    import train
    cfg = Config(out=str(tmp_path / "x"), train=(str(corpus / "train"),), val=(str(corpus / "val"),), shape=SHAPE,
                 context=64, micro_batch=4, batch_tokens=256, steps=8, save_every=4, dtype="float32")
    real, calls = train.accumulate, []

    def until_memory_is_full(*args):
        calls.append(args)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return real(*args)

    monkeypatch.setattr(train, "accumulate", until_memory_is_full)
    monkeypatch.setattr(train, "peak_flops", lambda device: 1e12)  # no GPU's, so that there is an MFU
    with pytest.raises(SystemExit, match=r"allocate 2.00 GiB.\n.*a smaller micro_batch \(now 4\)"):
        train.main(cfg)
    train.main(replace(cfg, resume=True, micro_batch=2))
    log = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert all(0 < x["mfu_needed"] < x["mfu"] for x in log if "loss" in x) and "loss" in log[-2]
    assert len(calls) == 6 + 4 and json.loads((tmp_path / "x" / "results.json").read_text())["val_loss"]["step"] == 8
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_refusals(corpus, whole_run, fingerprint, tmp_path):
    assert "--resume" in refused("train.py", *flags(corpus, whole_run))
    assert "context was 64, now 32" in refused("train.py", *flags(corpus, whole_run, context=32), "--resume")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert "not a run's folder" in refused("train.py", *flags(corpus, tmp_path / "mine"), "--overwrite")
    assert (tmp_path / "mine" / "precious.txt").exists()
    error = refused("train.py", *flags(corpus, tmp_path / "x"), "--tokens=1e6", "--batch_tokens=300")
    assert "at least 1" in refused("train.py", *flags(corpus, tmp_path / "x", micro_batch=0, warmup=1))
    assert "warmup 0: inverse_sqrt" in refused("train.py", *flags(corpus, tmp_path / "x", schedule="inverse_sqrt",
                                                                  warmup=0))
    assert "exactly one of" in error and "multiple of context" in error
    assert "batch_tokens 0: not a multiple of" in refused("train.py", *flags(corpus, tmp_path / "x", batch_tokens=0))
    assert "no such folder" in refused("train.py", *flags(corpus, tmp_path / "x", shape="{}"), "--base=out/nowhere")
    assert "model_type is qwen2 or llama" in refused("train.py", *flags(corpus, tmp_path / "x", shape=json.dumps(
        SHAPE | {"model_type": "gpt2"})))
    with UnitWriter(tmp_path / "other", replace(fingerprint, layer=2)) as writer:
        writer.add("x", np.arange(9), np.ones(9))
    error = refused("train.py", *flags(corpus, tmp_path / "x", shape="{}", train=tmp_path / "other",
                                       val=tmp_path / "other"), f"--base={whole_run}")
    assert f"{whole_run} and {tmp_path / 'other'}" in error or "layer" in error
    error = refused("train.py", *flags(corpus, tmp_path / "x", val=tmp_path / "other"))
    assert "layer 2" in error and "layer 3" in error and str(tmp_path / "other") in error
    assert not (tmp_path / "x").exists()
