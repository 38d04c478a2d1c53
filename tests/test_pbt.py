"""Population-based training: who copies whom, what a copy takes over, and that no block and no stop changes it."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_options, shared_programs

import purepg.run.population
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.pbt import FACTORS, POPULATION, RESAMPLED, Interval, explored, parents, tuned
from purepg.run.arguments import arguments
from purepg.run.experiment import train_population
from purepg.run.lineage import ancestors, best_members
from purepg.run.load import load
from purepg.run.plan import RunConfig
from purepg.run.results import Results
from purepg.run.search import Uniform
from purepg.run.watch.lineage import lineage_figure
from purepg.train import guard, scheduled, train
from purepg.types import Algorithm, State, UpdateSteps, UsageError

NEVER = -np.inf


def copied(score: Any, finite: Any = None, num_keys: int = 200) -> np.ndarray:
    """`[num_keys, H]` whom each member copies, by as many keys."""
    score = jnp.array(score, jnp.float32)
    finite = jnp.ones(len(score), bool) if finite is None else jnp.array(finite)
    keys = jax.random.split(jax.random.key(0), num_keys)
    return np.asarray(jax.vmap(parents, (0, None, None))(keys, score, finite))


def test_the_lowest_fifth_copies_the_highest_uniformly_and_the_others_nobody():
    score = [5.0, 1.0, 9.0, 3.0, 8.0, 2.0, 4.0, 6.0, 7.0, 5.5]  # the lowest are 1 and 5, the highest 2 and 4
    found = copied(score, num_keys=2000)
    others = [0, 2, 3, 4, 6, 7, 8, 9]
    assert (found[:, others] == others).all()
    for h in (1, 5):
        assert set(found[:, h]) == {2, 4} and abs(np.mean(found[:, h] == 2) - 0.5) < 0.06
    independent = np.mean((found[:, 1] == 2) & (found[:, 5] == 2))
    assert abs(independent - 0.25) < 0.06


@pytest.mark.parametrize("num, replaced", [(2, 1), (4, 1), (9, 1), (10, 2), (16, 3)])
def test_a_fifth_is_rounded_down_and_at_least_one(num, replaced):
    found = copied(np.arange(num))
    assert (found[:, replaced:] == np.arange(replaced, num)).all()
    assert found[:, :replaced].min() == num - replaced and found[:, :replaced].max() == num - 1


def test_a_member_without_a_finite_score_or_that_diverged_ranks_lowest_and_is_never_copied():
    for score, finite in [
        ([3.0, np.nan, 2.0, 1.0], None),
        ([3.0, np.inf, 2.0, 1.0], None),
        ([3.0, NEVER, 2.0, 1.0], None),
        ([3.0, 9.0, 2.0, 1.0], [True, False, True, True]),
    ]:
        assert (copied(score, finite) == [0, 0, 2, 3]).all()
    assert (copied([NEVER] * 5) == np.arange(5)).all()  # nobody has a score yet


def test_equal_scores_copy_nothing_and_are_replaced_in_random_order():
    assert (copied([7.0] * 10) == np.arange(10)).all()
    found = copied([1.0] * 9 + [2.0], num_keys=900)
    often = np.mean(found[:, :9] == 9, axis=0)  # two are in the lowest fifth; half of those draw the better one
    np.testing.assert_allclose(often, 2 / 9 / 2, atol=0.05)


@pytest.mark.parametrize("interval", [Interval(1e-4, 1e-1, True), Interval(0.5, 1.5, False)])
def test_a_copy_is_multiplied_by_either_factor_or_drawn_anew_from_its_range(interval):
    value, keys = jnp.float32(1e-2 if interval.log else 1.0), jax.random.split(jax.random.key(1), 4000)
    found = np.asarray(jax.vmap(explored, (0, None, None))(keys, value, interval))
    low, high = (np.isclose(found, factor * value, rtol=1e-5) for factor in FACTORS)
    anew = found[~low & ~high]
    assert abs(len(anew) / len(found) - RESAMPLED) < 0.03 and abs(np.mean(low) - np.mean(high)) < 0.05
    ends = np.array([interval.low, interval.high])
    share = np.diff(np.log([np.full(len(anew), ends[0]), anew]), axis=0)[0] / np.log(ends[1] / ends[0])
    if not interval.log:
        share = (anew - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(np.histogram(share, 4, (0, 1))[0] / len(anew), 0.25, atol=0.06)


def test_values_stay_in_their_range():
    for value, interval in [(0.98, Interval(0.9, 0.999, False)), (1.1e-4, Interval(1e-4, 1e-3, True))]:
        keys = jax.random.split(jax.random.key(2), 200)
        found = np.asarray(jax.vmap(explored, (0, None, None))(keys, jnp.float32(value), interval))
        assert (found >= np.float32(interval.low)).all() and (found <= np.float32(interval.high)).all()


def toy(hyper: Any) -> Algorithm:
    """Its parameter grows by `rate` in each update, its world by 1, and its return is the parameter; a rate of 100 is
    a step to infinity."""

    def step(key, state, update):
        del key
        after = state.learner + jnp.where(hyper["rate"] >= 100, jnp.inf, hyper["rate"])
        metrics = {"env_steps": jnp.int32(1), "num_episodes": jnp.int32(1), "episode_return": state.learner}
        return State(after, state.world + 1), metrics | {"world": state.world, "learner": state.learner}

    def init(key):
        return State(jnp.float32(0.0), 1000.0 * jax.random.uniform(key))

    return guard(Algorithm(init, step, lambda state, deterministic: None, UpdateSteps(1, 1)), 100)  # pyright: ignore


def trained(rates: Any, every: int, lengths: Any) -> tuple[State, dict[str, np.ndarray]]:
    """The toy as a population of these rates, in blocks; the metrics are `[H, U]`."""
    key, keys = jax.random.key(5), jax.random.split(jax.random.key(6), len(rates))
    rates = jnp.array(rates, jnp.float32)

    def member(rate):
        return tuned(toy, {"rate": rate}, {"rate": Interval(1e-3, 50.0, True)}, key, every)

    @partial(jax.jit, static_argnums=2)
    def advance(state, start, length):
        block = lambda rate, state: train(key, member(rate), state, start, length)  # noqa: E731
        return jax.vmap(block, axis_name=POPULATION)(rates, state)

    state, blocks = jax.vmap(lambda rate, key: member(rate).init(key))(rates, keys), []
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        state, metrics = advance(state, start, length)
        blocks.append(jax.device_get(metrics))
    return state, {name: np.concatenate([block[name] for block in blocks], axis=-1) for name in blocks[0]}


def test_a_copy_has_the_learner_and_new_hyperparameters_in_its_own_world():
    state, found = trained([1.0, 2.0, 3.0, 4.0], 3, [8])
    parent, learner, rate, own = found["parent"], found["learner"], found["hyper/rate"], np.arange(4)[:, None]
    np.testing.assert_array_equal((parent != own).sum(0), [0, 0, 0, 1, 0, 0, 1, 0])
    for u in (3, 6):
        score = learner[:, u - 3 : u].mean(1)  # the returns since the last round
        (h,) = np.flatnonzero(parent[:, u] != own[:, 0])
        assert h == score.argmin() and parent[h, u] == score.argmax()
        assert np.isclose(rate[h, u] / rate[parent[h, u], u - 1], FACTORS, rtol=1e-6).any()  # neither is drawn anew
    # Each update goes on from the learner of whom was copied, by the rate that is logged.
    after = np.take_along_axis((learner + rate)[:, :-1], parent[:, 1:], axis=0)
    np.testing.assert_allclose(learner[:, 1:], after, rtol=1e-6)
    np.testing.assert_allclose(state.learner, (learner + rate)[:, -1], rtol=1e-6)
    np.testing.assert_allclose(np.diff(found["world"]), 1.0, atol=1e-3)
    kept = (parent == own)[:, 1:]
    assert (rate[:, 1:] == rate[:, :-1])[kept].all() and (rate[:, 1:] != rate[:, :-1])[~kept].all()


def test_blocks_of_any_length_agree_and_nothing_follows_the_last_update():
    (state, whole), (in_blocks, blocks) = (trained([1.0, 2.0, 3.0], 2, lengths) for lengths in ([6], [3, 3]))
    for a, b in zip(jax.tree.leaves((state, whole)), jax.tree.leaves((in_blocks, blocks)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [np.sum(whole["parent"][:, u] != np.arange(3)) for u in range(6)] == [0, 0, 1, 0, 1, 0]
    np.testing.assert_array_equal(state.guard.hyper["rate"], whole["hyper/rate"][:, -1])


def test_a_member_that_diverged_is_revived_by_a_copy():
    state, found = trained([2.0, 100.0, 1.0], 3, [5])
    np.testing.assert_array_equal(found["finite"], [[True] * 5, [False] * 3 + [True] * 2, [True] * 5])
    assert found["parent"][1].tolist() == [1, 1, 1, 0, 1] and np.diff(found["learner"][1]).tolist()[:2] == [0, 0]
    np.testing.assert_allclose(found["learner"][1, 3], 6.0)
    assert np.asarray(state.guard.guard.finite).all() and np.isfinite(state.learner).all()


def test_the_score_of_a_round_without_episodes_is_that_of_the_round_before():
    """The toy's first member has no episode in the second round; it keeps the highest score, and is copied."""
    key = jax.random.key(0)

    def member(rate):
        def make(hyper):
            algorithm = toy(hyper)

            def step(key, state, update):
                state, metrics = algorithm.step(key, state, update)
                silent = (hyper["rate"] == 50.0) & (update >= 2)
                return state, metrics | {"num_episodes": jnp.where(silent, 0, 1)}

            return algorithm._replace(step=step)

        return tuned(make, {"rate": rate}, {"rate": Interval(1e-3, 50.0, True)}, key, 2)

    rates = jnp.array([50.0, 2.0, 1.0])
    state = jax.vmap(lambda rate: member(rate).init(key))(rates)
    block = jax.vmap(lambda rate, state: train(key, member(rate), state, 0, 5), axis_name=POPULATION)
    state, found = jax.jit(block)(rates, state)
    assert found["parent"][:, 2].tolist() == [0, 1, 0] and np.sum(found["parent"][:, 4] == 0) == 2
    assert state.guard.score[0] == 25.0  # of the returns 0 and 50


