"""A scene: lines, discs and polygons in the environment's own coordinates."""

from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]  # x to the right, y up

INK, GREY, LIGHT = "#333333", "#999999", "#DDDDDD"
BLUE, RED, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


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
    """The part of the plane between two corners. Later shapes lie on top of earlier ones."""

    low: Point
    high: Point
    shapes: Sequence[Shape]
    key: Sequence[tuple[str, str]] = ()  # (colour, what it stands for)


def rectangle(left: float, bottom: float, right: float, top: float) -> list[Point]:
    return [(left, bottom), (right, bottom), (right, top), (left, top)]
