"""A run over several processes is that of one process with as many devices: also when one of them gets Ctrl-C, another
one is killed, and it goes on with another number of processes. What cannot work is refused within seconds.

The processes run this file as a script.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster.local import start
from helpers import arms_env

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run import processes
from purepg.run.cli import main, resume_command
from purepg.run.folder.config import changed_devices, refuse_differences
from purepg.run.plan import RunConfig, prepare
from purepg.run.roll_call import call_roll
from purepg.runtime import users_environment
from purepg.types import UsageError

NUM_BLOCKS = 48
RARELY = "--checkpoint-every", "1000"
CONFIG = A2CConfig(num_envs=2, num_steps=4, normalize_obs=True)
RUN = RunConfig(
    total_steps=8 * NUM_BLOCKS,
    num_seeds=4,
    log_every=1,
    eval_episodes=2,
    wandb="disabled",
    checkpoint_every=0.0,
    devices=4,
)

if __name__ == "__main__":
    main(a2c, CONFIG, actor_critic, NetworkConfig(hidden=(4,)), RUN, env=arms_env)


# --- runs, and what happens to them ---


class Run:
    """The processes of a run in the folder `out`, which write into one file."""

    def __init__(self, number: int, out: Path, *flags: str):
        self._log, self._output = out / "log.jsonl", out.with_name(f"{out.name}-{number}.txt")
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with self._output.open("w") as file:
            to: Any = {"stdout": file, "stderr": file, "env": users_environment() | own}
            self.processes = start(number, [__file__, "--out", str(out), *flags], **to)

    def after_blocks(self, number: int, signum: int) -> "Run":
        """Waits until so many blocks are logged, and sends a signal to the last process."""
        deadline = time.monotonic() + 120
        while not self._log.exists() or self._log.read_bytes().count(b"\n") < number:
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.01)
        self.processes[-1].send_signal(signum)
        return self

    def ended(self) -> list[int]:
        """The exit codes."""
        return [process.wait(timeout=120) for process in self.processes]

    def said(self) -> str:
        return self._output.read_text()


def finals(out: Path) -> Any:
    return [setting["finals"] for setting in json.loads((out / "summary.json").read_text())["settings"]]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run of one process with four devices; and one of two processes until one of them gets Ctrl-C, with which four
    go on until the last is killed, and which one process ends."""
    whole, out = (tmp_path_factory.mktemp("distributed") / name for name in ("whole", "out"))
    assert Run(1, whole, *RARELY).ended() == [0]
    interrupted = Run(2, out).after_blocks(5, signal.SIGINT)
    codes_of_two = interrupted.ended()
    killed = Run(4, out, "--resume").after_blocks(12, signal.SIGKILL)
    begun = time.monotonic()
    story = {"whole": whole, "out": out, "interrupted": interrupted, "codes of two": codes_of_two, "killed": killed}
    story |= {"codes of four": killed.ended(), "seconds": time.monotonic() - begun}
    last = Run(1, out, "--resume", *RARELY)
    return story | {"codes of one": last.ended(), "last": last}


def test_it_ends_with_the_bits_of_a_run_in_one_process_that_was_never_stopped(story):
    assert story["codes of one"] == [0], story["last"].said()
    with np.load(story["whole"] / "metrics.npz") as whole, np.load(story["out"] / "metrics.npz") as found:
        assert set(whole) == set(found)
        for name in whole:
            np.testing.assert_array_equal(found[name], whole[name], err_msg=name)
        assert whole["entropy"].shape == (1, 4, NUM_BLOCKS)
    assert finals(story["out"]) == finals(story["whole"])


def test_the_death_of_a_process_ends_the_others_with_one_line_that_says_how_to_go_on(story):
    assert story["codes of four"][-1] == -signal.SIGKILL and 0 not in story["codes of four"]
    assert story["seconds"] < 60
    lines = [line for line in story["killed"].said().splitlines() if "--resume" in line]
    assert len(lines) == 1 and f"--out {story['out']} --resume" in lines[0], story["killed"].said()


def test_ctrl_c_in_one_process_stops_all_after_the_same_block_and_the_first_alone_says_so(story):
    assert story["codes of two"] == [130, 130], story["interrupted"].said()
    said = story["interrupted"].said()
    assert [said.count(x) for x in ("interrupted:", "go on with it:", "wrote ")] == [1, 1, 1], said


def test_a_process_needs_the_same_command_but_its_own_number():
    command = resume_command(["--seed", "1", "--process-id", "3", "--distributed", "--out=x"], Path("y"))
    assert command.endswith(" --seed 1 --distributed --out y --resume")


# --- how the processes find each other ---


