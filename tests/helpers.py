"""A toy environment in which everything is known beforehand, and what several test files need."""

import contextlib
import functools
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.config import ANNEAL_UPDATES, float_fields
from purepg.equations.distributions import Categorical, Deterministic, DiagGaussian, TanhGaussian
from purepg.experience import normalize
from purepg.experience.normalize import Moments
from purepg.run.cli import main
from purepg.run.population import Population
from purepg.run.sweep import Program
from purepg.runtime import users_environment
from purepg.types import Array, Box, Discrete, Env, LegalActions, MultiDiscrete, Space, TimeStep

NUM_IDS = 900
TERMINATED, TRUNCATED, BOTH = ENDINGS = range(3)

# What every config.json holds beside the arguments.
EMPTY_CONFIG = {"code": {}, "settings": [], "num_updates": [], "layout": [], "schedules": [], "versions": {}}


class ToyState(NamedTuple):
    id: Array  # drawn at the reset; fixes the episode's length and how it ends
    t: Array


def episode_length(id: Any) -> Any:
    """2, 3 or 4 steps; for ints and arrays alike."""
    return 2 + id % 3


def terminates(id: Any) -> Any:
    return id // 3 % 3 != 1


def truncates(id: Any) -> Any:
    """Two episodes in three; half of those have both flags at their end."""
    return id // 3 % 3 != 0


def _toy(observe: Callable, reward: Callable, observation_space: Any, action_space: Space, ending: Any) -> Env:
    def reset(key):
        # A key's own bits are random enough, and cost nothing to compile.
        state = ToyState((jax.random.key_data(key)[-1] % NUM_IDS).astype(jnp.int32), jnp.int32(0))
        return state, observe(state)

    def step(key, state, action):
        del key
        now = ToyState(state.id, state.t + 1)
        ended = now.t == episode_length(state.id)
        terminated = ended & (terminates(state.id) if ending is None else ending != TRUNCATED)
        truncated = ended & (truncates(state.id) if ending is None else ending != TERMINATED)
        # Nothing may look at what a step past the end brings: no number, first no flag, and then both.
        paid = jnp.where(now.t > episode_length(state.id), jnp.nan, reward(state, action))
        late = now.t > episode_length(state.id) + 1
        return now, TimeStep(observe(now), paid, terminated | late, truncated | late)

    return Env(reset, step, observation_space, action_space, 4, "toy")


def _box(size: int, bound: float) -> Box:
    return Box(np.full(size, -bound, np.float32), np.full(size, bound, np.float32))


def diary_env() -> Env:
    """Observes (episode's id, t) as integers, and pays id + t + action / 2: a trajectory tells its own story."""

    def observe(state):
        return jnp.stack([state.id, state.t])

    def reward(state, action):
        return state.id + state.t + 0.5 * action

    return _toy(observe, reward, _box(2, NUM_IDS), Discrete(2), None)


def arms_env(action_space: Space | None = None, ending: Any = None) -> Env:
    """A bandit with two arms, action 1 (or a positive number) and the rest, that pays 1 and 0, in episodes of several
    steps whose observations say nothing of it and are far from mean 0 and variance 1.

    Args:
      ending: one of ENDINGS, maybe a tracer, for every episode; None: an episode's own.
    """

    def observe(state):
        return 5.0 + 3.0 * jnp.stack([jnp.sin(state.id.astype(jnp.float32)), jnp.cos(1.0 * state.id + state.t)])

    def reward(state, action):
        return (action.reshape(()) > 0).astype(jnp.float32)

    return _toy(observe, reward, _box(2, 8.0), action_space or Discrete(2), ending)


PAIRS = np.array(list(itertools.combinations(range(4), 2)))  # of arms, each legal at some time


def pair_env(masked: bool) -> Env:
    """Four arms, of which two are legal, by the episode and its time, and none in a terminal state. Arm a pays 1 + a,
    and an illegal one NaN.

    Args:
      masked: the action is the arm, and `legal` a mask of them; otherwise it is the number of the legal arm, 0 or 1,
        and `legal` a bool vector like any other.
    """

    def pair(state):
        return jnp.asarray(PAIRS)[(state.id + state.t) % len(PAIRS)]

    def observe(state):
        late = (state.t >= episode_length(state.id)) & terminates(state.id)
        legal = (pair(state)[:, None] == jnp.arange(4)).any(0)
        return {"legal": legal & ~late if masked else legal, "x": jnp.stack([jnp.sin(1.0 * state.id), 1.0 * state.t])}

    def reward(state, action):
        legal = jnp.any(pair(state) == action) if masked else True
        return jnp.where(legal, 1.0 + (action if masked else pair(state)[action]), jnp.nan)

    legal = LegalActions(4) if masked else Box(np.zeros(4, bool), np.ones(4, bool), bool)
    return _toy(observe, reward, {"legal": legal, "x": _box(2, 4.0)}, Discrete(4 if masked else 2), None)


