"""A store that is being made: in a folder of this machine, or on its way to object storage.

What is sent goes shard by shard, while others are computed, and the manifest last. An object
appears whole or not at all, and a folder without a manifest is no store: whatever is cut off leaves
none. Once a shard is there, as it was sent, this machine keeps a note of it and no copy; killed and
run again, a run sends only what is not there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kava_core.artefacts import clear, ensure_folder, json_bytes, read_json, write_json
from kava_core.errors import KavaError
from kava_core.store.checksum import file_checksum
from kava_core.store.finalise import (
    SIDE_RECORD,
    check_all_there,
    finalise,
    finished_shards,
    merged_manifest,
    say_drift,
)
from kava_core.store.layout import MANIFEST_FILE, shard_name
from kava_core.store.manifest import Manifest
from kava_core.store.objects import Missing, Objects, State
from kava_core.store.push import NOTE, check_sent
from kava_core.store.spec import StoreSpec
from kava_core.store.url import Url, locate
from kava_core.store.where import link, load_manifest
from kava_core.store.write import side_path

SENDERS = 4  # threads
WAITING = 8  # finished shards that may wait for them: then nothing more is computed


class Work:
    """A store in `folder`, where shards are written; `result` is the folder to publish."""

    where: Url | None = None  # the store will lie there, if not in `result`

    def __init__(self, folder: Path) -> None:
        self.folder = ensure_folder(folder)
        self.result = folder

    @classmethod
    def of(cls, folder: Path, to: str | None) -> Work:
        """In `folder` / output; to: a URL below which the store is to lie, under the name of
        `folder`, which is another one for other settings or inputs."""
        if to is None:
            return cls(folder / "output")
        return Sending(folder, locate(f"{to.rstrip('/')}/{folder.name}"))

    def found(self) -> Manifest | None:
        """That of the whole store, if a run before has made it elsewhere already."""
        return None

    def finished(self) -> set[int]:
        """The shards that need no redoing."""
        return finished_shards(self.folder)

    def wrote(self, shard: int) -> None:
        """To be told of each finished shard."""

    def close(self) -> None:
        """To be called in the end, whatever has happened."""

    def finalise(
        self,
        spec: StoreSpec,
        *,
        shards: int,
        settings: dict[str, Any],
        fingerprints: dict[str, str],
    ) -> Manifest:
        """`store.finalise`, of all shards."""
        return finalise(
            self.folder, spec, shards=shards, settings=settings, fingerprints=fingerprints
        )


class Sending(Work):
    """A store that is sent to `url`; the folder to publish stands for it, as `link` makes it."""

    def __init__(self, work: Path, url: Path | Url) -> None:
        super().__init__(work / "output")
        if not isinstance(url, Url):
            raise ValueError(f"{url} is no URL")
        self.result, self.where = work / "link", url
        self._url = url
        self._notes = ensure_folder(work / "sent")
        self._objects = Objects(url)
        self._threads = ThreadPoolExecutor(SENDERS)
        self._pending: deque[Future[None]] = deque()

    def found(self) -> Manifest | None:
        """That of the store at the URL. Before there is one, a first note is put there, so that
        whoever may not write is told before anything is computed."""
        if MANIFEST_FILE in self._there():
            manifest = load_manifest(self._url)
            self._link()
            return manifest
        self._objects.write(self._url / NOTE, json_bytes({"unfinished": self._url.name}))
        return None

    def finished(self) -> set[int]:
        return finished_shards(self.folder, self._sent(self._there()))

    def wrote(self, shard: int) -> None:
        """Send it, in a thread; returns once not too many wait. KavaError of an earlier one."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= WAITING):
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(self._send, shard))

    def close(self) -> None:
        """What has begun ends; what waits is left for the next run."""
        self._threads.shutdown(cancel_futures=True)

    def finalise(
        self,
        spec: StoreSpec,
        *,
        shards: int,
        settings: dict[str, Any],
        fingerprints: dict[str, str],
    ) -> Manifest:
        while self._pending:
            self._pending.popleft().result()
        check_all_there(self.folder, shards, self._sent(self._there()))
        manifest = merged_manifest(
            self.folder, spec, shards=shards, settings=settings, fingerprints=fingerprints
        )
        say_drift(manifest)
        for name in manifest.files.keys() - set(manifest.shard_files()):
            check_sent(self._url / name, self._upload(name).size, manifest.files[name].bytes)
        self._objects.write(self._url / MANIFEST_FILE, json_bytes(manifest.to_json()))
        self._objects.remove(self._url / NOTE)
        self._link()
        return manifest

    def _link(self) -> None:
        link(self._url, self.result)

    def _there(self) -> dict[str, State]:
        try:
            return self._objects.states()
        except Missing:
            return {}

    def _sent(self, there: dict[str, State]) -> Collection[int]:
        """The shards that are there as they were sent, by what was noted here."""
        sent = set()
        for file in self._notes.iterdir():
            match = SIDE_RECORD.fullmatch(file.name)
            if match is None:
                continue
            shard = int(match[1])
            with suppress(KavaError, KeyError, TypeError):
                note, side = read_json(file), read_json(side_path(self.folder, shard))
                state = State(side["bytes"], note["tag"])
                if side["blake3"] == note["blake3"] and there.get(shard_name(shard)) == state:
                    sent.add(shard)
        return sent

    def _send(self, shard: int) -> None:
        name, side = shard_name(shard), side_path(self.folder, shard)
        note, file = self._notes / side.name, self.folder / name
        if not file.exists() and note.exists():
            return  # it is there already
        found = read_json(side)
        if file_checksum(file) != found["blake3"]:
            clear(side)
            raise KavaError(
                f"{file} is not what was written: its disk has changed it. Run this again: it is "
                "made again; and check the disk."
            )
        state = self._upload(name)
        check_sent(self._url / name, state.size, found["bytes"])
        write_json(note, {"blake3": found["blake3"], "tag": state.tag})
        file.unlink()

    def _upload(self, name: str) -> State:
        return self._objects.upload(self._url / name, str(self.folder / name))
