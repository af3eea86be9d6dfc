"""Python for a model card: a question is put to a student as it was taught to be asked."""

from __future__ import annotations

import json
from pathlib import Path

from kava_core.models.students import encoder_of
from kava_core.problems.traces import CLOCK, STOPPED, TraceEncoder

QUESTION = "How many are 3 cups and 4 cups?"
PRINT = """answers = written[:, questions["input_ids"].shape[1] :]
print(tokenizer.batch_decode(answers, skip_special_tokens=True))"""


def questions_in(folder: Path) -> str:
    """Lines that make `questions` for the student in `folder`, of a `tokenizer` that is there."""
    encoder = encoder_of(folder, "student.json")
    prompt = encoder.prompt
    if prompt.chat:
        return _chat(encoder)
    if prompt.examples:
        return _shown(encoder)
    return f'questions = tokenizer([{_text(prompt.asked(QUESTION))}], return_tensors="pt")'


def _chat(encoder: TraceEncoder) -> str:
    turns = "".join(
        f'    {{"role": {_text(turn["role"])}, "content": {_text(turn["content"])}}},\n'
        for turn in encoder.turns(QUESTION)
    )
    before = template = ""
    if CLOCK in encoder.tokenizer.get_chat_template():
        before = (
            "# Its template writes today's date, and it was taught with this one.\n"
            f"template = {_text(STOPPED)} + tokenizer.get_chat_template()\n"
        )
        template = "    chat_template=template,\n"
    return (
        f"turns = [\n{turns}]\n{before}questions = tokenizer.apply_chat_template(\n    turns,\n"
        f"{template}    add_generation_prompt=True,\n    return_dict=True,\n"
        '    return_tensors="pt",\n)'
    )


def _shown(encoder: TraceEncoder) -> str:
    """Examples are tokenised piece by piece, as problems are."""
    prompt = encoder.prompt
    pieces = [
        piece
        for e in prompt.examples
        for piece in (
            *(prompt.asked(e.question), encoder.cot_text(e.steps), prompt.answer, f" {e.answer}"),
            "\n\n" if prompt.stop is None else prompt.stop,
        )
    ]
    first = [token for token in encoder.first[:1] if token == encoder.tokenizer.bos_token_id]
    lines = "".join(f"    {_text(piece)},\n" for piece in (*pieces, prompt.asked(QUESTION)))
    return (
        f"pieces = [\n{lines}]\n"
        'parts = tokenizer(pieces, add_special_tokens=False)["input_ids"]\n'
        f"ids = torch.tensor([{first} + sum(parts, [])])\n"
        'questions = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}'
    )


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
