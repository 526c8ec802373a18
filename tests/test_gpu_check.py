"""dev/gpu_check.py: every case runs, with two small layers on a CPU; what fails or hangs costs its own line alone."""
import json
import re
import signal
import threading

import numpy as np
import pytest
import torch

from dev import gpu_cases, gpu_check
from dev.gpu_check import A5000, DRY, Case, Size, make_data, measure, plan, predicted, report, rounded, run_cases
from model import ModelConfig, UnitLM
from slam import attention, packing
from slam.units import UnitReader, read_pairs

# Of several cases of one function, these; the others differ in a number.
CHOSEN = ["training peer=True", "training micro_batch=32 dtype=pure_bfloat16", "optimizer_step kind=torch's muon",
          "dpo_steps micro_batch=4", "scoring dtype=float32"]


@pytest.fixture(scope="module")
def size(tmp_path_factory):
    size = Size(**vars(DRY) | {"work": str(tmp_path_factory.mktemp("gpu"))})
    make_data(size)
    return size


@pytest.fixture
def as_before():
    """Cases change what belongs to the process; a worker has it for itself."""
    handlers = [(x, signal.getsignal(x)) for x in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    way, precision = attention.WAY, torch.get_float32_matmul_precision()
    yield
    attention.WAY = way
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers:
        signal.signal(number, handler)


def chosen(group: str) -> list[Case]:
    several = {c.run for c in plan() if sum(c.run is x.run for x in plan()) > 1}
    return [c for c in plan() if c.group == group and (c.run not in several or c.name in CHOSEN)]


@pytest.mark.parametrize("group", ["env", "correct", "mfu", "stages"])
def test_every_case_runs(size, as_before, group):
    for case in (c for c in chosen(group) if not c.missing()):
        found = json.loads(json.dumps(rounded(measure(case, size))))
        assert found.get("ok", True), (case.name, found)
        if case.run is gpu_cases.training:
            assert found["tokens_per_s"] > 0
            assert "peer" in case.settings or len(found["kernels"]) == 15 and 0 < found["matrix_share"] < 1
        if case.run is gpu_cases.one_graph:
            assert found["graphs"] == 3


def test_every_function_is_chosen():
    assert {c.run for group in gpu_check.SECONDS for c in chosen(group)} == {c.run for c in plan()}


def test_the_report():
    measured = {"tokens_per_s": 90_000.0, "matrix_share": 0.75, "busy": 1.0, "compile_s": 41.2, "graphs": 1,
                "peak_gb": 20.1, "mfu_needed": 0.301, "mfu_palm": 0.334, "kernels": [[40.5, "gemm"], [9.0, "copy"]]}
    lines = [{"matmul_tflops": 4 * A5000["matmul_tflops"], "copy_gb_per_s": 6 * A5000["copy_gb_per_s"]}, measured,
             {"error": "exit code 1: x"}, {"ok": False, "mixed": 0.5}, {"not_run": "needs soundfile"}]
    names = ["ceilings", "training way=auto", "training way=mask", "attention_errors", "vocoder_training"]
    text = report([{"group": "x", "case": name, "device": "H"} | line for name, line in zip(names, lines)])
    assert "| way=auto | 90,000 | 30.1 / 33.4 | 20.1 | 41, 1 | 20,000 |" in text and "Measured on: H." in text
    assert "| way=mask | failed |" in text and "| micro_batch=64 | not run yet |" in text and "16,500" in text
    wrong = text.split("Wrong, failed or not run:")[1].split("All cases:")[0]
    assert re.findall("^- ([^:]+):", wrong, re.M) == ["training way=mask", "attention_errors", "vocoder_training"]
    assert "40.5 % `gemm`" in text


def test_the_plan_is_slams_shape_and_fits_its_time():
    lm = UnitLM(ModelConfig(**Size().shape | {"num_hidden_layers": 1}))
    assert lm.config.num_hidden_layers == 1 and ModelConfig(**Size().shape).num_hidden_layers == 24
    block = sum(p.numel() for p in lm.model.layers[0].parameters())
    assert lm.n_params() + 23 * block == 358_347_904  # the paper's table 6
    assert list(dict.fromkeys(c.group for c in plan())) == list(gpu_check.SECONDS)
    assert sum(gpu_check.SECONDS.values()) <= 1500  # 25 minutes


def test_made_up_data_has_structure(size):
    reader, (_, pairs) = UnitReader(f"{size.work}/train"), read_pairs(f"{size.work}/pairs_train.jsonl")
    follows = {}
    for i in range(len(reader)):
        for a, b in zip(reader.units(i), reader.units(i)[1:]):
            follows.setdefault(a, set()).add(b)
    assert len(reader) == DRY.utterances and max(map(len, follows.values())) <= 8
    assert pairs and all(sorted(p["chosen"]) == sorted(p["rejected"]) for p in pairs)


def good(size, x):
    return {"x": x}


def bad(size):
    raise torch.OutOfMemoryError("CUDA out of memory")


def hanging(size):
    threading.Event().wait(1000)


def test_what_fails_or_hangs_costs_its_line(tmp_path, monkeypatch, capsys):
    """A new process goes on with the next case; none is begun when the time is over."""
    cases = [Case("a", good, 60, {"x": 1}), Case("a", bad, 60), Case("a", good, 60, {"x": 2}), Case("a", hanging, 1),
             Case("a", good, 60, {}, ("no_such_module",))]
    run_cases(cases, DRY, tmp_path / "out.jsonl", {"a": 900})
    run_cases([Case("b", good, 60, {"x": 3})], DRY, tmp_path / "out.jsonl", {"b": 0})
    lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [x["case"] for x in lines] == ["good x=1", "bad", "good x=2", "hanging", "good", "good x=3"]
    assert lines[0]["x"] == 1 and lines[2]["x"] == 2 and "seconds" in lines[0]
    assert lines[1]["error"] == "exit code 1: torch.OutOfMemoryError: CUDA out of memory"
    assert lines[3]["error"] == "no end within 1 s"
    assert lines[4]["not_run"] == "needs no_such_module" and lines[5]["not_run"] == "the time was over"
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["gpu_check.py", "report", str(tmp_path / "out.jsonl")])
        gpu_check.main()
    assert "- bad: error exit code 1: torch.OutOfMemoryError" in capsys.readouterr().out


