"""The scorers of the installed kvpress, by the names of their classes."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.errors import KavaError
from kava_core.eviction.press import Press, PressPolicy


@dataclass(frozen=True)
class KVPress(PressPolicy):
    """press_name: a class of kvpress that extends its ScorerPress, at its defaults."""

    name = "kvpress"
    depends_on = ("kvpress",)

    press_name: str = "KnormPress"

    def __post_init__(self) -> None:
        self.press()  # so that a wrong name is told before anything runs

    def press(self) -> Press:
        try:
            import kvpress
        except ImportError as error:
            raise KavaError(
                f"kvpress cannot be imported here ({error}). Install what is missing: `pip install "
                "--no-deps kvpress cachetools fire termcolor`."
            ) from error
        kind = getattr(kvpress, self.press_name, None)
        if not (isinstance(kind, type) and issubclass(kind, kvpress.ScorerPress)):
            raise KavaError(
                f"expected `press_name` to be a scorer press of kvpress, found {self.press_name!r}."
            )
        try:
            scorer: Press = kind()
        except TypeError as error:
            raise KavaError(
                f"{self.press_name} cannot be made by its name alone: {error}."
            ) from None
        return scorer
