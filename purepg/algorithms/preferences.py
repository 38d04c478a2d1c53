"""Pairs of responses of which one is preferred, and a reward model that is fitted to them.

    P(y_w preferred to y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))                  Bradley & Terry 1952

A row is `[L + R]` tokens: the columns of a prompt, then those of a response.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from purepg.algorithms.groups import source
from purepg.config import Count, Positive, check
from purepg.equations.losses import preference
from purepg.language.model import LanguageModel
from purepg.optimize import TrainState, gradient_step, init_train_state, step_direction
from purepg.types import Array, Env, Key, Metrics, Params


class Preferences(NamedTuple):
    """N pairs."""

    chosen: Array  # [N, L + R]
    rejected: Array  # [N, L + R]
    weight: Array  # [N] 1 where the chosen response earned more, 0 where both earned the same
    num_tokens: Array  # generated for all candidates, also for those in no pair


def sample_preferences(
    key: Key, env: Env, model: LanguageModel, params: Params, num_pairs: int, num_candidates: int = 2
) -> Preferences:
    """Samples `num_candidates` responses to each of `num_pairs` prompts, and pairs the one with the highest reward with
    the one with the lowest."""
    groups = source(env, model).sample(key, params, num_pairs, num_candidates)
    reward = jnp.sum(groups.reward, axis=-1)
    pair = jnp.arange(num_pairs)
    best, worst = jnp.argmax(reward, axis=1), jnp.argmin(reward, axis=1)
    weight = (reward[pair, best] > reward[pair, worst]).astype(jnp.float32)
    return Preferences(groups.obs[pair, best], groups.obs[pair, worst], weight, jnp.sum(groups.mask))


def draw_pairs(key: Key, pairs: Preferences, batch_size: int) -> tuple[Array, Array, Array]:
    """(chosen, rejected, weight) of `batch_size` pairs, drawn with replacement from those of weight 1."""
    index = jax.random.categorical(key, jnp.log(pairs.weight), shape=(batch_size,))
    return pairs.chosen[index], pairs.rejected[index], pairs.weight[index]


def ranking(margin: Array, weight: Array) -> tuple[Array, Array]:
    """(loss, share ranked correctly) over the pairs of weight 1; 0 where there is none.

    Args:
      margin: `[B]`, the score of the chosen response minus that of the rejected. weight: `[B]`, as in `Preferences`.
    """
    num_pairs = jnp.maximum(jnp.sum(weight), 1.0)
    return jnp.sum(weight * preference(margin)) / num_pairs, jnp.sum(weight * (margin > 0)) / num_pairs


@dataclass(frozen=True)
class RewardModelConfig:
    """How a reward model is fitted: gradient steps of Adam on batches of pairs."""

    num_steps: Count = 300
    batch_size: Count = 64
    learning_rate: Positive = 1e-3


def fit_reward_model(
    key: Key, model: LanguageModel, params: Params, pairs: Preferences, config: RewardModelConfig
) -> tuple[Params, Metrics]:
    """Maximises the likelihood of the pairs under Bradley & Terry.

    Args:
      model: has a value head; V after the last token of a response is its reward.
      params: initial parameters.
    Returns:
      (params, metrics): `loss` and `accuracy`, the share of pairs ranked correctly, each `[num_steps]`.
    """
    config = check(config)
    tx = step_direction("adam", 1.0)

    def loss(params, batch):
        chosen, rejected, weight = batch
        margin = model.apply(params, chosen)[1] - model.apply(params, rejected)[1]
        total, accuracy = ranking(margin, weight)
        return total, {"loss": total, "accuracy": accuracy}

    def step(train_state: TrainState, key: Key):
        batch = draw_pairs(key, pairs, config.batch_size)
        return gradient_step(loss, tx, config.learning_rate, train_state, batch)

    keys = jax.random.split(key, config.num_steps)
    train_state, metrics = jax.lax.scan(step, init_train_state(tx, params), keys)
    return train_state.params, metrics


def learned_reward(model: LanguageModel, params: Params) -> Callable[[Array, Array], Array]:
    """The reward model as a task's `reward(prompt, response)`."""
    return lambda prompt, response: model.apply(params, jnp.concatenate([prompt, response]))[1]
