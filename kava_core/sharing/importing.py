"""A targets store and its teacher, taken into a project from another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kava_core.artefacts import (
    PURPOSE,
    WORK,
    clear,
    data_folder,
    disk_errors,
    fingerprint,
    fresh_folder,
    publish,
    write_json,
)
from kava_core.errors import KavaError
from kava_core.lock import alone
from kava_core.sharing.describe import check_teacher
from kava_core.sharing.hub import Repository, download
from kava_core.store.export import STORE, TEACHER, copy_model, copy_store
from kava_core.store.layout import MANIFEST_FILE
from kava_core.store.manifest import Manifest
from kava_core.store.provenance import Provenance, read_card
from kava_core.store.where import place_of

IMPORTED = "imported.json"  # beside the artefacts: what the card of an imported store said


def import_store(source: str, teacher: Path | None, folder: Path) -> Manifest:
    """Put a targets store into `folder`/kv_targets and its teacher into `folder`/teacher.

    source: the folder of a store or of an exported one, or `hf://datasets/OWNER/NAME[@REVISION]`.
    teacher: its folder, if it does not lie beside the exported store. Everything is checked before
    anything is replaced; KavaError for a damaged store or one of another kind, a card that tells of
    another store, a teacher that is missing, and one, or a tokenizer, that the store was not made
    with. KavaError, too, while another import into `folder` is at work.
    """
    with disk_errors(folder), _workplace(folder) as work:
        given = Path(source).expanduser()
        if source.startswith("hf://"):
            given = download(Repository.parse(source, "dataset"), work / "download")
        store, provenance = _opened(given)
        manifest = place_of(store).load_manifest("kv_targets")
        if provenance is not None:
            provenance.check(manifest, given)
        beside = given / TEACHER
        if teacher is None and not beside.is_dir():
            raise KavaError(
                f"{source} holds no teacher, and its targets teach nothing without one. Name the "
                "teacher's folder with --teacher."
            )
        check_teacher(teacher or beside, manifest, store)
        built = work / "kv_targets"
        copy_store(store, built, "kv_targets")
        copy_model(teacher or beside, work / "teacher")
        about = provenance or Provenance.of(manifest, None, None)
        publish((built, folder / "kv_targets"), (work / "teacher", folder / "teacher"))
        write_json(folder / IMPORTED, about.model_dump(mode="json"))
    return manifest


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder of unfinished work for what is put into `folder`; gone afterwards."""
    output = folder.absolute()
    data = data_folder(output / "kv_targets")
    place = output.relative_to(data).as_posix()
    work = data / WORK / f"import-{fingerprint(['import', place])[:24]}"
    with alone(work.with_name(f"{work.name}.lock"), "import", place):
        fresh_folder(work)
        write_json(work / PURPOSE, {"stage": "import", "output": place})
        try:
            yield work
        finally:
            clear(work)


def _opened(given: Path) -> tuple[Path, Provenance | None]:
    """The store in a folder, and what its card says if it was exported with one."""
    if (given / STORE / MANIFEST_FILE).is_file():
        return given / STORE, read_card(given)
    return given, None
