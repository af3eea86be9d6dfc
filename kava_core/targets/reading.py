"""The teacher's pass over the problems, shard by shard, and what it cannot read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.loading import DTYPES, load_model, load_tokenizer
from kava_core.models.placing import place_frozen
from kava_core.models.teacher_pass import (
    TeacherCache,
    TeacherPass,
    chosen_records,
    over,
    too_long,
)
from kava_core.problems.folder import ProblemFolder, open_problems
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.settings import Generate
from kava_core.store import Codec
from kava_core.targets.build import ShardCounts
from kava_core.targets.quarantine import LEAVE_OUT, not_finite, refuse
from kava_core.targets.specs import store_codec

REMEDY = (
    "Check the teacher and its dtype (generate.model_dtype), keep what is too large in a wider one "
    "(half: bfloat16, or 32 bits)"
)


@dataclass(frozen=True)
class Reading:
    """The teacher's pass over problems [k·S, (k+1)·S), for every shard k."""

    problems: Path
    teacher: Path
    settings: Generate

    def open(self) -> Callable[[int], Read]:
        """Load the teacher; what is returned reads a shard."""
        settings = self.settings
        source = open_problems(self.problems)
        problems = source.open_unchecked("train")
        encoder = trace_encoder(source, self.teacher, settings)
        teacher, codec = self._load(), store_codec(settings)
        config = teacher.model.config.get_text_config()

        def read(shard: int) -> Read:
            first = shard * settings.shard_size
            traces = encoder.encode_all(problems[first : first + settings.shard_size])
            long = {place: error.reason for place, error in too_long(traces, config)}
            left_out = {traces[place].id: reason for place, reason in long.items()}
            held = [trace for place, trace in enumerate(traces) if place not in long]
            if not held:
                raise _nothing_left(shard, left_out)
            found = Read(shard, held, over(teacher, held, settings.rows), left_out)
            return self.sift(found, _unfit_caches(found.cache, codec))

        return read

    def teacher_and_traces(self, places: Sequence[int]) -> tuple[TeacherPass, list[Record]]:
        """The teacher, loaded, and the traces of the problems at these places."""
        source = open_problems(self.problems)
        encoder = trace_encoder(source, self.teacher, self.settings)
        problems = source.open_unchecked("train")
        return self._load(), encoder.encode_all([problems[place] for place in places])

    def _load(self) -> TeacherPass:
        dtype = DTYPES[self.settings.model_dtype]
        return TeacherPass(place_frozen(load_model(str(self.teacher), dtype)))

    def sift(self, read: Read, unfit: dict[int, str]) -> Read:
        """The same without records that cannot be kept (row → why); KavaError where the settings
        do not leave any out, or none is left."""
        if self.settings.on_error == "fail":
            refuse(f"shard {read.shard}", read.traces, unfit, REMEDY)
        return read.without(unfit) if unfit else read


@dataclass(frozen=True)
class Read:
    """A shard as the teacher has read it: its traces, and their caches.

    left_out: id → why, of the shard's problems that are not among the traces.
    """

    shard: int
    traces: list[Record]
    cache: TeacherCache
    left_out: dict[str, str]

    @property
    def counts(self) -> ShardCounts:
        return ShardCounts(examples=len(self.traces), tokens=len(self.cache.keys))

    def off_device(self) -> Read:
        """The same in the memory of the machine, so that the device has room for the next one."""
        cache = self.cache
        parts = {part.name: getattr(cache, part.name).cpu() for part in fields(cache)}
        return replace(self, cache=TeacherCache(**parts))

    def without(self, unfit: dict[int, str]) -> Read:
        """KavaError if nothing is left."""
        rows = [row for row in range(len(self.traces)) if row not in unfit]
        left_out = self.left_out | {self.traces[row].id: why for row, why in unfit.items()}
        if not rows:
            raise _nothing_left(self.shard, left_out)
        traces = [self.traces[row] for row in rows]
        return Read(self.shard, traces, chosen_records(self.cache, rows), left_out)


def _nothing_left(shard: int, left_out: dict[str, str]) -> KavaError:
    name, reason = next(iter(left_out.items()))
    return KavaError(
        f"generate.on_error: quarantine would leave out all {len(left_out)} records of shard "
        f"{shard}, the first {name!r}: {reason}. A shard needs a record: mend the teacher, or set "
        "another generate.shard_size."
    )


def _unfit_caches(cache: TeacherCache, codec: Codec) -> dict[int, str]:
    own = torch.arange(len(cache.endpoint) + 1)
    return not_finite(
        {
            "importance": (cache.importance, "float32"),
            "keys": (cache.keys, codec.keys),
            "values": (cache.values, codec.values),
            "endpoint": (cache.endpoint, codec.endpoint),
        },
        {"endpoint": own, **dict.fromkeys(("importance", "keys", "values"), cache.offsets)},
    )


def trace_encoder(source: ProblemFolder, teacher: Path, settings: Generate) -> TraceEncoder:
    """What makes traces of problems for the teacher, cut where latents end."""
    tokenizer = load_tokenizer(str(teacher))
    return TraceEncoder(tokenizer, source.traces, settings.latent_fraction, source.prompt)


def check_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """KavaError that names the first weight with numbers that are not finite in `dtype`."""
    for name, weight in model.named_parameters():
        wrong = int((~weight.to(dtype).isfinite()).sum())
        if wrong:
            kept = str(dtype).removeprefix("torch.")
            raise KavaError(
                f"the teacher in {folder} has {wrong} of {weight.numel()} numbers of {name} that "
                f"are NaN or infinite in {kept}. Mend the teacher, or set a wider "
                "generate.model_dtype."
            )


def check_traces(
    parts: Iterable[Sequence[Record]], config: PreTrainedConfig, settings: Generate
) -> None:
    """Go through all traces before any is read; KavaErrors are those of their encoder.

    Where none is to be left out, a KavaError also names the first that the teacher cannot hold,
    and counts them.
    """
    first, count, of = None, 0, 0
    for part in parts:
        errors = [error for _, error in too_long(part, config)]
        first = first or next(iter(errors), None)
        count += len(errors)
        of += len(part)
    if first is not None and settings.on_error == "fail":
        raise KavaError(f"{first} {count} of {of} problems are too long: mend that, {LEAVE_OUT}.")
