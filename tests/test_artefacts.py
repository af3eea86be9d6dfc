"""Hashes name content, files appear whole, and working folders survive a kill."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.artefacts import (
    atomic_path,
    canonical_json,
    file_digest,
    fingerprint,
    folder_fingerprint,
    publish,
    read_json,
    work_folder,
    write_json,
)
from kava_core.errors import KavaError
from kava_core.versions import VERSIONS

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=VALUES)
def test_canonical_json_is_json_and_blind_to_order(value: Any) -> None:
    def reversed_keys(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: reversed_keys(x[key]) for key in reversed(list(x))}
        return [reversed_keys(y) for y in x] if isinstance(x, list) else x

    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(reversed_keys(value)) == text
    assert canonical_json(json.loads(text)) == text


def test_a_fingerprint_is_the_sha256_of_the_canonical_text() -> None:
    value = {"b": 1, "a": ["λ", 0.5]}
    expected = hashlib.sha256('{"a":["λ",0.5],"b":1}'.encode()).hexdigest()
    assert fingerprint(value) == expected
    assert fingerprint({**value, "b": 2}) != expected


def test_files_and_folders_are_named_by_what_they_hold(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 3_000_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"a" * 3_000_000).hexdigest()
    both = folder_fingerprint(tmp_path, ["a", "b"])
    assert both == folder_fingerprint(tmp_path, ["b", "a"])
    assert both != folder_fingerprint(tmp_path, ["a"])
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())
    (tmp_path / "b").write_bytes(content)
    assert both != folder_fingerprint(tmp_path, ["a", "b"])  # the names are part of it


def test_json_comes_back_and_what_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": ["λ"], "a": 0.1})
    assert read_json(path) == {"a": 0.1, "b": ["λ"]}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(KavaError, match=r"y\.json is missing"):
        read_json(tmp_path / "y.json")
    for damaged in (b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(damaged)
        with pytest.raises(KavaError, match=r"x\.json is not valid JSON"):
            read_json(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def write_half(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    process = multiprocessing.get_context("forkserver").Process(target=write_half, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_work_is_found_again_by_what_makes_it(tmp_path: Path) -> None:
    output = tmp_path / "data" / "quick" / "students" / "kava"
    folder = work_folder(output, "evict", {"budget": 4, "seed": 0})
    (folder / "shard").touch()
    assert folder.is_dir() and folder.parent == tmp_path / "data" / ".work"
    assert work_folder(output, "evict", {"seed": 0, "budget": 4}) == folder
    assert (folder / "shard").exists()
    assert work_folder(output, "evict", {"budget": 5, "seed": 0}) != folder
    assert work_folder(output.with_name("codi"), "evict", {"budget": 4, "seed": 0}) != folder
    assert not output.exists()  # DVC may delete it at any time


def test_unfinished_work_of_another_version_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "data" / "quick" / "kv_targets"
    folder = work_folder(output, "evict", {})
    monkeypatch.setitem(VERSIONS, "evict", VERSIONS["evict"] + 1)
    assert work_folder(output, "evict", {}) != folder


def test_work_stays_below_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "elsewhere" / "evict", "evict", {})
    assert folder.parent == tmp_path / "elsewhere" / ".work"


def test_published_folders_replace_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "data" / "quick" / "teacher"
    curves = tmp_path / "data" / "quick" / "curves" / "teacher"
    for round_ in ("first", "second"):
        work = work_folder(output, "teacher", {"round": round_})
        for name in ("output", "curves"):
            (work / name).mkdir()
            (work / name / round_).touch()
        (work / "checkpoint").touch()
        publish((work / "output", output), (work / "curves", curves))
        assert [p.name for p in output.iterdir()] == [round_]
        assert [p.name for p in curves.iterdir()] == [round_]
        assert not work.exists()  # with its checkpoints
