"""Trust regions: Fisher-vector products, conjugate gradients, the natural gradient and a line search under a KL bound.

Parameters that the policy does not depend on, such as a critic's, have zero gradient and Fisher row: they do not
change.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from purepg.config import Number
from purepg.lanes import any_lane
from purepg.types import Array, Metrics, Network, Params, UsageError

Product = Callable[[Array], Array]  # multiplies a vector [D] by a symmetric positive matrix
Objective = Callable[[Params], Array]


def refuse_a_shared_torso(network: Network) -> None:
    """Raises UsageError for a shared torso: fitting the critic would move the policy, which a trust region forbids. For
    a network of your own, make sure that policy and critic share no parameters."""
    if getattr(network, "shared", False):
        raise UsageError(
            "shared (True) must be off: a critic fitted on the policy's torso would leave the trust region"
        )


def fisher_vector_product(kl: Objective, params: Params, damping: Number = 0.0) -> Product:
    """Returns v -> (F + damping I) v, F the Hessian of `kl` at `params`, by forward-over-reverse differentiation.

    If `kl(params)` is the mean of KL(pi_old || pi_params) and pi_old is the policy of `params`, this Hessian is exactly
    the Fisher matrix: the other term, the mean of the derivative of grad log pi, is zero there.
    """
    flat, unravel = ravel_pytree(params)
    _, hessian_product = jax.linearize(jax.grad(lambda flat: kl(unravel(flat))), flat)
    return lambda v: hessian_product(v) + damping * v


def conjugate_gradient(product: Product, b: Array, num_steps: int) -> tuple[Array, Array]:
    """Solves product(x) = b for `[D]` in `num_steps` steps from x = 0 (Hestenes & Stiefel 1952).

    It is a scan of fixed length, so that all lanes of a population stay together; a converged lane stays unchanged.

    Returns:
      (x, |b - product(x)| / |b|), the latter from the recurrence.
    """

    def step(carry, _):
        x, residual, direction, square = carry
        image = product(direction)
        curvature = direction @ image
        # After convergence both are rounding errors or zero, and their quotient is meaningless.
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
    """A natural gradient and what determines the length of a step along it."""

    direction: Params  # (F + damping I)^-1 gradient
    curvature: Array  # direction . (F + damping I) direction
    residual: Array  # relative residual of the conjugate gradients
    grad_norm: Array

    def length(self, max_kl: Number) -> Array:
        """sqrt(2 max_kl / curvature), where the quadratic model of KL, with damping, reaches `max_kl`."""
        some = self.curvature > 0
        return jnp.where(some, jnp.sqrt(2 * max_kl / jnp.where(some, self.curvature, 1.0)), 0.0)


def natural_gradient(gain: Objective, kl: Objective, params: Params, damping: Number, num_cg_steps: int) -> Natural:
    """(F + damping I)^-1 grad gain (Kakade 2001), without forming F."""
    gradient, unravel = ravel_pytree(jax.grad(gain)(params))
    product = fisher_vector_product(kl, params, damping)
    x, residual = conjugate_gradient(product, gradient, num_cg_steps)
    return Natural(unravel(x), x @ product(x), residual, jnp.linalg.norm(gradient))


def move(params: Params, length: Number, direction: Params) -> Params:
    """Returns params + length * direction in the parameters' dtypes."""
    return jax.tree.map(lambda p, d: (p + length * d).astype(p.dtype), params, direction)


def line_search(
    gain: Objective, kl: Objective, params: Params, step: Params, max_kl: Number, shrink: Number, num_tries: int
) -> tuple[Params, Metrics]:
    """Finds the longest of step, shrink * step, shrink^2 * step, ... that improves `gain` with `kl` at most `max_kl`.

    It runs until no lane of a population needs another try. After `num_tries` it returns `params` unchanged.

    Returns:
      (params, metrics): `accepted`, 0 or 1; `step_fraction`, 0 if rejected; `surrogate_improvement` and `step_kl` at
        the returned parameters; `full_step_kl` of the first try.
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
