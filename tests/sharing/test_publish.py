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
from kava_core.evaluation.questions import Respondents
from kava_core.findings.latents import InterventionScores
from kava_core.models.adapted import Base
from kava_core.models.loading import model_fingerprint
from kava_core.serving.served import open_served
from kava_core.settings.student import Curriculum
from kava_core.sharing.hub import Repository, download, upload
from kava_core.sharing.snippet import QUESTION
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
    places = ["--pipelines", team.path / "pipelines.yaml", "--data", team.path / "data"]
    return at(hub, "-m", "stages", "publish", *command, *map(str, places))


def at(hub: FakeHub, *command: str, **variables: str) -> str:
    """What Python prints with this Hub in the place of the real one."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, **variables},
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
    [
        f"hf_{'b' * 34}",
        *(f"gh{kind}_{'a1B2' * 9}" for kind in "opsur"),
        "github_pat_" + "A1b2C3" * 12,
        "glpat-" + "abcdefghij0123456789",
        f"sk-{'a1B2' * 12}",
        "sk-proj-" + "aB3_dE-fG" * 8,
        "see:\nsk-ant-api03-" + "aB3dEfG9" * 10,
        "xoxb-" + "1234567890-abcdefghijkl",
        "AIza" + "B" * 35,
        "AKIA" + "B" * 16,
        "ASIA" + "B" * 16,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
        "-----BEGIN RSA PRIVATE KEY-----",
        "s3://a:b@c/d",
        "postgres://u:p%40w@h/d",
        "redis://:hidden@h/0",
        "https://ab12cd34ef56@example.org/x",
        "https://example.org/d?token=abcdef123456",
        "https://example.org/d?a=b&X-Amz-Signature=0a1b2c3d4e5f",
        "https://example.org/d?sig=a%2Bb1c2d3e4%3D",
    ],
)
def test_secrets_of_every_kind_are_seen(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    check_secrets(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"x": text}), encoding="utf-8")
    with pytest.raises(KavaError, match=r"a\.json holds what looks like a secret"):
        check_secrets(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "Natalia sold 48 / 2 = <<48/2=24>>24 clips in May; at $1.50 that is $36. A task-oriented "
        "risk-averse-and-very-careful-shopper-of-2024 pays 3:15 with a 10% token.",
        "d41d8cd98f00b204e9800998ecf8427e " + "0123456789abcdef" * 4,
        "task-specific-distillation-of-language-models-2024-part-1.safetensors",
        "xoxo-kisses-and-hugs glass-transition-temperature-of-2-polymers EURASIA" + "B" * 16,
        "https://example.org/a?page=2&mail=a@b.org https://medium.com/@somebody/post-1234567890",
        "git+https://git@github.com/a/b git@github.com:a/b ann@example.org s3://bucket/a@b",
        "https://example.org/?token=YOUR_TOKEN https://example.org/?token={token}&num_tokens=64",
        "http://localhost:8000/v1/completions hf://datasets/OWNER/NAME@main hf_hub_download",
        '{"max_token": 12345678, "eos_token": "<|im_end|>", "eyJ": 7, "AIza": 8}',
    ],
)
def test_ordinary_text_is_no_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"x": text}), encoding="utf-8")
    (tmp_path / "b.md").write_text(text, encoding="utf-8")
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


def test_a_public_repository_is_refused_unless_public_is_meant(
    hub: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    hub.private, hub.files = False, {"old.txt": b"old"}
    program = f"""
from pathlib import Path
from kava_core.errors import KavaError
from kava_core.sharing.hub import Repository, upload
for public in (False, True):
    try:
        repository = Repository("somebody/something", "model")
        print(upload(Path({str(tmp_path)!r}), repository, public=public))
    except KavaError as error:
        print(error)
"""
    refused, address = at(hub, "-c", program).splitlines()
    assert refused.startswith("expected somebody/something to be private, and it is public already")
    assert "--public" in refused and address == f"{hub.address}/somebody/something"
    assert hub.files == {"a.txt": b"a"}


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


def test_only_the_code_that_thinks_goes_along_and_no_link_out_of_the_folder(
    made: Team, tmp_path: Path
) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    shutil.copytree(made.data("students"), team.data("students"))
    code = team.data("students/kava/custom_generate")
    (tmp_path / "notes.py").write_text("mine", encoding="utf-8")
    (code / "notes.py").symlink_to(tmp_path / "notes.py")
    team.kava("publish", "student", "kava", str(tmp_path / "hub"))
    assert [f.name for f in (tmp_path / "hub/custom_generate").iterdir()] == ["generate.py"]
    (code / "generate.py").unlink()
    (code / "generate.py").symlink_to(tmp_path / "notes.py")
    with pytest.raises(KavaError, match=r"generate\.py is a symbolic link out of its folder"):
        team.kava("publish", "student", "kava", str(tmp_path / "hub-2"))
    assert not (tmp_path / "hub-2").exists()


def test_the_base_of_a_student_with_a_model_of_its_own_is_that_model(
    made: Team, tmp_path: Path
) -> None:
    team = Team(tmp_path / "a", {"students": {"kava": KAVA}})
    for name in ("students", "teacher"):
        shutil.copytree(made.data(name), team.data(name))
    teacher, student = (
        read_json(team.data(name))
        for name in ("teacher/teacher.json", "students/kava/student.json")
    )
    teacher["settings"]["model"], teacher["commit"] = "team/teacher", "a" * 40
    write_json(team.data("teacher/teacher.json"), teacher)

    def published(model: str | None, commit: str | None, name: str) -> tuple[Any, str]:
        settings = {**student["settings"], "model": model}
        about = {**student, "settings": settings, "commit": commit}
        write_json(team.data("students/kava/student.json"), about)
        team.kava("publish", "student", "kava", str(tmp_path / name))
        front = metadata_load(tmp_path / name / "README.md") or {}
        return front.get("base_model"), (tmp_path / name / "README.md").read_text(encoding="utf-8")

    base, card = published(None, None, "as-the-teacher")
    assert base == "team/teacher" and "the student began as" not in card
    base, card = published("team/student", "b" * 40, "own")
    assert (
        base == "team/student" and f"| the student began as | team/student ({'b' * 40}) |" in card
    )
    base, card = published("/home/ann/llama", None, "folder")
    assert base is None and "| the student began as | llama |" in card


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
    # A whole student was there before.
    before = {".gitattributes": b"* text", "custom_generate/generate.py": b"", "old/a.json": b""}
    hub.private, hub.files = True, {**before, "model.safetensors": b"of another student"}
    said = publish(adapted, hub, "student", "kava", "hf://somebody/something")
    assert "published: " in said and "kept as adapters on " in said, said
    assert hub.files.pop(".gitattributes") == b"* text"
    made_here = adapted.data("students/kava")
    kept = {str(f.relative_to(made_here)) for f in made_here.rglob("*") if f.is_file()}
    assert set(hub.files) == kept | {"README.md"}
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
    encoder = Respondents.of(folder, steps=False, teacher=None, base=str(base)).encoder
    put = torch.tensor(encoder.encode_questions([QUESTION]))
    assert torch.equal(names["written"], expected.generate(put))
    program = f"""
import torch
from kava_core import LatentReasoner
student = LatentReasoner.from_pretrained("somebody/something", base={str(base)!r})
print(student.generate(torch.tensor({ids.tolist()})).tolist())
"""
    told = at(hub, "-c", program, HF_HOME=str(tmp_path / "home"))
    assert told.splitlines()[-1] == str(expected.generate(ids).tolist()), told
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
    assert 'from_pretrained(folder, base="team/base")' in card


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
