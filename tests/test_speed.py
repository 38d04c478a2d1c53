"""The speed page's scripts: what the matrix products of a program are, and where the time of a start goes."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(path):
    spec = importlib.util.spec_from_file_location(f"speed_{Path(path).stem}", EXPERIMENTS / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def network(params, x):
    return jnp.sum((jnp.tanh(x @ params[0]) @ params[1]) ** 2)


def test_the_products_of_a_loop_of_gradients_are_those_counted_by_hand():
    """A gradient of two layers has five products: two forward, and backward all but that of the input."""
    peers = script("peers/products.py")
    params, x = (jnp.ones((4, 64)), jnp.ones((64, 2))), jnp.ones((32, 4))

    def descend(params):
        return jax.lax.scan(lambda p, _: (jax.tree.map(jnp.add, p, jax.grad(network)(p, x)), None), params, length=7)

    found = peers.products(jax.make_jaxpr(descend)(params).jaxpr)
    assert sum(found.values()) == 5 * 7
    first, second = 32 * 4 * 64, 32 * 64 * 2
    assert peers.multiplications(found) == 7 * (2 * first + 3 * second)
    both = peers.products(jax.make_jaxpr(lambda p: jax.lax.cond(True, descend, lambda p: (p, None), p))(params).jaxpr)
    assert both == found


def test_products_alone_are_the_products_of_the_program():
    peers = script("peers/products.py")
    rows = jax.make_jaxpr(lambda w, x: jax.lax.map(lambda row: row @ w, x))(jnp.ones((8, 3)), jnp.ones((5, 8)))
    found = peers.products(rows.jaxpr)
    alone = jax.make_jaxpr(peers.alone(found, 4))(jnp.float32(1e-3)).jaxpr
    assert peers.products(alone) == {product: 4 * times for product, times in found.items()}
    assert sum(found.values()) == 5


@pytest.mark.parametrize(
    ("intervals", "until", "seconds"),
    [
        ([(1.0, 2.0), (1.5, 3.0)], 9.0, 2.0),  # overlapping
        ([(1.0, 4.0), (2.0, 3.0)], 9.0, 3.0),  # one within the other
        ([(5.0, 6.0), (1.0, 2.0)], 9.0, 2.0),  # apart, told late
        ([(1.0, 4.0), (6.0, 7.0)], 3.0, 2.0),  # cut
    ],
)
def test_time_that_several_threads_spend_counts_once(intervals, until, seconds):
    assert script("parts/start_time.py").covered(intervals, until) == seconds


def test_the_stages_of_a_start_add_up_to_its_end():
    start_time = script("start_time.py")
    times = {name: 1.5 * i for i, name in enumerate(start_time.STAGES, start=1)}
    within = dict.fromkeys(start_time.WITHIN, 0.25)
    rows = start_time.rows({"first start, s": [times | within], "later starts, s": [times | within] * 2})
    stages = [float(row[1]) for row in rows if row[0] in start_time.STAGES.values()]
    assert stages == [1.5] * len(start_time.STAGES)
    assert rows[-1][1:] == [f"{sum(stages):.2f} [{sum(stages):.2f}, {sum(stages):.2f}]"] * 2
