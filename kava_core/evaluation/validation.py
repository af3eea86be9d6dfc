"""How well a teacher answers, with a written chain of thought and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kava_core.artefacts import clear, disk_errors, ensure_folder
from kava_core.console import progress, say, warn
from kava_core.errors import KavaError
from kava_core.evaluation.asking import ask
from kava_core.findings.base import Finding, read_finding, write_finding
from kava_core.models.batching import by_length
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import DTYPES, load_model, load_tokenizer, model_fingerprint
from kava_core.models.placing import place_frozen
from kava_core.parallel.shards import run_shards
from kava_core.problems.folder import open_problems
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Resources, Teacher

HOW = ("cot", "no_cot")  # with a written chain of thought, and asked for the answer at once
FEW = 8  # parts that take less than it takes to start workers for them


class Correct(Finding):
    """Which of the problems of a part were answered rightly: id → whether."""

    answers: dict[str, bool]


@dataclass(frozen=True)
class ValidateJob:
    """A batch of problems put to the teacher in one way; the answers to each are a file in `work`.

    problems, teacher: folders. work: named after the teacher's weights, since parts are kept.
    """

    problems: Path
    teacher: Path
    settings: Teacher
    work: Path

    @classmethod
    def of(cls, problems: Path, teacher: Path, settings: Teacher) -> ValidateJob:
        """Beside the teacher's folder."""
        name = f"validation-{model_fingerprint(str(teacher))[:24]}"
        return cls(problems.absolute(), teacher, settings, teacher.parent / name)

    @property
    def threads(self) -> int:
        return self.settings.training.threads if self.settings.training else 1

    @cached_property
    def asked(self) -> list[Problem]:
        """The problems; KavaError if there are none."""
        source = open_problems(self.problems)
        problems = source.load("validation")[: self.settings.validate_on]
        if not problems:
            raise KavaError(
                f"{self.problems} has no validation problems to ask the teacher. Ask `prepare` for "
                "some."
            )
        return list(problems)

    @cached_property
    def encoder(self) -> TraceEncoder:
        source = open_problems(self.problems)
        tokenizer = load_tokenizer(str(self.teacher))
        return TraceEncoder(tokenizer, source.traces, prompt=source.prompt)

    @cached_property
    def batches(self) -> list[list[Problem]]:
        """What shares a batch depends on the problems alone."""
        encoded = self.encoder.encode_questions([problem.question for problem in self.asked])
        chosen = by_length([len(ids) for ids in encoded], self.settings.batch_size)
        return [[self.asked[i] for i in batch] for batch in chosen]

    @property
    def parts(self) -> range:
        return range(len(HOW) * len(self.batches))

    def place(self, part: int) -> tuple[str, list[Problem]]:
        """How it is asked, and what."""
        how, batch = divmod(part, len(self.batches))
        return HOW[how], self.batches[batch]

    def file(self, part: int) -> Path:
        return self.work / f"part-{part:05d}.json"

    def read(self, part: int) -> dict[str, bool]:
        """id → whether the answer was right."""
        return read_finding(Correct, self.file(part), "teacher").answers

    def is_finished(self, part: int) -> bool:
        """Whether a run before made it; what is torn goes."""
        if not self.file(part).exists():
            return False
        try:
            if self.read(part).keys() == {problem.id for problem in self.place(part)[1]}:
                return True
        except KavaError:
            pass
        warn(f"teacher: {self.file(part)} is damaged, and is made again")
        clear(self.file(part))
        return False

    def open(self) -> Callable[[int], int]:
        model = place_frozen(load_model(str(self.teacher), DTYPES[self.settings.model_dtype]))
        prompts: dict[str, list[int]] = {"cot": [], "no_cot": self.encoder.answer_prompt_ids}
        systems = {
            how: LatentReasoner.plain(
                model, answer_prompt_ids=prompt, eos_token_id=self.encoder.eos
            )
            for how, prompt in prompts.items()
        }

        def work(part: int) -> int:
            how, problems = self.place(part)
            replies = ask(
                systems[how],
                self.encoder,
                problems,
                batch_size=self.settings.batch_size,
                max_new_tokens=self.settings.max_new_tokens,
            )
            found = Correct(answers={reply.id: reply.correct for reply in replies})
            with disk_errors(self.work):
                write_finding(self.file(part), found)
            return len(problems)

        return work


def validate(job: ValidateJob, resources: Resources) -> dict[str, float]:
    """{"n": N, "exact_match_cot", "exact_match_no_cot": in per cent}.

    Parts that a run before made are not asked again. resources: who asks; nothing of what is found
    depends on them.
    """
    finished = [part for part in job.parts if job.is_finished(part)]
    if finished:
        say(f"teacher: {len(finished)} of {len(job.parts)} parts of its validation are there")
    missing: Sequence[int] = sorted(set(job.parts) - set(finished))
    alone = resources.workers is None and len(missing) <= FEW
    with progress() as display:
        task = display.add_task("teacher, validation", total=len(HOW) * len(job.asked), note="")
        display.update(task, advance=sum(len(job.place(part)[1]) for part in finished))
        for part, count in run_shards(
            replace(job),  # without what this one has read
            missing,
            resources.model_copy(update={"workers": 0, "gpus_per_worker": None})
            if alone
            else resources,
            folder=ensure_folder(job.work),
            examples=lambda _, count: count,
        ):
            display.update(task, advance=count, note=job.place(part)[0])
    found: dict[str, float] = {"n": len(job.asked)}
    for how in HOW:
        right = [
            correct
            for part in job.parts
            if job.place(part)[0] == how
            for correct in job.read(part).values()
        ]
        found[f"exact_match_{how}"] = 100 * sum(right) / len(right)
    return found
