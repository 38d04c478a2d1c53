"""Sampling of responses: which tokens can be sampled, what ends a response, and evaluation by whole responses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import loops_are_unbatched, quick_jit
from test_tokens import PROMPTS, SMALL, L, model_of, parameters

from purepg.config import check
from purepg.envs.stops import automaton
from purepg.envs.tasks import decode, describe, token_env
from purepg.equations.distributions import Categorical
from purepg.experience.acting import actor
from purepg.experience.responses import pay
from purepg.language.model import LanguageModelConfig
from purepg.language.sampling import Truncation
from purepg.language.transformer import Transformer
from purepg.train import evaluate
from purepg.types import UsageError

R, G = 6, 5
MODEL = model_of(5, R)
PARAMS = parameters(MODEL, 4)


def kept(probability: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None) -> np.ndarray:
    """The tokens that can be sampled, by sorting one row of distinct probabilities."""
    order = np.argsort(-probability)
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    found = rank < (top_k or len(order))
    if top_p is not None:
        mass_before = np.cumsum(np.append(0, probability[order]))[:-1] / probability[found].sum()
        found &= mass_before[rank] < top_p
    if min_p is not None:
        found &= probability >= min_p * probability.max()
    return found


@pytest.mark.parametrize(
    "rule",
    [(7, None, None), (None, 0.6, None), (None, None, 0.3), (9, 0.8, None), (30, 0.9, 0.1), (50, 1.0, 1e-6)],
    ids=str,
)
def test_truncation_keeps_the_tokens_that_sorting_keeps_and_renormalises_their_probabilities(rule):
    logits = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32) * np.linspace(0.1, 5, 40)[:, None]
    policy = quick_jit(lambda logits: Truncation(*rule).of(Categorical(logits)))(logits.astype(np.float32))
    probability = np.exp(np.asarray(Categorical(jnp.asarray(logits)).log_prob_of_all(), np.float64))
    expected = np.stack([kept(row, *rule) for row in probability])
    np.testing.assert_array_equal(np.isfinite(policy.logits), expected)
    assert expected.any(1).all() and (rule[0] == 50 or (~expected).any())
    share = np.where(expected, probability, 0) / np.sum(probability, axis=1, where=expected, keepdims=True)
    np.testing.assert_allclose(np.exp(policy.log_prob_of_all()), share, atol=1e-6)


def test_equally_probable_tokens_are_kept_together():
    logits = jnp.log(jnp.array([0.1, 0.3, 0.3, 0.2, 0.1]))
    for rule, expected in [((1, None, None), [1, 2]), ((None, 0.2, None), [1, 2]), ((4, None, None), [0, 1, 2, 3, 4])]:
        assert np.flatnonzero(np.isfinite(Truncation(*rule).of(Categorical(logits)).logits)).tolist() == expected


def test_shares_are_numbers_above_0_and_at_most_1():
    for name, value in (("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 0.0), ("min_p", -0.5)):
        changes: Any = {name: value}
        with pytest.raises(UsageError, match=rf"{name} \({value}\) must be"):
            check(LanguageModelConfig(**changes))


def test_a_truncated_models_log_probabilities_are_the_samplers_and_a_sweep_of_top_p_is_a_plain_loop():
    def generate(top_p):
        model = model_of(5, R, dataclasses.replace(SMALL, top_p=top_p, top_k=4))
        return model.generate(jax.random.key(0), PARAMS, PROMPTS, G)

    swept = jax.tree.map(np.asarray, quick_jit(jax.vmap(generate))(jnp.array([0.4, 0.9])))
    assert not np.array_equal(*swept[0])
    assert loops_are_unbatched(jax.vmap(generate), jnp.array([0.4, 0.9]))
    for i, top_p in enumerate((0.4, 0.9)):
        token, log_prob = quick_jit(generate)(jnp.float32(top_p))
        np.testing.assert_array_equal(swept[0][i], token)
        rows = token.reshape(-1, L + R)
        response = rows[:, L:]
        truncated = Truncation(4, top_p).of(quick_jit(MODEL.score)(PARAMS, rows)[0])
        expected = jnp.where(response >= 0, truncated.log_prob(jnp.maximum(response, 0)), 0.0)
        np.testing.assert_allclose(log_prob.reshape(-1, R), expected, atol=1e-5)
        assert np.isfinite(log_prob).all()


# --- the end of a response ---


class Counting(Transformer):
    """Notes how many columns each pass reads."""

    def __call__(self, token, *others: Any):
        jax.debug.callback(lambda: PASSES.append(token.shape[1]))
        return super().__call__(token, *others)


PASSES: list[int] = []


def test_sampling_ends_with_the_last_response():
    counting = MODEL._replace(transformer=Counting(MODEL.transformer.config, 5))
    PASSES.clear()
    token = quick_jit(lambda: counting.generate(jax.random.key(2), PARAMS, PROMPTS[:1], 2)[0])()
    longest = int((np.asarray(token)[..., L:] >= 0).sum(-1).max())
    jax.effects_barrier()
    assert 1 < longest < R
    assert [L] + [1] * (longest - 1) == PASSES  # a last token is not read


STOP = ((2,), (3,), (0, 0), (1, 4, 1))


def cut(row: np.ndarray) -> tuple[np.ndarray, bool]:
    """The row up to the first of STOP, and whether there is one, by looking at it as text."""
    text = "".join(map(str, row[L:][row[L:] >= 0]))
    found = [text.index(x) + len(x) for x in ("2", "3", "00", "141") if x in text]
    return np.where(np.arange(L + R) < L + min(found, default=R), row, -1), bool(found)


@pytest.fixture(scope="module")
def stopped():
    """Many responses without stops, and the same random numbers with them: (token `[3, 400, L + R]`, log_prob) each."""
    task = MODEL.task._replace(stop=automaton(STOP, 5))

    def rows(model):
        hot = model._replace(temperature=2.0)
        return jax.device_get(quick_jit(lambda: hot.generate(jax.random.key(0), PARAMS, PROMPTS, 400))())

    return rows(MODEL), rows(MODEL._replace(task=task)), task


def test_a_response_ends_with_any_stop_token_and_with_the_last_token_of_a_stop_sequence(stopped):
    (plain, plain_log_prob), (rows, log_prob), _ = stopped
    expected = np.stack([cut(row)[0] for row in plain.reshape(-1, L + R)])
    np.testing.assert_array_equal(rows.reshape(-1, L + R), expected)
    np.testing.assert_array_equal(log_prob, np.where(rows[..., L:] >= 0, plain_log_prob, 0))  # of the last token too
    for ending in ([3], [0, 0], [1, 4, 1]):
        assert any(list(row[row >= 0][-len(ending) :]) == ending for row in expected)


def test_a_stop_terminates_an_episode_as_eos_does_and_ends_what_is_shown(stopped):
    (plain, _), (rows, _), task = stopped
    env = token_env(task)
    around = env._replace(step=lambda key, state, action: env.step(key, state, action))
    state = jax.vmap(lambda prompt: env.reset(jax.random.key(0))[0]._replace(obs=prompt))(
        jnp.asarray(np.concatenate([PROMPTS, np.full((3, R), -1)], axis=1))
    )
    by_task, by_steps = (
        quick_jit(lambda token, e=e: pay(jax.random.key(0), e, state, token))(rows) for e in (env, around)
    )
    jax.tree.map(np.testing.assert_array_equal, by_task, by_steps)
    ended = np.array([cut(row)[1] for row in plain.reshape(-1, L + R)])
    np.testing.assert_array_equal(by_task[1].any(-1).ravel(), ended)
    np.testing.assert_array_equal(by_task[2].any(-1).ravel(), ~ended)
    assert 0 < ended.sum() < len(ended)
    for before, after in zip(plain[0, :50], rows[0, :50], strict=True):
        assert describe(task, before)["response"] == decode(task, after[L:])


# --- evaluation ---


def test_evaluation_by_whole_responses_is_that_of_single_steps_also_where_the_step_is_replaced():
    """Greedily: the same prompts have the same answers, rewards, lengths and ends."""
    task = MODEL.task._replace(
        prompt=lambda key, held_out: jax.random.randint(key, (L,), 0, 5),
        reward=lambda prompt, response: jnp.sum(jnp.where(response >= 0, response + 0.5, 0.0)),
        stop=automaton([(2,), (3,)], 5),
    )
    env = token_env(task)

    def paid(key, state, action):
        state, time_step = env.step(key, state, action)
        return state, time_step._replace(
            reward=time_step.reward + action, terminated=time_step.terminated | (action == 1)
        )

    model: Any = MODEL._replace(task=task)
    greedy = actor(model, parameters(MODEL, 3, 1.0), deterministic=True)

    for e in (env, env._replace(step=paid)):
        fast, slow = (
            quick_jit(lambda key, a=a, e=e: evaluate(key, e, a, 64, R))(jax.random.key(1))
            for a in (greedy, greedy._replace(respond=None))
        )
        np.testing.assert_allclose(fast.episode_return, slow.episode_return, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, fast[1:4], slow[1:4])
        assert len(np.unique(fast.episode_length)) > 2 and len(np.unique(fast.episode_return)) > 5
        length = np.asarray(fast.episode_length)[:, None]
        within = np.arange(L + R) < L + length
        np.testing.assert_array_equal(fast.last_obs, np.where(within, slow.last_obs, -1))
    cut_short = quick_jit(lambda key: evaluate(key, env, greedy, 64, 2))(jax.random.key(1))
    assert cut_short.episode_length.max() == 2 and cut_short.truncated.any()
