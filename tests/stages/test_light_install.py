"""The wheel alone, with what it declares to need and nothing else, serves who uses artefacts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from kava_core import __version__
from tests.stages.project import ROOT, Project

SOURCES = ("kava_core", "stages", "pyproject.toml", "README.md", "LICENSE")
NEEDLESS = ["ray", "dvc", "dvclive", "datasets", "peft", "accelerate", "math_verify", "matplotlib"]


class Light:
    """An environment in which nothing is installed but a wheel and what it requires.

    The packages that it requires are links to those of this environment.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        self.scripts = folder / "bin"
        (packages,) = folder.glob("lib/*/site-packages")
        pip("--python", str(self.scripts / "python"), "install", "--no-deps", str(wheel))
        (installed,) = packages.glob("kava-*.dist-info")
        for needed in requirements_of(Distribution.at(installed)):
            for entry in {file.parts[0] for file in needed.files or []} - {"..", "__pycache__"}:
                if not (packages / entry).exists():
                    (packages / entry).symlink_to(Path(str(needed.locate_file(entry))).resolve())

    def run(self, program: str, *arguments: str | Path) -> str:
        """What a program of the environment prints, in a folder that is none of ours."""
        done = subprocess.run(
            [self.scripts / program, *arguments],
            cwd=self.scripts,
            env={"PATH": str(self.scripts), "HOME": str(self.scripts), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{program} {arguments}:\n{done.stdout}"
        return done.stdout


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def requirements_of(package: Distribution) -> list[Distribution]:
    """What a package requires, and what that requires, as it is installed here."""
    found: dict[str, Distribution] = {}
    waiting = [(package, "")]
    while waiting:
        package, extra = waiting.pop()
        for line in package.requires or []:
            wanted = Requirement(line)
            if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
                continue
            new = wanted.name not in found
            found[wanted.name] = distribution(wanted.name)
            waiting += [
                (found[wanted.name], name) for name in (*wanted.extras, *([""] if new else []))
            ]
    return list(found.values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    pip("wheel", *options, str(source))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Light:
    return Light(tmp_path_factory.mktemp("light"), wheel)


def test_the_wheel_claims_our_import_names_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    about = f"kava-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"kava_core", "kava_stages", about}
    for part in ("kava_core/py.typed", f"{about}/licenses/LICENSE"):
        assert part in names
    assert any(name.startswith("kava_core/reporting/templates/") for name in names)


def test_the_light_environment_is_light(light: Light) -> None:
    code = f"from importlib.util import find_spec; print([x for x in {NEEDLESS} if find_spec(x)])"
    assert light.run("python", "-c", code).strip() == "[]"
    where = light.run("python", "-c", "import kava_core; print(kava_core.__file__)")
    assert Path(where.strip()).is_relative_to(light.scripts.parent)


def test_it_has_the_command(light: Light) -> None:
    assert __version__ in light.run("kava", "--version")


def test_it_opens_a_store(light: Light, finished: Project, tmp_path: Path) -> None:
    script = shutil.copy2(ROOT / "examples" / "use_a_store.py", tmp_path)
    shown = light.run("python", script, finished.path / "data/smoke")
    assert "[3, 2, 2, 4, 16] [B, L', H, M, D]" in shown
    assert "records" in light.run(
        "kava", "store", "inspect", finished.path / "data/smoke/kv_targets"
    )


def test_it_asks_a_student(light: Light, finished: Project, tmp_path: Path) -> None:
    script = shutil.copy2(ROOT / "examples" / "use_a_student.py", tmp_path)
    smoke = finished.path / "data/smoke"
    shown = light.run("python", script, smoke, "--student", "kava")
    rows = pq.read_table(smoke / "evaluation/predictions.parquet").to_pylist()
    judged = [row for row in rows if row["system"] == "kava"][:8]
    for row in judged:
        assert f"{row['question']}\n    {row['text'].strip()} (" in shown
    right = sum(row["correct"] for row in judged)
    assert shown.endswith(f"\n{right} of 8 right; 4 latents\n")
    student = smoke / "students/kava"
    asked = light.run("kava", "ask", student, "ian has 3 apples . sells 1 . how many now ?")
    assert "passes to read the question" in asked
