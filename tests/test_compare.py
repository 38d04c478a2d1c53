"""experiments/compare.py on fabricated runs: what it prints against numbers by hand, and what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import EMPTY_CONFIG
from parts.compare import gather
from scipy import stats

from purepg.run.study import main

SCRIPT = Path(__file__).parent.parent / "experiments" / "compare.py"
SPEC = importlib.util.spec_from_file_location("compare", SCRIPT)
assert SPEC and SPEC.loader
compare = importlib.util.module_from_spec(SPEC)
sys.modules["compare"] = compare
SPEC.loader.exec_module(compare)

GOOD = [500.0, 490.0, 480.0, 500.0, 470.0, 460.0, 500.0, 300.0]
BAD = [100.0, 480.0, 120.0, 90.0, 110.0, 130.0, 95.0, 105.0]


def save(folder, *finals, env="CartPole-v1", settings=None, **changes):
    """A run's folder with the finals of each setting; `mode` scores 1 more and `training` 2 more."""
    settings = settings or [{}] * len(finals)
    folder.mkdir(parents=True)
    run = {"env": env, "total_steps": 1000, "eval_episodes": 8, "eval_max_steps": None}
    (folder / "config.json").write_text(
        json.dumps(EMPTY_CONFIG | {"script": "ppo", "run": run | changes, "settings": settings})
    )
    entries = [
        {
            "hyperparameters": setting,
            "finals": scores,
            "mode": {"finals": [None if x is None else x + 1 for x in scores]},
            "training": {"finals": [None if x is None else x + 2 for x in scores]},
            "diverged": [],
        }
        for setting, scores in zip(settings, finals, strict=True)
    ]
    (folder / "summary.json").write_text(json.dumps({"settings": entries, "interrupted": False}))
    return str(folder)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """The whole command line: (what it printed, numbers.json)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py"])

    def call(*arguments):
        main(compare.study, compare.Config(), arguments=["--out", "out", *arguments])
        assert (Path("out") / "figure.png").stat().st_size < 200_000
        return capsys.readouterr().out, json.loads((Path("out") / "numbers.json").read_text())

    return call


@pytest.fixture
def refuse(tmp_path, capsys, monkeypatch):
    """The one line with which the command line refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py"])

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(compare.study, compare.Config(), arguments=arguments)
        said = capsys.readouterr()
        assert exit.value.code == 2 and not said.out and said.err.count("\n") == 1
        assert not Path("runs").exists() or not list(Path("runs").glob("compare-*"))
        return said.err

    return call


def test_two_runs_are_compared_and_the_numbers_are_scipys(run, tmp_path):
    text, numbers = run(save(tmp_path / "a", GOOD), save(tmp_path / "b", BAD), "--target", "500")
    for label, scores in (("a", GOOD), ("b", BAD)):
        found = {name: number["value"] for name, number in numbers["aggregates"][label].items()}
        gap = sum(500 - x for x in scores) / 8
        expected = {
            "IQM": stats.trim_mean(scores, 0.25),
            "median": np.median(scores),
            "mean": np.mean(scores),
            "optimality gap": gap,
        }
        assert found == pytest.approx(expected, rel=1e-12)
        assert all(number["low"] < number["value"] < number["high"] for number in numbers["aggregates"][label].values())
    (pair,) = numbers["pairs"]
    test = stats.mannwhitneyu(GOOD, BAD)
    assert (pair["x"], pair["y"], pair["p"]) == ("a", "b", test.pvalue)
    assert pair["probability"]["value"] == test.statistic / 64 == (7 * 8 + 7 - 2.5) / 64  # 470, 460 < 480; 480 = 480
    assert f"| a     |  CartPole-v1 |     8 | {stats.trim_mean(GOOD, 0.25):.1f} [" in text
    assert (tmp_path / "out" / "report.txt").read_text() + "wrote out\n" == text


