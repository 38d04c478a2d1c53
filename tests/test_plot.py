"""Learning curves: the numbers that are drawn, and that a picture comes of any of them."""

import io

import numpy as np
import pytest

from purepg.run.plot import (
    COLOURS,
    LIGHT_GREY,
    MAX_POINTS,
    NUM_BEST,
    curves,
    heatmap,
    on_common_grid,
    over_seeds,
    short_labels,
)
from purepg.run.reliability import iqm


@pytest.fixture
def figures(monkeypatch):
    """The figures that `curves` saves, to look into."""
    from matplotlib.figure import Figure

    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), savefig(self, *args, **kwargs))
    )
    return saved


def population(num_settings: int, num_seeds: int, num_updates: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (num_settings, num_seeds, num_updates)
    return {"episode_return": rng.normal(size=shape).astype(np.float32), "env_steps": np.full(shape, 512)}


def test_line_is_the_iqm_and_band_the_quartiles_at_the_steps_consumed(tmp_path, figures):
    metrics = population(2, 16, 40)
    curves(tmp_path / "curves.png", metrics, ["a", "b"], "title")
    axes = figures[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    for h, (line, band) in enumerate(zip(axes.lines, axes.collections, strict=True)):
        np.testing.assert_array_equal(line.get_xdata(), 512 * np.arange(1, 41))
        np.testing.assert_allclose(line.get_ydata(), iqm(metrics["episode_return"][h], axis=0), rtol=1e-6)
        outline = band.get_paths()[0].vertices
        lo, hi = np.quantile(metrics["episode_return"][h], (0.25, 0.75), axis=0)
        np.testing.assert_allclose([outline[:, 1].min(), outline[:, 1].max()], [lo.min(), hi.max()], rtol=1e-6)


@pytest.mark.parametrize(("num_settings", "num_legends"), [(1, 0), (2, 1), (6, 1)])
def test_more_than_one_setting_has_a_legend_and_lines_that_differ(tmp_path, figures, num_settings, num_legends):
    metrics = population(num_settings, 4, 10)
    curves(tmp_path / "curves.png", metrics, [f"lr={h}" for h in range(num_settings)], "title")
    axes = figures[0].axes[0]
    assert len(figures[0].legends) + (axes.get_legend() is not None) == num_legends
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == num_settings
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_settings", [7, 30])
def test_of_many_settings_the_best_at_the_end_are_coloured_and_named_and_the_others_grey(figures, num_settings):
    metrics = population(num_settings, 4, 20)
    order = np.random.default_rng(1).permutation(num_settings)  # how good each one is at the end
    metrics["episode_return"] += 100 * order[:, None, None]
    metrics["episode_return"][:, :, :10] *= -1
    curves(io.BytesIO(), metrics, [f"lr={h}" for h in range(num_settings)], "title")
    coloured = [line.get_label() for line in figures[0].axes[0].lines if line.get_color() in COLOURS]
    best = [str(h) for h in np.argsort(-order)[:NUM_BEST]]
    assert set(coloured) == set(best)
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*best, f"the other {num_settings - NUM_BEST}"]
    assert legend.get_title().get_text() == "lr"
    grey = [line for line in figures[0].axes[0].lines if line.get_color() == LIGHT_GREY]
    assert len(grey) == num_settings - NUM_BEST
    assert max(line.get_zorder() for line in grey) < min(c.get_zorder() for c in figures[0].axes[0].collections)


@pytest.mark.parametrize("num_settings", [5, 30])
def test_legend_of_many_settings_lies_outside_of_the_axes_and_under_no_text(figures, num_settings):
    labels = [f"learning_rate={0.001 * 1.1**h},gamma=0.98,gae_lambda=0.95" for h in range(num_settings)]
    curves(io.BytesIO(), population(num_settings, 4, 20), labels, "title")
    axes, legend = figures[0].axes[0], figures[0].legends[0].get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1
    assert legend.x1 <= figures[0].bbox.x1
    assert not any(legend.overlaps(text.get_window_extent()) for text in (*axes.texts, axes.title))


def test_setting_without_a_value_at_the_end_is_never_among_the_best(figures):
    metrics = population(9, 2, 10)
    metrics["episode_return"][0] = np.nan
    metrics["episode_return"][1:6] = -50.0
    curves(io.BytesIO(), metrics, [f"lr={h}" for h in range(9)], "title")
    assert "0" not in [text.get_text() for text in figures[0].legends[0].get_texts()]


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


def test_heat_map_holds_every_final_value_where_its_fields_say(tmp_path, figures):
    heatmap(tmp_path / "heatmap.png", sweep_of_two(lambda i, j: None if (i, j) == (3, 1) else 100.0 * i + j), "title")
    axes = figures[0].axes[0]
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
    heatmap(io.BytesIO(), sweep_of_two(value), "title")


def test_heat_map_is_of_two_fields_only():
    with pytest.raises(ValueError, match="two fields"):
        heatmap(io.BytesIO(), [{"hyperparameters": {"gamma": 0.9}, "iqm": 1.0, "finals": [1.0]}], "title")


def test_only_long_runs_are_smoothed_and_the_axis_says_so(tmp_path, figures):
    for num_updates in (MAX_POINTS, 3 * MAX_POINTS - 1):
        curves(io.BytesIO(), population(1, 2, num_updates), [""], "title")
    short, long = (figure.axes[0] for figure in figures)
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


def test_statistics_are_over_the_seeds_that_have_a_value():
    value = np.array([[np.nan, 1.0], [4.0, 2.0], [np.nan, 3.0], [6.0, 10.0], [8.0, np.nan]])
    value = np.concatenate([value, np.full((5, 1), np.nan)], axis=1)
    middle, lo, hi = over_seeds(value)
    np.testing.assert_array_equal(middle, [6.0, 2.5, np.nan])
    np.testing.assert_array_equal(lo, [5.0, 1.75, np.nan])
    np.testing.assert_array_equal(hi, [7.0, 4.75, np.nan])


def test_one_update_is_drawn_as_a_point(tmp_path, figures):
    curves(tmp_path / "curves.png", population(1, 1, 1), [""], "title")
    assert figures[0].axes[0].lines[0].get_marker() == "o"


def test_run_without_a_value_is_drawn_and_says_so(tmp_path, figures):
    metrics = population(1, 2, 3)
    metrics["episode_return"][:] = np.nan
    curves(tmp_path / "curves.png", metrics, [""], "title")
    assert "no value in any update" in [text.get_text() for text in figures[0].axes[0].texts]


def test_another_metric_is_drawn_under_its_own_name(tmp_path, figures):
    metrics = population(1, 2, 3) | {"value_loss": np.ones((1, 2, 3), np.float32)}
    curves(tmp_path / "curves.png", metrics, [""], "title", metric="value_loss")
    assert figures[0].axes[0].get_ylabel() == "value loss"
    np.testing.assert_array_equal(figures[0].axes[0].lines[0].get_ydata(), 1)


def test_drawing_leaves_no_global_figure_behind(tmp_path):
    from matplotlib import pyplot

    curves(tmp_path / "curves.png", population(1, 2, 3), [""], "title")
    assert pyplot.get_fignums() == []
