"""Preferences, the reward learned from them, DPO's population gradient, and experiments/overoptimisation.py.

Two letters and a full stop make seven responses of at most two tokens, and so every expectation here is a sum.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.groups import GroupLearner
from purepg.algorithms.preferences import Preferences, draw_pairs, learned_reward, sample_preferences
from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.envs.named_tasks import reversing
from purepg.envs.tasks import Task, encode, token_env
from purepg.equations.losses import preference
from purepg.lab.exact import in_float64
from purepg.language.model import LanguageModel, LanguageModelConfig, language_model
from purepg.optimize import init_train_state, step_direction
from purepg.types import State, UsageError

SCRIPT = Path(__file__).parent.parent / "experiments" / "overoptimisation.py"
SPEC = importlib.util.spec_from_file_location("overoptimisation", SCRIPT)
assert SPEC and SPEC.loader
script = importlib.util.module_from_spec(SPEC)
sys.modules["overoptimisation"] = script
SPEC.loader.exec_module(script)

PROMPT = np.array([1, 0], np.int32)
RESPONSES = np.array([[2, -1], [0, 2], [0, 0], [0, 1], [1, 2], [1, 0], [1, 1]], np.int32)
N = len(RESPONSES)
ROWS = np.concatenate([np.tile(PROMPT, (N, 1)), RESPONSES], axis=1)
REWARD = np.array([0.0, 1.0, 0.5, 0.5, 1.0, -1.0, 0.0], np.float32)  # three pairs of equals
BETA = 0.7
SIZES = LanguageModelConfig(
    hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=3, tied_head=False, value_head=True
)


def letters() -> Task:
    """One prompt; each response is worth its entry in REWARD."""

    def reward(prompt, response):
        del prompt
        return jnp.asarray(REWARD)[jnp.argmax(jnp.all(response == jnp.asarray(RESPONSES), axis=-1))]

    return Task(
        "letters", ("a", "b", "."), 2, 2, 2, lambda key, held_out: jnp.asarray(PROMPT),
        lambda key, prompt: jnp.asarray(RESPONSES[2]), reward,
    )  # fmt: skip


ENV = token_env(letters())
MODEL = language_model(ENV, SIZES)


def parameters(model: LanguageModel, seed: int, scale: float = 0.6) -> Any:
    """Nothing is zero, the value head neither."""
    rng, task = np.random.default_rng(seed), model.task
    obs = jnp.zeros(task.prompt_length + task.response_length, jnp.int32)
    shapes = jax.eval_shape(lambda key: model.init(key, obs), jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(scale * rng.normal(size=x.shape)), shapes)


def log_prob(params):
    """log pi(y | x) of the seven responses."""
    action = jnp.asarray(RESPONSES)
    return jnp.sum(MODEL.score(params, jnp.asarray(ROWS))[0].log_prob(action), axis=-1, where=action >= 0)


def flat(tree, num_axes=0):
    return np.concatenate([np.reshape(x, (*np.shape(x)[:num_axes], -1)) for x in jax.tree.leaves(tree)], axis=-1)


# --- the likelihood of a preference ---


def test_the_gradient_of_a_preference_is_how_surprising_it_was():
    margin = np.array([-3.0, -0.2, 0.0, 1.0, 4.0])
    by_chosen, by_rejected = in_float64(
        jax.grad(lambda w, other: jnp.sum(preference(w - other)), argnums=(0, 1)), margin + 0.3, np.full(5, 0.3)
    )
    probability = 1 / (1 + np.exp(-margin))  # that the chosen one is preferred
    np.testing.assert_allclose(by_chosen, probability - 1, rtol=1e-12)
    np.testing.assert_allclose(by_rejected, 1 - probability, rtol=1e-12)
    np.testing.assert_allclose(in_float64(preference, margin), -np.log(probability), rtol=1e-12)


# --- pairs ---


@functools.cache
def sampled(num_candidates: int) -> Any:
    draw = quick_jit(lambda key, params: sample_preferences(key, ENV, MODEL, params, 200, num_candidates))
    return jax.tree.map(np.asarray, draw(jax.random.key(3), parameters(MODEL, 0)))


def worth(rows):
    return np.array([REWARD[np.all(row[2:] == RESPONSES, axis=1)].item() for row in rows])


@pytest.mark.parametrize("num_candidates", [2, 4])
def test_the_chosen_response_is_better_and_equals_weigh_nothing(num_candidates):
    pairs = sampled(num_candidates)
    chosen, rejected = worth(pairs.chosen), worth(pairs.rejected)
    assert (pairs.chosen[:, :2] == PROMPT).all() and (pairs.rejected[:, :2] == PROMPT).all()
    assert (chosen >= rejected).all()
    np.testing.assert_array_equal(pairs.weight, chosen > rejected)
    assert 0 < pairs.weight.sum() < 200


def test_more_candidates_leave_a_wider_margin_and_fewer_equals_and_cost_more_tokens():
    two, four = sampled(2), sampled(4)
    assert np.mean(worth(four.chosen) - worth(four.rejected)) > np.mean(worth(two.chosen) - worth(two.rejected))
    assert four.weight.sum() > two.weight.sum()
    assert 2 * 200 <= two.num_tokens <= 2 * 400 and 4 * 200 <= four.num_tokens <= 4 * 400


def test_pairs_that_say_nothing_are_never_drawn_and_the_others_alike():
    weight = np.array([0, 1, 0, 0, 1, 1, 0, 1], np.float32)
    rows = np.repeat(np.arange(8, dtype=np.int32)[:, None], 4, axis=1)
    pairs = Preferences(jnp.asarray(rows), jnp.asarray(rows + 100), jnp.asarray(weight), jnp.int32(0))
    chosen, rejected, drawn = map(np.asarray, draw_pairs(jax.random.key(0), pairs, 4000))
    assert (drawn == 1).all()
    np.testing.assert_array_equal(rejected, chosen + 100)
    counts = np.bincount(chosen[:, 0], minlength=8)
    assert (counts[weight == 0] == 0).all()
    assert (np.abs(counts[weight > 0] - 1000) < 5 * np.sqrt(1000 * 0.75)).all()


# --- a learned reward ---


def test_the_learned_reward_is_the_value_after_a_responses_last_token():
    params, reward = parameters(MODEL, 1), learned_reward(MODEL, parameters(MODEL, 1))
    found: Any = quick_jit(MODEL.transformer.apply)(params, jnp.asarray(ROWS))
    value = found[1]
    last = [np.flatnonzero(row >= 0)[-1] for row in ROWS]
    learned = quick_jit(jax.vmap(reward))(jnp.asarray(ROWS[:, :2]), jnp.asarray(ROWS[:, 2:]))
    np.testing.assert_allclose(learned, np.asarray(value)[np.arange(N), last], rtol=1e-5)


def test_a_reward_that_is_linear_in_the_letters_is_found_again_from_its_ranking():
    def pairs(seed, n):
        """Two random rows each, of which the one with more of the costlier letters is chosen."""
        rng = np.random.default_rng(seed)
        rows = np.concatenate([np.tile(PROMPT, (n, 2, 1)), rng.integers(0, 3, (n, 2, 6))], axis=-1).astype(np.int32)
        reward = np.sum(np.array([0.0, 1.0, -1.5])[rows[..., 2:]], axis=-1)
        better = np.argmax(reward, axis=1)
        chosen, rejected = rows[np.arange(n), better], rows[np.arange(n), 1 - better]
        weight = jnp.asarray(reward[:, 0] != reward[:, 1], jnp.float32)
        return Preferences(jnp.asarray(chosen), jnp.asarray(rejected), weight, jnp.int32(0))

    def accuracy(params, pairs):
        margin = MODEL.apply(params, pairs.chosen)[1] - MODEL.apply(params, pairs.rejected)[1]
        return jnp.sum(pairs.weight * (margin > 0)) / jnp.sum(pairs.weight)

    def fit(key, pairs, unseen):
        k_init, k_fit = jax.random.split(key)
        schedule: Any = {"learning_rate": 1e-2, "anneal_learning_rate": True, "anneal_updates": 1}
        algorithm = reward_model(ENV, MODEL, RewardConfig(batch_size=64, **schedule))
        start = algorithm.init(k_init)._replace(world=(pairs, ()))
        keys = jax.random.split(k_fit, 150)
        fitted, metrics = jax.lax.scan(lambda state, key: algorithm.step(key, state, jnp.int32(0)), start, keys)
        ended, _ = algorithm.step(k_fit, fitted, jnp.int32(1))  # when the learning rate has fallen to 0
        accuracies = (accuracy(state.learner.params, unseen) for state in (start, fitted))
        return metrics, fitted.learner.params, ended.learner.params, *accuracies

    metrics, fitted, ended, before, after = quick_jit(fit)(jax.random.key(0), pairs(0, 256), pairs(1, 512))
    jax.tree.map(np.testing.assert_array_equal, ended, fitted)
    np.testing.assert_allclose(metrics["loss"][0], np.log(2), rtol=1e-6)  # the value head starts at 0
    assert before == 0 and after > 0.95 and metrics["ranked_right"][-20:].mean() > 0.95


# --- DPO ---


@functools.cache
def dpo_gradients(policy: int, reference: int) -> Any:
    """The gradient of DPO's loss of each ordered pair of responses by its own step, `[7, 7, D]`: chosen, rejected."""
    config = DPOConfig(
        num_pairs=1, batch_size=1, optimizer="sgd", learning_rate=1.0, beta=BETA, max_grad_norm=None, num_held_out=0
    )
    algorithm = dpo(ENV, MODEL, config)

    def all_pairs(params, reference, beta):
        train_state = init_train_state(step_direction("sgd", None), params)

        def gradient(chosen, rejected):
            pairs = Preferences(chosen[None], rejected[None], jnp.ones(1), jnp.int32(0))
            state = State(GroupLearner(train_state, reference, beta), pairs)
            new, _ = algorithm.step(jax.random.key(0), state, jnp.int32(0))
            return jax.tree.map(lambda old, new: old - new, params, new.learner.params)

        rows = jnp.asarray(ROWS)
        return jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(rows, rows)

    return flat(in_float64(quick_jit(all_pairs), parameters(MODEL, policy), parameters(MODEL, reference), BETA), 2)


