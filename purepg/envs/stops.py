"""What ends a response: a finite automaton that reads its tokens, as a table.

`table[state, token]` is the state after a token. A response begins in state 0, and has ended in state S, the number of
the table's rows. Axes: `S` states, `V` vocabulary, `R` columns of a response.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import Array


def automaton(stops: Iterable[Sequence[int]], num_symbols: int) -> np.ndarray:
    """The table `[S, num_symbols]` that ends with the last symbol of any of these sequences, wherever one begins.

    A state stands for the longest end of what was read with which a sequence begins (Aho and Corasick 1975).
    """
    sequences = [tuple(stop) for stop in stops]
    begun = sorted({stop[:i] for stop in sequences for i in range(len(stop))}, key=len)
    state = {read: i for i, read in enumerate(begun)} | dict.fromkeys(sequences, len(begun))
    table = np.zeros((len(begun), num_symbols), np.int32)
    for i, before in enumerate(begun):
        for symbol in set().union(*sequences):
            read = (*before, symbol)
            table[i, symbol] = max(state.get(read[j:], 0) for j in range(len(read)))  # of the longest, or the end
    return table


def of_words(table: np.ndarray, words: Sequence[Sequence[int]]) -> np.ndarray:
    """The table `[S, V]` of the same automaton where it reads V words of symbols, each at once."""
    ended = len(table)
    table = np.append(table, np.full_like(table[:1], ended), axis=0)
    after = np.tile(np.arange(ended, dtype=np.int32)[:, None], len(words))
    length = np.array([len(word) for word in words])
    for i in range(length.max()):
        longer = np.flatnonzero(length > i).tolist()
        after[:, longer] = table[after[:, longer], [words[word][i] for word in longer]]
    return after


def after(table: Array | np.ndarray, state: Array, token: Array) -> Array:
    """The states after tokens `[...]`, int32. Padding (-1) changes none, and neither does anything after the end."""
    reads = (token >= 0) & (state < len(table))
    # A table that is an argument of a program on several devices has no place yet within one of its agents, where only
    # what is computed from it can be indexed.
    flat = jnp.asarray(table).reshape(-1)
    return jnp.where(reads, flat[state * table.shape[1] + token].astype(jnp.int32), state)


def ended(table: Array | np.ndarray, response: Array | np.ndarray) -> Array:
    """Whether responses of `[..., R]` tokens have ended by each of their columns, `[..., R]` bool."""

    def read(state, token):
        state = after(table, state, token)
        return state, state

    tokens = jnp.moveaxis(jnp.asarray(response), -1, 0)
    _, state = jax.lax.scan(read, jnp.zeros(tokens.shape[1:], jnp.int32), tokens)
    return jnp.moveaxis(state, 0, -1) == len(table)
