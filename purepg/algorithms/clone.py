"""Behaviour cloning (Pomerleau 1991): supervised fine-tuning on demonstrations y of prompts x. Per update,

    theta <- theta + lr * E[ sum_t grad log pi(y_t | x, y_<t) * 1 ]

which is the policy gradient with weight 1 on every demonstrated token. On sampled tokens, with weight 1 for a correct
response and 0 for a wrong one, it would be REINFORCE.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import AnnealConfig, HeldOutConfig, LearningRateConfig
from purepg.algorithms.groups import mean_return, source
from purepg.config import Count, Positive, check, check_schedules
from purepg.equations.losses import aggregate, policy_gradient
from purepg.experience.acting import evaluation_policy
from purepg.language.model import LanguageModel
from purepg.loops import in_chunks
from purepg.optimize import (
    annealed_learning_rate,
    check_batch,
    epoch_batch,
    gradient_step,
    init_train_state,
    key_of_epochs,
    step_direction,
)
from purepg.types import Algorithm, Env, State, UpdateSteps, UsageError


@dataclass(frozen=True, kw_only=True)
class CloneConfig(HeldOutConfig, AnnealConfig, LearningRateConfig):
    """Hyperparameters of behaviour cloning.

    Attributes:
      batch_size: demonstrations in one update, each of a newly drawn prompt; those from a file are drawn without
        replacement within an epoch.
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
    a sampled response answers correctly after the update. Where demonstrations are rows of a file, `eval/loss` is minus
    the mean log-probability of a held-out token, and `eval/perplexity` its exponential, in place of that. Raises
    UsageError for a network that is no language model.
    """
    c = check(config)
    check_schedules(c)
    if not isinstance(network, LanguageModel):
        raise UsageError(f"{env.name} has no demonstrations: cloning needs a token task, such as --env addition")
    task, apart = network.task, env.held_out or env
    if task.rows is not None:
        check_batch(c.batch_size, len(task.rows))
    held_out = source(apart, network)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        params = source(env, network).init(key)
        return State(init_train_state(tx, params), () if task.rows is None else key_of_epochs(key))

    def log_probs(params, token):
        """(log pi of the response's tokens, 0 elsewhere, and which columns these are), each `[B, R]`."""
        action = token[:, task.prompt_length :]
        mask = action >= 0
        distribution, _ = network.score(params, token)
        return jnp.where(mask, distribution.log_prob(action), 0.0), mask

    def loss(params, token):
        log_prob, mask = log_probs(params, token)
        losses = policy_gradient(log_prob, jnp.ones(log_prob.shape))
        policy_loss = aggregate(losses, mask, c.aggregation)
        return policy_loss, {"policy_loss": policy_loss}

    def draw(key, world, update):
        if task.rows is not None:
            return jnp.asarray(task.rows[:, 0])[epoch_batch(world, len(task.rows), update, c.batch_size)]
        k_prompt, k_demonstration = key
        prompt = jax.vmap(lambda key: task.prompt(key, False))(jax.random.split(k_prompt, c.batch_size))
        demonstration = jax.vmap(task.demonstration)(jax.random.split(k_demonstration, c.batch_size), prompt)
        return jnp.concatenate([prompt, demonstration], axis=1)

    def step(key, state, update):
        *k_draw, k_held_out = jax.random.split(key, 3)
        token = draw(k_draw, state.world, update)
        learning_rate = annealed_learning_rate(c, update)
        learner, metrics = gradient_step(loss, tx, learning_rate, state.learner, token)
        metrics["env_steps"] = jnp.int32(env_steps)
        metrics["response_length"] = jnp.sum(token[:, task.prompt_length :] >= 0) / c.batch_size
        if c.num_held_out and task.rows is None:
            metrics["held_out_return"] = mean_return(k_held_out, held_out, learner.params, c.num_held_out)
        return State(learner, state.world), metrics

    def measure(state):
        token = jnp.asarray(apart.task.rows[:, 0])
        log_prob, mask = in_chunks(partial(log_probs, state.learner.params), c.batch_size, token)
        per_token = -jnp.sum(log_prob) / jnp.sum(mask)
        return {"eval/loss": per_token, "eval/perplexity": jnp.exp(per_token)}

    env_steps = c.batch_size * task.response_length
    steps = UpdateSteps(env_steps, env_steps)
    return Algorithm(init, step, evaluation_policy(network), steps, measure=measure if task.rows is not None else None)
