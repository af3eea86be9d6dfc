"""safetensors files, byte by byte: written while their checksum is taken, read by place.

The library could write the file, but only then could it be hashed; doing both at once keeps a
shard with its checksum nearly as quick to write as one without. And the library reads whole
tensors, where a batch needs single rows of them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kava_core.artefacts import disk_errors, sync
from kava_core.errors import KavaError
from kava_core.store.layout import TensorSpec, describe
from kava_core.store.manifest_checks import REMAKE
from kava_core.store.url import StorePath

MAX_HEADER = 1 << 20
ALIGNMENT = 8
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def serialise(tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece: header, then tensors, none copied.

    Wider dtypes come first, so that every tensor starts at a multiple of its item size.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries, end = {}, 0
    for name, x in ordered:
        entries[name] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [end, end + x.nbytes],
        }
        end += x.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    data = [x.contiguous().view(-1).view(torch.uint8).numpy().data for _, x in ordered]
    return [struct.pack("<Q", len(header)) + header, *data]


def write_pieces(path: Path, pieces: list[bytes | memoryview]) -> None:
    """Write the pieces one after the other; only `flush` puts them on the disk."""
    parts = [memoryview(piece) for piece in pieces]
    size = sum(part.nbytes for part in parts)
    with disk_errors(path, size), path.open("wb", buffering=0) as file:
        for part in parts:
            rest = part
            while rest:
                rest = rest[file.write(rest) :]


def flush(path: Path) -> None:
    """Wait until the file, or the names in a folder, are on the disk."""
    with disk_errors(path):
        sync(path)


def read_header(
    file: Path, layout: dict[str, TensorSpec], path: StorePath
) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends (bytes from the file's start).

    path: as messages name it. KavaError unless the file holds exactly the tensors of `layout`, and
    no byte more or less.
    """
    try:
        with file.open("rb") as opened:
            return check_header(opened, os.fstat(opened.fileno()).st_size, layout, path)
    except FileNotFoundError:
        raise KavaError(f"{path} is missing, but the manifest lists it. {REMAKE}") from None
    except OSError as error:
        raise _unexpected(path, error) from None


def check_header(
    opened: BinaryIO, size: int, layout: dict[str, TensorSpec], file: StorePath
) -> dict[str, tuple[int, int]]:
    """`read_header` of what is opened: the beginning, at least, of a file of `size` bytes."""
    try:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > min(size, MAX_HEADER):
            raise ValueError("its header is too long")
        header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found, spans = {}, {}
        for name, entry in header.items():
            shape, (begin, stop) = entry["shape"], entry["data_offsets"]
            if not all(type(number) is int for number in (*shape, begin, stop)):
                raise ValueError(f"shape or place of {name} is not of integers")
            found[name] = TensorSpec(DTYPES[entry["dtype"]], tuple(shape))
            spans[name] = (begin, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise _unexpected(file, error) from None
    if found != layout:
        name = next(n for n in sorted({*found, *layout}) if found.get(n) != layout.get(n))
        has = describe(found[name]) if name in found else "none"
        needs = describe(layout[name]) if name in layout else "none"
        raise KavaError(
            f"{file}: tensor {name} is {has}, the manifest and the index say {needs}. {REMAKE}"
        )
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        spec = layout[name]
        if begin != end or stop - begin != spec.dtype.itemsize * math.prod(spec.shape):
            raise KavaError(f"{file}: tensor {name} has a wrong place or length. {REMAKE}")
        end = stop
    if 8 + length + end != size:
        raise KavaError(f"{file} has {size} bytes, its header says {8 + length + end}. {REMAKE}")
    return {name: (8 + length + begin, 8 + length + stop) for name, (begin, stop) in spans.items()}


def _unexpected(file: StorePath, error: Exception) -> KavaError:
    return KavaError(f"{file} is not a safetensors file as expected ({error}). {REMAKE}")
