"""An environment's own metrics: from the episodes that end in a rollout to the log, W&B, results and pictures."""

import re
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from fake_wandb import FakeWandb
from helpers import arms_env, read_log

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.experiment import train_population
from purepg.run.plan import RunConfig
from purepg.run.results import Results
from purepg.run.watch import curves
from purepg.run.watch.curves import MAX_PANELS, most_changed
from purepg.types import Env, UsageError

curves_figure: Any = curves.curves_figure
NAMES = ("steps", "half_steps")
CONFIG = PPOConfig(num_envs=4, num_steps=8, num_epochs=1, num_minibatches=1)
RUN = RunConfig(total_steps=128, num_seeds=3, log_every=2, eval_episodes=4, devices=1)


def counting_env() -> Env:
    """Its metrics are the length of the episode so far, and half of that."""
    env = arms_env()

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        steps = state.t.astype(jnp.float32)
        return state, time_step._replace(info={"steps": steps, "half_steps": 0.5 * steps})

    return env._replace(step=step, metrics=NAMES, name="counting")


COUNTING = counting_env()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(results, the rows and names of its W&B runs) of a run that is logged per setting."""
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeWandb(patch)
        run = replace(RUN, out=tmp_path_factory.mktemp("kept") / "out", wandb="offline", wandb_per="setting")
        results = train_population(
            ppo, CONFIG, actor_critic, NetworkConfig(hidden=(4,)), run, env=COUNTING, sweep={"gamma": [0.9, 0.99]}
        )
        return results, fake.opened


def test_a_metric_of_an_update_is_the_mean_over_the_episodes_that_ended_in_it(kept):
    results: Results = kept[0]
    length = results.metrics["episode_length"]
    assert np.isfinite(length).any()
    np.testing.assert_allclose(results.metrics["info/steps"], length, rtol=1e-6)
    np.testing.assert_allclose(results.metrics["info/half_steps"], 0.5 * length, rtol=1e-6)


def test_the_log_the_file_of_metrics_and_the_tables_hold_them(kept):
    results: Results = kept[0]
    assert results.out
    wanted = results.metrics["info/half_steps"]
    np.testing.assert_allclose(read_log(results.out / "log.jsonl")["info/half_steps"], wanted, rtol=1e-6)
    with np.load(results.out / "metrics.npz") as stored:
        np.testing.assert_array_equal(stored["info/half_steps"], wanted)
    np.testing.assert_array_equal(results.dataset()["info/half_steps"].values, wanted)
    np.testing.assert_array_equal(results.frame()["info/half_steps"].to_numpy().reshape(wanted.shape), wanted)


def test_wandb_has_their_mean_over_seeds_and_its_interval(kept):
    results, opened = kept
    assert len(opened) == 2
    for h, run in enumerate(opened):
        rows = [row for row in run.rows if "info/steps" in row]
        found = np.array([[row[f"{part}info/steps"] for part in ("lo/", "", "hi/")] for row in rows])
        mean = results.metrics["info/steps"][h].mean(axis=0).reshape(-1, 2).mean(axis=1)
        np.testing.assert_allclose(found[:, 1], mean, rtol=1e-5)
        assert np.all(found[:, 0] <= found[:, 1]) and np.all(found[:, 1] <= found[:, 2])


def test_the_curves_have_a_panel_for_each_and_one_alone_can_be_drawn(kept):
    results: Results = kept[0]
    figure: Any = results.plot()
    visible = [axes for axes in all_axes(figure) if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in visible] == ["ppo on counting", "steps", "half steps"]
    (alone,) = results.plot("info/half_steps").axes
    np.testing.assert_array_equal(alone.lines[0].get_ydata(), visible[2].lines[0].get_ydata())
    with pytest.raises(UsageError, match=re.escape("there is no metric 'info/third'; the run has")):
        results.plot("info/third")


def all_axes(figure: Any) -> list[Any]:
    return [axes for part in figure.subfigs for axes in part.axes] or figure.axes


def many(num_metrics: int, num_settings: int = 2) -> dict[str, np.ndarray]:
    """Metric i rises or falls by i / 10, beside noise that is the same at both ends; returns are flat."""
    shape = (num_settings, 3, 40)
    t = np.repeat([0.0, 0.5, 1.0], [10, 20, 10])
    noise = np.tile([0.0, 9.0], 20)
    metrics = {"episode_return": np.zeros(shape), "env_steps": np.full(shape, 8)}
    for i in range(num_metrics):
        metrics[f"info/m{i}"] = np.broadcast_to((-1) ** i * i / 10 * t + noise, shape)
    return metrics


def test_of_many_metrics_those_are_drawn_that_change_most_from_the_first_to_the_last_tenth():
    names = [f"info/m{i}" for i in range(67)]
    figure = curves_figure(many(67), ["a", "b"], "title", panels=names)
    titles = [axes.get_title(loc="left") for axes in all_axes(figure)[1:]]
    assert titles == ["m66", "m65", "m64", "m63", "m62", "m61"] and len(titles) == MAX_PANELS
    (heading,) = figure.subfigs[1].texts
    assert heading.get_text() == "The environment's own metrics: the 6 of 67 that change most"


def test_a_metric_that_changes_in_one_setting_only_counts_and_one_without_values_does_not():
    steps = np.arange(20.0)
    flat, late = np.ones(20), np.where(steps < 18, 0.0, 1.0)
    nothing = np.full(20, np.nan)
    of = {"flat": [flat, flat], "none": [nothing, nothing], "one": [flat, late]}
    chosen = most_changed({name: [(steps, line, line, line) for line in lines] for name, lines in of.items()}, 2)
    assert chosen == ["one", "flat"]


def test_without_own_metrics_the_picture_is_the_single_panel_that_it_was():
    metrics = many(0)
    figure, same = (curves_figure(metrics, ["a", "b"], "title", **more) for more in ({}, {"panels": []}))
    assert not figure.subfigs and len(figure.axes) == 1 and tuple(figure.get_size_inches()) == (7, 4.4)
    assert figure._repr_png_() == same._repr_png_()
