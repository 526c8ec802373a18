"""Every command in README, docs/, runs/, configs and docstrings names files and settings that exist."""
import functools
import importlib.util
import re
import shlex
import sys

import pytest
from conftest import ROOT, run

from config import load_config

# script -> the dataclass of its settings, or {subcommand: dataclass}
SETTINGS = {"prepare_units.py": {"": "Config", "fit": "slam.kmeans.FitConfig", "convert": "slam.kmeans.ConvertConfig",
                                 "bpe": "BpeConfig"},
            "synth_stories.py": {"": "Config"}, "train.py": {"": "Config"}, "eval.py": {"": "Config"},
            "sample.py": {"": "Config"}, "dpo.py": {"": "Config", "pairs": "slam.align_pairs.PairsConfig"},
            "-m slam.train_vocoder": {"": "Config"}, "-m slam.alignment": {"": "Config"},
            "dev/check_tokenizer.py": {"": "CheckConfig"},
            "dev/plot.py": {"": "PlotConfig"},
            "dev/voices.py": {"people": "PeopleConfig", "words": "WordsConfig", "examples": "ExamplesConfig",
                              "others": "OthersConfig", "flite": "FliteConfig"},
            "dev/bench.py": {"train": "BenchTrain", "dpo": "BenchDpo", "generate": "BenchGenerate", "eval": "BenchEval",
                             "memory": "BenchMemory", "units": "BenchUnits", "vocoder": "BenchVocoder"}}
WITHOUT = {"model.py", "-m slam.embedded", "runs/corpora.py", "dev/gpu_check.py",
           "dev/pack.py", "dev/average.py", "dev/hard_negatives.py"}  # their arguments are argparse's
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def commands() -> list[str]:
    code = [p for pattern in ("*.py", "slam/*.py", "dev/*.py") for p in ROOT.glob(pattern)]
    texts = [*(p.read_text() for p in PAGES), *("".join(p.read_text().split('"""')[1:2]) for p in code),
             *(p.read_text() for folder in ("runs", "config") for p in (ROOT / folder).glob("[!_]*.*"))]
    joined = "\n".join(texts).replace("\\\n", " ")
    joined = re.sub(r'"\$(@|\{\w+\[@\]\})"|(?<=\s)\$\w+(?=\s)', "", joined)  # a script's own arguments
    found = re.findall(r"(?:python|--nproc_per_node=\d) ((?:-m slam\.\w+|[\w/]+\.py)[^#\n`;|)]*)", joined)
    return sorted({re.sub(r"\$\w+|\"\$[^\"]*\"|\"\$\(\(.*", "1", c).strip().rstrip(".,") for c in found})


def settings(script: str, name: str) -> type:
    """The dataclass of a script's settings, by its name there or in a module of slam."""
    module, _, name = name.rpartition(".")
    file = ROOT / (module or script.removeprefix("-m ").removesuffix(".py")).replace(".", "/")
    spec = importlib.util.spec_from_file_location(f"settings_of_{file.stem}", file.with_suffix(".py"))
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look there for their annotations
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def split(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    return (" ".join(words[:2]), words[2:]) if words[0] == "-m" else (words[0], words[1:])


@functools.cache
def usage(script: str) -> str:
    return run(*script.split(), "--help").stdout


def test_there_are_commands():
    assert len(commands()) > 40 and {split(c)[0] for c in commands()} >= {*SETTINGS, *WITHOUT}


@pytest.mark.parametrize("command", commands())
def test_command(command):
    script, arguments = split(command)
    assert script.startswith("-m") or (ROOT / script).is_file()
    folders_alone = "_report.py", "demo_picture.py", "tiny_sources.py"
    if script.endswith(folders_alone) or arguments[:1] == ["verify"]:
        return
    if script in WITHOUT:
        assert "usage:" in usage(script)
        return
    kinds = SETTINGS[script]
    if "" not in kinds and arguments in ([], ["CASE"]):  # the script itself is named, with no case of it
        return
    name = kinds[arguments.pop(0) if arguments and arguments[0] in kinds else ""]
    if "--help" in arguments:
        assert "usage:" in run(*script.split(), "--help").stdout
        return
    try:
        load_config(settings(script, name), arguments)
    except SystemExit as e:  # what a command says of its own accord may be refused for want of data, not for a name
        assert "no such setting" not in str(e) and "no such config file" not in str(e) and "expected" not in str(e), e


def test_every_line_of_a_code_block_begins_a_command():
    """A block that was wrapped like a paragraph does not."""
    programs = {"python", "bash", "source", "cd", "cp", "grep", "for", "done", "#"}
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in filter(None, block.replace("\\\n", " ").splitlines()):
                assert line.split()[0] in programs or re.match(r"\w+=", line), f"{page.name}: {line}"


def test_every_config_file_is_a_whole_config():
    on_top = {"study": "slam", "gpu_24gb": "slam", "gpu_16gb": "slam", "gpu_12gb": "slam", "gpu_8gb": "slam",
              "mini": "slam_fast", "mini_voices": "slam_fast", "mini_grammar": "slam_fast"}
    training = ("slam", "slam_fast", "slam_scaled", "slam_large", "gslm", "twist_opt350m", "twist_opt350m_tinystories",
                "demo_train", "slam_interleaved", "demo_interleaved", *on_top)
    scripts = {"align_demo": ("-m slam.alignment", ""),
               "fit_embedded": ("prepare_units.py", "fit"), "align_pairs": ("dpo.py", "pairs"),
               "mini_pairs": ("dpo.py", "pairs"),
               **dict.fromkeys(("units_embedded", "corpus_units", "words_units", "units_mhubert25"),
                               ("prepare_units.py", "")),
               **dict.fromkeys(("vocoder_embedded", "vocoder_words", "vocoder_gpu"), ("-m slam.train_vocoder", "")),
               **dict.fromkeys(training, ("train.py", "")),
               **dict.fromkeys(("slam_dpo", "slam_scaled_dpo", "demo_dpo", "mini_dpo"), ("dpo.py", "")),
               **dict.fromkeys(("demo_eval", "eval_slam", "mini_eval"), ("eval.py", "")),
               **dict.fromkeys(("study_stories", "demo_stories", "corpus_stories", "spoken_swag",
                               "mini_stories", "mini_sentences"),
                               ("synth_stories.py", ""))}
    assert set(scripts) == {p.stem for p in (ROOT / "config").glob("*.py")} - {"__init__"}
    for name, (script, command) in scripts.items():
        files = [str(ROOT / "config" / f"{x}.py") for x in (on_top.get(name), name) if x]
        load_config(settings(script, SETTINGS[script][command]), files)


def test_what_the_pages_name_exists():
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"`((?:config|runs|assets|tests|slam|dev|docs)/[\w./]+|\w+\.py)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for path in re.findall(r"\]\(((?!http)[\w./]+)\)", text):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
