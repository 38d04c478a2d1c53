"""A scene, or an environment's own picture, as an image: two lines of text above it, the key to its colours below."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from purepg.run.films.scene import Disc, Line, Point, Scene

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, MAX_HEIGHT = 440, 360  # of a scene, pixels
HEADER, KEY_LINE, MARGIN = 44, 20, 8
FINE = 3  # scenes are drawn three times as large and then reduced, which smooths their edges


def picture(scene: Scene | np.ndarray, lines: Sequence[str], ended: bool = False) -> "Image":
    """Draws a scene, or an environment's own picture, uint8 `[height, width, 3]`. The text is white on black where the
    episode has ended."""
    image = draw_scene(scene) if isinstance(scene, Scene) else on_canvas(scene)
    write_header(image, lines, ended)
    return image


def write_header(image: "Image", lines: Sequence[str], ended: bool) -> None:
    """Writes the lines of text above a scene."""
    from PIL import ImageDraw, ImageFont

    font, draw = ImageFont.load_default(14), ImageDraw.Draw(image)
    draw.rectangle([0, 0, image.width, HEADER - 4], fill="#222222" if ended else "white")
    for i, line in enumerate(lines):
        fitting = fit(line, lambda text: font.getlength(text) <= WIDTH)
        draw.text((MARGIN, 3 + 18 * i), fitting, fill="white" if ended else "black", font=font)


def draw_scene(scene: Scene) -> "Image":
    """A scene and the key to its colours, under an empty header."""
    from PIL import ImageDraw, ImageFont

    scale, _ = to_pixels(scene)
    width = WIDTH + 2 * MARGIN
    scene_end = HEADER + round(scale * (scene.high[1] - scene.low[1])) + MARGIN
    font = ImageFont.load_default(13)
    key = key_places([font.getlength(name) for _, name in scene.key])
    height = scene_end + KEY_LINE * (key[-1][1] + 1 if key else 0)

    image = draw_shapes(scene, width, height)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, width, HEADER - 4], fill="white")
    for (colour, name), (x, row) in zip(scene.key, key, strict=True):
        y = scene_end + KEY_LINE * row
        draw.rectangle([x, y + 3, x + 11, y + 14], fill=colour, outline="#777777")
        draw.text((x + 16, y), name, fill="black", font=font)
    return image


def on_canvas(pixels: np.ndarray) -> "Image":
    """An environment's own picture under an empty header."""
    from PIL import Image

    image = fitted(pixels)
    canvas = Image.new("RGB", (WIDTH + 2 * MARGIN, HEADER + image.height + MARGIN), "white")
    canvas.paste(image, ((canvas.width - image.width) // 2, HEADER))
    return canvas


def fitted(pixels: np.ndarray) -> "Image":
    """A picture, enlarged or reduced by a whole factor."""
    from PIL import Image

    image = Image.fromarray(pixels)
    larger = min(WIDTH // image.width, MAX_HEIGHT // image.height)
    if larger > 0:
        return image.resize((larger * image.width, larger * image.height), Image.Resampling.NEAREST)
    return image.reduce(max(-(-image.width // WIDTH), -(-image.height // MAX_HEIGHT)))


def to_pixels(scene: Scene) -> tuple[float, Point]:
    """Pixels per unit, and the scene's origin in pixels from the picture's upper left corner."""
    (left, bottom), (right, top) = scene.low, scene.high
    scale = min(WIDTH / (right - left), MAX_HEIGHT / (top - bottom))
    return scale, (MARGIN + (WIDTH - scale * (right - left)) / 2 - scale * left, HEADER + scale * top)


def draw_shapes(scene: Scene, width: int, height: int) -> "Image":
    """The scene alone, in its place on a white picture."""
    from PIL import Image, ImageDraw

    scale, (x0, y0) = to_pixels(scene)
    large = Image.new("RGB", (FINE * width, FINE * height), "white")
    draw = ImageDraw.Draw(large)
    for shape in scene.shapes:
        if isinstance(shape, Disc):
            x, y = x0 + scale * shape.centre[0], y0 - scale * shape.centre[1]
            r = scale * shape.radius
            draw.ellipse([FINE * (x - r), FINE * (y - r), FINE * (x + r), FINE * (y + r)], fill=shape.colour)
            continue
        points = [(FINE * (x0 + scale * x), FINE * (y0 - scale * y)) for x, y in shape.points]
        if isinstance(shape, Line):
            draw.line(points, fill=shape.colour, width=round(FINE * shape.width), joint="curve")
        else:
            draw.polygon(points, fill=shape.colour)
    return large.reduce(FINE)


def fit(line: str, fits: Callable[[str], bool]) -> str:
    """The line, or as much of its beginning and its end as fits."""
    shorter = (f"{line[:half]} ... {line[-half:]}" for half in range(len(line) // 2, 0, -1))
    return line if fits(line) else next(filter(fits, shorter), "")


def key_places(text_widths: Sequence[float]) -> list[tuple[int, int]]:
    """Where each entry of the key begins: (pixels from the left, row)."""
    places, x, row = [], MARGIN, 0
    for text_width in text_widths:
        if x > MARGIN and x + 16 + text_width > WIDTH + MARGIN:
            x, row = MARGIN, row + 1
        places.append((x, row))
        x += round(16 + text_width + 14)
    return places
