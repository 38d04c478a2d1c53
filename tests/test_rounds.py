"""Searches in rounds: successive halving, and settings that Optuna's TPE proposes."""

import itertools
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna
import pytest
from search import METHODS, TASKS
from test_resume import stopped

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.networks.actor_critic import NetworkConfig, actor_critic, output
from purepg.run.experiment import train_population
from purepg.run.load import load
from purepg.run.plan import Plan, RunConfig, prepare
from purepg.run.proposals import Proposals
from purepg.run.reliability import iqm
from purepg.run.results import Results
from purepg.run.rounds import Round, after, all_steps, rounds
from purepg.run.search import Uniform, draw, rungs
from purepg.run.sweep import settings_at
from purepg.types import UsageError

pytestmark = pytest.mark.usefixtures("programs")

PPO = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, anneal_learning_rate=True)
NETWORK = NetworkConfig(hidden=(4,))
CONFIGS = {"ppo": PPO, "network": NETWORK}
SWEEP: dict[str, Any] = {"learning_rate": Uniform(1e-2, 1.0, log=True), "gamma": Uniform(0.9, 0.99)}
RUN = RunConfig(
    total_steps=128, num_seeds=2, eval_episodes=3, log_every=1, devices=1, wandb="disabled", fresh_seeds=0, seed=7
)
HALVED = replace(RUN, search=4, halve=2)  # 4 settings for 2 updates, 2 for 4, 1 for 8
PROPOSED = replace(RUN, total_steps=32, search=6, tpe=4)


def train(run: RunConfig, sweep: Any = SWEEP, algorithm: Any = ppo, config: Any = PPO) -> Results:
    return train_population(algorithm, config, actor_critic, NETWORK, run, sweep=sweep)


def plan_of(run: RunConfig, sweep: Any = SWEEP) -> Plan:
    return prepare(ppo, actor_critic, CONFIGS, run, sweep)


@pytest.fixture(scope="module")
def halved(tmp_path_factory) -> Results:
    return train(replace(HALVED, out=tmp_path_factory.mktemp("halved") / "out"))


@pytest.fixture(scope="module")
def proposed(tmp_path_factory) -> Results:
    return train(replace(PROPOSED, out=tmp_path_factory.mktemp("proposed") / "out"))


def read(results: Results, name: str) -> Any:
    assert results.out
    return json.loads((results.out / name).read_text())


def assert_same(one: Results, other: Results) -> None:
    for name in one.metrics:
        np.testing.assert_array_equal(one.metrics[name], other.metrics[name], err_msg=name)
    np.testing.assert_array_equal(one.final_return, other.final_return)
    for a, b in zip(one.summary["rounds"], other.summary["rounds"], strict=True):
        assert (a["total_steps"], a["settings"], a["iqm"].tolist()) == (
            b["total_steps"],
            b["settings"],
            b["iqm"].tolist(),
        )


def test_after_each_rung_the_best_part_of_the_settings_goes_on():
    plan = plan_of(replace(HALVED, search=7, halve=3, total_steps=16 * 9))
    returns = [3.0, np.nan, 9.0, 5.0, 9.0, 1.0, -np.inf], [2.0, 1.0, 0.0], [0.0]
    order, seen = rounds(plan), []
    todo: Round | None = next(order)
    for values in returns:
        assert todo
        seen.append((list(todo.settings), todo.total_steps, todo.goes_on))
        todo = after(order, np.array(values))
    assert todo is None
    assert seen == [(list(range(7)), 16, False), ([2, 3, 4], 48, True), ([2], 144, True)]
    assert all_steps(plan) == 2 * (7 * 16 + 3 * 32 + 1 * 96)


def test_rungs_are_halve_times_as_long_as_those_before_and_the_last_is_the_whole_run():
    assert rungs(432, 3, None, 27, 16) == [16, 48, 144, 432]
    assert rungs(1000, 4, None, 16, 16) == [62, 248, 1000]
    assert rungs(1000, 2, 300, 16, 16) == [300, 600, 1000]
    assert rungs(1000, 2, 16, 2, 16) == [16, 1000]  # one setting is left


def test_a_rung_goes_on_with_the_agents_of_the_last_and_its_schedules_span_the_whole_run(halved):
    """So a setting's first updates are those of a search without rungs, up to the rounding of another width."""
    whole = train(replace(RUN, search=4))
    assert sorted(halved.num_updates.tolist()) == [2, 2, 4, 8]
    for h, made in enumerate(halved.num_updates):
        for name in ("policy_loss", "value_loss", "entropy", "env_steps"):
            found = halved.metrics[name][h]
            np.testing.assert_allclose(
                found[:, :made], whole.metrics[name][h, :, :made], rtol=2e-3, atol=2e-5, err_msg=name
            )
            assert np.isnan(found[:, made:]).all()


