"""Networks composed of a torso and heads: `ActorCritic` has a policy and V, `ActorQ` a policy and critics Q.

`obs` is raw or normalised and may have any leading batch axes; values have exactly those axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from purepg.config import Count, Positive, check
from purepg.envs.contract import space_name
from purepg.equations.distributions import Distribution, executed
from purepg.networks.heads import (
    SQUASHED,
    PolicyHead,
    PolicyKind,
    ValueHead,
    check_tanh_gaussian,
    given_legal,
    squashed_policy,
)
from purepg.networks.memory import MemoryKind, Recurrence, cell_of, first_of, memory_in, with_memory
from purepg.networks.observations import visible
from purepg.networks.torsos import Torso, TorsoKind, check_torso
from purepg.types import (
    Action,
    Array,
    Box,
    Discrete,
    Env,
    Key,
    LegalActions,
    Memory,
    Moment,
    MultiDiscrete,
    Network,
    Obs,
    ObservationSpace,
    Params,
    QNetwork,
    Space,
    UsageError,
    first_seen,
    observed,
    remembers,
    space_leaves,
)

UNBOUNDED = Box(np.full(1, -np.inf, np.float32), np.full(1, np.inf, np.float32))  # features, of any number


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the policy and the critic, which share no weights unless `shared`.

    Attributes:
      torso: mlp: dense layers. With convolutions before them, for images: cnn, one, of the size that MinAtar needs;
        nature, the three of DQN; impala, residual ones. simba: residual blocks of dense layers with layer norms.
      hidden: widths of the dense layers; with simba, one equal width for each block.
      activation: applied after every hidden layer.
      shared: use one torso for policy and critic.
      policy_scale: gain of the policy's last layer; a small gain makes the first policy nearly uniform (or centred).
      initial_std: initial standard deviation of a Gaussian policy; its logarithm is learned, independent of the state.
      layer_norm: normalise the features of every layer of the torso, of convolutions over their channels, before its
        activation (Ba et al. 2016).
      memory: what follows the torso and remembers the episode. gru and lstm: recurrent cells; lru: a linear recurrent
        unit, which trains on all steps of a window at once; stack: the last observations' features; transformer: a
        gated one that attends to the last steps. None: nothing.
      memory_size: width of the memory's features, None: 64; of a stack, the number of observations, None: 4; of a
        transformer, whose width is that of the torso, how many steps each layer looks back, None: 64.
    """

    torso: TorsoKind = "mlp"
    hidden: tuple[Count, ...] = (64, 64)
    activation: Literal["tanh", "relu", "silu"] = "tanh"
    shared: bool = False
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0
    layer_norm: bool = False
    memory: MemoryKind | None = None
    memory_size: Count | None = None


@dataclass(frozen=True)
class ActorQConfig:
    """Sizes of a policy and of the critics that score its actions; they share no weights.

    Attributes:
      policy: categorical, for discrete actions; gaussian, with a state-independent standard deviation; tanh_gaussian,
        squashed into bounded actions, with a state-dependent one; or deterministic, with a tanh for bounded actions.
      torso: mlp: dense layers. With convolutions before them, for images: cnn, one, of the size that MinAtar needs;
        nature, the three of DQN; impala, residual ones. simba: residual blocks of dense layers with layer norms.
      hidden: widths of the dense layers; with simba, one equal width for each block.
      activation: applied after every hidden layer.
      policy_scale: gain of the policy's last layer.
      initial_std: initial standard deviation of the policy, before any tanh.
      num_critics: number of critics K, each initialised independently.
      layer_norm: normalise the features of every layer of the torsos, of convolutions over their channels, before its
        activation (Ba et al. 2016).
      critic_layer_norm: the same in the critics' torsos alone (Ball et al. 2023).
      memory: what follows each torso and remembers the episode; a critic then reads a continuous action in one more
        dense layer, after it. gru and lstm: recurrent cells; lru: a linear recurrent unit, which trains on all steps of
        a window at once; stack: the last observations' features; transformer: a gated one that attends to the last
        steps. None: nothing.
      memory_size: width of the memory's features, None: 64; of a stack, the number of observations, None: 4; of a
        transformer, whose width is that of the torso, how many steps each layer looks back, None: 64.
    """

    policy: PolicyKind = "tanh_gaussian"
    torso: TorsoKind = "mlp"
    hidden: tuple[Count, ...] = (64, 64)
    activation: Literal["tanh", "relu", "silu"] = "relu"
    policy_scale: Positive = 0.01
    initial_std: Positive = 1.0
    num_critics: Count = 2
    layer_norm: bool = False
    critic_layer_norm: bool = False
    memory: MemoryKind | None = None
    memory_size: Count | None = None


