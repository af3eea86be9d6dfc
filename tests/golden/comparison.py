"""Golden values: how they are made short, and what makes two of them differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kava_core.artefacts import canonical_json

TOLERANCE = 1e-3  # relative: another processor adds up in another order, another loss does not
_SIGNATURE = {"size", "norm", "along"}


def signature(numbers: Any) -> dict[str, Any]:
    """An array in four numbers, which no change of direction or size leaves as they are.

    Its size, its norm, and what it is along two fixed directions (of ±1, so that each is of the
    norm's own order of magnitude).
    """
    flat = np.asarray(numbers, dtype=np.float64).reshape(-1)
    directions = np.random.default_rng(0).choice([-1.0, 1.0], size=(2, flat.size))
    return {
        "size": int(flat.size),
        "norm": float(np.linalg.norm(flat)),
        "along": [float(x) for x in directions @ flat],
    }


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def without(value: Any, words: tuple[str, ...]) -> Any:
    """A JSON value without the keys that hold one of `words`."""
    if isinstance(value, Mapping):
        return {
            key: without(inner, words)
            for key, inner in value.items()
            if not any(word in key for word in words)
        }
    return [without(inner, words) for inner in value] if isinstance(value, list) else value


def differences(golden: Any, found: Any, path: str = "") -> Iterator[str]:
    """Every place where two JSON values differ by more than rounding."""
    place = path or "values"
    if isinstance(golden, dict) and isinstance(found, dict):
        if golden.keys() == found.keys() == _SIGNATURE:
            yield from _of_signatures(golden, found, place)
            return
        for key in sorted(golden.keys() | found.keys()):
            inner = f"{path}.{key}" if path else key
            if key not in found:
                yield f"{inner} is gone"
            elif key not in golden:
                yield f"{inner} is new"
            else:
                yield from differences(golden[key], found[key], inner)
    elif isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            yield f"{place} has {len(found)} items, not {len(golden)}"
            return
        for i, (old, new) in enumerate(zip(golden, found, strict=True)):
            yield from differences(old, new, f"{place}[{i}]")
    elif not _near(golden, found):
        yield f"{place} is {found!r:.80}, not {golden!r:.80}"


def _of_signatures(golden: dict[str, Any], found: dict[str, Any], place: str) -> Iterator[str]:
    allowed = TOLERANCE * max(golden["norm"], 1e-6)
    pairs = zip([golden["norm"], *golden["along"]], [found["norm"], *found["along"]], strict=True)
    if golden["size"] != found["size"]:
        yield f"{place} has {found['size']} numbers, not {golden['size']}"
    elif not all(abs(old - new) <= allowed for old, new in pairs):
        yield f"{place} has norm {found['norm']:.6g} along {found['along']}, not as {golden}"


def _near(golden: Any, found: Any) -> bool:
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (golden, found)]
    if all(numbers) and any(isinstance(x, float) for x in (golden, found)):
        return math.isclose(golden, found, rel_tol=TOLERANCE, abs_tol=1e-6)
    return type(golden) is type(found) and bool(golden == found)
