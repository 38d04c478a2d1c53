"""What fine-tuning takes to fit: adapters of a frozen model, rows and tokens in chunks, and computation in bfloat16."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, quick_jit
from test_tokens import L, parameters, task

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.envs.tasks import token_env
from purepg.lab.exact import in_float64
from purepg.language.lora import TARGETS, joined
from purepg.language.model import LanguageModel, LanguageModelConfig, language_model
from purepg.language.transformer import stacked, unstacked
from purepg.types import UsageError

R, V, B, K = 6, 8, 7, 3
ENV = token_env(task(V, R))
# Sizes that no other axis has, so that a shape says what an array holds.
PLAIN = LanguageModelConfig(
    hidden_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=10, mlp_size=14, tied_head=False,
    qkv_bias=True, value_head=True, temperature=0.7,
)  # fmt: skip
FULL_RANK = 14
CHUNKS: Any = {"rows_at_once": 3, "tokens_at_once": 5, "remat": True}
HEADLESS = dataclasses.replace(PLAIN, value_head=False)
BASE: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters(language_model(ENV, HEADLESS), 3))
rng = np.random.default_rng(0)
ROWS: Any = np.where(np.arange(L + R) < L + R - rng.integers(0, R, (B, 1)), rng.integers(0, V, (B, L + R)), -1)
ROWS[:, 0] = -1


def adapted(config: LanguageModelConfig = PLAIN, rank: int = 5, **changes: Any) -> LanguageModel:
    changed = dataclasses.replace(config, lora_rank=rank, lora_alpha=3.0, **changes)
    return language_model(ENV, changed, {"params": dict(BASE["params"])})


def full(**changes: Any) -> LanguageModel:
    return language_model(ENV, dataclasses.replace(PLAIN, **changes))


def loss(model: LanguageModel, params: Any, other: Any, token: Any) -> Any:
    """Of all that is read of a score: probabilities, entropies, divergences from one and to another, values."""
    policy, value = model.score(params, token)
    other = model.score(other, token)[0]
    weight = jnp.cos(jnp.arange(B * R)).reshape(B, R)
    log_prob = jnp.where(token[:, L:] >= 0, policy.log_prob(token[:, L:]), 0)
    terms = log_prob + 0.3 * policy.entropy() + 0.2 * policy.kl(other) + 0.1 * other.kl(policy) + value**2
    return jnp.sum(weight * terms) + jnp.sum(policy.mode() * 0.0)


def gradient(model: LanguageModel, params: Any, other: Any) -> Any:
    of = quick_jit(jax.value_and_grad(lambda *arguments: loss(model, *arguments)))
    return in_float64(of, params, other, ROWS)


def both(model: LanguageModel, scale: float = 0.3) -> tuple[Any, Any]:
    """Parameters of two policies, in float64."""
    made = (parameters(model, seed, scale) for seed in (5, 6))
    return tuple(jax.tree.map(lambda x: np.asarray(x, np.float64), x) for x in made)


def same(got: Any, expected: Any) -> None:
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    assert scale > 1e-2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * scale), got, expected)


# --- adapters ---


def test_adapters_of_full_rank_have_the_chain_rules_gradient_and_merge_into_the_same_model():
    model = adapted(rank=FULL_RANK)
    params, other = both(model, 0.2)
    scale = 3.0 / FULL_RANK
    value, found = gradient(model, params, other)
    value_of_whole, of_whole = gradient(full(), *in_float64(lambda *x: tuple(map(model.plain, x)), params, other))
    np.testing.assert_allclose(value, value_of_whole, rtol=1e-12)
    same(found["params"]["value_head"], of_whole["params"]["value_head"])
    num_adapters = 0
    for module in found["params"].keys() - {"value_head"}:
        for name, got in found["params"][module].items():
            down, up = (params["params"][module][name][x] for x in ("lora_a", "lora_b"))
            slope = of_whole["params"][module][name]["kernel"]
            same(got, {"lora_a": scale * slope @ up.T, "lora_b": scale * down.T @ slope})
            num_adapters += 1
    assert num_adapters == len(TARGETS) * PLAIN.num_layers


def test_at_the_start_the_policy_is_the_frozen_models_and_only_adapters_and_the_value_head_learn():
    model = adapted(lora_targets=("query", "down"))._replace(start=jax.tree.map(np.float32, BASE))
    algorithm = grpo(ENV, model, GRPOConfig(num_prompts=1, group_size=2, num_held_out=0))
    state = quick_jit(algorithm.init)(jax.random.key(0))
    params: Any = state.learner.params
    names = {f"{module}_{i}" for module in ("attention", "mlp") for i in range(PLAIN.num_layers)}
    assert params["params"].keys() == names | {"value_head"}
    assert params["params"]["attention_1"].keys() == {"query"} and params["params"]["mlp_0"].keys() == {"down"}
    assert all(x.any() for x in jax.tree.leaves(params["params"]["mlp_0"]["down"]["lora_a"]))
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, state.learner)]
    assert sizes[1] < 4 * sizes[0] + 10  # parameters, reference, two moments of Adam
    base = joined(BASE, {"params": {"value_head": params["params"]["value_head"]}})
    got, expected = (
        quick_jit(lambda params, model=model: model.score(params, ROWS)[0].logits)(x)
        for model, x in ((model, params), (full(), jax.tree.map(jnp.float32, base)))
    )
    np.testing.assert_array_equal(got, expected)


def test_agents_adapters_share_one_frozen_model_in_every_product():
    model = adapted(**CHUNKS)
    params = jax.tree.map(lambda *x: jnp.stack(x), *(parameters(model, seed) for seed in range(K)))
    rows = jnp.broadcast_to(jnp.asarray(ROWS), (K, *ROWS.shape))

    def slopes(start, params, rows):
        model_of = model._replace(start=start)
        return jax.vmap(jax.grad(lambda params, token: loss(model_of, params, params, token)))(params, rows)

    base = jax.tree.map(jnp.float32, BASE)
    shapes = {x.shape for x in jax.tree.leaves(BASE) if x.ndim == 2}
    made = equations(slopes, base, params, rows)
    assert not {x.aval.shape for e in made for x in e.outvars} & {(K, *shape) for shape in shapes}
    products = [e for e in made if e.primitive.name == "dot_general"]
    shared = [e for e in products if any(x.aval.shape in shapes for x in e.invars)]
    assert len(shared) > 2 * len(TARGETS) * PLAIN.num_layers
    assert not any(axes for e in shared for axes in e.params["dimension_numbers"][1])
    together = quick_jit(slopes)(base, params, rows)
    alone = quick_jit(lambda params: slopes(base, *jax.tree.map(lambda x: x[None], (params, jnp.asarray(ROWS)))))
    for k in range(K):
        own = alone(jax.tree.map(lambda x, k=k: x[k], params))
        jax.tree.map(lambda x, y, k=k: np.testing.assert_allclose(x[k], y[0], rtol=1e-3, atol=1e-4), together, own)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 0}, r"lora_rank \(0\) must be at least 1"),
        ({"lora_targets": ("keys",)}, r"lora_targets\[0\] \(.keys.\) must be query, key"),
        ({"lora_targets": ()}, r"lora_targets \(\(\)\) must name at least one of query, key"),
        ({"lora_alpha": 0.0}, r"lora_alpha \(0.0\) must be above 0"),
        ({"rows_at_once": 0}, r"rows_at_once \(0\) must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused_in_one_line(changes, message):
    config = dataclasses.replace(HEADLESS, **{"lora_rank": 2} | changes)
    with pytest.raises(UsageError, match=message) as error:
        language_model(ENV, config, BASE)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"lora_rank \(2\) needs a model to adapt: set start"):
        language_model(ENV, dataclasses.replace(HEADLESS, lora_rank=2))


# --- chunks ---


@pytest.mark.parametrize("remat", [False, True])
def test_one_block_that_is_compiled_for_all_layers_is_as_good_as_several(remat):
    """Their gradients, their samples, and their adapters merged, layer by layer again."""
    several, one = adapted(), adapted(scan_layers=True, remat=remat)
    own = both(several)
    (value, slope), (again, slope_again) = (
        gradient(model, *x) for model, x in ((several, own), (one, [stacked(x, PLAIN.num_layers) for x in own]))
    )
    np.testing.assert_allclose(again, value, rtol=1e-13)
    same(unstacked(slope_again), slope)
    if remat:  # a cache is never part of a gradient
        return
    start, params = jax.tree.map(np.float32, (BASE, own[0]))
    drawn, drawn_again = (
        quick_jit(lambda x, model=model: model.generate(jax.random.key(0), x, jnp.asarray(ROWS[:, :L]), 2))(x)
        for model, x in (
            (several._replace(start=start), params),
            (one._replace(start=stacked(start, PLAIN.num_layers)), stacked(params, PLAIN.num_layers)),
        )
    )
    np.testing.assert_array_equal(drawn_again[0], drawn[0])
    np.testing.assert_allclose(drawn_again[1], drawn[1], rtol=0, atol=1e-5)
    same(in_float64(one.plain, stacked(own[0], PLAIN.num_layers)), in_float64(several.plain, own[0]))


@pytest.mark.parametrize("make", [full, adapted])
def test_a_loss_and_its_gradient_in_chunks_are_those_of_the_whole_batch(make):
    """Of three rows out of seven at a time, and five tokens out of forty-two: the last chunks are not full."""
    whole, divided = make(), make(**CHUNKS)
    (value, slope), (again, slope_again) = (gradient(model, *both(whole)) for model in (whole, divided))
    np.testing.assert_allclose(again, value, rtol=1e-13)
    same(slope_again, slope)


def test_in_chunks_no_array_of_a_gradient_holds_the_batchs_logits_or_its_blocks_insides():
    params = parameters(full(), 5)

    def largest(model, last):
        """The most rows of `last` numbers that an array holds."""
        slopes = jax.grad(lambda *arguments: loss(model, *arguments))
        made = [x.aval for e in equations(slopes, params, params, jnp.asarray(ROWS)) for x in e.outvars]
        return max(math.prod(x.shape[:-1]) for x in made if x.shape and x.shape[-1] == last)

    # A vocabulary as small as this is embedded by its one-hot rows, [rows, L + R, V].
    for model, rows in (full(), B), (full(**CHUNKS), CHUNKS["rows_at_once"]):
        assert largest(model, V) == largest(model, PLAIN.mlp_size) == rows * (L + R)
    assert CHUNKS["rows_at_once"] * (L + R) < B * R


def test_a_batch_may_have_any_leading_axes():
    model = full(**CHUNKS)
    rows, params = np.stack([ROWS, ROWS[::-1]]), parameters(model, 5)
    log_prob, value = quick_jit(lambda x: (model.score(params, x)[0].log_prob(x[..., L:]), model.score(params, x)[1]))(
        jnp.maximum(rows, 0)
    )
    assert log_prob.shape == value.shape == (2, B, R)
    np.testing.assert_allclose(log_prob[0], log_prob[1, ::-1], rtol=1e-5)
    np.testing.assert_allclose(value[0], value[1, ::-1], rtol=1e-5, atol=1e-6)


# --- bfloat16 ---


def test_in_bfloat16_what_learns_stays_float32_and_its_gradient_is_near():
    exact, narrow = adapted(), adapted(bfloat16=True, **CHUNKS)
    params, other = (parameters(exact, seed, 0.3) for seed in (5, 6))
    start = jax.tree.map(jnp.float32, BASE)
    slopes = [
        quick_jit(jax.grad(lambda *x, model=model: loss(model, *x)))(params, other, jnp.asarray(ROWS))
        for model in (exact._replace(start=start), narrow._replace(start=start))
    ]
    assert {x.dtype for x in jax.tree.leaves(slopes[1])} == {np.dtype(np.float32)}
    one, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(slope)]) for slope in slopes)
    assert 1e-5 < np.linalg.norm(other - one) / np.linalg.norm(one) < 0.05
    assert narrow.is_narrow(params) and not exact.is_narrow(params)


def test_a_frozen_model_in_bfloat16_gives_what_one_in_float32_does():
    model = adapted(bfloat16=True)
    params = parameters(model, 5, 0.3)
    score = quick_jit(lambda start: model._replace(start=start).score(params, jnp.asarray(ROWS))[0].logits)
    wide = score(jax.tree.map(jnp.float32, BASE))
    np.testing.assert_array_equal(wide, score(jax.tree.map(jnp.bfloat16, BASE)))
    assert wide.dtype == jnp.float32
