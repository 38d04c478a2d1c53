"""Flax's GRU and LSTM, which on a GPU go along a window with few kernels.

A gate reads W x + U h + b. W x + b is computed before the loop, for all steps at once, and the gradient of U after the
backward loop, so that each loop has one matrix product in each step. The parameters are flax's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from purepg.lanes import select
from purepg.loops import scan
from purepg.types import Array

AT_ONCE = 8  # steps in an iteration of the loop

State = tuple[Array, ...]  # each [N, n]; the last is h, which the next step multiplies by U
Gates = Callable[[Array, Array, State], State]  # (W x + b, U h, the state before) -> the state after


def gru(x: Array, h: Array, state: State) -> State:
    """h' = (1 - z) n + z h, with n = tanh(x_n + r h_n) and the gates r and z (Cho et al. 2014)."""
    n = state[0].shape[-1]
    r, z = jnp.split(nn.sigmoid(x[..., : 2 * n] + h[..., : 2 * n]), 2, axis=-1)
    return ((1 - z) * nn.tanh(x[..., 2 * n :] + r * h[..., 2 * n :]) + z * state[0],)


def lstm(x: Array, h: Array, state: State) -> State:
    """c' = f c + i tanh(g) and h' = o tanh(c'), with the gates i, f and o (Hochreiter and Schmidhuber 1997)."""
    i, f, g, o = jnp.split(x + h, 4, axis=-1)
    c = nn.sigmoid(f) * state[0] + nn.sigmoid(i) * nn.tanh(g)
    return c, nn.sigmoid(o) * nn.tanh(c)


class GRU(nn.GRUCell):
    """`flax.linen.GRUCell`, with all steps of a window at once."""

    def unroll(self, memory: Array, x: Array, starts: Array) -> tuple[Array, Array]:
        """memory `[N, n]`, x `[L, N, m]`, starts `[L, N]`; returns (h after each step, the same), `[L, N, n]`."""
        (after,) = _unrolled(self, gru, "rzn", (memory,), x, starts)
        return after, after


class LSTM(nn.OptimizedLSTMCell):
    """`flax.linen.OptimizedLSTMCell`, with all steps of a window at once."""

    def unroll(self, memory: State, x: Array, starts: Array) -> tuple[State, Array]:
        """memory (c, h), each `[N, n]`, x `[L, N, m]`, starts `[L, N]`; returns ((c, h) after each step, h)."""
        after = _unrolled(self, lstm, "ifgo", memory, x, starts)
        return after, after[1]


def _unrolled(cell: Any, gates: Gates, names: str, state: State, x: Array, starts: Array) -> State:
    params, n = cell.variables["params"], state[0].shape[-1]

    def joined(side: str) -> tuple[Array, Array]:
        parts = [params[side + name] for name in names]
        bias = [part.get("bias", jnp.zeros(n, x.dtype)) for part in parts]
        return jnp.concatenate([part["kernel"] for part in parts], axis=-1), jnp.concatenate(bias)

    (W, b), (U, c) = joined("i"), joined("h")
    return along(gates, U, c, state, x @ W + b, starts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def along(gates: Gates, U: Array, c: Array, state: State, x: Array, starts: Array) -> State:
    """The states after each of L steps, `[L, N, n]`, of which the first follows `state`; where an episode starts, the
    state before is 0. It has a gradient, of which `jax.jvp` may be taken; it has no `jax.jvp` itself.

    Args:
      U, c: `[n, g]` and `[g]`, which make h U + c of the gates. x: `[L, N, g]`. starts: `[L, N]`.
    """
    return _along(gates, U, c, state, x, starts)


def _along(gates: Gates, U: Array, c: Array, state: State, x: Array, starts: Array) -> State:
    def step(state, inputs):
        x, starts = inputs
        state = _begun(starts, state)
        state = gates(x, state[-1] @ U + c, state)
        return state, state

    return scan(step, state, (x, starts), unroll=AT_ONCE)[1]


def _begun(starts: Array, state: State) -> State:
    return select(starts, jax.tree.map(jnp.zeros_like, state), state)


def _forward(gates: Gates, U: Array, c: Array, state: State, x: Array, starts: Array) -> tuple[State, Any]:
    after = _along(gates, U, c, state, x, starts)
    return after, (U, c, state, x, starts, after)


def _backward(gates: Gates, kept: Any, gradient: State) -> tuple:
    U, c, first, x, starts, after = kept
    before = jax.tree.map(lambda first, after: jnp.concatenate([first[None], after[:-1]]), first, after)
    before = _begun(starts, before)

    def step(of_state, inputs):
        gradient, before, h, x, starts = inputs
        of_state = jax.tree.map(jnp.add, of_state, gradient)
        of_x, of_gates, (*others, of_h) = jax.vjp(gates, x, h, before)[1](of_state)
        return _begun(starts, (*others, of_h + of_gates @ U.T)), (of_x, of_gates)

    inputs = gradient, before, before[-1] @ U + c, x, starts
    zero = jax.tree.map(jnp.zeros_like, first)
    of_first, (of_x, of_gates) = scan(step, zero, inputs, reverse=True, unroll=AT_ONCE)
    of_U = jnp.einsum("lnh,lng->hg", before[-1], of_gates)
    return of_U, jnp.sum(of_gates, axis=(0, 1)), of_first, of_x, None


along.defvjp(_forward, _backward)
