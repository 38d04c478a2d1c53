"""Keeps XLA's CPU runtime from deadlocking. This is purepg's only effect on the process that imports it.

jaxlib 0.10.2's concurrency-optimised scheduler can leave all threads of a small worker pool waiting for each other (on
two cores with a few vmapped seeds, the process sleeps for ever). The older scheduler does not.
"""

import contextlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator

import jax

# An unknown XLA flag aborts the process, so the flag is set only for versions on which it was tested.
AFFECTED_JAXLIB = ("0.10.2",)
SCHEDULER_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"
LEVEL_FLAG = "xla_backend_optimization_level"

_target: str | None = None  # the platform that programs are compiled for, where it is not the default one
_flags_before: str | None = None  # the user's XLA_FLAGS before our flag was added


def make_cpu_safe() -> None:
    """Selects the older scheduler through `XLA_FLAGS`, unless the user's `XLA_FLAGS` name the flag or `NPROC` is set.

    Warns if a JAX backend already runs, because the flag then has no effect. Creates no backend and no device.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib") not in AFFECTED_JAXLIB or SCHEDULER_FLAG in flags or "NPROC" in os.environ:
        return
    if backend_is_running():
        if jax.default_backend() == "cpu":
            risk = "purepg was imported after JAX had started: its CPU runtime can deadlock on few cores."
            remedy = f"Import purepg before the first JAX computation, or set XLA_FLAGS=--{SCHEDULER_FLAG}=false"
            warnings.warn(f"{risk} {remedy}", RuntimeWarning, stacklevel=3)
        return
    global _flags_before
    _flags_before = flags
    os.environ["XLA_FLAGS"] = f"{flags} --{SCHEDULER_FLAG}=false".strip()


def split_cpu(num_devices: int, num_threads: int) -> None:
    """Makes the CPU appear as several devices when the backend starts.

    With two devices, the older scheduler is not enough: runs hung with it, and hung without it at one worker thread per
    device. A larger worker pool (`NPROC`) works, so the flag is removed again unless the user set it. How large it must
    be depends on the program: twice the cores for most, more where many operations can run at once, as in Craftax and
    in physics. A pool larger than needed costs speed: eight threads a core instead of two cost PPO on CartPole a third.
    """
    if "NPROC" not in os.environ:
        os.environ["NPROC"] = str(num_threads)
        if _flags_before is not None:
            os.environ["XLA_FLAGS"] = _flags_before
    jax.config.update("jax_num_cpu_devices", num_devices)


def users_environment() -> dict[str, str]:
    """Returns the environment without our flag, for a subprocess that makes its own choice."""
    environment = dict(os.environ)
    if _flags_before is not None:
        environment["XLA_FLAGS"] = _flags_before
    return environment


def compile_options() -> dict[str, str | bool] | None:
    """XLA's options for whole programs. On a CPU, level 2 of LLVM's optimisations instead of 3 takes a third off the
    time to compile PPO, which then trains as fast; a level in the user's `XLA_FLAGS` is kept."""
    if jax.default_backend() != "cpu" or LEVEL_FLAG in os.environ.get("XLA_FLAGS", ""):
        return None
    return {LEVEL_FLAG: "2"}


def compiles_for_gpu() -> bool:
    """Whether what is traced now will run on a GPU."""
    return (_target or jax.default_backend()) == "gpu"


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, programs are traced as for `platform` ("cpu", "gpu"), whatever this machine has."""
    global _target
    before, _target = _target, platform
    try:
        yield
    finally:
        _target = before


def backend_is_running() -> bool:
    """Whether this process has started a JAX backend, after which flags and device counts are fixed."""
    from jax._src import xla_bridge  # the public functions would start a backend

    return xla_bridge.backends_are_initialized()
