"""The settings of every stage, read from `pipelines.yaml` and checked before any work starts.

A pipeline is one mapping per stage. Each stage is tracked by DVC through exactly its own section;
`resources` is the one section that changes no result and is tracked by none. Every value that is
unknown, of the wrong type or impossible is an error that names its key path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from kava_core.errors import KavaError


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


# Numbers in text are taken, since YAML 1.1 reads 1e-3 as one; a truth value is no number.
Real = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[StrictInt, Field(gt=0)]
NotNegative = Annotated[StrictInt, Field(ge=0)]
PositiveReal = Annotated[Real, Field(gt=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Weight = Annotated[Real, Field(ge=0)]
# A folder below data/, and a step in DVC's paths.
NAME = r"[A-Za-z0-9_-]+"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Dtype = Literal["float32", "bfloat16", "float16"]
Half = Literal["bfloat16", "float16"]
Bits = Literal[32, 16, 8, 4]
EndpointBits = Literal[32, 16, 8]
Distance = Literal["l1", "smooth_l1", "mse"]
Phase = Literal["pre_rope", "post_rope"]
# Those of kava_core.problems.sources.
FileSourceName = Literal[
    "gsm8k", "gsm8k-aug", "gsm8k-aug-nl", "gsm-hard", "svamp", "metamath", "math", "table"
]
# Those of kava_core.eviction, which takes seconds to import.
Policy = Literal[
    "rkv",
    "attention",
    "redundancy",
    "crop",
    "uniform",
    "random",
    "key_norm",
    "value_norm",
    "streaming",
]


class Section(BaseModel):
    """A mapping of settings: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Synthetic(Section):
    """Generated word problems (`kava_core.problems.synthetic.Generator`)."""

    steps: tuple[Positive, Positive] = (2, 4)
    operations: tuple[Literal["add", "subtract", "multiply", "divide"], ...] = (
        "add",
        "subtract",
        "multiply",
        "divide",
    )
    max_value: Positive = 99
    max_operand: Positive = 20
    factors: tuple[Positive, ...] = (2, 3)
    style: Literal["compact", "prose"] = "compact"
    distractors: Fraction = 0.0


class Columns(Section):
    """Which columns of a table are what; `steps` and `topic` may be missing."""

    question: str
    answer: str
    steps: str | None = None
    topic: str | None = None


class FileSource(Section):
    """Problems from files or from the Hub: docs/sources.md says what each source looks like.

    path: a file, a folder with train, validation and test files, or a Hub name. hub_config: the
    Hub's name for a part of a dataset; null: the source's own. columns, separator: of a `table`;
    the separator cuts a text into steps.
    """

    path: str | None = None
    hub_config: str | None = None
    columns: Columns | None = None
    separator: Annotated[str, Field(min_length=1)] = "\n"

    def _check_source(self, source: str) -> None:
        if self.path is None:
            raise ValueError(f"source {source} needs a `path`: a file, a folder or a Hub name")
        if (source == "table") != (self.columns is not None):
            raise ValueError("`columns` belongs to the source table, which needs it")


class TestSet(FileSource):
    """Further problems to ask; split null: `test`, or the only split there is."""

    __test__ = False  # no test of pytest's

    source: FileSourceName
    split: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> TestSet:
        self._check_source(self.source)
        return self


class Prepare(FileSource):
    """Problems: where they come from, how many, and how their steps are written.

    Sizes of null take all there is. drop_last_step: leave out the step that states the answer.
    latent_fraction: how much of a trace, in whole steps, latents stand for; students write the
    rest. max_*: what is longer is left out and counted; questions everywhere, traces in train and
    validation. deduplicate: leave out of train and validation what stands in a test set; without
    it such a question is an error, unless allow_leakage.
    """

    source: Literal["synthetic"] | FileSourceName
    traces: Literal["equations", "sentences"] = "equations"
    train: Positive | None = None
    validation: Positive
    test: Positive | None = None
    seed: StrictInt = 0
    synthetic: Synthetic = Synthetic()
    drop_last_step: StrictBool = False
    latent_fraction: Annotated[Real, Field(ge=0.2, le=1)] = 1.0
    max_steps: Positive | None = None
    max_question_characters: Positive | None = None
    max_trace_characters: Positive | None = None
    deduplicate: StrictBool = False
    allow_leakage: StrictBool = False
    test_sets: dict[Name, TestSet] = {}

    @model_validator(mode="after")
    def _complete(self) -> Prepare:
        if self.deduplicate and self.allow_leakage:
            raise ValueError("deduplicate leaves nothing that allow_leakage could allow: set one")
        if self.test_sets.keys() & {self.source, "test"}:
            raise ValueError(
                f"test_sets must not be named test or {self.source}, the pipeline's own source"
            )
        if self.source != "synthetic":
            self._check_source(self.source)
            return self
        if self.train is None or self.test is None:
            raise ValueError("source synthetic needs the numbers `train` and `test`")
        foreign = (
            *FileSource.model_fields,
            "deduplicate",
            "drop_last_step",
            "max_steps",
            "max_question_characters",
            "max_trace_characters",
        )
        plain = Prepare.model_fields
        wrong = [name for name in foreign if getattr(self, name) != plain[name].default]
        if wrong:
            raise ValueError(f"source synthetic has no {', '.join(wrong)}")
        return self


