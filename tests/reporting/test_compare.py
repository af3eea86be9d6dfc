"""`kava compare`: what its arguments may be, its table, its page, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from kava_core.artefacts import read_json, write_json
from kava_core.errors import KavaError
from kava_core.findings.base import write_finding
from stages.compare import compare
from tests.reporting.pipeline import Pipeline, make_pipeline
from tests.reporting.test_report import Elements
from tests.reporting.test_stage import SETTINGS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines: the second has one student less, one test set more, and another λ."""
    data = tmp_path_factory.mktemp("compared") / "data"
    make_pipeline(data, name="one")
    make_pipeline(data, name="two", test_sets=("synthetic", "svamp"))
    metrics = read_json(data / "two/evaluation/metrics.json")
    del metrics["synthetic"]["codi"]
    metrics["synthetic"]["kava"].update(exact_match=99.9, ci95=[99.0, 100.0])
    write_finding(data / "two/evaluation/metrics.json", metrics)
    student = read_json(data / "two/students/kava/student.json")
    student["settings"]["alpha_kv"] = 0.25
    write_json(data / "two/students/kava/student.json", student)
    return data


def run(data: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(compare, [*arguments, "--data", str(data)], env={"COLUMNS": "120"})
    if isinstance(result.exception, KavaError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_the_table_has_every_system_of_every_pipeline(data: Path) -> None:
    text = run(data, "one", "two").output
    header = next(line for line in text.splitlines() if line.startswith("system"))
    assert header.split() == ["system", "one", "two"]
    assert text.index("teacher-cot") < text.index("kava") < text.index("teacher-no-cot")
    metrics = read_json(data / "one/evaluation/metrics.json")["synthetic"]
    for name, score in metrics.items():
        low, high = score["ci95"]
        assert f"{score['exact_match']:.1f} ({low:.1f} to {high:.1f})" in text, name
    assert "99.9 (99.0 to 100.0)" in text
    assert any(line.startswith("codi ") and line.endswith("–  ") for line in text.splitlines())
    assert "svamp, 60 problems" in text and "synthetic, 60 problems" in text


def test_json_has_the_numbers_and_where_the_settings_differ(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run(data, "one", "two", "--json", "--output", str(page))
    found = json.loads(result.stdout)
    metrics = read_json(data / "one/evaluation/metrics.json")["synthetic"]
    assert {
        name: by_pipeline["one"]["exact_match"]
        for name, by_pipeline in found["test_sets"]["synthetic"].items()
    } == {name: score["exact_match"] for name, score in metrics.items()}
    assert list(found["test_sets"]["synthetic"]["codi"]) == ["one"]
    assert found["test_sets"]["synthetic"]["kava"]["one"]["seconds_per_problem"] == 0.0033
    assert found["settings"] == {"students.kava.alpha_kv": {"one": 1.0, "two": 0.25}}
    assert page.is_file()


def test_the_page_needs_nothing_but_itself_and_says_where_they_differ(data: Path) -> None:
    run(data, "one", "two")
    html = (data / "compare/one-two.html").read_text()
    elements = Elements(html)
    assert elements.open == []
    assert not {"script", "link", "img"} & {tag for tag, _ in elements.tags}
    assert all("href" not in attributes for tag, attributes in elements.tags if tag == "a")
    assert "<code>students.kava.alpha_kv</code>" in html
    assert html.count("<svg") == 2
    assert "99.9 %" in html
    before = (data / "compare/one-two.html").read_bytes()
    run(data, "one", "two")
    assert (data / "compare/one-two.html").read_bytes() == before


def test_folders_evaluations_and_experiments_stand_for_pipelines(
    data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "experiment"
    shutil.copytree(data / "one", copy / "data/one")
    document = {"pipeline": "one", "pipelines": {"one": SETTINGS}}
    (copy / "pipelines.yaml").write_text(yaml.safe_dump(document))
    names = ["one", str(data / "two"), str(copy)]
    found = json.loads(run(data, *names, "--json").stdout)
    assert found["evaluations"] == {
        "one": str(data / "one/evaluation"),
        str(data / "two"): str(data / "two/evaluation"),
        str(copy): str(copy / "data/one/evaluation"),
    }
    found = json.loads(run(data, "one", str(data / "two/evaluation"), "--json").stdout)
    assert list(found["evaluations"]) == ["one", "two"]
    shutil.copytree(data / "two/evaluation", tmp_path / "kept")
    found = json.loads(run(data, "one", str(tmp_path / "kept"), "--json").stdout)
    assert list(found["evaluations"]) == ["one", "kept"]
    assert found["settings"]["students.kava.alpha_kv"] == {"one": 1.0, "kept": None}
    kava = found["test_sets"]["synthetic"]["kava"]
    assert "seconds_per_problem" in kava["one"] and "seconds_per_problem" not in kava["kept"]


def test_wall_clock_is_shown_where_it_lies_beside_the_evaluation(
    data: Path, tmp_path: Path
) -> None:
    text = run(data, "one", "two").output
    assert "33.4 passes, 14.2 ms" in text
    for name in ("one", "two"):
        shutil.copytree(data / name / "evaluation", tmp_path / name)
    text = run(data, str(tmp_path / "one"), str(tmp_path / "two")).output
    assert "33.4 passes" in text and ".2 ms" not in text


def test_a_student_that_is_no_longer_asked_differs_in_nothing(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    left = tmp_path / "data/two/students/left"
    shutil.copytree(left.parent / "kava", left)
    found = json.loads(run(tmp_path / "data", "one", "two", "--json").stdout)
    assert list(found["settings"]) == ["students.kava.alpha_kv"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "three"], r"three is no pipeline in .*Evaluated pipelines there: one, two\."),
        (["one", "empty"], r"empty has no evaluation: expected .*metrics\.json.*kava evaluate"),
        (["one", "one"], "one twice"),
        (["one", "{data}/one"], "one twice"),
        (["one"], "at least two"),
        (["one", "broken"], r"broken/evaluation/metrics\.json: t → kava → exact_match"),
    ],
)
def test_what_cannot_be_compared_is_explained(
    data: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    own = tmp_path / "data"
    for name in ("one", "two"):
        shutil.copytree(data / name / "evaluation", own / name / "evaluation")
    Pipeline(own, "empty").folder.mkdir()
    if "broken" in names:
        (own / "broken/evaluation").mkdir(parents=True)
        write_json(own / "broken/evaluation/metrics.json", {"t": {"kava": {"n": 1}}})
    with pytest.raises(KavaError, match=message):
        run(own, *(name.format(data=own) for name in names))
    assert not (own / "compare").exists()
