"""Policies with memory: what they scored is what they score again, an episode's memory ends with it, and they learn
what cannot be learned without."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import diary_env, equations, quick_jit
from jax.flatten_util import ravel_pytree
from test_outside import N as NUM_OUTSIDE
from test_outside import T as STEPS_OUTSIDE
from test_outside import diary, recorder

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.on_policy import collect
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.equations.trust_region import fisher_vector_product
from purepg.experience.rollout import reset_all, rollout
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.optimize import init_train_state, minibatch_epochs, step_direction
from purepg.runtime import compiling_for
from purepg.train import evaluate, train
from purepg.types import Actor, Box, Discrete, Env, TimeStep, UsageError, Window, first_seen

T, N = 42, 5
CELLS = ["gru", "lstm", "lru", "stack", "transformer"]
ENV = diary_env()  # its episodes have 1 to 4 steps: several in every window, which end in both ways


def network_of(kind: str | None, shared: bool = False, env: Env = ENV) -> Any:
    memory: Any = kind
    size = 4 if kind else None
    return actor_critic(
        env, NetworkConfig(hidden=(8,), shared=shared, policy_scale=1.0, memory=memory, memory_size=size)
    )


class Played(NamedTuple):
    network: Any
    params: Any
    data: Any


@pytest.fixture(scope="module", params=CELLS)
def played(request):
    """A rollout of a policy with this memory, with parameters far from their first ones."""
    network = network_of(request.param, shared=request.param == "lstm")
    config = PPOConfig(num_envs=N, num_steps=T, num_minibatches=1, normalize_obs=True)
    algorithm = ppo(ENV, network, config)

    @quick_jit
    def run(key):
        state = algorithm.init(key)
        draws = jax.tree.map(lambda x: 0.3 * jax.random.normal(key, x.shape), state.learner.params)
        params = jax.tree.map(jnp.add, state.learner.params, draws)
        train_state = state.learner.train_state._replace(params=params)
        _, state, _ = collect(key, ENV, network, config, state)  # so that the next one begins within episodes
        state = state._replace(learner=state.learner._replace(train_state=train_state))
        return params, collect(jax.random.fold_in(key, 1), ENV, network, config, state)[0]

    params, data = run(jax.random.key(0))
    return Played(network, params, jax.tree.map(np.asarray, data))


@pytest.mark.parametrize("length", [1, 7, T])
def test_windows_of_any_length_score_the_rollout_as_the_policy_did_that_made_it(played, length):
    network, params, data = played
    ended = data.terminated | data.truncated
    assert ended[:-1].reshape(-1).sum() > T and data.terminated.any() and data.truncated.any()

    windows = jax.tree.map(lambda x: x.reshape(T // length, length, *x.shape[1:]), (data.obs, data.action))
    log_prob = quick_jit(jax.vmap(lambda obs, action: network.apply(params, obs)[0].log_prob(action)))(*windows)
    ratio = np.exp(np.reshape(log_prob, (T, N)) - data.log_prob)
    np.testing.assert_allclose(ratio, 1.0, rtol=0, atol=1e-6)
    assert np.ptp(data.log_prob) > 0.01


def test_an_observation_changes_its_own_episode_from_there_on_and_no_other(played):
    network, params, data = played
    ended = data.terminated | data.truncated
    t = next(t for t in range(10, T) if not ended[t, 0] and ended[t + 1, 0])  # two steps of the episode are left
    seen = data.obs.obs.copy()
    seen[t, 0] += 1
    apply = quick_jit(network.apply)
    differs = apply(params, data.obs._replace(obs=seen))[1] != apply(params, data.obs)[1]
    assert differs[t, 0] and differs[t + 1, 0]
    assert differs.sum() == 2


def test_the_next_value_is_that_of_the_observation_after_with_the_memory_of_the_same_episode(played):
    network, params, data = played
    ended = data.terminated | data.truncated
    within = ~ended[:-1]
    np.testing.assert_allclose(data.next_value[:-1][within], data.value[1:][within], rtol=1e-5, atol=1e-6)
    last = next(t for t in range(10, T) if ended[t, 0])
    first = max(t for t in range(last) if ended[t, 0]) + 1  # an episode within the rollout, and what it reached

    seen, after = np.asarray(data.obs.obs), np.asarray(data.next_obs.obs)
    obs = np.concatenate([seen[first : last + 1, :1], after[last : last + 1, :1]])
    starts = np.arange(len(obs))[:, None] == 0
    memory = jax.tree.map(lambda x: np.zeros((len(obs), 1, *x.shape[2:]), x.dtype), data.obs.memory)
    whole = quick_jit(network.apply)(params, Window(obs, starts, memory))[1]
    np.testing.assert_allclose(whole[-1, 0], data.next_value[last, 0], rtol=1e-5, atol=1e-6)


def test_minibatches_are_windows_of_successive_steps_and_an_epoch_holds_each_once():
    L, minibatches = 7, 5
    t, n = jnp.broadcast_to(jnp.arange(T)[:, None], (T, N)), jnp.broadcast_to(jnp.arange(N), (T, N))

    def loss(params, batch):
        t, n = batch
        assert t.shape == (L, T * N // L // minibatches)
        whole = jnp.all(t == t[0] + jnp.arange(L)[:, None]) & jnp.all(n == n[0]) & jnp.all(t[0] % L == 0)
        return jnp.sum(params[t, n]), {"whole": whole.astype(jnp.float32)}

    tx = step_direction("sgd", None)
    state, metrics = quick_jit(
        lambda key: minibatch_epochs(
            key, loss, tx, 1.0, init_train_state(tx, jnp.zeros((T, N))), (t, n), 3, minibatches, window=L
        )
    )(jax.random.key(0))
    assert metrics["whole"] == 1.0
    np.testing.assert_array_equal(state.params, -3.0)


# --- in the form for a GPU ---


@pytest.mark.parametrize(("kind", "products"), [("gru", 6), ("lstm", 2)])
def test_in_a_gpus_form_a_loop_has_one_product_and_values_gradients_and_fisher_products_are_the_same(kind, products):
    """In float64, of windows with episodes that end within them, and from a memory that is not 0."""
    L, network = 12, network_of(kind)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        obs, starts = jnp.asarray(rng.normal(size=(L, N, 2))), jnp.asarray(rng.random((L, N)) < 0.3)
        shapes = jax.eval_shape(network.init, jax.random.key(0), first_seen(network, obs[0, 0]))
        params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
        memory = jax.tree.map(lambda x: rng.normal(size=(1, *x.shape)), network.memory(N))
        vector = jnp.asarray(rng.normal(size=ravel_pytree(params)[0].shape))

        def applied(params, memory):
            return network.apply(params, Window(obs, starts, memory))

        def found(params, memory):
            def loss(params, memory):
                policy, value = applied(params, memory)
                return jnp.sum(jnp.sin(policy.logits)) + jnp.sum(jnp.square(value))

            old = applied(params, memory)[0]
            product = fisher_vector_product(lambda new: old.kl(applied(new, memory)[0]).mean(), params, 0.1)
            return jax.value_and_grad(loss, argnums=(0, 1))(params, memory), product(vector)

        forms, in_loops = [], []
        for platform in ("cpu", "gpu"):
            with compiling_for(platform):
                forms.append(quick_jit(lambda *of: found(*of))(params, memory))
                loops = [e for e in equations(lambda *of: applied(*of), params, memory) if e.primitive.name == "scan"]
                in_loops.append([str(loop.params["jaxpr"]).count("dot_general") for loop in loops])
        assert in_loops == [[products] * 2, [1] * 2]  # of the policy's memory and of the critic's
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *forms)


def test_parameters_start_the_same_in_both_forms():
    network, forms = network_of("gru"), []
    window = Window(jnp.ones((3, 1, 2)), jnp.zeros((3, 1), bool), jax.tree.map(lambda x: x[None], network.memory(1)))
    for platform in ("cpu", "gpu"):
        with compiling_for(platform):
            forms.append(network.init(jax.random.key(0), window))
    jax.tree.map(np.testing.assert_array_equal, *forms)


# --- outside of JAX ---


def test_a_recording_holds_the_memories_of_the_rollout_of_its_twin_in_jax():
    """A policy that counts its episode's steps, and acts by the count."""

    def act(noise, memory, obs):
        count = memory["count"] + 1
        return {"count": count}, (count + obs[..., 0]) % 2, -1.0 * count

    counts = Actor(lambda key, obs: (), act, lambda num: {"count": jnp.zeros(num, jnp.int32)})

    def run(key):
        world = reset_all(jax.random.key(8), ENV, NUM_OUTSIDE, counts.memory)
        return rollout(key, ENV, counts, world, 3 * STEPS_OUTSIDE)[1]

    trajectory = jax.tree.map(np.asarray, quick_jit(run)(jax.random.key(9)))
    obs = trajectory.obs.obs
    ids = [obs[obs[:, i, 1] == 0, i, 0] for i in range(NUM_OUTSIDE)]
    for next_step in (False, True):
        rec = recorder(diary(ids=ids, next_step=next_step), (), NUM_OUTSIDE)
        memory: Any = {"count": np.zeros(NUM_OUTSIDE, np.int32)}

        def chosen(t, obs, starts):
            nonlocal memory
            before = {"count": np.where(starts, 0, memory["count"])}
            memory, action, log_prob = act((), before, obs)
            return action, np.float32(log_prob), (before, memory), action

        found = rec.record(chosen).trajectory
        expected = jax.tree.map(lambda x: x[:STEPS_OUTSIDE], trajectory)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- learning ---


