"""Episodes as a GIF. Each frame states how many steps were taken and the return so far.

An episode's last frame also says whether it was terminated or truncated, and is shown for longer. Only every second,
third, ... step of a long episode is shown.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from purepg.envs.wrappers import PREVIOUS, own_state
from purepg.run.console import reason
from purepg.run.films.classic_control import CLASSIC_CONTROL
from purepg.run.films.episodes import MAX_FRAMES, Episode
from purepg.run.films.grids import CLIFF_SHAPE, GRIDS, cliff
from purepg.run.films.minatar import MINATAR, PALETTE, channels_scene
from purepg.run.films.observations import observation_scene
from purepg.run.films.picture import picture
from purepg.run.films.scene import Scene
from purepg.types import Box, Discrete, Env, UsageError, is_image

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 2_000_000  # of an episode
MILLISECONDS_AT_END = 1500


class Drawing(NamedTuple):
    """How an environment is drawn: its scene, or a picture uint8 `[height, width, 3]`, given a state and an observation
    in numpy; and how long a step lasts."""

    scene: Callable[[Any, Any], Scene | np.ndarray]
    milliseconds: int


def drawing_of(env: Env) -> Drawing:
    """How to draw an environment: by its own `render`, if it has one; as it is known here; or by its observations.

    Raises:
      UsageError: the environment cannot be drawn.
    """
    if env.outside is not None:
        if env.render is None:
            raise UsageError(f"{env.name} cannot be drawn: it is not JAX, and `outside_env` was given no `render`")
        return Drawing(lambda picture, _: picture, 50)
    if env.task is not None:
        raise UsageError(f"{env.name} cannot be drawn, since its episodes are tokens")
    if env.render is not None:
        render = env.render
        return Drawing(lambda state, obs: render(state), 50)
    space = env.observation_space
    if isinstance(space, Mapping) and space.keys() == {"obs", *PREVIOUS}:
        if known := _known(env.name, space["obs"]):
            return known._replace(scene=lambda state, obs: known.scene(state, obs["obs"]))
    elif known := _known(env.name, space):
        return known
    return Drawing(lambda state, obs: observation_scene(space, obs), 200)


def _known(name: str, space: Any) -> Drawing | None:
    """The drawing of a name, where an observation is all that it draws; a boolean image of any name is drawn as
    MinAtar's are."""
    game = next((game for game in ("CartPole", "Pendulum") if f"PositionOnly{game}" in name), None)  # POPGym's
    if scene := CLASSIC_CONTROL.get(f"{game}-v1" if game else name):
        return Drawing(lambda state, obs: scene(own_state(state), obs), 30)
    shape = space.shape if isinstance(space, Box) else ()
    if (scene := GRIDS.get(name)) and (name != "Catch-bsuite" or len(shape) == 2):  # it draws its whole observation
        return Drawing(lambda state, obs: scene(own_state(state), obs), 200)
    if name == "cliff" and isinstance(space, Discrete) and space.n == CLIFF_SHAPE[0] * CLIFF_SHAPE[1]:
        return Drawing(cliff, 200)
    if is_image(space) and np.dtype(space.dtype) == bool:
        unnamed = [(i, f"channel {i}", PALETTE[i % len(PALETTE)]) for i in range(space.shape[2])]
        return Drawing(lambda state, obs: channels_scene(obs, MINATAR.get(name, unnamed)), 100)
    return None


def check_drawing(env: Env) -> None:
    """Draws one picture, if the environment draws itself, before a long episode is played for nothing.

    Raises:
      UsageError: the environment cannot be drawn, for example because its renderer lacks what it needs.
    """
    drawing = drawing_of(env)
    if env.render is None:
        return
    try:
        if env.outside is None:
            drawing.scene(*jax.device_get(jax.jit(env.reset)(jax.random.key(0))))
        else:
            with contextlib.closing(env.outside(1)) as envs:
                envs.reset([0])
                env.render(envs)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{env.name} cannot be drawn: {reason(error)}") from error


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
    longest, every = max(len(episode.reward) for episode in episodes), max(episode.every for episode in episodes)
    stride = every if every > 1 else -(-longest // MAX_FRAMES)
    shown = []
    for i, episode in enumerate(episodes):
        count = f" (episode {i + 1} of {len(episodes)})" if len(episodes) > 1 else ""
        shown.append(frames(drawing, episode, title + count, stride))
    while True:
        images, milliseconds = [], []
        for of_episode in shown:
            images += of_episode
            milliseconds += [drawing.milliseconds] * (len(of_episode) - 1) + [MILLISECONDS_AT_END]
        data = gif(images, milliseconds)
        if len(data) <= MAX_BYTES * len(episodes) or len(images) <= 2 * len(episodes):
            return Film(data, len(images), stride)
        stride *= 2
        shown = [[*of_episode[:-1:2], of_episode[-1]] for of_episode in shown]


def frames(drawing: Drawing, episode: Episode, title: str, stride: int = 1) -> "list[Image]":
    """Pictures of an episode at `shown_steps`; `stride` is a multiple of `episode.every`."""
    return_so_far = np.concatenate([[0.0], np.cumsum(episode.reward, dtype=np.float64)])
    num_steps = len(episode.reward)
    ending = ", ".join(["terminated"] * episode.terminated + ["truncated"] * episode.truncated)
    images = []
    for t in shown_steps(num_steps, stride):
        ended = t == num_steps
        i = -1 if ended else t // episode.every
        state, obs = jax.tree.map(lambda x, i=i: x[i], (episode.state, episode.obs))
        line = f"step {t}    return {return_so_far[t]:.4g}" + (f"    {ending}" if ended else "")
        images.append(picture(drawing.scene(state, obs), [title, line], ended))
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
