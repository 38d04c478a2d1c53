"""Tests leave nothing behind in the user's home, and share what they compile within a session."""

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="purepg-tests-")
os.environ["MPLCONFIGDIR"] = os.environ["XDG_CACHE_HOME"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] + "/xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if importlib.metadata.version("jaxlib") == "0.10.2":  # compiles in half the time; elsewhere the flag may be unknown
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

sys.path.append(str(Path(__file__).parent.parent / "experiments"))  # whose scripts import what lies beside them

import purepg  # noqa: F401  before anything starts JAX
