"""GRPO and its family against exact gradients: every group of responses of a tiny language, by its probability.

Two letters and a full stop make seven responses of at most two tokens, from `.` to `bb`. All 7^G groups are answered in
turn, in float64, by the algorithm's own step, and what it does to the parameters, weighed by the group's probability,
is its expected update.
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from scipy.stats import binom

from purepg.algorithms.family import FAMILY
from purepg.algorithms.groups import GroupedEpisodes, GroupLearner, advantages, source
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.preferences import sample_preferences
from purepg.algorithms.refill import Sampled, info, sample_for_update
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.named_mdps import bandit, garnet
from purepg.envs.tasks import Task, token_env
from purepg.equations.advantages import group_advantage, has_signal
from purepg.equations.losses import aggregate, clipped_surrogate, importance_weighted, two_sided_surrogate
from purepg.equations.ratios import kl_k1, kl_k2, kl_k3, sequence_log_ratio
from purepg.lab.accuracy import sample, statistics
from purepg.lab.estimators import update_of
from purepg.lab.exact import in_float64
from purepg.language.model import LanguageModel, LanguageModelConfig, language_model
from purepg.language.sampling import ALL_TOKENS, Truncation
from purepg.networks.tabular import tabular_actor_critic
from purepg.optimize import init_train_state, step_direction
from purepg.train import train
from purepg.types import State, UsageError

EOS, L, R = 2, 2, 2
PROMPT = np.array([1, 0], np.int32)
RESPONSES = np.array([[2, -1], [0, 2], [0, 0], [0, 1], [1, 2], [1, 0], [1, 1]], np.int32)
MASK = RESPONSES >= 0
N = len(RESPONSES)
REWARD = np.array([0.3, -1.0, 2.0, 0.5, 1.2, -0.7, 0.1])
POLICY, OTHER, REFERENCE, FROZEN = 2, 10, 19, 2  # seeds of parameters
ALIKE = np.zeros((N, R))  # log-ratios where the policy is the one that acted
MODEL = LanguageModelConfig(
    hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=3, tied_head=False, value_head=True,
    temperature=0.8,
)  # fmt: skip
PLAIN = GRPOConfig(
    num_prompts=1, group_size=1, optimizer="sgd", learning_rate=1.0, baseline="none", divide_by_std=False,
    aggregation="sequence_sum", kl_coef=0.0, value_coef=0.0, max_grad_norm=None, num_held_out=0,
)  # fmt: skip


def task(reward: Any) -> Task:
    """One prompt; each response is worth its entry in the table `[7]`."""

    def reward_of(prompt, response):
        del prompt
        return jnp.asarray(reward)[jnp.argmax(jnp.all(response == jnp.asarray(RESPONSES), axis=-1))]

    def prompt(key, held_out):
        del key, held_out
        return jnp.asarray(PROMPT)

    return Task("letters", ("a", "b", "."), EOS, L, R, prompt, lambda key, prompt: jnp.asarray(RESPONSES[2]), reward_of)


ENV = token_env(task(np.float32(REWARD)))
CHUNKS: Any = {"rows_at_once": 3, "tokens_at_once": 5, "remat": True}


def model_of(env: Any, how: str = "") -> LanguageModel:
    """A model all of whose parameters learn, or adapters of a frozen one; scored at once or in chunks."""
    config = dataclasses.replace(MODEL, **CHUNKS if "chunks" in how else {})
    if "lora" not in how:
        return language_model(env, config)
    return language_model(env, dataclasses.replace(config, lora_rank=2, lora_alpha=3.0), parameters(FROZEN))


@functools.cache
def parameters(seed: int, scale: float = 0.55, how: str = "") -> Any:
    model, rng = model_of(ENV, how), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: model.init(key, ENV.reset(key)[1]), jax.random.key(0))
    return jax.tree.map(lambda x: scale * rng.normal(size=x.shape), shapes)


def flat(tree: Any, num_axes: int = 0) -> np.ndarray:
    """The parameters' axes as one: `[..., D]`."""
    return np.concatenate([np.reshape(x, (*np.shape(x)[:num_axes], -1)) for x in jax.tree.leaves(tree)], axis=-1)


# --- what is exact ---


class Exact(NamedTuple):
    """Of all responses, at one choice of parameters and of the reference's."""

    log_prob: np.ndarray  # [7, R], 0 after the end
    reference: np.ndarray  # [7, R]
    value: np.ndarray  # [7, R]
    kl: np.ndarray  # [7, R], KL(pi || pi_ref) of the next token
    score: np.ndarray  # [7, R, D], grad log_prob
    value_score: np.ndarray  # [7, R, D], grad V
    frozen: np.ndarray  # [D], grad E sum_t KL(pi || pi_ref) of the next token, the prefixes' distribution a constant
    frozen_reverse: np.ndarray  # [D], of KL(pi_ref || pi)

    @property
    def pi(self) -> np.ndarray:
        return np.exp(self.log_prob.sum(1))

    def gradient(self, weight: np.ndarray) -> np.ndarray:
        """sum_y pi(y) weight(y) grad log pi(y): for a weight that is a reward, that of its expectation."""
        return (self.pi * weight) @ self.score.sum(1)

    @property
    def kl_gradient(self) -> np.ndarray:
        return self.gradient(self.log_prob.sum(1) - self.reference.sum(1))

    @property
    def reverse_kl_gradient(self) -> np.ndarray:
        return -np.exp(self.reference.sum(1)) @ self.score.sum(1)


