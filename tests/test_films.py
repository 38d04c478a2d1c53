"""Films: the episodes are those of the environment, and the pictures show what the states say."""

import io
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_wandb import FakeWandb
from helpers import EMPTY_CONFIG, NUM_IDS, TRUNCATED, arms_env, diary_env, episode_length

from purepg.envs import make
from purepg.envs.gymnax import library
from purepg.envs.lqr import LQRS
from purepg.envs.named_mdps import MDPS
from purepg.envs.named_pomdps import POMDPS
from purepg.envs.named_tasks import TASKS
from purepg.envs.outside import outside_env
from purepg.envs.suites.popgym import NAMES as POPGYM
from purepg.envs.wrappers import Counted
from purepg.run.films import command
from purepg.run.films import episodes as episodes_module
from purepg.run.films import film as film_module
from purepg.run.films.classic_control import CLASSIC_CONTROL
from purepg.run.films.episodes import Episode, play
from purepg.run.films.film import MAX_FRAMES, check_drawing, drawing_of, film, frames, shown_steps
from purepg.run.films.grids import GRIDS
from purepg.run.films.minatar import BLACK, MINATAR
from purepg.run.films.observations import cells, colour_of, wrapped
from purepg.run.films.picture import fit, picture, to_pixels
from purepg.run.films.scene import BLUE, GREEN, INK, ORANGE, RED, Disc, Line, Polygon, Scene
from purepg.run.load import Agent
from purepg.train import evaluate
from purepg.types import Actor, Box, Discrete, Env, MultiDiscrete, TimeStep, UsageError

WHITE = (255, 255, 255)


def random_action(key, obs):
    return jax.random.randint(key, (len(obs),), 0, 2)


def at_random(learned):
    return Actor.of(random_action)


# It remembers how many steps it has taken, and takes action 1 at every second one.
EVERY_SECOND = Actor(lambda key, obs: (), lambda noise, t, obs: (t + 1, t % 2, None), lambda n: jnp.zeros(n, int))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def pixel(scene, point) -> tuple[int, ...]:
    """The colour at a place of the scene's own coordinates."""
    scale, (x0, y0) = to_pixels(scene)
    pixels = np.asarray(picture(scene, ["", ""]))
    return tuple(pixels[int(y0 - scale * point[1]), int(x0 + scale * point[0])].tolist())


# --- the episodes ---