@functools.cache
def responses(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(log pi(y | x) `[7]`, its gradient `[7, D]`)."""
    params = parameters(MODEL, seed)
    value, gradient = in_float64(quick_jit(lambda p: (log_prob(p), jax.jacrev(log_prob)(p))), params)
    return value, flat(gradient, 1)


def test_the_seven_responses_are_all_there_are():
    np.testing.assert_allclose(np.exp(responses(2)[0]).sum(), 1, rtol=1e-12)


def test_at_the_reference_dpo_gives_every_pair_half_of_beta():
    _, score = responses(2)
    expected = -BETA / 2 * (score[:, None] - score[None])
    np.testing.assert_allclose(dpo_gradients(2, 2), expected, atol=1e-12)
    assert np.abs(expected).max() > 0.1


def test_dpo_weighs_a_pair_by_how_wrong_its_implicit_reward_ranks_it():
    (value, score), (reference, _) = responses(2), responses(5)
    implicit = BETA * (value - reference)
    wrong = 1 / (1 + np.exp(implicit[:, None] - implicit[None]))
    expected = -BETA * wrong[..., None] * (score[:, None] - score[None])
    np.testing.assert_allclose(dpo_gradients(2, 5), expected, atol=1e-12)


def test_the_kl_regularised_optimum_is_where_dpo_stands_still():
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z (Rafailov et al. 2023, eq. 4), for preferences after Bradley & Terry.

    A small model cannot be given any pi*, but any of its policies is the pi* of the reward that this equation says.
    """
    (value, _), (reference, _) = responses(2), responses(5)
    reward = BETA * (value - reference) + 3.0  # a constant is free
    optimum = np.exp(reference + reward / BETA)
    np.testing.assert_allclose(optimum / optimum.sum(), np.exp(value), rtol=1e-10)
    seen = np.random.default_rng(0).dirichlet(np.ones(N))  # how often whoever made the pairs answers what

    def population_gradient(reward, gradients):
        chosen = 1 / (1 + np.exp(reward[None] - reward[:, None]))
        return np.einsum("w,l,wl,wld->d", seen, seen, chosen, gradients)

    here = population_gradient(reward, dpo_gradients(2, 5))
    np.testing.assert_allclose(here, 0, atol=1e-12)
    assert np.abs(population_gradient(reward, dpo_gradients(5, 5))).max() > 0.01  # before anything is learned
    assert np.abs(population_gradient(2 * reward, dpo_gradients(2, 5))).max() > 0.01  # another reward's


# --- the script ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [("321.", 1.0), ("32.", 2 / 4), ("321", 3 / 4), ("329.", 3 / 4), ("3211.", 3 / 5), ("123.", 2 / 4), (".", 0.0)],
)
def test_partial_marks_by_hand(response, expected):
    task = script.graded(reversing(4))
    prompt = np.pad(encode(task, "123<"), (1, 0), constant_values=-1)
    tokens = encode(task, response)
    answer = np.pad(tokens, (0, 5 - len(tokens)), constant_values=-1)
    reward = task.reward(jnp.asarray(prompt, jnp.int32), jnp.asarray(answer, jnp.int32))
    np.testing.assert_allclose(reward, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.5, 0.6, 0.8, 0.7, 0.2], 2),
        ([0.5, 0.4, 0.3], 0),  # never rose
        ([0.5, 0.6, 0.7], 2),  # has not turned
        ([0.5, 0.7, 0.7, 0.1], 1),  # the first of equals
    ],
)
def test_the_turning_point_is_where_a_curve_is_highest(curve, expected):
    assert script.turning_point(np.array(curve)) == expected


