"""One start of an experiment script, told on stdout as JSON: `python start_time.py SCRIPT FOLDER SECONDS_SINCE_1970`.

JAX reports when it traces, lowers and compiles; that a block has finished shows in log.jsonl.
"""

import atexit
import json
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

EVENTS = {
    "tracing": "/jax/core/compile/jaxpr_trace_duration",
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiling": "/jax/core/compile/backend_compile_duration",
}


def covered(intervals: list[tuple[float, float]], until: float) -> float:
    """Seconds before `until` that lie in at least one of the intervals: functions are traced within others, and several
    programs are compiled at once."""
    total, end = 0.0, 0.0
    for first, last in sorted(intervals):
        total += max(0.0, min(last, until) - max(first, end))
        end = max(end, min(last, until))
    return total


def run(script: str, out: Path, entered: float) -> None:
    """Runs the script's experiment in this process."""
    stages: dict[str, float] = {}
    events: dict[str, list[tuple[float, float]]] = {name: [] for name in EVENTS.values()}

    def reached(stage: str) -> None:
        stages[stage] = time.time() - entered

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event in events:
            now = time.time() - entered
            events[event].append((now - duration_secs, now))

    def watch() -> None:
        size = 0
        while True:
            time.sleep(0.005)
            before, size = size, log.stat().st_size if log.exists() else 0
            if size > before:
                stages.setdefault("first_block", time.time() - entered)
                reached("trained")

    def tell() -> None:
        reached("done")
        stages["traced"] = min(first for first, _ in events[EVENTS["tracing"]])
        within = {name: covered(events[event], stages["first_block"]) for name, event in EVENTS.items()}
        print(json.dumps(stages | within))

    log = out / "log.jsonl"
    threading.Thread(target=watch, daemon=True).start()
    import jax.monitoring

    reached("jax")
    jax.monitoring.register_event_duration_secs_listener(heard)
    experiment = import_module(script).EXPERIMENT
    from purepg.run.cli import main

    reached("purepg")
    atexit.register(tell)
    main(*experiment, arguments=["--out", str(out)])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
