"""The power cut at any moment: what was published or finished is on the disk, and a stage goes on
with what is left (`tests.faults.powercut`)."""

from __future__ import annotations

import functools
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kava_core.findings.base import write_finding
from tests.faults import powercut
from tests.faults.conftest import Tell, Whole
from tests.faults.powercut import KINDS, ZEROS, Kind, Moment
from tests.faults.stage import CONTEXT, PATIENCE, STAGES, Stage, main
from tests.golden.inputs import NAME
from tests.stages.project import digest

HOW = {
    "strict": "what was not synced is lost, names too",
    "journal": "what was not synced is zeros under its name",
}


Recorded = Callable[..., list[Moment]]


@pytest.fixture
def recorded(whole: Callable[[str], Whole], tmp_path: Path) -> Recorded:
    """All moments of a run of a stage, from which its outputs may be made in `tmp_path`/out."""

    def record(name: str, first: bool = False) -> list[Moment]:
        """first: in a home where it never ran."""
        stage = whole(name).again(tmp_path / "home", name)
        if first:
            for output in stage.outputs:
                shutil.rmtree(output, ignore_errors=True)
        if first and name == "prepare":
            shutil.rmtree(stage.home / "data")
        before = functools.partial(powercut.record, stage.home, tmp_path / "out")
        assert stage.run(before)[0] == 0, stage.said
        assert stage.digests() == whole(name).expected
        return powercut.moments(tmp_path / "out")

    return record


def found(moment: Moment, name: str) -> list[dict[str, str]]:
    """Of each output of a stage what is left."""
    return [moment.below(f"data/{NAME}/{output}") for output in STAGES[name][1]]


def check_moments(moments: list[Moment], name: str, expected: list[dict[str, str]]) -> None:
    """At each of them an output is old, new or none, and at the end it is new."""
    for kind in KINDS:
        cuts = [moment for moment in moments if moment.kind == kind]
        old = found(cuts[0], name)
        for cut in cuts:
            for before, after, left in zip(old, expected, found(cut, name), strict=True):
                assert left in (before, after, {}), f"half an artefact, {kind}, after {cut.call}"
        assert found(cuts[-1], name) == expected, f"{kind}: not on the disk when it is said"


# stage → a finished piece of its work
PIECES = {
    "generate": r"data/\.work/[^/]+/output/shard-\d+\.json",
    "generate-targets": r"data/\.work/[^/]+/output/shard-\d+\.json",
    "evict": r"data/\.work/[^/]+/output/shard-\d+\.json",
    "fidelity": r"data/\.work/[^/]+/batch-[\w-]+\.json",
    "evaluate": r"data/\.kept/[^/]+/[a-z]+(-\d+)?\.json",
    "teacher": r"data/\.work/[^/]+/checkpoints/checkpoint-\d+/trainer_state\.json",
    "distill": r"data/\.work/[^/]+/checkpoints/checkpoint-\d+/trainer_state\.json",
}


def finished(cut: Moment) -> set[tuple[str, str]]:
    """The pieces of work that are left whole, with their content."""
    names = "|".join(PIECES.values())
    pieces = {(p, c) for p, c in cut.image.items() if re.fullmatch(names, p)}
    return {(path, content) for path, content in pieces if not content.startswith(ZEROS)}


MANY_FILES = ("prepare", "evaluate", "report")  # which take their time


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MANY_FILES)) for name in STAGES],
)
def test_what_has_its_name_is_on_the_disk(
    whole: Callable[[str], Whole], recorded: Recorded, name: str, tell: Tell
) -> None:
    moments = recorded(name)
    check_moments(moments, name, whole(name).expected)
    if name in PIECES:  # and what was finished stays so, whatever the file system
        strict, journal = (
            set().union(*(finished(moment) for moment in moments if moment.kind == kind))
            for kind in KINDS
        )
        assert strict == journal and strict
    for moment in moments:
        tell(f"power cut during {name}", HOW[moment.kind], "the output is old, new or none")


