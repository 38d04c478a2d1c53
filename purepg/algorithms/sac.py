"""Soft actor-critic (Haarnoja et al. 2018b). Per gradient step, on a batch of replayed transitions, a' ~ pi(.|s'):

    y         = r + gamma * (1 - terminated) * (min_k Q_k'(s', a') - alpha * log pi(a'|s'))
    phi_k     <- phi_k - lr * E[ grad (Q_k(s, a) - y)^2 / 2 ]                                       for each critic
    theta     <- theta - lr * E[ grad (alpha * log pi(a|s) - min_k Q_k(s, a)) ]       through the sample a = f(noise; s)
    log alpha <- log alpha - lr * E[ -log pi(a|s) - target entropy ]

and the targets Q_k' move towards them by tau. Exploration comes from sampling the policy's actions.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import ReplayConfig, TemperatureConfig
from purepg.algorithms.off_policy import critic_step, replay_algorithm, require, soft_learner, temperature_step
from purepg.config import check
from purepg.equations.advantages import td_target
from purepg.equations.distributions import DiagGaussian, TanhGaussian, executed
from purepg.equations.losses import soft_policy_gradient
from purepg.experience.exploration import own_samples
from purepg.optimize import by_half, gradient_step, joined, step_direction
from purepg.types import Algorithm, Env, QNetwork


@dataclass(frozen=True, kw_only=True)
class SACConfig(TemperatureConfig, ReplayConfig):
    """Hyperparameters of SAC.

    Attributes:
      target_entropy: in nats, of canonical actions; None: minus the number of action dimensions.
    """

    target_entropy: float | None = None


def sac(env: Env, network: QNetwork, config: SACConfig) -> Algorithm:
    """SAC on `env`, with continuous actions. Raises UsageError as `check`, `require` and `replay_algorithm` do."""
    c = check(config)
    require(env, network, "sac", {"tanh_gaussian": TanhGaussian, "gaussian": DiagGaussian})
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def policy_loss(policy, batch):
        obs, critic, noise, alpha = batch
        distribution, _ = network.apply({"policy": policy}, obs)
        action = distribution.transform(noise)
        q = network.q({"critic": critic}, obs, executed(action)).min(0)
        log_prob = distribution.log_prob(action)
        loss = soft_policy_gradient(log_prob, q, alpha).mean()
        return loss, {"loss": loss, "entropy": -log_prob.mean()}

    def learn(key, learner, batch, number):
        del number
        (policy, critic), target = learner.train_state.halves, learner.target
        log_alpha = learner.log_temperature
        k_next, k_policy = jax.random.split(key)
        alpha = jnp.exp(log_alpha.params) if c.learn_temperature else c.temperature
        policy_at_next, _ = network.apply(learner.params, batch.next_obs)
        next_action, next_log_prob = policy_at_next.scored(policy_at_next.noise(k_next))
        next_q = network.q(target, batch.next_obs, executed(next_action)).min(0)
        y = td_target(batch.reward, next_q - alpha * next_log_prob, batch.terminated, c.gamma)

        critic, critic_info = critic_step(network, tx, c, critic, batch, y)
        noise = policy_at_next.noise(k_policy)
        policy, policy_info = gradient_step(
            policy_loss, tx, c.policy_learning_rate, policy, (batch.obs, critic.params, noise, alpha)
        )
        target_entropy = -batch.action.shape[-1] if c.target_entropy is None else c.target_entropy
        log_alpha = temperature_step(tx, c, log_alpha, policy_info["entropy"] - target_entropy)
        target = optax.incremental_update({"critic": critic.params}, target, c.tau)
        learner = learner._replace(train_state=joined(policy, critic), target=target, log_temperature=log_alpha)
        temperature = {"temperature": jnp.asarray(alpha, jnp.float32)}
        return learner, by_half(policy=policy_info, critic=critic_info) | temperature

    return replay_algorithm(env, network, c, partial(soft_learner, tx, c), own_samples(network), learn)
