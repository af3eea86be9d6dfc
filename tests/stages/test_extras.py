"""The package of examples/kava-extras, installed and run: a policy and a source without a fork."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kava_core import registry
from kava_core.errors import KavaError
from kava_core.store import TargetsStore
from kava_core.targets.plan import Plan
from stages.cli import Kava
from tests.stages.project import ROOT

TINY = {"steps": 2, "batch_size": 8, "threads": 1}
SETTINGS: dict[str, Any] = {
    "prepare": {
        "source": {"name": "chat-log", "mark": "Answer:"},
        "path": "chats.jsonl",
        "validation": 6,
        "test": 4,
    },
    "teacher": {
        "scratch": {"vocabulary": 300, "hidden_size": 32, "intermediate_size": 32},
        "training": TINY,
        "validate_on": 2,
        "max_new_tokens": 2,
    },
    "generate": {"shard_size": 16, "batch_size": 16},
    "evict": {"policy": {"name": "pooled", "radius": 2}, "budget": 4},
    "fidelity": {
        "policies": ["keydiff", "pooled", "rkv"],
        "budgets": [2],
        "bits": [16],
        "limit": 4,
        "max_new_tokens": 2,
    },
    "students": {"no-cot": {"reads": "problems", "training": TINY}},
    "evaluate": {},
    "report": {"title": "t"},
    "resources": {"workers": 0},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed into a folder of its own; the sources stay as they are."""
    folder = tmp_path_factory.mktemp("extras")
    source = shutil.copytree(ROOT / "examples/kava-extras", folder / "source")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target"]
    command = [sys.executable, "-m", "pip", "--quiet", "install", *options]
    subprocess.run([*command, str(folder / "packages"), str(source)], check=True)
    return folder / "packages"


@pytest.fixture(scope="module")
def extras(packages: Path) -> Iterator[Path]:
    sys.path.insert(0, str(packages))
    registry._points.cache_clear()
    yield packages
    sys.path.remove(str(packages))
    registry._points.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "kava_extras"]:
        del sys.modules[name]


