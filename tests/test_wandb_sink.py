"""Weights & Biases: what every run is given, that no failure reaches the training, and runs that W&B reads back."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from fake_wandb import FakeRun, FakeWandb
from PIL import Image
from scipy import stats
from wandb.errors import CommError, UsageError
from wandb.wandb_agent import Agent

from purepg import types
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.folder.config import read_summary
from purepg.run.plan import RunConfig, prepare
from purepg.run.watch import sink as sink_module
from purepg.run.watch.rows import thinned
from purepg.run.watch.sink import WandbSink

CONFIG = {"env": "CartPole-v1", "seed": 7, "ppo": {"learning_rate": 1.0, "gamma": 0.99}}
SWEEP = [{"learning_rate": 0.001}, {"learning_rate": 0.01}]


def make_sink(out: Path, mode: Any = "offline", per: Any = "seed", num_seeds: int = 3) -> WandbSink:
    return WandbSink(mode, per, "project", "group", out, CONFIG, SWEEP, list(range(num_seeds)))


def population(num_settings: int = 2, num_seeds: int = 3, num_updates: int = 4) -> dict[str, np.ndarray]:
    shape = (num_settings, num_seeds, num_updates)
    loss = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return {"loss": loss, "env_steps": np.full(shape, 512), "finite": np.ones(shape, bool)}


def log(sink: WandbSink, metrics: dict[str, np.ndarray], num_updates_per_block: int = 2) -> None:
    num_settings, _, num_updates = metrics["env_steps"].shape
    for start in range(0, num_updates, num_updates_per_block):
        block = {name: value[..., start : start + num_updates_per_block] for name, value in metrics.items()}
        sink.log_block(range(num_settings), start, block)


@pytest.fixture
def fake(monkeypatch) -> FakeWandb:
    return FakeWandb(monkeypatch)


@pytest.fixture
def no_account(tmp_path, monkeypatch) -> None:
    """W&B itself, without an account and without settings of the user."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def recorded(folder: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The file of the only W&B run in a folder, and its records by type, as `wandb leet inspect` prints them."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--follow"]  # up to the run's last record
    lines = subprocess.run([*inspect, str(path)], capture_output=True, text=True, check=True, timeout=60).stdout
    records: dict[str, list[dict[str, Any]]] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record[record["type"]])
    return path, records


