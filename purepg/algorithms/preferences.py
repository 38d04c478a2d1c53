"""Pairs of responses of which one is preferred, and what a reward model makes of them.

    P(y_w preferred to y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))                  Bradley & Terry 1952

A row is `[L + R]` tokens: the columns of a prompt, then those of a response.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import AnnealConfig, LearningRateConfig
from purepg.algorithms.groups import source
from purepg.config import Count, Positive
from purepg.equations.losses import preference
from purepg.language.model import LanguageModel
from purepg.loops import in_chunks
from purepg.optimize import check_batch, epoch_batch, key_of_epochs
from purepg.types import Array, Env, Key, Params, UsageError


class Preferences(NamedTuple):
    """N pairs."""

    chosen: Array  # [N, L + R]
    rejected: Array  # [N, L + R]
    weight: Array  # [N] 1 where the chosen response earned more, 0 where both earned the same
    num_tokens: Array  # generated for all candidates, also for those in no pair


@dataclass(frozen=True, kw_only=True)
class PairsConfig(AnnealConfig, LearningRateConfig):
    """Learning from pairs.

    Attributes:
      num_pairs: prompts in the data set, which is sampled once; one whose responses all earned the same gives no pair.
        Pairs from a file are all its rows, drawn without replacement within an epoch.
      num_candidates: responses to each prompt, of which the best and the worst make the pair.
      batch_size: pairs in the minibatch of a gradient step.
    """

    adam_eps: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0
    num_pairs: Count = 2048
    num_candidates: Count = 4
    batch_size: Count = 128


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


class Draws(NamedTuple):
    """Where the pairs of gradient steps come from: a file, or responses of the initial policy.

    init: `init(key, params)`, the algorithm's world, which stays as it is.
    batch: `batch(key, world, update) -> (chosen, rejected, weight)`, as from `draw_pairs`.
    """

    init: Callable[[Key, Params], Any]
    batch: Callable[[Key, Any, Array], tuple[Array, Array, Array]]


def draws(env: Env, model: LanguageModel, c: PairsConfig) -> Draws:
    """The pairs that a config asks for.

    Raises:
      UsageError: a single candidate, which cannot make a pair, or a file with fewer pairs than a batch.
    """
    rows = model.task.rows
    if rows is not None:
        check_batch(c.batch_size, len(rows))

        def of_rows(key, world, update):
            del key
            index = epoch_batch(world, len(rows), update, c.batch_size)
            return jnp.asarray(rows[:, 0])[index], jnp.asarray(rows[:, 1])[index], jnp.ones(c.batch_size)

        return Draws(lambda key, params: key_of_epochs(key), of_rows)
    if c.num_candidates < 2:
        raise UsageError(f"num_candidates ({c.num_candidates}) must be at least 2, to make a pair")
    return Draws(
        lambda key, params: sample_preferences(key, env, model, params, c.num_pairs, c.num_candidates),
        lambda key, world, update: draw_pairs(key, world, c.batch_size),
    )


def ranking(margin: Array, weight: Array) -> tuple[Array, Array]:
    """(loss, share ranked correctly) over the pairs of weight 1; 0 where there is none. A tie is half right.

    Args:
      margin: `[B]`, the score of the chosen response minus that of the rejected. weight: `[B]`, as in `Preferences`.
    """
    num_pairs = jnp.maximum(jnp.sum(weight), 1.0)
    right = (jnp.sign(margin) + 1) / 2
    return jnp.sum(weight * preference(margin)) / num_pairs, jnp.sum(weight * right) / num_pairs


def measured_pairs(
    margin: Callable[[Array, Array], Array], rows: Any, weight: Array | None, at_once: int
) -> dict[str, Array]:
    """`Algorithm.measure` of held-out pairs `[N, 2, L + R]`: their loss, and the share ranked correctly.

    Args:
      margin: `margin(chosen, rejected)` of some of them.
      weight: `[N]`, as in `Preferences`. None: 1.
    """
    found = in_chunks(margin, at_once, *jnp.asarray(rows).swapaxes(0, 1))
    total, ranked_right = ranking(found, jnp.ones_like(found) if weight is None else weight)
    return {"eval/loss": total, "eval/ranked_right": ranked_right}


def reward_margin(model: LanguageModel, params: Params, chosen: Array, rejected: Array) -> Array:
    """r(x, y_w) - r(x, y_l) of pairs of rows, `[B]`."""
    reward = model.apply(params, jnp.concatenate([chosen, rejected]))[1]
    return reward[: len(chosen)] - reward[len(chosen) :]


def learned_reward(model: LanguageModel, params: Params) -> Callable[[Array, Array], Array]:
    """The reward model as a task's `reward(prompt, response)`."""
    return lambda prompt, response: model.apply(params, jnp.concatenate([prompt, response]))[1]
