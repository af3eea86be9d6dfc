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
from markupsafe import escape
from rich.console import Console

from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.findings.base import write_finding
from kava_core.findings.evaluation import Difference
from kava_core.reporting.examples import choose_examples
from kava_core.reporting.inputs import PipelineFindings, read_findings
from kava_core.reporting.page import compare, readable_bytes, write_report
from kava_core.reporting.systems import headline, systems_of
from kava_core.reporting.terminal import comparison_table
from tests.reporting.pipeline import TRAINING, Pipeline, make_pipeline


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
def page(findings: PipelineFindings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(findings, tmp_path_factory.mktemp("page"))


def build(findings: PipelineFindings, folder: Path) -> Path:
    write_report(
        folder,
        findings,
        compare(findings),
        title="A title",
        pipeline="made",
        settings={"teacher": {"model": "scratch", "training": TRAINING}},
    )
    return folder


def bare(findings: PipelineFindings) -> PipelineFindings:
    """Without the drawings that take longest."""
    students = {name: replace(s, curves={}) for name, s in findings.students.items()}
    return replace(
        findings,
        similarity={},
        teacher_curves={},
        students=students,
        insights={},
        grid=None,
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


def test_systems_stand_between_the_two_ways_to_ask_the_teacher(findings: PipelineFindings) -> None:
    systems = systems_of(findings, "synthetic")
    assert systems[0].name == "teacher-cot"
    assert systems[-1].name == "teacher-no-cot"
    middle = [s.score.exact_match for s in systems[1:-1]]
    assert middle == sorted(middle, reverse=True)
    kava = next(s for s in systems if s.name == "kava")
    assert kava.how == "8 latents, 3 Jacobi iterations"
    assert kava.taught == "answer + 1 × KV + 1 × CODI"


def test_what_teaches_a_student_is_told_by_its_weights(own: Pipeline) -> None:
    path = own.folder / "students" / "kava" / "student.json"
    student = json.loads(path.read_text(encoding="utf-8"))
    more = {"alpha_kv": {"share": 0.3}, "kv_parts": "keys", "alpha_readout": 0.5}
    student["settings"] |= more
    write_json(path, student)
    found = read_findings(own.folder, own.students)
    kava = next(s for s in systems_of(found, "synthetic") if s.name == "kava")
    assert kava.taught == "answer + keys at 30% of the gradient + 1 × CODI + 0.5 × readout"
    student["settings"] |= {
        **dict.fromkeys(("alpha_kv", "alpha_codi", "alpha_readout"), 0.0),
        "curriculum": {"latents_per_step": 1, "steps": 9, "epochs": None},
    }
    write_json(path, student)
    found = read_findings(own.folder, own.students)
    kava = next(s for s in systems_of(found, "synthetic") if s.name == "kava")
    assert kava.taught == "what is still written, then the answer"


def test_the_gap_is_measured_from_no_cot_to_the_chain_of_thought(
    findings: PipelineFindings,
) -> None:
    systems = systems_of(findings, "synthetic")
    gap = headline(systems, findings.differences["synthetic"])
    assert gap is not None and gap.share is not None
    accuracy = {s.name: s.score.exact_match for s in systems}
    best = max(accuracy[name] for name in ("kava", "codi", "pccot"))
    low, top = accuracy["no-cot"], accuracy["teacher-cot"]
    assert gap.share == pytest.approx((best - low) / (top - low))
    assert f"{100 * gap.share:.0f} % of the way from no-cot ({low:.1f} %)" in gap.sentence


@pytest.mark.parametrize(
    ("latent", "cot", "words"),
    [
        (20.0, 90.0, "kava is below the start of the way"),
        (50.0, 30.0, "There is no way up"),
        (30.0, 90.0, "kava is 0 % of the way"),
        (90.0, 90.0, "kava is 100 % of the way"),
    ],
)
def test_a_gap_that_is_not_climbed_is_said_so(
    own: Pipeline, latent: float, cot: float, words: str
) -> None:
    change_metrics(own, {"kava": score(latent), "no-cot": score(30.0), "teacher-cot": score(cot)})
    found = read_findings(own.folder, own.students)
    gap = headline(systems_of(found, "synthetic"), {})
    assert gap is not None
    assert words in gap.sentence


@pytest.mark.parametrize(
    ("equal_steps", "equal_time", "ahead", "words"),
    [
        (36.5, 80.2, "no-cot-equal-time", "No-CoT is ahead: no-cot-equal-time answers 80.2 %"),
        (36.5, 40.0, "kava", "Latents are ahead: kava answers 50.6 %"),
        (36.5, 50.0, None, "Latents and No-CoT cannot be told apart: kava"),
        (60.0, 50.0, "no-cot", "No-CoT is ahead: no-cot answers 60.0 %"),
    ],
)
def test_it_leads_with_who_is_ahead_against_every_student_without_latents(
    own: Pipeline, equal_steps: float, equal_time: float, ahead: str | None, words: str
) -> None:
    """As the quickstart's students: the interval of a difference is 4 points wide here."""
    systems = {
        "kava": score(50.6),
        "codi": score(40.0),
        "no-cot": score(equal_steps),
        "no-cot-equal-time": score(equal_time),
        "teacher-cot": score(100.0),
    }
    change_metrics(own, systems)
    found = read_findings(own.folder, own.students)
    differences = {
        name: Difference(
            difference=50.6 - other,
            ci95=(48.6 - other, 52.6 - other),
            p_value=0.5,
        )
        for name, other in (("no-cot", equal_steps), ("no-cot-equal-time", equal_time))
    }
    lead = headline(systems_of(found, "synthetic"), {"kava": differences})
    assert lead is not None and lead.ahead == ahead
    assert lead.lead.startswith(words) and lead.sentence.startswith(lead.lead)
    assert [v.rival.name for v in lead.duels] == ["no-cot", "no-cot-equal-time"]
    assert [v.equal_steps for v in lead.duels] == [True, False]
    assert f"In equal steps, no-cot ({equal_steps:.1f} %)" in lead.sentence
    assert (
        f"Trained for 2,300 steps, and kava for 1,000, no-cot-equal-time ({equal_time:.1f} %)"
        in lead.sentence
    )
    other = f"is {abs(50.6 - equal_time):.1f} points {'ahead' if equal_time > 50.6 else 'behind'}"
    assert (other in lead.sentence) == (equal_time != 50.0)
    assert lead.baseline.name == "no-cot"


def test_without_a_student_without_latents_nobody_is_said_to_be_ahead(own: Pipeline) -> None:
    change_metrics(
        own, {"kava": score(50.0), "teacher-cot": score(90.0), "teacher-no-cot": score(10.0)}
    )
    found = read_findings(own.folder, ["kava"])
    lead = headline(systems_of(found, "synthetic"), {})
    assert lead is not None and lead.ahead is None and lead.duels == []
    assert "no student was trained without latents" in lead.lead
    assert "kava is 50 % of the way from teacher-no-cot" in lead.sentence


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
    write_finding(path, {**metrics, "other": metrics["synthetic"]})
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
                inside = ("#", "data:image/png;base64,", "../costs/index.html")
                local = value is not None and value.startswith(inside)
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
        again = build(read_findings(made.folder, made.students), tmp_path)
    finally:
        matplotlib.rcdefaults()
    assert {p.name for p in again.iterdir()} == {p.name for p in page.iterdir()}
    for file in page.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_nothing_measured_is_in_the_report(made: Pipeline, own: Pipeline, tmp_path: Path) -> None:
    """Another machine, slower and elsewhere, makes the same report of the same answers."""
    for name in ("evaluation", "fidelity"):
        (own.folder / "measured" / f"{name}.json").write_text("{}")
    own.log.unlink()
    folders = []
    for which, pipeline in enumerate((made, own)):
        (tmp_path / str(which)).mkdir()
        found = read_findings(pipeline.folder, pipeline.students)
        folders.append(build(bare(found), tmp_path / str(which)))
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name
    words = ("seconds", " ms", "memory")
    for name in ("index.html", "summary.json"):
        text = re.sub(
            r"<svg.*?</svg>|<style>.*?</style>", "", (folders[0] / name).read_text(), flags=re.S
        )
        assert [w for w in words if w in text.replace("Seconds and memory are in", "")] == [], name


def test_losses_of_whatever_students_there_are_are_rows_for_dvc(
    findings: PipelineFindings, page: Path
) -> None:
    rows = json.loads((page / "losses.json").read_text())
    assert {row["student"] for row in rows} == set(findings.students)
    curve = findings.students["codi"].curves["loss_answer"]
    assert [(r["step"], r["loss"]) for r in rows if r["student"] == "codi"] == list(
        zip(curve.steps, curve.values, strict=True)
    )


def test_the_summary_says_who_is_ahead(findings: PipelineFindings, page: Path) -> None:
    found = json.loads((page / "summary.json").read_text())["test_sets"]["synthetic"]
    lead = compare(bare(findings))[0].headline
    assert lead is not None
    assert found["ahead"] == lead.ahead and found["gap_share"] == lead.share
    assert found["against"] == {
        v.rival.name: pytest.approx(lead.best.score.exact_match - v.rival.score.exact_match)
        for v in lead.duels
    }


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


def test_engagement_counts_the_places_that_lose_tokens(findings: PipelineFindings) -> None:
    targets = findings.targets
    assert (targets.smallest, targets.largest) == (8, 8)
    assert targets.eviction.engaged_percent == pytest.approx(100 * (targets.lengths > 8).mean())
    assert 0 < targets.eviction.engaged_percent < 100


def test_the_page_says_how_far_slots_have_an_identity(
    findings: PipelineFindings, page: Path
) -> None:
    html = (page / "index.html").read_text()
    assert findings.targets.eviction.agreement_percent == 100  # the first tokens, everywhere
    for what, how_much in findings.targets.eviction.identity:
        assert f'<th scope="row">{what}</th><td>{escape(how_much)}</td>' in html


def test_examples_show_agreement_of_every_kind(findings: PipelineFindings) -> None:
    systems = systems_of(findings, "synthetic")
    order = [s.name for s in systems]
    gap = headline(systems, findings.differences["synthetic"])
    assert gap is not None
    examples = choose_examples(findings.predictions, order, gap)
    assert len({e.id for e in examples}) == len(examples) == 5
    assert [a.system for a in examples[0].answers] == order
    assert examples[0].why.startswith(f"{gap.best.name} is right, no-cot is not")
    assert examples[1].why.startswith(f"teacher-cot is right, {gap.best.name} is not")
    backwards = choose_examples(findings.predictions[::-1], order, gap)
    assert backwards == examples


def test_the_table_fits_a_terminal_of_80_columns(findings: PipelineFindings) -> None:
    systems = systems_of(findings, "synthetic")
    console = Console(width=80, record=True, file=io.StringIO())
    gap = headline(systems, findings.differences["synthetic"])
    console.print(comparison_table("Made", systems, gap))
    text = console.export_text()
    for system in systems:
        line = next(line for line in text.splitlines() if line.startswith(f"{system.name} "))
        assert f"{system.score.exact_match:.1f} %" in line
        assert f"{system.score.ci95[0]:.1f} to {system.score.ci95[1]:.1f}" in line
        assert "1,000" in line or (system.name == "no-cot-equal-time" and "2,300" in line)
    assert "…" not in text
    assert gap is not None and gap.lead in " ".join(text.split())
    assert text.index("ahead") < text.index("teacher-cot ")
    assert "*" not in text
    assert "of the way from no-cot" in " ".join(text.split())


def test_who_answers_one_thing_to_everything_is_told(own: Pipeline, tmp_path: Path) -> None:
    path = own.folder / "evaluation/metrics.json"
    metrics = json.loads(path.read_text())
    stuck = {"codi": ("<7>", 98.3), "pccot": ("12", 50.0), "kava": ("30", 9.0)}
    for system, (answer, share) in stuck.items():
        commonest = {"answer": answer, "share": share, "gold": 31.0}
        metrics["synthetic"][system]["commonest_answer"] = commonest
    path.write_text(json.dumps(metrics))
    findings = bare(read_findings(own.folder, own.students))
    (tmp_path / "page").mkdir()
    page = (build(findings, tmp_path / "page") / "index.html").read_text()
    assert page.count("of the problems</small>") == 1
    assert ">answers &lt;7&gt; to 98.3 % of the problems</small>" in page
    assert "One answer to 50 % of the problems or more, and to 20 points more" in page
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table("Made", systems_of(findings, "synthetic"), None))
    text = console.export_text()
    assert "* codi answers <7> to 98.3 % of the problems." in text
    assert [line.split()[0] for line in text.splitlines() if " * " in line] == ["codi"]


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("evaluation/metrics.json", "evaluate"),
        ("evaluation/similarity.json", "evaluate"),
        ("evaluation/comparisons.json", "evaluate"),
        ("fidelity/metrics.json", "fidelity"),
        ("evaluation/predictions.parquet", "evaluate"),
        ("kv_targets", "evict"),
        ("students/codi/student.json", "distill codi"),
        ("teacher/metrics.json", "teacher"),
        ("teacher/teacher.json", "teacher"),
        ("problems/metrics.json", "prepare"),
        ("test_sets/metrics.json", "prepare"),
        ("test_sets/test_sets.json", "prepare"),
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
        ("evaluation/interpretability.json", {"kava": {"records": 3}}, "kava → question_parts"),
        ("fidelity/metrics.json", {"split": "test"}, "within: Field required"),
        (
            "evaluation/similarity.json",
            {"kava": {"records": 1, "layers": [0, 1], "keys": [[0.5]], "values": [[0.5]]}},
            "kava: expected one row of slots",
        ),
        (
            "students/kava/student.json",
            {"settings": {}, "fingerprints": {}, "steps": 1},
            "training",
        ),
        (
            "students/kava/student.json",
            {
                "settings": {"training": TRAINING, "reads": "kv_targets"},
                "fingerprints": {"kv_targets": "f" * 64},
                "steps": 1000,
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
        "perplexity": 1.5,
        "by_steps": {"2": {"exact_match": accuracy, "n": 60}},
        "by_operation": {"+": {"exact_match": accuracy, "n": 60}},
        "by_trace_length": {"1-8": {"exact_match": accuracy, "n": 60}},
    }


def change_metrics(made: Pipeline, systems: dict[str, Any]) -> None:
    write_finding(made.folder / "evaluation/metrics.json", {"synthetic": systems})
