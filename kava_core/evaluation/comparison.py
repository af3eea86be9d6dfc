"""Every system of a pipeline on every test set, and what the latents of its students hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from kava_core.evaluation.examination import Examination, ProblemSet, examine
from kava_core.evaluation.systems import Systems
from kava_core.findings.latents import Insights, Similarities
from kava_core.latents.interpret import interpret
from kava_core.latents.similarity import slot_similarity
from kava_core.latents.teacher import TeacherView
from kava_core.models.loading import to_device
from kava_core.problems.traces import TraceEncoder
from kava_core.store import TargetsStore


@dataclass(frozen=True)
class Comparison:
    """examinations: test set → system; similarity, insights: of the students with latents."""

    examinations: dict[str, dict[str, Examination]]
    similarity: Similarities = field(default_factory=dict)
    insights: Insights = field(default_factory=dict)


def compare_systems(
    systems: Systems,
    encoder: TraceEncoder,
    test_sets: Sequence[ProblemSet],
    targets: TargetsStore | None,
    view: TeacherView | None,
    display: Progress,
    *,
    batch_size: int,
    max_new_tokens: int,
    similarity_records: int,
    intervention_problems: int,
) -> Comparison:
    """Open the systems one after another and ask each all there is to ask.

    targets: what the native students' latents are held against, over its first
    similarity_records; view: the teacher over problems of the first test set, None where latents
    are not looked into; intervention_problems: how many of that set are asked again with latents
    changed. KavaError names a problem that does not fit a model's context.
    """
    found = Comparison({test_set.name: {} for test_set in test_sets})
    own = test_sets[0].problems
    for name in systems.names:
        total = sum(len(test_set.problems) for test_set in test_sets)
        task = display.add_task(name, total=total, note="")
        system, asked_with = to_device(systems.open(name, encoder)), systems.encoder(name, encoder)
        for test_set in test_sets:
            display.update(task, note=test_set.name)
            found.examinations[test_set.name][name] = examine(
                system,
                asked_with,
                test_set,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                advance=lambda n, task=task: display.advance(task, n),  # type: ignore[misc]
            )
        if name not in systems.native or targets is None:
            continue
        found.similarity[name] = slot_similarity(
            system, targets, records=similarity_records, batch_size=batch_size
        )
        if view is not None:
            display.update(task, note="latents")
            found.insights[name] = interpret(
                system,
                view,
                encoder,
                {problem.id: problem for problem in own},
                own[:intervention_problems],
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
            )
    return found
