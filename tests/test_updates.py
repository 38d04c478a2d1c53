"""One update of each algorithm, held to its equation on the experience that it saw."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ENDINGS, TRUNCATED, SeparateNetwork, TinyNetwork, arms_env, moments_of, quick_jit
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.equations.advantages import discounted_return, gae, leave_one_out_mean, n_step, per_time_mean
from purepg.experience import normalize
from purepg.experience.rollout import episodes, rollout
from purepg.lab.exact import in_float64
from purepg.types import Algorithm, Discrete, State

ARMS = Discrete(2)

GAMMA, LAMBDA, RATE, ADAM_EPS, VALUE_COEF, ENTROPY_COEF = 0.8, 0.7, 0.05, 1e-5, 0.3, 0.1
COMMON: dict[str, Any] = {
    "learning_rate": RATE,
    "gamma": GAMMA,
    "value_coef": VALUE_COEF,
    "entropy_coef": ENTROPY_COEF,
    "max_grad_norm": None,
}
PRIOR = {"obs": (5.0, 9.0), "return": (1.0, 4.0)}  # mean and variance of 10 samples
RUNNING_RETURN = jnp.array([1.0, 2.0, 3.0, 4.0])
HALF_TIME = 30


apply: Any = TinyNetwork(ARMS).apply


class Update(NamedTuple):
    before: Any  # parameters
    learner: Any  # after, as the next
    world: Any
    metrics: dict[str, Any]
    experience: Any  # what `rollout` or `episodes` gave


def standardised(env):
    """What normalisation by PRIOR does, done by the environment."""

    def see(obs):
        (mean, variance), (_, return_variance) = PRIOR.values()
        return (obs - mean) / variance**0.5, return_variance**-0.5

    def reset(key):
        state, obs = env.reset(key)
        return state, see(obs)[0]

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        obs, scale = see(time_step.obs)
        return state, time_step._replace(obs=obs, reward=scale * time_step.reward)

    return env._replace(reset=reset, step=step)


def with_prior(state):
    """The state in the midst of things: PRIOR for its statistics, where it has any, and RUNNING_RETURN."""
    learner = state.learner
    if getattr(learner, "obs_moments", None) is None:
        return state
    obs, returns = (jnp.float32(PRIOR[name]) for name in ("obs", "return"))
    ten = jnp.float32(10)
    learner = learner._replace(
        obs_moments=moments_of(jnp.full(2, obs[0]), jnp.full(2, obs[1]), ten),
        return_moments=moments_of(returns[0], returns[1], ten),
    )
    return State(learner, state.world._replace(running_return=RUNNING_RETURN))


def updates_over(lanes: Any, make: Callable[[Any], dict[str, Algorithm]]) -> list[dict[str, Update]]:
    """One update of each of the algorithms that `make` makes of a lane, all with the same keys, for each lane.

    One program for them all. The experience is noted as it leaves `rollout` and `episodes`, whose key is fixed, since
    the algorithms take theirs from different places.
    """
    noted = []

    def noting(gather):
        def with_fixed_key(key, *args):
            result = gather(jax.random.key(5), *args)
            noted.append(result)
            return result

        return with_fixed_key

    def updates(lane):
        results = {}
        for name, algorithm in make(lane).items():
            state = with_prior(algorithm.init(jax.random.key(0)))
            after, metrics = algorithm.step(jax.random.key(1), state, jnp.int32(HALF_TIME))
            results[name] = Update(state.learner.params, after.learner, after.world, metrics, noted.pop())
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purepg.algorithms.on_policy.rollout", noting(rollout))
        patch.setattr("purepg.algorithms.reinforce.episodes", noting(episodes))
        results = jax.tree.map(np.asarray, quick_jit(jax.vmap(updates))(lanes))
    return [jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(jax.tree.leaves(lanes)[0]))]


def updates_by_ending(variants: dict[str, tuple]) -> list[dict[str, Update]]:
    """One update of each variant for each way in which all episodes may end."""

    def make(ending):
        made = {}
        for name, (algorithm, config, *change) in variants.items():
            env = arms_env(ending=ending)
            for f in change:
                env = f(env)
            made[name] = algorithm(env, TinyNetwork(ARMS), config)
        return made

    return updates_over(jnp.array(ENDINGS), make)


def check_update(update: Update, loss) -> None:
    """Holds the metrics to the loss's terms, and the new parameters to Adam's first step down its gradient."""
    (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(update.before)
    for name, x in terms.items():
        np.testing.assert_allclose(update.metrics[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(update.metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-3)
    expected = jax.tree.map(lambda p, g: p - RATE * g / (abs(g) + ADAM_EPS), update.before, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), update.learner.params, expected)


def distance(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), a, b)))


SIZES: dict[str, Any] = COMMON | {"num_envs": 4, "num_steps": 8}
ONCE: dict[str, Any] = SIZES | {"num_epochs": 1, "num_minibatches": 1, "gae_lambda": LAMBDA}
TWICE: dict[str, Any] = SIZES | {"num_epochs": 2, "num_minibatches": 2}
HALF_WAY: dict[str, Any] = SIZES | {
    "learning_rate": 2 * RATE,
    "anneal_learning_rate": True,
    "anneal_updates": 2 * HALF_TIME,
}
ANNEALED: dict[str, Any] = TWICE | HALF_WAY | {"anneal_clip_eps": True}
ACTOR_CRITICS = {
    "a2c": (a2c, A2CConfig(**SIZES, gae_lambda=LAMBDA)),
    "a2c mistaken": (a2c, A2CConfig(**SIZES, gae_lambda=LAMBDA, bootstrap_at_truncation=False)),
    "a2c n-step": (a2c, A2CConfig(**SIZES, n_step=3)),
    "a2c normalised": (a2c, A2CConfig(**SIZES, normalize_obs=True, scale_reward=True)),
    "a2c on normalised": (a2c, A2CConfig(**SIZES), standardised),
    "a2c standardised advantage": (a2c, A2CConfig(**SIZES, gae_lambda=LAMBDA, normalize_advantage=True)),
    "ppo": (ppo, PPOConfig(**ONCE, normalize_advantage="off")),
    "ppo mistaken": (ppo, PPOConfig(**ONCE, normalize_advantage="off", bootstrap_at_truncation=False)),
    "ppo batch": (ppo, PPOConfig(**ONCE, normalize_advantage="batch")),
    "ppo minibatch": (ppo, PPOConfig(**ONCE, normalize_advantage="minibatch")),
    "ppo normalised": (ppo, PPOConfig(**TWICE, normalize_obs=True, scale_reward=True)),
    "ppo on normalised": (ppo, PPOConfig(**TWICE), standardised),
    "ppo half": (ppo, PPOConfig(**TWICE, clip_eps=0.1)),
    "ppo annealed": (ppo, PPOConfig(**ANNEALED, clip_eps=0.2)),
    "off-policy": (off_policy_pg, OffPolicyPGConfig(**SIZES, gae_lambda=LAMBDA, num_epochs=1)),
    "off-policy by trajectories": (
        off_policy_pg,
        OffPolicyPGConfig(
            **HALF_WAY, gae_lambda=LAMBDA, num_epochs=1, ratio="trajectory", max_ratio=1.5, normalize_advantage=True
        ),
    ),
    "ppo penalty": (ppo_penalty, PPOPenaltyConfig(**ONCE, normalize_advantage="off", kl_coef=100.0)),
    "ppo penalty, batch": (ppo_penalty, PPOPenaltyConfig(**ONCE, normalize_advantage="batch", kl_coef=100.0)),
    "ppo reverse penalty, minibatch": (
        ppo_penalty,
        PPOPenaltyConfig(**ONCE | HALF_WAY, normalize_advantage="minibatch", kl_coef=100.0, penalty="reverse_kl"),
    ),
}


@pytest.fixture(scope="module")
def actor_critic_updates():
    return updates_by_ending(ACTOR_CRITICS)


@pytest.mark.parametrize("name", ["a2c", "a2c n-step", "a2c standardised advantage", "ppo"])
def test_an_actor_critics_update_is_its_equation(actor_critic_updates, name):
    """Nothing but the loss is written anew here: the estimators have tests of their own."""
    for update in (updates[name] for updates in actor_critic_updates):
        _, x, _ = update.experience
        value, next_value = (apply(update.before, obs)[1] for obs in (x.obs, x.next_obs))
        known = (x.reward, value, next_value, x.terminated, x.truncated, GAMMA)
        advantage, target = n_step(*known, 3) if name == "a2c n-step" else gae(*known, LAMBDA)
        if name == "a2c standardised advantage":
            advantage = (advantage - advantage.mean()) / advantage.std()

        def loss(params, x=x, advantage=advantage, target=target):
            distribution, value = apply(params, x.obs)
            log_prob = distribution.log_prob(x.action)
            ratio = jnp.exp(log_prob - x.log_prob)
            policy_loss = -jnp.mean((ratio if name == "ppo" else log_prob) * advantage)
            value_loss, entropy = 0.5 * jnp.mean((value - target) ** 2), jnp.mean(distribution.entropy())
            terms = {"policy_loss": policy_loss, "value_loss": value_loss}
            return policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * entropy, terms

        check_update(update, loss)
        expected = 1 - jnp.var(target - value) / jnp.var(target)
        np.testing.assert_allclose(update.metrics["explained_variance"], expected, rtol=1e-3)


def test_in_one_step_ppo_the_off_policy_gradient_and_the_penalties_are_a2c(actor_critic_updates):
    """The ratio is 1, the clip idle, the gradient of a KL from a policy to itself zero, whatever its weight, and the
    update that of the advantage actor-critic: also half way down, from twice the learning rate."""
    same = {
        "a2c": ["ppo", "off-policy", "ppo penalty"],
        "a2c standardised advantage": [
            *("ppo batch", "ppo minibatch", "off-policy by trajectories"),
            *("ppo penalty, batch", "ppo reverse penalty, minibatch"),
        ],
    }
    for updates in actor_critic_updates:
        for reference, names in same.items():
            for name in names:
                assert distance(updates[name].learner.params, updates[reference].learner.params) < 1e-5


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_bootstrap_at_truncation_matters_where_the_clock_ends_episodes_and_nowhere_else(actor_critic_updates, name):
    """Off, a time limit is a death: the same update as where the episodes did terminate. With both flags they did."""
    terminating, truncating, both = actor_critic_updates
    right, mistaken = name, f"{name} mistaken"
    for update in (terminating[mistaken], truncating[mistaken], both[mistaken], both[right]):
        assert distance(update.learner, terminating[right].learner) < 1e-6
    assert distance(truncating[mistaken].learner.params, truncating[right].learner.params) > 1e-3
    assert abs(truncating[mistaken].metrics["value_loss"] - truncating[right].metrics["value_loss"]) > 1e-2


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_normalising_is_learning_in_a_normalised_environment(actor_critic_updates, name):
    """By the statistics before the update, throughout it; the raw data are merged after it."""
    for updates in actor_critic_updates:
        normalised, reference = updates[f"{name} normalised"], updates[f"{name} on normalised"]
        assert distance(normalised.learner.params, reference.learner.params) < 1e-4
        assert distance(normalised.learner.params, updates[name].learner.params) > 1e-3
        assert reference.learner.obs_moments is None

        _, x, _ = normalised.experience
        ended = x.terminated | x.truncated
        running_return, returns = normalize.running_return(RUNNING_RETURN, x.reward, ended, GAMMA)
        assert running_return is not None
        np.testing.assert_allclose(normalised.world.running_return, running_return, rtol=1e-5)
        for moments, (mean, variance), data in (
            (normalised.learner.obs_moments, PRIOR["obs"], x.obs),
            (normalised.learner.return_moments, PRIOR["return"], returns),
        ):
            mean, variance = jnp.broadcast_to(mean, moments.mean.shape), jnp.broadcast_to(variance, moments.mean.shape)
            expected = normalize.update(moments_of(mean, variance, 10), data)
            assert distance(moments, expected) < 1e-4


def test_half_way_down_learning_rate_and_clip_are_half_of_what_they_were(actor_critic_updates):
    for updates in actor_critic_updates:
        half, annealed = updates["ppo half"], updates["ppo annealed"]
        assert half.metrics["clip_fraction"] > 0.1
        assert distance((half.learner.params, half.metrics), (annealed.learner.params, annealed.metrics)) < 1e-4


# --- a second step on the same data, when the policy is no longer the one that acted ---

STEP_SIZE, BOUND = 1.0, 1.2
DESCENT: dict[str, Any] = SIZES | {"optimizer": "sgd", "learning_rate": STEP_SIZE, "gae_lambda": LAMBDA}


class Seen(NamedTuple):
    """What a loss reads, of one update's experience."""

    old_log_pi: Any  # [T, N, A]
    advantage: Any
    target: Any


