"""An adapter from XLand-MiniGrid 0.9 (Nikulin et al. 2024, github.com/dunnolab/xland-minigrid).

Its last step is marked in the same way at the goal and at its time limit; only its discount, which is 0 at the goal
alone, tells them apart. The time limit also enters the reward, 1 - 0.9 t / limit, so the adapter sets it to our clock.

A cell is a tile and a colour. Observations are one-hot images, bool `[view, view, 25]`, or the identifiers, int32
`[2 view^2]`, of which networks make one-hot vectors; a dense layer or a 1 x 1 convolution on either is an embedding.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, chosen, require, suite_env
from purepg.envs.wrappers import positive_count
from purepg.types import Discrete, Env, MultiDiscrete, UsageError

_SIZES = {"R1": (9, 11, 13, 15, 17), "R2": (9, 11, 13, 15, 17), "R4": (9, 11, 13, 15, 17), "R6": (13, 17, 19)}
_SIZES |= {"R9": (16, 19, 25)}
XLAND = tuple(f"XLand-MiniGrid-{rooms}-{n}x{n}" for rooms, sizes in _SIZES.items() for n in sizes)
NAMES = (
    *XLAND,
    *(f"MiniGrid-{kind}-{n}x{n}" for kind in ("Empty", "EmptyRandom", "DoorKey") for n in (5, 6, 8, 16)),
    *(f"MiniGrid-MemoryS{n}" for n in (8, 16, 32, 64, 128)),
    *(f"MiniGrid-{kind}" for kind in ("BlockedUnlockPickUp", "FourRooms", "LockedRoom", "Playground", "Unlock")),
    "MiniGrid-UnlockPickUp",
)


def xminigrid_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`. The names that begin with XLand have goals and rules from a benchmark.

    Args:
      params: `observation`, "one_hot" or "ids"; `view_size`, `height` and `width`, with the time limit of that size;
        `benchmark`, the name of a benchmark such as "trivial-1m", from which each episode draws its goal and rules; and
        `max_episode_steps`, our clock.
    Raises:
      UsageError: the suite is not installed, a parameter is unknown, or the benchmark would be downloaded.
    """
    xminigrid = require("xminigrid", "xminigrid")
    constants: Any = import_module("xminigrid.core.constants")
    tiles, colours = constants.NUM_TILES, constants.NUM_COLORS
    env, default = xminigrid.make(name)
    known = {field: getattr(default, field) for field in ("height", "width", "view_size")}
    sizes = {field: positive_count(f"{name}'s {field}", params.get(field, size)) for field, size in known.items()}
    limit = default.max_steps if sizes == known else env.default_params(**sizes).max_steps
    given = chosen(name, params, observation="one_hot", benchmark="", max_episode_steps=limit, **known)
    if given["observation"] not in ("one_hot", "ids"):
        raise UsageError(f"{name}'s observation ({given['observation']}) must be one_hot or ids")
    limit, view = given["max_episode_steps"], given["view_size"]
    env_params = default.replace(max_steps=limit, **sizes)
    benchmark = _benchmark(name, given["benchmark"])

    def seen(timestep):
        cells = timestep.observation
        if given["observation"] == "ids":
            return cells.reshape(-1).astype(jnp.int32)
        tile, colour = cells[..., :1] == jnp.arange(tiles), cells[..., 1:] == jnp.arange(colours)
        return jnp.concatenate([tile, colour], axis=-1)

    def reset(key):
        if benchmark is None:
            timestep = env.reset(env_params, key)
        else:
            k_rules, k_grid = jax.random.split(key)
            timestep = env.reset(env_params.replace(ruleset=benchmark.sample_ruleset(k_rules)), k_grid)
        return timestep, seen(timestep)

    def step(key, timestep, action):
        timestep = env.step(env_params, timestep, action)
        return timestep, seen(timestep), timestep.reward, timestep.discount == 0, {}

    def render(state: Any) -> np.ndarray:
        return np.asarray(env.render(env_params, state), np.uint8)

    one_hot, ids = (view, view, tiles + colours), MultiDiscrete((tiles, colours) * view**2)
    observed = ids if given["observation"] == "ids" else box(one_hot, bool, False, True)
    actions = Discrete(int(env.num_actions(env_params)))
    return suite_env(name, reset, step, observed, actions, limit, costly_reset=True, render=render)


def _benchmark(name: str, benchmark: str) -> Any:
    if name not in XLAND and not benchmark:
        return None
    benchmarks = require("xminigrid", "xminigrid").benchmarks
    known = ", ".join(benchmarks.NAME2HFFILENAME)
    if name not in XLAND:
        raise UsageError(f"{name} takes no benchmark ({benchmark}): only the names that begin with XLand do")
    if benchmark not in benchmarks.NAME2HFFILENAME:
        raise UsageError(f"{name} has its goals and rules from a benchmark: set benchmark to one of {known}")
    path = Path(os.fspath(benchmarks.DATA_PATH)) / benchmarks.NAME2HFFILENAME[benchmark]
    if not path.is_file():
        raise UsageError(
            f"the benchmark {benchmark} is not at {path}: download it first, with "
            f"`python -c \"import xminigrid; xminigrid.load_benchmark('{benchmark}')\"`"
        )
    return benchmarks.load_benchmark_from_path(str(path))
