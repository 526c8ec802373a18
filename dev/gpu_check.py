"""Checks that need a GPU, in 25 minutes: are results correct, how fast is it, does every stage run.

    python dev/gpu_check.py env correct first --out out/gpu.jsonl    # at most 6.5 minutes
    python dev/gpu_check.py mfu --out out/gpu.jsonl                  # at most 11 minutes
    python dev/gpu_check.py stages --out out/gpu.jsonl               # at most 8 minutes
    python dev/gpu_check.py report out/gpu.jsonl                     # the tables of docs/speed.md

Each case is a function and becomes one JSON line, appended to --out at once. A second process runs the cases, one after
the other; when one fails, hangs or runs out of memory, its line says so, and a new process goes on with the next. Data
and weights are made up, in the shape of Slam (Qwen2.5-0.5B with 502 tokens): no network is needed. --dry runs the same
cases with two small layers, on a CPU if there is no GPU.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import contextlib
import faulthandler
import gc
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from dev import gpu_cases as cases
from dev.gpu_cases import DRY, Size, make_data, wait
from slam import attention
from slam.device import n_graphs, pick_device

SECONDS = {"env": 60, "correct": 190, "first": 130, "mfu": 660, "stages": 460}  # limit of each group of cases
PAPER = 16_500  # tokens/s of the paper's run on an A5000
A5000 = {"matmul_tflops": 0.85 * 111, "copy_gb_per_s": 0.9 * 768}  # shares of its data sheet: assumed, not measured


# ---------------------------------------------------------------- how a case is run
class Case(NamedTuple):
    group: str
    run: Callable  # of (size, **settings); returns what its line holds
    limit: float  # seconds
    settings: dict = {}
    needs: tuple[str, ...] = ()  # cuda, or modules

    @property
    def name(self) -> str:
        return " ".join([self.run.__name__, *(f"{k}={v}" for k, v in self.settings.items())])

    def missing(self) -> list[str]:
        return [x for x in self.needs if not (torch.cuda.is_available() if x == "cuda" else
                                              importlib.util.find_spec(x))]


def measure(case: Case, size: Size) -> dict:
    """Run a case in this process: what it returns, with its seconds, its graphs and its peak of GPU memory."""
    pick_device()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    attention.WAY = "auto"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else the eighth model of a process would not be compiled any more
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    graphs, started = n_graphs(), time.perf_counter()
    found = case.run(size, **case.settings)
    wait()
    memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {}
    return found | memory | {"graphs": n_graphs() - graphs, "seconds": time.perf_counter() - started}


def worker(connection, log: str) -> None:
    """A process that answers cases. One that raises ends it; stdout and stderr go to the end of `log`."""
    os.setsid()  # it can be ended with all that it started
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    connection.send({"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"})
    while True:
        case, size = connection.recv()
        faulthandler.dump_traceback_later(max(1, case.limit - 3))  # into the log: where it hangs
        found = measure(case, size)
        faulthandler.cancel_dump_traceback_later()
        connection.send(found)


class Worker:
    """The process that runs cases, as seen from here. SystemExit if it does not start."""

    def __init__(self, log: str):
        context, self.log = multiprocessing.get_context("spawn"), Path(log)
        self.begin = self.log.stat().st_size if self.log.exists() else 0  # what is before was said by others
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, log))
        self.process.start()
        theirs.close()  # so that its end is noticed
        if "device" not in (ready := self.answer(300)):
            self.end()
            raise SystemExit(f"{log}: the process that runs the cases did not start: {ready['error']}")
        self.device = ready["device"]

    def answer(self, limit: float, *question) -> dict:
        """What it answers; {"error": ...} if it ends before, or `limit` seconds pass."""
        try:
            if question:
                self.connection.send(question)
            return self.connection.recv() if self.connection.poll(limit) else {"error": f"no end within {limit:.0f} s"}
        except (EOFError, ConnectionError):
            self.process.join(10)
            said = self.log.read_bytes()[self.begin:].decode(errors="replace")
            last = re.findall(r"^[\w.]*(?:Error|Exit)\b.*", said, re.M)[-1:]  # of a traceback; CUDA's go on with hints
            return {"error": f"exit code {self.process.exitcode}: {''.join(last)[:300]}"}

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(10)


def run_cases(cases: list[Case], size: Size, out: Path, seconds: dict[str, float] = SECONDS) -> None:
    """Append a line of each case to `out`, within the limits of each case and of each group.

    Time that a group does not use goes to the next one.
    """
    one, device, ends = None, "", time.monotonic()
    for group in dict.fromkeys(case.group for case in cases):
        ends += seconds[group]
        for case in (x for x in cases if x.group == group):
            if missing := case.missing():
                found = {"not_run": f"needs {', '.join(missing)}"}
            elif ends - time.monotonic() < 1:
                found = {"not_run": "the time was over"}
            else:
                if not one:
                    started, one = time.monotonic(), Worker(f"{out}.log")
                    ends += 0 if device else time.monotonic() - started  # the first start is not the cases' time
                device = one.device
                found = one.answer(max(1, min(case.limit, ends - time.monotonic())), case, size)
            if "error" in found:
                one = one.end()
            line = json.dumps({"group": group, "case": case.name, "device": device} | rounded(found))
            with open(out, "a") as f:
                f.write(line + "\n")
            print(line, flush=True)
    if one:
        one.end()


def rounded(x):
    """Floats to four digits, in any depth."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [*map(rounded, x)] if isinstance(x, (list, tuple)) else float(f"{x:.4g}") if isinstance(x, float) else x


