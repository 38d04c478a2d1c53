"""A film of a policy in its environment: whole episodes recorded on the device, drawn on the host, written as a GIF.

Each frame says how many steps were made and what they have returned; the last one of an episode says how it ended, and
stays. Long episodes are shown at every second, third, ... step.
"""

import io
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.config import Count, check
from purepg.envs.contract import in_units
from purepg.experience.rollout import reset_all
from purepg.run.cli import leave, parse_flags
from purepg.run.drawing import Disc, Drawing, Line, Point, Scene, drawing_of
from purepg.run.evaluation import Choice, run_first
from purepg.run.load import Loaded, load
from purepg.run.record import CONFIG, WANDB, reason, say
from purepg.run.wandb_sink import MAX_NAME_LENGTH, Mode, quiet_settings
from purepg.types import Act, Array, Env, Key, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, MAX_HEIGHT = 440, 360  # of a scene, pixels
HEADER, KEY_LINE, MARGIN = 44, 20, 8
FINE = 3  # scenes are drawn so many times as large and made small, which smooths their edges
MAX_FRAMES = 250  # of an episode
MAX_BYTES = 2_000_000  # of an episode
MILLISECONDS_AT_END = 1500


class Recording(NamedTuple):
    """N episodes side by side. What comes after an episode's end means nothing."""

    state: Any  # leaves [T + 1, N, ...]: before the first step, and after each
    obs: Array  # [T + 1, N, ...]
    reward: Array  # [T, N], and the flags too
    terminated: Array
    truncated: Array


class Episode(NamedTuple):
    """One whole episode of T steps, in numpy."""

    state: Any  # leaves [T + 1, ...]
    obs: np.ndarray  # [T + 1, ...]
    reward: np.ndarray  # [T]
    terminated: bool
    truncated: bool


def record(key: Key, env: Env, act: Act, num_episodes: int, max_steps: int) -> Recording:
    """The episodes that `purepg.train.evaluate` counts at the same arguments, with all their states. Pure."""
    k_start, k_run = jax.random.split(key)
    world = reset_all(k_start, env, num_episodes)

    def body(carry, t):
        env_state, obs = carry
        k_act, k_step = jax.random.split(jax.random.fold_in(k_run, t))
        taken = in_units(env.action_space, act(k_act, obs))
        env_state, time_step = jax.vmap(env.step)(jax.random.split(k_step, num_episodes), env_state, taken)
        return (env_state, time_step.obs), (env_state, time_step)

    first = world.env_state, world.obs
    _, (states, steps) = jax.lax.scan(body, first, jnp.arange(max_steps))
    state, obs = jax.tree.map(lambda x0, x: jnp.concatenate([x0[None], x]), first, (states, steps.obs))
    truncated = steps.truncated | ((jnp.arange(max_steps) == max_steps - 1)[:, None] & ~steps.terminated)
    return Recording(state, obs, steps.reward, steps.terminated, truncated)


def episodes(recording: Recording) -> list[Episode]:
    """The episodes of a recording, each cut where it ended."""
    recording = jax.device_get(recording)
    found = []
    for n in range(recording.reward.shape[1]):
        T = int(np.argmax(recording.terminated[:, n] | recording.truncated[:, n])) + 1
        state, obs = jax.tree.map(lambda x, n=n, T=T: x[: T + 1, n], (recording.state, recording.obs))
        ending = bool(recording.terminated[T - 1, n]), bool(recording.truncated[T - 1, n])
        found.append(Episode(state, obs, np.asarray(recording.reward[:T, n]), *ending))
    return found


# --- pictures ---


def to_pixels(scene: Scene) -> tuple[float, Point]:
    """Pixels per unit, and the scene's origin in pixels of its picture, from the upper left corner."""
    (left, bottom), (right, top) = scene.low, scene.high
    scale = min(WIDTH / (right - left), MAX_HEIGHT / (top - bottom))
    return scale, (MARGIN + (WIDTH - scale * (right - left)) / 2 - scale * left, HEADER + scale * top)


