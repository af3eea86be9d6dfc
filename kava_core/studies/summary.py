"""What the cells of a study say together, and the files of it."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kava_core.artefacts import atomic_path
from kava_core.errors import KavaError
from kava_core.findings.base import write_finding
from kava_core.findings.differences import holm, seeded_difference
from kava_core.findings.latents import InterventionScores
from kava_core.findings.ranks import spearman
from kava_core.findings.study import (
    ANSWERS,
    FIDELITY,
    INTERVENTIONS,
    RESULTS,
    SUMMARY,
    Carried,
    CellAnswer,
    CellAnswers,
    Compared,
    Foretold,
    Group,
    GroupFidelity,
    StoreFidelity,
    StudySummary,
)
from kava_core.findings.tables import write_table
from kava_core.studies.plan import StudyCell, StudyPlan

FEW = 3  # settings, below which an order says nothing

Found = Mapping[StudyCell, CellAnswers]
Changes = Mapping[StudyCell, InterventionScores]
Stores = Mapping[StudyCell, StoreFidelity]


def summarise(plan: StudyPlan, found: Found, changes: Changes, stores: Stores) -> StudySummary:
    """Means over seeds of every system at every point of the grid, and what is compared.

    found: of every cell of the plan; changes: of those that were asked with changed latents;
    stores: of those whose teacher was asked from the slots. KavaError if systems that are compared
    were not asked the same problems.
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
            seeded_difference(
                [found[cell].correct for cell in groups[left]],
                [found[cell].correct for cell in groups[right]],
            )
        )
    # As if those that are missing had found nothing: the others' do not become smaller by it.
    p_values = [difference.p_value for difference in differences]
    corrected = holm([*p_values, *[1.0] * plan.missing_pairs])[: len(p_values)]
    summed = [_group(cells, found, changes, stores) for cells in groups.values()]
    return StudySummary(
        study=plan.name,
        pipeline=plan.study.pipeline,
        split=plan.study.split,
        groups=summed,
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
        foretold=_foretold(summed),
        missing_cells=plan.missing_cells,
        missing_comparisons=plan.missing_pairs,
    )


def _foretold(groups: Sequence[Group]) -> list[Foretold]:
    """Of every student that was taught from stores of several kinds."""
    found = []
    for system in dict.fromkeys(group.system for group in groups):
        its = [group for group in groups if group.system == system]
        pairs = [(group.fidelity, group.mean) for group in its if group.fidelity]
        if len(pairs) < FEW:
            continue
        means = [mean for _, mean in pairs]
        exact = [statistics.fmean(fidelity.exact_match) for fidelity, _ in pairs]
        near = [-statistics.fmean(fidelity.kl) for fidelity, _ in pairs]
        found.append(
            Foretold(
                system=system,
                n=len(pairs),
                exact_match=spearman(exact, means),
                kl=spearman(near, means),
            )
        )
    return found


def _group(cells: list[StudyCell], found: Found, changes: Changes, stores: Stores) -> Group:
    scores = [_exact_match(found[cell]) for cell in cells]
    commonest = [found[cell].commonest_answer for cell in cells]
    return Group(
        variant=cells[0].variant,
        system=cells[0].system,
        seeds=[cell.seed for cell in cells],
        exact_match=scores,
        mean=statistics.fmean(scores),
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        forward_passes=statistics.fmean(_passes(found[cell]) for cell in cells),
        n=len(found[cells[0]].ids),
        commonest_answers=commonest if any(commonest) else [],
        carried=_carried([changes[cell] for cell in cells]) if cells[0].changed else None,
        fidelity=_fidelity([stores[cell] for cell in cells]) if cells[0].fidelity else None,
    )


def _fidelity(seeds: list[StoreFidelity]) -> GroupFidelity:
    return GroupFidelity(
        n=seeds[0].n,
        exact_match=[each.exact_match for each in seeds],
        kl=[each.kl for each in seeds],
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


def _numbers(answers: CellAnswers) -> list[float | None]:
    commonest = answers.commonest_answer
    return [_exact_match(answers), _passes(answers), commonest.share if commonest else None]


def write_study(
    folder: Path,
    plan: StudyPlan,
    found: Found,
    changes: Changes,
    stores: Stores,
    summary: StudySummary,
) -> None:
    """Write results.csv, a row for each cell, answers.parquet, a row for each of its answers,
    summary.json; where latents were changed interventions.csv, and where the teacher was asked from
    the slots fidelity.csv, a row for each of those cells; a run before may have left one of these
    two where there is nothing to write now, and it goes. Equal answers give equal bytes."""
    _write_rows(
        folder / RESULTS,
        ("exact_match", "forward_passes", "commonest_share"),
        {cell: (len(found[cell].ids), _numbers(found[cell])) for cell in plan.cells},
    )
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
    else:
        (folder / INTERVENTIONS).unlink(missing_ok=True)
    if stores:
        _write_rows(
            folder / FIDELITY,
            ("exact_match", "kl", "full", "none"),
            {
                cell: (store.n, [store.exact_match, store.kl, store.full, store.none])
                for cell, store in stores.items()
            },
        )
    else:
        (folder / FIDELITY).unlink(missing_ok=True)


def _write_rows(
    path: Path,
    columns: Sequence[str],
    rows: Mapping[StudyCell, tuple[int, Sequence[float | None]]],
) -> None:
    """A row for each cell: which it is, of how many problems, and its numbers."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("variant", "system", "seed", "n", *columns))
        for cell, (n, numbers) in rows.items():
            writer.writerow((cell.variant, cell.system, cell.seed, n, *_four(numbers)))


def _write_changes(path: Path, changes: Changes) -> None:
    columns = ("variant", "system", "seed", "n", "untouched", "removed", "mean", "shuffled")
    changed = ("removed_changed", "mean_changed", "shuffled_changed", "donor_changed")
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*columns, "donor", "counted", "followed", "followed_untouched", *changed))
        for cell, found in changes.items():
            removed, mean = found.together.removed, found.together.mean
            shuffled, donor = found.together.shuffled, found.together.donor
            kinds = (removed, mean, shuffled, donor)
            scores = [found.none, *(kind.exact_match if kind else None for kind in kinds)]
            others = [kind.changed if kind else None for kind in kinds]
            follows = donor.follows if donor else None
            shares = [follows.share, follows.untouched] if follows else [None, None]
            counted = follows.n if follows else 0
            row = (cell.variant, cell.system, cell.seed, found.n)
            writer.writerow([*row, *_four(scores), counted, *_four([*shares, *others])])


def _four(numbers: Sequence[float | None]) -> list[str]:
    return ["" if number is None else f"{number:.4f}" for number in numbers]
