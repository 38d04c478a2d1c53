"""The best setting of a search on fresh seeds: what is reported, how it is repeated, and when it is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fake_wandb import FakeWandb

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.arguments import arguments
from purepg.run.cli import main
from purepg.run.experiment import train_population
from purepg.run.plan import RunConfig
from purepg.run.reliability import bootstrap_interval, iqm
from purepg.run.results import Results
from purepg.run.search import Uniform
from purepg.run.winner import fresh_seed, num_fresh_seeds
from purepg.types import UsageError

pytestmark = pytest.mark.usefixtures("programs")

PPO = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, anneal_learning_rate=True)
NETWORK = NetworkConfig(hidden=(4,))
RUN = RunConfig(
    "CartPole-v1", 64, 2, search=4, fresh_seeds=3, eval_episodes=3, log_every=2, devices=1, wandb="disabled", seed=7
)
SWEEP = {"learning_rate": Uniform(1e-2, 1.0, log=True), "gamma": Uniform(0.9, 0.99)}


def train(run: RunConfig = RUN, sweep: Any = SWEEP) -> Results:
    return train_population(ppo, PPO, actor_critic, NETWORK, run, sweep=sweep)


def repeat(*flags: str) -> None:
    """Runs a script, with defaults of its own, from a file."""
    with pytest.raises(SystemExit) as exit_:
        main(ppo, PPOConfig(), actor_critic, NetworkConfig(), RunConfig(), arguments=flags)
    assert exit_.value.code == 0


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search in a folder, with W&B."""
    with pytest.MonkeyPatch.context() as patch:
        wandb = FakeWandb(patch)
        results = train(replace(RUN, out=tmp_path_factory.mktemp("search") / "out", wandb="offline"))
    return results, wandb


@pytest.fixture(scope="module")
def results(found) -> Results:
    return found[0]


def winner_of(results: Results) -> Results:
    assert results.winner
    return results.winner


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_same_metrics(a: Path, b: Path) -> None:
    with np.load(a / "metrics.npz") as one, np.load(b / "metrics.npz") as other:
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_the_winner_has_the_highest_iqm_and_its_numbers_are_those_of_fresh_seeds_alone(results):
    winner, settings = results.summary["winner"], results.summary["settings"]
    assert winner["setting"] == int(np.argmax([x["iqm"] for x in settings]))
    assert winner["hyperparameters"] == settings[winner["setting"]]["hyperparameters"]
    finals = winner_of(results).final_return
    assert finals.shape == (1, 3) and winner["finals"] == finals[0].tolist()
    assert winner["iqm"] == iqm(finals[0]) and winner["interval"] == list(bootstrap_interval(finals[0]))
    assert winner["in_search"] == {name: settings[winner["setting"]][name] for name in winner["in_search"]}
    assert not set(winner["finals"]) & set(winner["in_search"]["finals"])
    assert read(results.out / "summary.json") == json.loads(json.dumps(results.summary))


def test_fresh_seeds_share_no_random_numbers_with_those_of_the_search(results):
    def keys(run: RunConfig) -> set[tuple[int, ...]]:
        agents = [jax.random.fold_in(jax.random.key(run.seed), s) for s in range(run.num_seeds)]
        return {tuple(jax.random.key_data(key).tolist()) for key in (*agents, jax.random.key(run.eval_seed))}

    search, winner = results.plan.run, winner_of(results).plan.run
    assert len(keys(search) | keys(winner)) == 2 + 3 + 2 and search.seed == 7
    assert winner.seed == 7 + 2**31 and fresh_seed(fresh_seed(7)) == 7 and fresh_seed(2**32 - 1) == 2**31 - 1
    for update in range(2):
        losses = [x.metrics["policy_loss"][..., update].ravel() for x in (results, winner_of(results))]
        assert not set(losses[0]) & set(losses[1])


def test_best_json_repeats_the_winner_bit_for_bit(results, tmp_path):
    repeat("--config", str(results.out / "best.json"), "--out", str(tmp_path / "again"))
    assert_same_metrics(tmp_path / "again", results.out / "winner")
    (setting,) = read(tmp_path / "again" / "summary.json")["settings"]
    assert setting["finals"] == results.summary["winner"]["finals"]
    by_python = arguments(results.out / "best.json")
    assert by_python["config"] == replace(PPO, **results.summary["winner"]["hyperparameters"])