Part = Callable[..., Any]  # a module class or a partial of one; called with `name=...`, it returns a module


def _seeing(torso: Callable[[Obs], Array], hidden: Sequence[str]) -> Callable[[Obs], Array]:
    """A torso on observations without some of their entries."""
    return lambda obs: torso(visible(obs, hidden))


def _remembered(
    seen: Any, torso: Callable[[Obs], Array], cell: Part | None, half: str, name: str = "memory"
) -> tuple[Memory, Array]:
    """(the memory after, features) of one half of a network; () and the torso's features where it has no cell."""
    if cell is None:
        return (), torso(observed(seen))
    return Recurrence(cell, name=name)(with_memory(seen, lambda memory: memory[half]), torso)


class ActorCritic(nn.Module):
    """pi(a|s) and V(s), composed of a torso and two heads.

    Attributes:
      torso: makes a module from observations, with any leading batch axes, to features `[..., n]`.
      policy_head: makes a module from features to a distribution.
      value_head: makes a module from features to `[..., 1]`; it is also passed `features=1`.
      shared: use one torso for policy and critic; otherwise each has its own torso and parameters.
      observation_space: the environment's. Where it has `LegalActions`, the policy takes legal actions only. None: all
        actions are legal.
      privileged: entries of a dict observation that the policy's torso does not get, as in `Env`.
      cell: makes what remembers, from the torso's features to others (`networks.memory`); the policy and the critic
        have one each, unless `shared`. None: the network is applied to observations, with no memory.
    """

    torso: Part
    policy_head: Part
    value_head: Part = ValueHead
    shared: bool = False
    observation_space: ObservationSpace = None
    privileged: tuple[str, ...] = ()
    cell: Part | None = None

    def __call__(self, seen: Any) -> tuple[Distribution, Array]:
        """(pi, V) of observations; with a cell, of a `Window` or a `Moment`."""
        return self.step(seen)[0]

    @nn.compact
    def step(self, seen: Any) -> tuple[tuple[Distribution, Array], Memory]:
        """((pi, V), the memory after `seen`)."""
        _refuse_shared(self.shared, self.privileged)
        hides = {"policy": self.privileged} if self.shared else {"policy": self.privileged, "value": ()}
        features, memory = {}, {}
        for half, hidden in hides.items():
            torso = _seeing(self.torso(name=f"{half}_torso"), hidden)
            memory[half], features[half] = _remembered(seen, torso, self.cell, half, f"{half}_memory")
        distribution = self.policy_head(name="policy_head")(features["policy"])
        value = self.value_head(features=1, name="value")(features.get("value", features["policy"]))
        return (given_legal(distribution, self.observation_space, observed(seen)), value.squeeze(-1)), memory

    def remember(self, params: Params, seen: Moment) -> tuple[tuple[Distribution, Array], Memory]:
        """`step` of these parameters, as `Network` has it."""
        return self.apply(params, seen, method="step")  # pyright: ignore

    def memory(self, num_envs: int) -> Memory:
        """The memory before an episode's first step: the policy's, and unless `shared` the critic's."""
        first = first_of(self.cell, num_envs)
        return {"policy": first} if self.shared else {"policy": first, "value": first}


class Policy(nn.Module):
    """pi(a|s), composed of a torso and a policy head; see `ActorCritic`."""

    torso: Part
    head: Part
    observation_space: ObservationSpace = None
    privileged: tuple[str, ...] = ()
    cell: Part | None = None

    def __call__(self, seen: Any) -> Distribution:
        return self.step(seen)[0]

    @nn.compact
    def step(self, seen: Any) -> tuple[Distribution, Memory]:
        """(pi, the memory after `seen`)."""
        torso = _seeing(self.torso(name="torso"), self.privileged)
        memory, x = _remembered(seen, torso, self.cell, "policy")
        return given_legal(self.head(name="head")(x), self.observation_space, observed(seen)), memory


class Critic(nn.Module):
    """Q(s, a), `[...]`; for discrete actions, Q(s, .) of all actions, `[..., A]`. With a cell, s is what is remembered.

    Attributes:
      torso: makes a module from an observation, or an observation and a continuous action, to features `[..., n]`.
      action_space: the action space.
      value_head: makes a module from features to `[..., features]`; it is also passed `features`, the number of values.
      cell: makes what remembers the observations, as in `ActorCritic`.
      joint: makes a module from the cell's features and a continuous action to features `[..., n]`; without a cell the
        torso reads the action.
    """

    torso: Part
    action_space: Space
    value_head: Part = ValueHead
    cell: Part | None = None
    joint: Part | None = None

    @nn.compact
    def __call__(self, seen: Any, action: Action | None = None) -> Array:
        if self.cell is None:
            obs = observed(seen)
            x = self.torso(name="torso")(*((obs,) if action is None else (obs, action)))
        else:
            x = self.remember(seen)[1]
            if action is not None:
                if self.joint is None:
                    raise UsageError(
                        "a Critic with a cell needs a joint, a module from features and an action to features"
                    )
                x = self.joint(name="joint")(x, action)
        if isinstance(self.action_space, Discrete):
            return self.value_head(features=self.action_space.n, name="q")(x)
        return self.value_head(features=1, name="q")(x).squeeze(-1)

    @nn.compact
    def remember(self, seen: Any) -> tuple[Memory, Array | None]:
        """(the memory after `seen`, features of what is remembered); () and None without a cell."""
        if self.cell is None:
            return (), None
        return _remembered(seen, self.torso(name="torso"), self.cell, "critic")


