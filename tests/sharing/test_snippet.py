"""The code of a card asks a student as `kava ask` does, however it was taught to be asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from kava_core.artefacts import write_json
from kava_core.evaluation.questions import Respondents
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_tokenizer
from kava_core.problems.prompt import Prompt
from kava_core.problems.traces import TraceEncoder, TraceForm
from kava_core.serving.served import open_served
from kava_core.sharing.snippet import QUESTION
from kava_core.sharing.student import Published, _loading
from tests.problems.chats import CHATML, chat_tokenizer
from tests.tiny import COMMON, PROMPT, tiny_model

SHOWN = {"question": 'How many "are" {1} ?', "steps": ["<<1+1=2>>", "<<2+2=4>>"], "answer": "4"}
TOLD = {**SHOWN, "steps": ["One and one are two.", "Twice that is four."]}
DATED = "{{ strftime_now('%d %b %Y') }}: " + CHATML


@pytest.mark.parametrize(
    ("settings", "template", "said"),
    [
        ({}, None, 'tokenizer(["How many are 3 cups and 4 cups?\\n"], return_tensors="pt")'),
        ({"question": "Q: {question}\nA:\n"}, None, "Q: How many are 3 cups and 4 cups?"),
        ({"examples": [SHOWN]}, None, "torch.tensor([[0] + sum(parts, [])])"),
        ({"examples": [SHOWN], "stop": ";"}, None, '    ";",\n'),
        ({"examples": [TOLD]}, None, '"One and one are two.\\nTwice'),
        ({"chat": True}, CHATML, "tokenizer.apply_chat_template("),
        ({"chat": True, "examples": [SHOWN]}, CHATML, '{"role": "assistant", "content": "<<1+1='),
        ({"chat": True, "question": "{question} Think."}, DATED, "chat_template=template"),
    ],
)
def test_it_asks_as_the_student_was_taught(
    settings: dict[str, Any], template: str | None, said: str, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer(template)
    if template is None:
        tokenizer.bos_token = "<|pad|>"
        first = TemplateProcessing(
            "<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
        )
        tokenizer.backend_tokenizer.post_processor = first
    student = LatentReasoner.from_teacher(
        tiny_model(LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}), torch.float32),
        **{"latents": 4, "iterations": 2, "reasoning": "jacobi", "projection": True},
        **{"per_position": True, "answer_prompt_ids": PROMPT, "eos_token_id": 2, "seed": 0},
    ).eval()
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = Prompt.model_validate(settings)
    traces: TraceForm = "sentences" if settings.get("examples") == [TOLD] else "equations"
    write_json(tmp_path / "student.json", {"traces": traces, **prompt.kept()})

    card = _loading(Published("it", tmp_path, tmp_path, {}, None, None, None))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert said in code
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(tmp_path)), names)

    taught = TraceEncoder(load_tokenizer(str(tmp_path)), traces, prompt=prompt)
    asked = torch.tensor(taught.encode_questions([QUESTION]))
    for encoder in (
        Respondents.of(tmp_path, steps=False, teacher=None).encoder,
        open_served(tmp_path).encoder,
    ):
        assert encoder.encode_questions([QUESTION]) == asked.tolist()
    assert torch.equal(names["questions"]["input_ids"], asked)
    assert torch.equal(names["written"], student.generate(asked))
