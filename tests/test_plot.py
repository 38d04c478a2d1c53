"""Learning curves: the numbers that are drawn, and that a picture comes of any of them."""

from typing import Any

import numpy as np
import pytest

from purepg.run.reliability import iqm
from purepg.run.watch import curves, heatmap
from purepg.run.watch.curves import MAX_POINTS, NUM_BEST, on_common_grid, short_labels
from purepg.run.watch.style import COLOURS, LIGHT_GREY
from purepg.types import UsageError

curves_figure: Any = curves.curves_figure  # matplotlib's types are too wide for what the tests look into
heatmap_figure: Any = heatmap.heatmap_figure


def population(num_settings: int, num_seeds: int, num_updates: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (num_settings, num_seeds, num_updates)
    return {"episode_return": rng.normal(size=shape).astype(np.float32), "env_steps": np.full(shape, 512)}


def test_line_is_the_iqm_and_band_the_quartiles_at_the_steps_consumed():
    metrics = population(2, 16, 40)
    figure = curves_figure(metrics, ["a", "b"], "title")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    for h, (line, band) in enumerate(zip(axes.lines, axes.collections, strict=True)):
        np.testing.assert_array_equal(line.get_xdata(), 512 * np.arange(1, 41))
        np.testing.assert_allclose(line.get_ydata(), iqm(metrics["episode_return"][h], axis=0), rtol=1e-6)
        outline = band.get_paths()[0].vertices
        lo, hi = np.quantile(metrics["episode_return"][h], (0.25, 0.75), axis=0)
        np.testing.assert_allclose([outline[:, 1].min(), outline[:, 1].max()], [lo.min(), hi.max()], rtol=1e-6)


@pytest.mark.parametrize(("num_settings", "num_legends"), [(1, 0), (2, 1), (6, 1)])
def test_more_than_one_setting_has_a_legend_and_lines_that_differ(num_settings, num_legends):
    metrics = population(num_settings, 4, 10)
    figure = curves_figure(metrics, [f"lr={h}" for h in range(num_settings)], "title")
    axes = figure.axes[0]
    assert len(figure.legends) + (axes.get_legend() is not None) == num_legends
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == num_settings


@pytest.mark.parametrize("num_settings", [7, 30])
def test_of_many_settings_the_best_at_the_end_are_coloured_and_named_and_the_others_grey(num_settings):
    metrics = population(num_settings, 4, 20)
    order = np.random.default_rng(1).permutation(num_settings)  # how good each one is at the end
    metrics["episode_return"] += 100 * order[:, None, None]
    metrics["episode_return"][:, :, :10] *= -1
    figure = curves_figure(metrics, [f"lr={h}" for h in range(num_settings)], "title")
    coloured = [line.get_label() for line in figure.axes[0].lines if line.get_color() in COLOURS]
    best = [str(h) for h in np.argsort(-order)[:NUM_BEST]]
    assert set(coloured) == set(best)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*best, f"the other {num_settings - NUM_BEST}"]
    assert legend.get_title().get_text() == "lr"
    grey = [line for line in figure.axes[0].lines if line.get_color() == LIGHT_GREY]
    assert len(grey) == num_settings - NUM_BEST
    assert max(line.get_zorder() for line in grey) < min(c.get_zorder() for c in figure.axes[0].collections)


@pytest.mark.parametrize("num_settings", [5, 30])
def test_legend_of_many_settings_lies_outside_of_the_axes_and_under_no_text(num_settings):
    labels = [f"learning_rate={0.001 * 1.1**h},gamma=0.98,gae_lambda=0.95" for h in range(num_settings)]
    figure = curves_figure(population(num_settings, 4, 20), labels, "title")
    figure.draw_without_rendering()  # lays it out
    axes, legend = figure.axes[0], figure.legends[0].get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1
    assert legend.x1 <= figure.bbox.x1
    assert not any(legend.overlaps(text.get_window_extent()) for text in (*axes.texts, axes.title))


def test_setting_without_a_value_at_the_end_is_never_among_the_best():
    metrics = population(9, 2, 10)
    metrics["episode_return"][0] = np.nan
    metrics["episode_return"][1:6] = -50.0
    figure = curves_figure(metrics, [f"lr={h}" for h in range(9)], "title")
    assert "0" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_labels_say_shared_names_once_and_values_shortly():
    labels = ["learning_rate=0.00031622776601683794,hidden=(64, 64)", "learning_rate=0.01,hidden=(32,)"]
    assert short_labels(labels) == ("learning_rate, hidden", ["0.000316, 64x64", "0.01, 32"])
    assert short_labels(["gamma=0.9991", "gamma=0.9992"]) == ("gamma", ["0.9991", "0.9992"])  # rounded, they were one
    assert short_labels(["a=1", "b=1"]) == ("", ["a=1", "b=1"])
    names, _ = short_labels(["algorithm.learning_rate=1,network.hidden=2,ppo.clip_eps=0.2"])
    assert names == "algorithm.learning_rate, network.hidden,\nppo.clip_eps"
    assert len(short_labels(["x" * 100])[1][0]) <= 40


def sweep_of_two(value) -> list[dict]:
    """summary.json's settings of 4 learning rates x 3 widths."""
    return [
        {"hyperparameters": {"learning_rate": a, "hidden": b}, "iqm": value(i, j), "finals": [0.0, 0.0]}
        for i, a in enumerate((1e-2, 3e-4, 1e-3, 3e-3))
        for j, b in enumerate(([64, 64], [32], [8]))
    ]


