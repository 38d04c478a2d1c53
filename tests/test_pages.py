"""README.md and the pages under experiments/: their size, links, commands and code."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers import quick_jit

import purepg
from purepg import envs
from purepg.run import cli, reward_model

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md")))
README = PAGES[0].read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"python (experiments/\w+\.py(?:[^\n`\\]|\\\n)*)")


def commands():
    """Every command of the pages that trains: its script, and its flags."""
    found = {}
    for page in PAGES:
        for text in COMMAND.findall(page.read_text()):
            script, *flags = shlex.split(text.replace("\\\n", " "))
            if "run.cli import main" in (ROOT / script).read_text():
                found[" ".join([Path(script).stem, *flags])] = (script, flags)
    return found


COMMANDS = commands()
SMALL = "64, num_seeds=2, eval_episodes=2, eval_max_steps=10"  # the README's run


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_picture_and_script_of_a_page_exists(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"(?:experiments|purepg|tests)/[\w/]+\.(?:py|md)", text)
    assert not missing + [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_script_and_flags_that_it_knows(name, monkeypatch):
    """Up to where it would train."""

    class ParsedError(Exception):
        pass

    def train_population(*arguments, **options):
        raise ParsedError(arguments, options)

    script, flags = COMMANDS[name]
    monkeypatch.setattr(cli, "train_population", train_population)
    monkeypatch.setattr(reward_model, "with_learned_reward", lambda env, folder: env)  # the command before it makes one
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_readmes_library_use_gives_a_curve_for_every_agent(capsys):
    """The README's first two Python blocks, made smaller."""
    assert "25_600, num_seeds=16" in README and "num_updates=100" in README
    verb, pure = BLOCK.findall(README)[:2]
    verb = verb.replace("num_steps=32", "num_steps=8").replace("25_600, num_seeds=16", SMALL)
    pure = pure.replace("num_updates=100", "num_updates=2").replace("key(0), 16)", "key(0), 3)")
    names: dict[str, Any] = {"quick_jit": quick_jit}
    exec(verb, names)
    assert names["results"].metrics["entropy"].shape == (2, 2, 2)
    assert "| learning_rate=0.0003 |" in capsys.readouterr().out
    exec(pure.replace("@jax.jit", "@quick_jit"), names)
    assert names["averaged"](names["metrics"])["episode_return"].shape == (3, 2)
    assert capsys.readouterr().out


def test_the_readmes_own_networks_train_under_ppo_and_sac():
    """As far as tracing shows: every shape and every type of an update fits."""
    names: dict[str, Any] = {"__name__": "readme"}
    for code in BLOCK.findall(README)[2:]:
        exec(code, names)
    config = names["ResidualConfig"](4)
    for algorithm, network, own, env in (
        ("ppo", "residual", names["PPOConfig"](num_envs=4), "Acrobot-v1"),
        ("ppo", "slow", names["PPOConfig"](num_envs=4), "Acrobot-v1"),
        ("sac", "residual_q", purepg.SACConfig(), "Pendulum-v1"),
    ):
        env = envs.make(env)
        made = getattr(purepg, algorithm)(env, names[network](env, config), own)
        key = jax.random.key(0)
        state = jax.eval_shape(made.init, key)
        after, metrics = jax.eval_shape(made.step, key, state, 0)
        assert jax.tree.structure(after) == jax.tree.structure(state) and "entropy" in metrics


def test_the_line_that_the_readme_changes_in_ppo_is_there():
    line = re.search(r"replace the line `([^`]+)`", README)
    assert line and line[1] in (ROOT / "purepg" / "algorithms" / "ppo.py").read_text()