def test_the_summary_holds_every_decision(halved):
    summary = read(halved, "summary.json")
    found = summary["rounds"]
    assert [x["total_steps"] for x in found] == [32, 64, 128]
    assert [len(x["settings"]) for x in found] == [4, 2, 1]
    for before, now in itertools.pairwise(found):
        rank = sorted(range(len(before["iqm"])), key=lambda i: -before["iqm"][i])
        assert now["settings"] == sorted(before["settings"][i] for i in rank[: len(now["settings"])])
    for h, entry in enumerate(summary["settings"]):
        last = next(x for x in reversed(found) if h in x["settings"])
        assert entry.get("stopped_at") == (None if last is found[-1] else last["total_steps"])
        assert entry["iqm"] == last["iqm"][last["settings"].index(h)] == iqm(np.array(entry["finals"]))
        assert entry["env_steps"] == 2 * last["total_steps"]
    rows = [line.split("|")[-2].strip() for line in str(halved).splitlines()[2:]]
    assert rows == ["", "64", "32", "32"]


def test_the_folder_gives_each_settings_agents_as_they_were_when_it_stopped(halved):
    in_memory = train(HALVED)
    assert_same(halved, in_memory)
    assert halved.out
    for h, made in enumerate(halved.num_updates):
        one, other = load(halved.out, h, 1), in_memory.agent(h, 1)
        assert one.update == other.update == made
        jax.tree.map(np.testing.assert_array_equal, one.state.learner, other.state.learner)


@pytest.mark.parametrize("at", [1, 3, 5])  # in the first rung, the second and the last
def test_a_halved_search_that_was_killed_goes_on_to_the_same_bits(halved, tmp_path, at):
    run = replace(HALVED, out=tmp_path / "out", checkpoint_every=0)
    with stopped(at):
        train(run)
    resumed = train(replace(run, resume=True))
    assert_same(resumed, halved)
    again = train(replace(run, resume=True))
    assert_same(again, halved)


def test_agents_that_are_trained_in_parts_are_the_same(halved):
    parts = train(replace(HALVED, max_parallel=6))
    for name in ("policy_loss", "entropy"):
        np.testing.assert_allclose(parts.metrics[name], halved.metrics[name], rtol=2e-3, atol=2e-5)
    assert [x["settings"] for x in parts.summary["rounds"]] == [x["settings"] for x in halved.summary["rounds"]]
    split = train(replace(HALVED, max_parallel=1))
    assert np.array_equal(split.num_updates, halved.num_updates)


def test_updates_of_varying_length_keep_to_the_budget_of_each_rung():
    config = REINFORCEConfig(num_episodes=2, max_steps=15)
    run = replace(HALVED, search=2, total_steps=240, log_every=3)
    found = train(run, {"learning_rate": Uniform(1e-3, 1e-1, log=True)}, reinforce, config)
    budgets = {h: x["total_steps"] for x in found.summary["rounds"] for h in x["settings"]}
    assert sorted(budgets.values()) == [120, 240]
    for h, budget in budgets.items():
        steps = np.nansum(found.metrics["env_steps"][h], axis=-1)
        assert ((budget - 30 < steps) & (steps <= budget)).all()


