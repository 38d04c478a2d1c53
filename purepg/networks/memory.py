"""Cells: what a policy remembers of an episode. A cell goes from (memory, features) to (memory, features), one step at
a time, and `Recurrence` takes it along the steps of a window.

A cell is a flax module like `flax.linen.GRUCell`: called with a memory, leaves `[..., n]`, and features `[..., m]`, it
returns both anew, and `initialize_carry(key, (*batch, 1))` is the memory before an episode's first step. One that has
`unroll(memory, features, starts)` as well, for all L steps at once, is asked for that in place of L calls; it returns
the memory after each step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from purepg.lanes import select
from purepg.networks.attention import GatedTransformer
from purepg.networks.recurrent import GRU, LSTM
from purepg.runtime import compiles_for_gpu
from purepg.types import Array, Following, Memory, Moment, Obs, UsageError, Window

MemoryKind = Literal["gru", "lstm", "lru", "stack", "transformer"]
FOR_GPU = GRU, LSTM  # whose `unroll` launches a seventh of the kernels; on a CPU the loop over calls is faster


def first_of(cell: Callable[..., Any] | None, num_envs: int) -> Memory:
    """A cell's memory before an episode's first step, leaves `[N, ...]`; () without a cell."""
    if cell is None:
        return ()
    made = cell(parent=None)
    return made.initialize_carry(jax.random.key(0), (num_envs, 1))


def with_memory(seen: Any, pick: Callable[[Memory], Memory]) -> Any:
    """A `Window`, `Moment` or `Following` with `pick` of its memory in the memory's place."""
    if isinstance(seen, Following):
        return seen._replace(window=with_memory(seen.window, pick))
    return seen._replace(memory=pick(seen.memory))


def memory_in(seen: Any) -> Memory:
    """The memory of a `Window`, `Moment` or `Following`."""
    return seen.window.memory if isinstance(seen, Following) else seen.memory


class Recurrence(nn.Module):
    """A cell that goes along the time of a `Window`, or takes one step of each `Moment` or `Following`.

    Attributes:
      cell: makes the cell.
    """

    cell: Callable[..., Any]

    @nn.compact
    def __call__(self, seen: Window | Moment | Following, torso: Callable[[Obs], Array]) -> tuple[Memory, Array]:
        """Returns (the memory after each observation, features `[..., n]`); `torso` gives the features `[..., m]` of
        observations that the cell reads."""
        cell = self.cell(name="cell")

        def like(after, memory):  # parameters of another dtype do not change that of the memory
            return jax.tree.map(lambda x, before: x.astype(before.dtype), after, memory)

        def unroll(memory, obs, starts):
            x = torso(obs)
            by_calls = isinstance(cell, FOR_GPU) and (self.is_initializing() or not compiles_for_gpu())
            if hasattr(cell, "unroll") and not by_calls:
                after, x = cell.unroll(memory, x, starts)
                return like(after, memory), x

            def step(cell, memory, inputs):
                x, starts = inputs
                after, x = cell(select(starts, first_of(self.cell, starts.shape[0]), memory), x)
                after = like(after, memory)
                return after, (after, x)

            along = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
            return along(cell, memory, (x, starts))[1]

        def through(window):
            memory = jax.tree.map(lambda x: x[0], window.memory)
            if window.burn_in is not None:
                memory = jax.tree.map(lambda x: jax.lax.stop_gradient(x[-1]), unroll(memory, *window.burn_in)[0])
            return unroll(memory, window.obs, window.starts)

        if isinstance(seen, Window):
            return through(seen)
        memory = seen.memory if isinstance(seen, Moment) else through(seen.window)[0]
        after, x = cell(memory, torso(seen.obs))
        return like(after, memory), x


class Stack(nn.Module):
    """The features of the last `size` observations side by side, those before the episode being 0.

    Attributes:
      size: how many.
      features: the number of features of one observation.
    """

    size: int
    features: int

    def __call__(self, memory: Array, x: Array) -> tuple[Array, Array]:
        stacked = jnp.concatenate([memory, x], axis=-1)
        return stacked[..., self.features :], stacked

    def unroll(self, memory: Array, x: Array, starts: Array) -> tuple[Array, Array]:
        """All steps of a window. memory `[N, (size - 1) * features]`, x `[L, N, features]`, starts `[L, N]`; returns
        (the memory after each step, features `[L, N, size * features]`)."""
        L, N = starts.shape
        before = jnp.moveaxis(memory.reshape(N, self.size - 1, self.features), 1, 0)
        x = jnp.concatenate([before, x])
        episode = jnp.concatenate([jnp.zeros((self.size - 1, N), jnp.int32), jnp.cumsum(starts, axis=0)])
        same = [episode[i : i + L] == episode[self.size - 1 :] for i in range(self.size)]
        stacked = jnp.concatenate([jnp.where(same[i][..., None], x[i : i + L], 0) for i in range(self.size)], axis=-1)
        return stacked[..., self.features :], stacked

    @nn.nowrap
    def initialize_carry(self, key: Array, input_shape: tuple[int, ...]) -> Array:
        del key
        return jnp.zeros((*input_shape[:-1], (self.size - 1) * self.features), jnp.float32)


