"""A transformer as a cell: it attends to the last steps of the episode."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from purepg.types import Array


class Past(NamedTuple):
    """What a `GatedTransformer` remembers of N episodes."""

    inputs: Array  # [N, K, M, n], of each layer at each of the last M steps, the latest last
    steps: Array  # int32 [N], how many of these belong to the episode


class GatedTransformer(nn.Module):
    """Transformer-XL (Dai et al. 2019) with gates in place of residual sums and layer norms before each part (GTrXL,
    Parisotto et al. 2020), as a cell. A layer attends to its inputs at this step and at the M before it, as far as the
    episode reaches. Those of a window's steps are computed anew; those before the window come out of the memory.

    Attributes:
      size: M, how many steps before this one each layer attends to.
      features: n, the width of its layers, which is that of its inputs.
      num_layers, num_heads: K layers, and the heads of each.
    """

    size: int
    features: int
    num_layers: int = 2
    num_heads: int = 4

    def setup(self) -> None:
        self.layers = [Layer(self.size, self.features, self.num_heads) for _ in range(self.num_layers)]

    def __call__(self, memory: Past, x: Array) -> tuple[Past, Array]:
        batch = x.shape[:-1]
        flat, single = jax.tree.map(lambda y: y.reshape(-1, *y.shape[len(batch) :]), (memory, x))
        after, y = self.unroll(flat, single[None], jnp.zeros((1, len(single)), bool))
        return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[2:]), (after, y))

    def unroll(self, memory: Past, x: Array, starts: Array) -> tuple[Past, Array]:
        """All steps of a window. memory: leaves `[N, ...]`, x `[L, N, n]`, starts `[L, N]`; returns (the memory after
        each step, leaves `[L, N, ...]`, features `[L, N, n]`)."""
        L, M, t = len(x), self.size, jnp.arange(len(x), dtype=jnp.int32)[:, None]
        start = jax.lax.cummax(jnp.where(starts, t, -1))  # of the episode that a step belongs to; -1: before the window
        reach = jnp.minimum(jnp.where(start < 0, memory.steps + t, t - start), M)  # [L, N] steps back
        distance = t + M - jnp.arange(M + L)  # [L, M + L], from a step to each of the memory's and the window's
        visible = (distance >= 0) & (distance <= reach[..., None].swapaxes(0, 1))  # [N, L, M + L]

        last = t + 1 + jnp.arange(M)  # the M steps up to a step, which are its memory
        kept = []
        for i, layer in enumerate(self.layers):
            inputs = jnp.concatenate([jnp.moveaxis(memory.inputs[:, i], 1, 0), x])
            kept.append(jnp.moveaxis(inputs[last], 1, 2))
            x = layer(inputs, visible)
        return Past(jnp.stack(kept, axis=2), jnp.minimum(reach + 1, M)), x

    @nn.nowrap
    def initialize_carry(self, key: Array, input_shape: tuple[int, ...]) -> Past:
        del key
        batch = input_shape[:-1]
        return Past(jnp.zeros((*batch, self.num_layers, self.size, self.features)), jnp.zeros(batch, jnp.int32))


class Layer(nn.Module):
    """x <- gate(x, relu(attention(norm(x)))), then x <- gate(x, relu(mlp(norm(x)))). A key gains a learned vector for
    its distance from the query (Shaw et al. 2018).

    Attributes: size, features, num_heads: as `GatedTransformer` has them.
    """

    size: int
    features: int
    num_heads: int

    @nn.compact
    def __call__(self, inputs: Array, visible: Array) -> Array:
        """inputs `[M + L, N, n]`, of which the last L are a window's; visible `[N, L, M + L]`; returns `[L, N, n]`."""
        M, H, x = self.size, self.num_heads, inputs[self.size :]
        d = -(-self.features // H)
        normed = nn.LayerNorm(name="attention_norm")(inputs)
        query = nn.DenseGeneral((H, d), name="query")(normed[M:])
        key, value = (nn.DenseGeneral((H, d), name=name)(normed) for name in ("key", "value"))
        by_distance = self.param("distance", nn.initializers.normal((H * d) ** -0.5), (M + 1, H, d))

        score = jnp.einsum("tnhd,snhd->nhts", query, key)
        score += _at_distance(jnp.einsum("tnhd,mhd->nhtm", query, by_distance), M)
        weight = nn.softmax(jnp.where(visible[:, None], score / jnp.sqrt(d), -jnp.inf))
        attended = jnp.einsum("nhts,snhd->tnhd", weight, value)
        x = Gate(name="attention_gate")(x, nn.relu(nn.DenseGeneral(self.features, axis=(-2, -1), name="out")(attended)))

        y = nn.relu(nn.Dense(2 * self.features, name="mlp_in")(nn.LayerNorm(name="mlp_norm")(x)))
        return Gate(name="mlp_gate")(x, nn.relu(nn.Dense(self.features, name="mlp_out")(y)))


def _at_distance(score: Array, M: int) -> Array:
    """Scores `[..., L, M + 1]` by distance, M first and 0 last, moved to where these distances are, `[..., L, M + L]`:
    entry m of row t goes to column t + m, and 0 elsewhere."""
    *batch, L, _ = score.shape
    padded = jnp.pad(score, [(0, 0)] * (len(batch) + 1) + [(0, L)]).reshape(*batch, -1)
    return padded[..., : L * (M + L)].reshape(*batch, L, M + L)


class Gate(nn.Module):
    """The update of a gated recurrent unit whose state is x and whose input is y; at first it keeps most of x."""

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        reset, update, of_y = jnp.split(nn.Dense(3 * x.shape[-1], use_bias=False, name="y")(y), 3, axis=-1)
        of_x = nn.Dense(2 * x.shape[-1], name="x")(x)
        reset, update = jnp.split(nn.sigmoid(jnp.concatenate([reset, update - 2], axis=-1) + of_x), 2, axis=-1)
        proposed = nn.tanh(of_y + nn.Dense(x.shape[-1], use_bias=False, name="reset_x")(reset * x))
        return (1 - update) * x + update * proposed
