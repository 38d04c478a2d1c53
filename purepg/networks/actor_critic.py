"""flax.linen networks. Algorithms see `init(key, obs)` and `apply(params, obs) -> (distribution, value)`; those that
learn a Q see `q(params, obs, action)` too.

`obs` is raw or normalised, with any leading batch axes; `value` has exactly those axes.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from purepg.config import Count, Positive, check, is_known
from purepg.equations.distributions import (
    Categorical,
    Deterministic,
    DiagGaussian,
    Distribution,
    TanhGaussian,
    executed,
)
from purepg.types import (
    Action,
    Array,
    Box,
    Discrete,
    Env,
    Key,
    Network,
    Obs,
    ObservationSpace,
    Params,
    QNetwork,
    Space,
    UsageError,
    space_leaves,
)

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu}
LOG_STD_RANGE = (-5.0, 2.0)  # of a tanh-Gaussian policy, whose deviation depends on the state


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
    hidden: tuple[Count, ...] = (64, 64)
    activation: Literal["tanh", "relu", "silu"] = "tanh"
    shared: bool = False
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0


@dataclass(frozen=True)
class ActorQConfig:
    """Widths and shapes of a policy and of the critics that score its actions; they share no weights.

    Attributes:
      policy: categorical, for discrete actions; gaussian, with a deviation that does not depend on the state;
        tanh_gaussian, squashed into bounded actions, with one that does; or deterministic, with a tanh where
        actions are bounded.
      torso: what reads the observation: dense layers, or before them a convolution of the size that MinAtar asks for.
      hidden: widths of the dense layers.
      activation: after every hidden layer.
      policy_scale: gain of the policy's last layer.
      initial_std: a policy's standard deviation at the start, before any tanh.
      num_critics: critics, K, from initialisations of their own.
    """

    policy: Literal["categorical", "gaussian", "tanh_gaussian", "deterministic"] = "tanh_gaussian"
    torso: Literal["mlp", "cnn"] = "mlp"
    hidden: tuple[Count, ...] = (64, 64)
    activation: Literal["tanh", "relu", "silu"] = "relu"
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0
    num_critics: Count = 2


def as_features(obs: Array, space: Space) -> Array:
    """Observations as float32: a Discrete one as one-hot, anything else (bool, uint8, int) by value."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(obs, space.n, dtype=jnp.float32)
    return obs.astype(jnp.float32)


def flat_features(obs: Obs, space: ObservationSpace) -> Array:
    """`as_features` of every leaf of an observation, side by side in one axis: `[..., n]`."""

    def flat(obs, space):
        x = as_features(obs, space)
        rank = len(space.shape) if isinstance(space, Box) else 1
        return x.reshape(*x.shape[: x.ndim - rank], -1)

    leaves = [flat(*pair) for pair in zip(jax.tree.leaves(obs), space_leaves(space), strict=True)]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=-1)


class Torso(nn.Module):
    """Features `[..., hidden[-1]]` of an observation, or of one and an action. Orthogonal initialisation, as PPO's
    implementations do."""

    space: ObservationSpace
    config: NetworkConfig | ActorQConfig

    @nn.compact
    def __call__(self, obs: Obs, action: Action | None = None) -> Array:
        c = check(self.config)
        activation = ACTIVATIONS[c.activation]
        dense = nn.initializers.orthogonal(math.sqrt(2))
        if c.torso == "cnn":  # 16 filters of 3 x 3 (Young & Tian 2019)
            x = as_features(obs, self.space)
            x = activation(nn.Conv(16, (3, 3), padding="VALID", kernel_init=dense, name="conv")(x))
            x = x.reshape(*x.shape[:-3], -1)
        else:
            x = flat_features(obs, self.space)
        if action is not None:
            x = jnp.concatenate([x, action], axis=-1)
        for i, width in enumerate(c.hidden):
            x = activation(nn.Dense(width, kernel_init=dense, name=f"hidden_{i}")(x))
        return x


