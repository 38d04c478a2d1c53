"""Heads: networks from features to a distribution over actions, or to values."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from purepg.config import Positive, is_known
from purepg.envs.contract import legal_actions, space_name
from purepg.equations.distributions import (
    Categorical,
    Deterministic,
    DiagGaussian,
    Distribution,
    MultiCategorical,
    TanhGaussian,
)
from purepg.types import Array, Box, Discrete, MultiDiscrete, Obs, ObservationSpace, Space, UsageError

PolicyKind = Literal["categorical", "gaussian", "tanh_gaussian", "deterministic"]
SQUASHED = ("tanh_gaussian", "deterministic")
LOG_STD_RANGE = (-5.0, 2.0)  # of a tanh-Gaussian policy, whose standard deviation depends on the state


def squashed_policy(
    x: Array, space: Box, policy: PolicyKind, policy_scale: float, initial_std: float
) -> Deterministic | TanhGaussian:
    """A deterministic or tanh-Gaussian policy on features. Its layers belong to the module that calls it."""
    size = int(np.prod(space.shape))
    init = nn.initializers.orthogonal(policy_scale)
    mean = nn.Dense(size, kernel_init=init, name="mean")(x)
    if policy == "deterministic":
        return Deterministic(jnp.tanh(mean) if space.bounded else mean)
    # A smooth map into the range; a clip would have no gradient outside it.
    low, high = LOG_STD_RANGE
    at_start = jnp.arctanh(2 * (jnp.log(initial_std) - low) / (high - low) - 1)
    raw = nn.Dense(size, kernel_init=init, name="log_std")(x) + at_start
    return TanhGaussian(mean, low + 0.5 * (high - low) * (1 + jnp.tanh(raw)))


class PolicyHead(nn.Module):
    """A distribution over actions, from features `[..., n]`.

    Attributes:
      space: the action space.
      policy: the kind, as in `ActorQConfig`; None: categorical for discrete actions, gaussian for continuous ones.
        Categorical policies of a MultiDiscrete space choose its entries independently, given the observation.
      policy_scale: gain of the last layer; a small gain makes the first policy nearly uniform (or centred).
      initial_std: initial standard deviation, before any tanh.
    """

    space: Space
    policy: PolicyKind | None = None
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Distribution:
        space, is_discrete = self.space, isinstance(self.space, Discrete | MultiDiscrete)
        policy = self.policy or ("categorical" if is_discrete else "gaussian")
        if is_discrete != (policy == "categorical"):
            raise UsageError(
                f"policy ({policy}) does not fit {space_name(space)}: categorical is for discrete actions only"
            )
        if policy in SQUASHED:
            assert isinstance(space, Box)
            if policy == "tanh_gaussian":
                check_tanh_gaussian(space, self.initial_std, f"those of {space}")
            return squashed_policy(x, space, policy, self.policy_scale, self.initial_std)
        init = nn.initializers.orthogonal(self.policy_scale)
        if isinstance(space, Discrete):
            return Categorical(nn.Dense(space.n, kernel_init=init, name="logits")(x))
        if isinstance(space, MultiDiscrete):
            return _multi_categorical(nn.Dense(sum(space.sizes), kernel_init=init, name="logits")(x), space.sizes)
        size = int(np.prod(space.shape))
        mean = nn.Dense(size, kernel_init=init, name="mean")(x)
        log_std = self.param("log_std", nn.initializers.constant(jnp.log(self.initial_std)), (size,))
        return DiagGaussian(mean, jnp.broadcast_to(log_std, mean.shape))


def _multi_categorical(logits: Array, sizes: Sequence[int]) -> MultiCategorical:
    """The policy of D independent choices, from the logits `[..., sum of sizes]` of all of them."""
    ends = np.cumsum(sizes)
    rows = [logits[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]
    batch = [(0, 0)] * (logits.ndim - 1)
    padded = [jnp.pad(row, [*batch, (0, max(sizes) - row.shape[-1])], constant_values=-jnp.inf) for row in rows]
    return MultiCategorical(jnp.stack(padded, axis=-2))


def given_legal(distribution: Distribution, space: ObservationSpace, obs: Obs) -> Distribution:
    """The distribution over the actions that the observation says are legal; unchanged where `space` has no
    `LegalActions`. Raises UsageError if the distribution has no `masked`."""
    legal = None if space is None else legal_actions(space, obs)
    if legal is None:
        return distribution
    if not hasattr(distribution, "masked"):
        kind = type(distribution).__name__
        raise UsageError(
            f"observations say which actions are legal, but a {kind} policy cannot be masked: use Categorical"
        )
    return distribution.masked(legal)


class ValueHead(nn.Dense):
    """Values `[..., features]` of features `[..., n]`."""

    features: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.orthogonal(1.0)


def check_tanh_gaussian(space: Box, initial_std: Any, actions: str) -> None:
    """Raises UsageError if a tanh-Gaussian policy cannot have this standard deviation or act in this space."""
    low, high = LOG_STD_RANGE
    if is_known(initial_std) and not math.exp(low) < initial_std < math.exp(high):
        raise UsageError(f"initial_std ({initial_std}) must be above {math.exp(low):.2g} and below 7.4")
    if not space.bounded:
        raise UsageError(f"policy (tanh_gaussian) needs bounded actions, but {actions} are unbounded: try gaussian")
