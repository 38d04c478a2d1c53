"""Importing purepg keeps JAX's CPU runtime from deadlocking. Every claim is tested in fresh processes, since what is at
stake is decided before the first computation."""

import os
import subprocess
import sys
import textwrap

import pytest

from purepg.run import devices
from purepg.runtime import LEVEL_FLAG, SCHEDULER_FLAG, compile_options

TRAIN = """
    import purepg
    import jax
    from purepg.algorithms.ppo import PPOConfig, ppo
    from purepg.envs import make
    from purepg.networks.actor_critic import NetworkConfig, actor_critic
    from purepg.train import train

    env = make("CartPole-v1")
    network = actor_critic(env, NetworkConfig())
    algorithm = ppo(env, network, PPOConfig(num_envs=4, num_steps=16))
    def member(key):
        k_init, k_train = jax.random.split(key)
        return train(k_train, algorithm, algorithm.init(k_init), 0, 40)
    run = jax.jit(jax.vmap(member))
    for seed in range(3):
        _, metrics = run(jax.random.split(jax.random.key(seed), 4))
        print(bool(metrics["entropy"].min() > 0), flush=True)
"""


def python(code: str, timeout: float = 100, **variables: str) -> subprocess.CompletedProcess:
    """Runs code in a new process that has nothing of this one's environment but the paths it needs."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_ppo_with_a_few_vmapped_seeds_does_not_deadlock():
    # Without the cure, two cores hang in the first of these runs, also with the flags by which tests compile quickly.
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if SCHEDULER_FLAG not in flag]
    result = python(TRAIN, XLA_FLAGS=" ".join(flags))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == ["True"] * 3


PRINT_FLAGS = "import purepg, os; print(os.environ.get('XLA_FLAGS', ''))"


def test_import_adds_the_cure_to_the_users_own_flags_and_starts_no_backend():
    backend = "from purepg.runtime import backend_is_running; print(backend_is_running())"
    result = python(f"{PRINT_FLAGS}; {backend}", XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    assert result.stdout.split() == ["--xla_cpu_enable_fast_math=false", f"--{SCHEDULER_FLAG}=false", "False"]


@pytest.mark.parametrize("variables", [{"XLA_FLAGS": f"--{SCHEDULER_FLAG}=true"}, {"NPROC": "4"}])
def test_import_leaves_a_users_own_choice_alone(variables):
    assert python(PRINT_FLAGS, **variables).stdout.strip() == variables.get("XLA_FLAGS", "")


def test_import_sets_no_flag_on_a_jaxlib_on_which_it_was_not_tried():
    result = python(f"import importlib.metadata as m; m.version = lambda name: '99.0'; {PRINT_FLAGS}")
    assert (result.returncode, result.stdout.strip()) == (0, "")


def test_import_after_jax_has_started_warns():
    result = python("import jax; jax.devices(); import purepg")
    assert "purepg was imported after JAX had started" in result.stderr


@pytest.mark.parametrize(("num_seeds", "split"), [(16, [(4, 8)]), (6, [(3, 6)]), (2, [(2, 4)]), (1, [])])
def test_agents_spread_over_two_devices_for_each_core_with_two_threads_for_each_device(monkeypatch, num_seeds, split):
    made = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(devices, "backend_is_running", lambda: False)
    monkeypatch.setattr(devices, "split_cpu", lambda *sizes: made.append(sizes))
    devices.prepare_devices(None, num_seeds, num_settings=1)
    assert made == split
    devices.prepare_devices(None, num_seeds, num_settings=1, split=False)
    assert made == split


def test_a_users_own_level_of_optimisation_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compile_options() == {LEVEL_FLAG: "2"}
    monkeypatch.setenv("XLA_FLAGS", f"--{LEVEL_FLAG}=3")
    assert compile_options() is None
