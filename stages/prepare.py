"""problems, test_sets ← a generator, files or the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kava_core.artefacts import fresh_folder, publish, work_folder
from kava_core.console import say
from kava_core.settings.prepare import Prepare

from .run import AnyRun, any_stage

if TYPE_CHECKING:
    from kava_core.problems.folder import Measure

ASKED = {"test", "test_sets", "allow_leakage"}  # settings that are of no concern to what is taught


@any_stage
def prepare(run: AnyRun) -> None:
    """Generate or read problems and split them.

    Writes problems/{train,validation}.parquet, what is taught, and test_sets/{test,NAME}.parquet,
    what is asked, all disjoint by question. Lengths, and what became of every record that was
    read, are in the metrics.json of each.
    """
    from kava_core.problems.bad import tell
    from kava_core.problems.folder import write_problems, write_test_sets
    from kava_core.problems.load import Limits, Reading
    from kava_core.problems.prepare import FurtherSet, Sizes, prepare_problems
    from kava_core.problems.readers import Location

    settings = run.settings.prepare
    run.check_asks()
    assert settings is not None
    tokens = _measure(settings)
    path, hub_config, revision = settings.path, settings.hub_config, settings.revision
    limits = Limits(
        settings.max_question_characters, settings.max_trace_characters, settings.max_steps
    )
    splits = prepare_problems(
        settings.source,
        None if path is None else Location(path, hub_config, revision),
        Reading(
            settings.traces,
            settings.drop_last_step,
            limits,
            tokens.rules if tokens else None,
            settings.on_bad_record,
        ),
        Sizes(settings.train, settings.validation, settings.test),
        seed=settings.seed,
        deduplicate=settings.deduplicate,
        allow_leakage=settings.allow_leakage,
        test_sets={
            name: FurtherSet(
                more.source,
                None if more.path is None else Location(more.path, more.hub_config, more.revision),
                more.split,
                more.size,
            )
            for name, more in settings.test_sets.items()
        },
    )
    # What a prompt is stands beside the settings, where it is not the default.
    plain = settings.model_dump(mode="json", exclude={"prompt"})
    taught = {name: value for name, value in plain.items() if name not in ASKED}
    work = work_folder(run.path("problems"), "prepare", {**plain, **settings.prompt.kept()})
    problems, test_sets = fresh_folder(work / "problems"), fresh_folder(work / "test_sets")
    write_problems(problems, splits, settings.traces, taught, tokens, settings.prompt)
    write_test_sets(test_sets, splits, settings.traces, plain, tokens, settings.prompt)
    publish((problems, run.path("problems")), (test_sets, run.path("test_sets")))
    counts = {name: len(found) for name, found in {**splits.taught(), **splits.asked()}.items()}
    say(", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, reasons in splits.dropped.items():
        left_out = ", ".join(f"{rows} ({reason})" for reason, rows in reasons.items())
        say(f"left out of {name}: {left_out}")
    for name, bad in splits.bad.items():
        if bad:
            say(f"bad records of {name}: {tell(bad)}")
    for name, count in splits.leaked.items():
        if count:
            say(f"{count} questions of {name} also stand in train or validation")


def _measure(settings: Prepare) -> Measure | None:
    """The rules of the tokenizer that the settings name, if they do."""
    if settings.tokenizer is None:
        return None
    from kava_core.models.loading import load_tokenizer, tokenizer_fingerprint
    from kava_core.problems.folder import Measure
    from kava_core.problems.tokens import TokenRules
    from kava_core.problems.traces import TraceEncoder

    tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_revision)
    rules = TokenRules(
        TraceEncoder(tokenizer, settings.traces, prompt=settings.prompt),
        settings.max_question_tokens,
        settings.max_trace_tokens,
    )
    return Measure(rules, tokenizer_fingerprint(tokenizer))
