"""Soft actor-critic with discrete actions (Christodoulou 2019): every expectation over actions is a sum. Per gradient
step, on a batch of replayed transitions:

    y         = r + gamma * (1 - terminated) * sum_a' pi(a'|s') (min_k Q_k'(s', a') - alpha * log pi(a'|s'))
    phi_k     <- phi_k - lr * E[ grad (Q_k(s, a) - y)^2 / 2 ]                                       for each critic
    theta     <- theta - lr * E[ grad sum_a pi(a|s) (alpha * log pi(a|s) - min_k Q_k(s, a)) ]
    log alpha <- log alpha - lr * E[ H(pi(.|s)) - target entropy ]

and the targets Q_k' move towards them by tau. Exploration comes from sampling the policy's actions.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import optax

from purepg.algorithms.configs import ReplayConfig, TemperatureConfig
from purepg.algorithms.off_policy import critic_step, replay_algorithm, require, soft_learner, temperature_step
from purepg.config import UnitInterval, check
from purepg.envs.contract import legal_actions
from purepg.equations.advantages import td_target
from purepg.equations.distributions import Categorical
from purepg.equations.losses import expected_soft_policy_gradient
from purepg.experience.exploration import own_samples
from purepg.optimize import by_half, gradient_step, joined, step_direction
from purepg.types import Algorithm, Env, QNetwork, observed


@dataclass(frozen=True, kw_only=True)
class DiscreteSACConfig(TemperatureConfig, ReplayConfig):
    """Hyperparameters of discrete SAC.

    Attributes:
      target_entropy: as a fraction of the uniform policy's entropy, the logarithm of the number of legal actions.
    """

    target_entropy: UnitInterval = 0.5


def sac_discrete(env: Env, network: QNetwork, config: DiscreteSACConfig) -> Algorithm:
    """SAC on `env`, with discrete actions. Raises UsageError as `check`, `require` and `replay_algorithm` do."""
    c = check(config)
    require(env, network, "sac_discrete", {"categorical": Categorical})
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def policy_loss(policy, batch):
        obs, critic, alpha = batch
        distribution, _ = network.apply({"policy": policy}, obs)
        q = network.q_of_all({"critic": critic}, obs).min(0)
        loss = expected_soft_policy_gradient(distribution.log_prob_of_all(), q, alpha).mean()
        return loss, {"loss": loss, "entropy": distribution.entropy().mean()}

    def learn(key, learner, batch, number):
        del key, number
        (policy, critic), target = learner.train_state.halves, learner.target
        log_alpha = learner.log_temperature
        alpha = jnp.exp(log_alpha.params) if c.learn_temperature else c.temperature
        next_log_prob = network.apply(learner.params, batch.next_obs)[0].log_prob_of_all()
        next_q = network.q_of_all(target, batch.next_obs).min(0)
        next_value = -expected_soft_policy_gradient(next_log_prob, next_q, alpha)
        y = td_target(batch.reward, next_value, batch.terminated, c.gamma)

        critic, critic_info = critic_step(network, tx, c, critic, batch, y)
        policy, policy_info = gradient_step(
            policy_loss, tx, c.policy_learning_rate, policy, (batch.obs, critic.params, alpha)
        )
        legal = legal_actions(env.observation_space, observed(batch.obs))
        largest = jnp.log(next_log_prob.shape[-1]) if legal is None else jnp.log(legal.sum(-1)).mean()
        log_alpha = temperature_step(tx, c, log_alpha, policy_info["entropy"] - c.target_entropy * largest)
        target = optax.incremental_update({"critic": critic.params}, target, c.tau)
        learner = learner._replace(train_state=joined(policy, critic), target=target, log_temperature=log_alpha)
        temperature = {"temperature": jnp.asarray(alpha, jnp.float32)}
        return learner, by_half(policy=policy_info, critic=critic_info) | temperature

    return replay_algorithm(env, network, c, partial(soft_learner, tx, c), own_samples(network), learn)
