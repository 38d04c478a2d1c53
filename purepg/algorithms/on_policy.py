"""What the algorithms on rollouts share: the checks of their settings, their state, the data of an update, and its
diagnostics. An algorithm's own file has its weight of grad log pi, its loss and its step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import RolloutConfig, TrustRegionConfig
from purepg.config import check, check_minibatches, check_schedules, check_standardised
from purepg.envs.contract import check_environment
from purepg.equations import advantages
from purepg.equations.diagnostics import SPARSE, explained_variance, policy_change, sparse
from purepg.equations.distributions import Distribution
from purepg.equations.losses import squared_error
from purepg.experience import normalize
from purepg.experience.acting import actor, evaluation_policy
from purepg.experience.normalize import Moments
from purepg.experience.rollout import RolloutState, reset_all, rollout, truncation_as_termination
from purepg.lanes import select
from purepg.networks.actor_critic import require_policy_gradient
from purepg.optimize import TrainState, init_train_state, minibatch_epochs
from purepg.types import (
    Action,
    Actor,
    Algorithm,
    Array,
    Env,
    Explorer,
    Key,
    Metrics,
    Network,
    Obs,
    Params,
    State,
    Step,
    UpdateSteps,
    first_memory,
    has_memory,
)

Config = TypeVar("Config", bound=RolloutConfig)


class RolloutLearner(NamedTuple):
    train_state: TrainState
    obs_moments: Moments | None
    return_moments: Moments | None
    own: Any = None  # what an algorithm adapts beside its parameters, such as the coefficient of a penalty

    @property
    def params(self) -> Params:
        return self.train_state.params


class RolloutWorld(NamedTuple):
    envs: RolloutState
    running_return: Array | None  # [N], of the running episode, discounted


class Data(NamedTuple):
    """A rollout as an update reads it; every leaf is `[T, N, ...]`."""

    obs: Obs  # normalised; with memory a `Window`
    action: Action
    log_prob: Array
    reward: Array  # scaled
    terminated: Array
    truncated: Array
    value: Array  # V(s_t); 0 where the network has no V
    next_value: Array  # V of the observation before any reset; 0 where the network has no V
    policy: Distribution  # the policy that acted
    next_obs: Obs  # normalised, before any reset; with memory a `Moment`

    def gae(self, gamma: Array | float, lam: Array | float) -> tuple[Array, Array]:
        """(advantage, target) by `advantages.gae`."""
        return advantages.gae(*self._estimate, gamma, lam)

    def n_step(self, gamma: Array | float, n: int) -> tuple[Array, Array]:
        """(advantage, target) by `advantages.n_step`."""
        return advantages.n_step(*self._estimate, gamma, n)

    @property
    def _estimate(self) -> tuple[Array, Array, Array, Array, Array]:
        return self.reward, self.value, self.next_value, self.terminated, self.truncated


def checked(env: Env, network: Network, config: Config, algorithm: str) -> Config:
    """The config, checked; a `window` of None is the whole rollout where the network has memory.

    Raises UsageError for what `check` refuses, a rollout that the minibatches do not divide, annealing without a
    length, a single advantage that would be standardised by itself, or a network without a stochastic policy or V.
    """
    c: Any = check(config)
    check_schedules(c)
    if has_memory(network) and hasattr(c, "window"):
        c = replace(c, window=c.window or c.num_steps)
    window, num_minibatches = getattr(c, "window", None), getattr(c, "num_minibatches", 1)
    check_minibatches(c.num_envs, c.num_steps, num_minibatches, window)
    value_minibatches = getattr(c, "num_value_minibatches", 1)
    check_minibatches(c.num_envs, c.num_steps, value_minibatches, window, "num_value_minibatches")
    check_standardised(c.normalize_advantage, c.num_envs * c.num_steps, num_minibatches)
    require_policy_gradient(env, network, algorithm)
    return c


def rollout_algorithm(
    env: Env,
    network: Network,
    c: RolloutConfig,
    tx: optax.GradientTransformation,
    step: Step,
    init_own: Callable[[], Any] = lambda: None,
    init_params: Callable[[optax.GradientTransformation, Params], TrainState] = init_train_state,
    acting: Callable[[RolloutLearner], Actor] | None = None,
) -> Algorithm:
    """The algorithm of a step, with the state that `collect` advances. Raises UsageError where `normalize_obs` is on
    and an observation is a category.

    Args:
      init_own: gives the initial value of `RolloutLearner.own`.
      init_params: `init_train_state`, or `init_halves`.
      acting: how a learner acts during training; None: by its policy.
    """
    check_environment(env)
    if c.normalize_obs:
        normalize.check_space(env)

    def init(key):
        k_params, k_world = jax.random.split(key)
        envs = reset_all(k_world, env, c.num_envs, first_memory(network))
        learner = RolloutLearner(
            init_params(tx, network.init(k_params, envs.seen)),
            normalize.init(jax.tree.map(lambda x: x[0], envs.obs), env.observation_space) if c.normalize_obs else None,
            normalize.init(envs.episode_return[0]) if c.scale_reward else None,
            init_own(),
        )
        return State(learner, RolloutWorld(envs, jnp.zeros(c.num_envs) if c.scale_reward else None))

    def act(key, learner, memory, update, t, obs, starts):
        del update, t
        chosen = acting(learner) if acting else actor(network, learner.params, learner.obs_moments)
        before = select(starts, chosen.memory(starts.shape[0]), memory)
        after, action, log_prob = chosen(key, before, obs)
        return action, log_prob, (before, after), after

    explorer = Explorer(c.num_envs, c.num_steps, lambda obs: first_memory(network)(c.num_envs), act)
    env_steps = c.num_envs * c.num_steps
    return Algorithm(init, step, evaluation_policy(network), UpdateSteps(env_steps, env_steps), explorer)


def collect(
    key: Key, env: Env, network: Network, c: RolloutConfig, state: State, explorer: Actor | None = None
) -> tuple[Data, State, Metrics]:
    """A rollout by the policy of `state`, with V of every observation and next observation.

    Args:
      explorer: acts in the policy's place.
    Returns:
      (data, state, info): the state has the environments advanced and the rollout's raw data merged into the
      normalisers. The data are normalised by the statistics before that merge, and the parameters are still the old.
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
    if value is None:  # a QNetwork has no V
        value = next_value = jnp.zeros_like(reward)
    scaled_reward = normalize.times(c.reward_scale, normalize.scale(return_moments, reward))
    data = Data(obs, action, log_prob, scaled_reward, terminated, truncated, value, next_value, policy, next_obs)

    ended = terminated | truncated
    running_return, returns = normalize.running_return(state.world.running_return, reward, ended, c.gamma)
    learner = state.learner._replace(
        obs_moments=normalize.update(obs_moments, trajectory.obs),
        return_moments=normalize.update(return_moments, returns),
    )
    return data, State(learner, RolloutWorld(envs, running_return)), info


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

    epochs = c.num_value_epochs, c.num_value_minibatches, None, c.window
    batch = (data.obs, target)
    train_state, metrics = minibatch_epochs(key, loss, tx, c.value_learning_rate, train_state, batch, *epochs)
    return train_state, {name: metrics[name] for name in ("value_loss", "grad_norm")}


def diagnostics(network: Network, old_params: Params, params: Params, data: Data, target: Array, every: int) -> Metrics:
    """`policy_change` from `old_params`, which collected the data, to `params`, and the critic's `explained_variance`
    before the update.

    Args:
      every: measure the policy's change on every so many time steps or environments (`sparse`). On all of them, the
        two more passes of the policy cost PPO a tenth of its speed or more; this pays only where an algorithm's step
        depends on the result.
    """
    obs, action = sparse((data.obs, data.action), every)
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
    """What a step returns: the state `after` its rollout with the new `train_state` in it, and the metrics with
    `diagnostics` of the change from `before`."""
    change = diagnostics(network, before.learner.params, train_state.params, data, target, every)
    return State(after.learner._replace(train_state=train_state), after.world), metrics | change
