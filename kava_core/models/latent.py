"""The student: any causal LM that reasons in M continuous tokens before it answers.

METHOD section 3. `LatentReasoner` drives an unmodified decoder through input embeddings and a
cache. Its own parameters are `<bot>`, `<eot>`, the initial latents and the projection; the
vocabulary is not resized. Masks and positions are always explicit, so that a padded batch gives
every problem what it gets alone.

The last latent pass and the answer go through the decoder together: the latents' keys and values
of that pass are the ones the answer reads, and causality keeps the answer out of them. Jacobi
iterations therefore cost T + 1 decoder calls in training, the question's included.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from kava_core.errors import KavaError
from kava_core.models.context import check_context
from kava_core.models.head import read_head
from kava_core.models.loading import attention_implementation
from kava_core.models.phase import rotary_of
from kava_core.models.recompute import switch_recomputing
from kava_core.rotary import Rotary, unrotate


class LatentReasonerConfig(PreTrainedConfig):
    """What a saved student needs besides its weights.

    decoder_config: the decoder's own configuration as a dict (transformers takes an attribute named
    `decoder` for a configuration object); latents: M; iterations: T;
    reasoning: "jacobi" or "sequential"; projection: whether hidden states pass a small MLP before
    they become latents; per_position: one learned initial latent per position, or one for all;
    answer_prompt_ids, eos_token_id: what `generate` writes before the answer and stops at.
    """

    model_type = "latent_reasoner"

    def __init__(
        self,
        decoder_config: dict[str, Any] | None = None,
        latents: int = 0,
        iterations: int = 0,
        reasoning: str = "jacobi",
        projection: bool = True,
        per_position: bool = True,
        answer_prompt_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.decoder_config = decoder_config or {}
        self.latents = latents
        self.iterations = iterations
        self.reasoning = reasoning
        self.projection = projection
        self.per_position = per_position
        self.answer_prompt_ids = answer_prompt_ids or []


@dataclass
class Reasoning:
    """What one teacher-forced forward of the student gives.

    logits:   [B, A+1, V] from the last token of the answer prompt on: row j predicts answer token j
    keys, values: per layer [B, H, M, D] at the latent positions of the last iteration, post-RoPE;
              empty when M = 0
    latent_positions: [B, M], positions of the latents in the student's sequence
    endpoint: [B, L+1, E] at the last token of the answer prompt
    cot_logits: [B, C+P+A, V] of the explicit chain, row j predicts token j of `C A-prompt A`; None
              unless asked for
    readout:  [B, M, V], what the language-model head reads in the hidden states that became the
              latents of the last iteration; None unless asked for
    """

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    latent_positions: Tensor
    endpoint: Tensor
    cot_logits: Tensor | None = None
    readout: Tensor | None = None


@dataclass
class Generation:
    """Answers.

    tokens: [B, N] generated ids, filled up with the end of sequence
    passes: [B] decoder calls until that row was finished, the question's included
    """

    tokens: Tensor
    passes: Tensor


@dataclass
class _State:
    """A decoder in the middle of a sequence: its cache and the mask of all that it was fed."""

    cache: DynamicCache
    mask: Tensor  # [B, fed so far]

    def advance(self, mask: Tensor) -> dict[str, Any]:
        """Arguments of the call that feeds columns with this mask [B, N]; counts them as fed.

        Positions count the real tokens of a row, so padding anywhere shifts nothing; the mask
        covers the past as well, or the padding of the question would be attended to.
        """
        positions = self.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1
        self.mask = torch.cat((self.mask, mask), 1)
        return {
            "attention_mask": self.mask,
            "position_ids": positions.clamp(min=0),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def first(self, columns: int) -> _State:
        """The state after the first columns only; shares tensors (and gradients) with this one."""
        state = self.fork()
        state.mask = self.mask[:, :columns]
        for layer in state.layers:
            layer.keys = layer.keys[:, :, :columns]
            layer.values = layer.values[:, :, :columns]
        return state

    def fork(self) -> _State:
        """A state that can be advanced without this one noticing; its tensors are shared."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.layers]
        return _State(cache, self.mask)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those marked in rows [B]."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    @property
    def layers(self) -> list[Any]:
        """The cache's layers, each with keys and values [B, H, S, D]."""
        return self.cache.layers


