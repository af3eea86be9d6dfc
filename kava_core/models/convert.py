"""Safetensors of what torch.save wrote: the one place where a pickle is read."""

from __future__ import annotations

import errno
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kava_core.artefacts import atomic_path, disk_errors, make_folders
from kava_core.errors import KavaError
from kava_core.wording import shorten


def convert_weights(path: Path, destination: Path) -> int:
    """Tensors of a file that torch.save wrote, as safetensors; how many.

    The file is a pickle, read with `weights_only`: tensors and plain containers, no code of it is
    run. KavaError if it holds anything else than names and tensors.
    """
    if destination.exists():
        raise KavaError(f"{destination} is there already. Name another file, or remove it.")
    if not path.is_file():
        raise KavaError(f"{path} is no file. Expected one that torch.save wrote.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch says how to run the file's code all the same
        raise KavaError(
            f"{path} cannot be read as names and tensors: it holds something else than tensors. "
            "Get the file again, or have it saved as safetensors by those who made it."
        ) from None
    except Exception as error:  # what a file that is no state dict makes of it
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise KavaError(
            f"{path} cannot be read as names and tensors ({said[0]:.200}). Get the file again, or "
            "have it saved as safetensors by those who made it."
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise KavaError(
            f"{path}: expected a state dict, names and tensors, found {type(found).__name__} of "
            "something else. Name the file that holds the weights."
        )
    for name, tensor in found.items():
        if (kind := _unusual(tensor)) is not None:
            raise KavaError(
                f"{path}: expected tensors of plain numbers, found {shorten(name)}, which is "
                f"{kind}. Have it saved as safetensors by those who made it."
            )
    # Tied weights are one tensor under two names, which safetensors does not write.
    apart = {name: tensor.clone().contiguous() for name, tensor in found.items()}
    with disk_errors(destination):
        make_folders(destination.parent)
        with atomic_path(destination) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            try:
                save_file(apart, temporary, {"format": "pt"})
            except SafetensorError as error:
                raise OSError(errno.EIO, str(error)) from None
            temporary.chmod(mode)  # as readable as what others write; safetensors' is the owner's
    return len(found)


def _unusual(tensor: Tensor) -> str | None:
    """Why safetensors has no place for a tensor; None if it has."""
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta:
        return "without numbers (meta)"
    if tensor.is_quantized or tensor.dtype is torch.complex128:
        return str(tensor.dtype).removeprefix("torch.")
    return None
