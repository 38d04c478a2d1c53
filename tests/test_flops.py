"""Model FLOPs, against the matrix products that the models' programs have."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations

from purepg.language.flops import forward_flops, peak_flops, update_flops
from purepg.language.transformer import ONE_HOT_TOKENS, Transformer, TransformerConfig

V = ONE_HOT_TOKENS + 1  # of fewer, the embedding is a matrix product, too
CONFIG = TransformerConfig(hidden_size=12, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=4, mlp_size=20)


def products(config: TransformerConfig, length: int) -> int:
    """The operations of all matrix products in a forward pass over a row, as its program has them."""
    model = Transformer(config, V)
    token = jnp.zeros((1, length), int)
    params = jax.eval_shape(model.init, jax.random.key(0), token)
    found = [e for e in equations(model.apply, params, token) if e.primitive.name == "dot_general"]
    total = 0
    for e in found:
        (left, _), _ = e.params["dimension_numbers"]
        contracted = math.prod(e.invars[0].aval.shape[axis] for axis in left)
        total += 2 * contracted * math.prod(e.outvars[0].aval.shape)
    return total


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, num_heads=2, num_kv_heads=2, mlp_size=7)])
@pytest.mark.parametrize("length", [1, 5])
def test_a_forward_pass_takes_what_its_matrix_products_take(config, length):
    # The program also computes the half of attention that the mask removes.
    masked = config.num_layers * 4 * config.num_heads * config.head_size * (length * (length - 1) / 2)
    assert forward_flops(config, V, length, read=length) == products(config, length) - masked


def test_an_update_counts_sampling_gradients_and_the_reference():
    P, G, L, R, epochs = 3, 4, 6, 5, 2
    prompt, row = forward_flops(CONFIG, V, L, 0), forward_flops(CONFIG, V, L + R, R)
    sampled = P * prompt + P * G * (row - prompt)
    for adapters, reference, passes in [(False, False, 6), (False, True, 7), (True, False, 4), (True, True, 5)]:
        found = update_flops(CONFIG, V, L, R, (P, G, epochs), adapters, reference)
        np.testing.assert_allclose(found, sampled + P * G * passes * row)


def test_a_device_is_known_by_how_its_name_begins():
    names = "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA L4", "TPU v5 lite", "TPU v5", "cpu"
    assert [peak_flops(name) for name in names] == [989e12, 756e12, 362e12, 121e12, 197e12, 459e12, None]
