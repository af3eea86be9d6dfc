"""What a study expands to: shared pieces once, seeds and values where they matter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava_core.errors import KavaError
from kava_core.findings.study import Asking
from kava_core.settings import load_pipeline, load_study, read_document
from kava_core.studies.asked import asked_otherwise
from kava_core.studies.plan import StudyPlan, plan_study
from tests.settings.test_pipeline import SMALL


def plan(
    tmp_path: Path, study: dict[str, Any], pipeline: dict[str, Any] | None = None
) -> StudyPlan:
    path = tmp_path / "pipelines.yaml"
    document = {
        "pipeline": "small",
        "pipelines": {"small": pipeline or SMALL},
        "studies": {"s": {"pipeline": "small", "seeds": [0, 1], **study}},
    }
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    assert load_pipeline(path)[0] == "small"
    return plan_study(path, "s", load_study(path, "s"))


def cells(found: StudyPlan) -> list[tuple[str, str, int | None]]:
    return [(cell.system, cell.variant, cell.seed) for cell in found.cells]


def pieces(found: StudyPlan) -> dict[str, int]:
    return {stage: len(made) for stage, made in found.pieces(found.cells).items()}


def test_every_student_with_every_seed_and_the_teacher_once(tmp_path: Path) -> None:
    found = plan(tmp_path, {})
    assert cells(found) == [
        ("teacher-cot", "", None),
        ("teacher-no-cot", "", None),
        ("kava", "", 0),
        ("no-cot", "", 0),
        ("kava", "", 1),
        ("no-cot", "", 1),
    ]
    assert pieces(found) == {"prepare": 1, "teacher": 1, "generate": 1, "evict": 1, "distill": 4}
    assert len({cell.key for cell in found.cells}) == 6
    for cell in found.cells[2:]:
        assert cell.piece.settings["students"][cell.system]["training"]["seed"] == cell.seed


def test_fidelity_is_asked_as_the_store_is_made(tmp_path: Path) -> None:
    own = copy.deepcopy(SMALL)
    own["evict"] |= {"select": "record", "keys_bits": 8}
    own["fidelity"] = {"max_new_tokens": 5, "budgets": [1, 2, 3], "within": 1.0}
    found = plan(tmp_path, {"fidelity": 30, "grid": {"evict.budget": [4, 8]}}, own)
    # Before the students, once for each store, and with no other problems or policies.
    made = found.pieces(found.cells)
    assert list(made).index("fidelity") == list(made).index("distill") - 1
    sections = [piece.settings["fidelity"] for piece in made["fidelity"]]
    policy = sections[0]["policies"][0]
    assert sections == [
        {
            "max_new_tokens": 5,
            "select": "record",
            "limit": 30,
            "policies": [policy],
            "budgets": [budget],
            "bits": [{"keys": 8, "values": 16}],
        }
        for budget in (4, 8)
    ]
    assert policy["name"] == "rkv"
    assert {cell.system for cell in found.cells if cell.fidelity} == {"kava"}
    # It decides nothing of what a student is or answers.
    without = plan(tmp_path, {"grid": {"evict.budget": [4, 8]}}, own)
    assert [cell.key for cell in without.cells] == [cell.key for cell in found.cells]
    assert not any(cell.fidelity for cell in without.cells)


def test_every_seed_has_a_teacher_where_it_is_said(tmp_path: Path) -> None:
    found = plan(tmp_path, {"reseed": "all", "students": ["kava"]})
    assert pieces(found) == {"prepare": 1, "teacher": 2, "generate": 2, "evict": 2, "distill": 2}
    assert ("teacher-cot", "", 1) in cells(found)
    trained = copy.deepcopy(SMALL)
    trained["teacher"] = {"model": "owner/name", "training": None}
    with pytest.raises(KavaError, match=r"s\.reseed: the teacher is not trained"):
        plan(tmp_path, {"reseed": "all"}, trained)


def test_a_value_of_the_grid_reaches_those_whom_it_concerns(tmp_path: Path) -> None:
    grid = {"evict.budget": [4, 8], "students.kava.alpha_kv": [1, 10]}
    found = plan(tmp_path, {"seeds": [0], "grid": grid, "baseline": "no-cot"})
    assert pieces(found) == {"prepare": 1, "teacher": 1, "generate": 1, "evict": 2, "distill": 5}
    kava = [f"evict.budget={m} students.kava.alpha_kv={alpha}" for m in (4, 8) for alpha in (1, 10)]
    assert [v for system, v, _ in cells(found) if system == "kava"] == kava
    assert [v for system, v, _ in cells(found) if system == "no-cot"] == [""]
    assert found.pairs == tuple(((v, "kava"), ("", "no-cot")) for v in kava)
    budgets = [
        cell.piece.settings["evict"]["budget"] for cell in found.cells if "=8" in cell.variant
    ]
    assert budgets == [8, 8]
    turned = plan(tmp_path, {"seeds": [0], "grid": grid, "baseline": "kava"})
    assert turned.pairs == tuple((("", "no-cot"), (v, "kava")) for v in kava)


def test_settings_that_change_together_are_crossed_with_the_grid(tmp_path: Path) -> None:
    study = {
        "seeds": [0],
        "students": ["kava"],
        "grid": {"students.kava.alpha_kv": [1, 10]},
        "together": [
            {"generate.latent_fraction": 0.5, "evict.budget": 4},
            {"generate.latent_fraction": 1.0, "evict.budget": 8},
        ],
    }
    found = plan(tmp_path, study)
    assert pieces(found) == {"prepare": 1, "teacher": 1, "generate": 2, "evict": 2, "distill": 4}
    assert [variant for system, variant, _ in cells(found) if system == "kava"] == [
        f"students.kava.alpha_kv={alpha} generate.latent_fraction={fraction} evict.budget={budget}"
        for fraction, budget in (("0.5", 4), ("1.0", 8))
        for alpha in (1, 10)
    ]
    for cell in found.cells[2:]:
        half = cell.piece.settings["generate"]["latent_fraction"] == 0.5
        assert cell.piece.settings["evict"]["budget"] == (4 if half else 8)


def test_chains_of_the_teachers_concern_all_students_and_no_teacher(tmp_path: Path) -> None:
    small = {**copy.deepcopy(SMALL), "traces": {"temperature": 1.0}}
    found = plan(tmp_path, {"seeds": [0], "grid": {"traces.samples": [1, 4]}}, small)
    assert pieces(found) == {
        **{"prepare": 1, "teacher": 1, "traces": 2, "generate": 2, "evict": 2},
        "distill": 4,
    }
    variants = {
        system: [v for s, v, _ in cells(found) if s == system] for system, _, _ in cells(found)
    }
    for student in ("kava", "no-cot"):
        assert variants[student] == ["traces.samples=1", "traces.samples=4"]
    assert variants["teacher-cot"] == [""]


def test_what_a_store_has_put_aside_is_asked_by_students_of_problems(tmp_path: Path) -> None:
    for keep, stage in (("caches", "generate"), ("targets", "generate")):
        generate = {"on_error": "quarantine", "keep": keep}
        small = {**copy.deepcopy(SMALL), "generate": generate}
        found = plan(tmp_path, {"seeds": [0]}, small)
        (cell,) = (cell for cell in found.cells if cell.system == "no-cot")
        assert cell.piece.before[-1].stage == (stage,)
        assert cell.piece.before[-1].makes[0] == ("teacher_kv", "kv_targets")[keep == "targets"]


def test_settings_are_for_all_and_may_add_a_student(tmp_path: Path) -> None:
    more = {**SMALL["students"]["kava"], "alpha_codi": 1.0}
    study = {"settings": {"students.both": more, "evict.policy": "random"}, "seeds": [3]}
    found = plan(tmp_path, study)
    assert ("both", "", 3) in cells(found)
    assert {cell.piece.settings["evict"]["policy"] for cell in found.cells} == {"random"}


def test_a_key_of_every_student_is_each_ones_own(tmp_path: Path) -> None:
    study = {
        "seeds": [0],
        "baseline": "no-cot",
        "grid": {"students.*.training.records": [4, 8]},
        "settings": {
            "students.third.training.warmup": 0.5,
            "students.*.training": {"steps": 7, "batch_size": 4},
            "students.third": {"reads": "kv_targets"},
        },
    }
    found = plan(tmp_path, study)
    for cell in found.cells[2:]:
        training = cell.piece.settings["students"][cell.system]["training"]
        assert (training["batch_size"], training["steps"]) == (4, 7)
        assert training.get("warmup") == (0.5 if cell.system == "third" else None)
        assert cell.variant == f"students.*.training.records={training['records']}"
    assert pieces(found)["distill"] == 6 and pieces(found)["teacher"] == 1
    assert [left[1] for left, _ in found.pairs] == ["kava", "third"] * 2
    assert all(left[0] == right[0] for left, right in found.pairs)  # each among its like
    one = plan(tmp_path, {"seeds": [0], "students": ["kava"], "grid": study["grid"]})
    raw = one.cells[-1].piece.settings["students"]
    assert "records" in raw["kava"]["training"] and list(raw) == ["kava"]


def test_further_test_sets_are_asked_of_the_same_systems(tmp_path: Path) -> None:
    longer = {"source": {"name": "synthetic", "steps": [6, 6]}, "size": 4}
    small = copy.deepcopy(SMALL)
    small["prepare"]["test_sets"] = {"longer": longer}
    study = {"split": "test", "seeds": [0], "baseline": "no-cot"}
    own = plan(tmp_path, study, small)
    found = plan(tmp_path, {**study, "test_sets": ["longer"]}, small)
    assert cells(found)[:2] == [
        ("teacher-cot", "", None),
        ("teacher-cot", "test_set=longer", None),
    ]
    assert len(found.cells) == 8 and len({cell.key for cell in found.cells}) == 8
    assert pieces(found) == pieces(own)
    assert {cell.key for cell in own.cells} < {cell.key for cell in found.cells}
    assert found.pairs == (
        (("", "kava"), ("", "no-cot")),
        (("test_set=longer", "kava"), ("test_set=longer", "no-cot")),
    )


def test_how_much_may_be_written_is_a_setting_of_a_study(tmp_path: Path) -> None:
    long = plan(tmp_path, {"settings": {"evaluate.max_new_tokens": 99, "evaluate.limit": 3}})
    assert {(c.evaluate.max_new_tokens, c.evaluate.limit) for c in long.cells} == {(99, 3)}
    assert not {c.key for c in long.cells} & {c.key for c in plan(tmp_path, {}).cells}


def test_every_study_of_the_project_can_be_planned() -> None:
    path = Path(__file__).parents[2] / "pipelines.yaml"
    for name in read_document(path)["studies"]:
        assert plan_study(path, name, load_study(path, name)).cells, name


def test_a_study_asks_no_student_to_write_its_steps(tmp_path: Path) -> None:
    own = copy.deepcopy(SMALL)
    own["students"]["kava"]["w_cot"] = 1.0
    own["evaluate"] = {"write_steps": ["kava"]}
    found = plan(tmp_path, {"grid": {"students.kava.w_cot": [0.0, 1.0]}}, own)
    assert {cell.system for cell in found.cells} == {
        "teacher-cot",
        "teacher-no-cot",
        *SMALL["students"],
    }


def test_what_decides_nothing_changes_no_key(tmp_path: Path) -> None:
    def keys(pipeline: dict[str, Any]) -> list[str]:
        return [cell.key for cell in plan(tmp_path, {}, pipeline).cells]

    before = keys(SMALL)
    same = {**SMALL, "cadence": {"save_every": 3}, "resources": {"workers": 0}}
    assert keys({**same, "evict": {"budget": 4, "policy": {"name": "rkv"}}}) == before
    other = keys({**SMALL, "evict": {"budget": 5}})
    changed = [system for system, a, b in zip("TNkcKC", before, other, strict=True) if a != b]
    assert changed == ["k", "K"]  # not the teachers, nor those that read problems


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"sedes": [1]}, "studies.s.sedes: no such setting"),
        ({"seeds": []}, "studies.s.seeds: Tuple should have at least 1 item"),
        ({"seeds": [1, 1]}, "studies.s: seeds: each counts once"),
        ({"split": "train"}, "studies.s.split: Input should be 'validation' or 'test'"),
        ({"grid": {"evict.budget": []}}, "studies.s.grid.evict.budget: List should have at least"),
        ({"grid": {"evict.budget": [4, 4]}}, "grid: evict.budget has a value twice"),
        ({"grid": {"cadence.log_every": [1]}}, "cadence.log_every should be a dotted key below"),
        ({"grid": {"evict": [1]}}, "evict should be a dotted key below prepare, teacher"),
        ({"grid": {"students.kava.training.seed": [1]}}, "the seeds are those of `seeds`"),
        (
            {"grid": {"evict.budget": [4]}, "settings": {"evict.budget": 3}},
            "evict.budget stands in both settings and grid",
        ),
        (
            {"together": [{"evict.budget": 4}, {"evict.budget": 8}]},
            "together: expected the same keys in every one, two or more",
        ),
        (
            {"together": [{"evict.budget": 4, "prepare.seed": 1}, {"evict.budget": 8}]},
            "together: expected the same keys in every one, two or more",
        ),
        (
            {"together": [{"evict.budget": 4, "prepare.seed": 1}] * 2},
            "together: one stands there twice",
        ),
        (
            {"grid": {"evict.budget": [4]}, "together": [{"evict.budget": 4, "prepare.seed": 1}]},
            "evict.budget stands in both grid and together",
        ),
        (
            {"together": [{"evict.budget": 4, "cadence.log_every": 1}]},
            "cadence.log_every should be a dotted key below",
        ),
        ({"pipeline": "none"}, "there is no pipeline 'none'. There are: small"),
        ({"students": ["cody"]}, "there is no student 'cody'. There are: kava, no-cot"),
        ({"baseline": "codi"}, "there is no student 'codi'. There are: kava, no-cot"),
        (
            {"grid": {"evict.bugdet": [4]}},
            "studies.s: pipelines.small.evict.bugdet: no such setting",
        ),
        ({"test_sets": ["x"]}, "test_sets: are asked in a study of `split: test`"),
        (
            {"test_sets": ["x"], "split": "test"},
            "no test set 'x' in prepare.test_sets. There are: n",
        ),
        ({"interventions": -1}, "studies.s.interventions: Input should be greater than or equal"),
        (
            {
                "settings": {"students.*.training.steps": 3},
                "grid": {"students.kava.training.steps": [4]},
            },
            "students.kava.training.steps stands beside students.*.training.steps",
        ),
        ({"grid": {"evict.budget.x": [4]}}, "expected evict.budget to be a mapping, found 4"),
        # at a point of the grid
        (
            {
                "grid": {"evict.select": ["record", "head"]},
                "settings": {"students.kava.alpha_readout": 1.0},
            },
            "students.kava.alpha_readout: needs slots that hold one token in all layers and heads, "
            "and evict.select is head",
        ),
        (
            {"grid": {"students.*.training.records": [4, 8, 9]}},
            "students.kava.training.records: expected at most 8, found 9: prepare.train is 8",
        ),
        # what would change nothing
        ({"students": ["no-cot"], "interventions": 3}, "s.interventions: none of the students has"),
        ({"students": ["no-cot"], "fidelity": 3}, "s.fidelity: none of the students has latents"),
        (
            {"students": ["kava"], "baseline": "kava"},
            "s.baseline: there is no other student to compare with kava",
        ),
        (
            {"students": ["no-cot"], "grid": {"evict.budget": [4, 8]}},
            "s.grid: evict.budget: 4 and 8 come to the same for every student",
        ),
        (
            {
                "students": ["no-cot"],
                "together": [{"evict.budget": m, "evict.keys_bits": m} for m in (4, 8)],
            },
            "s.together: {'evict.budget': 4, ",
        ),
        (
            {"grid": {"evict.budget": [4, 8], "evict.policy": ["rkv", {"name": "rkv"}]}},
            "s.grid: evict.policy: 'rkv' and {'name': 'rkv'} come to the same",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    study: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(KavaError) as caught:
        plan(tmp_path, study)
    assert message in str(caught.value)


def test_what_suits_no_other_student_of_the_pipeline_may_be_a_study(tmp_path: Path) -> None:
    own = copy.deepcopy(SMALL)
    own["evict"]["select"] = "record"
    own["students"]["readout"] = {**own["students"]["kava"], "alpha_readout": 1.0}
    own["fidelity"] = {"policies": ["results"]}
    study = {"students": ["kava"], "grid": {"evict.select": ["record", "head"]}}
    for form in ("equations", "sentences"):
        small = {**own, "prepare": {**own["prepare"], "traces": "equations"}}
        found = plan(tmp_path, {**study, "settings": {"prepare.traces": form}}, small)
        assert pieces(found)["distill"] == 4
        for cell in found.cells:
            raw = cell.piece.settings
            assert list(raw["students"]) == ["kava"] and "policies" not in raw["fidelity"]


@pytest.mark.parametrize(
    ("study", "otherwise"),
    [
        ({}, []),
        ({"students": ["no-cot"], "seeds": [7]}, []),
        ({"split": "validation", "students": ["kava"], "seeds": [0]}, []),
        ({"grid": {"evict.budget": [4, 8]}}, []),
        ({"interventions": 3}, []),
        ({"grid": {"evict.budget": [6, 8]}}, ["kava"] * 2),
        ({"split": "validation", "settings": {"evict.budget": 8}}, ["kava"] * 2),
        ({"students": ["no-cot"], "settings": {"evict.budget": 8}}, ["kava"] * 2),
        # what suits kava no longer, which then can be asked as it was no more
        (
            {"students": ["no-cot"], "settings": {"students.kava.fake_quantise": True}},
            ["kava"] * 2,
        ),
        (
            {"settings": {"evaluate.limit": 3}},
            ["teacher-cot", "teacher-no-cot", "kava", "no-cot", "kava", "no-cot"],
        ),
    ],
)
def test_test_problems_asked_with_other_settings_are_known(
    study: dict[str, Any], otherwise: list[str], tmp_path: Path
) -> None:
    asked = [
        Asking(at="", system=cell.system, variant="", seed=cell.seed, problems=4, key=cell.key)
        for cell in plan(tmp_path, {"split": "test"}).cells
    ]
    gone = Asking(at="", system="gone", variant="", seed=0, problems=4, key="x")
    now = plan(tmp_path, study)
    found = asked_otherwise(tmp_path / "pipelines.yaml", "s", now.study, [*asked, gone])
    assert [asking.system for asking in found] == otherwise


def test_a_system_that_lacks_a_seed_is_not_compared(tmp_path: Path) -> None:
    found = plan(tmp_path, {"baseline": "no-cot", "grid": {"evict.budget": [4, 8]}})
    _, second = found.pairs
    lost = next(cell for cell in found.cells if "=4" in cell.variant)
    left = found.only({*found.cells} - {lost})
    assert left.pairs == (second,) and len(left.cells) == len(found.cells) - 1
    assert (left.missing_cells, left.missing_pairs) == (1, 1)
    assert found.only({*found.cells}) == found


def test_another_name_is_answered_with_those_there_are(tmp_path: Path) -> None:
    plan(tmp_path, {})
    with pytest.raises(KavaError, match=r"no study 'x'\. There are: s"):
        load_study(tmp_path / "pipelines.yaml", "x")
