"""`benchmarks/inference.py` measures what it says, here with lengths that take a moment."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

FILE = Path(__file__).parents[1] / "benchmarks" / "inference.py"


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("inference", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "inference", module)
    spec.loader.exec_module(module)
    sizes = {"QUESTION": 6, "TRACE": 5, "ANSWER": 3, "LATENTS": 4, "ITERATIONS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    return module


def test_the_bare_decoder_is_called_as_the_student_calls_it(inference: ModuleType) -> None:
    model, student = inference.build(torch.float32)
    shapes: list[tuple[int, int]] = []

    def note(_: nn.Module, __: object, options: dict[str, Any], ___: object) -> None:
        fed, cache = options["inputs_embeds"], options["past_key_values"]
        shapes.append((fed.shape[1], cache.get_seq_length()))

    for decoder in (model, student.decoder):
        decoder.base_model.register_forward_hook(note, with_kwargs=True)
    question = torch.full((2, inference.QUESTION), 9)
    with torch.inference_mode():
        student.generate(question, max_new_tokens=inference.ANSWER)
        called = list(shapes)
        shapes.clear()
        inference.bare(student.decoder, 2)()
    assert shapes == called
    assert [columns for columns, _ in called] == [6 + 1 + 4, 4, 4 + 1 + inference.PROMPT, 1, 1]


def test_it_prints_every_ratio(inference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "BATCHES", (1, 32))
    done = CliRunner().invoke(inference.main, ["--json", "--rounds", "1"], catch_exceptions=False)
    ratios = json.loads(done.stdout)
    names = ("latent_vs_cot", "no_cot_vs_cot", "latent_vs_no_cot", "latent_vs_bound")
    both = {f"{name}_b{batch}" for name in names for batch in (1, 32)}
    assert set(ratios) == both | {"passes_cot_vs_latent"}
    assert set(inference.TARGETS) <= set(ratios)
    assert ratios["passes_cot_vs_latent"] == (5 + 3) / 5
    assert all(ratio > 0 for ratio in ratios.values())
