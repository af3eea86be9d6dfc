"""teacher_kv ← problems, teacher: the frozen teacher's caches over the training traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.artefacts import publish, work_folder
from kava_core.console import progress, say
from kava_core.errors import KavaError
from kava_core.problems.folder import open_problems
from kava_core.settings import Generate

from .run import Run, stage, store_codec


@dataclass(frozen=True)
class GenerateJob:
    """Shard k: the teacher's pass over problems [k·S, (k+1)·S), written into `folder`."""

    problems: Path
    teacher: Path
    folder: Path
    settings: Generate

    @property
    def threads(self) -> int:
        return self.settings.threads

    def open(self) -> Callable[[int], dict[str, Any]]:
        import torch

        from kava_core.models.loading import DTYPES, load_model, load_tokenizer, to_device
        from kava_core.models.teacher_pass import TeacherPass, over
        from kava_core.problems.traces import TraceEncoder
        from kava_core.store import write_teacher_shard

        settings = self.settings
        source = open_problems(self.problems)
        problems = source.load("train")
        encoder = TraceEncoder(
            load_tokenizer(str(self.teacher)), source.traces, source.latent_fraction
        )
        model = to_device(load_model(str(self.teacher), DTYPES[settings.model_dtype]))
        teacher = TeacherPass(model)
        geometry, codec = store_geometry(model.config), store_codec(settings)

        def work(shard: int) -> dict[str, Any]:
            first = shard * settings.shard_size
            traces = encoder.encode_all(problems[first : first + settings.shard_size])
            cache = over(teacher, traces, settings.batch_size)
            write_teacher_shard(
                self.folder,
                shard,
                traces,
                keys=cache.keys.cpu(),
                values=cache.values.cpu(),
                importance=cache.importance.cpu(),
                endpoint=cache.endpoint.cpu(),
                geometry=geometry,
                codec=codec,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return {"examples": len(traces), "tokens": len(cache.keys)}

        return work


@stage
def generate(run: Run) -> None:
    """Run the frozen teacher over the training traces and store its caches.

    Writes teacher_kv/: pre-RoPE keys and values of the chain of thought, the answer's attention to
    it and the endpoint hidden states, in shards with an index, a manifest and checksums. Killed and
    run again, it redoes only the shards that were not finished.
    """
    from kava_core.models.loading import (
        load_model,
        load_tokenizer,
        model_fingerprint,
        tokenizer_fingerprint,
    )
    from kava_core.models.phase import rotary_of
    from kava_core.models.teacher_pass import check_lengths
    from kava_core.parallel.shards import run_shards
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store import finalise, finished_shards

    settings = run.settings.generate
    source, teacher = open_problems(run.path("problems")), run.path("teacher")
    tokenizer = load_tokenizer(str(teacher))
    fingerprints = {
        "problems": source.fingerprint("train"),
        "teacher": model_fingerprint(str(teacher)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    problems = source.load("train")
    if not problems:
        raise KavaError(f"{source.path} has no training problems. Ask `prepare` for some.")
    encoder = TraceEncoder(tokenizer, source.traces, source.latent_fraction)
    traces = encoder.encode_all(problems)
    model = load_model(str(teacher))
    check_lengths(traces, model.config.get_text_config())
    rotary, geometry = rotary_of(model), store_geometry(model.config)
    del model

    output = run.path("teacher_kv")
    work = work_folder(
        output, "generate", {"settings": settings.model_dump(mode="json"), "inputs": fingerprints}
    )
    folder = work / "output"
    folder.mkdir(exist_ok=True)
    shards = -(-len(problems) // settings.shard_size)
    done = finished_shards(folder)
    todo = sorted(set(range(shards)) - done)
    if done:
        say(f"generate: {len(done)} of {shards} shards are finished already")
    job = GenerateJob(source.path, teacher, folder, settings)
    resources = run.settings.resources
    began, examples, tokens = time.perf_counter(), 0, 0
    with progress() as display:
        task = display.add_task("generate (shards)", total=shards, completed=len(done), note="")
        for _, result in run_shards(
            job,
            todo,
            workers=resources.workers,
            cpus_per_worker=resources.cpus_per_worker,
            gpus_per_worker=resources.gpus_per_worker,
        ):
            examples, tokens = examples + result["examples"], tokens + result["tokens"]
            seconds = time.perf_counter() - began
            rate = f"{examples / seconds:.0f} examples/s, {tokens / seconds:.0f} CoT tokens/s"
            display.update(task, advance=1, note=f"{examples} examples, {rate}")
    manifest = finalise(
        folder,
        "teacher_kv",
        shards=shards,
        geometry=geometry,
        codec=store_codec(settings),
        rotary_phase="pre_rope",
        rotary=rotary,
        settings={
            "generate": settings.model_dump(mode="json"),
            "traces": source.traces,
            **({"latent_fraction": source.latent_fraction} if source.latent_fraction < 1 else {}),
        },
        fingerprints=fingerprints,
    )
    publish((folder, output))
    seconds = time.perf_counter() - began
    say(
        f"teacher_kv: {manifest.records} records, {manifest.trace_tokens} CoT tokens in {shards} "
        f"shards; {examples / seconds:.0f} examples/s, {tokens / seconds:.0f} CoT tokens/s"
    )


def store_geometry(config: Any) -> Any:
    """The store's geometry for a model configuration."""
    from kava_core.models.loading import cache_shape
    from kava_core.store import Geometry

    text = config.get_text_config()
    kv_heads, head_dim = cache_shape(text)
    return Geometry.plain(
        layers=text.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=text.hidden_size,
    )
