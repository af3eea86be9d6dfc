"""What every node must share with the one that starts the work: a folder, and the software."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kava_core.errors import KavaError

MARK = ".seen-by-all.tmp"
SEEN_WITHIN = 10.0  # seconds: a network filesystem may show a new file late


@dataclass(frozen=True)
class Host:
    """A node as a process on it found it; trouble: why it has not this package; gpu: the kind that
    the process has, "" without one."""

    name: str
    software: dict[str, str]
    sees: bool = False
    trouble: str = ""
    gpu: str = ""


def looker() -> Callable[[str, str, float], tuple[str, dict[str, str], bool, str]]:
    """What a process looks for on its node: (mark, token, seconds) → the fields of `Host`.

    A function that Ray sends whole, not by its name: on a node without the package, or with another
    version of it, it is what says so.
    """

    def look(mark: str, token: str, seconds: float) -> tuple[str, dict[str, str], bool, str]:
        import platform
        import time
        from contextlib import suppress
        from importlib.metadata import version
        from pathlib import Path

        software, trouble = {}, ""
        try:
            from kava_core import __version__
            from kava_core.versions import VERSIONS

            software["kava"] = __version__
            software |= {f"stage {name}": str(number) for name, number in VERSIONS.items()}
            for name in ("torch", "transformers"):
                # Builds for CPUs and GPUs are of one version.
                software[name] = version(name).partition("+")[0]
        except ImportError as error:
            trouble = str(error)
        end, sees = time.monotonic() + seconds, False
        while not sees:
            with suppress(OSError):
                sees = Path(mark).read_text(encoding="utf-8") == token
            if sees or time.monotonic() > end:
                break
            time.sleep(0.1)
        return platform.node(), software, sees, trouble

    return look


@dataclass(frozen=True)
class Common:
    """What a worker must find: a mark in the shared folder, and the software that is here."""

    folder: Path
    mark: Path
    token: str
    host: str
    software: Mapping[str, str]

    def check(self, host: Host) -> None:
        """KavaError if the host has not the folder, or other software."""
        if host.trouble:
            raise KavaError(
                f"expected this package on every node, and {host.name} cannot import it "
                f"({host.trouble}). Install the same version there as on {self.host}."
            )
        if not host.sees:
            raise KavaError(
                f"expected every node to see the folder {self.folder}, and {host.name} does not. "
                "Put the data folder on a filesystem that all nodes share, at the same path."
            )
        for name, mine in self.software.items():
            if (found := host.software.get(name, "none")) != mine:
                raise KavaError(
                    f"expected {name} {mine} on every node, as on {self.host}, and {host.name} has "
                    f"{found}. Install the same versions everywhere: results depend on them."
                )


@contextmanager
def shared(folder: Path) -> Iterator[Common]:
    """What all must find, while in this context. folder: one that is there, of this run's work."""
    token = secrets.token_hex(8)
    mark = folder / MARK
    mark.write_text(token, encoding="utf-8")
    try:
        name, software, _, _ = looker()(str(mark), token, 0)
        yield Common(folder, mark, token, name, software)
    finally:
        mark.unlink(missing_ok=True)