@partial(quick_jit, static_argnames="how")
def _exactly(params, reference, how):
    model = model_of(ENV, how)
    rows = jnp.concatenate([jnp.broadcast_to(jnp.asarray(PROMPT), (N, L)), jnp.asarray(RESPONSES)], axis=1)

    def read(params):
        policy, value = model.score(params, rows)
        return jnp.where(MASK, policy.log_prob(jnp.asarray(RESPONSES)), 0.0), jnp.where(MASK, value, 0.0)

    log_prob, value = read(params)
    policy_ref = model.score(reference, rows)[0]
    weight = jnp.exp(jnp.sum(log_prob, axis=1, keepdims=True)) * MASK

    def frozen(params):
        policy = model.score(params, rows)[0]
        return jnp.sum(weight * policy.kl(policy_ref)), jnp.sum(weight * policy_ref.kl(policy))

    kl = model.score(params, rows)[0].kl(policy_ref)
    jacobians = jax.jacrev(read)(params), jax.jacrev(frozen)(params)
    return (log_prob, read(reference)[0], value, jnp.where(MASK, kl, 0.0)), jacobians


@functools.cache
def exactly(seed: int = POLICY, how: str = "") -> Exact:
    own = parameters(seed, how=how), parameters(REFERENCE, how=how)
    (log_prob, reference, value, kl), ((score, value_score), kls) = in_float64(partial(_exactly, how=how), *own)
    forward, reverse = map(flat, kls)
    return Exact(log_prob, reference, value, kl, flat(score, 2), flat(value_score, 2), forward, reverse)


# --- what the algorithm does ---


@partial(jax.jit, static_argnames="how")
def _score(params, token, how):
    """`LanguageModel.score`, traced once for all the programs below."""
    return model_of(ENV, how).score(params, token)


def answering(env: Any, index: Any, behind: Any, truncation: Truncation = ALL_TOKENS, how: str = "") -> LanguageModel:
    """A model that answers with the responses of these numbers, `[P, G]`.

    Args:
      behind: `[7, R]`, log pi / pi_old, so that the policy that acted may be another.
      truncation: what the sampler leaves out.
    """

    class Answering(LanguageModel):
        def generate(self, key, params, prompt, group_size, greedy=False):
            del key, greedy
            assert index.shape == (len(prompt), group_size)
            response = jnp.asarray(RESPONSES)[index]
            token = jnp.concatenate([jnp.broadcast_to(prompt[:, None], (*index.shape, L)), response], axis=-1)
            policy, _ = self.score(params, token.reshape(-1, L + R))
            log_prob = self.truncation.of(policy).log_prob(response.reshape(-1, R)).reshape(response.shape)
            return token, jnp.where(response >= 0, log_prob - behind[index], 0.0)

        def score(self, params, token):
            return _score(params, token, how)

    return Answering(*model_of(env, how)._replace(truncation=truncation))


@functools.cache
def _steps(config: GRPOConfig, watched: bool, truncation: Truncation, how: str):
    def one(hyper, params, reference, reward, behind, index):
        c = dataclasses.replace(config, **hyper)
        env = token_env(task(reward))
        train_state = init_train_state(step_direction("sgd", None), params)
        learner = GroupLearner(train_state, reference, jnp.asarray(c.kl_coef, float))
        state, metrics = grpo(env, answering(env, index, behind, truncation, how), c).step(
            jax.random.key(0), State(learner, ()), jnp.int32(0)
        )
        moved = jax.tree.map(jnp.subtract, state.learner.params, params)
        return (moved, metrics, state.learner.kl_coef) if watched else (moved,)

    return quick_jit(jax.vmap(one, (None, None, None, None, None, 0)))


def every_group(config: GRPOConfig) -> np.ndarray:
    """Numbers of responses, `[7^(P G), P, G]`."""
    shape = config.num_prompts, config.group_size
    return np.stack(np.unravel_index(np.arange(N ** math.prod(shape)), (N,) * math.prod(shape)), -1).reshape(-1, *shape)


def updates(
    config, seed=POLICY, reward=REWARD, behind=ALIKE, watched=False, truncation=ALL_TOKENS, how="", **hyper: float
) -> Any:
    """What the step adds to the parameters for every group, `[groups, D]`; `hyper` is of the config, and traced."""
    usual = {name: getattr(config, name) for name in ("kl_coef", "clip_eps", "gae_lambda", "value_coef")}
    own = parameters(seed, how=how), parameters(REFERENCE, how=how)
    arguments = usual | {"clip_eps_high": config.clip_eps} | hyper, *own
    found = in_float64(_steps(config, watched, truncation, how), *arguments, reward, behind, every_group(config))
    return (flat(found[0], 1), *found[1:]) if watched else flat(found[0], 1)


