"""A driver of three shards that writes what Ray's agents show of it; its log goes to stderr."""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from kava_core.console import configure
from kava_core.parallel.shards import run_shards
from kava_core.settings import Resources
from tests.cluster.nodes import wait_until


@dataclass(frozen=True)
class Sees:
    """A shard is where it was worked on: the name of the node, and the GPUs seen there."""

    folder: Path
    threads: int = 1

    def open(self) -> Callable[[int], list[str]]:
        return lambda _: [os.environ.get(name, "") for name in ("NODE", "CUDA_VISIBLE_DEVICES")]


def main(folder: Path) -> None:
    ray.init()  # at RAY_ADDRESS
    # Ray's driver asks for the agent of its node for half a minute, and then tells it nothing.
    wait_until("agent of every node", lambda: all(map(_answer, _agents())))
    configure("json")
    resources, work = Resources(ray_metrics=True), Sees(folder)
    found = run_shards(work, range(3), resources, folder=folder, examples=lambda *_: 5)
    for _ in range(3):
        next(found)
    # Agents are told a little later.
    shown = wait_until("metric", _measured)
    assert list(found) == []
    print(*shown, sep="\n")


def _measured() -> list[str]:
    """What an agent shows once it knows of every shard."""
    for lines in map(_answer, _agents()):
        shards = [x for x in lines if x.startswith("ray_kava_shards_total{")]
        if sum(float(x.rpartition(" ")[2]) for x in shards) >= 3:
            return lines
    return []


def _agents() -> list[str]:
    """Where the agents of the nodes show their metrics."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{x['NodeManagerAddress']}:{x['MetricsExportPort']}/metrics" for x in alive]


def _answer(url: str) -> list[str]:
    """The lines that an agent shows; none while it is not there."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=20) as answer:
        return list(answer.read().decode().splitlines())
    return []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
