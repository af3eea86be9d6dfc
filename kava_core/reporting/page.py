"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.artefacts import atomic_path, write_json
from kava_core.findings.base import write_finding
from kava_core.findings.evaluation import Difference, Score
from kava_core.findings.latents import INERT_PERCENT
from kava_core.reporting.collapse import RULE
from kava_core.reporting.examples import Example, choose_examples
from kava_core.reporting.figures import (
    accuracy_by_cost,
    accuracy_by_group,
    accuracy_by_steps,
    gradient_shares,
    loss_curves,
    trace_lengths,
)
from kava_core.reporting.inputs import STAGES, PipelineFindings
from kava_core.reporting.insights import attention_flow, interventions, magnitudes, slot_maps
from kava_core.reporting.style import COLOURS, Drawing, looks_of
from kava_core.reporting.systems import Headline, System, headline, systems_of
from kava_core.reporting.truncation import accuracy_by_budget, accuracy_maps
from kava_core.reporting.worked import in_order, visible, work_through


@dataclass(frozen=True)
class ComparisonSection:
    """One test set: its systems in order, the gap, paired differences, figures, problems.

    differences: student → baseline.
    """

    test_set: str
    systems: list[System]
    headline: Headline | None
    differences: dict[str, dict[str, Difference]]
    figures: list[Drawing]
    examples: list[Example]


def compare(findings: PipelineFindings) -> list[ComparisonSection]:
    """The comparison on every test set, the pipeline's own first, figures drawn."""
    comparisons = []
    for number, test_set in enumerate(findings.scores, start=1):
        systems = systems_of(findings, test_set)
        differences = findings.differences.get(test_set, {})
        lead = headline(systems, differences)
        suffix = f"-{number}" if len(findings.scores) > 1 else ""
        figures = [
            accuracy_by_cost(f"accuracy-by-cost{suffix}", systems, lead),
            accuracy_by_steps(f"accuracy-by-steps{suffix}", systems),
            accuracy_by_group(f"accuracy-by-group{suffix}", systems),
        ]
        asked = [p for p in findings.predictions if p.test_set == test_set]
        examples = choose_examples(asked, [s.name for s in systems], lead)
        comparisons.append(
            ComparisonSection(test_set, systems, lead, differences, figures, examples)
        )
    return comparisons


def write_report(
    folder: Path,
    findings: PipelineFindings,
    comparisons: Sequence[ComparisonSection],
    *,
    title: str,
    pipeline: str,
    settings: dict[str, Any],
) -> None:
    """Write index.html, a PNG per figure, summary.json and losses.json into `folder`.

    settings: stage → settings, for the stages whose artefacts do not record their own (teacher,
    fidelity, evaluate). Equal arguments give equal bytes, on any machine. losses.json is for
    `dvc plots`: the loss on the answer of whatever students there are.
    """
    figures = _figures(findings)
    insights = in_order(findings, comparisons[0].headline)
    looked = {
        name: [attention_flow(name, insight), magnitudes(name, insight)]
        for name, insight in insights.items()
    }
    carried = {name: i.interventions for name, i in insights.items() if i.interventions}
    page = render(
        "page.html.jinja",
        title=title,
        pipeline=pipeline,
        comparisons=comparisons,
        overview=_overview(findings, comparisons),
        figures=figures,
        looked=looked,
        carried=carried,
        inert_percent=INERT_PERCENT,
        collapse_rule=RULE,
        worked=work_through(findings, comparisons[0].headline),
        findings=findings,
        facts=_facts(findings, comparisons),
        stores=_stores(findings),
        settings=_settings(findings, settings),
        fingerprints=_fingerprints(findings),
        seeds=_seeds(findings, settings),
        commands=_commands(pipeline, findings, settings),
        looks=looks_of(s.name for c in comparisons for s in c.systems),
    )
    groups = [*figures.values(), *looked.values(), *(c.figures for c in comparisons)]
    write_page(folder, page, [figure for group in groups for figure in group])
    write_json(folder / "summary.json", summary(findings, comparisons))
    write_finding(folder / "losses.json", _losses(findings))


