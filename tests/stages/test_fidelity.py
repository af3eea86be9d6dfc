"""`kava fidelity` as a person runs it: files, resuming after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import yaml

from kava_core.errors import KavaError
from kava_core.models.loading import build_llama, save_model
from kava_core.problems.folder import open_problems
from kava_core.problems.tokenizer import train_tokenizer
from stages.fidelity import fidelity
from stages.prepare import prepare
from tests.stages.project import ROOT, digest

GRID = {
    "limit": 12,
    "policies": ["rkv", {"name": "rkv", "lambda": 1.0}, "random"],
    "budgets": [8, 2],
    "bits": [32, {"keys": 8, "values": 4}],
    "batch_size": 4,
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with problems and a teacher that knows nothing."""
    home = tmp_path_factory.mktemp("fidelity")
    training = {"steps": 1, "learning_rate": 1.0e-3}
    pipeline = {
        "prepare": {"source": "synthetic", "train": 60, "validation": 16, "test": 2},
        "teacher": {"training": training},
        "generate": {},
        "evict": {"budget": 4},
        "fidelity": GRID,
        "students": {"kava": {"reads": "kv_targets", "training": training}},
        "evaluate": {},
        "report": {"title": "Tiny"},
        "resources": {"workers": 0},
    }
    (home / "pipelines.yaml").write_text(
        yaml.safe_dump({"pipeline": "tiny", "pipelines": {"tiny": pipeline}})
    )
    call(prepare, home)
    problems = open_problems(home / "data/tiny/problems").load("train")
    texts = [" ".join([p.question, *p.steps, "The answer is: ", p.answer]) for p in problems]
    tokenizer = train_tokenizer(texts, 300)
    model = build_llama(
        tokenizer,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        intermediate_size=48,
        context_length=256,
        rope_theta=10000.0,
        seed=0,
    )
    save_model(home / "data/tiny/teacher", model, tokenizer)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def call(command: click.Command, home: Path) -> None:
    command.main(
        ["--pipelines", str(home / "pipelines.yaml"), "--data", str(home / "data")],
        standalone_mode=False,
    )


def change(home: Path, **settings: Any) -> None:
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    document["pipelines"]["tiny"]["fidelity"].update(settings)
    file.write_text(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def expected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("expected") / "home"
    shutil.copytree(made, home)
    call(fidelity, home)
    return digest(home / "data/tiny/fidelity")


def test_every_cell_of_the_grid_is_answered_and_counted(
    home: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, str]
) -> None:
    call(fidelity, home)
    printed = capsys.readouterr()
    assert "Smallest budget within 2 points of the full cache" in printed.out
    assert "━" not in printed.err  # no progress bar where there is no terminal
    folder = home / "data/tiny/fidelity"
    assert digest(folder) == expected
    assert sorted(expected) == ["answers.parquet", "budgets.json", "metrics.json"]

    metrics = json.loads((folder / "metrics.json").read_text())
    policies = ["random", "rkv", "rkv lambda=1"]
    assert sorted(metrics["policies"]) == policies == sorted(metrics["recommended"])
    measured = json.loads((home / "data/tiny/measured/fidelity.json").read_text())
    assert measured["hardware"]["cores"]
    for policy in policies:
        for budget in ("2", "8"):
            assert sorted(metrics["policies"][policy][budget]) == ["32", "8/4"]
            for score in metrics["policies"][policy][budget].values():
                assert score["n"] == 12
                assert score["tokens_kept"] == int(budget)
            # 2 layers, 2 heads, D = 8: float32, and 8 and 4 bits with a scale and zero each
            assert metrics["policies"][policy][budget]["32"]["bytes_per_problem"] == (
                int(budget) * 4 * (32 + 32 + 4)
            )
            assert metrics["policies"][policy][budget]["8/4"]["bytes_per_problem"] == (
                int(budget) * 4 * (12 + 8 + 4)
            )
            assert measured["policies"][policy][budget]["32"]["seconds_per_problem"] > 0
    assert metrics["full"]["kl"] == 0 and metrics["none"]["tokens_kept"] == 0
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    assert len(rows) == 12 * (2 + 3 * 2 * 2)
    assert len({row["id"] for row in rows}) == 12
    assert {(row["keys_bits"], row["values_bits"]) for row in rows} == {
        (None, None),
        (32, 32),
        (8, 4),
    }


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_finds_the_same(
    home: Path, expected: dict[str, str], workers: int
) -> None:
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    document["pipelines"]["tiny"]["resources"] = {"workers": workers}
    file.write_text(yaml.safe_dump(document))
    call(fidelity, home)
    assert digest(home / "data/tiny/fidelity") == expected


def test_killed_with_sigkill_it_goes_on_and_redoes_nothing(
    home: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "fidelity"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def parts() -> dict[Path, int]:
        files = (home / "data/.work").glob("fidelity-*/batch-*.json")
        return {file: file.stat().st_mtime_ns for file in files}

    deadline = time.monotonic() + 120
    while len(parts()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = parts()
    assert not (home / "data/tiny/fidelity").exists()
    call(fidelity, home)
    assert f"{len(done)} of" in capsys.readouterr().err
    assert digest(home / "data/tiny/fidelity") == expected
    assert parts() == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policies": ["psychic"]}, "fidelity.policies.0"),
        ({"policies": [{"name": "rkv", "lambda": 2}]}, "fidelity.policies.0"),
        ({"policies": ["rkv", "rkv"]}, "policies must name at least one, and none twice"),
        (
            {"policies": [{"name": "crop", "first": 2}]},
            "fidelity.policies.0.first: no such setting",
        ),
        ({"budgets": [4, 0]}, "fidelity.budgets.1"),
        ({"budgets": []}, "budgets must name at least one"),
        ({"bits": [7]}, "fidelity.bits.0.keys"),
        ({"layers": [0, 5]}, "expected `layers` to hold integers from 0 to 1"),
        ({"share": "merged", "share_size": 3}, "expected groups of 1 to 2 layers"),
        ({"within": -1}, "fidelity.within"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_setting(
    home: Path, settings: dict[str, Any], said: str
) -> None:
    change(home, **settings)
    with pytest.raises(KavaError) as refused:
        call(fidelity, home)
    assert said in str(refused.value)


def test_missing_inputs_are_named(home: Path) -> None:
    shutil.rmtree(home / "data/tiny/problems")
    with pytest.raises(KavaError, match="problems"):
        call(fidelity, home)


def test_layers_sharing_and_pyramids_come_from_the_settings(home: Path) -> None:
    change(home, policies=["attention"], budgets=[4], bits=[16], budget_shape="pyramid", limit=4)
    kept = {}
    for name, settings in {
        "all": {},
        "last": {"layers": {"last": 1}},
        "merged": {"share": "merged"},
    }.items():
        change(home, **{"layers": "all", "share": "none", **settings})
        call(fidelity, home)
        metrics = json.loads((home / "data/tiny/fidelity/metrics.json").read_text())
        score = metrics["policies"]["attention"]["4"]["16"]
        kept[name] = score["tokens_kept"], score["bytes_per_problem"]
    slot = 2 * (16 + 16 + 4)  # two heads of 8 numbers
    # pyramid over two layers: 7 and 1 slots; the deepest alone, and a merged pair, have 4
    assert kept == {"all": (4, 8 * slot), "last": (2, 4 * slot), "merged": (4, 4 * slot)}
