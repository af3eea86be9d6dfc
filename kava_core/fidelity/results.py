"""What the fidelity stage found: numbers per kind of cache, a recommendation, files, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kava_core.fidelity.grid import Cell
from kava_core.fidelity.trial import Result
from kava_core.findings.base import write_finding
from kava_core.findings.fidelity import (
    ANSWERS,
    METRICS,
    PLOTTED,
    BatchCost,
    CacheCost,
    CachedAnswer,
    CacheScore,
    CacheScores,
    FidelityCosts,
    SweetSpots,
)
from kava_core.findings.scores import score_steps, wilson
from kava_core.findings.tables import write_table
from kava_core.hardware import together

FULL, NONE = Cell("full"), Cell("none")

T = TypeVar("T")


def write_results(
    folder: Path, results: Sequence[Result], *, split: str, within: float
) -> CacheScores:
    """Write the artefact's files; returns what is in metrics.json. Equal answers give equal bytes.

    results: of `full`, `none` and all cells of a grid, in its order.
    """
    scores = {result.cell: summarise(result.answers) for result in results}
    exact = {cell: score.exact_match for cell, score in scores.items()}
    metrics = CacheScores(
        split=split,
        within=within,
        full=scores[FULL],
        none=scores[NONE],
        policies=_nested(scores),
        recommended=recommend(exact, within),
        recommended_by_steps={
            steps: recommend(
                {cell: score.by_steps[steps].exact_match for cell, score in scores.items()}, within
            )
            for steps in scores[FULL].by_steps
        },
    )
    write_table(folder / ANSWERS, [answer for result in results for answer in result.answers])
    write_finding(folder / METRICS, metrics)
    write_finding(folder / PLOTTED, _plotted(scores))
    return metrics


def costs_of(results: Sequence[Result]) -> FidelityCosts:
    """What answering from every kind of cache cost, and on which machines."""
    costs = {result.cell: summarise_costs(result.costs) for result in results}
    return FidelityCosts(
        hardware=together(cost.hardware for result in results for cost in result.costs),
        full=costs[FULL],
        none=costs[NONE],
        policies=_nested(costs),
    )


def summarise(answers: Sequence[CachedAnswer]) -> CacheScore:
    """The quality of one kind of cache; answers weigh by their tokens in perplexity and KL."""
    n = len(answers)
    marks = [answer.correct for answer in answers]
    tokens = sum(answer.answer_tokens for answer in answers)
    return CacheScore(
        exact_match=100 * sum(marks) / n,
        ci95=wilson(sum(marks), n),
        n=n,
        perplexity=math.exp(sum(a.nll * a.answer_tokens for a in answers) / tokens),
        kl=sum(a.kl * a.answer_tokens for a in answers) / tokens,
        tokens_kept=sum(a.tokens_kept for a in answers) / n,
        bytes_per_problem=sum(a.bytes for a in answers) / n,
        by_steps=score_steps([answer.n_steps for answer in answers], marks),
    )


def summarise_costs(costs: Sequence[BatchCost]) -> CacheCost:
    """Means over problems; the highest peak of memory."""

    def seconds(batches: Sequence[BatchCost]) -> float:
        problems = sum(batch.problems for batch in batches)
        return sum(b.seconds_per_problem * b.problems for b in batches) / problems

    peaks = [cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes is not None]
    return CacheCost(
        seconds_per_problem=seconds(costs),
        peak_memory_bytes=max(peaks, default=None),
        seconds_by_steps={
            steps: seconds([cost for cost in costs if cost.n_steps == steps])
            for steps in sorted({cost.n_steps for cost in costs})
        },
    )


def recommend(exact_match: Mapping[Cell, float], within: float) -> SweetSpots:
    """The smallest budget whose exact match (%) is at most `within` points below full.

    None where no budget of the grid is enough. Policies and bits keep their order.
    """
    full = exact_match[FULL]
    found: SweetSpots = {}
    for cell in exact_match:
        if cell.budget is not None:
            found.setdefault(cell.policy, {}).setdefault(cell.bits, None)
    # Scores of n problems lie 100 / n apart, so nine digits tell them apart; floats err in the last
    # of sixteen, where a difference of exactly `within` would be taken for more.
    enough = [cell for cell, score in exact_match.items() if round(full - score, 9) <= within]
    for cell in sorted(enough, key=lambda cell: -(cell.budget or 0)):  # the smallest comes last
        if cell.budget is not None:
            found[cell.policy][cell.bits] = cell.budget
    return found


def recommendation_table(metrics: CacheScores) -> RenderableType:
    """Per policy and bits the recommended budget and what it keeps, beside the full cache."""
    table = Table(
        title=f"Smallest budget within {metrics.within:g} points of the full cache",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("cache", overflow="fold")
    for name in ("bits", "budget", "exact\nmatch", "95 %\ninterval", "KL", "tokens", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, bits: str, budget: str, score: CacheScore, style: str = "") -> None:
        low, high = score.ci95
        table.add_row(
            Text(name),
            bits,
            budget,
            f"{score.exact_match:.1f} %",
            f"{low:.1f} to {high:.1f}",
            f"{score.kl:.3f}",
            f"{score.tokens_kept:.1f}",
            f"{score.bytes_per_problem:,.0f}",
            style=style,
        )

    row("full", "", "", metrics.full, "bold")
    for policy, by_bits in metrics.recommended.items():
        for bits, budget in by_bits.items():
            if budget is None:
                largest = max(metrics.policies[policy])
                table.add_row(Text(policy), bits, f"> {largest}", *[""] * 5, style="dim")
            else:
                row(policy, bits, str(budget), metrics.policies[policy][budget][bits])
    row("none", "", "", metrics.none, "dim")
    words = (
        f"{metrics.full.n:,} {metrics.split} problems; tokens are those of the chain that a head "
        "sees, bytes what a problem takes, both means; KL to the full cache in nats per token."
    )
    return Group(table, Text(words, style="dim"))


def _nested(entries: Mapping[Cell, T]) -> dict[str, dict[int, dict[str, T]]]:
    """Policy → budget → bits, without `full` and `none`."""
    policies: dict[str, dict[int, dict[str, T]]] = {}
    for cell, entry in entries.items():
        if cell.budget is not None:
            policies.setdefault(cell.policy, {}).setdefault(cell.budget, {})[cell.bits] = entry
    return policies


def _plotted(scores: Mapping[Cell, CacheScore]) -> list[dict[str, object]]:
    """One flat row per policy, bits and budget; full and none as lines over all budgets."""
    budgets = sorted({cell.budget for cell in scores if cell.budget is not None})
    return [
        {
            "series": cell.series,
            "budget": budget,
            **score.model_dump(exclude={"ci95", "by_steps"}),
        }
        for cell, score in scores.items()
        for budget in (budgets if cell.budget is None else [cell.budget])
    ]
