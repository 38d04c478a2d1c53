"""The replay buffer against a plain ring of Python's, and what it costs."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import TinyQNetwork, arms_env, equations, quick_jit

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.sac import SACConfig, sac
from purepg.experience import replay
from purepg.train import guard, train
from purepg.types import Box

REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
CAPACITY, B = 12, 3

add: Any = jax.jit(replay.add)
sample = jax.jit(replay.sample, static_argnums=2)


class Item(NamedTuple):
    """Of every dtype that an observation, an action or a flag has."""

    image: Any
    flag: Any
    reward: Any
    nested: Any


def items(number: Any) -> Item:
    """One for each number, which any of its leaves tells."""
    number = np.asarray(number)
    image = np.stack([number % 256, number // 256], -1).astype(np.uint8)
    return Item(image, number % 2 == 1, number.astype(np.float32) / 4, {"id": number.astype(np.int32)})


def same(a: Any, b: Any) -> None:
    def leaf(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(leaf, a, b)


EXAMPLE = jax.tree.map(lambda x: x[0], items([0]))


def filled(num_batches: int, capacity: int = CAPACITY) -> Any:
    """Batches of numbers 1, 2, 3, ...: 0 is what was never written."""
    buffer = replay.init(EXAMPLE, capacity)
    for index in range(num_batches):
        buffer = add(buffer, items(1 + index * B + np.arange(B)), index)
    return buffer


def test_adding_overwrites_the_oldest_batch_round_after_round():
    buffer, ring = replay.init(EXAMPLE, CAPACITY), [0] * CAPACITY
    same(buffer, items(np.zeros(CAPACITY)))
    for index in range(11):
        numbers = 1 + index * B + np.arange(B)
        buffer = add(buffer, items(numbers), index)
        for i, number in enumerate(numbers):
            ring[(index * B + i) % CAPACITY] = int(number)
        same(buffer, items(ring))
    assert add._cache_size() == 1


def test_a_shape_and_a_dtype_are_example_enough():
    shapes = jax.eval_shape(lambda: EXAMPLE)
    same(replay.init(shapes, CAPACITY), items(np.zeros(CAPACITY)))


@pytest.mark.parametrize("num_batches", [1, 2, 4, 7])
def test_samples_are_uniform_over_what_was_written_and_nothing_else(num_batches):
    """Partly filled, filled, and in the second round."""
    buffer = filled(num_batches)
    written = min(num_batches * B, CAPACITY)
    assert replay.num_filled(buffer, num_batches, B) == written
    batch = sample(jax.random.key(num_batches), buffer, 20_000, written)
    id = np.asarray(batch.nested["id"])
    same(batch, items(id))  # an item's leaves stay together
    newest = num_batches * B
    counts = np.bincount(id, minlength=newest + 1)
    assert not counts[: newest + 1 - written].any() and len(counts) == newest + 1
    assert scipy.stats.chisquare(counts[-written:]).pvalue > 0.01


def test_samples_are_independent_of_each_other_and_the_keys_own():
    buffer = filled(4)
    first, second = (np.asarray(sample(jax.random.key(k), buffer, 10_000, CAPACITY).reward) for k in (0, 1))
    for a, b in ((first, second), (first[1:], first[:-1])):
        table = np.histogram2d(a, b, bins=CAPACITY)[0]
        found: Any = scipy.stats.chi2_contingency(table)
        assert found.pvalue > 0.01
    np.testing.assert_array_equal(first, sample(jax.random.key(0), buffer, 10_000, CAPACITY).reward)


@pytest.mark.parametrize("num_batches", [2, 4, 7])
def test_windows_are_successive_batches_of_one_place_each_as_likely_as_the_others(num_batches):
    L, W, newest = 2, 20_000, num_batches - 1
    buffer, rounds = filled(num_batches), min(num_batches, CAPACITY // B)
    arguments = jnp.int32(newest), replay.num_filled(buffer, num_batches, B)
    slots = quick_jit(lambda key: replay.windows(key, buffer, B, L, W, *arguments))(jax.random.key(num_batches))
    id = np.asarray(replay.take(buffer, slots).nested["id"])
    assert id.shape == (L, W) and (id[1] - id[0] == B).all()
    counts = np.bincount(id[0] - (1 + (num_batches - rounds) * B))
    assert len(counts) == (rounds - L + 1) * B
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_the_number_filled_grows_by_batches_up_to_the_capacity():
    buffer = replay.init(EXAMPLE, CAPACITY)
    assert [int(replay.num_filled(buffer, n, B)) for n in range(7)] == [0, 3, 6, 9, 12, 12, 12]
    # A run may add more transitions than 32 bits count.
    assert replay.num_filled(buffer, 2**31 - 1, B) == CAPACITY


@pytest.mark.parametrize(
    ("batch", "capacity"),
    [
        (items(np.arange(B)), CAPACITY + 1),
        (items(np.arange(B))._replace(reward=np.zeros(B, np.int32)), CAPACITY),
        (items(np.arange(B))._replace(flag=np.zeros(B, np.float32)), CAPACITY),
        (items(np.arange(B))._replace(image=np.zeros((B, 2), np.int32)), CAPACITY),
    ],
    ids=["length", "int for float", "float for bool", "int32 for uint8"],
)
def test_a_batch_that_does_not_divide_the_capacity_or_has_another_dtype_raises(batch, capacity):
    buffer = replay.init(EXAMPLE, capacity)
    with pytest.raises(AssertionError):
        replay.add(buffer, batch, 0)


# --- what it costs ---


def test_sampling_does_not_cost_more_from_a_larger_buffer():
    def cost(capacity):
        shapes = jax.eval_shape(lambda: replay.init(EXAMPLE, capacity))
        compiled: Any = sample.lower(jax.random.key(0), shapes, 32, 1).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    assert cost(2**8) == cost(2**16)


def test_in_a_population_adding_writes_one_slice_in_place_so_long_as_the_count_has_no_batch_axis():
    """No scatter, no copy and no pass over the buffer is left in what XLA makes of it."""
    buffer, batch, shape = jnp.zeros((5, 1200, 7)), jnp.zeros((5, B, 7)), r"= f32\[5,1200,7\]\{[\d,]*\} ([\w-]+)\("

    def whole_buffer_operations(axis, index):
        lanes = jax.jit(jax.vmap(replay.add, in_axes=(0, 0, axis)), donate_argnums=0)
        return set(re.findall(shape, str(lanes.lower(buffer, batch, index).compile().as_text())))

    assert whole_buffer_operations(None, 0) <= {"parameter", "fusion", "dynamic-update-slice"}
    assert not whole_buffer_operations(0, jnp.arange(5)) <= {"parameter", "fusion", "dynamic-update-slice"}


CONFIG: dict[str, Any] = {"num_envs": 4, "num_steps": 3, "batch_size": 8, "capacity": 10_000, "warmup_steps": 8}


@pytest.mark.parametrize(
    ("algorithm", "config", "kind"),
    [(ddpg, DDPGConfig(**CONFIG), "deterministic"), (sac, SACConfig(**CONFIG), "tanh_gaussian")],
    ids=["ddpg", "sac"],
)
def test_no_buffer_of_a_population_passes_through_a_select_or_a_branch(algorithm, config, kind):
    """Either would copy all of it at every step. It goes into loops and slices, and nowhere else."""
    members = 3
    guarded = guard(algorithm(arms_env(REAL), TinyQNetwork(kind), config), 10**6)
    keys = jax.random.split(jax.random.key(0), members)
    state = jax.eval_shape(jax.vmap(guarded.init), keys)

    def updates(keys, state, start):
        return jax.vmap(lambda key, state: train(key, guarded, state, start, 2))(keys, state)

    def is_large(x):
        return hasattr(x, "aval") and x.aval.size >= members * config.capacity

    touching = [e for e in equations(updates, keys, state, 0) if any(map(is_large, [*e.invars, *e.outvars]))]
    writes = [e for e in touching if e.primitive.name in ("scatter", "dynamic_update_slice")]
    assert {e.primitive.name for e in touching if e not in writes} == {"scan", "gather"}
    assert len(writes) == 6  # the leaves of a transition
    # A slice that vmap has made a scatter of, at one place for all members, is one that XLA makes a slice of again.
    assert all(e.primitive.name == "dynamic_update_slice" or e.invars[1].aval.ndim == 1 for e in writes)
