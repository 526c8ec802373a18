"""The house: who imports whom, how much there is to read, and how long a command's `--help` takes to import."""
import ast
import functools
import re

import pytest
from conftest import ROOT, run

STAGES = {"prepare_units": 400, "synth_stories": 350, "model": 400, "train": 330, "dpo": 330, "eval": 400,
          "sample": 300}  # lines, at most
PARTS = sorted(f"slam.{p.stem}" for p in (ROOT / "slam").glob("[!_]*.py"))


def source(module: str):
    return ROOT / ("config/__init__.py" if module == "config" else module.replace(".", "/") + ".py")


def lines(module: str) -> int:
    return len(source(module).read_text().splitlines())


def imported(nodes) -> set[str]:
    """Our own modules that import statements among these syntax nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "slam":
            found |= {f"slam.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & {"config", *STAGES, *PARTS}


@functools.cache
def at_the_top(module: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(source(module).read_text()).body))


def path(module: str) -> set[str]:
    """A module and all that it imports at the top, and they in turn."""
    found, todo = set(), {module}
    while todo:
        found |= todo
        todo = {other for one in todo for other in at_the_top(one)} - found
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_short_and_so_is_its_path(stage):
    assert lines(stage) <= STAGES[stage]
    read = {module: lines(module) for module in path(stage)}
    assert sum(read.values()) < 3000, read


def test_the_whole_is_small():
    assert all(lines(part) <= 400 for part in PARTS)
    n = sum(map(lines, [*STAGES, *PARTS, "config"]))
    assert n <= 8342, f"{n} lines: delete before you add, or raise this in a fork"  # upstream only lowers it


@pytest.mark.parametrize("module", [*STAGES, *PARTS])
def test_no_stage_is_imported_but_the_model(module):
    """Nor inside a function; making pairs of a model's own continuations is the one part that may import the model.

    What only recipes and developers run imports from here, never the other way.
    """
    assert not re.search(r"^\s*(from|import) (runs|dev)\b", source(module).read_text(), re.M)
    everywhere = imported(ast.walk(ast.parse(source(module).read_text())))
    allowed = {"model"} if module in STAGES or module == "slam.align_pairs" else set()
    assert not (everywhere & set(STAGES)) - allowed


def test_no_circles():
    for part in PARTS:
        assert all(part not in path(other) for other in at_the_top(part))


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_importing_a_stage_costs_little_more_than_torch(stage):
    """What `--help` waits for. Modules, not seconds: these depend on the machine."""
    code = f"import {stage}, sys; print(*sys.modules)"
    heavy = {"transformers", "scipy", "sentencepiece", "onnxruntime", "matplotlib", "pyarrow", "torch._dynamo"}
    assert not heavy & set(run("-c", code).stdout.split())
