"""`kava import-student` and `kava convert-weights`: students that others published."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

FORMATS = ("codi", "pccot", "coconut")


@click.command("import-student")
@click.argument("form", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model it was trained from: a folder or a Hub id.")
@click.option("--latents", type=click.IntRange(1), help="Of CODI's and Coconut's: how many.")
@click.option("--lora-alpha", type=click.IntRange(1), help="Of CODI's, if it has adapters.")
def import_student(
    form: str,
    path: Path,
    destination: Path,
    base: str,
    latents: int | None,
    lora_alpha: int | None,
) -> None:
    """Make a student of ours in DEST of one that was published as CODI, PCCoT or Coconut.

    FORMAT is codi, pccot or coconut; PATH the folder with its files (safetensors), of Coconut's the
    file itself. `kava ask DEST` asks it, and `evaluate.others` has it evaluated
    beside a pipeline's own.
    """
    from kava_core.console import say
    from kava_core.models.foreign import Format
    from kava_core.models.foreign import import_student as read

    student = read(
        cast(Format, form), path, base, destination, latents=latents, lora_alpha=lora_alpha
    )
    settings = student.config
    how = "one after the other"
    if settings.reasoning == "jacobi":
        how = f"in {settings.iterations} iterations"
    say(f"wrote {destination}: {settings.latents} latents, {how}")


@click.command("convert-weights")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
def convert_weights(path: Path, destination: Path) -> None:
    """Write the tensors of FILE, which torch.save wrote, to DEST as safetensors.

    FILE is a pickle. Only tensors and plain containers are read of it, and no code is run; all
    other commands refuse such files.
    """
    from kava_core.console import say
    from kava_core.models.convert import convert_weights as convert

    say(f"wrote {destination}: {convert(path, destination)} tensors")
