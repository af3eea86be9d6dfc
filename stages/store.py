"""`kava store`: look at a store, check it, pass it on, take one over."""

from __future__ import annotations

from pathlib import Path

import click

from kava_core.errors import KavaError

from .run import AnyRun, tool

STORE = click.argument("path")


@click.group("store")
def store_group() -> None:
    """Look at a KV store, check it, pass it on, or take one over.

    PATH is a folder, or a URL on object storage: s3://, gs://, hf:// or https://.
    """


@store_group.command()
@STORE
def inspect(path: str) -> None:
    """Say what the store at PATH is, what it was made from and how big it is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kava_core.store.summary import describe_store, length_histogram
    from kava_core.store.verify import open_store

    store = open_store(path, checksums=False)  # only `verify --full` reads it all
    table = Table(title=Text(str(store.path)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in describe_store(store):
        table.add_row(name, Text(value))
    histogram = length_histogram(store)
    lengths = Table("tokens", "records", "", title="Trace lengths", title_justify="left")
    most = max(count for _, _, count in histogram)
    for first, last, count in histogram:
        label = str(first) if first == last else f"{first}-{last}"
        lengths.add_row(label, f"{count:,}", "█" * round(40 * count / most))
    console = Console(highlight=False)
    console.print(table)
    console.print(lengths)


@store_group.command()
@STORE
@click.option("--full", is_flag=True, help="Check every checksum too: reads the whole store.")
def verify(path: str, full: bool) -> None:
    """Check that the store at PATH is whole; exit with status 1 if it is not."""
    from kava_core.console import progress
    from kava_core.store.url import locate
    from kava_core.store.verify import verify_files

    store, problems, files = locate(path), [], 0
    with progress() as display:
        task = display.add_task("verify", total=None, note="")
        for name, problem in verify_files(store, full=full):
            files += 1
            display.update(task, advance=1, note=name)
            if problem is not None:
                problems.append(problem)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise SystemExit(1)
    checked = "every checksum" if full else "lengths, headers and index"
    click.echo(f"{store} is whole: {checked} of {files} files checked.")


FOLDER = click.Path(file_okay=False, path_type=Path)


@store_group.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("url")
def push(path: Path, url: str) -> None:
    """Put the store in folder PATH at URL (s3:// or gs://).

    It is a store there only once all of it is there. Cut off and run again, it sends what is
    missing; it replaces nothing.
    """
    from kava_core.console import progress
    from kava_core.store.push import push as put
    from kava_core.store.url import locate

    with progress() as display:
        task = display.add_task("push", total=None, note="")
        manifest = put(path, url, lambda name: display.update(task, advance=1, note=name))
    click.echo(f"{locate(url)} holds {manifest.kind}, {manifest.records:,} records.")


@store_group.command()
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path))
def link(url: str, folder: Path) -> None:
    """Let FOLDER stand for the store at URL: stages that read FOLDER read that.

    FOLDER gets one file, with the URL and the digest of the store that is there now.
    """
    from kava_core.store.where import link as write_link

    manifest = write_link(url, folder)
    click.echo(f"{folder} stands for {url}: {manifest.kind}, {manifest.records:,} records.")


@store_group.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--teacher", type=FOLDER, help="Take this teacher's weights and tokenizer along.")
@click.option("--license", "licence", help="Of the data, as the Hub writes it: mit, cc-by-4.0 …")
def export(path: Path, destination: Path, teacher: Path | None, licence: str | None) -> None:
    """Write the store in folder PATH as a dataset folder for the Hugging Face Hub.

    DESTINATION gets a dataset card, an index in Parquet that `datasets.load_dataset` opens, the
    store itself and, with --teacher, what students are trained from beside it. The card names data,
    licence, base model and training, as far as they lie beside the store and it was made from them.
    """
    export_store(path, destination, teacher=teacher, licence=licence)
    click.echo(
        f"{destination} is written. Upload it with `hf upload OWNER/NAME {destination} --repo-type "
        "dataset`."
    )


def export_store(
    path: Path, destination: Path, *, teacher: Path | None, licence: str | None
) -> None:
    """KavaErrors as of `kava_core.store.export`, and for a teacher that the store was not made
    with."""
    from kava_core.sharing.describe import check_teacher, describe, warn_of_places
    from kava_core.store.export import check_new
    from kava_core.store.export import export as write_export
    from kava_core.store.where import place_of

    check_new(destination)
    beside = path.absolute().parent
    about = describe(
        path, teacher=teacher or beside / "teacher", problems=beside / "problems", licence=licence
    )
    if teacher is not None:
        check_teacher(teacher, place_of(path).read_manifest(), path)
        warn_of_places(teacher)
    write_export(path, destination, about, teacher)


@tool
@click.argument("source")
@click.option("--teacher", type=FOLDER, help="The teacher's folder, if SOURCE does not hold it.")
def import_(run: AnyRun, source: str, teacher: Path | None) -> None:
    """Take the targets store SOURCE and its teacher into a pipeline that imports its targets.

    SOURCE is a store, an exported one, or hf://datasets/OWNER/NAME[@REVISION]. Checks every
    checksum, whether card and manifest agree, and whether the teacher is the one that the store was
    made with. Writes kv_targets/ and teacher/ of the pipeline, and imported.json, what the card
    says of both.
    """
    from kava_core.settings import Imported
    from kava_core.sharing.importing import import_store

    settings = run.settings
    if not isinstance(settings, Imported):
        raise KavaError(
            f"pipeline {run.name} makes its own targets. Name one that has students alone with "
            "--pipeline."
        )
    if named := settings.imports.model_dump(exclude_none=True):
        raise KavaError(
            f"pipeline {run.name} reads its {' and '.join(named)} where `imports` says, and would "
            "not read what is imported. Leave `imports` out."
        )
    manifest = import_store(source, teacher, run.path())
    click.echo(
        f"{run.path('kv_targets')}: {manifest.records:,} records, whole; train from it with "
        f"`kava distill STUDENT --pipeline {run.name}`."
    )


store_group.add_command(import_, "import")
