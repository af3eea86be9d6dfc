"""What is published of models and data: `published.yaml`, by name."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import PositiveInt
from transformers import AutoConfig, PreTrainedConfig

from kava_core.settings.base import Section

Digits = Literal["one", "three"]


class TokenizerRules(Section):
    """How a tokenizer cuts text: digits to a token at most; whether a text begins with `<bos>`."""

    digits: Literal[1, 3]
    bos: bool

    @property
    def named(self) -> Digits:
        """As the table of assumed lengths calls it."""
        return "one" if self.digits == 1 else "three"


class PublishedModel(Section):
    """A line of weights on the Hub: its names, its tokenizer's rules, its configuration."""

    names: tuple[str, ...]
    tokenizer: TokenizerRules
    config: dict[str, Any]

    def configuration(self) -> PreTrainedConfig:
        """As transformers has it."""
        return AutoConfig.for_model(**self.config)


class PublishedData(Section):
    """Problems of the published splits; lengths: whose lengths to assume."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None
    lengths: str


class Published(Section):
    """All of the file. lengths: whose → digits → part of a record → [mean, 99th percentile]."""

    models: tuple[PublishedModel, ...]
    data: dict[str, PublishedData]
    lengths: dict[str, dict[Digits, dict[str, tuple[float, float]]]]


@functools.cache
def published() -> Published:
    """The file, read once."""
    text = files(__package__).joinpath("published.yaml").read_text(encoding="utf-8")
    return Published.model_validate(yaml.safe_load(text))


def published_model(name: str) -> PublishedModel | None:
    """The entry of a Hub id; None if it is not listed."""
    return next((model for model in published().models if name in model.names), None)
