"""Latent reasoning: thinking in M continuous tokens, then writing the answer.

A causal LM that was taught to reason in latents is an ordinary decoder and a few tensors: `<bot>`,
`<eot>`, the initial latents and a projection from hidden states to latents. This file makes one
use of them: the question and `<bot>` are read, the latents are worked out in parallel (Jacobi
iterations) or one after the other, and the answer is written behind `<eot>` and the answer prompt.

Beside such a model it lies as `custom_generate/generate.py`, needs torch, transformers and
safetensors, and is used by

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.generate(**questions, custom_generate=FOLDER, trust_remote_code=True)

Masks and positions are always explicit, so that a padded batch gives every question what it gets
alone. Shapes: B rows, Q question tokens, M latents, E hidden size, N written tokens.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput, cached_file

FORMAT_VERSION = 1
SETTINGS_FILE = "latents.json"
WEIGHTS_FILE = "latents.safetensors"
LARGEST = 1 << 31  # of a number in latents.json
MOST_ITERATIONS = 256  # of a student with fewer latents


class Refused(ValueError):
    """What was asked cannot be done: what was expected, what was found, what to do."""


class Settings(Protocol):
    """How a student reasons: see `LatentSettings`."""

    latents: int
    iterations: int
    reasoning: str
    projection: bool
    per_position: bool
    stride: int
    answer_prompt_ids: list[int]
    projection_size: int
    residual: bool


class Parameters(Protocol):
    """What a student has beside its decoder: see `add_latents`."""

    bot: nn.Parameter
    eot: nn.Parameter
    initial_latents: nn.Parameter
    projection: nn.Module


@dataclass
class LatentSettings:
    """latents.json.

    latents: M, 0 for a student that answers at once; iterations: T; reasoning: "jacobi" or
    "sequential"; projection: whether hidden states pass a small MLP before they become latents;
    per_position: one learned initial latent per position, or one for all; stride: how many
    positions lie from one latent to the next; answer_prompt_ids: what is read behind the latents,
    before the answer is written. Of the projections of others' students, and in the file only where
    they are not as ours: projection_size: its width, 0: that of the hidden states; residual:
    whether it adds what it makes of a hidden state to it.
    """

    latents: int
    iterations: int
    reasoning: str
    projection: bool
    per_position: bool
    stride: int
    answer_prompt_ids: list[int]
    projection_size: int = 0
    residual: bool = True

    def written(self) -> dict[str, Any]:
        """What latents.json says, without what is at its default."""
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}

    @classmethod
    def read(cls, path: Path) -> LatentSettings:
        """Refused if the file holds anything else than these settings in this format."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise Refused(f"{path} cannot be read ({error}). Copy or make it again.") from None
        version = found.pop("format_version", None) if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise Refused(
                f"{path}: expected format_version {FORMAT_VERSION}, found {version!r:.80}. Use "
                "the version of the library that wrote it."
            )
        types = {"reasoning": str, "projection": bool, "per_position": bool, "residual": bool}
        names = [field.name for field in fields(cls) if field.default is MISSING]
        if found.keys() - {field.name for field in fields(cls)} or set(names) - found.keys():
            raise Refused(
                f"{path}: expected {', '.join(names)}, found {', '.join(sorted(found)):.200}. Copy "
                "or make it again."
            )
        for name, value in found.items():
            if name == "answer_prompt_ids":
                right = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
            elif name in types:
                right = type(value) is types[name]
            else:
                right = type(value) is int and (name == "stride") <= value < LARGEST
            if not right or (name == "reasoning" and value not in ("jacobi", "sequential")):
                raise Refused(f"{path}: {name} cannot be {value!r:.80}. Copy or make it again.")
        settings = cls(**found)
        most = max(settings.latents, MOST_ITERATIONS)
        if settings.iterations > most:
            raise Refused(
                f"{path}: expected at most {most} iterations, found {settings.iterations}. More "
                f"than there are latents ({settings.latents}) change nothing: write a smaller "
                "number, or copy the file again."
            )
        return settings


