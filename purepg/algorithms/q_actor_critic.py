"""Actor-critic with a learned Q (Sutton et al. 2000, theorem 1; the critic is Sarsa's). Per update, over a rollout:

phi   <- phi   - lr * E[ grad (Q(s, a) - target)^2 / 2 ]                                           several times
theta <- theta + lr * E[ grad log pi(a|s) * Q(s, a) + entropy_coef * grad H(pi(.|s)) ]
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import AnnealConfig, LearningRateConfig, RolloutConfig
from purepg.algorithms.off_policy import require
from purepg.algorithms.on_policy import collect, finish, rollout_algorithm
from purepg.config import Count, NonNegative, Positive, UnitInterval, check, check_schedules, check_standardised
from purepg.equations.advantages import standardise
from purepg.equations.distributions import Categorical, DiagGaussian, TanhGaussian, executed
from purepg.equations.losses import policy_gradient, squared_error
from purepg.optimize import anneal, by_half, gradient_step, gradient_steps, init_halves, joined, step_direction
from purepg.types import Algorithm, Env, QNetwork


@dataclass(frozen=True, kw_only=True)
class QActorCriticConfig(AnnealConfig, LearningRateConfig, RolloutConfig):
    """Hyperparameters of the actor-critic with Q. `learning_rate` is the policy's.

    Attributes:
      critic_learning_rate: step size of the critics' optimiser.
      num_critic_steps: gradient steps of the critics on each rollout.
      sarsa_lambda: lambda of the critics' target; 0 gives r + gamma Q(s', a'), 1 the return over the rollout's rest.
      entropy_coef: weight of the entropy bonus.
      normalize_weight: standardise Q over the batch before it weights the policy gradient; its mean is a baseline then.
    """

    learning_rate: Positive = 5e-4
    max_grad_norm: Positive | None = 0.5
    critic_learning_rate: Positive = 1e-3
    num_critic_steps: Count = 10
    sarsa_lambda: UnitInterval = 0.5
    entropy_coef: NonNegative = 0.0
    normalize_weight: bool = False


def q_actor_critic(env: Env, network: QNetwork, config: QActorCriticConfig) -> Algorithm:
    """Actor-critic with Q on `env`. Raises UsageError as the checks here and `rollout_algorithm` do."""
    c = check(config)
    check_schedules(c)
    check_standardised(c.normalize_weight, c.num_envs * c.num_steps, name="normalize_weight")
    kinds = {"categorical": Categorical, "gaussian": DiagGaussian, "tanh_gaussian": TanhGaussian}
    require(env, network, "q_actor_critic", kinds)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def critic_loss(critic, batch):
        obs, action, target = batch
        q = network.q({"critic": critic}, obs, action)
        loss = squared_error(q, jnp.broadcast_to(target, q.shape)).mean()
        return loss, {"loss": loss}

    def policy_loss(policy, batch):
        obs, action, weight = batch
        distribution, _ = network.apply({"policy": policy}, obs)
        loss = policy_gradient(distribution.log_prob(action), weight).mean()
        return loss - c.entropy_coef * distribution.entropy().mean(), {"loss": loss}

    def step(key, state, update):
        k_rollout, k_next = jax.random.split(key)
        data, after, info = collect(k_rollout, env, network, c, state)
        params, (policy, critic) = state.learner.params, state.learner.train_state.halves
        action, next_action = executed(data.action), executed(network.apply(params, data.next_obs)[0].sample(k_next))
        q = network.q(params, data.obs, action).mean(0)
        next_q = network.q(params, data.next_obs, next_action).mean(0)
        left = (data.terminated | data.truncated).at[-1].set(True)  # here a' is sampled, elsewhere it was taken next
        next_q = jnp.where(left, next_q, jnp.roll(q, -1, axis=0))
        data = data._replace(value=q, next_value=next_q)
        _, target = data.gae(c.gamma, c.sarsa_lambda)
        share = anneal(1.0, update, c.anneal_updates if c.anneal_learning_rate else None)
        batch = (data.obs, action, target)
        critic, critic_info = gradient_steps(
            critic_loss, tx, share * c.critic_learning_rate, critic, batch, c.num_critic_steps
        )
        weight = network.q({"critic": critic.params}, data.obs, action).mean(0)
        if c.normalize_weight:
            weight = standardise(weight)

        batch = (data.obs, data.action, weight)
        policy, policy_info = gradient_step(policy_loss, tx, share * c.learning_rate, policy, batch)
        metrics = info | by_half(policy=policy_info, critic=critic_info)
        return finish(network, state, after, joined(policy, critic), data, target, metrics)

    return rollout_algorithm(env, network, c, tx, step, init_params=init_halves)