def write_page(folder: Path, page: str, figures: Sequence[Drawing]) -> None:
    """Write index.html and a PNG per figure."""
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    for figure in figures:
        with atomic_path(folder / f"{figure.name}.png") as temporary:
            temporary.write_bytes(figure.png)


def _losses(findings: PipelineFindings) -> list[dict[str, str | int | float]]:
    return [
        {"student": name, "step": step, "loss": loss}
        for name, student in findings.students.items()
        if (curve := student.curves.get("loss_answer"))
        for step, loss in zip(curve.steps, curve.values, strict=True)
    ]


def _figures(findings: PipelineFindings) -> dict[str, list[Drawing]]:
    """Section → its figures, but for those of the comparison."""
    curves = {name: student.curves for name, student in findings.students.items()}
    measured = {name: findings.similarity[name] for name in curves if name in findings.similarity}
    insights = {name: findings.insights[name] for name in curves if name in findings.insights}
    grid = findings.grid
    records = max((s.records for s in measured.values()), default=0)
    sections: dict[str, list[Drawing | None]] = {
        "truncation": [accuracy_maps(grid), accuracy_by_budget(grid)] if grid else [],
        "training": [loss_curves(findings.teacher_curves, curves), gradient_shares(curves)],
        "caches": [
            slot_maps(
                "similarity",
                "Student's latents and the slots that eviction kept",
                "Mean over the heads and the store's first "
                f"{records:,} records of the cosine between a student's cache at each latent and "
                "the teacher's token kept for that slot. Grey: no record has that slot.",
                measured,
            ),
            slot_maps(
                "similarity-full",
                "Student's latents and the teacher's whole trace",
                "The same against the best-matching token of the whole trace.",
                {name: insight.similarity_full for name, insight in insights.items()},
            ),
        ],
        "insights": [interventions(insights)],
        "traces": [trace_lengths(findings.targets)],
    }
    return {name: [f for f in found if f is not None] for name, found in sections.items()}


def summary(findings: PipelineFindings, comparisons: Sequence[ComparisonSection]) -> dict[str, Any]:
    """The report's own numbers, for `dvc metrics` and for comparing pipelines.

    ahead: the system that is, of the best latent student and those without latents; null where they
    cannot be told apart. against: points of exact match that the best latent student is ahead of
    each of the latter. gap_share: how far it is up the gap (1 = at the ceiling); null where there
    is no gap. engaged_percent: of (record, layer, head). sweet_spot: the smallest budget
    near enough to the full cache; null where none is.
    """
    return {
        "test_sets": {
            c.test_set: None
            if c.headline is None
            else {
                "ahead": c.headline.ahead,
                "against": {duel.rival.name: duel.points for duel in c.headline.duels},
                "best_latent": c.headline.best.name,
                "baseline": c.headline.baseline.name,
                "ceiling": c.headline.ceiling.name,
                "gap_share": c.headline.share,
            }
            for c in comparisons
        },
        "engaged_percent": findings.targets.eviction.engaged_percent,
        "median_trace_tokens": float(_median(findings)),
        "sweet_spot": findings.grid.spot if findings.grid else None,
    }


