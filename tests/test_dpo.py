"""dpo.py: the loss, the log-probabilities, the loop."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import N_UNITS, ROOT, markov, refused, run
from test_train import flags, tiny

from dpo import Config, completion_logp, dpo_loss, sequence
from units import write_pairs


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
    sequences = [([1, 5, 6, 7, 1], 3), ([1, 5, 6, 1], 2), ([1, 5, 8, 1], 2), ([1, 5, 9, 9, 9, 1], 5)]
    policy, reference = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
    cfg = Config(beta=2.0, loss="ipo", label_smoothing=0.1, length_normalized=True, nll_weight=0.4)
    ours, *_ = cfg.losses(policy, reference, sequences)
    expected, *_ = dpo_loss(*policy, *reference, beta=2.0, loss="ipo", label_smoothing=0.1, length_normalized=True,
                            nll_weight=0.4, lengths=torch.tensor([[3, 2], [2, 5]]))
    assert ours == expected
    assert Config().losses(policy, reference, sequences)[0] == dpo_loss(*policy, *reference, beta=0.1)[0]


@pytest.mark.parametrize("how", [{}, {"label_smoothing": 0.2}, {"loss": "ipo"}, {"loss": "ipo", "label_smoothing": 0.2},
                                 {"length_normalized": True}, {"nll_weight": 0.7}])
def test_gradient_by_finite_differences(how):
    logps = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lengths = torch.tensor([[3, 10, 2], [8, 4, 2]])
    assert torch.autograd.gradcheck(lambda x: dpo_loss(*x, beta=0.3, lengths=lengths, **how)[0], logps)


def test_sequence():
    assert sequence([5, 6], [6, 9], 1024) == ([1, 7, 8, 11, 1], 2)
    assert sequence([5, 6], [9], 1024) == ([1, 7, 8, 11, 1], 2)
    assert sequence([1, 2, 3, 4], [9, 8], 6) == ([1, 5, 6, 11, 10, 1], 3)  # a long prompt loses its beginning
    with pytest.raises(SystemExit):
        sequence([1], [2, 3, 4, 5], 5)


def test_completion_logp_is_the_sum_over_completion_and_eos_whatever_the_batch():
    lm = tiny().eval()
    rng = np.random.default_rng(0)
    sequences = [sequence(list(rng.integers(0, N_UNITS, a)), list(rng.integers(0, N_UNITS, b)), 64)
                 for a, b in ((3, 9), (30, 2), (1, 1), (8, 20))]
    with torch.no_grad():
        together = completion_logp(lm, sequences, "float32")
        for i, (tokens, n) in enumerate(sequences):
            x = torch.tensor([tokens])
            logp = lm(x)[0].log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])[-n:].sum()
            assert together[i].item() == pytest.approx(logp.item(), abs=1e-4)
            assert completion_logp(lm, [sequences[i]], "float32").item() == pytest.approx(logp.item(), abs=1e-4)


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
                    time_budget_hours="none", micro_batch=4, accumulation=2, lr=1e-2, log_every=1, save_every=3,
                    dtype="float32")
    return [f"--{k}={v}" for k, v in (settings | more).items()]


def test_it_learns_and_resumes_bit_equal(start, pairs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("dpo.py", *dpo_flags(start, pairs, whole))
    records = [json.loads(x) for x in (whole / "log.jsonl").read_text().splitlines()]
    first, *middle, last = records
    assert first["val_dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is still the reference
    assert first["val_margin"] == pytest.approx(0, abs=1e-3)
    assert last["val_dpo_loss"] < 0.6 and last["val_reward_accuracy"] > 0.7
    assert middle[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    process = subprocess.Popen([sys.executable, "dpo.py", *dpo_flags(start, pairs, killed)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith("step 00005"):
            process.kill()
            break
    process.communicate()
    run("dpo.py", *dpo_flags(start, pairs, killed), "--resume")
    assert (killed / "log.jsonl").read_text().count("\"loss\"") == 8
    weights = [(out / "checkpoint" / "model.safetensors").read_bytes() for out in (whole, killed)]
    assert weights[0] == weights[1]
    assert "--resume" in refused("dpo.py", *dpo_flags(start, pairs, whole))


def test_refusals(start, pairs, tmp_path):
    assert "no such pair file" in refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x", pairs="nowhere.jsonl"))
    assert "nowhere" in refused("dpo.py", *dpo_flags("out/nowhere", pairs, tmp_path / "x"))
    other = (pairs / "train.jsonl").read_text().replace("f" * 64, "0" * 64)
    (tmp_path / "other.jsonl").write_text(other)
    assert "different tokenisers" in refused("dpo.py", *dpo_flags(start, pairs, tmp_path / "x",
                                                                 pairs=tmp_path / "other.jsonl"))
    assert not (tmp_path / "x").exists()
