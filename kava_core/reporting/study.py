"""A study as a table for the terminal and as one page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kava_core.findings.study import Compared, Group, RankCorrelation, StudySummary
from kava_core.reporting.collapse import collapse_of
from kava_core.reporting.style import INK, MUTED, SERIES, Drawing, canvas, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


def words_of(summary: StudySummary) -> str:
    """What the numbers are."""
    asked = sorted({group.n for group in summary.groups})
    problems = " or ".join(f"{n:,}" for n in asked)
    words = (
        f"Exact match on {problems} {summary.split} problems, mean ± standard deviation over "
        "seeds; forward passes per problem, mean."
    )
    if summary.missing_cells:
        words += f" {summary.missing_cells} cells are missing: what they need failed."
    if summary.compared:
        comparisons = len(summary.compared) + summary.missing_comparisons
        words += (
            " Differences in points, by a paired bootstrap over problems and seeds and by a paired "
            "t-test over seeds: p is the larger of the two, the 95 % interval covers both; p "
            f"corrected by Holm over {comparisons} comparisons."
        )
        if any(each.difference.p_seeds is None for each in summary.compared):
            words += " With one seed the bootstrap's alone, which says nothing about other seeds."
    return words


def collapses_of(summary: StudySummary) -> list[str]:
    """Which systems answer one thing whatever they are asked, and with which seeds."""
    said = []
    for group in summary.groups:
        for seed, commonest in zip(group.seeds, group.commonest_answers, strict=False):
            if words := collapse_of(commonest):
                name = f"{group.system} {group.variant}".rstrip()
                said.append(f"{name}{'' if seed is None else f', seed {seed},'} {words}.")
    return said


def score_of(group: Group) -> str:
    """As 87.3 ± 1.2 %."""
    deviation = "" if group.deviation is None else f" ± {group.deviation:.1f}"
    return f"{group.mean:.1f}{deviation} %"


def spread_of(scores: Sequence[float | None]) -> str:
    """Mean ± standard deviation of the seeds that have a number."""
    there = [score for score in scores if score is not None]
    if not there:
        return "–"
    deviation = f" ± {statistics.stdev(there):.1f}" if len(there) > 1 else ""
    return f"{statistics.fmean(there):.1f}{deviation}"


def carried_of(group: Group) -> list[str]:
    """Its latents as they are, removed, mean-filled, a donor's, and how often it is followed."""
    carried = group.carried
    if carried is None:
        return []
    scores = (carried.untouched, carried.removed, carried.mean, carried.donor, carried.followed)
    return [spread_of(each) for each in scores]


def fidelity_of(group: Group) -> list[str]:
    """What its teacher answers from the slots, its KL there, and the student's own exact match."""
    if group.fidelity is None:
        return []
    kl = statistics.fmean(group.fidelity.kl)
    return [spread_of(group.fidelity.exact_match), f"{kl:.3f}", spread_of(group.exact_match)]


FORETOLD = ("the teacher from the slots", "KL", "the student")


def fidelities_of(summary: StudySummary) -> list[str]:
    """What the numbers of `fidelity_of` are, and how they rank; none where there are none."""
    asked = sorted({group.fidelity.n for group in summary.groups if group.fidelity})
    if not asked:
        return []
    problems = " or ".join(f"{n:,}" for n in asked)
    said = [
        f"Exact match in % of the teacher on {problems} validation problems, answered from the "
        "slots that the student is taught from, with its KL to the whole cache; mean ± standard "
        "deviation over seeds."
    ]
    for each in summary.foretold:
        ranks = (
            f"the teacher's exact match {_rank_of(each.exact_match)}",
            f"a low KL {_rank_of(each.kl)}",
        )
        said.append(
            f"Spearman's rank correlation with {each.system} over {each.n} settings: "
            f"{', '.join(ranks)}."
        )
    return said


def _rank_of(rank: RankCorrelation | None) -> str:
    return "orders nothing" if rank is None else f"{rank.rho:+.2f} (p {p_of(rank.p_value)})"


CHANGED = ("as they are", "removed", "mean-filled", "a donor's", "follow the donor")


def changes_of(summary: StudySummary) -> str:
    """What the numbers of `carried_of` are; "" where there are none."""
    asked = {group.carried.n for group in summary.groups if group.carried}
    if not asked:
        return ""
    problems = " or ".join(f"{n:,}" for n in sorted(asked))
    return (
        f"The first {problems} of these problems asked again with all latents changed: exact match "
        "in %, and the answers that are the donor's own of those whose own is another one; mean ± "
        "standard deviation over seeds."
    )


