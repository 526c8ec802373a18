"""Attention over packed rows: which keys a query sees, how it is computed, and attention over a KV cache.

A row packs several utterances; `positions` count from 0 in each. A segment is a stretch of consecutive positions, and
attention is causal within it. A segment that begins at 0 is an utterance. One that begins at p > 0 is another
continuation of the utterance before it: its tokens also attend to the shared prefix, the utterance's first p tokens.

`packed_mask` picks one of three ways, and `attend` follows it:
    Segments  on a CPU: one call a segment, as a call costs little there
    VarLen    on a GPU in 16 bits: one call for all segments (slam/varlen.py)
    a mask    on a GPU otherwise: (B, 1, T, T) bool; hidden pairs are computed, too
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WAY = "auto"  # segments, varlen or mask: take this way everywhere, to test or to time it


# ---------------------------------------------------------------- who sees whom
def attention_mask(positions: Tensor) -> Tensor:
    """The mask of packed rows: positions (B, T) int64 -> (B, 1, T, T) bool, True where a query (row) sees a key.

    attention_mask([[0, 1, 2, 1, 0]]) -> [[[[1, 0, 0, 0, 0],
                                            [1, 1, 0, 0, 0],
                                            [1, 1, 1, 0, 0],
                                            [1, 0, 0, 1, 0],      another continuation of the first token
                                            [0, 0, 0, 0, 1]]]]    another utterance
    """
    T = positions.shape[1]
    index = torch.arange(T, device=positions.device)
    begins = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    segment, utterance = begins.cumsum(1), (positions == 0).cumsum(1)
    start = positions - index + (index * begins).cummax(1).values  # position at which the token's segment begins
    shareable = positions.masked_fill(start > 0, T)  # only tokens of a first segment can be in a shared prefix
    same_segment = segment[:, :, None] == segment[:, None]
    shared_prefix = (utterance[:, :, None] == utterance[:, None]) & (shareable[:, None] < start[:, :, None])
    return (same_segment | shared_prefix).tril()[:, None]


def segment_table(positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The segments of all packed rows, one row after the other: begin, length, first and shared, (n,) each.

    Segment i is the tokens begin[i] to begin[i] + length[i] - 1 of the flattened rows. Besides itself, it sees the
    first shared[i] tokens of segment number first[i], which begins its utterance. positions: (B, T) int64.

    segment_table([[0, 1, 0], [0, 1, 1]]) -> [0, 2, 3, 5], [2, 1, 2, 1], [0, 1, 2, 2], [0, 0, 0, 1]
    """
    flat, width = positions.flatten(), positions.shape[1]
    begins = F.pad(flat[1:] != flat[:-1] + 1, (1, 0), value=True)
    begins[::width] = True
    begin = begins.nonzero()[:, 0]
    length = begin.diff(append=begin.new_tensor([len(flat)]))
    shared = flat[begin] * (begin % width != 0)
    number = torch.arange(len(begin), device=begin.device)
    return begin, length, (number * (shared == 0)).cummax(0).values, shared