def test_a_curve_is_averaged_over_what_there_is_around_each_point():
    x = np.array([[3.0, 0.0, 6.0, 3.0, 9.0], np.ones(5)])
    np.testing.assert_allclose(script.smoothed(x, 3), np.array([[1.5, 3.0, 3.0, 6.0, 6.0], [1.0] * 5]))
    np.testing.assert_array_equal(script.smoothed(x, 1), x)
    np.testing.assert_allclose(script.smoothed(x, 99), np.repeat(x.mean(axis=1, keepdims=True), 5, axis=1))


def test_seeds_share_one_turning_point_and_have_turned_only_if_they_all_agree():
    up = np.linspace(0.5, 0.8, 6)
    curve = np.concatenate([up, 0.8 - np.linspace(0.05, 0.3, 6)])
    true = np.stack([curve + 0.01 * s for s in range(5)])
    kl = np.tile(np.arange(12.0), (5, 1))
    turn = script.turn(kl, 2 * kl, true)
    assert turn.update == 5 and turn.has_turned
    np.testing.assert_allclose(turn.fall, 0.3)
    np.testing.assert_array_equal(turn.kl, np.tile([5.0, 11.0], (5, 1)))
    np.testing.assert_array_equal(turn.proxy, 2 * turn.kl)
    rising = script.turn(kl, kl, true[:, :6].repeat(2, axis=1))
    assert rising.update == 10 and not rising.has_turned  # 10 and 11 are equal: nothing has fallen
    ends = np.array([0.3, 0.3, 0.05, -0.02, -0.3])  # by how much each one falls
    undecided = 0.8 - ends[:, None] * np.maximum(np.arange(12) - 5, 0) / 6 + np.minimum(np.arange(12) - 5, 0) * 0.01
    assert script.turn(kl, kl, undecided).update == 5
    assert not script.turn(kl, kl, undecided).has_turned


@pytest.mark.parametrize("kl_coefs", [(), (0.1, -1.0), (float("nan"),)])
def test_coefficients_that_make_no_sense_are_refused(kl_coefs):
    with pytest.raises(UsageError, match="kl_coefs"):
        script.study(script.Config(kl_coefs=kl_coefs))
