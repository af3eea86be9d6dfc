"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.artefacts import atomic_path, write_json
from kava_core.reporting.examples import Example, choose_examples
from kava_core.reporting.figures import (
    accuracy_by_cost,
    accuracy_by_group,
    accuracy_by_steps,
    gradient_shares,
    loss_curves,
    trace_lengths,
)
from kava_core.reporting.inputs import STAGES, Difference, Findings, Score, Training
from kava_core.reporting.insights import attention_flow, interventions, magnitudes, slot_maps
from kava_core.reporting.style import COLOURS, Figured, looks_of
from kava_core.reporting.systems import Headline, System, headline, systems_of
from kava_core.reporting.truncation import accuracy_by_budget, truncation_maps
from kava_core.reporting.worked import in_order, visible, work_through


@dataclass(frozen=True)
class Comparison:
    """One test set: its systems in order, the gap, paired differences, figures, problems.

    differences: student → baseline.
    """

    test_set: str
    systems: list[System]
    headline: Headline | None
    differences: dict[str, dict[str, Difference]]
    figures: list[Figured]
    examples: list[Example]


def compare(findings: Findings, teacher: Training | None) -> list[Comparison]:
    """The comparison on every test set, the pipeline's own first, figures drawn.

    teacher: how the teacher was trained, None if it was taken as it is.
    """
    comparisons = []
    own = findings.prepare["source"]["name"]
    test_sets = sorted(findings.scores, key=lambda name: (name != own, name))
    for number, test_set in enumerate(test_sets, start=1):
        systems = systems_of(findings, test_set, teacher)
        gap = headline(systems)
        suffix = f"-{number}" if len(findings.scores) > 1 else ""
        figures = [
            accuracy_by_cost(f"accuracy-by-cost{suffix}", systems, gap),
            accuracy_by_steps(f"accuracy-by-steps{suffix}", systems),
            accuracy_by_group(f"accuracy-by-group{suffix}", systems),
        ]
        differences = findings.differences.get(test_set, {})
        asked = [p for p in findings.predictions if p.test_set == test_set]
        examples = choose_examples(asked, [s.name for s in systems], gap)
        comparisons.append(Comparison(test_set, systems, gap, differences, figures, examples))
    return comparisons


def write_report(
    folder: Path,
    findings: Findings,
    comparisons: Sequence[Comparison],
    *,
    title: str,
    pipeline: str,
    settings: dict[str, Any],
    hardware: Mapping[str, str],
) -> None:
    """Write index.html, a PNG per figure and summary.json into `folder`.

    settings: stage → settings, for the stages whose artefacts do not record their own (teacher,
    fidelity, evaluate); hardware: of the machine it runs on. Equal arguments give equal bytes.
    """
    figures = _figures(findings)
    looked = {
        name: [attention_flow(name, insight), magnitudes(name, insight)]
        for name, insight in in_order(findings, comparisons[0].headline).items()
    }
    page = render(
        "page.html.jinja",
        title=title,
        pipeline=pipeline,
        comparisons=comparisons,
        overview=_overview(findings, comparisons),
        figures=figures,
        looked=looked,
        worked=work_through(findings, comparisons[0].headline),
        findings=findings,
        facts=_facts(findings, comparisons),
        stores=_stores(findings),
        settings=_settings(findings, settings),
        fingerprints=_fingerprints(findings),
        seeds=_seeds(findings, settings),
        commands=_commands(pipeline, findings),
        hardware=hardware,
        looks=looks_of(s.name for c in comparisons for s in c.systems),
    )
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    for group in [*figures.values(), *looked.values(), *(c.figures for c in comparisons)]:
        for figure in group:
            with atomic_path(folder / f"{figure.name}.png") as temporary:
                temporary.write_bytes(figure.png)
    write_json(folder / "summary.json", summary(findings, comparisons))


