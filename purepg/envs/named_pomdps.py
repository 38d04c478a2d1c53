"""Processes whose best policy needs memory, known to `purepg.envs.make` by name; made there, they observe `alias`."""

from itertools import product

import numpy as np

from purepg.envs.finite_mdp import FiniteMDP
from purepg.types import UsageError

MAX_STATES = 2048  # of a dense transition array


def tmaze(length: int = 10) -> FiniteMDP:
    """The T-maze (Bakker 2001) in which nothing but memory is hard: every action moves on by one cell, as long as there
    is one, so that any policy reaches the junction.

    A cue, left or right with probability 1/2 each, is observed in cell 0 and nowhere else. The corridor's cells 1, ...,
    length - 1 look alike, and the junction is cell `length`. There action 0 turns left and action 1 right, which ends
    the episode after length + 1 steps with the reward 1 in the arm of the cue and 0 in the other; all other rewards are
    0. Nothing is discounted. Bakker's agent walks with four actions, and pays for standing still.

    Observations are 0 and 1, the cues, 2, the corridor, and 3, the junction, also after the end. There are
    2 * length + 3 states.
    """
    if not isinstance(length, int) or length < 1:
        raise UsageError(f"tmaze: length ({length}) must be an integer, at least 1")
    if 2 * length + 3 > MAX_STATES:
        raise UsageError(f"tmaze: length ({length}) must be at most {(MAX_STATES - 3) // 2}")
    cells = length + 1
    cue, cell = np.divmod(np.arange(2 * cells), cells)
    end, junction = 2 * cells, cell == length
    onward = np.where(junction, end, np.arange(end) + 1)
    transition, reward = np.zeros((end + 1, 2, end + 1)), np.zeros((end + 1, 2))
    transition[np.arange(end), :, onward] = 1
    reward[np.flatnonzero(junction), cue[junction]] = 1.0
    return FiniteMDP(
        transition,
        reward,
        np.append((cell == 0) / 2, 0.0),
        1.0,
        terminal=np.arange(end + 1) == end,
        horizon=length + 1,
        alias=np.append(np.select([cell == 0, junction], [cue, 3], 2), 3),
        name="tmaze",
    )


def repeat_previous(num_values: int = 2, k: int = 2, length: int = 16) -> FiniteMDP:
    """One of `num_values` values is observed at each of `length` steps, each independent and uniform, and the action
    must name the one of k steps before (as in RepeatPrevious, Morad et al. 2023, whose values are cards of decks).

    Each right action from step k on earns 1 / (length - k), so that the best return is 1; nothing is discounted. A
    state is the last k + 1 values, fewer at the start: there are num_values + ... + num_values^(k + 1). The time is not
    observed.
    """
    n = num_values
    for name, x, least in (("num_values", n, 1), ("k", k, 0), ("length", length, k + 1)):
        if not isinstance(x, int) or x < least:
            raise UsageError(f"repeat_previous: {name} ({x}) must be an integer, at least {least}")
    S = sum(n**m for m in range(1, k + 2))
    if S > MAX_STATES:
        raise UsageError(
            f"repeat_previous: num_values ({n}) and k ({k}) make {S} states; choose fewer, for at most {MAX_STATES}"
        )
    states = [values for m in range(1, k + 2) for values in product(range(n), repeat=m)]
    index = {values: s for s, values in enumerate(states)}
    transition, reward = np.zeros((S, n, S)), np.zeros((S, n))
    for s, values in enumerate(states):
        for value in range(n):
            transition[s, :, index[(*values, value)[-k - 1 :]]] = 1 / n
        if len(values) == k + 1:
            reward[s, values[0]] = 1 / (length - k)
    return FiniteMDP(
        transition,
        reward,
        np.where(np.arange(S) < n, 1 / n, 0.0),
        1.0,
        horizon=length,
        horizon_terminates=True,
        alias=np.array([values[-1] for values in states]),
        name="repeat_previous",
    )


POMDPS = {"tmaze": tmaze, "repeat_previous": repeat_previous}
