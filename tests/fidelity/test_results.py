"""Numbers, recommendation and files made of the answers from compressed caches."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kava_core.fidelity.grid import Cell
from kava_core.fidelity.results import (
    costs_of,
    recommend,
    recommendation_table,
    summarise,
    summarise_costs,
    write_results,
)
from kava_core.fidelity.trial import Result
from kava_core.findings.base import read_finding
from kava_core.findings.fidelity import BatchCost, CachedAnswer, CacheScores
from kava_core.findings.scores import GroupScore
from tests.stages.project import digest


def answer(steps: int, correct: bool, nll: float = 1.0, tokens: int = 2) -> CachedAnswer:
    return CachedAnswer(
        id=f"{steps}-{nll}",
        n_steps=steps,
        topic="t",
        cot_tokens=9,
        policy="full",
        budget=None,
        keys_bits=None,
        values_bits=None,
        tokens_kept=4.0,
        bytes=100 * tokens,
        text="5",
        answer="5",
        gold="5",
        correct=correct,
        nll=nll,
        kl=nll / 2,
        answer_tokens=tokens,
    )


def cost(steps: int, problems: int, seconds: float, memory: int | None) -> BatchCost:
    return BatchCost(
        n_steps=steps,
        problems=problems,
        seconds_per_problem=seconds,
        peak_memory_bytes=memory,
        hardware={"cores": str(steps)},
    )


def test_a_summary_weighs_by_answer_tokens_and_counts_answers() -> None:
    summary = summarise([answer(2, True, 0.5, 2), answer(3, False, 2.0, 4)])
    assert summary.exact_match == 50 and summary.n == 2
    assert summary.perplexity == pytest.approx(math.exp((0.5 * 2 + 2.0 * 4) / 6))
    assert summary.kl == pytest.approx((0.25 * 2 + 1.0 * 4) / 6)
    assert summary.tokens_kept == 4 and summary.bytes_per_problem == 300
    assert summary.by_steps == {
        2: GroupScore(exact_match=100.0, n=1),
        3: GroupScore(exact_match=0.0, n=1),
    }
    low, high = summary.ci95
    assert 0 < low < 50 < high < 100


def test_costs_are_means_over_problems_and_the_highest_peak() -> None:
    costs = summarise_costs([cost(2, 30, 0.1, 50), cost(2, 10, 0.3, 70), cost(3, 20, 0.4, None)])
    assert costs.seconds_per_problem == pytest.approx((3 + 3 + 8) / 60)
    assert costs.seconds_by_steps[2] == pytest.approx(6 / 40)
    assert costs.peak_memory_bytes == 70
    assert summarise_costs([cost(2, 1, 0.1, None)]).peak_memory_bytes is None


def test_the_recommended_budget_is_the_smallest_that_is_near_enough_per_policy_and_bits() -> None:
    scores = {
        Cell("full"): 91.0,
        Cell("none"): 95.0,
        Cell("rkv", 16, 8, 8): 88.0,
        Cell("rkv", 4, 8, 8): 88.5,
        Cell("rkv", 8, 8, 8): 90.0,
        Cell("rkv", 8, 8, 4): 40.0,
        Cell("random", 8, 8, 8): 99.0,
    }
    assert recommend(scores, within=3) == {"rkv": {"8": 4, "8/4": None}, "random": {"8": 8}}
    assert recommend(scores, within=2) == {"rkv": {"8": 8, "8/4": None}, "random": {"8": 8}}
    assert recommend(scores, within=0)["rkv"] == {"8": None, "8/4": None}


@pytest.mark.parametrize("n", [100, 200, 500, 1000])
@pytest.mark.parametrize("within", [0.5, 1.0, 2.0])
def test_a_budget_exactly_at_the_limit_is_enough_and_one_answer_less_is_not(
    n: int, within: float
) -> None:
    """With any number of right answers: floats miss some of these differences by a last digit."""
    allowed = int(within * n / 100)
    for right in range(allowed + 1, n + 1):
        scores = {Cell("full"): 100 * right / n}
        scores[Cell("at", 4, 8, 8)] = 100 * (right - allowed) / n
        scores[Cell("below", 4, 8, 8)] = 100 * (right - allowed - 1) / n
        assert recommend(scores, within) == {"at": {"8": 4}, "below": {"8": None}}, right


def made(scale: float = 1.0) -> list[Result]:
    """Two policies at 16 and 8 bits; rkv gets the three-step problem right from 8 slots on."""
    cells = [Cell("full"), Cell("none")]
    cells += [Cell(p, m, b, b) for p in ("rkv", "crop") for m in (2, 8, 16) for b in (16, 8)]
    return [
        Result(
            cell,
            [answer(2, True), answer(3, cell.policy == "full" or (cell.budget or 0) >= 8)],
            [cost(2, 1, 0.1 * scale, 9), cost(3, 1, 0.2 * scale, 9)],
        )
        for cell in cells
    ]


def test_the_artefact_holds_answers_numbers_and_plots_and_nothing_measured(
    tmp_path: Path,
) -> None:
    for name, scale in (("one", 1.0), ("two", 7.0)):
        (tmp_path / name).mkdir()
        metrics = write_results(tmp_path / name, made(scale), split="validation", within=2.0)
    folder = tmp_path / "one"
    assert digest(folder) == digest(tmp_path / "two")
    assert sorted(digest(folder)) == ["answers.parquet", "budgets.json", "metrics.json"]
    assert read_finding(CacheScores, folder / "metrics.json", "fidelity") == metrics
    assert metrics.recommended == {"rkv": {"16": 8, "8": 8}, "crop": {"16": 8, "8": 8}}
    assert metrics.recommended_by_steps[2]["rkv"] == {"16": 2, "8": 2}
    assert metrics.recommended_by_steps[3]["rkv"] == {"16": 8, "8": 8}
    assert metrics.policies["rkv"][2]["16"].exact_match == 50
    for word in ("second", "memory"):
        assert word not in (folder / "metrics.json").read_text()
        assert not any(word in c for c in pq.read_schema(folder / "answers.parquet").names)
    assert pq.read_table(folder / "answers.parquet").num_rows == 2 * 14
    plotted = json.loads((folder / "budgets.json").read_text())
    assert {row["series"] for row in plotted} == {
        "full", "none", "rkv, 16 bits", "rkv, 8 bits", "crop, 16 bits", "crop, 8 bits",
    }  # fmt: skip
    assert all(row["budget"] in (2, 8, 16) for row in plotted)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(recommendation_table(metrics))
    table = console.export_text()
    assert "Smallest budget within 2 points" in table
    rows = [line.split()[1:4] for line in table.splitlines() if line.startswith("rkv")]
    assert rows == [["16", "8", "100.0"], ["8", "8", "100.0"]]


def test_budgets_and_bits_stand_in_the_order_of_numbers(tmp_path: Path) -> None:
    write_results(tmp_path, made(), split="test", within=2.0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for policy in ("rkv", "crop"):
        assert list(metrics["policies"][policy]) == ["2", "8", "16"]
        assert all(list(by_bits) == ["16", "8"] for by_bits in metrics["policies"][policy].values())
        assert list(metrics["recommended"][policy]) == ["16", "8"]


def test_seconds_and_memory_are_apart() -> None:
    costs = costs_of(made())
    assert costs.hardware == {"cores": "2, 3"}
    assert costs.full.seconds_per_problem == pytest.approx(0.15)
    assert costs.policies["rkv"][2]["16"].peak_memory_bytes == 9


def test_where_no_budget_is_enough_the_table_says_that_more_is_needed(tmp_path: Path) -> None:
    results = made()[:8]
    short = [replace(r, answers=[answer(2, r.cell.policy == "full")]) for r in results]
    metrics = write_results(tmp_path, short, split="test", within=0.5)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(recommendation_table(metrics))
    rows = [line for line in console.export_text().splitlines() if line.startswith("rkv")]
    assert [row.split() for row in rows] == [["rkv", "16", ">", "16"], ["rkv", "8", ">", "16"]]