def choices_env(product: bool) -> Env:
    """Two choices a and b, of two and of three, that pay a + b / 2; with `product`, one choice 3 a + b of six."""

    def observe(state):
        return jnp.stack([jnp.sin(1.0 * state.id), 1.0 * state.t])

    def reward(state, action):
        a, b = jnp.divmod(action, 3) if product else action
        return a + 0.5 * b

    return _toy(observe, reward, _box(2, 4.0), Discrete(6) if product else MultiDiscrete((2, 3)), None)


class TinyNetwork(NamedTuple):
    """A network by hand, with one hidden layer of 8: anything with `init` and `apply` will do."""

    action_space: Space
    on_apply: Callable[[], None] = lambda: None

    def init(self, key, obs):
        num_out = self.action_space.n if isinstance(self.action_space, Discrete) else 1
        weight = jax.random.normal(key, (8, obs.shape[-1] + num_out + 1))  # one draw compiles faster than three
        return {
            "hidden": 0.1 * weight[:, num_out + 1 :].T,
            "bias": jnp.zeros(8),
            "policy": 0.3 * weight[:, 1 : num_out + 1],
            "shift": jnp.zeros(num_out),
            "value": weight[:, 0],
            "log_std": jnp.zeros(num_out),
        }

    def apply(self, params, obs):
        self.on_apply()
        x = jnp.tanh(obs.astype(jnp.float32) @ params["hidden"] + params["bias"])
        y = x @ params["policy"] + params["shift"]
        if isinstance(self.action_space, Discrete):
            return Categorical(y), x @ params["value"]
        return DiagGaussian(y, jnp.broadcast_to(params["log_std"], y.shape)), x @ params["value"]


class SeparateNetwork(NamedTuple):
    """Two TinyNetworks, one for the policy and one for the critic, as a trust region wants it: they share nothing."""

    action_space: Space
    on_apply: Callable[[], None] = lambda: None

    def init(self, key, obs):
        tiny, (k_policy, k_critic) = TinyNetwork(self.action_space), jax.random.split(key)
        return tiny.init(k_policy, obs) | {"critic": tiny.init(k_critic, obs)}

    def apply(self, params, obs):
        tiny = TinyNetwork(self.action_space, self.on_apply)
        return tiny.apply(params, obs)[0], tiny.apply(params["critic"], obs)[1]


class TinyQNetwork(NamedTuple):
    """A policy and K critics of two arms or of one number, by hand, with one hidden layer of 8 each."""

    kind: Literal["categorical", "gaussian", "tanh_gaussian", "deterministic"]
    num_critics: int = 2
    on_apply: Callable[[], None] = lambda: None

    @property
    def num_outputs(self) -> int:
        return 2 if self.kind == "categorical" else 1

    def init(self, key, obs):
        K, A, D = self.num_critics, self.num_outputs, obs.shape[-1]
        weight = jax.random.normal(key, (1 + K, 8, D + A + 1))  # one draw compiles faster than seven
        hidden = 0.1 * jnp.swapaxes(weight[..., :D], 1, 2)
        policy = {
            "hidden": hidden[0],
            "mean": 0.3 * weight[0, :, D : D + A],
            "shift": jnp.zeros(A),
            "log_std": 0.1 * weight[0, :, D + A :],
        }
        critic = {"hidden": hidden[1:], "q": 0.5 * weight[1:, :, -A:], "shift": jnp.zeros((K, A))}
        if self.kind != "categorical":
            critic["action"] = weight[1:, :, D]
        return {"policy": policy, "critic": critic}

    def apply(self, params, obs):
        self.on_apply()
        policy = params["policy"]
        x = jnp.tanh(obs.astype(jnp.float32) @ policy["hidden"])
        y, log_std = x @ policy["mean"] + policy["shift"], x @ policy["log_std"]
        by_kind = {
            "categorical": lambda: Categorical(y),
            "gaussian": lambda: DiagGaussian(y, log_std),
            "tanh_gaussian": lambda: TanhGaussian(y, log_std),
            "deterministic": lambda: Deterministic(jnp.tanh(y)),
        }
        return by_kind[self.kind](), None

    def q(self, params, obs, action):
        if self.kind == "categorical":
            of_all = self.q_of_all(params, obs)
            return jnp.take_along_axis(of_all, jnp.broadcast_to(action[..., None], (*of_all.shape[:-1], 1)), -1)[..., 0]
        critic = params["critic"]
        x = jnp.einsum("...d,kdh->k...h", obs, critic["hidden"]) + jnp.einsum(
            "...a,kh->k...h", action, critic["action"]
        )
        return self._q(critic, x)[..., 0]

    def q_of_all(self, params, obs):
        return self._q(params["critic"], jnp.einsum("...d,kdh->k...h", obs, params["critic"]["hidden"]))

    def _q(self, critic, x):
        q = jnp.einsum("k...h,kha->ka...", jnp.tanh(x), critic["q"])
        q += critic["shift"].reshape(*q.shape[:2], *[1] * (q.ndim - 2))
        return jnp.moveaxis(q, 1, -1)


