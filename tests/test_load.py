"""Out of a saved population, the agent that was asked for: its own parameters, and it acts as it did, from memory."""

import functools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run import evaluation
from purepg.run.code import address_of, at_address
from purepg.run.launch import launch
from purepg.run.load import load
from purepg.run.plan import RunConfig, prepare
from purepg.run.population import Population
from purepg.train import evaluate
from purepg.types import UsageError

NUM_SEEDS = 4
LABELS = ["hidden=(4,),gamma=0.9", "hidden=(4,),gamma=0.99", "hidden=(8,),gamma=0.9", "hidden=(8,),gamma=0.99"]
CONFIGS = {
    "ppo": PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, learning_rate=0.05, normalize_obs=True),
    "network": NetworkConfig(memory="gru", memory_size=3),
}
RUN = RunConfig(
    total_steps=32,
    num_seeds=NUM_SEEDS,
    eval_episodes=4,
    eval_max_steps=30,
    max_parallel=2,
    devices=1,
    wandb="disabled",
)


def at(state: Any, place: tuple[int, int]) -> Any:
    return jax.device_get(jax.tree.map(lambda x: x[place], state))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two programs, settings and seeds in eight chunks: its folder, and each member's last state."""
    out = tmp_path_factory.mktemp("load") / "out"
    states: dict[tuple[float, float, int], Any] = {}
    final = Population.final

    def note(self, members, state):
        hyper, seeds = members
        (gamma,) = hyper["ppo"]["gamma"].tolist()
        params = jax.tree_util.tree_leaves_with_path(state.learner.params)
        width = next(x.shape[-1] for path, x in params if "hidden_0" in jax.tree_util.keystr(path))
        states.update({(width, round(gamma, 2), int(s)): at(state, (0, i)) for i, s in enumerate(seeds)})
        return final(self, members, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Population, "final", note)
        sweep = {"hidden": [(4,), (8,)], "gamma": [0.9, 0.99]}
        launch(prepare(ppo, actor_critic, CONFIGS, replace(RUN, out=out), sweep), "script")
    assert len(states) == 4 * NUM_SEEDS
    return out, states


def finals(out: Path) -> np.ndarray:
    return np.array([setting["finals"] for setting in json.loads((out / "summary.json").read_text())["settings"]])


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_each_member_is_loaded_as_its_own_last_state(run):
    """Of the two agents of each of the eight chunks, the first or the second."""
    out, states = run
    for h, (width, gamma) in enumerate([(4, 0.9), (4, 0.99), (8, 0.9), (8, 0.99)]):
        for s in (h % 2, 3 - h % 2):
            agent = load(out, setting=h, seed=s)
            assert (agent.setting, agent.seed, agent.label, agent.update) == (h, s, LABELS[h], 2)
            assert_same(agent.state, states[width, gamma, s])
    params = [jax.tree.leaves(state.learner.params)[0].tobytes() for state in states.values()]
    assert len(set(params)) == len(params)  # no two of them are the same


@pytest.mark.parametrize("setting, seed", [(1, 2), (2, 0)])
def test_a_loaded_agent_acts_as_the_run_evaluated_it(run, setting, seed):
    out, _ = run
    agent = load(out, setting=setting, seed=seed)
    key = jax.random.fold_in(jax.random.key(RUN.eval_seed), 2**31 - 1)  # the run's evaluation
    summary = json.loads((out / "summary.json").read_text())["settings"][setting]
    for deterministic, found in (False, summary["finals"]), (True, summary["mode"]["finals"]):
        act = agent.algorithm.policy(agent.state, deterministic)
        stats = jax.jit(lambda key, act=act: evaluate(key, agent.env, act, 4, 30))(key)
        assert stats.episode_return.mean() == found[seed]


def test_the_best_has_the_highest_final_of_those_that_are_left(run):
    out, _ = run
    scores = finals(out)
    best = load(out, best=True)
    assert scores[best.setting, best.seed] == scores.max()
    for h in range(4):
        agent = load(out, setting=h, best=True)
        assert agent.setting == h and agent.seed == scores[h].argmax()
    agent = load(out, seed=1, best=True)
    assert agent.seed == 1 and agent.setting == scores[:, 1].argmax()


