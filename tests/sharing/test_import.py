"""A store explains itself to a second team, which trains from it without anything else of A's."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard import metadata_load

from kava_core.artefacts import WORK, file_digest
from kava_core.errors import KavaError
from kava_core.leftovers import find_leftovers
from kava_core.models.loading import load_model
from kava_core.settings import Imported, load_any_pipeline, load_pipeline
from kava_core.store.export import copy_model
from kava_core.store.verify import verify
from stages.graph import check_tracked, project_files
from tests.sharing.conftest import KAVA, MAKING, NO_COT, PREPARE, Team
from tests.stages.project import ROOT, digest


def same_student(made: Team, other: Team) -> bool:
    return digest(made.data("students/kava")) == digest(other.data("students/kava"))


def test_a_students_section_alone_trains_from_folders(
    made: Team, received: Path, other: Team
) -> None:
    places = ["--targets", str(received / "store"), "--teacher", str(received / "teacher")]
    other.kava("distill", "kava", *places)
    assert same_student(made, other)
    assert not other.data("problems").exists()


def test_an_imported_store_trains_the_same_student(made: Team, received: Path, other: Team) -> None:
    other.kava("store", "import", str(received))
    shutil.rmtree(received)
    assert verify(other.data("kv_targets"), full=True) == []
    assert digest(other.data("kv_targets")) == digest(made.data("kv_targets"))
    other.kava("distill", "kava")
    assert same_student(made, other)
    assert sorted(p.name for p in other.data().iterdir()) == [
        "curves",
        "imported.json",
        "kv_targets",
        "students",
        "teacher",
    ]


# Kills itself when it copies its third file.
DYING = """
import os, signal, sys
copies = 0
def look(event, _):
    global copies
    if event == "shutil.copyfile":
        copies += 1
        if copies == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(look)
