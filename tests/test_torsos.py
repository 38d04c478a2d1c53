"""Torsos: what they read of an observation, and what their layers compute."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arms_env, quick_jit
from jax import lax

from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.networks.convolutions import CONVOLUTIONS, convolve, impala
from purepg.networks.observations import as_features, image_features
from purepg.networks.torsos import Torso
from purepg.types import Box, Discrete, LegalActions, Moment, MultiDiscrete, UsageError

RNG = np.random.default_rng(0)


def box(*shape: int, low: Any = -np.inf, high: Any = np.inf, dtype: Any = np.float32) -> Box:
    return Box(np.full(shape, low, dtype), np.full(shape, high, dtype), dtype)


PIXELS = box(12, 10, 3, low=0, high=255, dtype=np.uint8)
BITS = box(10, 10, 4, low=0, high=1, dtype=bool)
TREE: Any = {
    "camera": PIXELS,
    "inner": (Discrete(3), MultiDiscrete((2, 3))),
    "legal": LegalActions(2),
    "map": BITS,
    "speed": box(2, 2),
}
NUM_FLAT = 3 + 2 + 3 + 4  # features of all but the images
SEEN: Any = {
    "camera": RNG.integers(0, 256, (5, 12, 10, 3)).astype(np.uint8),
    "inner": (RNG.integers(0, 3, 5), RNG.integers(0, (2, 3), (5, 2))),
    "legal": RNG.random((5, 2)) < 0.5,
    "map": RNG.random((5, 10, 10, 4)) < 0.5,
    "speed": RNG.normal(size=(5, 2, 2)).astype(np.float32),
}
SMALL: dict[str, Any] = {"hidden": (8, 8)}


def torso_of(space: Any, **config: Any) -> Any:
    return Torso(space, NetworkConfig(**SMALL | config))


def made(space: Any, obs: Any, **config: Any) -> tuple[Any, Any, Any]:
    """(torso, its parameters, its features)."""
    torso = torso_of(space, **config)
    features, params = quick_jit(torso.init_with_output)(jax.random.key(0), obs)
    return torso, params, features


def names(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params["params"])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


# --- observations ---


def test_features_of_choices_are_one_hot_and_of_all_else_the_values():
    np.testing.assert_array_equal(as_features(jnp.array([2, 0]), Discrete(3)), [[0, 0, 1], [1, 0, 0]])
    choices = as_features(jnp.array([[1, 0], [0, 2]]), MultiDiscrete((2, 3)))
    np.testing.assert_array_equal(choices, [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])
    np.testing.assert_array_equal(as_features(jnp.uint8([7]), box(1, dtype=np.uint8, low=0, high=255)), [7.0])


def test_images_of_integers_are_scaled_by_their_bounds_and_others_keep_their_values():
    np.testing.assert_allclose(image_features(jnp.uint8([[[0, 51, 255]]]), PIXELS), [[[0, 0.2, 1]]], rtol=1e-6)
    low, high = np.array([[[2, 0, 3]]], np.int32), np.array([[[4, 10, 3]]], np.int32)
    scaled = image_features(jnp.array([[[3, 10, 3]]]), Box(low, high, np.int32))
    np.testing.assert_allclose(scaled, [[[0.5, 1, 0]]], rtol=1e-6)
    deep, loose = (box(1, 1, 1, low=0, high=high, dtype=np.int32) for high in (2**16 - 1, 2**31 - 1))
    assert image_features(jnp.array([[[2**16 - 1]]]), deep) == 1 and image_features(jnp.array([[[7]]]), loose) == 7
    normalised = jnp.float32([[[-1.5, 0.0, 9.0]]])
    np.testing.assert_array_equal(image_features(normalised, PIXELS), normalised)
    np.testing.assert_array_equal(image_features(jnp.array([[[True, False]]]), BITS), [[[1, 0]]])


def test_the_dense_torso_reads_every_leaf_but_a_mask_in_the_trees_order_and_pixels_from_0_to_1():
    _, params, features = made(TREE, SEEN, hidden=(8,))
    parts = (
        SEEN["camera"].reshape(5, -1) / 255,
        np.eye(3)[SEEN["inner"][0]],
        np.eye(2)[SEEN["inner"][1][:, 0]],
        np.eye(3)[SEEN["inner"][1][:, 1]],
        SEEN["map"].reshape(5, -1),
        SEEN["speed"].reshape(5, -1),
    )
    layer = params["params"]["hidden_0"]
    expected = np.tanh(np.concatenate(parts, axis=-1, dtype=np.float32) @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("torso", ["cnn", "impala"])
def test_every_image_has_convolutions_of_its_own_and_dense_layers_read_them_and_all_other_leaves(torso):
    _, params, features = made(TREE, SEEN, torso=torso)
    shapes = names(params)
    convolved = {"cnn": (10 * 8 * 16, 8 * 8 * 16), "impala": (2 * 2 * 32, 2 * 2 * 32)}[torso]
    assert shapes["hidden_0/kernel"] == (sum(convolved) + NUM_FLAT, 8) and features.shape == (5, 8)
    first = {"cnn": "conv", "impala": "section_0_conv"}[torso]
    assert shapes[f"image_0_{first}/kernel"] == (3, 3, 3, 16) and shapes[f"image_1_{first}/kernel"] == (3, 3, 4, 16)


def test_features_depend_on_every_leaf_but_the_mask():
    torso, params, features = made(TREE, SEEN, torso="cnn")
    apply = quick_jit(torso.apply)
    for path, x in jax.tree_util.tree_leaves_with_path(SEEN):
        other = np.roll(x, 1, axis=0) if x.dtype != bool else ~x
        changed = jax.tree_util.tree_map_with_path(lambda at, x, p=path, o=other: o if at == p else x, SEEN)
        same = np.array_equal(apply(params, changed), features)
        assert same == ("legal" in jax.tree_util.keystr(path)), path


def test_an_image_alone_in_a_tree_has_the_parameters_of_an_image_without_one():
    bits = SEEN["map"]
    alone, in_tree = (made(space, obs, torso="cnn")[1] for space, obs in ((BITS, bits), ({"map": BITS}, {"map": bits})))
    jax.tree.map(np.testing.assert_array_equal, alone, in_tree)
    assert set(alone["params"]) == {"conv", "hidden_0", "hidden_1"}


# --- layers ---

IMAGE = RNG.integers(0, 256, (2, 3, 40, 36, 3)).astype(np.uint8)
IMAGES = box(40, 36, 3, low=0, high=255, dtype=np.uint8)
VECTOR = RNG.normal(size=(2, 3, 6)).astype(np.float32)
TORSOS = {
    "mlp": (box(6), VECTOR, {}),
    "mlp, normalised": (box(6), VECTOR, {"layer_norm": True}),
    "cnn": (IMAGES, IMAGE, {"torso": "cnn"}),
    "nature": (IMAGES, IMAGE, {"torso": "nature"}),
    "impala": (IMAGES, IMAGE, {"torso": "impala"}),
    "simba": (box(6), VECTOR, {"torso": "simba"}),
}
NORMALISED = {f"{name}, normalised": (IMAGES, IMAGE, {"torso": name, "layer_norm": True}) for name in CONVOLUTIONS}


@functools.cache
def named(name: str) -> tuple[Any, Any, Any]:
    space, obs, config = (TORSOS | NORMALISED)[name]
    return made(space, obs, **config)


@pytest.mark.parametrize("name", TORSOS)
def test_features_do_not_depend_on_the_batch_axes(name):
    """Nor on what else is in the batch; and seeds can be vmapped."""
    space, obs, config = TORSOS[name]
    torso = torso_of(space, **config)

    @quick_jit
    def run(keys):
        params = jax.vmap(lambda key: torso.init(key, obs))(keys)
        together = jax.vmap(torso.apply, in_axes=(0, None))(params, obs)
        one = jax.tree.map(lambda x: x[1], params)
        return torso.init(keys[1], obs[0, 0]), one, together[1], torso.apply(one, obs), torso.apply(one, obs[1, 2])

    alone, one, among_seeds, batched, single = run(jax.random.split(jax.random.key(0), 2))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), alone, one)
    assert batched.shape == (2, 3, 8) and single.shape == (8,) and np.std(batched) > 0.01
    np.testing.assert_allclose(batched, among_seeds, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batched[1, 2], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TORSOS)
def test_narrow_parameters_give_features_near_the_others(name):
    torso, params, features = named(name)
    narrow = quick_jit(torso.apply)(jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params), TORSOS[name][1])
    np.testing.assert_allclose(np.float32(narrow), features, atol=0.1 * np.abs(features).max())


@pytest.mark.parametrize("name", TORSOS)
def test_kernels_start_orthogonal_and_biases_at_zero(name):
    _, params, _ = named(name)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if jax.tree_util.keystr(path).endswith("['bias']"):
            assert not np.any(x)
        if jax.tree_util.keystr(path).endswith("['kernel']"):
            singular = np.linalg.svd(np.reshape(x, (-1, x.shape[-1])), compute_uv=False)
            linear = "embedding" in str(path) or "_out" in str(path)
            np.testing.assert_allclose(singular, 1.0 if linear else np.sqrt(2), rtol=1e-4)


def test_natures_convolutions_are_those_of_dqn():
    """3136 features of Atari's 84 x 84 images, of 4 frames (Mnih et al. 2015, extended data)."""
    space = box(84, 84, 4, low=0, high=255, dtype=np.uint8)
    torso = torso_of(space, torso="nature", hidden=(512,))
    params = jax.eval_shape(torso.init, jax.random.key(0), jnp.zeros((84, 84, 4), jnp.uint8))
    kernels = {name: shape for name, shape in names(params).items() if name.endswith("kernel")}
    assert kernels == {
        "conv_0/kernel": (8, 8, 4, 32),
        "conv_1/kernel": (4, 4, 32, 64),
        "conv_2/kernel": (3, 3, 64, 64),
        "hidden_0/kernel": (3136, 512),
    }


