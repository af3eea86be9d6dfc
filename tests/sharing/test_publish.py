"""What is published can be loaded, says what it is worth, and holds no secret."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load

from kava_core import LatentReasoner
from kava_core.artefacts import read_json, write_json
from kava_core.errors import KavaError
from kava_core.findings.latents import InterventionScores
from kava_core.models.adapted import Base
from kava_core.models.loading import model_fingerprint
from kava_core.serving.served import open_served
from kava_core.settings.student import Curriculum
from kava_core.sharing.hub import Repository, download, upload
from kava_core.sharing.student import _changed_table, _curriculum
from kava_core.store import TargetsStore
from kava_core.store.export import check_limits, check_secrets
from stages.cli import kava
from tests.sharing.conftest import KAVA, MAKING, Team
from tests.sharing.fake_hub import FakeHub
from tests.stages.project import ROOT

TOKEN = f"hf_{'x' * 34}"


def publish(team: Team, hub: FakeHub, *command: str) -> str:
    """`kava publish …` as somebody does who is logged in at this Hub; what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    places = ["--pipelines", team.path / "pipelines.yaml", "--data", team.path / "data"]
    done = subprocess.run(
        [sys.executable, "-m", "stages", "publish", *command, *map(str, places)],
        cwd=ROOT,
        env={**environment, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def test_a_student_is_a_folder_that_loads(made: Team, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    made.kava("publish", "student", "kava", str(folder), "--license", "apache-2.0")
    student = LatentReasoner.from_pretrained(folder)
    assert student.config.latents == 3
    kept = {path.name for path in folder.rglob("*") if path.is_file()}
    assert kept == {"README.md"} | {
        path.name for path in made.data("students/kava").rglob("*") if path.is_file()
    }
    front = metadata_load(folder / "README.md")
    assert front is not None
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0"


def test_its_card_says_what_it_is_worth(made: Team, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    made.kava("publish", "student", "kava", str(folder), "--data-license", "cc0-1.0")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for said in (
        "reasons in 3 latent tokens (1 Jacobi iterations",
        "| loss | 1 × answer, 1 × KV cache (KaVa) |",
        "| licence of the data | cc0-1.0 |",
        "| base model | none: from random weights |",
        "| budget | 3 slots per layer and head, chosen by each head |",
        '"name": "rkv"',
        "custom_generate=folder, trust_remote_code=True",
    ):
        assert said in card, said
    scores = read_json(made.data("evaluation/metrics.json"))
    (systems,) = scores.values()
    rows = {
        "teacher, writing its chain": "teacher-cot",
        "**kava**": "kava",
        "no-cot: No-CoT, 2 steps": "no-cot",
        "teacher, asked at once": "teacher-no-cot",
    }
    for row, name in rows.items():
        low, high = systems[name]["ci95"]
        shown = f"| {row} | {systems[name]['exact_match']:.1f} ({low:.1f} to {high:.1f}) |"
        assert shown in card, shown
    assert re.search(r"Against no-cot, on the same problems: [+-]\d", card)
    insight = read_json(made.data("evaluation/interpretability.json"))["kava"]
    zeroed = insight["interventions"]["together"]["removed"]
    low, high = zeroed["ci95"]
    shown = f"{zeroed['exact_match']:.1f} ({low:.1f} to {high:.1f}) | {zeroed['changed']:.1f} |"
    assert f"| set to zero | {shown}" in card


def test_a_card_says_so_where_nobody_measured_or_compared(made: Team, tmp_path: Path) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    for name in ("students", "kv_targets", "teacher"):
        shutil.copytree(made.data(name), team.data(name))
    team.kava("publish", "student", "kava", str(tmp_path / "one"))
    card = (tmp_path / "one/README.md").read_text(encoding="utf-8")
    assert "Nobody has measured it" in card and "Nobody has looked" in card
    assert "| data | not known here |" in card
    shutil.copytree(made.data("evaluation"), team.data("evaluation"))
    team.kava("publish", "student", "kava", str(tmp_path / "two"))
    card = (tmp_path / "two/README.md").read_text(encoding="utf-8")
    assert "No student without latents was trained beside it" in card


def test_what_an_imported_store_said_of_its_data_is_passed_on(
    received: Path, other: Team, tmp_path: Path
) -> None:
    other.kava("store", "import", str(received))
    other.kava("distill", "kava")
    other.kava("publish", "student", "kava", str(tmp_path / "hub"))
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    assert "| licence of the data | cc0-1.0 |" in card and "| data | synthetic" in card


def test_latents_that_carry_nothing_are_said_to() -> None:
    same = {"difference": 0.0, "ci95": [-1.0, 1.0], "p_value": 1.0}
    changed = {"exact_match": 40.0, "ci95": [30.0, 50.0], "difference": same, "changed": 1.0}
    everything = {"removed": changed, "mean": changed, "shuffled": None, "donor": None}
    alone = {"removed": [changed], "mean": [changed], "donor": None}
    plain = {"n": 9, "none": 40.0, "ci95": [30.0, 50.0], "iterations": []}
    inert = {**plain, "together": everything, "alone": alone}
    assert "they carry nothing for it" in _changed_table(InterventionScores.model_validate(inert))
    telling = {**everything, "mean": {**changed, "changed": 60.0}}
    said = _changed_table(InterventionScores.model_validate({**inert, "together": telling}))
    assert "It answers otherwise with its latents set to their mean over the problems." in said


def test_a_card_says_which_curriculum_taught() -> None:
    found = _curriculum(Curriculum(latents_per_step=2, epochs=3))
    assert [name for name, _ in found] == ["curriculum"] and not _curriculum(None)
    assert "with every 3 epochs one written step more gives way to 2 latents" in found[0][1]


def test_a_student_of_other_targets_is_refused(made: Team, tmp_path: Path) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    for name in ("students", "kv_targets", "teacher"):
        shutil.copytree(made.data(name), team.data(name))
    about = read_json(team.data("students/kava/student.json"))
    about["fingerprints"]["kv_targets"] = "0" * 64
    team.data("students/kava/student.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(KavaError, match=r"was made from the targets 000000000000"):
        team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    with pytest.raises(KavaError, match="has no student 'x'"):
        team.kava("publish", "student", "x", str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


def test_what_was_measured_of_other_weights_is_not_said_of_it(made: Team, tmp_path: Path) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    for name in ("students", "kv_targets", "teacher", "evaluation"):
        shutil.copytree(made.data(name), team.data(name))
    weights = team.data("students/kava/latents.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(KavaError, match=r"measured another student kava .* Run `kava evaluate`"):
        team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


def test_a_secret_is_not_published(made: Team, tmp_path: Path) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    shutil.copytree(made.data("students"), team.data("students"))
    secret = f"hf_{'a' * 34}"
    about = read_json(team.data("students/kava/student.json"))
    about["commit"] = f"https://me:{secret}@example.org"
    team.data("students/kava/student.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(KavaError, match=r"student\.json holds what looks like a secret") as error:
        team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    assert secret not in str(error.value)
    assert not (tmp_path / "hub").exists()
    # What does not belong to a model stays at home.
    (team.data("students/kava/student.json")).write_text(
        made.data("students/kava/student.json").read_text("utf-8"), encoding="utf-8"
    )
    (team.data("students/kava") / ".env").write_text(secret, encoding="utf-8")
    team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    assert not (tmp_path / "hub/.env").exists()


@pytest.mark.parametrize(
    "text",
    [f"hf_{'b' * 34}", "AKIA" + "B" * 16, "-----BEGIN RSA PRIVATE KEY-----", "s3://a:b@c/d"],
)
def test_secrets_of_every_kind_are_seen(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    check_secrets(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"x": text}), encoding="utf-8")
    with pytest.raises(KavaError, match=r"a\.json holds what looks like a secret"):
        check_secrets(tmp_path)


def test_uploads_send_the_folder_and_nothing_else(made: Team, hub: FakeHub, tmp_path: Path) -> None:
    said = publish(made, hub, "student", "kava", "hf://somebody/something")
    assert "published: " in said and TOKEN not in said, said
    made.kava("publish", "student", "kava", str(tmp_path / "hub"))
    local = {str(f.relative_to(tmp_path / "hub")) for f in (tmp_path / "hub").rglob("*.*")}
    assert set(hub.files) == local
    for name, content in hub.files.items():
        assert content == (tmp_path / "hub" / name).read_bytes()
    (request,) = hub.made
    assert request["name"] == "something" and request["organization"] == "somebody"
    assert request["visibility"] == "private"
    assert not any(TOKEN.encode() in content for content in hub.files.values())
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_store_is_uploaded_as_a_dataset(made: Team, hub: FakeHub, tmp_path: Path) -> None:
    options = ["--with-teacher", "--license", "mit", "--public"]
    said = publish(made, hub, "store", "hf://datasets/somebody/something", *options)
    assert "published: " in said, said
    (request,) = hub.made
    assert request["type"] == "dataset" and request["visibility"] == "public"
    assert all("/models/" not in path for path in hub.paths)
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert len(TargetsStore.open(tmp_path / "store")) == 24
    assert (tmp_path / "teacher/teacher.json").is_file()


def test_what_the_hub_refuses_is_a_sentence(made: Team, hub: FakeHub, tmp_path: Path) -> None:
    hub.refuses = True
    said = publish(made, hub, "student", "kava", "hf://somebody/something")
    assert re.fullmatch(r"error: .* cannot be published: .*Log in with `hf auth login`.*\n", said)
    with pytest.raises(KavaError, match="expected hf://OWNER/NAME"):
        made.kava("publish", "student", "kava", "hf://datasets/somebody/something")
    with pytest.raises(KavaError, match="expected hf://datasets/OWNER/NAME"):
        made.kava("publish", "store", "hf://somebody/something")
    with pytest.raises(KavaError, match="belongs to an upload"):
        made.kava("publish", "store", str(tmp_path / "x"), "--public")
    with pytest.raises(KavaError, match="without a revision"):
        upload(tmp_path, Repository.parse("hf://a/b@main", "model"), public=False)


def test_what_cannot_be_fetched_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KavaError, match=r"cannot be fetched .*hf download a/b --repo-type dataset"):
        download(Repository.parse("hf://datasets/a/b@v1", "dataset"), tmp_path / "x")


def test_what_the_hub_does_not_take_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    for name in "abc":
        (tmp_path / "store" / name).write_bytes(b"x" * 100)
    check_limits(tmp_path)
    monkeypatch.setattr("kava_core.store.export.LARGEST_FILE", 99)
    with pytest.raises(KavaError, match=r"store/[abc] has .* GB"):
        check_limits(tmp_path)
    monkeypatch.setattr("kava_core.store.export.MOST_FILES", 3)
    with pytest.raises(KavaError, match="store/ would have 3 files"):
        check_limits(tmp_path)


@pytest.fixture(scope="module")
def adapted(made: Team, tmp_path_factory: pytest.TempPathFactory) -> Team:
    """Team A, whose student is kept as adapters on the teacher."""
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "save": "adapter"}
    student = {**KAVA, "training": {**KAVA["training"], "lora": lora}}
    team = Team(tmp_path_factory.mktemp("adapted") / "a", {**MAKING, "students": {"kava": student}})
    for name in ("problems", "kv_targets", "teacher"):
        shutil.copytree(made.data(name), team.data(name))
    team.kava("distill", "kava")
    return team


def test_a_student_of_adapters_is_loaded_elsewhere_as_its_card_says(
    adapted: Team, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = publish(adapted, hub, "student", "kava", "hf://somebody/something")
    assert "published: " in said and "kept as adapters on " in said, said
    assert "nobody can load it without that model" in " ".join(said.split())
    folder, base = tmp_path / "elsewhere/student", tmp_path / "elsewhere/base"
    for name, content in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    shutil.copytree(adapted.data("teacher"), base)
    expected = LatentReasoner.from_pretrained(adapted.data("students/kava"))
    monkeypatch.chdir(tmp_path)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert model_fingerprint(str(base)) in card and str(adapted.path) not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for place, path in (("THIS_FOLDER", folder), ("THE_BASE", base)):
        assert f"PATH_OF_{place}" in code
        code = code.replace(f"PATH_OF_{place}", str(path))
    names: dict[str, Any] = {}
    exec(code, names)
    ids = torch.tensor([[9, 10, 11]])
    assert torch.equal(names["student"].generate(ids), expected.generate(ids))
    asked = ["ask", str(folder), "how many ?", "--json"]
    with pytest.raises(KavaError, match=r"give it as their base \(--base\)"):
        kava.main(asked, standalone_mode=False)
    kava.main([*asked, "--base", str(base)], standalone_mode=False)
    with pytest.raises(KavaError, match=r"belong on the model"):
        open_served(folder)
    assert open_served(folder, str(base)).kind == "student"


def test_a_base_of_the_hub_is_named_with_its_commit(adapted: Team, tmp_path: Path) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    for name in ("students", "kv_targets", "teacher"):
        shutil.copytree(adapted.data(name), team.data(name))
    file = team.data("students/kava/adapter")
    Base(model="team/base", commit="c" * 40, fingerprint=Base.read(file).fingerprint).write(file)
    team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    assert f"`team/base` of the Hub, at the commit {'c' * 40}" in card
    assert '"PATH_OF_THIS_FOLDER", base="team/base")' in card


def test_paths_of_this_machine_are_not_told(
    adapted: Team, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "/home/alice/secret-project/llama"
    team = Team(tmp_path / "a", {"students": {"kava": {**KAVA, "model": secret}}})
    for name in ("students", "kv_targets", "teacher"):
        shutil.copytree(adapted.data(name), team.data(name))
    student = team.data("students/kava")
    about = read_json(student / "student.json")
    about["settings"]["model"] = secret
    write_json(student / "student.json", about)
    team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    assert '"model": "llama"' in (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    assert not [f for f in (tmp_path / "hub").rglob("*.*") if b"secret-project" in f.read_bytes()]
    told = read_json(tmp_path / "hub/student.json")
    assert told["settings"].pop("model") == "llama" and about["settings"].pop("model") == secret
    assert told == about
    # Where the base of adapters lies is read again by whoever loads them.
    Base(model=secret, commit=None, fingerprint="0").write(student / "adapter")
    capsys.readouterr()
    team.kava("publish", "student", "kava", str(tmp_path / "hub-2"))
    said = " ".join(capsys.readouterr().err.split())
    assert f"adapter of {student} tells {secret}, a path of this machine" in said
    assert "secret-project" not in (tmp_path / "hub-2/README.md").read_text(encoding="utf-8")
    about = read_json(team.data("teacher/teacher.json"))
    about["settings"]["model"] = secret
    write_json(team.data("teacher/teacher.json"), about)
    team.kava("publish", "store", str(tmp_path / "store"), "--with-teacher")
    said = " ".join(capsys.readouterr().err.split())
    assert f"teacher.json of {team.data('teacher')} tells {secret}, a path" in said
    assert "secret-project" not in (tmp_path / "store/README.md").read_text(encoding="utf-8")
