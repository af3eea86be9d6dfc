"""Values in messages: short, and nothing that steers a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LONGEST_WORD, LONGEST_MESSAGE = 60, 450  # characters


def shorten(text: str, longest: int = LONGEST_WORD) -> str:
    """The text, its middle left out where it is longer than `longest`, what steers a terminal
    written as it would be in Python."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def shown(value: Any, longest: int = LONGEST_WORD) -> str:
    """`repr(value)`, not longer than `longest`, and worked out no further than is shown."""
    text = "".join(_pieces(value, longest))
    return text if len(text) <= longest else f"{text[: longest - 2]} …"


def _pieces(value: Any, longest: int) -> Iterator[str]:
    """The text of a value in pieces; stops soon after `longest` characters."""
    if not isinstance(value, dict | list | tuple):
        yield repr(value[: longest + 1] if isinstance(value, str | bytes) else value)
        return
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    yield opening
    used = 1
    entries = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    for i, (key, each) in enumerate(entries):
        if used > longest:
            return
        before = (", " if i else "") + (f"{shown(key, longest)}: " if opening == "{" else "")
        inside = shown(each, longest - used)
        used += len(before) + len(inside)
        yield before + inside
    yield closing
