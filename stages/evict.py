"""kv_targets ← teacher_kv: caches cut down to M slots per layer and head, without the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kava_core.artefacts import publish
from kava_core.console import say, warn
from kava_core.errors import KavaError

from .run import Run, stage

if TYPE_CHECKING:
    from kava_core.targets.build import Build


@stage
def evict(run: Run) -> None:
    """Cut the teacher's caches down to M slots per layer and head.

    Writes kv_targets/, from which students are trained without the teacher, and eviction.json with
    the share of (record, layer, head) from which a token was really dropped, and how far slots have
    an identity. A new budget, policy, layer set or bit width reruns this stage and what follows,
    nothing before.
    """
    from kava_core.planning.room import lacking_room
    from kava_core.targets.evict import build_kv_targets

    if run.settings.generate.keep == "targets":
        raise KavaError(
            f"pipeline {run.name} has no stage evict: at `generate.keep: targets` `kava generate` "
            "makes the targets. Run that, or set generate.keep to caches."
        )
    caches, output = run.made("teacher_kv"), run.path("kv_targets")
    if lacking := lacking_room(run.settings, run.path(), "kv_targets"):
        warn(f"evict: {lacking}")
    built = build_kv_targets(caches, run.settings.evict, output, run.settings.resources)
    publish_targets(run, built)


def publish_targets(run: Run, built: Build) -> None:
    """Put targets into their place, with eviction.json beside them, and say what they are."""
    from kava_core.findings.base import write_finding
    from kava_core.findings.eviction import FILE
    from kava_core.store import TargetsStore
    from kava_core.store.summary import eviction_findings, quarantine_facts

    found = eviction_findings(TargetsStore.open(built.folder), built.counts)
    write_finding(run.path(FILE), found)
    publish((built.folder, run.path("kv_targets")))  # last: with it goes all that was finished
    identity = "; ".join(f"{what} {how_much}" for what, how_much in found.identity)
    say(
        f"kv_targets: {built.manifest.records} records, {found.megabytes:.1f} MB{built.where}; "
        f"eviction engaged on {found.engaged_percent:.1f} % of (record, layer, head); {identity}"
    )
    for name, value in quarantine_facts(built.manifest):
        say(f"kv_targets: {name} {value}")
