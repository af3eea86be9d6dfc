"""The tables of docs/reliability.md are what `make faults` saw, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reliability() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "docs" / "reliability.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_follow_from_the_results(reliability: ModuleType) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    summary = json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))
    assert summary["faults"] and reliability.page(text, summary) == text, "run `make faults`"


def test_equal_faults_are_counted_and_a_test_counts_once(reliability: ModuleType) -> None:
    b = {"fault": "b", "how": "so", "outcome": "well"}
    figure = {"what": "opening", "figure": "1 s", "promised": "under 2 s"}
    lines = [
        {"test": "one", "notes": [b, {"fault": "a", "how": "x|y", "outcome": "well"}, b]},
        {"test": "two", "notes": [figure, b]},
        {"test": "two", "notes": [figure]},
    ]
    summary = reliability.summarise("\n".join(json.dumps(line) for line in lines))
    assert [(row["fault"], row["times"]) for row in summary["faults"]] == [("a", 1), ("b", 2)]
    assert summary["figures"] == [figure]
    tables = reliability.tables(summary)
    assert "| a | x/y | 1 | well |\n| b | so | 2 | well |\n" in tables
    assert "| opening | 1 s | under 2 s |\n" in tables


def test_what_was_seen_is_not_looked_at_again(tmp_path: Path) -> None:
    """So that many short runs make one long one."""
    results = tmp_path / "results.jsonl"
    names = [test_the_tables_follow_from_the_results.__name__,
             test_equal_faults_are_counted_and_a_test_counts_once.__name__]  # fmt: skip
    tests = [f"tests/faults/test_page.py::{name}" for name in names]
    for expected in ("2 passed", "2 deselected"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *tests, "-v", "-p", "no:cacheprovider",
             f"--faults-results={results}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and expected in done.stdout, done.stdout
    seen = [json.loads(line)["test"] for line in results.read_text("utf-8").splitlines()]
    assert seen == tests