def test_ancestors_are_whom_a_learner_came_from():
    """Each of the toy's updates adds a rate, so that a learner is the sum of its ancestors' rates."""
    state, found = trained([1.0, 2.0, 3.0, 4.0, 5.0], 2, [9])
    held = ancestors(found["parent"][:, None].astype(float))[:, 0]
    assert (held != np.arange(5)[:, None]).any()
    np.testing.assert_allclose(np.take_along_axis(found["hyper/rate"], held, 0).sum(1), state.learner, rtol=1e-5)


def test_the_best_member_has_the_highest_return_since_its_lineage_s_last_updates():
    parent = np.array([[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 2, 2]], float)[:, None]
    returns = np.array([[9, 9, 4, 1], [1, 1, 1, 2], [5, 5, 2, 2]], float)[:, None]
    metrics = {"parent": parent, "episode_return": returns, "num_episodes": np.ones((3, 1, 4))}
    best = best_members(metrics | {"env_steps": np.ones((3, 1, 4))}, every=2)
    assert best.member.tolist() == [1] and best.score.tolist() == [3.0]  # (4 + 2) / 2, not (1 + 2) / 2
    assert best.held.tolist() == [[0, 0, 0, 1]]
    silent = metrics | {"env_steps": np.ones((3, 1, 4)), "num_episodes": np.array([[[1.0, 1, 0, 0]]] * 3)}
    assert best_members(silent, every=2).score.tolist() == [9.0]