from stages.cli import kava
kava.main(sys.argv[1:])
"""


def test_an_import_that_was_killed_leaves_work_that_clean_knows(
    made: Team, received: Path, other: Team
) -> None:
    command = ["store", "import", str(received), "--data", "data"]
    done = subprocess.run([sys.executable, "-c", DYING, *command], cwd=other.path, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert not other.data().exists()
    (left,) = [found for found in find_leftovers(other.data().parent) if found.path.is_dir()]
    assert left.what == f"import of {other.data().name}" and left.holder is None
    other.kava("store", "import", str(received))
    assert digest(other.data("kv_targets")) == digest(made.data("kv_targets"))
    assert list((other.data().parent / WORK).iterdir()) == []


def test_a_bare_store_needs_its_teacher(made: Team, received: Path, other: Team) -> None:
    with pytest.raises(KavaError, match="holds no teacher"):
        other.kava("store", "import", str(received / "store"))
    other.kava("store", "import", str(received / "store"), "--teacher", str(received / "teacher"))
    assert digest(other.data("kv_targets")) == digest(made.data("kv_targets"))


def test_the_card_names_where_the_store_comes_from(exported: Path) -> None:
    front = metadata_load(exported / "README.md")
    assert front is not None and front["license"] == "cc0-1.0"
    said = front["kava"]
    assert said["data"]["source"]["name"] == "synthetic"
    assert said["data"]["problems"] == PREPARE["train"] and said["data"]["split"] == "train"
    assert said["teacher"]["model"] == "scratch" and said["teacher"]["steps"] == 2
    assert said["teacher"]["training"]["batch_size"] == 8
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert "| licence of the data | cc0-1.0 |" in text
    assert "'lambda': 0.1" in text  # the default that was in force
    assert "from random weights" in text and "24 problems" in text
    assert str(exported.parent) not in text


def test_what_was_not_made_from_its_neighbours_does_not_claim_them(
    made: Team, tmp_path: Path
) -> None:
    from stages.store import export_store

    alone = tmp_path / "alone"
    shutil.copytree(made.data("kv_targets"), alone / "kv_targets")
    shutil.copytree(made.data("problems"), alone / "problems")
    shutil.copyfile(made.data("problems/validation.parquet"), alone / "problems/train.parquet")
    export_store(alone / "kv_targets", tmp_path / "out", teacher=None, licence=None)
    assert "| data | not known here |" in (tmp_path / "out/README.md").read_text("utf-8")
    with pytest.raises(KavaError, match="not at hand"):
        export_store(alone / "kv_targets", tmp_path / "more", teacher=None, licence="mit")
    with pytest.raises(KavaError, match="expected a licence"):
        export_store(alone / "kv_targets", tmp_path / "more", teacher=None, licence="MIT licence")


def test_a_card_of_another_store_is_refused(received: Path, other: Team) -> None:
    card = received / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("records: 24", "records: 25"), encoding="utf-8")
    with pytest.raises(KavaError, match=r"says records 25, and the manifest .* 24"):
        other.kava("store", "import", str(received))
    card.write_text("# A store\n", encoding="utf-8")
    with pytest.raises(KavaError, match="does not say what store"):
        other.kava("store", "import", str(received))
    card.write_text("---\nkava: [\n---\n", encoding="utf-8")
    with pytest.raises(KavaError, match="cannot be read"):
        other.kava("store", "import", str(received))
    card.unlink()
    with pytest.raises(KavaError, match="is missing"):
        other.kava("store", "import", str(received))
    assert not other.data("kv_targets").exists() and not list(other.data().glob(".import*"))


def test_a_foreign_teacher_or_tokenizer_is_refused(received: Path, other: Team) -> None:
    config = received / "teacher/config.json"
    plain = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**plain, "rms_norm_eps": 1e-3}), encoding="utf-8")
    places = ("--targets", str(received / "store"), "--teacher", str(received / "teacher"))
    for command in (("store", "import", str(received)), ("distill", "kava", *places)):
        with pytest.raises(KavaError, match=r"was made with the teacher .*, this run has"):
            other.kava(*command)
    config.write_text(json.dumps(plain), encoding="utf-8")
    tokenizer = received / "teacher/tokenizer.json"
    rules = json.loads(tokenizer.read_text("utf-8"))
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(KavaError, match=r"was made with the tokenizer .*, this run has"):
        other.kava("store", "import", str(received))
    assert not other.data("kv_targets").exists()


def test_the_same_teacher_in_other_files_is_the_same(
    made: Team, received: Path, other: Team
) -> None:
    model = load_model(str(received / "teacher"))
    (received / "teacher/model.safetensors").unlink()
    model.save_pretrained(received / "teacher", max_shard_size="20KB")
    other.kava("store", "import", str(received))
    assert len(list(other.data("teacher").glob("model-*.safetensors"))) > 1
    other.kava("distill", "kava")
    assert same_student(made, other)


def test_a_damaged_store_is_refused(received: Path, other: Team) -> None:
    shard = sorted((received / "store").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(KavaError, match="does not match its checksum"):
        other.kava("store", "import", str(received))
    assert not other.data("kv_targets").exists()


@pytest.mark.parametrize("name", ["store/shard-00000.safetensors", "teacher/notes.txt"])
def test_nothing_is_copied_that_is_no_file_of_the_folder(
    received: Path, other: Team, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret.env").write_text("PASSWORD=hunter2", encoding="utf-8")
    place = received / name
    place.unlink(missing_ok=True)
    place.symlink_to("../../secret.env")
    with pytest.raises(KavaError, match=rf"{place.name} is a symbolic link out of"):
        other.kava("store", "import", str(received))
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(KavaError, match=rf"{place.name} cannot be read: expected a file, found"):
        other.kava("store", "import", str(received))
    assert not list(other.data().glob("*/*"))


def test_a_model_is_not_copied_through_the_link_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/notes.txt").write_text("PASSWORD=hunter2", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/adapter").symlink_to(tmp_path / "private")
    with pytest.raises(KavaError, match=r"notes.txt is a symbolic link out of its folder"):
        copy_model(tmp_path / "model", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_teacher_in_the_cache_of_the_hub_is_taken(
    made: Team, received: Path, other: Team, tmp_path: Path
) -> None:
    hub = tmp_path / "models--team--teacher"
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for file in (received / "teacher").iterdir():
        content = hub / "blobs" / file_digest(file)
        file.rename(content)
        (snapshot / file.name).symlink_to(Path("../../blobs", content.name))
    other.kava("store", "import", str(received / "store"), "--teacher", str(snapshot))
    assert digest(other.data("teacher")) == digest(made.data("teacher"))


def test_a_pipeline_that_would_not_read_it_imports_nothing(
    made: Team, received: Path, tmp_path: Path
) -> None:
    with pytest.raises(KavaError, match="makes its own targets"):
        made.kava("store", "import", str(received))
    elsewhere = {"imports": {"targets": "x"}, "students": {"kava": KAVA}}
    with pytest.raises(KavaError, match="reads its targets where `imports` says"):
        Team(tmp_path / "c", elsewhere).kava("store", "import", str(received))


def test_an_address_that_is_none_is_refused(other: Team) -> None:
    for address in ("hf://", "hf://models/x", "hf://owner/name", "hf://datasets/owner/a/b"):
        with pytest.raises(KavaError, match="expected hf://datasets/OWNER/NAME"):
            other.kava("store", "import", address)


def test_imports_in_the_settings_are_read_in_place(
    made: Team, received: Path, tmp_path: Path
) -> None:
    places = {"targets": "../received/store", "teacher": str(received / "teacher")}
    team = Team(tmp_path / "b", {"imports": places, "students": {"kava": KAVA}})
    team.kava("distill", "kava")
    assert same_student(made, team)
    team.kava("check")


def test_the_ways_of_the_page_lead_there(
    made: Team, received: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    ways = page[page.index("## Team B: students alone") :].partition("\n## ")[0]
    blocks = re.findall(r"```(yaml)?\n(.*?)```", ways, re.S)
    settings: dict[str, Any] = {}
    for number, (kind, text) in enumerate(blocks):
        if kind:
            settings = yaml.safe_load(text)["pipelines"]["ours"]
            settings["students"]["kava"] = KAVA
            continue
        team = Team(tmp_path / f"b{number}", settings)
        monkeypatch.chdir(team.path)
        for line in text.replace("EXPORT", str(received)).splitlines():
            team.kava(*line.partition("#")[0].split()[1:])
        assert same_student(made, team)
    assert len(blocks) == 5


def test_headings_of_the_page_are_told_apart() -> None:
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    headings = re.findall(r"^(#+ [^:\n]+)", page, re.M)
    assert headings.count("## Team A") == headings.count("## Team B") == 1


def test_what_is_not_there_is_named(other: Team) -> None:
    with pytest.raises(KavaError, match=r"kv_targets is no folder.*Set imports\.targets"):
        other.kava("distill", "kava")
    for stage in ("prepare", "evaluate", "report"):
        with pytest.raises(KavaError, match="has no problems"):
            other.kava(stage)
    for stage in ("teacher", "generate", "evict", "fidelity", "plan"):
        with pytest.raises(KavaError, match="imports its targets"):
            other.kava(stage)


def test_a_pipeline_that_makes_its_targets_takes_no_others(made: Team, received: Path) -> None:
    with pytest.raises(KavaError, match="makes its own targets and teacher"):
        made.kava("distill", "kava", "--targets", str(received / "store"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"students": {"no-cot": NO_COT}}, r"students\.no-cot\.reads: problems, and a targets"),
        ({"students": {"kava": KAVA}, "imports": {}, "evict": {"budget": 2}}, "evict: means noth"),
        ({"students": {"kava": KAVA}, "evaluate": {"limit": 3}}, "there are no problems to ask"),
        ({"students": {"kava": KAVA}, "resources": {"workers": 2}}, r"resources\.workers"),
        ({"students": {"kava": KAVA}, "imports": {"problems": "x"}}, "no such setting"),
    ],
)
def test_settings_that_mean_nothing_are_errors(
    tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    team = Team(tmp_path, settings)
    with pytest.raises(KavaError, match=said):
        load_any_pipeline(team.path / "pipelines.yaml")


def test_a_pipeline_that_makes_targets_is_read_as_before(tmp_path: Path) -> None:
    file = Team(tmp_path, MAKING).path / "pipelines.yaml"
    assert load_any_pipeline(file) == load_pipeline(file)


def stages_of(team: Team) -> dict[str, object]:
    _, settings = load_any_pipeline(team.path / "pipelines.yaml")
    assert isinstance(settings, Imported)
    for path, text in project_files({"ours": settings}).items():
        (team.path / path).parent.mkdir(parents=True, exist_ok=True)
        (team.path / path).write_text(text, encoding="utf-8")
    text = (team.path / "pipelines/ours/dvc.yaml").read_text("utf-8")
    found: dict[str, object] = yaml.safe_load(text)["stages"]
    return found


def test_dvc_is_told_of_students_and_of_what_they_import(other: Team) -> None:
    assert stages_of(other) == {
        "distill": {
            "foreach": "${pipelines.ours.students}",
            "do": {
                "wdir": "../..",
                "cmd": "kava distill ${key} --pipeline ours",
                "deps": ["data/ours/${item.reads}", "data/ours/teacher"],
                "params": [
                    {"pipelines.yaml": ["pipelines.ours.students.${key}"]},
                    {"pipelines/versions.yaml": ["distill"]},
                ],
                "outs": ["data/ours/students/${key}", "data/ours/curves/students/${key}"],
            },
        }
    }


def test_dvc_follows_the_settings_imports(received: Path, other: Team) -> None:
    places = {"targets": "../received/store", "teacher": "../received/teacher"}
    plain = {"imports": places, "prepare": PREPARE, "students": {"kava": KAVA, "no-cot": NO_COT}}
    other.write({"imports": places, "students": {"kava": KAVA}})
    assert "../received/store" in yaml.safe_dump(stages_of(other))
    _, moved = load_any_pipeline(Team(other.path.with_name("c"), plain).path / "pipelines.yaml")
    with pytest.raises(KavaError, match="Run `kava sync`"):
        check_tracked(other.path, "ours", moved, "distill")
    # What DVC follows is what is read: another place by an option would deceive it.
    with pytest.raises(KavaError, match="Run `kava sync`"):
        other.kava("distill", "kava", "--targets", str(received))
    other.write(plain)
    assert list(stages_of(other)) == ["prepare", "distill", "evaluate", "report"]
    asked = {"data/ours/problems", "data/ours/test_sets"}  # by either split
    assert asked <= {*stages_of(other)["evaluate"]["deps"]}


def test_problems_of_ones_own_are_asked_and_reported(
    made: Team, received: Path, other: Team
) -> None:
    own = {**PREPARE, "seed": 5}
    students = {"kava": KAVA, "no-cot": NO_COT}
    sections = {"prepare": own, "students": students, "evaluate": MAKING["evaluate"]}
    other.write(sections)
    other.kava("store", "import", str(received))
    for stage in (["prepare"], ["distill", "kava"], ["distill", "no-cot"], ["evaluate"]):
        other.kava(*stage)
    other.kava("report")
    page = other.data("report/index.html").read_text(encoding="utf-8")
    assert "kava distill kava" in page and "kava generate" not in page
    assert same_student(made, other)
