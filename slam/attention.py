"""Attention over packed rows: who sees whom, three ways to compute it, and attention over a KV cache.

A row packs several utterances; `positions` count from 0 in each. A segment is a stretch of consecutive positions, and
attention is causal within it. A segment that begins at 0 is an utterance. One that begins at p > 0 is another
continuation of the utterance before it: its tokens also attend to the shared prefix, the utterance's first p tokens.

`packed_mask` picks one of three ways, and `attend` follows it:
    Segments  one call a segment: on a CPU, where a call costs little
    VarLen    one call of FlashAttention for all segments: on a GPU in 16 bits
    a mask    (B, 1, T, T) bool, computes hidden pairs too: on a GPU in fp32, or with a torch older than 2.10
"""
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
    """The same as the segments of all rows, one row after the other: begin, length, first and shared, (n,) each.

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


# ---------------------------------------------------------------- three ways
@dataclass
class Segments:
    """The segments as a list of (length, first, shared), see `segment_table`.

    The class wraps the list: compiled code hands it on unread, so no new list makes it compile again.
    """
    spans: list[tuple[int, int, int]]

    @classmethod
    def of(cls, positions: Tensor) -> "Segments":
        """Segments.of([[0, 1, 0], [0, 1, 1]]) -> [(2, 0, 0), (1, 1, 0), (2, 2, 0), (1, 2, 1)]"""
        return cls(list(zip(*(x.tolist() for x in segment_table(positions)[1:]))))


class VarLen(NamedTuple):
    """The segments as FlashAttention wants them: where each one's queries and keys begin, int32.

    Queries are the flattened rows. Keys are too, unless a prefix is shared: then each segment's keys are gathered, the
    prefix's and its own. The last offset is repeated until there are a multiple of 128: packings differ less in shape.
    """
    query_offsets: Tensor  # (128 n,)
    key_offsets: Tensor  # (128 n,)
    keys: Tensor | None = None  # (K,) int64, the token of each gathered key
    uses: Tensor | None = None  # (B T, n) int64, where among the gathered keys each token is, -1: nowhere else

    @classmethod
    def of(cls, positions: Tensor, device: torch.device) -> "VarLen":
        """VarLen.of([[0, 1, 0], [0, 1, 1]]) -> [0 2 3 5 6 6 …], [0 2 3 5 7 7 …], [0 1 2 3 4 3 5], [[0 -1] [1 -1] … ]"""
        load_flash()
        begin, length, first, shared = segment_table(positions)
        n_tokens, n_keys = positions.numel(), length + shared

        def offsets(lengths: Tensor) -> Tensor:
            x = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            return torch.cat((x, x[-1:].expand(-len(x) % 128)))

        if not shared.any():
            found = (offsets(length),) * 2
        else:
            segment = torch.arange(len(begin), device=begin.device).repeat_interleave(n_keys)
            place = torch.arange(len(segment), device=begin.device) - (n_keys.cumsum(0) - n_keys)[segment]
            own = place - shared[segment]  # negative: in the prefix
            keys = torch.where(own < 0, begin[first][segment] + place, begin[segment] + own)
            by_token, count = keys.argsort(stable=True), keys.bincount(minlength=n_tokens)
            token = keys[by_token]
            uses = keys.new_full((n_tokens, max(2, int(count.max()))), -1)
            uses[token, torch.arange(len(keys), device=keys.device) - (count.cumsum(0) - count)[token]] = by_token
            found = offsets(length), offsets(n_keys), keys, uses
        if device.type == "cuda" and not positions.is_cuda:
            found = [x.pin_memory().to(device, non_blocking=True) for x in found]
        if dynamo := sys.modules.get("torch._dynamo"):  # something is compiled: one graph for all these sizes
            for x in found[:3]:
                dynamo.mark_dynamic(x, 0)
        return cls(*found)


flash: Callable  # torch's varlen_attn, causal, key heads shared; `load_flash` sets it


@functools.cache
def load_flash() -> None:
    """Import torch's FlashAttention over segments of any lengths; not at the start, since that takes seconds."""
    global flash
    from torch.nn.attention.varlen import varlen_attn
    flash = functools.partial(varlen_attn, **causal_options(varlen_attn))


def causal_options(varlen_attn: Callable) -> dict:
    """What tells this version of `varlen_attn` to be causal and to share key heads among queries."""
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}  # torch >= 2.11; 2.10
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})  # torch >= 2.12; earlier ones always do