def test_the_profile_starts_at_one_ends_at_zero_and_lies_in_its_band(run, tmp_path):
    _, numbers = run(save(tmp_path / "a", GOOD), save(tmp_path / "b", BAD))
    threshold = np.array(numbers["threshold"])
    for label, scores in (("a", GOOD), ("b", BAD)):
        value, low, high = np.array(numbers["profiles"][label])
        np.testing.assert_array_equal(value, [np.mean(np.array(scores) > tau) for tau in threshold])
        assert value[0] == 1 and value[-1] == 0 and (low <= value).all() and (value <= high).all()


def test_without_a_target_there_is_no_optimality_gap_and_it_is_said(run, tmp_path):
    text, numbers = run(save(tmp_path / "a", GOOD))
    assert "No optimality gap" in text and list(numbers["aggregates"]["a"]) == ["IQM", "median", "mean"]
    assert numbers["pairs"] == []


@pytest.mark.parametrize(("scores", "more"), [("sampled", 0.0), ("mode", 1.0), ("training", 2.0)])
def test_scores_chooses_which_numbers_are_compared(run, tmp_path, scores, more):
    _, numbers = run(save(tmp_path / "a", GOOD), "--scores", scores)
    assert numbers["scores"]["a"] == [[x + more for x in GOOD]]


def test_every_setting_of_a_run_is_a_row_and_best_takes_that_with_the_highest_iqm(tmp_path):
    settings = [{"gamma": 0.9}, {"gamma": 0.99}]
    # The second has the higher IQM, the first the higher mean.
    sweep = Path(save(tmp_path / "sweep", [1.0, 1.0, 1.0, 99.0], [2.0, 2.0, 2.0, 2.0], settings=settings))
    other = Path(save(tmp_path / "other", GOOD))
    rows, _ = gather([sweep], None, "sampled", False)
    assert [row.label for row in rows] == ["gamma=0.9", "gamma=0.99"]
    rows, _ = gather([sweep, other], "ppo, a2c", "sampled", False)
    assert [row.label for row in rows] == ["ppo gamma=0.9", "ppo gamma=0.99", "a2c"]
    rows, notes = gather([sweep, other], None, "sampled", True)
    assert [(row.label, row.score[0]) for row in rows] == [("sweep", 2.0), ("other", 500.0)]
    assert len(notes) == 1 and "gamma=0.99, the best of 2" in notes[0]


def test_environments_are_strata_of_normalised_scores(run, tmp_path):
    runs = [
        save(tmp_path / "1", [0.0, 500.0], env="CartPole-v1"),
        save(tmp_path / "2", [-1200.0, -200.0, -450.0], env="Pendulum-v1"),
        save(tmp_path / "3", [250.0, 250.0], env="CartPole-v1"),
        save(tmp_path / "4", [-200.0, -200.0, -200.0], env="Pendulum-v1"),
    ]
    text, numbers = run(
        *runs, "--labels", "a,a,b,b", "--range", "CartPole-v1=0,500", "--range", "Pendulum-v1=-1200,-200"
    )
    assert numbers["scores"] == {"a": [[0.0, 1.0], [0.0, 1.0, 0.75]], "b": [[0.5, 0.5], [1.0, 1.0, 1.0]]}
    assert numbers["aggregates"]["a"]["mean"]["value"] == pytest.approx(2.75 / 5)
    assert numbers["aggregates"]["a"]["optimality gap"]["value"] == pytest.approx(2.25 / 5)  # the target is 1
    assert numbers["aggregates"]["b"]["mean"] == pytest.approx({"value": 0.8, "low": 0.8, "high": 0.8})
    (pair,) = numbers["pairs"]
    assert pair["probability"]["value"] == pytest.approx((0.5 + 0.5 / 3) / 2) and pair["p"] is None
    assert "| a     |            2 | 2 + 3 |" in text


