"""slam.attention."""
import torch
import torch.nn.functional as F
from torch import Tensor

from slam.units import IGNORE


def attention_mask(positions: Tensor) -> Tensor:
    """Who may attend to whom, (B, 1, T, T) bool: what `UnitLM.forward` says of positions (B, T)."""
    place = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    begins = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    run, utterance = begins.cumsum(1), (positions == 0).cumsum(1)
    start = positions - place + torch.where(begins, place, 0).cummax(1).values  # position at which the run begins

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, None, :, None], x[:, None, None, :]

    (run_q, run_k), (utterance_q, utterance_k) = pairs(run), pairs(utterance)
    return ((run_q == run_k) | (utterance_q == utterance_k) & (positions[:, None, None, :] < pairs(start)[0])).tril()


def segments(positions: Tensor) -> list[tuple[int, int, int]]:
    """`attention_mask` in short: runs of consecutive positions, of all rows one after the other, as (length, trunk, shared).

    A run sees itself and, before that, the first `shared` tokens of run number `trunk`.
    segments([[0, 1, 0], [0, 1, 1]]) -> [(2, 0, 0), (1, 1, 0), (2, 2, 0), (1, 2, 1)]
    """
    flat, width = positions.flatten(), positions.shape[1]
    begins = F.pad(flat[1:] != flat[:-1] + 1, (1, 0), value=True)
    begins[::width] = True
    edges = begins.nonzero()[:, 0]
    found, trunk = [], 0
    lengths = torch.diff(edges, append=edges.new_tensor([len(flat)]))
    for i, (at, start, length) in enumerate(zip(edges.tolist(), flat[edges].tolist(), lengths.tolist())):
        trunk = i if start == 0 or at % width == 0 else trunk
        found.append((length, trunk, start if trunk < i else 0))
    return found


def segment_attention(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
    """Attention as `segments` says, (B, H, T, D), run by run: no work on what a mask would hide.

    What a CPU does: there a call costs little, and a row of two utterances half of what a masked one does.
    """
    B, _, T, _ = q.shape
    parts = [x.transpose(1, 2).flatten(0, 1).split([n for n, _, _ in runs]) for x in (q, k, v)]  # (n, H, D) each
    y = []
    for i, (n, trunk, shared) in enumerate(runs):
        qkv, mask = [x[i] for x in parts], None
        if shared:
            qkv[1:] = (torch.cat((x[trunk][:shared], x[i])) for x in parts[1:])
            mask = torch.ones(n, shared + n, dtype=torch.bool).tril(shared)
        y.append(F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), attn_mask=mask,
                                                is_causal=mask is None, enable_gqa=True))
    return torch.cat(y, 2).transpose(1, 2).view(B, T, *q.shape[1::2]).transpose(1, 2)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in nats, fp32, of logits (B, T, V) and targets (B, T); reduction mean, sum or none (-> (B, T))."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss
