"""The line that says how to go on with a run of several processes, when it ends because one of them has died.

JAX then aborts the others from C++, and a process that is killed says nothing itself. So each process has a small child
that holds the other end of a pipe. When the pipe closes and no word came that all is well, the process has died, and
the child says the line. Of several children the first says it: the one that makes the file `LAST_WORDS`.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from purepg.run.processes import agreed, is_first, number
from purepg.types import UsageError

LAST_WORDS = ".last-words"  # in the run's folder
WELL = b"well"
CHILD = """
import os, sys
file, line, is_first = sys.argv[1:]
if sys.stdin.buffer.read() != b"well":
    try:
        with open(file, "x") as opened:
            opened.write(line)
    except FileExistsError:
        sys.exit()
    except OSError:
        if not is_first:
            sys.exit()
    print(line, file=sys.stderr, flush=True)
"""


@contextlib.contextmanager
def last_words(folder: Path | None, command: Callable[[Path], str]) -> Iterator[None]:
    """Within it, the death of a process of the run ends with the `command` that resumes it. Does nothing if the run has
    one process."""
    if number() == 1 or folder is None:
        yield
        return
    line = (
        "a process of the run has died, which ends the others; go on from its last checkpoint with, in every process: "
    )
    file = folder.absolute() / LAST_WORDS
    if is_first():
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    agreed(None)  # no child makes the file before it is removed
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CHILD, str(file), line + command(folder), "first" * is_first()],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C does not reach it
    )
    try:
        yield
    except UsageError:
        _say_well(child)
        raise
    _say_well(child)


def _say_well(child: subprocess.Popen) -> None:
    assert child.stdin
    with contextlib.suppress(OSError):
        child.stdin.write(WELL)
        child.stdin.close()
    child.wait()
