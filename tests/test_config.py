"""Settings: precedence, types, inheritance, help, and that every problem is reported in one go."""
import dataclasses
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest
from conftest import run

import config
from config import load_config, save_config


@dataclass
class Config:
    """One field of each type; '# this is no comment'."""
    steps: int = 1000  # optimiser steps
    lr: float = 1e-3  # peak learning rate,
                      # after the warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # how the rate
    # comes down again
    name: str = "a#b"  # of the run
    note: str | None = None  # free text
    # that runs on
    overwrite: bool = False  # replace an output that exists
    compile: bool | None = None  # none: where it helps
    out: str = "out/slam"  # where it goes
    init: str | None = None  # a checkpoint folder
    betas: tuple[float, float] = (  # of AdamW
        0.9,
        0.95,
    )
    layers: tuple[int, ...] = ()  # hidden states
    names: list[str] = field(default_factory=lambda: ["x", "y"])  # corpora
    seed: Optional[int] = 7  # of everything random
    bare: int = 3

    def problems(self) -> list[str]:
        return ["betas: the first is to be the smaller one"] if self.betas[0] > self.betas[1] else []


COMMENTS = {
    "steps": "optimiser steps", "lr": "peak learning rate, after the warm-up",
    "schedule": "how the rate comes down again", "name": "of the run", "note": "free text that runs on",
    "overwrite": "replace an output that exists", "compile": "none: where it helps", "out": "where it goes",
    "init": "a checkpoint folder", "betas": "of AdamW", "layers": "hidden states", "names": "corpora",
    "seed": "of everything random", "bare": "",
}


@dataclass(frozen=True)
class Frozen:
    data: str = ""  # unit files
    lr: float = 0.5  # rate


def problems(Config, *argv) -> list[str]:
    """The lines of the error that this command line ends in."""
    with pytest.raises(SystemExit) as stop:
        load_config(Config, [str(word) for word in argv])
    lines = stop.value.code.split("\n")  # a string as code: Python prints it to stderr and exits with 1
    assert all(line.startswith("config: ") for line in lines)
    return [line.removeprefix("config: ") for line in lines]


@pytest.fixture
def write(tmp_path):
    """write(text, name) -> the path of a config file with that text."""
    def write(text: str, name: str = "some.py") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)
    return write


# ---------------------------------------------------------------- precedence

def test_defaults_and_their_independence():
    first, second = load_config(Config, []), load_config(Config, [])
    assert first == second == Config()
    first.names.append("z")
    assert second.names == load_config(Config, []).names == ["x", "y"]


def test_flags_over_files_in_order_over_defaults(write):
    a, b = write("steps = 1\nlr = 0.1\nname = 'a'", "a.py"), write("lr = 0.2\nname = 'b'", "b.py")
    cfg = load_config(Config, ["--name=flag", a, "--bare", "4", b])  # wherever the flags stand
    assert (cfg.steps, cfg.lr, cfg.name, cfg.bare, cfg.seed) == (1, 0.2, "flag", 4, 7)
    assert load_config(Config, [b, a]).lr == 0.1
    assert load_config(Config, ["--steps=1", "--steps=2"]).steps == 2


def test_a_repeated_flag_adds_to_a_list(write):
    @dataclass
    class Lists:
        names: tuple[str, ...] = ("default",)
        pair: tuple[float, float] = (1, 2)
        numbers: list[int] = field(default_factory=list)
        text: str = ""

    cfg = load_config(Lists, [write("names = ('of', 'file')"), "--names=a,b", "--names", "c", "--pair=5",
                              "--pair=6", "--numbers=1", "--numbers=2", "--text=x", "--text=y"])
    assert cfg == Lists(("a", "b", "c"), (5.0, 6.0), [1, 2], "y")
    assert load_config(Lists, [write("names = ('of', 'file')")]).names == ("of", "file")


def test_argv_is_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps=12"])
    assert load_config(Config).steps == 12


