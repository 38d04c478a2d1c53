"""A reward model (Christiano et al. 2017; Ouyang et al. 2022, eq. 1): a language model whose value after the last token
of a response, r(x, y), is fitted to pairs of which y_w is preferred to y_l. Per gradient step,

    theta <- theta + lr * E[ grad log sigmoid(r(x, y_w) - r(x, y_l)) ]
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from purepg.algorithms.groups import source
from purepg.algorithms.preferences import (
    PairsConfig,
    Preferences,
    draws,
    measured_pairs,
    ranking,
    reward_margin,
    sample_preferences,
)
from purepg.config import Count, Positive, check, check_schedules
from purepg.experience.acting import evaluation_policy
from purepg.language.model import LanguageModel
from purepg.optimize import annealed_learning_rate, gradient_step, init_train_state, step_direction
from purepg.types import Algorithm, Env, State, UpdateSteps, UsageError


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PairsConfig):
    """Hyperparameters of a reward model.

    Attributes:
      num_held_out: held-out prompts whose pairs measure a model of sampled pairs; of those from a file, all do.
    """

    learning_rate: Positive = 1e-3
    num_held_out: Count = 256


def reward_model(env: Env, network: LanguageModel, config: RewardConfig) -> Algorithm:
    """A reward model of pairs from a file, or of the initial policy's responses to a token task, ranked by its reward.
    An environment step is a column of a response in a pair.

    `eval/loss` and `eval/ranked_right` are the loss of held-out pairs and the share that it ranks correctly. Raises
    UsageError for a network that is no language model with a value head, and for a single candidate.
    """
    c = check(config)
    check_schedules(c)
    if not isinstance(network, LanguageModel) or not network.has_value:
        raise UsageError("a reward model needs a language model with a value head: set --network.value-head")
    prompt_length, apart = network.task.prompt_length, env.held_out or env
    pairs = draws(env, network, c)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        k_params, k_pairs, k_held_out = jax.random.split(key, 3)
        params = source(env, network).init(k_params)
        held_out: Preferences | tuple = ()
        if apart.task.rows is None:
            held_out = sample_preferences(k_held_out, apart, network, params, c.num_held_out, c.num_candidates)
        return State(init_train_state(tx, params), (pairs.init(k_pairs, params), held_out))

    def loss(params, batch):
        chosen, rejected, weight = batch
        total, ranked_right = ranking(reward_margin(network, params, chosen, rejected), weight)
        return total, {"loss": total, "ranked_right": ranked_right}

    def step(key, state, update):
        batch = pairs.batch(key, state.world[0], update)
        learning_rate = annealed_learning_rate(c, update)
        learner, metrics = gradient_step(loss, tx, learning_rate, state.learner, batch)
        action = jnp.concatenate(batch[:2])[:, prompt_length:]
        metrics["env_steps"] = jnp.int32(action.size)
        metrics["response_length"] = jnp.sum(action >= 0) / action.shape[0]
        return State(learner, state.world), metrics

    def measure(state):
        held_out = state.world[1]
        rows, weight = apart.task.rows, None
        if rows is None:
            rows, weight = jnp.stack([held_out.chosen, held_out.rejected], axis=1), held_out.weight
        params = state.learner.params
        return measured_pairs(lambda *pair: reward_margin(network, params, *pair), rows, weight, c.batch_size)

    def policy(state, deterministic):
        return evaluation_policy(network)(state, deterministic)._replace(respond=None)

    env_steps = 2 * c.batch_size * network.task.response_length
    return Algorithm(init, step, policy, UpdateSteps(env_steps, env_steps), measure=measure)
