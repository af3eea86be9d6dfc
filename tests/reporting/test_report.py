"""The page and its table, from files as the stages leave them."""

import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.reporting.examples import choose_examples
from kava_core.reporting.inputs import Findings, Training, read_findings
from kava_core.reporting.page import compare, readable_bytes, write_report
from kava_core.reporting.systems import headline, systems_of
from kava_core.reporting.terminal import comparison_table
from tests.reporting.pipeline import TRAINING, Pipeline, make_pipeline

TEACHER = Training.model_validate(TRAINING)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make_pipeline(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture
def own(made: Pipeline, tmp_path: Path) -> Pipeline:
    """A copy that a test may break."""
    shutil.copytree(made.data, tmp_path / "data")
    return Pipeline(tmp_path / "data")


@pytest.fixture(scope="module")
def findings(made: Pipeline) -> Findings:
    return read_findings(made.folder, made.students, made.log)


@pytest.fixture(scope="module")
def page(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(findings, tmp_path_factory.mktemp("page"))


def build(findings: Findings, folder: Path) -> Path:
    write_report(
        folder,
        findings,
        compare(findings, TEACHER),
        title="A title",
        pipeline="made",
        settings={"teacher": {"model": "scratch", "training": TRAINING}},
        hardware={"processor": "a <fast> one"},
    )
    return folder


def bare(findings: Findings) -> Findings:
    """Without the drawings that take longest."""
    students = {name: replace(s, curves={}) for name, s in findings.students.items()}
    return replace(
        findings,
        similarity={},
        teacher_curves={},
        students=students,
        insights={},
        truncation=None,
    )


class Elements(HTMLParser):
    """Every tag with its attributes, and tags that were closed wrongly."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_systems_stand_between_the_two_ways_to_ask_the_teacher(findings: Findings) -> None:
    systems = systems_of(findings, "synthetic", TEACHER)
    assert systems[0].name == "teacher-cot"
    assert systems[-1].name == "teacher-no-cot"
    middle = [s.score.exact_match for s in systems[1:-1]]
    assert middle == sorted(middle, reverse=True)
    kava = next(s for s in systems if s.name == "kava")
    assert kava.how == "8 latents, 3 Jacobi iterations"
    assert kava.taught == "answer + 1 × KV + 1 × CODI"


def test_the_gap_is_measured_from_no_cot_to_the_chain_of_thought(findings: Findings) -> None:
    systems = systems_of(findings, "synthetic", TEACHER)
    gap = headline(systems)
    assert gap is not None and gap.share is not None
    accuracy = {s.name: s.score.exact_match for s in systems}
    best = max(accuracy[name] for name in ("kava", "codi", "pccot"))
    low, top = accuracy["no-cot"], accuracy["teacher-cot"]
    assert gap.share == pytest.approx((best - low) / (top - low))
    assert f"{100 * gap.share:.0f} % of the way from no-cot ({low:.1f} %)" in gap.sentence


@pytest.mark.parametrize(
    ("latent", "cot", "words"),
    [
        (20.0, 90.0, "below the start of the way"),
        (50.0, 30.0, "there is no way up"),
        (30.0, 90.0, "0 % of the way"),
        (90.0, 90.0, "100 % of the way"),
    ],
)
def test_a_gap_that_is_not_climbed_is_said_so(
    own: Pipeline, latent: float, cot: float, words: str
) -> None:
    change_metrics(
        own,
        {
            "kava": score(latent),
            "no-cot": score(30.0),
            "teacher-cot": score(cot),
        },
    )
    found = read_findings(own.folder, own.students)
    gap = headline(systems_of(found, "synthetic", None))
    assert gap is not None
    assert words in gap.sentence
    assert ("overlaps" in gap.sentence) == (latent == 30.0)


def test_any_subset_of_systems_under_any_names_makes_a_page(own: Pipeline, tmp_path: Path) -> None:
    metrics = {"my $\\alpha$ <model>": score(12.0), "teacher-no-cot": score(0.0)}
    change_metrics(own, metrics)
    write_json(own.folder / "evaluation/similarity.json", {})
    shutil.rmtree(own.folder / "curves/teacher")
    (tmp_path / "page").mkdir()
    folder = build(read_findings(own.folder, ["no-cot"]), tmp_path / "page")
    html = (folder / "index.html").read_text()
    assert html.count("my $\\alpha$ &lt;model&gt;") >= 3  # in the table and in both figures
    assert "<model>" not in html
    assert not (folder / "similarity.png").exists()
    assert json.loads((folder / "summary.json").read_text())["test_sets"] == {"synthetic": None}


def test_several_test_sets_have_a_table_and_figures_each(own: Pipeline, tmp_path: Path) -> None:
    path = own.folder / "evaluation/metrics.json"
    metrics = json.loads(path.read_text())
    write_json(path, {**metrics, "other": metrics["synthetic"]})
    (tmp_path / "page").mkdir()
    folder = build(bare(read_findings(own.folder, own.students)), tmp_path / "page")
    assert {p.name for p in folder.glob("accuracy-by-*.png")} == {
        f"accuracy-by-{what}-{number}.png"
        for what in ("cost", "steps", "group")
        for number in (1, 2)
    }


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    html = (page / "index.html").read_text()
    elements = Elements(html)
    assert elements.open == []
    tags = [tag for tag, _ in elements.tags]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    for tag, attributes in elements.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                local = value is not None and value.startswith(("#", "data:image/png;base64,"))
                assert local or (page / str(value)).is_file(), (tag, value)
    assert "url(http" not in html and "@import" not in html
    assert tags.count("svg") == len(list(page.glob("*.png"))) == 17


def test_ids_are_unique_and_references_meet_one(page: Path) -> None:
    html = (page / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(ids)) == len(ids)
    for reference in re.findall(r'(?:href="|url\()#([^")]+)', html):
        assert reference in ids


def test_figures_take_their_colours_from_the_page(page: Path) -> None:
    html = (page / "index.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    for drawing in drawings:
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawing))
        assert colours <= {"#000000", "#ffffff"}  # numbers on the cells of a heatmap
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_equal_findings_give_equal_bytes(made: Pipeline, page: Path, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = 40  # somebody's own settings must not matter
    try:
        again = build(read_findings(made.folder, made.students, made.log), tmp_path)
    finally:
        matplotlib.rcdefaults()
    assert {p.name for p in again.iterdir()} == {p.name for p in page.iterdir()}
    for file in page.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_questions_and_answers_are_text_whatever_they_contain(
    own: Pipeline, tmp_path: Path
) -> None:
    evil = "</p><script>alert(1)</script>{{ 7 * 7 }}<img src=x onerror=alert(1)>&\"'"
    path = own.folder / "evaluation/predictions.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row.update(question=evil, text=evil, answer=evil, gold=evil, id=f"{evil}{row['id']}")
    pq.write_table(pa.Table.from_pylist(rows), path)
    (tmp_path / "page").mkdir()
    folder = build(bare(read_findings(own.folder, own.students)), tmp_path / "page")
    elements = Elements((folder / "index.html").read_text())
    tags = {tag for tag, _ in elements.tags}
    assert elements.open == []
    assert not {"script", "img"} & tags
    html = (folder / "index.html").read_text()
    assert "{{ 7 * 7 }}" in html and "&lt;script&gt;" in html


def test_the_run_log_is_apart_and_may_be_missing(
    made: Pipeline, own: Pipeline, tmp_path: Path
) -> None:
    own.log.write_text(
        own.log.read_text()
        + '{"stage": "evict", "seconds": 600, "started": "2026-02-02T00:00:00", "host": "b"}\n'
        + '{"stage": "tea'
    )
    runs = read_findings(own.folder, own.students, own.log).runs
    assert [r.stage for r in runs][:5] == [
        "prepare",
        "teacher",
        "generate",
        "evict",
        "distill kava",
    ]
    assert next(r for r in runs if r.stage == "evict").seconds == 600
    without = read_findings(made.folder, made.students, tmp_path / "none.jsonl")
    assert without.runs == []
    html = (build(bare(without), tmp_path) / "index.html").read_text()
    assert "started (UTC)" not in html and "processor" in html


def test_engagement_counts_heads_that_lose_tokens(findings: Findings) -> None:
    targets = findings.targets
    assert (targets.smallest, targets.largest) == (8, 8)
    # All layers and heads of a record keep equally many here.
    assert targets.engaged_percent == pytest.approx(100 * (targets.lengths > 8).mean())
    assert 0 < targets.engaged_percent < 100


def test_examples_show_agreement_of_every_kind(findings: Findings) -> None:
    systems = systems_of(findings, "synthetic", TEACHER)
    order = [s.name for s in systems]
    gap = headline(systems)
    assert gap is not None
    examples = choose_examples(findings.predictions, order, gap)
    assert len({e.id for e in examples}) == len(examples) == 5
    assert [a.system for a in examples[0].answers] == order
    assert examples[0].why.startswith(f"{gap.best.name} is right, no-cot is not")
    assert examples[1].why.startswith(f"teacher-cot is right, {gap.best.name} is not")
    backwards = choose_examples(findings.predictions[::-1], order, gap)
    assert backwards == examples


def test_the_table_fits_a_terminal_of_80_columns(findings: Findings) -> None:
    systems = systems_of(findings, "synthetic", TEACHER)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table("Made", systems, headline(systems)))
    text = console.export_text()
    for system in systems:
        line = next(line for line in text.splitlines() if line.startswith(f"{system.name} "))
        assert f"{system.score.exact_match:.1f} %" in line
        assert f"{system.score.ci95[0]:.1f} to {system.score.ci95[1]:.1f}" in line
        assert "1,000" in line
    assert "…" not in text
    assert "of the way from no-cot" in " ".join(text.split())


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("evaluation/metrics.json", "evaluate"),
        ("evaluation/similarity.json", "evaluate"),
        ("evaluation/comparisons.json", "evaluate"),
        ("fidelity/metrics.json", "fidelity"),
        ("fidelity/timings.json", "fidelity"),
        ("evaluation/predictions.parquet", "evaluate"),
        ("kv_targets", "evict"),
        ("students/codi/student.json", "distill codi"),
        ("teacher/metrics.json", "teacher"),
        ("problems/metrics.json", "prepare"),
        ("problems/problems.json", "prepare"),
    ],
)
def test_a_missing_file_is_named_with_its_stage(own: Pipeline, file: str, stage: str) -> None:
    path = own.folder / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(KavaError, match=f"{re.escape(str(path))}.*`kava {stage}`"):
        read_findings(own.folder, own.students)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("evaluation/metrics.json", {}, "no system"),
        ("evaluation/metrics.json", {"t": {"kava": {"n": 3}}}, "t → kava → exact_match"),
        ("evaluation/metrics.json", [1], "found"),
        ("evaluation/comparisons.json", {"t": {"kava": {"codi": 3}}}, "t → kava → codi"),
        ("evaluation/interpretability.json", {"kava": {"records": 3}}, "kava → decoded"),
        ("fidelity/metrics.json", {"split": "test"}, "within: Field required"),
        (
            "evaluation/similarity.json",
            {"kava": {"records": 1, "layers": [0, 1], "keys": [[0.5]], "values": [[0.5]]}},
            "kava: expected one row of slots",
        ),
        ("students/kava/student.json", {"settings": {}, "fingerprints": {}}, "training"),
        (
            "students/kava/student.json",
            {
                "settings": {"training": TRAINING, "reasoning": "jacobi"},
                "fingerprints": {"kv_targets": "f" * 64},
            },
            "student kava was made from the targets ffffffffffff…",
        ),
    ],
)
def test_a_file_with_wrong_content_is_explained(
    own: Pipeline, file: str, value: Any, message: str
) -> None:
    write_json(own.folder / file, value)
    with pytest.raises(KavaError, match=message):
        read_findings(own.folder, own.students)


def test_a_curve_that_is_no_table_is_named_with_its_line(own: Pipeline) -> None:
    curve = own.folder / "curves/students/kava/plots/metrics/loss.tsv"
    curve.write_text("step\tloss\n10\t1.5\nten\t1.4\n")
    with pytest.raises(KavaError, match=r"loss\.tsv, line 3"):
        read_findings(own.folder, own.students)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_960, "1.0 MB"), (38e12, "38.0 TB")],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def score(accuracy: float) -> dict[str, Any]:
    return {
        "exact_match": accuracy,
        "ci95": [max(0.0, accuracy - 4), min(100.0, accuracy + 4)],
        "n": 60,
        "forward_passes": 3.0,
        "tokens": 3.0,
        "seconds_per_problem": 0.002,
        "perplexity": 1.5,
        "peak_memory_mb": 20.0,
        "by_steps": {"2": {"exact_match": accuracy, "n": 60}},
        "by_operation": {"+": {"exact_match": accuracy, "n": 60}},
        "by_trace_length": {"1-8": {"exact_match": accuracy, "n": 60}},
    }


def change_metrics(made: Pipeline, systems: dict[str, Any]) -> None:
    write_json(made.folder / "evaluation/metrics.json", {"synthetic": systems})
