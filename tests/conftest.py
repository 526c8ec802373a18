"""Fixtures and processes: everything is real; what is slow is made once per session, whatever the number of workers."""
import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if n_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # share the cores; child processes inherit this
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_workers)))
from slam.units import Fingerprint, UnitWriter  # noqa: E402

ROOT = Path(__file__).parent.parent
N_UNITS = 20
# Two processes that find each other by localhost: a machine's own name may not resolve, and they would wait.
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc_per_node=2"
LIMIT = 300  # seconds that any one wait for a process may take, on a machine ten times too busy; pytest.ini's is longer


# half a minute and more
LONG = """synth_stories pair_data train align_pairs prepare_units dpo hub_lm bench train_vocoder gpu_check vocoder
pipeline sample""".split()


def pytest_collection_modifyitems(items):
    """For several workers, the files that take long come first, so that all end at about the same time."""
    def order(item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=order)


class Process(subprocess.Popen):
    """A command in the repository's root. It writes into files, so that it never waits for its reader.

    `until` and `end` wait at most `limit` seconds (LIMIT); then, and where it ends too early, they fail with all that
    it has said. It does not outlive its test.
    """
    running: list["Process"] = []

    def __init__(self, command: list, limit: float = LIMIT, **kwargs):
        self.files, self.limit = (tempfile.TemporaryFile(), tempfile.TemporaryFile()), limit
        settings = dict(cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.files[0], stderr=self.files[1],
                        start_new_session=True)
        super().__init__(list(map(str, command)), **settings | kwargs)
        self.running.append(self)

    def said(self) -> list[bytes]:
        """What it has written so far to stdout and to stderr (pread: the offset belongs to the process)."""
        return [os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0) for f in self.files]

    def fail(self, problem: str) -> None:
        self.end_all()
        out, err = (x.decode(errors="replace") for x in self.said())
        pytest.fail(f"{' '.join(self.args)}: {problem}; its output:\n{out[-3000:]}\nand its errors:\n{err[-5000:]}")

    def until(self, event: str | Callable[[], object]) -> None:
        """Returns when a line begins with `event`, or `event()` is true; fails if the process ends before."""
        happened = event if callable(event) else lambda: f"\n{event}".encode() in b"\n" + b"\n".join(self.said())
        started = time.monotonic()
        while True:
            ended = self.poll() is not None  # asked before the event, which may be its last act
            if happened():
                return
            if ended:
                self.fail(f"ended with code {self.returncode} before {event!r}")
            if time.monotonic() - started > self.limit:
                self.fail(f"no {event!r} within {self.limit:g} s")
            time.sleep(0.005)

    def end(self) -> subprocess.CompletedProcess:
        """Waits for its end. stdout and stderr as bytes."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self.wait(self.limit)
        except BaseException:  # the test's own limit, or Ctrl-C
            self.end_all()
            raise
        if self.returncode is None:
            self.fail(f"still running after {self.limit:g} s")
        self.running.remove(self)
        return subprocess.CompletedProcess(self.args, self.returncode, *self.said())

    @classmethod
    def end_all(cls) -> None:
        """Ends what still runs, with its children: torchrun's, in sessions of their own, end by its SIGTERM only."""
        while cls.running:
            process = cls.running.pop()
            for how in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(5)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    Process.end_all()


def start(*args, **kwargs) -> Process:
    """`python ARGS` in the repository's root, begun: see Process."""
    return Process([sys.executable, *args], **kwargs)


def in_process(*args) -> subprocess.CompletedProcess:
    """What `python ARGS` does, done here: spared are the start and the imports. stdout and stderr as bytes."""
    out, err, code = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO()), 0
    argv, path, environment = sys.argv, sys.path[:], dict(os.environ)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    module = args[0] == "-m"
    sys.argv = list(map(str, args[module:]))
    if not module:
        sys.path.insert(0, str((ROOT / sys.argv[0]).parent))
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(e.code is not None)
                if isinstance(e.code, str):
                    print(e.code, file=err)
            except Exception:
                code = 1
                traceback.print_exc()
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.clear()
        os.environ.update(environment)
        for s, handler in handlers:
            signal.signal(s, handler)
    for stream in (out, err):
        stream.flush()
    return subprocess.CompletedProcess(args, code, out.buffer.getvalue(), err.buffer.getvalue())


def run(*args, check=True, text=True, process=False, **kwargs) -> subprocess.CompletedProcess:
    """`python ARGS` in the repository's root, to its end. Our code is run `in_process`, unless a process is asked for.

    kwargs: of Process, and so for processes alone.
    """
    ours = str(args[0]).endswith(".py") or args[0] == "-m" and args[1].startswith("slam.")
    own = process or kwargs or not ours or not text
    done = start(*args, **kwargs).end() if own else in_process(*args)
    if text:
        done.stdout, done.stderr = (x.decode().replace("\r\n", "\n") for x in (done.stdout, done.stderr))
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def refused(*args) -> str:
    """The one clear line of a command that must fail: no traceback, exit code 1."""
    done = run(*args, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make(folder)` fills, once in a session: the other workers of pytest-xdist wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock", timeout=LIMIT):
        if not Path(f"{folder}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what another worker left behind when it failed
            folder.mkdir()
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


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
    def make(folder: Path) -> None:
        rng = np.random.default_rng(1)
        for split, n in (("train", 200), ("val", 30)):
            with UnitWriter(folder / split, fingerprint, "markov", shard_tokens=5000) as writer:
                for i, x in enumerate(markov(n, rng)):
                    writer.add(f"{split}{i}", x, np.ones_like(x))

    return once(tmp_path_factory, "corpus", make)


SYNTH = ["--n_train=6", "--n_val=4", "--batch=16", "--n_sblimp=8", "--max_new_tokens=48", "--keep_audio"]


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A folder made by synth_stories.py in miniature, with the real embedded parts."""
    return once(tmp_path_factory, "stories", lambda folder: run(
        "synth_stories.py", "config/demo_stories.py", f"--out={folder}/data", *SYNTH, process=True)) / "data"


@pytest.fixture(scope="session")
def voice():
    """hibari: text -> wave at 16 kHz."""
    from slam.audio import resample
    from slam.tts import load_hibari
    speak = load_hibari()
    return lambda text: resample(*speak(text, 0, "american"), 16_000)


@pytest.fixture(scope="session")
def runs(stories, tmp_path_factory):
    """A few steps of every stage, by the demo's own configs."""
    def make(out: Path) -> None:
        small = ["--n_layers=2", "--context=512", "--micro_batch=2", "--batch_tokens=1024", "--tokens=none"]
        data = [f"--train={stories}/units/train", f"--val={stories}/units/val"]
        run("train.py", "config/demo_train.py", *data, *small, "--steps=6", f"--out={out}/lm", process=True)
        run("dpo.py", "config/demo_dpo.py", f"--checkpoint={out}/lm", f"--pairs={stories}/pairs_train.jsonl",
            f"--val_pairs={stories}/pairs_val.jsonl", "--steps=2", "--batch_pairs=2", f"--out={out}/dpo", process=True)

    return once(tmp_path_factory, "runs", make)
