"""Gradient steps, shuffles, and epochs of minibatches whose every step is written down."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import quick_jit

from purepg.optimize import (
    TrainState,
    Widened,
    anneal,
    gradient_step,
    gradient_steps,
    init_train_state,
    minibatch_epochs,
    shuffle,
    step_direction,
)

# --- shuffles ---

# Every small n, and where the number of bits of an index changes.
SIZES = [*range(1, 25), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096, 10000]


def test_a_shuffle_is_a_permutation_for_every_n():
    """Under vmap, as a population takes it."""
    shuffles = quick_jit(jax.vmap(lambda key: [shuffle(key, n) for n in SIZES]))
    for n, permutations in zip(SIZES, shuffles(jax.random.split(jax.random.key(0), 3)), strict=True):
        for permutation in permutations:
            np.testing.assert_array_equal(np.sort(permutation), np.arange(n), err_msg=f"n = {n}")
        if n > 30:  # 1 / 30! is never
            assert len(np.unique(permutations, axis=0)) == 3


def test_a_shuffle_too_long_to_pack_is_a_permutation():
    n = 2**20 + 1
    permutation = np.asarray(shuffle(jax.random.key(0), n))
    assert (np.bincount(permutation, minlength=n) == 1).all()
    assert abs(np.corrcoef(permutation, np.arange(n))[0, 1]) < 0.01


@pytest.mark.parametrize("n", [5, 6])
def test_every_order_of_few_elements_is_equally_likely(n):
    """Over 200,000 keys, so that a deviation of 5 % of each is far beyond chance at n = 5, and at 6."""
    keys = jax.random.split(jax.random.key(2), 200_000)
    orders = np.asarray(quick_jit(jax.vmap(lambda key: shuffle(key, n)))(keys))
    counts = np.unique(orders @ n ** np.arange(n), return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert scipy.stats.chisquare(counts).pvalue > 0.001


@pytest.fixture(scope="module")
def shuffles_of_512():
    return np.asarray(jax.jit(jax.vmap(lambda key: shuffle(key, 512)))(jax.random.split(jax.random.key(1), 8000)))


def test_minibatch_means_spread_as_those_of_a_true_permutation(shuffles_of_512):
    """Var = sigma^2 / m * (B - m) / (B - 1), for data that drift with time, or differ by environment or by half."""
    B, m = 512, 128
    i = np.arange(B)
    data = np.stack([i / B, i % 2, i % 64, i // 256, np.random.default_rng(0).normal(size=B)])
    for j in range(B // m):
        means = data[:, shuffles_of_512[:, j * m : (j + 1) * m]].mean(-1)
        theory = data.var(-1) / m * (B - m) / (B - 1)
        # Over 8000 keys a variance is known to 1.6 %. Affine maps and short Feistel networks are a quarter off.
        np.testing.assert_allclose(means.var(-1) / theory, np.ones(len(data)), atol=0.065)
        assert (abs(means.mean(-1) - data.mean(-1)) < 4 * np.sqrt(theory / 8000)).all()


def test_every_element_is_equally_likely_at_every_place(shuffles_of_512):
    for element in (0, 1, 255, 511):
        place = np.argmax(shuffles_of_512 == element, axis=1)
        assert scipy.stats.chisquare(np.bincount(place, minlength=512)).pvalue > 0.001


def test_any_two_samples_share_a_minibatch_as_often_as_chance_has_it(shuffles_of_512):
    place = np.argsort(shuffles_of_512, axis=1) // 128
    chance = 127 / 511
    for other in (1, 2, 3, 16, 31, 64, 256, 511):
        share = np.mean(place[:, 0] == place[:, other])
        assert abs(share - chance) < 4 * np.sqrt(chance * (1 - chance) / 8000)


# --- one step ---


def quadratic(params, batch):
    """Half the mean squared distance to the batch: its gradient is params minus the batch's mean."""
    x, y = batch
    distance = jax.tree.map(lambda p, d: 0.5 * jnp.square(p - d).mean(0).sum(), params, {"x": x, "y": y})
    return jax.tree.reduce(jnp.add, distance), {"first": params["x"][0]}


