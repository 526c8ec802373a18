"""Checkpoint folders: damaged, missing, killed while saving; SlamKit's layout, read and written."""
import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run
from safetensors.torch import load_file, save_file
from test_hub_lm import hub_model
from test_model import V, hf_model, our_model, random_tokens

from model import UnitLM
from slam.checkpoint import checkpoint_fingerprint, fetch, recover, write_folder
from slam.units import UnitWriter, write_pairs


@pytest.fixture(scope="module")
def lm():
    return our_model()


@pytest.fixture
def checkpoint(tmp_path, lm):
    lm.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage, word", [
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:100]), "not a whole checkpoint"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda f: os.truncate(f / "model.safetensors", 0), "damaged weights"),
    (lambda f: os.truncate(f / "model.safetensors", 5), "damaged weights"),
    (lambda f: os.truncate(f / "model.safetensors", 700), "damaged weights"),
    (lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 1), "damaged weights"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin").write_bytes(b""), "damaged weights"),
    (lambda f: rewrite_weights(f, lambda s: s.pop("model.norm.weight")), "missing.*model.norm.weight"),
    (lambda f: rewrite_weights(f, lambda s: s.update(extra=torch.ones(1))), "unexpected.*extra"),
    (lambda f: rewrite_config(f, vocab_size=V + 2), "embed_tokens"),
    (lambda f: rewrite_config(f, num_hidden_layers=4), "missing.*layers.3"),
    (lambda f: rewrite_config(f, model_type="gpt2"), "gpt2"),
    (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'), "model-00001-of-00002"),
], ids=["no config", "half a config", "no weights", "empty weights", "5 bytes", "700 bytes", "a byte short",
        "empty .bin", "key missing", "key too many", "other vocabulary", "other depth", "other type", "shard missing"])
def test_a_damaged_folder_is_named(checkpoint, damage, word):
    damage(checkpoint)
    with pytest.raises(SystemExit, match=word) as error:
        UnitLM.from_pretrained(str(checkpoint))
    assert str(checkpoint) in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no-such-checkpoint.*no such folder"):
        UnitLM.from_pretrained(str(tmp_path / "no-such-checkpoint"))


def test_a_hub_id_out_of_reach_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="nobody/no-such-model: no such folder here, and downloading it"):
        UnitLM.from_pretrained("nobody/no-such-model")


def test_names_of_a_folder(checkpoint, lm, monkeypatch):
    """A relative path, a trailing slash, the current folder."""
    monkeypatch.chdir(checkpoint)
    for name in ("../checkpoint", f"{checkpoint}/", "."):
        assert torch.equal(UnitLM.from_pretrained(name).model.norm.weight, lm.model.norm.weight)


def test_weights_may_be_read_by_whom_the_settings_may(checkpoint):
    assert len({path.stat().st_mode for path in checkpoint.iterdir()}) == 1


def test_saving_replaces_and_leaves_nothing_behind(checkpoint, lm):
    lm.save_pretrained(checkpoint, slam={"step": 1})
    other = our_model(seed=1)
    other.save_pretrained(checkpoint)
    assert torch.equal(UnitLM.from_pretrained(str(checkpoint)).model.norm.weight, other.model.norm.weight)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "model.safetensors"]  # no stale slam.json
    other.save_pretrained(checkpoint.parent / "deep" / "er" / "checkpoint")
    assert (checkpoint.parent / "deep" / "er" / "checkpoint" / "config.json").is_file()