def test_played_episode_is_that_of_a_plain_loop():
    env, key = make("CartPole-v1"), jax.random.key(3)
    (episode,) = play(key, env, at_random, None, 1, 100)
    reset, step, act = jax.jit(env.reset), jax.jit(env.step), jax.jit(random_action)
    k_start, k_run = jax.random.split(key)
    state, obs = reset(jax.random.split(k_start, 1)[0])
    for t in range(len(episode.reward)):
        np.testing.assert_allclose(episode.obs[t], obs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(episode.state.theta[t], state.theta, rtol=1e-5, atol=1e-6)
        k_act, k_step = jax.random.split(jax.random.fold_in(k_run, t))
        state, (obs, reward, terminated, truncated, _) = step(
            jax.random.split(k_step, 1)[0], state, act(k_act, obs[None])[0]
        )
        assert episode.reward[t] == reward
        ended = t == len(episode.reward) - 1
        assert bool(terminated | truncated) == ended
    np.testing.assert_allclose(episode.obs[-1], obs, rtol=1e-5, atol=1e-6)
    assert len(episode.obs) == len(episode.state.x) == len(episode.reward) + 1
    assert (episode.terminated, episode.truncated) == (True, False)


@pytest.mark.parametrize("actor", [Actor.of(random_action), EVERY_SECOND], ids=["at random", "from memory"])
def test_episodes_are_those_that_an_evaluation_counts_and_end_as_they_do(actor):
    env, key = diary_env(), jax.random.key(0)
    played = play(key, env, lambda learned: actor, None, 32, 3)
    stats = evaluate(key, env, actor, 32, 3)  # some episodes last 4 steps: cut
    np.testing.assert_allclose([e.reward.sum() for e in played], stats.episode_return, rtol=1e-6)
    np.testing.assert_array_equal([len(e.reward) for e in played], stats.episode_length)
    np.testing.assert_array_equal([e.terminated for e in played], stats.terminated)
    np.testing.assert_array_equal([e.truncated for e in played], stats.truncated)
    for episode in played:
        assert len(episode.reward) == min(3, episode_length(episode.obs[0, 0]))
        np.testing.assert_array_equal(episode.obs[:, 1], np.arange(len(episode.obs)))
        assert np.all(episode.obs[:, 0] == episode.obs[0, 0]) and episode.obs[0, 0] < NUM_IDS
        if actor is EVERY_SECOND:
            bonus = episode.reward - episode.obs[:-1].sum(-1)
            np.testing.assert_array_equal(bonus, 0.5 * (np.arange(len(bonus)) % 2))


def test_first_episodes_do_not_depend_on_how_many_are_played():
    env, key = make("Catch-bsuite"), jax.random.key(0)
    by_rule = Actor.of(lambda key, obs: obs[:, 9].argmax(-1) % 3)
    few, many = (play(key, env, lambda _: by_rule, None, n, 20) for n in (2, 5))
    for a, b in zip(few, many, strict=False):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_episode_at_its_time_limit_is_truncated():
    env = arms_env(ending=TRUNCATED)
    for episode in play(jax.random.key(0), env, at_random, None, 4, 10):
        assert (episode.terminated, episode.truncated) == (False, True)


# --- the drawings ---


def test_pole_leans_as_its_angle_says():
    for x, theta in ((0.0, 0.0), (1.0, 0.3), (-2.0, -0.2)):
        scene = CLASSIC_CONTROL["CartPole-v1"](SimpleNamespace(x=x, theta=theta), np.zeros(4))
        middle = x + 0.5 * math.sin(theta), 0.25 + 0.5 * math.cos(theta)
        assert pixel(scene, middle) == rgb(ORANGE)
        assert pixel(scene, (x + 0.25, 0.15)) == rgb(INK)  # the cart
        assert pixel(scene, (2.4, 0.1)) == pixel(scene, (-2.4, 0.1)) == rgb(RED)  # the limits
        assert pixel(scene, (x, 1.45)) == WHITE


def test_pendulum_is_upright_at_zero_and_turns_counter_clockwise():
    for theta, tip in ((0.0, (0, 1)), (math.pi, (0, -1)), (math.pi / 2, (-1, 0))):
        scene = CLASSIC_CONTROL["Pendulum-v1"](SimpleNamespace(theta=theta, last_u=np.zeros(1)), np.zeros(3))
        assert pixel(scene, (0.95 * tip[0], 0.95 * tip[1])) == rgb(RED)
        assert pixel(scene, (-0.9 * tip[0], -0.9 * tip[1])) == WHITE


def test_torque_is_drawn_in_the_direction_in_which_it_turns():
    for torque, side in ((2.0, -1), (-2.0, 1)):  # counter-clockwise of an upright rod is to the left
        scene = CLASSIC_CONTROL["Pendulum-v1"](SimpleNamespace(theta=0.0, last_u=np.array([torque])), np.zeros(3))
        (arc,) = [shape for shape in scene.shapes if isinstance(shape, Line) and shape.colour == BLUE]
        assert np.sign(arc.points[-1][0]) == side
    state, _ = make("Pendulum-v1").reset(jax.random.key(0))
    push, _ = make("Pendulum-v1").step(jax.random.key(0), state.replace(theta=0.0, theta_dot=0.0), jnp.ones(1))
    assert push.theta > 0  # a positive torque raises the angle


def test_car_stands_on_the_hill_and_the_flag_at_the_goal():
    for name, goal in (("MountainCar-v0", 0.5), ("MountainCarContinuous-v0", 0.45)):
        for x in (-1.1, -0.5, 0.2):
            scene = CLASSIC_CONTROL[name](SimpleNamespace(position=x), np.zeros(2))
            (car,) = [s for s in scene.shapes if isinstance(s, Polygon) and s.colour == BLUE]
            centre = np.mean(car.points, axis=0)
            assert abs(centre[0] - x) < 0.07
            assert 0 < centre[1] - (0.45 * math.sin(3 * centre[0]) + 0.55) < 0.12
            assert pixel(scene, tuple(centre)) == rgb(BLUE)
            assert pixel(scene, (goal + 0.03, 0.45 * math.sin(3 * goal) + 0.55 + 0.175)) == rgb(GREEN)


def test_acrobat_hangs_down_at_zero_and_its_tip_passes_the_line_where_the_episode_ends():
    def tip(first, second):
        scene = CLASSIC_CONTROL["Acrobot-v1"](SimpleNamespace(joint_angle1=first, joint_angle2=second), np.zeros(6))
        (disc,) = [shape for shape in scene.shapes if isinstance(shape, Disc) and shape.colour == RED]
        assert pixel(scene, disc.centre) == rgb(RED)
        return disc.centre

    np.testing.assert_allclose(tip(0.0, 0.0), (0, -2))
    np.testing.assert_allclose(tip(math.pi / 2, 0.0), (2, 0), atol=1e-9)
    np.testing.assert_allclose(tip(math.pi / 2, math.pi / 2), (1, 1), atol=1e-9)
    env = make("Acrobot-v1")
    state, _ = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    rng = np.random.default_rng(0)
    for first, second in rng.uniform(-math.pi, math.pi, (20, 2)):
        still = state.replace(joint_angle1=first, joint_angle2=second, velocity_1=0.0, velocity_2=0.0)
        reached, time_step = step(jax.random.key(0), still, 1)
        assert (tip(float(reached.joint_angle1), float(reached.joint_angle2))[1] > 1) == bool(time_step.terminated)


def test_cliff_lies_where_steps_cost_a_hundred_and_the_agent_where_the_state_says():
    env = make("cliff")
    scene: Any = drawing_of(env).scene(None, np.array(17))

    def at(row, column, scene=scene):
        return pixel(scene, (column + 0.5, 4 - row - 0.5))

    assert at(1, 5) == rgb(BLUE)  # 17 = 1 * 12 + 5
    assert at(3, 11) == rgb(GREEN)
    assert all(at(3, column) == rgb(INK) for column in range(1, 11))
    state, _ = env.reset(jax.random.key(0))
    assert at(3, 0, drawing_of(env).scene(state, np.asarray(state.state))) == rgb(BLUE)  # the start


def test_a_cliff_of_another_shape_with_as_many_states_is_not_drawn_as_the_usual_one():
    shapes: list[dict[str, Any]] = [{}, {"width": 6, "height": 8}]
    usual, other = (drawing_of(make("cliff", shape)).scene(None, np.array(17)) for shape in shapes)
    assert isinstance(usual, Scene) and isinstance(other, Scene) and other.high != usual.high


def test_rooms_have_their_walls_and_the_ball_falls_on_the_paddles_row():
    state = SimpleNamespace(pos=np.array([4, 1]), goal=np.array([8, 9]))
    rooms = GRIDS["FourRooms-misc"](state, np.zeros(4))
    assert pixel(rooms, (1.5, 13 - 4.5)) == rgb(BLUE)
    assert pixel(rooms, (9.5, 13 - 8.5)) == rgb(GREEN)
    assert pixel(rooms, (6.5, 13 - 1.5)) == rgb(INK)
    assert pixel(rooms, (6.5, 13 - 3.5)) not in (rgb(INK), WHITE)  # a door
    ball = GRIDS["Catch-bsuite"](SimpleNamespace(ball_x=1, ball_y=3, paddle_x=4, paddle_y=9), np.zeros((10, 5)))
    assert pixel(ball, (1.5, 6.5)) == rgb(RED)
    assert pixel(ball, (4.5, 0.5)) == rgb(BLUE)


def test_channels_of_minatar_have_their_colours_and_places():
    for name, channels in MINATAR.items():
        env = make(name)
        assert isinstance(env.observation_space, Box)
        num_channels = env.observation_space.shape[2]
        left_out = {1} if name == "SpaceInvaders-MinAtar" else set()  # an alien is drawn by its direction
        assert {channel for channel, _, _ in channels} == set(range(num_channels)) - left_out
        drawing = drawing_of(env)
        for channel, _, colour in channels:
            obs = np.zeros((10, 10, num_channels), bool)
            obs[2, 7, channel] = True
            scene = drawing.scene(None, obs)
            assert pixel(scene, (7.5, 7.5)) == rgb(colour)
            assert pixel(scene, (2.5, 2.5)) == rgb(BLACK)


def test_a_category_is_the_blue_cell_of_its_row():
    scene = drawing_of(make("garnet")).scene(None, np.array(4))
    assert [pixel(scene, (i + 0.5, 0.5)) == rgb(BLUE) for i in range(6)] == [False] * 4 + [True, False]


def test_a_number_is_bluer_above_0_redder_below_and_a_part_of_its_bound():
    bound, inf = np.array([2, 2, 0, 4, 1e38], np.float32), np.full(3, np.inf, np.float32)
    bounded = cells(Box(-bound, bound), np.array([2, -1, 0, 1, -1e38], np.float32))
    np.testing.assert_allclose(bounded, [[1, -0.5, 0, 0.25, -1]], atol=1e-12)
    np.testing.assert_allclose(cells(Box(-inf, inf), np.array([3, -1, 0], np.float32)), [[0.75, -0.5, 0]])
    np.testing.assert_allclose(cells(MultiDiscrete((3, 1, 5)), np.array([2, 0, 1])), [[1, 0, 0.25]])
    assert [colour_of(x) for x in (1.0, -1.0, 0.0, 0.5)] == [BLUE, RED, "#F0F0F0", "#78B1D1"]


def test_rows_have_one_length_and_channels_lie_side_by_side():
    space, nan = Box(np.zeros((2, 3, 2)), np.ones((2, 3, 2))), np.nan
    image = np.arange(12).reshape(2, 3, 2) / 12
    shown = [[0, 2, 4, nan, 1, 3, 5], [6, 8, 10, nan, 7, 9, 11]]
    np.testing.assert_allclose(cells(space, image), np.array(shown) / 12)
    for n, shape in (1, (1, 1)), (32, (1, 32)), (40, (2, 32)), (8268, (91, 91)):
        rows = wrapped(np.arange(n))
        assert rows.shape == shape and np.isnan(rows.ravel()[n:]).all()
        np.testing.assert_array_equal(rows.ravel()[:n], np.arange(n))


def test_entries_of_a_dict_lie_below_each_other_in_frames_that_the_key_names():
    env = make("repeat_previous", previous=True)
    told = {"obs": np.array(1), "previous_action": np.array(0), "previous_reward": np.array(-3.0)}
    scene: Any = drawing_of(env).scene(None, told)
    assert list(dict(scene.key).values()) == ["above 0", "below 0", *told]
    assert scene.high == (8, 5)
    blue = [(x, y) for x in range(8) for y in range(5) if pixel(scene, (x + 0.5, y + 0.5)) == rgb(BLUE)]
    assert blue == [(0, 2), (1, 4)]
    assert pixel(scene, (0.5, 0.5)) == rgb(colour_of(-0.75))


def test_hidden_parts_of_a_known_picture_leave_the_observation_and_popgyms_pole_is_a_pole():
    image = np.zeros(10)
    image[7] = 1
    scene = drawing_of(make("Catch-bsuite", observed="0-4,45-49")).scene(None, image)
    assert pixel(scene, (7.5, 0.5)) == rgb(BLUE) and pixel(scene, (6.5, 0.5)) != rgb(BLUE)
    state = SimpleNamespace(x=1.0, theta=0.3)
    noisy = drawing_of(make("popgym/NoisyPositionOnlyCartPoleHard", previous=True))
    assert noisy.scene(state, {"obs": np.zeros(2)}) == CLASSIC_CONTROL["CartPole-v1"](state, np.zeros(4))


def test_every_environment_in_jax_can_be_drawn_but_those_of_tokens():
    names = {*MDPS, *POMDPS, *LQRS, *TASKS, *library().registered_envs, *(f"popgym/{name}" for name in POPGYM)}
    for name in sorted(names - {"MNISTBandit-bsuite"}):  # which reads files
        env = make(name)
        if name in TASKS:
            with pytest.raises(UsageError, match=f"^{name} cannot be drawn, since its episodes are tokens$"):
                drawing_of(env)
            continue
        shapes = jax.eval_shape(env.reset, jax.random.key(0))
        state, obs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        assert picture(drawing_of(env).scene(state, obs), ["", ""]).width > 400, name


# --- the film ---


def walk(num_steps: int) -> Episode:
    """Along the cliff and back."""
    obs = np.array([abs(t % 20 - 10) for t in range(num_steps + 1)], np.int32)
    return Episode(obs, obs, np.full(num_steps, -1.0, np.float32), False, True)


@pytest.mark.parametrize(("num_steps", "stride"), [(7, 1), (MAX_FRAMES + 1, 2)])
def test_film_has_the_frames_it_says_and_stays_at_the_end(num_steps, stride):
    from PIL.GifImagePlugin import GifImageFile

    made = film(make("cliff"), [walk(num_steps), walk(num_steps)], "title")
    image = GifImageFile(io.BytesIO(made.data))
    per_episode = len(shown_steps(num_steps, stride))
    assert (made.stride, made.num_frames, image.n_frames) == (stride, 2 * per_episode, 2 * per_episode)
    assert shown_steps(num_steps, stride)[-1] == num_steps
    milliseconds = []
    for i in range(image.n_frames):
        image.seek(i)
        milliseconds.append(image.info["duration"])
    assert milliseconds == ([200] * (per_episode - 1) + [1500]) * 2


def test_frames_of_the_gif_are_the_pictures():
    from PIL.GifImagePlugin import GifImageFile

    env = make("cliff")
    image = GifImageFile(io.BytesIO(film(env, [walk(3)], "title").data))
    for i, wanted in enumerate(frames(drawing_of(env), walk(3), "title")):
        image.seek(i)
        assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(wanted, int)).max() < 16
        assert (wanted.getpixel((2, 2)) == WHITE) == (i < 3)  # the end is to be seen


