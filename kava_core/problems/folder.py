"""The problems of a pipeline as an artefact: three Parquet files and what they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.artefacts import fingerprint, folder_fingerprint, read_json, write_json
from kava_core.errors import KavaError
from kava_core.problems.records import Problem, TraceForm, describe, load_problems, save_problems
from kava_core.problems.splits import SPLITS, ProblemSplits

FILES = [f"{split}.parquet" for split in SPLITS]
TEST_SETS = "test_sets"


@dataclass(frozen=True)
class ProblemFolder:
    """An opened problems folder.

    `traces` says how its steps are written, `names` which further test sets it has, and
    `latent_fraction` how much of a trace latents stand for (`TraceEncoder`).
    """

    path: Path
    traces: TraceForm
    names: tuple[str, ...] = ()
    latent_fraction: float = 1.0

    def load(self, split: str) -> list[Problem]:
        """The problems of `train`, `validation` or `test`; those of `test` may have no steps."""
        return load_problems(self.path / f"{split}.parquet", steps=split != "test")

    def test_sets(self) -> dict[str, list[Problem]]:
        """All that is to be asked: `test` under the name of its source, then the further sets.

        Problems may have no steps. KavaError if a set is empty.
        """
        test = self.load("test")
        sets = {test[0].source if test else "test": test}
        for name in self.names:
            sets[name] = load_problems(self.path / TEST_SETS / f"{name}.parquet", steps=False)
        empty = [name for name, problems in sets.items() if not problems]
        if empty:
            raise KavaError(
                f"{self.path}: test set {', '.join(empty)} has no problems. Ask `prepare` for some."
            )
        return sets

    def fingerprint(self, *splits: str) -> str:
        """Names the content of the given splits and how their steps are written."""
        files = [f"{split}.parquet" for split in splits]
        content = {"traces": self.traces, "files": folder_fingerprint(self.path, files)}
        if self.latent_fraction < 1:
            content["latent_fraction"] = str(self.latent_fraction)
        return fingerprint(content)


def write_problems(
    folder: Path,
    splits: ProblemSplits,
    traces: TraceForm,
    settings: dict[str, Any],
    latent_fraction: float = 1.0,
) -> None:
    """Write splits and test sets, `problems.json` and `metrics.json`.

    The metrics are counts and lengths per split and test set, rows left out, and leaked questions.
    """
    for split, problems in splits.named().items():
        save_problems(folder / f"{split}.parquet", problems, steps=split != "test")
    for name, problems in splits.test_sets.items():
        save_problems(folder / TEST_SETS / f"{name}.parquet", problems, steps=False)
    metrics: dict[str, Any] = {
        split: describe(problems) for split, problems in splits.named().items()
    }
    metrics[TEST_SETS] = {name: describe(found) for name, found in splits.test_sets.items()}
    metrics["dropped"] = splits.dropped
    metrics["leaked"] = splits.leaked
    write_json(folder / "metrics.json", metrics)
    about = {
        "traces": traces,
        "latent_fraction": latent_fraction,
        TEST_SETS: list(splits.test_sets),
        "settings": settings,
    }
    write_json(folder / "problems.json", about)


def open_problems(path: Path) -> ProblemFolder:
    """KavaError if the folder is not one that `prepare` wrote."""
    about = read_json(path / "problems.json")
    if not isinstance(about, dict) or about.get("traces") not in ("equations", "sentences"):
        raise KavaError(f"{path / 'problems.json'} does not say how traces are written.")
    names = [Path(str(name)).name for name in about.get(TEST_SETS, [])]  # none outside the folder
    files = [*FILES, *(f"{TEST_SETS}/{name}.parquet" for name in names)]
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise KavaError(f"{path} lacks {', '.join(missing)}. Run `kava prepare` again.")
    fraction = about.get("latent_fraction", 1.0)
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise KavaError(
            f"{path / 'problems.json'}: expected a latent_fraction in (0, 1], found {fraction!r}. "
            "Run `kava prepare` again."
        )
    return ProblemFolder(path, about["traces"], tuple(names), float(fraction))
