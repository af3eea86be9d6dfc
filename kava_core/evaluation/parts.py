"""An evaluation in parts, each a file: what a run makes, and the next one does not make again.

A system's answers to a test set are asked for a batch at a time, and only when all are there are
the gold answers scored, whose batches depend on what was written. Beside these stand the memory
that an answer takes, and what a student's latents hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
import transformers
from pydantic import Field

from kava_core.artefacts import clear, fingerprint, kept_folder
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.evaluation.asking import Reply
from kava_core.evaluation.examination import Examination, ProblemSet
from kava_core.evaluation.systems import Systems
from kava_core.findings.base import Finding, read_finding
from kava_core.findings.latents import Insight, SlotSimilarity
from kava_core.hardware import hardware
from kava_core.models.loading import load_tokenizer, model_fingerprint, tokenizer_fingerprint
from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
from kava_core.problems.traces import TraceEncoder, chat_fingerprint
from kava_core.settings import Evaluate
from kava_core.store import TargetsStore

Kind = Literal["memory", "answers", "scores", "similarity", "latents"]


Found = TypeVar("Found", bound=Finding)


class Asked(Finding):
    """The replies to one batch."""

    replies: list[Reply]


class Scored(Finding):
    """−log p of each token of the gold answers of one batch, by the index of their problem."""

    nll: dict[int, list[float]]


class Memory(Finding):
    """Bytes of tensors that the batch with the longest questions takes, and where it took them:
    the machine in words."""

    peak_bytes: int
    hardware: dict[str, str] = Field(default_factory=dict)  # was not written down once


KINDS: dict[Kind, type[Finding]] = {
    "memory": Memory,
    "answers": Asked,
    "scores": Scored,
    "similarity": SlotSimilarity,
    "latents": Insight,
}


@dataclass(frozen=True)
class Part:
    """A piece of work; number: of the batch, 0 where there is one of its kind."""

    kind: Kind
    system: str
    file: Path
    test_set: str = ""
    number: int = 0

    def read(self, kind: type[Found]) -> Found:
        """What is in its file."""
        return read_finding(kind, self.file, "evaluate")

    @property
    def is_finished(self) -> bool:
        """Whether a run before made it; what is torn goes."""
        if not self.file.exists():
            return False
        try:
            self.read(KINDS[self.kind])
        except KavaError:
            warn(f"evaluate: {self.file} is damaged, and is made again")
            clear(self.file)
            return False
        return True


@dataclass(frozen=True)
class Material:
    """What is asked, by name of the test set, and what puts it into tokens."""

    encoder: TraceEncoder
    test_sets: dict[str, ProblemSet]

    @classmethod
    def open(cls, teacher: Path, problems: Path, test_sets: Path, settings: Evaluate) -> Self:
        """KavaError if there is nothing to ask, or nothing that could be compared."""
        source: ProblemFolder | AskedFolder
        if settings.split == "validation":
            source = open_problems(problems)
            found = {str(settings.split): source.load(settings.split)}
        else:
            source = open_test_sets(test_sets)
            found = source.load_all()
        encoder = TraceEncoder(load_tokenizer(str(teacher)), source.traces, prompt=source.prompt)
        return cls(
            encoder,
            {
                name: ProblemSet.of(name, each[: settings.limit], encoder)
                for name, each in found.items()
            },
        )

    @property
    def own(self) -> ProblemSet:
        """The pipeline's own set, whose problems latents are looked into."""
        return next(iter(self.test_sets.values()))


@dataclass(frozen=True)
class Plan:
    """All parts of an evaluation, in the order in which one process makes them; and system → the
    fingerprint of what is asked."""

    parts: tuple[Part, ...]
    weights: Mapping[str, str]

    @classmethod
    def of(
        cls,
        systems: Systems,
        material: Material,
        targets: Path,
        settings: Evaluate,
        output: Path,
    ) -> Self:
        """output: of the evaluation; what determines a part's content names its folder."""
        encoder = material.encoder
        common = {
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "prompt": encoder.prompt.model_dump(mode="json"),
            "chat": chat_fingerprint(encoder.prompt, encoder.tokenizer),
            "settings": settings.model_dump(
                mode="json", include={"batch_size", "max_new_tokens", "threads", "model_dtype"}
            ),
            # On another machine answers may differ in their last bits, and seconds do.
            "made on": [hardware(), torch.__version__, transformers.__version__],
        }
        asked = {
            name: fingerprint([[p.id, p.question, p.answer] for p in test_set.problems])
            for name, test_set in material.test_sets.items()
        }
        store = TargetsStore.open(targets).manifest.digest if systems.native else None
        weights = {name: systems.fingerprint(name) for name in systems.names}
        parts: list[Part] = []
        for name in systems.names:
            own = {**common, "system": weights[name]}
            for each, test_set in material.test_sets.items():
                folder = kept_folder(output / each / name, "evaluate", [own, asked[each]])
                parts.append(Part("memory", name, folder / "memory.json", each))
                count = -(-len(test_set.problems) // settings.batch_size)
                for kind in ("answers", "scores"):
                    parts += [
                        Part(kind, name, folder / f"{kind}-{i:05d}.json", each, i)
                        for i in range(count)
                    ]
            if name not in systems.native:
                continue
            seen = {
                "store": store,
                "records": settings.similarity_records,
                "interpret": [settings.interpret_records, settings.intervention_problems],
                "teacher": model_fingerprint(str(systems.teacher)),
                "traces": encoder.traces,
                "problems": [[p.id, p.question, p.steps, p.answer] for p in material.own.problems],
            }
            folder = kept_folder(output / "latents" / name, "evaluate", [own, seen])
            parts.append(Part("similarity", name, folder / "similarity.json"))
            if settings.interpret_records:
                parts.append(Part("latents", name, folder / "latents.json"))
        return cls(tuple(parts), weights)

    @property
    def folders(self) -> set[Path]:
        """Where the parts are kept."""
        return {part.file.parent for part in self.parts}

    def of_kind(self, kind: Kind, system: str, test_set: str = "") -> list[int]:
        """Numbers of parts."""
        wanted = (kind, system, test_set)
        return [i for i, p in enumerate(self.parts) if (p.kind, p.system, p.test_set) == wanted]

    def replies(
        self, system: str, test_set: ProblemSet, encoder: TraceEncoder, batch_size: int
    ) -> list[Reply]:
        """All replies of a system to a test set, in the order of its problems."""
        found: dict[int, Reply] = {}
        batches = test_set.batches(encoder, batch_size)
        for number, chosen in zip(
            self.of_kind("answers", system, test_set.name), batches, strict=True
        ):
            found.update(zip(chosen, self.parts[number].read(Asked).replies, strict=True))
        return [found[i] for i in range(len(found))]

    def examination(
        self, system: str, test_set: ProblemSet, encoder: TraceEncoder, batch_size: int
    ) -> Examination:
        """What a system did with a test set, when all of its parts are there."""
        nll: dict[int, list[float]] = {}
        for number in self.of_kind("scores", system, test_set.name):
            nll.update(self.parts[number].read(Scored).nll)
        (number,) = self.of_kind("memory", system, test_set.name)
        memory = self.parts[number].read(Memory)
        return Examination(
            self.replies(system, test_set, encoder, batch_size),
            [nll[i] for i in range(len(test_set.problems))],
            memory.peak_bytes,
            memory.hardware,
        )
