"""What the fidelity stage measured: numbers per kind of cache, a recommendation, files, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kava_core.artefacts import write_json
from kava_core.evaluation.accuracy import wilson
from kava_core.fidelity.figures import heatmaps

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Cell:
    """One kind of cache: `full`, `none`, or a policy with a budget and bits."""

    policy: str
    budget: int | None = None
    keys_bits: int | None = None
    values_bits: int | None = None

    @property
    def bits(self) -> str:
        """`8`, or `8/4` where keys and values differ."""
        if self.keys_bits == self.values_bits:
            return str(self.keys_bits)
        return f"{self.keys_bits}/{self.values_bits}"

    @property
    def series(self) -> str:
        """What cells that differ in nothing but the budget have in common."""
        return self.policy if self.budget is None else f"{self.policy}, {self.bits} bits"


@dataclass
class Result:
    """A cell's answers, as rows of answers.parquet, and what each batch of them cost.

    costs: `problems`, their number of steps `n_steps`, `seconds_per_problem`, `peak_memory_bytes`.
    """

    cell: Cell
    answers: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)


def write_results(
    folder: Path, results: Sequence[Result], *, split: str, within: float
) -> dict[str, Any]:
    """Write the artefact's files; returns what is in metrics.json.

    Equal answers give equal bytes but for timings.json and the heatmap of latency.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for result in results for row in result.answers]
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers.parquet")
    scores = {result.cell: summarise(result.answers) for result in results}
    costs = {result.cell: summarise_costs(result.costs) for result in results}
    metrics = {
        "split": split,
        "within": within,
        "recommended": recommend(scores, within),
        "recommended_by_steps": {
            steps: recommend(scores, within, steps) for steps in scores[Cell("full")]["by_steps"]
        },
        **_nested(scores),
    }
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "timings.json", _nested(costs))
    write_json(folder / "budgets.json", _plotted(scores))
    for name, title, panels, limits, digits in (
        ("accuracy", "Exact match, %", _panels(scores, "exact_match", 1), (0.0, 100.0), 0),
        (
            "latency",
            "Milliseconds per problem",
            _panels(costs, "seconds_per_problem", 1e3),
            None,
            1,
        ),
    ):
        figure = heatmaps(
            name,
            title,
            panels,
            _columns(results),
            _sweet_spots(results, metrics["recommended_by_steps"]),
            limits=limits,
            digits=digits,
        )
        (folder / f"{name}.png").write_bytes(figure.png)
    return metrics


