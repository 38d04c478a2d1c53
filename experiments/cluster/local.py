"""Starts a script as several processes of one run on this machine.

    python experiments/cluster/local.py 2 experiments/ppo.py --num-seeds 4

Every process gets --distributed, and finds the others by the variables that purepg.run.processes reads. The exit code
is the first process's that failed.
"""

import os
import socket
import subprocess
import sys


def main(number: int, command: list[str]) -> int:
    """Starts `number` processes of a Python command, waits for all, and returns the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(number):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number), "JAX_PROCESS_ID": str(i)}
        started.append(subprocess.Popen([sys.executable, *command, "--distributed"], env=os.environ | place))
    codes = []
    for process in started:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # which reached the processes as well; they finish their block
                continue
        codes.append(process.returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.exit(__doc__)
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
