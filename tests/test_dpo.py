"""dpo.py: the loss, the log-probabilities, the loop."""
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, Process, markov, refused, run
from test_scoring import logp_alone, some_pairs
from test_train import flags, tiny

from config import load_config
from dpo import (
    Config,
    Data,
    backward,
    complete,
    completion_logps,
    dpo_loss,
    loss_and_statistics,
    prefix_pair,
    reference_logps,
    step_rows,
)
from model import UnitLM
from slam.metrics import auto_bleu
from slam.units import read_pairs, write_pairs


def test_loss_closed_forms():
    logps = torch.tensor([[-3.0, -5.0], [-4.0, -2.0], [-3.5, -6.0], [-3.0, -2.5]])
    loss, chosen, rejected = dpo_loss(*logps, beta=0.1)
    margins = [0.1 * ((-3 + 3.5) - (-4 + 3)), 0.1 * ((-5 + 6) - (-2 + 2.5))]
    assert loss.item() == pytest.approx(np.mean([-math.log(1 / (1 + math.exp(-m))) for m in margins]))
    assert (chosen - rejected).tolist() == pytest.approx(margins)
    same = dpo_loss(*logps[[0, 1, 0, 1]], beta=0.5)
    assert same[0].item() == pytest.approx(math.log(2)) and same[1].tolist() == [0, 0]
    assert dpo_loss(*logps, beta=0.1, label_smoothing=0.5)[0].item() == pytest.approx(
        np.mean([0.5 * math.log(1 + math.exp(-m)) + 0.5 * math.log(1 + math.exp(m)) for m in margins]))


def test_variants_closed_forms():
    logps = torch.tensor([[-3.0, -5.0], [-4.0, -2.0], [-3.5, -6.0], [-3.0, -2.5]], dtype=torch.float64)
    lengths = torch.tensor([[3, 10], [8, 4]])
    h = [(-3 + 3.5) - (-4 + 3), (-5 + 6) - (-2 + 2.5)]
    per_token = [0.5 / 3 + 1 / 8, 1 / 10 - 0.5 / 4]

    def sigmoid(x):
        return math.log(1 + math.exp(-x))

    def close(expected, **how):
        loss, chosen, rejected = dpo_loss(*logps, lengths=lengths, **how)
        assert loss.item() == pytest.approx(np.mean(expected))
        return chosen, rejected

    chosen, rejected = close([(x - 5) ** 2 for x in h], beta=0.1, loss="ipo")
    assert chosen.tolist() == pytest.approx([0.05, 0.1]) and (chosen - rejected).tolist() == pytest.approx(
        [0.1 * x for x in h])
    close([0.9 * (x - 1) ** 2 + 0.1 * (-x - 1) ** 2 for x in h], beta=0.5, loss="ipo", label_smoothing=0.1)
    chosen, _ = close([sigmoid(5 * x) for x in per_token], beta=5.0, length_normalized=True)
    assert chosen.tolist() == pytest.approx([5 * 0.5 / 3, 5 * 1 / 10])
    close([(x - 0.1) ** 2 for x in per_token], beta=5.0, length_normalized=True, loss="ipo")
    close([sigmoid(0.1 * x) + 0.3 * y for x, y in zip(h, (3 / 3, 5 / 10))], beta=0.1, nll_weight=0.3)
    # The minimum of IPO's loss is where h is 1 / 2 beta; DPO's has none.
    best = logps.clone()
    best[0] += 5 - torch.tensor(h)
    assert dpo_loss(*best, beta=0.1, loss="ipo")[0].item() == pytest.approx(0)


