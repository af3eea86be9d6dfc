"""The checkpoints of a run: the last whole one, and the random numbers it went on with."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the Trainer writes its state last)."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)  # a kill left it half-written
        else:
            return checkpoint
    return None


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