class ActorQ(NamedTuple):
    """A policy and K critics of one shape, with parameters `{"policy": ..., "critic": ...}`.

    The critics are one network whose parameters have a leading axis, so all are evaluated in one batch. `apply` reads
    only the policy's parameters, `q` and `q_of_all` only the critics'.

    Attributes:
      policy: `apply(params, obs)` returns a distribution.
      critic: `apply(params, obs, action)` returns `[...]`; or, for discrete actions, `apply(params, obs)` `[..., A]`.

    With cells, the policy and each critic remember for themselves; a critic may also be without.
    """

    policy: Any
    critic: Any
    action_space: Space
    num_critics: int = 1

    def init(self, key: Key, seen: Any) -> Params:
        k_policy, k_critic = jax.random.split(key)
        distribution, policy = self.policy.init_with_output(k_policy, seen)
        inputs = (seen, executed(distribution.mode())) if isinstance(self.action_space, Box) else (seen,)
        if remembers(seen):
            inputs = (with_memory(seen, lambda memory: {"critic": memory["critic"][0]}), *inputs[1:])
        critic = jax.vmap(lambda key: self.critic.init(key, *inputs))(jax.random.split(k_critic, self.num_critics))
        return {"policy": policy, "critic": critic}

    def apply(self, params: Params, seen: Any) -> tuple[Distribution, None]:
        return self.policy.apply(params["policy"], seen), None

    def q(self, params: Params, seen: Any, action: Action) -> Array:
        """Q_k(s, a) of every critic, `[K, ...]`."""
        if isinstance(self.action_space, Box):
            return self._critics(params, seen, action)
        assert isinstance(self.action_space, Discrete)
        taken = action[..., None] == jnp.arange(self.action_space.n)
        return jnp.sum(self.q_of_all(params, seen), axis=-1, where=taken)

    def q_of_all(self, params: Params, seen: Any) -> Array:
        """Q_k(s, .) of every critic and every discrete action, `[K, ..., A]`."""
        return self._critics(params, seen)

    def memory(self, num_envs: int) -> Memory:
        """The memory before an episode's first step: the policy's, and that of each critic."""
        policy, critic = (first_of(getattr(half, "cell", None), num_envs) for half in (self.policy, self.critic))
        return {"policy": policy, "critic": (critic,) * self.num_critics}

    def remember(self, params: Params, seen: Moment) -> tuple[tuple[Distribution, None], Memory]:
        """One step, as `Network` has it."""
        distribution, memory = self.policy.apply(params["policy"], seen, method="step")
        after, _ = self._critics(params, seen, method="remember")
        critics = tuple(jax.tree.map(lambda x, k=k: x[k], after) for k in range(self.num_critics))
        return (distribution, None), {"policy": memory, "critic": critics}

    def _critics(self, params: Params, seen: Any, *action: Array, method: Any = None) -> Any:
        def apply(critic, memory):
            own = with_memory(seen, lambda _: {"critic": memory}) if remembers(seen) else seen
            return self.critic.apply(critic, own, *action, method=method)

        memory = memory_in(seen)["critic"] if remembers(seen) else ((),) * self.num_critics
        if self.num_critics == 1:  # unbatched matrix products are faster
            one = apply(jax.tree.map(lambda x: x[0], params["critic"]), *memory)
            return jax.tree.map(lambda x: x[None], one)
        return jax.vmap(apply)(params["critic"], jax.tree.map(lambda *x: jnp.stack(x), *memory))


