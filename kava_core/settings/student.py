"""The students."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StrictBool,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from kava_core.settings.base import NotNegative, Positive, Processes, Real, Section, Weight
from kava_core.settings.training import Training

Distance = Literal["l1", "smooth_l1", "mse"]
KVParts = Literal["both", "keys", "values"]


class Share(Section):
    """A weight found by measuring.

    share: the part of the gradient that the term is to have: the norm of its gradient in the sum
    over all terms of theirs.
    """

    share: Annotated[Real, Field(gt=0, lt=1)]


def _number_or_share(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        raise ValueError(
            f"should be a number from 0, or {{share: …}} with a number between 0 and 1, not {value}"
        ) from None


class Curriculum(Section):
    """Coconut's: in stage k, from 1, k · `latents_per_step` latents stand for the first k steps of
    a trace, and the steps behind them are written, and taught as the answer is.

    latents_per_step: for how many latents a step gives way. steps or epochs: how long a stage is,
    one of the two. There are as many stages as give all latents, and then the last, to the end of
    the training: all latents, and nothing but the answer is written. Each begins with a fresh
    optimiser; the learning rate stays where the warm-up took it.
    """

    latents_per_step: Positive
    steps: Positive | None = None
    epochs: Positive | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Curriculum:
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise ValueError(f"should have exactly one of `steps` and `epochs`, found {found}")
        return self


TermWeight = Annotated[Weight | Share, WrapValidator(_number_or_share)]
WEIGHTS = ("alpha_kv", "alpha_codi", "alpha_readout", "w_cot")


def _one_layer_map(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        raise ValueError(
            "should be `uniform` or a list: one of the teacher's layers, numbered from 0, for each "
            "of the student's"
        ) from None


LayerMap = Annotated[
    Literal["uniform"] | Annotated[tuple[NotNegative, ...], Field(min_length=1)],
    WrapValidator(_one_layer_map),
]


# Settings that mean something only where there are latents, Jacobi iterations, a term of the loss.
KV = ("kv_distance", "kv_std", "kv_parts", "kv_schedule", "fake_quantise")
CODI = ("codi_distance", "codi_std")
JACOBI = ("iterations", "per_position")
LATENT = (
    *(
        "alpha_kv",
        "alpha_codi",
        "alpha_readout",
        "reasoning",
        "projection",
        "stride",
        "targets",
        "layer_map",
        "shard_window",
        "curriculum",
    ),
    *(*JACOBI, *KV, *CODI),
)


class Student(Section):
    """One student: what it is trained from, how it reasons, what it is taught by, and how long.
    docs/methods.md has a snippet for each method.

    reads: `kv_targets`, with a latent for every slot, or `problems`, without latents (No-CoT); also
    what DVC runs it after. training: how long and how its weights are fitted. model: the Hugging
    Face folder or id it starts from; null: the teacher itself. Another model learns K/V projectors
    into the teacher's basis beside it. revision: of a model on the Hub; null: its newest.
    layer_map: which layer of the teacher teaches each of the student's. targets: `store` reads them
    from kv_targets, the teacher is not even loaded but for its weights; `online` makes them anew in
    every step with the frozen teacher, by the store's settings, and takes token ids and statistics
    from the store only; `joint` does so with the student's own weights as they are, which the
    written chain (`w_cot`) keeps a teacher's, as CODI, PCCoT and KaVa publish it. processes: how
    many share each batch, on this machine or the Ray cluster that RAY_ADDRESS names, each with a
    GPU where there are any; `auto`: as many as there are GPUs, without any one. It changes results
    by rounding.

    reasoning: `jacobi`, all latents at once, refined, or `sequential`, one after the other.
    iterations: T, how often Jacobi latents are refined. projection: whether a hidden state is
    projected before it is a latent. per_position: one initial latent for each position, or one for
    all. stride: how many positions lie from one latent to the next: 1 as published; where it is as
    many as the kept tokens stood apart, about N_C / M (ours), latents find the question, and the
    answer finds the latents, as far away as the teacher did.

    alpha_kv: weight of the KV term, a number or `{share: 0.3}`. alpha_codi: likewise of CODI's
    endpoint. alpha_readout: likewise of the readout, cross-entropy of the hidden state that becomes
    a latent on the token of its slot; needs targets with one token per slot (`evict.select:
    record`). w_cot: likewise of the written chain of thought. kv_distance, codi_distance: how far
    apart two numbers are. kv_std, codi_std: whether both sides are divided by the teacher's spread
    in that layer. kv_parts: what the KV term compares. kv_schedule: `linear` lets its weight fall
    to 0 over the run. fake_quantise: keys and values pass through the store's codes before they are
    compared. shard_window: how many shards of the store are mixed at a time. balance_every: steps
    from one measuring of a `share` to the next. curriculum: Coconut's, for latents that are thought
    one after the other; null: none.
    """

    reads: Literal["kv_targets", "problems"]
    training: Training
    model: str | None = None
    revision: str | None = None
    layer_map: LayerMap = "uniform"
    targets: Literal["store", "online", "joint"] = "store"
    processes: Processes = 1
    reasoning: Literal["jacobi", "sequential"] = "jacobi"
    iterations: NotNegative = 3
    projection: StrictBool = True
    per_position: StrictBool = True
    stride: Positive = 1
    alpha_kv: TermWeight = 0.0
    alpha_codi: TermWeight = 0.0
    alpha_readout: TermWeight = 0.0
    w_cot: TermWeight = 0.0
    kv_distance: Distance = "smooth_l1"
    kv_std: StrictBool = True
    kv_parts: KVParts = "both"
    kv_schedule: Literal["constant", "linear"] = "constant"
    fake_quantise: StrictBool = False
    codi_distance: Distance = "smooth_l1"
    codi_std: StrictBool = True
    shard_window: Positive = 16
    balance_every: Positive = 100
    # Not among the settings that a student says it was made with where there is none.
    curriculum: Annotated[Curriculum | None, Field(exclude_if=lambda value: value is None)] = None

    def taught(self, weight: str) -> bool:
        """Whether the term of that weight (`alpha_kv`, …) is part of the loss."""
        return getattr(self, weight) != 0

    @model_validator(mode="after")
    def _means_something(self) -> Student:
        for there, why, names in (
            (
                self.reads == "kv_targets",
                "`reads: problems` gives no latents",
                LATENT,
            ),
            (self.reasoning == "jacobi", "`reasoning: sequential` has none", JACOBI),
            (self.taught("alpha_kv"), "it belongs to the KV term, and alpha_kv is 0", KV),
            (self.taught("alpha_codi"), "it belongs to CODI's term, and alpha_codi is 0", CODI),
            (
                self.taught("alpha_kv") or self.taught("alpha_codi"),
                "it says what is compared, and alpha_kv and alpha_codi are 0",
                ("layer_map",),
            ),
            (
                any(map(self.taught, ("alpha_kv", "alpha_codi", "alpha_readout"))),
                "no term reads targets",
                ("targets",),
            ),
            (
                self.reasoning == "sequential" or self.iterations > 0,
                "without iterations latents are the initial ones, whatever the question",
                ("alpha_readout",),
            ),
            (self.model is not None, "it belongs to a `model` on the Hub", ("revision",)),
            (bool(self._shares()), "no weight is a share", ("balance_every",)),
            (
                self.reasoning == "sequential",
                "in a curriculum latents are thought one after the other, and `reasoning` is not "
                "sequential",
                ("curriculum",),
            ),
            (
                not (self.taught("alpha_kv") or self.taught("alpha_readout")),
                "in a curriculum latents stand for steps, and alpha_kv and alpha_readout compare "
                "them with slots",
                ("curriculum",),
            ),
        ):
            if not there and (wrong := self.changed(*names)):
                raise ValueError(f"{', '.join(wrong)}: means nothing here: {why}. Leave it out")
        return self

    def _shares(self) -> list[float]:
        weights = [getattr(self, name) for name in WEIGHTS]
        return [weight.share for weight in weights if isinstance(weight, Share)]

    @model_validator(mode="after")
    def _leaves_a_share_to_the_answer(self) -> Student:
        if (total := sum(self._shares())) >= 1:
            raise ValueError(
                f"the shares of the gradient add up to {total:g}, and something must be left to "
                "the other terms. Lower them"
            )
        return self

    @model_validator(mode="after")
    def _its_own_teacher(self) -> Student:
        if self.targets == "joint" and not self.taught("w_cot"):
            raise ValueError(
                "targets: joint makes the student its own teacher, and nothing but w_cot teaches "
                "that to write its chain. Set w_cot, 1 as published"
            )
        if self.targets == "joint" and self.model is not None:
            raise ValueError(
                "targets: joint makes the student its own teacher, and `model` names one that the "
                "targets were not made for. Leave one out"
            )
        return self

    @model_validator(mode="after")
    def _checkpointed(self) -> Student:
        if self.training.gradient_checkpointing and self.reads == "kv_targets":
            raise ValueError(
                "training.gradient_checkpointing: should be false for a student with latents: they "
                "are read from a cache, which it would detach from the gradient. Use a smaller "
                "batch_size with accumulation instead"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> Student:
        self.training.check_shared(self.processes)
        return self
