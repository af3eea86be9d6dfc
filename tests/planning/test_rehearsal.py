"""A rehearsal is of the pipeline alone: it reads nothing that the pipeline reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from kava_core.planning.forecast import Shapes
from kava_core.planning.lengths import lengths_of
from kava_core.planning.rehearsal import rehearsed
from kava_core.settings import Pipeline
from tests.planning.test_forecast import SMALL


def test_settings_of_the_small_pipeline_lead_nowhere_else(tmp_path: Path) -> None:
    for name in ("teacher", "student"):  # configurations, without weights
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        ).save_pretrained(tmp_path / "elsewhere" / name)  # fmt: skip
    elsewhere = str(tmp_path / "elsewhere")
    table = {"source": "gsm8k-aug", "path": f"{elsewhere}/problems"}
    pipeline: dict[str, Any] = {
        **SMALL,
        "prepare": {
            **table, "validation": 8, "tokenizer": f"{elsewhere}/teacher", "test_sets": {"b": table}
        },
        "teacher": {**SMALL["teacher"], "model": f"{elsewhere}/teacher", "scratch": {}},
        "students": {"kava": {**SMALL["students"]["kava"], "model": f"{elsewhere}/student"}},
        "evaluate": {"others": {"theirs": f"{elsewhere}/theirs"}},
        "resources": {"caches_to": "s3://elsewhere", "targets_to": "s3://elsewhere"},
        "cadence": {"report_to": ["wandb"]},
    }  # fmt: skip
    settings = Pipeline.model_validate(pipeline)
    lengths = lengths_of(Pipeline.model_validate(SMALL), tmp_path)
    shapes = Shapes.of(settings, lengths)
    small = rehearsed(settings, shapes, tmp_path / "models")
    assert "elsewhere" not in json.dumps(small) and "wandb" not in json.dumps(small)
    for model in (small["teacher"]["model"], small["students"]["kava"]["model"]):
        assert Path(model).is_relative_to(tmp_path / "models")
