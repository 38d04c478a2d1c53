"""What a config may hold: every field is of its type, and what is accepted trains; the rest is refused in one line."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SeparateNetwork, TinyNetwork, TinyQNetwork, arms_env, quick_jit

import purepg.algorithms
from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.configs import ReplayConfig
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.config import Range, alternatives, check, float_fields, hints
from purepg.envs.tasks import Task, token_env
from purepg.equations.advantages import group_advantage
from purepg.equations.losses import aggregate
from purepg.equations.ratios import kl_penalty
from purepg.language.model import LanguageModelConfig, language_model
from purepg.language.transformer import TransformerConfig, check_transformer
from purepg.networks.actor_critic import (
    ActorCritic,
    ActorQConfig,
    NetworkConfig,
    PolicyHead,
    Torso,
    actor_critic,
    actor_q,
)
from purepg.optimize import step_direction
from purepg.run.plan import RunConfig, prepare
from purepg.run.sweep import grid, programs
from purepg.train import guard, train
from purepg.types import Box, Discrete, Env, UsageError

ARMS = Discrete(2)
REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
UNBOUNDED = Box(np.full(1, -np.inf, np.float32), np.full(1, np.inf, np.float32))


def refused(function: Callable, *args: Any, **kwargs: Any) -> str:
    """What a UsageError says, in one line."""
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- every field is of its type ---


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (A2CConfig, {"optimizer": "Adam"}, "optimizer ('Adam') must be adam or sgd: did you mean adam?"),
        (
            REINFORCEConfig,
            {"baseline": "mean"},
            "baseline ('mean') must be none, batch_mean, standardised, per_time_mean, leave_one_out or value: "
            "did you mean batch_mean?",
        ),
        (
            GRPOConfig,
            {"aggregation": "tokens"},
            "aggregation ('tokens') must be sequence_mean, token_mean, constant_length or sequence_sum: "
            "did you mean token_mean?",
        ),
        (PPOConfig, {"normalize_advantage": True}, "normalize_advantage (True) must be minibatch, batch or off"),
        (PPOPenaltyConfig, {"penalty": "k"}, "penalty ('k') must be kl or reverse_kl: did you mean kl?"),
        (NetworkConfig, {"torso": "CNN"}, "torso ('CNN') must be mlp, cnn, nature, impala or simba: did you mean cnn?"),
        (
            RunConfig,
            {"wandb": "on-line"},
            "wandb ('on-line') must be online, offline or disabled: did you mean online?",
        ),
        (A2CConfig, {"gamma": np.float32(1.5)}, "gamma (1.5) must be in [0, 1]"),
        (A2CConfig, {"gamma": jnp.float32(1.5)}, "gamma (1.5) must be in [0, 1]"),
        (A2CConfig, {"gamma": np.array(-1.0)}, "gamma (-1.0) must be in [0, 1]"),
        (A2CConfig, {"gamma": np.zeros(1)}, "gamma (an array of shape (1,), float64) must be a number"),
        (A2CConfig, {"gamma": "0.9"}, "gamma ('0.9') must be a number"),
        (A2CConfig, {"gamma": True}, "gamma (True) must be a number"),
        (A2CConfig, {"learning_rate": 10**400}, "learning_rate (inf) must be above 0"),
        (A2CConfig, {"num_envs": np.int64(0)}, "num_envs (0) must be at least 1"),
        (A2CConfig, {"num_envs": 8.0}, "num_envs (8.0) must be an integer"),
        (A2CConfig, {"num_envs": True}, "num_envs (True) must be an integer"),
        (A2CConfig, {"n_step": "2"}, "n_step ('2') must be an integer or none"),
        (A2CConfig, {"normalize_obs": 1}, "normalize_obs (1) must be true or false"),
        (SACConfig, {"target_entropy": float("nan")}, "target_entropy (nan) must be a finite number"),
        (NetworkConfig, {"hidden": [8, 8]}, "hidden ([8, 8]) must be a tuple, each entry an integer"),
        (NetworkConfig, {"hidden": (8, 0.5)}, "hidden[1] (0.5) must be an integer"),
        (RunConfig, {"out": "runs/x"}, "out ('runs/x') must be a Path or none"),
        (RunConfig, {"env": 5}, "env (5) must be text"),
        (TransformerConfig, {"tied_head": 0}, "tied_head (0) must be true or false"),
        (RewardConfig, {"batch_size": 0}, "batch_size (0) must be at least 1"),
    ],
)
def test_a_field_that_is_not_of_its_type_is_refused_with_its_value_and_the_nearest_choice(config, fields, message):
    assert refused(check, config(**fields)) == message


def test_numpys_numbers_and_arrays_without_axes_are_taken_for_pythons():
    fields: dict[str, Any] = {"num_envs": np.int8(100), "num_steps": np.int64(2)}  # whose product overflows in int8
    fields |= {"normalize_obs": np.True_, "gamma": np.float32(0.5), "gae_lambda": np.array(0.25)}
    given = A2CConfig(**fields, entropy_coef=jnp.float32(0.125), value_coef=1)
    held = check(given)
    expected = A2CConfig(
        num_envs=100, num_steps=2, normalize_obs=True, gamma=0.5, gae_lambda=0.25, entropy_coef=0.125, value_coef=1.0
    )
    assert held == expected
    assert all(type(x) is type(y) for x, y in zip(vars(held).values(), vars(expected).values(), strict=True))
    assert check(expected) is expected


def test_a_traced_float_is_not_looked_at_and_nothing_else_may_be_traced():
    def held(x, **fields):
        check(A2CConfig(**{name: x for name in fields}))
        return x

    jax.eval_shape(lambda x: held(x, gamma=0, max_grad_norm=0), jnp.float32(7))
    assert refused(jax.eval_shape, lambda x: held(x, gamma=0), jnp.zeros(2)).startswith("gamma (an array of shape (2,)")
    traced = refused(jax.eval_shape, lambda x: held(x, num_envs=0), 3)
    assert traced.endswith("must be an integer, with a value known before the program is traced")


def test_settings_whose_floats_are_numbers_of_any_kind_share_one_program():
    rates: Any = (1e-3, np.float32(1e-3), np.array(1e-2), jnp.float32(1), 1)
    settings = grid({"a2c": A2CConfig(num_envs=1)}, {"learning_rate": rates})
    assert all(float_fields(setting.configs["a2c"]) == float_fields(A2CConfig()) for setting in settings)
    (program,) = programs(settings, lambda c: a2c(arms_env(), TinyNetwork(ARMS), c["a2c"]), 10_000)
    np.testing.assert_array_equal(program.hyper["a2c"]["learning_rate"], np.float32(rates))


def test_a_sweep_in_the_library_is_held_to_the_same_types():
    def plan(**sweep):
        configs = {"a2c": A2CConfig(), "network": NetworkConfig()}
        return prepare(a2c, actor_critic, configs, RunConfig(compile_cache=False), sweep)

    assert refused(plan, optimizer=["adam", "SGD"]) == "optimizer ('SGD') must be adam or sgd: did you mean sgd?"
    assert refused(plan, hidden=[[64, 64]]) == "hidden ([64, 64]) must be a tuple, each entry an integer"
    assert refused(plan, learning_rate="1e-3") == "sweep learning_rate (1e-3) must be a list of values"
    assert refused(plan, learning_rate=["1e-3"]) == "learning_rate ('1e-3') must be a number"


def test_a_function_with_choices_refuses_another_and_does_not_take_its_last():
    x, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    wrong: Any = "Mean"
    assert refused(aggregate, x, mask, wrong).startswith("how ('Mean') must be sequence_mean, token_mean,")
    assert refused(group_advantage, x, wrong).endswith("or leave_one_out: did you mean group_mean?")
    assert refused(step_direction, "ADAM", None) == "optimizer ('ADAM') must be adam or sgd: did you mean adam?"
    assert refused(kl_penalty, x, x, mask, "k4", "token").startswith("estimator ('k4') must be k1, k2 or k3")
    assert refused(kl_penalty, x, x, mask, "k1", "tokens") == (
        "level ('tokens') must be token or sequence: did you mean token?"
    )
    network = ActorCritic(partial(Torso, REAL, NetworkConfig(activation=wrong)), partial(PolicyHead, ARMS))
    assert refused(network.init, jax.random.key(0), jnp.zeros(1)).startswith("activation ('Mean') must be tanh, relu")


# --- what cannot learn ---

ONE: dict[str, Any] = {"num_envs": 1, "num_steps": 1}
ALONE = "needs at least 2 steps at once: standardising one weight gives 0"


def groups_of(**changes: Any) -> GRPOConfig:
    return GRPOConfig(num_prompts=1, **{"baseline": "none", "divide_by_std": False, "kl_coef": 0.0} | changes)


@pytest.mark.parametrize(
    ("algorithm", "config", "accepted", "message"),
    [
        *(
            (algorithm, config, replace(config, num_steps=2), f"normalize_advantage (True) {ALONE}")
            for algorithm, config in (
                (a2c, A2CConfig(**ONE, normalize_advantage=True)),
                (off_policy_pg, OffPolicyPGConfig(**ONE, normalize_advantage=True)),
                (npg, NPGConfig(**ONE, num_value_minibatches=1)),
                (trpo, TRPOConfig(**ONE, num_value_minibatches=1)),
            )
        ),
        (a2c, A2CConfig(**ONE, normalize_advantage=True), A2CConfig(**ONE), f"normalize_advantage (True) {ALONE}"),
        *(
            (
                algorithm,
                config,
                replace(config, normalize_advantage=accepted),
                f"normalize_advantage (minibatch) {ALONE}",
            )
            for algorithm, config in (
                (ppo, PPOConfig(num_envs=2, num_steps=2, num_minibatches=4)),
                (ppo_penalty, PPOPenaltyConfig(num_envs=2, num_steps=2, num_minibatches=4)),
            )
            for accepted in ("batch", "off")
        ),
        (
            ppo,
            PPOConfig(**ONE, num_minibatches=1, normalize_advantage="batch"),
            PPOConfig(num_envs=2, num_steps=1, num_minibatches=1, normalize_advantage="batch"),
            f"normalize_advantage (batch) {ALONE}",
        ),
        (
            reinforce,
            REINFORCEConfig(num_episodes=1, baseline="per_time_mean"),
            REINFORCEConfig(num_episodes=2, baseline="per_time_mean"),
            "num_episodes (1) must be at least 2 with baseline per_time_mean and weight return_to_go: they leave "
            "nothing of a single episode",
        ),
        (
            reinforce,
            REINFORCEConfig(num_episodes=1, baseline="leave_one_out"),
            REINFORCEConfig(num_episodes=1, baseline="none"),
            "num_episodes (1) must be at least 2 with baseline leave_one_out: there is no other episode",
        ),
        *(
            (
                reinforce,
                replace(one, baseline=baseline),
                REINFORCEConfig(num_episodes=1, baseline=baseline),
                f"num_episodes (1) must be at least 2 with baseline {baseline} and weight {one.weight}: they leave "
                "nothing of a single episode",
            )
            for baseline in ("batch_mean", "standardised")
            for one in (
                REINFORCEConfig(num_episodes=1, weight="total_return"),
                REINFORCEConfig(num_episodes=1, max_steps=1),
            )
        ),
        (
            grpo,
            groups_of(group_size=1, baseline="batch_mean"),
            groups_of(group_size=2, baseline="batch_mean"),
            "num_prompts * group_size (1) must be at least 2 with baseline batch_mean: it leaves 0 of 1",
        ),
        (
            grpo,
            groups_of(group_size=1, skip_groups_without_signal=True),
            groups_of(group_size=1),
            "group_size (1) must be at least 2 to skip groups without signal: a group of one has none",
        ),
        (
            grpo,
            groups_of(group_size=2, max_rounds=2),
            groups_of(group_size=2, max_rounds=2, skip_groups_without_signal=True),
            "max_rounds (2) must be 1 unless skip_groups_without_signal is set",
        ),
        (
            grpo,
            GRPOConfig(kl_coef=0.0, kl_target=0.1),
            GRPOConfig(kl_coef=1e-3, kl_target=0.1),
            "kl_coef (0) must be above 0 with a kl_target, which multiplies it: 0 would stay 0",
        ),
    ],
)
def test_a_config_whose_weights_are_all_zero_is_refused_and_its_neighbour_is_not(algorithm, config, accepted, message):
    network = (SeparateNetwork if algorithm in (npg, trpo) else TinyNetwork)(ARMS)
    assert refused(algorithm, arms_env(), network, config) == message
    assert algorithm(arms_env(), network, accepted)


def test_one_weight_of_an_actor_critic_with_q_is_not_standardised_alone():
    network, config = TinyQNetwork("categorical"), QActorCriticConfig(**ONE, normalize_weight=True)
    assert refused(q_actor_critic, arms_env(), network, config) == f"normalize_weight (True) {ALONE}"
    assert q_actor_critic(arms_env(), network, replace(config, normalize_weight=False))


def test_a_traced_coefficient_of_an_adaptive_penalty_is_not_looked_at():
    def kl_coef(x):
        algorithm = grpo(arms_env(), TinyNetwork(ARMS), GRPOConfig(kl_coef=x, kl_target=0.1))
        return algorithm.init(jax.random.key(0)).learner.kl_coef

    assert jax.eval_shape(kl_coef, 0.0).shape == ()


# --- networks of another kind ---


@pytest.mark.parametrize("policy", ["deterministic", "gaussian"])
@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        (a2c, A2CConfig()),
        (ppo, PPOConfig()),
        (ppo_penalty, PPOPenaltyConfig()),
        (off_policy_pg, OffPolicyPGConfig()),
        (npg, NPGConfig()),
        (trpo, TRPOConfig()),
        (reinforce, REINFORCEConfig(baseline="value")),
    ],
)
def test_an_algorithm_with_v_refuses_a_deterministic_policy_and_a_network_without_v(algorithm, config, policy):
    message = refused(algorithm, arms_env(REAL), TinyQNetwork(policy), config)
    needs, has = "a stochastic policy", ", but that of this network on toy is a Deterministic"
    if policy == "gaussian":
        needs, has = "a critic V(s)", ", which this network does not have: use actor_critic"
    assert message == f"{algorithm.__name__} needs {needs}{has}"


def test_without_a_baseline_from_v_there_need_be_none():
    cases: Any = ((reinforce, REINFORCEConfig()), (grpo, GRPOConfig()))
    for algorithm, config in cases:
        assert algorithm(arms_env(REAL), TinyQNetwork("gaussian"), config)
        assert "needs a stochastic policy" in refused(algorithm, arms_env(REAL), TinyQNetwork("deterministic"), config)


@pytest.mark.parametrize(
    ("algorithm", "config", "space"),
    [(q_actor_critic, QActorCriticConfig(), REAL), (sac, SACConfig(), REAL), (sac_discrete, DiscreteSACConfig(), ARMS)],
)
def test_an_algorithm_with_q_refuses_a_network_without_one(algorithm, config, space):
    message = f"{algorithm.__name__} needs a critic Q(s, a), which this network has not; one of actor_q has"
    assert refused(algorithm, arms_env(space), TinyNetwork(space), config) == message


def test_an_actor_critic_with_q_refuses_a_policy_without_probabilities():
    message = "q_actor_critic needs a policy of kind categorical or gaussian or tanh_gaussian; that of this network on "
    network = TinyQNetwork("deterministic")
    assert refused(q_actor_critic, arms_env(REAL), network, QActorCriticConfig()) == f"{message}toy is a Deterministic"


def test_a_policy_that_does_not_fit_the_actions_is_refused():
    message = refused(ddpg, arms_env(ARMS), TinyQNetwork("deterministic"), DDPGConfig())
    assert message == "a Deterministic policy does not fit toy, whose actions are a Discrete"


def test_what_a_policy_that_does_not_fit_is_told_to_be_does_fit():
    """By an algorithm that the message names, where actions are discrete, bounded and not."""
    algorithms: dict[str, Any] = {
        f.__name__: (f, c) for f, c in ((sac, SACConfig()), (ddpg, DDPGConfig()), (td3, TD3Config()))
    }
    algorithms |= {"dpg": (dpg, DPGConfig()), "q_actor_critic": (q_actor_critic, QActorCriticConfig())}
    algorithms |= {"sac_discrete": (sac_discrete, DiscreteSACConfig())}
    for space in (ARMS, REAL, UNBOUNDED):
        env = arms_env(space)
        told = refused(actor_q, env, ActorQConfig(policy="deterministic" if space is ARMS else "categorical"))
        told = told.partition("actions take ")[2].replace(", with", " with").replace(", or", ";").replace(", ", " or ")
        for part in told.split("; "):
            kinds, names = part.split(" with ")
            for kind in kinds.split(" or "):
                for name in names.split(" or "):
                    algorithm, config = algorithms[name]
                    chosen: dict[str, Any] = {"policy": kind, "hidden": (4,)}
                    assert algorithm(env, actor_q(env, ActorQConfig(**chosen)), config)


# --- a property of all configs: they train, or are refused in one line ---

TASK = Task(  # one prompt, and a reward that depends on every token
    "letters",
    ("a", "b", "."),
    2,
    2,
    2,
    lambda key, held_out: jnp.array([1, 0]),
    lambda key, prompt: jnp.array([0, 2]),
    lambda prompt, response: jnp.dot(jnp.array([1.0, 0.3]), response.astype(jnp.float32)),
)
TOKENS = token_env(TASK)
MODEL = LanguageModelConfig(hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=3, value_head=True)


def varied(space: Any) -> Env:
    """Arms whose rewards differ from state to state, so that no two episodes' are equal."""
    env = arms_env(space)

    def step(key, state, action):
        state, now = env.step(key, state, action)
        return state, now._replace(reward=now.reward + 0.1 * jnp.sum(now.obs))

    return env._replace(step=step)


