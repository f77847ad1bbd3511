"""The masks are the paper's, pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.reference import may_read, visible
from transformer_lens_bd3lm.model.inputs import View
from transformer_lens_bd3lm.model.masks import causal_mask, dual_mask, sampling_mask

lengths = st.integers(1, 20)
block_sizes = st.integers(1, 24)  # also beyond the length: one ragged block


def square(queries, keys, view, length, block_size):
    return torch.tensor(visible(queries, keys, view, length, block_size))


@settings(deadline=None)
@given(lengths, block_sizes)
def test_the_dual_mask_is_the_papers_rule_for_every_pair(length, block_size):
    wanted = square(2 * length, 2 * length, "dual", length, block_size)
    assert torch.equal(dual_mask(length, block_size), wanted)


@settings(deadline=None)
@given(lengths, block_sizes)
def test_the_sampling_mask_is_block_causal_for_every_pair(length, block_size):
    wanted = square(length, length, "sampling", length, block_size)
    assert torch.equal(sampling_mask(length, length, block_size), wanted)


@settings(deadline=None)
@given(lengths, block_sizes, st.data())
def test_fewer_queries_are_the_last_rows_of_the_square(length, block_size, data):
    queries = data.draw(st.integers(1, length))
    whole = sampling_mask(length, length, block_size)
    assert torch.equal(sampling_mask(queries, length, block_size), whole[length - queries :])
    assert torch.equal(causal_mask(queries, length), causal_mask(length, length)[-queries:])


@given(lengths)
def test_the_causal_mask_is_a_lower_triangle(length):
    assert torch.equal(causal_mask(length, length), torch.ones(length, length).tril().bool())


@given(lengths)
def test_block_size_1_is_causal_and_the_whole_length_is_open(length):
    assert torch.equal(sampling_mask(length, length, 1), causal_mask(length, length))
    assert sampling_mask(length, length, length).all()


@settings(deadline=None)
@given(lengths, block_sizes)
def test_a_noisy_block_reads_as_the_sampling_view_of_its_prefix(length, block_size):
    """The clean past and itself: what the sampling view reads at the positions of that block."""
    dual, sampling = dual_mask(length, block_size), sampling_mask(length, length, block_size)
    noisy, clean = dual[:length, :length], dual[:length, length:]
    assert not (noisy & clean).any()
    assert torch.equal(noisy | clean, sampling)
    assert torch.equal(dual[length:, length:], sampling)


@settings(deadline=None)
@given(lengths, block_sizes)
def test_clean_never_reads_noisy(length, block_size):
    assert not dual_mask(length, block_size)[length:, :length].any()


@pytest.mark.parametrize(
    ("query", "key", "sees"),
    [
        # length 6, block size 2: noisy rows 0..5, clean rows 6..11
        (0, 1, True),
        (1, 0, True),
        (2, 1, False),
        (2, 4, False),
        (2, 7, True),
        (2, 8, False),
        (2, 9, False),
        (8, 9, True),
        (8, 6, True),
        (8, 10, False),
        (8, 2, False),
    ],
)
def test_the_rule_by_hand(query, key, sees):
    assert may_read(query, key, "dual", 6, 2) is sees
    assert bool(dual_mask(6, 2)[query, key]) is sees


def test_a_wrong_dual_mask_would_be_seen():
    """Each rule is needed: without it, or with its neighbour, the square differs."""
    wanted = square(12, 12, "dual", 6, 2)
    assert not torch.equal(dual_mask(6, 3), wanted)
    index = torch.arange(12)
    noisy, block = index < 6, (index % 6) // 2
    same = block[:, None] == block[None, :]
    reads_own_clean = dual_mask(6, 2) | (noisy[:, None] & ~noisy[None, :] & same)
    assert not torch.equal(reads_own_clean, wanted)


@pytest.mark.parametrize("kind", ["block", "causal", "open"])
@pytest.mark.parametrize("length", [1, 7])
def test_a_view_has_the_mask_and_positions_of_its_kind(device, kind, length):
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    view = View(ids, length, 3, kind, dual=False)
    mask = view.mask()
    if kind == "open":
        assert mask is None
    else:
        assert mask.device.type == device.type
        name = {"block": "sampling", "causal": "causal"}[kind]
        assert torch.equal(mask.cpu(), square(length, length, name, length, 3))
    assert view.positions().tolist() == list(range(length))


def test_both_halves_of_the_dual_view_count_positions_from_0(device):
    view = View(torch.zeros(1, 10, dtype=torch.long, device=device), 5, 2, "block", dual=True)
    assert view.positions().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert torch.equal(view.mask().cpu(), square(10, 10, "dual", 5, 2))