def summarise(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The quality of one kind of cache.

    exact_match and ci95 in per cent; perplexity of the gold answers and kl (nats) per answer token;
    tokens_kept and bytes_per_problem are means.
    """
    n = len(answers)
    correct = sum(a["correct"] for a in answers)
    tokens = sum(a["answer_tokens"] for a in answers)
    return {
        "n": n,
        "exact_match": 100 * correct / n,
        "ci95": wilson(correct, n),
        "perplexity": math.exp(sum(a["nll"] * a["answer_tokens"] for a in answers) / tokens),
        "kl": sum(a["kl"] * a["answer_tokens"] for a in answers) / tokens,
        "tokens_kept": sum(a["tokens_kept"] for a in answers) / n,
        "bytes_per_problem": sum(a["bytes"] for a in answers) / n,
        "by_steps": {
            str(steps): {"exact_match": 100 * sum(marks) / len(marks), "n": len(marks)}
            for steps, marks in _by_steps(answers, "correct")
        },
    }


def summarise_costs(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean seconds per problem, in all and by number of steps; the highest peak of memory."""

    def seconds(batches: Sequence[dict[str, Any]]) -> float:
        problems = sum(batch["problems"] for batch in batches)
        return sum(b["seconds_per_problem"] * b["problems"] for b in batches) / problems

    peaks = [b["peak_memory_bytes"] for b in costs if b["peak_memory_bytes"] is not None]
    return {
        "seconds_per_problem": seconds(costs),
        "peak_memory_bytes": max(peaks, default=None),
        "by_steps": {
            str(steps): {
                "seconds_per_problem": seconds([b for b in costs if b["n_steps"] == steps])
            }
            for steps, _ in _by_steps(costs, "problems")
        },
    }


def recommend(
    scores: dict[Cell, dict[str, Any]], within: float, steps: str | None = None
) -> dict[str, dict[str, int | None]]:
    """Policy → bits → the smallest budget whose exact match is at most `within` points below full.

    steps: count the problems with this number of steps only. None where no budget of the grid is
    enough.
    """
    if steps is not None:
        scores = {cell: score["by_steps"][steps] for cell, score in scores.items()}
    floor = scores[Cell("full")]["exact_match"] - within
    found: dict[str, dict[str, int | None]] = {}
    for cell, score in sorted(scores.items(), key=lambda item: item[0].budget or 0):
        if cell.budget is not None:
            best = found.setdefault(cell.policy, {})
            if best.setdefault(cell.bits, None) is None and score["exact_match"] >= floor:
                best[cell.bits] = cell.budget
    return found


def recommendation_table(metrics: dict[str, Any]) -> RenderableType:
    """Per policy and bits the recommended budget and what it keeps, beside the full cache."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    full = metrics["full"]
    table = Table(
        title=f"Smallest budget within {metrics['within']:g} points of the full cache",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("cache", overflow="fold")
    for name in ("bits", "budget", "exact\nmatch", "95 %\ninterval", "KL", "tokens", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, bits: str, budget: str, score: dict[str, Any], style: str = "") -> None:
        low, high = score["ci95"]
        table.add_row(
            Text(name),
            bits,
            budget,
            f"{score['exact_match']:.1f} %",
            f"{low:.1f} to {high:.1f}",
            f"{score['kl']:.3f}",
            f"{score['tokens_kept']:.1f}",
            f"{score['bytes_per_problem']:,.0f}",
            style=style,
        )

    row("full", "", "", full, "bold")
    for policy, by_bits in metrics["recommended"].items():
        for bits, budget in by_bits.items():
            if budget is None:
                largest = max(map(int, metrics["policies"][policy]))
                table.add_row(Text(policy), bits, f"> {largest}", *[""] * 5, style="dim")
            else:
                row(policy, bits, str(budget), metrics["policies"][policy][str(budget)][bits])
    row("none", "", "", metrics["none"], "dim")
    words = (
        f"{full['n']:,} {metrics['split']} problems; tokens are those of the chain that a head "
        "sees, bytes what a problem takes, both means; KL to the full cache in nats per token."
    )
    return Group(table, Text(words, style="dim"))


def _by_steps(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[int, list[Any]]]:
    groups: dict[int, list[Any]] = {}
    for row in rows:
        groups.setdefault(row["n_steps"], []).append(row[key])
    return sorted(groups.items())


def _nested(numbers: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """{"full": …, "none": …, "policies": {policy: {budget: {bits: …}}}}"""
    policies: dict[str, dict[str, dict[str, Any]]] = {}
    for cell, entry in numbers.items():
        if cell.budget is not None:
            budgets = policies.setdefault(cell.policy, {})
            budgets.setdefault(str(cell.budget), {})[cell.bits] = entry
    ends = {cell.policy: entry for cell, entry in numbers.items() if cell.budget is None}
    return {**ends, "policies": policies}


def _plotted(scores: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat row per policy, bits and budget; full and none as lines over all budgets."""
    budgets = sorted({cell.budget for cell in scores if cell.budget is not None})
    return [
        {
            "series": cell.series,
            "budget": budget,
            **{name: value for name, value in score.items() if isinstance(value, int | float)},
        }
        for cell, score in scores.items()
        for budget in (budgets if cell.budget is None else [cell.budget])
    ]


def _columns(results: Sequence[Result]) -> list[str]:
    budgets = sorted({r.cell.budget for r in results if r.cell.budget is not None})
    return ["none", *map(str, budgets), "full"]


def _sweet_spots(
    results: Sequence[Result], recommended: dict[str, dict[str, dict[str, int | None]]]
) -> dict[str, set[tuple[int, str]]]:
    """Series → (number of steps, column) of the recommended budgets."""
    spots: dict[str, set[tuple[int, str]]] = {}
    for cell in (result.cell for result in results):
        for steps, by_policy in recommended.items():
            if cell.budget is not None and by_policy[cell.policy][cell.bits] == cell.budget:
                spots.setdefault(cell.series, set()).add((int(steps), str(cell.budget)))
    return spots


def _panels(
    numbers: dict[Cell, dict[str, Any]], name: str, factor: float
) -> dict[str, dict[tuple[int, str], float]]:
    """Series → {(number of steps, column): value}, the ends full and none in every panel."""
    panels: dict[str, dict[tuple[int, str], float]] = {
        cell.series: {} for cell in numbers if cell.budget is not None
    }
    for cell, entry in numbers.items():
        column = cell.policy if cell.budget is None else str(cell.budget)
        for panel in panels if cell.budget is None else [cell.series]:
            for steps, part in entry["by_steps"].items():
                panels[panel][int(steps), column] = factor * part[name]
    return panels
