"""slam/units.py: the contract between the stages."""
import json
import os
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from slam.units import (
    Fingerprint,
    UnitReader,
    UnitWriter,
    dedup,
    newest_first,
    read_pairs,
    require_same,
    to_tokens,
    to_units,
    vocab_size,
    write_pairs,
)


def test_vocabulary():
    assert vocab_size(500) == 502
    assert to_tokens([0, 499]) == [1, 2, 501, 1]
    assert to_units(to_tokens([3, 49])) == [3, 49]


def test_dedup_is_groupby():
    x = np.random.default_rng(0).integers(0, 3, 500)
    units, durations = dedup(x)
    assert [(k, len(list(g))) for k, g in groupby(x)] == list(zip(units, durations))
    assert durations.sum() == len(x)


def test_write_read(tmp_path, fingerprint):
    rng = np.random.default_rng(0)
    said = [(rng.integers(0, 20, n), rng.integers(1, 5, n)) for n in (3, 50, 7, 1)]
    with UnitWriter(tmp_path, fingerprint, "here", durations=True, shard_tokens=40) as writer:
        for i, (units, durations) in enumerate(said):
            writer.add(f"u{i}", units, durations, text=f"täxt {i}")
    reader = UnitReader(tmp_path)
    assert len(reader.shards) == 2 and len(reader) == 4
    assert reader.fingerprint == fingerprint
    for i, (units, durations) in enumerate(said):
        assert reader.tokens(i).tolist() == to_tokens(units)
        assert reader.units(i).tolist() == units.tolist()
        assert reader.durations(i).tolist() == durations.tolist()
    assert [r["text"] for r in reader.records()] == [f"täxt {i}" for i in range(4)]
    assert reader.n_tokens == sum(len(u) + 2 for u, _ in said) == reader.lengths.sum()
    assert reader.hours == pytest.approx(sum(d.sum() for _, d in said) / 25 / 3600)
    assert len(UnitReader(*sorted(tmp_path.glob("*.safetensors")))) == 4
    with UnitWriter(tmp_path / "other", fingerprint, "there", durations=False) as writer:
        writer.add("u", said[0][0], None)
    assert UnitReader(tmp_path, tmp_path / "other").hours == 0  # not known of all


def test_resume_keeps_whole_shards_and_loses_the_rest(tmp_path, fingerprint):
    writer = UnitWriter(tmp_path, fingerprint, shard_tokens=10)
    writer.add("a", np.arange(10), np.ones(10))
    writer.add("b", np.arange(3), np.ones(3))  # not flushed: as if killed
    (tmp_path / "00001.safetensors.0.part").write_bytes(b"half a shard")
    with UnitWriter(tmp_path, fingerprint, shard_tokens=10) as again:
        assert again.done == {"a"}
        again.add("b", np.arange(3), np.ones(3))
    assert UnitReader(tmp_path).ids() == ["a", "b"]


def test_different_tokenisers_are_refused(tmp_path, fingerprint):
    other = replace(fingerprint, codebook_sha256="0" * 64)
    for name, f in (("a", fingerprint), ("b", other)):
        with UnitWriter(tmp_path / name, f) as writer:
            writer.add("x", np.arange(3), np.ones(3))
    with pytest.raises(SystemExit) as e:
        UnitReader(tmp_path / "a", tmp_path / "b")
    for word in (str(tmp_path / "a"), str(tmp_path / "b"), "f" * 12, "0" * 12):
        assert word in str(e.value)
    with pytest.raises(SystemExit, match="different tokenisers"):
        UnitWriter(tmp_path / "a", other)
    require_same(fingerprint, "a", Fingerprint(**fingerprint.to_dict()), "b")


