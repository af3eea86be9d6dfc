"""What a policy is: a frozen dataclass whose fields are its settings, and a score.

To add one, write a file here whose class overrides `score`, the one method that differs, and list
the class in `__init__.py`. Settings are read against the dataclass's own fields, and the tests walk
over the list. Neither needs torch to be loaded, so these modules use what tensors and the batch
offer and import it for annotations only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from kava_core.errors import KavaError

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch

RotaryPhase = Literal["pre_rope", "post_rope"]
# Who chooses what is kept: every layer and head for itself, or a record for all of them at once.
Selection = Literal["head", "record"]


class Policy(ABC):
    """Says how much each token of a trace is worth keeping.

    name: what settings call it. A field whose name is a Python keyword ends in an underscore, which
    settings leave out: `lambda_` is `lambda`.
    """

    name: ClassVar[str]

    @abstractmethod
    def score(self, batch: CacheBatch) -> Tensor:
        """[T, L', H] float32, the higher the better, finite.

        A token's score may depend on its own record only, and bit by bit so: whatever reduces over
        the tokens of a record is computed for each record on its own, because the order in which a
        library adds up numbers changes with the shape it is given. Keys and values are widened to
        float32 a piece at a time (`batch.pieces`), never as a whole.
        """

    def keepable(self, batch: CacheBatch) -> Tensor | None:
        """[T] bool, at least one token of each record: what may be kept at all; None: anything.

        Slots that no such token fills stay empty.
        """
        return None

    @property
    def label(self) -> str:
        """What tables and files call it: `rkv`, or `rkv lambda=0.5` where not at its defaults."""
        given = (
            f"{field.name.rstrip('_')}={getattr(self, field.name):g}"
            if isinstance(getattr(self, field.name), float)
            else f"{field.name.rstrip('_')}={getattr(self, field.name)}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        )
        return " ".join([self.name, *given])


def check_phase(setting: str, phase: str) -> None:
    """KavaError naming `setting` unless `phase` is one of the two."""
    if phase not in get_args(RotaryPhase):
        raise KavaError(f"expected `{setting}` to be pre_rope or post_rope, found {phase!r}.")
