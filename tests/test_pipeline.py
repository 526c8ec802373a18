"""The whole pipeline in miniature on the real embedded parts: stories, units, training, DPO, evaluation, sampling."""
import json
import shutil

import numpy as np
import pytest
import soundfile
from conftest import refused, run

from units import UnitReader


@pytest.fixture(scope="module")
def runs(stories, tmp_path_factory):
    """A few steps of every stage, by the demo's own configs."""
    out = tmp_path_factory.mktemp("runs")
    small = ["--n_layers=2", "--context=512", "--micro_batch=2", "--batch_tokens=1024", "--time_budget_hours=none"]
    data = [f"--train={stories}/units/train", f"--val={stories}/units/val"]
    run("train.py", "config/demo_train.py", *data, *small, "--steps=6", f"--out={out}/lm")
    run("dpo.py", "config/demo_dpo.py", f"--checkpoint={out}/lm", f"--pairs={stories}/pairs_train.jsonl",
        f"--val_pairs={stories}/pairs_val.jsonl", "--steps=2", "--micro_batch=2", "--accumulation=1",
        f"--out={out}/dpo")
    return out


def test_evaluation(runs, stories):
    done = run("eval.py", "config/demo_eval.py", f"--checkpoint={runs}/lm,{runs}/dpo",
               f"--train={stories}/units/train", f"--val={stories}/units/val",
               f"--pairs={stories}/tstorycloze,{stories}/sblimp", f"--generate_from={stories}/tstorycloze",
               "--n_generate=2", "--new_units=40", "--keep_audio")
    for name in ("lm", "dpo"):
        results = json.loads((runs / name / "results.json").read_text())
        assert set(results) >= {"val_loss", "unigram_loss", "bigram_loss", "tstorycloze", "sblimp", "gen_ppl",
                                "auto_bleu"}
        assert results["tstorycloze"]["n"] == 4 and results["sblimp"]["n"] == 8
        assert len(results["sblimp"]["by_type"]) == 4
        assert results["gen_ppl"]["n"] + results["gen_ppl"]["empty"] == 2
        assert len(list((runs / name).glob("generated_*.wav"))) == 2
        assert all(m in done.stdout for m in ("bigram_loss", "tstorycloze", "gen_ppl"))
    assert "val_loss_before_training" in json.loads((runs / "lm" / "results.json").read_text())


def test_a_prompt_is_continued_aloud(runs, voice, tmp_path):
    prompt = tmp_path / "prompt.wav"
    wave = voice("Once upon a time, there was a little fox.")
    soundfile.write(prompt, np.stack([wave, wave], 1), 16_000)
    out = tmp_path / "samples"
    done = run("sample.py", f"--prompt={prompt}", f"--checkpoint={runs}/lm", f"--out={out}", "--n=2",
               "--continuation_seconds=3")
    record = json.loads((out / "samples.json").read_text())
    assert len(record["samples"]) == 2 and "heard:" in done.stdout
    first, second = record["samples"]
    assert first["units"] != second["units"] and first["prompt_units"] == second["prompt_units"]
    whole, rate = soundfile.read(first["whole"])
    assert len(whole) / rate > len(wave) / 16_000 * 0.8
    assert "fox" in first["whole_text"].lower() or "time" in first["whole_text"].lower()
    assert "overwrite" in refused("sample.py", f"--prompt={prompt}", f"--checkpoint={runs}/lm", f"--out={out}")


def test_bad_prompts_and_checkpoints(runs, voice, tmp_path):
    silent, good = tmp_path / "silent.wav", tmp_path / "good.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    soundfile.write(good, voice("Hello there."), 16_000)
    assert "silent" in refused("sample.py", f"--prompt={silent}", f"--checkpoint={runs}/lm")
    assert "no such audio file" in refused("sample.py", "--prompt=nowhere.wav", f"--checkpoint={runs}/lm")
    assert "name at least one audio file" in refused("sample.py")
    assert "out/nowhere" in refused("eval.py", "--checkpoint=out/nowhere", f"--pairs={tmp_path}")
    half = tmp_path / "half"
    shutil.copytree(runs / "lm" / "checkpoint", half)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    assert str(half) in refused("sample.py", f"--prompt={good}", f"--checkpoint={half}", f"--out={tmp_path}/s")
    (half / "slam.json").unlink()
    assert "slam.json" in refused("sample.py", f"--prompt={good}", f"--checkpoint={half}", f"--out={tmp_path}/s")


def test_a_prompt_is_said_again_from_its_units(voice, tmp_path):
    wave = voice("Once upon a time, there was a little fox. He lived in a forest.")
    soundfile.write(tmp_path / "p.wav", wave, 16_000)
    done = run("sample.py", f"--prompt={tmp_path}/p.wav", "--resynth", f"--out={tmp_path}/s")
    again, rate = soundfile.read(tmp_path / "s" / "00_p_resynth.wav")
    assert abs(len(again) / rate - len(wave) / 16_000) < 0.1
    sample, = json.loads((tmp_path / "s" / "samples.json").read_text())["samples"]
    assert "little fox" in sample["prompt_text"] and "little fox" in sample["resynth_text"]
    assert sum(sample["durations"]) == len(wave) // 640 and "units per second" in done.stdout


def test_a_model_of_pieces(stories, voice, tmp_path):
    """BPE over units, all the way: pieces, a model of them, its loss in bits per second, and speech again."""
    run("prepare_units.py", "bpe", f"--units={stories}/units/train,{stories}/units/val", f"--out={tmp_path}/bpe",
        "--n_pieces=600")
    tokenizer, val = f"--tokenizer={tmp_path}/bpe/tokenizer.safetensors", f"--val={tmp_path}/bpe/val"
    run("train.py", "config/demo_train.py", f"--train={tmp_path}/bpe/train", val, "--n_layers=2", "--context=512",
        "--micro_batch=2", "--batch_tokens=1024", "--time_budget_hours=none", "--steps=4", f"--out={tmp_path}/lm")
    assert json.loads((tmp_path / "lm" / "checkpoint" / "config.json").read_text())["vocab_size"] == 602
    model, prompt = f"--checkpoint={tmp_path}/lm", tmp_path / "p.wav"
    run("eval.py", model, val, tokenizer, f"--pairs={stories}/sblimp", f"--generate_from={stories}/tstorycloze",
        "--n_generate=2", "--new_units=20", "--may_end=false", "--keep_audio")
    results = json.loads((tmp_path / "lm" / "results.json").read_text())
    hours, n = UnitReader(tmp_path / "bpe" / "val").hours, results["val_loss"]["n"]
    assert results["val_bits_per_second"]["value"] == pytest.approx(
        results["val_loss"]["value"] * n / np.log(2) / hours / 3600)
    assert {"sblimp", "gen_ppl"} <= set(results) and list((tmp_path / "lm").glob("generated_*.wav"))
    soundfile.write(prompt, voice("Once upon a time."), 16_000)
    run("sample.py", f"--prompt={prompt}", model, tokenizer, f"--out={tmp_path}/s", "--continuation_seconds=2")
    sample, = json.loads((tmp_path / "s" / "samples.json").read_text())["samples"]
    assert max(sample["prompt_units"]) < 600 and soundfile.info(sample["whole"]).duration > 1
    assert "different tokenisers" in refused("sample.py", f"--prompt={prompt}", model, f"--out={tmp_path}/t")
