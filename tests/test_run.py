"""slam.run: settings of older checkpoints, the clock, signals, and what stops a run."""
import json
import math
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch

from slam.run import Run, run_problems
from slam.units import Fingerprint
from train import Config

FINGERPRINT = Fingerprint("x", 1, 25.0, 20, True, "f" * 64)


@dataclass
class Settings:
    out: str
    steps: int | None = 10
    tokens: float | None = None
    time_budget_hours: float | None = None
    lr: float = 1e-3
    grad_clip: float = 0.5
    activation_checkpointing: bool = False
    context: int = 64
    resume: bool = False
    overwrite: bool = False


class Weights(torch.nn.Linear):
    def save_pretrained(self, folder, slam, trainer):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "slam.json").write_text(json.dumps(slam))
        torch.save(trainer, folder / "trainer.pt")


@pytest.fixture
def saved(tmp_path):
    """The folder of a run that was saved at step 3; the process has its signals back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    run, weights = Run(Settings(str(tmp_path / "run")), "train"), Weights(2, 2)
    run.starts_from(train="a")
    run.open()
    run.log("a line", loss=1.0)
    run.step, run.tokens = 3, 300
    run.save(weights, torch.optim.SGD(weights.parameters(), 0.1), FINGERPRINT, [torch.tensor(1.5)])
    yield run.out
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_goes_on_where_it_was_saved(saved):
    run = Run(Settings(str(saved), resume=True), "train")
    assert (run.step, run.tokens, run.progress()) == (3, 300, 0.3)
    optimizer = torch.optim.SGD(Weights(2, 2).parameters(), 9.0)
    assert [x.item() for x in run.restore(optimizer)] == [1.5] and optimizer.param_groups[0]["lr"] == 0.1
    (saved / "checkpoint" / "trainer.pt").unlink()
    with pytest.raises(SystemExit, match="trainer.pt is missing: this run can't go on"):
        run.restore(optimizer)
    run.starts_from(train="a")
    with pytest.raises(SystemExit, match="has changed: train;"):
        run.starts_from(train="b")
    with pytest.raises(SystemExit, match="--resume goes on"):
        Run(Settings(str(saved)), "train")


def test_settings_that_have_gone_and_that_changed(saved):
    """A run can't resume if it used `weights`, a setting that is gone, or if a setting newer than it is changed."""
    path = saved / "checkpoint" / "slam.json"
    slam = json.loads(path.read_text())
    path.write_text(json.dumps(slam | {"config": slam["config"] | {"weights": [1, 2]}}))
    with pytest.raises(SystemExit, match="weights was"):
        Run(Settings(str(saved), resume=True), "train")
    path.write_text(json.dumps(slam | {"config": slam["config"] | {"weights": []}}))
    assert Run(Settings(str(saved), resume=True, grad_clip=1.0, activation_checkpointing=True), "train").step == 3
    with pytest.raises(SystemExit, match="context was 64, now 32$"):
        Run(Settings(str(saved), resume=True, context=32), "train")
    # A setting that the code has got since: its default is what the run was made with.
    path.write_text(json.dumps(slam | {"config": {k: v for k, v in slam["config"].items() if k != "context"}}))
    assert Run(Settings(str(saved), resume=True), "train").step == 3
    with pytest.raises(SystemExit, match="context was 64, now 32$"):
        Run(Settings(str(saved), resume=True, context=32), "train")


def test_the_saved_config_does_not_overwrite(saved):
    """`train.py out/x/config.json --seed=8` would remove the run that a first `--overwrite` began."""
    run = Run(Settings(str(saved), overwrite=True), "train")
    run.open()
    assert not json.loads((saved / "config.json").read_text())["overwrite"]


def test_what_a_run_reads_is_not_in_its_folder(tmp_path):
    with pytest.raises(SystemExit, match="units lies in the run's own folder"):
        Run(Settings(str(tmp_path)), "train", reads=("hub/name", "", str(tmp_path / "units")))


def test_settings_that_no_run_can_have(tmp_path):
    cfg = Config(out=str(tmp_path), train=("x",), val=("x",), steps=10)
    assert not run_problems(cfg)
    for wrong, problem in (({"grad_clip": 0.0}, "grad_clip"), ({"steps": -1}, "steps"), ({"lr": -1.0}, "lr"),
                           ({"lr": 1e-5}, "min_lr 5e-05: between 0 and lr, 1e-05"), ({"seed": -1}, "seed"),
                           ({"min_lr": -1.0, "schedule": "constant"}, "min_lr"), ({"beta2": 1.0}, "beta2")):
        assert len(found := run_problems(replace(cfg, **wrong))) == 1 and problem in found[0]
    assert "no such field n_layer; there are vocab_size" in replace(cfg, shape={"n_layer": 2}).problems()[0]
    assert not replace(cfg, shape={"num_hidden_layers": 2}, grad_clip=math.inf).problems()


