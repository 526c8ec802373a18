"""Who attends to whom in packed rows: the mask, segments one by one and in one call, and the model's use of them.

FlashAttention runs on GPUs only, so here its two operators get CPU kernels, which compute in fp32 what its paper
defines (Dao 2023, algorithms 1 and 2, without the tiles). All else is the code that a GPU runs.
"""
import pytest
import torch
import torch.nn.functional as F
from test_model import our_model, random_tokens
from torch import Tensor
from torch.nn.attention import varlen

from slam import attention
from slam.attention import Segments, attend, attention_mask, packed_mask
from slam.varlen import VarLen, causal_options

CPU = torch.device("cpu")


# ---------------------------------------------------------------- FlashAttention's operators on a CPU
def blocks(q: Tensor, k: Tensor, query_offsets: Tensor, key_offsets: Tensor, scale: float | None):
    """Of each segment: the slices of its queries and keys, and its scores (H, n, m); causal, aligned at the end."""
    for q0, q1, k0, k1 in zip(*(x for o in (query_offsets.tolist(), key_offsets.tolist()) for x in (o, o[1:]))):
        if q1 > q0:
            shared = k[k0:k1].repeat_interleave(q.shape[1] // k.shape[1], 1)
            s = torch.einsum("nhd,mhd->hnm", q[q0:q1].float(), shared.float()) * (scale or q.shape[2] ** -0.5)
            hidden = ~torch.ones(s.shape[1:], dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            yield slice(q0, q1), slice(k0, k1), s.masked_fill(hidden, -torch.inf)


@varlen._varlen_attn.register_kernel("cpu")
def flash_forward(q, k, v, query_offsets, key_offsets, max_q, max_k, is_causal=False, scale=None, window_size=None,
                  *others):
    """Output and log-sum-exp; NaN where a token is in no segment, since a GPU leaves what was there before."""
    assert is_causal and window_size == [-1, 0] and query_offsets.dtype == key_offsets.dtype == torch.int32
    assert max(query_offsets.diff()) <= max_q and max(key_offsets.diff()) <= max_k
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[1::-1], torch.nan)
    for queries, keys, s in blocks(q, k, query_offsets, key_offsets, scale):
        value = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1).float()
        out[queries] = torch.einsum("hnm,mhd->nhd", s.softmax(-1), value).to(q.dtype)
        lse[:, queries] = s.logsumexp(-1)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def flash_backward(grad, q, k, v, out, lse, query_offsets, key_offsets, max_q, max_k, is_causal, rng_state, scale=None,
                   window_size=None):
    """dV = P' dO, dS = P * (dO V' - rowsum(dO * O)), dQ = dS K, dK = dS' Q; a key head sums over its queries'."""
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    group, scale = q.shape[1] // k.shape[1], scale or q.shape[2] ** -0.5
    for queries, keys, s in blocks(q, k, query_offsets, key_offsets, scale):
        p, do = (s - lse[:, queries, None]).exp(), grad[queries].float()
        key, value = (x[keys].repeat_interleave(group, 1).float() for x in (k, v))
        ds = p * (torch.einsum("nhd,mhd->hnm", do, value) - (do * out[queries].float()).sum(2).T[:, :, None])
        dq[queries] = (torch.einsum("hnm,mhd->nhd", ds, key) * scale).to(q.dtype)
        for x, y in ((dk, torch.einsum("hnm,nhd->mhd", ds, q[queries].float()) * scale),
                     (dv, torch.einsum("hnm,nhd->mhd", p, do))):
            x[keys] = y.unflatten(1, (-1, group)).sum(2).to(x.dtype)
    return dq, dk, dv


# ---------------------------------------------------------------- who sees whom

def mask_of(layout: list[tuple[int, int, int]], width: int) -> torch.Tensor:
    """The mask (B, T, T) that a list of segments stands for."""
    n_tokens = sum(n for n, _, _ in layout)
    mask, starts, at = torch.zeros(n_tokens, n_tokens, dtype=torch.bool), [], 0
    for n, first, shared in layout:
        starts.append(at)
        mask[at:at + n, at:at + n] = torch.ones(n, n).tril()
        mask[at:at + n, starts[first]:starts[first] + shared] = True
        at += n
    rows = [mask[i:i + width, i:i + width] for i in range(0, n_tokens, width)]
    assert mask.sum() == sum(row.sum() for row in rows)  # no row attends to another
    return torch.stack(rows)


def test_examples_of_the_docstrings():
    assert attention_mask(torch.tensor([[0, 1, 2, 1, 0]])).int().tolist() == [[[
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]]]
    assert Segments.of(torch.tensor([[0, 1, 0], [0, 1, 1]])).spans == [(2, 0, 0), (1, 1, 0), (2, 2, 0), (1, 2, 1)]
    assert mask_of([(2, 0, 0), (1, 0, 1)], 3).int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]


PACKED = [[0, 1, 2, 3, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 3, 2, 0, 1]]
BRANCHES = [[0, 1, 2, 3, 2, 3, 4, 3], [0, 1, 2, 1, 2, 3, 3, 0], [0, 1, 2, 3, 4, 1, 4, 5]]  # of several lengths shared


