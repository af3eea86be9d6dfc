"""Where a store comes from, as its dataset card says it: for people, and to be checked.

A manifest has the settings and fingerprints that decide a store's content. What they stand for (the
data and its licence, the base model, the teacher's training) is known where the store was made; an
export writes it into the card, under the key `kava` of its front matter, beside the digest of the
store that it is about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from pydantic import ValidationError

from kava_core.errors import KavaError
from kava_core.findings.base import Finding
from kava_core.store.manifest import Manifest

CARD, KEY = "README.md", "kava"


class DataFacts(Finding):
    """The problems: their source with its settings, where it was read (a Hub name or the last part
    of a path), how many, how their steps are written, their licence (None: nobody said). written:
    whose the steps are, where they are not the source's own."""

    source: dict[str, Any]
    path: str | None
    hub_config: str | None
    revision: str | None
    commit: str | None
    split: str
    problems: int
    traces: str
    seed: int | None
    licence: str | None
    written: str | None = None


class TeacherFacts(Finding):
    """The teacher: the model that it began as (`scratch`: none) at which revision and commit, how
    it was trained (None: not at all), for how many steps, and exact match (%) on n validation
    problems, with and without its chain of thought."""

    model: str
    revision: str | None
    commit: str | None
    training: dict[str, Any] | None
    steps: int
    n: int | None = None
    exact_match_cot: float | None = None
    exact_match_no_cot: float | None = None


class Provenance(Finding):
    """The key `kava` of a card. digest, kind, records, fingerprints: the store's own; data,
    teacher: None where what the store was made from was not at hand."""

    digest: str
    kind: str
    records: int
    fingerprints: dict[str, str]
    data: DataFacts | None = None
    teacher: TeacherFacts | None = None

    @classmethod
    def of(
        cls, manifest: Manifest, data: DataFacts | None, teacher: TeacherFacts | None
    ) -> Provenance:
        return cls(
            digest=manifest.digest,
            kind=manifest.kind,
            records=manifest.records,
            fingerprints=manifest.fingerprints,
            data=data,
            teacher=teacher,
        )

    def check(self, manifest: Manifest, card: Path) -> None:
        """KavaError, with both values, where the card tells of another store than this one."""
        for name in ("kind", "records", "digest", "fingerprints"):
            said, found = getattr(self, name), getattr(manifest, name)
            if said != found:
                raise KavaError(
                    f"{card} says {name} {_short(said)}, and the manifest of the store beside it "
                    f"{_short(found)}: they do not belong together. Fetch both again, or export "
                    "the store again."
                )

    def facts(self) -> list[tuple[str, str]]:
        """Name and value, for a table."""
        return [*data_rows(self.data), *teacher_rows(self.teacher)]


def data_rows(data: DataFacts | None) -> list[tuple[str, str]]:
    if data is None:
        return [("data", "not known here")]
    settings = {name: value for name, value in data.source.items() if name != "name"}
    source = str(data.source["name"]) + (f" {json.dumps(settings)}" if settings else "")
    read = [
        f"{name} {value}"
        for name, value in (
            ("from", data.path),
            ("part", data.hub_config),
            ("revision", data.revision),
            ("commit", data.commit),
            ("seed", data.seed),
        )
        if value is not None
    ]
    return [
        ("data", ", ".join([source, *read])),
        ("split", f"{data.split}, {data.problems:,} problems, traces as {data.traces}"),
        *([] if data.written is None else [("chains of thought", data.written)]),
        ("licence of the data", data.licence or "not stated by who exported this"),
    ]


def teacher_rows(teacher: TeacherFacts | None) -> list[tuple[str, str]]:
    if teacher is None:
        return [("teacher", "not known here")]
    at = [teacher.revision and f"revision {teacher.revision}", teacher.commit]
    where = ", ".join(part for part in at if part)
    base = "none: from random weights" if teacher.model == "scratch" else teacher.model
    training = "none: taken as it is"
    if teacher.training is not None:
        shown = {k: v for k, v in teacher.training.items() if v is not None}
        training = f"{teacher.steps:,} steps, {json.dumps(shown)}"
    facts = [
        ("base model", f"{base} ({where})" if where else base),
        ("training of the teacher", training),
    ]
    if teacher.exact_match_cot is not None and teacher.exact_match_no_cot is not None:
        facts.append(
            (
                "accuracy of the teacher",
                f"{teacher.exact_match_cot:.1f} % writing its chain of thought, "
                f"{teacher.exact_match_no_cot:.1f} % without, on {teacher.n} validation problems",
            )
        )
    return facts


def read_card(folder: Path) -> Provenance:
    """What the card of an exported store says; KavaError if there is none, or it does not say."""
    card = folder / CARD
    remedy = "Fetch it again, or export the store again with `kava store export`."
    if not card.is_file():
        raise KavaError(f"{card} is missing: an exported store has a card. {remedy}")
    try:
        found = metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise KavaError(f"{card} cannot be read ({reason}). {remedy}") from None
    if not isinstance(found, dict) or KEY not in found:
        raise KavaError(
            f"{card} does not say what store it is about, under `{KEY}` in its front matter. "
            f"{remedy}"
        )
    try:
        return Provenance.model_validate(found[KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise KavaError(f"{card}: {KEY}.{where:.100}: {first['msg']:.100}. {remedy}") from None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