def mean(config: GRPOConfig, per_group: np.ndarray, exact: Exact) -> np.ndarray:
    """Over groups of independent responses."""
    probability = np.prod(exact.pi[every_group(config)], axis=(1, 2))
    assert abs(probability.sum() - 1) < 1e-12
    return probability @ per_group


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def apart(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def but(**changes: Any) -> GRPOConfig:
    return dataclasses.replace(PLAIN, **changes)


def test_the_policy_is_far_from_uniform_and_every_response_counts():
    exact = exactly()
    assert abs(exact.pi.sum() - 1) < 1e-14
    assert exact.pi.min() > 0.01 and exact.pi.max() > 5 * exact.pi.min()
    assert np.abs(exact.value[MASK]).min() > 1e-3


# --- baselines ---


@pytest.mark.parametrize(
    "config, factor",
    [
        (but(), 1),
        (but(group_size=2), 1),
        (but(group_size=2, baseline="leave_one_out", kl_in="reward", kl_estimator="k1"), 1),
        (but(group_size=2, baseline="group_mean"), 1 / 2),
        (but(group_size=3, baseline="group_mean"), 2 / 3),
        (but(num_prompts=2, group_size=2, baseline="batch_mean"), 3 / 4),
        (but(group_size=2, baseline="group_mean", aggregation="constant_length"), 1 / 2 / R),  # Dr. GRPO
    ],
    ids=lambda x: f"{x.baseline}-{x.num_prompts}x{x.group_size}-{x.aggregation}" if isinstance(x, GRPOConfig) else "",
)
def test_the_expected_update_is_the_baselines_share_of_the_exact_gradient(config, factor):
    exact = exactly()
    same(mean(config, updates(config), exact), factor * exact.gradient(REWARD))


@pytest.mark.parametrize("G, baseline", [(1, "none"), (2, "leave_one_out")])
def test_a_truncated_samplers_expected_update_is_the_sum_over_what_it_can_sample(G, baseline):
    """Of pi (R - b) grad log pi, with pi the whole policy's and b the sampler's mean return."""
    exact, config = exactly(), but(group_size=G, baseline=baseline)
    pi = np.exp(exact.log_prob)
    mu = np.ones((N, R))
    for rows, column in ((slice(0, 7), 0), (slice(1, 4), 1), (slice(4, 7), 1)):  # what can follow one prefix
        distinct = np.sort(np.unique(pi[rows, column]))[::-1]
        least = distinct[np.argmax(np.cumsum(distinct) >= 0.7)]
        mu[rows, column] = np.where(pi[rows, column] >= least, pi[rows, column] / distinct[distinct >= least].sum(), 0)
    mu = mu.prod(1)
    np.testing.assert_allclose(mu.sum(), 1, rtol=1e-12)
    assert (mu > 0).sum() == 4 and exact.pi[mu > 0].sum() < 0.8
    found = updates(config, truncation=Truncation(top_p=0.7))
    of_groups = np.prod(mu[every_group(config)], axis=(1, 2))
    b = 0 if baseline == "none" else mu @ REWARD
    same(of_groups @ found, exact.gradient(np.where(mu > 0, REWARD - b, 0)))
    assert apart(of_groups @ found, exact.gradient(REWARD)) > 0.1


BINARY = np.array([[0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]], float)


def standardised_factor(p: float, G: int) -> float:
    """c_G(p) = E sqrt(K (G - K)) / (G p (1 - p)), K ~ Bin(G, p)."""
    K = np.arange(G + 1)
    return float(binom.pmf(K, G, p) @ np.sqrt(K * (G - K)) / (G * p * (1 - p)))


def silent(p: float, G: int) -> float:
    """How probable it is that all of a group are right, or none."""
    return p**G + (1 - p) ** G


def test_the_factors_at_two_and_three_and_many():
    for p in (0.1, 0.5, 0.8):
        assert abs(standardised_factor(p, 2) - 1) < 1e-12
        assert abs(standardised_factor(p, 3) - math.sqrt(2)) < 1e-12
    shares = [standardised_factor(0.5, G) / 2 for G in (4, 8, 16, 64)]
    np.testing.assert_allclose(shares, [0.808, 0.928, 0.967, 0.992], atol=5e-4)


@pytest.mark.parametrize("G", [2, 3, 4])
def test_binary_rewards_over_their_deviation_give_c_g_of_p_times_grad_p(G):
    config, seen = but(group_size=G, baseline="group_mean", divide_by_std=True), []
    for seed in (POLICY, OTHER):
        exact = exactly(seed)
        for reward in BINARY:
            p = exact.pi @ reward
            expected = standardised_factor(p, G) * exact.gradient(reward)
            same(mean(config, updates(config, seed, reward), exact), expected)
            seen.append(p)
    assert min(seen) < 0.3 and max(seen) > 0.7


def test_groups_without_signal_that_are_left_out_leave_the_mean_over_the_others():
    """Of one prompt the update is then the same, 0 where there is no signal. Of two, one without signal leaves the
    other's update whole: c_G(p) grad p / s * (1 - (1 - s)^P), where s = 1 - p^G - (1-p)^G."""
    one = but(group_size=2, baseline="group_mean", divide_by_std=True)
    two = dataclasses.replace(one, num_prompts=2, skip_groups_without_signal=True)
    skipping = dataclasses.replace(one, skip_groups_without_signal=True)
    exact, reward = exactly(), BINARY[1]
    np.testing.assert_allclose(updates(skipping, reward=reward), updates(one, reward=reward), rtol=0, atol=1e-13)
    p = exact.pi @ reward
    s = 1 - silent(p, 2)
    # Given a signal, the mean divides by its probability.
    correct = reward[every_group(one)[:, 0]].sum(1)
    probability = np.prod(exact.pi[every_group(one)[:, 0]], axis=1) * (correct == 1) / s
    given_signal = probability @ updates(skipping, reward=reward)
    same(given_signal, standardised_factor(p, 2) * exact.gradient(reward) / s)
    assert not updates(skipping, reward=reward)[correct != 1].any()
    same(mean(two, updates(two, reward=reward), exact), given_signal * (1 - (1 - s) ** 2))
    assert 0.1 < s < 0.9


REFILL = but(
    num_prompts=2,
    group_size=2,
    baseline="group_mean",
    divide_by_std=True,
    skip_groups_without_signal=True,
    max_rounds=5,
)


def test_an_update_learns_from_the_first_groups_with_a_signal_of_as_many_rounds_as_it_takes():
    """And counts all tokens of these rounds, and no others, in each lane of a population. So it does with rounds that
    were sampled and rewarded outside of the update."""
    env = token_env(task(np.float32(BINARY[0])))
    groups = source(env, language_model(env, MODEL))
    params = jax.tree.map(np.float32, parameters(OTHER))
    keys = jax.random.split(jax.random.key(0), 12)
    draw = quick_jit(jax.vmap(lambda key: sample_for_update(key, groups, params, REFILL)))
    data, signal, sampled = jax.tree.map(np.asarray, draw(keys))
    every = quick_jit(jax.vmap(lambda key: groups.sample(key, params, 2, 2)))
    num_rounds, worlds = [], []
    for lane, key in enumerate(keys):
        rounds = jax.tree.map(np.asarray, every(jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(5))))
        worlds.append(rounds)
        obs, reward = rounds.obs.reshape(10, 2, L + R), rounds.reward.sum(-1).reshape(10, 2)
        loud = np.flatnonzero(reward[:, 0] != reward[:, 1])
        used = next((n for n in range(1, 6) if (loud < 2 * n).sum() >= 2), 5)
        full = min((loud < 2 * used).sum(), 2)
        np.testing.assert_array_equal(data.obs[lane, :full], obs[loud[:full]])
        np.testing.assert_array_equal(signal[lane], np.arange(2) < full)
        assert sampled.env_steps[lane] == rounds.mask[:used].sum() and sampled.num_episodes[lane] == 4 * used
        assert sampled.num_silent[lane] == 2 * used - (loud < 2 * used).sum()
        np.testing.assert_allclose(sampled.total_return[lane], rounds.reward[:used].sum())
        num_rounds.append(used)
    assert len(set(num_rounds)) > 2 and max(num_rounds) == 5 and signal.all(1).any() and not signal.all()
    worlds = jax.tree.map(lambda *x: np.stack(x), *worlds)
    given = quick_jit(jax.vmap(lambda world: sample_for_update(keys[0], groups, params, REFILL, world)))(worlds)
    jax.tree.map(np.testing.assert_array_equal, given, (data, signal, sampled))


