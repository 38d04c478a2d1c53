"""The types that every module of purepg shares. This one imports nothing of purepg.

Axes: `T` time, `N` environments, `B` flattened batch, `S` seeds, `H` hyperparameter settings, `P` prompts or initial
states, `G` episodes of a group. Rollouts have time first, `[T, N, ...]`. Groups of episodes have it last, `[P, G, T]`,
since their losses and advantages are per episode. Metrics of a population are `[H, S, updates]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypedDict, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Key = jax.Array  # a typed key of `jax.random.key`
Params = Any
Obs = Any
Action = Array
EnvState = Any
Memory = Any  # what a policy remembers of the running episodes, leaves [N, ...]; () where it remembers nothing


class Mean(NamedTuple):
    """A mean of any number of values, perhaps of none. The host divides (`train.averaged`), so that a compiled program
    without errors makes no NaN, and `jax_debug_nans` can be on."""

    total: Array
    num: Array

    @classmethod
    def of(cls, value: Array) -> "Mean":
        """The mean of one value."""
        return cls(value, jnp.ones_like(value))


Metrics = dict[str, Any]  # scalars, or a `Mean` of one; the same names at every update, `UpdateMetrics` among them


class UpdateMetrics(TypedDict):
    """The metrics that every algorithm reports."""

    env_steps: Array  # int32: environment steps that the update took; 0 once the member has stopped


class EpisodeMetrics(UpdateMetrics):
    """The metrics of an algorithm that acts: means are over the episodes that ended in the update. Algorithms that
    learn from data, such as cloning and DPO, report none of them but `env_steps`."""

    num_episodes: Array  # int32
    episode_return: Array | Mean  # sum of raw rewards
    episode_length: Array | Mean  # in environment steps


class GuardedMetrics(UpdateMetrics):
    """The metrics of an algorithm under `train.guard`."""

    finite: Array  # bool: False from the first update that made the learner non-finite


class UsageError(ValueError):
    """The caller asked for something impossible; one line says what is wrong, the value, and what to do."""


class Discrete(NamedTuple):
    """The integers 0, ..., n - 1."""

    n: int


class Box(NamedTuple):
    """Real arrays between `low` and `high`, elementwise; both have the space's shape."""

    low: np.ndarray
    high: np.ndarray
    dtype: Any = np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low.shape

    @property
    def bounded(self) -> bool:
        return bool(np.all(np.isfinite(self.low)) and np.all(np.isfinite(self.high)))


class MultiDiscrete(NamedTuple):
    """Vectors of integers; entry i is one of 0, ..., sizes[i] - 1."""

    sizes: tuple[int, ...]


class LegalActions(NamedTuple):
    """A leaf of an observation, bool `[n]`: which actions of a Discrete action space may be taken now. Policies give
    the others probability 0."""

    n: int


Space = Discrete | MultiDiscrete | Box
ObservationSpace = Any  # Box, Discrete, MultiDiscrete or LegalActions; or a tree (dict, tuple) of them


def is_space(x: Any) -> bool:
    """Whether `x` is the space of one leaf of an observation."""
    return isinstance(x, Discrete | MultiDiscrete | Box | LegalActions)


def is_image(space: Any) -> TypeGuard[Box]:
    """Whether observations are `[height, width, channels]`."""
    return isinstance(space, Box) and len(space.shape) == 3


def space_leaves(space: ObservationSpace) -> list[Any]:
    """The spaces of an observation's leaves, in JAX's order."""
    return jax.tree.leaves(space, is_leaf=is_space)


class TimeStep(NamedTuple):
    """The result of one environment step. `obs` is the observation reached, never that of a reset."""

    obs: Obs
    reward: Array  # float32 scalar
    terminated: Array  # bool: the episode ended in a terminal state, whose value is 0
    truncated: Array  # bool: a time limit ended the episode; the value of the last state still counts
    info: Any = ()  # a dict of float scalars, with the names in `Env.metrics`: numbers of the episode so far


class Env(NamedTuple):
    """One environment as pure functions, without a batch axis: the caller vmaps.

    `step` never resets; `rollout` does. It takes an action in the units of `action_space`: the caller converts a
    policy's action, which is in [-1, 1] where a Box is bounded, by `contract.in_units`. States and observations keep
    their structure, shapes and dtypes.
    """

    reset: Callable[[Key], tuple[EnvState, Obs]]
    step: Callable[[Key, EnvState, Action], tuple[EnvState, TimeStep]]
    observation_space: ObservationSpace
    action_space: Space
    max_episode_steps: int | None  # None: episodes have no time limit
    name: str = "custom"
    held_out: "Env | None" = None  # evaluates policies in place of this one, on resets that training never sees
    task: Any = None  # the `envs.tasks.Task` of an environment of tokens
    describe: Callable[[Obs], dict[str, str]] | None = None  # puts a final observation into words, for people to read
    metrics: tuple[str, ...] = ()  # names in `TimeStep.info`; a rollout reports each one's mean over finished episodes
    privileged: tuple[str, ...] = ()  # entries of a dict observation that the critic reads, and the policy does not
    costly_reset: bool = False  # reset only environments whose episode ended, in a loop, and not all in one batch
    render: Callable[[Any], np.ndarray] | None = None  # one state in numpy to a picture, uint8 [height, width, 3]
    outside: Callable[[int], Any] | None = None  # not JAX: makes n (`envs.outside.HostEnvs`), which `render` draws


