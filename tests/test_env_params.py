"""`env_params`: parameters of the environment by text, in a run, in what is made of its folder, and after a resume."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EMPTY_CONFIG
from parts.compare import gather
from results import rows_of

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.envs import make
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import main
from purepg.run.environment import named_env, parsed
from purepg.run.experiment import train_population
from purepg.run.load import load
from purepg.run.plan import RunConfig
from purepg.types import UsageError

CONFIG = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1)
NETWORK = NetworkConfig(hidden=(4,))
SHORT = ("max_steps_in_episode=7", "gravity=5.5")
RUN = RunConfig(
    env_params=SHORT, total_steps=32, num_seeds=2, log_every=2, eval_episodes=4, devices=1, wandb="disabled"
)


def train(run: RunConfig, env: Any = None):
    return train_population(ppo, CONFIG, actor_critic, NETWORK, run, env=env)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The folder of a run on a short CartPole."""
    out = tmp_path_factory.mktemp("kept") / "out"
    train(replace(RUN, out=out))
    return out


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("UmbrellaChain-bsuite", "chain_length=0", r"^Umb.* cannot be made with env_params .*: ZeroDivisionError"),
        ("Catch-bsuite", "rows=0", r"^Catch-bsuite cannot be made with env_params rows=0: IndexError"),
        ("DeepSea-bsuite", "size=2.5", r"^DeepSea-bsuite does not take these parameters: .*2.5"),
        (
            "CartPole-v1",
            "observd=0",
            r"^CartPole-v1 has no .* 'observd'; it has .*; did you mean observed\?$",
        ),
        ("DeepSea-bsuite", "sise=3", r"^DeepSea-bsuite has no parameter 'sise'; it has .*size"),
    ],
)
def test_what_a_constructor_does_not_take_is_said_as_it_is(name, text, said):
    with pytest.raises(UsageError, match=said):
        named_env(name, [text])


def test_values_are_read_as_numbers_truths_or_none_and_else_are_text():
    texts = ("a=3", "b=-2.5", "c=1e3", "d=true", "e=False", "f=none", "g=Fast", "h=x=y")
    values = {"a": 3, "b": -2.5, "c": 1000.0, "d": True, "e": False, "f": None, "g": "Fast", "h": "x=y"}
    assert parsed(texts) == values
    assert [type(value) for value in parsed(texts).values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    "texts, said",
    [
        (["gravity"], r"^env_params \('gravity'\) must be KEY=VALUE, as in gravity=9.0$"),
        (["=9"], r"^env_params \('=9'\) must be KEY=VALUE"),
        (["gravity="], r"^env_params \('gravity='\) must be KEY=VALUE"),
        (["observed=0,2,action_repeat=2"], "holds more than one KEY=VALUE: separate entries by spaces"),
        (["g=1", "m=2", "g=3"], r"^env_params names g twice: keep one of g=1 and g=3$"),
        (["gravty=9"], r"^CartPole-v1 has no parameter 'gravty'; it has .*gravity"),
        (["max_steps_in_episode=-3"], r"^CartPole-v1's max_steps_in_episode \(-3\) must be a positive whole number$"),
        (["max_steps_in_episode=2.5"], r"^CartPole-v1's max_steps_in_episode \(2.5\) must be a positive whole number$"),
        (
            [f"max_steps_in_episode={2**31}"],
            r"^CartPole-v1's max_steps_in_episode \(2147483648\) must be at most 21474",
        ),
        ([f"max_episode_steps={2**31}"], r"^max_episode_steps \(2147483648\) must be at most 2147483647$"),
        (["gravity=none"], r"^CartPole-v1 cannot be made with env_params gravity=none: TypeError"),
    ],
)
def test_what_is_no_parameter_is_refused_in_one_line(texts, said):
    with pytest.raises(UsageError, match=said) as error:
        named_env("CartPole-v1", texts)
    assert "\n" not in str(error.value)


def test_an_environment_of_the_callers_own_takes_no_env_params():
    for env in (make("CartPole-v1"), lambda: make("CartPole-v1")):
        with pytest.raises(UsageError, match=r"^env_params \(max_steps_in_episode=7 gravity=5.5\) are for an env"):
            train(RUN, env)