@pytest.mark.parametrize("name", ["prepare", "distill"])
def test_what_is_there_for_the_first_time_is_on_the_disk(
    whole: Callable[[str], Whole], recorded: Recorded, name: str
) -> None:
    check_moments(recorded(name, first=True), name, whole(name).expected)


def record_command(home: Path, out: Path, arguments: list[str]) -> list[Moment]:
    before = functools.partial(powercut.record, home, out)
    log, begun = home / "command.log", CONTEXT.Event()
    process = CONTEXT.Process(target=main, args=(home, arguments, log, begun, before))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, log.read_text(encoding="utf-8")
    return powercut.moments(out)


THEIRS = {"students": {"kava": {"reads": "kv_targets", "alpha_kv": 1.0, "training": {"steps": 1}}}}


@pytest.mark.parametrize("command", ["export", "import"])
def test_what_other_commands_write_is_on_the_disk(
    whole: Callable[[str], Whole], command: str, tmp_path: Path, tell: Tell
) -> None:
    home = whole("evict").again(tmp_path / "home", "evict").home
    ours = home / "data" / NAME
    settings = {"pipeline": "theirs", "pipelines": {"theirs": THEIRS}}
    (home / "theirs.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments, places = {
        "export": (["store", "export", str(ours / "kv_targets"), "data/card"], ["data/card"]),
        "import": (
            ["store", "import", str(ours / "kv_targets"), "--teacher", str(ours / "teacher"),
             "--pipelines", "theirs.yaml"],
            ["data/theirs/kv_targets", "data/theirs/teacher"],
        ),
    }[command]  # fmt: skip
    moments = record_command(home, tmp_path / "out", arguments)
    for place in places:
        whole_one = digest(home / place)
        for moment in moments:
            assert moment.below(place) in ({}, whole_one), f"{moment.kind}, after {moment.call}"
        for kind in KINDS:
            last = [moment for moment in moments if moment.kind == kind][-1]
            assert last.below(place) == whole_one, f"{kind}: {place} is not on the disk"
    for moment in moments:
        tell(f"power cut during {command}", HOW[moment.kind], "the output is new or none")


def write_study(home: Path, out: Path) -> None:
    """What a study writes: answers in folders that are new."""
    powercut.record(home, out)
    write_finding(home / "studies" / "one" / "cells" / "a.json", {"right": [True]})


def test_a_finding_is_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    process = CONTEXT.Process(target=write_study, args=(tmp_path / "home", tmp_path / "out"))
    process.start()
    process.join(PATIENCE)
    moments = powercut.moments(tmp_path / "out")
    for kind in KINDS:
        last = [moment for moment in moments if moment.kind == kind][-1]
        assert last.below("studies") == digest(tmp_path / "home" / "studies") != {}


def check_cut(whole: Whole, cut: Moment, home: Stage, out: Path) -> None:
    """Restore what is left, run the stage, and compare."""
    cut.restore(home.home, out)
    assert home.run()[0] == 0, f"after {cut.call}: {home.said}"
    assert home.digests() == whole.expected, f"after {cut.call}"
    assert "Traceback" not in home.said, home.said
    assert list(home.work.iterdir()) == []
    shutil.rmtree(home.home)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_goes_on_with_what_is_left(
    whole: Callable[[str], Whole], recorded: Recorded, name: str, kind: Kind,
    tmp_path: Path, tell: Tell,
) -> None:  # fmt: skip
    cuts = [moment for moment in recorded(name) if moment.kind == kind]
    for cut in random.Random(f"{name} {kind}").sample(cuts, min(12, len(cuts))):
        check_cut(whole(name), cut, Stage(tmp_path / "again", name), tmp_path / "out")
        tell(f"power cut during {name}", HOW[kind], "run again: same bytes, nothing left over")
