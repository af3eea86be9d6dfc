"""Means over seeds, what is compared, and the files."""

from __future__ import annotations

import csv
import io
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kava_core.errors import KavaError
from kava_core.findings.differences import holm, seeded_difference
from kava_core.findings.latents import InterventionScores
from kava_core.findings.ranks import spearman
from kava_core.findings.scores import CommonestAnswer
from kava_core.findings.study import CellAnswer, CellAnswers, StoreFidelity, StudySummary
from kava_core.findings.tables import read_table
from kava_core.reporting.study import as_page, as_table
from kava_core.studies.plan import StudyCell, StudyPlan
from kava_core.studies.summary import summarise, write_study
from tests.studies.test_plan import plan

SHARES = {"kava": 0.9, "no-cot": 0.3, "teacher-cot": 1.0, "teacher-no-cot": 0.1}


@pytest.fixture
def small(tmp_path: Path) -> StudyPlan:
    grid = {"evict.budget": [4, 8]}
    return plan(tmp_path, {"grid": grid, "baseline": "no-cot", "split": "test"})


def answers(found: StudyPlan) -> dict[StudyCell, CellAnswers]:
    """As if every system answered its share of 50 problems."""
    draw = random.Random(0)
    return {
        cell: CellAnswers(
            ids=[f"p{i}" for i in range(50)],
            correct=[draw.random() < SHARES[cell.system] for _ in range(50)],
            passes=[4] * 50,
        )
        for cell in found.cells
    }


def test_groups_are_over_seeds_and_comparisons_at_each_point(small: StudyPlan) -> None:
    found = answers(small)
    summary = summarise(small, found, {}, {})
    groups = {(group.variant, group.system): group for group in summary.groups}
    assert list(groups) == [
        ("", "teacher-cot"),
        ("", "teacher-no-cot"),
        ("evict.budget=4", "kava"),
        ("", "no-cot"),
        ("evict.budget=8", "kava"),
    ]
    kava = groups["evict.budget=8", "kava"]
    marks = [
        found[cell].correct
        for cell in small.cells
        if (cell.variant, cell.system) == (kava.variant, "kava")
    ]
    assert kava.seeds == [0, 1] and kava.n == 50 and kava.forward_passes == 4
    assert kava.exact_match == [2.0 * sum(row) for row in marks]
    assert kava.mean == statistics.mean(kava.exact_match)
    assert kava.deviation == pytest.approx(statistics.stdev(kava.exact_match))
    assert groups["", "teacher-cot"].deviation is None
    baseline = [found[cell].correct for cell in small.cells if cell.system == "no-cot"]
    first, second = summary.compared
    assert second.difference == seeded_difference(marks, baseline)
    assert [first.p_holm, second.p_holm] == holm(
        [first.difference.p_value, second.difference.p_value]
    )
    assert summarise(small, found, {}, {}) == summary


def test_what_is_missing_is_told_and_makes_no_p_value_smaller(small: StudyPlan) -> None:
    found = answers(small)
    whole = summarise(small, found, {}, {})
    left = small.only({cell for cell in small.cells if "=4" not in cell.variant})
    part = summarise(left, {cell: found[cell] for cell in left.cells}, {}, {})
    (compared,) = part.compared
    assert compared.difference == whole.compared[1].difference
    assert compared.p_holm == min(1.0, 2 * compared.difference.p_value)
    assert part.missing_cells == 2 and "missing" not in whole.model_dump_json()
    page = as_page(part)
    assert "2 cells are missing" in page and "by Holm over 2 comparisons" in page


