"""What the cells of a study say together, and the files of it."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kava_core.artefacts import atomic_path
from kava_core.errors import KavaError
from kava_core.findings.base import write_finding
from kava_core.findings.differences import holm, seeded_bootstrap
from kava_core.findings.latents import InterventionScores
from kava_core.findings.study import (
    ANSWERS,
    INTERVENTIONS,
    RESULTS,
    SUMMARY,
    Carried,
    CellAnswer,
    CellAnswers,
    Compared,
    Group,
    StudySummary,
)
from kava_core.findings.tables import write_table
from kava_core.studies.plan import StudyCell, StudyPlan

Found = Mapping[StudyCell, CellAnswers]
Changes = Mapping[StudyCell, InterventionScores]


def summarise(plan: StudyPlan, found: Found, changes: Changes) -> StudySummary:
    """Means over seeds of every system at every point of the grid, and what is compared.

    found: of every cell of the plan; changes: of those that were asked with changed latents.
    KavaError if systems that are compared were not asked the same problems.
    """
    groups: dict[tuple[str, str], list[StudyCell]] = {}
    for cell in plan.cells:
        groups.setdefault((cell.variant, cell.system), []).append(cell)
    differences = []
    for left, right in plan.pairs:
        (mine, *_), (other, *_) = groups[left], groups[right]
        if found[mine].ids != found[other].ids:
            raise KavaError(
                f"{mine.system} and {other.system} were asked different problems: what they were "
                f"read from has changed. Delete the folder of study {plan.name} and run it again."
            )
        differences.append(
            seeded_bootstrap(
                [found[cell].correct for cell in groups[left]],
                [found[cell].correct for cell in groups[right]],
            )
        )
    corrected = holm([difference.p_value for difference in differences])
    return StudySummary(
        study=plan.name,
        pipeline=plan.study.pipeline,
        split=plan.study.split,
        groups=[_group(cells, found, changes) for cells in groups.values()],
        compared=[
            Compared(
                variant=variant,
                system=system,
                baseline_variant=other,
                baseline=baseline,
                difference=difference,
                p_holm=p,
            )
            for ((variant, system), (other, baseline)), difference, p in zip(
                plan.pairs, differences, corrected, strict=True
            )
        ],
    )


def _group(cells: list[StudyCell], found: Found, changes: Changes) -> Group:
    scores = [_exact_match(found[cell]) for cell in cells]
    return Group(
        variant=cells[0].variant,
        system=cells[0].system,
        seeds=[cell.seed for cell in cells],
        exact_match=scores,
        mean=statistics.fmean(scores),
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        forward_passes=statistics.fmean(_passes(found[cell]) for cell in cells),
        n=len(found[cells[0]].ids),
        carried=_carried([changes[cell] for cell in cells]) if cells[0].changed else None,
    )


def _carried(seeds: list[InterventionScores]) -> Carried:
    together = [each.together for each in seeds]
    follows = [each.donor and each.donor.follows for each in together]
    return Carried(
        n=seeds[0].n,
        untouched=[each.none for each in seeds],
        removed=[each.removed.exact_match for each in together],
        mean=[each.mean.exact_match for each in together],
        donor=[each.donor.exact_match if each.donor else None for each in together],
        followed=[each.share if each else None for each in follows],
    )


def _exact_match(answers: CellAnswers) -> float:
    return 100 * sum(answers.correct) / len(answers.correct)


def _passes(answers: CellAnswers) -> float:
    return statistics.fmean(answers.passes)


def write_study(
    folder: Path, plan: StudyPlan, found: Found, changes: Changes, summary: StudySummary
) -> None:
    """Write results.csv, a row for each cell, answers.parquet, a row for each of its answers,
    summary.json, and where latents were changed interventions.csv, a row for each of those cells.
    Equal answers give equal bytes."""
    columns = ("variant", "system", "seed", "n", "exact_match", "forward_passes")
    with atomic_path(folder / RESULTS) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for cell in plan.cells:
            answers = found[cell]
            scores = f"{_exact_match(answers):.4f}", f"{_passes(answers):.4f}"
            row = (cell.variant, cell.system, cell.seed, len(answers.ids), *scores)
            writer.writerow(row)
    with atomic_path(folder / ANSWERS) as temporary:
        write_table(
            temporary,
            [
                CellAnswer(
                    variant=cell.variant, system=cell.system, seed=cell.seed, id=id_, correct=right
                )
                for cell in plan.cells
                for id_, right in zip(found[cell].ids, found[cell].correct, strict=True)
            ],
        )
    write_finding(folder / SUMMARY, summary)
    if changes:
        _write_changes(folder / INTERVENTIONS, changes)


def _write_changes(path: Path, changes: Changes) -> None:
    columns = ("variant", "system", "seed", "n", "untouched", "removed", "mean", "shuffled")
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*columns, "donor", "counted", "followed", "followed_untouched"))
        for cell, found in changes.items():
            removed, mean = found.together.removed, found.together.mean
            shuffled, donor = found.together.shuffled, found.together.donor
            scores = [
                found.none,
                *(x.exact_match if x else None for x in (removed, mean, shuffled)),
            ]
            scores.append(donor.exact_match if donor else None)
            follows = donor.follows if donor else None
            shares = [follows.share, follows.untouched] if follows else [None, None]
            counted = follows.n if follows else 0
            row = (cell.variant, cell.system, cell.seed, found.n)
            writer.writerow([*row, *_four(scores), counted, *_four(shares)])


def _four(numbers: Sequence[float | None]) -> list[str]:
    return ["" if number is None else f"{number:.4f}" for number in numbers]
