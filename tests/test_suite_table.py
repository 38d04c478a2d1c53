"""experiments/suite.py: which cells it trains with which settings, and what it makes of finished and failing ones."""

import importlib
import json
import re
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import suite
from parts.suite_cells import CLASSIC, SCRIPTS, Cell, groups, named, overrides
from parts.suite_table import details, matrix, read_score

from purepg.run.environment import named_env
from purepg.run.pages import read_block
from purepg.run.reliability import bootstrap_interval, iqm
from purepg.types import UsageError

TINY = ("--envs", "CartPole-v1", "Catch-bsuite", "--steps", "256", "--seeds", "3", "--eval-episodes", "2")
TINY += ("--set", "network.hidden=4")


def table(out: Any, capsys: Any, *arguments: str, algorithms: tuple[str, ...] = ("a2c", "ddpg")) -> tuple[int, str]:
    """Runs the command line: (exit code, what it printed)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        suite.main(["--algorithms", *algorithms, *TINY, *arguments, "--out", str(out)])
    code: Any = exit.value.code
    return code, capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a table of two algorithms on two environments, on neither of which DDPG can act."""
    out = tmp_path_factory.mktemp("suite") / "out"
    with pytest.raises(SystemExit) as exit:
        suite.main(["--algorithms", "a2c", "ddpg", *TINY, "--out", str(out)])
    assert exit.value.code == 0
    return out


def cells(*arguments: Any, envs: tuple[str, ...] = ("classic",), **more: Any) -> dict[tuple[str, str], Cell]:
    found, _, _ = suite.cells_of(suite.Config(algorithms=arguments, envs=envs, **more))
    return {(cell.algorithm, cell.env): cell for cell in found}


# --- which cells ---


def test_every_algorithm_has_a_script_of_its_own_name_that_trains_it():
    for name, scripts in SCRIPTS.items():
        assert scripts[0] == name
        assert {importlib.import_module(script).EXPERIMENT[0].__name__ for script in scripts} == {name}


def test_a_cell_has_the_settings_of_the_script_for_its_environment_or_general_ones_or_those_for_its_group():
    found = cells("ppo", "trpo", envs=("classic", "Breakout-MinAtar", "Asterix-MinAtar", "Catch-bsuite"))
    of_ppo = {env: cell.script for (name, env), cell in found.items() if name == "ppo"}
    assert of_ppo == dict.fromkeys((*CLASSIC, "Asterix-MinAtar", "Catch-bsuite"), "ppo_general") | {
        "CartPole-v1": "ppo",
        "Breakout-MinAtar": "ppo_breakout",
        "Pendulum-v1": "ppo_pendulum",
        "MountainCarContinuous-v0": "ppo",
    }
    assert found["trpo", "MountainCar-v0"].script == "trpo_mountaincar"
    assert found["trpo", "MountainCarContinuous-v0"].script == "trpo"
    assert found["ppo", "Pendulum-v1"].experiment[1:] == importlib.import_module("ppo_pendulum").EXPERIMENT[1:]


def test_sac_is_sac_discrete_on_discrete_actions_unless_that_is_in_the_table_itself():
    alone, both = cells("sac"), cells("sac", "sac_discrete")
    assert alone["sac", "CartPole-v1"].script == "sac_discrete" and alone["sac", "Pendulum-v1"].script == "sac"
    assert ("sac", "CartPole-v1") not in both and both["sac_discrete", "CartPole-v1"].script == "sac_discrete"
    _, missing, _ = suite.cells_of(suite.Config(algorithms=("sac", "sac_discrete"), envs=("CartPole-v1",)))
    assert [(x.algorithm, x.why) for x in missing] == [
        ("sac", "its actions are discrete, and sac_discrete is in the table itself")
    ]
    remembers = cells("sac:network.memory=gru", "sac_discrete", envs=("CartPole-v1",))  # both columns stay
    assert [cell.experiment[3].memory for cell in remembers.values()] == ["gru", None]


