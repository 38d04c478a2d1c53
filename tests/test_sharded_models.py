"""A language model divided over the devices of an agent learns what it learns on one, and each device holds its share.

The facts are found by this file as a script, in a process with four CPU devices and in float64.
"""

import itertools
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import found_by, quick_jit, quick_options
from memory_forecast import MODELS, Config, abstract_start
from memory_forecast import task as forecast_task

from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.envs.tasks import Judge, Task, token_env
from purepg.language.model import LanguageModelConfig, language_model
from purepg.language.sharding import axis_of
from purepg.run import plan as plans
from purepg.run import population as populations
from purepg.run.plan import RunConfig, prepare
from purepg.run.population import Population
from purepg.run.text.config import TextRunConfig
from purepg.run.text.population import TextPopulation
from purepg.train import averaged
from purepg.types import UsageError

L, R, V = 3, 4, 12
UPDATES = 2
# Four devices divide all sizes but the two heads of keys and values.
ALL = LanguageModelConfig(
    hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=20, qkv_bias=True
)  # fmt: skip
FITTING: Any = {"rows_at_once": 4, "tokens_at_once": 8, "remat": True, "scan_layers": True}
ADAPTERS = replace(ALL, num_layers=2, lora_rank=2, lora_targets=("query", "down"), tied_head=False, **FITTING)
CASES = {"all": ALL, "adapters": ADAPTERS}
PLACES = [("all", "tensor", 2), ("adapters", "parameters", 4)]
GRPO = GRPOConfig(num_prompts=4, group_size=4, kl_coef=0.1, num_held_out=0, learning_rate=0.01)
CLONE = CloneConfig(batch_size=4, num_held_out=0)
# Two agents on two devices each; the other tests' agents are alone.
PYTHON = replace(ALL, lora_rank=2, lora_targets=("query", "down"), shard="parameters")
FILES = {"python": (grpo, GRPO, PYTHON), "rows": (clone, CLONE, ALL)}


def task() -> Task:
    def prompt(key, held_out):
        del held_out
        return jax.random.randint(key, (L,), 0, V, jnp.int32)

    def reward(prompt, response):
        return jnp.mean(jnp.where(response >= 0, jnp.cos(response + prompt[0]), 0.0)).astype(jnp.float32)

    return Task("waves", tuple("abcdefghijkl"), 2, L, R, prompt, lambda key, prompt: prompt, reward)


ENV = token_env(task())


def table(kind: str) -> Any:
    """The task with prompts and a reward in NumPy, which most responses pass, or with rows of demonstrations."""
    rows = np.random.default_rng(1).integers(0, V, (9, 1, L + R), np.int32)

    def reward(place, response):
        waves = np.where(response >= 0, np.cos(response + rows[place, 0, :1]), 0.0)
        return 0.5 + np.asarray(np.mean(waves, axis=-1, dtype=np.float32))[None]

    judge = Judge(rows[:, 0, :L], ("waves",), reward, np.ones(1, np.float32))
    env = token_env(task()._replace(**{"python": {"judge": judge}, "rows": {"rows": rows}}[kind]))
    return env._replace(held_out=env)


def network(env: Any, config: LanguageModelConfig) -> Any:
    """A model that starts from normal numbers, which stay frozen with LoRA."""
    plain = language_model(env, replace(config, lora_rank=None))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros(L + R, jnp.int32))
    start = jax.tree.map(lambda x: np.asarray(0.4 * rng.normal(size=x.shape)), shapes)
    return language_model(env, config, start)


def population_of(config: LanguageModelConfig, devices: int, **changes: Any) -> tuple[Population, Any]:
    """The population of one agent, and its members."""
    sizes: Any = {"num_seeds": 1, "devices": devices, "devices_per_agent": devices, "eval_episodes": 4} | changes
    run = RunConfig(total_steps=UPDATES * 16 * R, compile_cache=False, **sizes)
    plan = prepare(grpo, network, {"grpo": GRPO, "network": config}, run, {}, ENV)
    (chunk,) = plan.chunks()
    return Population(plan, chunk.program, chunk.shape), chunk.members


# --- in a process of its own ---


