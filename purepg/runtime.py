"""The one thing purepg does to the process it is imported into: keep XLA's CPU runtime from deadlocking.

jaxlib 0.10.2's concurrency-optimised scheduler can leave every thread of a small worker pool waiting for another
(seen on two cores with a few vmapped seeds: the process sleeps for ever). The older scheduler does not.
"""

import importlib.metadata
import os
import warnings

import jax

# An unknown XLA flag aborts the process, so the flag is set only where it was tried.
AFFECTED_JAXLIB = ("0.10.2",)
SCHEDULER_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"


def make_cpu_safe() -> None:
    """Adds the cure to `XLA_FLAGS`, unless the user's own `XLA_FLAGS` names the flag or `NPROC` is set.

    Warns where a JAX backend already runs, for then it comes too late. Creates no backend and no device.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib") not in AFFECTED_JAXLIB or SCHEDULER_FLAG in flags or "NPROC" in os.environ:
        return
    if backend_is_running():
        if jax.default_backend() == "cpu":
            warnings.warn(
                "purepg was imported after JAX had started: its CPU runtime can deadlock on few cores. Import purepg "
                f"before the first JAX computation, or set XLA_FLAGS=--{SCHEDULER_FLAG}=false",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    os.environ["XLA_FLAGS"] = f"{flags} --{SCHEDULER_FLAG}=false".strip()


def backend_is_running() -> bool:
    """Whether this process has started a JAX backend, after which flags and device counts are fixed."""
    from jax._src import xla_bridge  # no public way to ask without starting one

    return xla_bridge.backends_are_initialized()