class LoRA(Section):
    """Low-rank adapters on the named projections; merged into the weights when training ends."""

    rank: Positive = 128
    alpha: Positive = 32
    dropout: Fraction = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class HeldOut(Section):
    """The last `records` training records are never trained on; every `every` steps the terms of
    the loss are measured on them."""

    records: Positive
    every: Positive


class Training(Section):
    """How weights are fitted; AdamW with a cosine schedule.

    held_out: evaluation during training; null: none.
    """

    steps: Positive
    batch_size: Positive = 64
    accumulation: Positive = 1
    learning_rate: PositiveReal
    weight_decay: Weight = 0.01
    warmup: Fraction = 0.05
    max_grad_norm: PositiveReal = 2.0
    precision: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA | None = None
    held_out: HeldOut | None = None
    log_every: Positive = 25
    save_every: Positive = 200
    seed: StrictInt = 0
    threads: Positive = 2


class Scratch(Section):
    """A byte-level BPE tokenizer and a small Llama, both made from the training problems."""

    vocabulary: Annotated[StrictInt, Field(ge=270)] = 512
    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive = 2
    intermediate_size: Positive = 384
    context_length: Positive = 512
    rope_theta: PositiveReal = 10000.0

    @model_validator(mode="after")
    def _divisible(self) -> Scratch:
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}, "
                f"and that a multiple of kv_heads {self.kv_heads}"
            )
        return self


class Teacher(Section):
    """`model: scratch` builds one; anything else is a Hugging Face folder or id to start from.

    `training: null` takes the model as it is (it can already write the chain of thought).
    """

    model: str = "scratch"
    scratch: Scratch = Scratch()
    training: Training | None
    validate_on: Positive = 200
    batch_size: Positive = 128
    max_new_tokens: Positive = 256

    @model_validator(mode="after")
    def _trained(self) -> Teacher:
        if self.model == "scratch" and self.training is None:
            raise ValueError("a teacher from scratch needs `training`")
        return self


class Generate(Section):
    """The teacher's caches over the training problems.

    keys_bits, values_bits, endpoint_bits: how the store keeps them; 16 bits are the `half` dtype,
    8 and 4 (8 for the endpoint) are codes with a scale and zero point per token.
    """

    keys_bits: Bits = 16
    values_bits: Bits = 16
    endpoint_bits: EndpointBits = 16
    half: Half = "bfloat16"
    model_dtype: Dtype = "float32"
    shard_size: Positive = 512
    batch_size: Positive = 64
    threads: Positive = 1


class LastLayers(Section):
    """The deepest n layers."""

    last: Positive


class EveryLayer(Section):
    """Every n-th layer."""

    every: Positive


