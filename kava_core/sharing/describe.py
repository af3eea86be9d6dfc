"""Where a store and its teacher come from, read from the artefacts that they were made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kava_core.artefacts import read_json
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.models.adapted import ADAPTER, BASE, Base
from kava_core.models.loading import load_tokenizer, model_fingerprint, tokenizer_fingerprint
from kava_core.problems.folder import ProblemFolder, open_problems
from kava_core.store import Expectation
from kava_core.store.manifest import Manifest
from kava_core.store.provenance import DataFacts, Provenance, TeacherFacts
from kava_core.store.where import place_of

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def describe(
    store: Path, *, teacher: Path | None, problems: Path | None, licence: str | None
) -> Provenance:
    """What a card says of the store in folder `store`.

    teacher, problems: folders that it may have been made from; what was not is passed over. licence
    of the data: an identifier of the Hub. KavaError if it is none, or of data that is not at hand.
    """
    check_licence(licence)
    manifest = place_of(store).read_manifest()
    made_from = manifest.fingerprints
    data = data_facts(problems, made_from.get("problems"), licence) if problems else None
    if data is None and licence is not None:
        raise KavaError(
            f"the licence {licence} is that of the data, and the problems that {store} was made "
            "from are not at hand. Leave it out, or give it where the problems are."
        )
    known = teacher is not None and (teacher / "teacher.json").is_file()
    if teacher is None or not known or model_fingerprint(str(teacher)) != made_from.get("teacher"):
        return Provenance.of(manifest, data, None)
    return Provenance.of(manifest, data, teacher_facts(teacher))


def check_licence(licence: str | None) -> None:
    """KavaError for what is no identifier of a licence as the Hub has them."""
    if licence is not None and not LICENCE.fullmatch(licence):
        raise KavaError(
            f"expected a licence as the Hub writes it (mit, apache-2.0, cc-by-4.0 …), found "
            f"{licence!r:.80}."
        )


def check_teacher(teacher: Path, manifest: Manifest, store: Path) -> None:
    """KavaError with both fingerprints unless the store was made with this teacher and its
    tokenizer."""
    found = Expectation(
        model_fingerprint(str(teacher)), tokenizer_fingerprint(load_tokenizer(str(teacher)))
    )
    found.check(manifest, store)


def data_facts(folder: Path, fingerprint: str | None, licence: str | None) -> DataFacts | None:
    """What problems.json says; None if there is none, or its training problems are others than
    those of the fingerprint, and no traces/ beside it has these with the teacher's own chains."""
    if not (folder / "problems.json").is_file():
        return None
    problems = open_problems(folder)
    about: dict[str, Any] = read_json(folder / "problems.json")
    counts: dict[str, Any] = read_json(folder / "metrics.json")
    settings, read = about.get("settings", {}), about.get("read", {}).get("train", {})
    given = DataFacts(
        source=settings.get("source", {"name": "unknown"}),
        path=read.get("dataset") or shown_path(settings.get("path")),
        hub_config=settings.get("hub_config"),
        revision=settings.get("revision"),
        commit=read.get("commit"),
        split="train",
        problems=counts["train"]["problems"],
        traces=problems.traces,
        seed=settings.get("seed"),
        licence=licence,
    )
    if problems.fingerprint("train") == fingerprint:
        return given
    return _as_written(given, folder.parent / "traces", problems, fingerprint)


def _as_written(
    given: DataFacts, folder: Path, problems: ProblemFolder, fingerprint: str | None
) -> DataFacts | None:
    """The same with chains of the teacher's in traces/; None if it is not these that are meant."""
    if not (folder / "problems.json").is_file():
        return None
    made_from: dict[str, str] = read_json(folder / "problems.json")["fingerprints"]
    if (
        made_from["problems"] != problems.fingerprint("train", "validation")
        or open_problems(folder).fingerprint("train") != fingerprint
    ):
        return None
    counts: dict[str, Any] = read_json(folder / "metrics.json")
    kept, written = counts["chains"]["kept"], sum(counts["chains"].values())
    told = f"written by the teacher, {kept:,} of {written:,} kept"
    return given.model_copy(update={"problems": counts["train"]["problems"], "written": told})


def teacher_facts(folder: Path) -> TeacherFacts:
    """What teacher.json and metrics.json say; KavaError if they cannot be read."""
    about: dict[str, Any] = read_json(folder / "teacher.json")
    metrics: dict[str, Any] = {}
    if (folder / "metrics.json").is_file():
        metrics = read_json(folder / "metrics.json")
    settings = about["settings"]
    names = ("n", "exact_match_cot", "exact_match_no_cot")
    return TeacherFacts(
        model=shown_path(settings["model"]) or "",
        revision=settings.get("revision"),
        commit=about.get("commit"),
        training=settings.get("training"),
        steps=about["steps"],
        **{name: metrics.get(name) for name in names},
    )


def warn_of_places(folder: Path) -> None:
    """Say which paths of this machine are told by the JSON of a model's folder that goes elsewhere.

    They are left as they are: who loads the model reads them.
    """
    told = {}
    if (folder / "teacher.json").is_file():
        told["teacher.json"] = read_json(folder / "teacher.json")["settings"]["model"]
    if (folder / ADAPTER / BASE).is_file():
        told[ADAPTER] = Base.read(folder / ADAPTER).model
    for name, path in told.items():
        if path != shown_path(path):
            warn(
                f"warning: {name} of {folder} tells {path}, a path of this machine. To keep it to "
                "yourself, name the model by a path from here or by its Hub id, and train again."
            )


def shown_path(path: str | None) -> str | None:
    """A path as others may read it: of one that says where it lies on this machine, its name."""
    if path is None or not Path(path).expanduser().is_absolute():
        return path
    return Path(path).name