# ---------------------------------------------------------------- the cases, in order
def plan() -> list[Case]:
    """The cases in order; in each group the most important come first, as its time may run out."""
    def mfu(limit: float = 120, **settings) -> Case:
        return Case("mfu", cases.training, limit, settings)

    return [
        Case("env", cases.environment, 30),
        Case("env", cases.ceilings, 30),
        Case("correct", cases.attention_errors, 40),
        Case("correct", cases.models, 60),
        Case("correct", cases.generation, 60),
        Case("correct", cases.optimizers, 40),
        Case("correct", cases.one_graph, 100),
        Case("first", cases.training, 150, {"way": "mask"}),
        mfu(way="auto"), mfu(micro_batch=32), mfu(micro_batch=64),
        Case("mfu", cases.optimizer_step, 30, {"kind": "adamw"}),
        Case("mfu", cases.optimizer_step, 30, {"kind": "muon"}),
        Case("mfu", cases.optimizer_step, 30, {"kind": "torch's muon"}),
        mfu(200, peer=True), mfu(micro_batch=32, dtype="pure_bfloat16"), mfu(micro_batch=32, way="mask"),
        Case("mfu", cases.training, 120, {"micro_batch": 32, "way": "flex"}, ("cuda",)),
        mfu(way="mask", cudnn=True),
        Case("stages", cases.train_stage, 170),
        Case("stages", cases.dpo_stage, 150),
        Case("stages", cases.dpo_steps, 150, {"micro_batch": 4}),
        Case("stages", cases.dpo_steps, 150, {"micro_batch": 16}),
        Case("stages", cases.generating, 200),
        Case("stages", cases.scoring, 40, {"dtype": "bfloat16"}),
        Case("stages", cases.scoring, 40, {"dtype": "float32"}),
        Case("stages", cases.units, 40),
        Case("stages", cases.speaking, 30),
        Case("stages", cases.no_memory, 40, {}, ("cuda",)),
        Case("stages", cases.vocoder_training, 60, {}, ("soundfile",))]


