"""A language model divided over the devices of an agent learns what it learns on one, and each device holds its share.

The facts are found by this file as a script, in a process with four CPU devices and in float64.
"""

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, quick_options

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.envs.tasks import Task, token_env
from purepg.language.model import LanguageModelConfig, language_model
from purepg.language.sharding import axis_of
from purepg.language.transformer import stacked
from purepg.run.devices import Spread
from purepg.runtime import users_environment
from purepg.train import averaged, train
from purepg.types import State

L, R, V = 3, 4, 12
# Of all sizes, four devices divide all but the one head of keys and values.
PLAIN = LanguageModelConfig(
    hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=20, qkv_bias=True, value_head=False,
    rows_at_once=4, tokens_at_once=8, remat=True, scan_layers=True,
)  # fmt: skip
LORA = replace(PLAIN, lora_rank=2, tied_head=False)
CASES = {"all": PLAIN, "adapters": LORA}
PLACES = [("all", "parameters", 4), ("all", "tensor", 2), ("adapters", "parameters", 2), ("adapters", "tensor", 4)]
GRPO = GRPOConfig(num_prompts=4, group_size=4, num_epochs=2, kl_coef=0.1, num_held_out=0, learning_rate=0.01)


def task() -> Task:
    def prompt(key, held_out):
        del held_out
        return jax.random.randint(key, (L,), 0, V, jnp.int32)

    def reward(prompt, response):
        return jnp.mean(jnp.where(response >= 0, jnp.cos(response + prompt[0]), 0.0))

    return Task("waves", tuple("abcdefghijkl"), 2, L, R, prompt, lambda key, prompt: prompt, reward)


ENV = token_env(task())._replace(held_out=token_env(task(), held_out=True))


def start_of(config: LanguageModelConfig) -> Any:
    """Normal numbers for all parameters but adapters, as `start` has them."""
    plain = language_model(ENV, replace(config, lora_rank=None))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros(L + R, jnp.int32))
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape), shapes)


def two_updates(name: str, shard: Any, devices: int) -> Any:
    """(learner and metrics after two updates, the bytes of arguments on a device, those of the learner there)."""
    config = replace(CASES[name], shard=shard)
    model = language_model(ENV, config, start_of(config))
    over = Spread(1, 1, devices, devices, partial(axis_of, config) if shard != "none" else None)

    def block(start, hyper, s, state):
        def member(hyper, s, state):
            algorithm = grpo(ENV, model._replace(start=start), GRPO)
            return train(jax.random.key(7), algorithm, state, 0, 2)

        state, metrics = over(member)(hyper, s, state)
        return over.divided(state), metrics

    first: Any = quick_jit(grpo(ENV, model, GRPO).init)(jax.random.key(3))

    def moved(x):  # adapters begin at 0
        return x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    params = jax.tree.map(moved, first.learner.params)
    learner = first.learner._replace(train_state=first.learner.train_state._replace(params=params))
    wide = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, learner)
    state = State(jax.tree.map(lambda x: x[None, None], wide), (), None)
    state = jax.tree.map(lambda x, of: jax.device_put(x, getattr(of, "sharding", None)), state, over.abstract(state))
    start = over.everywhere(jax.tree.map(jnp.asarray, model.start))
    arguments = start, {"unused": {"float": jnp.zeros(1)}}, jnp.zeros(1, jnp.int32), state
    begun=time.time()
    compiled = jax.jit(block, out_shardings=((over.placed, None))).lower(*arguments).compile(quick_options())
    print(name, shard, devices, time.time()-begun, file=sys.stderr)
    (Path("/tmp/k6_hlo")).mkdir(exist_ok=True); (Path("/tmp/k6_hlo") / f"{name}_{shard}_{devices}").write_text(compiled.as_text())
    (state, metrics) = compiled(*arguments)
    held = {
        jax.tree_util.keystr(path): (x.shape, x.sharding.shard_shape(x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path((state.learner, start))
    }
    print(compiled.memory_analysis(), file=sys.stderr)
    return jax.tree.map(np.asarray, (state.learner, averaged(jax.tree.map(lambda x: x[0, 0], metrics)))), held


def find(folder: Path) -> None:
    with jax.enable_x64(True):
        found = {place: two_updates(*place) for place in [(name, "none", 1) for name in CASES] + PLACES}
    (folder / "found").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    find(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NPROC": "8"}
    subprocess.run([sys.executable, __file__, folder], env=users_environment() | own, check=True, timeout=300)
    return pickle.loads((folder / "found").read_bytes())


@pytest.mark.parametrize("name, shard, devices", PLACES)
def test_two_updates_are_those_of_one_device_to_1e_10(found, name, shard, devices):
    for x, y in zip(*(jax.tree.leaves(found[place][0]) for place in ((name, "none", 1), (name, shard, devices))), strict=True):
        print(np.abs(x-y).max())
        np.testing.assert_allclose(y, x, rtol=1e-10, atol=1e-10)
