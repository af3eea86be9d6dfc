"""The table of docs/models.md is what `kava check` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "docs" / "models.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_models", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = load()
ROWS: dict[str, str] = MODELS.rows(MODELS.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model_type", sorted(ROWS))
def test_the_row_is_what_check_says(model_type: str) -> None:
    assert MODELS.row(model_type) == ROWS[model_type]


def test_the_table_has_what_the_project_is_for() -> None:
    """And those that gave wrong numbers or a crash once."""
    everything = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma3_text", "gpt2")
    for name in everything:
        assert ROWS[name].startswith(f"| {name} | yes | yes | yes |")
    refused = ("diffllama", "afmoe", "doge", "gemma4", "gemma3n_text", "mimo_v2_flash", "jetmoe")
    for name in refused:
        assert ROWS[name].startswith(f"| {name} | no |")
    assert len(ROWS) > 90