def actor_q(env: Env, config: ActorQConfig) -> ActorQ:
    """Returns the policy and critics for an environment. Raises UsageError if a space or a setting does not fit."""
    config = check(config)
    check_torso(env, config)
    refuse_multi_discrete(env, "actor_q")
    if isinstance(env.action_space, Discrete) != (config.policy == "categorical"):
        kind, takes = "discrete", "categorical, with sac_discrete or q_actor_critic"
        if isinstance(env.action_space, Box):
            gaussian = "gaussian or tanh_gaussian" if env.action_space.bounded else "gaussian"
            takes = f"{gaussian}, with sac or q_actor_critic, or deterministic, with dpg, ddpg or td3"
            kind = "continuous"
        raise UsageError(f"policy ({config.policy}) does not fit {env.name}, whose {kind} actions take {takes}")
    if config.policy == "tanh_gaussian" and isinstance(env.action_space, Box):
        check_tanh_gaussian(env.action_space, config.initial_std, f"those of {env.name}")
    in_critics = replace(config, layer_norm=config.layer_norm or config.critic_layer_norm)
    torso, critic_torso = (partial(Torso, env.observation_space, sizes) for sizes in (config, in_critics))
    space = env.action_space
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("policy", "policy_scale", "initial_std")}
    head: Part = partial(PolicyHead, space, **settings)
    if config.policy in SQUASHED:  # without a module around its layers, to match the checkpoints of earlier runs
        head = lambda name: partial(squashed_policy, space=space, **settings)  # noqa: E731
    cell = cell_of(config.memory, config.memory_size, config.hidden[-1])
    policy = Policy(torso, head, env.observation_space, env.privileged, cell)
    joint = partial(Torso, UNBOUNDED, replace(in_critics, torso="mlp", hidden=config.hidden[-1:]))
    return ActorQ(policy, Critic(critic_torso, space, cell=cell, joint=joint), space, config.num_critics)


def actor_critic(env: Env, config: NetworkConfig) -> ActorCritic:
    """Returns the network for an environment's spaces. Raises UsageError if a space or a setting does not fit."""
    config = check(config)
    check_torso(env, config)
    _refuse_shared(config.shared, env.privileged)
    torso = partial(Torso, env.observation_space, config)
    head = partial(PolicyHead, env.action_space, None, config.policy_scale, config.initial_std)
    cell = cell_of(config.memory, config.memory_size, config.hidden[-1])
    return ActorCritic(torso, head, ValueHead, config.shared, env.observation_space, env.privileged, cell)


def refuse_multi_discrete(env: Env, user: str) -> None:
    """Raises UsageError where actions are MultiDiscrete, for which no critic Q(s, a) is defined."""
    if isinstance(env.action_space, MultiDiscrete):
        actions = space_name(env.action_space)
        raise UsageError(
            f"{user} needs a critic Q(s, a), which the {actions} actions of {env.name} do not have: use an algorithm "
            "with V(s), such as ppo, with actor_critic"
        )


def _refuse_shared(shared: bool, privileged: Sequence[str]) -> None:
    if shared and privileged:
        raise UsageError(f"shared (True) must be off: only the critic may read the privileged {', '.join(privileged)}")


def _check_reads(env: Env, network: Network | QNetwork) -> None:
    """Raises UsageError where a composed policy does not know of legal actions or of privileged observations."""
    policy = getattr(network, "policy", network)
    if not isinstance(policy, ActorCritic | Policy):
        return
    masked = any(isinstance(space, LegalActions) for space in space_leaves(env.observation_space))
    if masked and policy.observation_space is None:
        raise UsageError(f"{env.name} says which actions are legal: give {type(policy).__name__} its observation_space")
    if set(policy.privileged) != set(env.privileged):
        name, entries = type(policy).__name__, ", ".join(env.privileged) or "none"
        raise UsageError(f"{env.name}'s privileged observations are {entries}: give {name} the same, as privileged")


def output(env: Env, network: Network | QNetwork) -> tuple[Distribution, Any]:
    """Returns the shapes and kinds of a network's output for one observation, as (distribution, V or None). Raises
    UsageError if the network returns something else, or a composed one ignores what the policy must not do or see."""
    _check_reads(env, network)

    def apply(key):
        _, obs = env.reset(key)
        seen = first_seen(network, obs)
        return network.apply(network.init(key, seen), seen)

    found = jax.eval_shape(apply, jax.eval_shape(jax.random.key, 0))
    if not isinstance(found, tuple) or len(found) != 2 or hasattr(found, "mode"):  # a distribution is itself a tuple
        kind = type(found).__name__
        raise UsageError(f"a network must return (distribution, value), but this one returns a {kind} on {env.name}")
    return found


def require_policy_gradient(env: Env, network: Network, algorithm: str, value: bool = True) -> None:
    """Raises UsageError if the policy has no log-probabilities, or if `value` is set and the network has no V."""
    policy, found = output(env, network)
    if not hasattr(policy, "log_prob"):
        kind = type(policy).__name__
        raise UsageError(f"{algorithm} needs a stochastic policy, but that of this network on {env.name} is a {kind}")
    if value and found is None:
        raise UsageError(f"{algorithm} needs a critic V(s), which this network does not have: use actor_critic")
