"""Policies of several independent choices, held to the policy over all their combinations, and who refuses them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TinyQNetwork, choices_env, quick_jit

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.equations.distributions import Categorical, MultiCategorical
from purepg.experience.rollout import episodes, rollout
from purepg.lab.exact import in_float64
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.networks.heads import PolicyHead
from purepg.types import MultiDiscrete, UsageError

SIZES = (4, 1, 3)
RNG = np.random.default_rng(0)


def padded(rng: Any) -> np.ndarray:
    """Logits `[7, 3, 4]`, with -inf for the options that an entry does not have."""
    has = np.arange(max(SIZES)) < np.array(SIZES)[:, None]
    return np.where(has, 2 * rng.normal(size=(7, *has.shape)), -np.inf)


LOGITS, OTHER = padded(RNG), padded(RNG)
ACTION = RNG.integers(0, SIZES, (7, 3))


def product(logits: Any, sizes: Any = SIZES) -> Categorical:
    """The policy over all combinations, whose numbers count the last choice fastest."""
    joint = jnp.zeros((*logits.shape[:-2], 1))
    for i, size in enumerate(sizes):
        row = jax.nn.log_softmax(logits[..., i, :size])
        joint = (joint[..., :, None] + row[..., None, :]).reshape(*joint.shape[:-1], -1)
    return Categorical(joint)


def test_log_probabilities_entropy_and_kl_are_those_of_the_policy_over_all_combinations():
    def measures(logits, other):
        number = np.ravel_multi_index(tuple(ACTION.T), SIZES)
        policies: Any = (
            (MultiCategorical(logits), MultiCategorical(other), ACTION),
            (product(logits), product(other), number),
        )
        return [
            (policy.log_prob(action), policy.entropy(), policy.kl(old), old.kl(policy))
            for policy, old, action in policies
        ]

    found, expected = in_float64(measures, LOGITS, OTHER)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)
    assert np.abs(found[0]).max() > 1


def test_gradients_are_those_of_the_policy_over_all_combinations_and_0_where_there_is_no_option():
    def measures(policy, old, action):
        return (policy.log_prob(action) + 0.3 * policy.entropy() + 0.7 * policy.kl(old) + 0.2 * old.kl(policy)).sum()

    def gradients(logits, other):
        number = np.ravel_multi_index(tuple(ACTION.T), SIZES)
        return (
            jax.grad(lambda x: measures(MultiCategorical(x), MultiCategorical(other), ACTION))(logits),
            jax.grad(lambda x: measures(product(x), product(other), number))(logits),
        )

    found, expected = in_float64(gradients, LOGITS, OTHER)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert not np.any(found[~np.isfinite(LOGITS)]) and np.abs(found).max() > 0.1


def test_samples_of_each_choice_have_its_probabilities_and_are_independent_of_the_others():
    logits = jnp.asarray(LOGITS[0], jnp.float32)
    sample = np.asarray(MultiCategorical(jnp.broadcast_to(logits, (20_000, *logits.shape))).sample(jax.random.key(0)))
    assert sample.dtype == np.int32 and (sample < SIZES).all()
    number: Any = np.ravel_multi_index(tuple(sample.T), SIZES)
    share = np.bincount(number, minlength=12) / len(number)
    probability = np.exp(product(logits).log_prob_of_all())
    np.testing.assert_allclose(share, probability, atol=4 * np.sqrt(0.25 / len(number)))


def test_the_mode_is_the_most_likely_option_of_each_choice():
    np.testing.assert_array_equal(MultiCategorical(jnp.asarray(LOGITS)).mode(), LOGITS.argmax(-1))


def test_a_policy_head_gives_each_choice_its_own_logits_and_no_other_options():
    head: Any = PolicyHead(MultiDiscrete(SIZES), policy_scale=1.0)
    x = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)
    params = quick_jit(head.init)(jax.random.key(0), x)
    policy = head.apply(params, x)
    assert isinstance(policy, MultiCategorical) and policy.logits.shape == (2, 5, 3, 4)
    dense = params["params"]["logits"]
    flat = np.asarray(x @ dense["kernel"] + dense["bias"])
    for i, (start, size) in enumerate(zip((0, 4, 5), SIZES, strict=True)):
        np.testing.assert_allclose(policy.logits[..., i, :size], flat[..., start : start + size], rtol=1e-5, atol=1e-6)
        assert np.all(np.asarray(policy.logits[..., i, size:]) == -np.inf)


# --- algorithms ---

FEW: dict[str, Any] = {"num_envs": 3, "num_steps": 5}
ONCE: dict[str, Any] = FEW | {"optimizer": "sgd", "max_grad_norm": None, "learning_rate": 0.2, "entropy_coef": 0.1}
ALGORITHMS: dict[str, Any] = {
    "reinforce": (reinforce, REINFORCEConfig(num_episodes=3, optimizer="sgd", learning_rate=0.2, entropy_coef=0.1)),
    "ppo": (ppo, PPOConfig(**ONCE, num_epochs=2, num_minibatches=1)),
    "off_policy_pg": (off_policy_pg, OffPolicyPGConfig(**ONCE)),
    "trpo": (trpo, TRPOConfig(**FEW, num_value_minibatches=1)),
}
CHOICES, COMBINATIONS = choices_env(product=False), choices_env(product=True)


class OverCombinations(NamedTuple):
    """A network's policy over all combinations, with the same parameters."""

    network: Any

    def init(self, key, obs):
        return self.network.init(key, obs)

    def apply(self, params, obs):
        policy, value = self.network.apply(params, obs)
        return product(policy.logits, (2, 3)), value


