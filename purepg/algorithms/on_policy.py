"""What the algorithms on rollouts share: their state, the data of one update, and what is worth watching in it.

An algorithm's own file has its weight of grad log pi, its loss and its step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import RolloutConfig, TrustRegionConfig
from purepg.envs.contract import check_environment
from purepg.equations import advantages
from purepg.equations.diagnostics import SPARSE, explained_variance, policy_change
from purepg.equations.distributions import Distribution
from purepg.equations.losses import squared_error
from purepg.experience import normalize
from purepg.experience.acting import actor, evaluation_policy
from purepg.experience.normalize import Moments
from purepg.experience.rollout import RolloutState, rollout, start, truncation_as_termination
from purepg.optimize import TrainState, init_train_state, minibatch_epochs
from purepg.types import Action, Actor, Algorithm, Array, Env, Key, Metrics, Network, Obs, Params, State, UpdateSteps


class Learner(NamedTuple):
    train_state: TrainState
    obs_moments: Moments | None
    return_moments: Moments | None
    own: Any = None  # what an algorithm adapts beside its parameters, such as the coefficient of a penalty

    @property
    def params(self) -> Params:
        return self.train_state.params


class World(NamedTuple):
    envs: RolloutState
    running_return: Array | None  # [N], of the running episode, discounted


class Data(NamedTuple):
    """A rollout as an update reads it; every leaf is `[T, N, ...]`."""

    obs: Obs  # normalised
    action: Action
    log_prob: Array
    reward: Array  # scaled
    terminated: Array
    truncated: Array
    value: Array  # V(s_t); 0 of a network without V
    next_value: Array  # V of the observation before any reset; 0 of a network without V
    policy: Distribution  # that acted
    next_obs: Obs  # normalised, before any reset

    def gae(self, gamma: Array | float, lam: Array | float) -> tuple[Array, Array]:
        """(advantage, target) by `advantages.gae`."""
        return advantages.gae(*self._estimate, gamma, lam)

    def n_step(self, gamma: Array | float, n: int) -> tuple[Array, Array]:
        """(advantage, target) by `advantages.n_step`."""
        return advantages.n_step(*self._estimate, gamma, n)

    @property
    def _estimate(self) -> tuple[Array, Array, Array, Array, Array]:
        return self.reward, self.value, self.next_value, self.terminated, self.truncated


Step = Callable[[Key, State, Array], tuple[State, Metrics]]


def assemble(
    env: Env,
    network: Network,
    c: RolloutConfig,
    tx: optax.GradientTransformation,
    step: Step,
    init_own: Callable[[], Any] = lambda: None,
    init_params: Callable[[optax.GradientTransformation, Params], TrainState] = init_train_state,
) -> Algorithm:
    """The algorithm of a step, with the state that `collect` advances.

    Args:
      init_own: gives the initial value of `Learner.own`.
      init_params: `init_train_state`, or `init_halves`.
    """
    check_environment(env)
    if c.normalize_obs:
        normalize.check_space(env)

    def init(key):
        k_params, k_world = jax.random.split(key)
        envs = start(k_world, env, c.num_envs)
        params = network.init(k_params, envs.obs)
        learner = Learner(
            init_params(tx, params),
            normalize.init(jax.tree.map(lambda x: x[0], envs.obs)) if c.normalize_obs else None,
            normalize.init(envs.episode_return[0]) if c.scale_reward else None,
            init_own(),
        )
        return State(learner, World(envs, jnp.zeros(c.num_envs) if c.scale_reward else None))

    def policy(state, deterministic):
        return evaluation_policy(network, state.learner.params, deterministic, state.learner.obs_moments)

    env_steps = c.num_envs * c.num_steps
    return Algorithm(init, step, policy, UpdateSteps(env_steps, env_steps))


def collect(
    key: Key, env: Env, network: Network, c: RolloutConfig, state: State, explorer: Actor | None = None
) -> tuple[Data, State, Metrics]:
    """A rollout by the policy of `state`, with both critics' passes over it.

    Args:
      explorer: acts in the policy's place.
    Returns:
      (data, state, info): the state has the environments advanced and the rollout's raw data merged into the
      normalisers, which the data themselves were not normalised with; its parameters are still the old ones.
    """
    params, (_, obs_moments, return_moments, _) = state.learner.params, state.learner
    explorer = explorer or actor(network, params, obs_moments)
    envs, trajectory, info = rollout(key, env, explorer, state.world.envs, c.num_steps)
    if not c.bootstrap_at_truncation:
        trajectory = truncation_as_termination(trajectory)
    _, action, log_prob, reward, terminated, truncated, _ = trajectory

    obs = normalize.apply(obs_moments, trajectory.obs)
    next_obs = normalize.apply(obs_moments, trajectory.next_obs)
    policy, value = network.apply(params, obs)
    _, next_value = network.apply(params, next_obs)
    if value is None:  # the network has a Q in its place
        value = next_value = jnp.zeros_like(reward)
    scaled_reward = normalize.scale(return_moments, reward)
    data = Data(obs, action, log_prob, scaled_reward, terminated, truncated, value, next_value, policy, next_obs)

    ended = terminated | truncated
    running_return, returns = normalize.running_return(state.world.running_return, reward, ended, c.gamma)
    learner = state.learner._replace(
        obs_moments=normalize.update(obs_moments, trajectory.obs),
        return_moments=normalize.update(return_moments, returns),
    )
    return data, State(learner, World(envs, running_return)), info


def fit_critic(
    key: Key,
    network: Network,
    tx: optax.GradientTransformation,
    c: TrustRegionConfig,
    train_state: TrainState,
    data: Data,
    target: Array,
) -> tuple[TrainState, Metrics]:
    """phi <- phi - lr * E[ grad (V(s) - target)^2 / 2 ] in epochs of shuffled minibatches; the metrics are `value_loss`
    and `grad_norm`. Parameters on which V does not depend stay as they are."""

    def loss(params, batch):
        obs, target = batch
        _, value = network.apply(params, obs)
        value_loss = squared_error(value, target).mean()
        return value_loss, {"value_loss": value_loss}

    sizes = c.num_value_epochs, c.num_value_minibatches
    train_state, metrics = minibatch_epochs(
        key, loss, tx, c.value_learning_rate, train_state, (data.obs, target), *sizes
    )
    return train_state, {name: metrics[name] for name in ("value_loss", "grad_norm")}


def diagnostics(network: Network, old_params: Params, params: Params, data: Data, target: Array, every: int) -> Metrics:
    """`policy_change` from `old_params`, which collected the data, to `params`, and the critic's `explained_variance`
    before the update.

    Args:
      every: over every so many time steps. Two more passes of the policy over all of them cost PPO a tenth of its speed
        and more, which is worth it only where an algorithm's step depends on the result.
    """
    obs, action = jax.tree.map(lambda x: x[::every], (data.obs, data.action))
    old = data.policy if every == 1 else network.apply(old_params, obs)[0]
    new, _ = network.apply(params, obs)
    return policy_change(old, new, action) | {"explained_variance": explained_variance(data.value, target)}


def finish(
    network: Network,
    before: State,
    after: State,
    train_state: TrainState,
    data: Data,
    target: Array,
    metrics: Metrics,
    every: int = SPARSE,
) -> tuple[State, Metrics]:
    """What a step returns: the state `after` its rollout with the new parameters in it, and the metrics with
    `diagnostics` of the change from `before`."""
    change = diagnostics(network, before.learner.params, train_state.params, data, target, every)
    return State(after.learner._replace(train_state=train_state), after.world), metrics | change