class Case(NamedTuple):
    algorithm: Callable
    config: Any
    env: Env
    network: Any


WITH_V = (reinforce, REINFORCEConfig), (a2c, A2CConfig), (ppo, PPOConfig), (ppo_penalty, PPOPenaltyConfig)
WITH_V += (off_policy_pg, OffPolicyPGConfig), (grpo, GRPOConfig)
WITH_Q: Any = (q_actor_critic, QActorCriticConfig, "tanh_gaussian"), (sac, SACConfig, "gaussian")
WITH_Q += tuple((f, c, "deterministic") for f, c in ((dpg, DPGConfig), (ddpg, DDPGConfig), (td3, TD3Config)))
CASES = {
    **{f.__name__: Case(f, c, varied(ARMS), TinyNetwork(ARMS)) for f, c in WITH_V},
    **{f.__name__: Case(f, c, varied(REAL), SeparateNetwork(REAL)) for f, c in ((npg, NPGConfig), (trpo, TRPOConfig))},
    **{f.__name__: Case(f, c, varied(REAL), TinyQNetwork(kind)) for f, c, kind in WITH_Q},
    "sac_discrete": Case(sac_discrete, DiscreteSACConfig, varied(ARMS), TinyQNetwork("categorical")),
    "clone": Case(clone, CloneConfig, TOKENS, language_model(TOKENS, MODEL)),
    "dpo": Case(dpo, DPOConfig, TOKENS, language_model(TOKENS, MODEL)),
    "reward_model": Case(reward_model, RewardConfig, TOKENS, language_model(TOKENS, MODEL)),
}


