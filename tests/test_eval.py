"""eval.py: metrics against brute force."""
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval import Config, baseline_scores, main, perplexity, table
from slam.benchmarks import Benchmark
from slam.checkpoint import merge_results
from slam.speech import load_judge


def test_perplexity_counts_empty_texts():
    fluent, other = "Once upon a time, there was a little girl who lived in a small house.", "He ran. He sat down."
    cfg = Config(val=("x",), judge="embedded:smollm2-135m")
    alone = perplexity([fluent], cfg)
    assert alone["value"] < 20 and alone["empty"] == 0 and alone["se"] is None
    with_empty = perplexity([fluent, "", " "], cfg)
    assert with_empty["value"] == pytest.approx(alone["value"]) and with_empty["empty"] == 2
    assert perplexity([""], cfg)["value"] is None
    model, tokenizer = load_judge(cfg.judge)
    losses = []
    for text in (fluent, other):
        ids = torch.tensor([tokenizer(text).input_ids])
        logp = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
        losses.append(-logp.mean().item())
    both = perplexity([fluent, other], replace(cfg, n_seeds=2))
    assert both["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert both["seeds"] == pytest.approx([math.exp(x) for x in losses], rel=1e-3)


def test_what_cannot_be_resynthesised_is_named(tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(SystemExit, match="empty.wav: empty file"):
        main(Config(resynth_from=str(tmp_path)))


def test_pairs_without_transcripts_are_not_judged_and_counted(capsys):
    benchmark = Benchmark("pairs", "", pairs=[{"id": "a", "positive_text": "Hi."}, {"id": "b"}])
    assert baseline_scores(Config(val=("x",), text_judge="embedded:smollm2-135m"), benchmark, [], {}) == {}
    assert "pairs: not scored by the text judge, as 3 transcripts are missing" in capsys.readouterr().out


def test_a_manifest_is_not_replaced(tmp_path):
    assert "exists; name another file" in " ".join(
        Config(benchmark=("sblimp",), path=("x",), write_manifest=str(tmp_path)).problems())


def test_no_prompts_and_no_continuations_are_refused():
    for wrong in ({"prompt_seconds": -3}, {"new_units": 0}):
        assert "prompt_seconds above 0" in " ".join(Config(generate_from="x", **wrong).problems())


def test_without_a_checkpoint_the_newest_is_evaluated(corpus, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished checkpoint under out/"):
        main(Config(val=(f"{corpus}/val",)))
    shutil.copytree(runs / "lm", "out/mine")
    main(Config(val=(str(runs.parent / "stories" / "data" / "units" / "val"),)))
    assert "written to out/mine/results.json" in capsys.readouterr().out


def test_a_missing_judge_is_told_before_anything_is_scored(runs, stories, tmp_path):
    shutil.copytree(runs / "lm", tmp_path / "lm")
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        main(Config((str(tmp_path / "lm"),), manifest=(str(stories / "sblimp"),), judge=f"{tmp_path}/nowhere",
                    generate_from=str(stories / "tstorycloze")))
    assert "sblimp" not in (tmp_path / "lm" / "results.json").read_text()


def test_results_merge(tmp_path):
    merge_results(tmp_path / "results.json", {"a": {"value": 1}, "b": {"value": 2}})
    merge_results(tmp_path / "results.json", {"b": {"value": 3}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"value": 1}, "b": {"value": 3}}


def test_table():
    text = table({"x": {"val_loss": {"value": 1.234}, "tsc": {"value": 78.0, "se": 0.91}}, "y": {"tsc": {"value": 5}}})
    assert "val_loss" in text and "78.00 ± 0.9" in text and text.splitlines()[1].split() == ["val_loss", "1.23", "-"]
