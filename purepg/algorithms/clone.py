"""Behaviour cloning (Pomerleau 1991): supervised fine-tuning on demonstrations y of prompts x. Per update,

    theta <- theta + lr * E[ sum_t grad log pi(y_t | x, y_<t) * 1 ]

which is the policy gradient with weight 1 on every demonstrated token. On sampled tokens, with weight 1 for a correct
response and 0 for a wrong one, it would be REINFORCE.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import HeldOutConfig, LearningRateConfig
from purepg.algorithms.groups import mean_return, source
from purepg.config import Count, Positive, check
from purepg.equations.losses import aggregate, policy_gradient
from purepg.experience.acting import evaluation_policy
from purepg.language.model import LanguageModel
from purepg.optimize import gradient_step, init_train_state, step_direction
from purepg.types import Algorithm, Env, State, UpdateSteps, UsageError


@dataclass(frozen=True, kw_only=True)
class CloneConfig(HeldOutConfig, LearningRateConfig):
    """Hyperparameters of behaviour cloning.

    Attributes:
      batch_size: demonstrations in one update, each of a newly drawn prompt.
      aggregation: how the tokens' losses become one loss (`losses.aggregate`).
    """

    learning_rate: Positive = 2e-3
    adam_eps: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0
    batch_size: Count = 256
    aggregation: Literal["sequence_mean", "token_mean", "constant_length", "sequence_sum"] = "token_mean"


def clone(env: Env, network: LanguageModel, config: CloneConfig) -> Algorithm:
    """Behaviour cloning of a token task's demonstrations. An environment step is a column of a response.

    Learning samples nothing, so there are no `EpisodeMetrics`. `held_out_return` is the share of held-out prompts that
    a sampled response answers correctly after the update. Raises UsageError for a network that is no language model.
    """
    c = check(config)
    if not isinstance(network, LanguageModel):
        raise UsageError(f"{env.name} has no demonstrations: cloning needs a token task, such as --env addition")
    task = network.task
    held_out = source(env.held_out or env, network)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        params = source(env, network).init(key)
        return State(init_train_state(tx, params), ())

    def loss(params, token):
        action = token[:, task.prompt_length :]
        mask = action >= 0
        distribution, _ = network.score(params, token)
        losses = policy_gradient(jnp.where(mask, distribution.log_prob(action), 0.0), jnp.ones(action.shape))
        policy_loss = aggregate(losses, mask, c.aggregation)
        return policy_loss, {"policy_loss": policy_loss}

    def step(key, state, update):
        del update
        k_prompt, k_demonstration, k_held_out = jax.random.split(key, 3)
        prompt = jax.vmap(lambda key: task.prompt(key, False))(jax.random.split(k_prompt, c.batch_size))
        demonstration = jax.vmap(task.demonstration)(jax.random.split(k_demonstration, c.batch_size), prompt)
        token = jnp.concatenate([prompt, demonstration], axis=1)
        learner, metrics = gradient_step(loss, tx, c.learning_rate, state.learner, token)
        metrics["env_steps"] = jnp.int32(demonstration.size)
        metrics["response_length"] = jnp.sum(demonstration >= 0) / c.batch_size
        if c.num_held_out:
            metrics["held_out_return"] = mean_return(k_held_out, held_out, learner.params, c.num_held_out)
        return State(learner, ()), metrics

    env_steps = c.batch_size * task.response_length
    return Algorithm(init, step, evaluation_policy(network), UpdateSteps(env_steps, env_steps))
