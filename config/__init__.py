"""Settings of a stage. In order of force: the defaults of its dataclass < config files, as given < flags.

    python train.py config/slam.py --lr=5e-4 --seed 7 --overwrite
    python sample.py --prompt a.wav --prompt b.wav   # a list of any length: both; so does --prompt=a.wav,b.wav
    python train.py --help                           # every setting: type, default and the comment beside its field
    python train.py out/slam/config.json --seed=8    # what `save_config` wrote is a config file too

A config file is plain Python assignments and may compute; `from config.slam import *` starts from another one.
Names beginning with `_`, modules, functions and classes are its own business; every other name must be a setting.
"""
import ast
import contextlib
import difflib
import inspect
import json
import os
import re
import runpy
import sys
import textwrap
import tokenize
import traceback
from dataclasses import MISSING, fields
from itertools import zip_longest
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
    kinds = {f.name: hints[f.name] for f in fields(Config) if f.init}
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory()
                for f in fields(Config) if f.init}
    files, flags, problems = split_argv(sys.argv[1:] if argv is None else argv, kinds)
    if ("help", "") in flags:
        print(help_text(kinds, defaults, read_comments(Config), description))
        raise SystemExit(0)

    given = [(f"{file}: ", name, value, False) for file in files for name, value in read_file(file, kinds, problems)]
    given += [("--", name, text, True) for name, text in flags]
    all_read = not problems
    values, repeated = {}, set()
    for where, name, value, is_flag in given:
        if name not in kinds:
            hint = nearest(name, dict(zip(kinds, kinds)), "--help lists them")
            problems.append(f"{where}{name}: no such setting; {hint}")
            continue
        try:
            value = convert(value, kinds[name], is_flag)
            # A flag's list replaces a config file's, and is added to an earlier flag's.
            more = is_flag and name in repeated and is_open_list(kinds[name])
            values[name] = values[name] + value if more else value
            repeated |= {name} if is_flag else set()
        except ValueError:
            problems.append(f"{where}{name}: expected {type_name(kinds[name])}, found {value!r}")
            values.setdefault(name, defaults[name])  # so that what follows can still be checked

    missing = [name for name, default in defaults.items() if default is MISSING and name not in values]
    if all_read:  # else it may be in what could not be read
        problems += [f"--{name}: required, {type_name(kinds[name])}" for name in missing]
    settings = {**defaults, **values}
    if MISSING not in settings.values():
        cfg = Config(**settings)
        problems += cfg.problems() if hasattr(cfg, "problems") else []
    if problems:
        raise SystemExit("\n".join("config: " + " ".join(problem.split()) for problem in problems))
    return cfg


