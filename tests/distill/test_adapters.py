"""Adapters start from their seed, compute the same once merged, are refused by name, and are
written as PEFT reads them."""

from __future__ import annotations

import json
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

from kava_core.distill.adapters import add_lora, merge_lora, save_adapters
from kava_core.distill.batches import AnswerDataset
from kava_core.errors import KavaError
from kava_core.models.adapted import CONFIG, WEIGHTS, load_adapted
from kava_core.models.loading import model_fingerprint
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


def kept(home: Path, name: str = "llama", *targets: str) -> tuple[PreTrainedModel, str]:
    """A base in `home/base`, adapters in `home/made/adapter`; the merged model and the base's
    fingerprint."""
    base = tiny_model(name, torch.float32)
    base.save_pretrained(home / "base")
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    adapters = add_lora(
        model, toy.lora(2, 4, 0.0, *(targets or ("q_proj", "v_proj"))), seed=3, path="it"
    )
    taught(adapters)
    save_adapters(home / "made/adapter", adapters, "base", None)
    return merge_lora(adapters), model_fingerprint(str(home / "base"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("gemma3", ["down_proj"]),
     ("llama", ["lm_head", "embed_tokens"])],
)  # fmt: skip
def test_kept_adapters_load_with_peft_and_with_us(
    tmp_path: Path, name: str, targets: list[str]
) -> None:
    merged, fingerprint = kept(tmp_path, name, *targets)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(IDS).logits
    theirs = PeftModel.from_pretrained(base, tmp_path / "made/adapter").eval()
    expected = merged.eval()(IDS).logits
    assert float((plain - expected).abs().max()) > 0.01
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    ours = load_adapted(tmp_path / "made/adapter", fingerprint)
    assert same(ours.state_dict(), merged.state_dict())
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "base", elsewhere)
    ours = load_adapted(tmp_path / "made/adapter", fingerprint, str(elsewhere))
    assert same(ours.state_dict(), merged.state_dict())


def test_kept_adapters_are_small_and_say_where_they_belong(tmp_path: Path) -> None:
    kept(tmp_path)
    weights = load_file(tmp_path / "made/adapter" / WEIGHTS)
    assert len(weights) == 2 * 2 * 3  # A and B, two projections, three layers
    assert sum(x.numel() for x in weights.values()) == 3 * 2 * (2 * 32 + 32 + 16)
    assert sorted(p.name for p in (tmp_path / "made/adapter").iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "made/adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "base" and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["inference_mode"] is True


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
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        )
    for file in (CONFIG, WEIGHTS):
        one, two = (tmp_path / name / "made/adapter" / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_adapters_of_another_base_are_refused_with_both_names(tmp_path: Path) -> None:
    _, fingerprint = kept(tmp_path)
    other = tiny_model(LlamaConfig(**COMMON), torch.float32, seed=1)
    other.save_pretrained(tmp_path / "base")
    found = model_fingerprint(str(tmp_path / "base"))
    said = rf"belong on the model {fingerprint}, and \S+base is {found}\. Give the folder"
    with pytest.raises(KavaError, match=said):
        load_adapted(tmp_path / "made/adapter", fingerprint)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    _, fingerprint = kept(tmp_path)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(KavaError, match="could be loaded from base"):
        load_adapted(tmp_path / "made/adapter", fingerprint)


def test_adapters_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    _, fingerprint = kept(tmp_path)
    file = tmp_path / "made/adapter" / WEIGHTS
    weights = load_file(file)
    first, *rest = sorted(weights)
    save_file({name: weights[name] for name in rest}, file)
    with pytest.raises(KavaError, match=rf"lacks 1 tensors \({first}\) and has none too much"):
        load_adapted(file.parent, fingerprint)
    save_file({**weights, first: weights[first][:1].contiguous()}, file)
    with pytest.raises(KavaError, match=r"no adapters could be loaded .* Make them again"):
        load_adapted(file.parent, fingerprint)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(KavaError, match=r"no adapters could be loaded .* Make them again"):
        load_adapted(file.parent, fingerprint)