def add_latents(module: nn.Module, size: int, settings: Settings) -> None:
    """Give `module` the parameters that a student has beside its decoder, E = `size`, all zero.

    bot, eot [E]; initial_latents [M, E], or [1, E] for all positions alike; projection.
    """
    rows = settings.latents if settings.per_position else 1
    for name, shape in (("bot", (size,)), ("eot", (size,)), ("initial_latents", (rows, size))):
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    width = settings.projection_size or size
    projection = Projection(size, width, settings.residual) if settings.projection else None
    module.add_module("projection", projection or nn.Identity())


def read_latents(path: Path, size: int, settings: Settings) -> dict[str, Tensor]:
    """What fills the parameters of `add_latents`, by their names.

    Refused if a tensor is missing, one too many, or of another shape, before any is read.
    """
    with torch.device("meta"):  # settings may ask for more than there is memory
        wanted = nn.Module()
        add_latents(wanted, size, settings)
    own = {name: list(parameter.shape) for name, parameter in wanted.named_parameters()}
    try:
        with safe_open(path, "pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_latents(path, own, found)
            return {name: file.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path} cannot be read ({error}). Copy or make it again.") from None


def _check_latents(path: Path, own: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    for what, names in (("lacks", own.keys() - found), ("has too much:", found.keys() - own)):
        if names:
            raise Refused(
                f"{path} {what} {', '.join(sorted(names)):.200}. It belongs to other settings than "
                f"{SETTINGS_FILE} beside it: copy or make both again."
            )
    for name, shape in own.items():
        if found[name] != shape:
            raise Refused(
                f"{path}: expected {name} of shape {shape}, found {found[name]!s:.80}. It "
                f"belongs to another model than {SETTINGS_FILE} and config.json beside it: copy or "
                "make them again."
            )


def fill_latents(module: nn.Module, found: dict[str, Tensor], like: Tensor) -> None:
    """Put what `read_latents` gave into the parameters of `add_latents`, in the dtype and on the
    device of `like`."""
    for name, tensor in found.items():
        module.get_parameter(name).data = tensor.to(like)


class Projection(nn.Module):
    """Hidden state → latent: LayerNorm(h + Linear(GELU(Linear(h)))), [..., E] → [..., E].

    width: of what is between the two; residual: False for a sum without h.
    """

    def __init__(self, size: int, width: int, residual: bool) -> None:
        super().__init__()
        self.up = nn.Linear(size, width)
        self.down = nn.Linear(width, size)
        self.norm = nn.LayerNorm(size)
        self.residual = residual

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.down(nn.functional.gelu(self.up(hidden)))
        return self.norm(hidden + made if self.residual else made)


# --- thinking -----------------------------------------------------------------------------------


@dataclass
class State:
    """A decoder in the middle of a sequence: its cache, and mask and positions of all that it was
    fed, both [B, fed so far]."""

    cache: DynamicCache
    mask: Tensor
    positions: Tensor

    @classmethod
    def before(cls, mask: Tensor) -> State:
        """That of a decoder that was fed nothing, of questions with this mask."""
        return cls(DynamicCache(), mask[:, :0], mask[:, :0])

    def advance(self, mask: Tensor, steps: Tensor | None = None) -> dict[str, Any]:
        """Arguments of the call that feeds columns with this mask [B, N]; counts them as fed.

        steps: how far each column is from the one before it, [N]; None: 1. Positions count the real
        tokens of a row, so padding anywhere shifts nothing; the mask covers the past as well, or
        the padding of the question would be attended to.
        """
        positions = self.positions_of(mask, steps)
        self.mask = torch.cat((self.mask, mask), 1)
        self.positions = torch.cat((self.positions, positions), 1)
        return {
            "attention_mask": self.mask,
            "position_ids": positions.clamp(min=0),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def positions_of(self, mask: Tensor, steps: Tensor | None) -> Tensor:
        """[B, N], of columns that follow what was fed."""
        last = self.positions[:, -1:] if self.positions.shape[1] else -mask.new_ones(len(mask), 1)
        return last + (mask if steps is None else mask * steps).cumsum(1)

    def first(self, columns: int) -> State:
        """The state after the first columns only; shares tensors (and gradients) with this one."""
        state = self.fork()
        state.mask = self.mask[:, :columns]
        state.positions = self.positions[:, :columns]
        for layer in state.layers:
            layer.keys = layer.keys[:, :, :columns]
            layer.values = layer.values[:, :, :columns]
        return state

    def fork(self) -> State:
        """A state that can be advanced without this one noticing; its tensors are shared."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.layers]
        return State(cache, self.mask, self.positions)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those marked in rows [B]."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.positions = self.positions[rows]

    def repeat(self, times: int) -> None:
        """Every row so many times, one beside the other."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)
        self.positions = self.positions.repeat_interleave(times, 0)

    @property
    def layers(self) -> list[Any]:
        """The cache's layers, each with keys and values [B, H, S, D]."""
        return self.cache.layers


@dataclass
class Thought:
    """Everything before the last latent pass, which goes through the decoder with the answer.

    embeds, mask, steps: [B, N, E], [B, N] and [N], what is still to be fed: the last latents,
    preceded by the question where nothing has been fed yet (`State.advance`); latents [B, M, E], as
    they are fed; hidden: the hidden states [B, M, E] that became them, None where they are the
    initial ones; both None if M = 0.
    """

    state: State
    embeds: Tensor
    mask: Tensor
    steps: Tensor
    latents: Tensor | None
    hidden: Tensor | None


def passes_to_think(settings: Settings) -> int:
    """Decoder calls from the question to the first token of the answer."""
    if not settings.latents:
        return 1
    return 1 + (settings.iterations if settings.reasoning == "jacobi" else settings.latents)


def positions_to_think(settings: Settings) -> int:
    """Positions from the question to the answer prompt: of `<bot>`, the latents and `<eot>`."""
    return settings.latents * settings.stride + 2 if settings.latents else 0


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with all padding on their left.

    Padding between a question and its latents would count as distance in a sliding window.
    """
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def think(
    decoder: PreTrainedModel, own: Parameters, settings: Settings, ids: Tensor, mask: Tensor
) -> Thought:
    """Read the questions ids, mask [B, Q], padded on the left, and reason about them."""
    rows, width = ids.shape
    state = State.before(mask)
    question = decoder.get_input_embeddings()(ids)
    m = settings.latents
    if not m:
        return Thought(state, question, mask, mask.new_ones(width), None, None)

    def ones(columns: int) -> Tensor:
        return mask.new_ones(rows, columns)

    def hidden_of(state: State, embeds: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
        """Advance the decoder; its last hidden states [B, N, E], no logits."""
        arguments = state.advance(mask, steps)
        return decoder.base_model(inputs_embeds=embeds, **arguments).last_hidden_state

    prefix = torch.cat((question, own.bot.expand(rows, 1, -1)), 1)  # [B, Q+1, E]
    prefix_mask = torch.cat((mask, ones(1)), 1)
    one, strides = mask.new_ones(width + 1), mask.new_full((m,), settings.stride)
    if settings.reasoning == "sequential":
        thoughts = [hidden_of(state, prefix, prefix_mask, one)[:, -1:]]
        latents = [own.projection(thoughts[-1])]
        for _ in range(m - 1):
            thoughts.append(hidden_of(state, latents[-1], ones(1), strides[:1]))
            latents.append(own.projection(thoughts[-1]))
        every = torch.cat(latents, 1)
        return Thought(state, latents[-1], ones(1), strides[:1], every, torch.cat(thoughts, 1))
    z = own.initial_latents.expand(rows, m, -1)
    whole, whole_mask = torch.cat((prefix, z), 1), torch.cat((prefix_mask, ones(m)), 1)
    steps = torch.cat((one, strides))
    if not settings.iterations:
        return Thought(state, whole, whole_mask, steps, z, None)
    hidden = hidden_of(state, whole, whole_mask, steps)
    # Nothing before the latents changes any more: their cache is shared by all iterations.
    state = state.first(width + 1)
    bot = hidden[:, width : width + 1]
    thought = hidden[:, width : width + m]
    for _ in range(settings.iterations - 1):
        hidden = hidden_of(state.fork(), own.projection(thought), ones(m), strides)
        thought = torch.cat((bot, hidden[:, : m - 1]), 1)
    z = own.projection(thought)
    return Thought(state, z, ones(m), strides, z, thought)


# --- answering ----------------------------------------------------------------------------------


@dataclass
class LatentOutput(ModelOutput):
    """What `generate` gives with `return_dict_in_generate`: what transformers gives, and

    tokens: [B, N] what was written, without the question before it; passes: [B] decoder calls until
    that row had ended, the question's and the latents' included (with beams, which end together, of
    the whole batch); latents, thoughts: [B, M, E] the latents that the answer read, and the hidden
    states that became them. B counts `num_return_sequences`.
    """

    # The first three are always there; transformers wants a default of all but one.
    sequences: Tensor
    tokens: Tensor = None  # type: ignore[assignment]
    passes: Tensor = None  # type: ignore[assignment]
    latents: Tensor | None = None
    thoughts: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None


_FOLLOWS = "a question is a row of token ids, and the latents follow it"
_GROWS = "thinking needs a cache that grows and is cut back after each iteration"
_GUESSES = "its guesses would be made or checked without the latents"
_ENCODED = "it looks for a question's tokens where transformers' own loops get embeddings"
# What `generate` of transformers takes and a model that thinks cannot, and why.
_REFUSED = {
    "inputs_embeds": _FOLLOWS,
    "past_key_values": _FOLLOWS,
    "position_ids": _FOLLOWS,
    "token_type_ids": _FOLLOWS,
    "token_healing": _FOLLOWS,
    "assistant_model": _GUESSES,
    "assistant_early_exit": _GUESSES,
    "prompt_lookup_num_tokens": _GUESSES,
    "use_mtp": _GUESSES,
    "guidance_scale": "the unguided half would answer without the latents",
    "negative_prompt_ids": "the negative half would answer without the latents",
    "negative_prompt_attention_mask": "the negative half would answer without the latents",
    "cache_implementation": _GROWS,
    "cache_config": _GROWS,
    "compile_config": _GROWS,
    "prefill_chunk_size": _GROWS,
    "penalty_alpha": "contrastive search is another custom_generate",
    "dola_layers": "DoLa is another custom_generate",
    "constraints": "constrained beams are another custom_generate",
    "force_words_ids": "constrained beams are another custom_generate",
    "num_beam_groups": "beams in groups are another custom_generate",
    "encoder_repetition_penalty": _ENCODED,
    "encoder_no_repeat_ngram_size": _ENCODED,
}
# The values, beside None and False, at which these ask for nothing.
_IDLE = {
    "cache_implementation": "dynamic",
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
}
# Beside these, settings that take the whole way through transformers' own loops.
_TRANSFORMERS_OWN = (
    "streamer",
    "stop_strings",
    "synced_gpus",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
# What transformers hands to every decoding loop.
_TO_ALL = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
# These look at one row at a time and remember none.
_ROW_BY_ROW = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@torch.no_grad()
def answer(
    decoder: PreTrainedModel,
    own: Parameters,
    settings: Settings,
    ids: Tensor,
    mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Tensor | LatentOutput:
    """Think, then write: transformers' `generate`, with latents between question and answer.

    ids, mask [B, Q], padded on either side; options as transformers' `generate` takes them, with
    the decoder's `generation_config` for what is not said. Returns [B, Q + N], the questions
    (padded on the left) and what was written, or a LatentOutput. Refused where an option cannot be
    had with latents.

    Greedy and sampled answers are written here, so that rows which have ended leave the batch once
    they are half of it, and each row draws one random number per token whatever the others do.
    Beams, streamers and whatever else looks at the rows are for transformers' own loops.
    """
    options = {name: value for name, value in options.items() if value is not None}
    asked = _Asked(decoder, generation_config, options)
    asked.check()
    shape = ids.shape if mask is None else mask.shape
    if ids.ndim != 2 or ids.is_floating_point() or shape != ids.shape:
        raise Refused(
            f"expected token ids [rows, tokens] and a mask of their shape, found {list(ids.shape)} "
            f"({ids.dtype}) and {list(shape)}. Give what a tokenizer gives with "
            "return_tensors='pt'."
        )
    mask = asked.mask_of(ids) if mask is None else mask.long()
    device = decoder.device
    ids, mask = left_padded(ids.to(device).long(), mask.to(device))
    _check_length(decoder, settings, mask)
    room = _room(decoder, settings, mask)
    rows, width = ids.shape
    generation_config, options = asked.lengths(width)
    thought = think(decoder, own, settings, ids, mask)
    prompt = torch.tensor(settings.answer_prompt_ids, dtype=torch.long, device=device)
    tail = decoder.get_input_embeddings()(prompt).expand(rows, -1, -1)  # [B, P, E]
    if settings.latents:
        tail = torch.cat((own.eot.expand(rows, 1, -1), tail), 1)
    embeds = torch.cat((thought.embeds, tail), 1)
    embeds_mask = torch.cat((thought.mask, mask.new_ones(tail.shape[:2])), 1)
    steps = torch.cat((thought.steps, mask.new_ones(tail.shape[1])))
    writer = _Writer(thought.state, embeds, embeds_mask, steps, asked.eos, room)
    beams, copies = asked.get("num_beams") or 1, asked.get("num_return_sequences") or 1
    call: dict[str, Any] = {"input_ids": ids, "generation_config": generation_config, **options}
    found: Any
    if beams == 1 and not any(asked.get(name) for name in _TRANSFORMERS_OWN):
        call |= {"attention_mask": mask, "custom_generate": writer}
        sequences, written = cast(Any, type(decoder)).generate(decoder, **call)
        found = {"sequences": sequences}
    else:
        if asked.get("cache_implementation"):
            call["cache_implementation"] = None  # they refuse one beside a cache
        criteria = list(options.get("stopping_criteria", ()))
        if room is not None:
            criteria.append(_Filled(width + int(room.min())))
        if beams == 1:
            ends = _Ends(asked, criteria, rows * copies, width)
            criteria = [*ends.others, ends]
        call["stopping_criteria"] = criteria
        calls: list[None] = []
        counter = decoder.base_model.register_forward_hook(lambda *_: calls.append(None))
        try:
            found = cast(Any, type(decoder)).generate(
                decoder, **call, **writer.whole(max(beams, copies))
            )
        finally:
            counter.remove()
        found = found if isinstance(found, ModelOutput) else {"sequences": found}
        sequences = found["sequences"]
        if beams == 1:
            written = ends.written.clamp(max=sequences.shape[1] - width)
        else:
            written = torch.full((len(sequences),), len(calls), device=device)
    if not asked.get("return_dict_in_generate"):
        return cast(Tensor, sequences)
    return LatentOutput(
        **found,
        tokens=sequences[:, width:],
        passes=passes_to_think(settings) - 1 + written,
        latents=_copied(thought.latents, copies),
        thoughts=_copied(thought.hidden, copies),
    )


class _Asked:
    """What a call of `generate` asks for: its options, its configuration, the model's."""

    def __init__(
        self, decoder: PreTrainedModel, config: GenerationConfig | None, options: dict[str, Any]
    ) -> None:
        self.config, self.options = config, options
        self.sources = (config, decoder.generation_config)

    def get(self, name: str) -> Any:
        """None where nobody says anything."""
        if name in self.options:
            return self.options[name]
        values = (getattr(source, name, None) for source in self.sources)
        return next((value for value in values if value is not None), None)

    @property
    def eos(self) -> list[int]:
        """The ids that end an answer."""
        found = self.get("eos_token_id")
        if found is None:
            return []
        if isinstance(found, Tensor):
            return [int(i) for i in found.flatten().tolist()]
        return list(found) if isinstance(found, Sequence) else [found]

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask of questions that came without, as transformers infers it from padding."""
        pad = self.get("pad_token_id")
        if pad is not None and pad not in self.eos:
            return ids.ne(pad).long()
        if len(ids) > 1:
            warnings.warn(
                "questions came without an attention_mask, and padding cannot be told from tokens: "
                "pad_token_id is not set, or ends an answer too. Give the tokenizer's mask.",
                stacklevel=3,
            )
        return torch.ones_like(ids, dtype=torch.long)

    def check(self) -> None:
        for name, why in _REFUSED.items():
            value = self.get(name)
            if value is None or value is False or (name in _IDLE and value == _IDLE[name]):
                continue
            raise Refused(f"`{name}` cannot be had with latents: {why}. Leave it out.")
        if self.get("use_cache") is False:
            raise Refused(f"`use_cache` cannot be False with latents: {_GROWS}. Leave it out.")
        if self.get("do_sample"):
            temperature, top_p = self.get("temperature"), self.get("top_p")
            temperature = 1.0 if temperature is None else temperature
            top_p = 1.0 if top_p is None else top_p
            if not (temperature > 0 and 0 < top_p <= 1):
                raise Refused(
                    "expected a temperature above 0 and a top_p above 0, at most 1, found "
                    f"{temperature} and {top_p}. For the likeliest tokens turn do_sample off."
                )

    def lengths(self, width: int) -> tuple[GenerationConfig | None, dict[str, Any]]:
        """Configuration and options with max_length and min_length counted behind the question.

        transformers counts embeddings where it is given them, and the latents are such.
        """
        options = dict(self.options)
        config = copy.deepcopy(self.config)
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            asked = options.pop(total, None)
            if asked is None and config is not None:
                asked = getattr(config, total, None)
                setattr(config, total, None)
            said = options.get(new, getattr(config, new, None))
            if asked is None and said is None:  # then the model's say
                asked, said = (getattr(self.sources[-1], name, None) for name in (total, new))
            if asked is None or said is not None:
                continue
            if total == "max_length" and asked <= width:
                raise Refused(
                    f"max_length is {asked}, and the question has {width} tokens already. Ask for "
                    "more, or set max_new_tokens."
                )
            if config is None:
                options[new] = max(asked - width, 0)
            else:
                setattr(config, new, max(asked - width, 0))
        return config, options


class _Writer:
    """Writes behind embeddings [B, N, E] with mask [B, N] and steps [N] that are still to be fed to
    a state, in each row at most as much as it has room for, [B]."""

    def __init__(
        self,
        state: State,
        embeds: Tensor,
        mask: Tensor,
        steps: Tensor,
        eos: list[int],
        room: Tensor | None,
    ) -> None:
        self.state, self.embeds, self.mask, self.eos = state, embeds, mask, eos
        self.steps: Tensor | None = steps
        self.room = room

    def whole(self, copies: int) -> dict[str, Any]:
        """The same for transformers' own loops, each row `copies` times in the cache.

        They cut off as many embeddings as the cache has tokens, whatever these are.
        """
        past = self.state.mask
        positions = torch.cat(
            (self.state.positions, self.state.positions_of(self.mask, self.steps)), 1
        ).clamp(min=0)
        fed = self.embeds.new_zeros(*past.shape, self.embeds.shape[-1])
        if copies > 1:
            self.state.repeat(copies)
        return {
            "inputs_embeds": torch.cat((fed, self.embeds), 1),
            "attention_mask": torch.cat((past, self.mask), 1),
            "position_ids": positions,
            "past_key_values": self.state.cache,
        }

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        """A decoding loop as transformers calls it: [R, Q + N], and what each row wrote, [R]."""
        unknown = [name for name in rest if name not in _TO_ALL and rest[name] is not None]
        if unknown:
            raise Refused(
                f"`{unknown[0]}` cannot be had with latents: it is an argument of the model's own "
                "forward. Leave it out."
            )
        state, embeds, mask, steps = self.state, self.embeds, self.mask, self.steps
        rows, width = input_ids.shape
        longest = int(cast(int, generation_config.max_length))
        room = mask.new_full((len(mask),), longest) if self.room is None else self.room
        if rows > len(mask):
            copies = rows // len(mask)
            state.repeat(copies)
            embeds, mask, room = (x.repeat_interleave(copies, 0) for x in (embeds, mask, room))
        pad = generation_config.pad_token_id
        pad = (self.eos or [0])[0] if pad is None else pad
        sequences = input_ids.new_full((rows, longest), pad)
        sequences[:, :width] = input_ids
        written = torch.full((rows,), longest - width, device=input_ids.device)
        fed = torch.arange(rows, device=input_ids.device)  # which rows the batch holds
        running = torch.ones_like(fed, dtype=torch.bool)
        leave = all(isinstance(processor, _ROW_BY_ROW) for processor in logits_processor)
        embed = model.get_input_embeddings()
        for at in range(width, longest):
            call = state.advance(mask, steps)
            if self.room is not None:  # rows that have ended are fed on
                call["position_ids"].clamp_(max=_context(model) - 1)
            output = model(inputs_embeds=embeds, logits_to_keep=1, **call)
            scores: Tensor = output.logits[:, -1].float()
            so_far = cast(torch.LongTensor, sequences[fed, :at])
            scores = logits_processor(so_far, cast(torch.FloatTensor, scores))
            if generation_config.do_sample:
                draws = torch.rand(rows, device=scores.device)[fed]
                chosen = _drawn(scores.softmax(-1), draws)
            else:
                chosen = scores.argmax(-1)
            chosen = chosen.masked_fill(~running, pad)
            sequences[fed, at] = chosen
            stopped = stopping_criteria(cast(torch.LongTensor, sequences[fed, : at + 1]), scores)
            ended = running & (stopped | (at + 1 - width >= room[fed]))
            written[fed[ended]] = at + 1 - width
            running = running & ~ended
            left = int(running.sum())
            if not left:
                return sequences[:, : at + 1], written
            if leave and 2 * left <= len(fed):
                state.keep(running)
                fed, chosen, running = fed[running], chosen[running], running[running]
            embeds, mask, steps = embed(chosen[:, None]), mask.new_ones(len(fed), 1), None
        return sequences, written


class _Filled(StoppingCriteria):
    """Ends all rows once they have so many columns."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        filled = input_ids.shape[1] >= self.columns
        return torch.full((len(input_ids),), filled, device=input_ids.device)


class _Ends(StoppingCriteria):
    """Keeps how much each row had written when it ended, [R]; LARGEST where it had not.

    It asks criteria in their place, since they may remember what they saw. Those of transformers'
    own types do not, and put its own aside: they stay beside this one, as `others`.
    """

    def __init__(
        self, asked: _Asked, criteria: list[StoppingCriteria], rows: int, width: int
    ) -> None:
        self.others = [x for x in criteria if type(x).__module__ == StoppingCriteria.__module__]
        self.own = StoppingCriteriaList(x for x in criteria if x not in self.others)
        strings, tokenizer = asked.get("stop_strings"), asked.options.get("tokenizer")
        default: list[StoppingCriteria] = [EosTokenCriteria(asked.eos)] if asked.eos else []
        if strings is not None and tokenizer is not None:
            default.append(StopStringCriteria(tokenizer, strings))
        given = {type(x) for x in self.others}
        # All others end every row at once.
        self.watched = StoppingCriteriaList(
            [x for x in self.others if isinstance(x, EosTokenCriteria | StopStringCriteria)]
        )
        self.watched += [x for x in default if type(x) not in given]
        self.width = width
        self.written = torch.full((rows,), LARGEST)

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        stopped = self.own(input_ids, scores, **more)
        ended = stopped | self.watched(input_ids, scores, **more)
        written = self.written.to(ended.device)
        at = input_ids.shape[1] - self.width
        self.written = torch.where(ended, written.clamp(max=at), written)
        return stopped


def _context(decoder: PreTrainedModel) -> Any:
    """None where the model names no bound."""
    return getattr(decoder.config.get_text_config(), "max_position_embeddings", None)


def _room(decoder: PreTrainedModel, settings: Settings, mask: Tensor) -> Tensor | None:
    """How many tokens can be written in each row, [B]; None where positions are not learned.

    A model that rotates its keys can write on past its context, one that looks its positions up in
    a table cannot.
    """
    context, tokens = _context(decoder), decoder.get_input_embeddings()
    tables = [
        module.num_embeddings
        for module in decoder.modules()
        if isinstance(module, nn.Embedding) and module is not tokens
    ]
    # OPT's has two rows more than positions.
    if context is None or not any(context <= rows <= context + 2 for rows in tables):
        return None
    before = positions_to_think(settings) + len(settings.answer_prompt_ids)
    return (context - before - mask.sum(1)).clamp(min=1)


def _check_length(decoder: PreTrainedModel, settings: Settings, mask: Tensor) -> None:
    context = _context(decoder)
    longest = int(mask.sum(1).max())
    thought = positions_to_think(settings) + len(settings.answer_prompt_ids)
    if context is not None and longest + thought > context:
        raise Refused(
            f"a question of {longest} tokens takes {longest + thought} positions with latents and "
            f"answer prompt, and the model's context is {context}. Ask a shorter one."
        )


def _copied(x: Tensor | None, copies: int) -> Tensor | None:
    return x if x is None or copies == 1 else x.repeat_interleave(copies, 0)


def _drawn(probabilities: Tensor, at: Tensor) -> Tensor:
    """Ids [B] drawn from probabilities [B, V] by the numbers `at` [B] in [0, 1)."""
    below = probabilities.double().cumsum(-1)
    return torch.searchsorted(below, at.double()[:, None] * below[:, -1:], right=True)[:, 0]


# --- transformers' custom_generate ----------------------------------------------------------------


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | LatentOutput:
    """What `model.generate(…, custom_generate=FOLDER, trust_remote_code=True)` runs: `answer`."""
    ids = inputs if input_ids is None else input_ids
    if ids is None:
        raise Refused("expected a question as input_ids, found none.")
    settings, own = _latents_of(model)
    return answer(
        model,
        cast(Parameters, own),
        settings,
        ids,
        attention_mask,
        generation_config,
        **options,
    )


def _latents_of(model: PreTrainedModel) -> tuple[LatentSettings, nn.Module]:
    """Settings and parameters that lie beside the model's weights, read once and kept with it."""
    like = cast(nn.Embedding, model.get_input_embeddings()).weight
    kept = model.__dict__.get("_latents_beside")
    if kept is None:
        settings = LatentSettings.read(_beside(model, SETTINGS_FILE))
        own = nn.Module()
        if settings.latents:
            size = model.config.get_text_config().hidden_size
            found = read_latents(_beside(model, WEIGHTS_FILE), size, settings)
            add_latents(own, size, settings)
            fill_latents(own, found, like)
        # Not as a part of the model, which is saved as it was loaded.
        kept = model.__dict__["_latents_beside"] = (settings, own.eval())
    settings, own = kept
    return settings, own.to(device=like.device, dtype=like.dtype)


def _beside(model: PreTrainedModel, name: str) -> Path:
    place = model.config._name_or_path
    try:
        found = cached_file(place, name, revision=getattr(model.config, "_commit_hash", None))
    except OSError as error:
        raise Refused(
            f"the model was loaded from {place!r}, and there is no {name} there ({error}). Load it "
            "from the student's folder or repository."
        ) from None
    return Path(str(found))
