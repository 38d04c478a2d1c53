"""Tests leave nothing behind in the user's home, and share what they compile within a session."""

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="purepg-tests-")
os.environ["MPLCONFIGDIR"] = os.environ["XDG_CACHE_HOME"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] + "/xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import purepg  # noqa: F401  before anything starts JAX