class LRU(nn.Module):
    """The linear recurrent unit (Orvieto et al. 2023):

        h_t = lambda * h_{t-1} + gamma * B x_t,    y_t = Re(C h_t) + D x_t,    gamma = sqrt(1 - |lambda|^2)

    Its features are gelu(z) * sigmoid(G z), where z is y with a layer norm. The state h is complex, lambda is diagonal
    with |lambda| < 1, and a window's states follow from an associative scan in which an episode's first step has
    lambda = 0 (Lu et al. 2023), so that no state passes from one to the next.

    Attributes:
      size: the number of complex states.
      least, most: the range of |lambda| at the start.
    """

    size: int
    least: float = 0.9
    most: float = 0.999

    def setup(self) -> None:
        def log_nu(key, shape):  # |lambda|^2 uniform in the range's squares
            u = jax.random.uniform(key, shape)
            return jnp.log(-0.5 * jnp.log(u * (self.most**2 - self.least**2) + self.least**2))

        def log_theta(key, shape):  # phases of up to a twentieth of a turn
            return jnp.log(jnp.pi / 10 * jax.random.uniform(key, shape, minval=1e-3))

        self.log_nu = self.param("log_nu", log_nu, (self.size,))
        self.log_theta = self.param("log_theta", log_theta, (self.size,))
        self.inputs = nn.Dense(2 * self.size, use_bias=False, name="inputs")
        self.outputs = nn.Dense(self.size, use_bias=False, name="outputs")
        self.skip = nn.Dense(self.size, name="skip")
        self.gate = nn.Dense(self.size, name="gate")
        self.norm = nn.LayerNorm(name="norm")

    def __call__(self, memory: Array, x: Array) -> tuple[Array, Array]:
        decay, driven = self._decay(), self._driven(x)
        state = _complex(memory) * decay + driven
        return _real(state), self._features(state, x)

    def unroll(self, memory: Array, x: Array, starts: Array) -> tuple[Array, Array]:
        """All steps of a window. memory `[N, 2 * size]`, x `[L, N, m]`, starts `[L, N]`; returns (the memory after each
        step `[L, N, 2 * size]`, features `[L, N, size]`)."""
        decay = jnp.where(starts[..., None], 0.0, self._decay())
        driven = self._driven(x).at[0].add(decay[0] * _complex(memory))

        def join(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, state = jax.lax.associative_scan(join, (decay, driven))
        return _real(state), self._features(state, x)

    @nn.nowrap
    def initialize_carry(self, key: Array, input_shape: tuple[int, ...]) -> Array:
        del key
        # Real and imaginary parts, which checkpoints can hold.
        return jnp.zeros((*input_shape[:-1], 2 * self.size), jnp.float32)

    def _decay(self) -> Array:
        return jnp.exp(jax.lax.complex(-jnp.exp(self.log_nu), jnp.exp(self.log_theta)))

    def _driven(self, x: Array) -> Array:
        gamma = jnp.sqrt(-jnp.expm1(-2 * jnp.exp(self.log_nu)))
        return gamma * _complex(self.inputs(x))

    def _features(self, state: Array, x: Array) -> Array:
        y = self.norm(self.outputs(_real(state)) + self.skip(x))
        return nn.gelu(y) * nn.sigmoid(self.gate(y))


def _complex(x: Array) -> Array:
    return jax.lax.complex(*jnp.split(x, 2, axis=-1))


def _real(x: Array) -> Array:
    return jnp.concatenate([x.real, x.imag], axis=-1)


def cell_of(kind: MemoryKind | None, size: int | None, features: int) -> Callable[..., Any] | None:
    """Makes the cell of a config; None where that has no memory.

    Args:
      size: the width of the cell's features, None: 64; of a stack, how many observations, None: 4; of a transformer,
        how many steps each of its layers looks back, None: 64.
      features: the width of the torso's features.
    """
    if kind is None and size is not None:
        raise UsageError(f"memory_size ({size}) needs a memory: choose gru, lstm, lru, stack or transformer")
    size = size or (4 if kind == "stack" else 64)
    match kind:
        case None:
            return None
        case "gru":
            return partial(GRU, features=size)
        case "lstm":
            return partial(LSTM, features=size)
        case "lru":
            return partial(LRU, size=size)
        case "stack":
            return partial(Stack, size=size, features=features)
        case "transformer":
            return partial(GatedTransformer, size=size, features=features)
