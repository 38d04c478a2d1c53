"""A language model as a policy: what `generate` samples is what `score` scores, and what `apply` acts by."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, quick_jit
from scipy.stats import chisquare

import purepg
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.named_mdps import bandit
from purepg.envs.tasks import Task, token_env
from purepg.experience.acting import actor
from purepg.experience.rollout import episodes
from purepg.language.model import LanguageModel, LanguageModelConfig, digest, language_model
from purepg.types import UsageError

SMALL = LanguageModelConfig(
    hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_size=6, tied_head=False, qkv_bias=True,
    value_head=True, temperature=0.7,
)  # fmt: skip
L = 4
PROMPTS: Any = np.array([[-1, -1, -1, 1], [0, 1, 3, 0], [-1, 3, 3, 1]], np.int32)
MANY = 20_000


def task(num_tokens: int, response_length: int) -> Task:
    """A prompt of four tokens; token 2 ends a response, and nothing is worth anything."""

    def prompt(key, held_out):
        del key, held_out
        return jnp.zeros(L, jnp.int32)

    def reward(prompt, response):
        del prompt, response
        return jnp.float32(0)

    vocabulary = tuple("abcdefgh"[:num_tokens])
    return Task("letters", vocabulary, 2, L, response_length, prompt, lambda key, prompt: prompt, reward)


def model_of(num_tokens: int, response_length: int, config: LanguageModelConfig = SMALL) -> LanguageModel:
    return language_model(token_env(task(num_tokens, response_length)), config)


def parameters(model: LanguageModel, seed: int, scale: float = 0.5) -> Any:
    """Normal numbers for all of them, scales of norms and the value head included: a policy far from uniform."""
    rng, obs = np.random.default_rng(seed), jnp.zeros(L + model.task.response_length, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), obs)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes)


# --- a longer task: five tokens, of which 2 ends, and responses of up to six ---

R, G = 6, 5
MODEL = model_of(5, R)
PARAMS = parameters(MODEL, 4)


def generate(key, params, prompt):
    return MODEL.generate(key, params, prompt, G)


generated = quick_jit(generate)


@pytest.fixture(scope="module")
def rows():
    """(token `[3, G, L + R]`, log_prob `[3, G, R]`)."""
    return jax.tree.map(np.asarray, generated(jax.random.key(0), PARAMS, PROMPTS))


@pytest.fixture(scope="module")
def scored(rows):
    """`score` of the rows: (logits `[3 G, R, V]`, V `[3 G, R]`)."""
    policy, value = quick_jit(MODEL.score)(PARAMS, rows[0].reshape(-1, L + R))
    return np.asarray(policy.logits), np.asarray(value)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_a_row_is_its_prompt_and_then_a_response_with_nothing_after_eos(rows):
    token, log_prob = rows
    assert token.shape == (3, G, L + R) and log_prob.shape == (3, G, R) and token.dtype == np.int32
    np.testing.assert_array_equal(token[..., :L], np.broadcast_to(PROMPTS[:, None], (3, G, L)))
    response = token[..., L:]
    before = np.cumsum(response == 2, axis=-1) - (response == 2)  # eos so far
    np.testing.assert_array_equal(response == -1, before > 0)
    assert (response[response >= 0] < 5).all()
    assert not log_prob[before > 0].any() and (log_prob[before == 0] < 0).all()
    length = (response >= 0).sum(-1)
    assert length.min() < 3 and length.max() == R and len(np.unique(length)) > 3


def test_generated_log_probabilities_are_those_of_one_pass_over_the_whole_rows(rows, scored):
    """Left padding, a shared prompt, early ends and a temperature make no difference; a cut at the last column none."""
    token, log_prob = rows
    response = token[..., L:].reshape(-1, R)
    every = log_softmax(scored[0])
    assert every.max(-1).mean() > np.log(0.4)  # far from uniform, which is log(.2)
    expected = np.take_along_axis(every, np.maximum(response, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob.reshape(-1, R), np.where(response >= 0, expected, 0), rtol=0, atol=1e-5)


def test_what_is_generated_in_bfloat16_is_scored_alike_by_any_program():
    """No response is outside GSPO's clip, 3e-4 of its mean log-ratio, before a step was made."""
    model = model_of(5, R, LanguageModelConfig(num_layers=1, hidden_size=16, mlp_size=16, temperature=0.7))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(model, 4, 0.3))

    def generate(key, params, prompt):
        return model.generate(key, params, prompt, G)

    def log_prob(params, token):
        action = token[:, L:]
        return jnp.where(action >= 0, model.score(params, token)[0].log_prob(action), 0.0)

    def loss(params, token):
        found = log_prob(params, token)
        return jnp.sum(found), found

    token, sampled = quick_jit(generate)(jax.random.key(0), params, jnp.tile(PROMPTS, (8, 1)))
    token = token.reshape(-1, L + R)
    length = np.sum(token[:, L:] >= 0, axis=-1)
    for scored in (quick_jit(log_prob)(params, token), quick_jit(jax.grad(loss, has_aux=True))(params, token)[1]):
        gap = np.sum(scored - sampled.reshape(-1, R), axis=-1) / length
        assert np.abs(gap).max() < 3e-4


