"""Weights & Biases: what an offline run's file holds, and that no failure of W&B reaches the training.

The offline file is read back here without W&B's own reader: a header of 7 bytes, then blocks of 32 KiB of records
(crc u32, length u16, kind u8, data), a long record in pieces; each is a protobuf `Record`.
"""

import importlib
import json
import struct
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats

from purepg.run import wandb_sink
from purepg.run.wandb_sink import WandbSink, thinned

BLOCK = 2**15
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
CONFIG = {"env": "CartPole-v1", "seed": 7, "ppo": {"learning_rate": 1.0, "gamma": 0.99}}
SWEEP = [{"learning_rate": 0.001}, {"learning_rate": 0.01}]


class Logged(NamedTuple):
    """What one run's file holds."""

    name: str
    group: str
    project: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    step_metrics: dict[str, str]  # of a metric (or all that a pattern names): its x axis


def records(path: Path) -> list[Any]:
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")  # makes its classes as it is imported
    data = path.read_bytes()
    assert data[:4] in (b"", b":W&B")
    position, whole, found = 7, b"", []
    while position + 7 <= len(data):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < 7:  # no room for a record's header: filled with zeros
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):  # still being written
            break
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            found.append(proto.Record.FromString(whole))
            whole = b""
    return found


def records_of_ended_run(path: Path) -> list[Any]:
    """Waits for the run's last record: W&B's service writes the file's end a moment after `finish` has returned."""
    deadline = time.monotonic() + 10
    while True:
        found = records(path)
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.01)


