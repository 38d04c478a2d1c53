"""Trust region policy optimisation (Schulman et al. 2015). Per update, with A from GAE:

    maximise  E[ pi_theta(a|s) / pi_old(a|s) * A ]  under  E[ KL(pi_old(.|s) || pi_theta(.|s)) ] <= max_kl

by a natural gradient step. Its length is the one at which the quadratic model of the KL reaches the bound, shortened
until the surrogate improves and the KL itself is within the bound; if no try succeeds, the step is rejected. The critic
is fitted in epochs of shuffled minibatches:

    phi <- phi - value_lr * E[ grad (V(s) - target)^2 / 2 ]
"""

from dataclasses import dataclass

import jax

from purepg.algorithms.configs import TrustRegionConfig
from purepg.algorithms.on_policy import checked, collect, finish, fit_critic, rollout_algorithm
from purepg.config import Count, Positive, UnitInterval
from purepg.equations.advantages import standardise
from purepg.equations.losses import surrogate
from purepg.equations.trust_region import line_search, natural_gradient, refuse_a_shared_torso
from purepg.optimize import step_direction
from purepg.types import Algorithm, Env, Network


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(TrustRegionConfig):
    """Hyperparameters of TRPO.

    Attributes:
      max_kl: upper bound on the mean KL(pi_old || pi_theta), in nats.
      shrink: factor by which each try of the line search shortens the step.
      num_tries: step lengths that the line search tries before it rejects the step.
    """

    max_kl: Positive = 0.01
    shrink: UnitInterval = 0.8
    num_tries: Count = 10


def trpo(env: Env, network: Network, config: TRPOConfig) -> Algorithm:
    """TRPO on `env`. Raises UsageError as `checked` and `rollout_algorithm` do, and for a shared torso."""
    c = checked(env, network, config, "trpo")
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
        full_step = jax.tree.map(lambda x: natural.length(c.max_kl) * x, natural.direction)
        params, metrics = line_search(gain, kl, state.learner.params, full_step, c.max_kl, c.shrink, c.num_tries)
        metrics |= {"policy_grad_norm": natural.grad_norm, "cg_residual": natural.residual}

        train_state = state.learner.train_state._replace(params=params)
        train_state, value_metrics = fit_critic(k_value, network, tx, c, train_state, data, target)
        metrics |= info | value_metrics
        return finish(network, state, after, train_state, data, target, metrics, every=1)

    return rollout_algorithm(env, network, c, tx, step)
