"""The systems of a pipeline: its teacher, asked in two ways, and its students."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kava_core.artefacts import fingerprint, folder_fingerprint, read_json
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, load_tokenizer, model_fingerprint
from kava_core.models.students import open_student
from kava_core.models.thinking import SETTINGS_FILE
from kava_core.problems.prompt import Prompt, check_prompt
from kava_core.problems.traces import TraceEncoder, chat_fingerprint
from kava_core.store import TargetsStore

TEACHER_COT, TEACHER_NO_COT = "teacher-cot", "teacher-no-cot"


@dataclass(frozen=True)
class Systems:
    """Folders of the teacher and of the students by name; each is opened when it is asked.

    native: the students whose latents are comparable with the targets: they have latents, and did
    not begin as another model, whose slots have their own basis.
    """

    teacher: Path
    students: Mapping[str, Path]
    native: frozenset[str]

    @classmethod
    def of(cls, teacher: Path, students: Mapping[str, Path], targets: Path) -> Systems:
        """KavaError names a student that is not there, was made from another teacher, or reasons
        in another number of latents than `targets`, a store, has slots."""
        own = model_fingerprint(str(teacher))
        native = set()
        for name, folder in students.items():
            about = read_json(folder / "student.json")
            made_from = about["fingerprints"]["teacher"]
            if made_from != own:
                raise KavaError(
                    f"student {name} was made from the teacher {made_from[:12]}…, and the one in "
                    f"{teacher} is {own[:12]}…. Run `kava distill {name}` again."
                )
            latents = read_json(folder / SETTINGS_FILE)["latents"]
            if not latents:
                continue
            slots = TargetsStore.open(targets).geometry.slots
            if latents != slots:
                raise KavaError(
                    f"student {name} reasons in {latents} latents, and {targets} has {slots} slots "
                    f"per layer and head. Run `kava distill {name}` again."
                )
            if about["settings"].get("model") is None:
                native.add(name)
        return cls(teacher, students, frozenset(native))

    def check_prompts(self, prompt: Prompt) -> None:
        """KavaError if one of them learnt other prompts than this one, or from a chat template that
        is not the teacher's."""
        check_prompt(prompt, self.teacher, "teacher.json", "kava teacher")
        chat = chat_fingerprint(prompt, load_tokenizer(str(self.teacher))).get("chat_template")
        for name, folder in self.students.items():
            check_prompt(prompt, folder, "student.json", f"kava distill {name}")
            if read_json(folder / "student.json")["fingerprints"].get("chat_template") != chat:
                raise KavaError(
                    f"student {name} learnt from another chat template than that of the tokenizer "
                    f"in {self.teacher}. Run `kava distill {name}` again."
                )

    @property
    def names(self) -> list[str]:
        """The teacher with its chain of thought, the teacher asked at once, the students."""
        return [TEACHER_COT, TEACHER_NO_COT, *self.students]

    def fingerprint(self, name: str) -> str:
        """Names all that the system's answers come from but the problems: for a teacher its
        weights, for a student its whole folder."""
        if name not in self.students:
            return fingerprint([name, model_fingerprint(str(self.teacher))])
        folder = self.students[name]
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        return folder_fingerprint(folder, files)

    def open(
        self, name: str, encoder: TraceEncoder, dtype: torch.dtype = torch.float32
    ) -> LatentReasoner:
        """The system, on the CPU."""
        if name in self.students:
            return open_student(self.students[name], dtype=dtype)
        prompt = [] if name == TEACHER_COT else encoder.answer_prompt_ids
        model = load_model(str(self.teacher), dtype)
        return LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=encoder.eos)
