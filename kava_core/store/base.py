"""What stores of both kinds have: a place, a manifest, an index, and files that are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.store.cache import Cache
from kava_core.store.codec import EncodedTensor, spread
from kava_core.store.index import Index
from kava_core.store.layout import (
    CALIBRATION_FILE,
    Codec,
    Geometry,
    TensorSpec,
    calibration_layout,
    shard_name,
)
from kava_core.store.manifest import REMAKE, Expectation, Manifest
from kava_core.store.place import Place
from kava_core.store.statistics import Sums
from kava_core.store.tensor_file import check_header, read_header
from kava_core.store.url import StorePath
from kava_core.store.where import place_of

PARTS = ("scale", "zero")

T = TypeVar("T")


class Store(ABC):
    """What both kinds have: folder, manifest, index."""

    kind: str

    def __init__(self, place: Place, manifest: Manifest, *, checksums: bool) -> None:
        self.place = place
        self.manifest = manifest
        self.checksums = checksums
        self.index = Index(place, manifest)
        self._calibration: dict[str, Tensor] | None = None

    @classmethod
    def open(
        cls,
        path: str | StorePath,
        expect: Expectation | None = None,
        *,
        checksums: bool = True,
        cache: Cache | None = None,
    ) -> Self:
        """Open the store in folder `path`, or at a URL (s3://, gs://, hf://, https://);
        milliseconds, or a few requests, whatever its size.

        expect: what this run needs it to be. checksums: check each file's content the first time it
        is read (once per process); False trusts the disk, but for the index. cache: where copies
        of a remote store's files are kept; that of the environment (`Cache.default`) if None.

        KavaError for another kind, a newer format, a store that is not what is expected, a damaged
        manifest, and a file that is missing, of another length, or outside the folder; for a URL
        that cannot be read.
        """
        place = place_of(path, cache)
        manifest = place.load_manifest(cls.kind)
        if expect is not None:
            expect.check(manifest, place.path)
        return cls(place, manifest, checksums=checksums)

    @property
    def path(self) -> StorePath:
        """The folder or the URL; a URL shows no secret."""
        return self.place.path

    def __len__(self) -> int:
        return self.manifest.records

    @property
    def geometry(self) -> Geometry:
        return self.manifest.geometry

    @property
    def codec(self) -> Codec:
        return self.manifest.codec

    @property
    def layer_map(self) -> dict[int, int]:
        """Teacher layer → row of keys, values and slots that stands for it."""
        return self.geometry.layer_map

    @abstractmethod
    def check_shard(self, shard: int) -> None:
        """KavaError if a shard is damaged or disagrees with the manifest or the index."""

    @abstractmethod
    def sums(self, shard: int) -> dict[str, Sums]:
        """Sums over a shard's keys, values and endpoint states, as they are read, row by row.

        Over valid slots, or tokens.
        """

    def check_calibration(self) -> None:
        """KavaError if the calibration file is damaged."""
        self._shared()

    def check_content(self, name: str) -> None:
        """KavaError unless a file is there, whole, and has the content it should."""
        self.place.check_content(self.manifest, name, checksums=self.checksums)

    def check_header(self, shard: int) -> None:
        """KavaError unless a shard begins as the manifest and the index say; reads little more."""
        name = shard_name(shard)
        with self.place.header(self.manifest, name) as begin:
            size = self.manifest.files[name].bytes
            check_header(begin, size, self._layout(shard), self.path / name)

    def fetch_ahead(self, now: Sequence[int], then: Sequence[int] = ()) -> None:
        """Begin to fetch the shards `now`, which are read at the same time, and those that are read
        `then`, as many as the cache has room for; nothing where they are on this machine.

        KavaError if the cache cannot hold the shards `now` together.
        """
        names = [[shard_name(shard) for shard in shards] for shards in (now, then)]
        self.place.fetch_ahead(self.manifest, *names)

    @abstractmethod
    def _layout(self, shard: int) -> dict[str, TensorSpec]:
        """The tensors of a shard, by the manifest and the index."""

    def _opened(
        self, name: str, layout: dict[str, TensorSpec], opener: Callable[[Path], T]
    ) -> tuple[T, dict[str, tuple[int, int]]]:
        """What `opener` makes of a checked file, and where the tensors in it are."""
        shown = self.path / name

        def read(file: Path) -> T:
            try:
                return opener(file)
            except (SafetensorError, OSError) as error:
                raise KavaError(f"{shown} cannot be read ({error}). {REMAKE}") from None

        return self.place.opened(
            self.manifest,
            name,
            read,
            lambda file: read_header(file, layout, shown),
            checksums=self.checksums,
        )

    def _tensors(self, name: str, layout: dict[str, TensorSpec]) -> dict[str, Tensor]:
        """All tensors of a file, memory-mapped."""

        def read(file: Path) -> dict[str, Tensor]:
            with safe_open(file, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in layout}

        return self._opened(name, layout, read)[0]

    def _shared(self) -> dict[str, Tensor]:
        """Scale and zero of the calibration file; empty if every token has its own."""
        if self._calibration is None:
            layout = calibration_layout(self.geometry, self.codec)
            self._calibration = self._tensors(CALIBRATION_FILE, layout) if layout else {}
        return self._calibration

    def _encoded(self, name: str, tensors: dict[str, Tensor], length: int) -> EncodedTensor:
        encoding = getattr(self.codec, name)
        codes, scale, zero = tensors[name], tensors.get(f"{name}_scale"), None
        shared = name in self.codec.calibrated
        if shared:
            scale, zero = (spread(self._shared()[f"{name}_{p}"], codes.ndim) for p in PARTS)
        elif scale is not None:
            scale, zero = scale[..., None], tensors[f"{name}_zero"][..., None]
        return EncodedTensor(codes, encoding, length, scale, zero, shared)