def moments_of(mean: Any, variance: Any, num_samples: Any) -> Moments:
    """Running moments as if so many samples had given them."""
    return normalize.init(mean)._replace(mean=mean, variance=variance, num_samples=jnp.float32(num_samples))


def settings(config: Any, num_settings: int) -> dict[str, Array]:
    """Every float of a config swept at once: setting h has 0.8^h of each."""
    return {
        name: getattr(config, name) * 0.8 ** jnp.arange(num_settings, dtype=jnp.float32)
        for name in float_fields(config)
    }


@functools.cache
def quick_options() -> dict[str, Any]:
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:  # a jaxlib without one of them
        return {}
    return options


def quick_jit(function: Callable, **kwargs: Any) -> Callable:
    """jax.jit with few optimisations: these tests compile much and run little. It takes a quarter of the time."""
    return jax.jit(function, compiler_options=quick_options(), **kwargs)


def static_fields(program: Program, name: str) -> dict[str, Any]:
    """The fields of a config that its trace reads: not those that are arrays, nor a schedule's length where there is
    none."""
    fields = vars(program.configs[name])
    annealed = any(fields[x] for x in fields if x.startswith("anneal_") and x != ANNEAL_UPDATES)
    unread = {*program.hyper[name], *([] if annealed else [ANNEAL_UPDATES])}
    return {field: value for field, value in fields.items() if field not in unread}


@contextlib.contextmanager
def shared_programs() -> Iterator[dict[str, Any]]:
    """Within it, runs that differ in nothing that a trace reads share their compiled programs, as the blocks of one run
    do: to trace and compile takes longer than such small runs. What it gives, emptied, forgets the programs.
    """
    made: dict[str, Any] = {}
    init = Population.__init__

    def init_shared(self, plan, program, shape):
        init(self, plan, program, shape)
        run = plan.run
        read = (
            *(plan.code, plan.env.name, run.env_params, plan.start_digest, plan.eval_max_steps, plan.num_devices),
            *(run.seed, run.eval_seed, run.eval_episodes),
            program.update_steps.vary and run.total_steps,  # the budget of agents that count their steps
            *({name: static_fields(program, name) for name in program.configs}, shape, plan.tuning, plan.schedule),
        )
        own = (self._init, self._advance, self._final, self._programs)
        self._init, self._advance, self._final, self._programs = made.setdefault(repr(read), own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Population, "__init__", init_shared)
        yield made


def equations(function: Callable, *args: Any) -> list[Any]:
    """Every primitive operation of a function, those inside its loops and branches among them."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


def loops_are_unbatched(function: Callable, *args: Any) -> bool:
    """Whether every while_loop of a vmapped function still counts its trips in a scalar, for all lanes together."""
    loops = [equation for equation in equations(function, *args) if equation.primitive.name == "while"]
    carries = [[x.aval for x in loop.outvars] for loop in loops]
    return bool(carries) and all(any(x.shape == () and x.dtype == jnp.int32 for x in carry) for carry in carries)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """The metrics in a log.jsonl, each `[H, S, U]` float64, NaN where the log has null or nothing. A last line that was
    cut short is ignored."""
    blocks = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    arrays = [{name: np.array(value, np.float64) for name, value in block["metrics"].items()} for block in blocks]
    metrics: dict[str, np.ndarray] = {}
    for block, values in zip(blocks, arrays, strict=True):
        for name, value in values.items():
            H, S = (1 + max(max(other[axis]) for other in blocks) for axis in ("settings", "seeds"))
            U = max(other["start"] + x[name].shape[2] for other, x in zip(blocks, arrays, strict=True))
            whole = metrics.setdefault(name, np.full((H, S, U), np.nan))
            place = np.ix_(block["settings"], block["seeds"])
            whole[(*place, slice(block["start"], block["start"] + value.shape[2]))] = value
    return metrics


def exit_code(*experiment: Any, arguments: Sequence[str]) -> int:
    """Runs a script's main with arguments; its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(*experiment, arguments=arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def found_by(file: str, folder: Path) -> Any:
    """What a test file finds that runs as a script, with devices of its own, and pickles into the folder's `found`."""
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NPROC": "8"}
    subprocess.run([sys.executable, file, folder], env=users_environment() | own, check=True, timeout=300)
    return pickle.loads((folder / "found").read_bytes())
