"""Distributions against scipy.stats, numeric integration and sums."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from helpers import quick_jit

from purepg.equations.distributions import Categorical, Deterministic, DiagGaussian, TanhGaussian, executed
from purepg.experience.acting import actor
from purepg.experience.rollout import reset_all, rollout
from purepg.lab.exact import in_float64
from purepg.types import Box, Env, TimeStep

NUM_SAMPLES = 20_000
LOGITS = np.array([[0.3, -1.2, 2.0, 0.0], [5.0, 5.0, -3.0, 1.0], [-400.0, 0.0, 400.0, 1.0]], np.float32)
OTHER_LOGITS = np.array([[1.0, 0.0, 0.5, -2.0], [0.0, 1.0, 2.0, 3.0], [-390.0, 10.0, 400.0, 0.0]], np.float32)
MASKED = np.array([-np.inf, 0.5, -np.inf, 1.5, 0.0, -np.inf], np.float32)
MEAN = np.array([[0.5, -2.0], [3.0, 0.1]], np.float32)
LOG_STD = np.array([[-1.0, 0.7], [0.0, -2.0]], np.float32)


def normal(mean: Any, std: Any) -> Any:
    """Any, for pyright takes scipy's frozen distributions for discrete ones."""
    return scipy.stats.norm(mean, std)


def softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def samples(distribution, seed: int = 0) -> np.ndarray:
    """Independent samples of one distribution, drawn as a batch from a single key; executed actions."""
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (NUM_SAMPLES, *jnp.shape(x))), distribution)
    return np.asarray(executed(batch.sample(jax.random.key(seed))))


def test_categorical_log_prob_is_that_of_the_multinomial_of_one_draw():
    distribution = Categorical(jnp.asarray(LOGITS[:2]))
    for action in range(4):
        one_draw = np.broadcast_to(np.eye(4)[action], (2, 4))
        expected = [scipy.stats.multinomial.logpmf(x, 1, p) for x, p in zip(one_draw, softmax(LOGITS[:2]), strict=True)]
        np.testing.assert_allclose(distribution.log_prob(jnp.full(2, action)), np.array(expected), rtol=1e-5)


def test_categorical_log_prob_of_a_hopeless_action_does_not_underflow_to_minus_infinity():
    # exp(-800) is 0 in float32, so log(softmax) would say -inf.
    np.testing.assert_allclose(Categorical(jnp.asarray(LOGITS[2])).log_prob(jnp.int32(0)), -800.0, rtol=1e-6)


def test_categorical_entropy_is_that_of_scipy():
    expected = scipy.stats.entropy(softmax(LOGITS), axis=-1)
    np.testing.assert_allclose(Categorical(jnp.asarray(LOGITS)).entropy(), expected, rtol=1e-5, atol=1e-6)


def test_categorical_kl_is_the_sum_over_actions_of_self_against_other():
    p, q = softmax(LOGITS[:2]), softmax(OTHER_LOGITS[:2])
    kl = Categorical(jnp.asarray(LOGITS[:2])).kl(Categorical(jnp.asarray(OTHER_LOGITS[:2])))
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(-1), rtol=1e-5)
    assert Categorical(jnp.asarray(LOGITS)).kl(Categorical(jnp.asarray(LOGITS))).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("logits", [LOGITS[0], MASKED], ids=["plain", "masked"])
def test_categorical_samples_follow_the_distribution(logits):
    actions = samples(Categorical(jnp.asarray(logits)))
    assert actions.dtype == np.int32
    counts, probs = np.bincount(actions, minlength=len(logits)), softmax(logits)
    assert not counts[probs == 0].any()
    possible = probs > 0
    assert scipy.stats.chisquare(counts[possible], NUM_SAMPLES * probs[possible]).pvalue > 0.01


def cumulative_noise(logits: np.ndarray) -> np.ndarray:
    """The noise, of 32 bits, at which each action's share of it ends; in double precision."""
    return np.cumsum(softmax(logits)) * 2.0**32


