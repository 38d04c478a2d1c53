"""What an environment's state looks like: a scene of lines, discs and polygons in the environment's own coordinates.

Classic control and grids are drawn from the state, MinAtar from the observation. Nothing here needs a display.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepg.types import Box, Discrete, Env, UsageError

Point = tuple[float, float]  # x to the right, y up

INK, GREY, LIGHT, PAPER = "#333333", "#999999", "#DDDDDD", "#FFFFFF"
BLUE, RED, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"

CLIFF_SHAPE = 4, 12  # of `purepg.envs.finite_mdp.cliff` as its name makes it
CART_POLE_LIMIT, POLE_LENGTH = 2.4, 1.0  # gymnax's `length` is half of the pole's


class Line(NamedTuple):
    points: Sequence[Point]
    colour: str
    width: float  # pixels


class Disc(NamedTuple):
    centre: Point
    radius: float
    colour: str


class Polygon(NamedTuple):
    points: Sequence[Point]
    colour: str


Shape = Line | Disc | Polygon


class Scene(NamedTuple):
    """What is to be seen between two corners; later shapes lie on top of earlier ones."""

    low: Point
    high: Point
    shapes: Sequence[Shape]
    key: Sequence[tuple[str, str]] = ()  # (colour, what it stands for)


class Drawing(NamedTuple):
    """How an environment is drawn: its scene from a state and an observation of numpy arrays, and its pace."""

    scene: Callable[[Any, np.ndarray], Scene]
    milliseconds: int  # a step


def drawing_of(env: Env) -> Drawing:
    """How to draw an environment.

    Raises:
      UsageError: nothing here can draw it.
    """
    space = env.observation_space
    if env.name in CLASSIC_CONTROL:
        return Drawing(CLASSIC_CONTROL[env.name], 30)
    if env.name in GRIDS:
        return Drawing(GRIDS[env.name], 200)
    if env.name == "cliff" and isinstance(space, Discrete) and space.n == CLIFF_SHAPE[0] * CLIFF_SHAPE[1]:
        return Drawing(cliff, 200)
    if isinstance(space, Box) and len(space.shape) == 3 and space.dtype is bool:
        channels = MINATAR.get(
            env.name, [(i, f"channel {i}", PALETTE[i % len(PALETTE)]) for i in range(space.shape[2])]
        )
        return Drawing(lambda state, obs: channels_scene(obs, channels), 100)
    known = ", ".join((*CLASSIC_CONTROL, *GRIDS, "cliff", "MinAtar's"))
    raise UsageError(f"{env.name} cannot be drawn; what can: {known}")


# --- classic control ---


def cart_pole(state: Any, obs: np.ndarray) -> Scene:
    """The cart between its limits, and the pole, which leans to the right at positive angles."""
    x, theta = float(state.x), float(state.theta)
    top = 0.25
    tip = x + POLE_LENGTH * math.sin(theta), top + POLE_LENGTH * math.cos(theta)
    width, limit = 2.9, CART_POLE_LIMIT
    return Scene(
        (-width, -0.35),
        (width, 1.55),
        [
            Line([(-width, 0), (width, 0)], GREY, 1.5),
            *(Line([(end, -0.15), (end, 0.15)], RED, 2.5) for end in (-limit, limit)),
            Polygon(rectangle(x - 0.3, 0.03, x + 0.3, 0.28), INK),
            Line([(x, top), tip], ORANGE, 8),
            Disc((x, top), 0.05, BLUE),
        ],
    )


def pendulum(state: Any, obs: np.ndarray) -> Scene:
    """The rod, upright at angle 0 and counter-clockwise from there, and the torque as an arc about the pivot."""
    theta, torque = float(state.theta), float(np.reshape(state.last_u, ()))
    tip = -math.sin(theta), math.cos(theta)
    angles = theta + math.pi / 2 + np.linspace(0, torque / 2 * 0.75 * math.pi, 24)
    arc = [(0.45 * math.cos(a), 0.45 * math.sin(a)) for a in angles]
    shapes: list[Shape] = [
        Line([(0, 1.0), (0, 1.2)], GREEN, 3),  # where it should be
        Line([(0, 0), tip], RED, 12),
        Disc(tip, 0.06, RED),
        Disc((0, 0), 0.05, INK),
    ]
    if abs(torque) > 0.02:
        shapes += [Line(arc, BLUE, 3), Disc(arc[-1], 0.05, BLUE)]
    return Scene((-1.3, -1.3), (1.3, 1.3), shapes, [(BLUE, "torque"), (GREEN, "upright")])


def mountain_car(goal: float) -> Callable[[Any, np.ndarray], Scene]:
    """The car on its hill, and a flag at the goal."""

    def height(x: float) -> float:
        return 0.45 * math.sin(3 * x) + 0.55

    def scene(state: Any, obs: np.ndarray) -> Scene:
        x = float(state.position)
        slope = math.atan(1.35 * math.cos(3 * x))
        hill = [(u, height(u)) for u in np.linspace(-1.2, 0.6, 91).tolist()]

        def on_car(along: float, above: float) -> Point:
            return (
                x + along * math.cos(slope) - above * math.sin(slope),
                height(x) + along * math.sin(slope) + above * math.cos(slope),
            )

        body = [on_car(-0.08, 0.03), on_car(0.08, 0.03), on_car(0.06, 0.09), on_car(-0.06, 0.09)]
        top = height(goal) + 0.22
        return Scene(
            (-1.25, -0.05),
            (0.65, 1.35),
            [
                Polygon([*hill, (0.6, -0.05), (-1.2, -0.05)], LIGHT),
                Line(hill, GREY, 2),
                Line([(-1.2, height(-1.2)), (-1.2, height(-1.2) + 0.3)], INK, 4),  # a wall
                Line([(goal, height(goal)), (goal, top)], INK, 2),
                Polygon([(goal, top), (goal, top - 0.09), (goal + 0.1, top - 0.045)], GREEN),
                Polygon(body, BLUE),
                *(Disc(on_car(along, 0.03), 0.03, INK) for along in (-0.05, 0.05)),
            ],
            [(GREEN, "goal")],
        )

    return scene


def acrobot(state: Any, obs: np.ndarray) -> Scene:
    """The two links, hanging down at angles 0, and the height that the tip must pass."""
    first, second = float(state.joint_angle1), float(state.joint_angle2)
    elbow = math.sin(first), -math.cos(first)
    tip = elbow[0] + math.sin(first + second), elbow[1] - math.cos(first + second)
    return Scene(
        (-2.2, -2.2),
        (2.2, 2.2),
        [
            Line([(-2.2, 1), (2.2, 1)], GREEN, 2),
            Line([(0, 0), elbow], BLUE, 9),
            Line([elbow, tip], ORANGE, 9),
            *(Disc(joint, 0.09, INK) for joint in ((0.0, 0.0), elbow)),
            Disc(tip, 0.09, RED),
        ],
        [(RED, "tip"), (GREEN, "height to pass")],
    )


CLASSIC_CONTROL = {
    "CartPole-v1": cart_pole,
    "Pendulum-v1": pendulum,
    "MountainCar-v0": mountain_car(0.5),
    "MountainCarContinuous-v0": mountain_car(0.45),
    "Acrobot-v1": acrobot,
}


# --- grids ---


def rectangle(left: float, bottom: float, right: float, top: float) -> list[Point]:
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def cell(num_rows: int, row: int, column: int, colour: str, gap: float = 0.03) -> Polygon:
    """A cell of a grid whose rows are counted from the top; its corners are whole numbers."""
    bottom = num_rows - 1 - row
    return Polygon(rectangle(column + gap, bottom + gap, column + 1 - gap, bottom + 1 - gap), colour)


def agent(num_rows: int, row: int, column: int) -> Disc:
    return Disc((column + 0.5, num_rows - row - 0.5), 0.33, BLUE)


def floor(num_rows: int, num_columns: int, colour: str = "#F0F0F0") -> Iterator[Polygon]:
    return (cell(num_rows, row, column, colour) for row, column in np.ndindex(num_rows, num_columns))


def cliff(state: Any, obs: np.ndarray) -> Scene:
    """Sutton and Barto's gridworld: start and goal at the lower corners, the cliff between them."""
    num_rows, num_columns = CLIFF_SHAPE
    row, column = divmod(int(obs), num_columns)
    bottom = num_rows - 1
    return Scene(
        (0, 0),
        (num_columns, num_rows),
        [
            *floor(num_rows, num_columns),
            cell(num_rows, bottom, 0, SKY),
            *(cell(num_rows, bottom, c, INK) for c in range(1, num_columns - 1)),
            cell(num_rows, bottom, num_columns - 1, GREEN),
            agent(num_rows, row, column),
        ],
        [(BLUE, "agent"), (SKY, "start"), (INK, "cliff"), (GREEN, "goal")],
    )


