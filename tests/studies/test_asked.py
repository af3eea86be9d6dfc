"""The log of askings: a line that a full disk left torn costs that line, and nothing else."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.findings.study import ASKED, Asking
from kava_core.studies.asked import AskedLog
from tests.stages.project import ROOT

FILE_SIZE = resource.RLIMIT_FSIZE


def asking(seed: int, variant: str = "") -> Asking:
    return Asking(at="2026-01-01T00:00:00+00:00", system="kava", variant=variant, seed=seed,
                  problems=14, key=f"key {seed}")  # fmt: skip


def test_a_torn_last_line_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = AskedLog(tmp_path)
    log.add(asking(0, "évict=1"))
    whole = (tmp_path / ASKED).read_bytes()
    assert whole == asking(0, "évict=1").model_dump_json().encode() + b"\n"
    assert AskedLog(tmp_path).askings == log.askings and capsys.readouterr().err == ""
    for length in range(1, len(whole) - 1):  # in the middle of a letter, too
        (tmp_path / ASKED).write_bytes(whole + whole[:length])
        torn = AskedLog(tmp_path)
        assert torn.askings == [asking(0, "évict=1")]
        said = " ".join(capsys.readouterr().err.split())
        assert "asked.jsonl: the last line is torn, and is left out" in said
    torn.add(asking(1))
    assert AskedLog(tmp_path).askings == [asking(0, "évict=1"), asking(1)]
    assert (tmp_path / ASKED).read_bytes().startswith(whole)


def test_what_a_later_version_wrote_stays(tmp_path: Path) -> None:
    line = asking(0).model_dump_json().encode().replace(b"{", b'{"more":1,', 1) + b"\n"
    (tmp_path / ASKED).write_bytes(line)
    AskedLog(tmp_path).add(asking(1))
    assert (tmp_path / ASKED).read_bytes() == line + asking(1).model_dump_json().encode() + b"\n"


@pytest.mark.parametrize("line", [b'{"at":"2026-', b"", b'{"at":"then"}', b"[" * 5000, b"\xff"])
def test_a_torn_line_elsewhere_is_named(tmp_path: Path, line: bytes) -> None:
    whole = asking(0).model_dump_json().encode()
    (tmp_path / ASKED).write_bytes(b"\n".join([whole, line, whole, b""]))
    with pytest.raises(KavaError, match=r"asked.jsonl, line 2: expected .*\. Mend the line") as no:
        AskedLog(tmp_path)
    assert len(str(no.value)) - len(str(tmp_path)) < 300


def test_a_line_that_finds_no_room_leaves_those_that_are_there(tmp_path: Path) -> None:
    """Half of it may be written, as on a full disk."""
    log = AskedLog(tmp_path)
    log.add(asking(0))
    before, (soft, hard) = (tmp_path / ASKED).read_bytes(), resource.getrlimit(FILE_SIZE)
    resource.setrlimit(FILE_SIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.add(asking(1))
    finally:
        resource.setrlimit(FILE_SIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [ASKED]
    assert (tmp_path / ASKED).read_bytes() == before
    log.add(asking(1))
    assert log.askings == AskedLog(tmp_path).askings == [asking(0), asking(1)]


def test_lines_of_before_interventions_were_noted_are_read(tmp_path: Path) -> None:
    for folder in (ROOT / "data/studies").iterdir():
        assert not (folder / ASKED).exists() or {a.kind for a in AskedLog(folder).askings}
    plain = {key: value for key, value in asking(0).model_dump().items() if key != "kind"}
    (tmp_path / ASKED).write_text(json.dumps(plain) + "\n")
    assert AskedLog(tmp_path).askings == [asking(0)]
