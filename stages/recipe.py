"""`kava recipe`: published settings, taken over into one's own pipelines.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from kava_core.errors import KavaError

from .run import pipelines_option

RECIPES = Path(__file__).parent / "recipes"
_MAPPING = re.compile(r"^pipelines:[ \t]*(?:#.*)?\n", re.MULTILINE)


@click.command("recipe")
@click.argument("name", required=False)
@pipelines_option
def recipe(name: str | None, pipelines: Path) -> None:
    """List published settings, or take the one called NAME over into pipelines.yaml.

    Each is a whole pipeline, of this project's own or of a paper's, and says what differs from the
    paper and why. Afterwards it is yours to change: `kava plan NAME` says what it would take,
    `kava check NAME` tries it, `dvc repro pipelines/NAME/dvc.yaml` runs it.
    """
    from kava_core.artefacts import atomic_path
    from kava_core.settings import read_document

    from .sync import write_project

    if name is None:
        for path in recipe_files():
            click.echo(f"{path.stem:24} {describe(path)}")
        return
    path = recipe_file(name)
    document = read_document(pipelines)
    if name in document["pipelines"]:
        raise KavaError(f"{pipelines} has a pipeline {name!r} already. Rename or remove that one.")
    text = with_recipe(pipelines.read_text(encoding="utf-8"), path)
    _check_taken(text, document, name, path, pipelines)
    with atomic_path(pipelines) as temporary:
        temporary.write_text(text, encoding="utf-8")
    click.echo(f"{pipelines} has the pipeline {name} now; what it does differently: {path}")
    write_project(pipelines)


def recipe_files() -> list[Path]:
    """All recipes, by name."""
    return sorted(RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """KavaError if there is none of this name."""
    path = RECIPES / f"{name}.yaml"
    if path not in recipe_files():
        names = ", ".join(each.stem for each in recipe_files())
        raise KavaError(f"there is no recipe {name!r}. There are: {names}.")
    return path


def describe(path: Path) -> str:
    """What a recipe is, in a line: the comment above its pipeline."""
    return _block(path).splitlines()[0].removeprefix("  # ")


def with_recipe(text: str, path: Path) -> str:
    """The text of a pipelines.yaml with the recipe as its first pipeline, all else to the letter.

    KavaError if the text has no line `pipelines:` to put it under.
    """
    found = _MAPPING.search(text)
    if found is None:
        raise KavaError(
            "expected a line `pipelines:` with the pipelines below it, found none. Copy the "
            f"pipeline from {path} by hand."
        )
    return f"{text[: found.end()]}{_block(path)}\n{text[found.end() :]}"


def _block(path: Path) -> str:
    """A recipe's pipeline as it stands below `pipelines:`, with the comment above it."""
    return _MAPPING.split(path.read_text(encoding="utf-8"), maxsplit=1)[1]


def _check_taken(text: str, before: dict[str, Any], name: str, path: Path, pipelines: Path) -> None:
    """KavaError unless the text says what the file did, and the recipe."""
    import yaml

    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))["pipelines"]
    expected = {**before, "pipelines": {**wanted, **before["pipelines"]}}
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if found != expected:
        raise KavaError(
            f"{name} cannot be put into {pipelines}: expected pipelines that stand two spaces in. "
            f"Copy the pipeline from {path} by hand."
        )
