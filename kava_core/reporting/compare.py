"""Several pipelines or experiments side by side: one table, one page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.findings.base import read_finding
from kava_core.findings.evaluation import MEASURED, EvaluationCosts, Score, Scores, SystemCost
from kava_core.reporting.inputs import read_scores
from kava_core.reporting.style import MUTED, SERIES, Drawing, canvas, finish, looks_of
from kava_core.settings import load_any_pipeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

# Where a pipeline's artefacts record what they were made with: section → file, keys in it.
_RECORDS = {
    "prepare": ("test_sets/test_sets.json", "settings"),
    "teacher": ("teacher/teacher.json", "settings"),
    "targets": ("kv_targets/manifest.json", "settings"),
}
_PLACE = {"teacher-cot": -1, "teacher-no-cot": 1}


@dataclass(frozen=True)
class EvaluatedPipeline:
    """One pipeline's evaluation.

    costs: test set → system; settings: dotted name → value. Both as far as they lie beside the
    evaluation.
    """

    name: str
    evaluation: Path
    scores: Scores
    costs: dict[str, dict[str, SystemCost]]
    settings: dict[str, Any]


def read_pipelines(names: Sequence[str], data: Path) -> list[EvaluatedPipeline]:
    """The evaluations that `names` stand for.

    A name is a pipeline in `data`, or a path: of a pipeline's folder, of an evaluation, or of a
    copy of the project, such as an experiment's, whose active pipeline is meant. KavaError says
    what is missing.
    """
    evaluations = {name: _find(name, data) for name in names}
    if len(evaluations) < len(names) or len(set(evaluations.values())) < len(names):
        raise KavaError(
            f"expected different evaluations, found one twice among {', '.join(names)}. Name each "
            "once."
        )
    if len(names) < 2:
        raise KavaError("expected at least two pipelines to compare. Name another.")
    places = evaluations.values()
    short = [(p.parent if p.name == "evaluation" else p).name for p in places]
    shown = short if len(set(short)) == len(short) else names
    return [_read(name, path) for name, path in zip(shown, places, strict=True)]


def _read(name: str, evaluation: Path) -> EvaluatedPipeline:
    scores, folder = read_scores(evaluation), evaluation.parent
    systems = {system for found in scores.values() for system in found}
    measured = folder / "measured" / MEASURED
    costs = {}
    if measured.is_file():
        costs = read_finding(EvaluationCosts, measured, "evaluate").systems
    return EvaluatedPipeline(name, evaluation, scores, costs, _settings(folder, systems))


def _find(name: str, data: Path) -> Path:
    """The evaluation folder that `name` stands for."""
    given = Path(name)
    places = [data / name / "evaluation", given, given / "evaluation"]
    if (given / "pipelines.yaml").is_file():
        active, _ = load_any_pipeline(given / "pipelines.yaml")
        places.append(given / "data" / active / "evaluation")
    for place in places:
        if (place / "metrics.json").is_file():
            return place.resolve()
    looked = [place for place in places if place != given and place.parent.is_dir()]
    if looked:
        raise KavaError(
            f"{name} has no evaluation: expected {looked[-1] / 'metrics.json'}. Run `kava "
            "evaluate` there first."
        )
    there = sorted(p.parent.name for p in data.glob("*/evaluation"))
    raise KavaError(
        f"{name} is no pipeline in {data} and no folder. Evaluated pipelines there: "
        f"{', '.join(there) or 'none'}. Name one, or a path to an evaluation or an experiment."
    )


def _settings(folder: Path, systems: Collection[str]) -> dict[str, Any]:
    records = dict(_RECORDS)
    for path in sorted(folder.glob("students/*/student.json")):
        if path.parent.name in systems:  # not left over from other settings
            records[f"students.{path.parent.name}"] = (str(path.relative_to(folder)), "settings")
    found: dict[str, Any] = {}
    for section, (file, key) in records.items():
        if (folder / file).is_file():
            _flatten(section, read_json(folder / file).get(key), found)
    return found


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{name}.{key}", inner, into)
    else:
        into[name] = value


def differing(pipelines: Sequence[EvaluatedPipeline]) -> dict[str, list[Any]]:
    """Setting → its value in each pipeline (None: not recorded), where they are not all equal."""
    names = dict.fromkeys(name for m in pipelines for name in m.settings)
    values = {name: [m.settings.get(name) for m in pipelines] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def side_by_side(
    pipelines: Sequence[EvaluatedPipeline],
) -> dict[str, dict[str, list[Score | None]]]:
    """Test set → system → its score in each pipeline.

    The teacher with its chain comes first, then systems by their best score, last the teacher
    asked at once.
    """
    tables = {}
    for test_set in dict.fromkeys(name for m in pipelines for name in m.scores):
        systems = {system for m in pipelines for system in m.scores.get(test_set, {})}
        rows = {s: [m.scores.get(test_set, {}).get(s) for m in pipelines] for s in systems}

        def place(system: str, rows: Any = rows) -> tuple[int, float, str]:
            best = max(score.exact_match for score in rows[system] if score is not None)
            return _PLACE.get(system, 0), -best, system

        tables[test_set] = {system: rows[system] for system in sorted(rows, key=place)}
    return tables


def costs_beside(
    pipelines: Sequence[EvaluatedPipeline], test_set: str, systems: Iterable[str]
) -> dict[str, list[SystemCost | None]]:
    """System → its cost in each pipeline, None where it is not known."""
    return {s: [m.costs.get(test_set, {}).get(s) for m in pipelines] for s in systems}


def as_json(pipelines: Sequence[EvaluatedPipeline]) -> dict[str, Any]:
    """What the table shows, and the settings in which the pipelines differ."""
    names = [m.name for m in pipelines]
    return {
        "evaluations": {m.name: str(m.evaluation) for m in pipelines},
        "test_sets": {
            test_set: {
                system: {
                    name: score.model_dump(mode="json") | (cost.model_dump() if cost else {})
                    for name, score, cost in zip(names, scores, costs[system], strict=True)
                    if score is not None
                }
                for system, scores in rows.items()
            }
            for test_set, rows in side_by_side(pipelines).items()
            for costs in [costs_beside(pipelines, test_set, rows)]
        },
        "settings": {
            setting: dict(zip(names, row, strict=True))
            for setting, row in differing(pipelines).items()
        },
    }


def as_table(pipelines: Sequence[EvaluatedPipeline]) -> RenderableType:
    """Systems × pipelines: exact match with its 95 % interval, forward passes and wall-clock."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("system", overflow="fold")
    for m in pipelines:
        table.add_column(Text(m.name), justify="right", overflow="fold")
    for test_set, rows in side_by_side(pipelines).items():
        asked = {s.n for scores in rows.values() for s in scores if s is not None}
        problems = " or ".join(f"{n:,}" for n in sorted(asked))
        table.add_row(Text(f"{test_set}, {problems} problems", style="bold"))
        costs = costs_beside(pipelines, test_set, rows)
        for system, scores in rows.items():
            table.add_row(Text(system), *map(_cell, scores, costs[system]))
        table.add_section()
    words = "exact match in % with its 95 % interval; forward passes and ms, means per problem."
    return Group(table, Text(words, style="dim"))