def test_an_unrecorded_codebook_joins_only_one_other(tmp_path, fingerprint, capsys):
    """Units whose codebook is not recorded may be read with any other's, but do not let two others in together."""
    kinds = {"unrecorded": "", "a": "a" * 64, "b": "b" * 64}
    for name, sha in kinds.items():
        with UnitWriter(tmp_path / name, replace(fingerprint, codebook_sha256=sha), shard_tokens=1) as writer:
            for i in range(3):  # shards
                writer.add(f"{name}{i}", np.arange(3), np.ones(3))
    assert UnitReader(tmp_path / "unrecorded", tmp_path / "a").fingerprint.codebook_sha256 == kinds["a"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(tmp_path / "unrecorded") in lines[0] and "does not say which codebook" in lines[0]
    with pytest.raises(SystemExit, match="different tokenisers"):
        UnitReader(tmp_path / "unrecorded", tmp_path / "a", tmp_path / "b")


def test_files_of_earlier_versions_still_load(tmp_path, fingerprint):
    """Their headers list skipped recordings too."""
    with UnitWriter(tmp_path, fingerprint) as writer:
        writer.add("x", np.arange(3), np.ones(3))
    path = tmp_path / "00000.safetensors"
    with safe_open(path, "numpy") as f:
        tensors, header = {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["slam"])
    path.write_bytes(save(tensors, {"slam": json.dumps(header | {"skipped": [{"id": "y", "reason": "silent"}]})}))
    assert UnitReader(path).units(0).tolist() == [0, 1, 2]


def test_files_that_change_while_in_use_are_named(tmp_path, fingerprint):
    for name in ("a", "b"):
        with UnitWriter(tmp_path / name, fingerprint) as writer:
            writer.add("x", np.arange(3), np.ones(3))
    reader = UnitReader(tmp_path / "a", tmp_path / "b")
    reader.check()
    os.utime(tmp_path / "a" / "00000.safetensors", (0, 0))
    with pytest.raises(SystemExit, match="a/00000.safetensors: changed while in use"):
        reader.check()
    (tmp_path / "a" / "00000.safetensors").unlink()
    with pytest.raises(SystemExit, match="a/00000.safetensors: gone while in use"):
        reader.check()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing"])
def test_damaged_unit_files_are_named(tmp_path, fingerprint, damage):
    with UnitWriter(tmp_path, fingerprint) as writer:
        writer.add("x", np.arange(20), np.ones(20))
    path = tmp_path / "00000.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[:-9], "text": b"not a unit file at all", "empty": b""}[damage])
    with pytest.raises(SystemExit, match=str(tmp_path)):
        UnitReader(tmp_path)


def test_pairs(tmp_path, fingerprint):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"id": "a", "prompt": [1, 2], "chosen": [3], "rejected": [4], "prompt_text": "hi"},
             {"id": "b", "prompt": [1, 2], "chosen": [3], "rejected": [4], "chosen_ended": True,
              "rejected_ended": False}]
    pairs[1]["id"] = os.fsdecode(b"caf\xe9.wav")  # a file's name need not be UTF-8
    write_pairs(path, fingerprint, pairs)
    assert read_pairs(path) == (fingerprint, pairs)
    for bad in ({"prompt": [1], "chosen": [], "rejected": [2]}, {"prompt": [1], "chosen": [2]},
                {"prompt": [1], "chosen": [20], "rejected": [2]},
                {"prompt": [1], "chosen": [2], "rejected": [3], "rejected_ended": "no"}):
        write_pairs(path, fingerprint, pairs + [bad])
        with pytest.raises(SystemExit, match="pair 3"):
            read_pairs(path)
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(SystemExit, match="no such pair file"):
            read_pairs(path)


def test_newest_files_first_but_not_those_that_have_gone(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("old.x", "sub/new.x", "other.y")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "gone.x").symlink_to("nowhere")  # as if it had gone between listing and looking
    assert newest_first(tmp_path, "*.x") == [tmp_path / "sub" / "new.x", tmp_path / "old.x"]
    assert newest_first(tmp_path / "nothing", "*.x") == []


def test_sizes_are_of_the_paths_not_of_the_shards(corpus):
    reader = UnitReader(corpus / "val", corpus / "train", corpus / "val" / "00000.safetensors")
    assert len(reader.shards) == 4 and reader.sizes == [30, 200, 30]
