"""The transformer that remembers: what its layers compute, and how far they look back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.lanes import select
from purepg.networks.attention import GatedTransformer, Layer, Past

M, K, H, FEATURES, L, N = 2, 2, 3, 16, 14, 2
START = 9  # an episode begins at this step of the window; the other goes on from before
CELL = GatedTransformer(M, FEATURES, K, H)


@pytest.fixture(scope="module")
def window():
    """(parameters far from their first ones, memory of one step of an episode, inputs, starts)."""
    starts = jnp.zeros((L, N), bool).at[START].set(True)
    k_init, k_far, k_past, k_x = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(k_x, (L, N, FEATURES))
    memory = Past(jax.random.normal(k_past, (N, K, M, FEATURES)), jnp.ones(N, jnp.int32))
    params = CELL.init(k_init, memory, x, starts, method="unroll")
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(k_far, p.shape), params), memory, x, starts


def features(params, memory, x, starts):
    return np.asarray(quick_jit(lambda *args: CELL.apply(*args, method="unroll")[1])(params, memory, x, starts))


def test_a_step_is_seen_by_the_steps_after_it_in_its_episode_as_far_as_the_layers_reach(window):
    params, memory, x, starts = window
    before, other = features(*window), jax.random.normal(jax.random.key(1), (N, FEATURES))
    for s in range(L):
        changed = (features(params, memory, x.at[s].set(other), starts) != before).any(axis=-1)
        t = np.arange(L)
        seen = (t >= s) & (t <= s + K * M) & ((s >= START) == (t >= START))
        np.testing.assert_array_equal(changed, np.tile(seen[:, None], N), f"step {s}")


def test_of_the_memory_a_window_sees_the_steps_of_its_episode_and_no_others(window):
    params, memory, x, starts = window
    before = features(*window)
    steps_of = {"its last step": (1, True), "the one before, of another episode": (0, False)}
    for what, (m, visible) in steps_of.items():
        other = memory._replace(inputs=memory.inputs.at[:, :, m].multiply(-1.0))
        assert (features(params, other, x, starts)[0] != before[0]).any() == visible, what
    fresh = starts.at[0].set(True)
    empty = jax.tree.map(jnp.zeros_like, memory)
    np.testing.assert_array_equal(features(params, memory, x, fresh), features(params, empty, x, fresh))


def test_positions_count_from_the_step_itself_and_their_order_matters(window):
    params, memory, x, _ = window
    never = jnp.zeros((L, N), bool)
    reach = K * M
    shifted = features(params, memory, jnp.roll(x, -1, axis=0), never)
    whole = features(params, memory, x, never)
    np.testing.assert_allclose(shifted[reach + 1 : -1], whole[reach + 2 :], rtol=0, atol=1e-6)
    swapped = features(params, memory, x.at[jnp.array([4, 5])].set(x[jnp.array([5, 4])]), never)
    assert (np.abs(swapped[6] - whole[6]).max(axis=-1) > 1e-3).all()


def test_the_memory_after_a_step_is_the_same_step_by_step_and_for_a_window_at_once(window):
    params, memory, x, starts = window

    @quick_jit
    def both(params):
        at_once = CELL.apply(params, memory, x, starts, method="unroll")

        def step(memory, inputs):
            x, starts = inputs
            first = CELL.initialize_carry(jax.random.key(0), (N, 1))
            memory, y = CELL.apply(params, select(starts, first, memory), x)
            return memory, (memory, y)

        return at_once, jax.lax.scan(step, memory, (x, starts))[1]

    (at_once, of_window), (by_step, of_steps) = both(params)
    np.testing.assert_allclose(of_window, of_steps, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(at_once.steps, by_step.steps)
    held = np.arange(M) >= M - np.asarray(by_step.steps)[..., None]  # the rest belongs to no step of the episode
    gap = np.abs(np.asarray(at_once.inputs) - by_step.inputs).max(axis=(2, 4))
    assert held.sum() > L and gap[held].max() < 1e-5


def test_a_layer_is_its_equation_query_by_query(window):
    """In float64, with NumPy and loops over heads, queries and keys."""
    rng = np.random.default_rng(0)
    layer, inputs = Layer(M, FEATURES, H), rng.normal(size=(M + 4, 1, FEATURES))
    reach = np.array([1, 2, 0, 1])  # steps back; the third query begins an episode
    column, t = np.arange(M + 4), np.arange(4)[:, None] + M
    visible = (column <= t) & (column >= t - reach[:, None])
    with jax.enable_x64(True):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs, visible[None])
        params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
        found = np.asarray(quick_jit(layer.apply)(params, inputs, visible[None]))[:, 0]
    p, x = params["params"], inputs[:, 0]

    def norm(x, of):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * of["scale"] + of["bias"]

    def heads(name):
        return np.einsum("sn,nhd->shd", norm(x, p["attention_norm"]), p[name]["kernel"]) + p[name]["bias"]

    def gate(x, y, of):
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        reset, update, proposed = np.split(y @ of["y"]["kernel"], 3, axis=-1)
        for_reset, for_update = np.split(x @ of["x"]["kernel"] + of["x"]["bias"], 2, axis=-1)
        r, z = sigmoid(reset + for_reset), sigmoid(update - 2 + for_update)
        return (1 - z) * x + z * np.tanh(proposed + (r * x) @ of["reset_x"]["kernel"])

    query, key, value = heads("query"), heads("key"), heads("value")
    attended = np.zeros((4, H, query.shape[-1]))
    for t in range(4):
        for h in range(H):
            steps = [M + t - back for back in range(reach[t] + 1)]
            score = [query[M + t, h] @ (key[s, h] + p["distance"][M - (M + t - s), h]) for s in steps]
            weight = np.exp(np.array(score) / np.sqrt(query.shape[-1]))
            attended[t, h] = (weight / weight.sum()) @ value[steps, h]
    y = np.einsum("thd,hdn->tn", attended, p["out"]["kernel"]) + p["out"]["bias"]
    x = gate(x[M:], np.maximum(y, 0), p["attention_gate"])
    y = np.maximum(norm(x, p["mlp_norm"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"], 0)
    y = np.maximum(y @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"], 0)
    np.testing.assert_allclose(found, gate(x, y, p["mlp_gate"]), rtol=1e-12, atol=1e-12)
