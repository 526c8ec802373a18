"""Every command in README and in the stages' docstrings names files and settings that exist."""
import importlib
import re
import shlex

import pytest
from conftest import ROOT, run

from config import load_config

STAGES = ["prepare_units", "synth_stories", "vocoder", "model", "train", "dpo", "eval", "sample", "bench"]
SUBCOMMANDS = {("prepare_units", "fit"): "FitConfig", ("prepare_units", "check"): "CheckConfig",
               ("prepare_units", "convert"): "ConvertConfig", ("prepare_units", "bpe"): "BpeConfig",
               ("vocoder", "train"): "Config", ("bench", "train"): "BenchTrain", ("bench", "generate"): "BenchGenerate",
               ("dpo", "pairs"): "PairsConfig", ("eval", "plot"): "PlotConfig", ("bench", "dpo"): "BenchDpo",
               ("bench", "eval"): "BenchEval",
               ("bench", "memory"): "BenchMemory", ("bench", "units"): "BenchUnits",
               ("bench", "vocoder"): "BenchVocoder"}


def commands() -> list[str]:
    texts = [(ROOT / "README.md").read_text(), *((ROOT / f"{s}.py").read_text().split('"""')[1] for s in STAGES),
             *(p.read_text() for folder in ("runs", "config") for p in (ROOT / folder).glob("[!_]*.*"))]
    joined = "\n".join(texts).replace("\\\n", " ")
    joined = re.sub(r'"\$(@|\{\w+\[@\]\})"|(?<=\s)\$\w+(?=\s)', "", joined)  # a script's own arguments
    found = re.findall(r"(?:python|--nproc_per_node=\d) (\w+\.py[^#\n`;|)]*)", joined)
    return sorted({re.sub(r"\$\w+|\"\$[^\"]*\"", "1", c).strip() for c in found})


def test_there_are_commands():
    assert len(commands()) > 15 and {c.split(".py")[0] for c in commands()} >= set(STAGES)


@pytest.mark.parametrize("command", commands())
def test_command(command):
    script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    stage = script.removesuffix(".py")
    if stage == "embedded":
        return
    if stage == "model":  # no config, as it is no stage
        assert arguments[0] in run(script, "--help").stdout
        return
    if arguments[:1] == ["verify"]:  # takes folders
        return
    name = "Config"
    if arguments and (stage, arguments[0]) in SUBCOMMANDS:
        name = SUBCOMMANDS[stage, arguments.pop(0)]
    if "--help" in arguments:
        assert "usage:" in run(script, "--help").stdout
        return
    try:
        load_config(getattr(importlib.import_module(stage), name), arguments)
    except SystemExit as e:  # what a command says of its own accord may be refused for want of data, not for a name
        assert "no such setting" not in str(e) and "no such config file" not in str(e) and "expected" not in str(e), e


def test_every_config_file_is_a_whole_config():
    on_top = {"study": "slam", "gpu_24gb": "slam", "gpu_16gb": "slam", "gpu_12gb": "slam", "gpu_8gb": "slam"}
    stages = {"fit_embedded": ("prepare_units", "FitConfig"), "units_embedded": ("prepare_units", "Config"),
              "corpus_units": ("prepare_units", "Config"), "units_mhubert25": ("prepare_units", "Config"),
              "vocoder_embedded": ("vocoder", "Config"), "vocoder_gpu": ("vocoder", "Config"),
              **{name: ("train", "Config") for name in (
                  "slam", "slam_fast", "slam_scaled", "gslm", "twist_opt350m", "twist_opt350m_tinystories",
                  "demo_train", *on_top)}, "slam_dpo": ("dpo", "Config"),
              "slam_scaled_dpo": ("dpo", "Config"), "align_pairs": ("dpo", "PairsConfig"),
              "study_stories": ("synth_stories", "Config"),
              "demo_dpo": ("dpo", "Config"), "demo_eval": ("eval", "Config"), "eval_slam": ("eval", "Config"),
              "demo_stories": ("synth_stories", "Config"), "corpus_stories": ("synth_stories", "Config"),
              "spoken_swag": ("synth_stories", "Config")}
    assert set(stages) == {p.stem for p in (ROOT / "config").glob("*.py")} - {"__init__"}
    for name, (stage, kind) in stages.items():
        files = [str(ROOT / "config" / f"{x}.py") for x in (on_top.get(name), name) if x]
        load_config(getattr(importlib.import_module(stage), kind), files)


def test_what_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:config|runs|assets|tests)/[\w./]+|\w+\.py)`", text):
        assert (ROOT / path).exists(), path
