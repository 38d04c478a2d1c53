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

_flags_before: str | None = None  # the user's XLA_FLAGS, where the cure was added to them


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
    global _flags_before
    _flags_before = flags
    os.environ["XLA_FLAGS"] = f"{flags} --{SCHEDULER_FLAG}=false".strip()


def split_cpu(num_devices: int, num_cores: int) -> None:
    """Lets the CPU appear as several devices, once the backend starts.

    With two, the flag above is no cure: runs hung with it, and hung without it at one worker thread a device. A larger
    pool of workers (`NPROC`) is: so the flag goes, unless it is the user's own.
    """
    if "NPROC" not in os.environ:
        os.environ["NPROC"] = str(2 * max(num_cores, num_devices))
        if _flags_before is not None:
            os.environ["XLA_FLAGS"] = _flags_before
    jax.config.update("jax_num_cpu_devices", num_devices)


def users_environment() -> dict[str, str]:
    """The environment without the cure, for a process of its own that will choose for itself."""
    environment = dict(os.environ)
    if _flags_before is not None:
        environment["XLA_FLAGS"] = _flags_before
    return environment


def backend_is_running() -> bool:
    """Whether this process has started a JAX backend, after which flags and device counts are fixed."""
    from jax._src import xla_bridge  # no public way to ask without starting one

    return xla_bridge.backends_are_initialized()