def test_settings_reach_the_loss():
    policy, reference = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[3, 2], [2, 5], [4, 4], [9, 1]])
    cfg = Config(beta=2.0, loss="ipo", label_smoothing=0.1, length_normalized=True, nll_weight=0.4)
    ours, _ = loss_and_statistics(cfg, policy, reference, lengths)
    plain, _ = loss_and_statistics(Config(), policy, reference, lengths)
    expected, *_ = dpo_loss(*policy.T, *reference.T, beta=2.0, loss="ipo", label_smoothing=0.1, length_normalized=True,
                            nll_weight=0.4, lengths=lengths.T)
    assert ours == expected and plain == dpo_loss(*policy.T, *reference.T, beta=0.1)[0]


@pytest.mark.parametrize("how", [{}, {"label_smoothing": 0.2}, {"loss": "ipo"}, {"loss": "ipo", "label_smoothing": 0.2},
                                 {"length_normalized": True}, {"nll_weight": 0.7}])
def test_gradient_by_finite_differences(how):
    logps = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lengths = torch.tensor([[3, 10, 2], [8, 4, 2]])
    assert torch.autograd.gradcheck(lambda x: dpo_loss(*x, beta=0.3, lengths=lengths, **how)[0], logps)


def test_a_pair_in_tokens():
    pair = prefix_pair({"prompt": [5, 6], "chosen": [6, 9], "rejected": [4]}, 1024)
    assert pair == ([1, 7, 8], [11, 1], [6, 1])  # a unit at the joint stands once
    pieces = prefix_pair({"prompt": [5, 6], "chosen": [6, 9], "rejected": [4]}, 1024, dedup=False)
    assert pieces == ([1, 7, 8], [8, 11, 1], [6, 1])  # two equal pieces may follow each other
    only = {"prompt": [1, 2, 3, 4], "chosen": [9, 8], "rejected": [7]}
    short = prefix_pair(only, 7)
    assert short.prefix == [1, 5, 6] and short.n_inputs == 7  # a long prompt loses its beginning
    assert prefix_pair(only, 5) is None
    assert prefix_pair({"prompt": [5], "chosen": [5], "rejected": [6]}, 9).first == [7, 1]  # nothing else would be left


