"""The nouns of purepg. Every other module speaks in these; this one imports nothing of purepg.

Axes, everywhere: `T` time first, `N` environments, `B` flattened batch, `S` seeds, `H` hyperparameter settings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Key = jax.Array  # a typed key of `jax.random.key`
Params = Any
Obs = Any
Action = Array
EnvState = Any


class Mean(NamedTuple):
    """A mean over however many values there were, perhaps none. The host divides (`train.averaged`), so that a healthy
    compiled program makes no NaN and `jax_debug_nans` can be on."""

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
    """The caller asked for something that cannot be: one line that says the contract, the value and the remedy."""


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


Space = Discrete | Box
ObservationSpace = Any  # a Space; or, where observations are trees (dicts, tuples), a tree of them of the same shape


def space_leaves(space: ObservationSpace) -> list[Space]:
    """The spaces of an observation's leaves, in JAX's order."""
    return jax.tree.leaves(space, is_leaf=lambda x: isinstance(x, Discrete | Box))


class TimeStep(NamedTuple):
    """What one environment step brings. `obs` is the observation reached, never that of a reset."""

    obs: Obs
    reward: Array  # float32 scalar
    terminated: Array  # bool: the process ended here; nothing of value follows
    truncated: Array  # bool: the clock ended the episode; the state's value still counts


class Env(NamedTuple):
    """One environment as pure functions, without a batch axis: the caller vmaps.

    `step` never resets; `rollout` does, in one place. It takes an action of `action_space`, in that space's own units:
    whoever steps an environment puts a policy's action, which is canonical in [-1, 1] where a Box is bounded, through
    `contract.in_units`. States and observations keep one structure, with one shape and dtype of every leaf.
    """

    reset: Callable[[Key], tuple[EnvState, Obs]]
    step: Callable[[Key, EnvState, Action], tuple[EnvState, TimeStep]]
    observation_space: ObservationSpace
    action_space: Space
    max_episode_steps: int | None  # None: episodes have no time limit
    name: str = "custom"
    held_out: "Env | None" = None  # where policies are evaluated, if not here: resets that training never sees
    task: Any = None  # of an environment of tokens: its `envs.tasks.Task`
    describe: Callable[[Obs], dict[str, str]] | None = None  # a final observation in words, for people to read


class Transition(NamedTuple):
    """Experience; every leaf is `[T, N, ...]`. The same type feeds advantage estimators and replay."""

    obs: Obs
    action: Any  # as the policy's `log_prob` takes it (`distributions.Squashed`); in replay, as it was executed
    log_prob: Any  # [...] log pi(action | obs) under the policy that acted; None in replay, which does not ask for it
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Obs  # before any reset


class Network(Protocol):
    """Parameters and a function of them; any flax.linen module whose call returns (distribution, value) is one.

    `obs` may have any leading batch axes; `value` and the distribution's log-probabilities have exactly those.
    """

    def init(self, key: Key, obs: Obs, /) -> Params: ...
    def apply(self, params: Params, obs: Obs, /) -> Any: ...


class QNetwork(Protocol):
    """A policy and K critics; `params` is `{"policy": ..., "critic": ...}`, and each method reads its half alone."""

    def init(self, key: Key, obs: Obs, /) -> Params: ...
    def apply(self, params: Params, obs: Obs, /) -> tuple[Any, None]: ...
    def q(self, params: Params, obs: Obs, action: Action, /) -> Array: ...  # [K, ...], of executed actions
    def q_of_all(self, params: Params, obs: Obs, /) -> Array: ...  # [K, ..., A], of discrete actions


class State(NamedTuple):
    """An algorithm's whole state.

    learner: parameters, targets, optimiser state, normalisers, coefficients: what a diverged member is frozen at.
    world: environments and replay, which never pass through a select or a cond.
    guard: what `train.guard` knows of the member beside it; None for an algorithm without a guard.
    """

    learner: Any
    world: Any
    guard: Any = None


Act = Callable[[Key, Obs], Action]  # raw observations [N, ...] to actions [N, ...]


class Actor(NamedTuple):
    """A policy as rollouts drive it.

    noise: the random numbers of one step, `noise(key, obs)`; of `obs` only shapes are read.
    act: `act(noise, obs) -> (action [N, ...], log_prob [N])`; log_prob may be None where nothing asks for it.
    """

    noise: Callable[[Key, Obs], Any]
    act: Callable[[Any, Obs], tuple[Action, Any]]


class UpdateSteps(NamedTuple):
    """How many environment steps one update takes, at least and at most; equal where all updates have one length."""

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
    policy: `policy(state, deterministic) -> act`.
    update_steps: how many environment steps one update takes.
    """

    init: Callable[[Key], State]
    step: Step
    policy: Callable[[State, bool], Act]
    update_steps: UpdateSteps