class Projection(nn.Module):
    """Hidden state → latent: LayerNorm(h + Linear(GELU(Linear(h)))), [..., E] → [..., E].

    The paper's Linear–GELU–Linear–LayerNorm with a skip around the two linear maps (ours). Fresh,
    the second map is close to zero and the norm's gain is the spread of the embeddings, so that a
    latent is the hidden state at the scale of an embedding. At the hidden state's own scale, twenty
    times larger in a small model, a latent drowns whatever the layers add to it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, size)
        self.down = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def reset(self, scale: float, generator: torch.Generator) -> None:
        """Fresh parameters; scale: the standard deviation of the decoder's input embeddings."""
        for linear, gain in ((self.up, 1.0), (self.down, 0.01)):
            noise = torch.randn(linear.weight.shape, generator=generator)
            linear.weight.copy_(gain * noise * linear.in_features**-0.5)
            linear.bias.zero_()
        self.norm.weight.fill_(scale)
        self.norm.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.down(nn.functional.gelu(self.up(hidden))))


class LatentReasoner(PreTrainedModel):
    """A causal LM that thinks in latents. Build it with `from_teacher` or `from_pretrained`."""

    config_class = LatentReasonerConfig
    base_model_prefix = ""
    main_input_name = "question_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(
        self, config: LatentReasonerConfig, decoder: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if config.reasoning not in ("jacobi", "sequential"):
            raise KavaError(f"reasoning must be jacobi or sequential, not {config.reasoning!r}.")
        decoder_config = AutoConfig.for_model(**config.decoder_config)
        if decoder is None:
            decoder = AutoModelForCausalLM.from_config(
                decoder_config,
                attn_implementation=attention_implementation(decoder_config),
                dtype=torch.get_default_dtype(),  # that of the rest, whatever the teacher's was
            )
        self.decoder: PreTrainedModel = decoder
        self._rotary: Rotary | None = None
        size = decoder_config.hidden_size
        if config.latents:
            rows = config.latents if config.per_position else 1
            self.bot = nn.Parameter(torch.zeros(size))
            self.eot = nn.Parameter(torch.zeros(size))
            self.initial_latents = nn.Parameter(torch.zeros(rows, size))
            self.projection: nn.Module = nn.Identity()
            if config.projection:
                self.projection = Projection(size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The decoder brings its weights; ours are set by `from_teacher` or loaded."""

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel,
        *,
        latents: int,
        iterations: int,
        reasoning: str,
        projection: bool,
        per_position: bool,
        answer_prompt_ids: list[int],
        eos_token_id: int,
        seed: int,
    ) -> LatentReasoner:
        """A student with the teacher's weights and fresh latents of the embeddings' own scale."""
        decoder_config = teacher.config.get_text_config()
        config = LatentReasonerConfig(
            decoder_config=_plain(decoder_config),
            latents=latents,
            iterations=iterations,
            reasoning=reasoning,
            projection=projection,
            per_position=per_position,
            answer_prompt_ids=answer_prompt_ids,
            eos_token_id=eos_token_id,
            tie_word_embeddings=decoder_config.tie_word_embeddings,
        )
        student = cls(config, copy.deepcopy(teacher)).requires_grad_(True)  # a frozen one's too
        like = next(teacher.parameters())
        for parameter in student.parameters():
            # Not `student.to(dtype)`, which would round the rotary frequencies as well.
            parameter.data = parameter.data.to(like)
        if latents:
            generator = torch.Generator().manual_seed(seed)
            embed = cast(nn.Embedding, teacher.get_input_embeddings())
            with torch.no_grad():
                sample = torch.linspace(0, embed.num_embeddings - 1, 4096).long().unique()
                embeddings = embed(sample.to(embed.weight.device)).float().cpu()
                for parameter in (student.bot, student.eot, student.initial_latents):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(embeddings.mean(0) + noise * embeddings.std())
                if isinstance(student.projection, Projection):
                    student.projection.reset(float(embeddings.std()), generator)
        return student

    @classmethod
    def plain(
        cls, model: PreTrainedModel, *, answer_prompt_ids: list[int], eos_token_id: int
    ) -> LatentReasoner:
        """`model` itself, without latents, so that every system is asked in the same way.

        With an answer prompt it answers at once; with none it writes its chain of thought first.
        """
        config = LatentReasonerConfig(
            decoder_config=_plain(model.config.get_text_config()),
            answer_prompt_ids=answer_prompt_ids,
            eos_token_id=eos_token_id,
        )
        return cls(config, model).eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        if self.config.latents:
            raise KavaError(
                "gradient checkpointing detaches the cache: the KV loss would descend and "
                "supervise nothing. Turn it off; use a smaller batch with gradient accumulation "
                "instead."
            )
        switch_recomputing(self.decoder, True)

    def gradient_checkpointing_disable(self) -> None:
        switch_recomputing(self.decoder, False)

    # --- training -------------------------------------------------------------------------------

    def forward(
        self,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        chain_ids: Tensor | None = None,
        chain_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        readout: bool = False,
    ) -> Reasoning:
        """Teacher-forced answers after latent reasoning.

        question_ids, question_mask [B, Q], padded on either side; answer_ids, answer_mask [B, A],
        right-padded, the answer without its prompt. chain_ids, chain_mask [B, N], right-padded, are
        the written chain `C A-prompt A`; given, it is predicted from the question in the same
        weights as well (w_cot). prompt_lengths [B]: how many of a row's answer_ids end with its
        answer prompt, for a student that writes the prompt itself; the endpoint is there. readout:
        whether to give `Reasoning.readout`.
        """
        question_ids, question_mask = _left_padded(question_ids, question_mask)
        state, pending, pending_mask, thoughts = self._reason(question_ids, question_mask)
        tail_ids = torch.cat((self._prompt(len(answer_ids)), answer_ids), 1)
        tail_mask = torch.cat((torch.ones_like(tail_ids[:, : self._prompt_length]), answer_mask), 1)
        output = self._feed(
            state,
            torch.cat((pending, self._eot(len(tail_ids)), self._embed(tail_ids)), 1),
            torch.cat((pending_mask, self._ones(len(tail_ids), self._eot_length), tail_mask), 1),
            logits=answer_ids.shape[1] + 1,
            hidden_states=True,
        )
        at = pending.shape[1] + self._eot_length + self._prompt_length - 1
        ends = output.hidden_states[0].new_full((len(tail_ids),), at, dtype=torch.long)
        if prompt_lengths is not None:
            ends = ends + prompt_lengths
        rows = torch.arange(len(ends), device=ends.device)
        keys, values, positions = self._latent_slots(state, question_mask)
        return Reasoning(
            logits=output.logits,
            keys=keys,
            values=values,
            latent_positions=positions,
            endpoint=torch.stack([h[rows, ends] for h in output.hidden_states], dim=1),
            cot_logits=self._chain(question_ids, question_mask, chain_ids, chain_mask),
            readout=self._read(thoughts) if readout and thoughts is not None else None,
        )

    def _read(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] of the last level → logits [..., V], as the decoder makes them."""
        return read_head(self.decoder, hidden)

    def rotary(self) -> Rotary:
        """How the decoder rotates its keys (see `kava_core.models.phase`)."""
        if self._rotary is None:
            self._rotary = rotary_of(self.decoder)
        return self._rotary

    def slot_keys(self, reasoning: Reasoning, phase: str) -> Tensor:
        """The latents' keys [B, L, H, M, D], `pre_rope` or `post_rope`, with gradient."""
        keys = torch.stack(reasoning.keys, dim=1)
        if phase == "post_rope":
            return keys
        cos, sin = self.rotary().cos_sin(reasoning.latent_positions)  # [L, B, M, R/2]
        cos, sin = (x.to(keys.dtype).transpose(0, 1)[:, :, None] for x in (cos, sin))
        wide = torch.promote_types(keys.dtype, torch.float32)
        return unrotate(keys.to(wide), cos.to(wide), sin.to(wide))

    # --- inference ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Generation:
        """Think, then write the answer.

        input_ids, attention_mask [B, Q], questions padded on either side. Greedy unless
        `do_sample`: then every row draws one random number per token, whatever the other rows do.
        A row ends at the end of sequence or after `max_new_tokens`. Rows that have ended leave the
        batch once they are half of it. KavaError for a temperature or top_p that means nothing.
        """
        if do_sample and not (temperature > 0 and 0 < top_p <= 1):
            raise KavaError(
                "expected a temperature above 0 and a top_p above 0, at most 1, found "
                f"{temperature} and {top_p}. For the likeliest tokens turn do_sample off."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_length(attention_mask)
        input_ids, attention_mask = _left_padded(input_ids, attention_mask)
        warpers = LogitsProcessorList()
        if do_sample:
            warpers.append(TemperatureLogitsWarper(temperature))
            if top_p < 1:
                warpers.append(TopPLogitsWarper(top_p))
        rows, eos = len(input_ids), self.config.eos_token_id
        state, embeds, mask, _ = self._reason(input_ids, attention_mask)
        prompt = self._prompt(rows)
        embeds = torch.cat((embeds, self._eot(rows), self._embed(prompt)), 1)
        mask = torch.cat((mask, self._ones(rows, self._eot_length + prompt.shape[1])), 1)
        tokens = input_ids.new_full((rows, max_new_tokens), eos)
        passes = torch.full((rows,), self.latent_passes, device=input_ids.device)
        fed = torch.arange(rows, device=input_ids.device)  # which rows the batch holds
        running = torch.ones_like(fed, dtype=torch.bool)
        for step in range(max_new_tokens):
            scores = self._feed(state, embeds, mask, logits=1).logits[:, -1].float()
            if do_sample:
                at = torch.rand(rows, device=scores.device)[fed]
                scores = warpers(
                    cast(torch.LongTensor, tokens[fed, :step]), cast(torch.FloatTensor, scores)
                )
                chosen = _drawn(scores.softmax(-1), at)
            else:
                chosen = scores.argmax(-1)
            chosen = chosen.masked_fill(~running, eos)
            passes[fed] += running if step else 0
            tokens[fed, step] = chosen
            running &= chosen != eos
            left = int(running.sum())
            if not left:
                return Generation(tokens[:, : step + 1], passes)
            if 2 * left <= len(fed):
                state.keep(running)
                fed, chosen, running = fed[running], chosen[running], running[running]
            embeds, mask = self._embed(chosen[:, None]), self._ones(len(fed), 1)
        return Generation(tokens, passes)

    def _check_length(self, question_mask: Tensor) -> None:
        """KavaError if a question leaves no place for an answer in the decoder's context."""
        longest = int(question_mask.sum(1).max())
        thought = self.config.latents + 2 * self._eot_length + self._prompt_length
        check_context(
            self.decoder.config,
            longest + thought,
            what=f"a question of {longest} tokens",
            including="latents and answer prompt",
            remedy="Ask a shorter one.",
        )

    @property
    def latent_passes(self) -> int:
        """Decoder calls from the question to the first answer token."""
        if not self.config.latents:
            return 1
        return 1 + (
            self.config.iterations if self.config.reasoning == "jacobi" else self.config.latents
        )

    # --- the latent loop ------------------------------------------------------------------------

    def _reason(
        self, question_ids: Tensor, question_mask: Tensor
    ) -> tuple[_State, Tensor, Tensor, Tensor | None]:
        """Everything before the last latent pass.

        Returns the decoder's state and what is still to be fed, embeddings and mask: the last
        latents, preceded by the question where nothing has been fed yet; and the hidden states
        [B, M, E] that became these latents, None where they are the initial ones.
        """
        if self.training and self.config.latents and self.is_gradient_checkpointing:
            self.gradient_checkpointing_enable()  # was switched on elsewhere; says why not
        rows, width = question_ids.shape
        state = _State(DynamicCache(), question_mask[:, :0])
        question = self._embed(question_ids)
        if not self.config.latents:
            return state, question, question_mask, None
        m = self.config.latents
        prefix = torch.cat((question, self.bot.expand(rows, 1, -1)), 1)  # [B, Q+1, E]
        prefix_mask = torch.cat((question_mask, self._ones(rows, 1)), 1)
        if self.config.reasoning == "sequential":
            thoughts = [self._hidden(state, prefix, prefix_mask)[:, -1:]]
            for _ in range(m - 1):
                latent = self.projection(thoughts[-1])
                thoughts.append(self._hidden(state, latent, self._ones(rows, 1)))
            last = self.projection(thoughts[-1])
            return state, last, self._ones(rows, 1), torch.cat(thoughts, 1)
        latents = self.initial_latents.expand(rows, m, -1)
        if not self.config.iterations:
            return (
                state,
                torch.cat((prefix, latents), 1),
                torch.cat((prefix_mask, self._ones(rows, m)), 1),
                None,
            )
        hidden = self._hidden(
            state,
            torch.cat((prefix, latents), 1),
            torch.cat((prefix_mask, self._ones(rows, m)), 1),
        )
        # Nothing before the latents changes any more: their cache is shared by all iterations.
        state = state.first(width + 1)
        bot = hidden[:, width : width + 1]
        thought = hidden[:, width : width + m]
        for _ in range(self.config.iterations - 1):
            hidden = self._hidden(state.fork(), self.projection(thought), self._ones(rows, m))
            thought = torch.cat((bot, hidden[:, : m - 1]), 1)
        return state, self.projection(thought), self._ones(rows, m), thought

    def _latent_slots(
        self, state: _State, question_mask: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        m, first = self.config.latents, question_mask.shape[1] + 1
        positions = (
            question_mask.sum(1, keepdim=True) + 1 + torch.arange(m, device=question_mask.device)
        )
        if not m:
            return [], [], positions
        slots = slice(first, first + m)
        return (
            [layer.keys[:, :, slots] for layer in state.layers],
            [layer.values[:, :, slots] for layer in state.layers],
            positions,
        )

    def _chain(
        self,
        question_ids: Tensor,
        question_mask: Tensor,
        chain_ids: Tensor | None,
        chain_mask: Tensor | None,
    ) -> Tensor | None:
        if chain_ids is None or chain_mask is None:
            if chain_ids is not chain_mask:
                raise KavaError("chain_ids and chain_mask belong together. Give both, or neither.")
            return None
        output = self._feed(
            _State(DynamicCache(), question_mask[:, :0]),
            self._embed(torch.cat((question_ids, chain_ids), 1)),
            torch.cat((question_mask, chain_mask), 1),
            logits=chain_ids.shape[1] + 1,
        )
        return output.logits[:, :-1]

    # --- the decoder ----------------------------------------------------------------------------

    def _feed(
        self,
        state: _State,
        embeds: Tensor,
        mask: Tensor,
        logits: int,
        hidden_states: bool = False,
    ) -> Any:
        """Advance the decoder by embeds [B, N, E] under mask [B, N]; logits of the last columns."""
        return self.decoder(
            inputs_embeds=embeds,
            logits_to_keep=logits,
            output_hidden_states=hidden_states,
            **state.advance(mask),
        )

    def _hidden(self, state: _State, embeds: Tensor, mask: Tensor) -> Tensor:
        """Advance the decoder; its last hidden states [B, N, E], no logits."""
        return self.decoder.base_model(
            inputs_embeds=embeds, **state.advance(mask)
        ).last_hidden_state

    def _embed(self, ids: Tensor) -> Tensor:
        return self.get_input_embeddings()(ids)

    def _ones(self, rows: int, columns: int) -> Tensor:
        return torch.ones(rows, columns, dtype=torch.long, device=self.device)

    def _prompt(self, rows: int) -> Tensor:
        ids = torch.tensor(self.config.answer_prompt_ids, dtype=torch.long, device=self.device)
        return ids.expand(rows, -1)

    @property
    def _prompt_length(self) -> int:
        return len(self.config.answer_prompt_ids)

    @property
    def _eot_length(self) -> int:
        return 1 if self.config.latents else 0

    def _eot(self, rows: int) -> Tensor:
        if not self.config.latents:
            return self._embed(self._prompt(rows)[:, :0])
        return self.eot.expand(rows, 1, -1)


def _left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with all padding on their left.

    Padding between a question and its latents would count as distance in a sliding window.
    """
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _drawn(probabilities: Tensor, at: Tensor) -> Tensor:
    """Ids [B] drawn from probabilities [B, V] by the numbers `at` [B] in [0, 1)."""
    below = probabilities.double().cumsum(-1)
    return torch.searchsorted(below, at.double()[:, None] * below[:, -1:], right=True)[:, 0]


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as a dict, without the place it was loaded from: that is no part of it."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


AutoConfig.register("latent_reasoner", LatentReasonerConfig)
AutoModel.register(LatentReasonerConfig, LatentReasoner)