def test_the_best_is_looked_for_among_finite_scores(run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    summary = json.loads((out / "summary.json").read_text())
    for h, setting in enumerate(summary["settings"]):
        setting["finals"] = [None, float(h == 2), None, None]
    (out / "summary.json").write_text(json.dumps(summary))
    agent = load(out, best=True)
    assert (agent.setting, agent.seed) == (2, 1)
    with pytest.raises(UsageError, match="has evaluated no such agent"):
        load(out, seed=0, best=True)


@pytest.mark.parametrize(
    "which, said",
    [
        ({}, "holds 4 settings of 4 seeds: name one, or ask for the best"),
        ({"setting": 1}, "name one, or ask for the best"),
        ({"seed": 1}, "name one, or ask for the best"),
        ({"setting": 4, "seed": 0}, r"setting \(4\) must be from 0 to 3"),
        ({"setting": 0, "seed": -1}, r"seed \(-1\) must be from 0 to 3"),
    ],
)
def test_an_agent_that_is_not_there_or_not_named_is_refused(run, which, said):
    with pytest.raises(UsageError, match=said):
        load(run[0], **which)


def no_checkpoint(out):
    shutil.rmtree(out / "checkpoints" / "1")


def no_summary(out):
    (out / "summary.json").unlink()


def no_config(out):
    (out / "config.json").unlink()


def moved_algorithm(out):
    path = out / "config.json"
    path.write_text(path.read_text().replace("purepg.algorithms.ppo:ppo", "purepg.algorithms.ppo:pop"))


@pytest.mark.parametrize(
    "spoil, which, said",
    [
        (no_checkpoint, {"setting": 0, "seed": 2}, "holds no checkpoint of setting 0, seed 2"),
        (no_summary, {"best": True}, r"has no summary\.json: its run has not finished"),
        (no_config, {"best": True}, r"has no config\.json"),
        (moved_algorithm, {"setting": 0, "seed": 2}, r"cannot find purepg\.algorithms\.ppo:pop"),
    ],
)
def test_what_a_folder_lacks_is_said_and_nothing_is_written(run, tmp_path, spoil, which, said):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    spoil(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UsageError, match=said) as error:
        load(out, **which)
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_function_is_found_again_in_its_module_or_in_the_script_that_was_run(tmp_path, monkeypatch):
    assert address_of(ppo) == "purepg.algorithms.ppo:ppo"
    assert at_address("purepg.algorithms.ppo:ppo") is ppo
    script = tmp_path / "my_script.py"
    script.write_text("def my_algorithm(x):\n    return x + 1\n")
    found = at_address(f"{script}:my_algorithm")
    assert found(1) == 2
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    found.__module__ = "__main__"
    assert address_of(found) == f"{script}:my_algorithm"


def test_a_partial_function_may_train_but_is_refused_once_it_is_looked_for():
    for value in functools.partial(ppo), lambda: None:
        with pytest.raises(UsageError, match=r"cannot find .*, which the run was made with"):
            at_address(address_of(value))


def evaluated(capsys, *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *arguments])
        evaluation.main()
    return capsys.readouterr().out


def test_the_evaluation_script_says_what_episodes_came_to(run, capsys):
    out, _ = run
    flags = (str(out), "--setting", "1", "--seed", "2", "--episodes", "50")
    lines = evaluated(capsys, *flags).splitlines()
    assert lines[0] == f"{out}: {LABELS[1]}, seed 2, after 2 updates, on CartPole-v1"
    assert lines[1].startswith("return ") and lines[1].endswith(", 50 episodes")
    assert evaluated(capsys, *flags).splitlines() == lines  # its seed is fixed
    assert evaluated(capsys, *flags, "--eval-seed", "3").splitlines()[1] != lines[1]
    cut = evaluated(capsys, *flags, "--max-steps", "5").splitlines()
    assert cut[1].startswith("return 5.00 +- 0.00") and cut[2] == "length 5.0; 0.0% terminated, 100.0% truncated"


def test_the_evaluation_script_refuses_in_one_line(run, capsys):
    for arguments, said in (
        (["nowhere"], "nowhere does not exist"),
        ([str(run[0]), "--best", "--setting", "9"], "setting (9)"),
    ):
        with pytest.raises(SystemExit) as exit_:
            evaluated(capsys, *arguments)
        assert exit_.value.code == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
