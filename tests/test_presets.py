"""Named networks: what a preset sets, and how it and the other flags of a command line add up."""

import json
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
from helpers import arms_env

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.language.model import LanguageModelConfig
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.networks.presets import PRESETS, Preset, has_presets, with_preset
from purepg.run.cli import main, parse
from purepg.run.plan import RunConfig
from purepg.types import Box, Discrete, UsageError

RUN = RunConfig(total_steps=16, num_seeds=1, eval_episodes=2, eval_max_steps=5, wandb="disabled", devices=1)
TINY = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1)
FRAMES = Box(np.zeros((84, 84, 4), np.uint8), np.full((84, 84, 4), 255, np.uint8), np.uint8)


SCRIPT = NetworkConfig(hidden=(3,), shared=True)


def parsed(*arguments: str, network: Any = SCRIPT) -> Any:
    return parse("ppo", TINY, network, RUN, arguments)[0]["network"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("config", [NetworkConfig(shared=True), ActorQConfig("categorical", num_critics=3)])
def test_a_preset_sets_the_torso_and_leaves_the_other_fields(config, name):
    changed = with_preset(config, name)
    assert changed == replace(config, **PRESETS[name])
    for field in fields(config):
        expected = PRESETS[name].get(field.name, getattr(config, field.name))
        assert getattr(changed, field.name) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_network_of_atari_frames_or_of_vectors(name):
    env = arms_env(Discrete(4))
    env = env._replace(observation_space=FRAMES) if PRESETS[name]["torso"] in ("cnn", "nature", "impala") else env
    assert actor_critic(env, with_preset(NetworkConfig(), name))
    assert actor_q(env, with_preset(ActorQConfig("categorical"), name))


def test_the_commands_presets_are_those_of_the_table():
    assert set(get_args(Preset)) == set(PRESETS)


def test_a_preset_replaces_the_scripts_defaults_and_flags_replace_those_of_the_preset():
    assert parsed() == SCRIPT
    assert parsed("--network.preset", "impala") == replace(SCRIPT, **PRESETS["impala"])
    for arguments in (
        ("--network.preset", "impala", "--network.hidden", "7", "9"),
        ("--network.hidden", "7", "9", "--network.preset=impala"),
    ):
        assert parsed(*arguments) == replace(SCRIPT, **PRESETS["impala"] | {"hidden": (7, 9)})
    assert parsed("--network.preset", "impala", "--network.preset", "simba") == replace(SCRIPT, **PRESETS["simba"])
    assert parsed("--network.preset", "none") == SCRIPT
    assert parsed("--network.preset", "sac", network=ActorQConfig("gaussian")) == ActorQConfig(
        "gaussian", hidden=(256, 256)
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--network.preset", "impal"),
            "--network.preset ('impal') must be mujoco, sac, playground, craftax, minatar,",
        ),
        (("--network.preset=Nature",), "did you mean nature?"),
        (("--network.preset", "--num-seeds", "2"), "--network.preset ('--num-seeds') must be mujoco"),
        (("--network.preset",), "--network.preset"),
        (("--network.presets", "impala"), "did you mean --network.preset?"),
        (
            ("--network.preset", "nature"),
            "torso 'nature' needs observations [height, width, channels], but CartPole-v1",
        ),
    ],
)
def test_an_unknown_preset_or_one_that_does_not_fit_is_refused_in_one_line(
    arguments, says, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(ppo, TINY, actor_critic, NetworkConfig(), RUN, arguments=arguments)
    line = capsys.readouterr().err
    assert exit_.value.code == 2 and says in line and line.count("\n") == 1


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    words = "".join(line.strip(" │") for line in capsys.readouterr().out.splitlines())
    assert "--network.preset {None,mujoco,sac,playground,craftax,minatar,nature,impala,simba}" in words


def test_config_json_holds_a_presets_fields_and_not_its_name(tmp_path):
    arguments = ("--network.preset", "simba", "--network.hidden", "4", "--out", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as exit_:
        main(ppo, TINY, actor_critic, NetworkConfig(), RUN, arguments=arguments)
    assert exit_.value.code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["network"] == vars(NetworkConfig(torso="simba", hidden=(4,), activation="relu")) | {"hidden": [4]}


def test_a_config_without_the_fields_has_no_presets():
    assert has_presets(NetworkConfig()) and has_presets(ActorQConfig()) and not has_presets(LanguageModelConfig())
    with pytest.raises(UsageError, match=r"^preset \(sac\) is for a config with the fields torso, hidden, activation"):
        with_preset(LanguageModelConfig(), "sac")
    with pytest.raises(UsageError, match=r"did you mean impala\?$"):
        with_preset(NetworkConfig(), "impla")
    with pytest.raises(UsageError, match=r"network\.preset"):
        parsed("--network.preset", "sac", network=LanguageModelConfig())
