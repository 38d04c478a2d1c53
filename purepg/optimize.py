"""From a loss to new parameters: one gradient step, or epochs of shuffled minibatches."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from purepg.config import check_choice
from purepg.lanes import any_lane, step_if
from purepg.loops import alone, scan, sum_of_squares
from purepg.precision import at_least_float32, has_narrow, rounded
from purepg.spread import divided, num_devices, own_key, within_device
from purepg.types import Array, Key, Metrics, Params, UsageError, Window

EPOCHS_TAG = 2**31 - 1  # no split or fold of the same key is this one

Optimizer = Literal["adam", "sgd"]
Loss = Callable[[Params, Any], tuple[Array, Metrics]]  # (params, batch) -> (scalar, metrics)


def step_direction(
    optimizer: Optimizer, max_grad_norm: Array | float | None, adam_eps: Array | float = 1e-5
) -> optax.GradientTransformation:
    """Adam's direction, or the gradient itself (sgd), after clipping to a global norm, unless that is None. The caller
    multiplies by the learning rate, so the optimiser's state holds no schedule. Raises UsageError for other optimisers.
    """
    check_choice("optimizer", optimizer, Optimizer)
    clip = optax.identity() if max_grad_norm is None else clipped(max_grad_norm)
    return in_float32(optax.chain(clip, optax.scale_by_adam(eps=adam_eps) if optimizer == "adam" else optax.identity()))


def norm(tree: Any) -> Array:
    """The Euclidean norm of all numbers of a tree, a scalar."""
    return jnp.sqrt(sum_of_squares(tree))


def clipped(max_norm: Array | float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with `norm`, which takes a GPU one kernel where optax's takes one for each array."""

    def update(updates, state, params=None):
        del params
        length = norm(updates)

        def scaled(x):
            return jnp.where(length < max_norm, x, x / length.astype(x.dtype) * max_norm)

        return jax.tree.map(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class TrainState(NamedTuple):
    """Parameters and their optimiser's state, which every gradient step changes together.

    Where a policy and its critics learn at rates of their own, both are dicts, `{"policy": ..., "critic": ...}`.
    """

    params: Params
    opt_state: Any

    @property
    def halves(self) -> tuple["TrainState", "TrainState"]:
        """(policy, critic)."""
        policy, critic = (TrainState(self.params[half], self.opt_state[half]) for half in ("policy", "critic"))
        return policy, critic


def init_train_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
    """Parameters and the optimiser's first state for them."""
    return TrainState(params, tx.init(params))


def init_halves(tx: optax.GradientTransformation, params: dict[str, Params]) -> TrainState:
    """`init_train_state` where each half learns with an optimiser's state of its own."""
    return TrainState(params, {name: tx.init(half) for name, half in params.items()})


def joined(policy: TrainState, critic: TrainState) -> TrainState:
    """The TrainState of two halves, whose `halves` they are."""
    return TrainState(*({"policy": p, "critic": c} for p, c in zip(policy, critic, strict=True)))


def with_params(learner: Any, params: Params) -> Any:
    """An algorithm's learner with other parameters and everything else as it is."""
    if isinstance(learner, TrainState):
        return learner._replace(params=params)
    return learner._replace(train_state=learner.train_state._replace(params=params))


class Widened(NamedTuple):
    """An optimiser's state for parameters of which some are narrower than float32."""

    inner: optax.OptState  # in float32
    remainder: Params  # float32: what rounding cut off the parameters


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its state and arithmetic in float32 where parameters are narrower; elsewhere `tx` itself.

    In bfloat16, 1 + 0.003 is 1, so small steps would be lost. `gradient_step` therefore keeps in the state what
    rounding cut off, which gives the precision of float32 copies of the parameters.
    """

    def init(params):
        inner = tx.init(at_least_float32(params))
        if not has_narrow(params):
            return inner
        return Widened(inner, jax.tree.map(jnp.zeros_like, at_least_float32(params)))

    def update(updates, state, params=None):
        updates, params = at_least_float32((updates, params))
        if not isinstance(state, Widened):
            return tx.update(updates, state, params)
        direction, inner = tx.update(updates, state.inner, params)
        return direction, state._replace(inner=inner)

    return optax.GradientTransformation(init, update)


def anneal(value: Array | float, update: Array, anneal_updates: int | None) -> Array | float:
    """`value`, falling linearly to 0 at update `anneal_updates`; constant if that is None."""
    if anneal_updates is None:
        return value
    return value * jnp.maximum(0.0, 1.0 - update / anneal_updates)


def annealed_learning_rate(c: Any, update: Array) -> Array | float:
    """The `learning_rate` of an `AnnealConfig` in this update."""
    return anneal(c.learning_rate, update, c.anneal_updates if c.anneal_learning_rate else None)


def gradient_step(
    loss: Loss, tx: optax.GradientTransformation, learning_rate: Array | float, train_state: TrainState, batch: Any
) -> tuple[TrainState, Metrics]:
    """params <- params - learning_rate * direction(grad loss), computed in float32 or wider and rounded to the dtype of
    the parameters. The metrics gain `grad_norm`, the norm before clipping."""
    params, opt_state = train_state
    grads, metrics = jax.grad(loss, has_aux=True)(params, batch)
    direction, opt_state = tx.update(grads, opt_state, params)
    exact = at_least_float32(params)
    if isinstance(opt_state, Widened):
        exact = jax.tree.map(jnp.add, exact, opt_state.remainder)
    exact = jax.tree.map(lambda p, d: p - learning_rate * d, exact, direction)
    params = jax.tree.map(lambda x, p: rounded(x, p.dtype), exact, params)
    if isinstance(opt_state, Widened):
        opt_state = opt_state._replace(remainder=jax.tree.map(jnp.subtract, exact, at_least_float32(params)))
    return TrainState(params, opt_state), metrics | {"grad_norm": norm(at_least_float32(grads))}


def gradient_steps(
    loss: Loss,
    tx: optax.GradientTransformation,
    learning_rate: Array | float,
    train_state: TrainState,
    batch: Any,
    num_steps: int,
) -> tuple[TrainState, Metrics]:
    """`num_steps` gradient steps on the whole batch; the metrics are those of the last."""

    def step(train_state, _):
        return gradient_step(loss, tx, learning_rate, train_state, batch)

    train_state, metrics = scan(step, train_state, length=num_steps)
    return train_state, jax.tree.map(lambda x: x[-1], metrics)


def by_half(**metrics: Metrics) -> Metrics:
    """The metrics of both halves' gradient steps, with the half in the name: `policy_loss`, `critic_grad_norm`."""
    return {
        f"{half}_{name}" if name in ("loss", "grad_norm") else name: x
        for half, values in metrics.items()
        for name, x in values.items()
    }


def key_of_epochs(key: Key) -> Array:
    """A key for `epoch_batch`, as plain numbers, which a state may hold."""
    return jax.random.key_data(jax.random.fold_in(key, EPOCHS_TAG))


def epoch_batch(key: Array, num_rows: int, update: Array | int, batch_size: int) -> Array:
    """The rows of an update, `[batch_size]`, where successive updates go through shuffled epochs of all rows. If the
    agent has several devices, they are divided over them.

    Args:
      key: names the sequence of epochs; `key_of_epochs`.
      batch_size: at most `num_rows`, so that a batch touches two epochs at most.
    """
    key = jax.random.wrap_key_data(key)
    place = update * batch_size + jnp.arange(batch_size)
    epoch = place // num_rows
    order = jax.vmap(lambda i: shuffle(jax.random.fold_in(key, epoch[0] + i), num_rows))(jnp.arange(2))
    return divided(order[epoch - epoch[0], place % num_rows], 0)


def check_batch(batch_size: int, num_rows: int) -> None:
    """Raises UsageError if a batch of `epoch_batch` would be larger than an epoch."""
    if batch_size > num_rows:
        raise UsageError(f"batch_size ({batch_size}) must be at most {num_rows}, the number of rows to learn from")


def shuffle(key: Key, n: int) -> Array:
    """A random permutation of 0, ..., n - 1, `[n]` int32, without a sort: O(n), and vectorised.

    A Feistel network permutes the 2^w >= n numbers of w bits: each round adds to one half of the bits a hash of the
    other half and a random round key. Where n is no power of two, results of n or more are permuted again until they
    are below n ("cycle walking"; Black & Rogaway 2002). There are eight rounds, because with six the means of
    minibatches spread a few per cent too widely. Few bits mix badly, so up to 64 numbers are ranked by random bits.
    """
    if n <= 64:
        order = (jax.random.bits(key, (n,), jnp.uint32) & ~jnp.uint32(63)) | jnp.arange(n, dtype=jnp.uint32)
        return jnp.sum(order < order[:, None], axis=1, dtype=jnp.int32)
    width = max(2, (n - 1).bit_length())
    low = width // 2
    low_mask, high_mask = jnp.uint32((1 << low) - 1), jnp.uint32((1 << (width - low)) - 1)
    round_keys = jax.random.bits(key, (8,), jnp.uint32)

    def mix(x, round_key):  # a multiplicative hash; the constants are those of xxHash32 (Collet)
        x = (x ^ round_key) * jnp.uint32(0x9E3779B1)
        x = (x ^ (x >> 15)) * jnp.uint32(0x85EBCA77)
        return x ^ (x >> 13)

    def permute(x):
        left, right = x >> low, x & low_mask
        for i in range(0, len(round_keys), 2):
            left = left ^ (mix(right, round_keys[i]) & high_mask)
            right = right ^ (mix(left, round_keys[i + 1]) & low_mask)
        return (left << low) | right

    x = permute(jnp.arange(n, dtype=jnp.uint32))
    if n != 1 << width:
        x = jax.lax.while_loop(lambda x: any_lane(x >= n), lambda x: jnp.where(x >= n, permute(x), x), x)
    return x.astype(jnp.int32)


def _windows(batch: Any, length: int | None) -> Any:
    """Leaves `[T, N, ...]` as `[T * N, ...]`, or in windows of successive steps, `[length, T / length * N, ...]`, with
    the memory before the first step alone."""

    def cut(x):
        if length is None:
            return jax.lax.collapse(x, 0, 2)
        T, N, *shape = x.shape
        return x.reshape(T // length, length, N, *shape).swapaxes(0, 1).reshape(length, T // length * N, *shape)

    def first(x):
        return x._replace(memory=jax.tree.map(lambda x: x[:1], x.memory)) if isinstance(x, Window) else x

    batch = jax.tree.map(cut, batch)
    return batch if length is None else jax.tree.map(first, batch, is_leaf=lambda x: isinstance(x, Window))


def minibatch_epochs(
    key: Key,
    loss: Loss,
    tx: optax.GradientTransformation,
    learning_rate: Array | float,
    train_state: TrainState,
    batch: Any,
    num_epochs: int,
    num_minibatches: int,
    target_kl: Array | float | None = None,
    window: int | None = None,
    spread_axis: int = 1,
) -> tuple[TrainState, Metrics]:
    """`num_epochs` passes over the batch, each in `num_minibatches` gradient steps on a new shuffle.

    Args:
      batch: a tree of arrays `[T, N, ...]`; T * N is divisible by `num_minibatches`.
      window: shuffle windows of L successive steps of one environment, where L divides T, and their number N * T / L
        is divisible by `num_minibatches`; a minibatch is then `[L, W, ...]`. None: shuffle steps; it is `[B, ...]`.
      target_kl: if not None, the first minibatch whose `approx_kl` (a metric of the loss, before the step) exceeds
        1.5 * target_kl stops the update: it takes no step, and neither does any later minibatch.
      spread_axis: the axis of the batch that is divided over the agent's devices, if it has several. Every minibatch
        then takes an equal part from each device. Within a device the deal is uniform, but minibatches in which the
        devices' environments have unequal shares do not occur.
    Returns:
      (train_state, metrics): means of the loss's metrics over the minibatches up to the one that stopped the update,
      and `epochs_used`, the number of gradient steps taken divided by `num_minibatches`.
    """
    axis = 0 if window is None else 1
    batch = within_device(partial(_windows, length=window), (spread_axis,), axis)(batch)
    batch_size = jax.tree.leaves(batch)[0].shape[axis]
    chex.assert_is_divisible(batch_size, num_minibatches * num_devices())
    own_size = batch_size // num_devices()

    def deal(key):
        return shuffle(own_key(key), own_size).reshape(num_minibatches, -1)

    def take(batch, index):
        return jax.tree.map(lambda x: jnp.take(x, index, axis=axis), batch)

    def minibatch_step(carry, index):
        old, stopped = carry
        minibatch = within_device(take, (axis, 0), axis)(batch, index)
        new, metrics = gradient_step(loss, tx, learning_rate, old, minibatch)
        if target_kl is not None:
            stopped |= metrics["approx_kl"] > 1.5 * target_kl
            new = jax.tree.map(lambda new, old: jnp.where(stopped, old, new), new, old)
        return (new, stopped), metrics

    def step(carry, index):
        if target_kl is None:
            return minibatch_step(carry, index)
        carry, metrics = step_if(any_lane(~carry[1]), minibatch_step, carry, index)
        return carry, metrics | {"took": ~carry[1]}

    def epoch(carry, key):
        return scan(step, carry, within_device(deal, (None,), 1)(key), join=alone())

    carry = (train_state, jnp.bool_(False))
    (train_state, _), metrics = scan(epoch, carry, jax.random.split(key, num_epochs), join=alone())
    took = metrics.pop("took", jnp.ones((num_epochs, num_minibatches), bool))
    # The minibatch that stopped the update counts in the means: if it was the first, there are no others.
    measured = jnp.roll(took.ravel(), 1).at[0].set(True).reshape(took.shape)
    means = {name: jnp.mean(x, where=measured) for name, x in metrics.items()}
    return train_state, means | {"epochs_used": jnp.sum(took) / num_minibatches}
