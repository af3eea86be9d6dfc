"""What is served: a student, which thinks in latents, or a teacher, which writes its chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.models.context import context_of
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, to_device
from kava_core.models.students import encoder_of, open_student
from kava_core.models.thinking import SETTINGS_FILE, positions_to_think
from kava_core.problems.traces import TraceEncoder


@dataclass(frozen=True)
class Served:
    """name: what requests call it, the folder's; kind: `student` or `teacher`."""

    name: str
    kind: str
    system: LatentReasoner
    encoder: TraceEncoder

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        eos = self.system.config.eos_token_id
        return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])

    @property
    def room(self) -> int | None:
        """Positions for a question and what is written; None where the model names no bound."""
        config = self.system.config
        context = context_of(self.system.decoder.config)
        if context is None:
            return None
        return context - positions_to_think(config) - len(config.answer_prompt_ids)

    @property
    def about(self) -> str:
        latents = self.system.config.latents
        if self.kind == "teacher":
            return "a teacher, which writes its chain of thought"
        return f"a student with {latents} latents" if latents else "a student without latents"


def open_served(folder: Path, base: str | None = None) -> Served:
    """The student that `kava distill`, or the teacher that `kava teacher` wrote to `folder`, on the
    fastest device there is.

    Questions are put to it as `kava ask` puts them: by the prompt that it learnt from. base: of one
    that is kept as adapters, the model they belong on, if it is not where they say. KavaError if
    there is neither.
    """
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in (SETTINGS_FILE, "teacher.json")
    ):
        raise KavaError(
            f"{folder} is neither a student nor a teacher: expected {SETTINGS_FILE} or "
            "teacher.json in it, found neither. Name a folder that `kava distill` or `kava "
            "teacher` made."
        )
    name = folder.resolve().name
    if (folder / "teacher.json").is_file():
        encoder = encoder_of(folder, "teacher.json")
        model = load_model(str(folder), base=base)
        system = LatentReasoner.plain(model, answer_prompt_ids=[], eos_token_id=encoder.eos)
        return Served(name, "teacher", to_device(system), encoder)
    system = open_student(folder, base)
    return Served(name, "student", to_device(system), encoder_of(folder, "student.json"))
