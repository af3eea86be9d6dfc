"""A piece of a three-node cluster killed in the middle of a stage: the same bytes. A worker and a
node are replaced within the run; after the death of the driver the same command goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.nodes import (
    FIRST,
    Nodes,
    end,
    pieces,
    running_nodes,
    settle,
    stop_in_the_middle,
)
from tests.faults.conftest import Tell
from tests.faults.stage import Stage
from tests.holder import kill

MakeStage = Callable[[str], Stage]
LOST = {"distill": "all go on from the last checkpoint (1 of 3)"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes() as found:
        yield found


@pytest.fixture
def two_nodes(nodes: Nodes) -> Nodes:
    """The cluster with its head and two nodes, whatever happened to them before."""
    for name in ("first", "second"):
        if name not in nodes.nodes:
            nodes.add(name)
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("victim", ["worker", "raylet", "node", "driver"])
def test_a_dead_piece_of_a_cluster_costs_nothing_but_time(
    make_stage: MakeStage, two_nodes: Nodes, name: str, victim: str, tell: Tell
) -> None:
    nodes = two_nodes
    stage = settle(make_stage(name), workers=0)
    if name == "evict":  # caches in many shards
        assert Stage(stage.home, "generate").run()[0] == 0
    assert stage.run(nodes.join)[0] == 0, stage.said  # a training has two processes in any case
    expected = stage.digests()
    for output in stage.outputs:
        output.rename(output.with_name(f"{output.name}.before"))
    for kept in stage.home.glob("data/.kept"):
        shutil.rmtree(kept)
    process = settle(stage, workers=2).start(nodes.join)
    node, worker = stop_in_the_middle(stage, process, nodes)
    done = len(pieces(stage))
    if victim == "worker":
        worker.kill()
    elif victim == "raylet":
        nodes.kill_raylet(node)
    elif victim == "node":
        nodes.remove(node)
    else:
        kill(process)
        worker.resume()
        assert stage.digests() == [{} for _ in stage.outputs]
        process = stage.start(nodes.join)
    if name == "distill" and victim in ("raylet", "node"):
        nodes.add("late")  # two processes need two nodes
    end(process, stage)
    assert stage.digests() == expected and "Traceback" not in stage.said, stage.said
    if victim == "driver":
        again = "continuing from checkpoint" if name == "distill" else "are finished already"
        assert again in stage.said and done, stage.said
    else:
        assert LOST.get(name, "was lost in shard") in stage.said, stage.said
    assert list(stage.work.iterdir()) == []
    if "late" in nodes.nodes:
        nodes.remove("late", graceful=True)
    tell(f"Ray: a {victim} of a three-node cluster killed", f"SIGKILL in the middle of {name}",
         "same bytes, no step lost" if victim != "driver" else "run again: same bytes")  # fmt: skip
