"""One gradient step of each algorithm with a Q, held to the equations of its docstring: on a batch made by hand, or,
where it has no replay, on the rollout that it saw. The equations are written in numpy; gradients are jax's."""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ENDINGS, TinyQNetwork, arms_env, quick_jit

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.equations.distributions import Categorical, DiagGaussian, TanhGaussian, executed
from purepg.experience.rollout import rollout
from purepg.optimize import TrainState, with_params
from purepg.types import Box, Discrete, Mean, Transition

ARMS, REAL = Discrete(2), Box(-np.ones(1, np.float32), np.ones(1, np.float32))
UNBOUNDED = Box(np.full(1, -np.inf, np.float32), np.full(1, np.inf, np.float32))
B, GAMMA, TAU, ALPHA, RATE, CRITIC_RATE, ALPHA_RATE = 32, 0.8, 0.3, 0.4, 0.5, 0.2, 0.7
NOISE_STD, NOISE_CLIP, DELAY = 0.5, 0.4, 3
PLAIN: dict[str, Any] = {
    **{"optimizer": "sgd", "gamma": GAMMA, "policy_learning_rate": RATE, "critic_learning_rate": CRITIC_RATE}
}
REPLAY: dict[str, Any] = PLAIN | {"tau": TAU}
SOFT: dict[str, Any] = REPLAY | {"temperature": ALPHA, "temperature_learning_rate": ALPHA_RATE}
DELAYED: dict[str, Any] = REPLAY | {
    **{"target_noise_std": NOISE_STD, "target_noise_clip": NOISE_CLIP, "policy_delay": DELAY}
}
VARIANTS = {
    "ddpg": (ddpg, DDPGConfig(**REPLAY), REAL),
    "td3": (td3, TD3Config(**DELAYED), REAL),
    "td3, unbounded": (td3, TD3Config(**DELAYED), UNBOUNDED),
    "sac": (sac, SACConfig(**SOFT), REAL),
    "sac gaussian": (sac, SACConfig(**SOFT, target_entropy=0.7), UNBOUNDED),
    "sac fixed": (sac, SACConfig(**SOFT, learn_temperature=False), REAL),
    "sac discrete": (sac_discrete, DiscreteSACConfig(**SOFT, target_entropy=0.3), ARMS),
    "sac discrete fixed": (sac_discrete, DiscreteSACConfig(**SOFT, learn_temperature=False), ARMS),
}


def network_of(name: str) -> TinyQNetwork:
    kinds: Any = {"sac gaussian": "gaussian", "sac discrete": "categorical", "sac discrete fixed": "categorical"}
    return TinyQNetwork(kinds.get(name, "tanh_gaussian" if name.startswith("sac") else "deterministic"))


class Step(NamedTuple):
    before: Any  # learner
    after: Any
    metrics: Any
    batch: Transition
    noises: Any  # of the policy's samples, in their order


def batch_of(space: Any) -> Transition:
    """Flags of every kind, with observations far from zero."""
    rng: Any = np.random.default_rng(0)
    obs, next_obs = 5 * rng.normal(size=(2, B, 2)).astype(np.float32)
    action = (
        rng.integers(2, size=B).astype(np.int32) if space is ARMS else rng.uniform(-1, 1, (B, 1)).astype(np.float32)
    )
    reward = rng.normal(size=B).astype(np.float32)
    index: Any = np.arange(B)
    terminated, truncated = index % 2 == 1, index // 2 % 2 == 1
    return Transition(obs, action, None, reward, terminated, truncated, next_obs)


