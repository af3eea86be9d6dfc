"""A stage on a cluster: it waits for a node, loses one in the middle, and works on a late one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.cluster.nodes import (
    FIRST,
    Nodes,
    end,
    running_nodes,
    settle,
    stop_in_the_middle,
    wait_until,
)
from tests.faults.stage import Stage

MakeStage = Callable[[str], Stage]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with running_nodes() as found:
        yield found


def test_generate_waits_for_a_node_loses_it_and_goes_on_on_a_late_one(
    make_stage: MakeStage, nodes: Nodes
) -> None:
    stage = settle(make_stage("generate"), workers=0)
    assert stage.run()[0] == 0
    expected = stage.digests()
    for output in stage.outputs:
        output.rename(output.with_name("before"))
    process = settle(stage).start(nodes.join)
    wait_until("word of waiting", lambda: "waiting for room for a worker of 1 CPUs" in stage.said)
    nodes.add("first")
    stop_in_the_middle(stage, process, nodes)
    nodes.add("late")
    late: psutil.Process = wait_until(
        "work for the late node", lambda: nodes.workers("late", FIRST["generate"][1]), stage
    )[0]
    assert late.is_running()
    nodes.remove("first")
    end(process, stage)
    assert "was lost in shard" in stage.said and "Traceback" not in stage.said, stage.said
    assert stage.digests() == expected
