"""`kava traces`: the teacher's own chains, on the way to all that is taught."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.loading import save_model
from kava_core.problems.folder import open_problems, write_problems
from kava_core.sharing.describe import describe
from kava_core.store import TargetsStore
from stages.cli import kava
from tests.targets.test_traces import DRAWN, SPLITS, TOKENIZER, teacher

__all__ = ["teacher"]  # a fixture
TRAINING = {"steps": 2, "batch_size": 4, "threads": 1}
SMALL = {
    "prepare": {"source": "synthetic", "train": 12, "validation": 2, "test": 1},
    "teacher": {"training": TRAINING},
    "generate": {},
    "evict": {"budget": 2},
    "students": {
        "latent": {"reads": "kv_targets", "alpha_kv": 1.0, "training": TRAINING},
        "no-cot": {"reads": "problems", "w_cot": 1.0, "training": TRAINING},
    },
    "evaluate": {},
    "report": {"title": "Small"},
    "resources": {"workers": 0},
}


@pytest.fixture
def home(tmp_path: Path, teacher: PreTrainedModel) -> Path:
    """A pipeline `small` up to its teacher."""
    write_problems(tmp_path / "data/small/problems", SPLITS, "equations", {})
    save_model(tmp_path / "data/small/teacher", teacher, TOKENIZER)
    return tmp_path


def run(home: Path, *commands: str, **sections: object) -> str:
    document = {"pipeline": "small", "pipelines": {"small": {**SMALL, **sections}}}
    (home / "pipelines.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    paths = ["--pipelines", str(home / "pipelines.yaml"), "--data", str(home / "data")]
    runner = CliRunner(catch_exceptions=False)
    return "".join(runner.invoke(kava, [*each.split(), *paths]).output for each in commands)


@pytest.mark.parametrize("keep", ["caches", "targets"])
def test_all_students_learn_from_the_same_chains(home: Path, keep: str) -> None:
    evict = ["evict"] if keep == "caches" else []
    stages = ["traces", "generate", *evict, "distill latent", "distill no-cot"]
    run(home, *stages, traces=DRAWN.model_dump(), generate={"keep": keep})
    kept = open_problems(home / "data/small/traces")
    assert len(kept.load("train")) > 0
    store = TargetsStore.open(home / "data/small/kv_targets")
    names = [store.index.record(i).id for i in range(len(store))]
    assert names == [problem.id for problem in kept.load("train")]
    about = json.loads((home / "data/small/students/no-cot/student.json").read_text())
    assert about["fingerprints"]["problems"] == kept.fingerprint("train")
    assert store.manifest.fingerprints["problems"] == kept.fingerprint("train")


def test_a_store_of_them_says_whose_chains_they_are(home: Path) -> None:
    run(home, "traces", "generate", "evict", traces=DRAWN.model_dump())
    store, problems = home / "data/small/kv_targets", home / "data/small/problems"
    data = describe(store, teacher=None, problems=problems, licence="mit").data
    metrics = json.loads((home / "data/small/traces/metrics.json").read_text())
    assert data is not None and data.licence == "mit"
    assert data.problems == metrics["train"]["problems"]
    written = sum(metrics["chains"].values())
    assert data.written == f"written by the teacher, {metrics['chains']['kept']} of {written} kept"
    # Other problems than those that the teacher wrote for are not what the store was made from.
    fewer = dataclasses.replace(SPLITS, train=SPLITS.train[1:])
    write_problems(problems, fewer, "equations", {})
    assert describe(store, teacher=None, problems=problems, licence=None).data is None


def test_without_the_section_there_is_no_such_stage(home: Path) -> None:
    with pytest.raises(KavaError, match="pipeline small has no section `traces`"):
        run(home, "traces")
    run(home, "generate", "evict", "distill no-cot")
    about = json.loads((home / "data/small/students/no-cot/student.json").read_text())
    given = open_problems(home / "data/small/problems").fingerprint("train")
    assert about["fingerprints"]["problems"] == given


def test_chains_that_are_not_written_yet_are_named(home: Path) -> None:
    for command in ("generate", "distill no-cot"):
        with pytest.raises(KavaError, match=r"traces is missing\. Run `kava traces "):
            run(home, command, traces={})
