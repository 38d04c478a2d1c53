"""Computes what memory is worth on small processes that hide their state, and what windows cost a policy that has it.

The first table has the best return with memory and without, by dynamic programming over beliefs and by trying every
policy. The second has the bias of the policy gradient where backpropagation through time stops at the edges of windows:
the mean gradient is summed over every trajectory in double precision, without sampling. Bias is |g_L - g| / |g| for
windows of L steps, and the cosine is that of the angle between g_L and the exact g.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.config import Count, Positive, Seed
from purepg.envs.finite_mdp import FiniteMDP, mdp_env
from purepg.envs.named_mdps import aliased
from purepg.envs.named_pomdps import repeat_previous, tmaze
from purepg.lab.exact import in_float64
from purepg.lab.histories import WindowBias, window_bias
from purepg.lab.pomdp import longest_episode, objective_without_memory, optimum_with_memory, optimum_without_memory
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.networks.memory import MemoryKind
from purepg.run.console import say
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.types import first_seen

PROCESSES = {
    "aliased": aliased(),
    **{f"tmaze, length {length}": tmaze(length) for length in (1, 10, 50, 100, 200)},
    **{f"repeat_previous, 2 values, k {k}": repeat_previous(2, k) for k in (1, 2, 3, 4)},
    "repeat_previous, 4 values, k 1": repeat_previous(4, 1),
}
CUT = {"tmaze, length 5": tmaze(5), "repeat_previous, k 1": repeat_previous(2, 1, 4)}  # of few trajectories
CELLS: tuple[MemoryKind, ...] = ("gru", "lstm", "lru")


@dataclass(frozen=True)
class Config:
    """The policies through which windows are computed; the optima do not depend on them.

    Attributes:
      seed: seed of the parameters.
      num_draws: random parameters of each policy, over which bias and cosine are averaged.
      hidden: width of the layer before the memory.
      memory_size: width of the memory.
      policy_scale: gain of the policy's last layer. Where it is small, nearly all of the gradient is that layer's own,
        which no window cuts.
    """

    seed: Seed = 0
    num_draws: Count = 16
    hidden: Count = 8
    memory_size: Count = 8
    policy_scale: Positive = 1.0


def optima() -> str:
    """The table of what memory is worth."""
    rows = []
    for name, mdp in PROCESSES.items():
        best, without = optimum_with_memory(mdp), optimum_without_memory(mdp)
        uniform = objective_without_memory(mdp, np.full(mdp.reward.shape, 1 / mdp.num_actions))
        values = [f"{x:.4g}" for x in (best.objective, without.objective, uniform)]
        rows.append([name, f"{mdp.num_states}", f"{longest_episode(mdp)}", *values, f"{best.num_beliefs}"])
    header = ["process", "states", "steps", "best with memory", "best without", "at random", "beliefs"]
    return table(header, rows)


class Biases(NamedTuple):
    """Means over the draws, `[K]`, through windows of K lengths."""

    lengths: tuple[int, ...]
    aligned: WindowBias  # an episode begins with a window
    anywhere: WindowBias  # at any step of one, each equally likely


def biases(mdp: FiniteMDP, kind: MemoryKind, config: Config) -> Biases:
    """Of L = 1, ..., H and 2 H and 4 H, where H is an episode's length."""
    settings = NetworkConfig(
        hidden=(config.hidden,), policy_scale=config.policy_scale, memory=kind, memory_size=config.memory_size
    )
    network, H = actor_critic(mdp_env(mdp, observe_alias=True), settings), longest_episode(mdp)
    keys = jax.random.split(jax.random.key(config.seed), config.num_draws)
    params = jax.vmap(lambda key: network.init(key, first_seen(network, jnp.int32(0))))(keys)
    lengths = (*range(1, H + 1), 2 * H, 4 * H)

    @jax.jit
    def means(params):
        def of_draw(params):
            return [window_bias(mdp, network, params, lengths, anywhere) for anywhere in (False, True)]

        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(of_draw, params))

    return Biases(lengths, *in_float64(means, params))


def bias_table(found: Mapping[str, Mapping[str, Biases]]) -> str:
    """The table of windows, from `biases` by process and cell."""
    header = ["windows", *(f"{kind} {column}" for kind in CELLS for column in ("bias", "cosine", "anywhere"))]
    rows = []
    for name, of_cells in found.items():
        for i, L in enumerate(of_cells[CELLS[0]].lengths):
            row = [f"{name}, L = {L}"]
            for kind in CELLS:
                x = of_cells[kind]
                row += [f"{y[i]:.3f}" for y in (x.aligned.bias, x.aligned.cosine, x.anywhere.bias)]
            rows.append(row)
    return table(header, rows)


def study(config: Config) -> Study:
    """Computes both tables."""
    worth = optima()
    found = {}
    for name, mdp in CUT.items():
        say(f"the gradient through windows on {name}")
        found[name] = {kind: biases(mdp, kind, config) for kind in CELLS}
    cut = bias_table(found)
    about_cut = (
        f"Bias and cosine of the gradient through windows of L steps, means over {config.num_draws} random policies; "
        "an episode begins with a window, or, for the bias called anywhere, at any step of one"
    )
    numbers = {
        name: {
            kind: {"windows": x.lengths, "aligned": x.aligned[:2], "anywhere": x.anywhere[:2]}  # (bias, cosine)
            for kind, x in of_cells.items()
        }
        for name, of_cells in found.items()
    }
    return Study(
        f"The best return\n{worth}\n\n{about_cut}\n{cut}",
        {"config": dataclasses.asdict(config), "biases": numbers},
        table=f"{worth}\n\n{about_cut}:\n\n{cut}",
    )


if __name__ == "__main__":
    main(study, Config(), __doc__)
