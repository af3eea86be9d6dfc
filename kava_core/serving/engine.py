"""One thread that owns the model, and a bounded queue before it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kava_core.models.thinking import passes_to_think
from kava_core.serving.batch import Batch
from kava_core.serving.meters import Meters
from kava_core.serving.served import Served
from kava_core.serving.text import Text

logger = logging.getLogger("kava.serve")
# Tokens of questions, padding included, that are read at once: more take memory and save no time.
_AT_ONCE = 16_384
_COLDEST = 1e-6  # scores over a temperature below this would not be finite


@dataclass(frozen=True)
class Piece:
    """A part of an answer. finish: `stop` or `length` in its last piece, `error` if there will be
    none, else None; tokens, passes: those of the whole answer, in its last piece."""

    text: str
    finish: str | None = None
    tokens: int = 0
    passes: int = 0


@dataclass(eq=False)
class Job:
    """An answer that is asked for.

    ids: the question's; tell: called with each piece, by the engine's thread; stream: whether there
    are to be pieces before the last; temperature: below 1e-6 it is 0; seed: None for another draw
    each time. See `Sampled`.
    """

    ids: list[int]
    max_tokens: int
    text: Text
    tell: Callable[[Piece], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stream: bool = False
    generator: torch.Generator = field(init=False)
    tokens: int = field(default=0, init=False)
    cancelled: bool = field(default=False, init=False)
    queued: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.temperature < _COLDEST:
            self.temperature = 0.0
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)


class Full(Exception):
    """The queue has no place; try again."""


class Engine:
    """Answers jobs in the order of their coming, up to `max_batch` at a time, while `queue` wait
    for one of these to end."""

    def __init__(self, served: Served, meters: Meters, *, max_batch: int, queue: int) -> None:
        self.served, self.meters = served, meters
        self.max_batch, self.queue = max_batch, queue
        self._batch = Batch(served.system)
        self._jobs: list[Job] = []  # the batch's, in its order
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._ends = served.ends
        self._thinking = passes_to_think(served.system.config)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; jobs that are not done are told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; Full where there is no place for all, in batch and queue."""
        with self._changed:
            wanted = len(self._jobs) + len(self._waiting) + len(jobs)
            if self._stopping or wanted > self.max_batch + self.queue:
                raise Full
            for job in jobs:
                job.queued = time.monotonic()
            self._waiting.extend(jobs)
            self.meters.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their places are free, at once or after this token."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            self.meters.waiting.set(len(self._waiting))

    # --- the engine's thread --------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._jobs or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    for job in (*self._jobs, *self._waiting):
                        job.tell(Piece("", "error"))
                    return
                new = self._next()
                self._jobs += new  # told if the model fails, and counted by `submit`
                self.meters.waiting.set(len(self._waiting))
            try:
                self._cycle(new)
            except Exception:  # whatever a model stumbles over, out of memory among others
                logger.exception("the model failed; %d answers are lost", len(self._jobs))
                for job in self._jobs:
                    job.tell(Piece("", "error"))
                self._jobs = []
                self._batch.clear()
            self.meters.running.set(len(self._jobs))

    def _next(self) -> list[Job]:
        """Those that join now.

        While more wait than there are places, they join a quarter of the batch at a time: thinking
        takes several calls for one as for many, and all others wait for it.
        """
        free = self.max_batch - len(self._jobs)
        if self._jobs and free < min(len(self._waiting), self.max_batch // 4):
            return []
        new: list[Job] = []
        longest = 0
        while self._waiting and len(new) < free:
            longest = max(longest, len(self._waiting[0].ids))
            if new and longest * (len(new) + 1) > _AT_ONCE:
                break
            new.append(self._waiting.popleft())
        return new

    def _cycle(self, new: list[Job]) -> None:
        """New jobs get their first token, then all get their next."""
        if new:
            first = self._batch.admit(new)
            self._count(self._thinking, len(new))
            for job in new:
                self.meters.tokens.labels("question").inc(len(job.ids))
                self.meters.first_token.observe(time.monotonic() - job.queued)
            old = len(self._jobs) - len(new)
            self._leave([True] * old + [self._write(*x) for x in zip(new, first, strict=True)])
        self._leave([not job.cancelled for job in self._jobs])
        if self._jobs:
            tokens = self._batch.step()
            self._count(1, len(self._jobs))
            self.meters.rows.observe(len(self._jobs))
            self._leave([self._write(*x) for x in zip(self._jobs, tokens, strict=True)])

    def _count(self, calls: int, rows: int) -> None:
        self.meters.calls.inc(calls)
        self.meters.passes.inc(calls * rows)

    def _leave(self, stay: list[bool]) -> None:
        self._batch.keep(stay)
        self._jobs = [job for job, stays in zip(self._jobs, stay, strict=True) if stays]

    def _write(self, job: Job, token: int) -> bool:
        """Whether the job goes on after this token."""
        job.tokens += 1
        self.meters.tokens.labels("answer").inc()
        finish, new = None, ""
        if token in self._ends:
            finish = "stop"
        elif job.stream or job.text.stops:
            new = job.text.add(token)
            finish = "stop" if job.text.stopped else None
        else:
            job.text.ids.append(token)
        if finish is None and job.tokens == job.max_tokens:
            finish = "length"
        if finish is not None:
            passes = self._thinking - 1 + job.tokens
            job.tell(Piece(new + job.text.rest(), finish, job.tokens, passes))
        elif new:
            job.tell(Piece(new))
        return finish is None
