"""The cases of dev/gpu_check.py: each a function of a `Size` and its settings that returns what its line holds."""
import contextlib
import copy
import importlib.metadata
import io
import json
import math
import platform
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
import wave
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import model
from dev import bench
from dpo import load_pairs
from model import ModelConfig, UnitLM
from slam import attention, packing, train_vocoder, varlen
from slam.checkpoint import git_commit
from slam.costs import flops_per_token, peak_flops
from slam.device import autocast, n_graphs, pick_device
from slam.optim import make_optimizer, update
from slam.packing import Packed, collate, cut
from slam.scoring import pack, pair_nlls, row_logps
from slam.tokenizer import SpeechTokenizer
from slam.units import Fingerprint, UnitReader, UnitWriter, to_tokens, write_pairs
from slam.vocoder import Vocos
from train import accumulate, build

ROOT = Path(__file__).resolve().parent.parent
FINGERPRINT = Fingerprint("made-up", 0, 25.0, 500, True, "0" * 64)


@dataclass
class Size:
    """How large the cases are; the defaults are Slam's."""
    work: str = ""  # folder of the made-up data and of what the cases write
    shape: dict = field(default_factory=lambda: {"vocab_size": 502})  # of ModelConfig, whose other defaults are Slam's
    layers: int = 4  # of models that are compared with those on the CPU
    context: int = 1024
    batch_tokens: int = 131_072
    steps: int = 5  # timed of each case, after two more
    utterances: int = 4000
    pairs: int = 2000
    matrix: int = 8192
    seconds: float = 10.0  # of speech in a batch's row
    hubert: dict = field(default_factory=dict)
    dry: bool = False