def four_rooms(state: Any, obs: np.ndarray) -> Scene:
    """Walls, goal and agent; positions are (row, column)."""
    from gymnax.environments.misc.rooms import four_rooms_map

    rows = four_rooms_map.strip().split("\n")
    row, column = np.asarray(state.pos).tolist()
    goal_row, goal_column = np.asarray(state.goal).tolist()
    return Scene(
        (0, 0),
        (len(rows[0]), len(rows)),
        [
            *floor(len(rows), len(rows[0])),
            *(cell(len(rows), r, c, INK, 0) for r, line in enumerate(rows) for c, x in enumerate(line) if x == "x"),
            cell(len(rows), goal_row, goal_column, GREEN),
            agent(len(rows), row, column),
        ],
        [(BLUE, "agent"), (GREEN, "goal")],
    )


def catch(state: Any, obs: np.ndarray) -> Scene:
    """The ball that falls, and the paddle."""
    num_rows, num_columns = obs.shape
    ball = Disc((float(state.ball_x) + 0.5, num_rows - float(state.ball_y) - 0.5), 0.33, RED)
    return Scene(
        (0, 0),
        (num_columns, num_rows),
        [*floor(num_rows, num_columns), cell(num_rows, int(state.paddle_y), int(state.paddle_x), BLUE), ball],
        [(RED, "ball"), (BLUE, "paddle")],
    )