def test_groups_are_their_environments_and_one_that_cannot_be_made_is_left_out_with_its_reason(monkeypatch):
    assert groups()["classic"] == CLASSIC and "craftax/Craftax-Symbolic" in groups()["craftax"]
    assert {name.rpartition("-")[2] for name in groups()["minatar"]} == {"MinAtar"}
    some = "CartPole-v1", "nowhere/Nothing", "Catch-bsuite"

    def make(env, params):
        if env == "Catch-bsuite":  # as a suite's package that does not fit the JAX that is installed
            raise AttributeError("jax has no attribute\nDevice")
        return named_env(env, params)

    monkeypatch.setattr("parts.suite_cells.groups", lambda: {"some": some})
    monkeypatch.setattr("parts.suite_cells.named_env", make)
    found, missing, envs = suite.cells_of(suite.Config(algorithms=("a2c",), envs=("some", "CartPole-v1")))
    assert [cell.env for cell in found] == ["CartPole-v1"] and envs == list(some)
    (unknown, broken) = missing
    assert unknown[1] == some[1] and unknown.why.startswith("unknown environment") and not unknown.failed
    assert broken == ("a2c", some[2], "AttributeError: jax has no attribute", False)
    with pytest.raises(AttributeError):
        suite.cells_of(suite.Config(algorithms=("a2c",), envs=("Catch-bsuite",)))


def test_changes_are_made_in_the_configs_that_they_name():
    found = cells("ppo", "a2c", set=("ppo.learning_rate=0.125", "network.hidden=8x4", "a2c.max_grad_norm=none"))
    _, ppo, _, network, _ = found["ppo", "CartPole-v1"].experiment
    _, a2c, _, other, _ = found["a2c", "Pendulum-v1"].experiment
    assert (ppo.learning_rate, network.hidden, other.hidden, a2c.max_grad_norm) == (0.125, (8, 4), (8, 4), None)
    assert ppo.max_grad_norm is not None and a2c.learning_rate != 0.125
    own = cells("ppo", "ppo:network.hidden=2:ppo.gamma=0.5", set=("ppo.gamma=0.25", "network.activation=relu"))
    for label, gamma, hidden in (("ppo", 0.25, (64, 64)), ("ppo:network.hidden=2:ppo.gamma=0.5", 0.5, (2,))):
        _, ppo, _, network, _ = own[label, "CartPole-v1"].experiment
        assert (ppo.gamma, network.hidden, network.activation) == (gamma, hidden, "relu")
    of_sac = cells("sac:sac.gamma=0.5:sac_discrete.gamma=0.25", envs=("Pendulum-v1", "CartPole-v1"))
    assert [cell.experiment[1].gamma for cell in of_sac.values()] == [0.5, 0.25]
    of_sac = cells("sac:sac.gamma=0.5:sac.target_entropy=-1", envs=("Pendulum-v1", "CartPole-v1"))  # a fraction there
    assert [cell.experiment[1].gamma for cell in of_sac.values()] == [0.5, 0.5]
    assert of_sac["sac:sac.gamma=0.5:sac.target_entropy=-1", "CartPole-v1"].experiment[1].target_entropy > 0
    assert overrides(["sac_discrete.tau=1"], ["sac"]) == {"sac_discrete": {"tau": "1"}}