DRY = Size(shape={"vocab_size": 502, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
                  "num_attention_heads": 4}, layers=2, context=256, batch_tokens=1024, steps=1, utterances=60, pairs=12,
           matrix=64, seconds=1.0, hubert={"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                                           "intermediate_size": 64, "conv_dim": (16,) * 7}, dry=True)


# ---------------------------------------------------------------- made-up data
def chains(n: int, rng: np.random.Generator, mean: float = 178) -> list[np.ndarray]:
    """n utterances of about `mean` units (N,), of a chain in which eight units may follow each: something to learn."""
    after = (np.arange(500)[:, None] + np.random.default_rng(0).integers(1, 500, (500, 8))) % 500
    lengths = rng.normal(mean, mean / 4, n).clip(10).astype(int)
    x = rng.integers(0, 500, (lengths.max(), n))
    for t in range(1, len(x)):
        x[t] = after[x[t - 1], rng.geometric(0.5, n).clip(max=8) - 1]
    return [x[:length, i] for i, length in enumerate(lengths)]


def make_data(size: Size) -> None:
    """Unit files train/ and val/, pair files pairs_train.jsonl and pairs_val.jsonl."""
    rng, work = np.random.default_rng(1), Path(size.work)
    for split, n in (("train", size.utterances), ("val", max(8, size.utterances // 20))):
        with UnitWriter(work / split, FINGERPRINT, "made up") as writer:
            for i, units in enumerate(chains(n, rng)):
                writer.add(f"{i}", units, None)
        said = [(x[:20], x[20:]) for x in chains(max(8, size.pairs // (1 if split == "train" else 20)), rng, 80)
                if len(x) > 25]
        write_pairs(work / f"pairs_{split}.jsonl", FINGERPRINT,
                    [{"id": str(i), "prompt": a.tolist(), "chosen": b.tolist(), "rejected": rng.permutation(b).tolist()}
                     for i, (a, b) in enumerate(said)])


# ---------------------------------------------------------------- clocks
def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(work: Callable, n: int, warm: int = 2) -> float:
    """Seconds of a call."""
    for _ in range(warm):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(n):
        work()
    wait()
    return (time.perf_counter() - started) / n


MATRIX = re.compile("gemm|nvjet|cutlass|xmma|cublas|flash|fmha|attention|triton_tem|mm$")  # products and attention


def profile(work: Callable) -> dict:
    """The 15 kernels that take most of a call, in %; the share of products and attention; how busy the GPU is."""
    cuda = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:  # with both, a step in eager mode is parsed for minutes
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds = time.perf_counter() - started
    # On a GPU kernels alone: the calls that launch them are on the list too.
    kernels = [(x.self_device_time_total if cuda else x.self_cpu_time_total, x.key) for x in profiler.key_averages()
               if (x.device_type != torch.autograd.DeviceType.CPU) == cuda and not x.is_user_annotation]
    total = sum(us for us, _ in kernels)
    if not total:
        return {"profile": "no kernels seen"}
    return {"matrix_share": sum(us for us, name in kernels if MATRIX.search(name)) / total,
            "kernel_s": total / 1e6, "busy": total / 1e6 / seconds,
            "kernels": [[100 * us / total, name[:100]] for us, name in sorted(kernels, reverse=True)[:15]]}


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; NaN if one holds a NaN."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


def judged(errors: dict[str, float], limits: dict[str, float] | float) -> dict:
    """Errors, and whether all are below their limits, which a NaN is not."""
    return {"ok": all(x <= (limits[k] if isinstance(limits, dict) else limits) for k, x in errors.items())} | errors


# ---------------------------------------------------------------- env
def environment(size: Size) -> dict:
    """Versions, the device, and how torch's FlashAttention over segments is called here."""
    device, found = pick_device(), {"python": platform.python_version(), "cuda": torch.version.cuda,
                                    "cudnn": torch.backends.cudnn.version(), "commit": git_commit()}
    for name in ("torch", "triton", "transformers", "numpy", "soundfile", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["varlen"] = str(getattr(varlen.flash, "keywords", "not in this torch"))
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"memory_gb": p.total_memory / 1e9, "capability": f"{p.major}.{p.minor}",
                  "processors": p.multi_processor_count, "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled()}
    return found


def ceilings(size: Size) -> dict:
    """What the device reaches at most: a product of bf16 matrices (n, n), and a copy (bytes read and written)."""
    n, device = size.matrix, pick_device()
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    x = torch.zeros(4, n, n, device=device)
    y = torch.empty_like(x)
    return {"matmul_tflops": 2 * n**3 / clock(lambda: a @ b, 100) / 1e12,
            "copy_gb_per_s": 2 * x.nbytes / clock(lambda: y.copy_(x), 50) / 1e9}


# ---------------------------------------------------------------- correct
def positions_of(spans: list[tuple[int, int]], n: int) -> Tensor:
    """Positions (1, n) of segments (start, length); what they leave of the row is one more."""
    x = np.concatenate([np.arange(start, start + length) for start, length in spans])[:n]
    return torch.from_numpy(np.concatenate([x, np.arange(n - len(x))]))[None]


def attention_errors(size: Size) -> dict:
    """Attention of packed rows in bf16 against float64, segment by segment: output and gradients."""
    T, device, rng, errors = size.context, pick_device(), np.random.default_rng(0), {}
    cases = {"mixed": [(0, int(n)) for n in rng.integers(T // 16, T // 3, 9)], "padding": [(0, T // 3), (0, T // 3)],
             "single tokens": [(0, 1)] * (T // 8), "one segment": [(0, T)],
             "pairs": [(0, T // 8), (T // 16, T // 12)] * 4,  # more keys than queries: the alignment of `causal` counts
             "three ends": [(0, T // 4), (T // 8, T // 8), (T // 8, T // 5), (T // 8, 1), (0, T // 9)],
             "130 segments": [(0, T // 160 + 1)] * 130}
    for name, spans in cases.items():
        positions = positions_of(spans, T).expand(2, -1).contiguous()
        q, k, v, grad = (torch.randn(2, h, T, 64).bfloat16() for h in (14, 2, 2, 14))
        ours, exact = ([x.detach().to(where, kind).requires_grad_() for x in (q, k, v)]
                       for where, kind in ((device, torch.bfloat16), ("cpu", torch.float64)))
        mask = attention.packed_mask(positions, device, torch.bfloat16)
        y = attention.attend(*ours, mask)
        y.backward(grad.to(device))
        expected = attention.Segments.of(positions).attend(*exact)
        expected.backward(grad.double())
        errors[name] = max(relative(y, expected), *(relative(a.grad, b.grad) for a, b in zip(ours, exact)))
    return {"way": type(mask).__name__} | judged(errors, 1e-2)


def some_rows(size: Size) -> tuple[tuple[Tensor, ...], int, list]:
    """A micro-batch of two rows with its number of targets, and rows of pairs."""
    reader = UnitReader(f"{size.work}/train")
    micro = collate(reader, list(Packed(cut(reader.lengths, size.context)[:40], size.context, None))[:2], size.context)
    pairs = load_pairs(f"{size.work}/pairs_train.jsonl", size.context)[1][:8]
    return micro, int((micro[1] >= 0).sum()), [[pairs[i] for i in row] for row in pack(pairs, size.context)]


def small(size: Size) -> UnitLM:
    return UnitLM(ModelConfig(**size.shape | {"num_hidden_layers": size.layers}))


def gradients(lm: torch.nn.Module) -> Tensor:
    """All gradients (n_params,), which are forgotten."""
    flat = torch.cat([p.grad.flatten() for p in lm.parameters()])
    lm.zero_grad()
    return flat


def models(size: Size) -> dict:
    """A few layers' losses and gradients, of training rows and of pairs, by each way of attention, against CPU fp32."""
    torch.set_float32_matmul_precision("highest")
    lm, (micro, n, rows), errors = small(size), some_rows(size), {}

    def of(device: torch.device, dtype: str, way: str) -> list[Tensor]:
        attention.WAY = way
        net = copy.deepcopy(lm).to(device)
        found = [accumulate(net, [micro], n, device, dtype), gradients(net)]
        logps = row_logps(net, rows, size.context, device, dtype)
        (logps[:, 1] - logps[:, 2]).mean().backward()
        return [*found, logps, gradients(net)]

    expected = of(torch.device("cpu"), "float32", "segments")
    for way, dtype in (("auto", "float32"), ("auto", "bfloat16"), ("mask", "bfloat16"), ("segments", "bfloat16")):
        found = of(pick_device(), dtype, way)
        for what, a, b in zip(("loss", "gradient", "logps", "pairs' gradient"), found, expected):
            errors[f"{way} {dtype} {what}"] = relative(a, b)
    return judged(errors, {k: 1e-3 if "float32" in k else 5e-2 for k in errors})


def generation(size: Size) -> dict:
    """Greedy continuations of prompts of different lengths: share of tokens that are the CPU's in fp32."""
    torch.set_float32_matmul_precision("highest")
    lm, prompts = small(size).eval(), [to_tokens(x)[:-1] for x in chains(4, np.random.default_rng(2), 24)]
    how = dict(max_new_tokens=32, temperature=0, stop=())
    expected, device = np.array(lm.generate(prompts, **how)), pick_device()
    lm.to(device)

    def same(dtype: str, **more) -> float:
        with autocast(device, dtype):
            return float((np.array(lm.generate(prompts, **how, **more)) == expected).mean())

    shares = {"eager": same("float32"), "bfloat16": same("bfloat16")}
    shares |= {"compiled": same("float32", compile=True)} if device.type == "cuda" else {}
    return {"ok": all(x == 1 for k, x in shares.items() if k != "bfloat16")} | shares


def make(lm: torch.nn.Module, kind: str):
    """`make_optimizer`; for "torch's muon" with torch's, matrix by matrix, in the place of ours."""
    optimizer = make_optimizer(lm, bench.TrainConfig(optimizer=kind.split()[-1], weight_decay=0.1))
    if kind == "torch's muon":
        group, = optimizer.optimizers[0].param_groups
        theirs = torch.optim.Muon(group["params"], group["lr"], group["weight_decay"], group["momentum"],
                                  adjust_lr_fn="match_rms_adamw")
        optimizer.optimizers = (theirs, *optimizer.optimizers[1:])
    return optimizer


def optimizers(size: Size) -> dict:
    """Three steps of each optimiser against the CPU's, with the same gradients: largest difference / learning rate."""
    errors, device = {}, pick_device()
    start = UnitLM(ModelConfig(**size.shape | {"num_hidden_layers": 2}))
    grads = [[torch.randn_like(p) for p in start.parameters()] for _ in range(3)]
    for kind in ("adamw", "ademamix", "muon", "torch's muon"):
        ends = []
        for where, which in (("cpu", kind.split()[-1]), (device, kind)):
            lm = copy.deepcopy(start).to(where)
            optimizer = make(lm, which)
            for step in grads:
                for p, g in zip(lm.parameters(), step):
                    p.grad = g.to(where, copy=True)
                update(lm, optimizer, 1e-2, 1.0)
            ends.append(list(lm.parameters()))
        errors[kind] = max((a - b.cpu()).abs().max().item() / 1e-2 for a, b in zip(*ends))
    return judged(errors, 0.1)


def one_graph(size: Size) -> dict:
    """Graphs that packings of 20 to 300 segments need: one each for training, with checkpointing, and for pairs."""
    device, counts = pick_device(), {}
    pairs = load_pairs(f"{size.work}/pairs_train.jsonl", size.context)[1]
    attention.WAY = "auto" if device.type == "cuda" else "mask"
    for name in ("training", "activation checkpointing", "pairs"):
        lm, before = small(replace(size, layers=2)).to(device), n_graphs()
        lm.set_activation_checkpointing(name == "activation checkpointing")
        forward = torch.compile(lm, fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")
        for n in (20, 60, 100, 140, 300):
            if name == "pairs":
                rows = [[pairs[i] for i in row] for row in pack(pairs[:n // 2], size.context)][:2]
                row_logps(forward, rows, size.context, device, "bfloat16")[:, 1:].sum().backward()
                continue
            tokens = torch.randint(2, 502, (2, size.context))
            positions = positions_of([(0, max(1, 2 * size.context // n))] * (n // 2), size.context).expand(2, -1)
            accumulate(forward, [(tokens, tokens, positions.contiguous())], tokens.numel(), device, "bfloat16")
        counts[name] = n_graphs() - before
    return judged(counts, 1)


# ---------------------------------------------------------------- first, mfu
def flex_mask(positions: Tensor, device: torch.device, dtype: torch.dtype):
    """The mask of packed rows of whole utterances (B, T) for flex_attention, in the place of `packed_mask`."""
    from torch.nn.attention.flex_attention import create_block_mask
    utterance, (B, T) = (positions == 0).cumsum(1).to(device), positions.shape
    return create_block_mask(lambda b, h, q, k: (utterance[b, q] == utterance[b, k]) & (q >= k), B, None, T, T, device)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """In the place of `attend`."""
    from torch.nn.attention.flex_attention import flex_attention
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


@contextlib.contextmanager
def flex():
    """Inside, packed rows are computed by flex_attention."""
    before = packing.packed_mask, model.attend
    packing.packed_mask, model.attend = flex_mask, flex_attend
    yield
    packing.packed_mask, model.attend = before


def syncs(work: Callable) -> int:
    """How often a call makes the CPU wait for the GPU."""
    if not torch.cuda.is_available():
        return 0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(x.message) for x in found)


def training(size: Size, way: str = "auto", micro_batch: int = 8, dtype: str = "bfloat16", cudnn: bool = False,
             peer: bool = False) -> dict:
    """Steps of train.py, or as SlamKit trains: useful tokens/s, MFU by the PaLM formula and by the work needed.

    Needed is attention to the tokens that a query sees, (n + 1) / 2 on average in a segment of n; the formula has T.
    """
    device, reader, rows = pick_device(), UnitReader(f"{size.work}/train"), size.batch_tokens // size.context
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    attention.WAY = "auto" if way == "flex" else way
    cfg = bench.BenchTrain(train=(f"{size.work}/train",), shape=size.shape, context=size.context, dtype=dtype,
                           micro_batch=min(micro_batch, rows), batch_tokens=size.batch_tokens)
    lm = build(cfg, 502)
    with flex() if way == "flex" else contextlib.nullcontext():
        step = (bench.peer_training if peer else bench.our_training)(cfg, reader, lm, device)
        started = time.perf_counter()
        step()
        wait()
        first, graphs, n = time.perf_counter() - started, n_graphs(), [step()]
        seconds = clock(lambda: n.append(step()), size.steps, 1)
        rate = np.mean(n[-size.steps:]) / seconds
        found = {"tokens_per_s": rate, "step_ms": 1e3 * seconds, "compile_s": first - seconds,
                 "recompilations": n_graphs() - graphs, "waits": syncs(step)}
        found |= {} if peer else profile(step)  # with the profiler, a step in eager mode takes minutes
        if "kernel_s" in found:
            found["busy"] = found["kernel_s"] / seconds  # of a step that the profiler doesn't slow
    lengths, peak = cut(reader.lengths, size.context)[:, 2], peak_flops(device)
    keys = {"mfu_needed": (lengths * (lengths + 1) / 2).sum() / lengths.sum(), "mfu_palm": size.context}
    return found | {name: rate * flops_per_token(lm, n) / peak for name, n in keys.items() if peak}


def optimizer_step(size: Size, kind: str) -> dict:
    """Milliseconds of a step and its clipping."""
    lm = UnitLM(ModelConfig(**size.shape)).to(pick_device())
    optimizer = make(lm, kind)
    grads = [torch.randn_like(p) for p in lm.parameters()]

    def step() -> None:
        for p, g in zip(lm.parameters(), grads):
            p.grad = g
        update(lm, optimizer, 1e-4, 0.5)

    return {"ms": 1e3 * clock(step, size.steps)} | profile(step)


# ---------------------------------------------------------------- stages
def flags(**settings) -> list[str]:
    return [f"--{k}={v}" for k, v in settings.items()]


def run_stage(size: Size, *command: str) -> None:
    """`python COMMAND` to its end; RuntimeError with what it said if it fails. Dry: in this process."""
    if size.dry:
        argv, sys.argv = sys.argv, list(command)
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        sys.argv = argv
        return
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


def log_of(out: str) -> list[dict]:
    path = Path(out) / "log.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x[-1] == "\n"] if path.exists() else []


def train_stage(size: Size) -> dict:
    """train.py on config/slam.py's shape for 40 steps: stopped by SIGTERM on the way, resumed, with a falling loss."""
    out, steps = f"{size.work}/run", 4 if size.dry else 40
    command = ["train.py", *flags(out=out, train=f"{size.work}/train", val=f"{size.work}/val", context=size.context,
                                  shape=json.dumps(size.shape), batch_tokens=size.batch_tokens // 2, steps=steps,
                                  micro_batch=2 if size.dry else 8, log_every=1, eval_every=1000, lr=1e-3, warmup=0.1)]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.poll() is None and not any("loss" in x for x in log_of(out)):
        time.sleep(0.2)
    first = time.perf_counter() - started
    process.send_signal(signal.SIGTERM)
    if (code := process.wait()) not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):  # the last: after its end
        raise RuntimeError(f"train.py: exit code {code}")
    stopped = log_of(out)[-1]["step"]
    run_stage(size, *command, "--resume")
    records = [x for x in log_of(out) if "loss" in x]
    losses = [x["loss"] for x in records]
    return {"ok": [x["step"] for x in records] == [*range(1, steps + 1)] and losses[-1] < losses[0], "exit_code": code,
            "stopped_at": stopped, "first_step_s": first, "losses": [losses[0], losses[-1]],
            **{k: records[-1][k] for k in ("tokens_per_second", "mfu", "mfu_needed", "memory_gb") if k in records[-1]}}


def no_memory(size: Size) -> dict:
    """train.py with rows that do not fit: an exit code of 1 and a message, not a traceback."""
    rows = 4096
    done = subprocess.run([sys.executable, "train.py", *flags(
        out=f"{size.work}/none", train=f"{size.work}/train", val=f"{size.work}/val", shape=json.dumps(size.shape),
        micro_batch=rows, batch_tokens=rows * 1024, steps=1, compile=False)], cwd=ROOT, capture_output=True, text=True)
    return {"ok": done.returncode == 1 and "Traceback" not in done.stderr and "memory" in done.stderr,
            "said": done.stderr.strip()[-300:]}


def dpo_stage(size: Size) -> dict:
    """dpo.py for ten steps, from what train.py left, or from random weights."""
    out, start = f"{size.work}/dpo", f"{size.work}/run/checkpoint"
    if not Path(start).exists():
        UnitLM(ModelConfig(**size.shape)).save_pretrained(start, {"fingerprint": FINGERPRINT.to_dict()})
    run_stage(size, "dpo.py", *flags(
        checkpoint=start, pairs=f"{size.work}/pairs_train.jsonl", val_pairs=f"{size.work}/pairs_val.jsonl",
        out=out, steps=2 if size.dry else 10, batch_pairs=4 if size.dry else 64, context=size.context, log_every=1,
        n_samples=0, warmup=0.1))
    losses = [x["loss"] for x in log_of(out) if "loss" in x]
    return {"ok": abs(losses[0] - math.log(2)) < 0.02, "losses": [losses[0], losses[-1]]}


def dpo_steps(size: Size, micro_batch: int) -> dict:
    """Pairs/s of DPO steps, ours and the peer's (SlamKit's way, by TRL), peak GB of both, and our kernels."""
    cfg = bench.BenchDpo(context=size.context, micro_batch=micro_batch, batch_pairs=4 if size.dry else 64)
    lm, pairs = UnitLM(ModelConfig(**size.shape)), load_pairs(f"{size.work}/pairs_train.jsonl", size.context)[1]
    found = bench.rates({"ours": lambda: bench.our_dpo(cfg, lm, pairs, False),
                         "peer": lambda: bench.peer_dpo(cfg, lm, pairs)}, size.steps, 1)
    step = bench.our_dpo(cfg, lm, pairs, False)
    step()
    return {f"{side}_{what}": x for side, both in found.items() for what, x in zip(("pairs_per_s", "gb"), both)} | {
        "waits": syncs(step)} | profile(step)


def bench_lines(run: Callable, cfg) -> dict:
    """The lines that a function of dev/bench.py prints: {case: {ours, peer, unit, ratio}}."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(cfg)
    lines = [json.loads(x) for x in said.getvalue().splitlines() if x.startswith("{")]
    return {f"{x['case']} {x.get('batch', '')} {x.get('seconds', '')}".strip():
            {k: x[k] for k in ("ours", "peer", "unit", "ratio")} for x in lines}


def generating(size: Size) -> dict:
    """New tokens/s of 1, 16 and 64 prompts at once in bf16, ours and transformers'; of 16 over fp32 weights, ours."""
    n, device = 8 if size.dry else 50, pick_device()
    found = bench_lines(bench.bench_generate, bench.BenchGenerate(
        shape=size.shape, batches=(1, 2) if size.dry else (1, 16, 64), rounds=1 if size.dry else 3, max_new_tokens=n))
    lm = UnitLM(ModelConfig(**size.shape)).eval().to(device)
    for compile in (False, True)[:1 + (device.type == "cuda")]:
        with autocast(device, "bfloat16"):
            seconds = clock(lambda: lm.generate([[1, 5, 9]] * 16, n, stop=(), top_k=25, compile=compile), 2, 1)
        found[f"autocast 16 {'compiled' if compile else 'eager'}"] = 16 * n / seconds
    return found


def scoring(size: Size, dtype: str) -> dict:
    """Pairs/s of scores, ours and SlamKit's loop, on shapes seen before; `first`: ours on new shapes."""
    rng, device = np.random.default_rng(3), pick_device()
    lm = UnitLM(ModelConfig(**size.shape)).eval().to(device)
    pairs = [(to_tokens(x), to_tokens([*x[:len(x) // 2], *rng.permutation(x[len(x) // 2:])]))
             for x in chains(size.pairs, rng)]
    first = clock(lambda: pair_nlls(lm, pairs, size.context, dtype=dtype), 1, 0)
    ours = len(pairs) / clock(lambda: pair_nlls(lm, pairs, size.context, dtype=dtype), 1, 0)
    hf, part = bench.peer_model(lm).to(device, getattr(torch, dtype)).eval(), pairs[:len(pairs) // 4]
    peer = len(part) / clock(lambda: [bench.peer_scores(hf, list(side)) for side in zip(*part)], 1, 1)
    return {"ours": ours, "first": len(pairs) / first, "peer": peer, "unit": "pairs/s", "ratio": ours / peer}


def units(size: Size) -> dict:
    """Speech to units by a HuBERT base of random weights: times real time, in batches of 30 s and of 240 s."""
    name = bench.random_hubert(Path(size.work), **size.hubert)
    tokenizer = SpeechTokenizer.load(name, str(pick_device()))
    waves = [x.astype(np.float32) for x in np.random.default_rng(4).normal(0, 0.1, (48, int(size.seconds * 16_000)))]
    waves = waves[:2] if size.dry else waves
    return {f"{batch} s": len(waves) * size.seconds / clock(lambda: tokenizer.label(waves, batch), 2, 1)
            for batch in (30, 240)} | profile(lambda: tokenizer.label(waves, 240))


def speaking(size: Size) -> dict:
    """Units to speech: times real time, ours and a unit HiFi-GAN's (V1), both of random weights."""
    path = Path(size.work) / "vocoder.safetensors"
    Vocos(FINGERPRINT).save(path)
    return bench_lines(bench.bench_vocoder, bench.BenchVocoder(
        str(path), (0.4,) if size.dry else (10.0, 1.0), rounds=1 if size.dry else 5))


def vocoder_training(size: Size, seconds: float = 30.0) -> dict:
    """slam.train_vocoder on tones for so long."""
    work, rng, n = Path(size.work) / "voice", np.random.default_rng(5), 8 if size.dry else 100
    work.mkdir(exist_ok=True)
    with UnitWriter(work / "units", FINGERPRINT, durations=True) as writer:
        for i, x in enumerate(chains(n, rng, 75)):
            t = np.arange(640 * len(x)) / 16_000
            sound = np.sin(2 * np.pi * t * (80 + np.repeat(x, 640))) * 8000
            with wave.open(str(work / f"{i}.wav"), "wb") as f:
                f.setparams((1, 2, 16_000, len(t), "NONE", ""))
                f.writeframes(sound.astype("<i2").tobytes())
            writer.add(f"{i}.wav", x, np.ones_like(x))
    train_vocoder.main(train_vocoder.Config(
        str(work / "units"), str(work), str(work / "run"), minutes=seconds / 60, steps=2 if size.dry else None,
        width=32 if size.dry else 256, log_every=1, overwrite=True))
    records = [x for x in log_of(str(work / "run")) if "spectral" in x]
    return {"ok": records[-1]["spectral"] < records[0]["spectral"] or size.dry, "steps": records[-1]["step"],
            "steps_per_s": records[-1]["step"] / records[-1]["seconds"],
            "spectral": [records[0]["spectral"], records[-1]["spectral"]]}
