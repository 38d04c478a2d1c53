"""Adapters from MuJoCo Playground 0.2 (Zakka et al. 2025) and brax 0.14 (Freeman et al. 2021): physics in JAX.

Both have the same interface. The bare environments never reset; `done` is termination, which the tasks of the DeepMind
Control Suite never reach, unless a number is not finite. Their wrappers, which add time limits and resets, replace the
final observation by that of the reset, so the adapter uses our clock of 1000 steps instead. A step whose observation or
reward is not finite terminates in brax too, and its numbers that are not finite become 0: a simulation that blew up
would otherwise make a learner's parameters NaN. Playground's `impl` is "jax", since its default, "warp", needs CUDA.
Actions are in [-1, 1]. An episode's metrics are the suite's own, averaged over the episode's steps.

On GPUs that multiply in reduced precision, set `JAX_DEFAULT_MATMUL_PRECISION=highest`, or physics drifts.
"""

import atexit
import ctypes.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, chosen, require, suite_env, with_limit
from purepg.types import Array, Box, Env, UsageError

# The tasks of the DeepMind Control Suite. Playground's robots need their models' repository: see `playground_env`.
PLAYGROUND = (
    *("AcrobotSwingup", "AcrobotSwingupSparse", "BallInCup", "CartpoleBalance", "CartpoleBalanceSparse"),
    *("CartpoleSwingup", "CartpoleSwingupSparse", "CheetahRun", "FingerSpin", "FingerTurnEasy", "FingerTurnHard"),
    *("FishSwim", "HopperHop", "HopperStand", "HumanoidRun", "HumanoidStand", "HumanoidWalk", "PendulumSwingup"),
    *("PointMass", "ReacherEasy", "ReacherHard", "SwimmerSwimmer6", "WalkerRun", "WalkerStand", "WalkerWalk"),
)
BRAX = (
    *("ant", "fast", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_double_pendulum"),
    *("inverted_pendulum", "pusher", "reacher", "walker2d"),  # swimmer calls a function that today's jax lacks
)
EPISODE_STEPS = 1000
HEIGHT, WIDTH = 240, 320  # of a picture


def playground_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `PLAYGROUND`, or another task that Playground has registered, whose models are on this machine.

    Where observations have the entries `state` and `privileged_state`, the second is for the critic alone.

    Args:
      params: replace fields of the task's own config, such as `ctrl_dt`; and `max_episode_steps`, our clock.
    Raises:
      UsageError: Playground is not installed, a field is unknown, or the task's models would be downloaded.
    """
    choose_renderer()
    registry = require("playground", "mujoco_playground").registry
    mjx_env: Any = import_module("mujoco_playground._src.mjx_env")
    if name not in registry.ALL_ENVS:
        raise UsageError(f"playground has no task {name!r}; it has {', '.join(registry.ALL_ENVS)}")
    if name not in PLAYGROUND and not Path(str(mjx_env.MENAGERIE_PATH)).is_dir():
        raise UsageError(
            f"playground/{name} reads robots' models from {mjx_env.MENAGERIE_PATH}, which does not exist: clone "
            f"github.com/google-deepmind/mujoco_menagerie there, at commit {mjx_env.MENAGERIE_COMMIT_SHA[:12]}"
        )
    config = registry.get_default_config(name)
    own, limit = with_limit(name, params, int(config.get("episode_length", EPISODE_STEPS)))
    ours = ("episode_length", "action_repeat", "vision")  # our clock and our wrapper; pictures, which need Warp
    known = {k: v for k, v in config.to_dict().items() if isinstance(v, bool | int | float | str) and k not in ours}
    given = chosen(name, own, **known | {"impl": "jax"})
    overrides: Any = {key: type(known.get(key, ""))(given[key]) for key in own} | {"impl": given["impl"]}
    env = registry.load(name, config_overrides=overrides)

    def pose(state):  # a task's target is often a body that only a reset moves
        return {field: getattr(state.data, field) for field in ("qpos", "mocap_pos", "mocap_quat")}

    return _physics(env, name, limit, _Picture(name, env.mj_model, pose))


def brax_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `BRAX`.

    Args:
      params: arguments of the environment's constructor, such as `backend` (generalized, positional, spring or mjx);
        and `max_episode_steps`, our clock.
    Raises:
      UsageError: brax is not installed, or its constructor does not take these parameters.
    """
    choose_renderer()
    require("brax", "brax")
    envs: Any = import_module("brax.envs")
    own, limit = with_limit(name, params, EPISODE_STEPS)
    try:
        env = envs.get_environment(name, **own)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"brax/{name} does not take the parameters {dict(own)}: {error}") from None

    draw = _Picture(name, env.sys.mj_model, lambda state: {"qpos": state.pipeline_state.q}) if name != "fast" else None
    return _physics(env, name, limit, draw)


