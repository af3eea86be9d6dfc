"""A model that is kept as adapters on another one, in PEFT's format.

Beside `adapter/` lies the JSON that says what it was made from, with the fingerprint of the model
the adapters belong on: on another one they would compute nonsense without a word.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.models.loading import load_model, model_fingerprint

ADAPTER = "adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_adapted(folder: Path, fingerprint: str, base: str | None = None) -> PreTrainedModel:
    """The model whose adapters are in `folder`, merged, in evaluation mode, on the CPU.

    fingerprint: of the model they belong on. base: where that is; None: where the adapters say,
    which is a Hub id, or a folder as seen from here or from a folder above theirs. KavaError if it
    is not there, is another model, or the adapters do not fit it whole.
    """
    try:
        from peft import PeftModel
        from peft.utils import get_peft_model_state_dict
    except ImportError:
        raise KavaError(
            f"{folder} holds adapters, which PEFT loads, and it is not installed. Install "
            "'kava[pipeline]', or peft alone."
        ) from None
    about = read_json(folder / CONFIG)
    recorded, revision = str(about["base_model_name_or_path"]), about.get("revision")
    place = base or _found(recorded, folder)
    if Path(place).is_dir():
        revision = None
    found = model_fingerprint(place, revision)
    if found != fingerprint:
        raise KavaError(
            f"the adapters in {folder} belong on the model {fingerprint}, and {place} is {found}. "
            "Give the folder of the model they were trained on."
        )
    model = load_model(place, revision=revision)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise KavaError(
            f"no adapters could be loaded from {folder}: {why}. Make them again."
        ) from None
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if names != wanted:
        raise KavaError(
            f"{folder / WEIGHTS} lacks {_some(wanted - names)} and has {_some(names - wanted)} too "
            "much. Make it again."
        )
    merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
    return merged.eval()


def _found(recorded: str, folder: Path) -> str:
    """The folder called `recorded` as seen from here or from above; else the Hub id it must be."""
    above = (parent / recorded for parent in folder.absolute().parents)
    return next((str(path) for path in (Path(recorded), *above) if path.is_dir()), recorded)


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return (
        f"{len(names)} tensors ({', '.join(first)}{', …' if len(names) > 3 else ''})"
        if names
        else "none"
    )
