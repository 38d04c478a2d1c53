"""Runs on token tasks, from a clone to its fine-tuning: what they leave, start from, count and say.

The task is that of two digits, `37<` answered `73.`: all of its hundred prompts can be looked at.
"""

import contextlib
import io
import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_wandb import FakeWandb
from helpers import equations, quick_jit, shared_programs
from test_load import evaluated
from test_resume import QUICK, Experiment, assert_same_run, assert_same_states, command, refused, stopped

import purepg
from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.groups import source
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.refill import Sampled, info
from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.envs.named_tasks import TASKS, reversing
from purepg.envs.registry import make
from purepg.envs.tasks import Task, decode, token_env
from purepg.language.model import LanguageModelConfig, digest
from purepg.language.pretrained import load_pretrained
from purepg.optimize import with_params
from purepg.run import start
from purepg.run.export import Choice, export
from purepg.run.load import load
from purepg.run.loop import described
from purepg.run.plan import RunConfig
from purepg.run.population import Population
from purepg.run.reward_model import with_learned_reward
from purepg.run.start import language_model
from purepg.run.summary import collapsed, last_episodes_return
from purepg.train import evaluate, train
from purepg.types import UsageError

GRPO_SCRIPT = Path(__file__).parent.parent / "experiments" / "grpo.py"
LLAMA = Path(__file__).parent / "fixtures" / "tiny_llama"
TINY = LanguageModelConfig(hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
TASK = reversing(2)
L, R, EOS = TASK.prompt_length, TASK.response_length, TASK.eos
ENV = token_env(TASK)._replace(held_out=token_env(TASK, held_out=True))
EVAL_EPISODES = 64
BUDGET = 150

CLONE = Experiment(
    clone,
    CloneConfig(batch_size=32, learning_rate=2e-2, num_held_out=16),
    RunConfig(
        env="pairs", total_steps=50 * 32 * R, num_seeds=2, log_every=10, **QUICK | {"eval_episodes": EVAL_EPISODES}
    ),
    network=language_model,
    network_config=TINY,
)


def tuning(folder: Path) -> Experiment:
    """GRPO from a clone, whose sizes are not those that are asked for; so fast that its seeds soon differ."""
    config = GRPOConfig(num_prompts=2, group_size=4, num_held_out=4, learning_rate=3e-2)
    network = LanguageModelConfig(start=str(folder))
    run = replace(CLONE.run, total_steps=BUDGET, num_seeds=3, log_every=2)
    return Experiment(grpo, config, run, network=language_model, network_config=network)


class Run(NamedTuple):
    out: Path
    printed: str
    states: list[Any]  # the last of each chunk
    start: Path | None = None

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON

    @property
    def params(self) -> Any:
        """Those of the best agent, out of the state that the run ended with."""
        best = int(np.argmax(self.summary["settings"][0]["finals"]))
        return jax.tree.map(lambda x: x[0, best], self.states[0].learner.params)

    def metrics(self, name: str) -> np.ndarray:
        with np.load(self.out / "metrics.npz") as found:
            return found[name][0]


def run(experiment: Experiment, out: Path, *flags: str, start: Path | None = None) -> Run:
    """Runs a script's main to its end."""
    states, final = [], Population.final

    def note(self, members, state):
        states.append(jax.device_get(state))
        return final(self, members, state)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(Population, "final", note)
        assert command(experiment, out, *flags) == 0
    return Run(out, printed.getvalue(), states, start)


@pytest.fixture(scope="module", autouse=True)
def session():
    """The task has a name, and programs compile quickly and are shared: these tests compile much and run little."""
    before = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch, shared_programs():
        patch.setitem(TASKS, "pairs", lambda: TASK)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def fake_wandb():
    with pytest.MonkeyPatch.context() as patch:
        yield FakeWandb(patch)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory, fake_wandb):
    return run(CLONE, tmp_path_factory.mktemp("clone") / "out", "--wandb", "offline")


