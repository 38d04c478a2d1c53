"""The transformer against itself: cached and whole, padded and not, grouped and plain; and its parts by hand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.language.transformer import (
    ONE_HOT_TOKENS,
    RMSNorm,
    Transformer,
    TransformerConfig,
    embed,
    init_cache,
    rotary_angle,
    rotate,
)
from purepg.types import UsageError

SMALL = TransformerConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24, qkv_bias=True, value_head=True
)
V, B, n = 11, 4, 7
NETWORK: Any = Transformer(SMALL, V)
# Nothing empty; empty places on the left; on both sides; on the right and in between.
PRESENT = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0]], bool)
TOKEN: Any = np.where(PRESENT, np.random.default_rng(0).integers(0, V, (B, n)), -1).astype(np.int32)


def params_of(network: Any = NETWORK, seed: int = 0) -> Any:
    """Every number random: norms' scales, biases and the value head too, none of them at what it starts from."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), TOKEN)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    fill = [rng.normal(size=x.shape) / math.sqrt(x.shape[0] if len(x.shape) == 2 else 4) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in fill])


PARAMS = params_of()
apply = quick_jit(NETWORK.apply)


def whole(token: Any, params: Any = PARAMS) -> tuple[np.ndarray, np.ndarray]:
    logits, value, cache = apply(params, jnp.asarray(token))
    assert cache is None
    return np.asarray(logits), np.asarray(value)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_logits_and_values_have_a_place_for_every_token_and_no_value_head_gives_none():
    logits, value = whole(TOKEN)
    assert logits.shape == (B, n, V) and value.shape == (B, n) and logits.dtype == np.float32
    bare = Transformer(dataclasses.replace(SMALL, value_head=False), V)
    assert jax.eval_shape(bare.apply, params_of(bare), TOKEN)[1] is None


@pytest.mark.parametrize("prompt", [1, 3])
def test_decoding_token_by_token_with_a_cache_is_one_whole_pass(prompt):
    """A prompt at once and then one column at a time, in a scan whose column is traced, in a cache with columns to
    spare that hold rubbish."""
    cache = init_cache(SMALL, B, n + 2)
    cache = cache._replace(key=cache.key + 9, value=cache.value - 9, present=~cache.present)

    def decode(params, token, cache):
        first, _, cache = NETWORK.apply(params, token[:, :prompt], cache)

        def step(cache, column):
            at = jax.lax.dynamic_slice_in_dim(token, column, 1, axis=1)
            logits, value, cache = NETWORK.apply(params, at, cache, column)
            return cache, (logits[:, 0], value[:, 0])

        cache, (logits, value) = jax.lax.scan(step, cache, jnp.arange(prompt, n))
        return jnp.concatenate([first, jnp.moveaxis(logits, 0, 1)], axis=1), value.T, cache

    logits, value, cache = quick_jit(decode)(PARAMS, jnp.asarray(TOKEN), cache)
    expected, expected_value = whole(TOKEN)
    close(logits[PRESENT], expected[PRESENT])
    close(value[PRESENT[:, prompt:]], expected_value[:, prompt:][PRESENT[:, prompt:]])
    np.testing.assert_array_equal(cache.present[:, :n], PRESENT)


def test_where_the_empty_places_stand_changes_nothing():
    """Each row's tokens alone, without its empty places, give what they give among them."""
    logits, value = whole(TOKEN)
    for i in range(B):
        alone = np.full((B, n), -1, np.int32)
        alone[0, : PRESENT[i].sum()] = TOKEN[i][PRESENT[i]]
        own_logits, own_value = whole(alone)
        close(own_logits[0, : PRESENT[i].sum()], logits[i][PRESENT[i]])
        close(own_value[0, : PRESENT[i].sum()], value[i][PRESENT[i]])


def test_logits_do_not_depend_on_later_tokens_and_do_on_every_earlier_one():
    logits, value = whole(TOKEN)
    for j in range(n):
        changed = TOKEN.copy()
        changed[0, j] = (changed[0, j] + 1) % V
        new, new_value = whole(changed)
        np.testing.assert_array_equal(new[0, :j], logits[0, :j])
        np.testing.assert_array_equal(new_value[0, :j], value[0, :j])
        assert (np.abs(new[0, j:] - logits[0, j:]).max(axis=-1) > 1e-4).all()
        np.testing.assert_array_equal(new[1:], logits[1:])


def test_what_the_model_makes_of_an_empty_place_reaches_no_logit_and_no_gradient():
    """What it makes there is of token 0's embedding, a number that the empty places' logits depend on and no other."""

    def squares(params, where):
        logits, value, _ = NETWORK.apply(params, jnp.where(TOKEN == 0, 1, TOKEN))
        return jnp.sum(jnp.where(where[..., None], logits[..., 1:] ** 2, 0)) + jnp.sum(jnp.where(where, value, 0))

    gradient = quick_jit(jax.grad(squares))
    assert not gradient(PARAMS, PRESENT)["params"]["embedding"][0].any()
    assert gradient(PARAMS, ~PRESENT)["params"]["embedding"][0].any()


