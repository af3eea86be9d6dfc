"""teacher_kv ← problems, teacher: the frozen teacher's caches over the training traces; or, where
nobody keeps them, kv_targets at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kava_core.artefacts import ensure_folder, work_folder
from kava_core.errors import KavaError
from kava_core.eviction import CacheBatch, Targets
from kava_core.models.loading import (
    DTYPES,
    cache_shape,
    load_model,
    model_fingerprint,
    tokenizer_fingerprint,
)
from kava_core.models.proofs import prove_capture
from kava_core.models.teacher_pass import TeacherCache
from kava_core.parallel.overlap import Computed
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import open_problems
from kava_core.problems.prompt import check_prompt
from kava_core.problems.traces import chat_fingerprint
from kava_core.record import Record
from kava_core.rotary import Rotary
from kava_core.settings import Evict, Generate, Resources
from kava_core.store import (
    Codec,
    Geometry,
    Manifest,
    StoreSpec,
    Work,
    merged_manifest,
    noted_shards,
    write_targets_shard,
    write_teacher_shard,
)
from kava_core.store.codec import encode
from kava_core.store.summary import quarantined
from kava_core.targets.build import Build, ShardCounts, build_store
from kava_core.targets.evict import targets_spec
from kava_core.targets.fitting import fitting_batch, longest
from kava_core.targets.plan import Plan
from kava_core.targets.quarantine import Quarantine, not_finite
from kava_core.targets.reading import (
    Read,
    Reading,
    check_traces,
    check_weights,
    trace_encoder,
)
from kava_core.targets.specs import store_codec
from kava_core.versions import VERSIONS


@dataclass(frozen=True)
class GenerateJob:
    """Shard k of the teacher's caches, written into `folder`; quarantine: of what it leaves out."""

    reading: Reading
    folder: Path
    spec: StoreSpec
    quarantine: Quarantine

    @property
    def threads(self) -> int:
        return self.reading.settings.threads

    def open(self) -> Callable[[int], Computed[ShardCounts]]:
        read = self.reading.open()

        def work(shard: int) -> Computed[ShardCounts]:
            found = read(shard).off_device()
            _empty_cache()

            def finish() -> ShardCounts:
                self.quarantine.note(shard, found.left_out)
                _write(self.folder, self.spec, found, keep=True)
                return found.counts

            return Computed(finish)

        return work


@dataclass(frozen=True)
class CutJob:
    """Shard k of the targets, cut from caches that are not kept.

    notes: a folder for what is noted of each shard of the caches; caches: what they would be
    stored as. folder, spec: of the targets. quarantine: of what they leave out.
    """

    reading: Reading
    notes: Path
    caches: StoreSpec
    folder: Path
    plan: Plan
    spec: StoreSpec
    quarantine: Quarantine

    @property
    def threads(self) -> int:
        return self.reading.settings.threads

    def open(self) -> Callable[[int], Computed[ShardCounts]]:
        read = self.reading.open()

        def work(shard: int) -> Computed[ShardCounts]:
            found = read(shard).off_device()
            _empty_cache()
            targets, endpoint = self._cut(found)
            unfit = _unfit_targets(targets, endpoint, self.spec.codec)
            if unfit:
                found = self.reading.sift(found, unfit)
                targets, endpoint = self._cut(found)

            def finish() -> ShardCounts:
                self.quarantine.note(shard, found.left_out)
                _write(self.notes, self.caches, found, keep=False)
                write_targets_shard(
                    self.folder,
                    self.spec,
                    shard,
                    found.traces,
                    keys=targets.keys,
                    values=targets.values,
                    slot_counts=targets.slot_counts,
                    slot_positions=targets.slot_positions,
                    endpoint=endpoint,
                )
                return found.counts

            return Computed(finish)

        return work

    def _cut(self, found: Read) -> tuple[Targets, Tensor]:
        """The targets of a shard, and its endpoint states as the caches keep them."""
        with torch_threads(self.plan.settings.threads):
            targets = self.plan.cut(stored_caches(self.caches, found.traces, found.cache))
        endpoint = encode(found.cache.endpoint.cpu(), self.caches.codec.endpoint)
        return targets, endpoint.dequantise()


