"""flax.linen networks. Algorithms see `init(key, obs)` and `apply(params, obs) -> (distribution, value)`.

`obs` is raw or normalised, with any leading batch axes; `value` has exactly those axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from purepg import normalize
from purepg.config import Positive, check
from purepg.distributions import Categorical, DiagGaussian
from purepg.envs.finite_mdp import FiniteMDP
from purepg.normalize import Moments
from purepg.types import Act, Actor, Array, Box, Discrete, Env, Network, Obs, Params, Space, UsageError

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu}


@dataclass(frozen=True)
class NetworkConfig:
    """Widths and shapes of the policy and the critic, which share no weights unless `shared`.

    Attributes:
      torso: what reads the observation: dense layers, or before them a convolution of the size that MinAtar asks for.
      hidden: widths of the dense layers.
      activation: after every hidden layer.
      shared: one torso for policy and critic.
      policy_scale: gain of the policy's last layer; small, so that the first policy is nearly uniform (or centred).
      initial_std: a Gaussian policy's standard deviation at the start; state-independent, learned as its logarithm.
    """

    torso: Literal["mlp", "cnn"] = "mlp"
    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu", "silu"] = "tanh"
    shared: bool = False
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0


def as_features(obs: Obs, space: Space) -> Array:
    """Observations as float32: a Discrete one as one-hot, anything else (bool, uint8, int) by value."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(obs, space.n)
    return obs.astype(jnp.float32)


class Torso(nn.Module):
    """Features `[..., hidden[-1]]` of an observation. Orthogonal initialisation, as PPO's implementations do."""

    space: Space
    config: NetworkConfig

    @nn.compact
    def __call__(self, obs: Obs) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        dense = nn.initializers.orthogonal(math.sqrt(2))
        x = as_features(obs, self.space)
        rank = len(self.space.shape) if isinstance(self.space, Box) else 1
        if self.config.torso == "cnn":  # 16 filters of 3 x 3 (Young & Tian 2019)
            x = activation(nn.Conv(16, (3, 3), padding="VALID", kernel_init=dense, name="conv")(x))
        x = x.reshape(*x.shape[: x.ndim - rank], -1)
        for i, width in enumerate(self.config.hidden):
            x = activation(nn.Dense(width, kernel_init=dense, name=f"hidden_{i}")(x))
        return x


class PolicyHead(nn.Module):
    """The distribution over actions that the space asks for."""

    space: Space
    config: NetworkConfig

    @nn.compact
    def __call__(self, x: Array) -> Categorical | DiagGaussian:
        init = nn.initializers.orthogonal(self.config.policy_scale)
        if isinstance(self.space, Discrete):
            return Categorical(nn.Dense(self.space.n, kernel_init=init, name="logits")(x))
        size = int(np.prod(self.space.shape))
        mean = nn.Dense(size, kernel_init=init, name="mean")(x)
        log_std = self.param("log_std", nn.initializers.constant(jnp.log(self.config.initial_std)), (size,))
        return DiagGaussian(mean, jnp.broadcast_to(log_std, mean.shape))


class ActorCritic(nn.Module):
    """pi(a|s) and V(s)."""

    observation_space: Space
    action_space: Space
    config: NetworkConfig

    @nn.compact
    def __call__(self, obs: Obs) -> tuple[Categorical | DiagGaussian, Array]:
        policy_features = Torso(self.observation_space, self.config, name="policy_torso")(obs)
        value_features = (
            policy_features
            if self.config.shared
            else Torso(self.observation_space, self.config, name="value_torso")(obs)
        )
        distribution = PolicyHead(self.action_space, self.config, name="policy_head")(policy_features)
        value = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0), name="value")(value_features)
        return distribution, value.squeeze(-1)


def actor_critic(env: Env, config: NetworkConfig) -> ActorCritic:
    """The network for an environment's spaces.

    Raises:
      UsageError: a space or a setting that no network here fits.
    """
    check(config)
    obs_space, action_space = env.observation_space, env.action_space
    if not config.hidden or min(config.hidden) < 1:
        raise UsageError(f"hidden ({_join(config.hidden)}) must hold positive widths")
    if config.torso == "cnn" and not (isinstance(obs_space, Box) and len(obs_space.shape) == 3):
        raise UsageError(f"torso 'cnn' needs observations [height, width, channels]; {env.name} has {obs_space}")
    if isinstance(action_space, Box) and len(action_space.shape) != 1:
        raise UsageError(f"a Box action space must be one-dimensional; {env.name} has shape {action_space.shape}")
    return ActorCritic(obs_space, action_space, config)


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


def actor(network: Network, params: Params, moments: Moments | None = None) -> Actor:
    """The acting side of a policy: raw observations to sampled actions and their log-probabilities."""

    def distribution(obs):
        return network.apply(params, normalize.apply(moments, obs))[0]

    def noise(key, obs):
        return jax.eval_shape(distribution, obs).noise(key)

    def act(noise, obs):
        policy = distribution(obs)
        action = policy.transform(noise)
        return action, policy.log_prob(action)

    return Actor(noise, act)


def evaluation_policy(network: Network, params: Params, deterministic: bool, moments: Moments | None = None) -> Act:
    """Raw observations to actions: sampled, or the distribution's mode."""

    def act(key, obs):
        distribution, _ = network.apply(params, normalize.apply(moments, obs))
        return distribution.mode() if deterministic else distribution.sample(key)

    return act


def _join(values: Sequence[int]) -> str:
    return "x".join(map(str, values)) or "none"
