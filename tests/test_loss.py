"""slam/loss.py: chunks of a large vocabulary give the plain cross-entropy and its gradients."""
import pytest
import torch
import torch.nn.functional as F

from slam import loss
from slam.loss import head_loss
from slam.units import IGNORE


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_equal_the_whole(reduction, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    targets = torch.randint(300, (3, 50), generator=generator)
    targets[1, 20:] = IGNORE
    found = {}
    for name, large in (("plain", 10_000), ("chunks", 100)):
        monkeypatch.setattr(loss, "LARGE_VOCABULARY", large)
        monkeypatch.setattr(loss, "CHUNK", 64)
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logits, value = head_loss(a, w, targets, reduction)
        assert (logits is None) == (name == "chunks")
        (value * torch.arange(1.0, 1 + value.numel()).view_as(value)).sum().backward()
        found[name] = value.detach(), a.grad, w.grad
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction=reduction)
    torch.testing.assert_close(found["chunks"][0].flatten(), expected.flatten(), atol=1e-5, rtol=1e-5)
    for ours, plain in zip(found["chunks"], found["plain"]):
        torch.testing.assert_close(ours, plain, atol=1e-4 if reduction != "mean" else 1e-5, rtol=1e-5)


def test_compiled_is_one_graph(monkeypatch):
    monkeypatch.setattr(loss, "LARGE_VOCABULARY", 100)
    x, weight = torch.randn(2, 40, 8, requires_grad=True), torch.randn(200, 8, requires_grad=True)
    targets = torch.randint(200, (2, 40))
    compiled = torch.compile(lambda: head_loss(x, weight, targets, "sum")[1], backend="aot_eager", fullgraph=True)
    value = compiled()
    value.backward()
    ours = weight.grad.clone()
    x.grad = weight.grad = None
    plain = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    plain.backward()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(ours, weight.grad, atol=1e-4, rtol=1e-5)
