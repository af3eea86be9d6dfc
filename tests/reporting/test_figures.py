"""What keeps figures readable: where names go, and what happens at the edges of the data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.reporting.figures import (
    gradient_shares,
    loss_curves,
    similarity_maps,
    trace_lengths,
)
from kava_core.reporting.inputs import Curve, Similarity, Targets
from kava_core.reporting.style import COLOURS, KNOWN, colours_of, spread

VALUES = st.lists(st.floats(0, 100), min_size=1, max_size=8)


@given(VALUES)
def test_names_are_kept_apart_in_order_and_inside(wanted: list[float]) -> None:
    places = spread(wanted, 6.0, 0.0, 100.0)
    ascending = sorted(places)
    gaps = np.diff(ascending)
    assert (gaps >= 6.0 - 1e-9).all()
    assert ascending[0] >= -1e-9 and ascending[-1] <= 100 + 1e-9
    for i, a in enumerate(wanted):
        for j, b in enumerate(wanted):
            if a < b or (a == b and j < i):
                assert places[i] < places[j]


def test_names_with_room_stay_where_they_are() -> None:
    assert spread([50.0, 10.0, 90.0], 6.0, 0.0, 100.0) == [50.0, 10.0, 90.0]
    assert spread([50.0, 50.0], 6.0, 0.0, 100.0) == [53.0, 47.0]


def test_the_colours_are_told_apart_in_a_finished_drawing() -> None:
    light = [pair[0] for pair in COLOURS.values()]
    assert len(set(light)) == len(light)


def test_known_systems_always_look_the_same() -> None:
    looks = colours_of(["zeta", "kava", "alpha", *map(str, range(7))])
    assert looks["kava"] == KNOWN["kava"]
    assert looks["zeta"] != looks["alpha"]
    assert len(looks) == 10


def test_curves_of_one_point_of_zeros_and_of_nothing_are_drawn() -> None:
    one = {"loss": Curve([5], [1.0]), "loss_answer": Curve([5], [0.0])}
    assert loss_curves(one, {"kava": one, "b": {"loss_answer": Curve([], [])}}) is not None
    assert loss_curves({}, {}) is None
    assert gradient_shares({"kava": one}) is None


def test_similarity_without_a_number_is_left_out() -> None:
    empty = Similarity(records=1, layers=[0], keys=[[None]], values=[[None]])
    assert similarity_maps({"kava": empty}) is None
    assert similarity_maps({}) is None


def test_all_heatmaps_share_the_scale_of_the_widest() -> None:
    low = Similarity(records=1, layers=[0], keys=[[-0.31]], values=[[0.1]])
    high = Similarity(records=1, layers=[0], keys=[[0.2]], values=[[0.97]])
    figure = similarity_maps({"a": low, "b": high})
    assert figure is not None
    for text in ("−0.31", "0.97", "a: keys", "b: values", "cosine similarity"):
        assert text in figure.svg


@pytest.mark.parametrize("lengths", [[7], [1, 2, 5000], list(range(1, 200))])
def test_any_lengths_make_a_histogram(lengths: list[int]) -> None:
    targets = Targets(None, np.array(lengths), 4, 6, 0.5)  # type: ignore[arg-type]
    figure = trace_lengths(targets)
    assert "budget M = 4 to 6" in figure.svg
    assert "50.0 %" in figure.caption
