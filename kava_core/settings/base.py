"""What all settings are made of: a section, and kinds of numbers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StringConstraints


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


# Numbers in text are taken, since YAML 1.1 reads 1e-3 as one; a truth value is no number.
Real = Annotated[float, BeforeValidator(_number)]


Positive = Annotated[StrictInt, Field(gt=0)]


NotNegative = Annotated[StrictInt, Field(ge=0)]


PositiveReal = Annotated[Real, Field(gt=0)]


Fraction = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]


Weight = Annotated[Real, Field(ge=0)]


# A folder below data/, a step in DVC's paths, and a part of names of files, which may have 255.
NAME = r"[A-Za-z0-9_-]{1,100}"


Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]


Dtype = Literal["float32", "bfloat16", "float16"]


Half = Literal["bfloat16", "float16"]


Device = Literal["auto", "cpu"]


Processes = Positive | Literal["auto"]


Bits = Literal[32, 16, 8, 4]


EndpointBits = Literal[32, 16, 8]


def bucket_folder(value: str) -> str:
    """A folder that stores are put into; what it is written as may be written down."""
    if not re.fullmatch(r"(s3|gs)://[^/@?#\s]+(/[^?#\s]*)?", value):
        raise ValueError(
            "should be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, without a name, a password or a "
            "query"
        )
    return value


class Section(BaseModel):
    """A mapping of settings: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    def changed(self, *names: str) -> list[str]:
        """Those of the settings `names` that are not at their defaults.

        A setting that would change nothing is an error, unless it stands as it does anyway: what a
        run recorded of itself, with every default, can be read again.
        """
        defaults = type(self).model_fields
        return [name for name in names if getattr(self, name) != defaults[name].default]


def check_half(section: Section, bits: set[int]) -> None:
    """ValueError for a `half` dtype where nothing is kept in 16 bits."""
    if 16 not in bits and section.changed("half"):
        raise ValueError("half is the dtype of 16 bits, and nothing is kept in 16: leave it out")
