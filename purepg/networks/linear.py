"""A linear policy and a quadratic Q, which represent the solution of linear-quadratic regulation exactly."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from purepg.equations.distributions import Deterministic
from purepg.networks.actor_critic import ActorQ
from purepg.types import Action, Array, Box, Env, UsageError


@dataclass(frozen=True)
class LinearQuadraticConfig:
    """Has no settings: there is one critic, and all parameters start at 0."""


class LinearPolicy(nn.Module):
    """mu(x) = W^T x with W `[n, m]`, initially 0."""

    num_actions: int

    @nn.compact
    def __call__(self, obs: Array) -> Deterministic:
        weight = self.param("weight", nn.initializers.zeros, (obs.shape[-1], self.num_actions), float)
        return Deterministic(obs @ weight)


class QuadraticQ(nn.Module):
    """Q(x, u) = z^T M z + offset with z = (x, u), `[...]`; M `[n + m, n + m]` and the offset are initially 0."""

    @nn.compact
    def __call__(self, obs: Array, action: Action) -> Array:
        z = jnp.concatenate([obs, action], axis=-1)
        matrix = self.param("matrix", nn.initializers.zeros, (z.shape[-1], z.shape[-1]), float)
        offset = self.param("offset", nn.initializers.zeros, (), float)
        return jnp.sum((z @ matrix) * z, axis=-1) + offset


def linear_quadratic(env: Env, config: LinearQuadraticConfig) -> ActorQ:
    """Returns the network for vector observations and unbounded actions. Raises UsageError for other spaces."""
    del config
    obs_space, action_space = env.observation_space, env.action_space
    vectors = isinstance(obs_space, Box) and len(obs_space.shape) == 1
    if not vectors or not isinstance(action_space, Box) or action_space.bounded:
        raise UsageError(f"a linear policy needs vector observations and unbounded actions, unlike {env.name}: try lqr")
    return ActorQ(LinearPolicy(action_space.shape[0]), QuadraticQ(), action_space)