def parts(name: str) -> tuple[Any, Any]:
    """(init_learner, learn) as an algorithm hands them, with its own config, to `off_policy.replay_algorithm`."""
    algorithm, config, space = VARIANTS[name]
    env, network, given = arms_env(space), network_of(name), []
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(algorithm.__module__)
        patch.setattr(module, "replay_algorithm", lambda *args, period=1: given.append(args))
        algorithm(env, network, config)
    [(given_env, given_network, given_config, init_learner, _, learn)] = given
    assert given_env is env and given_network is network and given_config is config
    return init_learner, learn


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    """A gradient step of every variant, from targets that are not the parameters: TD3's second, which is delayed, and
    as "td3 third" and "td3, unbounded" its third."""
    numbers = {name: 1 for name in VARIANTS} | {"td3 third": DELAY - 1, "td3, unbounded": DELAY - 1}

    def run(batches, keys):
        results = {}
        for name, number in numbers.items():
            variant = name.removesuffix(" third")
            init_learner, learn = parts(variant)
            before = init_learner(network_of(variant).init(keys[0], jnp.zeros((1, 2))))
            before = before._replace(target=jax.tree.map(lambda x: 0.6 * x + 0.1, before.target))
            batch, noises = batches[variant], []
            with pytest.MonkeyPatch.context() as patch:
                for kind in (TanhGaussian, DiagGaussian):
                    patch.setattr(kind, "noise", noting(kind.noise, noises))
                after, metrics = learn(keys[1], before, batch, jnp.int32(number))
            results[name] = Step(before, after, metrics, batch, noises)
        return results

    batches = {name: batch_of(space) for name, (_, _, space) in VARIANTS.items()}
    return jax.tree.map(np.asarray, quick_jit(run)(batches, jax.random.split(jax.random.key(0))))


def noting(f, notes):
    """`f`, which notes its results. An inner method's call is not an outer one's."""

    def noted(*args):
        depth.append(1)
        result = f(*args)
        depth.pop()
        if not depth:
            notes.append(result)
        return result

    depth = []
    return noted


NAMES = [*VARIANTS, "td3 third"]


def next_value(name: str, step: Step) -> np.ndarray:
    """What a target bootstraps from."""
    network, params, target, x = network_of(name), step.before.params, step.before.target, step.batch
    if name == "ddpg":
        return np.mean(network.q(target, x.next_obs, network.apply(target, x.next_obs)[0].mode()), axis=0)
    if name.startswith("td3"):
        noise = NOISE_STD * np.asarray(jax.random.normal(jax.random.split(jax.random.key(0))[1], (B, 1)))
        assert (np.abs(noise) > NOISE_CLIP).any() and (np.abs(noise) < NOISE_CLIP).any()
        action = network.apply(target, x.next_obs)[0].mode() + np.clip(noise, -NOISE_CLIP, NOISE_CLIP)
        if "unbounded" not in name:
            assert (np.abs(action) > 1).any()
            action = np.clip(action, -1, 1)
        return np.min(network.q(target, x.next_obs, action), axis=0)
    policy = network.apply(params, x.next_obs)[0]
    if "discrete" in name:
        log_prob = np.asarray(jax.nn.log_softmax(policy.logits))
        soft = np.min(network.q_of_all(target, x.next_obs), axis=0) - ALPHA * log_prob
        return np.sum(np.exp(log_prob) * soft, axis=-1)
    action = policy.transform(step.noises[0])
    next_q = np.min(network.q(target, x.next_obs, executed(action)), axis=0)
    return next_q - ALPHA * np.asarray(policy.log_prob(action))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), a, b)


def moved(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.abs(x - y).max() > 1e-4), a, b)))


@pytest.mark.parametrize("name", NAMES)
def test_the_critics_go_down_their_squared_distance_to_the_target_which_a_truncation_bootstraps_alone(steps, name):
    """A terminated transition's target is its reward, a truncated one's has the value of what it reached."""
    step, network = steps[name], network_of(name.removesuffix(" third"))
    x = step.batch
    y = x.reward + GAMMA * np.where(x.terminated, 0.0, next_value(name.removesuffix(" third"), step))

    def loss(critic):
        q = network.q({"critic": critic}, x.obs, x.action)
        return jnp.mean((q - y) ** 2) / 2, jnp.mean(q)

    (value, q), gradient = jax.value_and_grad(loss, has_aux=True)(step.before.params["critic"])
    expected = jax.tree.map(lambda p, g: p - CRITIC_RATE * g, step.before.params["critic"], gradient)
    close(step.after.params["critic"], expected)
    assert moved(expected, step.before.params["critic"])
    np.testing.assert_allclose([step.metrics["critic_loss"], step.metrics["q"]], [value, q], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "td3"])
