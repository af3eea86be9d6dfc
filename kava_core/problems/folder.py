"""The problems of a pipeline as two artefacts: what is taught, and what is asked.

They are apart so that another test set leaves everything as it is that a model is trained from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kava_core.artefacts import fingerprint, folder_fingerprint, read_json, write_json
from kava_core.errors import KavaError
from kava_core.problems.parquet import (
    ProblemFile,
    load_problems,
    open_problem_file,
    save_problems,
)
from kava_core.problems.prompt import PLAIN, Prompt, read_prompt
from kava_core.problems.records import Problem, TraceForm, describe, describe_tokens
from kava_core.problems.splits import ProblemSplits
from kava_core.problems.tokens import TokenRules

TAUGHT = ("train", "validation")
# The source's own test set; further ones stand beside it under their names.
OWN = "test"


@dataclass(frozen=True)
class Measure:
    """The rules of a tokenizer, and the fingerprint that it goes by."""

    rules: TokenRules
    fingerprint: str


@dataclass(frozen=True)
class ProblemFolder:
    """An opened folder of problems that are taught; `traces` says how their steps are written.

    tokenizer: the fingerprint of the one that they were measured with; None if there was none.
    prompt: how they are put to a model.
    """

    path: Path
    traces: TraceForm
    tokenizer: str | None = None
    prompt: Prompt = PLAIN

    def load(self, split: str) -> list[Problem]:
        """The problems of `train` or `validation`."""
        return load_problems(self.path / f"{split}.parquet")

    def open(self, split: str) -> ProblemFile:
        """The same, decoded as they are asked for."""
        return open_problem_file(self.path / f"{split}.parquet")

    def open_unchecked(self, split: str) -> ProblemFile:
        """The same without reading it through first, for workers: their driver has done so."""
        return ProblemFile(self.path / f"{split}.parquet")

    def count(self, split: str) -> int:
        """How many there are."""
        return len(self.open_unchecked(split))

    def check_tokenizer(self, fingerprint: str) -> None:
        """KavaError if the problems were measured with another tokenizer than the teacher's."""
        if self.tokenizer not in (None, fingerprint):
            raise KavaError(
                f"{self.path} was measured in the tokens of another tokenizer: expected the "
                f"teacher's, {fingerprint[:12]}…, found {str(self.tokenizer)[:12]}…. Set "
                "`prepare.tokenizer` to the teacher's model (and `tokenizer_revision` to its "
                "revision), and run `kava prepare` again."
            )

    def fingerprint(self, *splits: str) -> str:
        """Names the content of the given splits, how their steps are written, and the prompt."""
        return _fingerprint(self.path, self.traces, self.prompt, splits)


@dataclass(frozen=True)
class AskedFolder:
    """An opened folder of test sets: `test`, the source's own, and the further ones in `names`.

    Their problems may have no steps; `traces` says how a model that is asked would write them,
    `prompt` how it is asked.
    """

    path: Path
    traces: TraceForm
    names: tuple[str, ...] = ()
    prompt: Prompt = PLAIN

    def load(self, name: str = OWN) -> list[Problem]:
        """The problems of one test set; KavaError if it has none."""
        problems = load_problems(self.path / f"{name}.parquet", steps=False)
        if not problems:
            raise KavaError(
                f"{self.path}: test set {name} has no problems. Ask `prepare` for some."
            )
        return problems

    def load_all(self) -> dict[str, list[Problem]]:
        """All that is to be asked: `test` under the name of its source, then the further sets."""
        own = self.load()
        return {own[0].source: own, **{name: self.load(name) for name in self.names}}

    def fingerprint(self, *names: str) -> str:
        """Names the content of the given test sets, how their steps are written, and the prompt."""
        return _fingerprint(self.path, self.traces, self.prompt, names)


