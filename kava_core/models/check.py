"""Can a model be a teacher, can it be a student? In a second, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedConfig

from kava_core.errors import KavaError
from kava_core.models.context import attention_windows, context_of
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import cache_shape
from kava_core.models.miniature import miniature
from kava_core.models.proofs import prove_asked, prove_latents, prove_slots, prove_teacher

Model = TypeVar("Model")


@dataclass(frozen=True)
class Verdict:
    """What a model can be; each a sentence why not, None where it can.

    teacher: its cache can be recorded and it can be asked. student: it can think in latents.
    kv_loss: the keys and values of these can be compared with a teacher's.
    """

    teacher: str | None
    student: str | None
    kv_loss: str | None

    @property
    def reasons(self) -> list[str]:
        """Each once."""
        found = (self.teacher, self.student, self.kv_loss)
        return list(dict.fromkeys(reason for reason in found if reason is not None))


@dataclass(frozen=True)
class Shape:
    """What a store of a teacher and a trace depend on."""

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    context: int | None
    narrowest_window: int | None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """Of a text configuration; KavaError if layers keep no keys and values of one size."""
        windows = attention_windows(config)
        kv_heads, head_dim = cache_shape(config)
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            context=context_of(config),
            narrowest_window=min(windows.values(), default=None),
        )


def judge_config(config: PreTrainedConfig) -> Verdict:
    """What a model of this configuration can be, by the proofs that the stages make themselves, on
    a small model of its kind with random weights."""
    try:
        Shape.of(config.get_text_config())
        model = miniature(config)
    except KavaError as error:
        return Verdict(*[str(error)] * 3)
    student = LatentReasoner.from_teacher(
        model,
        latents=2,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=[5, 6],
        eos_token_id=2,
        seed=0,
    )
    taught = _why_not(prove_asked, model) or _why_not(prove_latents, student)
    return Verdict(
        teacher=_why_not(prove_teacher, model),
        student=taught,
        kv_loss=taught or _why_not(prove_slots, student),
    )


def _why_not(proof: Callable[[Model], object], model: Model) -> str | None:
    try:
        proof(model)
    except KavaError as error:
        return str(error)
    return None
