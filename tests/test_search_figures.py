"""The pictures of a search, and the share of variance by which its fields are ordered."""

from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from scipy import stats

from purepg.run.reliability import importance
from purepg.run.watch.search import parallel_figure, scores_of, search_figure

RATES, GAMMAS = np.geomspace(1e-4, 1e-2, 12), np.linspace(0.9, 0.99, 12)[::-1]


def settings_of(iqm: Any, num_seeds: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "hyperparameters": {"learning_rate": float(RATES[i]), "gamma": float(GAMMAS[i]), "hidden": [8, 8 + i % 2]},
            "iqm": iqm(i),
            "interval": [None, None] if num_seeds == 1 else [iqm(i) - 2.0, iqm(i) + 1.0],
            "finals": [iqm(i)] * num_seeds,
        }
        for i in range(12)
    ]


WINNER = {"iqm": 7.5, "interval": [6.0, 8.0], "finals": [7.0, 8.0, 7.5, 7.5]}
SUMMARY = {"settings": settings_of(float), "winner": WINNER}  # the last setting is the best


def panels(figure: Any) -> dict[str, Any]:
    figure.draw_without_rendering()
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def points(axes: Any) -> list[np.ndarray]:
    return [np.asarray(points.get_offsets()) for points in axes.collections if isinstance(points, PathCollection)]


def test_every_field_has_a_panel_of_all_final_returns_on_the_scale_of_its_range():
    found = panels(search_figure(SUMMARY, "title", ["learning_rate"]))
    assert list(found) == ["learning_rate", "gamma", "hidden", "Which fields matter", "The best settings"]
    assert [found[name].get_xscale() for name in ("learning_rate", "gamma", "hidden")] == ["log", "linear", "linear"]
    for name, value in ("learning_rate", RATES), ("gamma", GAMMAS):
        every, best, fresh = points(found[name])
        np.testing.assert_array_equal(every, np.stack([value, np.arange(12.0)], axis=1))
        np.testing.assert_array_equal([*best, *fresh], [[value[-1], 11.0], [value[-1], 7.5]])
        low, high = found[name].get_xlim()
        assert low < value.min() and value.max() < high
    every, best, _ = points(found["hidden"])
    assert np.rint(every[:, 0]).tolist() == [0, 1] * 6 and round(best[0, 0]) == 1
    assert [label.get_text() for label in found["hidden"].get_xticklabels()] == ["8x8", "8x9"]


def test_numbers_of_which_few_differ_are_drawn_as_choices_in_their_order():
    settings = [x | {"hyperparameters": {"num_epochs": (16, 4, 8)[i % 3]}} for i, x in enumerate(settings_of(float))]
    axes = panels(search_figure({"settings": settings}, "title"))["num_epochs"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "16"]
    assert np.rint(points(axes)[0][:, 0]).tolist() == [2, 0, 1] * 4


def test_the_best_settings_stand_in_order_below_the_winner_on_fresh_seeds():
    axes = panels(search_figure(SUMMARY, "title"))["The best settings"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["the first again, 4 fresh seeds", "0.01, 0.9, 8x9"] and len(names) == 1 + 10
    assert [line.get_xdata()[0] for line in axes.lines] == [7.5, *np.arange(11.0, 1.0, -1)]
    intervals = [collection.get_segments()[0][:, 0].tolist() for collection in axes.collections]
    assert intervals[:2] == [[6.0, 8.0], [9.0, 12.0]]


def test_the_fields_that_explain_most_come_first():
    axes = panels(search_figure(SUMMARY, "title"))["Which fields matter"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["learning_rate", "gamma", "hidden"]
    assert [text.get_text().partition("trend ")[2] for text in axes.texts[:3]] == ["+1.00", "-1.00", ""]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[0] == pytest.approx(importance(RATES.tolist(), np.arange(12.0))) == widths[1] and widths[2] == 0


def test_a_line_of_the_parallel_coordinates_goes_through_its_settings_values():
    figure: Any = parallel_figure(SUMMARY["settings"], "title", ["learning_rate"])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    lines = np.array([line.get_ydata() for line in axes.lines[:12]])
    step = np.diff(lines[:, [0, 1, 3]], axis=0)  # equal steps on each scale
    np.testing.assert_allclose(step, np.broadcast_to(step[0], step.shape), rtol=1e-6)
    assert step[0, 0] > 0 > step[0, 1] and ((lines > 0) & (lines < 1)).all()
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "learning_rate",
        "gamma",
        "hidden",
        "final return",
    ]
    # The ticks' heights are those of their values.
    ticks = {text.get_text(): text.xy[1] for text in axes.texts if text.xy[0] == 0}
    assert ticks["0.0001"] == pytest.approx(lines[0, 0]) and ticks["0.01"] == pytest.approx(lines[-1, 0])


@pytest.mark.parametrize("iqm", [lambda i: None, lambda i: 5.0, lambda i: None if i else 1.0])
def test_pictures_are_drawn_of_any_values(iqm):
    settings = [entry | {"iqm": iqm(i), "interval": [None, None]} for i, entry in enumerate(settings_of(float, 1))]
    search_figure({"settings": settings}, "title", ["learning_rate"]).draw_without_rendering()
    parallel_figure(settings, "title", ["learning_rate"]).draw_without_rendering()
    one = [{**settings[0], "hyperparameters": {"gamma": 0.9}}]
    search_figure({"settings": one}, "title").draw_without_rendering()


def test_importance_is_zero_on_average_without_dependence_and_near_one_with_full():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=64)
    choices = ["adam", "sgd", "adam", "none"] * 16
    signed = []
    for _ in range(200):
        y = rng.normal(size=64)
        signed.append(importance(x.tolist(), y))
    assert np.mean(signed) < 0.06 and np.median(signed) < 0.03
    assert importance(x.tolist(), np.exp(x)) > 0.95
    assert importance(choices, np.array([len(choice) for choice in choices], float)) > 0.95
    assert importance(choices, np.full(64, 2.0)) == 0.0
    assert np.isnan(importance(["adam"] * 64, x)) and np.isnan(importance([1, 2, 3], np.arange(3.0)))


def test_importance_is_kruskal_and_wallis_and_sees_an_optimum_inside_the_range():
    x = np.linspace(-1, 1, 64)
    hill = -(x**2) + 1e-6 * x
    assert importance(x.tolist(), hill) > 0.9
    assert abs(np.corrcoef(stats.rankdata(x), stats.rankdata(hill))[0, 1]) < 0.1
    groups = np.arange(64) // 8
    h = stats.kruskal(*(hill[groups == g] for g in range(8))).statistic
    assert importance(x.tolist(), hill) == pytest.approx((h - 7) / 56)
    assert importance(x.tolist(), np.exp(hill)) == pytest.approx(importance(x.tolist(), hill))  # of ranks alone


def test_the_best_is_one_that_was_trained_to_the_end_whatever_was_stopped_before():
    settings = [x | ({"stopped_at": 100} if i > 8 else {}) for i, x in enumerate(settings_of(float))]
    scores = scores_of(settings, [])
    assert scores.iqm.tolist() == [9.0, 10.0, 11.0, *map(float, range(9))]
