"""Named sets of network fields, from the literature. A preset's fields replace those of a config:

    config = with_preset(NetworkConfig(), "impala")

A preset says nothing of `shared`, so that it fits `NetworkConfig` and `ActorQConfig` alike; the papers' policies and
critics of `nature` and `impala` share their torso (`shared=True`).
"""

import dataclasses
from typing import Any, Literal, TypeVar

from purepg.config import check_choice
from purepg.types import UsageError

Config = TypeVar("Config")

Preset = Literal["mujoco", "sac", "playground", "craftax", "minatar", "nature", "impala", "simba"]

PRESETS: dict[str, dict[str, Any]] = {
    # Vectors. PPO on MuJoCo: Schulman et al. 2017, section 6.1.
    "mujoco": {"torso": "mlp", "hidden": (64, 64), "activation": "tanh", "layer_norm": False},
    # SAC: Haarnoja et al. 2018b, table 1.
    "sac": {"torso": "mlp", "hidden": (256, 256), "activation": "relu", "layer_norm": False},
    # Robots that walk, in MuJoCo Playground (Zakka et al. 2025): config/locomotion_params.py, PPO on Go1 and G1.
    "playground": {"torso": "mlp", "hidden": (512, 256, 128), "activation": "silu", "layer_norm": False},
    # PPO on Craftax's symbolic observations (Matthews et al. 2024): the authors' Craftax_Baselines, ppo.py.
    "craftax": {"torso": "mlp", "hidden": (512, 512, 512), "activation": "tanh", "layer_norm": False},
    # Images. DQN on MinAtar: Young & Tian 2019.
    "minatar": {"torso": "cnn", "hidden": (128,), "activation": "relu", "layer_norm": False},
    # DQN on Atari: Mnih et al. 2015.
    "nature": {"torso": "nature", "hidden": (512,), "activation": "relu", "layer_norm": False},
    # IMPALA's large network: Espeholt et al. 2018, figure 3, without the LSTM.
    "impala": {"torso": "impala", "hidden": (256,), "activation": "relu", "layer_norm": False},
    # Vectors again. SimBa's critics: Lee et al. 2024. Its policies have one block of 128; use it with normalize_obs.
    "simba": {"torso": "simba", "hidden": (512, 512), "activation": "relu", "layer_norm": False},
}


def has_presets(config: Any) -> bool:
    """Whether a network's config has the fields that a preset sets."""
    return set(PRESETS["mujoco"]) <= {field.name for field in dataclasses.fields(config)}


def with_preset(config: Config, name: str) -> Config:
    """The config with a preset's fields. Raises UsageError if the preset is unknown or the config lacks the fields."""
    check_choice("preset", name, Preset)
    if not has_presets(config):
        raise UsageError(f"preset ({name}) is for a config with the fields {', '.join(PRESETS[name])}")
    return dataclasses.replace(config, **PRESETS[name])  # pyright: ignore[reportArgumentType]
