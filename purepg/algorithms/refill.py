"""The groups of one update, sampled in one round, or in several until enough of them have a signal.

A group whose returns are all equal has no signal: its advantages are 0. Axes: `P` starts, `G` group, `T` steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import GroupConfig
from purepg.algorithms.groups import GroupedEpisodes, Source
from purepg.equations.advantages import has_signal
from purepg.lanes import any_lane
from purepg.types import Array, EpisodeMetrics, Key, Metrics, Params


class Sampled(NamedTuple):
    """What was sampled for an update, with what was left out of it."""

    total_return: Array
    env_steps: Array  # int32: steps in the mask, which for responses are the generated tokens
    num_episodes: Array  # int32
    num_silent: Array  # int32: groups without signal

    @classmethod
    def of(cls, data: GroupedEpisodes) -> "Sampled":
        num_groups, group_size = data.mask.shape[:2]
        num_silent = num_groups - jnp.sum(_signal(data), dtype=jnp.int32)
        env_steps = jnp.sum(data.mask, dtype=jnp.int32)
        return cls(jnp.sum(data.reward), env_steps, jnp.int32(num_groups * group_size), num_silent)


def _signal(data: GroupedEpisodes) -> Array:
    """Whether the returns of each group differ, `[P]`."""
    return has_signal(jnp.sum(data.reward, axis=-1))[:, 0]


def sample_for_update(
    key: Key, groups: Source, params: Params, c: GroupConfig, world: Any = ()
) -> tuple[GroupedEpisodes, Array, Sampled]:
    """(groups `[P, G, ...]`, whether each has a signal `[P]`, all that was sampled for them).

    With `max_rounds` above 1, these are the first `num_prompts` groups with a signal; only after the last round may
    some have none.

    Args:
      world: that of the state, in whose place groups may stand that were sampled and rewarded outside of the update:
        `[P, G, ...]`, or with `max_rounds` above 1 those of all rounds, `[max_rounds, P, G, ...]`.
    """
    recorded = isinstance(world, GroupedEpisodes)
    if c.max_rounds == 1:
        data = world if recorded else groups.sample(key, params, c.num_prompts, c.group_size)
        return data, _signal(data), Sampled.of(data)

    def draw(i):
        if recorded:
            return jax.tree.map(lambda x: x[i], world)
        return groups.sample(jax.random.fold_in(key, i), params, c.num_prompts, c.group_size)

    def one_round(carry):
        i, data, signal, sampled = carry
        needed = ~jnp.all(signal)
        new = draw(i)
        new_signal = _signal(new)
        # Those that were there keep their places; with a signal in all of them, nothing changes.
        first = jnp.argsort(jnp.concatenate([jnp.where(signal, 0, 3), jnp.where(new_signal, 1, 2)]), stable=True)
        data, signal = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new])[first[: c.num_prompts]], (data, signal), (new, new_signal)
        )
        more = jax.tree.map(lambda x: jnp.where(needed, x, 0), Sampled.of(new))
        return i + 1, data, signal, Sampled(*map(jnp.add, sampled, more))

    def unfinished(carry):
        return (carry[0] < c.max_rounds) & any_lane(~carry[2])

    shapes = jax.eval_shape(draw, jnp.int32(0))
    shapes = shapes, jax.eval_shape(_signal, shapes), jax.eval_shape(Sampled.of, shapes)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.while_loop(unfinished, one_round, (jnp.int32(0), *nothing))[1:]


def info(data: GroupedEpisodes, sampled: Sampled) -> Metrics:
    """The `EpisodeMetrics` of all that was sampled, and the share of its groups without a signal. For parameters
    narrower than float32 also `sampler_log_ratio`, the largest difference between a token's log-probability as it was
    scored and as it was sampled; for a truncated sampler, a whole response's.
    """
    total_return, env_steps, num_episodes, num_silent = sampled
    metrics = EpisodeMetrics(
        episode_return=total_return / num_episodes,
        episode_length=env_steps / num_episodes,
        num_episodes=num_episodes,
        env_steps=env_steps,
    )
    found = dict(metrics) | {"groups_without_signal": num_silent * data.mask.shape[1] / num_episodes}
    gap = data.log_correction
    return found if gap is None else found | {"sampler_log_ratio": jnp.max(jnp.abs(gap))}
