"""What computes: a GPU for each worker and each training process where there are any, else the CPU.

In Ray an actor that asks for no GPU sees all of them and would take the first, as every other one
does. So a share is always asked for, and who has none is shown none.
"""

from __future__ import annotations

import torch

from kava_core.errors import KavaError
from kava_core.settings.base import Device

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # the environment of a process that is to see none


def gpu_share(device: Device, asked: float | None, visible: float) -> float:
    """The share of a GPU that each worker gets, where `visible` GPUs are to be had.

    asked: None for a whole one where there are any. KavaError for a share of 0 beside a GPU, which
    all workers would take at once.
    """
    if device == "cpu":
        return 0
    if asked is None:
        return 1 if visible else 0
    if not asked and visible:
        raise KavaError(
            f"resources.gpus_per_worker is 0 beside visible GPUs ({visible:g}): all workers would "
            "take the same one. Leave it out, for a GPU each, or set resources.device to cpu."
        )
    return asked


def check_own_gpu(device: Device, asked: float | None) -> None:
    """For work in this process, which takes the first GPU that it sees; KavaError as `gpu_share`'s
    for the GPUs of this machine."""
    gpu_share(device, asked, torch.cuda.device_count())