def test_gradients_are_finite_in_rows_partly_and_wholly_empty_even_of_a_loss_that_forgot_the_mask():
    token = np.concatenate([TOKEN, np.full((2, n), -1, np.int32)])

    def log_probs(params):
        logits, value, _ = NETWORK.apply(params, token)
        return jnp.sum(jax.nn.log_softmax(logits)) + jnp.sum(value)

    total, gradient = quick_jit(jax.value_and_grad(log_probs))(PARAMS)
    assert np.isfinite(total)
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), gradient)


def test_a_wholly_empty_row_leaves_the_others_as_they_are_and_is_finite():
    token = np.array(TOKEN)
    token[0] = -1
    logits, _ = whole(token)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[1:], whole(TOKEN)[0][1:])


def test_rotated_queries_and_keys_meet_by_their_positions_difference_alone():
    d = 8
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, d))

    def score(i, j):
        at = [rotate(x, rotary_angle(jnp.array([p]), d, 100.0)) for x, p in ((query, i), (key, j))]
        return float(jnp.vdot(*at))

    for i, j in ((0, 0), (5, 2), (2, 5), (9, 1)):
        close(score(i, j), score(i + 40, j + 40), 1e-4)
    assert abs(score(5, 2) - score(2, 5)) > 1e-3 and abs(score(5, 2) - score(6, 2)) > 1e-3


def test_rotation_turns_the_pairs_of_two_halves_by_hand():
    """d = 4, theta = 100: the pairs (x0, x2) and (x1, x3), at 1 and 1/10 radian per token."""
    np.testing.assert_allclose(rotary_angle(jnp.array([0, 3]), 4, 100.0), [[0, 0], [3, 0.3]], rtol=1e-6)
    x = jnp.array([[[1.0, 0.0, 0.0, 2.0]]])  # one column, one head
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    np.testing.assert_allclose(rotate(x, jnp.array([[3.0, 0.3]]))[0, 0], expected, rtol=1e-5)


def widened(params: Any, repeats: int) -> Any:
    """Every head of keys and values `repeats` times in a row, as heads of its own."""

    def repeat(path, x):
        keys = [key.key for key in path]
        if keys[-2] not in ("key", "value"):
            return x
        heads = x.reshape(*x.shape[:-1], SMALL.num_kv_heads, SMALL.head_size)
        return jnp.repeat(heads, repeats, axis=-2).reshape(*x.shape[:-1], -1)

    return jax.tree_util.tree_map_with_path(repeat, params)


