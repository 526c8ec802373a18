"""dev/mini_report.py: fits of curves that are known, and what is read from runs."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import Process, refused, run
from safetensors.torch import load_file

from dev.mini_report import best, cell, crossing, fit_accuracy, fit_loss, overlap, paired, points, read_runs, short
from slam.speech import text_losses
from slam.vocoder import EMBEDDED_VOCODER, Vocos

BUDGETS = np.array([150e3, 300e3, 600e3, 1.2e6, 2.4e6, 4.8e6, 9.6e6])


def logistic(x):
    return 100 / (1 + np.exp(-x))


def test_the_loss_that_was_put_in_comes_out():
    fit = fit_loss(BUDGETS, 1.1 + 30 * BUDGETS ** -0.4)
    assert fit.kind == "saturating"
    e, a, alpha = fit.parameters
    assert (e, alpha) == pytest.approx((1.1, 0.4), rel=1e-5)
    assert math.exp(a) * fit.centre ** alpha == pytest.approx(30, rel=1e-4)
    assert fit.at(96e6) == pytest.approx((1.1 + 30 * 96e6 ** -0.4, 0), abs=1e-5)


def test_a_power_law_where_nothing_tells_the_limit():
    three = fit_loss(BUDGETS[:3], 5 * BUDGETS[:3] ** -0.1)
    assert three.kind == "power" and three.at(6e6)[0] == pytest.approx(5 * 6e6 ** -0.1)
    bent_down = fit_loss(BUDGETS, 3 - 0.1 * np.log10(BUDGETS) ** 1.2)  # falls ever faster: no limit above 0
    assert bent_down.kind == "power"
    assert fit_loss(BUDGETS[:1], np.ones(1)) is None
    assert math.isnan(fit_loss(BUDGETS[:2], np.array([2.0, 1.5])).at(1e6)[1])  # two points tell no error


def test_the_error_of_the_loss_is_the_spread_of_fits():
    """The delta method's standard error of a prediction against the spread over draws of the noise."""
    rng, predicted, errors = np.random.default_rng(0), [], []
    for _ in range(100):
        fit = fit_loss(BUDGETS, 1.1 + 30 * BUDGETS ** -0.4 + rng.normal(0, 0.002, len(BUDGETS)))
        value, se = fit.at(9.6e7)
        predicted.append(value)
        errors.append(se)
    assert np.mean(predicted) == pytest.approx(1.1 + 30 * 9.6e7 ** -0.4, abs=3e-3)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(predicted), rel=0.25)


def test_accuracy_and_its_crossing():
    a, b = -4.0, 0.3
    errors = np.full(len(BUDGETS), 2.0)
    fit = fit_accuracy(BUDGETS, logistic(a + b * np.log(BUDGETS)), errors)
    assert fit.at(9.6e7)[0] == pytest.approx(logistic(a + b * math.log(9.6e7)), abs=1e-6)
    value, low, high = fit.interval(9.6e7)
    assert low < value < high and high - low == pytest.approx(2 * fit.at(9.6e7)[1], rel=0.05)  # little from the scale
    at, low, high = crossing(fit, 65)
    assert at == pytest.approx(math.exp((math.log(65 / 35) - a) / b), rel=1e-6) and low < at < high
    assert at / low == pytest.approx(high / at)  # symmetric in log tokens
    for ends in ((50, 75, 100), (100, 100, 100), (0, 50, 0)):  # of small sets of pairs
        value, low, high = fit_accuracy(BUDGETS[:3], np.array(ends), np.array([15, 12, 0])).interval(1e6)
        assert 0 <= value <= 100 and (math.isnan(low) or 0 <= low <= value <= high <= 100)


def test_the_error_of_the_crossing_is_the_spread_of_crossings():
    rng, logs, errors = np.random.default_rng(1), [], []
    for _ in range(300):
        noisy = logistic(-7 + 0.5 * np.log(BUDGETS)) + rng.normal(0, 1.0, len(BUDGETS))
        at, low, high = crossing(fit_accuracy(BUDGETS, noisy, np.full(len(BUDGETS), 1.0)), 65)
        logs.append(math.log(at))
        errors.append(math.log(high / low) / 2)
    # chance makes residuals larger than the known errors now and then, and then the error is larger, never smaller
    assert np.std(logs) <= np.mean(errors) <= 1.35 * np.std(logs)


def test_a_flat_accuracy_crosses_nowhere():
    flat = fit_accuracy(BUDGETS, 50 + np.array([1, -1, 0, 1, -1, 0, 0.5]), np.full(7, 2.0))
    assert crossing(flat, 65) is None
    assert fit_accuracy(BUDGETS[:2], np.array([50.0, 60.0]), np.ones(2)) is None


def test_overlap_by_hand():
    assert overlap(["a b c d"], ["B c, d!"], n=2) == pytest.approx(2 / 3)
    assert overlap(["a b c", "a b"], ["a b"], n=2) == pytest.approx(2 / 3)  # positions count, not kinds
    assert overlap(["a b"], ["a b"], n=8) == 0


def test_numbers_for_people():
    assert [short(n) for n in (150_000, 1_200_000, 96e6, 2.5e9, 7)] == ["150k", "1.2M", "96M", "2.5B", "7"]
    assert [cell(None), cell((1.234, None)), cell((1.234, 0.05), 2)] == ["", "1.2", "1.23 ± 0.05"]