def render(template: str, **values: Any) -> str:
    """A page of `templates/`, in the colours of the figures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("kava_core.reporting"),
        autoescape=True,  # everything: questions and answers are text, whatever they contain
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = lambda figure: Markup(figure.svg)  # ours: figures.py escapes
    environment.filters["size"] = readable_bytes
    environment.filters["duration"] = readable_seconds
    environment.filters["settings"] = _yaml
    environment.filters["token"] = visible
    return str(environment.get_template(template).render(colours=COLOURS, **values))


def _overview(
    findings: PipelineFindings, comparisons: Sequence[ComparisonSection]
) -> dict[str, list[Score | None]]:
    """System → its score on every test set; the systems in the order of the first."""
    names = dict.fromkeys(s.name for c in comparisons for s in c.systems)
    return {name: [findings.scores[c.test_set].get(name) for c in comparisons] for name in names}


def _median(findings: PipelineFindings) -> float:
    import numpy as np

    return float(np.median(findings.targets.lengths))


def _facts(
    findings: PipelineFindings, comparisons: Sequence[ComparisonSection]
) -> list[tuple[str, str]]:
    manifest, eviction = findings.targets.manifest, findings.targets.eviction
    geometry = manifest.geometry
    tested = {c.systems[0].score.n for c in comparisons}
    return [
        (f"{manifest.records:,}", "training traces"),
        (" and ".join(f"{n:,}" for n in sorted(tested)), "test problems"),
        (f"{geometry.model_layers} × {geometry.kv_heads}", "layers × KV heads"),
        (str(geometry.slots), "slots kept per layer and head (M)"),
        (f"{eviction.engaged_percent:.0f} %", "of (record, layer, head) lose tokens"),
        (readable_bytes(_bytes(manifest)), "of KV targets"),
    ]


def _bytes(manifest: Any) -> int:
    return sum(info.bytes for info in manifest.files.values())


def _stores(findings: PipelineFindings) -> list[dict[str, Any]]:
    stores = [("teacher_kv", findings.teacher_kv), ("kv_targets", findings.targets.manifest)]
    return [
        {
            "name": name,
            "records": manifest.records,
            "tokens": manifest.trace_tokens,
            "bytes": _bytes(manifest),
            "codec": f"keys {manifest.codec.keys}, values {manifest.codec.values}",
            "phase": manifest.rotary.phase.replace("pre_rope", "before RoPE").replace(
                "post_rope", "after RoPE"
            ),
        }
        for name, manifest in stores
        if manifest is not None
    ]


def _settings(findings: PipelineFindings, settings: dict[str, Any]) -> dict[str, Any]:
    recorded = findings.targets.manifest.settings
    return {
        "prepare": findings.prepare,
        "teacher": settings.get("teacher", {}),
        **({"traces": settings["traces"]} if settings.get("traces") else {}),
        "generate": recorded.get("generate", {}),
        "evict": recorded.get("evict", {}),
        "fidelity": settings.get("fidelity", {}) if findings.grid else {},
        **{f"students.{name}": student.plain for name, student in findings.students.items()},
        "evaluate": settings.get("evaluate", {}),
    }


def _fingerprints(findings: PipelineFindings) -> list[tuple[str, str]]:
    manifest = findings.targets.manifest
    return [*sorted(manifest.fingerprints.items()), ("kv_targets", manifest.digest)]


def _seeds(findings: PipelineFindings, settings: dict[str, Any]) -> list[tuple[str, int]]:
    seeds = [("problems", findings.prepare.get("seed"))]
    training = settings.get("teacher", {}).get("training")
    seeds.append(("teacher", training.get("seed") if training else None))
    written = settings.get("traces") or {}
    seeds.append(("traces", written.get("seed") if written.get("temperature") else None))
    policy = findings.targets.manifest.settings.get("evict", {}).get("policy", {})
    seeds.append(("eviction", policy.get("seed")))
    seeds += [(name, s.settings.training.seed) for name, s in findings.students.items()]
    return [(name, seed) for name, seed in seeds if seed is not None]


def _commands(pipeline: str, findings: PipelineFindings, settings: dict[str, Any]) -> list[str]:
    there = {"traces": settings.get("traces"), "fidelity": findings.grid}
    first = [stage for stage in STAGES[:6] if there.get(stage, True)]
    if "imports" in settings:
        first = ["prepare"]
    stages = [*first, *(f"distill {name}" for name in findings.students), *STAGES[6:]]
    return [f"kava {stage} --pipeline {pipeline}" for stage in stages]


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88)).rstrip()


def readable_bytes(count: int) -> str:
    """`512 B`, `1.5 kB`, `38.0 TB`; powers of 1000."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def readable_seconds(seconds: float) -> str:
    """`41 s`, `4.6 min`, `3.2 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