def test_dynamic_sampling_gives_the_mean_over_groups_with_a_signal_and_a_budget_for_all_its_rounds():
    """c_G(p) grad p / s times the probability that a round has any, with s that of a group's signal."""
    env, exact, reward = token_env(task(np.float32(BINARY[1]))), exactly(), BINARY[1]
    config = dataclasses.replace(REFILL, num_prompts=1, max_rounds=3)
    algorithm = grpo(env, language_model(env, MODEL), config)
    assert algorithm.update_steps == (2, 3 * 2 * R)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters(POLICY))
    samples = flat(sample(update_of(algorithm, params, 1.0), jax.random.key(5), 8192, jit=quick_jit), 1)
    p = exact.pi @ reward
    s = 1 - silent(p, 2)
    target = standardised_factor(p, 2) * exact.gradient(reward) / s * (1 - (1 - s) ** 3)
    error = samples.std(0) / math.sqrt(len(samples))
    assert np.abs((samples.mean(0) - target)[error > 1e-6] / error[error > 1e-6]).max() < 4.5
    once = standardised_factor(p, 2) * exact.gradient(reward)
    assert apart(target, once) > 0.2 and np.linalg.norm(error) < 0.1 * np.linalg.norm(target)


def test_rewards_that_are_equal_but_for_rounding_are_no_signal():
    more = np.nextafter(np.float32(500.1), np.float32(501))
    reward = jnp.array([[0.1, 0.1, 0.1], [500.1, 500.1, more], [0, 0, 0], [-0.3, -0.3, -0.3], [0.1, 0.1, 0.2]])
    signal, advantage = quick_jit(lambda x: (has_signal(x), group_advantage(x, "group_mean", True)))(reward)
    np.testing.assert_array_equal(signal[:, 0], [False, False, False, False, True])
    np.testing.assert_array_equal(advantage[:4], 0.0)
    np.testing.assert_allclose(advantage[4], [-math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)], rtol=1e-5)


# --- the KL ---


@pytest.mark.parametrize("how", ["chunks", "lora in chunks"])
def test_what_makes_a_model_fit_leaves_the_expected_update_exact_and_the_watched_kl(how):
    """Through the reference's score, the loss and what is watched; the gradient is that of the adapters."""
    exact = exactly(how="lora" if "lora" in how else "")
    config = but(group_size=2, baseline="leave_one_out", kl_in="reward", kl_estimator="k1")
    found, metrics, _ = updates(config, how=how, watched=True, kl_coef=0.25)
    same(mean(config, found, exact), exact.gradient(REWARD) - 0.25 * exact.kl_gradient)
    first = every_group(config)[:, 0, 0]  # of every group, each fourth episode is watched
    np.testing.assert_allclose(metrics["kl_reference"], exact.kl.sum(1)[first], rtol=1e-12)


@pytest.mark.parametrize("G", [2, 3])
def test_k1_in_the_reward_takes_off_the_exact_gradient_of_the_kl(G):
    config, exact = but(group_size=G, baseline="leave_one_out", kl_in="reward", kl_estimator="k1"), exactly()
    found = mean(config, updates(config, kl_coef=0.25), exact)
    same(found, exact.gradient(REWARD) - 0.25 * exact.kl_gradient)
    assert apart(found, exact.gradient(REWARD)) > 0.1


KL_IN_LOSS = [(level, k) for level in ("sequence", "token") for k in ("k1", "k2", "k3")]


@pytest.mark.parametrize("level, estimator", KL_IN_LOSS)
def test_a_kl_in_the_loss_has_the_gradient_of_its_estimator(level, estimator):
    """Of whole responses: none, that of KL(pi || pi_ref), that of KL(pi_ref || pi). Token by token: those of every
    token's KL with the prefixes' distribution held fixed."""
    config, exact = but(kl_estimator=estimator, kl_level=level), exactly()
    expected = {
        "sequence": {"k1": 0 * exact.frozen, "k2": exact.kl_gradient, "k3": exact.reverse_kl_gradient},
        "token": {"k1": 0 * exact.frozen, "k2": exact.frozen, "k3": exact.frozen_reverse},
    }[level][estimator]
    found = mean(config, updates(config, kl_coef=0.25), exact)
    same(found, exact.gradient(REWARD) - 0.25 * expected)


def test_the_kls_of_tokens_have_another_gradient_than_the_kl_of_responses():
    exact = exactly()
    found = apart(exact.frozen, exact.kl_gradient), apart(exact.frozen_reverse, exact.reverse_kl_gradient)
    assert min(found) > 0.05


def test_the_kl_that_is_watched_is_that_of_whole_responses_and_adapts_its_coefficient_by_two_per_cent_at_most():
    config, exact = but(kl_coef=0.5, kl_target=1.0), exactly()
    kl = exact.pi @ (exact.log_prob - exact.reference).sum(1)
    for target in (1e-3, 0.9, 1.1, 1e3):
        relative = exact.kl.sum(1) / (target * kl) - 1
        _, metrics, coef = updates(config, watched=True, kl_target=float(target * kl))
        np.testing.assert_allclose(metrics["kl_reference"], exact.kl.sum(1), rtol=1e-12)
        np.testing.assert_allclose(exact.pi @ metrics["kl_reference"], kl, rtol=1e-12)
        np.testing.assert_allclose(coef, 0.5 * (1 + 0.1 * np.clip(relative, -0.2, 0.2)), rtol=1e-12)
        np.testing.assert_array_equal(coef > 0.5, relative > 0)
    np.testing.assert_allclose(coef, 0.5 * 0.98, rtol=1e-12)


