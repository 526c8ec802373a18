"""runs/corpora.py and runs/slam.sh: what is drawn, fetched and tokenised; the script's commands parse."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest
from conftest import Process, run
from test_readme import SETTINGS, WITHOUT, settings, split

from config import load_config
from runs.corpora import MIX, SOURCES, Source, draw, get, page, pieces, read_sources
from slam.units import UnitReader


def hours(names: list[str], corpus: str = "") -> float:
    known = pieces(SOURCES)
    return sum(known[n][0].hours / known[n][0].pieces for n in names if n.startswith(corpus))


def test_the_draw_is_a_reproducible_share_of_each_corpus():
    drawn = draw(SOURCES, 20_000)
    assert drawn == draw(SOURCES, 20_000) != draw(SOURCES, 20_000, seed=1) and len(set(drawn)) == len(drawn)
    for corpus, part in MIX.items():
        wanted, largest = 20_000 * part / sum(MIX.values()), max(
            s.hours / s.pieces for name, s in SOURCES.items() if name.startswith(f"{corpus}/"))
        assert wanted <= hours(drawn, corpus) < wanted + largest
    more = draw(SOURCES, 40_000)
    for corpus in MIX:  # more hours draw the same pieces first
        few, many = ([n for n in names if n.startswith(corpus)] for names in (drawn, more))
        assert many[:len(few)] == few
    everything = draw(SOURCES, 1e9)
    assert sorted(everything) == sorted(n for n in pieces(SOURCES) if n.partition("/")[0] in MIX)
    assert hours(everything) == pytest.approx(57_704 + 961 + 30_000, rel=1e-3)


def test_the_pieces_of_a_hub_repository_are_all_its_files():
    source, found = SOURCES["stinystories/part"], []
    for _, number in (x for name, x in pieces(SOURCES).items() if name.startswith("stinystories/")):
        found += range(source.files * number // source.pieces, source.files * (number + 1) // source.pieces)
    assert found == list(range(2191))


def test_published_digests_are_whole():
    for source in SOURCES.values():
        if source.digest:
            assert re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", source.digest) and source.pieces == 1
        assert not source.size or abs(source.size / 1e9 - source.gb) < 0.1


def test_the_first_page():
    text = page(SOURCES, 20_000, 0, "23.5")
    assert re.search(r"speech .*1,\d\d\d GB +\d\d GB  2\d,\d\d\d h of speech in \d\d pieces", text)
    assert all(len(line) <= 120 for line in text.splitlines()[:-1])


def test_a_piece_is_fetched_and_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr("top/1_a.wav", "a")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(4):
            tar.add(tmp_path / "x.zip", f"x/{i}.flac")
    sources = {"bench/sSC": Source((tmp_path / "x.zip").as_uri(), 1, unpack="*", name="s.zip"),
               "libri_light/x": Source((tmp_path / "x.tar").as_uri(), 1, 1, pieces=2)}
    out = tmp_path / "data"
    assert get("bench/sSC", sources, out) == out / "bench/sSC" and os.listdir(out / "bench/sSC") == ["1_a.wav"]
    found = [x for i in range(2) for x in tarfile.open(get(f"libri_light/x-00{i}", sources, out) / "x.tar").getnames()]
    assert found == [f"x/{i}.flac" for i in range(4)]
    assert len((out / "fetched.jsonl").read_text().splitlines()) == 3
    shutil.rmtree(out / "bench")
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes() + b"x")
    with pytest.raises(SystemExit, match="not the file that was fetched on"):
        get("bench/sSC", sources, out)
    with pytest.raises(SystemExit, match="md5:0+"):
        get("bench/sSC", {"bench/sSC": replace(sources["bench/sSC"], digest="md5:" + 32 * "0")}, tmp_path / "other")
    with pytest.raises(SystemExit, match="no such piece"):
        get("libri_light/x", sources, out)
    (tmp_path / "s.json").write_text('{"a/b": {"ulr": 1}}')
    with pytest.raises(SystemExit, match="not a list of sources.*ulr"):
        read_sources(str(tmp_path / "s.json"))


# ---------------------------------------------------------------- runs/slam.sh

def script(*steps, **variables) -> subprocess.CompletedProcess:
    done = Process(["bash", "runs/slam.sh", *steps], env=os.environ | variables).end()
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize("scale", ["slam", "scaled", "tiny"])
def test_every_command_of_the_script_parses(scale):
    said = script("--dry", SCALE=scale).stdout
    assert re.findall("==== (.*)", said) == [
        "setup", "models", "bench", "speech", "pairs", "train", "dpo", "evaluate", "sample"]
    found = re.findall(r"^\$ (?:python|torchrun --nproc_per_node=2) ((?:-m slam\.|\w+\.py|dev/|runs/).*)", said, re.M)
    assert len(found) >= 11
    for command in found:
        name, arguments = split(command)
        kinds = SETTINGS.get(name)
        if name in WITHOUT or name == "dev/tiny_sources.py":
            continue
        first = arguments.pop(0) if arguments[0] in kinds else ""
        load_config(settings(name, kinds[first]), arguments)
    for name, n in (("train.py", 1), ("dpo.py", 1), ("eval.py", 1), ("sample.py", 1), ("prepare_units.py", 4)):
        assert sum(x.startswith(name) for x in found) >= n


def test_a_recipe_of_ones_own(tmp_path):
    train = "config/slam_fast.py --time_budget_hours=6 --tokens=none"
    said = script("train", DRY="1", TRAIN=train, HOURS="3000").stdout
    command = re.search(r"^\$ python train.py (.*)", said, re.M)[1]
    cfg = load_config(settings("train.py", "Config"), shlex.split(command))
    assert (cfg.out, cfg.time_budget_hours, cfg.optimizer, cfg.tokens) == ("out/slam_fast", 6, "muon", None)
    assert len(cfg.train) >= 3 and "==== dpo" not in said


def test_an_unknown_step_is_named():
    result = script("trian", "--dry")
    assert result.returncode == 2 and "trian: no such step; there are: setup models bench" in result.stderr


def test_results_stand_beside_the_papers(runs):
    text = run("dev/slam_report.py", "slam", runs / "lm", runs / "dpo").stdout
    loss = json.loads((runs / "lm" / "results.json").read_text())["val_loss"]["value"]
    assert f"| validation loss, nats per unit | {loss:.2f} | - |" in text and "6 steps" in text
    assert "| sBLIMP, % | - | 56.45 | - | 58.86 |" in text and "| GenPPL | - | 88.3 | - | 62.8 |" in text
    assert "56.45" not in run("dev/slam_report.py", "tiny", runs / "lm", runs / "dpo").stdout


@pytest.mark.parametrize("mib, expected", [
    ("24564", "config/slam.py --out"), ("16376", "config/gpu_16gb.py"), ("12288", "config/gpu_12gb.py"),
    ("4096 24564", "config/slam.py --out"), ("8192", "config/gpu_8gb.py"), ("6144", "6144 MiB of memory"),
    ("", "nvidia-smi finds 0"), ("15360, 7.5", "older than Ampere")])
def test_the_preset_follows_the_memory_of_the_gpu(tmp_path, mib, expected):
    """By a program called nvidia-smi that prints what the real one does."""
    lines = [mib] if "," in mib else [f"{x}, 8.6" for x in mib.split()]
    said = "".join(f"echo '{x}'\n" for x in lines) or "exit 9\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{said}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    result = script("train", DRY="1", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 0 and expected in result.stdout + result.stderr
    if "config" not in expected:
        result = script("train", PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert result.returncode == 1 and expected in result.stderr and "====" not in result.stdout


def test_speech_is_fetched_and_tokenised_and_a_killed_run_goes_on(tmp_path, stories):
    """Two archives of speech, served as files: killed after the first, the second comes; nothing comes twice."""
    sources, out = tmp_path / "sources.json", tmp_path / "out"
    run("dev/tiny_sources.py", stories, sources)
    kept = {k: v for k, v in json.loads(sources.read_text()).items() if k.startswith("librispeech_dev/")}
    out.mkdir()
    (out / "sources.json").write_text(json.dumps(kept))
    variables = {"SCALE": "tiny", "OUT": str(out), "VIRTUAL_ENV": sys.prefix}
    process = Process(["bash", "runs/slam.sh", "speech"], env=os.environ | variables)
    first = out / "units/librispeech_dev/dev-clean"
    process.until(lambda: (first / "done").exists() and b"--out=" in process.said()[0].rpartition(b"dev-other\n")[0])
    process.kill()  # the script alone: what it has started goes on, and a second script must not come between
    second = script("speech", **variables)
    assert second.returncode == 1 and "is at work here, or a process that a killed one has left" in second.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.end()
    before = (first / "report.json").stat().st_mtime_ns
    assert Process(["flock", "-w", "60", out / "slam.lock", "true"]).end().returncode == 0  # the killed have ended
    third = script("speech", **variables)
    assert third.returncode == 0, third.stderr
    assert (first / "report.json").stat().st_mtime_ns == before  # not tokenised again
    assert (out / "steps.tsv").read_text().startswith("speech\t")
    folders = [out / "units" / name for name in kept]
    assert all((folder / "done").exists() for folder in folders)
    assert len(set(UnitReader(*folders).ids())) == len(UnitReader(*folders)) == 3
    assert sorted(UnitReader(folders[0].parent).ids()) == sorted(UnitReader(*folders).ids())  # config/slam.py names it
    assert sorted(p.name for p in out.glob("data/**/*") if p.is_file()) == ["fetched.jsonl"]  # archives are gone
