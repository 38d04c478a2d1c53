"""Advantage actor-critic (Mnih et al. 2016), synchronous. Per update, with A and its target from a learned V:

theta <- theta + lr * E[ grad log pi(a|s) * A(s, a) + entropy_coef * grad H(pi(.|s)) ]
phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]
"""

from dataclasses import dataclass

from purepg.algorithms.configs import ActorCriticConfig
from purepg.algorithms.on_policy import checked, collect, finish, rollout_algorithm
from purepg.config import Count
from purepg.equations.advantages import standardise
from purepg.equations.losses import policy_gradient, squared_error
from purepg.optimize import annealed_learning_rate, gradient_step, step_direction
from purepg.types import Algorithm, Env, Network


@dataclass(frozen=True, kw_only=True)
class A2CConfig(ActorCriticConfig):
    """Hyperparameters of A2C.

    Attributes:
      n_step: use n-step advantages with this n in place of GAE; None uses GAE.
      normalize_advantage: standardise the advantages over the batch.
    """

    n_step: Count | None = None
    normalize_advantage: bool = False


def a2c(env: Env, network: Network, config: A2CConfig) -> Algorithm:
    """A2C on `env`. Raises UsageError as `checked` and `rollout_algorithm` do."""
    c = checked(env, network, config, "a2c")
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def loss(params, batch):
        obs, action, advantage, target = batch
        distribution, value = network.apply(params, obs)
        policy_loss = policy_gradient(distribution.log_prob(action), advantage).mean()
        value_loss = squared_error(value, target).mean()
        entropy = distribution.entropy().mean()
        total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        return total, {"policy_loss": policy_loss, "value_loss": value_loss}

    def step(key, state, update):
        data, after, info = collect(key, env, network, c, state)
        advantage, target = data.gae(c.gamma, c.gae_lambda) if c.n_step is None else data.n_step(c.gamma, c.n_step)
        if c.normalize_advantage:
            advantage = standardise(advantage)

        learning_rate = annealed_learning_rate(c, update)
        batch = (data.obs, data.action, advantage, target)
        train_state, metrics = gradient_step(loss, tx, learning_rate, state.learner.train_state, batch)
        return finish(network, state, after, train_state, data, target, info | metrics)

    return rollout_algorithm(env, network, c, tx, step)
