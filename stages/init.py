"""`kava init`: a project of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from kava_core.errors import KavaError

SKELETON = Path(__file__).parent / "skeleton"
# Hard links, so that an artefact and its copy in the cache are the same bytes on the disk: of the
# kinds DVC is told, it links what it caches only by the first one.
DVC_CONFIG = """[core]
    analytics = false
    autostage = false
[cache]
    type = "hardlink,copy"
"""


@click.command("init")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path())
def init(folder: Path) -> None:
    """Make a project in FOLDER (default: here), which must be empty or not there.

    Writes pipelines.yaml with a small pipeline to start from, what DVC needs to run it, and
    .gitignore. Inside a git repository DVC keeps its locks and metrics under git's control.
    """
    from kava_core.settings import load_pipeline

    from .graph import project_files

    name, settings = load_pipeline(SKELETON / "pipelines.yaml")
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if set(there) - {".git"}:
        raise KavaError(
            f"expected {folder.absolute()} to be empty, found {', '.join(there[:5])}"
            f"{' …' if len(there) > 5 else ''}. Name another folder."
        )
    try:
        from dvc.repo import Repo
    except ImportError:
        raise KavaError("a project needs DVC: install kava with the extra `pipeline`.") from None
    folder.mkdir(parents=True, exist_ok=True)
    places = (folder.absolute(), *folder.absolute().parents)
    in_git = any((place / ".git").exists() for place in places)
    Repo.init(
        str(folder), no_scm=not in_git, subdir=in_git and not (folder / ".git").exists()
    ).close()
    config = DVC_CONFIG if in_git else DVC_CONFIG.replace("[core]\n", "[core]\n    no_scm = true\n")
    (folder / ".dvc" / "config").write_text(config, encoding="utf-8")
    shutil.copytree(SKELETON / "plots", folder / ".dvc" / "plots")
    shutil.copyfile(SKELETON / "gitignore", folder / ".gitignore")
    shutil.copyfile(SKELETON / "pipelines.yaml", folder / "pipelines.yaml")
    for path, text in project_files({name: settings}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    click.echo(
        f"{folder.absolute()} is a project: settings in pipelines.yaml, `dvc repro` runs the "
        f"pipeline `{name}`."
    )
