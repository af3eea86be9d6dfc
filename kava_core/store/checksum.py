"""The checksum of everything in a store: BLAKE3, 256 bits, as 64 hexadecimal digits.

One thread hashes about 7 GB/s with it, four times what SHA-256 does in hardware: a writer's and a
reader's checksums cost less than moving the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from kava_core.errors import KavaError

CHUNK = 1 << 18  # read this much at a time: it stays in the processor's cache until it is hashed


def checksum(pieces: Iterable[bytes | memoryview]) -> str:
    """Of the pieces one after the other."""
    digest = blake3()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """Of a file's bytes; KavaError if it cannot be read."""
    digest = blake3()
    memory = memoryview(bytearray(CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memory):
                digest.update(memory[:count])
    except OSError as error:
        raise KavaError(
            f"{path} cannot be read ({error.strerror}). Check the disk and who may read the file."
        ) from None
    return digest.hexdigest()
