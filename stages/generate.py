"""teacher_kv ← problems, teacher: the frozen teacher's caches over the training traces."""

from __future__ import annotations

from kava_core.artefacts import publish
from kava_core.console import say, warn

from .evict import publish_targets
from .run import Run, stage


@stage
def generate(run: Run) -> None:
    """Run the frozen teacher over the training traces and store its caches.

    Writes teacher_kv/: pre-RoPE keys and values of the chain of thought, the answer's attention to
    it and the endpoint hidden states, in shards with an index, a manifest and checksums. Killed and
    run again, it redoes only the shards that were not finished. At `generate.keep: targets` it
    writes kv_targets/ and eviction.json instead, as `evict` would.
    """
    from kava_core.planning.room import lacking_room
    from kava_core.store.summary import quarantine_facts
    from kava_core.targets.generate import build_targets_alone, build_teacher_kv

    taught, teacher = run.taught, run.made("teacher")
    keeps_caches = run.settings.generate.keep == "caches"
    artefact = "teacher_kv" if keeps_caches else "kv_targets"
    if lacking := lacking_room(run.settings, run.path(), artefact):
        warn(f"generate: {lacking}")
    if not keeps_caches:
        built = build_targets_alone(
            taught,
            teacher,
            run.settings.generate,
            run.settings.evict,
            run.path("kv_targets"),
            run.settings.resources,
        )
        publish_targets(run, built)
        return
    output = run.path("teacher_kv")
    built = build_teacher_kv(
        taught,
        teacher,
        run.settings.generate,
        output,
        run.settings.resources,
    )
    publish((built.folder, output))
    manifest = built.manifest
    say(
        f"teacher_kv: {manifest.records} records, {manifest.trace_tokens} CoT tokens in "
        f"{len(manifest.shards)} shards{built.where}; {built.rate}"
    )
    for name, value in quarantine_facts(manifest):
        say(f"teacher_kv: {name} {value}")
