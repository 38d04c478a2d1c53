"""Asymmetric actors and critics: entries of an observation that only the critic reads."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arms_env, quick_jit

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.sac import SACConfig, sac
from purepg.envs.contract import check_environment
from purepg.networks.actor_critic import (
    ActorCritic,
    ActorQ,
    ActorQConfig,
    NetworkConfig,
    Policy,
    PolicyHead,
    actor_critic,
    actor_q,
)
from purepg.networks.torsos import Torso
from purepg.types import Box, Discrete, Env, LegalActions, UsageError

REAL = Box(-np.ones(2, np.float32), np.ones(2, np.float32))
MAP = Box(np.zeros((6, 6, 2), bool), np.ones((6, 6, 2), bool), bool)
SPACE: Any = {"map": MAP, "mood": Discrete(3), "seen": REAL, "truth": REAL}
RNG = np.random.default_rng(0)
OBS: Any = {
    "map": RNG.random((4, 5, 6, 6, 2)) < 0.5,
    "mood": RNG.integers(0, 3, (4, 5)),
    "seen": RNG.normal(size=(4, 5, 2)).astype(np.float32),
    "truth": RNG.normal(size=(4, 5, 2)).astype(np.float32),
}
OTHER = OBS | {"truth": OBS["truth"] + 1, "mood": (OBS["mood"] + 1) % 3}
SMALL: dict[str, Any] = {"hidden": (8,), "policy_scale": 1.0}
KINDS = {"categorical": Discrete(4), "gaussian": REAL, "tanh_gaussian": REAL, "deterministic": REAL}


def asymmetric_env(action_space: Any = None) -> Env:
    """The toy, with what it observes as "seen" and the episode's id as "truth"."""
    toy = arms_env(action_space)

    def see(state, obs):
        return {"seen": obs, "truth": jnp.stack([1.0 * state.id, 1.0 * state.t]), "mood": state.id % 3}

    def reset(key):
        state, obs = toy.reset(key)
        return state, see(state, obs)

    def step(key, state, action):
        state, time_step = toy.step(key, state, action)
        return state, time_step._replace(obs=see(state, time_step.obs))

    space = {"seen": toy.observation_space, "truth": toy.observation_space, "mood": Discrete(3)}
    return toy._replace(reset=reset, step=step, observation_space=space, privileged=("truth", "mood"))


def of_space(action_space: Any) -> Env:
    return arms_env(action_space)._replace(observation_space=SPACE, privileged=("truth", "mood"))


@pytest.mark.parametrize("torso", ["mlp", "cnn", "simba"])
def test_the_policy_does_not_see_what_is_privileged_and_v_does(torso):
    """By values, and by gradients, which are 0 to the last bit."""
    network: Any = actor_critic(of_space(Discrete(4)), NetworkConfig(torso=torso, **SMALL))

    @quick_jit
    def run(key):
        params = network.init(key, OBS)

        def outputs(truth, obs=OBS):
            policy, value = network.apply(params, obs | {"truth": truth})
            return policy.logits, value

        slopes = [jax.grad(lambda x, i=i: jnp.sum(outputs(x)[i] ** 2))(OBS["truth"]) for i in (0, 1)]
        seen = jax.grad(lambda x: jnp.sum(network.apply(params, OBS | {"seen": x})[0].logits ** 2))(OBS["seen"])
        return outputs(OBS["truth"]), outputs(OTHER["truth"], OTHER), slopes, seen

    (logits, value), (same, other), (of_policy, of_value), of_seen = run(jax.random.key(0))
    np.testing.assert_array_equal(logits, same)
    assert not np.any(of_policy) and np.abs(of_seen).min() > 0
    assert (np.abs(value - other) > 1e-4).all() and np.abs(of_value).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_does_not_see_what_is_privileged_and_q_does(kind):
    network = actor_q(of_space(KINDS[kind]), ActorQConfig(kind, **SMALL))
    action = jnp.zeros((4, 5), jnp.int32) if kind == "categorical" else jnp.zeros((4, 5, 2))

    @quick_jit
    def run(key):
        params = network.init(key, OBS)
        both = [(network.apply(params, obs)[0], network.q(params, obs, action)) for obs in (OBS, OTHER)]

        def policy(truth):
            return network.apply(params, OBS | {"truth": truth})[0]

        return both, jax.grad(lambda x: sum(jnp.sum(y**2) for y in jax.tree.leaves(policy(x))))(OBS["truth"])

    [(policy, q), (same, other)], slope = run(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, policy, same)
    assert not np.any(slope) and (np.abs(q - other) > 1e-5).mean() > 0.9


