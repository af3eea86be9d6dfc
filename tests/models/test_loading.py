"""A Hub id is loaded at its revision, and a folder has none; what is missing says what to do.

The Hub here is a cache as `huggingface_hub` lays one out, without a network.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from kava_core.errors import KavaError
from kava_core.models.loading import (
    check_weights,
    commit_of,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    save_model,
    text_model,
)
from kava_core.models.proofs import prove_teacher
from kava_core.models.students import open_student
from kava_core.models.teacher_pass import TeacherPass
from kava_core.problems.tokenizer import train_tokenizer
from tests.models.hub import asked, repository_in
from tests.tiny import ARCHITECTURES, CONFIGS, tiny_model, tiny_student

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, the one at v1."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder, tiny_model("llama", torch.float32), train_tokenizer(["1 2 3"] * 8, 270))
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with team/tiny, whose weights on the main branch are others."""
    home = tmp_path_factory.mktemp("hub")
    repository = repository_in(home, "tiny")
    for name, commit in COMMITS.items():
        snapshot = repository / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    model = load_model(str(folder))
    with torch.no_grad():
        next(model.parameters()).fill_(7.0)
    save_model(repository / "snapshots" / COMMITS["main"], model, None)
    return home


def test_a_revision_names_the_weights_and_its_commit_is_known(hub: Path, folder: Path) -> None:
    newest, older, same = asked(hub, "team/tiny", "team/tiny@v1", f"team/tiny@{COMMITS['v1']}")
    assert newest["commit"] == COMMITS["main"] and newest["weight"] == 7.0
    assert older["commit"] == COMMITS["v1"] and older["weight"] != 7.0
    assert older["fingerprint"] == model_fingerprint(str(folder)) != newest["fingerprint"]
    assert same == older


def test_what_the_cache_lacks_says_what_to_do_without_a_network(hub: Path) -> None:
    places = {"team/none": "", "team/tiny": " at revision v2"}
    downloads = ("`hf download team/none`", "`hf download team/tiny --revision v2`")
    for (name, at), download, found in zip(
        places.items(), downloads, asked(hub, "team/none", "team/tiny@v2"), strict=True
    ):
        said = found["error"]
        assert said.startswith(f"no model configuration could be loaded from {name}{at}: ")
        assert f"without a network, run {download} where there is one" in said
        assert "\n" not in said
    assert "This machine's cache holds main, v1 of it." in said  # of the revision


def test_what_is_cached_in_part_is_no_bar_to_reading_it(hub: Path, folder: Path) -> None:
    snapshot = repository_in(hub, "parts") / "snapshots" / COMMITS["main"]
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMITS["main"])
    (snapshot / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    program = (
        "from kava_core.models.loading import load_config, load_tokenizer\n"
        "print(load_config('team/parts').num_hidden_layers, len(load_tokenizer('team/parts')))"
    )
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    (told,) = asked(hub, "team/parts")
    assert told["error"].startswith("no model could be loaded from team/parts: ")


def test_what_can_be_no_hub_id_is_not_looked_for_there() -> None:
    for name in ("models/of/mine", "/no/such/folder", "two words"):
        with pytest.raises(KavaError, match="is no folder here, and no Hub id"):
            load_model(name)


def test_a_folder_has_no_commit_and_no_revision(folder: Path) -> None:
    name = str(folder)
    assert commit_of(name) is None
    for load in (
        lambda: load_config(name, "v1"),
        lambda: load_model(name, revision="v1"),
        lambda: load_tokenizer(name, "v1"),
        lambda: model_fingerprint(name, "v1"),
        lambda: commit_of(name, "v1"),
    ):
        with pytest.raises(KavaError, match=r"tiny is a folder, which has no revision 'v1'\. Take"):
            load()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=f"no model configuration could be loaded from {tmp_path}"):
        load_model(str(tmp_path))


# --- whole or not at all -------------------------------------------------------------------------


def change(folder: Path, to: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model whose tensors are edited."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def lose(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "mlp" in name]:
        del tensors[name]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.other"] = torch.zeros(1)


def cut(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lose,
            r"of the tensors, 9 that the model has are in no file, "
            r"model\.layers\.0\.mlp\.down_proj\.weight, .* and 5 more\. Download",
        ),
        (add, r"1 of the files have no place in the model, model\.layers\.0\.mlp\.other\."),
        (cut, r"1 have another shape, lm_head\.weight \(\[63, 32\] for \[64, 32\]\)\."),
    ],
)
def test_a_difference_between_files_and_model_is_refused_by_name(
    edit: Callable[[dict[str, Tensor]], None], said: str, folder: Path, tmp_path: Path
) -> None:
    changed = str(change(folder, tmp_path / "model", edit))
    for load in (load_model, check_weights):
        with pytest.raises(KavaError, match=rf"does not hold the whole model .* {said}"):
            load(changed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_loads_whole_tied_weights_and_all(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, torch.float32)
    save_model(tmp_path, model, None)
    loaded = load_model(str(tmp_path))
    check_weights(str(tmp_path))
    for path, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(path), parameter)


