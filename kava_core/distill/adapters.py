"""Low-rank adapters on a student's decoder, folded into its weights when training is over."""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.settings import LoRA


def add_lora(student: LatentReasoner, settings: LoRA, *, seed: int) -> LoraModel:
    """Freeze the decoder and put adapters on its projections; latents and projection stay free.

    seed: of the adapters' first weights. Call `merge_lora` with the result when training is over.
    KavaError if no module has such a name.
    """
    targets = list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LoraModel(student.decoder, config, "default")
    except ValueError as error:
        raise KavaError(
            f"training.lora.targets {targets} fit no module of the decoder: {error}"
        ) from None


def merge_lora(student: LatentReasoner, adapters: LoraModel) -> None:
    """Fold the adapters into the decoder's weights."""
    student.decoder = cast(PreTrainedModel, adapters.merge_and_unload())
