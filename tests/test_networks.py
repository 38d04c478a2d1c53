"""Policies and critics in one network: which half of the parameters each method reads, and what the heads start as."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arms_env, quick_jit

from purepg.equations.distributions import Categorical, Deterministic, DiagGaussian, TanhGaussian, executed
from purepg.networks.actor_critic import (
    ActorCritic,
    ActorQ,
    ActorQConfig,
    Critic,
    NetworkConfig,
    Policy,
    PolicyHead,
    ValueHead,
    actor_critic,
    actor_q,
)
from purepg.types import Box, Discrete, UsageError

K, SMALL = 3, (8, 8)
REAL = Box(-np.ones(2, np.float32), np.ones(2, np.float32))
UNBOUNDED = Box(np.full(2, -np.inf, np.float32), np.full(2, np.inf, np.float32))
ARMS = Discrete(4)
KINDS: dict[str, tuple[Any, Any]] = {
    "categorical": (Categorical, ARMS),
    "gaussian": (DiagGaussian, UNBOUNDED),
    "tanh_gaussian": (TanhGaussian, REAL),
    "deterministic": (Deterministic, REAL),
}
OBS = 3 * jax.random.normal(jax.random.key(7), (5, 6, 2))


def network_of(kind: str, space: Any = None, **config: Any) -> Any:
    space = space or KINDS[kind][1]
    return actor_q(arms_env(space), ActorQConfig(**{"policy": kind, "hidden": SMALL, "num_critics": K} | config))


def init(network: Any, seed: int = 0) -> Any:
    return quick_jit(network.init)(jax.random.key(seed), OBS[0])


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """(kind, network, parameters, actions of its policy)."""
    network = network_of(request.param)
    params = init(network)
    policy = network.apply({"policy": params["policy"]}, OBS)[0]
    return request.param, network, params, executed(policy.sample(jax.random.key(1)))


def test_a_policys_distribution_is_of_the_kind_that_was_asked_for_and_has_the_observations_batch_axes(made):
    kind, network, params, action = made
    distribution, value = network.apply(params, OBS)
    assert type(distribution) is KINDS[kind][0] and value is None
    assert action.shape == (5, 6) + ((2,) if kind != "categorical" else ())


def test_apply_reads_the_policys_half_of_the_parameters_and_q_the_critics(made):
    """Each gives the same with the other's half missing, so that a target may be of the critics alone."""
    kind, network, params, action = made
    policy, critic = {"policy": params["policy"]}, {"critic": params["critic"]}
    jax.tree.map(np.testing.assert_array_equal, network.apply(policy, OBS)[0], network.apply(params, OBS)[0])
    np.testing.assert_array_equal(network.q(critic, OBS, action), network.q(params, OBS, action))
    if kind == "categorical":
        np.testing.assert_array_equal(network.q_of_all(critic, OBS), network.q_of_all(params, OBS))
    with pytest.raises(KeyError):
        network.apply(critic, OBS)
    with pytest.raises(KeyError):
        network.q(policy, OBS, action)


def test_critics_in_one_batch_are_the_critics_one_by_one(made):
    _, network, params, action = made
    together = network.q(params, OBS, action)
    assert together.shape == (K, 5, 6)
    alone = network._replace(num_critics=1)
    for k in range(K):
        own = {"critic": jax.tree.map(lambda x, k=k: x[k : k + 1], params["critic"])}
        q = alone.q(own, OBS, action)
        assert q.shape == (1, 5, 6)
        np.testing.assert_allclose(q[0], together[k], rtol=1e-5, atol=1e-6)


def test_critics_start_from_parameters_of_their_own(made):
    """Or the least of them would be no less than any."""
    _, network, params, action = made
    for leaf in jax.tree.leaves(params["critic"]):
        assert leaf.shape[0] == K
        if np.any(leaf):  # biases start at zero
            assert len(np.unique(leaf.reshape(K, -1), axis=0)) == K
    q = np.asarray(network.q(params, OBS, action)).reshape(K, -1)
    assert (np.abs(np.corrcoef(q) - np.eye(K)) < 0.99).all()


def test_q_of_a_discrete_action_is_its_entry_of_q_of_all():
    network = network_of("categorical")
    params, action = init(network), jax.random.randint(jax.random.key(2), (5, 6), 0, 4)
    of_all, q = np.asarray(network.q_of_all(params, OBS)), np.asarray(network.q(params, OBS, action))
    assert of_all.shape == (K, 5, 6, 4)
    for k, i, j in np.ndindex(K, 5, 6):
        np.testing.assert_allclose(q[k, i, j], of_all[k, i, j, action[i, j]], rtol=1e-6)


