"""Deterministic policy gradient on fresh data (Silver et al. 2014). Per update, over a rollout by mu(s) + noise:

    y     = r + gamma * (1 - terminated) * Q(s', mu(s'))
    phi   <- phi   - lr * E[ grad (Q(s, a) - y)^2 / 2 ]                                                several times
    theta <- theta + lr * E[ grad mu(s) grad_a Q(s, a) at a = mu(s) ]

Without noise this is the paper's on-policy actor-critic (eq. 11 to 13), which explores only where the environment is
random. With noise it is the off-policy one (eq. 16 to 18), on data that are at most one update old.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from purepg.algorithms.configs import AnnealConfig, PolicyAndCriticRateConfig, RolloutConfig
from purepg.algorithms.off_policy import require
from purepg.algorithms.on_policy import collect, rollout_algorithm
from purepg.config import Count, NonNegative, Positive, check, check_schedules
from purepg.equations.advantages import td_target
from purepg.equations.diagnostics import explained_variance
from purepg.equations.distributions import Deterministic
from purepg.equations.losses import deterministic_policy_gradient, squared_error
from purepg.experience import normalize
from purepg.experience.exploration import gaussian_noise
from purepg.optimize import anneal, by_half, gradient_step, gradient_steps, init_halves, joined, step_direction
from purepg.types import Actor, Algorithm, Env, QNetwork, State, following


@dataclass(frozen=True, kw_only=True)
class DPGConfig(AnnealConfig, PolicyAndCriticRateConfig, RolloutConfig):
    """Hyperparameters of DPG.

    Attributes:
      num_critic_steps: gradient steps of the critics on each rollout, each with a target computed from the current
        critics.
      exploration_std: standard deviation of the noise on an action, in canonical [-1, 1] where actions are bounded.
    """

    num_envs: Count = 16
    critic_learning_rate: Positive = 1e-2
    num_critic_steps: Count = 10
    exploration_std: NonNegative = 0.1


def dpg(env: Env, network: QNetwork, config: DPGConfig) -> Algorithm:
    """DPG on `env`. Raises UsageError as `check`, `check_schedules`, `require` and `rollout_algorithm` do."""
    c = check(config)
    check_schedules(c)
    require(env, network, "dpg", {"deterministic": Deterministic})
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)
    exploration = gaussian_noise(network, env, c.exploration_std, correlation=0.0)

    def critic_loss(critic, batch):
        data, policy = batch
        params = {"policy": policy, "critic": critic}
        next_action = network.apply(params, data.next_obs)[0].mode()
        next_q = network.q(params, data.next_obs, next_action).mean(0)
        y = td_target(data.reward, next_q, data.terminated, c.gamma)
        q = network.q(params, data.obs, data.action)
        loss = squared_error(q, jnp.broadcast_to(y, q.shape)).mean()
        return loss, {"loss": loss, "q": q.mean(), "explained_variance": explained_variance(q.mean(0), y)}

    def policy_loss(policy, batch):
        obs, critic = batch
        action = network.apply({"policy": policy}, obs)[0].mode()
        loss = deterministic_policy_gradient(network.q({"critic": critic}, obs, action).mean(0)).mean()
        return loss, {"loss": loss}

    def acting(learner):
        def act(noise, memory, obs):
            obs = normalize.apply(learner.obs_moments, obs)
            return *exploration.act(learner.params, noise, memory, obs), None

        return Actor(exploration.noise, act, exploration.memory)

    def step(key, state, update):
        learner = state.learner
        policy, critic = learner.train_state.halves
        data, after, info = collect(key, env, network, c, state, acting(learner))
        data = data._replace(next_obs=following(data.obs, data.next_obs))  # as the changing critic remembers it
        share = anneal(1.0, update, c.anneal_updates if c.anneal_learning_rate else None)
        critic, critic_info = gradient_steps(
            critic_loss, tx, share * c.critic_learning_rate, critic, (data, policy.params), c.num_critic_steps
        )
        policy, policy_info = gradient_step(
            policy_loss, tx, share * c.policy_learning_rate, policy, (data.obs, critic.params)
        )
        learner = after.learner._replace(train_state=joined(policy, critic))
        return State(learner, after.world), info | by_half(policy=policy_info, critic=critic_info)

    return rollout_algorithm(env, network, c, tx, step, init_params=init_halves, acting=acting)
