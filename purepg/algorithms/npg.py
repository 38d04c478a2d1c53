"""Natural policy gradient (Kakade 2001). Per update, with A from GAE and F the Fisher matrix of the policy:

    g      = E[ A * grad log pi(a|s) ]
    theta <- theta + length * (F + damping I)^-1 g
    phi   <- phi - value_lr * E[ grad (V(s) - target)^2 / 2 ], epochs of shuffled minibatches

The length is a learning rate, or the one at which the mean KL(pi_old || pi_theta), to second order, is `max_kl`.
"""

from dataclasses import dataclass

import jax

from purepg.algorithms.configs import TrustRegionConfig
from purepg.algorithms.on_policy import checked, collect, finish, fit_critic, rollout_algorithm
from purepg.config import Positive
from purepg.equations.advantages import standardise
from purepg.equations.losses import surrogate
from purepg.equations.trust_region import move, natural_gradient, refuse_a_shared_torso
from purepg.optimize import step_direction
from purepg.types import Algorithm, Env, Network


@dataclass(frozen=True, kw_only=True)
class NPGConfig(TrustRegionConfig):
    """Hyperparameters of the natural policy gradient.

    Attributes:
      max_kl: KL divergence of a step to second order, in nats; None uses `learning_rate`.
      learning_rate: multiplies the natural gradient where `max_kl` is None.
    """

    max_kl: Positive | None = 0.01
    learning_rate: Positive = 0.1


def npg(env: Env, network: Network, config: NPGConfig) -> Algorithm:
    """NPG on `env`. Raises UsageError as `checked` and `rollout_algorithm` do, and for a shared torso."""
    c = checked(env, network, config, "npg")
    refuse_a_shared_torso(network)
    tx = step_direction("adam", c.max_grad_norm, c.adam_eps)

    def step(key, state, update):
        del update
        k_rollout, k_value = jax.random.split(key)
        data, after, info = collect(k_rollout, env, network, c, state)
        advantage, target = data.gae(c.gamma, c.gae_lambda)
        if c.normalize_advantage:
            advantage = standardise(advantage)

        def gain(params):
            policy, _ = network.apply(params, data.obs)
            return -surrogate(policy.log_prob(data.action), data.log_prob, advantage).mean()

        def kl(params):
            policy, _ = network.apply(params, data.obs)
            return data.policy.kl(policy).mean()

        natural = natural_gradient(gain, kl, state.learner.params, c.damping, c.num_cg_steps)
        length = c.learning_rate if c.max_kl is None else natural.length(c.max_kl)
        params = move(state.learner.params, length, natural.direction)
        metrics = {"policy_grad_norm": natural.grad_norm, "cg_residual": natural.residual}

        train_state = state.learner.train_state._replace(params=params)
        train_state, value_metrics = fit_critic(k_value, network, tx, c, train_state, data, target)
        metrics |= info | value_metrics
        return finish(network, state, after, train_state, data, target, metrics, every=1)

    return rollout_algorithm(env, network, c, tx, step)
