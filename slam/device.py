"""The hardware: GPU or CPU, processes of torchrun, mixed precision."""
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which default arguments in it would otherwise keep alive
from torch import Tensor

from slam.attention import Segments


def pick_device() -> torch.device:
    """The GPU if there is one (under torchrun, this process's), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, slower than a step of generation
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


# ---------------------------------------------------------------- several processes
def world_size() -> int:
    """Number of processes: 1 unless started by torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless started by torchrun."""
    world = world_size()
    if world > 1:  # gloo exchanges the few numbers that the CPU needs, without a wait for the GPU
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise SystemExit(f"more processes than GPUs ({torch.cuda.device_count()}): lower --nproc_per_node")
            torch.cuda.set_device(pick_device())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(hours=1))
    return int(os.environ.get("RANK", 0)), world


def leave_ranks() -> None:
    """Wait for the other processes, then leave them."""
    if dist.is_initialized():
        over_ranks([0.0])
        dist.destroy_process_group()


def over_ranks(values: list[float], op: dist.ReduceOp = dist.ReduceOp.SUM) -> list[float]:
    """The sum (or another reduction) of each value over all processes; every process waits for all others here."""
    if not dist.is_initialized():
        return values
    x = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(x, op)
    return x.tolist()


def sum_gradients(lm: torch.nn.Module) -> None:
    """Add up the ranks' gradients, once a step; the loss has been divided by the targets of all ranks.

    The exchange takes a few hundredths of a step, and without DistributedDataParallel's hooks the compiled model stays
    one graph.
    """
    for p in lm.parameters():
        dist.all_reduce(p.grad)


# ---------------------------------------------------------------- speed
def fast_bfloat16(cpu: dict) -> bool:
    """Whether a CPU with these `torch.cpu.get_capabilities()` multiplies bfloat16 matrices faster than fp32 ones.

    On x86: with AMX, or with AMD's AVX-512 BF16. Intel's AVX-512 BF16 without AMX, which virtual machines may hide, is
    half as fast as fp32; torch itself reports bfloat16 as supported on every CPU with AVX-512.
    """
    if cpu.get("architecture") == "x86_64":
        return cpu["amx_bf16"] or cpu["avx512_bf16"] and "Intel" not in cpu["cpu_name"]
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compute_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """Type of matrix products for a Config's `dtype`; auto: bfloat16 where the hardware multiplies it fast."""
    if dtype == "auto":
        fast = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else  # Ampere
                fast_bfloat16(torch.cpu.get_capabilities()))
        dtype = "bfloat16" if fast else "float32"
    return torch.float32 if dtype == "float32" else torch.bfloat16


def autocast(device: torch.device, dtype: str):
    """Context of mixed precision, bfloat16 matrix products over fp32 weights; does nothing if both have one type."""
    mixed = dtype != "pure_bfloat16" and compute_dtype(device, dtype) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Type in which x is multiplied: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def with_linear_layers_in(dtype: torch.dtype, lm: torch.nn.Module) -> torch.nn.Module:
    """A copy of a `model.UnitLM` with linear layers cast once (autocast: at every token), sharing all other weights."""
    if dtype == next(lm.parameters()).dtype:
        return lm
    with torch.device("meta"):
        other = type(lm)(lm.config)
    linear = {id(p) for x in lm.modules() if isinstance(x, torch.nn.Linear) for p in x.parameters()}
    other.load_state_dict({k: p.to(dtype) if id(p) in linear else p for k, p in lm.named_parameters()}, assign=True)
    return other


def compiled(lm: torch.nn.Module, wanted: bool | None) -> Callable:
    """The model's forward, compiled if `wanted`; None: on a GPU only."""
    if not (lm.device.type == "cuda" if wanted is None else wanted):
        return lm
    if lm.device.type == "cpu":  # leave attention by segments out. Not by a decorator: that imports all of dynamo
        Segments.attend = torch.compiler.disable(Segments.attend)
    return torch.compile(lm)


def n_graphs() -> int:
    """Graphs that torch.compile has made so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds, so only if something was compiled
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def put(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
