"""Attention over packed rows by FlashAttention (Dao 2023): one call for segments of any lengths, on a GPU in 16 bits.

Only `slam.attention.packed_mask` imports this file, and only where it is used: torch's part takes seconds to import.
"""
import functools
import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slam.attention import segment_table

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def causal_options(varlen_attn: Callable) -> dict:
    """Arguments that make this version of `varlen_attn` causal and let query heads share key heads."""
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}  # torch >= 2.11; 2.10
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})  # torch >= 2.12; earlier ones always do


flash = functools.partial(varlen_attn, **causal_options(varlen_attn)) if varlen_attn else None


@functools.cache
def flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention runs on a GPU in this dtype; if not, the reason is printed once."""
    reason = "" if dtype in (torch.bfloat16, torch.float16) else f"it computes in {dtype}".replace("torch.", "")
    if torch.cuda.get_device_capability(device) < (8, 0):
        reason = "it is older than Ampere"
    if not varlen_attn:
        reason = f"torch {torch.__version__} is older than 2.10"
    if reason:
        print(f"{torch.cuda.get_device_name(device)}: attention takes a mask, not FlashAttention: {reason}",
              file=sys.stderr)
    return not reason


class VarLen(NamedTuple):
    """The segments as FlashAttention wants them: where each one's queries and keys begin, int32.

    Queries are the flattened rows. Keys are too, unless a prefix is shared: then each segment's keys are gathered, the
    prefix's and its own. The last offset is repeated until their number is a multiple of 128: fewer shapes.
    """
    query_offsets: Tensor  # (128 n,)
    key_offsets: Tensor  # (128 n,)
    keys: Tensor | None = None  # (K,) int64, the token of each gathered key
    uses: Tensor | None = None  # (B T, n) int64, each token's places among the gathered keys, filled up with -1

    @classmethod
    def of(cls, positions: Tensor, device: torch.device) -> "VarLen":
        """VarLen.of([[0, 1, 0], [0, 1, 1]]) -> [0 2 3 5 6 6 …], [0 2 3 5 7 7 …], [0 1 2 3 4 3 5], [[0 -1] [1 -1] … ]"""
        begin, length, first, shared = segment_table(positions)
        n_tokens, n_keys = positions.numel(), length + shared

        def offsets(lengths: Tensor) -> Tensor:
            x = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            return torch.cat((x, x[-1:].expand(-len(x) % 128)))

        def place(group: Tensor, sizes: Tensor) -> Tensor:
            """Place of each item within its group, where the items of group 0 come first, and so on."""
            return torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]

        found = [offsets(length)]
        if shared.any():
            segment = torch.arange(len(begin), device=begin.device).repeat_interleave(n_keys)
            at = place(segment, n_keys) - shared[segment]  # negative: in the prefix
            keys = torch.where(at < 0, (begin[first] + shared)[segment], begin[segment]) + at
            by_token, count = keys.argsort(stable=True), keys.bincount(minlength=n_tokens)
            token = keys[by_token]
            uses = keys.new_full((n_tokens, max(2, int(count.max()))), -1)
            uses[token, place(token, count)] = by_token
            found += offsets(n_keys), keys, uses
        if device.type == "cuda" and not positions.is_cuda:
            found = [x.pin_memory().to(device, non_blocking=True) for x in found]
        if dynamo := sys.modules.get("torch._dynamo"):  # something is compiled: one graph for all these sizes
            for x in found[:3]:
                dynamo.mark_dynamic(x, 0)
        return cls(*found) if len(found) > 1 else cls(*found, *found)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, heads, D)
        if self.keys is not None:
            k, v = (Gather.apply(x, self.keys, self.uses) for x in (k, v))
        y = flash(q, k, v, self.query_offsets, self.key_offsets, T, T)  # a segment's last query sees all of its keys
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