PPO = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1)
NETWORK = NetworkConfig(hidden=(4,))
SMALL: Any = {"eval_episodes": 3, "log_every": 4, "devices": 1, "wandb": "disabled"}
RUN = RunConfig("CartPole-v1", 160, 2, seed=7, search=5, pbt=48, fresh_seeds=2, **SMALL)
SWEEP = {"learning_rate": Uniform(1e-2, 1.0, log=True), "gamma": Uniform(0.9, 0.99)}


def population(run: RunConfig = RUN, sweep: Any = SWEEP, config: Any = PPO, algorithm: Any = ppo, **of: Any) -> Results:
    return train_population(algorithm, config, actor_critic, NETWORK, run, sweep=sweep, **of)


@pytest.fixture(scope="module", autouse=True)
def programs():
    with shared_programs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            purepg.run.population, "compile_options", quick_options
        )  # these tests compile much and run little
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return population(replace(RUN, out=tmp_path_factory.mktemp("pbt") / "out"))


def test_a_run_is_that_of_one_block_and_until_the_first_round_a_search(results):
    alone = replace(RUN, fresh_seeds=0)
    whole, search = population(replace(alone, log_every=0)), population(replace(alone, pbt=None))
    copies = results.metrics["parent"] != np.arange(5)[:, None, None]
    np.testing.assert_array_equal(copies.sum(0), [[0, 0, 0, 1, 0, 0, 1, 0, 0, 1]] * 2)
    assert (results.metrics["parent"][:, 0] != results.metrics["parent"][:, 1]).any()  # of its own in each repetition
    for name, x in whole.metrics.items():
        np.testing.assert_array_equal(x, results.metrics[name], err_msg=name)
    for name, x in search.metrics.items():
        np.testing.assert_allclose(x[..., :3], results.metrics[name][..., :3], rtol=1e-5, err_msg=name)
    for name in SWEEP:
        first = np.reshape(results.swept[name], (5, 1, 1)).astype(np.float32)
        np.testing.assert_array_equal(results.metrics[f"hyper/{name}"][..., :3], np.broadcast_to(first, (5, 2, 3)))