@pytest.fixture(scope="module")
def updates() -> Any:
    """An update of every algorithm on the same experience: (learner before, after, metrics), for both policies."""
    network, noted = actor_critic(CHOICES, NetworkConfig(hidden=(8,), policy_scale=1.0)), []

    def gathered(gather):
        """The experience of the policy of choices, and for the other policy the same with numbers for actions."""

        def noting(key, env, *args):
            if env is CHOICES:
                noted.append(gather(key, env, *args))
                return noted[-1]
            again = noted.pop()

            def numbered(x):
                return x._replace(action=3 * x.action[..., 0] + x.action[..., 1])

            if hasattr(again, "trajectory"):
                return again._replace(trajectory=numbered(again.trajectory))
            world, trajectory, info = again
            return world, numbered(trajectory), info

        return noting

    def run(key):
        results = {}
        for name, (algorithm, config) in ALGORITHMS.items():
            for env, policy in ((CHOICES, network), (COMBINATIONS, OverCombinations(network))):
                made = algorithm(env, policy, config)
                before = made.init(key)
                after, metrics = made.step(jax.random.fold_in(key, 1), before, jnp.int32(0))
                results[name, env is COMBINATIONS] = before.learner, after.learner, metrics
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purepg.algorithms.on_policy.rollout", gathered(rollout))
        patch.setattr("purepg.algorithms.reinforce.episodes", gathered(episodes))
        return jax.tree.map(np.asarray, quick_jit(run)(jax.random.key(0)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_is_that_of_the_policy_over_all_combinations(updates, name):
    (before, found, metrics), (_, expected, expected_metrics) = updates[name, False], updates[name, True]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), found, expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), metrics, expected_metrics)
    change = jax.tree.map(lambda x, y: np.abs(x - y).max(), found, before)
    assert max(jax.tree.leaves(change)) > 1e-3


@pytest.mark.parametrize(
    ("algorithm", "config", "kind"),
    [
        (q_actor_critic, QActorCriticConfig(), "categorical"),
        (sac_discrete, DiscreteSACConfig(), "categorical"),
        (sac, SACConfig(), "gaussian"),
        (td3, TD3Config(), "deterministic"),
        (ddpg, DDPGConfig(), "deterministic"),
        (dpg, DPGConfig(), "deterministic"),
    ],
)
def test_a_critic_of_actions_refuses_several_choices_in_one_line(algorithm, config, kind):
    says = r"needs a critic Q\(s, a\), which the MultiDiscrete\(2, 3\) actions of toy do not have: use an algorithm"
    with pytest.raises(UsageError, match=f"^{algorithm.__name__} {says}") as error:
        algorithm(CHOICES, TinyQNetwork(kind), config)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=f"^actor_q {says}"):
        actor_q(CHOICES, ActorQConfig(kind))


def test_a_policy_of_numbers_refuses_several_choices():
    with pytest.raises(UsageError, match=r"^policy \(gaussian\) does not fit MultiDiscrete\(4, 1, 3\)"):
        PolicyHead(MultiDiscrete(SIZES), "gaussian").init(jax.random.key(0), jnp.zeros(2))


def test_an_agent_of_several_choices_learns_the_best_of_each():
    """a + b / 2 is largest at (1, 2)."""
    config = A2CConfig(num_envs=16, num_steps=8, learning_rate=3e-2, normalize_advantage=True)
    algorithm = a2c(CHOICES, actor_critic(CHOICES, NetworkConfig(hidden=(8,))), config)
    state = quick_jit(algorithm.init)(jax.random.key(0))

    def update(state, i):
        return algorithm.step(jax.random.fold_in(jax.random.key(1), i), state, i)

    state, _ = quick_jit(lambda state: jax.lax.scan(update, state, jnp.arange(60)))(state)
    _, obs = CHOICES.reset(jax.random.key(2))
    _, action, _ = algorithm.policy(state, True)(jax.random.key(3), (), obs[None])
    np.testing.assert_array_equal(action, [[1, 2]])