def test_of_many_labels_the_report_has_the_pairs_with_the_first_and_the_numbers_have_all(run, tmp_path):
    settings = [{"gamma": gamma / 10} for gamma in range(9)]
    text, numbers = run(save(tmp_path / "a", *[[x, 2 * x, x - 1] for x in range(9)], settings=settings))
    assert len(numbers["pairs"]) == 36
    rows = [line.split()[1] for line in text.split("P(X > Y)")[1].splitlines() if line.startswith("| gamma")]
    assert rows == ["gamma=0.0"] * 8 and "The pairs without the first are in numbers.json." in text


def test_one_seed_has_no_interval_and_that_is_said(run, tmp_path):
    text, numbers = run(save(tmp_path / "a", [5.0]), save(tmp_path / "b", [4.0]))
    assert "A single seed has no interval." in text and "5.000 |" in text and "1.000 |" in text
    assert numbers["aggregates"]["a"]["IQM"] == {"value": 5.0, "low": None, "high": None}


def test_a_seed_without_a_score_leaves_its_setting_out_and_is_named(run, refuse, tmp_path):
    half = save(tmp_path / "half", [1.0, None, 3.0], [1.0, 2.0, 3.0], settings=[{"gamma": 0.9}, {"gamma": 0.99}])
    text, numbers = run(half)
    assert "gamma=0.9 on CartPole-v1 is left out: no score of seed 1." in text
    assert list(numbers["scores"]) == ["gamma=0.99"]
    assert "nothing to compare" in refuse(save(tmp_path / "none", [None, 1.0]))


def test_a_diverged_seed_counts_and_is_said_and_so_are_unequal_budgets(tmp_path):
    a, b = Path(save(tmp_path / "a", GOOD)), Path(save(tmp_path / "b", BAD, total_steps=2000))
    summary = json.loads((a / "summary.json").read_text())
    summary["settings"][0]["diverged"] = [{"seed": 7, "update": 3}]
    (a / "summary.json").write_text(json.dumps(summary))
    rows, notes = gather([a, b], None, "sampled", False)
    assert [len(row.score) for row in rows] == [8, 8]
    assert "1 of 8 seeds diverged" in notes[0] and "differ in total_steps: 1000, 2000" in notes[1]


def test_what_cannot_be_compared_is_refused_in_one_line(refuse, tmp_path):
    a, b = save(tmp_path / "a", GOOD), save(tmp_path / "b", BAD, env="Pendulum-v1")
    scale = ("--range", "CartPole-v1=0,500")
    assert "name the folder" in refuse()
    assert "nowhere does not exist: name the folder of a run" in refuse("nowhere")
    assert "must have a name for each run (2)" in refuse(a, b, "--labels", "x")
    assert "both 'a' on CartPole-v1" in refuse(a, a)
    assert "add --range CartPole-v1=LOW,HIGH --range Pendulum-v1=LOW,HIGH" in refuse(a, b)
    assert "add --range Pendulum-v1=LOW,HIGH" in refuse(a, b, *scale)
    assert "'a' has no run on Pendulum-v1" in refuse(a, b, *scale, "--range", "Pendulum-v1=-1200,-150")
    for text in ("CartPole-v1", "CartPole-v1=1", "CartPole-v1=1,1", "CartPole-v1=0,inf", "=0,1", "CartPole-v1=a,b"):
        assert "must be ENV=LOW,HIGH" in refuse(a, "--range", text)
    assert "names Acrobot-v1 but" in refuse(a, "--range", "Acrobot-v1=0,1")
    assert "twice" in refuse(a, *scale, *scale)
    assert "target (nan) must be a finite number" in refuse(a, "--target", "nan")


def test_a_run_that_is_not_whole_is_refused(refuse, tmp_path):
    a = Path(save(tmp_path / "a", GOOD))
    summary = a / "summary.json"
    whole = json.loads(summary.read_text())
    for text, said in (
        (json.dumps(whole | {"interrupted": True}), "was interrupted"),
        ("{", "cannot be read"),
        ("[]", "not that of a run"),
        (json.dumps({"interrupted": False}), "not that of a run"),
    ):
        summary.write_text(text)
        assert said in refuse(str(a))
    summary.unlink()
    assert "has not finished" in refuse(str(a))
