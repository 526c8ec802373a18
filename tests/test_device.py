"""slam.device: which arithmetic is fast here, and mixed precision."""
import pytest
import torch

from slam.device import autocast, fast_bfloat16


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


def test_bf16_autocast_keeps_fp32_weights():
    layer = torch.nn.Linear(4, 4)
    with autocast(torch.device("cpu"), "bfloat16"):
        y = layer(torch.ones(1, 4))
    assert y.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in layer.parameters())
