"""Settings of a stage. In order of force: the defaults of its dataclass < config files, as given < flags.

    python train.py config/slam.py --lr=5e-4 --seed 7 --overwrite
    python sample.py --prompt a.wav --prompt b.wav   # a list: both; so does --prompt=a.wav,b.wav
    python train.py --help                           # every setting: type, default and the comment beside its field
    python train.py out/slam/config.json --seed=8    # what `save_config` wrote is a config file too

A config file is plain Python assignments and may compute; `from config.slam import *` starts from another one.
Names that begin with `_`, modules, functions and classes are ignored; every other name must be a setting.
A field is a bool, int, float, str, Literal or dict, a list or tuple of these, or `... | None`, and has a default.
"""
import argparse
import contextlib
import difflib
import functools
import inspect
import json
import os
import re
import runpy
import sys
import traceback
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

HERE = Path(__file__).resolve().parent
NONES = ("none", "null")
BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def load_config(Config: type, argv: list[str] | None = None, description: str = "") -> Any:
    """An instance of the dataclass `Config` from `argv` (default: the command line); `--help` prints and exits with 0.

    Raises SystemExit with all problems, one a line, among them those that a method `Config.problems()` returns.
    """
    hints = get_type_hints(Config)  # not field.type: that is text under `from __future__ import annotations`
    kinds = {f.name: hints[f.name] for f in fields(Config)}
    files, flags, problems = split_argv(sys.argv[1:] if argv is None else argv, kinds)
    if "help" in flags:
        print(help_text(Config, kinds, description))
        raise SystemExit(0)

    given = [(f"{file}: ", name, value, False) for file in files for name, value in read_file(file, kinds, problems)]
    given += [("--", name, text, True) for name, text in flags.items()]
    values, known = {}, dict(zip(kinds, kinds))
    for where, name, value, is_flag in given:
        try:
            if name in kinds:
                values[name] = convert(value, kinds[name], is_flag)
            else:
                problems.append(f"{where}{name}: no such setting; {nearest(name, known, '--help lists them')}")
        except ValueError:
            problems.append(f"{where}{name}: expected {type_name(kinds[name])}, found {value!r}")
    cfg = Config(**values)  # a default stands in for a wrong value
    problems += cfg.problems() if hasattr(cfg, "problems") else []
    if problems:
        raise SystemExit("\n".join("config: " + " ".join(problem.split()) for problem in problems))
    return cfg


def save_config(cfg: Any, path: str | Path) -> None:
    """Write the resolved settings as JSON; `load_config` reads the file back to an equal config."""
    text = json.dumps(asdict(cfg), indent=2, ensure_ascii=False) + "\n"
    Path(path).write_text(text, encoding="utf-8", errors="surrogateescape")