def test_records_after_the_checkpoint_go(saved):
    log = saved / "log.jsonl"
    with open(log, "a") as f:
        f.write('{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    Run(Settings(str(saved), resume=True), "train").open()
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [0, 3]


def test_a_pause_is_no_training_time(saved):
    run = Run(Settings(str(saved), resume=True), "train")
    run.open()
    started, before = run.started, run.seconds
    with run.pause():
        began = time.perf_counter()
        threading.Event().wait(0.2)
        paused = time.perf_counter() - began
    run.tick()
    assert 0 < run.seconds - before <= run.started - started - paused


def test_a_signal_saves_and_exits_with_its_code(saved, capsys):
    run, weights = Run(Settings(str(saved), resume=True), "train"), Weights(2, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    run.open()
    signal.raise_signal(signal.SIGTERM)
    run.step = 4
    run.tick()
    assert run.stopping == 128 + signal.SIGTERM
    with pytest.raises(SystemExit) as stop:
        run.finish(weights, torch.optim.SGD(weights.parameters(), 0.1), FINGERPRINT, [])
    assert stop.value.code == run.stopping and "stopped at step 4" in capsys.readouterr().err
    assert Run(Settings(str(saved), resume=True), "train").step == 4
    with pytest.raises(SystemExit):  # the second signal does not wait
        signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_saves_and_nohup_goes_on(saved, monkeypatch):
    run = Run(Settings(str(saved), resume=True), "train")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    run.open()
    signal.raise_signal(signal.SIGHUP)
    run.tick()
    assert not run.stopping
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # as a terminal that is gone, it raises OSError
    run.log("a line", loss=1.0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    run.open()
    signal.raise_signal(signal.SIGHUP)
    run.step = 4
    run.tick()
    with pytest.raises(SystemExit) as stop:
        run.finish(Weights(2, 2), torch.optim.SGD(Weights(2, 2).parameters(), 0.1), FINGERPRINT, [])
    assert stop.value.code == 128 + signal.SIGHUP and Run(Settings(str(saved), resume=True), "train").step == 4


def test_the_first_step_that_is_not_finite_is_named(saved):
    run = Run(Settings(str(saved), resume=True), "train")
    one, nan, inf = (torch.tensor(x) for x in (1.0, math.nan, math.inf))
    assert run.gather([one, one], one) == [one, one] and run.gather([], one) == []
    with pytest.raises(SystemExit, match="step 2: loss nan: .*checkpoint is as it was last saved"):
        run.gather([nan, one], inf)
    with pytest.raises(SystemExit, match="step 3: gradient norm inf"):
        run.gather([torch.stack([one, nan])], inf)  # only the first is the loss


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(SystemExit, match="not a run's folder"):
        Run(Settings(str(tmp_path), overwrite=True), "train")
    with pytest.raises(SystemExit, match="not a run's folder"):
        Run(Settings(str(tmp_path)), "train")
    with pytest.raises(SystemExit, match="not a run's folder"):
        Run(Settings(str(tmp_path / "precious.txt")), "train")
    assert (tmp_path / "precious.txt").exists()


def test_a_run_that_was_killed_before_it_saved_is_not_replaced_unasked(saved, capsys):
    shutil.rmtree(saved / "checkpoint")
    log = saved / "log.jsonl"
    log.write_text('{"step": 0, "val_loss": 3.0}\n')  # it was only evaluated
    Run(Settings(str(saved)), "train")
    log.write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(SystemExit, match="holds a run already; --resume goes on with it, --overwrite"):
        Run(Settings(str(saved)), "train")
    log.write_text('{"step": 0, "val_loss": 3.0}\n{"step": 1}\n')
    assert not Run(Settings(str(saved), resume=True), "train").evaluated()  # as it starts anew, and evaluates again
    Run(Settings(str(saved), resume=True), "train").open()
    assert "nothing was saved yet, so it starts anew" in capsys.readouterr().out and not log.read_text()


def test_overwrite_empties_the_folder_that_a_link_names(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    Run(Settings(str(tmp_path / "link"), overwrite=True), "train").open()
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "log.jsonl"] and (tmp_path / "link").is_symlink()


def test_a_finished_run_is_not_saved_again(saved):
    """Its slam.json would get another time, and it would pass for the newest model."""
    path, weights = saved / "checkpoint" / "slam.json", Weights(2, 2)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": True}))
    run = Run(Settings(str(saved), resume=True), "train")
    what = weights, torch.optim.SGD(weights.parameters(), 0.1), FINGERPRINT, []
    before = path.stat().st_mtime_ns
    run.finish(*what)
    assert path.stat().st_mtime_ns == before
    run.step += 1
    run.finish(*what)
    assert json.loads(path.read_text())["step"] == 4


def test_only_the_log_says_what_was_evaluated(saved):
    """eval.py writes to results.json, too, with other settings."""
    run = Run(Settings(str(saved), resume=True), "train")
    run.open()
    run.results({"val_loss": {"value": 3.0, "step": 3}})
    assert not run.evaluated()
    run.log("val loss", val_loss=3.0)
    run.results({"val_loss": {"value": 4.0, "n": 1}})
    assert run.evaluated() and not run.evaluated("val_dpo_loss")
    assert Run(Settings(str(saved), resume=True), "train").evaluated()


def test_what_the_steps_measured_is_gathered_and_checked(saved):
    run = Run(Settings(str(saved), resume=True), "train")
    measured, norm = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor(1.0)
    assert [x.tolist() for x in run.gather(measured, norm)] == [[1, 2], [3, 4]]
    assert [x.item() for x in run.gather([torch.tensor(5.0)], norm)] == [5] and run.gather([], norm) == []
    with pytest.raises(SystemExit, match="step 2: loss inf"):
        run.gather([torch.tensor([math.inf, 2.0]), measured[0]], norm)
    with pytest.raises(SystemExit, match="gradient norm nan"):
        run.gather(measured, torch.tensor(math.nan))


def test_other_loggers_get_the_numbers(saved):
    run, seen = Run(Settings(str(saved), resume=True), "train"), []
    run.open()
    run.loggers.append(lambda record, step: seen.append((step, record)))
    run.log("a line", loss=1.5, samples=["what was heard"])
    assert seen == [(3, {"loss": 1.5})]
    assert json.loads((saved / "log.jsonl").read_text().splitlines()[-1])["samples"] == ["what was heard"]
