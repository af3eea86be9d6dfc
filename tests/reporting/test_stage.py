"""`kava report`: page, figures and table where DVC expects them, and nothing older."""

from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from stages.report import report
from tests.reporting.pipeline import STUDENTS, TRAINING, make_pipeline
from tests.stages.project import digest

SETTINGS = {
    "prepare": {"source": "synthetic", "train": 60, "validation": 60, "test": 60},
    "teacher": {"training": {**TRAINING, "learning_rate": 1e-3}},
    "generate": {},
    "evict": {"budget": 8},
    "students": {
        name: {"reads": "kv_targets", "training": {**TRAINING, "learning_rate": 1e-3}}
        for name in STUDENTS
    },
    "evaluate": {},
    "report": {"title": "Made up"},
}


def run(folder: Path) -> Result:
    pipelines = folder / "pipelines.yaml"
    pipelines.write_text(yaml.safe_dump({"pipeline": "made", "pipelines": {"made": SETTINGS}}))
    return CliRunner().invoke(
        report, ["--pipelines", str(pipelines), "--data", str(folder / "data")]
    )


def test_it_replaces_the_report_with_a_page_and_a_table(tmp_path: Path) -> None:
    made = make_pipeline(tmp_path / "data")
    (made.folder / "report").mkdir()
    (made.folder / "report/left.txt").write_text("from an older report")
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    page = made.folder / "report/index.html"
    table = (page.parent / "table.txt").read_text()
    assert table.startswith("Made up: synthetic")
    for system in ("teacher-cot", "no-cot-equal-time", "kava"):
        assert f"\n{system} " in table
    assert "<h1>Made up</h1>" in page.read_text()
    names = {p.name for p in page.parent.iterdir()}
    assert {"summary.json", "accuracy-by-cost.png", "trace-lengths.png"} <= names
    assert "left.txt" not in names
    assert (made.folder / "kv_targets").is_dir()
    costs = {p.name for p in (made.folder / "costs").iterdir()}
    assert costs == {"index.html", "table.txt", "costs-1.png", "latency.png"}
    assert 'href="../costs/index.html"' in page.read_text()
    assert 'href="../report/index.html"' in (made.folder / "costs/index.html").read_text()
    assert list((tmp_path / "data/.work").iterdir()) == []


def test_again_and_elsewhere_the_report_is_the_same_and_only_the_costs_are_not(
    tmp_path: Path,
) -> None:
    made = make_pipeline(tmp_path / "data")
    assert run(tmp_path).exit_code == 0
    first = digest(made.folder / "report"), digest(made.folder / "costs")
    assert run(tmp_path).exit_code == 0
    assert (digest(made.folder / "report"), digest(made.folder / "costs")) == first
    measured = made.folder / "measured/evaluation.json"
    measured.write_text(measured.read_text().replace("0.0033", "0.0099"))
    made.log.unlink()
    assert run(tmp_path).exit_code == 0
    assert digest(made.folder / "report") == first[0]
    assert digest(made.folder / "costs") != first[1]
