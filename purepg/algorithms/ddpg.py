"""Deep deterministic policy gradient (Lillicrap et al. 2016). Per gradient step, on a batch of replayed transitions:

    y     = r + gamma * (1 - terminated) * Q'(s', mu'(s'))
    phi   <- phi   - lr * E[ grad (Q(s, a) - y)^2 / 2 ]
    theta <- theta + lr * E[ grad mu(s) grad_a Q(s, a) at a = mu(s) ]

and the targets mu', Q' follow by tau. Actions explore by Gaussian noise, which may be correlated in time.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import optax

from purepg.advantages import td_target
from purepg.config import Count, NonNegative, Positive, UnitInterval, check
from purepg.distributions import Deterministic
from purepg.losses import deterministic_policy_gradient, squared_error
from purepg.off_policy import Learner, assemble, gaussian_noise, require
from purepg.optimize import by_half, gradient_step, init_by_half, step_direction
from purepg.types import Algorithm, Env, QNetwork


@dataclass(frozen=True)
class DDPGConfig:
    """Hyperparameters of DDPG.

    Attributes:
      num_envs: parallel environments, N.
      num_steps: steps of each environment in one update, which is what a row of the log sums up.
      num_gradient_steps: gradient steps after each step of the environments; the updates-to-data ratio is this over N.
      batch_size: transitions of a gradient step, B.
      capacity: transitions in the replay buffer.
      warmup_steps: transitions made by random actions before learning begins.
      optimizer: adam, or sgd, the plain gradient.
      policy_learning_rate: the optimiser's, for the policy.
      critic_learning_rate: the optimiser's, for the critics.
      adam_eps: Adam's epsilon.
      gamma: discount per environment step.
      tau: share of the new parameters in each step of a target (Polyak averaging).
      exploration_std: standard deviation of the noise on an action, in canonical [-1, 1].
      noise_correlation: of an episode's successive noises; 0 is white, near 1 an Ornstein-Uhlenbeck process.
      max_grad_norm: bound on each gradient's global norm; None: unbounded.
      normalize_obs: by their running mean and variance.
      bootstrap_at_truncation: False takes a time limit for a death, the common mistake.
    """

    num_envs: Count = 1
    num_steps: Count = 50
    num_gradient_steps: Count = 1
    batch_size: Count = 256
    capacity: Count = 100_000
    warmup_steps: Count = 1000
    optimizer: Literal["adam", "sgd"] = "adam"
    policy_learning_rate: Positive = 1e-3
    critic_learning_rate: Positive = 1e-3
    adam_eps: Positive = 1e-8
    gamma: UnitInterval = 0.99
    tau: UnitInterval = 0.005
    exploration_std: NonNegative = 0.1
    noise_correlation: UnitInterval = 0.0
    max_grad_norm: Positive | None = None
    normalize_obs: bool = False
    bootstrap_at_truncation: bool = True


def ddpg(env: Env, network: QNetwork, config: DDPGConfig) -> Algorithm:
    """DDPG on `env`.

    Raises:
      UsageError: what `check` refuses, a policy that is not deterministic, or what `off_policy.assemble` refuses.
    """
    c = check(config)
    require(env, network, "ddpg", {"deterministic": Deterministic})
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def critic_loss(critic, batch):
        transition, target = batch
        q = network.q({"critic": critic}, transition.obs, transition.action)
        loss = squared_error(q, jnp.broadcast_to(target, q.shape)).mean()
        return loss, {"loss": loss, "q": q.mean()}

    def policy_loss(policy, batch):
        obs, critic = batch
        action = network.apply({"policy": policy}, obs)[0].mode()
        loss = deterministic_policy_gradient(network.q({"critic": critic}, obs, action).mean(0)).mean()
        return loss, {"loss": loss}

    def learn(key, learner, batch, number):
        del key, number
        params, target, opt_state = learner.params, learner.target, learner.opt_state
        next_action = network.apply(target, batch.next_obs)[0].mode()
        next_q = network.q(target, batch.next_obs, next_action).mean(0)
        y = td_target(batch.reward, next_q, batch.terminated, c.gamma)

        critic, critic_opt, critic_metrics = gradient_step(
            critic_loss, tx, c.critic_learning_rate, params["critic"], opt_state["critic"], (batch, y)
        )
        policy, policy_opt, policy_metrics = gradient_step(
            policy_loss, tx, c.policy_learning_rate, params["policy"], opt_state["policy"], (batch.obs, critic)
        )
        params = {"policy": policy, "critic": critic}
        learner = learner._replace(
            params=params,
            target=optax.incremental_update(params, target, c.tau),
            opt_state={"policy": policy_opt, "critic": critic_opt},
        )
        return learner, by_half(policy=policy_metrics, critic=critic_metrics)

    def init_learner(params):
        return Learner(params, params, init_by_half(tx, params))

    exploration = gaussian_noise(network, env, c.exploration_std, c.noise_correlation)
    return assemble(env, network, c, init_learner, exploration, learn)
