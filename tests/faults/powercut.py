"""What would be on the disk were the power cut: a stage's calls recorded, what was not synced gone.

`record` makes a process note, at each of its calls that sync, rename or delete, what would be there
after a power cut in that moment, under two kinds of file system:

- `strict`: a name is on the disk once its folder was synced, a file's content once the file was.
- `journal`: names are on the disk as soon as they are given, content is not, as where metadata has
  a journal and data is written late. Such a file is there, with its length, and holds zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["strict", "journal"]
KINDS: tuple[Kind, ...] = ("strict", "journal")
# path below the home → "/" for a folder, otherwise the name of its content among the blobs
Image = dict[str, str]
FOLDER, ZEROS = "/", "zeros:"
IGNORED = ".log"  # what a stage said


@dataclass
class Disk:
    """Of a home: what is durable of each file and folder, by inode.

    folders: name → inode, and whether that is a folder. held: inodes with a descriptor each, which
    keeps them from being given to other files.
    """

    home: Path
    blobs: Path
    contents: dict[int, str] = field(default_factory=dict)
    folders: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def sync(self, path: Path) -> None:
        """A file or folder has been synced."""
        if not path.exists():  # it was deleted while it was open
            return
        inode = self._hold(path)
        if path.is_dir():
            self.folders[inode] = {
                entry.name: (self._hold(Path(entry.path)), entry.is_dir())
                for entry in os.scandir(path)
                if not entry.name.endswith(IGNORED)
            }
        else:
            content = path.read_bytes()
            self.contents[inode] = hashlib.sha256(content).hexdigest()
            (self.blobs / self.contents[inode]).write_bytes(content)

    def _hold(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_PATH)
        return inode

    def strict(self) -> Image:
        """What is durable by its name and by its content."""
        image: Image = {}

        def walk(inode: int, place: str) -> None:
            for name, (each, is_folder) in self.folders.get(inode, {}).items():
                path = f"{place}{name}"
                if is_folder:
                    image[path] = FOLDER
                    walk(each, f"{path}/")
                else:
                    image[path] = self.contents.get(each, f"{ZEROS}0")

        walk(self.home.stat().st_ino, "")
        return image

    def journal(self) -> Image:
        """Every name there is, with the content that is durable."""
        image: Image = {}
        for root, folders, files in os.walk(self.home):
            place = Path(root).relative_to(self.home)
            image.update({str(place / name): FOLDER for name in folders})
            for name in files:
                if not name.endswith(IGNORED):
                    found = Path(root, name).stat()
                    zeros = f"{ZEROS}{found.st_size}"
                    image[str(place / name)] = self.contents.get(found.st_ino, zeros)
        return image


def record(home: Path, out: Path) -> None:
    """From now on note in `out` what a power cut would leave of `home`, which is on the disk whole.

    Each line of out/images.jsonl is the call and, for each kind of file system, the image if it is
    another than before.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    (out / "blobs").mkdir(parents=True)
    disk = Disk(home, out / "blobs")
    for root, _, files in os.walk(home):
        disk.sync(Path(root))
        for name in files:
            disk.sync(Path(root, name))
    log = (out / "images.jsonl").open("a", encoding="utf-8")
    last: dict[Kind, Image] = {}

    def note(call: str) -> None:
        images: dict[Kind, Image] = {"strict": disk.strict(), "journal": disk.journal()}
        changed = {kind: image for kind, image in images.items() if last.get(kind) != image}
        last.update(changed)
        if changed:
            log.write(json.dumps({"call": call, **changed}) + "\n")
            log.flush()

    def hook(name: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            if name == "fsync":
                path = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                if path.is_relative_to(home):
                    disk.sync(path)
            note(f"{name} {' '.join(map(str, arguments))}")
            return result

        setattr(os, name, noted)

    for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir"):
        hook(name)
    note("start")


@dataclass(frozen=True)
class Moment:
    """call: after which the power was cut. image: what was left."""

    call: str
    kind: Kind
    image: Image

    def below(self, place: str) -> dict[str, str]:
        """As `digest`: a file of the home, or those below a folder, with their content."""
        return {
            path.removeprefix(place).lstrip("/") or ".": content
            for path, content in self.image.items()
            if content != FOLDER and f"{path}/".startswith(f"{place}/")
        }

    def restore(self, home: Path, out: Path) -> None:
        """Make `home`, which is not there, what is left."""
        home.mkdir()
        for path, content in self.image.items():
            if content == FOLDER:
                (home / path).mkdir(parents=True, exist_ok=True)
                continue
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            if content.startswith(ZEROS):
                (home / path).write_bytes(bytes(int(content.removeprefix(ZEROS))))
            else:
                (home / path).write_bytes((out / "blobs" / content).read_bytes())


def moments(out: Path) -> list[Moment]:
    """All that `record` noted."""
    lines = (out / "images.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [Moment(x["call"], kind, x[kind]) for x in entries for kind in KINDS if kind in x]
