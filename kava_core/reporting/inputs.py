"""What a report is made from: the artefacts that the other stages wrote, read and checked."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kava_core.errors import KavaError
from kava_core.findings import evaluation, eviction, fidelity
from kava_core.findings.base import Finding, check_finding, read_finding
from kava_core.findings.evaluation import (
    Differences,
    EvaluationCosts,
    Prediction,
    Scores,
)
from kava_core.findings.eviction import EvictionFindings
from kava_core.findings.fidelity import FidelityCosts
from kava_core.findings.latents import Insights, Similarities
from kava_core.findings.scores import Percent
from kava_core.findings.tables import read_table
from kava_core.reporting.truncation import BudgetGrid, read_grid
from kava_core.settings.student import KVParts, Share
from kava_core.store import Manifest, TargetsStore, load_manifest
from kava_core.store.summary import eviction_findings

STAGES = ("prepare", "teacher", "traces", "generate", "evict", "fidelity", "evaluate", "report")


class TeacherMetrics(Finding):
    """The teacher's accuracy (%) on n validation problems, with and without its chain."""

    n: int
    exact_match_cot: Percent
    exact_match_no_cot: Percent


class ProblemCounts(Finding):
    """How many problems there are, in all and by number of steps."""

    problems: int
    by_steps: dict[int, int]


class TaughtMetrics(Finding):
    """Counts of what is taught."""

    train: ProblemCounts
    validation: ProblemCounts


class AskedMetrics(Finding):
    """Counts of what is asked."""

    test_sets: dict[str, ProblemCounts]


class TestSetsFile(Finding):
    """How all problems were made."""

    settings: dict[str, Any]


class RunLength(Finding):
    """How long a model was trained."""

    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0

    @property
    def examples(self) -> int:
        """Training examples seen, repeats counted."""
        return self.steps * self.batch_size * self.accumulation


class TeacherSettings(Finding):
    """training: None where the teacher was taken as it is."""

    training: RunLength | None = None


class TeacherFile(Finding):
    """teacher.json; steps: how many it was trained for."""

    settings: dict[str, Any]
    steps: int


class StudentSettings(Finding):
    """The settings of a student that say how it reasons and what taught it."""

    training: RunLength
    reads: Literal["kv_targets", "problems"]
    reasoning: str = "jacobi"
    iterations: int = 0
    kv_parts: KVParts = "both"
    alpha_kv: float | Share = 0.0
    alpha_codi: float | Share = 0.0
    alpha_readout: float | Share = 0.0
    w_cot: float | Share = 0.0
    curriculum: dict[str, int | None] | None = None


class StudentFile(Finding):
    """student.json; steps: how many it was trained for."""

    settings: dict[str, Any]
    fingerprints: dict[str, str]
    steps: int


@dataclass(frozen=True)
class Curve:
    """One logged number along training: steps [n], values [n]."""

    steps: list[int]
    values: list[float]


Curves = dict[str, Curve]


@dataclass(frozen=True)
class TrainedStudent:
    """A student: `plain` are its settings as recorded, `settings` the part used here."""

    name: str
    settings: StudentSettings
    plain: dict[str, Any]
    fingerprints: dict[str, str]
    curves: Curves


@dataclass(frozen=True)
class TargetsOverview:
    """The targets store, seen from the traces.

    lengths: N_C per record [N]. smallest, largest: the fewest and most slots that any layer and
    head keeps of a long enough trace. eviction: what was counted when the store was made.
    """

    manifest: Manifest
    lengths: np.ndarray
    smallest: int
    largest: int
    eviction: EvictionFindings


@dataclass(frozen=True)
class StageRun:
    """The last time a stage ran: seconds, start (UTC, ISO 8601) and host."""

    stage: str
    seconds: float
    started: str
    host: str


