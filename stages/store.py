"""`kava store`: look at a store, check it, pass it on."""

from __future__ import annotations

from pathlib import Path

import click

STORE = click.argument("path")


@click.group("store")
def store_group() -> None:
    """Look at a KV store, check it, or pass it on.

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
def export(path: Path, destination: Path) -> None:
    """Write the store in folder PATH as a dataset folder for the Hugging Face Hub.

    DESTINATION gets a dataset card, an index in Parquet that `datasets.load_dataset` opens, and the
    store itself.
    """
    from kava_core.store.export import export as write_export

    write_export(path, destination)
    click.echo(f"{destination} is written. Upload it with `hf upload REPOSITORY {destination}`.")
