"""teacher_kv ← problems, teacher: the frozen teacher's caches over the training traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kava_core.artefacts import work_folder
from kava_core.errors import KavaError
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
from kava_core.models.teacher_pass import TeacherPass, check_lengths, over
from kava_core.problems.folder import ProblemFolder, open_problems
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Generate, Resources
from kava_core.store import Geometry, StoreSpec, write_teacher_shard
from kava_core.targets.build import Build, ShardCounts, build_store
from kava_core.targets.specs import store_codec


@dataclass(frozen=True)
class GenerateJob:
    """Shard k: the teacher's pass over problems [k·S, (k+1)·S), written into `folder`."""

    problems: Path
    teacher: Path
    folder: Path
    settings: Generate
    spec: StoreSpec

    @property
    def threads(self) -> int:
        return self.settings.threads

    def open(self) -> Callable[[int], ShardCounts]:
        settings = self.settings
        source = open_problems(self.problems)
        problems = source.load("train")
        encoder = trace_encoder(source, self.teacher, settings)
        model = to_device(load_model(str(self.teacher), DTYPES[settings.model_dtype]))
        teacher = TeacherPass(model)

        def work(shard: int) -> ShardCounts:
            first = shard * settings.shard_size
            traces = encoder.encode_all(problems[first : first + settings.shard_size])
            cache = over(teacher, traces, settings.batch_size)
            write_teacher_shard(
                self.folder,
                self.spec,
                shard,
                traces,
                keys=cache.keys,
                values=cache.values,
                importance=cache.importance,
                endpoint=cache.endpoint,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return ShardCounts(examples=len(traces), tokens=len(cache.keys))

        return work


def build_teacher_kv(
    problems: Path, teacher: Path, settings: Generate, output: Path, resources: Resources
) -> Build:
    """Run the teacher over the training problems; the store is built in the work of `output`.

    problems, teacher: folders of those artefacts. KavaError if there is nothing to read, and for a
    trace that the teacher cannot hold, before it reads any.
    """
    source = open_problems(problems)
    examples = source.load("train")
    if not examples:
        raise KavaError(f"{problems} has no training problems. Ask `prepare` for some.")
    encoder = trace_encoder(source, teacher, settings)
    traces = encoder.encode_all(examples)
    model = load_model(str(teacher))
    check_lengths(traces, model.config.get_text_config())
    spec = teacher_spec(model, settings)
    del model
    plain = settings.model_dump(mode="json")
    fingerprints = {
        "problems": source.fingerprint("train"),
        "teacher": model_fingerprint(str(teacher)),
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
    }
    folder = work_folder(output, "generate", {"settings": plain, "inputs": fingerprints}) / "output"
    fraction = settings.latent_fraction
    return build_store(
        GenerateJob(problems, teacher, folder, settings, spec),
        -(-len(examples) // settings.shard_size),
        settings={
            "generate": plain,
            "traces": source.traces,
            **({"latent_fraction": fraction} if fraction < 1 else {}),
        },
        fingerprints=fingerprints,
        resources=resources,
    )


def trace_encoder(source: ProblemFolder, teacher: Path, settings: Generate) -> TraceEncoder:
    """What makes traces of problems for the teacher, cut where latents end."""
    tokenizer = load_tokenizer(str(teacher))
    return TraceEncoder(tokenizer, source.traces, settings.latent_fraction)


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
