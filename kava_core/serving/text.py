"""Token ids → text, while they are being written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole letter yet
# A byte, to tokenizers whose other tokens are text: a run of them is text only if all of it is.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Text:
    """The text of growing token ids, handed out in pieces that no later token changes.

    Whatever the pieces, together they are what the tokenizer makes of all ids, up to the first of
    `stops`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.stopped = False
        # What is before the id `_read` is text already. It is decoded anew from a few ids before,
        # as `_before`: the first token of a text may lose its space. Nothing is settled by a token
        # that adds nothing, such as a special one: it does not end a run of bytes.
        self._from = self._read = 0
        self._before = self._text = ""
        self._held = ""  # text that may be part of a stop

    def add(self, token: int) -> str:
        """What can be handed out with this token; "" once one of `stops` was written."""
        self.ids.append(token)
        seen, self._text = self._text, self._decoded(self._from)
        new = self._text[len(self._before) :]
        if new and self._text != seen and not self._is_open(token):
            self._held += new
            self._from, self._read = self._read, len(self.ids)
            self._before = self._text = self._decoded(self._from)
        self._cut()
        sure = len(self._held) - (0 if self.stopped else self._begun())
        new, self._held = self._held[:sure], self._held[sure:]
        return new

    def rest(self) -> str:
        """What was held back and no further token will change."""
        if self.stopped:
            return ""
        self._held += self._decoded(self._from)[len(self._before) :]
        self._from = self._read = len(self.ids)
        self._before = ""
        self._cut()
        new, self._held = self._held, ""
        return new

    def _decoded(self, first: int) -> str:
        return str(self.tokenizer.decode(self.ids[first:], skip_special_tokens=True))

    def _is_open(self, token: int) -> bool:
        """Whether the end of the text may become another by what follows the token."""
        written = self.tokenizer.convert_ids_to_tokens(token)
        return self._text.endswith(_HALF) or bool(_BYTE.fullmatch(str(written)))

    def _cut(self) -> None:
        """Forget what is behind the first stop: none begins in what was handed out."""
        ends = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if ends:
            self.stopped, self._held = True, self._held[: min(ends)]

    def _begun(self) -> int:
        """How many characters at the end of what is held may be part of a stop."""
        held = self._held
        for first in range(len(held)):
            if any(stop.startswith(held[first:]) for stop in self.stops):
                return len(held) - first
        return 0
