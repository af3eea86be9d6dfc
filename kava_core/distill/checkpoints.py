"""The checkpoints of a run: the last whole one, and the random numbers it went on with."""

from __future__ import annotations

import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TrainerState

from kava_core.artefacts import clear, read_json
from kava_core.console import warn
from kava_core.errors import KavaError

STATE, WEIGHTS = "trainer_state.json", "*.safetensors"
ARCHIVES = ("optimizer.pt", "scheduler.pt")  # whose directory stands at their end
CHECKPOINT = re.compile(r"checkpoint-\d{1,18}")


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the Trainer writes its state last).

    Newer ones that a kill or a power cut left torn are removed, which is said. What is no
    checkpoint by its name is left alone.
    """
    for checkpoint in _newest_first(folder):
        if _is_whole(checkpoint):
            return checkpoint
        warn(f"{checkpoint} is damaged, and is not continued from")
        clear(checkpoint)
    return None


def keep_last(folder: Path, count: int) -> None:
    """Remove all checkpoints but the `count` of the latest steps, whatever a clock says of them."""
    for checkpoint in _newest_first(folder)[count:]:
        clear(checkpoint)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether its state is that of its step, and no file of it ends before its end."""
    try:
        plain = read_json(checkpoint / STATE)
        state = TrainerState(**plain)
        weights = list(checkpoint.glob(WEIGHTS))
        for file in weights:
            with safe_open(file, framework="pt"):  # its header tells its length
                pass
    except (KavaError, TypeError, ValueError, AttributeError, SafetensorError, OSError):
        return False
    return (
        bool(weights)
        and state.global_step == step_of(checkpoint)
        and isinstance(state.log_history, list)
        and isinstance(plain.get("stateful_callbacks"), dict)
        and all(zipfile.is_zipfile(checkpoint / name) for name in ARCHIVES)
    )


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True)
class RandomState:
    """Where every generator of random numbers stands that training draws from."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> Self:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        numpy = np.random.get_state(legacy=False)
        return cls(random.getstate(), numpy, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda)
