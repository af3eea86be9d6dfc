"""The power cut at any moment: what was published is on the disk, and a stage goes on with what is
left (`tests.faults.powercut`)."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import powercut
from tests.faults.conftest import Tell, Whole
from tests.faults.powercut import KINDS, Kind, Moment
from tests.faults.stage import STAGES, Stage
from tests.golden.inputs import NAME

HOW = {
    "strict": "what was not synced is lost, names too",
    "journal": "what was not synced is zeros under its name",
}


@pytest.fixture
def recorded(whole: Callable[[str], Whole], tmp_path: Path) -> Callable[[str], list[Moment]]:
    """All moments of a run of a stage, from which its outputs may be made in `tmp_path`/out."""

    def record(name: str) -> list[Moment]:
        stage = whole(name).again(tmp_path / "home", name)
        before = functools.partial(powercut.record, stage.home, tmp_path / "out")
        assert stage.run(before)[0] == 0, stage.said
        assert stage.digests() == whole(name).expected
        return powercut.moments(tmp_path / "out")

    return record


def found(moment: Moment, name: str) -> list[dict[str, str]]:
    """Of each output of a stage what is left."""
    return [moment.below(f"data/{NAME}/{output}") for output in STAGES[name][1]]


@pytest.mark.parametrize("name", STAGES)
def test_what_has_its_name_is_on_the_disk(
    whole: Callable[[str], Whole], recorded: Callable[[str], list[Moment]], name: str, tell: Tell
) -> None:
    moments, expected = recorded(name), whole(name).expected
    for kind in KINDS:
        cuts = [moment for moment in moments if moment.kind == kind]
        old = found(cuts[0], name)
        for cut in cuts:
            for before, after, left in zip(old, expected, found(cut, name), strict=True):
                assert left in (before, after, {}), f"half an artefact, {kind}, after {cut.call}"
        assert found(cuts[-1], name) == expected, f"{kind}: not on the disk when it is said"
        for _ in cuts:
            tell(f"power cut during {name}", HOW[kind], "the output is old, new or none")


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
    whole: Callable[[str], Whole], recorded: Callable[[str], list[Moment]], name: str, kind: Kind,
    tmp_path: Path, tell: Tell,
) -> None:  # fmt: skip
    cuts = [moment for moment in recorded(name) if moment.kind == kind]
    for cut in random.Random(f"{name} {kind}").sample(cuts, min(12, len(cuts))):
        check_cut(whole(name), cut, Stage(tmp_path / "again", name), tmp_path / "out")
        tell(f"power cut during {name}", HOW[kind], "run again: same bytes, nothing left over")