def draw(rng: np.random.Generator, hint: Any) -> Any:
    """A value of a field's type, small where it is a count."""
    kinds = alternatives(hint)
    kind, allowed = kinds[rng.integers(len(kinds))]
    allowed = allowed or Range(-2.0, 2.0)
    if kind is NoneType:
        return None
    if get_origin(kind) is Literal:
        return str(rng.choice(get_args(kind)))
    if get_origin(kind) is tuple:
        return tuple(draw(rng, get_args(kind)[0]) for _ in range(rng.integers(1, 3)))
    if kind is bool:
        return [False, True, np.True_][rng.integers(3)]
    if kind is int:
        value = int(allowed.low) + int(rng.choice([0, 1, 1, 3]))
        return value if rng.random() < 0.7 else np.int64(value)
    if kind is float:
        if np.isfinite(allowed.high):
            inside = rng.uniform(allowed.low, allowed.high)
            value = rng.choice([inside if allowed.above else allowed.low, allowed.high, inside])
        else:
            value = allowed.low + (0.0 if rng.random() < 0.2 and not allowed.above else 10 ** rng.uniform(-3, 0))
        value = float(value) or allowed.low
        return [value, value, np.float32(value), np.array(value)][rng.integers(4)]
    return Path("x") if kind is Path else "x"


