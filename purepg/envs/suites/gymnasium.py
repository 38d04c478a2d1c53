"""An adapter from Gymnasium 1.1 to 1.3 (Towers et al. 2024, gymnasium.farama.org), whose environments are not JAX: any
that is registered, as `gym/CartPole-v1`, `gym/HalfCheetah-v5` or `gym/my_module:MyEnv-v0`; and, in Python, your own.

`gym/ALE/...` are the Atari games, preprocessed as Machado et al. (2018) recommend, by Gymnasium's own wrappers: up to
30 random no-ops after a reset, each action held for 4 frames, of which the last two are joined by their maximum, in
grey, 84 x 84, the last 4 of them stacked as channels, uint8 `[84, 84, 4]`; a life lost is no end of an episode, and
rewards are not clipped. `ALE/...-v5` repeats the last action with probability 0.25, as they recommend too.

Gymnasium's vector environments start a new episode by themselves, in one of two ways, and both work here. In same-step
mode, which ours use, the step that ends an episode already returns the next one's first observation, and the last one
is in `info`. In next-step mode, the step after the end ignores its action and only resets; it is not a transition.

A run is slower than in JAX: experiments/suites.md has figures.
"""

import copy
import functools
import inspect
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from purepg.envs.outside import HostStep, outside_env
from purepg.envs.suites.adapter import require
from purepg.envs.suites.gymnasium_spaces import as_actions, as_observations, take_row
from purepg.envs.suites.physics import choose_renderer
from purepg.envs.wrappers import positive_count
from purepg.types import Env, Obs, UsageError

ATARI = "ALE/"
STACKED_FRAMES = 4
WRAPPED = ("noop_max", "frame_skip", "screen_size", "terminal_on_life_loss")  # parameters of `AtariPreprocessing`


def gym_named(name: str, params: Mapping[str, Any]) -> Env:
    """`gym_env` of what the command line says. Raises UsageError as it does."""
    return gym_env(name, **params)


def gym_env(
    source: str | Callable[..., Any],
    name: str | None = None,
    *,
    asynchronous: bool = False,
    max_episode_steps: int | None = None,
    **params: Any,
) -> Env:
    """An environment of Gymnasium. It trains, more slowly than one in JAX, by all algorithms that learn from rollouts
    or replay, and is evaluated at the end. Films are made of it where its render mode is rgb_array, which a registered
    one that has it gets.

    Args:
      source: a registered id; a function without required arguments that makes a `gymnasium.Env`; or one from the
        number of environments to a `gymnasium.vector.VectorEnv`, in same-step or next-step autoreset mode.
      name: the environment's name in titles. None: that of the source.
      asynchronous: step each environment in a process of its own. This pays if a step takes milliseconds. A script must
        then start its work under `if __name__ == "__main__"`.
      max_episode_steps: truncate episodes after so many steps. None: at the id's time limit, if it has one. A function
        that makes vector environments applies its own limit, which this only declares.
      params: arguments of `gymnasium.make`, or of the function. Those of Gymnasium's `AtariPreprocessing`, such as
        `frame_skip` and `terminal_on_life_loss`, go there.
    Raises:
      UsageError: a package is missing, the id is unknown, the environment cannot be made, or a space is none of Box,
        Discrete and MultiDiscrete (and, of observations, Dict and Tuple of them).
    """
    require("gym", "gymnasium")
    _refuse_old_gymnasium()
    if not isinstance(asynchronous, bool):
        raise UsageError(f"asynchronous ({asynchronous}) must be true or false")
    title = name or (f"gym/{source}" if isinstance(source, str) else getattr(source, "__name__", "gym"))
    limit = None if max_episode_steps is None else positive_count("max_episode_steps", max_episode_steps)
    single, vector = _makers(source, limit, params)
    first = _guarded(title, "cannot be made", single or (lambda: vector(1)))
    if isinstance(source, str) and _can_be_drawn(first):
        single, vector = _makers(source, limit, {"render_mode": "rgb_array", **params})
    observed = first.observation_space if single else first.single_observation_space
    actions = first.action_space if single else first.single_action_space
    observation_space, read = as_observations(title, observed)
    action_space, write = as_actions(title, actions)
    limit = limit or (_time_limit(first) if single else None)
    first.close()

    def make(num_envs: int) -> "_GymEnvs":
        of_n = vector or functools.partial(_vectorised, single, asynchronous)
        return _GymEnvs(title, _guarded(title, "cannot be made", of_n, num_envs), num_envs, read, write)

    return outside_env(title, make, observation_space, action_space, limit, _GymEnvs.picture)


