"""Searches: the settings that are drawn, what is refused, and the winner on fresh seeds."""

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.stats import qmc

from purepg.algorithms.ppo import PPOConfig
from purepg.networks.actor_critic import NetworkConfig
from purepg.run.search import Uniform, draw, settings_of
from purepg.run.values import parse_sweep, sweep_texts
from purepg.types import UsageError

PPO = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1)
CONFIGS: dict[str, Any] = {"ppo": PPO, "network": NetworkConfig(hidden=(4,))}
TEXTS = [
    *("learning_rate=log:1e-4..1e-2", "gamma=0.9..0.999", "num_epochs=1..8", "num_envs=log:1..64"),
    *("optimizer=adam,sgd", "hidden=4,8x8,16"),
]
SWEEP = parse_sweep(CONFIGS, TEXTS)


def drawn(sweep: Any, number: int, seed: int = 0) -> list[dict[str, Any]]:
    return [setting.hyperparameters for setting in draw(CONFIGS, sweep, number, seed)]


def test_texts_are_ranges_and_lists_of_the_fields_types_and_read_back():
    assert {
        "learning_rate": Uniform(1e-4, 1e-2, log=True),
        "gamma": Uniform(0.9, 0.999),
        "num_epochs": Uniform(1, 8),
        "num_envs": Uniform(1, 64, log=True),
        "optimizer": ["adam", "sgd"],
        "hidden": [(4,), (8, 8), (16,)],
    } == SWEEP
    assert parse_sweep(CONFIGS, sweep_texts(SWEEP)) == SWEEP


def test_the_points_are_scipys_sobol_points_scaled():
    point = qmc.Sobol(6, rng=7).random_base2(6)
    settings = drawn(SWEEP, 50, seed=7)
    assert len(settings) == 50
    for (a, b, c, d, e, f), setting in zip(point, settings, strict=False):
        assert setting["learning_rate"] == pytest.approx(1e-4 * 100**a, rel=1e-4)
        assert setting["gamma"] == pytest.approx(0.9 + 0.099 * b, rel=1e-4)
        assert setting["num_epochs"] == 1 + math.floor(8 * c)
        assert setting["num_envs"] == math.floor(65**d)
        assert setting["optimizer"] == ["adam", "sgd"][int(2 * e)]
        assert setting["hidden"] == [(4,), (8, 8), (16,)][int(3 * f)]


def test_a_logarithmic_range_is_uniform_in_the_logarithm_and_all_values_are_equally_likely():
    """Sobol points fill every octave of a unit interval evenly: of 256, each of 8 equal parts has exactly 32."""
    settings = drawn({name: SWEEP[name] for name in ("learning_rate", "gamma", "num_epochs", "optimizer")}, 256)
    column = {name: [setting[name] for setting in settings] for name in settings[0]}
    parts, _ = np.histogram(np.log10(column["learning_rate"]), np.linspace(-4, -2, 9))
    assert parts.tolist() == [32] * 8
    assert np.histogram(column["gamma"], np.linspace(0.9, 0.999, 9))[0].tolist() == [32] * 8
    assert np.bincount(column["num_epochs"]).tolist() == [0] + [32] * 8
    assert column["optimizer"].count("sgd") == 128
    rank = stats.rankdata([column["learning_rate"], column["gamma"], column["num_epochs"]], axis=1)
    rho = np.corrcoef(rank)
    assert np.abs(rho - np.eye(3)).max() < 0.05


@pytest.mark.parametrize("range_", [Uniform(0.1, 0.3), Uniform(1e-7, 1.0, log=True), Uniform(0.99999991, 0.99999992)])
def test_values_lie_in_their_range_whatever_the_rounding(range_):
    values = [range_.at(u, whole=False) for u in (0.0, 1e-12, 0.5, 1 - 2**-53)]
    assert all(range_.low <= x <= range_.high for x in values)
    assert values[0] == range_.low and sorted(values) == values


@pytest.mark.parametrize("range_", [Uniform(1, 5), Uniform(1, 5, log=True)])
def test_integers_include_both_ends(range_):
    values = [range_.at(u, whole=True) for u in np.linspace(0, 1, 1000, endpoint=False)]
    assert sorted(set(values)) == [1, 2, 3, 4, 5] and all(isinstance(x, int) for x in values)
    share = np.bincount(values)[1:] / 1000
    expected = np.log(np.arange(2, 7) / np.arange(1, 6)) / np.log(6) if range_.log else np.full(5, 0.2)
    np.testing.assert_allclose(share, expected, atol=2e-3)


def test_settings_are_distinct_reproducible_and_begin_alike_whatever_their_number():
    finite = parse_sweep(CONFIGS, ["num_epochs=1..4", "optimizer=adam,sgd"])
    assert len({tuple(setting.values()) for setting in drawn(finite, 8)}) == 8
    assert drawn(SWEEP, 12, seed=3) == drawn(SWEEP, 40, seed=3)[:12]
    assert drawn(SWEEP, 12, seed=3) != drawn(SWEEP, 12, seed=4)


@pytest.mark.parametrize(
    "texts, said",
    [
        (["gamma=0.9..1.2"], "sweep gamma (0.9..1.2): gamma (1.2) must be in [0, 1]"),
        (["gamma=0.99..0.9"], "the range 0.99..0.9 must have a low end below its high end"),
        (["learning_rate=log:0..1e-2"], "the range log:0.0..0.01 must have a low end above 0"),
        (["learning_rate=log:1e-4,1e-2"], "('log:1e-4,1e-2') must be LOW..HIGH or log:LOW..HIGH"),
        (["learning_rate=1e-4.."], "('1e-4..') must be LOW..HIGH or log:LOW..HIGH"),
        (["learning_rate=ln:1e-4..1"], "--sweep learning_rate ('ln:1e-4') must be a number"),
        (["num_epochs=1..8.5"], "--sweep num_epochs ('8.5') must be an integer"),
        (["num_epochs=0..8"], "sweep num_epochs (0..8): num_epochs (0) must be at least 1"),
        (["optimizer=adam..sgd"], "--sweep optimizer ('adam..sgd') must be"),
        (["normalize_obs=0..1"], "--sweep normalize_obs ('0..1') must be true or false"),
        (["num_epochs=1..4", "optimizer=adam,sgd"], "search (9) must be at most 8, the number of settings that differ"),
        ([], "search (9) needs a sweep, such as --sweep learning_rate=log:1e-4..1e-2"),
    ],
)
def test_bad_ranges_are_refused_in_one_line(texts, said):
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        draw(CONFIGS, parse_sweep(CONFIGS, texts), 9, 0)
    assert "\n" not in str(error.value)


def test_a_range_without_a_search_is_refused():
    with pytest.raises(UsageError, match=r"^sweep gamma \(0.9..0.999\) is a range: say by --search how many"):
        settings_of(CONFIGS, {"gamma": Uniform(0.9, 0.999)}, None, 0)
    with pytest.raises(UsageError, match=r"^sweep hidden \(1..2\) must be a list of values"):
        settings_of(CONFIGS, {"hidden": Uniform(1, 2)}, 4, 0)
    with pytest.raises(UsageError, match=r"^sweep gamma \(0.9\) must be a range or a list of values"):
        settings_of(CONFIGS, {"gamma": 0.9}, 4, 0)  # pyright: ignore[reportArgumentType]
