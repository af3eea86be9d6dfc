"""traces ← problems, teacher: chains of thought that the teacher writes itself."""

from __future__ import annotations

from kava_core.artefacts import publish
from kava_core.console import say
from kava_core.errors import KavaError

from .run import Run, stage


@stage
def traces(run: Run) -> None:
    """Let the teacher write the chains of thought that are taught.

    Writes traces/, a folder of problems that `generate` and students without latents read in place
    of problems/: training problems with the chains of the teacher's that end in the right answer,
    each once, all that it wrote in written.parquet, and what became of it in metrics.json. Killed
    and run again, it writes only the shards that were not finished.
    """
    from kava_core.targets.traces import build_traces

    if run.settings.traces is None:
        raise KavaError(f"pipeline {run.name} has no section `traces`. Add one, or leave it out.")
    output = run.path("traces")
    written = build_traces(
        run.made("problems"),
        run.made("teacher"),
        run.settings.traces,
        output,
        run.settings.resources,
    )
    publish((written.folder, output))
    say(f"traces: {written.told}")
