"""Questions without gold answers: read from a file, put to a student and to its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.evaluation.asking import Written, write
from kava_core.models.context import context_of
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, model_fingerprint, to_device
from kava_core.models.students import encoder_of, open_student
from kava_core.models.thinking import positions_to_think
from kava_core.problems.formats import read_jsonl, read_text, readable
from kava_core.problems.rows import BadRow
from kava_core.problems.traces import TraceEncoder

_NAMED = 5  # lines in a message


@dataclass(frozen=True)
class Question:
    """given: what else its row of a file holds; place: where it stands in the file."""

    text: str
    given: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order: one a line, or in .jsonl an object's `question`.

    Empty lines are none. KavaError names the line that holds no question.
    """
    if not path.is_file():
        raise KavaError(f"{path} is missing, or no file. Correct the path behind --file.")
    objects = path.suffix == ".jsonl"
    name = "question" if objects else "text"
    found = []
    for row in readable(path, read_jsonl(path) if objects else read_text(path)):
        if isinstance(row, BadRow):
            raise row
        try:
            json.dumps(row.fields, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise BadRow(row.place, "Unicode text", f"half of a character ({error})") from None
        except ValueError:
            found_instead = "NaN, Infinity or one that is too large for a float"
            raise BadRow(row.place, "numbers of JSON", found_instead) from None
        given = {key: value for key, value in row.fields.items() if key != name}
        found.append(Question(row.text(name), given, row.place))
    if not found:
        raise KavaError(f"{path} holds no question. Write one a line, or one JSON object a line.")
    return found


@dataclass(frozen=True)
class Respondents:
    """Who is asked: a student, or the writer of steps in its weights; and its teacher, or none.

    origin: what the teacher is to the student, "teacher", or "base" of one that was imported.
    """

    system: LatentReasoner
    writes_steps: bool
    teacher: LatentReasoner | None
    encoder: TraceEncoder
    origin: str = "teacher"

    @classmethod
    def of(
        cls, folder: Path, *, steps: bool, teacher: Path | None, base: str | None = None
    ) -> Respondents:
        """Open them, on the fastest device there is.

        steps: the student writes its chain instead of thinking in latents. KavaError where it never
        learnt to (w_cot is 0), and where `teacher` is not the one that the student was made from.
        base: as `open_student` takes it.
        """
        system = open_student(folder, base)
        encoder = encoder_of(folder, "student.json")
        if steps:
            if not _recorded(folder, "settings", "w_cot"):
                raise KavaError(
                    f"{folder} was trained with w_cot 0: it never learnt to write its steps. Leave "
                    "--write-steps out, or train a student with w_cot above 0."
                )
            system = _writer(system.decoder, encoder)
        if teacher is None:
            return cls(to_device(system), steps, None, encoder)
        expected = str(_recorded(folder, "fingerprints", "teacher"))
        origin = "base" if "imported" in read_json(folder / "student.json") else "teacher"
        found = model_fingerprint(str(teacher))
        if found != expected:
            raise KavaError(
                f"{folder} was made from the {origin} {expected[:12]}…, and the one in {teacher} "
                f"is {found[:12]}…. Name its folder behind --compare."
            )
        writer = _writer(load_model(str(teacher)), encoder)
        return cls(to_device(system), steps, to_device(writer), encoder, origin)

    def __iter__(self) -> Iterator[LatentReasoner]:
        yield self.system
        if self.teacher is not None:
            yield self.teacher

    def check(self, questions: Sequence[Question]) -> None:
        """KavaError that names those of a file that are too long for who is asked."""
        encoded = self.encoder.encode_questions([question.text for question in questions])
        for system in self:
            config, context = system.config, context_of(system.decoder.config)
            around = positions_to_think(config) + len(config.answer_prompt_ids)
            if context is None:
                continue
            long = [i for i, ids in enumerate(encoded) if len(ids) + around > context]
            if long:
                places = ", ".join(questions[i].place for i in long[:_NAMED])
                more = f" and {len(long) - _NAMED} more" if len(long) > _NAMED else ""
                raise KavaError(
                    f"{len(long)} of {len(questions)} questions are too long ({places}{more}): the "
                    f"first takes {len(encoded[long[0]]) + around} positions with latents and "
                    f"answer prompt, and the model's context is {context}. Shorten them, or leave "
                    "them out."
                )

    def warm_up(self, question: str) -> None:
        """A model's first call is slow; after this one the seconds are those of any other."""
        for system in self:
            write(system, self.encoder, [question], batch_size=1, max_new_tokens=2)

    def answer(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int,
        max_new_tokens: int,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[dict[str, Any]]:
        """One object of JSON per question, in their order; `advance` as in `write`, per system."""
        texts = [question.text for question in questions]
        own, *other = [
            write(
                system,
                self.encoder,
                texts,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                thoughts=system is self.system,
                advance=advance,
            )
            for system in self
        ]
        found = [
            {
                "question": question.text,
                **_told(written),
                "latents": self.system.config.latents,
                "thoughts": list(written.thoughts),
                "reasoning_passes": self.system.latent_passes,
                "written_steps": self.writes_steps,
            }
            for question, written in zip(questions, own, strict=True)
        ]
        for written_by_teacher in other:
            for row, written in zip(found, written_by_teacher, strict=True):
                row[self.origin] = _told(written)
        for row, question in zip(found, questions, strict=True):
            if question.given:
                row["given"] = dict(question.given)
        return found


def _recorded(folder: Path, section: str, name: str) -> Any:
    """What student.json says; KavaError if it does not."""
    file = folder / "student.json"
    about = read_json(file)
    found = about.get(section) if isinstance(about, dict) else None
    if not isinstance(found, dict) or name not in found:
        raise KavaError(
            f"{file}: expected {section}.{name} in it, found none. Copy the student's folder again."
        )
    return found[name]


def _writer(model: PreTrainedModel, encoder: TraceEncoder) -> LatentReasoner:
    """The model as it writes its chain of thought, and its answer behind that."""
    return LatentReasoner.plain(model, answer_prompt_ids=[], eos_token_id=encoder.eos)


def _told(written: Written) -> dict[str, Any]:
    return {
        "answer": written.answer,
        "text": written.text,
        "passes": written.passes,
        "seconds": round(written.seconds, 4),
    }
