"""Hidden states become the logits that the model gives itself, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from kava_core.errors import KavaError
from kava_core.models.head import check_head, read_head
from tests.tiny import ARCHITECTURES, COMMON, CONFIGS, assert_near, tiny_model

MODELS: dict[str, PreTrainedConfig] = {
    **CONFIGS,
    "cohere": CohereConfig(**COMMON, logit_scale=0.25),
    "granite": GraniteConfig(**COMMON, logits_scaling=8.0),
    "a low cap": type(CONFIGS["gemma2"])(
        **{**CONFIGS["gemma2"].to_dict(), "final_logit_softcapping": 0.5}
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, "cohere", "granite", "a low cap"])
def test_the_head_is_the_models_own(name: str) -> None:
    model = tiny_model(MODELS[name], torch.float32)
    output = model(torch.tensor([[11, 12, 13]]), output_hidden_states=True)
    assert_near(read_head(model, output.hidden_states[-1]), output.logits)
    check_head(model, "")


class Doubling(LlamaForCausalLM):
    """A model that makes more of its logits than it says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_that_makes_its_logits_otherwise_is_refused() -> None:
    with pytest.raises(KavaError, match=r"llama makes its logits .* as it is\. Leave it\.$"):
        check_head(Doubling(LlamaConfig(**COMMON)), "Leave it.")
