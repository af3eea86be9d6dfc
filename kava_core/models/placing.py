"""Where a frozen teacher lies: on one GPU, or, where that is too small for it, over several.

Each layer is computed where its weights are, one after the other, as accelerate's hooks have it; so
several GPUs hold a larger model and are no faster than one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.loading import to_device

# Of a GPU's free memory, what weights may take: a batch and its caches need the rest.
SHARE = 0.8


def place_frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model, in evaluation mode, on what this process sees: the first GPU if it fits there,
    else over all GPUs; on the CPU where there are none. KavaError if all are too small."""
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    return placed(model, free)


def placed(model: PreTrainedModel, free: Sequence[int]) -> PreTrainedModel:
    """`place_frozen`, with as many bytes free on the GPUs."""
    room = [int(SHARE * each) for each in free]
    needed = model.get_memory_footprint()
    if not free or needed <= room[0]:
        return to_device(model)
    if needed > sum(room):
        raise KavaError(
            f"expected GPUs with room for a model of {needed / 1e9:.1f} GB ({SHARE:.0%} of what is "
            f"free there), found {len(free)} with {sum(room) / 1e9:.1f} GB. Give a worker more of "
            "them (resources.gpus_per_worker), or set model_dtype to bfloat16."
        )
    return _spread(model.eval(), room)


def _spread(model: PreTrainedModel, room: Sequence[int]) -> PreTrainedModel:
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError:
        raise KavaError(
            "a model that does not fit one GPU is spread by accelerate, which is not installed. "
            "Run `pip install 'kava[pipeline]'`."
        ) from None
    whole = list(model._no_split_modules or ())
    most = dict(enumerate(room))
    # Evenly first: where every layer but one lies on the first GPU, that one has a batch's load.
    for memory in (get_balanced_memory(model, most, whole), most):
        places = infer_auto_device_map(model, memory, whole)
        if not {"cpu", "disk"} & set(places.values()):
            named = {name: f"cuda:{place}" for name, place in places.items()}
            skipped = getattr(model, "_skip_keys_device_placement", None)
            spread: PreTrainedModel = dispatch_model(
                model, named, main_device="cuda:0", skip_keys=skipped
            )
            return spread
    raise KavaError(
        f"no way was found to spread a model of {model.get_memory_footprint() / 1e9:.1f} GB over "
        f"{len(room)} GPUs, since a layer stays whole. Give a worker more of them "
        "(resources.gpus_per_worker)."
    )
