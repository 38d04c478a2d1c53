"""Tests leave nothing behind in the user's home. What they compile is kept in pytest's own cache folder, which makes
the next session shorter; `pytest --cache-clear` empties it."""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker shares the folder of the process that started it
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="purepg-tests-")
os.environ["MPLCONFIGDIR"] = os.environ["XDG_CACHE_HOME"]
# A folder that is set is kept. Else, it is the one that `config.cache.mkdir("xla")` names.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache/d/xla"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if importlib.metadata.version("jaxlib") == "0.10.2":  # less to optimise; elsewhere a flag may be unknown
    quick = """
        xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE xla_cpu_parallel_codegen_split_count=1
        xla_cpu_use_fusion_emitters=false xla_backend_optimization_level=0 xla_llvm_disable_expensive_passes=true
    """.split()
    os.environ["XLA_FLAGS"] = " --".join([os.environ.get("XLA_FLAGS", ""), *quick])

sys.path.append(str(Path(__file__).parent.parent / "experiments"))  # whose scripts import what lies beside them

import pytest

import purepg  # noqa: F401  before anything starts JAX

from helpers import shared_programs  # isort: skip

gc.set_threshold(200_000, 20, 100)  # tracing makes many objects and little garbage

COMPILED_AT_MOST = 2 * 2**30  # bytes that are kept, of programs of many versions of the code

# The files that train whole runs, start processes or compile whole algorithms, the slowest first.
SLOW = """
    distributed sharded_models
    resume algorithms suites devices_per_agent recurrent_replay token_runs text recurrence jax_modes grpo cli envs
    quickstart updates torsos configs outside masks ladder histories experiment q_gradients env_params networks load
    population memory runtime off_policy_updates suite_table multi_discrete pages films train off_policy tokens
    overoptimisation transformer privileged presets own_metrics lab_experiments compare
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the slow files and starts with them, so that no core idles at the end."""
    rank = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    for item in items:
        if item.path.name in rank:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Any]]:
    """Makes a file's runs share their compiled programs, by `pytest.mark.usefixtures` for all its tests."""
    with shared_programs() as found:
        yield found


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the session's folder, once all its processes have ended, and compiled programs if they are many."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
        compiled = config.cache and config.cache.mkdir("xla")
        if compiled and sum(file.stat().st_size for file in compiled.iterdir()) > COMPILED_AT_MOST:
            shutil.rmtree(compiled, ignore_errors=True)
