"""MinAtar, drawn from its boolean observation: every channel that is on has a colour."""

from collections.abc import Sequence

import numpy as np

from purepg.run.films.grids import cell
from purepg.run.films.scene import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, Polygon, Scene, rectangle

BLACK, WHITE, YELLOW, TRAIL = "#111111", "#FFFFFF", "#F0E442", "#555555"
SHADES = (0x50, 0x70, 0x90, 0xB0, 0xD0)  # of Freeway's trails; faster cars have lighter ones
PALETTE = (SKY, RED, GREEN, ORANGE, PINK, BLUE, WHITE, "#6F4E37", YELLOW, GREY)
Channels = Sequence[tuple[int, str, str]]  # (channel, its name, colour), from the lowest layer to the highest

MINATAR: dict[str, Channels] = {
    "Asterix-MinAtar": [(2, "trail", TRAIL), (3, "gold", YELLOW), (1, "enemy", RED), (0, "player", SKY)],
    "Breakout-MinAtar": [(3, "brick", ORANGE), (2, "trail", TRAIL), (1, "ball", WHITE), (0, "paddle", SKY)],
    "Freeway-MinAtar": [
        *((6 - i, f"trail, slowness {5 - i}", f"#{shade:02X}{shade:02X}{shade:02X}") for i, shade in enumerate(SHADES)),
        (1, "car", RED),
        (0, "chicken", YELLOW),
    ],
    "Seaquest-MinAtar": [
        (7, "oxygen", SKY),
        (8, "divers on board", PINK),
        (3, "trail", TRAIL),
        (9, "diver", YELLOW),
        (5, "fish", ORANGE),
        (6, "enemy submarine", RED),
        (4, "enemy bullet", "#F7A072"),
        (2, "our bullet", WHITE),
        (1, "our submarine", "#00664B"),
        (0, "our front", GREEN),
    ],
    "SpaceInvaders-MinAtar": [
        (2, "alien, going left", PINK),  # channel 1 is on for either kind of alien
        (3, "alien, going right", ORANGE),
        (5, "alien bullet", RED),
        (4, "our bullet", WHITE),
        (0, "cannon", SKY),
    ],
}


def channels_scene(obs: np.ndarray, channels: Channels) -> Scene:
    """A grid of an observation `[rows, columns, channels]`, on black."""
    num_rows, num_columns, _ = obs.shape
    shapes = [Polygon(rectangle(0, 0, num_columns, num_rows), BLACK)]
    for channel, _, colour in channels:
        shapes += [cell(num_rows, int(row), int(column), colour) for row, column in np.argwhere(obs[:, :, channel])]
    return Scene((0, 0), (num_columns, num_rows), shapes, [(colour, name) for _, name, colour in reversed(channels)])
