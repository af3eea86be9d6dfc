"""Scorers written for kvpress, run offline on stored caches.

A scorer of kvpress (NVIDIA, github.com/NVIDIA/kvpress) is an object with one method,

    score(module, hidden_states, keys, values, attentions, kwargs) -> [batch, kv_heads, tokens]

which a hook calls for an attention layer at work. Here keys and values come from a store, and there
is no layer at work: a scorer that reads anything else is refused by what it asks for. Nothing is
imported from kvpress: any object with such a method will do.

A policy around one is a frozen dataclass that makes it, in a package of one's own
(examples/kava-extras):

    @dataclass(frozen=True)
    class KeyDiff(PressPolicy):
        name = "keydiff"
        depends_on = ("kvpress",)

        def press(self) -> Press:
            from kvpress import KeyDiffPress
            return KeyDiffPress()
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

from kava_core.errors import KavaError, is_out_of_memory
from kava_core.eviction.policies.base import Policy, RotaryPhase

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


class Press(Protocol):
    """What kvpress calls a scorer press."""

    def score(
        self,
        module: Any,
        hidden_states: Any,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: Any,
    ) -> Tensor:
        """keys, values [1, H, N, D] → [1, H, N], the higher the better."""


class PressPolicy(Policy):
    """The scores of a scorer press, of one record and one layer at a time.

    Keys are those that the scorer would find in a model's cache: rotated to their positions, where
    the model rotates keys. A scorer that knows its `compression_ratio` gets that of the record and
    the layer, and random numbers are drawn from a seed of their own for each, so that a score
    depends on nothing else in the batch.
    """

    # Packages whose version, beside that of the policy's own, is recorded with what it makes.
    depends_on: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def press(self) -> Press:
        """A new scorer, as the settings say."""

    def score(self, batch: CacheBatch) -> Tensor:
        import torch

        press = self.press()
        scores = batch.empty_scores()
        phase: RotaryPhase = "pre_rope" if batch.rotary is None else "post_rope"
        for record, (first, last) in enumerate(batch.spans):
            tokens = slice(first, last)
            keys, values = batch.float_keys(tokens, phase), batch.float_values(tokens)
            for row, layer in enumerate(batch.layers):
                of_layer = (x[:, row].transpose(0, 1)[None] for x in (keys, values))  # [1, H, N, D]
                if batch.budgets is not None and hasattr(press, "compression_ratio"):
                    press.compression_ratio = _ratio(last - first, batch.budgets[row])
                with torch.random.fork_rng():
                    torch.manual_seed(_seed(batch.ids[record], layer))
                    found = self._scored(press, layer, *of_layer)
                scores[tokens, row] = found[0].T.float()
        return scores

    def _scored(self, press: Press, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        import torch

        there = _Layer(self.name, layer, keys.shape[-1])
        states = _Absent(f"policy {self.name}: its scorer reads", "the hidden states")
        try:
            with torch.no_grad():
                found = press.score(there, states, keys, values, None, {})
        except KavaError:
            raise
        except Exception as error:  # a stranger's code, asked for what it was not made for
            if is_out_of_memory(error):
                raise
            raise KavaError(
                f"policy {self.name}: {type(press).__name__} cannot score from keys and values "
                f"alone ({type(error).__name__}: {error}). Choose another scorer or policy."
            ) from error
        if not isinstance(found, torch.Tensor) or found.shape != keys.shape[:3]:
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise KavaError(
                f"policy {self.name}: expected scores [1, kv_heads, tokens] = "
                f"{list(keys.shape[:3])} from {type(press).__name__}, found {what}. Mend it."
            )
        return found


class _Absent:
    """Stands for what a store does not hold; whatever is asked of it is an error."""

    def __init__(self, subject: str, what: str) -> None:
        self.__dict__.update(_subject=subject, _what=what)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise KavaError(
            f"{self._subject} {self._what} (`{name}`), and a store has keys and values only. "
            "Choose another scorer or policy."
        )


class _Layer(_Absent):
    """The little of an attention layer that is known offline."""

    def __init__(self, policy: str, layer_idx: int, head_dim: int) -> None:
        super().__init__(f"policy {policy}: its scorer reads", "the attention layer")
        self.__dict__.update(layer_idx=layer_idx, head_dim=head_dim)


def _ratio(tokens: int, budget: int) -> float:
    """The share to remove, such that int(tokens · (1 − ratio)) is what the budget keeps."""
    return max(0.0, 1 - (budget + 0.5) / tokens)


def _seed(record: str, layer: int) -> int:
    digest = hashlib.sha256(f"{layer}:{record}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