def updated(name: str, shard: Any, devices: int) -> Any:
    """(learner, metrics) after two updates, the bytes of the program's arguments on a device, and for every large array
    its name, shape, and shape on a device."""
    config = replace(CASES[name], shard=shard)
    population, members = population_of(config, devices)
    member: Any = grpo(ENV, network(ENV, config), GRPO)
    learner = quick_jit(member.init)(jax.random.key(3)).learner

    def moved(x):  # adapters begin at 0
        return x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    train_state = learner.train_state._replace(params=jax.tree.map(moved, learner.params))
    learner = jax.tree.map(
        lambda x: (x.astype(float) if x.dtype == jnp.float32 else x)[None, None],
        learner._replace(train_state=train_state),
    )
    shapes = population.abstract_state(members)
    guard = jax.tree.map(lambda x: jnp.full(x.shape, 1000, x.dtype), shapes.guard)  # environment steps that are left
    state = population.placed(members, shapes._replace(learner=learner, guard=guard))
    arguments = population._warm, *members, state, jnp.int32(0)
    held = [
        (jax.tree_util.keystr(path), x.shape, x.sharding.shard_shape(x.shape), x.dtype.itemsize)
        for path, x in jax.tree_util.tree_leaves_with_path(arguments)
        if hasattr(x, "sharding")
    ]
    compiled = population._advance.lower(*arguments, num_updates=UPDATES).compile(quick_options())
    memory: Any = compiled.memory_analysis()
    state, metrics = compiled(*arguments)
    kept = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.learner)]
    before = [shape for name, _, shape, _ in held if ".learner" in name]
    assert kept == before, "a state is not divided after an update as it was before"
    metrics = averaged(jax.tree.map(lambda x: x[0, 0], metrics))
    return jax.tree.map(np.asarray, (state.learner, metrics)), memory.argument_size_in_bytes, held


def trained(kind: str, devices: int) -> Any:
    """(learner, metrics) of two agents after two updates from a table, on one device or on four, and the floating-point
    operations of all programs on a device."""
    make, own, config = FILES[kind]
    run = TextRunConfig(eval_samples=2) if kind == "python" else RunConfig()
    per_agent = max(1, devices // 2)
    run = replace(run, total_steps=UPDATES * 16 * R, num_seeds=2, devices=devices, devices_per_agent=per_agent)
    config = config if devices > 1 else replace(config, shard="none")
    plan = prepare(
        make, network, {make.__name__: own, "network": config}, replace(run, compile_cache=False), {}, table(kind)
    )
    (chunk,) = plan.chunks()
    population = (TextPopulation if kind == "python" else Population)(plan, chunk.program, chunk.shape)
    state = population.init(chunk.members)
    learner = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state.learner)
    before = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(learner)]
    state = population.placed(chunk.members, state._replace(learner=learner))
    state, metrics = population.advance(chunk.members, state, 0, UPDATES)
    assert [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.learner)] == before
    work = [population._compiled(program).cost_analysis()["flops"] for program in population._programs]
    return (jax.device_get(state.learner), averaged(metrics)), sum(work)


def find(folder: Path) -> None:
    found: dict[Any, Any] = {}
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(populations, "compile_options", quick_options)
        found |= {place: updated(*place) for place in [(name, "none", 1) for name in CASES] + PLACES}
        found |= {place: trained(*place) for place in itertools.product(FILES, (1, 4))}
    (folder / "found").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    find(Path(sys.argv[1]))


# --- what it found ---


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return found_by(__file__, folder)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_two_updates_of_a_divided_model_are_those_of_one_device_to_1e_10(found, place):
    (one, metrics), _, _ = found[place[0], "none", 1]
    (learner, divided_metrics), _, _ = found[place]
    assert metrics["grad_norm"][1] > 0.01 and metrics["kl_reference"][1] > 1e-4
    for x, y in zip(jax.tree.leaves((one, metrics)), jax.tree.leaves((learner, divided_metrics)), strict=True):
        exact = 1e-10 if x.dtype == np.float64 else 1e-6  # counts, and what is kept in float32
        np.testing.assert_allclose(y, x, rtol=exact, atol=exact)


@pytest.mark.parametrize("kind", FILES)
def test_two_updates_from_pythons_rewards_or_a_files_rows_are_those_of_one_device_to_1e_10(found, kind):
    """Those of two agents on two devices each, with what their held-out prompts or rows say."""
    (one, metrics), work = found[kind, 1]
    several, shared_work = found[kind, 4]
    assert metrics["grad_norm"].min() > 0.01
    name, least = {"python": ("eval/pass@2", 0.1), "rows": ("eval/loss", 1.0)}[kind]
    assert np.isfinite(metrics[name][..., 0]).all() and metrics[name][0, 0, 0] > least
    assert shared_work < work / 3 and jax.tree.structure((one, metrics)) == jax.tree.structure(several)
    for x, y in zip(jax.tree.leaves((one, metrics)), jax.tree.leaves(several), strict=True):
        exact = 1e-10 if x.dtype == np.float64 else 1e-6
        np.testing.assert_allclose(y, x, rtol=exact, atol=exact)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_device_holds_its_share_of_every_matrix_and_the_program_takes_no_more(found, place):
    name, shard, devices = place
    _, num_bytes, held = found[place]
    small = ("norm", "bias", "value_head")
    whole = ("lora_a", "lora_b") if shard == "tensor" else ()
    if shard == "tensor" and ALL.num_kv_heads % devices:
        whole += ("attention",)
    matrices = [
        x for x in held if len(x[1]) > 1 and math.prod(x[1]) > 4 and not any(n in x[0] for n in (*small, *whole))
    ]
    assert len(matrices) > 3 and {".learner" in x[0] for x in matrices} >= {name == "all"}
    for path, shape, own, _ in matrices:
        assert math.prod(own) * devices == math.prod(shape), path
    assert num_bytes <= sum(math.prod(own) * size for _, _, own, size in held) + 200