def test_q_of_a_continuous_action_depends_on_each_of_its_entries():
    network = network_of("tanh_gaussian")
    params = init(network)
    gradient = jax.grad(lambda action: network.q(params, OBS, action).sum())(jnp.zeros((5, 6, 2)))
    assert (np.abs(gradient) > 0).mean() > 0.9


@pytest.mark.parametrize("std", [0.01, 0.3, 1.0, 6.0])
def test_a_tanh_gaussian_policy_starts_with_the_deviation_that_was_asked_for_and_centred(std):
    network = network_of("tanh_gaussian", initial_std=std)
    policy, _ = network.apply(init(network), OBS)
    np.testing.assert_allclose(np.exp(policy.log_std), std, rtol=0.12)
    np.testing.assert_allclose(policy.mean, 0, atol=0.1)


def test_a_tanh_gaussian_policys_deviation_depends_on_the_state_and_has_a_gradient_all_over_its_range():
    """And spread over it as far as from nearly its one end to nearly the other."""
    network = network_of("tanh_gaussian", policy_scale=0.5)
    params = init(network)

    def log_std_of(bias):
        policy = params["policy"]["params"]
        policy = policy | {"log_std": policy["log_std"] | {"bias": jnp.full(2, bias)}}
        return network.apply({"policy": {"params": policy}}, OBS)[0].log_std

    bias = jnp.array([-2.0, 0.0, 2.0])
    log_std, slope = quick_jit(jax.vmap(lambda bias: jax.jvp(log_std_of, (bias,), (1.0,))))(bias)
    assert (log_std > -5).all() and (log_std < 2).all() and (slope > 0).all()
    assert (log_std < -4.5).any() and (log_std > 1.5).any() and log_std[1].std() > 0.1


def test_a_gaussian_policys_deviation_is_the_same_in_every_state_and_starts_as_asked_for():
    network = network_of("gaussian", initial_std=0.5)
    np.testing.assert_allclose(network.apply(init(network), OBS)[0].log_std, np.log(0.5), rtol=1e-6)


def test_a_deterministic_policy_is_held_within_bounds_where_there_are_some():
    bounded, unbounded = (network_of("deterministic", space, policy_scale=50.0) for space in (REAL, UNBOUNDED))
    params = init(bounded)
    action, free = (network.apply(params, OBS)[0].mode() for network in (bounded, unbounded))
    np.testing.assert_allclose(action, np.tanh(free), rtol=1e-5)
    assert np.abs(free).max() > 2 and np.abs(action).max() <= 1


# --- a user's own parts ---


class Residual(nn.Module):
    """A torso of observations, or of those and an action."""

    width: int

    @nn.compact
    def __call__(self, obs, action=None):
        x = nn.Dense(self.width)(obs if action is None else jnp.concatenate([obs, action], axis=-1))
        return nn.relu(x + nn.Dense(self.width)(nn.relu(nn.LayerNorm()(x))))


