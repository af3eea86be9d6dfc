"""What latents hold beside the teacher's cache, against loops over records, layers and heads."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.eviction import POLICIES, group_layers
from kava_core.fidelity.examiner import Layers
from kava_core.findings.base import read_finding, write_finding
from kava_core.findings.latents import Insight, Insights
from kava_core.latents.interpret import BINS, interpret
from kava_core.latents.student import ANSWER, LATENTS, PARTS, PROMPT
from kava_core.latents.teacher import TeacherView, Truncation, read_teacher, readable
from kava_core.models.latent import LatentReasoner
from kava_core.models.phase import rotary_of
from kava_core.models.slot_cache import ABSENT
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.rotary import unrotate
from tests.evaluation.talker import make_talker, problems
from tests.latents.test_interventions import ASKED, answered
from tests.latents.test_student import naive_passes
from tests.tiny import ARCHITECTURES, assert_near, tiny_model, tiny_trace

M = 3  # latents of the talker


def truncation(phase: str = "pre_rope", layers: tuple[int, ...] = (0, 1, 2)) -> Truncation:
    return Truncation(
        policy=POLICIES["rkv"](),
        layers=Layers(list(layers), group_layers(len(layers), 1)),
        budgets={m: [m] * len(layers) for m in (2, M, 50)},
        budget=M,
        phase=phase,
    )


@pytest.fixture(scope="module")
def teacher(talker: LatentReasoner) -> PreTrainedModel:
    """Not the talker's own weights, so that the two can be told apart."""
    model = copy.deepcopy(talker.decoder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(0.1 * noise)
    return model


def view(
    teacher: PreTrainedModel, encoder: TraceEncoder, cut: Truncation, batch_size: int = 5
) -> TeacherView:
    traces = readable(encoder.encode_all(problems()), teacher.config, 7)
    return read_teacher(
        teacher, traces, encoder.tokenizer, cut, examples=2, top=3, batch_size=batch_size
    )


def looked_into(
    talker: LatentReasoner,
    seen: TeacherView,
    encoder: TraceEncoder,
    asked: list[Problem] | None = None,
) -> Insight:
    texts = {p.id: p for p in problems()}
    return interpret(talker, seen, encoder, texts, asked or [], **ASKED)


def cached(model: PreTrainedModel, **fed: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, N, D] of a plain forward, post-RoPE."""
    cache = DynamicCache()
    with torch.no_grad():
        model(**fed, past_key_values=cache)
    return (
        torch.stack([layer.keys[0] for layer in cache.layers]),
        torch.stack([layer.values[0] for layer in cache.layers]),
    )


def in_phase(model: PreTrainedModel, keys: Tensor, phase: str) -> Tensor:
    """Post-RoPE keys [L, H, N, D] from position 0 on, in `phase`."""
    if phase == "post_rope":
        return keys
    cos, sin = rotary_of(model).cos_sin(torch.arange(keys.shape[2]))  # [L, N, R/2]
    return unrotate(keys, cos[:, None], sin[:, None])


def caches(
    talker: LatentReasoner, teacher: PreTrainedModel, trace: Record, phase: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """keys, values → the latents' [L, H, M, D] and the trace's [L, H, N_C, D]."""
    thought = naive_passes(talker, trace.question_ids)[-1].detach()
    ours = cached(talker.decoder, inputs_embeds=thought[None])
    theirs = cached(teacher, input_ids=torch.tensor([trace.question_ids + trace.cot_ids]))
    latents, chain = len(trace.question_ids) + 1, len(trace.question_ids)
    return {
        "keys": (
            in_phase(talker.decoder, ours[0], phase)[:, :, latents:],
            in_phase(teacher, theirs[0], phase)[:, :, chain:],
        ),
        "values": (ours[1][:, :, latents:], theirs[1][:, :, chain:]),
    }


def positions(seen: TeacherView, budget: int) -> list[Tensor]:
    """Per record [L', H, m]: where the kept tokens stand in the trace, −1 where none is."""
    found = []
    for batch in seen.batches:
        for trace, places in zip(batch.traces, batch.kept[budget].positions, strict=True):
            inside = places - len(trace.question_ids)
            found.append(inside.masked_fill(places == ABSENT, -1))
    return found


def assert_cells(actual: list[list[float | None]], cells: dict[tuple[int, int], list]) -> None:
    for row, line in enumerate(actual):
        for column, found in enumerate(line):
            values = cells.get((row, column))
            expected = None if not values else pytest.approx(sum(values) / len(values), rel=1e-3)
            assert found == expected, (row, column)
    assert set(cells) <= {(r, c) for r, line in enumerate(actual) for c in range(len(line))}


# --- similarity and magnitudes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "layers"), [("pre_rope", (0, 1, 2)), ("post_rope", (0, 2))], ids=str
)
def test_similarity_is_that_of_every_pair_of_vectors(
    talker: LatentReasoner,
    teacher: PreTrainedModel,
    encoder: TraceEncoder,
    phase: str,
    layers: tuple[int, ...],
) -> None:
    seen = view(teacher, encoder, truncation(phase, layers))
    found = looked_into(talker, seen, encoder)
    traces = [trace for batch in seen.batches for trace in batch.traces]
    kept = {m: positions(seen, m) for m in seen.truncation.budgets}
    assert found.similarity_evicted.layers == list(layers)
    for name in ("keys", "values"):
        full: dict[tuple[int, int], list] = {}
        evicted: dict[tuple[int, int], list] = {}
        truncated: dict[tuple[int, int], list] = {}
        for i, trace in enumerate(traces):
            ours, theirs = caches(talker, teacher, trace, phase)[name]
            for layer in range(3):
                for h in range(2):
                    for slot in range(M):
                        cosine = [
                            float(cosine_similarity(ours[layer, h, slot], theirs[layer, h, n], 0))
                            for n in range(len(trace.cot_ids))
                        ]
                        full.setdefault((layer, slot), []).append(max(cosine))
                        if layer not in layers:
                            continue
                        row = layers.index(layer)
                        place = int(kept[M][i][row, h, slot])
                        if place >= 0:
                            evicted.setdefault((row, slot), []).append(cosine[place])
                        two = kept[2][i][row, h].tolist()
                        truncated.setdefault((row, slot), []).append(max(cosine[n] for n in two))
        assert_cells(getattr(found.similarity_full, name), full)
        assert_cells(getattr(found.similarity_evicted, name), evicted)
        assert_cells(getattr(found.similarity_truncated[2], name), truncated)
    whole = found.similarity_truncated[50]  # keeps every token
    for layer, row in zip(layers, whole.keys, strict=True):
        assert row == pytest.approx(found.similarity_full.keys[layer], rel=1e-3)


def test_magnitudes_are_mean_norms(
    talker: LatentReasoner, teacher: PreTrainedModel, encoder: TraceEncoder
) -> None:
    seen = view(teacher, encoder, truncation(layers=(0, 2)))
    found = looked_into(talker, seen, encoder).magnitudes
    traces = [trace for batch in seen.batches for trace in batch.traces]
    for part, name in enumerate(("keys", "values")):
        passes: list[dict[tuple[int, int], list]] = [{}, {}, {}]
        full: dict[tuple[int, int], list] = {}
        kept: dict[tuple[int, int], list] = {}
        for i, trace in enumerate(traces):
            first = len(trace.question_ids)
            for cells, embeds in zip(passes, naive_passes(talker, trace.question_ids), strict=True):
                norms = cached(talker.decoder, inputs_embeds=embeds.detach()[None])[part].norm(
                    dim=-1
                )
                for layer in range(3):
                    for slot in range(M):
                        cells.setdefault((layer, slot), []).append(
                            float(norms[layer, :, first + 1 + slot].mean())
                        )
            n = len(trace.cot_ids)
            norms = cached(teacher, input_ids=torch.tensor([trace.question_ids + trace.cot_ids]))
            for layer in range(3):
                for token in range(n):
                    full.setdefault((layer, token * BINS // n), []).append(
                        float(norms[part][layer, :, first + token].norm(dim=-1).mean())
                    )
            for row, layer in enumerate((0, 2)):
                for h in range(2):
                    for slot, place in enumerate(positions(seen, 50)[i][row, h].tolist()):
                        if place >= 0:
                            vector = norms[part][layer, h, first + place]
                            kept.setdefault((layer, slot), []).append(float(vector.norm()))
        for iteration, cells in zip(found.iterations, passes, strict=True):
            assert_cells(getattr(iteration, name), cells)
        assert_cells(getattr(found.teacher_full, name), full)
        assert_cells(getattr(found.teacher_truncated[50], name), kept)
        assert getattr(found.teacher_truncated[2], name)[1] == [None, None]  # no targets there


# --- attention ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_teachers_answer_looks_where_eager_attention_does(
    name: str, encoder: TraceEncoder
) -> None:
    traces = [tiny_trace("a", 5, 9, 3, 1), tiny_trace("b", 40, 20, 4, 3), tiny_trace("c", 9, 2, 2)]
    model = tiny_model(name)
    seen = read_teacher(
        model, traces, encoder.tokenizer, truncation(), examples=0, top=1, batch_size=9
    )
    (batch,) = seen.batches
    model.set_attn_implementation("eager")
    for row, trace in enumerate(traces):
        head_ids = trace.question_ids + trace.cot_ids + trace.answer_prompt_ids
        weights = model(
            torch.tensor([head_ids + trace.answer_ids]), output_attentions=True
        ).attentions
        mean = torch.stack([w[0] for w in weights]).mean((0, 1))  # [S, S]
        rows = mean[len(head_ids) - 1 : len(head_ids) - 1 + len(trace.answer_ids)].mean(0)
        labels = [
            *batch.parts[row],
            *[LATENTS] * len(trace.cot_ids),
            *[PROMPT] * len(trace.answer_prompt_ids),
            *[ANSWER] * len(trace.answer_ids),
        ]
        expected = torch.zeros(len(PARTS)).index_add(0, torch.tensor(labels), rows.float())
        assert_near(batch.attention[0][row], expected)
        assert_near(batch.attention[50][row], expected)
    for m in (2, M):
        assert_near(batch.attention[m].sum(1), torch.ones(3))
        # What is evicted cannot be looked at.
        assert bool((batch.attention[m][:2, LATENTS] < batch.attention[0][:2, LATENTS]).all())


# --- tokens -------------------------------------------------------------------------------------


def test_latents_and_kept_tokens_decode_side_by_side(
    talker: LatentReasoner, teacher: PreTrainedModel, encoder: TraceEncoder
) -> None:
    seen = view(teacher, encoder, truncation())
    found = looked_into(talker, seen, encoder).decoded
    assert [shown.id for shown in found] == ["p0", "p1"]
    by_slot = positions(seen, M)
    tokenizer = encoder.tokenizer
    for i, (shown, trace) in enumerate(zip(found, seen.batches[0].traces, strict=False)):
        assert "".join(shown.trace) == tokenizer.decode(trace.cot_ids)
        assert (shown.question, shown.answer) == (problems()[i].question, "5")
        ids = torch.tensor([trace.question_ids + trace.cot_ids])
        with torch.no_grad():
            next_tokens = teacher(ids).logits[0, len(trace.question_ids) :].softmax(-1)
        passes = naive_passes(talker, trace.question_ids)
        for iteration, embeds in zip(shown.iterations, passes, strict=True):
            with torch.no_grad():
                logits = talker.decoder(inputs_embeds=embeds[None]).logits[0]
            for slot, told in enumerate(iteration.slots):
                p = logits[len(trace.question_ids) + 1 + slot].softmax(-1)
                best = p.topk(5)
                assert [token for token, _ in told.student] == [
                    tokenizer.decode([j]) for j in best.indices.tolist()
                ]
                assert [x for _, x in told.student] == pytest.approx(best.values.tolist(), 1e-3)
                places = Counter(x for x in by_slot[i][:, :, slot].flatten().tolist() if x >= 0)
                most = max(places.values())
                place = min(x for x, count in places.items() if count == most)
                assert told.teacher_position == place
                assert told.teacher_share == pytest.approx(most / sum(places.values()), 1e-3)
                expected = next_tokens[place].topk(3)
                assert [token for token, _ in told.teacher] == [
                    tokenizer.decode([j]) for j in expected.indices.tolist()
                ]


# --- the whole ----------------------------------------------------------------------------------


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for name in sorted(value) for x in numbers_of(value[name])]
    if isinstance(value, list):
        return [x for part in value for x in numbers_of(part)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_file_is_what_the_report_reads_and_no_batch_shows(
    talker: LatentReasoner, teacher: PreTrainedModel, encoder: TraceEncoder, tmp_path: Path
) -> None:
    asked = answered(talker, encoder)
    one = looked_into(talker, view(teacher, encoder, truncation(), 1), encoder, asked)
    insight = looked_into(talker, view(teacher, encoder, truncation(), 50), encoder, asked)
    plain, alone = (x.model_dump(mode="json") for x in (insight, one))
    assert numbers_of(plain) == pytest.approx(numbers_of(alone), rel=1e-3, abs=1e-6)
    write_finding(tmp_path / "insights.json", {"kava": insight}, spaced=False)
    assert json.loads((tmp_path / "insights.json").read_text())["kava"] == plain
    assert read_finding(Insights, tmp_path / "insights.json", "evaluate") == {"kava": insight}
    assert insight.records == 7 and len(insight.decoded) == 2
    assert insight.interventions is not None and len(insight.interventions.alone.removed) == M
    flow = insight.attention
    assert len(flow.iterations) == 3 and len(flow.sources) == M + 1
    for iteration, grid in enumerate(flow.iterations):
        for source, row in zip(flow.sources, grid, strict=True):
            assert len(row) == len(flow.targets)
            if source == "answer" and iteration < 2:
                assert row == [None] * len(row)
            else:
                assert math.fsum(row) == pytest.approx(1, abs=1e-3)
    assert all(float(f"{x:.5g}") == x for x in numbers_of(plain))
    none = looked_into(talker, view(teacher, encoder, truncation()), encoder)
    assert none.interventions is None


def test_a_student_that_writes_the_last_steps_is_held_against_the_first_ones(
    teacher: PreTrainedModel, encoder: TraceEncoder
) -> None:
    writer = make_talker(encoder)
    writer.config.answer_prompt_ids = []
    half = TraceEncoder(encoder.tokenizer, "equations", 0.5)
    found = looked_into(writer, view(teacher, half, truncation()), half)
    kept, steps = found.decoded[1].trace, problems()[1].steps
    assert len(steps) == 2 and "".join(kept) == steps[0]
    last = found.attention.iterations[-1]
    assert [math.fsum(row) for row in last] == pytest.approx([1] * (M + 1), abs=1e-3)
    assert math.fsum(found.attention.teacher_full) == pytest.approx(1, abs=1e-3)


def test_traces_that_the_teacher_cannot_hold_are_passed_over() -> None:
    config = tiny_model("mistral").config  # a window of 64
    traces = [tiny_trace("long", 5, 70, 2), tiny_trace("a", 5, 6, 2), tiny_trace("b", 5, 6, 2)]
    assert [t.id for t in readable(traces, config, 1)] == ["a"]
    with pytest.raises(KavaError, match=r"found none: the CoT and answer of problem long span"):
        readable(traces[:1], config, 5)
    with pytest.raises(KavaError, match="they have no written chain of thought"):
        readable([], config, 5)
