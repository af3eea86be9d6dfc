"""The table of docs/reliability.md is what `make faults` saw, and nothing else."""

from __future__ import annotations

import importlib.util
import json
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


def test_the_table_follows_from_the_results(reliability: ModuleType) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))
    assert rows and reliability.page(text, rows) == text, "run `make faults`"


def test_equal_faults_are_counted(reliability: ModuleType) -> None:
    lines = [
        {"fault": "b", "how": "so", "outcome": "well"},
        {"fault": "a", "how": "x|y", "outcome": "well"},
        {"fault": "b", "how": "so", "outcome": "well"},
    ]
    rows = reliability.summarise("\n".join(json.dumps(line) for line in lines))
    assert [(row["fault"], row["times"]) for row in rows] == [("a", 1), ("b", 2)]
    assert "| a | x/y | 1 | well |\n| b | so | 2 | well |\n" in reliability.table(rows)
