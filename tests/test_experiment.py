"""`train_population`: what it returns, what it leaves on disk, and environments of the caller's own."""

import inspect
import re
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import xarray
from helpers import quick_jit
from matplotlib.figure import Figure

import purepg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.envs import make as make_env
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.experiment import train_population
from purepg.run.load import load
from purepg.run.plan import RunConfig, prepare
from purepg.run.results import Results, column
from purepg.types import UsageError

SHORT = make_env("CartPole-v1", {"max_steps_in_episode": 20})  # at the top level: it can be found again
CONFIG = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, learning_rate=1e-2)
NETWORK = NetworkConfig(hidden=(4,))
RUN = RunConfig(total_steps=64, num_seeds=3, log_every=2, eval_episodes=4, devices=1, wandb="disabled")
SWEEP: dict[str, Any] = {"gamma": [0.9, 0.99]}


def train(run: RunConfig = RUN, env: Any = SHORT, sweep: Any = None) -> Results:
    return train_population(ppo, CONFIG, actor_critic, NETWORK, run, env=env, sweep=sweep)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A sweep of two settings and three seeds, without a folder."""
    with pytest.MonkeyPatch.context() as patch:
        empty = tmp_path_factory.mktemp("empty")
        patch.chdir(empty)
        found = train(sweep=SWEEP)
        assert not list(empty.iterdir())  # no file was asked for
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The same sweep in a folder."""
    return train(replace(RUN, out=tmp_path_factory.mktemp("kept") / "out"), sweep=SWEEP)


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_package_names_its_verb():
    assert purepg.train_population is train_population and purepg.load is load and purepg.RunConfig is RunConfig


def test_every_agent_has_a_final_return_and_a_metric_for_every_update(found):
    assert found.metrics["policy_loss"].shape == (2, 3, 4) and np.isfinite(found.metrics["policy_loss"]).all()
    assert found.final_return.shape == found.final_return_of_mode.shape == (2, 3)
    assert ((found.final_return >= 1) & (found.final_return <= 20)).all()
    assert found.summary["settings"][1]["finals"] == found.final_return[1].tolist()
    assert not found.interrupted and found.out is None and found.lost == []


def test_printed_results_are_a_row_for_each_setting(found):
    rows = [line for line in str(found).splitlines() if line.startswith("| gamma=")]
    assert [row.split("|")[1].strip() for row in rows] == list(found.labels)


def test_an_xarray_dataset_has_named_axes_and_the_swept_fields_as_coordinates(found):
    dataset = found.dataset()
    assert dict(dataset.sizes) == {"setting": 2, "seed": 3, "update": 4}
    np.testing.assert_array_equal(dataset.entropy.sel(setting=1, seed=2), found.metrics["entropy"][1, 2])
    np.testing.assert_array_equal(dataset.final_return, found.final_return)
    np.testing.assert_array_equal(dataset.gamma, [0.9, 0.99])
    assert column([(4,), None]).tolist() == [(4,), None]  # swept values that are no numbers
    np.testing.assert_array_equal(dataset.total_env_steps[0, 0], [16, 32, 48, 64])
    best = dataset.swap_dims(setting="gamma").final_return.sel(gamma=0.99)
    assert isinstance(best, xarray.DataArray) and best.values.tolist() == found.final_return[1].tolist()


def test_a_frame_has_a_row_for_every_update_that_was_made(found):
    frame = found.frame()
    assert list(frame.columns[:5]) == ["setting", "gamma", "seed", "update", "total_env_steps"]
    assert len(frame) == 2 * 3 * 4
    row = frame[(frame.setting == 1) & (frame.seed == 1) & (frame["update"] == 2)].iloc[0]
    assert (row.gamma, row.total_env_steps) == (0.99, 48)
    assert row.value_loss == found.metrics["value_loss"][1, 1, 2]


def test_a_frame_leaves_out_the_updates_that_an_agent_did_not_make():
    config = REINFORCEConfig(num_episodes=2, max_steps=15)
    run = replace(RUN, total_steps=200)
    results = train_population(reinforce, config, actor_critic, NETWORK, run, env=SHORT)
    made = (results.metrics["env_steps"] > 0).sum(-1)
    assert len(np.unique(made)) > 1  # else nothing would be left out
    frame = results.frame()
    assert frame.groupby("seed").size().tolist() == made[0].tolist()
    assert frame.notna().all(axis=None)


def test_a_folder_changes_no_number_and_holds_the_same_agents(found, kept):
    for name in found.metrics:
        np.testing.assert_array_equal(kept.metrics[name], found.metrics[name], err_msg=name)
    with np.load(kept.out / "metrics.npz") as metrics:
        for name in kept.metrics:
            np.testing.assert_array_equal(metrics[name], kept.metrics[name], err_msg=name)
    one, other = found.agent(1, 2), kept.agent(1, 2)
    assert one.name == other.name == "gamma=0.99, seed 2" and one.update == other.update == 4
    assert_same(one.state, other.state)
    best = found.agent(best=True)
    assert found.final_return[best.setting, best.seed] == found.final_return.max()


