"""Adapters from MuJoCo Playground 0.2 (Zakka et al. 2025) and brax 0.14 (Freeman et al. 2021): physics in JAX.

Both have the same interface. The bare environments never reset; `done` is termination, which the tasks of the DeepMind
Control Suite never reach, unless a number is not finite. Their wrappers, which add time limits and resets, replace the
final observation by that of the reset, so the adapter uses our clock of 1000 steps instead. Playground's `impl` is
"jax", since its default, "warp", needs CUDA. Actions are in [-1, 1]. An episode's metrics are the suite's own, averaged
over the episode's steps.

On GPUs that multiply in reduced precision, set `JAX_DEFAULT_MATMUL_PRECISION=highest`, or physics drifts.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, chosen, require, suite_env
from purepg.types import Box, Env, UsageError

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


def playground_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `PLAYGROUND`, or another task that Playground has registered, whose models are on this machine.

    Where observations have the entries `state` and `privileged_state`, the second is for the critic alone.

    Args:
      params: replace fields of the task's own config, such as `ctrl_dt`; and `max_episode_steps`, our clock.
    Raises:
      UsageError: Playground is not installed, a field is unknown, or the task's models would be downloaded.
    """
    require("playground", "mujoco_playground")
    from mujoco_playground import registry
    from mujoco_playground._src import mjx_env

    if name not in registry.ALL_ENVS:
        raise UsageError(f"playground has no task {name!r}; it has {', '.join(registry.ALL_ENVS)}")
    if name not in PLAYGROUND and not Path(str(mjx_env.MENAGERIE_PATH)).is_dir():
        raise UsageError(
            f"playground/{name} reads robots' models from {mjx_env.MENAGERIE_PATH}, which does not exist: clone "
            f"github.com/google-deepmind/mujoco_menagerie there, at commit {mjx_env.MENAGERIE_COMMIT_SHA[:12]}"
        )
    config = registry.get_default_config(name)
    own, limit = _with_limit(name, params, int(config.get("episode_length", EPISODE_STEPS)))
    ours = ("episode_length", "action_repeat")  # our clock and our wrapper
    known = {k: v for k, v in config.to_dict().items() if isinstance(v, bool | int | float | str) and k not in ours}
    given = chosen(name, own, **known | {"impl": "jax"})
    overrides = {key: type(known.get(key, ""))(given[key]) for key in own} | {"impl": given["impl"]}
    env = registry.load(name, config_overrides=overrides)

    def render(state: Any) -> np.ndarray:
        return _picture(name, lambda: env.render([state.inner[0]])[0])

    return _physics(env, name, limit, render)


def brax_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `BRAX`.

    Args:
      params: arguments of the environment's constructor, such as `backend` (generalized, positional, spring or mjx);
        and `max_episode_steps`, our clock.
    Raises:
      UsageError: brax is not installed, or its constructor does not take these parameters.
    """
    require("brax", "brax")
    from brax import envs

    own, limit = _with_limit(name, params, EPISODE_STEPS)
    try:
        env = envs.get_environment(name, **own)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"brax/{name} does not take the parameters {dict(own)}: {error}") from None

    def render(state: Any) -> np.ndarray:
        from brax.io import image

        return _picture(name, lambda: image.render_array(env.sys, [state.inner[0].pipeline_state], 240, 320)[0])

    return _physics(env, name, limit, None if name == "fast" else render)


def _with_limit(name: str, params: Mapping[str, Any], default: int) -> tuple[dict[str, Any], int]:
    own = {key: value for key, value in params.items() if key != "max_episode_steps"}
    clock = {key: value for key, value in params.items() if key == "max_episode_steps"}
    return own, chosen(name, clock, max_episode_steps=default)["max_episode_steps"]


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
        t, sums = t + 1, jax.tree.map(jnp.add, sums, new.metrics)
        info = {metric: sums[metric] / t for metric in metrics}
        return (new, sums, t), seen(new), new.reward, new.done > 0, info

    others = {"metrics": metrics, "costly_reset": True, "render": render}
    if isinstance(observed, dict) and "privileged_state" in observed:
        others["privileged"] = ("privileged_state",)
    return suite_env(name, reset, step, observed, box((env.action_size,), np.float32, -1, 1), limit, **others)


def _picture(name: str, draw: Callable[[], Any]) -> np.ndarray:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco first makes a picture
    try:
        return np.asarray(draw(), np.uint8)
    except Exception as error:
        raise UsageError(
            f"{name} cannot be drawn without a display: mujoco needs EGL or OSMesa (MUJOCO_GL=egl or osmesa): {error}"
        ) from error