def _cell(score: Score | None, cost: SystemCost | None) -> str:
    if score is None:
        return "–"
    low, high = score.ci95
    took = "" if cost is None else f", {1000 * cost.seconds_per_problem:.1f} ms"
    return (
        f"{score.exact_match:.1f} ({low:.1f} to {high:.1f})\n"
        f"[dim]{score.forward_passes:.1f} passes{took}[/dim]"
    )


def as_page(pipelines: Sequence[EvaluatedPipeline]) -> str:
    """The same as one HTML page that needs nothing but itself."""
    from kava_core.reporting.page import render

    tables = side_by_side(pipelines)
    figures = {
        test_set: _dots(f"exact-match-{number}", [m.name for m in pipelines], rows)
        for number, (test_set, rows) in enumerate(tables.items(), start=1)
    }
    return render(
        "compare.html.jinja",
        title="Pipelines compared",
        pipelines=pipelines,
        tables=tables,
        figures=figures,
        costs={name: costs_beside(pipelines, name, rows) for name, rows in tables.items()},
        differing=differing(pipelines),
        looks=looks_of({system for rows in tables.values() for system in rows}),
    )


def _dots(name: str, columns: Sequence[str], rows: Mapping[str, Sequence[Score | None]]) -> Drawing:
    """Exact match with its interval: a line per system, a colour per pipeline."""
    colours = [SERIES[i % len(SERIES)] for i in range(len(columns))]

    def draw() -> Figure:
        from matplotlib.lines import Line2D

        high = max(22, 12 * len(columns) + 8)
        figure = canvas(70 + high * len(rows))
        ax = figure.subplots()
        for row, scores in enumerate(rows.values()):
            for i, (score, colour) in enumerate(zip(scores, colours, strict=True)):
                if score is not None:
                    y = row + (i - (len(columns) - 1) / 2) * 12 / high
                    ax.plot(score.ci95, [y, y], color=colour, linewidth=2, alpha=0.55)
                    ax.plot([score.exact_match], [y], "o", color=colour, markersize=6)
        for row in range(len(rows) - 1):
            ax.axhline(row + 0.5, color=MUTED, linewidth=0.5, dashes=(1, 3))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.grid(visible=False)
        ax.grid(visible=True, axis="x")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        ax.set_xlabel("exact match, with its 95 % interval")
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colour, label=column)
            for column, colour in zip(columns, colours, strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))
        return figure

    return finish(name, "Exact match", "", draw)