def split_argv(argv: list[str], kinds: dict[str, Any]) -> tuple[list[str], dict[str, str], list[str]]:
    """argv -> config files, flags {name: text}, problems; `--help` is the flag "help".

    By hand, because argparse stops at the first problem and takes a config file after a bare bool for its value.
    """
    files, flags, problems, words = [], {}, [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        after = words[0] if words else "--"
        if not word.startswith("-"):
            files.append(word)
            continue
        if word in ("-h", "--help"):
            name = "help"
        elif equals:
            pass
        elif kinds.get(name) in (bool, bool | None):
            text = words.pop(0) if after.lower() in (*BOOLS, *NONES) else "true"
        elif name not in kinds:  # the next word is probably its value, unless it is a flag or a config file
            text = "" if after.startswith("--") or after.endswith((".py", ".json")) else words.pop(0)
        elif after.startswith("--"):
            problems.append(f"--{name}: needs a value (one that begins with -- is given as --{name}=--value)")
            continue
        else:
            text = words.pop(0)
        is_list = get_origin(kinds.get(name)) in (list, tuple)  # to which a repeated flag adds; others are replaced
        flags[name] = f"{flags[name]},{text}" if is_list and flags.get(name) else text
    return files, flags, problems


def read_file(file: str, kinds: dict[str, Any], problems: list[str]) -> list[tuple[str, Any]]:
    """Settings [(name, value)] of one config file, Python or JSON; what is wrong with it is added to `problems`."""
    if not Path(file).is_file() or not file.endswith((".py", ".json")):
        known = {path.stem: os.path.relpath(path) for path in HERE.glob("*.py") if path.stem != "__init__"}
        hint = nearest(Path(file).stem, known, f"see {os.path.relpath(HERE)}; a setting is --NAME=VALUE")
        problems.append(f"{file}: no such config file; {hint}")
        return []
    try:
        if file.endswith(".json"):
            return list(dict(json.loads(Path(file).read_text("utf-8", "surrogateescape"))).items())
        names = runpy.run_path(file)  # `config` is imported by now, so `from config.x import *` works in any folder
    except Exception as error:  # all of them: the file is the user's own code, and may raise anything
        where = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        reason = error
        if isinstance(error, SyntaxError):
            where, reason = [*where, (error.filename, error.lineno)], error.msg
        # The deepest line in a config file: this one or one that it starts from, not a library that it calls.
        folders = (HERE, Path(file).resolve().parent)
        lines = [f"{path}, line {line}" for path, line in where
                 if path not in (None, __file__) and Path(path).is_file() and Path(path).resolve().parent in folders]
        problems.append(f"{[file, *lines][-1]}: {type(error).__name__}: {reason}")
        return []
    return [(name, value) for name, value in names.items()
            if name in kinds or not (name.startswith("_") or inspect.ismodule(value) or callable(value))]


def convert(value: Any, kind: Any, is_flag: bool) -> Any:
    """`value`, the text of a flag or a value from a file, as the type `kind`. Raises ValueError if it is not one.

    convert("1e3", int, True) -> 1000; convert("0.9,0.95", tuple[float, ...], True) -> (0.9, 0.95)
    """
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        for option in sorted(args, key=lambda option: option is not NoneType):  # None first: "none" is also a str
            with contextlib.suppress(ValueError):
                return convert(value, option, is_flag)
    elif origin is Literal:
        for choice in args:
            if value == (str(choice) if is_flag else choice):
                return choice
    elif origin in (list, tuple):
        parts = value if not is_flag else [part.strip() for part in value.split(",")] if value else []
        if isinstance(parts, (list, tuple)):
            part_kinds = args if origin is tuple and ... not in args else args[:1] * len(parts)
            return origin(convert(part, part_kind, is_flag) for part, part_kind in zip(parts, part_kinds, strict=True))
    elif origin is dict:
        value = json.loads(value) if is_flag else value  # JSON's errors are ValueErrors
        if isinstance(value, dict):
            return value
    elif kind is NoneType:
        if value is None or is_flag and value.lower() in NONES:
            return None
    elif kind in (bool, str):
        value = BOOLS.get(value.lower()) if is_flag and kind is bool else value
        if isinstance(value, kind):
            return value
    elif kind in (int, float):
        if is_flag:  # a whole number does not pass through a float, which would round a large one
            value = int(value) if value.lstrip("+-").replace("_", "").isdecimal() else float(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value  # not NaN
        if kind is float and is_number or kind is int and is_number and value % 1 == 0:
            return kind(value)
    raise ValueError(f"not {type_name(kind)}")


def nearest(name: str, known: dict[str, str], otherwise: str) -> str:
    """A hint at the names in `known` {name: how to write it} that are close to an unknown one; else `otherwise`."""
    close = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(known[match] for match in close)}?" if close else otherwise


def type_name(kind: Any) -> str:
    """type_name(tuple[int, ...] | None) -> "tuple[int, ...] | None"; a Literal by its choices."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else re.sub(r"\w+\.(?=\w)", "", str(kind))


def help_text(Config: type, kinds: dict[str, Any], description: str) -> str:
    """The usage, the description, and for each setting its type, [default] and comment, at most 120 characters wide."""
    parser = argparse.ArgumentParser(
        f"python {Path(sys.argv[0]).name}", "%(prog)s [CONFIG.py ...] [--key=value ...]", description.strip(),
        add_help=False, formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=120, max_help_position=36))
    comments = read_comments(Config)
    for f in fields(Config):
        default = str(f.default if f.default_factory is MISSING else f.default_factory()) or '""'
        text = f"[{default}] {comments.get(f.name, '')}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", metavar=type_name(kinds[f.name]), help=text)
    return parser.format_help()


def read_comments(Config: type) -> dict[str, str]:
    """{field: comment} from the source of the class: the comment beside a field and the comment lines that follow it.

    A class without source, as in a shell, has no comments.
    """
    comments, name = {}, ""
    for cls in reversed(Config.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):
            for line in inspect.getsource(cls).splitlines():
                if re.match(r"\s+def ", line):
                    break
                if field := re.match(r"\s+(\w+): ", line):
                    name = field[1]
                if note := re.search(r"(?:^|\s)#+ (.*)", line):
                    comments[name] = note[1] if field else f"{comments.get(name, '')} {note[1]}".strip()
    return comments
