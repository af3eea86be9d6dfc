"""A package's face, handed on when it is asked for: `import kava_core` does not wait for torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazily(package: str, face: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that imports what `face` names (name → module) on first use."""

    def get(name: str) -> Any:
        if name not in face:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(face[name]), name)

    return get
