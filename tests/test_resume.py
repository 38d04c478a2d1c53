"""A run that was stopped goes on to the last bit as if it never had been, or says in one line why it cannot."""

import contextlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from fake_wandb import FakeWandb
from helpers import exit_code

import purepg.run.session
from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.config import refuse_differences
from purepg.run.folder.files import RecordError
from purepg.run.folder.record import Record
from purepg.run.load import load
from purepg.run.plan import RunConfig
from purepg.run.population import Population
from purepg.run.sweep import Chunk, Program
from purepg.types import UpdateSteps, UsageError

pytestmark = pytest.mark.usefixtures("programs")

SCRIPT = Path(__file__).parent.parent / "experiments" / "ppo.py"
NETWORK = NetworkConfig(hidden=(8,))
SIZES: Any = {"num_envs": 2, "num_steps": 8, "num_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-2}
QUICK: Any = {"eval_episodes": 2, "eval_max_steps": 10, "wandb": "disabled", "devices": 1, "checkpoint_every": 0.0}


class Experiment(NamedTuple):
    """What a script hands to main, and the flags of its command."""

    algorithm: Any
    config: Any
    run: RunConfig
    flags: tuple[str, ...] = ()
    network: Any = actor_critic
    network_config: Any = NETWORK


EXPERIMENTS = {
    # 6 updates in blocks of 2, and four chunks: a setting's seeds in turns
    "ppo": Experiment(
        ppo,
        PPOConfig(**SIZES, anneal_learning_rate=True, anneal_clip_eps=True, normalize_obs=True, scale_reward=True),
        RunConfig(total_steps=96, num_seeds=4, log_every=2, max_parallel=2, **QUICK),
        ("--sweep", "learning_rate=1e-2,3e-3"),
    ),
    # 8 updates in blocks of 2, with rounds after 3 and 6, and two chunks: a seed each
    "pbt": Experiment(
        ppo,
        PPOConfig(**SIZES),
        RunConfig(total_steps=128, num_seeds=2, log_every=2, max_parallel=4, search=4, pbt=48, fresh_seeds=0, **QUICK),
        ("--sweep", "ppo.learning_rate=log:1e-3..1e-1", "--sweep", "gamma=0.9..0.99"),
    ),
    "ppo_penalty": Experiment(
        ppo_penalty,
        PPOPenaltyConfig(**SIZES, target_kl=1e-4),
        RunConfig(total_steps=128, num_seeds=2, log_every=2, **QUICK),
        network_config=NetworkConfig(hidden=(8,), memory="gru", memory_size=4),  # which checkpoints hold too
    ),
    "reinforce": Experiment(
        reinforce,
        REINFORCEConfig(num_episodes=2, max_steps=15, baseline="value"),
        RunConfig(total_steps=200, num_seeds=3, log_every=2, **QUICK),
    ),
    "sac": Experiment(
        sac,
        SACConfig(num_steps=4, batch_size=4, window=2, burn_in=1, capacity=16, warmup_steps=8),
        RunConfig(env="Pendulum-v1", total_steps=32, num_seeds=2, log_every=2, **QUICK),
        network=actor_q,
        network_config=ActorQConfig(policy="tanh_gaussian", hidden=(8,), num_critics=2, memory="lru", memory_size=4),
    ),
}


def command(experiment: Experiment, out: Path, *flags: str) -> int:
    algorithm, config, run, own, network, network_config = experiment
    return exit_code(algorithm, config, network, network_config, run, arguments=[*own, "--out", str(out), *flags])


class Killed(BaseException):
    pass


class Stop:
    """Stands in for the progress bar, and ends the run when block number `at` has been logged."""

    at: int | None = None
    how = "killed"

    def __init__(self, total_steps: int):
        del total_steps
        self._blocks = 0

    def update(self, *block: Any) -> None:
        if self._blocks == self.at:
            if self.how == "killed":  # before the block's checkpoint
                raise Killed
            signal.raise_signal(signal.SIGINT)
        self._blocks += 1

    def close(self) -> None:
        pass


@contextlib.contextmanager
def stopped(at: int, how: str = "killed"):
    """Ends the run within it at a block, and waits for what was being written then."""
    with pytest.MonkeyPatch.context() as patch:
        writing, save = [], Checkpoints.save

        def save_and_note(self, *args):
            writing.append(self)
            save(self, *args)

        patch.setattr(Stop, "at", at)
        patch.setattr(Stop, "how", how)
        patch.setattr(Checkpoints, "save", save_and_note)
        patch.setattr(purepg.run.session, "Progress", Stop)
        if how == "killed":
            with pytest.raises(Killed):
                yield
        else:
            yield
        for checkpoints in writing:
            checkpoints.wait()


class States(list):
    """The last state of each chunk that was evaluated since it was last taken."""

    def take(self) -> list[Any]:
        taken = self[:]
        self.clear()
        return taken


@pytest.fixture(scope="module")
def states():
    found, final = States(), Population.final
    with pytest.MonkeyPatch.context() as patch:

        def note(self, members, state):
            found.append(jax.device_get(state))
            return final(self, members, state)

        patch.setattr(Population, "final", note)
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, states):
    """`whole(name)`: the out folder and the last states of an experiment's run that was never stopped."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "whole"
            states.take()
            assert command(EXPERIMENTS[name], out) == 0
            made[name] = out, states.take()
        return made[name]

    return run


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def finals(out: Path) -> list[Any]:
    """What summary.json says that does not depend on the clock."""
    summary = json.loads((out / "summary.json").read_text())
    timed = {"compile_seconds", "run_seconds"}
    settings = [{k: v for k, v in setting.items() if k not in timed} for setting in summary["settings"]]
    return [settings, summary["interrupted"]]


def assert_same_metrics(a: Path, b: Path) -> None:
    with np.load(a / "metrics.npz") as x, np.load(b / "metrics.npz") as y:
        assert set(x) == set(y)
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    assert_same_metrics(a, b)
    assert finals(a) == finals(b)


def assert_same_states(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
    "name, at, how",
    [
        ("ppo", 4, "killed"),  # in the second chunk
        ("ppo_penalty", 0, "killed"),  # before any checkpoint
        ("pbt", 6, "killed"),  # in the second chunk, between a checkpoint and a round
        ("reinforce", 1, "ctrl-c"),
        ("sac", 2, "killed"),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, at, how, whole, states, programs, tmp_path):
    """By programs that are traced anew, as another process does."""
    out = tmp_path / "out"
    with stopped(at, how):
        command(EXPERIMENTS[name], out)
    assert len((out / "log.jsonl").read_bytes()) < len((whole(name)[0] / "log.jsonl").read_bytes())
    states.take()
    shared = dict(programs)
    programs.clear()
    assert command(EXPERIMENTS[name], out, "--resume") == 0
    programs.update(shared)
    assert_same_run(out, whole(name)[0])
    resumed = states.take()
    assert len(resumed) > 0
    assert_same_states(resumed, whole(name)[1][-len(resumed) :])


def test_infinities_and_members_that_diverged_survive_a_stop(tmp_path):
    flags = ("--sweep", "learning_rate=1e19,1e30", "--max-parallel", "2")  # one after the other
    diverging = EXPERIMENTS["ppo_penalty"]._replace(flags=flags)
    assert command(diverging, tmp_path / "whole") == 0
    with stopped(6):
        command(diverging, tmp_path / "out")
    assert command(diverging, tmp_path / "out", "--resume") == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    with np.load(tmp_path / "whole" / "metrics.npz") as metrics:
        first = {name: metrics[name][..., :4] for name in metrics if name != "num_updates"}  # read back from the log
    assert not first["finite"].all() and any(np.isinf(x).any() for x in first.values())


def test_lines_beyond_the_checkpoint_and_a_torn_one_are_cut_and_written_once(whole, states, tmp_path):
    out = tmp_path / "out"
    with stopped(2):
        command(EXPERIMENTS["ppo_penalty"], out)
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and Checkpoints(out, 0).latest() == 4  # the third block has no checkpoint
    with (out / "log.jsonl").open("ab") as log:
        log.write(lines[0][:-1] * 9)  # longer than all that will be written over it
    expected, last = whole("ppo_penalty")
    states.take()
    assert command(EXPERIMENTS["ppo_penalty"], out, "--resume") == 0
    assert_same_run(out, expected)
    assert_same_states(states.take(), last)


@pytest.mark.parametrize("name", ["ppo_penalty", "reinforce"])
def test_a_run_killed_between_its_last_checkpoint_and_its_evaluation_is_evaluated(name, whole, tmp_path):
    """A member that has spent its budget makes no further rows."""
    out = tmp_path / "out"
    shutil.copytree(whole(name)[0], out)
    for path in (*out.glob("checkpoints/0/evaluation-*.json"), out / "metrics.npz", out / "summary.json"):
        path.unlink()
    assert command(EXPERIMENTS[name], out, "--resume") == 0
    assert_same_run(out, whole(name)[0])


def test_a_finished_run_is_resumed_without_training_or_evaluating(whole, states, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole("ppo")[0], out)
    (out / "metrics.npz").unlink()
    states.take()
    assert command(EXPERIMENTS["ppo"], out, "--resume") == 0
    assert states.take() == []
    assert_same_run(out, whole("ppo")[0])


def test_a_run_from_before_a_field_existed_is_resumed_as_one_that_had_its_default(whole, states, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole("ppo")[0], out)
    config = json.loads((out / "config.json").read_text())
    del config["network"]["layer_norm"], config["ppo"]["target_kl"]
    (out / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    line = refused(EXPERIMENTS["ppo"], out, capsys, "--network.layer-norm")
    assert "network.layer_norm (was False, is True)" in line and "target_kl" not in line
    states.take()
    assert command(EXPERIMENTS["ppo"], out, "--resume") == 0
    assert states.take() == []


def test_more_steps_at_a_constant_rate_give_the_longer_run(whole, states, tmp_path):
    long, expected = whole("ppo_penalty")
    out = tmp_path / "out"
    assert command(EXPERIMENTS["ppo_penalty"], out, "--total-steps", "64") == 0
    states.take()
    assert command(EXPERIMENTS["ppo_penalty"], out, "--resume") == 0
    assert_same_run(out, long)
    assert_same_states(states.take(), expected)


def test_more_steps_after_an_annealed_run_keep_its_first_length(whole, states, tmp_path):
    first, (before, *_) = whole("ppo")
    out = tmp_path / "out"
    shutil.copytree(first, out)
    states.take()
    assert command(EXPERIMENTS["ppo"], out, "--resume", "--total-steps", "128") == 0
    config = json.loads((out / "config.json").read_text())
    assert config["ppo"]["anneal_updates"] == 6 and config["schedules"] == [6, 6]
    assert config["run"]["total_steps"] == 128 and config["num_updates"] == [8, 8]
    after = states.take()[0]
    assert_same_states(after.learner.params, before.learner.params)
    assert not np.array_equal(after.world.envs.obs, before.world.envs.obs)  # it acted on
    with np.load(out / "metrics.npz") as metrics, np.load(first / "metrics.npz") as shorter:
        assert metrics["policy_loss"].shape == (2, 4, 8)
        for name in set(shorter) - {"num_updates"}:
            np.testing.assert_array_equal(metrics[name][..., :6], shorter[name], err_msg=name)


def test_told_so_a_resumed_schedule_gets_another_length(whole, states, tmp_path):
    first, (before, *_) = whole("ppo")
    out = tmp_path / "out"
    shutil.copytree(first, out)
    states.take()
    assert command(EXPERIMENTS["ppo"], out, "--resume", "--total-steps", "128", "--ppo.anneal-updates", "20") == 0
    assert json.loads((out / "config.json").read_text())["ppo"]["anneal_updates"] == 20
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), states.take()[0].learner.params, before.learner.params)
    assert all(jax.tree.leaves(moved))


def test_more_steps_give_the_longer_run_where_updates_vary_in_length(whole, states, tmp_path):
    first, out = whole("reinforce")[0], tmp_path / "out"
    with np.load(first / "metrics.npz") as metrics:
        made = (metrics["env_steps"] > 0).sum(-1)
    assert len(np.unique(made)) > 1  # some stopped before others
    shutil.copytree(first, out)
    states.take()
    assert command(EXPERIMENTS["reinforce"], out, "--resume", "--total-steps", "400") == 0
    resumed = states.take()
    assert command(EXPERIMENTS["reinforce"], tmp_path / "long", "--total-steps", "400") == 0
    assert_same_states(resumed, states.take())
    with np.load(out / "metrics.npz") as metrics, np.load(tmp_path / "long" / "metrics.npz") as long:
        assert set(metrics) == set(long) and metrics["env_steps"].shape[-1] > made.max()
        for name in long:
            np.testing.assert_array_equal(metrics[name], long[name], err_msg=name)


def test_a_folder_that_another_process_writes_is_left_alone(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole("ppo_penalty")[0], out)
    with Record.reopen(out, (out / "log.jsonl").stat().st_size, keep_wandb=True):
        assert "is being written by another process" in refused(EXPERIMENTS["ppo_penalty"], out, capsys)
        before = snapshot(out)
        assert command(EXPERIMENTS["ppo_penalty"], out, "--overwrite") == 2
        assert snapshot(out) == before


def refused(experiment: Experiment, out: Path, capsys, *flags: str) -> str:
    """The line with which a resume is refused; nothing is touched."""
    before = snapshot(out)
    capsys.readouterr()  # what a fixture said
    assert command(experiment, out, "--resume", *flags) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and ": error: " in line
    assert snapshot(out) == before
    return line


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--ppo.gamma", "0.5", "--network.hidden", "4"), ("ppo.gamma (was 0.99, is 0.5)", "network.hidden (was [8]")),
        (("--ppo.num-epochs", "1"), ("ppo.num_epochs (was 2, is 1)",)),
        (("--seed", "1", "--env", "Acrobot-v1"), ("seed (was 0, is 1)", "env (was CartPole-v1, is Acrobot-v1)")),
        (("--num-seeds", "2"), ("num_seeds (was 4, is 2)",)),
        (("--max-parallel", "4"), ("max_parallel (was 2, is 4)",)),
        (("--eval-episodes", "3"), ("eval_episodes (was 2, is 3)",)),
        (("--sweep", "gamma=0.9,0.99"), ("settings",)),
        (("--total-steps", "95"), ("total_steps (95) must be at least 96",)),
    ],
)
def test_another_configuration_is_refused_and_every_difference_named(flags, named, whole, capsys):
    line = refused(EXPERIMENTS["ppo"], whole("ppo")[0], capsys, *flags)
    for difference in named:
        assert difference in line
    assert not re.search(r"\b(out|resume|wandb|overwrite|layout|num_updates) \(", line)  # these may differ or follow


def test_other_devices_flags_or_backends_are_refused(half):
    stored = json.loads((half / "config.json").read_text())
    for name, value in ("devices", ["cpu", "cpu"]), ("xla_flags", "--other"):
        with pytest.raises(UsageError, match=rf"configuration: {name} \(was [^()]*, is [^()]*\); use the same flags"):
            refuse_differences(half, stored, stored | {name: value})
    with pytest.raises(UsageError, match=r"configuration: backend \(was cpu, is gpu\); use"):
        refuse_differences(half, stored, stored | {"platform": {"backend": "gpu"}})
    with pytest.raises(UsageError, match=r"configuration: spaces \(was Box.* 500, is other\); use"):
        refuse_differences(half, stored, stored | {"spaces": "other"})
    refuse_differences(half, stored, stored | {"versions": {}, "started": "later"})


def test_another_algorithm_is_refused(whole, capsys):
    other = EXPERIMENTS["ppo"]._replace(algorithm=a2c, config=A2CConfig(num_envs=2, num_steps=8))
    line = refused(other, whole("ppo")[0], capsys)
    assert "ppo.clip_eps (was 0.2, is None)" in line and "a2c.num_steps (was None, is 8)" in line


def test_what_only_says_how_a_run_is_watched_may_differ_and_another_version_is_said(half, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(half, out)
    path = out / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"versions": stored["versions"] | {"jax": "0.1"}}))
    flags = ("--log-every", "4", "--keep", "1", "--checkpoint-every", "60", "--wandb-project", "other")
    assert command(EXPERIMENTS["ppo_penalty"], out, "--resume", *flags) == 0
    assert f"jax 0.1 is {stored['versions']['jax']}: the result may differ in its last bits" in capsys.readouterr().err
    assert_same_metrics(out, whole("ppo_penalty")[0])


def spoil_config(out):
    (out / "config.json").write_text('{"run": ')


def foreign_config(out):
    (out / "config.json").write_text('{"run": {"total_steps": 1}, "settings": 3}')


def list_config(out):
    (out / "config.json").write_text("[1, 2]")


def no_config(out):
    (out / "config.json").unlink()


def spoil_log(out):
    path = out / "log.jsonl"
    path.write_bytes(b"{]\n" + path.read_bytes())


def foreign_log(out):
    (out / "log.jsonl").write_text('{"settings": [0], "seeds": [0, 1], "start": 0, "metrics": {}}\n')


def log_of_other_metrics(out):
    path = out / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"entropy":', b'"entropie":'))


def no_log(out):
    (out / "log.jsonl").unlink()


def spoil_checkpoint(out):
    latest = Checkpoints(out, 0).latest()
    for path in (out / "checkpoints" / "0" / str(latest) / "state").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[:-9])


def other_state(out):
    checkpoints = Checkpoints(out, 0, keep=1)
    facts = checkpoints.facts(2)
    checkpoints.save(3, {"something": jax.numpy.zeros(3)}, facts)
    checkpoints.close()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The out folder of a run that was killed."""
    out = tmp_path_factory.mktemp("half") / "out"
    with stopped(1):
        command(EXPERIMENTS["ppo_penalty"], out)
    return out