def test_the_policy_goes_up_the_new_critics_value_of_its_actions_and_its_entropy(steps, name):
    """DDPG's mean over critics, TD3's first of them, the least of them and alpha times the entropy in SAC."""
    step, network = steps[name], network_of(name.removesuffix(" third"))
    x, critic = step.batch, {"critic": step.after.params["critic"]}

    def loss(policy):
        distribution = network.apply({"policy": policy}, x.obs)[0]
        if "discrete" in name:
            log_prob = jax.nn.log_softmax(distribution.logits)
            least = jnp.min(network.q_of_all(critic, x.obs), axis=0)
            return jnp.mean(jnp.sum(jnp.exp(log_prob) * (ALPHA * log_prob - least), axis=-1))
        if "sac" in name:
            action = distribution.transform(step.noises[1])
            least = jnp.min(network.q(critic, x.obs, executed(action)), axis=0)
            return jnp.mean(ALPHA * distribution.log_prob(action) - least)
        q = network.q(critic, x.obs, distribution.mode())
        return -jnp.mean(q[0] if "td3" in name else q)

    value, gradient = jax.value_and_grad(loss)(step.before.params["policy"])
    expected = jax.tree.map(lambda p, g: p - RATE * g, step.before.params["policy"], gradient)
    close(step.after.params["policy"], expected)
    said = step.metrics["policy_loss"]
    np.testing.assert_allclose(said.total if isinstance(said, Mean) else said, value, rtol=1e-3, atol=1e-5)
    idle = {"log_std"} if network.kind in ("categorical", "deterministic") else set()
    changed = {leaf: expected[leaf] for leaf in expected if leaf not in idle}
    assert moved(changed, {leaf: step.before.params["policy"][leaf] for leaf in changed})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "td3"])
def test_targets_go_a_share_tau_of_the_way_to_the_new_parameters(steps, name):
    step = steps[name]
    assert set(step.after.target) == ({"critic"} if "sac" in name else {"policy", "critic"})
    new = {half: step.after.params[half] for half in step.before.target}
    expected = jax.tree.map(lambda old, new: (1 - TAU) * old + TAU * new, step.before.target, new)
    close(step.after.target, expected)