def _one_layer_choice(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:  # which would speak of every form in turn
        raise ValueError(
            "should be `all`, {last: n}, {every: n} or a list of layer numbers from 0"
        ) from None


Layers = Annotated[
    Literal["all"]
    | LastLayers
    | EveryLayer
    | Annotated[tuple[NotNegative, ...], Field(min_length=1)],
    WrapValidator(_one_layer_choice),
]


class Evict(Section):
    """From N_C tokens to `budget` slots per layer and head.

    lambda, redundancy_phase, first and seed belong to the policies that have them; null takes the
    policy's own default. share: `share_size` adjacent layers keep the same tokens (`selection`) or
    one merged cache (`merged`). granularity `channel` and `tensor` take their ranges from
    `calibration_records` records, clipped to `calibration_percentile` per cent of the numbers.
    """

    policy: Policy = "rkv"
    budget: Positive
    budgets: Literal["uniform", "pyramid"] = "uniform"
    lambda_: Fraction | None = Field(default=None, alias="lambda")
    redundancy_phase: Phase | None = None
    first: NotNegative | None = None
    seed: StrictInt | None = None
    phase: Phase = "pre_rope"
    layers: Layers = "all"
    share: Literal["none", "selection", "merged"] = "none"
    share_size: Positive = 2
    keys_bits: Bits = 16
    values_bits: Bits = 16
    endpoint_bits: EndpointBits = 16
    half: Half = "bfloat16"
    granularity: Literal["token", "channel", "tensor"] = "token"
    calibration_records: Positive = 256
    calibration_percentile: Annotated[Real, Field(gt=50, le=100)] = 99.9
    threads: Positive = 1


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


class FidelityPolicy(Section):
    """A policy with its settings, as in `evict`; its bare name stands for its defaults."""

    policy: Policy
    lambda_: Fraction | None = Field(default=None, alias="lambda")
    redundancy_phase: Phase | None = None
    first: NotNegative | None = None
    seed: StrictInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"policy": value}

    @property
    def label(self) -> str:
        """What tables and files call it: `rkv`, or `rkv lambda=0.5`."""
        given = self.model_dump(by_alias=True, exclude={"policy"}, exclude_none=True)
        return " ".join([self.policy, *(f"{name}={value}" for name, value in given.items())])


class FidelityBits(Section):
    """Bits of keys and of values; one number stands for both."""

    keys: Bits
    values: Bits

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"keys": value, "values": value}

    @property
    def label(self) -> str:
        """`8`, or `8/4` where keys and values differ."""
        return str(self.keys) if self.keys == self.values else f"{self.keys}/{self.values}"


class Fidelity(Section):
    """The teacher answers held-out problems from its compressed cache, for a grid of settings.

    Every policy is tried with every budget and every bit width; layers, sharing and budgets per
    layer are set as in `evict`, and the same for the whole grid. `limit` problems of `split` are
    asked (null: all). within: how many points of exact match below the full cache the recommended
    budget may lie.
    """

    split: Literal["validation", "test"] = "validation"
    limit: Positive | None = 200
    policies: tuple[FidelityPolicy, ...] = (
        FidelityPolicy(policy="rkv"),
        FidelityPolicy(policy="attention"),
        FidelityPolicy(policy="random"),
    )
    budget: tuple[Positive, ...] = (2, 4, 8, 16, 24, 32, 64, 128, 256)
    budgets: Literal["uniform", "pyramid"] = "uniform"
    bits: tuple[FidelityBits, ...] = (FidelityBits(keys=16, values=16),)
    half: Half = "bfloat16"
    layers: Layers = "all"
    share: Literal["none", "selection", "merged"] = "none"
    share_size: Positive = 2
    within: Weight = 2.0
    batch_size: Positive = 64
    max_new_tokens: Positive = 32
    model_dtype: Dtype = "float32"
    threads: Positive = 1

    @model_validator(mode="after")
    def _each_once(self) -> Fidelity:
        for name, found in (
            ("policies", [policy.label for policy in self.policies]),
            ("budget", list(self.budget)),
            ("bits", [bits.label for bits in self.bits]),
        ):
            if not found or len(found) != len(set(found)):
                raise ValueError(f"{name} must name at least one, and none twice")
        return self