def calls(*who: tuple[int, int], seconds: float = 10.0) -> list[str]:
    """What the processes (number, id) of a run are told when they call the roll; empty where all is well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = [""] * len(who)

    def call(place: int) -> None:
        try:
            call_roll(address, *who[place], seconds)
        except UsageError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(who))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr("purepg.run.console.quiet", False)


def test_processes_that_all_come_are_told_that_all_is_well():
    assert calls((3, 2), (3, 0), (3, 1)) == ["", "", ""]


def test_ids_that_clash_are_refused_in_every_process_at_once():
    begun = time.monotonic()
    told = calls((4, 0), (4, 1), (4, 1), seconds=60.0)
    assert set(told) == {"two processes have process_id (1); each needs its own, from 0 to 3"}
    assert "another process has process_id 0" in "".join(calls((2, 0), (2, 0), seconds=0.5))
    assert time.monotonic() - begun < 10


def test_numbers_of_processes_that_differ_are_refused_in_every_process():
    assert set(calls((2, 0), (3, 2))) == {"process 2 has num_processes (3), and process 0 has (2)"}


def test_a_process_to_which_nobody_answers_or_nobody_comes_says_so():
    (told,) = calls((2, 1), seconds=0.3)
    assert "nobody answers at coordinator (127.0.0.1:" in told and "process 0 must run there" in told
    assert "process 1 of 2 did not come" in calls((2, 0), seconds=0.3)[0]


DESCRIBED: Any = {"coordinator": "node1:99", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"coordinator": None, "process_id": None},
            r"distributed needs coordinator, process_id \(JAX finds",
        ),
        ({"coordinator": "node1"}, r"coordinator \(node1\) must be HOST:PORT"),
        ({"process_id": 2}, r"process_id \(2\) must be below num_processes \(2\)"),
        ({"distributed": False}, r"coordinator \(node1:99\) needs distributed"),
    ],
)
def test_processes_that_are_not_described_are_refused(monkeypatch, changes, expected):
    for variable in processes.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match=expected):
        processes.start(RunConfig(**{"distributed": True} | DESCRIBED | changes))


def test_variables_say_which_process_this_is_and_so_does_slurm(monkeypatch):
    run = RunConfig(distributed=True)
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-5]", "NTASKS": "12", "PROCID": "5", "LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, number, me = processes._described(run)
    assert (address.partition(":")[0], number, me) == ("node3", 12, 5)
    for name, value in ("COORDINATOR_ADDRESS", "a:1"), ("NUM_PROCESSES", "3"), ("PROCESS_ID", "2"):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert processes._described(run) == ("a:1", 3, 2)
    assert processes._described(RunConfig(distributed=True, process_id=1)) == ("a:1", 3, 1)


def test_the_kubernetes_job_gives_its_pods_the_variables_and_the_address_of_the_first():
    file = Path(__file__).parent.parent / "experiments" / "cluster" / "kubernetes.yaml"
    service, job = yaml.safe_load_all(file.read_text())
    pod = job["spec"]["template"]["spec"]
    found = {x["name"]: x.get("value") for x in pod["containers"][0]["env"]}
    assert found.keys() == set(processes.VARIABLES.values())
    assert int(found["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert found["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-0.{subdomain}:") and pod["subdomain"] == subdomain
    assert service["spec"]["selector"] == {"job-name": name}


# --- what several processes cannot share ---


@pytest.fixture
def four(monkeypatch):
    """As if this were the first of four processes that say the same."""
    monkeypatch.setattr(processes, "_place", processes._Place(None, 4, 0, iter([])))
    monkeypatch.setattr(processes, "gathered", lambda value: [value] * 4)
    monkeypatch.setattr("jax.device_count", lambda: 4)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"devices": 6}, r"devices \(6\) must be divisible by the number of processes \(4\)"),
        ({"num_seeds": 6}, r"4 processes cannot take equal parts of 1 settings of 6 seeds"),
        ({"max_parallel": 3}, r"4 processes cannot take equal parts of 1 settings of 2 seeds"),
        ({"env": "gym/CartPole-v1"}, r"distributed needs an environment in JAX, which gym/CartPole-v1 is not"),
        ({"out": None}, r"distributed needs out, a folder that all processes share"),
    ],
)
def test_what_processes_cannot_share_is_refused_in_one_line(four, tmp_path, sizes, expected):
    run = RunConfig(**{"num_seeds": 4, "distributed": True, "compile_cache": False, "out": tmp_path} | sizes)
    with pytest.raises(UsageError, match=expected):
        prepare(a2c, actor_critic, {"a2c": CONFIG, "network": NetworkConfig()}, run, {})


def test_a_run_goes_on_with_other_devices_and_says_so(story):
    """A single process refuses them, as its results would be others."""
    stored = json.loads((story["out"] / "config.json").read_text())
    fewer = stored | {"devices": ["cpu"], "xla_flags": ""}
    refuse_differences(story["out"], stored, fewer)
    assert "devices ['cpu', 'cpu', 'cpu', 'cpu'] is ['cpu']" in changed_devices(stored, fewer)
    alone = stored | {"run": stored["run"] | {"distributed": False}}
    with pytest.raises(UsageError, match="devices"):
        refuse_differences(story["out"], alone, alone | {"devices": ["cpu"]})