def test_frozen():
    cfg = load_config(Frozen, ["--data", "units", "--lr=1"])
    assert (cfg.data, cfg.lr) == ("units", 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 2.0
    assert problems(Frozen, "--lr=x", "--n_params=3") == [
        "--lr: expected float, found 'x'", "--n_params: no such setting; --help lists them"]


# ---------------------------------------------------------------- types

@pytest.mark.parametrize("flag, expected", [
    ("steps=1e3", 1000), ("steps=1_000", 1000), ("steps=1000.0", 1000), ("steps=-5", -5), ("steps=+5", 5),
    ("steps=9007199254740993", 9007199254740993),  # 2^53 + 1, which no float is
    ("lr=3", 3.0), ("lr=1e-4", 1e-4), ("lr=inf", math.inf), ("lr=-1_0.5", -10.5),
    ("schedule=constant", "constant"), ("name=none", "none"), ("name=", ""), ("name=a=b", "a=b"), ("name=1", "1"),
    ("note=none", None), ("note=NULL", None), ("note=nonetheless", "nonetheless"), ("seed=None", None), ("seed=1", 1),
    ("overwrite=TRUE", True), ("overwrite=yes", True), ("overwrite=On", True), ("overwrite=1", True),
    ("overwrite=no", False), ("overwrite=off", False), ("overwrite=0", False), ("overwrite=False", False),
    ("compile=none", None), ("compile=false", False),
    ("out=a/b", "a/b"), ("init=null", None), ("init=a", "a"),
    ("betas=0.8, 0.9", (0.8, 0.9)), ("betas=0,1", (0.0, 1.0)), ("layers=1,2e0,3", (1, 2, 3)), ("layers=", ()),
    ("names=p,q r", ["p", "q r"]), ("names=", []),
])
def test_flag_values(flag, expected):
    name, _, text = flag.partition("=")
    for argv in [f"--{flag}"], [f"--{name}", text]:
        value = getattr(load_config(Config, argv), name)
        assert value == expected and type(value) is type(expected)
        if isinstance(expected, tuple):
            assert [type(part) for part in value] == [type(part) for part in expected]


@pytest.mark.parametrize("flag", [
    "steps=1.5", "steps=inf", "steps=nan", "steps=", "steps=true", "steps=none", "steps=1,2", "lr=fast", "lr=",
    "lr=nan",
    "overwrite=2", "overwrite=none", "overwrite=", "compile=maybe", "schedule=Cosine", "seed=x",
    "betas=0.9", "betas=1,2,3", "betas=a,b", "layers=1,,2", "layers=1.5"])
def test_wrong_flag_values(flag):
    name, _, text = flag.partition("=")
    line, = problems(Config, f"--{flag}")
    assert line.startswith(f"--{name}: expected ") and line.endswith(f", found {text!r}")


@pytest.mark.parametrize("line, expected", [
    ("steps = 8 * 1024", 8192), ("steps = 1e3", 1000), ("lr = 1", 1.0), ("overwrite = True", True),
    ("note = None", None),
    ("import os\nout = os.path.join('a', 'b')", "a/b"), ("init = None", None),
    ("betas = [0, 1]", (0.0, 1.0)), ("names = ('a', 'b')", ["a", "b"]), ("names = []", []),
    ("layers = (1, 2.0)", (1, 2)),
    ("schedule = 'constant'", "constant"),
    ("note = 'none'", "none")])
def test_file_values(write, line, expected):
    value = getattr(load_config(Config, [write(line)]), line.splitlines()[-1].split(" = ")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("line", [
    "steps = 1.5", "steps = True", "steps = '3'", "steps = None", "lr = '1e-3'", "lr = False", "lr = max",
    "overwrite = 1", "overwrite = 'true'", "name = 3", "name = None", "out = 3", "betas = 0.9", "betas = (1,)",
    "names = 'abc'", "names = [1]", "layers = [True]", "schedule = 'linear'"])
def test_wrong_file_values(write, line):
    path = write(line)
    problem, = problems(Config, path)
    assert problem.startswith(f"{path}: {line.split()[0]}: expected ")


def test_what_is_expected_is_named():
    assert problems(Config, "--schedule=linear", "--note", "x", "--seed=1.5", "--out=o", "--betas=1") == [
        "--schedule: expected one of cosine, constant, found 'linear'",
        f"--seed: expected {'int | None' if sys.version_info >= (3, 14) else 'Optional[int]'}, found '1.5'",
        "--betas: expected tuple[float, float], found '1'"]


# ---------------------------------------------------------------- the command line

def test_bare_bool(write):
    path = write("steps = 5")
    for argv in (["--overwrite"], ["--overwrite", "--bare=1"], ["--overwrite", path], ["--overwrite", "true"],
                 ["--overwrite", "--overwrite"], ["--compile", "--overwrite", "yes"]):
        assert load_config(Config, argv).overwrite is True
    assert load_config(Config, ["--overwrite", path]).steps == 5  # the file is no value of the flag
    assert load_config(Config, ["--overwrite", "false", path]).overwrite is False
    assert load_config(Config, ["--compile"]).compile is True
    assert load_config(Config, ["--compile", "none"]).compile is None


def test_negative_numbers():
    cfg = load_config(Config, ["--steps", "-1", "--lr", "-1e-3", "--layers", "-1,-2", "--seed=-3"])
    assert (cfg.steps, cfg.lr, cfg.layers, cfg.seed) == (-1, -1e-3, (-1, -2), -3)


def test_values_that_look_like_flags():
    assert problems(Config, "--name", "--steps=1") == [
        "--name: needs a value (one that begins with -- is given as --name=--value)"]
    assert problems(Config, "--steps=1", "--name")[0].startswith("--name: needs a value")
    assert load_config(Config, ["--name=--steps", "--note", "-h"]).name == "--steps"


def test_unknown_names_have_their_closest_match(write):
    path = write("shedule = 'cosine'\nqqqq = 1\n")
    assert problems(Config, path, "--step", "5", "--overwrit", path, "--ouT=3", "--zzzz") == [
        f"{path}: shedule: no such setting; did you mean schedule?",
        f"{path}: qqqq: no such setting; --help lists them",
    ] * 2 + [
        "--step: no such setting; did you mean steps?",
        "--overwrit: no such setting; did you mean overwrite?",
        "--ouT: no such setting; did you mean out?",
        "--zzzz: no such setting; --help lists them"]


# ---------------------------------------------------------------- config files

def test_what_a_file_may_hold_besides_settings(write):
    cfg = load_config(Config, [write(
        "import math, os.path\nfrom math import sqrt\nfrom pathlib import Path\n_hidden = 3\n"
        "class Helper: pass\ndef double(x):\n    return 2 * x\nsteps = double(sqrt(_hidden ** 2))\nlr = math.pi\n")])
    assert (cfg.steps, cfg.lr) == (6, math.pi)


def test_a_file_starts_from_another(write, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "__path__", [*config.__path__, str(tmp_path)])
    monkeypatch.chdir(Path(tmp_path.anchor))
    write("import os\nsteps = 10\nlr = 0.5\n_private = 1\n", "test_config_base.py")
    child = write("from config.test_config_base import *\nsteps = 2 * steps\n", "child.py")
    try:
        cfg = load_config(Config, [child])
    finally:
        sys.modules.pop("config.test_config_base", None)
    assert (cfg.steps, cfg.lr) == (20, 0.5)


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HERE", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    for name in "slam", "slam_dpo", "twist_opt350m", "__init__":
        (tmp_path / "config" / f"{name}.py").touch()
    slam, dpo = Path("config/slam.py"), Path("config/slam_dpo.py")
    assert problems(Config, "config/slm.py") == [f"config/slm.py: no such config file; did you mean {slam}?"]
    assert problems(Config, "slam_dop.py") == [
        f"slam_dop.py: no such config file; did you mean {dpo} or {slam}?"]
    assert problems(Config, "config", "qqqq.py", "--bare=x") == [
        "config: no such config file; see config; a setting is --NAME=VALUE",
        "qqqq.py: no such config file; see config; a setting is --NAME=VALUE",
        "--bare: expected int, found 'x'"]
    (tmp_path / "a.wav").write_text("steps = 1")  # a value that lost its name: not run as Python
    assert problems(Config, "a.wav") == ["a.wav: no such config file; see config; a setting is --NAME=VALUE"]


@pytest.mark.parametrize("text, line, reason", [
    ("steps = 1\nlr = = 2\n", 2, "SyntaxError: invalid syntax"),
    ("steps = 1\n\n  lr = 2\n", 3, "IndentationError: unexpected indent"),
    ("steps = 1\nlr = 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
    ("def f():\n    return undefined\n\nlr = f()\n", 2, "NameError: name 'undefined' is not defined"),
    ("import json\n\n\nnames = json.loads('{')\n", 4, "JSONDecodeError: Expecting"),  # this line, not one of json's
    ("from config.no_such_file import *\n", 1, "ModuleNotFoundError: No module named 'config.no_such_file'"),
    ("raise ValueError('two\\nlines')\n", 1, "ValueError: two lines"),
])
def test_a_broken_file_is_one_line(write, text, line, reason):
    path = write(text)
    problem, = problems(Config, path)
    assert problem.startswith(f"{path}, line {line}: {reason}") and problem.count("some.py") == 1


@pytest.mark.parametrize("text, line", [("a = (\n", 1), ("a = 1\nb = a + '1'\n", 2)])
def test_a_break_in_the_file_it_starts_from(write, tmp_path, monkeypatch, text, line):
    monkeypatch.setattr(config, "__path__", [*config.__path__, str(tmp_path)])
    base = write(text, "test_config_broken.py")
    problem, = problems(Config, write("\n\nfrom config.test_config_broken import *\n"))
    assert problem.startswith(f"{base}, line {line}: ")


def test_all_problems_together(write):
    broken, wrong = write("lr = (", "broken.py"), write("steps = 1.5\nstep = 1\n", "wrong.py")
    lines = problems(Config, broken, wrong, "no/such.py", "--betas=2,1", "--overwrite=maybe", "-x", "3", "--name")
    assert [line.split(" ")[0] for line in lines] == [
        "--name:", f"{broken},", "no/such.py:", f"{wrong}:", f"{wrong}:", "--overwrite:", "--x:", "betas:"]


# ---------------------------------------------------------------- help

def run_help(capsys, Config, argv, description="") -> str:
    with pytest.raises(SystemExit) as stop:
        load_config(Config, argv, description)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--steps=wrong", "no_such.py", "--help"]])
def test_help_has_every_field(capsys, argv):
    text = run_help(capsys, Config, argv, "\nWhat goes in, what comes out.\n")
    assert text.startswith("usage: python ") and "\n\nWhat goes in, what comes out.\n\n" in text
    assert max(map(len, text.splitlines())) <= 120
    settings = help_of(text)
    assert list(settings) == [f.name for f in dataclasses.fields(Config)]
    for f in dataclasses.fields(Config):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        assert settings[f.name].endswith(f" [{default}] {COMMENTS[f.name]}".rstrip())
    assert settings["lr"] == "float [0.001] peak learning rate, after the warm-up"
    assert settings["schedule"].startswith("one of cosine, constant [cosine] ")
    assert settings["layers"].startswith("tuple[int, ...] [()] ") and settings["note"].startswith("str | None [None] ")


def help_of(text: str) -> dict[str, str]:
    """{setting: type, default and comment}"""
    blocks = " ".join(text.split()).split(" --")[1:]
    return dict(block.split(" ", 1) for block in blocks if "--key" not in f"--{block}")


def test_help_wraps_what_is_long(capsys):
    @dataclass
    class Long:
        folder: str = "word " * 20  # this comment, too, goes on and on, until it is longer than the screen is wide
        share: str = ""  # of all, in %

    text = run_help(capsys, Long, ["-h"])
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("word") == 20 and "this comment, too, goes on" in help_of(text)["folder"]
    assert help_of(text)["share"] == 'str [""] of all, in %'


def test_help_of_inherited_fields_and_without_source(capsys):
    @dataclass(frozen=True)
    class Child(Frozen):
        lr: float = 0.25
        extra: int = 1  # of the child's own

    settings = help_of(run_help(capsys, Child, ["-h"]))
    assert settings == {"data": 'str [""] unit files', "lr": "float [0.25] rate",
                        "extra": "int [1] of the child's own"}
    typed_in = dataclasses.make_dataclass("TypedIn", [("steps", int, 5)])
    assert help_of(run_help(capsys, typed_in, ["-h"])) == {"steps": "int [5]"}


# ---------------------------------------------------------------- saving

def test_saved_settings_can_be_applied_again(tmp_path):
    argv = ["--steps=5", "--lr=1e-5", "--out=a/b", "--betas=0.5,0.6", "--layers=1,2", "--note=Grüße", "--compile",
            "--names=caf\udce9", "--seed=none"]  # a file's name need not be UTF-8
    cfg = load_config(Config, argv)
    save_config(cfg, tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text("utf-8", "surrogateescape")
    saved = json.loads(text)
    assert list(saved) == [f.name for f in dataclasses.fields(Config)]
    assert (saved["out"], saved["betas"], saved["seed"]) == ("a/b", [0.5, 0.6], None) and '"Grüße"' in text
    assert load_config(Config, [str(tmp_path / "config.json")]) == cfg
    assert load_config(Config, [str(tmp_path / "config.json"), "--steps=6"]) == dataclasses.replace(cfg, steps=6)


def test_saved_settings_of_a_frozen_config(tmp_path):
    cfg = load_config(Frozen, ["--data=units"])
    save_config(cfg, tmp_path / "config.json")
    assert load_config(Frozen, [str(tmp_path / "config.json")]) == cfg


def test_saved_settings_are_checked_like_any_file(write):
    unknown, broken = write('{"steps": "5", "stepz": 1}', "unknown.json"), write('{"steps":\n', "broken.json")
    lines = problems(Config, unknown, broken)
    assert lines[0].startswith(f"{broken}: JSONDecodeError: ") and "line 2" in lines[0]
    assert lines[1:] == [f"{unknown}: steps: expected int, found '5'",
                         f"{unknown}: stepz: no such setting; did you mean steps?"]


# ---------------------------------------------------------------- as a command

def test_a_stage_from_another_folder(tmp_path):
    repo, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    (repo / "config").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(config.__file__, repo / "config" / "__init__.py")
    (repo / "config" / "base.py").write_text("lr = 0.25\n")
    (elsewhere / "mine.py").write_text("from config.base import *\n_factor = 2\nlr = _factor * lr\n")
    (repo / "stage.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom config import load_config\n\n\n"
        "@dataclass\nclass Config:\n    lr: float = 1.0  # a comment of the stage\n\n\n"
        "print(load_config(Config, description='The stage.'))\n")

    def stage(*argv):
        return run(repo / "stage.py", *argv, check=False, cwd=elsewhere)

    done = stage("mine.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Config(lr=0.5)\n", "")
    done = stage("bse.py", "--lrr=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"config: bse.py: no such config file; did you mean {Path('..', 'repo', 'config', 'base.py')}?",
        "config: --lrr: no such setting; did you mean lr?"]
    done = stage("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python stage.py ")
    assert "\nThe stage.\n" in done.stdout and "a comment of the stage" in done.stdout


def test_a_dict_is_json_in_a_flag_and_survives_saving(tmp_path):
    from train import Config
    given = ["--train=a", "--val=b", "--steps=1", '--shape={"hidden_size": 64}']
    cfg = load_config(Config, given)
    assert cfg.shape == {"hidden_size": 64}
    save_config(cfg, tmp_path / "config.json")
    assert load_config(Config, [str(tmp_path / "config.json")]) == cfg
    with pytest.raises(SystemExit, match="--shape: expected dict, found '64'"):
        load_config(Config, [*given[:3], "--shape=64"])
