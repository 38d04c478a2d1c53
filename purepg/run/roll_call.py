"""The processes of a run find each other, or say in one line why not.

JAX ends a process without an exception where nobody answers, or where two processes have one id. So before they are
handed over to it, every other process tells the first, at the coordinator's own address, who it is, and hears whether
all have come.
"""

import contextlib
import json
import socket
import sys
import time

from purepg.run import console
from purepg.run.console import reason
from purepg.types import UsageError

WELL, WRONG = "purepg: all have come", "purepg: wrong: "
PATIENCE_SECONDS = 3.0  # after which a process says that it waits


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises UsageError if it is not of that form."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"coordinator ({address}) must be HOST:PORT, the address of process 0, such as node1:9876")
    return host.strip("[]"), int(port)


def call_roll(address: str, number: int, me: int, seconds: float) -> None:
    """Waits until all processes of the run have come.

    Args:
      address: HOST:PORT of process 0.
      number: of processes.
      me: this one's id.
      seconds: how long it waits.
    Raises:
      UsageError: some do not come, nobody answers, two have the same id, or they disagree on their number.
    """
    host, port = split_address(address)
    if number == 1:
        return
    deadline = time.monotonic() + seconds
    if me == 0:
        _listen(address, port, number, deadline, seconds)
    else:
        _report(address, (host, port), number, me, deadline, seconds)


def _listen(address: str, port: int, number: int, deadline: float, seconds: float) -> None:
    """Process 0 hears the others, and tells them what it has found."""
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=number
        )
    except OSError as error:
        raise UsageError(
            f"process 0 cannot listen at {address}: {reason(error)}; another process has process_id 0, or another "
            "program uses the port"
        ) from error
    present: dict[int, socket.socket] = {}
    heard: list[socket.socket] = []
    wrong, waits = None, _Waiting()
    with server, contextlib.ExitStack() as connections:
        while wrong is None and len(present) < number - 1:
            missing = [i for i in range(1, number) if i not in present]
            if time.monotonic() > deadline:
                wrong = f"{_named(missing)} of {number} did not come to {address} within {seconds:g} s"
                break
            waits.say(f"process 0 waits at {address} for {_named(missing)} of {number}")
            server.settimeout(0.2)
            with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # of strangers, too
                connection = connections.enter_context(server.accept()[0])
                connection.settimeout(2.0)
                said = json.loads(_line(connection))
                if said["purepg"] != number:
                    wrong = f"process {said['id']} has num_processes ({said['purepg']}), and process 0 has ({number})"
                elif said["id"] in present and not _has_left(present[said["id"]]):
                    wrong = f"two processes have process_id ({said['id']}); each needs its own, from 0 to {number - 1}"
                present[said["id"]] = connection
                heard.append(connection)
        for connection in heard:
            with contextlib.suppress(OSError):
                connection.sendall(f"{WRONG + wrong if wrong else WELL}\n".encode())
    if wrong:
        raise UsageError(wrong)


def _report(address: str, to: tuple[str, int], number: int, me: int, deadline: float, seconds: float) -> None:
    """Another process says who it is, and waits for what process 0 has found."""
    waits = _Waiting()
    while True:
        try:
            connection = socket.create_connection(to, timeout=max(0.1, min(5.0, deadline - time.monotonic())))
            break
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else reason(error)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"nobody answers at coordinator ({address}) within {seconds:g} s: {why}; process 0 must run there"
                ) from error
            waits.say(f"process {me} waits for process 0 at {address}: {why}")
            time.sleep(0.2)
    with connection:
        try:
            connection.sendall(json.dumps({"purepg": number, "id": me}).encode() + b"\n")
            connection.settimeout(max(1.0, deadline - time.monotonic() + 5.0))
            found = _line(connection)
        except OSError as error:
            raise UsageError(f"process 0 at {address} said nothing: {reason(error)}") from error
    if found != WELL:
        if found.startswith(WRONG):
            console.quiet = True  # process 0 says it
            raise UsageError(found.removeprefix(WRONG))
        raise UsageError(f"what answers at {address} is not process 0 of a run")


class _Waiting:
    """Says once, after some seconds, that a process waits."""

    def __init__(self):
        self._from: float | None = time.monotonic() + PATIENCE_SECONDS

    def say(self, line: str) -> None:
        if self._from is not None and time.monotonic() > self._from:
            self._from = None
            print(line, file=sys.stderr, flush=True)


def _line(connection: socket.socket) -> str:
    with connection.makefile("rb") as file:
        return file.readline(4096).decode(errors="replace").rstrip("\n")


def _has_left(connection: socket.socket) -> bool:
    """Whether the other end was closed, as by a process that was started again."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _named(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return f"process {shown}" if len(ids) == 1 else f"processes {shown}"