def build_teacher_kv(
    problems: Path, teacher: Path, settings: Generate, output: Path, resources: Resources
) -> Build:
    """Run the teacher over the training problems; the store is built in the work of `output`.

    problems, teacher: folders of those artefacts. KavaError if there is nothing to read; unless
    `on_error` leaves such records out, for a trace that the teacher cannot hold, before it reads
    any, and for one that gives no finite numbers.
    """
    made = _Caches.of(problems, teacher, settings)
    key = {"settings": _content(settings), "inputs": made.fingerprints}
    folder = work_folder(output, "generate", key)
    work, quarantine = Work.of(folder, resources.caches_to), Quarantine(folder / "quarantine")
    if (found := work.found()) is not None:
        return Build(work.result, made.all_there(found), url=work.where)
    made = made.fitted(folder, resources)

    def finish() -> Manifest:
        manifest = work.finalise(
            made.spec,
            shards=made.shards,
            settings={**made.settings, **quarantine.settings(made.shards)},
            fingerprints=made.fingerprints,
        )
        return made.all_there(manifest)

    return build_store(
        GenerateJob(made.reading, work.folder, made.spec, quarantine),
        made.shards,
        work,
        done=made.settled(quarantine, work.finished()),
        finish=finish,
        resources=resources,
    )


def build_targets_alone(
    problems: Path,
    teacher: Path,
    settings: Generate,
    evict: Evict,
    output: Path,
    resources: Resources,
) -> Build:
    """Run the teacher over the training problems and keep the targets only, in the work of
    `output`; their bytes are those of targets that are cut from a teacher's store.

    Arguments and errors as in `build_teacher_kv`; KavaError also names the setting of `evict` that
    cannot be met by this teacher's layers.
    """
    made = _Caches.of(problems, teacher, settings)
    plan = Plan.of(evict, made.spec.geometry)
    plain = evict.model_dump(mode="json", by_alias=True)
    key = {
        "settings": [_content(settings), plain],
        "inputs": made.fingerprints,
        "evict": VERSIONS["evict"],
    }
    folder = work_folder(output, "generate", key)
    work, quarantine = Work.of(folder, resources.targets_to), Quarantine(folder / "quarantine")
    if (found := work.found()) is not None:
        return Build(work.result, made.all_there(found), url=work.where)
    made = made.fitted(folder, resources)
    notes = ensure_folder(folder / "notes")

    def caches() -> Iterator[CacheBatch]:
        with torch_threads(settings.threads):
            read = made.reading.open()
            for shard in range(made.shards):
                found = read(shard)
                yield stored_caches(made.spec, found.traces, found.cache)

    spec = targets_spec(plan, _as_stored(made.spec.rotary), caches())

    def finish() -> Manifest:
        shaped = {**made.settings, **quarantine.settings(made.shards)}
        described = merged_manifest(
            notes,
            made.spec,
            shards=made.shards,
            settings=shaped,
            fingerprints=made.fingerprints,
        )
        manifest = work.finalise(
            spec,
            shards=made.shards,
            settings={**shaped, "evict": plain},
            fingerprints={**made.fingerprints, "teacher_kv": described.digest},
        )
        return made.all_there(manifest)

    return build_store(
        CutJob(made.reading, notes, made.spec, work.folder, plan, spec, quarantine),
        made.shards,
        work,
        done=made.settled(quarantine, work.finished() & noted_shards(notes)),
        finish=finish,
        resources=resources,
    )


