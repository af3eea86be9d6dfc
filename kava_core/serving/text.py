"""Token ids → text, while they are being written."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole letter yet


class Text:
    """The text of growing token ids, handed out in pieces that no later token changes.

    Whatever the pieces, together they are what the tokenizer makes of all ids, up to the first of
    `stops`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.stopped = False
        self._given = ""

    def add(self, token: int) -> str:
        """What can be handed out with this token; "" once one of `stops` was written."""
        self.ids.append(token)
        text = self._cut(self._decoded())
        sure = text if self.stopped else text[: len(text) - self._open(text)]
        return self._give(sure)

    def rest(self) -> str:
        """What was held back and no further token will change."""
        return self._give(self._cut(self._decoded()))

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _cut(self, text: str) -> str:
        ends = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        self.stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _open(self, text: str) -> int:
        """How many characters at the end of the text may become others, or part of a stop."""
        half = len(text) - len(text.rstrip(_HALF))
        begun = (
            length
            for stop in self.stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        )
        return max(half, *begun, 0)

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given += new
        return new
