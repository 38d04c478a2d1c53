"""Enumerated trajectories: all of them, each with its probability; and with them the exact mean of every estimator."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from scipy.stats import chi2

from purepg.envs.finite_mdp import FiniteMDP, mdp_env, unroll
from purepg.envs.named_mdps import aliased, bandit, garnet
from purepg.equations.advantages import discount_power, discounted_return, gae, n_step, td_error, total_return
from purepg.equations.ratios import per_decision_ratio, trajectory_ratio
from purepg.experience.acting import actor
from purepg.experience.rollout import episodes
from purepg.lab.exact import bellman_gradient, in_float64, log_policy, values, visitation
from purepg.lab.trajectories import Enumeration, enumerate_trajectories, state_distributions, trajectory_gradient
from purepg.networks.tabular import tabular_actor_critic, tabular_policy
from purepg.types import UsageError

# A terminal state, a start that is not everywhere, two aliases; four steps, after which nothing is of value.
MDP = replace(
    garnet(1, num_states=4, num_actions=2, branching=2, horizon=4, horizon_terminates=True),
    terminal=np.arange(4) == 2,
    start=np.array([0.6, 0.0, 0.0, 0.4]),
    alias=np.array([0, 1, 0, 0]),
)
UNROLLED = unroll(MDP)
FOREVER = replace(MDP, horizon=None, horizon_terminates=False)
LIMITED = replace(MDP, horizon_terminates=False)


def same(a: Any, b: Any, rtol: float = 1e-10) -> None:
    """Equal in every entry, to `rtol` of the largest."""
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 2))


def pi_of(mdp: FiniteMDP, seed: int) -> Any:
    e = np.exp(logits(seed))
    return (e / e.sum(1, keepdims=True))[mdp.alias]


def enumerated(mdp: FiniteMDP, pi: np.ndarray, num_steps: int | None = None) -> Enumeration:
    return in_float64(lambda log_pi: enumerate_trajectories(mdp, log_pi, num_steps), np.log(pi))


# --- which trajectories, and how likely ---


def test_trajectories_are_counted_by_hand_and_their_probabilities_sum_to_one():
    """Of the aliased process: two actions at 0; at 1 one stops, the other goes through three more steps of two."""
    uniform = np.full((6, 2), 0.5)
    all_of_it = enumerated(aliased(), uniform)
    assert all_of_it.mask.shape == (5, 2 * (1 + 2**3))
    assert Counter(all_of_it.mask.sum(0).tolist()) == {2: 2, 5: 16}
    np.testing.assert_array_equal(all_of_it.probability, 0.5 ** all_of_it.mask.sum(0))
    assert enumerated(bandit((1.0, 0.5, 0.0), horizon=4), np.full((1, 3), 1 / 3)).mask.shape == (4, 3**4)
    for mdp in (MDP, UNROLLED):
        every = enumerated(mdp, pi_of(mdp, 0))
        assert every.probability.sum() == pytest.approx(1, abs=1e-14)
        assert (every.probability > 0).all()


def test_an_action_that_is_never_taken_has_no_trajectories():
    pi = np.array([[1.0, 0.0]] + 5 * [[0.5, 0.5]])
    with np.errstate(divide="ignore"):
        log_pi = np.log(pi)
    every = enumerate_trajectories(aliased(), jnp.asarray(log_pi))
    assert every.mask.shape[1] == 1 + 2**3
    assert every.probability.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("mdp", "num_steps"), [(MDP, None), (UNROLLED, None), (LIMITED, None), (FOREVER, 3), (MDP, 3), (MDP, 9)]
)
def test_each_trajectory_is_one_that_the_process_can_take_from_start_to_end(mdp, num_steps):
    """Walked through step by step: states follow each other, rewards and log-probabilities are the tables', the
    probability is the product of all that happened, one flag stands at the end and zeros beyond it."""
    pi = pi_of(mdp, 0)
    trajectory, mask, probability = enumerated(mdp, pi, num_steps)
    obs, action, log_prob, reward, terminated, truncated, next_obs = trajectory
    N = mask.shape[1]
    last = min(x for x in (mdp.horizon, num_steps, 99) if x is not None)
    assert (np.diff(mask.astype(int), axis=0) <= 0).all() and mask[0].all()
    assert len({tuple(x) for x in np.concatenate([obs, action, next_obs]).T}) == N
    for i in range(N):
        length = mask[:, i].sum()
        s, p = obs[0, i], mdp.start[obs[0, i]]
        for t in range(length):
            a, s_next = action[t, i], next_obs[t, i]
            assert obs[t, i] == s
            assert reward[t, i] == mdp.reward[s, a] and log_prob[t, i] == pytest.approx(np.log(pi[s, a]), rel=1e-12)
            at_clock = t + 1 == mdp.horizon and mdp.horizon_terminates
            assert terminated[t, i] == (mdp.terminal[s_next] or at_clock)
            time_is_up = t + 1 == mdp.horizon and not mdp.horizon_terminates  # at a terminal state, both flags are true
            assert truncated[t, i] == (time_is_up or (t + 1 == last and not terminated[t, i]))
            assert (terminated[t, i] or truncated[t, i]) == (t == length - 1)
            p, s = p * pi[s, a] * mdp.transition[s, a, s_next], s_next
        assert probability[i] == pytest.approx(p, rel=1e-12)
    assert not any(x[~mask].any() for x in trajectory)


def test_sampled_episodes_have_the_enumerations_frequencies():
    """`episodes`, the environment and the policy against the enumeration, in every trajectory that there is."""
    mdp = replace(MDP, horizon=2)
    every = enumerated(mdp, pi_of(mdp, 0))
    table = {"policy": {"logits": jnp.asarray(logits(0), jnp.float32)}, "value": {"value": jnp.zeros(4)}}
    act, num = actor(tabular_actor_critic(mdp), {"params": table}), 20_000
    sampled = quick_jit(lambda key: episodes(key, mdp_env(mdp), act, num, 2))(jax.random.key(0))

    def label(trajectory: Any, mask: Any) -> list[tuple]:
        parts = (trajectory.obs, trajectory.action, trajectory.next_obs, trajectory.terminated, mask)
        return [tuple(x) for x in np.concatenate([np.asarray(x, int) for x in parts]).T]

    expected = dict(zip(label(every.trajectory, every.mask), num * every.probability, strict=True))
    count = Counter(label(sampled.trajectory, sampled.mask))
    assert set(count) <= set(expected)
    statistic = sum((count[x] - n) ** 2 / n for x, n in expected.items())
    assert chi2.sf(statistic, len(expected) - 1) > 1e-3
    assert min(expected.values()) > 5


def test_too_many_trajectories_are_refused_with_a_remedy():
    with pytest.raises(UsageError, match=r"garnet 0 has more than 1000000 trajectories of \d+ steps; enumerate a"):
        enumerate_trajectories(garnet(), jnp.log(jnp.full((6, 3), 1 / 3)))


# --- the mean of every estimator, exactly ---


class World(NamedTuple):
    """Every trajectory of the unrolled process, in which a state says the time, under the policy of a seed; with the
    exact values of another policy, the target, which may be the same one."""

    every: Enumeration
    value: Any  # of the target; these four are looked up at each step, [T, N]
    next_value: Any
    q: Any
    advantage: Any
    log_prob: Any
    table: Any  # advantages, [S, A]
    gradient: np.ndarray  # the target's


def world(actor_seed: int, target_seed: int, num_steps: int | None = None) -> World:
    every = enumerated(UNROLLED, pi_of(UNROLLED, actor_seed), num_steps)
    policy = log_policy(tabular_policy(UNROLLED), UNROLLED.num_states)
    (value, q, advantage), gradient = in_float64(
        quick_jit(lambda params: (values(UNROLLED, policy(params)), bellman_gradient(UNROLLED, policy, params))),
        {"params": {"logits": logits(target_seed)}},
    )
    obs, action, *_, next_obs = every.trajectory
    log_prob = np.log(pi_of(UNROLLED, target_seed))[obs, action]
    return World(
        every,
        value[obs],
        value[next_obs],
        q[obs, action],
        advantage[obs, action],
        log_prob,
        advantage,
        gradient["params"]["logits"],
    )


def mean_estimate(w: World, weight: Any, target_seed: int) -> np.ndarray:
    """E sum_t grad log pi(a_t|s_t) * weight_t, the score in closed form: one-hot less pi."""
    obs, action, *_ = w.every.trajectory
    pi, total = pi_of(UNROLLED, target_seed), np.zeros((2, 2))
    mass = np.where(w.every.mask, w.every.probability * weight, 0.0)
    np.add.at(total, UNROLLED.alias[obs], mass[..., None] * (np.eye(2)[action] - pi[obs]))
    return total


def error(estimate: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))


POWER = MDP.gamma ** np.arange(4)[:, None]  # in double precision


LAMBDAS, STEPS = (0.0, 0.4, 0.9, 1.0), (1, 2, 3, 4)


@pytest.fixture(scope="module", params=[None, 3], ids=["whole episodes", "three steps"])
def mean_advantage(request):
    """(w, num_steps, mean): the mean of each estimate given s_t and a_t, `[S, A]`, nan where neither is met, for any
    error in the values."""
    w = world(0, 0, request.param)
    trajectory, mask, probability = w.every
    index = np.where(mask, trajectory.obs, 0), np.where(mask, trajectory.action, 0)

    @quick_jit
    def estimates(data: tuple[Any, Any, Any, Any, Any]) -> Any:
        by_gae = {f"lambda {lam}": gae(*data, MDP.gamma, lam)[0] for lam in LAMBDAS}
        by_steps = {f"{n} steps": n_step(*data, MDP.gamma, n)[0] for n in STEPS}
        return by_gae | by_steps | {"TD": td_error(*data[:4], MDP.gamma)}

    def mean_by_state_and_action(x: Any) -> np.ndarray:
        total = np.zeros(w.table.shape)
        np.add.at(total, index, mask * probability * x)
        return total

    reached = mean_by_state_and_action(1.0)
    assert (reached > 0).any()

    def mean(error: np.ndarray, truncated: np.ndarray) -> dict[str, np.ndarray]:
        value, next_value = w.value + error[trajectory.obs], w.next_value + error[trajectory.next_obs]
        got = in_float64(estimates, (trajectory.reward, value, next_value, trajectory.terminated, truncated))
        with np.errstate(invalid="ignore"):
            return {name: mean_by_state_and_action(x) / reached for name, x in got.items()}

    return w, request.param, mean


def test_with_exact_values_the_mean_of_every_estimate_is_the_advantage(mean_advantage):
    """Of GAE for every lambda and of n-step advantages for every n, given each s_t and a_t: in whole episodes, in
    experience that is truncated, and where it merely stops and no flag says so."""
    w, num_steps, mean = mean_advantage
    truncated = w.every.trajectory.truncated
    assert truncated.any() == (num_steps is not None)
    for flags in (truncated, np.zeros_like(truncated)):
        for name, x in mean(np.zeros(len(w.table)), flags).items():
            met = ~np.isnan(x)
            np.testing.assert_allclose(x[met], w.table[met], atol=1e-10, err_msg=name)


def test_with_wrong_values_the_bias_of_every_estimate_is_the_one_worked_out(mean_advantage):
    """With e the error, 0 at terminal states, and L steps left: of GAE
    -e(s) + sum_{k=1}^{L-1} gamma^k lambda^(k-1) (1 - lambda) E e(s_k) + gamma^L lambda^(L-1) E e(s_L),
    and of n steps -e(s) + gamma^m E e(s_m), m the smaller of n and L."""
    w, num_steps, mean = mean_advantage
    gamma, S, alive = MDP.gamma, MDP.num_states, ~UNROLLED.terminal
    wrong = np.random.default_rng(0).normal(size=len(alive))
    onward = UNROLLED.transition * alive
    step = np.einsum("sa,sat->st", pi_of(UNROLLED, 0), onward)
    ahead = [onward @ np.linalg.matrix_power(step, k) @ (alive * wrong) for k in range(4)]  # ahead[k-1] = E e(s_k)
    left = np.maximum(1, (num_steps or 4) - np.arange(len(alive)) // S)  # the time is in the state

    def bias(share: Callable[[int, int], float]) -> np.ndarray:
        """-e(s) + sum_k gamma^k share(k, L) E e(s_k)."""
        return np.stack(
            [
                -wrong[s] + sum(gamma**k * share(k, L) * ahead[k - 1][s] for k in range(1, L + 1))
                for s, L in enumerate(left)
            ]
        )

    expected = {
        f"lambda {lam}": bias(lambda k, L, lam=lam: lam ** (k - 1) * (1 - lam if k < L else 1)) for lam in LAMBDAS
    }
    expected |= {f"{n} steps": bias(lambda k, L, n=n: k == min(n, L)) for n in STEPS}
    expected["TD"] = expected["1 steps"]
    truncated = w.every.trajectory.truncated
    for flags in (truncated, np.zeros_like(truncated)):
        for name, x in mean(wrong, flags).items():
            met = ~np.isnan(x)
            got = (x - w.table)[met]
            np.testing.assert_allclose(got, expected[name][met], atol=1e-10, err_msg=name)
            assert np.abs(got).max() > 0.1


@pytest.fixture(scope="module")
def on_policy() -> World:
    return world(0, 0)


def test_every_textbook_weight_has_the_exact_gradient_for_its_mean(on_policy):
    w = on_policy
    reward, mask = w.every.trajectory.reward, w.every.mask
    to_go, total, power = in_float64(
        quick_jit(
            lambda reward, mask: (
                discounted_return(reward, mask, MDP.gamma),
                total_return(reward, mask, MDP.gamma),
                discount_power(mask, MDP.gamma),
            )
        ),
        reward,
        mask,
    )
    np.testing.assert_allclose(power, POWER, rtol=1e-6)  # float32
    weights = {
        "total return": total,
        "total return less its start's value": total - w.value[0],
        "return to go": POWER * to_go,
        "return to go less V": POWER * (to_go - w.value),
        "Q": POWER * w.q,
        "A": POWER * w.advantage,
    }
    for name, weight in weights.items():
        assert error(mean_estimate(w, weight, 0), w.gradient) < 1e-10, name
    for weight in (to_go, to_go - w.value, w.advantage):
        assert error(mean_estimate(w, weight, 0), w.gradient) > 0.01  # gamma^t left out


def test_ratios_of_whole_products_make_another_policys_trajectories_unbiased_and_per_step_ratios_do_not():
    """Enumerated under one policy, the gradient of another. Per step: E over the wrong states."""
    w = world(1, 0)
    trajectory, mask, _ = w.every
    assert error(mean_estimate(w, POWER * w.q, 0), w.gradient) > 0.1

    def ratios(log_prob: Any, old_log_prob: Any, reward: Any, mask: Any) -> Any:
        by_trajectory = trajectory_ratio(log_prob, old_log_prob, mask)
        by_decision = per_decision_ratio(log_prob, old_log_prob, mask)
        total = total_return(reward, mask, MDP.gamma)
        to_go = discounted_return(by_decision * POWER * reward, mask, 1.0)
        return by_trajectory, by_decision, total, to_go

    by_trajectory, by_decision, total, to_go = in_float64(
        quick_jit(ratios), w.log_prob, trajectory.log_prob, trajectory.reward, mask
    )
    unbiased = {
        "trajectory, total return": by_trajectory * total,
        "trajectory, Q": by_trajectory * POWER * w.q,
        "per decision, Q": by_decision * POWER * w.q,
        "per decision, A": by_decision * POWER * w.advantage,
        "per decision, its own rewards": to_go,
    }
    for name, weight in unbiased.items():
        assert error(mean_estimate(w, weight, 0), w.gradient) < 1e-10, name
    per_step = np.exp(w.log_prob - trajectory.log_prob)
    for weight in (per_step * POWER * w.q, per_step * POWER * w.advantage, by_decision * total):
        assert error(mean_estimate(w, weight, 0), w.gradient) > 0.01


def test_trajectories_cut_after_k_steps_give_the_gradient_of_a_horizon_of_k(on_policy):
    """As does a time limit, since nothing is bootstrapped."""

    def gradient(mdp: FiniteMDP, num_steps: int | None) -> np.ndarray:
        policy, params = log_policy(tabular_policy(mdp), mdp.num_states), {"params": {"logits": logits(0)}}
        got = in_float64(lambda params: trajectory_gradient(mdp, policy, params, num_steps), params)
        return got["params"]["logits"]

    same(gradient(FOREVER, 4), on_policy.gradient)
    same(gradient(LIMITED, None), on_policy.gradient)
    assert error(gradient(LIMITED, 3), on_policy.gradient) > 0.01


# --- where the states of an experience lie ---


@pytest.mark.parametrize("mdp", [MDP, LIMITED, FOREVER], ids=["terminating", "time limit", "for ever"])
def test_without_restarts_states_lie_where_the_trajectories_are(mdp):
    pi = pi_of(mdp, 0)
    trajectory, mask, probability = enumerated(mdp, pi, 6 if mdp.horizon is None else None)
    got = state_distributions(mdp, np.log(pi), 6, restart=False)
    expected = np.zeros((6, 4))
    for t in range(len(mask)):
        expected[t] = np.bincount(trajectory.obs[t], mask[t] * probability, minlength=4)
    assert got.shape == (6, 4)
    np.testing.assert_allclose(got, expected, atol=1e-14)


def test_the_discounted_sum_of_state_distributions_is_the_visitation():
    pi = pi_of(FOREVER, 0)
    power = FOREVER.gamma ** np.arange(500)
    d = in_float64(quick_jit(lambda log_pi: visitation(FOREVER, log_pi)), np.log(pi))
    same(power @ state_distributions(FOREVER, np.log(pi), 500, restart=False), d)


@pytest.mark.parametrize("mdp", [MDP, LIMITED, FOREVER], ids=["terminating", "time limit", "for ever"])
def test_with_restarts_states_lie_where_the_chain_of_clocks_and_states_is(mdp):
    """A Markov chain of (clock, state) that goes on at (0, start) from wherever an episode ends."""
    T, S, pi = 12, 4, pi_of(mdp, 0)
    H = mdp.horizon or T
    P = np.einsum("sa,sat->st", pi, mdp.transition)
    chain = np.zeros((H, S, H, S))
    for t, s, s_next in np.ndindex(H, S, S):
        if mdp.terminal[s_next] or t + 1 == H:
            chain[t, s, 0] += P[s, s_next] * mdp.start
        else:
            chain[t, s, t + 1, s_next] += P[s, s_next]
    chain = chain.reshape(H * S, H * S)
    first = np.zeros((H, S))
    first[0] = mdp.start
    expected = [(first.ravel() @ np.linalg.matrix_power(chain, t)).reshape(H, S).sum(0) for t in range(T)]
    got = state_distributions(mdp, np.log(pi), T, restart=True)
    np.testing.assert_allclose(got, expected, atol=1e-14)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-14)
    assert not got[:, 2].any()


def test_trajectories_without_a_longest_one_are_refused_at_once():
    loop = FiniteMDP(np.ones((1, 1, 1)), np.zeros((1, 1)), np.ones(1), 0.9, name="loop")
    with pytest.raises(UsageError, match=r"loop .* any length: num_steps"):
        enumerate_trajectories(loop, np.zeros((1, 1)))
    with pytest.raises(UsageError, match=r"num_steps \(0\)"):
        enumerate_trajectories(loop, np.zeros((1, 1)), num_steps=0)
    assert enumerate_trajectories(loop, np.zeros((1, 1)), num_steps=3).mask.shape == (3, 1)


def test_a_deterministic_policy_has_one_trajectory_in_a_deterministic_process():
    with np.errstate(divide="ignore"):
        log_pi = np.log(np.tile([0.0, 1.0], (6, 1)))
    every = enumerate_trajectories(aliased(), log_pi)
    np.testing.assert_array_equal(every.probability, [1.0])
    np.testing.assert_array_equal(every.trajectory.obs, [[0], [1]])