PARAMS = {"x": jnp.array([3.0, 0.0]), "y": jnp.array([[4.0]])}
ZEROS = (jnp.zeros((6, 2)), jnp.zeros((6, 1, 1)))


def test_a_gradient_step_goes_down_the_gradient_by_the_learning_rate():
    batch = (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[[0.0]], [[2.0]]]))
    tx = optax.identity()
    (params, _), metrics = gradient_step(quadratic, tx, 0.5, init_train_state(tx, PARAMS), batch)
    np.testing.assert_allclose(params["x"], [3 - 0.5 * (3 - 2), 0 - 0.5 * (0 - 3)], rtol=1e-6)
    np.testing.assert_allclose(params["y"], [[4 - 0.5 * (4 - 1)]], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(1 + 9 + 9), rtol=1e-6)
    assert metrics["first"] == 3.0


@pytest.mark.parametrize(("max_grad_norm", "scale"), [(None, 1.0), (100.0, 1.0), (2.5, 0.5)])
def test_max_grad_norm_bounds_the_norm_over_all_leaves_together(max_grad_norm, scale):
    """The gradient is (3, 0) in one leaf and 4 in another: 5 in all, and each less than 5."""
    tx = step_direction("adam", max_grad_norm)
    (_, opt_state), metrics = gradient_step(quadratic, tx, 0.1, init_train_state(tx, PARAMS), ZEROS)
    first_moment = optax.tree.get(opt_state, "mu")  # (1 - b1) times the first gradient
    first_moment = np.concatenate([np.ravel(x) for x in jax.tree.leaves(first_moment)])
    np.testing.assert_allclose(first_moment, 0.1 * scale * np.array([3.0, 0.0, 4.0]), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], 5.0, rtol=1e-6)


def test_adams_first_step_is_the_learning_rate_in_each_coordinate():
    tx = step_direction("adam", None, adam_eps=1e-8)
    (params, _), _ = gradient_step(quadratic, tx, 0.1, init_train_state(tx, PARAMS), ZEROS)
    np.testing.assert_allclose(params["x"], [2.9, 0.0], rtol=1e-5)
    np.testing.assert_allclose(params["y"], [[3.9]], rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradient_steps_are_as_many_single_ones_on_the_whole_batch_with_the_metrics_of_the_last(num_steps):
    tx = step_direction("adam", 2.5)
    train_state, metrics = init_train_state(tx, PARAMS), {}
    for _ in range(num_steps):
        train_state, metrics = gradient_step(quadratic, tx, 0.1, train_state, ZEROS)
    steps = gradient_steps(quadratic, tx, 0.1, init_train_state(tx, PARAMS), ZEROS, num_steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), steps, (train_state, metrics))
    np.testing.assert_allclose(metrics["first"], 3.0 - 0.1 * (num_steps - 1), rtol=1e-3)


def test_anneal_falls_linearly_to_zero_and_stays_there():
    annealed = jax.vmap(lambda u: anneal(0.4, u, 4))(jnp.array([0, 1, 2, 4, 9]))
    np.testing.assert_allclose(annealed, [0.4, 0.3, 0.2, 0, 0], atol=1e-7)
    assert anneal(0.4, jnp.int32(7), None) == 0.4


