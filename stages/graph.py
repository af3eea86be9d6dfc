"""The stages of a pipeline as DVC sees them: what each is made from, and what it makes.

Every pipeline has a folder of its own, `pipelines/NAME/`, with the `dvc.yaml` that is written here
and the lock that DVC keeps beside it; so a team has any number of pipelines reproduced at once, and
`dvc status`, `dvc metrics show` and `dvc plots show` know them all. The `dvc.yaml` at the top has
one stage, which shows the active pipeline's results and thereby runs what they need.

A stage depends on exactly its own section of settings, on the artefacts and local files that it
reads, on its version (`kava_core.versions`), and on the versions of the packages whose policies and
sources its settings name, never on the text of the code. The students are
those of the settings, whichever they are: DVC makes its stages of them itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from kava_core.errors import KavaError
from kava_core.eviction.policies import REGISTRY as POLICIES
from kava_core.problems.sources import REGISTRY as SOURCES
from kava_core.settings import Imported, Pipeline
from kava_core.settings.choice import packages_of
from kava_core.settings.prepare import Prepare
from kava_core.settings.student import Student
from kava_core.versions import VERSIONS

FOLDER = Path("pipelines")
VERSIONS_FILE = FOLDER / "versions.yaml"
PACKAGES = "packages"  # in it: package → version of those whose policies or sources are named
HEADER = (
    "# Written by `kava sync` from pipelines.yaml: change the settings there, and run it again\n"
    "# after adding or removing a local path, a section `traces` or `fidelity`, or changing\n"
    "# push_caches.\n"
)
TOP = (
    "# `dvc repro` does the active pipeline of pipelines.yaml and shows its results.\n"
    "# Its stages, and those of the other pipelines: pipelines/NAME/dvc.yaml.\n"
)

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
Stage = dict[str, Any]


def dvc_file(name: str, settings: Pipeline | Imported) -> dict[str, Any]:
    """The content of `pipelines/<name>/dvc.yaml`."""
    if isinstance(settings, Imported):
        return _imported_file(name, settings)
    data = f"data/{name}"
    stage, made = partial(_stage, name, settings), partial(_made, name)
    caches = f"{data}/teacher_kv"
    written = [] if settings.traces is None else made("traces")
    taught = written or made("problems")
    asks_test = settings.fidelity is not None and settings.fidelity.split == "test"
    lacking = settings.generate.lacking
    # What a store lacks no student learns: not those that read problems either.
    resources = settings.resources
    elsewhere = resources.caches_to if lacking == "teacher_kv" else resources.targets_to
    file = "manifest.json" if elsewhere is None else "remote.json"
    named = [] if lacking is None else made(f"{lacking}/{file}")
    students = stage(
        "distill ${key}",
        "students.${key}",
        [*made("${item.reads}", "teacher"), *named, *written, *_local_models(settings.students)],
        made("students/${key}", "curves/students/${key}"),
    )
    keeps_caches = settings.generate.keep == "caches"
    results = ["problems", "test_sets", "teacher"]
    results += ["teacher_kv", "kv_targets"] if keeps_caches else ["kv_targets"]
    results += ["fidelity"] if settings.fidelity else []
    results += ["traces"] if settings.traces else []
    stages = {
        "prepare": stage(
            "prepare", "prepare", _local_problems(settings.prepare), made("problems", "test_sets")
        ),
        "teacher": stage(
            "teacher",
            "teacher",
            [*made("problems"), *_local(settings.teacher.model)],
            made("teacher", "curves/teacher"),
        ),
        "traces": stage("traces", "traces", made("problems", "teacher"), made("traces")),
        "generate": stage(
            "generate",
            "generate",
            [*taught, *made("teacher")],
            [caches if settings.resources.push_caches else {caches: {"push": False}}],
        )
        if keeps_caches
        else stage(
            "generate",
            "generate",
            [*taught, *made("teacher")],
            made("kv_targets"),
            also=("evict",),
            metrics=made("eviction.json"),
        ),
        "evict": stage(
            "evict",
            "evict",
            made("teacher_kv"),
            made("kv_targets"),
            metrics=made("eviction.json"),
        ),
        "fidelity": stage(
            "fidelity",
            "fidelity",
            made("test_sets" if asks_test else "problems", "teacher"),
            made("fidelity", "measured/fidelity.json"),
        ),
        "distill": {"foreach": f"${{pipelines.{name}.students}}", "do": students},
        "evaluate": stage(
            "evaluate",
            "evaluate",
            [
                *made("problems", "test_sets", "teacher", "kv_targets", "students"),
                *_local(*settings.evaluate.others.values()),
            ],
            made("evaluation"),
            also=("students",),
            metrics=made("measured/evaluation.json"),
        ),
        # Shows what was measured too, but depends on it through nothing: seconds rerun nothing.
        "report": stage(
            "report",
            "report",
            made(*results, "eviction.json", "students", "evaluation", "curves"),
            made("report", "costs"),
        ),
    }
    if settings.traces is None:
        del stages["traces"]
    if settings.fidelity is None:
        del stages["fidelity"]
    if not keeps_caches:
        # What cuts the caches is what `evict` would be.
        tracked = stages["generate"]["params"][1]
        tracked[VERSIONS_FILE.as_posix()].append("evict")
        del stages["evict"]
    shown = ("teacher/metrics.json", "evaluation/summary.json", "report/summary.json")
    plots = _plots(f"../../{data}", compressed=settings.fidelity is not None)
    return _file(name, stages, shown, plots=plots)


def _imported_file(name: str, settings: Imported) -> dict[str, Any]:
    """That of a pipeline which imports its targets: there is nothing before its students but
    problems of its own, and without these nothing behind them."""
    stage, made = partial(_stage, name, settings), partial(_made, name)
    imports = settings.imports
    targets, teacher = (
        str(Path(elsewhere).expanduser()) if elsewhere else made(own)[0]
        for own, elsewhere in (("kv_targets", imports.targets), ("teacher", imports.teacher))
    )
    students = f"pipelines.{name}.students"
    # Which of its two sources a student reads is known to DVC only where both have their own place.
    if imports.targets is None:
        source = made("${item.reads}")
    else:
        source = [targets, *(made("problems") if settings.prepare else [])]
    distill = stage(
        "distill ${key}",
        "students.${key}",
        [*source, teacher, *_local_models(settings.students)],
        made("students/${key}", "curves/students/${key}"),
    )
    stages: dict[str, Stage] = {"distill": {"foreach": f"${{{students}}}", "do": distill}}
    if settings.prepare is None:
        return _file(name, stages, (), plots=[])
    problems = made("problems", "test_sets")
    stages = {
        "prepare": stage("prepare", "prepare", _local_problems(settings.prepare), problems),
        **stages,
        "evaluate": stage(
            "evaluate",
            "evaluate",
            [
                *problems,
                teacher,
                targets,
                *made("students"),
                *_local(*settings.evaluate.others.values()),
            ],
            made("evaluation"),
            also=("students",),
            metrics=made("measured/evaluation.json"),
        ),
        "report": stage(
            "report",
            "report",
            [*problems, teacher, targets, *made("students", "evaluation", "curves")],
            made("report", "costs"),
        ),
    }
    metrics = ("evaluation/summary.json", "report/summary.json")
    return _file(name, stages, metrics, plots=_plots(f"../../data/{name}", compressed=False))


def _stage(
    name: str,
    settings: Pipeline | Imported,
    command: str,
    section: str,
    deps: list[str],
    outs: list[Any],
    *,
    also: tuple[str, ...] = (),
    metrics: list[str] | None = None,
) -> Stage:
    """A stage of the pipeline `name`. Paths are those below data/<name> unless they are the user's
    own."""
    number = command.split(maxsplit=1)[0]
    sections = [f"pipelines.{name}.{each}" for each in (section, *also)]
    return {
        "wdir": "../..",
        "cmd": f"kava {command} --pipeline {name}",
        "deps": deps,
        "params": [
            {"pipelines.yaml": sections},
            {VERSIONS_FILE.as_posix(): [number, *_tracked_packages(settings, number, *also)]},
        ],
        "outs": outs,
        **({"metrics": metrics} if metrics else {}),
    }


def _packages(settings: Pipeline | Imported, stage: str) -> dict[str, str]:
    """Package → version of those whose policies or sources a stage computes with."""
    if stage == "prepare" and settings.prepare is not None:
        asked = [more.source for more in settings.prepare.test_sets.values()]
        return packages_of(SOURCES, settings.prepare.source, *asked)
    if isinstance(settings, Imported):
        return {}
    if stage == "evict":
        return packages_of(POLICIES, settings.evict.policy)
    if stage == "fidelity" and settings.fidelity is not None:
        return packages_of(POLICIES, *settings.fidelity.policies)
    return {}


def _tracked_packages(settings: Pipeline | Imported, *stages: str) -> list[str]:
    """Keys of versions.yaml."""
    names = {name for stage in stages for name in _packages(settings, stage)}
    return [f"{PACKAGES}.{name}" for name in sorted(names)]


def _all_packages(settings: Pipeline | Imported) -> dict[str, str]:
    stages = ("prepare", "evict", "fidelity")
    return {name: of for stage in stages for name, of in _packages(settings, stage).items()}


def _made(name: str, *artefacts: str) -> list[str]:
    return [f"data/{name}/{each}" for each in artefacts]


def _file(
    name: str, stages: dict[str, Stage], metrics: tuple[str, ...], *, plots: list[dict[str, Any]]
) -> dict[str, Any]:
    for each in stages.values():
        if each.get("deps") == []:
            del each["deps"]
    return {
        "vars": ["../../pipelines.yaml:pipelines"],
        "stages": stages,
        "metrics": [f"../../data/{name}/{file}" for file in metrics],
        "plots": plots,
    }


def _plots(below: str, *, compressed: bool) -> list[dict[str, Any]]:
    """What `dvc plots` draws: files that the stages write for whatever students there are, and
    those of compressed caches, where there is a stage fidelity."""

    def plot(title: str, file: str, x: str, y: str, template: str, **labels: str) -> dict[str, Any]:
        return {title: {"x": x, "y": {f"{below}/{file}": y}, **labels, "template": template}}

    found = [
        plot(
            "exact match of the systems",
            "evaluation/plots/systems.json",
            "exact_match",
            "system",
            "systems",
            x_label="exact match, %",
        ),
        plot(
            "exact match by number of steps",
            "evaluation/plots/steps.json",
            "steps",
            "exact_match",
            "steps",
            x_label="steps of the gold trace",
            y_label="exact match, %",
        ),
        plot(
            "loss on the answer",
            "report/losses.json",
            "step",
            "loss",
            "losses",
            y_label="cross-entropy of the answer, nats",
        ),
    ]
    if compressed:
        found += [
            plot(
                "exact match of compressed caches",
                "fidelity/budgets.json",
                "budget",
                "exact_match",
                "series",
            ),
            plot(
                "KL of compressed caches to the full one",
                "fidelity/budgets.json",
                "budget",
                "kl",
                "series",
            ),
        ]
    return found


def _local_problems(prepare: Prepare) -> list[str]:
    sources = [prepare.path, prepare.tokenizer, *(s.path for s in prepare.test_sets.values())]
    return _local(*sources)


def _local_models(students: dict[str, Student]) -> list[str]:
    return _local(*(student.model for student in students.values()))


def _local(*paths: str | None) -> list[str]:
    """The paths on this machine, there yet or not; a name on the Hub has a revision instead.

    `name` and `owner/name` are the Hub's unless something here is called so.
    """
    here = {
        path
        for path in paths
        if path is not None
        and path != "scratch"
        and (not HUB_NAME.fullmatch(path) or path.startswith("data/") or Path(path).exists())
    }
    return sorted(str(Path(path).expanduser()) for path in here)


def top_file() -> dict[str, Any]:
    """The content of the `dvc.yaml` at the top."""
    return {
        "vars": ["pipelines.yaml:pipeline"],
        "stages": {
            "show": {
                "cmd": "kava show ${pipeline}",
                "deps": ["data/${pipeline}/report"],
            }
        },
    }


def as_yaml(content: Any, header: str) -> str:
    """YAML as DVC writes it, below a comment."""
    return header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def project_files(pipelines: Mapping[str, Pipeline | Imported]) -> dict[Path, str]:
    """Every file that follows from the settings: path below the project → text."""
    files = {Path("dvc.yaml"): as_yaml(top_file(), TOP)}
    for name, settings in pipelines.items():
        files[FOLDER / name / "dvc.yaml"] = as_yaml(dvc_file(name, settings), HEADER)
    versions = "# What each stage computes (kava_core/versions.py). Written by `kava sync`.\n"
    others: dict[str, str] = {}
    for settings in pipelines.values():
        others |= _all_packages(settings)
    noted = {PACKAGES: dict(sorted(others.items()))} if others else {}
    files[VERSIONS_FILE] = as_yaml({**VERSIONS, **noted}, versions)
    return files


def command_for(name: str, settings: Pipeline | Imported, artefact: str) -> str | None:
    """The command that makes `artefact`, a path below the pipeline's folder; None if no stage of
    this pipeline does."""
    for stage in dvc_file(name, settings)["stages"].values():
        plain = stage.get("do", stage)
        for key in settings.students if "do" in stage else [""]:
            outs = [next(iter(out)) if isinstance(out, dict) else out for out in plain["outs"]]
            if f"data/{name}/{artefact}" in [out.replace("${key}", key) for out in outs]:
                return str(plain["cmd"]).replace("${key}", key)
    return None


def check_tracked(project: Path, name: str, settings: Pipeline | Imported, stage: str) -> None:
    """KavaError if DVC would miss a change that matters to this stage.

    project: the folder of pipelines.yaml. A pipeline without a dvc.yaml is not tracked at all, and
    may be run by hand. What a person adds to the file is left alone.
    """
    path = project / FOLDER / name / "dvc.yaml"
    if not path.is_file():
        return
    wanted = dvc_file(name, settings)["stages"].get(stage)
    if wanted is None:  # it is no stage of this pipeline, and says so itself
        return
    wrong = _missing(path, wanted, stage)
    versions = _read(project / VERSIONS_FILE) if (project / VERSIONS_FILE).is_file() else {}
    tracked = wanted.get("do", wanted)["params"][1][VERSIONS_FILE.as_posix()]
    wrong += [
        f"version {VERSIONS[each]}"
        for each in tracked
        if each in VERSIONS and versions.get(each) != VERSIONS[each]
    ]
    noted = versions.get(PACKAGES) or {}
    wrong += [
        f"{package} {version}"
        for package, version in _all_packages(settings).items()
        if f"{PACKAGES}.{package}" in tracked and noted.get(package) != version
    ]
    if wrong:
        raise KavaError(
            f"{path} does not track what stage {stage} is made from now: expected "
            f"{', '.join(wrong)}. Run `kava sync`."
        )


def _missing(path: Path, wanted: Stage, stage: str) -> list[str]:
    """What the stage in the file at `path` lacks of what it should track and make."""
    found = (_read(path).get("stages") or {}).get(stage)
    if not isinstance(found, dict):
        return [f"stage {stage}"]
    wanted, found = wanted.get("do", wanted), found.get("do", found)
    lacking: list[str] = []
    for kind in ("deps", "params", "outs", "metrics"):
        there = [yaml.safe_dump(entry) for entry in found.get(kind) or []]
        lacking += [
            f"{kind}: {entry}"
            for entry in wanted.get(kind) or []
            if yaml.safe_dump(entry) not in there
        ]
    return lacking


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise KavaError(f"{path} cannot be read: {error}. Run `kava sync`.") from None
    return content if isinstance(content, dict) else {}
