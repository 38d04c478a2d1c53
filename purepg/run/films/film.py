"""Episodes as a GIF. Each frame states how many steps were taken and the return so far.

An episode's last frame also says whether it was terminated or truncated, and is shown for longer. Only every second,
third, ... step of a long episode is shown.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from purepg.run.films.classic_control import CLASSIC_CONTROL
from purepg.run.films.episodes import Episode
from purepg.run.films.grids import CLIFF_SHAPE, GRIDS, cliff
from purepg.run.films.minatar import MINATAR, PALETTE, channels_scene
from purepg.run.films.picture import picture
from purepg.run.films.scene import Scene
from purepg.types import Box, Discrete, Env, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 250  # of an episode
MAX_BYTES = 2_000_000  # of an episode
MILLISECONDS_AT_END = 1500


class Drawing(NamedTuple):
    """How an environment is drawn: its scene, given a state and an observation in numpy, and how long a step lasts."""

    scene: Callable[[Any, np.ndarray], Scene]
    milliseconds: int


def drawing_of(env: Env) -> Drawing:
    """How to draw an environment. A boolean image of any name is drawn as MinAtar's are.

    Raises:
      UsageError: the environment cannot be drawn.
    """
    space = env.observation_space
    if env.name in CLASSIC_CONTROL:
        return Drawing(CLASSIC_CONTROL[env.name], 30)
    if env.name in GRIDS:
        return Drawing(GRIDS[env.name], 200)
    if env.name == "cliff" and isinstance(space, Discrete) and space.n == CLIFF_SHAPE[0] * CLIFF_SHAPE[1]:
        return Drawing(cliff, 200)
    if isinstance(space, Box) and len(space.shape) == 3 and space.dtype is bool:
        unnamed = [(i, f"channel {i}", PALETTE[i % len(PALETTE)]) for i in range(space.shape[2])]
        channels = MINATAR.get(env.name, unnamed)
        return Drawing(lambda state, obs: channels_scene(obs, channels), 100)
    known = ", ".join((*CLASSIC_CONTROL, *GRIDS, "cliff"))
    raise UsageError(f"{env.name} cannot be drawn; choose a run on MinAtar or on one of {known}")


class Film(NamedTuple):
    """A GIF and what is in it."""

    data: bytes
    num_frames: int
    stride: int  # every `stride`-th step is shown


def film(env: Env, episodes: Sequence[Episode], title: str) -> Film:
    """A GIF of episodes, one after another, which takes at most `MAX_BYTES` for each of them.

    Raises:
      UsageError: the environment cannot be drawn.
    """
    drawing = drawing_of(env)
    stride = -(-max(len(episode.reward) for episode in episodes) // MAX_FRAMES)
    while True:
        images, milliseconds = [], []
        for i, episode in enumerate(episodes):
            count = f" (episode {i + 1} of {len(episodes)})" if len(episodes) > 1 else ""
            shown = frames(drawing, episode, title + count, stride)
            images += shown
            milliseconds += [drawing.milliseconds] * (len(shown) - 1) + [MILLISECONDS_AT_END]
        data = gif(images, milliseconds)
        if len(data) <= MAX_BYTES * len(episodes) or len(images) <= 2 * len(episodes):
            return Film(data, len(images), stride)
        stride *= 2


def frames(drawing: Drawing, episode: Episode, title: str, stride: int = 1) -> "list[Image]":
    """Pictures of an episode at `shown_steps`."""
    return_so_far = np.concatenate([[0.0], np.cumsum(episode.reward, dtype=np.float64)])
    num_steps = len(episode.reward)
    ending = ", ".join(["terminated"] * episode.terminated + ["truncated"] * episode.truncated)
    images = []
    for t in shown_steps(num_steps, stride):
        state = jax.tree.map(lambda x, t=t: x[t], episode.state)
        ended = t == num_steps
        line = f"step {t}    return {return_so_far[t]:.4g}" + (f"    {ending}" if ended else "")
        images.append(picture(drawing.scene(state, episode.obs[t]), [title, line], ended))
    return images


def shown_steps(num_steps: int, stride: int) -> list[int]:
    """Every `stride`-th step from 0 on, and the last."""
    return [*range(0, num_steps, stride), num_steps]


def gif(images: "Sequence[Image]", milliseconds: Sequence[int]) -> bytes:
    """An endless GIF of images of one size, each shown for its own time. All of them share one palette."""
    from PIL import Image

    sample = [images[i] for i in sorted({round(i) for i in np.linspace(0, len(images) - 1, 12)})]
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in sample])
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, count = np.unique(packed, return_counts=True)
    # The 256 most frequent colours: flat areas keep theirs, and the blends at edges take the nearest.
    frequent = colours[np.argsort(-count, kind="stable")[:256]]
    palette = Image.new("P", (1, 1))
    palette.putpalette((frequent[:, None] >> np.array([16, 8, 0], np.uint32) & 255).flatten().tolist())
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    file = io.BytesIO()
    more = small[1:]
    small[0].save(file, "GIF", save_all=True, append_images=more, duration=list(milliseconds), loop=0, optimize=False)
    return file.getvalue()
