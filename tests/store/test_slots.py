"""Which record of a shard has impossible slots, against the format's words taken one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.store import layout
from kava_core.store.layout import wrong_slots

LIMITS = np.iinfo(np.int32)


def named(counts: Any, positions: Any, lengths: Any) -> int | None:
    """The slow form of `wrong_slots`: docs/store-format.md, number by number."""
    for record, length in enumerate(lengths.tolist()):
        for row, heads in enumerate(counts[record].tolist()):
            for head, count in enumerate(heads):
                places = positions[record, row, head].tolist()
                kept, rest = places[: max(count, 0)], places[max(count, 0) :]
                if not (
                    1 <= count <= len(places)
                    and all(0 <= place < length for place in kept)
                    and kept == sorted(set(kept))
                    and all(place == -1 for place in rest)
                ):
                    return record
    return None


@st.composite
def shards(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """counts, positions and lengths of a shard as it should be, with up to three numbers in it
    replaced by any others."""
    n, rows, heads, slots = (draw(st.integers(1, most)) for most in (9, 3, 2, 5))
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = chance.integers(1, 8, n, dtype=np.int32)
    counts = np.zeros((n, rows, heads), np.int32)
    positions = np.full((n, rows, heads, slots), -1, np.int32)
    for i, row, head in np.ndindex(n, rows, heads):
        count = int(chance.integers(1, min(slots, lengths[i]) + 1))
        places = chance.choice(lengths[i], count, replace=False)
        counts[i, row, head], positions[i, row, head, :count] = count, np.sort(places)
    number = st.integers(-2, 9) | st.sampled_from([LIMITS.min, LIMITS.max])
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.sampled_from([counts, positions, positions]))
        where.flat[draw(st.integers(0, where.size - 1))] = draw(number)
    return counts, positions, lengths


@given(shards(), st.integers(1, 40))
def test_the_same_record_is_named_as_by_looking_at_each_number(
    shard: tuple[np.ndarray, np.ndarray, np.ndarray], piece: int
) -> None:
    """Wherever a shard is cut into pieces."""
    with pytest.MonkeyPatch.context() as small:
        small.setattr(layout, "PIECE", piece)
        assert wrong_slots(*shard) == named(*shard)
