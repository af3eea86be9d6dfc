"""problems ← a generator, files or the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kava_core.problems.synthetic import Generator

from kava_core.answers import has_value
from kava_core.artefacts import publish, work_folder
from kava_core.console import say
from kava_core.errors import KavaError
from kava_core.problems.folder import write_problems
from kava_core.problems.load import Limits, Reading, load_splits, load_test_set
from kava_core.problems.records import Problem
from kava_core.problems.sources import SOURCES, Source, Table
from kava_core.problems.splits import ProblemSplits, count_leaks
from kava_core.settings import FileSource, Prepare

from .run import Run, stage


@stage
def prepare(run: Run) -> None:
    """Generate or read problems and split them.

    Writes problems/{train,validation,test}.parquet, disjoint by question, and further test sets
    under problems/test_sets; counts, lengths and what was left out are in problems/metrics.json.
    """
    settings = run.settings.prepare
    output = run.path("problems")
    splits = _splits(settings)
    for name, problems in {**splits.named(), **splits.test_sets}.items():
        _check_answers(name, problems)
    folder = work_folder(output, "prepare", settings.model_dump(mode="json")) / "output"
    folder.mkdir(exist_ok=True)
    write_problems(
        folder,
        splits,
        settings.traces,
        settings.model_dump(mode="json"),
        latent_fraction=settings.latent_fraction,
    )
    publish((folder, output))
    counts = {name: len(found) for name, found in {**splits.named(), **splits.test_sets}.items()}
    say(", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, reasons in splits.dropped.items():
        left_out = ", ".join(f"{rows} ({reason})" for reason, rows in reasons.items())
        say(f"left out of {name}: {left_out}")
    leaked = {name: count for name, count in splits.leaked.items() if count}
    for name, count in leaked.items():
        say(f"{count} questions of {name} also stand in train or validation")


def _splits(settings: Prepare) -> ProblemSplits:
    reading = Reading(
        settings.traces,
        drop_last_step=settings.drop_last_step,
        limits=Limits(
            max_question_characters=settings.max_question_characters,
            max_trace_characters=settings.max_trace_characters,
            max_steps=settings.max_steps,
        ),
    )
    test_sets: dict[str, list[Problem]] = {}
    dropped: dict[str, dict[str, int]] = {}
    for name, further in settings.test_sets.items():
        test_sets[name], reasons = load_test_set(
            name,
            _source(further.source, further),
            str(further.path),
            reading,
            hub_config=further.hub_config,
            split=further.split,
        )
        if reasons:
            dropped[name] = reasons
    if settings.source == "synthetic":
        assert settings.train is not None and settings.test is not None  # checked by the settings
        generator = Generator(traces=settings.traces, **settings.synthetic.model_dump())
        splits = generator.splits(
            settings.train, settings.validation, settings.test, seed=settings.seed
        )
    else:
        splits = load_splits(
            _source(settings.source, settings),
            str(settings.path),
            reading,
            hub_config=settings.hub_config,
            train=settings.train,
            validation=settings.validation,
            test=settings.test,
            seed=settings.seed,
            deduplicate=settings.deduplicate,
            test_sets=test_sets,
        )
    return replace(
        splits,
        test_sets=test_sets,
        dropped=splits.dropped | dropped,
        leaked=count_leaks(splits, test_sets, settings.allow_leakage),
    )


def _source(name: str, settings: FileSource) -> Source:
    if settings.columns is None:
        return SOURCES[name]
    return Table(**settings.columns.model_dump(), separator=settings.separator)


def _check_answers(name: str, problems: Sequence[Problem]) -> None:
    """An answer that is mere text can only be compared letter by letter: not all of them may be."""
    if not any(has_value(problem.answer) for problem in problems):
        raise KavaError(
            f"{name}: expected numbers or mathematical expressions as answers, found none in "
            f"{len(problems)} problems (the first, {problems[0].id}, has "
            f"{problems[0].answer!r:.60}). Correct what is read as the answer."
        )
