"""What the workers tell experiments/benchmark.py, in lines of JSON. It imports only what every worker has."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def ready(compile_seconds: float, env_steps: int, packages: Sequence[str]) -> None:
    """Says that the program is compiled and has run once; a run of it takes `env_steps`."""
    answer(
        ready=True,
        device=jax.devices()[0].device_kind,
        compile_seconds=compile_seconds,
        env_steps=env_steps,
        versions={name: version(name) for name in packages},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        nproc=os.environ.get("NPROC", ""),
    )


def timed_runs(run: Callable[[], Any], env_steps: int) -> None:
    """Times `run()`, whose result is waited for, once for each line on stdin; `quit` or the end of stdin ends it."""
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - start
        answer(seconds=seconds, env_steps=env_steps, env_steps_per_second=env_steps / seconds)
