"""Killed at any moment and run again, a stage ends with the bytes of a run that was never killed,
having done again only what was not finished, and at no moment is there half an artefact under its
output's name."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kava_core.distill.checkpoints import last_whole_checkpoint, step_of
from tests.faults.conftest import FEW, MOMENTS, Tell, Whole, processes_in
from tests.faults.stage import STAGES, Stage

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
IN_A_ROW = ("once", "twice in a row", "three times in a row")
# stage → what a finished piece of its work looks like below `data/`
PIECES = {
    "generate": ".work/teacher_kv-*/output/shard-*.json",
    "generate-targets": ".work/kv_targets-*/output/shard-*.json",
    "evict": ".work/kv_targets-*/output/shard-*.json",
    "fidelity": ".work/fidelity-*/batch-*.json",
    "evaluate": ".kept/*/*-[0-9]*.json",
}


def finished(stage: Stage) -> int:
    """How much of unfinished work is finished: pieces, or steps of a training."""
    data = stage.home / "data"
    if stage.name in ("teacher", "distill"):
        folders = data.glob(".work/*/checkpoints")
        last = [found for folder in folders if (found := last_whole_checkpoint(folder))]
        return max(map(step_of, last), default=0)
    return len(list(data.glob(PIECES[stage.name]))) if stage.name in PIECES else 0


def gone_on_with(said: str) -> int:
    """How much of it a run has said that it did not make again."""
    found = re.search(r"continuing from checkpoint-(\d+)|(\d+) of \d+ \w+ are finished", said)
    return int(found[1] or found[2]) if found else 0


def check_kills(whole: Whole, home: Stage, seed: int, kills: int) -> int:
    """Kill `home` at random moments, finish it, and compare; how many of the kills met a run."""
    rng = random.Random(f"{home.name} {seed}")
    before, met = home.digests(), 0
    for _ in range(kills):
        number = rng.choice(SIGNALS)
        code = home.kill(rng.uniform(0, whole.seconds), number)
        assert code in (0, -number, 128 + number), home.said
        met += code != 0
        for old, new, found in zip(before, whole.expected, home.digests(), strict=True):
            assert found in ({}, old, new), f"half an artefact of {home.name}"
        assert processes_in(home.home) == []
    there, said = finished(home), len(home.said)
    assert home.run()[0] == 0, home.said
    assert home.digests() == whole.expected
    assert gone_on_with(home.said[said:]) >= there, home.said
    assert "Traceback" not in home.said, home.said
    assert list(home.work.iterdir()) == [] and processes_in(home.home) == []
    return met


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Seed by seed, so that a run that is cut short has seen every stage."""
    if metafunc.function is test_more_kills_cost_nothing_but_time:
        moments = metafunc.config.getoption(MOMENTS, default=FEW)
        cases = [(name, seed) for seed in range(1, moments + 1) for name in STAGES]
        metafunc.parametrize(("name", "seed"), cases)


def kill_and_tell(
    whole: Callable[[str], Whole], name: str, place: Path, seed: int, kills: int, tell: Tell
) -> None:
    home = whole(name).again(place / "home", name)
    met = check_kills(whole(name), home, seed, kills)
    shutil.rmtree(home.home)
    if met:
        how = f"{IN_A_ROW[met - 1]}: SIGKILL, SIGTERM or SIGINT at a random moment"
        tell(f"{name} killed", how, "run again: same bytes, the rest kept, nothing left over")


@pytest.mark.parametrize("name", STAGES)
def test_a_kill_costs_nothing_but_time(
    whole: Callable[[str], Whole], name: str, tmp_path: Path, tell: Tell
) -> None:
    kill_and_tell(whole, name, tmp_path, 0, 1, tell)


@pytest.mark.slow
def test_more_kills_cost_nothing_but_time(
    whole: Callable[[str], Whole], name: str, seed: int, tmp_path: Path, tell: Tell
) -> None:
    """One, two and three in a row, by turns."""
    kill_and_tell(whole, name, tmp_path, seed, 1 + seed % 3, tell)
