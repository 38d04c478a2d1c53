"""Policies over legal actions only, held to the same policies over the legal actions alone, computed separately."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from helpers import PAIRS, pair_env, quick_jit

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.envs.contract import check_environment
from purepg.equations.distributions import Categorical, DiagGaussian
from purepg.equations.losses import expected_soft_policy_gradient
from purepg.equations.trust_region import fisher_vector_product
from purepg.experience.exploration import random_actor
from purepg.lab.exact import in_float64
from purepg.networks.actor_critic import ActorCritic, ActorQ, ActorQConfig, NetworkConfig, Policy, actor_critic, actor_q
from purepg.train import evaluate
from purepg.types import Actor, Box, Discrete, LegalActions, Transition, UsageError

B, A = 40, 5
RNG: Any = np.random.default_rng(0)
LOGITS, OTHER, Q = 2 * RNG.normal(size=(3, B, A))
LEGAL: Any = RNG.random((B, A)) < 0.5
LEGAL[:A] = np.eye(A, dtype=bool)  # of these, one action is legal
LEGAL[A:, 0] |= ~LEGAL[A:].any(1)
ACTION: Any = np.array([RNG.choice(np.flatnonzero(row)) for row in LEGAL])


def on_legal(function: Any, *rows: np.ndarray) -> np.ndarray:
    """`function` of each row's legal entries, in numpy and double precision."""
    return np.array([function(*(x[legal] for x in row)) for *row, legal in zip(*rows, LEGAL, strict=True)])


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - scipy.special.logsumexp(logits))


def measures(logits, other, q):
    """What algorithms compute from a masked policy, `[B]`, by name."""
    policy, old = Categorical(logits).masked(LEGAL), Categorical(other).masked(LEGAL)
    return {
        "log_prob": policy.log_prob(ACTION),
        "entropy": policy.entropy(),
        "kl": policy.kl(old),
        "reverse_kl": old.kl(policy),
        "soft loss": expected_soft_policy_gradient(policy.log_prob_of_all(), q, 0.3),
    }


def expected() -> dict[str, np.ndarray]:
    def kl(x, y):
        return scipy.stats.entropy(softmax(x), softmax(y))

    def soft_loss(x, q):
        return np.sum(softmax(x) * (0.3 * np.log(softmax(x)) - q))

    taken = np.where(np.arange(A) == ACTION[:, None], LOGITS, -np.inf)
    return {
        "log_prob": on_legal(lambda x, taken: taken.max() - scipy.special.logsumexp(x), LOGITS, taken),
        "entropy": on_legal(lambda x: scipy.stats.entropy(softmax(x)), LOGITS),
        "kl": on_legal(kl, LOGITS, OTHER),
        "reverse_kl": on_legal(kl, OTHER, LOGITS),
        "soft loss": on_legal(soft_loss, LOGITS, Q),
    }


def gradients(logits, other, q):
    """By the logits, `[B, A]`."""
    return {
        name: jax.grad(lambda x, name=name: measures(x, other, q)[name].sum())(logits)
        for name in measures(logits, other, q)
    }