def test_between_td3s_delayed_steps_the_critics_alone_move(steps):
    """Neither policy nor targets, nor what an optimiser remembers of the policy, by one bit."""
    before, after, metrics, *_ = steps["td3"]
    for a, b in (
        (after.params["policy"], before.params["policy"]),
        (after.target, before.target),
        (after.train_state.opt_state["policy"], before.train_state.opt_state["policy"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert metrics["policy_loss"].num == metrics["policy_grad_norm"].num == 0
    close(after.params["critic"], steps["td3 third"].after.params["critic"])


def test_of_six_gradient_steps_td3s_policy_and_targets_take_the_third_and_the_sixth():
    init_learner, learn = parts("td3")
    network, batch = network_of("td3"), batch_of(REAL)
    learner = quick_jit(lambda key: init_learner(network.init(key, jnp.zeros((1, 2)))))(jax.random.key(0))
    step, changed = quick_jit(learn), []
    for number in range(6):
        after, _ = step(jax.random.key(number), learner, batch, jnp.int32(number))
        halves = ((x.params["policy"], x.target["policy"], x.target["critic"]) for x in (after, learner))
        changed.append([bool(np.any(a["shift"] != b["shift"])) for a, b in zip(*halves, strict=True)])
        learner = after
    assert changed == [[False] * 3, [False] * 3, [True] * 3] * 2


@pytest.mark.parametrize(("name", "target"), [("sac", -1.0), ("sac gaussian", 0.7), ("sac discrete", 0.3 * np.log(2))])
def test_the_temperature_falls_where_entropy_is_above_the_target_and_rises_where_it_is_below(steps, name, target):
    """By log alpha's gradient, at the entropy of the policy before its step, which had the old temperature."""
    step, network = steps[name], network_of(name)
    policy = network.apply(step.before.params, step.batch.obs)[0]
    if name == "sac discrete":
        log_prob = np.asarray(jax.nn.log_softmax(policy.logits))
        entropy = -np.mean(np.sum(np.exp(log_prob) * log_prob, axis=-1))
    else:
        entropy = -np.mean(policy.log_prob(policy.transform(step.noises[1])))
    np.testing.assert_allclose(step.metrics["entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(step.metrics["temperature"], ALPHA, rtol=1e-6)
    assert abs(entropy - target) > 0.1
    expected = np.log(ALPHA) - ALPHA_RATE * (entropy - target)
    np.testing.assert_allclose(step.after.log_temperature.params, expected, rtol=1e-4)
    assert (step.after.log_temperature.params < np.log(ALPHA)) == (entropy > target)


@pytest.mark.parametrize("name", ["sac fixed", "sac discrete fixed"])
def test_a_fixed_temperature_stays(steps, name):
    step = steps[name]
    assert isinstance(steps[name.removesuffix(" fixed")].after.log_temperature, TrainState)
    assert step.before.log_temperature is None and step.after.log_temperature is None
    np.testing.assert_allclose(step.metrics["temperature"], ALPHA, rtol=1e-6)


def test_the_next_action_and_the_policys_own_have_noises_of_their_own(steps):
    for name in ("sac", "sac gaussian", "sac fixed"):
        first, second = (noise.ravel() for noise in steps[name].noises)
        assert len(steps[name].noises) == 2 and abs(np.corrcoef(first, second)[0, 1]) < 0.6


# --- on rollouts ---

N, T, CRITIC_STEPS = 4, 16, 3
ON_ROLLOUTS: dict[str, Any] = {"num_envs": N, "num_steps": T, "gamma": GAMMA, "max_grad_norm": None, "optimizer": "sgd"}
Q_ACTOR_CRITIC: dict[str, Any] = ON_ROLLOUTS | {
    **{
        "learning_rate": RATE,
        "critic_learning_rate": CRITIC_RATE,
        "num_critic_steps": CRITIC_STEPS,
        "entropy_coef": 0.2,
    }
}
SARSA_LAMBDA = 0.7


class Update(NamedTuple):
    before: Any  # parameters
    after: Any
    metrics: Any
    x: Transition
    next_action: Any


@pytest.fixture(scope="module")
def updates():
    """[{name: update}], by the ways in which all episodes may end."""

    def lane(ending):
        real, arms = arms_env(REAL, ending), arms_env(ARMS, ending)
        deterministic, categorical = TinyQNetwork("deterministic"), TinyQNetwork("categorical")

        def with_q(**config):
            return q_actor_critic(arms, categorical, QActorCriticConfig(**Q_ACTOR_CRITIC, **config))

        algorithms = {
            "dpg": dpg(real, deterministic, DPGConfig(**ON_ROLLOUTS | PLAIN, num_critic_steps=CRITIC_STEPS)),
            "q": with_q(sarsa_lambda=0.0),
            "q standardised": with_q(sarsa_lambda=0.0, normalize_weight=True),
            "q, one action": with_q(sarsa_lambda=SARSA_LAMBDA),
        }
        results = {}
        for name, algorithm in algorithms.items():
            state, trajectories, samples = algorithm.init(jax.random.key(0)), [], []
            if name == "q, one action":
                params = state.learner.params
                params |= {"policy": params["policy"] | {"shift": jnp.array([0.0, 50.0])}}
                state = state._replace(learner=with_params(state.learner, params))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("purepg.algorithms.on_policy.rollout", noting(rollout, trajectories))
                patch.setattr(Categorical, "sample", noting(Categorical.sample, samples))
                after, metrics = algorithm.step(jax.random.key(1), state, jnp.int32(0))
            [(_, x, _)] = trajectories
            results[name] = Update(state.learner.params, after.learner.params, metrics, x, samples)
        return results

    lanes = jax.tree.map(np.asarray, quick_jit(jax.vmap(lane))(jnp.array(ENDINGS)))
    return [jax.tree.map(lambda x, i=i: x[i], lanes) for i in range(len(ENDINGS))]


def test_dpg_fits_its_critics_in_several_steps_with_targets_of_their_own_and_then_goes_up_their_mean(updates):
    network = TinyQNetwork("deterministic")
    for update in (update["dpg"] for update in updates):
        x, policy, critic = update.x, update.before["policy"], update.before["critic"]

        for _ in range(CRITIC_STEPS):
            params = {"policy": policy, "critic": critic}
            next_q = np.mean(network.q(params, x.next_obs, network.apply(params, x.next_obs)[0].mode()), axis=0)
            y = x.reward + GAMMA * np.where(x.terminated, 0.0, next_q)

            def critic_loss(critic, y=y, x=x):
                q = network.q({"critic": critic}, x.obs, x.action)
                return jnp.mean((q - y) ** 2) / 2

            gradient = jax.grad(critic_loss)(critic)
            critic = jax.tree.map(lambda p, g: p - CRITIC_RATE * g, critic, gradient)
        close(update.after["critic"], critic)

        def policy_loss(policy, critic=critic, x=x):
            action = network.apply({"policy": policy}, x.obs)[0].mode()
            return -jnp.mean(network.q({"critic": critic}, x.obs, action))

        gradient = jax.grad(policy_loss)(policy)
        close(update.after["policy"], jax.tree.map(lambda p, g: p - RATE * g, policy, gradient))
        assert np.abs(update.after["policy"]["shift"] - policy["shift"]).max() > 1e-4


def fitted(network: TinyQNetwork, update: Update, target: np.ndarray) -> tuple[Any, Any]:
    """The critics after CRITIC_STEPS gradient steps to a target that stays, and the loss before the last of them."""
    x = update.x

    def loss(critic):
        return jnp.mean((network.q({"critic": critic}, x.obs, x.action) - target) ** 2) / 2

    critic, value = update.before["critic"], None
    for _ in range(CRITIC_STEPS):
        value, gradient = jax.value_and_grad(loss)(critic)
        critic = jax.tree.map(lambda p, g: p - CRITIC_RATE * g, critic, gradient)
    return critic, value


@pytest.mark.parametrize("name", ["q", "q standardised"])
def test_a_q_actor_critic_fits_q_to_the_next_action_taken_or_else_sampled_and_weights_actions_by_it(updates, name):
    network = TinyQNetwork("categorical")
    for update in (update[name] for update in updates):
        x, [next_action] = update.x, update.next_action
        assert set(next_action.ravel()) == {0, 1}
        next_q = np.array(np.mean(network.q(update.before, x.next_obs, next_action), axis=0))
        q = np.mean(network.q(update.before, x.obs, x.action), axis=0)
        goes_on = ~(x.terminated | x.truncated)[:-1]
        next_q[:-1][goes_on] = q[1:][goes_on]
        critic, loss = fitted(network, update, x.reward + GAMMA * np.where(x.terminated, 0.0, next_q))
        close(update.after["critic"], critic)
        np.testing.assert_allclose(update.metrics["critic_loss"], loss, rtol=1e-4)

        weight = np.mean(network.q({"critic": critic}, x.obs, x.action), axis=0)
        if name == "q standardised":
            weight = (weight - weight.mean()) / weight.std()

        def policy_loss(policy, x=x, weight=weight):
            distribution = network.apply({"policy": policy}, x.obs)[0]
            loss = -jnp.mean(distribution.log_prob(x.action) * weight)
            return loss - 0.2 * jnp.mean(distribution.entropy()), loss

        gradient, loss = jax.grad(policy_loss, has_aux=True)(update.before["policy"])
        np.testing.assert_allclose(update.metrics["policy_loss"], loss, rtol=1e-3, atol=1e-5)
        close(update.after["policy"], jax.tree.map(lambda p, g: p - RATE * g, update.before["policy"], gradient))


def test_where_a_policy_has_one_action_a_q_actor_critics_target_is_sarsas_of_lambda(updates):
    """G_t = r_t + gamma ((1 - lambda) Q(s', a') + lambda G_{t+1}), cut where an episode or the rollout ends."""
    network = TinyQNetwork("categorical")
    for update in (update["q, one action"] for update in updates):
        x = update.x
        assert (x.action == 1).all()
        next_q = np.mean(network.q(update.before, x.next_obs, x.action), axis=0)
        target, later = np.zeros((T, N)), next_q[-1]
        for t in reversed(range(T)):
            later = np.where(x.terminated[t] | x.truncated[t], next_q[t], later)
            mixed = (1 - SARSA_LAMBDA) * next_q[t] + SARSA_LAMBDA * later
            target[t] = later = x.reward[t] + GAMMA * np.where(x.terminated[t], 0.0, mixed)
        critic, loss = fitted(network, update, target)
        np.testing.assert_allclose(update.metrics["critic_loss"], loss, rtol=1e-4)
        close(update.after["critic"], critic)
