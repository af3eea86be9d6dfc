"""docs/scars.md names tests that exist, and those of them that stand nowhere else."""

from __future__ import annotations

import ast
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kava_core.models.teacher_pass import TeacherPass
from kava_core.store import TargetsStore
from stages.cli import kava
from tests.faults.conftest import Tell
from tests.stages.project import ROOT, digest
from tests.store.make import make_targets_store
from tests.targets.test_build import SIZES, Job, build
from tests.tiny import tiny_model, tiny_trace

PAGE = (ROOT / "docs" / "scars.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")][2:]


def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_every_test_that_the_page_names_exists(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named and re.search(r"\]\(https://github\.com/[\w./-]+\)", row)
    assert row.count("::") == len(named), "a name that is none"
    for file, name in named:
        assert name in functions_in(ROOT / file), f"{file} has no {name}"


def test_a_second_call_knows_nothing_of_the_first() -> None:
    """To the last bit, whatever was asked before: shorter, longer, and in another order."""
    traces = [tiny_trace(str(i), 5 + i, 4 + 2 * i, 2, seed=i) for i in range(4)]
    fresh = TeacherPass(tiny_model("llama"))(traces)
    used = TeacherPass(tiny_model("llama"))
    for before in (traces[::-1], traces[:1], [tiny_trace("long", 40, 60, 3)]):
        used(before)
    again = used(traces)
    for name in ("keys", "values", "importance", "endpoint", "offsets"):
        assert torch.equal(getattr(again, name), getattr(fresh, name)), name


def test_whatever_reads_a_store_leaves_it_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "data" / "p" / "kv_targets"
    make_targets_store(store, sizes=(2,) * 40)
    before = digest(store)
    opened = TargetsStore.open(store)
    for row in range(len(opened)):
        opened.batch([row])
    monkeypatch.chdir(tmp_path)
    for command in (
        ["store", "inspect", str(store)],
        ["store", "verify", "--full", str(store)],
        ["store", "export", str(store), str(tmp_path / "exported")],
        ["clean", "--yes"],
    ):
        result = CliRunner().invoke(kava, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert digest(store) == before


def die_before_rename(at: int) -> None:
    """This process kills itself before its `at`-th rename from now."""
    left, replace = at, os.replace

    def dying(source: str, target: str, **more: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **more)

    os.replace = os.rename = dying  # type: ignore[assignment]


def test_a_kill_between_a_shard_and_its_note_stores_no_record_twice(
    tmp_path: Path, tell: Tell
) -> None:
    """Killed before each rename of each shard, a worker leaves a store that has every id once."""
    whole = build(Job(tmp_path / "whole")).manifest
    renames = 0
    for at in range(20):
        work = tmp_path / str(at)
        pid = os.fork()
        if pid == 0:
            die_before_rename(at)
            build(Job(work))
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert build(Job(work)).manifest == whole
        ids = TargetsStore.open(work).index.column("id").tolist()
        assert len(ids) == len(set(ids)) == sum(SIZES)
        if status == 0:
            break
        renames += 1
        tell("a worker killed", "before it renames a shard or its note", "every record once")
    assert renames >= 2 * len(SIZES)