def write_problems(
    folder: Path,
    splits: ProblemSplits,
    traces: TraceForm,
    settings: Mapping[str, Any],
    tokens: Measure | None = None,
    prompt: Prompt = PLAIN,
) -> None:
    """Write train and validation, `problems.json` and `metrics.json`.

    The metrics are counts and lengths per split, and what became of all rows. `settings` must be of
    what is taught alone, so that the folder does not change with what is asked. tokens: of the
    tokenizer that the problems were measured with.
    """
    taught = splits.taught()
    for name, problems in taught.items():
        save_problems(folder / f"{name}.parquet", problems)
    metrics = {name: _describe(problems, tokens) for name, problems in taught.items()}
    write_json(folder / "metrics.json", metrics | {"rows": _rows(splits, taught)})
    about: dict[str, Any] = {
        "traces": traces,
        "settings": settings,
        "read": _of(taught, splits.origins),
        **prompt.kept(),
    }
    if tokens is not None:
        about["tokenizer"] = tokens.fingerprint
    write_json(folder / "problems.json", about)


def write_test_sets(
    folder: Path,
    splits: ProblemSplits,
    traces: TraceForm,
    settings: Mapping[str, Any],
    tokens: Measure | None = None,
    prompt: Prompt = PLAIN,
) -> None:
    """Write the source's own test set and the further ones, `test_sets.json` and `metrics.json`.

    The metrics are counts and lengths per test set, what became of all rows, and leaked questions.
    """
    asked = splits.asked()
    for name, problems in asked.items():
        save_problems(folder / f"{name}.parquet", problems, steps=False)
    metrics = {
        "test_sets": {name: _describe(problems, tokens) for name, problems in asked.items()},
        "rows": _rows(splits, asked),
        "leaked": splits.leaked,
    }
    write_json(folder / "metrics.json", metrics)
    about = {
        "traces": traces,
        "test_sets": list(splits.test_sets),
        "settings": settings,
        "read": _of(asked, splits.origins),
        **prompt.kept(),
    }
    write_json(folder / "test_sets.json", about)


def open_problems(path: Path) -> ProblemFolder:
    """KavaError if the folder is not one of problems that `prepare` wrote."""
    about = _about(path / "problems.json")
    _require(path, TAUGHT)
    prompt = read_prompt(about, path / "problems.json")
    return ProblemFolder(path, about["traces"], about.get("tokenizer"), prompt)


def open_test_sets(path: Path) -> AskedFolder:
    """KavaError if the folder is not one of test sets that `prepare` wrote."""
    about = _about(path / "test_sets.json")
    names = [Path(str(name)).name for name in about.get("test_sets", [])]  # none outside the folder
    _require(path, [OWN, *names])
    prompt = read_prompt(about, path / "test_sets.json")
    return AskedFolder(path, about["traces"], tuple(names), prompt)


def _describe(problems: Sequence[Problem], tokens: Measure | None) -> dict[str, Any]:
    return describe(problems) | (
        {} if tokens is None else describe_tokens(*tokens.rules.lengths(problems))
    )


def _rows(splits: ProblemSplits, names: Iterable[str]) -> dict[str, Any]:
    return {name: splits.counts(name) for name in names}


def _of(names: Iterable[str], found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def _about(path: Path) -> dict[str, Any]:
    about = read_json(path)
    if not isinstance(about, dict) or about.get("traces") not in get_args(TraceForm):
        raise KavaError(f"{path} does not say how traces are written. Run `kava prepare` again.")
    return about


def _require(path: Path, names: Sequence[str]) -> None:
    missing = [f"{name}.parquet" for name in names if not (path / f"{name}.parquet").is_file()]
    if missing:
        raise KavaError(f"{path} lacks {', '.join(missing)}. Run `kava prepare` again.")


def _fingerprint(path: Path, traces: TraceForm, prompt: Prompt, names: Sequence[str]) -> str:
    files = folder_fingerprint(path, [f"{name}.parquet" for name in names])
    return fingerprint({"traces": traces, "files": files, **prompt.kept()})
