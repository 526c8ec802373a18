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
from conftest import N_UNITS, ROOT, Process, markov, refused, run
from test_train import flags, tiny

from config import load_config
from dpo import Config, Data, backward, completion_logps, dpo_loss, losses, prefix_pair, reference_logps, step_rows
from model import UnitLM
from slam.align_pairs import PairsConfig, choose, has_ended, make_pairs
from slam.metrics import auto_bleu
from slam.scoring import PrefixPair, pack, row_logps
from slam.speech import continue_units, load_judge
from slam.tokenizer import SpeechTokenizer
from slam.units import read_pairs, to_units, write_pairs


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
    ours, *_ = losses(cfg, policy, reference, lengths)
    expected, *_ = dpo_loss(*policy.T, *reference.T, beta=2.0, loss="ipo", label_smoothing=0.1, length_normalized=True,
                            nll_weight=0.4, lengths=lengths.T)
    assert ours == expected
    assert losses(Config(), policy, reference, lengths)[0] == dpo_loss(*policy.T, *reference.T, beta=0.1)[0]


@pytest.mark.parametrize("how", [{}, {"label_smoothing": 0.2}, {"loss": "ipo"}, {"loss": "ipo", "label_smoothing": 0.2},
                                 {"length_normalized": True}, {"nll_weight": 0.7}])
def test_gradient_by_finite_differences(how):
    logps = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lengths = torch.tensor([[3, 10, 2], [8, 4, 2]])
    assert torch.autograd.gradcheck(lambda x: dpo_loss(*x, beta=0.3, lengths=lengths, **how)[0], logps)


def test_a_pair_in_tokens():
    pair = prefix_pair({"prompt": [5, 6], "chosen": [6, 9], "rejected": [4]}, 1024)
    assert pair == ([1, 7, 8], [11, 1], [6, 1])  # a unit at the joint stands once
    assert pair.lengths == (2, 2, 2) and pair.n_inputs == 6
    assert pair.row() == ([1, 7, 8, 11, 8, 6], [7, 8, 11, 1, 6, 1], [0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2])
    only = {"prompt": [1, 2, 3, 4], "chosen": [9, 8], "rejected": [7]}
    assert prefix_pair(only, 7).prefix == [1, 5, 6] and prefix_pair(only, 7).n_inputs == 7  # a long one loses its beginning
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
    assert both.row() == ([1, 7, 8, 8], [7, 8, 11, 6], [0, 1, 2, 2], [0, 0, 1, 2])
    # What follows from the tokens: log-probabilities, lengths, and another place for the reference's.
    lm, cfg = tiny().eval(), Config(context=64, dtype="float32")
    found = completion_logps(lm, [pair, both], cfg, "x")
    expected = [[logp_alone(lm, p.prefix, end) for end in (p.first, p.second)] for p in (pair, both)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert Data.of([pair, both], found, torch.device("cpu")).lengths.tolist() == [[1, 2], [1, 1]]
    whole = prefix_pair(units, 1024)
    for n, pairs in enumerate(([whole], [pair], [both], [whole]), 1):
        kept = reference_logps("", lm, str(tmp_path / "x.jsonl"), pairs, cfg, "digest")
        torch.testing.assert_close(kept, completion_logps(lm, pairs, cfg, "x"), atol=1e-6, rtol=1e-6)
        assert len(list(tmp_path.iterdir())) == min(n, 3)


@pytest.mark.parametrize("n", [1, 8, 30])
def test_whether_a_continuation_has_ended(n):
    """By its length alone: against the raw draws of tokens, in which nothing stops at an EOS."""
    lm, cfg = tiny().eval(), PairsConfig(new_units=n)
    prompts = [p.prefix for p in some_pairs(64)]
    units = continue_units(lm, [to_units(p) for p in prompts], n, 64, 3, "", temperature=2.0)
    ended = [has_ended(u, cfg) for u in units]
    assert any(ended) and not all(ended)
    if n <= 8:  # beyond, rows that have ended no longer take part in the draws
        order = sorted(range(64), key=lambda i: len(prompts[i]))
        raw = lm.generate([prompts[i] for i in order], n, temperature=2.0, stop=(),
                          generator=torch.Generator().manual_seed(3))
        assert [ended[i] for i in order] == [1 in row for row in raw]
        assert [units[i] for i in order] == [to_units(row[:(row + [1]).index(1)]) for row in raw]
    never = continue_units(lm, [to_units(p) for p in prompts], n, 64, 3, "", temperature=2.0, allow_eos=False)
    assert not any(has_ended(u, cfg) for u in never)


def some_pairs(n: int, seed: int = 0) -> list[PrefixPair]:
    rng = np.random.default_rng(seed)
    return [prefix_pair({k: rng.integers(0, N_UNITS, rng.integers(1, 20)).tolist() for k in ("prompt", "chosen", "rejected")},
                 64) for _ in range(n)]


def logp_alone(lm, prompt: list[int], completion: list[int]) -> float:
    x = torch.tensor([prompt + completion])
    return lm(x)[0].log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])[-len(completion):].sum().item()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_logps_are_those_of_each_completion_by_itself(device):
    """Whatever shares its row or batch, padded or not, compiled or not."""
    lm, pairs = tiny().eval().to(device), some_pairs(9)
    with torch.no_grad():
        expected = torch.tensor([[logp_alone(lm.cpu(), p.prefix, end) for end in (p.first, p.second)] for p in pairs])
        lm.to(device)
        rows = [[pairs[i] for i in row] for row in pack(pairs, 64)]
        order = np.concatenate(pack(pairs, 64))
        assert max(map(len, rows)) > 1 and len(rows) > 1
        for forward, layout, width in ((lm, rows, 0), (lm, rows, 80), (lm, [pairs], 0), (lm, [[p] for p in pairs], 0)):
            found = row_logps(forward, layout, width, torch.device(device), "float32").cpu()[:, 1:]
            torch.testing.assert_close(found, expected[order if layout is rows else range(9)], atol=1e-4, rtol=1e-4)
        found = completion_logps(lm, pairs, Config(context=64, dtype="float32"), "x")
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
    assert "val dpo loss 0.6931" in run("dpo.py", *dpo_flags(start, folder, tmp_path / "e", steps=0)).stdout  # log 2
    assert "are not what they were: val" in refused("dpo.py", *dpo_flags(start, folder, tmp_path / "a", steps=3),
                                                    "--resume")
    assert "own folder" in refused("dpo.py", *dpo_flags(start, folder, folder, steps=1), "--overwrite")
    broken = UnitLM.from_pretrained(str(start))
    torch.nn.init.constant_(next(broken.parameters()), math.nan)
    with pytest.raises(SystemExit, match="pairs have no log-probability"):  # rather than kept
        completion_logps(broken, pairs_of, Config(dtype="float32"), "x")


