"""slam/kmeans.py, dev/check_tokenizer.py: fitting, checking, and reading a pickle without running what is in it."""
import json
import os
import pickle
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused, run
from test_audio import pack, tone
from test_tokenizer import hubert

from config import load_config
from dev.check_tokenizer import CheckConfig, check
from slam.kmeans import FitConfig, draw, kmeans, read_kmeans
from slam.tokenizer import SpeechTokenizer, assign

SENTENCES = ["The little bear lived in a big forest.", "One day, he found a shiny key under a tree.",
             "Tom and his sister went to the river to catch some fish.", "It was cold, so they made a fire.",
             "Can I have a piece of cake, please, asked the girl.", "No, said her mother, eat your soup first."]


@pytest.fixture(scope="module")
def speech(voice, tmp_path_factory):
    """Five recordings of 20 s: the same sentences in different orders."""
    folder, said = tmp_path_factory.mktemp("speech"), [voice(text) for text in SENTENCES]
    for i in range(5):
        wave = np.concatenate([said[j] for j in np.random.default_rng(i).permutation(18) % 6])
        soundfile.write(folder / f"{i}.flac", wave[:20 * 16_000], 16_000)
    return folder


@pytest.mark.parametrize("minibatch", [0, 200])
def test_kmeans_finds_blobs(minibatch):
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 5, generator=g) * 20
    x = (centres[:, None] + torch.randn(8, 100, 5, generator=g)).flatten(0, 1)
    centroids, inertia = kmeans(x, 8, 30, torch.Generator().manual_seed(1), minibatch)
    assert torch.cdist(centres, centroids).min(1).values.max() < 0.5
    assert inertia == pytest.approx(5, rel=0.1)
    labels = assign(x, centroids, chunk=77)
    assert torch.equal(labels, torch.cdist(x, centroids).argmin(1))
    assert sorted(Counter(labels.tolist()).values()) == [100] * 8
    if not minibatch:  # converged: a centroid is the mean of its cluster
        means = torch.stack([x[labels == i].mean(0) for i in range(8)])
        torch.testing.assert_close(centroids, means, atol=1e-4, rtol=1e-4)


def test_empty_clusters_are_seeded_anew():
    x = torch.cat([torch.zeros(1000, 2), torch.tensor([[10.0, 10.0]]).repeat(50, 1), torch.randn(30, 2) + 50])
    for minibatch in (0, 500):
        centroids, inertia = kmeans(x, 12, 40, torch.Generator().manual_seed(0), minibatch)
        assert torch.isfinite(centroids).all() and inertia < 1
        assert len(set(assign(x, centroids).tolist())) >= 8


def test_fit_makes_a_tokeniser(speech, tmp_path):
    """The documented command; the codebook it writes tokenises."""
    book = tmp_path / "book.safetensors"
    done = run("prepare_units.py", "fit", "config/fit_embedded.py", f"--input={speech}", f"--codebook={book}",
               "--n_units=40", "--iterations=5")
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 0 < report["inertia"] < 500 and 0.02 < report["hours"] < 0.03 and report["n_units"] == 40
    mine = SpeechTokenizer.load(str(book))
    assert mine.fingerprint.n_units == 40
    assert mine.fingerprint != SpeechTokenizer.load("embedded").fingerprint
    assert "overwrite" in refused("prepare_units.py", "fit", f"--input={speech}", f"--codebook={book}")
    with pytest.raises(SystemExit, match="at least n_units"):
        load_config(FitConfig, ["--minibatch=50"])
    with pytest.raises(SystemExit, match="seed not negative"):
        load_config(FitConfig, ["--seed=-1"])


def test_check_reports_how_steady_a_tokeniser_is(speech, tmp_path, capsys):
    check(CheckConfig(input=str(speech), minutes=0.5, dtype="bfloat16"))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["batch_agreement"] > 0.99 and report["float32_agreement"] > 0.97
    assert 0.7 < report["crop_agreement"] < 0.97 and 15 < report["units_per_second"] < 25
    hubert(tmp_path / "hubert")
    run("prepare_units.py", "fit", f"--input={speech}", f"--codebook={tmp_path}/h.safetensors", "--n_units=40",
        f"--encoder={tmp_path}/hubert", "--layer=3", "--hours=0.02", "--minibatch=500")
    done = run("dev/check_tokenizer.py", f"--input={speech}", f"--tokenizer={tmp_path}/h.safetensors",
               "--minutes=1.5", "--window_seconds=10", "--hop_seconds=8")  # the documented command
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["seams"] > 5 and report["window_seconds"] == 10 and report["batch_agreement"] >= 0.999
    assert report["window_agreement_at_seams"] > 0.8 and report["window_agreement_elsewhere"] > 0.8
    with pytest.raises(SystemExit, match="part of its tokeniser"):
        check(CheckConfig(input=str(speech), window_seconds=20.0))


