"""slam.device and slam.costs: which arithmetic is fast here, mixed precision, FLOPs, a full memory."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run

from slam.costs import explain_out_of_memory, flops_per_token
from slam.device import autocast, compute_dtype, fast_bfloat16


@pytest.mark.parametrize("name, amx, avx512, fast", [
    ("Intel Xeon", True, True, True), ("Intel Xeon", False, True, False), ("AMD EPYC", False, True, True),
    ("Intel Xeon", False, False, False), ("AMD EPYC", False, False, False)])
def test_auto_takes_bfloat16_where_it_is_fast(name, amx, avx512, fast):
    """On an Intel CPU that hides AMX, products in bfloat16 take 1.8 times as long as in fp32."""
    known = torch.cpu.get_capabilities()
    cpu = {"architecture": "x86_64", "cpu_name": name, "amx_bf16": amx, "avx512_bf16": avx512}
    assert fast_bfloat16(cpu) == fast
    assert known.get("architecture") != "x86_64" or cpu.keys() <= known.keys()
    chosen = torch.bfloat16 if fast_bfloat16(known) else torch.float32
    with autocast(torch.device("cpu"), "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == chosen
    assert [compute_dtype(torch.device("cpu"), x) for x in ("auto", "float32", "bfloat16", "pure_bfloat16")] == [
        chosen, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
def test_leaving_ends_the_threads_of_the_group():
    """A thread of gloo that still runs when the interpreter ends now and then aborts a process that had succeeded."""
    run("-c", """if 1:
        import pathlib, torch.distributed as dist, slam.device
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        import torch._dynamo, torch.distributed.nn.functional  # as training does, later than the group
        names = lambda: [x.read_text() for x in pathlib.Path("/proc/self/task").glob("*/comm")]
        assert any("gloo" in name for name in names())
        slam.device.leave_ranks()
        assert not any("gloo" in name for name in names()), names()""")


def test_bf16_autocast_keeps_fp32_weights():
    layer = torch.nn.Linear(4, 4)
    with autocast(torch.device("cpu"), "bfloat16"):
        y = layer(torch.ones(1, 4))
    assert y.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in layer.parameters())


def test_flops_of_attention_are_those_of_its_two_products():
    """Against torch's own count of a forward pass: scores and weighted values, over all keys."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from model import ModelConfig, UnitLM
    lm = UnitLM(ModelConfig(vocab_size=22, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                            num_attention_heads=4, num_key_value_heads=4))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm(torch.ones(3, 50, dtype=torch.long))
    small = sum(p.numel() for p in lm.parameters() if p.ndim == 1)  # no matrix products
    assert 3 * counter.get_total_flops() == 150 * (flops_per_token(lm, 50) - 6 * small)


@pytest.mark.parametrize("micro_batch, checkpointing, said, unsaid", [
    (8, False, "a smaller micro_batch (now 8), --activation_checkpointing=true", "nothing"),
    (1, True, "with a smaller context", "micro_batch")])
def test_a_full_gpu_is_explained(micro_batch, checkpointing, said, unsaid):
    @explain_out_of_memory
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    with pytest.raises(SystemExit) as e:
        main(SimpleNamespace(micro_batch=micro_batch, activation_checkpointing=checkpointing))
    assert "Tried to allocate 2.00 GiB.\n" in str(e.value) and "--resume" in str(e.value)
    assert said in str(e.value) and unsaid not in str(e.value) and "capacity" not in str(e.value)