def test_the_prediction_by_hand():
    here = {"matmul_tflops": 4 * A5000["matmul_tflops"], "copy_gb_per_s": 6 * A5000["copy_gb_per_s"]}
    assert predicted({"tokens_per_s": 90_000, "matrix_share": 0.75, "busy": 0.8}, here) == pytest.approx(25_000)
    assert predicted({"tokens_per_s": 9.0, "matrix_share": 0.2, "busy": 1}, A5000) == pytest.approx(9.0)


def test_flex_attention_sees_what_the_mask_shows():
    """Forward only: its backward pass needs a GPU."""
    lm, tokens = UnitLM(ModelConfig(**DRY.shape | {"head_dim": 16})).eval(), torch.randint(2, 502, (2, 128))
    rows = tokens, tokens, torch.tensor([[*range(90), *range(38)], [*range(3), *range(125)]])
    with torch.no_grad():
        expected = lm(*packing.on_device(rows, lm.device, "float32"))[0]
        with gpu_cases.flex():
            inputs = packing.on_device(rows, lm.device, "float32")
            ours = lm(*inputs)[0]
    assert type(inputs[3]).__name__ == "BlockMask" and (expected - lm(tokens)[0]).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_attention_errors_would_show_a_wrong_mask(size, monkeypatch):
    monkeypatch.setattr(gpu_cases.attention, "packed_mask", lambda *args: None)  # plain causal attention
    found = gpu_cases.attention_errors(size)
    assert not found["ok"] and found["one segment"] < 1e-2 < min(found["mixed"], found["pairs"])
    assert not gpu_cases.judged({"x": float("nan")}, 1)["ok"] and np.isfinite(found["mixed"])