def seen(params: Any, x: Any) -> Seen:
    distribution, value = apply(params, x.obs)
    known = (x.reward, value, apply(params, x.next_obs)[1], x.terminated, x.truncated, GAMMA)
    return Seen(jax.nn.log_softmax(distribution.logits), *gae(*known, LAMBDA))


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def second_steps(updates: list[Update], policy_loss: Callable[..., Any], *lanes: np.ndarray) -> Any:
    """(the parameters after two steps down the loss, its terms at both), for each update, in double precision.

    policy_loss: (log_pi [T, N, A] of the policy that learns, experience, Seen, one of each of `lanes`) -> (loss, terms)
    """

    def two(params, x, *lane):
        data = seen(params, x)

        def loss(params):
            distribution, value = apply(params, x.obs)
            log_pi = jax.nn.log_softmax(distribution.logits)
            of_policy, terms = policy_loss(log_pi, x, data, *lane)
            value_loss = 0.5 * jnp.mean((value - data.target) ** 2)
            entropy = -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))
            terms |= {"policy_loss": of_policy, "value_loss": value_loss}
            return of_policy + VALUE_COEF * value_loss - ENTROPY_COEF * entropy, terms

        def step(params, _):
            gradient, terms = jax.grad(loss, has_aux=True)(params)
            terms |= {"grad_norm": optax.tree.norm(gradient)}
            return jax.tree.map(lambda p, g: p - STEP_SIZE * g, params, gradient), terms

        return jax.lax.scan(step, params, length=2)

    before, x = stacked([update.before for update in updates]), stacked([update.experience[1] for update in updates])
    return in_float64(quick_jit(jax.vmap(two)), before, x, *lanes)


