"""The command line of a study, and the Markdown pages that hold its table."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import EMPTY_CONFIG

from purepg.run.pages import read_block, table, write_block
from purepg.run.study import Study, main
from purepg.types import UsageError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
PAGE = "# Title\n\nBefore.\n\n<!-- toy -->\n\nold\n\n<!-- end -->\n\nAfter.\n\n<!-- other -->\nkept\n<!-- end -->\n"
TABLE = table(["name", "value"], [["a", "1"], ["b", "22"]])


@dataclass(frozen=True)
class Config:
    """Numbers of the toy."""

    seed: int = 0


def study(config):
    return Study("the report", {"seed": config.seed}, table=TABLE)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command line of a study in toy.py: (its exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy.py"])

    def call(*arguments, study=study):
        code = 0
        try:
            main(study, Config(), arguments=arguments)
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return call


def test_a_study_replaces_the_block_of_its_page_and_nothing_else(call, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):  # a second run finds its block again
        code, said, _ = call("--page", str(page))
        assert code == 0 and said.endswith(f" and {page}\n")
        assert page.read_text() == PAGE.replace("old", TABLE)
        assert read_block(page, "toy") == TABLE and read_block(page, "other") == "kept"


def test_without_a_page_no_page_is_written(call, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert call()[0] == 0
    assert page.read_text() == PAGE


@pytest.mark.parametrize(
    "text",
    [None, "no marker", "<!-- toy -->\nno end", "<!-- toy -->\n<!-- other -->\n<!-- end -->\n", PAGE + PAGE, b"\xff"],
    ids=["no page", "no marker", "no end", "another marker before the end", "twice", "not text"],
)
def test_a_missing_page_or_marker_is_said_in_one_line_before_anything_is_computed(call, tmp_path, text):
    def never(config):
        raise AssertionError(config)

    page = tmp_path / "page.md"
    if text is not None:
        page.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, said, error = call("--page", str(page), study=never)
    assert code == 2 and not said and error.count("\n") == 1
    assert error.startswith("toy: error: ") and str(page) in error and "<!-- toy -->" in error
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_a_study_without_a_table_keeps_its_results_and_says_that_it_has_none(call, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    code, said, error = call("--page", str(page), study=lambda config: Study("the report", {}))
    assert code == 1 and said.startswith("the report\nwrote ") and error.count("\n") == 1
    assert page.read_text() == PAGE


def test_a_block_may_be_empty_and_keep_characters_that_mean_something_to_a_pattern(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- toy -->\n<!-- end -->\n")
    write_block(page, "toy", r"\1 | \g<0>")
    assert page.read_text() == "<!-- toy -->\n\n\\1 | \\g<0>\n\n<!-- end -->\n"
    with pytest.raises(UsageError, match=r"<!-- t.y -->"):
        read_block(page, "t.y")


def test_a_narrow_column_still_has_a_rule_that_markdown_takes():
    assert table(["x", "y"], [["a", "1"]]).splitlines() == ["| x  |  y |", "| -- | -: |", "| a  |  1 |"]


# --- the pages of this repository ---

BLOCKS = {
    "laboratory.md": ("gradient_ladder", "discount_bias", "softmax_convergence", "lqr"),
    "language_models.md": ("alignment", "overoptimisation"),
    "results.md": ("results", "trust_region"),
    "memory.md": ("memory_bias",),
    "speed.md": ("benchmark_ppo", "benchmark_ppo_rnn", "benchmark_replay", "benchmark_grpo", "benchmark_overhead"),
    "survival.md": ("survive",),
}


@pytest.mark.parametrize(("page", "marker"), [(page, marker) for page, markers in BLOCKS.items() for marker in markers])
def test_every_page_holds_the_blocks_that_the_scripts_write(page, marker):
    assert read_block(EXPERIMENTS / page, marker).startswith("|")


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def header(text):
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_the_tables_of_the_benchmark_have_the_columns_of_their_page():
    benchmark = script("benchmark")
    side = {"compile_seconds": 3.04, "peak_memory_bytes": 800 * 2**20, "devices": 1, "env_steps_per_second": 304_000.0}
    ours = side | {"generated_per_second": 355_279.0}
    ratio = {"median": 1.38, "min": 1.34, "max": 1.43}
    for marker, size, peer in (
        ("benchmark_ppo", "ppo:4x1", "rejax"),
        ("benchmark_ppo_rnn", "ppo_rnn:4x1", "purejaxrl_rnn"),
        ("benchmark_replay", "sac:1x1", "rejax"),
        ("benchmark_grpo", "grpo:64x1", None),
    ):
        products = {} if marker == "benchmark_grpo" else {"products": 0.57}
        without = {"without memory": side | {"times": 11.3}} if marker == "benchmark_ppo_rnn" else {}
        result = {"size": size, "purepg": ours | products, peer: side, "ratio": ratio, **without}
        found = benchmark.page_table(marker, [result], peer)
        assert header(found) == header(read_block(EXPERIMENTS / "speed.md", marker))
        assert len(found.splitlines()) == 3 and ("1.38 [1.34, 1.43]" in found) == (peer is not None)
    shares = {what: [(1.0, 2.0), (3.0, 4.0), (2.0, 3.0)] for what in benchmark.OVERHEADS}
    result = {"size": "ppo:4x16", "seconds": [2.4, 2.5, 2.6], "per_cent": shares}
    found = benchmark.overhead_table([result], benchmark.OVERHEADS)
    assert header(found) == header(read_block(EXPERIMENTS / "speed.md", "benchmark_overhead"))
    assert found.splitlines()[2].count("+2.0 / +3.0") == 4


def test_the_table_of_kills_has_the_columns_of_its_page():
    survive = script("survive")
    row = {"algorithm": "sac", "survived": {"anywhere": 2, "in a save": 1}, "checkpoint_bytes": 750_000}
    lost = row | {"algorithm": "ppo", "survived": {"anywhere": 1, "in a save": 1}}
    found = survive.page_table({"rows": [row, lost], "kills": 2, "kills_in_save": 1, "num_seeds": 2})
    first = header(read_block(EXPERIMENTS / "survival.md", "survive"))
    assert header(found) == [*first[:-1], "checkpoint of 2 agents, MB"]
    assert cells(found) == [["SAC", "yes", "2 of 2", "1 of 1", "0.75"], ["PPO-Clip", "no", "1 of 2", "1 of 1", "0.75"]]


def test_the_table_of_step_sizes_has_the_columns_of_its_page():
    trust_region, two = script("trust_region"), np.ones(2)
    step, quantiles = np.array([1e-3, 1e-2]), np.ones((4, 2))
    result = trust_region.Result(
        trust_region.SWEEPS[2], step, two, np.ones((2, 2)), quantiles, 0, (0, 1), (0.5, 1.0), (two, two), 0
    )
    found = trust_region.page_table([result, result._replace(region=None)])
    assert header(found) == header(read_block(EXPERIMENTS / "results.md", "trust_region"))
    assert cells(found) == [
        ["NPG", "KL", "0.001", "0.01", "> 1.00", "0.50 to 1.00", "> 0.50"],
        ["NPG", "KL", "", "", "none", "0.50 to 1.00", "none"],
    ]


def test_the_table_of_reward_hacking_has_the_columns_of_its_page():
    overoptimisation = script("overoptimisation")
    kl, proxy, true = np.ones((4, 2)), np.full((4, 2), 0.5), np.tile([0.75, 0.25], (4, 1))
    turns = [
        overoptimisation.Turn(14, kl, proxy, true),
        overoptimisation.Turn(199, kl, proxy, true[:, :1].repeat(2, 1)),
    ]
    found = overoptimisation.page_table(overoptimisation.Config(kl_coefs=(0.0, 0.1)), turns)
    assert header(found) == header(read_block(EXPERIMENTS / "language_models.md", "overoptimisation"))
    proxy, highest, end = "0.50 [0.50, 0.50]", "0.750 [0.750, 0.750]", "0.250 [0.250, 0.250]"
    assert cells(found) == [
        ["0", proxy, "1.00", highest, "14", end],
        ["0.1", proxy, "1.00", highest, "199", "the same"],
    ]


def test_the_table_of_methods_has_three_columns_for_each_task():
    alignment = script("alignment")
    six, one = np.full(6, 0.25), np.full(1, 0.5)
    start = alignment.Result(one, one, {}, np.nan, 0, 0, 0)
    method = alignment.Result(six, 2 * six, {}, 0.75, 0, 0, 0)
    of_task = {"clones": method._replace(training=np.nan), "start (a1)": start, "dr_grpo": method}
    found = alignment.page_table({"addition": of_task, "countdown": of_task})
    mode, sampled = "0.500 [0.500, 0.500]", "0.250 [0.250, 0.250]"
    names = ["addition, greedy", "sampled", "training, sampled", "countdown, greedy", "sampled", "training, sampled"]
    assert header(found) == ["method", *names]
    assert cells(found) == [
        ["the clones", *2 * [mode, sampled, ""]],
        ["their median, where all start", *2 * ["0.500", "0.500", ""]],
        ["Dr. GRPO", *2 * [mode, sampled, "0.750"]],
    ]


def save(folder, env="CartPole-v1", total_steps=25_600, interrupted=False):
    """A run's folder, as far as a row reads it."""
    folder.mkdir()
    run = {"env": env, "total_steps": total_steps}
    (folder / "config.json").write_text(json.dumps(EMPTY_CONFIG | {"script": "ppo", "run": run}))
    found = {"hyperparameters": {}, "iqm": 1.25, "interval": [1.0, 2.0], "mode": {"iqm": 3.0}, "training": {"iqm": 4.0}}
    summary = {"settings": [found], "interrupted": interrupted}
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_a_run_replaces_its_row_of_the_results_and_keeps_the_published_number(tmp_path, capsys):
    results, page = script("results"), tmp_path / "page.md"
    page.write_text((EXPERIMENTS / "results.md").read_text())
    before = read_block(page, "results").splitlines()
    flags = ["--algorithm", "PPO", "--page", str(page)]
    known, new = save(tmp_path / "known", total_steps=100_000), save(tmp_path / "new", total_steps=3_000_000)
    results.main([known, *flags])
    after = read_block(page, "results").splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    old = "| CartPole-v1 | PPO | 100k | 500 (1) | 500.0 [500.0, 500.0] | 500.0 | 500.0 | "
    row = "| CartPole-v1 | PPO | 100k | 500 (1) | 1.250 [1.000, 2.0] | 3.0 | 4.0 | "
    command = "`python experiments/ppo.py --total-steps 100000` |"
    assert changed == [(old + command, row + command)]
    capsys.readouterr()
    results.main([known, new, *flags])
    added = "| CartPole-v1 | PPO | 3M | | 1.250 [1.000, 2.0] | 3.0 | 4.0 | `python experiments/ppo.py` |"
    assert read_block(page, "results").splitlines() == [*after, added]
    assert capsys.readouterr().out.splitlines()[-1] == added


def test_what_makes_no_row_is_refused_in_one_line_and_the_page_stays(tmp_path, capsys):
    results, page = script("results"), tmp_path / "page.md"
    page.write_text((EXPERIMENTS / "results.md").read_text())
    text = page.read_text()
    stopped = save(tmp_path / "stopped", interrupted=True)
    for run, why in (
        ([stopped], "was interrupted"),
        ([str(tmp_path)], "has no config.json"),
        ([], "no run was named"),
    ):
        with pytest.raises(SystemExit, match="2"):
            results.main([*run, "--page", str(page)])
        error = capsys.readouterr().err
        assert error.startswith("results: error: ") and why in error and error.count("\n") == 1
    assert page.read_text() == text
