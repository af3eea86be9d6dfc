"""Answers as OpenAI's clients read them: whole objects, and chunks of a stream.

`usage` has two fields more: `forward_passes`, decoder calls until each answer had ended, that of
the question and those of the latents included; `latents`, how many each answer was thought in.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from kava_core.serving.engine import Piece


@dataclass(frozen=True)
class Reply:
    """Of one request. chat: of which endpoint; latents: M."""

    chat: bool
    model: str
    latents: int
    question_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: list[tuple[str, Piece]]) -> dict[str, Any]:
        """answers: the text of each choice, and its last piece."""
        choices = [
            self._choice(i, {"message": {"role": "assistant", "content": text}}, text, last.finish)
            for i, (text, last) in enumerate(answers)
        ]
        return self._object("", choices, self.usage([last for _, last in answers]))

    def begin(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice; a completion has none."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._object(".chunk", [self._choice(choice, {"delta": delta}, "", None)])

    def chunk(self, choice: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        chosen = self._choice(choice, {"delta": delta}, piece.text, piece.finish)
        return self._object(".chunk", [chosen])

    def end(self, last: list[Piece]) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._object(".chunk", [], self.usage(last))

    def usage(self, last: list[Piece]) -> dict[str, int]:
        written = sum(piece.tokens for piece in last)
        return {
            "prompt_tokens": self.question_tokens,
            "completion_tokens": written,
            "total_tokens": self.question_tokens + written,
            "forward_passes": sum(piece.passes for piece in last),
            "latents": self.latents,
        }

    def _choice(
        self, index: int, said: dict[str, Any], text: str, finish: str | None
    ) -> dict[str, Any]:
        own = said if self.chat else {"text": text}
        return {"index": index, **own, "logprobs": None, "finish_reason": finish}

    def _object(
        self, part: str, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind + (part if self.chat else ""),
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({} if usage is None else {"usage": usage}),
        }
