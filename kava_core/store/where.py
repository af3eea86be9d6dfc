"""Where a store lies, from what a person writes: a folder, a URL, or a folder that names a URL."""

from __future__ import annotations

from pathlib import Path

from kava_core.artefacts import ensure_folder, read_json, write_json
from kava_core.errors import KavaError
from kava_core.store.cache import Cache
from kava_core.store.layout import MANIFEST_FILE
from kava_core.store.manifest import Manifest
from kava_core.store.place import Folder, Place
from kava_core.store.remote import Remote
from kava_core.store.url import StorePath, Url, locate

# The one file of a folder that stands for a store elsewhere: its URL and its manifest's digest.
LINK = "remote.json"
LARGEST_LINK = 1 << 16


def place_of(path: str | StorePath, cache: Cache | None = None) -> Place:
    """Where the store at `path` lies; what is on this machine is read in place, and never copied.

    cache: for a URL, where copies of its files are kept; that of the environment if None.
    """
    where = locate(path)
    if isinstance(where, Url):
        return Remote(where, cache or Cache.default())
    if (where / LINK).is_file() and not (where / MANIFEST_FILE).exists():
        url, digest = _read_link(where / LINK)
        return Remote(url, cache or Cache.default(), digest)
    return Folder(where)


def load_manifest(path: str | StorePath, kind: str | None = None) -> Manifest:
    """The manifest of the store at `path`, as `TargetsStore.open` reads it."""
    return place_of(path).load_manifest(kind)


def link(url: str | Url, folder: Path) -> Manifest:
    """Let `folder` stand for the store at `url`, as it is now: whoever opens the folder reads that.

    KavaError if there is no store, if the folder has other files in it, and for a URL that holds a
    secret, which would be written down.
    """
    where = locate(url)
    if not isinstance(where, Url):
        raise KavaError(f"{where} is a folder of this machine: use it as it is.")
    if str(where) != where.whole:
        raise KavaError(
            f"{where} was given with a name, a password or a query, which would be written to "
            f"{folder / LINK}. Leave them out: credentials belong into the environment."
        )
    if folder.is_dir() and any(each.name != LINK for each in folder.iterdir()):
        raise KavaError(f"{folder} has files in it. Choose a new folder, or empty it.")
    manifest = place_of(where).load_manifest()
    ensure_folder(folder)
    write_json(folder / LINK, {"url": where.whole, "digest": manifest.digest})
    return manifest


def _read_link(file: Path) -> tuple[Url, str]:
    found = read_json(file, LARGEST_LINK)
    url, digest = (found.get(key) if isinstance(found, dict) else None for key in ("url", "digest"))
    where = locate(url) if isinstance(url, str) else None
    if not isinstance(where, Url) or not isinstance(digest, str):
        raise KavaError(
            f"{file} must name the URL of a store and its digest. Make it again with `kava store "
            "link`."
        )
    return where, digest