@pytest.fixture(scope="module")
def tuned(cloned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(cloned.out, folder / "clone")
    return run(tuning(folder / "clone"), folder / "out", start=folder / "clone")


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """The out folder of `experiments/grpo.py`, in a few steps."""
    out = tmp_path_factory.mktemp("cartpole") / "out"
    flags = "--grpo.max-steps 10 --total-steps 400 --num-seeds 1 --network.hidden 8 --eval-episodes 2 --devices 1"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        arguments = [*flags.split(), "--eval-max-steps", "10", "--wandb", "disabled", "--out", str(out)]
        patch.setattr(sys, "argv", [str(GRPO_SCRIPT), *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(GRPO_SCRIPT), run_name="__main__")
    assert exit_.value.code == 0
    return out


def prompts(held_out: bool) -> set[str]:
    """All of the task's, by drawing them."""
    found = jax.vmap(lambda key: TASK.prompt(key, held_out))(jax.random.split(jax.random.key(0), 3000))
    return {decode(TASK, row) for row in np.unique(found, axis=0)}


def right(prompt: str, response: str) -> bool:
    return response == f"{prompt[1]}{prompt[0]}."


def greedy(model: Any, params: Any, prompt: np.ndarray) -> np.ndarray:
    """The likeliest token after each prefix, column after column."""
    row = np.concatenate([prompt, np.full((len(prompt), R), -1)], axis=1)
    ended = np.zeros(len(prompt), bool)
    apply = quick_jit(lambda row: model.apply(params, row)[0].mode())
    for column in range(L, L + R):
        token = np.asarray(apply(jnp.asarray(row)))
        row[:, column] = np.where(ended, -1, token)
        ended |= token == EOS
    return row


# --- cloning ---


def test_a_step_of_cloning_is_the_gradient_of_the_demonstrations_mean_log_likelihood():
    """Of two demonstrations, of two tokens and of three, the update's mean length says how often each was drawn."""
    prompt, short, long = jnp.array([3, 4, 10]), jnp.array([7, EOS, -1]), jnp.array([4, 3, EOS])
    task = TASK._replace(
        prompt=lambda key, held_out: prompt,
        demonstration=lambda key, prompt: jnp.where(jax.random.bernoulli(key), long, short),
    )
    B = 16
    config = CloneConfig(batch_size=B, optimizer="sgd", learning_rate=1.0, max_grad_norm=None, num_held_out=0)
    env = token_env(task)
    model = language_model(env, replace(TINY, temperature=0.5))
    algorithm = clone(env, model, config)
    state = quick_jit(algorithm.init)(jax.random.key(1))
    after, metrics = quick_jit(algorithm.step)(jax.random.key(2), state, 0)
    num_long = round(B * (float(metrics["response_length"]) - 2))
    assert 0 < num_long < B and metrics["env_steps"] == B * R

    def mean_log_likelihood(params):
        distribution, _ = model.score(params, jnp.stack([jnp.append(prompt, short), jnp.append(prompt, long)]))
        log_pi = jax.nn.log_softmax(distribution.logits)
        of_short = log_pi[0, 0, 7] + log_pi[0, 1, EOS]
        of_long = log_pi[1, 0, 4] + log_pi[1, 1, 3] + log_pi[1, 2, EOS]
        return ((B - num_long) * of_short + num_long * of_long) / (2 * B + num_long)

    value, gradient = quick_jit(jax.value_and_grad(mean_log_likelihood))(state.learner.params)
    np.testing.assert_allclose(metrics["policy_loss"], -value, rtol=1e-5)
    step = jax.tree.map(lambda x, y: x - y, after.learner.params, state.learner.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), step, gradient)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-4
    assert not {"episode_return", "num_episodes", "held_out_return"} & metrics.keys()  # nothing was answered


def test_cloning_learns_the_task(cloned):
    held_out = cloned.metrics("held_out_return")
    assert (held_out[:, :3] <= 0.2).all() and (held_out[:, -5:].mean(-1) > 0.4).all()
    assert min(cloned.summary["settings"][0]["mode"]["finals"]) > 0.4


EASY: Task = TASK._replace(reward=lambda prompt, response: (response[0] % 2 == 0).astype(jnp.float32))
EASY_ENV = token_env(EASY)._replace(held_out=token_env(EASY, held_out=True))
DPO = DPOConfig(num_pairs=32, batch_size=8, num_held_out=4, learning_rate=1e-2)


def test_swept_floats_and_seeds_under_vmap_are_a_plain_loop_traced_once():
    config, traces = replace(DPO, num_held_out=0), []

    def block(hyper, temperature, key):
        traces.append(1)
        model = language_model(EASY_ENV, replace(TINY, temperature=temperature))
        algorithm = dpo(EASY_ENV, model, replace(config, **hyper))
        k_init, k_train = jax.random.split(key)
        state, metrics = train(k_train, algorithm, algorithm.init(k_init), 0, 3)
        return state.learner.params, metrics["policy_loss"]  # the fewer, the faster to compile

    hyper = {"learning_rate": jnp.array([3e-3, 1e-2]), "beta": jnp.array([0.1, 0.5])}
    temperature, keys = jnp.array([0.7, 1.3]), jax.random.split(jax.random.key(0), 2)
    population = quick_jit(jax.vmap(jax.vmap(block, (None, None, 0)), (0, 0, None)))
    after = jax.tree.map(np.asarray, population(hyper, temperature, keys))
    population(jax.tree.map(lambda x: 0.5 * x, hyper), temperature, keys[::-1])
    assert len(traces) == 1
    one, ends = quick_jit(block), []
    for h in range(2):
        for s in range(2):
            alone = one({name: x[h] for name, x in hyper.items()}, temperature[h], keys[s])
            jax.tree.map(
                lambda x, y, h=h, s=s: np.testing.assert_allclose(x[h, s], y, rtol=2e-3, atol=1e-4), after, alone
            )
            ends.append(np.asarray(alone[0]["params"]["embedding"]).ravel())
    assert len(traces) == 2 and len(np.unique(ends, axis=0)) == 4
    # At the start's policy, a pair says nothing yet.
    np.testing.assert_allclose(after[1][..., 0], math.log(2), rtol=1e-5)


# --- DPO's data ---


@quick_jit
def dpo_state(key, learning_rate, beta):
    algorithm = dpo(EASY_ENV, language_model(EASY_ENV, TINY), replace(DPO, learning_rate=learning_rate, beta=beta))
    return algorithm.init(key)


def test_pairs_are_what_a_key_draws_whatever_is_learned_from_them():
    def draw(*arguments):
        return dpo_state(*arguments).world

    first = draw(jax.random.key(0), 1e-3, 0.1)
    for learning_rate, beta in (1e-1, 0.1), (1e-3, 2.0):
        assert_same_states(draw(jax.random.key(0), learning_rate, beta), first)
    assert not np.array_equal(draw(jax.random.key(1), 1e-3, 0.1).chosen, first.chosen)
    told = np.asarray(first.weight) > 0
    assert 5 < told.sum() < len(told) + 1
    assert (np.asarray(first.chosen)[told, L] % 2 == 0).all() and (np.asarray(first.rejected)[told, L] % 2 == 1).all()


def test_pairs_are_answers_of_the_starts_policy():
    """So sharp that it has one answer."""
    obs, rng = jnp.zeros(L + R, jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(language_model(ENV, TINY).init, jax.random.key(0), obs)
    own = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    model = language_model(ENV, replace(TINY, temperature=1e-4), own)
    state = quick_jit(dpo(ENV, model, DPO).init)(jax.random.key(0))
    pairs = jax.tree.map(np.asarray, state.world)
    expected = greedy(model, own, pairs.chosen[:, :L])
    np.testing.assert_array_equal(pairs.chosen, expected)
    np.testing.assert_array_equal(pairs.rejected, expected)
    assert {decode(TASK, row) for row in pairs.chosen[:, :L]} <= prompts(held_out=False)
    assert len(np.unique(expected[:, L:], axis=0)) > 1
    assert_same_states(state.learner.params, own)


def test_nothing_is_ever_sampled_from_what_learns():
    """A step draws of the pairs that there are, and has no loop over columns to write others."""
    algorithm = dpo(EASY_ENV, language_model(EASY_ENV, TINY), replace(DPO, num_held_out=0))
    state, step = dpo_state(jax.random.key(0), 1e-2, 0.1), quick_jit(algorithm.step)
    other = state._replace(learner=with_params(state.learner, jax.tree.map(lambda x: 3 * x, state.learner.params)))
    (after, metrics), (after_other, metrics_other) = (step(jax.random.key(1), x, 0) for x in (state, other))
    assert_same_states(after.world, state.world)
    assert_same_states(after_other.world, state.world)
    assert metrics["response_length"] == metrics_other["response_length"]
    assert metrics["policy_loss"] != metrics_other["policy_loss"]
    loops = {"scan", "while"}
    assert not loops & {x.primitive.name for x in equations(algorithm.step, jax.random.key(1), state, 0)}
    sampling = dpo(EASY_ENV, language_model(EASY_ENV, TINY), DPO)  # with held-out prompts it has, to be watched
    assert loops & {x.primitive.name for x in equations(sampling.step, jax.random.key(1), state, 0)}


# --- what a run says of held-out prompts ---


@pytest.mark.parametrize("name", ["cloned", "tuned"])
def test_held_out_prompts_alone_are_shown_with_what_was_answered_and_its_reward(name, request):
    found = request.getfixturevalue(name)
    held_out = prompts(held_out=True)
    assert len(held_out) == 10 and not held_out & prompts(held_out=False)
    (setting,) = found.summary["settings"]
    assert len(setting["responses"]) == len(setting["finals"])
    shown = [response for of_seed in setting["responses"] for response in of_seed]
    assert len(shown) == 8 * len(setting["finals"])
    for response in shown:
        assert response["prompt"] in held_out
        assert "." not in response["response"][:-1] and len(response["response"]) <= R
        assert response["reward"] == right(response["prompt"], response["response"])
    assert len({response["prompt"] for response in shown}) > 1
    assert name == "tuned" or {response["reward"] for response in shown} == {0.0, 1.0}


def test_the_report_lists_what_the_best_agent_answered(cloned):
    lines = cloned.printed.splitlines()
    assert "tokens/s" in lines[0]
    (setting,) = cloned.summary["settings"]
    best = int(np.argmax(setting["finals"]))
    at = lines.index(f"final evaluation of seed {best}:")
    for line, response in zip(lines[at + 1 :], setting["responses"][best], strict=False):
        assert line.split() == [response["prompt"] + response["response"], "reward", f"{response['reward']:g}"]
    assert lines[at + 9 :] == [f"wrote {cloned.out}"]


def test_what_stands_after_the_end_is_no_answer_and_each_seed_has_its_own():
    rows = np.array(
        [
            [[3, 7, 10, 7, 3, EOS], [3, 7, 10, 7, EOS, 3]],
            [[4, 5, 10, EOS, 4, EOS], [4, 5, 10, 5, 4, 4]],
        ]
    )
    earned = np.array([[1.0, 0.0], [0.0, 0.25]])
    found = described(token_env(TASK), rows[None], jnp.asarray(earned[None]))
    assert found and found[0] == [
        [{"prompt": "37<", "response": "73.", "reward": 1.0}, {"prompt": "37<", "response": "7.", "reward": 0.0}],
        [{"prompt": "45<", "response": ".", "reward": 0.0}, {"prompt": "45<", "response": "544", "reward": 0.25}],
    ]


def test_each_seeds_wandb_run_has_its_answers_as_a_table(cloned, fake_wandb):
    (setting,) = cloned.summary["settings"]
    assert set(fake_wandb.runs) == {"seed=0", "seed=1"}
    for s in range(2):
        logged = fake_wandb.runs[f"seed={s}"]
        (table,) = (row["responses"] for row in logged.rows if "responses" in row)
        assert "responses" not in logged.summary
        assert [dict(zip(table.columns, x, strict=True)) for x in table.data] == setting["responses"][s]


@pytest.mark.parametrize("name", ["cloned", "tuned"])
def test_the_best_agent_loaded_answers_held_out_prompts_as_the_run_said(name, request):
    found = request.getfixturevalue(name)
    agent = load(found.out, best=True)
    (setting,) = found.summary["settings"]
    assert setting["finals"][agent.seed] == max(setting["finals"])
    key = jax.random.fold_in(jax.random.key(0), 2**31 - 1)  # the run's evaluation
    act = agent.algorithm.policy(agent.state, True)

    def mean(env: Any) -> float:
        stats = quick_jit(lambda key: evaluate(key, env, act, EVAL_EPISODES, R).episode_return.mean())
        return float(stats(key))

    assert mean(agent.env.held_out) == setting["mode"]["finals"][agent.seed]
    assert name == "tuned" or mean(agent.env) != mean(agent.env.held_out)


def test_the_evaluation_script_answers_held_out_prompts(cloned, capsys):
    lines = evaluated(capsys, str(cloned.out), "--best", "--episodes", "500", "--eval-seed", "3").splitlines()
    agent = load(cloned.out, best=True)
    act = agent.algorithm.policy(agent.state, True)

    def mean(env: Any) -> str:
        stats = quick_jit(lambda key: evaluate(key, env, act, 500, R))(jax.random.key(3))
        return f"{stats.episode_return.mean():.2f}"

    assert mean(agent.env) != mean(agent.env.held_out)
    assert lines[1].startswith(f"return {mean(agent.env.held_out)} +- ")


# --- where a run starts ---


@pytest.mark.parametrize("name", ["cloned", "tuned"])
def test_a_start_is_the_parameters_and_the_sizes_of_the_runs_best_agent(name, request):
    """Also where that run took its sizes from where it itself started, and its own config has others."""
    found = request.getfixturevalue(name)
    model = language_model(ENV, LanguageModelConfig(start=str(found.out), temperature=0.5))
    drawn = quick_jit(model.init)(jax.random.key(0), jnp.zeros(L + R, jnp.int32))
    assert_same_states(jax.device_get(drawn), found.params)
    sizes = model.transformer.config
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.num_kv_heads) == (16, 1, 2, 1)
    assert model.temperature == 0.5 and model.digest == digest(found.params)
    everyone = found.states[0].learner.params
    assert len({digest(jax.tree.map(lambda x, s=s: x[0, s], everyone)) for s in range(2)}) == 2


def test_the_best_agent_is_written_for_other_programs(cloned, tmp_path):
    assert "without a tokenizer" in export(Choice(cloned.out, tmp_path / "model"))
    config, num_tokens, params = load_pretrained(tmp_path / "model")
    assert num_tokens == len(ENV.task.vocabulary) and config.num_layers == 1
    jax.tree.map(np.testing.assert_array_equal, params, cloned.params)


def test_the_package_reads_a_start_as_a_run_does_inside_of_a_program_too(cloned):
    config = LanguageModelConfig(start=str(cloned.out))
    start.read_start.cache_clear()
    drawn = quick_jit(lambda key: purepg.language_model(ENV, config).init(key, jnp.zeros(L + R, jnp.int32)))
    assert_same_states(jax.device_get(drawn(jax.random.key(0))), cloned.params)


def test_config_json_has_the_sizes_in_use_and_a_flag_that_a_start_overrules_is_named_once(tuned, tmp_path, capsys):
    assert tuned.start
    sizes = {name: getattr(TINY, name) for name in ("hidden_size", "mlp_size", "num_layers", "num_heads")}
    assert json.loads((tuned.out / "config.json").read_text())["network"].items() >= sizes.items()
    assert command(tuning(tuned.start), tuned.out, "--resume", "--network.num-layers", "7") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "sizes" in line]
    assert lines == [f"sizes are those of start ({tuned.start}): num_layers (7) is 1"]
    assert command(tuning(tuned.start), tmp_path / "out", "--sweep", "hidden_size=16,32") == 2
    assert f"cannot sweep hidden_size: start ({tuned.start}) has its own, 16" in capsys.readouterr().err