class PolicyHead(nn.Module):
    """The distribution over actions that the space asks for."""

    space: Space
    config: NetworkConfig | ActorQConfig

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

    observation_space: ObservationSpace
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


class Policy(nn.Module):
    """pi(a|s) of the kind that `config.policy` names."""

    observation_space: ObservationSpace
    action_space: Space
    config: ActorQConfig

    @nn.compact
    def __call__(self, obs: Obs) -> Distribution:
        c = self.config
        x = Torso(self.observation_space, c, name="torso")(obs)
        if c.policy in ("categorical", "gaussian"):
            return PolicyHead(self.action_space, c, name="head")(x)
        assert isinstance(self.action_space, Box)
        size = int(np.prod(self.action_space.shape))
        init = nn.initializers.orthogonal(c.policy_scale)
        mean = nn.Dense(size, kernel_init=init, name="mean")(x)
        if c.policy == "deterministic":
            return Deterministic(jnp.tanh(mean) if self.action_space.bounded else mean)
        # A smooth map into the range, where a clip would have no gradient beyond its ends.
        low, high = LOG_STD_RANGE
        at_start = jnp.arctanh(2 * (jnp.log(c.initial_std) - low) / (high - low) - 1)
        raw = nn.Dense(size, kernel_init=init, name="log_std")(x) + at_start
        return TanhGaussian(mean, low + 0.5 * (high - low) * (1 + jnp.tanh(raw)))


class Critic(nn.Module):
    """Q(s, a), `[...]`; or, where actions are discrete, Q(s, .) of all of them, `[..., A]`."""

    observation_space: ObservationSpace
    action_space: Space
    config: ActorQConfig

    @nn.compact
    def __call__(self, obs: Obs, action: Action | None = None) -> Array:
        x = Torso(self.observation_space, self.config, name="torso")(obs, action)
        init = nn.initializers.orthogonal(1.0)
        if isinstance(self.action_space, Discrete):
            return nn.Dense(self.action_space.n, kernel_init=init, name="q")(x)
        return nn.Dense(1, kernel_init=init, name="q")(x).squeeze(-1)


class ActorQ(NamedTuple):
    """A policy and K critics of one shape, as a network whose params are `{"policy", "critic"}`.

    The critics are one network with a leading axis on its parameters, evaluated in one batch. `apply` reads the
    policy's half of the parameters alone, `q` and `q_of_all` the critics'.

    Attributes:
      policy: its `apply(params, obs)` gives a distribution.
      critic: its `apply(params, obs, action)` gives `[...]`, or, where actions are discrete, `apply(params, obs)` gives
        `[..., A]`.
    """

    policy: Any
    critic: Any
    action_space: Space
    num_critics: int = 1

    def init(self, key: Key, obs: Obs) -> Params:
        k_policy, k_critic = jax.random.split(key)
        distribution, policy = self.policy.init_with_output(k_policy, obs)
        inputs = (obs, executed(distribution.mode())) if isinstance(self.action_space, Box) else (obs,)
        critic = jax.vmap(lambda key: self.critic.init(key, *inputs))(jax.random.split(k_critic, self.num_critics))
        return {"policy": policy, "critic": critic}

    def apply(self, params: Params, obs: Obs) -> tuple[Distribution, None]:
        return self.policy.apply(params["policy"], obs), None

    def q(self, params: Params, obs: Obs, action: Action) -> Array:
        """Q_k(s, a) of every critic, `[K, ...]`."""
        if isinstance(self.action_space, Box):
            return self._critics(params, obs, action)
        taken = action[..., None] == jnp.arange(self.action_space.n)
        return jnp.sum(self.q_of_all(params, obs), axis=-1, where=taken)

    def q_of_all(self, params: Params, obs: Obs) -> Array:
        """Q_k(s, .) of every critic and every discrete action, `[K, ..., A]`."""
        return self._critics(params, obs)

    def _critics(self, params: Params, *inputs: Array) -> Array:
        if self.num_critics == 1:  # plain products are faster than batched ones
            return self.critic.apply(jax.tree.map(lambda x: x[0], params["critic"]), *inputs)[None]
        return jax.vmap(lambda critic: self.critic.apply(critic, *inputs))(params["critic"])