def test_film_that_would_be_too_large_shows_fewer_steps(monkeypatch):
    whole = film(make("cliff"), [walk(40)], "title")
    monkeypatch.setattr(film_module, "MAX_BYTES", len(whole.data) // 3)
    made = film(make("cliff"), [walk(40)], "title")
    assert made.stride > 1 and len(made.data) <= len(whole.data) // 3


# --- environments that draw themselves ---

LONG = 700


def counter_env(length: int = LONG, height: int = 2, width: int = 3, own: Any = None) -> Env:
    """Counts its steps, ends after `length` of them, and draws the number as a grey: its own picture."""

    def reset(key):
        return {"t": jnp.int32(0), "key": key}, jnp.zeros(1)

    def step(key, state, action):
        t = state["t"] + 1
        return {"t": t, "key": key}, TimeStep(jnp.zeros(1), jnp.float32(2), t >= length, jnp.bool_(False))

    def render(state):
        return np.full((height, width, 3), int(state["t"]) % 256, np.uint8)

    space = Box(np.zeros(1, np.float32), np.ones(1, np.float32))
    return Env(reset, step, space, Discrete(2), length + 50, "counter", render=own or render)


def shade(image: Any) -> int:
    """The grey of a picture at its middle."""
    return image.getpixel((image.width // 2, 100))[0]


@pytest.mark.parametrize(("length", "max_steps", "every"), [(3, 9, 1), (250, 300, 1), (251, 300, 2), (LONG, 750, 4)])
def test_thinned_states_are_those_of_every_so_many_steps_and_the_last(length, max_steps, every):
    env, key = counter_env(length), jax.random.key(0)
    whole, thin = (play(key, env, at_random, None, 2, max_steps, thinned)[1] for thinned in (False, True))
    assert (thin.every, whole.every, len(whole.reward)) == (every, 1, length)
    steps = [*range(0, length, every), length]
    assert len(steps) <= MAX_FRAMES + 1 and (every == 1 or length > every // 2 * MAX_FRAMES)
    np.testing.assert_array_equal(thin.state["t"], steps)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[steps]), thin.state, whole.state)
    np.testing.assert_array_equal(thin.reward, whole.reward)


def test_blocks_of_any_length_play_the_same_episodes(monkeypatch):
    env, key = diary_env(), jax.random.key(0)
    whole = play(key, env, at_random, None, 16, 4)
    monkeypatch.setattr(episodes_module, "BLOCK_BYTES", 16 * 24)  # two int32 of state and two of observation, and less
    for a, b in zip(whole, play(key, env, at_random, None, 16, 4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_frames_are_the_environments_own_pictures_of_the_steps_that_they_name():
    env = counter_env()
    drawing = drawing_of(env)
    (episode,) = play(jax.random.key(0), env, at_random, None, 1, 750, thinned=True)
    images = frames(drawing, episode, "title", 8)
    assert [shade(image) for image in images] == [t % 256 for t in shown_steps(LONG, 8)]
    assert images[-1].getpixel((2, 2)) != WHITE and images[0].getpixel((2, 2)) == WHITE
    made = film(env, [episode], "title")
    assert (made.stride, made.num_frames) == (4, 176)  # 0, 4, ..., 696, and 700


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(2, 3, (292, 438)), (64, 64, (320, 320)), (360, 440, (360, 440)), (480, 640, (240, 320)), (500, 100, (250, 50))],
)
def test_own_pictures_are_enlarged_or_reduced_by_a_whole_factor(height, width, shown):
    image = picture(np.zeros((height, width, 3), np.uint8), ["", ""])
    dark = (np.asarray(image) == 0).all(axis=-1)[44:]  # below the text
    assert (dark.any(axis=1).sum(), dark.any(axis=0).sum()) == shown
    assert image.width == picture(drawing_of(make("cliff")).scene(None, np.array(0)), ["", ""]).width


def test_a_time_limit_does_not_change_how_a_state_is_drawn():
    state, obs = SimpleNamespace(x=1.0, theta=0.3), np.zeros(4)
    drawing = drawing_of(make("CartPole-v1", max_episode_steps=9))
    for seen in (state, Counted(state, jnp.int32(3)), Counted(Counted(state, jnp.int32(3)), jnp.int32(3))):
        shown = np.asarray(picture(drawing.scene(seen, obs), ["", ""]))
        np.testing.assert_array_equal(shown, picture(CLASSIC_CONTROL["CartPole-v1"](state, obs), ["", ""]))


def test_a_picture_of_the_observation_is_the_same_where_the_previous_action_is_observed():
    full = np.zeros((10, 10, 4), bool)
    full[2, 7, 0] = True
    drawings = [drawing_of(make("Breakout-MinAtar", previous=previous)) for previous in (False, True)]
    told = {"obs": full, "previous_action": np.array(3), "previous_reward": np.array(0.0)}
    plain, shown = (
        np.asarray(picture(drawing.scene(None, obs), ["", ""]))
        for drawing, obs in zip(drawings, (full, told), strict=True)
    )
    np.testing.assert_array_equal(shown, plain)


def test_an_environment_that_is_not_jax_is_not_drawn_even_if_its_name_is_known():
    space = make("CartPole-v1").observation_space
    env = outside_env("CartPole-v1", lambda n: None, space, Discrete(2), 9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"^CartPole-v1 cannot be drawn: it is not JAX, and `outside_env` was given"):
        drawing_of(env)


def test_small_pictures_keep_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    shown = np.asarray(picture(pixels, ["", ""]))
    factor = min(440 // 5, 360 // 4)
    top, left = 44, (shown.shape[1] - 5 * factor) // 2
    np.testing.assert_array_equal(
        shown[top : top + 4 * factor, left : left + 5 * factor], pixels.repeat(factor, 0).repeat(factor, 1)
    )


def test_a_renderer_that_lacks_something_is_said_in_one_line_before_anything_is_played():
    def no_display(state):
        raise RuntimeError("no EGL here\nand more")

    def refuses(state):
        raise UsageError("drawing needs EGL or OSMesa")

    check_drawing(counter_env())
    check_drawing(make("cliff"))
    with pytest.raises(UsageError, match=r"^counter cannot be drawn: RuntimeError: no EGL here$"):
        check_drawing(counter_env(own=no_display))
    with pytest.raises(UsageError, match=r"^drawing needs EGL or OSMesa$"):
        check_drawing(counter_env(own=refuses))


def test_long_titles_keep_their_beginning_and_end():
    assert fit("abc", lambda text: True) == "abc"
    assert fit("abcdefghijklmnop", lambda text: len(text) <= 12) == "abc ... nop"


def test_command_line_writes_the_film_of_the_agent_and_says_what_it_shows(tmp_path, monkeypatch, capsys):
    def load(run, setting, seed, best):
        algorithm: Any = SimpleNamespace(policy=lambda state, _: Actor.of(lambda key, obs: jnp.full(len(obs), state)))
        env = make("Catch-bsuite" if best else "sorting")
        state: Any = jnp.int32(1)  # the action that it always takes
        return Agent(env, algorithm, state, setting=2, seed=3, label="gamma=0.9", update=1)

    monkeypatch.setattr(command, "load", load)
    command.main(arguments=[str(tmp_path), "--best", "--episodes", "2", "--wandb", "disabled"])
    said = capsys.readouterr().out
    assert said.startswith("gamma=0.9, seed 3: returns ")
    assert "setting-2-seed-3.gif: 20 frames, " in said  # 9 steps twice
    assert (tmp_path / "setting-2-seed-3.gif").read_bytes().startswith(b"GIF89a")
    with pytest.raises(SystemExit) as exit:
        command.main(arguments=[str(tmp_path), "--setting", "2"])
    assert exit.value.code == 2
    assert "sorting cannot be drawn" in capsys.readouterr().err


@pytest.mark.parametrize("group", [None, "mine"])
def test_a_film_is_a_wandb_run_in_the_group_of_the_training(tmp_path, monkeypatch, capsys, group):
    import wandb

    fake = FakeWandb(monkeypatch)
    fake.online_error = ConnectionError("no network")
    training = EMPTY_CONFIG | {"run": {"wandb_project": "project", "wandb_group": group}}
    (tmp_path / "config.json").write_text(json.dumps(training))
    (tmp_path / "film.gif").write_bytes(film(make("cliff"), [walk(3)], "title").data)
    command.log(tmp_path, tmp_path / "film.gif", "gamma=0.9, seed 3", [1.0, 2.0], "online")
    (run,) = fake.opened
    own = {"project": "project", "group": group or tmp_path.name, "name": "film: gamma=0.9, seed 3", "mode": "offline"}
    assert (own | {"job_type": "render"}).items() <= run.options.items() and run.has_finished
    (row,) = run.rows
    assert isinstance(row["film"], wandb.Video) and row["episode_return"] == 1.5
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot go online (ConnectionError: no network); recording offline" in line
    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    command.log(tmp_path, tmp_path / "film.gif", "name", [1.0], "offline")
    assert "the film was not logged (ZeroDivisionError" in capsys.readouterr().err
