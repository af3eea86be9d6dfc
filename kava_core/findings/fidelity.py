"""What `kava fidelity` found: the worth of every kind of cache; and, apart, what it cost.

fidelity/ holds what is the same on a second machine, measured/fidelity.json what is not.
"""

from __future__ import annotations

from pydantic import model_validator

from kava_core.findings.base import Finding
from kava_core.findings.scores import GroupScore, Percent

METRICS, PLOTTED, ANSWERS = "metrics.json", "budgets.json", "answers.parquet"
MEASURED = "fidelity.json"

SweetSpots = dict[str, dict[str, int | None]]  # policy → bits → smallest budget near enough to full


class CacheScore(Finding):
    """What n answers from one kind of cache are worth.

    exact_match, ci95: in %. perplexity: of the gold answers, per token; kl: to the full cache,
    nats per answer token. tokens_kept: of the chain, that a head sees; bytes_per_problem: of the
    chain's cache as it would be stored. Both are means.
    """

    exact_match: Percent
    ci95: tuple[Percent, Percent]
    n: int
    perplexity: float
    kl: float
    tokens_kept: float
    bytes_per_problem: float
    by_steps: dict[int, GroupScore]


class CacheScores(Finding):
    """fidelity/metrics.json: the teacher's answers to n problems of `split`.

    policies: policy → budget → bits; budgets ascend, bits descend. recommended: the smallest budget
    at most `within` points below full, None where none of the grid is; over all problems, and over
    those of each number of steps.
    """

    split: str
    within: float
    full: CacheScore
    none: CacheScore
    policies: dict[str, dict[int, dict[str, CacheScore]]]
    recommended: SweetSpots
    recommended_by_steps: dict[int, SweetSpots]

    @model_validator(mode="after")
    def _a_grid(self) -> CacheScores:
        grids = [
            {(budget, bits) for budget, found in budgets.items() for bits in found}
            for budgets in self.policies.values()
        ]
        if not grids or not grids[0] or any(grid != grids[0] for grid in grids):
            raise ValueError("expected every policy with the same budgets and bits")
        return self


class CachedAnswer(Finding):
    """The teacher's answer to one problem from one kind of cache, a row of answers.parquet.

    policy: `full`, `none` or a policy; budget and bits: None for the first two. cot_tokens: N_C;
    tokens_kept: of them, that a head sees, the mean over layers and heads; bytes: as stored; nll,
    kl: means over the answer_tokens, nats.
    """

    id: str
    n_steps: int
    topic: str
    cot_tokens: int
    policy: str
    budget: int | None
    keys_bits: int | None
    values_bits: int | None
    tokens_kept: float
    bytes: int
    text: str
    answer: str
    gold: str
    correct: bool
    nll: float
    kl: float
    answer_tokens: int


class BatchCost(Finding):
    """What answering one batch of problems of n_steps steps cost.

    seconds_per_problem: from the stored cache to the last token; peak_memory_bytes: of the whole
    batch, None where the system does not tell; hardware: the machine in words.
    """

    problems: int
    n_steps: int
    seconds_per_problem: float
    peak_memory_bytes: int | None
    hardware: dict[str, str]


class CacheCost(Finding):
    """What answering from one kind of cache cost.

    seconds_per_problem: mean, in all and by number of steps; peak_memory_bytes: of the worst batch.
    """

    seconds_per_problem: float
    peak_memory_bytes: int | None
    seconds_by_steps: dict[int, float]


class FidelityCosts(Finding):
    """measured/fidelity.json: the machines in words, and the cost of every kind of cache.

    policies: policy → budget → bits.
    """

    hardware: dict[str, str]
    full: CacheCost
    none: CacheCost
    policies: dict[str, dict[int, dict[str, CacheCost]]]