def test_nothing_named(start, pairs, tmp_path, monkeypatch, capsys):
    """The newest pre-trained checkpoint, not a tuned one, and the newest pairs of its units."""
    from dpo import complete
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished train checkpoint under out/"):
        complete(Config())
    for at, (name, stage) in enumerate((("old", "train"), ("lm", "train"), ("newer", "dpo"))):
        shutil.copytree(start, tmp_path / "out" / name / "checkpoint")
        slam = tmp_path / "out" / name / "checkpoint" / "slam.json"
        slam.write_text(slam.read_text().replace('"stage": "train"', f'"stage": "{stage}"'))
        os.utime(slam, (at, at))
    with pytest.raises(SystemExit, match="no pairs_train.jsonl under out/ of the units of out/lm"):
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
    assert capsys.readouterr().out == ("the paper's recipe (table 5, config/slam_dpo.py): checkpoint out/lm, pairs "
                                       "out/b/pairs_train.jsonl, out out/lm_dpo\n")
    complete(Config(lr=1e-4))
    assert "recipe" not in capsys.readouterr().out
    slam = load_config(Config, [str(ROOT / "config/slam_dpo.py")])
    assert asdict(slam) == asdict(replace(Config(), dtype="bfloat16", **{k: getattr(slam, k) for k in (
        "out", "checkpoint", "pairs", "val_pairs")}))


def test_choosing_among_continuations():
    def candidate(score, text="one two three four", auto_bleu=0.0):
        return {"score": score, "text": text, "auto_bleu": auto_bleu}

    cfg, a, b, c = PairsConfig(max_auto_bleu=0.1, min_gap=0.5), candidate(-3.0), candidate(-2.0), candidate(-4.0)
    assert choose([a, b, c], cfg) == (b, c)
    repeats, short, silent = candidate(-1.0, auto_bleu=0.1), candidate(-1.0, "one two"), candidate(None, "")
    assert choose([repeats, a, short, c, silent], cfg) == (a, c)  # a repetitive one may be rejected, not chosen
    assert choose([candidate(-2.4), candidate(-2.8)], cfg) is None
    assert choose([repeats, silent], cfg) is None and choose([a, silent], cfg) is None
    assert choose([repeats | {"score": -9.0}, a], cfg) == (a, repeats | {"score": -9.0})


