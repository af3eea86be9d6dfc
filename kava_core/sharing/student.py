"""A student as a folder for the Hub, with a model card that says what it is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.artefacts import atomic_folder, read_json, tree_fingerprint, write_json
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.findings.base import read_finding
from kava_core.findings.evaluation import (
    COMPARISONS,
    INSIGHTS,
    METRICS,
    WEIGHTS,
    Differences,
    Score,
    Scores,
)
from kava_core.findings.latents import Changed, Insights, InterventionScores
from kava_core.models.adapted import ADAPTER, Base, adapters_in
from kava_core.models.latent import GENERATE_FILE
from kava_core.settings import Student
from kava_core.settings.student import Curriculum
from kava_core.sharing.describe import shown_path, warn_of_places
from kava_core.sharing.snippet import PRINT, questions_in
from kava_core.store.export import (
    check_limits,
    check_new,
    check_secrets,
    copy_file,
    copy_model,
    table,
)
from kava_core.store.manifest import Manifest
from kava_core.store.provenance import CARD, DataFacts, TeacherFacts, data_rows, teacher_rows

CODE = Path(GENERATE_FILE)
TEACHER_COT, TEACHER_NO_COT = "teacher-cot", "teacher-no-cot"


@dataclass(frozen=True)
class Published:
    """A student, and what is known of how it came about.

    folder: of the student; results: of the pipeline's evaluation; students: all of the pipeline's,
    for the rows of the table. targets, data, teacher: None where they are not at hand. licence: of
    the weights, None: not stated.
    """

    name: str
    folder: Path
    results: Path
    students: Mapping[str, Student]
    targets: Manifest | None
    data: DataFacts | None
    teacher: TeacherFacts | None
    licence: str | None = None


def publish_student(student: Published, destination: Path) -> None:
    """Write the student's files and its card into a new folder.

    KavaError if the folder is in use, if something in it looks like a secret, or for targets and
    results that are not this student's.
    """
    check_new(destination)
    made_from = read_json(student.folder / "student.json")["fingerprints"].get("kv_targets")
    if student.targets is not None and made_from not in (None, student.targets.digest):
        raise KavaError(
            f"student {student.name} was made from the targets {made_from[:12]}…, and those of the "
            f"pipeline are {student.targets.digest[:12]}…. Run `kava distill {student.name}` and "
            "`kava evaluate` again."
        )
    text = model_card(student)
    _warn_of_base(student)
    warn_of_places(student.folder)
    with atomic_folder(destination) as folder:
        copy_model(student.folder, folder)
        _hide_places(folder / "student.json")
        if not _is_adapters(student):
            copy_file(CODE, student.folder, folder)
        (folder / CARD).write_text(text, encoding="utf-8")
        check_limits(folder)
        check_secrets(folder)


def _is_adapters(student: Published) -> bool:
    """Whether it is kept as adapters, and so without code that loads it."""
    return adapters_in(str(student.folder)) is not None


def _warn_of_base(student: Published) -> None:
    """Say so if nobody else has what the student's adapters belong on."""
    if not _is_adapters(student):
        return
    base = Base.read(student.folder / ADAPTER)
    if base.commit is None:
        warn(
            f"warning: {student.name} is kept as adapters on {base.model}, a folder of this "
            "machine: nobody can load it without that model. Publish it as well, or train with "
            "`lora.save: merged`."
        )


def _hide_places(file: Path) -> None:
    """Of a path that says where the student's own model lies on this machine, leave its name."""
    about: dict[str, Any] = read_json(file)
    model = about["settings"].get("model")
    if model != shown_path(model):
        about["settings"]["model"] = shown_path(model)
        write_json(file, about)


def model_card(student: Published) -> str:
    """The README of a student: YAML for the Hub, then text for people."""
    from huggingface_hub import ModelCardData

    data, teacher = student.data, student.teacher
    card = ModelCardData(
        model_name=student.name,
        license=student.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=_base_model(student),
        datasets=data.path if data and data.path and data.commit else None,
        tags=["latent-reasoning", "distillation", "kava"],
    )
    parts = [
        f"---\n{card.to_yaml()}\n---",
        f"# {student.name}",
        _what(student),
        "## Where it comes from\n\n"
        + table([*_method(student), *teacher_rows(teacher), *data_rows(data), *_targets(student)]),
        "## How well it answers\n\n" + _metrics(student),
        "## What its latents carry\n\n" + _interventions(student),
        "## How to load it\n\n" + _loading(student),
    ]
    return "\n\n".join(parts) + "\n"


def _base_model(student: Published) -> str | None:
    """The model of the Hub that its training began at, None where it was none."""
    about: dict[str, Any] = read_json(student.folder / "student.json")
    own: str | None = about["settings"]["model"]
    if own is not None:
        return own if about["commit"] else None
    return student.teacher.model if student.teacher and student.teacher.commit else None


