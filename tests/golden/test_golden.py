"""A stage that computes something else from the same inputs has another version.

`values/STAGE.json` holds the version and what the stage made of `inputs` then. With the version
raised, `pytest tests/golden --write-golden` writes what it makes now.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kava_core.versions import VERSIONS
from tests.golden.comparison import differences
from tests.golden.values import STAGES, Project

VALUES = Path(__file__).parent / "values"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_computes_what_its_version_did(
    stage: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    shutil.copytree(inputs, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    check(VALUES / f"{stage}.json", stage, STAGES[stage](Project(tmp_path / "home")), writes)


def check(file: Path, stage: str, found: dict[str, Any], writes: bool) -> None:
    """Compare with the values in `file`, or write them where they are of another version."""
    found = json.loads(json.dumps(found))  # as it is when it is read again
    version = VERSIONS[stage]
    golden = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"version": None}
    if golden["version"] != version:
        if not writes:
            pytest.fail(
                f"{stage} has version {version}, and its golden values are of {golden['version']}. "
                "Write them anew: `pytest tests/golden --write-golden`, and commit them."
            )
        written = json.dumps({"version": version, "values": found}, indent=1, sort_keys=True)
        file.write_text(written + "\n", encoding="utf-8")
        return
    wrong = list(differences(golden["values"], found))
    if wrong:
        pytest.fail(
            f"{stage} computes something else from the same inputs, and its version is still "
            f"{version}: {'; '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}. If it is meant "
            f'to, raise "{stage}" in kava_core/versions.py, run `kava sync`, then `pytest '
            "tests/golden --write-golden`. (If only what is looked at has changed, remove "
            f"{file.name} instead of raising the version.)"
        )


def test_every_stage_with_a_version_has_golden_values() -> None:
    assert STAGES.keys() == VERSIONS.keys()
    assert {file.stem for file in VALUES.iterdir()} == STAGES.keys()