class Student(Section):
    """One student: how it reasons, what it is taught by, and how long.

    targets: `store` reads them from kv_targets, the teacher is not even loaded but for its weights;
    `online` makes them anew in every step with the frozen teacher, by the store's settings, and
    takes token ids and statistics from the store only. processes: how many share each batch, on
    this machine or the Ray cluster that RAY_ADDRESS names; it changes results by rounding.

    model: the Hugging Face folder or id it starts from; null: the teacher itself. Another model
    learns K/V projectors into the teacher's basis beside it. layer_map: which layer of the teacher
    teaches each of the student's. fake_quantise: keys and values pass through the store's codes
    before they are compared. docs/methods.md has a snippet for each method.
    """

    training: Training
    model: str | None = None
    layer_map: LayerMap = "uniform"
    targets: Literal["store", "online"] = "store"
    processes: Positive = 1
    reasoning: Literal["jacobi", "sequential", "none"] = "jacobi"
    iterations: NotNegative = 3
    projection: StrictBool = True
    per_position: StrictBool = True
    alpha_kv: Weight = 0.0
    alpha_codi: Weight = 0.0
    w_cot: Weight = 0.0
    kv_distance: Distance = "smooth_l1"
    kv_std: StrictBool = True
    fake_quantise: StrictBool = False
    codi_distance: Distance = "smooth_l1"
    codi_std: StrictBool = True
    shard_window: Positive = 16
    gradient_share_every: NotNegative = 0

    @model_validator(mode="after")
    def _has_latents(self) -> Student:
        if self.reasoning == "none" and (self.alpha_kv or self.alpha_codi):
            raise ValueError(
                "a student with `reasoning: none` reads no targets: alpha_kv, alpha_codi must be 0"
            )
        if self.reasoning == "none" and self.targets == "online":
            raise ValueError("a student with `reasoning: none` reads no targets: remove `targets`")
        if self.fake_quantise and not self.alpha_kv:
            raise ValueError(
                "fake_quantise changes the KV term alone, and alpha_kv is 0: set one or the other"
            )
        if self.layer_map != "uniform" and not (self.alpha_kv or self.alpha_codi):
            raise ValueError(
                "layer_map says what is compared, and alpha_kv and alpha_codi are 0: set one or "
                "leave layer_map out"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> Student:
        if self.training.batch_size % self.processes:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} must be a multiple of processes "
                f"{self.processes}, which share every batch"
            )
        return self


class Evaluate(Section):
    """Accuracy and cost of every system on the first `limit` problems of each test set.

    limit: null asks all of them. batch_size: peak memory is that of one batch. interpret_records:
    test problems over which latents are looked into; intervention_problems: those that are asked
    again with each latent changed. 0 turns either off; without records there is neither.
    """

    limit: Positive | None = None
    batch_size: Positive = 128
    max_new_tokens: Positive = 256
    similarity_records: Positive = 256
    interpret_records: NotNegative = 64
    intervention_problems: NotNegative = 200
    threads: Positive = 2


class Report(Section):
    """The page at the end."""

    title: str


class Resources(Section):
    """What is used to compute, never what is computed: not tracked by DVC.

    workers: Ray workers of generate and evict; 0 runs in process; null shares the cores there are.
    """

    workers: NotNegative | None = None
    cpus_per_worker: PositiveReal = 1
    gpus_per_worker: Weight = 0
    loader_workers: NotNegative = 0


class Pipeline(Section):
    """A named pipeline, complete."""

    prepare: Prepare
    teacher: Teacher
    generate: Generate
    evict: Evict
    fidelity: Fidelity = Fidelity()
    students: dict[Name, Student]
    evaluate: Evaluate
    report: Report
    resources: Resources = Resources()


def load_pipeline(path: Path, name: str | None = None) -> tuple[str, Pipeline]:
    """The pipeline `name` of the file, or the one its `pipeline:` key names, validated.

    Raises KavaError with the key path of every wrong setting.
    """
    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KavaError(f"{path} is missing. Run this where pipelines.yaml lies.") from None
    except OSError as error:
        raise KavaError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KavaError(f"{path} is not valid YAML: {error}") from None
    pipelines = document.get("pipelines") if isinstance(document, dict) else None
    if not isinstance(pipelines, dict):
        raise KavaError(f"{path} has no `pipelines:` mapping.")
    pipelines = {str(key): value for key, value in pipelines.items()}
    name = str(name or document.get("pipeline"))
    if name not in pipelines:
        raise KavaError(f"{path} has no pipeline {name!r}. There are: {', '.join(pipelines)}.")
    if not re.fullmatch(NAME, name):
        raise KavaError(
            f"pipeline name {name!r} must be of letters, digits, - and _ only: it names a folder, "
            "and DVC reads a dot as a path. Rename it."
        )
    try:
        return name, Pipeline.model_validate(pipelines[name])
    except ValidationError as error:
        raise KavaError(_explain(path, f"pipelines.{name}", error)) from None


def _explain(path: Path, root: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join([root, *map(str, problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if isinstance(problem["input"], dict) else f", found {problem['input']!r}"
        if problem["type"] == "extra_forbidden":
            message, found = "no such setting", ""
        lines.append(f"{key}: {message}{found}")
    return f"{path} has {len(lines)} wrong setting(s):\n  " + "\n  ".join(lines)
