"""What is published of models and data is there, and is what the Hub says."""

from __future__ import annotations

import pytest

from kava_core.planning.architecture import Architecture, teacher_architecture
from kava_core.planning.published import published, published_model
from kava_core.problems.sources import SOURCES
from kava_core.settings import Teacher, Training

# Parameters as the model cards have them, in millions: those of the tied head once.
SIZES = {
    "meta-llama/Llama-3.2-1B": 1235.8,
    "meta-llama/Llama-3.2-3B": 3212.7,
    "Qwen/Qwen2.5-0.5B": 494.0,
    "Qwen/Qwen3-0.6B": 596.0,
    "HuggingFaceTB/SmolLM2-135M": 134.5,
    "openai-community/gpt2": 124.4,
}


@pytest.mark.parametrize(("name", "millions"), SIZES.items())
def test_the_shapes_make_a_model_of_the_published_size(name: str, millions: float) -> None:
    model = teacher_architecture(Teacher(model=name, training=None))
    assert model.parameters / 1e6 == pytest.approx(millions, abs=0.5)


def test_every_published_model_is_built_and_every_source_is_one() -> None:
    assert len(SIZES) == len(published().models)
    for model in published().models:
        assert Architecture.of(model.configuration(), model.names[0]).layers > 0
    assert set(published().data) <= set(SOURCES)
    assert {data.lengths for data in published().data.values()} <= set(published().lengths)


def test_adapters_are_counted_as_they_are_put_on() -> None:
    model = teacher_architecture(Teacher(model="Qwen/Qwen2.5-0.5B", training=None))
    training = Training.model_validate({"steps": 1, "lora": {"rank": 8, "targets": ["k_proj"]}})
    assert model.trainable(training, "x") == 24 * 8 * (896 + 128)
    assert model.trainable(Training(steps=1), "x") == model.parameters


def test_unknown_models_have_no_entry() -> None:
    assert published_model("someone/else") is None