def picture(scene: Scene, lines: Sequence[str], ended: bool = False) -> "Image":
    """A scene under two lines of text, which are white on black where the episode has ended, over the key."""
    from PIL import Image, ImageDraw, ImageFont

    scale, (x0, y0) = to_pixels(scene)
    width = WIDTH + 2 * MARGIN
    scene_end = HEADER + round(scale * (scene.high[1] - scene.low[1])) + MARGIN
    font = ImageFont.load_default(13)
    key = key_places(scene, [font.getlength(name) for _, name in scene.key])
    height = scene_end + KEY_LINE * (key[-1][1] + 1 if key else 0)

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
    image = large.reduce(FINE)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, width, HEADER - 4], fill="#222222" if ended else "white")
    for i, line in enumerate(lines):
        fitting = fit(line, lambda text: ImageFont.load_default(14).getlength(text) <= WIDTH)
        draw.text((MARGIN, 3 + 18 * i), fitting, fill="white" if ended else "black", font=ImageFont.load_default(14))
    for (colour, name), (x, row) in zip(scene.key, key, strict=True):
        y = scene_end + KEY_LINE * row
        draw.rectangle([x, y + 3, x + 11, y + 14], fill=colour, outline="#777777")
        draw.text((x + 16, y), name, fill="black", font=font)
    return image


