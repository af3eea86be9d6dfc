"""teacher_kv ← problems, teacher: the frozen teacher's caches over the training traces; or, where
nobody keeps them, kv_targets at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kava_core.artefacts import work_folder
from kava_core.errors import KavaError
from kava_core.eviction import CacheBatch
from kava_core.models.loading import (
    DTYPES,
    cache_shape,
    load_model,
    load_tokenizer,
    model_fingerprint,
    to_device,
    tokenizer_fingerprint,
)
from kava_core.models.proofs import prove_capture
from kava_core.models.teacher_pass import TeacherCache, TeacherPass, check_lengths, over
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import ProblemFolder, open_problems
from kava_core.problems.prompt import check_prompt
from kava_core.problems.traces import TraceEncoder, chat_fingerprint
from kava_core.record import Record
from kava_core.rotary import Rotary
from kava_core.settings import Evict, Generate, Resources
from kava_core.store import (
    Geometry,
    Manifest,
    StoreSpec,
    finalise,
    finished_shards,
    merged_manifest,
    noted_shards,
    write_targets_shard,
    write_teacher_shard,
)
from kava_core.store.codec import encode
from kava_core.targets.build import Build, ShardCounts, build_store
from kava_core.targets.evict import targets_spec
from kava_core.targets.plan import Plan
from kava_core.targets.specs import store_codec
from kava_core.versions import VERSIONS


@dataclass(frozen=True)
class Reading:
    """The teacher's pass over problems [k·S, (k+1)·S), for every shard k."""

    problems: Path
    teacher: Path
    settings: Generate

    def open(self) -> Callable[[int], tuple[list[Record], TeacherCache]]:
        """Load the teacher; what is returned reads a shard: its traces, and their caches."""
        settings = self.settings
        source = open_problems(self.problems)
        problems = source.open("train")
        encoder = trace_encoder(source, self.teacher, settings)
        model = to_device(load_model(str(self.teacher), DTYPES[settings.model_dtype]))
        teacher = TeacherPass(model)

        def read(shard: int) -> tuple[list[Record], TeacherCache]:
            first = shard * settings.shard_size
            traces = encoder.encode_all(problems[first : first + settings.shard_size])
            return traces, over(teacher, traces, settings.batch_size)

        return read


@dataclass(frozen=True)
class GenerateJob:
    """Shard k of the teacher's caches, written into `folder`."""

    reading: Reading
    folder: Path
    spec: StoreSpec

    @property
    def threads(self) -> int:
        return self.reading.settings.threads

    def open(self) -> Callable[[int], ShardCounts]:
        read = self.reading.open()

        def work(shard: int) -> ShardCounts:
            traces, cache = read(shard)
            _write(self.folder, self.spec, shard, traces, cache, keep=True)
            _empty_cache()
            return ShardCounts(examples=len(traces), tokens=len(cache.keys))

        return work


@dataclass(frozen=True)
class CutJob:
    """Shard k of the targets, cut from caches that are not kept.

    notes: a folder for what is noted of each shard of the caches; caches: what they would be
    stored as. folder, spec: of the targets.
    """

    reading: Reading
    notes: Path
    caches: StoreSpec
    folder: Path
    plan: Plan
    spec: StoreSpec

    @property
    def threads(self) -> int:
        return self.reading.settings.threads

    def open(self) -> Callable[[int], ShardCounts]:
        read = self.reading.open()

        def work(shard: int) -> ShardCounts:
            traces, cache = read(shard)
            _write(self.notes, self.caches, shard, traces, cache, keep=False)
            with torch_threads(self.plan.settings.threads):
                targets = self.plan.cut(stored_caches(self.caches, traces, cache))
            write_targets_shard(
                self.folder,
                self.spec,
                shard,
                traces,
                keys=targets.keys,
                values=targets.values,
                slot_counts=targets.slot_counts,
                slot_positions=targets.slot_positions,
                endpoint=encode(cache.endpoint.cpu(), self.caches.codec.endpoint).dequantise(),
            )
            _empty_cache()
            return ShardCounts(examples=len(traces), tokens=len(cache.keys))

        return work


def build_teacher_kv(
    problems: Path, teacher: Path, settings: Generate, output: Path, resources: Resources
) -> Build:
    """Run the teacher over the training problems; the store is built in the work of `output`.

    problems, teacher: folders of those artefacts. KavaError if there is nothing to read, and for a
    trace that the teacher cannot hold, before it reads any.
    """
    made = _Caches.of(problems, teacher, settings)
    key = {"settings": _content(settings), "inputs": made.fingerprints}
    folder = work_folder(output, "generate", key) / "output"
    folder.mkdir(exist_ok=True)
    return build_store(
        GenerateJob(made.reading, folder, made.spec),
        made.shards,
        done=finished_shards(folder),
        finish=partial(
            finalise,
            folder,
            made.spec,
            shards=made.shards,
            settings=made.settings,
            fingerprints=made.fingerprints,
        ),
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
    work = work_folder(output, "generate", key)
    notes, folder = work / "notes", work / "output"
    for each in (notes, folder):
        each.mkdir(exist_ok=True)

    def caches() -> Iterator[CacheBatch]:
        with torch_threads(settings.threads):
            read = made.reading.open()
            for shard in range(made.shards):
                yield stored_caches(made.spec, *read(shard))

    spec = targets_spec(plan, _as_stored(made.spec.rotary), caches())

    def finish() -> Manifest:
        described = merged_manifest(
            notes,
            made.spec,
            shards=made.shards,
            settings=made.settings,
            fingerprints=made.fingerprints,
        )
        return finalise(
            folder,
            spec,
            shards=made.shards,
            settings={**made.settings, "evict": plain},
            fingerprints={**made.fingerprints, "teacher_kv": described.digest},
        )

    return build_store(
        CutJob(made.reading, notes, made.spec, folder, plan, spec),
        made.shards,
        done=finished_shards(folder) & noted_shards(notes),
        finish=finish,
        resources=resources,
    )


@dataclass(frozen=True)
class _Caches:
    """What is known of a store of caches before the teacher reads anything."""

    reading: Reading
    spec: StoreSpec
    shards: int
    settings: dict[str, Any]
    fingerprints: dict[str, str]

    @classmethod
    def of(cls, problems: Path, teacher: Path, settings: Generate) -> Self:
        source = open_problems(problems)
        examples = source.open("train")
        if not examples:
            raise KavaError(f"{problems} has no training problems. Ask `prepare` for some.")
        check_prompt(source.prompt, teacher, "teacher.json", "kava teacher")
        encoder = trace_encoder(source, teacher, settings)
        model = load_model(str(teacher))
        for traces in encoder.encode_parts(examples):
            check_lengths(traces, model.config.get_text_config())
        fraction = settings.latent_fraction
        return cls(
            Reading(problems, teacher, settings),
            teacher_spec(model, settings),
            -(-len(examples) // settings.shard_size),
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


def _write(
    folder: Path,
    spec: StoreSpec,
    shard: int,
    traces: Sequence[Record],
    cache: TeacherCache,
    *,
    keep: bool,
) -> None:
    write_teacher_shard(
        folder,
        spec,
        shard,
        traces,
        keys=cache.keys,
        values=cache.values,
        importance=cache.importance,
        endpoint=cache.endpoint,
        keep=keep,
    )


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trace_encoder(source: ProblemFolder, teacher: Path, settings: Generate) -> TraceEncoder:
    """What makes traces of problems for the teacher, cut where latents end."""
    tokenizer = load_tokenizer(str(teacher))
    return TraceEncoder(tokenizer, source.traces, settings.latent_fraction, source.prompt)


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