def test_a_fine_tuning_run_begins_there_and_says_so(cloned, tuned):
    config = json.loads((tuned.out / "config.json").read_text())
    assert config["start_digest"] == digest(cloned.params)
    assert json.loads((cloned.out / "config.json").read_text())["start_digest"] is None
    (state,) = tuned.states
    for seed in range(3):
        own = jax.tree.map(lambda x, seed=seed: x[0, seed], state.learner)
        assert_same_states(own.reference, cloned.params)
        assert digest(own.params) != digest(own.reference)


def test_a_value_head_is_drawn_beside_what_the_start_has(cloned):
    model = language_model(ENV, LanguageModelConfig(start=str(cloned.out), value_head=True))
    assert model.has_value
    drawn: Any = quick_jit(model.init)(jax.random.key(0), jnp.zeros(L + R, jnp.int32))
    assert drawn["params"].keys() - cloned.params["params"].keys() == {"value_head"}
    own = {name: drawn["params"][name] for name in cloned.params["params"]}
    assert_same_states(jax.device_get(own), cloned.params["params"])


def test_a_resume_from_another_start_is_refused(tuned, capsys):
    """The folder is the same, and another clone is the best in it."""
    assert tuned.start
    path = tuned.start / "summary.json"
    before = path.read_text()
    summary = json.loads(before)
    summary["settings"][0]["finals"].reverse()
    path.write_text(json.dumps(summary))
    start.read_start.cache_clear()
    try:
        line = refused(tuning(tuned.start), tuned.out, capsys)
        was = json.loads((tuned.out / "config.json").read_text())["start_digest"]
        assert f"with another configuration: start_digest (was {was}, is " in line
    finally:
        path.write_text(before)
        start.read_start.cache_clear()
    assert command(tuning(tuned.start), tuned.out, "--resume") == 0