def test_a_colon_in_a_name_begins_no_setting():
    assert named("gym/my_module:MyEnv-v0") == ("gym/my_module:MyEnv-v0", ())
    assert named("gym/my_module:MyEnv-v0:size=2:a=b") == ("gym/my_module:MyEnv-v0", ("size=2", "a=b"))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"algorithms": ("ppq",)}, r"^algorithms \(ppq\) must be among reinforce, .*ppo"),
        ({"algorithms": ()}, r"^name at least one algorithm and one environment$"),
        ({"envs": ("gym",)}, r"^gym is a suite: .*the groups are classic, minatar, bsuite, "),
        ({"envs": ("CartPol-v1",)}, r"did you mean CartPole-v1.*the groups are classic, minatar, bsuite, "),
        ({"set": ("ppo.gamma",)}, r"^set \('ppo.gamma'\) must be ALGORITHM.FIELD=VALUE"),
        ({"set": ("sac.gamma=1",)}, r"^set \('sac.gamma=1'\) must begin with one of ppo, a2c, network$"),
        ({"set": ("ppo.gama=1",)}, r"^set: ppo has no field gama; did you mean gamma\?$"),
        ({"set": ("ppo.xyz=1",)}, r"^set: ppo has no field xyz; it has .*gamma"),
        ({"set": ("ppo.gamma=2",)}, r"^gamma \(2.0\) must be in \[0, 1\]"),
        ({"set": ("ppo.gamma=1", "ppo.gamma=0")}, r"^set names ppo.gamma twice"),
        ({"algorithms": ("ppo:a2c.gamma=1", "a2c")}, r"^set \('a2c.gamma=1'\) must begin with one of ppo, network$"),
        ({"envs": ("CartPole-v1:gravty=1",)}, r"gravty"),
        ({"set": ("ppo.num_envs=1.5",)}, r"^set ppo.num_envs \('1.5'\) must be an integer"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(options, said):
    with pytest.raises(UsageError, match=said) as error:
        suite.cells_of(suite.Config(**options))
    assert "\n" not in str(error.value)


# --- what becomes of them ---


def test_the_table_has_the_iqm_of_the_finals_and_its_interval_and_says_what_is_left_out(trained):
    page = (trained / "table.md").read_text()
    for name in ("a2c-CartPole-v1", "a2c-Catch-bsuite"):
        finals = np.array(json.loads((trained / name / "summary.json").read_text())["settings"][0]["finals"])
        numbers = [float(iqm(finals)), *bootstrap_interval(finals)]
        form = "{:.1f} [{:.1f}, {:.1f}]" if min(map(abs, numbers)) >= 2 else "{:.3f} [{:.3f}, {:.3f}]"
        assert form.format(*numbers) in page
    assert re.search(r"^- ddpg on CartPole-v1: .*CartPole-v1", page, re.M)
    numbers = json.loads((trained / "table.json").read_text())
    assert [(x["algorithm"], x["env"]) for x in numbers["missing"]] == [
        ("ddpg", "CartPole-v1"),
        ("ddpg", "Catch-bsuite"),
    ]
    assert [x["env_steps"] for x in numbers["cells"]] == [256, 256]
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_labels_with_settings_have_rows_of_their_own_that_say_what_was_trained(trained):
    score = read_score(trained / "a2c-CartPole-v1", "a2c:network.memory=gru", "CartPole-v1")
    other = score._replace(algorithm="sac", trained="sac_discrete")
    rows = [[x.strip() for x in line.split("|")[1:3]] for line in details([score, other]).splitlines()[2:]]
    assert rows == [["CartPole-v1", "a2c:network.memory=gru"], ["CartPole-v1", "sac (sac_discrete)"]]
    line = matrix([score, other], ["CartPole-v1"], ["a2c:network.memory=gru", "sac"]).splitlines()[2]
    assert "(a2c)" not in line and line.endswith("] (sac_discrete) |")


def test_the_same_command_again_trains_nothing_and_makes_the_same_table(trained, monkeypatch, tmp_path, capsys):
    before = {name: (trained / name).read_bytes() for name in ("table.md", "table.json", "curves.png")}
    own = suite.train_population

    def train(algorithm, *arguments, **options):
        assert algorithm.__name__ == "ddpg"  # whose cell does not fit, which is said again
        return own(algorithm, *arguments, **options)

    monkeypatch.setattr(suite, "train_population", train)
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- suite -->\nold\n<!-- end -->\nAfter.\n")
    code, said = table(trained, capsys, "--page", str(page))
    assert code == 0 and said.count("finished before") == 2
    assert read_block(page, "suite") == before["table.md"].decode().strip()
    assert {name: (trained / name).read_bytes() for name in before} == before


def test_a_cell_with_other_settings_is_not_taken_for_finished(trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    code, said = table(out, capsys, "--set", "network.hidden=4", "a2c.gamma=0.5", algorithms=("a2c",))
    assert code == 1  # no cell has a result
    assert said.count("another configuration: a2c.gamma (was 0.98, is 0.5)") == 4  # as it goes, and in the table


def test_a_cell_that_fails_is_reported_and_the_others_have_their_results(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    monkeypatch.setattr(suite, "train_population", lambda *arguments, **options: 1 / 0)
    code, said = table(out, capsys, algorithms=("ppo", "a2c"))
    assert code == 1 and said.count("finished before") == 2
    assert "ppo on CartPole-v1 has no result: ZeroDivisionError: division by zero" in said
    page = (out / "table.md").read_text()
    assert "- ppo on Catch-bsuite: ZeroDivisionError: division by zero" in page
    assert len(re.findall(r"^\| (?:CartPole-v1|Catch-bsuite) +\| +- \| +-?[\d.]+ \[", page, re.M)) == 2


@pytest.mark.parametrize("how", ["after a block", "before training"])
def test_ctrl_c_ends_the_table_and_says_how_to_go_on(how, tmp_path, monkeypatch, capsys):
    def train(*arguments, **options):
        if how == "before training":
            raise KeyboardInterrupt
        return SimpleNamespace(interrupted=True, lost=[])

    monkeypatch.setattr(suite, "train_population", train)
    monkeypatch.setattr(sys, "argv", ["experiments/suite.py"])
    code, said = table(tmp_path / "out", capsys, algorithms=("a2c",))
    assert code == 130
    (line,) = [line for line in said.splitlines() if line.startswith("go on with it: ")]
    wanted = f"python experiments/suite.py --algorithms a2c {' '.join(TINY)} --out {tmp_path / 'out'}"
    assert line == f"go on with it: {wanted}"
    assert said.count("not trained to its end yet") == 2
