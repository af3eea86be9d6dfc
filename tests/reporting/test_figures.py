"""What keeps figures readable: where names go, and what happens at the edges of the data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.findings.eviction import EvictionFindings, Explained
from kava_core.findings.latents import LayerMaps
from kava_core.reporting.figures import gradient_shares, loss_curves, trace_lengths
from kava_core.reporting.heatmaps import heatmap, limits_of
from kava_core.reporting.inputs import Curve, TargetsOverview
from kava_core.reporting.insights import slot_maps
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


def test_held_out_losses_are_dashed_and_unknown_terms_are_drawn_too() -> None:
    curve = Curve([1, 2], [1.0, 0.5])
    curves = {"loss_answer": curve, "loss_new": curve, "eval_loss_new": curve}
    figure = loss_curves({}, {"kava": curves})
    assert figure is not None and "new" in figure.svg
    plain = loss_curves({}, {"kava": {**curves, "eval_loss_new": Curve([], [])}})
    assert plain is not None
    assert figure.svg.count("stroke-dasharray") == plain.svg.count("stroke-dasharray") + 1
    shares = {"gradient_share_answer": curve, "gradient_share_new": curve}
    drawn = gradient_shares({"kava": shares})
    assert drawn is not None and "new" in drawn.svg


def test_similarity_without_a_number_is_left_out() -> None:
    empty = LayerMaps(layers=[0], keys=[[None]], values=[[None]])
    assert slot_maps("name", "title", "", {"kava": empty}) is None
    assert slot_maps("name", "title", "", {}) is None


def test_all_heatmaps_share_the_scale_of_the_widest() -> None:
    low = LayerMaps(layers=[0], keys=[[-0.31]], values=[[0.1]])
    high = LayerMaps(layers=[0], keys=[[0.2]], values=[[0.97]])
    figure = slot_maps("name", "title", "", {"a": low, "b": high})
    assert figure is not None
    for text in ("−0.31", "0.97", "a: keys", "b: values", "cosine similarity"):
        assert text in figure.svg


def test_a_scale_goes_from_zero_or_below_to_the_highest_number() -> None:
    assert limits_of([np.array([[0.31, np.nan]]), np.array([[0.62]])]) == pytest.approx((0.0, 0.7))
    assert limits_of([np.array([[-0.31]])]) == pytest.approx((-0.4, -0.3))
    assert limits_of([np.array([[0.0]])]) == pytest.approx((0.0, 0.1))
    assert limits_of([np.array([[np.nan]])]) is None and limits_of([]) is None


def test_few_cells_have_their_numbers_and_marked_ones_a_frame() -> None:
    from matplotlib.figure import Figure

    cells = np.array([[0.25, np.nan], [1.0, -0.5]])
    ax = Figure().subplots()
    heatmap(ax, cells, ["a", "b"], [1, 2], (-1.0, 1.0), digits=2, marks=[(1, 0)])
    assert sorted(text.get_text() for text in ax.texts) == ["0.25", "1.00", "−0.50"]
    assert {patch.get_xy() for patch in ax.patches} == {(-0.46, 0.56)}  # column 0, row 1
    many = Figure().subplots()
    heatmap(many, np.zeros((20, 40)), range(20), range(40), (0.0, 1.0), digits=2)
    assert not many.texts
    assert len(many.get_xticks()) <= 12 and len(many.get_yticks()) <= 12


@pytest.mark.parametrize("lengths", [[7], [1, 2, 5000], list(range(1, 200))])
def test_any_lengths_make_a_histogram(lengths: list[int]) -> None:
    eviction = EvictionFindings(
        engaged_percent=50.0,
        kept_percent=30.0,
        agreement_percent=100.0,
        result_percent=None,
        identity_explained=Explained(keys=None, values=None),
        megabytes=1.0,
    )
    targets = TargetsOverview(None, np.array(lengths), 4, 6, eviction)  # type: ignore[arg-type]
    figure = trace_lengths(targets)
    assert "budget M = 4 to 6" in figure.svg
    assert "50.0 %" in figure.caption