def test_a_completion_that_was_cut_has_no_eos(tmp_path):
    """An EOS there would teach the model a token that it did not, and perhaps could not, draw."""
    units = {"prompt": [5, 6], "chosen": [6, 9], "rejected": [4]}
    assert prefix_pair(units | {"chosen_ended": True, "rejected_ended": True}, 1024) == prefix_pair(units, 1024)
    pair = prefix_pair(units | {"chosen_ended": False}, 1024)
    assert pair == ([1, 7, 8], [11], [6, 1]) and pair.lengths == (2, 1, 2)
    both = prefix_pair(units | {"chosen_ended": False, "rejected_ended": False}, 4)
    assert both == ([1, 7, 8], [11], [6]) and both.n_inputs == 4  # fits without the two EOS
    # What follows from the tokens: log-probabilities, lengths, and another place for the reference's.
    lm, cfg = tiny().eval(), Config(context=64, dtype="float32")
    found = completion_logps(lm, [pair, both], cfg, "x")
    expected = [[logp_alone(lm, p.prefix, end) for end in (p.first, p.second)] for p in (pair, both)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert Data.of([pair, both], found, torch.device("cpu")).lengths.tolist() == [[1, 2], [1, 1]]
    whole, start = prefix_pair(units, 1024), str(tmp_path / "lm")
    lm.save_pretrained(start)
    for n, pairs in enumerate(([whole], [pair], [both], [whole]), 1):
        saved = reference_logps(start, "digest", str(tmp_path / "x.jsonl"), pairs, cfg)
        torch.testing.assert_close(saved, completion_logps(lm, pairs, cfg, "x"), atol=1e-6, rtol=1e-6)
        assert len(list(tmp_path.glob("x.jsonl.reference-*.npy"))) == min(n, 3)


def test_micro_batches_change_nothing():
    """A step's gradients and statistics are the same however its pairs are laid out, and those of the plain loss."""
    pairs, reference = some_pairs(8), torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) - 40
    data, found = Data.of(pairs, reference, torch.device("cpu")), []
    for micro_batch, width in ((1, 0), (2, 64), (8, 0)):
        lm, cfg = tiny(), Config(context=64, batch_pairs=8, micro_batch=micro_batch, dtype="float32")
        rows = step_rows(list(range(8)), pairs, cfg, width)
        assert sorted(i for row in rows for i in row) == list(range(8))
        assert len(rows) % micro_batch == 0 or not width
        statistics = backward(lm, data, rows, cfg, width)
        found.append(torch.cat([statistics, *(p.grad.flatten() for p in lm.parameters())]))
    lm = tiny()
    logps = torch.stack([torch.stack([lm(torch.tensor([p.prefix + x]))[0].log_softmax(-1)[0, :-1].gather(
        1, torch.tensor(p.prefix + x)[1:, None])[-len(x):].sum() for x in (p.first, p.second)]) for p in pairs])
    loss, chosen, rejected = dpo_loss(*logps.T, *reference.T, beta=0.1)
    loss.backward()
    mean = [loss.detach(), (chosen - rejected).mean(), (chosen > rejected).float().mean(), *logps.detach().mean(0),
            *torch.tensor([p.lengths[1:] for p in pairs]).float().mean(0)]
    found.append(torch.cat([torch.stack(mean), *(p.grad.flatten() for p in lm.parameters())]))
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, fingerprint):
    """Pairs in which the rejected completion is the chosen one shuffled."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(5)
    for split, n in (("train", 60), ("val", 20)):
        said = [x.tolist() for x in markov(n, rng) if len(x) > 11]
        write_pairs(folder / f"{split}.jsonl", fingerprint,
                    [{"id": str(i), "prompt": x[:5], "chosen": x[5:], "rejected": rng.permutation(x[5:]).tolist()}
                     for i, x in enumerate(said)])
    return folder


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "lm"
    run("train.py", *flags(corpus, out, steps=4))
    return out / "checkpoint"


def dpo_flags(start, folder, out, **more) -> list[str]:
    settings = dict(out=out, checkpoint=start, pairs=folder / "train.jsonl", val_pairs=folder / "val.jsonl", steps=8,
                    batch_pairs=8, lr=1e-2, log_every=1, save_every=3, warmup=0.1, dtype="float32", n_samples=0)
    return [f"--{k}={v}" for k, v in (settings | more).items()]


def test_it_learns_and_resumes_bit_equal(start, pairs, tmp_path):
    """It is killed in a run too long to end by itself, and compared with one of as many steps in one go."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    how = dict(schedule="constant", warmup=0.0, eval_every=10**6)
    process = Process([sys.executable, "dpo.py", *dpo_flags(start, pairs, killed, **how, steps=10**6)])
    process.until("step 00005")
    process.kill()
    process.end()
    how["steps"] = json.loads((killed / "checkpoint" / "slam.json").read_text())["step"] + 5
    run("dpo.py", *dpo_flags(start, pairs, killed, **how), "--resume")
    run("dpo.py", *dpo_flags(start, pairs, whole, **how))
    records = [json.loads(x) for x in (whole / "log.jsonl").read_text().splitlines()]
    first, *middle, last = records
    assert first["val_dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is still the reference
    assert first["val_margin"] == pytest.approx(0, abs=1e-3)
    assert last["val_dpo_loss"] < 0.6 and last["val_reward_accuracy"] > 0.7
    assert middle[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (killed / "log.jsonl").read_text().count("\"loss\"") == how["steps"]
    weights = [(out / "checkpoint" / "model.safetensors").read_bytes() for out in (whole, killed)]
    assert weights[0] == weights[1]
    assert "--resume" in refused("dpo.py", *dpo_flags(start, pairs, whole, **how))


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_two_processes_do_what_one_does(start, pairs, tmp_path):
    """A run begun by one process, continued by torchrun's two, ended by one: its curve is that of one process alone."""
    folder, out, whole = (tmp_path / x for x in ("pairs", "out", "whole"))
    shutil.copytree(pairs, folder, ignore=shutil.ignore_patterns("*.npy"))
    how = dict(schedule="constant", warmup=0.0, log_every=2, eval_every=4)
    run("dpo.py", *dpo_flags(start, pairs, whole, **how, steps=10))
    run("dpo.py", *dpo_flags(start, folder, out, **how, steps=4))
    alone = {p: np.load(p) for p in folder.glob("*.npy")}
    for path in alone:  # the two compute the reference anew
        path.unlink()
    done = run(*TORCHRUN, "dpo.py", *dpo_flags(start, folder, out, **how, steps=8), "--resume")
    assert done.stdout.count("step 00008 | loss") == done.stdout.count("on 2 x cpu") == 1  # one speaks for both
    assert {*folder.glob("*.npy")} == {*alone} and len(alone) == 2
    for path, logps in alone.items():
        np.testing.assert_allclose(np.load(path), logps, rtol=1e-5, atol=1e-4)
    kept = {p: p.stat().st_mtime_ns for p in alone}
    run("dpo.py", *dpo_flags(start, folder, out, **how, steps=10), "--resume")
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.npy")} == kept
    ours, expected = ([{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in (o / "log.jsonl").open()]
                      for o in (out, whole))
    assert [r["step"] for r in expected] == [0, 2, 4, 4, 6, 8, 8, 10, 10] and len(ours) == len(expected)
    for a, b in zip(ours, expected):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_the_reference_is_computed_once(start, pairs, tmp_path):
    """It is kept beside the pairs, for this checkpoint and these pairs."""
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder, ignore=shutil.ignore_patterns("*.npy"))

    def kept() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.reference-*.npy")}

    run("dpo.py", *dpo_flags(start, folder, tmp_path / "a", steps=2))
    first = kept()
    assert sorted(name.split(".ref")[0] for name in first) == ["train.jsonl", "val.jsonl"]
    run("dpo.py", *dpo_flags(start, folder, tmp_path / "b", steps=1, beta=0.5))
    assert kept() == first
    run("dpo.py", *dpo_flags(tmp_path / "a", folder, tmp_path / "c", steps=1))
    (folder / "val.jsonl").write_text("".join((folder / "val.jsonl").read_text().splitlines(keepends=True)[:-1]))
    run("dpo.py", *dpo_flags(start, folder, tmp_path / "d", steps=1))
    assert first.items() < kept().items() and len(kept()) == 5  # c's two, and d's of the changed file
    pairs_of = [prefix_pair(x, 1024) for x in read_pairs(folder / "train.jsonl")[1]]
    name, = (p for p in first if p.startswith("train"))
    expected = completion_logps(UnitLM.from_pretrained(str(start)), pairs_of, Config(dtype="float32"), "x")
    torch.testing.assert_close(torch.from_numpy(np.load(folder / name)), expected, atol=1e-4, rtol=1e-5)
    done = run("dpo.py", *dpo_flags(start, folder, tmp_path / "e", steps=0, n_samples=1))
    assert "val dpo loss 0.6931" in done.stdout and "no samples: " in done.stderr  # log 2; nothing speaks these units
    assert "has changed: val" in refused("dpo.py", *dpo_flags(start, folder, tmp_path / "a", steps=3),
                                                    "--resume")
    assert "own folder" in refused("dpo.py", *dpo_flags(start, folder, folder, steps=1), "--overwrite")
    broken = UnitLM.from_pretrained(str(start))
    torch.nn.init.constant_(next(broken.parameters()), math.nan)
    with pytest.raises(SystemExit, match="pairs have no log-probability"):  # rather than kept
        completion_logps(broken, pairs_of, Config(dtype="float32"), "x")


def test_nothing_named(start, pairs, tmp_path, monkeypatch, capsys):
    """The newest pre-trained checkpoint, not a tuned one, and the newest pairs of its units."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished train checkpoint under out/"):
        complete(Config())
    for at, (name, stage) in enumerate((("old", "train"), ("lm", "train"), ("newer", "dpo"))):
        shutil.copytree(start, tmp_path / "out" / name / "checkpoint")
        slam = tmp_path / "out" / name / "checkpoint" / "slam.json"
        slam.write_text(slam.read_text().replace('"stage": "train"', f'"stage": "{stage}"'))
        os.utime(slam, (at, at))
    with pytest.raises(SystemExit, match="no pairs_train.jsonl under out/ has the units of out/lm"):
        complete(Config())
    for at, name in enumerate(("a", "b", "c")):
        path = tmp_path / "out" / name / "pairs_train.jsonl"
        path.parent.mkdir()
        text = (pairs / "train.jsonl").read_text()
        path.write_text(text.replace("f" * 64, "0" * 64) if name == "c" else text)
        os.utime(path, (at, at))
    cfg = complete(Config())
    assert (cfg.checkpoint, cfg.pairs, cfg.val_pairs, cfg.out) == (
        "out/lm", "out/b/pairs_train.jsonl", "out/b/pairs_val.jsonl", "out/lm_dpo")
    assert capsys.readouterr().out == ("checkpoint out/lm, pairs out/b/pairs_train.jsonl, val_pairs "
                                       "out/b/pairs_val.jsonl, out out/lm_dpo\n")
    assert complete(cfg) == cfg and capsys.readouterr().out == ""
    slam = load_config(Config, [str(ROOT / "config/slam_dpo.py")])
    assert asdict(slam) == asdict(replace(Config(), dtype="bfloat16", **{k: getattr(slam, k) for k in (
        "out", "checkpoint", "pairs", "val_pairs")}))


def test_samples_tell_of_repetition(stories, tmp_path):
    run("dpo.py", "config/demo_dpo.py", "--checkpoint=embedded:slam-mini", f"--pairs={stories}/pairs_train.jsonl",
        f"--val_pairs={stories}/pairs_val.jsonl", "--steps=2", "--batch_pairs=2", "--n_samples=2", "--eval_every=1",
        f"--out={tmp_path}/dpo")
    records = [json.loads(x) for x in (tmp_path / "dpo" / "log.jsonl").read_text().splitlines()]
    samples = [r for r in records if "samples" in r]
    assert [r["step"] for r in samples] == [r["step"] for r in records if "val_dpo_loss" in r] == [0, 1, 2]
    for r in samples:
        assert len(r["samples"]) == 2 and all(map(str.split, r["samples"]))
        assert r["sample_auto_bleu"] == pytest.approx(100 * np.mean([auto_bleu(t) for t in r["samples"]]))


def test_refusals(start, pairs, tmp_path):
    assert "no such pair file" in refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x", pairs="nowhere.jsonl"))
    assert "nowhere" in refused("dpo.py", *dpo_flags("out/nowhere", pairs, tmp_path / "x"))
    other = (pairs / "train.jsonl").read_text().replace("f" * 64, "0" * 64)
    (tmp_path / "other.jsonl").write_text(other)
    assert "different tokenisers" in refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x",
                                                                 pairs=tmp_path / "other.jsonl"))
    (tmp_path / "bare.jsonl").write_text("".join((pairs / "train.jsonl").read_text().splitlines(keepends=True)[1:]))
    assert "first line: not that of preference pairs" in refused(
        "dpo.py", *dpo_flags(start, pairs, tmp_path / "x", pairs=tmp_path / "bare.jsonl"))
    wrong = refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x", n_samples=-1, context=0))
    assert "n_samples not negative" in wrong and "context: 1 or more" in wrong
    with pytest.raises(KeyError, match="no_such_loss"):  # a loss that is named but not written
        dpo_loss(*torch.zeros(4, 2), loss="no_such_loss")
    assert "warmup 0: inverse_sqrt" in refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x", warmup=0))
    assert not (tmp_path / "x").exists()