def check_second_steps(updates: list[Update], expected: Any, of_both: Callable[[Any], Any]) -> None:
    """of_both: what the metrics are of the terms at the first and the second step."""
    for i, update in enumerate(updates):
        params, terms = jax.tree.map(lambda x, i=i: x[i], expected)
        for name, x in terms.items():
            np.testing.assert_allclose(update.metrics[name], of_both(x), rtol=1e-3, atol=1e-5, err_msg=name)
        assert distance(update.learner.params, params) < 1e-4
        assert distance(update.before, params) > 0.1


def taken(log_pi: Any, x: Any) -> Any:
    return jnp.take_along_axis(log_pi, x.action[..., None], axis=-1)[..., 0]


RATIOS = {
    "step": {},
    "step, bounded": {"max_ratio": BOUND},
    "trajectory": {"ratio": "trajectory"},
    "trajectory, bounded": {"ratio": "trajectory", "max_ratio": BOUND},
}


@pytest.fixture(scope="module")
def off_policy_updates():
    config: dict[str, Any] = DESCENT | {"num_epochs": 2}
    return updates_by_ending({name: (off_policy_pg, OffPolicyPGConfig(**config, **c)) for name, c in RATIOS.items()})


@pytest.mark.parametrize("name", RATIOS)
def test_a_second_step_weights_each_action_by_the_new_policys_probability_over_the_old_ones(off_policy_updates, name):
    """Its own, or the product over the steps of the rollout that are of its episode; no more than the bound."""
    updates = [updates[name] for updates in off_policy_updates]

    def weight(log_pi, x, data):
        log_ratio = taken(log_pi, x) - taken(data.old_log_pi, x)
        if "trajectory" in name:
            ended = x.terminated | x.truncated
            episode = jnp.cumsum(ended, axis=0) - ended  # the number of ends before a step
            log_ratio = jnp.einsum("tun,un->tn", episode[:, None] == episode, log_ratio)
        return jnp.clip(jnp.exp(log_ratio), max=BOUND) if "bounded" in name else jnp.exp(log_ratio)

    def policy_loss(log_pi, x, data):
        w = stop_gradient(weight(log_pi, x, data))
        size = jnp.sum(w) ** 2 / jnp.sum(w**2) / w.size
        terms = {"weight_mean": w.mean(), "weight_max": w.max(), "weight_effective_sample_size": size}
        return -jnp.mean(w * data.advantage * taken(log_pi, x)), terms

    expected = second_steps(updates, policy_loss)
    check_second_steps(updates, expected, lambda x: x[1])
    # The bound binds, and without it weights go far beyond; an episode's weight further than a step's.
    at_most = {"step": 1.5, "trajectory": 2.0}.get(name)
    largest = expected[1]["weight_max"][:, 1]
    assert (largest > at_most).all() if at_most else (largest == BOUND).all()


