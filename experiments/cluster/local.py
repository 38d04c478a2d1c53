"""Starts a script as several processes of one run on this machine.

    python experiments/cluster/local.py 2 experiments/ppo.py --num-seeds 4

The exit code is that of the first process that failed.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def start(number: int, command: Sequence[str], **options: Any) -> list[subprocess.Popen]:
    """Starts the processes of a Python command, which gets --distributed.

    Args:
      options: of `subprocess.Popen`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(options.pop("env", os.environ), JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}")
    return [
        subprocess.Popen(
            [sys.executable, *command, "--distributed"],
            env=environment | {"JAX_NUM_PROCESSES": str(number), "JAX_PROCESS_ID": str(i)},
            **options,
        )
        for i in range(number)
    ]


def wait(process: subprocess.Popen) -> int:
    """The process's exit code. Ctrl-C reaches the process too, which then finishes its block."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.exit(__doc__)
    codes = [wait(process) for process in start(int(sys.argv[1]), sys.argv[2:])]
    sys.exit(next((code for code in codes if code), 0))