def items(entries) -> dict[str, Any]:
    return {"/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


def logged_runs(out: Path) -> dict[str, Logged]:
    """Every offline run below `out`, by name."""
    runs = {}
    for path in out.glob("wandb/offline-run-*/*.wandb"):
        found = records_of_ended_run(path)
        (run,) = (record.run for record in found if record.HasField("run"))
        summary = {}
        for record in found:
            if record.HasField("summary"):
                summary |= items(record.summary.update)
        runs[run.display_name] = Logged(
            run.display_name,
            run.run_group,
            run.project,
            items(run.config.update),
            [items(record.history.item) for record in found if record.HasField("history")],
            summary,
            {
                record.metric.name or record.metric.glob_name: record.metric.step_metric
                for record in found
                if record.HasField("metric")
            },
        )
    return runs


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


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what W&B itself adds."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No account and no settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def test_offline_files_hold_every_number_of_every_seed_over_env_steps(tmp_path):
    metrics = population()
    metrics["loss"][1, 2, 1] = np.nan
    sink = make_sink(tmp_path)
    log(sink, metrics)
    sink.finish({})
    runs = logged_runs(tmp_path)
    assert set(runs) == {f"learning_rate={lr}/seed={s}" for lr in (0.001, 0.01) for s in range(3)}
    for h, sweep in enumerate(SWEEP):
        for s in range(3):
            run = runs[f"learning_rate={sweep['learning_rate']}/seed={s}"]
            assert (run.project, run.group) == ("project", "group")
            assert run.step_metrics["*"] == "env_steps"
            expected = []
            for u in range(4):
                row: dict[str, Any] = {"env_steps": 512 * (u + 1), "update": u, "finite": 1}
                if (h, s, u) != (1, 2, 1):
                    row["loss"] = float(str(metrics["loss"][h, s, u]))
                expected.append(row)
            assert [numbers(row) for row in run.rows] == expected


def test_a_hyperparameter_named_with_its_section_is_replaced_there_alone(tmp_path):
    config = {"ppo": {"gamma": 1.0}, "network": {"gamma": 2.0}}
    sink = WandbSink("offline", "seed", "project", "group", tmp_path, config, [{"ppo.gamma": 0.9}], [0])
    sink.finish({})
    logged = logged_runs(tmp_path)["ppo.gamma=0.9/seed=0"].config
    assert (logged["ppo"], logged["network"]) == ({"gamma": 0.9}, {"gamma": 2.0})


def test_config_of_a_run_holds_its_own_settings_hyperparameters(tmp_path):
    sink = make_sink(tmp_path, num_seeds=1)
    sink.finish({})
    config = logged_runs(tmp_path)["learning_rate=0.01/seed=0"].config
    assert config["learning_rate"] == 0.01
    assert config["ppo"] == {"learning_rate": 0.01, "gamma": 0.99}
    assert (config["env"], config["seed"], config["member_seed"]) == ("CartPole-v1", 7, 0)


def test_run_per_setting_logs_mean_and_interval_over_the_seeds_that_have_a_value(tmp_path):
    metrics = population()
    metrics["loss"][0, 0, 3] = np.nan
    sink = make_sink(tmp_path, per="setting")
    log(sink, metrics)
    sink.finish({"settings": [{"finals": [1.0, 2.0, 3.0]}, {"finals": [4.0, 5.0, 6.0]}]})
    runs = logged_runs(tmp_path)
    assert set(runs) == {"learning_rate=0.001", "learning_rate=0.01"}
    run = runs["learning_rate=0.001"]
    assert "member_seed" not in run.config
    assert run.summary["finals"] == [1.0, 2.0, 3.0]
    for u, row in enumerate(run.rows):
        kept = metrics["loss"][0, u == 3 :, u].astype(np.float64)
        lo, hi = stats.t.interval(0.95, len(kept) - 1, kept.mean(), stats.sem(kept))
        expected = {"loss": kept.mean(), "lo/loss": lo, "hi/loss": hi, "finite": 1, "lo/finite": 1, "hi/finite": 1}
        expected |= {"env_steps": 512 * (u + 1), "update": u}
        assert numbers(row) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("per", ["seed", "setting"])
def test_seeds_trained_in_turns_give_the_rows_of_seeds_trained_together(tmp_path, per):
    metrics = population()
    metrics["env_steps"][:, 0, 2:] = 0  # the seed that comes first stops first, and its turn ends after one block
    together = make_sink(tmp_path / "together", per=per)
    log(together, metrics)
    together.finish({})
    in_turns = make_sink(tmp_path / "in_turns", per=per)
    for h in (0, 1):
        for seeds, starts in (([0], [0]), ([1, 2], [0, 2])):
            for start in starts:
                block = {name: x[h : h + 1, seeds, start : start + 2] for name, x in metrics.items()}
                in_turns.log_block([h], start, block, seeds)
    in_turns.finish({})
    expected, found = logged_runs(tmp_path / "together"), logged_runs(tmp_path / "in_turns")
    assert set(found) == set(expected)
    for name, run in found.items():
        assert [numbers(row) for row in run.rows] == [numbers(row) for row in expected[name].rows]


@pytest.mark.parametrize("stopped", [0, np.nan])
def test_stopped_member_logs_no_rows_and_a_setting_none_once_all_have_stopped(tmp_path, stopped):
    metrics = population()
    metrics["env_steps"] = metrics["env_steps"].astype(np.float32)
    metrics["env_steps"][0, :, 3] = stopped
    metrics["env_steps"][0, 1, 1:] = stopped
    for per in ("seed", "setting"):
        sink = make_sink(tmp_path / per, per=per)
        log(sink, metrics)
        sink.finish({})
    per_seed = logged_runs(tmp_path / "seed")
    assert [len(per_seed[f"learning_rate=0.001/seed={s}"].rows) for s in range(3)] == [3, 1, 3]
    rows = logged_runs(tmp_path / "setting")["learning_rate=0.001"].rows
    assert [row["env_steps"] for row in rows] == [512, round(512 * 5 / 3), round(512 * 7 / 3)]  # never back
    assert [row["loss"] for row in rows[1:]] == pytest.approx(metrics["loss"][0, ::2, 1:3].mean(axis=0))


def test_rows_longer_than_a_block_of_the_file_read_back(tmp_path):
    metrics = population(num_seeds=1) | {f"metric_{i}": np.full((2, 1, 4), i) for i in range(2000)}
    sink = make_sink(tmp_path, num_seeds=1)
    log(sink, metrics)
    sink.finish({})
    for run in logged_runs(tmp_path).values():
        assert [row["metric_1999"] for row in run.rows] == [1999] * 4


def test_summary_and_picture_go_to_every_run(tmp_path):
    from matplotlib.figure import Figure

    Figure().savefig(tmp_path / "curves.png")
    mode = {"iqm": 8.0, "finals": [7.0, 8.0, 9.0]}
    summary = {
        "settings": [
            {"hyperparameters": {}, "iqm": 2.0, "interval": [1.0, 3.0], "finals": [1.0, 2.0, np.nan], "mode": mode},
            {"env_steps": 6144, "iqm": 5.0, "interval": [4.0, 6.0], "finals": [4.0, 5.0, 6.0]},
        ],
        "run_seconds": 9.0,
    }
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish(summary, [tmp_path / "curves.png", tmp_path / "absent.png"])
    runs = logged_runs(tmp_path)
    assert [runs[f"learning_rate=0.001/seed={s}"].summary["final"] for s in range(3)] == [1.0, 2.0, None]
    assert runs["learning_rate=0.001/seed=2"].summary["mode"] == {"iqm": 8.0, "final": 9.0}
    for name, run in runs.items():
        assert run.summary["iqm"] == (2.0 if "0.001" in name else 5.0)
        assert run.summary["interval"] == ([1.0, 3.0] if "0.001" in name else [4.0, 6.0])
        assert run.summary["run_seconds"] == 9.0
        assert run.summary["env_steps"] == 2048  # its own, not the setting's
        assert not {"finals", "hyperparameters", "settings"} & set(run.summary)
        assert run.rows[-1]["curves/_type"] == "image-file"
        assert len(run.rows) == 5
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 6


def test_a_log_call_that_raises_is_said_once_and_the_rows_after_it_arrive(tmp_path, monkeypatch, capsys):
    import wandb

    log_row = wandb.Run.log

    def fail_in_the_first_block(run, row, *args, **kwargs):
        if row["update"] < 2:
            raise ConnectionResetError("lost the service\nand more")
        log_row(run, row, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", fail_in_the_first_block)
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish({})
    (line,) = capsys.readouterr().err.splitlines()
    assert "ConnectionResetError: lost the service" in line
    for run in logged_runs(tmp_path).values():
        assert [row["update"] for row in run.rows] == [2, 3]


@pytest.mark.parametrize("method", ["init", "finish"])
def test_an_init_or_finish_that_raises_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys, method):
    import wandb

    def fail(*args, **kwargs):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(*((wandb, "init") if method == "init" else (wandb.Run, "finish")), fail)
        sink = make_sink(tmp_path)
        log(sink, population())
        sink.finish({"run_seconds": 1.0})
    wandb.teardown()  # ends what this test left open
    (line,) = capsys.readouterr().err.splitlines()
    assert "OSError: no space" in line


def test_a_crash_of_the_thread_is_said_once_and_stops_nothing(tmp_path, capsys):
    sink = make_sink(tmp_path)
    sink.log_block([0, 1], 0, {"loss": np.zeros((2, 3, 1))})  # no env_steps: a mistake of the caller
    sink.finish({})
    log(sink, population())
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'env_steps'" in line


def test_missing_key_falls_back_to_offline_and_is_said_once(tmp_path, capsys):
    sink = make_sink(tmp_path, mode="online")
    log(sink, population())
    sink.finish({})
    (line,) = capsys.readouterr().err.splitlines()
    assert "No API key" in line
    assert "offline" in line
    assert [len(run.rows) for run in logged_runs(tmp_path).values()] == 6 * [4]


def test_dead_network_falls_back_to_offline_after_one_try(tmp_path, monkeypatch, capsys):
    import wandb

    init, modes = wandb.init, []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: (modes.append(kwargs["mode"]), init(**kwargs))[1])
    monkeypatch.setattr(wandb_sink, "INIT_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    wandb.teardown()  # W&B reads the environment once
    try:
        sink = make_sink(tmp_path, mode="online")
        log(sink, population())
        sink.finish({})
    finally:
        wandb.teardown()
    assert modes == ["online"] + 6 * ["offline"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot go online" in line
    assert [len(run.rows) for run in logged_runs(tmp_path).values()] == 6 * [4]


def test_log_block_does_not_wait_for_a_run_that_hangs_and_finish_gives_up(tmp_path, monkeypatch, capsys):
    import wandb

    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **kwargs: release.wait(60))
    monkeypatch.setattr(wandb_sink, "PATIENCE_SECONDS", 0.3)
    start = time.monotonic()
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish({})
    assert 0.3 < time.monotonic() - start < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert "gave up waiting" in line
    release.set()


def test_runs_of_an_unswept_setting_are_named_for_their_seed(tmp_path):
    for per in ("seed", "setting"):
        WandbSink("offline", per, "project", "group", tmp_path, {}, [{}], [3, 4]).finish({})
    assert set(logged_runs(tmp_path)) == {"seed=3", "seed=4", "all seeds"}


def test_a_run_id_in_the_environment_does_not_make_all_runs_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")
    import wandb

    wandb.teardown()
    try:
        sink = make_sink(tmp_path)
        sink.finish({})
    finally:
        wandb.teardown()
    assert len(logged_runs(tmp_path)) == 6


def test_disabled_sink_starts_and_writes_nothing(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", pytest.fail)
    threads = threading.active_count()
    sink = make_sink(tmp_path, mode="disabled")
    assert threading.active_count() == threads
    log(sink, population())
    sink.finish({})
    assert list(tmp_path.iterdir()) == []


def test_terminal_stays_silent(tmp_path, capfd):
    sink = make_sink(tmp_path)
    log(sink, population())
    sink.finish({})
    assert capfd.readouterr() == ("", "")


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
