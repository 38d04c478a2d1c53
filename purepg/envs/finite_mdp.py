"""Finite Markov decision processes: environments in which values and gradients can be computed exactly (`purepg.lab`).

A `FiniteMDP` is data; `mdp_env` turns it into an `Env` that observes the state's index or its alias; `unroll` makes the
time part of the state. `named_mdps` has examples, `named_pomdps` some that need memory.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import Array, Discrete, Env, TimeStep, UsageError


@dataclass(frozen=True, eq=False)
class FiniteMDP:
    """A process with S states and A actions. All arrays are converted to float64.

    Attributes:
      transition: `[S, A, S]`, P(s' | s, a).
      reward: `[S, A]`, the reward of action a in state s.
      start: `[S]`, distribution of an episode's first state.
      gamma: the objective's discount per step, in [0, 1].
      terminal: `[S]` bool, states in which an episode ends. Their rows of `transition` and `reward` are ignored: the
        states are made absorbing with reward 0. By default there are none.
      horizon: an episode ends after at most this many steps; None: there is no limit.
      horizon_terminates: True makes the horizon part of the process, so that nothing of value follows it. False makes
        it a time limit on the experience only: values and objective are those of the process without it.
      alias: `[S]` int, what a policy observes of each state: `networks.tabular.tabular_policy` has one row of logits
        per value. By default a policy can tell all states apart.
      name: used in error messages.
    Raises:
      UsageError: the shapes do not fit, a distribution does not sum to one, an episode can start in a terminal state,
        or gamma is 1 although an episode may last for ever.
    """

    transition: np.ndarray
    reward: np.ndarray
    start: np.ndarray
    gamma: float
    terminal: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    horizon: int | None = None
    horizon_terminates: bool = False
    alias: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    name: str = "finite MDP"

    def __post_init__(self):
        transition, reward = np.array(self.transition, np.float64), np.array(self.reward, np.float64)
        start = np.array(self.start, np.float64)
        if transition.ndim != 3 or transition.shape[0] != transition.shape[2] or not transition.size:
            raise UsageError(f"{self.name}: transition has shape {transition.shape}, but must have [S, A, S]")
        S, A, _ = transition.shape
        terminal = np.array(self.terminal, bool) if len(self.terminal) else np.zeros(S, bool)
        alias = np.array(self.alias, np.int64) if len(self.alias) else np.arange(S)
        expected = {"reward": (S, A), "start": (S,), "terminal": (S,), "alias": (S,)}
        given = {"reward": reward, "start": start, "terminal": terminal, "alias": alias}
        for name, shape in expected.items():
            if given[name].shape != shape:
                raise UsageError(f"{self.name}: {name} has shape {given[name].shape}, but must have {shape}")
        transition[terminal] = np.eye(S)[terminal][:, None]
        reward[terminal] = 0.0
        for name, x in {"transition": transition, "start": start}.items():
            if not (np.all(x >= 0) and np.all(np.abs(x.sum(-1) - 1) <= 1e-9)):
                raise UsageError(f"{self.name}: {name} must hold distributions: not negative, with sum 1")
        if not np.all(np.isfinite(reward)):
            raise UsageError(f"{self.name}: reward must be finite")
        if np.any(start[terminal] > 0):
            raise UsageError(f"{self.name}: an episode cannot start in a terminal state")
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"{self.name}: gamma ({self.gamma}) must be in [0, 1]")
        if self.horizon is not None and (self.horizon < 1 or self.horizon != int(self.horizon)):
            raise UsageError(f"{self.name}: horizon ({self.horizon}) must be an integer, at least 1")
        if self.horizon is None and self.horizon_terminates:
            raise UsageError(f"{self.name}: horizon_terminates (True) needs a horizon")
        if np.any(alias < 0) or np.any(alias != self.alias if len(self.alias) else False):
            raise UsageError(f"{self.name}: alias must hold integers, at least 0")
        if self.gamma == 1 and not self.horizon_terminates and not np.all(_reaches(transition, terminal)):
            needs = "a terminal state reachable from every state, or a horizon that terminates"
            raise UsageError(f"{self.name}: gamma (1) needs {needs}")
        for name, x in {"transition": transition, **given}.items():
            object.__setattr__(self, name, x)

    @property
    def num_states(self) -> int:
        return self.reward.shape[0]

    @property
    def num_actions(self) -> int:
        return self.reward.shape[1]


def _reaches(transition: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    """`[S]` bool: whether a terminal state can be reached."""
    edge = transition.sum(axis=1) > 0
    reaches = terminal
    for _ in range(len(terminal)):
        reaches = reaches | (edge & reaches).any(axis=1)
    return reaches


class MDPState(NamedTuple):
    state: Array  # int32
    t: Array  # int32, steps since the reset


def mdp_env(mdp: FiniteMDP, observe_alias: bool = False) -> Env:
    """The process as an environment. It observes the true state's index, and a tabular policy applies `alias`; with
    `observe_alias` it observes that of the state, and no network can tell more."""
    start, transition = _cumulative(mdp.start), _cumulative(mdp.transition)
    reward, terminal = np.asarray(mdp.reward, np.float32), mdp.terminal
    num_observations = int(mdp.alias.max()) + 1 if observe_alias else mdp.num_states

    def observe(s):
        return jnp.asarray(mdp.alias, jnp.int32)[s] if observe_alias else s

    def reset(key):
        state = MDPState(_draw(key, jnp.asarray(start)), jnp.int32(0))
        return state, observe(state.state)

    def step(key, state, action):
        s, t = state
        next_s = _draw(key, jnp.asarray(transition)[s, action])
        at_horizon = jnp.bool_(False) if mdp.horizon is None else t + 1 >= mdp.horizon
        terminated = jnp.asarray(terminal)[next_s]
        if mdp.horizon_terminates:
            terminated, at_horizon = terminated | at_horizon, jnp.bool_(False)
        time_step = TimeStep(observe(next_s), jnp.asarray(reward)[s, action], terminated, at_horizon)
        return MDPState(next_s, t + 1), time_step

    spaces = Discrete(num_observations), Discrete(mdp.num_actions)
    return Env(reset, step, *spaces, mdp.horizon, mdp.name)


def _cumulative(probability: np.ndarray) -> np.ndarray:
    """Cumulative sums in float32, above 1 from the last possible outcome on: rounding selects no impossible one."""
    later = np.cumsum(probability[..., ::-1], axis=-1)[..., ::-1] - probability
    return np.where(later <= 0, 2.0, np.cumsum(probability, axis=-1)).astype(np.float32)


def _draw(key: Array, cumulative: Array) -> Array:
    return jnp.argmax(cumulative > jax.random.uniform(key), axis=-1).astype(jnp.int32)


def unroll(mdp: FiniteMDP) -> FiniteMDP:
    """Makes the time part of the state: state (t, s) has index t * S + s, and one terminal state follows them all.

    Where a horizon terminates, values depend on the number of steps left. In the unrolled process they are functions of
    the state alone, and no horizon is needed. `alias` hides the time from policies, which keep the original parameters.
    Raises UsageError if no horizon terminates the process.
    """
    if mdp.horizon is None or not mdp.horizon_terminates:
        raise UsageError(f"{mdp.name}: unroll needs a horizon that terminates")
    H, S, A = mdp.horizon, mdp.num_states, mdp.num_actions
    end = H * S
    index = np.arange(end).reshape(H, S)
    transition = np.zeros((end + 1, A, end + 1))
    for t in range(H):
        onward = np.where(mdp.terminal, end, index[t + 1] if t + 1 < H else end)
        for s_next in range(S):
            transition[index[t], :, onward[s_next]] += mdp.transition[:, :, s_next]
    terminal = np.append(np.tile(mdp.terminal, H), True)
    return FiniteMDP(
        transition,
        np.append(np.tile(mdp.reward, (H, 1)), np.zeros((1, A)), axis=0),
        np.append(mdp.start, np.zeros(end + 1 - S)),
        mdp.gamma,
        terminal,
        alias=np.append(np.tile(mdp.alias, H), 0),
        name=f"{mdp.name}, unrolled",
    )