def test_the_files_have_every_answer_and_the_same_bytes_again(
    small: StudyPlan, tmp_path: Path
) -> None:
    found = answers(small)
    summary = summarise(small, found, {}, {})
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write_study(folder, small, found, {}, {}, summary)
    for name in ("results.csv", "answers.parquet", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert as_page(summary) == as_page(summary)
    with (one / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(small.cells)
    table = read_table(CellAnswer, one / "answers.parquet", "study s")
    for row, cell in zip(rows, small.cells, strict=True):
        seed = "" if cell.seed is None else str(cell.seed)
        assert (row["variant"], row["system"], row["seed"]) == (cell.variant, cell.system, seed)
        own = [
            answer
            for answer in table
            if (answer.variant, answer.system, answer.seed)
            == (cell.variant, cell.system, cell.seed)
        ]
        assert [answer.correct for answer in own] == found[cell].correct
        assert float(row["exact_match"]) == 2 * sum(found[cell].correct)
    read = StudySummary.model_validate_json((one / "summary.json").read_text())
    assert read == summary


def test_the_page_shows_it_all(small: StudyPlan) -> None:
    page = as_page(summarise(small, answers(small), {}, {}))
    for words in ("kava", "evict.budget=8", "no-cot", "50 test problems", "Holm over 2", "t-test"):
        assert words in page
    assert "one seed" not in page


def test_one_seed_is_told_to_say_nothing_of_others(tmp_path: Path) -> None:
    one = plan(tmp_path, {"seeds": [0], "baseline": "no-cot"})
    summary = summarise(one, answers(one), {}, {})
    assert summary.compared[0].difference.p_seeds is None
    assert "With one seed the bootstrap&#39;s alone" in as_page(summary)


def test_who_answers_one_thing_is_told_with_its_seed(small: StudyPlan, tmp_path: Path) -> None:
    found = answers(small)
    shares = {("kava", 0): 70.0, ("kava", 1): 99.0, ("no-cot", 0): 10.0, ("teacher-cot", None): 70}
    for cell in small.cells:
        if cell.variant != "evict.budget=8" and (cell.system, cell.seed) in shares:
            said = CommonestAnswer(answer="<7>", share=shares[cell.system, cell.seed], gold=51.0)
            found[cell] = found[cell].model_copy(update={"commonest_answer": said})
    summary = summarise(small, found, {}, {})
    page, told = as_page(summary), io.StringIO()
    Console(file=told, width=200).print(as_table(summary))
    line = "kava evict.budget=4, seed 1, answers <7> to 99.0 % of the problems."
    assert line in told.getvalue() and line.replace("<7>", "&lt;7&gt;") in page
    assert page.count("of the problems.") == told.getvalue().count("of the problems.") == 1
    assert StudySummary.model_validate_json(summary.model_dump_json()) == summary
    write_study(tmp_path, small, found, {}, {}, summary)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(r["variant"], r["system"], r["seed"]): r for r in csv.DictReader(file)}
    assert rows["evict.budget=4", "kava", "1"]["commonest_share"] == "99.0000"
    assert rows["evict.budget=8", "kava", "1"]["commonest_share"] == ""


def test_cells_of_before_commonest_answers_are_read(small: StudyPlan) -> None:
    old = CellAnswers.model_validate({"ids": ["a"], "correct": [True], "passes": [3]})
    assert old.commonest_answer is None
    assert "commonest" not in summarise(small, answers(small), {}, {}).model_dump_json()


def changed(followed: float | None) -> InterventionScores:
    """As if so many per cent of 40 answers followed a donor; None: no donor has another answer."""
    difference = {"difference": 0.0, "ci95": (0.0, 0.0), "p_value": 1.0}
    same = {"exact_match": 50.0, "ci95": (40.0, 60.0), "difference": difference, "changed": 9.0}
    follows = followed and {"share": followed, "ci95": (0.0, 100.0), "n": 40, "untouched": 2.5}
    given = {**same, "exact_match": 10.0, "changed": 80.0, "follows": follows}
    together = {"removed": same, "mean": {**same, "changed": 8.0}, "shuffled": None, "donor": given}
    alone = {"removed": [same], "mean": [same], "donor": [given]}
    plain = {"n": 50, "none": 90.0, "ci95": (80.0, 95.0), "iterations": []}
    return InterventionScores.model_validate({**plain, "together": together, "alone": alone})


def test_what_latents_carry_is_told_for_every_seed(tmp_path: Path) -> None:
    small = plan(tmp_path, {"interventions": 50, "split": "test"})
    asked = [cell for cell in small.cells if cell.changed]
    assert [(cell.system, cell.seed) for cell in asked] == [("kava", 0), ("kava", 1)]
    changes = dict(zip(asked, map(changed, (80.0, 90.0)), strict=True))
    found = answers(small)
    summary = summarise(small, found, changes, {})
    kava = next(group for group in summary.groups if group.system == "kava")
    assert kava.carried is not None and kava.carried.n == 50
    assert (kava.carried.untouched, kava.carried.donor) == ([90.0, 90.0], [10.0, 10.0])
    assert kava.carried.followed == [80.0, 90.0]
    assert sum(group.carried is not None for group in summary.groups) == 1
    write_study(tmp_path, small, found, changes, {}, summary)
    with (tmp_path / "interventions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["system"], row["seed"], row["counted"]) for row in rows] == [
        ("kava", "0", "40"),
        ("kava", "1", "40"),
    ]
    assert [float(row["followed"]) for row in rows] == [80.0, 90.0]
    assert (rows[0]["shuffled"], rows[0]["followed_untouched"]) == ("", "2.5000")
    others = [rows[0][f"{kind}_changed"] for kind in ("removed", "mean", "shuffled", "donor")]
    assert others == ["9.0000", "8.0000", "", "80.0000"]
    page, told = as_page(summary), io.StringIO()
    Console(file=told, width=120).print(as_table(summary))
    for words in ("follow the donor", "85.0 ± 7.1", "The first 50 of these problems"):
        assert words in page and words in " ".join(told.getvalue().split())
    assert StudySummary.model_validate_json(summary.model_dump_json()) == summary
    nobody = summarise(small, found, dict.fromkeys(asked, changed(None)), {})
    assert nobody.groups[2].carried.followed == [None, None]
    assert "–" in as_page(nobody)
    plain = plan(tmp_path, {})
    assert "carried" not in summarise(plain, answers(plain), {}, {}).model_dump_json()


def test_what_fidelity_foretells_is_told_of_every_store(tmp_path: Path) -> None:
    budgets = [1, 2, 4, 8]
    small = plan(tmp_path, {"fidelity": 20, "grid": {"evict.budget": budgets}})
    asked = [cell for cell in small.cells if cell.fidelity]
    assert [(cell.system, cell.seed) for cell in asked] == [("kava", 0), ("kava", 1)] * 4
    stores = {
        cell: StoreFidelity(n=20, exact_match=10.0 * i, kl=1.0, full=100.0, none=5.0)
        for i, budget in enumerate(budgets)
        for cell in asked
        if cell.variant == f"evict.budget={budget}"
    }
    # The students are worse the better the teacher answers from their slots.
    found = answers(small)
    for cell, store in stores.items():
        right = [i >= store.exact_match for i in range(50)]
        found[cell] = found[cell].model_copy(update={"correct": right})
    summary = summarise(small, found, {}, stores)
    (foretold,) = summary.foretold
    assert (foretold.system, foretold.n, foretold.kl) == ("kava", 4, None)
    assert foretold.exact_match is not None and foretold.exact_match.rho == -1
    write_study(tmp_path, small, found, {}, stores, summary)
    with (tmp_path / "fidelity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (c.variant, str(c.seed)) for c in asked
    ]
    assert rows[-1]["exact_match"] == "30.0000" and rows[-1]["none"] == "5.0000"
    page, told = as_page(summary), io.StringIO()
    Console(file=told, width=120).print(as_table(summary))
    for words in ("kava over 4 settings", "exact match -1.00 (p", "a low KL orders nothing"):
        assert words in page and words in " ".join(told.getvalue().split())
    assert StudySummary.model_validate_json(summary.model_dump_json()) == summary
    few = plan(tmp_path, {"fidelity": 20, "grid": {"evict.budget": [1, 2]}})
    few_stores = {cell: stores[asked[0]] for cell in few.cells if cell.fidelity}
    assert "foretold" not in summarise(few, answers(few), {}, few_stores).model_dump_json()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_a_rank_correlation_is_that_of_the_ranks(pairs: list[tuple[int, int]]) -> None:
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def ranks(side: list[int]) -> list[float]:
        return [
            sum(other < each for other in side) + (sum(other == each for other in side) + 1) / 2
            for each in side
        ]

    found = spearman(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
        return
    assert found is not None
    assert found.rho == pytest.approx(statistics.correlation(ranks(left), ranks(right)))
    turned = spearman(left, [-number for number in right])
    assert turned is not None and turned.rho == pytest.approx(-found.rho)
    assert found.p_value == pytest.approx(turned.p_value, abs=0.03)


def test_orders_that_agree_by_chance_are_told_from_others() -> None:
    agree = spearman(range(8), [number**3 for number in range(8)])
    assert agree is not None and agree.rho == 1 and agree.p_value < 0.001
    apart = spearman([1, 2, 3, 4, 5, 6], [2, 5, 1, 6, 3, 4])
    assert apart is not None and apart.p_value > 0.3
    three = spearman([1, 2, 3], [1, 2, 3])  # 2 of 6 orders are as far from chance
    assert three is not None and three.p_value == pytest.approx(1 / 3, abs=0.03)


def test_other_problems_are_not_compared(small: StudyPlan) -> None:
    found = answers(small)
    cell = next(cell for cell in small.cells if cell.system == "no-cot")
    found[cell] = found[cell].model_copy(update={"ids": [f"q{i}" for i in range(50)]})
    with pytest.raises(KavaError, match="were asked different problems"):
        summarise(small, found, {}, {})


def test_rows_of_a_run_before_do_not_stay(small: StudyPlan, tmp_path: Path) -> None:
    found = answers(small)
    for name in ("interventions.csv", "fidelity.csv"):
        (tmp_path / name).write_text("of another run")
    write_study(tmp_path, small, found, {}, {}, summarise(small, found, {}, {}))
    assert not {"interventions.csv", "fidelity.csv"} & {path.name for path in tmp_path.iterdir()}