@pytest.mark.parametrize("num_actions", [6, 40, 1000])
def test_no_noise_samples_a_masked_action(num_actions):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=num_actions).astype(np.float32)
    logits[rng.random(num_actions) < 0.5] = -np.inf
    logits[[0, -1]] = -np.inf
    # The ends of the noise's range, and the edges of every action's share of it.
    edge = np.concatenate([np.zeros(1), cumulative_noise(logits)])
    noise = np.clip((edge + np.array([-300, -4, 0, 4, 300])[:, None]).ravel(), 0, 2**32 - 1).astype(np.uint32)
    action = Categorical(jnp.broadcast_to(logits, (len(noise), num_actions))).transform(jnp.asarray(noise))
    assert np.isfinite(logits[np.asarray(action)]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_actions", [100, 1000, 152_000])
def test_every_action_has_its_share_of_the_noise_however_many_there_are(num_actions, dtype):
    """To a twentieth of the share of an action of average probability, at both of its edges."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=num_actions), dtype)
    edge = np.concatenate([np.zeros(1), cumulative_noise(np.asarray(logits, np.float64))])
    action = rng.choice(np.nonzero(np.diff(edge) > 2.0**32 / num_actions)[0], 16)
    slack = 0.05 * 2.0**32 / num_actions
    noise = jnp.asarray(np.stack([edge[action] + slack, edge[action + 1] - slack]).astype(np.uint32))
    found = jax.lax.map(lambda noise: Categorical(logits).transform(noise), noise.ravel())
    np.testing.assert_array_equal(found.reshape(2, -1), np.stack([action, action]))


def test_an_action_less_likely_than_any_noise_is_never_sampled():
    logits = jnp.array([-60.0, 0.0, -60.0])
    noise = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    np.testing.assert_array_equal(Categorical(jnp.broadcast_to(logits, (4, 3))).transform(noise), np.ones(4))


def test_narrow_parameters_are_read_as_float32():
    """Log-probabilities, entropies, divergences and samples are those of the same numbers in float32."""
    key = jax.random.key(0)
    kinds: Any = (Categorical, DiagGaussian, TanhGaussian)
    for kind in kinds:
        parameters = [jnp.asarray(x, jnp.bfloat16) for x in (MEAN, LOG_STD)][: len(kind._fields)]
        narrow, wide = kind(*parameters), kind(*(x.astype(jnp.float32) for x in parameters))
        action = narrow.sample(key)
        for found, expected in (
            (action, wide.sample(key)),
            (narrow.log_prob(action), wide.log_prob(action)),
            (narrow.entropy(), wide.entropy()),
            (narrow.kl(kind(*(x + 1 for x in parameters))), wide.kl(kind(*(x + 1 for x in parameters)))),
        ):
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            assert jax.tree.leaves(found)[0].dtype == jax.tree.leaves(expected)[0].dtype


def test_a_masked_action_leaves_log_probs_entropy_and_kl_those_of_the_rest():
    rest = np.isfinite(MASKED)
    masked, other = Categorical(jnp.asarray(MASKED)), Categorical(jnp.asarray(MASKED * 0.5))
    p, q = softmax(MASKED[rest]), softmax(0.5 * MASKED[rest])
    log_prob = jax.vmap(masked.log_prob)(jnp.arange(6))
    np.testing.assert_allclose(log_prob[rest], np.log(p), rtol=1e-5)
    assert np.isneginf(log_prob[~rest]).all()
    np.testing.assert_allclose(masked.entropy(), scipy.stats.entropy(p), rtol=1e-5)
    np.testing.assert_allclose(masked.kl(other), (p * np.log(p / q)).sum(), rtol=1e-4)
    unmasked = np.where(rest, MASKED, 0.0)
    np.testing.assert_allclose(
        masked.kl(Categorical(jnp.asarray(unmasked))), (p * np.log(p / softmax(unmasked)[rest])).sum(), rtol=1e-5
    )
    assert np.isposinf(Categorical(jnp.asarray(unmasked)).kl(masked))


def test_gradients_stay_finite_where_an_action_is_masked():
    rest = np.isfinite(MASKED)

    def everything(logits, action):
        masked, other = Categorical(logits), Categorical(jax.lax.stop_gradient(0.5 * logits))
        return masked.log_prob(action) + masked.entropy() + masked.kl(other) + other.kl(masked)

    grad = jax.grad(everything)(jnp.asarray(MASKED), jnp.int32(3))
    assert not np.asarray(grad)[~rest].any()
    np.testing.assert_allclose(grad[rest], jax.grad(everything)(jnp.asarray(MASKED[rest]), jnp.int32(1)), atol=1e-6)


def test_categorical_score_is_one_hot_minus_probability():
    score = jax.grad(lambda logits: Categorical(logits).log_prob(jnp.int32(2)))(jnp.asarray(LOGITS[0]))
    np.testing.assert_allclose(score, np.eye(4)[2] - softmax(LOGITS[0]), atol=1e-6)


def test_gaussian_log_prob_and_entropy_are_sums_of_scipys_normals():
    distribution = DiagGaussian(jnp.asarray(MEAN), jnp.asarray(LOG_STD))
    expected = normal(MEAN, np.exp(LOG_STD))
    action = np.array([[0.3, 4.0], [2.0, 0.15]], np.float32)
    np.testing.assert_allclose(distribution.log_prob(jnp.asarray(action)), expected.logpdf(action).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(distribution.entropy(), expected.entropy().sum(-1), rtol=1e-5)


def test_gaussian_kl_is_the_integral_of_the_log_ratio():
    other_mean, other_log_std = np.array([0.0, -1.0], np.float32), np.array([0.3, 0.2], np.float32)
    expected = 0.0
    for i in range(2):
        p = normal(MEAN[0, i], np.exp(LOG_STD[0, i]))
        q = normal(other_mean[i], np.exp(other_log_std[i]))
        expected += scipy.integrate.quad(
            lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), *p.interval(1 - 1e-12), epsabs=1e-9
        )[0]
    kl = DiagGaussian(jnp.asarray(MEAN[0]), jnp.asarray(LOG_STD[0])).kl(
        DiagGaussian(jnp.asarray(other_mean), jnp.asarray(other_log_std))
    )
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_gaussian_samples_follow_the_distribution_and_their_dimensions_are_independent():
    actions = samples(DiagGaussian(jnp.asarray(MEAN[0]), jnp.asarray(LOG_STD[0])))
    for i in range(2):
        expected = normal(MEAN[0, i], np.exp(LOG_STD[0, i]))
        assert scipy.stats.kstest(actions[:, i], expected.cdf).pvalue > 0.01
    assert abs(np.corrcoef(actions.T)[0, 1]) < 3 / np.sqrt(NUM_SAMPLES)


@pytest.mark.parametrize(
    "distribution", [Categorical, DiagGaussian, TanhGaussian], ids=["categorical", "gaussian", "tanh gaussian"]
)
def test_a_sample_is_its_noise_transformed_and_the_noise_looks_at_shapes_alone(distribution):
    """So that a rollout may draw it before there is an observation."""
    key, parameters = jax.random.key(1), [jnp.asarray(x) for x in (MEAN, LOG_STD)]
    policy = distribution(*parameters[: len(distribution._fields)])
    noise = jax.eval_shape(lambda: policy).noise(key)
    action, log_prob = policy.scored(noise)
    jax.tree.map(np.testing.assert_array_equal, policy.transform(noise), policy.sample(key))
    jax.tree.map(np.testing.assert_array_equal, action, policy.sample(key))
    np.testing.assert_array_equal(log_prob, policy.log_prob(action))


def test_the_mode_is_where_the_log_prob_is_largest():
    categorical = Categorical(jnp.asarray(LOGITS[[0, 2]]))
    assert categorical.mode().tolist() == [2, 2]
    assert categorical.mode().dtype == jnp.int32
    gaussian = DiagGaussian(jnp.asarray(MEAN), jnp.asarray(LOG_STD))
    gradient = jax.grad(lambda action: gaussian.log_prob(action).sum())(gaussian.mode())
    np.testing.assert_array_equal(gradient, np.zeros_like(MEAN))


@pytest.mark.parametrize(
    ("distribution", "action"),
    [
        (Categorical(jnp.zeros((3, 4))), np.zeros((3, 1), np.int32)),
        (Categorical(jnp.zeros((3, 4))), np.int32(0)),
        (DiagGaussian(jnp.zeros((3, 1)), jnp.zeros((3, 1))), np.zeros(3, np.float32)),
        (TanhGaussian(jnp.zeros((3, 1)), jnp.zeros((3, 1))), np.zeros(3, np.float32)),
        (DiagGaussian(jnp.zeros((3, 2)), jnp.zeros((3, 2))), np.zeros((3, 1), np.float32)),
    ],
)
def test_an_action_of_another_shape_raises(distribution, action):
    with pytest.raises(AssertionError):
        distribution.log_prob(jnp.asarray(action))


# --- squashed ---

WIDTHS = [(0.0, 0.05), (0.3, 0.5), (-1.5, 1.0), (0.7, 2.0), (4.0, 1.0)]  # mean and deviation before the tanh


def tanh_gaussian(mean: Any, std: Any, *batch: int) -> TanhGaussian:
    shape = np.broadcast_shapes(np.shape(mean), np.shape(std), (1,))
    return TanhGaussian(*(jnp.broadcast_to(jnp.asarray(x, float), (*batch, *shape)) for x in (mean, np.log(std))))


def log_density(u: Any, mean: Any, std: Any) -> Any:
    """Of tanh(u), per dimension, in double precision: log N(u) - log tanh'(u), with tanh'(u) = 4 / (e^u + e^-u)^2."""
    u = np.asarray(u, np.float64)
    return normal(mean, std).logpdf(u) - np.log(4) + 2 * np.logaddexp(u, -u)


def test_a_tanh_gaussians_density_is_the_slope_of_its_distribution_function_and_has_mass_one():
    """P(a <= x) = P(u <= arctanh x), differentiated by x on a grid."""
    for mean, std in WIDTHS[:4]:
        edge = np.tanh(mean + std * np.linspace(-6, 6, 4001))
        mass = np.diff(normal(mean, std).cdf(np.arctanh(edge)))
        middle, width = (edge[1:] + edge[:-1]) / 2, np.diff(edge)
        inside = (np.abs(middle) < 1 - 1e-5) & (width > 1e-9)
        policy = tanh_gaussian(mean, std, int(np.sum(inside)))
        log_prob = policy.log_prob(jnp.asarray(middle[inside, None], float))
        density, likely = np.exp(log_prob), mass[inside] > 1e-7
        np.testing.assert_allclose(density[likely], (mass / width)[inside][likely], rtol=5e-3)
        np.testing.assert_allclose(np.sum(density * width[inside]), mass[inside].sum(), rtol=1e-3)
        assert mass[inside].sum() > 0.95


def test_a_tanh_gaussian_scores_its_samples_by_the_change_of_variables_however_far_out():
    """Where tanh(u) is 1 to the last digit, and log(1 - tanh(u)^2) is minus infinity."""
    u = np.linspace(-50, 50, 201).astype(np.float32)
    for mean, std in WIDTHS:
        policy = tanh_gaussian(mean, std, len(u))
        action, log_prob = policy.scored(jnp.asarray((u[:, None] - mean) / std))
        np.testing.assert_allclose(executed(action)[:, 0], np.tanh(u), atol=1e-6)
        np.testing.assert_allclose(log_prob, log_density(u, mean, std), rtol=1e-5, atol=1e-3)
    assert np.tanh(u[-1]) == 1


def test_a_tanh_gaussians_log_prob_of_an_executed_action_is_that_of_the_sample_and_finite_at_the_bounds():
    """Of several dimensions it is the sum."""
    mean, std = np.array([0.3, -1.0, 0.5], np.float32), np.array([0.5, 1.0, 2.0], np.float32)
    noise = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    u = mean + std * noise
    near = np.abs(u).max(-1) < 3.5
    policy = tanh_gaussian(mean, std, 200)
    action, log_prob = policy.scored(jnp.asarray(noise))
    expected = log_density(u, mean, std).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(policy.log_prob(executed(action))[near], expected[near], rtol=1e-3, atol=1e-2)
    assert near.sum() > 100
    assert np.isfinite([tanh_gaussian(mean, std).log_prob(jnp.full(3, a)) for a in (-1.0, 1.0)]).all()


def test_a_tanh_gaussians_score_has_the_mean_zero_at_every_mean_and_deviation():
    """Of the actions that a rollout stores, under the policy that sampled them; also where tanh is 1 to the last digit.

    A score by the mean has the deviation 1 / std, one by log_std the deviation sqrt(2).
    """
    mean, std = (x.ravel() for x in np.meshgrid([0.0, 2.0, -8.0, 50.0], [0.01, 0.1, 1.0, 7.0]))
    params = {"mean": jnp.asarray(mean, jnp.float32), "log_std": jnp.asarray(np.log(std), jnp.float32)}

    def apply(params, obs):
        shape = (*obs.shape[:-1], len(mean))
        return TanhGaussian(*(jnp.broadcast_to(params[name], shape) for name in ("mean", "log_std"))), None

    def step(key, env_state, action):
        del key
        return env_state, TimeStep(jnp.zeros(1), jnp.max(jnp.abs(action)), jnp.bool_(False), jnp.bool_(False))

    network: Any = SimpleNamespace(apply=apply)
    box = Box(-np.ones(len(mean), np.float32), np.ones(len(mean), np.float32))
    env = Env(lambda key: (jnp.zeros(()), jnp.zeros(1)), step, box, box, None)

    def mean_score(key):
        k_start, k_rollout = jax.random.split(key)
        world = reset_all(k_start, env, NUM_SAMPLES)
        _, trajectory, _ = rollout(k_rollout, env, actor(network, params), world, 1)

        def log_prob(params):
            return jnp.mean(apply(params, trajectory.obs)[0].log_prob(trajectory.action))

        return jax.grad(log_prob)(params), jnp.max(trajectory.reward)

    score, largest = quick_jit(mean_score)(jax.random.key(0))
    assert largest == 1  # what the environment saw; the stored samples reach 50 and more
    bound = 4 / np.sqrt(NUM_SAMPLES)
    assert (np.abs(score["mean"]) * std < bound).all()
    assert (np.abs(score["log_std"]) < np.sqrt(2) * bound).all()


@pytest.mark.parametrize(("mean", "std"), [*WIDTHS, (0.0, 7.3), (3.0, 7.38), (50.0, 7.3), (50.0, 0.01)])
def test_a_tanh_gaussians_entropy_is_the_integral_of_its_log_density(mean, std):
    u, du = np.linspace(mean - 10 * std, mean + 10 * std, 20_001, retstep=True)
    expected = -np.sum(normal(mean, std).pdf(u) * log_density(u, mean, std)) * du
    np.testing.assert_allclose(tanh_gaussian(mean, std).entropy(), expected, atol=3e-4)


def test_a_tanh_gaussians_kl_and_entropy_of_several_dimensions_are_sums_and_the_kl_that_before_the_tanh():
    (m1, s1), (m2, s2) = WIDTHS[1], WIDTHS[2]
    p, q = tanh_gaussian([m1, m2], [s1, s2]), tanh_gaussian([m2, m1], [s2, s1])
    expected = 0.0
    for (m, s), (other_m, other_s) in (((m1, s1), (m2, s2)), ((m2, s2), (m1, s1))):
        u, du = np.linspace(m - 10 * s, m + 10 * s, 20_001, retstep=True)
        log_ratio = log_density(u, m, s) - log_density(u, other_m, other_s)
        expected += np.sum(normal(m, s).pdf(u) * log_ratio) * du
    np.testing.assert_allclose(p.kl(q), expected, rtol=1e-4)
    np.testing.assert_allclose(p.kl(q), DiagGaussian(*p).kl(DiagGaussian(*q)), rtol=1e-6)
    apart = tanh_gaussian(m1, s1).entropy() + tanh_gaussian(m2, s2).entropy()
    np.testing.assert_allclose(p.entropy(), apart, rtol=1e-5)


def test_gradients_of_a_tanh_gaussians_scored_sample_are_finite_differences():
    """Of the action and of its log-probability, by mean and log_std; some samples far out."""
    noise = np.array([[0.3, -1.2], [2.0, 0.1], [-9.0, 12.0]])
    at = np.array([[0.4, -0.3], [np.log(0.7), np.log(1.5)]])

    def both(parameters: Any) -> Any:
        policy = TanhGaussian(*(jnp.broadcast_to(x, noise.shape) for x in parameters))
        action, log_prob = policy.scored(jnp.asarray(noise))
        return jnp.sum(jnp.asarray([1.0, 2.0, 3.0]) @ executed(action)), log_prob @ jnp.asarray([1.0, -2.0, 0.5])

    value = quick_jit(both)
    jacobian = in_float64(quick_jit(jax.jacobian(both)), at)
    h = 1e-5
    for i in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[i] = h
        up, down = in_float64(value, at + step), in_float64(value, at - step)
        for j in range(2):
            np.testing.assert_allclose(jacobian[j][i], (up[j] - down[j]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_a_tanh_gaussians_mode_is_its_median():
    actions = samples(tanh_gaussian(0.8, 1.3))
    assert abs(np.mean(actions < executed(tanh_gaussian(0.8, 1.3).mode())) - 0.5) < 3 * 0.5 / np.sqrt(NUM_SAMPLES)
    assert (np.abs(actions) <= 1).all()


def test_a_deterministic_policys_samples_are_its_one_action_whatever_the_key():
    policy, key = Deterministic(jnp.asarray(MEAN)), jax.random.key(0)
    noise = jax.eval_shape(lambda: policy).noise(key)
    assert noise == ()
    for action in (policy.sample(key), policy.transform(noise), policy.mode()):
        np.testing.assert_array_equal(action, MEAN)
