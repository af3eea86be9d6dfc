"""A Ray cluster on this machine: a head that holds the driver and computes nothing, and nodes of
one core each that come and go. They are killed while a process on them stands still in its work."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.cluster_utils import Cluster

from tests.faults.stage import Before, Stage

PATIENCE = 240.0  # seconds; nothing here takes as many on a machine that has time
AUTH = "RAY_AUTH_MODE"


def wait_until(what: str, done: Callable[[], Any], stage: Stage | None = None) -> Any:
    """What `done` gives once it is true; an error with the stage's words if it is not in time."""
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < deadline, f"no {what} in time:\n{stage and stage.said}"
        time.sleep(0.002)
    return found


def patiently(start: Callable[[], Any]) -> Any:
    """What `start` gives: Ray lets a node have half a minute, which a busy machine may not have."""
    for tries_left in (2, 1, 0):
        try:
            return start()
        except Exception as error:
            if not tries_left or "timed out during startup" not in str(error):
                raise
    raise AssertionError


def join(address: str, mode: str) -> None:
    """For a process that is to drive the cluster at an address."""
    os.environ.update({"RAY_ADDRESS": address, AUTH: mode})


@dataclass
class Nodes:
    """The cluster; nodes: by name, those that compute."""

    cluster: Cluster
    nodes: dict[str, Any] = field(default_factory=dict)

    @property
    def join(self) -> Before:
        """What a stage's process does first, to run here."""
        # A Ray that was started in this process before may have set its mode.
        return partial(join, self.cluster.address, os.environ.get(AUTH, "disabled"))

    def add(self, name: str, **more: Any) -> None:
        self.nodes[name] = patiently(partial(self.cluster.add_node, **{"num_cpus": 1, **more}))

    def raylet(self, name: str) -> psutil.Process:
        (info,) = self.nodes[name].all_processes["raylet"]
        return psutil.Process(info.process.pid)

    def workers(self, name: str, kind: str | tuple[str, ...]) -> list[psutil.Process]:
        """The processes on a node whose names begin so."""
        found = []
        for child in self.raylet(name).children(recursive=True):
            try:
                if child.name().startswith(kind):
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def remove(self, name: str, *, graceful: bool = False) -> None:
        """All of its processes are killed; graceful: it says goodbye, and Ray knows at once."""
        left: list[psutil.Process] = []
        with suppress(psutil.Error):  # what stands still does not notice
            left = self.raylet(name).children(recursive=True)
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=graceful)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if graceful:
            self.cluster.wait_for_nodes()

    def kill_raylet(self, name: str) -> None:
        """It alone; what it has started finds out."""
        self.raylet(name).kill()
        self.cluster.worker_nodes.discard(self.nodes.pop(name))  # which it would wait for


@contextmanager
def running_nodes(*names: str, **more: Any) -> Iterator[Nodes]:
    """A cluster of a head, and a node for each name. more: arguments of the head."""
    address = os.environ.pop("RAY_ADDRESS", None)
    head = {"num_cpus": 0, "include_dashboard": False, **more}
    nodes = Nodes(patiently(partial(Cluster, initialize_head=True, head_node_args=head)))
    try:
        for name in names:
            nodes.add(name)
        yield nodes
    finally:
        session = Path(nodes.cluster.head_node.get_session_dir_path())
        nodes.cluster.shutdown()
        shutil.rmtree(session, ignore_errors=True)
        if address is not None:
            os.environ["RAY_ADDRESS"] = address


# stage → what is there as soon as it has done a part of its work, and who works
FIRST: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "generate": ("data/.work/teacher_kv-*/output/shard-*.safetensors", "ray::_Worker"),
    "evict": ("data/.work/kv_targets-*/output/shard-*.safetensors", "ray::_Worker"),
    "evaluate": ("data/.kept/*/answers-*.json", "ray::_Worker"),
    "distill": (
        "data/.work/kava-*/checkpoints/checkpoint-*/trainer_state.json",
        ("ray::RayTrain", "ray::execute"),
    ),
}


def pieces(stage: Stage) -> list[Path]:
    """What it has done so far."""
    return list(stage.home.glob(FIRST[stage.name][0]))


def stop_in_the_middle(stage: Stage, process: Any, nodes: Nodes) -> tuple[str, psutil.Process]:
    """A node, and a worker on it that stands still in its work: the rest cannot be done without it.

    The driver is held when a first piece of the work is there, so that it gives out no more until
    the worker that has done most is stopped; what it gets then it does not do.
    """
    driver, kind = psutil.Process(process.pid), FIRST[stage.name][1]
    wait_until("piece of work", partial(pieces, stage), stage)
    driver.suspend()
    at_work = [(name, worker) for name in nodes.nodes for worker in nodes.workers(name, kind)]
    name, worker = max(at_work, key=lambda found: found[1].cpu_times().user)
    worker.suspend()
    driver.resume()
    assert not any(output.exists() for output in stage.outputs), f"{stage.name} is done already"
    return name, worker


def settle(stage: Stage, **resources: Any) -> Stage:
    """Give the stage resources, and work of many pieces."""
    file = stage.home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    for pipeline in document["pipelines"].values():
        pipeline["resources"] = resources
        pipeline["generate"] = {"shard_size": 1, "batch_size": 1}
        pipeline["cadence"] = {"log_every": 1, "save_every": 1, "gradient_share_every": 2}
        if "evaluate" in pipeline:
            pipeline["evaluate"] = {**pipeline["evaluate"], "batch_size": 1}
        pipeline["students"]["kava"]["processes"] = 2 if stage.name == "distill" else 1
        pipeline["students"]["kava"]["training"]["steps"] = 8
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return stage


def end(process: Any, stage: Stage) -> None:
    """Wait for the end of a stage that is to end well."""
    process.join(PATIENCE)
    assert not process.is_alive(), f"{stage.name} does not end:\n{stage.said}"
    assert process.exitcode == 0, stage.said