def _physics(env: Any, name: str, limit: int, render: Callable[[Any], np.ndarray] | None) -> Env:
    shapes = jax.eval_shape(env.reset, jax.ShapeDtypeStruct((2,), jnp.uint32))
    metrics = tuple(sorted(shapes.metrics))
    observed = jax.tree.map(lambda x: box(x.shape, x.dtype), shapes.obs)
    if not isinstance(observed, Box):
        observed = dict(observed)

    def seen(state):
        return state.obs if isinstance(observed, Box) else dict(state.obs)

    def reset(key):
        state = env.reset(key)
        return (state, jax.tree.map(jnp.zeros_like, state.metrics), jnp.int32(0)), seen(state)

    def step(key, state, action):
        state, sums, t = state
        new = env.step(state, action)
        learned_from = seen(new), new.reward
        broken = ~jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(learned_from)]).all()
        obs, reward = jax.tree.map(_finite, learned_from)
        t, sums = t + 1, jax.tree.map(lambda total, x: total + _finite(x), sums, new.metrics)
        info = {metric: sums[metric] / t for metric in metrics}
        return (new, sums, t), obs, reward, (new.done > 0) | broken, info

    others = {"metrics": metrics, "costly_reset": True, "render": render}
    if isinstance(observed, dict) and "privileged_state" in observed:
        others["privileged"] = ("privileged_state",)
    return suite_env(name, reset, step, observed, box((env.action_size,), np.float32, -1, 1), limit, **others)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def choose_renderer() -> None:
    """Chooses a renderer that needs no display, where there is one. mujoco reads the choice when it is imported."""
    for kind, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if "MUJOCO_GL" not in os.environ and sys.platform == "linux" and ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = kind


class _Picture:
    """Draws a model with mujoco's offscreen renderer, which is made at the first picture.

    Args:
      pose: the fields of `mujoco.MjData` that say where the bodies are, from a state of the suite.
    """

    def __init__(self, name: str, model: Any, pose: Callable[[Any], Mapping[str, Any]]):
        self._name, self._model, self._pose, self._renderer = name, model, pose, None

    def __call__(self, state: Any) -> np.ndarray:
        mujoco: Any = import_module("mujoco")

        try:
            if self._renderer is None:
                self._renderer = mujoco.Renderer(self._model, HEIGHT, WIDTH)
                atexit.register(self._renderer.close)
        except Exception as error:
            raise UsageError(
                f"{self._name} cannot be drawn here, since mujoco has neither EGL nor OSMesa (set MUJOCO_GL to the one "
                f"that is installed): {error}"
            ) from error
        camera = 0 if self._model.ncam else -1  # most tasks' first camera follows
        self._renderer.update_scene(self.posed(state[0]), camera)
        return self._renderer.render()

    def posed(self, state: Any) -> Any:
        """The `mujoco.MjData` of a state of the suite."""
        mujoco: Any = import_module("mujoco")
        data = mujoco.MjData(self._model)
        for field, x in self._pose(state).items():
            getattr(data, field)[:] = np.asarray(x)
        mujoco.mj_forward(self._model, data)
        return data
