"""The table of docs/models.md, from what `kava check` says of each architecture that it names.

`python docs/models.py` writes its rows anew; to try another architecture, add a line `| NAME |`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from kava_core.models.check import judge_config

PAGE = Path(__file__).with_suffix(".md")
ROW = re.compile(r"^\| ([a-z0-9_-]*[a-z0-9]) \|.*\n", re.MULTILINE)

# Of those whose defaults build no model, or another than is published.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
}


def rows(page: str) -> dict[str, str]:
    """The lines of the table by what they are about."""
    return {match[1]: match[0] for match in ROW.finditer(page)}


def config_of(model_type: str) -> PreTrainedConfig:
    """What is tried of an architecture."""
    return AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))


def row(model_type: str) -> str:
    """The line of the table for an architecture, if the installed transformers has it."""
    if model_type not in CONFIG_MAPPING:
        return f"| {model_type} | – | – | – | not in this version of transformers |\n"
    verdict = judge_config(config_of(model_type))
    can = ["no" if why else "yes" for why in (verdict.teacher, verdict.student, verdict.kv_loss)]
    return f"| {' | '.join([model_type, *can, ' '.join(verdict.reasons)])} |\n"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(ROW.sub(lambda match: row(match[1]), page), encoding="utf-8")


if __name__ == "__main__":
    main()
