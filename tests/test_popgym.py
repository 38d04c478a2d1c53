"""POPGym's tasks: who remembers enough earns the most there is, decks are dealt to the last card, and rewards are as
published."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg import envs
from purepg.envs.suites.popgym import NAMES
from purepg.types import Box, Discrete, Env, MultiDiscrete, TimeStep, UsageError

N = 4
SIZES = ("Easy", "Medium", "Hard")
LENGTHS = {  # of an episode, or its time limit
    "RepeatPrevious": (51, 103, 155),
    "RepeatFirst": (51, 415, 831),
    "Autoencode": (103, 207, 311),
    "CountRecall": (51, 103, 207),
    "HigherLower": (51, 103, 155),
    "Concentration": (104, 208, 104),
    "Battleship": (64, 100, 144),
    "PositionOnlyCartPole": (200, 400, 600),
    "PositionOnlyPendulum": (200, 150, 100),
    "NoisyPositionOnlyCartPole": (200, 200, 200),
    "NoisyPositionOnlyPendulum": (200, 200, 200),
}
DECKS = {  # the kinds of cards, and how many of each are in the deck
    "RepeatPrevious": ((4, 13), (4, 26), (4, 39)),
    "RepeatFirst": ((4, 13), (4, 104), (4, 208)),
    "Autoencode": ((4, 13), (4, 26), (4, 39)),
    "CountRecall": ((2, 26), (4, 26), (13, 16)),
    "HigherLower": ((13, 4), (13, 8), (13, 12)),
}
games_of_cards = pytest.mark.parametrize("game", DECKS)
levels = pytest.mark.parametrize("level", [0, 1, 2])


@functools.cache
def made(name: str) -> Env:
    return envs.make(f"popgym/{name}")


@functools.cache
def player(name: str) -> Callable[[Any, Any], Any]:
    """Plays actions `[N, T, ...]` in N episodes: observations `[N, T + 1, ...]` and steps `[N, T]`."""
    env = made(name)

    def play(key, actions):
        k_reset, k_steps = jax.random.split(key)
        state, first = env.reset(k_reset)
        inputs = jax.random.split(k_steps, len(actions)), actions
        _, steps = jax.lax.scan(lambda state, x: env.step(x[0], state, x[1]), state, inputs)
        return jnp.concatenate([first[None], steps.obs]), steps

    return quick_jit(jax.vmap(play))


def play(name: str, actions: Any, keys: Any) -> tuple[np.ndarray, TimeStep]:
    return jax.device_get(player(name)(keys, jnp.asarray(actions)))


KEYS = jax.random.split(jax.random.key(1), N)


def last_suits(seen: np.ndarray, k: int) -> np.ndarray:
    """The k-th last suit at every step, 0 where there is none."""
    return np.concatenate([np.zeros((len(seen), k - 1), int), seen[:, :-k]], axis=1)


def recited(seen: np.ndarray) -> np.ndarray:
    n = seen.shape[1] // 2
    return np.concatenate([np.zeros((len(seen), n - 1), int), seen[:, n - 1 :: -1, 1]], axis=1)


def counted(seen: np.ndarray) -> np.ndarray:
    value, query = seen[:, :-1, 0], seen[:, :-1, 1]
    so_far = np.tril(np.ones((value.shape[1],) * 2, bool))
    return np.sum((value[:, None, :] == query[:, :, None]) & so_far, axis=-1)


# The right actions [N, T] of a level, from the observations [N, T + 1, ...] that precede each of them.
RIGHT = {
    "RepeatPrevious": lambda seen, level: last_suits(seen, (4, 32, 64)[level]),
    "RepeatFirst": lambda seen, level: np.repeat(seen[:, :1], seen.shape[1] - 1, axis=1),
    "Autoencode": lambda seen, level: recited(seen),
    "CountRecall": lambda seen, level: counted(seen),
}


@levels
@pytest.mark.parametrize("game", RIGHT)
def test_a_player_with_the_right_memory_earns_the_maximum_and_the_deck_ends_the_episode(game, level):
    name, length = game + SIZES[level], LENGTHS[game][level]
    seen, _ = play(name, np.zeros((N, length), np.int32), KEYS)
    again, steps = play(name, RIGHT[game](seen, level).astype(np.int32), KEYS)
    np.testing.assert_array_equal(seen, again)  # what is dealt does not depend on the actions
    np.testing.assert_allclose(steps.reward.sum(1), 1, rtol=1e-5)
    assert (steps.reward >= 0).all()
    assert steps.terminated[:, -1].all() and not steps.terminated[:, :-1].any() and not steps.truncated.any()


@levels
@games_of_cards
def test_a_deck_is_dealt_to_its_last_card(game, level):
    name, (kinds, of_each) = game + SIZES[level], DECKS[game][level]
    seen, _ = play(name, np.zeros((N, LENGTHS[game][level]), np.int32), KEYS)
    if game == "Autoencode":
        n = kinds * of_each
        np.testing.assert_array_equal(seen[..., 0], np.broadcast_to(np.arange(2 * n) < n - 1, seen.shape[:2]))
        assert not seen[:, n:, 1].any()
        seen = seen[:, :n, 1]
    for column in seen.reshape(N, -1, seen.shape[-1] if seen.ndim == 3 else 1).transpose(2, 0, 1):
        for episode in column:
            np.testing.assert_array_equal(np.bincount(episode, minlength=kinds), of_each)


@games_of_cards
def test_the_mean_return_of_random_play_is_that_of_guessing(game):
    """Exactly, over all constant actions on one deck: of A answers one is right, and earns what each other costs."""
    num_actions = {"CountRecall": 27, "HigherLower": 2}.get(game, 4)
    actions = np.broadcast_to(np.arange(num_actions, dtype=np.int32)[:, None], (num_actions, LENGTHS[game][0]))
    _, steps = play(f"{game}Easy", actions, KEYS[jnp.zeros(num_actions, int)])
    np.testing.assert_allclose(steps.reward.sum(1).mean(), 2 / num_actions - 1, atol=1e-6)


def test_cards_are_drawn_in_proportion_to_those_left():
    """Two neighbours in a shuffled deck are of one suit with probability 12 / 51, and a first card is any suit."""
    seen, _ = play("RepeatFirstEasy", np.zeros((4000, 51), np.int32), jax.random.split(jax.random.key(2), 4000))
    same = (seen[:, 1:] == seen[:, :-1]).mean()
    assert abs(same - 12 / 51) < 4 * np.sqrt(0.18 / (4000 * 51))
    for suit in range(4):
        assert abs((seen[:, 0] == suit).mean() - 1 / 4) < 4 * np.sqrt(0.1875 / 4000)


def test_repeat_previous_pays_nothing_before_there_are_k_cards_and_no_other_card_than_the_kth_last():
    seen, _ = play("RepeatPreviousEasy", np.zeros((N, 51), np.int32), KEYS)
    _, steps = play("RepeatPreviousEasy", last_suits(seen, 3).astype(np.int32), KEYS)
    assert not steps.reward[:, :3].any()
    right = last_suits(seen, 3) == last_suits(seen, 4)
    np.testing.assert_allclose(steps.reward[:, 3:], np.where(right, 1, -1)[:, 3:] / 48, rtol=1e-6)


@levels
def test_higher_lower_pays_by_the_next_rank_and_nothing_for_an_equal_one(level):
    name, length = f"HigherLower{SIZES[level]}", LENGTHS["HigherLower"][level]
    actions = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.5, (N, length)), np.int32)
    seen, steps = play(name, actions, KEYS)
    rise = np.sign(seen[:, 1:] - seen[:, :-1])
    np.testing.assert_allclose(steps.reward, rise * (1 - 2 * actions) / (length + 1), atol=1e-7)


# --- Concentration ---


class Memory:
    """A player that forgets no card that it has seen, one turn of two cards after the other."""

    def __init__(self, num_cards: int) -> None:
        self.unseen, self.alone, self.mismatches = list(range(num_cards)), {}, 0

    def turn(self, flip: Callable[[int], np.ndarray]) -> None:
        pair = next(((i, j) for i in self.alone for j in self.alone if i < j and self.alone[i] == self.alone[j]), None)
        i = pair[0] if pair else self.unseen.pop()
        self.alone[i] = flip(i)[i]
        known = next((j for j in self.alone if j != i and self.alone[j] == self.alone[i]), None)
        j = self.unseen.pop() if known is None else known
        self.alone[j] = flip(j)[j]
        if self.alone[i] == self.alone[j]:
            del self.alone[i], self.alone[j]
        else:
            self.mismatches += 1


@pytest.fixture(scope="module")
def singles():
    """The compiled reset and step of an environment by its name."""
    return functools.cache(lambda name: (made(name), quick_jit(made(name).reset), quick_jit(made(name).step)))


@pytest.mark.parametrize("level", [0, 2])
def test_a_player_who_forgets_no_card_finishes_concentration_in_time_and_pays_for_its_mismatches_only(level, singles):
    """A mismatch shows two new cards, so there are fewer than 26, and 26 pairs take the other 52 of 104 steps."""
    env, reset, step = singles(f"Concentration{SIZES[level]}")
    for seed in range(3):
        (state, first), memory, steps = reset(jax.random.key(seed)), Memory(52), []
        down = {0: 2, 2: 13}[level]
        assert (first == down).all()

        def flip(i, steps=steps, seed=seed):
            nonlocal state
            state, time_step = step(jax.random.key(1000 * seed + len(steps)), state, jnp.int32(i))
            steps.append(jax.device_get(time_step))
            return steps[-1].obs

        while not steps or not steps[-1].terminated:
            memory.turn(flip)
        assert len(steps) == 52 + 2 * memory.mismatches <= env.max_episode_steps
        np.testing.assert_allclose(sum(s.reward for s in steps), 1 - 2 * memory.mismatches / 104, rtol=1e-5)
        np.testing.assert_array_equal(np.bincount(steps[-1].obs), 52 // down)
        assert not any(s.truncated for s in steps[:-1])


def test_concentration_refuses_a_card_that_is_up_and_a_pair_of_one_card(singles):
    _, reset, step = singles("ConcentrationEasy")
    state, _ = reset(jax.random.key(0))
    found, t = [], 0

    def flip(*cards):
        nonlocal state, t
        for card in cards:
            state, time_step = step(jax.random.key(t), state, jnp.int32(card))
            t += 1
            found.append((float(time_step.reward), np.flatnonzero(time_step.obs != 2).tolist()))
        return found[-1]

    assert flip(5, 5) == (pytest.approx(-2 / 104), [5])
    partner = next(i for i in range(6, 52) if flip(5, i)[0] > 0)
    assert found[-1] == (pytest.approx(1 / 26), [5, partner])
    assert found[3:-1:2] == [(pytest.approx(-2 / 104), [5, i]) for i in range(6, partner)]
    assert flip(partner) == (pytest.approx(-1 / 104), [5, partner])  # it ends the turn at once
    assert flip(0, 5) == (pytest.approx(-2 / 104), [0, 5, partner])
    assert flip(5)[0] == pytest.approx(-1 / 104)


# --- Battleship ---


@levels
def test_a_shot_at_every_tile_finds_ships_of_twelve_tiles_and_who_knew_them_earns_one(level):
    name, size = f"Battleship{SIZES[level]}", (8, 10, 12)[level]
    tiles = np.stack(np.divmod(np.arange(size**2, dtype=np.int32), size), axis=-1)
    seen, steps = play(name, np.broadcast_to(tiles, (N, size**2, 2)), KEYS)
    hits = seen[:, 1:]
    np.testing.assert_array_equal(hits.sum(1), 12)
    found = np.cumsum(hits, 1)
    np.testing.assert_array_equal(steps.terminated, found == 12)
    np.testing.assert_array_equal(steps.truncated, np.broadcast_to(np.arange(size**2) == size**2 - 1, hits.shape))
    np.testing.assert_allclose(steps.reward, np.where(hits, 1 / 12, -1 / (size**2 - 12)), rtol=1e-6)
    np.testing.assert_allclose(steps.reward.sum(1), 0, atol=1e-6)

    order = np.argsort(-hits, axis=1, kind="stable")  # first all ships, then water; and then the first ship again
    shots = tiles[np.concatenate([order[:, :13], order[:, :1], order[:, 13:-1]], axis=1)]
    _, steps = play(name, shots, KEYS)
    np.testing.assert_allclose(steps.reward[:, :12].sum(1), 1, rtol=1e-6)
    assert steps.terminated[:, 11].all() and not steps.terminated[:, :11].any()
    np.testing.assert_allclose(steps.reward[:, 12:14], -1 / (size**2 - 12), rtol=1e-6)


def test_ships_lie_where_popgyms_rule_puts_them():
    """A start, a direction and its sign are drawn until the ship fits and touches no other's tile."""
    rng = np.random.default_rng(0)

    def by_rejection():
        board = np.zeros((8, 8), int)
        for length in (2, 3, 3, 4):
            while True:
                start, (axis, back) = rng.integers(8, size=2), rng.integers(2, size=2)
                end = start.copy()
                end[axis] += (1 - 2 * back) * (length - 1)
                (top, left), (bottom, right) = np.minimum(start, end), np.maximum(start, end)
                ship = board[top : bottom + 1, left : right + 1]
                if min(top, left) >= 0 and max(bottom, right) < 8 and not ship.any():
                    ship += 1
                    break
        return board

    num = 4000
    wanted = np.stack([by_rejection() for _ in range(num)]).mean(0)
    reset = quick_jit(jax.vmap(made("BattleshipEasy").reset))
    found = np.asarray(reset(jax.random.split(jax.random.key(0), num))[0].inner).mean(0)
    assert np.abs(found - wanted).max() < 4.5 * np.sqrt(2 * 0.19 * 0.81 / num)
    assert found[0, 0] < found[3, 3]


