"""Students in the layouts of CODI, PCCoT and Coconut answer here as by their own authors' loops.

The files are written as those projects write them; the loops are theirs, in the fewest words.
"""

from __future__ import annotations

import copy
import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from kava_core.errors import KavaError
from kava_core.evaluation.questions import Question, Respondents
from kava_core.models.convert import convert_weights
from kava_core.models.foreign import import_student
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_tokenizer
from kava_core.models.students import open_student
from kava_core.problems.prompt import PLAIN, prompt_in
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from stages.import_student import import_student as command
from tests.tiny import COMMON, tiny_model

LATENTS, ITERATIONS, ALPHA, RANK, WRITTEN = 3, 2, 16, 4, 8
QUESTIONS = ["how many are 3 cups and 4 cups ?", "ann has 12 pens . gives 5 . how many now ?"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True)
class Base:
    """The model that a student is trained from, in a folder."""

    kind: str
    path: Path
    model: PreTrainedModel
    vocabulary: int

    @property
    def size(self) -> int:
        return int(self.model.config.hidden_size)

    def extended(self) -> PreTrainedModel:
        """A copy with three more tokens."""
        model = copy.deepcopy(self.model)
        model.resize_token_embeddings(self.vocabulary + 3, mean_resizing=False)
        with torch.no_grad():
            rows = model.get_input_embeddings().weight[self.vocabulary :]
            rows.copy_(torch.randn(rows.shape) * 0.3)
        return model

    def adapted(self, model: PreTrainedModel, **options: Any) -> nn.Module:
        """With low-rank adapters that change something."""
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=TARGETS[self.kind],
            task_type="CAUSAL_LM",
            **options,
        )
        peft: nn.Module = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        return peft.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    tokenizer = train_tokenizer(QUESTIONS, 300)
    size = len(tokenizer)
    gpt2 = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    config = {"gpt2": gpt2, "llama": LlamaConfig(**{**COMMON, "vocab_size": size})}[request.param]
    config.eos_token_id = tokenizer.eos_token_id
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(config, torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Base(request.param, folder, model, size)


# --- as they write and answer ---------------------------------------------------------------------


class Codi(nn.Module):
    """The modules that zhenyi4/codi trains, by their names."""

    def __init__(self, base: Base, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.codi = base.adapted(base.extended())
        self.prj = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(base.size, width), nn.GELU(), nn.Linear(width, base.size)
        )
        self.prj.add_module("ln", nn.LayerNorm(base.size))
        self.base = [base]

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        state = {name: x.clone().contiguous() for name, x in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        return folder

    def answer(self, question: Tensor, prompt: list[int]) -> list[int]:
        first = self.base[0].vocabulary
        return sequential(self.codi, self.prj, question, first + 1, first + 2, prompt)


def sequential(
    model: Any, project: Any, question: Tensor, bot: int, eot: int, prompt: list[int]
) -> list[int]:
    cache = DynamicCache()
    ids = torch.cat((question, torch.tensor([[bot]])), 1)
    arguments = {"past_key_values": cache, "use_cache": True, "output_hidden_states": True}
    latent = project(model(input_ids=ids, **arguments).hidden_states[-1][:, -1:])
    for _ in range(LATENTS):
        latent = project(model(inputs_embeds=latent, **arguments).hidden_states[-1][:, -1:])
    return greedy(model, cache, torch.tensor([[eot, *prompt]]))


def greedy(model: Any, cache: DynamicCache, ids: Tensor) -> list[int]:
    written: list[int] = []
    for _ in range(WRITTEN):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        written.append(int(logits[:-3].argmax()))  # none of the three tokens
        ids = torch.tensor([[written[-1]]])
    return written


class PCCoT:
    """A student of whyNLP/PCCoT: an adapted model with a projection in it, saved by PEFT."""

    def __init__(self, base: Base, **options: Any) -> None:
        torch.manual_seed(2)
        model = base.extended()
        size = base.size
        model.prj = nn.Sequential(
            nn.Linear(size, size), nn.GELU(), nn.Linear(size, size), nn.LayerNorm(size)
        )
        self.first = base.vocabulary
        self.peft: Any = base.adapted(model, modules_to_save=["prj"], **options)

    def save(self, folder: Path) -> Path:
        self.peft.save_pretrained(folder, save_embedding_layers=True)
        config = {"model_type": "pccot", "use_projection": True, "num_iterations": ITERATIONS}
        arguments = {
            "bot_token_id": self.first,
            "eot_token_id": self.first + 1,
            "latent_token_id": self.first + 2,
            "num_latent_tokens": LATENTS,
            "answer_prompt": "so it is",
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "pccot_args.json").write_text(json.dumps(arguments))
        return folder

    def answer(self, question: Tensor, prompt: list[int]) -> list[int]:
        model = self.peft.get_base_model()
        latents = [[self.first, *([self.first + 2] * LATENTS)]]
        ids = torch.cat((question, torch.tensor(latents)), 1)
        boundary = question.shape[1] + 1
        arguments = {"use_cache": True, "output_hidden_states": True}
        out = model(input_ids=ids, past_key_values=DynamicCache(), **arguments)
        embeds = model.prj(out.hidden_states[-1][:, boundary - 1 : -1])
        for _ in range(ITERATIONS):
            cache = DynamicCache()  # of the question and <bot>
            model(input_ids=ids[:, :boundary], past_key_values=cache, use_cache=True)
            out = model(inputs_embeds=embeds, past_key_values=cache, **arguments)
            projected = model.prj(out.hidden_states[-1])
            embeds = torch.cat((embeds[:, :1], projected[:, :-1]), 1)
        return greedy(model, cache, torch.tensor([[self.first + 1, *prompt]]))


class Coconut(nn.Module):
    """A student of facebookresearch/coconut: hidden states are fed as they are."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.base_causallm = base.extended()
        self.embedding = self.base_causallm.get_input_embeddings()
        self.first = base.vocabulary

    def save(self, file: Path) -> Path:
        torch.save(self.state_dict(), file)
        made = file.with_suffix(".safetensors")
        assert convert_weights(file, made) == len(self.state_dict())
        return made

    def answer(self, question: Tensor, prompt: list[int]) -> list[int]:
        model = self.base_causallm
        return sequential(model, nn.Identity(), question, self.first, self.first + 1, prompt)


def written_here(folder: Path, question: str) -> tuple[list[int], Tensor, list[int]]:
    """What the imported student writes; the question's ids, and those of its answer prompt."""
    student = LatentReasoner.from_pretrained(folder)
    prompt = prompt_in(folder / "student.json") or PLAIN
    encoder = TraceEncoder(load_tokenizer(str(folder)), prompt=prompt)
    ids = torch.tensor(encoder.encode_questions([question]))
    student.decoder.generation_config.eos_token_id = -1  # write on
    out = student.generate(ids, torch.ones_like(ids), max_new_tokens=WRITTEN, eos_token_id=-1)
    return out[0, ids.shape[1] :].tolist(), ids, student.config.answer_prompt_ids


# --- the tests ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("question", QUESTIONS)
def test_they_answer_as_by_their_own_loops(base: Base, tmp_path: Path, question: str) -> None:
    codi, pccot, coconut = Codi(base).eval(), PCCoT(base), Coconut(base).eval()
    path = str(base.path)
    import_student(
        "codi", codi.save(tmp_path / "c"), path, tmp_path / "1", latents=LATENTS, lora_alpha=ALPHA
    )
    import_student("pccot", pccot.save(tmp_path / "p"), path, tmp_path / "2")
    file = coconut.save(tmp_path / "checkpoint_15")
    import_student("coconut", file, path, tmp_path / "3", latents=LATENTS)
    found = set()
    for folder, theirs in (("1", codi), ("2", pccot), ("3", coconut)):
        here, ids, prompt = written_here(tmp_path / folder, question)
        assert here == theirs.answer(ids, prompt), folder
        found.add(tuple(here))
    assert len(found) == 3


@torch.no_grad()
def test_adapters_of_several_ranks_are_merged_each_by_its_own(base: Base, tmp_path: Path) -> None:
    theirs = PCCoT(base, rank_pattern={TARGETS[base.kind][1]: 2})
    import_student("pccot", theirs.save(tmp_path / "p"), str(base.path), tmp_path / "ours")
    here, ids, prompt = written_here(tmp_path / "ours", QUESTIONS[0])
    assert here == theirs.answer(ids, prompt)


def test_they_are_said_to_write_steps_if_that_was_taught(base: Base, tmp_path: Path) -> None:
    path = str(base.path)
    codi, pccot = Codi(base).save(tmp_path / "c"), PCCoT(base).save(tmp_path / "p")
    import_student("codi", codi, path, tmp_path / "1", latents=LATENTS, lora_alpha=ALPHA)
    config = json.loads((pccot / "config.json").read_text())
    for name, weight in (("2", 0.5), ("3", 0)):
        (pccot / "config.json").write_text(json.dumps({**config, "loss_alpha": weight}))
        import_student("pccot", pccot, path, tmp_path / name)
    file = Coconut(base).save(tmp_path / "checkpoint_15")
    import_student("coconut", file, path, tmp_path / "4", latents=LATENTS)
    for name, weight in (("1", 1.0), ("2", 0.5), ("3", 0.0), ("4", 0.0)):
        about = json.loads((tmp_path / name / "student.json").read_text())
        assert about["settings"] == {"w_cot": weight}
        if not weight:
            with pytest.raises(KavaError, match="never learnt to write its steps"):
                Respondents.of(tmp_path / name, steps=True, teacher=None)
    asked = Respondents.of(tmp_path / "1", steps=True, teacher=base.path)
    (row,) = asked.answer([Question(QUESTIONS[0])], batch_size=1, max_new_tokens=2)
    assert row["written_steps"] and row["base"]["text"] and "teacher" not in row
    with pytest.raises(KavaError, match="was made from the base"):
        Respondents.of(tmp_path / "1", steps=False, teacher=tmp_path / "4")


@torch.no_grad()
def test_what_must_be_said_changes_what_it_answers(base: Base, tmp_path: Path) -> None:
    theirs = Codi(base).eval().save(tmp_path / "theirs")
    answers = set()
    for latents, alpha in ((LATENTS, ALPHA), (LATENTS + 1, ALPHA), (LATENTS, 4 * ALPHA)):
        folder = tmp_path / f"{latents}-{alpha}"
        import_student("codi", theirs, str(base.path), folder, latents=latents, lora_alpha=alpha)
        answers.add(tuple(written_here(folder, QUESTIONS[0])[0]))
    assert len(answers) == 3


def test_an_imported_student_is_one_of_ours(base: Base, tmp_path: Path) -> None:
    done = CliRunner(catch_exceptions=False).invoke(
        command,
        [
            "codi",
            str(Codi(base).save(tmp_path / "theirs")),
            str(tmp_path / "ours"),
            *("--base", str(base.path), "--latents", "3", "--lora-alpha", str(ALPHA)),
        ],
    )
    assert done.exit_code == 0, done.output
    student = open_student(tmp_path / "ours")
    assert (student.config.latents, student.config.reasoning) == (3, "sequential")
    about = json.loads((tmp_path / "ours/student.json").read_text())
    assert about["imported"]["format"] == "codi"
    settings = json.loads((tmp_path / "ours/latents.json").read_text())
    assert (settings["projection_size"], settings["residual"]) == (48, False)
    with pytest.raises(KavaError, match="is there already"):
        import_student("codi", tmp_path / "theirs", str(base.path), tmp_path / "ours")
    ids = torch.tensor([[5, 9, 7]])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    alone = decoder.generate(
        **asked, custom_generate=str(tmp_path / "ours"), trust_remote_code=True
    )
    assert alone.tolist() == student.generate(**asked).tolist()
    student.save_pretrained(tmp_path / "again")
    for name in ("latents.json", "latents.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def changed(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Other tensors in a student's file; None: without those whose names hold this one."""
    (file,) = folder.glob("*model.safetensors")
    state = load_file(file)
    for name, tensor in change.items():
        if tensor is None:
            found = [full for full in state if name in full]
            assert found
            for full in found:
                del state[full]
        else:
            state[name] = tensor
    save_file(state, file)


HEAD = "codi.base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codi.base_model.model.extra.weight": torch.zeros(2)}, "no place for extra.weight in a"),
        ({"prj.1.weight": torch.zeros(48, 9)}, "expected projection.up.weight of shape [48, 32]"),
        ({"prj.ln.weight": None, "prj.ln.bias": None}, "no layer norm (`prj_no_ln`)"),
        ({"prj.3.bias": None}, "projection is incomplete: projection.down.bias"),
        ({"prj.1.weight": None}, "projection is incomplete: projection."),
        (
            {f"prj.{name}": None for name in ("1.", "3.", "ln.")},
            "expected the weights of a projection (`prj`), found none",
        ),
        ({"prj.1.weight": torch.tensor(1.0)}, "expected projection.up.weight of shape [32, 32]"),
        ({HEAD: torch.tensor(1.0)}, "expected lm_head.weight of shape ["),
        ({HEAD: torch.zeros(2, 32, dtype=torch.int8)}, "numbers in lm_head.weight, found int8"),
        ({"prj.3.bias": torch.tensor([0.0, torch.nan])}, "in prj.3.bias, found NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    base: Base, tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    theirs = Codi(base).save(tmp_path / "theirs")
    changed(theirs, change)
    with pytest.raises(KavaError) as error:
        import_student(
            "codi", theirs, str(base.path), tmp_path / "ours", latents=3, lora_alpha=ALPHA
        )
    assert said in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_adapters_that_are_not_all_there_are_named(base: Base, tmp_path: Path) -> None:
    layer = {"gpt2": ".h.1.", "llama": ".layers.1."}[base.kind]
    kind = TARGETS[base.kind][-1]
    for form, gone in (("codi", [layer]), ("pccot", [layer]), ("pccot", [kind]), ("pccot", [""])):
        folder = tmp_path / f"{form}{gone[0]}"
        theirs = (Codi(base) if form == "codi" else PCCoT(base)).save(folder)
        (file,) = folder.glob("*model.safetensors")
        lost = [n for n in load_file(file) if ".lora_" in n and gone[0] in n]
        changed(theirs, dict.fromkeys(lost))
        more = {"latents": 3, "lora_alpha": ALPHA} if form == "codi" else {}
        with pytest.raises(KavaError, match=r"expected low-rank adapters of the \d+ modules") as e:
            import_student(form, theirs, str(base.path), tmp_path / "ours", **more)  # type: ignore[arg-type]
        assert kind in str(e.value) or layer[1:] in str(e.value)


def test_adapters_without_a_rank_are_refused(base: Base, tmp_path: Path) -> None:
    theirs = Codi(base).save(tmp_path / "theirs")
    state = load_file(theirs / "model.safetensors")
    down = next(name for name in state if ".lora_A." in name)
    up = down.replace("lora_A", "lora_B")
    changed(theirs, {down: state[down][:0], up: state[up][:, :0].contiguous()})
    with pytest.raises(KavaError, match="do not fit together"):
        import_student(
            "codi", theirs, str(base.path), tmp_path / "ours", latents=3, lora_alpha=ALPHA
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "expected peft_type LORA in adapter_config.json, found 'LOHA'"),
        ({"alpha_pattern": {"c_attn": 64}}, "adapters with alpha_pattern cannot be merged"),
        ({"layers_to_transform": [0]}, "adapters with layers_to_transform cannot be merged"),
        ({"target_modules": ".*attn"}, "expected a list of names as target_modules"),
        ({"target_modules": ["w_pack"]}, "has no modules called w_pack"),
        ({"target_modules": ["c_attn", "q_proj"]}, "expected low-rank adapters of the "),
    ],
)
def test_adapters_that_are_added_in_other_ways_are_refused(
    base: Base, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    theirs = PCCoT(base).save(tmp_path / "theirs")
    settings = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(KavaError) as error:
        import_student("pccot", theirs, str(base.path), tmp_path / "ours")
    assert said in str(error.value)


def test_adapters_of_another_base_are_said_to_be(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = PCCoT(base).save(tmp_path / "theirs")
    settings = json.loads((theirs / "adapter_config.json").read_text())
    for number, name in enumerate((f"openai/{base.path.name}", "meta/other")):
        settings["base_model_name_or_path"] = name
        (theirs / "adapter_config.json").write_text(json.dumps(settings))
        import_student("pccot", theirs, str(base.path), tmp_path / str(number))
        said = " ".join(capsys.readouterr().err.split())
        assert ("trained on meta/other, and --base is" in said) == (name == "meta/other")


@pytest.mark.parametrize(
    ("form", "options", "said"),
    [
        ("codi", {"lora_alpha": ALPHA}, "--latents is missing"),
        ("codi", {"latents": 3}, "does not say their alpha: give --lora-alpha"),
        ("pccot", {}, "expected a folder with adapter_model.safetensors or model.safetensors"),
        ("coconut", {"latents": 3}, "a Coconut student is one file of weights"),
        ("coconut", {}, "--latents is missing"),
    ],
)
def test_what_is_missing_is_asked_for(
    base: Base, tmp_path: Path, form: Any, options: dict[str, int], said: str
) -> None:
    theirs = Codi(base).save(tmp_path / "theirs")
    if form == "coconut" and not options:
        theirs = theirs / "model.safetensors"
    if form == "pccot":
        (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    with pytest.raises(KavaError) as error:
        import_student(form, theirs, str(base.path), tmp_path / "ours", **options)
    assert said in str(error.value)


def test_what_the_files_tell_is_not_asked_for(base: Base, tmp_path: Path) -> None:
    theirs = PCCoT(base).save(tmp_path / "theirs")
    with pytest.raises(KavaError, match="--latents is told by the files"):
        import_student("pccot", theirs, str(base.path), tmp_path / "ours", latents=3)
    (theirs / "config.json").write_text('{"use_projection": true}')
    with pytest.raises(KavaError, match="expected a number as num_iterations"):
        import_student("pccot", theirs, str(base.path), tmp_path / "ours")


@pytest.mark.parametrize("name", ["config.json", "pccot_args.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["[]", '"x"', "null"])
def test_settings_that_are_no_object_are_refused(
    base: Base, tmp_path: Path, name: str, content: str
) -> None:
    theirs = PCCoT(base).save(tmp_path / "theirs")
    (theirs / name).write_text(content)
    with pytest.raises(KavaError, match=rf"theirs/{name}: expected a JSON object, found "):
        import_student("pccot", theirs, str(base.path), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_numbers_that_are_no_numbers_are_refused_in_few_words(base: Base, tmp_path: Path) -> None:
    theirs = PCCoT(base).save(tmp_path / "theirs")
    whole = json.loads((theirs / "pccot_args.json").read_text())
    for value in (10**30, -1, True, "x" * 10_000):
        (theirs / "pccot_args.json").write_text(json.dumps({**whole, "num_latent_tokens": value}))
        with pytest.raises(KavaError, match="expected a number as num_latent_tokens") as error:
            import_student("pccot", theirs, str(base.path), tmp_path / "ours")
        assert len(str(error.value)) < 400


def test_another_base_is_refused(base: Base, tmp_path: Path) -> None:
    theirs = Codi(base).save(tmp_path / "theirs")
    other = tmp_path / "other"
    wider = GPT2Config(vocab_size=base.vocabulary, n_embd=48, n_layer=2, n_head=4, n_positions=128)
    tiny_model(wider, torch.float32).save_pretrained(other)
    load_tokenizer(str(base.path)).save_pretrained(other)
    with pytest.raises(KavaError, match="Is --base the model that the student was trained from"):
        import_student("codi", theirs, str(other), tmp_path / "ours", latents=3, lora_alpha=ALPHA)


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize("content", [Hostile(), {"a": Hostile()}, [1], {"a": 1}])
def test_a_pickle_of_anything_but_tensors_is_refused(
    tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "file.bin")
    with pytest.raises(KavaError, match=r"names and tensors") as error:
        convert_weights(tmp_path / "file.bin", tmp_path / "file.safetensors")
    assert "weights_only" not in str(error.value)
    assert "run" not in capsys.readouterr().out
    assert not (tmp_path / "file.safetensors").exists()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), r"without numbers \(meta\)"),
        (torch.zeros(3, dtype=torch.complex128), "complex128"),
    ],
)
def test_tensors_that_safetensors_does_not_know_are_named(
    tmp_path: Path, tensor: Tensor, said: str
) -> None:
    torch.save({"plain": torch.zeros(2), "odd": tensor}, tmp_path / "file.bin")
    with pytest.raises(KavaError, match=rf"found odd, which is {said}\. Have it saved as"):
        convert_weights(tmp_path / "file.bin", tmp_path / "file.safetensors")
    assert not (tmp_path / "file.safetensors").exists()


def test_safetensors_are_as_readable_as_other_files_and_get_a_folder(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "file.bin")
    made = tmp_path / "new/folder/file.safetensors"
    assert convert_weights(tmp_path / "file.bin", made) == 1
    assert load_file(made)["a"].tolist() == [0, 0]
    (tmp_path / "other").touch()
    assert made.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_disk_that_takes_no_more_is_a_sentence(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50_000)}, tmp_path / "file.bin")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(KavaError, match="cannot be written"):
            convert_weights(tmp_path / "file.bin", tmp_path / "file.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]
