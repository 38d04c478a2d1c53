"""Loops, and reductions over trees of arrays, in the form that costs least where they run.

On a GPU, small programs are bound by the number of kernels that they launch, not by arithmetic. There, a loop makes
several steps in each iteration, and small arrays of its carry and of its results are joined into one vector for each
dtype, which one kernel writes. Numbers are the same in both forms, except that XLA may round differently, and that a
sum over a tree adds in another order.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.runtime import compiles_for_gpu
from purepg.spread import num_devices, within_device
from purepg.types import Array

JOINED_BYTES = 2**20  # of an array in all lanes; to join larger ones takes longer than to launch a kernel for each

_lanes = 1

Tree = Any


@contextlib.contextmanager
def lanes(num: int) -> Iterator[None]:
    """Within it, what is traced will run in `num` times as many lanes, agents under `jax.vmap`. Where lanes are not
    told, programs are right, but may copy more than they need to."""
    global _lanes
    before, _lanes = _lanes, _lanes * num
    try:
        yield
    finally:
        _lanes = before


def alone() -> bool:
    """Whether what is traced runs in one lane. There, a slice of a joined vector is an operand like any other; in
    several, a matrix product needs a copy of it."""
    return _lanes == 1


class Joined:
    """How the small arrays of a tree are joined into one vector for each dtype.

    Args:
      like: a tree of the same shapes and dtypes.
      which: a tree prefix of bools, whose false parts are left as they are.
    """

    def __init__(self, like: Tree, which: Tree = True):
        self._shapes, self._treedef = jax.tree.flatten(like)
        flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), which, like)
        by_dtype: dict[Any, list[int]] = {}
        for i, (x, flag) in enumerate(zip(self._shapes, jax.tree.leaves(flags), strict=True)):
            is_number = not jnp.issubdtype(x.dtype, jax.dtypes.extended)  # no key
            if flag and is_number and _lanes * x.size * x.dtype.itemsize <= JOINED_BYTES:
                by_dtype.setdefault(x.dtype, []).append(i)
        self._groups = [group for group in by_dtype.values() if len(group) > 1]
        self._others = sorted(set(range(len(self._shapes))).difference(*self._groups))

    def join(self, tree: Tree) -> list[Array]:
        """The vectors, and then the arrays that are not joined."""
        leaves = jax.tree.leaves(tree)
        vectors = [jnp.concatenate([jnp.ravel(leaves[i]) for i in group]) for group in self._groups]
        return vectors + [leaves[i] for i in self._others]

    def split(self, arrays: list[Array]) -> Tree:
        """The tree of `join(tree)`."""
        leaves: list[Any] = [None] * len(self._shapes)
        for i, x in zip(self._others, arrays[len(self._groups) :], strict=True):
            leaves[i] = x
        for group, vector in zip(self._groups, arrays, strict=False):
            ends = np.cumsum([self._shapes[i].size for i in group]).tolist()
            for i, end in zip(group, ends, strict=True):
                leaves[i] = vector[end - self._shapes[i].size : end].reshape(self._shapes[i].shape)
        return jax.tree.unflatten(self._treedef, leaves)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    join: Tree = True,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, in the form for a GPU if that is what is compiled for. An agent on several devices has the plain
    form, because a vector would join arrays that are divided over them with others that are not.

    Args:
      unroll: steps in each of the GPU's iterations, at most: their number divides that of all steps.
      join: which parts of the carry the GPU's form joins, a tree prefix of bools.
    """
    if not compiles_for_gpu() or num_devices() > 1:
        return jax.lax.scan(step, carry, xs, length, reverse)
    num_steps = length if length is not None else jax.tree.leaves(xs)[0].shape[0]
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    carry_after, made = jax.eval_shape(step, carry, first)
    carried, result = Joined(carry_after, join), Joined(made)

    def joined_step(carry, x):
        carry, now = step(carried.split(carry), x)
        return carried.join(carry), result.join(now)

    at_once = max(n for n in range(1, unroll + 1) if num_steps % n == 0)
    carry, results = jax.lax.scan(joined_step, carried.join(carry), xs, length, reverse, at_once)
    return carried.split(carry), jax.vmap(result.split)(results)


def sum_of_squares(tree: Tree) -> Array:
    """The sum of the squares of all numbers of a tree, a scalar."""
    return sum((jnp.sum(jnp.square(x)) for x in _few(tree)), start=jnp.float32(0.0))


def all_finite(tree: Tree) -> Array:
    """Whether every float of a tree is finite, a bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in _few(floats)]))


def _few(tree: Tree) -> list[Array]:
    return Joined(tree).join(tree) if compiles_for_gpu() else jax.tree.leaves(tree)


def in_chunks(f: Callable, at_once: int | None, *trees: Tree, spread: bool = True) -> Tree:
    """f(*trees) of arrays `[B, ...]`, for `at_once` rows of them at a time. A gradient keeps only the arguments, and
    computes each chunk again. The last chunk is filled up with copies of the last row. None: all rows at once.

    Args:
      f: computes each row of its results `[B, ...]` from the same row of its arguments.
      spread: if the agent has several devices, and their number divides `at_once`, rows are divided over them, and
        every chunk has as many of each.
    """
    num_rows = jax.tree.leaves(trees)[0].shape[0]
    if at_once is None or at_once >= num_rows:
        return f(*trees) if at_once is None else jax.checkpoint(f)(*trees)
    devices = num_devices() if spread and at_once % num_devices() == 0 else 1
    own_rows, own = -(-num_rows // devices), at_once // devices

    def full(x, unit):
        missing = -x.shape[0] % unit
        return jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x

    def cut(x):
        return full(x, own).reshape(-1, own, *x.shape[1:])

    def joined(x):
        return x.reshape(-1, *x.shape[2:])[:own_rows]

    if devices > 1:
        cut, joined = within_device(cut, (0,), 1), within_device(joined, (1,), 0)
    chunks = jax.tree.map(lambda x: cut(full(x, devices)), trees)
    found = jax.lax.map(lambda chunk: jax.checkpoint(f)(*chunk), chunks)
    return jax.tree.map(lambda x: joined(x)[:num_rows], found)
