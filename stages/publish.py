"""`kava publish`: a student or a store for the Hugging Face Hub, as a folder or an upload."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kava_core.errors import KavaError
from kava_core.settings import Imported

from .run import AnyRun, tool
from .store import export_store

if TYPE_CHECKING:
    from kava_core.sharing.hub import Kind
    from kava_core.store.manifest import Manifest
    from kava_core.store.provenance import Provenance

PUBLIC = click.option("--public", is_flag=True, help="Make a new repository public, not private.")


@click.group("publish")
def publish_group() -> None:
    """Publish a student or a store: DEST is a new folder, or hf://OWNER/NAME to upload at once.

    Uploads go to the Hub as whom `hf auth login` knows; what looks like a secret is refused.
    """


@tool
@click.argument("name")
@click.argument("dest")
@click.option("--license", "licence", help="Of the weights, as the Hub writes it: mit …")
@click.option("--data-license", "data_licence", help="Of the data that they were taught with.")
@PUBLIC
def student(
    run: AnyRun,
    name: str,
    dest: str,
    licence: str | None,
    data_licence: str | None,
    public: bool,
) -> None:
    """Publish the student called NAME of a pipeline, with a model card.

    The card says what it was taught by, from which teacher, data and targets, how well it answers
    beside students without latents, what its latents were shown to carry, and how to load it. Run
    `kava evaluate` first: without it the card says that nobody measured it.
    """
    from kava_core.artefacts import read_json
    from kava_core.sharing.describe import check_licence, data_facts, teacher_facts
    from kava_core.sharing.student import Published, publish_student

    if name not in run.settings.students:
        raise KavaError(
            f"pipeline {run.name} has no student {name!r}. There are: "
            f"{', '.join(run.settings.students)}."
        )
    folder = run.path("students", name)
    if not (folder / "student.json").is_file():
        raise KavaError(f"{folder} holds no student. Run `kava distill {name}` first.")
    check_licence(licence)
    check_licence(data_licence)
    made_from = read_json(folder / "student.json")["fingerprints"]
    manifest, provenance = _targets(run)
    learnt: str | None = made_from.get("problems")
    if learnt is None and manifest is not None:
        learnt = manifest.fingerprints.get("problems")
    data = data_facts(run.path("problems"), learnt, data_licence)
    if data is None and provenance is not None and "kv_targets" in made_from:
        data = provenance.data
        if data is not None and data_licence is not None:
            data = data.model_copy(update={"licence": data_licence})
    if data is None and data_licence is not None:
        raise KavaError("--data-license: the data is not known here. Leave it out.")
    about = run.path("teacher") / "teacher.json"
    found = Published(
        name=name,
        folder=folder,
        results=run.path("evaluation"),
        students=run.settings.students,
        targets=manifest,
        data=data,
        teacher=teacher_facts(about.parent) if about.is_file() else None,
        licence=licence,
    )
    with _place(dest, "model", public) as destination:
        publish_student(found, destination)


@tool
@click.argument("dest")
@click.option("--with-teacher", is_flag=True, help="Take the teacher's weights along.")
@click.option("--license", "licence", help="Of the data, as the Hub writes it: mit, cc-by-4.0 …")
@PUBLIC
def store(run: AnyRun, dest: str, with_teacher: bool, licence: str | None, public: bool) -> None:
    """Publish the targets of a pipeline as a dataset, as `kava store export` writes them.

    An upload goes to hf://datasets/OWNER/NAME. Do not take the teacher along unless its licence
    lets you pass it on.
    """
    teacher = run.made("teacher") if with_teacher else None
    with _place(dest, "dataset", public) as destination:
        export_store(run.made("kv_targets"), destination, teacher=teacher, licence=licence)


publish_group.add_command(student)
publish_group.add_command(store)


@contextmanager
def _place(dest: str, kind: Kind, public: bool) -> Iterator[Path]:
    """The folder to write into, which is uploaded afterwards if `dest` is an address."""
    from kava_core.sharing.hub import Repository, upload

    if not dest.startswith("hf://"):
        if public:
            raise KavaError("--public belongs to an upload (hf://OWNER/NAME). Leave it out.")
        yield Path(dest)
        kept = " --repo-type dataset" if kind == "dataset" else ""
        click.echo(f"{dest} is written. Upload it with `hf upload OWNER/NAME {dest}{kept}`.")
        return
    repository = Repository.parse(dest, kind)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        yield folder
        click.echo(f"published: {upload(folder, repository, public=public)}")


def _targets(run: AnyRun) -> tuple[Manifest | None, Provenance | None]:
    """The manifest of the pipeline's targets, and what a card said of them where they came from
    elsewhere; None for what is not there."""
    from kava_core.artefacts import read_json
    from kava_core.sharing.importing import IMPORTED
    from kava_core.store.provenance import CARD, Provenance, read_card
    from kava_core.store.where import place_of

    path = run.path("kv_targets")
    if not path.is_dir():
        return None, None
    manifest = place_of(path).read_manifest("kv_targets")
    if not isinstance(run.settings, Imported):
        return manifest, None
    said = None
    if run.imported("kv_targets") is None and run.path(IMPORTED).is_file():
        said = Provenance.model_validate(read_json(run.path(IMPORTED)))
    elif run.imported("kv_targets") is not None and (path.parent / CARD).is_file():
        said = read_card(path.parent)
        said.check(manifest, path.parent / CARD)
    return manifest, said if said and said.digest == manifest.digest else None
