"""The matrix products of a program, alone: what is left of its time if everything else were free."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.types import Array


class Product(NamedTuple):
    """A matrix product, as `jax.lax.dot_general` takes it."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dimension_numbers: Any
    dtype: Any


def products(jaxpr: Any, times: int = 1) -> Counter[Product]:
    """How often a program makes each product. A loop of unknown length counts once, a branch as its dearest one."""
    found: Counter[Product] = Counter()
    for eqn in jaxpr.eqns:
        inner = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else [value])]
        bodies = [getattr(x, "jaxpr", x) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")]
        if eqn.primitive.name == "dot_general":
            left, right = (x.aval for x in eqn.invars)
            found[Product(left.shape, right.shape, eqn.params["dimension_numbers"], left.dtype)] += times
        elif eqn.primitive.name == "cond":
            found += max((products(body, times) for body in bodies), key=multiplications)
        else:
            for body in bodies:
                found += products(body, times * eqn.params.get("length", 1))
    return found


def multiplications(found: Counter[Product]) -> int:
    """The number of scalar multiplications."""
    total = 0
    for (left, right, ((contracted, _), (batch, _)), _), times in found.items():
        shared = [*contracted, *batch]
        total += times * _size(right) * _size(n for i, n in enumerate(left) if i not in shared)
    return total


def _size(shape: Any) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def alone(found: Counter[Product], num_times: int) -> Callable[[Array], Array]:
    """A function of a number that makes all these products `num_times` times, one after the other."""

    def repeated(product: Product, times: int, number: Array) -> Array:
        left, right = (jnp.full(shape, number, product.dtype) for shape in (product.left, product.right))

        def multiply(carry, _):
            left, right, out = carry
            change = 1e-9 * out.ravel()[0]  # so that no iteration can be left out
            left, right = (left + change, right) if left.size < right.size else (left, right + change)
            return (left, right, jax.lax.dot_general(left, right, product.dimension_numbers)), None

        shape = jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, product.dimension_numbers), left, right)
        (_, _, out), _ = jax.lax.scan(multiply, (left, right, jnp.zeros(shape.shape, shape.dtype)), length=times)
        return out.ravel()[0]

    def multiply(number: Array) -> Array:
        return jnp.stack([repeated(x, times * num_times, number) for x, times in found.items()]).sum()

    return multiply