# --- parameters narrower than float32 ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_stay_narrow_and_follow_those_of_float32_at_steps_too_small_for_them(dtype):
    """A thousand steps of a rate that changes, each far below half of the last place of 1 + 2^-7."""
    tx = step_direction("adam", 1.0, adam_eps=1e-8)  # 1e-8 is 0 in float16

    def loss(params, batch):
        return jnp.sum(params["x"].astype(jnp.float32)) * batch, {}

    @quick_jit
    def learn(params, rate):
        def step(train_state, update):
            return gradient_step(loss, tx, anneal(rate, update, 2000), train_state, 1e-6)[0], None

        return jax.lax.scan(step, init_train_state(tx, params), jnp.arange(1000))[0]

    start = {"x": jnp.array([1.0, 1.0078125, -3.0])}
    expected, state = learn(start, jnp.float32(1e-5))
    assert not isinstance(state, Widened)
    params, state = learn(jax.tree.map(lambda x: x.astype(dtype), start), jnp.float32(1e-5))
    assert params["x"].dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(x) for x in (jnp.int32, jnp.float32)}
    np.testing.assert_allclose(params["x"] + state.remainder["x"], expected["x"], rtol=1e-6)
    np.testing.assert_array_equal(params["x"], expected["x"].astype(dtype))
    assert (np.abs(expected["x"] - start["x"]) > 0.007).all()


# --- epochs of minibatches ---

T, N, NUM_EPOCHS, NUM_MINIBATCHES = 3, 4, 4, 3
B, NUM_STEPS = T * N, NUM_EPOCHS * NUM_MINIBATCHES
# Sample i is marked by a unit vector in one leaf and by the number i + 1 in another.
BATCH = (jnp.eye(B).reshape(T, N, B), jnp.arange(1.0, B + 1).reshape(T, N))


class History(NamedTuple):
    num_steps: jax.Array
    gradient: jax.Array  # [NUM_STEPS, B]


def historian(num_steps: int) -> optax.GradientTransformation:
    """Plain gradient descent that writes down every gradient it was given."""

    def init(params):
        del params
        return History(jnp.int32(0), jnp.zeros((num_steps, B)))

    def update(updates: Any, state: Any, params: Any = None):
        del params
        step, history = state
        return updates, History(step + 1, history.at[step].set(updates["sample"]))

    return optax.GradientTransformation(init, update)


def count_samples(params, batch):
    """Its gradient says which samples it saw, and the parameter `step` grows by the learning rate with each step, and
    with it the pretended KL, which is twice as large in the minibatch that holds the first sample."""
    unit, number = batch
    loss = -jnp.sum(params["sample"] @ (unit * number[:, None]).T) - params["step"]
    approx_kl = jnp.where(number.min() == 1, 0.2, 0.1) * params["step"]
    return loss, {"approx_kl": approx_kl, "size": jnp.float32(number.shape[0])}


def approx_kls(history, first_step):
    """What the loss reports before each step of a whole run with learning rate 1."""
    return np.where(history.gradient[:, 0] != 0, 0.2, 0.1) * (first_step + np.arange(NUM_STEPS))


def epochs(key, learning_rate, first_step, target_kl):
    params = {"sample": jnp.zeros(B), "step": first_step}
    tx = historian(NUM_STEPS)
    return minibatch_epochs(
        key,
        count_samples,
        tx,
        learning_rate,
        init_train_state(tx, params),
        BATCH,
        NUM_EPOCHS,
        NUM_MINIBATCHES,
        target_kl,
    )


jit_epochs = quick_jit(epochs)
KEY = jax.random.key(3)


def test_every_epoch_sees_every_sample_exactly_once_in_an_order_of_its_own():
    (params, history), metrics = jit_epochs(KEY, 1.0, 0.0, None)
    assert history.num_steps == NUM_STEPS
    seen = -np.asarray(history.gradient).reshape(NUM_EPOCHS, NUM_MINIBATCHES, B)
    for minibatch in seen.reshape(-1, B):
        sample = np.flatnonzero(minibatch)
        assert len(sample) == B // NUM_MINIBATCHES
        np.testing.assert_array_equal(minibatch[sample], sample + 1)  # the leaves were shuffled as one
    np.testing.assert_array_equal(seen.sum(axis=1), np.tile(np.arange(1, B + 1), (NUM_EPOCHS, 1)))
    assert len({epoch.tobytes() for epoch in seen}) == NUM_EPOCHS
    np.testing.assert_array_equal(params["sample"], NUM_EPOCHS * np.arange(1, B + 1))
    assert metrics["size"] == B // NUM_MINIBATCHES
    assert metrics["epochs_used"] == NUM_EPOCHS
    np.testing.assert_allclose(metrics["approx_kl"], approx_kls(history, 0).mean(), rtol=1e-5)

    other = jit_epochs(jax.random.key(4), 1.0, 0.0, None)[0].opt_state
    assert (other.gradient != history.gradient).any()