@pytest.mark.parametrize("moment", ["writing the new one", "before the renames", "between the renames",
                                    "before the old one is cleared", "while the old one is cleared"])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(checkpoint, lm, moment):
    """The folders as a kill at this moment leaves them load as the old or the new one, and the next save works."""
    new, old = checkpoint.with_name("checkpoint.new"), checkpoint.with_name("checkpoint.old")
    other = our_model(seed=1)
    other.save_pretrained(new)
    if moment == "writing the new one":
        os.truncate(new / "model.safetensors", 1000)
        (new / "config.json").unlink()
    elif moment != "before the renames":
        checkpoint.rename(old)
        if moment != "between the renames":
            new.rename(checkpoint)
        if moment == "while the old one is cleared":
            (old / "config.json").unlink()
    expected = other if moment.endswith("cleared") else lm
    assert torch.equal(UnitLM.from_pretrained(str(checkpoint)).model.norm.weight, expected.model.norm.weight)
    third = our_model(seed=2)
    third.save_pretrained(checkpoint)
    assert torch.equal(UnitLM.from_pretrained(str(checkpoint)).model.norm.weight, third.model.norm.weight)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_saving_straight_after_a_kill_between_the_renames(checkpoint, lm):
    """Nothing was loaded in between: the folder itself is not there when the next save starts."""
    checkpoint.rename(checkpoint.with_name("checkpoint.old"))
    recover(checkpoint)  # what a resume and the next save begin with
    assert torch.equal(UnitLM.from_pretrained(str(checkpoint)).model.norm.weight, lm.model.norm.weight)
    assert checkpoint.is_dir()
    checkpoint.rename(checkpoint.with_name("checkpoint.old"))
    other = our_model(seed=1)
    other.save_pretrained(checkpoint)
    assert torch.equal(UnitLM.from_pretrained(str(checkpoint)).model.norm.weight, other.model.norm.weight)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_saving_through_a_link(checkpoint, lm):
    """A checkpoint kept on another disk and linked here: saving again and again works."""
    link = checkpoint.parent / "here" / "checkpoint"
    link.parent.mkdir()
    link.symlink_to(checkpoint)
    for seed in (1, 2, 3):
        other = our_model(seed)
        other.save_pretrained(link)
        assert torch.equal(UnitLM.from_pretrained(str(link)).model.norm.weight, other.model.norm.weight)
    assert [p.name for p in link.parent.iterdir()] == ["checkpoint"]


def test_reading_while_another_process_saves(tmp_path):
    """An evaluation looks a checkpoint up at any moment: it finds one, and the training's save does not fail."""
    folder, stop, found = tmp_path / "a", threading.Event(), []
    folder.mkdir()

    def reader():
        while not stop.is_set():
            found.append(False)
            found[-1] = fetch(str(folder)) is not None

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        for i in range(150):
            write_folder(folder, {"number": i}, {})
            assert json.loads((folder / "config.json").read_text()) == {"number": i}
    finally:
        stop.set()
        thread.join()
    assert found and all(found)


def test_loading_deletes_nothing(checkpoint, lm):
    """A user's own copies beside a checkpoint outlive its being read."""
    for name in ("checkpoint.old", "checkpoint.new", "checkpoint.bak"):
        lm.save_pretrained(checkpoint.with_name("copy"))
        checkpoint.with_name("copy").rename(checkpoint.with_name(name))
    UnitLM.from_pretrained(str(checkpoint))
    assert len(list(checkpoint.parent.iterdir())) == 4


# ---------------------------------------------------------------- SlamKit's checkpoints

def slamkit_folder(folder, hf) -> None:
    """A checkpoint as SlamKit writes one: nested base_config, fp32 weights named lm.*, no tied head."""
    folder.mkdir(parents=True)
    base = hf.config.to_dict()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["UnitLM"], "model_type": "speech_language_model", "base_model_name": "Qwen/Qwen2.5-0.5B",
        "base_config": base, "vocab_size": base["vocab_size"], "twist_init": True, "torch_dtype": "float32"}))
    state = {f"lm.{k}": v.contiguous() for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_slamkit_checkpoints_load(tmp_path):
    hf = hf_model("qwen2")
    slamkit_folder(tmp_path / "slam", hf)
    lm, x = UnitLM.from_pretrained(str(tmp_path / "slam")), random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(lm(x)[0], hf(x).logits, atol=1e-4, rtol=1e-4)
    fingerprint = checkpoint_fingerprint(str(tmp_path / "slam"))
    assert (fingerprint.encoder, fingerprint.layer, fingerprint.n_units) == ("slprl/mhubert-base-25hz", 11, 58)
    config = tmp_path / "slam" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 152_168}))  # a model of text, too
    with pytest.raises(SystemExit, match="slam.json: missing, and .* is not a speech-only checkpoint of SlamKit"):
        checkpoint_fingerprint(str(tmp_path / "slam"))