def test_a_student_with_a_lost_tensor_is_refused(tmp_path: Path) -> None:
    tiny_student("llama").float().save_pretrained(tmp_path / "student")
    open_student(tmp_path / "student")
    changed = change(tmp_path / "student", tmp_path / "changed", lose)
    with pytest.raises(KavaError, match="9 that the model has are in no file"):
        open_student(changed)


@torch.no_grad()
def test_of_a_model_of_text_and_images_the_text_model_is_taken(tmp_path: Path) -> None:
    config = Gemma3Config(
        text_config=copy.deepcopy(CONFIGS["gemma3"]),
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        },
        mm_tokens_per_image=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    whole = Gemma3ForConditionalGeneration(config).eval()
    save_model(tmp_path / "whole", whole, None)
    check_weights(str(tmp_path / "whole"))
    text = load_model(str(tmp_path / "whole"))
    ids = torch.randint(3, 64, (2, 9))
    assert torch.equal(text(ids).logits, whole(ids).logits)
    save_model(tmp_path / "text", text, None)
    again = load_model(str(tmp_path / "text"))
    assert isinstance(again, Gemma3ForCausalLM)
    assert torch.equal(again(ids).logits, text(ids).logits)
    assert load_config(str(tmp_path / "text")).model_type == "gemma3_text"
    prove_teacher(text)
    TeacherPass(again)


def test_a_model_whose_text_part_is_none_alone_is_refused() -> None:
    config = Gemma3Config(text_config=copy.deepcopy(CONFIGS["gemma3"]))
    with torch.device("meta"):
        whole = Gemma3ForConditionalGeneration(config)
    del whole.model.language_model
    with pytest.raises(KavaError, match="gemma3 reads more than text, and its text part"):
        text_model(whole)


# --- nobody is let in ----------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath('RAN').touch()\n"


def foreign(folder: Path, to: Path, file: str, auto_map: object) -> Path:
    """A copy of a model that names code of its own."""
    shutil.copytree(folder, to)
    (to / "code.py").write_text(CODE.replace("RAN", str(to / "RAN")))
    about = json.loads((to / file).read_text())
    about["auto_map"] = auto_map
    (to / file).write_text(json.dumps(about))
    return to


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Mine", "code.Mine"]}),
        ("tokenizer_config.json", ["code.Mine", None]),
        ("config.json", {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_never_run_whatever_is_typed(
    file: str, auto_map: object, known: bool, folder: Path, tmp_path: Path
) -> None:
    place = foreign(folder, tmp_path / "model", file, auto_map)
    if not known:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    program = (
        "import sys; from kava_core.errors import KavaError\n"
        "from kava_core.models.loading import load_model, load_tokenizer\n"
        "for load in (load_model, load_tokenizer):\n"
        "    try: load(sys.argv[1]); print('LOADED')\n"
        "    except KavaError as error: print('REFUSED', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)],
        input="y\n" * 8,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (place / "RAN").exists()
    model, tokenizer = done.stdout.splitlines()
    assert "[y/N]" not in done.stdout + done.stderr
    refused = "is code of its own (auto_map), and code of a model's folder is never run. Choose"
    if file == "tokenizer_config.json":
        assert (
            tokenizer == f"REFUSED the tokenizer of {place} {refused} a model whose tokenizer "
            "transformers knows."
        )
    if file == "config.json" and not known:
        assert model.startswith(f"REFUSED the model of {place} {refused}")
    if known and file == "config.json":
        assert model == "LOADED"  # by transformers' own class


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_and_not_read(kind: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    (place / "model.safetensors").unlink()
    (place / kind).write_bytes(b"cos\nsystem\n(S'touch " + bytes(place / "RAN") + b"'\ntR.")
    for load in (load_model, check_weights, model_fingerprint):
        with pytest.raises(KavaError, match=rf"as \.safetensors in .*, found only {kind}, which"):
            load(str(place))
    assert not (place / "RAN").exists()
    (place / kind).unlink()
    with pytest.raises(KavaError, match=r"found none\. Save the model as safetensors"):
        load_model(str(place))


def test_a_student_of_pickles_is_refused(tmp_path: Path) -> None:
    tiny_student("llama").float().save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(KavaError, match=r"safetensors"):
        open_student(tmp_path)


def test_an_adapter_is_no_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(KavaError, match=r"holds an adapter .* expected a whole model"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "written", ["", "[]", "null", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": []}']
)
def test_a_configuration_of_another_shape_is_a_sentence(
    written: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(written)
    with pytest.raises(KavaError, match=r"^no model.*could be loaded from [^\n]*$"):
        load_model(str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(written)
    with pytest.raises(KavaError, match=r"^(no|the) tokenizer [^\n]*$"):
        load_tokenizer(str(tmp_path / "model"))