def test_fitting_reads_a_sample(tmp_path, capsys):
    """As many files as are needed, drawn at random, and no more of each than asked for; bad ones are named."""
    (tmp_path / "in").mkdir()
    for i in range(12):
        soundfile.write(tmp_path / "in" / f"{i}.flac", tone(16_000, 200 + 10 * i, 7.0), 16_000)
    soundfile.write(tmp_path / "in" / "other_rate.wav", tone(22_050, 440, 7.0), 22_050)
    soundfile.write(tmp_path / "in" / "cut.wav", tone(16_000, 440, 7.0), 16_000)
    os.truncate(tmp_path / "in" / "cut.wav", 100_000)
    (tmp_path / "in" / "bad.wav").write_text("no audio")
    found = [draw(str(tmp_path / "in"), 20.0, 5.0, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for waves in found:
        assert 20 <= sum(map(len, waves)) / 16_000 < 25 and max(map(len, waves)) == 5 * 16_000
    assert all(np.array_equal(a, b) for a, b in zip(*found[:2])) and not np.array_equal(found[0][0], found[2][0])
    capsys.readouterr()
    everything = draw(str(tmp_path / "in"), 1e4, 300.0, np.random.default_rng(0))
    assert {len(wave) for wave in everything} == {7 * 16_000} and len(everything) == 13
    assert "bad.wav: not readable" in (err := capsys.readouterr().err) and "cut.wav: truncated" in err
    os.symlink("0.flac", tmp_path / "link.flac")
    archive = pack(tmp_path / "link.flac", tmp_path / "x.tar")
    with pytest.raises(SystemExit, match="not one usable recording"):
        draw(str(archive), 10.0, 5.0, np.random.default_rng(0))


# ---------------------------------------------------------------- a published k-means
class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_published_kmeans_is_read_without_running_it(tmp_path, monkeypatch):
    sklearn, joblib = pytest.importorskip("sklearn.cluster"), pytest.importorskip("joblib")
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    for model in (sklearn.MiniBatchKMeans(20, random_state=np.random.RandomState(0), n_init=1),
                  sklearn.KMeans(20, n_init=1)):
        model.fit(x)
        for protocol in (3, 4, 5):  # the defaults of joblib under Python 3.7, 3.8 and 3.14
            joblib.dump(model, "km.bin", protocol=protocol)
            np.testing.assert_array_equal(read_kmeans(Path("km.bin")), model.cluster_centers_.astype(np.float32))
    with monkeypatch.context() as m:  # joblib before 1.2 wrote no padding
        m.setattr(joblib.numpy_pickle.NumpyArrayWrapper.__init__, "__defaults__", (False, None))
        joblib.dump(model, "km.bin")
        np.testing.assert_array_equal(read_kmeans(Path("km.bin")), model.cluster_centers_.astype(np.float32))
    for centroids in (np.asfortranarray(model.cluster_centers_.astype(np.float64)),
                      model.cluster_centers_.astype(">f4")):
        model.cluster_centers_ = centroids
        joblib.dump(model, "km.bin")
        np.testing.assert_allclose(read_kmeans(Path("km.bin")), centroids, rtol=1e-6)

    for evil in (Evil(), {"cluster_centers_": Evil()}, [model, Evil()]):
        for write in (lambda: joblib.dump(evil, "evil.bin"), lambda: Path("evil.bin").write_bytes(pickle.dumps(evil))):
            write()
            with pytest.raises(SystemExit, match="not a k-means"):
                read_kmeans(Path("evil.bin"))
    model.evil = Evil()  # read, but not run
    joblib.dump(model, "evil.bin")
    np.testing.assert_allclose(read_kmeans(Path("evil.bin")), centroids, rtol=1e-6)
    assert not Path("evil").exists()
    model.cluster_centers_ = np.array([Evil()], dtype=object)
    joblib.dump(model, "evil.bin")
    with pytest.raises(SystemExit, match="not of numbers"):
        read_kmeans(Path("evil.bin"))
    assert not Path("evil").exists()
    whole = Path("km.bin").read_bytes()
    for content in (b"", b"text", zlib.compress(whole), whole[:200], whole[:-50], pickle.dumps({"a": 1}),
                    pickle.dumps([1, 2])):
        Path("bad.bin").write_bytes(content)
        with pytest.raises(SystemExit, match="not a k-means"):
            read_kmeans(Path("bad.bin"))


def test_damage_to_a_kmeans_is_never_a_traceback(tmp_path):
    """Bytes changed at random: read, or refused with a reason."""
    sklearn, joblib = pytest.importorskip("sklearn.cluster"), pytest.importorskip("joblib")
    rng, refusals = np.random.default_rng(0), 0
    joblib.dump(sklearn.KMeans(4, n_init=1).fit(rng.standard_normal((30, 2)).astype(np.float32)), tmp_path / "km.bin")
    whole = (tmp_path / "km.bin").read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / "bad.bin").write_bytes(content)
        try:
            assert read_kmeans(tmp_path / "bad.bin").ndim == 2
        except SystemExit as e:
            assert "bad.bin: not a k-means" in str(e)
            refusals += 1
    assert refusals > 50


def test_a_kmeans_is_converted(tmp_path):
    sklearn, joblib = pytest.importorskip("sklearn.cluster"), pytest.importorskip("joblib")
    hubert(tmp_path / "hubert")
    model = sklearn.MiniBatchKMeans(20, n_init=1).fit(np.random.default_rng(0).standard_normal((300, 32)))
    joblib.dump(model, tmp_path / "km.bin")
    command = ["prepare_units.py", "convert", f"--codebook={tmp_path}/book.safetensors", "--layer=3",
               f"--encoder={tmp_path}/hubert"]
    assert "20 units" in run(*command, f"--source={tmp_path}/km.bin").stdout
    assert "overwrite" in refused(*command, f"--source={tmp_path}/km.bin")
    assert "no such file" in refused(*command, f"--source={tmp_path}/none.bin", "--overwrite")
    tokenizer = SpeechTokenizer.load(f"{tmp_path}/book.safetensors")
    np.testing.assert_allclose(tokenizer.centroids.numpy(), model.cluster_centers_, rtol=1e-6)
    units, _ = tokenizer.encode(np.random.default_rng(0).standard_normal(32_000).astype(np.float32), 16_000)
    assert units.max() < 20 and tokenizer.fingerprint.layer == 3
