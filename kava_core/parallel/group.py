"""The processes that train one model together; alone, a process is a group of one.

Thin words for torch.distributed, which has no answer where no group was set up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kava_core.errors import KavaError

Value = TypeVar("Value")


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def mean(x: Tensor) -> Tensor:
    """The mean of x, of one shape everywhere, over all processes; x itself in a group of one."""
    if size() == 1:
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total / size()


def any_of(flag: bool) -> bool:
    """Whether the flag is up in any process."""
    return flag if size() == 1 else bool(mean(torch.tensor(float(flag), device=_device())))


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in the first process, which alone calls it; a KavaError is everybody's."""
    if size() == 1:
        return make()
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [make()]
        except KavaError as error:
            outcome = [error]
    distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], KavaError):
        raise outcome[0]
    return outcome[0]


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        distributed.barrier()


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
