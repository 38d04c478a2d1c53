"""The out folder: what it holds, what it refuses, and what it survives."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import read_log

from purepg.run.folder import files
from purepg.run.folder.files import RecordError, new_folder
from purepg.run.folder.record import Record
from purepg.run.sweep import label_of
from purepg.types import UsageError

SEEDS = [0, 1, 2]
resource = pytest.importorskip("resource")  # a file size limit is the disk that is full


@contextlib.contextmanager
def file_size_limit(num_bytes: int):
    """Within it no file grows past `num_bytes`: the write that would takes a part, and the next raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def block(num_settings: int, num_updates: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (num_settings, 3, num_updates)
    return {
        "loss": rng.normal(size=shape).astype(np.float32),
        "env_steps": rng.integers(1, 2**20, shape),
        "finite": rng.random(shape) < 0.5,
    }


def test_log_reads_back_to_the_bit(tmp_path):
    logged = block(2, 7)
    with Record.open(tmp_path) as record:
        for start in (0, 4):
            part = {name: value[..., start : start + 4] for name, value in logged.items()}
            record.append_block([0, 1], start, part, SEEDS)
    metrics = read_log(tmp_path / "log.jsonl")
    assert metrics.keys() == logged.keys()
    for name, value in logged.items():
        np.testing.assert_array_equal(metrics[name].astype(value.dtype), value)


def test_log_is_on_disk_before_append_block_returns(tmp_path):
    with Record.open(tmp_path) as record:
        record.append_block([0], 0, block(1, 2), SEEDS)
        assert read_log(tmp_path / "log.jsonl")["loss"].shape == (1, 3, 2)


def test_log_writes_float32_in_its_shortest_form_nan_as_null_and_infinities_as_text(tmp_path):
    value = np.array([[[0.1, np.nan, np.inf, -np.inf]]], np.float32)
    with Record.open(tmp_path) as record:
        record.append_block([3], 20, {"loss": value, "finite": value > 0}, [0])
    metrics = '{"loss":[[[0.1,null,"inf","-inf"]]],"finite":[[[true,false,true,false]]]}'
    line = f'{{"settings":[3],"seeds":[0],"start":20,"metrics":{metrics}}}\n'
    assert (tmp_path / "log.jsonl").read_text() == line


def test_log_of_settings_that_differ_in_length_is_padded_with_nan(tmp_path):
    with Record.open(tmp_path) as record:
        record.append_block([0, 2], 0, {"loss": np.ones((2, 3, 2), np.float32)}, SEEDS)
        record.append_block([1], 0, {"loss": np.full((1, 3, 4), 2, np.float32)}, SEEDS)
    expected = np.full((3, 3, 4), np.nan)
    expected[[0, 2], :, :2] = 1
    expected[1] = 2
    np.testing.assert_array_equal(read_log(tmp_path / "log.jsonl")["loss"], expected)


def test_log_of_seeds_trained_in_turns_puts_each_where_it_belongs(tmp_path):
    with Record.open(tmp_path) as record:
        for seeds in ([0, 1], [2]):
            value = np.array(seeds, np.float32)[None, :, None] * np.ones((1, 1, 2), np.float32)
            record.append_block([1], 0, {"loss": value}, seeds)
    expected = np.full((2, 3, 2), np.nan)
    expected[1] = [[0, 0], [1, 1], [2, 2]]
    np.testing.assert_array_equal(read_log(tmp_path / "log.jsonl")["loss"], expected)


def test_log_of_a_killed_run_loses_no_more_than_its_last_line(tmp_path):
    logged = block(1, 2)
    with Record.open(tmp_path) as record:
        record.append_block([0], 0, logged, SEEDS)
        record.append_block([0], 2, logged, SEEDS)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first, first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        np.testing.assert_array_equal(read_log(path)["loss"].astype(np.float32), logged["loss"])
    path.write_bytes(whole[: first - 1])
    assert read_log(path) == {}


def test_full_disk_costs_the_blocks_that_did_not_fit_and_is_said_once(tmp_path, capsys):
    logged = block(1, 2)
    with Record.open(tmp_path) as record:
        record.append_block([0], 0, logged, SEEDS)
        size = (tmp_path / "log.jsonl").stat().st_size
        with file_size_limit(size + size // 2):
            record.append_block([0], 2, logged, SEEDS)
            record.append_block([0], 4, logged, SEEDS)
            assert (tmp_path / "log.jsonl").stat().st_size == size
        record.append_block([0], 6, logged, SEEDS)
    loss = read_log(tmp_path / "log.jsonl")["loss"]
    np.testing.assert_array_equal(loss[..., :2].astype(np.float32), logged["loss"])
    np.testing.assert_array_equal(loss[..., 6:].astype(np.float32), logged["loss"])
    assert np.isnan(loss[..., 2:6]).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert "log.jsonl" in line
    assert "goes on" in line


@pytest.mark.parametrize(
    "write",
    [
        lambda record: record.write_metrics(block(2, 500), np.array([500, 500])),
        lambda record: record.write_summary({"finals": list(range(1000))}),
        lambda record: record.write_config({"finals": list(range(1000))}),
    ],
)
def test_final_write_that_fails_says_one_line_and_leaves_what_was_there(tmp_path, write):
    with Record.open(tmp_path) as record:
        record.write_summary({"old": 1})
        with (
            file_size_limit(500),
            pytest.raises(RecordError, match=r"cannot write .*(metrics|summary|config)") as error,
        ):
            write(record)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"old": 1}


def test_metrics_file_holds_every_metric_and_the_updates_of_each_setting(tmp_path):
    metrics = block(2, 5)
    with Record.open(tmp_path) as record:
        record.write_metrics(metrics, np.array([5, 3]))
    with np.load(tmp_path / "metrics.npz") as file:
        assert set(file) == {*metrics, "num_updates"}
        np.testing.assert_array_equal(file["num_updates"], [5, 3])
        for name, value in metrics.items():
            np.testing.assert_array_equal(file[name], value)
            assert file[name].dtype == value.dtype


def test_summary_and_config_are_valid_json_whatever_they_are_given(tmp_path):
    value = {
        "interval": (float("nan"), np.inf),
        "finals": np.array([1.5, np.nan], np.float32),
        "rate": np.float32(0.1),
        "count": np.int64(3),
        "on": np.True_,
        "none": None,
        "out": Path("runs"),
        "nested": {"widths": (64, 64)},
    }
    with Record.open(tmp_path) as record:
        record.write_summary(value)
        record.write_config(value)
    for name in ("summary.json", "config.json"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail) == {
            "interval": [None, None],
            "finals": [1.5, None],
            "rate": 0.1,
            "count": 3,
            "on": True,
            "none": None,
            "out": "runs",
            "nested": {"widths": [64, 64]},
        }


def test_open_makes_the_folder_and_its_parents(tmp_path):
    with Record.open(tmp_path / "a" / "b") as record:
        assert record.folder.is_dir()


def test_open_refuses_a_folder_that_holds_a_run_and_leaves_it_alone(tmp_path):
    with Record.open(tmp_path) as record:
        record.append_block([0], 0, block(1, 2), SEEDS)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"already holds a run .*--overwrite"):
        Record.open(tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "metrics.npz", "summary.json", "curves.png"])