def _can_be_drawn(env: Any) -> bool:
    """Whether a registered environment can be made with the render mode rgb_array."""
    from gymnasium.envs.registration import load_env_creator

    creator = env.spec.entry_point
    creator = load_env_creator(creator) if isinstance(creator, str) else creator
    arguments = inspect.signature(creator).parameters.values()
    takes_it = any(x.name == "render_mode" or x.kind is inspect.Parameter.VAR_KEYWORD for x in arguments)
    return takes_it and "rgb_array" in (env.metadata.get("render_modes") or ())


def _refuse_old_gymnasium() -> None:
    import gymnasium

    if not hasattr(gymnasium.vector, "AutoresetMode"):
        raise UsageError(f'gymnasium {gymnasium.__version__} must be at least 1.1: pip install -e ".[gym]"')


def _makers(source: Any, limit: int | None, params: Mapping[str, Any]) -> tuple[Any, Any]:
    """(function that makes one environment, None), or (None, function that makes a vector environment of n)."""
    import gymnasium

    if isinstance(source, str):
        if source.startswith(ATARI):
            require("gym", "ale_py", "cv2")
        return functools.partial(_registered, source, limit, dict(params)), None
    if not callable(source):
        raise UsageError(f"gym_env takes an id or a function that makes an environment, not a {type(source).__name__}")
    source = functools.partial(source, **params) if params else source
    kinds = inspect.Parameter
    required = [
        argument
        for argument in inspect.signature(source).parameters.values()
        if argument.default is kinds.empty and argument.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    if required:
        return None, source
    made = _guarded(getattr(source, "__name__", "gym"), "cannot be made", source)
    made.close()
    if isinstance(made, gymnasium.vector.VectorEnv):
        return None, source
    return functools.partial(_limited, source, limit), None


def _registered(id: str, limit: int | None, params: dict[str, Any]) -> Any:
    """One environment of a registered id."""
    _leave_interrupts_to_the_main_process()
    import gymnasium

    more = {} if limit is None else {"max_episode_steps": limit}
    if not id.startswith(ATARI):
        return gymnasium.make(id, **{"disable_env_checker": True, **params, **more})
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformObservation

    ale_py = require("gym", "ale_py", "cv2")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)
    own = {key: value for key, value in params.items() if key not in WRAPPED}
    env = gymnasium.make(id, **{"frameskip": 1, "disable_env_checker": True, **own})
    env = AtariPreprocessing(env, **{key: value for key, value in params.items() if key in WRAPPED})
    env = FrameStackObservation(env, STACKED_FRAMES)
    frames: Any = env.observation_space
    low, high = (np.moveaxis(bound, 0, -1) for bound in (frames.low, frames.high))
    last = gymnasium.spaces.Box(low, high, dtype=frames.dtype.type)
    env = TransformObservation(env, functools.partial(np.moveaxis, source=0, destination=-1), last)
    return env if limit is None else gymnasium.wrappers.TimeLimit(env, limit)


def _limited(make: Callable[[], Any], limit: int | None) -> Any:
    """One environment of a user's function."""
    _leave_interrupts_to_the_main_process()
    import gymnasium

    return make() if limit is None else gymnasium.wrappers.TimeLimit(make(), limit)


