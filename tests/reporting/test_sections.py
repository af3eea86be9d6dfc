"""The page's later sections: differences, truncation, latents; and what they say when off."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.findings.base import read_finding, write_finding
from kava_core.findings.latents import Insights
from kava_core.reporting.inputs import PipelineFindings, read_findings
from kava_core.reporting.page import compare, summary
from kava_core.reporting.systems import headline, systems_of
from kava_core.reporting.truncation import accuracy_by_budget, accuracy_maps, by_width, read_grid
from kava_core.reporting.worked import visible, work_through
from tests.reporting.pipeline import Pipeline, make_pipeline
from tests.reporting.test_report import build


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    data = tmp_path_factory.mktemp("made") / "data"
    return make_pipeline(data, test_sets=("synthetic", "svamp"))


@pytest.fixture(scope="module")
def findings(made: Pipeline) -> PipelineFindings:
    return read_findings(made.folder, made.students)


@pytest.fixture(scope="module")
def page(findings: PipelineFindings, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = build(findings, tmp_path_factory.mktemp("page"))
    return (folder / "index.html").read_text()


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def test_every_test_set_has_its_comparison_and_the_own_one_is_first(
    findings: PipelineFindings, page: str
) -> None:
    comparisons = compare(findings)
    assert [c.test_set for c in comparisons] == ["synthetic", "svamp"]
    assert {p.test_set for p in findings.predictions} == {"synthetic", "svamp"}
    for name in ("synthetic", "svamp"):
        assert f"<h3>{name}, 60 test problems</h3>" in page
    for number in (1, 2):
        assert f'id="accuracy-by-cost-{number}"' in page
    assert set(summary(findings, comparisons)["test_sets"]) == {"synthetic", "svamp"}


def test_differences_are_shown_with_their_interval_and_clear_ones_are_bold(
    findings: PipelineFindings, page: str
) -> None:
    found = findings.differences["synthetic"]["kava"]["no-cot"]
    assert found.clear == (found.ci95[0] > 0 or found.ci95[1] < 0)
    cell = f">{found.difference:+.1f}<small>{found.ci95[0]:.1f} to {found.ci95[1]:.1f}</small>"
    assert cell.replace("-", "−") in page
    clear = sum(
        d.clear
        for by_student in findings.differences.values()
        for by_other in by_student.values()
        for d in by_other.values()
    )
    assert page.count('class="n clear"') == clear > 0


def test_the_policy_that_needs_fewest_slots_is_shown_with_its_sweet_spots(
    made: Pipeline, page: str
) -> None:
    found = read_grid(made.folder / "fidelity")
    assert found is not None
    assert (found.policy, found.bits, found.budgets, found.steps) == (
        "rkv",
        "16",
        [2, 4, 8, 16],
        [2, 3, 4],
    )
    metrics = json.loads((made.folder / "fidelity/metrics.json").read_text())
    full = metrics["full"]["by_steps"]
    for n in found.steps:  # by the definition, from the raw numbers
        near = [
            m
            for m in found.budgets
            if metrics["policies"]["rkv"][str(m)]["16"]["by_steps"][str(n)]["exact_match"]
            >= full[str(n)]["exact_match"] - 2
        ]
        assert found.metrics.recommended_by_steps[n]["rkv"]["16"] == min(near)
    assert f"M = {found.spot} slots per layer and head are enough" in text_of(page)
    maps = accuracy_maps(found)
    labels = ["budget M (slots per layer and head)", "4 steps", "none", "full"]
    for label in [*labels, "rkv, 16 bits", "rkv, 4 bits", "random, 16 bits", "random, 4 bits"]:
        assert label in maps.svg
    assert found.series == [("rkv", "16"), ("random", "16"), ("rkv", "4"), ("random", "4")]
    spots = found.metrics.recommended_by_steps.values()
    framed = sum(spot is not None for s in spots for b in s.values() for spot in b.values())
    assert maps.svg.count("var(--series-2)") == framed >= 2 * len(found.steps)
    lines = accuracy_by_budget(found)
    assert "random" in lines.svg and "rkv" in lines.svg


def test_bits_stand_from_the_most_to_the_fewest() -> None:
    assert by_width(["4", "8/4", "16", "32", "8"]) == ["32", "16", "8", "8/4", "4"]


def test_a_grid_without_a_sweet_spot_says_so(made: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(made.folder / "fidelity", tmp_path / "fidelity")
    path = tmp_path / "fidelity/metrics.json"
    metrics = json.loads(path.read_text())
    for spots in [metrics["recommended"], *metrics["recommended_by_steps"].values()]:
        for by_bits in spots.values():
            by_bits.update(dict.fromkeys(by_bits))
    write_finding(path, metrics)
    found = read_grid(tmp_path / "fidelity")
    assert found is not None and found.spot is None
    assert "var(--series-2)" not in accuracy_maps(found).svg
    del metrics["policies"]["random"]["4"]
    write_json(path, metrics)
    with pytest.raises(KavaError, match="every policy with the same budgets"):
        read_grid(tmp_path / "fidelity")


def test_one_problem_is_worked_through_by_every_latent_student(findings: PipelineFindings) -> None:
    gap = headline(systems_of(findings, "synthetic"), findings.differences["synthetic"])
    assert gap is not None
    thoughts = work_through(findings, gap)
    assert thoughts[0].student == gap.best.name
    assert {t.student for t in thoughts} == set(findings.insights)
    assert len({t.decoded.id for t in thoughts}) == 1
    first = thoughts[0]
    assert first.answer is not None and first.answer.id == first.decoded.id
    solved = [
        d.id
        for d in findings.insights[gap.best.name].decoded
        if any(p.correct for p in findings.predictions if (p.system, p.id) == (gap.best.name, d.id))
    ]
    assert first.decoded.id == (solved or [d.id for d in findings.insights["kava"].decoded])[0]
    assert first.kept == {1, 2, 3, 5, 8, 10, 12}
    assert work_through(replace(findings, insights={}), gap) == []


def test_student_and_teacher_tokens_stand_side_by_side(
    findings: PipelineFindings, page: str
) -> None:
    table = page[page.index('class="decoded"') : page.index("</table>", page.index("decoded"))]
    gap = headline(systems_of(findings, "synthetic"), findings.differences["synthetic"])
    slots = work_through(findings, gap)[0].decoded.iterations[-1].slots
    rows = re.findall(r"<tr><th scope=\"row\">(\d+)</th>(.*?)</tr>", table)
    assert [int(number) for number, _ in rows] == list(range(1, len(slots) + 1))
    for (_, row), slot in zip(rows, slots, strict=True):
        for token, share in [*slot.student, *slot.teacher]:
            assert f"{visible(token)} {100 * share:.0f}" in text_of(row)


@pytest.mark.parametrize(
    ("token", "shown"), [(" 4", "␣4"), ("Ġthe", "␣the"), ("\n", "↵"), ("", "∅"), ("<s>", "<s>")]
)
def test_tokens_can_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_what_is_turned_off_is_said_in_a_line(made: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(made.data, tmp_path / "data")
    own = Pipeline(tmp_path / "data")
    shutil.rmtree(own.folder / "fidelity")
    (own.folder / "evaluation/interpretability.json").unlink()
    found = read_findings(own.folder, own.students)
    students = {name: replace(s, curves={}) for name, s in found.students.items()}
    found = replace(found, students=students, teacher_curves={})
    (tmp_path / "page").mkdir()
    page = (build(found, tmp_path / "page") / "index.html").read_text()
    assert "The fidelity stage has not run in this pipeline" in page
    assert "<code>evaluate.interpret_records</code> is 0" in page
    assert "kava fidelity --pipeline made\nkava" not in page
    assert not list((tmp_path / "page").glob("attention-*.png"))
    assert summary(found, compare(found))["sweet_spot"] is None


def cells(row: str) -> list[str]:
    return [text_of(cell).strip() for cell in re.findall(r"<td class=\"n\">(.*?)</td>", row)]


def test_what_the_latents_carry_stands_beside_the_accuracies(
    findings: PipelineFindings, page: str
) -> None:
    section = page[page.index('id="comparison"') : page.index("Paired differences")]
    assert section.index('class="comparison"') < section.index('id="carried"')
    assert page.count('id="carried"') == 1  # the pipeline's own test set
    table = section[section.index('id="carried"') :]
    rows = dict(re.findall(r"<span class=\"swatch\".*?></span>(\S+)</th>(.*?)</tr>", table))
    assert set(rows) == {n for n, i in findings.insights.items() if i.interventions is not None}
    assert cells(rows["kava"]) == [
        "61.7 % 49.0 to 72.9",
        "10.0 % 4.7 to 20.1",
        "15.0 % 8.1 to 26.1",
        "60.0 % 47.4 to 71.4 inert",
        "11.7 % 5.8 to 22.2",
        "83.3 % 71.3 to 91.0 of 54; untouched 7.4 %",
    ]
    assert "at most 5 % of the answers are others" in text_of(section)


def test_each_latent_and_iteration_is_told(findings: PipelineFindings, page: str) -> None:
    told = page[page.index("Each latent and iteration of kava") :]
    told = told[: told.index("</details>")]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", told)
    assert [name for name, _ in rows] == [*map(str, range(1, 9)), "exact match"]
    found = findings.insights["kava"].interventions
    assert found is not None and found.alone.donor is not None
    for i, (_, row) in enumerate(rows[:-1]):
        three = (found.alone.removed[i], found.alone.mean[i], found.alone.donor[i])
        for changed, cell in zip(three, cells(row), strict=False):
            assert cell.startswith(f"{changed.exact_match:.1f} %")
            assert cell.endswith("inert") == changed.inert
    assert {c.inert for c in found.alone.removed} == {True, False}
    assert [cell.split()[0] for cell in cells(rows[-1][1])] == ["8.3", "50.0", "61.7"]


def test_what_cannot_be_changed_is_a_dash(findings: PipelineFindings, tmp_path: Path) -> None:
    """One latent has no other slot, one problem no donor, sequential reasoning no iterations."""
    insight = findings.insights["kava"]
    found = insight.interventions
    assert found is not None
    bare = found.model_copy(
        update={
            "together": found.together.model_copy(update={"shuffled": None, "donor": None}),
            "alone": found.alone.model_copy(update={"donor": None}),
            "iterations": [],
        }
    )
    insights = {"kava": insight.model_copy(update={"interventions": bare})}
    page = (build(replace(findings, insights=insights), tmp_path) / "index.html").read_text()
    table = page[page.index('id="carried"') : page.index("Paired differences")]
    assert cells(table)[3:] == ["–", "–", "–"]
    assert "the answer reads the latents of" not in page


def test_without_interventions_the_rest_of_the_latents_is_shown(
    findings: PipelineFindings, tmp_path: Path
) -> None:
    insights = {"kava": findings.insights["kava"].model_copy(update={"interventions": None})}
    students = {"kava": replace(findings.students["kava"], curves={})}
    bare = replace(findings, insights=insights, students=students, grid=None)
    page = (build(bare, tmp_path) / "index.html").read_text()
    assert "<code>evaluate.intervention_problems</code> is 0" in page
    assert (tmp_path / "attention-kava.png").is_file()
    assert not (tmp_path / "interventions.png").exists()
    assert "Do the latents carry it?" not in page


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("decoded", 0, "iterations"), [], "kava → decoded → 0 → iterations: List should have"),
        (("decoded", 0, "trace"), ["a"], "teacher positions within the 1 tokens"),
        (("attention", "targets"), ["latents"], "a row per source and a column per target"),
        (("interventions", "none"), 101.0, "kava → interventions → none"),
        (("interventions", "alone", "mean"), [], "as many latents removed, mean-filled"),
        (("interventions", "together", "donor"), None, "donors for all latents and for each"),
    ],
)
def test_insights_that_do_not_fit_are_refused_by_name(
    made: Pipeline, tmp_path: Path, place: tuple[str | int, ...], value: object, message: str
) -> None:
    insights = json.loads((made.folder / "evaluation/interpretability.json").read_text())
    inner = insights["kava"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_json(tmp_path / "interpretability.json", insights)
    with pytest.raises(KavaError, match=f"{message}.*Run `kava evaluate` again"):
        read_finding(Insights, tmp_path / "interpretability.json", "evaluate")


def test_provenance_names_commands_and_settings(page: str) -> None:
    text = text_of(page)
    for stage in ("prepare", "teacher", "generate", "evict", "fidelity", "distill kava", "report"):
        assert f"kava {stage} --pipeline made" in text
    for section in ("Fingerprints", "Seeds", "Software", "Settings"):
        assert section in text