@pytest.mark.parametrize("mu, spread", [(0.1, (20.0, 1.418, 1.417)), (1.0, (2.0, 1.732, 1.695))])
def test_the_estimators_means_and_spreads_between_two_normals_by_quadrature(mu, spread):
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    weight, kl = weight / weight.sum(), mu**2 / 2
    estimates = [in_float64(k, mu * x - kl) for k in (kl_k1, kl_k2, kl_k3)]
    bias = np.array([weight @ k / kl - 1 for k in estimates])
    np.testing.assert_allclose(bias, [0, mu**2 / 4, 0], atol=1e-10)
    deviation = [np.sqrt(weight @ k**2 - (weight @ k) ** 2) / kl for k in estimates]
    np.testing.assert_allclose(deviation, spread, rtol=5e-4)
    assert estimates[1].min() >= 0 and estimates[2].min() >= 0


# --- ratios, surrogates, aggregations ---

LOW, HIGH, MOST = 0.2, 0.4, 1.7
BEHIND = np.array([[0.9, 0], [-0.1, 0.7], [0.3, -0.3], [0.6, -0.5], [0.25, 0.1], [-0.4, 0.45], [-0.6, 0.2]])


def token_weight(index: np.ndarray, how: str) -> np.ndarray:
    """What a token weighs, `[groups, P, G, R]`."""
    mask = MASK[index]
    length, B = mask.sum(-1, keepdims=True), index.shape[1] * index.shape[2]
    by = {
        "sequence_mean": B * length,
        "token_mean": mask.sum((1, 2, 3), keepdims=True),
        "constant_length": B * R,
        "sequence_sum": B,
    }
    return mask / by[how]


def ascent(config: GRPOConfig, exact: Exact, coefficient: np.ndarray) -> np.ndarray:
    """sum_it w_it c_it grad log pi(y_it), `[groups, D]`, of coefficients of every response's tokens `[7, R]`."""
    index = every_group(config)
    weight = token_weight(index, config.aggregation) * coefficient[index]
    return np.einsum("npgt,npgtd->nd", weight, exact.score[index])


def unclipped(ratio: np.ndarray, A: np.ndarray, most: float = np.inf) -> np.ndarray:
    return np.where(A >= 0, ratio <= 1 + HIGH, (ratio >= 1 - LOW) & (ratio <= most))


REWARD_OF_TOKENS = np.broadcast_to(REWARD[:, None], (N, R))


@pytest.mark.parametrize("aggregation", ["constant_length", "sequence_sum"])  # and the others below
def test_a_clipped_token_has_no_gradient_and_any_other_its_ratio_times_its_advantage(aggregation):
    ratio, A = np.exp(BEHIND), REWARD_OF_TOKENS
    for side in (ratio < 1 - LOW, (ratio > 1 - LOW) & (ratio < 1 + HIGH), ratio > 1 + HIGH):
        assert (side & MASK & (A > 0)).any() and (side & MASK & (A < 0)).any()
    assert (unclipped(ratio, A) != unclipped(ratio, A, MOST))[MASK].any()
    config, exact = but(group_size=2, aggregation=aggregation, max_ratio=MOST), exactly()
    found = updates(config, behind=BEHIND, clip_eps=LOW, clip_eps_high=HIGH)
    same(found, ascent(config, exact, ratio * A * unclipped(ratio, A, MOST)))


def test_the_ratio_of_a_whole_response_is_clipped_as_one():
    """GSPO: a response whose tokens' ratios lie on either side and whose own does not keeps its gradient. At the policy
    that acted it is that of the tokens' ratios."""
    config, exact = but(group_size=2, ratio="sequence", aggregation="sequence_mean"), exactly()
    ratio = np.exp(BEHIND.sum(1, keepdims=True) / MASK.sum(1, keepdims=True)) * np.ones(R)
    A = REWARD_OF_TOKENS
    kept, by_token = unclipped(ratio, A), unclipped(np.exp(BEHIND), A)
    assert (kept & ~by_token & MASK).any() and (~kept & MASK).any()
    found = updates(config, behind=BEHIND, clip_eps=LOW, clip_eps_high=HIGH)
    same(found, ascent(config, exact, ratio * A * kept))
    same(updates(config, clip_eps=LOW, clip_eps_high=HIGH), ascent(config, exact, A))
    # A mean over each response's tokens is no gradient of the expected reward.
    g, found = exact.gradient(BINARY[1]), mean(config, updates(config, reward=BINARY[1]), exact)
    assert g @ found / np.linalg.norm(g) / np.linalg.norm(found) < 0.95


def test_a_clipped_weight_leaves_no_tokens_gradient_out():
    """CISPO: also where the clipped surrogate would; at the policy that acted it is the plain gradient."""
    config, exact = but(group_size=2, surrogate="weighted", aggregation="token_mean"), exactly()
    ratio, A = np.exp(BEHIND), REWARD_OF_TOKENS
    assert (~unclipped(ratio, A) & MASK).any()
    found = updates(config, behind=BEHIND, clip_eps=LOW, clip_eps_high=HIGH)
    same(found, ascent(config, exact, np.clip(ratio, 1 - LOW, 1 + HIGH) * A))
    same(updates(config, clip_eps=LOW, clip_eps_high=HIGH), ascent(config, exact, A))