def test_the_policys_parameters_are_those_of_an_environment_without_the_privileged_entries():
    env = of_space(Discrete(4))
    visible = env._replace(observation_space={"map": MAP, "seen": REAL}, privileged=())
    seen = {name: OBS[name] for name in ("map", "seen")}
    config = NetworkConfig(**SMALL)
    asymmetric: Any = quick_jit(actor_critic(env, config).init)(jax.random.key(0), OBS)["params"]
    symmetric: Any = quick_jit(actor_critic(visible, config).init)(jax.random.key(0), seen)["params"]
    for part in ("policy_torso", "policy_head"):
        jax.tree.map(np.testing.assert_array_equal, asymmetric[part], symmetric[part])
    assert asymmetric["value_torso"]["hidden_0"]["kernel"].shape == (72 + 2 + 2 + 3, 8)


@pytest.mark.parametrize(
    ("algorithm", "config", "network"),
    [
        (ppo, PPOConfig(num_envs=2, num_steps=4, num_epochs=1, num_minibatches=1, normalize_obs=True), None),
        (
            sac,
            SACConfig(num_envs=2, num_steps=4, batch_size=4, capacity=8, warmup_steps=2, normalize_obs=True),
            ActorQConfig("tanh_gaussian", hidden=(8,)),
        ),
    ],
)
def test_algorithms_train_a_policy_that_does_not_see_what_its_critic_does(algorithm, config, network):
    env = asymmetric_env(REAL._replace(low=REAL.low[:1], high=REAL.high[:1]))
    made = actor_q(env, network) if network else actor_critic(env, NetworkConfig(hidden=(8,)))
    algorithm = algorithm(env, made, config)

    @quick_jit
    def run(key):
        before = algorithm.init(key)
        after, _ = algorithm.step(key, before, jnp.int32(0))
        actor = algorithm.policy(after, True)
        obs = jax.tree.map(lambda x: x[:1], after.world.envs.obs)
        actions = [actor(key, (), x)[1] for x in (obs, obs | {"truth": 0 * obs["truth"]})]
        return before.learner.params, after.learner.params, *actions

    before, after, action, same = run(jax.random.key(0))
    np.testing.assert_array_equal(action, same)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)) and bool(np.isfinite(y).all()), before, after)
    assert all(jax.tree.leaves(changed))


def test_a_torso_that_policy_and_critic_share_is_refused_in_one_line():
    env, message = asymmetric_env(), "shared (True) must be off: only the critic may read the privileged truth, mood"
    torso = partial(Torso, env.observation_space, NetworkConfig())
    own = ActorCritic(torso, partial(PolicyHead, env.action_space), shared=True, privileged=env.privileged)
    for make in (
        lambda: actor_critic(env, NetworkConfig(shared=True)),
        lambda: ppo(env, own, PPOConfig()),
    ):
        with pytest.raises(UsageError) as error:
            make()
        assert str(error.value) == message


def test_a_composed_policy_that_would_see_what_is_privileged_is_refused():
    env = asymmetric_env()
    network: Any = actor_critic(env, NetworkConfig())
    says = "toy's privileged observations are truth, mood: give ActorCritic the same, as privileged"
    with pytest.raises(UsageError, match=f"^{says}$"):
        ppo(env, network.clone(privileged=()), PPOConfig())
    critics = actor_q(env, ActorQConfig("categorical"))
    policy: Any = critics.policy
    assert isinstance(policy, Policy)
    blind: Any = ActorQ(policy.clone(privileged=("truth",)), critics.critic, env.action_space, 2)
    with pytest.raises(UsageError, match=r"^toy's privileged observations are truth, mood: give Policy the same"):
        q_actor_critic(env, blind, QActorCriticConfig())
    with pytest.raises(UsageError, match=r"^toy's privileged observations are none: give ActorCritic the same"):
        ppo(env._replace(privileged=()), network, PPOConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"privileged": ("truth", "lies")},
            "toy: privileged ('lies') must be an entry of its observation, which has seen, truth, mood",
        ),
        (
            {"privileged": ("seen", "truth", "mood")},
            "toy: privileged ('seen', 'truth', 'mood') must leave an entry for the policy to read",
        ),
    ],
)
def test_privileged_names_must_be_some_of_the_observations_entries(changes, message):
    check_environment(asymmetric_env())
    with pytest.raises(UsageError) as error:
        check_environment(asymmetric_env()._replace(**changes))
    assert str(error.value) == message


def test_an_observation_without_names_has_nothing_privileged():
    with pytest.raises(
        UsageError, match=r"^toy: privileged \('x'\) must be an entry of its observation, which has no na"
    ):
        check_environment(arms_env()._replace(privileged=("x",)))


def test_the_legal_actions_cannot_be_privileged():
    env = asymmetric_env()
    masked = env.observation_space | {"mood": {"legal": LegalActions(2)}}

    def reset(key):
        state, obs = env.reset(key)
        return state, obs | {"mood": {"legal": jnp.ones(2, bool)}}

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        return state, time_step._replace(obs=time_step.obs | {"mood": {"legal": jnp.ones(2, bool)}})

    with pytest.raises(
        UsageError, match=r"^toy: privileged \('mood'\) must not hold the legal actions, which a policy"
    ):
        check_environment(env._replace(observation_space=masked, reset=reset, step=step))
