"""Adapters start from their seed, compute the same once merged, are refused by name, and are
written as PEFT reads them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kava_core.artefacts import read_json, write_json
from kava_core.distill.adapters import add_lora, merge_lora, save_adapters
from kava_core.distill.batches import AnswerDataset
from kava_core.errors import KavaError
from kava_core.models.adapted import ADAPTER, BASE, CONFIG, WEIGHTS, Base
from kava_core.models.loading import load_model, model_fingerprint, save_model
from tests.distill import toy
from tests.distill.toy import same, toy_student, toy_traces
from tests.tiny import COMMON, tiny_model

IDS = torch.tensor([[9, 10, 11, 12]])


def taught(adapters: PeftModel) -> None:
    """Give the adapters something to do: as they begin, they change nothing."""
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))


def test_adapters_start_from_their_seed_whatever_was_drawn_before() -> None:
    def adapters(seed: int, drawn: int) -> dict[str, Tensor]:
        model = toy_student().decoder
        torch.manual_seed(drawn)
        add_lora(model, toy.lora(2, 2, 0.0, "q_proj"), seed=seed, path="it")
        after = torch.rand(())
        torch.manual_seed(drawn)
        assert torch.equal(after, torch.rand(()))  # nothing was drawn from the common stream
        return {name: x for name, x in model.state_dict().items() if "lora_A" in name}

    assert same(adapters(3, drawn=1), adapters(3, drawn=2))
    assert not same(adapters(3, drawn=1), adapters(4, drawn=1))


def test_merged_adapters_compute_what_they_did() -> None:
    student = toy_student(latents=2)
    adapters = add_lora(student.decoder, toy.lora(2, 4, 0.0, "q_proj", "v_proj"), seed=3, path="it")
    taught(adapters)
    student.eval()
    batch = AnswerDataset(toy_traces(3), chains=False).__getitems__([0, 1, 2])
    given = [batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask")]
    before = student(*given).logits
    student.decoder = merge_lora(adapters)
    assert not any("lora" in name for name, _ in student.named_parameters())
    torch.testing.assert_close(student(*given).logits, before, rtol=1e-4, atol=1e-4)


# --- what they cannot be put on -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        (
            "llama",
            ["query"],
            r"teacher\.training\.lora\.targets \['query'\] fit no module of llama",
        ),
        ("llama", ["query"], r"Choose among down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
        # one that fits does not excuse one that does not
        ("llama", ["q_proj", "c_attn", "proj"], r"targets \['c_attn', 'proj'\] fit no module"),
        # the default, and a model that calls its modules otherwise
        (
            "gpt2",
            list(toy.LoRA().targets),
            r"fit no module of gpt2 .* among c_attn, c_fc, c_proj\.",
        ),
        # a module, but none that can have adapters
        ("llama", ["mlp"], r"\['mlp'\] fit no module of llama that can have adapters"),
        ("llama-tied-scaled", ["q_proj", "lm_head"], r"\['lm_head'\] are the embeddings of llama"),
        ("llama-tied-scaled", ["embed_tokens"], r"\['embed_tokens'\] are the embeddings of llama"),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_name(
    model: str, targets: list[str], said: str
) -> None:
    settings = toy.lora(2, 2, 0.0, *targets)
    with pytest.raises(KavaError, match=said):
        add_lora(tiny_model(model), settings, seed=0, path="teacher.training")


# --- kept -----------------------------------------------------------------------------------------


def kept(home: Path, name: str = "llama", *targets: str) -> PreTrainedModel:
    """A base in `home/base`, a model in `home/made` that is adapters on it; the model, merged."""
    tiny_model(name, torch.float32).save_pretrained(home / "base")
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    settings = toy.lora(2, 4, 0.0, *(targets or ("q_proj", "v_proj")))
    adapters = add_lora(model, settings, seed=3, path="it")
    taught(adapters)
    base = Base(model="base", commit=None, fingerprint=model_fingerprint(str(home / "base")))
    save_adapters(home / "made" / ADAPTER, adapters, base)
    merged = merge_lora(adapters)
    save_model(home / "made", merged, None, weights=False)
    return merged


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("gemma3", ["down_proj"]),
        ("llama", ["lm_head", "embed_tokens"]),
    ],
)
def test_kept_adapters_load_with_peft_and_with_us(
    tmp_path: Path, name: str, targets: list[str]
) -> None:
    merged = kept(tmp_path, name, *targets)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(IDS).logits
    theirs = PeftModel.from_pretrained(base, tmp_path / "made" / ADAPTER).eval()
    expected = merged.eval()(IDS).logits
    assert float((plain - expected).abs().max()) > 0.01
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert same(load_model(str(tmp_path / "made")).state_dict(), merged.state_dict())


def test_where_the_base_lies_is_found_from_anywhere_or_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = kept(tmp_path).state_dict()
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere/other")
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = str(tmp_path / "made")
    assert same(load_model(made).state_dict(), merged)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere/base")
    assert same(load_model(made).state_dict(), merged)  # from here
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        KavaError, match=r"expected in the folder base, here or above .* Put it there"
    ):
        load_model(made)
    assert same(load_model(made, base="elsewhere/other").state_dict(), merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_added_in_float32_whatever_is_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    merged = kept(tmp_path)
    merged.save_pretrained(tmp_path / "whole")
    whole = load_model(str(tmp_path / "whole"), dtype)
    ours = load_model(str(tmp_path / "made"), dtype)
    assert same(ours.state_dict(), whole.state_dict())
    assert {x.dtype for x in ours.parameters()} == {dtype}
    assert dict(ours.named_buffers()).keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(name))


def test_kept_adapters_are_small_and_say_where_they_belong(tmp_path: Path) -> None:
    kept(tmp_path)
    folder = tmp_path / "made" / ADAPTER
    weights = load_file(folder / WEIGHTS)
    assert len(weights) == 2 * 2 * 3  # A and B, two projections, three layers
    assert sum(x.numel() for x in weights.values()) == 3 * 2 * (2 * 32 + 32 + 16)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, BASE]
    assert not list((tmp_path / "made").glob("*.safetensors"))
    config = read_json(folder / CONFIG)
    assert config["base_model_name_or_path"] == "base" and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["inference_mode"] is True
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Sets of strings have another order in every process."""
    script = (
        "import sys; from pathlib import Path; from tests.distill.test_adapters import kept; "
        "kept(Path(sys.argv[1]), 'llama', 'q_proj', 'k_proj', 'v_proj', 'o_proj')"
    )
    for name, seed in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    for file in (CONFIG, WEIGHTS, BASE):
        one, two = (tmp_path / name / "made" / ADAPTER / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_fingerprint_is_of_what_is_computed_not_of_where_the_base_lay(tmp_path: Path) -> None:
    kept(tmp_path)
    made, adapter = str(tmp_path / "made"), tmp_path / "made" / ADAPTER
    first = model_fingerprint(made)
    base = read_json(adapter / BASE)
    write_json(adapter / BASE, {**base, "model": "over/there"})
    config = read_json(adapter / CONFIG)
    write_json(adapter / CONFIG, {**config, "base_model_name_or_path": "x", "peft_version": "0"})
    assert model_fingerprint(made) == first
    write_json(adapter / CONFIG, {**config, "lora_alpha": 5})
    assert model_fingerprint(made) != first
    write_json(adapter / CONFIG, config)
    write_json(adapter / BASE, {**base, "fingerprint": "0" * 64})
    assert model_fingerprint(made) != first


def test_adapters_of_another_base_are_refused_with_both_names(tmp_path: Path) -> None:
    kept(tmp_path)
    expected = model_fingerprint(str(tmp_path / "base"))
    other = tiny_model(LlamaConfig(**COMMON), torch.float32, seed=1)
    other.save_pretrained(tmp_path / "other")
    found = model_fingerprint(str(tmp_path / "other"))
    said = rf"belong on the model {expected}, and \S+other is {found}\. Put the model they were"
    with pytest.raises(KavaError, match=said):
        load_model(str(tmp_path / "made"), base=str(tmp_path / "other"))
    with pytest.raises(KavaError, match="holds whole weights, not adapters on"):
        load_model(str(tmp_path / "other"), base=str(tmp_path / "base"))


def test_adapters_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    made, file = str(tmp_path / "made"), tmp_path / "made" / ADAPTER / WEIGHTS
    weights = load_file(file)
    first, *rest = sorted(weights)
    again = r"no adapters could be loaded .* Make them again"
    save_file({name: weights[name] for name in rest}, file)
    with pytest.raises(KavaError, match=rf"should have 12 .* has 11; of one only: {first}"):
        load_model(made)
    save_file({**weights, "base_model.model.more": weights[first].clone()}, file)
    with pytest.raises(KavaError, match=r"has 13; of one only: base_model\.model\.more"):
        load_model(made)
    save_file({**weights, first: weights[first][:1].contiguous()}, file)
    with pytest.raises(KavaError, match=again):
        load_model(made)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(KavaError, match="is no whole file of safetensors"):
        load_model(made)
    save_file(weights, file)
    for name, said in ((CONFIG, again), (BASE, r"base\.json: model: Field required.*Make the ad")):
        write_json(file.parent / name, {"peft_type": "LORA"})
        with pytest.raises(KavaError, match=said):
            load_model(made)
        kept(tmp_path)