def test_what_cannot_be_a_start_is_refused_in_one_line(cloned, cartpole, tmp_path, capsys):
    def said(folder: Path, *flags: str) -> str:
        out = tmp_path / "out"
        assert command(tuning(folder), out, *flags) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and ": error: " in line and not out.exists()
        return line

    none = tmp_path / "none"
    assert f"{none} does not exist: it must be a checkpoint, or the folder of a run" in said(none)
    assert f"start ({cartpole}) holds a run without a language model" in said(cartpole)
    assert f"start ({cloned.out}) is a model of 12 tokens; addition needs one of 13" in said(
        cloned.out, "--env", "addition"
    )
    assert "is a model of 80 tokens; reversing needs one of 12" in said(LLAMA)
    assert "CartPole-v1 has no tokens" in said(cloned.out, "--env", "CartPole-v1")
    assert f"{tmp_path} has no config.json" in said(tmp_path)
    assert "head" in said(cloned.out, "--grpo.baseline", "value")


def test_a_folder_of_safetensors_is_a_start_of_a_task_of_as_many_tokens():
    letters = tuple(map(chr, range(33, 113)))
    env = token_env(TASK._replace(vocabulary=letters))
    model = language_model(env, LanguageModelConfig(start=str(LLAMA)))
    shape, num_tokens, params = load_pretrained(LLAMA)
    assert num_tokens == 80 and model.digest == digest(params)
    assert {name: getattr(model.transformer.config, name) for name in vars(shape)} == vars(shape)
    with np.load(LLAMA / "expected.npz") as expected:
        token, logits = expected["token"], expected["logits"][:, L - 1 : -1]
    drawn = quick_jit(model.init)(jax.random.key(0), jnp.zeros(L + R, jnp.int32))
    score = quick_jit(lambda params, token: model.score(params, token)[0].logits)
    present = token[:, L - 1 : -1] >= 0
    np.testing.assert_allclose(np.asarray(score(drawn, token))[present], logits[present], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="is a model of 80 tokens; reversing needs one of 12"):
        language_model(ENV, LanguageModelConfig(start=str(LLAMA)))


