"""Who attends to whom in packed rows: the mask, the list of segments, and the model's use of both."""
import pytest
import torch
import torch.nn.functional as F
from test_model import our_model, random_tokens

from slam.attention import Segments, attention_mask, segment_attention


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
    mask, layout = attention_mask(positions), Segments.of(positions).spans
    assert torch.equal(mask[:, 0], mask_of(layout, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 8, 4, generator=generator) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(segment_attention(q, k, v, layout), expected)


@torch.no_grad()
def test_several_continuations_of_a_shared_prefix():
    """Each attends to the prefix and itself: the logits are those of the whole sequences, one a row."""
    lm, prefix, ends = our_model(), random_tokens(1, 5, 1), [random_tokens(1, n, n) for n in (6, 1, 4)]
    wholes, other = [torch.cat([prefix, end], 1) for end in ends], random_tokens(1, 7, 9)
    tokens = torch.cat([prefix, *ends, other], 1)
    positions = torch.cat([torch.arange(5), *(torch.arange(5, 5 + e.shape[1]) for e in ends), torch.arange(7)])[None]
    expected = torch.cat([lm(wholes[0])[0], *(lm(x)[0][:, 5:] for x in wholes[1:]), lm(other)[0]], 1)
    torch.testing.assert_close(lm(tokens, positions=positions)[0], expected, rtol=1e-5, atol=1e-5)
    both = torch.cat([positions, torch.arange(positions.shape[1])[None]])  # a second row is one utterance
    assert Segments.of(both).spans == [(11, 0, 0), (1, 0, 5), (4, 0, 5), (7, 3, 0), (23, 4, 0)]
    assert torch.equal(attention_mask(both)[:, 0], mask_of(Segments.of(both).spans, 23))
