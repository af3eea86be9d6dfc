"""`kava sync`: write what DVC needs to know from pipelines.yaml."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from kava_core.errors import KavaError


@click.command("sync")
@click.option("--check", is_flag=True, help="Write nothing; exit with status 1 if anything would.")
def sync(check: bool) -> None:
    """Write pipelines/NAME/dvc.yaml for every pipeline of pipelines.yaml.

    Students are DVC's to find; run this after adding or removing a pipeline, a local path or
    a section `traces` or `fidelity`, after changing `generate.keep` or `resources.push_caches`,
    and after installing another version. Does nothing where nothing changed.
    """
    write_project(Path("pipelines.yaml"), check=check)


def write_project(settings_file: Path, *, check: bool = False) -> None:
    """Write what follows from the settings beside them, and say what was written.

    check: write nothing; KavaError names what would be.
    """
    from kava_core.artefacts import atomic_path
    from kava_core.settings import load_pipeline, read_document

    from .graph import FOLDER, project_files

    project = settings_file.parent
    names = list(read_document(settings_file)["pipelines"])
    files = project_files({name: load_pipeline(settings_file, name)[1] for name in names})
    stale = [path for path, text in files.items() if _text(project / path) != text]
    gone = [
        path.parent
        for path in sorted((project / FOLDER).glob("*/dvc.yaml"))
        if path.parent.name not in names
    ]
    if check:
        wrong = [str(path) for path in (*stale, *gone)]
        if wrong:
            raise KavaError(f"not what pipelines.yaml says: {', '.join(wrong)}. Run `kava sync`.")
        return
    for path in stale:
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(project / path) as temporary:
            temporary.write_text(files[path], encoding="utf-8")
        click.echo(f"wrote {path}")
    for folder in gone:
        shutil.rmtree(folder)
        click.echo(f"removed {folder}: pipelines.yaml has no such pipeline")
    if not stale and not gone:
        click.echo("nothing to do")


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
