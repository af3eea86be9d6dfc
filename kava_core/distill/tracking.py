"""A training run shown elsewhere too: in TensorBoard, W&B, MLflow or Trackio.

The callbacks are transformers'. They look on: random numbers are what they were before each of
them was called, and one that fails in the middle of a run is left out from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from kava_core.artefacts import data_folder
from kava_core.console import warn
from kava_core.distill.checkpoints import RandomState
from kava_core.errors import KavaError
from kava_core.settings import Cadence

RUNS = ".runs"  # below data/: what has times and hosts, and no artefact depends on


@dataclass(frozen=True)
class Tracking:
    """Who is told of a run, and as what.

    report_to: as in `Cadence`. name: of the run, `<pipeline>/students/<name>` or
    `<pipeline>/teacher`. folder: of TensorBoard's files.
    """

    report_to: tuple[str, ...] = ()
    name: str | None = None
    folder: Path = field(default_factory=Path)

    @classmethod
    def of(cls, cadence: Cadence, output: Path) -> Self:
        """Of the training of the artefact `output`, beginning now.

        KavaError if what is to be told is not installed.
        """
        for package in cadence.report_to:
            found = find_spec(package)
            # Without an origin it is a folder of that name, as W&B leaves one in the project.
            if found is None or found.origin is None:
                raise KavaError(
                    f"cadence.report_to: {package} is not installed. Install it (`pip install "
                    f"{package}`), or leave it out."
                )
        data = data_folder(output)
        name = output.absolute().relative_to(data.absolute()).as_posix()
        began = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        return cls(cadence.report_to, name, data / RUNS / "tensorboard" / name / began)

    def callbacks(self) -> list[TrainerCallback]:
        """One for each; KavaError if one cannot be made."""
        return [Onlooker(name, self._make) for name in self.report_to]

    def _make(self, name: str) -> TrainerCallback:
        (kind,) = get_reporting_integration_callbacks([name])
        callback: TrainerCallback = kind()
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(self.folder)
        return callback


class Onlooker(TrainerCallback):
    """Another's callback, which changes nothing of the run."""

    def __init__(self, name: str, make: Callable[[str], TrainerCallback]) -> None:
        self.name = name
        self.callback: TrainerCallback | None = self._guarded(make, name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        assert self.callback is not None
        self._guarded(self.callback.on_train_begin, args, state, control, **more)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._told("on_log", args, state, control, **more)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._told("on_save", args, state, control, **more)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._told("on_train_end", args, state, control, **more)

    def _told(self, event: str, *given: Any, **more: Any) -> None:
        if self.callback is None:
            return
        try:
            self._guarded(getattr(self.callback, event), *given, **more)
        except KavaError as error:
            warn(f"warning: {error} The run goes on without it.")
            self.callback = None

    def _guarded(self, call: Callable[..., Any], *given: Any, **more: Any) -> Any:
        numbers = RandomState.now()
        try:
            return call(*given, **more)
        except Exception as error:  # a service that is not there, a key that is not known, …
            said = " ".join(str(error).split()) or type(error).__name__
            raise KavaError(
                f"cadence.report_to: {self.name} does not take reports ({said:.300}). Set it up as "
                "its own pages say, or leave it out."
            ) from error
        finally:
            numbers.restore()