@dataclass(frozen=True)
class _Caches:
    """What is known of a store of caches before the teacher reads anything."""

    reading: Reading
    spec: StoreSpec
    problems: int
    settings: dict[str, Any]
    fingerprints: dict[str, str]

    def fitted(self, work: Path, resources: Resources) -> Self:
        """The same with a number for `batch_size: auto`; `work`: where it is noted."""
        reading = self.reading
        if reading.settings.batch_size != "auto":
            return self

        def places() -> list[int]:
            source = open_problems(reading.problems)
            encoder = trace_encoder(source, reading.teacher, reading.settings)
            return longest(encoder.encode_parts(source.open("train")), reading.settings.shard_size)

        found = fitting_batch(reading, places, work, resources)
        settings = reading.settings.model_copy(update={"batch_size": found})
        return replace(
            self,
            reading=replace(reading, settings=settings),
            settings={**self.settings, "generate": _content(settings)},
        )

    @property
    def shards(self) -> int:
        return -(-self.problems // self.reading.settings.shard_size)

    def settled(self, quarantine: Quarantine, done: set[int]) -> set[int]:
        """Those of the finished shards that these settings leave as they are."""
        allowed = self.reading.settings.on_error == "quarantine"
        return quarantine.settled(done, allowed=allowed)

    def all_there(self, manifest: Manifest) -> Manifest:
        """The manifest; KavaError unless every problem is in the store or named by it, and may
        be missing."""
        left_out = len(quarantined(manifest))
        if left_out and self.reading.settings.on_error == "fail":
            raise KavaError(
                f"the store that is there already leaves {left_out} problems out, and "
                "generate.on_error is `fail`. Set it to `quarantine`, or delete that store."
            )
        if manifest.records + left_out != self.problems:
            raise KavaError(
                f"{self.problems} problems went in, and {manifest.records} are stored and "
                f"{left_out} left out. Delete the unfinished work (`kava clean`), and run the "
                "stage again."
            )
        return manifest

    @classmethod
    def of(cls, problems: Path, teacher: Path, settings: Generate) -> Self:
        source = open_problems(problems)
        examples = source.open("train")
        if not examples:
            raise KavaError(f"{problems} has no training problems. Ask `prepare` for some.")
        check_prompt(source.prompt, teacher, "teacher.json", "kava teacher")
        encoder = trace_encoder(source, teacher, settings)
        model = load_model(str(teacher))
        check_weights(model, teacher, DTYPES[settings.model_dtype])
        check_traces(encoder.encode_parts(examples), model.config.get_text_config(), settings)
        fraction = settings.latent_fraction
        return cls(
            Reading(problems, teacher, settings),
            teacher_spec(model, settings),
            len(examples),
            settings={
                "generate": _content(settings),
                "traces": source.traces,
                **({"latent_fraction": fraction} if fraction < 1 else {}),
                **source.prompt.kept(),
            },
            fingerprints={
                "problems": source.fingerprint("train"),
                "teacher": model_fingerprint(str(teacher)),
                "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
                **chat_fingerprint(source.prompt, encoder.tokenizer),
            },
        )


def _unfit_targets(targets: Targets, endpoint: Tensor, codec: Codec) -> dict[int, str]:
    """Of targets that were cut from caches that are right: too large for their own encoding."""
    empty = (targets.slot_positions < 0)[..., None]
    own = torch.arange(len(endpoint) + 1)
    return not_finite(
        {
            "keys": (targets.keys.masked_fill(empty, 0), codec.keys),
            "values": (targets.values.masked_fill(empty, 0), codec.values),
            "endpoint": (endpoint, codec.endpoint),
        },
        dict.fromkeys(("keys", "values", "endpoint"), own),
    )


def _content(settings: Generate) -> dict[str, Any]:
    """The settings that say what the caches are, not whether they are kept."""
    return settings.model_dump(mode="json", exclude={"keep"})


def stored_caches(spec: StoreSpec, traces: Sequence[Record], cache: TeacherCache) -> CacheBatch:
    """The caches of a shard as a store of this spec gives them back."""
    return CacheBatch.of_records(
        encode(cache.keys.cpu(), spec.codec.keys).dequantise(),
        encode(cache.values.cpu(), spec.codec.values).dequantise(),
        cache.importance.cpu().float(),
        cache.offsets,
        traces,
        _as_stored(spec.rotary),
    )


def _as_stored(rotary: Rotary | None) -> Rotary | None:
    """A rotation as a manifest gives it back."""
    return None if rotary is None else Rotary.from_json(rotary.to_json())


def _write(folder: Path, spec: StoreSpec, found: Read, *, keep: bool) -> None:
    cache = found.cache
    write_teacher_shard(
        folder,
        spec,
        found.shard,
        found.traces,
        keys=cache.keys,
        values=cache.values,
        importance=cache.importance,
        endpoint=cache.endpoint,
        keep=keep,
    )


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def teacher_spec(model: PreTrainedModel, settings: Generate) -> StoreSpec:
    """Of the store of this teacher's caches, before the rotary embedding, of all its layers;
    KavaError if they cannot be recorded."""
    geometry = store_geometry(model.config)
    return StoreSpec(geometry, store_codec(settings), "pre_rope", prove_capture(model))


def store_geometry(config: PreTrainedConfig) -> Geometry:
    """The geometry of a teacher's store, for a model configuration."""
    text = config.get_text_config()
    kv_heads, head_dim = cache_shape(text)
    return Geometry.plain(
        layers=text.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=text.hidden_size,
    )