# --- a reward model ---


def test_a_reward_model_ranks_unseen_answers_and_pays_the_same_when_it_is_read_again(cloned, tmp_path):
    config = RewardConfig(num_pairs=512, batch_size=64, learning_rate=1e-2)
    network = replace(TINY, start=str(cloned.out), value_head=True)
    budget = replace(CLONE.run, total_steps=150 * 2 * 64 * R, num_seeds=1)
    judge = run(
        Experiment(reward_model, config, budget, network=language_model, network_config=network), tmp_path / "x"
    )
    (unseen,) = judge.summary["settings"][0]["measures"]["eval/ranked_right"]["finals"]
    assert unseen > 0.55 and judge.metrics("ranked_right")[0, -20:].mean() > 0.7
    env = with_learned_reward(ENV, judge.out)
    groups = source(env, language_model(ENV, LanguageModelConfig(start=str(cloned.out))))
    found = quick_jit(lambda key: groups.sample(key, groups.init(key), 256, 4))(jax.random.key(0))
    learned = np.asarray(found.reward.sum(-1))
    assert abs(learned.mean()) < 0.3 and 0.7 < np.sqrt(learned.var(axis=1, ddof=1).mean()) < 1.3
    true = np.asarray(jax.vmap(jax.vmap(lambda row: TASK.reward(row[:L], row[L:])))(found.obs))
    assert learned[true > 0].mean() > learned[true == 0].mean() + 0.5
    assert env.held_out == ENV.held_out  # which is for the true reward
    with pytest.raises(UsageError, match="a reward model for 12 tokens; addition has 13"):
        with_learned_reward(make("addition"), judge.out)
    with pytest.raises(UsageError, match=r"must hold a run of experiments/reward_model.py"):
        with_learned_reward(ENV, cloned.out)


