"""Classic control: poles, pendulums and cars, drawn from the environment's state."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from purepg.run.films.scene import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    RED,
    Disc,
    Line,
    Point,
    Polygon,
    Scene,
    rectangle,
)

CART_POLE_LIMIT, POLE_LENGTH = 2.4, 1.0  # gymnax's `length` is half the pole's length


def cart_pole(state: Any, obs: np.ndarray) -> Scene:
    """The cart between its limits. The pole leans to the right at positive angles."""
    x, theta = float(state.x), float(state.theta)
    top, width = 0.25, 2.9
    tip = x + POLE_LENGTH * math.sin(theta), top + POLE_LENGTH * math.cos(theta)
    shapes = [
        Line([(-width, 0), (width, 0)], GREY, 1.5),
        *(Line([(end, -0.15), (end, 0.15)], RED, 2.5) for end in (-CART_POLE_LIMIT, CART_POLE_LIMIT)),
        Polygon(rectangle(x - 0.3, 0.03, x + 0.3, 0.28), INK),
        Line([(x, top), tip], ORANGE, 8),
        Disc((x, top), 0.05, BLUE),
    ]
    return Scene((-width, -0.35), (width, 1.55), shapes)


def pendulum(state: Any, obs: np.ndarray) -> Scene:
    """The rod, upright at angle 0 and turning counter-clockwise, and the torque as an arc around the pivot."""
    theta, torque = float(state.theta), float(np.reshape(state.last_u, ()))
    tip = -math.sin(theta), math.cos(theta)
    angles = theta + math.pi / 2 + np.linspace(0, torque / 2 * 0.75 * math.pi, 24)
    arc = [(0.45 * math.cos(a), 0.45 * math.sin(a)) for a in angles]
    shapes = [
        Line([(0, 1.0), (0, 1.2)], GREEN, 3),
        Line([(0, 0), tip], RED, 12),
        Disc(tip, 0.06, RED),
        Disc((0, 0), 0.05, INK),
    ]
    if abs(torque) > 0.02:
        shapes += [Line(arc, BLUE, 3), Disc(arc[-1], 0.05, BLUE)]
    return Scene((-1.3, -1.3), (1.3, 1.3), shapes, [(BLUE, "torque"), (GREEN, "upright")])


def mountain_car(goal: float) -> Callable[[Any, np.ndarray], Scene]:
    """The car on its hill, a wall at the left end and a flag at the goal."""

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

        top = height(goal) + 0.22
        shapes = [
            Polygon([*hill, (0.6, -0.05), (-1.2, -0.05)], LIGHT),
            Line(hill, GREY, 2),
            Line([(-1.2, height(-1.2)), (-1.2, height(-1.2) + 0.3)], INK, 4),
            Line([(goal, height(goal)), (goal, top)], INK, 2),
            Polygon([(goal, top), (goal, top - 0.09), (goal + 0.1, top - 0.045)], GREEN),
            Polygon([on_car(-0.08, 0.03), on_car(0.08, 0.03), on_car(0.06, 0.09), on_car(-0.06, 0.09)], BLUE),
            *(Disc(on_car(along, 0.03), 0.03, INK) for along in (-0.05, 0.05)),
        ]
        return Scene((-1.25, -0.05), (0.65, 1.35), shapes, [(GREEN, "goal")])

    return scene


def acrobot(state: Any, obs: np.ndarray) -> Scene:
    """The two links, which hang down at angles 0, and the height that the tip must pass."""
    first, second = float(state.joint_angle1), float(state.joint_angle2)
    elbow = math.sin(first), -math.cos(first)
    tip = elbow[0] + math.sin(first + second), elbow[1] - math.cos(first + second)
    shapes = [
        Line([(-2.2, 1), (2.2, 1)], GREEN, 2),
        Line([(0, 0), elbow], BLUE, 9),
        Line([elbow, tip], ORANGE, 9),
        *(Disc(joint, 0.09, INK) for joint in ((0.0, 0.0), elbow)),
        Disc(tip, 0.09, RED),
    ]
    return Scene((-2.2, -2.2), (2.2, 2.2), shapes, [(RED, "tip"), (GREEN, "height to pass")])


CLASSIC_CONTROL = {
    "CartPole-v1": cart_pole,
    "Pendulum-v1": pendulum,
    "MountainCar-v0": mountain_car(0.5),
    "MountainCarContinuous-v0": mountain_car(0.45),
    "Acrobot-v1": acrobot,
}