@pytest.mark.parametrize(
    "spoil, said",
    [
        (spoil_config, "config.json cannot be read"),
        (foreign_config, "is not that of a run"),
        (list_config, "is not that of a run"),
        (no_config, "has no config.json: it is not the folder of a run"),
        (spoil_log, "its log.jsonl cannot be read"),
        (foreign_log, "its log.jsonl cannot be read"),
        (log_of_other_metrics, "its log.jsonl cannot be read"),
        (no_log, "its log.jsonl cannot be read (No such file or directory)"),
        (spoil_checkpoint, "cannot read the checkpoint"),
        (other_state, "holds another kind of state"),
    ],
)
def test_a_corrupted_or_foreign_folder_is_refused_and_left_untouched(spoil, said, half, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(half, out)
    spoil(out)
    assert said in refused(EXPERIMENTS["ppo_penalty"], out, capsys)


def test_a_missing_folder_is_refused_and_not_made(tmp_path, capsys):
    assert "none does not exist: name the folder of a run" in refused(EXPERIMENTS["ppo"], tmp_path / "none", capsys)
    assert not (tmp_path / "none").exists()


def test_resume_needs_a_folder_and_does_not_overwrite(half, capsys):
    assert "--resume needs --out" in refused(EXPERIMENTS["ppo_penalty"], half, capsys, "--overwrite")
    algorithm, config, run, _, network, network_config = EXPERIMENTS["ppo_penalty"]
    assert exit_code(algorithm, config, network, network_config, run, arguments=["--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_checkpoints_without_a_run_beside_them_are_not_written_into(half, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(half / "checkpoints", out / "checkpoints")
    before = snapshot(out)
    assert command(EXPERIMENTS["ppo_penalty"], out) == 2
    assert "already holds a run (checkpoints)" in capsys.readouterr().err
    assert snapshot(out) == before


def test_ctrl_c_says_how_to_go_on_and_that_command_does(whole, tmp_path, capsys):
    out = tmp_path / "a folder"
    experiment = EXPERIMENTS["ppo_penalty"]
    with stopped(1, "ctrl-c"):
        assert command(experiment, out, "--overwrite", "--log-every=2") == 130
    captured = capsys.readouterr()
    (line,) = (line for line in captured.out.splitlines() if line.startswith("go on with it: "))
    python, script, *arguments = shlex.split(line.removeprefix("go on with it: "))
    assert [python, script] == ["python", sys.argv[0]]
    assert arguments == ["--log-every=2", "--out", str(out), "--resume"]
    again = *experiment[:2], actor_critic, experiment.network_config, experiment.run
    assert exit_code(*again, arguments=arguments) == 0
    assert_same_run(out, whole("ppo_penalty")[0])


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_what_it_has(whole, tmp_path, monkeypatch, capsys):
    out, save = tmp_path / "out", Checkpoints.save

    def full(self, update, state, facts):
        if update > 2:
            raise RecordError("cannot save a checkpoint: No space left on device")
        save(self, update, state, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        assert command(EXPERIMENTS["ppo_penalty"], out) == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err and "IQM" in captured.out
    assert Checkpoints(out, 0).latest() == 2
    with np.load(out / "metrics.npz") as metrics:
        assert metrics["env_steps"].shape == (1, 2, 4)  # the block in which it failed is there
    assert len(json.loads((out / "summary.json").read_text())["settings"][0]["finals"]) == 2
    assert command(EXPERIMENTS["ppo_penalty"], out, "--resume") == 0
    assert_same_run(out, whole("ppo_penalty")[0])


def test_where_a_later_chunk_cannot_be_saved_the_earlier_are_kept(whole, tmp_path, monkeypatch):
    out, make = tmp_path / "out", Checkpoints.__init__

    def full(self, out, chunk, keep=None):
        if chunk == 1 and keep:
            raise RecordError("cannot write checkpoints/1: No space left on device")
        make(self, out, chunk, keep)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "__init__", full)
        assert command(EXPERIMENTS["ppo"], out) == 1
    finals = json.loads((out / "summary.json").read_text())["settings"][0]["finals"]
    assert [final is None for final in finals] == [False, False, True, True]
    assert command(EXPERIMENTS["ppo"], out, "--resume") == 0
    assert_same_run(out, whole("ppo")[0])


@pytest.mark.parametrize("per", ["seed", "setting"])
def test_wandb_has_the_whole_curve_once_after_a_resume(per, whole, tmp_path, monkeypatch):
    """With another length of blocks too, one update each, and so a row each; and the seeds of a setting in turns."""
    out, fake = tmp_path / "out", FakeWandb(monkeypatch)
    flags = ("--wandb", "offline", "--wandb-per", per)
    with stopped(4):
        command(EXPERIMENTS["ppo"], out, *flags)
    assert command(EXPERIMENTS["ppo"], out, *flags, "--resume", "--log-every", "1") == 0
    runs = fake.runs  # of each name the one that was opened last, after the resume
    assert len(runs) == len(fake.opened) / 2 == {"seed": 8, "setting": 2}[per]
    with np.load(out / "metrics.npz") as metrics, np.load(whole("ppo")[0] / "metrics.npz") as expected:
        # A block of one update is a program of its own, in which other operations may be fused.
        np.testing.assert_allclose(metrics["policy_loss"], expected["policy_loss"], rtol=1e-5, atol=1e-7)
        for i, label in enumerate(("learning_rate=0.01", "learning_rate=0.003")):
            of_setting = metrics["policy_loss"][i]
            curves = {f"{label}/seed={s}": of_setting[s] for s in range(4)}
            for name, curve in (curves if per == "seed" else {label: of_setting.mean(axis=0)}).items():
                rows = [row for row in runs[name].rows if "update" in row]  # the last shows the picture
                assert [row["update"] for row in rows] == list(range(6))
                assert [row["env_steps"] for row in rows] == list(range(16, 112, 16))
                np.testing.assert_allclose([row["policy_loss"] for row in rows], curve, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("num_updates", [7, 96, 97, 100])
@pytest.mark.parametrize("one_length", [True, False])
@pytest.mark.parametrize("log_every", [0, 3, 10, 200])
def test_a_run_goes_on_in_the_blocks_that_it_had(num_updates, one_length, log_every):
    chunk = Chunk(
        Program((), (0,), {}, {}, num_updates, UpdateSteps(8, 8 if one_length else 9)), slice(0, 1), slice(0, 1)
    )
    lengths = chunk.block_lengths(log_every)
    for i in range(len(lengths) + 1):
        assert chunk.block_lengths(log_every, sum(lengths[:i])) == lengths[i:]


class Process(NamedTuple):
    """A run in a process of its own."""

    popen: subprocess.Popen
    out: Path

    @classmethod
    def start(cls, out: Path, *flags: str) -> "Process":
        arguments = [sys.executable, SCRIPT, "--out", out, *FLAGS, *flags]
        return cls(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), out)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline
            assert self.popen.poll() is None, self.popen.communicate()
            time.sleep(0.001)

    def num_blocks(self) -> int:
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        assert self.popen.returncode == -signal.SIGKILL


NUM_BLOCKS = 16
FLAGS = (
    "--total-steps 1024 --num-seeds 2 --ppo.num-envs 2 --ppo.num-steps 16 --ppo.num-epochs 1 --network.hidden 8 "
    "--ppo.normalize-obs --log-every 2 --checkpoint-every 0 --eval-episodes 2 --eval-max-steps 10 --wandb disabled "
    "--devices 1"
).split()


def test_kill_9_at_random_moments_and_within_a_save_changes_no_bit(tmp_path, monkeypatch):
    """Of the run of this process, which resumes it at last."""

    def run(*flags: Any) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", *map(str, flags), *FLAGS])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert exit_.value.code == 0

    draw = random.Random(int(os.environ.get("PUREPG_TEST_SEED", "0")))
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole)

    process = Process.start(out)
    at = draw.randint(1, NUM_BLOCKS // 4)
    process.wait_for(lambda: process.num_blocks() >= at)
    time.sleep(draw.uniform(0, 0.05))
    process.kill()
    assert 0 < process.num_blocks() < NUM_BLOCKS

    process = Process.start(out, "--resume")
    at = process.num_blocks() + draw.randint(1, NUM_BLOCKS // 4)
    process.wait_for(lambda: process.num_blocks() > at and any(out.glob("checkpoints/0/*.orbax-checkpoint-tmp*")))
    process.kill()
    assert process.num_blocks() < NUM_BLOCKS

    run(out, "--resume")
    assert_same_run(out, whole)
    assert not any(out.glob("checkpoints/0/*tmp*"))


def test_a_disk_that_is_full_loses_no_earlier_checkpoint(tmp_path):
    """On a file system of its own, which holds one checkpoint and not two, where only the latest is kept."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=190k", "none", str(disk)]
    if subprocess.run(["unshare", "-rm", *mount], check=False, capture_output=True).returncode:
        pytest.skip("no file system of one's own here")
    run = [sys.executable, str(SCRIPT), "--out", str(disk / "out"), *FLAGS, "--keep", "1"]
    script = f"{shlex.join(mount)} && {shlex.join(run)}; code=$?; cp -r {disk / 'out'} {out}; exit $code"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    said = "checkpoints/0: No space left on device; ending the run with what it has"
    assert result.stderr.count(said) == 1 and "Traceback" not in result.stderr and "ERROR" not in result.stderr
    latest = Checkpoints(out, 0).latest()
    assert latest and latest < 2 * NUM_BLOCKS
    assert len(json.loads((out / "summary.json").read_text())["settings"][0]["finals"]) == 2
    assert load(out, best=True).update == latest  # which is whole
