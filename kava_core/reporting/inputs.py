"""What a report is made from: the artefacts that the other stages wrote, read and checked."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kava_core.errors import KavaError
from kava_core.reporting.files import Found, GroupScore, Percent, checked, read_checked
from kava_core.reporting.insights import Insight, LayerMaps, read_insights
from kava_core.reporting.truncation import Truncation, read_truncation
from kava_core.store.manifest import Manifest, load_manifest

STAGES = ("prepare", "teacher", "generate", "evict", "fidelity", "evaluate", "report")
PREDICTION_COLUMNS = (
    "test_set",
    "system",
    "id",
    "n_steps",
    "question",
    "gold",
    "text",
    "answer",
    "correct",
    "passes",
)


class Score(Found):
    """One system on one test set: accuracy and its 95 % interval in %, the costs means per problem.

    forward_passes: decoder calls; tokens: generated; seconds_per_problem: wall-clock; perplexity:
    of the gold answers, per token; peak_memory_mb: of tensors beyond the weights, for a batch.
    """

    exact_match: Percent
    ci95: tuple[Percent, Percent]
    n: int
    forward_passes: float
    tokens: float
    seconds_per_problem: float
    perplexity: float
    peak_memory_mb: float
    by_steps: dict[int, GroupScore]
    by_operation: dict[str, GroupScore]
    by_trace_length: dict[str, GroupScore]


Scores = dict[str, dict[str, Score]]  # test set → system


class Difference(Found):
    """Exact match of a student less that of a baseline on the same problems, in points."""

    difference: float
    ci95: tuple[float, float]
    p_value: float

    @property
    def clear(self) -> bool:
        """The interval does not hold 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


# test set → student → baseline → difference
Differences = dict[str, dict[str, dict[str, Difference]]]


class Similarity(LayerMaps):
    """Mean cosine of a student's latents to its targets, [L'][M]; None where no record has a slot.

    layers: the L' teacher layers that are compared.
    """

    records: int


class TeacherMetrics(Found):
    """The teacher's accuracy (%) on n validation problems, with and without its chain."""

    n: int
    exact_match_cot: Percent
    exact_match_no_cot: Percent


class ProblemCounts(Found):
    """How many problems a split has, in all and by number of steps."""

    problems: int
    by_steps: dict[int, int]


class ProblemMetrics(Found):
    """Counts of what is taught."""

    train: ProblemCounts
    validation: ProblemCounts


class TestSetMetrics(Found):
    """Counts of what is asked: `test` and the further test sets."""

    test_sets: dict[str, ProblemCounts]


class TestSetsFile(Found):
    """How all problems were made."""

    settings: dict[str, Any]


class Training(Found):
    """How long a model was trained."""

    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0

    @property
    def examples(self) -> int:
        """Training examples seen, repeats counted."""
        return self.steps * self.batch_size * self.accumulation


class StudentSettings(Found):
    """The settings of a student that say how it reasons and what taught it."""

    training: Training
    reasoning: str
    iterations: int = 0
    alpha_kv: float = 0.0
    alpha_codi: float = 0.0
    w_cot: float = 0.0


class StudentFile(Found):
    """student.json."""

    settings: dict[str, Any]
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Curve:
    """One logged number along training: steps [n], values [n]."""

    steps: list[int]
    values: list[float]


Curves = dict[str, Curve]


@dataclass(frozen=True)
class Student:
    """A trained student: `plain` are its settings as recorded, `settings` the part used here."""

    name: str
    settings: StudentSettings
    plain: dict[str, Any]
    fingerprints: dict[str, str]
    curves: Curves


@dataclass(frozen=True)
class Prediction:
    """One system's answer to one problem (a row of predictions.parquet)."""

    test_set: str
    system: str
    id: str
    n_steps: int
    question: str
    gold: str
    text: str
    answer: str
    correct: bool
    passes: int


@dataclass(frozen=True)
class Targets:
    """The targets store, seen from the traces.

    lengths: N_C per record [N]. smallest, largest: the fewest and most slots that any layer and
    head keeps of a long enough trace. engaged_percent: of (record, layer, head), from which a token
    was really dropped.
    """

    manifest: Manifest
    lengths: np.ndarray
    smallest: int
    largest: int
    engaged_percent: float


@dataclass(frozen=True)
class StageRun:
    """The last time a stage ran: seconds, start (UTC, ISO 8601) and host."""

    stage: str
    seconds: float
    started: str
    host: str