def test_impalas_network_has_fifteen_convolutions_and_halves_the_image_thrice():
    """2048 features of a 64 x 64 image, as in Procgen's network."""
    space = box(64, 64, 3, low=0, high=255, dtype=np.uint8)
    torso = torso_of(space, torso="impala", hidden=(256,))
    params = jax.eval_shape(torso.init, jax.random.key(0), jnp.zeros((64, 64, 3), jnp.uint8))
    kernels = {name: shape for name, shape in names(params).items() if name.endswith("kernel")}
    filters = [shape[-1] for name, shape in kernels.items() if "conv" in name]
    assert sorted(filters) == [16] * 5 + [32] * 10 and kernels["hidden_0/kernel"] == (2048, 256)
    assert all(shape[:2] == (3, 3) for name, shape in kernels.items() if "conv" in name)


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "SAME"), ((3, 2), "SAME"), ((2, 1), "VALID")])
def test_a_convolution_as_a_product_of_matrices_is_the_librarys(strides, padding):
    """For kernels of a population, in value and in every derivative."""
    x, kernel = jnp.array(RNG.normal(size=(2, 3, 9, 8, 4))), jnp.array(RNG.normal(size=(2, 3, 2, 4, 5)))
    layout: Any = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def found(conv):
        def total(x, kernel):
            return jnp.sin(jax.vmap(lambda x, k: conv(x, k, strides, padding, **layout))(x, kernel)).sum()

        gradient = jax.grad(total, (0, 1))
        return quick_jit(lambda: (gradient(x, kernel), jax.jvp(gradient, (x, kernel), (x, kernel))[1]))()

    for ours, theirs in zip(*map(jax.tree.leaves, map(found, (convolve, lax.conv_general_dilated))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


class Impala(nn.Module):
    @nn.compact
    def __call__(self, x):
        return impala(x, nn.relu, "")


def test_impalas_blocks_are_the_identity_plus_a_branch():
    """With branches of 0, a section is its convolution and the maxima of windows of 3 x 3 with stride 2."""
    network: Any = Impala()
    x = jnp.asarray(RNG.normal(size=(9, 8, 3)), jnp.float32)
    params, apply = quick_jit(network.init)(jax.random.key(0), x), quick_jit(network.apply)

    def without_branches(path, leaf):
        return 0 * np.asarray(leaf) if "conv_1" in jax.tree_util.keystr(path) else leaf

    def section(x, layer):
        x = jax.lax.conv_general_dilated(
            x[None], layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]
        pads = [((-(-n // 2) - 1) * 2 + 3 - n) for n in x.shape[:2]]
        x = np.pad(x, [(p // 2, p - p // 2) for p in pads] + [(0, 0)], constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))
        return jnp.asarray(windows[::2, ::2].max((-1, -2)))

    expected = x
    for i in range(3):
        expected = section(expected, params["params"][f"section_{i}_conv"])
    found = apply(jax.tree_util.tree_map_with_path(without_branches, params), x)
    np.testing.assert_allclose(found, nn.relu(expected), rtol=1e-4, atol=1e-5)
    assert np.abs(np.subtract(found, apply(params, x))).max() > 0.01


def test_simbas_blocks_are_the_identity_plus_a_branch():
    """Without branches the torso is a linear embedding and a layer norm; a branch alone is what its layers say."""
    torso, params, features = made(box(6), VECTOR, torso="simba", activation="relu")
    layers = jax.tree.map(np.asarray, params["params"])
    assert names(params)["block_0_in/kernel"] == (8, 32) and names(params)["block_1_out/kernel"] == (32, 8)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def branch(x, i):
        inner = np.maximum(norm(x) @ layers[f"block_{i}_in"]["kernel"], 0)
        return inner @ layers[f"block_{i}_out"]["kernel"]

    embedding = VECTOR @ layers["embedding"]["kernel"]
    first = embedding + branch(embedding, 0)
    np.testing.assert_allclose(features, norm(first + branch(first, 1)), rtol=1e-4, atol=1e-4)
    silent = {name: jax.tree.map(np.zeros_like, x) if "_out" in name else x for name, x in layers.items()}
    np.testing.assert_allclose(
        quick_jit(torso.apply)({"params": silent}, VECTOR), norm(embedding), rtol=1e-4, atol=1e-4
    )


def test_layer_norm_makes_features_invariant_to_the_scale_of_the_dense_layers_input():
    """As it is before the activation, without which tanh of a large input would differ."""
    _, params, features = made(box(6), VECTOR, layer_norm=True)
    torso = torso_of(box(6), layer_norm=True)
    np.testing.assert_allclose(torso.apply(params, 100 * VECTOR), features, atol=1e-4)
    assert set(params["params"]) == {"hidden_0", "norm_0", "hidden_1", "norm_1"}
    before = VECTOR @ params["params"]["hidden_0"]["kernel"]
    normalised = np.tanh((before - before.mean(-1, keepdims=True)) / before.std(-1, keepdims=True))
    one: Any = Torso(box(6), NetworkConfig(hidden=(8,), layer_norm=True))
    first = {name: params["params"][name] for name in ("hidden_0", "norm_0")}
    np.testing.assert_allclose(one.apply({"params": first}, VECTOR), normalised, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("torso", CONVOLUTIONS)
def test_layer_norm_makes_what_every_convolution_computes_independent_of_its_kernels_scale(torso):
    _, params, features = named(f"{torso}, normalised")

    def scaled(path, x):
        return 10 * np.asarray(x) if "conv" in str(path[1]) and "norm" not in str(path[1]) else x

    louder = jax.tree_util.tree_map_with_path(scaled, params)
    num_convs = len([name for name in params["params"] if "conv" in name and "norm" not in name])
    assert num_convs == len([name for name in params["params"] if "conv" in name and "norm" in name])
    apply = quick_jit(torso_of(IMAGES, torso=torso, layer_norm=True).apply)
    np.testing.assert_allclose(apply(louder, IMAGE), features, rtol=1e-3, atol=1e-3)
    plain, plain_params, plain_features = named(torso)
    without = quick_jit(plain.apply)(jax.tree_util.tree_map_with_path(scaled, plain_params), IMAGE)
    assert np.abs(np.subtract(without, plain_features)).max() > 0.1


def test_critic_layer_norm_gives_the_normalised_critics_and_the_plain_policy():
    env = arms_env(box(2, low=-1, high=1))._replace(observation_space=box(6))
    key, obs, action = jax.random.key(0), VECTOR[0], jnp.ones((3, 2))

    def network(**config):
        return actor_q(env, ActorQConfig(hidden=(8, 4), memory="gru", memory_size=3, **config))

    plain, normalised, mixed = network(), network(layer_norm=True), network(critic_layer_norm=True)
    seen = Moment(obs, plain.memory(3))
    params = {"policy": plain.init(key, seen)["policy"], "critic": normalised.init(key, seen)["critic"]}
    assert jax.tree.structure(mixed.init(key, seen)) == jax.tree.structure(params)
    np.testing.assert_array_equal(mixed.apply(params, seen)[0].mode(), plain.apply(params, seen)[0].mode())
    np.testing.assert_array_equal(mixed.q(params, seen, action), normalised.q(params, seen, action))


@pytest.mark.parametrize("name", TORSOS)
def test_critics_of_actions_have_every_torso(name):
    """Q depends on the action, and its features are of the observation, too."""
    space, obs, config = TORSOS[name]
    env = arms_env(box(2, low=-1, high=1))._replace(observation_space=space)
    network: Any = actor_q(env, ActorQConfig(**SMALL | config | {"activation": "tanh"}))

    @quick_jit
    def run(key, action):
        params = network.init(key, obs)
        q = lambda action, obs: network.q(params, obs, action)  # noqa: E731
        return q(action, obs), jax.grad(lambda action: q(action, obs).sum())(action), q(action, 1 - obs)

    q, slope, of_other = run(jax.random.key(0), jnp.zeros((2, 3, 2)))
    assert q.shape == (2, 2, 3) and np.abs(slope).min() > 0 and (np.abs(q - of_other) > 0).all()


# --- bad input ---


@pytest.mark.parametrize(
    ("space", "config", "message"),
    [
        (
            box(6),
            {"torso": "impala"},
            "torso 'impala' needs observations [height, width, channels], but toy has Box(6,)",
        ),
        (
            {"a": Discrete(3), "b": box(10, 5)},
            {"torso": "cnn"},
            "torso 'cnn' needs observations [height, width, channels], but toy has Discrete(3), Box(10, 5)",
        ),
        (
            BITS,
            {"torso": "nature"},
            "torso 'nature' needs images of at least 36 x 36, but toy has one of 10 x 10: try 'cnn', 'impala'",
        ),
        (
            {"a": IMAGES, "b": box(2, 9, 1)},
            {"torso": "cnn"},
            "torso 'cnn' needs images of at least 3 x 3, but toy has one of 2 x 9: try 'impala'",
        ),
        (
            box(6),
            {"torso": "simba", "hidden": (8, 16)},
            "hidden ((8, 16)) must hold equal widths for torso 'simba', one for each block",
        ),
        (
            box(6),
            {"torso": "simba", "layer_norm": True},
            "layer_norm (True) must be off with torso 'simba', which has layer norms of its own",
        ),
    ],
)
def test_a_torso_that_cannot_read_the_observations_is_refused_in_one_line(space, config, message):
    env = arms_env()._replace(observation_space=space)
    makers: Any = ((actor_critic, NetworkConfig), (actor_q, lambda **c: ActorQConfig("categorical", **c)))
    for make, kind in makers:
        with pytest.raises(UsageError) as error:
            make(env, kind(**config))
        assert str(error.value) == message
    with pytest.raises(
        UsageError, match=r"^critic_layer_norm \(True\) must be off with torso 'simba', which has layer"
    ):
        actor_q(arms_env(), ActorQConfig("categorical", torso="simba", critic_layer_norm=True))


def test_nature_reads_the_smallest_image_that_it_does_not_refuse():
    space = box(36, 36, 1, low=0, high=255, dtype=np.uint8)
    actor_critic(arms_env()._replace(observation_space=space), NetworkConfig(torso="nature"))
    params = jax.eval_shape(torso_of(space, torso="nature").init, jax.random.key(0), jnp.zeros((36, 36, 1), jnp.uint8))
    assert names(params)["hidden_0/kernel"] == (64, 8)