def test_the_two_sided_surrogate_and_its_gradient_on_a_grid():
    ratio, A = np.meshgrid(np.arange(0.05, 4, 0.1), np.array([-2.0, -0.5, 0.0, 0.7, 3.0]))

    def both(ratio, A, most):
        return jax.vmap(jax.value_and_grad(lambda x, A: two_sided_surrogate(x, A, LOW, HIGH, most)))(jnp.log(ratio), A)

    for most in (None, 2.0):
        value, gradient = in_float64(quick_jit(partial(both, most=most)), ratio.ravel(), A.ravel())
        clipped = np.clip(ratio, 1 - LOW, 1 + HIGH)
        gain = np.where(A >= 0, np.minimum(ratio, clipped), np.maximum(ratio, clipped)) * A
        gain = np.where(A < 0, np.maximum(gain, (most or 1e9) * A), gain)
        np.testing.assert_allclose(value, -gain.ravel(), rtol=1e-12, atol=1e-14)
        expected = -(ratio * A * unclipped(ratio, A, most or np.inf)).ravel()
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)
    symmetric, ppo = in_float64(
        quick_jit(lambda x, A: (two_sided_surrogate(x, A, LOW, LOW), clipped_surrogate(x, 0 * x, A, LOW))),
        np.log(ratio),
        A,
    )
    np.testing.assert_array_equal(symmetric, ppo)


def test_the_weight_of_an_importance_weighted_loss_is_a_constant():
    log_prob, A = np.log([0.1, 0.3, 0.5, 0.9]), np.array([1.0, -2.0, 0.5, 3.0])
    old = log_prob - np.log([0.5, 0.9, 1.2, 3.0])
    found = in_float64(
        quick_jit(jax.grad(lambda x, old, A: jnp.sum(importance_weighted(x, x - old, A * (1 + x - x), LOW, HIGH)))),
        log_prob, old, A,
    )  # fmt: skip
    np.testing.assert_allclose(found, -np.array([0.8, 0.9, 1.2, 1.4]) * A, rtol=1e-12)


TOKENS = np.array([[1.0, 2.0, 4.0], [7.0, 50.0, 50.0], [50.0, 50.0, 50.0], [3.0, 5.0, 50.0]])
PRESENT = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)


@pytest.mark.parametrize(
    "how, expected",
    [
        ("sequence_mean", (7 / 3 + 7 + 4) / 3),
        ("token_mean", 22 / 6),
        ("constant_length", 22 / 9),
        ("sequence_sum", 22 / 3),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_aggregations_by_hand_where_a_response_is_empty(how, expected):
    of = quick_jit(jax.value_and_grad(lambda x, mask: aggregate(x, mask, how)))
    found, gradient = in_float64(of, TOKENS, PRESENT)
    assert abs(found - expected) < 1e-12
    assert not gradient[~PRESENT].any() and gradient[PRESENT].all()
    assert in_float64(of, TOKENS, np.zeros((4, 3), bool))[0] == 0


def test_a_responses_log_ratio_is_the_mean_of_its_tokens_and_every_token_moves_it():
    present = jnp.asarray(PRESENT)
    found = in_float64(quick_jit(lambda x: sequence_log_ratio(x, present)), TOKENS)
    slope = in_float64(quick_jit(jax.jacobian(lambda x: sequence_log_ratio(x, present))), TOKENS)
    expected = np.array([[7 / 3] * 3, [7, 0, 0], [0, 0, 0], [4, 4, 0]])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    length = np.maximum(PRESENT.sum(1), 1)
    own = np.einsum("bt,bs->bts", PRESENT, PRESENT) / length[:, None, None]
    np.testing.assert_allclose(np.einsum("btbs->bts", slope), own, rtol=1e-12)
    assert abs(slope.sum() - own.sum()) < 1e-12


# --- a critic of every prefix ---


def test_the_critics_advantage_is_gaes_of_every_token_and_with_lambda_one_any_v_will_do():
    config, exact = but(baseline="value"), exactly()
    V, last = exact.value, np.column_stack([~MASK[:, 1], MASK[:, 1]])
    for lam in (1.0, 0.6, 0.0):
        A = np.where(last, REWARD[:, None] - V, 0)
        A[:, 0] = np.where(last[:, 0], A[:, 0], V[:, 1] - V[:, 0] + lam * A[:, 1])
        if lam == 1:
            np.testing.assert_allclose(A, MASK * (REWARD[:, None] - V), atol=1e-14)
        found = updates(config, gae_lambda=lam)
        same(found, ascent(config, exact, A))
        # The critic goes down its own loss, the mean over tokens of (V - target)^2 / 2.
        learned = updates(config, gae_lambda=lam, value_coef=0.7) - found
        length = MASK.sum(1)[:, None]
        same(learned, 0.7 * np.sum(A[..., None] * exact.value_score, axis=1) / length)
        off = apart(mean(config, found, exact), exact.gradient(REWARD))
        assert off < 1e-12 if lam == 1 else off > 0.05


# --- as it is trained ---


def test_updates_from_generated_responses_have_the_exact_gradient_as_their_mean():
    """With a reference of its own and the KL in the reward, as RLOO is meant to run."""
    params, reference = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters(s)) for s in (POLICY, REFERENCE)
    )
    config = dataclasses.replace(
        FAMILY["rloo"], num_prompts=1, group_size=3, optimizer="sgd", learning_rate=1.0, max_grad_norm=None,
        num_held_out=0, kl_coef=0.25,
    )  # fmt: skip
    algorithm = grpo(ENV, language_model(ENV, MODEL, reference), config)
    samples = sample(update_of(algorithm, params, 1.0), jax.random.key(3), 8192, jit=quick_jit)
    exact = exactly()
    target = exact.gradient(REWARD) - 0.25 * exact.kl_gradient
    found = flat(samples, 1)
    error = found.std(0) / math.sqrt(len(found))
    some = error > 1e-6
    assert np.abs((found.mean(0) - target)[some] / error[some]).max() < 4.5
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(target)
    assert apart(target, exact.gradient(REWARD)) > 0.15


