"""Policies, values and Q from tables: networks of finite MDPs, in which every state has parameters of its own.

`obs` is the state's number, with any leading batch axes.
"""

import flax.linen as nn
import jax.numpy as jnp

from purepg.envs.finite_mdp import FiniteMDP
from purepg.equations.distributions import Categorical
from purepg.types import Array


class TabularPolicy(nn.Module):
    """A softmax over free logits, one row of them for each number in `rows`; at first uniform.

    rows: the row of logits that each observation reads, `[S]`; several states may share one.
    pinned: the last action's logit is 0 and not a parameter, so that two actions have a single one, p = sigmoid(theta).
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
    """A number for each observation, V(s) `[...]`; or, with `num_actions`, one for each action too, Q(s, .) `[..., A]`.
    All 0 at first."""

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
    """The softmax policy that tells states apart as far as `mdp.alias` does."""
    return TabularPolicy(mdp.num_actions, tuple(mdp.alias.tolist()), pinned)


def tabular_value(mdp: FiniteMDP) -> TabularValue:
    """V, which sees the true state."""
    return TabularValue(mdp.num_states)


def tabular_q(mdp: FiniteMDP) -> TabularValue:
    """Q, which sees the true state, and gives all actions' values at once."""
    return TabularValue(mdp.num_states, mdp.num_actions)


def tabular_actor_critic(mdp: FiniteMDP, pinned: bool = False) -> TabularActorCritic:
    """The network that every algorithm takes: `tabular_policy` and `tabular_value`."""
    return TabularActorCritic(tabular_policy(mdp, pinned), tabular_value(mdp))
