"""When a study asked test problems: a log of which no line is ever taken out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kava_core.artefacts import atomic_path, read_regular
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.findings.study import ASKED, Asking
from kava_core.settings import Study
from kava_core.studies.plan import keys_of_test


class AskedLog:
    """asked.jsonl in the folder of a study; askings: its lines, in their order.

    A last line that is torn, as a full disk leaves one, is left out, with a warning; KavaError for
    another that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ASKED
        self.askings: list[Asking] = []
        self._lines: list[bytes] = []  # as they stand: later versions may write more into them
        lines = read_regular(self.path).splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                asking = Asking.model_validate_json(line)
            except ValueError:
                if number == len(lines):
                    warn(f"{self.path}: the last line is torn, and is left out")
                    break
                raise KavaError(
                    f"{self.path}, line {number}: expected an asking as JSON, found {line!r:.80}. "
                    "Mend the line, or delete it: the study then does not know of that asking."
                ) from None
            self.askings.append(asking)
            self._lines.append(line)

    def add(self, asking: Asking) -> None:
        """Write a line more: all of them are on the disk then, or those that were there before."""
        lines = [*self._lines, asking.model_dump_json().encode()]
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        self.askings.append(asking)
        self._lines = lines


def asked_otherwise(path: Path, name: str, study: Study, askings: Sequence[Asking]) -> list[Asking]:
    """Those of systems that the study called `name` of the file at `path` would now make or ask
    with other settings, whomever it names, with whichever seeds, and whatever split it asks.

    Students that are in the pipeline no longer have no settings to compare, and are passed over.
    """
    if not askings:
        return []
    seeds = [asking.seed for asking in askings if asking.seed is not None]
    keys = keys_of_test(path, name, study, [asking.system for asking in askings], seeds)
    return [
        asking
        for asking in askings
        if asking.system in keys and asking.key not in keys[asking.system]
    ]