# --- adapters ---


@pytest.fixture(scope="module")
def adapted(cloned, tmp_path_factory):
    network = LanguageModelConfig(
        start=str(cloned.out), lora_rank=2, scan_layers=True, rows_at_once=3, tokens_at_once=7, bfloat16=True
    )
    experiment = tuning(cloned.out)
    experiment = experiment._replace(network_config=network, run=replace(experiment.run, num_seeds=2))
    numbers, compile_ = [], Population._compile

    def note(self, function, *arguments, **static):
        traced = function.trace(*arguments, **static).jaxpr
        numbers.append((sum(x.size for x in traced.consts), sum(x.size for x in traced.in_avals)))
        return compile_(self, function, *arguments, **static)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Population, "_compile", note)
        made = run(experiment, tmp_path_factory.mktemp("adapted") / "out", "--sweep", "lora_alpha=4.0,16.0")
    return experiment, made, numbers


def test_a_run_of_adapters_keeps_them_alone_and_their_frozen_model_is_the_start(cloned, adapted):
    (state,) = adapted[1].states
    sizes = [sum(x.size for x in jax.tree.leaves(x)) for x in (state.learner.train_state.params, cloned.params)]
    assert sizes[0] < 4 * 0.6 * sizes[1] and state.learner.params["params"].keys() == {"blocks"}
    ups = state.learner.params["params"]["blocks"]["mlp"]["up"]["lora_b"]
    assert ups.shape[:2] == (2, 2) and len(np.unique(ups.reshape(4, -1), axis=0)) == 4 and ups.all()
    assert not state.learner.reference["params"]["blocks"]["mlp"]["up"]["lora_b"].any()
    kernel = adapted[0].network(ENV, adapted[0].network_config).frozen["params"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel[0], cloned.params["params"]["mlp_0"]["up"]["kernel"].astype(kernel.dtype))


