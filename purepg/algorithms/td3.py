"""Twin delayed DDPG (Fujimoto et al. 2018). Per gradient step, on a batch of replayed transitions:

    y     = r + gamma * (1 - terminated) * min_k Q_k'(s', mu'(s') + clip(noise))
    phi_k <- phi_k - lr * E[ grad (Q_k(s, a) - y)^2 / 2 ]                                       for each critic
    theta <- theta + lr * E[ grad mu(s) grad_a Q_1(s, a) at a = mu(s) ]                       every d-th step

and the targets mu', Q' move towards them by tau, also every d-th step. Gaussian noise on actions explores.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import ExplorationConfig, ReplayConfig
from purepg.algorithms.off_policy import ReplayLearner, critic_step, replay_algorithm, require
from purepg.config import Count, NonNegative, check
from purepg.equations.advantages import td_target
from purepg.equations.distributions import Deterministic
from purepg.equations.losses import deterministic_policy_gradient
from purepg.experience.exploration import gaussian_noise, within_bounds
from purepg.lanes import step_if
from purepg.optimize import by_half, gradient_step, init_halves, joined, step_direction
from purepg.types import Algorithm, Env, Mean, QNetwork


@dataclass(frozen=True, kw_only=True)
class TD3Config(ExplorationConfig, ReplayConfig):
    """Hyperparameters of TD3.

    Attributes:
      policy_delay: gradient steps of the critics for each gradient step of the policy and the targets, d.
      target_noise_std: standard deviation of the noise on the target policy's action, in canonical [-1, 1].
      target_noise_clip: that noise is clipped to [-target_noise_clip, target_noise_clip].
    """

    policy_delay: Count = 2
    target_noise_std: NonNegative = 0.2
    target_noise_clip: NonNegative = 0.5


def td3(env: Env, network: QNetwork, config: TD3Config) -> Algorithm:
    """TD3 on `env`. Raises UsageError as `check`, `require` and `replay_algorithm` do."""
    c = check(config)
    require(env, network, "td3", {"deterministic": Deterministic})
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def policy_loss(policy, batch):
        obs, critic = batch
        action = network.apply({"policy": policy}, obs)[0].mode()
        loss = deterministic_policy_gradient(network.q({"critic": critic}, obs, action)[0]).mean()
        return loss, {"loss": loss}

    def learn(key, learner, batch, number):
        (policy, critic), target = learner.train_state.halves, learner.target
        next_action = network.apply(target, batch.next_obs)[0].mode()
        noise = c.target_noise_std * jax.random.normal(key, next_action.shape)
        next_action = within_bounds(env, next_action + jnp.clip(noise, -c.target_noise_clip, c.target_noise_clip))
        next_q = network.q(target, batch.next_obs, next_action).min(0)
        y = td_target(batch.reward, next_q, batch.terminated, c.gamma)

        critic, critic_info = critic_step(network, tx, c, critic, batch, y)

        def improve(carry):
            policy, target = carry
            policy, metrics = gradient_step(policy_loss, tx, c.policy_learning_rate, policy, (batch.obs, critic.params))
            target = optax.incremental_update(joined(policy, critic).params, target, c.tau)
            return (policy, target), {name: Mean.of(x) for name, x in metrics.items()}

        now = (number + 1) % c.policy_delay == 0
        (policy, target), policy_info = step_if(now, improve, (policy, target))
        learner = learner._replace(train_state=joined(policy, critic), target=target)
        return learner, by_half(policy=policy_info, critic=critic_info)

    def init_learner(params):
        return ReplayLearner(init_halves(tx, params), params)

    exploration = gaussian_noise(network, env, c.exploration_std, c.noise_correlation)
    return replay_algorithm(env, network, c, init_learner, exploration, learn, period=c.policy_delay)
