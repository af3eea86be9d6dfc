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

    from kava_core.fidelity.examiner import Examiner, Layers, alike
    from kava_core.fidelity.grid import Grid
    from kava_core.fidelity.results import costs_of, recommendation_table, write_results
    from kava_core.fidelity.trial import try_grid
    from kava_core.findings.base import write_finding
    from kava_core.findings.fidelity import MEASURED
    from kava_core.hardware import hardware
    from kava_core.models.loading import (
        DTYPES,
        load_config,
        load_model,
        load_tokenizer,
        model_fingerprint,
        to_device,
        tokenizer_fingerprint,
    )
    from kava_core.models.teacher_pass import check_lengths
    from kava_core.parallel.devices import check_own_gpu
    from kava_core.parallel.threads import torch_threads
    from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
    from kava_core.problems.prompt import check_prompt
    from kava_core.problems.traces import TraceEncoder

    settings = run.settings.fidelity
    if settings is None:
        raise KavaError(f"pipeline {run.name} has no section `fidelity`. Add one, or leave it out.")
    check_own_gpu(run.settings.resources.device, run.settings.resources.gpus_per_worker)
    plain = settings.model_dump(mode="json", by_alias=True)
    teacher = str(run.path("teacher"))
    source: ProblemFolder | AskedFolder
    if settings.split == "test":
        source = open_test_sets(run.path("test_sets"))
    else:
        source = open_problems(run.path("problems"))
    tokenizer, config = load_tokenizer(teacher), load_config(teacher)
    grid = Grid.of(
        settings.policies,
        settings.budgets,
        [(bits.keys, bits.values) for bits in settings.bits],
        Layers.of(
            plain["layers"],
            settings.share,
            settings.share_size,
            settings.select,
            config.num_hidden_layers,
        ),
        budget_shape=settings.budget_shape,
        half=settings.half,
    )
    # Without steps there is no cache to compress.
    problems = [p for p in source.load(settings.split) if p.steps][: settings.limit]
    if not problems:
        raise KavaError(
            f"{source.path} has no {settings.split} problems with steps. Ask `prepare` for some."
        )
    check_prompt(source.prompt, run.path("teacher"), "teacher.json", "kava teacher")
    encoder = TraceEncoder(tokenizer, source.traces, prompt=source.prompt)
    traces = encoder.encode_all(problems)
    check_lengths(traces, config)
    inputs = {
        "problems": source.fingerprint(settings.split),
        "teacher": model_fingerprint(teacher),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    output = run.path("fidelity")
    work = work_folder(output, "fidelity", {"settings": plain, "inputs": inputs})
    with torch_threads(settings.threads):
        examiner = Examiner(
            to_device(load_model(teacher, DTYPES[settings.model_dtype])),
            grid.layers,
            eos=encoder.eos,
            max_new_tokens=settings.max_new_tokens,
        )
        batches = [[traces[i] for i in chosen] for chosen in alike(traces, settings.batch_size)]
        results = try_grid(grid, examiner, encoder, batches, work)
    built = fresh_folder(work / "output")
    metrics = write_results(built, results, split=settings.split, within=settings.within)
    write_finding(run.path("measured", MEASURED), costs_of(results, hardware()))
    publish((built, output))  # last: with it goes all that a killed run would go on from
    Console().print(recommendation_table(metrics))