def draw_wrong(rng: np.random.Generator, hint: Any) -> Any:
    """A value that is not of a field's type."""
    kinds = alternatives(hint)
    kind, allowed = kinds[0]
    wrong: list[Any] = [[1, 2], {}, b"x", 1j, np.zeros(2), np.array("x"), jnp.zeros(1)]
    if len(kinds) == 1:
        wrong.append(None)
    if get_origin(kind) is Literal:
        wrong += [get_args(kind)[0].upper(), get_args(kind)[-1][:-1] + "q", "", True, 0]
    elif kind is bool:
        wrong += [0, 1, 1.0, "true", np.int64(1)]
    elif kind is int or kind is float:
        wrong += ["1", True, np.False_, np.nan, np.float32(np.inf), -np.inf, ()]
        if kind is int:
            wrong += [1.0, np.float64(2.0), jnp.float32(1)]
        if allowed:
            outside = [allowed.low - 1, allowed.low] if allowed.above else [allowed.low - 1]
            outside += [allowed.high + 1] if np.isfinite(allowed.high) else []
            wrong += [x if kind is int else as_(x) for x in outside for as_ in (float, np.float32, np.array)] * 2
    else:
        of_words = get_origin(kind) is tuple and get_args(kind)[0] is str
        wrong += [5, True, ("a", "b") if get_origin(kind) is tuple and not of_words else (1,)]
    return wrong[rng.integers(len(wrong))]


