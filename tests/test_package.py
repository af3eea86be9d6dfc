"""What is installed: a light package whose names, versions and lists are true."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import kava_core

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LOCK = {
    requirement.name.lower(): requirement
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
RANGES = [
    Requirement(line)
    for lines in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for line in lines
]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def test_every_package_is_listed() -> None:
    folders = {"kava_core": ROOT / "kava_core", "kava_stages": ROOT / "stages"}
    found = [
        ".".join((name, *file.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for file in folder.rglob("__init__.py")
    ]
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_rooms_import_what_the_table_says_and_no_more() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w, –]+) \|$", text, re.M)
    table = {room: set() if others == "–" else set(others.split(", ")) for room, others in rows}
    above: set[str] = set()
    for room, others in table.items():  # each stands on those above it: there is no circle
        assert others <= above, room
        above.add(room)
    core = ROOT / "kava_core"
    found: dict[str, set[str]] = {file.parent.name: set() for file in core.glob("*/__init__.py")}
    for file in core.rglob("*.py"):
        names = re.findall(r"^\s*(?:from|import) kava_core\.(\w+)", file.read_text(), re.M)
        room = file.relative_to(core).parts[0]
        others = {name for name in names if name in found and name != room}
        if room in found:
            found[room] |= others
        else:
            assert not others or file == core / "__init__.py", file
    assert found == table


def test_importing_the_library_does_not_wait_for_torch() -> None:
    code = (
        "import sys, kava_core; print(sorted({'torch', 'transformers', 'numpy'} & {*sys.modules}))"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize("name", kava_core.__all__)
def test_the_face_is_handed_on(name: str) -> None:
    assert getattr(kava_core, name) is not None


def test_the_face_is_that_of_the_rooms() -> None:
    from kava_core.eviction import POLICIES, evict
    from kava_core.models.latent import LatentReasoner
    from kava_core.store import TargetsStore, TeacherStore

    assert kava_core.POLICIES is POLICIES
    assert kava_core.evict is evict
    assert kava_core.LatentReasoner is LatentReasoner
    assert (kava_core.TargetsStore, kava_core.TeacherStore) == (TargetsStore, TeacherStore)


def test_another_name_is_no_part_of_the_face() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(kava_core, "nonsense")  # noqa: B009


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "kava_core.__version__"
    }
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(kava_core.__version__)}\]", changelog, re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == kava_core.__version__


@pytest.mark.parametrize("wanted", RANGES, ids=lambda wanted: wanted.name)
def test_the_lock_pins_a_version_of_every_range(wanted: Requirement) -> None:
    locked = LOCK[wanted.name.lower()]
    (pin,) = locked.specifier
    assert pin.operator == "=="
    assert wanted.specifier.contains(pin.version)
    assert locked.extras == wanted.extras


def test_the_lock_pins_nothing_else() -> None:
    build = [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]
    assert set(LOCK) == {wanted.name.lower() for wanted in [*RANGES, *build]}


def test_the_lock_is_what_is_installed() -> None:
    for name, locked in LOCK.items():
        assert locked.specifier.contains(importlib.metadata.version(name).split("+")[0]), name


@pytest.mark.parametrize("script", sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]))
def test_scripts_import_what_is_installed(script: Path) -> None:
    """Run by its path, a script finds neither `stages`, installed as kava_stages, nor `tests`."""
    found = re.findall(r"^ *(?:from|import) (stages|tests)\b", script.read_text("utf-8"), re.M)
    assert found == []
