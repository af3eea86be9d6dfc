"""A source is its own schema: what settings may say about it are its fields."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from kava_core.errors import KavaError
from kava_core.problems.sources import SOURCES, GeneratedSource, RowSource, Source
from kava_core.problems.sources.table import Table


@pytest.mark.parametrize("kind", SOURCES.values())
def test_every_source_is_a_frozen_dataclass_whose_types_can_be_read(kind: type[Source]) -> None:
    assert is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    hints = get_type_hints(kind)
    assert all(field.name in hints for field in fields(kind))
    assert SOURCES[kind.name] is kind
    assert issubclass(kind, RowSource | GeneratedSource)


def test_the_registry_needs_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "pyarrow", "datasets", "sympy")
    script = (
        "import sys; from kava_core.problems.sources import SOURCES; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"question": " "}, "`question` to name a column, found ' '"),
        ({"topic": ""}, "`topic` to name a column, found ''"),
        ({"steps": "s", "separator": ""}, "a text as `separator`"),
        ({"separator": ";"}, "`separator` only beside a column of `steps`"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(KavaError, match=words):
        Table(**{"question": "q", "answer": "a", **wrong})
