"""Between settings and stores: the codec that settings ask for, the settings that a store names."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kava_core.errors import KavaError
from kava_core.settings import Evict, Generate
from kava_core.store import Codec, TargetsStore

StageSettings = TypeVar("StageSettings", Generate, Evict)


def store_codec(settings: Generate | Evict) -> Codec:
    """The store's codec for the bits of a stage's settings."""
    return Codec.from_bits(
        keys=settings.keys_bits,
        values=settings.values_bits,
        endpoint=settings.endpoint_bits,
        half=settings.half,
        granularity=settings.granularity if isinstance(settings, Evict) else "token",
    )


def stored_settings(store: TargetsStore, section: type[StageSettings]) -> StageSettings:
    """The settings of one stage that made `store`, read back from its manifest.

    KavaError if they are not there, or not in words of this version.
    """
    name = section.__name__.lower()
    try:
        return section.model_validate(store.manifest.settings.get(name))
    except ValidationError as error:
        details: ErrorDetails = error.errors()[0]
        place = ".".join((name, *map(str, details["loc"])))
        wanted = details["msg"].removeprefix("Value error, ").removesuffix(".")
        said = f"{place}: {wanted}, found {details['input']!r:.60}"
        raise KavaError(
            f"{store.path} does not say how it was made in words of this version, under "
            f"settings.{name} of its manifest ({said}). Make it again with "
            "`kava generate` and `kava evict`. Until then students can learn from it with `targets:"
            " store`, and be evaluated with evaluate.interpret_records at 0."
        ) from None


def latent_fraction(store: TargetsStore) -> float:
    """How much of each trace latents stand for, in whole steps; students write the rest."""
    return float(store.manifest.settings.get("latent_fraction", 1))
