"""A model's shapes, without its weights: from settings, a folder, or what is published of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from kava_core.errors import KavaError
from kava_core.models.inspection import look_at
from kava_core.models.loading import cache_shape, load_config
from kava_core.planning.published import published, published_model
from kava_core.settings import LoRA, Scratch, Teacher, Training
from kava_core.store import Geometry
from kava_core.targets.generate import store_geometry


@dataclass(frozen=True)
class Architecture:
    """A model on the meta device, counted.

    source: where its shapes are from, in words. parameters: of all of it; body: of those that every
    token passes through, embeddings and head left out. projections: every linear map by its name,
    (inputs, outputs).
    """

    source: str
    config: PreTrainedConfig
    parameters: int
    body: int
    projections: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, config: PreTrainedConfig, source: str) -> Self:
        """Build the model of a text configuration without memory for its weights, and count it.

        KavaError if transformers has no causal language model of this kind.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            raise KavaError(f"{source}: no causal language model can be built: {error}.") from None
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        body = sum(p.numel() for p in model.base_model.parameters()) - embedding.weight.numel()
        return cls(
            source,
            config,
            sum(p.numel() for p in model.parameters()),
            body,
            {name: found for name, module in model.named_modules() if (found := _linear(module))},
        )

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return cache_shape(self.config)[0]

    @property
    def head_dim(self) -> int:
        return cache_shape(self.config)[1]

    @property
    def intermediate_size(self) -> int:
        """Of the feed-forward part; four times the hidden size where the model does not say."""
        given = getattr(self.config, "intermediate_size", None)
        return int(given or getattr(self.config, "n_inner", None) or 4 * self.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def geometry(self) -> Geometry:
        """Of a store of this model's caches."""
        return store_geometry(self.config)

    def trainable(self, training: Training, where: str) -> int:
        """Parameters that `training` changes; KavaError names LoRA targets that are not there."""
        if training.lora is None:
            return self.parameters
        return sum(
            training.lora.rank * sum(self.projections[name])
            for name in self.adapted(training.lora, where)
        )

    def adapted(self, lora: LoRA, where: str) -> list[str]:
        """The projections that get adapters; KavaError names targets that this model lacks."""
        last = {name.rpartition(".")[2] for name in self.projections}
        unknown = sorted(set(lora.targets) - last)
        if unknown:
            raise KavaError(
                f"{where}.lora.targets: {', '.join(unknown)} fit no module of {self.source}. It "
                f"has {', '.join(sorted(last))}."
            )
        return [name for name in self.projections if name.rpartition(".")[2] in lora.targets]


def teacher_architecture(settings: Teacher, vocabulary: int | None = None) -> Architecture:
    """That of a pipeline's teacher. vocabulary: tokens of a tokenizer made for one from scratch."""
    if settings.model == "scratch":
        config = scratch_config(settings.scratch, vocabulary)
        return Architecture.of(config, "a Llama from scratch")
    return model_architecture(settings.model, settings.revision, "teacher.model")


def model_architecture(model: str, revision: str | None, where: str) -> Architecture:
    """That of a folder or a Hub id, without a network; where: the setting that names it.

    KavaError if nothing is known of it here.
    """
    if Path(model).is_dir():
        return Architecture.of(load_config(model, revision), model)
    known = published_model(model)
    if known is not None:
        return Architecture.of(known.configuration(), f"{model} (published shapes)")
    look_at("model configuration", model, revision)
    try:
        config = AutoConfig.from_pretrained(
            model, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        names = ", ".join(name for each in published().models for name in each.names)
        raise KavaError(
            f"{where}: the shapes of {model} are not known here, and no network is asked. Expected "
            f"a folder, a model in this machine's Hub cache (`hf download {model} config.json`), "
            f"or one of {names}."
        ) from None
    return Architecture.of(config.get_text_config(), model)


def scratch_config(scratch: Scratch, vocabulary: int | None = None) -> LlamaConfig:
    """The configuration of a model from scratch, as `build_llama` makes it."""
    return LlamaConfig(
        vocab_size=vocabulary or scratch.vocabulary,
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.kv_heads,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=scratch.context_length,
        tie_word_embeddings=True,
    )


def _linear(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear map; GPT-2 has its own kind, with the weight turned."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        rows, columns = cast(torch.Tensor, module.weight).shape
        return rows, columns
    return None