def expected_gradients() -> dict[str, np.ndarray]:
    """By hand, 0 at illegal actions."""

    def scatter(function, *rows):
        out = np.zeros((B, A))
        for i, legal in enumerate(LEGAL):
            out[i, legal] = function(*(x[i, legal] for x in rows))
        return out

    def of_mean(p, x):  # the gradient of sum p x with x constant
        return p * (x - np.sum(p * x))

    taken = (np.arange(A) == ACTION[:, None]).astype(float)
    return {
        "log_prob": scatter(lambda x, taken: taken - softmax(x), LOGITS, taken),
        "entropy": scatter(lambda x: of_mean(softmax(x), -np.log(softmax(x))), LOGITS),
        "kl": scatter(lambda x, y: of_mean(softmax(x), np.log(softmax(x) / softmax(y))), LOGITS, OTHER),
        "reverse_kl": scatter(lambda x, y: softmax(x) - softmax(y), LOGITS, OTHER),
        "soft loss": scatter(lambda x, q: of_mean(softmax(x), 0.3 * np.log(softmax(x)) - q), LOGITS, Q),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_masked_policys_measures_and_gradients_are_those_of_the_policy_over_the_legal_actions_alone(dtype):
    """Those that logits of illegal actions have too: 0, and never NaN."""

    def both(*arrays):
        return measures(*arrays), gradients(*arrays)

    arrays = (LOGITS.astype(dtype), OTHER.astype(dtype), Q.astype(dtype))
    found, slopes = in_float64(both, *arrays) if dtype == np.float64 else quick_jit(both)(*arrays)
    tolerance = 1e-12 if dtype == np.float64 else 2e-5
    for name, value in expected().items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    for name, value in expected_gradients().items():
        np.testing.assert_allclose(slopes[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
        assert not np.any(slopes[name][~LEGAL]) and np.abs(value).max() > 0.1


def test_where_one_action_is_legal_it_is_certain():
    """No entropy, no divergence, and no gradient, to the last bit."""
    found, slopes = (quick_jit(f)(*map(np.float32, (LOGITS, OTHER, Q))) for f in (measures, gradients))
    for name in ("log_prob", "entropy", "kl", "reverse_kl"):
        assert not np.any(found[name][:A]) and not np.any(slopes[name][:A]), name
    np.testing.assert_array_equal(Categorical(LOGITS[:A]).masked(LEGAL[:A]).mode(), np.arange(A))


def test_samples_are_legal_and_of_the_noise_that_samples_the_policy_over_the_legal_actions():
    noise = jnp.asarray(np.linspace(0, 2**32 - 1, 257).astype(np.uint32))
    for logits, legal in zip(LOGITS[A - 1 : A + 6].astype(np.float32), LEGAL[A - 1 : A + 6], strict=True):
        masked, alone = (Categorical(jnp.broadcast_to(x, (257, len(x)))) for x in (logits, logits[legal]))
        np.testing.assert_array_equal(
            masked.masked(jnp.broadcast_to(legal, (257, A))).transform(noise),
            np.flatnonzero(legal)[alone.transform(noise)],
        )


def test_a_fisher_product_is_that_of_the_policy_over_the_legal_actions():
    """diag(p) - p p^T, with rows of 0 for the others."""
    logits, legal, v = jnp.float32(LOGITS[A]), LEGAL[A], jnp.float32(RNG.normal(size=A))
    old = Categorical(jnp.asarray(logits)).masked(legal)
    product = fisher_vector_product(lambda x: old.kl(Categorical(x).masked(legal)), jnp.asarray(logits))(v)
    p = np.zeros(A)
    p[legal] = softmax(LOGITS[A][legal])
    np.testing.assert_allclose(product, p * v - p * (p @ v), rtol=1e-4, atol=1e-6)
    assert 1 < legal.sum() < A and not np.any(np.asarray(product)[~legal])


def test_a_mask_of_another_size_than_the_policys_is_refused():
    with pytest.raises(AssertionError):
        Categorical(jnp.zeros((3, 4))).masked(jnp.ones(4, bool))


# --- algorithms ---

MASKED, NUMBERED = pair_env(masked=True), pair_env(masked=False)
FEW: dict[str, Any] = {"num_envs": 3, "num_steps": 5, "gamma": 0.9}
PLAIN: dict[str, Any] = FEW | {"optimizer": "sgd", "max_grad_norm": None}
ONCE: dict[str, Any] = PLAIN | {"learning_rate": 0.2, "entropy_coef": 0.1}
REPLAY: dict[str, Any] = FEW | {"warmup_steps": 1, "batch_size": 8, "capacity": 15}
SOFT: dict[str, Any] = PLAIN | REPLAY | {"policy_learning_rate": 0.1, "temperature_learning_rate": 0.1}
ALGORITHMS: dict[str, Any] = {  # whose terms are those of all others, too
    "ppo_penalty": (ppo_penalty, PPOPenaltyConfig(**ONCE, num_epochs=2, num_minibatches=1)),
    "off_policy_pg": (off_policy_pg, OffPolicyPGConfig(**ONCE)),
    "trpo": (trpo, TRPOConfig(**FEW, num_value_minibatches=1)),
    "q_actor_critic": (q_actor_critic, QActorCriticConfig(**ONCE, critic_learning_rate=0.1)),
    "sac_discrete": (sac_discrete, DiscreteSACConfig(**SOFT, critic_learning_rate=0.1)),
}
USES_Q = ("q_actor_critic", "sac_discrete")


def network_of(name: str) -> Any:
    if name in USES_Q:
        return actor_q(MASKED, ActorQConfig("categorical", hidden=(8,), policy_scale=1.0, num_critics=2))
    return actor_critic(MASKED, NetworkConfig(hidden=(8,), policy_scale=1.0))


class OfLegal(NamedTuple):
    """The network of the masked environment with the same parameters, as one that numbers the legal actions."""

    network: Any

    def init(self, key, obs):
        return self.network.init(key, obs)

    def apply(self, params, obs):
        policy, value = unmasked(self.network).apply(params, obs)
        return Categorical(jnp.take_along_axis(policy.logits, self._arms(obs), axis=-1)), value

    def q(self, params, obs, action):
        arm = jnp.take_along_axis(self._arms(obs), action[..., None], axis=-1)
        return self.network.q(params, obs, arm[..., 0])

    def q_of_all(self, params, obs):
        of_all = self.network.q_of_all(params, obs)
        return jnp.take_along_axis(of_all, jnp.broadcast_to(self._arms(obs), (*of_all.shape[:-1], 2)), axis=-1)

    def _arms(self, obs):
        return jnp.argsort(~obs["legal"], axis=-1, stable=True)[..., :2]


def unmasked(network: Any) -> Any:
    if isinstance(network, ActorQ):
        return network._replace(policy=network.policy.clone(observation_space=None))
    return network.clone(observation_space=None)


@pytest.fixture(scope="module")
def updates() -> Any:
    """An update of every algorithm: (learner before, after, metrics), where actions are masked and numbered."""

    def run(key):
        results = {}
        for name, (algorithm, config) in ALGORITHMS.items():
            network = network_of(name)
            of_masked = algorithm(MASKED, network, config)
            of_numbered = algorithm(NUMBERED, OfLegal(network), config)
            for kind, made in (("masked", of_masked), ("numbered", of_numbered)):
                before = made.init(key)
                after, metrics = made.step(jax.random.fold_in(key, 1), before, jnp.int32(0))
                results[name, kind] = before.learner, after.learner, metrics
        return results

    def at_random(env):
        """On either environment the same arms."""
        arms = random_actor(MASKED)

        def number(noise, memory, obs):
            memory, arm, _ = arms.act(noise, memory, obs)
            return memory, (arm != jnp.argmax(obs["legal"], axis=-1)).astype(jnp.int32), None

        return arms if env is MASKED else Actor(arms.noise, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purepg.algorithms.off_policy.random_actor", at_random)
        return jax.tree.map(np.asarray, quick_jit(run)(jax.random.key(0)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_updates_are_those_of_an_environment_that_numbers_its_legal_actions(updates, name):
    """Gradients, natural gradients, line searches, soft targets, temperatures and diagnostics; no reward is NaN."""
    (before, masked, metrics), (_, numbered, expected) = updates[name, "masked"], updates[name, "numbered"]
    for part in ("train_state", "target", "log_temperature", "own"):
        a, b = (getattr(learner, part, None) for learner in (masked, numbered))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), metrics, expected)
    changes = jax.tree.map(lambda x, y: np.abs(x - y).max(), masked.train_state.params, before.train_state.params)
    assert np.isfinite(jax.tree.leaves(changes)).all() and max(jax.tree.leaves(changes)) > 1e-3


def test_an_evaluation_takes_legal_actions_whether_they_are_sampled_or_the_mode():
    network = network_of("a2c")
    algorithm = a2c(MASKED, network, A2CConfig(**FEW))
    state = quick_jit(algorithm.init)(jax.random.key(0))
    for deterministic in (False, True):
        act = algorithm.policy(state, deterministic)
        returns = quick_jit(lambda key, act=act: evaluate(key, MASKED, act, 8, 4))(jax.random.key(1)).episode_return
        assert np.isfinite(returns).all()


def test_random_actions_before_discrete_sac_learns_are_legal():
    late: dict[str, Any] = REPLAY | {"warmup_steps": 15}
    config = DiscreteSACConfig(**late)
    algorithm = sac_discrete(MASKED, network_of("sac_discrete"), config)
    step = quick_jit(lambda key: algorithm.step(key, algorithm.init(jax.random.key(0)), jnp.int32(0)))
    state, _ = step(jax.random.key(1))
    buffer = state.world.buffer
    assert np.isfinite(buffer.reward).all()
    assert np.take_along_axis(np.asarray(buffer.obs["legal"]), np.asarray(buffer.action)[:, None], axis=1).all()


def test_discrete_sacs_target_entropy_is_a_share_of_that_of_the_uniform_policy_over_the_legal_actions():
    """In states in which one, two, ..., or all of them are legal."""
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purepg.algorithms.sac_discrete.replay_algorithm", lambda *args: given.append(args))
        patch.setattr("purepg.algorithms.sac_discrete.temperature_step", lambda tx, c, log_alpha, excess: excess)
        sac_discrete(MASKED, network_of("sac_discrete"), DiscreteSACConfig(target_entropy=0.3))
        (_, network, _, init_learner, _, learn) = given[0]
        legal = np.array([[0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
        obs = {"legal": legal, "x": np.float32(RNG.normal(size=(5, 2)))}
        flag, reward = jnp.zeros(5, bool), jnp.ones(5)
        batch = Transition(obs, np.array([2, 0, 1, 3, 1]), None, reward, flag, flag, obs)
        learner = init_learner(network.init(jax.random.key(0), obs))
        after, metrics = quick_jit(learn)(jax.random.key(1), learner, batch, jnp.int32(0))
    target = 0.3 * np.mean(np.log([1, 2, 3, 4, 1]))
    np.testing.assert_allclose(after.log_temperature, metrics["entropy"] - target, rtol=1e-5)
    assert abs(target - 0.3 * np.log(4)) > 0.1


# --- networks ---


def test_a_mask_is_no_feature_and_an_observation_without_a_legal_action_has_them_all():
    """As where an episode ended in a suite that has no legal action left."""
    network = network_of("a2c")
    obs = {"legal": np.ones((6, 4), bool), "x": np.float32(RNG.normal(size=(6, 2)))}
    params = network.init(jax.random.key(0), obs)
    assert params["params"]["policy_torso"]["hidden_0"]["kernel"].shape == (2, 8)
    policy, value = network.apply(params, obs)
    masks = np.zeros((6, 4), bool)
    masks[np.arange(6)[:, None], PAIRS] = True
    for legal in (masks, np.zeros_like(masks)):
        masked, same_value = network.apply(params, obs | {"legal": legal})
        possible = legal if legal.any() else ~legal
        np.testing.assert_array_equal(masked.logits, np.where(possible, policy.logits, -np.inf))
        np.testing.assert_array_equal(same_value, value)


def test_any_policy_head_is_masked_and_one_that_cannot_be_is_refused():
    def fixed(kind):
        return lambda name: lambda x: kind

    def torso(name):
        return lambda obs: obs["x"]

    def value(features, name):
        return lambda x: x[..., :1]

    obs = {"legal": np.array([True, False, True, False]), "x": np.zeros(2, np.float32)}
    logits = jnp.arange(4.0)
    network = ActorCritic(torso, fixed(Categorical(logits)), value, observation_space=MASKED.observation_space)
    np.testing.assert_array_equal(network.apply({}, obs)[0].logits, [0, -np.inf, 2, -np.inf])
    for policy in (
        ActorCritic(torso, fixed(DiagGaussian(logits, logits)), value, False, MASKED.observation_space),
        Policy(torso, fixed(DiagGaussian(logits, logits)), MASKED.observation_space),
    ):
        with pytest.raises(UsageError, match=r"^observations say which actions are legal, but a DiagGaussian policy"):
            policy.apply({}, obs)


def test_a_composed_policy_that_does_not_know_which_actions_are_legal_is_refused():
    made: Any = network_of("a2c")
    with pytest.raises(UsageError, match=r"^toy says which actions are legal: give ActorCritic its observation_space$"):
        a2c(MASKED, unmasked(made), A2CConfig())
    with pytest.raises(UsageError, match=r"^toy says which actions are legal: give Policy its observation_space$"):
        q_actor_critic(MASKED, unmasked(network_of("q_actor_critic")), QActorCriticConfig())


@pytest.mark.parametrize(
    ("space", "actions", "says"),
    [
        ({"legal": LegalActions(3), "x": MASKED.observation_space["x"]}, Discrete(4), "obs['legal'] must have shape"),
        (MASKED.observation_space, Discrete(3), "may hold one LegalActions"),
        (MASKED.observation_space, Box(-np.ones(1), np.ones(1)), "may hold one LegalActions"),
    ],
)
def test_a_mask_must_be_of_the_discrete_actions(space, actions, says):
    with pytest.raises(UsageError) as error:
        check_environment(MASKED._replace(observation_space=space, action_space=actions))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_observations_of_nothing_but_a_mask_are_refused():
    env = MASKED._replace(observation_space={"legal": LegalActions(4)})
    with pytest.raises(
        UsageError, match=r"^toy observes nothing that a policy could read but which actions are legal$"
    ):
        actor_critic(env, NetworkConfig())
