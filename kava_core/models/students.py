"""Open a trained student's folder, or say what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_whole


def open_student(folder: Path) -> LatentReasoner:
    """The student that `kava distill` wrote to `folder`, in evaluation mode.

    KavaError if the folder is not there, holds another kind of model, or damaged weights.
    """
    if not folder.is_dir():
        raise KavaError(
            f"{folder} is no folder. Expected that of a student, such as data/NAME/students/kava."
        )
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind != "latent_reasoner":
        found = f"a model of type {kind}" if kind else "no model"
        raise KavaError(
            f"{folder} is no student: expected a config.json of a latent_reasoner, found {found}. "
            "Name a folder that `kava distill` made."
        )
    student: LatentReasoner = load_whole(LatentReasoner, folder)
    return student.eval()
