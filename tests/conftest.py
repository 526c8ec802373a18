"""Fixtures: everything is real; what is slow is made once per session."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from units import Fingerprint, UnitWriter  # noqa: E402

ROOT = Path(__file__).parent.parent
N_UNITS = 20


def run(*args, check=True, **kwargs) -> subprocess.CompletedProcess:
    """`python ARGS` in the repository's root."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def refused(*args) -> str:
    """The one clear line of a command that must fail: no traceback, exit code 1."""
    done = run(*args, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="session")
def fingerprint():
    return Fingerprint("embedded:whisper-tiny.en", 3, 25.0, N_UNITS, True, "f" * 64)


def markov(n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Utterances of a first-order chain over N_UNITS units, without self-transitions: something to learn."""
    transitions = np.random.default_rng(0).dirichlet(np.full(N_UNITS, 0.2), N_UNITS)
    np.fill_diagonal(transitions, 0)
    transitions /= transitions.sum(1, keepdims=True)
    out = []
    for _ in range(n):
        x = [int(rng.integers(N_UNITS))]
        for _ in range(int(rng.integers(5, 60))):
            x.append(int(rng.choice(N_UNITS, p=transitions[x[-1]])))
        out.append(np.array(x))
    return out


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, fingerprint):
    """A folder with unit files train/ (two shards) and val/ of a small unit language."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)
    for split, n in (("train", 200), ("val", 30)):
        with UnitWriter(folder / split, fingerprint, "markov", shard_tokens=5000) as writer:
            for i, x in enumerate(markov(n, rng)):
                writer.add(f"{split}{i}", x, np.ones_like(x))
    return folder


SYNTH = ["--n_train=6", "--n_val=4", "--batch=16", "--n_sblimp=8", "--max_new_tokens=48", "--keep_audio",
         "--hard_negatives"]


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A folder made by synth_stories.py in miniature, with the real embedded parts."""
    folder = tmp_path_factory.mktemp("stories") / "data"
    run("synth_stories.py", "config/demo_stories.py", f"--out={folder}", *SYNTH)
    return folder


@pytest.fixture(scope="session")
def voice():
    """hibari: text -> wave at 16 kHz."""
    from audio import resample
    from synth_stories import load_hibari
    speak = load_hibari()
    return lambda text: resample(*speak(text, 0, "american"), 16_000)


@pytest.fixture(scope="session")
def runs(stories, tmp_path_factory):
    """A few steps of every stage, by the demo's own configs."""
    out = tmp_path_factory.mktemp("runs")
    small = ["--n_layers=2", "--context=512", "--micro_batch=2", "--batch_tokens=1024", "--time_budget_hours=none"]
    data = [f"--train={stories}/units/train", f"--val={stories}/units/val"]
    run("train.py", "config/demo_train.py", *data, *small, "--steps=6", f"--out={out}/lm")
    run("dpo.py", "config/demo_dpo.py", f"--checkpoint={out}/lm", f"--pairs={stories}/pairs_train.jsonl",
        f"--val_pairs={stories}/pairs_val.jsonl", "--steps=2", "--batch_pairs=2",
        f"--out={out}/dpo")
    return out