@pytest.fixture(scope="module")
def longer():
    """A run of more updates."""
    return train(replace(RUN, total_steps=96), sweep=SWEEP)


def test_an_agents_algorithm_goes_on_from_its_state(found, longer):
    """The fifth update of a run that was given six is that of an agent of a run that was given four."""
    agent = found.agent(1, 1)
    k_train = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))[1]
    _, metrics = quick_jit(agent.algorithm.step)(jax.random.fold_in(k_train, 4), agent.state, jax.numpy.int32(4))
    np.testing.assert_allclose(metrics["entropy"], longer.metrics["entropy"][1, 1, 4], rtol=1e-5)


def test_an_environment_of_ones_own_is_found_again_by_its_name_in_a_module(kept):
    agent = load(kept.out, 0, 0)
    assert agent.env is SHORT and agent.env.max_episode_steps == 20


def test_one_that_is_in_no_module_can_be_passed_and_that_is_said(longer, tmp_path, capsys):
    def own() -> Any:
        return make_env("CartPole-v1", {"max_steps_in_episode": 20})

    env, out = own(), tmp_path / "out"
    assert train(replace(RUN, out=out), env=env, sweep=SWEEP).metrics["env_steps"].shape[-1] == 4
    (line,) = {line for line in capsys.readouterr().err.splitlines() if "Env object" in line}
    assert line.startswith("CartPole-v1: no variable at the top level") and "load(folder, env=env)" in line
    resumed = train(replace(RUN, total_steps=96, out=out, resume=True), env=env, sweep=SWEEP)
    for name in longer.metrics:
        np.testing.assert_array_equal(resumed.metrics[name], longer.metrics[name], err_msg=name)
    with pytest.raises(UsageError, match=r"^CartPole-v1 was an Env object that cannot be made again: pass it"):
        load(out, 0, 0)
    assert_same(load(out, 1, 2, env=env).state.learner, resumed.agent(1, 2).state.learner)
    with pytest.raises(UsageError, match=r"another configuration: spaces \(was .* 20, is .* 500\)"):
        train(replace(RUN, total_steps=96, out=out, resume=True), env=None, sweep=SWEEP)


def test_a_function_that_makes_the_environment_is_called_again(tmp_path):
    found = train(replace(RUN, out=tmp_path / "out"), env=make_short, sweep=SWEEP)
    assert found.agent(0, 0).env.max_episode_steps == 20
    assert load(tmp_path / "out", 0, 0).env.max_episode_steps == 20


def make_short():
    return make_env("CartPole-v1", {"max_steps_in_episode": 20})


def test_curves_are_a_figure_of_any_metric(found):
    figure = found.plot("entropy")
    assert isinstance(figure, Figure) and figure.axes[0].get_ylabel() == "entropy"
    with pytest.raises(UsageError, match=r"^there is no metric 'entrop'; the run has .*entropy"):
        found.plot("entrop")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"run": replace(RUN, wandb="online")}, r"wandb \(online\) needs out"),
        ({"run": replace(RUN, resume=True)}, r"--resume needs --out"),
        ({"sweep": {"gama": [1.0]}}, r"cannot sweep 'gama'"),
        ({"sweep": {"gamma": 0.9}}, r"sweep gamma \(0.9\) must be a list of values"),
        ({"sweep": {"gamma": []}}, r"sweep gamma \(\[\]\) must be a list of values"),
        ({"env": "CartPol-v1"}, r"unknown environment 'CartPol-v1'; did you mean CartPole-v1\?"),
        ({"run": replace(RUN, num_seeds=0)}, r"num_seeds \(0\) must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, said):
    with pytest.raises(UsageError, match=said) as error:
        train(**options)
    assert "\n" not in str(error.value)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(UsageError, match=r"^ppo takes a PPOConfig, not a REINFORCEConfig$"):
        train_population(ppo, REINFORCEConfig(), actor_critic, NETWORK, RUN)
    with pytest.raises(UsageError, match=r"^actor_critic takes a NetworkConfig, not a dict$"):
        train_population(ppo, CONFIG, actor_critic, {"hidden": (4,)}, RUN)


def test_a_copy_of_an_algorithms_file_takes_the_original_config(monkeypatch):
    copy: Any = ModuleType("my_ppo")
    monkeypatch.setitem(sys.modules, "my_ppo", copy)
    exec(inspect.getsource(sys.modules[ppo.__module__]), vars(copy))
    assert copy.PPOConfig is not PPOConfig
    plan = prepare(copy.ppo, actor_critic, {"ppo": CONFIG, "network": NETWORK}, RUN, {}, SHORT)
    assert plan.programs[0].num_updates == 4


@pytest.mark.parametrize("which, said", [({}, "2 settings of 3 seeds"), ({"setting": 2, "seed": 0}, r"setting \(2\)")])
def test_an_agent_that_is_not_named_or_not_there_is_refused(found, which, said):
    with pytest.raises(UsageError, match=said):
        found.agent(**which)


def test_without_xarray_or_pandas_the_remedy_is_said(found, monkeypatch):
    for package, method in ("xarray", found.dataset), ("pandas", found.frame):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(UsageError, match=re.escape(f"() needs {package}: pip install")):
            method()