def against(compared: Compared) -> str:
    """The baseline, with its variant where it has another."""
    other = compared.baseline_variant
    return compared.baseline + (f" {other}" if other and other != compared.variant else "")


def difference_of(compared: Compared) -> str:
    """As +4.0 (1.5 to 6.6)."""
    low, high = compared.difference.ci95
    return f"{compared.difference.difference:+.1f} ({low:.1f} to {high:.1f})"


def p_of(p: float) -> str:
    """Four digits behind the point, or that it is less."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def as_table(summary: StudySummary) -> RenderableType:
    """Systems at every point of the grid, then what is compared."""
    from rich import box
    from rich.console import Group as Stack
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
        for i, column in enumerate(columns):
            made.add_column(column, overflow="fold", justify="right" if i else "left")
        return made

    scores = table("system", "exact match", "seeds", "passes")
    before = None
    for group in summary.groups:
        if group.variant and group.variant != before:
            scores.add_section()
            scores.add_row(Text(group.variant, style="bold"))
        before = group.variant
        cells = score_of(group), str(len(group.seeds)), f"{group.forward_passes:.1f}"
        scores.add_row(Text(group.system), *cells)
    parts: list[RenderableType] = [scores]
    if summary.compared:
        differences = table("student", "against", "difference", "p", "p, Holm")
        for each in summary.compared:
            student = f"{each.system} {each.variant}".rstrip()
            numbers = difference_of(each), p_of(each.difference.p_value), p_of(each.p_holm)
            differences.add_row(Text(student), Text(against(each)), *numbers)
        parts.append(differences)
    parts.append(Text("\n".join([words_of(summary), *collapses_of(summary)]), style="dim"))
    if changes := changes_of(summary):
        carried = table("student", *CHANGED)
        for group in summary.groups:
            if group.carried:
                name = f"{group.system} {group.variant}".rstrip()
                carried.add_row(Text(name), *carried_of(group))
        parts += [carried, Text(changes, style="dim")]
    if said := fidelities_of(summary):
        foretold = table("store", *FORETOLD)
        for group in summary.groups:
            if group.fidelity:
                foretold.add_row(
                    Text(f"{group.system} {group.variant}".rstrip()), *fidelity_of(group)
                )
        parts += [foretold, *(Text(line, style="dim") for line in said)]
    return Stack(*parts)


def as_page(summary: StudySummary) -> str:
    """The same as one HTML page that needs nothing but itself."""
    from kava_core.reporting.page import render

    rows = [
        (group, score_of(group), ", ".join(f"{score:.1f}" for score in group.exact_match))
        for group in summary.groups
    ]
    compared = [
        (each, against(each), difference_of(each), p_of(each.difference.p_value), p_of(each.p_holm))
        for each in summary.compared
    ]
    return render(
        "study.html.jinja",
        title=f"Study {summary.study}",
        summary=summary,
        words=words_of(summary),
        collapses=collapses_of(summary),
        rows=rows,
        compared=compared,
        changes=changes_of(summary),
        changed=CHANGED,
        carried=[(group, carried_of(group)) for group in summary.groups if group.carried],
        foretold=FORETOLD,
        fidelities=fidelities_of(summary),
        stores=[(group, fidelity_of(group)) for group in summary.groups if group.fidelity],
        drawing=_dots(summary.groups),
    )


def _dots(groups: Sequence[Group]) -> Drawing:
    """A line per system and variant: every seed a point, the mean a stroke."""

    def draw() -> Figure:
        figure = canvas(70 + 22 * len(groups))
        ax = figure.subplots()
        for row, group in enumerate(groups):
            scores = group.exact_match
            ax.plot(scores, [row] * len(scores), "o", color=SERIES[0], markersize=6, alpha=0.6)
            ax.plot([group.mean] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=2)
        for row in range(len(groups) - 1):
            ax.axhline(row + 0.5, color=MUTED, linewidth=0.5, dashes=(1, 3))
        ax.set_ylim(len(groups) - 0.5, -0.5)
        labels = [f"{group.system} {group.variant}".rstrip() for group in groups]
        ax.set_yticks(range(len(groups)), labels)
        ax.grid(visible=False)
        ax.grid(visible=True, axis="x")
        ax.set_xlim(0, 102)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        ax.set_xlabel("exact match: a point per seed, a stroke at their mean")
        return figure

    return finish("exact-match", "Exact match", "", draw)
