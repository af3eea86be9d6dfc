"""Padding is told from tokens, and what shares a batch depends on lengths alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kava_core.models.batching import by_length, pad


def test_padding_stands_on_the_side_that_is_asked_for() -> None:
    ids, mask = pad([[5, 6, 7], [8]], "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad([[5, 6, 7], [8]], "right")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_real_token_with_id_0_is_no_padding() -> None:
    assert pad([[0, 0], [4, 0, 0]], "left")[1].tolist() == [[0, 1, 1], [1, 1, 1]]


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 7))
def test_batches_go_from_short_to_long_and_keep_the_order_of_equals(
    lengths: list[int], batch_size: int
) -> None:
    batches = by_length(lengths, batch_size)
    assert [i for batch in batches for i in batch] == [
        i for length in range(6) for i, found in enumerate(lengths) if found == length
    ]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(batches)