GRIDS = {"FourRooms-misc": four_rooms, "Catch-bsuite": catch}

# --- MinAtar ---

BLACK = "#111111"
SHADES = (0x50, 0x70, 0x90, 0xB0, 0xD0)  # of trails: the faster, the lighter
PALETTE = (SKY, RED, GREEN, ORANGE, PINK, BLUE, "#FFFFFF", "#6F4E37", "#F0E442", GREY)
Channels = Sequence[tuple[int, str, str]]  # (channel, what it is, colour), from the lowest layer to the highest

MINATAR: dict[str, Channels] = {
    "Asterix-MinAtar": [(2, "trail", "#555555"), (3, "gold", "#F0E442"), (1, "enemy", RED), (0, "player", SKY)],
    "Breakout-MinAtar": [(3, "brick", ORANGE), (2, "trail", "#555555"), (1, "ball", "#FFFFFF"), (0, "paddle", SKY)],
    "Freeway-MinAtar": [
        *((6 - i, f"trail, slowness {5 - i}", f"#{shade:02X}{shade:02X}{shade:02X}") for i, shade in enumerate(SHADES)),
        (1, "car", RED),
        (0, "chicken", "#F0E442"),
    ],
    "Seaquest-MinAtar": [
        (7, "oxygen", SKY),
        (8, "divers on board", PINK),
        (3, "trail", "#555555"),
        (9, "diver", "#F0E442"),
        (5, "fish", ORANGE),
        (6, "enemy submarine", RED),
        (4, "enemy bullet", "#F7A072"),
        (2, "our bullet", "#FFFFFF"),
        (1, "our submarine", "#00664B"),
        (0, "our front", GREEN),
    ],
    "SpaceInvaders-MinAtar": [
        (2, "alien, going left", PINK),  # channel 1 is either of them
        (3, "alien, going right", ORANGE),
        (5, "alien bullet", RED),
        (4, "our bullet", "#FFFFFF"),
        (0, "cannon", SKY),
    ],
}


def channels_scene(obs: np.ndarray, channels: Channels) -> Scene:
    """A grid in which a channel that is on has its colour."""
    num_rows, num_columns, _ = obs.shape
    return Scene(
        (0, 0),
        (num_columns, num_rows),
        [
            Polygon(rectangle(0, 0, num_columns, num_rows), BLACK),
            *(
                cell(num_rows, int(row), int(column), colour)
                for channel, _, colour in channels
                for row, column in np.argwhere(obs[:, :, channel])
            ),
        ],
        [(colour, name) for _, name, colour in reversed(channels)],
    )