def _what(student: Published) -> str:
    settings = student.students[student.name]
    if settings.reads == "problems":
        return (
            "A model that answers at once, without a written chain of thought and without latents: "
            "what latent students are to be compared with."
        )
    how = f"{settings.iterations} Jacobi iterations over them"
    if settings.reasoning == "sequential":
        how = "one after the other"
    latents = read_json(student.folder / "latents.json")["latents"]
    return (
        f"A model that reasons in {latents} latent tokens ({how}) in place of a written chain of "
        "thought, distilled offline from a teacher's KV cache (KaVa, arXiv 2510.02312)."
    )


def _method(student: Published) -> list[tuple[str, str]]:
    """What taught it, and how long."""
    plain: dict[str, Any] = read_json(student.folder / "student.json")
    settings = student.students[student.name].model_dump(mode="json", exclude={"training"})
    settings["model"] = shown_path(settings["model"])
    terms = {
        "answer": 1.0,
        "KV cache (KaVa)": settings["alpha_kv"],
        "endpoint (CODI)": settings["alpha_codi"],
        "readout of the slots": settings["alpha_readout"],
        "written chain": settings["w_cot"],
    }
    taught = ", ".join(f"{_weight(weight)} × {term}" for term, weight in terms.items() if weight)
    training = {k: v for k, v in plain["settings"]["training"].items() if v is not None}
    return [
        *_beginning(plain),
        ("loss", taught),
        *_curriculum(student.students[student.name].curriculum),
        ("training", f"{plain['steps']:,} steps, {json.dumps(training)}"),
        ("trained with", json.dumps({k: v for k, v in settings.items() if v is not None})),
    ]


def _beginning(about: dict[str, Any]) -> list[tuple[str, str]]:
    """The student's own model, where it did not begin as the teacher."""
    model, revision = about["settings"]["model"], about["settings"].get("revision")
    if model is None:
        return []
    at = [revision and f"revision {revision}", about["commit"]]
    where = ", ".join(part for part in at if part)
    name = shown_path(model)
    return [("the student began as", f"{name} ({where})" if where else str(name))]


