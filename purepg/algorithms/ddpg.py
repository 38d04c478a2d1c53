"""Deep deterministic policy gradient (Lillicrap et al. 2016). Per gradient step, on a batch of replayed transitions:

    y     = r + gamma * (1 - terminated) * Q'(s', mu'(s'))
    phi   <- phi   - lr * E[ grad (Q(s, a) - y)^2 / 2 ]
    theta <- theta + lr * E[ grad mu(s) grad_a Q(s, a) at a = mu(s) ]

and the targets mu', Q' move towards them by tau. Gaussian noise on actions, perhaps correlated in time, explores.
"""

from dataclasses import dataclass

import optax

from purepg.algorithms.configs import ExplorationConfig, ReplayConfig
from purepg.algorithms.off_policy import ReplayLearner, critic_step, replay_algorithm, require
from purepg.config import check
from purepg.equations.advantages import td_target
from purepg.equations.distributions import Deterministic
from purepg.equations.losses import deterministic_policy_gradient
from purepg.experience.exploration import gaussian_noise
from purepg.optimize import by_half, gradient_step, init_halves, joined, step_direction
from purepg.types import Algorithm, Env, QNetwork


@dataclass(frozen=True, kw_only=True)
class DDPGConfig(ExplorationConfig, ReplayConfig):
    """Hyperparameters of DDPG."""


def ddpg(env: Env, network: QNetwork, config: DDPGConfig) -> Algorithm:
    """DDPG on `env`. Raises UsageError as `check`, `require` and `replay_algorithm` do."""
    c = check(config)
    require(env, network, "ddpg", {"deterministic": Deterministic})
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def policy_loss(policy, batch):
        obs, critic = batch
        action = network.apply({"policy": policy}, obs)[0].mode()
        loss = deterministic_policy_gradient(network.q({"critic": critic}, obs, action).mean(0)).mean()
        return loss, {"loss": loss}

    def learn(key, learner, batch, number):
        del key, number
        (policy, critic), target = learner.train_state.halves, learner.target
        next_action = network.apply(target, batch.next_obs)[0].mode()
        next_q = network.q(target, batch.next_obs, next_action).mean(0)
        y = td_target(batch.reward, next_q, batch.terminated, c.gamma)

        critic, critic_info = critic_step(network, tx, c, critic, batch, y)
        policy, policy_info = gradient_step(policy_loss, tx, c.policy_learning_rate, policy, (batch.obs, critic.params))
        target = optax.incremental_update(joined(policy, critic).params, target, c.tau)
        learner = learner._replace(train_state=joined(policy, critic), target=target)
        return learner, by_half(policy=policy_info, critic=critic_info)

    def init_learner(params):
        return ReplayLearner(init_halves(tx, params), params)

    exploration = gaussian_noise(network, env, c.exploration_std, c.noise_correlation)
    return replay_algorithm(env, network, c, init_learner, exploration, learn)