@pytest.mark.parametrize("positions", [PACKED, BRANCHES], ids=["packed", "branches"])
def test_mask_and_segments_say_the_same(positions):
    positions = torch.tensor(positions)
    mask, segments = attention_mask(positions), Segments.of(positions)
    assert torch.equal(mask[:, 0], mask_of(segments.spans, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 8, 4, generator=generator) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(segments.attend(q, k, v), expected)


def padded(row: list[int], width: int) -> list[int]:
    return row + list(range(width - len(row)))


MANY = [list(range(70)) + [0] * 80, padded([*range(33), *range(5, 80), 0], 150)]  # more than 128 segments; a padding


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("positions", [PACKED, BRANCHES, MANY], ids=["packed", "branches", "many"])
def test_one_call_for_all_segments_equals_segment_by_segment(positions, heads):
    """Values and gradients, with shared key heads and prefixes; every token is in a segment."""
    positions = torch.tensor(positions)
    generator, shape = torch.Generator().manual_seed(0), positions.shape
    q, k, v, grad = (torch.randn(shape[0], h, shape[1], 8, generator=generator, requires_grad=True)
                     for h in (*heads, heads[1], heads[0]))
    expected, layout = attend(q, k, v, Segments.of(positions)), VarLen.of(positions, CPU)
    found = attend(q, k, v, layout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert layout.query_offsets[-1] == positions.numel() and len(layout.query_offsets) % 128 == 0
    assert (layout.keys is None) == (Segments.of(positions).spans == [(n, i, 0) for i, n in enumerate(
        layout.query_offsets.diff().tolist()) if n])


def test_the_segments_for_one_call_by_hand():
    """The docstring's example: the last token of the second row also sees that row's first."""
    found = VarLen.of(torch.tensor([[0, 1, 0], [0, 1, 1]]), CPU)
    assert found.query_offsets.tolist() == [0, 2, 3, 5] + [6] * 124
    assert found.key_offsets.tolist() == [0, 2, 3, 5] + [7] * 124
    assert found.keys.tolist() == [0, 1, 2, 3, 4, 3, 5]
    assert found.uses.tolist() == [[0, -1], [1, -1], [2, -1], [3, 5], [4, -1], [6, -1]]
    plain = VarLen.of(torch.tensor([[0, 1, 0, 1]]), CPU)
    assert plain.keys is None and plain.query_offsets is plain.key_offsets


def test_versions_of_torch_are_told_in_their_words():
    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...
    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)): ...
    def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...
    assert causal_options(of_2_10) == {"is_causal": True}
    assert causal_options(of_2_11) == {"window_size": (-1, 0)}
    assert causal_options(of_2_12) == {"window_size": (-1, 0), "enable_gqa": True}
    assert set(causal_options(varlen.varlen_attn)) >= {"window_size"}  # this torch has it under one of these names


def test_which_way_is_taken(monkeypatch):
    positions = torch.tensor(PACKED)
    for way, kind in (("auto", Segments), ("segments", Segments), ("varlen", VarLen), ("mask", Tensor)):
        monkeypatch.setattr(attention, "WAY", way)
        for dtype in (torch.float32, torch.bfloat16):
            assert isinstance(packed_mask(positions, CPU, dtype), kind)


def test_a_decoding_step_takes_what_cudas_kernel_returns(monkeypatch):
    """CUDA's memory-efficient kernel has its output's heads and places transposed in memory; a view fails there."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: kernel(q, k, v, None, False)[0])
    q, k = torch.empty(1, 14, 1, 64, device="meta"), torch.empty(1, 2, 20, 64, device="meta")
    assert attend(q, k, k, None).shape == q.shape


@pytest.mark.parametrize("way", ["segments", "varlen", "mask"])
@torch.no_grad()
def test_several_continuations_of_a_shared_prefix(way, monkeypatch):
    """Each attends to the prefix and itself: the logits are those of the whole sequences, one a row."""
    monkeypatch.setattr(attention, "WAY", way)
    lm, prefix, ends = our_model(), random_tokens(1, 5, 1), [random_tokens(1, n, n) for n in (6, 1, 4)]
    wholes, other = [torch.cat([prefix, end], 1) for end in ends], random_tokens(1, 7, 9)
    tokens = torch.cat([prefix, *ends, other], 1)
    positions = torch.cat([torch.arange(5), *(torch.arange(5, 5 + e.shape[1]) for e in ends), torch.arange(7)])[None]
    expected = torch.cat([lm(wholes[0])[0], *(lm(x)[0][:, 5:] for x in wholes[1:]), lm(other)[0]], 1)
    torch.testing.assert_close(lm(tokens, positions=positions)[0], expected, rtol=1e-5, atol=1e-5)
    both = torch.cat([positions, torch.arange(positions.shape[1])[None]])  # a second row is one utterance
    assert Segments.of(both).spans == [(11, 0, 0), (1, 0, 5), (4, 0, 5), (7, 3, 0), (23, 4, 0)]
    assert torch.equal(attention_mask(both)[:, 0], mask_of(Segments.of(both).spans, 23))
