"""What a study runs: cells, and the pieces that they are made of.

A piece is what one stage makes from certain settings and certain pieces before it, and has a key of
all that; so whatever several cells have in common is one piece, made once: a budget leaves the
teacher and its caches as they are, and a student that reads problems knows nothing of budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from kava_core.artefacts import canonical_json, fingerprint
from kava_core.errors import KavaError
from kava_core.settings import Evaluate, Pipeline, Study
from kava_core.settings.evaluate import TEACHERS
from kava_core.settings.pipeline import explain, read_document
from kava_core.versions import VERSIONS
from kava_core.wording import shown

Point = Mapping[str, JsonValue]  # dotted key of the grid → its value
EVERY = "students.*."
STAGES = ("prepare", "teacher", "traces", "generate", "evict", "fidelity", "distill")
# What fidelity tries as the store was made, and what it takes from its own section.
OF_EVICT = ("budget_shape", "select", "half", "layers", "share", "share_size")
OF_FIDELITY = ("batch_size", "max_new_tokens", "model_dtype", "threads")


@dataclass(frozen=True)
class Piece:
    """What one stage makes.

    stage: the command, with its argument; makes: names in the folder of a pipeline, the last of
    which is there once all are; settings: the pipeline, as it stands in a file; before: all pieces
    that it is made from.
    """

    stage: tuple[str, ...]
    key: str
    makes: tuple[str, ...]
    settings: Mapping[str, Any] = field(compare=False, repr=False)
    before: tuple[Piece, ...] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Of its folder, and of the pipeline in it."""
        return f"{self.stage[-1]}-{self.key[:16]}"


