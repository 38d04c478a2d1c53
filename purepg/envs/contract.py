"""What every environment must satisfy, and the conversion of a policy's actions into the environment's units."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import (
    Action,
    Array,
    Box,
    Discrete,
    Env,
    LegalActions,
    MultiDiscrete,
    Obs,
    ObservationSpace,
    Space,
    TimeStep,
    UsageError,
    is_space,
    space_leaves,
)


def in_units(space: Space, action: Action) -> Action:
    """Converts a policy's action `[..., *shape]` into the units that the environment's `step` expects.

    Policies, log-probabilities, critics and replay use canonical actions in [-1, 1] where a Box is bounded; these are
    clipped and scaled to the bounds. Where some bounds are missing, actions are already in the Box's own units and are
    clipped to the bounds that exist. All other actions are returned unchanged.
    """
    if not isinstance(space, Box) or not (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
        return action
    low, high = (np.asarray(bound, space.dtype) for bound in (space.low, space.high))
    if not space.bounded:
        return jnp.clip(action, low, high)
    return jnp.clip(jnp.asarray(action, space.dtype), -1, 1) * ((high - low) / 2) + (high + low) / 2


def canonical(space: Space, action: Action) -> Action:
    """Converts an action in the environment's units into a policy's: the inverse of `in_units`. An action outside of a
    Box's bounds is clipped."""
    if not isinstance(space, Box):
        return action
    low, high = (np.asarray(bound, space.dtype) for bound in (space.low, space.high))
    action = jnp.clip(jnp.asarray(action, space.dtype), low, high)
    if not space.bounded:
        return action
    return (action - (high + low) / 2) / np.where(high > low, (high - low) / 2, 1).astype(space.dtype)


def check_environment(env: Env) -> None:
    """Checks that `reset` and `step` satisfy the contract of `Env`, by tracing them without running them. Of an
    environment that is not JAX, only the spaces and the reset are checked.

    JAX caches the traces, so repeating the check for the same two functions costs next to nothing.

    Raises:
      UsageError: a step's state or observation differs from the reset's in structure, shape or dtype; an observation
        does not have its space's shape; a reward is not a float scalar, a flag not a bool scalar, `info` not the
        declared `metrics`, a name in `privileged` no entry of the observation, or continuous actions not floats.
    """
    space = env.action_space
    if isinstance(space, Box) and not (np.shape(space.low) == np.shape(space.high) and _is_float(space.dtype)):
        raise UsageError(
            f"{env.name}: its action space must be Discrete, MultiDiscrete or a Box of floats with arrays for bounds"
        )
    key = jax.eval_shape(jax.random.key, 0)
    action = example(space)
    state, obs = _pair(env, "reset", jax.eval_shape(env.reset, key))
    declared = jax.tree.map(example, env.observation_space, is_leaf=is_space)
    if difference := first_difference(declared, obs, ("shape",)):
        raise UsageError(f"{env.name}: its reset's obs{difference}")
    _check_mask(env)
    _check_privileged(env)
    if env.outside is None:
        _check_step(env, key, action, state, obs)


def _check_step(env: Env, key: Any, action: Any, state: Any, obs: Any) -> None:
    next_state, time_step = _pair(env, "step", jax.eval_shape(env.step, key, state, action))
    if not isinstance(time_step, TimeStep):
        kind = type(time_step).__name__
        raise UsageError(f"{env.name}: its step must return a state and a TimeStep, but returns a {kind}")

    for what, difference in {
        "step's state": first_difference(state, next_state),
        "step's obs": first_difference(obs, time_step.obs),
    }.items():
        if difference:
            raise UsageError(f"{env.name}: its {what}{difference}")
    _check_info(env, time_step.info or {})
    for name, kind in {"reward": "float", "terminated": "bool", "truncated": "bool"}.items():
        found = getattr(time_step, name)
        if found.shape != ():
            raise UsageError(f"{env.name}: its step's {name} must have shape (), but has {found.shape}")
        if not (_is_float(found.dtype) if name == "reward" else found.dtype == bool):
            raise UsageError(f"{env.name}: its step's {name} must have dtype {kind}, but has {found.dtype}")