def test_what_is_frozen_is_an_argument_of_a_runs_programs_and_no_constant(adapted):
    experiment, _, numbers = adapted
    size = sum(x.size for x in jax.tree.leaves(experiment.network(ENV, experiment.network_config).frozen))
    assert len(numbers) >= 3
    for constant, argument in numbers:
        assert constant < size / 4 and argument > size


def test_adapters_loaded_answer_as_their_run_said_and_merged_are_a_start(adapted, capsys):
    experiment, found, _ = adapted
    agent = load(found.out, setting=1, seed=0)
    key, env = jax.random.fold_in(jax.random.key(0), 2**31 - 1), agent.env.held_out  # of the run's evaluation
    assert env

    @quick_jit
    def mean(frozen, state):
        act = agent.policy(frozen, state, True)
        return evaluate(key, env, act, EVAL_EPISODES, R).episode_return.mean()

    assert float(mean(agent.frozen, agent.state)) == found.summary["settings"][1]["mode"]["finals"][0]
    assert "held" not in evaluated(capsys, str(found.out), "--best", "--episodes", "20")
    model = language_model(ENV, LanguageModelConfig(start=str(found.out)))
    finals = [setting["finals"] for setting in found.summary["settings"]]
    best = np.unravel_index(np.argmax(finals), np.shape(finals))
    agent = load(found.out, best=True)
    assert (agent.setting, agent.seed) == best and model.transformer.lora is None and model.start
    whole = experiment.network(ENV, replace(experiment.network_config, lora_alpha=(4.0, 16.0)[agent.setting]))
    row = jnp.asarray(np.tile(np.array([[3, 7, 10, 7, 3, EOS]]), (2, 1)))
    one, other = (
        quick_jit(lambda row, model=model, params=params: model.score(params, row)[0].log_prob(row[:, L:]))(row)
        for model, params in ((whole, agent.state.learner.params), (model, model.start))
    )
    np.testing.assert_allclose(one, other, atol=0.1)  # of bfloat16


# --- to go on ---