def test_slamkit_checkpoints_are_scored_continued_and_tuned(tmp_path):
    """Like ours: a validation loss on units of the published tokeniser, a continuation, a DPO run."""
    hf = hf_model("qwen2")
    slamkit_folder(tmp_path / "slam", hf)
    fingerprint = checkpoint_fingerprint(str(tmp_path / "slam"))
    with UnitWriter(tmp_path / "val", replace(fingerprint, codebook_sha256="a" * 64)) as writer:
        writer.add("x", np.arange(30), np.ones(30))
    done = run("eval.py", f"--checkpoint={tmp_path / 'slam'}", f"--val={tmp_path / 'val'}")
    assert "slam does not say which codebook" in done.stderr
    x = torch.arange(1, 33)[None] % 32
    x[0, -1] = 1  # BOS, units 0 to 29, EOS
    with torch.no_grad():
        expected = F.cross_entropy(hf(x[:, :-1]).logits[0], x[0, 1:]).item()
    results = json.loads((tmp_path / "slam" / "results.json").read_text())
    assert results["val_loss"]["value"] == pytest.approx(expected, rel=1e-4)
    other = replace(fingerprint, encoder="facebook/hubert-base-ls960")
    with UnitWriter(tmp_path / "other", other) as writer:
        writer.add("x", np.arange(30), np.ones(30))
    assert "hubert-base-ls960" in refused("eval.py", f"--checkpoint={tmp_path / 'slam'}", f"--val={tmp_path / 'other'}")

    lm = UnitLM.from_pretrained(str(tmp_path / "slam"))
    with torch.no_grad():
        theirs = hf.generate(x[:, :8], max_new_tokens=9, do_sample=False, suppress_tokens=[0], eos_token_id=None)
    assert lm.generate([x[0, :8].tolist()], 9, temperature=0, stop=()) == theirs[:, 8:].tolist()

    pairs = [{"id": str(i), "prompt": [i, i + 1], "chosen": [i + 2, 5], "rejected": [i + 3, 40]} for i in range(8)]
    for split in ("train", "val"):
        write_pairs(tmp_path / f"{split}.jsonl", fingerprint, pairs)
    run("dpo.py", f"--checkpoint={tmp_path / 'slam'}", f"--pairs={tmp_path / 'train.jsonl'}",
        f"--val_pairs={tmp_path / 'val.jsonl'}", f"--out={tmp_path / 'dpo'}", "--steps=2", "--batch_pairs=4",
        "--lr=1e-3", "--n_samples=0")
    assert json.loads((tmp_path / "dpo" / "results.json").read_text())["val_dpo_loss"]["step"] == 2
    assert checkpoint_fingerprint(str(tmp_path / "dpo" / "checkpoint")) == fingerprint


@pytest.mark.parametrize("kind", ["qwen2", "opt", "gpt_neox"])
def test_our_export_comes_back_bit_equal(tmp_path, kind):
    lm = our_model() if kind == "qwen2" else None
    if lm is None:
        hub_model(kind).save_pretrained(tmp_path / "hf")
        lm = UnitLM.from_pretrained(str(tmp_path / "hf"))
    slam = {"fingerprint": {"encoder": "e", "layer": 1, "unit_rate_hz": 25.0, "n_units": 58, "dedup": True,
                            "codebook_sha256": "f" * 64}}
    lm.save_pretrained(tmp_path / "run" / "checkpoint", slam=slam)
    run("model.py", "export", tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "speech_language_model" and config["base_config"]["model_type"] == kind
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert all(k.startswith("lm.") for k in names) and "lm.lm_head.weight" not in names
    back = UnitLM.from_pretrained(str(tmp_path / "out"))
    assert back.state_dict().keys() == lm.state_dict().keys()
    assert all(torch.equal(v, lm.state_dict()[k]) for k, v in back.state_dict().items())
    assert checkpoint_fingerprint(str(tmp_path / "out")).encoder == "e"
    assert "exists" in refused("model.py", "export", tmp_path / "run", tmp_path / "out")
