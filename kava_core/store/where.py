"""The place of a store, from what a person writes: a folder or a URL."""

from __future__ import annotations

from pathlib import Path

from kava_core.store.cache import Cache
from kava_core.store.place import Folder, Place
from kava_core.store.remote import Remote
from kava_core.store.url import StorePath, locate


def place_of(path: str | StorePath, cache: Cache | None = None) -> Place:
    """Where the store at `path` lies; what is on this machine is read in place, and never copied.

    cache: for a URL, where copies of its files are kept; that of the environment if None.
    """
    where = locate(path)
    if isinstance(where, Path):
        return Folder(where)
    return Remote(where, cache or Cache.default())