def test_the_policy_of_a_prefix_is_the_score_of_its_next_column(rows, scored):
    """So an episode of the environment, which shows prefixes, meets the policy that learns."""
    token = rows[0].reshape(-1, L + R)
    prefix = np.where(np.arange(L + R) < L + np.arange(R)[:, None, None], token, -1)  # [R, 3 G, L + R]
    policy, value = quick_jit(MODEL.apply)(PARAMS, prefix)
    assert policy.logits.shape == (R, 3 * G, 5) and value.shape == (R, 3 * G)
    alive = token[:, L:] >= 0
    np.testing.assert_allclose(np.swapaxes(policy.logits, 0, 1)[alive], scored[0][alive], rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.swapaxes(value, 0, 1)[alive], scored[1][alive], rtol=0, atol=2e-5)
    assert np.abs(scored[1]).min() > 0


def test_a_temperature_divides_the_logits_and_leaves_v_alone(scored, rows):
    hot = MODEL._replace(temperature=2.1)
    policy, value = quick_jit(hot.score)(PARAMS, rows[0].reshape(-1, L + R))
    np.testing.assert_allclose(3 * policy.logits, scored[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, scored[1], rtol=1e-5)


def test_the_key_decides_and_the_episodes_of_a_group_differ(rows):
    again = jax.tree.map(np.asarray, generated(jax.random.key(0), PARAMS, PROMPTS))
    jax.tree.map(np.testing.assert_array_equal, again, rows)
    other = generated(jax.random.key(1), PARAMS, PROMPTS)
    assert not np.array_equal(other[0], rows[0])
    assert all(len(np.unique(group, axis=0)) > 1 for group in rows[0])


def test_at_a_low_temperature_every_response_is_the_greedy_one():
    cold, params = MODEL._replace(temperature=1e-4), parameters(MODEL, 7)
    token, log_prob = quick_jit(lambda key: cold.generate(key, params, PROMPTS, G))(jax.random.key(5))
    token = np.asarray(token)
    apply, row = quick_jit(MODEL.apply), np.concatenate([PROMPTS, np.full((3, R), -1, np.int32)], axis=1)
    alive = np.ones(3, bool)
    for t in range(R):
        best = np.argmax(np.asarray(apply(params, row)[0].logits), axis=-1)
        row[:, L + t] = np.where(alive, best, -1)
        alive &= best != 2
    np.testing.assert_array_equal(token, np.broadcast_to(row[:, None], token.shape))
    np.testing.assert_allclose(log_prob, 0, atol=1e-3)
    assert len(np.unique(row[:, L:], axis=0)) > 1


def test_seeds_under_vmap_with_parameters_of_their_own_are_a_plain_loop(rows):
    keys = jax.random.split(jax.random.key(2), 3)
    params = jax.tree.map(lambda *x: jnp.stack(x), *(parameters(MODEL, seed) for seed in range(3)))
    together = quick_jit(jax.vmap(generate, (0, 0, None)))(keys, params, PROMPTS)
    for s in range(3):
        alone = generated(keys[s], jax.tree.map(lambda x, s=s: x[s], params), PROMPTS)
        np.testing.assert_array_equal(np.asarray(together[0])[s], alone[0])
        np.testing.assert_allclose(np.asarray(together[1])[s], alone[1], atol=1e-5)


def test_a_prompt_is_read_once_and_the_columns_are_one_loop_on_the_device():
    """The program has one size for any group and any length, no way back to the host, and the prompts' pass has P rows
    whatever the group."""

    def program(group_size, response_length):
        model = MODEL._replace(task=MODEL.task._replace(response_length=response_length))
        return equations(lambda key: model.generate(key, PARAMS, PROMPTS, group_size), jax.random.key(0))

    many = program(7, 9)
    assert len(many) == len(program(2, R))
    assert not [e for e in many if "callback" in e.primitive.name or "infeed" in e.primitive.name]
    assert sum(e.primitive.name == "while" for e in many) == 1
    shapes = [x.aval.shape for e in many if e.primitive.name == "dot_general" for x in e.outvars]
    assert any(shape[:2] == (3, L) for shape in shapes) and any(shape[:2] == (21, 1) for shape in shapes)
    assert not any(shape[:2] == (21, L) for shape in shapes)


# --- a tiny language, whose responses can be counted ---

RESPONSES = np.array([[2, -1], [0, 2], [0, 0], [0, 1], [1, 2], [1, 0], [1, 1]], np.int32)
TINY = model_of(3, 2)
TINY_PARAMS = parameters(TINY, 20, 0.8)
TINY_PROMPTS: Any = np.array([[-1, -1, 1, 0], [0, 1, 0, 1]], np.int32)


@pytest.fixture(scope="module")
def probability():
    """Of every response to both prompts, by the teacher-forced pass: `[2, 7]`."""
    row = np.concatenate([np.repeat(TINY_PROMPTS, 7, axis=0), np.tile(RESPONSES, (2, 1))], axis=1)
    every = log_softmax(np.asarray(quick_jit(TINY.score)(TINY_PARAMS, row)[0].logits, np.float64))
    response = row[:, L:]
    log_prob = np.take_along_axis(every, np.maximum(response, 0)[..., None], -1)[..., 0]
    p = np.exp(np.sum(log_prob, axis=1, where=response >= 0)).reshape(2, 7)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    assert p.max() > 0.3 and p.min() > 0.003 and np.abs(p[0] - p[1]).max() > 0.05
    return p / p.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def counted():
    """The number in RESPONSES of many responses to both prompts, `[2, MANY]`."""
    draw = quick_jit(lambda key: TINY.generate(key, TINY_PARAMS, TINY_PROMPTS, MANY))
    token = np.asarray(draw(jax.random.key(1))[0])
    return number_of(token[..., L:])


def number_of(response: np.ndarray) -> np.ndarray:
    matches = (response[..., None, :] == RESPONSES).all(-1)
    assert matches.any(-1).all()
    return matches.argmax(-1)


def test_responses_come_as_often_as_their_probabilities_say(counted, probability):
    for numbers, p in zip(counted, probability, strict=True):
        assert chisquare(np.bincount(numbers, minlength=7), MANY * p).pvalue > 1e-3
        # And this says something: a temperature forgotten would have been seen.
        assert chisquare(np.bincount(numbers, minlength=7), MANY * p**0.9 / np.sum(p**0.9)).pvalue < 1e-6


def test_the_responses_of_a_group_and_those_of_two_prompts_are_independent(counted, probability):
    first, second = counted
    pairs = {
        "neighbours": (first[::2], first[1::2], probability[0], probability[0]),
        "halves": (first[: MANY // 2], first[MANY // 2 :], probability[0], probability[0]),
        "prompts": (first, second, probability[0], probability[1]),
    }
    for name, (x, y, p, q) in pairs.items():
        expected = len(x) * np.outer(p, q).ravel()
        found = np.bincount(7 * x + y, minlength=49)
        common = expected > 5
        found, expected = (np.append(z[common], z[~common].sum()) for z in (found, expected))
        assert chisquare(found, expected).pvalue > 1e-3, name


def test_episodes_of_the_environment_are_responses_of_the_same_distribution(probability):
    """Token by token, by `apply`, as an agent is evaluated."""
    env = token_env(TINY.task._replace(prompt=lambda key, held_out: jnp.asarray(TINY_PROMPTS[0])))
    run = quick_jit(lambda key: episodes(key, env, actor(TINY, TINY_PARAMS), MANY, 2)[:2])
    trajectory, mask = run(jax.random.key(3))
    numbers = number_of(np.where(mask, trajectory.action, -1).T)
    assert chisquare(np.bincount(numbers, minlength=7), MANY * probability[0]).pvalue > 1e-3
    total = np.sum(trajectory.log_prob, axis=0, where=mask)
    np.testing.assert_allclose(total, np.log(probability[0])[numbers], atol=1e-5)


# --- parameters ---


def test_a_digest_tells_names_shapes_dtypes_and_every_number_apart_and_is_the_same_everywhere():
    params = {"params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}}
    a, b = params["params"].values()
    assert digest(params) == digest(jax.tree.map(jnp.asarray, params)) == digest(jax.tree.map(np.copy, params))
    assert digest({"params": {"b": b, "a": a}}) == digest(params)
    assert digest({"params": {"a": np.asfortranarray(a), "b": b}}) == digest(params)
    assert len(digest(params)) == 16 and int(digest(params), 16) >= 0
    others = [
        {"params": {"a": a, "c": b}},
        {"params": {"a": a.reshape(3, 2), "b": b}},
        {"params": {"a": a.view(np.int32), "b": b}},
        {"params": {"a": a.astype(np.float16), "b": b}},
        {"a": a, "b": b},
    ]
    for name, x in params["params"].items():
        for i in range(x.size):
            changed = x.copy()
            changed.flat[i] = np.nextafter(changed.flat[i], np.float32(9))
            others.append({"params": params["params"] | {name: changed}})
    assert len({digest(params), *map(digest, others)}) == 1 + len(others)


def test_a_model_starts_with_what_it_is_given_and_draws_the_value_head_alone():
    env, headless = token_env(MODEL.task), dataclasses.replace(SMALL, value_head=False)
    start = parameters(language_model(env, headless), 9)
    obs = jnp.zeros(L + R, jnp.int32)
    model = language_model(env, SMALL, start)
    assert model.has_value and model.digest == digest(start)
    params: Any = quick_jit(model.init)(jax.random.key(0), obs)
    drawn = quick_jit(language_model(env, SMALL).init)(jax.random.key(0), obs)
    assert params["params"].keys() - start["params"].keys() == {"value_head"}
    jax.tree.map(
        np.testing.assert_array_equal, params["params"], start["params"] | {"value_head": drawn["params"]["value_head"]}
    )
    assert jax.tree.structure(params) == jax.tree.structure(drawn)
    plain = language_model(env, headless)
    assert not plain.has_value and plain.start is None and plain.digest is None
    _, value = quick_jit(plain.apply)(start, obs[None])
    np.testing.assert_array_equal(value, [0.0])


def test_parameters_of_another_model_are_refused_by_the_first_name_that_differs():
    """They would be run all the same, to other logits: extra biases and heads that nobody reads, missing ones."""
    env = token_env(MODEL.task)
    start: Any = jax.tree.map(np.asarray, parameters(MODEL, 9))

    def said(**changes: Any) -> str:
        with pytest.raises(UsageError) as error:
            language_model(env, SMALL, {"params": start["params"] | changes})
        assert "\n" not in str(error.value)
        return str(error.value)

    attention = start["params"]["attention_0"]
    biased = attention | {"output": attention["output"] | {"bias": np.ones(SMALL.hidden_size)}}
    assert said(attention_0=biased).startswith(
        "params['params']['attention_0']['output']['bias'] must not be there, but"
    )
    embedding = start["params"]["embedding"]
    shape, other = embedding.shape, embedding[:-1].shape
    assert said(embedding=embedding[:-1]).startswith(
        f"params['params']['embedding'] must have shape {shape}, but has {other}"
    )
    assert "params['params']['final_norm']['scale'] must be there, but is not" in said(final_norm={})
    has_head = "head" in start["params"]
    wrong = dataclasses.replace(SMALL, tied_head=has_head)
    with pytest.raises(UsageError, match=r"\['head'\]\['kernel'\] must (not )?be there"):
        language_model(env, wrong, start)
    with pytest.raises(UsageError, match=r"\['value_head'\]\['bias'\] must not be there"):
        language_model(env, dataclasses.replace(SMALL, value_head=False), start)
    here = dataclasses.replace(SMALL, start="here")
    with pytest.raises(UsageError, match=r"start \(here\) and params are two places"):
        purepg.language_model(env, here, start)
    with pytest.raises(UsageError, match=r"start \(here\) is not read here: use purepg.language_model"):
        language_model(env, here)


def test_a_language_model_needs_an_environment_of_tokens_and_widths_that_fit():
    with pytest.raises(UsageError, match="no tokens"):
        language_model(mdp_env(bandit()), SMALL)
    with pytest.raises(UsageError, match="num_kv_heads"):
        model_of(3, 2, dataclasses.replace(SMALL, num_kv_heads=3))
    with pytest.raises(UsageError, match="temperature"):
        model_of(3, 2, dataclasses.replace(SMALL, temperature=0.0))