# ---------------------------------------------------------------- how it is computed
@dataclass
class Segments:
    """Each segment's (length, first, shared), see `segment_table`, as a list: compiled code does not trace it."""
    spans: list[tuple[int, int, int]]

    @classmethod
    def of(cls, positions: Tensor) -> "Segments":
        """Segments.of([[0, 1, 0], [0, 1, 1]]) -> [(2, 0, 0), (1, 1, 0), (2, 2, 0), (1, 2, 1)]"""
        return cls(list(zip(*(x.tolist() for x in segment_table(positions)[1:]))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of packed rows, segment by segment: q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D).

        Equals masked attention, but skips hidden pairs: half the work if a row holds two utterances of equal length.

        spans [(2, 0, 0), (1, 0, 1)]: query 0 sees key 0; query 1 keys 0 and 1; query 2 keys 0 and 2.
        """
        B, _, T, _ = q.shape
        lengths, out = [n for n, _, _ in self.spans], []
        qs, ks, vs = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v))  # (n, H, D) each
        for i, (n, first, shared) in enumerate(self.spans):
            key, value, mask = ks[i], vs[i], None
            if shared:
                key, value = (torch.cat((x[first][:shared], x[i])) for x in (ks, vs))
                mask = torch.ones(n, shared + n, dtype=torch.bool, device=q.device).tril(shared)
            out.append(F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (qs[i], key, value)),
                                                      attn_mask=mask, is_causal=mask is None, enable_gqa=True))
        return torch.cat(out, 2).transpose(1, 2).view(B, T, *q.shape[1::2]).transpose(1, 2)


Mask = Any  # Segments | slam.varlen.VarLen | Tensor | None


def packed_mask(positions: Tensor, device: torch.device, dtype: torch.dtype) -> Mask:
    """The `mask` that `attend` takes for packed rows with positions (B, T) int64, computed on `device` in `dtype`.

    Call it outside compiled code, with positions on the CPU: counting segments on a GPU would make the CPU wait for it.
    """
    if WAY == "segments" or WAY == "auto" and device.type == "cpu":
        return Segments.of(positions)
    if WAY != "mask" and not torch.compiler.is_compiling():  # sizes that depend on the data can't be compiled
        from slam.varlen import VarLen, flash_runs  # imports torch.compile's parts, which takes seconds
        if WAY == "varlen" or flash_runs(device, dtype):
            return VarLen.of(positions, device)
    return attention_mask(positions.to(device, non_blocking=True))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention: q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D).

    mask: from `packed_mask`; or bool, True where a query sees a key; None: causal, with S = T.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        return mask.attend(q, k, v)
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:  # a decoding step: a group's heads become queries of its key head, so no keys are copied
        y = F.scaled_dot_product_attention(q.view(len(q), -1, groups, q.shape[3]), k, v, mask)
        return y.reshape(q.shape)  # not a view: CUDA's kernel with a mask returns another order in memory
    if q.is_cuda and groups > 1 and (mask is not None or q.dtype == torch.float32):
        # CUDA's fused kernels do not share heads in these cases
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=groups > 1)


# ---------------------------------------------------------------- generation
class KVCache:
    """Keys and values of the tokens so far, (B, kv_heads, capacity, head_dim) for each layer.

    Entry p of row b holds position p, so rows may be at different positions. config: a `model.ModelConfig`.
    """

    def __init__(self, config, batch: int, capacity: int, device, dtype):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        # A tensor for each layer: compiled code writes into these in place, but would copy the whole of a stacked one.
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
                          for _ in "kv")
        self.rows = torch.arange(batch, device=device)[:, None]
        self.length = capacity  # entries that attention looks at: at least those of the longest row

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, kv_heads, T, D) at `positions` (B, T); returns the first `length` entries of the layer."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, positions] = new.transpose(1, 2)
        return self.k[layer][:, :, :self.length], self.v[layer][:, :, :self.length]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.k, self.v, self.rows = [x[rows] for x in self.k], [x[rows] for x in self.v], self.rows[:len(rows)]


def compiled_decode(static: dict, lm, batch: int, capacity: int, dtype: torch.dtype) -> tuple[Callable, KVCache]:
    """`lm._decode`, compiled, and a cache; both at fixed addresses, as CUDA graphs need, so `static` keeps them."""
    place, size = (lm.device, dtype), (batch, capacity)
    if static.get("place") != place:
        mode = "reduce-overhead" if lm.device.type == "cuda" else "default"  # the former: CUDA graphs
        static |= {"place": place, "lm": lm, "decode": torch.compile(lm._decode, dynamic=False, mode=mode)}
    if static.get("cache_of") != (place, size):
        static |= {"cache_of": (place, size), "cache": KVCache(lm.config, *size, *place)}
        for x in (*static["cache"].k, *static["cache"].v):
            torch._dynamo.mark_static_address(x)
    for new, old in zip(lm.parameters(), static["lm"].parameters()):
        if new is not old:
            old.copy_(new)
    return static["decode"], static["cache"]
