"""Who works on a cluster: what has room is waited for, and a node that would spoil the work is
named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kava_core
from kava_core.errors import KavaError
from kava_core.parallel.processes import run_processes
from kava_core.parallel.shards import run_shards
from kava_core.settings import Resources
from tests.cluster.measured import Sees
from tests.cluster.nodes import PATIENCE, Nodes, running_nodes, wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with running_nodes(_system_config={"metrics_report_interval_ms": 500}) as found:
        yield found


@pytest.fixture
def nodes(cluster: Nodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """The head alone, which this process drives."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.cluster.address)
    yield cluster
    for name in list(cluster.nodes):
        cluster.remove(name, graceful=True)


def seen(folder: Path, shards: int = 1, **resources: Any) -> list[list[str]]:
    found = run_shards(
        Sees(folder),
        range(shards),
        Resources(**{"wait_for_room": 200, **resources}),
        folder=folder,
        examples=lambda *_: 5,
    )
    return [each for _, each in found]


@pytest.mark.usefixtures("nodes")
def test_no_room_is_waited_for_and_then_an_error(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(KavaError) as error:
        seen(tmp_path, wait_for_room=2)
    assert str(error.value) == (
        "expected room for a worker of 1 CPUs and 0 GPUs within 2 s, found 0 CPUs and 0 GPUs on 1 "
        "machine. Lower resources.cpus_per_worker or resources.gpus_per_worker, start nodes with "
        "more, or raise resources.wait_for_room; finished work is kept."
    )
    assert 2 < time.monotonic() - began < 30


def test_a_gpu_that_comes_late_is_waited_for(
    nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a cluster that starts its nodes when they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(seen, tmp_path, gpus_per_worker=1)
        said = ""

        def waits() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "waiting for room" in said

        wait_until("word of waiting", waits)
        nodes.add("late", num_gpus=1, env_vars={"NODE": "late"})
        assert found.result(PATIENCE) == [["late", "0"]]
    assert (
        "waiting for room for a worker of 1 CPUs and 1 GPUs, for at most 200 s "
        "(resources.wait_for_room); there are 0 CPUs and 0 GPUs on 1 machine" in said
    )


def test_a_node_without_the_shared_folder_is_named(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that is another folder for another process stands for a disk that is not shared."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    nodes.add("apart")
    monkeypatch.chdir(tmp_path / "here")
    said = r"expected every node to see the folder /proc/self/cwd, and \S+ does not\. Put the data"
    with pytest.raises(KavaError, match=said):
        seen(Path("/proc/self/cwd"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "__version__ = '0.0.1'",
            rf"expected kava {kava_core.__version__} on every node, as on \S+, and \S+ has 0\.0\.1",
        ),
        (
            "raise ImportError('there is none')",
            r"this package on every node, and \S+ cannot import it \(there is none\)",
        ),
    ],
)
def test_a_node_with_another_version_or_none_is_refused(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # Ray puts it before all else that Python imports from
    other = tmp_path / "other" / "kava_core"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(content)
    (other / "versions.py").write_text("VERSIONS = {}")
    nodes.add("other", env_vars={"PYTHONPATH": str(other.parent)})
    with pytest.raises(KavaError, match=said):
        seen(tmp_path)


def test_who_does_how_much_is_said_and_measured(nodes: Nodes, tmp_path: Path) -> None:
    """In a process of its own, as a stage is: Ray counts a process's metrics once for each of its
    connections to Ray, and this one has had some."""
    nodes.add("one")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.cluster.measured", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout.splitlines()
    (line,) = [x for x in shown if x.startswith("ray_kava_examples_total{")]
    assert float(line.rpartition(" ")[2]) == 15 and 'worker="0"' in line
    assert any(x.startswith("ray_kava_examples_per_second{") for x in shown)
    assert any(x.startswith("ray_kava_shards_total{") for x in shown)
    entries = [json.loads(x) for x in ran.stderr.splitlines() if x.startswith("{")]
    told = [entry for entry in entries if "workers" in entry][-1]
    (worker,) = told["workers"]
    assert told["level"] == "progress" and "0 on" in told["message"]
    assert (worker["worker"], worker["examples"], worker["shards"]) == (0, 15, 3)
    assert worker["per_second"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_processes_of_a_training_wait_for_room_and_then_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=r"room for 2 training processes within 8 s, found 0 CPUs"):
        run_processes(
            print,
            2,
            folder=tmp_path / "ray",
            stop_file=tmp_path / "stop",
            threads=1,
            cpus=1,
            device="cpu",
            gpus=None,
            patience=8,
        )