def test_the_folder_repeats_the_search_and_its_winner_bit_for_bit(results, tmp_path):
    repeat("--config", str(results.out), "--out", str(tmp_path / "again"), "--wandb", "disabled")
    assert_same_metrics(tmp_path / "again", results.out)
    assert_same_metrics(tmp_path / "again" / "winner", results.out / "winner")
    again = read(tmp_path / "again" / "summary.json")
    assert again["winner"]["finals"] == results.summary["winner"]["finals"]


def test_a_search_is_one_group_of_wandb_with_its_settings_as_config(found):
    results, wandb = found
    assert {run.options["group"] for run in wandb.opened} == {"out"} and len(wandb.opened) == 4 * 2 + 3
    of_search = wandb.opened[:8]
    drawn = [(x["learning_rate"], x["gamma"]) for x in read(results.out / "config.json")["settings"]]
    assert [(run.config["learning_rate"], run.config["gamma"]) for run in of_search] == [x for x in drawn for _ in "ab"]
    assert all(run.config["ppo"]["gamma"] == run.config["gamma"] for run in of_search)
    assert [run.summary["final"] for run in of_search] == results.final_return.ravel().tolist()
    assert {run.config["run"]["seed"] for run in wandb.opened[8:]} == {7 + 2**31}


def test_a_resumed_search_is_one_that_never_stopped_and_so_is_its_winner(tmp_path):
    """Its schedules keep their length, so both have the longer one."""
    config = replace(PPO, anneal_updates=4)
    short, long = (replace(RUN, total_steps=steps, out=tmp_path / "out") for steps in (32, 64))
    train_population(ppo, config, actor_critic, NETWORK, short, sweep=SWEEP)
    resumed = train_population(ppo, config, actor_critic, NETWORK, replace(long, resume=True), sweep=SWEEP)
    whole = train_population(ppo, config, actor_critic, NETWORK, replace(long, out=None), sweep=SWEEP)
    assert whole.out is None and winner_of(whole).out is None
    for a, b in (resumed, whole), (winner_of(resumed), winner_of(whole)):
        np.testing.assert_array_equal(a.final_return, b.final_return)
        np.testing.assert_array_equal(a.metrics["policy_loss"], b.metrics["policy_loss"])
    done = resumed.out
    assert done and read(done / "summary.json")["winner"]["finals"] == whole.summary["winner"]["finals"]
    kept = replace(PPO, anneal_updates=4, **resumed.summary["winner"]["hyperparameters"])
    assert arguments(done / "best.json")["config"] == kept

    train(replace(RUN, search=None, fresh_seeds=None, out=done, overwrite=True), {"gamma": [0.9, 0.92, 0.95, 0.99]})
    left = {path.name for path in done.iterdir()}
    assert left == {"config.json", "log.jsonl", "metrics.npz", "summary.json", "curves.png", "checkpoints"}


def test_a_winner_whose_folder_cannot_be_written_is_said_and_the_search_is_kept(results, tmp_path):
    (tmp_path / "winner").write_text("mine")
    found = train(replace(RUN, out=tmp_path))
    assert found.winner is None and "winner" not in found.summary
    (line,) = found.lost
    assert line.startswith(f"cannot write a run to {tmp_path / 'winner'}")
    np.testing.assert_array_equal(found.final_return, results.final_return)


def test_the_printed_table_has_the_winner_beside_its_value_in_the_search(results):
    header, _, row = str(results).splitlines()[-3:]
    assert header.split("|")[1].strip() == "winner on 3 fresh seeds"
    label, fresh, _, chosen = (cell.strip() for cell in row.strip("| ").split("|"))
    assert label == results.labels[results.summary["winner"]["setting"]]
    assert [float(cell.split()[0]) for cell in (fresh, chosen)] == pytest.approx(
        [results.summary["winner"]["iqm"], results.summary["winner"]["in_search"]["iqm"]], abs=0.051
    )


def test_a_search_has_at_least_ten_fresh_seeds_and_a_grid_only_those_that_it_asks_for():
    search = RunConfig(search=8)
    assert [num_fresh_seeds(replace(search, num_seeds=n)) for n in (1, 3, 4, 10, 16)] == [10, 12, 12, 10, 16]
    assert num_fresh_seeds(RunConfig(num_seeds=4)) == 0 == num_fresh_seeds(replace(search, fresh_seeds=0))
    grid = replace(RUN, search=None, fresh_seeds=3)
    rates = {"learning_rate": [1e-2, 1e-1], "gamma": [0.9, 0.99]}
    assert winner_of(train(grid, rates)).final_return.shape == (1, 3)
    with pytest.raises(UsageError, match=r"^fresh_seeds \(3\) needs several settings, as of a search or a sweep$"):
        train(grid, {"gamma": [0.9]})