def test_fine_tuning_that_was_stopped_goes_on_to_the_same_bits_each_member_in_its_own_time(tuned, tmp_path):
    assert tuned.start
    env_steps = tuned.metrics("env_steps")
    assert len(np.unique((env_steps > 0).sum(-1))) > 1  # updates of their own number
    with stopped(2):
        command(tuning(tuned.start), tmp_path / "out")
    assert (tmp_path / "out" / "log.jsonl").stat().st_size < (tuned.out / "log.jsonl").stat().st_size
    resumed = run(tuning(tuned.start), tmp_path / "out", "--resume")
    assert_same_run(resumed.out, tuned.out)
    assert_same_states(resumed.states, tuned.states)


# --- what is counted ---


def test_env_steps_are_the_tokens_that_were_generated(cloned):
    groups = source(ENV, language_model(ENV, LanguageModelConfig(start=str(cloned.out), temperature=2.0)))
    found = quick_jit(lambda key: groups.sample(key, groups.init(key), 16, 4))(jax.random.key(0))
    responses = np.asarray(found.obs)[..., L:].reshape(-1, R).tolist()
    lengths = [row.index(EOS) + 1 if EOS in row else R for row in responses]
    assert len(set(lengths)) > 1 and sum(lengths) < 64 * R
    assert info(found, Sampled.of(found))["env_steps"] == sum(lengths) == np.asarray(found.mask).sum()
    assert info(found, Sampled.of(found))["episode_length"] == sum(lengths) / 64


def test_a_run_of_generated_tokens_keeps_within_its_budget(tuned):
    env_steps, length = tuned.metrics("env_steps"), tuned.metrics("episode_length")
    made = env_steps > 0
    assert ((env_steps[made] >= 8) & (env_steps[made] <= 8 * R)).all()
    np.testing.assert_allclose(env_steps[made], 8 * length[made], rtol=1e-6)
    total = np.nansum(env_steps, axis=-1)
    assert ((total <= BUDGET) & (total > BUDGET - 8 * R)).all()  # what was left might not have held another update
    assert tuned.summary["settings"][0]["env_steps"] == total.sum()


def test_where_nothing_was_answered_the_training_return_is_not_zero_but_missing():
    """Cloning without held-out prompts reads demonstrations, and has no return."""
    metrics = {"episode_return": np.full((1, 2, 3), math.nan), "num_episodes": np.full((1, 2, 3), 8.0)}
    assert np.isnan(last_episodes_return(metrics)).all()
    metrics["episode_return"][0, 1, 1] = 0.25
    np.testing.assert_array_equal(last_episodes_return(metrics), [[math.nan, 0.25]])


# --- collapse ---


def test_collapse_names_its_kind_its_seeds_and_the_first_update():
    nan = math.nan
    healthy = {"entropy": np.full((3, 4), 0.5), "kl_reference": np.full((3, 4), 1.0)}
    assert collapsed(healthy) == []
    silent = np.array([[0.5, 0.5, 0.009, 0.5], [0.5, 0.5, 0.5, 0.5], [0.5, 0.0, 0.0, nan]])
    (line,) = collapsed(healthy | {"entropy": silent})
    assert line.startswith("collapse: entropy under 0.01 nats") and line.endswith("in 2 of 3 seeds, first at update 1")
    far = np.array([[1.0, 20.0, 20.0, 20.0], [1.0, 2.0, 3.0, 20.1], [1.0, nan, nan, nan]])
    (line,) = collapsed(healthy | {"kl_reference": far})
    assert "a KL of more than 20.0 nats" in line and line.endswith("in 1 of 3 seeds, first at update 3")
    assert len(collapsed({"entropy": silent, "kl_reference": far})) == 2
    assert collapsed({"entropy": silent}) == []  # it has no reference: it may be as sure as it likes


# --- ordinary environments ---


def test_grpo_on_an_ordinary_environment_ends_finite_and_shows_no_responses(cartpole):
    (setting,) = json.loads((cartpole / "summary.json").read_text())["settings"]
    assert setting["diverged"] == [] and "responses" not in setting
    assert 0 < setting["iqm"] <= 10
    with np.load(cartpole / "metrics.npz") as metrics:
        assert all(np.isfinite(metrics[name]).all() for name in metrics)
        assert (metrics["num_episodes"] == 16).all() and "held_out_return" not in metrics
    assert json.loads((cartpole / "config.json").read_text())["start_digest"] is None
    assert load(cartpole, best=True).env.held_out is None