@dataclass(frozen=True)
class StudyCell:
    """One system, asked once.

    variant: the values of the grid that concern it, and a further test set, in words; seed: that of
    its training, None for a teacher that all seeds share; piece: the student, or the teacher; key:
    all that decides what it answers. asked: the split, or the further test set. changed: how many
    problems it is asked again with its latents changed. fidelity: what the teacher answers from the
    slots that it is taught from, if that is asked.
    """

    system: str
    variant: str
    seed: int | None
    key: str
    piece: Piece
    evaluate: Evaluate = field(compare=False, repr=False)
    asked: str
    changed: int = 0
    fidelity: Piece | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What must be there before it is asked."""
        fidelity = () if self.fidelity is None else (self.fidelity,)
        return (*self.piece.before, *fidelity, self.piece)

    @property
    def name(self) -> str:
        """Of the file of its answers."""
        return f"{self.system}-{self.key[:16]}"

    @property
    def changed_name(self) -> str:
        """Of the file of what it answers with its latents changed."""
        return f"{self.name}-changed-{self.changed}"


@dataclass(frozen=True)
class StudyPlan:
    """A study. pairs: ((variant, student), (variant, baseline)), what is compared; missing_…: how
    many a whole one has beyond these."""

    name: str
    study: Study
    cells: tuple[StudyCell, ...]
    pairs: tuple[tuple[tuple[str, str], tuple[str, str]], ...]
    missing_cells: int = 0
    missing_pairs: int = 0

    def pieces(self, cells: tuple[StudyCell, ...]) -> dict[str, tuple[Piece, ...]]:
        """Stage → its pieces that `cells` need, the stages in order."""
        needed = dict.fromkeys(piece for cell in cells for piece in cell.pieces)
        found = {
            stage: tuple(piece for piece in needed if piece.stage[0] == stage) for stage in STAGES
        }
        return {stage: made for stage, made in found.items() if made}

    def only(self, cells: Set[StudyCell]) -> StudyPlan:
        """What is left of it with these cells. A system that lacks a seed is not compared."""
        lacking = {(cell.variant, cell.system) for cell in self.cells if cell not in cells}
        pairs = tuple(pair for pair in self.pairs if not lacking.intersection(pair))
        there = tuple(cell for cell in self.cells if cell in cells)
        missing = len(self.cells) - len(there), len(self.pairs) - len(pairs)
        return StudyPlan(self.name, self.study, there, pairs, *missing)


def plan_study(path: Path, name: str, study: Study) -> StudyPlan:
    """Expand the study called `name` of the file at `path`.

    KavaError if it names a pipeline or a student that is not there, if any of its settings are
    wrong or do not go together at a point of the grid, or if a setting of the study would change
    nothing.
    """
    where = f"{path}: studies.{name}"
    plan, points = _expand(path, name, study)
    for setting, there in (
        ("interventions", any(cell.changed for cell in plan.cells)),
        ("fidelity", any(cell.fidelity for cell in plan.cells)),
    ):
        if getattr(study, setting) and not there:
            raise KavaError(
                f"{where}.{setting}: none of the students has latents. Leave it out, or name a "
                "student that reads kv_targets."
            )
    if study.baseline and not plan.pairs:
        raise KavaError(
            f"{where}.baseline: there is no other student to compare with {study.baseline}. Name "
            "one, or leave it out."
        )
    varied: dict[str, list[tuple[JsonValue, Point]]] = {
        f"grid: {key}": [(value, {key: value}) for value in values]
        for key, values in study.grid.items()
    }
    varied["together"] = [(each, each) for each in study.together]
    for setting, values in varied.items():
        asked_at = [
            [keys for point, keys in points if change.items() <= point.items()]
            for _, change in values
        ]
        for i, keys in enumerate(asked_at):
            if (j := asked_at.index(keys)) < i:
                raise KavaError(
                    f"{where}.{setting}: {shown(values[j][0])} and {shown(values[i][0])} come to "
                    "the same for every student. Leave one out, or name a student that depends on "
                    "it."
                )
    return plan


def keys_of_test(
    path: Path, name: str, study: Study, systems: Iterable[str], seeds: Iterable[int]
) -> dict[str, set[str]]:
    """System → keys of all cells that it would have if the study, as it stands, asked all test
    problems, of these systems and with these seeds as well.

    Not of a student that is not in the pipeline; none of one whose settings are wrong by now.
    """
    base = _base(path, name, study)
    there = _names(base.get("students"))
    own = study.students or there
    changes = {
        "seeds": tuple(dict.fromkeys([*study.seeds, *seeds])),
        "split": "test",
        "test_sets": _names((base.get("prepare") or {}).get("test_sets")),
        "baseline": None,
    }
    keys: dict[str, set[str]] = {}
    # Each other one apart: what is said of `students.*` need not suit it.
    for students in (own, *((each,) for each in there if each in {*systems} - {*own})):
        asked = study.model_copy(update={**changes, "students": students})
        try:
            cells = _expand(path, name, asked)[0].cells
        except KavaError:
            cells = ()
        for system in (*students, *TEACHERS):
            found = {cell.key for cell in cells if cell.system == system}
            keys.setdefault(system, set()).update(found)
    return keys


def _base(path: Path, name: str, study: Study) -> dict[str, Any]:
    """The pipeline with the settings of the study, as it is at all points of the grid."""
    pipelines = read_document(path)["pipelines"]
    if study.pipeline not in pipelines:
        raise KavaError(
            f"{path}: studies.{name}.pipeline: there is no pipeline {study.pipeline!r}. There are: "
            f"{', '.join(pipelines)}."
        )
    base = _with(pipelines[study.pipeline] or {}, study.settings, study.students)
    # What is compared here are the students themselves, and fidelity tries what each point makes.
    for section, setting in (("evaluate", "write_steps"), ("fidelity", "policies")):
        if isinstance(base.get(section), dict):
            base[section].pop(setting, None)
    return base


def _names(section: Any) -> tuple[str, ...]:
    return tuple(map(str, section or {}))


def _expand(
    path: Path, name: str, study: Study
) -> tuple[StudyPlan, list[tuple[Point, frozenset[str]]]]:
    """The plan, and the keys of the cells at every point of the grid."""
    base = _base(path, name, study)
    there = _names(base.get("students"))
    names = study.students or there
    baseline = [study.baseline] if study.baseline else []
    for named, known in ((names, there), (baseline, names)):
        if unknown := [student for student in named if student not in known]:
            raise KavaError(
                f"{path}: studies.{name}: there is no student {unknown[0]!r}. There are: "
                f"{', '.join(known)}."
            )
    cells: dict[tuple[str, str, int | None], StudyCell] = {}
    pairs: dict[tuple[tuple[str, str], tuple[str, str]], None] = {}
    points: list[tuple[Point, frozenset[str]]] = []
    further = _names((base.get("prepare") or {}).get("test_sets"))
    if unknown := [each for each in study.test_sets if each not in further]:
        raise KavaError(
            f"{path}: studies.{name}.test_sets: there is no test set {unknown[0]!r} in "
            f"prepare.test_sets. There are: {', '.join(further) or 'none'}."
        )
    for point in _points(study):
        groups: dict[tuple[str, str], str] = {}
        keys: set[str] = set()
        for seed in study.seeds:
            raw = _with(base, point, names)
            raw = _seeded(raw, names, seed, study, f"{path}: studies.{name}")
            # What suits the study need not suit the pipeline's other students.
            raw["students"] = {student: raw["students"][student] for student in names}
            try:
                settings = Pipeline.model_validate(raw)
            except ValidationError as error:
                where = f"studies.{name}: pipelines.{study.pipeline}"
                raise KavaError(explain(path, where, error)) from None
            for cell in _cells(raw, settings, names, point, seed, study):
                cells.setdefault((cell.variant, cell.system, cell.seed), cell)
                groups[cell.asked, cell.system] = cell.variant
                keys.add(cell.key)
        points.append((point, frozenset(keys)))
        for asked in (study.split, *study.test_sets):
            for other in baseline:
                right = (groups[asked, other], other)
                pairs |= {((groups[asked, s], s), right): None for s in names if s != other}
    return StudyPlan(name, study, tuple(cells.values()), tuple(pairs)), points


def _points(study: Study) -> Iterator[Point]:
    for together in study.together or ({},):
        for values in itertools.product(*study.grid.values()):
            yield {**dict(zip(study.grid, values, strict=True)), **together}


def _with(pipeline: Any, changes: Point, students: tuple[str, ...] | None = ()) -> dict[str, Any]:
    """A copy of the pipeline with other values at dotted keys, a section's before its parts'.

    students: those that a key of `students.*` means; None: all that are there.
    """
    changed: dict[str, Any] = _apart(pipeline)
    single = {key: changes[key] for key in changes if not key.startswith(EVERY)}
    if students is None:
        students = tuple(map(str, _with(pipeline, single).get("students") or {}))
    for every in changes.keys() - single:
        own = every.removeprefix(EVERY)
        single |= {f"students.{student}.{own}": changes[every] for student in students}
    for key in sorted(single, key=lambda key: key.count(".")):
        *sections, last = key.split(".")
        place = changed
        for i, section in enumerate(sections):
            if not isinstance(place.setdefault(section, {}), dict):
                raise KavaError(
                    f"{key}: expected {'.'.join(sections[: i + 1])} to be a mapping, found "
                    f"{place[section]!r}. Write it as one, or change it as a whole."
                )
            place = place[section]
        place[last] = _apart(single[key])
    return changed


def _apart(value: Any) -> Any:
    """A copy whose parts are its own: a YAML alias is one object in several places."""
    if isinstance(value, dict):
        return {str(key): _apart(part) for key, part in value.items()}
    return [_apart(part) for part in value] if isinstance(value, list) else value


def _seeded(
    pipeline: dict[str, Any], students: tuple[str, ...], seed: int, study: Study, where: str
) -> dict[str, Any]:
    keys = [f"students.{name}.training.seed" for name in students]
    if study.reseed == "all":
        if (pipeline.get("teacher") or {}).get("training") is None:
            raise KavaError(f"{where}.reseed: the teacher is not trained. Leave it at `students`.")
        keys.append("teacher.training.seed")
    return _with(pipeline, dict.fromkeys(keys, seed))


def _cells(
    raw: dict[str, Any],
    settings: Pipeline,
    students: tuple[str, ...],
    point: Point,
    seed: int,
    study: Study,
) -> Iterator[StudyCell]:
    """Those of one point of the grid and one seed."""
    plain = settings.model_dump(mode="json", by_alias=True)
    del plain["generate"]["keep"]  # changes no target

    def piece(
        stage: tuple[str, ...], section: Any, before: tuple[Piece, ...], *makes: str
    ) -> Piece:
        key = fingerprint([stage, section, VERSIONS[stage[0]], [p.key for p in before]])
        return Piece(stage, key, makes, raw, before)

    def cells(system: str, made: Piece, *concerned_by: str) -> Iterator[StudyCell]:
        own = seed if system in students or study.reseed == "all" else None
        concerning = [
            f"{key}={value if isinstance(value, str) else canonical_json(value)}"
            for key, value in point.items()
            if f"{key}.".startswith(concerned_by)
        ]
        asking = [settings.evaluate.limit, settings.evaluate.max_new_tokens, VERSIONS["evaluate"]]
        latent = system in students and settings.students[system].reads == "kv_targets"
        for asked in (study.split, *study.test_sets):
            further = [f"test_set={asked}"] if asked != study.split else []
            key = fingerprint([system, asked, asking, made.key])
            yield StudyCell(
                system,
                " ".join([*concerning, *further]),
                own,
                key,
                made,
                settings.evaluate,
                asked,
                study.interventions if latent and not further else 0,
                worth if latent and not further else None,
            )

    problems = piece(("prepare",), plain["prepare"], (), "problems", "test_sets")
    teacher = piece(("teacher",), plain["teacher"], (problems,), "teacher")
    taught: tuple[Piece, ...] = (problems, teacher)
    if settings.traces is not None:
        taught = (*taught, piece(("traces",), plain["traces"], taught, "traces"))
    made_by: tuple[Piece, ...] = ()
    if settings.generate.keep == "caches":
        made_by = (piece(("generate",), plain["generate"], taught, "teacher_kv"),)
        targets = piece(("evict",), plain["evict"], (*taught, *made_by), "kv_targets")
    else:
        both = [plain["generate"], plain["evict"], VERSIONS["evict"]]
        targets = piece(("generate",), both, taught, "kv_targets")
    worth = _fidelity(raw, plain, study.fidelity, (problems, teacher))
    shared = ("prepare.", "teacher.", "evaluate.")
    for system in TEACHERS:
        yield from cells(system, teacher, *shared)
    for student in students:
        reads = settings.students[student].reads
        # Those that read problems leave out what a store has put aside, and ask it.
        needed: tuple[Piece, ...] = (*made_by, targets) if reads == "kv_targets" else ()
        if reads == "problems" and settings.generate.lacking:
            needed = made_by or (targets,)
        before = (*taught, *needed)
        made = piece(
            ("distill", student), plain["students"][student], before, f"students/{student}"
        )
        latent = ("generate.", "evict.") if reads == "kv_targets" else ()
        own = (EVERY, f"students.{student}.")
        yield from cells(student, made, *shared, "traces.", *latent, *own)


def _fidelity(
    raw: dict[str, Any], plain: dict[str, Any], limit: int, before: tuple[Piece, ...]
) -> Piece | None:
    """The teacher asked from what this point's store keeps, at its bits."""
    if not limit:
        return None
    given, evict = raw.get("fidelity") or {}, raw["evict"]
    section = {
        **{key: given[key] for key in OF_FIDELITY if key in given},
        **{key: evict[key] for key in OF_EVICT if key in evict},
        "limit": limit,
        "policies": [plain["evict"]["policy"]],
        "budgets": [plain["evict"]["budget"]],
        "bits": [{part: plain["evict"][f"{part}_bits"] for part in ("keys", "values")}],
    }
    key = fingerprint([["fidelity"], section, VERSIONS["fidelity"], [p.key for p in before]])
    return Piece(("fidelity",), key, ("fidelity",), {**raw, "fidelity": section}, before)