def actor_q(env: Env, config: ActorQConfig) -> ActorQ:
    """Policy and critics for an environment's spaces.

    Raises:
      UsageError: a space or a setting that no network here fits.
    """
    config = check(config)
    _check_torso(env, config)
    if isinstance(env.action_space, Discrete) != (config.policy == "categorical"):
        kind, takes = "discrete", "categorical, with sac_discrete or q_actor_critic"
        if isinstance(env.action_space, Box):
            gaussian = "gaussian or tanh_gaussian" if env.action_space.bounded else "gaussian"
            takes = f"{gaussian}, with sac or q_actor_critic, or deterministic, with dpg, ddpg or td3"
            kind = "continuous"
        raise UsageError(f"policy ({config.policy}) does not fit {env.name}, whose {kind} actions take {takes}")
    if config.policy == "tanh_gaussian" and isinstance(env.action_space, Box):
        low, high = LOG_STD_RANGE
        if is_known(config.initial_std) and not math.exp(low) < config.initial_std < math.exp(high):
            raise UsageError(f"initial_std ({config.initial_std}) must be above {math.exp(low):.2g}, below 7.4")
        if not env.action_space.bounded:
            raise UsageError(f"policy (tanh_gaussian) needs bounded actions; those of {env.name} are not: try gaussian")
    spaces = (env.observation_space, env.action_space)
    return ActorQ(Policy(*spaces, config), Critic(*spaces, config), env.action_space, config.num_critics)


def actor_critic(env: Env, config: NetworkConfig) -> ActorCritic:
    """The network for an environment's spaces.

    Raises:
      UsageError: a space or a setting that no network here fits.
    """
    config = check(config)
    _check_torso(env, config)
    return ActorCritic(env.observation_space, env.action_space, config)


def _check_torso(env: Env, config: NetworkConfig | ActorQConfig) -> None:
    obs_space, action_space = env.observation_space, env.action_space
    if not config.hidden:
        raise UsageError("hidden (none) must hold positive widths")
    if config.torso == "cnn" and not (isinstance(obs_space, Box) and len(obs_space.shape) == 3):
        raise UsageError(f"torso 'cnn' needs observations [height, width, channels]; {env.name} has {obs_space}")
    if isinstance(action_space, Box) and len(action_space.shape) != 1:
        raise UsageError(f"a Box action space must be one-dimensional; {env.name} has shape {action_space.shape}")


def output(env: Env, network: Network | QNetwork) -> tuple[Distribution, Any]:
    """Shapes and kinds of what a network gives for one observation, (distribution, V or None).

    Raises:
      UsageError: it gives something else.
    """

    def apply(key):
        _, obs = env.reset(key)
        return network.apply(network.init(key, obs), obs)

    found = jax.eval_shape(apply, jax.eval_shape(jax.random.key, 0))
    if not isinstance(found, tuple) or len(found) != 2 or hasattr(found, "mode"):  # a distribution alone is a tuple too
        kind = type(found).__name__
        raise UsageError(f"a network must give (distribution, value); this one gives a {kind} on {env.name}")
    return found


def require_policy_gradient(env: Env, network: Network, algorithm: str, value: bool = True) -> None:
    """Raises UsageError where a network's policy has no log-probabilities, or the network no V though `value` asks."""
    policy, found = output(env, network)
    if not hasattr(policy, "log_prob"):
        kind = type(policy).__name__
        raise UsageError(f"{algorithm} needs a stochastic policy; that of this network on {env.name} is a {kind}")
    if value and found is None:
        raise UsageError(f"{algorithm} needs a critic V(s), which this network has not; one of actor_critic has")