def test_a_responses_reward_is_at_its_last_token_and_only_eos_terminates():
    groups = source(ENV, language_model(ENV, MODEL, jax.tree.map(np.float32, parameters(POLICY))))
    draw = quick_jit(lambda key: groups.sample(key, groups.init(key), 8, 16))
    found = jax.tree.map(np.asarray, draw(jax.random.key(0)))
    index = (found.action[:, :, None] == RESPONSES).all(-1).argmax(-1)
    assert len(np.unique(index)) == N
    np.testing.assert_array_equal(found.mask, MASK[index])
    np.testing.assert_allclose(found.reward.sum(-1), REWARD[index], rtol=1e-6)
    last = np.column_stack([~MASK[:, 1], MASK[:, 1]])[index]
    assert not found.reward[~last].any()
    np.testing.assert_array_equal(found.terminated, last & (found.action == EOS))
    np.testing.assert_array_equal(found.truncated, last & (found.action != EOS))
    np.testing.assert_array_equal(found.obs[..., :L], np.broadcast_to(PROMPT, (8, 16, L)))


def paid(env: Any, index: np.ndarray) -> GroupedEpisodes:
    """The groups of responses with these numbers, `[P, G]`, as `env` pays them."""

    def run(params):
        groups = source(env, answering(env, jnp.asarray(index), jnp.zeros((N, R))))
        return groups.sample(jax.random.key(0), params, *index.shape)

    return jax.tree.map(np.asarray, quick_jit(run)(jax.tree.map(np.float32, parameters(POLICY))))


def test_a_reward_given_to_the_environment_is_its_tasks_and_what_every_reader_sees():
    env = token_env(ENV.task, reward=lambda prompt, response: 7.0 + prompt[1] + jnp.sum(response >= 0))
    index = np.arange(N)[None]
    np.testing.assert_array_equal(paid(env, index).reward.sum(-1), 7 + MASK.sum(1)[None])
    assert env.task.reward(PROMPT, RESPONSES[0]) == 8


def test_a_step_around_the_tasks_own_pays_what_the_task_does():
    """To the bit, for every response: the one pass over a response is what its steps come to."""
    index = np.array([range(N), range(N)[::-1]])
    around = ENV._replace(step=lambda key, state, action: ENV.step(key, state, action))
    jax.tree.map(np.testing.assert_array_equal, paid(ENV, index), paid(around, index))


def test_a_replaced_step_pays_every_token_and_ends_a_response_where_it_likes():
    """It pays 10 times the token beside what the task's step does, ends a response at a `b`, and no other one ever."""

    def step(key, state, action):
        state, time_step = ENV.step(key, state, action)
        reward = 10.0 * action + time_step.reward
        return state, time_step._replace(reward=reward, terminated=action == 1, truncated=jnp.bool_(False))

    found = paid(ENV._replace(step=step), np.arange(N)[None])
    tokens = np.where((RESPONSES[:, :1] == 1) & [[False, True]], -1, RESPONSES)
    own = np.array([[0.3, 0], [0, -1.0], [0, 2.0], [0, 0.5], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found.action[0], tokens)
    np.testing.assert_array_equal(found.obs[0], np.column_stack([np.tile(PROMPT, (N, 1)), tokens]))
    np.testing.assert_array_equal(found.mask[0], tokens >= 0)
    assert not found.log_prob[0][tokens < 0].any() and found.log_prob[0][tokens >= 0].all()
    np.testing.assert_allclose(found.reward[0], np.where(tokens >= 0, 10 * tokens, 0) + own, rtol=1e-6)
    np.testing.assert_array_equal(found.terminated[0], tokens == 1)
    last = (tokens >= 0) & (np.roll(tokens, -1, 1) < 0) | (tokens >= 0) & [[False, True]]
    np.testing.assert_array_equal(found.truncated[0], last & (tokens != 1))


def test_pairs_are_ranked_by_what_the_steps_pay():
    """Every `a` is paid: `aa` is best, whatever the task says of it."""

    def step(key, state, action):
        state, time_step = ENV.step(key, state, action)
        return state, time_step._replace(reward=(action == 0).astype(jnp.float32))

    env = ENV._replace(step=step)
    model = answering(env, jnp.array([[1, 2, 3], [6, 0, 4]]), jnp.zeros((N, R)))
    params = jax.tree.map(np.float32, parameters(POLICY))
    pairs = quick_jit(lambda: sample_preferences(jax.random.key(0), env, model, params, 2, 3))()
    np.testing.assert_array_equal(pairs.chosen[0, L:], RESPONSES[2])
    np.testing.assert_array_equal(pairs.weight, [1, 0])


class HotSampler(LanguageModel):
    """Samples at a temperature of its own, and says so."""

    def generate(self, key, params, prompt, group_size, greedy=False):
        hot = LanguageModel(*self)._replace(temperature=self.temperature * 30)
        return hot.generate(key, params, prompt, group_size, greedy)


def test_narrow_log_probs_are_those_that_learn_and_the_samplers_difference_is_weighed_and_reported():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters(POLICY, 0.9))
    model = HotSampler(*language_model(ENV, MODEL))
    groups, plain = source(ENV, model), dataclasses.replace(PLAIN, num_prompts=8, group_size=16)

    @quick_jit
    def draw(key, params):
        data = groups.sample(key, params, 8, 16)
        token = data.obs.reshape(-1, L + R)
        cool, hot = (model._replace(temperature=x).score(params, token)[0] for x in (0.8, 24.0))
        weight = advantages(data, data.reward, jnp.zeros_like(data.reward), plain)[0]
        return (
            data,
            weight,
            *(x.log_prob(token[:, L:]).reshape(data.mask.shape) for x in (cool, hot)),
            info(data, Sampled.of(data)),
        )

    data, weight, learner, sampler, metrics = jax.tree.map(np.asarray, draw(jax.random.key(0), params))
    mask = data.mask
    np.testing.assert_allclose(data.log_prob[mask], learner[mask], atol=1e-5)
    assert not data.log_prob[~mask].any() and not weight[~mask].any()
    ratio = np.exp(learner - sampler)
    assert ratio[mask].max() > 2 > ratio[mask].min()
    expected = np.where(mask, data.reward.sum(-1, keepdims=True) * np.minimum(ratio, 2), 0)
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["sampler_log_ratio"], np.abs(np.log(ratio))[mask].max(), rtol=1e-4)


