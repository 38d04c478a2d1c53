"""Several processes of one run, on one host or many, by JAX's own runtime.

Every process traces the same programs, and enters every exchange and every save in the same order. What only one can
know, such as the time, the memory that is free, a signal or an error of the disk, is `gathered` before anything
depends on it. The first process alone writes and prints. With one process, nothing here does anything.

JAX ends a process whose peers have died, without an exception (`last_words`).
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from purepg.run import console
from purepg.run.console import reason
from purepg.run.folder.files import RecordError
from purepg.run.roll_call import call_roll, split_address
from purepg.runtime import backend_is_running
from purepg.types import UsageError

T = TypeVar("T")
HEARTBEAT_SECONDS = 20  # without a sign of life, after which a process counts as dead
WITHIN_SECONDS = 10.0  # in which all processes meet an error, if it is one of all
FOREVER_SECONDS = 7 * 24 * 3600.0  # JAX itself ends a wait for a process that has died
LOST = ("Gloo", "NCCL", "coordination service", "CoordinationService")  # in errors that the death of a process causes
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


class _Place(NamedTuple):
    client: Any
    number: int
    me: int
    exchanges: Iterator[int]  # their numbers


_place: _Place | None = None


def start(run: Any) -> None:
    """Joins this process to those of the run, if it is `distributed` and has not done so.

    Args:
      run: a `RunConfig`.
    Raises:
      UsageError: the processes are not described, or do not find each other; the message says what to do.
    """
    global _place
    if not run.distributed:
        given = next((name for name in VARIABLES if getattr(run, name) is not None), None)
        if given:
            raise UsageError(f"{given} ({getattr(run, given)}) needs distributed")
        return
    if _place:
        return
    from jax._src import distributed  # which has the store of keys and values that `gathered` uses

    if not jax.distributed.is_initialized():
        address, number, me = _described(run)
        if number == 1:
            return
        if backend_is_running():
            raise UsageError("distributed must come before JAX's first computation")
        call_roll(address, number, me, run.connect_timeout)
        jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending the process
        times: Any = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": 2 * HEARTBEAT_SECONDS}
        wait = max(10, int(run.connect_timeout))
        jax.distributed.initialize(address, number, me, initialization_timeout=wait, **times)
    joined = distributed.global_state
    _place = _Place(joined.client, joined.num_processes, joined.process_id, itertools.count())
    console.quiet = not is_first()


def _described(run: Any) -> tuple[str, int, int]:
    """(address of process 0, number of processes, this one's id), by fields, by the environment, or as JAX finds them
    on a cluster."""
    from jax._src.clusters import ClusterEnv

    found = {name: getattr(run, name) for name in VARIABLES}
    for name, variable in VARIABLES.items():
        text = os.environ.get(variable)
        if found[name] is None and text:
            if name != "coordinator" and not text.isdecimal():
                raise UsageError(f"{variable} ({text!r}) must be a number")
            found[name] = text if name == "coordinator" else int(text)
    address, number, me = found.values()
    if None in found.values():
        try:
            address, number, me, _ = ClusterEnv.auto_detect_unset_distributed_params(
                address, number, me, None, None, int(run.connect_timeout)
            )
        except Exception as error:
            raise UsageError(f"this cluster does not tell its processes: {reason(error)}") from error
    missing = [name for name, x in zip(VARIABLES, (address, number, me), strict=True) if x is None]
    if address is None or number is None or me is None:
        raise UsageError(
            f"distributed needs {', '.join(missing)} (JAX finds them on SLURM, Open MPI and Kubernetes): set them, or "
            f"{', '.join(VARIABLES[name] for name in missing)}"
        )
    split_address(address)
    if me >= number:
        raise UsageError(f"process_id ({me}) must be below num_processes ({number})")
    return address, number, me


def number() -> int:
    """The number of processes of the run."""
    return _place.number if _place else 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _place is None or _place.me == 0


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order. Each waits here for the others."""
    if _place is None:
        return [value]
    n = next(_place.exchanges)
    found = _exchange(f"purepg/{n}", "purepg", value, FOREVER_SECONDS)
    _place.client.key_value_delete(f"purepg/{n - 1}/{_place.me}")  # which all have read before they came here
    return found


def _exchange(name: str, barrier: str, value: Any, seconds: float) -> list[Any]:
    assert _place
    client, number, me, _ = _place
    client.key_value_set(f"{name}/{me}", json.dumps(value))
    client.wait_at_barrier(barrier, int(1000 * seconds))
    found = dict(client.key_value_dir_get(f"{name}/"))
    return [json.loads(found[f"{name}/{i}"]) for i in range(number)]


def agreed(value: T) -> T:
    """The first process's JSON value."""
    return gathered(value)[0]


def by_first(f: Callable[[], T]) -> T | None:
    """`f()` in the first process, and None in the others. Its UsageError or RecordError is raised in all."""
    if _place is None:
        return f()
    result, error = None, None
    if is_first():
        try:
            result = f()
        except (UsageError, RecordError) as raised:
            error = raised
    said = agreed(None if error is None else [isinstance(error, UsageError), str(error)])
    if said:
        raise error or (UsageError if said[0] else RecordError)(said[1])
    return result


def refuse_unshared(folder: Path) -> None:
    """Makes the run's folder. Raises UsageError where a process does not see what the first writes there."""
    probe = folder / ".shared"

    def write() -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text(str(time.time_ns()))
        except OSError as error:
            raise UsageError(f"cannot write a run to {folder}: {reason(error)}; choose another --out") from error
        return probe.read_text()

    token = agreed(by_first(write) or "")
    seen = gathered(_shows(probe, token))
    by_first(lambda: probe.unlink(missing_ok=True))
    if not all(seen):
        raise UsageError(
            f"out ({folder}) must be on a file system that all processes share: process {seen.index(False)} does not "
            "see what process 0 writes there"
        )


def _shows(probe: Path, token: str, seconds: float = 5.0) -> bool:
    """Whether a file has this content, perhaps after some seconds, as on a network."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if probe.read_text() == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def refuse_differences(named: dict[str, Any]) -> None:
    """Raises UsageError where processes were started with other values of what all must share."""
    digests = {name: hashlib.sha256(str(value).encode()).hexdigest()[:16] for name, value in named.items()}
    for i, other in enumerate(found := gathered(digests)):
        different = [name for name, value in other.items() if found[0].get(name) != value]
        if different:
            raise UsageError(f"process {i} has another {', '.join(different)} than process 0: start all with the same")


def leave(error: object, script: str, code: int) -> None:
    """Ends this process, if there are several, with an error. One of all processes is said by the first; one of this
    process alone ends the others as well."""
    if _place is None:
        return
    if _is_of_a_death(error):
        _exit("", 1)
    try:
        _exchange("purepg-error", "purepg-error", str(error), WITHIN_SECONDS)
    except Exception:
        _exit(f"{script}: process {_place.me}: error: {error}", code)
    if is_first():
        print(f"{script}: error: {error}", file=sys.stderr)
    sys.exit(code)


def crash(error: BaseException, script: str) -> None:
    """Ends this process, if there are several, after an error that is not the user's, without waiting for the others
    as JAX does. An error that only says that another process has died is not printed."""
    if _place is None:
        return
    said = f"{script}: process {_place.me}: {''.join(traceback.format_exception(error))}"
    _exit("" if _is_of_a_death(error) else said, 1)


def _is_of_a_death(error: object) -> bool:
    return any(word in str(error) for word in LOST)


def _exit(line: str, code: int) -> None:
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def neighbours() -> int:
    """How many of the processes run on the same cores as this one, itself included."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    here = [socket.gethostname(), cores]
    return gathered(here).count(here)
