"""Experience from environments that are not JAX (`envs.outside`): recordings for compiled learning, and evaluation.

Everything here is NumPy on the host. Acting is a compiled function that is called once for every step of all
environments; arrays of environments have the agents' axes first, `[*agents, N, ...]`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from purepg.envs.outside import HostEnvs, HostStep
from purepg.envs.suites import suite_of
from purepg.experience.rollout import Recording
from purepg.run.console import say
from purepg.run.processes import number
from purepg.train import EpisodeStats
from purepg.types import Algorithm, Env, Memory, Obs, Transition, UsageError, moment, seen

EVALUATED_AT_ONCE = 16  # episodes of each agent, at least

# `t` numbers the calls of an update, from 0: T, and more where resets take steps of their own.
# act(t, obs, starts) -> (action, log_prob, the policy's memory before and after, the same action in the environment's
# units), leaves [*agents, N, ...]
Act = Callable[[int, Obs, np.ndarray], tuple[Any, Any, tuple[Memory, Memory], Any]]


def not_jax(env: Env) -> str | None:
    """What is not JAX: the environment, the rewards of its task, or nothing."""
    if env.outside is not None:
        return env.name
    return f"the reward of {env.name}" if env.task is not None and env.task.judge is not None else None


def refuse_without_explorer(env: Env, algorithm: Algorithm, name: str) -> None:
    """Raises UsageError where the algorithm cannot learn from what is not JAX."""
    if env.outside is None and not_jax(env) and algorithm.sampler is None:
        raise UsageError(f"{not_jax(env)} is Python, and {name} reads rewards within its program; one that works: grpo")
    if env.outside is not None and algorithm.explorer is None:
        raise UsageError(
            f"{env.name} is not JAX, and {name} plays whole episodes within its program; those that work: a2c, ddpg, "
            "dpg, npg, off_policy_pg, ppo, ppo_penalty, q_actor_critic, sac, sac_discrete, td3, trpo"
        )


def known_outside(name: str, env: Any) -> bool:
    """Whether an environment is not JAX, as far as is known before a function makes it. The CPU is then not split into
    devices, which halved the speed of PPO on gym/CartPole-v1 with 8 environments."""
    if env is None:
        suite = suite_of(name)
        return suite is not None and suite.outside
    return isinstance(env, Env) and env.outside is not None


def devices_for(env: Env, found: int, devices: int | None, per_agent: int) -> int:
    """How many of the devices that were found learn from this environment: 1, if it is not JAX. Says so where more were
    asked for, and raises UsageError where they were for one agent, or where Python is to be called in several
    processes."""
    if env.outside is not None and per_agent > 1:
        raise UsageError(f"devices_per_agent ({per_agent}) must be 1: {env.name} is not JAX")
    if number() > 1 and (name := not_jax(env)):
        raise UsageError(f"distributed needs an environment in JAX, which {name} is not")
    if env.outside is None:
        return found
    if devices is not None and devices > 1:
        say(f"devices ({devices}): {env.name} is not JAX, so that one device is used")
    return 1


def seed_of(*entropy: int) -> int:
    """A seed below 2^31, which every environment takes, that differs for different numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


