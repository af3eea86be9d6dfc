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


@dataclass(frozen=True)
class ProblemFolder:
    """An opened problems folder; `traces` says how its steps are written."""

    path: Path
    traces: TraceForm

    def load(self, split: str) -> list[Problem]:
        """The problems of `train`, `validation` or `test`."""
        return load_problems(self.path / f"{split}.parquet")

    def fingerprint(self, *splits: str) -> str:
        """Names the content of the given splits and how their steps are written."""
        files = [f"{split}.parquet" for split in splits]
        return fingerprint({"traces": self.traces, "files": folder_fingerprint(self.path, files)})


def write_problems(
    folder: Path, splits: ProblemSplits, traces: TraceForm, settings: dict[str, Any]
) -> None:
    """Write the splits, `problems.json` and `metrics.json` (counts, histograms, dropped rows)."""
    for split, problems in splits.named().items():
        save_problems(folder / f"{split}.parquet", problems)
    metrics = {split: describe(problems) for split, problems in splits.named().items()}
    metrics["dropped"] = splits.dropped
    metrics["leaked"] = {"test questions in train or validation": splits.leaked}
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "problems.json", {"traces": traces, "settings": settings})


def open_problems(path: Path) -> ProblemFolder:
    """KavaError if the folder is not one that `prepare` wrote."""
    about = read_json(path / "problems.json")
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise KavaError(f"{path} lacks {', '.join(missing)}. Run `kava prepare` again.")
    if not isinstance(about, dict) or about.get("traces") not in ("equations", "sentences"):
        raise KavaError(f"{path / 'problems.json'} does not say how traces are written.")
    return ProblemFolder(path, about["traces"])