def test_grouped_queries_are_plain_attention_with_every_groups_keys_and_values_repeated():
    full = Transformer(dataclasses.replace(SMALL, num_kv_heads=SMALL.num_heads), V)
    logits, value, _ = quick_jit(full.apply)(widened(PARAMS, 2), TOKEN)
    close(logits, whole(TOKEN)[0])
    close(value, whole(TOKEN)[1])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_one_layer_is_its_equations_in_numpy_head_by_head(num_kv_heads):
    """Without any batching, grouping or masking by numbers: loops over queries and heads, in float64."""
    c = TransformerConfig(
        hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, mlp_size=5, tied_head=False
    )
    network, token = Transformer(c, V), TOKEN[:1]
    params = params_of(network)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)["params"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_eps) * w[name]["scale"]

    def turned(x, i):
        turns = np.exp(1j * i * c.rope_theta ** (-np.arange(3) / 3))  # a pair as a complex number
        z = (x[:3] + 1j * x[3:]) * turns
        return np.concatenate([z.real, z.imag])

    x = w["embedding"][token[0]]
    normed, attention = norm(x, "attention_norm_0"), w["attention_0"]
    heads = {k: (normed @ attention[k]["kernel"]).reshape(n, -1, 6) for k in ("query", "key", "value")}
    read = np.zeros((n, 4, 6))
    for i, h in np.ndindex(n, 4):
        g = h // (4 // num_kv_heads)
        query = turned(heads["query"][i, h], i)
        score = np.array([query @ turned(heads["key"][j, g], j) / math.sqrt(6) for j in range(i + 1)])
        weight = np.exp(score) / np.exp(score).sum()
        read[i, h] = sum(weight[j] * heads["value"][j, g] for j in range(i + 1))
    x = x + read.reshape(n, -1) @ attention["output"]["kernel"]
    normed, mlp = norm(x, "mlp_norm_0"), w["mlp_0"]
    gate = normed @ mlp["gate"]["kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    close(quick_jit(network.apply)(params, token)[0][0], norm(x, "final_norm") @ w["head"]["kernel"])


def test_rms_norm_by_hand():
    """[3, 4]: mean square 12.5; at half precision too it is the squares' mean in float32 that is taken."""
    scale = {"params": {"scale": jnp.array([1.0, 2.0])}}
    norm: Any = RMSNorm(0.5)
    normed = norm.apply(scale, jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(normed, np.array([3, 8]) / math.sqrt(13), rtol=1e-6)
    half = norm.apply({"params": {"scale": jnp.ones(2, jnp.float16)}}, jnp.full(2, 1000, jnp.float16))
    np.testing.assert_array_equal(half, np.ones(2, np.float16))  # 1000^2 is beyond float16


def test_a_gather_and_a_one_hot_product_embed_alike_with_the_same_gradient():
    rng = np.random.default_rng(2)
    small = jnp.asarray(rng.normal(size=(ONE_HOT_TOKENS, 5)), jnp.float32)
    large = jnp.concatenate([small, small])

    def weighted(embedding):
        return jnp.sum(embed(embedding, TOKEN) * jnp.arange(5.0))

    close(embed(small, TOKEN), embed(large, TOKEN))
    close(jax.grad(weighted)(small), jax.grad(weighted)(large)[:ONE_HOT_TOKENS])


def test_seeds_under_a_vmap_are_a_loop_over_them_through_a_cache_too():
    seeds = [params_of(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)

    def two_passes(params, token):
        first, _, cache = NETWORK.apply(params, token[:, :4], init_cache(SMALL, B, n))
        return first, NETWORK.apply(params, token[:, 4:], cache, 4)

    tokens = jnp.stack([jnp.asarray(np.where(PRESENT, (TOKEN + s) % V, -1)) for s in range(3)])
    together = quick_jit(jax.vmap(two_passes))(stacked, tokens)
    alone = quick_jit(two_passes)
    for i, params in enumerate(seeds):
        jax.tree.map(lambda x, y, i=i: close(x[i], y), together, alone(params, tokens[i]))


def test_all_is_float64_where_the_parameters_are():
    expected = whole(TOKEN)[0]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
        logits, value, _ = quick_jit(NETWORK.apply)(params, TOKEN)
        assert logits.dtype == value.dtype == jnp.float64
        cache = init_cache(SMALL, B, n, jnp.float64)
        decode = quick_jit(NETWORK.apply)
        for column in range(n):
            last, _, cache = decode(params, TOKEN[:, column : column + 1], cache, column)
            close(last[:, 0][PRESENT[:, column]], logits[:, column][PRESENT[:, column]], 1e-12)
    close(logits, expected)


def test_bfloat16_parameters_give_float32_logits_near_the_others():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    logits, value, cache = quick_jit(NETWORK.apply)(params, TOKEN, init_cache(SMALL, B, n, jnp.bfloat16))
    assert logits.dtype == value.dtype == jnp.float32 and cache.key.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits[PRESENT], whole(TOKEN)[0][PRESENT], atol=0.3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_number_of_parameters_is_the_formulas(tied, bias):
    c = dataclasses.replace(SMALL, tied_head=tied, qkv_bias=bias, head_dim=10, value_head=not tied)
    shapes = jax.eval_shape(Transformer(c, V).init, jax.random.key(0), TOKEN)
    D, F, q, kv = c.hidden_size, c.mlp_size, 4 * 10, 2 * 10
    layer = 2 * D + 2 * D * q + 2 * D * kv + bias * (q + 2 * kv) + 3 * D * F
    expected = V * D * (1 if tied else 2) + c.num_layers * layer + D + (0 if tied else D + 1)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


def test_it_starts_nearly_uniform_with_a_value_of_zero_and_layers_that_do_something():
    network = Transformer(TransformerConfig(value_head=True), V)
    params = quick_jit(network.init)(jax.random.key(0), TOKEN)
    logits, value, _ = quick_jit(network.apply)(params, TOKEN)
    log_prob = jax.nn.log_softmax(logits)
    entropy = -np.sum(np.exp(log_prob) * log_prob, axis=-1)
    assert (entropy > 0.97 * math.log(V)).all()
    np.testing.assert_array_equal(value, 0)
    first, last = params["params"]["attention_0"]["query"]["kernel"], params["params"]["mlp_1"]["down"]["kernel"]
    np.testing.assert_allclose(np.std(first), 1 / math.sqrt(64), rtol=0.1)
    np.testing.assert_allclose(np.std(last), 1 / math.sqrt(128) / math.sqrt(2 * 2), rtol=0.1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"),
        ({"hidden_size": 18}, r"hidden_size \(18\) must be divisible by num_heads \(4\)"),
        ({"head_dim": 5}, r"head_dim \(5\) must be even"),
        ({"hidden_size": 12}, r"head_dim \(3\) must be even"),
        ({"num_layers": 0}, r"num_layers \(0\) must be at least 1"),
        ({"rope_theta": 0.0}, r"rope_theta \(0.0\) must be above 0"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(wrong, says):
    config = dataclasses.replace(SMALL, **wrong)
    with pytest.raises(UsageError, match=says):
        jax.eval_shape(Transformer(config, V).init, jax.random.key(0), TOKEN)
    with pytest.raises(UsageError, match=says):
        init_cache(config, B, n)


@pytest.mark.parametrize(("length", "batch", "column"), [(n - 1, B, 0), (n, B, 1), (n, B + 1, 0)])
def test_a_cache_too_short_or_of_other_rows_is_refused(length, batch, column):
    with pytest.raises(AssertionError):
        jax.eval_shape(lambda p: NETWORK.apply(p, TOKEN, init_cache(SMALL, batch, length), column), PARAMS)