def draw_config(rng: np.random.Generator, config: type, wrong: bool) -> tuple[Any, str | None]:
    """(a config, the name of its field that is not of its type or None)."""
    values = {name: draw(rng, hint) for name, hint in hints(config).items()}
    if not wrong:
        return config(**values), None
    name = str(rng.choice(list(values)))
    return config(**values | {name: draw_wrong(rng, hints(config)[name])}), name


def two_updates(case: Case, config: Any) -> Callable:
    """(parameters before, and after two updates by the loops that a run has; metrics), of a key."""

    def run(key):
        algorithm = guard(case.algorithm(case.env, case.network, config), 10**6)
        state = algorithm.init(key)
        after, metrics = train(key, algorithm, state, 0, 2)
        return state.learner.params, after.learner.params, metrics

    return run


def stands_still(config: Any, metrics: dict[str, np.ndarray]) -> bool:
    """Whether a config, or what happened, says why nothing moved: the buffer is warming up, or there was no signal."""
    warming_up = getattr(config, "warmup_steps", 0) > 2 * getattr(config, "num_envs", 0) * getattr(
        config, "num_steps", 0
    )
    return warming_up or bool(np.all(metrics.get("groups_without_signal", 0) == 1))


def test_every_algorithm_is_among_the_cases():
    assert set(CASES) == set(purepg.algorithms.names())


