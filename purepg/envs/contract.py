"""What an environment promises, and the units of its actions: what stands between any `Env` and the algorithms."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import Action, Box, Discrete, Env, Space, TimeStep, UsageError


def in_units(space: Space, action: Action) -> Action:
    """A policy's action, `[..., *shape]`, as the environment's `step` takes it.

    Policies, log-probabilities, critics and replay have actions of a bounded Box in canonical [-1, 1]: they are clipped
    to it and scaled to the bounds. Those of a Box with some bounds missing are in its own units, and clipped to the
    bounds that it has. All others are taken as they are.
    """
    if isinstance(space, Discrete) or not (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
        return action
    low, high = (np.asarray(bound, space.dtype) for bound in (space.low, space.high))
    if not space.bounded:
        return jnp.clip(action, low, high)
    return jnp.clip(jnp.asarray(action, space.dtype), -1, 1) * ((high - low) / 2) + (high + low) / 2


def check_environment(env: Env) -> None:
    """Holds `reset` and `step` to what `Env` says of them, without running either.

    JAX remembers what it has traced: asked again of the same two functions, this costs next to nothing.

    Raises:
      UsageError: a step gives another state or observation than a reset, in structure, shape or dtype; an observation
        is not of its space's shape; a reward is no floating-point scalar, or a flag no bool; actions are not of floats.
    """
    space = env.action_space
    if isinstance(space, Box) and not (np.shape(space.low) == np.shape(space.high) and _is_float(space.dtype)):
        raise UsageError(f"{env.name}: its action space must be Discrete or a Box of floats with arrays for bounds")
    key = jax.eval_shape(jax.random.key, 0)
    action = jax.ShapeDtypeStruct(
        *((), jnp.int32) if isinstance(space, Discrete) else (np.shape(space.low), space.dtype)
    )
    state, obs = _pair(env, "reset", jax.eval_shape(env.reset, key))
    next_state, time_step = _pair(env, "step", jax.eval_shape(env.step, key, state, action))
    if not isinstance(time_step, TimeStep):
        raise UsageError(
            f"{env.name}: its step must give a state and a TimeStep, and gives a {type(time_step).__name__}"
        )

    declared = jax.tree.map(_declared, env.observation_space, is_leaf=_is_space)
    for what, difference in {
        "reset's obs": first_difference(declared, obs, ("shape",)),
        "step's state": first_difference(state, next_state),
        "step's obs": first_difference(obs, time_step.obs),
    }.items():
        if difference:
            raise UsageError(f"{env.name}: its {what}{difference}")
    for name, kind in {"reward": "float", "terminated": "bool", "truncated": "bool"}.items():
        found = getattr(time_step, name)
        if found.shape != ():
            raise UsageError(f"{env.name}: its step's {name} must have shape (), and has {found.shape}")
        if not (_is_float(found.dtype) if name == "reward" else found.dtype == bool):
            raise UsageError(f"{env.name}: its step's {name} must have dtype {kind}, and has {found.dtype}")


def first_difference(wanted: Any, found: Any, attributes: Sequence[str] = ("shape", "dtype")) -> str | None:
    """The first leaf in which two trees differ, and how, to be put behind a name of the tree; None: they agree."""
    (left, structure), (right, other) = (jax.tree_util.tree_flatten_with_path(tree) for tree in (wanted, found))
    left, right = ({jax.tree_util.keystr(path): leaf for path, leaf in leaves} for leaves in (left, right))
    for path in left | right:
        if path not in right:
            return f"{path} must be there, and is not"
        if path not in left:
            return f"{path} must not be there, and is"
        for attribute in attributes:
            a, b = getattr(left[path], attribute), getattr(right[path], attribute)
            if a != b:
                return f"{path} must have {attribute} {a}, and has {b}"
    return None if structure == other else f" must have the structure {structure}, and has {other}"


def _pair(env: Env, what: str, found: Any) -> tuple[Any, Any]:
    if not (isinstance(found, tuple) and len(found) == 2):
        second = "an observation" if what == "reset" else "a TimeStep"
        raise UsageError(
            f"{env.name}: its {what} must give a pair, a state and {second}, and gives a {type(found).__name__}"
        )
    return found


def _declared(space: Space) -> Any:
    return jax.ShapeDtypeStruct((), jnp.int32) if isinstance(space, Discrete) else space.low


def _is_space(x: Any) -> bool:
    return isinstance(x, Discrete | Box)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)