def test_a_run_and_its_loaded_agent_are_in_the_environment_with_these_parameters(kept):
    assert json.loads((kept / "config.json").read_text())["run"]["env_params"] == list(SHORT)
    assert load(kept, seed=0).env.max_episode_steps == 7
    with np.load(kept / "metrics.npz") as metrics:
        assert np.nanmax(metrics["episode_length"]) <= 7


def test_a_named_environment_in_place_of_the_runs_takes_the_parameters_too():
    assert train(replace(RUN, env="Acrobot-v1", env_params=SHORT[:1]), "CartPole-v1").agent(0, 1).env.name == (
        "CartPole-v1"
    )


def test_a_resume_with_other_parameters_is_refused(kept):
    said = r"env_params \(was \['max_steps_in_episode=7', 'gravity=5.5'\], is \['gravity=5.5'\]\); use the same flags"
    with pytest.raises(UsageError, match=said):
        train(replace(RUN, env_params=SHORT[1:], out=kept, resume=True))


def test_a_run_saved_before_there_were_env_params_is_loaded_and_resumed(tmp_path):
    now, before = tmp_path / "now", tmp_path / "before"
    train(replace(RUN, env_params=(), out=now))
    shutil.copytree(now, before)
    config = json.loads((before / "config.json").read_text())
    del config["run"]["env_params"]
    (before / "config.json").write_text(json.dumps(config))
    assert load(before, seed=1).env.max_episode_steps == 500
    longer = [train(replace(RUN, env_params=(), total_steps=64, out=out, resume=True)) for out in (now, before)]
    for name, value in longer[0].metrics.items():
        np.testing.assert_array_equal(longer[1].metrics[name], value, err_msg=name)
    with pytest.raises(UsageError, match=r"env_params \(was \[\], is \['gravity=5.5'\]\)"):
        train(replace(RUN, env_params=SHORT[1:], total_steps=64, out=before, resume=True))


def test_the_command_line_takes_several_after_one_flag(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = replace(RUN, env_params=())

    def command(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(ppo, CONFIG, actor_critic, NETWORK, run, arguments=arguments)
        return exit.value.code

    assert command("--env-params", *SHORT, "--out", "out", "--seed", "3") == 0
    assert json.loads(Path("out/config.json").read_text())["run"]["env_params"] == list(SHORT)
    capsys.readouterr()
    assert command("--env-params", SHORT[0], "--env-params", SHORT[1]) == 2
    assert "--env-params is given twice: put every KEY=VALUE after one" in capsys.readouterr().err


def test_pages_and_comparisons_say_with_which_parameters_a_run_was_made(tmp_path):
    entry = {"hyperparameters": {}, "finals": [1.0, 2.0], "diverged": [], "iqm": 1.5, "interval": [1.0, 2.0]}
    entry |= {"mode": {"iqm": 1.5}, "training": {"iqm": 1.5}}
    folders = []
    for name, params in {"old": None, "heavy": ["gravity=20"]}.items():
        run: dict[str, Any] = {"env": "CartPole-v1", "total_steps": 1000, "eval_episodes": 8, "eval_max_steps": None}
        run |= {} if params is None else {"env_params": params}
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text(json.dumps(EMPTY_CONFIG | {"script": "ppo", "run": run}))
        (folders[-1] / "summary.json").write_text(json.dumps({"settings": [entry], "interrupted": False}))
    assert gather(folders, None, "sampled", False)[1] == [
        "The runs on CartPole-v1 differ in env_params: none, gravity=20."
    ]
    assert [row[0] for folder in folders for row in rows_of(folder, None)] == ["CartPole-v1", "CartPole-v1 gravity=20"]
    swept = {"settings": [entry, entry | {"hyperparameters": {"gamma": 0.9}}], "interrupted": False}
    (folders[0] / "summary.json").write_text(json.dumps(swept))
    assert [row[1] for row in rows_of(folders[0], None)] == ["ppo", "ppo, gamma=0.9"]