def recall_env(discrete: bool = True) -> Env:
    """Shows a bit, then nothing for two steps; the last action is paid 1 if it is the bit, or, where actions are
    numbers in [-1, 1], by its share of the bit's sign."""

    def observe(state):
        bit, t = state
        return jnp.stack([jnp.where(t == 0, 2.0 * bit - 1.0, 0.0), 1.0 * (t == 2)])

    def reset(key):
        state = jax.random.bernoulli(key).astype(jnp.int32), jnp.int32(0)
        return state, observe(state)

    def step(key, state, action):
        del key
        bit, t = state
        after = bit, t + 1
        paid = 1.0 * (action == bit) if discrete else (2.0 * bit - 1.0) * action[0]
        reward = jnp.where(t == 2, paid, 0.0)
        return after, TimeStep(observe(after), reward, t == 2, jnp.bool_(False))

    box = Box(np.full(2, -1, np.float32), np.ones(2, np.float32))
    one = np.ones(1, np.float32)
    return Env(reset, step, box, Discrete(2) if discrete else Box(-one, one), 3, "recall")


ROLLOUT: Any = {"num_envs": 16, "num_steps": 12}
GROUPS = GRPOConfig(num_prompts=16, group_size=4, learning_rate=1e-2, num_minibatches=1)
LEARNERS = {
    "a2c": (a2c, A2CConfig(**ROLLOUT, learning_rate=1e-2), "lstm"),
    "ppo": (ppo, PPOConfig(**ROLLOUT, learning_rate=1e-2, window=6), "lru"),
    "ppo_penalty": (ppo_penalty, PPOPenaltyConfig(**ROLLOUT, learning_rate=1e-2), "stack"),
    "trpo": (trpo, TRPOConfig(**ROLLOUT, max_kl=0.02), "gru"),
    "npg": (npg, NPGConfig(**ROLLOUT, max_kl=0.02), "gru"),
    "off_policy_pg": (off_policy_pg, OffPolicyPGConfig(**ROLLOUT, learning_rate=1e-2), "gru"),
    "reinforce": (reinforce, REINFORCEConfig(num_episodes=64, learning_rate=1e-2), "gru"),
    "grpo": (grpo, GROUPS, "lru"),
    "grpo_transformer": (grpo, GROUPS, "transformer"),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_algorithm_that_can_have_memory_learns_to_recall_a_bit(name):
    """Without memory no policy is right more often than a coin."""
    algorithm, config, kind = LEARNERS[name]
    env = recall_env()
    made = algorithm(env, network_of(kind, env=env), config)

    @quick_jit
    def run(key):
        state, _ = train(key, made, made.init(key), 0, 100)
        return evaluate(key, env, made.policy(state, True), 200, 3).episode_return.mean()

    assert run(jax.random.key(0)) > 0.95


def test_a_window_that_does_not_fit_the_rollout_is_refused():
    network = network_of("gru")
    with pytest.raises(UsageError, match=r"num_steps \(32\) must be divisible by window \(5\)"):
        ppo(ENV, network, PPOConfig(num_steps=32, window=5))
    with pytest.raises(UsageError, match=r"num_envs \* num_steps / window \(2\) must be divisible by num_minibatches"):
        ppo(ENV, network, PPOConfig(num_envs=2, num_steps=32))
    with pytest.raises(UsageError, match=r"; window is num_steps \(32\) where the network has memory, unless"):
        ppo(ENV, network, PPOConfig(num_envs=2, num_steps=32))
