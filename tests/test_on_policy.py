"""What the algorithms on rollouts share: the data of an update, and how far it moved the policy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TRUNCATED, SeparateNetwork, TinyQNetwork, arms_env, moments_of, quick_jit

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.configs import RolloutConfig
from purepg.algorithms.on_policy import collect, diagnostics
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.equations.diagnostics import policy_change
from purepg.equations.distributions import Categorical, DiagGaussian
from purepg.experience import normalize
from purepg.experience.acting import actor
from purepg.experience.rollout import rollout
from purepg.types import Discrete, State

# --- how far an update moved the policy ---

WHERE: Any = np.array([True, True, True, False])


def categorical_change() -> tuple[Any, Any, Any, dict[str, Any]]:
    """Four states with two actions; the first ratio is a little past the bound of 1.2, the third a little before it."""
    old: Any = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.4, 0.6]])
    new: Any = np.array([[0.601, 0.399], [0.3, 0.7], [0.401, 0.599], [0.8, 0.2]])
    action = np.array([0, 1, 1, 0])
    per_state = {
        "kl": (old * np.log(old / new)).sum(1),
        "reverse_kl": (new * np.log(new / old)).sum(1),
        "clip_fraction": np.array([1.0, 1.0, 0.0, 1.0]),
        "ratio": np.array([1.202, 1.4, 1.198, 2.0]),
        "entropy": -(new * np.log(new)).sum(1),
    }
    logits: Any = np.log(old), np.log(new) + 5
    return Categorical(logits[0]), Categorical(logits[1]), action, per_state


def gaussian_change() -> tuple[Any, Any, Any, dict[str, Any]]:
    """Four states with one action each, wider and moved, moved, as it was, and narrower."""
    m: Any = np.array([[0.0, 1.0, 2.0, 0.0], [0.5, 1.3, 2.0, 0.0]])
    s: Any = np.array([[1.0, 1.0, 0.5, 1.0], [2.0, 1.0, 0.5, 0.25]])
    action = np.array([1.0, 0.0, 2.5, 0.0])

    def kl(i, j):
        return np.log(s[j] / s[i]) + (s[i] ** 2 + (m[i] - m[j]) ** 2) / (2 * s[j] ** 2) - 0.5

    def density(i):
        return np.exp(-(((action - m[i]) / s[i]) ** 2) / 2) / s[i]

    ratio = density(1) / density(0)
    per_state = {
        "kl": kl(0, 1),
        "reverse_kl": kl(1, 0),
        "clip_fraction": 1.0 * (np.abs(ratio - 1) > 0.2),
        "ratio": ratio,
        "entropy": 0.5 * np.log(2 * np.pi * np.e * s[1] ** 2),
    }
    old, new = (DiagGaussian(m[i][:, None], log_std) for i, log_std in enumerate(np.log(s)[..., None]))
    return old, new, action[:, None], per_state


CHANGES = {"Categorical": categorical_change(), "DiagGaussian": gaussian_change()}
EITHER = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, tree)


@EITHER
@pytest.mark.parametrize("where", [None, WHERE])
def test_a_change_of_policy_by_hand(change, where):
    """Of the states that count: the last, which does not always, has the largest KL."""
    old, new, action, per_state = change
    counts = slice(None) if where is None else where
    ratio = per_state["ratio"][counts]
    expected = {name: per_state[name][counts].mean() for name in ("kl", "reverse_kl", "clip_fraction", "entropy")}
    expected["max_ratio"] = ratio.max()
    expected["effective_sample_size"] = ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
    found = policy_change(*in_float32((old, new, action)), where=where)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, err_msg=name)
    # The two directions, and all states and some, are told apart.
    assert abs(expected["kl"] / expected["reverse_kl"] - 1) > 0.01
    assert abs(per_state["kl"].mean() / per_state["kl"][WHERE].mean() - 1) > 0.01


@EITHER
@pytest.mark.parametrize("where", [None, WHERE])
def test_where_nothing_changed_every_measure_says_so(change, where):
    old, _, action = in_float32(change[:3])
    found = policy_change(old, old, action, where)
    assert (found["kl"], found["reverse_kl"], found["clip_fraction"]) == (0, 0, 0)
    assert found["max_ratio"] == 1
    np.testing.assert_allclose(found["effective_sample_size"], 1, rtol=1e-6)


def test_what_does_not_count_may_be_anything():
    old, new, action, _ = CHANGES["Categorical"]
    new = jax.tree.map(lambda logits: np.where(WHERE[:, None], logits, np.nan), new)
    assert all(np.isfinite(x) for x in policy_change(*in_float32((old, new, action)), where=WHERE).values())


# --- the data of an update ---

NETWORK = SeparateNetwork(Discrete(2))
CONFIG: Any = {"num_envs": 4, "num_steps": 6, "gamma": 0.8}
PRIOR_OBS = moments_of(jnp.array([5.0, 4.0]), jnp.array([9.0, 4.0]), 10)
PRIOR_RETURN = moments_of(jnp.float32(1), jnp.float32(4), 10)
RUNNING_RETURN = jnp.array([1.0, 2.0, 3.0, 4.0])


@pytest.fixture(scope="module")
def collected():
    """(before, what `rollout` gives by the same key, and what `collect` makes of it, right and mistaken)."""
    env = arms_env(ending=TRUNCATED)
    right = A2CConfig(**CONFIG, normalize_obs=True, scale_reward=True)
    mistaken = A2CConfig(**CONFIG, bootstrap_at_truncation=False)

    @quick_jit
    def run(key):
        learner, world, _ = a2c(env, NETWORK, right).init(key)
        learner = learner._replace(obs_moments=PRIOR_OBS, return_moments=PRIOR_RETURN)
        state = State(learner, world._replace(running_return=RUNNING_RETURN))
        raw = rollout(key, env, actor(NETWORK, learner.params, PRIOR_OBS), world.envs, CONFIG["num_steps"])
        data, after, info = collect(key, env, NETWORK, right, state)
        new = jax.tree.map(lambda x: 1.1 * x, learner.params)
        metrics = [diagnostics(NETWORK, learner.params, new, data, 2 * data.value, every) for every in (1, 4)]
        plain = State(learner._replace(obs_moments=None, return_moments=None), world._replace(running_return=None))
        return state, raw, (data, after, info), metrics, collect(key, env, NETWORK, mistaken, plain)

    return run(jax.random.key(0))


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_data_are_normalised_by_the_statistics_before_them(collected):
    before, (envs, raw, _), (data, after, _), *_ = collected
    standard = (raw.obs - PRIOR_OBS.mean) / np.sqrt(PRIOR_OBS.variance)
    close(data.obs, standard)
    close(data.reward, raw.reward / 2)
    policy, value = NETWORK.apply(before.learner.params, standard)
    next_standard = (raw.next_obs - PRIOR_OBS.mean) / np.sqrt(PRIOR_OBS.variance)
    close((data.policy, data.value), (policy, value))
    close(data.next_value, NETWORK.apply(before.learner.params, next_standard)[1])
    close(data.log_prob, policy.log_prob(raw.action))  # so the first ratio is one
    same = ("action", "log_prob", "terminated", "truncated")
    close([getattr(data, name) for name in same], [getattr(raw, name) for name in same])
    close(after.world.envs, envs)


def test_the_statistics_are_merged_with_the_raw_data_and_nothing_else_changes(collected):
    before, (_, raw, _), (_, after, _), *_ = collected
    running, returns = normalize.running_return(RUNNING_RETURN, raw.reward, raw.terminated | raw.truncated, 0.8)
    close(after.learner.obs_moments, normalize.update(PRIOR_OBS, raw.obs))
    close(after.learner.return_moments, normalize.update(PRIOR_RETURN, returns))
    close(after.world.running_return, running)
    assert np.abs(after.learner.obs_moments.mean - PRIOR_OBS.mean).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, after.learner.train_state, before.learner.train_state)


def test_without_normalisers_data_are_raw_and_by_mistake_a_time_limit_is_a_death(collected):
    *_, (data, after, _) = collected
    assert after.learner.obs_moments is after.learner.return_moments is after.world.running_return is None
    assert set(np.unique(data.reward)) == {0.0, 1.0} and np.abs(data.obs).max() > 5
    np.testing.assert_array_equal(data.terminated, data.truncated)
    assert data.terminated.any()


def test_of_a_network_without_v_the_value_is_zero():
    env, network = arms_env(), TinyQNetwork("categorical")
    algorithm = q_actor_critic(env, network, QActorCriticConfig(num_envs=3, num_steps=4))
    c = RolloutConfig(num_envs=3, num_steps=4)
    data = quick_jit(lambda key: collect(key, env, network, c, algorithm.init(key))[0])(jax.random.key(0))
    for value in (data.value, data.next_value):
        np.testing.assert_array_equal(value, np.zeros((4, 3)))


@pytest.mark.parametrize("every", [1, 4])
def test_diagnostics_measure_from_the_policy_that_acted_to_the_one_that_learned(collected, every):
    """At every step, or at every fourth; the critic at every one."""
    before, _, (data, *_), metrics, _ = collected
    found = metrics[0 if every == 1 else 1]
    new, _ = NETWORK.apply(jax.tree.map(lambda x: 1.1 * x, before.learner.params), data.obs)
    old, new, action = jax.tree.map(lambda x: x[np.arange(0, 6, every)], (data.policy, new, data.action))
    close(found, policy_change(old, new, action) | {"explained_variance": found["explained_variance"]})
    assert found["kl"] > 1e-6 and metrics[0]["kl"] != metrics[1]["kl"]
    # The target is twice the value: what is left is as large as the value.
    np.testing.assert_allclose(found["explained_variance"], 1 - 1 / 4, rtol=1e-4)