def _check_info(env: Env, info: Any) -> None:
    if set(info) != set(env.metrics) or any(x.shape != () or not _is_float(x.dtype) for x in info.values()):
        found = ", ".join(f"{name}: {x.dtype}{list(x.shape)}" for name, x in info.items())
        raise UsageError(
            f"{env.name}: its step's info must hold float scalars named {env.metrics}, but holds {{{found}}}"
        )


def _check_mask(env: Env) -> None:
    masks = [x for x in space_leaves(env.observation_space) if isinstance(x, LegalActions)]
    n = env.action_space.n if isinstance(env.action_space, Discrete) else None
    if len(masks) > 1 or any(mask.n != n for mask in masks):
        raise UsageError(
            f"{env.name}: its observation may hold one LegalActions, for the actions of a Discrete space, but holds "
            f"{', '.join(map(str, masks))} for {env.action_space}"
        )


def _check_privileged(env: Env) -> None:
    spaces = env.observation_space if isinstance(env.observation_space, Mapping) else {}
    for name in env.privileged:
        if name not in spaces:
            entries = ", ".join(map(str, spaces)) or "no named entries"
            raise UsageError(
                f"{env.name}: privileged ({name!r}) must be an entry of its observation, which has {entries}"
            )
        if any(isinstance(x, LegalActions) for x in space_leaves(spaces[name])):
            raise UsageError(f"{env.name}: privileged ({name!r}) must not hold the legal actions, which a policy reads")
    if spaces and not spaces.keys() - set(env.privileged):
        raise UsageError(f"{env.name}: privileged {env.privileged} must leave an entry for the policy to read")


def example(space: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an action in the environment's units, or of one leaf of an observation."""
    match space:
        case Discrete():
            return jax.ShapeDtypeStruct((), jnp.int32)
        case MultiDiscrete():
            return jax.ShapeDtypeStruct((len(space.sizes),), jnp.int32)
        case LegalActions():
            return jax.ShapeDtypeStruct((space.n,), bool)
    return jax.ShapeDtypeStruct(np.shape(space.low), space.dtype)


def space_name(space: Any) -> str:
    """The space of one leaf in a word, such as `Box(84, 84, 3)` or `MultiDiscrete(3, 2)`."""
    match space:
        case Discrete() | LegalActions():
            return f"{type(space).__name__}({space.n})"
        case MultiDiscrete():
            return f"MultiDiscrete({', '.join(map(str, space.sizes))})"
    return f"Box{np.shape(space.low)}"


def legal_actions(space: ObservationSpace, obs: Obs) -> Array | None:
    """The mask of legal actions `[..., n]` in an observation; None if its space holds no `LegalActions`.

    Where no action is legal, as in some suites' terminal states, all are, so that a distribution over them exists.
    """
    pairs = zip(space_leaves(space), jax.tree.leaves(obs), strict=True)
    mask = next((x for leaf, x in pairs if isinstance(leaf, LegalActions)), None)
    return None if mask is None else mask | ~jnp.any(mask, axis=-1, keepdims=True)


def first_difference(wanted: Any, found: Any, attributes: Sequence[str] = ("shape", "dtype")) -> str | None:
    """Describes the first leaf in which two trees differ, as text to append to the tree's name; None if they agree."""
    (left, structure), (right, other) = (jax.tree_util.tree_flatten_with_path(tree) for tree in (wanted, found))
    left, right = ({jax.tree_util.keystr(path): leaf for path, leaf in leaves} for leaves in (left, right))
    for path in left | right:
        if path not in right:
            return f"{path} must be there, but is not"
        if path not in left:
            return f"{path} must not be there, but is"
        for attribute in attributes:
            a, b = getattr(left[path], attribute), getattr(right[path], attribute)
            if a != b:
                return f"{path} must have {attribute} {a}, but has {b}"
    return None if structure == other else f" must have the structure {structure}, but has {other}"


def _pair(env: Env, what: str, found: Any) -> tuple[Any, Any]:
    if not (isinstance(found, tuple) and len(found) == 2):
        second, kind = "an observation" if what == "reset" else "a TimeStep", type(found).__name__
        raise UsageError(f"{env.name}: its {what} must return a pair, a state and {second}, but returns a {kind}")
    return found


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)