def test_proposals_are_those_of_optunas_tpe_given_the_returns():
    first = draw(CONFIGS, SWEEP, 6, 3)
    proposals = Proposals(CONFIGS, SWEEP, 3, first)
    ranges: dict[str, Any] = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-2, 1.0, log=True),
        "gamma": optuna.distributions.FloatDistribution(0.9, 0.99),
    }
    sampler = optuna.samplers.TPESampler(seed=3, n_startup_trials=6, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    trials = []
    for setting in first:
        study.enqueue_trial(setting.hyperparameters)
        trials.append(study.ask(ranges))
    assert [trial.params for trial in trials] == [setting.hyperparameters for setting in first]
    for i, (setting, trial) in enumerate(zip(first, trials, strict=True)):
        proposals.tell(setting, float(i) if i else np.nan)
        study.tell(trial, float(i) if i else None, state=None if i else optuna.trial.TrialState.FAIL)
    asked = [study.ask(ranges).params for _ in range(3)]
    np.testing.assert_allclose(proposals.ask(3), [list(params.values()) for params in asked], rtol=1e-4)


def test_tpe_proposes_better_settings_than_sobol_points_where_returns_are_smooth():
    def value(setting: Any) -> float:
        return (
            -(np.log10(setting.configs["ppo"].learning_rate / 0.1) ** 2)
            - 30 * (setting.configs["ppo"].gamma - 0.93) ** 2
        )

    better = 0
    for seed in range(5):
        first = draw(CONFIGS, SWEEP, 16, seed)
        proposals = Proposals(CONFIGS, SWEEP, seed, first)
        for setting in first:
            proposals.tell(setting, value(setting))
        later = settings_at(CONFIGS, list(SWEEP), proposals.ask(16))
        better += np.mean([value(x) for x in later]) > np.mean([value(x) for x in draw(CONFIGS, SWEEP, 32, seed)[16:]])
    assert better == 5


def test_choices_and_integers_are_proposed_as_what_they_are_and_none_twice():
    sweep = {"num_epochs": Uniform(1, 2), "hidden": [(4,), (8, 8), (16,)]}
    first = draw(CONFIGS, sweep, 2, 0)
    proposals = Proposals(CONFIGS, sweep, 0, first)
    for setting in first:
        proposals.tell(setting, 1.0)
    asked = proposals.ask(4)
    everything = {(a, b) for a in (1, 2) for b in sweep["hidden"]}
    assert {*asked} | {tuple(x.hyperparameters.values()) for x in first} == everything


def test_a_search_by_tpe_trains_sobol_points_and_then_proposals(proposed):
    plan = proposed.plan
    assert len(plan.settings) == 6 and [x["settings"] for x in proposed.summary["rounds"]] == [[0, 1, 2, 3], [4, 5]]
    first = [setting.hyperparameters for setting in draw(CONFIGS, SWEEP, 4, 7)]
    assert [setting.hyperparameters for setting in plan.settings[:4]] == first
    proposals = Proposals(CONFIGS, SWEEP, 7, plan.settings[:4])
    for setting, value in zip(plan.settings, proposed.summary["rounds"][0]["iqm"], strict=False):
        proposals.tell(setting, value)
    assert [tuple(x.hyperparameters.values()) for x in plan.settings[4:]] == proposals.ask(2)
    config = read(proposed, "config.json")
    assert len(config["settings"]) == 6 and [x["round"] for x in config["layout"]] == [0, 1]
    assert not any("stopped_at" in entry for entry in proposed.summary["settings"])
    assert np.isfinite(proposed.metrics["policy_loss"]).all() and proposed.metrics["policy_loss"].shape == (6, 2, 2)
    assert proposed.out and load(proposed.out, 5, 0).algorithm is not None


@pytest.mark.parametrize("at", [1, 2])
def test_a_search_by_tpe_that_was_killed_goes_on_to_the_same_bits(proposed, tmp_path, at):
    run = replace(PROPOSED, out=tmp_path / "out", checkpoint_every=0)
    with stopped(at):
        train(run)
    assert_same(train(replace(run, resume=True)), proposed)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tpe": 5}, r"^tpe \(5\), the settings of a round, must be less than search \(5\)$"),
        ({"tpe": 2, "search": None}, r"^tpe \(2\), the settings of a round, must be less than search \(None\)$"),
        ({"tpe": 2, "halve": 2}, r"^halve \(2\) and tpe \(2\) are different ways to search: give one of them$"),
        ({"pbt": 16, "halve": 2}, r"^halve \(2\) and pbt \(16\) are different ways to search: give one of them$"),
        ({"first_rung": 16}, r"^first_rung \(16\) needs halve, such as --halve 3$"),
        ({"halve": 1}, r"^halve \(1\) must be at least 2$"),
        (
            {"halve": 2, "total_steps": 100},
            r"^the first rung, total_steps / 2\^3 \(12\), must be at least 16, what one",
        ),
        (
            {"halve": 2, "first_rung": 128},
            r"^first_rung \(128\) must be at least 16, what one update may take, and below",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused_in_one_line(changes, said):
    with pytest.raises(UsageError, match=said) as error:
        train(replace(RUN, **{"search": 5} | changes))
    assert "\n" not in str(error.value)


def test_a_single_setting_cannot_be_halved_and_rounds_cannot_be_made_longer(halved):
    with pytest.raises(UsageError, match=r"^halve \(2\) needs several settings, as of a search or a sweep$"):
        train(replace(RUN, halve=2), {"gamma": [0.9]})
    longer = replace(HALVED, out=halved.out, resume=True, total_steps=256)
    with pytest.raises(
        UsageError, match=r"^total_steps \(256\) must be 128, to resume .*, as its rounds depend on it$"
    ):
        train(longer)


def test_the_winner_is_the_best_of_those_that_were_trained_to_the_end(halved, tmp_path: Path):
    found = train(replace(HALVED, fresh_seeds=2))
    assert found.summary["winner"]["setting"] == found.summary["rounds"][-1]["settings"][0]
    assert found.winner and found.winner.num_updates.tolist() == [8]
    assert found.winner.plan.run.halve is None


@pytest.mark.parametrize("name", list(TASKS))
def test_the_searches_that_are_compared_take_as_many_environment_steps(name, monkeypatch):
    """Their hundreds of networks differ in floats: what one gives out is traced once."""
    task, found = TASKS[name], []

    def first_output(env, network):
        if not found:
            found.append(output(env, network))
        return found[0]

    for module in "networks.actor_critic", "algorithms.off_policy":
        monkeypatch.setattr(f"purepg.{module}.output", first_output)
    algorithm, own, network, network_config, run = import_module(task.script).EXPERIMENT
    configs = {algorithm.__name__: own, "network": network_config}
    for per_field in task.per_field:
        steps = {}
        for method, searched in METHODS.items():
            sweep, how = searched(task, per_field)
            own_run = replace(run, env=name, total_steps=task.total_steps, num_seeds=2, **how)
            steps[method] = all_steps(prepare(algorithm, network, configs, own_run, sweep))
        assert max(steps.values()) < 1.05 * min(steps.values()), steps
