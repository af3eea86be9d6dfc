"""How a problem is put to a model: around its question, before its answer and behind it.

It is a setting (`prepare.prompt`), is kept with problems, teacher, stores and students where it is
not the default, and decides with the tokenizer what `TraceEncoder` makes of a problem.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    StrictBool,
    StringConstraints,
    ValidationError,
    model_validator,
)

from kava_core.artefacts import read_json
from kava_core.errors import KavaError

ANSWER_PROMPT = "The answer is:"
_PLACE = "{question}"
# Any text, white space aside; what is only white space is allowed to end an answer.
Words = Annotated[str, StringConstraints(pattern=r"\S")]
Text = Annotated[str, StringConstraints(min_length=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(_Settings):
    """A problem that is shown with its steps and answer before the one that is asked.

    question, steps, answer: what is shown of it.
    """

    question: Words
    steps: tuple[Words, ...]
    answer: Words


class Prompt(_Settings):
    """question: a text in which `{question}` stands for the question; null: the question and a line
    end, in a chat the question alone. chat: the text is a user's turn, written by the tokenizer's
    chat template, and the model's turn begins with the chain of thought. examples: shown before, in
    a chat as turns. answer: what stands before the answer. stop: the token that ends an answer, as
    text; null: the tokenizer's end of sequence. Without a chat it also ends each example, or an
    empty line does.
    """

    question: str | None = None
    chat: StrictBool = False
    examples: tuple[Example, ...] = ()
    answer: Words = ANSWER_PROMPT
    stop: Text | None = None

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.question is not None and _PLACE not in self.question:
            raise ValueError(
                f"question: expected {_PLACE} where the question is to stand, found "
                f"{self.question!r}, which would ask every problem alike. Put it in"
            )
        return self

    def asked(self, question: str) -> str:
        """The text that asks a question; in a chat the user's turn."""
        template = self.question
        if template is None:
            template = _PLACE if self.chat else f"{_PLACE}\n"
        return template.replace(_PLACE, question)

    def kept(self) -> dict[str, Any]:
        """What an artefact says of its prompt, which is nothing of the default."""
        return {} if self == PLAIN else {"prompt": self.model_dump(mode="json")}


PLAIN = Prompt()


def read_prompt(about: Mapping[str, Any], source: Path) -> Prompt:
    """The prompt that an artefact at `source` keeps among what it says of itself.

    KavaError if it is not in words of this version.
    """
    try:
        return Prompt.model_validate(about.get("prompt", {}))
    except ValidationError as error:
        raise KavaError(
            f"{source} does not say how questions are put in words of this version ({error}). Make "
            "it again with the stage that made it."
        ) from None


def prompt_in(file: Path) -> Prompt | None:
    """The prompt that teacher.json or student.json keeps; None where there is no such file."""
    return read_prompt(read_json(file), file) if file.is_file() else None


def check_prompt(expected: Prompt, folder: Path, name: str, command: str) -> None:
    """KavaError if the model in `folder` learnt other prompts than those it is to be asked with.

    name: of the file in it that keeps them; a folder without it says nothing. command: makes it.
    """
    found = prompt_in(folder / name)
    if found is not None and found != expected:
        theirs, ours = found.model_dump(mode="json"), expected.model_dump(mode="json")
        differ = [key for key in ours if ours[key] != theirs[key]]
        raise KavaError(
            f"{folder} was made with another `prepare.prompt`: expected "
            f"{_shown(ours, differ)}, found {_shown(theirs, differ)}. Run `{command}` again."
        )


def _shown(plain: dict[str, Any], names: list[str]) -> str:
    return json.dumps({name: plain[name] for name in names}, ensure_ascii=False)
