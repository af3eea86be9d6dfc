"""`kava plan`: what a pipeline will make, compute and take, before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kava_core.errors import KavaError

from .run import data_option, pipelines_option

if TYPE_CHECKING:
    from rich.table import Table

    from kava_core.planning.forecast import Forecast


@click.command("plan")
@click.argument("pipeline", required=False)
@click.option(
    "--flops",
    type=click.FloatRange(min=0, min_open=True),
    help="Floating-point operations a second of one device, instead of a calibration here.",
)
@click.option(
    "--gbps",
    type=click.FloatRange(min=0, min_open=True),
    help="GB a second to and from one disk; goes with --flops.",
)
@pipelines_option
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(
    pipeline: str | None,
    flops: float | None,
    gbps: float | None,
    pipelines: Path,
    data: Path,
    as_json: bool,
) -> None:
    """Say what PIPELINE (default: the active one) will make, compute and take.

    Bytes of stores and models, decoder calls and operations, peak memory of a worker and of a
    trainer, time, free disk, and what would make it cheaper. Lengths are those of the problems if
    `kava prepare` has run, else assumed, and said to be. Time is from a few steps of every kind on
    this machine, with its workers; or, with --flops and --gbps, what one device and one disk of
    these rates take, whatever machine says so. Needs neither weights nor a network, and writes
    nothing.
    """
    from kava_core.planning.calibrate import Calibration, Rates
    from kava_core.planning.forecast import forecast
    from kava_core.settings import load_pipeline

    if (flops is None) != (gbps is None):
        raise KavaError("--flops and --gbps go together: give both, or neither to calibrate here.")
    name, settings = load_pipeline(pipelines, pipeline)
    rates = Rates(flops, gbps * 1e9) if flops is not None and gbps is not None else None
    found = forecast(name, settings, data / name, lambda lengths: rates or Calibration(lengths))
    if as_json:
        click.echo(json.dumps(as_json_value(found), indent=2, ensure_ascii=False))
    else:
        show(found)


def as_json_value(found: Forecast) -> dict[str, object]:
    """All of a forecast, with what follows from it."""
    return {**asdict(found), "bytes": found.bytes, "fits": found.fits, "seconds": found.seconds}


def show(found: Forecast) -> None:
    """Print a forecast for a person."""
    from rich.console import Console

    from kava_core.console import readable_size

    console = Console(highlight=False)
    tokens = found.tokens
    console.print(
        f"{found.pipeline}: {found.problems:,} problems; a question of {tokens['question']:g} "
        f"tokens, a trace of {tokens['trace']:g}, an answer of {tokens['answer']:g} in the mean "
        f"({found.lengths_from})",
        soft_wrap=True,
    )
    console.print(
        f"teacher: {found.model}, {found.parameters / 1e6:,.1f} M parameters", soft_wrap=True
    )
    console.print(_disk(found))
    fits = "enough" if found.fits else "NOT ENOUGH"
    console.print(f"free: {readable_size(found.free)}, {fits}")
    console.print(_stages(found))
    if found.cheaper:
        console.print(_cheaper(found))


def _disk(found: Forecast) -> Table:
    from rich.table import Table

    from kava_core.console import readable_size

    table = Table("artefact", "bytes", "what", title="On the disk", title_justify="left")
    stores = {"teacher_kv": found.teacher_kv, "kv_targets": found.kv_targets}
    for name, size in found.disk.items():
        store = stores.get(name)
        what = ""
        if store is not None:
            slots = f", {store.slots} slots" if store.slots else ""
            what = f"{store.bits} bits{slots}, {store.shards:,} shards, {store.files:,} files"
        elif name == "checkpoints":
            what = "of the largest run, gone when it is done"
        table.add_row(name, readable_size(size), what)
    table.add_row("together", readable_size(found.bytes), "", style="bold")
    return table


def _stages(found: Forecast) -> Table:
    from rich.table import Table

    from kava_core.console import readable_size

    table = Table(
        "stage", "decoder calls", "operations", "peak memory", "time",
        title="Stages", title_justify="left",
    )  # fmt: skip
    for stage in found.stages:
        memory = "–" if stage.memory is None else readable_size(stage.memory)
        time = "–" if stage.seconds is None else duration(stage.seconds)
        table.add_row(stage.stage, f"{stage.calls:,}", f"{stage.flops:.2g}", memory, time)
    if found.seconds is not None:
        table.add_row("together", "", "", "", duration(found.seconds), style="bold")
    return table


def _cheaper(found: Forecast) -> Table:
    from rich.table import Table

    from kava_core.console import readable_size

    table = Table(
        "setting", "saves", "then", "costs", title="What would make it cheaper",
        title_justify="left",
    )  # fmt: skip
    for saving in found.cheaper:
        settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in saving.settings.items())
        table.add_row(
            settings, readable_size(saving.saves), readable_size(saving.bytes), saving.costs
        )
    return table


def _yaml(value: object) -> str:
    return json.dumps(value).replace('"', "")


def duration(seconds: float) -> str:
    """Seconds in the largest unit that makes more than one of them."""
    for unit, size in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
