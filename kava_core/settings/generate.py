"""The teacher's caches."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kava_core.settings.base import (
    Bits,
    Dtype,
    EndpointBits,
    Half,
    Positive,
    Real,
    Section,
    check_half,
)

DEFAULT_BATCH = 64


class Generate(Section):
    """The teacher's caches over the training problems.

    keep: `caches`, of which `evict` makes targets; or `targets`, which the workers of generate cut
    at once by the settings of `evict`: no disk has to hold the caches, there is no stage evict, and
    other targets run the teacher again. latent_fraction: how much of a trace, in whole steps,
    latents stand for; students write the rest. keys_bits, values_bits, endpoint_bits: how the
    caches are kept, or rounded before they are cut; 16 bits are the `half` dtype, 8 and 4 (8 for
    the endpoint) are codes with a scale and zero point per token. half: what 16 bits are.
    model_dtype: dtype of the teacher's weights. shard_size: records in a file of the store.
    batch_size: how many traces the teacher reads at once; `auto`: the largest power of two up to
    512 that the memory of a worker holds (64 without a GPU), which is looked for once and then is
    the setting of that store. threads: CPU threads of a worker. on_error: what a record does to the
    run that the teacher cannot hold or that gives no finite numbers: `fail`, or `quarantine`, which
    leaves it out; the store then names it, with the reason.
    """

    keep: Literal["caches", "targets"] = "caches"
    latent_fraction: Annotated[Real, Field(ge=0.2, le=1)] = 1.0
    keys_bits: Bits = 16
    values_bits: Bits = 16
    endpoint_bits: EndpointBits = 16
    half: Half = "bfloat16"
    model_dtype: Dtype = "float32"
    shard_size: Positive = 512
    batch_size: Positive | Literal["auto"] = DEFAULT_BATCH
    threads: Positive = 1
    # Never written down: a store says which records it lacks, not whether it could have lacked any.
    on_error: Annotated[Literal["fail", "quarantine"], Field(exclude=True)] = "fail"

    @property
    def rows(self) -> int:
        """batch_size; where it is not known yet, the default."""
        return DEFAULT_BATCH if self.batch_size == "auto" else self.batch_size

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        check_half(self, {self.keys_bits, self.values_bits, self.endpoint_bits})
        return self

    @property
    def lacking(self) -> str | None:
        """The artefact that names the records that are left out; None where none may be."""
        if self.on_error == "fail":
            return None
        return "teacher_kv" if self.keep == "caches" else "kv_targets"
