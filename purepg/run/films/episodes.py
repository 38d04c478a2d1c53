"""Whole episodes with their states, played by any policy: in blocks on the device, kept on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import in_units
from purepg.equations.distributions import executed
from purepg.experience.rollout import reset_all
from purepg.types import Actor, Env, Key

MAX_FRAMES = 250  # of an episode
BLOCK_STEPS, BLOCK_BYTES = 500, 64_000_000  # the most steps, and bytes of states, that one call plays


class Episode(NamedTuple):
    """One whole episode of T steps, in numpy."""

    state: Any  # leaves [F, ...]: before the first step, after every `every`-th step, and after the last
    obs: Any  # [F, ...] of these states
    reward: Any  # [T]
    terminated: bool
    truncated: bool
    every: int = 1  # 1: F = T + 1


class Block(NamedTuple):
    """Steps of N episodes side by side, leaves `[K, N, ...]`; entries after an episode's end are meaningless."""

    state: Any  # after each step
    obs: Any
    reward: Any
    terminated: Any
    truncated: Any


def play(
    key: Key,
    env: Env,
    policy: Callable[[Any], Actor],
    learned: Any,
    num_episodes: int,
    max_steps: int,
    thinned: bool = False,
) -> list[Episode]:
    """The episodes over which `purepg.train.evaluate` averages when it is given the same arguments.

    A program plays a block of steps at a time, until all episodes have ended, so that the device holds the states of
    one block only.

    Args:
      policy: the policy is `policy(learned)`, made within the program.
      max_steps: episodes are truncated after so many steps.
      thinned: keep so few states that one in `every` is at most `MAX_FRAMES` of an episode, where `every` is the
        smallest sufficient power of two. Otherwise all are kept.
    """
    k_start, k_run = jax.random.split(key)
    first = jax.jit(lambda key: reset_all(key, env, num_episodes)[:2])(k_start)
    memory = jax.jit(lambda learned: policy(learned).memory(num_episodes))(learned)
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(first))
    num_steps = max(1, min(max_steps, BLOCK_STEPS, BLOCK_BYTES // max(1, num_bytes)))

    @jax.jit
    def advance(key, learned, carry, start):
        return _steps(key, env, policy(learned), carry, start + jnp.arange(num_steps), max_steps)

    played = _Played(jax.device_get(_numbers(first)), thinned)
    carry, start = (*first, memory), 0
    while played.some_run:
        carry, block = advance(k_run, learned, carry, jnp.int32(start))
        played.add(jax.device_get(block))
        start += num_steps
    return played.episodes()


def _steps(key: Key, env: Env, actor: Actor, carry: Any, t: Any, max_steps: int) -> tuple[Any, Block]:
    """Takes the steps of numbers `t` `[K]` from (environment states, observations, memory); returns those reached, and
    all."""

    def body(carry, t):
        env_state, obs, memory = carry
        k_act, k_step = jax.random.split(jax.random.fold_in(key, t))
        memory, action, _ = actor(k_act, memory, obs)
        taken = in_units(env.action_space, executed(action))
        num_episodes = jax.tree.leaves(obs)[0].shape[0]
        env_state, time_step = jax.vmap(env.step)(jax.random.split(k_step, num_episodes), env_state, taken)
        return (env_state, time_step.obs, memory), (_numbers(env_state), time_step)

    carry, (state, step) = jax.lax.scan(body, carry, t)
    truncated = step.truncated | ((t == max_steps - 1)[:, None] & ~step.terminated)
    return carry, Block(state, step.obs, step.reward, step.terminated, truncated)


def _numbers(state: Any) -> Any:
    """A state with its typed keys, which NumPy cannot hold, as plain numbers."""

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(plain, state)


class _Played:
    """What the host keeps of N episodes while they are played."""

    def __init__(self, first: Any, thinned: bool):
        self.every = 1
        self._thinned = thinned
        self._steps = [0]  # the numbers of the kept steps; 0 is before the first
        self._kept = [first]  # (state, obs), leaves [N, ...]
        self._last: dict[int, Any] = {}  # an episode's end: (steps, state and obs, terminated, truncated)
        self._rewards: list[np.ndarray] = []
        self._num_episodes = len(jax.tree.leaves(first)[0])
        self._num_steps = 0

    @property
    def some_run(self) -> bool:
        return len(self._last) < self._num_episodes

    def add(self, block: Block) -> None:
        """Adds a block of steps."""
        self._rewards.append(block.reward)
        for i, (terminated, truncated) in enumerate(zip(block.terminated, block.truncated, strict=True)):
            t = self._num_steps = self._num_steps + 1
            for n in np.flatnonzero(np.asarray(terminated | truncated)):
                if n not in self._last:
                    state = jax.tree.map(lambda x, i=i, n=n: x[i, n].copy(), (block.state, block.obs))
                    self._last[int(n)] = t, state, bool(terminated[n]), bool(truncated[n])
            if t % self.every == 0:
                self._steps.append(t)
                self._kept.append(jax.tree.map(lambda x, i=i: x[i].copy(), (block.state, block.obs)))
            if self._thinned and t > MAX_FRAMES * self.every:
                self.every *= 2
                kept = [(t, x) for t, x in zip(self._steps, self._kept, strict=True) if t % self.every == 0]
                self._steps, self._kept = map(list, zip(*kept, strict=True))
            if not self.some_run:
                break

    def episodes(self) -> list[Episode]:
        """The single episodes, each cut at its end."""
        reward = np.concatenate(self._rewards)
        found = []
        for n, (length, last, terminated, truncated) in sorted(self._last.items()):
            kept = zip(self._steps, self._kept, strict=True)
            before = [jax.tree.map(lambda x, n=n: x[n], x) for t, x in kept if t < length]
            state, obs = jax.tree.map(lambda *x: np.stack(x), *before, last)
            found.append(Episode(state, obs, reward[:length, n], terminated, truncated, self.every))
        return found