class Window(NamedTuple):
    """L successive observations of N environments, as a policy with memory is applied to them: it goes through them in
    order, from the memory before the first, which begins anew where an episode starts."""

    obs: Obs  # leaves [L, N, ...]
    starts: Array  # [L, N] bool: the observation is the first of an episode
    memory: Memory  # [>= 1, N, ...], before each observation; only that before the first is read
    burn_in: tuple[Obs, Array] | None = None  # steps before, (obs, starts): memory goes through them without a gradient


class Moment(NamedTuple):
    """Single observations, each with the memory before it, as a policy with memory is applied to them; leaves have any
    leading batch axes."""

    obs: Obs
    memory: Memory


class Following(NamedTuple):
    """Observations `[L, N, ...]`, each the one after that of a window, in the same episode also where that ends there;
    the memory before it follows from the window, with the parameters that are applied."""

    window: Window
    obs: Obs


def remembers(seen: Any) -> bool:
    """Whether what a network is applied to has a memory, and is not plain observations."""
    return isinstance(seen, Window | Moment | Following)


def observed(seen: Any) -> Obs:
    """The observations in what a network is applied to."""
    return seen.obs if remembers(seen) else seen


def following(obs: Any, next_obs: Any) -> Any:
    """What a network is applied to for `next_obs` where its parameters are not those that acted: a `Following`; without
    memory, `next_obs` itself."""
    return Following(obs, observed(next_obs)) if isinstance(obs, Window) else next_obs


def seen(obs: Obs, starts: Any, memory: Memory) -> Any:
    """What a policy is applied to at one step of a rollout: the observation; with memory, a `Window`'s part of it."""
    return Window(obs, starts, memory) if jax.tree.leaves(memory) else obs


def moment(obs: Obs, memory: Memory) -> Any:
    """What a policy is applied to for single observations: these; with memory, a `Moment`."""
    return Moment(obs, memory) if jax.tree.leaves(memory) else obs


class Transition(NamedTuple):
    """Experience; every leaf is `[T, N, ...]`. Advantage estimators and replay both use it.

    Where the policy has a memory, `obs` is a `Window`, and `next_obs` of a rollout a `Moment` with the memory of the
    episode that `obs` belongs to, also where that has ended; of a batch from replay, a `Following`.
    """

    obs: Obs
    action: Any  # as the policy's `log_prob` takes it (`distributions.Squashed`); in replay, as it was executed
    log_prob: Any  # [...] log pi(action | obs) under the policy that acted; None in replay
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Obs  # before any reset


class Network(Protocol):
    """A policy and V. Any flax.linen module whose call returns (distribution, value) is one.

    `obs` may have any leading batch axes; `value` and the log-probabilities have exactly those. A network with memory
    is applied to a `Window`, a `Moment` or a `Following`, and has two more methods (see `has_memory`):

        memory(num_envs) -> the memory before an episode's first step, leaves [N, ...]
        remember(params, Moment) -> ((distribution, value), the memory after it)
    """

    def init(self, key: Key, obs: Obs, /) -> Params: ...
    def apply(self, params: Params, obs: Obs, /) -> Any: ...


class QNetwork(Protocol):
    """A policy and K critics Q, without a V. `params` is `{"policy": ..., "critic": ...}`; each method reads only its
    own half. With memory, which is of both halves, it has the two methods more of `Network`."""

    def init(self, key: Key, obs: Obs, /) -> Params: ...
    def apply(self, params: Params, obs: Obs, /) -> tuple[Any, None]: ...
    def q(self, params: Params, obs: Obs, action: Action, /) -> Array: ...  # [K, ...], of executed actions
    def q_of_all(self, params: Params, obs: Obs, /) -> Array: ...  # [K, ..., A], of discrete actions


def has_memory(network: Any) -> bool:
    """Whether a network remembers what it has seen of an episode, as in `Network`."""
    return hasattr(network, "remember") and bool(jax.tree.leaves(jax.eval_shape(lambda: network.memory(1))))


def first_memory(network: Any) -> Callable[[int], Memory]:
    """`memory(num_envs)` of a network, before an episode's first step; `no_memory` of one without."""
    return network.memory if has_memory(network) else no_memory


def first_seen(network: Any, obs: Obs) -> Any:
    """What a network is applied to for one observation without a batch axis, at an episode's start."""
    return moment(obs, jax.tree.map(lambda x: x[0], first_memory(network)(1)))