class Penalty(NamedTuple):
    coef: np.ndarray
    target_kl: np.ndarray


COEFS, TARGETS = np.array([0.3, 2.0]), np.geomspace(1e-3, 10, 100)
PENALTIES = Penalty(*(x.ravel().astype(np.float32) for x in np.meshgrid(COEFS, TARGETS)))


@pytest.fixture(scope="module")
def penalty_updates():
    """One update from each coefficient and each target."""
    config: dict[str, Any] = DESCENT | {"num_epochs": 2, "num_minibatches": 1, "normalize_advantage": "off"}
    env, network = arms_env(), TinyNetwork(ARMS)

    def make(lane):
        varied: dict[str, Any] = config | {"kl_coef": lane.coef}
        return {
            "kl": ppo_penalty(env, network, PPOPenaltyConfig(**varied, target_kl=lane.target_kl)),
            "reverse_kl": ppo_penalty(
                env, network, PPOPenaltyConfig(**varied, target_kl=lane.target_kl, penalty="reverse_kl")
            ),
            "fixed": ppo_penalty(env, network, PPOPenaltyConfig(**varied, target_kl=None)),
        }

    return updates_over(PENALTIES, make)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_a_second_step_goes_up_the_surrogate_and_down_the_kl_times_its_coefficient(penalty_updates, name):
    some = slice(0, len(COEFS))  # one target is enough: it has no part in the first update
    updates = [updates[name] for updates in penalty_updates[some]]

    def policy_loss(log_pi, x, data, coef):
        ratio = jnp.exp(taken(log_pi, x) - taken(data.old_log_pi, x))
        p, q = (data.old_log_pi, log_pi) if name == "kl" else (log_pi, data.old_log_pi)
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return -jnp.mean(ratio * data.advantage) + coef * jnp.mean(kl), {"kl_coef": coef}

    check_second_steps(updates, second_steps(updates, policy_loss, PENALTIES.coef[some]), np.mean)
    without = second_steps(updates, policy_loss, 0 * PENALTIES.coef[some])
    for i, update in enumerate(updates):
        assert distance(update.learner.params, jax.tree.map(lambda x, i=i: x[i], without[0])) > 1e-2


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_the_coefficient_is_halved_below_two_thirds_of_the_target_and_doubled_above_three_halves(penalty_updates, name):
    """Of the KL that it is the coefficient of, measured after the update; between the two it stays."""

    def factor(kl, target):
        return 0.5 if kl < target / 1.5 else 2.0 if kl > 1.5 * target else 1.0

    factors, tell_apart = set(), 0
    for updates, coef, target in zip(penalty_updates, *PENALTIES, strict=True):
        learner, metrics = updates[name].learner, updates[name].metrics
        assert metrics["kl_coef"] == coef
        expected = factor(metrics[name], target)
        assert learner.own == expected * coef
        factors.add(expected)
        tell_apart += expected != factor(metrics["reverse_kl" if name == "kl" else "kl"], target)
        assert updates["fixed"].learner.own == updates["fixed"].metrics["kl_coef"] == coef
    assert factors == {0.5, 1.0, 2.0} and tell_apart > 0


