"""REINFORCE (Williams 1992) over N whole episodes. Per update:

    theta <- theta + lr * 1/N * sum_i sum_t grad log pi(a_it|s_it) * weight_it

The weight is the total return or the return to go, minus a baseline. The sum over an episode's steps is the gradient of
its return; `mean_over_steps` averages over all steps of the batch instead, as most implementations do.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import AnnealConfig, LearningRateConfig, LossConfig
from purepg.config import Count, Positive, UnitInterval, check, check_schedules
from purepg.envs.contract import check_environment
from purepg.equations import advantages
from purepg.equations.diagnostics import SPARSE, explained_variance, policy_change, sparse
from purepg.equations.losses import policy_gradient, squared_error
from purepg.experience.acting import actor, evaluation_policy
from purepg.experience.rollout import episodes
from purepg.networks.actor_critic import require_policy_gradient
from purepg.optimize import annealed_learning_rate, gradient_step, init_train_state, step_direction
from purepg.types import Algorithm, Array, Env, Network, State, Transition, UpdateSteps, UsageError, first_seen


@dataclass(frozen=True, kw_only=True)
class REINFORCEConfig(LossConfig, AnnealConfig, LearningRateConfig):
    """Hyperparameters of REINFORCE.

    Attributes:
      num_episodes: whole episodes per update, N.
      max_steps: an episode still running after this many steps is truncated; None uses the environment's time limit.
      gamma: discount per environment step.
      weight: what multiplies grad log pi: the episode's total return at every step, or the return to go.
      baseline: what is subtracted from the weight: nothing; the mean of the batch; that mean, after which the weight is
        divided by its standard deviation; the mean at each time step; the mean of the other episodes at each time step;
        or a learned V(s), which then also bootstraps truncated episodes.
      discount_states: multiply the weight at step t by gamma^t, as in the gradient of the discounted objective.
      mean_over_steps: average over all steps of the batch. False sums over an episode's steps and averages over
        episodes, which is the gradient of the return.
    """

    learning_rate: Positive = 2e-3
    num_episodes: Count = 4
    max_steps: Count | None = None
    gamma: UnitInterval = 0.99
    weight: Literal["total_return", "return_to_go"] = "return_to_go"
    baseline: Literal["none", "batch_mean", "standardised", "per_time_mean", "leave_one_out", "value"] = "standardised"
    discount_states: bool = False
    mean_over_steps: bool = True


def reinforce(env: Env, network: Network, config: REINFORCEConfig) -> Algorithm:
    """REINFORCE on `env`. Raises UsageError as `_checked` does."""
    c, max_steps = _checked(env, network, config)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        k_params, k_obs = jax.random.split(key)
        _, obs = env.reset(k_obs)
        return State(init_train_state(tx, network.init(k_params, first_seen(network, obs))), ())

    def loss(params, batch):
        trajectory, mask, weight, target = batch
        distribution, value = network.apply(params, trajectory.obs)
        policy_losses = policy_gradient(distribution.log_prob(trajectory.action), weight)
        policy_loss = jnp.sum(policy_losses, where=mask) / (jnp.sum(mask) if c.mean_over_steps else c.num_episodes)
        entropy = jnp.mean(distribution.entropy(), where=mask)
        metrics = {"policy_loss": policy_loss}
        total = policy_loss - c.entropy_coef * entropy
        if c.baseline == "value":
            metrics["value_loss"] = jnp.mean(squared_error(value, target), where=mask)
            total += c.value_coef * metrics["value_loss"]
        return total, metrics

    def step(key, state, update):
        learning_rate = annealed_learning_rate(c, update)
        params = state.learner.params
        trajectory, mask, info = episodes(key, env, actor(network, params), c.num_episodes, max_steps)

        value, final_value = jnp.zeros_like(trajectory.reward), 0.0
        if c.baseline == "value":
            _, value = network.apply(params, trajectory.obs)
            _, next_value = network.apply(params, trajectory.next_obs)
            final_value = jnp.sum(next_value, axis=0, where=mask & trajectory.truncated & ~trajectory.terminated)
        weight = _weight(c, trajectory, mask, value, final_value)
        target = advantages.discounted_return(trajectory.reward, mask, c.gamma, final_value)

        batch = (trajectory, mask, weight, target)
        learner, metrics = gradient_step(loss, tx, learning_rate, state.learner, batch)
        obs, action, some = sparse((trajectory.obs, trajectory.action, mask), SPARSE)
        old_policy, new_policy = (network.apply(x, obs)[0] for x in (params, learner.params))
        metrics |= policy_change(old_policy, new_policy, action, where=some)
        if c.baseline == "value":
            metrics["explained_variance"] = explained_variance(value, target, where=mask)
        return State(learner, ()), info | metrics

    return Algorithm(init, step, evaluation_policy(network), UpdateSteps(c.num_episodes, c.num_episodes * max_steps))


def _weight(c: REINFORCEConfig, trajectory: Transition, mask: Array, value: Array, final_value: Array | float) -> Array:
    """The weight of grad log pi at every step: the return minus the baseline."""
    returns = advantages.total_return if c.weight == "total_return" else advantages.discounted_return
    weight = returns(trajectory.reward, mask, c.gamma, final_value)
    match c.baseline:
        case "batch_mean":
            weight -= advantages.batch_mean(weight, mask)
        case "standardised":
            weight = advantages.standardise(weight, mask)
        case "per_time_mean":
            weight -= advantages.per_time_mean(weight, mask)
        case "leave_one_out":
            weight -= advantages.leave_one_out_mean(weight, mask)
        case "value":
            weight -= value
    return weight * advantages.discount_power(mask, c.gamma) if c.discount_states else weight


def _checked(env: Env, network: Network, config: REINFORCEConfig) -> tuple[REINFORCEConfig, int]:
    """(config, largest number of steps of an episode).

    Raises:
      UsageError: what `check` refuses, an environment without a time limit and no `max_steps`, `discount_states` with
        the total return, which is already discounted from the start, a baseline that leaves nothing of a single
        episode, or a network without a stochastic policy, or without V where the baseline is V.
    """
    c = check(config)
    check_schedules(c)
    check_environment(env)
    max_steps = c.max_steps or env.max_episode_steps
    if max_steps is None:
        raise UsageError(f"{env.name} has no time limit: max_steps (None) must be set, so that an episode ends")
    if c.discount_states and c.weight == "total_return":
        raise UsageError("discount_states (True) needs weight 'return_to_go'; 'total_return' is discounted already")
    single = c.num_episodes == 1
    if single and c.baseline == "leave_one_out":
        raise UsageError("num_episodes (1) must be at least 2 with baseline leave_one_out: there is no other episode")
    # Where all steps have the same weight, or there is only one, the batch's mean is that weight.
    constant = c.baseline in ("batch_mean", "standardised") and (c.weight == "total_return" or max_steps == 1)
    if single and (c.baseline == "per_time_mean" or constant):
        raise UsageError(
            f"num_episodes (1) must be at least 2 with baseline {c.baseline} and weight {c.weight}: they leave nothing "
            "of a single episode"
        )
    require_policy_gradient(env, network, "reinforce", value=c.baseline == "value")
    return c, max_steps