def fit(line: str, fits: Callable[[str], bool]) -> str:
    """The line, or as much of its beginning and end as fits."""
    shorter = (f"{line[:half]} ... {line[-half:]}" for half in range(len(line) // 2, 0, -1))
    return line if fits(line) else next(filter(fits, shorter), "")


def key_places(scene: Scene, text_widths: Sequence[float]) -> list[tuple[int, int]]:
    """Where each entry of the key begins: (pixels from the left, row)."""
    places, x, row = [], MARGIN, 0
    for text_width in text_widths:
        if x > MARGIN and x + 16 + text_width > WIDTH + MARGIN:
            x, row = MARGIN, row + 1
        places.append((x, row))
        x += round(16 + text_width + 14)
    return places


def shown_steps(num_steps: int, stride: int) -> list[int]:
    """Every `stride`-th step from 0 on, and the last."""
    return [*range(0, num_steps, stride), num_steps]


def frames(drawing: Drawing, episode: Episode, title: str, stride: int = 1) -> "list[Image]":
    """Pictures of an episode at `shown_steps`."""
    so_far = np.concatenate([[0.0], np.cumsum(episode.reward, dtype=np.float64)])
    num_steps = len(episode.reward)
    ending = ", ".join(["terminated"] * episode.terminated + ["truncated"] * episode.truncated)
    images = []
    for t in shown_steps(num_steps, stride):
        state = jax.tree.map(lambda x, t=t: x[t], episode.state)
        ended = t == num_steps
        line = f"step {t}    return {so_far[t]:.4g}" + (f"    {ending}" if ended else "")
        images.append(picture(drawing.scene(state, episode.obs[t]), [title, line], ended))
    return images


class Film(NamedTuple):
    """A GIF and what is in it."""

    data: bytes
    num_frames: int
    stride: int  # every so many steps are shown


def film(env: Env, played: Sequence[Episode], title: str) -> Film:
    """Episodes, one after another, as a GIF whose size stays under `MAX_BYTES` for each of them.

    Raises:
      UsageError: the environment cannot be drawn.
    """
    drawing = drawing_of(env)
    stride = -(-max(len(episode.reward) for episode in played) // MAX_FRAMES)
    while True:
        images, milliseconds = [], []
        for i, episode in enumerate(played):
            count = f" (episode {i + 1} of {len(played)})" if len(played) > 1 else ""
            shown = frames(drawing, episode, title + count, stride)
            images += shown
            milliseconds += [drawing.milliseconds] * (len(shown) - 1) + [MILLISECONDS_AT_END]
        data = gif(images, milliseconds)
        if len(data) <= MAX_BYTES * len(played) or len(images) <= 2 * len(played):
            return Film(data, len(images), stride)
        stride *= 2


def gif(images: "Sequence[Image]", milliseconds: Sequence[int]) -> bytes:
    """Pictures of one size, each shown for its time, over and over. One palette serves them all."""
    from PIL import Image

    sample = [images[i] for i in sorted({round(i) for i in np.linspace(0, len(images) - 1, 12)})]
    mosaic = Image.new("RGB", (images[0].width, images[0].height * len(sample)))
    for i, image in enumerate(sample):
        mosaic.paste(image, (0, i * image.height))
    packed = np.asarray(mosaic).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, count = np.unique(packed, return_counts=True)
    frequent = colours[np.argsort(-count, kind="stable")[:256]]  # flat colours stay as they are; blends come near
    palette = Image.new("P", (1, 1))
    palette.putpalette((frequent[:, None] >> np.array([16, 8, 0], np.uint32) & 255).flatten().tolist())
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    file = io.BytesIO()
    small[0].save(
        file, "GIF", save_all=True, append_images=small[1:], duration=list(milliseconds), loop=0, optimize=False
    )
    return file.getvalue()


# --- the command line ---


@dataclass(frozen=True)
class FilmChoice(Choice):
    """Which agent, and what is filmed.

    Attributes:
      episodes: whole episodes, one after another.
      out: the GIF; None: one in the run's folder, named after the agent.
      wandb: log the film as a run of W&B's, in the group of the training's runs.
    """

    episodes: Count = 1
    out: Path | None = None
    wandb: Mode = "offline"


def main(description: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Films an agent, says what the film shows, and exits: 0 done, 2 a bad argument, 1 a failed write."""
    script = Path(sys.argv[0]).stem
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        choice = check(parse_flags(FilmChoice, run_first(arguments), description))
        agent = load(choice.run, choice.setting, choice.seed, choice.best)
        drawing_of(agent.env)  # before anything compiles
        played = play(agent, choice)
    except UsageError as error:
        leave(script, error, 2)
    which = agent.name
    made = film(agent.env, played, f"{agent.env.name}: {which}")
    out = choice.out or choice.run / f"setting-{agent.setting}-seed-{agent.seed}.gif"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(made.data)
    except OSError as error:
        leave(script, f"cannot write {out}: {reason(error)}", 1)
    returns = [float(episode.reward.sum(dtype=np.float64)) for episode in played]
    every = f", every {made.stride} steps" if made.stride > 1 else ""
    print(f"{which}: returns " + ", ".join(f"{x:.4g}" for x in returns))
    print(f"wrote {out}: {made.num_frames} frames{every}, {len(made.data) / 1e6:.2f} MB")
    if choice.wandb != "disabled":
        log(choice.run, out, which, returns, choice.wandb)


def play(agent: Loaded, choice: FilmChoice) -> list[Episode]:
    """The agent's episodes.

    Raises:
      UsageError: nothing says how long they may last.
    """
    max_steps = agent.max_steps(choice.max_steps)

    @jax.jit
    def run(key, state):
        act = agent.algorithm.policy(state, not choice.sampled)
        return record(key, agent.env, act, choice.episodes, max_steps)

    return episodes(run(jax.random.key(choice.eval_seed), agent.state))


def log(run: Path, film: Path, which: str, returns: Sequence[float], mode: Mode) -> None:
    """Logs the film to W&B, offline where it cannot be online; what fails is said."""
    import wandb

    training = json.loads((run / CONFIG).read_text())["run"]

    def init(mode: Mode) -> Any:
        return wandb.init(
            project=training["wandb_project"],
            group=training["wandb_group"] or run.resolve().name,
            name=f"film: {which}"[:MAX_NAME_LENGTH],
            id=secrets.token_hex(4),  # else a WANDB_RUN_ID in the environment would name it
            job_type="render",
            dir=run,
            mode=mode,
            settings=quiet_settings(),
        )

    try:
        wandb.setup(wandb.Settings(silent=True, mode=mode))  # else a missing key makes a terminal prompt for one
        try:
            logged = init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            logged = init("offline")
            sync = f"`wandb sync {run}/{WANDB}/offline-run-*` sends it"
            say(f"wandb: cannot go online ({reason(error)}); recording offline, {sync}")
        logged.log({"film": wandb.Video(str(film), format="gif"), "episode_return": float(np.mean(returns))})
        logged.finish()
    except Exception as error:
        say(f"wandb: the film was not logged ({reason(error)}); {film} is there")