# --- Control ---


def gymnax_steps(name: str, actions: np.ndarray, keys: Any) -> tuple[np.ndarray, TimeStep]:
    """What gymnax's own environment shows of the same episodes, without a time limit."""
    env = envs.make(name, max_steps_in_episode=1000)

    def play(key, actions):
        state, first = env.reset(jax.random.split(key)[0])
        _, steps = jax.lax.scan(lambda state, action: env.step(key, state, action), state, actions)
        return jnp.concatenate([first[None], steps.obs]), steps

    return jax.device_get(quick_jit(jax.vmap(play))(keys, actions))


def test_cart_pole_shows_positions_only_and_a_whole_episode_pays_one():
    actions = np.broadcast_to(np.arange(210, dtype=np.int32) // 2 % 2, (N, 210))
    full, inner = gymnax_steps("CartPole-v1", actions, KEYS)
    seen, steps = play("PositionOnlyCartPoleEasy", actions, KEYS)
    np.testing.assert_allclose(seen, full[..., [0, 2]], rtol=1e-6)
    np.testing.assert_array_equal(steps.terminated, inner.terminated)
    np.testing.assert_array_equal(steps.truncated, np.broadcast_to(np.arange(1, 211) >= 200, (N, 210)))
    length = 1 + np.argmax(inner.terminated, 1)
    assert (length < 200).all(), "these actions must let the pole fall"
    np.testing.assert_allclose(steps.reward.sum(1), length / 200, rtol=1e-5)


@levels
def test_the_pendulums_cost_is_scaled_to_between_minus_one_and_one(level):
    limit = (200, 150, 100)[level]
    actions = np.asarray(jax.random.uniform(jax.random.key(0), (N, limit, 1), minval=-2, maxval=2))
    full, inner = gymnax_steps("Pendulum-v1", actions, KEYS)
    seen, steps = play(f"PositionOnlyPendulum{SIZES[level]}", actions, KEYS)
    np.testing.assert_allclose(seen, full[..., :2], atol=1e-5)
    np.testing.assert_allclose(steps.reward * limit, 1 + 2 * inner.reward / 16.2736044, atol=1e-4)
    assert steps.truncated[:, -1].all() and not steps.truncated[:, :-1].any() and not steps.terminated.any()


@levels
@pytest.mark.parametrize("game", ["CartPole", "Pendulum"])
def test_noise_has_the_levels_deviation_and_stays_within_the_space(game, level):
    std, num = (0.1, 0.2, 0.3)[level], 5000
    noisy, keys = made(f"NoisyPositionOnly{game}{SIZES[level]}"), jax.random.split(jax.random.key(0), num)

    def both(key):
        k_reset, k_step = jax.random.split(key)
        state, seen = noisy.reset(k_reset)
        _, first = made(f"PositionOnly{game}Easy").reset(jax.random.split(k_reset)[0])
        action = jnp.zeros(1) if game == "Pendulum" else jnp.int32(0)
        return seen, first, noisy.step(k_step, state, action)[1].obs

    seen, first, later = quick_jit(jax.vmap(both))(keys)
    for obs in (seen, later):
        assert (obs >= noisy.observation_space.low).all() and (obs <= noisy.observation_space.high).all()
    added = (seen - first)[:, 0][jnp.abs(first[:, 0]) < 0.1]  # far from the bounds
    np.testing.assert_allclose(np.std(added), std, rtol=4 / np.sqrt(2 * added.size))
    assert abs(np.mean(added)) < 4 * std / np.sqrt(added.size)
    if level == 2:
        assert (later == noisy.observation_space.high).any()


# --- Names, spaces and limits ---


def spaces(game: str, level: int) -> tuple[Any, Any]:
    if game in DECKS:
        kinds, of_each = DECKS[game][level]
        card = Discrete(kinds)
        return {
            "Autoencode": (MultiDiscrete((2, 4)), card),
            "CountRecall": (MultiDiscrete((kinds, kinds)), Discrete(of_each + 1)),
            "HigherLower": (card, Discrete(2)),
        }.get(game, (card, card))
    num_cards, size = (52, 104, 52)[level], (8, 10, 12)[level]
    return {
        "Concentration": (MultiDiscrete(((3, 3, 14)[level],) * num_cards), Discrete(num_cards)),
        "Battleship": (Discrete(2), MultiDiscrete((size, size))),
    }[game]


def test_names_lengths_and_spaces_are_popgyms():
    assert sorted(NAMES) == sorted(game + size for game in LENGTHS for size in SIZES)
    for game, lengths in LENGTHS.items():
        for level, length in enumerate(lengths):
            env = made(game + SIZES[level])
            assert (env.name, env.max_episode_steps) == (game + SIZES[level], length)
            if "PositionOnly" not in game:
                assert (env.observation_space, env.action_space) == spaces(game, level)
    high = made("NoisyPositionOnlyCartPoleHard").observation_space.high
    np.testing.assert_allclose(high, [4.8, 24 * np.pi / 180], rtol=1e-6)
    assert isinstance(made("PositionOnlyPendulumEasy").action_space, Box)


def test_a_limit_of_the_callers_own_truncates_earlier_and_pays_the_same():
    env = envs.make("popgym/RepeatFirstEasy", max_episode_steps=10)
    state, obs = env.reset(jax.random.key(0))
    ends = []
    for t in range(10):
        state, step = env.step(jax.random.key(t), state, obs)
        ends.append((bool(step.terminated), bool(step.truncated)))
        assert float(step.reward) == pytest.approx(1 / 51)
    assert ends == [(False, False)] * 9 + [(False, True)]
    assert envs.make("popgym/PositionOnlyCartPoleEasy", max_episode_steps=500).max_episode_steps == 200


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("popgym/Repeat", {}, "did you mean (popgym/Repeat(First|Previous)[A-Z][a-z]+( or |.$)){6}"),
        ("popgym/StatelessCartPoleEasy", {}, "did you mean .*popgym/PositionOnlyCartPoleEasy"),
        ("CountRecallEasy", {}, "in several suites: choose popgym/CountRecallEasy or popgym_arcade/CountRecallEasy"),
        ("popgym/RepeatPreviousEasy", {"k": 5}, "RepeatPreviousEasy has no parameter 'k'; it has max_episode_steps"),
        ("popgym/RepeatPreviousEasy", {"max_episode_steps": 0}, "must be a positive whole number"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(name, params, message):
    with pytest.raises(UsageError, match=message) as error:
        envs.make(name, params)
    assert "\n" not in str(error.value)
