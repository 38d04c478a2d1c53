"""Tasks of POPGym (Morad et al. 2023, arXiv 2303.01859; rules and rewards as at github.com/proroklab/popgym, 410d5aa),
in JAX. Policies need memory: observations hide what matters, or show it only once. Nothing has to be installed.

The returns of an episode compare with the paper's tables of maximum mean episodic reward (MMER). The names are those of
POPGym since 2023; the paper's StatelessCartPole is PositionOnlyCartPole, and likewise for the pendulum. The paper's
agents also saw the previous action and whether a step is the episode's first, which `previous=true` adds, with the
previous reward. The version of the paper did not tell time limits from terminal states, and could not answer the
largest count of CountRecall.

A deck is a number of cards of each kind, and a card is drawn when it is dealt or turned up. The observations have the
same distribution as those of a shuffled deck, and a reset is small.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.envs.contract import check_environment
from purepg.envs.gymnax import gymnax_env
from purepg.envs.suites.adapter import CLOCK, chosen
from purepg.envs.wrappers import partially_observed, time_limited
from purepg.types import Array, Discrete, Env, Key, MultiDiscrete, TimeStep

CARDS = 52  # of one deck
COLOURS, SUITS, RANKS = 2, 4, 13  # kinds of cards
SHIPS = (2, 3, 3, 4)  # their lengths


def popgym_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`.

    An episode whose deck or sequence ends is terminated; `max_episode_steps` is then its length. CartPole, Pendulum,
    Concentration and Battleship are truncated at their time limit. POPGym's present version says the same.

    Args:
      params: `max_episode_steps`, an earlier time limit. The task's own stays, since its rewards are a part of it.
    Raises:
      UsageError: a parameter is unknown, or not a positive whole number.
    """
    env = ENVIRONMENTS[name]()._replace(name=name)
    limit = chosen(name, params, max_episode_steps=env.max_episode_steps)[CLOCK]
    made = time_limited(env, limit) if CLOCK in params else env
    check_environment(made)
    return made


