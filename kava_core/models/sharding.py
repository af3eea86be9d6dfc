"""Weights in several files are named like the same weights in one.

How a model is cut into files depends on a limit that says nothing of what it computes. What is
hashed is the file that safetensors would write of all its tensors: a header of 8 bytes of length
and compact JSON, padded with spaces to a multiple of 8, then the tensors, larger data types first,
by name among equals.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError

# As safetensors orders them, the first one last in a file.
DTYPES = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
    *("F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64"),
    *("F64", "I64", "U64"),
)
CHUNK = 1 << 24
LARGEST_HEADER = 1 << 24  # bytes: a hundred thousand tensors take less
MOST_VALUES = 1 << 20  # such a header has as many


def joined_digest(files: list[Path]) -> str:
    """SHA-256 (hex) of the one file that holds the tensors of `files`, as transformers writes it.

    KavaError for a file that is none of safetensors, or a tensor that stands in two of them.
    """
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in files:
        start, tensors = read_header(file)
        if twice := tensors.keys() & places.keys():
            name = min(twice)
            raise KavaError(
                f"{file} holds the tensor {name}, and so does {places[name][0].name}. Download or "
                "save the model again."
            )
        places |= {name: (file, start, about) for name, about in tensors.items()}
    order = sorted(places, key=lambda name: (-DTYPES.index(places[name][2]["dtype"]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        about = places[name][2]
        first, last = about["data_offsets"]
        offsets = [end, end + last - first]
        header[name] = {
            "dtype": about["dtype"],
            "shape": about["shape"],
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for name in order:
        file, start, about = places[name]
        first, last = about["data_offsets"]
        with file.open("rb") as source:
            source.seek(start + first)
            while first < last:
                piece = source.read(min(CHUNK, last - first))
                if not piece:
                    raise _broken(file)
                digest.update(piece)
                first += len(piece)
    return digest.hexdigest()


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where a file's tensors begin, and of each its `dtype`, `shape` and `data_offsets`.

    KavaError if it is no file of safetensors, or longer or shorter than its tensors.
    """
    with file.open("rb") as source:
        length, size = int.from_bytes(source.read(8), "little"), file.stat().st_size
        if length > min(LARGEST_HEADER, size):
            raise _broken(file)
        content = source.read(length)
        if values_at_most(content) > MOST_VALUES:
            raise _broken(file)
        try:
            tensors: dict[str, dict[str, Any]] = json.loads(content)
            tensors.pop("__metadata__", None)
            known = all(
                about["dtype"] in DTYPES
                and len(about["data_offsets"]) == 2
                and all(type(size) is int and size >= 0 for size in about["shape"])
                for about in tensors.values()
            )
            ends = (about["data_offsets"][1] for about in tensors.values())
            whole = 8 + length + max(ends, default=0) == size
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
            raise _broken(file) from None
    if not (known and whole):
        raise _broken(file)
    return 8 + length, tensors


def values_at_most(content: bytes) -> int:
    """How many values JSON has at the most: each takes a hundred bytes of memory once it is
    read."""
    return sum(map(content.count, (b",", b"[", b"{")))


def _broken(file: Path) -> KavaError:
    return KavaError(
        f"{file} cannot be read: it is no whole file of safetensors. Download or save the model "
        "again."
    )
