"""What a student is made from, and whether it belongs together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kava_core.artefacts import fingerprint
from kava_core.errors import KavaError
from kava_core.models.loading import (
    commit_of,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from kava_core.problems.folder import open_problems
from kava_core.problems.prompt import check_prompt, read_prompt
from kava_core.problems.traces import chat_fingerprint
from kava_core.settings import Evict, Student
from kava_core.store import Expectation, TargetsStore
from kava_core.store.summary import quarantined
from kava_core.store.where import place_of
from kava_core.targets.plan import Plan
from kava_core.targets.specs import stored_settings


@dataclass(frozen=True)
class StudentInputs:
    """The folder of the teacher, that of what is read (kv_targets or problems), and the folder or
    Hub id of the model that the student begins as. Paths are absolute: processes may start in
    another folder.

    commit: that of a model on the Hub. fingerprints: of all of these. left_out: ids of problems
    that are not taught, since the teacher's stores lack them.
    """

    teacher: Path
    source: Path
    model: str
    commit: str | None
    fingerprints: dict[str, str]
    left_out: frozenset[str] = frozenset()

    @classmethod
    def checked(
        cls,
        name: str,
        settings: Student,
        evict: Evict | None,
        *,
        teacher: Path,
        source: Path,
        lacking: Path | None = None,
    ) -> Self:
        """Those of the student called `name`. evict: None for targets that were made elsewhere.
        lacking: a store that may lack records, which a student of problems then does not learn
        either: all systems are taught the same.

        KavaError if the targets were made with another teacher, or have another number of slots
        than `evict` makes; if the model has another tokenizer than the teacher.
        """
        tokenizer = load_tokenizer(str(teacher))
        fingerprints = {
            "teacher": model_fingerprint(str(teacher)),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        model, commit = str(teacher.absolute()), None
        if settings.model is not None:
            model = settings.model
            if Path(model).is_dir():
                model = str(Path(model).absolute())
            fingerprints["model"] = model_fingerprint(model, settings.revision)
            commit = commit_of(model, settings.revision)
            found = tokenizer_fingerprint(load_tokenizer(model, settings.revision))
            if found != fingerprints["tokenizer"]:
                raise KavaError(
                    f"the tokenizer of {model} is {found}, and the teacher's is "
                    f"{fingerprints['tokenizer']}: they must be the same. Choose another "
                    f"students.{name}.model."
                )
        if settings.reads == "kv_targets":
            expected = Expectation(fingerprints["teacher"], fingerprints["tokenizer"])
            store = TargetsStore.open(source, expected)
            if evict is not None:
                _check_budget(store, evict)
            if settings.taught("alpha_readout"):
                _check_slot_tokens(name, store)
            fingerprints["kv_targets"] = store.manifest.digest
            prompt = read_prompt(store.manifest.settings, source)
            chat = chat_fingerprint(prompt, tokenizer).get("chat_template")
            if chat != store.manifest.fingerprints.get("chat_template"):
                raise KavaError(
                    f"the questions of {source} were written by another chat template than that of "
                    f"the tokenizer in {teacher}. Restore its chat_template.jinja, or run `kava "
                    "generate` and `kava evict` again."
                )
        else:
            problems = open_problems(source)
            fingerprints["problems"] = problems.fingerprint("train")
            prompt = problems.prompt
        left_out: frozenset[str] = frozenset()
        if settings.reads == "problems" and lacking is not None:
            manifest = place_of(lacking).read_manifest()
            left_out = frozenset(id for id, _ in quarantined(manifest))
        if left_out:
            fingerprints["left_out"] = fingerprint(sorted(left_out))
        check_prompt(prompt, teacher, "teacher.json", "kava teacher")
        fingerprints |= chat_fingerprint(prompt, tokenizer)
        return cls(teacher.absolute(), source.absolute(), model, commit, fingerprints, left_out)


def _check_budget(store: TargetsStore, evict: Evict) -> None:
    slots = Plan.of(evict, store.geometry).geometry.slots
    if slots != store.geometry.slots:
        raise KavaError(
            f"{store.path} has {store.geometry.slots} slots per layer and head, and evict.budget "
            f"{evict.budget} makes {slots}. Run `kava evict`, or set evict.budget to what the "
            "targets have."
        )


def _check_slot_tokens(name: str, store: TargetsStore) -> None:
    """A readout teaches a slot's token, so it must be one token in all layers and heads."""
    select = stored_settings(store, Evict).select
    if select != "record":
        raise KavaError(
            f"students.{name}.alpha_readout needs slots that hold one token in all layers and "
            f"heads, and {store.path} was made with `select: {select}`. Set evict.select to record."
        )