def save_config(cfg: Any, path: str | Path) -> None:
    """Write the resolved settings as JSON, paths as strings; `load_config` reads the file back to an equal config."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.init}
    Path(path).write_text(json.dumps(settings, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")


def split_argv(argv: list[str], kinds: dict[str, Any]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """argv -> config files, flags [(name, text)], problems; `--help` is the flag ("help", "").

    By hand, as argparse takes `-1` for a flag, stops at the first problem, and lets a bare bool eat a config file.
    """
    files, flags, problems, words = [], [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        after = words[0] if words else "--"
        if not word.startswith("-"):
            files.append(word)
        elif word in ("-h", "--help"):
            flags.append(("help", ""))
        elif equals:
            flags.append((name, text))
        elif kinds.get(name) in (bool, bool | None):
            flags.append((name, words.pop(0) if after.lower() in (*BOOLS, *NONES) else "true"))
        elif name not in kinds:  # the word after it is its value, surely, and not a config file that is missing
            flags.append((name, "" if after.startswith("--") or after.endswith((".py", ".json")) else words.pop(0)))
        elif after.startswith("--"):
            problems.append(f"--{name}: needs a value (one that begins with -- is given as --{name}=--value)")
        else:
            flags.append((name, words.pop(0)))
    return files, flags, problems


def read_file(file: str, kinds: dict[str, Any], problems: list[str]) -> list[tuple[str, Any]]:
    """Settings [(name, value)] of one config file, Python or JSON; what is wrong with it is added to `problems`."""
    if not Path(file).is_file():
        known = {path.stem: os.path.relpath(path) for path in HERE.glob("*.py") if path.stem != "__init__"}
        hint = nearest(Path(file).stem, known, f"see {os.path.relpath(HERE)}")
        problems.append(f"{file}: no such config file; {hint}")
        return []
    try:
        if file.endswith(".json"):
            return list(dict(json.loads(Path(file).read_text(encoding="utf-8"))).items())
        names = runpy.run_path(file)  # `config` is imported by now, so `from config.x import *` works in any folder
    except Exception as error:  # all of them: the file is the user's own code, and may raise anything
        where = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        reason = error
        if isinstance(error, SyntaxError):
            where, reason = [*where, (error.filename, error.lineno)], error.msg
        # The deepest line of a config file, be it of one that this one starts from, but not of a library it calls.
        folders = (HERE, Path(file).resolve().parent)
        lines = [f"{path}, line {line}" for path, line in where
                 if path and path != __file__ and Path(path).is_file() and Path(path).resolve().parent in folders]
        problems.append(f"{[file, *lines][-1]}: {type(error).__name__}: {reason}")
        return []
    return [(name, value) for name, value in names.items()
            if name in kinds or not (name.startswith("_") or inspect.ismodule(value) or callable(value))]


def number(text: str) -> int | float:
    """number("1_000") -> 1000; a whole number does not pass through a float, which would round a large one."""
    return int(text) if text.lstrip("+-").replace("_", "").isdecimal() else float(text)


# The text of a flag -> what a config file would have said; what a list holds is still text, to be converted in turn.
FROM_TEXT = {bool: lambda text: BOOLS.get(text.lower()), NoneType: lambda text: None if text.lower() in NONES else text,
             int: number, float: number, dict: json.loads,
             **dict.fromkeys((list, tuple), lambda text: [part.strip() for part in text.split(",")] if text else [])}


def convert(value: Any, kind: Any, is_flag: bool) -> Any:
    """`value`, the text of a flag or an object out of a file, as the annotation `kind`. ValueError where it is none.

    convert("1e3", int, True) -> 1000; convert("0.9,0.95", tuple[float, ...], True) -> (0.9, 0.95)
    """
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        for option in sorted(args, key=lambda option: option is not NoneType):  # None first: "none" is a fine str too
            with contextlib.suppress(ValueError):
                return convert(value, option, is_flag)
    for choice in args if origin is Literal else ():
        if value == (str(choice) if is_flag else choice):
            return choice
    value = FROM_TEXT.get(origin, str)(value) if is_flag else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is Any or origin in (bool, str, NoneType) and isinstance(value, origin):
        return value
    if origin is float and is_number or origin is int and is_number and value % 1 == 0:
        return origin(value)
    if origin is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()  # the shell leaves the ~ of --out=~/x alone
    if origin is dict and isinstance(value, dict):
        key_kind, value_kind = args or (Any, Any)
        return {convert(k, key_kind, False): convert(v, value_kind, False) for k, v in value.items()}
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        parts = args if origin is tuple and args and ... not in args else (*args, Any)[:1] * len(value)
        return origin(convert(part, part_kind, is_flag) for part, part_kind in zip(value, parts, strict=True))
    raise ValueError(f"not {type_name(kind)}")


def is_open_list(kind: Any) -> bool:
    """Whether the annotation is a list or a tuple of any length."""
    return get_origin(kind) is list or get_origin(kind) is tuple and ... in get_args(kind)


def nearest(name: str, known: dict[str, str], otherwise: str) -> str:
    """A hint at what an unknown name may mean, of `known` {name: how to write it}; `otherwise` if none comes close."""
    close = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(known[match] for match in close)}?" if close else otherwise


def type_name(kind: Any) -> str:
    """type_name(pathlib.Path | None) -> "Path | None"; a Literal by its choices."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else re.sub(r"\w+\.(?=\w)", "", str(kind))


def help_text(kinds: dict[str, Any], defaults: dict[str, Any], comments: dict[str, str], description: str) -> str:
    """The description, the usage, and a table of all settings, its columns wrapped to fit into 120 characters."""
    rows = [("setting", "type", "default", "")]
    for name, default in defaults.items():
        shown = "required" if default is MISSING else str(default)
        rows.append((f"--{name}", type_name(kinds[name]), shown or '""', comments.get(name, "")))
    widths = [min(max(map(len, column)), 28) for column in list(zip(*rows))[:3]]
    widths.append(120 - 8 - sum(widths))
    lines = [description.strip(), "", f"usage: python {Path(sys.argv[0]).name} [CONFIG.py ...] [--key=value ...]", ""]
    for row in rows:
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths)]
        lines += ["  " + "  ".join(map(str.ljust, parts, widths)) for parts in zip_longest(*cells, fillvalue="")]
    return "\n".join(map(str.rstrip, lines)).lstrip()


def read_comments(Config: type) -> dict[str, str]:
    """{field: comment}, from the source of the class: beside a field, directly above it, or running on below it.

    A line between two fields runs on from the upper one if it is indented more than they are, or if both have a
    comment beside them; otherwise it is about the lower one. Without a source, as in a shell, there are no comments.
    """
    comments = {}
    for cls in reversed(Config.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
            nodes = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
        except (OSError, TypeError, SyntaxError):
            continue
        tokens = tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
        notes = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        indents = {line: note.start[1] for line, note in notes.items() if note.line.lstrip().startswith("#")}
        for node, lower in zip_longest(nodes, nodes[1:]):
            first, last = node.lineno, node.end_lineno
            while first - 1 in indents:
                first -= 1
            while last in notes and last + 1 in indents and (
                    indents[last + 1] > node.col_offset or lower is None or lower.end_lineno in notes):
                last += 1
            texts = [notes.pop(line).string.strip("# ") for line in range(first, last + 1) if line in notes]
            comments[node.target.id] = " ".join(texts) or comments.get(node.target.id, "")
    return comments