def test_open_refuses_a_folder_that_holds_any_file_a_run_would_write(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=name):
        Record.open(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    for name in ("config.json", "log.jsonl", "metrics.npz", "summary.json", "curves.png", "notes.md", "wandb/run/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    with Record.open(tmp_path, overwrite=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "notes.md"]
        assert (tmp_path / "log.jsonl").read_text() == ""


def test_overwrite_leaves_the_wandb_folder_of_a_folder_without_a_run(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "other").write_text("mine")
    with Record.open(tmp_path, overwrite=True):
        assert (tmp_path / "wandb" / "other").read_text() == "mine"


def test_overwrite_removes_a_link_to_a_wandb_folder_and_not_what_it_points_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other").write_text("mine")
    out = tmp_path / "out"
    Record.open(out).close()
    (out / "wandb").symlink_to(elsewhere)
    with Record.open(out, overwrite=True):
        assert not (out / "wandb").exists()
    assert (elsewhere / "other").read_text() == "mine"


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_open_says_in_one_line_that_a_file_is_in_the_way(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write a run to .*: \w.*; choose another --out") as error:
        Record.open(tmp_path / out)
    assert len(str(error.value).splitlines()) == 1


def test_open_says_in_one_line_that_it_may_not_write(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop a test that runs as root
    with pytest.raises(UsageError, match=r"cannot write a run to .*: Permission denied; choose another --out"):
        Record.open(tmp_path)


def test_new_folders_of_one_second_differ_and_are_named_for_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "strftime", lambda form: "20260102-030405")
    folders = [new_folder("experiments/ppo.py", root=tmp_path / "runs") for _ in range(3)]
    assert [folder.name for folder in folders] == [f"ppo-20260102-030405{end}" for end in ("", "-2", "-3")]
    for folder in folders:
        Record.open(folder).close()


def test_new_folder_under_a_file_says_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match=r"cannot make .*runs.*choose another --out"):
        new_folder("ppo", root=tmp_path / "runs")


def test_label_of_names_every_swept_value_and_nothing_where_nothing_is_swept():
    assert label_of({"learning_rate": 0.001, "clip_eps": 0.1}) == "learning_rate=0.001,clip_eps=0.1"
    assert label_of({}) == ""


def test_samples_replace_those_of_later_updates_whatever_separates_lines_in_them(tmp_path):
    samples = [[[{"response": text} for text in ("a\u2028b", "c\x85d", "e\r\nf")]]]
    with Record.open(tmp_path) as record:
        for update in (0, 2, 1):
            record.write_samples([0], [0], np.array([[update]]), samples)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    assert [row["update"] for row in rows] == [0] * 3 + [1] * 3
    assert [row["response"] for row in rows[3:]] == ["a\u2028b", "c\x85d", "e\r\nf"]