# --- natural gradients and trust regions ---

DAMPING, SHRINK, NUM_TRIES = 0.02, 0.7, 6
MAX_KLS = 10.0 ** np.arange(-4, 4, dtype=np.float32)
SEPARATE: Any = SeparateNetwork(ARMS)
TRUST: dict[str, Any] = {
    **{"num_envs": 4, "num_steps": 8, "gamma": GAMMA, "gae_lambda": LAMBDA, "damping": DAMPING, "num_cg_steps": 60},
    **{"num_value_epochs": 1, "num_value_minibatches": 1, "value_learning_rate": RATE},
}


class Geometry(NamedTuple):
    """What is known of an update from its experience, in double precision, and of steps by each bound."""

    natural: Any  # (F + damping I)^-1 g, [D]
    full_step: Any  # [lanes, D]
    gain: Any  # of the tries of the line search, [lanes, tries]
    kl: Any
    value_loss: Any
    critic: Any  # the critic's parameters after one step of Adam


def flat(params: Any) -> np.ndarray:
    """The policy's parameters."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves({**params, "critic": ()})])


def geometry(params: Any, x: Any, max_kl: Any) -> Geometry:
    """Nothing of `purepg.equations.trust_region` in it: scores, their mean square, and a solve."""
    (_, value), (_, next_value) = (SEPARATE.apply(params, obs) for obs in (x.obs, x.next_obs))
    advantage, target = gae(x.reward, value, next_value, x.terminated, x.truncated, GAMMA, LAMBDA)
    advantage = (advantage - advantage.mean()) / advantage.std()
    theta, unravel = ravel_pytree({**params, "critic": ()})

    def log_policy(theta):
        return jax.nn.log_softmax(SEPARATE.apply(unravel(theta) | {"critic": params["critic"]}, x.obs)[0].logits)

    log_pi, score = log_policy(theta), jax.jacobian(log_policy)(theta)  # [T, N, A], [T, N, A, D]
    chosen = jax.nn.one_hot(x.action, 2)
    g = jnp.einsum("tn,tna,tnad->d", advantage, chosen, score) / advantage.size
    fisher = jnp.einsum("tna,tnad,tnae->de", jnp.exp(log_pi), score, score) / advantage.size
    natural = jnp.linalg.solve(fisher + DAMPING * jnp.eye(len(g)), g)
    full_step = jnp.sqrt(2 * max_kl / (g @ natural))[:, None] * natural

    def attempt(step):
        new = log_policy(theta + step)
        gain = jnp.mean((jnp.exp(taken(new, x) - taken(log_pi, x)) - 1) * advantage)
        return gain, jnp.mean(jnp.sum(jnp.exp(log_pi) * (log_pi - new), axis=-1))

    tries = SHRINK ** np.arange(NUM_TRIES)[:, None] * full_step[:, None]
    gain, kl = jax.vmap(jax.vmap(attempt))(tries)

    def value_loss(critic):
        return 0.5 * jnp.mean((SEPARATE.apply(params | {"critic": critic}, x.obs)[1] - target) ** 2)

    before, gradient = jax.value_and_grad(value_loss)(params["critic"])
    critic = jax.tree.map(lambda p, g: p - RATE * g / (abs(g) + ADAM_EPS), params["critic"], gradient)
    return Geometry(natural, full_step, gain, kl, before, critic)


@pytest.fixture(scope="module")
def trust_region_updates():
    """(one update by each bound, their geometry)."""
    env = arms_env()

    def make(max_kl):
        searched: dict[str, Any] = TRUST | {"max_kl": max_kl, "shrink": SHRINK}
        return {
            "npg": npg(env, SEPARATE, NPGConfig(**TRUST, max_kl=None, learning_rate=RATE)),
            "npg by kl": npg(env, SEPARATE, NPGConfig(**TRUST, max_kl=max_kl)),
            "trpo": trpo(env, SEPARATE, TRPOConfig(**searched, num_tries=NUM_TRIES)),
            "trpo in one try": trpo(env, SEPARATE, TRPOConfig(**searched, num_tries=1)),
        }

    updates = updates_over(MAX_KLS, make)
    one = updates[0]["npg"]
    return updates, in_float64(quick_jit(geometry), one.before, one.experience[1], MAX_KLS)


def step_of(update: Update) -> np.ndarray:
    return flat(update.learner.params) - flat(update.before)


def same(a: np.ndarray, b: np.ndarray, rtol: float = 1e-3) -> None:
    """To `rtol` of the largest entry, and the rounding of parameters of order one."""
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max() + 3e-7)


def test_npg_moves_the_policy_by_the_learning_rate_times_the_damped_natural_gradient(trust_region_updates):
    updates, known = trust_region_updates
    update = updates[0]["npg"]
    same(step_of(update), RATE * known.natural)
    assert np.abs(step_of(update)).max() > 1e-2
    assert update.metrics["cg_residual"] < 1e-5


def test_npg_by_kl_moves_it_along_the_same_direction_until_the_quadratic_model_reaches_the_bound(trust_region_updates):
    updates, known = trust_region_updates
    for lane, full_step in zip(updates, known.full_step, strict=True):
        same(step_of(lane["npg by kl"]), full_step)


def test_critics_are_fitted_by_themselves_whatever_the_policy_does(trust_region_updates):
    updates, known = trust_region_updates
    for lane in updates:
        for update in lane.values():
            np.testing.assert_allclose(update.metrics["value_loss"], known.value_loss, rtol=1e-4)
            assert distance(update.learner.params["critic"], known.critic) < 1e-4
            assert distance(update.before["critic"], known.critic) > 1e-2


@pytest.mark.parametrize(("name", "num_tries"), [("trpo", NUM_TRIES), ("trpo in one try", 1)])
def test_trpo_takes_the_longest_step_that_gains_and_keeps_to_the_bound_or_none(trust_region_updates, name, num_tries):
    updates, known = trust_region_updates
    fractions = set()
    for i, (lane, max_kl) in enumerate(zip(updates, MAX_KLS, strict=True)):
        update, gain, kl = lane[name], known.gain[i][:num_tries], known.kl[i][:num_tries]
        good = (gain > 0) & (kl <= max_kl)
        k = int(np.argmax(good))
        fraction, improvement, step_kl = (SHRINK**k, gain[k], kl[k]) if good.any() else (0.0, 0.0, 0.0)
        expected = {"accepted": good.any(), "step_fraction": fraction, "surrogate_improvement": improvement}
        expected |= {"step_kl": step_kl, "kl": step_kl, "full_step_kl": kl[0]}
        for metric, x in expected.items():
            np.testing.assert_allclose(update.metrics[metric], x, rtol=1e-2, atol=1e-6, err_msg=metric)
        same(step_of(update), fraction * known.full_step[i])
        if not good.any():  # not one bit of it
            np.testing.assert_array_equal(flat(update.learner.params), flat(update.before))
        fractions.add(round(fraction, 3))
    assert fractions >= ({0.0, 1.0} if num_tries == 1 else {SHRINK, 1.0})
    # First tries fail for either reason.
    assert (known.gain[:, 0] < 0).any() and (known.kl[:, 0] > MAX_KLS).any()


def test_a_small_step_of_trpo_is_npgs(trust_region_updates):
    updates, _ = trust_region_updates
    accepted = [lane for lane in updates if lane["trpo"].metrics["step_fraction"] == 1]
    assert len(accepted) > 1
    for lane in accepted:
        assert distance(lane["trpo"].learner.params, lane["npg by kl"].learner.params) < 1e-6
    a, b = (step_of(lane) for lane in (accepted[-1]["trpo"], updates[0]["npg"]))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 1 - 1e-6


# --- whole episodes ---

REINFORCES = {
    name: (reinforce, REINFORCEConfig(**COMMON, num_episodes=5, **config))
    for name, config in {
        "none": {"baseline": "none"},
        "total return": {"baseline": "none", "weight": "total_return"},
        "sum over steps": {"baseline": "none", "mean_over_steps": False},
        "discounted states": {"baseline": "leave_one_out", "discount_states": True},
        "batch_mean": {"baseline": "batch_mean"},
        "standardised": {"baseline": "standardised"},
        "per_time_mean": {"baseline": "per_time_mean"},
        "value": {"baseline": "value"},
    }.items()
}


@pytest.fixture(scope="module")
def reinforce_updates():
    return updates_by_ending(REINFORCES)


@pytest.mark.parametrize("name", REINFORCES)
def test_a_reinforce_update_is_its_equation(reinforce_updates, name):
    for ending, updates in zip(ENDINGS, reinforce_updates, strict=True):
        update = updates[name]
        x, mask, _ = update.experience
        value, next_value = (apply(update.before, obs)[1] for obs in (x.obs, x.next_obs))
        num_steps, length = mask.sum(), mask.sum(axis=0)
        # Only a learned value looks past a time limit, and nothing past a death.
        final = next_value[length - 1, jnp.arange(5)] if ending == TRUNCATED and name == "value" else 0.0
        to_go = discounted_return(x.reward, mask, GAMMA, final)
        time = jnp.arange(len(mask))[:, None]
        mean, std = to_go[mask].mean(), to_go[mask].std()
        weight = {
            "none": to_go,
            "sum over steps": to_go,
            "total return": jnp.where(mask, GAMMA**time * x.reward, 0.0).sum(axis=0, keepdims=True),
            "discounted states": GAMMA**time * (to_go - leave_one_out_mean(to_go, mask)),
            "batch_mean": to_go - mean,
            "standardised": (to_go - mean) / std,
            "per_time_mean": to_go - per_time_mean(to_go, mask),
            "value": to_go - value,
        }[name]

        def loss(params, x=x, mask=mask, weight=weight, num_steps=num_steps, target=to_go):
            distribution, value = apply(params, x.obs)
            count = 5 if name == "sum over steps" else num_steps
            policy_loss = -jnp.sum(distribution.log_prob(x.action) * weight, where=mask) / count
            entropy = jnp.mean(distribution.entropy(), where=mask)
            terms = {"policy_loss": policy_loss}
            total = policy_loss - ENTROPY_COEF * entropy
            if name == "value":
                terms["value_loss"] = 0.5 * jnp.mean((value - target) ** 2, where=mask)
                total += VALUE_COEF * terms["value_loss"]
            return total, terms

        check_update(update, loss)