def _leave_interrupts_to_the_main_process() -> None:
    """In a process of `AsyncVectorEnv`, Ctrl-C must not end the environment before the main process has finished."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _time_limit(env: Any) -> int | None:
    """An environment's own time limit in steps. An Atari emulator's is in frames, several of which make a step."""
    if env.spec is None:
        return None
    frames = env.spec.kwargs.get("max_num_frames_per_episode")
    if env.spec.max_episode_steps is None and frames and env.has_wrapper_attr("frame_skip"):
        return -(-frames // env.get_wrapper_attr("frame_skip"))
    return env.spec.max_episode_steps


def _vectorised(make: Callable[[], Any], asynchronous: bool, num_envs: int) -> Any:
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    makers = [functools.partial(_with_own_observations, make)] * num_envs
    if not asynchronous:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    # JAX's threads must not be forked: a server process that has none of them forks the workers.
    return AsyncVectorEnv(makers, context="forkserver", autoreset_mode=AutoresetMode.SAME_STEP)


def _with_own_observations(make: Callable[[], Any]) -> Any:
    """One environment whose observations are new arrays. A vector environment keeps the last of an episode over the
    reset, which would overwrite it where an environment returns the same array at every step."""
    from gymnasium.wrappers import TransformObservation

    env = make()
    return TransformObservation(env, copy.deepcopy, env.observation_space)


def _guarded(name: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls code that is not ours. Its error becomes one line that names the environment."""
    try:
        return function(*arguments)
    except UsageError:
        raise
    except Exception as error:  # a user's environment may raise anything
        said = " ".join(str(error).split())
        frames = traceback.extract_tb(error.__traceback__)  # ours is the first
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
        raise UsageError(f"{name} {what}: {type(error).__name__}: {said}{place}") from error


class _GymEnvs:
    """`HostEnvs` of a vector environment."""

    def __init__(self, name: str, envs: Any, num_envs: int, read: Callable, write: Callable):
        from gymnasium.vector import AutoresetMode

        self._name, self._envs, self._read, self._write = name, envs, read, write
        mode = envs.metadata.get("autoreset_mode")
        known = (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
        if mode not in (*known, *(x.value for x in known)):
            raise UsageError(
                f"{name}: its metadata say autoreset_mode {mode}, but must say AutoresetMode.SAME_STEP or NEXT_STEP"
            )
        if envs.num_envs != num_envs:
            raise UsageError(f"{name}: asked for {num_envs} environments, its function made {envs.num_envs}")
        self._same_step = mode in (AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value)
        self._resets_next = np.zeros(num_envs, bool)  # in next-step mode

    def reset(self, seeds: Sequence[int]) -> Obs:
        from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

        # A vector environment of another kind may take one seed only, from which it derives its own.
        each = isinstance(self._envs.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        seed = list(map(int, seeds)) if each else int(seeds[0])
        obs, _ = _guarded(self._name, "failed in reset", lambda: self._envs.reset(seed=seed))
        self._resets_next = np.zeros_like(self._resets_next)
        return self._read(obs)

    def step(self, action: np.ndarray) -> HostStep:
        found = _guarded(self._name, "failed in step", self._envs.step, self._write(action))
        obs, reward, terminated, truncated, info = found
        obs = next_obs = self._read(obs)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        ended, taken = terminated | truncated, ~self._resets_next
        if self._same_step:
            next_obs = self._with_final(obs, info, np.flatnonzero(ended)) if ended.any() else obs
        else:
            self._resets_next = ended & taken
        return HostStep(obs, np.array(reward, np.float32), terminated, truncated, next_obs, taken)

    def picture(self) -> np.ndarray:
        """The first environment's. Raises UsageError where its render mode is another than rgb_array, or it fails."""
        choose_renderer()
        for driver in ("SDL_AUDIODRIVER", "SDL_VIDEODRIVER"):  # of pygame, which needs neither a display nor sound
            os.environ.setdefault(driver, "dummy")
        if (mode := self._envs.render_mode) != "rgb_array":
            raise UsageError(f"{self._name} cannot be drawn: its render_mode ({mode}) must be rgb_array")
        return np.asarray(_guarded(self._name, "cannot be drawn", self._envs.render)[0], np.uint8)

    def close(self) -> None:
        self._envs.close()

    def _with_final(self, obs: Obs, info: Mapping[str, Any], ended: np.ndarray) -> Obs:
        """The observations, with those of ended episodes replaced by their last."""
        if "final_obs" not in info:
            raise UsageError(f"{self._name}: its autoreset mode is same-step, but info lacks final_obs at a step's end")
        next_obs = jax.tree.map(np.copy, obs)
        for i in ended:
            final = jax.tree.leaves(self._read(take_row(info["final_obs"], i), batched=False))
            for leaf, last in zip(jax.tree.leaves(next_obs), final, strict=True):
                leaf[i] = last
        return next_obs
