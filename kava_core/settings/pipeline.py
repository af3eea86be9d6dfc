"""A whole pipeline, read from `pipelines.yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, ValidationError, model_validator

from kava_core.errors import KavaError
from kava_core.settings.base import (
    NAME,
    Device,
    Name,
    NotNegative,
    Positive,
    PositiveReal,
    Real,
    Section,
    bucket_folder,
)
from kava_core.settings.choice import CHOICE
from kava_core.settings.document import read_yaml
from kava_core.settings.evaluate import Evaluate, Report
from kava_core.settings.evict import Evict
from kava_core.settings.fidelity import Fidelity
from kava_core.settings.generate import Generate
from kava_core.settings.prepare import Prepare
from kava_core.settings.student import Student
from kava_core.settings.teacher import Teacher
from kava_core.settings.traces import Traces
from kava_core.settings.training import Training
from kava_core.wording import shorten, shown

# The sections that make targets, and what belongs to them.
MAKING = ("teacher", "generate", "evict", "traces", "fidelity")
LONGEST_LIST, LONGEST_KEY, LONGEST_LINE, LONGEST_TEXT = 300, 150, 300, 330  # characters


def gpu_share(value: float) -> float:
    """Of a GPU, or so many of them."""
    if value < 0 or (value > 1 and value != int(value)):
        raise ValueError("should be a share from 0 to 1, or a whole number of GPUs")
    return value


Bucket = Annotated[str, AfterValidator(bucket_folder)]


class Resources(Section):
    """What is used to compute, never what is computed: not tracked by DVC.

    workers: Ray workers of generate, evict, fidelity and evaluate; 0 runs in process; null shares
    the cores there are. cpus_per_worker: cores that Ray keeps for each worker and each process of a
    training. device: `auto` computes on GPUs where there are any; `cpu` shows a command and its
    workers none. gpus_per_worker: the share of a GPU that each worker gets, but those of evict,
    which need none; null: a whole one, where there are GPUs; 2 and more: so many, over which a
    teacher that does not fit one is spread. Without a share workers get none, and beside a visible
    GPU 0 is an error. A process of a training always has a whole one. loader_workers: processes
    that read batches ahead of a training; 0 reads in the training itself. wait_for_room: seconds
    that a stage waits on a cluster of RAY_ADDRESS that has no room for any worker, or not for all
    processes of a training. Elsewhere no room comes, and none is an error. ray_metrics: whether the
    workers' examples and rates are metrics of Ray, too. push_caches: whether `dvc push` takes the
    teacher's caches along, by far the largest artefact and one that can be made again (`kava sync`
    writes it into the pipeline's dvc.yaml). caches_to, targets_to: a folder on object storage,
    s3:// or gs://, where the stores teacher_kv and kv_targets are put while they are made, each
    under a name of its own; what lies in data/NAME/ then stands for them (docs/object-storage.md).
    """

    workers: NotNegative | None = None
    cpus_per_worker: PositiveReal = 1
    device: Device = "auto"
    gpus_per_worker: Annotated[Real, AfterValidator(gpu_share)] | None = None
    loader_workers: NotNegative = 0
    wait_for_room: PositiveReal = 600
    ray_metrics: StrictBool = False
    push_caches: StrictBool = True
    caches_to: Bucket | None = None
    targets_to: Bucket | None = None

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        for nothing, where in (
            (self.device == "cpu", "device: cpu"),
            (self.workers == 0, "workers: 0"),
        ):
            if nothing and self.gpus_per_worker:
                raise ValueError(f"gpus_per_worker: means nothing at `{where}`. Leave it out")
        if self.caches_to is not None and self.changed("push_caches"):
            raise ValueError(
                "push_caches: means nothing beside `caches_to`, where DVC has only the address of "
                "the caches. Leave it out"
            )
        if self.workers == 0 and self.ray_metrics:
            raise ValueError("ray_metrics: means nothing at `workers: 0`. Leave it out")
        return self


class Cadence(Section):
    """How often a training run says and keeps what it does: changes no result, not tracked by DVC.

    log_every: steps from one point of the loss curves to the next. save_every: steps from one
    checkpoint to the next. gradient_share_every: steps from one measurement of each term's share of
    the gradient to the next, 0: none. report_to: who is told of the curves while they grow, each an
    installed package, set up as its own pages say (docs/training.md).
    """

    log_every: Positive = 25
    save_every: Positive = 200
    gradient_share_every: NotNegative = 100
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(self.report_to) != len(set(self.report_to)):
            raise ValueError("report_to must name none twice")
        return self


class Pipeline(Section):
    """A named pipeline, complete. Without a section `traces` or `fidelity` it has no such stage."""

    prepare: Prepare
    teacher: Teacher
    traces: Traces | None = None
    generate: Generate
    evict: Evict
    fidelity: Fidelity | None = None
    students: Annotated[dict[Name, Student], Field(min_length=1)]
    evaluate: Evaluate
    report: Report
    resources: Resources = Resources()
    cadence: Cadence = Cadence()

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        changed = self.resources.changed("push_caches", "caches_to")
        if self.generate.keep == "targets" and changed:
            raise ValueError(
                f"resources.{changed[0]}: means nothing at `generate.keep: targets`, where no "
                "caches are kept. Leave it out"
            )
        self.evaluate.check_systems(self.students)
        if self.teacher.model == "scratch" and self.prepare.tokenizer is not None:
            raise ValueError(
                "prepare.tokenizer: a teacher from scratch learns its own tokenizer from the "
                "problems that `prepare` leaves. Leave it out, and limit characters instead of "
                "tokens"
            )
        if self.teacher.model == "scratch" and self.prepare.prompt.chat:
            raise ValueError(
                "prepare.prompt.chat: a teacher from scratch has no chat template. Leave it out, "
                "or name a chat model as teacher.model"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """What a later stage would refuse, days after the first."""
        if self.prepare.traces == "sentences":
            for key, kept in self._kept():
                if kept == "results":
                    raise ValueError(
                        f"{key}: results: prepare.traces is sentences, which do not say which of "
                        "their tokens are results. Set prepare.traces to equations, results or "
                        "checked, or keep something else"
                    )
        if self.teacher.training is not None:
            self._check_records("teacher", self.teacher.training, 1)
        chains = 1 if self.traces is None else self.traces.samples  # of a problem, at most
        for name, student in self.students.items():
            self._check_records(f"students.{name}", student.training, chains)
            self._check_targets(f"students.{name}", student)
        return self

    def _kept(self) -> Iterator[tuple[str, str]]:
        """Every key that says which tokens are kept, with the name of what it says."""
        yield "evict.policy", self.evict.policy.name
        if self.fidelity is not None:
            for i, policy in enumerate(self.fidelity.policies):
                yield f"fidelity.policies.{i}", policy.name
        if self.teacher.forgets is not None:
            yield "teacher.forgets.keeps", self.teacher.forgets.keeps

    def _check_records(self, key: str, training: Training, chains: int) -> None:
        if training.records is None or self.prepare.train is None:
            return
        held_out = training.held_out.records if training.held_out else 0
        most = self.prepare.train * chains - held_out
        if training.records > most:
            beside = f", {held_out} of which are held out" if held_out else ""
            many = f"prepare.train is {self.prepare.train}"
            if chains > 1:
                many += f" and traces.samples {chains}"
            raise ValueError(
                f"{key}.training.records: expected at most {max(most, 0)}, found "
                f"{training.records}: {many}{beside}. Lower it, or raise prepare.train"
            )

    def _check_targets(self, key: str, student: Student) -> None:
        """ValueError if `evict` makes other targets than the student can be taught from."""
        evict, curriculum = self.evict, student.curriculum
        if student.taught("alpha_readout") and evict.select != "record":
            raise ValueError(
                f"{key}.alpha_readout: needs slots that hold one token in all layers and heads, "
                f"and evict.select is {evict.select}. Set evict.select: record, or leave it out"
            )
        if student.fake_quantise and min(evict.keys_bits, evict.values_bits) > 8:
            raise ValueError(
                f"{key}.fake_quantise: passes keys and values through the codes of the targets, "
                f"and evict.keys_bits is {evict.keys_bits} and evict.values_bits "
                f"{evict.values_bits}. Set one of these to 8 or 4, or leave it out"
            )
        # A pyramid is as wide as its widest layer, which depends on how many there are.
        uniform = evict.budget_shape == "uniform"
        if curriculum and uniform and evict.budget % curriculum.latents_per_step:
            raise ValueError(
                f"{key}.curriculum.latents_per_step: expected a divisor of evict.budget "
                f"{evict.budget}, found {curriculum.latents_per_step}. Change one of them"
            )


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in `pipelines.yaml`; KavaError if it cannot be read or has no pipelines."""
    if not path.exists():
        raise KavaError(f"{path} is missing. Run this where pipelines.yaml lies.")
    document = read_yaml(path)
    pipelines = document.get("pipelines") if isinstance(document, dict) else None
    if not isinstance(pipelines, dict):
        raise KavaError(f"{path} has no `pipelines:` mapping.")
    return {**document, "pipelines": {str(key): value for key, value in pipelines.items()}}