def test_the_report_is_of_the_best_member_of_each_repetition_chosen_by_training(results):
    found = results.summary["pbt"]
    best = best_members(results.metrics, every=3)
    assert found["members"] == best.member.tolist() and found["training"]["finals"] == best.score.tolist()
    assert found["finals"] == [results.final_return[h, s] for s, h in enumerate(best.member)]
    for s, h in enumerate(best.member):
        for name, value in found["hyperparameters"][s].items():
            assert np.float32(value) == results.metrics[f"hyper/{name}"][h, s, -1]
    assert "best member of each seed" in str(results)
    assert {"curves.png", "lineage.png"} == {path.name for path in results.out.glob("*.png")}


def test_the_picture_has_every_member_who_copied_whom_and_the_lineage_of_the_best():
    rate, gamma = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 4.0]]), np.full((2, 3), 0.9)
    parent, returns = np.array([[0, 1, 0], [1, 1, 0]]), np.array([[1.0, np.nan, 3.0], [2.0, 4.0, 5.0]])
    hyper, edges = {"rate": rate, "gamma": gamma}, np.array([0, 10, 20, 25])
    figure = lineage_figure(hyper, returns, parent, np.array([1, 0, 0]), edges, "title", ["rate"])
    axes = figure.axes[0]
    assert [x.get_yscale() for x in figure.axes[:2]] == ["log", "linear"] and axes.get_title(loc="left") == "rate"
    (lines,) = axes.collections
    found = [segment.tolist() for segment in lines.get_segments()]  # pyright: ignore[reportAttributeAccessIssue]
    assert found[:2] == [[[0, 1], [10, 1]], [[10, 3], [20, 3]]] and found[5] == [[20, 4], [25, 4]]
    drawn = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert drawn[:4] == [[[5, 2], [10, 3]], [[10, 1]], [[15, 3], [20, 4]], [[20, 2]]]  # a copy, and whom it replaced
    assert drawn[4] == [[0, 2], [5, 2], [10, 3], [20, 3], [20, 3], [25, 3]]


def test_a_loaded_member_has_its_last_hyperparameters_and_no_others(results):
    member = load(results.out, 3, 1)
    assert member.label == results.agent(3, 1).label
    for name in SWEEP:
        assert f"{name}={results.metrics[f'hyper/{name}'][3, 1, -1]!s}" in member.label
    step = jax.eval_shape(member.algorithm.step, jax.random.key(0), member.state, jnp.int32(0))[1]
    assert set(step) == set(results.metrics) - {"parent", "hyper/learning_rate", "hyper/gamma"}


