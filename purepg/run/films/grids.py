"""Grid worlds, drawn from the environment's state; rows are counted from the top."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from purepg.run.films.scene import BLUE, GREEN, INK, RED, SKY, Disc, Polygon, Scene, rectangle

CLIFF_SHAPE = 4, 12  # the rows and columns of `purepg.envs.finite_mdp.cliff` with its default arguments


def cell(num_rows: int, row: int, column: int, colour: str, gap: float = 0.03) -> Polygon:
    """A cell of a grid. Its corners are whole numbers, and it keeps a gap to its neighbours."""
    bottom = num_rows - 1 - row
    return Polygon(rectangle(column + gap, bottom + gap, column + 1 - gap, bottom + 1 - gap), colour)


def disc(num_rows: int, row: float, column: float, colour: str) -> Disc:
    """A disc in the middle of a cell."""
    return Disc((column + 0.5, num_rows - row - 0.5), 0.33, colour)


def floor(num_rows: int, num_columns: int) -> Iterator[Polygon]:
    return (cell(num_rows, row, column, "#F0F0F0") for row, column in np.ndindex(num_rows, num_columns))


def cliff(state: Any, obs: np.ndarray) -> Scene:
    """Sutton and Barto's cliff walking: start and goal at the lower corners, the cliff between them."""
    num_rows, num_columns = CLIFF_SHAPE
    row, column = divmod(int(obs), num_columns)
    bottom = num_rows - 1
    shapes = [
        *floor(num_rows, num_columns),
        cell(num_rows, bottom, 0, SKY),
        *(cell(num_rows, bottom, c, INK) for c in range(1, num_columns - 1)),
        cell(num_rows, bottom, num_columns - 1, GREEN),
        disc(num_rows, row, column, BLUE),
    ]
    key = [(BLUE, "agent"), (SKY, "start"), (INK, "cliff"), (GREEN, "goal")]
    return Scene((0, 0), (num_columns, num_rows), shapes, key)


def four_rooms(state: Any, obs: np.ndarray) -> Scene:
    """Walls, goal and agent. The state's positions are (row, column)."""
    from gymnax.environments.misc.rooms import four_rooms_map

    rows = four_rooms_map.strip().split("\n")
    num_rows, num_columns = len(rows), len(rows[0])
    row, column = np.asarray(state.pos).tolist()
    goal_row, goal_column = np.asarray(state.goal).tolist()
    shapes = [
        *floor(num_rows, num_columns),
        *(cell(num_rows, r, c, INK, 0) for r, line in enumerate(rows) for c, mark in enumerate(line) if mark == "x"),
        cell(num_rows, goal_row, goal_column, GREEN),
        disc(num_rows, row, column, BLUE),
    ]
    return Scene((0, 0), (num_columns, num_rows), shapes, [(BLUE, "agent"), (GREEN, "goal")])


def catch(state: Any, obs: np.ndarray) -> Scene:
    """The falling ball and the paddle."""
    num_rows, num_columns = obs.shape
    shapes = [
        *floor(num_rows, num_columns),
        cell(num_rows, int(state.paddle_y), int(state.paddle_x), BLUE),
        disc(num_rows, float(state.ball_y), float(state.ball_x), RED),
    ]
    return Scene((0, 0), (num_columns, num_rows), shapes, [(RED, "ball"), (BLUE, "paddle")])


GRIDS = {"FourRooms-misc": four_rooms, "Catch-bsuite": catch}
