"""The systems of a pipeline: its teacher, asked in two ways, its students, in latents or writing
their chain of thought, and others' students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kava_core.artefacts import fingerprint, read_json, tree_fingerprint
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, load_tokenizer, model_fingerprint, to_device
from kava_core.models.placing import place_frozen
from kava_core.models.students import open_student
from kava_core.models.thinking import SETTINGS_FILE
from kava_core.problems.prompt import PLAIN, Prompt, check_prompt, prompt_in
from kava_core.problems.traces import TraceEncoder, chat_fingerprint
from kava_core.settings.evaluate import TEACHER_COT, TEACHERS, writer_of
from kava_core.store import TargetsStore


@dataclass(frozen=True)
class Systems:
    """Folders of the teacher and of the students by name; each is opened when it is asked.

    native: the students whose latents are comparable with the targets: they have latents, and did
    not begin as another model, whose slots have their own basis. others: students from elsewhere,
    which have nothing in common with this teacher, and are asked in their own tokens. writers: the
    folders of those students that write their chain of thought as well, by the name of that system.
    """

    teacher: Path
    students: Mapping[str, Path]
    native: frozenset[str]
    others: Mapping[str, Path] = field(default_factory=dict)
    writers: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        teacher: Path,
        students: Mapping[str, Path],
        targets: Path,
        others: Mapping[str, Path] | None = None,
        write_steps: Sequence[str] = (),
    ) -> Systems:
        """KavaError names a student that is not there, was made from another teacher, or reasons
        in another number of latents than `targets`, a store, has slots; one of `write_steps` that
        never learnt to; and one of the others that is no student."""
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
            if name in write_steps and not about["settings"]["w_cot"]:
                raise KavaError(
                    f"student {name} was trained with w_cot 0, and evaluate.write_steps names it. "
                    f"Run `kava distill {name}` again."
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
        for name, folder in (others or {}).items():
            if not (folder / SETTINGS_FILE).is_file():
                raise KavaError(
                    f"evaluate.others.{name}: {folder} is no student: expected {SETTINGS_FILE} in "
                    "it, found none. Make one with `kava import-student`, or name another."
                )
        # Workers may start in another folder.
        elsewhere = {name: folder.absolute() for name, folder in (others or {}).items()}
        writers = {writer_of(name): students[name] for name in write_steps}
        return cls(teacher, students, frozenset(native), elsewhere, writers)

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
        """The teacher with its chain of thought, the teacher asked at once, and who is compared."""
        return [*TEACHERS, *self.compared]

    @property
    def compared(self) -> list[str]:
        """The students, those that write their chain of thought, others' students."""
        return [*self.students, *self.writers, *self.others]

    def encoder(self, name: str, encoder: TraceEncoder) -> TraceEncoder:
        """What the system is asked with: `encoder`, or one of its own."""
        if name not in self.others:
            return encoder
        folder = self.others[name]
        prompt = prompt_in(folder / "student.json") or PLAIN
        return TraceEncoder(load_tokenizer(str(folder)), encoder.traces, prompt=prompt)

    def fingerprint(self, name: str) -> str:
        """Names all that the system's answers come from but the problems: for a teacher its
        weights, for a student its whole folder, and whether it writes its chain of thought."""
        if name in self.writers:
            return fingerprint(["cot", tree_fingerprint(self.writers[name])])
        folder = self.students.get(name) or self.others.get(name)
        if folder is None:
            return fingerprint([name, model_fingerprint(str(self.teacher))])
        return tree_fingerprint(folder)

    def open(
        self, name: str, encoder: TraceEncoder, dtype: torch.dtype = torch.float32
    ) -> LatentReasoner:
        """The system, where it computes; a teacher that does not fit one GPU over several."""
        for folders in (self.students, self.others):
            if name in folders:
                return to_device(open_student(folders[name], dtype=dtype))
        if name in self.writers:
            decoder = open_student(self.writers[name], dtype=dtype).decoder
            writer = LatentReasoner.plain(decoder, answer_prompt_ids=[], eos_token_id=encoder.eos)
            return to_device(writer)
        prompt = [] if name == TEACHER_COT else encoder.answer_prompt_ids
        model = place_frozen(load_model(str(self.teacher), dtype))
        return LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=encoder.eos)
