"""Writing a store to object storage: shard by shard, and the manifest last.

An object appears whole or not at all, and a folder without a manifest is no store: whatever is cut
off leaves none. What is being put there is noted in `upload.json` until it is done, so that a
push that was cut off goes on, and no other store's files are ever taken for its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.store.layout import MANIFEST_FILE
from kava_core.store.manifest import Manifest, check_content
from kava_core.store.objects import Missing, Objects
from kava_core.store.place import Folder
from kava_core.store.remote import READERS
from kava_core.store.url import Url, locate
from kava_core.store.where import place_of

NOTE = "upload.json"
LARGEST_NOTE = 1 << 16


def push(path: Path, url: str | Url, advance: Callable[[str], None] = lambda _: None) -> Manifest:
    """Put the store in folder `path` at `url`, unless it is there already.

    advance: called with the name of each file that is there. Every checksum is checked before a
    file is sent. KavaError for a damaged store, an address that cannot be written to, and one
    where another store or anything else lies; nothing that is there is ever replaced.
    """
    where = locate(url)
    if not isinstance(where, Url) or where.scheme not in ("s3", "gs"):
        raise KavaError(
            f"{where} cannot be pushed to: expected s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. For "
            "the Hugging Face Hub use `kava store export` and `hf upload`; copy a folder with `cp`."
        )
    place = place_of(path)
    if not isinstance(place, Folder):
        raise KavaError(
            f"{path} has no files to push: it stands for {place.path}. Let others link to that, or "
            "name a folder that has the store itself."
        )
    manifest, objects = place.load_manifest(), Objects(where)
    there = _what_is_there(objects, manifest)
    if MANIFEST_FILE in there:
        return manifest
    missing = [name for name, info in manifest.files.items() if there.get(name) != info.bytes]
    for name in manifest.files.keys() - set(missing):
        advance(name)

    def send(name: str) -> str:
        check_content(path / name, manifest)
        objects.upload(where / name, str(path / name))
        return name

    with ThreadPoolExecutor(READERS) as threads:
        for name in threads.map(send, missing):
            advance(name)
    _check_all_there(objects, manifest)
    objects.write(where / MANIFEST_FILE, (path / MANIFEST_FILE).read_bytes())
    objects.remove(where / NOTE)
    return manifest


def _what_is_there(objects: Objects, manifest: Manifest) -> dict[str, int]:
    """Lengths of the files that an earlier push of the same store has left."""
    try:
        there = objects.lengths() or {}
    except Missing:
        there = {}
    if MANIFEST_FILE in there:
        _check_same(objects, MANIFEST_FILE, manifest)
    elif NOTE in there:
        _check_same(objects, NOTE, manifest)
    elif there:
        raise KavaError(
            f"{objects.url} has other files in it ({sorted(there)[0]:.100}). Choose a new folder."
        )
    else:
        note = json.dumps({"digest": manifest.digest})
        objects.write(objects.url / NOTE, note.encode())
    return there


def _check_same(objects: Objects, name: str, manifest: Manifest) -> None:
    content = objects.read(objects.url / name, LARGEST_NOTE * (1 + len(manifest.files)))
    try:
        digest = json.loads(content).get("digest")
    except (ValueError, AttributeError, RecursionError):
        digest = None
    if digest != manifest.digest:
        raise KavaError(
            f"{objects.url} holds another store, or a part of one ({name} says so), and nothing is "
            "replaced. Choose a new folder, or delete that one."
        )


def _check_all_there(objects: Objects, manifest: Manifest) -> None:
    there = objects.lengths() or {}
    for name, info in manifest.files.items():
        check_sent(objects.url / name, there.get(name, 0), info.bytes)


def check_sent(url: Url, size: int, expected: int) -> None:
    """KavaError if an object has not the bytes that were sent."""
    if size != expected:
        raise KavaError(
            f"{url} has {size} bytes after it was sent, expected {expected}. See that nobody else "
            "writes there, and run this again."
        )
