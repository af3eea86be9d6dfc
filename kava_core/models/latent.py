"""The student: any causal LM that reasons in M continuous tokens before it answers.

METHOD section 3. `LatentReasoner` drives an unmodified decoder through input embeddings and a
cache (`kava_core.models.thinking`). Its own parameters are `<bot>`, `<eot>`, the initial latents
and the projection; the vocabulary is not resized.

The last latent pass and the answer go through the decoder together: the latents' keys and values
of that pass are the ones the answer reads, and causality keeps the answer out of them. Jacobi
iterations therefore cost T + 1 decoder calls in training, the question's included.

On disk a student is its decoder, as transformers saves it, and beside it what `thinking` needs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.models import thinking
from kava_core.models.head import losses_of_call, read_head
from kava_core.models.inspection import look_at
from kava_core.models.loading import load_config, load_model, save_model
from kava_core.models.phase import rotary_of
from kava_core.models.recompute import switch_recomputing
from kava_core.models.thinking import (
    FORMAT_VERSION,
    MOST_ITERATIONS,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    LatentOutput,
    LatentSettings,
    Projection,
    Refused,
    State,
    Thought,
    add_latents,
    answer,
    fill_latents,
    left_padded,
    passes_to_think,
    read_latents,
    think,
)
from kava_core.rotary import Rotary, unrotate

GENERATE_FILE = "custom_generate/generate.py"
LONGEST = 64  # tokens of an answer, where nothing else is asked for


class LatentReasonerConfig(PreTrainedConfig):
    """What a student is besides its decoder and its weights.

    The fields of `thinking.LatentSettings`; eos_token_id: what ends an answer, one id or several.
    """

    model_type = "latent_reasoner"

    def __init__(
        self,
        latents: int = 0,
        iterations: int = 0,
        reasoning: str = "jacobi",
        projection: bool = True,
        per_position: bool = True,
        stride: int = 1,
        answer_prompt_ids: list[int] | None = None,
        projection_size: int = 0,
        residual: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.latents = latents
        self.iterations = iterations
        self.reasoning = reasoning
        self.projection = projection
        self.per_position = per_position
        self.stride = stride
        self.answer_prompt_ids = answer_prompt_ids or []
        self.projection_size = projection_size
        self.residual = residual


@dataclass
class Reasoning:
    """What one teacher-forced forward of the student gives.

    logits:   [B, A+1, V] from the last token of the answer prompt on: row j predicts answer token j
    keys, values: per layer [B, H, M, D] at the latent positions of the last iteration, post-RoPE;
              empty when M = 0
    latent_positions: [B, M], positions of the latents in the student's sequence
    endpoint: [B, L+1, E] at the last token of the answer prompt
    chain_losses: [B, C+P+A], cross-entropy of each token of the written chain `C A-prompt A`, 0 for
              padding; None unless asked for
    readout:  [B, M, V], what the language-model head reads in the hidden states that became the
              latents of the last iteration; None unless asked for
    """

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    latent_positions: Tensor
    endpoint: Tensor
    chain_losses: Tensor | None = None
    readout: Tensor | None = None


class LatentReasoner(PreTrainedModel):
    """A causal LM that thinks in latents. Build it with `from_teacher` or `from_pretrained`."""

    config_class = LatentReasonerConfig
    base_model_prefix = ""
    main_input_name = "question_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: LatentReasonerConfig, decoder: PreTrainedModel) -> None:
        super().__init__(config)
        if config.reasoning not in ("jacobi", "sequential"):
            raise KavaError(f"reasoning must be jacobi or sequential, not {config.reasoning!r}.")
        if config.iterations > (most := max(config.latents, MOST_ITERATIONS)):
            raise KavaError(
                f"expected at most {most} iterations, found {config.iterations}. More than there "
                f"are latents ({config.latents}) change nothing: set fewer."
            )
        self.decoder: PreTrainedModel = decoder
        self._rotary: Rotary | None = None
        self.bot: nn.Parameter
        self.eot: nn.Parameter
        self.initial_latents: nn.Parameter
        self.projection: nn.Module
        if config.latents:
            add_latents(self, decoder.config.get_text_config().hidden_size, config)
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
        stride: int = 1,
    ) -> LatentReasoner:
        """A student with the teacher's weights and fresh latents of the embeddings' own scale."""
        config = LatentReasonerConfig(
            latents=latents,
            iterations=iterations,
            reasoning=reasoning,
            projection=projection,
            per_position=per_position,
            stride=stride,
            answer_prompt_ids=answer_prompt_ids,
            eos_token_id=eos_token_id,
            tie_word_embeddings=teacher.config.get_text_config().tie_word_embeddings,
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
                    _reset(student.projection, float(embeddings.std()), generator)
        return student

    @classmethod
    def plain(
        cls, model: PreTrainedModel, *, answer_prompt_ids: list[int], eos_token_id: int
    ) -> LatentReasoner:
        """`model` itself, without latents, so that every system is asked in the same way.

        With an answer prompt it answers at once; with none it writes its chain of thought first.
        """
        config = LatentReasonerConfig(
            answer_prompt_ids=answer_prompt_ids,
            eos_token_id=eos_token_id,
            tie_word_embeddings=model.config.get_text_config().tie_word_embeddings,
        )
        return cls(config, model).eval()

    # --- files ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        base: str | os.PathLike[str] | None = None,
    ) -> LatentReasoner:
        """The student in a folder or a repository of the Hub, in evaluation mode, on the CPU.

        dtype: the one it was saved in, unless told; attn_implementation: that of `load_model`,
        unless told; revision: of a repository. base: of a student that is kept as adapters, the
        model they belong on, if it is not where they say. No code from there is run. KavaError if
        there is no student, or its parts do not belong together.
        """
        place, on = os.fspath(path), None if base is None else os.fspath(base)
        look_at("student", place, revision)
        try:
            settings = LatentSettings.read(_file(place, SETTINGS_FILE, revision))
            if dtype is None:
                stored = load_config(place, revision).dtype
                dtype = stored if isinstance(stored, torch.dtype) else torch.float32
            decoder = load_model(place, dtype, revision, on)
            if attn_implementation is not None:
                decoder.set_attn_implementation(attn_implementation)
            tokens = cast(nn.Embedding, decoder.get_input_embeddings()).num_embeddings
            if any(token >= tokens for token in settings.answer_prompt_ids):
                raise Refused(
                    f"the answer prompt in {SETTINGS_FILE} has a token beyond the {tokens} that "
                    "the model has. Copy or make both again."
                )
            own: dict[str, Tensor] = {}
            if settings.latents:
                size = decoder.config.get_text_config().hidden_size
                own = read_latents(_file(place, WEIGHTS_FILE, revision), size, settings)
            student = cls(
                LatentReasonerConfig(
                    **asdict(settings),
                    eos_token_id=decoder.generation_config.eos_token_id,
                    tie_word_embeddings=decoder.config.get_text_config().tie_word_embeddings,
                ),
                decoder,
            )
            fill_latents(student, own, like=next(decoder.parameters()))
        except (KavaError, SafetensorError, ValueError) as error:
            raise KavaError(f"no student could be loaded from {place}: {error}") from None
        return student.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        whole: bool = True,
    ) -> None:
        """A folder that transformers loads as the decoder, and `from_pretrained` as the student.

        Weights larger than `max_shard_size` are cut into several files, all of which are as
        readable as the configuration beside them. The Trainer, which gives the state_dict itself,
        gets a checkpoint of it instead: what is trained may hold more than a student does. whole:
        False for a student whose decoder is kept as adapters, which lie in the folder already.
        """
        if state_dict is not None:
            super().save_pretrained(
                save_directory, state_dict=state_dict, is_main_process=is_main_process
            )
            return
        folder = Path(save_directory)
        with self._writing_its_own_way():
            if whole:
                self.decoder.save_pretrained(folder, max_shard_size=max_shard_size)
            else:
                save_model(folder, self.decoder, None, weights=False)
        names = LatentSettings.__dataclass_fields__
        settings = LatentSettings(**{name: getattr(self.config, name) for name in names})
        write_json(folder / SETTINGS_FILE, {"format_version": FORMAT_VERSION, **settings.written()})
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("decoder.")}
        weights = folder / WEIGHTS_FILE
        weights.unlink(missing_ok=True)
        if own:
            save_file({k: v.contiguous() for k, v in own.items()}, weights, {"format": "pt"})
        if whole:  # else there is no model beside it for transformers to load
            code = folder / GENERATE_FILE
            code.parent.mkdir(exist_ok=True)
            code.write_text(Path(thinking.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        mode = (folder / "config.json").stat().st_mode
        for file in folder.glob("*.safetensors"):
            file.chmod(mode)

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
        latents: int | None = None,
    ) -> Reasoning:
        """Teacher-forced answers after latent reasoning.

        question_ids, question_mask [B, Q], padded on either side; answer_ids, answer_mask [B, A],
        right-padded, the answer without its prompt. chain_ids, chain_mask [B, N], right-padded, are
        the written chain `C A-prompt A`; given, it is predicted from the question in the same
        weights as well (w_cot). prompt_lengths [B]: how many of a row's answer_ids end with its
        answer prompt, for a student that writes the prompt itself; the endpoint is there. readout:
        whether to give `Reasoning.readout`. latents: how many it thinks in, if not in all; for
        those that are thought one after the other.
        """
        question_ids, question_mask = left_padded(question_ids, question_mask.long())
        thought = self._reason(question_ids, question_mask, latents)
        state, pending = thought.state, thought.embeds
        prompt = self._prompt(len(answer_ids))
        if prompt_lengths is not None:
            prompt = prompt[:, :0]
        tail_ids = torch.cat((prompt, answer_ids), 1)
        tail_mask = torch.cat((torch.ones_like(prompt), answer_mask), 1)
        rest = self._eot_length + tail_ids.shape[1]
        output = self._feed(
            state,
            torch.cat((pending, self._eot(len(tail_ids)), self._embed(tail_ids)), 1),
            torch.cat((thought.mask, self._ones(len(tail_ids), self._eot_length), tail_mask), 1),
            torch.cat((thought.steps, thought.steps.new_ones(rest))),
            logits=answer_ids.shape[1] + 1,
            hidden_states=True,
        )
        at = pending.shape[1] + self._eot_length + prompt.shape[1] - 1
        ends = output.hidden_states[0].new_full((len(tail_ids),), at, dtype=torch.long)
        if prompt_lengths is not None:
            ends = ends + prompt_lengths
        rows = torch.arange(len(ends), device=ends.device)
        keys, values, positions = self._latent_slots(state, question_mask, latents)
        return Reasoning(
            logits=output.logits,
            keys=keys,
            values=values,
            latent_positions=positions,
            endpoint=torch.stack([h[rows, ends] for h in output.hidden_states], dim=1),
            chain_losses=self._chain(state, question_ids, chain_ids, chain_mask),
            readout=self.read(thought.hidden) if readout and thought.hidden is not None else None,
        )

    def read(self, hidden: Tensor) -> Tensor:
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

    @overload
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_dict_in_generate: Literal[True],
        **options: Any,
    ) -> LatentOutput: ...

    @overload
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_dict_in_generate: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Tensor | LatentOutput:
        """Think, then write the answer.

        input_ids, attention_mask [B, Q], questions padded on either side. options: those of
        transformers' `generate`; without any, at most 64 tokens, greedy. Returns [B, Q + N], the
        questions (padded on the left) and what was written behind them, filled up with the end of
        sequence; with `return_dict_in_generate` a `LatentOutput`, which has passes and latents too.
        A row ends at the end of sequence. KavaError for what cannot be had with latents: a cache
        of fixed size, an assistant model, guidance.
        """
        with self._writing_its_own_way():
            try:
                return answer(
                    self.decoder,
                    self,
                    self.config,
                    input_ids,
                    attention_mask,
                    return_dict_in_generate=return_dict_in_generate,
                    **options,
                )
            except Refused as error:
                raise KavaError(str(error)) from None

    @torch.no_grad()
    def prompt_embeddings(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> list[Tensor]:
        """What a server that takes embeddings as a prompt needs to write this student's answers.

        input_ids, attention_mask [B, Q], as `generate` takes them. Returns a tensor for each row,
        without its padding: the embeddings of question, <bot>, latents, <eot> and answer prompt,
        [tokens, E] (question and prompt alone where there are no latents). The answer reads nothing
        else: in a causal decoder the keys and values of a latent follow from it and from what is
        before it, however it was worked out. KavaError where latents are further apart than one
        position, since such a server counts on consecutive ones.
        """
        if self.config.latents and self.config.stride != 1:
            raise KavaError(
                "prompt embeddings stand at consecutive positions, and the latents of this student "
                f"are {self.config.stride} apart. Ask it by `generate`, or train one whose stride "
                "is 1."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        ids, mask = left_padded(input_ids.to(self.device), mask.to(self.device))
        thought = think(self.decoder, self, self.config, ids, mask)
        question, prompt = self._embed(ids), self._embed(self._prompt(len(ids)))
        parts = [question, prompt]
        if thought.latents is not None:
            bot = self.bot.expand(len(ids), 1, -1)
            parts[1:1] = [bot, thought.latents, self._eot(len(ids))]
        first = (ids.shape[1] - mask.sum(1)).tolist()
        return [row[at:] for row, at in zip(torch.cat(parts, 1), first, strict=True)]

    @contextmanager
    def _writing_its_own_way(self) -> Iterator[None]:
        """Inside this context the decoder's generation configuration is the student's.

        A teacher's, which may sample or punish repetition, is none of an examined system's.
        """
        eos = self.config.eos_token_id
        taken, self.decoder.generation_config = (
            self.decoder.generation_config,
            GenerationConfig(
                do_sample=False,
                max_new_tokens=LONGEST,
                eos_token_id=eos,
                pad_token_id=eos[0] if isinstance(eos, list) else eos,
            ),
        )
        try:
            yield
        finally:
            self.decoder.generation_config = taken

    @property
    def latent_passes(self) -> int:
        """Decoder calls from the question to the first answer token."""
        return passes_to_think(self.config)

    # --- the latent loop ------------------------------------------------------------------------

    def _reason(self, question_ids: Tensor, question_mask: Tensor, latents: int | None) -> Thought:
        if self.training and self.config.latents and self.is_gradient_checkpointing:
            self.gradient_checkpointing_enable()  # was switched on elsewhere; says why not
        settings = self.config
        if latents is not None:
            settings = copy.copy(settings)
            settings.latents = latents
        return think(self.decoder, self, settings, question_ids, question_mask)

    def _latent_slots(
        self, state: State, question_mask: Tensor, latents: int | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        first = question_mask.shape[1] + 1
        slots = slice(first, first + (self.config.latents if latents is None else latents))
        positions = state.positions[:, slots]
        if not self.config.latents:
            return [], [], positions[:, :0]
        return (
            [layer.keys[:, :, slots] for layer in state.layers],
            [layer.values[:, :, slots] for layer in state.layers],
            positions,
        )

    def _chain(
        self,
        state: State,
        question_ids: Tensor,
        chain_ids: Tensor | None,
        chain_mask: Tensor | None,
    ) -> Tensor | None:
        """Losses of the written chain, behind the question as `state` has read it.

        Of the question only its last token is read again, which foretells the chain's first; all of
        it by a student without latents, whose layers may be recomputed and then keep no cache.
        """
        if chain_ids is None or chain_mask is None:
            if chain_ids is not chain_mask:
                raise KavaError("chain_ids and chain_mask belong together. Give both, or neither.")
            return None
        width = question_ids.shape[1]
        known = width - 1 if self.config.latents else 0
        embeds = self._embed(torch.cat((question_ids[:, known:], chain_ids[:, :-1]), 1))
        mask = torch.cat((state.mask[:, known:width], chain_mask[:, :-1]), 1)

        def call() -> None:
            self._feed(state.first(known), embeds, mask, None, logits=chain_ids.shape[1])

        return losses_of_call(self.decoder, call, chain_ids, chain_mask)

    # --- the decoder ----------------------------------------------------------------------------

    def _feed(
        self,
        state: State,
        embeds: Tensor,
        mask: Tensor,
        steps: Tensor | None,
        logits: int,
        hidden_states: bool = False,
    ) -> Any:
        """Advance the decoder by embeds [B, N, E] under mask [B, N], `steps` apart; logits of the
        last columns."""
        return self.decoder(
            inputs_embeds=embeds,
            logits_to_keep=logits,
            output_hidden_states=hidden_states,
            **state.advance(mask, steps),
        )

    def _embed(self, ids: Tensor) -> Tensor:
        return self.get_input_embeddings()(ids)

    def _ones(self, rows: int, columns: int) -> Tensor:
        return torch.ones(rows, columns, dtype=torch.long, device=self.device)

    def _prompt(self, rows: int) -> Tensor:
        ids = torch.tensor(self.config.answer_prompt_ids, dtype=torch.long, device=self.device)
        return ids.expand(rows, -1)

    @property
    def _eot_length(self) -> int:
        return 1 if self.config.latents else 0

    def _eot(self, rows: int) -> Tensor:
        if not self.config.latents:
            return self._embed(self._prompt(rows)[:, :0])
        return self.eot.expand(rows, 1, -1)


def _reset(projection: Projection, scale: float, generator: torch.Generator) -> None:
    """Fresh parameters; scale: the standard deviation of the decoder's input embeddings.

    The paper's Linear–GELU–Linear–LayerNorm with a skip around the two linear maps (ours). Fresh,
    the second map is close to zero and the norm's gain is the spread of the embeddings, so that a
    latent is the hidden state at the scale of an embedding. At the hidden state's own scale, twenty
    times larger in a small model, a latent drowns whatever the layers add to it.
    """
    for linear, gain in ((projection.up, 1.0), (projection.down, 0.01)):
        noise = torch.randn(linear.weight.shape, generator=generator)
        linear.weight.copy_(gain * noise * linear.in_features**-0.5)
        linear.bias.zero_()
    projection.norm.weight.fill_(scale)
    projection.norm.bias.zero_()


def _file(place: str, name: str, revision: str | None) -> Path:
    try:
        return Path(str(cached_file(place, name, revision=revision)))
    except OSError:
        raise Refused(
            f"it has no {name}. Name a folder or repository that holds a student: what `kava "
            "distill` made, or `save_pretrained`."
        ) from None