@dataclass(frozen=True)
class PipelineFindings:
    """All that the report shows; nothing in it was measured in seconds or bytes of memory.

    scores: test set → system → Score, the pipeline's own test set first. insights: by student, what
    its latents hold; empty where nobody looked. grid: None where the fidelity stage did not run.
    teacher_kv is None where the teacher's caches are not at hand (targets are enough to train
    from). teacher_training: None where the teacher was taken as it is. prepare: the settings the
    problems were made with. write_steps: the students that were asked to write their chain as well.
    """

    scores: Scores
    differences: Differences
    insights: Insights
    grid: BudgetGrid | None
    predictions: list[Prediction]
    similarity: Similarities
    students: dict[str, TrainedStudent]
    teacher_metrics: TeacherMetrics
    teacher_training: RunLength | None
    teacher_curves: Curves
    targets: TargetsOverview
    teacher_kv: Manifest | None
    problems: dict[str, ProblemCounts]
    prepare: dict[str, Any]
    write_steps: Sequence[str] = ()


@dataclass(frozen=True)
class PipelineCosts:
    """What varies from machine to machine.

    fidelity: None where that stage did not run; runs: the last one of each stage, in the pipeline's
    order, empty where there is no run log.
    """

    evaluation: EvaluationCosts
    fidelity: FidelityCosts | None
    runs: list[StageRun]

    def training_seconds(self, student: str) -> float | None:
        """None where the run log does not know."""
        return next((r.seconds for r in self.runs if r.stage == f"distill {student}"), None)


def read_findings(
    folder: Path,
    students: Sequence[str],
    *,
    teacher: Path | None = None,
    kv_targets: Path | None = None,
    write_steps: Sequence[str] = (),
) -> PipelineFindings:
    """Read the artefacts of the pipeline in `folder` and of its `students`.

    teacher, kv_targets: of a pipeline that imports them, where they are. KavaError names a missing
    or wrong file and the stage that makes it, and students that were made from other targets.
    """
    results = folder / "evaluation"
    scores = read_scores(results)
    similarity = read_finding(Similarities, results / evaluation.SIMILARITY, "evaluate")
    looked = results / evaluation.INSIGHTS
    targets = _read_targets(folder, kv_targets)
    teacher = teacher or folder / "teacher"
    found = {name: _read_student(folder, name) for name in students}
    _check_targets(found, targets.manifest)
    teacher_kv = folder / "teacher_kv"
    taught = read_finding(TaughtMetrics, folder / "problems/metrics.json", "prepare")
    asked = read_finding(AskedMetrics, folder / "test_sets/metrics.json", "prepare")
    return PipelineFindings(
        scores=scores,
        differences=read_finding(Differences, results / evaluation.COMPARISONS, "evaluate"),
        insights=read_finding(Insights, looked, "evaluate") if looked.exists() else {},
        grid=read_grid(folder / "fidelity"),
        predictions=read_table(Prediction, results / evaluation.PREDICTIONS, "evaluate"),
        similarity=similarity,
        students=found,
        teacher_metrics=read_finding(TeacherMetrics, teacher / "metrics.json", "teacher"),
        teacher_training=_read_teacher(teacher).training,
        teacher_curves=_read_curves(folder / "curves/teacher"),
        targets=targets,
        teacher_kv=load_manifest(teacher_kv, "teacher_kv") if teacher_kv.exists() else None,
        problems={"train": taught.train, "validation": taught.validation, **asked.test_sets},
        prepare=read_finding(TestSetsFile, folder / "test_sets/test_sets.json", "prepare").settings,
        write_steps=write_steps,
    )


def read_costs(folder: Path, students: Sequence[str], log: Path) -> PipelineCosts:
    """What the pipeline in `folder` cost where it last ran.

    log: the run log, one JSON object per line; it may be missing. KavaError as `read_findings`.
    """
    measured = folder / "measured"
    return PipelineCosts(
        evaluation=read_finding(EvaluationCosts, measured / evaluation.MEASURED, "evaluate"),
        fidelity=read_finding(FidelityCosts, measured / fidelity.MEASURED, "fidelity")
        if (folder / "fidelity").exists()
        else None,
        runs=_read_log(log, students) if log.is_file() else [],
    )


