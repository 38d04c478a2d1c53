"""A GPU's form of loops, reductions and distributions gives the numbers of a CPU's, and joins what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arms_env, equations, quick_jit

from purepg import loops
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.equations.advantages import gae
from purepg.equations.distributions import Categorical
from purepg.loops import Joined, all_finite, scan, sum_of_squares
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.runtime import compiles_for_gpu, compiling_for
from purepg.train import guard, train

TREE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "b": jnp.array([7.0, 8.0, 9.0]),
    "half": jnp.array([1.5], jnp.bfloat16),
    "steps": jnp.int32(3),
    "left": jnp.int32(-4),
    "key": jax.random.key(5),
    "nothing": (),
    "flag": jnp.array([True, False]),
}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(numbers, x) for x in (a, b)))


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_small_arrays_are_one_vector_for_each_dtype_and_come_back_as_they_were():
    form = Joined(TREE)
    arrays = form.join(TREE)
    assert sorted(x.size for x in arrays) == [1, 1, 2, 2, 9]  # the key, bfloat16's, integers, flags, float32's
    equal(form.split(arrays), TREE)


def test_large_arrays_and_parts_that_are_named_stay_apart():
    large = {"a": jnp.zeros(loops.JOINED_BYTES // 4 + 1), "b": jnp.zeros(2), "c": jnp.zeros(3)}
    assert [x.size for x in Joined(large).join(large)] == [5, large["a"].size]
    assert [x.size for x in Joined(large, {"a": True, "b": False, "c": True}).join(large)] == [large["a"].size, 2, 3]
    tree = {"a": jnp.zeros(600), "b": jnp.zeros(2), "c": jnp.zeros(3)}
    with loops.lanes(10), loops.lanes(100):
        assert [x.size for x in Joined(tree).join(tree)] == [5, 600]
        assert not loops.alone()
    assert [x.size for x in Joined(tree).join(tree)] == [605]
    assert loops.alone()


@pytest.mark.parametrize(("length", "unroll", "reverse"), [(12, 8, False), (7, 4, True), (6, 32, True)])
def test_a_scan_of_several_steps_an_iteration_is_the_scan_of_single_ones(length, unroll, reverse):
    def step(carry, x):
        key, total, n, buffer = carry
        key, drawn = jax.random.split(key)
        total = 0.9 * total + x["a"] * jax.random.normal(drawn)
        carry = key, total, n + 1, buffer.at[n % 4].set(total.sum())
        return carry, {"total": total, "first": total[0], "n": n, "odd": x["odd"]}

    carry = jax.random.key(0), jnp.ones(3), jnp.int32(0), jnp.zeros(4)
    xs = {"a": jnp.arange(1.0, length + 1), "odd": jnp.arange(length) % 2 == 1}
    expected = jax.lax.scan(step, carry, xs, reverse=reverse)
    with compiling_for("gpu"):
        found = scan(step, carry, xs, reverse=reverse, unroll=unroll, join=(True, True, True, False))
    found, expected = (jax.tree.map(numbers, x) for x in (found, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_on_a_gpu_an_iteration_makes_several_steps_and_carries_one_vector_for_each_dtype():
    carry = jnp.ones(3), jnp.zeros(2), jnp.int32(0)

    def loop(carry):
        return scan(lambda c, _: ((2 * c[0], c[1] + 1, c[2] + 1), (c[0], c[1])), carry, length=12, unroll=8)

    def form():
        (found,) = (e for e in equations(lambda c: loop(c), carry) if e.primitive.name == "scan")
        return found.params["unroll"], found.params["num_carry"], len(found.outvars)

    assert form() == (1, 3, 5)
    with compiling_for("gpu"):
        assert form() == (6, 2, 3)


def test_reductions_over_a_tree_see_every_number_in_both_forms():
    floats = {name: TREE[name] for name in ("w", "b", "steps")}
    for platform in ("cpu", "gpu"):
        with compiling_for(platform):
            assert compiles_for_gpu() == (platform == "gpu")
            assert sum_of_squares(floats) == 55 + 194 + 9
            assert all_finite(TREE)
            assert not all_finite(TREE | {"b": TREE["b"].at[2].set(jnp.nan)})
            assert not all_finite(TREE | {"half": TREE["half"].at[0].set(jnp.inf)})


@pytest.mark.parametrize("num_actions", [2, 16, 17])
def test_a_categorical_is_the_same_one_in_both_forms(num_actions):
    logits = 3 * jax.random.normal(jax.random.key(0), (50, num_actions))
    logits = logits.at[:10, 1].set(-jnp.inf)

    def facts(logits):
        policy = Categorical(logits)
        action = policy.sample(jax.random.key(1))
        slope = jax.grad(lambda x: jnp.sum(Categorical(x).log_prob(action) - Categorical(x).entropy()))(logits)
        other = Categorical(logits[::-1].at[-10:, 1].set(0.0))
        return action, policy.log_prob(action), policy.entropy(), policy.kl(other), slope, policy.mode()

    action, *expected = quick_jit(facts)(logits)
    with compiling_for("gpu"):
        found_action, *found = quick_jit(lambda x: facts(x))(logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)
    np.testing.assert_array_equal(found_action, action)


def test_gae_is_the_same_in_both_forms():
    keys = jax.random.split(jax.random.key(0), 5)
    reward, value, next_value = (jax.random.normal(key, (40, 3)) for key in keys[:3])
    terminated, truncated = (jax.random.bernoulli(key, 0.1, (40, 3)) for key in keys[3:])
    expected = gae(reward, value, next_value, terminated, truncated, 0.97, 0.9)
    with compiling_for("gpu"):
        found = gae(reward, value, next_value, terminated, truncated, 0.97, 0.9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_updates_of_several_agents_with_memory_are_the_same_in_both_forms():
    """Those of one agent without memory are in tests/test_algorithms.py, for every algorithm."""
    env = arms_env()
    network = actor_critic(env, NetworkConfig(hidden=(8,), memory="stack"))
    config = PPOConfig(num_envs=4, num_steps=12, num_epochs=2, num_minibatches=2, window=6)
    algorithm = guard(ppo(env, network, config), 10**6)

    def run(key):
        state, metrics = train(key, algorithm, algorithm.init(key), 0, 2)
        return state.learner, metrics

    def agents(keys):
        with loops.lanes(2):
            return jax.vmap(run)(keys)

    keys = jax.random.split(jax.random.key(3), 2)
    expected = quick_jit(lambda keys: agents(keys))(keys)
    with compiling_for("gpu"):
        found = quick_jit(lambda keys: agents(keys))(keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), found, expected)