def _curriculum(found: Curriculum | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    length = f"{found.steps} steps" if found.epochs is None else f"{found.epochs} epochs"
    what = (
        f"Coconut's (arXiv 2412.06769): with every {length} one written step more gives way to "
        f"{found.latents_per_step} latents; in the last stage the answer alone is written"
    )
    return [("curriculum", what)]


def _weight(weight: float | dict[str, float]) -> str:
    if isinstance(weight, dict):
        return f"({weight['share']:.0%} of the gradient)"
    return f"{weight:g}"


def _targets(student: Published) -> list[tuple[str, str]]:
    """Budget and policy."""
    if student.targets is None or student.students[student.name].reads == "problems":
        return []
    manifest = student.targets
    evict: dict[str, Any] = manifest.settings.get("evict", {})
    codec = manifest.codec
    return [
        ("budget", f"{manifest.geometry.slots} slots per layer and head, {_or(evict, 'select')}"),
        ("policy", json.dumps(evict.get("policy", "not recorded"))),
        ("targets", f"{manifest.records:,} records, keys {codec.keys}, values {codec.values}"),
    ]


def _or(evict: Mapping[str, Any], name: str) -> str:
    return f"chosen by each {evict[name]}" if name in evict else "chosen as not recorded"


def _metrics(student: Published) -> str:
    if not (student.results / METRICS).is_file():
        return "Nobody has measured it: it was published without an evaluation."
    scores: Scores = read_finding(Scores, student.results / METRICS, "evaluate")
    if any(student.name not in systems for systems in scores.values()):
        raise KavaError(
            f"{student.results} does not know the student {student.name}. Run `kava evaluate`."
        )
    asked = read_finding(dict[str, str], student.results / WEIGHTS, "evaluate").get(student.name)
    if asked != (found_now := tree_fingerprint(student.folder)):
        raise KavaError(
            f"{student.results} measured another student {student.name} than that in "
            f"{student.folder}: expected the files {str(asked)[:12]}…, found {found_now[:12]}…. "
            "Run `kava evaluate` again."
        )
    compared: Differences = read_finding(Differences, student.results / COMPARISONS, "evaluate")
    plain = [name for name, each in student.students.items() if each.reads == "problems"]
    parts = []
    for test_set, systems in scores.items():
        shown = [TEACHER_COT, student.name, *(n for n in plain if n != student.name)]
        rows = [
            _row(name, systems[name], student)
            for name in (*shown, TEACHER_NO_COT)
            if name in systems
        ]
        head = ["| | exact match, % (95 % interval) | forward passes |", "|---|---|---|"]
        parts.append(f"On {systems[student.name].n:,} problems of {test_set}:")
        parts.append("\n".join([*head, *rows]))
        for rival in plain:
            found = compared.get(test_set, {}).get(student.name, {}).get(rival)
            if found is not None:
                low, high = found.ci95
                parts.append(
                    f"Against {rival}, on the same problems: {found.difference:+.1f} points "
                    f"({low:+.1f} to {high:+.1f})."
                )
    if student.students[student.name].reads != "problems" and not plain:
        parts.append(
            "No student without latents was trained beside it, so that nobody knows whether its "
            "latents are worth their time."
        )
    return "\n\n".join(parts)


def _row(name: str, score: Score, student: Published) -> str:
    said = {TEACHER_COT: "teacher, writing its chain", TEACHER_NO_COT: "teacher, asked at once"}
    words = said.get(name, name)
    if name == student.name:
        words = f"**{name}**"
    elif name not in said:
        words = f"{name}: No-CoT, {student.students[name].training.steps or 'some'} steps"
    low, high = score.ci95
    passes = f"{score.forward_passes:.1f}"
    return f"| {words} | {score.exact_match:.1f} ({low:.1f} to {high:.1f}) | {passes} |"


def _interventions(student: Published) -> str:
    if student.students[student.name].reads == "problems":
        return "It has none."
    found: Insights = {}
    if (student.results / INSIGHTS).is_file():
        found = read_finding(Insights, student.results / INSIGHTS, "evaluate")
    insight = found.get(student.name)
    if insight is None or insight.interventions is None:
        return "Nobody has looked: it was not asked with its latents changed."
    return _changed_table(insight.interventions)


def _changed_table(found: InterventionScores) -> str:
    together = found.together
    changes: Sequence[tuple[str, Changed | None]] = (
        ("set to zero", together.removed),
        ("set to their mean over the problems", together.mean),
        ("exchanged among the slots of a problem", together.shuffled),
        ("taken from another problem", together.donor),
    )
    low, high = found.ci95
    rows = [f"| untouched | {found.none:.1f} ({low:.1f} to {high:.1f}) | |"]
    for what, changed in changes:
        if changed is not None:
            low, high = changed.ci95
            rows.append(
                f"| {what} | {changed.exact_match:.1f} ({low:.1f} to {high:.1f}) | "
                f"{changed.changed:.1f} |"
            )
    head = ["| latents | exact match, % (95 % interval) | answers changed, % |", "|---|---|---|"]
    telling = [what for what, changed in changes if changed is not None and not changed.inert]
    said = "It answers otherwise with its latents " + ", or ".join(telling) + "."
    if not telling:
        said = (
            "Nothing that was done to its latents changes its answers: they carry nothing for it."
        )
    parts = [f"{said} Asked {found.n:,} problems:", "\n".join([*head, *rows])]
    if together.donor is not None and together.donor.follows is not None:
        follows = together.donor.follows
        parts.append(
            f"With another problem's latents it gives that problem's answer to {follows.share:.1f} "
            f"% of {follows.n:,}, and {follows.untouched:.1f} % with its own."
        )
    return "\n\n".join(parts)


def _loading(student: Published) -> str:
    about: dict[str, Any] = read_json(student.folder / "student.json")
    asked = "A question ends in a line end."
    if "prompt" in about:
        asked = (
            f"Questions are put as `prompt` in student.json says: {json.dumps(about['prompt'])}."
        )
    questions = questions_in(student.folder)
    head = "import torch\n" if "torch." in questions else ""
    if _is_adapters(student):
        base = Base.read(student.folder / ADAPTER)
        where = f"`{base.model}` of the Hub, at the commit {base.commit}"
        if base.commit is None:
            where = f"`{shown_path(base.model)}`, which its makers have and this folder has not"
        place = base.model if base.commit else "PATH_OF_THE_BASE"
        return f"""It is kept as adapters on a model, {where}.
The fingerprint of that model, which is checked, is {base.fingerprint}.

```python
{head}from transformers import AutoTokenizer

from kava_core import LatentReasoner

folder = "PATH_OF_THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
student = LatentReasoner.from_pretrained(folder, base="{place}")
{questions}
written = student.generate(**questions)
{PRINT}
```

{asked} `kava ask` and `kava serve` take the base as `--base`."""
    return f"""```python
{head}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "PATH_OF_THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{questions}
written = model.generate(**questions, custom_generate=folder, trust_remote_code=True)
{PRINT}
```

{asked} `trust_remote_code=True` consents to run `custom_generate/generate.py`, and without that the
decoder neither thinks nor is asked for its answer. `LatentReasoner.from_pretrained(folder)` of
`kava_core` does the same, and needs no consent."""