def _figures(findings: Findings) -> dict[str, list[Figured]]:
    """Section → its figures, but for those of the comparison."""
    curves = {name: student.curves for name, student in findings.students.items()}
    measured = {name: findings.similarity[name] for name in curves if name in findings.similarity}
    insights = {name: findings.insights[name] for name in curves if name in findings.insights}
    truncation = findings.truncation
    records = max((s.records for s in measured.values()), default=0)
    sections: dict[str, list[Figured | None]] = {
        "truncation": [truncation_maps(truncation), accuracy_by_budget(truncation)]
        if truncation
        else [],
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


def summary(findings: Findings, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The report's own numbers, for `dvc metrics` and for comparing pipelines.

    gap_share: how far the best latent student is up the gap (1 = at the ceiling); null where there
    is no gap. sweet_spot: the smallest budget near enough to the full cache; null where none is.
    """
    return {
        "test_sets": {
            c.test_set: None
            if c.headline is None
            else {
                "best_latent": c.headline.best.name,
                "baseline": c.headline.baseline.name,
                "ceiling": c.headline.ceiling.name,
                "gap_share": c.headline.share,
            }
            for c in comparisons
        },
        "engaged_percent": findings.targets.engaged_percent,
        "median_trace_tokens": float(_median(findings)),
        "sweet_spot": findings.truncation.spot if findings.truncation else None,
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
    environment.filters["settings"] = _yaml
    environment.filters["token"] = visible
    return str(environment.get_template(template).render(colours=COLOURS, **values))


def _overview(
    findings: Findings, comparisons: Sequence[Comparison]
) -> dict[str, list[Score | None]]:
    """System → its score on every test set; the systems in the order of the first."""
    names = dict.fromkeys(s.name for c in comparisons for s in c.systems)
    return {name: [findings.scores[c.test_set].get(name) for c in comparisons] for name in names}


def _median(findings: Findings) -> float:
    import numpy as np

    return float(np.median(findings.targets.lengths))


def _facts(findings: Findings, comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    manifest = findings.targets.manifest
    geometry = manifest.geometry
    tested = {c.systems[0].score.n for c in comparisons}
    return [
        (f"{manifest.records:,}", "training traces"),
        (" and ".join(f"{n:,}" for n in sorted(tested)), "test problems"),
        (f"{geometry.model_layers} × {geometry.kv_heads}", "layers × KV heads"),
        (str(geometry.slots), "slots kept per layer and head (M)"),
        (f"{findings.targets.engaged_percent:.0f} %", "of (record, layer, head) lose tokens"),
        (readable_bytes(_bytes(manifest)), "of KV targets"),
    ]


def _bytes(manifest: Any) -> int:
    return sum(info.bytes for info in manifest.files.values())


def _stores(findings: Findings) -> list[dict[str, Any]]:
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


def _settings(findings: Findings, settings: dict[str, Any]) -> dict[str, Any]:
    recorded = findings.targets.manifest.settings
    return {
        "prepare": findings.prepare,
        "teacher": settings.get("teacher", {}),
        "generate": recorded.get("generate", {}),
        "evict": recorded.get("evict", {}),
        "fidelity": settings.get("fidelity", {}) if findings.truncation else {},
        **{f"students.{name}": student.plain for name, student in findings.students.items()},
        "evaluate": settings.get("evaluate", {}),
    }


def _fingerprints(findings: Findings) -> list[tuple[str, str]]:
    manifest = findings.targets.manifest
    return [*sorted(manifest.fingerprints.items()), ("kv_targets", manifest.digest)]


def _seeds(findings: Findings, settings: dict[str, Any]) -> list[tuple[str, int]]:
    seeds = [("problems", findings.prepare.get("seed"))]
    training = settings.get("teacher", {}).get("training")
    seeds.append(("teacher", training.get("seed") if training else None))
    seeds.append(("eviction", findings.targets.manifest.settings.get("evict", {}).get("seed")))
    seeds += [(name, s.settings.training.seed) for name, s in findings.students.items()]
    return [(name, seed) for name, seed in seeds if seed is not None]


def _commands(pipeline: str, findings: Findings) -> list[str]:
    first = [stage for stage in STAGES[:5] if stage != "fidelity" or findings.truncation]
    stages = [*first, *(f"distill {name}" for name in findings.students), *STAGES[5:]]
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
