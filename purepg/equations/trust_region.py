"""Steps measured in KL: Fisher-vector products, conjugate gradients, the natural gradient, a line search.

Parameters on which the policy does not depend (a critic's of its own) have a zero gradient and a zero row in the Fisher
matrix, and are left where they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from purepg.lanes import any_lane
from purepg.types import Array, Metrics, Network, Params, UsageError

Product = Callable[[Array], Array]  # a symmetric positive matrix times a vector [D]


def refuse_a_shared_torso(network: Network) -> None:
    """Raises UsageError where fitting the critic would move the policy, which a trust region forbids. A network of the
    caller's own must see to it that the two share no parameters."""
    if getattr(network, "shared", False):
        raise UsageError(
            "shared (True) must be off: a critic fitted on the policy's torso would leave the trust region"
        )


def fisher_vector_product(kl: Callable[[Params], Array], params: Params, damping: Array | float = 0.0) -> Product:
    """v -> (F + damping I) v, F the Hessian of `kl` at `params`, by forward over reverse differentiation.

    Where `kl(params)` is the mean of KL(pi_old || pi_params) and pi_old is the policy of `params`, that Hessian is the
    Fisher matrix, exactly: its other term, the mean of grad log pi's own derivative, is zero there.
    """
    flat, unravel = ravel_pytree(params)
    _, hessian_product = jax.linearize(jax.grad(lambda flat: kl(unravel(flat))), flat)
    return lambda v: hessian_product(v) + damping * v


def conjugate_gradient(product: Product, b: Array, num_steps: int) -> tuple[Array, Array]:
    """Solves product(x) = b for `[D]` in `num_steps` steps from x = 0 (Hestenes & Stiefel 1952).

    A scan of fixed length, so that lanes of a population stay together; a lane that has converged stands still.

    Returns:
      (x, |b - product(x)| / |b|), the second as the recurrence has it.
    """

    def step(carry, _):
        x, residual, direction, square = carry
        image = product(direction)
        curvature = direction @ image
        # Where b is solved, both are rounding or zero, and their quotient means nothing.
        going = (square > 1e-14 * start) & (curvature > 0)
        length = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        x, residual = x + length * direction, residual - length * image
        new_square = residual @ residual
        ratio = jnp.where(going, new_square / jnp.where(going, square, 1.0), 0.0)
        return (x, residual, jnp.where(going, residual + ratio * direction, direction), new_square), None

    start = b @ b
    (x, _, _, square), _ = jax.lax.scan(step, (jnp.zeros_like(b), b, b, start), length=num_steps)
    return x, jnp.sqrt(square / jnp.where(start > 0, start, 1.0))


class Natural(NamedTuple):
    """A natural gradient, and the lengths that a step along it may have."""

    direction: Params  # (F + damping I)^-1 gradient
    curvature: Array  # direction . (F + damping I) direction
    residual: Array  # of the conjugate gradients, relative
    grad_norm: Array

    def length(self, max_kl: Array | float) -> Array:
        """sqrt(2 max_kl / curvature): the step at which KL's quadratic model, damping included, reaches `max_kl`."""
        some = self.curvature > 0
        return jnp.where(some, jnp.sqrt(2 * max_kl / jnp.where(some, self.curvature, 1.0)), 0.0)


def natural_gradient(
    gain: Callable[[Params], Array],
    kl: Callable[[Params], Array],
    params: Params,
    damping: Array | float,
    num_cg_steps: int,
) -> Natural:
    """(F + damping I)^-1 grad gain (Kakade 2001), matrix-free."""
    gradient, unravel = ravel_pytree(jax.grad(gain)(params))
    product = fisher_vector_product(kl, params, damping)
    x, residual = conjugate_gradient(product, gradient, num_cg_steps)
    return Natural(unravel(x), x @ product(x), residual, jnp.linalg.norm(gradient))


def move(params: Params, length: Array | float, direction: Params) -> Params:
    """params + length * direction, in the parameters' own dtype."""
    return jax.tree.map(lambda p, d: (p + length * d).astype(p.dtype), params, direction)


def line_search(
    gain: Callable[[Params], Array],
    kl: Callable[[Params], Array],
    params: Params,
    step: Params,
    max_kl: Array | float,
    shrink: Array | float,
    num_tries: int,
) -> tuple[Params, Metrics]:
    """The longest of step, shrink * step, shrink^2 * step, ... that improves `gain` and keeps `kl` under its bound.

    Tries go on until no lane of a population needs another. Where none of `num_tries` is good, `params` come back as
    they were.

    Returns:
      (params, metrics): `accepted`, 0 or 1; `step_fraction`, 0 where rejected; `surrogate_improvement` and `step_kl` at
      the parameters that are returned; `full_step_kl` of the first try.
    """
    before = gain(params)

    def attempt(carry):
        k, fraction, accepted, best, found, first_kl = carry
        candidate = move(params, fraction, step)
        improvement, divergence = gain(candidate) - before, kl(candidate)
        good = ~accepted & (improvement > 0) & (divergence <= max_kl)
        best = jax.tree.map(lambda new, old: jnp.where(good, new, old), candidate, best)
        now = (fraction, improvement, divergence)
        found = jax.tree.map(lambda new, old: jnp.where(good, new, old), now, found)
        accepted |= good
        first_kl = jnp.where(k == 0, divergence, first_kl)
        shorter = (fraction * shrink).astype(fraction.dtype)
        return k + 1, jnp.where(accepted, fraction, shorter), accepted, best, found, first_kl

    def wanted(carry):
        k, _, accepted, *_ = carry
        return any_lane(~accepted) & (k < num_tries)

    zero, kl_before = jnp.zeros_like(before), kl(params)
    found = (zero, zero, kl_before)
    carry = (jnp.int32(0), zero + 1.0, jnp.bool_(False), params, found, jnp.zeros_like(kl_before))
    _, _, accepted, params, (fraction, improvement, divergence), first_kl = jax.lax.while_loop(wanted, attempt, carry)
    return params, {
        "accepted": accepted.astype(jnp.float32),
        "step_fraction": fraction,
        "surrogate_improvement": improvement,
        "step_kl": divergence,
        "full_step_kl": first_kl,
    }
