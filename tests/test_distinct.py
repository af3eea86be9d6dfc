"""Names are told apart as a set tells them apart, and few bytes are held of each."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core import distinct
from kava_core.distinct import Distinct


def reference(names: list[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


@given(st.lists(st.text(alphabet="abc", max_size=3)))
def test_the_first_that_comes_again_is_found(names: list[str]) -> None:
    known = Distinct()
    known.add(names[:2])
    known.add(names[2:])
    assert known.repeated(iter(names)) == reference(names)


def test_equal_hashes_are_not_equal_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "hash", len, raising=False)
    known, names = Distinct(), ["a", "b", "ab", "ba", "b", "a"]
    known.add(names[:4])
    assert known.repeated(names[:4]) is None
    known.add(names[4:])
    assert known.repeated(names) == "b"


def test_names_are_not_looked_at_again_where_all_differ() -> None:
    known = Distinct()
    known.add(map(str, range(1000)))
    assert known.repeated(pytest.fail(name) for name in ["0"]) is None


def test_of_a_name_eight_bytes_are_held() -> None:
    known = Distinct()
    tracemalloc.start()
    known.add(f"a name of some length {i}" for i in range(10_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 12 * 10_000
