"""fidelity ← problems, teacher: what the teacher can still answer from a compressed cache."""

from __future__ import annotations

from kava_core.artefacts import fresh_folder, publish, work_folder
from kava_core.errors import KavaError

from .run import Run, stage


@stage
def fidelity(run: Run) -> None:
    """Let the teacher answer held-out problems from its compressed cache.

    For every policy, budget and bit width of the `fidelity` settings, and for the full cache and
    none: exact match, perplexity of the gold answer and KL to the full cache in metrics.json, every
    answer in answers.parquet. Seconds and memory go to measured/fidelity.json. Prints the smallest
    budget near enough to the full cache. Killed and run again, it goes on where it was.
    """
    from rich.console import Console

    from kava_core.fidelity.job import FidelityJob, Material, open_source
    from kava_core.fidelity.results import costs_of, recommendation_table, write_results
    from kava_core.fidelity.sweep import try_grid
    from kava_core.findings.base import write_finding
    from kava_core.findings.fidelity import MEASURED
    from kava_core.models.loading import load_tokenizer, model_fingerprint, tokenizer_fingerprint
    from kava_core.parallel.devices import check_own_gpu
    from kava_core.problems.prompt import check_prompt

    check_own_gpu(run.settings.resources.device, run.settings.resources.gpus_per_worker)
    settings = run.settings.fidelity
    if settings is None:
        raise KavaError(f"pipeline {run.name} has no section `fidelity`. Add one, or leave it out.")
    path = run.made("test_sets" if settings.split == "test" else "problems")
    teacher, output = run.made("teacher"), run.path("fidelity")
    source = open_source(path, settings)
    check_prompt(source.prompt, teacher, "teacher.json", "kava teacher")
    material = Material.of(source, teacher, settings)
    inputs = {
        "problems": source.fingerprint(settings.split),
        "teacher": model_fingerprint(str(teacher)),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(str(teacher))),
    }
    plain = settings.model_dump(mode="json", by_alias=True)
    work = work_folder(output, "fidelity", {"settings": plain, "inputs": inputs})
    job = FidelityJob(path, teacher, settings, work)
    results = try_grid(job, material, run.settings.resources)
    built = fresh_folder(work / "output")
    metrics = write_results(built, results, split=settings.split, within=settings.within)
    write_finding(run.path("measured", MEASURED), costs_of(results))
    publish((built, output))  # last: with it goes all that a killed run would go on from
    Console().print(recommendation_table(metrics))
