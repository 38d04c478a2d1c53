"""Tabular policies, values and Q for finite MDPs: every state has its own parameters.

`obs` is the state's index, with any leading batch axes.
"""

import flax.linen as nn
import jax.numpy as jnp

from purepg.envs.finite_mdp import FiniteMDP
from purepg.equations.distributions import Categorical
from purepg.types import Array


class TabularPolicy(nn.Module):
    """A softmax over a table of logits, initially uniform.

    Attributes:
      rows: `[S]`, the row of logits that each observation reads; several states may share one.
      pinned: fixes the last action's logit at 0, so that two actions have a single parameter, p = sigmoid(theta).
    """

    num_actions: int
    rows: tuple[int, ...]
    pinned: bool = False

    @nn.compact
    def __call__(self, obs: Array) -> Categorical:
        shape = (max(self.rows) + 1, self.num_actions - self.pinned)
        logits = self.param("logits", nn.initializers.zeros, shape, float)
        if self.pinned:
            logits = jnp.pad(logits, ((0, 0), (0, 1)))
        return Categorical(logits[jnp.asarray(self.rows)[obs]])


class TabularValue(nn.Module):
    """V(s) `[...]`, or with `num_actions` Q(s, .) `[..., A]`, initially 0."""

    num_states: int
    num_actions: int | None = None

    @nn.compact
    def __call__(self, obs: Array) -> Array:
        shape = (self.num_states,) if self.num_actions is None else (self.num_states, self.num_actions)
        return self.param("value", nn.initializers.zeros, shape, float)[obs]


class TabularActorCritic(nn.Module):
    """pi(a|s) and V(s) from tables."""

    policy: TabularPolicy
    value: TabularValue

    def __call__(self, obs: Array) -> tuple[Categorical, Array]:
        return self.policy(obs), self.value(obs)


def tabular_policy(mdp: FiniteMDP, pinned: bool = False) -> TabularPolicy:
    """Returns the softmax policy, with one row of logits per value of `mdp.alias`."""
    return TabularPolicy(mdp.num_actions, tuple(mdp.alias.tolist()), pinned)


def tabular_actor_critic(mdp: FiniteMDP, pinned: bool = False) -> TabularActorCritic:
    """Returns `tabular_policy` and V of the true state as one network, for any actor-critic algorithm."""
    return TabularActorCritic(tabular_policy(mdp, pinned), TabularValue(mdp.num_states))
