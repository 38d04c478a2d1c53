"""An adapter from gymnax 1.0.1 (Lange 2022, github.com/RobertTLange/gymnax) to `purepg.types.Env`.

gymnax's own `step`, and DeepSea's override of it, reset at the end of an episode. The adapter calls the functions
beneath, `step_env` and `is_truncated`, which keep termination and truncation apart and never reset. gymnax is imported
inside functions, because importing it starts a JAX backend.

The adapter does not correct these faults of gymnax 1.0.1: MountainCarContinuous does not stop at its left wall; Pong's
ball leaves through the top and returns only if the end of a paddle sends it back; MetaMaze terminates if the position
it teleports to after reaching a goal is itself the goal; MemoryChain's observation lags one step; Reacher supports only
two joints; MNISTBandit's pixels above 127 come out negative.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import check_environment
from purepg.envs.wrappers import UnknownParameterError, positive_count
from purepg.types import Action, Box, Discrete, Env, EnvState, Key, Obs, Space, TimeStep, UsageError

if TYPE_CHECKING:
    from gymnax.environments.environment import Environment, EnvParams

# Their observations are declared float32 but are all 0 or 1: stored as bool, a rollout takes a quarter of the bytes.
BINARY_OBS = ("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar")
MNIST_FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def gymnax_env(
    env: str | Environment, params: EnvParams | Mapping[str, Any] | None = None, **constructor_kwargs: Any
) -> Env:
    """Returns a gymnax environment with a Discrete or Box action space.

    Observations are cast to the dtype that the environment declares, which gymnax itself does not always emit (Catch
    and FourRooms); MinAtar's are cast to bool. Rewards are float32. Bounds of the largest float32 become infinite.

    Args:
      env: a registered name (`gymnax.registered_envs`), or a gymnax environment of your own.
      params: the environment's parameters, a mapping of those that differ from the defaults, or None for the defaults.
        Parameters derived from others are not recomputed (CartPole's `total_mass` does not follow `masspole`).
      constructor_kwargs: arguments of the constructor, with a name only: `gymnax_env("DeepSea-bsuite", size=20)`.
    Raises:
      UsageError: the name or a parameter is unknown, a space is neither Discrete nor Box, MNIST's data is missing, or
        the environment returns other shapes than it declares.
    """
    if isinstance(env, str):
        name, env = env, _construct(env, constructor_kwargs)
    elif constructor_kwargs:
        raise UsageError(
            f"constructor arguments ({', '.join(constructor_kwargs)}) need a name, not an environment object"
        )
    else:
        name = env.name
    params = _params(name, env.default_params, params)
    limit: Any = getattr(params, "max_steps_in_episode", None)
    if limit is not None:
        limit = np.asarray(limit).item()  # may be of NumPy or JAX
        limit = int(limit) if isinstance(limit, float) and limit.is_integer() else limit  # BernoulliBandit's is 100.0
        positive_count(f"{name}'s max_steps_in_episode", limit)
    observation_space, obs_dtype = _space(env.name, env.observation_space(params), "observation")
    action_space, action_dtype = _space(env.name, env.action_space(params), "action")

    def gymnax_reset(key: Key) -> tuple[EnvState, Obs]:
        obs, state = env.reset_env(key, params)
        return state, obs

    def gymnax_step(key: Key, state: EnvState, action: Action) -> tuple[EnvState, TimeStep]:
        obs, state, reward, terminated, _ = env.step_env(key, state, jnp.asarray(action, action_dtype), params)
        return state, TimeStep(obs, reward, terminated, env.is_truncated(state, params))

    # `reset_env` puts Python numbers (time=0) into its state, whose weak types `step_env` does not return. A scan needs
    # one type, so both are cast to the type that a step returns; on the device this is no operation.
    key = jax.eval_shape(jax.random.key, 0)
    shape = action_space.shape if isinstance(action_space, Box) else ()
    reset_state, _ = jax.eval_shape(gymnax_reset, key)
    step_state, _ = jax.eval_shape(gymnax_step, key, reset_state, jax.ShapeDtypeStruct(shape, action_dtype))

    def cast_state(state: EnvState) -> EnvState:
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), state, step_state)

    def reset(key: Key) -> tuple[EnvState, Obs]:
        state, obs = gymnax_reset(key)
        return cast_state(state), jnp.asarray(obs, obs_dtype)

    def step(key: Key, state: EnvState, action: Action) -> tuple[EnvState, TimeStep]:
        state, time_step = gymnax_step(key, state, action)
        return cast_state(state), TimeStep(*map(jnp.asarray, time_step, (obs_dtype, jnp.float32, bool, bool)))

    made = Env(reset, step, observation_space, action_space, limit, name)
    check_environment(made)
    return made


class _AtFirstUse(ModuleType):
    """Stands for a module that is imported when something of it is used."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


def library() -> ModuleType:
    """gymnax. It imports pyplot and seaborn for pictures of Catch and Pong, which takes longer than all the rest of it;
    in its modules they are imported when something of them is used."""
    postponed = [name for name in ("matplotlib.pyplot", "seaborn") if name not in sys.modules]
    sys.modules.update({name: _AtFirstUse(name) for name in postponed})
    try:
        import gymnax
    finally:
        for name in postponed:
            del sys.modules[name]
    return gymnax


def _construct(name: str, constructor_kwargs: Mapping[str, Any]) -> Environment:
    gymnax = library()
    if name not in gymnax.registered_envs:
        raise UsageError(f"gymnax has no environment {name!r}; it has {', '.join(gymnax.registered_envs)}")
    if name == "MNISTBandit-bsuite":
        _require_mnist()
    return gymnax.make(name, **constructor_kwargs)[0]


def _require_mnist() -> None:
    """Raises UsageError where gymnax would download data: its loader fetches every file missing from its directory."""
    from gymnax.utils.load_mnist import load_mnist

    directory = Path(inspect.signature(load_mnist).parameters["directory"].default)
    missing = [file for file in MNIST_FILES if not (directory / file).is_file()]
    if missing:
        raise UsageError(
            f"MNISTBandit-bsuite reads MNIST from {directory}, which lacks {', '.join(missing)}: put the files there "
            "(from https://storage.googleapis.com/cvdf-datasets/mnist/)"
        )


def _params(name: str, default: EnvParams, params: EnvParams | Mapping[str, Any] | None) -> EnvParams:
    if params is None:
        return default
    if not isinstance(params, Mapping):
        return params
    known = [field.name for field in fields(default)]
    if unknown := [key for key in params if key not in known]:
        raise UnknownParameterError(name, unknown, known)
    # Some environments use `lax.select` on parameters, which does not accept an int for a float.
    is_float = {key: isinstance(getattr(default, key), float) for key in params}
    return replace(default, **{k: float(x) if isinstance(x, int) and is_float[k] else x for k, x in params.items()})


def _space(name: str, space: Any, wanted: str) -> tuple[Space, Any]:
    """Converts an observation or action space (`wanted`) to ours, and returns the dtype of its values too."""
    from gymnax.environments import spaces

    if isinstance(space, spaces.Discrete):
        return Discrete(space.n), space.dtype
    floats = " of floats" if wanted == "action" else ""
    if not isinstance(space, spaces.Box) or (floats and not jnp.issubdtype(space.dtype, jnp.floating)):
        found = type(space).__name__ + (f" of {space.dtype}" if isinstance(space, spaces.Box) else "")
        raise UsageError(f"{name}: its {wanted} space must be Discrete or a Box{floats}, but is a {found}")
    dtype = bool if wanted == "observation" and name in BINARY_OBS else space.dtype
    largest = np.finfo(np.float32).max

    def bound(value: Any) -> np.ndarray:
        array = np.broadcast_to(np.asarray(value), space.shape)
        return np.where(np.abs(array) < largest, array, np.copysign(np.inf, array)).astype(dtype)

    return Box(bound(space.low), bound(space.high), dtype), dtype
