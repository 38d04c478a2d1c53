"""The command line from its arguments to the out folder: what a run leaves, and what it says to bad input."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import exit_code, read_log

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.folder.files import RecordError
from purepg.run.folder.record import Record
from purepg.run.plan import RunConfig
from purepg.run.reliability import iqm

pytestmark = pytest.mark.usefixtures("programs")

TINY_PPO = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1)
TINY_NETWORK = NetworkConfig(hidden=(4,))
TINY_RUN = RunConfig(total_steps=64, num_seeds=2, eval_episodes=2, eval_max_steps=10, log_every=2, wandb="disabled")
GRU = ("--network.memory", "gru", "--network.memory-size", "4")
SWEEP = ("--sweep", "learning_rate=1e-3,1e-2", "--sweep", "ppo.gamma=0.9", "--seed", "3", *GRU)
SCRIPT = Path(__file__).parent.parent / "experiments" / "ppo.py"


def command(*arguments, algorithm: Any = ppo, config: Any = TINY_PPO, run=TINY_RUN):
    return exit_code(algorithm, config, actor_critic, TINY_NETWORK, run, arguments=arguments)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The out folder of a small sweep."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert command("--out", str(out), *SWEEP) == 0
    return out


def test_a_run_leaves_all_its_files(swept):
    assert {"config.json", "metrics.npz", "summary.json", "log.jsonl", "curves.png"} <= {
        p.name for p in swept.iterdir()
    }
    assert (swept / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_config_json_holds_all_arguments_and_versions(swept):
    config = json.loads((swept / "config.json").read_text())
    assert config["run"]["seed"] == 3 and config["run"]["total_steps"] == 64
    assert config["ppo"]["num_steps"] == 8 and config["network"]["hidden"] == [4]
    assert config["settings"] == [{"learning_rate": 1e-3, "ppo.gamma": 0.9}, {"learning_rate": 1e-2, "ppo.gamma": 0.9}]
    assert config["versions"]["jax"] and config["devices"]


def test_metrics_are_settings_by_seeds_by_updates_and_count_every_step(swept):
    with np.load(swept / "metrics.npz") as metrics:
        assert {metrics[name].shape for name in metrics if name != "num_updates"} == {(2, 2, 4)}
        assert metrics["env_steps"].sum() == 2 * 2 * 64
        np.testing.assert_array_equal(metrics["num_updates"], [4, 4])
        assert np.isfinite(metrics["policy_loss"]).all()


def test_log_jsonl_holds_the_same_numbers_as_metrics_npz(swept):
    log = read_log(swept / "log.jsonl")
    with np.load(swept / "metrics.npz") as metrics:
        for name in log:
            np.testing.assert_array_equal(log[name].astype(metrics[name].dtype), metrics[name], err_msg=name)
    assert len((swept / "log.jsonl").read_text().splitlines()) == 2


def test_the_summary_says_what_the_finals_come_to(swept):
    summary = json.loads((swept / "summary.json").read_text())
    assert [s["hyperparameters"]["learning_rate"] for s in summary["settings"]] == [1e-3, 1e-2]
    for setting in summary["settings"]:
        assert len(setting["finals"]) == 2 and all(1 <= final <= 10 for final in setting["finals"])
        assert setting["iqm"] == pytest.approx(float(iqm(np.array(setting["finals"]))))
        assert setting["mean"] == pytest.approx(np.mean(setting["finals"]))
        assert setting["interval"][0] <= setting["iqm"] <= setting["interval"][1]
        assert setting["diverged"] == []
    for name in "compile_seconds", "run_seconds", "env_steps_per_second", "peak_memory_bytes":
        assert summary[name] > 0


def test_a_run_is_repeated_bit_for_bit_by_its_command(swept, tmp_path):
    """Whatever the length of its blocks, memory included."""
    assert command("--out", str(tmp_path / "again"), "--log-every", "0", *SWEEP) == 0
    with np.load(swept / "metrics.npz") as first, np.load(tmp_path / "again" / "metrics.npz") as again:
        for name in first:
            np.testing.assert_array_equal(first[name], again[name], err_msg=name)
    one, other = (json.loads((out / "summary.json").read_text())["settings"] for out in (swept, tmp_path / "again"))
    assert [setting["finals"] for setting in one] == [setting["finals"] for setting in other]


def test_an_out_folder_with_a_run_is_refused_and_kept(swept, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in swept.iterdir()}
    assert command("--out", str(swept)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in swept.iterdir()} == before


def test_reinforce_stops_before_its_budget_and_pads_what_differs(tmp_path):
    config = REINFORCEConfig(num_episodes=2, max_steps=15)
    run = RunConfig(total_steps=200, num_seeds=3, eval_episodes=2, eval_max_steps=10, log_every=4, wandb="disabled")
    assert command("--out", str(tmp_path / "r"), algorithm=reinforce, config=config, run=run) == 0
    with np.load(tmp_path / "r" / "metrics.npz") as metrics:
        steps = np.nansum(metrics["env_steps"], axis=-1)
        assert (steps <= 200).all() and (steps > 200 - 2 * 15).all()
        made = np.isfinite(metrics["policy_loss"]).sum(-1)
        np.testing.assert_array_equal(metrics["num_updates"], made.max(axis=1))
        np.testing.assert_array_equal(np.isfinite(metrics["env_steps"]).sum(-1), made)


def test_where_updates_vary_in_length_a_schedule_must_have_its_own(tmp_path, capsys):
    config = REINFORCEConfig(max_steps=10, anneal_learning_rate=True)
    assert command("--out", str(tmp_path / "r"), algorithm=reinforce, config=config) == 2
    assert "anneal_updates (None) must be a number of updates" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--env", "CartPol-v1"], "unknown environment 'CartPol-v1'; did you mean CartPole-v1?"),
        (["--ppo.num-minibatches", "3"], "num_envs * num_steps (16) must be divisible by num_minibatches (3)"),
        (["--ppo.num-envs", "0"], "num_envs (0) must be at least 1"),
        (["--num-seeds", "-1"], "num_seeds (-1) must be at least 1"),
        (["--total-steps", "15"], "total_steps (15) must be at least 16"),
        (["--ppo.gamma", "1.5"], "gamma (1.5) must be in [0, 1]"),
        (["--ppo.learning-rate", "nan"], "learning_rate (nan) must be above 0"),
        (["--sweep", "learning_rate=1e-3,-1"], "learning_rate (-1.0) must be above 0"),
        (["--sweep", "learningrate=1e-3"], "cannot sweep 'learningrate': did you mean learning_rate?"),
        (["--sweep", "xyz=1e-3"], "cannot sweep 'xyz'; what can be swept: ppo.num_envs"),
        (["--sweep", "hidden=64,64"], "--sweep hidden ('64,64') has 64 twice; two layers of 64 are 64x64"),
        (["--sweep", "gamma=0.9,0.99,0.9"], "--sweep gamma ('0.9,0.99,0.9') has 0.9 twice"),
        (["--sweep", "learning_rate="], "must be a name and its values"),
        (["--sweep", "=1"], "must be a name and its values"),
        (["--sweep", "gamma=0.9", "--sweep", "ppo.gamma=0.8"], "names ppo.gamma twice"),
        (["--sweep", "num_steps=8.5"], "--sweep num_steps ('8.5') must be an integer"),
        (["--sweep", "optimizer=Adam"], "--sweep optimizer ('Adam') must be adam or sgd: did you mean adam?"),
        (["--ppo.optimizer", "Adam"], "--ppo.optimizer ('Adam') must be adam or sgd: did you mean adam?"),
        (["--wandb-per=seeds"], "--wandb-per ('seeds') must be seed or setting: did you mean seed?"),
        (["--ppo.num-envs", "2.5"], "--ppo.num-envs ('2.5') must be an integer"),
        (["--total_steps", "1e6"], "--total-steps ('1e6') must be an integer: did you mean 1000000?"),
        (["--ppo.normalize-obs", "True"], "takes no value: it alone is true, and --ppo.no-normalize-obs is false"),
        (["--no-ppo.normalize-obs"], "did you mean --ppo.normalize-obs?"),
        (["--ppo.target-kl", "True"], "--ppo.target-kl ('True') must be a number or none"),
        (["--network.hidden", "64x64"], "an entry of --network.hidden ('64x64') must be an integer"),
        (["--sweep", "normalize_obs=1"], "--sweep normalize_obs ('1') must be true or false"),
        (["--ppo.num-minibatches", "16"], "normalize_advantage (minibatch) needs at least 2 steps at once"),
        (["--sweep", "num_minibatches=1,3"], "must be divisible by num_minibatches (3)"),
        (["--ppo.gama", "0.9"], "did you mean --ppo.gamma?"),
        (["--learning-rate", "1e-3"], "did you mean --ppo.learning-rate?"),
        (["--seeds=4"], "did you mean --num-seeds?"),
        (["--steps", "1000"], "did you mean --total-steps?"),
        (["--ppo.no-normalize-obs", "--lr", "1e-3"], "did you mean --ppo.learning-rate?"),
        (["--ppo.gamma", "high"], "--ppo.gamma ('high') must be a number"),
        (["--env", "FrozenLake-misc", "--ppo.normalize-obs"], "FrozenLake-misc observes one of 16 categories"),
        (["--network.torso", "cnn"], "needs observations [height, width, channels]"),
        (["--devices", "3"], "devices (3) must divide num_seeds (2)"),
        (["--out", "/dev/null/run"], "cannot write a run to /dev/null/run"),
        (["--log-every", "-1"], "log_every (-1) must be at least 0"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and ": error: " in line
    assert not list(tmp_path.iterdir())  # and nothing was made


def test_an_algorithm_is_refused_an_action_space_that_it_cannot_act_in(capsys, monkeypatch):
    import purepg.envs
    from purepg.types import Box

    matrix = purepg.envs.make("Pendulum-v1")._replace(action_space=Box(-np.ones((2, 2)), np.ones((2, 2))), name="M")
    monkeypatch.setattr(purepg.envs, "make", lambda name: matrix)
    assert command(algorithm=a2c, config=A2CConfig()) == 2
    assert "a Box action space must be one-dimensional, but M's has shape (2, 2)" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_said_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def full(self, metrics, num_updates):
        raise RecordError("cannot write metrics.npz: No space left on device")

    monkeypatch.setattr(Record, "write_metrics", full)
    assert command("--out", str(tmp_path / "out"), *SWEEP) == 1
    captured = capsys.readouterr()
    assert "IQM" in captured.out and captured.err.endswith("cannot write metrics.npz: No space left on device\n")
    kept = {"config.json", "log.jsonl", "summary.json", "curves.png", "heatmap.png", "checkpoints"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept


def test_ctrl_c_ends_the_run_with_what_it_has(tmp_path):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--out", tmp_path / "out", "--wandb", "disabled"]
        + "--total-steps 2000000 --ppo.num-envs 2 --ppo.num-steps 16 --ppo.num-epochs 1 --network.hidden 4 "
        "--num-seeds 2 --eval-episodes 2 --eval-max-steps 10 --log-every 5".split(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said and "Traceback" not in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] and len(summary["settings"][0]["finals"]) == 2
    with np.load(tmp_path / "out" / "metrics.npz") as metrics:
        assert metrics["env_steps"].shape[-1] == read_log(log)["env_steps"].shape[-1] == metrics["num_updates"][0]


def test_two_cpu_devices_give_what_one_gives_to_rounding(tmp_path, monkeypatch):
    """A process of two devices, that is, and this one."""
    returns = []
    for devices in "1", "2":
        arguments = ["--out", str(tmp_path / devices), "--devices", devices, "--wandb", "disabled", *GRU]
        arguments += "--total-steps 384 --num-seeds 4 --ppo.num-envs 4 --ppo.num-steps 32 --network.hidden 8".split()
        arguments += "--eval-episodes 2 --eval-max-steps 10".split()
        if devices == "1":
            monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
            with pytest.raises(SystemExit):
                runpy.run_path(str(SCRIPT), run_name="__main__")
        else:
            subprocess.run([sys.executable, SCRIPT, *arguments], check=True, timeout=120)
        assert len(json.loads((tmp_path / devices / "config.json").read_text())["devices"]) == int(devices)
        with np.load(tmp_path / devices / "metrics.npz") as metrics:
            returns.append({name: metrics[name] for name in metrics})
    for name in returns[0]:
        np.testing.assert_allclose(returns[1][name], returns[0][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_help_that_is_read_in_part_ends_without_a_traceback():
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, SCRIPT, "--help"], text=True, **pipes) as reading:
        assert reading.stdout and reading.stderr
        reading.stdout.close()
        assert (reading.stderr.read(), reading.wait(60)) == ("", 0)