def last_summary(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {name: value for record in records["summary"] for name, value in record["update"].items()}


def test_a_run_without_a_key_is_recorded_offline_and_wandb_reads_it_back(tmp_path, monkeypatch, capfd, no_account):
    monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")  # would make all runs one
    Image.new("RGB", (2, 2)).save(tmp_path / "curves.png")
    metrics = population(1, 1)
    metrics["loss"][0, 0, 1] = np.nan
    response = {"prompt": "1 2 ", "response": "2 1", "reward": 1.0}
    wandb.teardown()  # W&B reads the environment once
    try:
        sink = WandbSink("online", "seed", "project", "group", tmp_path, CONFIG, SWEEP[:1], [5])
        log(sink, metrics)
        setting = {"finals": [2.0], "env_steps": 6144, "responses": [[response]]}
        sink.finish({"settings": [setting]}, [tmp_path / "curves.png"])
    finally:
        wandb.teardown()
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "No API key" in err and "recording offline" in err
    path, records = recorded(tmp_path)
    assert "abcd1234" not in path.name
    (run,) = records["run"]
    assert (run["display_name"], run["project"], run["run_group"]) == ("learning_rate=0.001/seed=5", "project", "group")
    run["config"]["update"].pop("_wandb")
    own = {"learning_rate": 0.001}
    assert run["config"]["update"] == CONFIG | own | {"member_seed": 5, "ppo": CONFIG["ppo"] | own}
    assert [x["step_metric"] for x in records["metric"] if x.get("glob_name") == "*"] == ["env_steps"]
    rows = [{k: v for k, v in record["item"].items() if k[0] != "_"} for record in records["history"]]
    for u, row in enumerate(rows[:4]):
        loss = {} if u == 1 else {"loss": float(str(metrics["loss"][0, 0, u]))}
        assert row == {"env_steps": 512 * (u + 1), "update": u, "finite": 1} | loss
    assert [rows[4]["responses._type"], rows[5]["curves._type"]] == ["table-file", "image-file"]
    (table,) = path.parent.glob(f"files/{rows[4]['responses.path']}")
    assert json.loads(table.read_text())["data"] == [list(response.values())]
    summary = last_summary(records)
    assert (summary["final"], summary["env_steps"]) == (2.0, 2048)  # the run's own steps, not the setting's
    assert records["exit"][0]["exit_code"] == 0


def test_the_sweep_of_the_page_gives_the_agents_run_its_setting_and_its_metric(tmp_path, monkeypatch, no_account):
    """What `wandb agent` does with experiments/wandb_sweep.yaml for one setting, but offline, and with a short run."""
    root = Path(__file__).parent.parent
    sweep = yaml.safe_load((root / "experiments" / "wandb_sweep.yaml").read_text())
    short = "--total-steps 128 --num-seeds 2 --devices 1 --eval-episodes 2 --eval-max-steps 5 --network.hidden 4"
    out = tmp_path / "out"
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # where the agent finds python
    for name, value in {"DIR": str(tmp_path), "SWEEP_ID": "thesweep", "RUN_ID": "", "SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    agent = Agent(None, None)
    agent._sweep_command = ["offline" if x == "online" else x for x in sweep["command"]] + short.split()
    agent._sweep_command += ["--out", str(out)]
    chosen = {"ppo.learning_rate": 0.003, "ppo.gamma": 0.95, "ppo.num_epochs": 2}
    assert chosen.keys() == sweep["parameters"].keys()
    arguments = {name: {"value": value} for name, value in chosen.items()}
    agent._command_run({"run_id": "agentsrun", "program": sweep["program"], "args": arguments})
    assert agent._run_processes["agentsrun"].wait(timeout=200) == 0

    _, records = recorded(out)
    (run,) = records["run"]
    assert (run["run_id"], run["sweep_id"], run["run_group"]) == ("agentsrun", "thesweep", "out")
    config = run["config"]["update"]
    assert chosen.items() <= config.items()  # as W&B's parallel coordinates name them
    assert chosen == {f"ppo.{field}": config["ppo"][field] for field in ("learning_rate", "gamma", "num_epochs")}
    (setting,) = read_summary(out)["settings"]
    assert last_summary(records)[sweep["metric"]["name"]] == pytest.approx(setting["iqm"])


def test_several_runs_under_an_agent_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "thesweep")
    configs = {"ppo": PPOConfig(), "network": NetworkConfig()}

    def prepared(sweep: dict[str, Any], **fields: Any) -> None:
        prepare(ppo, actor_critic, configs, RunConfig(num_seeds=2, compile_cache=False, **fields), sweep)

    with pytest.raises(types.UsageError, match=r"which would open 2: set --wandb-per setting"):
        prepared({}, out=tmp_path)
    with pytest.raises(types.UsageError, match=r"which would open 3: .* leave the choice of settings to the agent"):
        prepared({"gamma": [0.8, 0.9, 0.99]}, out=tmp_path, wandb_per="setting")
    prepared({}, out=tmp_path, wandb_per="setting")
    prepared({}, out=tmp_path, wandb="disabled")
    prepared({})  # writes nothing


def test_runs_hold_every_number_of_every_seed_over_env_steps(tmp_path, fake):
    metrics = population()
    metrics["loss"][1, 2, 1] = np.nan
    sink = make_sink(tmp_path)
    log(sink, metrics)
    sink.finish({})
    assert set(fake.runs) == {f"learning_rate={lr}/seed={s}" for lr in (0.001, 0.01) for s in range(3)}
    for h, sweep in enumerate(SWEEP):
        for s in range(3):
            run = fake.runs[f"learning_rate={sweep['learning_rate']}/seed={s}"]
            assert {"project": "project", "group": "group", "dir": tmp_path}.items() <= run.options.items()
            assert run.step_metrics["*"] == "env_steps" and run.has_finished
            expected = []
            for u in range(4):
                row: dict[str, Any] = {"env_steps": 512 * (u + 1), "update": u, "finite": 1}
                if (h, s, u) != (1, 2, 1):
                    row["loss"] = float(str(metrics["loss"][h, s, u]))
                expected.append(row)
            assert run.rows == expected


def test_a_hyperparameter_named_with_its_section_is_replaced_there_alone(tmp_path, fake):
    config = {"ppo": {"gamma": 1.0}, "network": {"gamma": 2.0}}
    sink = WandbSink("offline", "seed", "project", "group", tmp_path, config, [{"ppo.gamma": 0.9}], [0])
    sink.finish({})
    logged = fake.runs["ppo.gamma=0.9/seed=0"].config
    assert (logged["ppo"], logged["network"]) == ({"gamma": 0.9}, {"gamma": 2.0})


def test_config_of_a_run_holds_its_own_settings_hyperparameters(tmp_path, fake):
    sink = make_sink(tmp_path, num_seeds=1)
    sink.finish({})
    config = fake.runs["learning_rate=0.01/seed=0"].config
    assert config["learning_rate"] == 0.01
    assert config["ppo"] == {"learning_rate": 0.01, "gamma": 0.99}
    assert (config["env"], config["seed"], config["member_seed"]) == ("CartPole-v1", 7, 0)


def test_run_per_setting_logs_mean_and_interval_over_the_seeds_that_have_a_value(tmp_path, fake):
    metrics = population()
    metrics["loss"][0, 0, 3] = np.nan
    sink = make_sink(tmp_path, per="setting")
    log(sink, metrics)
    sink.finish({"settings": [{"finals": [1.0, 2.0, 3.0]}, {"finals": [4.0, 5.0, 6.0]}]})
    assert set(fake.runs) == {"learning_rate=0.001", "learning_rate=0.01"}
    run = fake.runs["learning_rate=0.001"]
    assert "member_seed" not in run.config
    assert run.summary["finals"] == [1.0, 2.0, 3.0]
    for u, row in enumerate(run.rows):
        kept = metrics["loss"][0, u == 3 :, u].astype(np.float64)
        lo, hi = stats.t.interval(0.95, len(kept) - 1, kept.mean(), stats.sem(kept))
        expected = {"loss": kept.mean(), "lo/loss": lo, "hi/loss": hi, "finite": 1, "lo/finite": 1, "hi/finite": 1}
        expected |= {"env_steps": 512 * (u + 1), "update": u}
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("per", ["seed", "setting"])
def test_seeds_trained_in_turns_give_the_rows_of_seeds_trained_together(tmp_path, fake, per):
    metrics = population()
    metrics["env_steps"][:, 0, 2:] = 0  # the seed that comes first stops first, and its turn ends after one block
    together = make_sink(tmp_path / "together", per=per)
    log(together, metrics)
    together.finish({})
    expected = fake.runs
    in_turns = make_sink(tmp_path / "in_turns", per=per)
    for h in (0, 1):
        for seeds, starts in (([0], [0]), ([1, 2], [0, 2])):
            for start in starts:
                block = {name: x[h : h + 1, seeds, start : start + 2] for name, x in metrics.items()}
                in_turns.log_block([h], start, block, seeds)
    in_turns.finish({})
    assert set(fake.runs) == set(expected)
    for name, run in fake.runs.items():
        assert run is not expected[name] and run.rows == expected[name].rows


@pytest.mark.parametrize("stopped", [0, np.nan])
def test_stopped_member_logs_no_rows_and_a_setting_none_once_all_have_stopped(tmp_path, fake, stopped):
    metrics = population()
    metrics["env_steps"] = metrics["env_steps"].astype(np.float32)
    metrics["env_steps"][0, :, 3] = stopped
    metrics["env_steps"][0, 1, 1:] = stopped
    for per in ("seed", "setting"):
        sink = make_sink(tmp_path / per, per=per)
        log(sink, metrics)
        sink.finish({})
    assert [len(fake.runs[f"learning_rate=0.001/seed={s}"].rows) for s in range(3)] == [3, 1, 3]
    rows = fake.runs["learning_rate=0.001"].rows
    assert [row["env_steps"] for row in rows] == [512, round(512 * 5 / 3), round(512 * 7 / 3)]  # never back
    assert [row["loss"] for row in rows[1:]] == pytest.approx(metrics["loss"][0, ::2, 1:3].mean(axis=0))


def test_summary_and_picture_go_to_every_run(tmp_path, fake):
    Image.new("RGB", (2, 2)).save(tmp_path / "curves.png")
    mode = {"iqm": 8.0, "finals": [7.0, 8.0, 9.0]}
    summary = {
        "settings": [
            {"hyperparameters": {}, "iqm": 2.0, "interval": [1.0, 3.0], "finals": [1.0, 2.0, np.nan], "mode": mode},
            {"iqm": 5.0, "interval": [4.0, 6.0], "finals": [4.0, 5.0, 6.0]},
        ],
        "run_seconds": 9.0,
    }
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish(summary, [tmp_path / "curves.png", tmp_path / "absent.png"])
    assert [fake.runs[f"learning_rate=0.001/seed={s}"].summary["final"] for s in range(3)] == [1.0, 2.0, None]
    assert fake.runs["learning_rate=0.001/seed=2"].summary["mode"] == {"iqm": 8.0, "final": 9.0}
    for name, run in fake.runs.items():
        assert run.summary["iqm"] == (2.0 if "0.001" in name else 5.0)
        assert run.summary["interval"] == ([1.0, 3.0] if "0.001" in name else [4.0, 6.0])
        assert run.summary["run_seconds"] == 9.0
        assert not {"finals", "hyperparameters", "settings"} & set(run.summary)
        (picture,) = run.rows[-1].items()
        assert picture[0] == "curves" and isinstance(picture[1], wandb.Image)
        assert len(run.rows) == 5


@pytest.mark.parametrize("per", ["seed", "setting"])
def test_what_a_seed_answered_to_prompts_is_a_table_of_its_own_run(tmp_path, fake, per):
    responses = [[{"prompt": "1 2 ", "response": f"{s}", "reward": 0.5 * s}] for s in range(3)]
    sink = make_sink(tmp_path, per=per)
    sink.finish({"settings": [{"finals": [0.0, 0.5, 1.0], "responses": responses}, {"finals": [0.0, 0.0, 0.0]}]})
    tables = {name: row["responses"] for name, run in fake.runs.items() for row in run.rows}
    assert set(tables) == ({f"learning_rate=0.001/seed={s}" for s in range(3)} if per == "seed" else set())
    for s, table in enumerate(tables.values()):
        assert (table.columns, table.data) == (["prompt", "response", "reward"], [["1 2 ", f"{s}", 0.5 * s]])
    assert not any("responses" in run.summary for run in fake.runs.values())


def test_a_log_call_that_raises_is_said_once_and_the_rows_after_it_arrive(tmp_path, fake, monkeypatch, capsys):
    log_row = FakeRun.log

    def fail_in_the_first_block(run, row):
        if row["update"] < 2:
            raise ConnectionResetError("lost the service\nand more")
        log_row(run, row)

    monkeypatch.setattr(FakeRun, "log", fail_in_the_first_block)
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish({})
    (line,) = capsys.readouterr().err.splitlines()
    assert "ConnectionResetError: lost the service" in line
    for run in fake.runs.values():
        assert [row["update"] for row in run.rows] == [2, 3]


@pytest.mark.parametrize("method", ["init", "finish"])
def test_an_init_or_finish_that_raises_is_said_once_and_stops_nothing(tmp_path, fake, monkeypatch, capsys, method):
    def fail(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(*((wandb, "init") if method == "init" else (FakeRun, "finish")), fail)
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish({"run_seconds": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert "OSError: no space" in line
    assert all(len(run.rows) == 4 and run.summary == {"run_seconds": 1.0} for run in fake.opened)


def test_a_crash_of_the_thread_is_said_once_and_stops_nothing(tmp_path, fake, capsys):
    sink = make_sink(tmp_path)
    sink.log_block([0, 1], 0, {"loss": np.zeros((2, 3, 1))})  # no env_steps: a mistake of the caller
    sink.finish({})
    log(sink, population())
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'env_steps'" in line


@pytest.mark.parametrize("failure", [UsageError("No API key"), CommError("timed out")])
def test_what_cannot_go_online_is_recorded_offline_after_one_try(tmp_path, fake, capsys, failure):
    fake.online_error = failure
    sink = make_sink(tmp_path, mode="online")
    log(sink, population())
    sink.finish({})
    assert fake.modes == ["online"] + 6 * ["offline"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot go online ({type(failure).__name__}: {failure}); recording offline" in line
    assert [len(run.rows) for run in fake.runs.values()] == 6 * [4]


def test_a_run_that_can_be_opened_neither_online_nor_offline_is_tried_online_once(tmp_path, monkeypatch, fake, capsys):
    modes = []

    def fail(**options):
        modes.append(options["mode"])
        raise OSError("no space")

    monkeypatch.setattr(wandb, "init", fail)
    make_sink(tmp_path, mode="online").finish({})
    assert modes == ["online"] + 6 * ["offline"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_log_block_does_not_wait_for_a_run_that_hangs_and_finish_gives_up(tmp_path, fake, monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **kwargs: release.wait(60))
    monkeypatch.setattr(sink_module, "PATIENCE_SECONDS", 0.3)
    start = time.monotonic()
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish({})
    assert 0.3 < time.monotonic() - start < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert "gave up waiting" in line
    release.set()
    for thread in threading.enumerate():
        if thread.name == "wandb-sink":
            thread.join(60)


def test_runs_of_an_unswept_setting_are_named_for_their_seed(tmp_path, fake):
    for per in ("seed", "setting"):
        WandbSink("offline", per, "project", "group", tmp_path, {}, [{}], [3, 4]).finish({})
    assert set(fake.runs) == {"seed=3", "seed=4", "all seeds"}


def test_disabled_sink_starts_and_writes_nothing(tmp_path, fake):
    threads = threading.active_count()
    sink = make_sink(tmp_path, mode="disabled")
    assert threading.active_count() == threads
    log(sink, population())
    sink.finish({})
    assert fake.modes == [] and list(tmp_path.iterdir()) == []


def test_a_thinned_row_is_the_mean_over_the_active_and_finite_updates_of_its_share():
    nan = np.nan
    active = np.array([True, True, True, True, False, False, False])
    columns = {
        "env_steps": np.array([10, 20, 30, 40, 40, 40, 40]),
        "episode_return": np.array([1.0, nan, 5.0, 7.0, 9.0, 9.0, 9.0], np.float32),
        "value_loss": np.array([nan, nan, nan, 2.0, 9.0, 9.0, 9.0], np.float32),
        "finite": np.array([True, True, True, False, True, True, True]),
        "num_episodes": np.array([3, 5, 1, 2, 0, 0, 0], np.int32),
    }
    last, rows = thinned(columns, active, 3)
    np.testing.assert_array_equal(last, [2, 3])
    expected = {
        "env_steps": [30, 40],
        "episode_return": [3, 7],
        "value_loss": [nan, 2],
        "finite": [1, 0],
        "num_episodes": [3, 2],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values, err_msg=name)
    last, rows = thinned(columns, active, 1)
    np.testing.assert_array_equal(last, [0, 1, 2, 3])
    np.testing.assert_array_equal(rows["num_episodes"], [3, 5, 1, 2])
    assert rows["finite"].dtype != bool
