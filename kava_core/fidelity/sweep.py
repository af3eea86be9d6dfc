"""The teacher answers all problems from every kind of cache: the parts that no run made before."""

from __future__ import annotations

from kava_core.console import progress, say
from kava_core.fidelity.job import FidelityJob, Material
from kava_core.fidelity.trial import Result
from kava_core.parallel.shards import run_shards
from kava_core.settings import Resources


def try_grid(job: FidelityJob, material: Material, resources: Resources) -> list[Result]:
    """Every batch is answered from every kind of cache, wherever `resources` says; what is found
    does not depend on them, but seconds do."""
    cells, batches = range(len(material.grid.cells)), range(len(material.batches))
    total = len(cells) * len(batches)
    finished = {
        (batch, cell)
        for batch in batches
        for cell in cells
        if job.is_finished(batch, cell, material.batches[batch])
    }
    if finished:
        say(f"fidelity: {len(finished)} of {total} parts are finished already")
    missing = []
    for shard in range(material.shards):
        batch, its = material.place(shard)
        if any((batch, cell) not in finished for cell in its):
            missing.append(shard)
    with progress() as display:
        task = display.add_task("fidelity", total=total, completed=len(finished), note="")
        for shard, made in run_shards(
            job,
            missing,
            resources,
            folder=job.work,
            examples=lambda shard, made: made * len(material.batches[material.place(shard)[0]]),
        ):
            cell = material.grid.cells[material.place(shard)[1][-1]]
            display.update(task, advance=made, note=f"{cell.series}, {cell.budget or ''}")
    # Read from the files, so that a continued run has what an uninterrupted one has.
    results = [Result(cell) for cell in material.grid.cells]
    for batch in batches:
        for number, result in enumerate(results):
            part = job.read(batch, number)
            result.answers.extend(part.answers)
            result.costs.append(part.cost)
    return results
