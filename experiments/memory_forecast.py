"""Forecasts the memory of fine-tuning Qwen2.5 by GRPO on GPUs that this machine need not have.

One update, from sampling to the optimiser's step, is compiled for an H100, or for eight of them, from shapes alone, and
XLA says what the compiled program keeps on each. Nothing is run: a real run adds what CUDA, its libraries and the
fragmentation of memory take. Needs `pip install "jax[cuda13]"`, which is several gigabytes, and no GPU. Kernels are not
autotuned, so that a real device may choose others, which need other memory.
"""

import re
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gpu_cost import TARGETS, target_of
from jax.experimental import topologies

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.config import Count
from purepg.envs.tasks import Task, token_env
from purepg.language.model import LanguageModelConfig, language_model
from purepg.language.sharding import Shard, axis_of
from purepg.precision import in_bfloat16
from purepg.run.devices import Spread
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.runtime import compiling_for
from purepg.train import guard, train
from purepg.types import Env, UsageError

GIB = 2**30
# The config.json of each on huggingface.co/Qwen. Layers and heads are also in arXiv:2412.15115, table 1.
QWEN = {"rope_theta": 1e6, "rms_eps": 1e-6, "qkv_bias": True}
MODELS = {  # with the number of words
    "0.5B": (LanguageModelConfig(896, 24, 14, 2, 64, 4864, **QWEN), 151_936),
    "1.5B": (LanguageModelConfig(1536, 28, 12, 2, 128, 8960, **QWEN), 151_936),
    "7B": (LanguageModelConfig(3584, 28, 28, 4, 128, 18_944, tied_head=False, **QWEN), 152_064),
}


@dataclass(frozen=True)
class Config:
    """What is forecast.

    Attributes:
      models: sizes of Qwen2.5.
      gpus: of a divided model.
      shards: how it is divided.
      lora_rank: rank of the adapters, besides which all parameters learn.
      num_prompts: of an update.
      group_size: responses to each.
      prompt_length: tokens.
      response_length: tokens.
      rows_at_once: rows that are scored at a time, by all GPUs together.
      tokens_at_once: tokens whose logits are computed at a time, by all GPUs together.
    """

    models: tuple[str, ...] = tuple(MODELS)
    gpus: Count = 8
    shards: tuple[Shard, ...] = ("parameters",)
    lora_rank: Count = 16
    num_prompts: Count = 8
    group_size: Count = 8
    prompt_length: Count = 128
    response_length: Count = 1024
    rows_at_once: Count = 8
    tokens_at_once: Count = 2048


class Found(NamedTuple):
    """The bytes on each device during an update."""

    kept: int  # between updates: what learns, its optimiser, the reference, and a frozen model
    temporaries: int
    seconds: float  # that it took to compile

    @property
    def all(self) -> int:
        return self.kept + self.temporaries


def task(num_tokens: int, c: Config) -> Env:
    """A task of these sizes, whose content does not matter."""

    def prompt(key, held_out):
        del held_out
        return jax.random.randint(key, (c.prompt_length,), 0, num_tokens, jnp.int32)

    def reward(prompt, response):
        del prompt
        return jnp.mean(response >= 0, dtype=jnp.float32)

    words: Any = range(num_tokens)
    return token_env(Task("text", words, 0, c.prompt_length, c.response_length, prompt, lambda key, x: x, reward))


def abstract_start(env: Env, config: LanguageModelConfig) -> Any:
    """The shapes of a pretrained model, in bfloat16 where it stays frozen."""
    plain = language_model(env, replace(config, lora_rank=None))
    start = jax.eval_shape(plain.init, jax.random.key(0), jax.ShapeDtypeStruct((env.task.prompt_length,), jnp.int32))
    return jax.eval_shape(in_bfloat16, start) if config.lora_rank else start


