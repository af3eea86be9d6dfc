"""The costs beside the report: seconds, memory, machines, and who is ahead in equal time."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.reporting.costs import training_times, write_costs
from kava_core.reporting.inputs import (
    PipelineCosts,
    PipelineFindings,
    read_costs,
    read_findings,
)
from kava_core.reporting.page import compare, readable_seconds
from tests.reporting.pipeline import Pipeline, make_pipeline
from tests.reporting.test_report import Elements, bare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make_pipeline(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture
def own(made: Pipeline, tmp_path: Path) -> Pipeline:
    """A copy that a test may break."""
    shutil.copytree(made.data, tmp_path / "data")
    return Pipeline(tmp_path / "data")


@pytest.fixture(scope="module")
def findings(made: Pipeline) -> PipelineFindings:
    return read_findings(made.folder, made.students)


@pytest.fixture(scope="module")
def costs(made: Pipeline) -> PipelineCosts:
    return read_costs(made.folder, made.students, made.log)


def build(costs: PipelineCosts, findings: PipelineFindings, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    comparisons = compare(bare(findings))
    write_costs(folder, costs, findings, comparisons, title="A title", pipeline="made")
    return folder


def test_the_page_has_seconds_memory_machine_and_runs(
    costs: PipelineCosts, findings: PipelineFindings, tmp_path: Path
) -> None:
    folder = build(costs, findings, tmp_path / "costs")
    html = (folder / "index.html").read_text()
    elements = Elements(html)
    assert elements.open == []
    links = {attributes["href"] for tag, attributes in elements.tags if tag == "a"}
    assert links == {"../report/index.html", "costs-1.png", "latency.png"}
    assert {path.name for path in folder.iterdir()} == {
        "index.html",
        "table.txt",
        "costs-1.png",
        "latency.png",
    }
    for shown in ("14.2", "25.5 MB", "a &lt;fast&gt; one", "started (UTC)", "2026-01-02 03:04:00"):
        assert shown in html
    table = (folder / "table.txt").read_text()
    row = next(line for line in table.splitlines() if line.startswith("teacher-cot "))
    assert row.split() == ["teacher-cot", "14.2", "12.5", "MB", "–"]
    again = build(costs, findings, tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_the_latency_of_every_policy_and_bits_is_drawn_with_its_sweet_spots(
    costs: PipelineCosts, findings: PipelineFindings, tmp_path: Path
) -> None:
    html = (build(costs, findings, tmp_path / "costs") / "index.html").read_text()
    assert findings.grid is not None
    drawing = html[html.index('<figure id="latency">') :]
    for policy, bits in findings.grid.series:
        assert f"{policy}, {bits} bits" in drawing
    spots = findings.grid.metrics.recommended_by_steps.values()
    framed = sum(spot is not None for s in spots for b in s.values() for spot in b.values())
    assert drawing.count("var(--series-2)") == framed > 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1.05, r"In equal time \(1\.8 min\), no-cot"),
        (2.0, r"In 200% of that time \(3\.3 min\), no-cot"),
    ],
)
def test_equal_time_is_what_the_run_log_says(
    findings: PipelineFindings, seconds: float, words: str
) -> None:
    comparisons = compare(bare(findings))
    lead = comparisons[0].headline
    assert lead is not None
    training: dict[str, float | None] = {lead.best.name: 100.0, "no-cot": 100 * seconds}
    said = training_times(comparisons, training)
    assert re.search(words, said) and lead.duels[0].outcome in said
    assert said.startswith(f"Training {lead.best.name}, the best latent student, took 1.7 min.")
    assert training_times(comparisons, {**training, lead.best.name: None}) == ""


def test_the_run_log_may_be_missing_or_torn(own: Pipeline, tmp_path: Path) -> None:
    own.log.write_text(
        own.log.read_text()
        + '{"stage": "evict", "seconds": 600, "started": "2026-02-02T00:00:00", "host": "b"}\n'
        + '{"stage": "tea'
    )
    runs = read_costs(own.folder, own.students, own.log).runs
    assert [r.stage for r in runs][:5] == [
        "prepare",
        "teacher",
        "generate",
        "evict",
        "distill kava",
    ]
    assert next(r for r in runs if r.stage == "evict").seconds == 600
    without = read_costs(own.folder, own.students, tmp_path / "none.jsonl")
    assert without.runs == []
    found = read_findings(own.folder, own.students)
    html = (
        build(without, replace(found, grid=None), tmp_path / "costs") / "index.html"
    ).read_text()
    assert "started (UTC)" not in html and "processor" in html and "latency" not in html


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("evaluation", None, "is missing. Run `kava evaluate` first"),
        ("fidelity", None, "is missing. Run `kava fidelity` first"),
        ("evaluation", {"hardware": {}, "systems": {"t": {"kava": {}}}}, "seconds_per_problem"),
        ("fidelity", {"hardware": {}}, "full: Field required"),
    ],
)
def test_a_wrong_or_missing_file_is_named(
    own: Pipeline, name: str, value: Any, message: str
) -> None:
    path = own.folder / "measured" / f"{name}.json"
    path.unlink()
    if value is not None:
        write_json(path, value)
    with pytest.raises(KavaError, match=f"{name}\\.json.*{re.escape(message)}"):
        read_costs(own.folder, own.students, own.log)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (276, "4.6 min"), (11_520, "3.2 h")]
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text
