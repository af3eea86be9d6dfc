"""Killed at any moment and run again, a stage ends with the bytes of a run that was never killed,
and at no moment is there half an artefact under its output's name."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable

import pytest

from tests.faults.conftest import Tell
from tests.faults.stage import STAGES, Stage

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HOW = {
    1: "SIGKILL, SIGTERM or SIGINT at a random moment",
    2: "two such in a row",
    3: "three such in a row",
}
MakeStage = Callable[[str], Stage]


def check_kills(whole: Stage, seconds: float, home: Stage, seed: int, kills: int) -> None:
    """Kill `home` at random moments, finish it, and compare.

    whole: the same stage, finished; seconds: what that took.
    """
    rng = random.Random(f"{home.name} {seed}")
    before, expected = home.digests(), whole.digests()
    for _ in range(kills):
        number = rng.choice(SIGNALS)
        code = home.kill(rng.uniform(0, seconds), number)
        # Training that is told to end saves its state and says so.
        assert code in (0, -number, 128 + number) or "and saved." in home.said, home.said
        for old, new, found in zip(before, expected, home.digests(), strict=True):
            assert found in ({}, old, new), f"half an artefact of {home.name}"
    assert home.run()[0] == 0, home.said
    assert home.digests() == expected
    assert "Traceback" not in home.said, home.said
    assert list(home.work.iterdir()) == []


@pytest.mark.parametrize("name", STAGES)
def test_a_kill_costs_nothing_but_time(make_stage: MakeStage, name: str, tell: Tell) -> None:
    whole = make_stage(name)
    shutil.copytree(whole.home, whole.home.with_name("again"))
    code, seconds = whole.run()
    assert code == 0, whole.said
    home = Stage(whole.home.with_name("again"), name)
    check_kills(whole, seconds, home, 0, 1)
    tell(f"{name} killed", HOW[1], "run again: same bytes, nothing left over")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_thirty_kills_cost_nothing_but_time(make_stage: MakeStage, name: str, tell: Tell) -> None:
    whole = make_stage(name)
    start = whole.home.with_name("start")
    shutil.copytree(whole.home, start)
    code, seconds = whole.run()
    assert code == 0, whole.said
    for seed in range(1, 31):
        home = Stage(start.with_name("again"), name)
        shutil.copytree(start, home.home)
        kills = 1 + seed % 3
        check_kills(whole, seconds, home, seed, kills)
        tell(f"{name} killed", HOW[kills], "run again: same bytes, nothing left over")
        shutil.rmtree(home.home)