def deck(num_decks: int, num_kinds: int) -> Array:
    """The number of cards of each kind, int32 `[num_kinds]`."""
    return jnp.full(num_kinds, num_decks * CARDS // num_kinds, jnp.int32)


def deal(key: Key, left: Array) -> tuple[Array, Array]:
    """Draws a card of a deck with `left` `[K]` cards of each kind: (its kind, int32, the cards left after it). Of an
    empty deck the kind is K."""
    kind = jnp.sum(jnp.cumsum(left) <= jax.random.uniform(key) * jnp.sum(left), dtype=jnp.int32)
    return kind, left - (jnp.arange(left.size) == kind)


def paid(right: Array, num_answers: int) -> Array:
    """Plus or minus one part of an episode's maximum, 1."""
    return jnp.where(right, 1.0, -1.0) / num_answers


def played(obs: Array, reward: Array, terminated: Array) -> TimeStep:
    return TimeStep(obs, jnp.asarray(reward, jnp.float32), terminated, jnp.bool_(False))


class Repeat(NamedTuple):
    recent: Array  # int8 [k]: the last k suits, oldest first, and -1 before the first card
    left: Array


def repeat_previous(num_decks: int, k: int) -> Env:
    """Observes a suit a step, and asks for the one that is the k-th last, as soon as there are k."""

    def reset(key):
        suit, left = deal(key, deck(num_decks, SUITS))
        return Repeat(jnp.full(k, -1, jnp.int8).at[-1].set(suit.astype(jnp.int8)), left), suit

    def step(key, state, action):
        asked = state.recent[0]
        reward = jnp.where(asked >= 0, paid(action == asked, num_decks * CARDS - k), 0.0)
        suit, left = deal(key, state.left)
        recent = jnp.append(state.recent[1:], suit.astype(jnp.int8))
        return Repeat(recent, left), played(suit, reward, left.sum() == 0)

    return Env(reset, step, Discrete(SUITS), Discrete(SUITS), num_decks * CARDS - 1)


class First(NamedTuple):
    suit: Array  # of the first card
    left: Array


def repeat_first(num_decks: int) -> Env:
    """Observes a suit a step, and asks for the first of them at every step."""
    num_steps = num_decks * CARDS - 1

    def reset(key):
        suit, left = deal(key, deck(num_decks, SUITS))
        return First(suit, left), suit

    def step(key, state, action):
        suit, left = deal(key, state.left)
        return state._replace(left=left), played(suit, paid(action == state.suit, num_steps), left.sum() == 0)

    return Env(reset, step, Discrete(SUITS), Discrete(SUITS), num_steps)


class Dealt(NamedTuple):
    suits: Array  # int8 [n], those dealt so far, in order
    left: Array
    t: Array


def autoencode(num_decks: int) -> Env:
    """Deals the deck, and then asks for the suits in reverse order. Observes (1, suit) while cards follow, (0, suit) of
    the last card and (0, 0) from then on; only then do actions count."""
    n = num_decks * CARDS

    def reset(key):
        suit, left = deal(key, deck(num_decks, SUITS))
        suits = jnp.zeros(n, jnp.int8).at[0].set(suit.astype(jnp.int8))
        return Dealt(suits, left, jnp.int32(0)), jnp.stack([jnp.int32(1), suit])

    def step(key, state, action):
        suits, left, t = state
        watching = t < n - 1
        reward = jnp.where(watching, 0.0, paid(action == suits[2 * n - 2 - t], n))
        suit, left = deal(key, left)
        suits = suits.at[t + 1].set(suit.astype(jnp.int8), mode="drop")
        obs = jnp.stack([jnp.int32(t + 1 < n - 1), jnp.where(watching, suit, 0)])
        return Dealt(suits, left, t + 1), played(obs, reward, t == 2 * n - 2)

    return Env(reset, step, MultiDiscrete((2, SUITS)), Discrete(SUITS), 2 * n - 1)


class Counts(NamedTuple):
    query: Array
    values_left: Array
    queries_left: Array


def count_recall(num_decks: int, num_kinds: int) -> Env:
    """Deals two decks side by side, and observes a kind of each: the value and the query. Asks how many values so far
    were of the query's kind."""
    full = deck(num_decks, num_kinds)
    num_steps = num_decks * CARDS - 1

    def dealt(key, values_left, queries_left):
        k_value, k_query = jax.random.split(key)
        value, values_left = deal(k_value, values_left)
        query, queries_left = deal(k_query, queries_left)
        return Counts(query, values_left, queries_left), jnp.stack([value, query])

    def reset(key):
        return dealt(key, full, full)

    def step(key, state, action):
        count = (full - state.values_left)[state.query]
        now, obs = dealt(key, state.values_left, state.queries_left)
        return now, played(obs, paid(action == count, num_steps), now.values_left.sum() == 0)

    return Env(reset, step, MultiDiscrete((num_kinds,) * 2), Discrete(num_decks * CARDS // num_kinds + 1), num_steps)


class Rank(NamedTuple):
    rank: Array  # of the last card
    left: Array


def higher_lower(num_decks: int) -> Env:
    """Observes a rank, from ace (0) to king (12), and asks whether the next is higher (action 0) or lower (1). An equal
    one pays nothing."""
    n = num_decks * CARDS

    def reset(key):
        rank, left = deal(key, deck(num_decks, RANKS))
        return Rank(rank, left), rank

    def step(key, state, action):
        rank, left = deal(key, state.left)
        reward = jnp.where(rank == state.rank, 0.0, paid((rank > state.rank) == (action == 0), n))
        return Rank(rank, left), played(rank, reward, left.sum() == 0)

    return Env(reset, step, Discrete(RANKS), Discrete(2), n - 1)


class Table(NamedTuple):
    cards: Array  # int8 [n], the kind of every card that has been turned up so far, -1 of the others
    matched: Array  # bool [n], the cards that stay face up
    first: Array  # the card turned up in this turn, -1 if none is
    left: Array  # of the cards that have not been turned up


def concentration(num_decks: int, num_kinds: int) -> Env:
    """Turns up one of n cards a step. Two of a kind in a turn stay face up and earn one part of the n / 2 pairs; others
    are turned down, after they have been seen together. Every step of a turn that finds no pair, or that chooses a card
    that is face up to stay and so ends at once, costs one part of the time limit, 2n. Observes the kind of every card,
    and `num_kinds` where it is face down."""
    n = num_decks * CARDS
    limit = 2 * n

    def look(cards, up):
        return jnp.where(up, cards, jnp.int8(num_kinds))

    def reset(key):
        del key
        cards, none = jnp.full(n, -1, jnp.int8), jnp.zeros(n, bool)
        return Table(cards, none, jnp.int32(-1), deck(num_decks, num_kinds)), look(cards, none)

    def step(key, state, action):
        cards, matched, first, left = state
        kind, left_then = deal(key, left)
        unseen = cards[action] < 0
        cards = cards.at[action].set(jnp.where(unseen, kind.astype(jnp.int8), cards[action]))
        left = jnp.where(unseen, left_then, left)

        second, refused = first >= 0, matched[action]
        pair = second & ~refused & (action != first) & (cards[action] == cards[first])
        turned = (jnp.arange(n) == action) | (jnp.arange(n) == first)
        turn_ends = second | refused
        cost = jnp.where(turn_ends, (1.0 + second) / limit, 0.0)
        now = Table(cards, matched | (turned & pair), jnp.where(turn_ends, -1, action).astype(jnp.int32), left)
        reward = jnp.where(pair, 2 / n, -cost)
        return now, played(look(cards, matched | turned), reward, now.matched.all())

    return time_limited(Env(reset, step, MultiDiscrete((num_kinds + 1,) * n), Discrete(n), None), limit)


def battleship(size: int) -> Env:
    """Fires at one tile of a square board a step, and observes whether that hit a ship where none was hit before. Each
    of the ships lies on tiles drawn uniformly among those still free. All hits together earn 1, a shot at every tile
    0."""
    num_tiles = sum(SHIPS)

    def place(key, board, length):
        num_starts = size - length + 1

        def free(board):  # [size, num_starts] places in a row
            return ~jnp.stack([board[:, i : i + num_starts] for i in range(length)]).any(0)

        places = jnp.stack([free(board), free(board.T)])
        drawn, _ = deal(key, places.ravel().astype(jnp.int32))
        upright, row, start = jnp.unravel_index(drawn, places.shape)
        offset = jnp.arange(size) - start
        ship = (jnp.arange(size) == row)[:, None] & ((offset >= 0) & (offset < length))
        return board | jnp.where(upright, ship.T, ship)

    def reset(key):
        board = jnp.zeros((size, size), bool)
        for k_ship, length in zip(jax.random.split(key, len(SHIPS)), SHIPS, strict=True):
            board = place(k_ship, board, length)
        return board, jnp.int32(0)

    def step(key, board, action):
        del key
        hit = board[action[0], action[1]]
        board = board.at[action[0], action[1]].set(False)
        reward = jnp.where(hit, 1 / num_tiles, -1 / (size**2 - num_tiles))
        return board, played(hit.astype(jnp.int32), reward, ~board.any())

    return time_limited(Env(reset, step, Discrete(2), MultiDiscrete((size, size)), None, costly_reset=True), size**2)


def cart_pole(limit: int, noise: float = 0.0) -> Env:
    """CartPole's position and angle, without their velocities. A step pays 1 / limit."""
    env = gymnax_env("CartPole-v1", {"max_steps_in_episode": limit})
    return noisy(rewarded(partially_observed(env, (0, 2)), lambda reward: reward / limit), noise)


def pendulum(limit: int, noise: float = 0.0) -> Env:
    """Cosine and sine of the pendulum's angle, without its velocity. The largest cost, 16.2736044, pays -1 / limit, and
    none 1 / limit."""
    half = 16.2736044 / 2
    env = gymnax_env("Pendulum-v1", {"max_steps_in_episode": limit})
    return noisy(rewarded(partially_observed(env, (0, 1)), lambda reward: (reward / half + 1) / limit), noise)


def rewarded(env: Env, paid: Callable[[Array], Array]) -> Env:
    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        return state, time_step._replace(reward=paid(time_step.reward))

    return env._replace(step=step)


def noisy(env: Env, std: float) -> Env:
    """Adds Gaussian noise to every observation, which is then clipped to its space."""
    if not std:
        return env
    space = env.observation_space

    def seen(key, obs):
        return jnp.clip(obs + std * jax.random.normal(key, obs.shape, obs.dtype), space.low, space.high)

    def reset(key):
        k_reset, k_noise = jax.random.split(key)
        state, obs = env.reset(k_reset)
        return state, seen(k_noise, obs)

    def step(key, state, action):
        k_step, k_noise = jax.random.split(key)
        state, time_step = env.step(k_step, state, action)
        return state, time_step._replace(obs=seen(k_noise, time_step.obs))

    return env._replace(reset=reset, step=step)


# The arguments of each game at the levels Easy, Medium and Hard.
GAMES: dict[str, tuple[Callable[..., Env], tuple[tuple[float, ...], ...]]] = {
    "RepeatPrevious": (repeat_previous, ((1, 4), (2, 32), (3, 64))),
    "RepeatFirst": (repeat_first, ((1,), (8,), (16,))),
    "Autoencode": (autoencode, ((1,), (2,), (3,))),
    "CountRecall": (count_recall, ((1, COLOURS), (2, SUITS), (4, RANKS))),
    "HigherLower": (higher_lower, ((1,), (2,), (3,))),
    "Concentration": (concentration, ((1, COLOURS), (2, COLOURS), (1, RANKS))),
    "Battleship": (battleship, ((8,), (10,), (12,))),
    "PositionOnlyCartPole": (cart_pole, ((200,), (400,), (600,))),
    "PositionOnlyPendulum": (pendulum, ((200,), (150,), (100,))),
    "NoisyPositionOnlyCartPole": (cart_pole, ((200, 0.1), (200, 0.2), (200, 0.3))),
    "NoisyPositionOnlyPendulum": (pendulum, ((200, 0.1), (200, 0.2), (200, 0.3))),
}
ENVIRONMENTS: dict[str, Callable[[], Env]] = {
    f"{game}{level}": partial(make, *arguments)
    for game, (make, levels) in GAMES.items()
    for level, arguments in zip(("Easy", "Medium", "Hard"), levels, strict=True)
}
NAMES = tuple(ENVIRONMENTS)
