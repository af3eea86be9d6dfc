"""`kava clean`: unfinished work that nobody goes on with, and what is kept for the next run."""

from __future__ import annotations

from pathlib import Path

import click

from .run import data_option


@click.command("clean")
@data_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(data: Path, yes: bool) -> None:
    """List work below DATA/.work and DATA/.kept with its size and age, and remove it.

    A stage that was killed goes on from it when it is run again with the same settings and inputs;
    with others it starts anew, and the old work stays until it is removed here. Below DATA/.kept
    are the answers that `evaluate` does not ask for twice. So it is with what a command that was
    killed has half written elsewhere in DATA. What a running stage works on is left alone, and
    half-written files for an hour: on a shared disk another machine may be writing them. No
    artefact is touched.
    """
    from kava_core.console import readable_size, readable_time
    from kava_core.leftovers import find_leftovers, remove

    found = find_leftovers(data)
    for left in found:
        state = f"in use by {left.holder}" if left.holder else f"{readable_time(left.age)} old"
        click.echo(f"{readable_size(left.size):>10}  {left.what}, {state}  {left.path}")
    unused = [left for left in found if left.holder is None]
    if not unused:
        click.echo("nothing to remove")
        return
    size = readable_size(sum(left.size for left in unused))
    if not yes:
        click.confirm(f"Remove {len(unused)} of them, {size}?", abort=True)
    removed = []
    for left in unused:
        if holder := remove(left, data):
            click.echo(f"{left.path} stays: it is in use by {holder} now")
        else:
            removed.append(left)
    size = readable_size(sum(left.size for left in removed))
    click.echo(f"removed {len(removed)}, {size}")