@pytest.mark.parametrize(
    "shard, path, shape, axis",
    [
        ("parameters", ("mlp_0", "gate", "kernel"), (8, 20), -1),
        ("parameters", ("mlp_0", "gate", "kernel"), (8, 22), -2),  # 4 does not divide 22
        ("parameters", ("mlp_0", "gate", "kernel"), (6, 22), None),
        ("parameters", ("mlp_0", "gate", "lora_b"), (2, 20), -1),
        ("tensor", ("blocks", "mlp", "up", "kernel"), (2, 8, 20), -1),
        ("tensor", ("blocks", "mlp", "down", "kernel"), (2, 20, 8), -2),
        ("tensor", ("mlp_0", "gate", "lora_a"), (8, 4), None),
        ("tensor", ("mlp_0", "down", "lora_a"), (20, 4), -2),
        ("tensor", ("mlp_0", "down", "lora_b"), (4, 8), None),
        ("tensor", ("attention_0", "query", "kernel"), (8, 8), None),  # of two heads of keys and values
        ("tensor", ("embedding",), (12, 8), -2),
        ("tensor", ("head", "kernel"), (8, 12), -1),
        ("none", ("head", "kernel"), (8, 12), None),
    ],
    ids=str,
)
def test_four_devices_divide_an_axis_that_they_can(shard, path, shape, axis):
    keys = [jax.tree_util.DictKey(name) for name in ("params", *path)]
    assert axis_of(replace(ALL, shard=shard), keys, shape, 4) == axis


@pytest.mark.parametrize(
    "shard, devices, changes, expected",
    [
        ("tensor", 1, {}, r"shard \(tensor\) divides a model over an agent's devices: set devices_per_agent above 1"),
        ("tensor", 4, {"mlp_size": 18}, r"mlp_size \(18\) must be divisible by devices_per_agent \(4\) with shard ten"),
        (
            "parameters",
            4,
            {"hidden_size": 6, "num_heads": 3, "num_kv_heads": 1},
            r"hidden_size \(6\) must be divisible",
        ),
        ("parameters", 4, {"rows_at_once": 6}, r"rows_at_once \(6\) must be divisible by devices_per_agent \(4\)"),
        ("parameters", 4, {"eval_episodes": 6}, r"eval_episodes \(6\) must be divisible by devices_per_agent \(4\)"),
    ],
    ids=str,
)
def test_what_devices_cannot_divide_is_refused_in_one_line(monkeypatch, shard, devices, changes, expected):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    run = {"eval_episodes": changes["eval_episodes"]} if "eval_episodes" in changes else {}
    model = {name: value for name, value in changes.items() if name not in run}
    with pytest.raises(UsageError, match=expected) as error:
        population_of(replace(ALL, shard=shard, **model), devices, **run)
    assert "\n" not in str(error.value)


def test_on_a_cpu_tensors_are_divided_by_one_group_of_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(plans, "_prepare_devices", lambda run, env, num_settings: 4)  # as found without --devices
    run = RunConfig(num_seeds=2, devices_per_agent=2, eval_episodes=4, compile_cache=False)
    tensor, parameters = ({"grpo": GRPO, "network": replace(ALL, shard=shard)} for shard in ("tensor", "parameters"))
    assert prepare(grpo, network, tensor, run, {}, ENV).num_devices == 2
    assert prepare(grpo, network, parameters, run, {}, ENV).num_devices == 4
    with pytest.raises(UsageError, match=r"devices \(4\) must be devices_per_agent \(2\) with shard tensor on a CPU"):
        prepare(grpo, network, tensor, replace(run, devices=4), {}, ENV)


def test_the_models_of_the_forecast_have_as_many_parameters_as_those_published():
    """Billions, of arXiv:2412.15115 and the models' cards."""
    published = {"0.5B": 0.49, "1.5B": 1.54, "7B": 7.61}
    for name, (config, num_tokens) in MODELS.items():
        start = abstract_start(forecast_task(num_tokens, Config()), config)
        assert math.floor(sum(x.size for x in jax.tree.leaves(start)) / 1e7) / 100 == published[name]