@pytest.mark.parametrize("name", CASES)
def test_a_drawn_config_trains_two_finite_updates_or_is_refused_in_one_line(name):
    case, rng = CASES[name], np.random.default_rng(sum(map(ord, name)))
    accepted, num_refused = [], 0
    for i in range(240 if issubclass(case.config, ReplayConfig) else 60):  # most burn_in are refused without memory
        config, wrong = draw_config(rng, case.config, wrong=i % 2 == 0)
        try:
            case.algorithm(case.env, case.network, config)
        except UsageError as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 250
            assert wrong is None or str(error).startswith(f"{wrong} (")
            num_refused += 1
        else:
            assert wrong is None, (wrong, config)
            accepted.append(config)
    assert num_refused >= 25 and len(accepted) >= 3
    if case.env is not TOKENS:  # whose loops are slow to trace
        jax.eval_shape(two_updates(case, accepted[0]), jax.random.key(0))
    config = accepted[-1]
    before, after, metrics = quick_jit(two_updates(case, config))(jax.random.key(1))
    assert metrics["finite"].all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    moved = any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    assert moved or stands_still(config, metrics), config


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (NetworkConfig, lambda c: actor_critic(varied(REAL), c)),
        (ActorQConfig, lambda c: actor_q(varied(REAL), c)),
        (ActorQConfig, lambda c: actor_q(arms_env(ARMS), c)),
        (TransformerConfig, check_transformer),
        (LanguageModelConfig, lambda c: language_model(TOKENS, c)),
        (RewardConfig, check),
        (RunConfig, check),
    ],
)
def test_a_drawn_config_of_a_network_or_a_run_makes_one_or_is_refused_in_one_line(config, make):
    rng, num_made, num_refused = np.random.default_rng(1), 0, 0
    for i in range(240):
        drawn, wrong = draw_config(rng, config, wrong=i % 2 == 0)
        try:
            make(drawn)
        except UsageError as error:
            assert "\n" not in str(error)
            assert wrong is None or str(error).startswith((f"{wrong} (", f"{wrong}["))
            num_refused += 1
        else:
            assert wrong is None, (wrong, drawn)
            num_made += 1
    assert num_made >= 3 and num_refused >= 120
