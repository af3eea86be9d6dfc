"""Students that others published, as folders of ours: CODI's, PCCoT's and Coconut's.

Where the layouts are seen: `src/model.py` and `test.py` of zhenyi4/codi; `models/` and `example.py`
of whyNLP/PCCoT; `coconut.py` and `run.py` of facebookresearch/coconut. All three extend the
vocabulary by the tokens that enclose the latents, whose embeddings become `<bot>` and `<eot>` here,
and cut back to that of the base model. Low-rank adapters are merged. Weights come out as float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from kava_core.artefacts import atomic_folder, file_digest, read_json, write_json
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.models.inspection import OF_OBJECT
from kava_core.models.latent import LatentReasoner, LatentReasonerConfig
from kava_core.models.loading import commit_of, load_model, load_tokenizer, model_fingerprint
from kava_core.models.thinking import LARGEST
from kava_core.problems.prompt import ANSWER_PROMPT, Prompt
from kava_core.problems.traces import TraceEncoder
from kava_core.wording import shorten, shown

Format = Literal["codi", "pccot", "coconut"]
FILES: dict[Format, tuple[str, ...]] = {
    "codi": ("model.safetensors",),
    "pccot": ("adapter_model.safetensors", "model.safetensors"),
    "coconut": (),  # one file, whatever it is called
}
# Beside the decoder's weights: tables and masks that transformers once kept among them.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_OF_TOKENS = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "lm_head.weight")
_PREFIXES = ("codi.", "base_causallm.", "base_model.model.")
# Our name for each part of theirs; nn.Sequential counts the dropout of CODI's.
_PROJECTIONS: dict[str, dict[str, str]] = {
    "codi": {"prj.1": "up", "prj.3": "down", "prj.ln": "norm"},
    "pccot": {"prj.0": "up", "prj.2": "down", "prj.3": "norm"},
    "coconut": {},
}
# Of adapter_config.json: what would make W + α/r · B A, of all target modules, another sum.
_REFUSED = (
    *("use_rslora", "use_dora", "alpha_pattern", "exclude_modules", "layers_to_transform"),
    "layer_replication",
)


@dataclass(frozen=True)
class Ids:
    """Rows of the extended embeddings: around the latents, and the one that all latents begin as
    (of students that iterate)."""

    bot: int
    eot: int
    latent: int | None = None


@dataclass(frozen=True)
class Published:
    """What a published student is beside its tensors.

    iterations: of PCCoT's, None for latents one after the other; lora_alpha: α of its adapters,
    whose rank r the tensors tell, None where there are none; alone: the file holds all of the
    decoder; projected: it has to hold a projection, too; w_cot: how much it was taught to write its
    chain as well; targets: ends of the names of the modules with adapters, and base: the model that
    these were trained on, both where the files say.
    """

    ids: Ids
    latents: int
    iterations: int | None
    prompt: Prompt
    lora_alpha: int | None
    alone: bool
    projected: bool
    w_cot: float
    targets: tuple[str, ...] | None = None
    base: str | None = None


def import_student(
    form: Format,
    path: Path,
    base: str,
    destination: Path,
    *,
    latents: int | None = None,
    lora_alpha: int | None = None,
) -> LatentReasoner:
    """Write the student at `path` to `destination`.

    path: of a folder, or of Coconut's one file. base: the model it was trained from, a folder or
    Hub id, which brings configuration and tokenizer. latents, lora_alpha: where the files do not
    say. KavaError for files of another layout, tensors without a place, of another shape or
    missing, and settings that no student of ours has.
    """
    if destination.exists():
        raise KavaError(f"{destination} is there already. Name another folder, or remove it.")
    file = _weights_file(form, path)
    decoder, tokenizer = load_model(base), load_tokenizer(base)
    published = _read(form, file, decoder, tokenizer, latents, lora_alpha)
    if published.base and Path(published.base).name != Path(base).name:
        warn(
            f"warning: {path} says that its adapters were trained on {shorten(published.base)}, "
            f"and --base is {base}. On another model they compute nonsense."
        )
    tensors = _named_as_ours(_load(file), form)
    _check_numbers(tensors, file)
    own = _own(tensors, form, decoder, published.ids)
    _fill(decoder, tensors, published, file)
    encoder = TraceEncoder(tokenizer, prompt=published.prompt)
    student = _student(decoder, own, published, encoder)
    about = {
        "name": destination.name,
        "imported": {"format": form, "weights": file_digest(file)},
        "settings": {"w_cot": published.w_cot},
        "fingerprints": {"teacher": model_fingerprint(base)},  # what it began as
        "commit": commit_of(base),
        **published.prompt.kept(),
    }
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    with atomic_folder(destination) as built:
        student.save_pretrained(built)
        tokenizer.save_pretrained(built)
        write_json(built / "student.json", about)
    return student


def _weights_file(form: Format, path: Path) -> Path:
    names = FILES[form]
    if not names:
        if path.is_file():
            return path
        raise KavaError(f"{path} is no file, and a Coconut student is one file of weights.")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise KavaError(
        f"{path}: expected a folder with {' or '.join(names)}, found none. What torch.save wrote "
        "(.bin) is made into safetensors by `kava convert-weights`."
    )


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise KavaError(
            f"{file} cannot be read as safetensors ({error}). If torch.save wrote it, make them of "
            "it with `kava convert-weights`."
        ) from None


def _read(
    form: Format,
    file: Path,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    latents: int | None,
    lora_alpha: int | None,
) -> Published:
    asked = "{question}"
    if form == "pccot":
        for name, value in (("--latents", latents), ("--lora-alpha", lora_alpha)):
            if value is not None:
                raise KavaError(f"{name} is told by the files of a PCCoT student. Leave it out.")
        return _read_pccot(file, asked)
    if latents is None:
        raise KavaError(
            "--latents is missing: the files do not say in how many latents the student reasons. "
            "It is 6 in the published settings of CODI and of Coconut (2 thoughts, 3 stages)."
        )
    if form == "codi":
        first = decoder.config.get_text_config().vocab_size  # [PAD], then the two
        prompt = Prompt(question=asked)
        ids = Ids(first + 1, first + 2)
        # It is its own teacher: its script weighs the written chain 1 (`ref_loss_factor`).
        return Published(ids, latents, None, prompt, lora_alpha, True, True, w_cot=1.0)
    if lora_alpha is not None:
        raise KavaError("--lora-alpha means nothing for a Coconut student. Leave it out.")
    ids, prompt = Ids(len(tokenizer), len(tokenizer) + 1), Prompt(answer="###")
    # In its last stages no step is written any more.
    return Published(ids, latents, None, prompt, None, True, False, w_cot=0.0)


def _read_pccot(file: Path, asked: str) -> Published:
    folder = file.parent
    config, arguments = _settings(folder / "config.json"), _settings(folder / "pccot_args.json")
    adapted = file.name.startswith("adapter")
    adapter = _settings(folder / "adapter_config.json") if adapted else {}
    names = ("bot_token_id", "eot_token_id", "latent_token_id", "num_latent_tokens")
    numbers: dict[str, Any] = {name: arguments.get(name) for name in names}
    numbers["num_iterations"] = config.get("num_iterations")
    numbers |= {"lora_alpha": adapter.get("lora_alpha")} if adapted else {}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < LARGEST:
            raise KavaError(
                f"{folder}: expected a number as {name} in config.json, pccot_args.json or "
                f"adapter_config.json, found {shown(value)}. Copy the student's files again."
            )
    if adapted and adapter.get("peft_type") != "LORA":
        raise KavaError(
            f"{folder}: expected peft_type LORA in adapter_config.json, found "
            f"{shown(adapter.get('peft_type'))}. Only low-rank adapters are merged here."
        )
    for name in _REFUSED:
        if adapter.get(name) not in (None, False, {}, []):
            raise KavaError(f"{folder}: adapters with {name} cannot be merged here.")
    targets = adapter.get("target_modules")
    if adapted and not (
        isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    ):
        raise KavaError(
            f"{folder}: expected a list of names as target_modules in adapter_config.json, found "
            f"{shown(targets)}."
        )
    chain = config.get("loss_alpha", 1.0)
    if type(chain) not in (int, float) or not 0 <= chain < LARGEST:
        raise KavaError(
            f"{folder}: expected a number as loss_alpha in config.json, found {shown(chain)}. Copy "
            "the student's files again."
        )
    answer = arguments.get("answer_prompt", ANSWER_PROMPT)
    if not isinstance(answer, str) or not answer.strip():
        raise KavaError(f"{folder}: answer_prompt in pccot_args.json is no text: {shown(answer)}.")
    return Published(
        Ids(numbers["bot_token_id"], numbers["eot_token_id"], numbers["latent_token_id"]),
        numbers["num_latent_tokens"],
        numbers["num_iterations"],
        Prompt(question=asked, answer=answer),
        numbers.get("lora_alpha"),
        not adapted,
        config.get("use_projection") is True,
        float(chain),
        tuple(targets) if targets else None,
        str(adapter.get("base_model_name_or_path") or ""),
    )


def _settings(file: Path) -> dict[str, Any]:
    found = read_json(file, OF_OBJECT[0])
    if not isinstance(found, dict):
        raise KavaError(
            f"{file}: expected a JSON object, found {shown(found)}. Copy the student's files again."
        )
    return found


def _named_as_ours(tensors: dict[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Without what stands before the decoder's own names, and without what is none of its weights.

    Adapters stay `<module>.lora_A` and `<module>.lora_B`.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name
        for prefix in _PREFIXES:
            plain = plain.removeprefix(prefix)
        for part in (".default", ".modules_to_save", ".base_layer"):
            plain = plain.replace(f"{part}.", ".")
        if form != "coconut" and plain.endswith((".lora_A.weight", ".lora_B.weight")):
            plain = plain.removesuffix(".weight")
        again = form == "coconut" and plain == "embedding.weight"  # the decoder's, once more
        if not again and not plain.endswith(_BUFFERS):
            found[plain] = tensor
    return found


def _check_numbers(tensors: dict[str, Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        found = None
        if not tensor.is_floating_point():
            found = str(tensor.dtype).removeprefix("torch.")
        elif not tensor.float().isfinite().all():
            found = "NaN or infinity"
        if found is not None:
            raise KavaError(
                f"{file}: expected finite floating-point numbers in {shorten(name)}, found "
                f"{found}. Copy the student's files again, or get them unquantised."
            )


def _own(
    tensors: dict[str, Tensor], form: Format, decoder: PreTrainedModel, ids: Ids
) -> dict[str, Tensor]:
    """`<bot>`, `<eot>`, what latents begin as, and the projection, by our names; taken out."""
    size = decoder.config.get_text_config().hidden_size
    table = tensors.get(_embedding_name(decoder))
    rows = [row for row in (ids.bot, ids.eot, ids.latent) if row is not None]
    if table is None or table.ndim != 2 or table.shape[1] != size or len(table) <= max(rows):
        found = "none" if table is None else f"{list(table.shape)}"
        raise KavaError(
            f"expected embeddings of more than {max(rows)} tokens and size {size}, of which the "
            f"tokens around the latents are the last, found {found}. Is --base the model that the "
            f"student was trained from, and is it {form}'s?"
        )
    latent = table[ids.bot if ids.latent is None else ids.latent]
    own = {"bot": table[ids.bot], "eot": table[ids.eot], "initial_latents": latent[None]}
    for theirs, ours in _PROJECTIONS[form].items():
        for kind in ("weight", "bias"):
            tensor = tensors.pop(f"{theirs}.{kind}", None)
            if tensor is not None:
                own[f"projection.{ours}.{kind}"] = tensor
    return own


def _fill(
    decoder: PreTrainedModel, tensors: dict[str, Tensor], published: Published, file: Path
) -> None:
    """Put the tensors into the decoder, adapters merged."""
    state, modules = decoder.state_dict(), dict(decoder.named_modules())
    adapted = {name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")}
    if adapted and published.lora_alpha is None:
        raise KavaError(
            f"{file} has low-rank adapters, and does not say their alpha: give --lora-alpha (32 in "
            "CODI's published settings)."
        )
    if not adapted and published.lora_alpha is not None and published.targets is None:
        raise KavaError(f"{file} has no adapters: --lora-alpha means nothing. Leave it out.")
    pairs = {
        name: (tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B", None))
        for name in sorted(adapted)
    }
    unknown = [name for name in tensors if name not in state]
    unknown += [name for name in adapted if f"{name}.weight" not in state]
    if unknown:
        raise KavaError(
            f"{file}: no place for {_named(unknown)} in a {decoder.config.model_type}. Is --base "
            "the model that the student was trained from, and the format right?"
        )
    wanted = _to_adapt(modules, adapted, published.targets)
    if published.targets and not wanted:
        raise KavaError(
            f"{file}: a {decoder.config.model_type} has no modules called "
            f"{_named(list(published.targets))} (target_modules). Is --base the model that the "
            "student was trained from?"
        )
    if wanted != adapted:
        raise KavaError(
            f"{file}: expected low-rank adapters of the {len(wanted)} modules that adapter_config"
            f".json or the other layers say, found {len(adapted)}; of one only: "
            f"{_named(sorted(wanted ^ adapted))}. Copy the student's files again."
        )
    tied = set(getattr(decoder, "all_tied_weights_keys", None) or ())
    lacking = [name for name in state if name not in tensors and name not in tied]
    if published.alone and lacking:
        raise KavaError(f"{file} lacks {_named(lacking)}. Copy the student's files again.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            _put(state[name], tensor, name, file)
        for name, (down, up) in pairs.items():
            _merge(modules[name], down, up, published.lora_alpha or 0, name, file)
    decoder.tie_weights()


def _to_adapt(
    modules: dict[str, nn.Module], adapted: set[str], targets: tuple[str, ...] | None
) -> set[str]:
    """The modules that should have adapters: those whose names end as `targets`; where the files do
    not say these, in all layers those that have some in one."""
    ends = targets or {re.split(r"\.\d+\.", name)[-1] for name in adapted}
    return {name for name in modules if any(f".{name}".endswith(f".{end}") for end in ends)}


def _put(place: Tensor, tensor: Tensor, name: str, file: Path) -> None:
    wanted = list(place.shape)
    if name.endswith(_OF_TOKENS) and tensor.ndim:
        tensor = tensor[: wanted[0]]  # without the tokens around the latents
    if list(tensor.shape) != wanted:
        raise KavaError(
            f"{file}: expected {name} of shape {wanted}, found {list(tensor.shape)}. Is --base the "
            "model that the student was trained from?"
        )
    place.copy_(tensor)


def _merge(
    module: nn.Module, down: Tensor, up: Tensor | None, alpha: int, name: str, file: Path
) -> None:
    """W + α/r · B A, turned where the layer keeps its weight turned (GPT-2's)."""
    weight = cast(Tensor, module.weight)
    if up is None or down.ndim != 2 or up.ndim != 2 or not 0 < len(down) == up.shape[1]:
        found = None if up is None else list(up.shape)
        raise KavaError(
            f"{file}: the adapters of {name} do not fit together: A is {list(down.shape)}, B is "
            f"{found}. Copy the student's files again."
        )
    change = (up.float() @ down.float()) * (alpha / down.shape[0])
    change = change.T if isinstance(module, Conv1D) else change
    if change.shape != weight.shape:
        raise KavaError(
            f"{file}: the adapters of {name} change {list(change.shape)}, and it is "
            f"{list(weight.shape)}. Is --base the model that the student was trained from?"
        )
    weight += change


def _student(
    decoder: PreTrainedModel, own: dict[str, Tensor], published: Published, encoder: TraceEncoder
) -> LatentReasoner:
    up = own.get("projection.up.weight")
    if published.projected and not any(name.startswith("projection.") for name in own):
        raise KavaError(
            "expected the weights of a projection (`prj`), found none. Copy the student's files "
            "again; one of CODI's that was trained without (`use_prj`) cannot be imported, since "
            "no file says so."
        )
    if up is not None and "projection.norm.weight" not in own:
        raise KavaError(
            "the student's projection has no layer norm (`prj_no_ln`), which ours cannot do "
            "without. It cannot be imported."
        )
    config = LatentReasonerConfig(
        latents=published.latents,
        iterations=published.iterations or 0,
        reasoning="sequential" if published.iterations is None else "jacobi",
        projection=up is not None,
        per_position=False,
        answer_prompt_ids=encoder.answer_prompt_ids,
        projection_size=len(up) if up is not None and up.ndim else 0,
        residual=up is None,
        eos_token_id=encoder.eos,
        tie_word_embeddings=decoder.config.get_text_config().tie_word_embeddings,
    )
    if decoder.generation_config is not None:
        decoder.generation_config.eos_token_id = encoder.eos
    student = LatentReasoner(config, decoder).eval()
    places = {k: v for k, v in student.named_parameters() if not k.startswith("decoder.")}
    if places.keys() != own.keys():
        wrong = _named(sorted(places.keys() ^ own.keys()))
        raise KavaError(f"the student's projection is incomplete: {wrong}. Copy its files again.")
    with torch.no_grad():
        for name, place in places.items():
            if place.shape != own[name].shape:
                raise KavaError(
                    f"expected {name} of shape {list(place.shape)}, found "
                    f"{list(own[name].shape)}. Is the format right?"
                )
            place.copy_(own[name])
    return student


def _embedding_name(decoder: PreTrainedModel) -> str:
    embeddings = decoder.get_input_embeddings()
    return next(f"{name}.weight" for name, m in decoder.named_modules() if m is embeddings)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shorten, names[:3])) + more