def test_on_policy_pairs(runs, stories, tmp_path, capsys):
    """Real continuations, transcripts and scores; killed, the same files result; what is chosen can be changed."""
    out = tmp_path / "align"
    def pairs(*more) -> str:
        make_pairs(load_config(PairsConfig, [*flags, *more]))
        return capsys.readouterr().out

    def refusal(*more) -> str:
        with pytest.raises(SystemExit) as e:
            pairs(*more)
        return str(e.value)

    flags = [f"--out={out}", f"--checkpoint={runs}/lm", f"--prompts={stories}/pairs_train.jsonl",
             "--n_prompts=4", "--n_val=1", "--n=3", "--new_units=40", "--batch=2", "--allow_eos=false", "--top_k=5",
             "--temperature=0.7", "--min_gap=0", "--max_auto_bleu=2", "--min_words=0"]
    pairs()
    lines = (out / "candidates.jsonl").read_text().splitlines(keepends=True)
    found = [json.loads(x) for x in lines[1:]]
    assert len(found) == 4 and all(len(x["candidates"]) == 3 for x in found)
    assert all(len(c["units"]) == 40 and c["ended"] is False for x in found for c in x["candidates"])
    known = {p["id"]: p for p in read_pairs(stories / "pairs_train.jsonl")[1]}
    made = [read_pairs(out / f"pairs_{split}.jsonl") for split in ("train", "val")]
    assert all(f == SpeechTokenizer.load("embedded").fingerprint for f, _ in made)
    for pair in made[0][1] + made[1][1]:
        assert pair["prompt"] == known[pair["id"]]["prompt"]
        candidates = next(x["candidates"] for x in found if x["id"] == pair["id"])
        scores = [c["score"] for c in candidates if c["score"] is not None]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(scores), min(scores))
        assert pair["chosen_ended"] is pair["rejected_ended"] is False
        assert 1 not in prefix_pair(pair, 1024).first + prefix_pair(pair, 1024).second  # the EOS that it was forbidden to draw
        assert {"units": pair["chosen"], "ended": False, "text": pair["chosen_text"], "score": pair["chosen_score"],
                "auto_bleu": auto_bleu(pair["chosen_text"])} in candidates
    # The score is the text LM's, of the continuation's tokens alone.
    chosen = made[0][1][0]
    model, tokenizer = load_judge("embedded:smollm2-135m")
    a, b = (tokenizer(x).input_ids for x in (chosen["prompt_text"], f" {chosen['chosen_text']}"))
    with torch.no_grad():
        logp = model(torch.tensor([a + b])).logits.float().log_softmax(-1)[0, len(a) - 1:-1]
    assert chosen["chosen_score"] == pytest.approx(logp.gather(1, torch.tensor(b)[:, None]).mean().item(), abs=1e-3)
    # Killed within the second batch.
    whole = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "pairs_train.jsonl").unlink()
    (out / "candidates.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    pairs()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    # Candidates of older code do not say whether they ended; their pairs do.
    (out / "candidates.jsonl").write_text("".join(lines).replace('"ended": false, ', ""))
    pairs()
    assert all((out / name).read_bytes() == whole[name] for name in ("pairs_train.jsonl", "pairs_val.jsonl"))
    assert "prompts gave none" in pairs("--n_val=0", "--min_gap=0.001")
    assert "a larger max_auto_bleu give more" in refusal( "--min_gap=99")
    assert "temperature was 0.7, now 0.8" in refusal( "--temperature=0.8")
    # Unit files as prompts, whose text the ASR has to hear.
    pairs(f"--out={tmp_path / 'units'}", f"--prompts={stories}/units/train", "--prompt_units=50",
        "--n_prompts=2", "--n_val=0")
    heard = [json.loads(x) for x in (tmp_path / "units" / "candidates.jsonl").read_text().splitlines()[1:]]
    assert all(len(x["prompt"]) == 50 and x["prompt_text"].startswith(("Once", "There")) for x in heard)


def test_samples_tell_of_repetition(runs, stories, tmp_path):
    run("dpo.py", "config/demo_dpo.py", f"--checkpoint={runs}/lm", f"--pairs={stories}/pairs_train.jsonl",
        f"--val_pairs={stories}/pairs_val.jsonl", "--steps=2", "--batch_pairs=2", "--n_samples=2", "--eval_every=1",
        f"--out={tmp_path}/dpo")
    records = [json.loads(x) for x in (tmp_path / "dpo" / "log.jsonl").read_text().splitlines()]
    samples = [r for r in records if "samples" in r]
    assert [r["step"] for r in samples] == [0, 1, 2]
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
    assert "warmup 0: inverse_sqrt" in refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x", warmup=0))
    assert not (tmp_path / "x").exists()
