"""Records that cannot be kept: found in every shard, and by the settings fatal or left out.

What a run leaves out is noted for each shard beside its unfinished work, and said by the store in
`settings.quarantined` of its manifest: reason → ids. A store from which nothing was left out says
nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kava_core.artefacts import canonical_json, clear, ensure_folder, read_json, write_json
from kava_core.errors import KavaError
from kava_core.record import Record
from kava_core.store.layout import FLOAT_DTYPES
from kava_core.store.summary import QUARANTINED

# Bytes of the manifest that names may take: what leaves out more is no matter of single records.
LARGEST = 1 << 19
LEAVE_OUT = "or leave such records out: `generate.on_error: quarantine`"


def not_finite(
    numbers: Mapping[str, tuple[Tensor, str]], spans: Mapping[str, Tensor]
) -> dict[int, str]:
    """Which of N records cannot be kept: its row → why.

    numbers: name → what there is of it [A, …], and the encoding it is kept in. spans: name → [N+1],
    record n owns rows spans[n] : spans[n+1] of it.
    """
    found: dict[int, str] = {}
    for name, (x, encoding) in numbers.items():
        kept = x.to(FLOAT_DTYPES.get(encoding, x.dtype))
        bad = (~kept.isfinite()).flatten(1).any(1).nonzero().flatten().cpu()
        of = spans[name].cpu()
        for row in (torch.searchsorted(of, bad, right=True) - 1).unique().tolist():
            own = x[int(of[row]) : int(of[row + 1])]
            fits = bool(own.isfinite().all())
            why = f"{name} too large for {encoding}" if fits else f"NaN or infinity in {name}"
            found.setdefault(row, why)
    return dict(sorted(found.items()))


def refuse(what: str, records: Sequence[Record], found: Mapping[int, str], remedy: str) -> None:
    """KavaError that names the first of the records that cannot be kept, and counts them all."""
    if not found:
        return
    first, reason = next(iter(found.items()))
    counted = f"{len(found)} of the {len(records)} records of {what} cannot be kept"
    raise KavaError(f"record {records[first].id!r}: {reason} ({counted}). {remedy}, {LEAVE_OUT}.")


@dataclass(frozen=True)
class Quarantine:
    """The notes of what was left out of each shard, in a folder of unfinished work."""

    folder: Path

    def note(self, shard: int, left_out: Mapping[str, str]) -> None:
        """Note the ids that shard lacks, with reasons, before the shard is written."""
        if left_out:
            ensure_folder(self.folder)
            write_json(self._file(shard), dict(left_out))
        else:
            clear(self._file(shard))

    def settled(self, done: set[int], *, allowed: bool) -> set[int]:
        """The shards of `done` that stay as they are; not those that left something out, where
        nothing may be."""
        return {
            shard for shard in done if not (note := self._read(shard)) or (allowed and note.whole)
        }

    def settings(self, shards: int) -> dict[str, Any]:
        """What a manifest says of all that was left out: nothing if there was nothing.

        KavaError if it is too much to be a matter of single records.
        """
        reasons: dict[str, list[str]] = {}
        for shard in range(shards):
            note = self._read(shard)
            for name, reason in note.left_out.items() if note else ():
                reasons.setdefault(reason, []).append(name)
        if len(canonical_json(reasons).encode()) > LARGEST:
            count = sum(map(len, reasons.values()))
            raise KavaError(
                f"generate.on_error: quarantine would leave out {count} records ({tell(reasons)}), "
                "more than a store has room to name. Mend the teacher, or drop them in `prepare`."
            )
        return {QUARANTINED: reasons} if reasons else {}

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def _read(self, shard: int) -> _Note | None:
        """None if there is none; one that is damaged is no whole one."""
        if not self._file(shard).exists():
            return None
        try:
            plain = read_json(self._file(shard))
        except KavaError:
            return _Note({}, whole=False)
        whole = isinstance(plain, dict)
        return _Note(plain if whole else {}, whole)


@dataclass(frozen=True)
class _Note:
    left_out: dict[str, str]
    whole: bool


def tell(reasons: Mapping[str, Sequence[str]]) -> str:
    """How many records were left out for which reason, for people."""
    return "; ".join(f"{len(names)} for {reason}" for reason, names in reasons.items())
