"""A pipeline made so small that all of it runs in seconds: every setting that says what is done
stays, every one that says how much is cut down, and models are narrow ones of the same family."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from kava_core.models.loading import attention_implementation, save_model
from kava_core.planning.architecture import Architecture
from kava_core.planning.forecast import Shapes
from kava_core.planning.published import TokenizerRules, published_model
from kava_core.problems.prompt import ANSWER_PROMPT
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.settings import Evict, Fidelity, Pipeline

STEPS = 2
_BATCH = 4
_SOURCE = {"name": "synthetic", "steps": [2, 3], "max_operand": 9}
_TRAIN, _ASKED = 16, 4
_WIDTH, _HEAD = 32, 8
_BUDGET, _LAYERS = 3, 4
# transformers gives some families a token more when it loads their tokenizer.
_SPARE = 8
_BOS, _EOS = "<|begin|>", "<|end|>"
# Tried only where the pipeline's prompt is a chat.
_CHAT = (
    "{% for turn in messages %}{{ turn.role }}\n{{ turn.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def rehearsed(settings: Pipeline, shapes: Shapes, folder: Path) -> dict[str, Any]:
    """The settings of the small pipeline, as plain values; its models are written to `folder`.

    They name nothing outside `folder`. Problems are drawn from `synthetic` in the pipeline's own
    form of traces. Models have few layers, or, where any setting is about layers, as many as the
    pipeline's.
    """
    layers = None if _about_layers(settings) else _LAYERS
    plain: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
    plain["prepare"] = {
        "source": _SOURCE,
        "traces": plain["prepare"]["traces"],
        # A tiny tokenizer may not have the token that stops.
        "prompt": {**plain["prepare"]["prompt"], "stop": None},
        "train": _TRAIN,
        "validation": _ASKED,
        "test": _ASKED,
    }
    teacher = plain["teacher"]
    _fewer_steps(teacher["training"])
    teacher |= {"processes": 1, "validate_on": 2, "batch_size": _BATCH, "max_new_tokens": 4}
    _narrow(teacher, shapes.teacher, folder / "teacher", layers)
    # No chain of a model that learnt nothing ends in the right answer.
    del plain["traces"]
    plain["generate"] |= {"shard_size": 8, "batch_size": _BATCH}
    plain["evict"]["budget"] = min(_BUDGET, plain["evict"]["budget"])
    if plain["fidelity"] is not None:
        grid = plain["fidelity"]
        grid |= {"limit": 2, "batch_size": _BATCH, "max_new_tokens": 4}
        for name in ("policies", "budgets"):
            grid[name] = grid[name][:2]
    else:
        del plain["fidelity"]
    for name, student in plain["students"].items():
        _fewer_steps(student["training"])
        student["processes"] = 1
        if student.get("curriculum") is not None:
            student["curriculum"] = {"latents_per_step": plain["evict"]["budget"], "steps": 1}
        if student["model"] is not None:
            _narrow(student, shapes.students[name], folder / "students" / name, layers)
    # Students from elsewhere are weights, and the small teacher has another tokenizer than theirs.
    plain["evaluate"].pop("others", None)
    plain["evaluate"] |= {
        "limit": _ASKED,
        "batch_size": _BATCH,
        "max_new_tokens": 4,
        "similarity_records": _BATCH,
    }
    if plain["evaluate"]["interpret_records"]:
        plain["evaluate"] |= {"interpret_records": 2, "intervention_problems": 2}
    plain["resources"] = {"workers": 0, "device": plain["resources"]["device"]}
    plain["cadence"] = {"log_every": 1, "save_every": STEPS, "gradient_share_every": 1}
    return plain


def _fewer_steps(training: dict[str, Any] | None) -> None:
    if training is None:
        return
    training.pop("records", None)
    training |= {"steps": STEPS, "epochs": None, "batch_size": _BATCH, "threads": 1}
    if training["lora"] is not None:
        training["lora"]["rank"] = min(4, training["lora"]["rank"])
    if training["held_out"] is not None:
        training["held_out"] = {"records": 2, "every": 1}
    if training.get("exact_match") is not None:
        training["exact_match"] |= {"records": 2, "every": 1, "max_new_tokens": 4}


def _about_layers(settings: Pipeline) -> bool:
    evictions: list[Evict | Fidelity] = [settings.evict]
    if settings.fidelity is not None:
        evictions.append(settings.fidelity)
    return any(each.layers != "all" or each.share != "none" for each in evictions) or any(
        student.layer_map != "uniform" for student in settings.students.values()
    )


def _narrow(section: dict[str, Any], a: Architecture, folder: Path, layers: int | None) -> None:
    """Put a narrow model of the architecture in place of the section's; layers: None for all."""
    if section["model"] == "scratch":
        scratch = section["scratch"]
        width = _HEAD * scratch["heads"]
        scratch["layers"] = min(layers or scratch["layers"], scratch["layers"])
        scratch |= {"vocabulary": 300, "hidden_size": width, "intermediate_size": 2 * width}
        return
    known = published_model(section["model"])
    rules = known.tokenizer if known else TokenizerRules(digits=1, bos=False)
    tokenizer = tiny_tokenizer(rules)
    config = narrow_config(a.config, len(tokenizer) + _SPARE, min(layers or a.layers, a.layers))
    config.bos_token_id = tokenizer.bos_token_id if rules.bos else None
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention_implementation(config), dtype=torch.float32
    )
    save_model(folder, model, tokenizer)
    section |= {"model": str(folder), "revision": None}


def narrow_config(config: PreTrainedConfig, vocabulary: int, layers: int) -> PreTrainedConfig:
    """The same family with the first `layers`, and heads that share keys if the model's do."""
    small = deepcopy(config)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    heads = _WIDTH // _HEAD
    kinds = getattr(config, "layer_types", None)
    sizes = {
        "hidden_size": _WIDTH,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if grouped else heads,
        "head_dim": _HEAD,
        "intermediate_size": 2 * _WIDTH,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "layer_types": kinds and kinds[:layers],
    }
    for name, size in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, size)
    return small


def tiny_tokenizer(rules: TokenizerRules) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these rules, of the words of `rehearsed` problems."""
    digits = rf"\p{{N}}{{1,{rules.digits}}}"
    pieces = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    drawn = Synthetic(steps=(2, 3), max_operand=9).splits(64, 1, 1, seed=0)
    texts = [f"{p.question}\n{''.join(p.steps)}{ANSWER_PROMPT} {p.answer}" for p in drawn.train]
    tokenizer.train_from_iterator(texts, trainer)
    if rules.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS if rules.bos else None,
        eos_token=_EOS,
        chat_template=_CHAT,
        clean_up_tokenization_spaces=False,
    )