def forecast(name: str, lora_rank: int | None, shard: Shard, devices: list[Any], c: Config) -> Found:
    """Compiles an update for these devices."""
    shape, num_tokens = MODELS[name]
    how: Any = {"rows_at_once": c.rows_at_once, "tokens_at_once": c.tokens_at_once, "shard": shard}
    config = replace(shape, bfloat16=True, remat=True, scan_layers=True, lora_rank=lora_rank, **how)
    env = task(num_tokens, c)
    start = abstract_start(env, config)
    model = language_model(env, config, start)
    settings = GRPOConfig(num_prompts=c.num_prompts, group_size=c.group_size, num_held_out=0, kl_coef=0.01)
    num = len(devices)
    over = Spread(1, 1, num, num, None if shard == "none" else partial(axis_of, config), devices)

    def algorithm(start):
        return guard(grpo(env, model._replace(start=start), settings), 10**9)

    def init(start, hyper, s):
        return over(lambda hyper, s: algorithm(start).init(jax.random.key(0)))(hyper, s)

    def update(start, hyper, s, state):
        def member(hyper, s, state):
            return train(jax.random.fold_in(jax.random.key(0), s), algorithm(start), state, 0, 1)

        state, metrics = over(member)(hyper, s, state)
        return over.divided(state), metrics

    members: Any = {"unused": {"float": jnp.zeros(1)}}, jnp.zeros(1, jnp.int32)
    members = jax.eval_shape(lambda: members)
    state = jax.eval_shape(init, start, *members)
    alone = jax.sharding.SingleDeviceSharding(devices[0])

    def placed(tree, shardings=None):
        shardings = jax.tree.map(lambda _: alone, tree) if num == 1 else shardings
        of = partial(jax.tree.map, lambda x, of: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of))
        return of(tree, over.shared(tree) if shardings is None else shardings)

    abstract = over.abstract(state)
    state = placed(state, jax.tree.map(lambda x: x.sharding, abstract))
    arguments = placed(start), *(placed(x) for x in members), state
    begun = time.time()
    lowered = jax.jit(update, donate_argnums=3, out_shardings=(over.placed, None)).lower(*arguments)
    done = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})  # to autotune needs the device
    found: Any = done.memory_analysis()
    grown = found.output_size_in_bytes - found.alias_size_in_bytes
    return Found(found.argument_size_in_bytes, found.temp_size_in_bytes + grown, time.time() - begun)


def devices_of(num: int) -> list[Any]:
    """So many H100s of a machine. Raises UsageError without the plugin for CUDA."""
    target_of("h100")
    text = TARGETS["h100"].read_text()
    return list(topologies.get_topology_desc(platform="cuda", topology=f"1x1x{num}", target_config=text).devices)


def study(config: Config) -> Study:
    """The forecasts, in a table.

    Raises:
      UsageError: a model is not known, sizes do not divide, or the plugin for CUDA is not installed.
    """
    for name in config.models:
        if name not in MODELS:
            raise UsageError(f"models ({name}) must be among {', '.join(MODELS)}")
    for field in ("num_prompts", "rows_at_once", "tokens_at_once"):
        if getattr(config, field) % config.gpus:
            raise UsageError(f"{field} ({getattr(config, field)}) must be divisible by gpus ({config.gpus})")
    size = re.search(r"device_memory_size: *(\d+)", TARGETS["h100"].read_text())
    assert size is not None
    rows, numbers = [], {}
    for name in config.models:
        for rank in (None, config.lora_rank):
            places: list[tuple[int, Shard]] = [(1, "none"), *((config.gpus, shard) for shard in config.shards)]
            for num, shard in places:
                with compiling_for("gpu"):
                    found = forecast(name, rank, shard, devices_of(num), config)
                learns = "all" if rank is None else f"LoRA, rank {rank}"
                cells = [f"{x / GIB:,.1f}" for x in (found.kept, found.temporaries, found.all)]
                rows.append([name, learns, f"{num}", shard, *cells, "yes" if found.all < int(size[1]) else "no"])
                numbers[f"{name} {learns} {num} {shard}"] = found._asdict()
                print(" | ".join(rows[-1]), f"| compiled in {found.seconds:.0f} s", flush=True)
    header = ["model", "learns", "GPUs", "shard", "GiB kept", "GiB of temporaries", "GiB on each", "fits into 80 GB"]
    written = table(header, rows)
    return Study(written, numbers, table=written)


if __name__ == "__main__":
    main(study, Config(), __doc__)
