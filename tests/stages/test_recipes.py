"""Every recipe can be planned here, says what METHOD's table says, and becomes a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from kava_core.distill.curriculum import Stages
from kava_core.errors import KavaError
from kava_core.planning.lengths import lengths_of
from kava_core.problems.prompt import Example, Prompt
from kava_core.settings import Pipeline, load_pipeline
from stages.cli import kava
from stages.recipe import describe, recipe_files, with_recipe
from stages.rehearsal import planned, rehearse
from tests.stages.project import ROOT

RECIPES = {path.stem: path for path in recipe_files()}
# METHOD section 4: α_codi, α_kv, distance, std, projection, rate, decay, epochs; published.
TABLE = {
    "kava-llama-1b-aug": (10, 1, "smooth_l1", True, True, 8e-4, 0.1, 10),
    "kava-llama-1b-aug-nl": (10, 1, "mse", True, True, 8e-4, 0.1, 10),
    "kava-qwen25-05b-aug": (10, 1, "mse", False, True, 5e-4, 0.01, 10),
    "kava-qwen25-05b-aug-nl": (10, 1, "mse", True, True, 8e-4, 0.1, 10),
    "kava-llama-3b-aug": (20, 2, "smooth_l1", False, True, 2e-4, 0.1, 5),
    "kava-llama-3b-aug-nl": (20, 2, "smooth_l1", False, False, 2e-4, 0.1, 5),
}
OTHERS = {
    "kava-llama-1b-metamath", "kava-qwen3-06b-aug", "kava-smollm2-135m-aug", "codi-llama-1b-aug",
    "codi-llama-1b-aug-nl", "codi-gpt2-aug", "pccot-llama-1b-aug", "pccot-gpt2-aug",
    "coconut-gpt2-aug", "kava-gpt2-aug",
}  # fmt: skip
# One of each family of models, and of each way to keep targets and to think.
FAMILIES = [
    "kava-smollm2-135m-aug",
    "kava-qwen25-05b-aug-nl",
    "kava-qwen3-06b-aug",
    "codi-gpt2-aug",
    "coconut-gpt2-aug",
]


def settings_of(name: str) -> Pipeline:
    return load_pipeline(RECIPES[name], name)[1]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(kava, arguments, standalone_mode=False)


def test_every_published_setting_is_a_recipe() -> None:
    assert set(RECIPES) == set(TABLE) | OTHERS


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned_without_a_network(name: str, tmp_path: Path) -> None:
    found = planned(name, settings_of(name), tmp_path / name)
    assert found.problems > 300_000 and "assumed" in found.lengths_from
    assert "published shapes" in found.model


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_of_the_paper_is_the_papers_setting(name: str) -> None:
    settings = settings_of(name)
    kava_student = settings.students["kava"]
    training = kava_student.training
    assert TABLE[name] == (
        kava_student.alpha_codi, kava_student.alpha_kv, kava_student.kv_distance,
        kava_student.kv_std, kava_student.projection, training.learning_rate,
        training.weight_decay, training.epochs,
    )  # fmt: skip
    lora = training.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.dropout) == (128, 32, 0.1)
    assert lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert training.batch_size * training.accumulation == 128
    assert (training.max_grad_norm, training.precision) == (2.0, "bfloat16")
    assert (kava_student.iterations, kava_student.w_cot, settings.evict.budget) == (3, 1.0, 24)
    policy = settings.model_dump(by_alias=True)["evict"]["policy"]
    assert policy == {
        "name": "rkv",
        "lambda": 0.1,
        **{k: policy[k] for k in policy if k not in ("name", "lambda")},
    }
    assert settings.teacher.training is not None and settings.teacher.training.lora == lora


def test_codi_and_pccot_are_as_their_own_papers_publish_them() -> None:
    codi = settings_of("codi-llama-1b-aug").students["codi"]
    assert (codi.reasoning, codi.alpha_codi, codi.alpha_kv, codi.w_cot) == ("sequential", 20, 0, 1)
    assert settings_of("codi-llama-1b-aug").evict.budget == 6
    for name in ("pccot-llama-1b-aug", "pccot-gpt2-aug"):
        pccot = settings_of(name).students["pccot"]
        assert (pccot.alpha_codi, pccot.alpha_kv, pccot.w_cot, pccot.iterations) == (1, 0, 1, 3)
        assert not pccot.per_position  # one embedding of <latent>


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("codi", "pccot"))])
def test_codi_and_pccot_are_their_own_teachers_from_the_first_step(name: str) -> None:
    settings = settings_of(name)
    ((own, student),) = settings.students.items()
    assert (student.targets, student.model, settings.teacher.training) == ("joint", None, None)
    assert settings.evaluate.write_steps == (own,)
    assert "frozen" not in RECIPES[name].read_text(encoding="utf-8")


def test_coconut_is_as_its_own_paper_publishes_it(tmp_path: Path) -> None:
    settings = settings_of("coconut-gpt2-aug")
    coconut = settings.students["coconut"]
    assert (coconut.reasoning, coconut.projection) == ("sequential", False)
    records = planned("coconut-gpt2-aug", settings, tmp_path).problems
    stages = Stages.of(coconut, settings.evict.budget, records, "students.coconut")
    assert stages is not None and (stages.per_step, stages.count) == (2, 3)
    epoch = coconut.training.steps_per_epoch(records)
    assert stages.length == 3 * epoch and coconut.training.total_steps(records) == 22 * epoch
    assert coconut.training.batch_size * coconut.training.accumulation == 128
    assert (coconut.training.learning_rate, coconut.training.lora) == (1e-4, None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_differs_and_is_written_as_dvc_writes(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    assert "# What differs, and why:" in text and f"`kava recipe {name}`" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.splitlines()[0].startswith("# ") and 20 < len(describe(RECIPES[name])) < 78


@pytest.mark.parametrize("name", ["kava-llama-1b-aug-nl", "codi-gpt2-aug"])
def test_a_setting_of_a_recipe_can_be_changed_alone(name: str, tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "pipelines.yaml"
    before = RECIPES[name].read_text(encoding="utf-8")
    student = name.partition("-")[0]
    for key in ("evict.budget", f"students.{student}.training.epochs", "teacher.max_new_tokens"):
        path.write_text(before, encoding="utf-8")
        apply_overrides(path, [f"pipelines.{name}.{key}=7"])
        after = path.read_text(encoding="utf-8").splitlines()
        changed = [line for line in after if line not in before.splitlines()]
        assert len(changed) == 1 and len(after) == len(before.splitlines()), key


# --- kava recipe ----------------------------------------------------------------------------------


def test_recipes_are_listed() -> None:
    said = run("recipe").output
    assert [line.split()[0] for line in said.splitlines()] == list(RECIPES)
    assert "KaVa as published: Llama-3.2-1B, equations." in said


def test_a_recipe_becomes_a_pipeline_and_dvc_knows_it(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    before = (ROOT / "stages/skeleton/pipelines.yaml").read_text(encoding="utf-8")
    file.write_text(before, encoding="utf-8")
    result = run("recipe", "kava-qwen3-06b-aug", "--pipelines", str(file))
    assert result.exception is None, result.exception
    after = file.read_text(encoding="utf-8")
    for line in before.splitlines():
        assert line in after
    assert load_pipeline(file, "kava-qwen3-06b-aug")[1] == settings_of("kava-qwen3-06b-aug")
    assert load_pipeline(file)[0] == "first"  # the active one stays
    written = yaml.safe_load((tmp_path / "pipelines/kava-qwen3-06b-aug/dvc.yaml").read_text())
    assert "evict" in written["stages"]
    again = run("recipe", "kava-qwen3-06b-aug", "--pipelines", str(file)).exception
    assert isinstance(again, KavaError) and "already" in str(again)
    unknown = run("recipe", "nonsense", "--pipelines", str(file)).exception
    assert isinstance(unknown, KavaError) and "kava-llama-1b-aug" in str(unknown)


def test_a_file_that_a_recipe_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    four = {"pipeline": "a", "pipelines": {"a": {"prepare": {"source": "gsm8k"}}}}
    text = yaml.safe_dump(four, indent=4)
    file.write_text(text, encoding="utf-8")
    error = run("recipe", "codi-gpt2-aug", "--pipelines", str(file)).exception
    assert isinstance(error, KavaError) and "by hand" in str(error)
    assert file.read_text(encoding="utf-8") == text
    with pytest.raises(KavaError, match="expected a line `pipelines:`"):
        with_recipe("pipelines: {}\n", RECIPES["codi-gpt2-aug"])


# --- kava plan and kava check ---------------------------------------------------------------------


def test_a_plan_is_printed_and_given_as_json(tmp_path: Path) -> None:
    recipe = str(RECIPES["kava-llama-1b-aug"])
    options = ["--pipelines", recipe, "--data", str(tmp_path), "--flops", "3e14", "--gbps", "2"]
    said = run("plan", *options).output
    for word in ("teacher_kv", "24 slots", "distill kava", " h ", "What would make it cheaper"):
        assert word in said, said
    found = json.loads(run("plan", *options, "--json").output)
    assert found["bytes"] == sum(found["disk"].values())
    assert found["kv_targets"]["records"] == 385620 and found["seconds"] > 0
    assert [stage["stage"] for stage in found["stages"]][:3] == ["teacher", "generate", "evict"]
    half = run("plan", *options[:6]).exception
    assert isinstance(half, KavaError) and "--gbps" in str(half)


def test_what_cannot_run_is_named_with_its_pipeline(tmp_path: Path) -> None:
    text = RECIPES["kava-llama-1b-aug"].read_text(encoding="utf-8")
    file = tmp_path / "pipelines.yaml"
    for before, after, message in (
        ("      path: whynlp", "      traces: sentences\n      path: whynlp", "prepare.traces"),
        ("budget: 24}", "budget: 24, layers: {last: 99}}", "99"),
    ):
        file.write_text(text.replace(before, after, 1), encoding="utf-8")
        error = run("check", "--pipelines", str(file), "--data", str(tmp_path)).exception
        assert isinstance(error, KavaError)
        assert "pipeline kava-llama-1b-aug: " in str(error) and message in str(error)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_of_each_family_runs_in_the_small(name: str, tmp_path: Path) -> None:
    rehearse(name, settings_of(name), tmp_path)


def test_a_chat_is_planned_and_runs_in_the_small(tmp_path: Path) -> None:
    plain = settings_of("kava-qwen25-05b-aug")
    shown = Example(question="1 and 1 ?", steps=("<<1+1=2>>",), answer="2")
    prompt = Prompt(chat=True, examples=(shown,), answer="####", stop="<|im_end|>")
    chat = plain.model_copy(
        update={
            "prepare": plain.prepare.model_copy(update={"prompt": prompt}),
            "teacher": plain.teacher.model_copy(update={"training": None}),
            "evaluate": plain.evaluate.model_copy(update={"others": {"theirs": "not/there"}}),
        }
    )
    questions = [lengths_of(each, tmp_path).question.mean() for each in (plain, chat)]
    assert questions[1] > questions[0] + 60
    rehearse("chat", chat, tmp_path)


def test_evict_says_that_it_is_no_stage_where_no_caches_are_kept(tmp_path: Path) -> None:
    recipe = str(RECIPES["kava-llama-1b-aug-nl"])
    error = run("evict", "--pipelines", recipe, "--data", str(tmp_path)).exception
    assert isinstance(error, KavaError) and "`kava generate` makes the targets" in str(error)


def test_layers_are_kept_in_the_small_where_settings_are_about_them(tmp_path: Path) -> None:
    from kava_core.models.loading import load_config
    from kava_core.planning.forecast import Shapes
    from kava_core.planning.rehearsal import rehearsed

    settings = settings_of("kava-smollm2-135m-aug")
    some = settings.evict.model_copy(update={"layers": (0, 29)})
    for evict, layers in ((settings.evict, 4), (some, 30)):
        changed = settings.model_copy(update={"evict": evict})
        shapes = Shapes.of(changed, lengths_of(changed, tmp_path))
        small = rehearsed(changed, shapes, tmp_path / str(layers))
        config = load_config(small["teacher"]["model"])
        assert (config.num_hidden_layers, config.model_type) == (layers, "llama")
        assert config.num_attention_heads == 2 * config.num_key_value_heads
