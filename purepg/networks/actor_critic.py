"""flax.linen networks. Algorithms see `init(key, obs)` and `apply(params, obs) -> (distribution, value)`; those that
learn a Q see `q(params, obs, action)` too.

`obs` is raw or normalised, with any leading batch axes; `value` has exactly those axes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from purepg.config import Count, Positive, check
from purepg.equations.distributions import Distribution, executed
from purepg.networks.heads import SQUASHED, PolicyHead, PolicyKind, ValueHead, check_tanh_gaussian, squashed_policy
from purepg.networks.torsos import Torso, check_torso
from purepg.types import Action, Array, Box, Discrete, Env, Key, Network, Obs, Params, QNetwork, Space, UsageError


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

    policy: PolicyKind = "tanh_gaussian"
    torso: Literal["mlp", "cnn"] = "mlp"
    hidden: tuple[Count, ...] = (64, 64)
    activation: Literal["tanh", "relu", "silu"] = "relu"
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0
    num_critics: Count = 2


Part = Callable[..., Any]  # called with `name=...`, gives a module: a module's class, or a partial of one


class ActorCritic(nn.Module):
    """pi(a|s) and V(s), composed of a torso and two heads.

    Attributes:
      torso: its module maps observations, with any leading batch axes, to features `[..., n]`.
      policy_head: its module maps features to a distribution.
      value_head: called with `features=1` too; its module maps features to `[..., 1]`.
      shared: one torso for policy and critic; otherwise each has its own, with parameters of its own.
    """

    torso: Part
    policy_head: Part
    value_head: Part = ValueHead
    shared: bool = False

    @nn.compact
    def __call__(self, obs: Obs) -> tuple[Distribution, Array]:
        policy_features = self.torso(name="policy_torso")(obs)
        value_features = policy_features if self.shared else self.torso(name="value_torso")(obs)
        distribution = self.policy_head(name="policy_head")(policy_features)
        value = self.value_head(features=1, name="value")(value_features)
        return distribution, value.squeeze(-1)


class Policy(nn.Module):
    """pi(a|s), composed of a torso and a policy head; see `ActorCritic`."""

    torso: Part
    head: Part

    @nn.compact
    def __call__(self, obs: Obs) -> Distribution:
        x = self.torso(name="torso")(obs)
        return self.head(name="head")(x)


class Critic(nn.Module):
    """Q(s, a), `[...]`; or, where actions are discrete, Q(s, .) of all of them, `[..., A]`.

    Attributes:
      torso: its module maps an observation, or one and a continuous action, to features `[..., n]`.
      action_space: of the actions.
      value_head: called with `features`, the number of values, too; its module maps features to `[..., features]`.
    """

    torso: Part
    action_space: Space
    value_head: Part = ValueHead

    @nn.compact
    def __call__(self, obs: Obs, action: Action | None = None) -> Array:
        inputs = (obs,) if action is None else (obs, action)
        x = self.torso(name="torso")(*inputs)
        if isinstance(self.action_space, Discrete):
            return self.value_head(features=self.action_space.n, name="q")(x)
        return self.value_head(features=1, name="q")(x).squeeze(-1)


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
    check_torso(env, config)
    if isinstance(env.action_space, Discrete) != (config.policy == "categorical"):
        kind, takes = "discrete", "categorical, with sac_discrete or q_actor_critic"
        if isinstance(env.action_space, Box):
            gaussian = "gaussian or tanh_gaussian" if env.action_space.bounded else "gaussian"
            takes = f"{gaussian}, with sac or q_actor_critic, or deterministic, with dpg, ddpg or td3"
            kind = "continuous"
        raise UsageError(f"policy ({config.policy}) does not fit {env.name}, whose {kind} actions take {takes}")
    if config.policy == "tanh_gaussian" and isinstance(env.action_space, Box):
        check_tanh_gaussian(env.action_space, config.initial_std, f"those of {env.name}")
    torso, space = partial(Torso, env.observation_space, config), env.action_space
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("policy", "policy_scale", "initial_std")}
    if config.policy in SQUASHED:
        # These layers are the policy's own, without a head around them, as in the checkpoints of every earlier run.
        def head(name: str) -> Callable[[Array], Distribution]:
            return partial(squashed_policy, space=space, **settings)
    else:
        head = partial(PolicyHead, space, **settings)
    return ActorQ(Policy(torso, head), Critic(torso, space), space, config.num_critics)


def actor_critic(env: Env, config: NetworkConfig) -> ActorCritic:
    """The network for an environment's spaces.

    Raises:
      UsageError: a space or a setting that no network here fits.
    """
    config = check(config)
    check_torso(env, config)
    torso = partial(Torso, env.observation_space, config)
    head = partial(PolicyHead, env.action_space, None, config.policy_scale, config.initial_std)
    return ActorCritic(torso, head, shared=config.shared)


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
