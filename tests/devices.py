"""Several devices, pretended: tensors lie on the CPU, and each says that it is on one of them.

Torch is asked through its function mode: what moves a tensor copies it and notes where it is then,
and an operation on tensors of several devices fails as it would with real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu)
DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]


class PretendedDevices(TorchFunctionMode):
    """Inside this context `cuda:0`, `cuda:1` … are devices. seen: those that tensors were on."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, torch.device] = {}  # memory of a tensor → where it is said to be
        self.seen: set[torch.device] = set()

    def where(self, x: Tensor) -> torch.device:
        return self.places.get(x.untyped_storage().data_ptr(), CPU)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == DEVICE:
            return self.where(args[0])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = None
        if func in MOVES:
            args, kwargs, target = self._target(func, args, kwargs)
            func = Tensor.to
        elif kwargs.get("device") is not None:
            target, kwargs["device"] = _device(kwargs["device"]), CPU
        found = {self.where(x) for x in tensors if x.ndim and x.numel()}
        if target is None and len(found) > 1:
            name = getattr(func, "__name__", func)
            raise RuntimeError(
                f"{name}: expected tensors of one device, found {sorted(map(str, found))}"
            )
        home = target or next(iter(found), CPU)
        before = {x.untyped_storage().data_ptr() for x in tensors}
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in before:
                self.places[x.untyped_storage().data_ptr()] = home
                self.seen.add(home)
        return result

    def _target(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, torch.device | None]:
        """The same call without a device, which copies where the tensor is elsewhere."""
        x, *rest = args
        if func is not Tensor.to:
            target, rest = torch.device("cpu" if func is Tensor.cpu else "cuda:0"), []
            kwargs = {}
        else:
            named = kwargs.pop("device", None)
            first = next((a for a in rest if _is_device(a)), None)
            other = next((a for a in rest if isinstance(a, Tensor)), None)
            if other is not None:
                return (x,), {"dtype": other.dtype, "copy": True}, self.where(other)
            target = named if named is not None else first
            rest = [a for a in rest if not _is_device(a)]
            target = None if target is None else _device(target)
        if target is not None and target != self.where(x):
            kwargs["copy"] = True
        if not rest and not kwargs:
            kwargs = {"dtype": x.dtype}
        return (x, *rest), kwargs, target


def _is_device(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) or type(value) is int


def _device(value: Any) -> torch.device:
    device = torch.device("cuda", value) if type(value) is int else torch.device(value)
    return torch.device("cuda:0") if str(device) == "cuda" else device
