"""Attention over packed rows, by a mask or segment by segment, and over a KV cache.

A row packs several utterances; `positions` count from 0 in each. A segment is a stretch of consecutive positions, and
attention is causal within it. A segment that begins at 0 is an utterance. One that begins at p > 0 is another
continuation of the utterance before it: its tokens also attend to the shared prefix, the utterance's first p tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


def segments(positions: Tensor) -> list[tuple[int, int, int]]:
    """The same as a list: the segments of all rows, one row after the other, as (length, first, shared).

    Besides itself, a segment sees the first `shared` tokens of segment number `first`, which begins its utterance.
    positions: (B, T) int64.

    segments([[0, 1, 0], [0, 1, 1]]) -> [(2, 0, 0), (1, 1, 0), (2, 2, 0), (1, 2, 1)]
    """
    flat, width = positions.flatten(), positions.shape[1]
    begins = F.pad(flat[1:] != flat[:-1] + 1, (1, 0), value=True)
    begins[::width] = True
    edges = begins.nonzero()[:, 0]
    lengths = edges.diff(append=edges.new_tensor([len(flat)]))
    found, first = [], 0
    for edge, start, length in zip(edges.tolist(), flat[edges].tolist(), lengths.tolist()):
        if start == 0 or edge % width == 0:
            first, start = len(found), 0
        found.append((length, first, start))
    return found


@dataclass
class Segments:
    """The list of `segments`, wrapped: compiled code hands it on unread, so no new list makes it compile again."""
    spans: list[tuple[int, int, int]]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(q, k, v, self.spans)


def packed_mask(positions: Tensor) -> Tensor | Segments:
    """The attention mask of packed rows, positions (B, T): as Segments on a CPU, as a tensor on other devices."""
    return Segments(segments(positions)) if positions.device.type == "cpu" else attention_mask(positions)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: list[tuple[int, int, int]]) -> Tensor:
    """Attention of packed rows, segment by segment: q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D).

    Equals masked attention, without work on hidden pairs: with two utterances of equal length
    in a row, half of it. For CPUs, where a call costs little; a GPU takes one call with the mask.

    layout [(2, 0, 0), (1, 0, 1)]: query 0 sees key 0; query 1 keys 0 and 1; query 2 keys 0 and 2.
    """
    B, _, T, _ = q.shape
    qs, ks, vs = (x.transpose(1, 2).flatten(0, 1).split([n for n, _, _ in layout]) for x in (q, k, v))  # (n, H, D) each
    out = []
    for i, (n, first, shared) in enumerate(layout):
        key, value, mask = ks[i], vs[i], None
        if shared:
            key, value = (torch.cat((x[first][:shared], x[i])) for x in (ks, vs))
            mask = torch.ones(n, shared + n, dtype=torch.bool).tril(shared)
        out.append(F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (qs[i], key, value)),
                                                  attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2).view(B, T, *q.shape[1::2]).transpose(1, 2)


def compile_around_segments() -> None:
    """Before torch.compile on a CPU: it leaves attention by segments as it is and compiles the rest of each block.

    Not by decorators, since torch.compiler.disable imports all of torch.compile, which every start would wait for.
    """
    global segments, segment_attention
    segments, segment_attention = torch.compiler.disable(segments), torch.compiler.disable(segment_attention)


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
        """Write k, v (B, kv_heads, T, D) at `positions` (B, T); the first `length` entries of the layer."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, positions] = new.transpose(1, 2)
        return self.k[layer][:, :, :self.length], self.v[layer][:, :, :self.length]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.k, self.v, self.rows = [x[rows] for x in self.k], [x[rows] for x in self.v], self.rows[:len(rows)]