def test_heat_map_holds_every_final_value_where_its_fields_say():
    figure = heatmap_figure(sweep_of_two(lambda i, j: None if (i, j) == (3, 1) else 100.0 * i + j), "title")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning_rate", "hidden")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.01", "0.0003", "0.001", "0.003"]  # as given
    assert [text.get_text() for text in axes.get_yticklabels()] == ["64x64", "32", "8"]
    image = axes.images[0].get_array()
    written = {text.get_position(): text.get_text() for text in axes.texts if not text.get_text().startswith("final")}
    for i in range(4):
        for j in range(3):
            is_absent = (i, j) == (3, 1)
            assert image.mask[j, i] if is_absent else image[j, i] == 100 * i + j
            assert written[i, j] == ("none" if is_absent else f"{100 * i + j}")
    (frame,) = axes.patches
    assert (round(frame.get_x()), round(frame.get_y())) == (3, 2)  # 302, the highest


@pytest.mark.parametrize("value", [lambda i, j: None, lambda i, j: 500.0, lambda i, j: -1e5 * i - j])
def test_heat_map_is_drawn_of_any_values(value):
    heatmap_figure(sweep_of_two(value), "title").draw_without_rendering()


def test_heat_map_is_of_two_fields_only():
    with pytest.raises(UsageError, match="two fields"):
        heatmap_figure([{"hyperparameters": {"gamma": 0.9}, "iqm": 1.0, "finals": [1.0]}], "title")


def test_only_long_runs_are_smoothed_and_the_axis_says_so():
    short, long = (
        curves_figure(population(1, 2, num_updates), [""], "title").axes[0]
        for num_updates in (MAX_POINTS, 3 * MAX_POINTS - 1)
    )
    assert short.get_ylabel() == "episode return"
    assert long.get_ylabel() == "episode return (mean of 3 updates)"
    assert len(short.lines[0].get_xdata()) == len(long.lines[0].get_xdata()) == MAX_POINTS
    assert long.lines[0].get_xdata()[-1] == 512 * (3 * MAX_POINTS - 1)


def test_windows_average_the_values_they_have():
    value = np.array([[1.0, 3.0, np.nan, 5.0, np.nan, np.nan, 8.0]])
    grid, curve = on_common_grid(np.full((1, 7), 10), value, window=2)
    np.testing.assert_array_equal(grid, [20, 40, 60, 70])
    np.testing.assert_array_equal(curve, [[2.0, 5.0, 7.0, 8.0]])  # the third has none: between its neighbours


def test_seeds_whose_updates_differ_in_length_meet_on_one_grid():
    env_steps = np.array([[10, 10, 20, 0], [20, 10, np.nan, np.nan]])
    value = np.array([[1.0, 2.0, 4.0, 99.0], [6.0, 7.0, np.nan, np.nan]])  # 99 is padding
    grid, curve = on_common_grid(env_steps, value)
    np.testing.assert_array_equal(grid, [10, 20, 30, 40])
    np.testing.assert_array_equal(curve, [[1.0, 2.0, 3.0, 4.0], [np.nan, 6.0, 7.0, 7.0]])


def test_grid_has_no_more_points_than_a_seed_has_updates():
    env_steps = np.random.default_rng(0).integers(1, 100, (16, 30))
    grid, curve = on_common_grid(env_steps, np.ones((16, 30)))
    assert grid.shape == (30,)
    assert curve.shape == (16, 30)
    assert grid[0] == env_steps[:, 0].min()
    assert grid[-1] == env_steps.sum(axis=1).max()


def test_one_update_is_drawn_as_a_point():
    figure = curves_figure(population(1, 1, 1), [""], "title")
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_run_without_a_value_is_drawn_and_says_so():
    metrics = population(1, 2, 3)
    metrics["episode_return"][:] = np.nan
    figure = curves_figure(metrics, [""], "title")
    assert "no value in any update" in [text.get_text() for text in figure.axes[0].texts]


def test_another_metric_is_drawn_under_its_own_name():
    metrics = population(1, 2, 3) | {"value_loss": np.ones((1, 2, 3), np.float32)}
    figure = curves_figure(metrics, [""], "title", metric="value_loss")
    assert figure.axes[0].get_ylabel() == "value loss"
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), 1)


def test_drawing_leaves_no_global_figure_behind():
    from matplotlib import pyplot

    curves_figure(population(1, 2, 3), [""], "title")
    assert pyplot.get_fignums() == []


def test_a_metric_that_the_run_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(UsageError, match="no metric 'kl'; the run has env_steps, episode_return"):
        curves_figure(population(1, 2, 3), [""], "title", metric="kl")


def test_a_run_without_episode_returns_is_drawn_by_any_metric_it_has():
    metrics = {"accuracy": np.ones((2, 3, 4)), "env_steps": np.full((2, 3, 4), 8)}
    figure = curves_figure(metrics, ["a", "b"], "title", metric="accuracy")
    assert figure.axes[0].get_ylabel() == "accuracy"


def test_figures_are_written_as_png(tmp_path):
    figures = curves_figure(population(2, 2, 3), ["a", "b"], "title"), heatmap_figure(sweep_of_two(lambda i, j: i), "t")
    for figure in figures:
        figure.savefig(tmp_path / "file", format="png")
        assert (tmp_path / "file").read_bytes().startswith(b"\x89PNG")
