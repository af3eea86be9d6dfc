"""A model that is kept as adapters on another one, in PEFT's own format.

Its folder has a configuration and a tokenizer but no weights; `adapter/` holds what PEFT reads, and
`base.json` with the fingerprint of the model that the adapters belong on: on another one they would
compute nonsense without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import StringConstraints, ValidationError
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from kava_core.artefacts import file_digest, read_json, write_json
from kava_core.errors import KavaError
from kava_core.findings.base import Finding
from kava_core.models.inspection import check_files
from kava_core.wording import LONGEST_MESSAGE, shorten, shown

ADAPTER = "adapter"
WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
# Of adapter_config.json, what is not at PEFT's default.
SETTINGS = (
    *("task_type", "target_modules", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("use_rslora", "use_dora"),
)
Word = Annotated[str, StringConstraints(max_length=100)]


class Base(Finding):
    """base.json: the model that adapters belong on.

    model: a folder, as seen from the project it lies in, or a Hub id with its commit. fingerprint:
    `kava_core.models.loading.model_fingerprint`.
    """

    model: Annotated[str, StringConstraints(max_length=1000)]
    commit: Word | None
    fingerprint: Word

    def write(self, adapter: Path) -> None:
        write_json(adapter / BASE, self.model_dump())

    @classmethod
    def read(cls, adapter: Path) -> Base:
        """KavaError if the file is missing or holds anything else."""
        path = adapter / BASE
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            raise KavaError(
                f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Make the adapters "
                "again."
            ) from None

    def place(self, folder: Path) -> str:
        """Where the model of `folder` finds its base: the folder of that name, as seen from one
        above `folder` or from here; else it is a Hub id."""
        above = (str(parent / self.model) for parent in folder.absolute().parents)
        return next(filter(is_folder, (*above, self.model)), self.model)

    def check(self, folder: Path, place: str, found: str) -> None:
        """KavaError if the model at `place`, whose fingerprint is `found`, is another one."""
        if found != self.fingerprint:
            raise KavaError(
                f"the adapters in {folder} belong on the model {self.fingerprint}, and {place} is "
                f"{found}. Put the model they were trained on there, or give it as their base "
                "(--base)."
            )


def is_folder(path: str) -> bool:
    """Whether there is one of that name, which may be one that no folder can have."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def adapters_in(path: str) -> Path | None:
    """`adapter/` of a model that is kept as adapters; None for one with weights of its own.

    KavaError if it holds what should not be read, or lacks weights.
    """
    folder = Path(path)
    adapter = folder / ADAPTER
    if not (adapter / CONFIG).exists() or any(folder.glob("model*.safetensors")):
        return None
    check_files(adapter)
    if not (adapter / WEIGHTS).is_file():
        raise KavaError(
            f"{adapter / WEIGHTS} is missing, and {CONFIG} beside it says that there are adapters. "
            "Copy or make them again."
        )
    return adapter


def adapters_fingerprint(adapter: Path) -> dict[str, Any]:
    """What determines the weights: those of the adapters, how they are added, and to what."""
    settings = read_json(adapter / CONFIG)
    settings.pop("peft_version", None)
    for name in ("base_model_name_or_path", "revision"):  # where it lay, not what it is
        settings.pop(name, None)
    base = Base.read(adapter).fingerprint
    return {"adapters": file_digest(adapter / WEIGHTS), "settings": settings, "base": base}


def put_on(model: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """`model`, which is theirs, with the adapters folded into its weights, which become `dtype`.

    KavaError if they do not fit it whole.
    """
    try:
        from peft import PeftConfig, PeftModel
        from peft.utils import get_peft_model_state_dict
    except ImportError:
        raise KavaError(
            f"{adapter} holds adapters, which PEFT loads, and it is not installed. Run "
            "`pip install peft`."
        ) from None
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
        config = PeftConfig.from_pretrained(str(adapter))
        _check_lora(config)
        # They are read into no tensors that would be made first, of whatever rank is asked for.
        adapted = PeftModel.from_pretrained(
            model, str(adapter), config=config, low_cpu_mem_usage=True
        )
        generation = None
        if (adapter.parent / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(adapter.parent)
    except Exception as error:  # whatever foreign files make PEFT stumble over
        said = str(error).strip().splitlines() or [type(error).__name__]
        why = shorten(said[0].rstrip("."), LONGEST_MESSAGE // 2)
        raise KavaError(
            f"no adapters could be loaded from {adapter}: {why}. Make them again."
        ) from None
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if names != wanted:
        raise KavaError(
            f"{adapter / WEIGHTS} should have {len(wanted)} tensors for this model, and has "
            f"{len(names)}; of one only: {shorten(', '.join(sorted(wanted ^ names)[:3]), 300)}. "
            "Make it again."
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    for parameter in merged.parameters():  # not `to(dtype)`, which rounds rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    merged.config.dtype = dtype
    if generation is not None:
        merged.generation_config = generation
    return merged.eval()


def _check_lora(config: Any) -> None:
    """ValueError for settings that none of ours has: there are some that grow the model, search it
    for any expression, or import what they name."""
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in SETTINGS and value != usual.get(name):
            raise ValueError(f"{name} in {CONFIG} cannot be {shown(value)}")
    if not isinstance(config.target_modules, set):
        raise ValueError(f"expected a list of names as target_modules in {CONFIG}")