def read_scores(results: Path) -> Scores:
    """Test set → system → Score of an evaluation folder."""
    path = results / evaluation.METRICS
    scores: Scores = read_finding(Scores, path, "evaluate")
    if not scores or not all(scores.values()):
        raise KavaError(f"{path} has no system on some test set. Run `kava evaluate` again.")
    return scores


def _read_teacher(folder: Path) -> TeacherSettings:
    path = folder / "teacher.json"
    about = read_finding(TeacherFile, path, "teacher")
    return check_finding(TeacherSettings, _with_steps(about), path, "teacher")


def _read_student(folder: Path, name: str) -> TrainedStudent:
    path = folder / "students" / name / "student.json"
    stage = f"distill {name}"
    about = read_finding(StudentFile, path, stage)
    settings = check_finding(StudentSettings, _with_steps(about), path, stage)
    curves = _read_curves(folder / "curves/students" / name)
    return TrainedStudent(name, settings, about.settings, about.fingerprints, curves)


def _with_steps(about: TeacherFile | StudentFile) -> dict[str, Any]:
    """The settings with the steps that were taken, which `epochs` leave open."""
    training = about.settings.get("training")
    if not isinstance(training, dict):
        return about.settings
    return {**about.settings, "training": {**training, "steps": about.steps}}


def _check_targets(students: Mapping[str, TrainedStudent], manifest: Manifest) -> None:
    """A page must not show one run's students beside another run's targets."""
    for name, student in students.items():
        made_from = student.fingerprints.get("kv_targets", manifest.digest)
        if made_from != manifest.digest:
            raise KavaError(
                f"student {name} was made from the targets {made_from[:12]}…, and kv_targets is "
                f"{manifest.digest[:12]}…. Run `kava distill {name}` and `kava evaluate` again."
            )


def _read_curves(folder: Path) -> Curves:
    """DVCLive's curves by metric; none where nothing was trained."""
    return {
        path.stem: _read_curve(path) for path in sorted((folder / "plots/metrics").glob("*.tsv"))
    }


def _read_curve(path: Path) -> Curve:
    steps, values = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file, delimiter="\t"), start=2):
            try:
                step, value = int(row["step"]), float(row[path.stem])
            except (KeyError, TypeError, ValueError):
                raise KavaError(
                    f"{path}, line {line}: expected the columns `step` and `{path.stem}` with "
                    "numbers. Run the stage that makes it again."
                ) from None
            if math.isfinite(value):
                steps.append(step)
                values.append(value)
    return Curve(steps, values)


def _read_targets(folder: Path, imported: Path | None) -> TargetsOverview:
    path = imported or folder / "kv_targets"
    if not path.exists():
        raise KavaError(f"{path} is missing. Run `kava evict` first.")
    store = TargetsStore.open(path, checksums=False)  # slot counts are a small part of the files
    counts = [store.slot_counts(shard).max(0) for shard in range(len(store.sizes))]  # [L', H] each
    budgets = np.max(counts, 0)
    return TargetsOverview(
        manifest=store.manifest,
        lengths=store.index.column("n_cot"),
        smallest=int(budgets.min()),
        largest=int(budgets.max()),
        eviction=eviction_findings(store)
        if imported
        else read_finding(EvictionFindings, folder / eviction.FILE, "evict"),
    )


def _read_log(path: Path, students: Sequence[str]) -> list[StageRun]:
    """The latest run of each stage, in the pipeline's order."""
    latest: dict[str, StageRun] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            run = StageRun(
                str(entry["stage"]),
                float(entry["seconds"]),
                str(entry["started"]),
                str(entry["host"]),
            )
        except (ValueError, KeyError, TypeError):
            continue  # a kill can tear a line of the log, and no result depends on it
        latest[run.stage] = run
    order = [*STAGES[:6], *(f"distill {s}" for s in students), "evaluate"]
    return [latest[stage] for stage in order if stage in latest]