class Recorder:
    """Steps N environments of each agent, and records the steps.

    A recording has exactly T transitions of every environment, one after another. Where resets take steps of their own
    (Gymnasium's next-step mode), an environment whose episodes ended less often than another's is ahead of it; the
    steps beyond its T are not recorded, so that the learner sees only what its current parameters have done. They
    count in the returns and lengths of episodes, but not in `env_steps`. `parted`, `[*agents, N]`, says where an
    episode ended in such steps, between the latest recording and the one before.

    Args:
      agents: their axes, such as (H, S).
      seeds: one for each environment, of all agents in turn.
      joined: a recording must go on where the last one ended. `record` then raises UsageError where a reset takes a
        step of its own.
    """

    def __init__(
        self,
        env: Env,
        agents: tuple[int, ...],
        num_envs: int,
        num_steps: int,
        seeds: Sequence[int],
        joined: bool = False,
    ):
        assert env.outside is not None
        self._agents, self._N, self._T = agents, num_envs, num_steps
        self._name, self._joined = env.name, joined
        self._envs: HostEnvs = env.outside(len(seeds))
        try:
            self._obs = self._envs.reset(seeds)
        except BaseException:
            self._envs.close()
            raise
        self._starts = np.ones(len(seeds), bool)
        self._return, self._length = np.zeros(len(seeds)), np.zeros(len(seeds), int)
        self.parted: np.ndarray = np.zeros((*agents, num_envs), bool)
        self._parts = np.zeros(len(seeds), bool)

    def record(self, act: Act) -> Recording:
        """Takes T steps in each environment."""
        M, N, T = math.prod(self._agents), self._N, self._T
        finished: Any = np.zeros((M, T, 3), np.float32)
        self.parted = self._by_agent(self._parts)
        self._parts = np.zeros(M * N, bool)
        made = np.zeros(M * N, int)
        buffers: Any = None
        num_calls = 0
        while made.min() < T:
            obs, starts = (jax.tree.map(self._by_agent, x) for x in (self._obs, self._starts))
            action, log_prob, memories, in_units = act(num_calls, obs, starts)
            step: Any = self._envs.step(self._flat(in_units))
            if self._joined and not step.taken.all():
                raise UsageError(
                    f"{self._name} takes a step for each reset (next-step mode), so that replay has no windows of "
                    "successive steps: give its vector environment AutoresetMode.SAME_STEP, or use ppo"
                )
            finished[:, min(num_calls, T - 1)] += self._count(step)
            action, log_prob, (before, after) = jax.tree.map(self._flat, (action, log_prob, memories))
            flags = step.terminated, step.truncated
            seen_now, seen_next = seen(self._obs, self._flat(starts), before), moment(step.next_obs, after)
            transition = Transition(seen_now, action, log_prob, step.reward, *flags, seen_next)
            if buffers is None:  # new ones each time: on a CPU, JAX may read the last ones in place
                buffers = jax.tree.map(lambda x: np.empty((M, T, N, *x.shape[1:]), x.dtype), transition)
            self._parts |= (made == T) & step.taken & (step.terminated | step.truncated)
            self._write(buffers, transition, made, step.taken)
            self._obs = step.obs
            num_calls += 1
        recording = Recording(buffers, finished)
        return jax.tree.map(lambda x: x.reshape(*self._agents, *x.shape[1:]), recording)

    def close(self) -> None:
        self._envs.close()

    def _write(self, buffers: Any, transition: Transition, made: np.ndarray, taken: np.ndarray) -> None:
        """Appends the steps that were taken, of environments that have not made T."""
        pairs = list(zip(jax.tree.leaves(buffers), jax.tree.leaves(transition), strict=True))
        if taken.all() and (made == made[0]).all():  # always, in same-step mode
            for buffer, x in pairs:
                at_t = buffer[:, made[0]]
                at_t[...] = x.reshape(at_t.shape)
            made += 1
            return
        index = np.flatnonzero(taken & (made < self._T))
        m, n = np.divmod(index, self._N)
        for buffer, x in pairs:
            buffer[m, made[index], n] = x[index]
        made[index] += 1

    def _count(self, step: HostStep) -> np.ndarray:
        """Advances the episodes' returns and lengths. Returns, of those that ended, the sums and number `[M, 3]`."""
        self._return += np.where(step.taken, step.reward, 0.0)
        self._length += step.taken
        ended = (step.terminated | step.truncated) & step.taken
        sums = np.stack([self._return, self._length, np.ones_like(self._return)], -1) * ended[:, None]
        self._return[ended], self._length[ended] = 0.0, 0
        self._starts = ended | ~step.taken
        return sums.reshape(-1, self._N, 3).sum(1)

    def _by_agent(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(*self._agents, self._N, *x.shape[1:])

    def _flat(self, x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.reshape(-1, *x.shape[len(self._agents) + 1 :])


def evaluate_outside(
    act: Callable[[int, int, Memory, Obs], tuple[Memory, Any]],
    memory: Callable[[int], Memory],
    env: Env,
    agents: tuple[int, ...],
    num_episodes: int,
    max_steps: int,
    seed: int,
    at_once: int = EVALUATED_AT_ONCE,
) -> EpisodeStats:
    """Whole episodes, as `train.evaluate` plays them, with leaves `[*agents, num_episodes]`.

    Episodes are played in turns of at most `at_once`, each of which lasts until all of its episodes have ended. Each
    environment plays one episode of a turn, so that every episode counts once. The i-th has the same seed for every
    agent.

    Args:
      act: `act(turn, t, memory, obs [*agents, N, ...])` returns (memory, actions in the environment's units).
      memory: `memory(N)`, the policies' before the first step of N episodes, leaves `[*agents, N, ...]`.
    """
    assert env.outside is not None
    M, N = math.prod(agents), min(at_once, num_episodes)
    envs: HostEnvs = env.outside(M * N)
    try:
        turns = [
            _turn(partial(act, turn), memory(N), envs, agents, N, max_steps, seed, turn * N)
            for turn in range(-(-num_episodes // N))
        ]
    finally:
        envs.close()
    stats: list[Any] = [np.concatenate(x, axis=-1)[..., :num_episodes] for x in zip(*turns, strict=True)]
    return EpisodeStats(*(x.reshape(*agents, num_episodes) for x in stats), last_obs=())


def _turn(
    act: Callable[[int, Memory, Obs], tuple[Memory, Any]],
    memory: Memory,
    envs: HostEnvs,
    agents: tuple[int, ...],
    num_envs: int,
    max_steps: int,
    seed: int,
    first: int,
) -> tuple[np.ndarray, ...]:
    """One episode in each environment: returns, lengths and flags `[M, N]`. `first` is the number of the first."""
    M, N = math.prod(agents), num_envs
    obs = envs.reset([seed_of(seed, first + i) for i in range(N)] * M)
    returns, lengths = np.zeros(M * N, np.float32), np.zeros(M * N, np.int32)
    terminated, truncated = np.zeros(M * N, bool), np.zeros(M * N, bool)
    for t in range(max_steps):
        alive = ~(terminated | truncated)
        if not alive.any():
            break
        memory, action = act(t, memory, jax.tree.map(lambda x: x.reshape(*agents, N, *x.shape[1:]), obs))
        action = np.asarray(action)
        step = envs.step(action.reshape(M * N, *action.shape[len(agents) + 1 :]))
        returns += np.where(alive, step.reward, 0.0)
        lengths += alive
        terminated |= alive & step.terminated
        truncated |= alive & step.truncated
        obs = step.obs
    truncated |= ~(terminated | truncated)
    return tuple(x.reshape(M, N) for x in (returns, lengths, terminated, truncated))