@pytest.fixture
def study(runs, tmp_path):
    """A study's folder: real runs, under the study's names, with the results that an evaluation would have written."""
    for name, source, tokens, loss, accuracy in (
            ("twist_1000_0", "lm", 1000, 1.5, 52), ("twist_1000_1", "lm", 1000, 1.7, 54),
            ("twist_2000_0", "lm", 2000, 1.4, 58), ("twist_2000_0_dpo_0", "dpo", 50, 1.3, 60)):
        shutil.copytree(runs / source, tmp_path / name)
        slam = tmp_path / name / "checkpoint" / "slam.json"
        slam.write_text(json.dumps(json.loads(slam.read_text()) | {"tokens": tokens}))
        (tmp_path / name / "results.json").write_text(json.dumps(
            {"val_loss": {"value": loss, "n": 9, "settings": {}}, "bigram_loss": {"value": 2.5},
             "tstorycloze": {"value": accuracy, "se": 2.0}}))
    return tmp_path


def test_the_best_run_is_a_pretrained_one(study):
    assert best(sorted(study.iterdir())).name == "twist_2000_0"  # though the loss after DPO is lower here
    assert run("dev/mini_report.py", "best", *study.glob("twist_1*")).stdout.strip() == str(study / "twist_1000_0")
    assert "no finished run" in refused("dev/mini_report.py", "best", study / "nothing_0")


def test_seeds_are_averaged(study):
    rows = read_runs(study)
    assert list(rows) == ["twist_1000", "twist_2000", "twist_2000_0_dpo"]
    first, _ = points(rows, "twist", "tstorycloze")
    assert first[1:] == pytest.approx((53, 1, 2))  # mean, standard error over seeds, and over pairs
    report = run("dev/mini_report.py", study, study / "mini.png").stdout
    assert "| 1.600 ± 0.100 |" in report and "| 53.0 ± 1.0 |" in report and "| 58.0 ± 2.0 |" in report
    assert "| *bigrams of the units* |" in report and "2.500" in report


def test_prompts_are_compared_one_by_one(tmp_path):
    """Two prompts, two seeds: the second run's text of one prompt is a likelier one, the other's is the same."""
    texts = {"before": ["The dog was happy.", "Happy zinc the of was."] * 2, "after": ["The dog was happy."] * 4}
    for name, said in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "generated.jsonl").write_text("".join(json.dumps(
            {"prompt": f"{i % 2}.wav", "seed": i // 2, "text": x, "continuation_text": x}) + "\n"
            for i, x in enumerate(said)))
        (tmp_path / name / "results.json").write_text('{"gen_ppl": {"settings": {"new_units": 150}}}')
    likely, unlikely = text_losses(texts["before"][:2], "embedded:smollm2-135m")
    change, error = paired(tmp_path / "before", tmp_path / "after")["text"]
    assert change == pytest.approx(100 * (math.exp((likely - unlikely) / 2) - 1), abs=1e-3)
    assert error == pytest.approx((100 + change) * (unlikely - likely) / 2, rel=1e-4)  # of 0 and the difference
    for file, text in (("results.json", '{"gen_ppl": {"settings": {"new_units": 99}}}'), ("generated.jsonl", "")):
        whole = (tmp_path / "after" / file).read_text()
        (tmp_path / "after" / file).write_text(text)
        with pytest.raises(SystemExit, match="prompts, seeds or settings of GenPPL differ"):
            paired(tmp_path / "before", tmp_path / "after")
        (tmp_path / "after" / file).write_text(whole)


def test_the_script_names_its_steps():
    done = Process(["bash", "runs/mini_slam.sh", "curves"]).end()
    assert done.returncode == 2 and b"no such step; there are: data lr curve sentences dpo" in done.stderr


def test_the_average_of_two_runs_weights(runs, tmp_path):
    run("dev/average.py", runs / "lm", runs / "dpo", tmp_path / "average", "--share=0.25")
    before, after, average = (load_file(folder / "checkpoint" / "model.safetensors")
                              for folder in (runs / "lm", runs / "dpo", tmp_path / "average"))
    assert any((before[name] != after[name]).any() for name in after)
    for name, weight in average.items():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * after[name])
    slam = json.loads((tmp_path / "average" / "checkpoint" / "slam.json").read_text())
    assert slam["average"] == {str(runs / "lm"): 0.75, str(runs / "dpo"): 0.25} and slam["stage"] == "dpo"
    assert "their config.json differ" in refused("dev/average.py", "embedded:slam-mini", runs / "lm", tmp_path / "no")


def test_the_average_of_two_vocoders(tmp_path):
    """Of the shipped one and a copy whose weights are three times as large: a quarter of the way to the copy."""
    shipped, other = Vocos.read(EMBEDDED_VOCODER), Vocos.read(EMBEDDED_VOCODER)
    other.load_state_dict({name: 3 * weight for name, weight in other.state_dict().items()})
    other.save(tmp_path / "other.safetensors")
    command = "dev/average.py", EMBEDDED_VOCODER, tmp_path / "other.safetensors", tmp_path / "average.safetensors"
    run(*command, "--share=0.25")
    average = Vocos.read(tmp_path / "average.safetensors")
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(weight, 1.5 * shipped.state_dict()[name], rtol=2e-3, atol=1e-6)
    Vocos(shipped.fingerprint, 64, 1).save(tmp_path / "other.safetensors")
    assert "their shapes differ" in refused(*command)
