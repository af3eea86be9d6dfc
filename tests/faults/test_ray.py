"""Ray killed in pieces: the stage ends with the same bytes, and nothing of Ray outlives it."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from kava_core.parallel.cluster import RAY_FOLDER
from tests.faults.conftest import Tell
from tests.faults.stage import Stage

MakeStage = Callable[[str], Stage]
PATIENCE = 60


def on_ray(stage: Stage) -> Stage:
    """The stage with two workers."""
    file = stage.home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    for pipeline in document["pipelines"].values():
        pipeline["resources"] = {"workers": 2, "cpus_per_worker": 0.5}
    file.write_text(yaml.safe_dump(document))
    return stage


def wait_for(driver: psutil.Process, name: str) -> psutil.Process:
    """A process that the driver has started, by the beginning of its name."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for child in driver.children(recursive=True):
            try:
                if child.name().startswith(name):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.01)
    raise AssertionError(f"no {name} in time")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["none", "ray::_Worker", "raylet", "driver"])
def test_a_dead_piece_of_ray_costs_nothing_but_time(
    make_stage: MakeStage, victim: str, tell: Tell
) -> None:
    stage = make_stage("generate")
    assert stage.run()[0] == 0
    expected = stage.digests()
    on_ray(stage)
    for output in stage.outputs:
        output.rename(output.with_name(f"{output.name}.before"))
    process = stage.start()
    assert process.pid is not None
    driver = psutil.Process(process.pid)
    worker = wait_for(driver, "ray::_Worker")
    started = driver.children(recursive=True)
    if victim != "none":
        dying = {"ray::_Worker": worker, "driver": driver}.get(victim)
        os.kill((dying or wait_for(driver, victim)).pid, signal.SIGKILL)
    process.join(300)
    if process.exitcode != 0:
        assert victim in ("driver", "raylet"), stage.said
        assert stage.run()[0] == 0, stage.said
    assert stage.digests() == expected and "Traceback" not in stage.said, stage.said
    _, alive = psutil.wait_procs(started, timeout=PATIENCE)
    assert not alive, [p.name() for p in alive]
    left = list(Path(tempfile.gettempdir()).glob(f"{RAY_FOLDER}{process.pid}-*"))
    assert not left and list(stage.work.iterdir()) == []
    tell(f"Ray: {victim.removeprefix('ray::_').lower()} killed", "SIGKILL while a worker starts",
         "same bytes; no process and no file left")  # fmt: skip