def test_a_swept_float_and_seeds_under_vmap_are_a_plain_loop_traced_once():
    config = GRPOConfig(num_prompts=2, group_size=4, num_held_out=0, learning_rate=0.03)
    traces = []

    def block(hyper, key):
        traces.append(1)
        algorithm = grpo(ENV, language_model(ENV, MODEL), dataclasses.replace(config, **hyper))
        state, metrics = train(key, algorithm, algorithm.init(key), 0, 2)
        return state.learner.params, metrics["episode_return"]  # the fewer, the faster to compile

    hyper = {"kl_coef": jnp.array([0.0, 3.0]), "clip_eps": jnp.array([0.05, 0.2])}
    keys = jax.random.split(jax.random.key(0), 2)
    population = quick_jit(jax.vmap(jax.vmap(block, (None, 0)), (0, None)))
    after = jax.tree.map(np.asarray, population(hyper, keys))
    population(jax.tree.map(lambda x: 0.5 * x, hyper), keys[::-1])
    assert len(traces) == 1
    one, ends = quick_jit(block), []
    for h in range(2):
        for s in range(2):
            alone = one({name: x[h] for name, x in hyper.items()}, keys[s])
            jax.tree.map(
                lambda x, y, h=h, s=s: np.testing.assert_allclose(x[h, s], y, rtol=1e-4, atol=3e-6),
                after, alone,
            )  # fmt: skip
            ends.append(flat(alone[0]))
    assert len(traces) == 2
    assert len(np.unique(ends, axis=0)) == 4


# --- ordinary environments ---


def test_a_bandits_expected_update_is_the_groups_share_of_the_exact_gradient():
    reward, logits = np.array([1.0, 0.0, -0.5]), np.array([0.3, -0.4, 0.2])
    mdp = bandit(tuple(reward))
    network, env, G = tabular_actor_critic(mdp), mdp_env(mdp), 4
    params = {"params": {"policy": {"logits": jnp.float32(logits)[None]}, "value": {"value": jnp.zeros(1)}}}
    config = but(group_size=G, baseline="group_mean", max_steps=1)
    pi = np.exp(logits) / np.exp(logits).sum()
    exact = {"params": {"policy": {"logits": pi * (reward - pi @ reward)}, "value": {"value": np.zeros(1)}}}
    samples = sample(update_of(grpo(env, network, config), params, 1.0), jax.random.key(4), 8192, jit=quick_jit)
    share = statistics(samples, jax.tree.map(lambda x: (1 - 1 / G) * x, exact), G)
    assert np.abs(share.z).max() < 4
    assert abs(statistics(samples, exact, G).z_along) > 10


def test_the_episodes_of_a_group_start_in_one_state_and_go_their_own_ways():
    mdp = garnet(0, num_states=6, num_actions=2, branching=3)
    groups = source(mdp_env(mdp), tabular_actor_critic(mdp), 6)
    found = quick_jit(lambda key: groups.sample(key, groups.init(key), 16, 5))(jax.random.key(0))
    obs, action = np.asarray(found.obs), np.asarray(found.action)
    assert obs.shape == action.shape == (16, 5, 6)
    assert (obs[:, :, 0] == obs[:, :1, 0]).all() and len(np.unique(obs[:, 0, 0])) > 2
    assert all(len(np.unique(group, axis=0)) > 1 for group in action)
    # The next states, too, are drawn for each episode by itself: the same action leads one group to several.
    several = [len(set(obs[i, action[i, :, 0] == a, 1])) > 1 for i in range(16) for a in range(2)]
    assert sum(several) > 8
    assert np.asarray(found.truncated[..., -1]).all() and not np.asarray(found.truncated[..., :-1]).any()


# --- what cannot be ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_prompts": 3, "num_minibatches": 2}, r"num_prompts \* group_size \(3\) must be divisible by"),
        ({"baseline": "group_mean"}, r"group_size \(1\) must be at least 2"),
        ({"baseline": "leave_one_out"}, r"group_size \(1\) must be at least 2"),
        ({"divide_by_std": True}, r"group_size \(1\) must be at least 2"),
        ({"baseline": "value"}, r"--network.value-head"),
        ({"kl_coef": -0.1}, r"kl_coef \(-0.1\)"),
    ],
)
def test_one_line_says_what_does_not_fit(changes, message):
    model = language_model(ENV, dataclasses.replace(MODEL, value_head=False))
    with pytest.raises(UsageError, match=message) as error:
        grpo(ENV, model, but(**changes))
    assert "\n" not in str(error.value)


def test_an_ordinary_network_is_no_critic_of_prefixes_and_an_endless_episode_none_of_a_group():
    mdp = garnet(0, num_states=3, num_actions=2, branching=2)
    network, env = tabular_actor_critic(mdp), mdp_env(mdp)
    with pytest.raises(UsageError, match="value-head"):
        grpo(env, network, but(baseline="value", max_steps=4))
    with pytest.raises(UsageError, match="max_steps"):
        grpo(env, network, but())


def test_a_group_without_signal_is_left_alone_whatever_its_penalty():
    """Divided by its own deviation, a penalty in the reward, or its rounding, would count as much as a right answer."""
    c = GRPOConfig(kl_in="reward")
    mask = jnp.ones((2, 4, 3), bool)
    ends = jnp.zeros_like(mask).at[..., -1].set(True)
    earned = jnp.zeros((2, 4, 3)).at[1, 0, -1].set(1.0)
    data = GroupedEpisodes(mask, mask, earned, earned, ends, jnp.zeros_like(ends), mask)
    penalty = 1e-7 * jax.random.normal(jax.random.key(0), earned.shape)
    advantage, _ = advantages(data, earned - penalty, jnp.zeros_like(earned), c)
    np.testing.assert_array_equal(advantage[0], 0)
    np.testing.assert_allclose(advantage[1, :, 0], (np.array([1, 0, 0, 0]) - 0.25) / np.sqrt(3 / 16), rtol=1e-5)
