"""The same weights in another sharding are the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kava_core.artefacts import file_digest
from kava_core.errors import KavaError
from kava_core.models.loading import load_model, model_fingerprint
from kava_core.models.sharding import joined_digest
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", ["llama", "llama-tied-scaled", "gpt2"])
def test_a_fingerprint_does_not_depend_on_how_weights_are_cut(tmp_path: Path, name: str) -> None:
    model = tiny_model(name, torch.float32)
    model.save_pretrained(tmp_path / "one")
    for limit in ("8KB", "40KB"):
        folder = tmp_path / limit
        model.save_pretrained(folder, max_shard_size=limit)
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert model_fingerprint(str(folder)) == model_fingerprint(str(tmp_path / "one"))
        load_model(str(folder))


def test_another_tensor_is_another_model(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert model_fingerprint(str(tmp_path / "one")) != model_fingerprint(str(tmp_path / "two"))


def test_what_is_hashed_is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3.0),
        "a": torch.arange(4, dtype=torch.bfloat16),
        'é \\ "': torch.ones(2, 0),
        "c": torch.ones(5, dtype=torch.int64),
        "d": torch.tensor([True]),
        "e": torch.ones(3, dtype=torch.float16),
        "f": torch.ones(3, dtype=torch.uint8),
        "g": torch.ones(2, dtype=torch.float64),
        "h": torch.ones((), dtype=torch.int32),
        "i": torch.ones(3, dtype=torch.float8_e4m3fn),
        "j": torch.ones(3, dtype=torch.float8_e5m2),
        "k": torch.ones(3, dtype=torch.int8),
        "l": torch.ones(3, dtype=torch.int16),
    }
    save_file(tensors, tmp_path / "whole", {"format": "pt"})
    pieces = []
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        pieces.append(tmp_path / f"piece-{i}")
        save_file({name: tensors[name] for name in names}, pieces[-1])
    assert joined_digest(pieces) == file_digest(tmp_path / "whole")
    assert joined_digest(pieces[::-1]) == file_digest(tmp_path / "whole")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "one")
    shutil.copyfile(tmp_path / "one", tmp_path / "two")
    with pytest.raises(KavaError, match="holds the tensor a, and so does one"):
        joined_digest([tmp_path / "one", tmp_path / "two"])
    content = (tmp_path / "one").read_bytes()
    header = {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    for wrong in (
        content[:-1],
        content[:12],
        b"",
        b"\xff" * 20,
        b"\x02" + bytes(7) + b"[]",
        len(text).to_bytes(8, "little") + text + bytes(4),
    ):
        (tmp_path / "two").write_bytes(wrong)
        with pytest.raises(KavaError, match="is no whole file of safetensors"):
            joined_digest([tmp_path / "two"])