class State(NamedTuple):
    """An algorithm's whole state.

    learner: parameters, targets, optimiser state, normalisers, coefficients; a member that diverged keeps its last
      finite learner.
    world: environments and replay, which are never selected or branched on, because copying them is slow.
    guard: the state of `train.guard`; None for an algorithm without it.
    """

    learner: Any
    world: Any
    guard: Any = None


def no_memory(num_envs: int) -> Memory:
    """The memory of a policy without one."""
    del num_envs
    return ()


class Actor(NamedTuple):
    """A policy that acts on raw observations, split so that a rollout can draw all random numbers before it begins.

    noise: the random numbers of one step, `noise(key, obs)`; of `obs` only shapes are read.
    act: `act(noise, memory, obs) -> (memory, action [N, ...], log_prob [N])`; log_prob may be None where nothing reads
      it.
    memory: `memory(num_envs)`, what it remembers before an episode's first step.
    respond: `respond(key, obs) -> token [N, L + R]`, whole responses to the prompts in `obs`; None if a policy can
      only act step by step.
    """

    noise: Callable[[Key, Obs], Any]
    act: Callable[[Any, Memory, Obs], tuple[Memory, Any, Any]]
    memory: Callable[[int], Memory] = no_memory
    respond: Callable[[Key, Obs], Array] | None = None

    def __call__(self, key: Key, memory: Memory, obs: Obs) -> tuple[Memory, Any, Any]:
        """One step with random numbers of its own: (memory, action, log_prob)."""
        return self.act(self.noise(key, obs), memory, obs)

    @classmethod
    def of(cls, act: Callable[[Key, Obs], Any]) -> "Actor":
        """The actor of a function `act(key, obs)` from observations `[N, ...]` to actions `[N, ...]`."""
        return cls(lambda key, obs: key, lambda key, memory, obs: (memory, act(key, obs), None))


class Explorer(NamedTuple):
    """How an algorithm acts during training, for environments that are stepped outside of its compiled update.

    Acting uses the learner as it is at the update's start, in all of the update's steps.

    num_envs, num_steps: an update takes T steps in each of N environments.
    carry: `carry(obs)` is what acting carries from step to step, before the first one; only shapes of `obs` are read.
    act: `act(key, learner, carry, update, t, obs, starts) -> (action, log_prob, memories, carry)`, for raw observations
      `[N, ...]`. `t` is the call's number in its update; there are more than T calls where resets take steps of their
      own. `starts` `[N]` marks the first steps of episodes. Action and log_prob are as `Transition` has them;
      `memories` is the policy's memory (before the step, after it).
    joined: learning takes the first step of an update for the one after the last step of the update before.
    """

    num_envs: int
    num_steps: int
    carry: Callable[[Obs], Any]
    act: Callable[[Key, Any, Any, Array, Array, Obs, Array], tuple[Any, Any, tuple[Memory, Memory], Any]]
    joined: bool = False


class Sampler(NamedTuple):
    """How an algorithm samples responses, for rewards that are given outside of its compiled update. A step learns from
    such responses where they stand in place of `State.world`.

    num_prompts, group_size: an update takes G responses to each of P prompts, in each round.
    max_rounds: rounds in which an update samples at most. The step takes what was sampled in one round, or with several
      the responses of all of them, `[max_rounds, P, G, ...]`.
    sample: `sample(key, learner, prompt [P, L])`, a round's responses (`algorithms.groups.GroupedEpisodes`), which
      have earned nothing yet.
    answer: `answer(key, learner, prompt [P, L], n, deterministic) -> token [P, n, L + R]`, n responses to each prompt.
    rewarded: `rewarded(responses, reward [P, G])`, the responses with what they have earned.
    """

    num_prompts: int
    group_size: int
    max_rounds: int
    sample: Callable[[Key, Any, Array], Any]
    answer: Callable[[Key, Any, Array, int, bool], Array]
    rewarded: Callable[[Any, Array], Any]


class UpdateSteps(NamedTuple):
    """The least and the most environment steps that one update takes; equal where all updates have one length."""

    least: int
    most: int

    @property
    def vary(self) -> bool:
        return self.least < self.most


Step = Callable[[Key, State, Array], tuple[State, Metrics]]


class Algorithm(NamedTuple):
    """A learning algorithm as pure functions.

    init: the state before the first update.
    step: one update, `step(key, state, update) -> (state, metrics)`; `update` counts from 0 and drives schedules.
    policy: `policy(state, deterministic)`, which samples its actions or takes the distribution's mode.
    update_steps: how many environment steps one update takes.
    explorer: how it acts in environments that are not JAX; None if it cannot learn from them.
    sampler: how it samples responses for rewards in Python; None if it cannot learn from them.
    measure: `measure(state)`, what held-out rows of data say of it, by name. The first is a loss, by whose negative
      agents are compared in place of an evaluation's returns; None where they are compared by those.
    """

    init: Callable[[Key], State]
    step: Step
    policy: Callable[[State, bool], Actor]
    update_steps: UpdateSteps
    explorer: Explorer | None = None
    sampler: Sampler | None = None
    measure: Callable[[State], dict[str, Array]] | None = None