@dataclass(frozen=True)
class Chats:
    """A pipeline of a chat log in `path`."""

    path: Path
    settings: dict[str, Any]

    def write(self) -> None:
        rows = []
        for number in range(40):
            question = {"role": "user", "content": f"What is {number} plus 3 plus {number} ?"}
            said = f"{number}+3={number + 3}\n{number + 3}+{number}={2 * number + 3}\n"
            answer = {"role": "assistant", "content": f"{said}Answer: {2 * number + 3}"}
            rows.append(json.dumps({"messages": [question, answer]}))
        (self.path / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
        document = {"pipeline": "chats", "pipelines": {"chats": self.settings}}
        (self.path / "pipelines.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")

    def kava(self, command: str) -> None:
        done = CliRunner(catch_exceptions=False).invoke(Kava(), [command])
        assert done.exit_code == 0, done.output

    def read(self, name: str) -> Any:
        return json.loads((self.path / "data/chats" / name).read_text(encoding="utf-8"))


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chats:
    monkeypatch.chdir(tmp_path)
    project = Chats(tmp_path, dict(SETTINGS))
    project.write()
    return project


@pytest.mark.usefixtures("extras")
def test_it_runs_through_prepare_evict_and_fidelity(chats: Chats) -> None:
    for command in ("prepare", "teacher", "generate", "evict", "fidelity"):
        chats.kava(command)
    source = chats.read("problems/problems.json")["settings"]["source"]
    assert source == {
        "name": "chat-log",
        "packages": {"kava-extras": "0.1.0"},
        "mark": "Answer:",
    }
    store = TargetsStore.open(chats.path / "data/chats/kv_targets")
    assert store.manifest.settings["evict"]["policy"] == {
        "name": "pooled",
        "packages": {"kava-extras": "0.1.0"},
        "radius": 2,
    }
    assert set(chats.read("fidelity/metrics.json")["policies"]) == {"keydiff", "pooled", "rkv"}
    before = store.batch(range(8)).slot_positions
    chats.settings["evict"] = {"policy": {"name": "pooled", "radius": 1}, "budget": 4}
    chats.write()
    chats.kava("evict")
    after = TargetsStore.open(chats.path / "data/chats/kv_targets").batch(range(8)).slot_positions
    assert before.shape == after.shape and not before.equal(after)


def test_another_version_of_it_is_another_artefact(chats: Chats, extras: Path) -> None:
    chats.settings["evict"] = {"policy": "keydiff", "budget": 4}
    chats.write()
    for command in ("prepare", "teacher", "generate", "evict"):
        chats.kava(command)
    folder = chats.path / "data/chats/kv_targets"
    before = TargetsStore.open(folder)
    (about,) = extras.glob("kava_extras-*.dist-info")
    text = (about / "METADATA").read_text(encoding="utf-8")
    later = text.replace("Version: 0.1.0", "Version: 0.2.0")
    (about / "METADATA").write_text(later, encoding="utf-8")
    registry._points.cache_clear()
    try:
        with pytest.raises(
            KavaError, match=r"here of kava-extras 0\.2\.0, not of kava-extras 0\.1"
        ):
            Plan.of_store(before)
        chats.kava("evict")
    finally:
        (about / "METADATA").write_text(text, encoding="utf-8")
        registry._points.cache_clear()
    after = TargetsStore.open(folder).manifest
    assert after.settings["evict"]["policy"]["packages"] == {"kava-extras": "0.2.0"}
    assert after.digest != before.manifest.digest
    assert after.fingerprints == before.manifest.fingerprints  # the same caches


@pytest.mark.usefixtures("extras")
def test_its_policies_keep_what_is_promised() -> None:
    from kava_extras.keydiff import KeyDiff
    from kava_extras.pooled import Pooled

    from kava_core.eviction.check import check_policy

    for policy in (Pooled(), Pooled(radius=3), KeyDiff()):
        check_policy(policy)


def test_without_kvpress_its_scorers_are_one_sentence(packages: Path, tmp_path: Path) -> None:
    project = Chats(tmp_path, {**SETTINGS, "evict": {"policy": "kvpress", "budget": 4}})
    project.write()
    done = subprocess.run(
        [sys.executable, "-m", "stages", "evict", "--pipelines", str(tmp_path / "pipelines.yaml")],
        cwd=ROOT,
        env={"PYTHONPATH": str(packages), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "policy kvpress: kvpress needs the package kvpress, which is not installed" in (
        " ".join(done.stderr.split())
    )


@pytest.mark.usefixtures("extras")
def test_what_kvpress_imports_and_is_not_there_is_named(
    chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = chats.path / "kvpress-0.5.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n")
    (chats.path / "kvpress.py").write_text("import not_fire\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(chats.path))
    chats.settings["evict"] = {"policy": "kvpress", "budget": 4}
    chats.write()
    page = (ROOT / "docs/eviction.md").read_text(encoding="utf-8")
    (install,) = re.findall(r"`(pip install .*?kvpress.*?)`", page)
    with pytest.raises(KavaError) as error:
        chats.kava("evict")
    said = "policy kvpress: kvpress cannot be imported here (No module named 'not_fire'). Install "
    assert said in str(error.value) and f"`{install}`" in str(error.value)


def test_where_it_is_not_installed_its_names_are_not_there(tmp_path: Path) -> None:
    ours = {"source": "synthetic", "train": 8, "validation": 4, "test": 4}
    project = Chats(tmp_path, {**SETTINGS, "prepare": ours, "fidelity": None})
    project.write()
    done = subprocess.run(
        [sys.executable, "-m", "stages", "evict", "--pipelines", str(tmp_path / "pipelines.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "evict.policy: should be one of rkv, attention" in done.stderr