# ---------------------------------------------------------------- the report
def predicted(case: dict, here: dict) -> float:
    """Tokens/s of a training case on an A5000.

    Matrix products and attention, a share m of the case's time, take longer by the ratio of the two cards' ceilings of
    bf16 matmul; the rest by the ratio of their ceilings of copying:
        seconds(A5000) = busy * seconds(here) * (m * matmul(here) / matmul(A5000) + (1 - m) * copy(here) / copy(A5000))
    A share of 1 - busy, in which a fast card waits for the CPU, is left out: a slower card's kernels take longer. The
    ceilings of `here` were measured by the case `ceilings`; those of an A5000 are assumed.
    """
    m = case["matrix_share"]
    slower = m * here["matmul_tflops"] / A5000["matmul_tflops"]
    slower += (1 - m) * here["copy_gb_per_s"] / A5000["copy_gb_per_s"]
    return case["tokens_per_s"] / (case["busy"] * slower)


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def report(lines: list[dict]) -> str:
    """Markdown: the cases of training beside an A5000's prediction and the paper; what went wrong; every other case."""
    last = {x["case"]: x for x in lines}  # a case that was run again counts once
    ceilings = {x["device"]: x for x in lines if x["case"] == "ceilings"}  # of each card
    ignored = {"group", "case", "device", "kernels", "seconds"}
    table = ["| training | tokens/s | MFU, needed / PaLM, % | peak GB | compile s, graphs | A5000, predicted tok/s |",
             "|---|---|---|---|---|---|"]
    for name in (case.name for case in plan() if case.run is cases.training):
        x = last.get(name, {})
        here = ceilings.get(x.get("device"), {})
        cells = ["not run yet" if not x else "failed", "", "", "", ""] if "tokens_per_s" not in x else [
            f"{x['tokens_per_s']:,.0f}", f"{percent(x.get('mfu_needed'))} / {percent(x.get('mfu_palm'))}",
            f"{x.get('peak_gb', '')}", f"{x['compile_s']:.0f}, {x['graphs']}",
            f"{predicted(x, here):,.0f}" if "matmul_tflops" in here and "matrix_share" in x else ""]
        table.append(f"| {name.removeprefix('training ')} | {' | '.join(cells)} |")
    table.append(f"| the paper, on an A5000 | {PAPER:,} | | | | |")
    wrong, kernels, rest = [], [], []
    for name, x in last.items():
        whole = f"- {name}: " + ", ".join(f"{k} {v}" for k, v in x.items() if k not in ignored)
        (wrong if {"error", "not_run"} & set(x) or x.get("ok") is False else rest).append(whole)
        if "kernels" in x:
            kernels.append(f"- {name}: " + ", ".join(f"{share:.1f} % `{kind[:40]}`" for share, kind in x["kernels"]))
    devices = ", ".join(dict.fromkeys(x["device"] for x in lines if x["device"]))
    parts = {f"Measured on: {devices or 'nothing yet'}.": table, "Wrong, failed or not run:": wrong,
             "All cases:": rest, "Kernels that take most:": kernels}
    return "\n\n".join("\n".join([title, "", *rows]) for title, rows in parts.items() if rows)


def main() -> None:
    parser = argparse.ArgumentParser("gpu_check.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("groups", nargs="+", help=f"of {', '.join(SECONDS)}; or report FILE")
    parser.add_argument("--out", default="out/gpu.jsonl", help="file to which a line of each case is added")
    parser.add_argument("--only", default="", help="run the cases alone that have this in their name")
    parser.add_argument("--dry", action="store_true", help="two small layers")
    args = parser.parse_args()
    if args.groups[0] == "report":
        print(report([json.loads(x) for file in args.groups[1:] for x in Path(file).read_text().splitlines()]))
        return
    if unknown := set(args.groups) - set(SECONDS):
        parser.error(f"no such group: {', '.join(unknown)}; expected {', '.join(SECONDS)}, or report FILE")
    out = Path(args.out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = [x for x in plan() if x.group in args.groups and args.only in x.name]
    with tempfile.TemporaryDirectory(prefix="gpu_check", ignore_cleanup_errors=True) as work:
        size = replace(DRY if args.dry else Size(), work=work)
        make_data(size)
        run_cases(chosen, size, out)


if __name__ == "__main__":
    main()
