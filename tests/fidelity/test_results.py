"""Numbers, recommendation and files made of the answers from compressed caches."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kava_core.fidelity.results import (
    Cell,
    Result,
    recommend,
    recommendation_table,
    summarise,
    summarise_costs,
    write_results,
)


def answer(steps: int, correct: bool, nll: float = 1.0, tokens: int = 2) -> dict[str, Any]:
    return {
        "id": f"{steps}-{nll}",
        "n_steps": steps,
        "correct": correct,
        "nll": nll,
        "kl": nll / 2,
        "answer_tokens": tokens,
        "tokens_kept": 4.0,
        "bytes": 100 * tokens,
    }


def cost(steps: int, problems: int, seconds: float, memory: int | None) -> dict[str, Any]:
    return {
        "n_steps": steps,
        "problems": problems,
        "seconds_per_problem": seconds,
        "peak_memory_bytes": memory,
    }


def test_a_summary_weighs_by_answer_tokens_and_counts_answers() -> None:
    summary = summarise([answer(2, True, 0.5, 2), answer(3, False, 2.0, 4)])
    assert summary["exact_match"] == 50 and summary["n"] == 2
    assert summary["perplexity"] == pytest.approx(math.exp((0.5 * 2 + 2.0 * 4) / 6))
    assert summary["kl"] == pytest.approx((0.25 * 2 + 1.0 * 4) / 6)
    assert summary["tokens_kept"] == 4 and summary["bytes_per_problem"] == 300
    assert summary["by_steps"] == {
        "2": {"exact_match": 100.0, "n": 1},
        "3": {"exact_match": 0.0, "n": 1},
    }
    low, high = summary["ci95"]
    assert 0 < low < 50 < high < 100


def test_costs_are_means_over_problems_and_the_highest_peak() -> None:
    costs = summarise_costs([cost(2, 30, 0.1, 50), cost(2, 10, 0.3, 70), cost(3, 20, 0.4, None)])
    assert costs["seconds_per_problem"] == pytest.approx((3 + 3 + 8) / 60)
    assert costs["by_steps"]["2"]["seconds_per_problem"] == pytest.approx(6 / 40)
    assert costs["peak_memory_bytes"] == 70
    assert summarise_costs([cost(2, 1, 0.1, None)])["peak_memory_bytes"] is None


def test_the_recommended_budget_is_the_smallest_that_is_near_enough_per_policy_and_bits() -> None:
    scores = {
        Cell("full"): {"exact_match": 91.0},
        Cell("none"): {"exact_match": 95.0},
        Cell("rkv", 16, 8, 8): {"exact_match": 88.0},
        Cell("rkv", 4, 8, 8): {"exact_match": 88.5},
        Cell("rkv", 8, 8, 8): {"exact_match": 90.0},
        Cell("rkv", 8, 8, 4): {"exact_match": 40.0},
        Cell("random", 8, 8, 8): {"exact_match": 99.0},
    }
    assert recommend(scores, within=3) == {"rkv": {"8": 4, "8/4": None}, "random": {"8": 8}}
    assert recommend(scores, within=2) == {"rkv": {"8": 8, "8/4": None}, "random": {"8": 8}}
    assert recommend(scores, within=0)["rkv"] == {"8": None, "8/4": None}


def test_the_sweet_spot_of_a_difficulty_counts_its_problems_only() -> None:
    def score(two: float, three: float) -> dict[str, Any]:
        by_steps = {"2": {"exact_match": two}, "3": {"exact_match": three}}
        return {"exact_match": (two + three) / 2, "by_steps": by_steps}

    scores = {
        Cell("full"): score(100.0, 60.0),
        Cell("rkv", 2, 16, 16): score(98.0, 10.0),
        Cell("rkv", 4, 16, 16): score(100.0, 40.0),
        Cell("rkv", 8, 16, 16): score(100.0, 57.0),
    }
    assert recommend(scores, within=2) == {"rkv": {"16": 8}}
    assert recommend(scores, within=2, steps="2") == {"rkv": {"16": 2}}
    assert recommend(scores, within=2, steps="3") == {"rkv": {"16": None}}
    assert recommend(scores, within=3, steps="3") == {"rkv": {"16": 8}}


def test_the_artefact_holds_answers_numbers_plots_and_heatmaps(tmp_path: Path) -> None:
    cells = [Cell("full"), Cell("none"), Cell("rkv", 2, 16, 16), Cell("rkv", 8, 16, 16)]
    results = [
        Result(cell, [answer(2, True), answer(3, good)], [cost(2, 1, 0.1, 9), cost(3, 1, 0.2, 9)])
        for cell, good in zip(cells, (True, False, False, True), strict=True)
    ]
    metrics = write_results(tmp_path, results, split="validation", within=2.0)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["recommended"] == {"rkv": {"16": 8}}
    assert metrics["recommended_by_steps"] == {"2": {"rkv": {"16": 2}}, "3": {"rkv": {"16": 8}}}
    assert metrics["policies"]["rkv"]["2"]["16"]["exact_match"] == 50
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert timings["full"]["seconds_per_problem"] == pytest.approx(0.15)
    assert "seconds" not in (tmp_path / "metrics.json").read_text()
    assert pq.read_table(tmp_path / "answers.parquet").num_rows == 8
    plotted = json.loads((tmp_path / "budgets.json").read_text())
    assert {row["series"] for row in plotted} == {"full", "none", "rkv, 16 bits"}
    assert all(row["budget"] in (2, 8) for row in plotted)
    for name in ("accuracy.png", "latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(recommendation_table(metrics))
    table = console.export_text()
    assert "Smallest budget within 2 points" in table
    (row,) = [line for line in table.splitlines() if line.startswith("rkv")]
    assert row.split()[1:4] == ["16", "8", "100.0"]


def test_where_no_budget_is_enough_the_table_says_that_more_is_needed() -> None:
    score = summarise([answer(2, True)])
    metrics = {
        "split": "test",
        "within": 0.5,
        "full": score,
        "none": score,
        "policies": {"rkv": {"2": {"8": score}, "16": {"8": score}}},
        "recommended": {"rkv": {"8": None}},
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(recommendation_table(metrics))
    (row,) = [line for line in console.export_text().splitlines() if line.startswith("rkv")]
    assert row.split() == ["rkv", "8", ">", "16"]