def test_the_schedule_of_the_best_member_is_trained_again_on_fresh_seeds(results):
    assert results.out
    winner, found = results.winner, results.summary["winner"]
    assert winner and (winner.plan.run.search, winner.plan.run.pbt, winner.plan.run.seed) == (None, None, 7 + 2**31)
    best = best_members(results.metrics, every=3)
    s = int(best.score.argmax())
    assert found["setting"] == best.member[s] and found["finals"] == winner.final_return[0].tolist()
    for change in winner.plan.schedule:
        used = [change.at(u) for u in range(10)]
        metric = results.metrics[f"hyper/{change.field}"]
        np.testing.assert_array_equal(used, [metric[h, s, u] for u, h in enumerate(best.held[s])])
    assert {change.field for change in winner.plan.schedule} == set(SWEEP)
    again = arguments(results.out / "best.json")
    assert again["run"].schedule == winner.plan.run.schedule and not again["sweep"]
    assert again["config"].learning_rate == results.summary["pbt"]["hyperparameters"][s]["learning_rate"]
    assert "the best member's schedule" in str(results).splitlines()[-1]


def test_a_schedule_holds_each_value_from_its_environment_step_on():
    """From the update at step 33 on, which is the third, a rate of almost 0 moves no parameter."""
    run = replace(RUN, total_steps=96, num_seeds=1, search=None, pbt=None, fresh_seeds=None, log_every=0)
    kl = population(replace(run, schedule=("learning_rate=0:0.01,33:1e-30",)), {}).metrics["reverse_kl"][0, 0]
    assert (kl[:3] > 1e-9).all() and (kl[3:] == 0).all()


def test_an_algorithm_on_a_schedule_is_in_each_update_as_it_was_made_for_it():
    algorithm = scheduled(lambda update: toy({"rate": jnp.float32(update)}))
    state, metrics = jax.jit(lambda key: train(key, algorithm, algorithm.init(key), 0, 5))(jax.random.key(0))
    assert metrics["learner"].tolist() == [0, 0, 1, 3, 6] and state.learner == 10


@pytest.mark.parametrize(
    "text, said",
    [
        ("rate=0:1", "cannot sweep 'rate'; what can be swept"),
        ("num_epochs=0:1", "schedule (num_epochs=0:1) must be of a float that is named nowhere else"),
        ("gamma=0:0.9", "schedule (gamma=0:0.9) must be of a float that is named nowhere else"),
        ("learning_rate=16:1", "schedule learning_rate (16:1) must be STEP:VALUE,STEP:VALUE,... from step 0 on"),
        ("learning_rate=0:1,32:2,16:3", "must be STEP:VALUE,STEP:VALUE,... from step 0 on, in this order"),
        ("learning_rate=0:x", "schedule learning_rate ('x') must be a number"),
        ("learning_rate=0:1,16:-1", "learning_rate (-1.0) must be above 0"),
    ],
)
def test_a_wrong_schedule_is_refused_in_one_line(text, said):
    run = replace(RUN, search=None, pbt=None, fresh_seeds=None, schedule=(text,))
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        population(run, {"gamma": [0.9]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "run, sweep, said",
    [
        ({"search": None}, {"gamma": [0.9, 0.99]}, "pbt (48) needs --search, with at least 2 members: --search 16"),
        ({"search": 1, "fresh_seeds": 0}, SWEEP, "pbt (48) needs --search, with at least 2 members"),
        ({}, SWEEP | {"num_epochs": Uniform(1, 4)}, "pbt (48) tunes ranges of floats: sweep num_epochs must be one"),
        ({}, SWEEP | {"gae_lambda": [0.9, 0.95]}, "sweep gae_lambda must be one, or be left out"),
        ({"pbt": 160}, SWEEP, "pbt (160) must be at most 144 environment steps, so that there is a round"),
        ({"halve": 2}, SWEEP, "halve (2) and pbt (48) are different ways to search: give one of them"),
        ({"max_parallel": 4}, SWEEP, "max_parallel (4) must be at least 5, the members of pbt"),
        ({"devices": 2, "num_seeds": 3}, SWEEP, "devices (2) must divide num_seeds (3)"),
        ({"schedule": ("gamma=0:0.9",)}, SWEEP, "schedule (gamma=0:0.9) must be of a float that is named nowhere else"),
    ],
)
def test_what_population_based_training_cannot_do_is_said_in_one_line(run, sweep, said):
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        population(replace(RUN, **run), sweep)
    assert "\n" not in str(error.value)


def test_updates_of_varying_length_are_refused():
    config = REINFORCEConfig(num_episodes=2, max_steps=15)
    with pytest.raises(UsageError, match=r"^pbt \(48\) needs updates of one length, but they take 2 to 30 steps$"):
        population(RUN, {"learning_rate": SWEEP["learning_rate"]}, config, reinforce)