class TwoLayers(nn.Module):
    """A value head."""

    features: int

    @nn.compact
    def __call__(self, x):
        return ValueHead(self.features)(nn.tanh(nn.Dense(5)(x)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("space", "kind"), [(ARMS, Categorical), (REAL, DiagGaussian)])
def test_an_own_torso_and_value_head_compose_with_a_policy_head(space, kind, shared):
    network: Any = ActorCritic(partial(Residual, 7), partial(PolicyHead, space), TwoLayers, shared)
    params = init(network)
    distribution, value = quick_jit(network.apply)(params, OBS)
    assert type(distribution) is kind and distribution.mode().shape[:2] == value.shape == (5, 6)
    torsos = {"policy_torso"} | ({"value_torso"} if not shared else set())
    assert set(params["params"]) == {*torsos, "policy_head", "value"}
    gradient = quick_jit(jax.grad(lambda params: network.apply(params, OBS)[1].sum()))(params)["params"]
    assert any(np.any(x) for x in jax.tree.leaves(gradient["policy_torso"])) == shared


@pytest.mark.parametrize("kind", KINDS)
def test_an_own_torso_serves_a_policy_and_its_critics(kind):
    distribution, space = KINDS[kind]
    torso = partial(Residual, 7)
    policy = Policy(torso, partial(PolicyHead, space, kind))
    network = ActorQ(policy, Critic(torso, space, TwoLayers), space, num_critics=K)
    params = init(network)
    found, none = quick_jit(network.apply)(params, OBS)
    assert type(found) is distribution and none is None
    assert quick_jit(network.q)(params, OBS, executed(found.mode())).shape == (K, 5, 6)
    assert set(params["policy"]["params"]) == set(params["critic"]["params"]) ^ {"q", "head"} == {"torso", "head"}


def test_a_head_of_the_same_kind_starts_as_the_package_s_own():
    """With the deviation that was asked for, centred, and bounded where the actions are."""
    for kind in ("tanh_gaussian", "deterministic", "gaussian"):
        head: Any = PolicyHead(REAL, kind, initial_std=0.3)
        x = jnp.tanh(OBS)  # features, as a torso gives them
        found = head.apply(head.init(jax.random.key(0), x), x)
        np.testing.assert_allclose(found.mode(), 0, atol=0.1)
        if kind != "deterministic":
            np.testing.assert_allclose(np.exp(found.log_std), 0.3, rtol=0.15)


@pytest.mark.parametrize(("space", "kind"), [(ARMS, "tanh_gaussian"), (ARMS, "gaussian"), (REAL, "categorical")])
def test_a_policy_head_refuses_a_kind_that_its_actions_do_not_take(space, kind):
    with pytest.raises(UsageError, match=rf"^policy \({kind}\) does not fit (Discrete|Box)"):
        PolicyHead(space, kind).init(jax.random.key(0), OBS)


@pytest.mark.parametrize(("space", "std", "why"), [(UNBOUNDED, 1.0, "bounded actions"), (REAL, 8.0, "below 7.4")])
def test_a_tanh_gaussian_head_refuses_what_actor_q_refuses(space, std, why):
    with pytest.raises(UsageError, match=why):
        PolicyHead(space, "tanh_gaussian", initial_std=std).init(jax.random.key(0), OBS)


def test_parameters_keep_the_names_that_checkpoints_have():
    def names(params):
        return sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves(params))

    leaves = jax.tree_util.tree_leaves_with_path
    hidden = ["hidden_0/bias", "hidden_0/kernel"]
    found = names(init(actor_critic(arms_env(REAL), NetworkConfig(hidden=(8,)))))
    heads = ["policy_head/log_std", "policy_head/mean/bias", "policy_head/mean/kernel", "value/bias", "value/kernel"]
    torsos = [f"{torso}/{name}" for torso in ("policy_torso", "value_torso") for name in hidden]
    assert found == sorted(f"params/{name}" for name in (*torsos, *heads))
    found = names(init(network_of("tanh_gaussian", hidden=(8,))))
    policy = ["log_std/bias", "log_std/kernel", "mean/bias", "mean/kernel", *(f"torso/{name}" for name in hidden)]
    critic = ["q/bias", "q/kernel", *(f"torso/{name}" for name in hidden)]
    own = (*(f"policy/params/{name}" for name in policy), *(f"critic/params/{name}" for name in critic))
    assert found == sorted(own)
    found = names(init(network_of("gaussian", hidden=(8,)))["policy"])
    assert found == sorted(
        f"params/{name}"
        for name in ("head/log_std", "head/mean/bias", "head/mean/kernel", *(f"torso/{name}" for name in hidden))
    )


# --- bad input ---


@pytest.mark.parametrize(
    ("space", "config", "message"),
    [
        *(
            (space, {"policy": policy}, f"policy ({policy}) does not fit toy, whose {kind} actions take {takes}")
            for space, policy, kind, takes in (
                (ARMS, "tanh_gaussian", "discrete", "categorical, with sac_discrete or q_actor_critic"),
                (ARMS, "deterministic", "discrete", "categorical, with sac_discrete or q_actor_critic"),
                (
                    REAL,
                    "categorical",
                    "continuous",
                    "gaussian or tanh_gaussian, with sac or q_actor_critic, or deterministic, with dpg, ddpg or td3",
                ),
                (
                    UNBOUNDED,
                    "categorical",
                    "continuous",
                    "gaussian, with sac or q_actor_critic, or deterministic, with dpg, ddpg or td3",
                ),
            )
        ),
        (
            UNBOUNDED,
            {"policy": "tanh_gaussian"},
            "policy (tanh_gaussian) needs bounded actions, but those of toy are unbounded: try gaussian",
        ),
        (REAL, {"initial_std": 0.005}, "initial_std (0.005) must be above 0.0067 and below 7.4"),
        (REAL, {"initial_std": 8.0}, "initial_std (8.0) must be above 0.0067 and below 7.4"),
        (REAL, {"initial_std": -1.0}, "initial_std (-1.0) must be above 0"),
        (REAL, {"num_critics": 0}, "num_critics (0) must be at least 1"),
        (REAL, {"hidden": ()}, "hidden (none) must hold at least one width"),
    ],
)
def test_a_network_that_fits_no_space_or_has_a_number_out_of_range_is_refused(space, config, message):
    with pytest.raises(UsageError) as error:
        actor_q(arms_env(space), ActorQConfig(**config))
    assert str(error.value) == message


def test_a_gaussian_policy_may_start_as_wide_as_it_likes():
    assert actor_q(arms_env(REAL), ActorQConfig(policy="gaussian", initial_std=20.0))
