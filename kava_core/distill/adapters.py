"""Low-rank adapters on a causal LM: put on before training, folded in or kept when it is over."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.models.adapted import ADAPTER, CONFIG, WEIGHTS, Base
from kava_core.settings import LoRA


def add_lora(model: PreTrainedModel, settings: LoRA, *, seed: int, path: str) -> PeftModel:
    """Freeze a causal LM and put adapters on its modules, in place.

    seed: of the adapters' first weights. path: of the training's settings, for messages. Call
    `end_lora` with the result when training is over. KavaError naming the targets that fit no
    module of the model, and what there is.
    """
    _check_targets(model, settings.targets, path)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cast(PeftModel, get_peft_model(model, config))
    except ValueError:
        raise _misfit(model, settings.targets, path) from None


def end_lora(adapters: PeftModel, settings: LoRA, folder: Path, base: Base) -> PreTrainedModel:
    """The trained model, merged; its adapters are in `folder` where the settings keep them."""
    if settings.save != "merged":
        save_adapters(folder / ADAPTER, adapters, base)
    return merge_lora(adapters)


def merge_lora(adapters: PeftModel) -> PreTrainedModel:
    """The model with the adapters folded into its weights; nothing of them is left in it."""
    return cast(PreTrainedModel, adapters.merge_and_unload())


def save_adapters(folder: Path, adapters: PeftModel, base: Base) -> None:
    """Write PEFT's own format and what they belong on, as `kava_core.models.adapted` reads them.

    The bytes depend on the adapters and `base` alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config = adapters.peft_config["default"].to_dict() | {
        "base_model_name_or_path": base.model,
        "revision": base.commit,
        "inference_mode": True,
    }
    # PEFT keeps names in sets, whose order differs from process to process.
    plain = {key: sorted(x) if isinstance(x, set) else x for key, x in config.items()}
    write_json(folder / CONFIG, plain)
    base.write(folder)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # as readable as the rest


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...], path: str) -> None:
    names = [name for name, _ in model.named_modules()]
    missing = tuple(
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in names)
    )
    if missing:
        raise _misfit(model, missing, path)
    if model.config.get_text_config().tie_word_embeddings:
        tied = (model.get_input_embeddings(), model.get_output_embeddings())
        chosen = {name for name, module in model.named_modules() if module in tied}
        if wrong := [t for t in targets if any(f".{name}".endswith(f".{t}") for name in chosen)]:
            raise KavaError(
                f"{path}.lora.targets {wrong} are the embeddings of {model.config.model_type}, "
                "which its input and its LM head share: adapters on one would change the other "
                "when they are merged. Leave them out."
            )


def _misfit(model: PreTrainedModel, targets: tuple[str, ...], path: str) -> KavaError:
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    return KavaError(
        f"{path}.lora.targets {list(targets)} fit no module of {model.config.model_type} that can "
        f"have adapters. Choose among {', '.join(sorted(there))}."
    )