@dataclass(frozen=True)
class Findings:
    """All that the report shows.

    scores: test set → system → Score. insights: by student, what its latents hold; empty where
    nobody looked. truncation: None where the fidelity stage did not run. teacher_kv is None where
    the teacher's caches are not at hand (targets are enough to train from). prepare: the settings
    the problems were made with. runs: empty where there is no run log.
    """

    scores: Scores
    differences: Differences
    insights: dict[str, Insight]
    truncation: Truncation | None
    predictions: list[Prediction]
    similarity: dict[str, Similarity]
    students: dict[str, Student]
    teacher_metrics: TeacherMetrics
    teacher_curves: Curves
    targets: Targets
    teacher_kv: Manifest | None
    problems: dict[str, ProblemCounts]
    prepare: dict[str, Any]
    runs: list[StageRun]


def read_findings(folder: Path, students: Sequence[str], log: Path | None = None) -> Findings:
    """Read the artefacts of the pipeline in `folder` and of its `students`.

    log: the run log, one JSON object per line; it may be missing. KavaError names a missing or
    wrong file and the stage that makes it, and students that were made from other targets.
    """
    evaluation = folder / "evaluation"
    scores = read_scores(evaluation)
    similarity = read_checked(dict[str, Similarity], evaluation / "similarity.json", "evaluate")
    targets = _read_targets(folder / "kv_targets")
    found = {name: _read_student(folder, name) for name in students}
    _check_targets(found, targets.manifest)
    teacher_kv = folder / "teacher_kv"
    taught = read_checked(ProblemMetrics, folder / "problems/metrics.json", "prepare")
    asked = read_checked(TestSetMetrics, folder / "test_sets/metrics.json", "prepare")
    return Findings(
        scores=scores,
        differences=read_checked(Differences, evaluation / "comparisons.json", "evaluate"),
        insights=read_insights(evaluation / "interpretability.json"),
        truncation=read_truncation(folder / "fidelity"),
        predictions=_read_predictions(evaluation / "predictions.parquet"),
        similarity=similarity,
        students=found,
        teacher_metrics=read_checked(TeacherMetrics, folder / "teacher/metrics.json", "teacher"),
        teacher_curves=_read_curves(folder / "curves/teacher"),
        targets=targets,
        teacher_kv=load_manifest(teacher_kv, "teacher_kv") if teacher_kv.exists() else None,
        problems={
            "train": taught.train,
            "validation": taught.validation,
            **asked.test_sets,
        },
        prepare=read_checked(TestSetsFile, folder / "test_sets/test_sets.json", "prepare").settings,
        runs=_read_log(log, students) if log is not None and log.is_file() else [],
    )


def read_scores(evaluation: Path) -> Scores:
    """Test set → system → Score of an evaluation folder."""
    path = evaluation / "metrics.json"
    scores: Scores = read_checked(Scores, path, "evaluate")
    if not scores or not all(scores.values()):
        raise KavaError(f"{path} has no system on some test set. Run `kava evaluate` again.")
    return scores


def _read_predictions(path: Path) -> list[Prediction]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise KavaError(f"{path} is missing. Run `kava evaluate` first.")
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise KavaError(
            f"{path} is not a readable Parquet file ({error}). Run `kava evaluate` again."
        ) from None
    missing = [name for name in PREDICTION_COLUMNS if name not in table.column_names]
    if missing:
        raise KavaError(f"{path} has no column {missing[0]!r}. Run `kava evaluate` again.")
    rows = table.select(list(PREDICTION_COLUMNS)).to_pylist()
    predictions: list[Prediction] = checked(list[Prediction], rows, path, "evaluate")
    return predictions


def _read_student(folder: Path, name: str) -> Student:
    """folder: of the pipeline's artefacts."""
    path = folder / "students" / name / "student.json"
    stage = f"distill {name}"
    about: StudentFile = read_checked(StudentFile, path, stage)
    settings = checked(StudentSettings, about.settings, path, stage)
    curves = _read_curves(folder / "curves/students" / name)
    return Student(name, settings, about.settings, about.fingerprints, curves)


def _check_targets(students: dict[str, Student], manifest: Manifest) -> None:
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


def _read_targets(folder: Path) -> Targets:
    if not folder.exists():
        raise KavaError(f"{folder} is missing. Run `kava evict` first.")
    from kava_core.store import TargetsStore
    from kava_core.store.summary import EvictionCounts

    store = TargetsStore.open(folder, checksums=False)  # slot counts are a small part of the files
    counts = [store.slot_counts(shard).max(0) for shard in range(len(store.sizes))]  # [L', H] each
    budgets = np.max(counts, 0)
    return Targets(
        manifest=store.manifest,
        lengths=store.index.column("n_cot"),
        smallest=int(budgets.min()),
        largest=int(budgets.max()),
        engaged_percent=EvictionCounts.of(store).engaged_percent,
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
    order = [*STAGES[:5], *(f"distill {s}" for s in students), "evaluate"]
    return [latest[stage] for stage in order if stage in latest]
