"""Whether names are all different, though there may be millions of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


class Distinct:
    """Names, of each of which eight bytes are held."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, names: Iterable[str]) -> None:
        self._hashes.extend(map(hash, names))

    def repeated(self, names: Iterable[str]) -> str | None:
        """The first name that was added for the second time; None if all differ.

        names: what was added, once more. It is looked at where two hashes are equal alone.
        """
        hashes, counts = np.unique(np.asarray(self._hashes), return_counts=True)
        suspect = set(hashes[counts > 1].tolist())
        seen: set[str] = set()
        for name in names if suspect else ():
            if hash(name) in suspect:
                if name in seen:
                    return name
                seen.add(name)
        return None