def find_pipeline(path: Path, name: str | None = None) -> tuple[str, Any]:
    """Name and settings, as they stand in the file, of the pipeline `name`, or of the one that the
    key `pipeline:` names."""
    document = read_document(path)
    pipelines = document["pipelines"]
    name = str(name or document.get("pipeline"))
    if name not in pipelines:
        there = shorten(", ".join(pipelines), LONGEST_LIST)
        raise KavaError(f"{path} has no pipeline {shown(name)}. There are: {there}.")
    if not re.fullmatch(NAME, name):
        raise KavaError(
            f"{path}: pipeline name {shown(name)} must be of at most 100 letters, digits, - and _ "
            "only: it names a folder, and DVC reads a dot as a path. Rename it."
        )
    return name, pipelines[name]


def is_imported(plain: Any) -> bool:
    """Whether the settings of a pipeline, as they stand in the file, are of one that imports its
    targets (`kava_core.settings.imported`): it says so, or has students and makes no targets."""
    return isinstance(plain, dict) and (
        "imports" in plain or ("students" in plain and not plain.keys() & set(MAKING))
    )


def load_pipeline(path: Path, name: str | None = None) -> tuple[str, Pipeline]:
    """The pipeline `name` of the file, or the one its `pipeline:` key names, validated.

    Raises KavaError with the key path of every wrong setting, and for a pipeline that imports its
    targets.
    """
    name, plain = find_pipeline(path, name)
    if is_imported(plain):
        raise KavaError(
            f"pipeline {name} of {path} imports its targets: it has the stages distill and, with a "
            "section `prepare`, prepare, evaluate and report, and nothing else. Name another "
            f"pipeline, or give it the sections {', '.join(MAKING[:3])}."
        )
    try:
        return name, Pipeline.model_validate(plain)
    except ValidationError as error:
        raise KavaError(explain(path, f"pipelines.{name}", error)) from None


def explain(path: Path, root: str, error: ValidationError) -> str:
    """What is wrong with the settings below the key `root` of the file: a line each, as far as they
    have room in a message that is read."""
    lines = [shorten(line, LONGEST_LINE) for line in _wrong(root, error.errors())]
    text = f"{path} has {len(lines)} wrong setting(s):"
    for i, line in enumerate(lines):
        if i and len(text) - len(str(path)) + len(line) > LONGEST_TEXT:
            return f"{text}\n  … and {len(lines) - i} more"
        text += f"\n  {line}"
    return text


def _wrong(root: str, problems: Sequence[Any]) -> Iterator[str]:
    """A line per wrong setting: its key path, what is wrong, what was found."""
    for problem in problems:
        key = ".".join([root, *(shorten(str(part)) for part in problem["loc"])])
        if problem["type"] == CHOICE:  # a policy or a source, with settings of its own
            yield from _wrong(key, problem["ctx"]["errors"])
            continue
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if isinstance(problem["input"], dict) else f", found {shown(problem['input'])}"
        if problem["type"] == "extra_forbidden":
            message, found = "no such setting", ""
        yield f"{shorten(key, LONGEST_KEY)}: {message}{found}"
