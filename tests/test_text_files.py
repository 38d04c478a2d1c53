"""Demonstrations and pairs from files: what is read, the gradients of one step, and the runs that learn from them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exit_code, quick_jit, read_log, shared_programs
from test_text import TINY, letters, write

from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.language.tokenizer import load_tokenizer
from purepg.optimize import epoch_batch, key_of_epochs
from purepg.run import evaluation
from purepg.run.evaluation import report
from purepg.run.export import Choice, export
from purepg.run.load import load, stored_network
from purepg.run.reward_model import LearnedReward
from purepg.run.start import language_model
from purepg.run.text.config import DemonstrationsRunConfig, PairsRunConfig, TextRunConfig
from purepg.run.text.rows import rows_env
from purepg.types import Algorithm, State, UsageError

# Letters are answered by themselves in reverse; of a pair, the response with more letters e is preferred.
ROWS = [{"prompt": a + b, "completion": b + a} for a in "abcdefg" for b in "abcdefg" if a != b]
UNEVEN = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "efg"}, {"prompt": "g", "completion": ""}]
PAIRS = [
    {"prompt": a, "chosen": b + "e" + c, "rejected": c + b} for a in "abcd" for b in "abcdfg" for c in ("", "f", "ga")
]
QUICK: dict[str, Any] = {"num_seeds": 2, "total_steps": 10**9, "checkpoint_every": 1e9, "wandb": "disabled"}
CLONE = CloneConfig(batch_size=8, learning_rate=2e-2, num_held_out=0)
REWARD = RewardConfig(batch_size=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = letters(tmp_path_factory.mktemp("files"))
    write(out / "demos.jsonl", ROWS[::2])
    write(out / "uneven.jsonl", UNEVEN)
    write(out / "few.jsonl", PAIRS[:2])
    write(out / "pairs.jsonl", PAIRS[::2])
    write(out / "more.jsonl", PAIRS[1::2])
    return out


@pytest.fixture(scope="module", autouse=True)
def quickly():
    before = jax.config.values["jax_disable_most_optimizations"]
    with shared_programs():
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def demos(folder: Path, data: str = "demos.jsonl", **more: Any) -> DemonstrationsRunConfig:
    fields: dict[str, Any] = {"data": str(folder / data), "tokenizer": str(folder), "epochs": 60, **QUICK}
    return DemonstrationsRunConfig(**fields | more)


def pairs(folder: Path, data: str = "pairs.jsonl", **more: Any) -> PairsRunConfig:
    fields: dict[str, Any] = {"pairs": str(folder / data), "tokenizer": str(folder), "epochs": 16, **QUICK}
    return PairsRunConfig(**fields | more)


# --- files ---


def test_rows_are_prompts_padded_on_the_left_and_responses_that_end_padded_on_the_right(folder):
    env = rows_env(demos(folder, "uneven.jsonl", eval_data=str(folder / "demos.jsonl")), TINY)
    a, b, c, d, e, f, g, mark = range(2, 10)
    expected = [[a, b, mark, c, 0, -1, -1], [-1, d, mark, e, f, g, 0], [-1, g, mark, 0, -1, -1, -1]]
    np.testing.assert_array_equal(env.task.rows[:, 0], expected)
    assert env.held_out and env.held_out.task.rows.shape == (21, 1, 7)  # as wide, though its rows are shorter
    few = rows_env(demos(folder, eval_episodes=2), TINY)
    assert few.held_out and few.held_out.task.rows.tolist() == few.task.rows[:2].tolist() != few.task.rows.tolist()
    two = rows_env(pairs(folder, "few.jsonl", chat=False), TINY).task.rows
    np.testing.assert_array_equal(two, [[[a, a, e, 0, -1], [a, a, 0, -1, -1]], [[a, a, e, f, 0], [a, f, a, 0, -1]]])
    row = jnp.array(expected[1])
    assert env.task.reward(row[:3], row[3:]) == 1 and env.task.reward(row[:3], row[3:].at[0].set(f)) == 0
    np.testing.assert_array_equal(env.task.demonstration(jax.random.key(0), row[:3]), row[3:])


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "a"}, "row 2 lacks completion: a row must have completion$"),
        ({"prompt": "a", "completion": 5}, "row 2: completion must be text$"),
        (
            {"prompt": "a", "completion": "b<stop>"},
            "row 2: completion must not hold <stop>, which ends a response",
        ),
        (
            {"prompt": "a", "completion": "abcd"},
            r"row 2: completion has 5 tokens; it may have 4 \(response_length\), with the token that ends it$",
        ),
        ({"prompt": "abcd", "completion": "a"}, r"row 2 has 5 tokens; a prompt may have 1 to 4 \(prompt_length\)$"),
    ],
)
def test_what_is_wrong_in_a_demonstration_is_one_line_with_its_row(folder, tmp_path, row, line):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=line):
        rows_env(demos(folder, str(file), prompt_length=4, response_length=4), TINY)


def test_what_is_wrong_in_pairs_and_their_settings_is_one_line(folder, tmp_path):
    same = write(tmp_path / "same.jsonl", [PAIRS[0], {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(UsageError, match=r"row 2: chosen and rejected must differ$"):
        rows_env(pairs(folder, str(same)), TINY)
    with pytest.raises(UsageError, match=r"row 1 lacks chosen: a row must have chosen and rejected$"):
        rows_env(pairs(folder, "demos.jsonl"), TINY)
    with pytest.raises(UsageError, match=r"is given without data, the rows to learn from$"):
        rows_env(DemonstrationsRunConfig(eval_data=str(folder / "demos.jsonl")), TINY)
    with pytest.raises(UsageError, match=r"batch_size \(99\) must be at most 36, the number of rows to learn from$"):
        dpo(env := rows_env(pairs(folder), TINY), language_model(env, TINY), DPOConfig(batch_size=99))
    with pytest.raises(UsageError, match=r"needs a language model with a value head"):
        reward_model(env := rows_env(pairs(folder), TINY), language_model(env, TINY), REWARD)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    @quick_jit
    def drawn(key):
        return jax.vmap(lambda update: epoch_batch(key_of_epochs(key), 7, update, 5))(jnp.arange(14)).reshape(10, 7)

    found = drawn(jax.random.key(0))
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(7), (10, 1)))
    assert len(np.unique(found, axis=0)) > 5 and not np.array_equal(found, drawn(jax.random.key(1)))


# --- one step by hand ---


def log_prob(model: Any, params: Any, row: Any) -> Any:
    """log pi(y | x) of rows `[..., L + R]`: of every token, from a prefix of its own."""
    column = jnp.arange(model.task.prompt_length, row.shape[-1])
    prefix = jnp.where(jnp.arange(row.shape[-1]) < column[:, None], row[..., None, :], -1)
    token = row[..., model.task.prompt_length :]
    return jnp.sum(model.apply(params, prefix)[0].log_prob(token), axis=-1, where=token >= 0)


def random_params(model: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(8, jnp.int32))
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)


def measured(algorithm: Algorithm, state: State) -> Any:
    assert algorithm.measure
    return quick_jit(algorithm.measure)(state)


def test_a_step_of_fine_tuning_is_the_gradient_of_the_mean_log_likelihood_of_completions(folder):
    env = rows_env(demos(folder, "uneven.jsonl"), TINY)
    model = language_model(env, TINY, random_params(language_model(env, TINY), 0))
    schedule: Any = {"learning_rate": 0.1, "anneal_learning_rate": True, "anneal_updates": 4}
    config = CloneConfig(batch_size=3, optimizer="sgd", max_grad_norm=None, **schedule)
    algorithm = clone(env, model, config)
    state = quick_jit(algorithm.init)(jax.random.key(0))
    after, metrics = quick_jit(algorithm.step)(jax.random.key(1), state, 1)

    def mean(params):  # of 2 + 4 + 1 tokens, stop tokens among them
        return jnp.sum(log_prob(model, params, env.task.rows[:, 0])) / 7

    value, gradient = quick_jit(jax.value_and_grad(mean))(state.learner.params)
    step = jax.tree.map(lambda new, old: (new - old) / (0.1 * 3 / 4), after.learner.params, state.learner.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), step, gradient)
    assert metrics["policy_loss"] == pytest.approx(-float(value), rel=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 0.05
    found = measured(algorithm, state)
    assert found["eval/loss"] == pytest.approx(-float(value), rel=1e-5)
    assert found["eval/perplexity"] == pytest.approx(math.exp(-value), rel=1e-5)


def test_dpos_loss_on_two_pairs_is_its_formula(folder):
    env = rows_env(pairs(folder, "few.jsonl"), TINY)
    model = language_model(env, TINY)
    own, reference = (random_params(model, seed) for seed in (1, 2))
    algorithm = dpo(env, model, DPOConfig(batch_size=2, beta=0.3, anneal_learning_rate=True, anneal_updates=3))
    state = quick_jit(algorithm.init)(jax.random.key(0))
    train_state = state.learner.train_state._replace(params=own)
    state = state._replace(learner=state.learner._replace(train_state=train_state, reference=reference))
    ended, metrics = quick_jit(algorithm.step)(jax.random.key(1), state, 3)
    jax.tree.map(np.testing.assert_array_equal, ended.learner.params, own)  # the learning rate has fallen to 0
    of_pairs = quick_jit(lambda params: log_prob(model, params, env.task.rows))
    chosen, rejected = np.asarray(of_pairs(own) - of_pairs(reference)).T
    margin = 0.3 * (chosen - rejected)
    loss = np.mean(-np.log(1 / (1 + np.exp(-margin))))
    assert metrics["policy_loss"] == pytest.approx(loss, rel=1e-4) and abs(loss - math.log(2)) > 0.01
    found = measured(algorithm, state)
    assert found["eval/loss"] == pytest.approx(loss, rel=1e-4)
    assert found["eval/ranked_right"] == np.mean(margin > 0)


# --- runs ---


def ran(algorithm: Any, config: Any, network: Any, run: Any, out: Path, *flags: str) -> int:
    return exit_code(algorithm, config, language_model, network, run, arguments=["--out", str(out), *flags])


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert ran(clone, CLONE, TINY, demos(folder, eval_every=50), out) == 0
    return out


def test_a_run_learns_its_demonstrations_and_says_so(tuned, folder):
    config = json.loads((tuned / "config.json").read_text())
    (setting,) = json.loads((tuned / "summary.json").read_text())["settings"]
    assert config["run"]["total_steps"] == 60 * 21 * 3 and setting["num_updates"] == 60 * 21 // 8
    assert config["run"]["env"] == "text" and len(config["data_digest"]) == 16
    loss = read_log(tuned / "log.jsonl")["eval/loss"][0]
    assert np.isfinite(loss[0]).nonzero()[0].tolist() == [0, 50, 100, 150]
    assert setting["before"]["eval/loss"]["iqm"] > 2 > 0.2 > setting["measures"]["eval/loss"]["iqm"]
    assert setting["finals"] == pytest.approx([-x for x in setting["measures"]["eval/loss"]["finals"]])
    shown = setting["responses"][int(np.argmax(setting["finals"]))]
    assert np.mean([row["reward"] for row in shown]) > 0.8 and shown[0]["prompt"] == "ab"
    assert all((row["response"] == row["prompt"][::-1]) == (row["reward"] == 1) for row in shown)


def test_an_exported_run_has_the_tokenizer_that_it_used_wherever_it_started(tuned, judge, folder, tmp_path):
    for i, run in enumerate((tuned, judge)):  # which names it, and which has it from there
        assert f"with the tokenizer of {folder}" in export(Choice(run, tmp_path / f"model{i}"))
        assert load_tokenizer(tmp_path / f"model{i}").num_tokens == 10


def test_a_run_goes_on_with_more_epochs_and_refuses_another_file(tuned, folder, tmp_path, capsys):
    assert ran(clone, CLONE, TINY, demos(folder, eval_every=50, epochs=30), tmp_path / "out") == 0
    assert ran(clone, CLONE, TINY, demos(folder, eval_every=50), tmp_path / "out", "--resume") == 0
    a, b = (read_log(out / "log.jsonl") for out in (tmp_path / "out", tuned))
    for name in b:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    capsys.readouterr()
    flags = "--data", str(write(tmp_path / "other.jsonl", ROWS[1::2])), "--resume"
    assert ran(clone, CLONE, TINY, demos(folder, eval_every=50), tmp_path / "out", *flags) == 2
    assert "data_digest (was " in capsys.readouterr().err


@pytest.fixture(scope="module")
def judge(tuned, folder, tmp_path_factory):
    """A reward model with adapters of the fine-tuned model, whose tokenizer it has from there."""
    out = tmp_path_factory.mktemp("judge") / "judge"
    network = replace(TINY, start=str(tuned), value_head=True, lora_rank=2)
    run = pairs(folder, eval_pairs=str(folder / "more.jsonl"), tokenizer=None)
    assert ran(reward_model, REWARD, network, run, out) == 0
    return out


def test_a_reward_model_ranks_held_out_pairs(judge):
    (setting,) = json.loads((judge / "summary.json").read_text())["settings"]
    ranked = setting["measures"]["eval/ranked_right"]["finals"]
    assert min(ranked) > 0.85 and setting["before"]["eval/ranked_right"]["iqm"] == 0.5  # all rewards are 0 at first


def test_a_reward_model_answers_nothing_that_could_be_evaluated(judge, tmp_path):
    with pytest.raises(UsageError, match="holds a reward model, which gives no responses"):
        report(evaluation.Choice(judge, best=True))
    assert export(Choice(judge, tmp_path / "model")).endswith(", without its value head")


def test_a_saved_reward_models_reward_is_its_value_after_the_last_token(judge):
    agent = load(judge, best=True)
    length, rows = agent.env.task.prompt_length, agent.env.task.rows[:, 0]
    reward = LearnedReward(judge, agent.env.task)
    found = reward(rows[:, :length], rows[:, length:])
    model = language_model(agent.env, stored_network(judge))
    row = min(rows, key=lambda row: (row >= 0).sum())
    tokens = jnp.array(row[row >= 0])[None]
    _, value, _ = quick_jit(model.transformer.apply)(model.whole(agent.state.learner.params), tokens)
    assert found[rows.tolist().index(row.tolist())] == pytest.approx(float(value[0, -1]), abs=1e-5)
    assert tokens.shape[1] < rows.shape[1] and found.std() > 0.1


def test_text_runs_are_rewarded_by_a_saved_reward_model(judge, tuned, folder, tmp_path, capsys):
    prompts = str(write(tmp_path / "prompts.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}]))
    sizes: dict[str, Any] = {"response_length": 4, "total_steps": 32, "num_seeds": 1, "eval_samples": 1}
    own = shutil.copytree(judge, tmp_path / "own" / "judge")
    run = TextRunConfig(prompts=prompts, reward=(f"{own}=0.5", "length:9"), **QUICK | sizes)
    config = GRPOConfig(num_prompts=2, group_size=2, kl_coef=0.0)
    flags = config, replace(TINY, start=str(tuned)), run, tmp_path / "out"
    assert ran(grpo, *flags) == 0
    metrics = read_log(tmp_path / "out" / "log.jsonl")
    total = metrics["reward/length"] + 0.5 * metrics["reward/judge"]
    np.testing.assert_allclose(metrics["episode_return"], total, atol=1e-5)
    task = load(judge, best=True).env.task
    learned, tokenizer = LearnedReward(judge, task), task.tokenizer
    for row in map(json.loads, (tmp_path / "out" / "samples.jsonl").read_text().splitlines()):
        prompt = np.array([tokenizer.encode(row["prompt"] + "!")])
        response = np.array([[*tokenizer.encode(row["response"]), 0]])
        if len(row["response"]) < 4:  # a full one may or may not have ended
            assert row["reward"] == pytest.approx(1 + 0.5 * learned(prompt, response)[0], abs=1e-4)
    summary = own / "summary.json"  # of a reward model that is trained again
    summary.write_text(summary.read_text().replace('"run_seconds": ', '"run_seconds": 1'))
    assert ran(grpo, *flags, "--resume") == 2 and "reward_digests.judge (was " in capsys.readouterr().err
    summary.unlink()
    assert ran(grpo, *flags, "--overwrite") == 2 and "its run has not finished" in capsys.readouterr().err