@functools.cache
def flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has it. Says so once if not."""
    reason = "" if dtype in (torch.bfloat16, torch.float16) else f"it computes in {dtype}".replace("torch.", "")
    if torch.cuda.get_device_capability(device) < (8, 0):
        reason = "it is older than Ampere"
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        reason = f"torch {torch.__version__} is older than 2.10"
    if reason:
        print(f"{torch.cuda.get_device_name(device)}: attention takes a mask, not FlashAttention: {reason}",
              file=sys.stderr)
    return not reason


def packed_mask(positions: Tensor, device: torch.device, dtype: torch.dtype) -> Segments | VarLen | Tensor:
    """What `attend` needs to know of packed rows, positions (B, T) int64, when it computes on `device` in `dtype`.

    Call it outside compiled code, with positions on the CPU: it counts segments, and a GPU would have to be waited for.
    """
    way = WAY
    if way == "auto":
        in_graph = torch.compiler.is_compiling()  # of sizes that depend on the data there is no graph
        way = "segments" if device.type == "cpu" else "varlen" if not in_graph and flash_runs(device, dtype) else "mask"
    if way == "segments":
        return Segments.of(positions)
    return VarLen.of(positions, device) if way == "varlen" else attention_mask(positions.to(device, non_blocking=True))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Segments | VarLen | Tensor | None) -> Tensor:
    """Attention, in which groups of query heads share a key head: q (B, H, T, D), k and v (B, H_kv, S, D) -> as q.

    mask: of `packed_mask`; or bool, True where a query sees a key; None: causal, with S = T.
    """
    if isinstance(mask, Segments):
        return segment_attention(q, k, v, mask.spans)
    if isinstance(mask, VarLen):
        return varlen_attention(q, k, v, mask)
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:  # a decoding step: as queries of one head, the heads of a group need no copies of its keys
        return F.scaled_dot_product_attention(q.view(len(q), -1, groups, q.shape[3]), k, v, mask).view_as(q)
    if q.is_cuda and groups > 1 and (mask is not None or q.dtype == torch.float32):
        # CUDA's fused kernels do not share heads in these cases
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=groups > 1)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: list[tuple[int, int, int]]) -> Tensor:
    """Attention of packed rows, segment by segment: q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D).

    Equals masked attention, without work on hidden pairs: with two utterances of equal length in a row, half of it.

    layout [(2, 0, 0), (1, 0, 1)]: query 0 sees key 0; query 1 keys 0 and 1; query 2 keys 0 and 2.
    """
    B, _, T, _ = q.shape
    qs, ks, vs = (x.transpose(1, 2).flatten(0, 1).split([n for n, _, _ in layout]) for x in (q, k, v))  # (n, H, D) each
    out = []
    for i, (n, first, shared) in enumerate(layout):
        key, value, mask = ks[i], vs[i], None
        if shared:
            key, value = (torch.cat((x[first][:shared], x[i])) for x in (ks, vs))
            mask = torch.ones(n, shared + n, dtype=torch.bool, device=q.device).tril(shared)
        out.append(F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (qs[i], key, value)),
                                                  attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2).view(B, T, *q.shape[1::2]).transpose(1, 2)


def compile_around_segments() -> None:
    """Before torch.compile on a CPU: it leaves attention by segments as it is and compiles the rest of each block.

    Not by a decorator, since torch.compiler.disable imports all of torch.compile, which every start would wait for.
    """
    global segment_attention
    segment_attention = torch.compiler.disable(segment_attention)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: VarLen) -> Tensor:
    """The same as `segment_attention` in one call (Dao 2023, FlashAttention-2)."""
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, heads, D)
    if layout.keys is not None:
        k, v = (Gather.apply(x, layout.keys, layout.uses) for x in (k, v))
    y = flash(q, k, v, layout.query_offsets, layout.key_offsets, T, T)  # a segment's last query sees all of its keys
    return y.view(B, T, H, D).transpose(1, 2)


class Gather(torch.autograd.Function):
    """x[keys] of x (N, H, D), whose backward pass gathers too: exact in any order, and no atomic additions in bf16."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, uses: Tensor) -> Tensor:
        ctx.save_for_backward(uses)
        return x[keys]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        uses, = ctx.saved_tensors
        return grad[uses].masked_fill((uses < 0)[..., None, None], 0).sum(1), None, None


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
        """Write k, v (B, kv_heads, T, D) at `positions` (B, T); the first `length` entries of the layer."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, positions] = new.transpose(1, 2)
        return self.k[layer][:, :, :self.length], self.v[layer][:, :, :self.length]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.k, self.v, self.rows = [x[rows] for x in self.k], [x[rows] for x in self.v], self.rows[:len(rows)]
