"""Weights that are found by measuring, and weights that fade."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kava_core.settings import Student
from kava_core.settings.student import Share

TERMS = {"cot": "w_cot", "codi": "alpha_codi", "kv": "alpha_kv", "readout": "alpha_readout"}


@dataclass(frozen=True)
class Balance:
    """What the terms of a loss are multiplied with, beside the weights they come with.

    shares: the parts of the gradient that terms of weight 1 shall have, measured anew every `every`
    steps. fading: terms whose weight, or share, falls linearly from its full size at the first step
    to 0 after the last.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    every: int = 1
    fading: frozenset[str] = frozenset()

    @classmethod
    def of(cls, settings: Student) -> Balance:
        """That of a student's terms."""
        weights = {term: getattr(settings, setting) for term, setting in TERMS.items()}
        return cls(
            {term: x.share for term, x in weights.items() if isinstance(x, Share)},
            settings.balance_every,
            frozenset({"kv"} if settings.kv_schedule == "linear" else ()),
        )

    def due(self, step: int) -> bool:
        """Whether shares are measured in the step, counted from 0."""
        return bool(self.shares) and step % self.every == 0

    def left(self, term: str, done: float) -> float:
        """What is left of a term's weight when the part `done` of the run lies behind."""
        return 1.0 - done if term in self.fading else 1.0

    def weights(self, norms: Mapping[str, float], done: float) -> dict[str, float]:
        """The weights that give the terms their shares.

        norms: n_i, those of each term's gradient. With s_i the shares, and the sum of the norms
        n_f that other terms have,

            w_i = s_i / (1 − Σ s) · Σ_f n_f / n_i

        so that w_i n_i is the part s_i of all norms together. A term without gradient gets 0.
        """
        shares = {
            term: share * self.left(term, done)
            for term, share in self.shares.items()
            if term in norms
        }
        others = sum(
            norm * self.left(term, done) for term, norm in norms.items() if term not in shares
        )
        scale = others / (1.0 - sum(shares.values()))
        return {
            term: scale * share / norms[term] if norms[term] else 0.0
            for term, share in shares.items()
        }