def test_one_epoch_of_one_minibatch_is_a_gradient_step():
    tx = step_direction("adam", 0.5)
    data = tuple(np.random.default_rng(0).normal(size=(T, N, *x.shape)).astype(np.float32) for x in PARAMS.values())
    args = (quadratic, tx, 0.1, init_train_state(tx, PARAMS))
    train_state, metrics = minibatch_epochs(KEY, *args, data, 1, 1)
    assert metrics.pop("epochs_used") == 1
    expected = gradient_step(*args, tuple(x.reshape(B, *x.shape[2:]) for x in data))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), (train_state, metrics), expected)


@pytest.mark.parametrize(
    ("target_kl", "first_step", "stops_in"),
    [
        (0.11, 0.0, range(1, 3)),  # the first epoch
        (0.4, 0.0, range(3, 9)),
        (0.01, 1.0, range(1)),  # the very first minibatch is past it
        (0.7, 0.0, range(6, NUM_STEPS)),
        (10.0, 0.0, range(NUM_STEPS, NUM_STEPS + 1)),  # never
    ],
)
def test_past_the_target_kl_nothing_changes_and_epochs_used_says_so(target_kl, first_step, stops_in):
    """Not even in a later minibatch whose own KL is below it."""
    (_, whole), _ = jit_epochs(KEY, 1.0, first_step, None)
    kls = approx_kls(whole, first_step)
    num_taken = int(np.argmax(np.append(kls > 1.5 * target_kl, True)))
    assert num_taken in stops_in
    (params, history), metrics = jit_epochs(KEY, 1.0, first_step, target_kl)
    expected = np.asarray(whole.gradient).copy()
    expected[num_taken:] = 0
    np.testing.assert_array_equal(history.gradient, expected)
    assert history.num_steps == num_taken
    np.testing.assert_array_equal(params["sample"], -expected.sum(axis=0))
    assert params["step"] == first_step + num_taken
    np.testing.assert_allclose(metrics["epochs_used"], num_taken / NUM_MINIBATCHES, rtol=1e-6)
    # The means are over the steps taken and the one that was refused, which was looked at.
    np.testing.assert_allclose(metrics["approx_kl"], kls[: num_taken + 1].mean(), rtol=1e-5)
    assert metrics["size"] == B // NUM_MINIBATCHES


def test_lanes_of_nested_vmaps_stop_by_themselves_as_in_a_plain_loop():
    target_kl = jnp.array([0.1, 0.25, 10.0])  # [H]
    learning_rate, first_step = jnp.array([1.0, 0.5, 0.25, 1.0]), jnp.array([0.0, 0.0, 0.0, 10.0])  # [S]
    keys = jax.random.split(KEY, 4)
    over_seeds = jax.vmap(epochs, (0, 0, 0, None))
    nested = jax.vmap(over_seeds, (None, None, None, 0))
    args = (keys, learning_rate, first_step, target_kl)
    assert "cond[" in str(jax.make_jaxpr(nested)(*args))  # a branch, not a select: once all have stopped, it is cheap
    population = quick_jit(nested)(*args)
    used = set()
    for h in range(3):
        for s in range(4):
            alone = jit_epochs(keys[s], learning_rate[s], first_step[s], target_kl[h])
            member = jax.tree.map(lambda x, h=h, s=s: x[h, s], population)
            jax.tree.map(np.testing.assert_array_equal, member[0], alone[0])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), member[1], alone[1])
            used.add(float(member[1]["epochs_used"]))
    assert len(used) > 4


def test_a_batch_that_the_minibatches_do_not_divide_raises():
    with pytest.raises(AssertionError):
        minibatch_epochs(KEY, count_samples, optax.identity(), 0.1, TrainState(PARAMS, ()), BATCH, 1, 5)
