"""Open a trained student's folder, or say what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.models.inspection import look_at
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_tokenizer
from kava_core.models.thinking import SETTINGS_FILE
from kava_core.problems.prompt import read_prompt
from kava_core.problems.traces import TraceEncoder
from kava_core.wording import shorten


def open_student(
    folder: Path, base: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None
) -> LatentReasoner:
    """The student that `kava distill` wrote to `folder`, in evaluation mode.

    dtype: the one it was saved in, unless told. base: of one that is kept as adapters, the model
    they belong on, if it is not where they say.
    KavaError if the folder is not there, holds another kind of model, or damaged weights.
    """
    if not folder.is_dir():
        raise KavaError(
            f"{folder} is no folder. Expected that of a student, such as data/NAME/students/kava."
        )
    look_at("student", str(folder))
    if not (folder / SETTINGS_FILE).is_file():
        config = folder / "config.json"
        kind = read_json(config).get("model_type") if config.is_file() else None
        found = f"a model of type {shorten(str(kind))} without it" if kind else "no model"
        raise KavaError(
            f"{folder} is no student: expected a {SETTINGS_FILE} beside its weights, found "
            f"{found}. Name a folder that `kava distill` made, or run it again."
        )
    return LatentReasoner.from_pretrained(folder, base=base, dtype=dtype)


def encoder_of(folder: Path, name: str) -> TraceEncoder:
    """How the model in `folder` was taught to be asked.

    name: of the file that says so, student.json or teacher.json; without it, and where it says
    nothing, a question stands alone, and steps of examples are equations.
    """
    file = folder / name
    about = read_json(file) if file.is_file() else {}
    prompt = read_prompt(about, file)
    return TraceEncoder(
        load_tokenizer(str(folder)), about.get("traces", "equations"), prompt=prompt
    )
