"""--config: a file gives a run its arguments, flags override it, and what does not fit is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import exit_code

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.arguments import arguments
from purepg.run.cli import parse
from purepg.run.experiment import train_population
from purepg.run.plan import RunConfig

pytestmark = pytest.mark.usefixtures("programs")

PPO = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, anneal_learning_rate=True)
NETWORK = NetworkConfig(hidden=(4,))
RUN = RunConfig(total_steps=64, num_seeds=2, eval_episodes=2, eval_max_steps=10, log_every=2, wandb="disabled")
FLAGS = "--ppo.gamma 0.93 --seed 5 --network.hidden 8 4 --sweep learning_rate=1e-3,0.0123456789 --sweep num_steps=8,16"


def command(*flags: str, algorithm: Any = ppo, config: Any = PPO) -> int:
    return exit_code(algorithm, config, actor_critic, NETWORK, RUN, arguments=flags)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a sweep whose programs differ in their numbers of updates, and so in their schedules."""
    out = tmp_path_factory.mktemp("first") / "out"
    assert command("--out", str(out), *FLAGS.split()) == 0
    return out


def assert_same_results(a: Path, b: Path) -> None:
    with np.load(a / "metrics.npz") as one, np.load(b / "metrics.npz") as other:
        assert one.files == other.files
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    finals = [[x["finals"] for x in json.loads((out / "summary.json").read_text())["settings"]] for out in (a, b)]
    assert finals[0] == finals[1]


def test_the_folder_of_a_run_repeats_it_bit_for_bit_and_gives_the_same_arguments(first, tmp_path):
    """Although the script's own defaults differ from the first run's arguments."""
    assert command("--config", str(first), "--out", str(tmp_path / "again")) == 0
    assert_same_results(first, tmp_path / "again")
    was, now = (json.loads((out / "config.json").read_text()) for out in (first, tmp_path / "again"))
    different = {name for name in was if was[name] != now[name]}
    assert different <= {"started", "run"} and was["run"] | {"out": None} == now["run"] | {"out": None}


def test_python_repeats_a_run_with_its_arguments(first):
    found = arguments(first)
    assert found["config"].gamma == 0.93 and found["network_config"].hidden == (8, 4) and found["run"].out is None
    assert found["sweep"] == {"learning_rate": [1e-3, 0.0123456789], "num_steps": [8, 16]}
    results = train_population(**found)
    with np.load(first / "metrics.npz") as metrics:
        for name in results.metrics:
            np.testing.assert_array_equal(results.metrics[name], metrics[name], err_msg=name)


def parsed(*flags: str) -> Any:
    return parse("ppo", PPO, NETWORK, RUN, flags)


def test_flags_override_the_file_wherever_they_stand_and_the_file_overrides_the_script(first):
    for flags in (
        ("--ppo.gamma", "0.5", f"--config={first}"),
        ("--config", str(first / "config.json"), "--ppo.gamma=0.5"),
    ):
        configs, run, sweep = parsed(*flags)
        assert configs["ppo"] == replace(PPO, gamma=0.5, learning_rate=1e-3)  # the schedule is as long as the run again
        assert configs["network"] == NetworkConfig(hidden=(8, 4)) and run == replace(RUN, seed=5)
        assert sweep == {"learning_rate": [1e-3, 0.0123456789], "num_steps": [8, 16]}
    _, _, sweep = parsed("--config", str(first), "--sweep", "ppo.num_steps=32", "--sweep", "gamma=0.9,1")
    assert sweep == {"learning_rate": [1e-3, 0.0123456789], "ppo.num_steps": [32], "gamma": [0.9, 1.0]}


def test_yaml_by_hand_is_read_as_flags_are(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        """
        run: {total_steps: 128, wandb_group: ~, env_params: [gravity=9.0]}
        ppo: {learning_rate: 1e-4, normalize_advantage: off, normalize_obs: true, target_kl: none}
        network: {hidden: 16x16}
        sweep: ["gamma=0.9,0.99", "hidden=4,8x8"]
        """
    )
    configs, run, sweep = parsed("--config", str(file))
    assert run == replace(RUN, total_steps=128, env_params=("gravity=9.0",))
    assert configs["ppo"] == replace(PPO, learning_rate=1e-4, normalize_advantage="off", normalize_obs=True)
    assert configs["network"].hidden == (16, 16)
    assert sweep == {"gamma": [0.9, 0.99], "hidden": [(4,), (8, 8)]}


def test_a_field_that_a_runs_file_lacks_has_its_types_default_and_not_the_scripts(first, tmp_path):
    config = json.loads((first / "config.json").read_text())
    del config["ppo"]["num_epochs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parsed("--config", str(tmp_path))[0]["ppo"].num_epochs == PPOConfig().num_epochs != PPO.num_epochs
    (tmp_path / "by_hand.json").write_text(json.dumps({"ppo": {"gamma": 0.9}}))
    assert parsed("--config", str(tmp_path / "by_hand.json"))[0]["ppo"] == replace(PPO, gamma=0.9)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"ppo": {"gama": 0.9}}', "file.json: ppo has no field gama; did you mean gamma?"),
        ('{"ppo": {"xyz": 0.9}}', "file.json: ppo has no field xyz; remove it"),
        ('{"ppo": {"gamma": 1.5}}', "file.json: ppo: gamma (1.5) must be in [0, 1]"),
        ('{"ppo": {"num_envs": 1.5}}', "file.json: ppo: num_envs (1.5) must be an integer"),
        ('{"ppo": {"num_envs": "many"}}', "file.json: ppo.num_envs ('many') must be an integer"),
        ('{"network": {"hidden": 4}}', "file.json: network: hidden (4) must be a tuple"),
        ('{"run": 4}', "file.json: run must be a section with fields, such as env, total_steps"),
        ('{"sac": {}}', "has the unknown section sac; it may have run, ppo, network and sweep"),
        ('{"sweep": {"gamma": 1}}', "sweep must be a list of texts, as in learning_rate=3e-4,1e-3"),
        ('{"sweep": ["gama=1"]}', "cannot sweep 'gama'"),
        ('{"code": {"name": "sac"}}', "file.json is of sac, not of ppo"),
        ("[]", "file.json) must have sections, such as run and network"),
        ("{", "file.json) cannot be read: JSONDecodeError"),
        (None, "file.json) cannot be read: No such file or directory"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text, said, tmp_path, capsys):
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    assert command("--config", str(file)) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_the_file_of_another_algorithm_is_refused(first, capsys):
    assert command("--config", str(first), algorithm=a2c, config=A2CConfig()) == 2
    assert "config.json is of ppo, not of a2c" in capsys.readouterr().err


def test_another_version_of_a_package_is_said(first, tmp_path, capsys):
    config = json.loads((first / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"versions": config["versions"] | {"optax": "0.0.1"}}))
    parsed("--config", str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("optax 0.0.1 is ") and "last bits" in line
